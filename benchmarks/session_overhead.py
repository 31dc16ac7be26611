"""What `session.step()` costs the training thread with a large model.

A real server process on the loopback, no link delay, two workers in processes of their own, d = 10^7 parameters (one
linear layer), density 0.01, so K = 10^5. A training step is a sleep of 50 ms and a small change of the bias. Measured
at two paces:

    default         a snapshot 250 ms after each merge, as `loscar run` and `loscar server` do without options
    back-to-back    a snapshot at the first step boundary after each merge: a round every two steps, which is as often
                    as a round can be had

Target, at the default pace: `session.step()`, waits included, takes at most 2 % of a 50 ms step on average, over all
steps of each worker apart from the first ten. The other pace is shown because it bounds what any pace can cost. Also
shown: what a call costs that takes a snapshot or merges, and the slowest call.

    python benchmarks/session_overhead.py             about a minute
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _bench

SHARE = 0.02
STEP_S = 0.05
WORKERS = 2
DENSITY = 0.01
WARM_UP = 10
PACES = {
    "default": ["--local-steps", "auto", "--sync-interval", "250ms"],
    "back-to-back": ["--local-steps", "1"],
}
IN, OUT = 9_999, 1_000
DIMENSION = OUT * (IN + 1)


def work(address: str, name: str, steps: int) -> None:
    """One worker: train for so many steps and print what its calls of `session.step()` took."""
    import torch

    import loscar_worker

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(IN, OUT)
    took: list[float] = []
    idle: list[float] = []
    merged = [0]
    with loscar_worker.join(address, model, name=name, on_round=lambda _: merged.append(merged.pop() + 1)) as session:
        while not session.finished and len(took) < steps:
            time.sleep(STEP_S)
            with torch.no_grad():
                model.bias.add_(1e-6)
            waited = session.idle_s
            started = time.perf_counter()
            session.step(loss=0.0)
            took.append(time.perf_counter() - started)
            idle.append(session.idle_s - waited)
        figures = {
            "name": name,
            "dimension": session.engine.layout.dimension,
            "rounds_merged": merged[0],
            "contributions": session.contributions,
            "bytes_up": session.engine.bytes_up,
            "step_seconds": took,
            "idle_seconds": sum(idle[WARM_UP:]),
            "service_seconds": session.service_s,
        }
    print(json.dumps(figures), flush=True)


def evaluate(figures: dict[str, Any]) -> dict[str, Any]:
    """The shares of one worker."""
    took = figures.pop("step_seconds")
    counted = took[WARM_UP:]
    busy = [t for t in counted if t > 1e-4]  # calls that took a snapshot or merged; the others cost microseconds
    mean = statistics.fmean(counted)
    return {
        **figures,
        "steps": len(took),
        "step_call_ms_mean": round(mean * 1e3, 4),
        "step_call_ms_max": round(max(counted) * 1e3, 3),
        "step_call_ms_max_with_warm_up": round(max(took) * 1e3, 3),
        "working_calls": len(busy),
        "working_call_ms_median": round(statistics.median(busy) * 1e3, 3) if busy else None,
        "share": round(mean / STEP_S, 5),
    }


def measure(pace: list[str], steps: int) -> list[dict[str, Any]]:
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    options = ["--listen", "127.0.0.1:0", "--workers", str(WORKERS), "--json", "--log-level", "warning"]
    options += ["--density", str(DENSITY), *pace, "--overlap-steps", "auto"]
    options += ["--final-round", "none", "--linger", "1s"]
    server = subprocess.Popen(_bench.loscar(["server", *options]), stdout=subprocess.PIPE, text=True, env=environment)
    workers: list[subprocess.Popen[str]] = []
    try:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["listening"]
        for i in range(WORKERS):
            command = [sys.executable, str(Path(__file__)), "--steps", str(steps), "--worker", address, f"w{i}"]
            workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        results = []
        for worker in workers:
            output, _ = worker.communicate(timeout=120 + 4 * STEP_S * steps)
            if worker.returncode:
                sys.exit(f"a worker ended with status {worker.returncode}")
            results.append(evaluate(json.loads(output)))
        return results
    finally:
        for process in (*workers, server):
            if process.poll() is None:
                process.terminate()
        for process in (*workers, server):
            process.wait(30)


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--steps", type=int, default=400, help="steps of each worker (default 400)")
    parser.add_argument("--worker", nargs=2, metavar=("ADDRESS", "NAME"), help="be one of the workers")
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker, arguments.steps)
        return 0
    paces = {name: measure(options, arguments.steps) for name, options in PACES.items()}
    worst = {name: max(w["share"] for w in workers) for name, workers in paces.items()}
    result = {
        "targets": {"share": SHARE, "pace": "default"},
        "dimension": DIMENSION,
        "density": DENSITY,
        "step_seconds": STEP_S,
        "share_max": worst,
        "step_call_ms_max": {name: max(w["step_call_ms_max"] for w in workers) for name, workers in paces.items()},
        "met": worst["default"] <= SHARE and all(w["rounds_merged"] > 0 for w in paces["default"]),
        "paces": paces,
    }
    rows = [
        (
            pace,
            w["name"],
            w["steps"],
            w["rounds_merged"],
            f"{w['step_call_ms_mean']:.3f} ms",
            f"{w['working_call_ms_median'] or 0:.2f} ms",
            f"{w['step_call_ms_max']:.2f} ms",
            f"{w['share']:.2%}",
        )
        for pace, workers in paces.items()
        for w in workers
    ]
    headings = ("pace", "worker", "steps", "rounds", "step() mean", "working call", "slowest call", "share of 50 ms")
    return _bench.finish("session_overhead", arguments, result, _bench.table(headings, rows))


if __name__ == "__main__":
    sys.exit(main())
