"""The worker of a chaos run: it trains as anybody would, and keeps books.

The digits that it trains on come from a file that its parent has saved: a process that is started again and again
should not import scikit-learn each time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from loscar_core.errors import LoscarError
from loscar_deploy.books import BookedSession, close_books, keep_books
from loscar_deploy.children import exit_with_parent
from loscar_worker.app import Stopper
from loscar_worker.joining import join
from loscar_worker.state_file import note_resumption, write_state
from loscar_worker.tasks.base import ArrayDataset, Task
from loscar_worker.tasks.models import mlp
from loscar_worker.tasks.partition import Batches, partition

DATA = "digits.npz"
LEARNING_RATE = 0.4
"""So large that a minute is enough to converge: a run that lost half of its steps is compared with one that did not."""


class SavedDigits(Task):
    """The `digits` task from a file.

    Args:
        path: what `save` wrote.
    """

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            data = ArrayDataset(torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"]))
        super().__init__("digits", data, data, batch_size=16, lr=LEARNING_RATE)

    @staticmethod
    def save(task: Task, path: Path) -> None:
        np.savez(path, inputs=task.train.inputs.numpy(), targets=task.train.targets.numpy())

    def build_model(self) -> nn.Module:
        return mlp((64, 64, 10))


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
        if time.monotonic() - self._saved_at >= self._every_s:
            self.save()

    def save(self) -> None:
        if self._path is None:
            return
        session = self._session
        state = session.state_dict()
        sent = json.loads(state["worker"])["counts"][0]
        books = {name: torch.from_numpy(getattr(session, name)) for name in ("walked", "given", "forgone")}
        saved = {
            "session": state,
            "batches": self._batches.state_dict(),
            "books": books,
            "lives": session.all_lives(sent),
            "given_up": session.given_up,
        }
        write_state(self._path, saved)
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
    if saved is not None:
        before = json.loads(saved["session"]["worker"])
        if "resumed_as" in before:  # a life that was killed before it could save, or contribute anything new
            saved["lives"].append((f"{args.name}.{before['resumed_as']}.0.sent", 0))
        saved = note_resumption(args.state, saved)
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
        session.given_up += saved["given_up"]
    with session:
        saver = Saver(args.state, args.state_every, session, batches)
        if saved is not None:
            saver.save()
        _train(session, task, model, batches, args.step_time, saver, stopper)
    close_books(session, args.folder)


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
