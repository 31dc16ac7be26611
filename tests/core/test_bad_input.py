"""What the server refuses, and that nothing of it has an effect on the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cluster import cluster_of
from desk import RUN, Desk, layout

from loscar_core.errors import (
    ConfigError,
    LoscarError,
    MalformedError,
    NonFiniteError,
    ProtocolError,
    RefusedError,
    VersionMismatchError,
    WrongModelError,
    WrongRoundError,
    WrongRunError,
    WrongSelectionError,
)
from loscar_core.layout import Layout
from loscar_core.messages import Commit, Purpose, Ready, Reason, VectorChunk
from loscar_core.selection import SelectionKind
from loscar_core.server_state import Phase
from loscar_core.state import Position

HELLOS: dict[str, tuple[dict[str, Any], type[LoscarError], str]] = {
    "version": ({"protocol_version": 99}, VersionMismatchError, "protocol 99"),
    "run": ({"run_id": b"x" * 16}, WrongRunError, RUN.hex()),
    "model": ({"layout": layout(9)}, WrongModelError, "w float32[8]"),
    "statistics": ({"layout": layout(8, 1)}, WrongModelError, "mean"),
    "frozen": ({"layout": Layout(layout(8).parameters, (), 5)}, WrongModelError, "frozen"),
    "incarnation": ({"incarnation": b"short"}, MalformedError, "5 bytes"),
    "no name": ({"name": ""}, ConfigError, "name"),
    "odd name": ({"name": "a\nb"}, ConfigError, "name"),
    "long name": ({"name": "a" * 201}, ConfigError, "name"),
    "epoch": ({"epoch": 2, "position": Position(2, 1)}, WrongRoundError, "this server is in epoch 1"),
}


@pytest.mark.parametrize("what", HELLOS)
def test_a_hello_that_is_refused_changes_nothing(what: str) -> None:
    changes, error, text = HELLOS[what]
    desk = Desk(limits={"round_cap_s": 1e6}).start(1, 2)
    desk.tick(desk.now + desk.machine.limits.recover_after_s)  # too late to give way to another state
    desk.contribute(1)
    desk.contribute(2)
    desk.contribute(1)
    desk.hello(3, **changes)
    assert type(desk.error(3)) is error
    assert text in str(desk.error(3))
    assert desk.machine.refused == {error.__name__: 1}
    desk.contribute(2)
    assert desk.round == 2
    assert list(desk.machine.members.by_peer) == [1, 2]


def test_models_that_are_too_large_are_refused() -> None:
    desk = Desk(limits={"max_dimension": 100}, config={"selection": SelectionKind.SWEEP, "coordinates": 10})
    desk.hello(1, layout=layout(101))
    assert isinstance(desk.error(1), RefusedError)
    desk.hello(2, layout=layout(90, 11))
    assert isinstance(desk.error(2), RefusedError)
    desk.hello(3, layout=layout(9))
    assert isinstance(desk.error(3), ConfigError)
    desk.hello(4, layout=layout(90, 10))
    assert 4 not in desk.closed


def bad_values(value: float) -> bytes:
    values = np.zeros(8, np.float32)
    values[3] = value
    return values.tobytes()


CONTRIBUTIONS: dict[str, tuple[dict[str, Any], type[LoscarError]]] = {
    "later epoch": ({"epoch": 2}, WrongRoundError),
    "later round": ({"round": 2}, WrongRoundError),
    "selection": ({"checksum": 1}, WrongSelectionError),
    "part": ({"part": 1}, MalformedError),
    "offset": ({"offset": 1}, MalformedError),
    "far offset": ({"offset": 1 << 40}, MalformedError),
    "too many": ({"values": bytes(36)}, MalformedError),
    "none": ({"values": b""}, MalformedError),
    "half a value": ({"values": bytes(30)}, MalformedError),
    "NaN": ({"values": bad_values(np.nan)}, NonFiniteError),
    "infinity": ({"values": bad_values(-np.inf)}, NonFiniteError),
    "huge": ({"values": bad_values(-1e31)}, MalformedError),
}


@pytest.mark.parametrize("what", CONTRIBUTIONS)
def test_a_contribution_that_is_refused_changes_nothing_but_its_stream(what: str) -> None:
    changes, error = CONTRIBUTIONS[what]
    desk = Desk().start(1, 2, 3)
    desk.contribute(1, 3.0)
    desk.send(3, replace(desk.contribution(5.0), **changes))
    assert type(desk.error(3)) is error
    assert str(desk.error(3))
    assert desk.machine.refused == {error.__name__: 1}
    assert set(desk.closed) == {3}
    assert desk.machine.members.departures[-1].reason is Reason.REFUSED
    desk.contribute(2, 6.0)
    assert desk.machine.replica is not None
    assert desk.round == 1
    np.testing.assert_array_equal(desk.machine.replica.vector, desk.vector + 3)  # n is still 3


MESSAGES = {
    "a second hello": (lambda d: d.hello(1), MalformedError),
    "no hello": (lambda d: d.send(9, Ready(Position())), MalformedError),
    "an unknown message": (lambda d: d.send(1, Commit(1, 1, 1, None, 0)), MalformedError),  # type: ignore[arg-type]
    "an observer's contribution": (
        lambda d: (d.hello(9, observer=True), d.send(9, d.contribution())),
        WrongRoundError,
    ),
}


@pytest.mark.parametrize("what", MESSAGES)
def test_messages_out_of_place(what: str) -> None:
    act, error = MESSAGES[what]
    desk = Desk().start(1, 2)
    act(desk)
    assert desk.machine.refused == {error.__name__: 1}
    assert len(desk.closed) == 1


@pytest.mark.parametrize("bad", ["purpose", "total", "offset", "odd", "empty", "long", "nan"])
def test_an_initial_model_that_makes_no_sense(bad: str) -> None:
    desk = Desk(limits={"workers": 2})
    desk.hello(1)
    desk.hello(2)
    good = VectorChunk(Purpose.INITIAL_MODEL, 0, 8, desk.vector.tobytes())
    nan = np.full(8, np.nan, np.float32).tobytes()
    changes: dict[str, dict[str, Any]] = {
        "purpose": {"purpose": Purpose.ANCHOR},
        "total": {"total": 9},
        "offset": {"offset": 2},
        "odd": {"values": bytes(31)},
        "empty": {"values": b""},
        "long": {"values": bytes(36)},
        "nan": {"values": nan},
    }
    desk.send(1, replace(good, **changes[bad]))
    assert isinstance(desk.error(1), ProtocolError)
    assert desk.machine.phase is Phase.WAITING
    desk.hello(3)
    desk.give_model(2)
    assert desk.machine.phase is Phase.READYING


def test_replays_are_harmless_when_they_are_the_same(small_parts: None) -> None:
    desk = Desk(dimension=6).start(1, 2)
    first = desk.contribution(1.0)
    halves = [replace(first, values=first.values[:8]), replace(first, values=first.values[8:], offset=2)]
    for _ in range(3):
        for half in halves:
            desk.send(1, half)
    desk.send(2, desk.contribution(1.0))  # part 0 is answered
    for half in halves:
        desk.send(1, half)
    assert not desk.closed
    desk.send(1, desk.contribution(1.0, part=1))
    desk.send(1, desk.contribution(1.0, part=1))
    desk.send(2, desk.contribution(1.0, part=1))
    assert desk.round == 1
    assert desk.machine.replica is not None
    np.testing.assert_array_equal(desk.machine.replica.vector, desk.vector + 1)


def test_a_replay_with_other_bytes_is_refused(small_parts: None) -> None:
    desk = Desk(dimension=6).start(1, 2)
    desk.send(1, desk.contribution(1.0))
    desk.send(1, desk.contribution(2.0))
    assert isinstance(desk.error(1), MalformedError)
    assert "other bytes" in str(desk.error(1))
    desk.contribute(2)
    assert desk.machine.replica is not None
    np.testing.assert_array_equal(desk.machine.replica.vector, desk.vector + np.array([1, 1, 1, 0.5, 0.5, 0.5]))


def test_an_unfinished_part_is_forgotten_with_its_stream(small_parts: None) -> None:
    desk = Desk().start(1, 2)
    whole = desk.contribution(1.0)
    desk.send(1, replace(whole, values=whole.values[:4]))
    desk.hello(3, "w1", epoch=1, position=Position(1, 0))
    desk.ready(3)
    for message in [desk.contribution(1.0, part=p) for p in range(3)]:
        desk.send(3, message)  # from the beginning
    assert 3 not in desk.closed
    desk.contribute(2)
    assert desk.round == 1


def test_a_worker_raises_on_its_own_nonsense_before_sending() -> None:
    run = cluster_of(1)
    run.drain()
    worker = run.workers[0]
    worker.live[:] = np.nan
    worker.gather()
    with pytest.raises(NonFiniteError, match="nothing was sent"):
        run.hand_over(worker)
    assert worker.engine.ledger.sent == 0
