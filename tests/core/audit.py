"""What must hold in a run in memory, at any moment and at its end: see `book`, which knows the truth."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from book import Book, Node
from sim_worker import SimWorker, Stream

from loscar_core import effects as fx
from loscar_core.merge import MergeKind
from loscar_core.plan import RoundKind
from loscar_core.server_machine import ServerMachine
from loscar_core.server_members import MemberState
from loscar_core.server_round import ServerRound
from loscar_core.server_state import Phase


@dataclass
class Watch:
    """What is remembered of one server process.

    Attributes:
        open: its open round.
        since: when that was opened.
        missed: rounds in a row without a member, for each stream that was there when they opened.
    """

    open: ServerRound | None = None
    since: float = 0.0
    missed: dict[int, int] = field(default_factory=dict)


class Audit:
    """The checks of a cluster; it says who there is.

    Attributes:
        watchful: everything is checked whenever it changes; otherwise only at the end.
        starving: rounds in a row that a member may be left out of, though its stream never broke.
        left_out: the most rounds in a row that any was.
        kept: states that the end must go on from.
    """

    server: ServerMachine | None
    workers: list[SimWorker]
    streams: dict[int, Stream]
    book: Book | None
    now: float
    tolerance = 1e-3
    watchful = True
    starving: int | None = None
    left_out = 0

    def __init__(self) -> None:
        self._watches: dict[ServerMachine, Watch] = {}
        self._epochs: dict[bytes, int] = {}
        self.kept: list[Node] = []

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
        assert engine.epoch >= self._epochs.get(engine.incarnation, 0), "an epoch that was met is forgotten"
        self._epochs[engine.incarnation] = engine.epoch
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

    def look_at(self, worker: SimWorker) -> None:
        """Something has happened to a worker."""
        if self.watchful:
            self.check_worker(worker)

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
        assert self.server is not None
        last = self.check_server(self.server)
        self.book.check_total(last, self.tolerance)
        for node in self.kept:
            assert node in last.chain(), f"{node.position}, which a majority held when its server died, is lost"

    def active(self) -> list[SimWorker]:
        """Workers that the server counts."""
        if self.server is None:
            return []
        states = {m.incarnation: m.state for m in self.server.members.by_peer.values()}
        return [w for w in self.workers if states.get(w.engine.incarnation) is MemberState.ACTIVE]

    # --- waiting --------------------------------------------------------------------------------------------

    def note(self, server: ServerMachine, effect: fx.ServerEffect) -> None:
        """A server has closed a round: nobody that keeps sending is left out for long."""
        if not isinstance(effect, fx.RoundCommitted) or server is not self.server or server.replica is None:
            return
        missed = self._watch(server).missed
        for peer, member in server.members.by_peer.items():
            if not member.observer and peer in self.streams:
                included = server.replica.inclusion.of(member.incarnation).round == effect.position.round
                missed[peer] = 0 if included else missed.get(peer, 0) + 1
                self.left_out = max(self.left_out, missed[peer])
                assert self.starving is None or missed[peer] <= self.starving, f"{member.name} starves"

    def _watch(self, server: ServerMachine) -> Watch:
        return self._watches.setdefault(server, Watch())

    def check_waiting(self, server: ServerMachine) -> None:
        """Nobody waits past a deadline: a round in which a quorum of those who are there is whole is not open for
        longer than any member may hold it up; and what is due has been done."""
        watch, current = self._watch(server), server.round
        if watch.open is not current:
            watch.open, watch.since = current, self.now
        due = server.next_wakeup()
        assert due is None or due > self.now, f"the server sleeps through {due}: it is {self.now}"
        if current is None or server.phase is not Phase.RUNNING or self.now <= watch.since + server.limits.round_cap_s:
            return
        there = [m for m in server.members.active() if current.slots.get(m.slot) == m.incarnation]
        have = min((len(current.contributors(i)) for i in current.open_parts()), default=len(there))
        assert not there or 2 * have < len(there), f"round {current.plan.round} waits for more than a quorum"
