"""What becomes of an input: one field of a message set to something absurd, frames moved, repeated or lost."""

from __future__ import annotations

import contextlib
import math
import random
import struct
from typing import Any

from conversation import GONE, MESSAGE, PEERS, STOP, TICK, frames, is_of_worker
from google.protobuf.message import DecodeError

from loscar_wire._generated import parameter_server_pb2 as pb

EXTREMES = {
    "int": (0, 1, 2, 3, 7, 36, 40, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1),
    "huge": ((1 << 64) - 1, 1 << 63, (1 << 64) - 2),
    "float": (0.0, -0.0, -1.0, 1e-300, 1e300, 5.0, math.inf, -math.inf, math.nan),
    "text": ("", "w0", "w1", "loscar", "dense", "none", "float32", "\n", "x" * 300),
    "bytes": (b"", b"\0" * 16, b"\1" * 16, b"r" * 16, b"\xff" * 64, b"\0\0\xc0\x7f" * 9, b"\0\0\x80\x7f" * 9, b"x"),
}


def fields_of(message: Any) -> list[tuple[Any, Any]]:
    """Every (message, field) of a protobuf message, depth first."""
    found = []
    for field, value in message.ListFields():
        found.append((message, field))
        if field.message_type is not None:
            for each in value if field.is_repeated else [value]:
                found += fields_of(each)
    return found


def disturb(message: Any, rng: random.Random) -> None:
    """Change one field of a protobuf message to something that fits its type and nothing else."""
    owner, field = rng.choice(fields_of(message) or [(message, rng.choice(message.DESCRIPTOR.fields))])
    if rng.random() < 0.2:  # one that may not be set
        field = rng.choice(owner.DESCRIPTOR.fields)
    if field.is_repeated:
        values = getattr(owner, field.name)
        if len(values) and rng.random() < 0.5:
            del values[rng.randrange(len(values))]
        elif len(values) and field.message_type is not None:
            values.add().CopyFrom(rng.choice(values))
        elif field.message_type is not None:
            values.add()
        else:
            values.append(extreme(field, rng))
    elif field.message_type is not None:
        owner.ClearField(field.name)
    else:
        setattr(owner, field.name, extreme(field, rng))


def extreme(field: Any, rng: random.Random) -> Any:
    kinds = {field.CPPTYPE_STRING: "bytes" if field.type == field.TYPE_BYTES else "text"}
    kinds |= dict.fromkeys((field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT), "float")
    if field.cpp_type == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type == field.CPPTYPE_ENUM:
        return rng.randrange(7)
    kind = kinds.get(field.cpp_type, "int")
    if kind == "int" and field.cpp_type == field.CPPTYPE_UINT64 and rng.random() < 0.3:
        kind = "huge"
    value = rng.choice(EXTREMES[kind])
    if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_INT32):
        value &= (1 << 31) - 1 if field.cpp_type == field.CPPTYPE_INT32 else (1 << 32) - 1
    return value


def structured(data: bytes, rng: random.Random) -> bytes:
    """Disturb one message within an input, or move, repeat or drop a frame."""
    found = list(frames(data))
    if not found:
        return data
    at = rng.randrange(len(found))
    operation, argument, payload = found[at]
    what = rng.random()
    if operation == MESSAGE and what < 0.75:
        message = pb.ServerMessage() if is_of_worker(data) else pb.WorkerMessage()
        with contextlib.suppress(DecodeError):
            message.ParseFromString(payload)
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                disturb(message, rng)
            found[at] = operation, argument, message.SerializeToString()
    elif what < 0.8:
        del found[at]
    elif what < 0.9:
        found.insert(rng.randrange(len(found)), found[at])
    else:
        frame = rng.choice(((GONE, argument % PEERS, b""), (TICK, rng.randrange(51), b""), (STOP, 0, b"")))
        found.insert(at, (MESSAGE, rng.randrange(PEERS), payload) if rng.random() < 0.4 else frame)
    out = bytearray(data[:1])
    for operation, argument, payload in found:
        out.append(argument * 5 % 255 // 5 * 5 + operation)
        if operation == MESSAGE:
            out += struct.pack("<H", min(len(payload), 65535)) + payload[:65535]
    return bytes(out)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A mutation that nothing guides, for runs without atheris."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = structured(data, rng) if rng.random() < 0.8 else _bytewise(data, rng)
    return data


def _bytewise(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    at = rng.randrange(len(out))
    what = rng.random()
    if what < 0.6:
        out[at] = rng.randrange(256)
    elif what < 0.8:
        del out[at]
    else:
        out[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\0\0\xc0\x7f" * 2))
    return bytes(out) or b"\0"
