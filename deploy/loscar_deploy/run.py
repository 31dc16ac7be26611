"""`loscar run`: a whole run on this machine, with real processes and an emulated link for each worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loscar_core.config import RunConfig
from loscar_core.errors import ConnectError, InterruptedRunError, LoscarError, WorkerFailedError, all_errors
from loscar_deploy.children import Child, Children
from loscar_deploy.client import Client
from loscar_deploy.link import LinkFarm
from loscar_deploy.link_spec import LinkSpec
from loscar_deploy.model_file import load_model, save_model
from loscar_deploy.options import RUN_OPTIONS
from loscar_deploy.run_folder import RunFolder
from loscar_deploy.table import Progress
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import ClientSecurity, parse_address

POLL_S = 0.25
METRICS_EVERY_S = 1.0
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0

_NOT_SAVED = ("handler", "exit_with_parent", "log_level", "json")
_TASK_OPTIONS = ("task", "data_dir", "batch_size", "lr", "partition", "seed")


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run on this machine, checked.

    Attributes:
        args: the command line.
        config: what the server will announce.
        workers: how many.
        links: each worker's; None without emulation.
        slowdown: each worker's.
        target_loss: test loss of the live models' average that ends the run, or None.
    """

    args: Namespace
    config: RunConfig
    workers: int
    links: tuple[LinkSpec, ...] | None
    slowdown: tuple[float, ...]
    target_loss: float | None


def _flags(args: Namespace, names: Iterable[str]) -> list[str]:
    """Options as the children's command lines take them."""
    flags: list[str] = []
    for name in names:
        value = getattr(args, name)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


class LocalRun:
    """Starts, watches and ends the processes of one run."""

    def __init__(self, plan: RunPlan, folder: RunFolder, progress: Progress) -> None:
        self._plan = plan
        self._folder = folder
        self._progress = progress
        self._children = Children()
        self._server: Child | None = None
        self._workers: list[Child] = []
        self._farm: LinkFarm | None = None
        self._last: pb.StatusReply | None = None
        self._reported: set[str] = set()
        self._evaluator: Child | None = None
        self._seconds_to_target: float | None = None
        self._signals = 0
        self._asked_to_stop = False
        self._forced = asyncio.Event()

    async def run(self) -> dict[str, Any]:
        """The whole run; returns the summary without the model's figures.

        Raises:
            WorkerFailedError: a worker could not even start, or none is left.
            InterruptedRunError: it was forced to end.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            address = await self._start_server()
            targets = await self._start_links(address)
            client = Client(address, ClientSecurity())
            try:
                await self._start_workers(targets)
                await self._start_evaluator()
                await self._watch(client)
                model = await client.fetch_model()
                assert self._last is not None
                save_model(self._folder.model, model, self._last.run_id.hex())
                await self._await_workers()
            finally:
                await client.close()
            return self._summary()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            await self._children.stop_all()
            if self._farm is not None:
                await self._farm.close()
            for i in range(self._plan.workers):
                self._folder.worker_slots(f"w{i}").unlink(missing_ok=True)

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals == 1:
            self._progress.say("ending the run after this round; once more to stop at once")
        else:
            self._forced.set()
            self._children.kill_all()

    # --- starting -------------------------------------------------------------------------------------------

    async def _start_server(self) -> str:
        args = self._plan.args
        flags = ["--listen", "127.0.0.1:0", "--workers", str(self._plan.workers), "--linger", "10m", "--json"]
        flags += _flags(args, RUN_OPTIONS)
        log = self._folder.log("server")
        self._server = server = await self._children.start("server", ["server", *flags], log, read_stdout=True)
        assert server.process.stdout is not None
        with contextlib.suppress(TimeoutError):
            line = await asyncio.wait_for(server.process.stdout.readline(), START_TIMEOUT_S)
            if line:
                address: str = json.loads(line)["listening"]
                return address
        raise WorkerFailedError(f"the server did not start: {server.last_words()}")

    async def _start_links(self, address: str) -> list[str]:
        if self._plan.links is None:
            return [address] * self._plan.workers
        host, port = parse_address(address, "server")
        self._farm = LinkFarm(host, port, self._plan.links, seed=self._plan.config.seed)
        return [f"127.0.0.1:{p}" for p in await self._farm.start()]

    async def _start_workers(self, targets: list[str]) -> None:
        args, folder = self._plan.args, self._folder
        for i, target in enumerate(targets):
            name = f"w{i}"
            flags = ["--server", target, "--name", name, "--slot", str(i), "--workers", str(self._plan.workers)]
            flags += ["--slowdown", f"{self._plan.slowdown[i]:g}", "--step-time", args.step_time, "--threads", "1"]
            flags += ["--result", str(folder.worker_result(name)), "--rounds-log", str(folder.worker_rounds(name))]
            flags += [*_flags(args, _TASK_OPTIONS), "--device", args.device]
            if self._plan.config.evaluate_every:
                flags += ["--evaluation", str(folder.worker_slots(name))]
            self._workers.append(await self._children.start(name, ["worker", *flags], folder.log(name)))

    async def _start_evaluator(self) -> None:
        if not self._plan.config.evaluate_every:
            return
        folder, args = self._folder, self._plan.args
        slots = [str(folder.worker_slots(f"w{i}")) for i in range(self._plan.workers)]
        flags = [*slots, "--out", str(folder.evaluations), *_flags(args, ("task", "data_dir"))]
        log = folder.log("evaluator")
        self._evaluator = await self._children.start("evaluator", flags, log, module="loscar_deploy.evaluator")

    def _target_reached(self) -> bool:
        """Look at new evaluations; the first at or below the target ends the run."""
        if self._seconds_to_target is None and self._plan.target_loss is not None:
            for line in self._folder.read_evaluations():
                if line["loss"] <= self._plan.target_loss:
                    self._seconds_to_target = line["elapsed_s"]
                    self._progress.say(f"target reached at {line['elapsed_s']:.2f} s: test loss {line['loss']:.4f}")
                    return True
        return False

    # --- watching -------------------------------------------------------------------------------------------

    async def _watch(self, client: Client) -> None:
        """Until the run is over on the server."""
        metrics_at = -METRICS_EVERY_S
        while True:
            self._check_children()
            reply = await self._status(client)
            if reply.phase == "finished" and self._last is not None:
                # Workers that have heard of the end are gone already: show them as they were.
                del reply.members[:]
                reply.members.extend(self._last.members)
            self._last = reply
            if reply.phase != "finished":
                self._progress.show(reply)
            if reply.elapsed_s - metrics_at >= METRICS_EVERY_S:
                metrics_at = reply.elapsed_s
                self._folder.append_metrics(reply)
            if reply.phase == "finished":
                self._folder.append_metrics(reply)
                self._progress.show(reply, last=True)
                return
            if self._target_reached() and not self._asked_to_stop:
                self._asked_to_stop = True
                await client.stop("the target loss is reached")
            if self._signals and not self._asked_to_stop:
                self._asked_to_stop = True
                if reply.elapsed_s < 0:
                    raise InterruptedRunError("interrupted before the run started")
                await client.stop("interrupted")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._forced.wait(), POLL_S)
            if self._forced.is_set():
                raise InterruptedRunError("forced to end before the final round")

    async def _status(self, client: Client) -> pb.StatusReply:
        try:
            return await client.status()
        except ConnectError:
            self._check_children()
            if self._forced.is_set():
                raise InterruptedRunError("forced to end before the final round") from None
            raise

    def _check_children(self) -> None:
        """Say who died; end the run when it cannot go on."""
        assert self._server is not None
        if self._forced.is_set():
            raise InterruptedRunError("forced to end before the final round")
        if self._server.returncode is not None:
            raise WorkerFailedError(
                f"the server ended with status {self._server.returncode}: {self._server.last_words()}"
            )
        started = self._last is not None and self._last.elapsed_s >= 0
        for child in self._workers:
            if child.returncode is None or child.name in self._reported:
                continue
            self._reported.add(child.name)
            if child.returncode == 0 and started:
                continue
            text = f"{child.name} ended with status {child.returncode}: {child.last_words()}"
            if not started:
                # The start waits for all workers: without this one it would wait for ever.
                raise _failure(text, child.returncode)
            self._progress.say(text)
        if self._workers and all(c.returncode is not None for c in self._workers) and not self._finished():
            raise WorkerFailedError("no worker is left")

    def _finished(self) -> bool:
        return self._last is not None and self._last.phase == "finished"

    async def _await_workers(self) -> None:
        """Let the workers hear of the end and write their figures."""
        waits = [asyncio.create_task(c.process.wait()) for c in self._workers if c.returncode is None]
        if waits:
            await asyncio.wait(waits, timeout=END_TIMEOUT_S)

    # --- the summary ----------------------------------------------------------------------------------------

    def _summary(self) -> dict[str, Any]:
        plan, last = self._plan, self._last
        assert last is not None
        workers = [self._worker_figures(f"w{i}", last) for i in range(plan.workers)]
        dense = plan.config.final_round.value == "dense"
        contributions = {
            key: sum(w["contributions"][key] for w in workers)
            for key in ("sent", "included", "returned", "outstanding")
        }
        config = plan.config
        return {
            "task": plan.args.task,
            "method": plan.args.method,
            "merge": config.merge.value,
            "workers": plan.workers,
            "density": config.density,
            "selection": config.selection.value,
            "overlap_steps": config.overlap_steps if config.overlap_steps is not None else "auto",
            "local_steps": config.local_steps if config.local_steps is not None else "auto",
            "wire_dtype": config.value_type.value,
            "seed": config.seed,
            "epoch": last.epoch,
            "first_round": last.first_round,
            "rounds": last.round - (1 if dense and last.round else 0),
            "final": config.final_round.value,
            "steps": [w["steps"] for w in workers],
            "wall_seconds": last.elapsed_s,
            "loss": None,
            "accuracy": None,
            "target_loss": plan.target_loss,
            "seconds_to_target": self._seconds_to_target,
            "bytes_up": [w["bytes_up"] for w in workers],
            "bytes_down": [w["bytes_down"] for w in workers],
            "bytes_wire_up": self._farm.bytes_up if self._farm else None,
            "bytes_wire_down": self._farm.bytes_down if self._farm else None,
            "step_seconds_median": [w["step_seconds_median"] for w in workers],
            "idle_fraction": [w["idle_fraction"] for w in workers],
            "contributions": contributions,
            "reconnects": sum(w["reconnects"] for w in workers),
            "stopped": last.stop_reason,
        }

    def _worker_figures(self, name: str, last: pb.StatusReply) -> dict[str, Any]:
        """A worker's own figures; of one that died, what the server last heard of it."""
        path = self._folder.worker_result(name)
        if path.exists():
            figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return figures
        report = next((m.report for m in last.members if m.name == name), pb.WorkerReport())
        return {
            "steps": report.steps,
            "bytes_up": report.bytes_up,
            "bytes_down": report.bytes_down,
            "step_seconds_median": None,
            "idle_fraction": report.idle_s / report.run_s if report.run_s else None,
            "contributions": {
                "sent": report.sent,
                "included": report.included,
                "returned": report.returned,
                "outstanding": report.sent - report.included - report.returned,
            },
            "reconnects": 0,
        }


def _failure(text: str, status: int) -> LoscarError:
    """A child that could not start: its own kind of error, so that the run ends with the child's exit code."""
    kinds = {cls.exit_code: cls for cls in reversed(all_errors()) if cls.exit_code != LoscarError.exit_code}
    return kinds.get(status, WorkerFailedError)(text)


def evaluate_model(path: Path, task_spec: str, data_dir: Path | None) -> dict[str, float]:
    """Loss and accuracy of a saved model on its task's test data."""
    from loscar_worker.tasks import load_task

    task = load_task(task_spec, data_dir)
    model = task.make_model(0)
    load_model(path, model)
    result = task.evaluate(model)
    return {"loss": result.loss, "accuracy": result.accuracy}


def execute(plan: RunPlan) -> dict[str, Any]:
    """Run, evaluate, write the summary; returns it.

    Raises:
        LoscarError: the run could not be done; the folder holds the logs.
    """
    import uvloop

    args = plan.args
    folder = RunFolder(args.out)
    folder.write_config({k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in _NOT_SAVED})
    progress = Progress(sys.stderr if args.json else sys.stdout)

    async def go() -> dict[str, Any]:
        with progress:
            return await LocalRun(plan, folder, progress).run()

    try:
        summary = uvloop.run(go())
    except LoscarError:
        progress.say(f"the run folder is {folder.path}")
        raise
    summary.update(evaluate_model(folder.model, args.task, args.data_dir))
    folder.summary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if not args.json:
        idle = [f for f in summary["idle_fraction"] if f is not None]
        print(
            f"consensus test accuracy {summary['accuracy']:.4f}, loss {summary['loss']:.4f} "
            f"after {summary['rounds']} rounds in {summary['wall_seconds']:.1f} s "
            f"(idle ≤ {max(idle, default=0):.1%})"
        )
        if plan.target_loss is not None and summary["seconds_to_target"] is None:
            print(f"target loss {plan.target_loss:g} NOT reached")
        print(f"the run folder is {folder.path}")
    return summary
