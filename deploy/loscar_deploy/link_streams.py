"""The connections of an emulated link: sockets, queues and timers; see `link` for the model."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
import time
from collections import deque
from typing import Final, Protocol, cast

from loscar_deploy.link_model import DirectionModel
from loscar_deploy.link_spec import DirectionSpec

_READ_BYTES: Final = 64 * 1024
_WRITE_BATCH_BYTES: Final = 64 * 1024
_MAX_CHUNK_BYTES: Final = 16 * 1024
_MIN_CHUNK_BYTES: Final = 1448  # one Ethernet packet's payload
_CHUNK_S: Final = 0.010
_QUEUE_S: Final = 0.050
_MIN_QUEUE_BYTES: Final = 64 * 1024
_UNLIMITED_QUEUE_BYTES: Final = 1024 * 1024
_UNLIMITED_HELD_BYTES: Final = 32 * 1024 * 1024
_MIN_SOCKET_BUFFER_BYTES: Final = 128 * 1024
_MAX_SOCKET_BUFFER_BYTES: Final = 4 * 1024 * 1024
_SLACK_S: Final = 0.0005
_TIMER_GRAIN_S: Final = 0.001
_CONNECT_S: Final = 1.0  # that a connection which is not wanted any more may still take to be made
_LINGER_RESET: Final = struct.pack("ii", 1, 0)


class Direction:
    """One direction of a proxy: its model, limits and counters, shared by all of its connections."""

    def __init__(self, spec: DirectionSpec, rng: random.Random) -> None:
        self.model = DirectionModel(spec, (), rng)
        rate = spec.rate_bytes_per_s
        if rate is None:
            # Without a rate there is no bandwidth-delay product: the bound only protects the memory.
            queue_bytes = _UNLIMITED_QUEUE_BYTES
            in_flight_bytes = _UNLIMITED_HELD_BYTES if spec.max_delay_s > 0 else 0
            self.chunk_bytes = _MAX_CHUNK_BYTES
            self.socket_buffer_bytes = 0
        else:
            queue_bytes = max(_MIN_QUEUE_BYTES, math.ceil(rate * _QUEUE_S))
            in_flight_bytes = math.ceil(rate * spec.max_delay_s)
            self.chunk_bytes = min(_MAX_CHUNK_BYTES, max(_MIN_CHUNK_BYTES, int(rate * _CHUNK_S)))
            # The kernel would take in megabytes ahead of a slow link, and everything sent after them waits.
            self.socket_buffer_bytes = min(_MAX_SOCKET_BUFFER_BYTES, max(_MIN_SOCKET_BUFFER_BYTES, queue_bytes))
        self.limit_bytes = in_flight_bytes + queue_bytes
        # Above what is in flight, or the queue would run dry and the link idle while reading resumes.
        self.resume_bytes = in_flight_bytes + queue_bytes // 2
        # Well below `resume_bytes`: a stream with an empty queue whose sink is not blocked then always has
        # room to resume, so none is missed while the sink's buffer drains without a callback.
        self.high_water_bytes = min(64 * 1024, queue_bytes // 4)
        # A delay of a millisecond or less must not vanish in the slack.
        self.slack_s = min(_SLACK_S, spec.delay_s / 2)
        self.forwarded_bytes = 0
        self.peak_held_bytes = 0


class Side(asyncio.BufferedProtocol):
    """One socket of a connection: what it receives goes to `inbound`, what it sends comes from `outbound`."""

    def __init__(self, connection: Connection, inbound: Stream, outbound: Stream) -> None:
        self._connection = connection
        self._inbound = inbound
        self._outbound = outbound
        self._buffer: memoryview | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
        self.transport = transport
        sock = transport.get_extra_info("socket")
        buffer_bytes = self._inbound.direction.socket_buffer_bytes
        with contextlib.suppress(OSError):  # the peer may have gone already: reading will tell
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if buffer_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        transport.set_write_buffer_limits(high=self._outbound.direction.high_water_bytes)
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._connection.side_made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        assert self._buffer is not None
        return self._buffer[: self._inbound.room_bytes()]

    def buffer_updated(self, nbytes: int) -> None:
        assert self._buffer is not None
        self._inbound.push(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> bool:
        self._inbound.push_eof()
        return True  # keeps the other half open

    def pause_writing(self) -> None:
        self._outbound.block()

    def resume_writing(self) -> None:
        self._outbound.unblock()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._connection.side_lost(self)

    def reset(self) -> None:
        """Ends the connection with a reset instead of an orderly end; what was not sent is dropped."""
        if self.transport is None:
            return
        with contextlib.suppress(OSError):
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self.transport.abort()


class Stream:
    """One direction of one connection: bytes on their way from `source` to `sink`."""

    def __init__(self, connection: Connection, direction: Direction, loop: asyncio.AbstractEventLoop) -> None:
        self.direction = direction
        self._connection = connection
        self._loop = loop
        self.source: Side | None = None
        self.sink: Side | None = None
        # (when it arrives, the bytes or None for the end), arrival times never decreasing.
        self._queue: deque[tuple[float, memoryview | None]] = deque()
        self._queued_bytes = 0
        self._early: list[bytes] = []
        self._arrival_s = -math.inf
        self._opened = False
        self._blocked = False
        self._paused = False
        self._eof = False
        self._dropped = False
        self._timer: asyncio.TimerHandle | None = None
        self.finished = False

    def open(self) -> None:
        """The handshake is over: what came in until now starts its way."""
        self._opened = True
        early, self._early = self._early, []
        for data in early:
            self._enqueue(data)
        if self._eof:
            self._enqueue_eof()
        self.pump()

    def room_bytes(self) -> int:
        """How much may be read now; at least one, since loops refuse an empty buffer."""
        if self._dropped:
            return _READ_BYTES
        return max(1, min(_READ_BYTES, self.direction.limit_bytes - self.held_bytes()))

    def held_bytes(self) -> int:
        transport = self.sink.transport if self.sink is not None else None
        return self._queued_bytes + (transport.get_write_buffer_size() if transport is not None else 0)

    def push(self, data: bytes) -> None:
        if self._dropped:
            return
        self._queued_bytes += len(data)
        if self._opened:
            self._enqueue(data)
            self.pump()
        else:
            self._early.append(data)
        held_bytes = self.held_bytes()
        direction = self.direction
        direction.peak_held_bytes = max(direction.peak_held_bytes, held_bytes)
        if held_bytes > direction.limit_bytes - _MIN_CHUNK_BYTES and not (self._paused or self._eof):
            source = self.source
            if source is not None and source.transport is not None:
                self._paused = True
                source.transport.pause_reading()

    def push_eof(self) -> None:
        self._eof = True
        if self._opened and not self._dropped:
            self._enqueue_eof()
            self.pump()

    def push_reset(self) -> None:
        """The source was reset: so is the sink, once the news has travelled there."""
        now_s = time.monotonic()
        arrival_s = max(self._arrival_s, self.direction.model.transit(now_s, 0))
        self._connection.reset_after(arrival_s - now_s)

    def drop(self) -> None:
        """Forgets what is under way, and from now on what comes in: there is nobody to receive it."""
        self._dropped = True
        self._queue.clear()
        self._early.clear()
        self._queued_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._resume_if_room()

    def block(self) -> None:
        self._blocked = True

    def unblock(self) -> None:
        self._blocked = False
        self.pump()

    def _enqueue(self, data: bytes) -> None:
        now_s = time.monotonic()
        direction = self.direction
        view = memoryview(data)
        for begin in range(0, len(data), direction.chunk_bytes):
            chunk = view[begin : begin + direction.chunk_bytes]
            self._arrival_s = max(self._arrival_s, direction.model.transit(now_s, len(chunk)))
            self._queue.append((self._arrival_s, chunk))

    def _enqueue_eof(self) -> None:
        self._arrival_s = max(self._arrival_s, self.direction.model.transit(time.monotonic(), 0))
        self._queue.append((self._arrival_s, None))

    def pump(self) -> None:
        """Hands over what has arrived, as far as the sink takes it, and sets the timer for the rest."""
        transport = self.sink.transport if self.sink is not None else None
        if transport is None or transport.is_closing():
            return  # side_made() calls again, or the connection is over
        queue = self._queue
        due_s = time.monotonic() + self.direction.slack_s
        while queue and not self._blocked and queue[0][0] <= due_s and not transport.is_closing():
            batch: list[memoryview] = []
            batch_bytes = 0
            while queue and queue[0][0] <= due_s and batch_bytes < _WRITE_BATCH_BYTES:
                chunk = queue[0][1]
                if chunk is None:
                    break
                queue.popleft()
                batch.append(chunk)
                batch_bytes += len(chunk)
            if batch:
                self._queued_bytes -= batch_bytes
                self.direction.forwarded_bytes += batch_bytes
                if len(batch) == 1:
                    transport.write(batch[0])
                else:
                    transport.writelines(batch)
            else:
                queue.popleft()
                with contextlib.suppress(OSError):  # the sink may have gone a moment ago
                    transport.write_eof()
                self.finished = True
                self._connection.stream_finished()
                return
        self._resume_if_room()
        if queue and not self._blocked and self._timer is None:
            wait_s = queue[0][0] - time.monotonic() - self.direction.slack_s
            # Never less than the grain: some loops round down to zero and would spin until the time has come.
            self._timer = self._loop.call_later(max(_TIMER_GRAIN_S, wait_s), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.pump()

    def _resume_if_room(self) -> None:
        if not self._paused or self._eof or self.held_bytes() > self.direction.resume_bytes:
            return
        self._paused = False
        if self.source is not None and self.source.transport is not None:
            self.source.transport.resume_reading()


class Proxy(Protocol):
    """What a connection needs of the proxy that it belongs to."""

    target_host: str
    target_port: int
    up: Direction
    down: Direction

    def connection_made(self, connection: Connection) -> None: ...

    def connection_over(self, connection: Connection) -> None: ...


class Connection:
    """One client's connection and its counterpart to the target."""

    def __init__(self, proxy: Proxy, loop: asyncio.AbstractEventLoop) -> None:
        self._proxy = proxy
        self._loop = loop
        self._up = Stream(self, proxy.up, loop)
        self._down = Stream(self, proxy.down, loop)
        self.client = Side(self, inbound=self._up, outbound=self._down)
        self._server = Side(self, inbound=self._down, outbound=self._up)
        self._up.source = self._down.sink = self.client
        self._up.sink = self._down.source = self._server
        self._timers: list[asyncio.TimerHandle] = []
        self.connecting: asyncio.Task[None] | None = None
        self._closing = False

    def side_made(self, side: Side) -> None:
        if side is self._server:
            if self._closing:
                side.reset()
            else:
                self._up.pump()
            return
        self._proxy.connection_made(self)
        if self._closing:
            return
        now_s = time.monotonic()
        up, down = self._proxy.up.model, self._proxy.down.model
        syn_s = up.transit(now_s, 0)
        reply_s = down.transit(syn_s, 0)
        ready_s = up.transit(reply_s, 0)
        self._open_after(reply_s - now_s, self._up)
        self._open_after(ready_s - now_s, self._down)
        self.connecting = self._loop.create_task(self._connect(syn_s, reply_s))
        self.connecting.add_done_callback(self._connect_ended)

    def _open_after(self, wait_s: float, stream: Stream) -> None:
        if wait_s <= 0:
            stream.open()
        else:
            self._timers.append(self._loop.call_later(wait_s, stream.open))

    async def _connect(self, syn_s: float, reply_s: float) -> None:
        if (wait_s := syn_s - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)
        proxy = self._proxy
        made = self._loop.create_task(
            self._loop.create_connection(lambda: self._server, proxy.target_host, proxy.target_port)
        )
        try:
            await asyncio.shield(made)
        except asyncio.CancelledError:
            # Cancelled half-way, uvloop closes what it has made without ever saying that it is lost: so it is made
            # first, and reset as it comes in.
            await asyncio.wait({made}, timeout=_CONNECT_S)
            made.cancel()
            await asyncio.gather(made, return_exceptions=True)
            raise
        except OSError:
            if (wait_s := reply_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            self.reset()

    def _connect_ended(self, task: asyncio.Task[None]) -> None:
        # A callback, because a task that is cancelled before its first step never enters its own `finally`.
        self.connecting = None
        if self._server.transport is None and not self._closing:
            self.reset()
        self._forget_if_over()

    def stream_finished(self) -> None:
        if self._up.finished and self._down.finished:
            self._closing = True
            self._cancel_timers()
            for side in (self.client, self._server):
                if side.transport is not None:
                    side.transport.close()

    def side_lost(self, side: Side) -> None:
        if not self._closing:
            stream_from, stream_to = (self._up, self._down) if side is self.client else (self._down, self._up)
            stream_to.drop()
            if self.connecting is not None:
                self.reset()  # the target has not been reached, so there is nobody to tell later
            else:
                stream_from.push_reset()
        self._forget_if_over()

    def reset_after(self, wait_s: float) -> None:
        self._timers.append(self._loop.call_later(max(0.0, wait_s), self.reset))

    def reset(self) -> None:
        """Resets both ends at once."""
        self._closing = True
        self._cancel_timers()
        if self.connecting is not None and self.connecting is not asyncio.current_task(self._loop):
            self.connecting.cancel()
        self._up.drop()
        self._down.drop()
        self.client.reset()
        self._server.reset()
        self._forget_if_over()

    def _cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _forget_if_over(self) -> None:
        if self.client.transport is None and self._server.transport is None and self.connecting is None:
            self._closing = True
            self._cancel_timers()
            self._proxy.connection_over(self)
