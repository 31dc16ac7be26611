"""A run of real processes whose parts fail as planned: who is started, struck, awaited, and gone at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from loscar_core.config import FinalRound, RunConfig
from loscar_core.errors import LoscarError, WorkerFailedError
from loscar_deploy.chaos_faults import LEASE_S, ChaosOptions, Fault, killable_workers
from loscar_deploy.chaos_processes import Commits, Process, free_port, living
from loscar_deploy.children import Children
from loscar_deploy.client import Client
from loscar_deploy.link import LinkProxy
from loscar_deploy.link_spec import LinkSpec
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import ClientSecurity

log = logging.getLogger("loscar.chaos")

LINKS = ("rtt=4ms,rate=50mbit", "rtt=20ms,rate=50mbit", "rtt=60ms,rate=20mbit", "rtt=120ms,rate=20mbit")
"""Unequal on purpose: a commit that has reached one worker is still on its way to the others."""

ROUND_CAP_S = 2.0
RECOVER_AFTER_S = 6.0
START_S = 120.0
SETTLE_S = 60.0
END_S = 60.0
STATUS_S = 0.1
NEXT_COMMIT_S = 3.0
"""How long a fault that is aimed at a phase of a round waits for one."""

AHEAD_S = 0.04
"""Time for a commit to reach the worker with the fastest link."""


class ChaosRun:
    """One run, disturbed by `faults`.

    Args:
        options: see `ChaosOptions`.
        folder: for logs and books; what the workers train on must be in it.
        faults: what will happen; none for an undisturbed run.

    Attributes:
        injected: faults that hit somebody, by kind.
        phases: of those that hit while rounds went on, how many in each quarter of a round.
        failures: what went wrong.
        seconds: from the run's start until everybody was back after the last fault.
    """

    def __init__(self, options: ChaosOptions, folder: Path, faults: list[Fault]) -> None:
        self.folder = folder
        self.injected: Counter[str] = Counter()
        self.phases = [0, 0, 0, 0]
        self.failures: list[str] = []
        self.seconds = 0.0
        self.config = RunConfig(seed=options.seed, density=0.1, local_steps=5, rounds=None, final_round=FinalRound.NONE)
        self._options = options
        self._faults = faults
        self._children = Children()
        self._port = free_port()
        self._links = [
            LinkProxy("127.0.0.1", self._port, LinkSpec.parse(LINKS[-1 - i % len(LINKS)]), seed=options.seed * 1000 + i)
            for i in range(options.workers)
        ]
        self.server = Process("server")
        self.workers = [Process(f"w{i}") for i in range(options.workers)]
        self._commits = Commits(folder / "events.jsonl")
        self._ending = False
        self._client = Client(f"127.0.0.1:{self._port}", ClientSecurity())

    async def run(self) -> None:
        """Start, disturb, settle, end; everything is gone afterwards, however it went.

        Raises:
            WorkerFailedError: the run did not start, did not settle, or did not end.
        """
        tasks: list[asyncio.Task[None]] = []
        try:
            for link in self._links:
                await link.start()
            tasks.append(asyncio.create_task(self._supervise(self.server, self._server_command)))
            for i, worker in enumerate(self.workers):
                tasks.append(asyncio.create_task(self._supervise(worker, self._worker_command(i))))
            tasks.append(asyncio.create_task(self._commits.watch()))
            await self._until("the run to start", START_S, lambda s: s.phase == "running" and s.round >= 1)
            started = time.monotonic()
            await self._disturb(started)
            await self._settle()
            self.seconds = time.monotonic() - started
            self._ending = True
            await self._client.stop("the chaos is over")
            await self._ended()
        finally:
            self._ending = True
            for process in (self.server, *self.workers):
                process.signal(signal.SIGCONT)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()
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
        flags += ["--start-grace", "500ms", "--linger", "10m", "--events", str(self.folder / "events.jsonl"), "--json"]
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
            await asyncio.gather(*pending)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _inject(self, fault: Fault) -> None:
        if fault.phase is not None and await self._commits.next(NEXT_COMMIT_S):
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
            case "server killed, one worker ahead":
                return await self._leave_one_ahead(fault.duration_s)
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
        return process.signal(signal.SIGKILL)

    async def _leave_one_ahead(self, away_s: float) -> bool:
        """Lose a commit on its way to all but the worker with the fastest link, with the server; keep that one away
        until the others have gone on without it."""
        ahead = len(LINKS) - 1
        for link in self._links[:ahead] + self._links[ahead + 1 :]:
            link.reset_connections()
        hit = self._kill(self.server, 0.0)
        await asyncio.sleep(AHEAD_S)
        return await self._pause(self.workers[ahead], away_s) or hit

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
        with contextlib.suppress(LoscarError):
            return await self._client.status()
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
        goal = self._options.calm_rounds + (0 if reply is None else reply.round)
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

    def left_behind(self) -> list[str]:
        """Processes that still live, and files that should not be there."""
        pids = {c.process.pid for c in self._children.all}
        processes = [f"process {pid} {command}" for pid, command in living(self.folder, pids)]
        return processes + [f"file {p.relative_to(self.folder)}" for p in sorted(self.folder.rglob("*.part"))]
