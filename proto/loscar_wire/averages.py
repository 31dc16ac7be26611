"""One-off averages on the wire: requests and replies, to and from bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError

from loscar_core.errors import MalformedError
from loscar_core.gathering import DTYPES
from loscar_core.state import INCARNATION_BYTES
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.pieces import at_most

LONGEST_LABEL = 200
LONGEST_WAIT_S = 86_400.0
CHUNK_BYTES = 1 << 20
MOST_WORKERS = 1 << 16

M = TypeVar("M", pb.AverageRequest, pb.AverageReply)


@dataclass(frozen=True, slots=True)
class AverageCall:
    """What a worker calls for.

    Attributes:
        run_id, incarnation: who it is.
        label: equal labels are averaged together.
        size, dtype: of the vector.
        wait_s: how long the others are waited for.
        at_least: fewer vectors are no average.
        awaited: whom an earlier server waited for.
        settled: not empty when what follows is an earlier server's answer, to the vectors of these.
    """

    run_id: bytes
    incarnation: bytes
    label: str
    size: int
    dtype: str
    wait_s: float
    at_least: int = 1
    awaited: tuple[bytes, ...] = ()
    settled: tuple[bytes, ...] = ()


class Taken:
    """The answer is here."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """Whether the vector is to follow, and who is waited for."""

    wanted: bool
    awaited: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """Whose vectors are in the answer that follows."""

    offered: tuple[bytes, ...]


TAKEN = pb.AverageRequest(taken=True).SerializeToString()


def check_call(call: AverageCall) -> None:
    """Raises MalformedError for what neither side accepts."""
    if not 1 <= len(call.label) <= LONGEST_LABEL or not call.label.isprintable():
        raise MalformedError(f"a label of an average has 1 to {LONGEST_LABEL} printable characters")
    if call.size < 1:
        raise MalformedError("an average of no values")
    if call.dtype not in DTYPES:
        raise MalformedError(f"an average of {call.dtype!r:.50}: {' or '.join(DTYPES)} are averaged")
    if not 0 < call.wait_s <= LONGEST_WAIT_S:
        raise MalformedError(f"an average that waits {call.wait_s:g} s: up to {LONGEST_WAIT_S:g} s are allowed")


def encode_call(call: AverageCall) -> bytes:
    return pb.AverageRequest(
        call=pb.AverageCall(
            run_id=call.run_id,
            incarnation=call.incarnation,
            label=call.label,
            size=call.size,
            dtype=call.dtype,
            wait_s=call.wait_s,
            at_least=call.at_least,
            awaited=b"".join(call.awaited),
            settled=b"".join(call.settled),
        )
    ).SerializeToString()


def encode_values(values: bytes) -> bytes:
    return pb.AverageRequest(values=values).SerializeToString()


def decode_request(data: bytes) -> AverageCall | bytes | Taken:
    """Raises MalformedError."""
    message = _parse(pb.AverageRequest, data)
    match message.WhichOneof("body"):
        case "call":
            c = message.call
            call = AverageCall(
                c.run_id,
                c.incarnation,
                c.label,
                at_most(c.size, "the size of an average:"),
                c.dtype,
                c.wait_s,
                c.at_least,
                _incarnations(c.awaited),
                _incarnations(c.settled),
            )
            check_call(call)
            return call
        case "values":
            return message.values
        case "taken":
            return Taken()
        case _:
            raise MalformedError("an empty request for an average")


def encode_accepted(wanted: bool, awaited: Iterable[bytes]) -> bytes:
    return pb.AverageReply(accepted=pb.AverageAccepted(wanted=wanted, awaited=b"".join(awaited))).SerializeToString()


def encode_head(offered: Iterable[bytes]) -> bytes:
    return pb.AverageReply(answer=pb.AverageAnswer(offered=b"".join(offered))).SerializeToString()


def encode_answer_values(values: bytes) -> bytes:
    return pb.AverageReply(values=values).SerializeToString()


def decode_reply(data: bytes) -> Accepted | AnswerHead | bytes:
    """Raises MalformedError."""
    message = _parse(pb.AverageReply, data)
    match message.WhichOneof("body"):
        case "accepted":
            return Accepted(message.accepted.wanted, _incarnations(message.accepted.awaited))
        case "answer":
            return AnswerHead(_incarnations(message.answer.offered))
        case "values":
            return message.values
        case _:
            raise MalformedError("an empty reply about an average")


def _parse(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise MalformedError(f"not an {kind.DESCRIPTOR.name}: {error}") from None


def _incarnations(joined: bytes) -> tuple[bytes, ...]:
    count, rest = divmod(len(joined), INCARNATION_BYTES)
    if rest:
        raise MalformedError(f"incarnations of {INCARNATION_BYTES} bytes each, and {rest} bytes more")
    at_most(count, "a number of workers:", MOST_WORKERS)
    return tuple(joined[at : at + INCARNATION_BYTES] for at in range(0, len(joined), INCARNATION_BYTES))
