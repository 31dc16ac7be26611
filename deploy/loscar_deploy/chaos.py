"""`loscar chaos`: a run on this machine whose processes and links fail at random, and an audit of what became of it.

Real processes: one server that a supervisor starts again whenever it dies (by turns with its disk and without), and
workers behind a link proxy each. For some time they are killed, stopped and continued, cut off and reset, at random
phases of rounds; then everything is left in peace, the run is ended, and the books are balanced (see `audit`). The
schedule follows from the seed; what it meets depends on the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loscar_core.config import FinalRound, RunConfig
from loscar_core.errors import LoscarError, WorkerFailedError
from loscar_deploy.children import Child, Children
from loscar_deploy.client import Client
from loscar_deploy.link import LinkProxy
from loscar_deploy.link_spec import LinkSpec
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import ClientSecurity

log = logging.getLogger("loscar.chaos")

LEASE_S = 5.0
ROUND_CAP_S = 2.0
RECOVER_AFTER_S = 6.0
START_S = 120.0
SETTLE_S = 60.0
END_S = 60.0
POLL_S = 0.005
STATUS_S = 0.1
KILLABLE = 0.5
"""Share of the workers that may be killed; the ledgers of the others are balanced from their first step on."""

KINDS = {
    "worker killed": 3.0,
    "worker stopped": 3.0,
    "link cut": 3.0,
    "link reset": 3.0,
    "server killed": 3.0,
    "server stopped": 1.5,
    "server cut off": 1.0,
    "server's links reset": 1.5,
    "server and worker killed": 1.0,
}


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """One chaos run.

    Attributes:
        seconds: how long faults are injected.
        workers: how many.
        seed: of the schedule, the run and the models.
        faults_per_s: mean rate.
        step_time_s: floor under a step's time.
        undisturbed: compare with a run of equal duration in peace.
        out: keep the logs and books here; None uses a folder that is removed.
    """

    seconds: float = 60.0
    workers: int = 8
    seed: int = 0
    faults_per_s: float = 0.8
    step_time_s: float = 0.01
    undisturbed: bool = True
    out: Path | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault.

    Attributes:
        at_s: when, from the run's start.
        kind: see `KINDS`.
        worker: whom it hits, where it hits one.
        duration_s: how long a pause or cut lasts, or a dead process stays dead.
        phase: None to strike at once, else this share of a usual round after the next commit.
        up, down: directions of a cut.
    """

    at_s: float
    kind: str
    worker: int
    duration_s: float
    phase: float | None
    up: bool
    down: bool


def plan_faults(options: ChaosOptions) -> list[Fault]:
    """The schedule: every kind comes once, if there is time for all, before any comes again."""
    rng = random.Random(f"chaos/{options.seed}")
    killable = killable_workers(options)
    first = list(KINDS)
    rng.shuffle(first)
    kinds = itertools.chain(first, iter(lambda: rng.choices(list(KINDS), list(KINDS.values()))[0], None))
    faults: list[Fault] = []
    at_s = 0.0
    for kind in kinds:
        at_s += rng.expovariate(options.faults_per_s)
        if at_s >= options.seconds:
            break
        victims = killable if kind in ("worker killed", "server and worker killed") else range(options.workers)
        both = rng.random() < 0.5
        faults.append(
            Fault(
                at_s,
                kind,
                rng.choice(list(victims)),
                _duration(rng, kind),
                rng.random() if rng.random() < 0.6 else None,
                up=both or rng.random() < 0.5,
                down=True,
            )
        )
    return [f if f.up or rng.random() < 0.5 else Fault(*_swapped(f)) for f in faults]


def _swapped(f: Fault) -> tuple[float, str, int, float, float | None, bool, bool]:
    return f.at_s, f.kind, f.worker, f.duration_s, f.phase, True, False


def _duration(rng: random.Random, kind: str) -> float:
    """Mostly short; some long enough to be suspended, a few longer than a lease."""
    if "killed" in kind:
        return rng.choice((0.0, rng.uniform(0.0, 1.0), rng.uniform(1.0, 3.0)))
    draw = rng.random()
    if draw < 0.5:
        return rng.uniform(0.02, 0.6)
    return rng.uniform(0.6, 3.0) if draw < 0.85 else LEASE_S * rng.uniform(1.1, 1.5)


def killable_workers(options: ChaosOptions) -> list[int]:
    return list(range(max(1, round(options.workers * KILLABLE))))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Process:
    """A process that is started again when it dies, until it ends by itself."""

    name: str
    child: Child | None = None
    starts: int = 0
    down_s: float = 0.0
    """How long it stays down once it has been killed."""
    killed: bool = False
    kills: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def signal(self, number: int) -> bool:
        """False when it is not there."""
        if self.child is None or self.child.returncode is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            self.child.process.send_signal(number)
            return True
        return False


class Commits:
    """Watches the event log for committed rounds, so that faults can be aimed at a phase of a round."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._times: list[float] = []
        self._condition = asyncio.Condition()
        self.count = 0

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            if not self._path.exists() or self._path.stat().st_size <= self._offset:
                continue
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
            whole = data.rfind(b"\n") + 1
            self._offset += whole
            new = data[:whole].count(b'{"event":"round"')
            if new:
                async with self._condition:
                    self.count += new
                    self._times = [*self._times[-15:], time.monotonic()]
                    self._condition.notify_all()

    @property
    def usual_s(self) -> float:
        """A usual round's length."""
        gaps = sorted(b - a for a, b in itertools.pairwise(self._times))
        return gaps[len(gaps) // 2] if gaps else 0.1

    def phase(self) -> float | None:
        """How far the open round is, in usual rounds; None when rounds stand still."""
        if not self._times:
            return None
        phase = (time.monotonic() - self._times[-1]) / max(self.usual_s, 1e-3)
        return phase if phase < 2 else None

    async def next(self, timeout_s: float) -> None:
        """Until the next commit, or the time is over."""
        count = self.count
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._condition:
                await self._condition.wait_for(lambda: self.count > count)


class ChaosRun:
    """One run, disturbed by `faults`.

    Args:
        options: see `ChaosOptions`.
        folder: for logs and books; made.
        faults: what will happen; none for an undisturbed run.
    """

    def __init__(self, options: ChaosOptions, folder: Path, faults: list[Fault]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.injected: Counter[str] = Counter()
        self.phases = [0, 0, 0, 0]
        self.failures: list[str] = []
        self.seconds = 0.0
        self.config = RunConfig(
            seed=options.seed, density=0.1, local_steps=10, rounds=None, final_round=FinalRound.NONE
        )
        self._options = options
        self._faults = faults
        self._children = Children()
        self._port = free_port()
        self._rng = random.Random(f"chaos/links/{options.seed}")
        self._links = [
            LinkProxy("127.0.0.1", self._port, LinkSpec.parse("rtt=20ms,rate=50mbit"), seed=options.seed * 1000 + i)
            for i in range(options.workers)
        ]
        self.server = Process("server")
        self.workers = [Process(f"w{i}") for i in range(options.workers)]
        self._commits = Commits(folder / "events.jsonl")
        self._ending = False
        self._client: Client | None = None

    async def run(self) -> None:
        """Start, disturb, settle, end; everything is gone afterwards, however it went.

        Raises:
            WorkerFailedError: the run did not start, did not settle, or did not end.
        """
        tasks: list[asyncio.Task[None]] = []
        self._client = client = Client(f"127.0.0.1:{self._port}", ClientSecurity())
        try:
            for link in self._links:
                await link.start()
            tasks.append(asyncio.create_task(self._supervise(self.server, self._server_command)))
            for i, worker in enumerate(self.workers):
                command = self._worker_command(i)
                tasks.append(asyncio.create_task(self._supervise(worker, command)))
            watching = asyncio.create_task(self._commits.watch())
            tasks.append(watching)
            await self._until("the run to start", START_S, lambda s: s.phase == "running" and s.round >= 1)
            started = time.monotonic()
            await self._disturb(started)
            await self._settle()
            self.seconds = time.monotonic() - started
            self._ending = True
            await client.stop("the chaos is over")
            await self._ended()
        finally:
            self._ending = True
            for process in (self.server, *self.workers):
                process.signal(signal.SIGCONT)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.close()
            await self._children.stop_all()
            for link in self._links:
                await link.close()

    # --- processes ------------------------------------------------------------------------------------------

    def _server_command(self, start: int) -> list[str]:
        config = self.config
        flags = ["--listen", f"127.0.0.1:{self._port}", "--run-id", f"chaos-{self._options.seed}"]
        flags += ["--workers", str(self._options.workers), "--seed", str(config.seed), "--density", f"{config.density}"]
        flags += ["--local-steps", str(config.local_steps), "--final-round", config.final_round.value]
        flags += ["--lease", f"{LEASE_S}s", "--round-cap", f"{ROUND_CAP_S}s", "--recover-after", f"{RECOVER_AFTER_S}s"]
        flags += ["--start-grace", "1s", "--linger", "10m", "--events", str(self.folder / "events.jsonl"), "--json"]
        if start % 2 == 0:
            flags += ["--checkpoints", str(self.folder / "checkpoints"), "--checkpoint-every", "1s", "--resume"]
        return ["loscar_deploy", "server", *flags]

    def _worker_command(self, i: int) -> Callable[[int], list[str]]:
        options = self._options
        host, port = self._links[i].address
        flags = ["--server", f"{host}:{port}", "--name", f"w{i}", "--slot", str(i), "--folder", str(self.folder)]
        flags += ["--workers", str(options.workers), "--seed", str(options.seed)]
        flags += ["--step-time", f"{options.step_time_s}"]
        if i in killable_workers(options) and i % 2 == 0:
            flags += ["--state", str(self.folder / f"w{i}.state")]  # comes back as itself; the odd ones start afresh
        return lambda start: ["loscar_deploy.chaos_worker", *flags]

    async def _supervise(self, process: Process, command: Callable[[int], list[str]]) -> None:
        """Keep a process running; only who was killed by us may die."""
        while True:
            module, *arguments = command(process.starts)
            process.killed = False
            log_path = self.folder / f"{process.name}.log"
            process.child = await self._children.start(process.name, arguments, log_path, module=module)
            process.starts += 1
            status = await process.child.process.wait()
            if self._ending or (status == 0 and not process.killed):
                process.ended.set()
                return
            if not process.killed:
                self.failures.append(f"{process.name} ended with status {status}: {process.child.last_words()}")
                process.down_s = 0.5
            await asyncio.sleep(process.down_s)

    # --- faults ---------------------------------------------------------------------------------------------

    async def _disturb(self, started: float) -> None:
        pending: set[asyncio.Task[None]] = set()
        try:
            for fault in self._faults:
                await asyncio.sleep(max(0.0, started + fault.at_s - time.monotonic()))
                pending.add(asyncio.create_task(self._inject(fault)))
            await asyncio.sleep(max(0.0, started + self._options.seconds - time.monotonic()))
            if pending:
                await asyncio.wait(pending)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _inject(self, fault: Fault) -> None:
        if fault.phase is not None:
            await self._commits.next(1.0)
            await asyncio.sleep(fault.phase * min(self._commits.usual_s, 1.0))
        phase = self._commits.phase()
        if not await self._strike(fault):
            return  # nobody there to be hit
        self.injected[fault.kind] += 1
        if phase is not None:
            self.phases[min(3, int(phase * 4))] += 1
        log.info("%.1f s: %s (w%d, %.2f s)", fault.at_s, fault.kind, fault.worker, fault.duration_s)

    async def _strike(self, fault: Fault) -> bool:
        worker, link = self.workers[fault.worker], self._links[fault.worker]
        match fault.kind:
            case "worker killed":
                return self._kill(worker, fault.duration_s)
            case "server killed":
                return self._kill(self.server, fault.duration_s)
            case "server and worker killed":
                hit = self._kill(worker, fault.duration_s)
                return self._kill(self.server, fault.duration_s / 2) or hit
            case "worker stopped":
                return await self._pause(worker, fault.duration_s)
            case "server stopped":
                return await self._pause(self.server, fault.duration_s)
            case "link cut":
                link.cut(fault.duration_s, up=fault.up, down=fault.down)
            case "link reset":
                link.reset_connections()
            case "server cut off":
                for each in self._links:
                    each.cut(fault.duration_s, up=fault.up, down=fault.down)
            case "server's links reset":
                for each in self._links:
                    each.reset_connections()
        return True

    def _kill(self, process: Process, down_s: float) -> bool:
        process.killed, process.down_s = True, down_s
        hit = process.signal(signal.SIGKILL)
        process.kills += hit
        return hit

    async def _pause(self, process: Process, duration_s: float) -> bool:
        stopped = process.child
        if not process.signal(signal.SIGSTOP):
            return False
        try:
            await asyncio.sleep(duration_s)
        finally:
            if process.child is stopped:
                process.signal(signal.SIGCONT)
        return True

    # --- the end --------------------------------------------------------------------------------------------

    async def _status(self) -> pb.StatusReply | None:
        assert self._client is not None
        try:
            return await self._client.status()
        except LoscarError:
            return None

    async def _until(self, what: str, timeout_s: float, condition: Callable[[pb.StatusReply], bool]) -> None:
        """Ask for the status until the condition holds."""
        reply = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    reply = await self._status()
                    if reply is not None and condition(reply):
                        return
                    if any(w.ended.is_set() for w in self.workers):
                        raise WorkerFailedError(f"a worker ended while waiting for {what}")
                    await asyncio.sleep(STATUS_S)
        except TimeoutError:
            states = "" if reply is None else f": {reply.phase}, {[(m.name, m.state) for m in reply.members]}"
            raise WorkerFailedError(f"waited {timeout_s:g} s for {what}{states}") from None

    async def _settle(self) -> None:
        """Until everybody takes part again and rounds are closed by all."""
        everybody = self._options.workers

        def all_active(reply: pb.StatusReply) -> bool:
            return reply.phase == "running" and sum(m.state == "active" for m in reply.members) == everybody

        await self._until("everybody to be back", SETTLE_S, all_active)
        reply = await self._status()
        goal = 0 if reply is None else reply.round + 3
        await self._until("rounds to go on", SETTLE_S, lambda s: s.round >= goal and all_active(s))

    async def _ended(self) -> None:
        """Until every worker has ended by itself."""
        try:
            async with asyncio.timeout(END_S):
                for worker in self.workers:
                    await worker.ended.wait()
        except TimeoutError:
            left = [w.name for w in self.workers if not w.ended.is_set()]
            raise WorkerFailedError(f"{', '.join(left)} did not end within {END_S:g} s") from None

    def left_behind(self) -> dict[str, list[str]]:
        """Processes that still live, and files that should not be there."""
        pids = {c.process.pid for c in self._children.all}
        return {
            "processes": [f"{pid} {command}" for pid, command in _processes(self.folder, pids)],
            "files": [str(p.relative_to(self.folder)) for p in self.folder.rglob("*.part")],
        }


def _processes(folder: Path, pids: set[int]) -> Iterator[tuple[int, str]]:
    """Living processes that are ours: by number, and (where /proc tells) by the folder on their command line."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, 0)  # each child leads a group of its own
            yield pid, "(one of ours)"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            pid = int(path.parent.name)
            if str(folder) in command and pid != os.getpid():
                yield pid, command


async def _attempt(run: ChaosRun) -> None:
    try:
        await run.run()
    except LoscarError as error:
        run.failures.append(str(error))


async def execute(options: ChaosOptions) -> dict[str, Any]:
    """Run, audit, compare; returns the verdict."""
    import torch

    from loscar_deploy.audit import audit
    from loscar_worker.model import ModelView
    from loscar_worker.tasks import load_task

    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp(prefix="loscar-chaos-")) if options.out is None else options.out
    task = load_task("digits", None)
    names = [f"w{i}" for i in range(options.workers)]
    try:
        run = ChaosRun(options, base / "disturbed", plan_faults(options))
        await _attempt(run)
        model = task.make_model(options.seed)
        view = ModelView(model)
        result = audit(run.folder, names, run.config, view.vector())
        failures = run.failures + result.failures

        def accuracy(found: Any) -> float | None:
            if found.live_mean is None:
                return None
            view.load_vector(found.live_mean.astype("float32"))
            return task.evaluate(model).accuracy

        left = run.left_behind()
        failures += [f"left behind: {text}" for texts in left.values() for text in texts]
        verdict: dict[str, Any] = {
            "seed": options.seed,
            "workers": options.workers,
            "seconds": round(run.seconds, 1),
            "faults": dict(run.injected),
            "faults_total": sum(run.injected.values()),
            "faults_by_quarter_of_round": run.phases,
            "server_starts": run.server.starts,
            "worker_starts": [w.starts for w in run.workers],
            **result.figures(),
            "accuracy": accuracy(result),
            "accuracy_undisturbed": None,
            "left_behind": left,
        }
        if options.undisturbed and not run.failures:
            peaceful = ChaosOptions(run.seconds, options.workers, options.seed, step_time_s=options.step_time_s)
            other = ChaosRun(peaceful, base / "undisturbed", [])
            await _attempt(other)
            compared = audit(other.folder, names, other.config, _initial(task, options.seed))
            failures += [f"undisturbed: {text}" for text in other.failures + compared.failures]
            verdict["accuracy_undisturbed"] = accuracy(compared)
            verdict["rounds_undisturbed"] = compared.figures()["rounds"]
        reached, expected = verdict["accuracy"], verdict["accuracy_undisturbed"]
        if reached is not None and expected is not None and reached < expected - 0.01:
            failures.append(f"accuracy {reached:.4f} where the undisturbed run reached {expected:.4f}")
        verdict["failures"] = failures
        verdict["passed"] = not failures
        (base / "verdict.json").write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")
        return verdict
    finally:
        if options.out is None:
            shutil.rmtree(base, ignore_errors=True)


def _initial(task: Any, seed: int) -> Any:
    from loscar_worker.model import ModelView

    return ModelView(task.make_model(seed)).vector()


def print_verdict(verdict: dict[str, Any]) -> None:
    """For people."""
    out = sys.stdout
    print(f"chaos with seed {verdict['seed']}: {verdict['workers']} workers, {verdict['seconds']} s", file=out)
    for kind, count in sorted(verdict["faults"].items()):
        print(f"  {count:4d} × {kind}", file=out)
    print(
        f"  {verdict['faults_total']} faults injected, by quarter of a round "
        f"{'/'.join(map(str, verdict['faults_by_quarter_of_round']))}",
        file=out,
    )
    print(
        f"  {verdict['rounds']} rounds closed, {verdict['rounds_abandoned']} more abandoned and undone; "
        f"{verdict['server_starts']} server processes",
        file=out,
    )
    print(
        f"  {verdict['contributions_in_consensus']} contributions in the consensus, "
        f"{verdict['contributions_lost']} lost, {verdict['contributions_doubled']} counted twice",
        file=out,
    )
    for ledger in verdict["ledger"]:
        note = "resumed, not balanced" if ledger["resumed"] else f"out of balance by {ledger['error']:.1e}"
        print(
            f"  {ledger['name']}: {ledger['steps']} steps, {ledger['sent']} contributions sent, "
            f"{ledger['in_consensus']} in the consensus; {note}",
            file=out,
        )
    if verdict["accuracy"] is not None:
        other = verdict["accuracy_undisturbed"]
        text = "" if other is None else f", undisturbed {other:.4f}"
        print(f"  accuracy of the live models' average {verdict['accuracy']:.4f}{text}", file=out)
    for text in verdict["failures"]:
        print(f"  FAILED: {text}", file=out)
    print("passed" if verdict["passed"] else "failed", file=out)
