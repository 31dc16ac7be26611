"""Whatever strangers say to a running server, on any of its calls: it is refused by name and reason, and one honest
worker's run goes on as if they were not there."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import disturb
from processes import DEADLINE_S, Processes, Server
from raw import HandWorker, Outcome, RawStream, engine_of

from loscar_core.config import RunConfig
from loscar_core.errors import LoscarError, all_errors
from loscar_core.messages import (
    Contribution,
    Heartbeat,
    Leave,
    Purpose,
    Ready,
    Reason,
    Refresh,
    StateOffer,
    StopRun,
    VectorChunk,
    WorkerMessage,
)
from loscar_core.state import Lineage, bitmap
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.mapping import decode_worker_message, encode_worker_message
from loscar_wire.status import from_status
from loscar_wire.transport import AVERAGE, FETCH_MODEL, STATUS, STOP, TRAIN

pytestmark = pytest.mark.timeout(200)

DIMENSION = 32
TOKEN = [("authorization", "Bearer secret")]
CLASSES = {cls.__name__ for cls in all_errors()}
FLAGS = ["--token", "secret", "--workers", "1", "--density", "0.25", "--recover-after", "0s", "--max-params", "1000"]
FLAGS += ["--joins-per-second", "100000", "--log-level", "warning"]
STRANGERS = 120
MEMORY_BYTES = 4 << 20
"""What a server may grow by between the first strangers and the last: less than 50 kB for each."""


@dataclass
class Town:
    """A server with one honest worker, and what has become of strangers so far."""

    server: Server
    channel: grpc.Channel
    honest: HandWorker
    strangers: int = 0
    refused: int = 0
    undisturbed: int = 0
    memory: list[int] = field(default_factory=list)

    def status(self) -> pb.StatusReply:
        call = self.channel.unary_unary(STATUS, None, pb.StatusReply.FromString)
        reply: pb.StatusReply = call(b"", timeout=DEADLINE_S, metadata=TOKEN)
        return reply

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.server.pid).memory_info().rss)

    def honest_round(self) -> None:
        """The honest worker's next round commits what it has contributed, exactly."""
        outcome: Outcome = self.honest.round(1.0)
        assert outcome.members <= 2
        own = bitmap([self.honest.engine.slot], self.honest.engine.slot + 1)
        if outcome.included == [own] or outcome.included == [own.ljust(len(outcome.included[0]), b"\0")]:
            np.testing.assert_array_equal(outcome.change, np.float32(1.0) / outcome.members)
            self.undisturbed += 1

    def ended(self, code: grpc.StatusCode, details: str) -> None:
        """A stranger's call has ended: politely, or refused with a reason that names an error of ours."""
        self.strangers += 1
        if code is grpc.StatusCode.OK:
            return
        kind, _, reason = details.partition(": ")
        assert kind in CLASSES - {"LoscarError"}, (code, details)
        assert reason, details
        assert grpc.StatusCode[type(from_status(code, details)).grpc_status] is code
        self.refused += 1


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    processes = Processes(Path(tmp_path_factory.mktemp("town")))
    try:
        server = processes.server(*FLAGS)
        options = [("grpc.max_send_message_length", -1)]
        with (
            grpc.insecure_channel(server.address, options) as channel,
            RawStream(channel, TOKEN, 4 * DEADLINE_S) as stream,
        ):
            found = Town(server, channel, HandWorker(stream, engine_of("honest", DIMENSION)))
            found.honest_round()
            yield found
        assert server.popen.poll() is None, server.err
        assert "Traceback" not in server.err
    finally:
        processes.kill_all()


# --- what strangers say on a stream -------------------------------------------------------------------------


def vocabulary(town: Town) -> dict[str, WorkerMessage]:
    """One valid message of each kind, as a worker of the run could send it now; a contribution is all zeros."""
    engine = engine_of(f"stranger {town.strangers}", DIMENSION, town.strangers.to_bytes(16, "little"))
    opened = town.honest.wait_open()
    position = town.honest.engine.anchor.position
    checksum = opened.plan.checksum(town.honest.engine.config.seed, DIMENSION)  # type: ignore[union-attr]
    zeros = bytes(4 * opened.indices.size)
    epoch = town.honest.engine.epoch
    return {
        "hello": engine.hello(),
        "contribution": Contribution(epoch, opened.plan.round, 0, 0, zeros, checksum),
        "half a contribution": Contribution(epoch, opened.plan.round, 0, 0, zeros[:16], checksum),
        "late contribution": Contribution(epoch, opened.plan.round - 1, 0, 0, zeros, checksum),
        "heartbeat": Heartbeat(1, position.round),
        "ready": Ready(position),
        "refresh": Refresh(position.round),
        "model": VectorChunk(Purpose.INITIAL_MODEL, 0, DIMENSION, bytes(4 * DIMENSION)),
        "anchor": VectorChunk(Purpose.ANCHOR, 0, DIMENSION, bytes(4 * DIMENSION)),
        "progress": VectorChunk(Purpose.PROGRESS, 0, DIMENSION, bytes(4 * DIMENSION)),
        "state": StateOffer(position, 0, Lineage(((1, 1),)), {}, (), 1, RunConfig(), 1.0),
        "leave": Leave(Reason.LEFT),
    }


WORDS = ["hello", "contribution", "half a contribution", "late contribution", "heartbeat", "ready", "refresh"]
WORDS += ["model", "anchor", "progress", "state", "leave"]
SEEDS = st.integers(0, 1 << 32)
WORD = st.tuples(st.sampled_from(WORDS), st.sampled_from(["as it is", "as it is", "a field", "bytes"]), SEEDS)
GARBAGE = st.tuples(st.just("garbage"), st.binary(max_size=200), st.just(0))
ROUND = st.just(("round", "", 0))
# Mostly a member that then misbehaves: who does not even say hello gets nowhere.
SPEECH = st.builds(
    lambda hello, more: [hello, *more],
    st.one_of(st.just(("hello", "as it is", 0)), st.just(("hello", "as it is", 0)), WORD, GARBAGE),
    st.lists(st.one_of(WORD, WORD, WORD, GARBAGE, ROUND), max_size=8),
)


def spoken(message: WorkerMessage, how: str, seed: int) -> bytes:
    data = encode_worker_message(message)
    rng = random.Random(seed)
    if how == "a field":
        told = pb.WorkerMessage.FromString(data)
        for _ in range(rng.choice((1, 1, 2))):
            disturb(told, rng)
        return told.SerializeToString()
    if how == "bytes":
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken[: rng.choice((len(broken), rng.randrange(len(broken) + 1)))])
    return data


def means(data: bytes) -> WorkerMessage | LoscarError:
    try:
        return decode_worker_message(data)
    except LoscarError as error:
        return error


@settings(
    max_examples=STRANGERS,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(speech=SPEECH)
def talk(town: Town, speech: list[tuple[str, Any, int]]) -> None:
    words = vocabulary(town)
    wrong = rounds = 0
    with RawStream(town.channel, TOKEN) as stream:
        for word, how, seed in speech:
            if word == "round":
                rounds += 1
                if rounds == 1:  # it might be waited for in the next one
                    town.honest_round()
                continue
            data = how if word == "garbage" else spoken(words[word], how, seed)
            meaning = means(data)
            if isinstance(meaning, StopRun):
                continue  # every member may ask for that
            wrong += isinstance(meaning, LoscarError)
            stream.send(data)
        stream.half_close()
        code, details = stream.status()
    town.ended(code, details)
    left = any(word == "leave" for word, _, _ in speech)
    assert code is not grpc.StatusCode.OK or left or not wrong, (speech, details)
    town.honest_round()
    if len(town.memory) < 2 and town.strangers >= STRANGERS // 3:
        town.memory.append(town.resident_bytes())


def test_strangers_on_streams_are_refused_and_the_run_goes_on(town: Town) -> None:
    before, rounds, refused = town.status(), town.honest.engine.anchor.position.round, town.refused
    talk(town)
    assert town.resident_bytes() - town.memory[0] < MEMORY_BYTES
    after = town.status()
    assert after.phase == "running"
    assert after.round == town.honest.engine.anchor.position.round
    assert after.round - rounds >= STRANGERS
    assert town.honest.engine.ledger.included == after.round
    # The test must not pass by doing nothing.
    assert town.refused - refused >= STRANGERS // 2
    assert town.undisturbed >= STRANGERS
    # Each is counted once, by its address and, where it said one, its name.
    assert sum(after.refused.values()) - sum(before.refused.values()) == town.refused - refused
    assert sum(r.count for r in after.refusals) == sum(after.refused.values())
    assert {r.address for r in after.refusals} <= {"127.0.0.1", ""}
    assert sum(r.name.startswith("stranger") for r in after.refusals) >= STRANGERS // 4
    assert {m.name for m in after.members} == {"honest"}


# --- the other calls ----------------------------------------------------------------------------------------


def call(town: Town, method: str, data: bytes, metadata: list[tuple[str, str]]) -> tuple[grpc.StatusCode, str]:
    started = town.channel.unary_stream(method)(data, timeout=DEADLINE_S, metadata=metadata)
    try:
        for _ in started:
            pass
    except grpc.RpcError:
        pass
    return started.code(), started.details()


@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from([STATUS, STOP, FETCH_MODEL, TRAIN, AVERAGE]),
    data=st.one_of(st.binary(max_size=100), st.binary(max_size=20).map(lambda b: b + b"\xff"), st.just(b"")),
    token=st.sampled_from(["secret", "secret", "Secret", "", None]),
)
def ask(town: Town, method: str, data: bytes, token: str | None) -> None:
    request = {STATUS: pb.StatusRequest, STOP: pb.StopRequest, FETCH_MODEL: pb.FetchModelRequest}.get(method)
    try:
        sound = request is not None and request.FromString(data) is not None
    except DecodeError:
        sound = False
    if method == STOP and sound and token == "secret":
        return  # the run would end, as asked
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    code, details = call(town, method, data, metadata)
    town.ended(code, details)
    expected = "" if sound else "MalformedError"
    assert details.partition(":")[0] == (expected if token == "secret" else "AuthenticationError")


def test_garbage_in_other_calls_is_refused_like_that_on_a_stream(town: Town) -> None:
    before, refused = town.status(), town.refused
    ask(town)
    after = town.status()
    assert town.refused - refused > 20
    assert sum(after.refused.values()) - sum(before.refused.values()) == town.refused - refused
    assert after.refused["AuthenticationError"] > before.refused["AuthenticationError"]
    assert after.phase == "running"
    assert not after.stop_reason
    town.honest_round()


@pytest.mark.parametrize("method", [TRAIN, STATUS, STOP, FETCH_MODEL, AVERAGE])
def test_a_message_beyond_the_limit_is_refused_and_not_kept(town: Town, method: str) -> None:
    before = town.resident_bytes()
    for _ in range(8):
        code, details = call(town, method, bytes(40 << 20), TOKEN)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in details
    # gRPC's own buffers grow with what it is sent at a time, up to some 80 MB on a busy machine; not with all of it.
    assert town.resident_bytes() - before < 160 << 20
    town.honest_round()


def test_methods_that_do_not_exist_or_are_called_in_another_way_harm_nobody(town: Town) -> None:
    code, _ = call(town, "/loscar.v1.ParameterServer/Nothing", b"", TOKEN)
    assert code is grpc.StatusCode.UNIMPLEMENTED
    for method in (STATUS, FETCH_MODEL):
        two = town.channel.stream_stream(method)(iter([b"", b"\xff"]), timeout=DEADLINE_S, metadata=TOKEN)
        assert len(list(two)) == 1
    town.honest_round()
    assert town.status().phase == "running"


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize(
    "said",
    [b"\0" * 1000, b"GET / HTTP/1.1\r\n\r\n", PREFACE + b"\xff" * 100, PREFACE + b"\xff\xff\xff\0\0\0\0\0\1"],
    ids=["zeros", "http 1", "preface and garbage", "a frame of 16 MB"],
)
def test_what_is_no_grpc_at_all_is_hung_up_on(town: Town, said: bytes) -> None:
    host, port = town.server.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(said)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass
    town.honest_round()


def test_what_strangers_know_to_say_is_valid_but_for_the_moment(town: Town) -> None:
    """Or the mutations above would never get far."""
    for word, message in vocabulary(town).items():
        with RawStream(town.channel, TOKEN) as stream:
            stream.send(message)
            stream.half_close()
            code, details = stream.status()
        if word == "hello":
            assert code is grpc.StatusCode.OK, details
        else:
            assert "the first message of a stream must be a hello" in details, word
    for word in vocabulary(town):
        with RawStream(town.channel, TOKEN) as stream:
            words = vocabulary(town)
            stream.send(words["hello"])
            if word != "hello":
                stream.send(words[word])
            stream.half_close()
            code, details = stream.status()
            town.strangers += 1
        assert code is grpc.StatusCode.OK or word == "progress", (word, details)


def test_the_status_command_says_who_was_refused(town: Town, processes: Processes) -> None:
    with RawStream(town.channel, TOKEN) as stream:
        stream.send(engine_of("clumsy", DIMENSION).hello())
        stream.send(b"\xff")
        stream.half_close()
        town.ended(*stream.status())
    asking = processes.loscar("status", "--server", town.server.address, "--token", "secret", "--json")
    assert asking.wait() == 0
    status = json.loads(asking.out)
    [entry] = [r for r in status["refusals"] if r["name"] == "clumsy"]
    assert (entry["address"], entry["kind"], entry["count"]) == ("127.0.0.1", "MalformedError", 1)
    assert entry["detail"].startswith("not a protocol message")
    assert 0 <= entry["ago_s"] < DEADLINE_S
    assert sum(r["count"] for r in status["refusals"]) == sum(status["refused"].values())
    asking = processes.loscar("status", "--server", town.server.address, "--token", "secret")
    assert asking.wait() == 0
    [line] = [line for line in asking.out.splitlines() if line.startswith("refused clumsy 127.0.0.1 1 ×, last ")]
    assert "MalformedError: not a protocol message" in line
