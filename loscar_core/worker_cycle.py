"""When a worker takes its snapshot and when it merges: the pace of one training loop.

    local ──N steps (or the interval)──▶ snapshot ──▶ in flight ──Q steps, or the answer──▶ merge ──▶ local

Asked between two steps what to do next, it answers snapshot, merge, wait or train. It knows nothing of models
or networks; the session and the simulation drive the same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    TRAIN = "train"
    """Take the next local step."""
    SNAPSHOT = "snapshot"
    """Take the open round's coordinates off the model now."""
    MERGE = "merge"
    """Apply the oldest update that is waiting."""
    WAIT = "wait"
    """Nothing may happen before the service has answered."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the service has ready at a step boundary.

    Attributes:
        update_round: round of the oldest update that waits to be merged; 0 for a catch-up; None when none waits.
        update_is_own: that update answers this worker's snapshot.
        plan_round: the open round, when its selection is ready here and nothing was contributed to it; else None.
        final: the open round is the final one: stop and take part at once.
        at_once: the open round averages what was computed from the one before, so no steps come between the two.
    """

    update_round: int | None = None
    update_is_own: bool = False
    plan_round: int | None = None
    final: bool = False
    at_once: bool = False


class Cycle:
    """The pace of one worker.

    Args:
        local_steps: N ≥ 0, or None to go by the interval.
        interval_s: seconds from a merge to the next snapshot when `local_steps` is None.
        overlap_steps: Q ≥ 0, or None to merge as soon as the answer is there.
        now: seconds.
    """

    def __init__(self, local_steps: int | None, interval_s: float, overlap_steps: int | None, now: float) -> None:
        self.local_steps = local_steps
        self.interval_s = interval_s
        self.overlap_steps = overlap_steps
        self.in_flight: int | None = None
        self.steps_since_merge = 0
        self.steps_since_snapshot = 0
        self.last_overlap = 0
        self._merged_at = now

    @property
    def deterministic(self) -> bool:
        """Snapshots and merges happen at given steps, whatever the network does."""
        return self.local_steps is not None and self.overlap_steps is not None

    def part(self) -> None:
        """There will be no more steps: contribute to every round from now on, and wait for its answer."""
        self.local_steps = self.overlap_steps = 0

    def stepped(self) -> None:
        """One optimizer step was taken."""
        self.steps_since_merge += 1
        self.steps_since_snapshot += 1

    def next(self, situation: Situation, now: float) -> Action:
        """What to do at this step boundary; ask again after every SNAPSHOT and MERGE."""
        if situation.update_round is not None and not (situation.update_is_own and self._too_early()):
            return Action.MERGE
        if self.in_flight is not None:
            if situation.final:
                return Action.WAIT
            # The answer is not there (or it is too early for it). Whoever fixed Q waits for it at that step.
            return Action.WAIT if self.overlap_steps is not None and not self._too_early() else Action.TRAIN
        if situation.final:
            return Action.SNAPSHOT if situation.plan_round is not None else Action.WAIT
        if not (situation.at_once or self._snapshot_due(now)):
            return Action.TRAIN
        if situation.plan_round is not None:
            return Action.SNAPSHOT
        # The plan is late. Overlapped workers train on; a deterministic or blocking one has to wait for it.
        return Action.WAIT if self.overlap_steps is not None and self.local_steps is not None else Action.TRAIN

    def took_snapshot(self, round_: int) -> None:
        self.in_flight = round_
        self.steps_since_snapshot = 0

    def rejected(self, round_: int) -> None:
        """The snapshot came too late for its round, or the stream was down: another one may be taken."""
        if self.in_flight == round_:
            self.in_flight = None

    def merged(self, *, own: bool, now: float) -> None:
        """An update was applied; `own`: it answered this worker's snapshot, with or without it in the sum."""
        if own:
            self.last_overlap = self.steps_since_snapshot
            self.in_flight = None
            self.steps_since_merge = 0
            self._merged_at = now

    def _too_early(self) -> bool:
        return self.overlap_steps is not None and self.steps_since_snapshot < self.overlap_steps

    def _snapshot_due(self, now: float) -> bool:
        if self.local_steps is not None:
            return self.steps_since_merge >= self.local_steps
        return self.steps_since_merge >= 1 and now - self._merged_at >= self.interval_s
