"""What happened on a server, one JSON line an event: for audits, and for tests that must not take its word later.

Every line is written with one call before anything that follows from it can reach a worker, so a server that is
killed leaves a log that is behind nobody. Processes that serve the same run one after the other append to one file.

    serving     a process started: pid
    joined      name, slot, observer
    gone        name, slot, reason, detail
    running     rounds are open: position, members, elapsed_s; recovered when the position is not the run's beginning
    round       committed: round, kind, n, digest, previous (digest before it), parts (per part, who is in)
    finished    why
    stepped-down, notice   text

All lines have `event`, `time` (seconds since 1970) and `epoch`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loscar_core import effects as fx
from loscar_core.errors import ConfigError
from loscar_core.state import bits

log = logging.getLogger("loscar.server")


class EventLog:
    """Appends events to a file.

    Args:
        path: the file; made when missing.
        clock: seconds since 1970.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._end_torn_line()
        except OSError as error:
            raise ConfigError(f"--events {path} cannot be written: {error.strerror or error}") from None

    def _end_torn_line(self) -> None:
        """A process that was killed may have left half a line."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def write(self, event: str, epoch: int, **values: Any) -> None:
        """Append one line. A full disk ends the log, not the server."""
        if self._file < 0:
            return
        line = {"event": event, "time": round(self._clock(), 3), "epoch": epoch, **values}
        try:
            os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            log.error("no more events are written to %s: %s", self._path, error.strerror or error)
            self.close()

    def note(self, effect: fx.ServerEffect, epoch: int) -> None:
        """Write an effect down, if it is an event."""
        match effect:
            case fx.MemberJoined(name, slot, observer):
                self.write("joined", epoch, name=name, slot=slot, observer=observer)
            case fx.MemberGone(d):
                self.write("gone", epoch, name=d.name, slot=d.slot, reason=d.reason.value, detail=d.detail)
            case fx.RunStarted(position, members, elapsed_s):
                self.write(
                    "running",
                    epoch,
                    position=[position.epoch, position.round],
                    recovered=position.round > 0,
                    members=members,
                    elapsed_s=round(elapsed_s, 3),
                )
            case fx.RoundCommitted() as r:
                self.write(
                    "round",
                    epoch,
                    round=r.position.round,
                    kind=r.plan.kind.name.lower(),
                    n=r.members,
                    digest=r.digest,
                    previous=r.previous_digest,
                    seconds=round(r.seconds, 6),
                    parts=[[(r.roster[slot] or b"").hex() for slot in bits(part)] for part in r.bitmaps],
                )
            case fx.RunFinished(why):
                self.write("finished", epoch, text=why)
            case fx.SteppedDown(detail):
                self.write("stepped-down", epoch, text=detail)
            case fx.Notice(text):
                self.write("notice", epoch, text=text)
            case _:
                pass

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file in order; half lines of processes that were killed are left out."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
