"""`loscar loadtest`: many synthetic workers on one server, and what a round then costs.

A synthetic worker is the worker's engine and its connection on the real wire, without a model: its anchor is all zeros,
which take no memory until they are written to, its contributions are zeros of the real size, and it checks every answer
and digest like any other. Several hundred of them fit into one process. What is measured is the service: the time from
a round's opening to its commit as each worker sees it, and the server's processor time and memory.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loscar_core.buffers import Buffers
from loscar_core.errors import ConfigError, LoscarError, WorkerFailedError
from loscar_core.layout import Layout, Segment
from loscar_core.messages import Reason, WorkerReport
from loscar_core.plan import RoundPlan
from loscar_core.replica import Floats, Replica, Where
from loscar_core.selection import SelectionKind
from loscar_core.worker_effects import ProgressWanted, RoundOpen, RunEnded, Update, WorkerEffect
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_holdings import MESSAGE_BYTES
from loscar_core.worker_ledger import Ledger
from loscar_deploy.children import Child, Children
from loscar_deploy.link import LinkFarm
from loscar_deploy.link_spec import LinkSpec
from loscar_deploy.loadtest_echo import echo_cost
from loscar_wire.transport import ClientSecurity, format_address, parse_address
from loscar_worker.connection import Connection, ConnectionOptions

if TYPE_CHECKING:
    import psutil

MOST_WORKERS = 1024
WARM_UP = 0.1
PERCENTILES = (50, 95, 99)
SAMPLE_S = 0.1
NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One load test.

    Attributes:
        workers: synthetic workers, all in this process.
        dimension: coordinates of the model.
        density: share of them that a round carries.
        selection: how they are chosen.
        rounds: how many are measured; a tenth more come before, to warm up.
        link: what lies between each worker and the server.
        pause_s: from a round's commit to a worker's next contribution.
        server: HOST:PORT of one that is there, or None to start one.
        security: token and certificates for it.
        reference: measure a bare echo of the same bytes as well.
    """

    workers: int = 16
    dimension: int = 25_000_000
    density: float = 0.001
    selection: SelectionKind = SelectionKind.SWEEP
    rounds: int = 200
    link: LinkSpec = field(default_factory=lambda: LinkSpec.parse("none"))
    pause_s: float = 0.0
    server: str | None = None
    security: ClientSecurity = field(default_factory=ClientSecurity)
    reference: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= MOST_WORKERS:
            raise ConfigError(f"--workers {self.workers}: a load test has 1 to {MOST_WORKERS} in its one process")
        if self.server is not None:
            check_near(self.server)


def check_near(server: str) -> None:
    """Raises ConfigError for an address that is not this machine's or a private network's: a load test is no attack."""
    host, port = parse_address(server, "--server")
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise ConfigError(f"--server {server}: {error.strerror or error}") from None
    far = [text for text in sorted(found) if not ipaddress.ip_address(text.partition("%")[0]).is_private]
    if far:
        raise ConfigError(f"--server {server} is {far[0]}, a public address: load tests stay in one's own network")


class ZeroReplica(Replica):
    """An anchor of zeros, whose pages are never touched: commits of zeros leave it as it is."""

    @classmethod
    def of(cls, dimension: int, digest: int) -> ZeroReplica:
        return cls(np.zeros(dimension, np.float32), NOTHING, digest=digest)

    def gather(self, plan: RoundPlan, indices: Where, start: int, stop: int) -> Floats:
        return np.broadcast_to(np.float32(0.0), stop - start)

    def commit(self, epoch: int, plan: RoundPlan, indices: Where, values: Floats, *rest: Any) -> None:
        if values.size and (values.max() > 0.0 or values.min() < 0.0):
            raise WorkerFailedError("somebody else trains in this run: a load test needs a run of its own")
        # A round of one value, which is there to be written to, does the rest.
        vector, self.vector = self.vector, np.zeros(1, np.float32)
        try:
            super().commit(epoch, plan, np.zeros(1, np.int64), np.zeros(1, np.float32), *rest)
        finally:
            self.vector = vector


class ZeroLedger(Ledger):
    """Of contributions that are all zeros: there is nothing in them to be taken back, for which a vector of the model's
    size would be needed."""

    def forget(self, round_: int, *_: Any) -> None:
        self.forget_before(round_, young=False)


class SyntheticWorker:
    """One of the workers; runs until the run is over or enough rounds are measured.

    Attributes:
        seconds: from opening to commit, of each round after the warm-up.
    """

    def __init__(self, test: LoadTest, number: int) -> None:
        plan = test.plan
        self.seconds: list[float] = []
        self._test = test
        layout = Layout((Segment("w", (plan.dimension,), "float32"),), ())
        name = f"load-{os.getpid()}-{number}"
        self._engine = WorkerEngine(name, os.urandom(16), layout, np.zeros(1, np.float32), NOTHING)
        self._engine.anchor = ZeroReplica.of(plan.dimension, test.digest)
        self._engine.ledger = ZeroLedger()
        self._opened = (0, 0.0)
        self._connection: Connection | None = None
        self._later: asyncio.TimerHandle | None = None
        self._buffers = Buffers()

    async def live(self, address: str) -> None:
        options = ConnectionOptions((address,), self._test.plan.security)
        self._connection = Connection(self._engine, options, self._on_effect, WorkerReport)
        running = asyncio.create_task(self._connection.run())
        over = asyncio.create_task(self._test.over.wait())
        try:
            await asyncio.wait({running, over}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                self._connection.leave(Reason.FINISHED)
            await running
        finally:
            for task in (running, over):
                task.cancel()
            await asyncio.gather(running, over, return_exceptions=True)
            if self._later is not None:
                self._later.cancel()

    def _on_effect(self, effect: WorkerEffect) -> None:
        match effect:
            case RoundOpen():
                self._opened = effect.plan.round, time.perf_counter()
                if not effect.contributed:
                    pause = self._test.plan.pause_s
                    self._later = asyncio.get_running_loop().call_later(pause, self._contribute, effect)
            case Update(round=round_) if round_ > 0:
                if round_ == self._opened[0]:
                    self._test.note(self, round_, time.perf_counter() - self._opened[1])
            case ProgressWanted():
                raise WorkerFailedError("the server wants a synthetic worker's progress: start all workers at a time")
            case RunEnded():
                self._test.over.set()
            case _:
                pass

    def _contribute(self, opened: RoundOpen) -> None:
        assert self._connection is not None
        zeros = self._buffers.take(opened.size)
        zeros.fill(0.0)
        effects = self._engine.snapshot(opened.plan.round, zeros, NOTHING, 1, 0, opened.opening)
        if effects:
            self._test.contributions += 1
            self._connection.carry_out(effects)


class LoadTest:
    """Runs a plan; use once.

    Attributes:
        plan: what.
        over: set when enough rounds are measured.
        contributions: sent by all workers.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self.plan = plan
        self.over = asyncio.Event()
        self.contributions = 0
        self.digest = _zeros_digest(plan.dimension)
        self._warm = max(1, int(plan.rounds * WARM_UP))
        self._first = 0
        self._round = 0
        self._started = 0.0
        self._ended = 0.0
        self._contributions_before = 0
        self._cpu: tuple[float, float] = (0.0, 0.0)
        self._peak_bytes = 0
        self._server: psutil.Process | None = None
        self._workers: list[SyntheticWorker] = []

    def note(self, worker: SyntheticWorker, round_: int, seconds: float) -> None:
        """A worker has seen a round from its opening to its commit."""
        self._first = self._first or round_
        if round_ >= self._first + self._warm:
            worker.seconds.append(seconds)
        if round_ <= self._round:
            return
        self._round = round_
        if round_ == self._first + self._warm - 1:
            self._started, self._contributions_before = time.perf_counter(), self.contributions
            self._cpu = self._server_cpu_s(), 0.0
        elif round_ >= self._first + self._warm + self.plan.rounds - 1 and not self._ended:
            self._ended = time.perf_counter()
            self._cpu = self._cpu[0], self._server_cpu_s()
            self.contributions -= self._contributions_before
            self.over.set()

    def _server_cpu_s(self) -> float:
        if self._server is None:
            return 0.0
        times = self._server.cpu_times()
        return times.user + times.system

    async def run(self) -> dict[str, Any]:
        """The result, in the form of the command's JSON.

        Raises:
            LoscarError: the server or a worker ended with one.
        """
        children = Children()
        with tempfile.TemporaryDirectory(prefix="loscar-load-") as scratch:
            try:
                address = self.plan.server
                if address is None:
                    address = await self._start_server(children, Path(scratch))
                await self._drive(address)
            finally:
                await children.stop_all()
        reference = None
        if self.plan.reference:
            reference = await echo_cost(self.plan.workers, self._message_sizes(), self.plan.rounds)
        return self._result(reference)

    async def _start_server(self, children: Children, folder: Path) -> str:
        plan = self.plan
        flags = ["server", "--listen", "127.0.0.1:0", "--json", "--log-level", "warning", "--final-round", "none"]
        flags += ["--workers", str(plan.workers), "--density", str(plan.density), "--selection", plan.selection.value]
        flags += ["--linger", "1s", "--streams-per-host", str(2 * MOST_WORKERS), "--joins-per-second", "10000"]
        child = await children.start("server", flags, folder / "server.log", read_stdout=True)
        line = await child.process.stdout.readline() if child.process.stdout is not None else b""
        if not line:
            raise _failed(child)
        import psutil  # whoever measures a server that is there does without it

        self._server = psutil.Process(child.process.pid)
        address: str = json.loads(line)["listening"]
        return address

    async def _drive(self, address: str) -> None:
        host, port = parse_address(address, "--server")
        plan = self.plan
        farm = None
        targets = [address] * plan.workers
        if str(plan.link) != str(LinkSpec.parse("none")):
            farm = LinkFarm(host, port, [plan.link] * plan.workers)
            targets = [format_address("127.0.0.1", at) for at in await farm.start()]
        sampling = asyncio.create_task(self._sample())
        self._workers = [SyntheticWorker(self, i) for i in range(plan.workers)]
        tasks = [asyncio.create_task(w.live(t)) for w, t in zip(self._workers, targets, strict=True)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in (*tasks, sampling):
                task.cancel()
            await asyncio.gather(*tasks, sampling, return_exceptions=True)
            if farm is not None:
                await farm.close()
        if not self._ended:
            raise WorkerFailedError(f"the run was over after {self._round} rounds, before enough were measured")

    async def _sample(self) -> None:
        while self._server is not None:
            self._peak_bytes = max(self._peak_bytes, self._server.memory_info().rss)
            await asyncio.sleep(SAMPLE_S)

    # --- what came of it ------------------------------------------------------------------------------------

    @property
    def _coordinates(self) -> int:
        return max(1, round(self.plan.density * self.plan.dimension))

    def _message_sizes(self) -> list[int]:
        whole, rest = divmod(4 * self._coordinates, MESSAGE_BYTES)
        return [MESSAGE_BYTES] * whole + ([rest] if rest else [])

    def _result(self, reference: tuple[float, list[float]] | None) -> dict[str, Any]:
        plan, seconds = self.plan, self._ended - self._started
        times = np.concatenate([np.asarray(w.seconds) for w in self._workers]) * 1e3
        payload = 4 * self._coordinates * (self.contributions + plan.rounds * plan.workers)
        result: dict[str, Any] = {
            "workers": plan.workers,
            "dimension": plan.dimension,
            "coordinates": self._coordinates,
            "link": str(plan.link),
            "rounds": plan.rounds,
            "seconds": round(seconds, 3),
            "rounds_per_s": round(plan.rounds / seconds, 3),
            "contributions": self.contributions,
            "round_ms": _percentiles(times),
            "payload_bytes_per_s": round(payload / seconds),
            "server_cpu_ms_per_contribution": None,
            "server_peak_bytes": None,
            "model_bytes": 4 * plan.dimension,
            "echo_cpu_ms_per_contribution": None,
            "echo_ms": None,
            "cpu_ratio": None,
        }
        if self._server is not None:
            cpu = (self._cpu[1] - self._cpu[0]) / max(1, self.contributions) * 1e3
            result["server_cpu_ms_per_contribution"] = round(cpu, 4)
            result["server_peak_bytes"] = self._peak_bytes
        if reference is not None:
            result["echo_cpu_ms_per_contribution"] = round(1e3 * reference[0], 4)
            result["echo_ms"] = _percentiles(np.asarray(reference[1]) * 1e3)
            if self._server is not None and reference[0] > 0:
                result["cpu_ratio"] = round(result["server_cpu_ms_per_contribution"] / (1e3 * reference[0]), 3)
        return result


def _zeros_digest(dimension: int) -> int:
    """The digest of a model of zeros before round 1; computed once, in pieces."""
    piece, digest, left = bytes(1 << 22), 0, 4 * dimension
    while left > 0:
        digest = zlib.crc32(piece[:left], digest)
        left -= len(piece)
    return digest


def _percentiles(values: Any) -> dict[str, float]:
    return {f"p{p}": round(float(v), 3) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def _failed(child: Child) -> LoscarError:
    return WorkerFailedError(f"the server of the load test ended: {child.last_words()}")


def lines_of(result: dict[str, Any]) -> Sequence[str]:
    """The result for people."""
    r = result["round_ms"]
    told = [
        f"{result['workers']} workers, {result['coordinates']:,} of {result['dimension']:,} coordinates a round, "
        f"link {result['link']}",
        f"{result['rounds']} rounds in {result['seconds']:.1f} s: {result['rounds_per_s']:.1f} a second, "
        f"{result['payload_bytes_per_s'] / 1e6:.1f} MB/s of payload in and out",
        f"a round takes {r['p50']:.1f} / {r['p95']:.1f} / {r['p99']:.1f} ms (50 / 95 / 99 %)",
    ]
    if result["server_cpu_ms_per_contribution"] is not None:
        told.append(
            f"server: {result['server_cpu_ms_per_contribution']:.2f} ms of processor time for each contribution, "
            f"{result['server_peak_bytes'] / 1e6:.0f} MB at most (the model has {result['model_bytes'] / 1e6:.0f} MB)"
        )
    if result["echo_ms"] is not None:
        e = result["echo_ms"]
        told.append(
            f"a bare echo of the same bytes: {e['p50']:.1f} / {e['p95']:.1f} / {e['p99']:.1f} ms, "
            f"{result['echo_cpu_ms_per_contribution']:.2f} ms of processor time"
            + (f"; ratio {result['cpu_ratio']:.2f}" if result["cpu_ratio"] is not None else "")
        )
    return told


async def run_load_test(plan: LoadPlan, *, as_json: bool) -> int:
    """Run and print it."""
    result = await LoadTest(plan).run()
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        print("\n".join(lines_of(result)), file=sys.stdout, flush=True)
    return 0
