"""A worker's own contributions: what was sent, whether it is in the consensus, and whether it was subtracted.

The ledger's invariant, per coordinate: x − a = (this worker's local steps) − (its contributions that are in c). A
contribution is taken once per round, resent byte-identical, and carries one bit a part: *subtracted* from x − a, as
the state that the anchor replicates includes it. Whenever the worker learns what a state includes, the bit is made
to agree: included and not subtracted → subtract; subtracted and not included (the round was abandoned by a
recovery) → add back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from loscar_core.messages import Contribution
from loscar_core.plan import Part, RoundPlan
from loscar_core.replica import Floats, Indices, Where, as_indices
from loscar_core.state import YOUNG_S, Included, Lineage


@dataclass(slots=True)
class Record:
    """One contribution.

    Attributes:
        plan: of the round that it was taken for.
        where: its coordinates, K int64 or a range of them.
        sent: δ̂ as the server decodes it, K float32.
        parts: how the round is cut, in positions of `where`.
        messages: what was sent, to be sent again as it is.
        subtracted: bitmap of the parts that are subtracted from x − a.
        decided: the state that the worker follows has closed the round, with or without it.
        epochs: server epochs that it was sent to: no other can have it.
        outcomes: which parts are in, for each epoch that has closed the round.
        exhausted: apart from these coordinates there was no progress at all.
    """

    plan: RoundPlan
    where: Where
    sent: Floats
    parts: tuple[Part, ...]
    messages: tuple[Contribution, ...]
    subtracted: int = 0
    decided: bool = False
    epochs: set[int] = field(default_factory=set)
    outcomes: dict[int, int] = field(default_factory=dict)
    exhausted: bool = False

    @property
    def indices(self) -> Indices:
        return as_indices(self.where)

    def masked(self, mask: int) -> Floats | None:
        """δ̂ on the parts of a bitmap and 0 elsewhere; None when none of them is in it."""
        value_parts = [p for p in self.parts if not p.statistics]
        chosen = [p for p in value_parts if mask >> p.index & 1]
        if not chosen:
            return None
        if len(chosen) == len(value_parts):
            return self.sent
        masked = np.zeros_like(self.sent)
        for p in chosen:
            masked[p.start : p.stop] = self.sent[p.start : p.stop]
        return masked


@dataclass(slots=True)
class Early:
    """The forgotten contributions to the rounds of a young server epoch: all of it may yet be given up.

    Attributes:
        began_s: run time when the epoch's first round was opened here.
        first: the first of those rounds.
        values: their sum, d float32.
        count: how many.
    """

    began_s: float
    first: int
    values: Floats
    count: int = 0


@dataclass(slots=True)
class Ledger:
    """The records that may still matter, by round, and the count of all contributions by outcome.

    `sent` = `included` + `returned` + `outstanding` at any time.

    A round may be planned anew after a recovery (say, as the final one). What was taken by the earlier plan is kept
    apart as `superseded`: the state that has it may yet turn out to be the one that is recovered next.
    """

    records: dict[int, Record] = field(default_factory=dict)
    superseded: list[Record] = field(default_factory=list)
    sent: int = 0
    included: int = 0
    returned: int = 0
    early: dict[int, Early] = field(default_factory=dict)
    """By epoch."""

    @property
    def outstanding(self) -> int:
        return self.sent - self.included - self.returned

    def all(self) -> list[Record]:
        return [*self.superseded, *self.records.values()]

    def add(self, record: Record) -> None:
        self.records[record.plan.round] = record
        self.sent += 1

    def in_flight(self, round_: int) -> Record | None:
        """The contribution to a round that is not decided yet."""
        record = self.records.get(round_)
        return record if record is not None and not record.decided else None

    def in_flight_after(self, round_: int) -> int | None:
        """The last round after this one to which there is an undecided contribution."""
        return max((r.plan.round for r in self.all() if not r.decided and r.plan.round > round_), default=None)

    def opened(self, plan: RoundPlan) -> bool:
        """A round is open by this plan: `in_flight` is from now on what was taken by it, if anything was.

        Returns:
            Whether a contribution that was taken by another plan is hereby given back.
        """
        given_back = False
        for record in self.all():
            if record.plan.round == plan.round and record.plan != plan and not record.decided:
                self.decide(record, 0)
                given_back = True
        current = self.records.get(plan.round)
        if current is None or current.plan != plan:
            if current is not None:
                self.superseded.append(self.records.pop(plan.round))
            for record in [r for r in self.superseded if r.plan == plan]:
                self.superseded.remove(record)
                self.records[plan.round] = record
        return given_back

    def decide(self, record: Record, mask: int, epoch: int | None = None) -> tuple[int, int]:
        """The followed state has closed the record's round and includes these of its parts.

        Args:
            epoch: the server epoch that closed it; None when the round is planned anew.

        Returns:
            Bitmaps of the parts to subtract now and of the parts to add back now.
        """
        if epoch is not None:
            record.outcomes[epoch] = mask
        was = record.subtracted
        if not record.decided:
            record.decided = True
            self._count(mask, +1)
        elif bool(was) != bool(mask):
            self._count(was, -1)
            self._count(mask, +1)
        record.subtracted = mask
        return mask & ~was, was & ~mask

    def undecide(self, record: Record) -> int:
        """The followed state is back before the record's round: it is in flight again.

        Returns:
            Bitmap of the parts to add back now.
        """
        was = record.subtracted
        if record.decided:
            self._count(was, -1)
        record.decided = False
        record.subtracted = 0
        return was

    def resolve(self, own: Included | None, round_: int, lineage: Lineage) -> list[tuple[Record, int, int]]:
        """Make every record agree with a state that was caught up with.

        Args:
            own: this worker's entry in the state's inclusion table; None when it may have been forgotten there.
            round_: the state's round.
            lineage: the state's.

        Returns:
            (record, parts to subtract, parts to add back) for each record where there is something to do.
        """
        todo = []
        for record in self.all():
            number = record.plan.round
            epoch = lineage.epoch_of(number)
            if number > round_:
                subtract, add_back = 0, self.undecide(record)
            elif own is None:
                subtract, add_back = self.decide(record, record.outcomes.get(epoch, 0), epoch)
            elif own.round == number:
                subtract, add_back = self.decide(record, own.parts if epoch in record.epochs else 0, epoch)
            elif own.round > number:
                # A later one of ours is in, and was taken when this worker knew what that state had of this one.
                subtract, add_back = self.decide(record, record.outcomes.get(epoch, 0), epoch)
            else:
                subtract, add_back = self.decide(record, 0, epoch)
            if subtract or add_back:
                todo.append((record, subtract, add_back))
        return todo

    def forget_before(self, round_: int, *, young: bool) -> list[Record]:
        """Rounds before this one can no longer be abandoned one by one; returns what is forgotten.

        Args:
            young: the newest epoch may yet be given up as a whole: then what was sent to an earlier one too may be in
                the state that is gone back to, and is kept.
        """

        def over(record: Record) -> bool:
            return record.plan.round < round_ and record.decided and not (young and len(record.epochs) > 1)

        forgotten = [r for r in self.all() if over(r)]
        self.records = {n: r for n, r in self.records.items() if not over(r)}
        self.superseded = [r for r in self.superseded if not over(r)]
        return forgotten

    def forget(self, round_: int, lineage: Lineage, began_s: float, now_s: float, dimension: int) -> None:
        """A majority has gone on from this round: those before it can no longer be abandoned one by one. While the
        newest epoch is young, the sum of what is forgotten is kept.

        Args:
            lineage: of the state that closed those rounds.
            began_s, now_s: run time when the newest epoch began here, and now.
            dimension: d.
        """
        self.early = {epoch: e for epoch, e in self.early.items() if now_s < e.began_s + YOUNG_S}
        young = now_s < began_s + YOUNG_S
        forgotten = self.forget_before(round_, young=young)
        epoch = lineage.spans[-1][0] if lineage.spans else 0
        for record in forgotten if young else ():
            sent = record.masked(record.subtracted)
            if sent is None or lineage.epoch_of(record.plan.round) != epoch:
                continue
            if epoch not in self.early:
                self.early[epoch] = Early(began_s, record.plan.round, np.zeros(dimension, np.float32))
            early = self.early[epoch]
            early.values[record.where] += sent
            early.count += 1

    def give_up_early(self, own: Included | None, lineage: Lineage) -> list[Floats]:
        """Which of the sums are not in a state that was caught up with: those of epochs that it does not go back to,
        and those of which it has nothing (two servers may have called themselves by the same epoch).

        Args:
            own: as in `resolve`.

        Returns:
            What is to be added back, d float32 each.
        """
        known = {epoch for epoch, _ in lineage.spans}
        missing = [
            epoch for epoch, e in self.early.items() if epoch not in known or (own is not None and own.round < e.first)
        ]
        given_up = [self.early.pop(epoch) for epoch in missing]
        for early in given_up:
            self.included -= early.count
            self.returned += early.count
        return [early.values for early in given_up]

    def _count(self, mask: int, by: int) -> None:
        if mask:
            self.included += by
        else:
            self.returned += by
