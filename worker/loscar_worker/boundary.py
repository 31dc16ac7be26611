"""What a worker does between two steps: the training half of a session, real or simulated.

It owns the live model. At a step boundary it hands over a snapshot of the open round's coordinates, or applies an
update that the background has ready, as the pace says; whether to wait, and on which clock, is the session's affair.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loscar_core.config import RunConfig
from loscar_core.errors import ConfigError
from loscar_core.merge import RejoinKind, projection
from loscar_core.messages import WorkerReport
from loscar_core.methods import Arrival, Merged, Method, parse_method, require_selection
from loscar_core.methods.loscar_sgd import LoscarSgd
from loscar_core.plan import RoundKind, RoundPlan, is_dependent
from loscar_core.replica import Floats, Where
from loscar_core.selection import SelectionKind
from loscar_core.worker_cycle import Action, Cycle, Situation
from loscar_core.worker_effects import RunEnded
from loscar_core.worker_engine import WorkerEngine
from loscar_worker.background import Background, Mailbox, OpenRound, ReadyUpdate
from loscar_worker.model_range import View
from loscar_worker.round_record import RoundRecord

log = logging.getLogger("loscar.worker")

LOSSES_KEPT = 64


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


class Companion(Protocol):
    """A method's part of the training that is done around averages; called by the training thread.

    In runs whose rounds come in pairs, `dependent` tells the second round of a pair, which averages what was computed
    from the first one's answer, from the first.
    """

    def begin(self, half: TrainingHalf) -> None:
        """Training begins: the slot is known, the model is the run's, nothing has been contributed."""

    def before_snapshot(self, dependent: bool) -> None:
        """The next thing is this worker's contribution to a round."""

    def before_merge(self, dependent: bool) -> None:
        """An average is there; the model and the vectors are still what they were."""

    def after_merge(self, dependent: bool) -> None:
        """They are the average now."""

    def replaced(self) -> None:
        """The model and the vectors have been moved otherwise: this worker was away, or a round was abandoned."""


class TrainingHalf:
    """The training half of a session.

    Args:
        view: the live model.
        background: where updates come from and snapshots go to.
        pace: overrides of the server's.
        clock: seconds, monotonic.
        on_round: called after every merged round.
        on_evaluation: called right after an evaluation round was merged, with this object and the round.
        rejoin: what becomes of own progress after a long absence.

    Attributes:
        steps: optimizer steps taken.
        finished: the run is over; the model holds what it ended with.
        idle_s: seconds in which training waited for the service.
        joined_at_start: no round was closed before this worker joined.
        keep_last: remember the live model that goes into the final round, for `last_values`.
    """

    keep_last = False

    def __init__(
        self,
        view: View,
        background: Background,
        pace: Pace,
        *,
        clock: Callable[[], float],
        on_round: Callable[[RoundRecord], None] | None = None,
        on_evaluation: Callable[[TrainingHalf, int], None] | None = None,
        rejoin: RejoinKind = RejoinKind.PROJECT,
    ) -> None:
        self.steps = 0
        self.finished = False
        self.idle_s = 0.0
        self.joined_at_start = True
        self._view = view
        self._background = background
        self._pace = pace
        self._clock = background.clock = clock
        self._on_round = on_round
        self._on_evaluation = on_evaluation
        self._rejoin = rejoin
        self._t0: float | None = None
        self._ended_s: float | None = None
        self._joined_s = 0.0
        self._waited_in_round = 0.0
        self._waits: list[tuple[float, float]] = []
        self._waited_at_step = -1
        self._snapshot_at: float | None = None
        self._snapshot_steps = 0
        self._in_final_round = False
        self._final_now = False
        self._merged = 0
        self._cycle = Cycle(1, 1.0, None, 0.0)
        self._method: Method = LoscarSgd()
        self._distance: float | None = None
        self._companion: Companion | None = None
        self._last: Floats | None = None
        self._pair_open = False  # the first round of a pair was merged, the second one is yet to come
        self._max_steps: int | None = None
        self._unsent: NDArray[np.bool_] | None = None
        self._parting: Where | None = None
        self._parts_alone = True
        self._losses: deque[Tensor | float] = deque(maxlen=LOSSES_KEPT)
        self._loss: float | None = None

    @property
    def engine(self) -> WorkerEngine:
        return self._background.engine

    @property
    def mailbox(self) -> Mailbox:
        return self._background.mailbox

    def take_over(self) -> None:
        """The model takes over the initial state that the background has ready, which is not kept."""
        box = self._background.mailbox
        with box.changed:
            initial, box.initial = box.initial, None
        assert initial is not None
        if initial.vector is not None:
            self._view.load_vector(initial.vector)
        elif self._view.wider:
            self._view.load_vector(self._view.vector())  # everybody starts from the same values, which are float32
        self._view.load_statistics(initial.statistics)

    def begin(self) -> None:
        """t = 0 (or later, for a newcomer): the pace starts to count."""
        config = self.engine.config
        assert config is not None
        self._method = method_of(config, self._pace)
        if set(self._method.vectors) != set(self._view.vectors):
            raise ConfigError(
                f"the run's method is {self._method.name}, which averages {_named(self._method.vectors)} beside the "
                f"model; this worker has {_named(self._view.vectors)}: start it with --method {self._method.name}"
            )
        self._max_steps = config.max_steps
        now = self._clock()
        self._cycle = cycle_of(self._pace, config.local_steps, config.sync_interval_s, config.overlap_steps, now)
        self._joined_s = max(0.0, self.engine.elapsed_s)
        self._t0 = now - self._joined_s
        self.joined_at_start = self.engine.anchor.position.round == 0
        if self._companion is not None:
            self._companion.begin(self)

    def note_step(self) -> None:
        """One optimizer step was taken."""
        self.steps += 1
        self._cycle.stepped()

    def note_loss(self, loss: Tensor | float) -> None:
        """A step's training loss, for the next report; a tensor is not looked at before."""
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else float(loss))

    @property
    def in_final_round(self) -> bool:
        """What is waited for is the final round."""
        return self._final_now

    @property
    def run_s(self) -> float:
        """Seconds of run time; those before this worker joined count."""
        if self._t0 is None:
            return 0.0
        return (self._clock() if self._ended_s is None else self._ended_s) - self._t0

    @property
    def idle_fraction(self) -> float:
        """Share of this worker's run time in which the training thread waited for the service."""
        if self._t0 is None:
            return 0.0
        own = self.run_s - self._joined_s
        return self.idle_s / own if own > 0 else 0.0

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

    def report(self) -> WorkerReport:
        """The heartbeat's figures; called on the background thread, which may wait for a GPU's loss."""
        losses = []
        while self._losses:
            losses.append(float(self._losses.popleft()))
        if losses:
            self._loss = sum(losses) / len(losses)
        ledger, engine = self.engine.ledger, self.engine
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

    @property
    def loss(self) -> float | None:
        """The training loss of the last report; None before the first."""
        return self._loss

    def exported(self) -> dict[str, Any]:
        """The engine's state as text and tensors, once what waits to be merged has been."""
        box = self._background.mailbox
        while True:
            while box.updates and not self.finished:
                self._merge(box.updates[0])
            exported = self._background.export(self._merged)
            if exported is not None:
                values, arrays = exported
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                return {"worker": json.dumps(values), "arrays": tensors}

    def live_values(self) -> Floats:
        """The model's live parameters in logical order, then the statistics; a new float32 array."""
        return np.concatenate([self._view.vector()[: self._view.model_dimension], self._view.statistics()])

    def last_values(self) -> Floats:
        """As `live_values`, of the model that went into the final round; of the one that is there without one."""
        return self.live_values() if self._last is None else self._last

    def hurry(self) -> None:
        """There will be no more steps: this worker takes part in every round at once."""
        self._cycle.part()

    def let_count(self) -> None:
        """From now on the server may wait for this worker: what it takes part in is there."""
        self._background.let_count()

    def start_parting(self, *, alone: bool = True) -> None:
        """There will be no more steps: what this worker has not contributed yet goes out round by round.

        Args:
            alone: take part in no more rounds once all is out; otherwise in all that follow, as one who is waited for.
        """
        self._parts_alone = alone
        self.hurry()
        self._unsent = np.ones(self.engine.layout.dimension, np.bool_)

    @property
    def parted(self) -> bool:
        """Since `start_parting`, every coordinate's progress has been included in a round; or the run is over."""
        return self.finished or (self._unsent is not None and not self._unsent.any())

    # --- at a step boundary ---------------------------------------------------------------------------------

    def advance(self) -> tuple[Action, int]:
        """Merge and snapshot what is due at this step boundary.

        Returns:
            TRAIN when the next local step may be taken (or the run is over), WAIT when nothing may happen before
            the mailbox is newer than the version that comes with it.
        """
        box = self._background.mailbox
        while not (self.finished or (self._parts_alone and self.parted)):
            if box.failure is not None:
                self._background.raise_failure()
            with box.changed:  # one look: a round must not seem open before what it builds on is merged
                update = box.updates[0] if box.updates else None
                opened, ended, version = box.open, box.ended, box.version
            if ended is not None and update is None:
                self._end(ended)
                break
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
                at_once=self._pair_open if opened is None else self._is_at_once(opened.open.plan),
            )
            self._final_now = final
            match self._cycle.next(situation, self._clock()):
                case Action.TRAIN:
                    break
                case Action.MERGE:
                    assert update is not None
                    self._merge(update)
                case Action.SNAPSHOT:
                    assert opened is not None
                    self._snapshot(opened)
                case Action.WAIT:
                    return Action.WAIT, version
        return Action.TRAIN, box.version

    def note_wait(self, waited_s: float) -> None:
        """The training thread has waited for the service; the final round's wait is nobody's fault."""
        ended_s = self.run_s
        if self._waits and self._waited_at_step == self.steps:
            self._waits[-1] = (self._waits[-1][0], ended_s)  # one wait, in slices
        else:
            self._waits.append((ended_s - waited_s, ended_s))
        self._waited_at_step = self.steps
        if not self._final_now:
            self.idle_s += waited_s
            self._waited_in_round += waited_s

    def _snapshot(self, opened: OpenRound) -> None:
        box = self._background.mailbox
        with box.changed:
            if box.open is opened:
                box.open = None
        plan = opened.open.plan
        if self.keep_last and plan.kind is RoundKind.FINAL:
            self._last = self.live_values()
        if self._companion is not None and not plan.kind.ends:
            self._companion.before_snapshot(plan.selection is SelectionKind.TAIL)
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
        if self._unsent is not None:
            self._parting = opened.open.where
        self._snapshot_at = self.run_s
        self._in_final_round = plan.kind is RoundKind.FINAL

    def _merge(self, ready: ReadyUpdate) -> None:
        box = self._background.mailbox
        update = ready.update
        started = self._clock()
        with box.changed:
            box.updates.popleft()
        self._merged += 1
        plan = update.plan
        if plan is not None:
            self._pair_open = plan.selection is SelectionKind.HEAD
        elif not update.progress:
            self._pair_open = False
        if plan is not None and plan.kind is RoundKind.FINAL:
            self._view.write(ready.selected, ready.new_anchor)
        elif update.forget:
            self._view.write(ready.selected, ready.new_anchor)
            log.info(
                "%s goes on from the consensus: what it had not sent may be counted already, and is left out",
                self.engine.name,
            )
            if self._companion is not None:
                self._companion.replaced()
        elif update.long_absence and update.new_anchor.size and not self._method.follows:
            self._rejoin_after_absence(ready)
        elif update.new_anchor.size and plan is not None:
            dependent = plan.selection is SelectionKind.TAIL
            if self._companion is not None:
                self._companion.before_merge(dependent)
            self._merge_by_method(ready)
            if self._companion is not None:
                self._companion.after_merge(dependent)
        elif update.new_anchor.size and self._method.follows and not update.progress:
            self._view.write(ready.selected, ready.new_anchor)
            if self._companion is not None:
                self._companion.replaced()
        elif update.new_anchor.size and (not self._method.stays or update.progress):
            self._merge_by(LoscarSgd(), ready)
        if update.statistics is not None:
            self._view.load_statistics(update.statistics)
        own = update.settles is not None
        if own and self._unsent is not None and self._parting is not None:
            if update.whole:
                self._unsent[self._parting if update.covers is None else update.covers] = False
            self._parting = None
        if self._unsent is not None and plan is None and update.sent is not None:  # something was given back
            self._unsent[slice(None) if update.indices is None else update.indices] = True
        self._in_final_round = self._in_final_round and not own
        self._cycle.merged(own=own, now=self._clock())
        if plan is not None:
            self._note_round(plan, own, ready, self._clock() - started)

    def _is_at_once(self, plan: RoundPlan) -> bool:
        """Nothing is trained before the round: it is the second of a pair, or the first of all pairs."""
        config = self.engine.config
        assert config is not None
        return config.dependent > 0 and not plan.kind.ends and (plan.round == 1 or is_dependent(config, plan.round))

    def follow(self, companion: Companion) -> None:
        """Have a method's own part of the training called around its averages; before the session begins."""
        self._companion = companion

    def _merge_by_method(self, ready: ReadyUpdate) -> None:
        update = ready.update
        if self._method.by_coordinate:
            self._merge_by(self._method, ready)
            return
        with torch.no_grad():
            arrival = Arrival(
                self._view.read(ready.selected),
                ready.anchor,
                ready.new_anchor,
                ready.sent,
                update.whole,
                update.new_anchor.size / self._view.whole_dimension,
                self.progress_of(update.round),
            )
            merged: Merged[Tensor] = self._method.merge(arrival)
        self._view.write(ready.selected, merged.values)
        self._distance = merged.distance

    def _merge_by(self, method: Method, ready: ReadyUpdate) -> None:
        """Merge by a method for which every coordinate is alone."""
        update = ready.update
        fraction = update.new_anchor.size / self._view.whole_dimension
        progress = 0.0 if update.plan is None else self.progress_of(update.round)

        def merged(live: Tensor, piece: int, here: slice) -> Tensor:
            sent = None if ready.sent is None else [ready.sent[piece][here]]
            anchor, new_anchor = [ready.anchor[piece][here]], [ready.new_anchor[piece][here]]
            return method.merge(Arrival([live], anchor, new_anchor, sent, update.whole, fraction, progress)).values[0]

        self._view.change(ready.selected, merged)

    def progress_of(self, round_: int) -> float:
        """The share of the run that is over after that round, as far as its configuration says; 0 when it does not."""
        config = self.engine.config
        assert config is not None
        shares = (
            (round_, config.rounds),
            (self.run_s, config.duration_s),
            (self.steps, config.max_steps),
        )
        return min(1.0, max((done / whole for done, whole in shares if whole is not None), default=0.0))

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
        log.info("%s is back after a long absence: rejoin %s, beta %.3f", self.engine.name, self._rejoin.value, beta)

    def _note_round(self, plan: RoundPlan, own: bool, ready: ReadyUpdate, merge_s: float) -> None:
        if self._on_round is not None:
            record = RoundRecord(
                plan.round,
                plan.kind.name.lower(),
                self.steps,
                self._snapshot_steps if own else 0,
                self._cycle.last_overlap if own else 0,
                self._snapshot_at if own else None,
                ready.at_s - (self._t0 or 0.0),
                self.run_s,
                merge_s,
                self._waited_in_round,
                tuple(self._waits),
                ready.update.sent is not None,
                self.engine.bytes_up,
                self.engine.bytes_down,
                self._distance,
                self.engine.shard.index,
            )
            self._on_round(record)
        self._distance = None
        self._waited_in_round = 0.0
        self._waits.clear()
        if plan.kind is RoundKind.EVALUATION and self._on_evaluation is not None:
            self._on_evaluation(self, plan.round)

    def _end(self, ended: RunEnded) -> None:
        self._ended_s = self._clock()
        if ended.vector is not None and ended.statistics is not None:
            self._view.load_vector(ended.vector)
            self._view.load_statistics(ended.statistics)
        self.finished = True


def _named(vectors: Iterable[str]) -> str:
    return ", ".join(vectors) or "nothing"


def method_of(config: RunConfig, pace: Pace) -> Method:
    """The run's method. Raises ConfigError for one that is not known here, or whose pace is not this worker's, or that
    is none with the run's selection."""
    method = parse_method(config.method).with_merge(config.merge)
    require_selection(method, config.selection)
    for name, own in (("local_steps", pace.local_steps), ("overlap_steps", pace.overlap_steps)):
        fixed = method.demands()
        if own is not None and name in fixed and own != fixed[name]:
            raise ConfigError(f"{name.replace('_', ' ')} {own}: method {method.name} has {fixed[name]}")
    return method


def cycle_of(pace: Pace, local: int | None, interval: float, overlap: int | None, now: float) -> Cycle:
    """The cycle that a pace and the server's offer make. Raises ConfigError for a pace that makes no sense."""

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
    return Cycle(local, pace.sync_interval_s or interval, overlap, now)
