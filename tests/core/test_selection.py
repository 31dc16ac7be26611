"""Selections: what each kind promises, their checksums, top-k, unions, and the document's test vectors."""

from __future__ import annotations

import math
import re
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loscar_core import plan as plan_module
from loscar_core.errors import ConfigError, MalformedError, NonFiniteError
from loscar_core.permutation import derive_key, permute
from loscar_core.plan import RoundKind, RoundPlan, is_worth_making_ahead, make_ahead
from loscar_core.replica import as_indices, size_of
from loscar_core.selection import (
    BLOCK_SIZE,
    SelectionKind,
    count_for,
    indices_checksum,
    select,
    selection_checksum,
    selection_size,
    sweep_length,
    top_k,
    union,
)
from loscar_core.values import ValueType

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "selection.md"
SEEDED = [SelectionKind.RANDOM, SelectionKind.SWEEP, SelectionKind.BLOCK, SelectionKind.ALL]
MAX64 = (1 << 64) - 1


@st.composite
def shapes(draw: st.DrawFn, limit: int = 5000) -> tuple[int, int]:
    dimension = draw(st.integers(1, limit))
    return dimension, draw(st.integers(1, dimension))


# --- counts


@pytest.mark.parametrize(
    ("density", "dimension", "count"),
    [(1.0, 7, 7), (0.5, 7, 4), (0.5, 5, 2), (0.01, 25_000_000, 250_000), (1e-9, 10, 1), (0.05, 4810, 240)],
)
def test_count_for(density: float, dimension: int, count: int) -> None:
    assert count_for(density, dimension) == count


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_density_out_of_range(density: float) -> None:
    with pytest.raises(ConfigError, match="density"):
        count_for(density, 10)


@pytest.mark.parametrize("dimension", [0, -3, (1 << 40) + 1])
def test_dimension_out_of_range(dimension: int) -> None:
    with pytest.raises(ConfigError, match="dimension"):
        count_for(0.5, dimension)


# --- every kind


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(SEEDED), seed=st.integers(0, MAX64), round=st.integers(1, MAX64), shape=shapes())
def test_sorted_in_range_and_of_the_announced_size(
    kind: SelectionKind, seed: int, round: int, shape: tuple[int, int]
) -> None:
    dimension, count = shape
    selected = select(kind, seed, round, dimension, count)
    assert selected.dtype == np.int64
    assert selected.ndim == 1
    assert selected.size == selection_size(kind, seed, round, dimension, count)
    assert selected.size > 0
    assert selected[0] >= 0
    assert selected[-1] < dimension
    assert np.all(np.diff(selected) > 0)
    assert np.array_equal(selected, select(kind, seed, round, dimension, count))
    if kind is SelectionKind.RANDOM:
        assert selected.size == count
    elif kind is SelectionKind.SWEEP:
        shortest = dimension // sweep_length(dimension, count)
        assert selected.size in (shortest, shortest + 1)
        assert selected.size <= count


@pytest.mark.parametrize("kind", [SelectionKind.RANDOM, SelectionKind.SWEEP, SelectionKind.BLOCK])
def test_depends_on_seed_and_round(kind: SelectionKind) -> None:
    base = select(kind, 1, 1, 10_000, 500)
    assert not np.array_equal(base, select(kind, 2, 1, 10_000, 500))
    assert not np.array_equal(base, select(kind, 1, 2, 10_000, 500))


@pytest.mark.parametrize("kind", SEEDED)
@pytest.mark.parametrize(
    ("seed", "round", "dimension", "count", "word"),
    [
        (-1, 1, 10, 2, "seed"),
        (1 << 64, 1, 10, 2, "seed"),
        (0, 0, 10, 2, "round"),
        (0, 1 << 64, 10, 2, "round"),
        (0, 1, 0, 1, "dimension"),
        (0, 1, (1 << 40) + 1, 1, "dimension"),
        (0, 1, 10, 0, "count"),
        (0, 1, 10, 11, "count"),
    ],
)
def test_arguments_out_of_range(
    kind: SelectionKind, seed: int, round: int, dimension: int, count: int, word: str
) -> None:
    for function in (select, selection_size, selection_checksum):
        with pytest.raises(ConfigError, match=word):
            function(kind, seed, round, dimension, count)


def test_topk_is_no_function_of_the_seed() -> None:
    with pytest.raises(ConfigError, match="topk"):
        select(SelectionKind.TOPK, 1, 1, 10, 2)
    assert selection_size(SelectionKind.TOPK, 1, 1, 10, 2) == 2


@pytest.mark.parametrize("kind", [SelectionKind.RANDOM, SelectionKind.SWEEP, SelectionKind.BLOCK])
def test_a_huge_dimension_costs_what_the_count_costs(kind: SelectionKind) -> None:
    tracemalloc.start()
    try:
        selected = select(kind, 7, 3, 10**9, 1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert abs(selected.size - 1000) < BLOCK_SIZE
    assert peak < 300_000
    assert selected[-1] > 10**8


# --- random


def test_random_is_the_image_of_the_first_positions() -> None:
    for dimension, count in ((10_000, 37), (10_000, 5000), ((1 << 33) + 1, 50)):
        images = permute(np.arange(count), dimension, derive_key(4, 1, 9))
        expected = np.sort(images)
        assert np.array_equal(select(SelectionKind.RANDOM, 4, 9, dimension, count), expected)


def test_random_takes_each_coordinate_and_each_pair_equally_often() -> None:
    dimension, count, rounds = 20, 6, 1500
    picked = np.zeros((rounds, dimension))
    for round in range(1, rounds + 1):
        picked[round - 1, select(SelectionKind.RANDOM, 1, round, dimension, count)] = 1
    share = count / dimension
    pair_share = share * (count - 1) / (dimension - 1)
    together = picked.T @ picked / rounds
    deviation = math.sqrt(share * (1 - share) / rounds)
    assert np.all(np.abs(np.diag(together) - share) < 4.5 * deviation)
    pairs = together[np.triu_indices(dimension, 1)]
    assert np.all(np.abs(pairs - pair_share) < 4.5 * math.sqrt(pair_share * (1 - pair_share) / rounds))


def test_shared_prefix_of_counts() -> None:
    # A larger count of the same round only adds coordinates.
    small = select(SelectionKind.RANDOM, 1, 1, 10_000, 100)
    large = select(SelectionKind.RANDOM, 1, 1, 10_000, 3000)
    assert np.isin(small, large).all()


# --- sweep


@settings(max_examples=50, deadline=None)
@given(shape=shapes(400), seed=st.integers(0, MAX64), sweep=st.integers(0, 5))
def test_a_sweep_covers_each_coordinate_exactly_once(shape: tuple[int, int], seed: int, sweep: int) -> None:
    dimension, count = shape
    length = sweep_length(dimension, count)
    assert length == math.ceil(dimension / count)
    first = sweep * length + 1
    slices = [select(SelectionKind.SWEEP, seed, round, dimension, count) for round in range(first, first + length)]
    assert np.array_equal(np.sort(np.concatenate(slices)), np.arange(dimension))
    sizes = {part.size for part in slices}
    assert max(sizes) <= count
    assert max(sizes) - min(sizes) <= 1


def test_sweeps_differ_in_their_order() -> None:
    first = select(SelectionKind.SWEEP, 1, 1, 1000, 100)
    second = select(SelectionKind.SWEEP, 1, 11, 1000, 100)
    assert np.intersect1d(first, second).size < 40


# --- block


@settings(max_examples=50, deadline=None)
@given(shape=shapes(), seed=st.integers(0, MAX64), round=st.integers(1, 1000))
def test_blocks_are_whole_runs(shape: tuple[int, int], seed: int, round: int) -> None:
    dimension, count = shape
    selected = select(SelectionKind.BLOCK, seed, round, dimension, count)
    total = -(-dimension // BLOCK_SIZE)
    runs = np.unique(selected // BLOCK_SIZE)
    assert runs.size == min(total, max(1, (count + 32) // BLOCK_SIZE))
    expected = [c for run in runs.tolist() for c in range(run * 64, min(run * 64 + 64, dimension))]
    assert selected.tolist() == expected


def test_every_run_is_chosen_equally_often() -> None:
    dimension, rounds = 64 * 10 - 7, 1000
    chosen = np.zeros(10)
    for round in range(1, rounds + 1):
        selected = select(SelectionKind.BLOCK, 3, round, dimension, 192)
        chosen += np.bincount(np.unique(selected // 64), minlength=10)
    assert np.all(np.abs(chosen / rounds - 0.3) < 4.5 * math.sqrt(0.21 / rounds))


# --- checksums


def test_selection_checksum_tells_all_arguments_apart() -> None:
    base = (SelectionKind.RANDOM, 1, 2, 100, 10)
    others = [(kind, *base[1:]) for kind in SelectionKind if kind is not base[0]]
    others += [(base[0], 2, 2, 100, 10), (base[0], 1, 3, 100, 10)]
    others += [(base[0], 1, 2, 101, 10), (base[0], 1, 2, 100, 11)]
    sums = {selection_checksum(*arguments) for arguments in [base, *others]}
    assert len(sums) == 1 + len(others)
    assert all(0 <= value < 1 << 32 for value in sums)


def test_indices_checksum_is_the_crc_of_little_endian_int64() -> None:
    indices = np.array([1, 258, 1 << 33], dtype=np.int64)
    raw = b"".join(value.to_bytes(8, "little") for value in (1, 258, 1 << 33))
    assert indices_checksum(indices) == zlib.crc32(raw)
    assert indices_checksum(indices.astype(">i8")) == zlib.crc32(raw)
    assert indices_checksum(np.arange(10)[::2]) == indices_checksum(np.array([0, 2, 4, 6, 8]))
    assert indices_checksum(np.empty(0, dtype=np.int64)) == 0


# --- top-k


def naive_top_k(values: NDArray[np.float32], count: int) -> list[int]:
    order = sorted(range(values.size), key=lambda i: (-abs(float(values[i])), i))
    return sorted(order[:count])


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45]), st.floats(width=32, allow_nan=False)),
        min_size=1,
        max_size=60,
    ),
    data=st.data(),
)
def test_top_k_equals_sorting(values: list[float], data: st.DataObject) -> None:
    array = np.array([v if math.isfinite(v) else 3.0 for v in values], dtype=np.float32)
    count = data.draw(st.integers(1, array.size))
    assert top_k(array, count).tolist() == naive_top_k(array, count)


@pytest.mark.parametrize("count", [1, 700, 20_000, 100_000])
@pytest.mark.parametrize("shape", ["normal", "steps", "constant", "few-large", "misleading-sample", "mostly-zero"])
def test_top_k_of_many(shape: str, count: int) -> None:
    size = 200_000
    rng = np.random.default_rng(2)
    values = rng.standard_normal(size).astype(np.float32)
    if shape == "steps":
        values = np.round(values * 2)
    elif shape == "constant":
        values = np.full(size, -2.5, dtype=np.float32)
    elif shape == "few-large":
        values[::1000] *= 1e6
    elif shape == "misleading-sample":
        values[::61] *= 1e6
    elif shape == "mostly-zero":
        values[rng.random(size) < 0.9] = 0
    chosen = top_k(values, count)
    expected = np.sort(np.argsort(-np.abs(values), kind="stable")[:count])
    assert chosen.dtype == np.int64
    assert np.array_equal(chosen, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_top_k_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError):
        top_k(np.array([1.0, bad, 2.0], dtype=np.float32), 1)


@pytest.mark.parametrize("count", [0, -1, 4])
def test_top_k_count_out_of_range(count: int) -> None:
    with pytest.raises(ConfigError, match="count"):
        top_k(np.zeros(3, dtype=np.float32), count)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((1, 3), dtype=np.float32)])
def test_top_k_of_another_form(values: NDArray[np.float32]) -> None:
    with pytest.raises(MalformedError, match="float32"):
        top_k(values, 1)


def test_top_k_of_a_strided_view() -> None:
    values = np.array([9, 1, 8, 5, 7, 3], dtype=np.float32)[1::2]
    assert top_k(values, 2).tolist() == [1, 2]


# --- union


@settings(max_examples=50, deadline=None)
@given(sets=st.lists(st.sets(st.integers(0, 60), max_size=20), max_size=5))
def test_union(sets: list[set[int]]) -> None:
    arrays = [np.array(sorted(members), dtype=np.int64) for members in sets]
    merged = union(arrays)
    assert merged.dtype == np.int64
    assert merged.tolist() == sorted(set().union(*sets))


# --- the document


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of the document, without its two header lines."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"### {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows[2:]]


def numbers(cell: str) -> list[int]:
    return [int(word, 0) for word in re.findall(r"0x[0-9a-fA-F]+|\d+", cell)]


def test_documented_keys() -> None:
    rows = table("Keys")
    assert len(rows) >= 3
    for purpose, seed, number, multipliers, addends in rows:
        key = derive_key(int(seed, 0), int(purpose), int(number, 0))
        assert list(key.multipliers[:3]) == numbers(multipliers)
        assert list(key.addends[:3]) == numbers(addends)


def test_documented_permutations() -> None:
    rows = table("Permutations")
    assert len(rows) >= 8
    for n, purpose, seed, number, positions, images in rows:
        key = derive_key(int(seed, 0), int(purpose), int(number, 0))
        assert permute(np.array(numbers(positions)), int(n), key).tolist() == numbers(images)


def test_documented_selections() -> None:
    rows = table("Selections")
    assert len(rows) >= 10
    assert {row[0] for row in rows} == {kind.value for kind in SelectionKind if kind is not SelectionKind.TOPK}
    for kind, seed, round, dimension, count, first, size, crc in rows:
        selected = select(SelectionKind(kind), int(seed, 0), int(round), int(dimension), int(count))
        assert selected[: len(numbers(first))].tolist() == numbers(first)
        assert selected.size == int(size)
        assert indices_checksum(selected) == int(crc, 16)


def test_documented_checksums() -> None:
    rows = table("Checksums")
    assert {row[0] for row in rows} == {kind.value for kind in SelectionKind}
    for kind, seed, round, dimension, count, checksum in rows:
        arguments = (int(seed, 0), int(round), int(dimension), int(count))
        assert selection_checksum(SelectionKind(kind), *arguments) == int(checksum, 16)


def test_those_who_ask_for_the_same_selection_share_it() -> None:
    """A process that plays a thousand workers does not make it a thousand times."""
    plan = RoundPlan(3, RoundKind.TRAIN, SelectionKind.RANDOM, 50, ValueType.FLOAT32)
    again = RoundPlan(3, RoundKind.TRAIN, SelectionKind.RANDOM, 50, ValueType.BFLOAT16)
    first = plan.indices(7, 1000)
    assert again.indices(7, 1000) is first
    np.testing.assert_array_equal(first, select(SelectionKind.RANDOM, 7, 3, 1000, 50))
    assert not np.array_equal(plan.indices(8, 1000), first)
    assert not np.array_equal(replace(plan, round=4).indices(7, 1000), first)


def test_the_next_selection_is_there_when_its_round_opens() -> None:
    plan = RoundPlan(3, RoundKind.TRAIN, SelectionKind.SWEEP, 1 << 14, ValueType.FLOAT32)
    dimension = 1 << 20
    assert is_worth_making_ahead(plan)
    present = plan.indices(11, dimension)
    make_ahead(plan, 11, dimension)
    made = plan_module._last_selection.cache_info().misses
    following = replace(plan, round=4)
    np.testing.assert_array_equal(
        following.indices(11, dimension), select(SelectionKind.SWEEP, 11, 4, dimension, 1 << 14)
    )
    assert plan.indices(11, dimension) is present
    assert plan_module._last_selection.cache_info().misses == made, "it was made again"
    assert not is_worth_making_ahead(replace(plan, count=100))
    assert not is_worth_making_ahead(replace(plan, selection=SelectionKind.ALL, count=dimension))


@pytest.mark.parametrize("kind", [SelectionKind.ALL, SelectionKind.HEAD, SelectionKind.TAIL, SelectionKind.BLOCK])
def test_a_range_is_the_same_selection(kind: SelectionKind) -> None:
    plan = RoundPlan(3, RoundKind.TRAIN, kind, 1000 if kind is SelectionKind.ALL else 300, ValueType.FLOAT32)
    where = plan.where(5, 1000)
    assert isinstance(where, slice) == (kind is not SelectionKind.BLOCK)
    np.testing.assert_array_equal(as_indices(where), plan.indices(5, 1000))
    assert size_of(where) == plan.size(5, 1000)
