"""How far a fuzzer's child has come, in a file that parent and child both map: it survives whatever the child does."""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

_HEAD = struct.Struct("<6qd2q")
_BYTES = 1 << 16


class _Number:
    """One number of the shared head, as an attribute."""

    def __init__(self, at: int, code: str = "<q") -> None:
        self._at, self._packed = at * 8, struct.Struct(code)

    def __get__(self, owner: Progress, _: type) -> int | float:
        return self._packed.unpack_from(owner.map, self._at)[0]

    def __set__(self, owner: Progress, value: float) -> None:
        self._packed.pack_into(owner.map, self._at, value)


class Progress:
    """Counters and the input that is being run.

    Attributes:
        inputs, crashes: so far.
        peak_early, peak: highest resident set until a tenth of the inputs, and so far; bytes.
        slowest_s: longest time that an input took.
        blocks_early, blocks: memory blocks that Python holds after a tenth of the inputs, and at the end.
    """

    inputs = _Number(0)
    crashes = _Number(1)
    peak_early = _Number(2)
    peak = _Number(3)
    _started_ns = _Number(4)
    _size = _Number(5)
    slowest_s = _Number(6, "<d")
    blocks_early = _Number(7)
    blocks = _Number(8)

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_BYTES))
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), _BYTES)

    def begin(self, data: bytes) -> None:
        data = data[: _BYTES - _HEAD.size]
        self._size = len(data)
        self.map[_HEAD.size : _HEAD.size + len(data)] = data
        self._started_ns = time.monotonic_ns()

    def done(self) -> None:
        self.inputs += 1
        self.slowest_s = max(self.slowest_s, (time.monotonic_ns() - self._started_ns) / 1e9)
        self._started_ns = 0

    def current_s(self) -> float:
        """How long the present input has been running; 0 between two."""
        started = self._started_ns
        return (time.monotonic_ns() - started) / 1e9 if started else 0.0

    def current(self) -> bytes:
        """The present input, or the last one."""
        return bytes(self.map[_HEAD.size : _HEAD.size + self._size])
