"""A keyed pseudo-random permutation of [0, n), written down to the last bit.

Server and workers derive each round's selection from a seed, on machines with different NumPy versions, so
the algorithm may depend on no library's generator. It is an alternating (unbalanced) Feistel network over
2^b points, b = max(2, ceil(log2 n)), brought down to [0, n) by cycle walking: a result outside is permuted
again until it falls inside, which keeps the map a bijection (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", CT-RSA 2002). As 2^b < 2n for n > 2, an element is walked less than twice on average. No
half has more than 20 bits, so that all of the round function's arithmetic is modulo 2^32.

This is not a cipher: whoever knows a few outputs may be able to tell the others. It is statistically sound
and fast, which is all that a selection needs. `docs/selection.md` gives the same algorithm for other
languages, with test vectors. Any change of a result is a new SELECTION_ALGORITHM_VERSION.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loscar_core.errors import ConfigError

SELECTION_ALGORITHM_VERSION: Final = 1
MAX_DOMAIN: Final = 1 << 40
# Feistel rounds from SMALL_DOMAIN_BITS bits up, and below. Halves of a few bits mix slowly: with 12 rounds
# the 120 orders of five elements were measurably unequal, with 24 they pass, and so few elements cost
# nothing.
FEISTEL_ROUNDS: Final = 8
FEISTEL_ROUNDS_SMALL: Final = 24
SMALL_DOMAIN_BITS: Final = 16

_MASK32: Final = (1 << 32) - 1
_MASK64: Final = (1 << 64) - 1
# SplitMix64's increment (2^64 divided by the golden ratio) and finaliser, Stafford's "Mix13".
_GAMMA: Final = 0x9E3779B97F4A7C15
_MIX64_FIRST: Final = 0xBF58476D1CE4E5B9
_MIX64_SECOND: Final = 0x94D049BB133111EB
# The multipliers of Wellons' 32-bit finaliser "lowbias32".
_MIX32_FIRST: Final = np.uint32(0x7FEB352D)
_MIX32_SECOND: Final = np.uint32(0x846CA68B)
# Elements handled at a time: the four buffers of a chunk stay in a core's second-level cache.
_CHUNK: Final = 1 << 14


class Purpose(IntEnum):
    """What a permutation is for; one seed gives unrelated permutations for different purposes."""

    RANDOM = 1
    SWEEP = 2
    BLOCK = 3


@dataclass(frozen=True, slots=True)
class PermutationKey:
    """The round keys: per Feistel round one odd multiplier and one addend, each in [0, 2^32).

    There are FEISTEL_ROUNDS_SMALL of them; a domain of SMALL_DOMAIN_BITS or more uses the first
    FEISTEL_ROUNDS.
    """

    multipliers: tuple[int, ...]
    addends: tuple[int, ...]


def mix64(value: int) -> int:
    """SplitMix64's finaliser, a bijection of [0, 2^64); `value` is taken modulo 2^64.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants of
    Stafford's variant 13.
    """
    value &= _MASK64
    value = ((value ^ (value >> 30)) * _MIX64_FIRST) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX64_SECOND) & _MASK64
    return value ^ (value >> 31)


def derive_key(seed: int, purpose: int, number: int) -> PermutationKey:
    """The key of permutation `number` (a round, a sweep) for `purpose` under `seed`.

    The words are absorbed in the order purpose, seed, number into a state that starts as the algorithm's
    version: `state = mix64((state ^ word) + GAMMA)`; round key i (from 1) is `mix64(state + i * GAMMA)`,
    whose low half with bit 0 set is the multiplier and whose high half is the addend.

    Raises ConfigError unless all three are in [0, 2^64).
    """
    state = SELECTION_ALGORITHM_VERSION
    for name, word in (("purpose", int(purpose)), ("seed", int(seed)), ("number", int(number))):
        if not 0 <= word <= _MASK64:
            raise ConfigError(f"{name} {word} is not in [0, 2^64)")
        state = mix64((state ^ word) + _GAMMA)
    words = [mix64(state + i * _GAMMA) for i in range(1, FEISTEL_ROUNDS_SMALL + 1)]
    return PermutationKey(
        multipliers=tuple((word & _MASK32) | 1 for word in words),
        addends=tuple(word >> 32 for word in words),
    )


def domain_bits(n: int) -> int:
    """Bits b of the Feistel domain for [0, n): the smallest b >= 2 with 2^b >= n.

    Raises ConfigError unless 1 <= n <= 2^40.
    """
    if not 1 <= n <= MAX_DOMAIN:
        raise ConfigError(f"a permutation's size must be in [1, 2^40], not {n}")
    return max(2, (n - 1).bit_length())


def permute(positions: NDArray[np.int64] | NDArray[np.uint64], n: int, key: PermutationKey) -> NDArray[np.int64]:
    """The images of `positions` under the keyed permutation of [0, n).

    `positions`: 1-D integers in [0, n), any order, repeats allowed. Returns a new int64 array of the same
    length. Time and memory are O(len(positions)), whatever n is.

    Raises ConfigError for n outside [1, 2^40], positions that are not a 1-D integer array, or a position
    outside [0, n).
    """
    bits = domain_bits(n)
    if positions.ndim != 1 or positions.dtype.kind not in "iu":
        raise ConfigError(f"positions must be a 1-D integer array, not {positions.ndim}-D {positions.dtype.name}")
    if positions.size and (int(positions.min()) < 0 or int(positions.max()) >= n):
        raise ConfigError(f"a position lies outside [0, {n})")
    if n == 1:
        return np.zeros(positions.size, dtype=np.int64)
    images = _permute_domain(positions.astype(np.int64, copy=False), bits, key)
    # Only what fell outside is walked on. It ends: the walk follows a cycle that holds its start, which is
    # inside.
    outside = np.flatnonzero(images >= n)
    while outside.size:
        walked = _permute_domain(images[outside], bits, key)
        images[outside] = walked
        outside = outside[walked >= n]
    return images


def _permute_domain(points: NDArray[np.int64], bits: int, key: PermutationKey) -> NDArray[np.int64]:
    """One pass of the Feistel network over [0, 2^bits), as a new int64 array."""
    rounds = FEISTEL_ROUNDS if bits >= SMALL_DOMAIN_BITS else FEISTEL_ROUNDS_SMALL
    left_bits = bits // 2
    right_bits = bits - left_bits
    right_mask = (1 << right_bits) - 1
    images = np.empty(points.size, dtype=np.int64)
    size = min(_CHUNK, points.size)
    left_buffer = np.empty(size, dtype=np.uint32)
    right_buffer = np.empty(size, dtype=np.uint32)
    mixed_buffer = np.empty(size, dtype=np.uint32)
    shifted_buffer = np.empty(size, dtype=np.uint32)
    for start in range(0, points.size, _CHUNK):
        chunk = points[start : start + _CHUNK]
        image = images[start : start + _CHUNK]
        left, right = left_buffer[: chunk.size], right_buffer[: chunk.size]
        mixed, shifted = mixed_buffer[: chunk.size], shifted_buffer[: chunk.size]
        np.right_shift(chunk, right_bits, out=image)
        left[:] = image
        np.bitwise_and(chunk, right_mask, out=image)
        right[:] = image
        for index in range(rounds):
            multiplier, addend = key.multipliers[index], key.addends[index]
            if index % 2 == 0:
                _mix(right, multiplier, addend, 32 - left_bits, mixed, shifted)
                np.bitwise_xor(left, mixed, out=left)
            else:
                _mix(left, multiplier, addend, 32 - right_bits, mixed, shifted)
                np.bitwise_xor(right, mixed, out=right)
        image[:] = left
        np.left_shift(image, right_bits, out=image)
        np.bitwise_or(image, right, out=image)
    return images


def _mix(
    half: NDArray[np.uint32],
    multiplier: int,
    addend: int,
    drop: int,
    mixed: NDArray[np.uint32],
    shifted: NDArray[np.uint32],
) -> None:
    """The round function, into `mixed`: the top 32 - drop bits of a keyed 32-bit mix of `half`.

    Array arithmetic on uint32 wraps modulo 2^32, which is what is meant. The last product's top bits depend
    on all bits below them, so nothing is gained by mixing them down once more.
    """
    np.multiply(half, np.uint32(multiplier), out=mixed)
    np.add(mixed, np.uint32(addend), out=mixed)
    np.right_shift(mixed, np.uint32(16), out=shifted)
    np.bitwise_xor(mixed, shifted, out=mixed)
    np.multiply(mixed, _MIX32_FIRST, out=mixed)
    np.right_shift(mixed, np.uint32(15), out=shifted)
    np.bitwise_xor(mixed, shifted, out=mixed)
    np.multiply(mixed, _MIX32_SECOND, out=mixed)
    np.right_shift(mixed, np.uint32(drop), out=mixed)
