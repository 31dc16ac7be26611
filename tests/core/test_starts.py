"""How a run starts: barriers, the first model, donors that leave."""

from __future__ import annotations

import pytest
from cluster import Cluster
from desk import Desk, layout

from loscar_core.config import RunConfig, ServerLimits
from loscar_core.errors import ConfigError, WrongModelError
from loscar_core.messages import Goodbye, OpenRound, Purpose, Reason, SendState, VectorChunk, Welcome
from loscar_core.plan import RoundKind
from loscar_core.server_state import Phase


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
    assert isinstance(desk.error(1), ConfigError)
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
