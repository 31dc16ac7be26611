"""An open round on the server in which each worker has chosen its own coordinates.

A part is a range of coordinates. Its sum is dense while it is open: 4 bytes a coordinate, and one that says whether
anybody has sent it. So contributions are added as they come, in ascending slot order, whatever coordinates they have.
The answer has the union of these, and so has the commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loscar_core.checksum import crc32
from loscar_core.errors import MalformedError, WrongSelectionError
from loscar_core.messages import Answer, Contribution
from loscar_core.plan import Part, RoundPlan
from loscar_core.replica import Floats, Indices
from loscar_core.server_round import ANSWER_BYTES, MAX_MAGNITUDE, PartSum, ServerRound
from loscar_core.sparse_delta import CODING, SparsePart, sparse_slices
from loscar_core.values import decode, value_count


def round_of(plan: RoundPlan, *args: Any) -> ServerRound:
    """The round of a plan; arguments as for `ServerRound`."""
    return (ExplicitRound if plan.explicit else ServerRound)(plan, *args)


@dataclass(slots=True)
class _Arriving:
    """A member's part while its messages arrive, for the first time or again."""

    sparse: SparsePart | None
    filled: int = 0
    crc: int = 0

    def note(self, message: Contribution, count: int) -> None:
        self.filled += count
        self.crc = crc32(message.values, crc32(message.indices, self.crc))


@dataclass(slots=True)
class _Answered:
    """What a closed part changes."""

    indices: Indices
    values: Floats
    residual: Floats | None


class ExplicitRound(ServerRound):
    """The sums of a round with an explicit selection; arguments as for `ServerRound`. What of the state changes is
    known once it is complete. The limits' aggregate is the mean, see `config.require_fit`."""

    def __init__(self, plan: RoundPlan, *args: Any) -> None:
        super().__init__(plan, *args)
        self._expected = min(plan.count, self._replica.vector.size)
        self._arriving: dict[tuple[int, int], _Arriving] = {}  # part, slot
        self._indices: dict[tuple[int, int], Indices] = {}
        self._totals: dict[int, dict[int, int]] = {}  # slot -> part -> how many values
        self._touched: dict[int, NDArray[np.bool_]] = {}
        self._closed: dict[int, _Answered] = {}

    @property
    def untouched(self) -> bool:
        return super().untouched and not self._arriving

    def forget_unfinished(self, slot: int) -> None:
        super().forget_unfinished(slot)
        for part, other in list(self._arriving):
            if other == slot:
                del self._arriving[part, slot]
        known = self._totals.get(slot, {})
        self._totals[slot] = {part: total for part, total in known.items() if self.has(slot, part)}

    def _take(self, state: PartSum, slot: int, message: Contribution) -> bool:
        part = state.part
        if part.statistics:
            return super()._take(state, slot, message)
        if message.coding is not CODING:
            raise WrongSelectionError(f"part {part.index}: coordinates coded as {message.coding}, not as {CODING}")
        key = part.index, slot
        if slot in state.received:
            self._check_replay(state, slot, message)
            return False
        if state.answer is not None:
            return False  # closed without this member: its progress stays with it and goes out later
        arriving = self._arriving.get(key)
        if arriving is None:
            if self.reopened and message.offset > 0:
                return False  # the rest of a part whose beginning did not count: all of it is on its way again
            self._check_total(slot, part, message.total)
            arriving = _Arriving(SparsePart(part, self.plan.value_type, message.total, MAX_MAGNITUDE))
        sparse = arriving.sparse
        assert sparse is not None
        before = sparse.filled
        sparse.add(message)
        arriving.note(message, sparse.filled - before)
        self._arriving[key] = arriving
        self._totals.setdefault(slot, {})[part.index] = message.total
        if not sparse.whole:
            return False
        indices, values = sparse.joined()
        if self._norm_bound is not None and values.size:
            self._norm_bound.check(values)
        del self._arriving[key]
        self._indices[key] = indices
        self._received(state, slot, arriving.crc, values)
        return True

    def _check_total(self, slot: int, part: Part, total: int) -> None:
        """All parts together hold exactly K values: what is said of one part must leave that possible."""
        known = self._totals.get(slot, {})
        left = self._expected - sum(known.values()) - total
        room = sum(p.size for p in self.parts if not p.statistics and p.index != part.index and p.index not in known)
        if not 0 <= left <= room:
            said = self._expected - left
            raise MalformedError(
                f"part {part.index}: {said} values with {room} coordinates to come, of a selection of {self._expected}"
            )

    def _check_replay(self, state: PartSum, slot: int, message: Contribution) -> None:
        part = state.part
        if part.statistics:
            super()._check_replay(state, slot, message)
            return
        key = part.index, slot
        total = self._totals[slot][part.index]
        replay = self._arriving.get(key)
        if replay is None or message.offset == 0:
            replay = self._arriving[key] = _Arriving(None)
        count = value_count(self.plan.value_type, len(message.values))
        replay.note(message, count)
        if message.total != total or replay.filled > total or (total > 0 and not count):
            raise MalformedError(f"part {part.index}: sent again with another number of values")
        if replay.filled == total:
            del self._arriving[key]
            if replay.crc != state.received[slot]:
                raise MalformedError(f"part {part.index}: sent again with other bytes")

    def _add(self, state: PartSum, slot: int, values: Floats) -> None:
        part = state.part
        if part.statistics:
            super()._add(state, slot, values)
            return
        if state.total is None:
            state.total = np.zeros(part.size, np.float32)
            self._touched[part.index] = np.zeros(part.size, np.bool_)
        here = self._indices.pop((part.index, slot)) - part.start
        state.total[here] += values
        self._touched[part.index][here] = True

    def close(self, index: int, message_bytes: int = ANSWER_BYTES) -> list[Answer]:
        answer = super().close(index, message_bytes)
        for key in [key for key in self._arriving if key[0] == index]:
            del self._arriving[key]
        if self.complete:
            self._finish()
        return answer

    def _close_values(self, state: PartSum, message_bytes: int, included: bytes) -> list[Answer]:
        part, kind = state.part, self.plan.value_type
        touched = self._touched.pop(part.index, None)
        if state.total is None or touched is None:
            union, mean = np.empty(0, np.int64), np.empty(0, np.float32)
        else:
            here = np.flatnonzero(touched)
            mean = state.total[here]
            mean /= np.float32(self.members)
            union = here.astype(np.int64, copy=False) + part.start
        if self._residual is not None:
            mean += self._residual[union]
        sent = np.empty_like(mean)
        answers = []
        for piece in sparse_slices(part, union, mean, kind, message_bytes):
            sent[piece.offset : piece.offset + piece.count] = decode(piece.values, kind, piece.count)
            answers.append(
                Answer(
                    self.plan.round,
                    part.index,
                    piece.offset,
                    piece.values,
                    included if piece.offset == 0 else b"",
                    piece.indices,
                    piece.base,
                    CODING,
                    piece.total,
                )
            )
        values = self._replica.vector[union] + sent
        self._closed[part.index] = _Answered(union, values, None if self._residual is None else mean - sent)
        return answers

    def _finish(self) -> None:
        """Every part is answered: what changes, in the order of the coordinates."""
        closed = [self._closed[p.index] for p in self.parts if not p.statistics]
        self.where = np.concatenate([c.indices for c in closed])
        self.new_values = np.concatenate([c.values for c in closed])
        if self._residual is not None:
            self.new_residual = np.concatenate([c.residual for c in closed if c.residual is not None])
        self._closed.clear()
