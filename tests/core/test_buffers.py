"""Memory that is used again: never while anybody can still see what is in it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from chaos import Chaos

from loscar_core import buffers, worker_holdings
from loscar_core.buffers import LEAST, Buffers
from loscar_core.selection import SelectionKind
from loscar_core.values import ValueType, encode_view

HOLDERS: dict[str, Callable[[np.ndarray], Any]] = {
    "slice": lambda a: a[5:9],
    "slice of a slice": lambda a: a[1:][2:][:3],
    "other dtype": lambda a: a.view(np.uint32),
    "reshaped": lambda a: a.reshape(2, -1)[1],
    "iterator": lambda a: a.flat,
    "broadcast": lambda a: np.broadcast_to(a, (2, a.size)),
    "transposed": lambda a: a.reshape(2, -1).T,
    "memoryview": lambda a: memoryview(a)[8:16],
    "payload": lambda a: encode_view(a[3:7], ValueType.FLOAT32),
    "array of a payload": lambda a: np.frombuffer(encode_view(a[3:7], ValueType.FLOAT32), "<f4"),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_memory_comes_back_when_the_last_view_of_it_goes(name: str) -> None:
    pool = Buffers()
    array = pool.take(LEAST)
    array[:] = 1.0
    address = array.ctypes.data
    holder = HOLDERS[name](array)
    del array
    gc.collect()
    other = pool.take(LEAST)
    assert other.ctypes.data != address, "somebody can still see it"
    other[:] = 2.0
    assert 2.0 not in np.asarray(holder).reshape(-1)
    del holder
    gc.collect()
    assert pool.take(LEAST).ctypes.data == address


def test_memory_of_another_size_is_let_go() -> None:
    pool = Buffers()
    pool.take(LEAST)
    assert len(pool._spare) == 1
    again = pool.take(2 * LEAST)
    assert not pool._spare
    del again
    pool.clear()
    assert not pool._spare
    assert pool.take(7).size == 7
    assert pool.take(0).size == 0


class Poisoned(Buffers):
    """Whoever looks at what it has given up, or not yet written, sees NaN."""

    taken = 0
    reused = 0

    def take(self, size: int) -> np.ndarray:
        for spare in self._spare:
            spare.fill(np.nan)
        before = len(self._spare)
        array = super().take(size)
        Poisoned.taken += 1
        Poisoned.reused += before > len(self._spare)
        array.fill(np.nan)
        return array


@pytest.mark.parametrize("kind", ValueType)
def test_nobody_reads_memory_that_is_given_up(kind: ValueType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random schedules of crashes and returns add up although every array is full of NaN at first and at last."""
    monkeypatch.setattr(buffers, "LEAST", 1)
    monkeypatch.setattr(worker_holdings, "Buffers", Poisoned)
    Poisoned.taken = Poisoned.reused = 0
    dense = (SelectionKind.ALL, SelectionKind.SWEEP)
    for seed in range(6):
        Chaos(cut=0.004, crash=0.002, joiners=1, value_type=kind, selections=dense).run(seed)
    assert Poisoned.reused > Poisoned.taken // 4 > 50
