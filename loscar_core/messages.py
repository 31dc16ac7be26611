"""What worker and server say to each other, as plain dataclasses.

`loscar_wire` maps them to protobuf and back; the state machines know only these. Values are bytes as encoded by
`loscar_core.values`; a message never holds an array, so that one encoded answer serves every member.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from loscar_core.config import RunConfig
from loscar_core.indices import IndexCoding
from loscar_core.layout import Layout, Shard
from loscar_core.plan import HistoryEntry, RoundPlan
from loscar_core.state import Included, Lineage, Position
from loscar_core.values import Payload


class Reason(StrEnum):
    """Why a member left or was sent away: the code in logs, status and metrics."""

    FINISHED = "finished"
    """The run is over."""
    LEFT = "left"
    """The worker said goodbye."""
    SUPERSEDED = "superseded"
    """A newer incarnation of the same name joined."""
    LEASE_EXPIRED = "lease-expired"
    """Nothing was heard for the length of a lease."""
    STREAM_CLOSED = "stream-closed"
    """The connection broke; the member may come back."""
    REFUSED = "refused"
    """It broke a rule; the status says which."""
    DIVERGED = "diverged"
    """Its replica left the digest chain twice in a row."""
    FAILED = "failed"
    """The worker reported an error of its own."""
    SERVER_STOPPED = "server-stopped"
    """The server is shutting down before the run's end."""
    STEPPED_DOWN = "stepped-down"
    """The server met a later epoch than its own, or another state of its run."""
    CUT_OFF = "cut-off"
    """Most of the others were lost: look at the other addresses before the run goes on here without them."""


COMEBACK = frozenset(
    (Reason.SERVER_STOPPED, Reason.STEPPED_DOWN, Reason.CUT_OFF, Reason.LEASE_EXPIRED, Reason.STREAM_CLOSED)
)
"""Who goes for one of these comes back, here or at another server."""


class Purpose(IntEnum):
    """What a stream of vector chunks is; the numbers travel."""

    INITIAL_MODEL = 0
    """Worker to server: the vector that the run starts from."""
    CATCH_UP = 1
    """Server to worker: consensus values on the coordinates that were missed."""
    ANCHOR = 2
    """Worker to server: its anchor, for a server that lost its state."""
    PROGRESS = 3
    """Worker to server to newcomer: x − a, a live worker's progress that is not in the consensus yet."""


# --- worker to server ---------------------------------------------------------------------------------------


JOINED = "joined"
"""A worker's capability: it can read several messages in one."""
OTHER_SERVERS = "other-servers"
"""Capability of a worker that knows several addresses: the run may go on at one of the others."""


@dataclass(frozen=True, slots=True)
class Partial:
    """What a worker has of a whole state whose transfer was interrupted.

    Attributes:
        position, digest: of that state, with the rounds that were committed meanwhile.
        filled: how many parameters, from the first on.
    """

    position: Position
    digest: int
    filled: int


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of every stream.

    Attributes:
        protocol_version: `config.PROTOCOL_VERSION` of the worker.
        run_id: 16 bytes, or empty to join whichever run the server holds.
        name: the worker's name; the newest incarnation of a name wins.
        incarnation: 16 random bytes, new with every process.
        slot: the wanted slot, or None for the smallest free one.
        observer: receives averages, is never waited for or counted.
        layout: the worker's model.
        vector_checksum: CRC-32 of the parameters' float32 bytes (then the statistics'), for a fresh worker.
        epoch: the highest server epoch that it ever met; 0 for a fresh worker.
        members: n of the last round that it committed.
        position: what the worker's anchor holds; (0, 0) for a fresh one.
        digest: the anchor's digest.
        lineage: which epochs closed the rounds below `position`.
        recent: the last rounds that it committed, oldest first.
        capabilities: optional features: `OTHER_SERVERS`, `JOINED`.
        partial: of a state that was being sent to it when the last stream broke.
        shard: which shard it takes the server for.
    """

    protocol_version: int
    run_id: bytes
    name: str
    incarnation: bytes
    slot: int | None
    observer: bool
    layout: Layout
    vector_checksum: int
    epoch: int = 0
    members: int = 0
    position: Position = Position()
    digest: int = 0
    lineage: Lineage = Lineage()
    recent: tuple[HistoryEntry, ...] = ()
    capabilities: tuple[str, ...] = ()
    partial: Partial | None = None
    shard: Shard = Shard()


@dataclass(frozen=True, slots=True)
class Contribution:
    """A slice of one part of a worker's δ̂ (or of its statistics).

    Attributes:
        epoch: the server epoch that it is sent to.
        round: the round that it belongs to.
        part: the part's index.
        offset: first position of the slice within the part.
        values: encoded values; float32 for statistics.
        checksum: of the selection, see `RoundPlan.checksum`.
        local_steps: optimizer steps taken since the last snapshot; with the first slice of part 0 only.
        overlap_steps: steps between the previous snapshot and its merge; likewise.
        indices, base, coding, total: see `loscar_core.sparse_delta`; not used with a seeded selection.
    """

    epoch: int
    round: int
    part: int
    offset: int
    values: Payload
    checksum: int
    local_steps: int = 0
    overlap_steps: int = 0
    indices: bytes = b""
    base: int = 0
    coding: IndexCoding | None = None
    total: int = 0


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker tells about itself in heartbeats; all counted from its start.

    Attributes:
        steps: optimizer steps.
        loss: smoothed training loss, or None before the first.
        idle_s: seconds in which the training thread waited for the service.
        run_s: seconds since t = 0 as the worker saw it.
        sent, included, returned: contributions by outcome.
        bytes_up, bytes_down: payload bytes (values, and indices that travel with them) sent and received.
        round_trip_s: the last heartbeat's time to the server and back, or None before the first answer.
    """

    steps: int = 0
    loss: float | None = None
    idle_s: float = 0.0
    run_s: float = 0.0
    sent: int = 0
    included: int = 0
    returned: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    round_trip_s: float | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Renews the lease and measures the round trip.

    Attributes:
        stamp_ns: the sender's monotonic clock, returned as it is.
        round: the last round whose averages the worker has merged.
        report: the worker's figures.
    """

    stamp_ns: int
    round: int
    report: WorkerReport = field(default_factory=WorkerReport)


@dataclass(frozen=True, slots=True)
class VectorChunk:
    """A slice of a vector by value, float32; either way.

    Attributes:
        purpose: which vector.
        offset: first value of the slice: parameters (or the missed coordinates), then statistics.
        total: length of the whole vector.
        values: float32 little endian.
    """

    purpose: Purpose
    offset: int
    total: int
    values: Payload


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker holds the consensus as of `position` and may be waited for from the next round on."""

    position: Position


@dataclass(frozen=True, slots=True)
class Refresh:
    """The worker's replica left the digest chain: send all of the consensus again."""

    round: int


@dataclass(frozen=True, slots=True)
class StopRun:
    """Ask the server to end the run after the open round (max steps reached, target met, or a user's wish)."""

    why: str


@dataclass(frozen=True, slots=True)
class Leave:
    """The worker is going."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StateOffer:
    """A worker's copy of the run's state, sent when asked, before its anchor.

    Attributes:
        position, digest, lineage: of the anchor that follows.
        inclusion: the inclusion table as of `position`.
        recent: the last committed rounds, oldest first.
        members: n of the last of them.
        config: the run's configuration.
        elapsed_s: run time so far.
    """

    position: Position
    digest: int
    lineage: Lineage
    inclusion: dict[bytes, Included]
    recent: tuple[HistoryEntry, ...]
    members: int
    config: RunConfig
    elapsed_s: float


WorkerMessage = Hello | Contribution | Heartbeat | VectorChunk | Ready | Refresh | StopRun | Leave | StateOffer


# --- server to worker ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to a hello that was accepted.

    Attributes:
        run_id: 16 bytes.
        epoch: of this server process.
        slot: the worker's slot; for an observer the number of slots.
        config: the run's.
        heartbeat_s, lease_s: how often to say something, and how long silence is borne.
        position, digest, lineage: of the server's state; (epoch, 0) before the first round.
        roster: for each slot the incarnation that holds it, or empty.
        elapsed_s: run time so far; negative before t = 0.
        waiting_for: members that are still missing at the start, 0 when the run is on.
        recovering: the server has no state and collects claims; another welcome follows.
    """

    run_id: bytes
    epoch: int
    slot: int
    config: RunConfig
    heartbeat_s: float
    lease_s: float
    position: Position
    digest: int
    lineage: Lineage
    roster: tuple[bytes, ...]
    elapsed_s: float
    waiting_for: int = 0
    recovering: bool = False


@dataclass(frozen=True, slots=True)
class SendState:
    """Ask a worker for a vector: the initial model, or (with its state) the anchor."""

    purpose: Purpose


@dataclass(frozen=True, slots=True)
class CatchUp:
    """The worker's replica is behind or aside: values for these coordinates follow.

    Attributes:
        position, digest, lineage: of the state that the values belong to (rounds that are committed while they
            are streamed come as ordinary answers in between).
        base_round: the last round that both sides share.
        plans: whose selections make up the missed coordinates; empty with full=False: nothing is missing.
        full: the whole vector follows instead.
        inclusion: the whole inclusion table as of `position`.
        recent: the server's last committed rounds, oldest first.
        members: n of the last of them.
        resume: with full: so many values of an interrupted transfer are kept, from the first on, apart from those that
            `plans` selected, which come first; 0: all of them follow.
    """

    position: Position
    digest: int
    lineage: Lineage
    base_round: int
    plans: tuple[RoundPlan, ...]
    full: bool
    inclusion: dict[bytes, Included]
    recent: tuple[HistoryEntry, ...]
    members: int
    resume: int = 0


@dataclass(frozen=True, slots=True)
class OpenRound:
    """The plan of the open round, for members that did not get it with an answer."""

    plan: RoundPlan
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class SlotTaken:
    """A slot changed hands: bitmaps of later rounds speak of this incarnation (empty: of nobody)."""

    slot: int
    incarnation: bytes


@dataclass(frozen=True, slots=True)
class RosterChange:
    """All slots that changed hands since the round before; sent ahead of the round that opens."""

    slots: tuple[SlotTaken, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A slice of one part's average Δ̂ (or of the statistics' mean).

    Attributes:
        round, part, offset: as in `Contribution`.
        values: encoded values.
        included: with the first slice: the slots in the sum, one bit each.
        indices, base, coding, total: see `loscar_core.sparse_delta`; not used with a seeded selection.
    """

    round: int
    part: int
    offset: int
    values: Payload
    included: bytes = b""
    indices: bytes = b""
    base: int = 0
    coding: IndexCoding | None = None
    total: int = 0


@dataclass(frozen=True, slots=True)
class Commit:
    """All parts of a round are answered: take them over.

    Attributes:
        round: the committed round.
        members: n, what the sums were divided by.
        digest: of the consensus after the round.
        plan: the next round's.
        elapsed_ms: run time so far in ms.
    """

    round: int
    members: int
    digest: int
    plan: RoundPlan
    elapsed_ms: int


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """Returns a heartbeat's stamp."""

    stamp_ns: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The server ends the stream.

    Attributes:
        reason: code.
        detail: one line for the user.
    """

    reason: Reason
    detail: str = ""


ServerMessage = (
    Welcome | SendState | CatchUp | OpenRound | RosterChange | Answer | Commit | HeartbeatReply | Goodbye | VectorChunk
)
