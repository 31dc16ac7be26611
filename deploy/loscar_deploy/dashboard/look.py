"""One look at a run, taken on the event loop that owns the machine: copies of numbers, nothing derived."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from loscar_core.messages import WorkerReport
from loscar_core.server_machine import ServerMachine
from loscar_core.server_members import Departure, Member
from loscar_core.server_round import ServerRound
from loscar_server.service import ParameterService

MOST_MEMBERS = 128
"""So many members are looked at one by one; a page with more would be of no use, and the loop has other work."""

MOST_PARTS = 64
"""Of a round, looked at for each member."""


class Exchange(StrEnum):
    """What the server has of a worker's contribution to the open round."""

    NONE = "none"
    """No round is open, or this one does not count the worker."""
    AWAITED = "awaited"
    """Nothing yet."""
    ARRIVING = "arriving"
    """Some parts, not all."""
    WHOLE = "whole"
    """All of it: the round waits for others."""


@dataclass(frozen=True, slots=True)
class MemberLook:
    """One member; times are the server's monotonic clock in seconds, figures as in `server_members.Member`."""

    peer: int
    name: str
    slot: int
    state: str
    observer: bool
    joined_s: float
    heard_s: float
    merged_round: int
    contributed: int
    missed: int
    deadline_s: float
    cycle_s: float
    local_steps: int
    overlap_steps: int
    report: WorkerReport
    exchange: Exchange


@dataclass(frozen=True, slots=True)
class Look:
    """The run at one moment.

    Attributes:
        at_s: server's monotonic clock.
        run_id: hexadecimal.
        phase: as in `Status`.
        epoch, round: of the last commit; 0 before.
        elapsed_s: run time, -1 before t = 0.
        stop_reason: why the run ends, or empty.
        dimension: size of the model in coordinates; 0 when not known yet.
        coordinates: what the open round carries; 0 without one.
        method: the training method.
        workers_wanted: round 1 waits for so many, or None.
        heartbeat_s: how often workers say something.
        bytes_in, bytes_out: messages of members' streams since this process started.
        counts: members by state, observers apart.
        members: the first `MOST_MEMBERS` by slot, observers last.
        hidden: how many more there are.
        departures: the newest, oldest first; 256 at most.
        departed: how many members have ever gone.
    """

    at_s: float
    run_id: str
    phase: str
    epoch: int
    round: int
    elapsed_s: float
    stop_reason: str
    dimension: int
    coordinates: int
    method: str
    workers_wanted: int | None
    heartbeat_s: float
    bytes_in: int
    bytes_out: int
    counts: dict[str, int]
    members: tuple[MemberLook, ...]
    hidden: int
    departures: tuple[Departure, ...]
    departed: int


def look_at(service: ParameterService, now: float) -> Look:
    """Call it on the service's own loop.

    Args:
        now: server's monotonic clock.
    """
    machine = service.machine
    state, open_round = machine.replica, machine.round
    everybody = sorted(machine.members.by_peer.values(), key=lambda m: (m.observer, m.slot))
    counts = {"joining": 0, "active": 0, "suspended": 0, "observer": 0}
    for m in everybody:
        counts["observer" if m.observer else m.state.value] += 1
    return Look(
        at_s=now,
        run_id=machine.run_id.hex(),
        phase=machine.phase.value,
        epoch=machine.epoch,
        round=state.position.round if state else 0,
        elapsed_s=machine.elapsed_s(now),
        stop_reason=machine.stop_reason or "",
        dimension=machine.layout.dimension if machine.layout else 0,
        coordinates=open_round.plan.count if open_round else 0,
        method=machine.config.method,
        workers_wanted=machine.limits.workers,
        heartbeat_s=machine.limits.heartbeat_s,
        bytes_in=service.bytes_in,
        bytes_out=service.bytes_out,
        counts=counts,
        members=tuple(_member(m, machine, open_round) for m in everybody[:MOST_MEMBERS]),
        hidden=max(0, len(everybody) - MOST_MEMBERS),
        departures=tuple(machine.members.departures),
        departed=sum(machine.members.departure_counts.values()),
    )


def _member(m: Member, machine: ServerMachine, open_round: ServerRound | None) -> MemberLook:
    return MemberLook(
        peer=m.peer,
        name=m.name,
        slot=m.slot,
        state=m.state.value,
        observer=m.observer,
        joined_s=m.joined_s,
        heard_s=m.heard_s,
        merged_round=m.merged_round,
        contributed=m.contributed,
        missed=m.missed,
        deadline_s=m.deadline_s(machine.limits),
        cycle_s=m.cycle_s,
        local_steps=m.local_steps,
        overlap_steps=m.overlap_steps,
        report=m.report,
        exchange=_exchange(m, open_round),
    )


def _exchange(m: Member, open_round: ServerRound | None) -> Exchange:
    if open_round is None or m.slot not in open_round.slots:
        return Exchange.NONE
    here = [open_round.has(m.slot, part) for part in range(min(MOST_PARTS, len(open_round.parts)))]
    if all(here):
        return Exchange.WHOLE
    return Exchange.ARRIVING if any(here) else Exchange.AWAITED
