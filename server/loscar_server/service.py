"""The gRPC service: streams in, machine, streams out.

One event loop owns the machine. Each stream has a reader (its handler) and a writer; the machine's effects are
carried out in order, and a message for several members is encoded once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import numpy as np

from loscar_core import effects as fx
from loscar_core.errors import LoscarError, MalformedError, NoModelError
from loscar_core.messages import JOINED, HeartbeatReply, Hello
from loscar_core.plan import is_worth_making_ahead, make_ahead
from loscar_core.replica import Floats
from loscar_core.server_machine import ServerMachine
from loscar_core.server_round import ANSWER_BYTES
from loscar_core.state import Position
from loscar_server.admission import Context, Door, StreamLimits, stalled
from loscar_server.averages import AverageDesk
from loscar_server.refusals import Refusals
from loscar_server.status import status_of
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.mapping import decode_worker_message, encode_server_message, join_server_messages
from loscar_wire.outbox import Outbox
from loscar_wire.pieces import layout_to_pb
from loscar_wire.status import to_status
from loscar_wire.transport import SERVICE

log = logging.getLogger("loscar.server")

GOODBYE_FLUSH_S = 5.0
"""How long a stream that ends politely may take to hand over what is queued."""

MODEL_CHUNK_VALUES = 1 << 18
MAX_TICK_S = 1.0


@dataclass(slots=True)
class _Stream:
    """A member's stream, or one that may become it."""

    address: str
    name: str = ""
    outbox: Outbox = field(default_factory=Outbox)
    closing: asyncio.Event = field(default_factory=asyncio.Event)


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
        self.first_round = 0
        self.finished = asyncio.Event()
        self.stepped_down: str | None = None
        self._door = Door(token, guard or StreamLimits())
        self._averages = AverageDesk(machine, self._door, self._door.limits.average_bytes)
        self._bytes_in = 0
        self._bytes_out = 0
        self._observe = observe
        self._streams: dict[int, _Stream] = {}
        self._peers = 0
        self._copy: tuple[Position, Floats] | None = None  # of the model, while it is fetched
        self._no_streams = asyncio.Event()
        self._no_streams.set()

    @property
    def bytes_in(self) -> int:
        """Payload of all that workers have sent."""
        return self._bytes_in + self._averages.bytes_in

    @property
    def bytes_out(self) -> int:
        """Payload of all that workers were sent."""
        return self._bytes_out + self._averages.bytes_out

    @property
    def refusals(self) -> Refusals:
        """Who was refused here."""
        return self._door.refusals

    # --- streams --------------------------------------------------------------------------------------------

    async def train(self, _: AsyncIterator[bytes], context: Context) -> None:
        """One member's stream, from its hello to its end."""
        async with self._door.member(context) as address:
            await self._member_stream(_Stream(address), context)

    async def _member_stream(self, stream: _Stream, context: Context) -> None:
        self._peers += 1
        peer, outbox = self._peers, stream.outbox
        self._streams[peer] = stream
        self._no_streams.clear()
        reader = asyncio.create_task(self._read(peer, stream, context), name=f"read {peer}")
        writer = asyncio.create_task(self._write(peer, outbox, context), name=f"write {peer}")
        # A peer that neither says nor takes anything keeps both of them waiting, also when its stream is to end.
        closing = asyncio.create_task(stream.closing.wait(), name=f"closing {peer}")
        try:
            await asyncio.wait({reader, writer, closing}, return_when=asyncio.FIRST_COMPLETED)
            if outbox.closing and outbox.error is None and not writer.done():
                await asyncio.wait({writer}, timeout=GOODBYE_FLUSH_S)
        finally:
            for task in (reader, writer, closing):
                task.cancel()
            # Before anything is awaited: the peer may break the call in the middle of its end, which ends us here.
            del self._streams[peer]
            if not self._streams:
                self._no_streams.set()
            self._carry_out(self.machine.disconnected(peer, time.monotonic()))
            results = await asyncio.gather(reader, writer, closing, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, (grpc.RpcError, asyncio.InvalidStateError)):
                log.debug("stream %d ended: %r", peer, result)
        if outbox.error is not None:
            code, details = to_status(outbox.error)
            await context.abort(code, details)

    async def _read(self, peer: int, stream: _Stream, context: Context) -> None:
        first = asyncio.ensure_future(context.read())
        patience_s = self._door.limits.hello_s
        done, _ = await asyncio.wait({first}, timeout=patience_s)
        if not done:
            first.cancel()
            self._refuse(peer, MalformedError(f"no hello within {patience_s:g} s"))
            return
        data = first.result()
        while data is not grpc.aio.EOF and not stream.outbox.closing:
            self._bytes_in += len(data)
            self._received(peer, stream, data)
            if stream.outbox.closing:
                return
            data = await context.read()

    def _received(self, peer: int, stream: _Stream, data: bytes) -> None:
        now = time.monotonic()
        try:
            message = decode_worker_message(data)
            if isinstance(message, Hello):
                stream.name = message.name
                if JOINED in message.capabilities:
                    stream.outbox.join = join_server_messages
            effects = self.machine.received(peer, message, now)
        except LoscarError as error:
            effects = self.machine.refuse(peer, error, now)
        except Exception as error:
            log.error("a message of %s %s broke the server's rules", stream.address, stream.name, exc_info=error)
            effects = self.machine.refuse(peer, LoscarError(f"{type(error).__name__} in the server"), now)
        self._carry_out(effects)

    def _refuse(self, peer: int, error: LoscarError) -> None:
        self._carry_out(self.machine.refuse(peer, error, time.monotonic()))

    async def _write(self, peer: int, outbox: Outbox, context: Context) -> None:
        def written(size: int) -> None:
            self._bytes_out += size

        def drained() -> None:
            self._carry_out(self.machine.drained(peer, time.monotonic()))

        await outbox.write_all(context.write, written, drained)

    def _carry_out(self, effects: list[fx.ServerEffect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(peers, message):
                    boxes = [self._streams[p].outbox for p in peers if p in self._streams]
                    if boxes:
                        payload = encode_server_message(message)
                        urgent = isinstance(message, HeartbeatReply)
                        for box in boxes:
                            box.put(payload, urgent=urgent)
                case fx.Close(peer, error, goodbye):
                    stream = self._streams.get(peer)
                    if stream is not None:
                        if goodbye is not None:
                            stream.outbox.put(encode_server_message(goodbye))
                        stream.outbox.close(error)
                        stream.closing.set()
                case _:
                    self._note(effect)

    def _note(self, effect: fx.ServerEffect) -> None:
        match effect:
            case fx.Refused(peer, error):
                stream = self._streams.get(peer)
                if stream is not None:
                    self._door.note(stream.address, stream.name, error)
            case fx.MemberGone(departure):
                self._averages.gone(departure)
            case fx.RunStarted(position):
                self._averages.started(position)
            case fx.RoundCommitted(position=position):
                self.first_round = self.first_round or position.round
                rates = (s.outbox.rate.message_bytes(ANSWER_BYTES) for s in self._streams.values())
                self.machine.answer_bytes = min(rates, default=ANSWER_BYTES)
                if is_worth_making_ahead(effect.next_plan) and self.machine.replica is not None:
                    seed, dimension = self.machine.config.seed, self.machine.replica.vector.size
                    asyncio.get_running_loop().run_in_executor(None, make_ahead, effect.next_plan, seed, dimension)
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
        looked = time.monotonic()
        while True:
            now = time.monotonic()
            self._carry_out(self.machine.tick(now))
            if now >= looked + MAX_TICK_S:
                looked = now
                self._drop_stalled(now)
                self._averages.look()
            due = self.machine.next_wakeup()
            wait = MAX_TICK_S if due is None else min(MAX_TICK_S, max(0.001, due - time.monotonic()))
            await asyncio.sleep(wait)

    def _drop_stalled(self, now: float) -> None:
        """End streams that take nothing, whatever they go on saying."""
        for peer, stream in list(self._streams.items()):
            since = stream.outbox.busy_since
            if since is not None and now >= since + self._door.limits.stall_s:
                self._refuse(peer, stalled(self._door.limits.stall_s))

    def stop(self, why: str) -> None:
        """End the run after the open round."""
        self._carry_out(self.machine.request_stop(why, time.monotonic()))

    async def shut_down(self) -> None:
        """Say goodbye to everybody and let the streams end."""
        self._carry_out(self.machine.shut_down(time.monotonic()))
        await self._averages.close()
        await self.streams_ended(GOODBYE_FLUSH_S)

    async def streams_ended(self, timeout_s: float) -> None:
        """Until no stream is open, or the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._no_streams.wait(), timeout_s)

    # --- other calls ----------------------------------------------------------------------------------------

    async def status(self, data: bytes, context: Context) -> pb.StatusReply:
        await self._door.request(pb.StatusRequest, data, context)
        now = time.monotonic()
        reply = status_of(self.machine, now, self.bytes_in, self.bytes_out, self.first_round, self.refusals)
        reply.averages.extend(self._averages.status())
        return reply

    async def stop_run(self, data: bytes, context: Context) -> pb.StopReply:
        request = await self._door.request(pb.StopRequest, data, context)
        self.stop("".join(c if c.isprintable() else "?" for c in request.why[:500]) or "asked to stop")
        return pb.StopReply()

    async def average(self, _: AsyncIterator[bytes], context: Context) -> None:
        """A worker's part in a one-off average."""
        await self._averages.serve(context)

    async def fetch_model(self, data: bytes, context: Context) -> None:
        """The consensus as of one commit: a copy, since rounds go on while it is sent."""
        await self._door.request(pb.FetchModelRequest, data, context)
        try:
            async with self._door.fetch(context):
                await self._send_model(context)
        finally:
            if not self._door.fetching:
                self._copy = None

    async def _send_model(self, context: Context) -> None:
        layout, copied = self.machine.layout, self._model_copy()
        if copied is None or layout is None:
            await self._door.refuse(context, NoModelError("this server has no model yet"))
        position, values = copied
        for start in range(0, values.size, MODEL_CHUNK_VALUES):
            payload = values[start : start + MODEL_CHUNK_VALUES].tobytes()
            chunk = pb.ModelChunk(total=values.size, offset=start, values=payload)
            if start == 0:
                chunk.layout.CopyFrom(layout_to_pb(layout))
                chunk.position.CopyFrom(pb.Position(epoch=position.epoch, round=position.round))
            await self._door.taken(context, chunk.SerializeToString())

    def _model_copy(self) -> tuple[Position, Floats] | None:
        """The model as of the last commit; whoever fetches it before the next one shares the copy."""
        state = self.machine.replica
        if state is None:
            return None
        if self._copy is None or self._copy[0] != state.position:
            self._copy = state.position, np.concatenate([state.vector, state.statistics])
        return self._copy

    def handler(self) -> grpc.GenericRpcHandler:
        """Everything above under its method names. Messages stay bytes: what is none is ours to refuse."""
        methods = {
            "Train": grpc.stream_stream_rpc_method_handler(self.train),
            "Status": grpc.unary_unary_rpc_method_handler(
                self.status, response_serializer=pb.StatusReply.SerializeToString
            ),
            "Stop": grpc.unary_unary_rpc_method_handler(
                self.stop_run, response_serializer=pb.StopReply.SerializeToString
            ),
            "Average": grpc.stream_stream_rpc_method_handler(self.average),
            "FetchModel": grpc.unary_stream_rpc_method_handler(self.fetch_model),
        }
        handler: grpc.GenericRpcHandler = grpc.method_handlers_generic_handler(SERVICE, methods)
        return handler
