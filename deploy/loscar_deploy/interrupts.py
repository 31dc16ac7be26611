"""Ctrl+C while a command is still importing what it needs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from loscar_core.errors import InterruptedRunError


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """Within it the first Ctrl+C ends this process, without a word and with the exit code of an interrupted run.

    A KeyboardInterrupt would now and then be lost: imports run destructors and callbacks, out of which no exception
    gets, and libraries that try an import take whatever it raises. For where there is nothing to be cleaned up yet.
    Nothing is changed where Ctrl+C is ignored (`nohup`) or handled already.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(*_: object) -> None:
        os._exit(InterruptedRunError.exit_code)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is end:  # and not what the command has put in its place
            signal.signal(signal.SIGINT, signal.default_int_handler)
