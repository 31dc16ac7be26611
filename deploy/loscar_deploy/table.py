"""What a run shows while it goes on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loscar_wire._generated import parameter_server_pb2 as pb

LINE_EVERY_S = 5.0
PIPE_WIDTH = 120


def size(count: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # as it came: rich would end the process here and now, with a status of its own


def console_for(stream: IO[str]) -> Console:
    """A console on a stream; what is no terminal has no width, so the tables get what they need."""
    return _Console(file=stream) if stream.isatty() else _Console(file=stream, width=PIPE_WIDTH)


def idle_share(member: pb.MemberStatus) -> float:
    return member.report.idle_s / member.report.run_s if member.report.run_s > 0 else 0.0


def status_table(reply: pb.StatusReply) -> Table:
    """One row a member."""
    elapsed = f"{reply.elapsed_s:.1f} s" if reply.elapsed_s >= 0 else "not started"
    run = reply.run_id.hex()[:8]
    title = f"run {run} · {reply.phase} · round {reply.round} · epoch {reply.epoch} · {elapsed}"
    table = Table(title=title, title_justify="left")
    table.add_column("worker")
    table.add_column("state")
    for heading in ("steps", "N+Q", "merged", "missed", "loss", "idle", "rtt", "up", "down", "heard"):
        table.add_column(heading, justify="right")
    for m in reply.members:
        table.add_row(
            Text(m.name),
            "observer" if m.observer else m.state,
            f"{m.report.steps}",
            f"{m.local_steps}+{m.overlap_steps}",
            f"{m.merged_round}",
            f"{m.missed}",
            f"{m.report.loss:.4f}" if m.report.HasField("loss") else "–",
            f"{idle_share(m):.1%}",
            f"{m.report.round_trip_s * 1000:.3g} ms" if m.report.HasField("round_trip_s") else "–",
            size(m.report.bytes_up),
            size(m.report.bytes_down),
            f"{m.heard_ago_s:.1f} s ago",
        )
    return table


def status_line(reply: pb.StatusReply) -> str:
    """The same in one line."""
    if reply.elapsed_s < 0:
        return "starting the workers" if not reply.members else f"{reply.phase}: {len(reply.members)} workers are there"
    losses = [m.report.loss for m in reply.members if m.report.HasField("loss")]
    loss = f"{sum(losses) / len(losses):.4f}" if losses else "–"
    steps = "/".join(str(m.report.steps) for m in reply.members)
    idle = max((idle_share(m) for m in reply.members), default=0.0)
    up = sum(m.report.bytes_up for m in reply.members)
    down = sum(m.report.bytes_down for m in reply.members)
    return (
        f"{reply.elapsed_s:6.1f} s  round {reply.round}  loss {loss}  steps {steps}  "
        f"idle ≤ {idle:.1%}  up {size(up)}  down {size(down)}"
    )


class Progress:
    """Shows status replies as they come.

    Args:
        stream: where to.
        quiet: show nothing.
    """

    def __init__(self, stream: IO[str] | None = None, *, quiet: bool = False) -> None:
        self._console = console_for(stream or sys.stdout)
        self._live = self._console.is_terminal and not quiet
        self._quiet = quiet
        self._display: Live | None = None
        self._last_line_s = 0.0
        self._last_line = ""

    def __enter__(self) -> Self:
        if self._live:
            self._display = Live(console=self._console, refresh_per_second=4, transient=False)
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def show(self, reply: pb.StatusReply, *, last: bool = False) -> None:
        """A new status; plain lines only every few seconds."""
        if self._display is not None:
            self._display.update(status_table(reply))
        elif not self._quiet and (last or time.monotonic() - self._last_line_s >= LINE_EVERY_S):
            line = status_line(reply)
            if reply.elapsed_s < 0 and line == self._last_line:
                return  # still waiting for the same ones
            self._last_line_s, self._last_line = time.monotonic(), line
            self.say(line)

    def say(self, text: str) -> None:
        """A line beside the table."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
