"""Rounds in which each worker chooses its own coordinates: sums, answers, refusals, and what a worker makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cluster import Cluster, SimWorker
from desk import Desk
from hypothesis import given, settings
from hypothesis import strategies as st
from test_begun_anew import after, claimed

from loscar_core import plan as plan_module
from loscar_core.config import RunConfig, ServerLimits, require_fit
from loscar_core.errors import (
    ConfigError,
    LoscarError,
    MalformedError,
    NonFiniteError,
    RefusedError,
    WrongSelectionError,
)
from loscar_core.indices import IndexCoding, encode_indices
from loscar_core.merge import MergeKind
from loscar_core.messages import Answer, CatchUp, Commit, Contribution, Purpose, SendState, StateOffer
from loscar_core.methods import METHODS, parse_method, settle
from loscar_core.plan import Part, RoundKind, RoundPlan, missed_coordinates, plan_round
from loscar_core.replica import checksum_of
from loscar_core.robust import Aggregate
from loscar_core.selection import SelectionKind
from loscar_core.server_explicit import ExplicitRound
from loscar_core.server_machine import ServerMachine
from loscar_core.sparse_delta import CODING, SparsePart
from loscar_core.state import bits
from loscar_core.values import ValueType, decode, encode
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_receiving import receiving_of
from loscar_core.worker_state import export_worker, import_worker

D, K = 40, 7
TOPK: dict[str, Any] = {"selection": SelectionKind.TOPK, "coordinates": K}


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "EXPLICIT_SPAN", 16)


def desk_of(*peers: int, limits: dict[str, Any] | None = None, **config: Any) -> Desk:
    return Desk(dimension=D, config=TOPK | config, limits={"round_cap_s": 50.0} | (limits or {})).start(*peers)


def messages_of(desk: Desk, delta: np.ndarray, message_bytes: int = 1 << 18) -> list[Contribution]:
    """What a worker with that progress sends for the open round."""
    current = desk.machine.round
    assert current is not None
    worker = receiving_of(current.plan, desk.machine.config.seed, D, 0)
    encoded = worker.encode(delta, np.empty(0, np.float32), message_bytes)
    return [
        Contribution(
            desk.machine.epoch,
            current.plan.round,
            part,
            p.offset,
            p.values,
            current.checksum,
            indices=p.indices,
            base=p.base,
            coding=CODING,
            total=p.total,
        )
        for part, p in encoded.pieces
    ]


def largest(delta: np.ndarray, count: int = K) -> list[int]:
    return sorted(sorted(range(delta.size), key=lambda i: (-abs(float(delta[i])), i))[:count])


# --- sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(ValueType))
def test_a_round_is_what_a_plain_implementation_makes_of_it(kind: ValueType) -> None:
    """Bit for bit: each worker's largest, summed by slot whatever order they come in, and what is lost to quantisation
    stays on the server where it was lost."""
    rng = np.random.default_rng(3)
    desk = desk_of(1, 2, 3, value_type=kind)
    consensus, residual = desk.vector.copy(), np.zeros(D, np.float32)
    for _ in range(6):
        deltas = {slot: rng.normal(size=D).astype(np.float32) for slot in range(3)}
        waiting = [(slot + 1, m) for slot, delta in deltas.items() for m in messages_of(desk, delta)]
        for at in rng.permutation(len(waiting)):
            desk.send(*waiting[at])

        for start in range(0, D, 16):
            total: dict[int, np.float32] = {}
            for slot in range(3):
                own = [i for i in largest(deltas[slot]) if start <= i < start + 16]
                sent = decode(encode(deltas[slot][own], kind), kind, len(own)) if own else []
                for i, value in zip(own, sent, strict=True):
                    total[i] = np.float32(total.get(i, np.float32(0)) + value)
            union = sorted(total)
            mean = np.array([total[i] / np.float32(3) for i in union], np.float32) + residual[union]
            answer = decode(encode(mean, kind), kind, len(union)) if union else mean
            consensus[union] += answer
            residual[union] = mean - answer
        state = desk.machine.replica
        assert state is not None
        assert state.vector.tobytes() == consensus.tobytes()
        if kind is not ValueType.FLOAT32:
            assert desk.machine.residual is not None
            assert desk.machine.residual.tobytes() == residual.tobytes()
    assert desk.round == 6


def test_the_digest_says_where_the_values_belong() -> None:
    """Two answers with the same values at other coordinates leave other digests, also in a model of equal values."""
    digests = []
    for at in (3, 4):
        desk = Desk(dimension=D, config=TOPK | {"coordinates": 1})
        desk.vector[:] = 1.0
        desk.start(1)
        delta = np.zeros(D, np.float32)
        delta[at] = 2.0
        for message in messages_of(desk, delta):
            desk.send(1, message)
        assert desk.round == 1
        assert desk.machine.replica is not None
        digests.append(desk.machine.replica.digest)
    assert digests[0] != digests[1]


def test_a_part_of_which_nothing_is_sent_is_said_too() -> None:
    desk = desk_of(1)
    delta = np.zeros(D, np.float32)
    delta[32:39] = 1.0
    messages = messages_of(desk, delta)
    assert [(m.part, m.total) for m in messages] == [(0, 0), (1, 0), (2, 7)]
    for message in messages[:2]:
        desk.send(1, message)
    assert desk.machine.round is not None
    assert desk.machine.round.whole() == set()
    desk.send(1, messages[2])
    assert desk.round == 1
    answers = desk.got(1, Answer)
    assert [(a.part, a.total, bits(a.included)) for a in answers] == [(0, 0, [0]), (1, 0, [0]), (2, 7, [0])]


def test_parts_close_without_who_is_late() -> None:
    desk = desk_of(1, 2)
    first, second = (messages_of(desk, np.roll(np.arange(D, dtype=np.float32), by)) for by in (0, 20))
    for message in first:
        desk.send(1, message)
    desk.send(2, second[0])
    desk.tick(desk.now + 51.0)
    assert desk.round == 1
    assert [bits(a.included) for a in desk.got(1, Answer)] == [[0, 1], [0], [0]]
    for message in second[1:]:
        desk.send(2, message)  # too late, and nobody's fault
    assert desk.error(2) is None
    state = desk.machine.replica
    assert state is not None
    assert np.flatnonzero(state.vector - desk.vector).tolist() == sorted({*largest(np.arange(D)), *range(13, 16)} - {0})


def test_a_round_without_anybody_changes_nothing() -> None:
    """Its members have left after some of it had been received: what is closed without them is empty."""
    desk = desk_of(1, 2)
    desk.hello(3)
    state = desk.machine.replica
    assert state is not None
    desk.send(1, messages_of(desk, np.ones(D, np.float32))[1])
    before = state.vector.copy()
    desk.drop(1)
    desk.drop(2)
    desk.ready(3)
    desk.tick(desk.now + 60.0)
    assert state.position.round == 1
    changed = np.flatnonzero(state.vector != before)
    assert changed.tolist() == []
    assert desk.error(3) is None


# --- refusals -----------------------------------------------------------------------------------------------

DELTA = np.array([(-1) ** i * (1 + (i * 17) % D) for i in range(D)], np.float32)


def first_of(messages: list[Contribution]) -> int:
    """The first message with at least two values."""
    return next(i for i, m in enumerate(messages) if m.total > 1)


BENT: dict[str, tuple[Callable[[Contribution], Contribution], type[LoscarError], str]] = {
    "without coordinates": (lambda m: replace(m, coding=None), WrongSelectionError, "coded as None"),
    "plain coordinates": (lambda m: replace(m, coding=IndexCoding.PLAIN), WrongSelectionError, "PLAIN"),
    "another selection": (lambda m: replace(m, checksum=m.checksum ^ 1), WrongSelectionError, "other coordinates"),
    "a part that is none": (lambda m: replace(m, part=3), MalformedError, "part 3 of 3"),
    "another base": (lambda m: replace(m, base=m.base + 1), MalformedError, "indices from"),
    "an offset": (lambda m: replace(m, offset=512), MalformedError, "a message at 512"),
    "more than K": (lambda m: replace(m, total=K + 1), MalformedError, "of a selection of 7"),
    "more than a part": (lambda m: replace(m, total=17), MalformedError, "part"),
    "one less": (lambda m: replace(m, total=m.total - 1), MalformedError, "values"),
    "half a value": (lambda m: replace(m, values=m.values[:-1]), MalformedError, "no number of"),
    "fewer indices": (lambda m: replace(m, indices=m.indices[:-1]), MalformedError, "ind"),
    "no indices": (lambda m: replace(m, indices=b""), MalformedError, "parameter"),
    "repeated ones": (
        # Coded gaps cannot go back: what would be a repetition is a step out of the range.
        lambda m: replace(m, indices=encode_indices(np.arange(m.total) + 16, 1 << 10)),
        MalformedError,
        "",
    ),
    "NaN": (
        lambda m: replace(m, values=np.full(m.total, np.nan, np.float32).tobytes()),
        NonFiniteError,
        "not finite",
    ),
    "absurd": (lambda m: replace(m, values=np.full(m.total, 2e30, np.float32).tobytes()), MalformedError, "beyond"),
}


@pytest.mark.parametrize("what", BENT)
def test_a_bad_contribution_is_refused_by_name_and_changes_nothing(what: str) -> None:
    bend, error, text = BENT[what]
    results = []
    for misbehaves in (False, True):
        desk = desk_of(1, 2)
        good = messages_of(desk, DELTA)
        if misbehaves:
            at = first_of(good)
            for message in good[:at]:
                desk.send(2, message)
            before = desk.machine.round.bitmaps() if desk.machine.round else None
            desk.send(2, bend(good[at]))
            assert type(desk.error(2)) is error
            assert text in str(desk.error(2))
            assert desk.machine.round is not None
            assert desk.machine.round.bitmaps() == before
        else:
            for message in good[: first_of(good)]:
                desk.send(2, message)
            desk.drop(2)
        for message in good:
            desk.send(1, message)
        assert desk.round == 1
        assert desk.machine.replica is not None
        results.append((desk.machine.replica.vector.tobytes(), desk.machine.replica.digest))
    assert results[0] == results[1]


def test_all_parts_together_hold_exactly_k() -> None:
    """Said at the first part that makes it impossible."""
    delta = np.zeros(D, np.float32)
    delta[:7] = np.arange(7, 0, -1)
    for k, part in ((6, 2), (8, 0)):
        desk = desk_of(1)
        plan = desk.machine.round.plan if desk.machine.round else None
        assert plan is not None
        other = receiving_of(replace(plan, count=k), 0, D, 0)
        good = messages_of(desk, delta)
        pieces = [p for _, p in other.encode(delta, np.empty(0, np.float32), 1 << 18).pieces]
        for message, piece in zip(good, pieces, strict=True):
            assert desk.error(1) is None
            bent = replace(message, values=piece.values, indices=piece.indices, total=piece.total)
            desk.send(1, bent)
            if message.part == part:
                break
        assert isinstance(desk.error(1), MalformedError)
        assert "of a selection of 7" in str(desk.error(1))


def test_a_repetition_is_harmless_with_the_same_bytes_only() -> None:
    desk = desk_of(1, 2, 3)
    good = messages_of(desk, DELTA)
    for message in [*good, *good, good[0]]:
        desk.send(1, message)
        desk.send(2, message)
    assert desk.error(1) is None
    at = next(i for i, m in enumerate(good) if m.total)
    desk.send(1, replace(good[at], values=np.zeros(good[at].total, np.float32).tobytes()))
    assert "sent again with other bytes" in str(desk.error(1))
    desk.send(2, replace(good[at], total=good[at].total + 1))
    assert "another number of values" in str(desk.error(2))


def test_what_a_broken_stream_left_unfinished_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "CHUNK_ALIGNMENT", 1)
    desk = desk_of(1, 2)
    good = messages_of(desk, DELTA, message_bytes=1)
    assert len(good) == K + sum(m.total == 0 for m in good)
    cut = next(i for i, m in enumerate(good) if m.offset > 0)
    for message in good[:cut]:
        desk.send(1, message)
    told = desk.member(1).hello
    desk.drop(1)
    desk.hello(4, told.name, epoch=1, position=desk.position, digest=checksum_of(desk.vector, desk.statistics))
    for message in good:
        desk.send(4, message)
        desk.send(2, message)
    assert desk.error(4) is None
    assert desk.round == 1
    state = desk.machine.replica
    assert state is not None
    assert state.inclusion.of(told.incarnation).parts == 0b111


def test_medians_need_a_selection_in_common() -> None:
    config, limits = RunConfig(**TOPK), ServerLimits(aggregate=Aggregate.MEDIAN)
    with pytest.raises(ConfigError, match="median with selection topk"):
        require_fit(config, limits)
    with pytest.raises(ConfigError, match="median with selection topk"):
        ServerMachine(config, limits, b"r" * 16, 0.0)
    require_fit(config, ServerLimits())
    require_fit(RunConfig(), limits)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_needs_one_in_common_says_so(name: str) -> None:
    method = parse_method(name)
    values: dict[str, Any] = {"selection": SelectionKind.TOPK, "local_steps": None, "rounds": 5}
    if name in ("loscar", "local-sgd", "blend"):
        assert settle(method, values, ["selection"])["selection"] is SelectionKind.TOPK
        return
    with pytest.raises(ConfigError, match=f"(topk.* {name})"):
        settle(method, values, ["selection"])


def test_pairs_of_rounds_have_a_selection_of_their_own() -> None:
    with pytest.raises(ConfigError, match="pairs of rounds"):
        RunConfig(dependent=3, method="mixvr", selection=SelectionKind.TOPK)


# --- plans --------------------------------------------------------------------------------------------------


def test_the_largest_of_everything_is_everything() -> None:
    config = RunConfig(selection=SelectionKind.TOPK, density=1.0)
    assert plan_round(config, D, 1, stopping=False).selection is SelectionKind.ALL
    few = plan_round(RunConfig(**TOPK), D, 1, stopping=False)
    assert (few.selection, few.count, few.explicit) == (SelectionKind.TOPK, K, True)
    assert few.where(0, D) == slice(0, D)


def test_nobody_can_compute_what_others_have_chosen() -> None:
    explicit = RoundPlan(2, RoundKind.TRAIN, SelectionKind.TOPK, 1, ValueType.FLOAT32)
    seeded = RoundPlan(3, RoundKind.TRAIN, SelectionKind.RANDOM, 1, ValueType.FLOAT32)
    assert missed_coordinates(0, 1000, (seeded, explicit)) is None
    assert missed_coordinates(0, 1000, (seeded,)) is not None
    with pytest.raises(ConfigError):
        explicit.indices(0, 1000)


# --- the worker ---------------------------------------------------------------------------------------------


def cluster_of(n: int, *, merge: MergeKind = MergeKind.DELAY_CORRECTED, **config: Any) -> Cluster:
    made = Cluster(n, RunConfig(**({"seed": 5, "rounds": 8, "local_steps": 2, "merge": merge} | TOPK | config)))
    made.connect_all()
    return made


def until_open(run: Cluster) -> SimWorker:
    """Two workers have contributed to round 1, of which the first has the answer on its way."""
    first = run.workers[0]
    run.drain()
    for worker in run.workers:
        worker.step()
        worker.gather()
        run.hand_over(worker)
    for worker in run.workers:
        while worker.stream is not None and worker.stream.up:
            run.deliver_up(worker)
    return first


ANSWERS: dict[str, Callable[[Answer], Answer]] = {
    "without coordinates": lambda a: replace(a, coding=None),
    "another base": lambda a: replace(a, base=a.base + 1),
    "another total": lambda a: replace(a, total=a.total - 1),
    "a part that is none": lambda a: replace(a, part=3),
    "another offset": lambda a: replace(a, offset=a.offset + 1),
    "fewer values": lambda a: replace(a, values=a.values[:-4]),
    "values that are none": lambda a: replace(a, values=np.full(a.total, np.nan, np.float32).tobytes()),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_a_worker_refuses_a_bad_answer(what: str) -> None:
    first = until_open(cluster_of(2))
    assert first.stream is not None
    before = first.engine.anchor.vector.copy()
    for message in first.stream.down:
        if isinstance(message, Answer) and message.total > 1:
            with pytest.raises((MalformedError, NonFiniteError)):
                first.engine.received(ANSWERS[what](message))
            break
        first.engine.received(message)
    else:
        raise AssertionError("no answer")
    assert first.engine.anchor.vector.tobytes() == before.tobytes()


def test_an_answer_that_says_to_hold_what_it_does_not_is_refused() -> None:
    run = cluster_of(2)
    first = until_open(run)
    assert first.stream is not None
    second = run.workers[1].engine.ledger.records[1]
    [commit] = [m for m in first.stream.down if isinstance(m, Commit)]
    # A digest that fits: the server would have to mean it.
    first.engine.anchor.next_digest = lambda *_: commit.digest  # type: ignore[method-assign]
    for message in first.stream.down:
        if isinstance(message, Answer):
            # The other's coordinates only, as if its contribution were everybody's.
            own = next(m for m in second.messages if m.part == message.part)
            first.engine.received(replace(message, values=own.values, indices=own.indices, total=own.total))
        elif message is not commit:
            first.engine.received(message)
    with pytest.raises(MalformedError, match="is said to hold this worker's contribution"):
        first.engine.received(commit)
    assert first.engine.anchor.position.round == 0


@pytest.mark.parametrize("kind", list(MergeKind))
def test_merges_are_about_the_union(kind: MergeKind) -> None:
    """The corrected merge keeps what this worker has not sent, also where others have; overwriting takes the average
    there as well."""
    run = cluster_of(2, merge=kind)
    first = until_open(run)
    progress = first.live - first.engine.anchor.vector
    records = [w.engine.ledger.records[1] for w in run.workers]
    run.drain()
    [update] = first.updates
    union = np.union1d(records[0].indices, records[1].indices)
    assert update.indices is not None
    assert update.indices.tolist() == union.tolist()
    own = np.zeros(D, np.float32)
    own[records[0].indices] = records[0].sent
    assert update.sent is not None
    assert update.sent.tobytes() == own[union].tobytes()
    live = first.apply(first.live, update)
    mean = np.zeros(D, np.float32)
    for record in records:
        mean[record.indices] += record.sent
    mean /= np.float32(2)
    np.testing.assert_allclose(update.new_anchor - update.anchor, mean[union], atol=1e-6)
    expected = first.live.copy()
    left = progress - own if kind is MergeKind.DELAY_CORRECTED else np.zeros(D, np.float32)
    expected[union] = update.new_anchor + left[union]
    np.testing.assert_allclose(live, expected, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(list(ValueType)), st.integers(1, D - 1), st.sampled_from([1, 64, 4096]))
def test_what_is_sent_is_what_is_subtracted(seed: int, kind: ValueType, count: int, message_bytes: int) -> None:
    """The messages that a worker sends decode to its record, whatever is in them."""
    rng = np.random.default_rng(seed)
    delta = rng.normal(size=D).astype(np.float32) * rng.integers(0, 2, D).astype(np.float32)
    plan = RoundPlan(1, RoundKind.TRAIN, SelectionKind.TOPK, count, kind)
    worker = receiving_of(plan, 1, D, 0)
    encoded = worker.encode(delta, np.empty(0, np.float32), message_bytes)
    assert encoded.where.tolist() == largest(delta, count)  # type: ignore[union-attr]
    assert encoded.exhausted == (np.count_nonzero(delta) < count)
    server = receiving_of(plan, 1, D, 0)
    for part, p in encoded.pieces:
        server.take(Answer(1, part, p.offset, p.values, b"", p.indices, p.base, CODING, p.total))
    assert server.whole
    assert server.where.tolist() == largest(delta, count)  # type: ignore[union-attr]
    assert server.delta.tobytes() == encoded.sent.tobytes()
    assert [(p.start, p.stop) for p in encoded.parts][-1][1] == count


def test_what_has_gone_out_is_said() -> None:
    """With everything in, an update says which coordinates' progress went out: all of it, where no other had any."""
    run = cluster_of(1)
    run.watchful = False  # what it has is changed by hand
    first = run.workers[0]
    run.drain()
    for progress, covers in ((D, "its own"), (K - 1, "everything")):
        first.live[:progress] += 1.0
        first.gather()
        run.hand_over(first)
        run.drain()
        update = first.updates[-1]
        record = first.engine.ledger.records[update.round]
        assert update.whole
        if covers == "everything":
            assert update.covers == slice(0, D)
        else:
            assert isinstance(update.covers, np.ndarray)
            assert update.covers.tolist() == record.indices.tolist()
        while first.updates:
            first.merge()
        first.live[:] = first.engine.anchor.vector


def test_whoever_missed_a_round_is_sent_everything() -> None:
    run = cluster_of(3)
    away = run.workers[2]
    run.run(until=lambda: run.machine.replica is not None and run.machine.replica.position.round >= 2)
    run.drain(away)
    run.cut(away)
    held = away.engine.anchor.position.round
    run.connect(away)
    while away.stream is not None and away.stream.up:
        run.deliver_up(away)
    assert away.stream is not None
    [told] = [m for m in away.stream.down if isinstance(m, CatchUp)]
    assert not told.full  # it has missed nothing
    run.cut(away)
    run.run(until=lambda: run.machine.replica is not None and run.machine.replica.position.round > held)
    run.connect(away)
    while away.stream is not None and away.stream.up:
        run.deliver_up(away)
    assert away.stream is not None
    [told] = [m for m in away.stream.down if isinstance(m, CatchUp)]
    assert told.full
    run.run()
    run.check_end()


def test_a_worker_s_state_has_the_coordinates_that_it_chose() -> None:
    run = cluster_of(2, value_type=ValueType.INT8)
    first = run.workers[0]
    run.run(until=lambda: first.engine.anchor.position.round >= 2 and bool(first.engine.ledger.outstanding))
    values, arrays = export_worker(first.engine)
    engine = WorkerEngine("whoever", b"another one.....", run.layout, np.zeros(D, np.float32), np.zeros(0, np.float32))
    import_worker(engine, json.loads(json.dumps(values)), arrays)
    ours, theirs = first.engine.ledger.all(), engine.ledger.all()
    assert ours
    assert [r.messages for r in ours] == [r.messages for r in theirs]
    assert [r.parts for r in ours] == [r.parts for r in theirs]
    assert [r.exhausted for r in ours] == [r.exhausted for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.indices.tolist() == other.indices.tolist()
        assert one.sent.tobytes() == other.sent.tobytes()
    values["records"][0]["parts"] = [[0, 1]]
    with pytest.raises(MalformedError):
        import_worker(engine, values, arrays)


def test_an_explicit_round_says_so() -> None:
    desk = desk_of(1)
    assert isinstance(desk.machine.round, ExplicitRound)
    assert desk.machine.round.untouched
    good = messages_of(desk, DELTA)
    desk.send(1, good[0])
    assert not desk.machine.round.untouched


@pytest.mark.parametrize("parts", [[[0, 1]], [[0, 0], [0, 0], [0, 0]], [[0, 9], [9, 3], [3, K]], [[0, None]] * 3])
def test_a_worker_s_state_whose_coordinates_make_no_sense_is_refused(parts: list[Any]) -> None:
    run = cluster_of(1)
    first = run.workers[0]
    run.run(until=lambda: first.engine.anchor.position.round >= 1 and bool(first.engine.ledger.outstanding))
    values, arrays = export_worker(first.engine)
    engine = WorkerEngine("whoever", b"another one.....", run.layout, np.zeros(D, np.float32), np.zeros(0, np.float32))
    bent = json.loads(json.dumps(values))
    bent["records"][0]["parts"] = parts
    with pytest.raises(MalformedError):
        import_worker(engine, bent, arrays)
    with pytest.raises(MalformedError):
        import_worker(engine, values, arrays | {"where_0": arrays["where_0"][::-1].copy()})
    import_worker(engine, values, arrays)


def test_a_message_is_not_kept_for_the_few_values_that_it_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "CHUNK_ALIGNMENT", 2)
    part = Part(0, 0, 16)
    padded = bytearray(1 << 16)
    values = np.array([1.0, 2.0], "<f4")
    padded[100:108] = values.tobytes()
    found = SparsePart(part, ValueType.FLOAT32, 4)
    for offset in (0, 2):
        indices = encode_indices(np.array([0, 1]), 16 - offset, CODING)
        found.add(Answer(1, 0, offset, memoryview(bytes(padded))[100:108], b"", indices, found._next, CODING, 4))
    assert all(piece.base is None for piece in found._values), "a view keeps the whole message"
    assert found.joined()[1].tolist() == [1.0, 2.0, 1.0, 2.0]


def test_messages_that_nobody_cuts_so_small_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "CHUNK_ALIGNMENT", 2)
    found = SparsePart(Part(0, 0, 16), ValueType.FLOAT32, 3)
    one = np.ones(1, np.float32).tobytes()
    with pytest.raises(MalformedError, match="a message of 1 values where 3 are missing"):
        found.add(Answer(1, 0, 0, one, b"", encode_indices(np.array([0]), 16, CODING), 0, CODING, 3))
    assert found.filled == 0


@pytest.mark.parametrize("kind", ValueType)
def test_who_parts_comes_to_an_end_with_every_value_type(kind: ValueType) -> None:
    """Progress over twelve decades: at last only what the type takes for zero is left, and that is said."""
    rng = np.random.default_rng(3)
    left = (rng.normal(size=D) * 10.0 ** rng.uniform(-12, 0, D)).astype(np.float32)
    plan = RoundPlan(1, RoundKind.TRAIN, SelectionKind.TOPK, K, kind)
    for _ in range(60):
        encoded = receiving_of(plan, 1, D, 0).encode(left.copy(), np.empty(0, np.float32), 1 << 18)
        if encoded.exhausted:
            break
        left[encoded.where] -= encoded.sent
    assert encoded.exhausted
    assert np.abs(left).max() < 1e-4


def test_a_server_that_cannot_hold_the_run_does_not_cost_it_its_workers() -> None:
    """Its operator has given it another aggregate: the worker is turned away, and may come back to a better one."""
    held = claimed(after(5, 1, 2, 3, value=1.0))
    desk = Desk(limits={"aggregate": Aggregate.MEDIAN})
    desk.hello(1, "w1", **held)
    desk.tick(desk.now + desk.machine.limits.recover_after_s)
    assert desk.last(1, SendState) == SendState(Purpose.ANCHOR)
    offer = StateOffer(
        position=held["position"],
        digest=held["digest"],
        lineage=held["lineage"],
        inclusion={},
        recent=held["recent"],
        members=held["members"],
        config=RunConfig(**TOPK | {"coordinates": 3}),
        elapsed_s=1.0,
    )
    desk.send(1, offer)
    error = desk.error(1)
    assert isinstance(error, RefusedError)
    assert error.retriable
    assert "median with selection topk" in str(error)
