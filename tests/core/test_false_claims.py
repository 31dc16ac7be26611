"""One peer that says what is not true: it neither ends nor replaces nor splits a run that others are in."""

from __future__ import annotations

from typing import Any

import pytest
from desk import Desk
from test_begun_anew import after, claimed

from loscar_core.effects import SteppedDown
from loscar_core.errors import RefusedError, WrongRoundError
from loscar_core.messages import Purpose, SendState, Welcome
from loscar_core.plan import HistoryEntry, RoundKind, RoundPlan
from loscar_core.selection import SelectionKind
from loscar_core.server_machine import MAX_EPOCH_LEAD
from loscar_core.server_state import Phase
from loscar_core.state import Lineage, Position
from loscar_core.values import ValueType


def claim(position: Position, members: int) -> dict[str, Any]:
    """What the hello of somebody says who claims a state that nobody else has seen."""

    def entry(round_: int) -> HistoryEntry:
        plan = RoundPlan(round_, RoundKind.TRAIN, SelectionKind.ALL, 8, ValueType.FLOAT32)
        return HistoryEntry(Position(position.epoch, round_), plan, 777 + round_)

    return {
        "epoch": position.epoch,
        "position": position,
        "digest": 777 + position.round,
        "lineage": Lineage(((position.epoch, 1),)),
        "recent": tuple(entry(r) for r in range(max(1, position.round - 15), position.round + 1)),
        "members": members,
    }


@pytest.mark.parametrize("members", [1, 8])
@pytest.mark.parametrize("position", [Position(1, 12), Position(99, 5), Position(99, 1000)])
def test_a_claim_does_not_replace_a_young_run(position: Position, members: int) -> None:
    honest = range(1, 9)
    desk = after(10, *honest, value=1.0)
    desk.hello(50, "liar", **claim(position, members))
    assert isinstance(desk.error(50), (RefusedError, WrongRoundError))
    assert not desk.closed.keys() & set(honest)
    for peer in honest:
        desk.contribute(peer)
    assert desk.round == 11


def test_as_many_as_are_here_replace_it() -> None:
    """Two began the run anew; of the three who hold what it was, the first is refused until the next is there."""
    held = claimed(after(5, 1, 2, 3, value=1.0))
    desk = after(9, 8, 9, value=2.0)
    desk.hello(11, "w1", **held)
    assert isinstance(desk.error(11), RefusedError)
    assert desk.machine.phase is Phase.RUNNING
    desk.hello(12, "w2", **held)
    assert desk.machine.phase is Phase.RECOVERING
    for peer, name in ((21, "w1"), (23, "w3")):
        desk.hello(peer, name, **held)
    assert any(desk.last(peer, SendState) == SendState(Purpose.ANCHOR) for peer in (12, 21, 23))


@pytest.mark.parametrize("epoch", [2, MAX_EPOCH_LEAD, 10**9, 1 << 62])
def test_one_voice_does_not_retire_a_server_whose_workers_are_away_for_a_moment(epoch: int) -> None:
    desk = after(3, 1, 2, 3, value=1.0)
    held = claimed(desk)
    desk.tick(desk.now + 100)
    for peer in (1, 2, 3):
        desk.drop(peer)
    desk.hello(9, "stranger", epoch=epoch)
    assert isinstance(desk.error(9), WrongRoundError)
    assert desk.logged(SteppedDown) == []
    for peer in (1, 2, 3):
        desk.hello(10 + peer, f"w{peer}", **held)
        assert desk.error(10 + peer) is None


def test_a_majority_of_its_workers_retires_it_and_so_does_one_that_insists() -> None:
    for sayers, wait_s in ((("w1", "w2"), 0.0), (("w1", "w1"), 60.0)):
        desk = after(3, 1, 2, 3, value=1.0)
        desk.tick(desk.now + 100)
        for peer in (1, 2, 3):
            desk.drop(peer)
        for peer, name in enumerate(sayers, start=11):
            assert desk.logged(SteppedDown) == []
            desk.hello(peer, name, epoch=2)
            desk.tick(desk.now + wait_s)
        assert len(desk.logged(SteppedDown)) == 1


def test_an_epoch_beyond_all_others_is_refused_before_a_run_begins() -> None:
    desk = Desk()
    desk.hello(9, "stranger", epoch=1 << 61)
    assert isinstance(desk.error(9), WrongRoundError)
    desk.start(1, 2)
    assert desk.got(1, Welcome)[-1].epoch == 1
