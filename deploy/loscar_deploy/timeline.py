"""Pictures of what the workers did when: timelines, staleness, traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from loscar_deploy.plots import (
    BLACK,
    ORANGE,
    SKY,
    VERMILLION,
    WIDTH_IN,
    byte_unit,
    legend_above,
    named,
    new_figure,
    style,
    time_label,
    wrapped,
)
from loscar_deploy.run_data import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROUNDS_SHOWN = 6
WORKERS_SHOWN = 8
LINES_SHOWN = 6
"""More workers than that are drawn as a band."""

Span = tuple[float, float]
"""(from, to) in seconds of run time."""


@dataclass(frozen=True, slots=True)
class Course:
    """What one worker did, in seconds of run time.

    Attributes:
        computing: the training thread took steps (slept floors included).
        waiting: it waited for the service.
        ending: it waited for the final round, for which everybody stops.
        in_flight: a contribution was on its way, being summed, or its answer on the way back.
        merges: when answers were merged.
    """

    computing: list[Span]
    waiting: list[Span]
    ending: list[Span]
    in_flight: list[Span]
    merges: list[float]


def course_of(rounds: Sequence[dict[str, Any]]) -> Course:
    """A worker's course from its rounds; of one that died and came back, without the time in between."""
    course = Course([], [], [], [], [])
    starts = [0, *(i for i, r in enumerate(rounds) if i > 0 and r["reborn"]), len(rounds)]
    for start, end in pairwise(starts):
        life = _course_of_life(rounds[start:end])
        course.computing.extend(life.computing)
        course.waiting.extend(life.waiting)
        course.ending.extend(life.ending)
        course.in_flight.extend(life.in_flight)
        course.merges.extend(life.merges)
    return course


def _course_of_life(rounds: Sequence[dict[str, Any]]) -> Course:
    """What is no waiting is computing, from t = 0 on or its first snapshot."""
    waiting: list[Span] = [(a, b) for r in rounds for a, b in r["waits"] if r["kind"] != "final"]
    ending: list[Span] = [(a, b) for r in rounds for a, b in r["waits"] if r["kind"] == "final"]
    in_flight = [(r["snapshot_s"], r["answered_s"]) for r in rounds if r["snapshot_s"] is not None]
    merges = [r["merged_s"] for r in rounds]
    if not merges:
        return Course([], [], [], [], [])
    at = 0.0 if rounds[0]["round"] == 1 else min(merges[0], *(a for a, _ in (waiting + in_flight)[:1]))
    computing = []
    for start, end in sorted(waiting + ending):
        if start > at:
            computing.append((at, start))
        at = max(at, end)
    if merges[-1] > at:
        computing.append((at, merges[-1]))
    return Course(computing, waiting, ending, in_flight, merges)


def window_of(runs: Sequence[RunData]) -> Span:
    """The same piece of time for all runs, long enough for a few rounds of the slowest, from their middle."""
    cycles = [_cycle_s(run) for run in runs]
    length = ROUNDS_SHOWN * max(cycles, default=1.0)
    shortest = min(run.seconds for run in runs)
    start = max(0.0, 0.5 * shortest - 0.5 * length)
    return start, start + min(length, max(run.seconds for run in runs))


def _cycle_s(run: RunData) -> float:
    times = [[r["merged_s"] for r in run.own_rounds(w)] for w in run.rounds]
    gaps = [b - a for merged in times for a, b in pairwise(merged)]
    return median(gaps) if gaps else run.seconds


def _shown(names: Sequence[str]) -> list[str]:
    """At most `WORKERS_SHOWN`, evenly spread over the slots."""
    if len(names) <= WORKERS_SHOWN:
        return list(names)
    return [names[i * (len(names) - 1) // (WORKERS_SHOWN - 1)] for i in range(WORKERS_SHOWN)]


def timeline_figure(runs: Sequence[RunData]) -> Figure | None:
    """Each worker's training thread and, above it, its contributions in flight; None without any merged round.

    One panel a run, all with the same axis of time.
    """
    runs = [run for run in runs if any(run.rounds.values())]
    if not runs:
        return None
    start, end = window_of(runs)
    shown = [[w for w in _shown(list(run.rounds)) if run.rounds[w]] for run in runs]
    figure = new_figure(0.75 + sum(0.55 + 0.42 * len(names) for names in shown))
    panels = figure.subplots(
        len(runs), 1, sharex=True, squeeze=False, height_ratios=[len(names) + 0.3 for names in shown]
    )
    for run, names, axes in zip(runs, shown, panels[:, 0], strict=True):
        _draw_courses(axes, [course_of(run.rounds[w]) for w in names], (start, end))
        axes.set_yticks([-i + 0.05 for i in range(len(names))], names)
        some = f" ({len(names)} of {len(run.rounds)} workers)" if len(names) < len(run.rounds) else ""
        axes.set_title(wrapped(f"{run.label}{_waits(run)}{some}", WIDTH_IN), loc="left")
        axes.set_xlim(start, end)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    panels[-1, 0].set_xlabel(time_label([run.simulated for run in runs]))
    legend_above(figure)
    return figure


def _waits(run: RunData) -> str:
    idle = max((w.idle_fraction for w in run.workers() if w.idle_fraction is not None), default=None)
    if idle is None:
        return ""
    if idle == 0:
        return ": nobody waits"
    return f": waiting takes {'less than 0.1%' if idle < 0.001 else f'up to {idle:.1%}'} of a worker's run"


def _draw_courses(axes: Axes, courses: Sequence[Course], window: Span) -> None:
    start, end = window

    def bars(spans: Sequence[Span]) -> list[tuple[float, float]]:
        return [(max(a, start), min(b, end) - max(a, start)) for a, b in spans if b > start and a < end]

    for i, course in enumerate(courses):
        first = i == 0
        thread, network = (-i - 0.30, 0.36), (-i + 0.12, 0.17)
        axes.broken_barh(
            bars(course.computing), thread, facecolor=SKY, edgecolor="none", label="computing" if first else "_"
        )
        axes.broken_barh(
            bars(course.waiting),
            thread,
            facecolor="white",
            edgecolor=VERMILLION,
            linewidth=0.8,
            hatch="/////",
            label="waiting for the service" if first else "_",
        )
        ending = bars(course.ending)
        if ending:
            axes.broken_barh(
                ending,
                thread,
                facecolor="#eeeeee",
                edgecolor="#777777",
                linewidth=0.8,
                hatch="....",
                label="final round" if first else "_",
            )
        axes.broken_barh(
            bars(course.in_flight),
            network,
            facecolor=ORANGE,
            edgecolor=ORANGE,  # of no length at all it is still a line
            linewidth=0.6,
            label="contribution or answer in flight" if first else "_",
        )
        inside = [m for m in course.merges if start <= m <= end]
        axes.plot(
            inside,
            [-i - 0.12] * len(inside),
            linestyle="none",
            marker="|",
            markersize=11,
            markeredgewidth=1.8,
            color=BLACK,
            label="merge" if first else "_",
        )
    axes.set_ylim(-len(courses) + 0.55, 0.4)


def staleness_figure(runs: Sequence[RunData]) -> Figure | None:
    """Q, the steps from each snapshot to its merge, along each run; None without any merged round."""
    runs = [run for run in runs if any(run.own_rounds(w) for w in run.rounds)]
    if not runs:
        return None
    figure = new_figure(0.6 + 1.75 * len(runs))
    panels = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)
    for run, axes in zip(runs, panels[:, 0], strict=True):
        names = [w for w in run.rounds if run.own_rounds(w)]
        if len(names) <= LINES_SHOWN:
            for number, name in enumerate(names):
                own, look = run.own_rounds(name), style(number)
                every = max(1, min(len(names), len(own)), len(own) // 25)
                axes.plot(
                    [r["merged_s"] for r in own],
                    [r["overlap_steps"] for r in own],
                    color=look.colour,
                    marker=look.marker,
                    linestyle=look.dashes,
                    linewidth=0.8,
                    markersize=3.5,
                    markerfacecolor="white",
                    markevery=(number % every, every),
                    label=named(name),
                )
        else:
            _draw_band(axes, [run.own_rounds(w) for w in names])
        axes.set_title(wrapped(run.label, WIDTH_IN - 1), loc="left")
        axes.set_ylabel("overlap steps Q")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    top = max(r["overlap_steps"] for run in runs for w in run.rounds for r in run.own_rounds(w))
    panels[0, 0].set_ylim(-0.05 * max(1, top), 1.1 * max(1, top))
    panels[-1, 0].set_xlim(left=0)
    panels[-1, 0].set_xlabel(time_label([run.simulated for run in runs]))
    return figure


def _draw_band(axes: Axes, workers: Sequence[list[dict[str, Any]]]) -> None:
    """The median over many workers round by round, and where nine tenths of them are."""
    import numpy as np

    by_round: dict[int, list[tuple[float, int]]] = {}
    for own in workers:
        for r in own:
            by_round.setdefault(r["round"], []).append((r["merged_s"], r["overlap_steps"]))
    rows = [np.array(by_round[r]) for r in sorted(by_round)]
    times = [float(np.median(row[:, 0])) for row in rows]
    low, middle, high = ([float(np.quantile(row[:, 1], share)) for row in rows] for share in (0.05, 0.5, 0.95))
    look = style(0)
    axes.fill_between(times, low, high, color=look.colour, alpha=0.25, linewidth=0, label="5 to 95 %")
    axes.plot(times, middle, color=look.colour, label=f"median of\n{len(workers)} workers")


def traffic_figure(runs: Sequence[RunData]) -> Figure | None:
    """Payload of all workers along each run, up and down together; None without any merged round."""
    drawn = [(n, run, _payload(run)) for n, run in enumerate(runs) if any(run.rounds.values())]
    if not drawn:
        return None
    factor, unit = byte_unit(max(sent[-1] for _, _, (_, sent) in drawn))
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    for number, run, (times, sent) in drawn:
        look = style(number)
        axes.plot(
            times,
            [v / factor for v in sent],
            drawstyle="steps-post",
            color=look.colour,
            linestyle=look.dashes,
            marker=look.marker,
            markerfacecolor="white",
            markevery=max(1, len(times) // 8),
            label=named(run.label),
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(time_label([run.simulated for _, run, _ in drawn]))
    axes.set_ylabel(f"payload of all workers,\nup and down / {unit}")
    legend_above(figure)
    return figure


def _payload(run: RunData) -> tuple[list[float], list[int]]:
    """(times, bytes): the sum over the workers after each merge of any of them."""
    merges = sorted(
        (r["merged_s"], name, r["bytes_up"] + r["bytes_down"]) for name, lines in run.rounds.items() for r in lines
    )
    last: dict[str, int] = {}
    times, totals = [0.0], [0]
    for at, name, sent in merges:
        totals.append(totals[-1] + sent - last.get(name, 0))
        times.append(at)
        last[name] = sent
    return times, totals
