"""All methods over the same slow link: time to the target, traffic, waiting.

Real processes and the wall clock: digits, four workers of which one is half as fast, steps of 10 ms, 200 ms and
5 Mbit/s to the server and back; the same seeds, models and data for all. Each method has the pace that it is meant for
(about 16 steps between averages where it has a choice). There is no target: the table shows what each of them pays for
a slow link, and what it gets.

    python benchmarks/claim_methods.py      about six minutes
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import _bench
import _claims

LOSS = 0.2
METHODS = {
    "loscar": ["--sync-interval", "160ms"],
    "dppf:alpha=0.5,lambda=0.25": ["--sync-interval", "160ms"],
    "mixvr:budget=16,schedule=fixed": [],
    "local-sgd": ["--local-steps", "16"],
    "cocod": [],
    "overlap-local-sgd": [],
    "blend": ["--sync-interval", "160ms"],
    "sparta": [],
}


def measure(method: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="loscar-bench-") as scratch:
        flags = ["--link", "rtt=200ms,rate=5mbit", "--slowdown", "1,1,1,2", "--duration", "25s", "--seed", str(seed)]
        flags += ["--target-loss", str(LOSS), "--evaluate-every", "2", "--method", method, *METHODS[method]]
        summary = _bench.run_summary(flags, Path(scratch) / "run")
    kept = ("seconds_to_target", "wall_seconds", "rounds", "steps", "loss", "accuracy", "idle_fraction")
    traffic = sum(summary["bytes_up"]) + sum(summary["bytes_down"])
    return {"method": method, "seed": seed, "payload_bytes": traffic, **{key: summary[key] for key in kept}}


def main() -> int:
    arguments = _claims.parser(__doc__, seeds="0,1,2").parse_args()
    runs = []
    for seed in _claims.seeds_of(arguments):
        for method in METHODS:
            runs.append(measure(method, seed))
            print(method, seed, runs[-1]["seconds_to_target"], runs[-1]["accuracy"], file=sys.stderr, flush=True)
    rows = []
    for method in METHODS:
        mine = [r for r in runs if r["method"] == method]
        seconds = [r["seconds_to_target"] for r in mine if r["seconds_to_target"] is not None]
        rows.append(
            (
                f"`{method}`",
                _claims.spread(seconds, 1)
                if len(seconds) == len(mine)
                else f"{len(seconds)} of {len(mine)} reached it",
                f"{sum(r['payload_bytes'] / r['wall_seconds'] for r in mine) / len(mine) / 1e3:.0f}",
                f"{max(max(r['idle_fraction']) for r in mine):.1%}",
                _claims.spread([r["rounds"] for r in mine], 0),
                _claims.spread([sum(r["steps"]) for r in mine], 0),
                _claims.spread([r["accuracy"] for r in mine], 3),
            )
        )
    headings = (
        "method",
        f"seconds to {LOSS}",
        "payload, kB/s",
        "idle, worst",
        "rounds",
        "steps",
        "accuracy at the end",
    )
    met = all(r["seconds_to_target"] is not None for r in runs if r["method"] == "loscar")
    return _claims.finish("claim_methods", arguments, {"targets": {}, "met": met, "runs": runs}, headings, rows)


if __name__ == "__main__":
    sys.exit(main())
