"""Claim: a density down to 0.001 still trains, and traffic falls in proportion.

CIFAR-10's small ResNet (0.27 M parameters, batch normalisation), four workers with equal shares of the data, a round
every two steps (N = Q = 1), the same number of steps for every density, `random` beside `sweep`. A coordinate is
averaged every 1/density rounds: so few of them fit into a run of this length that only short rounds show anything.
Verdict: test accuracy of the average of the live models at density 0.01 within 2 points of density 1. What happens at
0.001 is shown.

    python benchmarks/claim_density.py --data-dir DIR                about forty minutes on one core
    python benchmarks/claim_density.py --task digits --steps 4800    a long run of a small model: a minute
"""

from __future__ import annotations

import sys

import _claims

WORKERS = 4
LOCAL, OVERLAP = 1, 1
BATCH = 32
CASES = [(1.0, "all"), (0.1, "random"), (0.01, "random"), (0.01, "sweep"), (0.001, "random"), (0.001, "sweep")]
POINTS = 0.02


def main() -> int:
    parser = _claims.parser(__doc__, seeds="0")
    parser.add_argument("--steps", type=int, default=640, help="optimizer steps of each worker (default 640)")
    parser.add_argument("--task", choices=("cifar10", "digits"), default="cifar10", help="default cifar10")
    arguments = parser.parse_args()
    seeds = _claims.seeds_of(arguments)
    task = _claims.task_of(arguments.task, arguments)
    task.configure(batch_size=BATCH)
    rounds = arguments.steps // (LOCAL + OVERLAP)
    runs = []
    for density, selection in CASES:
        for seed in seeds:
            outcome = _claims.simulate(
                task,
                workers=WORKERS,
                rounds=rounds,
                density=density,
                selection=selection,
                local_steps=LOCAL,
                overlap_steps=OVERLAP,
                seed=seed,
                train_loss=False,
            )
            runs.append(
                {
                    "density": density,
                    "selection": selection,
                    "seed": seed,
                    "accuracy": outcome.accuracy,
                    "loss": outcome.loss,
                    "bytes_up": outcome.result.bytes_up[0],
                    "steps": outcome.result.steps,
                }
            )
            print(f"density {density:g} {selection}, seed {seed}: {outcome.accuracy:.4f}", file=sys.stderr, flush=True)
    dense = [r["accuracy"] for r in runs if r["density"] == 1]
    rows, met = [], True
    for density, selection in CASES:
        mine = [r for r in runs if (r["density"], r["selection"]) == (density, selection)]
        accuracies = [r["accuracy"] for r in mine]
        behind = sum(dense) / len(dense) - sum(accuracies) / len(accuracies)
        if density == 0.01:
            met = met and behind <= POINTS
        rows.append(
            (
                f"{density:g}",
                selection,
                _claims.spread(accuracies, 4),
                f"{100 * behind:+.1f}",
                _claims.spread([r["loss"] for r in mine]),
                f"{mine[0]['bytes_up'] / 1e6:.2f}",
            )
        )
    headings = ("density", "selection", "test accuracy", "points behind density 1", "test loss", "MB sent a worker")
    result = {"targets": {"points": 100 * POINTS}, "steps": arguments.steps, "met": met, "runs": runs}
    name = "claim_density" if arguments.task == "cifar10" else f"claim_density_{arguments.task}"
    return _claims.finish(name, arguments, result, headings, rows)


if __name__ == "__main__":
    sys.exit(main())
