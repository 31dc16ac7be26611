"""Members that ask for more than they take, and names that never end: what the server holds stays bounded."""

from __future__ import annotations

import numpy as np
import pytest
from desk import Desk, incarnation, layout

from loscar_core import effects as fx
from loscar_core.errors import RefusedError, WrongModelError
from loscar_core.layout import require_same
from loscar_core.messages import CatchUp, Leave, Ready, Reason, Refresh, Welcome
from loscar_core.selection import SelectionKind
from loscar_core.server_members import SPARE_SLOTS


def test_slots_of_names_that_never_come_back_are_given_to_others() -> None:
    """Bitmaps and rosters go by slots; with ten thousand names they would be longer than what they speak of."""
    desk = Desk().start(1, 2)
    for i in range(1000):
        desk.hello(10 + i, f"passer-by {i}")
        desk.send(10 + i, Leave(Reason.LEFT))
    slots = [desk.last(10 + i, Welcome).slot for i in range(1000)]  # type: ignore[union-attr]
    assert max(slots) <= 2 + 3 + SPARE_SLOTS + 1
    desk.hello(5000, "last")
    welcome = desk.last(5000, Welcome)
    assert welcome is not None
    assert len(welcome.roster) <= 2 + 3 + SPARE_SLOTS + 1


def test_the_slots_of_a_whole_run_stay_reserved_when_nearly_everybody_is_away() -> None:
    peers = list(range(1, 41))
    desk = Desk().start(*peers)
    before = {desk.member(p).name: desk.member(p).slot for p in peers}
    for peer in peers[1:]:
        desk.drop(peer)
    for peer in reversed(peers[1:]):
        desk.hello(100 + peer, f"w{peer}", incarnation=incarnation(f"again {peer}"))
        assert desk.member(100 + peer).slot == before[f"w{peer}"]


def test_a_member_that_asks_again_and_again_without_reading_is_sent_everything_once() -> None:
    desk = Desk().start(1, 2)
    desk.contribute(1)
    desk.contribute(2)
    desk.drained(2)
    before = len(desk.sent[2])
    for _ in range(1000):
        desk.send(2, Refresh(1))
        desk.send(2, Ready(desk.position))
    assert len(desk.sent[2]) - before < 10
    assert len(desk.logged(fx.Notice)) < 10
    desk.drained(2)
    [_, announced] = desk.got(2, CatchUp)[-2:]
    assert announced.full
    assert 2 not in desk.closed
    desk.send(2, Ready(desk.position))
    desk.contribute(1)
    desk.contribute(2)
    desk.contribute(1)
    desk.contribute(2)
    assert desk.round == 3


def test_a_model_that_does_not_fit_into_the_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's claim must not end as an error of ours."""
    desk = Desk()
    desk.hello(1)
    desk.tick(10.0)

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("loscar_core.server_catchup.np.empty", no_memory)
    desk.give_model(1)
    monkeypatch.undo()
    assert isinstance(desk.error(1), RefusedError)
    assert "8 coordinates" in str(desk.error(1))
    desk.start(2)


def test_refusals_are_told_with_their_stream() -> None:
    desk = Desk(config={"selection": SelectionKind.ALL}).start(1, 2)
    desk.send(2, desk.contribution(values=np.full(8, np.inf, np.float32).tobytes()))
    desk.hello(3, layout=layout(9))
    assert [(r.peer, type(r.error).__name__) for r in desk.logged(fx.Refused)] == [
        (2, "NonFiniteError"),
        (3, "WrongModelError"),
    ]


def test_a_wrong_model_s_names_cannot_move_a_terminal_s_cursor() -> None:
    with pytest.raises(WrongModelError, match=r"w\?\[2J float32\[8\]"):
        require_same(layout(8), layout(8, name="w\x1b[2J"))
