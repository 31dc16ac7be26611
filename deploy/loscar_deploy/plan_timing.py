"""How long a round takes over given links, and who waits for it: the arithmetic behind `loscar plan`.

A round's parts go up one after another; the server answers a part when it is there from everybody, while later ones
are still on their way. Workers merge between two steps. What is left out: that other traffic shares a link, outages,
and packets that are lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loscar_deploy.link_spec import DirectionSpec, LinkSpec

_SETTLING_ROUNDS = 16
_COUNTED_ROUNDS = 48
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Seat:
    """Workers that are alike.

    Attributes:
        step_s: seconds of one step.
        link: between each of them and the server.
        count: how many.
    """

    step_s: float
    link: LinkSpec
    count: int = 1


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts of a round that are alike, one after another; `up` and `down` are the bytes of one of them on the wire."""

    count: int
    up: int
    down: int


@dataclass(frozen=True, slots=True)
class Pace:
    """When workers contribute and merge.

    Attributes:
        local_steps: steps from a merge to the next snapshot; None goes by `interval_s`.
        interval_s: seconds from a merge to the next snapshot.
        overlap_steps: steps from a snapshot to its merge; None merges when the answer is there.
    """

    local_steps: int | None
    interval_s: float
    overlap_steps: int | None

    def steps_before_snapshot(self, step_s: float) -> int:
        """N of a worker with steps of `step_s` seconds."""
        if self.local_steps is not None:
            return self.local_steps
        return max(1, math.ceil(self.interval_s / step_s - _ROUNDING))


@dataclass(frozen=True, slots=True)
class SeatTiming:
    """What a round is for one kind of worker.

    Attributes:
        local_steps: N.
        overlap_steps: Q, the mean.
        idle: share of the time in which training waits.
        up, down: share of the time in which the link carries the round's bytes; 0 for an unlimited one.
    """

    local_steps: int
    overlap_steps: float
    idle: float
    up: float
    down: float


@dataclass(frozen=True, slots=True)
class Timing:
    """A round in the steady state.

    Attributes:
        round_s: seconds from a merge to the next.
        flight_s: seconds from a snapshot to its answer, of whoever waits longest.
        seats: by kind of worker, in the order that was asked for.
    """

    round_s: float
    flight_s: float
    seats: tuple[SeatTiming, ...]


def arrivals(starts: Sequence[float], seats: Sequence[Seat], parts: Sequence[Parts], computing_s: float) -> list[float]:
    """When the answer to a round is whole at each worker.

    Args:
        starts: when each of `seats` has taken its snapshot, in seconds.
        parts: what the round carries, at least one.
        computing_s: what selecting, summing and encoding take, on both sides together.
    """
    up_total = sum(p.count * p.up for p in parts)
    down_total = sum(p.count * p.down for p in parts)
    done = [start + _delay(s.link.up) + _seconds(up_total, s.link.up) for start, s in zip(starts, seats, strict=True)]
    first = [-math.inf] * len(seats)
    up_before = down_before = 0
    for group in parts:
        # Between a group's first and last part, when a part is summed and what is left to be answered behind it are
        # both linear in its number, and the maximum over the workers is convex: the later of the two ends decides.
        for number in {0, group.count - 1}:
            up = up_before + (number + 1) * group.up
            summed = max(end - _seconds(up_total - up, s.link.up) for end, s in zip(done, seats, strict=True))
            left = down_total - down_before - number * group.down
            first = [max(t, summed + _seconds(left, s.link.down)) for t, s in zip(first, seats, strict=True)]
        up_before += group.count * group.up
        down_before += group.count * group.down
    return [t + _delay(s.link.down) + computing_s for t, s in zip(first, seats, strict=True)]


def timing(seats: Sequence[Seat], parts: Sequence[Parts], pace: Pace, computing_s: float) -> Timing:
    """A round of the steady state; see `arrivals` for the arguments."""
    local = [pace.steps_before_snapshot(s.step_s) for s in seats]
    merged = [0.0] * len(seats)
    began = merged
    overlap, idle = [0.0] * len(seats), [0.0] * len(seats)
    flight_s = 0.0
    for number in range(_SETTLING_ROUNDS + _COUNTED_ROUNDS):
        if number == _SETTLING_ROUNDS:
            began, overlap, idle, flight_s = merged, [0.0] * len(seats), [0.0] * len(seats), 0.0
        starts = [m + n * s.step_s for m, n, s in zip(merged, local, seats, strict=True)]
        answered = arrivals(starts, seats, parts, computing_s)
        merged = []
        for i, (start, answer, seat) in enumerate(zip(starts, answered, seats, strict=True)):
            steps = pace.overlap_steps
            if steps is None:
                steps = max(1, math.ceil((answer - start) / seat.step_s - _ROUNDING))
            trained = start + steps * seat.step_s
            merged.append(max(trained, answer) if pace.overlap_steps is not None else trained)
            overlap[i] += steps
            idle[i] += merged[i] - trained
        flight_s += max(a - s for a, s in zip(answered, starts, strict=True))
    spent = [m - b for m, b in zip(merged, began, strict=True)]
    round_s = max(spent) / _COUNTED_ROUNDS
    up, down = (sum(p.count * size for p, size in zip(parts, sizes, strict=True)) for sizes in _sizes(parts))
    return Timing(
        round_s,
        flight_s / _COUNTED_ROUNDS,
        tuple(
            SeatTiming(
                n,
                q / _COUNTED_ROUNDS,
                waited / total,
                _seconds(up, s.link.up) / round_s,
                _seconds(down, s.link.down) / round_s,
            )
            for n, q, waited, total, s in zip(local, overlap, idle, spent, seats, strict=True)
        ),
    )


def _sizes(parts: Sequence[Parts]) -> tuple[list[int], list[int]]:
    return [p.up for p in parts], [p.down for p in parts]


def _delay(direction: DirectionSpec) -> float:
    """Of a stream of chunks the latest counts, since nothing overtakes: the upper end of the usual jitter."""
    return direction.delay_s + direction.jitter_s


def _seconds(size: float, direction: DirectionSpec) -> float:
    return 0.0 if direction.rate_bytes_per_s is None else size / direction.rate_bytes_per_s
