"""One open round on the server: collecting contributions part by part, summing them by slot, answering.

Sums run in ascending slot order whatever the order of arrival: a contribution is added as soon as all lower slots
that are still expected have been, and waits otherwise. Nothing of the consensus changes here; the round's results
stay in K-sized buffers until the machine commits them whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from loscar_core.checksum import crc32
from loscar_core.config import ServerLimits
from loscar_core.errors import MalformedError, WrongRoundError, WrongSelectionError
from loscar_core.messages import Answer, Contribution
from loscar_core.plan import Part, RoundPlan, slices
from loscar_core.replica import Floats, Replica, Where
from loscar_core.robust import Aggregate, NormBound, combine
from loscar_core.state import bitmap
from loscar_core.values import Payload, ValueType, decode, encode, encode_view, value_count

ANSWER_BYTES = 1 << 18
"""Size of an answer's messages while nothing is known of the links: encoded once for all members, so one size has to
suit the slowest of them."""

MAX_MAGNITUDE = 1e30
"""Largest value of a contribution: sums of thousands of them stay far from float32's end."""


@dataclass(slots=True)
class _Incoming:
    """A member's part while its messages arrive."""

    values: Floats
    filled: int = 0
    crc: int = 0


@dataclass(slots=True)
class PartSum:
    """One part: what has arrived, what is summed, and the answer once it is closed."""

    part: Part
    incoming: dict[int, _Incoming] = field(default_factory=dict)
    waiting: dict[int, Floats] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)  # slot -> CRC of its bytes
    total: Floats | None = None
    summed: int = 0  # how many of the round's slots, ascending, are dealt with
    answer: list[Answer] | None = None


class ServerRound:
    """The sums of one round.

    Args:
        plan: the round's plan.
        seed: the run's seed.
        replica: the state that the round builds on; read, never written.
        residual: what earlier answers lost to quantisation, d float32, or None with float32 answers.
        slots: the active members when the round opened, slot -> incarnation.
        limits: how contributions become one.
        norm_bound: what refuses outsized contributions, or None.
        spare: memory that an earlier round needs no more; fresh pages of that size cost more than the sums.
    """

    def __init__(
        self,
        plan: RoundPlan,
        seed: int,
        replica: Replica,
        residual: Floats | None,
        slots: dict[int, bytes],
        limits: ServerLimits,
        norm_bound: NormBound | None = None,
        spare: Floats | None = None,
    ) -> None:
        dimension = replica.vector.size
        self.plan = plan
        self.slots = dict(slots)
        self.where: Where = plan.where(seed, dimension)
        self.checksum = plan.checksum(seed, dimension)
        size = 0 if plan.explicit else plan.size(seed, dimension)
        self.parts = plan.parts(seed, dimension, replica.statistics.size)
        self.new_values = spare if spare is not None and spare.size == size else np.empty(size, np.float32)
        self.new_residual = None if residual is None else np.empty(size, np.float32)
        self.new_statistics = replica.statistics.copy() if replica.statistics.size else None
        self.reopened = False
        """It was begun anew with other members, who may have been sending already."""
        self._order = sorted(self.slots)
        self._sums = [PartSum(part) for part in self.parts]
        self._open = len(self._sums)
        self._replica = replica
        self._residual = residual
        self._limits = limits
        self._norm_bound = norm_bound

    @property
    def members(self) -> int:
        """n, what the sums are divided by."""
        return max(1, len(self.slots))

    @property
    def complete(self) -> bool:
        """Every part is answered."""
        return self._open == 0

    @property
    def untouched(self) -> bool:
        """Nothing has been received or answered yet."""
        return all(s.answer is None and not s.received and not s.incoming for s in self._sums)

    def contributed(self, slot: int) -> bool:
        """A slot's contribution is in for every part."""
        return all(slot in s.received for s in self._sums)

    def whole(self) -> set[int]:
        """The slots whose contribution is in for every part."""
        return set.intersection(*(set(s.received) for s in self._sums))

    def open_parts(self) -> list[int]:
        return [i for i, s in enumerate(self._sums) if s.answer is None]

    def has(self, slot: int, part: int) -> bool:
        """A slot's contribution to a part is whole."""
        return slot in self._sums[part].received

    def contributors(self, part: int) -> set[int]:
        """Slots whose contribution to a part is whole."""
        return set(self._sums[part].received)

    def bitmaps(self) -> list[bytes]:
        """Per part the slots in its sum, for the inclusion table."""
        size = self._order[-1] + 1 if self._order else 1
        return [bitmap(s.received, size) for s in self._sums]

    def closed_answers(self) -> list[Answer]:
        """Answers that were given already, for a member that was not there to hear them."""
        return [a for s in self._sums if s.answer is not None for a in s.answer]

    def forget_unfinished(self, slot: int) -> None:
        """A member's stream broke: what it had sent of unfinished parts will be sent again."""
        for s in self._sums:
            s.incoming.pop(slot, None)

    def add(self, slot: int, message: Contribution) -> bool:
        """Take a message in.

        Returns:
            Whether the member's part is whole now. A repetition of what is in already, or of a part that is
            closed without it, is ignored.

        Raises:
            WrongRoundError, WrongSelectionError, MalformedError, NonFiniteError: nothing was changed.
        """
        if message.round != self.plan.round:
            raise WrongRoundError(f"contribution to round {message.round}; round {self.plan.round} is open")
        if message.checksum != self.checksum:
            raise WrongSelectionError(f"round {self.plan.round}: the contribution selects other coordinates")
        if not 0 <= message.part < len(self.parts):
            raise MalformedError(f"part {message.part} of {len(self.parts)}")
        return self._take(self._sums[message.part], slot, message)

    def _take(self, state: PartSum, slot: int, message: Contribution) -> bool:
        """As `add`, of a part whose positions follow from the plan."""
        if message.coding is not None:
            raise WrongSelectionError(f"round {self.plan.round}: coordinates where they follow from the seed")
        part = state.part
        kind = ValueType.FLOAT32 if part.statistics else self.plan.value_type
        incoming = state.incoming.get(slot)
        crc = crc32(message.values, incoming.crc if incoming else 0)
        if slot in state.received:
            self._check_replay(state, slot, message)
            return False
        if state.answer is not None:
            return False  # closed without this member: its progress stays with it and goes out later
        filled = incoming.filled if incoming else 0
        if self.reopened and filled == 0 and message.offset > 0:
            return False  # the rest of a part whose beginning did not count: all of it is on its way again
        if message.offset != filled:
            raise MalformedError(f"part {part.index}: a message at {message.offset} where {filled} was next")
        count = _count_in(message.values, kind, part.size - filled)
        values = decode(message.values, kind, count, MAX_MAGNITUDE)
        if filled == 0 and count == part.size:
            whole = values
        else:
            if incoming is None:
                incoming = state.incoming[slot] = _Incoming(np.empty(part.size, np.float32))
            incoming.values[filled : filled + count] = values
            incoming.filled += count
            incoming.crc = crc
            if incoming.filled < part.size:
                return False
            whole = incoming.values
        if self._norm_bound is not None and not part.statistics:
            self._norm_bound.check(whole)
        state.incoming.pop(slot, None)
        self._received(state, slot, crc, whole)
        return True

    def _received(self, state: PartSum, slot: int, crc: int, values: Floats) -> None:
        """A member's part is whole."""
        state.received[slot] = crc
        state.waiting[slot] = values
        self._sum_in_order(state, skip=())

    def _check_replay(self, state: PartSum, slot: int, message: Contribution) -> None:
        """A repeated part is harmless when it has the same bytes; only whole repeated parts can be compared."""
        replay = state.incoming.get(slot)
        if replay is None or message.offset == 0:
            replay = state.incoming[slot] = _Incoming(np.empty(0, np.float32))
        kind = ValueType.FLOAT32 if state.part.statistics else self.plan.value_type
        replay.filled += _count_in(message.values, kind, state.part.size - message.offset)
        replay.crc = crc32(message.values, replay.crc)
        if replay.filled >= state.part.size:
            del state.incoming[slot]
            if replay.crc != state.received[slot]:
                raise MalformedError(f"part {state.part.index}: sent again with other bytes")

    def _sum_in_order(self, state: PartSum, skip: Iterable[int]) -> None:
        if self._limits.aggregate is not Aggregate.MEAN:
            return  # a median needs all of them at once
        skipped = set(skip)
        while state.summed < len(self._order):
            slot = self._order[state.summed]
            values = state.waiting.pop(slot, None)
            if values is None:
                if slot not in skipped:
                    return
            else:
                self._add(state, slot, values)
            state.summed += 1

    def _add(self, state: PartSum, slot: int, values: Floats) -> None:
        """One more contribution in a part's sum."""
        if state.total is None:
            state.total = values.astype(np.float32, copy=True)
        else:
            state.total += values

    def close(self, index: int, message_bytes: int = ANSWER_BYTES) -> list[Answer]:
        """Answer a part with what has arrived; members without a whole contribution count as zero.

        Args:
            message_bytes: size of the answer's messages.
        """
        state = self._sums[index]
        part = state.part
        self._sum_in_order(state, skip=[s for s in self._order if s not in state.received])
        state.incoming.clear()
        close = self._close_statistics if part.statistics else self._close_values
        included = bitmap(state.received, self._order[-1] + 1 if self._order else 1)
        state.answer = close(state, message_bytes, included)
        state.total = None
        state.waiting.clear()
        self._open -= 1
        return state.answer

    def _mean(self, state: PartSum, divisor: int) -> Floats | None:
        """What the contributions to a part amount to; None when there is none."""
        if self._limits.aggregate is not Aggregate.MEAN:
            if not state.waiting:
                return None
            return combine(self._limits.aggregate, self._limits.trim, [v for _, v in sorted(state.waiting.items())])
        if state.total is not None:
            state.total /= np.float32(divisor)
        return state.total

    def _close_values(self, state: PartSum, message_bytes: int, included: bytes) -> list[Answer]:
        part = state.part
        mean = self._mean(state, self.members)
        if mean is None:
            mean = np.zeros(part.size, np.float32)
        here = slice(part.start, part.stop)
        if self._residual is not None:
            where = self.where
            mean += self._residual[where][here] if isinstance(where, slice) else self._residual.take(where[here])
        kind = self.plan.value_type
        base = self._replica.gather(self.plan, self.where, part.start, part.stop)
        answers = []
        for offset, length in slices(part, message_bytes // kind.itemsize):
            piece = mean[offset : offset + length]
            payload = encode_view(piece, kind)
            sent = decode(payload, kind, length)
            at = slice(part.start + offset, part.start + offset + length)
            np.add(base[offset : offset + length], sent, out=self.new_values[at])
            if self.new_residual is not None:
                np.subtract(piece, sent, out=self.new_residual[at])
            answers.append(self._answer(part, offset, payload, included))
        return answers

    def _answer(self, part: Part, offset: int, payload: Payload, included: bytes) -> Answer:
        return Answer(self.plan.round, part.index, offset, payload, included if offset == 0 else b"")

    def _close_statistics(self, state: PartSum, message_bytes: int, included: bytes) -> list[Answer]:
        part = state.part
        assert self.new_statistics is not None
        here = self.new_statistics[part.start : part.stop]
        mean = self._mean(state, len(state.received))
        if mean is not None:
            here[:] = mean
        return [
            self._answer(part, offset, encode(here[offset : offset + length], ValueType.FLOAT32), included)
            for offset, length in slices(part, message_bytes // 4)
        ]


def _count_in(payload: Payload, kind: ValueType, most: int) -> int:
    """How many values a payload holds.

    Raises:
        MalformedError: when it is empty, not a whole number of values, or more than `most`.
    """
    count = value_count(kind, len(payload))
    if not 0 < count <= most:
        raise MalformedError(f"a message of {count} values where 1 to {most} fit")
    return count
