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
from loscar_core.messages import COMEBACK, Reason
from loscar_core.server_machine import ServerMachine
from loscar_core.server_members import Departure
from loscar_core.server_state import Phase
from loscar_core.state import Position
from loscar_server.admission import Context, Door, stalled
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.averages import (
    CHUNK_BYTES,
    MOST_WORKERS,
    AverageCall,
    Taken,
    decode_request,
    encode_accepted,
    encode_answer_values,
    encode_head,
)
from loscar_wire.pieces import text_of

SENT_AWAY = (Reason.CUT_OFF, Reason.STEPPED_DOWN, Reason.SERVER_STOPPED)
BACK_S = 20.0
"""How long a recovered run's workers are waited for before averages go on without them; their back-off is shorter."""


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
        self._elsewhere: set[bytes] = set()  # those of them that were sent to other servers
        self._were = 0  # workers before a recovery
        self._back_by_s = -math.inf  # until then they are waited for
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what has changed -----------------------------------------------------------------------------------

    def look(self) -> None:
        """Whatever the time has changed; now and then."""
        before = len(self._gatherings)
        if before == 0:
            return
        now = time.monotonic()
        self._know(now)
        ready = self._gatherings.look(self._known.keys(), now)
        for gathering in ready:
            self._tasks.add(task := asyncio.create_task(self._average(gathering), name=f"average {gathering.label}"))
            task.add_done_callback(self._tasks.discard)
        if len(self._gatherings) != before:
            self._wake()

    def gone(self, departure: Departure) -> None:
        """A member has gone. Who may come back is waited for, for the time of a lease."""
        who = departure.incarnation
        if not len(self._gatherings):
            return
        if departure.reason in COMEBACK:
            self._known[who] = time.monotonic() + self._machine.limits.lease_s
            if departure.reason in SENT_AWAY:
                self._elsewhere.add(who)
        else:
            self._known.pop(who, None)
        self.look()
        self._wake()

    def started(self, position: Position) -> None:
        """The run goes on here. After a recovery some of its workers may still be on their way."""
        replica = self._machine.replica
        if position.round > 0 and replica is not None:
            self._were, self._back_by_s = replica.members, time.monotonic() + BACK_S

    async def close(self) -> None:
        """End what is being computed."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wake(self) -> None:
        """Let every call look at its gathering again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _know(self, now: float) -> dict[bytes, int]:
        """Note who is a member; their slots."""
        slots = {m.incarnation: m.slot for m in self._machine.members.workers()}
        self._known = {who: until for who, until in self._known.items() if until > now} | dict.fromkeys(slots, math.inf)
        self._elsewhere.intersection_update(self._known.keys() - slots.keys())
        return slots

    async def _average(self, gathering: Gathering) -> None:
        """The mean of large vectors takes seconds: not on the loop."""
        outcome = await asyncio.to_thread(gathering.average)
        gathering.conclude(outcome, time.monotonic())
        self._wake()
        self.look()

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

    # --- a call ---------------------------------------------------------------------------------------------

    async def serve(self, context: Context) -> None:
        """One call, until all who need the answer have it."""
        async with self._door.call(context):
            try:
                call = await self._said(context, self._door.limits.hello_s)
                if not isinstance(call, AverageCall):
                    raise MalformedError("a call for an average begins with what it is")
                gathering, slot = self._enter(call)
                try:
                    await self._serve(context, call, gathering, slot)
                finally:
                    self._gatherings.leave(gathering, time.monotonic())
            except LoscarError as error:
                await self._door.refuse(context, error)

    async def _serve(self, context: Context, call: AverageCall, gathering: Gathering, slot: int) -> None:
        who = call.incarnation
        if gathering.wants(who):
            with self._arriving(gathering, who):
                await self._write(context, encode_accepted(True, sorted(gathering.awaited)[:MOST_WORKERS]))
                values = await self._values(context, call)
            if call.settled:
                gathering.settle(Answer(values, call.settled), time.monotonic())
                self._wake()
            else:
                gathering.add(who, slot, values)
            del values  # this call may go on for long
        else:
            await self._write(context, encode_accepted(False, sorted(gathering.awaited)[:MOST_WORKERS]))
        self.look()
        while not gathering.closed:
            await self._change(who)
        if gathering.error is not None:
            raise gathering.error
        assert gathering.answer is not None
        if not call.settled:
            await self._tell(context, gathering.answer)
            if not isinstance(await self._said(context, self._door.limits.stall_s), Taken):
                raise MalformedError("an answer was given, and something else than its receipt came back")
        gathering.take(who)
        self.look()
        while gathering in self._gatherings:
            await self._change(who)

    async def _change(self, who: bytes) -> None:
        """Until something has changed. Raises ConnectError when this worker is at another server by now, or lost."""
        await self._changed.wait()
        if who in self._elsewhere or who not in self._known:
            raise ConnectError("this worker is a member here no more")

    def _enter(self, call: AverageCall) -> tuple[Gathering, int]:
        """What a worker calls for, and its slot."""
        machine, now = self._machine, time.monotonic()
        slots = self._know(now)
        if call.run_id != machine.run_id:
            raise WrongRunError(f"an average in run {call.run_id.hex()}; this is {machine.run_id.hex()}")
        if machine.phase not in (Phase.RUNNING, Phase.FINISHED) or call.incarnation not in slots:
            # One that it will be, perhaps: its stream may still be on its way, or the run about to be recovered.
            raise ConnectError("an average is for workers of a run that goes on: this one is none yet")
        if now < self._back_by_s and len(slots) < self._were:
            raise ConnectError(f"{len(slots)} of the run's {self._were} workers are back: the others are waited for")
        gathering = self._gatherings.enter(
            call.label,
            call.incarnation,
            call.size,
            call.dtype,
            present=slots.keys(),
            told=call.awaited,
            settled=bool(call.settled),
            wait_s=call.wait_s,
            at_least=call.at_least,
            now=now,
        )
        return gathering, slots[call.incarnation]

    @contextlib.contextmanager
    def _arriving(self, gathering: Gathering, who: bytes) -> Iterator[None]:
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
