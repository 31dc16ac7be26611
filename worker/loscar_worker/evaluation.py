"""Evaluating the average of the live models while they train.

In a planned evaluation round each worker copies its vector, right after merging that round, into one of two slots of
a memory-mapped file of its own. All workers do so at the same round boundary, so the vectors form a consistent cut;
another process averages and tests them. A slot holds a round's number, the run time, the worker's steps and a CRC, so
that a half-written one is noticed, and the next round goes to the other slot.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loscar_core.replica import Floats

_HEADER = struct.Struct("<QdQI4x")  # round, run time in s, steps, CRC-32 of the values
_START = 64  # of the values within a slot, so that they are aligned
SLOTS = 2


@dataclass(frozen=True, slots=True)
class LiveVector:
    """One worker's parameters and statistics right after a round.

    Attributes:
        round: the evaluation round.
        elapsed_s: run time then.
        steps: the worker's steps then.
        values: parameters, then statistics; float32.
    """

    round: int
    elapsed_s: float
    steps: int
    values: Floats


class EvaluationWriter:
    """A worker's side of the file.

    Args:
        path: the file; made anew.
        size: number of values.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._slot_bytes = _START + 4 * size
        self._map = np.memmap(path, np.uint8, "w+", shape=(SLOTS * self._slot_bytes,))
        self._turn = 0

    def write(self, live: LiveVector) -> None:
        """Copy a vector into the slot whose turn it is."""
        slot = self._map[self._turn * self._slot_bytes :][: self._slot_bytes]
        self._turn = (self._turn + 1) % SLOTS
        values = np.ascontiguousarray(live.values, "<f4")
        data = values.view(np.uint8)
        slot[: _HEADER.size] = 0  # not valid while it is written
        slot[_START:] = data
        header = _HEADER.pack(live.round, live.elapsed_s, live.steps, zlib.crc32(data.data))
        slot[: _HEADER.size] = np.frombuffer(header, np.uint8)


def read_rounds(path: Path) -> dict[int, float]:
    """The rounds in a worker's file and their run times, without reading the values; empty while there is none."""
    found: dict[int, float] = {}
    try:
        size = path.stat().st_size
        if size == 0 or size % SLOTS:
            return found
        with path.open("rb") as file:
            for slot in range(SLOTS):
                file.seek(slot * (size // SLOTS))
                round_, elapsed_s, _, _ = _HEADER.unpack(file.read(_HEADER.size))
                if round_:
                    found[round_] = elapsed_s
    except (OSError, struct.error):
        return {}
    return found


def read_round(path: Path, round_: int) -> LiveVector | None:
    """A worker's vector of one round; None when it is not there, or was being written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    half = len(data) // SLOTS
    for slot in range(SLOTS):
        piece = data[slot * half : (slot + 1) * half]
        if len(piece) < _START:
            return None
        number, elapsed_s, steps, crc = _HEADER.unpack_from(piece)
        if number == round_ and zlib.crc32(piece[_START:]) == crc:
            return LiveVector(number, elapsed_s, steps, np.frombuffer(piece[_START:], "<f4"))
    return None
