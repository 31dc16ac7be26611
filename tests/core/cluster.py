"""A whole run in memory: server machines, worker engines, and a network that a test schedules.

Every message sits in a queue until the test (or a seeded random schedule) moves it, so any order that real streams
can produce can be produced here: streams keep their own order, everything else is free. A stream has two queues a
way, the sender's outbox and the wire: a server is told `drained` when its outbox is empty, long before the worker
has read anything. A stream that breaks is noticed by the worker at once and by the server later, after it has read
some more of what was on the wire.

A `Book` is kept beside it, and every replica, ledger and live model is checked against it whenever it changes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from book import Book, Node, Taken

from loscar_core import effects as fx
from loscar_core import worker_effects as we
from loscar_core.config import RunConfig, ServerLimits
from loscar_core.errors import LoscarError, WrongRoundError
from loscar_core.layout import Layout, Segment
from loscar_core.merge import MergeKind, merge
from loscar_core.messages import Goodbye, Purpose, ServerMessage, VectorChunk, WorkerMessage
from loscar_core.plan import RoundKind
from loscar_core.server_machine import ServerMachine
from loscar_core.server_members import MemberState
from loscar_core.server_round import ServerRound
from loscar_core.server_state import Phase
from loscar_core.worker_cycle import Action, Cycle, Situation
from loscar_core.worker_engine import WorkerEngine

RUN = b"r" * 16


class BookedMachine(ServerMachine):
    """A server that writes down what it commits."""

    book: Book | None = None

    def _commit(self, current: ServerRound) -> None:
        assert self.replica is not None
        if self.book is None:
            super()._commit(current)
            return
        parent = self.book.hold(self)
        since = np.zeros(0, np.float32) if self.residual is None else self.residual.copy()
        super()._commit(current)
        self.book.committed(self, current, parent, since)


@dataclass(eq=False)
class Stream:
    """One connection between a worker and a server."""

    peer: int
    worker: SimWorker
    server: ServerMachine
    up: deque[WorkerMessage] = field(default_factory=deque)
    outbox: deque[ServerMessage] = field(default_factory=deque)
    wire: deque[ServerMessage] = field(default_factory=deque)
    closing: bool = False
    """The server has ended it; what is queued still goes out."""

    @property
    def down(self) -> list[ServerMessage]:
        return [*self.wire, *self.outbox]


@dataclass(eq=False)
class SimWorker:
    """A worker whose model is a vector and whose training is adding random steps."""

    name: str
    engine: WorkerEngine
    live: np.ndarray
    rng: np.random.Generator
    statistics: np.ndarray
    local_steps: int | None = 1
    overlap_steps: int | None = None
    observer: bool = False
    stream: Stream | None = None
    followed: ServerMachine | None = None
    """The server whose rounds it has taken part in last."""
    updates: deque[we.Update] = field(default_factory=deque)
    open: we.RoundOpen | None = None
    pending: tuple[we.RoundOpen, np.ndarray, np.ndarray, bytes] | None = None
    progress_wanted: bool = False
    speed: float = 1.0
    """Share of its chances to train that it takes."""
    link: float = 1.0
    """Share of its chances to receive."""
    cycle: Cycle | None = None
    ended: bool = False
    consensus: np.ndarray | None = None
    finished: bool = False
    crashed: bool = False
    error: LoscarError | None = None
    progress: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Sum of its local steps since it took over the run's model, float64."""
    merged_round: int = 0
    history: list[we.Update] = field(default_factory=list)
    keep_history: bool = False

    @property
    def peer(self) -> int | None:
        return None if self.stream is None else self.stream.peer

    @property
    def out(self) -> bool:
        """Nothing more is to be expected of it."""
        return self.finished or self.crashed or self.error is not None

    def train(self) -> None:
        """One boundary: everything that the cycle wants done, then one local step."""
        assert self.cycle is not None
        if self.observer:
            while self.updates:
                self.merge()
            return
        for _ in range(100):
            action = self.cycle.next(self.situation(), 0.0)
            if action is Action.MERGE:
                self.merge()
            elif action is Action.SNAPSHOT:
                self.gather()
            else:
                break
            if self.finished:
                return
        else:
            raise AssertionError("the cycle never trains")
        if self.progress_wanted and not self.updates and self.pending is None:
            self.progress_wanted = False
            self.carry_out(self.engine.progress(self.live))
        if action is Action.TRAIN:
            self.step()

    def step(self) -> None:
        assert self.cycle is not None
        step = self.rng.normal(size=self.live.size).astype(np.float32)
        self.live += step
        self.progress += step
        self.statistics = self.statistics + self.rng.normal(size=self.statistics.size).astype(np.float32)
        self.cycle.stepped()

    def situation(self) -> Situation:
        update = self.updates[0] if self.updates else None
        ready = self.open is not None and not self.open.contributed and not self.updates and self.pending is None
        final = self.open is not None and self.open.plan.kind is RoundKind.FINAL and not self.updates
        return Situation(
            update_round=None if update is None else update.round,
            update_is_own=update is not None and update.settles is not None and update.round > 0,
            plan_round=self.open.plan.round if ready and self.open else None,
            final=final,
        )

    def gather(self) -> None:
        """Take the values off the model; they are handed over later, as by another thread."""
        assert self.open is not None
        assert self.cycle is not None
        opened, self.open = self.open, replace(self.open, contributed=True)
        base = self.engine.anchor.vector.tobytes()
        self.pending = opened, self.live[opened.indices], self.statistics.copy(), base
        self.cycle.took_snapshot(opened.plan.round)

    def hand_over(self, book: Book | None) -> None:
        """The engine gets the snapshot."""
        assert self.pending is not None
        assert self.cycle is not None
        opened, values, statistics, base = self.pending
        self.pending = None
        before = self.engine.ledger.sent
        effects = self.engine.snapshot(opened.plan.round, values, statistics, 1, 0, opening=opened.opening)
        if effects is None:
            self.cycle.rejected(opened.plan.round)
            return
        if self.engine.ledger.sent == before:
            return  # taken before
        assert self.engine.anchor.vector.tobytes() == base, "a snapshot was compared with another anchor than its own"
        record = self.engine.ledger.records[opened.plan.round]
        if book is not None:
            book.take(
                Taken(
                    self.engine.incarnation,
                    record.plan,
                    record.indices.copy(),
                    record.sent.copy(),
                    statistics,
                    record.parts,
                    record.messages,
                    self.live.size,
                )
            )
        self.carry_out(effects)

    def apply(self, live: np.ndarray, update: we.Update) -> np.ndarray:
        """The live vector after an update; a new one."""
        assert self.engine.config is not None
        live = live.copy()
        kind = self.engine.config.merge if update.plan is not None else MergeKind.DELAY_CORRECTED
        at = slice(None) if update.indices is None else update.indices
        if update.plan is not None and update.plan.kind is RoundKind.FINAL:
            live[at] = update.new_anchor
        else:
            live[at] = merge(kind, live[at], update.anchor, update.new_anchor, update.sent)
        return live

    def merge(self) -> None:
        update = self.updates.popleft()
        self.live = self.apply(self.live, update)
        if update.statistics is not None:
            self.statistics = update.statistics.copy()
        if update.round:
            self.merged_round = update.round
        if self.keep_history:
            self.history.append(update)
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
                    if self.stream is not None:
                        self.stream.up.append(message)
                case we.Initialise(vector, statistics):
                    self.live, self.statistics = vector.copy(), statistics.copy()
                    self.progress = np.zeros(self.live.size)
                    self.cycle = Cycle(self.local_steps, 1.0, self.overlap_steps, 0.0)
                case we.RoundOpen():
                    self.open = effect
                    self.followed = None if self.stream is None else self.stream.server
                    if effect.contributed and self.cycle and self.cycle.in_flight is None:
                        self.cycle.took_snapshot(effect.plan.round)
                case we.Update():
                    self.updates.append(effect)
                case we.ProgressWanted():
                    self.progress_wanted = True
                case we.RunEnded(vector, _):
                    self.ended, self.consensus = True, vector
                    self.finish()
                case _:
                    pass

    def settled(self) -> np.ndarray:
        """The live vector as it will be once everything that waits is merged."""
        live = self.live
        for update in self.updates:
            live = self.apply(live, update)
        return self.consensus if self.ended and self.consensus is not None else live


class Cluster:
    """The servers, the workers and the wires between them."""

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
        booked: bool = True,
    ) -> None:
        self.config = config
        self.limits = limits or ServerLimits(
            workers=workers, lease_s=1e6, round_cap_s=1e6, recover_after_s=1e9, start_grace_s=0.5
        )
        self.layout = Layout(
            (Segment("w", (dimension,), "float32"),),
            (Segment("running_mean", (statistics,), "float32"),) if statistics else (),
        )
        self.random = random.Random(seed)
        self.seed = seed
        self.book = Book() if booked else None
        self.now = 0.0
        self.expected: tuple[type[LoscarError], ...] = ()
        self.late_snapshots = False
        self.tolerance = 1e-3
        self.events: list[fx.ServerEffect] = []
        self._peers = 0
        self.streams: dict[int, Stream] = {}
        self.ghosts: list[Stream] = []
        self.zombies: list[ServerMachine] = []
        self.workers: list[SimWorker] = []
        self._identical = identical
        for i in range(workers):
            self.add_worker(f"w{i}", slot=i, seed=seed * 1000 + (0 if identical else i))
        self.server: ServerMachine | None = None
        self.start_server()

    @property
    def machine(self) -> ServerMachine:
        assert self.server is not None
        return self.server

    # --- workers and servers come and go --------------------------------------------------------------------

    def add_worker(
        self, name: str, *, slot: int | None = None, seed: int | None = None, observer: bool = False
    ) -> SimWorker:
        d = self.layout.dimension
        start = np.random.default_rng(self.seed * 1000 if seed is None else seed).normal(size=d).astype(np.float32)
        stats = np.zeros(self.layout.statistics_size, np.float32)
        incarnation = f"{name}-{len(self.workers)}".encode().ljust(16, b".")
        engine = WorkerEngine(name, incarnation, self.layout, start.copy(), stats.copy(), slot=slot, observer=observer)
        worker = SimWorker(
            name,
            engine,
            start,
            np.random.default_rng([self.seed, len(self.workers) + 1]),
            stats,
            local_steps=2 if self.config.local_steps is None else self.config.local_steps,  # there is no clock here
            overlap_steps=self.config.overlap_steps,
            observer=observer,
            progress=np.zeros(d),
        )
        self.workers.append(worker)
        return worker

    def connect(self, worker: SimWorker, server: ServerMachine | None = None) -> Stream:
        self._peers += 1
        stream = Stream(self._peers, worker, server or self.machine)
        worker.stream = stream
        worker.error = None
        self.streams[self._peers] = stream
        stream.up.append(worker.engine.hello())
        return stream

    def connect_all(self) -> None:
        for worker in self.workers:
            self.connect(worker)

    def cut(self, worker: SimWorker, *, noticed: bool = True) -> None:
        """The stream breaks. Unless the server notices at once, it still reads some of what is on the wire."""
        stream = worker.stream
        if stream is None:
            return
        self._worker_lost(stream)
        if noticed:
            self._server_lost(stream)
        else:
            for _ in range(self.random.randrange(len(stream.up) + 1)):
                stream.up.pop()
            self.ghosts.append(stream)

    def _worker_lost(self, stream: Stream) -> None:
        worker = stream.worker
        worker.stream = None
        worker.open = None
        worker.engine.disconnected()
        self.streams.pop(stream.peer, None)
        stream.wire.clear()

    def _server_lost(self, stream: Stream) -> None:
        if stream.server is self.server or stream.server in self.zombies:
            self.carry_out(stream.server, stream.server.disconnected(stream.peer, self.now))

    def crash(self, worker: SimWorker, *, noticed: bool = True) -> SimWorker:
        """The worker's process dies; its successor has the same name and knows nothing."""
        self.cut(worker, noticed=noticed)
        worker.crashed = True
        return self.add_worker(worker.name, slot=None, observer=worker.observer)

    def kill_server(self, *, zombie: bool = False) -> None:
        """The server dies with its memory, or (a zombie) is only cut off from everybody for a while."""
        if zombie:
            self.zombies.append(self.machine)
        for worker in self.workers:
            self.cut(worker, noticed=False)
        if not zombie:
            self.ghosts = [g for g in self.ghosts if g.server is not self.server]
        self.server = None

    def start_server(self) -> ServerMachine:
        self.server = BookedMachine(self.config, self.limits, RUN, self.now)
        self.server.book = self.book
        return self.server

    # --- what the machines want -----------------------------------------------------------------------------

    def carry_out(self, server: ServerMachine, effects: list[fx.ServerEffect]) -> None:
        if self.book is not None and server.replica is not None:
            self.book.hold(server)
        for effect in effects:
            match effect:
                case fx.Send(peers, message):
                    for peer in peers:
                        stream = self.streams.get(peer)
                        if stream is not None and not stream.closing:
                            stream.outbox.append(message)
                case fx.Close(peer, error, goodbye):
                    self._close(peer, error, goodbye)
                case _:
                    self.events.append(effect)

    def _close(self, peer: int, error: LoscarError | None, goodbye: Goodbye | None) -> None:
        stream = self.streams.get(peer)
        if stream is None or stream.closing:
            return
        if error is None:
            if goodbye is not None:
                stream.outbox.append(goodbye)
            stream.closing = True
            if not stream.down:
                self._worker_lost(stream)
            return
        stream.worker.error = error
        self._worker_lost(stream)
        if not isinstance(error, self.expected):
            raise error

    # --- moving messages ------------------------------------------------------------------------------------

    def deliver_up(self, worker: SimWorker) -> None:
        """The server reads the worker's oldest message."""
        stream = worker.stream
        if stream is not None and stream.up and not stream.closing:
            self._receive(stream)

    def _receive(self, stream: Stream) -> None:
        server = stream.server
        if server is not self.server and server not in self.zombies:
            return
        message = stream.up.popleft()
        self.carry_out(server, server.received(stream.peer, message, self.now))

    def transmit(self, worker: SimWorker, most: int = 1) -> None:
        """The server's network takes messages for a worker."""
        stream = worker.stream
        if stream is None or not stream.outbox:
            return
        for _ in range(min(most, len(stream.outbox))):
            stream.wire.append(stream.outbox.popleft())
        if not stream.outbox and not stream.closing and (stream.server is self.server or stream.server in self.zombies):
            self.carry_out(stream.server, stream.server.drained(stream.peer, self.now))

    def deliver_down(self, worker: SimWorker) -> None:
        """The worker reads the oldest message of its server."""
        stream = worker.stream
        if stream is None:
            return
        if not stream.wire:
            self.transmit(worker)
        if not stream.wire:
            return
        message = stream.wire.popleft()
        try:
            effects = worker.engine.received(message)
        except WrongRoundError:
            self.cut(worker)
            return
        if isinstance(message, VectorChunk) and message.purpose is Purpose.PROGRESS:
            # What a live worker gave it counts as its own.
            worker.progress += sum(e.new_anchor for e in effects if isinstance(e, we.Update))
        worker.carry_out(effects)
        self.check_worker(worker)
        if stream.closing and not stream.down and worker.stream is stream:
            self._worker_lost(stream)

    def haunt(self) -> None:
        """A server reads what is left of a broken stream, or notices that it is broken."""
        if not self.ghosts:
            return
        ghost = self.random.choice(self.ghosts)
        if ghost.up and self.random.random() < 0.8 and ghost.server is not None:
            self._receive(ghost)
            return
        self.ghosts.remove(ghost)
        self._server_lost(ghost)

    def train(self, worker: SimWorker) -> None:
        if worker.cycle is None or worker.out:
            return
        worker.train()
        if worker.pending is not None and not self.late_snapshots:
            worker.hand_over(self.book)
        self.check_worker(worker)

    def hand_over(self, worker: SimWorker) -> None:
        if worker.pending is not None:
            worker.hand_over(self.book)
            self.check_worker(worker)

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        for server in [self.server, *self.zombies]:
            if server is not None:
                self.carry_out(server, server.tick(self.now))

    def step(self) -> None:
        """One random event."""
        worker = self.random.choice(self.workers)
        what = self.random.random()
        if what < 0.35:
            self.deliver_up(worker)
        elif what < 0.80:
            if self.random.random() < worker.link:
                if what < 0.50:
                    self.transmit(worker, self.random.randrange(1, 6))
                else:
                    self.deliver_down(worker)
        elif what < 0.83:
            self.hand_over(worker)
        elif what < 0.84:
            self.haunt()
        elif self.random.random() < worker.speed:
            self.train(worker)
        self.now += 0.01
        if self.server is not None:
            due = self.server.next_wakeup()
            if due is not None and due <= self.now:
                self.tick()

    def run(self, most: int = 300_000, until: Callable[[], bool] | None = None) -> None:
        """Random events until a condition holds, or every worker is finished."""
        for _ in range(most):
            if until() if until is not None else all(w.out for w in self.workers if not w.observer):
                return
            self.step()
        raise AssertionError(f"no end: {self.describe()}")

    def drain(self, *workers: SimWorker) -> None:
        """Deliver everything that is on its way, without any training."""
        for _ in range(10_000):
            moved = False
            for worker in workers or self.workers:
                stream = worker.stream
                if stream is not None and stream.up and not stream.closing:
                    self.deliver_up(worker)
                    moved = True
                if worker.stream is not None and worker.stream.down:
                    self.deliver_down(worker)
                    moved = True
            if not moved:
                return
        raise AssertionError("messages without end")

    def describe(self) -> str:
        lines = [
            f"{w.name} peer={w.peer} out={w.out} at {w.engine.anchor.position} plan={w.engine.plan} "
            f"open={w.open is not None} in flight={w.cycle and w.cycle.in_flight} waiting={len(w.updates)}"
            for w in self.workers
        ]
        if self.server is not None:
            s = self.server
            lines.append(f"server {s.phase} epoch {s.epoch} round {s.round and (s.round.plan, s.round.slots)}")
            lines += [
                f"  {m.name} slot {m.slot} {m.state} ready={m.ready} following={m.following} behind={m.behind} "
                f"stream={m.stream}"
                for m in s.members.by_peer.values()
            ]
        return "\n".join(lines)

    # --- checks ---------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.server is not None and self.server.phase is Phase.FINISHED

    def check_worker(self, worker: SimWorker) -> None:
        """(b), (c) and (e) for one worker, at any moment."""
        engine = worker.engine
        if self.book is None or not engine.initialised or worker.crashed:
            return
        anchor, ledger = engine.anchor, engine.ledger
        node = self.book.node_of(anchor)
        assert node is not None, f"{worker.name} holds {anchor.position}, which nobody committed"
        self.book.check_equal(anchor, node, worker.name)
        taken = self.book.taken.get(engine.incarnation, [])
        assert ledger.sent == len(taken)
        assert ledger.included == node.count.get(engine.incarnation, 0), "included"
        assert ledger.returned + ledger.outstanding == len(taken) - ledger.included
        assert min(ledger.included, ledger.returned, ledger.outstanding) >= 0
        settled = worker.settled()
        final = node.plan is not None and node.plan.kind is RoundKind.FINAL
        if final or (worker.ended and worker.consensus is not None):
            assert settled.tobytes() == anchor.vector.tobytes(), "the end is not the consensus"
            return
        if engine.config is not None and engine.config.merge is MergeKind.DELAY_CORRECTED:
            own = node.own.get(engine.incarnation, 0.0)
            left = settled - anchor.vector.astype(np.float64) - (worker.progress - own)
            worst = float(np.abs(left).max())
            scale = 1 + float(np.abs(worker.progress).max()) / 10
            assert worst <= self.tolerance * scale, f"{worker.name} at {anchor.position}: the ledger is off by {worst}"

    def check(self) -> None:
        """Everything, at any moment."""
        if self.server is not None and self.server.replica is not None:
            self.check_server(self.server)
        for worker in self.workers:
            self.check_worker(worker)

    def check_server(self, server: ServerMachine) -> Node:
        assert self.book is not None
        assert server.replica is not None
        node = self.book.hold(server)
        self.book.check_equal(server.replica, node, "the server")
        return node

    def check_end(self) -> None:
        """Everything about a finished run: every worker that is left holds the consensus."""
        self.check()
        assert self.book is not None
        self.book.check_total(self.check_server(self.machine), self.tolerance)

    def active(self) -> list[SimWorker]:
        """Workers that the server counts."""
        if self.server is None:
            return []
        states = {m.incarnation: m.state for m in self.server.members.by_peer.values()}
        return [w for w in self.workers if states.get(w.engine.incarnation) is MemberState.ACTIVE]


__all__ = ["RUN", "BookedMachine", "Cluster", "SimWorker", "Stream"]
