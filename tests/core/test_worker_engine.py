"""The worker's half against a server that breaks rules, and the snapshots of its own training thread."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cluster import Cluster, cluster_of
from desk import incarnation, layout

from loscar_core import plan as plan_module
from loscar_core.errors import MalformedError, NonFiniteError, ProtocolError, WrongRoundError
from loscar_core.messages import (
    Answer,
    CatchUp,
    Commit,
    OpenRound,
    Purpose,
    RosterChange,
    SendState,
    SlotTaken,
    VectorChunk,
)
from loscar_core.plan import RoundKind
from loscar_core.selection import SelectionKind
from loscar_core.state import Position
from loscar_core.values import ValueType
from loscar_core.worker_effects import Update
from loscar_core.worker_engine import WorkerEngine


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
        engine.received(RosterChange((SlotTaken(1 << 30, b""),)))
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
    plan = engine.plan
    assert plan is not None
    engine.received(replace(welcome, epoch=3))
    engine.received(replace(welcome, epoch=2))  # the other one has opened no round
    engine.received(replace(welcome, epoch=3))
    engine.received(OpenRound(plan, 0.0))
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
