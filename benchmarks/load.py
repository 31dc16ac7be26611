"""Many workers on one server: what a round costs with 4, 16, 64 and 256 of them, and with 64 behind slow links.

`loscar loadtest` for a model of 25 M coordinates at density 0.001: the server's processor time for each contribution
against that of a bare gRPC echo of the same bytes (target: at most 1.5 times), its memory (at most four times the
model, and what each member needs), and how both grow with the number of workers. Then 64 workers behind 200 ms ± 50 ms
and 50 Mbit/s: the 99th percentile of a round against the slowest round trip and the time of its transfers (at most 1.25
times). Server and workers share this machine's processors: with many workers the round times are those of the workers.

    python benchmarks/load.py                   about ten minutes
    python benchmarks/load.py --rounds 50       a look
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import _bench
import numpy as np

WORKERS = (4, 16, 64, 256)
DIMENSION, DENSITY = 25_000_000, 0.001
LINK, RTT_S, RATE_BYTES = "rtt=200ms,jitter=50ms,rate=50mbit", 0.25, 50e6 / 8
CPU, MEMORY, WAIT = 1.5, 4.0, 1.25
MEMBER_BYTES = 16 * 4 * int(DENSITY * DIMENSION)
"""What a member may need beside the model: some buffers of a contribution's size."""


def measure(workers: int, rounds: int, *more: str) -> dict[str, Any]:
    flags = ["loadtest", "--workers", str(workers), "--params", str(DIMENSION), "--density", str(DENSITY)]
    command = _bench.loscar([*flags, "--rounds", str(rounds), "--json", *more])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    print(found, file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="rounds of each case (default 200)")
    arguments = parser.parse_args()
    cases = [measure(workers, arguments.rounds) for workers in WORKERS]
    far = measure(64, arguments.rounds, "--link", LINK, "--no-reference")
    # Server CPU a round = fixed + slope · workers.
    cpu = [c["server_cpu_ms_per_contribution"] * c["workers"] for c in cases]
    slope, fixed = np.polyfit(WORKERS, cpu, 1)
    residual = max(abs(slope * n + fixed - c) / c for n, c in zip(WORKERS, cpu, strict=True))
    least_s = RTT_S + 2 * 4 * far["coordinates"] / RATE_BYTES
    wait = far["round_ms"]["p99"] / 1e3 / least_s
    ratio = max(c["cpu_ratio"] for c in cases)
    memory = [(c["server_peak_bytes"] - MEMBER_BYTES * c["workers"]) / c["model_bytes"] for c in cases]
    rows = []
    for case in [*cases, far]:
        r = case["round_ms"]
        rows.append(
            [
                str(case["workers"]),
                case["link"],
                f"{r['p50']:.1f}/{r['p95']:.1f}/{r['p99']:.1f}",
                f"{case['rounds_per_s']:.1f}",
                f"{case['server_cpu_ms_per_contribution']:.2f}",
                "" if case["cpu_ratio"] is None else f"{case['echo_cpu_ms_per_contribution']:.2f}",
                "" if case["cpu_ratio"] is None else f"{case['cpu_ratio']:.1f}",
                f"{case['server_peak_bytes'] / 1e6:.0f}",
            ]
        )
    headings = [
        "workers",
        "link",
        "round ms p50/p95/p99",
        "rounds/s",
        "server CPU ms a contribution",
        "echo's",
        "ratio",
    ]
    headings.append("server MB")
    result = {
        "targets": {"cpu_ratio": CPU, "memory": MEMORY, "p99": WAIT},
        "cpu_ratio_worst": ratio,
        "memory_worst": round(max(memory), 2),
        "p99_to_least": round(wait, 3),
        "cpu_ms_a_round": {
            "fixed": round(fixed, 2),
            "for each worker": round(slope, 3),
            "residual": round(residual, 3),
        },
        "met": ratio <= CPU and max(memory) <= MEMORY and wait <= WAIT,
        "runs": [*cases, far],
        "table": {"headings": headings, "rows": rows},
    }
    text = _bench.table(headings, rows)
    text += f"\nserver CPU a round: {fixed:.1f} ms and {slope:.2f} ms for each worker (within {residual:.0%})"
    text += f"\nCPU at worst {ratio:.1f} × the echo's (target {CPU})"
    text += f"\nmemory {max(memory):.2f} × the model (target {MEMORY:g})"
    text += f"\nfar: p99 {wait:.2f} × the slowest round trip and its transfers (target {WAIT})"
    return _bench.finish("load", arguments, result, text)


if __name__ == "__main__":
    sys.exit(main())
