"""One-off averages between the workers of a run, beside its rounds: calls in, gatherings, answers out."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator

import grpc
import numpy as np

from loscar_core.errors import ConnectError, LoscarError, MalformedError, NonFiniteError, WrongRunError
from loscar_core.gathering import Answer, Gathering, Gatherings, Values
from loscar_core.messages import Reason
from loscar_core.server_machine import ServerMachine
from loscar_core.server_state import Phase
from loscar_server.admission import Context, Door, stalled
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.averages import (
    CHUNK_BYTES,
    AverageCall,
    Taken,
    decode_request,
    encode_accepted,
    encode_answer_values,
    encode_head,
)
from loscar_wire.pieces import text_of


class AverageDesk:
    """Answers calls for averages; lives on the server's loop.

    Args:
        machine: whose members may call, and are waited for.
        door: limits on calls, and the count of who was refused.
        limit_bytes: what vectors and answers may take in all.
    """

    def __init__(self, machine: ServerMachine, door: Door, limit_bytes: int) -> None:
        self.bytes_in = 0
        self.bytes_out = 0
        self._machine = machine
        self._door = door
        self._gatherings = Gatherings(limit_bytes)
        self._changed = asyncio.Event()
        self._known: dict[bytes, float] = {}  # incarnations that are waited for, and until when if they have vanished

    def look(self, gone: Reason | None = None) -> None:
        """Whatever members and the time have changed: call it when a member has gone, and now and then.

        Args:
            gone: why, if one has.
        """
        before = len(self._gatherings)
        if before == 0:
            return
        now = time.monotonic()
        self._know(now, gone)
        closed = self._gatherings.look(self._known.keys(), now)
        if closed or len(self._gatherings) != before:
            self._wake()

    def _wake(self) -> None:
        """Let every call look at its gathering again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _know(self, now: float, gone: Reason | None = None) -> dict[bytes, int]:
        """Note who is a member, and who was until now; the slots of the members."""
        slots = {m.incarnation: m.slot for m in self._machine.members.workers()}
        known = dict.fromkeys(slots, math.inf)
        for who, until in self._known.items():
            if who in known:
                continue
            if until == math.inf:  # it was a member when this was last looked at
                vanished = gone in (None, Reason.STREAM_CLOSED, Reason.LEASE_EXPIRED)
                until = now + self._machine.limits.lease_s if vanished else now
            if until > now:
                known[who] = until
        self._known = known
        return slots

    def status(self) -> list[pb.AverageStatus]:
        """The averages that somebody needs still."""
        known = self._known.keys()
        return [
            pb.AverageStatus(
                label=text_of(g.label),
                offered=g.offered,
                missing=len(g.without(known) if g.closed else g.missing(known)),
                answered=g.closed,
            )
            for g in self._gatherings
        ]

    async def serve(self, context: Context) -> None:
        """One call, until all who need the answer have it."""
        async with self._door.call(context):
            try:
                await self._serve(context)
            except LoscarError as error:
                await self._door.refuse(context, error)

    async def _serve(self, context: Context) -> None:
        call = await self._said(context, self._door.limits.hello_s)
        if not isinstance(call, AverageCall):
            raise MalformedError("a call for an average begins with what it is")
        gathering, slot = self._enter(call)
        wanted = gathering.wants(call.incarnation)
        await self._write(context, encode_accepted(wanted, sorted(gathering.awaited)))
        if wanted:
            with self._arriving(gathering, call.incarnation):
                values = await self._values(context, call)
            if call.settled:
                gathering.settle(Answer(values, call.settled), time.monotonic())
                self._wake()
            else:
                gathering.add(call.incarnation, slot, values)
        self.look()
        while not gathering.closed:
            await self._changed.wait()
        if gathering.error is not None:
            raise gathering.error
        assert gathering.answer is not None
        if not call.settled:
            await self._tell(context, gathering.answer)
            if not isinstance(await self._said(context, self._door.limits.stall_s), Taken):
                raise MalformedError("an answer was given, and something else than its receipt came back")
        gathering.take(call.incarnation)
        self.look()
        while gathering in self._gatherings:
            await self._changed.wait()

    def _enter(self, call: AverageCall) -> tuple[Gathering, int]:
        """What a worker calls for, and its slot."""
        machine, now = self._machine, time.monotonic()
        slots = self._know(now)
        if call.run_id != machine.run_id:
            raise WrongRunError(f"an average in run {call.run_id.hex()}; this is {machine.run_id.hex()}")
        if machine.phase not in (Phase.RUNNING, Phase.FINISHED) or call.incarnation not in slots:
            # One that it will be, perhaps: its stream may still be on its way, or the run about to be recovered.
            raise ConnectError("an average is for workers of a run that goes on: this one is none yet")
        gathering = self._gatherings.enter(
            call.label,
            call.incarnation,
            call.size,
            call.dtype,
            present=slots.keys(),
            told=call.awaited,
            wait_s=call.wait_s,
            at_least=call.at_least,
            now=now,
        )
        return gathering, slots[call.incarnation]

    @contextlib.contextmanager
    def _arriving(self, gathering: Gathering, who: bytes) -> Iterator[None]:
        gathering.expect(who)
        try:
            yield
        finally:
            gathering.arrived(who)

    async def _values(self, context: Context, call: AverageCall) -> Values:
        values = np.empty(call.size, np.dtype(call.dtype).newbyteorder("<"))
        room = memoryview(values.view(np.uint8))  # type: ignore[arg-type]
        filled = 0
        while filled < room.nbytes:
            chunk = await self._said(context, self._door.limits.stall_s)
            if not isinstance(chunk, bytes) or not 1 <= len(chunk) <= room.nbytes - filled:
                raise MalformedError(
                    f"the average {call.label!r}: {room.nbytes - filled} more bytes of values expected"
                )
            room[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        if not np.isfinite(values).all():
            raise NonFiniteError(f"the average {call.label!r}: NaN or infinity in the vector")
        return values

    async def _tell(self, context: Context, answer: Answer) -> None:
        await self._write(context, encode_head(answer.offered))
        data = memoryview(answer.values.view(np.uint8))  # type: ignore[arg-type]
        for start in range(0, data.nbytes, CHUNK_BYTES):
            await self._write(context, encode_answer_values(bytes(data[start : start + CHUNK_BYTES])))

    async def _write(self, context: Context, data: bytes) -> None:
        await self._door.taken(context, data)
        self.bytes_out += len(data)

    async def _said(self, context: Context, patience_s: float) -> AverageCall | bytes | Taken:
        """The next request of a call.

        Raises:
            MalformedError: it is none, or the peer has ended its half.
            RefusedError: nothing comes.
        """
        reading = asyncio.ensure_future(context.read())
        try:
            await asyncio.wait({reading}, timeout=patience_s)
        finally:
            if not reading.done():
                reading.cancel()
        if reading.cancelled() or not reading.done():
            raise stalled(patience_s)
        data = reading.result()
        if data is grpc.aio.EOF:
            raise MalformedError("a call for an average ended in the middle")
        self.bytes_in += len(data)
        return decode_request(data)
