"""Fewer than a majority come back to a server that lost its memory."""

from __future__ import annotations

import numpy as np
import pytest
from cluster import Cluster
from desk import Desk

from loscar_core.config import RunConfig, ServerLimits
from loscar_core.effects import MemberGone
from loscar_core.messages import Leave, Reason
from loscar_core.server_state import Phase

LIMITS = ServerLimits(workers=5, lease_s=1e6, round_cap_s=1e6, recover_after_s=30.0, start_grace_s=0.5, clone_below=0)


def after_a_death(*, other_servers: bool) -> Cluster:
    """Five workers have closed some rounds; the server dies, and two of them come back, again and again for a minute;
    the others never do."""
    run = Cluster(5, RunConfig(seed=5, density=0.5, local_steps=1), limits=LIMITS, seed=3)
    for worker in run.workers:
        worker.engine.other_servers = other_servers
    run.connect_all()
    run.run(until=lambda: min(w.merged_round for w in run.workers) >= 3)
    run.kill_server()
    run.start_server()
    for worker in run.workers[2:]:
        worker.crashed = True
    for _ in range(65):
        come_back(run)
        run.drain()
        run.tick(1.0)
    return run


def come_back(run: Cluster) -> None:
    for worker in run.workers[:2]:
        if worker.stream is None:
            run.connect(worker)


def test_workers_that_know_one_server_only_go_on_after_the_wait() -> None:
    run = after_a_death(other_servers=False)
    assert run.machine.phase is Phase.RUNNING
    assert run.machine.epoch == 2
    before = run.machine.round
    assert before is not None
    run.run(until=lambda: run.machine.round is not None and run.machine.round.plan.round > before.plan.round + 2)
    assert run.machine.round.members == 2


@pytest.mark.parametrize("joins", [0, 1])
def test_workers_that_may_have_been_cut_off_wait_for_a_majority(joins: int) -> None:
    run = after_a_death(other_servers=True)
    assert run.machine.phase is Phase.RECOVERING
    gone = [e.departure for e in run.events if isinstance(e, MemberGone)]
    sent_away = [d.name for d in gone if d.reason is Reason.CUT_OFF]
    assert sent_away == ["w0", "w1", "w0", "w1"], "twice in a minute both look for the others elsewhere"
    for number in range(joins):
        run.connect(run.add_worker(f"new{number}"))
    for _ in range(28):
        come_back(run)
        run.drain()
        run.tick(1.0)
    assert (run.machine.phase is Phase.RUNNING) == bool(joins)


def test_who_is_left_when_most_have_vanished_looks_elsewhere_once() -> None:
    """Perhaps it is this server that was cut off, and the others go on at a standby."""
    desk = Desk().start(1, 2, 3)
    for peer in (1, 2, 3):
        desk.contribute(peer)
    desk.drop(2)
    desk.drop(3)
    desk.contribute(1)
    assert desk.round == 2
    assert desk.closed[1].goodbye is not None
    assert desk.closed[1].goodbye.reason is Reason.CUT_OFF
    desk.drop(1)
    state = desk.machine.replica
    assert state is not None
    desk.hello(4, "w1", epoch=1, position=state.position, digest=state.digest, lineage=state.lineage)
    desk.ready(4)
    desk.contribute(4)
    desk.contribute(4)
    assert 4 not in desk.closed
    assert desk.round == 4


def test_those_who_leave_politely_are_not_looked_for() -> None:
    desk = Desk().start(1, 2, 3)
    for peer in (1, 2, 3):
        desk.contribute(peer)
    for peer in (2, 3):
        desk.send(peer, Leave(Reason.LEFT))
        desk.drop(peer)
    desk.contribute(1)
    desk.contribute(1)
    assert 1 not in desk.closed
    assert desk.round == 3


@pytest.mark.parametrize("rounds", [8, 60])
def test_what_a_minority_did_alone_goes_into_the_state_that_turns_up(rounds: int) -> None:
    """One of three went on from a round before the last one; when the others are back, none of what it contributed is
    lost, however much it had forgotten by then, and none counts twice."""
    limits = ServerLimits(lease_s=1e6, round_cap_s=1e6, recover_after_s=30.0, start_grace_s=0.5)
    run = Cluster(3, RunConfig(seed=5, rounds=None, density=1.0, local_steps=1), limits=limits)
    for worker in run.workers:
        worker.engine.other_servers = False
    run.connect_all()
    run.run(until=lambda: all(w.merged_round >= 5 for w in run.workers))
    alone, *others = run.workers
    alone.link = 0.0
    run.run(until=lambda: all(w.engine.anchor.position > alone.engine.anchor.position for w in others))
    run.kill_server()
    run.start_server()
    alone.link = 1.0
    run.connect(alone)
    for seconds in (31.0, 1.0, 40.0):
        run.tick(seconds)
        run.drain(alone)
    assert run.machine.epoch == 2
    while alone.engine.anchor.position.round < rounds:
        for act in (run.deliver_up, run.deliver_down, run.train, run.hand_over):
            act(alone)
        run.pass_time(0.001)
    for _ in range(20):
        for worker in run.workers:
            if worker.stream is None:
                run.connect(worker)
        run.drain()
        run.tick(1.0)
    state = run.machine.replica
    assert state is not None
    assert state.lineage.spans == ((1, 1),)
    assert alone.engine.ledger.returned >= rounds - 7
    while alone.updates:
        alone.merge()
    run.check_worker(alone)
    assert float(np.abs(alone.live - alone.engine.anchor.vector).max()) > 1.0
