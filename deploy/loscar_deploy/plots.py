"""What all pictures share: the drawing library, colours and styles, axes with units, saving; and the loss curves.

Every line has a colour, a dash pattern and a marker of its own, so that it can be told apart in grey print and by the
colour-blind; the colours are those of Okabe and Ito. Figures are made without pyplot: no window, no global state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loscar_core.errors import ConfigError
from loscar_deploy.run_data import Curve, RunData

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 7.6
DPI = 150

BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
    "#000000",
)

Against = Literal["seconds", "steps", "bytes"]
"""What a loss is drawn against."""


@dataclass(frozen=True, slots=True)
class Style:
    """How one series is drawn everywhere."""

    colour: str
    dashes: str | tuple[float, tuple[float, ...]]
    marker: str


STYLES = (
    Style(BLUE, "-", "o"),
    Style(VERMILLION, "--", "s"),
    Style(GREEN, "-.", "^"),
    Style(ORANGE, ":", "D"),
    Style(PURPLE, (0, (5, 1, 1, 1, 1, 1)), "v"),
    Style(BLACK, (0, (1, 1)), "x"),
    Style(SKY, (0, (8, 2)), "P"),
)


def style(number: int) -> Style:
    return STYLES[number % len(STYLES)]


def require_matplotlib() -> None:
    """Raises ConfigError saying what to install."""
    if find_spec("matplotlib") is None:
        raise ConfigError("this command needs matplotlib: pip install 'loscar[plots]'")


def new_figure(height_in: float) -> Figure:
    """An empty figure as wide as a page; what is put on it makes room for itself."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "hatch.linewidth": 0.6,
            "lines.linewidth": 1.5,
            "lines.markersize": 4.5,
            "legend.frameon": False,
            "font.family": "DejaVu Sans",
            "text.parse_math": False,
        }
    )
    return Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG; returns its path."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def legend_above(figure: Figure) -> None:
    """One legend of all axes over the whole figure, where it covers nothing, in as many columns as there is room for.

    A series may be missing in the first axes and be there in others: each label is taken from where it comes first.
    """
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    labels = [shortened(label, 80) for label in found]
    widths = [0.065 * len(label) + 0.75 for label in labels]
    columns = min(len(labels), 5)
    while columns > 1:
        height = -(-len(labels) // columns)
        if sum(max(widths[i : i + height]) for i in range(0, len(labels), height)) <= WIDTH_IN:
            break
        columns -= 1
    figure.legend(list(found.values()), labels, loc="outside upper left", ncols=columns, fontsize=8.5, handlelength=3.4)


def named(label: str) -> str:
    """A label that a legend shows: the drawing library leaves out those with a leading underscore."""
    return f" {label}" if label.startswith("_") else label


def shortened(text: str, most: int) -> str:
    """At most so many characters, without the middle of a longer text."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[len(text) - most // 2 :]}"


def wrapped(text: str, width_in: float) -> str:
    """In lines that fit into a width; a link's description has no spaces, so they break after other marks too."""
    most, lines = int(width_in / 0.068), [""]
    for piece in re.findall(rf"[^ ,;/_-]{{0,{most}}}[ ,;/_-]+|[^ ,;/_-]{{1,{most}}}", text):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > most:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def byte_unit(largest: float) -> tuple[float, str]:
    """(bytes in the unit, its name) that suits an axis up to `largest` bytes."""
    for factor, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= factor:
            return factor, name
    return 1.0, "bytes"


def loss_axis(axes: Axes, values: Sequence[float], label: str) -> None:
    """A logarithmic axis where the values span enough for one, with plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [v for v in values if v > 0]
    axes.set_ylabel(label)
    if not positive or len(positive) < len(values) or max(positive) < 2 * min(positive):
        return
    axes.set_yscale("log")
    few = max(positive) < 1000 * min(positive)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if few else (1,), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def time_label(simulated: Sequence[bool]) -> str:
    if all(simulated):
        return "virtual run time / s"
    return "run time / s (simulated runs: virtual)" if any(simulated) else "run time / s"


def _across(curve: Curve, against: Against, factor: float) -> list[float]:
    values: list[float] = getattr(curve, against)
    return [v / factor for v in values]


def draw_losses(
    axes: Axes,
    curves: Sequence[tuple[str | None, Curve, Style]],
    against: Against,
    *,
    simulated: Sequence[bool],
    target_loss: float | None = None,
    faint: bool = False,
) -> None:
    """Loss curves on some axes.

    Args:
        axes: where.
        curves: (label, or None for no entry in the legend; curve; style).
        against: the horizontal axis.
        simulated: for each curve, whether its times are virtual.
        target_loss: drawn as a line across, or None.
        faint: thinner, for several repetitions of the same.
    """
    largest = max((c.bytes[-1] for _, c, _ in curves), default=0.0)
    factor, unit = byte_unit(largest) if against == "bytes" else (1.0, "")
    looks = list(dict.fromkeys(look for _, _, look in curves))
    for label, curve, look in curves:
        count = len(curve.loss)
        every = max(min(len(looks), count), math.ceil(count / 9))
        axes.plot(
            _across(curve, against, factor),
            curve.loss,
            color=look.colour,
            linestyle=look.dashes,
            marker=look.marker,
            # Not all on the same points: of curves that coincide each one is seen.
            markevery=(looks.index(look) % every, every),
            linewidth=1.0 if faint else 1.5,
            markersize=3.5 if faint else 4.5,
            markerfacecolor="white",
            label="_" if label is None else named(label),
        )
    values = [v for _, c, _ in curves for v in c.loss]
    if target_loss is not None:
        axes.axhline(
            target_loss, color="#555555", linewidth=0.9, linestyle=(0, (2, 2)), label=f"target {target_loss:g}"
        )
        values.append(target_loss)
    kinds = {c.what for _, c, _ in curves}
    loss_axis(axes, values, kinds.pop() if len(kinds) == 1 else "loss")
    axes.set_xlim(left=0)
    axes.set_xlabel(
        {
            "seconds": time_label(simulated),
            "steps": "optimizer steps (mean over workers)",
            "bytes": f"payload of all workers, up and down / {unit}",
        }[against]
    )


def loss_figure(runs: Sequence[RunData], against: Against) -> Figure | None:
    """The runs' losses in one picture; None when no run says how its loss fell."""
    drawn = [(number, run, curve) for number, run in enumerate(runs) if (curve := run.curve()) is not None]
    if not drawn:
        return None
    mixed = len({curve.what for _, _, curve in drawn}) > 1
    curves = [(f"{run.label}: {c.what}" if mixed else run.label, c, style(n)) for n, run, c in drawn]
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    targets = {run.target_loss for _, run, _ in drawn} - {None}
    draw_losses(
        axes,
        curves,
        against,
        simulated=[run.simulated for _, run, _ in drawn],
        target_loss=targets.pop() if len(targets) == 1 else None,
    )
    legend_above(figure)
    return figure
