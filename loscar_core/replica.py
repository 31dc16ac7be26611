"""One copy of the run's state: the consensus on the server, the anchor in every worker.

Both sides commit rounds with the same float32 operations in the same order, so the copies are equal bit for bit.
The digest chain proves that in O(K) a round: digest_r = crc32(digest_{r−1} ‖ bytes of c[S_r] after the round ‖
bytes of the statistics after it). Before those of c[S_r] come the bytes of S_r where it follows from no seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loscar_core.checksum import crc32
from loscar_core.plan import HISTORY_ROUNDS, History, HistoryEntry, RoundPlan
from loscar_core.selection import SelectionKind
from loscar_core.state import InclusionTable, Lineage, Position

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Where = Indices | slice


def as_indices(where: Where) -> Indices:
    """Coordinates as an array, K int64."""
    return np.arange(where.start, where.stop, dtype=np.int64) if isinstance(where, slice) else where


def size_of(where: Where) -> int:
    """How many coordinates there are."""
    return int(where.stop - where.start) if isinstance(where, slice) else where.size


def checksum_of(vector: Floats, statistics: Floats) -> int:
    """CRC-32 of a whole state's bytes: the digest before the first round."""
    return crc32(_bytes(statistics), crc32(_bytes(vector)))


def _bytes(values: Floats | Indices) -> memoryview:
    # A view of no elements cannot be cast.
    return np.ascontiguousarray(values).data.cast("B") if values.size else memoryview(b"")


@dataclass
class Replica:
    """The state (position, lineage, c, inclusion table) with its digest.

    Attributes:
        vector: the parameters, d float32.
        statistics: the statistics, float32; empty when the model has none.
        position: rounds committed, and the epoch that closed the last of them.
        digest: see the module.
        lineage: which epochs closed which rounds.
        inclusion: who is in.
        history: the last committed rounds.
        members: n of the last committed round.
    """

    vector: Floats
    statistics: Floats
    position: Position = Position()
    digest: int = 0
    lineage: Lineage = Lineage()
    inclusion: InclusionTable = field(default_factory=InclusionTable)
    history: History = field(default_factory=History)
    members: int = 0

    @classmethod
    def initial(cls, vector: Floats, statistics: Floats) -> Replica:
        """The state before round 1; the arrays are kept, not copied."""
        return cls(vector, statistics, digest=checksum_of(vector, statistics))

    def copy(self) -> Replica:
        """A copy that shares no array and no table."""
        other = Replica(
            self.vector.copy(),
            self.statistics.copy(),
            self.position,
            self.digest,
            self.lineage,
            self.inclusion.copy(),
            members=self.members,
        )
        for entry in self.history.last(HISTORY_ROUNDS):
            other.history.append(entry)
        return other

    def gather(self, plan: RoundPlan, indices: Where, start: int, stop: int) -> Floats:
        """The vector's values at positions [start, stop) of a selection."""
        if isinstance(indices, slice):
            return self.vector[indices][start:stop]
        if plan.selection is SelectionKind.ALL:
            return self.vector[start:stop]
        return self.vector.take(indices[start:stop])

    def commit(
        self,
        epoch: int,
        plan: RoundPlan,
        indices: Where,
        values: Floats,
        statistics: Floats | None,
        digest: int,
        bitmaps: Sequence[bytes],
        roster: Sequence[bytes | None],
        members: int,
    ) -> None:
        """Take a whole round over.

        Args:
            epoch: the server epoch that closed it.
            plan: its plan; `plan.round` must follow `position.round`.
            indices: its selection, K int64 or a range of coordinates (ignored for a dense round).
            values: the vector's new values on the selection, K float32.
            statistics: the new statistics, or None to keep them.
            digest: from `next_digest`.
            bitmaps: per part, the slots in its sum.
            roster: who held the slots.
            members: n.
        """
        if plan.round != self.position.round + 1:
            raise AssertionError(f"round {plan.round} committed on top of {self.position}")
        if plan.selection is SelectionKind.ALL:
            self.vector[:] = values
        else:
            self.vector[indices] = values
        if statistics is not None and statistics.size:
            self.statistics = statistics
        self.digest = digest
        self.position = Position(epoch, plan.round)
        self.lineage = self.lineage.closed(self.position)
        self.history.append(HistoryEntry(self.position, plan, digest))
        self.inclusion.record(plan.round, bitmaps, roster)
        self.members = members

    def digest_at(self, position: Position) -> int | None:
        """The digest after a round of this state, or None when it is not remembered."""
        return self.digest if position == self.position else self.history.digest_at(position)

    def next_digest(self, plan: RoundPlan, where: Where, values: Floats, statistics: Floats | None) -> int:
        """The digest after a round that leaves `values` at `where`."""
        digest = self.digest
        if plan.explicit:  # else the contributions' checksum says where
            digest = crc32(_bytes(as_indices(where).astype("<i8", copy=False)), digest)
        digest = crc32(_bytes(values), digest)
        return digest if statistics is None else crc32(_bytes(statistics), digest)

    def slice_by_value(self, indices: Indices | None, start: int, stop: int) -> Floats:
        """Values [start, stop) of (the vector on `indices`, or all of it) followed by the statistics."""
        size = self.vector.size if indices is None else indices.size
        pieces = []
        if start < size:
            end = min(stop, size)
            pieces.append(self.vector[start:end] if indices is None else self.vector.take(indices[start:end]))
        if stop > size:
            pieces.append(self.statistics[max(start, size) - size : stop - size])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
