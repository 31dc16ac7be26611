"""What becomes of a run whose processes and links fail all the time: `loscar chaos`, seed after seed.

Target: no contribution lost or counted twice, every worker's ledger in balance, all replicas equal to the bit, nothing
left behind, and an accuracy within one point of a run of equal duration in peace; for every seed. About three minutes a
seed.

    python benchmarks/chaos.py
    python benchmarks/chaos.py --seeds 1
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import _bench

HEADINGS = (
    "seed",
    "faults",
    "server processes",
    "rounds closed",
    "abandoned, undone",
    "contributions in",
    "lost",
    "counted twice",
    "ledger off by",
    "accuracy",
    "in peace",
)


def run(seed: int, seconds: float) -> dict[str, Any]:
    """One chaos run; its verdict."""
    command = _bench.loscar(["chaos", "--json", "--seed", str(seed), "--seconds", str(seconds)])
    done = subprocess.run([*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        sys.exit(f"loscar chaos with seed {seed} ended with status {done.returncode}")
    verdict: dict[str, Any] = json.loads(done.stdout)
    return verdict


def row(verdict: dict[str, Any]) -> list[str]:
    def accuracy(name: str) -> str:
        return "–" if verdict[name] is None else f"{verdict[name]:.4f}"

    return [
        str(verdict["seed"]),
        str(verdict["faults_total"]),
        str(verdict["server_starts"]),
        str(verdict["rounds"]),
        str(verdict["rounds_abandoned"]),
        str(verdict["contributions_in_consensus"]),
        str(verdict["contributions_lost"]),
        str(verdict["contributions_doubled"]),
        f"{max((w['error'] for w in verdict['ledger']), default=float('nan')):.0e}",
        accuracy("accuracy"),
        accuracy("accuracy_undisturbed"),
    ]


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--seeds", metavar="N", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    parser.add_argument("--seconds", metavar="S", type=float, default=60.0, help="of faults, each (default 60)")
    arguments = parser.parse_args()
    verdicts = []
    for seed in range(arguments.seeds):
        verdict = run(seed, arguments.seconds)
        verdicts.append(verdict)
        print(
            f"seed {seed}: {verdict['faults_total']} faults injected, {verdict['rounds']} rounds closed, "
            f"{verdict['contributions_lost']} contributions lost, {verdict['contributions_doubled']} counted twice",
            *(f"  FAILED: {text}" for text in verdict["failures"]),
            sep="\n",
            file=sys.stderr,
            flush=True,
        )
    rows = [row(verdict) for verdict in verdicts]
    result = {
        "seconds": arguments.seconds,
        "workers": verdicts[0]["workers"],
        "faults": {
            kind: sum(v["faults"].get(kind, 0) for v in verdicts)
            for kind in sorted({kind for v in verdicts for kind in v["faults"]})
        },
        "table": {"headings": HEADINGS, "rows": rows},
        "runs": verdicts,
        "met": all(v["passed"] for v in verdicts),
    }
    return _bench.finish("chaos", arguments, result, _bench.table(HEADINGS, rows))


if __name__ == "__main__":
    sys.exit(main())
