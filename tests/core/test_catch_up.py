"""Coming later, falling behind: members are brought to the state by value while rounds go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chaos import Chaos
from cluster import Cluster, cluster_of
from desk import Desk

from loscar_core import plan as plan_module
from loscar_core import server_catchup, server_followers, server_sequence
from loscar_core.config import RunConfig, ServerLimits
from loscar_core.messages import CatchUp, Commit, VectorChunk
from loscar_core.selection import SelectionKind
from loscar_core.server_members import MemberState


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


@pytest.mark.parametrize("bytes_a_round", [14_000, 40_000, 400_000])
def test_a_newcomer_on_a_slow_link_gets_in(bytes_a_round: int) -> None:
    """A usual message of the catch-up would keep its link busy for up to twenty rounds, each of which adds 8 kB."""
    desk = Desk(dimension=200_000, config={"density": 0.01, "selection": SelectionKind.SWEEP}).start(1, 2)
    for peer in (1, 2):
        desk.contribute(peer)
    desk.hello(3, "late")
    read, budget = 0, 0
    while not desk.member(3).following or desk.member(3).stream is not None or read < len(desk.sent[3]):
        for peer in (1, 2):
            desk.contribute(peer)
        for peer in (1, 2):
            desk.drained(peer)
        assert desk.round < 1000, "it does not get in"
        budget += bytes_a_round
        while read < len(desk.sent[3]):
            size = len(getattr(desk.sent[3][read], "values", b""))
            if size > budget:
                break
            read, budget = read + 1, budget - size
            if read == len(desk.sent[3]):
                budget = 0
                desk.drained(3)
    desk.ready(3)
    for peer in (1, 2):
        desk.contribute(peer)
    assert desk.member(3).state is MemberState.ACTIVE


def streamed(run: Cluster, name: str) -> list[VectorChunk | CatchUp]:
    """Everything of catch-ups that a worker was sent on its present stream and has not read."""
    worker = next(w for w in run.workers if w.name == name)
    assert worker.stream is not None
    queued = [*worker.stream.wire, *worker.stream.outbox]
    return [m for m in queued if isinstance(m, (CatchUp, VectorChunk))]


@pytest.mark.parametrize("statistics", [0, 3])
@pytest.mark.parametrize("chunks", [1, 3, 7])
def test_an_interrupted_catch_up_goes_on_where_it_was(
    chunks: int, statistics: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds are closed before the break and after it: what they changed of the values that are there comes first."""
    monkeypatch.setattr(server_catchup, "STREAM_VALUES", 5)
    run = Cluster(
        2,
        RunConfig(seed=3, density=0.1, local_steps=1, overlap_steps=1, rounds=200, selection=SelectionKind.RANDOM),
        dimension=40,
        statistics=statistics,
        limits=ServerLimits(workers=1, lease_s=1e6, round_cap_s=1e6, start_grace_s=0.5),
    )
    regular, joiner = run.workers
    run.connect(regular)
    run.run(until=lambda: regular.merged_round >= 3)

    def rounds(count: int) -> None:
        goal = regular.merged_round + count
        while regular.merged_round < goal:
            for act in (run.deliver_up, run.deliver_down, run.train, run.hand_over):
                act(regular)
            run.pass_time(0.001)

    def read(count: int) -> None:
        while count:
            run.transmit(joiner)
            assert joiner.stream is not None
            count -= isinstance(joiner.stream.wire[0], VectorChunk)
            run.deliver_down(joiner)

    run.connect(joiner)
    run.deliver_up(joiner)
    read(chunks)
    rounds(2)
    run.cut(joiner)
    rounds(2)
    run.connect(joiner)
    run.deliver_up(joiner)
    announced, *values = streamed(run, "w1")
    assert isinstance(announced, CatchUp)
    assert announced.full
    assert announced.resume >= 5 * chunks
    assert len(announced.plans) in (2, 3, 4)
    offsets = [v.offset for v in values if isinstance(v, VectorChunk) and v.total == 40 + statistics]
    assert offsets[0] == announced.resume
    run.drain(joiner)
    assert joiner.engine.anchor.position == run.machine.replica.position  # type: ignore[union-attr]
    np.testing.assert_array_equal(joiner.engine.anchor.vector, run.machine.replica.vector)  # type: ignore[union-attr]
    run.check()
    run.run()
    run.check_end()


@pytest.mark.parametrize("kill", [0.0, 0.001])
def test_interrupted_catch_ups_in_random_schedules(kill: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of many small messages, that break or fall behind at any of them, while rounds go on and servers die."""
    monkeypatch.setattr(server_catchup, "STREAM_VALUES", 4)
    monkeypatch.setattr(server_sequence, "MIN_SLICE_VALUES", 2)
    chaos = Chaos(cut=0.01, cuts=30, kill=kill, joiners=3, backlog=3, density=(0.05, 0.1), rounds=20)
    resumed = 0
    plain = server_followers.resume

    def counted(*args: Any) -> Any:
        nonlocal resumed
        found = plain(*args)
        resumed += found[0].resume > 0
        return found

    monkeypatch.setattr(server_followers, "resume", counted)
    for seed in range(12):
        chaos.run(seed)
    assert resumed >= 5
