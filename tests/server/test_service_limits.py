"""Limits of a running server: who says nothing, takes nothing, comes in crowds or brings too much is sent away."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from impatient import FETCHES
from processes import DEADLINE_S, Processes, Server, status_of, wait_until
from raw import HandWorker, RawStream, engine_of

from loscar_core.errors import RefusedError
from loscar_core.messages import Goodbye, Heartbeat, Reason, Welcome
from loscar_server import admission
from loscar_server.admission import Door, StreamLimits
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.mapping import encode_worker_message
from loscar_wire.transport import FETCH_MODEL, TRAIN

IMPATIENT = Path(__file__).parent.parent / "support" / "impatient.py"
DIMENSION = 6_000_000
"""24 MB: more than a connection takes from a peer that does not read."""

FLAGS = ["--workers", "1", "--coordinates", "100", "--lease", "2s", "--max-members", "4", "--max-params", "6e6"]
FLAGS += ["--joins-per-second", "100000", "--streams-per-host", "6"]


class Site:
    """An impatient server with a run of one honest worker."""

    def __init__(self, server: Server, channel: grpc.Channel, honest: HandWorker) -> None:
        self.server = server
        self.channel = channel
        self.honest = honest

    def refused(self, kind: str, name: str = "") -> int:
        """How often peers of a name were refused for a reason of this kind."""
        found = status_of(self.server.address).refusals
        assert all(r.address == "127.0.0.1" for r in found)
        return sum(r.count for r in found if (r.kind, r.name) == (kind, name))

    def members(self) -> set[str]:
        return {m.name for m in status_of(self.server.address).members}

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.server.pid).memory_info().rss)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    processes = Processes(tmp_path_factory.mktemp("site"))
    try:
        server = processes.server(*FLAGS, program=[str(IMPATIENT)])
        with (
            grpc.insecure_channel(server.address) as channel,
            RawStream(channel, deadline_s=4 * DEADLINE_S) as stream,
        ):
            honest = HandWorker(stream, engine_of("honest", DIMENSION))
            honest.keep_alive()
            honest.wait_open()
            yield Site(server, channel, honest)
        assert "Traceback" not in server.err
    finally:
        processes.kill_all()


@pytest.fixture(autouse=True)
def _the_run_goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "site" in request.fixturenames:
        site: Site = request.getfixturevalue("site")
        assert site.honest.round(1.0).change.tolist() == [1.0] * 100


def channel_of(server: Server) -> grpc.Channel:
    """A connection of its own, that takes 64 KiB from who is not read: the window does not grow with the network."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    return grpc.insecure_channel(server.address, options)


# --- who says nothing ---------------------------------------------------------------------------------------


def test_a_stream_without_a_hello_is_ended(site: Site) -> None:
    before = site.refused("MalformedError")
    with RawStream(site.channel) as stream:
        assert stream.status() == (grpc.StatusCode.INVALID_ARGUMENT, "MalformedError: no hello within 0.5 s")
    assert site.refused("MalformedError") == before + 1


def literal(name: bytes, value: bytes) -> bytes:
    """One header in HPACK's plainest form."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def test_a_hello_that_never_comes_to_its_end_is_not_waited_for(site: Site) -> None:
    """Slow loris: a message is announced, and then arrives byte by byte."""
    host, port = site.server.address.rsplit(":", 1)
    headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", TRAIN.encode()), (b":authority", b"loris")]
    headers += [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    before = site.refused("MalformedError")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        connection.sendall(frame(1, 4, 1, b"".join(literal(*h) for h in headers)))
        connection.sendall(frame(0, 0, 1, b"\0" + (1000).to_bytes(4, "big")))

        def dribble() -> bool:
            with contextlib.suppress(OSError):
                connection.sendall(frame(0, 0, 1, b"\n"))
            return site.refused("MalformedError") > before

        wait_until(dribble, "the stream is ended")


@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")], ids=["", "preface"])
def test_a_connection_without_a_call_is_closed(site: Site, said: bytes) -> None:
    host, port = site.server.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(said)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass


def test_a_member_that_falls_silent_is_let_go(site: Site) -> None:
    with RawStream(site.channel) as stream:
        stream.send(engine_of("silent", DIMENSION).hello())
        assert isinstance(stream.read(), Welcome)
        while not isinstance(message := stream.read(), Goodbye):
            pass
        assert message.reason is Reason.LEASE_EXPIRED
        code, _ = stream.status()
        assert code is grpc.StatusCode.OK
    assert "silent" not in site.members()


# --- who takes nothing --------------------------------------------------------------------------------------


def test_a_member_that_never_reads_is_refused_however_much_it_says(site: Site) -> None:
    with channel_of(site.server) as channel, RawStream(channel) as stream:
        stream.send(engine_of("deaf", DIMENSION).hello())
        assert isinstance(stream.read(), Welcome)
        before = site.resident_bytes()
        beat = encode_worker_message(Heartbeat(1, 0))

        def beaten() -> int:
            for _ in range(20):
                stream.send(beat)
            return site.refused("RefusedError", "deaf")

        assert wait_until(beaten, "it is refused") == 1
        assert "deaf" not in site.members()
        assert site.resident_bytes() - before < 20 << 20
        assert not site.refused("MalformedError", "deaf")  # what it said after its end was not even looked at
        code, details = stream.status()
        if code is not grpc.StatusCode.UNAVAILABLE:  # closed as idle before the status could pass
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details == "RefusedError: nothing of what was sent was taken for 1 s"


def test_who_fetches_the_model_and_does_not_take_it_is_refused(site: Site) -> None:
    """Each of them would hold a copy of the model, as long as it likes."""
    before = site.refused("RefusedError")
    with channel_of(site.server) as channel:
        fetch = channel.unary_stream(FETCH_MODEL, None, pb.ModelChunk.FromString)
        calls = [fetch(b"", timeout=DEADLINE_S) for _ in range(FETCHES)]
        for call in calls:
            next(call)
        with pytest.raises(grpc.RpcError) as refused:
            next(fetch(b"", timeout=DEADLINE_S))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "RefusedError: the model is being fetched 2 times already" in refused.value.details()
        wait_until(lambda: site.refused("RefusedError") == before + 1 + FETCHES, "they are refused")
        for call in calls:
            with pytest.raises(grpc.RpcError) as ended:
                for _ in call:
                    pass
            assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        chunks = list(fetch(b"", timeout=DEADLINE_S))
    assert sum(len(c.values) for c in chunks) == 4 * DIMENSION


# --- crowds -------------------------------------------------------------------------------------------------


def test_more_streams_from_one_address_than_allowed_are_refused(site: Site) -> None:
    before = site.refused("RefusedError")
    with contextlib.ExitStack() as opened:
        streams = [opened.enter_context(RawStream(site.channel)) for _ in range(7)]
        # The honest worker has one of the six.
        ends = [s.status() for s in streams]
    crowded = [details for code, details in ends if code is grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert crowded == ["RefusedError: 127.0.0.1 has 6 streams already"] * 2
    assert site.refused("RefusedError") == before + 2


def test_more_members_than_allowed_are_refused(site: Site) -> None:
    with contextlib.ExitStack() as opened:
        for i in range(3):
            stream = opened.enter_context(RawStream(site.channel))
            stream.send(engine_of(f"guest {i}", DIMENSION).hello())
            assert isinstance(stream.read(), Welcome)
        stream = opened.enter_context(RawStream(site.channel))
        stream.send(engine_of("too many", DIMENSION).hello())
        assert stream.status() == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RefusedError: the server is full: 4 members")
    wait_until(lambda: site.members() == {"honest"}, "the guests have gone")
    [entry] = [r for r in status_of(site.server.address).refusals if r.name == "too many"]
    assert (entry.kind, entry.count) == ("RefusedError", 1)


def test_a_model_that_is_larger_than_allowed_is_refused(processes: Processes) -> None:
    server = processes.server("--workers", "1", "--max-params", "1000")
    with grpc.insecure_channel(server.address) as channel, RawStream(channel) as stream:
        stream.send(engine_of("large", 1001).hello())
        code, details = stream.status()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "1001 coordinates; this server takes at most 1000" in details


class Call:
    """A call's context, as far as the door looks at it."""

    def __init__(self, peer: str = "ipv4:10.0.0.1:5000") -> None:
        self._peer = peer
        self.aborted: tuple[Any, str] | None = None

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return []

    async def send_initial_metadata(self, _: object) -> None:
        pass

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.aborted = code, details
        raise grpc.RpcError


async def enter(door: Door, call: Call) -> bool:
    try:
        async with door.member(call):
            return True
    except grpc.RpcError:
        return False


def test_more_joins_in_a_second_than_allowed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(admission.time, "monotonic", lambda: now)
    door = Door(None, StreamLimits(joins_per_s=3))

    async def joins() -> None:
        nonlocal now
        assert [await enter(door, Call(f"ipv4:10.0.0.{i}:1")) for i in range(5)] == [True] * 3 + [False] * 2
        now += 0.9
        call = Call()
        assert not await enter(door, call)
        assert call.aborted == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "RefusedError: more than 3 joins a second",
        )
        now += 0.2
        assert [await enter(door, Call()) for _ in range(4)] == [True] * 3 + [False]

    asyncio.run(joins())
    assert door.refusals.by_kind() == {RefusedError.__name__: 4}


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:10.1.2.3:4567", "10.1.2.3"), ("ipv6:%5B::1%5D:4567", "::1"), ("ipv6:[fe80::1%25eth0]:1", "fe80::1%eth0")],
)
def test_an_address_is_shown_as_people_write_it(peer: str, host: str) -> None:
    assert admission.address_of(Call(peer)) == host
