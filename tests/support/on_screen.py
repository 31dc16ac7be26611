"""A `loscar` command on a pseudo-terminal of a chosen size."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from types import TracebackType
from typing import Self

from processes import DEADLINE_S, descendants

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """Runs the command until the block's end; whatever is left of it is killed there.

    Args:
        arguments: of `loscar`.
        columns, lines: the terminal's size.
    """

    def __init__(self, *arguments: str, columns: int, lines: int) -> None:
        self._arguments = arguments
        self._size = (lines, columns)
        self.text = ""
        """All that was written, without what moves the cursor or sets colours."""

    def __enter__(self) -> Self:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *self._size, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "loscar_deploy", *self._arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**environment, "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(slave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in descendants(self._popen.pid):
            child.kill()
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        os.close(self._master)

    def read_until(self, pattern: str, deadline_s: float = DEADLINE_S) -> None:
        """Until something matches in what was written after the last match."""
        end = time.monotonic() + deadline_s
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.text[-3000:]!r}"
            if not self._read():
                found = re.search(pattern, self.text)
                assert found, self.text[-3000:]
                break
        self.text = self.text[found.end() :]

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """The exit status; reads on, so that the command can write."""
        end = time.monotonic() + deadline_s
        while self._popen.poll() is None:
            assert time.monotonic() < end, self.text[-3000:]
            self._read()
        return self._popen.wait()

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], 0.2)
        if not ready:
            return True
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.text += _CONTROL.sub("", data.decode(errors="replace"))
        return bool(data)
