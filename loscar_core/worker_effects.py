"""What a worker engine asks for: messages to send, and updates for the model."""

from __future__ import annotations

from dataclasses import dataclass

from loscar_core.messages import Goodbye, WorkerMessage
from loscar_core.plan import RoundPlan
from loscar_core.replica import Floats, Indices, Where, as_indices, size_of


@dataclass(frozen=True, slots=True)
class Emit:
    """Send this to the server."""

    message: WorkerMessage


@dataclass(frozen=True, slots=True)
class Initialise:
    """Before training: the model takes over the anchor as it is (parameters, statistics).

    Attributes:
        vector: d float32; None when it is what the model holds.
        statistics: float32.
    """

    vector: Floats | None
    statistics: Floats


@dataclass(frozen=True, slots=True)
class RoundOpen:
    """A round's selection is ready: a snapshot may be taken, unless one was taken for it before.

    Attributes:
        plan: of the round.
        where: its coordinates, K int64 ascending or a range of them; with an explicit selection all that there are.
        contributed: this worker's contribution to it exists already.
        elapsed_s: run time when the server opened it, as far as known here.
        opening: number of this announcement, to be handed back with the snapshot that follows it.
    """

    plan: RoundPlan
    where: Where
    contributed: bool
    elapsed_s: float
    opening: int = 0

    @property
    def indices(self) -> Indices:
        """The coordinates, K int64 ascending; made anew where they are a range."""
        return as_indices(self.where)

    @property
    def size(self) -> int:
        """How many coordinates there are."""
        return size_of(self.where)


@dataclass(frozen=True, slots=True)
class Update:
    """What the anchor did, to be done to the live model at a step boundary, in order.

    Attributes:
        round: of the answer; 0 for a catch-up.
        indices: the coordinates, or None for all of them.
        anchor: their values before, float32.
        new_anchor: and after.
        sent: what of this worker's contributions is in the difference, or None.
        statistics: values to assign, or None.
        settles: round of this worker's snapshot that is hereby answered or given back, or None.
        plan: of the answered round, or None for a catch-up.
        long_absence: more rounds were missed than it takes to send every coordinate once.
        forget: what the model has beyond the new values may be in them already: the model takes them as they are.
        whole: all parts of this worker's contribution to the round are in.
        progress: a live worker's unsent progress, for a newcomer: no anchor moves.
        covers: with an explicit selection, once all of this worker's contribution is in: the coordinates whose progress
            at the snapshot has gone out.
    """

    round: int
    indices: Indices | None
    anchor: Floats
    new_anchor: Floats
    sent: Floats | None
    statistics: Floats | None
    settles: int | None
    plan: RoundPlan | None
    long_absence: bool = False
    forget: bool = False
    whole: bool = False
    progress: bool = False
    covers: Where | None = None


@dataclass(frozen=True, slots=True)
class ProgressWanted:
    """A newcomer wants this worker's unsent progress: call `progress` with the live vector."""


@dataclass(frozen=True, slots=True)
class RunEnded:
    """No round follows the updates emitted so far.

    Attributes:
        vector, statistics: the consensus, when the run ends with it (also for whoever missed the final round);
            else None and the model stays as it is.
    """

    vector: Floats | None
    statistics: Floats | None


@dataclass(frozen=True, slots=True)
class Dismissed:
    """The server ended the stream."""

    goodbye: Goodbye


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """A heartbeat came back; the stamp is what was sent."""

    stamp_ns: int


WorkerEffect = Emit | Initialise | RoundOpen | Update | ProgressWanted | RunEnded | Dismissed | RoundTrip
