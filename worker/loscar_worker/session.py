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
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from loscar_core.errors import (
    ConfigError,
    InterruptedRunError,
    MalformedError,
    NonFiniteError,
    ServerLostError,
    SessionFailedError,
)
from loscar_core.gathering import Answer
from loscar_core.merge import RejoinKind, parse_rejoin
from loscar_core.messages import Reason
from loscar_core.worker_cycle import Action
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_state import import_worker
from loscar_wire.transport import ClientSecurity, parse_address
from loscar_worker.background import Background, wait_changed
from loscar_worker.boundary import Companion, Pace, TrainingHalf, cycle_of
from loscar_worker.connection import ConnectionOptions
from loscar_worker.model import ModelView
from loscar_worker.round_record import RoundRecord

log = logging.getLogger("loscar.worker")

WAIT_SLICE_S = 1.0
AVERAGE_SLICE_S = 0.1


class Session(TrainingHalf):
    """One worker's membership of a run; made by `join`, closed by `with` or `close`.

    Attributes:
        name: this worker's name.
        slot: its place in the run.
        service_s: seconds that `step` took of the training thread, waits apart.
    """

    def __init__(
        self,
        view: ModelView,
        engine: WorkerEngine,
        options: ConnectionOptions,
        pace: Pace,
        *,
        on_round: Callable[[RoundRecord], None] | None = None,
        on_evaluation: Callable[[TrainingHalf, int], None] | None = None,
        rejoin: RejoinKind = RejoinKind.PROJECT,
    ) -> None:
        background = Background(engine, view, options, self.report)
        super().__init__(
            view,
            background,
            pace,
            clock=time.monotonic,
            on_round=on_round,
            on_evaluation=on_evaluation,
            rejoin=rejoin,
        )
        self.name = engine.name
        self.service_s = 0.0
        self._pid = os.getpid()
        self._asked_to_stop = False
        self._interrupted = False
        self._closed = False
        self._averages = 0  # that were called for without a label

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
                self.take_over()
            self._wait_for(lambda: box.open is not None or box.ended is not None)
            self.begin()
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
    def slot(self) -> int:
        return self.engine.slot

    @property
    def run_id(self) -> str:
        return self.engine.run_id.hex()

    @property
    def should_stop(self) -> bool:
        """The run is over: leave the loop."""
        return self.finished

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
        self.note_step()
        if loss is not None:
            self.note_loss(loss)
        if self._max_steps is not None and self.steps >= self._max_steps and not self._asked_to_stop:
            self._asked_to_stop = True
            self._background.stop_run(f"{self.name} has taken {self.steps} steps")
        self._synchronise()
        self.service_s += time.perf_counter() - entered - (self.idle_s - waited_before)

    def _synchronise(self) -> None:
        """Everything that is due at this boundary, waiting where the pace says so."""
        while True:
            action, version = self.advance()
            if action is Action.TRAIN or self._interrupted:
                return
            self.note_wait(wait_changed(self._background.mailbox, version, WAIT_SLICE_S))

    # --- one-off averages ---------------------------------------------------------------------------------------

    def average(
        self, tensor: Tensor, label: str | None = None, *, timeout_s: float = 60.0, at_least: int = 1
    ) -> Tensor:
        """The mean of a tensor over the run's workers, which all call this; apart from the rounds and the model.

        Waits for the others: everybody gets the same values, dense and unrounded, also if the server dies meanwhile.
        A worker that leaves is not waited for; one that comes after the time is over gets the others' average.

        Args:
            tensor: any floating dtype and device; float64 is averaged as such, others in float32. Not changed.
            label: equal labels are averaged together, each once in a run. Without one the first calls of all workers
                go together, and the second ones, and so on: where workers join later, all have to give labels.
            timeout_s: how long the others are waited for; that of the first call counts, as does its `at_least`.
            at_least: fewer vectors than this are no average.

        Returns:
            A new tensor of the same shape, dtype and device.

        Raises:
            ConfigError: not a floating tensor, or an option that makes no sense.
            NonFiniteError: NaN or infinity in it, or in the mean.
            RefusedError: fewer than `at_least` came in time, the average was over long ago, or the server has no room.
            MalformedError: the others' tensors are of another size.
            LoscarError: as `step`.
        """
        if self._closed or os.getpid() != self._pid:
            raise SessionFailedError("average() after the session was closed, or in a forked process")
        if label is None:  # counted whatever comes of it: the others count theirs
            self._averages += 1
            label = f"#{self._averages}"
        if not tensor.is_floating_point():
            raise ConfigError(f"average() of a tensor of {tensor.dtype}: only floating ones have a mean; cast it first")
        if not (timeout_s > 0 and math.isfinite(timeout_s)) or not 1 <= at_least < 1 << 31:
            raise ConfigError(f"average() with timeout_s={timeout_s} and at_least={at_least}: out of range")
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        values = tensor.detach().to(device="cpu", dtype=wide, copy=True).reshape(-1).numpy()
        if values.size == 0:
            return tensor.detach().clone()
        if not np.isfinite(values).all():
            raise NonFiniteError("average() of a tensor with NaN or infinity")
        try:
            coming = self._background.average(label, values, timeout_s, at_least)
        except MalformedError as error:
            raise ConfigError(str(error)) from None
        answer = self._answer(coming)
        if self.engine.incarnation not in answer.offered:
            log.warning("average %r: %d others were averaged before this worker came", label, len(answer.offered))
        # A copy: the answer itself may still be needed by the others.
        return torch.from_numpy(answer.values).reshape(tensor.shape).to(tensor.device, tensor.dtype, copy=True)

    def _answer(self, coming: Future[Answer]) -> Answer:
        """Wait for an average. Raises what ended the session, if that comes first."""
        started = time.monotonic()
        try:
            while True:
                wait({coming}, AVERAGE_SLICE_S)
                if coming.done():
                    return coming.result()
                if self._interrupted:
                    raise InterruptedRunError("interrupted while an average was waited for")
                self._background.raise_failure()
                if self._background.ended:
                    raise ServerLostError("the run is over, and no server is there any more to average at")
        finally:
            self.note_wait(time.monotonic() - started)

    # --- figures --------------------------------------------------------------------------------------------

    @property
    def reconnects(self) -> int:
        return self._background.connection.reconnects

    @property
    def connected(self) -> bool:
        """A server has welcomed this worker on a stream that is still open."""
        return self._background.connection.connected

    @property
    def round_trip_s(self) -> float | None:
        """Of the last heartbeat that was answered; None before."""
        return self._background.connection.round_trip_s

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
            "averages": self._averages,
        }

    # --- the end --------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """A step that waits for the service returns soon, so that the training loop can end; for signal handlers."""
        self._interrupted = True

    def stop_run(self, why: str = "a worker asked for it") -> None:
        """Ask the server to end the run for everybody, with its final round."""
        self._background.stop_run(why)

    def part(self, timeout_s: float) -> bool:
        """Before leaving: take part in rounds without training, until all that this worker has not contributed yet has
        gone out, or the time is over. With density ρ and sweeps that takes 1/ρ to 2/ρ rounds.

        Returns:
            Whether everything has gone out.

        Raises:
            LoscarError: as `step`.
        """
        self.start_parting()
        end = time.monotonic() + timeout_s
        while True:
            _, version = self.advance()
            left = end - time.monotonic()
            if self.parted or left <= 0:
                return self.parted
            wait_changed(self._background.mailbox, version, min(left, WAIT_SLICE_S))

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
    on_evaluation: Callable[[TrainingHalf, int], None] | None = None,
    rejoin: str = "project",
    state: Mapping[str, Any] | None = None,
    vectors: Mapping[str, Tensor] | None = None,
    companion: Companion | None = None,
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
        vectors: float32 vectors that are averaged along with the model, by name; they are re-seated like parameters.
        companion: a method's part of the training around averages, such as `MixVrOptimizer`.

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
    cycle_of(pace, 1, 1.0, None, 0.0)
    view = ModelView(model, statistics, vectors)
    engine = WorkerEngine(
        default_name() if name is None else name,
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
    if companion is not None:
        session.follow(companion)
    if state is not None:
        try:
            arrays = {name: tensor.numpy() for name, tensor in state["arrays"].items()}
            import_worker(engine, json.loads(state["worker"]), arrays)
            view.load_vector(state["live"].numpy())
            view.load_statistics(state["live_statistics"].numpy())
            session.name, session.steps = engine.name, state["steps"]
            session._averages = state.get("averages", 0)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"state is not what Session.state_dict gave: {error!r}") from None
    session._join()
    return session


__all__ = ["Pace", "RoundRecord", "ServerLostError", "Session", "default_name", "join"]
