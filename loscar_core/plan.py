"""The plan of a round: what it carries and what it is for; how it is cut into parts and messages.

A plan is announced with the answer of the round before, so a worker never asks. Seeded selections follow from
(seed, round, plan) alone and cost no bytes.

A *part* is the unit of closing: 2^18 selected positions, so that a long round is summed and answered in a pipeline.
Where each worker selects for itself (an *explicit* selection), it is 2^22 coordinates of the range, whatever is sent
of them. A *message* is a slice of one part. Statistics, when a model has them, are further parts of every round: sent
whole as float32 and answered with their mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from loscar_core.config import FinalRound, RunConfig
from loscar_core.errors import MalformedError
from loscar_core.selection import SelectionKind, select, selection_checksum, selection_size, union
from loscar_core.state import Position
from loscar_core.values import INT8_RUN, ValueType

PART_POSITIONS = 1 << 18
"""Selected positions in one part: 1 MiB of float32."""

EXPLICIT_SPAN = 1 << 22
"""Coordinates in one part of a round with an explicit selection."""

HISTORY_ROUNDS = 256
"""Committed rounds whose plans and digests are remembered, so that short absences are caught up cheaply."""

MAX_PARTIAL_CATCH_UP = 1 << 22
"""Missed coordinates up to which a member is sent just those, in one go; beyond, it is streamed the whole vector."""

CHUNK_ALIGNMENT = INT8_RUN
"""Messages start at multiples of this many positions, since each int8 scale covers one run."""


class RoundKind(IntEnum):
    """What a round is for; the numbers travel."""

    TRAIN = 0
    EVALUATION = 1
    """Workers expose their vectors right after committing it."""
    CONSOLIDATION = 2
    """Dense, so that the consensus becomes a model for a checkpoint."""
    FINAL = 3
    """Dense float32; workers stop at the snapshot and take over the consensus."""
    END = 4
    """No round: the run is over."""

    @property
    def ends(self) -> bool:
        """Nothing is trained after it."""
        return self in (RoundKind.FINAL, RoundKind.END)


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """What one round carries.

    Attributes:
        round: its number, from 1.
        kind: what it is for.
        selection: how its coordinates are chosen.
        count: K, how many (for END: 0); with an explicit selection how many each worker sends.
        value_type: what a value is on the wire.
    """

    round: int
    kind: RoundKind
    selection: SelectionKind
    count: int
    value_type: ValueType

    @property
    def explicit(self) -> bool:
        """Each worker selects for itself, so that indices travel; the answer has the union of what was sent."""
        return self.selection is SelectionKind.TOPK

    def indices(self, seed: int, dimension: int) -> NDArray[np.int64]:
        """The selected coordinates, ascending; K int64.

        Shared by all who ask for the same ones, and not to be changed: a process that plays many workers would
        otherwise make the same selection for each of them.
        """
        return _last_selection(self.selection, seed, self.round, dimension, self.count)

    def where(self, seed: int, dimension: int) -> NDArray[np.int64] | slice:
        """The same, as a range of coordinates where they are one: nothing is made of the size of the model. With an
        explicit selection everything that can be chosen from."""
        match self.selection:
            case SelectionKind.ALL | SelectionKind.TOPK:
                return slice(0, dimension)
            case SelectionKind.HEAD:
                return slice(0, self.count)
            case SelectionKind.TAIL:
                return slice(dimension - self.count, dimension)
            case _:
                return self.indices(seed, dimension)

    def size(self, seed: int, dimension: int) -> int:
        """Exactly how many coordinates `indices` returns (a sweep's slices and last blocks differ a little)."""
        return selection_size(self.selection, seed, self.round, dimension, self.count)

    def parts(self, seed: int, dimension: int, statistics: int = 0) -> tuple[Part, ...]:
        """How the round is cut, with a statistics vector of that size: see `parts_of`. The parts of an explicit
        selection are ranges of coordinates."""
        if self.explicit:
            return parts_of(dimension, statistics, EXPLICIT_SPAN)
        return parts_of(self.size(seed, dimension), statistics)

    def checksum(self, seed: int, dimension: int) -> int:
        """32 bits that two sides share only when they select the same coordinates."""
        return selection_checksum(self.selection, seed, self.round, dimension, self.count)


_last_selection = lru_cache(maxsize=2)(select)
"""Of the open round, and of the next one where it was made ahead."""

WORTH_MAKING_AHEAD = 1 << 14
"""Smaller selections are made faster than a thread is asked to."""


def make_ahead(plan: RoundPlan, seed: int, dimension: int) -> None:
    """While a round is under way, make the next one's selection, which is most likely of the same kind: a large one
    takes longer than a message may wait. Meant for a thread of its own."""
    replace(plan, round=plan.round + 1).where(seed, dimension)


def is_worth_making_ahead(plan: RoundPlan) -> bool:
    seeded = plan.selection in (SelectionKind.RANDOM, SelectionKind.SWEEP, SelectionKind.BLOCK)
    return seeded and plan.count >= WORTH_MAKING_AHEAD


def plan_round(config: RunConfig, dimension: int, round_: int, *, stopping: bool) -> RoundPlan:
    """The plan of a round, from the run's configuration and whether the run is to end.

    Args:
        stopping: the round before was the last that trains; a FINAL or END plan results.
    """
    if stopping or (config.rounds is not None and round_ > config.rounds):
        if config.final_round is FinalRound.DENSE:
            return RoundPlan(round_, RoundKind.FINAL, SelectionKind.ALL, dimension, ValueType.FLOAT32)
        return end_plan(round_)
    evaluate = config.evaluate_every > 0 and round_ % config.evaluate_every == 0
    kind = RoundKind.EVALUATION if evaluate else RoundKind.TRAIN
    if config.dependent:
        head = config.count(dimension)
        if is_dependent(config, round_):
            return RoundPlan(round_, kind, SelectionKind.TAIL, dimension - head, config.value_type)
        return RoundPlan(round_, kind, SelectionKind.HEAD, head, config.value_type)
    selection = config.selection
    count = dimension if selection is SelectionKind.ALL else config.count(dimension)
    if selection is SelectionKind.TOPK and count == dimension:
        selection = SelectionKind.ALL  # the largest of everything is everything: no index has to travel
    return RoundPlan(round_, kind, selection, count, config.value_type)


def is_dependent(config: RunConfig, round_: int) -> bool:
    """The round is the second of a pair: it averages what was computed from the answer of the one before."""
    return config.dependent > 0 and round_ % 2 == 0


def consolidation(plan: RoundPlan, dimension: int) -> RoundPlan:
    """The same round with all coordinates, after which the consensus is worth saving."""
    return replace(plan, kind=RoundKind.CONSOLIDATION, selection=SelectionKind.ALL, count=dimension)


def end_plan(round_: int) -> RoundPlan:
    """The plan that says that there is no such round."""
    return RoundPlan(round_, RoundKind.END, SelectionKind.ALL, 0, ValueType.FLOAT32)


@dataclass(frozen=True, slots=True)
class Part:
    """Positions [start, stop) of a round's selection, or of the statistics vector."""

    index: int
    start: int
    stop: int
    statistics: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start


def parts_of(selected: int, statistics: int = 0, step: int | None = None) -> tuple[Part, ...]:
    """How a round of `selected` coordinates and a statistics vector is cut.

    Args:
        step: coordinates of one part, or None for as many as usual; statistics are cut as usual.

    Returns:
        The parts by index: those of the selection first, then those of the statistics.
    """
    parts: list[Part] = []
    for total, is_statistics, size in ((selected, False, step or PART_POSITIONS), (statistics, True, PART_POSITIONS)):
        for start in range(0, total, size):
            parts.append(Part(len(parts), start, min(start + size, total), is_statistics))
    return tuple(parts)


def slices(part: Part, max_positions: int) -> Iterator[tuple[int, int]]:
    """Cut a part into messages: (offset, length) in positions within the part, in order."""
    step = max(CHUNK_ALIGNMENT, max_positions // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT)
    for offset in range(0, part.size, step):
        yield offset, min(step, part.size - offset)


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One committed round: where, by which plan, and the digest of the consensus after it."""

    position: Position
    plan: RoundPlan
    digest: int


class History:
    """The last committed rounds of one state, oldest first; bounded."""

    def __init__(self) -> None:
        self._entries: deque[HistoryEntry] = deque(maxlen=HISTORY_ROUNDS)

    def append(self, entry: HistoryEntry) -> None:
        self._entries.append(entry)

    def clear(self) -> None:
        self._entries.clear()

    def truncate(self, round_: int) -> None:
        """Forget what came after a round."""
        while self._entries and self._entries[-1].position.round > round_:
            self._entries.pop()

    def last(self, count: int) -> tuple[HistoryEntry, ...]:
        return tuple(self._entries)[-count:]

    def since(self, round_: int, until: int) -> tuple[RoundPlan, ...] | None:
        """The plans of rounds round_+1 .. until, or None when some are forgotten."""
        plans = tuple(e.plan for e in self._entries if round_ < e.position.round <= until)
        return plans if len(plans) == max(0, until - round_) else None

    def digest_at(self, position: Position) -> int | None:
        for e in reversed(self._entries):
            if e.position == position:
                return e.digest
        return None


def missed_coordinates(seed: int, dimension: int, plans: tuple[RoundPlan, ...] | None) -> NDArray[np.int64] | None:
    """U, the union of the selections of missed rounds, or None for all coordinates.

    All is also the answer when the union would not be clearly smaller, or too long to be sent in one go: a partial
    catch-up has to reach the member before the next commit does; and when one of the rounds had an explicit selection,
    which nobody can compute who was not there.

    Raises:
        MalformedError: when a plan asks for more coordinates than there are.
    """
    if plans is None:
        return None
    total = 0
    for plan in plans:
        if plan.count > dimension:
            raise MalformedError(f"round {plan.round} selects {plan.count} of {dimension} coordinates")
        total += plan.count
        everything = plan.explicit or plan.selection is SelectionKind.ALL
        if everything or total * 2 > dimension or total > MAX_PARTIAL_CATCH_UP:
            return None
    return union([plan.indices(seed, dimension) for plan in plans])
