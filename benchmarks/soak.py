"""A hundred thousand rounds with workers that come and go: does the server stay as small and as quick as it was?

One `loscar server` process on the loopback, and 32 synthetic workers in this process: the worker's engine and its
connection on the real wire, without a model. A worker contributes at once whenever a round opens, so rounds follow
one another as fast as they can. After some hundred rounds it goes: a third say goodbye, a third are cut off and come
back as they were, a third are cut off and forgotten; the next one has the old name or a new one. d = 4096, K = 205.

Targets: the server's resident memory never exceeds what it was after the first tenth of the rounds by more than 5 %,
and the median, 95th and 99th percentile of the time from a contribution to its round's commit are in the last tenth
within 20 % of the first.

Other processes on the machine change latencies by far more than that. So every 40 rounds, while no round is under way,
each worker also sends a message of the same size through a bare gRPC echo (32 streams, one process, no protocol): the
*reference*. Where the plain percentiles are off, the target counts as met when those divided by the reference's of the
same tenth are within 20 %; the result says which. The server's CPU time for each round is shown beside.

    python benchmarks/soak.py                     10^5 rounds, half an hour on a quiet machine
    python benchmarks/soak.py --rounds 2000       a look
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import subprocess
import sys
import time
from typing import Any

import _bench
import numpy as np
import psutil
import uvloop
from _soak_echo import Echo

from loscar_core.errors import LoscarError
from loscar_core.layout import Layout, Segment
from loscar_core.messages import Reason, WorkerReport
from loscar_core.worker_effects import ProgressWanted, RoundOpen, RunEnded, Update, WorkerEffect
from loscar_core.worker_engine import WorkerEngine
from loscar_worker.connection import Connection, ConnectionOptions

MEMORY = 0.05
LATENCY = 0.20
WORKERS = 32
DIMENSION = 4096
DENSITY = 0.05
LIFE_ROUNDS = 400
AWAY_S = 1.0
REFERENCE_EVERY = 40
TENTHS = 10
PERCENTILES = (50, 95, 99)
LAYOUT = Layout((Segment("w", (DIMENSION,), "float32"),))
NOTHING = np.empty(0, np.float32)


class Worker:
    """One of the synthetic workers: many lives, one after the other."""

    def __init__(self, soak: Soak, number: int) -> None:
        self._soak = soak
        self._number = number
        self._names = 0
        self._rng = random.Random(soak.seed * 1000 + number)
        self._noise = np.random.default_rng(number).normal(size=DIMENSION).astype(np.float32) * np.float32(1e-3)
        self._engine: WorkerEngine | None = None
        self._connection: Connection | None = None
        self._rounds_left = 0
        self._going = asyncio.Event()
        self._sent: tuple[int, float] = (0, 0.0)

    def _new_engine(self) -> WorkerEngine:
        if self._rng.random() < 0.5:
            self._names += 1
        name = f"w{self._number}.{self._names}"
        return WorkerEngine(name, os.urandom(16), LAYOUT, np.zeros(DIMENSION, np.float32), NOTHING)

    async def live(self, address: str) -> None:
        """Come and go until the run is over."""
        options = ConnectionOptions((address,), connect_timeout_s=600.0)
        while not self._soak.over:
            if self._engine is None:
                self._engine = self._new_engine()
            self._connection = Connection(self._engine, options, self._on_effect, WorkerReport)
            self._rounds_left = 1 + int(self._rng.expovariate(1 / LIFE_ROUNDS))
            self._going.clear()
            self._soak.present += 1
            running = asyncio.create_task(self._connection.run())
            leaving = asyncio.create_task(self._going.wait())
            await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            self._soak.present -= 1
            await self._go(running)
            if not self._soak.over:
                await asyncio.sleep(self._rng.uniform(0.0, 2 * AWAY_S))

    async def _go(self, running: asyncio.Task[None]) -> None:
        assert self._connection is not None
        how = self._rng.choice(("leaves", "is cut off", "is lost"))
        if self._soak.over or how == "leaves":
            self._connection.leave(Reason.FINISHED if self._soak.over else Reason.LEFT)
        else:
            running.cancel()
        if not running.done():
            self._soak.departures[how] += 1
        try:
            await running
        except asyncio.CancelledError:
            pass
        except LoscarError as error:
            self._soak.errors.append(f"{type(error).__name__}: {error}")
            how = "is lost"
        if how != "is cut off":
            self._engine = None

    def _on_effect(self, effect: WorkerEffect) -> None:
        assert self._engine is not None
        assert self._connection is not None
        match effect:
            case RoundOpen():
                if not effect.contributed and not self._soak.held(self, effect):
                    self.contribute(effect)
            case Update(round=round_) if round_ > 0:
                if round_ == self._sent[0]:
                    self._soak.note(round_, time.perf_counter() - self._sent[1])
                self._rounds_left -= 1
                if self._rounds_left == 0:
                    self._going.set()
            case ProgressWanted():
                self._connection.carry_out(self._engine.progress(self._engine.anchor.vector))
            case RunEnded():
                self._soak.over = True
                self._going.set()
            case _:
                pass

    def contribute(self, opened: RoundOpen) -> None:
        """A small step on the open round's coordinates, if it is still open."""
        engine, plan = self._engine, opened.plan
        if engine is None or self._connection is None:
            return
        size = opened.indices.size
        values = engine.anchor.gather(plan, opened.indices, 0, size) + self._noise[:size]
        effects = engine.snapshot(plan.round, values, NOTHING, 1, 0, opened.opening)
        if effects:
            self._sent = plan.round, time.perf_counter()
            self._connection.carry_out(effects)


class Soak:
    """The whole measurement."""

    def __init__(self, rounds: int, seed: int) -> None:
        self.rounds = rounds
        self.seed = seed
        self.over = False
        self.present = 0
        self.round = 0
        self.departures = {"leaves": 0, "is cut off": 0, "is lost": 0}
        self.errors: list[str] = []
        self.latencies: list[list[float]] = [[] for _ in range(TENTHS)]
        self.references: list[list[float]] = [[] for _ in range(TENTHS)]
        self.samples: list[tuple[int, float, int, float, int]] = []  # round, time, resident bytes, CPU s, present
        self._echo = Echo(WORKERS)
        self._held: list[tuple[Worker, RoundOpen]] = []
        self._held_round = 0
        self._releasing: asyncio.Task[None] | None = None

    def note(self, round_: int, seconds: float) -> None:
        self.round = max(self.round, round_)
        self.latencies[self._tenth(round_)].append(seconds)

    def _tenth(self, round_: int) -> int:
        return min(TENTHS - 1, (round_ - 1) * TENTHS // self.rounds)

    def held(self, worker: Worker, opened: RoundOpen) -> bool:
        """Whether a contribution has to wait: every so many rounds the reference is measured before anybody sends."""
        round_ = opened.plan.round
        if round_ % REFERENCE_EVERY or round_ < self._held_round:
            return False
        if round_ > self._held_round:
            self._held_round = round_
            self._held.clear()
            self._releasing = asyncio.create_task(self._release(round_))
        elif self._releasing is None:
            return False
        self._held.append((worker, opened))
        return True

    async def _release(self, round_: int) -> None:
        self.references[self._tenth(round_)] += await self._echo.round_trips()
        self._releasing = None
        held, self._held = self._held, []
        for worker, opened in held:
            worker.contribute(opened)

    def _start_server(self) -> subprocess.Popen[str]:
        options = ["--listen", "127.0.0.1:0", "--json", "--log-level", "warning", "--density", str(DENSITY)]
        options += ["--rounds", str(self.rounds), "--final-round", "none", "--start-grace", "1s", "--linger", "1s"]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        return subprocess.Popen(_bench.loscar(["server", *options]), stdout=subprocess.PIPE, text=True, env=environment)

    async def run(self) -> None:
        server = self._start_server()
        try:
            assert server.stdout is not None
            address = json.loads(server.stdout.readline())["listening"]
            await self._echo.open()
            sampling = asyncio.create_task(self._sample(psutil.Process(server.pid)))
            await asyncio.gather(*(Worker(self, i).live(address) for i in range(WORKERS)))
            sampling.cancel()
            await asyncio.to_thread(server.wait, 60)
        finally:
            await self._echo.close()
            if server.poll() is None:
                server.kill()
                server.wait()

    async def _sample(self, server: psutil.Process) -> None:
        said = 0
        while True:
            with server.oneshot():
                times = server.cpu_times()
                sample = (server.memory_info().rss, times.user + times.system)
            self.samples.append((self.round, time.perf_counter(), *sample, self.present))
            if self._tenth(max(1, self.round)) > said:
                said += 1
                print(f"{self.round} rounds, {sample[0] / 1e6:.1f} MB", file=sys.stderr, flush=True)
            await asyncio.sleep(0.25)

    # --- what came of it ------------------------------------------------------------------------------------

    def tenths(self) -> list[dict[str, Any]]:
        found = []
        for i in range(TENTHS):
            inside = [s for s in self.samples if s[0] > 0 and self._tenth(s[0]) == i]
            if len(inside) < 2 or not self.latencies[i] or not self.references[i]:
                raise SystemExit(f"tenth {i + 1} was too short to measure: ask for more rounds")
            first, last = inside[0], inside[-1]
            rounds = max(1, last[0] - first[0])
            plain = np.percentile(self.latencies[i], PERCENTILES) * 1e3
            reference = np.percentile(self.references[i], PERCENTILES) * 1e3
            found.append(
                {
                    "rounds_per_s": round(rounds / (last[1] - first[1]), 2),
                    "members": round(sum(s[4] for s in inside) / len(inside), 1),
                    "latency_ms": dict(zip(map(str, PERCENTILES), plain.round(3).tolist(), strict=True)),
                    "reference_ms": dict(zip(map(str, PERCENTILES), reference.round(3).tolist(), strict=True)),
                    "contributions": len(self.latencies[i]),
                    "server_cpu_ms_a_round": round((last[3] - first[3]) / rounds * 1e3, 3),
                    "server_rss_bytes_max": max(s[2] for s in inside),
                    "server_rss_bytes_end": last[2],
                }
            )
        return found

    def result(self) -> dict[str, Any]:
        tenths = self.tenths()
        first, last = tenths[0], tenths[-1]
        memory = max(t["server_rss_bytes_max"] for t in tenths[1:]) / first["server_rss_bytes_end"] - 1
        plain = {p: last["latency_ms"][p] / first["latency_ms"][p] - 1 for p in map(str, PERCENTILES)}
        relative = {
            p: (last["latency_ms"][p] / last["reference_ms"][p]) / (first["latency_ms"][p] / first["reference_ms"][p])
            - 1
            for p in map(str, PERCENTILES)
        }
        by = "plain" if _within(plain) else "reference" if _within(relative) else None
        return {
            "targets": {"memory_growth": MEMORY, "latency_change": LATENCY},
            "workers": WORKERS,
            "dimension": DIMENSION,
            "density": DENSITY,
            "rounds": self.round,
            "departures": self.departures,
            "memory_growth": round(memory, 4),
            "latency_change": {p: round(v, 4) for p, v in plain.items()},
            "latency_change_by_reference": {p: round(v, 4) for p, v in relative.items()},
            "latency_met_by": by,
            "server_cpu_change": round(last["server_cpu_ms_a_round"] / first["server_cpu_ms_a_round"] - 1, 4),
            "errors": self.errors[:20],
            "met": memory <= MEMORY and by is not None and not self.errors and self.round >= self.rounds,
            "tenths": tenths,
            "table": {"headings": HEADINGS, "rows": rows_of(tenths)},
        }


def _within(changes: dict[str, float]) -> bool:
    return all(1 / (1 + LATENCY) - 1 <= change <= LATENCY for change in changes.values())


HEADINGS = ("tenth", "rounds/s", "workers", "ms p50/p95/p99", "echo p50/p95/p99", "server CPU ms", "max RSS MB")


def rows_of(tenths: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for i, t in enumerate(tenths):
        plain, reference = t["latency_ms"].values(), t["reference_ms"].values()
        rows.append(
            [
                str(i + 1),
                f"{t['rounds_per_s']:.1f}",
                f"{t['members']:.1f}",
                "/".join(f"{v:.1f}" for v in plain),
                "/".join(f"{v:.1f}" for v in reference),
                f"{t['server_cpu_ms_a_round']:.2f}",
                f"{t['server_rss_bytes_max'] / 1e6:.1f}",
            ]
        )
    return rows


def text_of(result: dict[str, Any]) -> str:
    def changes(values: dict[str, float]) -> str:
        return ", ".join(f"p{p} {v:+.1%}" for p, v in values.items())

    return (
        f"{_bench.table(HEADINGS, result['table']['rows'])}\n"
        f"memory after the first tenth: {result['memory_growth']:+.1%} at most\n"
        f"latency, last tenth to first: {changes(result['latency_change'])}; "
        f"relative to the echo {changes(result['latency_change_by_reference'])}; "
        f"server CPU a round {result['server_cpu_change']:+.1%}\n"
        f"departures {sum(result['departures'].values())}, errors {len(result['errors'])}"
        + "".join(f"\n  {e}" for e in result["errors"])
    )


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--rounds", type=lambda text: int(float(text)), default=100_000, help="rounds (default 10^5)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    soak = Soak(arguments.rounds, arguments.seed)
    uvloop.run(soak.run())
    result = soak.result()
    return _bench.finish("soak", arguments, result, text_of(result))


if __name__ == "__main__":
    sys.exit(main())
