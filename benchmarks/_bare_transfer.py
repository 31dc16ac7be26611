"""A bare gRPC transfer in messages of 1 MiB: what bringing a model to somebody costs without a protocol.

    python benchmarks/_bare_transfer.py                       serve; says its port, ends with its standard input
    python benchmarks/_bare_transfer.py --from PORT --bytes N

`benchmarks/presence.py` starts both. The second prints the seconds from making the channel to having all bytes in one
array.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

import grpc
import numpy as np
import uvloop

from loscar_wire.transport import CLIENT_OPTIONS, SERVER_OPTIONS

METHOD = "/bare.Transfer/Down"
MESSAGE_BYTES = 1 << 20


async def serve() -> None:
    held = np.random.default_rng(0).bytes(MESSAGE_BYTES)

    async def down(request: bytes, context: Any) -> None:
        left = int(request)
        while left > 0:
            await context.write(held[:left] if left < MESSAGE_BYTES else held)
            left -= MESSAGE_BYTES

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers = {"Down": grpc.unary_stream_rpc_method_handler(down)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Transfer", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(grace=None)


async def fetch(port: int, size: int) -> float:
    started = time.perf_counter()
    taken, at = np.empty(size, np.uint8), 0
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS) as channel:
        call: Any = channel.unary_stream(METHOD)(str(size).encode())
        async for message in call:
            taken[at : at + len(message)] = np.frombuffer(message, np.uint8)
            at += len(message)
    assert at == size
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=int, dest="port", metavar="PORT")
    parser.add_argument("--bytes", type=int, default=100_000_000)
    given = parser.parse_args()
    if given.port is None:
        uvloop.run(serve())
    else:
        print(uvloop.run(fetch(given.port, given.bytes)))


if __name__ == "__main__":
    main()
