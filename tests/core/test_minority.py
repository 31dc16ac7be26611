"""Fewer than a majority come back to a server that lost its memory."""

from __future__ import annotations

import pytest
from cluster import Cluster

from loscar_core.config import RunConfig, ServerLimits
from loscar_core.server_state import Phase

LIMITS = ServerLimits(workers=5, lease_s=1e6, round_cap_s=1e6, recover_after_s=30.0, start_grace_s=0.5, clone_below=0)


def after_a_death(*, other_servers: bool) -> Cluster:
    """Five workers have closed some rounds; the server dies, and only two of them come back, for a minute."""
    run = Cluster(5, RunConfig(seed=5, density=0.5, local_steps=1), limits=LIMITS, seed=3)
    for worker in run.workers:
        worker.engine.other_servers = other_servers
    run.connect_all()
    run.run(until=lambda: min(w.merged_round for w in run.workers) >= 3)
    run.kill_server()
    run.start_server()
    for worker in run.workers[:2]:
        run.connect(worker)
    for worker in run.workers[2:]:
        worker.crashed = True
    for _ in range(60):
        run.drain()
        run.tick(1.0)
    return run


def test_workers_that_know_one_server_only_go_on_after_the_wait() -> None:
    run = after_a_death(other_servers=False)
    assert run.machine.phase is Phase.RUNNING
    assert run.machine.epoch == 2
    before = run.machine.round
    assert before is not None
    run.run(until=lambda: run.machine.round is not None and run.machine.round.plan.round > before.plan.round + 2)
    assert run.machine.round.members == 2


@pytest.mark.parametrize("joins", [0, 1])
def test_workers_that_may_have_been_cut_off_wait_for_a_majority(joins: int) -> None:
    run = after_a_death(other_servers=True)
    assert run.machine.phase is Phase.RECOVERING
    assert all(w.stream is not None for w in run.workers[:2]), "they stay, and train on"
    for number in range(joins):
        run.connect(run.add_worker(f"new{number}"))
    for _ in range(3):
        run.drain()
        run.tick(1.0)
    assert (run.machine.phase is Phase.RUNNING) == bool(joins)
