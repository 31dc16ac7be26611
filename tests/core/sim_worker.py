"""A worker of a run in memory: an engine, a pace, and a model that is a vector."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
from book import Book, Taken

from loscar_core import worker_effects as we
from loscar_core.errors import LoscarError
from loscar_core.merge import MergeKind, merge
from loscar_core.messages import ServerMessage, WorkerMessage
from loscar_core.plan import RoundKind
from loscar_core.server_machine import ServerMachine
from loscar_core.worker_cycle import Action, Cycle, Situation
from loscar_core.worker_engine import WorkerEngine


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
        if update.forget or (update.plan is not None and update.plan.kind is RoundKind.FINAL):
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
                    self.live = (self.engine.anchor.vector if vector is None else vector).copy()
                    self.statistics = statistics.copy()
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
