"""The mapping to protobuf: everything survives it, nothing malformed gets through, and it costs what it may."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections import deque
from enum import Enum
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loscar_core import effects as fx
from loscar_core import messages as m
from loscar_core import worker_effects as we
from loscar_core.config import PROTOCOL_VERSION, RunConfig, ServerLimits
from loscar_core.errors import MalformedError, VersionMismatchError
from loscar_core.layout import Layout, Segment, Shard
from loscar_core.plan import EXPLICIT_SPAN, PART_POSITIONS, RoundPlan
from loscar_core.selection import SelectionKind
from loscar_core.server_machine import ServerMachine
from loscar_core.server_state import Phase
from loscar_core.state import Included, Lineage, Position
from loscar_core.values import ValueType, payload_size
from loscar_core.worker_engine import WorkerEngine
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.mapping import (
    decode_server_message,
    decode_worker_message,
    encode_server_message,
    encode_worker_message,
)
from loscar_wire.pieces import config_from_pb, config_to_pb

WORKER_MESSAGES = typing.get_args(m.WorkerMessage)
SERVER_MESSAGES = typing.get_args(m.ServerMessage)

# --- one strategy for every dataclass -----------------------------------------------------------------------

U32 = st.integers(0, (1 << 32) - 1)
U62 = st.one_of(st.integers(0, 200), st.integers(0, 1 << 62))
NARROW = {"protocol_version", "slot", "part", "checksum", "vector_checksum", "digest", "local_steps", "overlap_steps"}
NARROW |= {"waiting_for", "frozen_checksum"}
FLOATS = st.floats(allow_nan=False)
TIMES = st.floats(0, 1e10)
TEXT = st.text(max_size=20)
LINES = st.text(max_size=20).filter(str.isprintable)


def layouts() -> st.SearchStrategy[Layout]:
    sizes = st.lists(st.integers(0, 1 << 12), max_size=3).map(tuple)
    segments = st.lists(st.tuples(TEXT, sizes, TEXT), max_size=5, unique_by=lambda s: s[0])

    @st.composite
    def build(draw: st.DrawFn) -> Layout:
        made = [Segment(*s) for s in draw(segments)]
        cut = draw(st.integers(0, len(made)))
        trainable = Segment("trainable " * 3, (draw(st.integers(1, 9)),), "float32")
        return Layout((trainable, *made[:cut]), tuple(made[cut:]), draw(U32))

    return build()


def lineages() -> st.SearchStrategy[Lineage]:
    grown = U62.map(lambda number: max(1, number))
    spans = st.lists(st.tuples(grown, grown), max_size=4)
    return spans.map(lambda s: Lineage(tuple(zip(*(sorted(set(x)) for x in zip(*s, strict=True)), strict=False))))


def configs() -> st.SearchStrategy[RunConfig]:
    def valid(values: dict[str, Any]) -> RunConfig:
        if values["local_steps"] == 0 and values["overlap_steps"] == 0:
            values["local_steps"] = 1
        if values["dependent"]:
            values["shard"] = Shard()
            values["selection"] = SelectionKind.ALL
        if values["shard"].index:
            values.update(rounds=None, duration_s=None, max_steps=None)
        return RunConfig(**values)

    positive = st.floats(1e-6, 1e9)
    special = {
        "seed": st.integers(0, (1 << 63) - 1),
        "density": st.floats(0, 1, exclude_min=True),
        "coordinates": st.none() | st.integers(1, 1 << 40),
        "selection": st.sampled_from([k for k in SelectionKind if k.value not in ("head", "tail")]),
        "sync_interval_s": positive,
        "duration_s": st.none() | positive,
        "dependent": st.just(0) | st.integers(2, 64),
        "rounds": st.none() | st.integers(1, 1 << 60),
        "max_steps": st.none() | st.integers(1, 1 << 60),
    }
    return st.fixed_dictionaries(fields_of(RunConfig, special)).map(valid)


def fields_of(kind: type, special: dict[str, st.SearchStrategy[Any]]) -> dict[str, st.SearchStrategy[Any]]:
    hints = typing.get_type_hints(kind)
    return {
        f.name: special[f.name] if f.name in special else of_type(hints[f.name], f.name)
        for f in dataclasses.fields(kind)
    }


def of_type(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Values of a field, from its type and, for the width of integers, its name."""
    made: dict[Any, st.SearchStrategy[Any]] = {
        int: U32 if name in NARROW else U62,
        float: FLOATS,
        bool: st.booleans(),
        str: TEXT,
        bytes: st.binary(max_size=16) if name in ("included", "run_id") else st.binary(max_size=64),
        memoryview: st.binary(max_size=3)
        | st.integers(4000, 6000).map(lambda n: memoryview(bytes(range(250)) * 24)[:n]),
        type(None): st.none(),
        Layout: layouts(),
        Shard: st.integers(1, 1024).flatmap(lambda n: st.builds(Shard, st.integers(0, n - 1), st.just(n))),
        Lineage: lineages(),
    }
    if hint in made:
        return made[hint]
    if hint is RunConfig:
        return configs()
    if hint is Included:
        return st.builds(Included, U62, st.integers(0, 1 << 300))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([of_type(a, name) for a in arguments])
    if origin is tuple:
        return st.lists(of_type(arguments[0], name), max_size=3).map(tuple)
    if origin is dict:
        keys = st.binary(min_size=16, max_size=16)
        return st.dictionaries(keys, of_type(arguments[1], name), max_size=3)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(list(hint))
    assert dataclasses.is_dataclass(hint), hint
    return message(hint)


@cache
def message(kind: type) -> st.SearchStrategy[Any]:
    """Any valid instance of a message, or of one of its pieces."""
    special: dict[str, st.SearchStrategy[Any]] = {}
    if kind is RoundPlan:
        special = {"count": st.integers(0, 1 << 40)}
    if kind is m.WorkerReport:
        special = {"idle_s": TIMES, "run_s": TIMES, "round_trip_s": st.none() | TIMES}
    if kind is m.StateOffer:
        special = {"elapsed_s": TIMES}
    if kind is m.OpenRound:
        special = {"elapsed_s": TIMES | st.just(-1.0)}
    if kind in (m.StopRun, m.Leave, m.Goodbye):
        special = {"why" if kind is m.StopRun else "detail": LINES}
    if kind is m.Hello:
        special = {"protocol_version": st.just(PROTOCOL_VERSION)}
    if kind is m.Welcome:
        pause = st.floats(1e-3, 1e9)
        special = {"slot": st.integers(-1, (1 << 31) - 1), "heartbeat_s": pause, "lease_s": pause}
        special |= {"elapsed_s": TIMES | st.just(-1.0), "epoch": st.integers(1, 1 << 40)}
    built = st.fixed_dictionaries(fields_of(kind, special)).map(lambda values: kind(**values))
    if kind is m.Commit:
        # The next plan's number is left out on the wire: it follows from the committed round's.
        def numbered(commit: m.Commit) -> m.Commit:
            round_ = min(commit.round, (1 << 62) - 1)
            return dataclasses.replace(commit, round=round_, plan=dataclasses.replace(commit.plan, round=round_ + 1))

        return built.map(numbered)
    return built


@pytest.mark.parametrize("kind", WORKER_MESSAGES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_worker_messages_survive(kind: type, data: st.DataObject) -> None:
    sent = data.draw(message(kind))
    assert decode_worker_message(encode_worker_message(sent)) == sent


@pytest.mark.parametrize("kind", SERVER_MESSAGES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_server_messages_survive(kind: type, data: st.DataObject) -> None:
    sent = data.draw(message(kind))
    assert decode_server_message(encode_server_message(sent)) == sent


@given(config=configs())
@settings(max_examples=60, deadline=None)
def test_configurations_survive(config: RunConfig) -> None:
    assert config_from_pb(config_to_pb(config)) == config


def test_every_body_of_the_protocol_is_mapped() -> None:
    for kind, classes in ((pb.WorkerMessage, WORKER_MESSAGES), (pb.ServerMessage, SERVER_MESSAGES)):
        bodies = kind.DESCRIPTOR.oneofs_by_name["body"].fields
        assert len(bodies) == len(classes)


def test_text_that_a_user_reads_is_cut() -> None:
    long = m.Leave(m.Reason.FAILED, "x" * 5000)
    decoded = decode_worker_message(encode_worker_message(long))
    assert isinstance(decoded, m.Leave)
    assert len(decoded.detail) == 500


# --- what is malformed --------------------------------------------------------------------------------------


def refuses_politely(data: bytes) -> None:
    """Decoding gives a message or a MalformedError; a hello of another version says so."""
    for decode in (decode_worker_message, decode_server_message):
        try:
            decode(data)
        except VersionMismatchError:
            assert pb.WorkerMessage.FromString(data).hello.protocol_version != PROTOCOL_VERSION
        except MalformedError:
            pass


@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes(data: bytes) -> None:
    refuses_politely(data)


@pytest.mark.parametrize("kind", [*WORKER_MESSAGES, *SERVER_MESSAGES])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_messages(kind: type, data: st.DataObject) -> None:
    sent = data.draw(message(kind))
    encode = encode_worker_message if kind in WORKER_MESSAGES else encode_server_message
    raw = bytearray(encode(sent))
    for _ in range(data.draw(st.integers(1, 4))):
        if not raw:
            break
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip":
                raw[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del raw[at:]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
            case "repeat":
                raw += raw[at:]
    refuses_politely(bytes(raw))


def offered(**columns: Any) -> pb.StateOffer:
    """A state offer that is valid but for its inclusion table."""
    lineage = [pb.Span(epoch=1, first_round=1)]
    config = config_to_pb(RunConfig(density=0.5))
    return pb.StateOffer(lineage=lineage, config=config, inclusion=pb.InclusionTable(**columns))


def test_the_offer_of_the_tests_is_valid_but_for_its_table() -> None:
    sent = pb.WorkerMessage(state_offer=offered(incarnations=b"i" * 16, rounds=[1], masks=[b"1"]))
    assert decode_worker_message(sent.SerializeToString())


@pytest.mark.parametrize(
    "body",
    [
        pb.WorkerMessage(),
        pb.WorkerMessage(vector=pb.VectorChunk(purpose=77)),  # type: ignore[arg-type]
        pb.WorkerMessage(leave=pb.Leave(reason="bored")),
        pb.WorkerMessage(hello=pb.Hello(protocol_version=PROTOCOL_VERSION)),
        pb.WorkerMessage(contribution=pb.Contribution(index_coding=9)),  # type: ignore[arg-type]
        pb.WorkerMessage(state_offer=pb.StateOffer()),
        pb.WorkerMessage(state_offer=offered(incarnations=b"short", rounds=[1], masks=[b"1"])),
        pb.WorkerMessage(state_offer=offered(incarnations=b"i" * 16, rounds=[1], masks=[b"1" * 70000])),
        pb.WorkerMessage(state_offer=offered(incarnations=b"i" * 16, rounds=[1])),
        pb.WorkerMessage(state_offer=offered(incarnations=b"i" * 16, rounds=[1 << 63], masks=[b"1"])),
        pb.WorkerMessage(state_offer=offered(incarnations=b"i" * 16, rounds=[1], mask_of=[1], masks=[b"1"])),
        pb.WorkerMessage(state_offer=offered(incarnations=b"i" * 16, rounds=[1], mask_of=[0, 0], masks=[b"1"])),
        pb.ServerMessage(open_round=pb.OpenRound(plan=pb.Plan(kind=99))),  # type: ignore[arg-type]
        pb.ServerMessage(open_round=pb.OpenRound(plan=pb.Plan(selection=pb.SELECTION_UNSPECIFIED))),
        pb.ServerMessage(goodbye=pb.Goodbye(reason="")),
    ],
)
def test_what_protobuf_takes_and_the_protocol_does_not(body: pb.WorkerMessage | pb.ServerMessage) -> None:
    decode = decode_worker_message if isinstance(body, pb.WorkerMessage) else decode_server_message
    with pytest.raises(MalformedError):
        decode(body.SerializeToString())


def test_a_hello_of_another_version_is_told_so_whatever_else_it_holds() -> None:
    strange = pb.WorkerMessage(hello=pb.Hello(protocol_version=PROTOCOL_VERSION + 1, run_id=b"?")).SerializeToString()
    with pytest.raises(VersionMismatchError, match=f"protocol {PROTOCOL_VERSION + 1}"):
        decode_worker_message(strange)


# --- what a round costs -------------------------------------------------------------------------------------

LATE = 1 << 31
"""An epoch and a round whose varints are as long as any run's will be."""


class MeteredRun:
    """A server machine and its workers, whose messages all pass through the encoding and are weighed."""

    def __init__(self, config: RunConfig, workers: int, dimension: int, statistics: int, late: bool) -> None:
        limits = ServerLimits(workers=workers, lease_s=1e6, round_cap_s=1e6, max_members=max(workers, 1))
        self.machine = ServerMachine(config, limits, b"r" * 16, 0.0)
        layout = Layout(
            (Segment("w", (dimension,), "float32"),), (Segment("s", (statistics,), "float32"),) if statistics else ()
        )
        self.up: dict[tuple[int, int], int] = {}  # (slot, part) -> bytes of its contribution
        self.answers: dict[int, int] = {}  # part -> bytes
        self.commit = 0
        self.opened: dict[int, we.RoundOpen] = {}
        self._queue: deque[tuple[int, bytes]] = deque()
        self.engines: list[WorkerEngine] = []
        for slot in range(workers):
            start = np.zeros(dimension, np.float32)
            stats = np.ones(statistics, np.float32)
            engine = WorkerEngine(f"w{slot}", (slot + 1).to_bytes(16, "big"), layout, start, stats, slot=slot)
            if late:
                anchor = engine.anchor
                anchor.position, anchor.members = Position(LATE, LATE), workers
                anchor.lineage = Lineage(((LATE, 1),))
                engine.initialised, engine.epoch, engine.config, engine.elapsed_s = True, LATE, config, 1e7
            self.engines.append(engine)
        for slot, engine in enumerate(self.engines):
            self._send(slot, engine.hello())
        self.settle()
        assert self.machine.phase is Phase.RUNNING
        assert len(self.opened) == workers

    def _send(self, slot: int, message: m.WorkerMessage) -> None:
        raw = encode_worker_message(message)
        if isinstance(message, m.Contribution):
            key = (slot, message.part)
            self.up[key] = self.up.get(key, 0) + len(raw)
        self._queue.append((slot, raw))

    def settle(self) -> None:
        while self._queue:
            slot, raw = self._queue.popleft()
            for effect in self.machine.received(slot, decode_worker_message(raw), 1e7):
                assert not isinstance(effect, fx.Close), effect
                if isinstance(effect, fx.Send):
                    self._deliver(effect)

    def _deliver(self, send: fx.Send) -> None:
        raw = encode_server_message(send.message)
        message = decode_server_message(raw)
        if isinstance(message, m.Answer):
            self.answers[message.part] = self.answers.get(message.part, 0) + len(raw)
        elif isinstance(message, m.Commit):
            self.commit += len(raw)
        for slot in send.peers:
            for effect in self.engines[slot].received(message):
                if isinstance(effect, we.Emit):
                    self._send(slot, effect.message)
                elif isinstance(effect, we.RoundOpen):
                    self.opened[slot] = effect

    def round(self) -> RoundPlan:
        """Everybody contributes to the open round; returns its plan."""
        opened, self.opened = dict(self.opened), {}
        self.up, self.answers, self.commit = {}, {}, 0
        rng = np.random.default_rng(len(opened))
        values = rng.normal(size=opened[0].indices.size).astype(np.float32)
        for slot, engine in enumerate(self.engines):
            steps = LATE + slot
            effects = engine.snapshot(opened[slot].plan.round, values, engine.anchor.statistics.copy(), steps, steps)
            assert effects
            for effect in effects:
                assert isinstance(effect, we.Emit)
                self._send(slot, effect.message)
        self.settle()
        assert self.commit
        return opened[0].plan


SIZES = [
    # workers, dimension, coordinates: one value, few, many, several parts
    (1, 1000, 1),
    (3, 1000, 1),
    (8, 4000, 17),
    (9, 20000, 999),
    (64, 1000, 1),
    (64, 20000, 1000),
    (300, 1000, 10),
    (2, PART_POSITIONS * 3, PART_POSITIONS),
    (3, PART_POSITIONS * 3, PART_POSITIONS + 1),
    (2, PART_POSITIONS * 3, PART_POSITIONS * 2 + 12345),
]


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("value_type", [ValueType.FLOAT32, ValueType.BFLOAT16], ids=lambda v: v.value)
@pytest.mark.parametrize(("workers", "dimension", "coordinates"), SIZES)
def test_a_seeded_round_costs_what_it_may(
    workers: int, dimension: int, coordinates: int, value_type: ValueType, late: bool
) -> None:
    """Each way at most 1.01 times the values, and 64 + ⌈n/8⌉ bytes a part."""

    config = RunConfig(
        coordinates=coordinates,
        selection=SelectionKind.RANDOM,
        value_type=value_type,
        local_steps=1,
        overlap_steps=0,
        rounds=1 << 40,
    )
    run = MeteredRun(config, workers, dimension, 0, late)
    extra = 64 + math.ceil(workers / 8)
    for _ in range(2):
        plan = run.round()
        assert late == (plan.round > LATE)
        left = plan.count
        assert left == coordinates
        parts = sorted(run.answers)
        budget = 0.0
        for part in parts:
            size = min(left, PART_POSITIONS)
            left -= size
            values = size * value_type.itemsize
            budget += 1.01 * values + extra
            for slot in range(workers):
                assert values < run.up[slot, part] <= 1.01 * values + extra
            assert values < run.answers[part] <= 1.01 * values + extra
        assert left == 0
        assert sum(run.answers.values()) + run.commit <= budget


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("kind", [SelectionKind.SWEEP, SelectionKind.BLOCK, SelectionKind.ALL], ids=lambda k: k.value)
def test_other_selections_and_statistics(kind: SelectionKind, late: bool) -> None:
    """Statistics are parts of their own: what they cost comes on top, by the same rule."""
    workers, dimension, statistics = 9, 5000, 70
    config = RunConfig(density=0.05, selection=kind, local_steps=1, overlap_steps=0, rounds=1 << 40)
    run = MeteredRun(config, workers, dimension, statistics, late)
    plan = run.round()
    extra = 64 + math.ceil(workers / 8)
    size = plan.size(config.seed, dimension)
    for part, count in ((0, size), (1, statistics)):
        limit = 1.01 * 4 * count + extra
        assert all(4 * count < run.up[slot, part] <= limit for slot in range(workers))
        assert 4 * count < run.answers[part] <= limit
    assert run.answers[0] + run.commit <= 1.01 * 4 * size + extra


@pytest.mark.parametrize("value_type", [ValueType.FLOAT32, ValueType.INT8], ids=lambda v: v.value)
@pytest.mark.parametrize(
    ("workers", "dimension", "coordinates"), [(2, 1000, 1), (9, 20_000, 999), (2, 5_000_000, 5_000)]
)
def test_a_round_of_the_largest_costs_little_more_than_its_values_and_indices(
    workers: int, dimension: int, coordinates: int, value_type: ValueType
) -> None:
    """All workers have the same progress here, so that the union is what each of them sends."""
    config = RunConfig(
        coordinates=coordinates,
        selection=SelectionKind.TOPK,
        value_type=value_type,
        local_steps=1,
        overlap_steps=0,
        rounds=1 << 40,
    )
    run = MeteredRun(config, workers, dimension, 0, late=False)
    run.round()
    choices = math.lgamma(dimension + 1) - math.lgamma(coordinates + 1) - math.lgamma(dimension - coordinates + 1)
    values, indices = payload_size(value_type, coordinates), choices / math.log(2) / 8
    parts = -(-dimension // EXPLICIT_SPAN)
    limit = 1.01 * values + 1.1 * indices + parts * (64 + math.ceil(workers / 8))
    for slot in range(workers):
        sent = sum(run.up[slot, part] for part in range(parts))
        assert values + indices < sent <= limit
    assert values + indices < sum(run.answers.values()) <= limit
    assert {engine.anchor.position.round for engine in run.engines} == {1}
    counted = {(engine.bytes_up, engine.bytes_down) for engine in run.engines}
    assert len(counted) == 1
    for figure in counted.pop():
        assert values + indices <= figure <= limit
