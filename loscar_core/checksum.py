"""CRC-32 (zlib's polynomial) of large buffers.

Where `isal` is installed (`loscar[fast]`), its carry-less multiplications make it several times faster than zlib's
tables; the results are the same.
"""

from __future__ import annotations

import zlib
from typing import Protocol


class Crc32(Protocol):
    def __call__(self, data: bytes | memoryview, value: int = ..., /) -> int: ...


def fastest() -> Crc32:
    """isal's, or zlib's where that is not installed."""
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.crc32
    found: Crc32 = isal_zlib.crc32
    return found


crc32 = fastest()
