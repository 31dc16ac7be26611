"""Convergence for each byte: every value type and every selection, on digits and on CIFAR-10, at equal rounds.

Simulated runs (the real state machines and real gradients under a virtual clock) of four workers with unequal shares of
the classes (dirichlet:0.3), a round every two steps (N = Q = 1), density 0.05 or everything. digits is the built-in
task; for CIFAR-10 a convolutional network of 0.11 M parameters stands in for the task's ResNet, of which a step takes
many times as long, and the first 2,000 test images. Verdict: int8 is no less accurate than float32 at equal rounds,
that is, its mean over the seeds is not below the worst seed of float32. The bytes are the payload that one worker
sends, indices included. Draws `docs/pictures/convergence_TASK.png`.

    python benchmarks/convergence.py                        digits, three seeds: two minutes on one core
    python benchmarks/convergence.py --task cifar10 --seeds 0,1 --data-dir DIR      ten minutes
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import _bench
import _claims
from torch import nn

from loscar_core.config import RunConfig
from loscar_core.errors import ConfigError
from loscar_core.selection import SelectionKind
from loscar_deploy import plots
from loscar_worker.tasks import Task
from loscar_worker.tasks.base import ArrayDataset
from loscar_worker.tasks.cifar10 import Cifar10

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
WORKERS, LOCAL, OVERLAP, BATCH, DENSITY, PARTITION = 4, 1, 1, 32, 0.05, "dirichlet:0.3"
POINTS = 25
TEST_IMAGES = 2000
LEGEND = 0.75
"""Height of the room below the curves, in heights of the curves."""
# (selection, value type), in two groups that share a picture: what a value is, and which are sent.
TYPES = [("sweep", dtype) for dtype in ("float32", "bfloat16", "float16", "int8")] + [("all", "int8")]
KINDS = [(selection, "float32") for selection in ("all", "random", "block", "topk")]
CASES = list(dict.fromkeys([("all", "float32"), ("all", "int8"), *TYPES, *KINDS]))
# rounds, and the test loss whose bytes are compared
SETTINGS = {"digits": (400, 0.3), "cifar10": (300, 1.7)}


class SmallCifar10(Cifar10):
    """CIFAR-10 with a network that one core trains in minutes."""

    def build_model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 80), nn.ReLU(), nn.Linear(80, 10))


def task_of(name: str, data_dir: Path | None) -> Task:
    if name == "digits":
        task = _claims.load_task(name, data_dir)
    else:
        task = SmallCifar10(data_dir, lr=0.02)
        test = task.test
        task.test = ArrayDataset(test.inputs[:TEST_IMAGES], test.targets[:TEST_IMAGES], test.transform)
    task.configure(batch_size=BATCH)
    return task


def offered(selection: str) -> bool:
    """Whether a run may have this selection."""
    try:
        RunConfig(selection=SelectionKind(selection))
    except ConfigError:
        return False
    return True


def measure(task: Task, selection: str, value_type: str, seed: int, rounds: int) -> dict[str, Any]:
    outcome = _claims.simulate(
        task,
        workers=WORKERS,
        rounds=rounds,
        density=DENSITY,
        selection=selection,
        value_type=value_type,
        local_steps=LOCAL,
        overlap_steps=OVERLAP,
        seed=seed,
        partition=PARTITION,
        train_loss=False,
        evaluate_every=max(1, rounds // POINTS),
    )
    bytes_up = outcome.result.bytes_up[0]
    return {
        "selection": selection,
        "value_type": value_type,
        "seed": seed,
        "accuracy": outcome.accuracy,
        "loss": outcome.loss,
        "bytes_up": bytes_up,
        # Rounds are equally large, but for a sweep's and topk's few bytes more or less.
        "curve": [[round(bytes_up * e.round / rounds), round(e.loss, 5)] for e in outcome.result.evaluations],
    }


def kept(path: Path, rounds: int) -> list[dict[str, Any]]:
    """The runs of an earlier result of as many rounds."""
    if not path.exists():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    return list(result["runs"]) if result["rounds"] == rounds else []


def bytes_to(run: dict[str, Any], target: float) -> float | None:
    """Payload bytes when the loss was first at or below the target, between evaluations on a straight line."""
    before = None
    for sent, loss in run["curve"]:
        if loss <= target:
            if before is None:
                return float(sent)
            share = (before[1] - target) / (before[1] - loss)
            return float(before[0] + share * (sent - before[0]))
        before = sent, loss
    return None


def late_loss(run: dict[str, Any]) -> float:
    """The mean test loss over the last quarter of a run, in which single evaluations' noise averages out."""
    losses = [loss for _, loss in run["curve"]]
    return statistics.fmean(losses[-(-3 * len(losses) // 4) :])


def draw(name: str, runs: list[dict[str, Any]], target: float) -> Path:
    """Loss over payload, the mean over the seeds."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = plots.new_figure(3.8)
    panels = figure.subplots(1, 2, sharey=True)
    values: list[float] = []
    shared = [("all", "float32"), ("sweep", "float32")]
    groups = {
        "value types": [*shared, *(case for case in TYPES if case not in shared)],
        "selections, all with float32": [*shared, *(case for case in KINDS if case not in shared)],
    }
    for axes, (title, group) in zip(panels, groups.items(), strict=True):
        for number, case in enumerate(group):
            curves = [r["curve"] for r in runs if (r["selection"], r["value_type"]) == case]
            if not curves:
                continue
            sent = [statistics.fmean(point[0] for point in points) / 1e6 for points in zip(*curves, strict=True)]
            loss = [statistics.fmean(point[1] for point in points) for points in zip(*curves, strict=True)]
            look = plots.style(number)
            axes.plot(
                sent,
                loss,
                color=look.colour,
                linestyle=look.dashes,
                marker=look.marker,
                markevery=(number, 6),
                markerfacecolor="white",
                label=", ".join(case) if group[2] == TYPES[1] else case[0],
            )
            values += loss
        axes.axhline(target, color="#555555", linewidth=0.9, linestyle=(0, (2, 2)), label=f"test loss {target:g}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("payload sent by one worker / MB")
        axes.set_title(title, loc="left")
    plots.loss_axis(panels[0], values, "test loss of the average")
    for axes in panels:
        lowest, highest = min(values), max(values)
        # Room for the legend below the curves, of which the cheapest end early.
        axes.set_ylim(lowest * (lowest / highest) ** LEGEND, highest * 1.1)
        axes.legend(loc="lower left", fontsize=8, handlelength=3.4)
    return plots.save(figure, PICTURES / f"convergence_{name}.png")


def main() -> int:
    parser = _claims.parser(__doc__, seeds="0,1,2")
    parser.add_argument("--task", choices=tuple(SETTINGS), default="digits", help="default digits")
    parser.add_argument("--rounds", type=int, help="rounds of each run (default 400, cifar10 300)")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the result has, do those it lacks")
    parser.add_argument("--no-picture", action="store_true", help="leave the picture as it is")
    arguments = parser.parse_args()
    seeds = _claims.seeds_of(arguments)
    rounds, target = SETTINGS[arguments.task]
    rounds = arguments.rounds or rounds
    task = task_of(arguments.task, arguments.data_dir)
    name = f"convergence_{arguments.task}"
    runs = kept(arguments.out or _bench.RESULTS / f"{name}.json", rounds) if arguments.resume else []
    there = {(r["selection"], r["value_type"], r["seed"]) for r in runs}
    cases = [case for case in CASES if offered(case[0])]
    for seed in seeds:
        for selection, value_type in cases:
            if (selection, value_type, seed) in there:
                continue
            runs.append(measure(task, selection, value_type, seed, rounds))
            found = runs[-1]["accuracy"]
            print(f"{selection} {value_type}, seed {seed}: {found:.4f}", file=sys.stderr, flush=True)

    def of(case: tuple[str, str], what: str) -> list[float]:
        return [r[what] for r in runs if (r["selection"], r["value_type"]) == case]

    verdicts = {
        selection: statistics.fmean(of((selection, "int8"), "accuracy")) >= min(of((selection, "float32"), "accuracy"))
        for selection in ("sweep", "all")
    }
    rows = []
    for case in cases:
        mine = [r for r in runs if (r["selection"], r["value_type"]) == case]
        needed = [found for r in mine if (found := bytes_to(r, target)) is not None]
        reached = f"{statistics.fmean(needed) / 1e6:.2f}" if len(needed) == len(mine) else "not reached"
        rows.append(
            (
                *case,
                _claims.spread(of(case, "accuracy"), 4),
                _claims.spread(of(case, "loss")),
                _claims.spread([late_loss(r) for r in mine]),
                f"{statistics.fmean(of(case, 'bytes_up')) / 1e6:.2f}",
                reached,
            )
        )
    headings = ["selection", "values", "test accuracy", "test loss", "over the last quarter", "MB sent a worker"]
    headings.append(f"MB to a loss of {target:g}")
    result = {
        "targets": {"int8": "no less accurate than float32's worst seed"},
        "task": arguments.task,
        "rounds": rounds,
        "density": DENSITY,
        "partition": PARTITION,
        "seeds": seeds,
        "int8_as_accurate": verdicts,
        "met": all(verdicts.values()),
        "runs": runs,
    }
    if not arguments.no_picture:
        print(draw(arguments.task, runs, target), file=sys.stderr)
    return _claims.finish(name, arguments, result, headings, rows)


if __name__ == "__main__":
    sys.exit(main())
