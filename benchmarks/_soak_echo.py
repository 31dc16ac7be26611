"""Streams to a bare gRPC echo: what messages cost on this machine in this minute, without a protocol."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import grpc

from loscar_deploy.loadtest_echo import METHOD
from loscar_wire.transport import CLIENT_OPTIONS

MESSAGE = bytes(850)
"""About what a contribution of the soak takes."""


class Echo:
    """Streams to an echo process.

    Args:
        streams: how many, each with a connection of its own.
    """

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loscar_deploy.loadtest_echo"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._channels: list[Any] = []
        self._calls: list[Any] = []

    async def open(self) -> None:
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        for _ in range(self._streams):
            opened = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS)
            self._channels.append(opened)
            self._calls.append(opened.stream_stream(METHOD)())
        await self.round_trips()

    async def round_trips(self) -> list[float]:
        """Seconds for one message there and back on each stream, all at the same time."""

        async def one(call: Any) -> float:
            started = time.perf_counter()
            await call.write(MESSAGE)
            await call.read()
            return time.perf_counter() - started

        return list(await asyncio.gather(*map(one, self._calls)))

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()
        for opened in self._channels:
            await opened.close()
        self._process.kill()
        self._process.communicate()
