"""The width that DPPF holds: λ/α on a network, whatever its learning rate does, and less in a curved valley.

Real processes: four workers, digits, η = 0.05, τ = 4 steps between averages, for λ/α from 0.5 to 8 (α = 0.5), blocking
and overlapped, with a constant learning rate and with one that has decayed to 0 when the distances are read (the last
fifth of the rounds). Then a quadratic of curvature h, where the steps between two averages pull together as well:
λ / (1 − (1 − α)(1 − ηh)^τ) (α = 0.3). Verdict: within 3 %, and within 5 % on the quadratic.

    python benchmarks/claim_dppf.py      about five minutes
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import _bench
import _claims

WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
ALPHA, STEPS, ROUNDS = 0.5, 4, 150
NETWORK, VALLEY = 0.03, 0.05
VALLEYS = ((1.0, 8), (4.0, 4), (4.0, 16))
VALLEY_ALPHA, VALLEY_PUSH, VALLEY_LR = 0.3, 0.3, 0.05
WORKERS = 4


def width(flags: list[str], seed: int, environment: dict[str, str]) -> float:
    """`valley_width` of one run."""
    os.environ.update(environment)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where the tasks are
    common = ["--workers", str(WORKERS), "--slowdown", "1", "--step-time", "0s", "--link", "none", "--seed", str(seed)]
    with tempfile.TemporaryDirectory(prefix="loscar-bench-") as scratch:
        found: float = _bench.run_summary([*common, *flags], Path(scratch) / "run")["valley_width"]
    return found


def outcome(valley: str, seed: int, expected: float, measured: float, tolerance: float) -> dict[str, Any]:
    """One run's entry in the result; shown at once."""
    error = measured / expected - 1
    found = {"valley": valley, "seed": seed, "expected": expected, "measured": measured}
    found |= {"error": error, "tolerance": tolerance}
    print(found, file=sys.stderr, flush=True)
    return found


def networks(seed: int) -> list[dict[str, Any]]:
    found = []
    for pace, overlap in (("blocking", "0"), ("overlapped", "2")):
        for rate, decay in (("constant", 0), ("decayed to 0", int(0.7 * STEPS * ROUNDS))):
            for expected in WIDTHS:
                local = STEPS - int(overlap)
                flags = ["--task", "_valleys:digits", "--method", f"dppf:alpha={ALPHA},lambda={ALPHA * expected}"]
                flags += ["--local-steps", str(local), "--overlap-steps", overlap, "--rounds", str(ROUNDS)]
                flags += ["--lr", "0.05"]
                measured = width(flags, seed, {"VALLEY_DECAY_STEPS": str(decay)})
                found.append(outcome(f"digits, {pace}, rate {rate}", seed, expected, measured, NETWORK))
    return found


def quadratics(seed: int) -> list[dict[str, Any]]:
    found = []
    for curvature, steps in VALLEYS:
        expected = VALLEY_PUSH / (1 - (1 - VALLEY_ALPHA) * (1 - VALLEY_LR * curvature) ** steps)
        flags = ["--task", "_valleys:Quadratic", "--method", f"dppf:alpha={VALLEY_ALPHA},lambda={VALLEY_PUSH}"]
        flags += ["--local-steps", str(steps), "--overlap-steps", "0", "--rounds", str(ROUNDS)]
        measured = width(flags, seed, {"VALLEY_CURVATURE": str(curvature), "VALLEY_DECAY_STEPS": "0"})
        found.append(outcome(f"quadratic, h = {curvature:g}, τ = {steps}", seed, expected, measured, VALLEY))
    return found


def main() -> int:
    arguments = _claims.parser(__doc__, seeds="0").parse_args()
    runs: list[dict[str, Any]] = []
    for seed in _claims.seeds_of(arguments):
        runs += [*networks(seed), *quadratics(seed)]
    rows = [
        (r["valley"], r["seed"], f"{r['expected']:.3f}", f"{r['measured']:.3f}", f"{r['error']:+.1%}") for r in runs
    ]
    met = all(abs(r["error"]) <= r["tolerance"] for r in runs)
    result = {"targets": {"network": NETWORK, "quadratic": VALLEY}, "met": met, "runs": runs}
    return _claims.finish("claim_dppf", arguments, result, ("valley", "seed", "formula", "measured", "error"), rows)


if __name__ == "__main__":
    sys.exit(main())
