"""The open round in a worker: what it sends for it, and the answer while it arrives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loscar_core.buffers import Buffers
from loscar_core.errors import MalformedError, NonFiniteError
from loscar_core.indices import IndexCoding
from loscar_core.messages import Answer
from loscar_core.plan import Part, RoundPlan, slices
from loscar_core.replica import Floats, Where, size_of
from loscar_core.selection import top_k
from loscar_core.sparse_delta import CODING, SparsePart, SparseSlice, sparse_slices
from loscar_core.values import ValueType, decode_into, encode, encode_view, require_finite, value_count
from loscar_core.worker_ledger import Record


@dataclass(frozen=True, slots=True)
class Encoded:
    """A contribution, ready to be sent.

    Attributes:
        where: its coordinates, K int64 or a range of them.
        sent: δ̂ as the server decodes it, K float32.
        parts: the round's parts, in positions of `where`.
        pieces: per message the part's number and what it has of it.
        exhausted: nothing else has changed: of an explicit selection, whose smallest change is 0.
    """

    where: Where
    sent: Floats
    parts: tuple[Part, ...]
    pieces: list[tuple[int, SparseSlice]]
    exhausted: bool = False


class Receiving:
    """The open round, with a seeded selection.

    Args:
        plan: of the round.
        seed: the run's.
        dimension, statistics: sizes of the vectors.
        buffers: where memory for the answer is to be had; its own by default.

    Attributes:
        offered: the coordinates that a snapshot is to have.
        checksum: of the selection.
        parts: how the round is cut.
        delta: Δ̂ on `where`, once it is whole.
        statistics: their means, once it is whole.
        included: per part the slots in the sum.
        filled: per part with known coordinates, how many values have arrived.
    """

    def __init__(
        self, plan: RoundPlan, seed: int, dimension: int, statistics: int, buffers: Buffers | None = None
    ) -> None:
        self.plan = plan
        self.offered: Where = plan.where(seed, dimension)
        self.checksum = plan.checksum(seed, dimension)
        self.parts = plan.parts(seed, dimension, statistics)
        self.delta = (buffers or Buffers()).take(0 if plan.explicit else size_of(self.offered))
        self.statistics = np.empty(statistics, np.float32)
        self.included = [b""] * len(self.parts)
        self.filled = [0] * len(self.parts)

    @property
    def where(self) -> Where:
        """The coordinates of the answer, once it is whole."""
        return self.offered

    @property
    def whole(self) -> bool:
        """Everything has been answered."""
        return all(f == p.size for f, p in zip(self.filled, self.parts, strict=True))

    def take(self, answer: Answer) -> None:
        """A slice of the answer.

        Raises:
            MalformedError, NonFiniteError: it is none.
        """
        if not 0 <= answer.part < len(self.parts):
            raise MalformedError(f"an answer to part {answer.part} of {len(self.parts)}")
        self._take(self.parts[answer.part], answer)

    def _take(self, part: Part, answer: Answer) -> None:
        if answer.coding is not None:
            raise MalformedError(f"an answer with coordinates to part {part.index}, where they are known")
        kind = ValueType.FLOAT32 if part.statistics else self.plan.value_type
        filled = self.filled[part.index]
        count = value_count(kind, len(answer.values))
        if answer.offset != filled or not 0 < count <= part.size - filled:
            raise MalformedError(f"part {part.index}: {count} values at {answer.offset}; {filled} was next")
        target = self.statistics if part.statistics else self.delta
        start = part.start + filled
        decode_into(answer.values, kind, target[start : start + count])
        if filled == 0:
            self.included[part.index] = answer.included
        self.filled[part.index] = filled + count

    def encode(self, delta: Floats, statistics: Floats, message_bytes: int) -> Encoded:
        """What is sent of the progress on `offered`, float32, and of the statistics; what is sent takes its place.

        Raises:
            NonFiniteError: one of them holds NaN or infinity.
        """
        require_finite(delta, "the model's progress")
        require_finite(statistics, "the model's statistics")
        kind = self.plan.value_type
        pieces = []
        for part in self.parts:
            if part.statistics:
                pieces += _statistics(part, statistics, message_bytes)
                continue
            for offset, length in slices(part, message_bytes // kind.itemsize):
                at = slice(part.start + offset, part.start + offset + length)
                payload = encode_view(delta[at], kind)
                if kind is not ValueType.FLOAT32:
                    decode_into(payload, kind, delta[at])
                pieces.append((part.index, SparseSlice(offset, length, 0, 0, payload, b"")))
        return Encoded(self.offered, delta, self.parts, pieces)

    def sent_of(self, record: Record, mask: int) -> Floats | None:
        """What of a contribution to the round is in the answer, at `where`; None when nothing is.

        Args:
            mask: the parts that are in.
        """
        return record.masked(mask)


class ReceivingExplicit(Receiving):
    """The open round, with an explicit selection: the coordinates come with the values, part by part."""

    def __init__(
        self, plan: RoundPlan, seed: int, dimension: int, statistics: int, buffers: Buffers | None = None
    ) -> None:
        super().__init__(plan, seed, dimension, statistics, buffers)
        self._arriving: dict[int, SparsePart] = {}
        self._union: Where | None = None

    @property
    def where(self) -> Where:
        if self._union is None:
            raise AssertionError("the union is asked for before it is there")
        return self._union

    @property
    def whole(self) -> bool:
        if self._union is not None:
            return True
        for part, filled in zip(self.parts, self.filled, strict=True):
            found = self._arriving.get(part.index)
            if (filled != part.size) if part.statistics else (found is None or not found.whole):
                return False
        joined = [self._arriving[p.index].joined() for p in self.parts if not p.statistics]
        self._union = np.concatenate([indices for indices, _ in joined])
        self.delta = np.concatenate([values for _, values in joined])
        self._arriving.clear()
        return True

    def _take(self, part: Part, answer: Answer) -> None:
        if part.statistics:
            super()._take(part, answer)
            return
        if self._union is not None:
            raise MalformedError(f"an answer to part {part.index}, which has been answered")
        found = self._arriving.get(part.index)
        if found is None:
            found = SparsePart(part, self.plan.value_type, answer.total)
            found.add(answer)
            self._arriving[part.index] = found
            self.included[part.index] = answer.included
        else:
            found.add(answer)

    def encode(self, delta: Floats, statistics: Floats, message_bytes: int) -> Encoded:
        require_finite(statistics, "the model's statistics")
        try:
            chosen = top_k(delta, self.plan.count)
        except NonFiniteError:
            require_finite(delta, "the model's progress")
            raise
        kind = self.plan.value_type
        values = delta[chosen]
        exhausted = not np.abs(values).min() > 0
        cuts = np.searchsorted(chosen, [part.start for part in self.parts if not part.statistics]).tolist()
        cuts.append(chosen.size)
        parts, pieces = [], []
        for part in self.parts:
            if part.statistics:
                parts.append(part)
                pieces += _statistics(part, statistics, message_bytes)
                continue
            own = Part(part.index, cuts[part.index], cuts[part.index + 1])
            parts.append(own)
            at = slice(own.start, own.stop)
            for piece in sparse_slices(part, chosen[at], values[at], kind, message_bytes):
                if kind is not ValueType.FLOAT32:
                    here = slice(own.start + piece.offset, own.start + piece.offset + piece.count)
                    decode_into(piece.values, kind, values[here])
                pieces.append((part.index, piece))
        exhausted = exhausted or not values.any()  # what is left is too small for the value type, and stays
        return Encoded(chosen, values, tuple(parts), pieces, exhausted)

    def sent_of(self, record: Record, mask: int) -> Floats | None:
        """Where others have sent and this worker has not, it has sent 0.

        Raises:
            MalformedError: the answer does not have all coordinates of a part that is in it.
        """
        chosen = [p for p in record.parts if not p.statistics and mask >> p.index & 1]
        if not chosen:
            return None
        union, own = self.where, record.indices
        assert isinstance(union, np.ndarray)
        sent = np.zeros(union.size, np.float32)
        for part in chosen:
            mine = own[part.start : part.stop]
            at = np.searchsorted(union, mine)
            if mine.size and (int(at[-1]) >= union.size or not np.array_equal(union[at], mine)):
                raise MalformedError(f"part {part.index} is said to hold this worker's contribution, and does not")
            sent[at] = record.sent[part.start : part.stop]
        return sent


def receiving_of(
    plan: RoundPlan, seed: int, dimension: int, statistics: int, buffers: Buffers | None = None
) -> Receiving:
    """The open round of a plan; arguments as for `Receiving`."""
    return (ReceivingExplicit if plan.explicit else Receiving)(plan, seed, dimension, statistics, buffers)


def coding_of(plan: RoundPlan, part: Part) -> IndexCoding | None:
    """How the coordinates of a part travel; None when they do not."""
    return CODING if plan.explicit and not part.statistics else None


def _statistics(part: Part, statistics: Floats, message_bytes: int) -> list[tuple[int, SparseSlice]]:
    pieces = []
    for offset, length in slices(part, message_bytes // ValueType.FLOAT32.itemsize):
        at = slice(part.start + offset, part.start + offset + length)
        # Copied: the caller may go on changing its statistics; the difference is nobody else's.
        payload = encode(statistics[at], ValueType.FLOAT32)
        pieces.append((part.index, SparseSlice(offset, length, 0, 0, payload, b"")))
    return pieces
