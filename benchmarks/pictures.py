"""The pictures of the documentation, from real runs of `loscar run` on this machine.

    python benchmarks/pictures.py                  draw all of them into docs/pictures/; about three minutes
    python benchmarks/pictures.py --only timeline  one of them

`timeline.png`: what the training threads did and what was in flight, LOSCAR beside blocking, over the same slow link.
`losses.png`: the loss against time, overlapped, overwriting and blocking, at two densities over another slow link.
`selection.png`: which coordinates the rounds of one sweep at density 0.05 carry, by the function that the runs use.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import _bench

from loscar_core.selection import SelectionKind, count_for, select, sweep_length
from loscar_deploy import plots
from loscar_deploy.run_data import RunData, load_run
from loscar_deploy.timeline import timeline_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"

FOUR = ["--task", "digits", "--workers", "4", "--slowdown", "1,1,1,2", "--step-time", "10ms"]
SLOW = "w3"
BLOCKING = ["--local-steps", "25", "--overlap-steps", "0"]
"""As many steps as a fast worker takes in the overlapped runs' `--sync-interval`, 250 ms."""

TIMELINE_LINK = "rtt=400ms,rate=2mbit"
LOSSES_LINK = "rtt=200ms,rate=1mbit"
DENSITIES = ("1", "0.05")
LOSSES_S = 15
DENSITY = 0.05
SHOWN = 60


def run(folder: Path, label: str, *flags: str) -> RunData:
    """One `loscar run` into a folder, read back."""
    print(f"loscar run {' '.join(flags)}", file=sys.stderr, flush=True)
    _bench.run_summary([*FOUR, *flags], folder)
    found = load_run(folder, label)
    found.rounds = {f"{name}, half speed" if name == SLOW else name: lines for name, lines in found.rounds.items()}
    return found


def timeline(scratch: Path) -> Figure:
    common = ["--link", TIMELINE_LINK, "--density", "0.05", "--duration", "8s"]
    runs = [
        run(scratch / "overlapped", "LOSCAR", *common),
        run(scratch / "blocking", "blocking", *common, *BLOCKING),
    ]
    figure = timeline_figure(runs)
    assert figure is not None
    return figure


def losses(scratch: Path) -> Figure:
    variants = {
        "LOSCAR: overlapped, delay-corrected": [],
        "overlapped, overwriting": ["--merge", "overwrite"],
        "blocking": BLOCKING,
    }
    figure = plots.new_figure(3.2)
    panels = figure.subplots(1, len(DENSITIES), sharey=True)
    values: list[float] = []
    for axes, density in zip(panels, DENSITIES, strict=True):
        curves = []
        for number, (label, flags) in enumerate(variants.items()):
            common = ["--link", LOSSES_LINK, "--density", density, "--duration", f"{LOSSES_S}s"]
            found = run(scratch / f"{density}-{number}", label, *common, "--evaluate-every", "1", *flags)
            curve = found.curve()
            assert curve is not None
            curves.append((label, curve, plots.style(number)))
            values += curve.loss
        plots.draw_losses(axes, curves, "seconds", simulated=[False])
        axes.set_xlim(0, LOSSES_S)
        axes.set_title(f"density {density}", loc="left")
        axes.set_ylabel("")
    plots.loss_axis(panels[0], values, "test loss of the live models' average")
    plots.legend_above(figure)
    return figure


def selection(_: Path) -> Figure:
    dimension = 4810  # of the task digits
    count = count_for(DENSITY, dimension)
    rounds = sweep_length(dimension, count)
    figure = plots.new_figure(3.3)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind, colour in zip(
        panels, (SelectionKind.SWEEP, SelectionKind.RANDOM), (plots.BLUE, plots.VERMILLION), strict=True
    ):
        times = [0] * SHOWN
        for number in range(1, rounds + 1):
            for coordinate in select(kind, 0, number, dimension, count).tolist():
                if coordinate < SHOWN:
                    axes.fill_between(
                        [coordinate, coordinate + 1], number - 0.5, number + 0.5, color=colour, linewidth=0
                    )
                    times[coordinate] += 1
        never, often = sum(t == 0 for t in times), sum(t > 1 for t in times)
        told = "each once" if (never, often) == (0, 0) else f"{never} never, {often} more than once"
        axes.set_title(f"{kind.value}: of these {SHOWN}, {told}", loc="left")
        axes.set_xlim(0, SHOWN)
        axes.set_ylim(rounds + 0.5, 0.5)
        axes.set_yticks([1, 5, 10, 15, 20])
        axes.set_xlabel(f"coordinate (the first {SHOWN} of {dimension:,})")
    panels[0].set_ylabel("round")
    return figure


DRAWN = {"timeline": timeline, "losses": losses, "selection": selection}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=DRAWN, help="one of them")
    parser.add_argument("--out", metavar="DIR", type=Path, default=PICTURES, help="where to (default: docs/pictures)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="loscar-pictures-") as scratch:
                print(plots.save(draw(Path(scratch)), arguments.out / f"{name}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
