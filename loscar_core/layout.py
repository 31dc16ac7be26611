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
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from loscar_core.errors import ConfigError, MalformedError, WrongModelError

MAX_DIMENSION = 1 << 40
"""Largest supported number of coordinates; the selections are specified up to here."""


MAX_SHARDS = 1024

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


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several servers that a model's coordinates are spread over; each runs rounds of its own.

    Attributes:
        index: from 0 on; shard 0 has the statistics, and says which slot a worker has and when the run ends.
        count: how many there are.

    Raises:
        ConfigError: there is no such shard.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_SHARDS:
            raise ConfigError(f"{self.count} shards: 1 to {MAX_SHARDS} are supported")
        if not 0 <= self.index < self.count:
            raise ConfigError(f"there is no shard {self.index} of {self.count}: they are numbered from 0 on")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def span(self, dimension: int) -> tuple[int, int]:
        """The coordinates that are this shard's: from the first up to, but not including, the second."""
        return dimension * self.index // self.count, dimension * (self.index + 1) // self.count

    def seed(self, seed: int) -> int:
        """The seed of this shard's selections, from the run's: SHA-256 of both, but for the first, whose it is."""
        if self.index == 0:
            return seed
        digest = hashlib.sha256(f"loscar shard {self.index} {seed}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def layout(self, whole: Layout) -> Layout:
        """What a model looks like to this shard; tensors that are cut become flat pieces that name their place.

        Raises:
            ConfigError: the model has fewer coordinates than there are shards.
        """
        if self.count == 1:
            return whole
        first, end = self.span(whole.dimension)
        starts = offsets(whole.parameters)
        pieces = []
        for segment, start in zip(whole.parameters, starts, strict=False):
            low, high = max(first - start, 0), min(end - start, segment.size)
            empty_here = segment.size == 0 and first <= start and (start < end or self.index == self.count - 1)
            if low >= high and not empty_here:
                continue
            pieces.append(segment if high - low == segment.size else _piece(segment, low, high))
        if first == end:
            raise ConfigError(f"a model of {whole.dimension} coordinates cannot be spread over {self.count} shards")
        return Layout(tuple(pieces), whole.statistics if self.index == 0 else (), whole.frozen_checksum)


def parse_shard(text: str) -> Shard:
    """`K/N`. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if found is None:
        raise ConfigError(f"shard {text!r} is not of the form K/N, such as 0/2")
    return Shard(int(found[1]), int(found[2]))


def _piece(segment: Segment, low: int, high: int) -> Segment:
    shape = "x".join(map(str, segment.shape))
    return Segment(f"{segment.name}[{low}:{high} of {shape}]", (high - low,), segment.dtype)


def joined(parts: Sequence[Layout]) -> Layout:
    """The whole model's layout from those of its shards, in order.

    Raises:
        MalformedError: they are not the shards of one model.
    """
    if len(parts) == 1:
        return parts[0]
    segments: list[Segment] = []
    filled = 0  # of the tensor whose pieces are being put together
    for segment in (s for part in parts for s in part.parameters):
        found = re.fullmatch(r"(.*)\[(\d+):(\d+) of ([\dx]+)\]", segment.name, re.DOTALL)
        if found is None:
            if filled:
                raise MalformedError(f"the shards do not fit together: {segments[-1].name} ends after {filled} values")
            segments.append(segment)
            continue
        name, low, high = found[1], int(found[2]), int(found[3])
        whole = Segment(name, tuple(int(n) for n in found[4].split("x")), segment.dtype)
        if low == 0 and not filled:
            segments.append(whole)
        if low != filled or high - low != segment.size or not segments or segments[-1] != whole or high > whole.size:
            raise MalformedError(f"the shards do not fit together: {segment.name} comes after {filled} of its values")
        filled = high if high < whole.size else 0
    if filled:
        raise MalformedError(f"the shards do not fit together: {segments[-1].name} ends after {filled} values")
    if len({part.frozen_checksum for part in parts}) != 1:
        raise MalformedError("the shards do not fit together: their frozen parameters differ")
    return Layout(tuple(segments), parts[0].statistics, parts[0].frozen_checksum)


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
