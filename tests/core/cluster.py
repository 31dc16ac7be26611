"""A whole run in memory: one server machine, several worker engines, and a network that a test schedules.

Every message sits in a queue until the test (or a seeded random schedule) delivers it, so any order that real
streams can produce can be produced here: streams keep their own order, everything else is free.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from loscar_core import effects as fx
from loscar_core import worker_engine as we
from loscar_core.config import RunConfig, ServerLimits
from loscar_core.errors import LoscarError, WrongRoundError
from loscar_core.layout import Layout, Segment
from loscar_core.merge import MergeKind, merge
from loscar_core.messages import ServerMessage, WorkerMessage
from loscar_core.plan import RoundKind
from loscar_core.server_machine import Phase, ServerMachine
from loscar_core.worker_cycle import Action, Cycle, Situation

RUN = b"r" * 16


@dataclass(eq=False)
class SimWorker:
    """A worker whose model is a vector and whose training is adding random steps."""

    name: str
    engine: we.WorkerEngine
    live: np.ndarray
    rng: np.random.Generator
    statistics: np.ndarray
    local_steps: int = 1
    overlap_steps: int | None = None
    peer: int | None = None
    up: deque[WorkerMessage] = field(default_factory=deque)
    down: deque[ServerMessage] = field(default_factory=deque)
    updates: deque[we.Update] = field(default_factory=deque)
    open: we.RoundOpen | None = None
    cycle: Cycle | None = None
    ended: bool = False
    consensus: np.ndarray | None = None
    finished: bool = False
    error: LoscarError | None = None
    progress: np.ndarray = field(default_factory=lambda: np.zeros(0))
    contributions: dict[int, np.ndarray] = field(default_factory=dict)
    merged_round: int = 0
    history: list[int] = field(default_factory=list)

    def train(self) -> None:
        """One boundary: everything that the cycle wants done, then one local step."""
        assert self.cycle is not None
        for _ in range(100):
            action = self.cycle.next(self.situation(), 0.0)
            if action is Action.MERGE:
                self.merge()
            elif action is Action.SNAPSHOT:
                self.snapshot()
            else:
                break
            if self.finished:
                return
        if action is Action.TRAIN:
            step = self.rng.normal(size=self.live.size).astype(np.float32)
            self.live += step
            self.progress += step
            self.cycle.stepped()

    def situation(self) -> Situation:
        update = self.updates[0] if self.updates else None
        ready = self.open is not None and not self.open.contributed and not self.updates
        return Situation(
            update_round=None if update is None else update.round,
            update_is_own=update is not None and update.settles is not None and update.round > 0,
            plan_round=self.open.plan.round if ready and self.open else None,
            final=self.open is not None and self.open.plan.kind is RoundKind.FINAL and not self.updates,
        )

    def snapshot(self) -> None:
        assert self.open is not None
        assert self.cycle is not None
        opened = self.open
        self.open = replace(opened, contributed=True)
        taken = self.engine.snapshot(opened.plan.round, self.live[opened.indices], self.statistics, 1, 0)
        if taken is not None:
            self.cycle.took_snapshot(opened.plan.round)
            record = self.engine.ledger.records[opened.plan.round]
            dense = np.zeros(self.live.size)
            dense[opened.indices] = record.sent
            self.contributions[opened.plan.round] = dense
            self.carry_out(taken)

    def merge(self) -> None:
        update = self.updates.popleft()
        assert self.engine.config is not None
        kind = self.engine.config.merge if update.plan is not None else MergeKind.DELAY_CORRECTED
        at = slice(None) if update.indices is None else update.indices
        if update.plan is not None and update.plan.kind is RoundKind.FINAL:
            self.live[at] = update.new_anchor
        else:
            self.live[at] = merge(kind, self.live[at], update.anchor, update.new_anchor, update.sent)
        if update.statistics is not None:
            self.statistics = update.statistics
        if update.round:
            self.merged_round = update.round
            self.history.append(update.round)
        assert self.cycle is not None
        self.cycle.merged(own=update.settles is not None, now=0.0)
        self.finish()

    def finish(self) -> None:
        if self.ended and not self.updates:
            self.finished = True
            if self.consensus is not None:
                self.live = self.consensus.copy()

    def carry_out(self, effects: list[we.WorkerEffect]) -> None:
        for effect in effects:
            match effect:
                case we.Emit(message):
                    self.up.append(message)
                case we.Initialise(vector, _):
                    self.live = vector.copy()
                    self.cycle = Cycle(self.local_steps, 1.0, self.overlap_steps, 0.0)
                case we.RoundOpen():
                    self.open = effect
                    if effect.contributed and self.cycle and self.cycle.in_flight is None:
                        self.cycle.took_snapshot(effect.plan.round)
                case we.Update():
                    self.updates.append(effect)
                case we.RunEnded(vector, _):
                    self.ended, self.consensus = True, vector
                    self.finish()
                case we.Dismissed():
                    self.down.clear()

    def settled_live(self) -> np.ndarray:
        """The live vector once everything that waits is merged."""
        while self.updates:
            self.merge()
        return self.live


class Cluster:
    """The server, the workers and the wires between them."""

    def __init__(
        self,
        workers: int,
        config: RunConfig,
        *,
        dimension: int = 40,
        statistics: int = 0,
        seed: int = 0,
        limits: ServerLimits | None = None,
        identical: bool = True,
    ) -> None:
        self.config = config
        self.limits = limits or ServerLimits(workers=workers, lease_s=1e6, round_cap_s=1e6, recover_after_s=1e6)
        self.layout = Layout(
            (Segment("w", (dimension,), "float32"),),
            (Segment("running_mean", (statistics,), "float32"),) if statistics else (),
        )
        self.random = random.Random(seed)
        self.now = 0.0
        self.server: ServerMachine | None = ServerMachine(config, self.limits, RUN, self.now)
        self.events: list[fx.ServerEffect] = []
        self._peers = 0
        self.streams: dict[int, SimWorker] = {}
        self.workers: list[SimWorker] = []
        for i in range(workers):
            self.add_worker(
                f"w{i}",
                slot=i,
                seed=seed * 1000 + (0 if identical else i),
                dimension=dimension,
                statistics=statistics,
            )

    def add_worker(
        self,
        name: str,
        *,
        slot: int | None = None,
        seed: int = 0,
        dimension: int | None = None,
        statistics: int = 0,
    ) -> SimWorker:
        d = dimension or self.layout.dimension
        start = np.random.default_rng(seed).normal(size=d).astype(np.float32)
        stats = np.zeros(statistics, np.float32)
        incarnation = f"{name}-{len(self.workers)}".encode().ljust(16, b".")
        engine = we.WorkerEngine(name, incarnation, self.layout, start.copy(), stats.copy(), slot=slot)
        worker = SimWorker(
            name,
            engine,
            start,
            np.random.default_rng([seed, len(self.workers) + 1]),
            stats,
            progress=np.zeros(d),
        )
        self.workers.append(worker)
        return worker

    def connect(self, worker: SimWorker) -> None:
        self._peers += 1
        worker.peer = self._peers
        worker.up.clear()
        worker.down.clear()
        self.streams[self._peers] = worker
        worker.up.append(worker.engine.hello())

    def cut(self, worker: SimWorker) -> None:
        """The stream breaks: what is on the wire is lost."""
        if worker.peer is None:
            return
        peer, worker.peer = worker.peer, None
        del self.streams[peer]
        worker.up.clear()
        worker.down.clear()
        worker.open = None
        worker.engine.disconnected()
        if self.server is not None:
            self.carry_out(self.server.disconnected(peer, self.now))

    def kill_server(self) -> None:
        self.server = None
        for worker in self.workers:
            self.cut(worker)

    def start_server(self) -> None:
        self.server = ServerMachine(self.config, self.limits, RUN, self.now)

    def carry_out(self, effects: list[fx.ServerEffect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(peers, message):
                    for peer in peers:
                        if peer in self.streams:
                            self.streams[peer].down.append(message)
                case fx.Close(peer, error, _):
                    worker = self.streams.pop(peer, None)
                    if worker is not None:
                        worker.error = error
                        worker.peer = None
                        worker.open = None
                        worker.engine.disconnected()
                        worker.up.clear()
                        worker.down.clear()
                case _:
                    self.events.append(effect)

    def deliver_up(self, worker: SimWorker) -> None:
        if self.server is not None and worker.peer is not None and worker.up:
            self.carry_out(self.server.received(worker.peer, worker.up.popleft(), self.now))

    def deliver_down(self, worker: SimWorker) -> None:
        if worker.peer is None or not worker.down:
            return
        try:
            worker.carry_out(worker.engine.received(worker.down.popleft()))
        except WrongRoundError:
            self.cut(worker)
            return
        if not worker.down and self.server is not None and worker.peer is not None:
            self.carry_out(self.server.drained(worker.peer, self.now))

    def step(self) -> None:
        """One random event."""
        worker = self.random.choice(self.workers)
        what = self.random.random()
        if what < 0.4:
            self.deliver_up(worker)
        elif what < 0.8:
            self.deliver_down(worker)
        elif worker.cycle is not None and not worker.finished and worker.error is None:
            worker.train()

    def run(self, most: int = 200_000) -> None:
        """Random events until every worker is finished."""
        for _ in range(most):
            if all(w.finished or w.error for w in self.workers):
                return
            self.step()
        raise AssertionError("the run does not end")

    @property
    def finished(self) -> bool:
        return self.server is not None and self.server.phase is Phase.FINISHED

    def check_replicas(self) -> None:
        """Workers at the server's position hold the same bits."""
        assert self.server is not None
        state = self.server.replica
        assert state is not None
        for w in self.workers:
            if w.engine.anchor.position == state.position:
                assert w.engine.anchor.digest == state.digest
                assert w.engine.anchor.vector.tobytes() == state.vector.tobytes()
                assert w.engine.anchor.statistics.tobytes() == state.statistics.tobytes()
                assert w.engine.anchor.inclusion.entries() == state.inclusion.entries()
