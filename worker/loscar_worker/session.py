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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from loscar_core.errors import (
    ConfigError,
    InterruptedRunError,
    MalformedError,
    NonFiniteError,
    ServerLostError,
    SessionFailedError,
)
from loscar_core.gathering import Answer
from loscar_core.layout import Layout
from loscar_core.merge import RejoinKind
from loscar_core.messages import Reason
from loscar_core.replica import Floats
from loscar_core.worker_cycle import Action
from loscar_core.worker_effects import RunEnded
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_state import import_worker
from loscar_worker.background import Background, Mailbox, wait_changed
from loscar_worker.boundary import Pace, TrainingHalf
from loscar_worker.connection import Connection, ConnectionOptions
from loscar_worker.further_shard import FurtherShard
from loscar_worker.memory import return_freed_memory
from loscar_worker.model import ModelView
from loscar_worker.model_range import ModelRange, View
from loscar_worker.round_record import RoundRecord

log = logging.getLogger("loscar.worker")

WAIT_SLICE_S = 1.0
AVERAGE_SLICE_S = 0.1
WELCOME_SLICE_S = 0.02


class Session(TrainingHalf):
    """One worker's membership of a run; made by `join`, closed by `with` or `close`.

    Where the model is spread over several servers, it is shard 0's training half, and has those of the others.

    Attributes:
        name: this worker's name.
        further: the shards beyond the first.
        slot: its place in the run.
        service_s: seconds that `step` took of the training thread, waits apart.
    """

    def __init__(
        self,
        view: ModelView,
        shards: Sequence[tuple[WorkerEngine, ConnectionOptions]],
        pace: Pace,
        *,
        on_round: Callable[[RoundRecord], None] | None = None,
        on_evaluation: Callable[[TrainingHalf, int], None] | None = None,
        rejoin: RejoinKind = RejoinKind.PROJECT,
    ) -> None:
        changed = threading.Condition()
        engine, options = shards[0]
        part: View = view if len(shards) == 1 else ModelRange(view, engine.shard)
        background = Background(engine, part, options, self.report, changed)
        super().__init__(
            part,
            background,
            pace,
            clock=time.monotonic,
            on_round=on_round,
            on_evaluation=on_evaluation,
            rejoin=rejoin,
        )
        self.further = tuple(
            FurtherShard(
                self,
                ModelRange(view, engine.shard),
                engine,
                options,
                pace,
                changed,
                clock=time.monotonic,
                on_round=on_round,
                rejoin=rejoin,
            )
            for engine, options in shards[1:]
        )
        self.name = engine.name
        self.service_s = 0.0
        self._whole = view
        self._pid = os.getpid()
        self._asked_to_stop = False
        self._interrupted = False
        self._closed = False
        self._averages = 0  # that were called for without a label

    # --- joining --------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Connect, take over the initial model, wait for t = 0."""
        halves: tuple[TrainingHalf, ...] = (self, *self.further)
        resumed = self.engine.initialised
        self._background.start()
        atexit.register(self.close)
        try:
            if self.further:
                self._wait_for(lambda: self.engine.welcome is not None, WELCOME_SLICE_S)
            for shard in self.further:
                shard.start()
            if not resumed:
                self._wait_for(lambda: all(half.mailbox.initial is not None for half in halves))
                for half in halves:
                    half.take_over()
            return_freed_memory()
            for half in halves:
                half.let_count()
            boxes = [half.mailbox for half in halves]
            self._wait_for(lambda: all(box.open is not None or box.ended is not None for box in boxes))
            for half in halves:
                half.begin()
            # With N = 0 the first snapshot is due before the first step.
            self._synchronise()
        except BaseException as error:
            self.close(*_why(error))
            raise

    def _wait_for(self, ready: Callable[[], bool], slice_s: float = WAIT_SLICE_S) -> None:
        backgrounds = (self._background, *(shard.background for shard in self.further))
        while True:
            # Before looking: what comes in between ends the wait.
            looks = [(background.mailbox, background.mailbox.version) for background in backgrounds]
            for background in backgrounds:
                background.raise_failure()
            if ready():
                return
            wait_changed(looks, slice_s)

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
            action, looks = self._advance_all()
            if action is Action.TRAIN or self._interrupted:
                return
            self.note_wait(wait_changed(looks, WAIT_SLICE_S))

    def _advance_all(self) -> tuple[Action, list[tuple[Mailbox, int]]]:
        """Merge and snapshot what is due on all shards; WAIT when one of them has to."""
        action, version = self.advance()
        looks = [(self.mailbox, version)]
        for shard in self.further:
            own, version = shard.advance()
            looks.append((shard.mailbox, version))
            if own is Action.WAIT and not self.finished:
                action = own
                self._final_now = self._final_now or shard.in_final_round
        return action, looks

    def note_step(self) -> None:
        super().note_step()
        for shard in self.further:
            shard.note_step()

    def _end(self, ended: RunEnded) -> None:
        """The run is over for shard 0, and so it is for the others: they are told, and their last rounds waited for."""
        for shard in self.further:
            shard.hurry()
        while True:
            looks = [(shard.mailbox, shard.advance()[1]) for shard in self.further]
            unfinished = [shard for shard in self.further if not shard.finished]
            if not unfinished:
                break
            if self._interrupted:
                return  # without the consensus of all shards it is not over for this worker
            for shard in unfinished:  # again and again: it may have been away, or have been killed since it was told
                shard.stop("the run is over at shard 0")
            wait_changed(looks, WAIT_SLICE_S)
        for shard in self.further:
            shard.settle()
        super()._end(ended)

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
        return sum(connection.reconnects for connection in self._connections)

    @property
    def connected(self) -> bool:
        """A server, and that of every shard, has welcomed this worker on a stream that is still open."""
        return all(connection.connected for connection in self._connections)

    @property
    def round_trip_s(self) -> float | None:
        """Of the last heartbeat that was answered; None before. Of several shards the longest."""
        known = [c.round_trip_s for c in self._connections if c.round_trip_s is not None]
        return max(known, default=None)

    @property
    def _connections(self) -> list[Connection]:
        return [self._background.connection, *(shard.connection for shard in self.further)]

    @property
    def layout(self) -> Layout:
        """The whole model's."""
        return self._whole.layout

    @property
    def bytes_up(self) -> int:
        """Payload sent so far, to all shards."""
        return sum(half.engine.bytes_up for half in (self, *self.further))

    @property
    def bytes_down(self) -> int:
        """Payload received so far, from all shards."""
        return sum(half.engine.bytes_down for half in (self, *self.further))

    @property
    def contributions(self) -> dict[str, int]:
        """The ledgers' counters, of all shards together: sent = included + returned + outstanding."""
        counts = super().contributions
        for shard in self.further:
            counts = {name: count + shard.contributions[name] for name, count in counts.items()}
        return counts

    def live_values(self) -> Floats:
        return np.concatenate([self._whole.vector()[: self._whole.model_dimension], self._whole.statistics()])

    # --- saving ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This worker's half of the run: anchor, ledger, live parameters. For `join(state=…)`.

        Call it between two steps, and before `model.state_dict()`: what waits to be merged is merged first, so that
        model and anchor belong together. Optimizer and data position are the caller's to save beside it. Holds
        tensors, numbers and text only, so `torch.save` and `torch.load(weights_only=True)` take it.
        """
        first, *further = [half.exported() for half in (self, *self.further)]
        return {
            **first,
            "further": further,
            "live": torch.from_numpy(self._whole.vector().copy()),
            "live_statistics": torch.from_numpy(self._whole.statistics().copy()),
            "steps": self.steps,
            "averages": self._averages,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Come back as the worker whose `state_dict` it is; before joining.

        Raises:
            ConfigError: it is not one, or of a run that is spread otherwise.
        """
        try:
            kept = [state, *state.get("further", ())]
            if len(kept) != 1 + len(self.further):
                raise ConfigError(f"the state is of a run over {len(kept)} shards, not {1 + len(self.further)}")
            for half, values in zip((self, *self.further), kept, strict=True):
                arrays = {name: tensor.numpy() for name, tensor in values["arrays"].items()}
                import_worker(half.engine, json.loads(values["worker"]), arrays)
            self._whole.load_vector(state["live"].numpy())
            self._whole.load_statistics(state["live_statistics"].numpy())
            self.name = self.engine.name
            for half in (self, *self.further):
                half.steps = state["steps"]
            self._averages = state.get("averages", 0)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"state is not what Session.state_dict gave: {error!r}") from None

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
        halves: tuple[TrainingHalf, ...] = (self, *self.further)
        self._interrupted = False  # what has interrupted the training is why this is called
        for half in halves:
            half.start_parting(alone=not self.further)
        end = time.monotonic() + timeout_s
        while True:
            _, looks = self._advance_all()
            left = end - time.monotonic()
            parted = self.finished or all(half.parted for half in halves)
            if parted or left <= 0:
                return parted
            wait_changed(looks, min(left, WAIT_SLICE_S))

    def close(self, reason: Reason | None = None, detail: str = "") -> None:
        """Leave the run. Safe to call twice; the model stays as it is."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        if reason is None:
            reason = Reason.FINISHED if self.finished else Reason.LEFT
        # A background that died has been reported by step(); closing must not hide that error.
        for background in (*(shard.background for shard in self.further), self._background):
            with contextlib.suppress(Exception):
                background.close(reason, detail)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(*_why(error))


def _why(error: BaseException | None) -> tuple[Reason | None, str]:
    """What the server is told about an end."""
    if error is None or isinstance(error, KeyboardInterrupt):
        return None, ""
    return Reason.FAILED, f"{type(error).__name__}: {error}"[:500]
