"""Dense rounds before checkpoints, and how long they may take."""

from __future__ import annotations

import numpy as np
import pytest
from desk import Desk

from loscar_core.plan import RoundKind
from loscar_core.selection import SelectionKind


def closed(desk: Desk, rounds: int) -> list[RoundKind]:
    """The kinds of the next so many rounds, to each of which both workers contribute."""
    kinds = []
    for _ in range(rounds):
        assert desk.machine.round is not None
        kinds.append(desk.machine.round.plan.kind)
        for peer in (1, 2):
            desk.contribute(peer)
        for peer in (1, 2):
            desk.drained(peer)
    return kinds


def sparse(share: float, **limits: float) -> Desk:
    config = {"selection": SelectionKind.SWEEP, "density": 0.25}
    return Desk(config=config, limits={"consolidation_share": share, **limits}).start(1, 2)


@pytest.mark.parametrize(("share", "every"), [(0.5, 5), (0.2, 17)])
def test_dense_rounds_take_their_share_and_no_more(share: float, every: int) -> None:
    kinds = closed(sparse(share), 3 * every)
    expected = [RoundKind.TRAIN] * (every - 1) + [RoundKind.CONSOLIDATION]
    assert kinds == expected * 3
    values = {RoundKind.TRAIN: 2, RoundKind.CONSOLIDATION: 8}
    sent = [values[kind] for kind in kinds]
    assert sent[every - 1] / sum(sent[:every]) == share


def test_without_a_share_there_are_none() -> None:
    assert set(closed(sparse(0.0), 60)) == {RoundKind.TRAIN}


def test_a_dense_round_makes_the_consensus_whole() -> None:
    desk = sparse(0.5)
    closed(desk, 4)
    assert desk.machine.replica is not None
    before = desk.machine.replica.vector.copy()
    assert closed(desk, 1) == [RoundKind.CONSOLIDATION]
    assert np.all(desk.machine.replica.vector != before)


def test_a_dense_round_may_take_as_much_longer_as_it_is_larger() -> None:
    """A worker on a slow link, whose usual rounds take five seconds, is waited for."""
    desk = sparse(0.5, round_cap_s=1e4)
    for _ in range(4):
        desk.contribute(1)
        desk.tick(desk.now + 5)
        desk.contribute(2)
        for peer in (1, 2):
            desk.drained(peer)
    assert desk.machine.round is not None
    assert desk.machine.round.plan.kind is RoundKind.CONSOLIDATION
    opened, usual = desk.now, 4 * 5.0
    desk.contribute(1)
    desk.tick(opened + 4 * usual - 0.1)
    assert desk.round == 4
    desk.tick(opened + 4 * usual)
    assert desk.round == 5
    assert desk.member(2).missed == 1
