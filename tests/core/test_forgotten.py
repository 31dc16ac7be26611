"""The inclusion table has a bound: what becomes of workers that come back after it has forgotten them."""

from __future__ import annotations

import numpy as np
import pytest
from cluster import Cluster
from desk import Desk
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_worker import SimWorker

from loscar_core import state as state_module
from loscar_core.config import FinalRound, RunConfig, ServerLimits
from loscar_core.errors import ConfigError
from loscar_core.selection import SelectionKind
from loscar_core.state import FORGOTTEN, Included, InclusionTable, bitmap


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3, unique=True), min_size=1, max_size=120))
def test_it_never_says_no_of_what_it_has_forgotten(rounds: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_module, "LEAST_TABLE_ENTRIES", 6)
        table = InclusionTable()
        last: dict[int, int] = {}
        for round_, members in enumerate(rounds, start=1):
            roster = [name(m) for m in members]
            table.record(round_, [bitmap(range(len(members)), len(members))], roster)
            last |= dict.fromkeys(members, round_)
            if round_ % 7 == 0:
                table = InclusionTable(table.entries())  # as it travels
        assert len(table.entries()) <= max(6, len(rounds[-1]) * 2) + 32 * 3
        for member, round_ in last.items():
            entry = table.of(name(member))
            assert entry.round == round_ or (entry.round == 0 and not table.knows(name(member), round_))
        for member in rounds[-1]:
            assert table.of(name(member)).round == len(rounds), "who is there is never forgotten"


def test_it_is_bounded_whatever_comes_and_goes() -> None:
    table = InclusionTable()
    for round_ in range(1, 5001):
        table.record(round_, [b"\x03"], [name(round_), name(10**6)])
    entries = table.entries()
    assert len(entries) <= state_module.LEAST_TABLE_ENTRIES
    assert entries[name(10**6)].round == 5000
    assert entries[FORGOTTEN].round == 5000 - (len(entries) - 2)
    assert table.knows(name(77), 4999)
    assert not table.knows(name(77), 77)


def test_a_table_that_has_forgotten_nobody_knows_everything() -> None:
    table = InclusionTable({name(1): Included(5, 1)})
    assert table.knows(name(1), 3)
    assert table.knows(name(2), 1)


def test_nobody_has_the_incarnation_of_the_forgotten() -> None:
    desk = Desk()
    desk.hello(1, incarnation=FORGOTTEN)
    assert isinstance(desk.error(1), ConfigError)


# --- coming back --------------------------------------------------------------------------------------------


def cluster_of(n: int) -> Cluster:
    config = RunConfig(density=1.0, selection=SelectionKind.ALL, local_steps=2, final_round=FinalRound.NONE)
    limits = ServerLimits(
        workers=n, lease_s=1e6, round_cap_s=1e6, recover_after_s=1e9, start_grace_s=0.5, clone_below=0
    )
    cluster = Cluster(n, config, limits=limits, booked=False)
    cluster.connect_all()
    return cluster


def round_of(cluster: Cluster) -> int:
    state = cluster.machine.replica
    return 0 if state is None else state.position.round


def forget(cluster: Cluster, worker: SimWorker, last: int) -> None:
    """As if many others had come and gone since."""
    state = cluster.machine.replica
    assert state is not None
    entries = state.inclusion.entries()
    entries.pop(worker.engine.incarnation, None)
    state.inclusion = InclusionTable({FORGOTTEN: Included(last), **entries})


def bring_back(cluster: Cluster, worker: SimWorker) -> None:
    cluster.connect(worker)
    goal = round_of(cluster)
    while worker.engine.anchor.position.round < goal:
        cluster.deliver_up(worker)
        cluster.deliver_down(worker)
    while worker.updates:
        worker.merge()


def with_a_contribution_in_flight(cluster: Cluster, *, arrived: bool) -> tuple[SimWorker, int]:
    """A worker is cut off when its contribution to a round is on its way, or in."""
    worker = cluster.workers[0]
    cluster.run(until=lambda: round_of(cluster) >= 3 and worker.engine.ledger.outstanding == 0 and worker.open)
    round_ = worker.engine.anchor.position.round + 1
    while not worker.engine.ledger.outstanding:
        cluster.train(worker)
    if arrived:
        while not (cluster.machine.round is not None and cluster.machine.round.contributed(worker.engine.slot)):
            cluster.deliver_up(worker)
        assert round_of(cluster) < round_
        cluster.cut(worker)
    else:
        assert worker.stream is not None
        worker.stream.up.clear()
        cluster.cut(worker)
    cluster.run(until=lambda: round_of(cluster) >= round_ + 3)
    return worker, round_


def test_one_whose_contribution_may_be_in_goes_on_from_the_consensus() -> None:
    cluster = cluster_of(3)
    worker, round_ = with_a_contribution_in_flight(cluster, arrived=True)
    forget(cluster, worker, round_ + 1)
    bring_back(cluster, worker)
    np.testing.assert_array_equal(worker.live, worker.engine.anchor.vector)
    ledger = worker.engine.ledger
    assert ledger.outstanding == 0
    assert ledger.sent == ledger.included + ledger.returned


@pytest.mark.parametrize("arrived", [True, False])
def test_one_that_is_remembered_keeps_its_progress(arrived: bool) -> None:
    cluster = cluster_of(3)
    worker, round_ = with_a_contribution_in_flight(cluster, arrived=arrived)
    if not arrived:
        forget(cluster, worker, round_ - 1)  # others are forgotten, from before
    own, included = worker.live - worker.engine.anchor.vector, worker.engine.ledger.included
    sent = worker.engine.ledger.records[round_].sent.copy()
    bring_back(cluster, worker)
    expected = own - sent if arrived else own
    np.testing.assert_allclose(worker.live - worker.engine.anchor.vector, expected, rtol=1e-4, atol=1e-5)
    assert worker.engine.ledger.included - included == int(arrived)


def test_what_is_known_to_be_in_stays_subtracted() -> None:
    """It had heard of its last contribution's round before it went."""
    cluster = cluster_of(3)
    worker = cluster.workers[0]
    cluster.run(until=lambda: round_of(cluster) >= 3 and not worker.engine.ledger.outstanding and worker.open)
    last = worker.engine.anchor.inclusion.of(worker.engine.incarnation).round
    assert last in worker.engine.ledger.records, "it may have to be undone yet"
    cluster.cut(worker)
    cluster.run(until=lambda: round_of(cluster) >= last + 4)
    forget(cluster, worker, last)
    own = worker.live - worker.engine.anchor.vector
    bring_back(cluster, worker)
    np.testing.assert_allclose(worker.live - worker.engine.anchor.vector, own, rtol=1e-4, atol=1e-5)
