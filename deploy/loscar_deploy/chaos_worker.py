"""A worker that keeps books: what its steps did, what it sent, and where it ended.

It joins and trains as anybody would. Beside that it adds up its local steps in float64, writes every contribution to
a file before the first byte of it can leave, and at the end writes down its live vector, its anchor and the sums, so
that an auditor can balance the ledger without taking the library's word for anything:

    NAME.INCARNATION.PID.sent    one record a contribution: round, count, values (uint64, uint64, float32 each)
    NAME.json, NAME.npz      at the end: position and digest; live, anchor, stepped, given, forgone
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import loscar_worker.session
from loscar_core.errors import LoscarError
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_ledger import Ledger, Record
from loscar_deploy.children import exit_with_parent
from loscar_worker.app import Stopper, write_json
from loscar_worker.background import ReadyUpdate
from loscar_worker.model import ModelView
from loscar_worker.session import Session, join
from loscar_worker.tasks import Task, load_task
from loscar_worker.tasks.partition import Batches, partition

HEADER = struct.Struct("<QQ")


class BookedLedger(Ledger):
    """A ledger that writes every contribution to a file before it can be sent.

    Args:
        path: the file's; asked for with the first contribution, since a resumed worker learns who it is late.
    """

    def __init__(self, path: Callable[[], Path]) -> None:
        super().__init__()
        self._path = path
        self._file = -1

    def add(self, record: Record) -> None:
        if self._file < 0:
            self._file = os.open(self._path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        values = record.sent.astype("<f4", copy=False)
        os.write(self._file, HEADER.pack(record.plan.round, values.size) + values.tobytes())
        super().add(record)


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
        forgone: own progress that the rejoin rule left out after long absences (negative where it took away).
    """

    def __init__(self, view: ModelView, *args: Any, **options: Any) -> None:
        super().__init__(view, *args, **options)
        self.walked = np.zeros(view.layout.dimension)
        self.given = np.zeros(view.layout.dimension)
        self.forgone = np.zeros(view.layout.dimension)

    def live(self) -> NDArray[np.float64]:
        return self._view.vector().astype(np.float64)

    def _merge(self, ready: ReadyUpdate) -> None:
        update = ready.update
        if update.round == 0 and update.indices is None and update.sent is None and not update.anchor.any():
            self.given += update.new_anchor
        super()._merge(ready)

    def _rejoin_after_absence(self, ready: ReadyUpdate) -> None:
        update = ready.update
        before = self.live()
        super()._rejoin_after_absence(ready)
        change = self.live() - before
        at = slice(None) if update.indices is None else update.indices
        self.forgone[at] += change[at] - (update.new_anchor.astype(np.float64) - update.anchor)


def keep_books(folder: Path) -> None:
    """From now on, what is joined in this process keeps books and writes its contributions to `folder`."""

    class BookedEngine(WorkerEngine):
        def __init__(self, name: str, incarnation: bytes, *args: Any, **options: Any) -> None:
            super().__init__(name, incarnation, *args, **options)
            self.ledger = BookedLedger(lambda: folder / f"{self.name}.{self.incarnation.hex()}.{os.getpid()}.sent")

    loscar_worker.session.WorkerEngine = BookedEngine  # type: ignore[attr-defined]
    loscar_worker.session.Session = BookedSession  # type: ignore[misc]


def _train(
    session: BookedSession,
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    step_time_s: float,
    saver: Saver,
    stopper: Stopper,
) -> None:
    model.train()
    while not session.finished and not stopper.asked:
        started = time.perf_counter()
        loss = task.loss(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        before = session.live()
        optimizer.step()
        session.walked += session.live() - before
        optimizer.zero_grad()
        time.sleep(max(0.0, step_time_s - (time.perf_counter() - started)))
        session.step(loss=loss)
        saver.save_if_due()


class Saver:
    """Saves the whole worker now and then, as somebody would who expects to be pre-empted."""

    def __init__(
        self, path: Path | None, every_s: float, session: Session, optimizer: torch.optim.Optimizer, batches: Batches
    ) -> None:
        self._path = path
        self._every_s = every_s
        self._parts = session, optimizer, batches
        self._saved_at = time.monotonic()

    def save_if_due(self) -> None:
        if self._path is None or time.monotonic() - self._saved_at < self._every_s:
            return
        session, optimizer, batches = self._parts
        state = {
            "session": session.state_dict(),
            "optimizer": optimizer.state_dict(),
            "batches": batches.state_dict(),
        }
        part = self._path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self._path)
        self._saved_at = time.monotonic()


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    stopper = Stopper()
    stopper.install()
    task = load_task("digits", None)
    model = task.make_model(args.seed)
    optimizer = task.make_optimizer(model)
    saved = torch.load(args.state, weights_only=True) if args.state is not None and args.state.exists() else None
    keep_books(args.folder)
    session = join(
        args.server,
        model,
        name=args.name,
        slot=args.slot,
        connect_timeout_s=120.0,
        server_timeout_s=120.0,
        rejoin=args.rejoin,
        state=None if saved is None else saved["session"],
    )
    assert isinstance(session, BookedSession)
    engine = session.engine
    if not session.joined_at_start and saved is None:
        incarnation = int.from_bytes(engine.incarnation[:4], "little")
    else:
        incarnation = 0 if saved is None else saved["batches"]["incarnation"]
    share = partition(task.labels(), "iid", args.workers, args.slot, args.seed)
    batches = Batches(task.train, share, task.batch_size, seed=args.seed, slot=args.slot, incarnation=incarnation)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        batches.load_state_dict(saved["batches"])
    saver = Saver(args.state, args.state_every, session, optimizer, batches)
    with session:
        _train(session, task, model, optimizer, batches, args.step_time, saver, stopper)
    anchor = engine.anchor
    np.savez(
        args.folder / f"{args.name}.npz",
        live=session.live(),
        anchor=anchor.vector,
        stepped=session.walked,
        given=session.given,
        forgone=session.forgone,
    )
    values = {
        "name": args.name,
        "incarnation": engine.incarnation.hex(),
        "finished": session.finished,
        "resumed": saved is not None,
        "position": [anchor.position.epoch, anchor.position.round],
        "digest": anchor.digest,
        "steps": session.steps,
        "contributions": session.contributions,
        "reconnects": session.reconnects,
        "idle_seconds": session.idle_s,
    }
    write_json(args.folder / f"{args.name}.json", values)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loscar chaos worker")
    parser.add_argument("--server", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-time", type=float, default=0.01)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--state-every", type=float, default=1.0)
    parser.add_argument("--rejoin", default="project")
    parser.add_argument("--exit-with-parent", action="store_true")
    args = parser.parse_args(arguments)
    if args.exit_with_parent:
        exit_with_parent()
    try:
        run(args)
    except LoscarError as error:
        print(f"loscar: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
