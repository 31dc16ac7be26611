"""Claim: unequal machines need not wait for each other.

Real processes and the wall clock: digits, four workers that are 1, 2, 3 and 4 times as slow as the fastest, over
100 ms. Overlapped with the `auto` pace (everybody contributes at the same times, whatever it has done by then) against
blocking with equal N, and overlapped with equal N beside it; the same seed and target one after the other. Verdict: in
the median of the pairs, overlapped `auto` needs at most half of the blocking run's time to the target loss, and no
worker waits for 3 % of its time.

    python benchmarks/claim_unequal.py      about four minutes
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import _bench
import _claims

RATIO, IDLE = 0.5, 0.03
TARGET = 0.25
MODES = {
    "overlapped, auto": ["--local-steps", "auto", "--sync-interval", "150ms", "--overlap-steps", "auto"],
    "overlapped, N = 10": ["--local-steps", "10", "--overlap-steps", "auto"],
    "blocking, N = 10": ["--local-steps", "10", "--overlap-steps", "0"],
}


def measure(mode: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="loscar-bench-") as scratch:
        flags = ["--workers", "4", "--slowdown", "1,2,3,4", "--step-time", "15ms", "--link", "rtt=100ms,rate=20mbit"]
        flags += ["--target-loss", str(TARGET), "--duration", "180s", "--evaluate-every", "1", "--seed", str(seed)]
        summary = _bench.run_summary([*flags, *MODES[mode]], Path(scratch) / "run")
    kept = ("seconds_to_target", "wall_seconds", "rounds", "steps", "loss", "accuracy", "idle_fraction", "bytes_up")
    return {"mode": mode, "seed": seed, **{key: summary[key] for key in kept}}


def main() -> int:
    parser = _claims.parser(__doc__, seeds="0,1,2")
    arguments = parser.parse_args()
    runs = []
    for seed in _claims.seeds_of(arguments):
        for mode in MODES:
            runs.append(measure(mode, seed))
            print(mode, seed, runs[-1]["seconds_to_target"], file=sys.stderr, flush=True)
    by_mode = {mode: [r for r in runs if r["mode"] == mode] for mode in MODES}
    rows = []
    for mode, mine in by_mode.items():
        seconds = [r["seconds_to_target"] for r in mine]
        shown = "not reached" if None in seconds else _claims.spread(seconds, 1)
        rows.append(
            (mode, shown, f"{max(max(r['idle_fraction']) for r in mine):.1%}", "/".join(map(str, mine[0]["steps"])))
        )
    pairs = zip(by_mode["overlapped, auto"], by_mode["blocking, N = 10"], strict=True)
    reached = all(r["seconds_to_target"] is not None for r in runs if r["mode"] != "overlapped, N = 10")
    ratio = statistics.median(a["seconds_to_target"] / b["seconds_to_target"] for a, b in pairs) if reached else None
    idle = max(max(r["idle_fraction"]) for r in by_mode["overlapped, auto"])
    met = ratio is not None and ratio <= RATIO and idle < IDLE
    result = {"targets": {"ratio": RATIO, "idle": IDLE}, "ratio": ratio, "met": met, "runs": runs}
    headings = ("pace", f"seconds to {TARGET}", "idle, worst worker", "steps (first seed)")
    return _claims.finish("claim_unequal", arguments, result, headings, rows)


if __name__ == "__main__":
    sys.exit(main())
