"""A worker that keeps books: what its steps did, what it sent, and where it ended.

It joins and trains as anybody would, on the digits that its parent has saved for it (a process that is started again
and again should not import scikit-learn each time). Beside that it adds up its local steps in float64, writes every
contribution to a file before the first byte of it can leave, and at the end writes down its live vector, its anchor
and the sums, so that an auditor can balance the ledger without taking the library's word for anything:

    NAME.INCARNATION.PID.sent    one record a contribution: round, count, values (uint64, uint64, float32 each)
    NAME.json, NAME.npz          at the end: position and digest; live, anchor, stepped, given, forgone

A worker that is resumed from a saved state takes its books from there too: what a life did after its last save is
lost with it, and only what it sent before counts as this worker's. Where it cannot know any more whether a contribution
is in, since that life went on, it forgets progress and contribution alike, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import loscar_worker.session
from loscar_core.errors import LoscarError
from loscar_core.replica import Indices
from loscar_core.state import Included, Lineage
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_ledger import Ledger, Record
from loscar_deploy.children import exit_with_parent
from loscar_worker.app import Stopper, write_json
from loscar_worker.background import ReadyUpdate
from loscar_worker.model import ModelView
from loscar_worker.session import Session, join
from loscar_worker.tasks.base import ArrayDataset, Task
from loscar_worker.tasks.models import mlp
from loscar_worker.tasks.partition import Batches, partition

HEADER = struct.Struct("<QQ")
DATA = "digits.npz"

Lives = list[tuple[str, int]]
"""Files of contributions, and how many in each are this worker's."""


class SavedDigits(Task):
    """The `digits` task from a file.

    Args:
        path: what `save` wrote.
    """

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            data = ArrayDataset(torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"]))
        super().__init__("digits", data, data, batch_size=16, lr=0.1)

    @staticmethod
    def save(task: Task, path: Path) -> None:
        np.savez(path, inputs=task.train.inputs.numpy(), targets=task.train.targets.numpy())

    def build_model(self) -> nn.Module:
        return mlp((64, 64, 10))


class BookedLedger(Ledger):
    """A ledger that writes every contribution to a file before it can be sent.

    Args:
        path: the file's; asked for with the first contribution, since a resumed worker learns who it is late.
    """

    def __init__(self, path: Callable[[], Path]) -> None:
        super().__init__()
        self.waiting: list[Record] = []
        self._path = path
        self._file = -1

    def add(self, record: Record) -> None:
        if self._file < 0:
            self._file = os.open(self._path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        values = record.sent.astype("<f4", copy=False)
        os.write(self._file, HEADER.pack(record.plan.round, values.size) + values.tobytes())
        super().add(record)

    def resolve(self, own: Included, round_: int, lineage: Lineage) -> list[tuple[Record, int, int]]:
        self.waiting = [r for r in self.all() if not r.decided]
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
        lives: earlier lives of a resumed worker.
    """

    def __init__(self, view: ModelView, *args: Any, **options: Any) -> None:
        super().__init__(view, *args, **options)
        self.walked = np.zeros(view.layout.dimension)
        self.given = np.zeros(view.layout.dimension)
        self.forgone = np.zeros(view.layout.dimension)
        self.lives: Lives = []

    @property
    def booked(self) -> BookedEngine:
        assert isinstance(self.engine, BookedEngine)
        return self.engine

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
    """An engine with a ledger that is written down.

    Attributes:
        given_up: rounds of contributions that are forgotten with the progress that they held.
    """

    def __init__(self, folder: Path, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.given_up: list[int] = []
        self.ledger: BookedLedger = BookedLedger(
            lambda: folder / f"{self.name}.{self.incarnation.hex()}.{os.getpid()}.sent"
        )

    def _settle_former(self, indices: Indices | None, base_round: int) -> None:
        super()._settle_former(indices, base_round)
        if not self.ledger.all():
            self.given_up += [r.plan.round for r in self.ledger.waiting if not r.subtracted]


def keep_books(folder: Path) -> None:
    """From now on, what is joined in this process keeps books and writes its contributions to `folder`."""

    loscar_worker.session.WorkerEngine = partial(BookedEngine, folder)  # type: ignore[attr-defined,assignment]
    loscar_worker.session.Session = BookedSession  # type: ignore[misc]


class Saver:
    """Saves the whole worker, books included, now and then, as somebody would who expects to be pre-empted.

    Args:
        path: where to, or None not to.
        every_s: how often.
    """

    def __init__(self, path: Path | None, every_s: float, session: BookedSession, batches: Batches) -> None:
        self._path = path
        self._every_s = every_s
        self._session = session
        self._batches = batches
        self._saved_at = time.monotonic()

    def save_if_due(self) -> None:
        if self._path is None or time.monotonic() - self._saved_at < self._every_s:
            return
        session = self._session
        state = session.state_dict()
        sent = json.loads(state["worker"])["counts"][0]
        books = {name: torch.from_numpy(getattr(session, name)) for name in ("walked", "given", "forgone")}
        part = self._path.with_suffix(".part")
        saved = {
            "session": state,
            "batches": self._batches.state_dict(),
            "books": books,
            "lives": session.all_lives(sent),
            "given_up": session.booked.given_up,
        }
        torch.save(saved, part)
        part.replace(self._path)
        self._saved_at = time.monotonic()


def _train(
    session: BookedSession,
    task: Task,
    model: nn.Module,
    batches: Batches,
    step_time_s: float,
    saver: Saver,
    end: Stopper,
) -> None:
    """Plain gradient descent: torch's optimizers import its compiler, which takes a second."""
    model.train()
    parameters = list(model.parameters())
    while not session.finished and not end.asked:
        started = time.perf_counter()
        loss = task.loss(model, next(batches))
        gradients = torch.autograd.grad(loss, parameters)
        before = session.live()
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p.sub_(gradient, alpha=task.lr)
        session.walked += session.live() - before
        time.sleep(max(0.0, step_time_s - (time.perf_counter() - started)))
        session.step(loss=loss)
        saver.save_if_due()


def run(args: argparse.Namespace) -> None:
    """One life of a worker, to its end."""
    torch.set_num_threads(1)
    stopper = Stopper()
    stopper.install()
    task = SavedDigits(args.folder / DATA)
    model = task.make_model(args.seed)
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
    incarnation = 0
    if saved is not None:
        incarnation = saved["batches"]["incarnation"]
    elif not session.joined_at_start:
        incarnation = int.from_bytes(engine.incarnation[:4], "little")
    share = partition(task.labels(), "iid", args.workers, args.slot, args.seed)
    batches = Batches(task.train, share, task.batch_size, seed=args.seed, slot=args.slot, incarnation=incarnation)
    if saved is not None:
        batches.load_state_dict(saved["batches"])
        for name, values in saved["books"].items():
            getattr(session, name)[:] += values.numpy()  # joining has merged, and booked, what was missed
        session.lives = [(file, count) for file, count in saved["lives"]]
        session.booked.given_up += saved["given_up"]
    with session:
        _train(
            session,
            task,
            model,
            batches,
            args.step_time,
            Saver(args.state, args.state_every, session, batches),
            stopper,
        )
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
        "lives": session.all_lives(engine.ledger.sent),
        "given_up": session.booked.given_up,
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
    parser.add_argument("--step-time", type=float, default=0.02)
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
