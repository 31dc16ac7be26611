"""The protocol's rules, each with a way to switch it off: what a test that has teeth must notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from chaos import Chaos

from loscar_core import server_lifecycle
from loscar_core.messages import Answer
from loscar_core.replica import as_indices
from loscar_core.server_machine import ServerMachine
from loscar_core.server_recovery import Choice, Claim
from loscar_core.state import Included, Lineage
from loscar_core.worker_effects import Update
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_holdings import Receiving
from loscar_core.worker_ledger import Ledger, Record

KILLS = Chaos(cut=0.004, kill=0.0012, kills=6)
CUTS = Chaos(cut=0.008, cuts=20)


def commit_by_part(patch: pytest.MonkeyPatch) -> Chaos:
    """Off: commit by round. A worker takes every part over as it is answered."""
    answer = WorkerEngine._answer

    def eager(self: WorkerEngine, message: Answer) -> None:
        answer(self, message)
        receiving = self._receiving
        assert receiving is not None
        part = receiving.parts[message.part]
        if self._catching_up is not None or part.statistics or receiving.filled[part.index] < part.size:
            return
        at = as_indices(receiving.where)[part.start : part.stop]
        old = self.anchor.vector[at].copy()
        self.anchor.vector[at] += receiving.delta[part.start : part.stop]
        receiving.delta[part.start : part.stop] = 0
        self._out.append(Update(0, at, old, self.anchor.vector[at].copy(), None, None, None, None))

    patch.setattr(WorkerEngine, "_answer", eager)
    return KILLS


def no_inclusion(patch: pytest.MonkeyPatch) -> Chaos:
    """Off: what a caught-up state includes decides. A contribution whose answer was not heard counts as not in."""

    def resolve(self: Ledger, own: Included | None, round_: int, lineage: Lineage) -> list[tuple[Record, int, int]]:
        todo = []
        for record in self.all():
            if record.plan.round > round_:
                todo.append((record, 0, self.undecide(record)))
            else:
                self.decide(record, record.subtracted, lineage.epoch_of(record.plan.round))
        return todo

    patch.setattr(Ledger, "resolve", resolve)
    return CUTS


def no_undo(patch: pytest.MonkeyPatch) -> Chaos:
    """Off: abandoned rounds are undone. What they held stays subtracted."""
    undecide = Ledger.undecide

    def keep(self: Ledger, record: Record) -> int:
        was = record.subtracted
        undecide(self, record)
        record.subtracted = was
        return 0

    patch.setattr(Ledger, "undecide", keep)
    return KILLS


def no_epochs(patch: pytest.MonkeyPatch) -> Chaos:
    """Off: every server process opens a new epoch."""
    patch.setattr(ServerMachine, "epoch", property(lambda self: 1, lambda self, value: None), raising=False)
    return Chaos(cut=0.004, kill=0.0012, kills=6, zombies=True)


def no_majority(patch: pytest.MonkeyPatch) -> Chaos:
    """Off: a majority decides what is recovered. The first worker that holds anything does."""

    def first(claims: list[Claim], *, waited: bool, present: int | None = None) -> Choice | None:
        holders = [c for c in claims if c.position.round > 0]
        return Choice(holders[0].peer, holders[0].position, holders[0].digest, 1, False) if holders else None

    patch.setattr(server_lifecycle, "choose", first)
    return KILLS


def taken_again(patch: pytest.MonkeyPatch) -> Chaos:
    """Off: a contribution is never re-taken. After a break the worker takes another one for the same round."""
    announce = WorkerEngine._announce

    def forget(self: WorkerEngine, receiving: Receiving) -> None:
        record = self.ledger.in_flight(receiving.plan.round)
        if record is not None:
            self.ledger.decide(record, 0)
            del self.ledger.records[receiving.plan.round]
        announce(self, receiving)

    patch.setattr(WorkerEngine, "_announce", forget)
    return CUTS


def forgotten_at_once(patch: pytest.MonkeyPatch) -> Chaos:
    """Off: what was sent is kept until a majority has gone on. It is dropped with the answer."""
    patch.setattr(Ledger, "forget_before", lambda self, round_, *, young: self.records.clear() or [])
    return KILLS


def own_slot(patch: pytest.MonkeyPatch) -> Chaos:
    """Off: the roster says whose a slot was when the round opened. A worker goes by the slot that it has now."""

    def mask(self: WorkerEngine, included: list[bytes]) -> int:
        byte, bit = divmod(self.slot, 8)
        return sum(1 << i for i, b in enumerate(included) if byte < len(b) and b[byte] >> bit & 1)

    patch.setattr(WorkerEngine, "_own_mask", mask)
    return Chaos(crash=0.004, crashes=8, rounds=20)


RULES: dict[str, Callable[[pytest.MonkeyPatch], Chaos]] = {
    f.__name__: f
    for f in (
        commit_by_part,
        no_inclusion,
        no_undo,
        no_epochs,
        no_majority,
        taken_again,
        forgotten_at_once,
        own_slot,
    )
}
