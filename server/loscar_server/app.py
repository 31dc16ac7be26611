"""The server process: start, serve until the run is over, linger, stop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loscar_core import effects as fx
from loscar_core.config import RunConfig, ServerLimits
from loscar_core.errors import ConfigError, InterruptedRunError, PortInUseError, ServerLostError, WrongRunError
from loscar_core.plan import RoundKind, RoundPlan
from loscar_core.saved_state import SavedState
from loscar_core.server_machine import ServerMachine
from loscar_core.server_state import Phase
from loscar_core.state import Position
from loscar_server.admission import StreamLimits
from loscar_server.checkpoint import Checkpoints
from loscar_server.events import EventLog
from loscar_server.service import ParameterService
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import (
    SERVER_OPTIONS,
    SERVICE,
    ServerSecurity,
    add_port,
    check_exposure,
    check_free,
    format_address,
    parse_address,
)

if TYPE_CHECKING:
    from loscar_server.metrics import ServerMetrics

log = logging.getLogger("loscar.server")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """One server process.

    Attributes:
        listen: HOST:PORT; port 0 takes a free one.
        run_id: text that names the run, or None for a new one.
        config: the run's configuration.
        limits: the server's patience.
        security: TLS and token.
        linger_s: how long the final model is served after the run's end.
        checkpoints: folder for checkpoints, or None for none.
        checkpoint_every_s: time between two of them; one more is written at the run's end.
        keep: how many of the newest are kept.
        resume: go on from the newest checkpoint, when there is one.
        guard: limits on streams and joins.
        events: file that gets a JSON line for every event, see `loscar_server.events`; or None.
        pause_on: the signal that pauses the run instead of ending it, or None.
    """

    listen: str = "127.0.0.1:50051"
    run_id: str | None = None
    config: RunConfig = field(default_factory=RunConfig)
    limits: ServerLimits = field(default_factory=ServerLimits)
    security: ServerSecurity = field(default_factory=ServerSecurity)
    linger_s: float = 300.0
    checkpoints: Path | None = None
    checkpoint_every_s: float = 60.0
    keep: int = 3
    resume: bool = False
    guard: StreamLimits = field(default_factory=StreamLimits)
    events: Path | None = None
    pause_on: signal.Signals | None = None


def run_id_bytes(text: str | None) -> bytes:
    """16 bytes for a run's name: hexadecimal as it is, other text hashed, None at random."""
    if text is None:
        return os.urandom(16)
    if re.fullmatch(r"[0-9a-fA-F]{32}", text):
        return bytes.fromhex(text)
    return hashlib.sha256(text.encode()).digest()[:16]


def describe(effect: fx.ServerEffect) -> tuple[int, str] | None:
    """The log line of an effect: (level, text), or None for those that are not worth one."""
    match effect:
        case fx.MemberJoined(name, slot, observer):
            return logging.INFO, f"{name} joined" + (" as observer" if observer else f" at slot {slot}")
        case fx.MemberGone(d):
            return logging.INFO, f"{d.name} left: {d.reason.value}" + (f" ({d.detail})" if d.detail else "")
        case fx.RunStarted(position, members, _):
            return logging.INFO, f"run on at {position} with {members} workers"
        case fx.RoundCommitted() as r:
            text = f"round {r.position} committed: {len(r.included)} of {r.members} in {r.seconds:.3f} s"
            return logging.DEBUG, text
        case fx.RunFinished(why):
            return logging.INFO, f"run finished: {why}"
        case fx.SteppedDown(detail):
            return logging.WARNING, f"stepping down: {detail}"
        case fx.Notice(text):
            return logging.INFO, text
        case _:
            return None


class ServerProcess:
    """A parameter server that can be embedded: `start`, `wait`, `close`.

    Args:
        options: see `ServerOptions`.
        observe: called with every effect that is not about sending.
    """

    def __init__(self, options: ServerOptions, observe: Callable[[fx.ServerEffect], None] | None = None) -> None:
        self._options = options
        self._observe = observe
        self._events = None if options.events is None else EventLog(options.events)
        self.address = ""
        self._checkpoints = None if options.checkpoints is None else Checkpoints(options.checkpoints, options.keep)
        run_id = run_id_bytes(options.run_id)
        saved = self._saved_state(run_id)
        machine = ServerMachine(options.config, options.limits, run_id, time.monotonic(), saved)
        self.service = ParameterService(machine, options.security.token, self._note, options.guard)
        self._saving: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._saved: Position | None = None
        self._saved_at = -math.inf
        self._worth_saving = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._ticking: asyncio.Task[None] | None = None

    def _saved_state(self, run_id: bytes) -> SavedState | None:
        checkpoints, resume = self._checkpoints, self._options.resume
        if checkpoints is None:
            return None
        try:
            there = len(checkpoints.paths())
            if there and not resume:
                raise ConfigError(
                    f"{checkpoints.folder} holds checkpoints of a run: go on with --resume, or name another folder"
                )
            saved = checkpoints.newest() if resume else None
            if saved is not None and saved.config.shard != self._options.config.shard:
                ours, theirs = self._options.config.shard, saved.config.shard
                raise WrongRunError(f"the checkpoint is of shard {theirs}, and this is to be shard {ours}")
            if saved is not None and self._options.run_id is not None and saved.run_id != run_id:
                raise WrongRunError(f"the checkpoint is of run {saved.run_id.hex()}, not {run_id.hex()}")
            if saved is None and there and self._options.run_id is None:
                # Begun anew under another identity, no worker of the run could hand its state back.
                raise ConfigError(
                    f"none of the {there} checkpoints in {checkpoints.folder} is intact: give --run-id to recover the "
                    "run from its workers, or name another folder to begin a new one"
                )
        except BaseException:
            checkpoints.close()
            raise
        if saved is not None:
            log.info("resuming run %s from its checkpoint at %s", saved.run_id.hex(), saved.replica.position)
        elif resume:
            log.warning("no checkpoint to resume from in %s", checkpoints.folder)
        return saved

    @property
    def run_id(self) -> bytes:
        return self.service.machine.run_id

    def _note(self, effect: fx.ServerEffect) -> None:
        line = describe(effect)
        if line is not None:
            log.log(*line)
        if self._events is not None:
            self._events.note(effect, self.service.machine.epoch)
        match effect:
            case fx.RoundCommitted(plan=RoundPlan(kind=RoundKind.CONSOLIDATION)):
                # Not each of them where they are frequent: the newest few checkpoints should not all be of one moment.
                if time.monotonic() >= self._saved_at + self._options.checkpoint_every_s / 2:
                    self._worth_saving.set()
            case fx.RunFinished() | fx.SteppedDown():
                self._worth_saving.set()
            case _:
                pass
        if self._observe is not None:
            self._observe(effect)

    async def start(self) -> str:
        """Bind and serve; returns the address.

        Raises:
            PortInUseError: the port is taken, or the host is not one of this machine's.
            ConfigError: a public address without TLS and token.
        """
        host, port = parse_address(self._options.listen, "--listen")
        missing = check_exposure(host, self._options.security)
        if missing is not None:
            log.warning("%s is served without %s: whoever can reach it can join, read and end the run", host, missing)
        check_free(host, port)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((self.service.handler(),))
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        assert pb.DESCRIPTOR.services_by_name["ParameterServer"].full_name == SERVICE
        try:
            bound = add_port(server, format_address(host, port), self._options.security)
        except RuntimeError:
            bound = 0
        if bound == 0:  # taken just now
            raise PortInUseError(f"cannot listen on {format_address(host, port)}")
        await server.start()
        for name in ("", SERVICE):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server = server
        if self._events is not None:
            self._events.write("serving", self.service.machine.epoch, pid=os.getpid(), run=self.run_id.hex())
        self._ticking = asyncio.create_task(self.service.tick(), name="tick")
        self._ticking.add_done_callback(self._tick_ended)
        if self._checkpoints is not None:
            self._saving = asyncio.create_task(self._save_regularly(self._checkpoints), name="checkpoints")
        self.address = format_address(host, bound)
        return self.address

    async def _save_regularly(self, checkpoints: Checkpoints) -> None:
        while not self.service.finished.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._worth_saving.wait(), self._options.checkpoint_every_s)
            self._worth_saving.clear()
            await self._save(checkpoints)

    async def _save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint off the loop, unless nothing has changed since the last one."""
        machine = self.service.machine
        if self._writing is not None:
            await asyncio.wait({self._writing})  # not the task itself, which must not be cancelled
        if machine.replica is None or machine.replica.position == self._saved:
            return
        self._writing = asyncio.create_task(self._write(checkpoints), name="checkpoint")
        # A write cannot be cancelled half-way: whoever is next waits for it.
        await asyncio.shield(self._writing)

    async def _write(self, checkpoints: Checkpoints) -> None:
        try:
            state = self.service.machine.saved_state(time.monotonic())
            assert state is not None
            path = await asyncio.to_thread(checkpoints.write, state)
        except Exception as error:  # a run without checkpoints is better than none
            reason = error.strerror if isinstance(error, OSError) else repr(error)
            log.error("no checkpoint could be written: %s; the run goes on, the previous ones are untouched", reason)
            return
        self._saved, self._saved_at = state.replica.position, time.monotonic()
        log.debug("checkpoint %s", path)

    def _tick_ended(self, task: asyncio.Task[None]) -> None:
        # A machine that gets no time any more would hang the run without a word.
        if not task.cancelled() and task.exception() is not None:
            log.critical("the server's clock task died", exc_info=task.exception())
            self.service.finished.set()

    async def wait_finished(self) -> None:
        """Until the run is over.

        Raises:
            ServerLostError: this process stepped down for a later epoch, or its clock died.
        """
        await self.service.finished.wait()
        if self.service.stepped_down is not None:
            raise ServerLostError(self.service.stepped_down)
        if self._ticking is not None and self._ticking.done():
            self._ticking.result()

    async def close(self) -> None:
        """Say goodbye, end every stream, free the port."""
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.gather(self._saving, return_exceptions=True)
        if self._server is not None:
            await self.service.shut_down()
        if self._checkpoints is not None:  # now that no round is closed any more
            await self._save(self._checkpoints)
            self._checkpoints.close()
            self._checkpoints = None
        if self._server is not None:
            await self._server.stop(grace=0.5)
            self._server = None
        if self._events is not None:
            self._events.close()

    def say_paused(self) -> None:
        """After `close`: where the run is now."""
        replica = self.service.machine.replica
        if replica is None:
            log.info("paused; no run was on here")
        elif replica.position == self._saved:
            log.info("paused run %s at %s, which is saved", self.run_id.hex(), replica.position)
        else:
            log.info("paused run %s at %s, which the workers hold", self.run_id.hex(), replica.position)


async def serve(
    options: ServerOptions, ready: Callable[[ServerProcess], None], metrics: ServerMetrics | None = None
) -> signal.Signals | None:
    """Run a server until its run is over and it has lingered, or a signal ends it.

    The first SIGINT or SIGTERM ends the run with its final round, or the lingering; the second ends the process. The
    first signal that `options.pause_on` names ends the process and not the run: workers are told to look for the next
    one, and a checkpoint is written.

    Args:
        ready: called once it listens.
        metrics: told what happens, and whose figures to show.

    Returns:
        The signal that has paused the run, or None when the run is over.

    Raises:
        InterruptedRunError: a second signal has come before the run's end.
        ServerLostError: see `ServerProcess.wait_finished`.
    """
    loop = asyncio.get_running_loop()
    process = ServerProcess(options, None if metrics is None else metrics.note)
    if metrics is not None:
        metrics.watch(process.service, loop)
    await process.start()
    leave = asyncio.Event()
    forced = asyncio.Event()
    paused = asyncio.Event()
    signals = 0

    def on_signal(number: signal.Signals) -> None:
        nonlocal signals
        signals += 1
        if paused.is_set():
            log.warning("ended before the run was paused: what was not saved is with the workers")
            os._exit(InterruptedRunError.exit_code)  # a disk that does not answer cannot be told to hurry
        elif signals > 1:
            forced.set()
        elif process.service.machine.phase is Phase.FINISHED:
            leave.set()
        elif number == options.pause_on:
            log.info("pausing the run; once more to stop at once")
            paused.set()
        else:
            log.info("ending the run; once more to stop at once")
            leave.set()
            process.service.stop("interrupted")

    for number in {signal.SIGINT, signal.SIGTERM, options.pause_on or signal.SIGTERM}:
        loop.add_signal_handler(number, on_signal, number)
    ready(process)
    running = asyncio.create_task(process.wait_finished())
    force = asyncio.create_task(forced.wait())
    pause = asyncio.create_task(paused.wait())
    try:
        await asyncio.wait({running, force, pause}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done() and paused.is_set():
            await process.close()
            process.say_paused()
            return options.pause_on
        if not running.done():
            raise InterruptedRunError("stopped before the run's end")
        running.result()
        lingering = asyncio.create_task(leave.wait())
        await asyncio.wait({lingering, force}, timeout=options.linger_s, return_when=asyncio.FIRST_COMPLETED)
        lingering.cancel()
        if leave.is_set():
            # Workers still have to hear of the end: they leave by themselves.
            ending = asyncio.create_task(process.service.streams_ended(options.limits.lease_s))
            await asyncio.wait({ending, force}, return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
        return None
    finally:
        for task in (running, force, pause):
            task.cancel()
        await process.close()
