"""`loscar report`: one page about one or several runs, with everything in it, and its pictures as files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loscar_core.errors import ConfigError
from loscar_deploy import plots, timeline
from loscar_deploy.run_data import RunData, WorkerFigures
from loscar_deploy.table import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"

WORKERS_LISTED = 64

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
figure { margin: .6rem 0 1.6rem } figure img { width: 100%; height: auto }
figcaption, p.note { color: #444; font-size: .9rem; max-width: 50rem }
div.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0 }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ccc }
td { white-space: nowrap } td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7rem }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #333; vertical-align: bottom }
td.text { text-align: left; white-space: normal; min-width: 7rem } th.text { text-align: left }
@media print { body { max-width: none; margin: 0 } h2 { break-after: avoid } figure, tr { break-inside: avoid } }
"""

_PICTURES = {
    "timeline": (
        "What the workers did",
        "The lower bar of each worker is its training thread, a few rounds from the middle of the run; the upper one "
        "is its contribution or the answer to it in flight, from the snapshot until the answer could be merged. All "
        "panels have the same axis. Everybody stops for the final round; that does not count as waiting. Time in "
        "which the emulation of a slower machine sleeps counts as computing. Where the lower bar is missing, the "
        "worker was not there.",
    ),
    "loss-seconds": ("Loss against time", ""),
    "loss-steps": ("Loss against steps", ""),
    "loss-bytes": (
        "Loss against bytes",
        "Payload: the values in contributions and answers, without headers, heartbeats and catch-ups.",
    ),
    "staleness": (
        "Staleness",
        "Q, the optimizer steps that a worker took between a snapshot and the merge of its answer. Blocking runs have "
        "none.",
    ),
    "traffic": (
        "Traffic",
        "A dense final round is the step at the end.",
    ),
}

_OPTIONS = (
    *("task", "merge", "density", "coordinates", "selection", "wire_dtype", "local_steps", "sync_interval"),
    *("overlap_steps", "workers", "link", "slowdown", "step_time", "device", "batch_size", "lr", "partition", "seed"),
    *("target_loss", "rounds", "duration", "max_steps", "final_round"),
)


def write_report(runs: Sequence[RunData], folder: Path) -> dict[str, Any]:
    """Draw, and write the page and the pictures.

    Args:
        runs: what about, in the order of panels and legends.
        folder: made when it is not there; files of an earlier report are replaced.

    Returns:
        {"page", "figures": [paths], "runs": [{"label", "path", "workers": [figures], …}]}

    Raises:
        ConfigError: nothing can be drawn, the folder cannot be written, or matplotlib is missing.
    """
    plots.require_matplotlib()
    figures = draw(runs)
    if not figures:
        raise ConfigError(f"{runs[0].path} holds no rounds and no losses yet: there is nothing to draw")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: plots.save(figure, folder / f"{name}.png") for name, figure in figures.items()}
        page = folder / PAGE
        page.write_text(page_of(runs, files), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error.strerror or error}") from None
    return {"page": str(page), "figures": [str(p) for p in files.values()], "runs": [_told(run) for run in runs]}


def draw(runs: Sequence[RunData]) -> dict[str, Figure]:
    """Every picture that the runs have the data for, by file name."""
    found = {
        "timeline": timeline.timeline_figure(runs),
        "loss-seconds": plots.loss_figure(runs, "seconds"),
        "loss-steps": plots.loss_figure(runs, "steps"),
        "loss-bytes": plots.loss_figure(runs, "bytes"),
        "staleness": timeline.staleness_figure(runs),
        "traffic": timeline.traffic_figure(runs),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def page_of(runs: Sequence[RunData], pictures: dict[str, Path]) -> str:
    """The page; pictures are put into it, so that it needs no other file."""
    title = f"Report of {len(runs)} runs" if len(runs) > 1 else f"Report of the run {runs[0].label}"
    pieces = [_results_table(runs)]
    for name, (heading, caption) in _PICTURES.items():
        if name in pictures:
            pieces.append(_picture(heading, caption, pictures[name]))
    pieces.append("<h2>Workers</h2>")
    pieces.append(
        '<p class="note">Steps per round: from one merge to the next, N + Q. N: from a merge to the next snapshot. '
        "Staleness Q: from the snapshot to the merge of its answer. These are medians over the rounds without the "
        "final one. Idle: share of its run in which the training thread waited for the service. Missed: rounds that "
        "were closed without the worker's contribution. Up, down: payload.</p>"
    )
    pieces += [_workers_table(run) for run in runs]
    pieces.append("<h2>Options</h2>")
    if len(runs) > 1:
        pieces.append('<p class="note">Bold rows differ between the runs.</p>')
    pieces.append(_options_table(runs))
    body = "\n".join(pieces)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _picture(heading: str, caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{escape(heading)}" src="data:image/png;base64,{data}">'
    return f"<h2>{escape(heading)}</h2>\n<figure>{image}{text}</figure>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; the column "end" is text."""
    kinds = [' class="text"' if h == "end" else "" for h in headings]
    head = "".join(f"<th{kind}>{h}</th>" for kind, h in zip(kinds, headings, strict=True))
    lines = ["".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _results_table(runs: Sequence[RunData]) -> str:
    rows = []
    with_target = any(run.target_loss is not None for run in runs)
    for run in runs:
        told, workers = _told(run), run.workers()
        idle = [w.idle_fraction for w in workers if w.idle_fraction is not None]
        row = [
            escape(run.label),
            f"{told['seconds']:.1f} s" + (" (virtual)" if run.simulated else ""),
            _number(told["rounds"], ",d"),
            f"{sum(w.steps for w in workers):,d}",
            _number(told["loss"], ".4f"),
            _number(told["accuracy"], ".4f"),
            size(sum(w.bytes_up for w in workers)),
            size(sum(w.bytes_down for w in workers)),
            _number(max(idle, default=None), ".1%"),
            escape(told["stopped"] or "did not end in order"),
        ]
        if with_target:
            row.insert(2, _target(told))
        rows.append(row)
    headings = ["run", "run time", "rounds", "steps", "test loss", "accuracy", "up", "down", "idle&nbsp;≤", "end"]
    if with_target:
        headings.insert(2, "to the target")
    note = (
        '<p class="note">Loss and accuracy are of the saved model on the task\'s test data; steps and payload up and '
        "down are sums over the workers.</p>"
    )
    return _table(headings, rows) + note


def _target(told: dict[str, Any]) -> str:
    if told["target_loss"] is None:
        return "–"
    if told["seconds_to_target"] is None:
        return f"<b>{told['target_loss']:g} not reached</b>"
    return f"{told['seconds_to_target']:.1f} s to {told['target_loss']:g}"


def _workers_table(run: RunData) -> str:
    figures = run.workers()
    rows = [_worker_row(w) for w in figures[:WORKERS_LISTED]]
    headings = ["worker", "steps", "rounds", "steps per round", "N", "staleness Q", "largest Q"]
    headings += ["idle", "missed", "up", "down", "end"]
    more = len(figures) - WORKERS_LISTED
    note = f'<p class="note">… and {more} more workers.</p>' if more > 0 else ""
    return f"<h3>{escape(run.label)}</h3>\n" + _table(headings, rows) + note


def _worker_row(w: WorkerFigures) -> list[str]:
    return [
        escape(w.name),
        f"{w.steps:,d}",
        f"{w.rounds:,d}",
        _number(w.steps_per_round, "g"),
        _number(w.local_steps, "g"),
        _number(w.overlap_steps, "g"),
        _number(w.most_stale, "g"),
        _number(w.idle_fraction, ".1%"),
        _number(w.missed, ",d"),
        size(w.bytes_up),
        size(w.bytes_down),
        "saw the end" if w.finished else "did not see the end",
    ]


def _options_table(runs: Sequence[RunData]) -> str:
    names = [n for n in _OPTIONS if any(n in run.config for run in runs)]
    rows = []
    for name in names:
        values = [str(run.config.get(name, "–")) for run in runs]
        shown = [escape(v) for v in (f"--{name.replace('_', '-')}", *values)]
        rows.append([f"<b>{v}</b>" for v in shown] if len(set(values)) > 1 else shown)
    return _table(["", *(escape(run.label) for run in runs)], rows)


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)


def _told(run: RunData) -> dict[str, Any]:
    """A run's result as `--json` prints it."""
    summary = run.summary or {}
    reached = None if run.target_loss is None else run.reached(run.target_loss)
    return {
        "label": run.label,
        "path": str(run.path),
        "simulated": run.simulated,
        "seconds": run.seconds,
        "rounds": summary.get("rounds"),
        "loss": summary.get("loss"),
        "accuracy": summary.get("accuracy"),
        "target_loss": run.target_loss,
        "seconds_to_target": None if reached is None else reached["elapsed_s"],
        "stopped": summary.get("stopped"),
        "workers": [asdict(w) for w in run.workers()],
    }
