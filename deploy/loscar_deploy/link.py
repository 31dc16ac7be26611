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
import errno
import random
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from loscar_core.errors import ConfigError, PortInUseError
from loscar_deploy.link_model import Window
from loscar_deploy.link_spec import LinkSpec
from loscar_deploy.link_streams import Connection, Direction
from loscar_wire.transport import format_address


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
        self.up = Direction(spec.up, random.Random(f"link/{seed}/up"))
        self.down = Direction(spec.down, random.Random(f"link/{seed}/down"))
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._address: tuple[str, int] | None = None
        self._open: set[Connection] = set()
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
        return self.up.forwarded_bytes

    @property
    def bytes_down(self) -> int:
        """Bytes handed over to clients so far."""
        return self.down.forwarded_bytes

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
        return self.up.limit_bytes, self.down.limit_bytes

    @property
    def peak_held_bytes(self) -> tuple[int, int]:
        """The most that one connection has held so far, (up, down), in bytes."""
        return self.up.peak_held_bytes, self.down.peak_held_bytes

    async def start(self, listen_host: str = "127.0.0.1", port: int = 0) -> int:
        """Starts listening and returns the port; 0 takes a free one.

        Raises PortInUseError when the address is taken, ConfigError when it cannot be listened on, and
        RuntimeError when the link was started before.
        """
        if self._loop is not None:
            raise RuntimeError("a link can be started once")
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(lambda: Connection(self, loop).client, listen_host, port)
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
        self.up.model.set_outages(windows + [window for window, up, _ in self._cuts if up])
        self.down.model.set_outages(windows + [window for window, _, down in self._cuts if down])

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

    def connection_made(self, connection: Connection) -> None:
        self._open.add(connection)
        self._idle.clear()
        if self._closing:
            connection.reset()
        else:
            self._accepted += 1

    def connection_over(self, connection: Connection) -> None:
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
