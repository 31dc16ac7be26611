"""What the scripts for the paper's claims share: simulated runs, the average of the live models, spread.

The simulated runs use the same state machines, merges and link models as real processes, under a virtual clock: what
they find follows from the seed and does not depend on what else this machine does.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _bench
import numpy as np
import torch

from loscar_core.config import FinalRound, RunConfig
from loscar_core.merge import MergeKind
from loscar_core.methods import parse_method, settle
from loscar_core.selection import SelectionKind
from loscar_core.values import ValueType
from loscar_deploy.link_spec import LinkSpec
from loscar_deploy.simulate import Simulation, SimulationPlan, SimulationResult
from loscar_worker.model import ModelView
from loscar_worker.tasks import Task, load_task


@dataclass(frozen=True, slots=True)
class Outcome:
    """A simulated run's end.

    Attributes:
        result: all of it.
        loss, accuracy: on the test data, of the average of all live models just after the last merge.
        train_loss: of the same average, on the training data.
    """

    result: SimulationResult
    loss: float
    accuracy: float
    train_loss: float


def simulate(
    task: Task,
    *,
    workers: int,
    rounds: int,
    density: float,
    local_steps: int | None,
    overlap_steps: int | None,
    seed: int = 0,
    merge: str = "delay-corrected",
    selection: str = "random",
    partition: str = "iid",
    step_s: Sequence[float] | None = None,
    link: str = "none",
    train_loss: bool = True,
    value_type: str = "float32",
    evaluate_every: int = 0,
) -> Outcome:
    """Run to the end and test the average of the live models; there is no final round."""
    config = RunConfig(
        seed=seed,
        density=density,
        selection=SelectionKind(selection),
        value_type=ValueType(value_type),
        merge=MergeKind(merge),
        local_steps=local_steps,
        overlap_steps=overlap_steps,
        rounds=rounds,
        final_round=FinalRound.NONE,
        evaluate_every=evaluate_every,
    )
    links = (LinkSpec.parse(link),) * workers
    result = Simulation(SimulationPlan(task, config, workers, links, tuple(step_s or [1.0] * workers), partition)).run()
    return Outcome(result, *average(task, result, train_loss))


def simulate_method(
    task: Task,
    method: str,
    *,
    workers: int,
    seed: int,
    rounds: int | None = None,
    evaluate_every: int = 0,
    **settings: Any,
) -> SimulationResult:
    """A run of a method on equal machines without links, whatever settings it needs; there is no final round.

    A step takes a virtual millisecond: however many of them a round has, it is over before its deadline.
    """
    chosen = parse_method(method)
    values = {
        "seed": seed,
        "rounds": rounds,
        "evaluate_every": evaluate_every,
        "final_round": FinalRound.NONE,
        "method": chosen.text(),
        **settings,
    }
    config = RunConfig(**settle(chosen, values, list(settings)))
    links = (LinkSpec.parse("none"),) * workers
    return Simulation(SimulationPlan(task, config, workers, links, (1e-3,) * workers)).run()


def average(task: Task, result: SimulationResult, train_loss: bool = True) -> tuple[float, float, float]:
    """Test loss, test accuracy and training loss of the average of a run's vectors."""
    mean = np.mean([v.astype(np.float64) for v in result.vectors], axis=0).astype(np.float32)
    model = task.make_model(0)
    view = ModelView(model)
    view.load_vector(mean[: view.layout.dimension])
    view.load_statistics(mean[view.layout.dimension :])
    test = task.evaluate(model)
    if not train_loss:
        return test.loss, test.accuracy, float("nan")
    kept, task.test = task.test, task.train
    try:
        return test.loss, test.accuracy, task.evaluate(model).loss
    finally:
        task.test = kept


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and half the range where there are several."""
    mean = statistics.fmean(values)
    half = (max(values) - min(values)) / 2
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def parser(doc: str | None, seeds: str) -> argparse.ArgumentParser:
    """The benchmarks' parser, with seeds and a data folder."""
    made = _bench.parser(doc)
    made.add_argument("--seeds", default=seeds, help=f"which seeds (default {seeds})")
    made.add_argument("--data-dir", metavar="DIR", type=Path, help="where a9a, mnist and cifar10 are")
    torch.set_num_threads(1)
    return made


def seeds_of(arguments: argparse.Namespace) -> list[int]:
    return [int(text) for text in arguments.seeds.split(",")]


def task_of(name: str, arguments: argparse.Namespace) -> Task:
    return load_task(name, arguments.data_dir)


def finish(
    name: str,
    arguments: argparse.Namespace,
    result: dict[str, Any],
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
) -> int:
    """As `_bench.finish`, with the table kept for the docs."""
    cells = [[str(cell) for cell in row] for row in rows]
    kept = {**result, "table": {"headings": list(headings), "rows": cells}}
    return _bench.finish(name, arguments, kept, _bench.table(headings, rows))
