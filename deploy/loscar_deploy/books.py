"""Books of what a worker did: what its steps came to, what it sent, and where it ended.

Beside the training they add up the local steps in float64, write every contribution to a file before the first byte of
it can leave, and at the end write down live vector, anchor and sums, so that an auditor can balance the ledger without
taking the library's word for anything (see `audit`):

    NAME.INCARNATION.PID.sent    one record a contribution: round, count, values (uint64, uint64, float32 each)
    NAME.json, NAME.npz          at the end: position and digest; live, anchor, stepped, given, forgone

A worker that is resumed from a saved state takes its books from there too: what a life did after its last save is
lost with it, and only what it sent before counts as this worker's. Where it cannot know any more whether a contribution
is in, since that life went on, it forgets progress and contribution alike, and says so.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import loscar_worker.joining
from loscar_core.state import Included, Lineage
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_ledger import Ledger, Record
from loscar_worker.app import write_json
from loscar_worker.background import ReadyUpdate
from loscar_worker.model import ModelView
from loscar_worker.session import Session

HEADER = struct.Struct("<QQ")

Lives = list[tuple[str, int]]
"""Files of contributions, and how many in each are this worker's."""


class BookedLedger(Ledger):
    """A ledger that writes every contribution to a file before it can be sent.

    Args:
        path: the file's; asked for with the first contribution, since a resumed worker learns who it is late.
    """

    def __init__(self, path: Callable[[], Path]) -> None:
        super().__init__()
        self.waiting: list[Record] = []
        """What was not decided when the ledger was made to agree with a state."""
        self._path = path
        self._file = -1

    def add(self, record: Record) -> None:
        if self._file < 0:
            self._file = os.open(self._path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        values = record.sent.astype("<f4", copy=False)
        os.write(self._file, HEADER.pack(record.plan.round, values.size) + values.tobytes())
        super().add(record)

    def resolve(self, own: Included | None, round_: int, lineage: Lineage) -> list[tuple[Record, int, int]]:
        self.waiting += [r for r in self.all() if not r.decided]
        return super().resolve(own, round_, lineage)


def read_sent(path: Path) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(round, δ̂) of every contribution in a file; a half-written last one was never sent."""
    data = path.read_bytes()
    at = 0
    while at + HEADER.size <= len(data):
        round_, count = HEADER.unpack_from(data, at)
        at += HEADER.size
        if at + 4 * count > len(data):
            return
        yield round_, np.frombuffer(data, "<f4", count, at).astype(np.float32)
        at += 4 * count


class BookedSession(Session):
    """A session that keeps account of what its live vector goes through, in float64.

    Attributes:
        walked: the sum of the local steps.
        given: another worker's progress that it started with.
        forgone: own progress that was not taken along (what it lacks, so mostly the negative of it): what the rejoin
            rule left out after long absences, and what a life that was not saved may have sent.
        given_up: rounds of contributions that may be in, and are forgotten with the progress that they held.
        lives: earlier lives of a resumed worker.
    """

    def __init__(self, view: ModelView, *args: Any, **options: Any) -> None:
        super().__init__(view, *args, **options)
        self.walked = np.zeros(view.layout.dimension)
        self.given = np.zeros(view.layout.dimension)
        self.forgone = np.zeros(view.layout.dimension)
        self.given_up: list[int] = []
        self.lives: Lives = []

    def live(self) -> NDArray[np.float64]:
        return self._view.vector().astype(np.float64)

    def all_lives(self, sent: int) -> Lives:
        """With the present one, of a worker that has sent so many contributions in all."""
        own = f"{self.engine.name}.{self.engine.incarnation.hex()}.{os.getpid()}.sent"
        return [*self.lives, (own, sent - sum(count for _, count in self.lives))]

    def _merge(self, ready: ReadyUpdate) -> None:
        update = ready.update
        if update.round == 0 and update.indices is None and update.sent is None and not update.anchor.any():
            self.given += update.new_anchor
        if update.forget:
            self._forgo(ready, super()._merge)
            assert isinstance(self.engine, BookedEngine)
            self.given_up += [r.plan.round for r in self.engine.ledger.waiting if not r.subtracted]
        else:
            super()._merge(ready)

    def _rejoin_after_absence(self, ready: ReadyUpdate) -> None:
        self._forgo(ready, super()._rejoin_after_absence)

    def _forgo(self, ready: ReadyUpdate, apply: Callable[[ReadyUpdate], None]) -> None:
        """Apply an update, and book what it does beyond moving the model with the anchor."""
        update = ready.update
        before = self.live()
        apply(ready)
        change = self.live() - before
        at = slice(None) if update.indices is None else update.indices
        self.forgone[at] += change[at] - (update.new_anchor.astype(np.float64) - update.anchor)


class BookedEngine(WorkerEngine):
    """An engine with a ledger that is written down."""

    def __init__(self, folder: Path, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ledger: BookedLedger = BookedLedger(
            lambda: folder / f"{self.name}.{self.incarnation.hex()}.{os.getpid()}.sent"
        )


def keep_books(folder: Path) -> None:
    """From now on, what is joined in this process keeps books and writes its contributions to `folder`."""

    loscar_worker.joining.WorkerEngine = partial(BookedEngine, folder)  # type: ignore[attr-defined,assignment]
    loscar_worker.joining.Session = BookedSession  # type: ignore[attr-defined]


def close_books(session: BookedSession, folder: Path) -> None:
    """Write down where a worker has ended; see the module."""
    engine = session.engine
    anchor = engine.anchor
    np.savez(
        folder / f"{session.name}.npz",
        live=session.live(),
        anchor=anchor.vector,
        stepped=session.walked,
        given=session.given,
        forgone=session.forgone,
    )
    values = {
        "name": session.name,
        "finished": session.finished,
        "lives": session.all_lives(engine.ledger.sent),
        "given_up": session.given_up,
        "position": [anchor.position.epoch, anchor.position.round],
        "digest": anchor.digest,
        "steps": session.steps,
        "contributions": session.contributions,
        "reconnects": session.reconnects,
        "idle_seconds": session.idle_s,
    }
    write_json(folder / f"{session.name}.json", values)
