"""Explicit slices of a sparse vector: they come back as they were sent, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loscar_core.errors import LoscarError, MalformedError
from loscar_core.indices import IndexCoding
from loscar_core.sparse_delta import EXPLICIT_SPAN, SparseSlice, decode_explicit, encode_explicit
from loscar_core.values import ValueType


def _sparse(dimension: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    indices = np.unique(rng.integers(0, dimension, count))
    return indices, rng.normal(size=indices.size).astype(np.float32)


@pytest.mark.parametrize("coding", list(IndexCoding))
@pytest.mark.parametrize("kind", [ValueType.FLOAT32, ValueType.BFLOAT16])
@pytest.mark.parametrize("dimension", [1, 1000, EXPLICIT_SPAN, 3 * EXPLICIT_SPAN + 5])
def test_round_trip(dimension: int, kind: ValueType, coding: IndexCoding) -> None:
    indices, values = _sparse(dimension, 500, dimension)
    slices = list(encode_explicit(indices, values, dimension, kind, coding))
    decoded = [decode_explicit(s, dimension, kind) for s in slices]
    np.testing.assert_array_equal(np.concatenate([i for i, _ in decoded]), indices)
    found = np.concatenate([v for _, v in decoded])
    np.testing.assert_allclose(found, values, rtol=0 if kind is ValueType.FLOAT32 else 2**-8)
    assert all(s.base % EXPLICIT_SPAN == 0 for s in slices)


def test_empty_spans_cost_nothing() -> None:
    indices = np.array([5, 2 * EXPLICIT_SPAN + 1], np.int64)
    slices = list(encode_explicit(indices, np.ones(2, np.float32), 3 * EXPLICIT_SPAN, ValueType.FLOAT32))
    assert [s.base for s in slices] == [0, 2 * EXPLICIT_SPAN]


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=64), st.binary(max_size=64), st.integers(-5, 2 * EXPLICIT_SPAN))
def test_garbage_is_refused_or_valid(values: bytes, indices: bytes, base: int) -> None:
    piece = SparseSlice(base, values, indices, IndexCoding.GAPS)
    try:
        found, decoded = decode_explicit(piece, EXPLICIT_SPAN + 7, ValueType.FLOAT32)
    except LoscarError:
        return
    assert found.size == decoded.size
    assert np.all(np.diff(found) > 0)
    assert not found.size or 0 <= found[0] <= found[-1] < EXPLICIT_SPAN + 7


def test_bad_slices() -> None:
    indices, values = _sparse(100, 20, 1)
    (piece,) = encode_explicit(indices, values, 100, ValueType.FLOAT32)
    for bad in (
        replace(piece, coding=None),
        replace(piece, base=1),
        replace(piece, base=EXPLICIT_SPAN),
        replace(piece, values=piece.values[:-4]),
        replace(piece, values=piece.values[:-1]),
        replace(piece, indices=piece.indices[:-1]),
    ):
        with pytest.raises(MalformedError):
            decode_explicit(bad, 100, ValueType.FLOAT32)
    with pytest.raises(MalformedError):
        list(encode_explicit(indices, values[:-1], 100, ValueType.FLOAT32))
    with pytest.raises(MalformedError):
        list(encode_explicit(indices, values, int(indices[-1]), ValueType.FLOAT32))
    with pytest.raises(MalformedError):
        list(encode_explicit(indices[::-1].copy(), values, 100, ValueType.FLOAT32))
