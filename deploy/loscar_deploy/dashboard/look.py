"""One look at a run: copies of numbers, nothing derived.

Taken on the event loop that owns the machine, or made from what a server answers to a status call.
"""

from __future__ import annotations

from dataclasses import dataclass

from loscar_core.messages import WorkerReport
from loscar_core.server_machine import ServerMachine
from loscar_core.server_members import Departure, Member
from loscar_core.server_round import ServerRound
from loscar_server.exchange import Exchange, exchange_of
from loscar_server.service import ParameterService
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.pieces import reason_from_pb, report_from_pb

DEFAULT_HEARTBEAT_S = 2.0
"""Of a server that does not tell its own."""

MOST_MEMBERS = 128
"""So many members are looked at one by one; a page with more would be of no use, and the loop has other work."""


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
        exchange=exchange_of(m.slot, open_round),
    )


def look_of(reply: pb.StatusReply, now: float) -> Look:
    """The same from a server's answer, for who watches from elsewhere.

    Args:
        now: this machine's monotonic clock, which takes the place of the server's.
    """
    counts = {"joining": 0, "active": 0, "suspended": 0, "observer": 0}
    for m in reply.members:
        state = "observer" if m.observer else m.state
        counts[state] = counts.get(state, 0) + 1
    return Look(
        at_s=now,
        run_id=reply.run_id.hex(),
        phase=reply.phase,
        epoch=reply.epoch,
        round=reply.round,
        elapsed_s=reply.elapsed_s,
        stop_reason=reply.stop_reason,
        dimension=reply.dimension,
        coordinates=reply.coordinates,
        method=reply.config.method,
        workers_wanted=reply.workers_wanted if reply.HasField("workers_wanted") else None,
        heartbeat_s=reply.heartbeat_s or DEFAULT_HEARTBEAT_S,
        bytes_in=reply.bytes_in,
        bytes_out=reply.bytes_out,
        counts=counts,
        members=tuple(_told(m, now) for m in reply.members[:MOST_MEMBERS]),
        hidden=max(0, len(reply.members) - MOST_MEMBERS),
        departures=tuple(
            Departure(d.name, d.slot, reason_from_pb(d.reason), d.detail, now - d.ago_s, b"") for d in reply.departures
        ),
        departed=reply.departed,
    )


def _told(m: pb.MemberStatus, now: float) -> MemberLook:
    return MemberLook(
        peer=m.stream,
        name=m.name,
        slot=m.slot,
        state=m.state,
        observer=m.observer,
        joined_s=now - m.joined_ago_s,
        heard_s=now - m.heard_ago_s,
        merged_round=m.merged_round,
        contributed=m.contributed,
        missed=m.missed,
        deadline_s=m.deadline_s,
        cycle_s=m.cycle_s,
        local_steps=m.local_steps,
        overlap_steps=m.overlap_steps,
        report=report_from_pb(m.report),
        exchange=Exchange(m.exchange or Exchange.NONE),
    )
