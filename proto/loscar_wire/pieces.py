"""The pieces that messages are made of, to and from protobuf, and how large each may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, TypeVar

from loscar_core import messages as m
from loscar_core.config import FinalRound, RunConfig
from loscar_core.errors import ConfigError, MalformedError
from loscar_core.indices import IndexCoding
from loscar_core.layout import MAX_DIMENSION, Layout, Segment, Shard
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
    SelectionKind.HEAD: pb.SELECTION_HEAD,
    SelectionKind.TAIL: pb.SELECTION_TAIL,
}
_SELECTIONS_BACK = {number: kind for kind, number in _SELECTIONS.items()}
_VALUE_TYPES = {
    ValueType.FLOAT32: pb.VALUE_TYPE_FLOAT32,
    ValueType.BFLOAT16: pb.VALUE_TYPE_BFLOAT16,
    ValueType.FLOAT16: pb.VALUE_TYPE_FLOAT16,
    ValueType.INT8: pb.VALUE_TYPE_INT8,
}
_VALUE_TYPES_BACK = {number: kind for kind, number in _VALUE_TYPES.items()}
CODINGS = {
    None: pb.INDEX_CODING_SEEDED,
    IndexCoding.PLAIN: pb.INDEX_CODING_PLAIN,
    IndexCoding.GAPS: pb.INDEX_CODING_GAPS,
}
_CODINGS_BACK = {number: coding for coding, number in CODINGS.items()}
MAX_PARTS_BYTES = 1 << 16
MAX_NUMBER = 1 << 62
"""Epochs, rounds and counts stay below it: there is room to count on from any that is accepted."""
MAX_SEGMENTS = 1 << 16
MAX_DIMENSIONS = 64
MAX_NAME = 1000
MAX_SLOT = (1 << 31) - 1
MAX_SPANS = 1 << 14
MAX_RECENT = 256
MAX_MISSED = 2 * MAX_RECENT
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


def number_of(kind: IntEnum) -> Any:
    """The enum's number, as the stubs' enums are ints at run time but types of their own to a checker."""
    return int(kind)


def at_most(number: int, what: str, limit: int = MAX_NUMBER) -> int:
    if number > limit:
        raise MalformedError(f"{what} {number} is beyond {limit}")
    return number


def time_of(seconds: float, what: str) -> float:
    if not 0 <= seconds <= MAX_ELAPSED_S:
        raise MalformedError(f"{what} of {seconds:g} s")
    return seconds


def text_of(text: str) -> str:
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

    at_most(len(message.parameters) + len(message.statistics), "a number of tensors:", MAX_SEGMENTS)
    return Layout(segments(message.parameters), segments(message.statistics), message.frozen_checksum)


def _segment(s: pb.Segment) -> Segment:
    # Sizes are multiplied out later: unbounded ones would take minutes.
    at_most(len(s.shape), "a number of a tensor's dimensions:", MAX_DIMENSIONS)
    at_most(max(len(s.name), len(s.dtype)), "the length of a tensor's name:", MAX_NAME)
    return Segment(s.name, tuple(at_most(size, "a tensor's size", MAX_DIMENSION) for size in s.shape), s.dtype)


def position_to_pb(position: Position) -> pb.Position:
    return pb.Position(epoch=position.epoch, round=position.round)


def position_from_pb(message: pb.Position) -> Position:
    return Position(at_most(message.epoch, "epoch"), at_most(message.round, "round"))


def lineage_to_pb(lineage: Lineage) -> list[pb.Span]:
    return [pb.Span(epoch=e, first_round=r) for e, r in lineage.spans]


def lineage_from_pb(spans: Sequence[pb.Span]) -> Lineage:
    at_most(len(spans), "a number of epochs:", MAX_SPANS)
    pairs = tuple((at_most(s.epoch, "epoch"), at_most(s.first_round, "round")) for s in spans)
    if pairs and min(pairs[0]) < 1:
        raise MalformedError(f"a lineage that begins with epoch {pairs[0][0]} and round {pairs[0][1]}")
    return Lineage(pairs)


def plan_to_pb(plan: RoundPlan, *, number: bool = True) -> pb.Plan:
    return pb.Plan(
        round=plan.round if number else 0,
        kind=number_of(plan.kind),
        selection=_SELECTIONS[plan.selection],
        count=plan.count,
        value_type=_VALUE_TYPES[plan.value_type],
    )


def plan_from_pb(message: pb.Plan, round_: int | None = None) -> RoundPlan:
    try:
        kind = RoundKind(message.kind)
    except ValueError:
        raise MalformedError(f"unknown kind of round {message.kind}") from None
    return RoundPlan(
        at_most(message.round, "round") if round_ is None else round_,
        kind,
        _lookup(_SELECTIONS_BACK, message.selection, "selection"),
        at_most(message.count, "a number of coordinates:", MAX_DIMENSION),
        _lookup(_VALUE_TYPES_BACK, message.value_type, "value type"),
    )


def recent_to_pb(entries: Iterable[HistoryEntry]) -> list[pb.CommittedRound]:
    return [
        pb.CommittedRound(position=position_to_pb(e.position), plan=plan_to_pb(e.plan), digest=e.digest)
        for e in entries
    ]


def recent_from_pb(entries: Sequence[pb.CommittedRound]) -> tuple[HistoryEntry, ...]:
    at_most(len(entries), "a number of committed rounds:", MAX_RECENT)
    return tuple(HistoryEntry(position_from_pb(e.position), plan_from_pb(e.plan), e.digest) for e in entries)


def inclusion_to_pb(table: dict[bytes, Included]) -> pb.InclusionTable:
    numbers = {parts: number for number, parts in enumerate(dict.fromkeys(e.parts for e in table.values()))}
    return pb.InclusionTable(
        incarnations=b"".join(table),
        rounds=[entry.round for entry in table.values()],
        mask_of=[numbers[entry.parts] for entry in table.values()] if len(numbers) > 1 else [],
        masks=[parts.to_bytes((parts.bit_length() + 7) // 8, "little") for parts in numbers],
    )


def inclusion_from_pb(message: pb.InclusionTable) -> dict[bytes, Included]:
    joined, rounds, size = message.incarnations, list(message.rounds), INCARNATION_BYTES
    mask_of = list(message.mask_of) or [0] * len(rounds)
    if len(joined) != size * len(rounds) or len(mask_of) != len(rounds):
        raise MalformedError("the columns of the inclusion table differ in length")
    at_most(max(rounds, default=0), "round")
    if max(map(len, message.masks), default=0) > MAX_PARTS_BYTES or max(mask_of, default=-1) >= len(message.masks):
        raise MalformedError("an entry of the inclusion table is malformed")
    masks = [int.from_bytes(mask, "little") for mask in message.masks]
    # Members of one round share an entry: the table is kept for as long as the run lasts.
    entries = {pair: Included(pair[0], masks[pair[1]]) for pair in set(zip(rounds, mask_of, strict=True))}
    incarnations = (joined[at : at + size] for at in range(0, len(joined), size))
    table = {i: entries[pair] for i, pair in zip(incarnations, zip(rounds, mask_of, strict=True), strict=True)}
    if len(table) != len(rounds):
        raise MalformedError("a member is twice in the inclusion table")
    return table


def shard_to_pb(shard: Shard) -> pb.Shard | None:
    return None if shard.count == 1 else pb.Shard(index=shard.index, count=shard.count)


def shard_from_pb(message: pb.RunConfig | pb.Hello) -> Shard:
    try:
        return Shard(message.shard.index, message.shard.count) if message.HasField("shard") else Shard()
    except ConfigError as error:
        raise MalformedError(str(error)) from None


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
        method=config.method,
        dependent=config.dependent,
        shard=shard_to_pb(config.shard),
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
            method=message.method,
            dependent=message.dependent,
            shard=shard_from_pb(message),
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
        round_trip_s=report.round_trip_s,
    )


def report_from_pb(message: pb.WorkerReport) -> m.WorkerReport:
    return m.WorkerReport(
        steps=message.steps,
        loss=message.loss if message.HasField("loss") else None,
        idle_s=time_of(message.idle_s, "an idle time"),
        run_s=time_of(message.run_s, "a run time"),
        sent=message.sent,
        included=message.included,
        returned=message.returned,
        bytes_up=message.bytes_up,
        bytes_down=message.bytes_down,
        round_trip_s=time_of(message.round_trip_s, "a round trip") if message.HasField("round_trip_s") else None,
    )


def vector_to_pb(chunk: m.VectorChunk) -> pb.VectorChunk:
    """Without its values: see `loscar_wire.bulk`."""
    return pb.VectorChunk(purpose=number_of(chunk.purpose), offset=chunk.offset, total=chunk.total)


def vector_from_pb(message: pb.VectorChunk) -> m.VectorChunk:
    return m.VectorChunk(purpose_from_pb(message.purpose), message.offset, message.total, message.values)


def purpose_from_pb(number: int) -> m.Purpose:
    try:
        return m.Purpose(number)
    except ValueError:
        raise MalformedError(f"unknown purpose {number}") from None


def coding_from_pb(number: int) -> IndexCoding | None:
    return _lookup(_CODINGS_BACK, number, "index coding")


def reason_from_pb(text: str) -> m.Reason:
    try:
        return m.Reason(text)
    except ValueError:
        raise MalformedError(f"unknown reason {text!r}") from None
