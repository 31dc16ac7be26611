"""Large arrays whose memory is used again: fresh pages of a hundred megabytes cost more than a pass over them."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray

LEAST = 1 << 20
"""Values from which on it pays; below, the allocator has memory at hand."""

MOST_SPARE = 2


class Buffers:
    """Hands out float32 arrays, and takes their memory back when nothing refers to them any more.

    Spare memory is kept as long as arrays of the same size are asked for. Arrays may be dropped in any thread.
    """

    def __init__(self) -> None:
        self._spare: deque[NDArray[np.float32]] = deque(maxlen=MOST_SPARE)

    def clear(self) -> None:
        """Nothing more is needed for now."""
        self._spare.clear()

    def take(self, size: int) -> NDArray[np.float32]:
        """1-D, of arbitrary values."""
        owner = None
        while self._spare and (owner is None or owner.size != size):
            owner = self._spare.pop()
        if owner is None or owner.size != size:
            owner = np.empty(size, np.float32)
        if size < LEAST:
            return owner
        # Every view of this array refers to it, and it refers to a memoryview instead of to its owner.
        array = np.frombuffer(owner.data, np.float32)
        weakref.finalize(array, self._spare.append, owner).atexit = False
        return array
