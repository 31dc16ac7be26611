"""Replicas that leave the digest chain are sent everything, once."""

from __future__ import annotations

import numpy as np
import pytest
from cluster import Cluster, SimWorker

from loscar_core import effects as fx
from loscar_core.config import RunConfig
from loscar_core.errors import ReplicaDivergedError
from loscar_core.messages import CatchUp, Refresh


def one_round(run: Cluster) -> None:
    """Everybody who is asked contributes, and hears what came of it."""
    run.drain()
    for w in run.workers:
        while w.updates:
            w.merge()
        if w.open is not None and not w.open.contributed:
            w.step()
            w.gather()
            w.hand_over(run.book)
    run.drain()


def corrupt(worker: SimWorker) -> None:
    worker.engine.anchor.vector += np.float32(0.5)


def diverging() -> tuple[Cluster, SimWorker]:
    run = Cluster(2, RunConfig(density=0.5, local_steps=1), seed=1, booked=False)
    run.connect_all()
    one_round(run)
    one_round(run)
    return run, run.workers[0]


def test_a_replica_that_diverges_is_refreshed() -> None:
    run, victim = diverging()
    corrupt(victim)
    one_round(run)
    assert run.machine.replica is not None
    assert victim.engine.anchor.vector.tobytes() == run.machine.replica.vector.tobytes()
    assert victim.engine.anchor.digest == run.machine.replica.digest
    for _ in range(3):
        one_round(run)
    assert victim.engine.anchor.position == run.machine.replica.position
    corrupt(victim)  # once more, but not twice in a row
    one_round(run)
    one_round(run)
    assert victim.engine.anchor.vector.tobytes() == run.machine.replica.vector.tobytes()


def test_twice_in_a_row_is_the_end() -> None:
    run, victim = diverging()
    corrupt(victim)
    one_round(run)
    corrupt(victim)
    with pytest.raises(ReplicaDivergedError, match="again at round 4"):
        one_round(run)


@pytest.mark.parametrize("when", ["before the refresh is asked for", "before it has arrived"])
def test_a_refresh_that_is_cut_off_comes_with_the_next_stream(when: str) -> None:
    run, victim = diverging()
    corrupt(victim)
    other = run.workers[1]
    for w in run.workers:
        w.step()
        w.gather()
        w.hand_over(None)
    while victim.stream is not None and not any(isinstance(m, Refresh) for m in victim.stream.up):
        run.drain(other)
        run.deliver_up(victim) if len(victim.stream.up) else run.deliver_down(victim)
    if when == "before it has arrived":
        while victim.stream is not None and victim.stream.up:
            run.deliver_up(victim)
    run.cut(victim)
    run.connect(victim)
    run.deliver_up(victim)
    assert victim.stream is not None
    assert next(m for m in victim.stream.outbox if isinstance(m, CatchUp)).full
    for _ in range(3):
        one_round(run)
    assert run.machine.replica is not None
    assert victim.engine.anchor.vector.tobytes() == run.machine.replica.vector.tobytes()


def test_the_ledger_survives_a_refresh() -> None:
    run = Cluster(2, RunConfig(density=0.5, local_steps=1, rounds=8), seed=1)
    run.connect_all()
    run.run(until=lambda: run.workers[0].merged_round >= 2)
    victim = run.workers[0]
    victim.engine.anchor.digest ^= 1  # the arrays are right, so all checks apply, but it believes that they are not
    check, run.check_worker = run.check_worker, lambda worker: None  # type: ignore[method-assign]
    run.run(until=lambda: any(isinstance(e, fx.Notice) and "diverged" in e.text for e in run.events))
    run.run(until=lambda: victim.engine.anchor.digest == run.machine.replica.digest)  # type: ignore[union-attr]
    run.check_worker = check  # type: ignore[method-assign]
    run.run()
    run.check_end()
