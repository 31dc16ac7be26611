"""Bringing a member to the server's state by value, and taking a state from a worker.

Catch-up is by value because a sum of missed averages would have to be kept for every absentee: both sides compute
the union of the missed selections from the seeds, and the server streams the consensus on it while rounds go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from loscar_core.errors import MalformedError, RefusedError
from loscar_core.messages import CatchUp, Partial, Purpose, StateOffer, VectorChunk
from loscar_core.plan import RoundPlan, missed_coordinates
from loscar_core.replica import Floats, Replica
from loscar_core.server_members import Stream
from loscar_core.state import InclusionTable, Lineage, Position
from loscar_core.values import require_finite

STREAM_VALUES = 1 << 16
"""Values in one message of a catch-up: 256 KiB."""

MIN_SLICE_VALUES = 1 << 12
"""And at least: 16 KiB."""

RECENT_SENT = 16
"""Committed rounds that a worker is told about, so that it can vouch for them later."""


def plan_catch_up(
    state: Replica,
    seed: int,
    lineage: Lineage,
    round_: int | None,
    recent: tuple[RoundPlan, ...] = (),
    digests: Mapping[Position, int] | None = None,
    slice_values: int = 0,
) -> tuple[CatchUp, Stream | None]:
    """What a member lacks.

    Args:
        state: the server's.
        seed: the run's.
        lineage: of the member's replica.
        round_: the round that the replica holds, or None when it is not to be trusted.
        recent: plans of the last rounds that it committed; some may have been abandoned.
        digests: what the replica's digest was after its last rounds; the last round that both sides share must be
            among them, with the same digest, or the member is sent everything: two server processes that called
            themselves by the same epoch number are told apart by that. None when the replica is known to be a copy.
        slice_values: values in one message; 0 for as many as usual.

    Returns:
        The announcement, and the stream that must follow it (None when nothing is missing).
    """
    base, plans = 0, None
    if round_ is not None:
        base = state.lineage.last_common_round(state.position.round, lineage, round_)
        shared = Position(state.lineage.epoch_of(base), base)
        known = None if digests is None else digests.get(shared)
        if digests is None or (known is not None and known == state.digest_at(shared)):
            newer = state.history.since(base, state.position.round)
            abandoned = tuple(p for p in recent if base < p.round <= round_)
            if newer is not None and len(abandoned) == round_ - base:
                plans = abandoned + newer
    indices = missed_coordinates(seed, state.vector.size, plans)
    full = indices is None
    announcement = CatchUp(
        position=state.position,
        digest=state.digest,
        lineage=state.lineage,
        base_round=base,
        plans=() if full or plans is None else plans,
        full=full,
        inclusion=state.inclusion.entries(),
        recent=state.history.last(RECENT_SENT),
        members=state.members,
    )
    if plans == ():
        return announcement, None
    size = state.vector.size if indices is None else indices.size
    return announcement, Stream(indices, size + state.statistics.size, slice_values or STREAM_VALUES)


def resume(
    state: Replica, seed: int, announcement: CatchUp, stream: Stream, partial: Partial
) -> tuple[CatchUp, Stream, Stream | None]:
    """Let a member keep what it has of a whole state, when what has changed of that since is few.

    Args:
        announcement, stream: of a whole state.
        partial: what it has, as it says or as this server has sent it.

    Returns:
        The announcement; the stream, from where it was interrupted; and what must come before it in one go.
    """
    dimension = state.vector.size
    if not 0 < partial.filled <= dimension or state.digest_at(partial.position) != partial.digest:
        return announcement, stream, None
    newer = state.history.since(partial.position.round, state.position.round)
    indices = missed_coordinates(seed, dimension, newer)
    if newer is None or indices is None:
        return announcement, stream, None
    patch = indices[indices < partial.filled]
    kept = replace(announcement, plans=newer, resume=partial.filled)
    rest = replace(stream, offset=partial.filled)
    return kept, rest, Stream(patch, patch.size, stream.slice_values) if patch.size else None


def next_slice(state: Replica, stream: Stream) -> VectorChunk:
    """The next message of a stream; it holds the consensus as of the last commit that was queued before it."""
    stop = min(stream.offset + stream.slice_values, stream.total)
    values = state.slice_by_value(stream.indices, stream.offset, stop)
    chunk = VectorChunk(Purpose.CATCH_UP, stream.offset, stream.total, values.astype("<f4", copy=False).tobytes())
    stream.offset = stop
    return chunk


class StateTransfer:
    """A vector on its way from a worker: the initial model, or the anchor of a recovery.

    Args:
        peer: the donor's stream.
        dimension: number of parameters.
        statistics: number of statistics values.
        purpose: which of the two.
    """

    def __init__(self, peer: int, dimension: int, statistics: int, purpose: Purpose) -> None:
        self.peer = peer
        self.purpose = purpose
        self.offer: StateOffer | None = None
        self._dimension = dimension
        self._size = dimension + statistics
        self._values: Floats | None = None
        self._filled = 0

    def add(self, chunk: VectorChunk) -> bool:
        """Take a slice in; True when the vector is whole.

        Raises:
            MalformedError, NonFiniteError: nothing was changed.
            RefusedError: there is no memory for it.
        """
        if chunk.purpose is not self.purpose or (self.purpose is Purpose.ANCHOR and self.offer is None):
            raise MalformedError(f"a chunk of {chunk.purpose.name} where {self.purpose.name} was asked for")
        if chunk.total != self._size or chunk.offset != self._filled or len(chunk.values) % 4:
            raise MalformedError(
                f"a vector chunk at {chunk.offset} of {chunk.total}; {self._filled} of {self._size} was next"
            )
        values = np.frombuffer(chunk.values, "<f4")
        if not 0 < values.size <= self._size - self._filled:
            raise MalformedError(f"a vector chunk of {values.size} values at {chunk.offset} of {self._size}")
        require_finite(values, "the model")
        if self._values is None:
            try:
                self._values = np.empty(self._size, np.float32)
            except MemoryError:
                raise RefusedError(f"a model of {self._size} coordinates does not fit into this server") from None
        self._values[self._filled : self._filled + values.size] = values
        self._filled += values.size
        return self._filled == self._size

    def replica(self) -> Replica:
        """The state that was transferred."""
        assert self._values is not None
        vector = self._values[: self._dimension]
        statistics = self._values[self._dimension :].copy()
        offer = self.offer
        if offer is None:
            return Replica.initial(vector, statistics)
        state = Replica(
            vector,
            statistics,
            offer.position,
            offer.digest,
            offer.lineage,
            InclusionTable(offer.inclusion),
            members=offer.members,
        )
        for entry in offer.recent:
            state.history.append(entry)
        return state
