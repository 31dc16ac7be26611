"""Messages of a part whose sender has chosen the coordinates: they come back as they were sent, and nothing else is
taken for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loscar_core.errors import LoscarError, MalformedError, NonFiniteError
from loscar_core.indices import IndexCoding, encode_indices
from loscar_core.messages import Answer
from loscar_core.plan import EXPLICIT_SPAN, Part
from loscar_core.sparse_delta import CODING, SparsePart, SparseSlice, sparse_slices
from loscar_core.values import ValueType, decode, encode

PART = Part(1, EXPLICIT_SPAN, 2 * EXPLICIT_SPAN - 5)


def chosen(count: int, seed: int = 0, part: Part = PART) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.choice(part.size, count, replace=False)).astype(np.int64) + part.start
    return indices, rng.normal(size=count).astype(np.float32)


def message(piece: SparseSlice, part: Part = PART) -> Answer:
    return Answer(1, part.index, piece.offset, piece.values, b"", piece.indices, piece.base, CODING, piece.total)


def received(pieces: list[SparseSlice], kind: ValueType, part: Part = PART) -> tuple[np.ndarray, np.ndarray]:
    found = SparsePart(part, kind, pieces[0].total)
    for piece in pieces:
        assert not found.whole
        found.add(message(piece, part))
    assert found.whole
    return found.joined()


@pytest.mark.parametrize("kind", list(ValueType))
@pytest.mark.parametrize(("count", "message_bytes"), [(0, 4096), (1, 4096), (700, 1), (5000, 4096), (5000, 1 << 18)])
def test_a_part_comes_back_as_it_was_sent(kind: ValueType, count: int, message_bytes: int) -> None:
    indices, values = chosen(count)
    pieces = list(sparse_slices(PART, indices, values, kind, message_bytes))
    assert [p.offset for p in pieces] == list(np.cumsum([0, *(p.count for p in pieces)]))[:-1]
    assert sum(p.count for p in pieces) == count
    assert all(len(p.values) + len(p.indices) <= message_bytes for p in pieces) or message_bytes == 1
    found, decoded = received(pieces, kind)
    np.testing.assert_array_equal(found, indices)
    assert found.dtype == np.int64
    wanted = [decode(encode(values[p.offset : p.offset + p.count], kind), kind, p.count) for p in pieces]
    assert decoded.tobytes() == np.concatenate(wanted).tobytes()


def test_the_distance_to_the_part_s_beginning_costs_nothing() -> None:
    """Each message counts from the one before it."""
    indices, values = chosen(200_000)
    pieces = list(sparse_slices(PART, indices, values, ValueType.INT8, 1 << 13))
    whole = len(encode_indices(indices - PART.start, PART.size))
    assert len(pieces) > 20
    assert sum(len(p.indices) for p in pieces) < 1.01 * whole


def test_a_part_of_everything_takes_a_bit_a_coordinate() -> None:
    part = Part(0, 0, 10_000)
    (piece,) = sparse_slices(part, np.arange(10_000), np.ones(10_000, np.float32), ValueType.FLOAT32, 1 << 20)
    assert len(piece.indices) == 1 + 10_000 // 8
    assert received([piece], ValueType.FLOAT32, part)[0].size == 10_000


def test_what_is_no_selection_is_not_sent() -> None:
    indices, values = chosen(20)
    for bad in (indices[::-1].copy(), indices - 2 * EXPLICIT_SPAN, indices + EXPLICIT_SPAN, np.repeat(indices, 2)[:20]):
        with pytest.raises(MalformedError):
            list(sparse_slices(PART, bad, values, ValueType.FLOAT32, 4096))


INDICES, VALUES = chosen(1024)
FIRST, SECOND = sparse_slices(PART, INDICES, VALUES, ValueType.FLOAT32, 3500)
BENT: dict[str, Callable[[Answer], Answer]] = {
    "without coordinates": lambda m: replace(m, coding=None),
    "another coding": lambda m: replace(m, coding=IndexCoding.PLAIN),
    "another total": lambda m: replace(m, total=m.total + 1),
    "another offset": lambda m: replace(m, offset=m.offset + 1),
    "an earlier base": lambda m: replace(m, base=m.base - 1),
    "a later base": lambda m: replace(m, base=m.base + 1),
    "the part's base": lambda m: replace(m, base=0),
    "too few values": lambda m: replace(m, values=m.values[:-4]),
    "half a value": lambda m: replace(m, values=m.values[:-1]),
    "no values": lambda m: replace(m, values=b""),
    "nothing": lambda m: replace(m, values=b"", indices=b""),
    "too few indices": lambda m: replace(m, indices=m.indices[:-1]),
    "too many values": lambda m: replace(m, values=bytes(4 * 1024)),
    "out of range": lambda m: replace(m, indices=encode_indices(np.arange(512) + PART.size, 2 * PART.size)),
    "no room for the rest": lambda m: replace(
        m, indices=encode_indices(np.arange(PART.stop - 512, PART.stop) - m.base, PART.stop - m.base)
    ),
}


@pytest.mark.parametrize(
    ("what", "which"), [(what, 0) for what in BENT] + [(what, 1) for what in BENT if what != "no room for the rest"]
)
def test_a_bad_message_is_refused_and_changes_nothing(what: str, which: int) -> None:
    assert FIRST.count == 512
    found = SparsePart(PART, ValueType.FLOAT32, 1024)
    good = [message(FIRST), message(SECOND)]
    for earlier in good[:which]:
        found.add(earlier)
    with pytest.raises(MalformedError):
        found.add(BENT[what](good[which]))
    for later in good[which:]:
        found.add(later)
    np.testing.assert_array_equal(found.joined()[0], INDICES)
    assert found.joined()[1].tobytes() == VALUES.tobytes()
    with pytest.raises(MalformedError):
        found.add(good[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e31])
def test_values_beyond_all_bounds_are_refused(bad: float) -> None:
    values = VALUES[:512].copy()
    values[3] = bad
    found = SparsePart(PART, ValueType.FLOAT32, 1024, 1e30)
    with pytest.raises((NonFiniteError, MalformedError)):
        found.add(replace(message(FIRST), values=values.tobytes()))
    assert found.filled == 0


def test_indices_without_values_and_a_second_nothing() -> None:
    (nothing,) = sparse_slices(PART, INDICES[:0], VALUES[:0], ValueType.INT8, 4096)
    found = SparsePart(PART, ValueType.INT8, 0)
    assert not found.whole  # it has not been said yet
    with pytest.raises(MalformedError):
        found.add(replace(message(nothing), indices=b"\0\1"))
    with pytest.raises(MalformedError):
        found.add(replace(message(nothing), values=b"\0\0\0\0\1"))
    found.add(message(nothing))
    assert found.whole
    with pytest.raises(MalformedError):
        found.add(message(nothing))


@pytest.mark.parametrize("total", [-1, PART.size + 1, 1 << 63])
def test_more_than_there_are_coordinates_is_not_awaited(total: int) -> None:
    with pytest.raises(MalformedError):
        SparsePart(PART, ValueType.FLOAT32, total)


@settings(max_examples=200, deadline=None)
@given(
    values=st.binary(max_size=64),
    indices=st.binary(max_size=64),
    base=st.sampled_from([0, 1, 7, 40]),
    total=st.integers(0, 41),
    offset=st.integers(0, 3),
)
def test_garbage_is_refused_or_valid(values: bytes, indices: bytes, base: int, total: int, offset: int) -> None:
    part = Part(0, 0, 40)
    try:
        found = SparsePart(part, ValueType.FLOAT32, total)
        found.add(Answer(1, 0, offset, values, b"", indices, base, CODING, total))
    except LoscarError:
        return
    where, decoded = found.joined()
    assert where.size == decoded.size == found.filled <= total
    assert np.all(np.diff(where) > 0)
    assert not where.size or 0 <= where[0] <= where[-1] < part.stop
