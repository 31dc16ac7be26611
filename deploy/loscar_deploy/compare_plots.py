"""The pictures of a comparison: loss curves of every setting, and figures against density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loscar_deploy import plots
from loscar_deploy.compare import TARGET_REACHED, VARIANTS, Row
from loscar_deploy.plots import (
    WIDTH_IN,
    Against,
    Style,
    draw_losses,
    legend_above,
    new_figure,
    style,
    time_label,
    wrapped,
)
from loscar_deploy.run_data import Curve, RunData
from loscar_deploy.timeline import timeline_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2

Done = Sequence[tuple[Row, RunData]]
"""The runs with their outcomes."""

Setting = tuple[str, str]
"""(link, density)."""


def style_of(variant: str) -> Style:
    return style(VARIANTS.index(variant))


def draw(done: Done, results: Sequence[dict[str, Any]], target_loss: float | None) -> dict[str, Figure]:
    """Every picture that the runs have the data for, by file name."""
    found: dict[str, Figure | None] = {
        "loss-seconds": loss_panels(done, "seconds", target_loss),
        "loss-steps": loss_panels(done, "steps", target_loss),
        "loss-bytes": loss_panels(done, "bytes", target_loss),
        "final-loss": figure_by_density(done, results, "loss", _final_label(done)),
    }
    links = list(dict.fromkeys(row.link for row, _ in done))
    for place, link in enumerate(links, start=1):
        found["timeline" if len(links) == 1 else f"timeline-link{place}"] = timeline_figure(_first(done, link))
    if target_loss is not None:
        label = f"{time_label([run.simulated for _, run in done])[:-4]} to test loss {target_loss:g} / s"
        found["time-to-target"] = figure_by_density(done, results, "seconds_to_target", label)
    return {name: figure for name, figure in found.items() if figure is not None}


def _final_label(done: Done) -> str:
    early = any(row.seconds_to_target is not None and row.stopped == TARGET_REACHED for row, _ in done)
    return "final test loss" + ("\n(runs end at the target)" if early else "")


def _first(done: Done, link: str) -> list[RunData]:
    """The first repetition of a link's first density, variant by variant, so that a timeline shows comparable runs."""
    row = next(row for row, _ in done if row.link == link)
    same = [d for d in done if (d[0].link, d[0].density, d[0].seed) == (row.link, row.density, row.seed)]
    what = f"density {row.density}, link {row.link}, seed {row.seed}"
    same.sort(key=lambda d: VARIANTS.index(d[0].variant))
    return [replace(run, label=f"{own.variant}, {what}") for own, run in same]


def _settings(done: Done) -> list[Setting]:
    return list(dict.fromkeys((row.link, row.density) for row, _ in done))


def _title(setting: Setting, settings: Sequence[Setting]) -> str:
    link, density = setting
    return f"density {density}" + (f", link {link}" if len({s[0] for s in settings}) > 1 else "")


def loss_panels(done: Done, against: Against, target_loss: float | None) -> Figure | None:
    """One panel for each link and density, one line for each run; None without any evaluation."""
    curves: dict[Setting, list[tuple[str | None, Curve, Style]]] = {s: [] for s in _settings(done)}
    named: set[tuple[Setting, str]] = set()
    for row, run in sorted(done, key=lambda d: VARIANTS.index(d[0].variant)):
        curve = run.curve()
        if curve is None:
            continue
        setting = (row.link, row.density)
        label = None if (setting, row.variant) in named else row.variant
        named.add((setting, row.variant))
        curves[setting].append((label, curve, style_of(row.variant)))
    settings = [s for s in curves if curves[s]]
    if not settings:
        return None
    columns = min(COLUMNS, len(settings))
    rows = -(-len(settings) // columns)
    figure = new_figure(0.5 + (3.4 if columns == 1 else 2.7) * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    simulated = [run.simulated for _, run in done]
    for axes, setting in zip(panels.flat, settings, strict=False):
        draw_losses(axes, curves[setting], against, simulated=simulated, target_loss=target_loss, faint=True)
        if len(settings) > 1:
            axes.set_title(wrapped(_title(setting, settings), WIDTH_IN / columns - 0.5), loc="left")
        if axes not in panels[:, 0]:
            axes.set_ylabel("")
    # The axis is shared: it must suit the losses of all panels, not only of the one that was drawn last.
    values = [v for s in settings for _, c, _ in curves[s] for v in c.loss]
    label = panels[0, 0].get_ylabel()
    plots.loss_axis(panels[0, 0], values + ([] if target_loss is None else [target_loss]), label)
    for axes in panels.flat[len(settings) :]:
        axes.remove()
    legend_above(figure)
    return figure


def figure_by_density(done: Done, results: Sequence[dict[str, Any]], figure_name: str, label: str) -> Figure | None:
    """One figure of all variants against density, a panel for each link; None when no run has it.

    Open markers are runs, bars their means. Where a run has none (the target was not reached, or the training
    diverged) it stands in a strip of its own on top.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    values = [getattr(row, figure_name) for row, _ in done]
    known = [v for v in values if v is not None]
    if not known:
        return None
    links = list(dict.fromkeys(row.link for row, _ in done))
    densities = list(dict.fromkeys(row.density for row, _ in done))
    figure = new_figure(0.6 + 2.6 * len(links))
    panels = figure.subplots(len(links), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for link, axes in zip(links, panels, strict=True):
        for entry in (e for e in results if e["link"] == link):
            _draw_entry(axes, entry, figure_name, densities)
        axes.set_xlim(-0.5, len(densities) - 0.5)
        axes.set_xticks(range(len(densities)), densities)
        axes.grid(False, axis="x")
        if len(links) > 1:
            axes.set_title(wrapped(f"link {link}", WIDTH_IN - 0.7), loc="left")
    if figure_name == "loss":
        plots.loss_axis(panels[0], known, label)
    else:
        panels[0].set_ylim(bottom=0)
    low, high = panels[0].get_ylim()
    missing = len(known) < len(values)
    if missing:
        # Room for the strip, in the axis's own terms; no numbers beside it.
        logarithmic = panels[0].get_yscale() == "log"
        panels[0].set_yticks([tick for tick in panels[0].get_yticks() if low <= tick <= high])
        panels[0].set_ylim(low, high * (high / low) ** 0.25 if logarithmic else high + 0.25 * (high - low))
    for link, axes in zip(links, panels, strict=True):
        axes.set_ylabel(label)
        if any(row.link == link and getattr(row, figure_name) is None for row, _ in done):
            axes.add_patch(Rectangle((0, 0.8), 1, 0.2, transform=axes.transAxes, color="#eeeeee", zorder=0.5))
            what = "diverged" if figure_name == "loss" else "not\nreached"
            axes.text(1.008, 0.9, what, transform=axes.transAxes, fontsize=8, va="center")
    panels[-1].set_xlabel("density (share of the coordinates that a round carries)")
    if len(values) > len(results):
        panels[0].add_line(Line2D([], [], color="#555555", linewidth=2.2, label="mean"))
    legend_above(figure)
    return figure


def _draw_entry(axes: Axes, entry: dict[str, Any], figure_name: str, densities: Sequence[str]) -> None:
    variant, found = entry["variant"], entry[figure_name]
    look = style_of(variant)
    place = densities.index(entry["density"]) + 0.22 * (VARIANTS.index(variant) - 1)
    known = [v for v in found["values"] if v is not None]
    label = "_" if variant in axes.get_legend_handles_labels()[1] else variant
    if len(known) > 1:
        axes.plot([place - 0.08, place + 0.08], [found["mean"]] * 2, color=look.colour, linewidth=2.2)
    axes.plot(
        # Side by side: equal ones are seen as several.
        [place + 0.1 * ((i + 0.5) / len(known) - 0.5) for i in range(len(known))],
        known,
        look.marker,
        color=look.colour,
        markerfacecolor="white",
        markersize=5,
        label=label,
    )
    missing = len(found["values"]) - len(known)
    if missing:
        strip = axes.get_xaxis_transform()
        axes.plot([place], [0.94], look.marker, transform=strip, color=look.colour, markerfacecolor="white")
        count = f"{missing} of {len(found['values'])}"
        axes.text(place, 0.85, count, transform=strip, fontsize=7.5, ha="center", va="center")
