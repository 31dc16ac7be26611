"""What a comparison shows: a line for each run as it is done, and a table for each link and density at the end."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.status import Status
from rich.table import Table

from loscar_deploy.compare import DIVERGED, Case, Row
from loscar_deploy.plots import byte_unit
from loscar_deploy.table import console_for

NOT_REACHED = "not reached"


class Progress:
    """Says which run is going on, on a terminal, and how each one ended.

    Args:
        cases: all runs, in their order.
        stream: where to.
    """

    def __init__(self, cases: Sequence[Case], stream: IO[str]) -> None:
        self._cases = cases
        self._console = console_for(stream)
        self._status: Status | None = None
        self._done = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status = self._console.status(self._going())
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def done(self, row: Row, target_loss: float | None) -> None:
        self._done += 1
        self.say(f"{self._done:>3}/{len(self._cases)}  {describe(row, target_loss)}")
        if self._status is not None and self._done < len(self._cases):
            self._status.update(self._going())

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _going(self) -> str:
        case = self._cases[self._done]
        return f"run {self._done + 1} of {len(self._cases)}: {case.name}"


def describe(row: Row, target_loss: float | None) -> str:
    """One run in one line."""
    pieces = [f"{row.variant:<10}  density {row.density}  link {row.link}  seed {row.seed}:"]
    if target_loss is not None:
        reached = row.seconds_to_target
        pieces.append(f"target {NOT_REACHED}," if reached is None else f"target at {reached:.2f} s,")
    pieces.append(DIVERGED if row.loss is None else f"loss {row.loss:.4f} after {row.seconds:.1f} s")
    if row.idle_max is not None:
        pieces.append(f"(idle ≤ {row.idle_max:.1%})")
    if row.lost:
        pieces.append(f"[{row.lost} workers lost]")
    return " ".join(pieces)


def print_tables(console: Console, results: Sequence[dict[str, Any]], target_loss: float | None) -> None:
    """One table for each link and density."""
    settings = list(dict.fromkeys((r["link"], r["density"]) for r in results))
    for link, density in settings:
        own = [r for r in results if (r["link"], r["density"]) == (link, density)]
        console.print(_table(f"density {density} · link {link} · {own[0]['runs']} × each", own, target_loss))


def _table(title: str, entries: Sequence[dict[str, Any]], target_loss: float | None) -> Table:
    factor, unit = byte_unit(max(e["bytes"]["most"] for e in entries))
    columns: list[tuple[str, str, float, str, str]] = [
        ("final loss", "loss", 1, ".4f", "diverged"),
        ("accuracy / %", "accuracy", 0.01, ".2f", "diverged"),
        (f"traffic / {unit}", "bytes", factor, ".1f", "–"),
        ("idle ≤ / %", "idle_max", 0.01, ".1f", "–"),
    ]
    if target_loss is None:
        columns.insert(1, ("× overlapped", "loss_ratio", 1, ".2f", "–"))
    else:
        columns = [
            (f"s to {target_loss:g}", "seconds_to_target", 1, ".2f", NOT_REACHED),
            ("steps to it", "steps_to_target", 1, ".0f", NOT_REACHED),
            ("× blocking", "time_ratio", 1, ".2f", "–"),
            *columns,
        ]
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    for heading, *_ in columns:
        table.add_column(heading, justify="right")
    for entry in entries:
        cells = [_outcome(entry[figure], unit, how, missing) for _, figure, unit, how, missing in columns]
        table.add_row(entry["variant"], *cells)
    return table


def _outcome(found: dict[str, Any] | None, unit: float, how: str, missing: str) -> str:
    """Mean ± deviation; what is missing of the repetitions is said."""
    if found is None or found["mean"] is None:
        return missing
    text = format(found["mean"] / unit, how)
    known, count = sum(v is not None for v in found["values"]), len(found["values"])
    if known > 1:
        text += f" ± {format(found['deviation'] / unit, how)}"
    if known == count:
        return text
    # In lines of its own: on one the table would be too wide for a pipe's 120 columns.
    return f"{text}\n{'none' if missing == '–' else missing}\nin {count - known} of {count}"
