"""What a round costs the training thread, against the least that torch needs for it.

Snapshot (gather K of d values) and merge (read, three operations, write) for a model of 10⁸ coordinates in the host's
memory, against one bare `index_select` and one bare `index_copy_` of the same K on the same vector; one thread. Both
take turns, the figure is the ratio of the medians (target: at most 1.5 for each density and selection). Selections by
block copy whole rows: at density 0.1 they are to be at least five times as fast as random ones.

    python benchmarks/training_thread.py                    about two minutes, 2 GB of memory
    python benchmarks/training_thread.py --params 1e7
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import _bench
import torch
from torch import Tensor, nn

from loscar_core.methods.base import Arrival
from loscar_core.methods.loscar_sgd import LoscarSgd
from loscar_core.plan import RoundKind, RoundPlan
from loscar_core.selection import SelectionKind
from loscar_core.values import ValueType
from loscar_worker.model import ModelView

DENSITIES = (0.001, 0.01, 0.1)
KINDS = (SelectionKind.SWEEP, SelectionKind.RANDOM, SelectionKind.BLOCK)
TARGET, BLOCK_TARGET = 1.5, 5.0
TURNS = 15


def seconds(what: Callable[[], None]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def measure(view: ModelView, kind: SelectionKind, density: float) -> dict[str, Any]:
    dimension = view.layout.dimension
    plan = RoundPlan(3, RoundKind.TRAIN, kind, round(dimension * density), ValueType.FLOAT32)
    indices = plan.indices(1, dimension)
    selected, where = view.select(indices), torch.from_numpy(indices)
    anchor, new_anchor, sent = (torch.randn(indices.size) for _ in range(3))
    storage, method = view.storages[0], LoscarSgd()

    def bare() -> None:
        values = storage.index_select(0, where)
        storage.index_copy_(0, where, values)

    def merged(live: Tensor, _: int, here: slice) -> Tensor:
        arrival = Arrival([live], [anchor[here]], [new_anchor[here]], [sent[here]], True, density, 0.0)
        return method.merge(arrival).values[0]

    def ours() -> None:  # what `TrainingHalf` does at a snapshot and at a merge
        view.gather(selected)
        view.change(selected, merged)

    bare(), ours()
    pairs = [(seconds(bare), seconds(ours)) for _ in range(TURNS)]
    least, own = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "selection": kind.value,
        "density": density,
        "coordinates": indices.size,
        "bare_ms": round(1e3 * least, 3),
        "ours_ms": round(1e3 * own, 3),
        "ratio": round(own / least, 3),
    }


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--params", type=float, default=1e8, help="coordinates (default 1e8)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.randn(int(arguments.params))))
    view = ModelView(module)
    cases = []
    for density in DENSITIES:
        for kind in KINDS:
            cases.append(measure(view, kind, density))
            print(cases[-1], file=sys.stderr, flush=True)
    worst = max(case["ratio"] for case in cases)
    dense = {case["selection"]: case["ours_ms"] for case in cases if case["density"] == DENSITIES[-1]}
    block = dense["random"] / dense["block"]
    headings = ["density", "selection", "coordinates", "bare ms", "ours ms", "ratio"]
    rows = [
        [c["density"], c["selection"], f"{c['coordinates']:,}", c["bare_ms"], c["ours_ms"], f"{c['ratio']:.2f}"]
        for c in cases
    ]
    text = _bench.table(headings, rows)
    text += f"\nat worst {worst:.2f} × the bare gather and scatter (target {TARGET})"
    text += f"\nat density {DENSITIES[-1]} block is {block:.1f} × as fast as random (target {BLOCK_TARGET:g})"
    result = {
        "targets": {"ratio": TARGET, "block": BLOCK_TARGET},
        "params": int(arguments.params),
        "worst": worst,
        "block_against_random": round(block, 2),
        "met": worst <= TARGET and block >= BLOCK_TARGET,
        "cases": cases,
        "table": {"headings": headings, "rows": [[str(cell) for cell in row] for row in rows]},
    }
    return _bench.finish("training_thread", arguments, result, text)


if __name__ == "__main__":
    sys.exit(main())
