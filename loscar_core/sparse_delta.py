"""The sparse delta on the wire: values at coordinates that either follow from the seed or travel along.

A *slice* covers coordinates [base, base + span) of the logical vector. With a seeded selection both sides know which
coordinates those are, and only values travel. With an explicit one (each worker's own choice, or its union in an
answer) the slice carries its coordinates relative to `base`, at most 2^22 of them apart, coded as `IndexCoding` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loscar_core.errors import MalformedError
from loscar_core.indices import IndexCoding, decode_indices, encode_indices
from loscar_core.replica import Floats, Indices
from loscar_core.values import ValueType, decode, encode, value_count

EXPLICIT_SPAN = 1 << 22
"""Coordinates that one explicit slice covers."""


@dataclass(frozen=True, slots=True)
class SparseSlice:
    """Some coordinates of a vector and their values, as they travel.

    Attributes:
        base: first coordinate that the slice covers.
        values: encoded values.
        indices: coded coordinates relative to `base`; empty for a seeded selection.
        coding: of `indices`, or None for a seeded selection.
    """

    base: int
    values: bytes
    indices: bytes = b""
    coding: IndexCoding | None = None


def encode_explicit(
    indices: Indices, values: Floats, dimension: int, kind: ValueType, coding: IndexCoding = IndexCoding.GAPS
) -> Iterator[SparseSlice]:
    """Cut a sparse vector into slices of `EXPLICIT_SPAN` coordinates; those without any are left out.

    Args:
        indices: coordinates in [0, dimension), strictly increasing; K int64.
        values: K float32, finite.
        dimension: d.
        kind: what a value is on the wire.
        coding: how the coordinates travel.

    Raises:
        MalformedError: the coordinates are out of range or order, or the lengths differ.
    """
    if indices.size != values.size:
        raise MalformedError(f"{indices.size} coordinates for {values.size} values")
    if indices.size and (int(indices[0]) < 0 or int(indices[-1]) >= dimension):
        raise MalformedError(f"a coordinate lies outside [0, {dimension})")
    bases = range(0, dimension, EXPLICIT_SPAN)
    cuts = np.searchsorted(indices, [*bases, dimension])
    for base, start, stop in zip(bases, cuts, cuts[1:], strict=False):
        if start < stop:
            span = min(EXPLICIT_SPAN, dimension - base)
            coded = encode_indices(indices[start:stop] - base, span, coding)
            yield SparseSlice(base, encode(values[start:stop], kind), coded, coding)


def decode_explicit(piece: SparseSlice, dimension: int, kind: ValueType) -> tuple[Indices, Floats]:
    """The coordinates (ascending int64) and values (float32) of an explicit slice.

    Raises:
        MalformedError, NonFiniteError: it is not what `encode_explicit` makes.
    """
    if piece.coding is None:
        raise MalformedError("a slice without coordinates")
    if piece.base % EXPLICIT_SPAN or not 0 <= piece.base < dimension:
        raise MalformedError(f"a slice at {piece.base} of {dimension} coordinates")
    count = value_count(kind, len(piece.values))
    span = min(EXPLICIT_SPAN, dimension - piece.base)
    indices = decode_indices(piece.indices, count, span, piece.coding)
    return indices + piece.base, decode(piece.values, kind, count)
