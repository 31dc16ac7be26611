"""What the state machines ask their surroundings to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loscar_core.errors import LoscarError
from loscar_core.messages import Goodbye, ServerMessage
from loscar_core.plan import RoundPlan
from loscar_core.server_members import Departure
from loscar_core.state import Position


@dataclass(frozen=True, slots=True)
class Send:
    """Queue one message for these streams; encode it once."""

    peers: tuple[int, ...]
    message: ServerMessage


@dataclass(frozen=True, slots=True)
class Close:
    """End a stream after what is queued for it: with an error's status, or politely."""

    peer: int
    error: LoscarError | None = None
    goodbye: Goodbye | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A stream broke a rule; the `Close` that ends it follows."""

    peer: int
    error: LoscarError


@dataclass(frozen=True, slots=True)
class MemberJoined:
    name: str
    slot: int
    observer: bool


@dataclass(frozen=True, slots=True)
class MemberGone:
    departure: Departure


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Round 1 (or the first after a recovery) is open; `elapsed_s` of run time are over."""

    position: Position
    members: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class RoundCommitted:
    """A round is in the consensus.

    Attributes:
        seconds: from its opening to its commit.
        members: n.
        included: slots whose whole contribution is in.
        next_plan: what follows.
        digest, previous_digest: of the consensus after the round and before it.
        bitmaps: per part, the slots in its sum.
        roster: who held the slots.
    """

    position: Position
    plan: RoundPlan
    seconds: float
    elapsed_s: float
    members: int
    included: tuple[int, ...]
    next_plan: RoundPlan
    digest: int
    previous_digest: int
    bitmaps: tuple[bytes, ...]
    roster: Sequence[bytes | None]


@dataclass(frozen=True, slots=True)
class RunFinished:
    """No round follows; the final model can be fetched."""

    why: str


@dataclass(frozen=True, slots=True)
class SteppedDown:
    """A later epoch exists: this process must not answer anybody any more."""

    detail: str


@dataclass(frozen=True, slots=True)
class Notice:
    """One line for the log."""

    text: str


ServerEffect = (
    Send
    | Close
    | Refused
    | MemberJoined
    | MemberGone
    | RunStarted
    | RoundCommitted
    | RunFinished
    | SteppedDown
    | Notice
)
