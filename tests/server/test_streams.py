"""The end of a member's stream, however it comes."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from loscar_core.config import PROTOCOL_VERSION, RunConfig, ServerLimits
from loscar_core.layout import Layout, Segment
from loscar_core.messages import Hello
from loscar_core.server_machine import ServerMachine
from loscar_server.service import ParameterService
from loscar_wire.mapping import encode_worker_message

HELLO = encode_worker_message(
    Hello(PROTOCOL_VERSION, b"", "w", b"i" * 16, None, False, Layout((Segment("w", (4,), "float32"),), ()), 0)
)


class Peer:
    """What gRPC gives a handler: a peer that says hello, ends its half, and takes its time over what it is sent."""

    def __init__(self) -> None:
        self.ends = asyncio.Event()
        self.writing = asyncio.Event()
        self._said = False

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def send_initial_metadata(self, _: tuple[()]) -> None:
        pass

    async def read(self) -> object:
        if not self._said:
            self._said = True
            return HELLO
        await self.ends.wait()
        return grpc.aio.EOF

    async def write(self, _: bytes) -> None:
        self.writing.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)


@pytest.mark.parametrize("turns", range(12))
def test_a_stream_that_is_cancelled_while_it_ends_leaves_nothing_behind(turns: int) -> None:
    """The peer ends its half and breaks the call right after that, as many turns of the loop later as may be."""

    async def scenario() -> None:
        machine = ServerMachine(RunConfig(), ServerLimits(), b"r" * 16, time.monotonic())
        service = ParameterService(machine, None, lambda _: None)
        peer = Peer()
        handler = asyncio.create_task(service.train(peer, peer))  # type: ignore[arg-type]
        writing = asyncio.create_task(peer.writing.wait())
        await asyncio.wait({handler, writing}, return_when=asyncio.FIRST_COMPLETED)
        assert not handler.done(), handler.exception()
        assert len(machine.members) == 1
        peer.ends.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        handler.cancel()
        await asyncio.gather(handler, return_exceptions=True)
        assert len(machine.members) == 0
        await asyncio.wait_for(service.streams_ended(600), 30)

    asyncio.run(scenario())
