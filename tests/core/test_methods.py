"""Methods: their options, what they ask of a run, and the fixed points of their merges."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loscar_core.config import RunConfig
from loscar_core.errors import ConfigError
from loscar_core.merge import MergeKind
from loscar_core.methods import METHODS, Arrival, parse_method, settle
from loscar_core.methods.dppf import Dppf, Schedule
from loscar_core.selection import SelectionKind, count_for

Vector = NDArray[np.float32]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_text(name: str) -> None:
    method = parse_method(name)
    assert method.name == name
    assert parse_method(method.text()) == method
    assert method.summary
    assert method.source


@given(st.floats(1e-6, 1.0), st.floats(0, 1.0), st.sampled_from(Schedule))
def test_every_option_survives_its_text(alpha: float, push: float, schedule: Schedule) -> None:
    method = Dppf(alpha, push, schedule)
    assert parse_method(method.text()) == method
    assert method.settings() == {"alpha": alpha, "lambda": push, "schedule": schedule}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dpf", "'dpf' is not one of loscar, dppf"),
        ("", "'' is not one of"),
        ("dppf:alpha=0", "outside \\(0, 1\\]"),
        ("dppf:alpha=1.5", "outside \\(0, 1\\]"),
        ("dppf:alpha=nan", "outside \\(0, 1\\]"),
        ("dppf:lambda=-1", "at least 0"),
        ("dppf:lambda=inf", "at least 0"),
        ("dppf:alpha=0.001,lambda=1e5", "lambda/alpha = 1e\\+08.* diverges"),
        ("dppf:push=1", "'push=1' is not one of its options: alpha=0.1, lambda=0.1, schedule=constant"),
        ("dppf:alpha", "'alpha' is not one of its options"),
        ("dppf:alpha=a lot", "alpha=a lot is not a number"),
        ("dppf:schedule=up", "schedule=up is not one of constant, increasing, decreasing"),
        ("dppf:alpha=.1,alpha=.2", "given twice"),
        ("loscar:kind=overwrite", "it has none"),
        ("blend:keep=1", "nothing would ever be averaged"),
        ("overlap-local-sgd:alpha=0", "outside"),
    ],
)
def test_bad_options_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_method(text)


# --- what it asks of a run ----------------------------------------------------------------------------------


def settled(text: str, *given: str, **values: object) -> RunConfig:
    method = parse_method(text)
    return RunConfig(
        **settle(
            method,
            {f.name: getattr(RunConfig(), f.name) for f in fields(RunConfig)} | values | {"method": method.text()},
            given,
        )
    )


def test_a_method_has_settings_of_its_own_unless_they_are_given() -> None:
    assert settled("loscar").density == 0.05
    assert settled("dppf").density == 1.0
    assert settled("dppf", "density", density=0.1).density == 0.1
    cocod = settled("cocod")
    assert (cocod.local_steps, cocod.selection, cocod.density) == (0, SelectionKind.ALL, 1.0)
    assert settled("cocod", "local_steps", local_steps=0) == cocod
    sparta = settled("sparta")
    assert (sparta.local_steps, sparta.overlap_steps, sparta.density) == (1, 0, 0.005)


@pytest.mark.parametrize(
    ("text", "values", "says"),
    [
        ("local-sgd", {"overlap_steps": 3}, "--overlap-steps 3 is not local-sgd, which has 0"),
        ("local-sgd", {"overlap_steps": None}, "--overlap-steps auto is not local-sgd"),
        ("cocod", {"selection": SelectionKind.SWEEP}, "--selection sweep is not cocod, which has all"),
        ("sparta", {"local_steps": 4}, "--local-steps 4 is not sparta"),
        ("dppf", {"merge": MergeKind.DELAY_CORRECTED}, "--merge is a setting of --method loscar"),
    ],
)
def test_what_contradicts_a_method_is_refused(text: str, values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settled(text, *values, **values)


def test_a_schedule_needs_an_end() -> None:
    with pytest.raises(ConfigError, match="run's end"):
        settled("dppf:schedule=increasing")
    for end in ({"rounds": 10}, {"duration_s": 3.0}, {"max_steps": 100}):
        settled("dppf:schedule=increasing", **end)


def test_a_method_s_text_has_a_bound() -> None:
    with pytest.raises(ConfigError, match="500 at most"):
        RunConfig(method="x" * 501)


# --- DPPF ---------------------------------------------------------------------------------------------------


def arrival(
    live: Vector, anchor: Vector, average: Vector, sent: Vector | None, *, whole: bool = True, **more: float
) -> Arrival[Vector]:
    own = None if sent is None else [sent]
    return Arrival([live], [anchor], [average], own, whole, more.get("fraction", 1.0), more.get("progress", 0.0))


def step_of_all(method: Dppf, places: Vector, moved: Vector, selection: NDArray[np.int64], anchor: Vector) -> Vector:
    """One round: all workers have sent `places` and have since moved; returns where they are after the merge."""
    average = anchor.copy()
    average[selection] = places[:, selection].mean(0)
    after = (places + moved).copy()
    for i, place in enumerate(places):
        got = arrival(
            after[i, selection],
            anchor[selection],
            average[selection],
            place[selection] - anchor[selection],
            fraction=selection.size / anchor.size,
        )
        after[i, selection] = method.merge(got).values[0]
    anchor[:] = average
    return after


@given(st.floats(0.05, 1.0), st.floats(0.1, 8.0), st.integers(2, 6), st.integers(0, 1000), st.floats(0.0, 3.0))
def test_the_distance_follows_its_recursion_whatever_is_in_flight(
    alpha: float, push: float, workers: int, seed: int, moving: float
) -> None:
    """r ← (1 − α) r + λ for what was averaged; the steps in flight are kept as they are."""
    rng = np.random.default_rng(seed)
    method = Dppf(alpha, push)
    places = rng.normal(size=(workers, 30)).astype(np.float32)
    moved = (moving * rng.normal(size=(workers, 30))).astype(np.float32)
    anchor = rng.normal(size=30).astype(np.float32)
    mean = places.mean(0)
    before = np.linalg.norm(places - mean, axis=1)
    after = step_of_all(method, places, moved, np.arange(30), anchor)
    np.testing.assert_allclose(anchor, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(after - moved - mean, axis=1), (1 - alpha) * before + push, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_the_width_is_lambda_over_alpha(width: float, density: float) -> None:
    """Without gradients, from any start, dense and sparse."""
    rng = np.random.default_rng(3)
    alpha, d = 0.2, 1000
    method = Dppf(alpha, width * alpha)
    places = rng.normal(size=(4, d)).astype(np.float32)
    anchor = np.zeros(d, np.float32)
    for _ in range(int(60 / density)):
        selection = np.sort(rng.choice(d, count_for(density, d), replace=False))
        places = step_of_all(method, places, np.zeros_like(places), selection, anchor)
    distances = np.linalg.norm(places - places.mean(0), axis=1)
    np.testing.assert_allclose(distances.mean(), width, rtol=0.001 if density == 1 else 0.06)


def test_pieces_are_one_vector() -> None:
    rng = np.random.default_rng(1)
    live, anchor, average, sent = rng.normal(size=(4, 10)).astype(np.float32)
    method = Dppf(0.3, 0.7)
    whole = method.merge(arrival(live, anchor, average, sent))
    cut = [[v[:4], v[4:]] for v in (live, anchor, average, sent)]
    parts = method.merge(Arrival(cut[0], cut[1], cut[2], cut[3], True, 1.0, 0.0))
    np.testing.assert_allclose(np.concatenate(parts.values), whole.values[0], rtol=1e-6)
    assert parts.distance == pytest.approx(whole.distance)


def test_who_is_not_wholly_in_the_average_stays() -> None:
    live, anchor, average, sent = np.random.default_rng(2).normal(size=(4, 10)).astype(np.float32)
    for got in (arrival(live, anchor, average, None), arrival(live, anchor, average, sent, whole=False)):
        merged = Dppf(0.3, 0.7).merge(got)
        np.testing.assert_array_equal(merged.values[0], live)
        assert merged.distance is None


def test_workers_in_one_place_are_not_torn_apart() -> None:
    """There is no direction to push in."""
    same = np.ones(10, np.float32)
    merged = Dppf(0.1, 5.0).merge(arrival(same, same, same, np.zeros(10, np.float32)))
    np.testing.assert_array_equal(merged.values[0], same)


@pytest.mark.parametrize(
    ("schedule", "pushes"),
    [(Schedule.CONSTANT, (2, 2, 2)), (Schedule.INCREASING, (0, 1, 2)), (Schedule.DECREASING, (2, 1, 0))],
)
def test_schedules(schedule: Schedule, pushes: tuple[float, float, float]) -> None:
    method = Dppf(0.5, 2.0, schedule)
    assert tuple(method.push_at(s) for s in (0.0, 0.5, 1.0)) == pushes
    live, anchor, average, sent = np.random.default_rng(2).normal(size=(4, 10)).astype(np.float32)
    got = arrival(live, anchor, average, sent, progress=0.5)
    expected = Dppf(0.5, pushes[1]).merge(replace(got, progress=0.0))
    np.testing.assert_array_equal(method.merge(got).values[0], expected.values[0])


def test_alpha_one_without_a_push_is_local_sgd() -> None:
    live, anchor, average = np.random.default_rng(2).normal(size=(3, 10)).astype(np.float32)
    got = arrival(live, anchor, average, live - anchor)
    merged = Dppf(1.0, 0.0).merge(got)
    np.testing.assert_allclose(merged.values[0], parse_method("local-sgd").merge(got).values[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(merged.values[0], average, rtol=1e-5, atol=1e-6)
    assert math.isclose(merged.distance or 0.0, 0.0, abs_tol=1e-9)
