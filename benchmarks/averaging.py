"""One averaging of the same vector among four processes on this machine: ours, the floor, gloo and torchft.

Ours are the load test's synthetic workers, each in a process of its own: the time from a round's opening to its commit,
with every check and digest. Dense as float32, bfloat16 and int8, and a hundredth of the coordinates by each selection.
The floor of each case is a bare gRPC echo of the same bytes in messages of 1 MiB by as many clients, and a gather and a
scatter of the same coordinates in NumPy (target: at most 1.3 times the floor). gloo's is a dense float32 all-reduce
(`torch.distributed`); torchft's, where it is installed (`loscar[bench]`), is a sync of its LocalSGD and of its DiLoCo
over gloo. All take turns; the figures are medians over the turns. With fewer coordinates than a million the target is
that dense float32 takes no longer than gloo.

    python benchmarks/averaging.py                        about six minutes
    python benchmarks/averaging.py --params 250e3 --rounds 100
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import _bench
import _torchft
import goodput
import numpy as np

from loscar_core.plan import RoundKind, RoundPlan
from loscar_core.selection import SelectionKind
from loscar_core.values import ValueType, payload_size

TARGET = 1.3
SMALL = 1_000_000
PROCESSES = 4
TORCHFT = {"localsgd": "torchft LocalSGD", "diloco": "torchft DiLoCo"}
CASES = {
    "dense float32": ("all", 1.0, "float32"),
    "dense bfloat16": ("all", 1.0, "bfloat16"),
    "dense int8": ("all", 1.0, "int8"),
    "0.01 random": ("random", 0.01, "float32"),
    "0.01 sweep": ("sweep", 0.01, "float32"),
    "0.01 block": ("block", 0.01, "float32"),
}


def ours(case: tuple[str, float, str], coordinates: int, rounds: int) -> float:
    """Milliseconds of a round, median over rounds and workers."""
    selection, density, dtype = case
    flags = ["--density", str(density), "--selection", selection, "--wire-dtype", dtype]
    return goodput.ours(coordinates, rounds, flags, selection, density)["round_ms"]


def floor_ms(case: tuple[str, float, str], coordinates: int, rounds: int) -> float:
    """Milliseconds of an echo of the same bytes, and of a gather and a scatter of the same coordinates."""
    selection, density, dtype = case
    kind, count = SelectionKind(selection), max(1, round(density * coordinates))
    plan = RoundPlan(1, RoundKind.TRAIN, kind, count, ValueType(dtype))
    where = plan.where(1, coordinates)
    vector = np.zeros(coordinates, np.float32)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        vector[where] = vector[where]
        times.append(time.perf_counter() - started)
    size = payload_size(ValueType(dtype), count)
    return goodput.echo(-(-size // 4), rounds)["round_ms"] + 1e3 * statistics.median(times)


def gloo(coordinates: int, rounds: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank"]
        own = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        rest = ["--store", str(Path(folder) / "store"), "--params", str(coordinates), "--rounds", str(rounds)]
        started = [
            subprocess.Popen([*command, str(rank), *rest], stdout=subprocess.PIPE, text=True, env=own)
            for rank in range(PROCESSES)
        ]
        said = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            sys.exit("gloo's processes failed")
        return statistics.median(json.loads(text) for text in said)


def gloo_rank(rank: int, store: str, coordinates: int, rounds: int) -> None:
    """One of gloo's processes; prints the median of its milliseconds."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    vector = torch.zeros(coordinates)
    times = []
    for number in range(rounds + 2):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(vector)
        vector /= PROCESSES
        if number >= 2:
            times.append(1e3 * (time.perf_counter() - started))
    dist.barrier()
    dist.destroy_process_group()
    print(statistics.median(times))


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--params", type=float, default=25e6, help="coordinates (default 25e6)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each turn (default 5)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--rank", type=int, help="be one of gloo's processes")
    parser.add_argument("--store", help="where they find each other")
    arguments = parser.parse_args()
    coordinates, rounds = int(arguments.params), arguments.rounds
    if arguments.rank is not None:
        gloo_rank(arguments.rank, arguments.store, coordinates, rounds)
        return 0
    others = {"gloo": lambda: gloo(coordinates, rounds)}
    if _torchft.installed():
        for kind, label in TORCHFT.items():
            others[label] = partial(_torchft.averaging_ms, kind, PROCESSES, coordinates, rounds)
    turns: list[dict[str, Any]] = []
    for _ in range(arguments.turns):
        turn: dict[str, Any] = {name: measure() for name, measure in others.items()}
        for name, case in CASES.items():
            turn[name] = ours(case, coordinates, rounds), floor_ms(case, coordinates, rounds)
        turns.append(turn)
        print(turn, file=sys.stderr, flush=True)
    rows, cases = [], {}
    done = {name: [turn for turn in turns if turn[name] is not None] for name in others}
    taken = {name: statistics.median(turn[name] for turn in done[name]) for name in others if done[name]}
    for name in ("gloo", *TORCHFT.values()):
        if name not in taken:
            why = "failed" if name in others else "not installed"
            rows.append([f"{name}, dense float32", why, "", "", ""])
            continue
        to_gloo = statistics.median(turn["gloo"] / turn[name] for turn in done[name])
        rows.append([f"{name}, dense float32", f"{taken[name]:.1f}", "", "", f"{to_gloo:.2f}"])
    for name in CASES:
        own = statistics.median(turn[name][0] for turn in turns)
        ratio = statistics.median(turn[name][0] / turn[name][1] for turn in turns)
        to_gloo = statistics.median(turn["gloo"] / turn[name][0] for turn in turns)
        floor = statistics.median(turn[name][1] for turn in turns)
        cases[name] = {"ms": round(own, 2), "floor_ms": round(floor, 2), "ratio": round(ratio, 3)}
        cases[name]["times_as_fast_as_gloo"] = round(to_gloo, 3)
        rows.append([name, f"{own:.1f}", f"{floor:.1f}", f"{ratio:.2f}", f"{to_gloo:.2f}"])
    headings = ["", "ms", "floor ms", "× floor", "× as fast as gloo"]
    worst = max(case["ratio"] for case in cases.values())
    to_gloo = cases["dense float32"]["times_as_fast_as_gloo"]
    small = coordinates < SMALL
    text = (
        _bench.table(headings, rows) + f"\nat worst {worst:.2f} × the floor" + ("" if small else f" (target {TARGET})")
    )
    text += f"\ndense float32 {to_gloo:.2f} × as fast as gloo" + (" (target 1)" if small else "")
    result = {
        "targets": {"dense float32 against gloo": 1.0} if small else {"floor": TARGET},
        "coordinates": coordinates,
        "others_ms": {name: round(ms, 2) for name, ms in taken.items()},
        "cases": cases,
        "worst": worst,
        "met": to_gloo >= 1 if small else worst <= TARGET,
        "turns": turns,
        "table": {"headings": headings, "rows": rows},
    }
    name = "averaging" if coordinates == 25_000_000 else f"averaging_{coordinates}"
    return _bench.finish(name, arguments, result, text)


if __name__ == "__main__":
    sys.exit(main())
