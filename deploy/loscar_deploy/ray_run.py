"""`loscar run --on`: the run of one machine, with its processes on the nodes of a Ray cluster."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Coroutine
from importlib import metadata
from typing import Any, TypeVar

from loscar_core.errors import ConfigError, ConnectError, InterruptedRunError, WorkerFailedError
from loscar_deploy.client import Client, FetchedModel
from loscar_deploy.options import RUN_OPTIONS
from loscar_deploy.ray_actors import Order
from loscar_deploy.ray_cluster import connected, fits, inventory, ray_errors
from loscar_deploy.ray_options import RayPlan, Resources
from loscar_deploy.ray_process import START_S, ActorAwayError, ActorGoneError, Actors, RemoteProcess
from loscar_deploy.run import TASK_OPTIONS, LocalRun, RunPlan, execute, flags_of
from loscar_deploy.run_folder import RunFolder
from loscar_deploy.table import Progress
from loscar_deploy.writers import Writers
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import parse_address

LOOK_S = 0.1
MODEL_S = 600.0
NEVER_BEGAN_S = -1.0

T = TypeVar("T")


class ServerThroughRay(Client):
    """A client of the run's server that goes through its actor: the server need not be reachable from here.

    While the server is being started again it answers with what was last known.
    """

    def __init__(self, server: RemoteProcess) -> None:
        self._server = server
        self._known = pb.StatusReply(phase="waiting", elapsed_s=NEVER_BEGAN_S)
        self._why: str | None = None

    async def status(self) -> pb.StatusReply:
        try:
            if self._why is not None:
                await self._server.call("stop_run", self._why)
                self._why = None
            reply = pb.StatusReply.FromString(await self._server.call("status"))
        except (ActorAwayError, ActorGoneError, ConnectError):
            reply = pb.StatusReply()
            reply.CopyFrom(self._known)
            return reply
        if reply.elapsed_s < 0:
            reply.elapsed_s = self._known.elapsed_s  # a run that recovers has begun before
        self._known.CopyFrom(reply)
        return reply

    async def stop(self, why: str) -> None:
        """End the run after the open round; later, when the server is not there now."""
        self._why = why

    async def fetch_model(self) -> FetchedModel:
        try:
            model: FetchedModel = await self._server.call("model", timeout_s=MODEL_S)
        except (ActorAwayError, ActorGoneError) as error:
            raise WorkerFailedError(f"the server was lost before it could hand over the model: {error}") from None
        return model

    async def close(self) -> None:
        pass


class RayRun(LocalRun):
    """Starts, watches and ends the processes of one run on a cluster.

    Args:
        plan, folder, progress, writers: as of a run on one machine.
        ray: where its processes go.
    """

    def __init__(
        self, plan: RunPlan, folder: RunFolder, progress: Progress, writers: Writers | None = None, *, ray: RayPlan
    ) -> None:
        super().__init__(plan, folder, progress, writers)
        self._ray = ray
        self._children = self._actors = Actors()
        self._run_id = secrets.token_hex(16)
        self._token = os.environ.get("LOSCAR_TOKEN") or secrets.token_hex(32)
        self._parts: list[RemoteProcess] = []
        self._listening = asyncio.Event()
        self._address = ""

    async def _start_server(self) -> str:
        """Place all actors, then start the server."""
        server = self._add("server", self._ray.server)
        self._parts = [self._add(f"w{i}", resources) for i, resources in enumerate(self._ray.workers)]
        await self._unless_interrupted(self._place())
        self._server = server
        server.order = self._server_order(None)
        server.on_start = self._server_started
        self._actors.tend(server)
        listens, ended = asyncio.create_task(self._listening.wait()), asyncio.create_task(server.wait())
        try:
            await self._unless_interrupted(
                asyncio.wait({listens, ended}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
            )
        finally:
            listens.cancel()
            ended.cancel()
        if not self._listening.is_set():
            raise WorkerFailedError(f"the server did not start: {server.last_words()}")
        return self._address

    def _client(self, address: str) -> Client:
        assert isinstance(self._server, RemoteProcess)
        return ServerThroughRay(self._server)

    async def _start_workers(self, targets: list[str]) -> None:
        for i, (part, target) in enumerate(zip(self._parts, targets, strict=True)):
            part.appended["rounds"] = self._folder.worker_rounds(part.name)
            part.fetched["result"] = self._folder.worker_result(part.name)
            if self._plan.args.keep_models:
                part.fetched["last"] = self._folder.worker_model(part.name)
            part.order = self._worker_order(i, target)
            self._workers.append(part)
            self._actors.tend(part)

    def _add(self, name: str, resources: Resources) -> RemoteProcess:
        log = self._folder.log(name)
        return self._actors.add(RemoteProcess(name, resources, self._ray.restarts, log, self._progress.say))

    async def _place(self) -> None:
        """Wait until every actor has a node.

        Raises:
            ConfigError: there is none with room for one of them, or loscar is not on it, or another version.
        """
        parts = self._actors.remote
        found = await asyncio.gather(*(p.placed(self._ray.placement_s) for p in parts), return_exceptions=True)
        ours = metadata.version("loscar")
        places = []
        waiting = [p for p, place in zip(parts, found, strict=True) if isinstance(place, ActorAwayError)]
        if waiting:
            # Others may only have been slow to start: blame one that fits nowhere, if there is one.
            part = next((p for p in waiting if not fits(p.resources)), waiting[0])
            option = "--server-resources" if part.name == "server" else "--worker-resources"
            raise ConfigError(
                f"{option}: no node had room for {part.name} ({part.resources}) within {self._ray.placement_s:g} s; "
                f"in this cluster {inventory()}"
            )
        for part, place in zip(parts, found, strict=True):
            if isinstance(place, ActorGoneError):
                raise ConfigError(f"{part.name} cannot be started on the cluster: {place}")
            if isinstance(place, ray_errors()):
                raise ConfigError(f"{part.name} cannot be started on the cluster: {str(place).splitlines()[0]}")
            if isinstance(place, BaseException):
                raise place
            if place.version != ours:
                raise ConfigError(f"{place.host} has loscar {place.version}, here it is {ours}: install the same")
            places.append(f"{part.name} on {place.host}")
        self._progress.say(f"placed: {', '.join(places)}")

    async def _unless_interrupted(self, work: Coroutine[Any, Any, T]) -> T:
        """Do what comes before the run. Raises InterruptedRunError when a signal comes."""
        task = asyncio.ensure_future(work)
        while not task.done():
            if self.signals:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise InterruptedRunError("interrupted before the run started")
            await asyncio.wait({task}, timeout=LOOK_S)
        return task.result()

    # --- orders ---------------------------------------------------------------------------------------------

    def _server_order(self, address: tuple[str, int] | None) -> Order:
        args = self._plan.args
        arguments = ["server", "--workers", str(self._plan.workers), "--linger", "10m", "--json", "--insecure"]
        arguments += ["--run-id", self._run_id, "--log-format", "json", *flags_of(args, RUN_OPTIONS)]
        if args.dashboard is not None:
            arguments.append(f"--dashboard={args.dashboard}")
        return Order(tuple(arguments), self._run_id, self._token, serves=True, address=address)

    def _worker_order(self, i: int, target: str) -> Order:
        plan, resources = self._plan, self._ray.workers[i]
        threads = max(1, int(resources.cpus))
        arguments = ["worker", "--server", target, "--name", f"w{i}", "--slot", str(i), "--workers", str(plan.workers)]
        arguments += ["--run-id", self._run_id, "--log-format", "json", "--threads", str(threads), "--parting", "0s"]
        arguments += ["--slowdown", f"{plan.slowdown[i]:g}", "--step-time", plan.args.step_time]
        arguments += [*flags_of(plan.args, TASK_OPTIONS), "--device", plan.devices[i]]
        if plan.args.download:
            arguments.append("--download")
        if plan.batch_sizes is not None:
            arguments += ["--batch-size", str(plan.batch_sizes[i])]
        files = [("--rounds-log", "rounds"), ("--result", "result")]
        if plan.args.keep_models:
            files.append(("--save-last", "last"))
        kept = (("--state", "state"),)
        return Order(tuple(arguments), self._run_id, self._token, threads, tuple(files), kept)

    def _server_started(self, told: dict[str, str]) -> None:
        """It listens: for the first time, or again."""
        if "dashboard" in told:
            self._progress.say(f"dashboard at {told['dashboard']}")
        address = told["listening"]
        assert isinstance(self._server, RemoteProcess)
        before, self._address = self._address, address
        self._listening.set()
        self._server.order = self._server_order(parse_address(address, "server"))
        if before not in ("", address):
            # On another node. Who looks for it at the old address is started again, from the state it leaves with.
            self._progress.say(f"the server is at {address} now: starting the workers again")
            for i, part in enumerate(self._parts):
                part.replace(self._worker_order(i, address))


def _try_task(plan: RunPlan, ray: RayPlan) -> None:
    """Load the task once, as its evaluation at the end will: what is wrong with it shows before anything is started.

    The folder with its code stays on the path, before everything else, as it is for the processes on the nodes.

    Raises:
        LoscarError: there is no such task here, or not its data.
    """
    from loscar_worker.tasks import load_task

    if ray.working_dir is not None:
        sys.path[:0] = [str(ray.working_dir.resolve()), os.getcwd()]
    load_task(plan.args.task, plan.args.data_dir)


def execute_on_ray(plan: RunPlan, ray: RayPlan) -> dict[str, Any]:
    """`loscar run --on`, like `execute`.

    Raises:
        LoscarError: the run could not be done; the folder holds the logs.
    """
    with connected(ray):
        _try_task(plan, ray)
        return execute(plan, run_of=lambda *parts: RayRun(*parts, ray=ray))
