"""Random schedules without a server's death: everything adds up whatever happens."""

from __future__ import annotations

import pytest
from chaos import Chaos
from cluster import cluster_of

from loscar_core.config import ServerLimits
from loscar_core.selection import SelectionKind
from loscar_core.values import ValueType

SCHEDULES = {
    "quiet": Chaos(),
    "cuts": Chaos(cut=0.006),
    "crashes": Chaos(cut=0.003, crash=0.003),
    "deadlines": Chaos(cut=0.004, deadlines=True, slow=True, backlog=2, observers=1),
    "joiners": Chaos(cut=0.003, crash=0.001, joiners=3, observers=1),
    "bfloat16": Chaos(cut=0.004, deadlines=True, value_type=ValueType.BFLOAT16),
    "int8": Chaos(cut=0.004, crash=0.001, value_type=ValueType.INT8),
    "topk": Chaos(cut=0.004, crash=0.001, deadlines=True, slow=True, joiners=1, selections=(SelectionKind.TOPK,)),
    "topk and int8": Chaos(
        cut=0.004, backlog=2, observers=1, selections=(SelectionKind.TOPK,), value_type=ValueType.INT8
    ),
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
    while run.machine.round.contributors(1) == {0}:
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
