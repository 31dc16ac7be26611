"""Explicit indices on the wire: which coordinates of a part a top-k selection carries.

Indices are relative to their part's base, lie in [0, span) with span <= 2^32, and are strictly increasing.
`PLAIN` is an array of little-endian uint32. `GAPS` is Rice coding (R. F. Rice, "Some practical universal
noiseless coding techniques", JPL 1979) of g = index - previous - 1 (previous = -1 for the first), laid out
so that both ways are a few passes over arrays. With r = the parameter, q = g >> r:

    1 byte                          r, in [0, 31]
    r // 8 times count bytes        the lowest r - r % 8 bits of every g, as byte planes, lowest byte first
    r % 8 times ceil(count / 8)     the next bits, as bit planes, lowest first; element i is bit i % 8 of byte
                                    i // 8, counted from the least significant bit; padding bits are 0
    the rest                        for every g, q zero bits and a one bit, in the same order of bits; the
                                    last byte holds the last one bit; padding bits are 0

No indices are no bytes. For coordinates chosen at random, gaps are geometric and the code stays within 3 % of
log2 C(span, count) for densities of 1e-4 to 0.1; with r = 0 the last field is the bitmap of the selection.

A payload is checked before memory is taken for it, so garbage never costs more than its own length times
eight plus `count` indices, and `count` itself is checked against the length first.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loscar_core.errors import MalformedError

MAX_SPAN: Final = 1 << 32
_MAX_PARAMETER: Final = 31
# Indices that are worked on at a time: what one pass over them has written is still in the cache for the next.
# A multiple of 8, so that blocks begin with whole bytes of a bit plane.
_BLOCK: Final = 1 << 13
_STEPS: Final = np.arange(_BLOCK + 8, dtype=np.int64)


class IndexCoding(Enum):
    """How explicit indices travel."""

    PLAIN = "plain"
    GAPS = "gaps"


def encode_indices(indices: NDArray[np.int64], span: int, coding: IndexCoding = IndexCoding.GAPS) -> bytes:
    """The wire bytes of 1-D int64 `indices`, strictly increasing in [0, span).

    Raises MalformedError for other indices, or a span outside [1, 2^32].
    """
    _check_span(span)
    if indices.ndim != 1 or indices.dtype != np.int64:
        raise MalformedError(f"indices must be 1-D int64, not {indices.ndim}-D {indices.dtype.name}")
    if not indices.size:
        return b""
    if int(indices[0]) < 0 or int(indices[-1]) >= span:
        raise MalformedError(f"an index lies outside [0, {span})")
    # After this check of the ends, increasing order places all others inside as well.
    gaps = np.empty(indices.size, dtype=np.uint32)
    gaps[0] = indices[0]
    for start in range(1, indices.size, _BLOCK):
        stop = min(start + _BLOCK, indices.size)
        differences = indices[start:stop] - indices[start - 1 : stop - 1]
        if int(differences.min()) < 1:
            raise MalformedError("indices are not strictly increasing")
        np.subtract(differences, 1, out=gaps[start:stop], casting="unsafe")
    if coding is IndexCoding.PLAIN:
        return indices.astype("<u4").tobytes()
    return _encode_gaps(gaps)


def decode_indices(
    payload: bytes | memoryview, count: int, span: int, coding: IndexCoding = IndexCoding.GAPS
) -> NDArray[np.int64]:
    """The `count` indices of a payload: 1-D int64, strictly increasing in [0, span).

    Raises MalformedError for a payload that no indices have: a wrong length, an index out of range or out of
    order, a parameter above 31, padding bits that are set; also for a negative count or a span outside [1,
    2^32].
    """
    _check_span(span)
    raw = np.frombuffer(payload, dtype=np.uint8)
    if not 0 <= count <= span:
        raise MalformedError(f"a count of indices in [0, {span}) cannot be {count}")
    if count == 0:
        if raw.size:
            raise MalformedError(f"no indices take no bytes, not {raw.size}")
        return np.empty(0, dtype=np.int64)
    if coding is IndexCoding.GAPS:
        return _decode_gaps(raw, count, span)
    if raw.size != 4 * count:
        raise MalformedError(f"{count} plain indices take {4 * count} bytes, not {raw.size}")
    indices = raw.view("<u4").astype(np.int64)
    if int(indices[-1]) >= span:
        raise MalformedError(f"index {int(indices[-1])} lies outside [0, {span})")
    if not np.all(indices[1:] > indices[:-1]):
        raise MalformedError("indices are not strictly increasing")
    return indices


def _encode_gaps(gaps: NDArray[np.uint32]) -> bytes:
    parameter = _best_parameter(gaps)
    fields = [bytes((parameter,))]
    whole = parameter // 8
    octets = gaps.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
    fields.extend(octets[:, plane].tobytes() for plane in range(whole))
    if parameter % 8:
        top = np.ascontiguousarray(octets[:, whole])
        # A byte that is not zero is packed as a one bit.
        masks = (np.uint8(1 << bit) for bit in range(parameter % 8))
        fields.extend(np.packbits(top & mask, bitorder="little").tobytes() for mask in masks)
    fields.append(_encode_quotients(gaps, parameter))
    return b"".join(fields)


def _encode_quotients(gaps: NDArray[np.uint32], parameter: int) -> bytes:
    """The last field: for every gap as many zero bits as its quotient, and a one bit."""
    packed: list[bytes] = []
    begun, bits = 0, 0  # the byte that the last block left unfinished, and how many bits it has
    for start in range(0, gaps.size, _BLOCK):
        ends = np.cumsum(gaps[start : start + _BLOCK] >> np.uint32(parameter), dtype=np.int64)
        ends += _STEPS[bits : bits + ends.size]
        unary = np.zeros(int(ends[-1]) + 1, dtype=np.uint8)
        unary[ends] = 1
        octets = np.packbits(unary, bitorder="little")
        octets[0] |= begun
        bits = unary.size % 8
        begun = int(octets[-1]) if bits else 0
        packed.append(octets[: unary.size // 8].tobytes())
    if bits:
        packed.append(bytes((begun,)))
    return b"".join(packed)


def _best_parameter(gaps: NDArray[np.uint32]) -> int:
    """The Rice parameter with the fewest bits, n * (r + 1) + sum(g >> r) in all; the smaller one of equals.

    For geometric gaps of mean m it is about log2(m * ln 2). Clustered indices have heavier tails and want a
    smaller one, found by going down from the mean.
    """
    mean = int(gaps.sum(dtype=np.int64)) // gaps.size
    middle = max(0, mean.bit_length() - 1)

    def bits(parameter: int) -> int:
        quotients = sum(
            int((gaps[start : start + _BLOCK] >> np.uint32(parameter)).sum(dtype=np.int64))
            for start in range(0, gaps.size, _BLOCK)
        )
        return gaps.size * (parameter + 1) + quotients

    best, fewest = middle, bits(middle)
    # Exact, as the size is convex in r: going from r to r + 1 saves sum(ceil(q / 2)) - n bits, and q only
    # shrinks. At middle + 1 the quotients sum to less than n, so no larger parameter can be better.
    if middle < _MAX_PARAMETER and bits(middle + 1) < fewest:
        return middle + 1
    for parameter in range(middle - 1, -1, -1):
        if (size := bits(parameter)) > fewest:
            break
        best, fewest = parameter, size
    return best


def _decode_gaps(raw: NDArray[np.uint8], count: int, span: int) -> NDArray[np.int64]:
    parameter = int(raw[0]) if raw.size else -1
    if not 0 <= parameter <= _MAX_PARAMETER:
        raise MalformedError("coded indices lack a valid parameter")
    whole, planes, plane_size = parameter // 8, parameter % 8, -(-count // 8)
    unary_start = 1 + whole * count + planes * plane_size
    # The one bits, and a zero for each 2^r that the indices advance.
    most = -(-(count + ((span - 1) >> parameter)) // 8)
    fewest = plane_size
    if not unary_start + fewest <= raw.size <= unary_start + most:
        raise MalformedError(f"{raw.size} bytes cannot hold {count} indices in [0, {span})")
    if raw[-1] == 0:
        raise MalformedError("coded indices end in an empty byte")
    indices = _decode_ends(raw[unary_start:], count)
    _check_padding(raw, count, 1 + whole * count, planes)
    # With ends[i] = q_0 + .. + q_i + i, the indices are the running sum of the gaps plus i: the quotients'
    # share of it is (ends[i] - i) << r, and only the remainders are left to be summed up.
    total = 0
    for start in range(0, count, _BLOCK):
        block = indices[start : start + _BLOCK]
        steps = _STEPS[: block.size]
        block -= start
        block -= steps
        block <<= parameter
        block += steps
        if parameter:
            sums = np.cumsum(_remainders(raw, count, start, block.size, parameter), dtype=np.int64)
            block += sums
            block += start + total
            total += int(sums[-1])
        else:
            block += start
    if int(indices[-1]) >= span:
        raise MalformedError(f"index {int(indices[-1])} lies outside [0, {span})")
    return indices


def _check_padding(raw: NDArray[np.uint8], count: int, start: int, planes: int) -> None:
    """Raises MalformedError where one of the bit planes from `start` on has a bit set beyond the last element."""
    size = -(-count // 8)
    for plane in range(1, planes + 1):
        if int(raw[start + plane * size - 1]) >> (8 - (8 * size - count)):
            raise MalformedError("padding bits of coded indices are set")


def _decode_ends(field: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """Where the `count` one bits of the last field are. Raises MalformedError for another number of them."""
    ends = np.empty(count, dtype=np.int64)
    found = 0
    for start in range(0, field.size, _BLOCK // 4):
        unary = np.unpackbits(field[start : start + _BLOCK // 4], bitorder="little").view(np.bool_)
        here = np.flatnonzero(unary)
        if found + here.size <= count:
            np.add(here, 8 * start, out=ends[found : found + here.size])
        found += here.size
    if found != count:
        raise MalformedError(f"coded indices hold {found} of {count} indices")
    return ends


def _remainders(raw: NDArray[np.uint8], count: int, start: int, size: int, parameter: int) -> NDArray[np.uint32]:
    """The lowest `parameter` bits, at least one, of `size` gaps from the gap `start` on, a multiple of 8."""
    whole, planes = parameter // 8, parameter % 8
    remainders: NDArray[np.uint32] | None = None
    for plane in range(whole):
        at = 1 + plane * count + start
        octets = raw[at : at + size].astype(np.uint32)
        octets <<= np.uint32(8 * plane)
        remainders = octets if remainders is None else np.bitwise_or(remainders, octets, out=remainders)
    if planes:
        top: NDArray[np.uint8] | None = None
        for plane in range(planes):
            at = 1 + whole * count + plane * -(-count // 8) + start // 8
            bits = np.unpackbits(raw[at : at + -(-size // 8)], count=size, bitorder="little")
            bits <<= np.uint8(plane)
            top = bits if top is None else np.bitwise_or(top, bits, out=top)
        assert top is not None
        shifted = top.astype(np.uint32)
        shifted <<= np.uint32(8 * whole)
        remainders = shifted if remainders is None else np.bitwise_or(remainders, shifted, out=remainders)
    assert remainders is not None
    return remainders


def _check_span(span: int) -> None:
    if not 1 <= span <= MAX_SPAN:
        raise MalformedError(f"a span of indices must be in [1, 2^32], not {span}")
