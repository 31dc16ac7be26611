"""What the page shows of the past: looks go in, JSON comes out, and memory is bounded whatever the run does.

Every point, segment and event carries the number of the look that it came with, so that a browser asks only for what
is new. Times are seconds since the first look; those of joins and departures may be negative.
"""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from loscar_core.messages import Reason, WorkerReport
from loscar_deploy.dashboard.look import MOST_MEMBERS, Look, MemberLook

FORMAT = 1
LANE_LOOKS = 180
"""The lanes show so many looks back, one a second."""
MOST_POINTS = 400
MOST_EVENTS = 200
MOST_TRACES = 2 * MOST_MEMBERS
"""Workers whose past is kept, those that have gone included."""
RATE_LOOKS = 15
"""Rates are means over so many looks."""

REASONS = {
    Reason.FINISHED: "the run is over",
    Reason.LEFT: "it said goodbye",
    Reason.SUPERSEDED: "a newer process of the same name joined",
    Reason.LEASE_EXPIRED: "nothing was heard of it for the length of a lease",
    Reason.STREAM_CLOSED: "the connection broke, or the process died; it may come back",
    Reason.REFUSED: "it broke a rule",
    Reason.DIVERGED: "its copy of the state went astray twice in a row",
    Reason.FAILED: "it reported an error of its own",
    Reason.SERVER_STOPPED: "the server is shutting down",
    Reason.STEPPED_DOWN: "the run goes on elsewhere: this server stepped down",
    Reason.CUT_OFF: "most of the others were lost, so it was sent to the other addresses",
}
"""Why a member went, for people."""

Point = list[Any]
"""Its first value is the number of the look."""


class Thinned:
    """Points of a whole run, fewer and fewer per second as it goes on: `MOST_POINTS` at most, equally spaced."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._stride = 1
        self._count = 0

    def add(self, point: Point) -> None:
        if self._count % self._stride == 0:
            self.points.append(point)
            if len(self.points) > MOST_POINTS:
                del self.points[1::2]
                self._stride *= 2
        self._count += 1


@dataclass(slots=True)
class _Trace:
    """What is kept of one worker.

    Attributes:
        peer: of its present stream, or None when it has gone.
        report, merged_round, reported_s: of the last report that was new, and when it was seen.
        behind: committed rounds that it had not merged when that was seen; None before the first report.
        losses: [look, run time in s, loss, steps].
        segments: [look, from s, to s, waiting share, steps, rounds merged]: between two reports.
        marks: [look, time in s, code]: what the server has of its contribution, see `_mark`.
    """

    peer: int | None = None
    state: str = ""
    report: WorkerReport = field(default_factory=WorkerReport)
    merged_round: int = 0
    reported_s: float = 0.0
    behind: int | None = None
    losses: Thinned = field(default_factory=Thinned)
    segments: deque[Point] = field(default_factory=lambda: deque(maxlen=LANE_LOOKS))
    marks: deque[Point] = field(default_factory=lambda: deque(maxlen=LANE_LOOKS))


class History:
    """Belongs to whoever holds its lock: `add` and `since` may come from different threads, not at once.

    Args:
        clock: seconds since 1970, for events.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.instance = os.urandom(8).hex()
        self.number = 0
        """Of the last look."""
        self._clock = clock
        self._look: Look | None = None
        self._began_s = 0.0
        self._traffic = Thinned()
        self._recent: deque[tuple[float, int, int, int]] = deque(maxlen=RATE_LOOKS + 1)
        self._traces: dict[str, _Trace] = {}  # who went longest ago comes first
        self._events: deque[tuple[int, dict[str, Any]]] = deque(maxlen=MOST_EVENTS)
        self._departed = 0

    # --- in -------------------------------------------------------------------------------------------------

    def add(self, look: Look) -> None:
        """Take a look in, the newest one."""
        if self._look is None:
            self._began_s = look.at_s
        before = "" if self._look is None else self._look.phase
        self.number += 1
        self._note_departures(look)
        for m in look.members:
            self._note_member(m, look)
        if look.phase != before:
            self._event(look.at_s, look, kind="phase", phase=look.phase, detail=look.stop_reason)
        self._traffic.add([self.number, self._at(look.at_s), look.bytes_in, look.bytes_out])
        self._recent.append((look.at_s, look.round, look.bytes_in, look.bytes_out))
        self._look = look
        self._forget()

    def _at(self, moment_s: float) -> float:
        return round(moment_s - self._began_s, 3)

    def _event(self, moment_s: float, look: Look, **values: Any) -> None:
        event = {
            "at_s": self._at(moment_s),
            "time": round(self._clock() - (look.at_s - moment_s), 3),
            "round": look.round,
            **values,
        }
        self._events.append((self.number, event))

    def _note_departures(self, look: Look) -> None:
        new = min(look.departed - self._departed, len(look.departures))
        self._departed = look.departed
        for d in look.departures[len(look.departures) - new :]:
            text = REASONS[d.reason]
            self._event(
                d.at_s, look, kind="left", name=d.name, slot=d.slot, reason=d.reason.value, text=text, detail=d.detail
            )
        present = {m.name: m.peer for m in look.members}
        for name in [n for n, t in self._traces.items() if t.peer is not None and present.get(n) != t.peer]:
            trace = self._traces.pop(name)
            trace.peer = None
            self._traces[name] = trace

    def _note_member(self, m: MemberLook, look: Look) -> None:
        trace = self._traces.get(m.name)
        if trace is None or trace.peer is None:
            kind = "joined" if trace is None else "returned"
            self._event(m.joined_s, look, kind=kind, name=m.name, slot=m.slot, observer=m.observer)
            trace = self._traces.setdefault(m.name, _Trace())
            trace.peer, trace.state, trace.report, trace.behind = m.peer, m.state, WorkerReport(), None
        elif trace.state != m.state and "suspended" in (trace.state, m.state):
            self._event(look.at_s, look, kind="suspended" if m.state == "suspended" else "resumed", name=m.name)
        trace.state = m.state
        if m.report.run_s != trace.report.run_s:
            self._note_report(trace, m, look)
        trace.marks.append([self.number, self._at(look.at_s), _mark(m, look)])

    def _note_report(self, trace: _Trace, m: MemberLook, look: Look) -> None:
        old, new, now = trace.report, m.report, self._at(look.at_s)
        run_s = new.run_s - old.run_s
        if old.run_s > 0 and run_s > 0:
            waiting = min(1.0, max(0.0, (new.idle_s - old.idle_s) / run_s))
            steps, merged = max(0, new.steps - old.steps), max(0, m.merged_round - trace.merged_round)
            trace.segments.append([self.number, trace.reported_s, now, _number(waiting, 4), steps, merged])
        trace.report, trace.merged_round, trace.reported_s = new, m.merged_round, now
        trace.behind = max(0, look.round - m.merged_round)
        if new.loss is not None and math.isfinite(new.loss):
            trace.losses.add([self.number, round(max(0.0, look.elapsed_s), 2), _number(new.loss, 6), new.steps])

    def _forget(self) -> None:
        """The past of workers that are gone, when there are too many of them."""
        gone = [name for name, trace in self._traces.items() if trace.peer is None]
        for name in gone[: max(0, len(self._traces) - MOST_TRACES)]:
            del self._traces[name]

    # --- out ------------------------------------------------------------------------------------------------

    def since(self, number: int) -> dict[str, Any]:
        """What the page needs that saw look `number` last, 0 for none: the present, and what is new of the past."""
        if number > self.number:  # it saw another process
            number = 0
        look = self._look
        found: dict[str, Any] = {"format": FORMAT, "instance": self.instance, "look": self.number}
        if look is None:
            return found
        return {
            **found,
            "now_s": self._at(look.at_s),
            "window_s": LANE_LOOKS,
            "run": self._run(look),
            "workers": [{**_worker(m, look), "behind": self._traces[m.name].behind} for m in look.members],
            "hidden": look.hidden,
            "traces": {
                name: {
                    "present": trace.peer is not None,
                    "losses": _after(trace.losses.points, number),
                    "segments": _after(trace.segments, number),
                    "marks": _after(trace.marks, number),
                }
                for name, trace in self._traces.items()
            },
            "traffic": _after(self._traffic.points, number),
            "events": [event for at, event in self._events if at > number],
        }

    def _run(self, look: Look) -> dict[str, Any]:
        return {
            "run_id": look.run_id,
            "phase": look.phase,
            "epoch": look.epoch,
            "round": look.round,
            "elapsed_s": round(look.elapsed_s, 2),
            "stop_reason": look.stop_reason,
            "dimension": look.dimension,
            "coordinates": look.coordinates,
            "method": look.method,
            "workers_wanted": look.workers_wanted,
            "heartbeat_s": look.heartbeat_s,
            "members": look.counts,
            "bytes_in": look.bytes_in,
            "bytes_out": look.bytes_out,
            **self._rates(),
        }

    def _rates(self) -> dict[str, float | None]:
        first, last = self._recent[0], self._recent[-1]
        seconds = last[0] - first[0]
        names = ("rounds_per_s", "bytes_in_per_s", "bytes_out_per_s")
        if seconds <= 0:
            return dict.fromkeys(names)
        return {name: round((last[i] - first[i]) / seconds, 3) for i, name in enumerate(names, 1)}


def _after(points: Sequence[Point], number: int) -> list[Point]:
    """Those that came with later looks."""
    found = list(points)
    return found[bisect_right(found, number, key=itemgetter(0)) :]


def _number(value: float, digits: int) -> float | None:
    """For JSON, which knows no infinities: what a worker says may be anything."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _mark(m: MemberLook, look: Look) -> str:
    """joining, suspended, silent (three heartbeats are missing), or what is here of its contribution."""
    if look.at_s - m.heard_s > 3 * look.heartbeat_s:
        return "silent"
    return m.state if m.state in ("joining", "suspended") else m.exchange.value


def _worker(m: MemberLook, look: Look) -> dict[str, Any]:
    report = m.report
    idle = report.idle_s / report.run_s if report.run_s > 0 else 0.0
    return {
        "name": m.name,
        "slot": m.slot,
        "state": "observer" if m.observer else m.state,
        "exchange": _mark(m, look),
        "heard_ago_s": round(max(0.0, look.at_s - m.heard_s), 2),
        "merged_round": m.merged_round,
        "contributed": m.contributed,
        "missed": m.missed,
        "deadline_s": round(m.deadline_s, 2),
        "cycle_s": round(m.cycle_s, 4),
        "local_steps": m.local_steps,
        "overlap_steps": m.overlap_steps,
        "steps": report.steps,
        "loss": None if report.loss is None else _number(report.loss, 6),
        "idle_share": _number(idle, 4),
        "round_trip_s": None if report.round_trip_s is None else _number(report.round_trip_s, 4),
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
    }
