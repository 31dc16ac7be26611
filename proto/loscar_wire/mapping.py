"""Protobuf messages to the core's dataclasses and back.

Decoding is strict: what does not fit (an unknown enum value, an id of the wrong length, no body at all) raises
MalformedError, so that the state machines never see it. Payloads are handed on as the `bytes` that protobuf made:
each access of such a field copies, so every one is read exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from loscar_core import messages as m
from loscar_core.config import PROTOCOL_VERSION, FinalRound, RunConfig
from loscar_core.errors import LoscarError, MalformedError, ProtocolError, VersionMismatchError
from loscar_core.indices import IndexCoding
from loscar_core.layout import MAX_DIMENSION, Layout, Segment
from loscar_core.merge import MergeKind
from loscar_core.plan import HistoryEntry, RoundKind, RoundPlan
from loscar_core.selection import SelectionKind
from loscar_core.state import INCARNATION_BYTES, Included, Lineage, Position
from loscar_core.values import ValueType
from loscar_wire._generated import parameter_server_pb2 as pb

_SELECTIONS = {
    SelectionKind.RANDOM: pb.SELECTION_RANDOM,
    SelectionKind.SWEEP: pb.SELECTION_SWEEP,
    SelectionKind.BLOCK: pb.SELECTION_BLOCK,
    SelectionKind.TOPK: pb.SELECTION_TOPK,
    SelectionKind.ALL: pb.SELECTION_ALL,
}
_SELECTIONS_BACK = {number: kind for kind, number in _SELECTIONS.items()}
_VALUE_TYPES = {
    ValueType.FLOAT32: pb.VALUE_TYPE_FLOAT32,
    ValueType.BFLOAT16: pb.VALUE_TYPE_BFLOAT16,
    ValueType.FLOAT16: pb.VALUE_TYPE_FLOAT16,
    ValueType.INT8: pb.VALUE_TYPE_INT8,
}
_VALUE_TYPES_BACK = {number: kind for kind, number in _VALUE_TYPES.items()}
_CODINGS = {
    None: pb.INDEX_CODING_SEEDED,
    IndexCoding.PLAIN: pb.INDEX_CODING_PLAIN,
    IndexCoding.GAPS: pb.INDEX_CODING_GAPS,
}
_CODINGS_BACK = {number: coding for coding, number in _CODINGS.items()}
MAX_PARTS_BYTES = 1 << 16
MAX_NUMBER = 1 << 62
"""Epochs, rounds and counts stay below it: there is room to count on from any that is accepted."""
MAX_SEGMENTS = 1 << 16
MAX_DIMENSIONS = 64
MAX_NAME = 1000
MAX_SPANS = 1 << 14
MAX_RECENT = 256
MAX_CAPABILITIES = 64
MAX_ELAPSED_S = 1e10
MAX_TEXT = 500

V = TypeVar("V")
M = TypeVar("M")


def _lookup(table: dict[Any, V], key: object, what: str) -> V:
    try:
        return table[key]
    except KeyError:
        raise MalformedError(f"unknown {what} {key}") from None


def _number(kind: IntEnum) -> Any:
    """The enum's number, as the stubs' enums are ints at run time but types of their own to a checker."""
    return int(kind)


def _at_most(number: int, what: str, limit: int = MAX_NUMBER) -> int:
    if number > limit:
        raise MalformedError(f"{what} {number} is beyond {limit}")
    return number


def _time(seconds: float, what: str) -> float:
    if not 0 <= seconds <= MAX_ELAPSED_S:
        raise MalformedError(f"{what} of {seconds:g} s")
    return seconds


def _text(text: str) -> str:
    """A line for people's eyes: what would move their terminal's cursor is shown instead."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_TEXT])


# --- pieces -------------------------------------------------------------------------------------------------


def layout_to_pb(layout: Layout) -> pb.Layout:
    return pb.Layout(
        parameters=[pb.Segment(name=s.name, shape=s.shape, dtype=s.dtype) for s in layout.parameters],
        statistics=[pb.Segment(name=s.name, shape=s.shape, dtype=s.dtype) for s in layout.statistics],
        frozen_checksum=layout.frozen_checksum,
    )


def layout_from_pb(message: pb.Layout) -> Layout:
    def segments(source: Iterable[pb.Segment]) -> tuple[Segment, ...]:
        return tuple(_segment(s) for s in source)

    _at_most(len(message.parameters) + len(message.statistics), "a number of tensors:", MAX_SEGMENTS)
    return Layout(segments(message.parameters), segments(message.statistics), message.frozen_checksum)


def _segment(s: pb.Segment) -> Segment:
    # Sizes are multiplied out later: unbounded ones would take minutes.
    _at_most(len(s.shape), "a number of a tensor's dimensions:", MAX_DIMENSIONS)
    _at_most(max(len(s.name), len(s.dtype)), "the length of a tensor's name:", MAX_NAME)
    return Segment(s.name, tuple(_at_most(size, "a tensor's size", MAX_DIMENSION) for size in s.shape), s.dtype)


def _position_to_pb(position: Position) -> pb.Position:
    return pb.Position(epoch=position.epoch, round=position.round)


def _position(message: pb.Position) -> Position:
    return Position(_at_most(message.epoch, "epoch"), _at_most(message.round, "round"))


def _lineage_to_pb(lineage: Lineage) -> list[pb.Span]:
    return [pb.Span(epoch=e, first_round=r) for e, r in lineage.spans]


def _lineage(spans: Sequence[pb.Span]) -> Lineage:
    _at_most(len(spans), "a number of epochs:", MAX_SPANS)
    pairs = tuple((_at_most(s.epoch, "epoch"), _at_most(s.first_round, "round")) for s in spans)
    if pairs and min(pairs[0]) < 1:
        raise MalformedError(f"a lineage that begins with epoch {pairs[0][0]} and round {pairs[0][1]}")
    return Lineage(pairs)


def _plan_to_pb(plan: RoundPlan, *, number: bool = True) -> pb.Plan:
    return pb.Plan(
        round=plan.round if number else 0,
        kind=_number(plan.kind),
        selection=_SELECTIONS[plan.selection],
        count=plan.count,
        value_type=_VALUE_TYPES[plan.value_type],
    )


def _plan(message: pb.Plan, round_: int | None = None) -> RoundPlan:
    try:
        kind = RoundKind(message.kind)
    except ValueError:
        raise MalformedError(f"unknown kind of round {message.kind}") from None
    return RoundPlan(
        _at_most(message.round, "round") if round_ is None else round_,
        kind,
        _lookup(_SELECTIONS_BACK, message.selection, "selection"),
        _at_most(message.count, "a number of coordinates:", MAX_DIMENSION),
        _lookup(_VALUE_TYPES_BACK, message.value_type, "value type"),
    )


def _recent_to_pb(entries: Iterable[HistoryEntry]) -> list[pb.CommittedRound]:
    return [
        pb.CommittedRound(position=_position_to_pb(e.position), plan=_plan_to_pb(e.plan), digest=e.digest)
        for e in entries
    ]


def _recent(entries: Sequence[pb.CommittedRound]) -> tuple[HistoryEntry, ...]:
    _at_most(len(entries), "a number of committed rounds:", MAX_RECENT)
    return tuple(HistoryEntry(_position(e.position), _plan(e.plan), e.digest) for e in entries)


def _inclusion_to_pb(table: dict[bytes, Included]) -> list[pb.Inclusion]:
    return [
        pb.Inclusion(
            incarnation=incarnation,
            round=entry.round,
            parts=entry.parts.to_bytes((entry.parts.bit_length() + 7) // 8, "little"),
        )
        for incarnation, entry in table.items()
    ]


def _inclusion(entries: Iterable[pb.Inclusion]) -> dict[bytes, Included]:
    table = {}
    for e in entries:
        parts = e.parts
        if len(e.incarnation) != INCARNATION_BYTES or len(parts) > MAX_PARTS_BYTES:
            raise MalformedError("an entry of the inclusion table is malformed")
        if e.incarnation in table:
            raise MalformedError("a member is twice in the inclusion table")
        table[e.incarnation] = Included(_at_most(e.round, "round"), int.from_bytes(parts, "little"))
    return table


def config_to_pb(config: RunConfig) -> pb.RunConfig:
    return pb.RunConfig(
        seed=config.seed,
        density=config.density,
        coordinates=config.coordinates,
        selection=_SELECTIONS[config.selection],
        value_type=_VALUE_TYPES[config.value_type],
        merge=config.merge.value,
        local_steps=config.local_steps,
        sync_interval_s=config.sync_interval_s,
        overlap_steps=config.overlap_steps,
        rounds=config.rounds,
        duration_s=config.duration_s,
        max_steps=config.max_steps,
        final_round=config.final_round.value,
        evaluate_every=config.evaluate_every,
    )


def config_from_pb(message: pb.RunConfig) -> RunConfig:
    def optional(name: str) -> Any:
        return getattr(message, name) if message.HasField(name) else None

    try:
        return RunConfig(
            seed=message.seed,
            density=message.density,
            coordinates=optional("coordinates"),
            selection=_lookup(_SELECTIONS_BACK, message.selection, "selection"),
            value_type=_lookup(_VALUE_TYPES_BACK, message.value_type, "value type"),
            merge=MergeKind(message.merge),
            local_steps=optional("local_steps"),
            sync_interval_s=message.sync_interval_s,
            overlap_steps=optional("overlap_steps"),
            rounds=optional("rounds"),
            duration_s=optional("duration_s"),
            max_steps=optional("max_steps"),
            final_round=FinalRound(message.final_round),
            evaluate_every=message.evaluate_every,
        )
    except ValueError as error:
        raise MalformedError(f"the run's configuration: {error}") from None


def report_to_pb(report: m.WorkerReport) -> pb.WorkerReport:
    return pb.WorkerReport(
        steps=report.steps,
        loss=report.loss,
        idle_s=report.idle_s,
        run_s=report.run_s,
        sent=report.sent,
        included=report.included,
        returned=report.returned,
        bytes_up=report.bytes_up,
        bytes_down=report.bytes_down,
    )


def report_from_pb(message: pb.WorkerReport) -> m.WorkerReport:
    return m.WorkerReport(
        steps=message.steps,
        loss=message.loss if message.HasField("loss") else None,
        idle_s=_time(message.idle_s, "an idle time"),
        run_s=_time(message.run_s, "a run time"),
        sent=message.sent,
        included=message.included,
        returned=message.returned,
        bytes_up=message.bytes_up,
        bytes_down=message.bytes_down,
    )


def _vector_to_pb(chunk: m.VectorChunk) -> pb.VectorChunk:
    return pb.VectorChunk(purpose=_number(chunk.purpose), offset=chunk.offset, total=chunk.total, values=chunk.values)


def _vector(message: pb.VectorChunk) -> m.VectorChunk:
    return m.VectorChunk(_purpose(message.purpose), message.offset, message.total, message.values)


def _purpose(number: int) -> m.Purpose:
    try:
        return m.Purpose(number)
    except ValueError:
        raise MalformedError(f"unknown purpose {number}") from None


def _coding(number: int) -> IndexCoding | None:
    return _lookup(_CODINGS_BACK, number, "index coding")


def _reason(text: str) -> m.Reason:
    try:
        return m.Reason(text)
    except ValueError:
        raise MalformedError(f"unknown reason {text!r}") from None


# --- worker to server ---------------------------------------------------------------------------------------


def encode_worker_message(message: m.WorkerMessage) -> bytes:
    """The bytes of one message of a worker."""
    return _to_worker_pb(message).SerializeToString()


def _to_worker_pb(message: m.WorkerMessage) -> pb.WorkerMessage:
    match message:
        case m.Contribution():
            return pb.WorkerMessage(
                contribution=pb.Contribution(
                    epoch=message.epoch,
                    round=message.round,
                    part=message.part,
                    offset=message.offset,
                    values=message.values,
                    checksum=message.checksum,
                    local_steps=message.local_steps,
                    overlap_steps=message.overlap_steps,
                    indices=message.indices,
                    base=message.base,
                    index_coding=_CODINGS[message.coding],
                )
            )
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
                    position=_position_to_pb(message.position),
                    digest=message.digest,
                    lineage=_lineage_to_pb(message.lineage),
                    recent=_recent_to_pb(message.recent),
                    capabilities=message.capabilities,
                )
            )
        case m.VectorChunk():
            return pb.WorkerMessage(vector=_vector_to_pb(message))
        case m.Ready():
            return pb.WorkerMessage(ready=pb.Ready(position=_position_to_pb(message.position)))
        case m.Refresh():
            return pb.WorkerMessage(refresh=pb.Refresh(round=message.round))
        case m.StopRun():
            return pb.WorkerMessage(stop_run=pb.StopRun(why=message.why))
        case m.Leave():
            return pb.WorkerMessage(leave=pb.Leave(reason=message.reason.value, detail=message.detail))
        case m.StateOffer():
            return pb.WorkerMessage(
                state_offer=pb.StateOffer(
                    position=_position_to_pb(message.position),
                    digest=message.digest,
                    lineage=_lineage_to_pb(message.lineage),
                    inclusion=_inclusion_to_pb(message.inclusion),
                    recent=_recent_to_pb(message.recent),
                    members=message.members,
                    config=config_to_pb(message.config),
                    elapsed_s=message.elapsed_s,
                )
            )


def decode_worker_message(data: bytes) -> m.WorkerMessage:
    """A worker's message from its bytes. Raises MalformedError, or VersionMismatchError for another version's hello."""
    return _decode(pb.WorkerMessage, data, _FROM_WORKER)


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
        _coding(c.index_coding),
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
        epoch=_at_most(h.epoch, "epoch"),
        members=_at_most(h.members, "a number of members:"),
        position=_position(h.position),
        digest=h.digest,
        lineage=_lineage(h.lineage),
        recent=_recent(h.recent),
        capabilities=_capabilities(h.capabilities),
    )


def _capabilities(names: Sequence[str]) -> tuple[str, ...]:
    _at_most(len(names), "a number of capabilities:", MAX_CAPABILITIES)
    _at_most(max(map(len, names), default=0), "the length of a capability:", MAX_NAME)
    return tuple(names)


def _state_offer(o: pb.StateOffer) -> m.StateOffer:
    return m.StateOffer(
        position=_position(o.position),
        digest=o.digest,
        lineage=_lineage(o.lineage),
        inclusion=_inclusion(o.inclusion),
        recent=_recent(o.recent),
        members=_at_most(o.members, "a number of members:"),
        config=config_from_pb(o.config),
        elapsed_s=_time(o.elapsed_s, "a run time"),
    )


_FROM_WORKER: dict[str, Callable[[Any], m.WorkerMessage]] = {
    "contribution": _contribution,
    "heartbeat": lambda h: m.Heartbeat(h.stamp_ns, h.round, report_from_pb(h.report)),
    "hello": _hello,
    "vector": _vector,
    "ready": lambda r: m.Ready(_position(r.position)),
    "refresh": lambda r: m.Refresh(r.round),
    "stop_run": lambda s: m.StopRun(_text(s.why)),
    "leave": lambda x: m.Leave(_reason(x.reason), _text(x.detail)),
    "state_offer": _state_offer,
}


# --- server to worker ---------------------------------------------------------------------------------------


def encode_server_message(message: m.ServerMessage) -> bytes:
    """The bytes of one message of the server; encoded once, however many members get it."""
    return _to_server_pb(message).SerializeToString()


def _to_server_pb(message: m.ServerMessage) -> pb.ServerMessage:
    match message:
        case m.Answer():
            return pb.ServerMessage(
                answer=pb.Answer(
                    round=message.round,
                    part=message.part,
                    offset=message.offset,
                    values=message.values,
                    included=message.included,
                    indices=message.indices,
                    base=message.base,
                    index_coding=_CODINGS[message.coding],
                )
            )
        case m.Commit():
            return pb.ServerMessage(
                commit=pb.Commit(
                    round=message.round,
                    members=message.members,
                    digest=message.digest,
                    plan=_plan_to_pb(message.plan, number=False),
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
                    position=_position_to_pb(message.position),
                    digest=message.digest,
                    lineage=_lineage_to_pb(message.lineage),
                    roster=message.roster,
                    elapsed_s=message.elapsed_s,
                    waiting_for=message.waiting_for,
                    recovering=message.recovering,
                )
            )
        case m.VectorChunk():
            return pb.ServerMessage(vector=_vector_to_pb(message))
        case m.CatchUp():
            return pb.ServerMessage(
                catch_up=pb.CatchUp(
                    position=_position_to_pb(message.position),
                    digest=message.digest,
                    lineage=_lineage_to_pb(message.lineage),
                    base_round=message.base_round,
                    plans=[_plan_to_pb(p) for p in message.plans],
                    full=message.full,
                    inclusion=_inclusion_to_pb(message.inclusion),
                    recent=_recent_to_pb(message.recent),
                    members=message.members,
                )
            )
        case m.OpenRound():
            return pb.ServerMessage(
                open_round=pb.OpenRound(plan=_plan_to_pb(message.plan), elapsed_s=message.elapsed_s)
            )
        case m.SlotTaken():
            return pb.ServerMessage(slot_taken=pb.SlotTaken(slot=message.slot, incarnation=message.incarnation))
        case m.SendState():
            return pb.ServerMessage(send_state=pb.SendState(purpose=_number(message.purpose)))
        case m.Goodbye():
            return pb.ServerMessage(goodbye=pb.Goodbye(reason=message.reason.value, detail=message.detail))


def decode_server_message(data: bytes) -> m.ServerMessage:
    """The server's message from its bytes. Raises MalformedError."""
    return _decode(pb.ServerMessage, data, _FROM_SERVER)


def _welcome(w: pb.Welcome) -> m.Welcome:
    return m.Welcome(
        run_id=w.run_id,
        epoch=w.epoch,
        slot=w.slot,
        config=config_from_pb(w.config),
        heartbeat_s=w.heartbeat_s,
        lease_s=w.lease_s,
        position=_position(w.position),
        digest=w.digest,
        lineage=_lineage(w.lineage),
        roster=tuple(w.roster),
        elapsed_s=w.elapsed_s,
        waiting_for=w.waiting_for,
        recovering=w.recovering,
    )


def _catch_up(c: pb.CatchUp) -> m.CatchUp:
    return m.CatchUp(
        position=_position(c.position),
        digest=c.digest,
        lineage=_lineage(c.lineage),
        base_round=c.base_round,
        plans=tuple(_plan(p) for p in c.plans),
        full=c.full,
        inclusion=_inclusion(c.inclusion),
        recent=_recent(c.recent),
        members=c.members,
    )


_FROM_SERVER: dict[str, Callable[[Any], m.ServerMessage]] = {
    "answer": lambda a: m.Answer(
        a.round, a.part, a.offset, a.values, a.included, a.indices, a.base, _coding(a.index_coding)
    ),
    "commit": lambda c: m.Commit(c.round, c.members, c.digest, _plan(c.plan, c.round + 1), c.elapsed_ms),
    "heartbeat_reply": lambda h: m.HeartbeatReply(h.stamp_ns),
    "welcome": _welcome,
    "vector": _vector,
    "catch_up": _catch_up,
    "open_round": lambda o: m.OpenRound(_plan(o.plan), o.elapsed_s),
    "slot_taken": lambda s: m.SlotTaken(s.slot, s.incarnation),
    "send_state": lambda s: m.SendState(_purpose(s.purpose)),
    "goodbye": lambda g: m.Goodbye(_reason(g.reason), g.detail),
}


def _decode(kind: Any, data: bytes, table: dict[str, Callable[[Any], M]]) -> M:
    try:
        message = kind.FromString(data)
        body = message.WhichOneof("body")
        if body is None:
            raise MalformedError("a message without a body")
        return table[body](getattr(message, body))
    except DecodeError as error:
        raise MalformedError(f"not a protocol message: {error}") from None
    except ProtocolError:
        raise
    except (LoscarError, ValueError, OverflowError) as error:
        raise MalformedError(f"a malformed message: {error}") from None
