"""A bare gRPC echo in a process of its own: what the same bytes cost without a protocol, on this machine, now."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

import grpc
import uvloop

from loscar_wire.transport import CLIENT_OPTIONS, SERVER_OPTIONS

METHOD = "/loscar.v1.Echo/Echo"
ENDS_S = 10.0


async def _serve() -> None:
    """Send every message back, until the standard input is closed."""

    async def echo(_: Any, context: Any) -> None:
        while (data := await context.read()) is not grpc.aio.EOF:
            await context.write(data)

    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("loscar.v1.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(grace=None)


async def there_and_back(call: Any, payloads: Sequence[bytes]) -> None:
    """Send messages to the echo while reading what comes back, until all of them have."""

    async def send() -> None:
        for payload in payloads:
            await call.write(payload)

    sending = asyncio.create_task(send())
    for _ in payloads:
        await call.read()
    await sending


async def echo_cost(streams: int, messages: list[int], rounds: int) -> tuple[float, list[float]]:
    """Send the same bytes there and back, on all streams at a time, round after round.

    Args:
        streams: each with a connection of its own.
        messages: sizes in bytes of what a stream sends in a round.
        rounds: how many.

    Returns:
        Processor seconds of the echo for one stream's messages of one round, and the seconds that each took.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "loscar_deploy.loadtest_echo",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    channels: list[Any] = []
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        calls = []
        for _ in range(streams):
            channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS))
            calls.append(channels[-1].stream_stream(METHOD)())
        payloads = [bytes(size) for size in messages]

        async def one(call: Any) -> float:
            started = time.perf_counter()
            await there_and_back(call, payloads)
            return time.perf_counter() - started

        await asyncio.gather(*map(one, calls))  # connections are made, buffers have grown
        import psutil

        measured = psutil.Process(process.pid)
        before = measured.cpu_times()
        seconds: list[float] = []
        for _ in range(rounds):
            seconds += await asyncio.gather(*map(one, calls))
        after = measured.cpu_times()
        spent = after.user + after.system - before.user - before.system
        for call in calls:
            call.cancel()
        return spent / (rounds * streams), seconds
    finally:
        for channel in channels:
            await channel.close()
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), ENDS_S)
        except TimeoutError:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    uvloop.run(_serve())
