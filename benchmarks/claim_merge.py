"""Claim: the delay-corrected merge beats overwriting, the more the longer the delay; the gap closes with the density.

Four equal workers take the same number of steps by both merges: N local steps, Q in flight, Q/N = 1, 4 and 20. Shown is
the training loss of the average of the live models after the last merge. Verdict: on digits at density 1 the
overwriting merge's loss is at least 1.5, 3 and 10 times the corrected one's, and at density 0.05 the ratios are smaller
than at density 1. a9a and CIFAR-10's small ResNet are shown beside it where their data are there.

    python benchmarks/claim_merge.py --data-dir DIR      about ten minutes, most of them for CIFAR-10
"""

from __future__ import annotations

import sys

import _claims

from loscar_core.errors import DataMissingError

WORKERS = 4
PACES = [(10, 10), (5, 20), (2, 40)]
RATIOS = {(10, 10): 1.5, (5, 20): 3.0, (2, 40): 10.0}
# task, steps of each worker, batch size, densities
TASKS = [
    ("digits", 600, 16, (1.0, 0.25, 0.05)),
    ("a9a", 600, None, (1.0, 0.25, 0.05)),
    ("cifar10", 252, 16, (1.0, 0.05)),
]


def main() -> int:
    parser = _claims.parser(__doc__, seeds="0,1,2")
    arguments = parser.parse_args()
    seeds = _claims.seeds_of(arguments)
    rows, runs, ratios = [], [], {}
    for name, steps, batch, densities in TASKS:
        try:
            task = _claims.task_of(name, arguments)
        except DataMissingError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        task.configure(batch_size=batch)
        mine = seeds if name != "cifar10" else seeds[:1]
        for density in densities:
            for local, overlap in PACES:
                losses: dict[str, list[float]] = {}
                for merge in ("delay-corrected", "overwrite"):
                    for seed in mine:
                        outcome = _claims.simulate(
                            task,
                            workers=WORKERS,
                            rounds=steps // (local + overlap),
                            density=density,
                            merge=merge,
                            local_steps=local,
                            overlap_steps=overlap,
                            seed=seed,
                        )
                        losses.setdefault(merge, []).append(outcome.train_loss)
                        runs.append(
                            {
                                "task": name,
                                "density": density,
                                "local_steps": local,
                                "overlap_steps": overlap,
                                "merge": merge,
                                "seed": seed,
                                "train_loss": outcome.train_loss,
                                "test_loss": outcome.loss,
                                "accuracy": outcome.accuracy,
                            }
                        )
                corrected, naive = losses["delay-corrected"], losses["overwrite"]
                ratio = sum(naive) / sum(corrected)
                ratios[name, density, local, overlap] = ratio
                row = (name, f"{density:g}", local, overlap, _claims.spread(corrected), _claims.spread(naive))
                rows.append((*row, f"{ratio:.2f}"))
                print(*rows[-1], file=sys.stderr, flush=True)
    met = all(ratios["digits", 1.0, *pace] >= least for pace, least in RATIOS.items())
    met = met and all(ratios["digits", 0.05, *pace] < ratios["digits", 1.0, *pace] for pace in PACES)
    headings = ("task", "density", "N", "Q", "corrected", "overwriting", "ratio")
    result = {"targets": {"ratios": list(RATIOS.values())}, "met": met, "runs": runs}
    return _claims.finish("claim_merge", arguments, result, headings, rows)


if __name__ == "__main__":
    sys.exit(main())
