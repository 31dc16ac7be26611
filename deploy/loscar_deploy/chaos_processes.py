"""Processes that are started again when they die, and the moment in a round at which to strike them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loscar_deploy.children import Child

POLL_S = 0.003


@dataclass
class Process:
    """A process that is started again when it dies, until it ends by itself.

    Attributes:
        child: the one that runs, or ran last.
        starts: how often it was started.
        down_s: how long it stays down once it has been killed.
        killed: the child's death is our doing.
        ended: set when it has ended by itself.
    """

    name: str
    child: Child | None = None
    starts: int = 0
    down_s: float = 0.0
    killed: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def signal(self, number: int) -> bool:
        """False when it is not there."""
        if self.child is None or self.child.returncode is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            self.child.process.send_signal(number)
            return True
        return False


class Commits:
    """Watches the server's event log for committed rounds, so that faults can be aimed at a phase of a round."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._times: list[float] = []
        self._condition = asyncio.Condition()
        self.count = 0

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            if not self._path.exists() or self._path.stat().st_size <= self._offset:
                continue
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
            whole = data.rfind(b"\n") + 1
            self._offset += whole
            new = data[:whole].count(b'{"event":"round"')
            if new:
                async with self._condition:
                    self.count += new
                    self._times = [*self._times[-15:], time.monotonic()]
                    self._condition.notify_all()

    @property
    def usual_s(self) -> float:
        """A usual round's length."""
        gaps = sorted(b - a for a, b in itertools.pairwise(self._times))
        return gaps[len(gaps) // 2] if gaps else 0.1

    def phase(self) -> float | None:
        """How far the open round is, in usual rounds; None when rounds stand still."""
        if not self._times:
            return None
        phase = (time.monotonic() - self._times[-1]) / max(self.usual_s, 1e-3)
        return phase if phase < 2 else None

    async def next(self, timeout_s: float) -> bool:
        """Until the next commit; False when the time is over."""
        count = self.count
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._condition:
                await self._condition.wait_for(lambda: self.count > count)
        return self.count > count


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def living(folder: Path, pids: set[int]) -> Iterator[tuple[int, str]]:
    """Living processes that are ours: by number, and (where /proc tells) by the folder on their command line."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, 0)  # each child leads a group of its own
            yield pid, "(one of ours)"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            pid = int(path.parent.name)
            if str(folder) in command and pid != os.getpid():
                yield pid, command
