"""The door of a server: tokens, limits on streams and joins, and the count of who was refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote

from google.protobuf.message import DecodeError, Message

from loscar_core.errors import AuthenticationError, LoscarError, MalformedError, RefusedError
from loscar_server.refusals import Refusals
from loscar_wire.status import to_status
from loscar_wire.transport import check_token

log = logging.getLogger("loscar.server")

Context = Any  # grpc.aio.ServicerContext, which is not typed
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """What one server lets others do.

    Attributes:
        streams_per_host: open streams from one address.
        joins_per_s: new streams in a second, from everywhere.
        fetches: streams that fetch the model, from everywhere.
        hello_s: how long an open stream may stay without a hello.
        stall_s: how long a stream may take nothing of what it is sent.
        average_bytes: what the vectors and answers of one-off averages may take in all.
    """

    streams_per_host: int = 512
    joins_per_s: int = 200
    fetches: int = 16
    hello_s: float = 10.0
    stall_s: float = 120.0
    average_bytes: int = 1 << 30


def address_of(context: Context) -> str:
    """The host of gRPC's peer text, such as ipv4:127.0.0.1:5000 or ipv6:%5B::1%5D:5000."""
    host = unquote(context.peer()).rpartition(":")[0]
    return host.removeprefix("ipv4:").removeprefix("ipv6:").strip("[]")


class Door:
    """Lets calls in, or refuses and counts them.

    Args:
        token: what every call must carry, or None.
        limits: how many may come in.
    """

    def __init__(self, token: str | None, limits: StreamLimits) -> None:
        self.limits = limits
        self.refusals = Refusals()
        self._token = token
        self._hosts: Counter[str] = Counter()
        self._callers: Counter[str] = Counter()
        self._recent_joins: deque[float] = deque()
        self.fetching = 0

    def note(self, address: str, name: str, error: LoscarError) -> None:
        """Count a refusal; the first of its kind is worth a line in the log."""
        first = self.refusals.note(address, name, error, time.monotonic())
        log.log(logging.INFO if first else logging.DEBUG, "refused %s %s: %s", address, name, error)

    async def refuse(self, context: Context, error: LoscarError) -> NoReturn:
        """End a call with an error's status."""
        self.note(address_of(context), "", error)
        code, details = to_status(error)
        await context.abort(code, details)
        raise AssertionError("abort returned")

    async def authenticate(self, context: Context) -> None:
        try:
            check_token(context.invocation_metadata(), self._token)
        except AuthenticationError as error:
            await self.refuse(context, error)

    async def request(self, kind: type[M], data: bytes, context: Context) -> M:
        """A call's request, once its token is checked."""
        await self.authenticate(context)
        try:
            return kind.FromString(data)
        except DecodeError as error:
            await self.refuse(context, MalformedError(f"not a {kind.DESCRIPTOR.name}: {error}"))

    @contextlib.asynccontextmanager
    async def member(self, context: Context) -> AsyncIterator[str]:
        """Room for a member's stream, from the address that it yields."""
        await self.authenticate(context)
        now = time.monotonic()
        while self._recent_joins and now - self._recent_joins[0] > 1.0:
            self._recent_joins.popleft()
        if len(self._recent_joins) >= self.limits.joins_per_s:
            await self.refuse(context, RefusedError(f"more than {self.limits.joins_per_s} joins a second"))
        async with self._stream(context) as host:
            self._recent_joins.append(now)
            yield host

    @contextlib.asynccontextmanager
    async def fetch(self, context: Context) -> AsyncIterator[None]:
        """Room for a stream that fetches the model: each may hold a copy of it."""
        if self.fetching >= self.limits.fetches:
            await self.refuse(context, RefusedError(f"the model is being fetched {self.fetching} times already"))
        async with self._stream(context):
            self.fetching += 1
            try:
                yield
            finally:
                self.fetching -= 1

    @contextlib.asynccontextmanager
    async def call(self, context: Context) -> AsyncIterator[str]:
        """Room for a stream of a worker beside its member's stream; they are counted on their own."""
        await self.authenticate(context)
        async with self._stream(context, self._callers) as host:
            yield host

    @contextlib.asynccontextmanager
    async def _stream(self, context: Context, counts: Counter[str] | None = None) -> AsyncIterator[str]:
        host, hosts = address_of(context), self._hosts if counts is None else counts
        if hosts[host] >= self.limits.streams_per_host:
            await self.refuse(context, RefusedError(f"{host} has {hosts[host]} streams already"))
        hosts[host] += 1
        try:
            # Otherwise it goes with the first message, and a status could not be sent while that is under way.
            await context.send_initial_metadata(())
            yield host
        finally:
            hosts[host] -= 1
            if not hosts[host]:
                del hosts[host]

    async def taken(self, context: Context, data: bytes) -> None:
        """Write a message of a stream that is no member's; who does not take it is refused."""
        writing = asyncio.ensure_future(context.write(data))
        try:
            await asyncio.wait({writing}, timeout=self.limits.stall_s)
        finally:
            if not writing.done():
                writing.cancel()
        if writing.cancelled() or not writing.done():
            await self.refuse(context, stalled(self.limits.stall_s))
        writing.result()


def stalled(seconds: float) -> RefusedError:
    """What a stream is ended with that does not take what it is sent."""
    return RefusedError(f"nothing of what was sent was taken for {seconds:g} s")
