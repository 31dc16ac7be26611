"""The keyed permutation: a bijection, the written algorithm to the bit, and statistically sound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loscar_core.errors import ConfigError
from loscar_core.permutation import (
    FEISTEL_ROUNDS_SMALL,
    MAX_DOMAIN,
    Purpose,
    derive_key,
    domain_bits,
    mix64,
    permute,
)

MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
GAMMA = 0x9E3779B97F4A7C15


def scalar_permute(position: int, n: int, seed: int, purpose: int, number: int) -> int:
    """The algorithm of docs/selection.md in plain integers, written from the document alone."""
    state = 1
    for word in (purpose, seed, number):
        state = mix64(((state ^ word) + GAMMA) & MASK64)
    bits = 2
    while (1 << bits) < n:
        bits += 1
    left_bits, right_bits = bits // 2, bits - bits // 2
    if n == 1:
        return 0
    while True:
        left, right = position >> right_bits, position & ((1 << right_bits) - 1)
        for i in range(8 if bits >= 16 else 24):
            key = mix64((state + (i + 1) * GAMMA) & MASK64)
            half, width = (right, left_bits) if i % 2 == 0 else (left, right_bits)
            t = (half * ((key & MASK32) | 1) + (key >> 32)) & MASK32
            t = ((t ^ (t >> 16)) * 0x7FEB352D) & MASK32
            t = ((t ^ (t >> 15)) * 0x846CA68B) & MASK32
            t >>= 32 - width
            if i % 2 == 0:
                left ^= t
            else:
                right ^= t
        position = (left << right_bits) | right
        if position < n:
            return position


def chi_square_score(counts: NDArray[np.float64], expected: float, freedom: int) -> float:
    """Standard deviations by which a chi-square statistic lies above its expectation."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_mix64_is_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 0 and with 1234567, as published with its reference code.
    assert mix64(GAMMA) == 0xE220A8397B1DCDAF
    assert mix64(2 * GAMMA) == 0x6E789E6AA1B965F4
    assert mix64(1234567 + GAMMA) == 6457827717110365317
    assert mix64(1234567 + 2 * GAMMA) == 3203168211198807973


@settings(max_examples=50, deadline=None)
@given(
    n=st.one_of(st.integers(1, 300), st.integers(1, MAX_DOMAIN)),
    seed=st.integers(0, MASK64),
    purpose=st.sampled_from(list(Purpose)),
    number=st.integers(0, MASK64),
    data=st.data(),
)
def test_equals_the_scalar_algorithm(n: int, seed: int, purpose: Purpose, number: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), max_size=8))
    images = permute(np.array(positions, dtype=np.int64), n, derive_key(seed, purpose, number))
    assert images.tolist() == [scalar_permute(p, n, seed, int(purpose), number) for p in positions]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, MASK64))
def test_is_a_bijection(n: int, seed: int) -> None:
    images = permute(np.arange(n), n, derive_key(seed, Purpose.SWEEP, 0))
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(n))


@pytest.mark.parametrize("n", [(1 << 15) + 1, (1 << 16) - 1, 1 << 16, (1 << 17) + 3])
def test_is_a_bijection_across_chunks_and_the_change_of_rounds(n: int) -> None:
    images = permute(np.arange(n), n, derive_key(5, Purpose.RANDOM, 9))
    assert np.array_equal(np.sort(images), np.arange(n))


def test_largest_domain() -> None:
    positions = np.array([0, 1, MAX_DOMAIN - 1], dtype=np.uint64)
    images = permute(positions, MAX_DOMAIN, derive_key(1, 1, 1))
    assert images.dtype == np.int64
    assert len(set(images.tolist())) == 3
    assert images.min() >= 0
    assert images.max() < MAX_DOMAIN


def test_domain_at_most_doubles() -> None:
    assert [domain_bits(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [2, 2, 2, 2, 3, 3, 4]
    assert domain_bits(1 << 40) == 40
    for n in (3, 5, 1000, 25_000_000, (1 << 32) + 1):
        assert n <= 1 << domain_bits(n) < 2 * n


def test_does_not_change_its_argument() -> None:
    positions = np.array([3, 1, 2], dtype=np.int64)
    permute(positions, 5, derive_key(0, 1, 1))
    assert positions.tolist() == [3, 1, 2]


def test_no_positions() -> None:
    assert permute(np.empty(0, dtype=np.int64), 7, derive_key(0, 1, 1)).size == 0


def test_keys_differ_in_every_word() -> None:
    keys = {derive_key(*words) for words in itertools.product((0, 1, 2, 1 << 63), repeat=3)}
    assert len(keys) == 64
    key = derive_key(1, 2, 3)
    assert len(key.multipliers) == len(key.addends) == FEISTEL_ROUNDS_SMALL
    assert all(multiplier % 2 == 1 for multiplier in key.multipliers)
    assert all(0 <= word <= MASK32 for word in key.multipliers + key.addends)


@pytest.mark.parametrize("words", [(-1, 1, 1), (1 << 64, 1, 1), (0, -1, 1), (0, 1, -1), (0, 1, 1 << 64)])
def test_key_words_out_of_range(words: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="not in"):
        derive_key(*words)


@pytest.mark.parametrize("n", [0, -1, MAX_DOMAIN + 1])
def test_size_out_of_range(n: int) -> None:
    with pytest.raises(ConfigError, match="size"):
        permute(np.zeros(1, dtype=np.int64), n, derive_key(0, 1, 1))


@pytest.mark.parametrize("position", [-1, 10])
def test_position_out_of_range(position: int) -> None:
    with pytest.raises(ConfigError, match="outside"):
        permute(np.array([0, position], dtype=np.int64), 10, derive_key(0, 1, 1))


@pytest.mark.parametrize("positions", [np.zeros(2), np.zeros((1, 2), dtype=np.int64)])
def test_positions_of_another_form(positions: NDArray[np.int64]) -> None:
    with pytest.raises(ConfigError, match="1-D integer"):
        permute(positions, 10, derive_key(0, 1, 1))


@pytest.mark.parametrize(("n", "trials"), [(2, 400), (3, 1000), (4, 2000), (5, 4000)])
def test_all_orders_of_few_elements_are_equally_likely(n: int, trials: int) -> None:
    orders = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    counts = np.zeros(len(orders))
    for seed in range(trials):
        counts[orders[tuple(permute(np.arange(n), n, derive_key(seed, 1, 1)).tolist())]] += 1
    assert chi_square_score(counts, trials / len(orders), len(orders) - 1) < 4


@pytest.mark.parametrize(("n", "k", "rounds"), [(5000, 500, 150), (100_000, 4000, 60), (25_000_000, 20_000, 30)])
def test_uniform_and_independent(n: int, k: int, rounds: int) -> None:
    """Where images lie, where neighbours' images lie, their low bits, and how successive rounds relate."""
    cells = 32
    single, serial, low, across = (np.zeros(shape) for shape in (cells, (cells, cells), (16, 16), (cells, cells)))
    before: NDArray[np.int64] | None = None
    for number in range(1, rounds + 1):
        images = permute(np.arange(k), n, derive_key(3, 1, number))
        cell = images * cells // n
        single += np.bincount(cell, minlength=cells)
        np.add.at(serial, (cell[:-1], cell[1:]), 1)
        np.add.at(low, (images[:-1] % 16, images[1:] % 16), 1)
        if before is not None:
            np.add.at(across, (before, cell), 1)
        before = cell
    for counts in (single, serial, low, across):
        assert abs(chi_square_score(counts, counts.sum() / counts.size, counts.size - 1)) < 4


def test_successive_selections_overlap_as_chance_has_it() -> None:
    n, k, rounds = 100_000, 5000, 100
    sets = [permute(np.arange(k), n, derive_key(11, 1, r)) for r in range(rounds)]
    overlaps = [np.intersect1d(a, b).size for a, b in itertools.pairwise(sets)]
    mean = k * k / n
    deviation = math.sqrt(mean) * (1 - k / n)  # hypergeometric
    assert abs(float(np.mean(overlaps)) - mean) < 4 * deviation / math.sqrt(len(overlaps))
    assert 0.6 * deviation < float(np.std(overlaps)) < 1.5 * deviation
