"""Rounds without a server's death: the algorithm's invariants, what is waited for, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chaos import Chaos
from cluster import Cluster, SimWorker
from desk import RUN, Desk, incarnation, layout

from loscar_core import effects as fx
from loscar_core import plan as plan_module
from loscar_core import server_catchup, server_round, worker_catchup, worker_holdings
from loscar_core.config import FinalRound, RunConfig, ServerLimits
from loscar_core.errors import (
    ConfigError,
    LoscarError,
    MalformedError,
    NonFiniteError,
    ProtocolError,
    RefusedError,
    ReplicaDivergedError,
    SupersededError,
    VersionMismatchError,
    WrongModelError,
    WrongRoundError,
    WrongRunError,
    WrongSelectionError,
)
from loscar_core.layout import Layout
from loscar_core.merge import MergeKind, merge
from loscar_core.messages import (
    Answer,
    CatchUp,
    Commit,
    Contribution,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Leave,
    OpenRound,
    Purpose,
    Ready,
    Reason,
    Refresh,
    SendState,
    SlotTaken,
    StopRun,
    VectorChunk,
    Welcome,
)
from loscar_core.plan import RoundKind
from loscar_core.selection import SelectionKind, select
from loscar_core.server_members import MemberState
from loscar_core.server_state import Phase
from loscar_core.state import Position
from loscar_core.values import ValueType, decode, encode
from loscar_core.worker_effects import Update
from loscar_core.worker_engine import WorkerEngine

NARROW = [ValueType.BFLOAT16, ValueType.FLOAT16, ValueType.INT8]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of many parts, parts of several messages, catch-ups of many slices, and soon of the whole vector."""
    monkeypatch.setattr(plan_module, "PART_POSITIONS", 3)
    monkeypatch.setattr(plan_module, "CHUNK_ALIGNMENT", 2)
    monkeypatch.setattr(plan_module, "MAX_PARTIAL_CATCH_UP", 10)
    monkeypatch.setattr(worker_holdings, "MESSAGE_BYTES", 1)
    monkeypatch.setattr(server_round, "ANSWER_BYTES", 8)
    monkeypatch.setattr(server_catchup, "STREAM_VALUES", 7)
    monkeypatch.setattr(worker_catchup, "STREAM_VALUES", 7)


def cluster_of(n: int, *, seed: int = 0, schedule: int = 0, **config: Any) -> Cluster:
    made = Cluster(n, RunConfig(**({"seed": 5, "rounds": 6} | config)), seed=seed)
    made.random = random.Random(schedule)
    made.connect_all()
    return made


# --- the algorithm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_type", list(ValueType))
def test_the_consensus_does_not_depend_on_the_order_of_arrival(value_type: ValueType) -> None:
    ends = set()
    for schedule in range(12):
        run = cluster_of(4, schedule=schedule, local_steps=2, overlap_steps=3, density=0.3, value_type=value_type)
        run.run()
        run.check_end()
        state = run.machine.replica
        assert state is not None
        ends.add((state.vector.tobytes(), state.digest))
    assert len(ends) == 1


def round_of(run: Cluster, *, in_flight: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One round in which everybody contributes and trains on: per worker y (sent), z (before) and x (after)."""
    run.drain()
    for w in run.workers:
        w.keep_history = True
        for _ in range(w.rng.integers(1, 4)):
            w.step()
    before = []
    for w in run.workers:
        w.gather()
        y = w.live.copy()
        run.hand_over(w)
        for _ in range(in_flight and int(w.rng.integers(0, in_flight + 1))):
            w.step()
        before.append((y, w.live.copy()))
    run.drain()
    after = []
    for w, (y, z) in zip(run.workers, before, strict=True):
        while w.updates:
            w.merge()
        after.append((y, z, w.live.copy()))
    run.check()
    return after


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("selection", [SelectionKind.RANDOM, SelectionKind.SWEEP, SelectionKind.BLOCK])
def test_a_corrected_merge_preserves_the_mean_and_leaves_the_drift(density: float, selection: SelectionKind) -> None:
    run = cluster_of(4, density=density, selection=selection)
    for _ in range(5):
        rounds = round_of(run, in_flight=5)
        y, z, x = (np.array(each, np.float64) for each in zip(*rounds, strict=True))
        np.testing.assert_allclose(x.mean(0), z.mean(0), atol=2e-5)
        s = run.workers[0].history[-1].indices
        at = slice(None) if s is None else s
        drift = (z - y)[:, at]
        # The first round that a coordinate is in finds it equal everywhere, so all that is left is what was done
        # since the snapshot.
        np.testing.assert_allclose((x - x.mean(0))[:, at], drift - drift.mean(0), atol=2e-5)


def test_an_overwriting_merge_loses_what_was_done_in_flight() -> None:
    run = cluster_of(3, density=1.0, merge=MergeKind.OVERWRITE)
    rounds = round_of(run, in_flight=6)
    y, z, x = (np.array(each, np.float64) for each in zip(*rounds, strict=True))
    np.testing.assert_allclose(x, np.broadcast_to(y.mean(0), x.shape), atol=1e-5)
    assert np.abs(x.mean(0) - z.mean(0)).max() > 0.1


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_without_overlap_both_merges_are_the_same(density: float) -> None:
    ends = []
    for kind in MergeKind.DELAY_CORRECTED, MergeKind.OVERWRITE:
        run = cluster_of(3, density=density, merge=kind, overlap_steps=0)
        for _ in range(3):
            rounds = round_of(run, in_flight=0)
        ends.append([x.tobytes() for _, _, x in rounds])
    assert ends[0] == ends[1]
    assert (len(set(ends[0])) == 1) == (density == 1.0)


@pytest.mark.parametrize(
    ("kind", "in_flight"), [(MergeKind.DELAY_CORRECTED, 6), (MergeKind.DELAY_CORRECTED, 0), (MergeKind.OVERWRITE, 6)]
)
def test_the_steady_disagreement_is_the_theory_s(kind: MergeKind, in_flight: int) -> None:
    """V* = η²σ²(1 − 1/n)[Q + (q/p)H] under pure noise; overwriting loses the Q."""
    n, d, local, p, rounds, scale = 6, 4000, 2, 0.25, 260, 0.1
    rng = np.random.default_rng(1)
    x = np.zeros((n, d), np.float32)
    a = np.zeros(d, np.float32)
    seen = []

    def steps(count: int) -> np.ndarray:
        return (scale * np.sqrt(count) * rng.standard_normal((n, d))).astype(np.float32)

    for round_ in range(1, rounds + 1):
        s = select(SelectionKind.RANDOM, 3, round_, d, round(p * d))
        x += steps(local)
        sent = x[:, s] - a[s]
        new = a[s] + sent.mean(0)
        x += steps(in_flight)
        for i in range(n):
            x[i, s] = merge(kind, x[i, s], a[s], new, sent[i])
        a[s] = new
        if round_ > 60:
            seen.append(float(x.var(0).mean()))
    overlap = in_flight if kind is MergeKind.DELAY_CORRECTED else 0
    theory = scale**2 * (1 - 1 / n) * (overlap + (1 - p) / p * (local + in_flight))
    assert np.mean(seen) == pytest.approx(theory, rel=0.03)


@pytest.mark.parametrize("value_type", NARROW)
def test_what_quantisation_leaves_out_stays_at_home_on_both_sides(value_type: ValueType) -> None:
    run = cluster_of(3, density=0.5, selection=SelectionKind.RANDOM, value_type=value_type)
    start = run.workers[0].engine.anchor.vector.astype(np.float64)
    total = np.zeros(start.size)
    for _ in range(6):
        rounds = round_of(run, in_flight=0)
        state, residual = run.machine.replica, run.machine.residual
        assert state is not None
        assert residual is not None
        node = run.check_server(run.machine)
        s = run.workers[0].history[-1].indices
        assert s is not None
        for worker, (y, _, x) in zip(run.workers, rounds, strict=True):
            taken, mask = node.included[worker.engine.incarnation]
            assert mask == 1
            assert node.parent is not None
            meant = y[s] - node.parent.vector[s]
            # Without steps in flight the whole of x − a is what encoding left out.
            assert x[s].tobytes() == (state.vector[s] + (meant - taken.sent)).tobytes()
            assert taken.sent.tobytes() == decode(encode(meant, value_type), value_type, s.size).tobytes()
            assert np.abs(meant - taken.sent).max() > 0
            total += taken.dense(mask) / 3
        np.testing.assert_allclose(state.vector + residual, start + total, atol=2e-5)
    assert np.abs(residual).max() > 0


def test_statistics_are_averaged_as_they_are_and_assigned() -> None:
    run = Cluster(3, RunConfig(density=0.2, value_type=ValueType.INT8), statistics=4, seed=2)
    run.connect_all()
    run.drain()
    for _ in range(3):
        for w in run.workers:
            w.step()
            w.statistics = w.rng.normal(size=4).astype(np.float32)
            w.gather()
        told = [w.statistics.copy() for w in run.workers]
        for w in run.workers:
            w.statistics = w.statistics + 7  # what happens in flight is not kept: there is no correction
            run.hand_over(w)
        run.drain()
        mean = ((told[0] + told[1]) + told[2]) / np.float32(3)
        for w in run.workers:
            while w.updates:
                w.merge()
            assert w.statistics.tobytes() == mean.tobytes()
        run.check()


# --- random schedules -----------------------------------------------------------------------------------------

SCHEDULES = {
    "quiet": Chaos(),
    "cuts": Chaos(cut=0.006),
    "crashes": Chaos(cut=0.003, crash=0.003),
    "deadlines": Chaos(cut=0.004, deadlines=True, slow=True, backlog=2, observers=1),
    "joiners": Chaos(cut=0.003, crash=0.001, joiners=3, observers=1),
    "bfloat16": Chaos(cut=0.004, deadlines=True, value_type=ValueType.BFLOAT16),
    "int8": Chaos(cut=0.004, crash=0.001, value_type=ValueType.INT8),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_everything_adds_up_whatever_happens(name: str) -> None:
    for seed in range(12):
        SCHEDULES[name].run(seed)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.usefixtures("small_parts")
def test_everything_adds_up_in_many_parts(name: str) -> None:
    for seed in range(100, 106):
        SCHEDULES[name].run(seed)


def test_some_parts_in_and_others_not(small_parts: None) -> None:
    desk_parts = 3
    run = cluster_of(2, density=0.2, selection=SelectionKind.RANDOM, local_steps=3)
    run.limits = ServerLimits(workers=2, lease_s=1e6, round_cap_s=50.0)
    run.machine.limits = run.limits
    run.drain()
    first, second = run.workers
    for w in run.workers:
        for _ in range(3):
            w.step()
        w.gather()
        run.hand_over(w)
    assert run.machine.round is not None
    assert len(run.machine.round.parts) == desk_parts  # 8 positions, 3 to a part
    while first.stream is not None and first.stream.up:
        run.deliver_up(first)
    while run.machine.round.contributors(1) == [0]:
        run.deliver_up(second)  # the second worker's parts 0 and 1, but not its last
    run.tick(51.0)
    run.cut(second)
    run.drain(first)
    state = run.machine.replica
    assert state is not None
    assert state.position.round == 1
    assert state.inclusion.of(first.engine.incarnation).parts == 0b111
    assert state.inclusion.of(second.engine.incarnation).parts == 0b011
    run.connect(second)
    run.drain()
    record = second.engine.ledger.records[1]
    assert record.subtracted == 0b011
    assert (second.engine.ledger.included, second.engine.ledger.returned) == (1, 0)
    run.check()
    # What was left out goes out later, like any other progress.
    run.run()
    run.check_end()


# --- the start ------------------------------------------------------------------------------------------------


def test_a_barrier_waits_for_all() -> None:
    desk = Desk(limits={"workers": 3})
    for peer in 1, 2:
        desk.hello(peer)
    assert [desk.last(p, Welcome).waiting_for for p in (1, 2)] == [2, 1]  # type: ignore[union-attr]
    desk.tick(1e5)
    assert desk.machine.phase is Phase.WAITING
    desk.hello(3)
    assert desk.machine.phase is Phase.TRANSFERRING
    assert desk.got(1, SendState) == [SendState(Purpose.INITIAL_MODEL)]
    desk.give_model(1)
    desk.ready(1, 2)
    assert desk.machine.phase is Phase.READYING
    desk.ready(3)
    assert desk.machine.phase is Phase.RUNNING
    assert desk.machine.round is not None
    assert desk.machine.round.members == 3
    assert desk.machine.elapsed_s(1e5 + 3) == 3


def test_without_a_barrier_the_first_round_opens_after_the_last_join() -> None:
    desk = Desk(limits={"start_grace_s": 5.0})
    assert desk.machine.next_wakeup() is None
    desk.hello(1)
    desk.tick(4.9)
    desk.hello(2)
    desk.tick(9.8)
    assert desk.machine.phase is Phase.WAITING
    assert desk.machine.next_wakeup() == pytest.approx(9.9)
    desk.tick(9.9)
    assert desk.machine.phase is Phase.TRANSFERRING


def test_a_worker_that_comes_during_the_transfer_takes_part_like_any_other() -> None:
    desk = Desk()
    desk.hello(1)
    desk.tick(5.0)
    desk.hello(2)
    told = desk.last(2, Welcome)
    assert told is not None
    assert not told.recovering
    assert told.epoch == 1
    run = Cluster(1, RunConfig(rounds=3), limits=ServerLimits(start_grace_s=1.0, lease_s=1e6))
    run.connect_all()
    run.deliver_up(run.workers[0])
    run.tick(2.0)
    assert run.machine.phase is Phase.TRANSFERRING
    late = run.add_worker("late", seed=9)
    run.connect(late)
    run.run()
    run.check_end()
    assert late.engine.ledger.included > 1


def test_a_donor_that_leaves_in_the_middle_is_replaced() -> None:
    desk = Desk(limits={"workers": 2})
    desk.hello(1)
    desk.hello(2)
    desk.send(1, VectorChunk(Purpose.INITIAL_MODEL, 0, 8, desk.vector[:3].tobytes()))
    desk.drop(1)
    assert desk.machine.phase is Phase.WAITING
    desk.hello(3)
    assert desk.last(2, SendState) is not None
    desk.give_model(2)
    assert desk.machine.phase is Phase.READYING


def test_the_model_of_a_worker_that_was_refused_or_left_does_not_stay() -> None:
    desk = Desk()
    desk.hello(1, layout=layout(5), slot=1 << 30)
    assert isinstance(desk.error(1), RefusedError)
    desk.hello(2, layout=layout(6), observer=True)
    assert desk.machine.layout is None
    desk.hello(3, layout=layout(7))
    assert isinstance(desk.error(2), WrongModelError)
    desk.drop(3)
    desk.hello(4)
    assert desk.machine.layout == desk.layout


def test_a_run_ended_before_it_began_tells_everybody() -> None:
    desk = Desk(limits={"workers": 2})
    desk.hello(1)
    desk.stop()
    assert desk.machine.phase is Phase.FINISHED
    assert desk.closed[1].goodbye == Goodbye(Reason.FINISHED, "enough")
    desk.hello(2)
    assert desk.closed[2].goodbye is not None
    readying = Desk(limits={"workers": 1})
    readying.hello(1)
    readying.give_model(1)
    readying.stop()
    told = readying.last(1, OpenRound)
    assert told is not None
    assert told.plan.kind is RoundKind.END


# --- deadlines, suspension, quorum ----------------------------------------------------------------------------


def test_one_miss_suspends_and_ready_brings_back() -> None:
    desk = Desk(limits={"round_cap_s": 100.0}).start(1, 2, 3)
    t0 = desk.now
    desk.contribute(1)
    desk.contribute(2)
    desk.tick(t0 + 99.9)
    assert desk.round == 0
    assert desk.machine.next_wakeup() == pytest.approx(t0 + 100)
    desk.tick(t0 + 100)
    assert desk.round == 1
    assert desk.member(3).state is MemberState.SUSPENDED
    assert desk.member(3).missed == 1
    # It is sent what the others are sent, but neither waited for nor counted.
    assert desk.got(3, Commit) == desk.got(1, Commit)
    assert desk.machine.round is not None
    assert desk.machine.round.members == 2
    desk.contribute(1)
    desk.contribute(2)
    assert desk.round == 2
    # What it sends now is late, or not counted: neither does harm.
    desk.send(3, desk.contribution(5.0, round=1))
    desk.send(3, desk.contribution(5.0))
    assert 3 not in desk.closed
    desk.ready(3)
    assert desk.member(3).state is MemberState.SUSPENDED
    desk.contribute(1)
    desk.contribute(2)
    assert desk.member(3).state is MemberState.ACTIVE
    assert desk.machine.round.members == 3
    desk.contribute(1)
    desk.contribute(2)
    assert desk.round == 3  # waited for again
    desk.contribute(3)
    assert desk.round == 4


def test_a_deadline_is_four_of_the_member_s_own_cycles() -> None:
    desk = Desk(limits={"round_cap_s": 1000.0, "deadline_cycles": 4.0}).start(1, 2)
    for cycle in 20.0, 30.0, 40.0:
        desk.tick(desk.now + 5)
        desk.contribute(1)
        assert desk.member(2).deadline_s(desk.machine.limits) == 1000
        desk.now += cycle - 5
        desk.contribute(2)
    assert desk.round == 3
    assert desk.member(1).deadline_s(desk.machine.limits) == 20  # 4 × 5 s
    assert desk.member(2).deadline_s(desk.machine.limits) == 120
    opened = desk.now
    desk.contribute(1)
    assert desk.machine.next_wakeup() == pytest.approx(opened + 120)
    desk.tick(opened + 119)
    assert desk.round == 3
    desk.tick(opened + 120)
    assert desk.round == 4
    assert [m.slot for m in desk.machine.members.active()] == [0]


def test_short_cycles_do_not_make_short_deadlines() -> None:
    desk = Desk(limits={"round_cap_s": 1000.0}).start(1, 2)
    for _ in range(4):
        desk.now += 0.1
        desk.contribute(1)
        desk.contribute(2)
    assert desk.member(1).deadline_s(desk.machine.limits) == 10


def test_a_worker_that_became_slower_gets_in_again() -> None:
    desk = Desk(limits={"round_cap_s": 1000.0}).start(1, 2)
    for _ in range(6):
        desk.now += 1
        desk.contribute(1)
        desk.contribute(2)
    missed = included = 0
    for _ in range(40):  # its cycle is 30 s now
        desk.drained(1)
        desk.drained(2)
        opened, before = desk.now, desk.round
        assert desk.machine.round is not None
        desk.contribute(1)
        if desk.round > before:
            desk.ready(2)  # it was not waited for
            continue
        patience = desk.member(2).deadline_s(desk.machine.limits)
        if patience > 30:
            desk.now = opened + 30
            desk.contribute(2)
            included += 1
        else:
            desk.tick(opened + patience)
            missed += 1
            desk.ready(2)
        assert desk.round == before + 1
    assert missed < 10
    assert included > 20


def test_a_quorum_is_half_of_the_active() -> None:
    for members, needed in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3)):
        desk = Desk(limits={"round_cap_s": 10.0}).start(*range(1, members + 1))
        desk.tick(desk.now + 11)  # past everybody's deadline
        for peer in range(1, needed):
            desk.contribute(peer)
        assert desk.round == 0, members
        desk.contribute(needed)
        assert desk.round == 1, members
        assert desk.logged(fx.RoundCommitted)[-1].included == tuple(range(needed))


def test_who_is_absent_counts_as_zero() -> None:
    desk = Desk(limits={"round_cap_s": 10.0}).start(1, 2, 3, 4)
    desk.contribute(1, 4.0)
    desk.contribute(3, 8.0)
    desk.tick(desk.now + 10)
    assert desk.machine.replica is not None
    np.testing.assert_array_equal(desk.machine.replica.vector, desk.vector + 3)


def test_a_round_goes_on_without_those_who_left() -> None:
    desk = Desk().start(1, 2, 3)
    desk.contribute(1)
    desk.contribute(2, 2.0)
    desk.drop(2)  # what it gave stays in
    assert desk.round == 0
    desk.drop(3)
    assert desk.round == 1
    assert desk.machine.replica is not None
    np.testing.assert_array_equal(desk.machine.replica.vector, desk.vector + 1)


def test_a_round_that_everybody_has_left_waits_and_begins_anew() -> None:
    desk = Desk().start(1, 2)
    desk.drop(1)
    desk.drop(2)
    desk.tick(desk.now + 1000)
    assert desk.round == 0
    desk.hello(3)
    assert desk.last(3, OpenRound) is not None
    desk.contribute(3)  # it does not wait to be counted
    desk.ready(3)
    assert desk.machine.round is not None
    assert list(desk.machine.round.slots.values()) == [incarnation("w3")]
    # It is told once more, so that it sends again what did not count.
    assert len(desk.got(3, OpenRound)) == 2
    desk.contribute(3)
    assert desk.round == 1


def test_a_part_that_was_being_sent_when_the_round_began_anew(small_parts: None) -> None:
    desk = Desk().start(1)
    desk.drop(1)
    desk.hello(2)
    whole = desk.contribution()
    desk.send(2, replace(whole, values=whole.values[:4]))
    desk.ready(2)
    desk.send(2, replace(whole, values=whole.values[4:], offset=1))  # the rest of what did not count
    assert 2 not in desk.closed
    desk.contribute(2)
    assert desk.round == 1


def test_a_half_summed_round_that_everybody_has_left_is_closed_for_the_next(small_parts: None) -> None:
    desk = Desk(statistics=2).start(1)
    desk.send(1, desk.contribution(3.0, part=0))
    desk.drop(1)
    desk.tick(desk.now + 1000)
    assert desk.round == 0
    desk.hello(2)
    desk.ready(2)
    assert desk.round == 1
    assert desk.machine.replica is not None
    expected = desk.vector.copy()
    expected[:3] += 3
    np.testing.assert_array_equal(desk.machine.replica.vector, expected)
    assert desk.machine.replica.inclusion.of(incarnation("w1")).parts == 1
    desk.contribute(2)
    assert desk.round == 2


def test_a_reconnect_within_the_open_round_counts() -> None:
    desk = Desk().start(1, 2)
    desk.contribute(1)
    desk.hello(3, "w1", epoch=1, position=Position(1, 0))  # the same incarnation on a new stream
    assert 1 in desk.closed
    desk.contribute(3)  # sent again
    desk.ready(3)
    assert desk.round == 0
    desk.contribute(2)
    assert desk.round == 1
    assert desk.logged(fx.RoundCommitted)[-1].included == (0, 1)
    assert desk.member(3).state is MemberState.ACTIVE


# --- names, slots, leases -------------------------------------------------------------------------------------


def test_a_worker_gets_the_smallest_free_slot() -> None:
    desk = Desk()
    desk.hello(1)
    desk.hello(2, slot=5)
    desk.hello(3)
    desk.hello(4, observer=True)
    assert [desk.last(p, Welcome).slot for p in (1, 2, 3, 4)] == [0, 5, 1, -1]  # type: ignore[union-attr]
    desk.hello(5, slot=5)
    assert isinstance(desk.error(5), RefusedError)
    assert "w2" in str(desk.error(5))
    for slot in -1, 1 << 20:
        desk.hello(6, slot=slot)
        assert isinstance(desk.error(6), RefusedError)


def test_a_slot_is_kept_for_its_name_for_a_while() -> None:
    desk = Desk(limits={"slot_reserve_s": 100.0})
    desk.hello(1)
    desk.hello(2)
    desk.drop(1)
    desk.now = 99.0
    desk.hello(3)
    assert desk.member(3).slot == 2
    desk.hello(4, slot=0)
    assert isinstance(desk.error(4), RefusedError)
    desk.hello(5, "w1", incarnation=incarnation("another w1"))
    assert desk.member(5).slot == 0
    desk.drop(5)
    desk.now = 200.0
    desk.hello(6, slot=0)  # nobody has joined since the reservation ran out
    assert desk.member(6).slot == 0


def test_the_slot_of_a_worker_that_comes_back_is_a_wish() -> None:
    desk = Desk()
    desk.hello(1)
    desk.hello(2, slot=0, epoch=3)
    assert desk.member(2).slot == 1
    desk.hello(3, slot=0)
    assert isinstance(desk.error(3), RefusedError)


def test_the_newest_incarnation_of_a_name_wins() -> None:
    desk = Desk().start(1, 2)
    desk.contribute(1, 7.0)
    desk.hello(3, "w1", incarnation=incarnation("new"))
    assert isinstance(desk.error(1), SupersededError)
    assert desk.machine.members.departures[-1].reason is Reason.SUPERSEDED
    assert desk.member(3).slot == 0
    # The old one's contribution is the old one's: the new one is told so, and not counted in this round.
    assert desk.last(3, Welcome).roster[0] == incarnation("w1")  # type: ignore[union-attr]
    desk.send(3, desk.contribution(100.0))
    desk.contribute(2, 1.0)
    assert desk.round == 1
    state = desk.machine.replica
    assert state is not None
    np.testing.assert_array_equal(state.vector, desk.vector + 4)
    assert state.inclusion.of(incarnation("w1")).round == 1
    assert state.inclusion.of(incarnation("new")).round == 0
    order = [type(m) for m in desk.sent[2]]
    assert order[-2:] == [Commit, SlotTaken]
    assert desk.last(2, SlotTaken) == SlotTaken(0, incarnation("new"))
    # And the old one stays out.
    desk.hello(4, "w1")
    assert isinstance(desk.error(4), SupersededError)
    assert 3 not in desk.closed


def test_a_new_incarnation_does_not_take_the_old_one_s_contribution_for_its_own() -> None:
    run = cluster_of(2, density=1.0, local_steps=3)
    run.drain()
    old, other = run.workers
    old.step()
    old.gather()
    run.hand_over(old)
    run.drain(old)
    new = run.crash(old)
    run.connect(new)
    run.drain()
    assert new.engine.slot == 0
    new.step()
    new.gather()
    run.hand_over(new)
    other.gather()
    run.hand_over(other)
    run.drain()
    assert run.machine.replica is not None
    assert run.machine.replica.inclusion.of(old.engine.incarnation).round == 1
    assert (new.engine.ledger.included, new.engine.ledger.returned) == (0, 1)
    run.check()


def test_a_worker_whose_slot_has_changed_knows_its_contribution_by_the_roster() -> None:
    run = cluster_of(2, density=1.0, local_steps=3)
    run.machine.limits = replace(run.limits, slot_reserve_s=0.0)
    run.machine.members._limits = run.machine.limits
    run.drain()
    mover, other = run.workers
    mover.step()
    mover.gather()
    run.hand_over(mover)
    run.drain(mover)
    run.cut(mover)
    run.tick(1.0)
    taker = run.add_worker("taker", slot=0, seed=1)
    run.connect(taker)
    run.deliver_up(taker)
    run.connect(mover)
    run.drain()
    assert (taker.engine.slot, mover.engine.slot) == (0, 2)
    other.gather()
    run.hand_over(other)
    run.drain()
    assert mover.engine.ledger.included == 1
    run.check()
    run.run()
    run.check_end()


def test_silence_ends_a_membership_and_any_message_renews_it() -> None:
    desk = Desk(limits={"lease_s": 15.0}).start(1, 2)
    t0 = desk.now
    for member in 1, 2:
        desk.send(member, Heartbeat(7, 0))
    assert desk.last(1, HeartbeatReply) == HeartbeatReply(7)
    desk.tick(t0 + 10)
    desk.contribute(1)
    assert desk.machine.next_wakeup() == pytest.approx(t0 + 15)
    desk.tick(t0 + 15)
    assert list(desk.machine.members.by_peer) == [1]
    gone = desk.closed[2].goodbye
    assert gone is not None
    assert gone.reason is Reason.LEASE_EXPIRED
    assert desk.round == 1  # nobody else was waited for
    desk.tick(t0 + 25)
    assert not desk.machine.members.by_peer


def test_every_departure_has_a_reason() -> None:
    desk = Desk(limits={"lease_s": 15.0}).start(1, 2, 3, 4)
    desk.drop(1)
    desk.send(2, Leave(Reason.DIVERGED, "bad memory"))
    desk.send(3, Contribution(9, 1, 0, 0, b"", 0))
    desk.tick(100.0)
    reasons = [d.departure.reason for d in desk.logged(fx.MemberGone)]
    assert reasons == [Reason.STREAM_CLOSED, Reason.DIVERGED, Reason.REFUSED, Reason.LEASE_EXPIRED]
    assert desk.closed[2].goodbye == Goodbye(Reason.DIVERGED, "bad memory")
    assert desk.machine.members.departure_counts[Reason.DIVERGED] == 1


def test_a_full_server_refuses() -> None:
    desk = Desk(limits={"max_members": 2})
    desk.hello(1)
    desk.hello(2, observer=True)
    desk.hello(3)
    assert isinstance(desk.error(3), RefusedError)
    desk.hello(4, "w1", incarnation=incarnation("again"))  # in the place of its predecessor
    assert 4 not in desk.closed


# --- refusals -------------------------------------------------------------------------------------------------

HELLOS: dict[str, tuple[dict[str, Any], type[LoscarError], str]] = {
    "version": ({"protocol_version": 99}, VersionMismatchError, "protocol 99"),
    "run": ({"run_id": b"x" * 16}, WrongRunError, RUN.hex()),
    "model": ({"layout": layout(9)}, WrongModelError, "w float32[8]"),
    "statistics": ({"layout": layout(8, 1)}, WrongModelError, "mean"),
    "frozen": ({"layout": Layout(layout(8).parameters, (), 5)}, WrongModelError, "frozen"),
    "incarnation": ({"incarnation": b"short"}, MalformedError, "5 bytes"),
    "no name": ({"name": ""}, MalformedError, "name"),
    "odd name": ({"name": "a\nb"}, MalformedError, "name"),
    "long name": ({"name": "a" * 201}, MalformedError, "name"),
    "epoch": ({"epoch": 2}, WrongRoundError, "epoch 2"),
}


@pytest.mark.parametrize("what", HELLOS)
def test_a_hello_that_is_refused_changes_nothing(what: str) -> None:
    changes, error, text = HELLOS[what]
    desk = Desk().start(1, 2)
    desk.contribute(1)
    desk.contribute(2)
    desk.contribute(1)
    desk.hello(3, **changes)
    assert type(desk.error(3)) is error
    assert text in str(desk.error(3))
    assert desk.machine.refused == {error.__name__: 1}
    desk.contribute(2)
    assert desk.round == 2
    assert list(desk.machine.members.by_peer) == [1, 2]


def test_models_that_are_too_large_are_refused() -> None:
    desk = Desk(limits={"max_dimension": 100}, config={"selection": SelectionKind.SWEEP, "coordinates": 10})
    desk.hello(1, layout=layout(101))
    assert isinstance(desk.error(1), RefusedError)
    desk.hello(2, layout=layout(90, 11))
    assert isinstance(desk.error(2), RefusedError)
    desk.hello(3, layout=layout(9))
    assert isinstance(desk.error(3), ConfigError)
    desk.hello(4, layout=layout(90, 10))
    assert 4 not in desk.closed


def bad_values(value: float) -> bytes:
    values = np.zeros(8, np.float32)
    values[3] = value
    return values.tobytes()


CONTRIBUTIONS: dict[str, tuple[dict[str, Any], type[LoscarError]]] = {
    "later epoch": ({"epoch": 2}, WrongRoundError),
    "later round": ({"round": 2}, WrongRoundError),
    "selection": ({"checksum": 1}, WrongSelectionError),
    "part": ({"part": 1}, MalformedError),
    "offset": ({"offset": 1}, MalformedError),
    "far offset": ({"offset": 1 << 40}, MalformedError),
    "too many": ({"values": bytes(36)}, MalformedError),
    "none": ({"values": b""}, MalformedError),
    "half a value": ({"values": bytes(30)}, MalformedError),
    "NaN": ({"values": bad_values(np.nan)}, NonFiniteError),
    "infinity": ({"values": bad_values(-np.inf)}, NonFiniteError),
    "huge": ({"values": bad_values(-1e31)}, MalformedError),
}


@pytest.mark.parametrize("what", CONTRIBUTIONS)
def test_a_contribution_that_is_refused_changes_nothing_but_its_stream(what: str) -> None:
    changes, error = CONTRIBUTIONS[what]
    desk = Desk().start(1, 2, 3)
    desk.contribute(1, 3.0)
    desk.send(3, replace(desk.contribution(5.0), **changes))
    assert type(desk.error(3)) is error
    assert str(desk.error(3))
    assert desk.machine.refused == {error.__name__: 1}
    assert set(desk.closed) == {3}
    assert desk.machine.members.departures[-1].reason is Reason.REFUSED
    desk.contribute(2, 6.0)
    assert desk.machine.replica is not None
    assert desk.round == 1
    np.testing.assert_array_equal(desk.machine.replica.vector, desk.vector + 3)  # n is still 3


MESSAGES = {
    "a second hello": (lambda d: d.hello(1), MalformedError),
    "no hello": (lambda d: d.send(9, Ready(Position())), MalformedError),
    "an unknown message": (lambda d: d.send(1, Commit(1, 1, 1, None, 0)), MalformedError),  # type: ignore[arg-type]
    "an observer's contribution": (
        lambda d: (d.hello(9, observer=True), d.send(9, d.contribution())),
        WrongRoundError,
    ),
}


@pytest.mark.parametrize("what", MESSAGES)
def test_messages_out_of_place(what: str) -> None:
    act, error = MESSAGES[what]
    desk = Desk().start(1, 2)
    act(desk)
    assert desk.machine.refused == {error.__name__: 1}
    assert len(desk.closed) == 1


@pytest.mark.parametrize("bad", ["purpose", "total", "offset", "odd", "empty", "long", "nan"])
def test_an_initial_model_that_makes_no_sense(bad: str) -> None:
    desk = Desk(limits={"workers": 2})
    desk.hello(1)
    desk.hello(2)
    good = VectorChunk(Purpose.INITIAL_MODEL, 0, 8, desk.vector.tobytes())
    nan = np.full(8, np.nan, np.float32).tobytes()
    changes: dict[str, dict[str, Any]] = {
        "purpose": {"purpose": Purpose.ANCHOR},
        "total": {"total": 9},
        "offset": {"offset": 2},
        "odd": {"values": bytes(31)},
        "empty": {"values": b""},
        "long": {"values": bytes(36)},
        "nan": {"values": nan},
    }
    desk.send(1, replace(good, **changes[bad]))
    assert isinstance(desk.error(1), ProtocolError)
    assert desk.machine.phase is Phase.WAITING
    desk.hello(3)
    desk.give_model(2)
    assert desk.machine.phase is Phase.READYING


def test_replays_are_harmless_when_they_are_the_same(small_parts: None) -> None:
    desk = Desk(dimension=6).start(1, 2)
    first = desk.contribution(1.0)
    halves = [replace(first, values=first.values[:8]), replace(first, values=first.values[8:], offset=2)]
    for _ in range(3):
        for half in halves:
            desk.send(1, half)
    desk.send(2, desk.contribution(1.0))  # part 0 is answered
    for half in halves:
        desk.send(1, half)
    assert not desk.closed
    desk.send(1, desk.contribution(1.0, part=1))
    desk.send(1, desk.contribution(1.0, part=1))
    desk.send(2, desk.contribution(1.0, part=1))
    assert desk.round == 1
    assert desk.machine.replica is not None
    np.testing.assert_array_equal(desk.machine.replica.vector, desk.vector + 1)


def test_a_replay_with_other_bytes_is_refused(small_parts: None) -> None:
    desk = Desk(dimension=6).start(1, 2)
    desk.send(1, desk.contribution(1.0))
    desk.send(1, desk.contribution(2.0))
    assert isinstance(desk.error(1), MalformedError)
    assert "other bytes" in str(desk.error(1))
    desk.contribute(2)
    assert desk.machine.replica is not None
    np.testing.assert_array_equal(desk.machine.replica.vector, desk.vector + np.array([1, 1, 1, 0.5, 0.5, 0.5]))


def test_an_unfinished_part_is_forgotten_with_its_stream(small_parts: None) -> None:
    desk = Desk().start(1, 2)
    whole = desk.contribution(1.0)
    desk.send(1, replace(whole, values=whole.values[:4]))
    desk.hello(3, "w1", epoch=1, position=Position(1, 0))
    desk.ready(3)
    for message in [desk.contribution(1.0, part=p) for p in range(3)]:
        desk.send(3, message)  # from the beginning
    assert 3 not in desk.closed
    desk.contribute(2)
    assert desk.round == 1


def test_a_worker_raises_on_its_own_nonsense_before_sending() -> None:
    run = cluster_of(1)
    run.drain()
    worker = run.workers[0]
    worker.live[:] = np.nan
    worker.gather()
    with pytest.raises(NonFiniteError, match="nothing was sent"):
        run.hand_over(worker)
    assert worker.engine.ledger.sent == 0


# --- coming later, falling behind -----------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_a_joiner_is_caught_up_while_rounds_go_on(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if full:
        monkeypatch.setattr(plan_module, "MAX_PARTIAL_CATCH_UP", 0)
        monkeypatch.setattr(server_catchup, "STREAM_VALUES", 6)
    run = cluster_of(2, density=0.1, selection=SelectionKind.RANDOM, local_steps=1, rounds=30, seed=3)
    regular, sleeper = run.workers
    run.run(until=lambda: regular.merged_round >= 3)
    run.cut(sleeper)
    run.run(until=lambda: regular.merged_round >= 6)
    held = sleeper.engine.anchor.position.round
    run.connect(sleeper)
    run.deliver_up(sleeper)
    stream = sleeper.stream
    assert stream is not None
    told = next(m for m in stream.outbox if isinstance(m, CatchUp))
    assert told.full is full
    assert told.base_round == held
    # It sleeps on while values wait for it, and rounds go on in between.
    before = regular.merged_round
    run.run(until=lambda: (run.deliver_down(regular), regular.merged_round > before + 3)[1] or not stream.down)
    run.run()
    run.check_end()
    assert sleeper.engine.ledger.included > 3


def test_rounds_are_patched_into_a_stream_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_catchup, "STREAM_VALUES", 5)
    for commits in range(1, 9):
        run = Cluster(1, RunConfig(density=0.4, local_steps=1), statistics=7, seed=commits)
        run.connect_all()
        regular = run.workers[0]
        run.run(until=lambda worker=regular: worker.merged_round >= 2)
        joiner = run.add_worker("joiner", seed=99)
        run.connect(joiner)
        run.deliver_up(joiner)
        assert joiner.stream is not None
        for _ in range(commits):  # a few slices, a round, a few slices, a round …
            for _ in range(run.random.randrange(3)):
                run.transmit(joiner, 50)
            done = regular.merged_round
            while regular.merged_round == done:
                run.deliver_up(regular)
                run.deliver_down(regular)
                run.train(regular)
                run.hand_over(regular)
        run.drain(joiner)
        assert joiner.engine.anchor.position == run.machine.replica.position  # type: ignore[union-attr]
        assert len(joiner.engine.anchor.history.last(100)) >= commits
        run.check()


def test_an_update_that_waits_is_not_changed_by_later_rounds() -> None:
    run = cluster_of(2, density=1.0, local_steps=3)
    run.run(until=lambda: run.workers[0].merged_round >= 2)
    sleeper, regular = run.workers
    run.cut(sleeper)
    run.run(until=lambda: regular.merged_round >= 4)
    run.connect(sleeper)
    run.drain()
    update = sleeper.updates[0]
    kept = update.new_anchor.copy()
    for _ in range(3):
        regular.gather()
        run.hand_over(regular)
        run.drain()
        sleeper.open = None
    np.testing.assert_array_equal(update.new_anchor, kept)
    run.check()


def test_an_absence_longer_than_the_history_is_caught_up_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    run = cluster_of(2, density=0.05, selection=SelectionKind.RANDOM, local_steps=0, overlap_steps=1, rounds=400)
    sleeper, regular = run.workers
    run.run(until=lambda: sleeper.merged_round >= 2)
    run.cut(sleeper)
    run.run(until=lambda: regular.merged_round >= 270)
    run.connect(sleeper)
    run.deliver_up(sleeper)
    assert sleeper.stream is not None
    assert next(m for m in sleeper.stream.outbox if isinstance(m, CatchUp)).full
    run.drain(sleeper)
    run.check()


def test_an_interrupted_catch_up_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_catchup, "STREAM_VALUES", 5)
    monkeypatch.setattr(plan_module, "MAX_PARTIAL_CATCH_UP", 0)
    run = cluster_of(2, density=0.3, local_steps=1, rounds=20)
    sleeper, regular = run.workers
    run.run(until=lambda: sleeper.merged_round >= 2)
    for _ in range(6):
        run.cut(sleeper)
        there = regular.merged_round
        run.run(until=lambda there=there: regular.merged_round > there)
        run.connect(sleeper)
        run.deliver_up(sleeper)
        for _ in range(run.random.randrange(2, 9)):
            run.deliver_down(sleeper)
        run.check()
    run.run()
    run.check_end()


def backlog_desk(**limits: Any) -> Desk:
    return Desk(dimension=400, limits={"max_backlog_rounds": 2} | limits, config={"density": 0.1})


def test_who_cannot_keep_up_gets_values_instead_of_answers() -> None:
    run = Cluster(
        2,
        RunConfig(density=0.1, local_steps=0, overlap_steps=1, rounds=30),
        limits=ServerLimits(workers=2, lease_s=1e6, round_cap_s=1.0, max_backlog_rounds=2, start_grace_s=0.5),
        seed=4,
    )
    run.connect_all()
    regular, slow = run.workers
    run.run(until=lambda: slow.merged_round >= 1)
    slow.speed = slow.link = 0.0
    while regular.merged_round < 8:
        for act in run.deliver_up, run.deliver_down, run.train, run.hand_over:
            act(regular)
        run.tick(0.1)
    member = next(m for m in run.machine.members.by_peer.values() if m.name == "w1")
    assert member.state is MemberState.SUSPENDED
    assert not member.following
    assert slow.stream is not None
    rounds = [m.round for m in slow.stream.down if isinstance(m, Commit)]
    assert len(rounds) == 3  # and then no more
    joiner = run.add_worker("joiner", seed=2)  # takes a slot meanwhile: the roster changes
    run.connect(joiner)
    run.drain(joiner, regular)
    while regular.merged_round < 10:
        for act in run.deliver_up, run.deliver_down, run.train, run.hand_over:
            act(regular)
        run.tick(0.1)
    run.drain(slow)
    assert member.following
    assert slow.engine.anchor.position.round >= 10
    run.check()
    slow.speed = slow.link = 1.0
    run.run()
    run.check_end()
    assert any(u.round == 0 for u in slow.history) or slow.merged_round > 10


def test_a_stream_that_is_given_up_is_begun_again_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_catchup, "STREAM_VALUES", 5)
    run = Cluster(
        1,
        RunConfig(density=0.1, local_steps=0, overlap_steps=1, rounds=40, selection=SelectionKind.SWEEP),
        limits=ServerLimits(workers=1, lease_s=1e6, max_backlog_rounds=2),
    )
    run.connect_all()
    regular = run.workers[0]
    run.run(until=lambda: regular.merged_round >= 2)
    joiner = run.add_worker("joiner", seed=9)
    run.connect(joiner)
    run.deliver_up(joiner)
    run.transmit(joiner, 100)
    while regular.merged_round < 8:
        for act in run.deliver_up, run.deliver_down, run.train, run.hand_over:
            act(regular)
    member = next(m for m in run.machine.members.by_peer.values() if m.name == "joiner")
    assert not member.following
    run.drain(joiner)
    assert joiner.engine.anchor.position.round == 8
    run.check()
    run.run()
    run.check_end()


# --- replicas that diverge ------------------------------------------------------------------------------------


def one_round(run: Cluster) -> None:
    """Everybody who is asked contributes, and hears what came of it."""
    run.drain()
    for w in run.workers:
        while w.updates:
            w.merge()
        if w.open is not None and not w.open.contributed:
            w.step()
            w.gather()
            w.hand_over(run.book)
    run.drain()


def corrupt(worker: SimWorker) -> None:
    worker.engine.anchor.vector += np.float32(0.5)


def diverging() -> tuple[Cluster, SimWorker]:
    run = Cluster(2, RunConfig(density=0.5, local_steps=1), seed=1, booked=False)
    run.connect_all()
    one_round(run)
    one_round(run)
    return run, run.workers[0]


def test_a_replica_that_diverges_is_refreshed() -> None:
    run, victim = diverging()
    corrupt(victim)
    one_round(run)
    assert run.machine.replica is not None
    assert victim.engine.anchor.vector.tobytes() == run.machine.replica.vector.tobytes()
    assert victim.engine.anchor.digest == run.machine.replica.digest
    for _ in range(3):
        one_round(run)
    assert victim.engine.anchor.position == run.machine.replica.position
    corrupt(victim)  # once more, but not twice in a row
    one_round(run)
    one_round(run)
    assert victim.engine.anchor.vector.tobytes() == run.machine.replica.vector.tobytes()


def test_twice_in_a_row_is_the_end() -> None:
    run, victim = diverging()
    corrupt(victim)
    one_round(run)
    corrupt(victim)
    with pytest.raises(ReplicaDivergedError, match="again at round 4"):
        one_round(run)


@pytest.mark.parametrize("when", ["before the refresh is asked for", "before it has arrived"])
def test_a_refresh_that_is_cut_off_comes_with_the_next_stream(when: str) -> None:
    run, victim = diverging()
    corrupt(victim)
    other = run.workers[1]
    for w in run.workers:
        w.step()
        w.gather()
        w.hand_over(None)
    while victim.stream is not None and not any(isinstance(m, Refresh) for m in victim.stream.up):
        run.drain(other)
        run.deliver_up(victim) if len(victim.stream.up) else run.deliver_down(victim)
    if when == "before it has arrived":
        while victim.stream is not None and victim.stream.up:
            run.deliver_up(victim)
    run.cut(victim)
    run.connect(victim)
    run.deliver_up(victim)
    assert victim.stream is not None
    assert next(m for m in victim.stream.outbox if isinstance(m, CatchUp)).full
    for _ in range(3):
        one_round(run)
    assert run.machine.replica is not None
    assert victim.engine.anchor.vector.tobytes() == run.machine.replica.vector.tobytes()


def test_the_ledger_survives_a_refresh() -> None:
    run = Cluster(2, RunConfig(density=0.5, local_steps=1, rounds=8), seed=1)
    run.connect_all()
    run.run(until=lambda: run.workers[0].merged_round >= 2)
    victim = run.workers[0]
    victim.engine.anchor.digest ^= 1  # the arrays are right, so all checks apply, but it believes that they are not
    check, run.check_worker = run.check_worker, lambda worker: None  # type: ignore[method-assign]
    run.run(until=lambda: any(isinstance(e, fx.Notice) and "diverged" in e.text for e in run.events))
    run.run(until=lambda: victim.engine.anchor.digest == run.machine.replica.digest)  # type: ignore[union-attr]
    run.check_worker = check  # type: ignore[method-assign]
    run.run()
    run.check_end()


# --- observers ------------------------------------------------------------------------------------------------


def test_observers_receive_and_are_never_counted() -> None:
    run = cluster_of(2, density=0.3, rounds=8)
    early = run.add_worker("early", observer=True)
    run.connect(early)
    run.run(until=lambda: run.workers[0].merged_round >= 3)
    late = run.add_worker("late", observer=True)
    run.connect(late)
    assert run.machine.round is not None
    run.run(until=lambda: all(w.out for w in run.workers[:2]))
    run.check_end()
    for observer in early, late:
        run.drain(observer)
        assert observer.engine.anchor.position == run.machine.replica.position  # type: ignore[union-attr]
        assert observer.engine.ledger.sent == 0
        assert observer.ended
        run.check_worker(observer)
    assert all(c.members == 2 for c in run.events if isinstance(c, fx.RoundCommitted))


def test_observers_alone_start_nothing_and_end_nothing() -> None:
    desk = Desk()
    desk.hello(1, observer=True)
    desk.tick(1000.0)
    assert desk.machine.phase is Phase.WAITING
    desk.start(2)
    desk.drop(2)
    desk.stop()
    assert desk.machine.phase is Phase.FINISHED


# --- the end --------------------------------------------------------------------------------------------------


def test_the_last_round_brings_everything_in() -> None:
    run = cluster_of(3, density=0.1, value_type=ValueType.INT8)
    run.run()
    run.check_end()
    plans = [e.plan for e in run.events if isinstance(e, fx.RoundCommitted)]
    assert [p.kind for p in plans] == [RoundKind.TRAIN] * 6 + [RoundKind.FINAL]
    assert plans[-1].selection is SelectionKind.ALL
    assert plans[-1].value_type is ValueType.FLOAT32
    start = run.workers[0].engine.anchor
    assert len({w.live.tobytes() for w in run.workers}) == 1
    np.testing.assert_array_equal(run.workers[0].live, start.vector)
    assert run.machine.residual is not None
    assert not run.machine.residual.any()


def test_without_a_final_round_the_models_stay_as_they_are() -> None:
    run = cluster_of(3, density=0.1, final_round=FinalRound.NONE)
    run.run()
    run.check_end()
    assert len({w.live.tobytes() for w in run.workers}) == 3
    assert run.machine.replica is not None
    assert run.machine.replica.position.round == 6


def test_a_run_ends_when_its_time_is_over() -> None:
    desk = Desk(config={"duration_s": 100.0, "final_round": FinalRound.NONE}).start(1)
    t0 = desk.now
    desk.now = t0 + 99
    desk.contribute(1)
    desk.now = t0 + 101
    desk.contribute(1)
    assert desk.machine.phase is Phase.FINISHED
    assert desk.last(1, Commit).plan.kind is RoundKind.END  # type: ignore[union-attr]
    assert desk.machine.elapsed_s(t0 + 500) == 101
    assert desk.logged(fx.RunFinished)[-1].why == "the duration is over"


@pytest.mark.parametrize("by", ["a worker", "the operator"])
def test_a_run_ends_when_it_is_told_to(by: str) -> None:
    desk = Desk().start(1, 2)
    if by == "a worker":
        desk.send(2, StopRun("max steps"))
    else:
        desk.stop("max steps")
    for peer in 1, 2:
        desk.contribute(peer)
    plan = desk.last(1, Commit).plan  # type: ignore[union-attr]
    assert plan.kind is RoundKind.FINAL
    for peer in 1, 2:
        desk.contribute(peer)
    assert desk.machine.phase is Phase.FINISHED
    assert desk.logged(fx.RunFinished)[-1].why == "max steps"


def test_who_comes_after_the_end_gets_the_final_model() -> None:
    run = cluster_of(2, density=0.2, rounds=4)
    run.run()
    late = run.add_worker("late", seed=77)
    run.connect(late)
    run.drain(late)
    assert late.finished
    np.testing.assert_array_equal(late.live, run.machine.replica.vector)  # type: ignore[union-attr]
    run.check_end()


def test_who_missed_the_final_round_holds_the_consensus_too() -> None:
    run = cluster_of(3, density=0.2, rounds=4)
    run.run(until=lambda: run.workers[0].engine.plan is not None and run.workers[0].engine.plan.round == 4)
    lost = run.workers[2]
    run.cut(lost)
    run.run(until=lambda: run.finished)
    run.connect(lost)
    run.run()
    run.check_end()


def test_evaluation_rounds_are_announced() -> None:
    run = cluster_of(2, rounds=6, evaluate_every=3)
    run.run()
    kinds = [e.plan.kind for e in run.events if isinstance(e, fx.RoundCommitted)]
    assert [int(k) for k in kinds] == [0, 0, 1, 0, 0, 1, 3]


def test_shutting_down_commits_nothing_and_says_goodbye() -> None:
    desk = Desk().start(1, 2, 3)
    for peer in 1, 2:
        desk.contribute(peer)
    desk._carry(desk.machine.shut_down(desk.now))
    assert desk.round == 0
    for peer in 1, 2, 3:
        goodbye = desk.closed[peer].goodbye
        assert goodbye is not None
        assert goodbye.reason is Reason.SERVER_STOPPED
    desk.hello(4)
    assert isinstance(desk.error(4), WrongRoundError)


# --- the worker's half, against a server that breaks rules ----------------------------------------------------


def joined() -> tuple[WorkerEngine, Cluster]:
    run = cluster_of(1, density=0.5)
    run.drain()
    return run.workers[0].engine, run


def test_a_worker_refuses_what_makes_no_sense() -> None:
    engine, _ = joined()
    with pytest.raises(MalformedError, match="not open"):
        engine.received(Answer(7, 0, 0, b""))
    with pytest.raises(MalformedError, match="part 3"):
        engine.received(Answer(1, 3, 0, b""))
    with pytest.raises(MalformedError, match="was next"):
        engine.received(Answer(1, 0, 4, bytes(4)))
    with pytest.raises(MalformedError, match="was next"):
        engine.received(Answer(1, 0, 0, b""))
    plan = engine.plan
    assert plan is not None
    with pytest.raises(MalformedError, match="before all of it"):
        engine.received(Commit(1, 1, 1, plan, 0))
    with pytest.raises(MalformedError, match="not open"):
        engine.received(Commit(2, 1, 1, plan, 0))
    with pytest.raises(MalformedError, match="not announced"):
        engine.received(VectorChunk(Purpose.CATCH_UP, 0, 40, bytes(160)))
    with pytest.raises(MalformedError, match="slot"):
        engine.received(SlotTaken(1 << 30, b""))
    with pytest.raises(ProtocolError):
        engine.received(OpenRound(replace(plan, count=1000), 0.0))


def test_a_worker_takes_nothing_before_the_welcome() -> None:
    fresh = WorkerEngine("w", incarnation("w"), layout(8), np.zeros(8, np.float32), np.zeros(0, np.float32))
    engine, run = joined()
    assert engine.plan is not None
    state = run.machine.replica
    assert state is not None
    catch_up = CatchUp(state.position, 0, state.lineage, 0, (), True, {}, (), 0)
    for message in OpenRound(engine.plan, 0.0), catch_up, SendState(Purpose.ANCHOR):
        with pytest.raises(MalformedError, match="welcome"):
            fresh.received(message)


def test_a_worker_refuses_another_run_and_an_earlier_epoch() -> None:
    engine, _ = joined()
    welcome = engine.welcome
    assert welcome is not None
    with pytest.raises(ProtocolError, match="another run"):
        engine.received(replace(welcome, run_id=b"x" * 16))
    engine.received(replace(welcome, epoch=3))
    with pytest.raises(WrongRoundError, match="epoch 2"):
        engine.received(replace(welcome, epoch=2))
    engine.received(replace(welcome, epoch=2, recovering=True))


def test_values_of_a_catch_up_are_checked() -> None:
    engine, run = joined()
    state = run.machine.replica
    assert state is not None
    engine.received(CatchUp(Position(1, 9), 5, state.lineage, 0, (), True, {}, (), 1))
    good = VectorChunk(Purpose.CATCH_UP, 0, 40, bytes(40))
    for changes in (
        {"offset": 4},
        {"total": 41},
        {"values": bytes(39)},
        {"values": b""},
        {"values": bytes(164)},
        {"purpose": Purpose.INITIAL_MODEL},
    ):
        with pytest.raises(MalformedError):
            engine.received(replace(good, **changes))  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError):
        engine.received(replace(good, values=np.full(4, np.inf, np.float32).tobytes()))
    with pytest.raises(MalformedError, match="partial"):
        engine.received(CatchUp(Position(1, 9), 5, state.lineage, 0, (engine_plan(),), False, {}, (), 1))


def engine_plan() -> Any:
    return plan_module.RoundPlan(3, RoundKind.TRAIN, SelectionKind.ALL, 40, ValueType.FLOAT32)


def test_a_snapshot_belongs_to_the_announcement_that_it_followed() -> None:
    """The values are taken in another thread; by the time they are handed over the round may be open on top of
    another state, with which they must not be compared."""
    run = cluster_of(2, density=1.0)
    run.drain()
    worker = run.workers[0]
    worker.step()
    worker.gather()
    run.cut(worker)
    run.connect(worker)
    run.drain()
    run.hand_over(worker)
    assert worker.engine.ledger.sent == 0
    assert worker.cycle is not None
    assert worker.cycle.in_flight is None
    run.run()
    run.check_end()


def test_a_snapshot_that_comes_too_late_or_twice() -> None:
    run = cluster_of(1, density=1.0)
    run.drain()
    worker = run.workers[0]
    opened = worker.open
    assert opened is not None
    values = worker.live[opened.indices]
    engine = worker.engine
    assert engine.snapshot(2, values, worker.statistics, 1, 0) is None
    first = engine.snapshot(1, values, worker.statistics, 1, 0)
    assert first
    assert engine.snapshot(1, values + 1, worker.statistics, 1, 0) == []
    engine.disconnected()
    assert engine.snapshot(1, values, worker.statistics, 1, 0) is None


def test_updates_are_numbered_by_round_and_settle_what_was_sent() -> None:
    run = cluster_of(1, density=1.0)
    worker = run.workers[0]
    worker.keep_history = True
    run.run()
    rounds = [u for u in worker.history if u.round]
    assert [u.round for u in rounds] == list(range(1, 8))
    assert all(isinstance(u, Update) and u.settles == u.round and u.sent is not None for u in rounds)
