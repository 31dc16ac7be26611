"""Scale: a thousand workers under the virtual clock, some of them dying and coming back.

1,000 workers with speeds from 1 to 4 and links of 100 ms and 20 Mbit/s; every ten virtual seconds 1 % of them die
without a word and come back as new ones five seconds later. Shown are the average model's loss over time and what the
server's own link would have to carry. The task is a9a: 32,561 samples, some 32 a worker, and so cheap that a thousand
workers are simulated with their real gradients. Verdict: the run ends, the loss of the average is at most 0.36 (central
training reaches 0.326), and the ledger balances.

    python benchmarks/claim_scale.py --data-dir DIR      about five minutes
"""

from __future__ import annotations

import sys

import _claims

from loscar_core.config import RunConfig, ServerLimits
from loscar_deploy.link_spec import LinkSpec
from loscar_deploy.simulate import Simulation, SimulationPlan, SimulationResult
from loscar_worker.tasks import Task

WORKERS = 1000


ROUNDS = 60
LOSS = 0.36


def simulate(task: Task, workers: int, seed: int) -> SimulationResult:
    config = RunConfig(seed=seed, density=1.0, sync_interval_s=1.0, rounds=ROUNDS, evaluate_every=10)
    links = (LinkSpec.parse("rtt=100ms,rate=20mbit"),) * workers
    step_s = tuple(0.1 * (1 + 3 * i / max(1, workers - 1)) for i in range(workers))
    limits = ServerLimits(workers=workers, lease_s=60.0, heartbeat_s=5.0, max_members=4096)
    churn = {"churn": 0.01, "churn_every_s": 10.0, "away_s": 5.0}
    return Simulation(SimulationPlan(task, config, workers, links, step_s, limits=limits, **churn)).run()


def main() -> int:
    parser = _claims.parser(__doc__, seeds="0")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"how many (default {WORKERS})")
    arguments = parser.parse_args()
    n = arguments.workers
    rows, runs, met = [], [], True
    task = _claims.task_of("a9a", arguments)
    for seed in _claims.seeds_of(arguments):
        result = simulate(task, n, seed)
        carried = (sum(result.wire_up) + sum(result.wire_down)) / result.virtual_seconds
        counts = result.contributions
        balanced = counts["sent"] == counts["included"] + counts["returned"] + counts["outstanding"]
        met = met and balanced and result.evaluations[-1].loss <= LOSS
        link = f"{8 * carried / 1e6:.1f}"
        rows += [
            (seed, f"{e.time:.0f}", e.round, f"{e.loss:.3f}", f"{e.accuracy:.3f}", result.deaths, link)
            for e in result.evaluations
        ]
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
                "ledger_balances": balanced,
                "evaluations": [{"time": e.time, "loss": e.loss, "accuracy": e.accuracy} for e in result.evaluations],
            }
        )
    headings = ("seed", "virtual s", "round", "loss", "accuracy", "deaths in all", "server's link, Mbit/s")
    found = {"targets": {"loss": LOSS}, "met": met, "runs": runs}
    return _claims.finish("claim_scale", arguments, found, headings, rows)


if __name__ == "__main__":
    sys.exit(main())
