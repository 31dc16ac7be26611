"""Memory that is not needed any more."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def return_freed_memory() -> None:
    """Give what was freed back to the operating system, where the C library keeps it and can be asked to (glibc).

    A join frees several times the model in pieces that are too small to be given back by themselves.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
