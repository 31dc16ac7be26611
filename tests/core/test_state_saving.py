"""What servers and workers save of themselves: round trips, nonsense, and what a worker that comes back may count."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cluster import Cluster, SimWorker
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loscar_core.config import FinalRound, RunConfig, ServerLimits
from loscar_core.errors import ConfigError, LoscarError, MalformedError, SupersededError, WrongModelError
from loscar_core.layout import Layout, Segment
from loscar_core.merge import MergeKind
from loscar_core.saved_state import HISTORY_SAVED, restore
from loscar_core.selection import SelectionKind
from loscar_core.values import ValueType
from loscar_core.worker_cycle import Cycle
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_state import export_worker, import_worker, resumed_as

Saved = tuple[dict[str, Any], dict[str, NDArray[Any]]]


def cluster_of(n: int, *, seed: int = 0, kind: type[Cluster] = Cluster, dimension: int = 40, **config: Any) -> Cluster:
    given: dict[str, Any] = {"density": 0.4, "selection": SelectionKind.SWEEP, "local_steps": 2, "rounds": 30}
    limits = ServerLimits(
        workers=n, lease_s=1e6, round_cap_s=1e6, recover_after_s=1e9, start_grace_s=0.5, clone_below=0
    )
    cluster = kind(n, RunConfig(**given | config), seed=seed, limits=limits, dimension=dimension)
    cluster.connect_all()
    return cluster


def at(cluster: Cluster, round_: int) -> bool:
    state = cluster.machine.replica
    return state is not None and state.position.round >= round_


# --- a server's state ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state() -> Saved:
    """Of a run with all that a state can hold, as it is in a file."""
    cluster = cluster_of(3, value_type=ValueType.INT8, duration_s=1e6, max_steps=10**9, final_round=FinalRound.NONE)
    cluster.run(until=lambda: at(cluster, 3))
    cluster.kill_server()
    cluster.start_server()
    cluster.connect_all()
    cluster.run(until=lambda: at(cluster, 6))
    saved = cluster.machine.saved_state(12.5)
    assert saved is not None
    assert saved.residual is not None
    arrays = {"vector": saved.replica.vector, "statistics": saved.replica.statistics, "residual": saved.residual}
    return json.loads(json.dumps(saved.metadata())), arrays


def test_a_state_survives_as_json_and_arrays(state: Saved) -> None:
    metadata, arrays = state
    saved = restore(metadata, arrays["vector"], arrays["statistics"], arrays["residual"])
    assert saved.metadata() == metadata
    assert len(saved.replica.lineage.spans) == 2
    assert len(saved.replica.history.last(1000)) == min(HISTORY_SAVED, saved.replica.position.round)
    assert len(saved.replica.inclusion.entries()) == 3
    assert saved.config.value_type is ValueType.INT8
    assert saved.config.merge is MergeKind.DELAY_CORRECTED
    assert saved.replica.vector is arrays["vector"]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def mangled(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if by == "nothing":
        del inner[path[-1]]
    else:
        inner[path[-1]] = by
    return changed


NONSENSE = ["nothing", None, -1, 1 << 70, 1.5, "zz", [], {}, [[]], float("nan")]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_state_that_makes_no_sense_is_refused_as_such(state: Saved, data: st.DataObject) -> None:
    """Whatever is changed in it: it is restored, or refused with a reason, and nothing else."""
    metadata, arrays = state
    path = data.draw(st.sampled_from(list(leaves(metadata))))
    changed = mangled(metadata, path, data.draw(st.sampled_from(NONSENSE)))
    with contextlib.suppress(MalformedError, ConfigError):
        restore(changed, arrays["vector"], arrays["statistics"], arrays["residual"])


def test_arrays_of_another_size_are_refused(state: Saved) -> None:
    metadata, arrays = state
    with pytest.raises(MalformedError, match="39 values for a model of 40"):
        restore(metadata, arrays["vector"][:-1], arrays["statistics"], None)
    with pytest.raises(MalformedError):
        restore(metadata, arrays["vector"], np.zeros(1, np.float32), None)
    with pytest.raises(MalformedError, match="residual"):
        restore(metadata, arrays["vector"], arrays["statistics"], np.zeros(3, np.float32))


def test_a_state_of_another_format_is_refused(state: Saved) -> None:
    metadata, arrays = state
    with pytest.raises(MalformedError, match="format 2; this version reads 1"):
        restore(metadata | {"format": 2}, arrays["vector"], arrays["statistics"], None)


# --- a worker's state ---------------------------------------------------------------------------------------


def save(worker: SimWorker) -> tuple[Saved, np.ndarray]:
    """As a session does it: between two steps, what waits is merged first."""
    while worker.updates:
        worker.merge()
    values, arrays = export_worker(worker.engine)
    return (json.loads(json.dumps(values)), arrays), worker.live.copy()


def fresh(worker: SimWorker, incarnation: bytes = b"another one.....") -> WorkerEngine:
    size = worker.engine.layout.dimension
    return WorkerEngine(
        "whoever", incarnation, worker.engine.layout, np.zeros(size, np.float32), np.zeros(0, np.float32)
    )


@pytest.fixture(scope="module")
def worker() -> SimWorker:
    """In the middle of a run, with contributions that may still matter."""
    cluster = cluster_of(3, value_type=ValueType.BFLOAT16)
    first = cluster.workers[0]
    cluster.run(until=lambda: at(cluster, 5) and first.engine.ledger.in_flight(first.engine.anchor.position.round + 1))
    return first


def test_a_worker_survives_as_json_and_arrays(worker: SimWorker) -> None:
    (values, arrays), _ = save(worker)
    assert values["records"]
    engine = fresh(worker)
    import_worker(engine, values, arrays)
    again, arrays_again = export_worker(engine)
    assert engine.incarnation.hex() != values["incarnation"]
    assert again == values | {"incarnation": engine.incarnation.hex(), "formers": [values["incarnation"]]}
    assert arrays.keys() == arrays_again.keys()
    for name, array in arrays.items():
        assert array.tobytes() == arrays_again[name].tobytes(), name
        assert array.dtype == arrays_again[name].dtype
        assert not np.shares_memory(array, arrays_again[name])
    own, other = worker.engine, engine
    assert [r.messages for r in own.ledger.all()] == [r.messages for r in other.ledger.all()]
    assert own.hello() == _with_incarnation(other, own.incarnation)
    assert own.ledger.outstanding == other.ledger.outstanding == 1


def _with_incarnation(engine: WorkerEngine, incarnation: bytes) -> Any:
    told, engine.incarnation = engine.incarnation, incarnation
    hello = engine.hello()
    engine.incarnation = told
    return hello


def test_a_worker_that_has_not_joined_has_no_state(worker: SimWorker) -> None:
    with pytest.raises(ConfigError, match="once it has joined"):
        export_worker(fresh(worker))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_worker_s_state_that_makes_no_sense_is_refused_as_such(worker: SimWorker, data: st.DataObject) -> None:
    values, arrays = save(worker)[0]
    if data.draw(st.integers(0, 9)) == 0:
        arrays = {k: v for k, v in arrays.items() if k != data.draw(st.sampled_from(list(arrays)))}
    else:
        path = data.draw(st.sampled_from(list(leaves(values))))
        values = mangled(values, path, data.draw(st.sampled_from(NONSENSE)))
    with contextlib.suppress(LoscarError):
        import_worker(fresh(worker), values, arrays)


def test_a_worker_s_state_of_another_model_or_format_is_refused(worker: SimWorker) -> None:
    values, arrays = save(worker)[0]
    layout = Layout((Segment("w", (41,), "float32"),), ())
    other = WorkerEngine("x", b"x" * 16, layout, np.zeros(41, np.float32), np.zeros(0, np.float32))
    with pytest.raises(WrongModelError):
        import_worker(other, values, arrays)
    with pytest.raises(MalformedError, match="format 3; this version reads 1"):
        import_worker(fresh(worker), values | {"format": 3}, arrays)


# --- coming back --------------------------------------------------------------------------------------------


class Counting(Cluster):
    """A cluster in which every step of every worker adds 1 to every coordinate, so that progress can be counted."""

    def add_worker(self, name: str, **options: Any) -> SimWorker:
        worker = super().add_worker(name, **options)
        worker.rng = Ones()  # type: ignore[assignment]
        return worker

    def check_worker(self, worker: SimWorker) -> None:
        if not worker.engine.formers:  # its ledger goes on from another incarnation's, which the book does not know
            super().check_worker(worker)


class Ones:
    def normal(self, size: int) -> np.ndarray:
        return np.ones(size)


def come_back(cluster: Cluster, dead: SimWorker, saved: tuple[Saved, np.ndarray]) -> SimWorker:
    """The worker's process is replaced by one that starts from a saved state."""
    (values, arrays), live = saved
    heir = cluster.crash(dead, noticed=cluster.random.random() < 0.5)
    import_worker(heir.engine, values, arrays)
    heir.live = live.copy()
    heir.cycle = Cycle(2, 1.0, None, 0.0)  # there is nothing to be taken over first
    assert cluster.book is not None
    for taken in cluster.book.taken.get(dead.engine.incarnation, []):
        if any(record.plan == taken.plan for record in heir.engine.ledger.all()):
            cluster.book.taken.setdefault(heir.engine.incarnation, []).append(taken)  # it may be sent again as it was
    cluster.connect(heir)
    return heir


def restart_server(cluster: Cluster) -> None:
    cluster.kill_server()
    cluster.start_server()
    for each in cluster.workers:
        if not each.crashed:
            cluster.connect(each)


def counted(cluster: Cluster, *lives: SimWorker) -> np.ndarray:
    """How many steps of a worker's lives are in the consensus or still to be sent, per coordinate."""
    assert cluster.book is not None
    last = lives[-1]
    node = cluster.book.node_of(last.engine.anchor)
    assert node is not None
    total = last.settled().astype(np.float64) - last.engine.anchor.vector
    for incarnation in {w.engine.incarnation for w in lives}:
        total = total + node.own.get(incarnation, 0.0)
    return total


@pytest.mark.parametrize("seed", range(25))
def test_a_worker_that_was_saved_at_its_end_loses_nothing_and_counts_nothing_twice(seed: int) -> None:
    """Pre-empted in order: whatever of its contribution in flight is in when it is back, to the last step."""
    rng = random.Random(seed)
    cluster = cluster_of(rng.choice([1, 2, 3]), seed=seed, kind=Counting, final_round=FinalRound.NONE)
    cluster.run(until=lambda: at(cluster, rng.randrange(1, 8)))
    dead = cluster.workers[0]
    for _ in range(rng.randrange(25)):
        cluster.step()
    while dead.cycle is None or dead.pending is not None:
        cluster.step()
    saved = save(dead)
    steps = dead.progress.copy()
    heir = come_back(cluster, dead, saved)
    cluster.run(until=lambda: heir.out or heir.engine.anchor.position.round >= dead.engine.anchor.position.round + 6)
    np.testing.assert_allclose(counted(cluster, dead, heir), steps + heir.progress, atol=1e-2)
    assert heir.engine.ledger.included > 0
    assert heir.engine.ledger.sent == sum(
        (heir.engine.ledger.included, heir.engine.ledger.returned, heir.engine.ledger.outstanding)
    )


@pytest.mark.parametrize("value_type", [ValueType.FLOAT32, ValueType.BFLOAT16])
@pytest.mark.parametrize("seed", range(25))
def test_a_worker_that_lived_on_after_it_was_saved_counts_nothing_twice(seed: int, value_type: ValueType) -> None:
    """Killed at any moment after its state was saved, with anything under way: no step is in the run twice.

    What is lost is what it had not sent when it died, and of what it had saved that which it may have sent.
    """
    rng = random.Random(1000 + seed)
    cluster = cluster_of(
        rng.choice([1, 2, 3]), seed=seed, kind=Counting, final_round=FinalRound.NONE, value_type=value_type
    )
    cluster.expected = (SupersededError,)  # by the hello of a dead one that is read when its heir is there already
    lives = [cluster.workers[0]]
    for _ in range(3):
        cluster.run(until=lambda: at(cluster, cluster.workers[0].engine.anchor.position.round + 1))
        dead = lives[-1]
        while dead.cycle is None or dead.pending is not None or dead.engine._former_at_work:
            cluster.step()
        saved = save(dead)
        since = dead.progress.copy()
        at_save = counted(cluster, *lives)
        for _ in range(rng.choice([0, 1, 2])):
            for _ in range(rng.choice([5, 50, 500])):
                cluster.step()
            if rng.random() < 0.3:
                restart_server(cluster)
        at_most = at_save + (dead.progress - since)
        heir = come_back(cluster, dead, saved)
        if len(lives) + 1 == len(cluster.workers) and rng.random() < 0.3:
            restart_server(cluster)  # with others, who are further, the two could not say which state is the run's
        lives.append(heir)
        goal = dead.engine.anchor.position.round + rng.randrange(2, 6)
        cluster.run(until=lambda h=heir, g=goal: h.out or h.engine.anchor.position.round >= g)
        if heir.out:
            break
        # A step is 1: float32's and bfloat16's rounding stay far below that.
        assert (counted(cluster, *lives) <= at_most + heir.progress + 0.5).all()
    cluster.check()


def test_what_the_dead_one_sent_for_the_open_round_is_not_sent_again_otherwise() -> None:
    """It had contributed to the round that is still open when it is back: nobody is refused, and the round closes."""
    cluster = cluster_of(2, kind=Counting, density=1.0, rounds=10, final_round=FinalRound.NONE)
    dead = cluster.workers[0]
    cluster.run(until=lambda: at(cluster, 3) and not dead.engine.ledger.outstanding and dead.pending is None)
    saved = save(dead)
    at_save, since = counted(cluster, dead), dead.progress.copy()
    while not (cluster.machine.round and cluster.machine.round.contributed(0)):
        cluster.deliver_down(dead)
        cluster.train(dead)
        cluster.deliver_up(dead)
    assert not cluster.machine.round.contributed(1)
    assert dead.engine.ledger.outstanding == 1
    heir = come_back(cluster, dead, saved)
    cluster.drain(heir)
    assert heir.error is None
    assert heir.open is None, "the round is its predecessor's"
    cluster.run(until=lambda: heir.engine.anchor.position.round >= 6)
    assert heir.engine.ledger.included >= 1
    assert (counted(cluster, dead, heir) <= at_save + (dead.progress - since) + heir.progress + 0.5).all()
    cluster.run()
    assert not cluster.machine.refused


def test_what_was_in_flight_and_is_in_by_a_server_that_the_saved_state_does_not_know() -> None:
    """Saved with a contribution on its way to one server, which dies; the next one takes it; then the worker dies."""
    cluster = cluster_of(1, kind=Counting, final_round=FinalRound.NONE)
    dead = cluster.workers[0]
    cluster.run(until=lambda: at(cluster, 3) and dead.engine.ledger.outstanding)
    round_ = dead.engine.anchor.position.round + 1
    saved, at_save, since = save(dead), counted(cluster, dead), dead.progress.copy()
    restart_server(cluster)
    cluster.run(until=lambda: dead.engine.anchor.position.round == round_)
    assert dead.engine.anchor.inclusion.of(dead.engine.incarnation).round == round_
    at_most = at_save + (dead.progress - since)
    heir = come_back(cluster, dead, saved)
    cluster.run(until=lambda: heir.engine.anchor.position.round >= round_ + 5)
    assert (counted(cluster, dead, heir) <= at_most + heir.progress + 0.5).all()


def test_coming_back_to_a_server_that_has_forgotten_everything() -> None:
    """The only worker of a run is saved and killed, and so is the server: the saved state is the run."""
    cluster = cluster_of(1, kind=Counting, rounds=12, final_round=FinalRound.NONE)
    dead = cluster.workers[0]
    cluster.run(until=lambda: at(cluster, 4) and dead.pending is None)
    saved, at_save = save(dead), counted(cluster, dead)
    position = dead.engine.anchor.position
    cluster.run(until=lambda: at(cluster, 7))
    cluster.kill_server()
    cluster.start_server()
    heir = come_back(cluster, dead, saved)
    cluster.run(until=lambda: heir.finished)
    assert heir.engine.anchor.lineage.epoch_of(position.round) == position.epoch
    assert heir.engine.anchor.position.epoch == position.epoch + 1
    np.testing.assert_allclose(counted(cluster, dead, heir), at_save + heir.progress, atol=1e-2)


def test_every_process_that_resumed_from_a_state_is_known_to_the_next_one() -> None:
    """Also one that was killed before it had saved a state of its own."""
    cluster = cluster_of(2)
    cluster.run(until=lambda: at(cluster, 3))
    worker = cluster.workers[0]
    values, arrays = export_worker(worker.engine)
    saved = values
    second, third = fresh(worker), fresh(worker)
    for engine, number in ((second, 2), (third, 3)):
        saved = json.loads(json.dumps(resumed_as(saved, bytes([number]) * 16)))
        import_worker(engine, saved, arrays)
        assert engine.incarnation == bytes([number]) * 16
    assert second.formers == (worker.engine.incarnation,)
    assert set(third.formers) == {worker.engine.incarnation, second.incarnation}
