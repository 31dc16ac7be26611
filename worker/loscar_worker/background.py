"""The background half of a session: its connection, on the process's background loop.

Prepares on the loop what the training thread would otherwise have to wait for (index tensors, device copies,
encoding) and leaves finished work in a mailbox. A dead background task fails the next `step()` with its cause.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from loscar_core.errors import LoscarError, SessionFailedError
from loscar_core.gathering import Answer, Values
from loscar_core.messages import Reason, WorkerReport
from loscar_core.replica import Floats
from loscar_core.worker_effects import Initialise, ProgressWanted, RoundOpen, RunEnded, Update, WorkerEffect
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_state import export_worker
from loscar_wire.averages import AverageCall, check_call
from loscar_worker.averaging import Averaging
from loscar_worker.connection import Connection, ConnectionOptions
from loscar_worker.loop import shared_loop
from loscar_worker.model import HostCopy, Selected
from loscar_worker.model_range import View

log = logging.getLogger("loscar.worker")

CLOSE_S = 15.0
"""How long closing waits for the connection; its own waits are all shorter."""


@dataclass(frozen=True, slots=True)
class OpenRound:
    """A round that a snapshot may be taken for, with its selection prepared."""

    open: RoundOpen
    selected: Selected


@dataclass(frozen=True, slots=True)
class ReadyUpdate:
    """An update whose values wait where the model lives since `at_s` of the session's clock, one tensor a piece."""

    at_s: float
    update: Update
    selected: Selected
    anchor: list[Tensor]
    new_anchor: list[Tensor]
    sent: list[Tensor] | None


@dataclass
class Mailbox:
    """What the background has ready for the training thread; guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    updates: deque[ReadyUpdate] = field(default_factory=deque)
    open: OpenRound | None = None
    initial: Initialise | None = None
    ended: RunEnded | None = None
    rejected: int | None = None
    progress_wanted: bool = False
    delivered: int = 0
    """Updates that were ever put into `updates`, or are about to be."""
    failure: BaseException | None = None
    version: int = 0
    """Grows with every change, so that an unchanged mailbox is seen without taking the lock."""


class Background:
    """Runs a worker's connection beside the training thread.

    Args:
        engine: the protocol's state; belongs to the background thread once started.
        view: the model; the background only prepares indices and copies for it.
        options: where to connect.
        report: the worker's figures.
        changed: what guards the mailbox, shared by those who are waited for together.
    """

    def __init__(
        self,
        engine: WorkerEngine,
        view: View,
        options: ConnectionOptions,
        report: Callable[[], WorkerReport],
        changed: threading.Condition | None = None,
    ) -> None:
        self.mailbox = Mailbox() if changed is None else Mailbox(changed)
        self.engine = engine
        self.clock: Callable[[], float] = time.monotonic
        self._view = view
        self._loop = shared_loop()
        self.connection = Connection(engine, options, self._on_effect, report)
        self._running: concurrent.futures.Future[None] | None = None
        self._prepared: tuple[int, Selected] | None = None
        self._updates: list[ReadyUpdate] = []
        self._changes: dict[str, object] = {}
        self._delivering = False
        self._averages: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._running = asyncio.run_coroutine_threadsafe(self._run(), self._loop)

    async def _run(self) -> None:
        try:
            await self.connection.run()
        except BaseException as error:
            if not isinstance(error, LoscarError):
                log.debug("the background task failed", exc_info=error)
            if self.mailbox.failure is None:
                self._publish(failure=error)
            if not isinstance(error, Exception):
                raise

    # --- for the training thread ----------------------------------------------------------------------------

    def raise_failure(self) -> None:
        """Raise what ended the background task: our own errors as they are, others as SessionFailedError."""
        failure = self.mailbox.failure
        if isinstance(failure, LoscarError):
            raise failure
        if failure is not None:
            raise SessionFailedError(f"the background task died: {failure!r}") from failure

    def snapshot(self, round_: int, copy: HostCopy, statistics: Floats, local: int, overlap: int, merged: int) -> None:
        """Hand a snapshot of a model with `merged` updates over to be encoded and sent; returns at once."""
        self._post(self._take_snapshot, round_, copy, statistics, local, overlap, merged)

    def progress(self, copy: HostCopy, merged: int) -> None:
        """Hand the live vector over for a newcomer; `merged` updates were applied to it."""
        self._post(self._give_progress, copy, merged)

    def export(self, merged: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
        """The engine's state, or None when more than `merged` updates have been delivered."""

        async def on_loop() -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
            return export_worker(self.engine) if self.mailbox.delivered == merged else None

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(CLOSE_S)

    def let_count(self) -> None:
        """The server may wait for this worker from now on."""
        self._post(lambda: self.connection.carry_out(self.engine.let_count()))

    def stop_run(self, why: str) -> None:
        self._post(self.connection.stop_run, why)

    def average(self, label: str, values: Values, wait_s: float, at_least: int) -> concurrent.futures.Future[Answer]:
        """Begin a one-off average of a vector; what comes of it."""
        call = AverageCall(
            self.engine.run_id,
            self.engine.incarnation,
            label,
            values.size,
            values.dtype.name,
            wait_s,
            at_least,
        )
        check_call(call)
        averaging = Averaging(call, values, lambda: self.connection.target, self.connection.security)
        self._loop.call_soon_threadsafe(self._begin, averaging)
        return averaging.answer

    def _begin(self, averaging: Averaging) -> None:
        self._averages.add(task := self._loop.create_task(averaging.run(), name="average"))
        task.add_done_callback(self._averages.discard)

    async def _end_averages(self) -> None:
        tasks = list(self._averages)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def ended(self) -> bool:
        """The connection has ended, as it should or not."""
        return self._running is not None and self._running.done()

    def close(self, reason: Reason, detail: str) -> None:
        """Leave, and wait until the connection is closed."""
        if self._running is None:
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end_averages(), self._loop).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self.connection.leave, reason, detail)
        try:
            self._running.result(CLOSE_S)
        except TimeoutError:
            log.warning("the connection did not close within %g s", CLOSE_S)
            self._running.cancel()

    def _post(self, what: Callable[..., None], *args: object) -> None:
        self._loop.call_soon_threadsafe(self._guarded, what, args)

    def _guarded(self, what: Callable[..., None], args: tuple[object, ...]) -> None:
        try:
            what(*args)
        except Exception as error:
            self._publish(failure=error)
            self.connection.leave(Reason.FAILED, str(error))

    # --- on the loop ----------------------------------------------------------------------------------------

    def _take_snapshot(
        self, round_: int, copy: HostCopy, statistics: Floats, local: int, overlap: int, merged: int
    ) -> None:
        effects = None
        if merged == self.mailbox.delivered:  # else the anchor has moved since, and the model has not yet
            effects = self.engine.snapshot(round_, copy.values(), statistics, local, overlap)
        if effects is None:
            self._publish(rejected=round_)
        else:
            self.connection.carry_out(effects)

    def _give_progress(self, copy: HostCopy, merged: int) -> None:
        if merged == self.mailbox.delivered:
            self.connection.carry_out(self.engine.progress(copy.values()))
        else:
            self._publish(progress_wanted=True)  # the anchor has moved since: at the next boundary, then

    def _publish(self, updates: Sequence[ReadyUpdate] = (), **changes: object) -> None:
        """Add updates, set fields of the mailbox, all at once, and wake the training thread if it waits."""
        box = self.mailbox
        with box.changed:
            box.updates.extend(updates)
            for name, value in changes.items():
                setattr(box, name, value)
            box.version += 1
            box.changed.notify_all()

    def _on_effect(self, effect: WorkerEffect) -> None:
        match effect:
            case Update():
                self._updates.append(self._prepare(effect))
                self.mailbox.delivered += 1
                if not effect.progress:
                    self._changes["open"] = None
            case RoundOpen():
                self._changes["open"] = OpenRound(effect, self._select(effect))
            case Initialise():
                self._changes["initial"] = effect
            case ProgressWanted():
                self._changes["progress_wanted"] = True
            case RunEnded():
                self._changes.update(ended=effect, open=None)
            case _:
                return
        if not self._delivering:
            # Once the message that these effects are from is dealt with: its effects belong together. Whoever saw
            # the last update without the end that comes with it would train on.
            self._delivering = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._delivering = False
        updates, self._updates = self._updates, []
        changes, self._changes = self._changes, {}
        self._publish(updates, **changes)

    def _select(self, opened: RoundOpen) -> Selected:
        where = opened.where
        selected = self._view.select(range(where.start, where.stop) if isinstance(where, slice) else where)
        # With an explicit selection the answer has other coordinates than the snapshot.
        self._prepared = None if opened.plan.explicit else (opened.plan.round, selected)
        return selected

    def _prepare(self, update: Update) -> ReadyUpdate:
        prepared = self._prepared
        if prepared is not None and update.round == prepared[0]:
            selected = prepared[1]
        else:
            selected = self._view.select(update.indices)
        prepare = self._view.prepare
        anchor, new_anchor = prepare(selected, update.anchor), prepare(selected, update.new_anchor)
        sent = None if update.sent is None else prepare(selected, update.sent)
        return ReadyUpdate(self.clock(), update, selected, anchor, new_anchor, sent)


def wait_changed(looks: Sequence[tuple[Mailbox, int]], timeout_s: float) -> float:
    """Sleep until one of the mailboxes, which share a lock, is newer than it was; returns the seconds waited."""
    started = time.monotonic()
    changed = looks[0][0].changed
    with changed:
        changed.wait_for(lambda: any(mailbox.version != version for mailbox, version in looks), timeout_s)
    return time.monotonic() - started
