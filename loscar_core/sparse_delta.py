"""Coordinates and values of one part on the wire, where the sender has chosen the coordinates itself.

With a seeded selection both sides know which coordinates a part has, and only values travel. With an explicit one
(each worker's own choice, or their union in an answer) a part is a range of coordinates, of which any number may be
sent. Each message has the next values of the part, in the coordinates' order, and those coordinates as Rice-coded gaps
(`loscar_core.indices`) from its *base*: the coordinate after the message before it, or the part's first. So a part's
coordinates are strictly increasing by construction, and no message pays for the distance to the part's beginning.
A part of which nothing is sent is said too, with one message without values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loscar_core import plan as plan_module
from loscar_core.errors import MalformedError
from loscar_core.indices import IndexCoding, decode_indices, encode_indices
from loscar_core.messages import Answer, Contribution
from loscar_core.plan import Part, slices
from loscar_core.replica import Floats, Indices
from loscar_core.values import Payload, ValueType, decode, encode_view, value_count

CODING = IndexCoding.GAPS


@dataclass(frozen=True, slots=True)
class SparseSlice:
    """What one message has of a part.

    Attributes:
        offset: how many of the part's values came before.
        count: how many it has.
        base: what its indices count from.
        total: how many values the part has in all.
        values, indices: encoded.
    """

    offset: int
    count: int
    base: int
    total: int
    values: Payload
    indices: bytes


def sparse_slices(
    part: Part, indices: Indices, values: Floats, kind: ValueType, message_bytes: int
) -> Iterator[SparseSlice]:
    """Cut what is sent of a part into messages, in order.

    Args:
        indices: coordinates in [part.start, part.stop), strictly increasing, int64.
        values: of these, float32, finite; float32 payloads are views of them.
        message_bytes: about how large a message may be, values and indices together.

    Raises:
        MalformedError: the coordinates are out of range or order.
    """
    total = int(indices.size)
    if not total:
        yield SparseSlice(0, 0, part.start, 0, b"", b"")
        return
    # Rice coding spends at most three bits more than the logarithm of the mean gap.
    index_bytes = (math.log2(part.size / total) + 3) / 8
    base = part.start
    for offset, count in slices(Part(part.index, 0, total), int(message_bytes / (kind.itemsize + index_bytes))):
        here = slice(offset, offset + count)
        coded = encode_indices(indices[here] - base, part.stop - base, CODING)
        yield SparseSlice(offset, count, base, total, encode_view(values[here], kind), coded)
        base = int(indices[offset + count - 1]) + 1


class SparsePart:
    """A part while its messages arrive; memory is taken for what has arrived, whatever is announced.

    Args:
        part: a range of coordinates.
        kind: what a value is on the wire.
        total: how many values are announced.
        largest: bound on the values' magnitudes, or None.

    Raises:
        MalformedError: more than there are coordinates.
    """

    def __init__(self, part: Part, kind: ValueType, total: int, largest: float | None = None) -> None:
        if not 0 <= total <= part.size:
            raise MalformedError(f"part {part.index}: {total} values of {part.size} coordinates")
        self.total = total
        self.filled = 0
        self._part = part
        self._kind = kind
        self._largest = largest
        self._begun = False
        self._next = part.start
        self._indices: list[Indices] = []
        self._values: list[Floats] = []

    @property
    def whole(self) -> bool:
        """Everything has arrived."""
        return self._begun and self.filled == self.total

    def add(self, message: Contribution | Answer) -> None:
        """Take the next message in.

        Raises:
            MalformedError, NonFiniteError: it is not what `sparse_slices` would have gone on with; nothing was changed.
        """
        number, left = self._part.index, self.total - self.filled
        if message.coding is not CODING:
            raise MalformedError(f"part {number}: coordinates coded as {message.coding}, not as {CODING}")
        if message.total != self.total:
            raise MalformedError(f"part {number}: a message of {message.total} values in all after one of {self.total}")
        if message.offset != self.filled or self.whole:
            raise MalformedError(f"part {number}: a message at {message.offset} where {self.filled} was next")
        if message.base != self._next:
            raise MalformedError(f"part {number}: indices from {message.base} on where {self._next} was next")
        count = value_count(self._kind, len(message.values))
        # Nobody cuts finer: many small messages would take more memory than their values.
        least = min(left, plan_module.CHUNK_ALIGNMENT) if self.total else 0
        if not least <= count <= left:
            raise MalformedError(f"part {number}: a message of {count} values where {left} are missing")
        if not count:
            if message.indices:
                raise MalformedError(f"part {number}: indices without values")
            self._begun = True
            return
        span = self._part.stop - self._next
        found = decode_indices(message.indices, count, span, CODING)
        if left - count > span - 1 - int(found[-1]):
            raise MalformedError(f"part {number}: no room for {left - count} more coordinates")
        values = decode(message.values, self._kind, count, self._largest)
        found += self._next
        self._indices.append(found)
        # A view would keep the message, whatever else that holds, until the part is whole.
        self._values.append(values if count == self.total else values.copy())
        self._begun = True
        self._next = int(found[-1]) + 1
        self.filled += count

    def joined(self) -> tuple[Indices, Floats]:
        """All coordinates, ascending int64, and their values, float32; perhaps views of the messages."""
        match self._indices:
            case []:
                return np.empty(0, np.int64), np.empty(0, np.float32)
            case [indices]:
                return indices, self._values[0]
            case several:
                return np.concatenate(several), np.concatenate(self._values)
