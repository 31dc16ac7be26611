"""Names, slots, leases, observers: who is in a run, and in whose place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cluster import cluster_of
from desk import Desk, incarnation

from loscar_core import effects as fx
from loscar_core.errors import ConfigError, RefusedError, SupersededError
from loscar_core.messages import (
    Commit,
    Contribution,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Leave,
    Reason,
    RosterChange,
    SlotTaken,
    Welcome,
)
from loscar_core.server_state import Phase


def test_a_worker_gets_the_smallest_free_slot() -> None:
    desk = Desk()
    desk.hello(1)
    desk.hello(2, slot=5)
    desk.hello(3)
    desk.hello(4, observer=True)
    assert [desk.last(p, Welcome).slot for p in (1, 2, 3, 4)] == [0, 5, 1, -1]  # type: ignore[union-attr]
    desk.hello(5, slot=5)
    assert isinstance(desk.error(5), RefusedError)
    assert "w2" in str(desk.error(5))
    for slot in -1, 1 << 20:
        desk.hello(6, slot=slot)
        assert isinstance(desk.error(6), ConfigError)


def test_a_slot_is_kept_for_its_name_for_a_while() -> None:
    desk = Desk(limits={"slot_reserve_s": 100.0})
    desk.hello(1)
    desk.hello(2)
    desk.drop(1)
    desk.now = 99.0
    desk.hello(3)
    assert desk.member(3).slot == 2
    desk.hello(4, slot=0)
    assert isinstance(desk.error(4), RefusedError)
    desk.hello(5, "w1", incarnation=incarnation("another w1"))
    assert desk.member(5).slot == 0
    desk.drop(5)
    desk.now = 200.0
    desk.hello(6, slot=0)  # nobody has joined since the reservation ran out
    assert desk.member(6).slot == 0


def test_the_slot_of_a_worker_that_comes_back_is_a_wish() -> None:
    desk = Desk()
    desk.hello(1)
    desk.hello(2, slot=0, epoch=3)
    assert desk.member(2).slot == 1
    desk.hello(3, slot=0)
    assert isinstance(desk.error(3), RefusedError)


def test_the_newest_incarnation_of_a_name_wins() -> None:
    desk = Desk().start(1, 2)
    desk.contribute(1, 7.0)
    desk.hello(3, "w1", incarnation=incarnation("new"))
    assert isinstance(desk.error(1), SupersededError)
    assert desk.machine.members.departures[-1].reason is Reason.SUPERSEDED
    assert desk.member(3).slot == 0
    # The old one's contribution is the old one's: the new one is told so, and not counted in this round.
    assert desk.last(3, Welcome).roster[0] == incarnation("w1")  # type: ignore[union-attr]
    desk.send(3, desk.contribution(100.0))
    desk.contribute(2, 1.0)
    assert desk.round == 1
    state = desk.machine.replica
    assert state is not None
    np.testing.assert_array_equal(state.vector, desk.vector + 4)
    assert state.inclusion.of(incarnation("w1")).round == 1
    assert state.inclusion.of(incarnation("new")).round == 0
    order = [type(m) for m in desk.sent[2]]
    assert order[-2:] == [Commit, RosterChange]
    assert desk.last(2, RosterChange) == RosterChange((SlotTaken(0, incarnation("new")),))
    # And the old one stays out.
    desk.hello(4, "w1")
    assert isinstance(desk.error(4), SupersededError)
    assert 3 not in desk.closed


def test_a_new_incarnation_does_not_take_the_old_one_s_contribution_for_its_own() -> None:
    run = cluster_of(2, density=1.0, local_steps=3)
    run.drain()
    old, other = run.workers
    old.step()
    old.gather()
    run.hand_over(old)
    run.drain(old)
    new = run.crash(old)
    run.connect(new)
    run.drain()
    assert new.engine.slot == 0
    new.step()
    new.gather()
    run.hand_over(new)
    other.gather()
    run.hand_over(other)
    run.drain()
    assert run.machine.replica is not None
    assert run.machine.replica.inclusion.of(old.engine.incarnation).round == 1
    assert (new.engine.ledger.included, new.engine.ledger.returned) == (0, 1)
    run.check()


def test_a_worker_whose_slot_has_changed_knows_its_contribution_by_the_roster() -> None:
    run = cluster_of(2, density=1.0, local_steps=3)
    run.machine.limits = replace(run.limits, slot_reserve_s=0.0)
    run.machine.members._limits = run.machine.limits
    run.drain()
    mover, other = run.workers
    mover.step()
    mover.gather()
    run.hand_over(mover)
    run.drain(mover)
    run.cut(mover)
    run.tick(1.0)
    taker = run.add_worker("taker", slot=0, seed=1)
    run.connect(taker)
    run.deliver_up(taker)
    run.connect(mover)
    run.drain()
    assert (taker.engine.slot, mover.engine.slot) == (0, 2)
    other.gather()
    run.hand_over(other)
    run.drain()
    assert mover.engine.ledger.included == 1
    run.check()
    run.run()
    run.check_end()


def test_silence_ends_a_membership_and_any_message_renews_it() -> None:
    desk = Desk(limits={"lease_s": 15.0}).start(1, 2)
    t0 = desk.now
    for member in 1, 2:
        desk.send(member, Heartbeat(7, 0))
    assert desk.last(1, HeartbeatReply) == HeartbeatReply(7)
    desk.tick(t0 + 10)
    desk.contribute(1)
    assert desk.machine.next_wakeup() == pytest.approx(t0 + 15)
    desk.tick(t0 + 15)
    assert list(desk.machine.members.by_peer) == [1]
    gone = desk.closed[2].goodbye
    assert gone is not None
    assert gone.reason is Reason.LEASE_EXPIRED
    assert desk.round == 1  # nobody else was waited for
    desk.tick(t0 + 25)
    assert not desk.machine.members.by_peer


def test_every_departure_has_a_reason() -> None:
    desk = Desk(limits={"lease_s": 15.0}).start(1, 2, 3, 4)
    desk.drop(1)
    desk.send(2, Leave(Reason.DIVERGED, "bad memory"))
    desk.send(3, Contribution(9, 1, 0, 0, b"", 0))
    desk.tick(100.0)
    reasons = [d.departure.reason for d in desk.logged(fx.MemberGone)]
    assert reasons == [Reason.STREAM_CLOSED, Reason.DIVERGED, Reason.REFUSED, Reason.LEASE_EXPIRED]
    assert desk.closed[2].goodbye == Goodbye(Reason.DIVERGED, "bad memory")
    assert desk.machine.members.departure_counts[Reason.DIVERGED] == 1


def test_a_full_server_refuses() -> None:
    desk = Desk(limits={"max_members": 2})
    desk.hello(1)
    desk.hello(2, observer=True)
    desk.hello(3)
    assert isinstance(desk.error(3), RefusedError)
    desk.hello(4, "w1", incarnation=incarnation("again"))  # in the place of its predecessor
    assert 4 not in desk.closed


def test_observers_receive_and_are_never_counted() -> None:
    run = cluster_of(2, density=0.3, rounds=8)
    early = run.add_worker("early", observer=True)
    run.connect(early)
    run.run(until=lambda: run.workers[0].merged_round >= 3)
    late = run.add_worker("late", observer=True)
    run.connect(late)
    assert run.machine.round is not None
    run.run(until=lambda: all(w.out for w in run.workers[:2]))
    run.check_end()
    for observer in early, late:
        run.drain(observer)
        assert observer.engine.anchor.position == run.machine.replica.position  # type: ignore[union-attr]
        assert observer.engine.ledger.sent == 0
        assert observer.ended
        run.check_worker(observer)
    assert all(c.members == 2 for c in run.events if isinstance(c, fx.RoundCommitted))


def test_observers_alone_start_nothing_and_end_nothing() -> None:
    desk = Desk()
    desk.hello(1, observer=True)
    desk.tick(1000.0)
    assert desk.machine.phase is Phase.WAITING
    desk.start(2)
    desk.drop(2)
    desk.stop()
    assert desk.machine.phase is Phase.FINISHED
