"""Deadlines, suspension, quorum: whom a round waits for, and what happens without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from desk import Desk, incarnation

from loscar_core import effects as fx
from loscar_core.config import ServerLimits
from loscar_core.messages import Commit, OpenRound
from loscar_core.server_members import Member, MemberState
from loscar_core.state import Position


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


def test_one_that_is_back_in_its_round_holds_it_up_until_its_own_deadline() -> None:
    """Its deadline passes before those of the others that the server had been waiting for without it."""
    desk = Desk(limits={"round_cap_s": 100.0}).start(1, 2, 3, 4)
    for _ in range(3):
        # Three fast cycles for all but the fourth, which is thrice as slow.
        opened = desk.now
        desk.tick(opened + 20.0)
        for peer in (1, 2, 3):
            desk.contribute(peer)
        desk.tick(opened + 60.0)
        desk.contribute(4)
    assert desk.round == 3
    opened = desk.now
    early, late = (desk.member(peer).deadline_s(desk.machine.limits) for peer in (3, 4))
    assert early < late
    desk.drop(3)
    desk.contribute(1)
    desk.contribute(2)
    assert desk.machine.next_wakeup() == pytest.approx(opened + late)
    desk.hello(5, "w3", epoch=1, position=desk.position)
    desk.ready(5)
    assert desk.member(5).state is MemberState.ACTIVE
    # It has no cycles yet on this stream: it may take as long as the cap.
    desk.contribute(4)
    assert desk.round == 3
    assert desk.machine.next_wakeup() == pytest.approx(opened + 100.0)
    desk.tick(opened + 100.0)
    assert desk.round == 4


@pytest.mark.parametrize("backwards", [False, True])
def test_the_work_of_a_round_grows_with_its_members_and_not_with_their_square(
    backwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which they contributed before, nobody is looked at for every contribution of the others."""
    count, rounds = 60, 8
    desk = Desk(limits={"workers": count})
    peers = range(1, count + 1)
    desk.start(*peers)
    looked = 0
    original = Member.deadline_s

    def counted(member: Member, limits: ServerLimits, stretch: float = 1.0) -> float:
        nonlocal looked
        looked += 1
        return original(member, limits, stretch)

    monkeypatch.setattr(Member, "deadline_s", counted)
    for _ in range(rounds):
        before = desk.round
        for turn, peer in enumerate(reversed(peers) if backwards else peers):
            desk.now += 0.001 * (turn + 1)
            desk.contribute(peer)
        assert desk.round == before + 1
    assert looked < 20 * count * rounds
