"""A worker's session: what a training loop sees of a run.

The training thread owns the model. Between two optimizer steps it hands over a snapshot of the open round's
coordinates, or applies an update that the background has ready; it never waits for the network unless the pace
that was asked for says so.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from loscar_core.errors import ConfigError, ServerLostError, SessionFailedError
from loscar_core.merge import MergeKind, RejoinKind, merge, parse_rejoin, projection
from loscar_core.messages import Reason, WorkerReport
from loscar_core.plan import RoundKind, RoundPlan
from loscar_core.replica import Floats
from loscar_core.worker_cycle import Action, Cycle, Situation
from loscar_core.worker_engine import RunEnded, WorkerEngine
from loscar_core.worker_state import import_worker
from loscar_wire.transport import ClientSecurity, parse_address
from loscar_worker.background import Background, OpenRound, ReadyUpdate, wait_changed
from loscar_worker.connection import ConnectionOptions
from loscar_worker.model import ModelView

log = logging.getLogger("loscar.worker")

WAIT_SLICE_S = 1.0
LOSSES_KEPT = 64


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One merged round as its worker lived it; times in seconds of run time.

    Attributes:
        round: its number.
        kind: what it was for.
        steps: optimizer steps taken when it was merged, from the start.
        local_steps: steps from the previous merge to the snapshot (0 when there was none).
        overlap_steps: steps from the snapshot to the merge.
        snapshot_s: when the snapshot was taken, None without one.
        merged_s: when the merge was done.
        waited_s: how long the training thread waited for the service in this round.
        included: the contribution is in the average.
    """

    round: int
    kind: str
    steps: int
    local_steps: int
    overlap_steps: int
    snapshot_s: float | None
    merged_s: float
    waited_s: float
    included: bool


@dataclass(frozen=True, slots=True)
class Pace:
    """Overrides of the pace that the server offers; None takes the server's.

    Attributes:
        local_steps: N, or "auto" to contribute `sync_interval_s` after the last merge.
        sync_interval_s: see `local_steps`.
        overlap_steps: Q, or "auto" to merge when the answer is there; 0 blocks.
    """

    local_steps: int | str | None = None
    sync_interval_s: float | None = None
    overlap_steps: int | str | None = None


class Session:
    """One worker's membership of a run; made by `join`, closed by `with` or `close`.

    Attributes:
        steps: optimizer steps taken.
        finished: the run is over; the model holds what it ended with.
        name: this worker's name.
        slot: its place in the run.
    """

    def __init__(
        self,
        view: ModelView,
        engine: WorkerEngine,
        options: ConnectionOptions,
        pace: Pace,
        *,
        on_round: Callable[[RoundRecord], None] | None = None,
        on_evaluation: Callable[[Session, int], None] | None = None,
        rejoin: RejoinKind = RejoinKind.PROJECT,
    ) -> None:
        self.steps = 0
        self.finished = False
        self.name = engine.name
        self.idle_s = 0.0
        self.service_s = 0.0
        self.joined_at_start = True
        self._pid = os.getpid()
        self._view = view
        self._pace = pace
        self._on_round = on_round
        self._on_evaluation = on_evaluation
        self._losses: deque[Tensor | float] = deque(maxlen=LOSSES_KEPT)
        self._loss: float | None = None
        self._t0: float | None = None
        self._ended_s: float | None = None
        self._waited_in_round = 0.0
        self._snapshot_at: float | None = None
        self._snapshot_steps = 0
        self._in_final_round = False
        self._asked_to_stop = False
        self._closed = False
        self._rejoin = rejoin
        self._merged = 0
        self._options = options
        self._background = Background(engine, view, options, self._report)
        self._cycle = Cycle(1, 1.0, None, time.monotonic())
        self._joined_s = 0.0
        self._merge_kind = MergeKind.DELAY_CORRECTED
        self._max_steps: int | None = None

    # --- joining --------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Connect, take over the initial model, wait for t = 0."""
        box = self._background.mailbox
        resumed = self.engine.initialised
        self._background.start()
        atexit.register(self.close)
        try:
            if not resumed:
                self._wait_for(lambda: box.initial is not None)
                assert box.initial is not None
                self._view.load_vector(box.initial.vector)
                self._view.load_statistics(box.initial.statistics)
            self._wait_for(lambda: box.open is not None or box.ended is not None)
            config = self.engine.config
            assert config is not None
            self._merge_kind = config.merge
            self._max_steps = config.max_steps
            self._cycle = _cycle(self._pace, config.local_steps, config.sync_interval_s, config.overlap_steps)
            elapsed = max(0.0, self.engine.elapsed_s)
            self._t0 = time.monotonic() - elapsed
            self.joined_at_start = self.engine.anchor.position.round == 0
            self._joined_s = elapsed
            # With N = 0 the first snapshot is due before the first step.
            self._synchronise()
        except BaseException as error:
            self.close(*_why(error))
            raise

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        box = self._background.mailbox
        while True:
            version = box.version  # before looking: what comes in between ends the wait
            self._background.raise_failure()
            if ready():
                return
            wait_changed(box, version, WAIT_SLICE_S)

    # --- training -------------------------------------------------------------------------------------------

    @property
    def engine(self) -> WorkerEngine:
        return self._background.engine

    @property
    def slot(self) -> int:
        return self.engine.slot

    @property
    def run_id(self) -> str:
        return self.engine.run_id.hex()

    @property
    def should_stop(self) -> bool:
        """The run is over: leave the loop."""
        return self.finished

    @property
    def run_s(self) -> float:
        """Seconds of run time; those before this worker joined count."""
        if self._t0 is None:
            return 0.0
        return (time.monotonic() if self._ended_s is None else self._ended_s) - self._t0

    def step(self, loss: Tensor | float | None = None) -> None:
        """Call after every optimizer step: synchronises here, between two steps, when it is time to.

        Args:
            loss: this step's loss, shown in status and logs. The tensor is kept detached and read in the
                background, so a GPU is not waited for.

        Raises:
            LoscarError: the run cannot go on for this worker (a dead background task included).
        """
        if self.finished:
            return
        if self._closed:
            raise SessionFailedError("step() after the session was closed")
        entered = time.perf_counter()
        waited_before = self.idle_s
        self.steps += 1
        self._cycle.stepped()
        if loss is not None:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else float(loss))
        if self._max_steps is not None and self.steps >= self._max_steps and not self._asked_to_stop:
            self._asked_to_stop = True
            self._background.stop_run(f"{self.name} has taken {self.steps} steps")
        self._synchronise()
        self.service_s += time.perf_counter() - entered - (self.idle_s - waited_before)

    def _synchronise(self) -> None:
        box = self._background.mailbox
        while not self.finished:
            if box.failure is not None:
                self._background.raise_failure()
            with box.changed:  # one look: a round must not seem open before what it builds on is merged
                update = box.updates[0] if box.updates else None
                opened, ended, version = box.open, box.ended, box.version
            if ended is not None and update is None:
                self._end(ended)
                return
            if box.progress_wanted and update is None:
                box.progress_wanted = False
                self._background.progress(self._view.gather(self._view.select(None)), self._merged)
            if box.rejected is not None:
                rejected, box.rejected = box.rejected, None
                self._cycle.rejected(rejected)
            final = update is None and (
                self._in_final_round
                if opened is None or self._cycle.in_flight is not None
                else opened.open.plan.kind is RoundKind.FINAL
            )
            if opened is not None and opened.open.contributed and self._cycle.in_flight is None:
                self._cycle.took_snapshot(opened.open.plan.round)
            situation = Situation(
                update_round=None if update is None else update.update.round,
                update_is_own=update is not None and update.update.round > 0 and update.update.settles is not None,
                plan_round=opened.open.plan.round
                if opened is not None and update is None and not opened.open.contributed
                else None,
                final=final,
            )
            match self._cycle.next(situation, time.monotonic()):
                case Action.TRAIN:
                    return
                case Action.MERGE:
                    assert update is not None
                    self._merge(update)
                case Action.SNAPSHOT:
                    assert opened is not None
                    self._snapshot(opened)
                case Action.WAIT:
                    waited = wait_changed(box, version, WAIT_SLICE_S)
                    if not final:
                        self.idle_s += waited
                        self._waited_in_round += waited

    def _snapshot(self, opened: OpenRound) -> None:
        box = self._background.mailbox
        with box.changed:
            if box.open is opened:
                box.open = None
        plan = opened.open.plan
        copy = self._view.gather(opened.selected)
        self._background.snapshot(
            plan.round,
            copy,
            self._view.statistics(),
            self._cycle.steps_since_merge,
            self._cycle.last_overlap,
            self._merged,
        )
        self._snapshot_steps = self._cycle.steps_since_merge
        self._cycle.took_snapshot(plan.round)
        self._snapshot_at = self.run_s
        self._in_final_round = plan.kind is RoundKind.FINAL

    def _merge(self, ready: ReadyUpdate) -> None:
        box = self._background.mailbox
        update = ready.update
        with box.changed:
            box.updates.popleft()
        self._merged += 1
        plan = update.plan
        if plan is not None and plan.kind is RoundKind.FINAL:
            self._view.write(ready.selected, ready.new_anchor)
        elif update.long_absence and update.new_anchor.size:
            self._rejoin_after_absence(ready)
        elif update.new_anchor.size:
            kind = self._merge_kind if plan is not None else MergeKind.DELAY_CORRECTED
            with torch.no_grad():
                live = self._view.read(ready.selected)
                sent: Sequence[Tensor | None] = ready.sent if ready.sent is not None else [None] * len(live)
                merged = [
                    merge(kind, z, a, b, s)
                    for z, a, b, s in zip(live, ready.anchor, ready.new_anchor, sent, strict=True)
                ]
            self._view.write(ready.selected, merged)
        if update.statistics is not None:
            self._view.load_statistics(update.statistics)
        own = update.settles is not None
        self._in_final_round = self._in_final_round and not own
        self._cycle.merged(own=own, now=time.monotonic())
        if plan is not None:
            self._note_round(plan, own, update.sent is not None)

    def _rejoin_after_absence(self, ready: ReadyUpdate) -> None:
        """x = c + u − β(c − a), so that progress which the others made too is not added twice."""
        with torch.no_grad():
            live = self._view.read(ready.selected)
            progress = [z - a for z, a in zip(live, ready.anchor, strict=True)]
            gains = [b - a for a, b in zip(ready.anchor, ready.new_anchor, strict=True)]
            beta = 0.0
            if self._rejoin is RejoinKind.PROJECT:
                dot = sum(float((u.double() * g.double()).sum()) for u, g in zip(progress, gains, strict=True))
                norm = sum(float(g.double().square().sum()) for g in gains)
                beta = projection(dot, norm)
            keep = 0.0 if self._rejoin is RejoinKind.DROP else 1.0
            merged = [b + (u * keep - g * beta) for b, u, g in zip(ready.new_anchor, progress, gains, strict=True)]
        self._view.write(ready.selected, merged)
        log.info("%s is back after a long absence: rejoin %s, beta %.3f", self.name, self._rejoin.value, beta)

    def _note_round(self, plan: RoundPlan, own: bool, included: bool) -> None:
        if self._on_round is not None:
            record = RoundRecord(
                plan.round,
                plan.kind.name.lower(),
                self.steps,
                self._snapshot_steps if own else 0,
                self._cycle.last_overlap if own else 0,
                self._snapshot_at if own else None,
                self.run_s,
                self._waited_in_round,
                included,
            )
            self._on_round(record)
        self._waited_in_round = 0.0
        if plan.kind is RoundKind.EVALUATION and self._on_evaluation is not None:
            self._on_evaluation(self, plan.round)

    def _end(self, ended: RunEnded) -> None:
        self._ended_s = time.monotonic()
        if ended.vector is not None and ended.statistics is not None:
            self._view.load_vector(ended.vector)
            self._view.load_statistics(ended.statistics)
        self.finished = True

    # --- figures --------------------------------------------------------------------------------------------

    @property
    def reconnects(self) -> int:
        return self._background.connection.reconnects

    @property
    def contributions(self) -> dict[str, int]:
        """The ledger's counters: sent = included + returned + outstanding."""
        ledger = self.engine.ledger
        return {
            "sent": ledger.sent,
            "included": ledger.included,
            "returned": ledger.returned,
            "outstanding": ledger.outstanding,
        }

    @property
    def idle_fraction(self) -> float:
        """Share of this worker's run time in which the training thread waited for the service."""
        if self._t0 is None:
            return 0.0
        own = self.run_s - self._joined_s
        return self.idle_s / own if own > 0 else 0.0

    def _report(self) -> WorkerReport:
        """The heartbeat's figures; called on the background thread, which may wait for a GPU's loss."""
        losses = []
        while self._losses:
            losses.append(float(self._losses.popleft()))
        if losses:
            self._loss = sum(losses) / len(losses)
        engine = self.engine
        ledger = engine.ledger
        return WorkerReport(
            self.steps,
            self._loss,
            self.idle_s,
            self.run_s,
            ledger.sent,
            ledger.included,
            ledger.returned,
            engine.bytes_up,
            engine.bytes_down,
        )

    def live_values(self) -> Floats:
        """The live parameters in logical order, then the statistics; a new float32 array."""
        return np.concatenate([self._view.vector(), self._view.statistics()])

    # --- saving ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This worker's half of the run: anchor, ledger, live parameters. For `join(state=…)`.

        Call it between two steps, and before `model.state_dict()`: what waits to be merged is merged first, so that
        model and anchor belong together. Optimizer and data position are the caller's to save beside it. Holds
        tensors, numbers and text only, so `torch.save` and `torch.load(weights_only=True)` take it.
        """
        while True:
            box = self._background.mailbox
            while box.updates and not self.finished:
                self._merge(box.updates[0])
            exported = self._background.export(self._merged)
            if exported is not None:
                break
        values, arrays = exported
        return {
            "worker": json.dumps(values),
            "arrays": {name: torch.from_numpy(array) for name, array in arrays.items()},
            "live": torch.from_numpy(self._view.vector().copy()),
            "live_statistics": torch.from_numpy(self._view.statistics().copy()),
            "steps": self.steps,
        }

    # --- the end --------------------------------------------------------------------------------------------

    def stop_run(self, why: str = "a worker asked for it") -> None:
        """Ask the server to end the run for everybody, with its final round."""
        self._background.stop_run(why)

    def close(self, reason: Reason | None = None, detail: str = "") -> None:
        """Leave the run. Safe to call twice; the model stays as it is."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        if reason is None:
            reason = Reason.FINISHED if self.finished else Reason.LEFT
        # A background that died has been reported by step(); closing must not hide that error.
        with contextlib.suppress(Exception):
            self._background.close(reason, detail)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(*_why(error))


def _why(error: BaseException | None) -> tuple[Reason | None, str]:
    """What the server is told about an end."""
    if error is None or isinstance(error, KeyboardInterrupt):
        return None, ""
    return Reason.FAILED, f"{type(error).__name__}: {error}"[:500]


def _cycle(pace: Pace, local: int | None, interval: float, overlap: int | None) -> Cycle:
    def chosen(own: int | str | None, offered: int | None, what: str) -> int | None:
        if own is None:
            return offered
        if own == "auto":
            return None
        if isinstance(own, str) or own < 0:
            raise ConfigError(f"{what} {own!r} is neither a number of steps nor auto")
        return own

    local = chosen(pace.local_steps, local, "local steps")
    overlap = chosen(pace.overlap_steps, overlap, "overlap steps")
    if local == 0 and overlap == 0:
        raise ConfigError("local steps 0 with overlap steps 0 would average without ever training")
    return Cycle(local, pace.sync_interval_s or interval, overlap, time.monotonic())


def default_name() -> str:
    """A name that is this process's own: host and process id."""
    return f"{socket.gethostname()}-{os.getpid()}"


def join(
    servers: str | Sequence[str],
    model: nn.Module,
    *,
    token: str | None = None,
    name: str | None = None,
    slot: int | None = None,
    run_id: bytes = b"",
    local_steps: int | str | None = None,
    sync_interval_s: float | None = None,
    overlap_steps: int | str | None = None,
    statistics: Iterable[str] = (),
    tls_ca: Path | str | None = None,
    tls_cert: Path | str | None = None,
    tls_key: Path | str | None = None,
    connect_timeout_s: float = 60.0,
    server_timeout_s: float = 600.0,
    on_round: Callable[[RoundRecord], None] | None = None,
    on_evaluation: Callable[[Session, int], None] | None = None,
    rejoin: str = "project",
    state: Mapping[str, Any] | None = None,
) -> Session:
    """Join a run: the model takes over the run's state, and its parameters become views of flat storage.

    Returns when the run has started. Move or cast the model before, never after; make the optimizer before or
    after, as you like.

    Args:
        servers: "HOST:PORT", several separated by commas or as a sequence (tried in turn).
        model: any module; its trainable parameters are averaged.
        token: the run's token; defaults to the environment's LOSCAR_TOKEN.
        name: this worker's name, unique in the run; defaults to host and process id.
        slot: a fixed place in the sums, or None for the smallest free one.
        run_id: 16 bytes, to insist on one run.
        local_steps, sync_interval_s, overlap_steps: see `Pace`.
        statistics: further buffers to average as absolute values; normalisation layers' are found.
        tls_ca, tls_cert, tls_key: PEM files; TLS is on when `tls_ca` is given.
        connect_timeout_s: how long to look for a server.
        server_timeout_s: how long the server may stay away later, while training goes on.
        on_round: called in the training thread after every merge.
        rejoin: what becomes of own unsent progress after an absence of more than 1/density rounds: `project`
            leaves out what the others have done too, `keep` and `drop` say it all.
        state: from `Session.state_dict`: come back as the worker that saved it (its name and slot count), with its
            parameters and its unsent progress.
        on_evaluation: called right after an evaluation round was merged, with the session and the round.

    Raises:
        ConfigError: something about the arguments or the model.
        ConnectError: no server in time.
        WrongModelError, WrongRunError, VersionMismatchError, AuthenticationError, RefusedError: the server
            does not take this worker.
    """
    targets = tuple(s.strip() for s in (servers.split(",") if isinstance(servers, str) else servers))
    for target in targets:
        parse_address(target, "server")
    if not targets:
        raise ConfigError("no server given")
    security = ClientSecurity(
        token if token is not None else os.environ.get("LOSCAR_TOKEN"),
        Path(tls_ca) if tls_ca else None,
        Path(tls_cert) if tls_cert else None,
        Path(tls_key) if tls_key else None,
    )
    pace = Pace(local_steps, sync_interval_s, overlap_steps)
    _cycle(pace, 1, 1.0, None)
    view = ModelView(model, statistics)
    engine = WorkerEngine(
        name or default_name(),
        os.urandom(16),
        view.layout,
        view.vector(),
        view.statistics(),
        run_id=run_id,
        slot=slot,
    )
    options = ConnectionOptions(targets, security, connect_timeout_s, server_timeout_s)
    session = Session(
        view, engine, options, pace, on_round=on_round, on_evaluation=on_evaluation, rejoin=parse_rejoin(rejoin)
    )
    if state is not None:
        arrays = {name: tensor.numpy() for name, tensor in state["arrays"].items()}
        import_worker(engine, json.loads(state["worker"]), arrays)
        view.load_vector(state["live"].numpy())
        view.load_statistics(state["live_statistics"].numpy())
        session.name, session.steps = engine.name, state["steps"]
    session._join()
    return session


__all__ = ["Pace", "RoundRecord", "ServerLostError", "Session", "default_name", "join"]
