"""Explicit indices: round trips, size against the entropy, and no mercy for malformed payloads."""

from __future__ import annotations

import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loscar_core.errors import MalformedError
from loscar_core.indices import MAX_SPAN, IndexCoding, decode_indices, encode_indices

BOTH = list(IndexCoding)


def array(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def entropy_bits(span: int, count: int) -> float:
    """log2 of the number of ways to choose `count` of `span`."""
    chosen = math.lgamma(span + 1) - math.lgamma(count + 1) - math.lgamma(span - count + 1)
    return chosen / math.log(2)


@st.composite
def index_sets(draw: st.DrawFn) -> tuple[NDArray[np.int64], int]:
    span = draw(st.one_of(st.integers(1, 300), st.integers(1, MAX_SPAN)))
    members = draw(st.sets(st.integers(0, span - 1), max_size=50))
    return np.array(sorted(members), dtype=np.int64), span


@settings(max_examples=60, deadline=None)
@given(case=index_sets(), coding=st.sampled_from(BOTH))
def test_round_trip(case: tuple[NDArray[np.int64], int], coding: IndexCoding) -> None:
    indices, span = case
    payload = encode_indices(indices, span, coding)
    for data in (payload, memoryview(bytearray(b"x" + payload))[1:]):
        decoded = decode_indices(data, indices.size, span, coding)
        assert decoded.dtype == np.int64
        assert decoded.tolist() == indices.tolist()


@pytest.mark.parametrize("coding", BOTH)
@pytest.mark.parametrize(
    "indices",
    [
        array(),
        array(0),
        array(MAX_SPAN - 1),
        array(0, MAX_SPAN - 1),
        np.arange(1000, dtype=np.int64),
        np.arange(0, 1 << 20, 77, dtype=np.int64) + (1 << 31),
        np.concatenate([np.arange(500), array(MAX_SPAN - 3), np.arange(MAX_SPAN - 2, MAX_SPAN)]),
    ],
    ids=["none", "first", "last", "both-ends", "dense", "even", "clusters"],
)
def test_extremes(indices: NDArray[np.int64], coding: IndexCoding) -> None:
    payload = encode_indices(indices, MAX_SPAN, coding)
    assert np.array_equal(decode_indices(payload, indices.size, MAX_SPAN, coding), indices)


def test_plain_is_little_endian_uint32() -> None:
    assert encode_indices(array(1, 258, MAX_SPAN - 1), MAX_SPAN, IndexCoding.PLAIN) == struct.pack(
        "<3I", 1, 258, MAX_SPAN - 1
    )


@pytest.mark.parametrize(
    ("indices", "payload"),
    [
        # Gaps 0, 0, 0, 0: parameter 0, four one bits.
        (array(0, 1, 2, 3), bytes([0, 0b1111])),
        # Gaps 1, 2, 0: parameter 0, the bitmap of the indices.
        (array(1, 4, 5), bytes([0, 0b110010])),
        # Gaps 5, 6, 4: parameter 2; low bits 1, 2, 0 in two planes; quotients 1, 1, 1.
        (array(5, 12, 17), bytes([2, 0b001, 0b010, 0b101010])),
        # The gap 1000: parameter 9 is 1 of its 2^9, so one low byte and one plane.
        (array(1000), bytes([9, 1000 & 0xFF, (1000 >> 8) & 1, 0b10])),
    ],
)
def test_gap_coding_by_hand(indices: NDArray[np.int64], payload: bytes) -> None:
    assert encode_indices(indices, 2000) == payload
    assert decode_indices(payload, indices.size, 2000).tolist() == indices.tolist()


@pytest.mark.parametrize(
    ("density", "limit"), [(1e-4, 1.05), (1e-3, 1.03), (1e-2, 1.02), (0.05, 1.02), (0.1, 1.02), (0.5, 1.01)]
)
def test_close_to_the_entropy(density: float, limit: float) -> None:
    span = 1 << 22
    count = int(span * density)
    indices = np.sort(np.random.default_rng(5).choice(span, count, replace=False)).astype(np.int64)
    payload = encode_indices(indices, span)
    assert np.array_equal(decode_indices(payload, count, span), indices)
    assert 8 * len(payload) <= limit * entropy_bits(span, count)


def written_out(gaps: list[int], parameter: int) -> bytes:
    """The coding as the module's text describes it, bit by bit."""
    whole = parameter // 8
    fields = [bytes([parameter]), *(bytes(gap >> 8 * plane & 0xFF for gap in gaps) for plane in range(whole))]
    planes = [[gap >> bit & 1 for gap in gaps] for bit in range(8 * whole, parameter)]
    for bits in (*planes, [bit for gap in gaps for bit in (*([0] * (gap >> parameter)), 1)]):
        number = sum(bit << place for place, bit in enumerate(bits))
        fields.append(number.to_bytes(-(-len(bits) // 8), "little"))
    return b"".join(fields)


@pytest.mark.parametrize("mean", [0.3, 3, 90, 9000])
@pytest.mark.parametrize("count", [8191, 8192, 8193, 16390])
def test_blocks_are_coded_as_the_whole(count: int, mean: float) -> None:
    gaps = np.random.default_rng(count).geometric(1 / (1 + mean), count) - 1
    gaps[count // 2] = 100_000
    indices = np.cumsum(gaps + 1) - 1
    payload = encode_indices(indices, MAX_SPAN)
    assert payload == written_out(gaps.tolist(), payload[0])
    assert np.array_equal(decode_indices(payload, count, MAX_SPAN), indices)
    for wrong in (payload[: -len(payload) // 4], payload + b"\1"):
        with pytest.raises(MalformedError):
            decode_indices(wrong, count, MAX_SPAN)


def test_clustered_indices_take_less_than_scattered_ones() -> None:
    rng = np.random.default_rng(6)
    clustered = np.unique((rng.integers(0, 40, 4000) << 15) + rng.integers(0, 400, 4000)).astype(np.int64)
    payload = encode_indices(clustered, 1 << 22)
    assert np.array_equal(decode_indices(payload, clustered.size, 1 << 22), clustered)
    assert 8 * len(payload) < 0.95 * entropy_bits(1 << 22, clustered.size)


@settings(max_examples=50, deadline=None)
@given(gaps=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 1 << 24)), min_size=1, max_size=60))
def test_the_parameter_is_the_best(gaps: list[int]) -> None:
    indices = np.cumsum(np.array(gaps, dtype=np.int64) + 1) - 1
    parameter = encode_indices(indices, MAX_SPAN)[0]
    sizes = [len(gaps) * (r + 1) + sum(gap >> r for gap in gaps) for r in range(32)]
    assert parameter == sizes.index(min(sizes))


# --- refusals


@pytest.mark.parametrize("coding", BOTH)
@pytest.mark.parametrize(
    "indices", [array(-1, 2), array(2, 10), array(3, 3), array(4, 2), array(0, 7, 6, 9), array(1, -2, 3)]
)
def test_encoding_refuses_bad_indices(indices: NDArray[np.int64], coding: IndexCoding) -> None:
    with pytest.raises(MalformedError, match=r"outside|increasing"):
        encode_indices(indices, 10, coding)


@pytest.mark.parametrize("indices", [np.zeros((1, 1), dtype=np.int64), np.zeros(1, dtype=np.int32), np.zeros(1)])
def test_encoding_refuses_other_arrays(indices: NDArray[np.int64]) -> None:
    with pytest.raises(MalformedError, match="1-D int64"):
        encode_indices(indices, 10)


@pytest.mark.parametrize("coding", BOTH)
@pytest.mark.parametrize("span", [0, -1, MAX_SPAN + 1])
def test_span_out_of_range(span: int, coding: IndexCoding) -> None:
    with pytest.raises(MalformedError, match="span"):
        encode_indices(array(0), span, coding)
    with pytest.raises(MalformedError, match="span"):
        decode_indices(b"\0\1", 1, span, coding)


@pytest.mark.parametrize("coding", BOTH)
def test_counts_that_cannot_be(coding: IndexCoding) -> None:
    with pytest.raises(MalformedError, match="count"):
        decode_indices(b"", -1, 10, coding)
    with pytest.raises(MalformedError, match="count"):
        decode_indices(bytes(44), 11, 10, coding)
    with pytest.raises(MalformedError, match="no bytes"):
        decode_indices(b"\0", 0, 10, coding)
    payload = encode_indices(array(1, 5, 8), 10, coding)
    for count in (2, 4):
        with pytest.raises(MalformedError):
            decode_indices(payload, count, 10, coding)


@pytest.mark.parametrize(
    ("values", "message"),
    [((1, 1), "increasing"), ((5, 2), "increasing"), ((1, 10), "outside"), ((12, 3), "increasing")],
)
def test_plain_refuses_order_and_range(values: tuple[int, int], message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        decode_indices(struct.pack("<2I", *values), 2, 10, IndexCoding.PLAIN)


@pytest.mark.parametrize("size", [0, 7, 9, 12])
def test_plain_refuses_a_wrong_length(size: int) -> None:
    with pytest.raises(MalformedError, match="bytes"):
        decode_indices(bytes(size), 2, 10, IndexCoding.PLAIN)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "parameter"),
        (bytes([32, 1, 1, 1, 1, 0b111]), "parameter"),
        (bytes([255, 0b111]), "parameter"),
        (bytes([2, 0b001, 0b010]), "cannot hold"),
        (bytes([2, 0b001, 0b010, 0b101010, 0, 1]), "cannot hold"),
        (bytes([2, 0b001, 0b010, 0b101000]), "2 of 3"),
        (bytes([2, 0b001, 0b010, 0b111010]), "4 of 3"),
        (bytes([2, 0b001, 0b1010, 0b101010]), "padding"),
        (bytes([2, 0b10000001, 0b010, 0b101010]), "padding"),
        (bytes([2, 0b111, 0b111, 0b1101000]), "outside"),
    ],
)
def test_gaps_refuse_malformed_payloads(payload: bytes, message: str) -> None:
    assert decode_indices(bytes([2, 0b001, 0b010, 0b101010]), 3, 18).tolist() == [5, 12, 17]
    with pytest.raises(MalformedError, match=message):
        decode_indices(payload, 3, 18)


def test_gaps_end_with_their_last_index() -> None:
    # The same indices with a byte more would be a second payload for one selection.
    with pytest.raises(MalformedError, match="empty byte"):
        decode_indices(bytes([2, 0b001, 0b010, 0b101010, 0]), 3, 2000)


@settings(max_examples=100, deadline=None)
@given(
    payload=st.one_of(
        st.binary(max_size=40),
        st.builds(lambda r, rest: bytes([r]) + rest, st.integers(0, 31), st.binary(max_size=40)),
    ),
    count=st.integers(0, 60),
    span=st.one_of(st.integers(1, 500), st.integers(1, MAX_SPAN)),
    coding=st.sampled_from(BOTH),
)
def test_garbage_is_refused_or_is_valid(payload: bytes, count: int, span: int, coding: IndexCoding) -> None:
    try:
        indices = decode_indices(payload, count, span, coding)
    except MalformedError:
        return
    assert indices.size == count
    assert np.all(np.diff(indices) > 0)
    assert not count or (indices[0] >= 0 and indices[-1] < span)


@settings(max_examples=50, deadline=None)
@given(case=index_sets(), data=st.data())
def test_a_flipped_bit_never_gives_bad_indices(case: tuple[NDArray[np.int64], int], data: st.DataObject) -> None:
    indices, span = case
    payload = bytearray(encode_indices(indices, span))
    if not payload:
        return
    bit = data.draw(st.integers(0, 8 * len(payload) - 1))
    payload[bit // 8] ^= 1 << (bit % 8)
    try:
        decoded = decode_indices(bytes(payload), indices.size, span)
    except MalformedError:
        return
    assert decoded.tolist() != indices.tolist()
    assert np.all(np.diff(decoded) > 0)
    assert decoded[0] >= 0
    assert decoded[-1] < span


@pytest.mark.parametrize("parameter", [0, 7, 31])
def test_garbage_takes_little_memory(parameter: int) -> None:
    tracemalloc.start()
    try:
        for count in (1, 1000, MAX_SPAN):
            for fill in (b"\xff", b"\0", b"\1"):
                with pytest.raises(MalformedError):
                    decode_indices(bytes([parameter]) + fill * 10_000, count, MAX_SPAN)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
