"""What it costs to be a worker: joining, memory, and whether a round's checks grow with the model.

Joining: a worker with 25 M parameters comes into a run over loopback, the first one of it (its model goes to the
server) and a later one (the model comes from the server, with a living worker's unsent progress, as density 0.01 needs
it), against a bare gRPC transfer of the model's bytes in the same minute (target: at most 2 times; medians of several).

Memory: resident memory of a worker's process above the same process before it made its model, in which the libraries
have already served another run: target at most the model, one anchor and 8 buffers of K values, while rounds run at
density 0.01 by `sweep`. The most that the join takes is shown beside it.

Checks: digest and commit of rounds with equal K for two sizes of model, beside a bare scatter of the same coordinates
into the same vector, which is dearer in a larger one as it fits into no cache.

    python benchmarks/presence.py                       two minutes
    python benchmarks/presence.py --params 2.5e6 --joins 1 --rounds 10
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _bench
import numpy as np

from loscar_core.plan import RoundKind, RoundPlan
from loscar_core.replica import Replica
from loscar_core.selection import SelectionKind
from loscar_core.values import ValueType

if TYPE_CHECKING:
    from torch import nn

JOIN, BUFFERS, DENSITY = 2.0, 8, 0.01
LAYERS, STEP_S, SAMPLE_S = 4, 0.02, 0.003
COMMITTED, SIZES = 100_000, (10_000_000, 100_000_000)
HERE = Path(__file__)


@contextlib.contextmanager
def served(*pace: str) -> Iterator[str]:
    """A server's address.

    Args:
        pace: options; without them rounds follow each other as fast as `loscar server` has it by itself.
    """
    flags = ["server", "--listen", "127.0.0.1:0", "--json", "--log-level", "warning", "--workers", "1"]
    flags += ["--density", str(DENSITY), "--selection", "sweep", "--final-round", "none", "--linger", "0s"]
    server = subprocess.Popen(_bench.loscar([*flags, *pace]), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield json.loads(server.stdout.readline())["listening"]
    finally:
        server.kill()
        server.communicate()


def make_model(parameters: int) -> nn.Module:
    """Some layers with so many parameters in all, but for rounding."""
    from torch import nn

    width = max(1, round((parameters / LAYERS) ** 0.5))
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))


def joined(address: str, warm: str, parameters: int, stay: bool) -> None:
    """Join, say how long that took, and take part until the standard input is closed or, without `stay`, leave."""
    import loscar_worker

    with loscar_worker.join(warm, make_model(4)):  # libraries are loaded, the background's loop is there
        pass
    model = make_model(parameters)
    started = time.perf_counter()
    with loscar_worker.join(address, model) as session:
        took = time.perf_counter() - started
        print(json.dumps({"seconds": took, "bytes": 4 * session.layout.dimension}), flush=True)
        over = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
        while stay and not over.is_set():
            time.sleep(STEP_S)
            session.step()


def worker(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit("a worker ended before it had joined")
    found: dict[str, Any] = json.loads(line)
    return found


def joins(parameters: int, times: int) -> list[dict[str, float]]:
    """Seconds of a first and of a later join, and of a bare transfer of the model's bytes, taking turns."""
    bare = subprocess.Popen(
        [sys.executable, str(HERE.parent / "_bare_transfer.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = []
    try:
        assert bare.stdout is not None
        port = bare.stdout.readline().strip()
        for _ in range(times):
            with served() as address, served() as warm:
                common = ["--join", address, "--warm", warm, "--params", str(parameters)]
                first = worker(*common, "--stay")
                try:
                    one = said(first)
                    later = worker(*common)
                    two = said(later)
                    later.communicate()
                finally:
                    first.communicate()
            size = str(int(one["bytes"]))
            command = [sys.executable, str(HERE.parent / "_bare_transfer.py"), "--from", port, "--bytes", size]
            least = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            found.append({"first": one["seconds"], "later": two["seconds"], "bare": least})
            print({name: round(value, 3) for name, value in found[-1].items()}, file=sys.stderr, flush=True)
    finally:
        bare.communicate()
    return found


def memory(address: str, warm: str, parameters: int, rounds: int) -> None:
    """Be a worker for so many rounds; prints its resident memory in bytes above what it was without a model."""
    import psutil

    import loscar_worker

    with loscar_worker.join(warm, make_model(4)):
        pass
    me = psutil.Process()
    before = me.memory_info().rss
    samples: list[int] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            samples.append(me.memory_info().rss - before)

    merged: list[int] = []
    model = make_model(parameters)
    alone = me.memory_info().rss - before
    sampling = threading.Thread(target=sample, daemon=True)
    sampling.start()
    with loscar_worker.join(address, model, on_round=lambda record: merged.append(record.round)) as session:
        while len(merged) < rounds // 5:
            time.sleep(STEP_S)
            session.step()
        joining, first = max(samples), len(samples)
        while len(merged) < rounds:
            time.sleep(STEP_S)
            session.step()
        running = samples[first:]
        dimension = session.layout.dimension
    over.set()
    sampling.join()
    result = {"dimension": dimension, "alone": alone, "joining": joining, "peak": max(running)}
    print(json.dumps({**result, "steady": statistics.median(running)}), flush=True)


def seconds(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def commits(dimension: int, turns: int = 15) -> dict[str, Any]:
    """Milliseconds of a round's digest and commit, and of a bare scatter, with `COMMITTED` of so many coordinates."""
    replica = Replica(np.ones(dimension, np.float32), np.empty(0, np.float32))
    values = np.zeros(COMMITTED, np.float32)
    kept: dict[str, list[float]] = {"digest": [], "commit": [], "scatter": []}
    for round_ in range(1, turns + 1):
        plan = RoundPlan(round_, RoundKind.TRAIN, SelectionKind.RANDOM, COMMITTED, ValueType.FLOAT32)
        where = plan.indices(1, dimension)
        began = time.perf_counter()
        digest = replica.next_digest(plan, where, values, None)
        kept["digest"].append(time.perf_counter() - began)

        def commit(plan: RoundPlan = plan, where: Any = where, digest: int = digest) -> None:
            replica.commit(1, plan, where, values, None, digest, [b"\1"], [b"0" * 16], 1)

        kept["commit"].append(seconds(commit))
        other = RoundPlan(turns + round_, RoundKind.TRAIN, SelectionKind.RANDOM, COMMITTED, ValueType.FLOAT32)
        elsewhere = other.indices(1, dimension)
        began = time.perf_counter()
        replica.vector[elsewhere] = values
        kept["scatter"].append(time.perf_counter() - began)
    return {"dimension": dimension, **{f"{k}_ms": round(1e3 * statistics.median(v), 3) for k, v in kept.items()}}


def arguments_of() -> argparse.Namespace:
    parser = _bench.parser(__doc__)
    parser.add_argument("--params", type=float, default=25e6, help="of the model (default 25e6)")
    parser.add_argument("--joins", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--rounds", type=int, default=200, help="while memory is measured (default 200)")
    parser.add_argument("--join", metavar="ADDRESS", help="be a worker that joins there")
    parser.add_argument("--warm", metavar="ADDRESS", help="a server for a first, small session")
    parser.add_argument("--stay", action="store_true", help="take part until the standard input is closed")
    parser.add_argument("--memory", action="store_true", help="measure its memory")
    return parser.parse_args()


def main() -> int:
    arguments = arguments_of()
    parameters = int(arguments.params)
    if arguments.join and arguments.memory:
        memory(arguments.join, arguments.warm, parameters, arguments.rounds)
        return 0
    if arguments.join:
        joined(arguments.join, arguments.warm, parameters, arguments.stay)
        return 0
    pairs = joins(parameters, arguments.joins)
    with served("--local-steps", "1") as address, served() as warm:
        flags = ["--join", address, "--warm", warm, "--params", str(parameters), "--memory"]
        held = said(worker(*flags, "--rounds", str(arguments.rounds)))
    checks = [commits(size) for size in SIZES]
    ratios = {kind: statistics.median(pair[kind] / pair["bare"] for pair in pairs) for kind in ("first", "later")}
    model, buffer = 4 * held["dimension"], 4 * max(1, round(DENSITY * held["dimension"]))
    buffers = {what: (held[what] - 2 * model) / buffer for what in ("steady", "peak")}
    allowed = 2 * model + BUFFERS * buffer
    rows = [
        ["bare transfer of the model", f"{1e3 * statistics.median(p['bare'] for p in pairs):.0f} ms", "", ""],
        *(
            [
                f"joining, {'the first worker' if kind == 'first' else 'a later one'}",
                f"{1e3 * statistics.median(p[kind] for p in pairs):.0f} ms",
                f"{ratio:.2f} × the transfer",
                f"{JOIN:g} ×",
            ]
            for kind, ratio in ratios.items()
        ),
        ["memory: the model alone", f"{held['alone'] / 1e6:.1f} MB", "", ""],
        *(
            [
                f"memory: while rounds run, {'at most' if what == 'peak' else 'median'}",
                f"{held[what] / 1e6:.1f} MB",
                f"model, anchor and {buffers[what]:.1f} buffers",
                f"{BUFFERS} buffers",
            ]
            for what in ("steady", "peak")
        ),
        [
            "memory: while joining, at most",
            f"{held['joining'] / 1e6:.1f} MB",
            f"{held['joining'] / model:.2f} models",
            "",
        ],
        *(
            [
                f"{COMMITTED:,} of {check['dimension'] / 1e6:g} M coordinates: digest, commit",
                f"{check['digest_ms']:.2f} ms, {check['commit_ms']:.2f} ms",
                f"bare scatter {check['scatter_ms']:.2f} ms",
                "",
            ]
            for check in checks
        ),
    ]
    headings = ["", "measured", "is", "target at most"]
    met = max(ratios.values()) <= JOIN and held["peak"] <= allowed
    result = {
        "targets": {"join": JOIN, "buffers": BUFFERS},
        "params": held["dimension"],
        "join_ratios": {kind: round(ratio, 3) for kind, ratio in ratios.items()},
        "buffers": {what: round(count, 2) for what, count in buffers.items()},
        "met": met,
        "joins": pairs,
        "memory": held,
        "commits": checks,
        "table": {"headings": headings, "rows": rows},
    }
    return _bench.finish("presence", arguments, result, _bench.table(headings, rows))


if __name__ == "__main__":
    sys.exit(main())
