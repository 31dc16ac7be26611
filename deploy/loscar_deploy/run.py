"""`loscar run`: a whole run on this machine, with real processes and an emulated link for each worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
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
from loscar_deploy.options import RUN_OPTIONS, Default
from loscar_deploy.run_folder import RunFolder, distances_of, method_options, metrics_of, settings_of, valley_width
from loscar_deploy.table import Progress
from loscar_deploy.writers import Writers, open_writers
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import ClientSecurity, parse_address

POLL_S = 0.25
METRICS_EVERY_S = 1.0
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 2.0

TASK_OPTIONS = ("task", "data_dir", "lr", "partition", "seed", "method")


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
        devices: each worker's.
        batch_sizes: each worker's; None takes the task's.
    """

    args: Namespace
    config: RunConfig
    workers: int
    links: tuple[LinkSpec, ...] | None
    slowdown: tuple[float, ...]
    target_loss: float | None
    devices: tuple[str, ...]
    batch_sizes: tuple[int, ...] | None = None


def flags_of(args: Namespace, names: Iterable[str]) -> list[str]:
    """Options as the children's command lines take them."""
    flags: list[str] = []
    for name in names:
        value = getattr(args, name)
        if value is not None and not isinstance(value, Default):
            flags.append(f"--{name.replace('_', '-')}={value}")  # in one piece: a value may begin with a dash
    return flags


class LocalRun:
    """Starts, watches and ends the processes of one run."""

    def __init__(self, plan: RunPlan, folder: RunFolder, progress: Progress, writers: Writers | None = None) -> None:
        self._plan = plan
        self._folder = folder
        self._progress = progress
        self._writers = writers or Writers({})
        self._told_evaluations = 0
        self._children = Children()
        self._server: Child | None = None
        self._workers: list[Child] = []
        self._farm: LinkFarm | None = None
        self._last: pb.StatusReply | None = None
        self._reported: set[str] = set()
        self._evaluator: Child | None = None
        self._seconds_to_target: float | None = None
        self.signals = 0
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
            client = self._client(address)
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
            if self._forced.is_set():
                raise _forced()
            return self._summary()
        except ConnectError as error:
            raise await self._why_unreachable(error) from None
        finally:
            await self._children.stop_all()
            if self._farm is not None:
                await self._farm.close()
            for i in range(self._plan.workers):
                self._folder.worker_slots(f"w{i}").unlink(missing_ok=True)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        self.signals += 1
        if self.signals == 1:
            what = "writing the run folder" if self._finished() else "ending the run after this round"
            self._progress.say(f"{what}; once more to stop at once")
        else:
            self._forced.set()
            self._children.kill_all()

    def _client(self, address: str) -> Client:
        return Client(address, ClientSecurity(os.environ.get("LOSCAR_TOKEN") or None))

    # --- starting -------------------------------------------------------------------------------------------

    async def _start_server(self) -> str:
        args = self._plan.args
        flags = ["--listen", "127.0.0.1:0", "--workers", str(self._plan.workers), "--linger", "10m", "--json"]
        flags += flags_of(args, RUN_OPTIONS)
        if getattr(args, "dashboard", None) is not None:
            flags.append(f"--dashboard={args.dashboard}")
        log = self._folder.log("server")
        self._server = server = await self._children.start("server", ["server", *flags], log, read_stdout=True)
        assert server.process.stdout is not None
        with contextlib.suppress(TimeoutError):
            line = await asyncio.wait_for(server.process.stdout.readline(), START_TIMEOUT_S)
            if line:
                told: dict[str, str] = json.loads(line)
                if "dashboard" in told:
                    self._progress.say(f"dashboard at {told['dashboard']}")
                return told["listening"]
        if self._forced.is_set():
            raise _forced()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.process.wait(), EXIT_TIMEOUT_S)
        raise _failure(f"the server did not start: {server.last_words()}", server.returncode)

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
            flags += [*flags_of(args, TASK_OPTIONS), "--device", self._plan.devices[i], "--parting", "0s"]
            if args.keep_models:
                flags += ["--save-last", str(folder.worker_model(name))]
            if self._plan.batch_sizes is not None:
                flags += ["--batch-size", str(self._plan.batch_sizes[i])]
            if self._plan.config.evaluate_every:
                flags += ["--evaluation", str(folder.worker_slots(name))]
            self._workers.append(await self._children.start(name, ["worker", *flags], folder.log(name)))

    async def _start_evaluator(self) -> None:
        if not self._plan.config.evaluate_every:
            return
        folder, args = self._folder, self._plan.args
        slots = [str(folder.worker_slots(f"w{i}")) for i in range(self._plan.workers)]
        flags = [*slots, "--out", str(folder.evaluations), *flags_of(args, ("task", "data_dir"))]
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
            self._check_server()
            # Who is gone before the question: whether that ended the run is in the answer.
            gone = [child for child in self._workers if child.returncode is not None]
            reply = await client.status()
            if reply.phase == "finished" and self._last is not None:
                # Workers that have heard of the end are gone already: show them as they were.
                del reply.members[:]
                reply.members.extend(self._last.members)
            self._last = reply
            if reply.phase != "finished":
                self._progress.show(reply)
            if reply.elapsed_s - metrics_at >= METRICS_EVERY_S:
                metrics_at = reply.elapsed_s
                self._note(reply)
            if reply.phase == "finished":
                self._note(reply)
                self._progress.show(reply, last=True)
                return
            self._check_workers(gone, started=reply.elapsed_s >= 0)
            if self._target_reached() and not self._asked_to_stop:
                self._asked_to_stop = True
                await client.stop("the target loss is reached")
            if self.signals and not self._asked_to_stop:
                self._asked_to_stop = True
                if reply.elapsed_s < 0:
                    raise InterruptedRunError("interrupted before the run started")
                await client.stop("interrupted")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._forced.wait(), POLL_S)

    def _note(self, reply: pb.StatusReply) -> None:
        """Write down what is known now."""
        record = metrics_of(reply)
        self._folder.append_metrics(record)
        if self._writers:
            self._writers.record(record)
            self.tell_evaluations()

    def tell_evaluations(self) -> None:
        """Hand new evaluations to the writers; the last ones come after the last of the rounds."""
        for line in self._folder.read_evaluations()[self._told_evaluations :]:
            self._told_evaluations += 1
            self._writers.evaluation(line)

    async def _why_unreachable(self, error: ConnectError) -> LoscarError:
        """What to say when a call to the server fails: it may have died, or been killed by the second Ctrl+C."""
        if self._server is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._server.process.wait(), EXIT_TIMEOUT_S)
            try:
                self._check_server()
            except LoscarError as cause:
                return cause
        return error

    def _check_server(self) -> None:
        """End the run when it cannot go on."""
        assert self._server is not None
        if self._forced.is_set():
            raise _forced()
        if self._server.returncode is not None:
            raise WorkerFailedError(_ended(self._server))

    def _check_workers(self, gone: list[Child], *, started: bool) -> None:
        """Say who died; end the run when nobody is left."""
        for child in gone:
            if child.name in self._reported:
                continue
            self._reported.add(child.name)
            if not started:
                # The start waits for all workers: without this one it would wait for ever.
                raise _failure(_ended(child), child.returncode)
            if child.returncode:
                self._progress.say(_ended(child))
        if self._evaluator is not None and self._evaluator.returncode and "evaluator" not in self._reported:
            self._reported.add("evaluator")
            self._progress.say(_ended(self._evaluator))
        if len(gone) == len(self._workers):
            how = {child.returncode for child in gone}
            # When all of them ended for one reason, it is the run's as well.
            raise _failure(f"no worker is left: {_ended(gone[-1])}", how.pop() if len(how) == 1 else None)

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
            **settings_of(config, plan.workers),
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
            "method_options": method_options(config),
            **valley_width(distances_of(self._folder.worker_rounds(f"w{i}") for i in range(plan.workers))),
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


def _ended(child: Child) -> str:
    status = child.returncode or 0
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"{child.name} {how}: {child.last_words()}"


def _forced() -> InterruptedRunError:
    return InterruptedRunError("forced to end before the run folder was complete")


def _failure(text: str, status: int | None) -> LoscarError:
    """A child that could not start: its own kind of error, so that the run ends with the child's exit code."""
    kinds = {cls.exit_code: cls for cls in reversed(all_errors()) if cls.exit_code != LoscarError.exit_code}
    return kinds.get(status or 0, WorkerFailedError)(text)


def evaluate_model(path: Path, task_spec: str, data_dir: Path | None) -> dict[str, float]:
    """Loss and accuracy of a saved model on its task's test data."""
    from loscar_worker.tasks import load_task

    task = load_task(task_spec, data_dir)
    model = task.make_model(0)
    load_model(path, model)
    result = task.evaluate(model)
    return {"loss": result.loss, "accuracy": result.accuracy}


@contextlib.contextmanager
def _draining(run: LocalRun, progress: Progress) -> Iterator[None]:
    """After the processes' end, signals mean what they meant before: the first one drains, the second one forces."""

    def on_signal(*_: object) -> None:
        run.signals += 1
        if run.signals > 1:
            os._exit(InterruptedRunError.exit_code)  # an exception could come out of a half-imported module
        progress.say("writing the run folder; once more to stop at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def execute(
    plan: RunPlan,
    *,
    quiet: bool = False,
    run_of: Callable[[RunPlan, RunFolder, Progress, Writers], LocalRun] = LocalRun,
) -> dict[str, Any]:
    """Run, evaluate, write the summary; returns it. Shows how it goes unless `quiet`.

    Args:
        run_of: makes the run, whose processes may be elsewhere.

    Raises:
        LoscarError: the run could not be done; the folder holds the logs.
    """
    args = plan.args
    folder = RunFolder(args.out)
    folder.write_options(args)
    progress = Progress(sys.stderr if args.json else sys.stdout, quiet=quiet)
    writers = open_writers(getattr(args, "writer", None) or (), folder.path, folder.path.resolve().name)
    try:
        summary = _execute(run_of(plan, folder, progress, writers), plan, folder, progress, writers)
    finally:
        writers.close()
    if not args.json and not quiet:
        _print_result(plan, folder, summary)
    return summary


def _execute(run: LocalRun, plan: RunPlan, folder: RunFolder, progress: Progress, writers: Writers) -> dict[str, Any]:
    import uvloop

    args = plan.args
    writers.settings(folder.options())

    async def go() -> dict[str, Any]:
        with progress:
            return await run.run()

    try:
        summary = uvloop.run(go())
    except LoscarError:
        progress.say(f"the run folder is {folder.path}")
        raise
    with _draining(run, progress):
        summary.update(evaluate_model(folder.model, args.task, args.data_dir))
        folder.write_summary(summary)
        run.tell_evaluations()
        writers.result(summary)
    return summary


def _print_result(plan: RunPlan, folder: RunFolder, summary: dict[str, Any]) -> None:
    idle = [f for f in summary["idle_fraction"] if f is not None]
    print(
        f"consensus test accuracy {summary['accuracy']:.4f}, loss {summary['loss']:.4f} "
        f"after {summary['rounds']} rounds in {summary['wall_seconds']:.1f} s "
        f"(idle ≤ {max(idle, default=0):.1%})"
    )
    if plan.target_loss is not None and summary["seconds_to_target"] is None:
        print(f"target loss {plan.target_loss:g} NOT reached")
    print(f"the run folder is {folder.path}")
