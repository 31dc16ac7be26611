"""The members of a run as the server sees them: identities, slots, states, leases and deadlines.

    joining ──ready──▶ active ──misses a round──▶ suspended ──ready──▶ active
       └──────────────────┴── leaves, falls silent, is superseded ──────┴──▶ gone

Only active members are waited for and counted. A member is one stream; identity is (name, incarnation), and the
newest incarnation of a name wins at once.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from loscar_core.config import ServerLimits
from loscar_core.errors import ConfigError, RefusedError, SupersededError
from loscar_core.messages import Hello, Partial, Reason, WorkerReport
from loscar_core.replica import Indices
from loscar_core.state import FORGOTTEN

DEADLINE_FLOOR_S = 10.0
"""No member is given up on sooner, however short its cycles: a pause of a few seconds is not a failure."""

CYCLE_SAMPLES = 16
SUPERSEDED_REMEMBERED = 4096
SPARE_SLOTS = 16


class MemberState(StrEnum):
    JOINING = "joining"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    GONE = "gone"


@dataclass(slots=True)
class Stream:
    """Consensus values on their way to a member that catches up.

    Attributes:
        indices: the coordinates, or None for all.
        total: values in all, statistics included.
        slice_values: in one message.
        offset: values already handed to the transport.
    """

    indices: Indices | None
    total: int
    slice_values: int
    offset: int = 0


@dataclass(slots=True, eq=False)
class Member:
    """One member and its stream.

    Attributes:
        peer: the transport's number for the stream.
        hello: what it said first.
        slot: its place in the sums; -1 for an observer.
        state: see the module.
        following: answers are being sent to it.
        behind: rounds committed since its outbox was last seen empty.
        refreshed: it was sent everything because it had asked for that, since its outbox was last seen empty.
        sent_round: the last round whose commit was queued for it.
        merged_round: the last round that it says it has merged.
        ready: it holds what it was sent and may be waited for.
        cloned: it has been given a live worker's progress, or needs none.
        stream: values that it is catching up with, if any.
        partial: what it has of a whole state whose stream was interrupted.
        slice_values: in a message of such a stream; fewer for who could not keep up, 0 for as many as usual.
        heard_s, joined_s: server clock.
        cycle_s: median of its last cycles, from a round's opening to its whole contribution; 0 when there were none.
        missed: rounds that were closed without it while it was active.
        report: its last figures.
        round_trip_s: not known to the machine; the transport may fill it in.
    """

    peer: int
    hello: Hello
    slot: int
    heard_s: float
    joined_s: float
    state: MemberState = MemberState.JOINING
    following: bool = False
    behind: int = 0
    refreshed: bool = False
    sent_round: int = 0
    merged_round: int = 0
    ready: bool = False
    cloned: bool = False
    stream: Stream | None = None
    slice_values: int = 0
    partial: Partial | None = None
    cycle_s: float = 0.0
    _cycles_s: deque[float] = field(default_factory=lambda: deque(maxlen=CYCLE_SAMPLES))
    missed: int = 0
    contributed: int = 0
    local_steps: int = 0
    overlap_steps: int = 0
    report: WorkerReport = field(default_factory=WorkerReport)

    @property
    def name(self) -> str:
        return self.hello.name

    @property
    def incarnation(self) -> bytes:
        return self.hello.incarnation

    @property
    def observer(self) -> bool:
        return self.hello.observer

    def note_cycle(self, seconds: float) -> None:
        """A cycle of its is over, or has lasted so long already."""
        self._cycles_s.append(seconds)
        self.cycle_s = statistics.median(self._cycles_s)

    def deadline_s(self, limits: ServerLimits, stretch: float = 1.0) -> float:
        """How long after its opening this member can hold a round up.

        Args:
            stretch: how many times as large as usual the round is; 1 for smaller ones.
        """
        if len(self._cycles_s) < 3:
            return limits.round_cap_s
        own = limits.deadline_cycles * self.cycle_s * max(1.0, stretch)
        return min(limits.round_cap_s, max(DEADLINE_FLOOR_S, own))


@dataclass(frozen=True, slots=True)
class Departure:
    """Who went, when and why; kept for status and logs."""

    name: str
    slot: int
    reason: Reason
    detail: str
    at_s: float
    incarnation: bytes


class MemberTable:
    """Live members by stream, name and slot, and what is remembered of those who went."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self.by_peer: dict[int, Member] = {}
        self.departures: deque[Departure] = deque(maxlen=256)
        self.departure_counts: dict[Reason, int] = {}
        self._reserved: dict[int, tuple[str, float]] = {}  # slot -> (name, until), the longest absent first
        self._most = 0  # members that there ever were at a time
        self._superseded: deque[bytes] = deque(maxlen=SUPERSEDED_REMEMBERED)

    def __len__(self) -> int:
        return len(self.by_peer)

    def workers(self) -> list[Member]:
        """Members that train, by slot."""
        return sorted((m for m in self.by_peer.values() if not m.observer), key=lambda m: m.slot)

    def active(self) -> list[Member]:
        """By slot."""
        return [m for m in self.workers() if m.state is MemberState.ACTIVE]

    def named(self, name: str) -> Member | None:
        return next((m for m in self.by_peer.values() if m.name == name), None)

    def check(self, hello: Hello, now: float) -> None:
        """Refuse a hello that cannot become a member. The slot of a worker that comes back is a wish.

        Raises:
            SupersededError: a newer incarnation of its name was here already.
            RefusedError: the server is full, or the wanted slot belongs to somebody else.
            ConfigError: there is no such slot, or nobody has that incarnation.
        """
        if hello.incarnation == FORGOTTEN:
            raise ConfigError("an incarnation of zeros is nobody's")
        if hello.incarnation in self._superseded:
            raise SupersededError(f"a newer worker named {hello.name!r} has taken over")
        present = self.named(hello.name)
        if len(self) - (present is not None) >= self._limits.max_members:
            raise RefusedError(f"the server is full: {self._limits.max_members} members")
        if hello.slot is not None and not hello.observer:
            if not 0 <= hello.slot < self._limits.max_members:
                raise ConfigError(f"slot {hello.slot} is outside 0..{self._limits.max_members - 1}")
            self._expire(now)
            holder = self._holder(hello.slot, hello.name)
            # At further shards it is the one that shard 0 gave; who had it may not be forgotten here yet.
            if holder is not None and hello.epoch == 0 and hello.shard.index == 0:
                raise RefusedError(f"slot {hello.slot} belongs to {holder!r}")

    def _holder(self, slot: int, name: str) -> str | None:
        for m in self.by_peer.values():
            if m.slot == slot and m.name != name:
                return m.name
        reserved = self._reserved.get(slot)
        return reserved[0] if reserved is not None and reserved[0] != name else None

    def add(self, peer: int, hello: Hello, now: float) -> Member:
        """Make a member; `check` must have passed and an older incarnation must have been removed."""
        slot = -1
        if not hello.observer:
            self._expire(now)
            slot = self._slot_for(hello)
            self._reserved.pop(slot, None)
        member = Member(peer, hello, slot, heard_s=now, joined_s=now, partial=hello.partial)
        self.by_peer[peer] = member
        self._most = max(self._most, len(self.by_peer))
        return member

    def _slot_for(self, hello: Hello) -> int:
        if hello.slot is not None and self._holder(hello.slot, hello.name) is None:
            return hello.slot
        own = [slot for slot, (name, _) in self._reserved.items() if name == hello.name]
        if own:
            return min(own)
        taken = {m.slot for m in self.by_peer.values()} | set(self._reserved)
        return next(s for s in range(len(taken) + 1) if s not in taken)

    def _expire(self, now: float) -> None:
        for slot in [s for s, (_, until) in self._reserved.items() if until <= now]:
            del self._reserved[slot]

    def remove(self, member: Member, reason: Reason, detail: str, now: float) -> None:
        """The member is gone; its slot stays reserved for its name for a while."""
        del self.by_peer[member.peer]
        member.state = MemberState.GONE
        if reason is Reason.SUPERSEDED:
            self._superseded.append(member.incarnation)
        if not member.observer:
            self._reserved[member.slot] = (member.name, now + self._limits.slot_reserve_s)
            # Bitmaps and rosters go by slots: they must not grow with every name that comes and goes.
            while len(self._reserved) > self._most + SPARE_SLOTS:
                del self._reserved[next(iter(self._reserved))]
        self.departures.append(Departure(member.name, member.slot, reason, detail, now, member.incarnation))
        self.departure_counts[reason] = self.departure_counts.get(reason, 0) + 1

    def next_lease_end(self) -> float | None:
        """When the first lease runs out unless something is heard."""
        return min((m.heard_s + self._limits.lease_s for m in self.by_peer.values()), default=None)
