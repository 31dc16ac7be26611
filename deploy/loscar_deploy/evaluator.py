"""The evaluator of a run on one machine: tests the exact average of the live models, in a process of its own.

`python -m loscar_deploy.evaluator` is started by `loscar run`; it is niced, so that the workers keep the cores, and
skips to the newest complete evaluation round when it cannot keep up.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import ArgumentParser
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loscar_core.errors import LoscarError
from loscar_core.replica import Floats
from loscar_deploy.children import exit_with_parent
from loscar_worker.evaluation import LiveVector, read_round, read_rounds
from loscar_worker.model import ModelView
from loscar_worker.tasks import Task, load_task

POLL_S = 0.05
PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Average:
    """The mean of the live models at one round boundary."""

    round: int
    elapsed_s: float
    steps: tuple[int, ...]
    values: Floats


def average_of(vectors: list[LiveVector]) -> Average:
    """Mean in float64, as float32; the time is the last worker's."""
    total = np.zeros(vectors[0].values.size, np.float64)
    for v in vectors:
        total += v.values
    mean = (total / len(vectors)).astype(np.float32)
    return Average(vectors[0].round, max(v.elapsed_s for v in vectors), tuple(v.steps for v in vectors), mean)


class LiveEvaluator:
    """Finds complete evaluation rounds and tests their average.

    Args:
        paths: each worker's slots.
        task: whose test data are used.
    """

    def __init__(self, paths: list[Path], task: Task) -> None:
        self._paths = paths
        self._task = task
        self._model = task.make_model(0)
        self._view = ModelView(self._model)
        self._done = 0
        self._seen_at: dict[int, float] = {}

    def next(self) -> Average | None:
        """The newest round that every worker has written and that was not returned before.

        A worker that died writes no more: a round that at least half of the workers have written is complete
        without the others once `PATIENCE_S` are over.
        """
        rounds = Counter(r for p in self._paths for r in read_rounds(p) if r > self._done)
        now = time.monotonic()
        self._seen_at = {r: self._seen_at.get(r, now) for r in rounds}
        for round_ in sorted(rounds, reverse=True):
            patient = now - self._seen_at[round_] < PATIENCE_S
            needed = len(self._paths) if patient else (len(self._paths) + 1) // 2
            if rounds[round_] < needed:
                continue
            vectors = [read_round(p, round_) for p in self._paths]
            whole = [v for v in vectors if v is not None]
            if len(whole) >= needed:
                self._done = round_
                return average_of(whole)
        return None

    def evaluate(self, average: Average) -> dict[str, float | int | list[int]]:
        """Loss and accuracy of an average on the test data, as a line for evaluations.jsonl."""
        dimension = self._view.layout.dimension
        self._view.load_vector(average.values[:dimension])
        self._view.load_statistics(average.values[dimension:])
        result = self._task.evaluate(self._model)
        return {
            "round": average.round,
            "elapsed_s": average.elapsed_s,
            "steps": list(average.steps),
            "loss": result.loss,
            "accuracy": result.accuracy,
        }


def main() -> int:
    parser = ArgumentParser()
    parser.add_argument("slots", nargs="+", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--exit-with-parent", action="store_true")
    args = parser.parse_args()
    if args.exit_with_parent:
        exit_with_parent()
    os.nice(19)
    import torch

    torch.set_num_threads(1)
    try:
        evaluator = LiveEvaluator(args.slots, load_task(args.task, args.data_dir))
    except LoscarError as error:
        print(f"loscar: {error}", file=sys.stderr)
        return error.exit_code
    with args.out.open("a", encoding="utf-8") as out:
        while True:
            average = evaluator.next()
            if average is None:
                time.sleep(POLL_S)
                continue
            out.write(json.dumps(evaluator.evaluate(average)) + "\n")
            out.flush()


if __name__ == "__main__":
    sys.exit(main())
