"""Protobuf messages to the core's dataclasses and back.

Decoding is strict: what does not fit (an unknown enum value, an id of the wrong length, no body at all) raises
MalformedError, so that the state machines never see it. Payloads are handed on as the `bytes` that protobuf made:
each access of such a field copies, so every one is read exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from google.protobuf.message import DecodeError

from loscar_core import messages as m
from loscar_core.config import PROTOCOL_VERSION
from loscar_core.errors import LoscarError, MalformedError, ProtocolError, VersionMismatchError
from loscar_core.values import Payload
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.bulk import append, cut, message_of
from loscar_wire.pieces import (
    CODINGS,
    MAX_CAPABILITIES,
    MAX_ELAPSED_S,
    MAX_MISSED,
    MAX_NAME,
    MAX_SLOT,
    at_most,
    coding_from_pb,
    config_from_pb,
    config_to_pb,
    inclusion_from_pb,
    inclusion_to_pb,
    layout_from_pb,
    layout_to_pb,
    lineage_from_pb,
    lineage_to_pb,
    number_of,
    plan_from_pb,
    plan_to_pb,
    position_from_pb,
    position_to_pb,
    purpose_from_pb,
    reason_from_pb,
    recent_from_pb,
    recent_to_pb,
    report_from_pb,
    report_to_pb,
    shard_from_pb,
    shard_to_pb,
    text_of,
    time_of,
    vector_from_pb,
    vector_to_pb,
)

M = TypeVar("M")


# --- worker to server ---------------------------------------------------------------------------------------


def encode_worker_message(message: m.WorkerMessage) -> bytes:
    """The bytes of one message of a worker."""
    match message:
        case m.Contribution():
            contribution = pb.Contribution(
                epoch=message.epoch,
                round=message.round,
                part=message.part,
                offset=message.offset,
                checksum=message.checksum,
                local_steps=message.local_steps,
                overlap_steps=message.overlap_steps,
                indices=message.indices,
                base=message.base,
                index_coding=CODINGS[message.coding],
                total=message.total,
            )
            return _bulk(pb.WorkerMessage, "contribution", contribution, message.values)
        case m.VectorChunk():
            return _bulk(pb.WorkerMessage, "vector", vector_to_pb(message), message.values)
        case _:
            return _to_worker_pb(message).SerializeToString()


def _to_worker_pb(
    message: m.Heartbeat | m.Hello | m.Ready | m.Refresh | m.StopRun | m.Leave | m.StateOffer,
) -> pb.WorkerMessage:
    match message:
        case m.Heartbeat():
            return pb.WorkerMessage(
                heartbeat=pb.Heartbeat(
                    stamp_ns=message.stamp_ns, round=message.round, report=report_to_pb(message.report)
                )
            )
        case m.Hello():
            return pb.WorkerMessage(
                hello=pb.Hello(
                    protocol_version=message.protocol_version,
                    run_id=message.run_id,
                    name=message.name,
                    incarnation=message.incarnation,
                    slot=message.slot,
                    observer=message.observer,
                    layout=layout_to_pb(message.layout),
                    vector_checksum=message.vector_checksum,
                    epoch=message.epoch,
                    members=message.members,
                    position=position_to_pb(message.position),
                    digest=message.digest,
                    lineage=lineage_to_pb(message.lineage),
                    recent=recent_to_pb(message.recent),
                    capabilities=message.capabilities,
                    partial=None if message.partial is None else _partial_to_pb(message.partial),
                    shard=shard_to_pb(message.shard),
                )
            )
        case m.Ready():
            return pb.WorkerMessage(ready=pb.Ready(position=position_to_pb(message.position)))
        case m.Refresh():
            return pb.WorkerMessage(refresh=pb.Refresh(round=message.round))
        case m.StopRun():
            return pb.WorkerMessage(stop_run=pb.StopRun(why=message.why))
        case m.Leave():
            return pb.WorkerMessage(leave=pb.Leave(reason=message.reason.value, detail=message.detail))
        case m.StateOffer():
            return pb.WorkerMessage(
                state_offer=pb.StateOffer(
                    position=position_to_pb(message.position),
                    digest=message.digest,
                    lineage=lineage_to_pb(message.lineage),
                    inclusion=inclusion_to_pb(message.inclusion),
                    recent=recent_to_pb(message.recent),
                    members=message.members,
                    config=config_to_pb(message.config),
                    elapsed_s=message.elapsed_s,
                )
            )


def decode_worker_message(data: bytes) -> m.WorkerMessage:
    """A worker's message from its bytes. Raises MalformedError, or VersionMismatchError for another version's hello."""
    return _decode(pb.WorkerMessage, data, _FROM_WORKER, _WORKER_VALUES)[0]


def _contribution(c: pb.Contribution) -> m.Contribution:
    return m.Contribution(
        c.epoch,
        c.round,
        c.part,
        c.offset,
        c.values,
        c.checksum,
        c.local_steps,
        c.overlap_steps,
        c.indices,
        c.base,
        coding_from_pb(c.index_coding),
        c.total,
    )


def _hello(h: pb.Hello) -> m.Hello:
    if h.protocol_version != PROTOCOL_VERSION:
        # Before anything else is read: the rest may not mean here what it means there.
        raise VersionMismatchError(f"the worker speaks protocol {h.protocol_version}, this server {PROTOCOL_VERSION}")
    return m.Hello(
        protocol_version=h.protocol_version,
        run_id=h.run_id,
        name=h.name,
        incarnation=h.incarnation,
        slot=h.slot if h.HasField("slot") else None,
        observer=h.observer,
        layout=layout_from_pb(h.layout),
        vector_checksum=h.vector_checksum,
        epoch=at_most(h.epoch, "epoch"),
        members=at_most(h.members, "a number of members:"),
        position=position_from_pb(h.position),
        digest=h.digest,
        lineage=lineage_from_pb(h.lineage),
        recent=recent_from_pb(h.recent),
        capabilities=_capabilities(h.capabilities),
        partial=_partial(h.partial) if h.HasField("partial") else None,
        shard=shard_from_pb(h),
    )


def _partial_to_pb(p: m.Partial) -> pb.Partial:
    return pb.Partial(position=position_to_pb(p.position), digest=p.digest, filled=p.filled)


def _partial(p: pb.Partial) -> m.Partial:
    return m.Partial(position_from_pb(p.position), p.digest, at_most(p.filled, "a number of values:"))


def _capabilities(names: Sequence[str]) -> tuple[str, ...]:
    at_most(len(names), "a number of capabilities:", MAX_CAPABILITIES)
    at_most(max(map(len, names), default=0), "the length of a capability:", MAX_NAME)
    return tuple(names)


def _state_offer(o: pb.StateOffer) -> m.StateOffer:
    return m.StateOffer(
        position=position_from_pb(o.position),
        digest=o.digest,
        lineage=lineage_from_pb(o.lineage),
        inclusion=inclusion_from_pb(o.inclusion),
        recent=recent_from_pb(o.recent),
        members=at_most(o.members, "a number of members:"),
        config=config_from_pb(o.config),
        elapsed_s=time_of(o.elapsed_s, "a run time"),
    )


_FROM_WORKER: dict[str, Callable[[Any], m.WorkerMessage]] = {
    "contribution": _contribution,
    "heartbeat": lambda h: m.Heartbeat(h.stamp_ns, h.round, report_from_pb(h.report)),
    "hello": _hello,
    "vector": vector_from_pb,
    "ready": lambda r: m.Ready(position_from_pb(r.position)),
    "refresh": lambda r: m.Refresh(r.round),
    "stop_run": lambda s: m.StopRun(text_of(s.why)),
    "leave": lambda x: m.Leave(reason_from_pb(x.reason), text_of(x.detail)),
    "state_offer": _state_offer,
}


# --- server to worker ---------------------------------------------------------------------------------------


def encode_server_message(message: m.ServerMessage) -> bytes:
    """The bytes of one message of the server; encoded once, however many members get it."""
    match message:
        case m.Answer():
            answer = pb.Answer(
                round=message.round,
                part=message.part,
                offset=message.offset,
                included=message.included,
                indices=message.indices,
                base=message.base,
                index_coding=CODINGS[message.coding],
                total=message.total,
            )
            return _bulk(pb.ServerMessage, "answer", answer, message.values)
        case m.VectorChunk():
            return _bulk(pb.ServerMessage, "vector", vector_to_pb(message), message.values)
        case _:
            return _to_server_pb(message).SerializeToString()


def _to_server_pb(
    message: m.Commit
    | m.HeartbeatReply
    | m.Welcome
    | m.CatchUp
    | m.OpenRound
    | m.RosterChange
    | m.SendState
    | m.Goodbye,
) -> pb.ServerMessage:
    match message:
        case m.Commit():
            return pb.ServerMessage(
                commit=pb.Commit(
                    round=message.round,
                    members=message.members,
                    digest=message.digest,
                    plan=plan_to_pb(message.plan, number=False),
                    elapsed_ms=message.elapsed_ms,
                )
            )
        case m.HeartbeatReply():
            return pb.ServerMessage(heartbeat_reply=pb.HeartbeatReply(stamp_ns=message.stamp_ns))
        case m.Welcome():
            return pb.ServerMessage(
                welcome=pb.Welcome(
                    run_id=message.run_id,
                    epoch=message.epoch,
                    slot=message.slot,
                    config=config_to_pb(message.config),
                    heartbeat_s=message.heartbeat_s,
                    lease_s=message.lease_s,
                    position=position_to_pb(message.position),
                    digest=message.digest,
                    lineage=lineage_to_pb(message.lineage),
                    roster=message.roster,
                    elapsed_s=message.elapsed_s,
                    waiting_for=message.waiting_for,
                    recovering=message.recovering,
                )
            )
        case m.CatchUp():
            return pb.ServerMessage(
                catch_up=pb.CatchUp(
                    position=position_to_pb(message.position),
                    digest=message.digest,
                    lineage=lineage_to_pb(message.lineage),
                    base_round=message.base_round,
                    plans=[plan_to_pb(p) for p in message.plans],
                    full=message.full,
                    inclusion=inclusion_to_pb(message.inclusion),
                    recent=recent_to_pb(message.recent),
                    members=message.members,
                    resume=message.resume,
                )
            )
        case m.OpenRound():
            return pb.ServerMessage(open_round=pb.OpenRound(plan=plan_to_pb(message.plan), elapsed_s=message.elapsed_s))
        case m.RosterChange():
            slots = [pb.SlotTaken(slot=s.slot, incarnation=s.incarnation) for s in message.slots]
            return pb.ServerMessage(roster_change=pb.RosterChange(slots=slots))
        case m.SendState():
            return pb.ServerMessage(send_state=pb.SendState(purpose=number_of(message.purpose)))
        case m.Goodbye():
            return pb.ServerMessage(goodbye=pb.Goodbye(reason=message.reason.value, detail=message.detail))


def decode_server_message(data: bytes) -> m.ServerMessage:
    """The server's message from its bytes. Raises MalformedError, also for several."""
    first, *others = decode_server_messages(data)
    if others:
        raise MalformedError(f"{1 + len(others)} messages where one was expected")
    return first


def decode_server_messages(data: bytes) -> list[m.ServerMessage]:
    """The server's message from its bytes, and those that ride along. Raises MalformedError."""
    return _decode(pb.ServerMessage, data, _FROM_SERVER, _SERVER_VALUES, _MORE)


def join_server_messages(first: bytes, others: Sequence[bytes]) -> bytes:
    """One message of several encoded ones."""
    return append(first, _MORE, others)


def _welcome(w: pb.Welcome) -> m.Welcome:
    if not all(0 < seconds <= MAX_ELAPSED_S for seconds in (w.heartbeat_s, w.lease_s)):
        raise MalformedError(f"heartbeats every {w.heartbeat_s:g} s for a lease of {w.lease_s:g} s")
    if w.epoch < 1:
        raise MalformedError("a server in epoch 0")
    return m.Welcome(
        run_id=w.run_id,
        epoch=at_most(w.epoch, "epoch"),
        slot=at_most(w.slot, "slot", MAX_SLOT),
        config=config_from_pb(w.config),
        heartbeat_s=w.heartbeat_s,
        lease_s=w.lease_s,
        position=position_from_pb(w.position),
        digest=w.digest,
        lineage=lineage_from_pb(w.lineage),
        roster=tuple(w.roster),
        elapsed_s=_elapsed(w.elapsed_s),
        waiting_for=w.waiting_for,
        recovering=w.recovering,
    )


def _elapsed(seconds: float) -> float:
    """Run time; -1 before it has begun."""
    return seconds if seconds == -1.0 else time_of(seconds, "a run time")


def _catch_up(c: pb.CatchUp) -> m.CatchUp:
    at_most(len(c.plans), "a number of missed rounds:", MAX_MISSED)
    return m.CatchUp(
        position=position_from_pb(c.position),
        digest=c.digest,
        lineage=lineage_from_pb(c.lineage),
        base_round=at_most(c.base_round, "round"),
        plans=tuple(plan_from_pb(p) for p in c.plans),
        full=c.full,
        inclusion=inclusion_from_pb(c.inclusion),
        recent=recent_from_pb(c.recent),
        members=at_most(c.members, "a number of members:"),
        resume=at_most(c.resume, "a number of values:"),
    )


_FROM_SERVER: dict[str, Callable[[Any], m.ServerMessage]] = {
    "answer": lambda a: m.Answer(
        a.round, a.part, a.offset, a.values, a.included, a.indices, a.base, coding_from_pb(a.index_coding), a.total
    ),
    "commit": lambda c: m.Commit(
        at_most(c.round, "round"),
        at_most(c.members, "a number of members:"),
        c.digest,
        plan_from_pb(c.plan, c.round + 1),
        at_most(c.elapsed_ms, "a run time in ms:"),
    ),
    "heartbeat_reply": lambda h: m.HeartbeatReply(h.stamp_ns),
    "welcome": _welcome,
    "vector": vector_from_pb,
    "catch_up": _catch_up,
    "open_round": lambda o: m.OpenRound(plan_from_pb(o.plan), _elapsed(o.elapsed_s)),
    "roster_change": lambda r: m.RosterChange(tuple(m.SlotTaken(s.slot, s.incarnation) for s in r.slots)),
    "send_state": lambda s: m.SendState(purpose_from_pb(s.purpose)),
    "goodbye": lambda g: m.Goodbye(reason_from_pb(g.reason), text_of(g.detail)),
}


def _numbers(kind: Any, *bodies: str) -> dict[int, int]:
    """For bodies with values: the field number of each, and that of its values."""
    fields = [kind.DESCRIPTOR.fields_by_name[body] for body in bodies]
    return {field.number: field.message_type.fields_by_name["values"].number for field in fields}


_WORKER_VALUES = _numbers(pb.WorkerMessage, "contribution", "vector")
_SERVER_VALUES = _numbers(pb.ServerMessage, "answer", "vector")
_MORE: int = pb.ServerMessage.DESCRIPTOR.fields_by_name["more"].number


def _bulk(kind: Any, body: str, message: Any, values: Payload) -> bytes:
    """A message with values, without protobuf's copies of them."""
    field = kind.DESCRIPTOR.fields_by_name[body]
    return message_of(message, field.number, field.message_type.fields_by_name["values"].number, values)


def _decode(
    kind: Any,
    data: bytes,
    table: dict[str, Callable[[Any], M]],
    values_numbers: dict[int, int],
    more: int | None = None,
) -> list[M]:
    """A message, and those in its field `more`."""
    try:
        found = cut(data, values_numbers, more)
        if found is not None:
            rest, values = found
            message = kind.FromString(rest)
            decoded: Any = _body(message, table)
            if not decoded.values:  # else there were more than one, of which the last counts
                return [cast(M, replace(decoded, values=values)), *_others(message, table, more)]
        message = kind.FromString(data)
        return [_body(message, table), *_others(message, table, more)]
    except DecodeError as error:
        raise MalformedError(f"not a protocol message: {error}") from None
    except ProtocolError:
        raise
    except (LoscarError, ValueError, OverflowError) as error:
        raise MalformedError(f"a malformed message: {error}") from None


def _others(message: Any, table: dict[str, Callable[[Any], M]], more: int | None) -> list[M]:
    if more is None or not message.more:
        return []
    if any(other.more for other in message.more):
        raise MalformedError("messages within a message within a message")
    return [_body(other, table) for other in message.more]


def _body(message: Any, table: dict[str, Callable[[Any], M]]) -> M:
    body = message.WhichOneof("body")
    if body is None:
        raise MalformedError("a message without a body")
    return table[body](getattr(message, body))
