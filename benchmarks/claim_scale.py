"""Scale: a thousand workers under the virtual clock, some of them dying and coming back.

Digits, 1,000 workers with speeds from 1 to 4 and links of 100 ms and 20 Mbit/s, density 0.05; every ten virtual
seconds 1 % of the workers die without a word and come back as new ones five seconds later. Shown are the
average model's loss over time and what the server's own link would have to carry. Verdict: the run ends, its loss
falls below 0.3, and the ledger balances.

    python benchmarks/claim_scale.py      about ten minutes
"""

from __future__ import annotations

import sys

import _claims

from loscar_core.config import RunConfig, ServerLimits
from loscar_deploy.link_spec import LinkSpec
from loscar_deploy.simulate import Simulation, SimulationPlan

WORKERS = 1000
ROUNDS = 60
LOSS = 0.3


def main() -> int:
    parser = _claims.parser(__doc__, seeds="0")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"how many (default {WORKERS})")
    arguments = parser.parse_args()
    task = _claims.task_of("digits", arguments)
    rows, runs, met = [], [], True
    for seed in _claims.seeds_of(arguments):
        n = arguments.workers
        config = RunConfig(seed=seed, density=0.05, sync_interval_s=1.0, rounds=ROUNDS, evaluate_every=10)
        links = (LinkSpec.parse("rtt=100ms,rate=20mbit"),) * n
        step_s = tuple(0.1 * (1 + 3 * i / max(1, n - 1)) for i in range(n))
        limits = ServerLimits(workers=n, lease_s=60.0, heartbeat_s=5.0, max_members=4096)
        plan = SimulationPlan(task, config, n, links, step_s, churn=0.01, churn_every_s=10.0, away_s=5.0, limits=limits)
        result = Simulation(plan).run()
        carried = (sum(result.wire_up) + sum(result.wire_down)) / result.virtual_seconds
        counts = result.contributions
        balanced = counts["sent"] == counts["included"] + counts["returned"] + counts["outstanding"]
        met = met and balanced and result.evaluations[-1].loss < LOSS
        for e in result.evaluations:
            rows.append((seed, f"{e.time:.1f}", e.round, f"{e.loss:.3f}", f"{e.accuracy:.3f}"))
            print(*rows[-1], file=sys.stderr, flush=True)
        runs.append(
            {
                "seed": seed,
                "workers": n,
                "virtual_seconds": result.virtual_seconds,
                "rounds": result.rounds,
                "deaths": result.deaths,
                "server_bytes_per_s": carried,
                "steps_total": sum(result.steps),
                "contributions": counts,
                "evaluations": [{"time": e.time, "loss": e.loss, "accuracy": e.accuracy} for e in result.evaluations],
            }
        )
        print(f"{result.deaths} deaths; the server's link carries {8 * carried / 1e6:.1f} Mbit/s", file=sys.stderr)
    headings = ("seed", "virtual s", "round", "loss", "accuracy")
    return _claims.finish(
        "claim_scale", arguments, {"targets": {"loss": LOSS}, "met": met, "runs": runs}, headings, rows
    )


if __name__ == "__main__":
    sys.exit(main())
