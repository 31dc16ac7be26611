"""The part of a model that one of several servers averages, with the face of a whole one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from loscar_core.layout import Shard
from loscar_core.replica import Floats, Indices
from loscar_worker.model import HostCopy, ModelView, Selected


class ModelRange:
    """A range of a model's coordinates, numbered from 0 on; the statistics belong to shard 0.

    Args:
        whole: the model.
        shard: whose range.

    Raises:
        ConfigError: there are fewer coordinates than shards.
    """

    def __init__(self, whole: ModelView, shard: Shard) -> None:
        self._whole = whole
        self._first, self._end = shard.span(whole.layout.dimension)
        self._has_statistics = shard.index == 0
        self.layout = shard.layout(whole.layout)
        self.vectors: tuple[str, ...] = whole.vectors
        self.model_dimension = self.layout.dimension
        self.whole_dimension = whole.layout.dimension

    def select(self, indices: Indices | range | None) -> Selected:
        if indices is None:
            return self._whole.select(range(self._first, self._end))
        if isinstance(indices, range):
            return self._whole.select(range(self._first + indices.start, self._first + indices.stop))
        return self._whole.select(indices + self._first)

    def gather(self, selected: Selected) -> HostCopy:
        return self._whole.gather(selected)

    def prepare(self, selected: Selected, values: Floats) -> list[Tensor]:
        return self._whole.prepare(selected, values)

    @property
    def wider(self) -> bool:
        return self._whole.wider

    def read(self, selected: Selected) -> list[Tensor]:
        return self._whole.read(selected)

    def write(self, selected: Selected, values: list[Tensor]) -> None:
        self._whole.write(selected, values)

    def change(self, selected: Selected, new: Callable[[Tensor, int, slice], Tensor]) -> None:
        self._whole.change(selected, new)

    def vector(self) -> Floats:
        """The range's parameters in logical order, a new float32 array."""
        return self.gather(self.select(None)).values()

    def load_vector(self, values: Floats) -> None:
        selected = self.select(None)
        self.write(selected, self.prepare(selected, values))

    def statistics(self) -> Floats:
        return self._whole.statistics() if self._has_statistics else np.empty(0, np.float32)

    def load_statistics(self, values: Floats) -> None:
        if self._has_statistics:
            self._whole.load_statistics(values)


View = ModelView | ModelRange
"""What the two halves of a session need of a model."""
