"""The limit: strongly unequal data with aggressive overlap hurts; a smaller Q or a larger density is the remedy.

Digits, five workers with shares that are IID, drawn from a Dirichlet distribution, or sorted by label (two classes
each). The delay-corrected merge with Q from 0 (blocking) to 40 steps in flight beside N = 10 local ones, and the same
number of steps for all. Shown is the test accuracy of the average of the live models. There is no target; the verdict
says whether the limit shows: sorted by label, the longest overlap is at least five points behind no overlap, and IID it
is not.

    python benchmarks/claim_non_iid.py      about two minutes
"""

from __future__ import annotations

import sys

import _claims

WORKERS = 5
LOCAL = 10
OVERLAPS = (0, 10, 40)
STEPS = 1200
PARTITIONS = ("iid", "dirichlet:0.3", "by-label")
DENSITIES = (1.0, 0.25, 0.05)


def main() -> int:
    parser = _claims.parser(__doc__, seeds="0,1,2")
    arguments = parser.parse_args()
    seeds = _claims.seeds_of(arguments)
    task = _claims.task_of("digits", arguments)
    rows, runs, found = [], [], {}
    for partition in PARTITIONS:
        for density in DENSITIES:
            cells = []
            for overlap in OVERLAPS:
                accuracies = []
                for seed in seeds:
                    outcome = _claims.simulate(
                        task,
                        workers=WORKERS,
                        rounds=STEPS // (LOCAL + overlap),
                        density=density,
                        selection="sweep",
                        local_steps=LOCAL,
                        overlap_steps=overlap,
                        partition=partition,
                        seed=seed,
                    )
                    accuracies.append(outcome.accuracy)
                    case = {"partition": partition, "density": density, "overlap_steps": overlap, "seed": seed}
                    runs.append({**case, "accuracy": outcome.accuracy, "loss": outcome.loss})
                found[partition, density, overlap] = sum(accuracies) / len(accuracies)
                cells.append(_claims.spread(accuracies))
            rows.append((partition, f"{density:g}", *cells))
            print(*rows[-1], file=sys.stderr, flush=True)
    hurt = found["by-label", 0.25, 0] - found["by-label", 0.25, 40]
    spared = found["iid", 0.25, 0] - found["iid", 0.25, 40]
    met = hurt >= 0.05 > spared
    headings = ("data", "density", *(f"Q = {q}" for q in OVERLAPS))
    result = {"hurt": hurt, "spared": spared, "met": met, "runs": runs}
    return _claims.finish("claim_non_iid", arguments, result, headings, rows)


if __name__ == "__main__":
    sys.exit(main())
