"""A bare gRPC echo in a process of its own: what messages cost on this machine in this minute, without a protocol."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import grpc
import uvloop

from loscar_wire.transport import CLIENT_OPTIONS, SERVER_OPTIONS

METHOD = "/echo/Echo"
MESSAGE = bytes(850)
"""About what a contribution of the soak takes."""


async def serve() -> None:
    """Send every message back, until the standard input is closed."""

    async def echo(_: Any, context: Any) -> None:
        while (data := await context.read()) is not grpc.aio.EOF:
            await context.write(data)

    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)


class Echo:
    """Streams to an echo process.

    Args:
        streams: how many, each with a connection of its own.
    """

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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


if __name__ == "__main__":
    uvloop.run(serve())
