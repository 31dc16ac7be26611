"""Which coordinates a round carries: a pure function of the seed and the round, the same on every machine.

`random` is the paper's uniform K-subset. `sweep` cuts a fresh permutation per sweep into ceil(d/K) slices,
one a round, so that every coordinate goes out exactly once per sweep. `block` is `random` on runs of 64
neighbours, which gathers and scatters faster. `all` is everything, `head` and `tail` are the first and the
last K coordinates. `topk` depends on a worker's own values and is chosen with `top_k`.

The algorithm is written down for other languages, with test vectors, in `docs/selection.md`.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loscar_core.errors import ConfigError, MalformedError, NonFiniteError
from loscar_core.permutation import (
    MAX_DOMAIN,
    SELECTION_ALGORITHM_VERSION,
    Purpose,
    derive_key,
    permute,
)

BLOCK_SIZE: Final = 64

_MAX_UINT64: Final = (1 << 64) - 1
_MAGNITUDE_MASK: Final = np.uint32(0x7FFFFFFF)
_INFINITY_BITS: Final = 0x7F800000
# From here on, and for a small share of the values, top_k first discards what a sample shows to be too small.
_SAMPLED_FROM: Final = 1 << 16
_SAMPLE_STRIDE: Final = 61
# So many values are widened to be counted; more than there are numbers to count.
_COUNTED_AT_A_TIME: Final = 1 << 20
# A dense enough selection is put in order by a mask of the whole range, of at most so many bytes per index.
_BYTES_PER_INDEX: Final = 32


class SelectionKind(Enum):
    """How a round's coordinates are chosen; the values are those of the command line."""

    RANDOM = "random"
    SWEEP = "sweep"
    BLOCK = "block"
    TOPK = "topk"
    ALL = "all"
    HEAD = "head"
    TAIL = "tail"


# The numbers that enter the checksum; part of the written algorithm.
_CODES: Final = {
    SelectionKind.RANDOM: 1,
    SelectionKind.SWEEP: 2,
    SelectionKind.BLOCK: 3,
    SelectionKind.TOPK: 4,
    SelectionKind.ALL: 5,
    SelectionKind.HEAD: 6,
    SelectionKind.TAIL: 7,
}


def count_for(density: float, dimension: int) -> int:
    """K = max(1, round(density * dimension)): the coordinates of a round; half a coordinate rounds to even.

    Raises ConfigError for a density outside (0, 1] (NaN included) or a dimension outside [1, 2^40].
    """
    _check_dimension(dimension)
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"density {density} is not in (0, 1]")
    return min(dimension, max(1, round(density * dimension)))


def sweep_length(dimension: int, count: int) -> int:
    """Rounds of one sweep: ceil(dimension / count). Raises ConfigError like `select`."""
    _check_dimension(dimension)
    _check_count(count, dimension)
    return -(-dimension // count)


def select(kind: SelectionKind, seed: int, round: int, dimension: int, count: int) -> NDArray[np.int64]:
    """The coordinates of `round` (from 1): a new int64 array, strictly increasing, all in [0, dimension).

    `count` is K as from `count_for`. `random` yields exactly K; `sweep` dimension // L or one more, never
    above K, with L = `sweep_length`; `block` (K + 32) // 64 runs, at least one, of which the model's last
    may be short; `all` yields every coordinate and ignores K. Memory is O(result) and time O(result) and a
    sort, whatever the dimension.

    Raises ConfigError for `topk` (each worker chooses its own, see `top_k`), a dimension outside [1, 2^40],
    a count outside [1, dimension], a round outside [1, 2^64) or a seed outside [0, 2^64).
    """
    _check(seed, round, dimension, count)
    match kind:
        case SelectionKind.ALL:
            return np.arange(dimension, dtype=np.int64)
        case SelectionKind.RANDOM:
            return _permuted(0, count, dimension, seed, Purpose.RANDOM, round)
        case SelectionKind.SWEEP:
            sweep, start, stop = _sweep_slice(round, dimension, count)
            return _permuted(start, stop, dimension, seed, Purpose.SWEEP, sweep)
        case SelectionKind.BLOCK:
            runs = _blocks(seed, round, dimension, count)
            offsets = np.arange(BLOCK_SIZE, dtype=np.int64)
            coordinates = (runs[:, np.newaxis] * BLOCK_SIZE + offsets).reshape(-1)
            # Sorted, so that only the last run can be the model's short one.
            excess = max(0, (int(runs[-1]) + 1) * BLOCK_SIZE - dimension)
            return coordinates[: coordinates.size - excess]
        case SelectionKind.HEAD:
            return np.arange(count, dtype=np.int64)
        case SelectionKind.TAIL:
            return np.arange(dimension - count, dimension, dtype=np.int64)
        case SelectionKind.TOPK:
            raise ConfigError("selection topk depends on a worker's values: no seed yields it")


def selection_size(kind: SelectionKind, seed: int, round: int, dimension: int, count: int) -> int:
    """`select(...).size` without making the selection; for `topk`, `count`: what each worker contributes.

    Constant time, except for `block` on a dimension that is no multiple of 64: there it depends on the seed
    whether the short run is among the chosen, and O(K / 64) time finds out. Raises ConfigError like
    `select`, `topk` apart.
    """
    _check(seed, round, dimension, count)
    match kind:
        case SelectionKind.ALL:
            return dimension
        case SelectionKind.RANDOM | SelectionKind.TOPK | SelectionKind.HEAD | SelectionKind.TAIL:
            return count
        case SelectionKind.SWEEP:
            _, start, stop = _sweep_slice(round, dimension, count)
            return stop - start
        case SelectionKind.BLOCK:
            runs = _block_count(dimension, count)
            last = (dimension - 1) // BLOCK_SIZE
            missing = (last + 1) * BLOCK_SIZE - dimension
            if missing and int(_blocks(seed, round, dimension, count)[-1]) == last:
                return runs * BLOCK_SIZE - missing
            return runs * BLOCK_SIZE


def selection_checksum(kind: SelectionKind, seed: int, round: int, dimension: int, count: int) -> int:
    """32-bit checksum of what determines a selection, the algorithm's version included; constant time.

    The CRC-32 (zlib's) of the little-endian bytes of uint32 version, uint32 code of the kind (random 1,
    sweep 2, block 3, topk 4, all 5, head 6, tail 7), uint64 seed, round, dimension,
    count. Raises ConfigError like `select`, `topk` apart.
    """
    _check(seed, round, dimension, count)
    words = (SELECTION_ALGORITHM_VERSION, _CODES[kind], seed, round, dimension, count)
    return zlib.crc32(struct.pack("<IIQQQQ", *words))


def indices_checksum(indices: NDArray[np.int64]) -> int:
    """CRC-32 (zlib's) of the indices as little-endian int64 bytes, in the order given."""
    return zlib.crc32(np.ascontiguousarray(indices, dtype="<i8").data.cast("B") if indices.size else b"")


def top_k(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The positions of the `count` largest magnitudes among `values`, sorted ascending, as int64.

    `values`: 1-D float32. Equal magnitudes at the boundary are taken from the lowest position up, so the
    result is a function of the values alone. Zeros of either sign are equal.

    Raises ConfigError for a count outside [1, len(values)], MalformedError unless `values` is 1-D float32,
    and NonFiniteError for NaN or infinity.
    """
    if values.ndim != 1 or values.dtype != np.float32:
        raise MalformedError(f"values must be 1-D float32, not {values.ndim}-D {values.dtype.name}")
    if not 1 <= count <= values.size:
        raise ConfigError(f"top-k count {count} is not in [1, {values.size}]")
    # Without the sign, the bits of floats order as integers do, NaN and infinity above all others.
    magnitudes = np.ascontiguousarray(values).view(np.uint32) & _MAGNITUDE_MASK
    if int(magnitudes.max()) >= _INFINITY_BITS:
        raise NonFiniteError("NaN or infinity among the values of a top-k selection")
    candidates = _large_candidates(magnitudes, count)
    if candidates is not None:
        magnitudes = magnitudes[candidates]
    threshold = _nth_largest(magnitudes, count)
    above = np.flatnonzero(magnitudes > threshold)
    chosen = np.concatenate([above, _first_equal(magnitudes, threshold, count - above.size)])
    chosen.sort(kind="stable")  # which merges runs that are in order already
    chosen = chosen if candidates is None else candidates[chosen]
    return chosen.astype(np.int64, copy=False)


def union(selections: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """All indices that are in any of the `selections` (each 1-D int64, sorted), sorted, without repeats.

    An empty sequence gives an empty array. A new array, unless there is a single selection.
    """
    filled = [selection for selection in selections if selection.size]
    if not filled:
        return np.empty(0, dtype=np.int64)
    if len(filled) == 1:
        return filled[0]
    merged = np.concatenate(filled)
    # NumPy's stable sort of int64 merges runs that are in order already.
    merged.sort(kind="stable")
    fresh = np.empty(merged.size, dtype=np.bool_)
    fresh[0] = True
    np.not_equal(merged[1:], merged[:-1], out=fresh[1:])
    return merged[fresh]


def _permuted(start: int, stop: int, n: int, seed: int, purpose: Purpose, number: int) -> NDArray[np.int64]:
    """The sorted images of the positions [start, stop) under one of the seed's permutations of [0, n)."""
    if stop - start == n:
        return np.arange(n, dtype=np.int64)
    images = permute(np.arange(start, stop, dtype=np.int64), n, derive_key(seed, purpose, number))
    if images.size >= n // _BYTES_PER_INDEX:
        # Two to six times as fast as sorting, and still O(K) memory.
        mask = np.zeros(n, dtype=np.bool_)
        mask[images] = True
        return np.flatnonzero(mask).astype(np.int64, copy=False)
    if n <= 1 << 32:
        # Sorting half as many bytes takes little more than half the time.
        narrow = images.astype(np.uint32)
        narrow.sort()
        return narrow.astype(np.int64)
    images.sort()
    return images


def _sweep_slice(round: int, dimension: int, count: int) -> tuple[int, int, int]:
    """(sweep from 0, first position, position after the last) of a round in its sweep's permutation."""
    length = -(-dimension // count)
    sweep, part = divmod(round - 1, length)
    return sweep, part * dimension // length, (part + 1) * dimension // length


def _block_count(dimension: int, count: int) -> int:
    total = -(-dimension // BLOCK_SIZE)
    return min(total, max(1, (count + BLOCK_SIZE // 2) // BLOCK_SIZE))


def _blocks(seed: int, round: int, dimension: int, count: int) -> NDArray[np.int64]:
    """The chosen runs' numbers, sorted."""
    total = -(-dimension // BLOCK_SIZE)
    return _permuted(0, _block_count(dimension, count), total, seed, Purpose.BLOCK, round)


def _large_candidates(magnitudes: NDArray[np.uint32], count: int) -> NDArray[np.int64] | None:
    """Positions that surely hold the `count` largest, sorted; None where looking for them would not pay.

    Everything at or above some value is a superset of the top as soon as there are `count` of it, so a bad
    sample costs time, never the result. Four standard deviations above the expected share, it is rarely bad.
    """
    if magnitudes.size < _SAMPLED_FROM or count > magnitudes.size // 8:
        return None
    sample = magnitudes[::_SAMPLE_STRIDE]
    share = count * sample.size // magnitudes.size
    kept = share + 4 * math.isqrt(share) + 16
    if kept >= sample.size:
        return None
    floor = _nth_largest(sample, kept)
    if not floor:
        return None  # most values are 0: nothing would be passed over
    candidates = np.flatnonzero(magnitudes >= floor)
    return candidates.astype(np.int64, copy=False) if candidates.size >= count else None


def _first_equal(magnitudes: NDArray[np.uint32], value: np.uint32, count: int) -> NDArray[np.int64]:
    """The lowest `count` positions of a value, of which there are as many, sorted."""
    found: list[NDArray[np.int64]] = []
    start = 0
    while count > 0:
        here = np.flatnonzero(magnitudes[start : start + _COUNTED_AT_A_TIME] == value)[:count]
        found.append(here + start)
        count -= here.size
        start += _COUNTED_AT_A_TIME
    return np.concatenate(found)


def _nth_largest(magnitudes: NDArray[np.uint32], count: int) -> np.uint32:
    """The `count`-th largest, below 2^31: counted by its upper and then by its lower half, so that the time is linear
    whatever the values are. Partitioning slows down by orders of magnitude where most of them are equal."""
    upper, left = _nth_of_counts(_counts(magnitudes, 16), count)
    bucket = magnitudes[magnitudes >> np.uint32(16) == upper]
    bucket &= np.uint32(0xFFFF)
    lower, _ = _nth_of_counts(_counts(bucket, 0), left)
    return np.uint32(upper << 16 | lower)


def _counts(values: NDArray[np.uint32], shift: int) -> NDArray[np.int64]:
    """How often each of the 2^16 numbers occurs among the shifted values."""
    counts = np.zeros(1 << 16, np.int64)
    for start in range(0, values.size, _COUNTED_AT_A_TIME):
        piece = values[start : start + _COUNTED_AT_A_TIME] >> np.uint32(shift)
        counts += np.bincount(piece, minlength=1 << 16)
    return counts


def _nth_of_counts(counts: NDArray[np.int64], count: int) -> tuple[int, int]:
    """The number that the `count`-th largest value has, and the how-manieth of that number it is."""
    from_top = np.cumsum(counts[::-1])
    at = int(np.searchsorted(from_top, count))
    return counts.size - 1 - at, count - int(from_top[at] - counts[counts.size - 1 - at])


def _check(seed: int, round: int, dimension: int, count: int) -> None:
    _check_dimension(dimension)
    _check_count(count, dimension)
    if not 1 <= round <= _MAX_UINT64:
        raise ConfigError(f"round {round} is not in [1, 2^64)")
    if not 0 <= seed <= _MAX_UINT64:
        raise ConfigError(f"seed {seed} is not in [0, 2^64)")


def _check_dimension(dimension: int) -> None:
    if not 1 <= dimension <= MAX_DOMAIN:
        raise ConfigError(f"dimension {dimension} is not in [1, 2^40]")


def _check_count(count: int, dimension: int) -> None:
    if not 1 <= count <= dimension:
        raise ConfigError(f"count {count} is not in [1, {dimension}]")
