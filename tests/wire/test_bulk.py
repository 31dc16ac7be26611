"""Values that go past protobuf: the same messages as with it, whatever the bytes are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loscar_core import messages as m
from loscar_core.checksum import fastest
from loscar_core.errors import LoscarError
from loscar_wire import bulk, mapping
from loscar_wire._generated import parameter_server_pb2 as pb

BIG = np.random.default_rng(0).integers(0, 256, 9000, np.uint8).tobytes()
MESSAGES: list[Any] = [
    m.Contribution(3, 1 << 40, 7, 1 << 20, BIG, 0xDEADBEEF, 5, 0, b"abc", 17, None),
    m.Contribution(0, 0, 0, 0, BIG[:4096], 0),
    m.VectorChunk(m.Purpose.PROGRESS, 0, 1 << 33, BIG),
    m.Answer(1 << 35, 2, 0, BIG, b"\xff" * 300),
    m.VectorChunk(m.Purpose.CATCH_UP, 4, 1 << 33, memoryview(BIG)[5:]),
]


def coders(message: Any) -> tuple[Any, Any, Any]:
    """(encode, decode, the outer protobuf class) of a message."""
    own = isinstance(message, m.Answer) or (
        isinstance(message, m.VectorChunk) and message.purpose is m.Purpose.CATCH_UP
    )
    if own:
        return mapping.encode_server_message, mapping.decode_server_message, pb.ServerMessage
    return mapping.encode_worker_message, mapping.decode_worker_message, pb.WorkerMessage


@pytest.mark.parametrize("message", MESSAGES, ids=lambda x: type(x).__name__)
def test_protobuf_reads_what_is_put_together_here(message: Any) -> None:
    encode, decode, outer = coders(message)
    data = encode(message)
    read = outer.FromString(data)
    body = getattr(read, read.WhichOneof("body"))
    assert body.values == message.values
    assert decode(data) == message
    # And the other way round: protobuf's order of fields is another one.
    theirs = read.SerializeToString(deterministic=True)
    assert decode(theirs) == message
    found = decode(theirs).values
    assert isinstance(found, memoryview), "it was copied"
    assert found.readonly


def whole(decode: Any, data: bytes) -> Any:
    """What protobuf alone makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "LEAST_BYTES", 1 << 60)
        return outcome(decode, data)


def outcome(decode: Any, data: bytes) -> Any:
    try:
        return decode(data)
    except LoscarError as error:
        return type(error)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_broken_bytes_mean_the_same_to_both(message: Any, data: st.DataObject) -> None:
    encode, decode, outer = coders(message)
    raw = bytearray(encode(message))
    if data.draw(st.booleans()):
        raw = bytearray(outer.FromString(bytes(raw)).SerializeToString())
    # Where the fields are: the values themselves may be anything.
    edges = st.integers(0, 40) | st.integers(len(raw) - 40, len(raw) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        at = min(data.draw(edges), len(raw) - 1)
        match data.draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat"])):
            case "flip":
                raw[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[max(at, bulk.LEAST_BYTES + 10) :]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=12))
            case "repeat":
                raw += raw[at:]
    assert outcome(decode, bytes(raw)) == whole(decode, bytes(raw))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda x: type(x).__name__)
def test_of_several_values_the_last_counts(message: Any) -> None:
    """As protobuf has it: nobody sends such a message."""
    encode, decode, outer = coders(message)
    read = outer.FromString(encode(message))
    name = read.WhichOneof("body")
    body = getattr(read, name)
    again = type(body)(values=b"z" * 5000)
    inner = body.SerializeToString() + again.SerializeToString()
    number = outer.DESCRIPTOR.fields_by_name[name].number
    data = bulk._varint(number << 3 | 2) + bulk._varint(len(inner)) + inner
    assert decode(data).values == b"z" * 5000
    assert decode(data) == whole(decode, data)


def test_checksums_are_the_same_with_and_without_the_faster_library() -> None:
    import zlib

    quick = fastest()
    for start, stop in ((0, 0), (0, 1), (3, 9000), (1, 4097)):
        piece = memoryview(BIG)[start:stop]
        assert quick(piece) == zlib.crc32(piece)
        assert quick(piece, 0x12345678) == zlib.crc32(piece, 0x12345678)
        assert quick(bytes(piece)) == zlib.crc32(piece)


ANSWER = m.Answer(7, 0, 0, BIG, b"\x03")
RIDERS: list[m.ServerMessage] = [
    m.HeartbeatReply(5),
    m.RosterChange((m.SlotTaken(2, b"i" * 16),)),
    m.Answer(7, 1, 0, BIG[:300], b"\x01"),
]


@pytest.mark.parametrize("first", [ANSWER, m.Answer(7, 0, 0, BIG[:99], b"\x03"), m.HeartbeatReply(9)])
def test_messages_that_ride_along_are_those_that_were_put_on(first: m.ServerMessage) -> None:
    data = mapping.join_server_messages(
        mapping.encode_server_message(first), [mapping.encode_server_message(r) for r in RIDERS]
    )
    assert mapping.decode_server_messages(data) == [first, *RIDERS]
    assert whole(mapping.decode_server_messages, data) == [first, *RIDERS]
    assert len(pb.ServerMessage.FromString(data).more) == len(RIDERS)
    with pytest.raises(LoscarError, match="4 messages where one was expected"):
        mapping.decode_server_message(data)


def test_values_are_not_copied_when_something_rides_along() -> None:
    data = mapping.join_server_messages(
        mapping.encode_server_message(ANSWER), [mapping.encode_server_message(RIDERS[0])]
    )
    [answer, _] = mapping.decode_server_messages(data)
    assert isinstance(answer, m.Answer)
    assert isinstance(answer.values, memoryview), "it was copied"


def test_a_message_that_rides_along_carries_none_itself() -> None:
    reply = mapping.encode_server_message(RIDERS[0])
    inner = mapping.join_server_messages(reply, [reply])
    with pytest.raises(LoscarError, match="within"):
        mapping.decode_server_messages(mapping.join_server_messages(reply, [inner]))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_broken_bytes_of_several_mean_the_same_to_both(data: st.DataObject) -> None:
    answer = mapping.encode_server_message(ANSWER)
    raw = bytearray(mapping.join_server_messages(answer, [mapping.encode_server_message(r) for r in RIDERS]))
    edges = st.integers(0, 40) | st.integers(len(answer) - 4, len(raw) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        at = min(data.draw(edges), len(raw) - 1)
        match data.draw(st.sampled_from(["set", "cut", "insert", "repeat"])):
            case "set":
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[max(at, bulk.LEAST_BYTES + 10) :]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=12))
            case "repeat":
                raw += raw[at:]
    decode = mapping.decode_server_messages
    assert outcome(decode, bytes(raw)) == whole(decode, bytes(raw))
