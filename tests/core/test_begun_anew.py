"""A fresh worker was first at a restarted server and began the run anew; then come those who hold the run itself."""

from __future__ import annotations

from typing import Any

import pytest
from desk import Desk

from loscar_core.messages import Goodbye, Purpose, Reason, SendState
from loscar_core.server_catchup import RECENT_SENT
from loscar_core.server_state import Phase


def claimed(desk: Desk) -> dict[str, Any]:
    """What the hello of a worker says that has followed a server until now."""
    state = desk.machine.replica
    assert state is not None
    return {
        "epoch": desk.machine.epoch,
        "position": state.position,
        "digest": state.digest,
        "lineage": state.lineage,
        "recent": state.history.last(RECENT_SENT),
        "members": state.members,
        "run_id": desk.machine.run_id,
    }


def after(rounds: int, *peers: int, value: float) -> Desk:
    """A run whose members have closed some rounds."""
    desk = Desk().start(*peers)
    for _ in range(rounds):
        for peer in peers:
            desk.contribute(peer, value)
        for peer in peers:
            desk.drained(peer)
    assert desk.round == rounds
    return desk


@pytest.mark.parametrize("rounds", [3, 40])
@pytest.mark.parametrize("first_back", [1, 2])
def test_the_run_itself_is_taken_up_again(rounds: int, first_back: int) -> None:
    """However much further the one that was begun anew has come, and whoever of its two workers comes first."""
    held = claimed(after(rounds, 1, 2, value=1.0))
    desk = after(60, 9, value=2.0)
    own = claimed(desk)
    desk.hello(first_back, **held)
    assert desk.machine.phase is Phase.RECOVERING
    assert desk.closed[9].goodbye == Goodbye(Reason.STEPPED_DOWN, "another state of this run has turned up")
    desk.hello(19, "w9", **own)
    desk.hello(3 - first_back, **held)
    desk.tick(desk.now + desk.machine.limits.recover_after_s)
    asked = [peer for peer in (1, 2, 19) if desk.last(peer, SendState) == SendState(Purpose.ANCHOR)]
    assert asked in ([1], [2])


def test_what_was_begun_anew_is_all_there_is_when_the_others_leave_again() -> None:
    held = claimed(after(3, 1, 2, value=1.0))
    desk = after(5, 9, value=2.0)
    own = claimed(desk)
    desk.hello(1, **held)
    desk.drop(1)
    desk.hello(19, "w9", **own)
    desk.tick(desk.now + desk.machine.limits.recover_after_s)
    assert desk.last(19, SendState) == SendState(Purpose.ANCHOR)
