"""A torch module as one logical vector: flat storage, gathers and scatters, statistics, fingerprint.

The trainable parameters become views of one flat tensor per (device, dtype), so that a selection is gathered with
one indexed read and scattered with one indexed write instead of one per tensor. The logical order of the
coordinates is the registration order, whatever device or dtype a tensor has; δ and the merge are computed in
float32 and rounded once, on store.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from loscar_core.errors import ConfigError, ModelChangedError
from loscar_core.layout import VECTOR_PREFIX, Layout, Segment, offsets
from loscar_core.replica import Floats, Indices
from loscar_core.selection import BLOCK_SIZE

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


RUN = BLOCK_SIZE
"""Coordinates that selections by block take together."""

MOST_RANGES = 4
"""Ranges of a model of several storages that are remembered; each takes 8 bytes a coordinate."""

PASS = 1 << 15
"""Coordinates that are merged at a time where the model is in the host's memory: what has been read is still in the
cache when it is written."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Whole runs of `RUN` coordinates of a storage, by their numbers: a gather that copies rows."""

    numbers: Tensor


Where = Tensor | slice | Runs


@dataclass(frozen=True, slots=True)
class Selected:
    """A selection prepared for gathers and scatters; made off the training thread.

    Attributes:
        size: number of coordinates.
        pieces: per storage: its number, storage indices on its device (or a range or runs of them), and where its
            coordinates stand among the selected ones (None: they are all there are).
    """

    size: int
    pieces: tuple[tuple[int, Where, Tensor | slice | None], ...]


class ModelView:
    """Reads and writes a module's state as the protocol sees it.

    Args:
        module: its trainable parameters are re-seated on flat storage at once; values do not change.
        statistics: names of further floating buffers to be averaged as absolute values.
        vectors: further float32 vectors to be averaged along with the parameters, by name; they come after these and
            are re-seated like them.

    Attributes:
        vectors: the names of the vectors.
        model_dimension: coordinates of the module itself, without the vectors.
        whole_dimension: with them.

    Raises:
        ConfigError: nothing is trainable, or a name or dtype does not fit.
    """

    def __init__(
        self, module: nn.Module, statistics: Iterable[str] = (), vectors: Mapping[str, Tensor] | None = None
    ) -> None:
        module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper has other names for the same tensors
        named: list[tuple[str, Tensor]] = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        for name, parameter in named:
            if parameter.dtype not in FLOATING:
                raise ConfigError(f"parameter {name} has dtype {parameter.dtype}, which cannot be averaged")
        self.vectors = tuple(vectors or ())
        self.model_dimension = sum(p.numel() for _, p in named)
        self.whole_dimension = self.model_dimension + sum(v.numel() for v in (vectors or {}).values())
        for name, vector in (vectors or {}).items():
            if vector.dtype is not torch.float32 or vector.requires_grad:
                raise ConfigError(f"vector {name} has to be float32 and without a gradient")
            named.append((VECTOR_PREFIX + name, vector))
        self._parameters = [p for _, p in named]
        self._statistics = _statistics_of(module, set(statistics))
        self.layout = Layout(
            tuple(_segment(n, p) for n, p in named),
            tuple(_segment(b.name, b.tensor) for b in self._statistics),
            _frozen_checksum(module, {b.name for b in self._statistics}),
        )
        self._ranges: dict[tuple[int, int], Selected] = {}
        self._copy_streams: dict[torch.device, torch.cuda.Stream] = {}
        self._flatten()

    def _flatten(self) -> None:
        keys: dict[tuple[torch.device, torch.dtype], int] = {}
        sizes: list[int] = []
        placed: list[tuple[int, int]] = []  # per segment: storage, offset in it
        for p in self._parameters:
            storage = keys.setdefault((p.device, p.dtype), len(keys))
            if storage == len(sizes):
                sizes.append(0)
            placed.append((storage, sizes[storage]))
            sizes[storage] += p.numel()
        self.storages = [
            torch.empty(size, device=device, dtype=dtype) for (device, dtype), size in zip(keys, sizes, strict=True)
        ]
        with torch.no_grad():
            for p, (storage, offset) in zip(self._parameters, placed, strict=True):
                view = self.storages[storage][offset : offset + p.numel()].view(p.shape)
                view.copy_(p)
                p.data = view
        self._pointers = [p.data_ptr() for p in self._parameters]
        self._starts = np.array(offsets(self.layout.parameters), np.int64)
        self._segment_storage = np.array([s for s, _ in placed], np.int64)
        self._segment_shift = np.array([o for _, o in placed], np.int64) - self._starts[:-1]

    def check_unchanged(self) -> None:
        """Raises ModelChangedError when the module left the flat storage (`.to()`, `.half()` after joining)."""
        for p, pointer, segment in zip(self._parameters, self._pointers, self.layout.parameters, strict=True):
            if p.data_ptr() != pointer and p.numel():
                raise ModelChangedError(
                    f"parameter {segment.name} was moved or cast after joining: the run would train another copy"
                )

    # --- selections -----------------------------------------------------------------------------------------

    def select(self, indices: Indices | range | None) -> Selected:
        """Prepare a selection (all coordinates, a range, or explicit ones): split it by storage, move it to the
        devices."""
        span = range(self.layout.dimension) if indices is None else indices
        if len(self.storages) == 1:
            if isinstance(span, range):
                return Selected(len(span), ((0, slice(span.start, span.stop), None),))
            return Selected(span.size, self._in_runs(span) or ((0, self._to_device(span, self._device), None),))
        if isinstance(span, range):
            return self._select_range(span)
        logical = span
        segment = np.searchsorted(self._starts, logical, side="right") - 1
        storage_of = self._segment_storage[segment]
        local = logical + self._segment_shift[segment]
        pieces = []
        for number, storage in enumerate(self.storages):
            among = np.flatnonzero(storage_of == number)
            if among.size:
                where = self._to_device(local[among], storage.device)
                pieces.append((number, where, torch.from_numpy(among)))
        return Selected(logical.size, tuple(pieces))

    def _select_range(self, span: range) -> Selected:
        """Of several storages; remembered, since rounds may ask for the same range each time."""
        known = self._ranges.get((span.start, span.stop))
        if known is not None:
            return known
        logical = np.arange(span.start, span.stop)
        segment = np.searchsorted(self._starts, logical, side="right") - 1
        storage_of = self._segment_storage[segment]
        pieces: list[tuple[int, Where, Tensor | slice | None]] = []
        for number in range(len(self.storages)):
            among = np.flatnonzero(storage_of == number)
            if among.size:
                # Within a storage the order is that of the model, so what a range has of it is a range too.
                first, last = (int(logical[i] + self._segment_shift[segment[i]]) for i in (among[0], among[-1]))
                pieces.append((number, slice(first, last + 1), torch.from_numpy(among)))
        if len(self._ranges) >= MOST_RANGES:
            self._ranges.clear()
        selected = self._ranges[span.start, span.stop] = Selected(len(span), tuple(pieces))
        return selected

    @property
    def _device(self) -> torch.device:
        return self.storages[0].device

    def _in_runs(self, indices: Indices) -> tuple[tuple[int, Where, slice | None], ...] | None:
        """The pieces of a selection of whole runs, of which only the model's last may be short; None for any other."""
        whole = indices.size // RUN * RUN
        starts, ends = indices[:whole:RUN], indices[RUN - 1 : whole : RUN]
        # Ascending: a run whose ends are as far apart as they should be has everything in between.
        if whole == 0 or (starts % RUN).any() or not np.array_equal(ends - starts, np.full(starts.size, RUN - 1)):
            return None
        runs = Runs(self._to_device(starts // RUN, self._device))
        if whole == indices.size:
            return ((0, runs, None),)
        rest = indices[whole:]
        if rest[-1] - rest[0] != rest.size - 1:
            return None
        short = slice(int(rest[0]), int(rest[-1]) + 1)
        return ((0, runs, slice(0, whole)), (0, short, slice(whole, indices.size)))

    @staticmethod
    def _to_device(indices: NDArray[np.int64], device: torch.device) -> Tensor:
        tensor = torch.from_numpy(indices)
        return tensor if device.type == "cpu" else tensor.to(device)

    def gather(self, selected: Selected) -> HostCopy:
        """Copy the selected values out; on a GPU this only queues the copy, `HostCopy.values` waits for it."""
        self.check_unchanged()
        copies = []
        with torch.no_grad():
            for number, where, among in selected.pieces:
                values = _read(self.storages[number], where)
                if isinstance(where, slice):
                    values = values.clone()
                copies.append((_to_host(values.float()), among))
        return HostCopy(copies, selected.size)

    def prepare(self, selected: Selected, values: Floats) -> list[Tensor]:
        """Move K float32 values to where the selection lives, one tensor a piece; off the training thread."""
        source = torch.from_numpy(values)
        moved = []
        for number, _, among in selected.pieces:
            if among is None:
                piece = source
            else:
                piece = source[among] if isinstance(among, slice) else source.index_select(0, among)
            device = self.storages[number].device
            moved.append(self._upload(piece, device) if device.type == "cuda" else piece.to(device))
        return moved

    def _upload(self, piece: Tensor, device: torch.device) -> Tensor:
        """Copy on a stream of its own, finished on return: the training stream is never waited for."""
        stream = self._copy_streams.get(device)
        if stream is None:
            stream = self._copy_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            moved = piece.pin_memory().to(device, non_blocking=True)
        moved.record_stream(torch.cuda.default_stream(device))
        stream.synchronize()
        return moved

    @property
    def wider(self) -> bool:
        """It holds values that float32 cannot."""
        return any(storage.dtype is torch.float64 for storage in self.storages)

    def read(self, selected: Selected) -> list[Tensor]:
        """The selected values as float32 where they live, one tensor a piece."""
        self.check_unchanged()
        with torch.no_grad():
            return [_read(self.storages[number], where).float() for number, where, _ in selected.pieces]

    def write(self, selected: Selected, values: list[Tensor]) -> None:
        """Store values, rounding to each storage's dtype."""
        with torch.no_grad():
            for (number, where, _), piece in zip(selected.pieces, values, strict=True):
                _write(self.storages[number], where, piece)

    def change(self, selected: Selected, new: Callable[[Tensor, int, slice], Tensor]) -> None:
        """Read, compute and write, `PASS` coordinates at a time.

        Args:
            new: of live values (float32 where they live), the number of their piece, and which of that piece's values
                they are, gives the values that take their place.
        """
        self.check_unchanged()
        with torch.no_grad():
            for piece, (number, where, _) in enumerate(selected.pieces):
                storage, size = self.storages[number], _size(where)
                step = PASS if storage.device.type == "cpu" else max(1, size)
                for start in range(0, size, step):
                    here = slice(start, min(start + step, size))
                    part = _part(where, here)
                    _write(storage, part, new(_read(storage, part).float(), piece, here))

    # --- whole states ---------------------------------------------------------------------------------------

    def vector(self) -> Floats:
        """All parameters in logical order, a new d float32 array."""
        return self.gather(self.select(None)).values()

    def load_vector(self, values: Floats) -> None:
        selected = self.select(None)
        self.write(selected, self.prepare(selected, values))

    def statistics(self) -> Floats:
        """All statistics in order, a new float32 array."""
        if not self._statistics:
            return np.empty(0, np.float32)
        with torch.no_grad():
            flat = torch.cat([b.tensor.detach().reshape(-1).float().cpu() for b in self._statistics])
        return flat.numpy()

    def load_statistics(self, values: Floats) -> None:
        start = 0
        with torch.no_grad():
            for statistic in self._statistics:
                buffer = statistic.tensor
                piece = torch.from_numpy(values[start : start + buffer.numel()])
                buffer.copy_(piece.reshape(buffer.shape))
                start += buffer.numel()


class HostCopy:
    """Values on their way to the host."""

    def __init__(self, copies: list[tuple[_Copy, Tensor | slice | None]], size: int) -> None:
        self._copies = copies
        self._size = size

    def values(self) -> Floats:
        """K float32 in the selection's order; waits for the device, so not for the training thread."""
        if len(self._copies) == 1 and self._copies[0][1] is None:
            array = self._copies[0][0].array()
            return array.copy() if self._copies[0][0].event is not None else array  # pinned memory is not for keeping
        out = np.empty(self._size, np.float32)
        for copy, among in self._copies:
            assert among is not None
            out[among if isinstance(among, slice) else among.numpy()] = copy.array()
        return out


@dataclass(slots=True)
class _Copy:
    host: Tensor
    event: torch.cuda.Event | None

    def array(self) -> Floats:
        if self.event is not None:
            self.event.synchronize()
        array: Floats = self.host.numpy()
        return array


def _read(storage: Tensor, where: Where) -> Tensor:
    """Values in the storage's dtype; for a range a view."""
    if isinstance(where, Runs):
        return _rows(storage).index_select(0, where.numbers).view(-1)
    return storage[where] if isinstance(where, slice) else storage.index_select(0, where)


def _write(storage: Tensor, where: Where, values: Tensor) -> None:
    if isinstance(where, Runs):
        _rows(storage).index_copy_(0, where.numbers, values.to(storage.dtype).view(-1, RUN))
    elif isinstance(where, slice):
        storage[where].copy_(values)
    else:
        storage.index_copy_(0, where, values.to(storage.dtype))


def _rows(storage: Tensor) -> Tensor:
    return storage[: storage.numel() // RUN * RUN].view(-1, RUN)


def _size(where: Where) -> int:
    if isinstance(where, Runs):
        return where.numbers.numel() * RUN
    return int(where.stop - where.start) if isinstance(where, slice) else where.numel()


def _part(where: Where, here: slice) -> Where:
    """Some of a piece's coordinates; of runs whole ones."""
    if isinstance(where, Runs):
        return Runs(where.numbers[here.start // RUN : here.stop // RUN])
    if isinstance(where, slice):
        return slice(where.start + here.start, where.start + here.stop)
    return where[here]


def _to_host(values: Tensor) -> _Copy:
    if values.device.type != "cuda":
        return _Copy(values.cpu(), None)
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(values.device))
    return _Copy(host, event)


def _segment(name: str, tensor: Tensor) -> Segment:
    return Segment(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A buffer by its place, since modules may assign a new tensor to it at any time."""

    name: str
    owner: nn.Module

    @property
    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.owner, self.name.rpartition(".")[2])
        return found


def _statistics_of(module: nn.Module, extra: set[str]) -> list[_Buffer]:
    """Running means and variances of normalisation layers, and the buffers that were asked for, in order."""
    wanted = set(extra)
    for prefix, layer in module.named_modules():
        if isinstance(layer, _NormBase):
            wanted |= {f"{prefix}.{n}".lstrip(".") for n in ("running_mean", "running_var")}
    found = [(n, b) for n, b in module.named_buffers() if n in wanted]
    missing = extra - {n for n, _ in found}
    if missing:
        raise ConfigError(f"the model has no buffer {sorted(missing)[0]!r} to average")
    for name, buffer in found:
        if buffer.dtype not in FLOATING:
            raise ConfigError(f"buffer {name} has dtype {buffer.dtype}, which cannot be averaged")
    return [_Buffer(name, module.get_submodule(name.rpartition(".")[0])) for name, _ in found]


def _frozen_checksum(module: nn.Module, statistics: set[str]) -> int:
    """CRC-32 over what never travels. Batch counters are left out: they differ as soon as training starts."""
    checksum = 0
    frozen = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
    buffers = [
        (n, b) for n, b in module.named_buffers() if n not in statistics and not n.endswith("num_batches_tracked")
    ]
    for name, tensor in (*frozen, *buffers):
        header = _segment(name, tensor).describe()
        raw = tensor.detach().contiguous().reshape(-1).cpu().view(torch.uint8)
        checksum = zlib.crc32(raw.numpy().data, zlib.crc32(header.encode(), checksum))
    return checksum
