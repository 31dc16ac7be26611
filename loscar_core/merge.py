"""The merges: what a worker does with an average that is several steps old.

One pure function for all of them. Let y be the worker's values on the selection S when it took the snapshot, z its
values now, δ̂ = what it sent of y − a, a the anchor that y was compared with, and Δ̂ the average that came back, so
that the new anchor is a_new = a + Δ̂:

    delay-corrected   z ← a_new + ((z − a) − δ̂)         the paper's m̄ + (z − y) (arXiv 2605.20866), since
                                                       m̄ = a_new and y = a + δ; keeps the steps taken in flight
    overwrite         z ← a_new                         the naive merge, kept to compare with

With δ̂ equal to what was sent and not to what was meant, whatever quantisation left out stays in z − a_new and goes
out later. A worker whose contribution is not in the answer passes sent=None and subtracts nothing.

The arguments need only + and −, so NumPy arrays and torch tensors both serve; results are float32 and rounded once,
by whoever stores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol, Self, TypeVar

from loscar_core.errors import ConfigError


class Vector(Protocol):
    """What a merge needs of an array: elementwise + and −."""

    def __add__(self, other: Self, /) -> Self: ...
    def __sub__(self, other: Self, /) -> Self: ...


V = TypeVar("V", bound=Vector)


class MergeKind(StrEnum):
    """The merges by their names on the command line."""

    DELAY_CORRECTED = "delay-corrected"
    OVERWRITE = "overwrite"


def parse_merge(text: str) -> MergeKind:
    """Raises: ConfigError: naming the known merges."""
    try:
        return MergeKind(text)
    except ValueError:
        raise ConfigError(f"merge {text!r} is not one of {', '.join(MergeKind)}") from None


class RejoinKind(StrEnum):
    """What a worker does with its own unsent progress after a long absence (ours; no paper describes it)."""

    PROJECT = "project"
    """Leave out what points the way that the others went meanwhile: see `projection`."""
    KEEP = "keep"
    DROP = "drop"


def parse_rejoin(text: str) -> RejoinKind:
    """Raises: ConfigError: naming the known rules."""
    try:
        return RejoinKind(text)
    except ValueError:
        raise ConfigError(f"rejoin {text!r} is not one of {', '.join(RejoinKind)}") from None


def projection(progress_dot_gain: float, gain_dot_gain: float) -> float:
    """β of x = c + u − β(c − a), with u = x − a the worker's progress and g = c − a what the run gained meanwhile.

    β = clip(⟨u, g⟩ / ⟨g, g⟩, 0, 1): progress that the others made too is not added twice. After a long absence u and
    g point much the same way, and x = c + u would overshoot.
    """
    if not gain_dot_gain > 0:
        return 0.0
    return min(1.0, max(0.0, progress_dot_gain / gain_dot_gain))


def merge(kind: MergeKind, live: V, anchor: V, new_anchor: V, sent: V | None) -> V:
    """The live values after a round, on its selection.

    Args:
        kind: which merge.
        live: z, the values now; K float32.
        anchor: a, the anchor before the round; K float32.
        new_anchor: a_new, the anchor after it; K float32.
        sent: δ̂, what this worker contributed to the round's sum (zero where it is not in it), or None.

    Returns:
        K float32.
    """
    if kind is MergeKind.OVERWRITE:
        return new_anchor
    progress = live - anchor
    return new_anchor + (progress if sent is None else progress - sent)


def merge_pieces(
    kind: MergeKind, live: Sequence[V], anchor: Sequence[V], new_anchor: Sequence[V], sent: Sequence[V] | None
) -> list[V]:
    """`merge` of a selection that is in several pieces, one for each device and dtype."""
    own: Sequence[V | None] = sent if sent is not None else [None] * len(live)
    return [merge(kind, z, a, b, s) for z, a, b, s in zip(live, anchor, new_anchor, own, strict=True)]
