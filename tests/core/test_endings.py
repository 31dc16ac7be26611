"""How a run ends: by rounds, time, order, and for those who were not there."""

from __future__ import annotations

import numpy as np
import pytest
from cluster import cluster_of
from desk import Desk

from loscar_core import effects as fx
from loscar_core.config import FinalRound
from loscar_core.errors import WrongRoundError
from loscar_core.messages import Commit, Reason, StopRun
from loscar_core.plan import RoundKind
from loscar_core.selection import SelectionKind
from loscar_core.server_state import Phase
from loscar_core.values import ValueType


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
