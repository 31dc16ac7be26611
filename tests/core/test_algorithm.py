"""The distributed round is the algorithm: merges, means, quantisation, statistics, orders of arrival."""

from __future__ import annotations

import numpy as np
import pytest
from cluster import Cluster, cluster_of

from loscar_core.config import RunConfig
from loscar_core.merge import MergeKind, merge
from loscar_core.selection import SelectionKind, select
from loscar_core.values import ValueType, decode, encode

NARROW = [ValueType.BFLOAT16, ValueType.FLOAT16, ValueType.INT8]


@pytest.mark.parametrize("value_type", list(ValueType))
def test_the_consensus_does_not_depend_on_the_order_of_arrival(value_type: ValueType) -> None:
    ends = set()
    for schedule in range(12):
        run = cluster_of(4, schedule=schedule, local_steps=2, overlap_steps=3, density=0.3, value_type=value_type)
        run.run()
        run.check_end()
        state = run.machine.replica
        assert state is not None
        ends.add((state.vector.tobytes(), state.digest))
    assert len(ends) == 1


def round_of(run: Cluster, *, in_flight: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One round in which everybody contributes and trains on: per worker y (sent), z (before) and x (after)."""
    run.drain()
    for w in run.workers:
        w.keep_history = True
        for _ in range(w.rng.integers(1, 4)):
            w.step()
    before = []
    for w in run.workers:
        w.gather()
        y = w.live.copy()
        run.hand_over(w)
        for _ in range(in_flight and int(w.rng.integers(0, in_flight + 1))):
            w.step()
        before.append((y, w.live.copy()))
    run.drain()
    after = []
    for w, (y, z) in zip(run.workers, before, strict=True):
        while w.updates:
            w.merge()
        after.append((y, z, w.live.copy()))
    run.check()
    return after


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("selection", [SelectionKind.RANDOM, SelectionKind.SWEEP, SelectionKind.BLOCK])
def test_a_corrected_merge_preserves_the_mean_and_leaves_the_drift(density: float, selection: SelectionKind) -> None:
    run = cluster_of(4, density=density, selection=selection)
    for _ in range(5):
        rounds = round_of(run, in_flight=5)
        y, z, x = (np.array(each, np.float64) for each in zip(*rounds, strict=True))
        np.testing.assert_allclose(x.mean(0), z.mean(0), atol=2e-5)
        s = run.workers[0].history[-1].indices
        at = slice(None) if s is None else s
        drift = (z - y)[:, at]
        # The first round that a coordinate is in finds it equal everywhere, so all that is left is what was done
        # since the snapshot.
        np.testing.assert_allclose((x - x.mean(0))[:, at], drift - drift.mean(0), atol=2e-5)


def test_an_overwriting_merge_loses_what_was_done_in_flight() -> None:
    run = cluster_of(3, density=1.0, merge=MergeKind.OVERWRITE)
    rounds = round_of(run, in_flight=6)
    y, z, x = (np.array(each, np.float64) for each in zip(*rounds, strict=True))
    np.testing.assert_allclose(x, np.broadcast_to(y.mean(0), x.shape), atol=1e-5)
    assert np.abs(x.mean(0) - z.mean(0)).max() > 0.1


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_without_overlap_both_merges_are_the_same(density: float) -> None:
    ends = []
    for kind in MergeKind.DELAY_CORRECTED, MergeKind.OVERWRITE:
        run = cluster_of(3, density=density, merge=kind, overlap_steps=0)
        for _ in range(3):
            rounds = round_of(run, in_flight=0)
        ends.append([x.tobytes() for _, _, x in rounds])
    assert ends[0] == ends[1]
    assert (len(set(ends[0])) == 1) == (density == 1.0)


@pytest.mark.parametrize(
    ("kind", "in_flight"), [(MergeKind.DELAY_CORRECTED, 6), (MergeKind.DELAY_CORRECTED, 0), (MergeKind.OVERWRITE, 6)]
)
def test_the_steady_disagreement_is_the_theory_s(kind: MergeKind, in_flight: int) -> None:
    """V* = η²σ²(1 − 1/n)[Q + (q/p)H] under pure noise; overwriting loses the Q."""
    n, d, local, p, rounds, scale = 6, 4000, 2, 0.25, 260, 0.1
    rng = np.random.default_rng(1)
    x = np.zeros((n, d), np.float32)
    a = np.zeros(d, np.float32)
    seen = []

    def steps(count: int) -> np.ndarray:
        return (scale * np.sqrt(count) * rng.standard_normal((n, d))).astype(np.float32)

    for round_ in range(1, rounds + 1):
        s = select(SelectionKind.RANDOM, 3, round_, d, round(p * d))
        x += steps(local)
        sent = x[:, s] - a[s]
        new = a[s] + sent.mean(0)
        x += steps(in_flight)
        for i in range(n):
            x[i, s] = merge(kind, x[i, s], a[s], new, sent[i])
        a[s] = new
        if round_ > 60:
            seen.append(float(x.var(0).mean()))
    overlap = in_flight if kind is MergeKind.DELAY_CORRECTED else 0
    theory = scale**2 * (1 - 1 / n) * (overlap + (1 - p) / p * (local + in_flight))
    assert np.mean(seen) == pytest.approx(theory, rel=0.03)


@pytest.mark.parametrize("value_type", NARROW)
def test_what_quantisation_leaves_out_stays_at_home_on_both_sides(value_type: ValueType) -> None:
    run = cluster_of(3, density=0.5, selection=SelectionKind.RANDOM, value_type=value_type)
    start = run.workers[0].engine.anchor.vector.astype(np.float64)
    total = np.zeros(start.size)
    for _ in range(6):
        rounds = round_of(run, in_flight=0)
        state, residual = run.machine.replica, run.machine.residual
        assert state is not None
        assert residual is not None
        node = run.check_server(run.machine)
        s = run.workers[0].history[-1].indices
        assert s is not None
        for worker, (y, _, x) in zip(run.workers, rounds, strict=True):
            taken, mask = node.included[worker.engine.incarnation]
            assert mask == 1
            assert node.parent is not None
            meant = y[s] - node.parent.vector[s]
            # Without steps in flight the whole of x − a is what encoding left out.
            assert x[s].tobytes() == (state.vector[s] + (meant - taken.sent)).tobytes()
            assert taken.sent.tobytes() == decode(encode(meant, value_type), value_type, s.size).tobytes()
            assert np.abs(meant - taken.sent).max() > 0
            total += taken.dense(mask) / 3
        np.testing.assert_allclose(state.vector + residual, start + total, atol=2e-5)
    assert np.abs(residual).max() > 0


def test_statistics_are_averaged_as_they_are_and_assigned() -> None:
    run = Cluster(3, RunConfig(density=0.2, value_type=ValueType.INT8), statistics=4, seed=2)
    run.connect_all()
    run.drain()
    for _ in range(3):
        for w in run.workers:
            w.step()
            w.statistics = w.rng.normal(size=4).astype(np.float32)
            w.gather()
        told = [w.statistics.copy() for w in run.workers]
        for w in run.workers:
            w.statistics = w.statistics + 7  # what happens in flight is not kept: there is no correction
            run.hand_over(w)
        run.drain()
        mean = ((told[0] + told[1]) + told[2]) / np.float32(3)
        for w in run.workers:
            while w.updates:
                w.merge()
            assert w.statistics.tobytes() == mean.tobytes()
        run.check()
