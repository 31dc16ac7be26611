"""One worker's connection: keeps a stream to a server open, feeds the engine, carries its messages out.

Everything here runs on one event loop; several connections may share it. A broken stream is rebuilt with its
channel, with jittered back-off, at the next address in turn. What must not be retried is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import grpc

from loscar_core.errors import (
    AuthenticationError,
    ConnectError,
    InterruptedRunError,
    LoscarError,
    RefusedError,
    ReplicaDivergedError,
    ServerLostError,
    SupersededError,
    VersionMismatchError,
    WrongModelError,
    WrongRoundError,
    WrongRunError,
)
from loscar_core.messages import (
    COMEBACK,
    JOINED,
    Contribution,
    Goodbye,
    Heartbeat,
    Leave,
    Purpose,
    Reason,
    StopRun,
    VectorChunk,
    WorkerMessage,
    WorkerReport,
)
from loscar_core.plan import is_worth_making_ahead, make_ahead
from loscar_core.worker_effects import Dismissed, Emit, RoundOpen, RoundTrip, RunEnded, Update, WorkerEffect
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_holdings import MESSAGE_BYTES
from loscar_wire.mapping import decode_server_messages, encode_worker_message
from loscar_wire.outbox import Later, Outbox
from loscar_wire.status import from_status
from loscar_wire.transport import TRAIN, ClientSecurity, call_metadata, channel

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger("loscar.worker")

_JITTER = random.Random()
"""Its own, or reconnecting would change what a training loop draws from `random`."""

FIRST_BACKOFF_S = 0.25
MAX_BACKOFF_S = 10.0
DEFAULT_HEARTBEAT_S = 2.0
DEFAULT_LEASE_S = 15.0
LEAVE_FLUSH_S = 5.0


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Where to connect and how long to try.

    Attributes:
        servers: HOST:PORT, tried in turn.
        security: token and certificates.
        connect_timeout_s: how long to look for a server before the first welcome.
        server_timeout_s: how long a server may stay away afterwards.
    """

    servers: tuple[str, ...]
    security: ClientSecurity = field(default_factory=ClientSecurity)
    connect_timeout_s: float = 60.0
    server_timeout_s: float = 600.0


class Connection:
    """Runs an engine against a server until the run ends, the worker leaves, or nothing can be done any more.

    Args:
        engine: the worker's half of the protocol; touched by this object's event loop only.
        options: where and how long.
        on_effect: told every effect that is not about sending.
        report: the worker's figures, for heartbeats.
    """

    def __init__(
        self,
        engine: WorkerEngine,
        options: ConnectionOptions,
        on_effect: Callable[[WorkerEffect], None],
        report: Callable[[], WorkerReport],
    ) -> None:
        self.engine = engine
        engine.other_servers = len(options.servers) > 1
        self.connected = False
        self.reconnects = 0
        self.round_trip_s: float | None = None
        self._options = options
        self._on_effect = on_effect
        self._report = report
        self._outbox: Outbox | None = None
        self._leaving: asyncio.Event = asyncio.Event()
        self._joined = False
        self._run_ended = False
        self._said_waiting = False
        self._said_lost: type[LoscarError] | None = None
        self._welcomes = 0
        self._target = options.servers[0]

    @property
    def target(self) -> str:
        """The address that was tried last."""
        return self._target

    @property
    def security(self) -> ClientSecurity:
        return self._options.security

    # --- what the session asks for (on the loop) ------------------------------------------------------------

    def carry_out(self, effects: Sequence[WorkerEffect]) -> None:
        """Send what the engine emits, hand the rest on."""
        for effect in effects:
            match effect:
                case Emit(message):
                    self._send(message)
                case RunEnded():
                    self._run_ended = True
                    self._on_effect(effect)
                case RoundTrip(stamp_ns):
                    self.round_trip_s = (time.monotonic_ns() - stamp_ns) / 1e9
                case RoundOpen(plan=plan):
                    self._on_effect(effect)
                    # With several shards they would displace each other's.
                    if is_worth_making_ahead(plan) and self.engine.config is not None and self.engine.shard.count == 1:
                        seed, dimension = self.engine.config.seed, self.engine.layout.dimension
                        with contextlib.suppress(RuntimeError):  # the interpreter is about to end: no more threads
                            asyncio.get_running_loop().run_in_executor(None, make_ahead, plan, seed, dimension)
                case Update(round=round_) if round_ > 0:
                    if self._outbox is not None:
                        self._outbox.discard(round_)
                    self._on_effect(effect)
                case _:
                    self._on_effect(effect)

    def send_heartbeat(self) -> None:
        self._send(self.engine.heartbeat(time.monotonic_ns(), self._figures()))

    def _figures(self) -> WorkerReport:
        return replace(self._report(), round_trip_s=self.round_trip_s)

    def stop_run(self, why: str) -> None:
        """Ask the server to end the run."""
        self._send(StopRun(why))

    def leave(self, reason: Reason, detail: str = "") -> None:
        """Say goodbye and end `run`."""
        if self._outbox is not None and not self._outbox.closing:
            self._send(Heartbeat(time.monotonic_ns(), self.engine.anchor.position.round, self._figures()))
            self._send(Leave(reason, detail))
            self._outbox.close(None)
        self._leaving.set()

    def _send(self, message: WorkerMessage) -> None:
        if self._outbox is not None:
            round_ = message.round if isinstance(message, Contribution) else None
            # What a newcomer gets must not hold up this worker's own contributions.
            bulk = isinstance(message, VectorChunk) and message.purpose is Purpose.PROGRESS
            payload: bytes | Later
            if isinstance(message, (Contribution, VectorChunk)):
                payload = Later(len(message.values), partial(encode_worker_message, message))
            else:
                payload = encode_worker_message(message)
            self._outbox.put(payload, urgent=isinstance(message, Heartbeat), round_=round_, bulk=bulk)

    # --- the loop -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Stay connected until left.

        Raises:
            ConnectError: no server answered within `connect_timeout_s`.
            RefusedError: the last one that did was full all the time, or the slot is taken.
            ServerLostError: none came back within `server_timeout_s`.
            LoscarError: the server refused this worker for good.
        """
        since = time.monotonic()
        backoff = FIRST_BACKOFF_S
        attempt = 0
        while not self._leaving.is_set():
            target = self._target = self._options.servers[attempt % len(self._options.servers)]
            attempt += 1
            joined_before = self._joined
            self._joined = False
            cause: LoscarError = ConnectError("the server ended the stream")
            try:
                await self._one_stream(target, self._patience_s(since, joined_before))
            except LoscarError as error:
                if not may_retry(error, joined=joined_before):
                    raise
                cause = error
            if self._leaving.is_set():
                return
            if self._joined:
                since, backoff = time.monotonic(), FIRST_BACKOFF_S
            self._joined = self._joined or joined_before
            self._check_patience(since, target, cause)
            pause = backoff * _JITTER.uniform(0.5, 1.5)
            await self._pause(min(pause, self._patience_s(since, self._joined)))
            backoff = min(MAX_BACKOFF_S, backoff * 2)

    def _patience_s(self, since: float, joined: bool) -> float:
        """How much longer a server is looked for."""
        limit = self._options.server_timeout_s if joined else self._options.connect_timeout_s
        return max(0.05, since + limit - time.monotonic())

    def _check_patience(self, since: float, target: str, cause: LoscarError) -> None:
        waited = time.monotonic() - since
        where = ", ".join(self._options.servers)
        if not self._joined:
            limit = self._options.connect_timeout_s
            refused = isinstance(cause, RefusedError)
            if waited >= limit:
                raise cause if refused else ConnectError(f"no server at {where} within {limit:g} s: {cause}")
            if not self._said_waiting:
                self._said_waiting = True
                what = "not taken by the server at" if refused else "no server at"
                log.warning("%s %s yet (%s): trying for %g s", what, where, cause, limit)
        elif waited >= self._options.server_timeout_s:
            raise ServerLostError(f"no server at {where} for {self._options.server_timeout_s:g} s: {cause}")
        elif self._said_lost is None:
            log.info("connection to %s lost (%s): training on, reconnecting", target, cause)
        elif self._said_lost is not type(cause):
            log.warning("not back at %s yet (%s): training on, reconnecting", target, cause)
        self._said_lost = type(cause)

    async def _pause(self, seconds: float) -> None:
        waiting = asyncio.create_task(self._leaving.wait())
        await asyncio.wait({waiting}, timeout=seconds)
        waiting.cancel()

    async def _one_stream(self, target: str, patience_s: float) -> None:
        """One channel and one stream, from hello to its end. Raises what ended it, unless it was polite.

        Args:
            patience_s: how long to wait for the server's first word.
        """
        opened = channel(target, self._options.security)
        call = opened.stream_stream(TRAIN)(metadata=call_metadata(self._options.security))
        outbox = self._outbox = Outbox()
        hello = self.engine.hello()
        self._send(replace(hello, capabilities=(*hello.capabilities, JOINED)))
        tasks = [
            asyncio.create_task(self._read(call, min(patience_s, DEFAULT_LEASE_S)), name="read"),
            asyncio.create_task(self._write(call, outbox), name="write"),
            asyncio.create_task(self._beat(), name="heartbeat"),
        ]
        leaving = asyncio.create_task(self._leaving.wait(), name="leaving")
        try:
            await asyncio.wait([*tasks, leaving], return_when=asyncio.FIRST_COMPLETED)
            reached = opened.get_state() is grpc.ChannelConnectivity.READY  # the hello may be there, or nearly
            if outbox.closing and (self._joined or reached):
                # The server ends the stream once it has read our goodbye; cancelling sooner could lose it.
                await asyncio.wait(set(tasks[:2]), timeout=LEAVE_FLUSH_S)
            await self._raise_cause(call, tasks)
        finally:
            self._outbox = None
            self.connected = False
            self.engine.disconnected()
            for task in (*tasks, leaving):
                task.cancel()
            await asyncio.gather(*tasks, leaving, return_exceptions=True)
            call.cancel()
            await opened.close()

    async def _raise_cause(self, call: Any, tasks: list[asyncio.Task[None]]) -> None:
        reading, writing, beating = tasks
        if self._leaving.is_set():
            return
        if writing.done() and not reading.done():
            # A failed write only says that the stream is over; the reader knows why.
            await asyncio.wait({reading}, timeout=LEAVE_FLUSH_S)
        for task in (reading, beating, writing):
            if task.done():
                task.result()

    async def _read(self, call: Any, silence_s: float) -> None:
        welcomed = False
        while True:
            read = asyncio.ensure_future(call.read())
            try:
                # Not wait_for: cancelling a read would cancel the whole call.
                done, _ = await asyncio.wait({read}, timeout=silence_s)
            except asyncio.CancelledError:
                read.cancel()
                raise
            if not done:
                read.cancel()
                raise ConnectError(f"nothing heard from the server for {silence_s:g} s")
            try:
                data = read.result()
            except grpc.RpcError as error:
                raise from_status(error.code(), error.details()) from None
            except asyncio.CancelledError:
                raise ConnectError("the call was cancelled") from None
            if data is grpc.aio.EOF:
                await self._ended(call)
                return
            if await self._take(call, data, welcomed):
                return
            del done, read, data  # what came may be as large as the model
            welcome = self.engine.welcome
            if welcome is not None:
                welcomed, silence_s = True, welcome.lease_s

    async def _take(self, call: Any, data: bytes, welcomed: bool) -> bool:
        """What came; whether the server has sent this worker away."""
        for message in await self._accept(call, decode_server_messages, data):
            effects = await self._accept(call, self.engine.received, message)
            if self.engine.welcome is not None and not welcomed:
                welcomed = True
                self._note_welcome()
            self.carry_out(effects)
            for effect in effects:
                if isinstance(effect, Dismissed):
                    self._dismissed(effect.goodbye)
                    return True
        return False

    async def _accept(self, call: Any, take: Callable[[T], R], what: T) -> R:
        """What `take` makes of what the server said; if that is the run's end for this worker, the server is told."""
        try:
            return take(what)
        except LoscarError as error:
            if not may_retry(error):
                await self._go(error, call)
            raise

    async def _go(self, error: LoscarError, call: Any) -> None:
        """Say why: the server would see a broken connection, and wait for this worker to come back."""
        reason = Reason.DIVERGED if isinstance(error, ReplicaDivergedError) else Reason.FAILED
        if self._outbox is not None:
            self._send(Leave(reason, str(error)))
            self._outbox.close(None)
        ended = asyncio.ensure_future(call.code())
        await asyncio.wait({ended}, timeout=LEAVE_FLUSH_S)
        ended.cancel()

    def _note_welcome(self) -> None:
        self._joined = self.connected = True
        self._welcomes += 1
        if self._welcomes > 1:
            self.reconnects += 1
            log.info("connected again")
        self._said_lost = None

    async def _ended(self, call: Any) -> None:
        code = await call.code()
        raise from_status(code, await call.details() or "the server ended the stream")

    def _dismissed(self, goodbye: Goodbye) -> None:
        if goodbye.reason in COMEBACK:
            raise ConnectError(goodbye.detail or goodbye.reason.value)
        if goodbye.reason is Reason.SUPERSEDED:
            raise SupersededError(goodbye.detail)
        if goodbye.reason is Reason.FINISHED and not self._run_ended:
            raise InterruptedRunError(f"the run was ended before it began: {goodbye.detail}")

    async def _write(self, call: Any, outbox: Outbox) -> None:
        def adapt() -> None:
            self.engine.message_bytes = outbox.rate.message_bytes(MESSAGE_BYTES)

        try:
            await outbox.write_all(call.write, lambda _: None, adapt)
            await call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the reader learns why

    async def _beat(self) -> None:
        while True:
            welcome = self.engine.welcome
            await asyncio.sleep(welcome.heartbeat_s if welcome else DEFAULT_HEARTBEAT_S)
            self.send_heartbeat()


def may_retry(error: LoscarError, *, joined: bool = False) -> bool:
    """Whether a worker that a server ended with this error connects again.

    Args:
        joined: it has been a member of the run: it holds the run's state.
    """
    # A stale server (lower epoch) is not the run's end: the live one may be at another address.
    if error.retriable or isinstance(error, WrongRoundError):
        return True
    # Nor is one that was restarted with another run, model, token or certificate: it may be restarted once more.
    others = (AuthenticationError, VersionMismatchError, WrongModelError, WrongRunError)
    return joined and isinstance(error, others)
