"""`loscar status --watch`: what the dashboard's page shows, in a terminal.

The same history as the page's is kept, of looks that are made from the server's answers; this module draws it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loscar_deploy.dashboard.history import History
from loscar_deploy.dashboard.look import look_of
from loscar_deploy.table import LINE_EVERY_S, console_for, size, status_line
from loscar_wire._generated import parameter_server_pb2 as pb

LANE_S = 60
"""A lane shows so many seconds, one character each."""
MOST_LANES = 12
MOST_ROWS = 32
MOST_EVENTS = 6
ROOMY_LINES = 40
"""A terminal with fewer shows fewer events."""
NAME_WIDTH = 20
WORDS_WIDTH = 72
"""What there is to say about a worker beside its lane."""
CURVE_WIDTH = 24

BLOCKS = "▁▂▃▄▅▆▇█"
MARKS = {"none": " ", "awaited": ".", "arriving": "+", "whole": "#", "joining": "/", "suspended": "/", "silent": "!"}
DOING = {
    "none": "not in the open round",
    "awaited": "contribution awaited",
    "arriving": "sending",
    "whole": "sent, waits for others",
    "joining": "joining",
    "suspended": "suspended",
    "silent": "silent",
}
LEGEND = "above: computing ▁…█, · waiting    below: . awaited  + sending  # sent  / joining or suspended  ! silent"
NONE = "–"


class Watch:
    """Shows status replies as they come.

    Args:
        stream: where to; plain lines where it is no terminal.
        quiet: show nothing.
    """

    def __init__(self, stream: IO[str] | None = None, *, quiet: bool = False) -> None:
        self._console = console_for(stream or sys.stdout)
        live = self._console.is_terminal and not quiet
        self._live = Live(console=self._console, auto_refresh=False) if live else None
        self._quiet = quiet
        self._history = History()
        self._last_line_s = -LINE_EVERY_S

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, reply: pb.StatusReply, *, last: bool = False) -> None:
        """A new answer of the server's; `last`: there will be no other one."""
        before = self._history.number
        now = time.monotonic()
        self._history.add(look_of(reply, now))
        if self._live is not None:
            width, height = self._console.size
            self._live.update(view(self._history.since(0), width, height), refresh=True)
        elif not self._quiet:
            for event in self._history.since(before)["events"]:
                self._say(sentence(event))
            if last or now - self._last_line_s >= LINE_EVERY_S:
                self._last_line_s = now
                self._say(status_line(reply))

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def view(state: dict[str, Any], width: int, height: int | None = None) -> RenderableType:
    """Everything, from what `History.since(0)` gives.

    Args:
        width: of the terminal, in characters.
        height: its lines, or None for as many as it takes. Where they are few, workers' lanes go first, then older
            events and the last rows: how the run is, who has gone and why is always there.
    """
    head, foot = [_headline(state)], []
    if len(state["traffic"]) > 2:
        foot.append(_traffic(state))
    events = MOST_EVENTS if height is None or height >= ROOMY_LINES else MOST_EVENTS // 2
    latest = reversed(state["events"][-events:])
    foot += [Text(f"{_span(state['now_s'] - e['at_s'])} ago: {sentence(e)}") for e in latest]
    rows, lanes = min(MOST_ROWS, len(state["workers"])), MOST_LANES
    if height is not None:
        left = height - 1 - sum(-(-len(text.plain) // width) or 1 for text in (*head, *foot))
        rows = max(0, min(rows, left - 2))
        lanes = max(0, min(lanes, (left - rows - 4) // 2))
    parts: list[RenderableType] = [*head, *_lanes(state, width, lanes)]
    if rows:
        parts.append(_table(state, width, rows))
    return Group(*parts, *foot)


def sentence(event: dict[str, Any]) -> str:
    """An event in words."""
    match event["kind"]:
        case "phase":
            detail = f": {event['detail']}" if event["detail"] else ""
            return f"the run is {event['phase']}{detail}"
        case "left":
            detail = f" ({event['detail']})" if event["detail"] else ""
            return f"{event['name']} left: {event['reason']}, {event['text']}{detail}"
        case "joined" if event["observer"]:
            return f"{event['name']} watches"
        case kind:
            return f"{event['name']} {'came back' if kind == 'returned' else 'goes on' if kind == 'resumed' else kind}"


# --- the parts ----------------------------------------------------------------------------------------------


def _headline(state: dict[str, Any]) -> Text:
    run = state["run"]
    there = [f"{count} {name}" for name, count in run["members"].items() if count]
    if run["workers_wanted"] is not None and run["elapsed_s"] < 0:
        there.append(f"of {run['workers_wanted']} that round 1 waits for")
    speed = "" if run["rounds_per_s"] is None else f" ({run['rounds_per_s']:.2g}/s)"
    pieces = [
        f"run {run['run_id'][:8]}",
        run["phase"] + (f": {run['stop_reason']}" if run["stop_reason"] else ""),
        f"epoch {run['epoch']}",
        f"round {run['round']}{speed}",
        f"{run['elapsed_s']:.1f} s" if run["elapsed_s"] >= 0 else "not started",
        ", ".join(there) or "nobody is there",
        f"{run['coordinates']:,d} of {run['dimension']:,d} coordinates a round",
    ]
    return Text(" · ".join(pieces), style="bold")


def _lanes(state: dict[str, Any], width: int, most: int) -> list[RenderableType]:
    """Two lines a worker, as on the page: what its training thread did, and what the server has of it."""
    shown = state["workers"][:most]
    if not shown:
        return []
    names = min(NAME_WIDTH, max(len(w["name"]) for w in shown))
    seconds = max(10, min(LANE_S, width - names - WORDS_WIDTH - 2))
    table = Table.grid(padding=(0, 1))
    for least in (names, seconds, 0):
        table.add_column(min_width=least, no_wrap=True)
    for w in shown:
        trace = state["traces"][w["name"]]
        losses = [point[2] for point in trace["losses"]]
        curve = f"loss {losses[0]:.4g} {_curve(losses)} {losses[-1]:.4g}" if losses else "no loss yet"
        table.add_row(Text(w["name"]), Text(_computing(trace, state["now_s"], seconds)), Text(_doing(w, trace, state)))
        table.add_row("", Text(_marks(trace, state["now_s"], seconds), style="dim"), Text(curve))
    return [table, Text(LEGEND, style="dim")]


def _computing(trace: dict[str, Any], now_s: float, seconds: int) -> str:
    """A character for each second: the share of it that was computing, as far as the worker has reported."""
    cells = [" "] * seconds
    for _, begin, end, waiting, _, _ in trace["segments"]:
        share = 1 - (waiting or 0.0)
        for i in range(max(0, int(begin - now_s) + seconds), max(0, min(seconds, int(end - now_s) + seconds))):
            cells[i] = BLOCKS[round(share * (len(BLOCKS) - 1))] if share > 0 else "·"
    return "".join(cells)


def _marks(trace: dict[str, Any], now_s: float, seconds: int) -> str:
    """A character for each second: what the server had of the contribution to the open round."""
    cells = [" "] * seconds
    for _, at, code in trace["marks"]:
        i = seconds - 1 - int(now_s - at)
        if 0 <= i < seconds:
            cells[i] = MARKS[code]
    return "".join(cells)


def _doing(worker: dict[str, Any], trace: dict[str, Any], state: dict[str, Any]) -> str:
    words = []
    if trace["segments"] and worker["exchange"] != "silent":
        waiting = trace["segments"][-1][3] or 0.0
        merged = sum(s[5] for s in trace["segments"] if s[2] > state["now_s"] - LANE_S)
        words = [f"computing {1 - waiting:.0%}, waiting {waiting:.0%}", f"{merged} merged in 1 min"]
    silent = worker["exchange"] == "silent"
    return " · ".join([*words, f"silent for {_span(worker['heard_ago_s'])}" if silent else DOING[worker["exchange"]]])


_COLUMNS: tuple[tuple[str, int], ...] = (
    ("state", 0),
    ("steps", 0),
    ("loss", 0),
    ("waiting", 0),
    ("behind", 0),
    ("N+Q", 0),
    ("rtt", 0),
    ("cycle", 2),
    ("deadline", 3),
    ("contributed", 4),
    ("missed", 0),
    ("up", 0),
    ("down", 1),
    ("heard", 2),
)
"""Of the table: the heading, and how soon it goes when there is no room; 0 stays."""
_COLUMN_WIDTH = 10


def _table(state: dict[str, Any], width: int, rows: int) -> Table:
    room = max(0, (width - NAME_WIDTH) // _COLUMN_WIDTH)
    kept = [heading for heading, _ in _COLUMNS]
    for heading, rank in sorted(_COLUMNS, key=lambda c: -c[1]):
        if len(kept) > room and rank:
            kept.remove(heading)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("worker", max_width=NAME_WIDTH, no_wrap=True)
    for heading in kept:
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    for w in state["workers"][:rows]:
        cells = _cells(w)
        table.add_row(Text(w["name"]), *(cells[heading] for heading in kept))
    more = len(state["workers"]) - rows + state["hidden"]
    if more > 0:
        table.caption = f"{more} more members are not shown one by one"
    return table


def _cells(w: dict[str, Any]) -> dict[str, str]:
    return {
        "state": "silent" if w["exchange"] == "silent" else w["state"],
        "steps": f"{w['steps']:,d}",
        "loss": NONE if w["loss"] is None else f"{w['loss']:.4f}",
        "waiting": NONE if w["idle_share"] is None else f"{w['idle_share']:.1%}",
        "behind": NONE if w["behind"] is None else f"≤ {w['behind']}" if w["behind"] else "0",
        "N+Q": f"{w['local_steps']}+{w['overlap_steps']}",
        "rtt": NONE if w["round_trip_s"] is None else _span(w["round_trip_s"]),
        "cycle": _span(w["cycle_s"]) if w["cycle_s"] else NONE,
        "deadline": _span(w["deadline_s"]),
        "contributed": f"{w['contributed']:,d}",
        "missed": f"{w['missed']:,d}",
        "up": size(w["bytes_up"]),
        "down": size(w["bytes_down"]),
        "heard": f"{_span(w['heard_ago_s'])} ago",
    }


def _traffic(state: dict[str, Any]) -> Text:
    run, points = state["run"], state["traffic"]
    pieces = []
    for column, way, total, speed in (
        (2, "from workers", "bytes_in", "bytes_in_per_s"),
        (3, "to workers", "bytes_out", "bytes_out_per_s"),
    ):
        rates = [(b[column] - a[column]) / max(0.1, b[1] - a[1]) for a, b in pairwise(points)]
        now = 0.0 if run[speed] is None else run[speed]
        pieces.append(f"{way} {_curve(rates, 0.0)} {size(now)}/s, {size(run[total])} in all")
    return Text("traffic " + " · ".join(pieces))


def _curve(values: Sequence[float], bottom: float | None = None) -> str:
    """Values as blocks, the last ones of each part of it.

    Args:
        bottom: the lowest block's value; None takes the smallest.
    """
    count = min(CURVE_WIDTH, len(values))
    picked = [values[(i + 1) * len(values) // count - 1] for i in range(count)]
    low = min(picked) if bottom is None else bottom
    high = max(picked)
    if high <= low:
        return BLOCKS[0] * count
    return "".join(BLOCKS[round((v - low) / (high - low) * (len(BLOCKS) - 1))] for v in picked)


def _span(seconds: float) -> str:
    """A duration for people."""
    if seconds < 1:
        return f"{seconds * 1000:.2g} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
