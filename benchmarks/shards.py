"""One server against two shards on the machine's cores: rounds a second, and whose processor time they are.

Four client processes, each with a synthetic worker for every shard, average 25 M coordinates densely and a hundredth of
them, with one server and with two shards that have half of the coordinates each. With two cores, servers and clients
share them, so that rounds a second alone would say little: processor seconds of the servers and of the clients for a
round of the whole model are counted apart, and from them what two shards could gain at most where every server has a
core of its own and clients are elsewhere. There is no target. One and two servers take turns; medians.

    python benchmarks/shards.py                          two to three minutes
    python benchmarks/shards.py --params 2.5e6 --turns 1 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _bench
import numpy as np
import psutil
import uvloop

from loscar_core.layout import Layout, Segment, Shard
from loscar_core.selection import SelectionKind
from loscar_core.worker_engine import WorkerEngine
from loscar_deploy.loadtest import NOTHING, LoadPlan, LoadTest, SyntheticWorker, ZeroReplica

CLIENTS = 4
# selection, density, rounds of a turn
CASES = {"dense": ("all", 1.0, 6), "0.01 sweep": ("sweep", 0.01, 60)}


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class ShardTest(LoadTest):
    """A load test's rounds with one shard, driven by one worker of this process.

    Attributes:
        window: seconds of the clock, of this process and of each server when the measured rounds began and ended.
    """

    def __init__(self, plan: LoadPlan, servers: list[psutil.Process]) -> None:
        super().__init__(plan)
        self._servers = servers
        self.window: list[list[float]] = []

    def note(self, worker: SyntheticWorker, round_: int, seconds: float) -> None:
        super().note(worker, round_, seconds)
        if (self._started and not self.window) or (self._ended and len(self.window) == 1):
            self.window.append([time.monotonic(), time.process_time(), *map(cpu_s, self._servers)])


class ShardWorker(SyntheticWorker):
    """A synthetic worker's half for one shard of a model."""

    def __init__(self, test: ShardTest, name: str, whole: Layout, shard: Shard) -> None:
        super().__init__(test, 0)
        layout = shard.layout(whole)
        self._engine = WorkerEngine(name, os.urandom(16), layout, np.zeros(1, np.float32), NOTHING, shard=shard)
        self._engine.anchor = ZeroReplica.of(layout.dimension, test.digest)


async def client(number: int, addresses: list[str], pids: list[int], dimension: int, case: str, rounds: int) -> None:
    """One client; prints when its measured rounds began and ended, and what they took of the processors."""
    selection, density, _ = CASES[case]
    whole = Layout((Segment("w", (dimension,), "float32"),), ())
    servers = [psutil.Process(pid) for pid in pids]
    tests, running = [], []
    for index, address in enumerate(addresses):
        shard = Shard(index, len(addresses))
        first, end = shard.span(dimension)
        plan = LoadPlan(1, end - first, density, SelectionKind(selection), rounds, server=address, reference=False)
        tests.append(ShardTest(plan, servers))
        running.append(ShardWorker(tests[-1], f"client-{number}", whole, shard).live(address))
    await asyncio.gather(*running)
    began = min(test.window[0] for test in tests)
    ended = max(test.window[1] for test in tests)
    print(json.dumps({"began": began, "ended": ended}), flush=True)


def measure(case: str, shards: int, dimension: int, rounds: int) -> dict[str, Any]:
    """A turn: rounds a second, and processor seconds a round of the clients and of each server."""
    selection, density, _ = CASES[case]
    flags = ["server", "--listen", "127.0.0.1:0", "--json", "--log-level", "warning", "--workers", str(CLIENTS)]
    flags += ["--density", str(density), "--selection", selection, "--final-round", "none", "--linger", "0s"]
    servers: list[subprocess.Popen[str]] = []
    try:
        addresses = []
        for index in range(shards):
            own = ["--shard", f"{index}/{shards}", "--run-id", "bench"] if shards > 1 else []
            servers.append(subprocess.Popen(_bench.loscar([*flags, *own]), stdout=subprocess.PIPE, text=True))
            out = servers[-1].stdout
            assert out is not None
            addresses.append(json.loads(out.readline())["listening"])
        command = [sys.executable, str(Path(__file__)), "--client", ";".join(addresses), "--case", case]
        command += ["--pids", *(str(server.pid) for server in servers), "--params", str(dimension)]
        command += ["--rounds", str(rounds), "--number"]
        started = [
            subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in range(CLIENTS)
        ]
        said = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            sys.exit("a client failed")
    finally:
        for server in servers:
            server.kill()
        for server in servers:
            server.communicate()
    found = [json.loads(text) for text in said]
    began, ended = min(f["began"] for f in found), max(f["ended"] for f in found)
    per_server = [(after - before) / rounds for before, after in zip(began[2:], ended[2:], strict=True)]
    return {
        "rounds_per_s": rounds / (ended[0] - began[0]),
        "clients_cpu_s": sum(f["ended"][1] - f["began"][1] for f in found) / rounds,
        "servers_cpu_s": sum(per_server),
        "busiest_cpu_s": max(per_server),
    }


def arguments_of() -> argparse.Namespace:
    parser = _bench.parser(__doc__)
    parser.add_argument("--params", type=float, default=25e6, help="coordinates (default 25e6)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--rounds", type=int, help="of each turn (default 6 dense ones, 60 sparse ones)")
    parser.add_argument("--client", metavar="ADDRESSES", help="be a client of the servers there")
    parser.add_argument("--case", choices=CASES, default="dense", help="what its rounds carry")
    parser.add_argument("--pids", type=int, nargs="+", default=[], help="the servers' processes")
    parser.add_argument("--number", type=int, default=0, help="which client")
    return parser.parse_args()


def main() -> int:
    arguments = arguments_of()
    dimension = int(arguments.params)
    if arguments.client:
        addresses = arguments.client.split(";")
        uvloop.run(client(arguments.number, addresses, arguments.pids, dimension, arguments.case, arguments.rounds))
        return 0
    runs: list[dict[str, Any]] = []
    for _ in range(arguments.turns):
        for case in CASES:
            for shards in (1, 2):
                runs.append(
                    {
                        "case": case,
                        "servers": shards,
                        **measure(case, shards, dimension, arguments.rounds or CASES[case][2]),
                    }
                )
                told = {k: round(v, 4) if isinstance(v, float) else v for k, v in runs[-1].items()}
                print(told, file=sys.stderr, flush=True)

    def median(case: str, shards: int, what: str) -> float:
        return statistics.median(r[what] for r in runs if (r["case"], r["servers"]) == (case, shards))

    rows, gains = [], {}
    for case in CASES:
        gain = median(case, 2, "rounds_per_s") / median(case, 1, "rounds_per_s")
        most = median(case, 1, "busiest_cpu_s") / median(case, 2, "busiest_cpu_s")
        gains[case] = {"here": round(gain, 3), "at_most": round(most, 3)}
        for shards in (1, 2):
            rate, servers = median(case, shards, "rounds_per_s"), median(case, shards, "servers_cpu_s")
            clients = median(case, shards, "clients_cpu_s")
            rows.append(
                [
                    case,
                    str(shards),
                    f"{rate:.2f}",
                    f"{1e3 * servers:.1f}",
                    f"{1e3 * clients:.1f}",
                    f"{rate * (servers + clients):.2f}",
                    "" if shards == 1 else f"{gain:.2f}",
                    "" if shards == 1 else f"{most:.2f}",
                ]
            )
    headings = ["", "servers", "rounds/s", "servers' CPU ms a round", "clients' CPU ms a round", "cores busy"]
    headings += ["× rounds/s of one server", "× at most, a core each"]
    result = {
        "targets": {},
        "coordinates": dimension,
        "clients": CLIENTS,
        "gains": gains,
        "met": True,
        "runs": runs,
        "table": {"headings": headings, "rows": rows},
    }
    return _bench.finish("shards", arguments, result, _bench.table(headings, rows))


if __name__ == "__main__":
    sys.exit(main())
