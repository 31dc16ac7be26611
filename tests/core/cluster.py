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
from collections.abc import Callable
from typing import Any

import numpy as np
from audit import Audit
from book import Book
from sim_worker import SimWorker, Stream

from loscar_core import effects as fx
from loscar_core import worker_effects as we
from loscar_core.config import RunConfig, ServerLimits
from loscar_core.errors import LoscarError, WrongRoundError
from loscar_core.layout import Layout, Segment
from loscar_core.messages import Goodbye, Purpose, VectorChunk
from loscar_core.server_machine import ServerMachine
from loscar_core.server_round import ServerRound
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


class Cluster(Audit):
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
        super().__init__()
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
        self.retried: tuple[type[LoscarError], ...] = ()
        self.late_snapshots = False
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
        self.server = self._new_server()
        return self.server

    def add_standby(self) -> ServerMachine:
        """A server beside the one that has the run."""
        server = self._new_server()
        self.zombies.append(server)
        return server

    def _new_server(self) -> ServerMachine:
        server = BookedMachine(self.config, self.limits, RUN, self.now)
        server.book = self.book
        return server

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
                    self.note(server, effect)

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
        self._worker_lost(stream)
        if isinstance(error, self.retried):
            return
        stream.worker.error = error
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
        self.look_at(worker)
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
        self.look_at(worker)

    def hand_over(self, worker: SimWorker) -> None:
        if worker.pending is not None:
            worker.hand_over(self.book)
            self.look_at(worker)

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        for server in [self.server, *self.zombies]:
            if server is not None:
                self.carry_out(server, server.tick(self.now))

    def pass_time(self, seconds: float) -> None:
        """Servers wake up when something is due."""
        self.now += seconds
        for server in [self.server, *self.zombies]:
            if server is None:
                continue
            due = server.next_wakeup()
            if due is not None and due <= self.now:
                self.carry_out(server, server.tick(self.now))
            if self.watchful:
                self.check_waiting(server)

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
        self.pass_time(0.01)

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


def cluster_of(n: int, *, seed: int = 0, schedule: int = 0, **config: Any) -> Cluster:
    """A connected cluster of short runs; `schedule` seeds the order of events, `seed` everything else."""
    made = Cluster(n, RunConfig(**({"seed": 5, "rounds": 6} | config)), seed=seed)
    made.random = random.Random(schedule)
    made.connect_all()
    return made


__all__ = ["RUN", "BookedMachine", "Cluster", "SimWorker", "Stream", "cluster_of"]
