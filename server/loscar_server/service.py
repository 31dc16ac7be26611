"""The gRPC service: streams in, machine, streams out.

One event loop owns the machine. Each stream has a reader (its handler) and a writer; the machine's effects are
carried out in order, and a message for several members is encoded once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from loscar_core import effects as fx
from loscar_core.errors import AuthenticationError, LoscarError, MalformedError, RefusedError, ServerLostError
from loscar_core.messages import HeartbeatReply
from loscar_core.server_machine import ServerMachine
from loscar_server.status import status_of
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.mapping import decode_worker_message, encode_server_message, layout_to_pb
from loscar_wire.outbox import Outbox
from loscar_wire.status import to_status
from loscar_wire.transport import SERVICE, check_token

log = logging.getLogger("loscar.server")

HELLO_TIMEOUT_S = 10.0
"""How long an open stream may stay without a hello."""

GOODBYE_FLUSH_S = 5.0
"""How long a stream that ends politely may take to hand over what is queued."""

MODEL_CHUNK_VALUES = 1 << 18
MAX_TICK_S = 1.0

Context = Any  # grpc.aio.ServicerContext, which is not typed


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """What one server lets others do.

    Attributes:
        streams_per_host: open streams from one address.
        joins_per_s: new streams in a second, from everywhere.
    """

    streams_per_host: int = 512
    joins_per_s: int = 200


def _host(peer: str) -> str:
    """The address part of gRPC's peer text, such as ipv4:127.0.0.1:5000."""
    return peer.rpartition(":")[0]


class ParameterService:
    """Runs a machine on gRPC streams.

    Args:
        machine: the run's state machine, whose clock is `time.monotonic()`.
        token: what every call must carry, or None.
        observe: called with every effect that is not about sending, in order.
        guard: limits on streams and joins.
    """

    def __init__(
        self,
        machine: ServerMachine,
        token: str | None,
        observe: Callable[[fx.ServerEffect], None],
        guard: StreamLimits | None = None,
    ) -> None:
        self.machine = machine
        self.bytes_in = 0
        self.bytes_out = 0
        self.first_round = 0
        self.finished = asyncio.Event()
        self.stepped_down: str | None = None
        self._token = token
        self._observe = observe
        self._outboxes: dict[int, Outbox] = {}
        self._peers = 0
        self._guard = guard or StreamLimits()
        self._hosts: Counter[str] = Counter()
        self._recent_joins: deque[float] = deque()
        self._no_streams = asyncio.Event()
        self._no_streams.set()

    # --- streams --------------------------------------------------------------------------------------------

    async def train(self, _: AsyncIterator[bytes], context: Context) -> None:
        """One member's stream, from its hello to its end."""
        await self._authenticate(context)
        host = _host(context.peer())
        await self._admit(host, context)
        self._hosts[host] += 1
        try:
            await self._member_stream(context)
        finally:
            self._hosts[host] -= 1
            if not self._hosts[host]:
                del self._hosts[host]

    async def _admit(self, host: str, context: Context) -> None:
        """Refuse a stream beyond the limits, before anything is allocated for it."""
        now = time.monotonic()
        while self._recent_joins and now - self._recent_joins[0] > 1.0:
            self._recent_joins.popleft()
        error = None
        if self._hosts[host] >= self._guard.streams_per_host:
            error = RefusedError(f"{host} has {self._hosts[host]} streams already")
        elif len(self._recent_joins) >= self._guard.joins_per_s:
            error = RefusedError(f"more than {self._guard.joins_per_s} joins a second")
        if error is not None:
            self._count_refusal(error)
            code, details = to_status(error)
            await context.abort(code, details)
        self._recent_joins.append(now)

    def _count_refusal(self, error: LoscarError) -> None:
        key = type(error).__name__
        self.machine.refused[key] = self.machine.refused.get(key, 0) + 1

    async def _member_stream(self, context: Context) -> None:
        self._peers += 1
        peer = self._peers
        outbox = self._outboxes[peer] = Outbox()
        self._no_streams.clear()
        reader = asyncio.create_task(self._read(peer, context), name=f"read {peer}")
        writer = asyncio.create_task(self._write(peer, outbox, context), name=f"write {peer}")
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if outbox.closing and outbox.error is None and not writer.done():
                await asyncio.wait({writer}, timeout=GOODBYE_FLUSH_S)
        finally:
            for task in (reader, writer):
                task.cancel()
            results = await asyncio.gather(reader, writer, return_exceptions=True)
            del self._outboxes[peer]
            if not self._outboxes:
                self._no_streams.set()
            self._carry_out(self.machine.disconnected(peer, time.monotonic()))
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, (grpc.RpcError, asyncio.InvalidStateError)):
                log.debug("stream %d ended: %r", peer, result)
        if outbox.error is not None:
            code, details = to_status(outbox.error)
            await context.abort(code, details)

    async def _authenticate(self, context: Context) -> None:
        try:
            check_token(context.invocation_metadata(), self._token)
        except AuthenticationError as error:
            self._count_refusal(error)
            code, details = to_status(error)
            await context.abort(code, details)

    async def _read(self, peer: int, context: Context) -> None:
        first = asyncio.ensure_future(context.read())
        done, _ = await asyncio.wait({first}, timeout=HELLO_TIMEOUT_S)
        if not done:
            first.cancel()
            self._outboxes[peer].close(MalformedError(f"no hello within {HELLO_TIMEOUT_S:g} s"))
            return
        data = first.result()
        while data is not grpc.aio.EOF:
            self.bytes_in += len(data)
            now = time.monotonic()
            try:
                effects = self.machine.received(peer, decode_worker_message(data), now)
            except LoscarError as error:
                effects = self.machine.refuse(peer, error, now)
            self._carry_out(effects)
            if self._outboxes[peer].closing:
                return
            data = await context.read()

    async def _write(self, peer: int, outbox: Outbox, context: Context) -> None:
        def written(size: int) -> None:
            self.bytes_out += size

        def drained() -> None:
            self._carry_out(self.machine.drained(peer, time.monotonic()))

        await outbox.write_all(context.write, written, drained)

    def _carry_out(self, effects: list[fx.ServerEffect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(peers, message):
                    boxes = [self._outboxes[p] for p in peers if p in self._outboxes]
                    if boxes:
                        payload = encode_server_message(message)
                        urgent = isinstance(message, HeartbeatReply)
                        for box in boxes:
                            box.put(payload, urgent=urgent)
                case fx.Close(peer, error, goodbye):
                    outbox = self._outboxes.get(peer)
                    if outbox is not None:
                        if goodbye is not None:
                            outbox.put(encode_server_message(goodbye))
                        outbox.close(error)
                case _:
                    self._note(effect)

    def _note(self, effect: fx.ServerEffect) -> None:
        match effect:
            case fx.RoundCommitted(position):
                self.first_round = self.first_round or position.round
            case fx.RunFinished():
                self.finished.set()
            case fx.SteppedDown(detail):
                self.stepped_down = detail
                self.finished.set()
            case _:
                pass
        self._observe(effect)

    # --- the clock ------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Feed the machine the time until cancelled."""
        while True:
            self._carry_out(self.machine.tick(time.monotonic()))
            due = self.machine.next_wakeup()
            wait = MAX_TICK_S if due is None else min(MAX_TICK_S, max(0.001, due - time.monotonic()))
            await asyncio.sleep(wait)

    def stop(self, why: str) -> None:
        """End the run after the open round."""
        self._carry_out(self.machine.request_stop(why, time.monotonic()))

    async def shut_down(self) -> None:
        """Say goodbye to everybody and let the streams end."""
        self._carry_out(self.machine.shut_down(time.monotonic()))
        await self.streams_ended(GOODBYE_FLUSH_S)

    async def streams_ended(self, timeout_s: float) -> None:
        """Until no stream is open, or the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._no_streams.wait(), timeout_s)

    # --- other calls ----------------------------------------------------------------------------------------

    async def status(self, _: pb.StatusRequest, context: Context) -> pb.StatusReply:
        await self._authenticate(context)
        return status_of(self.machine, time.monotonic(), self.bytes_in, self.bytes_out, self.first_round)

    async def stop_run(self, request: pb.StopRequest, context: Context) -> pb.StopReply:
        await self._authenticate(context)
        self.stop(request.why[:500] or "asked to stop")
        return pb.StopReply()

    async def fetch_model(self, _: pb.FetchModelRequest, context: Context) -> AsyncIterator[pb.ModelChunk]:
        """The consensus as of one commit: copied first, since rounds go on while it is sent."""
        await self._authenticate(context)
        state, layout = self.machine.replica, self.machine.layout
        if state is None or layout is None:
            code, details = to_status(ServerLostError("this server has no model yet"))
            await context.abort(code, details)
            return
        position = pb.Position(epoch=state.position.epoch, round=state.position.round)
        values = np.concatenate([state.vector, state.statistics])
        for start in range(0, values.size, MODEL_CHUNK_VALUES):
            chunk = pb.ModelChunk(
                total=values.size, offset=start, values=values[start : start + MODEL_CHUNK_VALUES].tobytes()
            )
            if start == 0:
                chunk.layout.CopyFrom(layout_to_pb(layout))
                chunk.position.CopyFrom(position)
            yield chunk

    def handler(self) -> grpc.GenericRpcHandler:
        """Everything above under its method names. Train's messages stay bytes: mapping them is ours."""
        methods = {
            "Train": grpc.stream_stream_rpc_method_handler(self.train),
            "Status": grpc.unary_unary_rpc_method_handler(
                self.status, pb.StatusRequest.FromString, pb.StatusReply.SerializeToString
            ),
            "Stop": grpc.unary_unary_rpc_method_handler(
                self.stop_run, pb.StopRequest.FromString, pb.StopReply.SerializeToString
            ),
            "FetchModel": grpc.unary_stream_rpc_method_handler(
                self.fetch_model, pb.FetchModelRequest.FromString, pb.ModelChunk.SerializeToString
            ),
        }
        handler: grpc.GenericRpcHandler = grpc.method_handlers_generic_handler(SERVICE, methods)
        return handler
