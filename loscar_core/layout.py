"""What a model looks like to the protocol: named segments of one logical vector, and its fingerprint.

Two groups of state are exchanged. *Parameters* are the trainable tensors in registration order; together they
are the `dimension` coordinates that rounds select from. *Statistics* (running means and variances of
normalisation layers, and what a user opts in) are small, sent whole, and averaged as absolute values. Frozen
parameters and other buffers never travel: only a checksum of their bytes does, since two workers whose frozen
parts differ would train different models without anybody noticing.

This module does not know torch: the worker makes a `Layout` from a module, the server compares two of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from loscar_core.errors import ConfigError, WrongModelError

MAX_DIMENSION = 1 << 40
"""Largest supported number of coordinates; the selections are specified up to here."""


VECTOR_PREFIX = "vector:"
"""Names of vectors that are averaged along with a model and are no part of it begin with it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One tensor of the logical vector.

    Attributes:
        name: dotted name, as in `module.named_parameters()`.
        shape: the tensor's shape; () for a scalar.
        dtype: the storage type's name, for example "float32" or "bfloat16".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if any(side < 0 for side in self.shape):
            raise ConfigError(f"the tensor {self.name!r} has the shape {self.shape}")

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return prod(self.shape)

    def describe(self) -> str:
        text = f"{self.name} {self.dtype}[{'x'.join(map(str, self.shape)) or 'scalar'}]"
        return "".join(c if c.isprintable() else "?" for c in text)


@dataclass(frozen=True)
class Layout:
    """The segments of a model, parameters first, and the checksum of what is never sent.

    Attributes:
        parameters: trainable tensors in registration order, at consecutive offsets from 0.
        statistics: tensors that are averaged as absolute values, at consecutive offsets of a vector of their own.
        frozen_checksum: CRC-32 of frozen parameters and unsent buffers (names, shapes, dtypes and bytes).
    """

    parameters: tuple[Segment, ...]
    statistics: tuple[Segment, ...] = ()
    frozen_checksum: int = 0

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ConfigError("the model has no trainable parameters, so there is nothing to average")
        if self.dimension > MAX_DIMENSION:
            raise ConfigError(f"the model has {self.dimension} coordinates; at most {MAX_DIMENSION} are supported")
        names = [s.name for s in (*self.parameters, *self.statistics)]
        if len(set(names)) != len(names):
            raise ConfigError("two tensors of the model have the same name")

    @cached_property
    def dimension(self) -> int:
        """Number of coordinates d that rounds select from."""
        return sum(s.size for s in self.parameters)

    @cached_property
    def statistics_size(self) -> int:
        """Number of values in the statistics vector."""
        return sum(s.size for s in self.statistics)

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes that are equal exactly when two layouts are."""
        digest = hashlib.sha256(b"loscar layout 1\n")
        for group, segments in (("p", self.parameters), ("s", self.statistics)):
            for s in segments:
                # Quoted, so that no name can look like two tensors.
                digest.update(f"{group} {s.name!r} {s.dtype!r} {s.shape}\n".encode())
        digest.update(f"frozen {self.frozen_checksum}\n".encode())
        return digest.digest()


def offsets(segments: Iterable[Segment]) -> list[int]:
    """Start of each segment in its vector, followed by the vector's length."""
    starts = [0]
    for s in segments:
        starts.append(starts[-1] + s.size)
    return starts


def require_same(ours: Layout, theirs: Layout) -> None:
    """Check that a joining worker's model is the run's.

    Raises:
        WrongModelError: naming the first tensor that differs.
    """
    if ours.fingerprint == theirs.fingerprint:
        return
    for group in ("parameters", "statistics"):
        mine: tuple[Segment, ...] = getattr(ours, group)
        yours: tuple[Segment, ...] = getattr(theirs, group)
        for expected, found in zip(mine, yours, strict=False):
            if expected != found:
                raise WrongModelError(
                    f"wrong model: the run's {group} have {expected.describe()} "
                    f"where this worker's have {found.describe()}"
                )
        if len(mine) != len(yours):
            longer, whose = (mine, "the run has") if len(mine) > len(yours) else (yours, "this worker has")
            extra = longer[min(len(mine), len(yours))]
            raise WrongModelError(f"wrong model: only {whose} {extra.describe()} among its {group}")
    raise WrongModelError("wrong model: names and shapes agree, but frozen parameters or buffers hold other values")
