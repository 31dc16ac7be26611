"""Choosing the K largest of a worker's changes, against `torch.topk`.

10⁷ values, densities 0.001, 0.01 and 0.1, one thread each, taking turns; the figure is the ratio of the medians
(target: at most 2). Ours gives the positions in ascending order, equal ones from the lowest on; `torch.topk` of the
magnitudes, unsorted, gives them in any. The values are drawn from a normal distribution, with heavy tails (the cube of
one), with nine of ten equal to zero, and in ascending order.

    python benchmarks/topk.py                       about five minutes, 500 MB of memory
    python benchmarks/topk.py --params 1e6
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import _bench
import numpy as np
import torch

from loscar_core.selection import count_for, top_k

DENSITIES = (0.001, 0.01, 0.1)
TARGET = 2.0
TURNS = 7


def normal(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.standard_normal(size, np.float32)


def heavy(rng: np.random.Generator, size: int) -> np.ndarray:
    return normal(rng, size) ** 3


def sparse(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.where(rng.random(size, np.float32) < 0.1, normal(rng, size), np.float32(0))


def ordered(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.sort(normal(rng, size))


KINDS = (normal, heavy, sparse, ordered)


def seconds(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def measure(name: str, values: np.ndarray, density: float) -> dict[str, Any]:
    count = count_for(density, values.size)
    tensor = torch.from_numpy(values)

    def theirs() -> object:
        return torch.topk(tensor.abs(), count, sorted=False)

    def ours() -> object:
        return top_k(values, count)

    theirs(), ours()
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(TURNS)]
    reference, own = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "values": name,
        "density": density,
        "coordinates": count,
        "torch_ms": round(1e3 * reference, 2),
        "ours_ms": round(1e3 * own, 2),
        "ratio": round(own / reference, 3),
    }


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--params", type=float, default=1e7, help="values (default 1e7)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for kind in KINDS:
        values = kind(np.random.default_rng(1), int(arguments.params))
        for density in DENSITIES:
            cases.append(measure(kind.__name__, values, density))
            print(cases[-1], file=sys.stderr, flush=True)
    worst = max(case["ratio"] for case in cases)
    headings = ["values", "density", "coordinates", "torch ms", "ours ms", "ratio"]
    rows = [
        [c["values"], c["density"], f"{c['coordinates']:,}", c["torch_ms"], c["ours_ms"], f"{c['ratio']:.2f}"]
        for c in cases
    ]
    text = _bench.table(headings, rows) + f"\nat worst {worst:.2f} × torch.topk (target {TARGET:g})"
    result = {
        "targets": {"ratio": TARGET},
        "params": int(arguments.params),
        "worst": worst,
        "met": worst <= TARGET,
        "cases": cases,
        "table": {"headings": headings, "rows": [[str(cell) for cell in row] for row in rows]},
    }
    return _bench.finish("topk", arguments, result, text)


if __name__ == "__main__":
    sys.exit(main())
