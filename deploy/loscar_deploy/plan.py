"""Which density, pace and value type hide a link, and what a run with them costs; `loscar plan` without its words.

A worker that merges when the answer is there never waits, whatever the link: what a slow link costs then is
staleness. So of all settings that leave the link some of its time, the one is taken under which the workers disagree
least: a large density makes long flights, a small one makes coordinates wait for their turn, and between the two there
is a best one. A narrower value type is taken only where it makes a difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from loscar_core.config import ServerLimits
from loscar_core.errors import ConfigError
from loscar_core.selection import SelectionKind, count_for
from loscar_core.values import ValueType
from loscar_deploy.plan_costs import HEARTBEAT_S, Round, heartbeat_bytes
from loscar_deploy.plan_timing import Pace, Seat, Timing, arrivals, timing

DAY_S = 86_400.0
HIDDEN = 0.01
"""Share of the time that training may wait, if the link is to be called hidden."""

_ONE_IN = (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 80, 100, 200, 250, 400, 500, 800, 1000)
DENSITIES = tuple(1 / rounds for rounds in _ONE_IN)
"""What is tried: where a sweep takes a whole number of rounds, down to the least that the paper reports on."""

TYPES = (ValueType.FLOAT32, ValueType.BFLOAT16, ValueType.INT8)
"""What is tried, the widest first. float16 is as wide as bfloat16."""

_WORTH = 1.1
_MOST_WIDENINGS = 20


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be planned; None leaves a choice to the plan.

    Attributes:
        dimension: trainable parameters.
        seats: the workers, by kind.
        statistics: further values that every round carries whole.
        selection: how coordinates are chosen.
        density, value_type, local_steps, interval_s, overlap_steps: of the run. At most one of `local_steps` and
            `interval_s`.
        link_share: how much of its time a link may be busy with rounds, each way.
        max_overlap: most steps from a snapshot to its merge, of any worker.
        max_noise_steps: largest disagreement, see `Plan.most_noise_steps`.
        max_daily_bytes: most traffic of a worker, both ways together.
    """

    dimension: int
    seats: tuple[Seat, ...]
    statistics: int = 0
    selection: SelectionKind = SelectionKind.SWEEP
    density: float | None = None
    value_type: ValueType | None = None
    local_steps: int | None = None
    interval_s: float | None = None
    overlap_steps: int | None = None
    link_share: float = 0.8
    max_overlap: int | None = None
    max_noise_steps: float | None = None
    max_daily_bytes: float | None = None

    @property
    def workers(self) -> int:
        return sum(seat.count for seat in self.seats)


@dataclass(frozen=True)
class Plan:
    """One setting and what is to be expected of it.

    Attributes:
        question: what it answers.
        density: of the run.
        round: what a round carries.
        pace: when workers contribute and merge.
        timing: a round in the steady state.
    """

    question: Question
    density: float
    round: Round
    pace: Pace
    timing: Timing

    @property
    def idle(self) -> float:
        """Share of the time in which training waits, of the worker that waits most."""
        return max(s.idle for s in self.timing.seats)

    @property
    def hidden(self) -> bool:
        return self.idle <= HIDDEN

    def _mean(self, values: Iterator[float]) -> float:
        seats = self.question.seats
        return sum(s.count * v for s, v in zip(seats, values, strict=True)) / self.question.workers

    @cached_property
    def overlap_steps(self) -> float:
        """Q, the mean over the workers."""
        return self._mean(s.overlap_steps for s in self.timing.seats)

    @cached_property
    def cycle_steps(self) -> float:
        """H = N + Q, the mean over the workers."""
        return self._mean(s.overlap_steps + s.local_steps for s in self.timing.seats)

    @cached_property
    def noise_steps(self) -> float:
        """The disagreement to expect just after a merge, see `Round.noise_steps`."""
        return self.round.noise_steps(self.cycle_steps - self.overlap_steps, self.overlap_steps)

    @property
    def most_noise_steps(self) -> float:
        """Just before the next merge: every step since the last one has added its noise everywhere."""
        return self.noise_steps + (1 - 1 / self.question.workers) * self.cycle_steps

    @cached_property
    def bytes_per_day(self) -> tuple[float, float]:
        """Of one worker on the wire, up and down, heartbeats included."""
        rounds, beats = DAY_S / self.timing.round_s, DAY_S / HEARTBEAT_S
        up, down = self.round.bytes_each_way()
        beat, reply = heartbeat_bytes()
        return up * rounds + beat * beats, down * rounds + reply * beats

    @property
    def payload_per_day(self) -> float:
        """Bytes of values each way, as a run counts them."""
        return self.round.payload * DAY_S / self.timing.round_s

    def if_blocking(self) -> Plan:
        """As many steps a round, none of them while it is in flight."""
        pace = Pace(max(1, round(self.cycle_steps)), self.pace.interval_s, 0)
        return evaluate(self.question, self.density, self.round.value_type, pace)

    @property
    def final_s(self) -> float:
        """What the final round takes: all coordinates in float32."""
        question = self.question
        dense = replace(self.round, selection=SelectionKind.ALL, value_type=ValueType.FLOAT32)
        starts = [0.0] * len(question.seats)
        return max(arrivals(starts, question.seats, dense.parts(), dense.computing_s))

    @property
    def start_bytes(self) -> int:
        """What the worker in the lowest slot sends before the first round, and every other one receives that has not
        made the same initial model."""
        return 4 * (self.question.dimension + self.question.statistics)

    @property
    def start_s(self) -> float:
        """How long that takes at most."""
        first, size = self.question.seats[0].link.up, self.start_bytes
        up = size / first.rate_bytes_per_s if first.rate_bytes_per_s else 0.0
        downs = [s.link.down for s in self.question.seats]
        down = max(d.delay_s + (size / d.rate_bytes_per_s if d.rate_bytes_per_s else 0.0) for d in downs)
        return first.delay_s + up + down

    @property
    def round_cap_s(self) -> float | None:
        """A server's --round-cap, where its default would close rounds before they can be whole."""
        longest = max(self.final_s, self.timing.round_s)
        return None if 1.5 * longest <= ServerLimits().round_cap_s else math.ceil(2 * longest)


def evaluate(question: Question, density: float, value_type: ValueType, pace: Pace) -> Plan:
    """What is to be expected of one setting. Raises ConfigError for a density that is none."""
    selection = question.selection
    count = question.dimension if selection is SelectionKind.ALL else count_for(density, question.dimension)
    carried = Round(question.dimension, question.statistics, count, selection, value_type, question.workers)
    return Plan(question, density, carried, pace, timing(question.seats, carried.parts(), pace, carried.computing_s))


def make_plan(question: Question) -> tuple[Plan, tuple[Plan, ...]]:
    """The setting to take, and the best one of each value type that was tried, the widest first.

    Raises:
        ConfigError: no setting is within what the question allows.
    """
    fits = _within(question, list(_candidates(question)))
    hidden = [p for p in fits if p.hidden]
    if not hidden:
        least = min(p.idle for p in fits)
        hidden = [p for p in fits if p.idle <= least + HIDDEN]
    best = tuple(min(own, key=_cost) for own in _by_type(hidden))
    if question.max_noise_steps is not None:
        return min(best, key=_cost), best
    enough = _WORTH * min(p.most_noise_steps for p in best)
    return next(p for p in best if p.most_noise_steps <= enough), best


def _cost(plan: Plan) -> tuple[float, float]:
    """What is least in the best plan: disagreement, or traffic where a disagreement is allowed."""
    traffic, apart = sum(plan.bytes_per_day), plan.most_noise_steps
    return (apart, traffic) if plan.question.max_noise_steps is None else (traffic, apart)


def _by_type(plans: list[Plan]) -> Iterator[list[Plan]]:
    for kind in ValueType:
        own = [p for p in plans if p.round.value_type is kind]
        if own:
            yield own


def _within(question: Question, plans: list[Plan]) -> list[Plan]:
    """Those that keep to the limits. Raises ConfigError that names the one which nothing keeps to."""
    limits = (
        ("steps in flight", question.max_overlap, _longest_overlap),
        ("bytes a day", question.max_daily_bytes, lambda p: sum(p.bytes_per_day)),
        ("steps' noise of disagreement", question.max_noise_steps, lambda p: p.most_noise_steps),
    )
    for what, most, figure in limits:
        if most is None:
            continue
        least = min(plans, key=figure)
        plans = [p for p in plans if figure(p) <= most]
        if not plans:
            raise ConfigError(
                f"no setting that was tried keeps to {most:g} {what}: the least is {figure(least):.3g}, with density "
                f"{least.density:g} in {least.round.value_type.value}"
            )
    return plans


def _longest_overlap(plan: Plan) -> float:
    return max(s.overlap_steps for s in plan.timing.seats)


def _candidates(question: Question) -> Iterator[Plan]:
    densities = DENSITIES if question.density is None else (question.density,)
    if question.selection is SelectionKind.ALL:
        densities = (1.0,)
    for value_type in TYPES if question.value_type is None else (question.value_type,):
        for density in densities:
            yield _paced(question, density, value_type)


def _paced(question: Question, density: float, value_type: ValueType) -> Plan:
    """With the shortest pace that the links allow, unless the question has one.

    Equal workers count steps; unequal ones go by the clock, so that nobody waits for the slowest one's steps.
    """
    steps_s = [s.step_s for s in question.seats]
    unit_s = min(steps_s)
    if question.local_steps is not None:
        return evaluate(question, density, value_type, Pace(question.local_steps, unit_s, question.overlap_steps))
    if question.interval_s is not None:
        return evaluate(question, density, value_type, Pace(None, question.interval_s, question.overlap_steps))
    count = 1
    for _ in range(_MOST_WIDENINGS):
        pace = Pace(count if max(steps_s) == unit_s else None, count * unit_s, question.overlap_steps)
        plan = evaluate(question, density, value_type, pace)
        short_s = _shortest_round_s(plan) - plan.timing.round_s
        if short_s <= 1e-9 * plan.timing.round_s:
            break
        count += max(1, math.ceil(short_s / unit_s))
    return plan


def _shortest_round_s(plan: Plan) -> float:
    """How long a round has to last for the links to have time left, and for the traffic to be allowed."""
    question, round_s = plan.question, plan.timing.round_s
    shortest = max(max(s.up, s.down) for s in plan.timing.seats) * round_s / question.link_share
    if question.max_daily_bytes is not None:
        left = question.max_daily_bytes - sum(heartbeat_bytes()) * DAY_S / HEARTBEAT_S
        if left > 0:
            shortest = max(shortest, sum(plan.round.bytes_each_way()) * DAY_S / left)
    return shortest
