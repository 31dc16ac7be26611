"""The link emulator on real sockets: its accuracy, its order, its limits and its end.

Timing is asserted here and nowhere else: against a baseline without the emulator, on medians, and only for
what the emulator itself promises.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from loscar_core.errors import ConfigError, PortInUseError
from loscar_deploy.link import LinkFarm, LinkProxy
from loscar_deploy.link_app import run_link
from loscar_deploy.link_model import DirectionModel
from loscar_deploy.link_spec import DirectionSpec, LinkSpec
from loscar_wire.transport import parse_address

T = TypeVar("T")
Loop = Callable[[], asyncio.AbstractEventLoop]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

LOOPS: dict[str, Loop] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def run(main: Coroutine[Any, Any, T], loop: Loop = asyncio.new_event_loop) -> T:
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(asyncio.wait_for(main, 20))


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> Loop:
    return LOOPS[request.param]


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  (nothing here signals: the state is the emulator's own)
            await asyncio.sleep(0.001)


async def end(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """A server on 127.0.0.1; yields its port and at the end waits for its handlers."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # the streams of Python 3.11 log a cancelled handler as an error
        finally:
            await end(writer)
            tasks.discard(task)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1 << 16):
        pass


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


# --- the model alone, under a made-up clock -------------------------------------------------------


def test_bytes_are_serialised_then_delayed() -> None:
    model = DirectionModel(DirectionSpec(0.1, 0.0, 1000.0), (), random.Random(1))
    assert model.transit(5.0, 500) == pytest.approx(5.6)
    assert model.transit(5.0, 500) == pytest.approx(6.1)  # waits for the first
    assert model.transit(5.0, 0) == pytest.approx(6.1)  # takes its turn, and no capacity
    assert model.transit(9.0, 500) == pytest.approx(9.6)  # idle time is not saved up


def test_outages_stop_the_serialisation_and_hold_arrivals() -> None:
    model = DirectionModel(DirectionSpec(0.1, 0.0, 1000.0), [(10.0, 12.0), (11.0, 13.0)], random.Random(1))
    assert model.transit(9.95, 10) == pytest.approx(13.0)  # sent before, would arrive during it
    assert model.transit(9.97, 100) == pytest.approx(13.17)  # 30 ms of it before, the rest after
    assert model.transit(11.0, 0) == pytest.approx(13.17)
    assert model.transit(14.0, 100) == pytest.approx(14.2)


def test_the_same_seed_gives_the_same_jitter() -> None:
    spec = DirectionSpec(0.1, 0.05)
    one, same, other = (DirectionModel(spec, (), random.Random(seed)) for seed in (1, 1, 2))
    samples = [one.transit(0.0, 1) for _ in range(10)]
    assert samples == [same.transit(0.0, 1) for _ in range(10)]
    assert samples != [other.transit(0.0, 1) for _ in range(10)]


@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 5000)), max_size=30),
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 2)), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_the_rate_is_never_exceeded(sends: list[tuple[float, int]], outages: list[tuple[float, float]]) -> None:
    windows = [(begin_s, begin_s + length_s) for begin_s, length_s in outages]
    model = DirectionModel(DirectionSpec(0.0, 0.0, 10_000.0), windows, random.Random(1))
    now_s = previous_s = 0.0
    for wait_s, n_bytes in sends:
        now_s += wait_s
        arrival_s = model.transit(now_s, n_bytes)
        assert arrival_s >= now_s + n_bytes / 10_000 - 1e-9
        assert arrival_s >= previous_s - 1e-9
        assert not any(begin_s <= arrival_s < end_s for begin_s, end_s in windows)
        previous_s = arrival_s


# --- accuracy -------------------------------------------------------------------------------------


async def delays_s(port: int, transits_up_s: list[float], pings: int) -> tuple[float, float, float]:
    """Median one-way delays and round trip through `port` to a server that notes when each ping came."""
    reader, writer = await connect(port)
    try:
        up_s: list[float] = []
        down_s: list[float] = []
        for number in range(pings + 3):
            sent_s = time.monotonic()
            writer.write(struct.pack("d", sent_s))
            (answered_s,) = struct.unpack("d", await reader.readexactly(8))
            if number >= 3:  # the first ones also pay for the handshake
                up_s.append(answered_s - sent_s)
                down_s.append(time.monotonic() - answered_s)
        both_s = [up + down for up, down in zip(up_s, down_s, strict=True)]
        return statistics.median(up_s), statistics.median(down_s), statistics.median(both_s)
    finally:
        await end(writer)


async def stamp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            await reader.readexactly(8)
            writer.write(struct.pack("d", time.monotonic()))


@pytest.mark.parametrize(
    "text",
    ["rtt=40ms", "delay-up=5ms,delay-down=60ms", "rtt=30ms,rate=10mbit", "rtt=3ms"],
)
def test_delays(text: str, loop: Loop) -> None:
    spec = LinkSpec.parse(text)

    async def main() -> None:
        async with serving(stamp) as port, LinkProxy("127.0.0.1", port, spec) as proxy:
            bare = await delays_s(port, [], 15)
            emulated = await delays_s(proxy.address[1], [], 15)
        expected = (spec.up.delay_s, spec.down.delay_s, spec.rtt_s)
        for bare_s, emulated_s, expected_s in zip(bare, emulated, expected, strict=True):
            assert abs(emulated_s - bare_s - expected_s) <= max(0.002, 0.05 * expected_s)

    run(main(), loop)


def test_jitter_spreads_the_delays() -> None:
    spec = LinkSpec.parse("rtt=20ms,jitter=8ms")

    async def main() -> None:
        async with serving(stamp) as port, LinkProxy("127.0.0.1", port, spec, seed=3) as proxy:
            reader, writer = await connect(proxy.address[1])
            trips_s: list[float] = []
            for _ in range(40):
                sent_s = time.monotonic()
                writer.write(struct.pack("d", sent_s))
                (answered_s,) = struct.unpack("d", await reader.readexactly(8))
                trips_s.append(answered_s - sent_s)
            await end(writer)
        trips_s = trips_s[3:]
        assert min(trips_s) >= 0.002 - 0.001
        assert statistics.median(trips_s) == pytest.approx(0.010, abs=0.0045)
        assert statistics.stdev(trips_s) > 0.002

    run(main())


async def pour(writer: asyncio.StreamWriter, total_bytes: int) -> None:
    block = bytes(1 << 15)
    for _ in range(total_bytes // len(block)):
        writer.write(block)
        await writer.drain()
    writer.write_eof()


async def measure(reader: asyncio.StreamReader) -> float:
    """Received bytes per second, from the first arrival to the last."""
    first_s = last_s = 0.0
    received = -1
    while data := await reader.read(1 << 16):
        last_s = time.monotonic()
        if received < 0:
            first_s, received = last_s, 0
        else:
            received += len(data)
    return received / (last_s - first_s)


@pytest.mark.parametrize("text", ["rtt=20ms,up=8mbit,down=40mbit", "jitter=10ms,rtt=40ms,up=64mbit,down=3mbit"])
def test_rates_of_both_directions_at_once(text: str, loop: Loop) -> None:
    spec = LinkSpec.parse(text)
    up_rate, down_rate = spec.up.rate_bytes_per_s, spec.down.rate_bytes_per_s
    assert up_rate is not None
    assert down_rate is not None

    async def main() -> None:
        measured: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            _, rate = await asyncio.gather(pour(writer, int(down_rate)), measure(reader))
            measured.set_result(rate)

        async with serving(both) as port, LinkProxy("127.0.0.1", port, spec) as proxy:
            reader, writer = await connect(proxy.address[1])
            _, rate = await asyncio.gather(pour(writer, int(up_rate)), measure(reader))
            assert rate == pytest.approx(down_rate, rel=0.05)
            assert await measured == pytest.approx(up_rate, rel=0.05)
            assert proxy.bytes_up == int(up_rate) >> 15 << 15
            assert proxy.bytes_down == int(down_rate) >> 15 << 15
            await end(writer)

    run(main(), loop)


def test_connections_share_the_rate() -> None:
    rate = 1_000_000

    async def main() -> None:
        async with (
            serving(swallow) as port,
            LinkProxy("127.0.0.1", port, LinkSpec.parse(f"rate={rate * 8 // 1000}kbit")) as proxy,
        ):
            started_s = time.monotonic()
            pairs = [await connect(proxy.address[1]) for _ in range(4)]
            await asyncio.gather(*(pour(writer, rate // 8) for _, writer in pairs))
            await asyncio.gather(*(reader.read() for reader, _ in pairs))
            total = proxy.bytes_up
            assert total / (time.monotonic() - started_s) == pytest.approx(rate, rel=0.1)
            for _, writer in pairs:
                await end(writer)

    run(main())


def test_the_handshake_takes_its_round_trips(loop: Loop) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.write(await reader.readexactly(1))

    async def main() -> None:
        async with (
            serving(greet) as port,
            LinkProxy("127.0.0.1", port, LinkSpec.parse("rtt=60ms")) as proxy,
        ):
            started_s = time.monotonic()
            reader, writer = await connect(proxy.address[1])
            writer.write(b"x")
            await reader.readexactly(5)
            # One round trip opens; the client's packet then takes half of one, and so does what comes back.
            assert time.monotonic() - started_s == pytest.approx(0.120, abs=0.012)
            await reader.readexactly(1)
            assert time.monotonic() - started_s == pytest.approx(0.120, abs=0.012)
            await end(writer)

    run(main(), loop)


# --- order and integrity --------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 60_000), min_size=1, max_size=15),
    st.sampled_from(["none", "rtt=4ms,jitter=4ms", "rtt=2ms,jitter=1ms,dist=pareto,rate=200mbit"]),
    st.sampled_from(sorted(LOOPS)),
    st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_streams_arrive_as_they_were_sent(sizes: list[int], text: str, name: str, seed: int) -> None:
    rng = random.Random(seed)
    blocks = [rng.randbytes(size) for size in sizes]

    async def main() -> None:
        async with (
            serving(echo) as port,
            LinkProxy("127.0.0.1", port, LinkSpec.parse(text), seed=seed) as proxy,
        ):
            reader, writer = await connect(proxy.address[1])

            async def send() -> None:
                for block in blocks:
                    writer.write(block)
                    await writer.drain()
                    if rng.random() < 0.3:
                        await asyncio.sleep(0.001)
                writer.write_eof()

            _, received = await asyncio.gather(send(), reader.read())
            assert received == b"".join(blocks)
            assert proxy.bytes_up == proxy.bytes_down == sum(sizes)
            await end(writer)

    run(main(), LOOPS[name])


def test_half_close_leaves_the_other_half_open(loop: Loop) -> None:
    async def answer_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()
        await asyncio.sleep(0.02)
        writer.write(data[::-1])

    async def main() -> None:
        async with (
            serving(answer_at_the_end) as port,
            LinkProxy("127.0.0.1", port, LinkSpec.parse("rtt=10ms")) as proxy,
        ):
            reader, writer = await connect(proxy.address[1])
            writer.write(b"abc")
            writer.write_eof()
            assert await reader.read() == b"cba"
            await end(writer)
            await until(lambda: not proxy.connections)
            assert proxy.connections_total == 1

    run(main(), loop)


def test_many_connections(loop: Loop) -> None:
    async def main() -> None:
        async with (
            serving(echo) as port,
            LinkProxy("127.0.0.1", port, LinkSpec.parse("rtt=10ms,jitter=5ms,rate=100mbit")) as proxy,
        ):

            async def talk(number: int) -> None:
                reader, writer = await connect(proxy.address[1])
                message = struct.pack("I", number) * 500
                for _ in range(3):
                    writer.write(message)
                    assert await reader.readexactly(len(message)) == message
                await end(writer)

            await asyncio.gather(*(talk(number) for number in range(60)))
            assert proxy.connections_total == 60
            assert proxy.bytes_up == proxy.bytes_down == 60 * 3 * 2000

    run(main(), loop)


# --- outages, resets, refusals --------------------------------------------------------------------


def test_an_outage_holds_and_then_releases(loop: Loop) -> None:
    async def main() -> None:
        async with (
            serving(stamp) as port,
            LinkProxy("127.0.0.1", port, LinkSpec.parse("rtt=10ms,outage=200ms@100ms")) as proxy,
        ):
            reader, writer = await connect(proxy.address[1])
            writer.write(bytes(8))
            await reader.readexactly(8)
            start_s = time.monotonic()
            proxy.restart_clock(start_s)
            await asyncio.sleep(0.12)
            forwarded = proxy.bytes_up
            writer.write(bytes(8))
            await asyncio.sleep(0.1)
            assert proxy.bytes_up == forwarded
            (arrived_s,) = struct.unpack("d", await reader.readexactly(8))
            assert arrived_s - start_s == pytest.approx(0.305, abs=0.015)
            await end(writer)

    run(main(), loop)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_cut_holds_one_direction_and_leaves_the_other(way: str, loop: Loop) -> None:
    async def main() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(100):
                writer.write(data)

        async with serving(echo) as port, LinkProxy("127.0.0.1", port, LinkSpec()) as link:
            with pytest.raises(RuntimeError, match="not been started"):
                LinkProxy("127.0.0.1", port, LinkSpec()).cut(1.0)
            reader, writer = await asyncio.open_connection(*link.address)
            writer.write(b"a")
            assert await reader.readexactly(1) == b"a"
            passed = (link.bytes_up, link.bytes_down)
            cut_at = time.monotonic()
            link.cut(0.2, up=way == "up", down=way == "down")
            writer.write(b"b")
            if way == "down":
                await until(lambda: link.bytes_up == passed[0] + 1)
                assert time.monotonic() - cut_at < 0.19
            assert await reader.readexactly(1) == b"b"
            assert 0.19 <= time.monotonic() - cut_at < 0.6
            await end(writer)

    run(main(), loop)


def test_a_reset_ends_all_connections_and_admits_new_ones(loop: Loop) -> None:
    ends: list[str] = []

    async def note_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(100):
                writer.write(data)
            ends.append("end")
        except ConnectionResetError:
            ends.append("reset")

    async def main() -> None:
        async with (
            serving(note_the_end) as port,
            LinkProxy("127.0.0.1", port, LinkSpec.parse("rtt=4ms,reset@100ms")) as proxy,
        ):
            pairs = [await connect(proxy.address[1]) for _ in range(3)]
            for reader, writer in pairs:
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
            proxy.restart_clock()
            for reader, writer in pairs:
                with pytest.raises(ConnectionResetError):
                    await reader.read()
                await end(writer)
            reader, writer = await connect(proxy.address[1])
            writer.write(b"y")
            assert await reader.readexactly(1) == b"y"
            assert ends == ["reset"] * 3
            writer.write_eof()
            assert await reader.read() == b""
            await end(writer)

    run(main(), loop)


def test_connections_that_are_reset_while_they_are_made_are_forgotten(loop: Loop) -> None:
    async def main() -> None:
        rng = random.Random(1)
        async with serving(swallow) as port, LinkProxy("127.0.0.1", port, LinkSpec.parse("none")) as proxy:
            for _ in range(200):
                with socket.socket() as client:
                    client.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        client.connect(proxy.address)
                    for _ in range(rng.randrange(12)):
                        await asyncio.sleep(0)
                    proxy.reset_connections()
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
            await until(lambda: proxy.connections == 0)

    run(main(), loop)


@pytest.mark.parametrize("by_client", [True, False])
def test_a_peers_reset_travels_to_the_other_end(by_client: bool, loop: Loop) -> None:
    seen_s: list[float] = []

    def abort(writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1))
        await reader.readexactly(1)
        if by_client:
            with pytest.raises(ConnectionResetError):
                await reader.read()
            seen_s.append(time.monotonic())
        else:
            seen_s.append(time.monotonic())
            abort(writer)

    async def main() -> None:
        async with (
            serving(handler) as port,
            LinkProxy("127.0.0.1", port, LinkSpec.parse("rtt=60ms")) as proxy,
        ):
            reader, writer = await connect(proxy.address[1])
            writer.write(b"x")
            await reader.readexactly(1)
            writer.write(b"y")
            if by_client:
                await asyncio.sleep(0.01)
                at_s = time.monotonic()
                abort(writer)
                await until(lambda: seen_s)
                travelled_s = seen_s[0] - at_s
            else:
                with pytest.raises(ConnectionResetError):
                    await reader.read()
                travelled_s = time.monotonic() - seen_s[0]
            assert travelled_s == pytest.approx(0.030, abs=0.012)
            await end(writer)

    run(main(), loop)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_refusal_reaches_the_client_after_a_round_trip(loop: Loop) -> None:
    async def main() -> None:
        async with LinkProxy("127.0.0.1", free_port(), LinkSpec.parse("rtt=40ms")) as proxy:
            started_s = time.monotonic()
            reader, writer = await connect(proxy.address[1])
            with pytest.raises(ConnectionResetError):
                await reader.read()
            assert time.monotonic() - started_s == pytest.approx(0.040, abs=0.012)
            assert proxy.connections == 0
            await end(writer)

    run(main(), loop)


def test_a_client_that_leaves_during_the_handshake_is_forgotten(loop: Loop) -> None:
    async def main() -> None:
        async with (
            serving(swallow) as port,
            LinkProxy("127.0.0.1", port, LinkSpec.parse("rtt=100ms")) as proxy,
        ):
            _, writer = await connect(proxy.address[1])
            writer.write(b"x")
            await end(writer)
            await until(lambda: proxy.connections_total and not proxy.connections)

    run(main(), loop)


# --- backpressure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["none", "rtt=20ms,rate=400mbit", "rtt=10ms,jitter=5ms,rate=1mbit"])
def test_what_is_held_is_bounded_when_the_sink_does_not_read(text: str, loop: Loop) -> None:
    async def main() -> None:
        release = asyncio.Event()
        received = 0

        async def sulk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal received
            await release.wait()
            while data := await reader.read(1 << 16):
                received += len(data)

        async with serving(sulk) as port, LinkProxy("127.0.0.1", port, LinkSpec.parse(text)) as proxy:
            _, writer = await connect(proxy.address[1])
            sent = 0

            async def flood() -> None:
                nonlocal sent
                block = bytes(1 << 16)
                while True:
                    writer.write(block)
                    sent += len(block)
                    await writer.drain()

            task = asyncio.create_task(flood())
            if "rate=1mbit" in text:
                await asyncio.sleep(0.3)  # long before the kernel's buffers are full: the link is the limit
            else:
                stuck_at = -1
                async with asyncio.timeout(5):
                    while sent != stuck_at:
                        stuck_at = sent
                        await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert proxy.peak_held_bytes[0] <= proxy.hold_limit_bytes[0]
            assert proxy.peak_held_bytes[0] >= proxy.hold_limit_bytes[0] // 2
            if text == "none":
                release.set()
                writer.write_eof()
                await until(lambda: received >= sent)
            assert proxy.peak_held_bytes[0] <= proxy.hold_limit_bytes[0]
            writer.transport.abort()

    run(main(), loop)


# --- a real gRPC service --------------------------------------------------------------------------


def test_grpc_calls_pass() -> None:
    async def unary(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return request[::-1]

    async def bidi(
        requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request * 2

    async def main() -> None:
        server = grpc.aio.server()
        handlers = {
            "Unary": grpc.unary_unary_rpc_method_handler(unary),
            "Bidi": grpc.stream_stream_rpc_method_handler(bidi),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with LinkProxy("127.0.0.1", port, LinkSpec.parse("rtt=20ms,jitter=3ms,rate=80mbit")) as proxy:
            async with grpc.aio.insecure_channel(
                f"127.0.0.1:{proxy.address[1]}", options=[("grpc.use_local_subchannel_pool", 1)]
            ) as channel:
                payload = os.urandom(200_000)
                assert await channel.unary_unary("/test.Echo/Unary")(payload, timeout=10) == payload[::-1]
                started_s = time.monotonic()
                await channel.unary_unary("/test.Echo/Unary")(b"ping", timeout=10)
                assert time.monotonic() - started_s >= 0.013
                call = channel.stream_stream("/test.Echo/Bidi")(timeout=10)
                for number in range(5):
                    await call.write(bytes([number]) * 1000)
                    assert await call.read() == bytes([number]) * 2000
                await call.done_writing()
                assert await call.read() == grpc.aio.EOF
            assert proxy.bytes_up > 200_000
        await server.stop(None)

    run(main())


# --- the end --------------------------------------------------------------------------------------


def open_sockets() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found.add(target)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts sockets under /proc")
@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.1])
def test_close_leaves_no_tasks_and_no_sockets(after_s: float, loop: Loop) -> None:
    async def main() -> None:
        before = open_sockets()
        clients: list[socket.socket] = []
        # A server that never answers nor closes, in the kernel's backlog only: nothing ends by itself.
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
            proxy = LinkProxy(
                "127.0.0.1", listener.getsockname()[1], LinkSpec.parse("rtt=20ms,reset@60s,outage=1s@50s")
            )
            port = await proxy.start()
            for _ in range(8):
                client = socket.create_connection(("127.0.0.1", port))
                client.sendall(b"x" * 1000)
                clients.append(client)
            await asyncio.sleep(after_s)
            await proxy.close()
            await proxy.close()
            assert proxy.connections == 0
            for client in clients:
                client.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(ConnectionRefusedError):
            await connect(port)
        await asyncio.sleep(0.01)
        assert open_sockets() == before

    async def unwrapped() -> None:
        await main()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(unwrapped())


def test_a_taken_port_has_its_own_error() -> None:
    async def main() -> None:
        async with LinkProxy("127.0.0.1", 1, LinkSpec()) as first:
            second = LinkProxy("127.0.0.1", 1, LinkSpec())
            with pytest.raises(PortInUseError, match="already in use"):
                await second.start(port=first.address[1])
            await second.close()
        with pytest.raises(ConfigError, match="cannot listen"):
            await LinkProxy("127.0.0.1", 1, LinkSpec()).start("192.0.2.1")

    run(main())


def test_a_farm_gives_each_worker_its_own_link(loop: Loop) -> None:
    specs = [LinkSpec.parse(f"rtt={ms}ms") for ms in (10, 40, 80)]

    async def main() -> None:
        async with serving(stamp) as port, LinkFarm("127.0.0.1", port, specs) as farm:
            trips = await asyncio.gather(*(delays_s(link.address[1], [], 5) for link in farm.links))
            for trip, spec in zip(trips, specs, strict=True):
                assert trip[2] == pytest.approx(spec.rtt_s, abs=0.006)
            assert farm.bytes_up == farm.bytes_down == [64, 64, 64]
            with pytest.raises(RuntimeError):
                await farm.links[0].start()

    run(main(), loop)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:0", ("::1", 0)),
        ("server.example:50051", ("server.example", 50051)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text, "--to") == address


@pytest.mark.parametrize("text", ["", "host", ":80", "host:", "host:x", "host:70000", "::1:80"])
def test_wrong_addresses_name_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--to"):
        parse_address(text, "--to")


def test_run_link_says_where_it_listens_and_what_it_passed() -> None:
    async def main() -> None:
        lines: list[str] = []
        stop = asyncio.Event()
        async with serving(echo) as port:
            task = asyncio.create_task(
                run_link("127.0.0.1:0", f"127.0.0.1:{port}", "rtt=2ms", stop=stop, say=lines.append)
            )
            await until(lambda: lines)
            address = lines[0].split()[3].rstrip(",")
            reader, writer = await connect(int(address.rpartition(":")[2]))
            writer.write(b"abc")
            assert await reader.readexactly(3) == b"abc"
            stop.set()
            await task
            await end(writer)
        assert "rtt=2ms" in lines[0]
        assert lines[1] == "link closed: 3 bytes up, 3 bytes down, 1 connections"

    run(main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_on_signals(number: signal.Signals) -> None:
    code = "from loscar_deploy.link_app import main; raise SystemExit(main('127.0.0.1:0', '127.0.0.1:9', 'lan', 0))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith("link listening on 127.0.0.1:")
            process.send_signal(number)
            assert process.stdout.readline().startswith("link closed: 0 bytes up")
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_errno_is_the_one_that_start_looks_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as other:
        with pytest.raises(OSError) as caught:
            other.bind(taken.getsockname())
        assert caught.value.errno == errno.EADDRINUSE
