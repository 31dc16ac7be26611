"""A link emulator: a TCP proxy that holds bytes back as a slow link would. It needs no privileges.

Each direction is one queue that all connections of the proxy share, as they would share the link: bytes are
serialised at the rate, in the order in which the proxy read them, and then travel for the one-way delay plus
jitter. Within a connection nothing overtakes. What the model covers and what it cannot is in docs/links.md;
the points that shape the code:

- A chunk is what is charged and jittered as a whole: 10 ms of the rate, between one packet and 16 KiB.
- The proxy reads no more than the link can hold (delay times rate, plus 50 ms of queue), so a sender meets
  backpressure where the link would give it. The bound is per connection and direction.
- Opening: the real connection to the target is made when the first packet would arrive there, after one
  one-way delay; the client's bytes start after a full round trip, the target's after one and a half. A
  refusal reaches the client after a round trip. The client's own `connect()` still returns at once, since the
  kernel answers it.
- An outage stops the serialisation, and what would arrive during it arrives at its end.
- Timers have a grain of a millisecond and fire late. A release is therefore aimed half a millisecond early;
  on Linux, bytes then arrive about half a millisecond late each way, at any delay above a few milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import random
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self, cast

from loscar_core.errors import ConfigError, PortInUseError
from loscar_deploy.link_spec import DirectionSpec, LinkSpec
from loscar_wire.transport import format_address

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
_LINGER_RESET: Final = struct.pack("ii", 1, 0)

Window = tuple[float, float]


class DirectionModel:
    """When bytes leave one direction of a link. Pure: the time is an argument, so virtual clocks work too.

    `outages` are (start, end) in seconds on the clock of `transit`.
    """

    def __init__(self, spec: DirectionSpec, outages: Sequence[Window], rng: random.Random) -> None:
        self.spec = spec
        self._rng = rng
        self._outages = _merged(outages)
        self._free_at_s = -math.inf

    def set_outages(self, outages: Sequence[Window]) -> None:
        """Replaces the outages; what is already under way keeps its time."""
        self._outages = _merged(outages)

    def transit(self, now_s: float, n_bytes: int) -> float:
        """When the last of `n_bytes` handed over at `now_s` arrives at the other end, in seconds.

        Calls with bytes are in the order of sending. 0 bytes stand for a packet without payload: it waits
        its turn and meets outages, but takes no capacity. Jitter may make a later call arrive earlier: who
        needs order takes the maximum.
        """
        start_s = max(now_s, self._free_at_s)
        rate = self.spec.rate_bytes_per_s
        sent_s = self._transmitted(start_s, n_bytes / rate if rate is not None else 0.0)
        if n_bytes and rate is not None:
            self._free_at_s = sent_s
        arrival_s = sent_s + self.spec.sample_delay_s(self._rng)
        for begin_s, end_s in self._outages:
            if begin_s <= arrival_s < end_s:
                return end_s
        return arrival_s

    def _transmitted(self, start_s: float, duration_s: float) -> float:
        """The end of a transmission that begins at `start_s` and pauses during outages."""
        end_s = start_s + duration_s
        for outage_begin_s, outage_end_s in self._outages:
            if outage_begin_s > end_s:
                break
            if outage_end_s > start_s:
                end_s += outage_end_s - max(outage_begin_s, start_s)
        return end_s


def _merged(outages: Sequence[Window]) -> list[Window]:
    merged: list[Window] = []
    for begin_s, end_s in sorted(outages):
        if merged and begin_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end_s, merged[-1][1]))
        else:
            merged.append((begin_s, end_s))
    return merged


class _Direction:
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


class _Side(asyncio.BufferedProtocol):
    """One socket of a connection: what it receives goes to `inbound`, what it sends comes from `outbound`."""

    def __init__(self, connection: _Connection, inbound: _Stream, outbound: _Stream) -> None:
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


class _Stream:
    """One direction of one connection: bytes on their way from `source` to `sink`."""

    def __init__(self, connection: _Connection, direction: _Direction, loop: asyncio.AbstractEventLoop) -> None:
        self.direction = direction
        self._connection = connection
        self._loop = loop
        self.source: _Side | None = None
        self.sink: _Side | None = None
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


class _Connection:
    """One client's connection and its counterpart to the target."""

    def __init__(self, proxy: LinkProxy, loop: asyncio.AbstractEventLoop) -> None:
        self._proxy = proxy
        self._loop = loop
        self._up = _Stream(self, proxy._up, loop)
        self._down = _Stream(self, proxy._down, loop)
        self.client = _Side(self, inbound=self._up, outbound=self._down)
        self._server = _Side(self, inbound=self._down, outbound=self._up)
        self._up.source = self._down.sink = self.client
        self._up.sink = self._down.source = self._server
        self._timers: list[asyncio.TimerHandle] = []
        self.connecting: asyncio.Task[None] | None = None
        self._closing = False

    def side_made(self, side: _Side) -> None:
        if side is self._server:
            if self._closing:
                side.reset()
            else:
                self._up.pump()
            return
        self._proxy._connection_made(self)
        if self._closing:
            return
        now_s = time.monotonic()
        up, down = self._proxy._up.model, self._proxy._down.model
        syn_s = up.transit(now_s, 0)
        reply_s = down.transit(syn_s, 0)
        ready_s = up.transit(reply_s, 0)
        self._open_after(reply_s - now_s, self._up)
        self._open_after(ready_s - now_s, self._down)
        self.connecting = self._loop.create_task(self._connect(syn_s, reply_s))
        self.connecting.add_done_callback(self._connect_ended)

    def _open_after(self, wait_s: float, stream: _Stream) -> None:
        if wait_s <= 0:
            stream.open()
        else:
            self._timers.append(self._loop.call_later(wait_s, stream.open))

    async def _connect(self, syn_s: float, reply_s: float) -> None:
        if (wait_s := syn_s - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)
        proxy = self._proxy
        try:
            await self._loop.create_connection(lambda: self._server, proxy.target_host, proxy.target_port)
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

    def side_lost(self, side: _Side) -> None:
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
            self._proxy._connection_over(self)


class LinkProxy:
    """Emulates one link in front of `target_host:target_port`.

    `seed` seeds the jitter of both directions. `clock_start_s`, on time.monotonic()'s clock, is second 0 of
    the spec's outages and resets; None means the moment of `start()`. Everything runs in the loop that
    `start()` is called in, uvloop or the standard one. As an async context manager it listens on a free port
    of 127.0.0.1 unless it was started before.
    """

    def __init__(
        self,
        target_host: str,
        target_port: int,
        spec: LinkSpec,
        *,
        seed: int = 0,
        clock_start_s: float | None = None,
    ) -> None:
        self.target_host = target_host
        self.target_port = target_port
        self.spec = spec
        self._clock_start_s = clock_start_s
        self._up = _Direction(spec.up, random.Random(f"link/{seed}/up"))
        self._down = _Direction(spec.down, random.Random(f"link/{seed}/down"))
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._address: tuple[str, int] | None = None
        self._open: set[_Connection] = set()
        self._accepted = 0
        self._resets: list[asyncio.TimerHandle] = []
        self._cuts: list[tuple[Window, bool, bool]] = []
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that clients connect to. Raises RuntimeError before `start()`."""
        if self._address is None:
            raise RuntimeError("the link has not been started")
        return self._address

    @property
    def bytes_up(self) -> int:
        """Bytes handed over to the target so far."""
        return self._up.forwarded_bytes

    @property
    def bytes_down(self) -> int:
        """Bytes handed over to clients so far."""
        return self._down.forwarded_bytes

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    @property
    def connections_total(self) -> int:
        """Connections accepted since the start."""
        return self._accepted

    @property
    def hold_limit_bytes(self) -> tuple[int, int]:
        """The most that one connection holds in user space, (up, down), in bytes."""
        return self._up.limit_bytes, self._down.limit_bytes

    @property
    def peak_held_bytes(self) -> tuple[int, int]:
        """The most that one connection has held so far, (up, down), in bytes."""
        return self._up.peak_held_bytes, self._down.peak_held_bytes

    async def start(self, listen_host: str = "127.0.0.1", port: int = 0) -> int:
        """Starts listening and returns the port; 0 takes a free one.

        Raises PortInUseError when the address is taken, ConfigError when it cannot be listened on, and
        RuntimeError when the link was started before.
        """
        if self._loop is not None:
            raise RuntimeError("a link can be started once")
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(lambda: _Connection(self, loop).client, listen_host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(f"link: {format_address(listen_host, port)} is already in use") from None
            reason = error.strerror or error
            raise ConfigError(f"link: cannot listen on {format_address(listen_host, port)}: {reason}") from None
        self._server = server
        self._loop = loop
        host, bound_port = server.sockets[0].getsockname()[:2]
        self._address = (host, bound_port)
        self.restart_clock(self._clock_start_s)
        return int(bound_port)

    def restart_clock(self, clock_start_s: float | None = None) -> None:
        """Makes `clock_start_s` (time.monotonic(); None: now) second 0 of the outages and resets.

        For runs whose time starts after their links do. Resets whose time has passed do not happen. Raises
        RuntimeError before `start()`.
        """
        if self._loop is None:
            raise RuntimeError("the link has not been started")
        now_s = time.monotonic()
        start_s = self._clock_start_s = now_s if clock_start_s is None else clock_start_s
        self._set_outages()
        self._cancel_resets()
        for at_s in self.spec.resets:
            if (wait_s := start_s + at_s - now_s) >= 0:
                self._resets.append(self._loop.call_later(wait_s, self.reset_connections))

    def cut(self, duration_s: float, *, up: bool = True, down: bool = True) -> None:
        """An outage from now on, in one direction or in both; the spec's own outages go on as planned.

        What is already under way arrives. Raises RuntimeError before `start()`.
        """
        if self._clock_start_s is None:
            raise RuntimeError("the link has not been started")
        now_s = time.monotonic()
        self._cuts = [c for c in self._cuts if c[0][1] > now_s]
        self._cuts.append(((now_s, now_s + duration_s), up, down))
        self._set_outages()

    def _set_outages(self) -> None:
        start_s = self._clock_start_s
        assert start_s is not None
        windows = [(start_s + begin_s, start_s + begin_s + length_s) for begin_s, length_s in self.spec.outages]
        self._up.model.set_outages(windows + [window for window, up, _ in self._cuts if up])
        self._down.model.set_outages(windows + [window for window, _, down in self._cuts if down])

    def reset_connections(self) -> None:
        """Resets all open connections now; both ends see a reset. New connections are welcome."""
        for connection in list(self._open):
            connection.reset()

    async def close(self) -> None:
        """Stops listening, resets what is open, and returns when every socket is closed. May be repeated."""
        self._closing = True
        self._cancel_resets()
        server, self._server = self._server, None
        if server is not None:
            server.close()
            for _ in range(3):
                await asyncio.sleep(0)  # lets connections that were being accepted turn up, to be reset below
        tasks = [connection.connecting for connection in self._open if connection.connecting is not None]
        self.reset_connections()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._idle.wait()
        if server is not None:
            await server.wait_closed()

    async def __aenter__(self) -> Self:
        if self._loop is None:
            await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _cancel_resets(self) -> None:
        for timer in self._resets:
            timer.cancel()
        self._resets.clear()

    def _connection_made(self, connection: _Connection) -> None:
        self._open.add(connection)
        self._idle.clear()
        if self._closing:
            connection.reset()
        else:
            self._accepted += 1

    def _connection_over(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if not self._open:
            self._idle.set()


class LinkFarm:
    """One link per worker in front of the same target, all in the running loop.

    Worker i's link is `specs[i]`, its jitter seeded by (seed, i). The clock of all outages and resets is the
    same: `clock_start_s` as in LinkProxy.
    """

    def __init__(
        self,
        target_host: str,
        target_port: int,
        specs: Sequence[LinkSpec],
        *,
        seed: int = 0,
        clock_start_s: float | None = None,
    ) -> None:
        self._clock_start_s = clock_start_s
        self.links = tuple(
            LinkProxy(target_host, target_port, spec, seed=seed * 1_000_003 + index) for index, spec in enumerate(specs)
        )

    @property
    def bytes_up(self) -> list[int]:
        """Bytes handed over to the target so far, per link."""
        return [link.bytes_up for link in self.links]

    @property
    def bytes_down(self) -> list[int]:
        """Bytes handed over to the worker so far, per link."""
        return [link.bytes_down for link in self.links]

    async def start(self, listen_host: str = "127.0.0.1") -> list[int]:
        """Starts all links on free ports and returns these in order; on failure all are closed again.

        Raises ConfigError when the host cannot be listened on.
        """
        try:
            ports = [await link.start(listen_host) for link in self.links]
        except BaseException:
            await self.close()
            raise
        self.restart_clock(self._clock_start_s)
        return ports

    def restart_clock(self, clock_start_s: float | None = None) -> None:
        """`LinkProxy.restart_clock` for all links, with one common time."""
        start_s = time.monotonic() if clock_start_s is None else clock_start_s
        for link in self.links:
            link.restart_clock(start_s)

    async def close(self) -> None:
        """Closes all links. May be repeated."""
        await asyncio.gather(*(link.close() for link in self.links))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
