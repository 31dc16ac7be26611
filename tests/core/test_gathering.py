"""One-off averages: who is waited for, what is averaged, and that everybody gets the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loscar_core.errors import MalformedError, NonFiniteError, RefusedError
from loscar_core.gathering import Answer, Gathering, Gatherings, mean_of

A, B, C, D = (bytes([n]) * 16 for n in range(1, 5))
SLOT = {A: 0, B: 1, C: 2, D: 3}


def vector(*values: float, dtype: str = "float32") -> np.ndarray:
    return np.array(values, dtype)


def enter(
    desk: Gatherings,
    who: bytes,
    *,
    label: str = "x",
    present: set[bytes] | None = None,
    told: tuple[bytes, ...] = (),
    settled: bool = False,
    size: int = 1,
    dtype: str = "float32",
    at_least: int = 1,
    now: float = 0.0,
) -> Gathering:
    return desk.enter(
        label,
        who,
        size,
        dtype,
        present={A, B, C} if present is None else present,
        told=told,
        settled=settled,
        wait_s=10.0,
        at_least=at_least,
        now=now,
    )


def offer(desk: Gatherings, who: bytes, value: float, **options: object) -> Gathering:
    found = enter(desk, who, **options)  # type: ignore[arg-type]
    found.arrived(who)
    found.add(who, SLOT[who], vector(value))
    return found


def look(desk: Gatherings, present: set[bytes], now: float) -> list[Gathering]:
    """As a server does: what it is time for is computed."""
    ready = desk.look(present, now)
    for found in ready:
        found.conclude(found.average(), now)
    assert not desk.look(present, now)
    return ready


def test_all_are_waited_for_and_summed_by_slot_whoever_comes_first() -> None:
    orders = ((A, B, C), (C, A, B), (B, C, A))
    values = {A: 1e8, B: 1.0, C: -1e8}
    for order in orders:
        desk = Gatherings(1000)
        for who in order:
            assert not look(desk, {A, B, C}, 1.0)
            found = offer(desk, who, values[who])
        assert look(desk, {A, B, C}, 1.0) == [found]
        assert found.answer is not None
        assert found.answer.offered == (A, B, C)
        assert found.answer.values.dtype == np.float32
        np.testing.assert_array_equal(found.answer.values, np.float32(1 / 3))


def test_who_has_left_is_not_waited_for_but_what_it_gave_counts() -> None:
    desk = Gatherings(1000)
    found = offer(desk, A, 3.0)
    offer(desk, B, 5.0)
    assert not look(desk, {A, B, C}, 1.0)
    assert look(desk, {A}, 1.0) == [found]  # B and C have gone
    assert found.answer is not None
    assert found.answer.values == 4.0


def test_a_newcomer_is_not_waited_for() -> None:
    desk = Gatherings(1000)
    found = offer(desk, A, 3.0, present={A, B})
    offer(desk, B, 5.0, present={A, B, D})
    assert look(desk, {A, B, D}, 1.0) == [found]


def test_when_the_time_is_over_those_who_came_are_averaged_and_who_comes_later_gets_that() -> None:
    desk = Gatherings(1000)
    found = offer(desk, A, 3.0)
    assert not look(desk, {A, B, C}, 9.9)
    assert look(desk, {A, B, C}, 10.0) == [found]
    late = enter(desk, B, now=11.0)
    assert late is found
    assert not late.wants(B)
    late.add(B, 1, vector(100.0))  # on its way when the time was over
    assert late.answer is not None
    assert late.answer.values == 3.0
    for who in (A, B):
        late.take(who)
        assert not look(desk, {A, B, C}, 12.0)
        assert late in desk  # C may come yet
    look(desk, {A, B, C}, 20.0)
    assert late not in desk
    with pytest.raises(RefusedError, match="'x' is over"):
        enter(desk, C, now=20.0)


def test_too_few_are_no_average() -> None:
    desk = Gatherings(1000)
    found = offer(desk, A, 3.0, at_least=3)
    offer(desk, B, 3.0, at_least=3)
    assert not look(desk, {A, B}, 1.0)  # a third may join
    assert look(desk, {A, B}, 10.0) == [found]
    assert isinstance(found.error, RefusedError)
    assert "2 of at least 3 vectors came in 10 s" in str(found.error)
    assert found not in desk


def test_a_vector_that_is_said_again_counts_once() -> None:
    desk = Gatherings(1000)
    found = offer(desk, A, 3.0, present={A, B})
    assert not enter(desk, A, present={A, B}).wants(A)
    found.add(A, 0, vector(7.0))
    offer(desk, B, 5.0, present={A, B})
    look(desk, {A, B}, 1.0)
    assert found.answer is not None
    assert found.answer.values == 4.0


def test_a_broken_call_leaves_room_and_may_be_repeated_at_once() -> None:
    desk = Gatherings(5 * 4)
    found = enter(desk, A, size=1)
    assert desk.held_bytes == 8
    assert enter(desk, A, size=1) is found
    assert found.wants(A)
    assert desk.held_bytes == 12
    found.arrived(A)
    found.add(A, 0, vector(1.0))
    found.arrived(A)
    assert desk.held_bytes == 8
    enter(desk, A, size=1)  # for the answer only: nothing more is held
    assert desk.held_bytes == 8


def test_what_does_not_fit_is_refused_before_it_is_held() -> None:
    desk = Gatherings(16)
    with pytest.raises(RefusedError, match="no room for 12 more bytes"):
        enter(desk, A, size=3)
    assert len(desk) == 0
    found = enter(desk, A, size=1)
    enter(desk, B, size=1)
    enter(desk, C, size=1)
    with pytest.raises(RefusedError):
        enter(desk, D, size=1)
    with pytest.raises(RefusedError):
        enter(desk, A, label="y", size=1)
    found.arrived(A)
    assert enter(desk, D, size=1) is found
    assert not found.missing({D})


@pytest.mark.parametrize(("size", "dtype"), [(2, "float32"), (1, "float64")])
def test_another_kind_of_vector_is_refused(size: int, dtype: str) -> None:
    desk = Gatherings(1000)
    enter(desk, A)
    with pytest.raises(MalformedError, match="is of 1 values of float32, not"):
        enter(desk, B, size=size, dtype=dtype)


def test_who_has_the_answer_gives_it_to_a_new_server_which_waits_for_those_without() -> None:
    old = Gatherings(1000)
    for who, value in ((A, 1.0), (B, 2.0), (C, 6.0)):
        found = offer(old, who, value)
    look(old, {A, B, C}, 1.0)
    answer = found.answer
    assert answer is not None
    new = Gatherings(1000)
    # C comes first and has no answer; the new server knows nobody else yet, but C was told who is waited for.
    found = offer(new, C, 6.0, present={C}, told=(A, B, C))
    assert not look(new, {C}, 1.0)
    enter(new, A, present={A, C}, told=(A, B, C))
    assert found.wants(A)
    found.settle(Answer(answer.values, answer.offered), 2.0)
    found.settle(Answer(vector(100.0), (A,)), 2.0)  # the first word counts
    assert found.answer is not None
    np.testing.assert_array_equal(found.answer.values, answer.values)
    found.take(A)
    assert not look(new, {A, C}, 3.0)
    found.take(C)
    assert found in new  # B may still come
    look(new, {A, B, C}, 3.0)
    look(new, {A, C}, 4.0)  # it came, and left
    assert found not in new


def test_a_label_is_averaged_once() -> None:
    """Whoever asks for more of it while others have yet to take the answer is told so, unless it settles."""
    desk = Gatherings(1000)
    found = offer(desk, A, 1.0, present={A, B})
    offer(desk, B, 3.0, present={A, B})
    look(desk, {A, B}, 1.0)
    found.take(A)
    with pytest.raises(RefusedError, match="has had the average 'x' already"):
        enter(desk, A)
    assert enter(desk, A, settled=True) is found
    assert enter(desk, B) is found


def test_who_has_left_is_not_waited_for_again_because_a_call_is_repeated() -> None:
    desk = Gatherings(1000)
    found = offer(desk, A, 1.0, present={A, B, C})
    assert not look(desk, {A, B, C}, 1.0)
    enter(desk, A, present={A, B}, told=(A, B, C))  # C has left meanwhile
    offer(desk, B, 3.0, present={A, B})
    assert look(desk, {A, B}, 1.0) == [found]


def test_what_nobody_is_at_any_more_is_forgotten() -> None:
    desk = Gatherings(1000)
    found = enter(desk, A)
    found.arrived(A)
    desk.leave(found, 5.0)
    assert not look(desk, {A, B, C}, 9.0)
    assert found in desk
    look(desk, {A, B, C}, 65.0)
    assert found not in desk
    assert enter(desk, A, now=65.0) is not found  # its label was never averaged


def test_there_are_not_any_number_of_them() -> None:
    desk = Gatherings(1 << 20)
    for i in range(256):
        enter(desk, A, label=str(i))
    with pytest.raises(RefusedError, match="256 others are under way already"):
        enter(desk, A, label="more")


def test_what_is_settled_while_it_is_computed_stays_settled() -> None:
    desk = Gatherings(1000)
    found = offer(desk, A, 1.0, present={A})
    assert desk.look({A}, 1.0) == [found]
    assert not found.wants(B)
    assert not desk.look({A}, 1.0)  # once only
    found.settle(Answer(vector(5.0), (B,)), 1.0)
    found.conclude(found.average(), 1.0)
    assert found.answer is not None
    assert found.answer.values == 5.0
    assert found.error is None


def test_a_mean_beyond_the_dtype_is_no_mean() -> None:
    with pytest.raises(NonFiniteError, match="beyond float32"):
        mean_of([vector(3e38), vector(3e38), vector(np.inf)])
    np.testing.assert_array_equal(mean_of([vector(3e38), vector(3e38)]), vector(3e38))
    desk = Gatherings(1000)
    found = enter(desk, A, present={A})
    found.add(A, 0, vector(math.inf))
    look(desk, {A}, 1.0)
    assert isinstance(found.error, NonFiniteError)


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_mean_is_the_exact_one_rounded(rows: list[list[float]]) -> None:
    vectors = [vector(*row) for row in rows]
    exact = np.mean(np.array(rows, np.float64), axis=0)
    np.testing.assert_allclose(mean_of(vectors), exact, rtol=1e-6, atol=1e-9)
    wide = [v.astype(np.float64) for v in vectors]
    assert mean_of(wide).dtype == np.float64


class Schedule(RuleBasedStateMachine):
    """Workers call and break off, servers die and are found again one by one: nobody ever gets another
    answer than the rest. Once a server has come back it waits until all are there."""

    def __init__(self) -> None:
        super().__init__()
        self.connected = {A, B, C}
        self.desk = Gatherings(10_000)
        self.told: dict[bytes, tuple[bytes, ...]] = {}
        self.answers: dict[bytes, Answer] = {}

    @rule(who=st.sampled_from([A, B, C]))
    def connects(self, who: bytes) -> None:
        self.connected.add(who)
        look(self.desk, self.connected, 1.0)

    @precondition(lambda self: len(self.connected) == 3)
    @rule(data=st.data(), arrives=st.booleans(), hears=st.booleans())
    def calls(self, data: st.DataObject, arrives: bool, hears: bool) -> None:
        who = data.draw(st.sampled_from(sorted(self.connected)))
        settled = self.answers.get(who)
        try:
            found = enter(
                self.desk,
                who,
                present=self.connected,
                told=self.told.get(who, ()),
                settled=settled is not None,
                now=1.0,
            )
        except RefusedError:
            assert self.answers.keys() == {A, B, C}
            return
        self.told[who] = tuple(sorted(found.awaited))
        if found.wants(who) and arrives:
            if settled is not None:
                found.settle(settled, 1.0)
            else:
                found.add(who, SLOT[who], vector(SLOT[who] + 1.0))
        look(self.desk, self.connected, 1.0)
        if found.answer is not None and hears:
            self.answers.setdefault(who, found.answer)
            found.take(who)
            look(self.desk, self.connected, 1.0)

    @rule()
    def server_dies(self) -> None:
        self.desk = Gatherings(10_000)
        self.connected = set()

    @invariant()
    def all_have_the_same_answer(self) -> None:
        for answer in self.answers.values():
            assert answer.values == 2.0
            assert answer.offered == (A, B, C)


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
