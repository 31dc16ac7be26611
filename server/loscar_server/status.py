"""What a running server tells about itself."""

from __future__ import annotations

from loscar_core.config import PROTOCOL_VERSION
from loscar_core.server_machine import ServerMachine
from loscar_server.exchange import Exchange, exchange_of
from loscar_server.refusals import Refusals
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.pieces import config_to_pb, report_to_pb

MOST_LOOKED_AT = 128
"""Members whose contribution to the open round is looked at part by part; the loop has other work."""


def status_of(
    machine: ServerMachine,
    now: float,
    bytes_in: int,
    bytes_out: int,
    first_round: int,
    refusals: Refusals | None = None,
) -> pb.StatusReply:
    """The reply to a status call, from the machine's state and what the transport counts, if there is one."""
    state = machine.replica
    reply = pb.StatusReply(
        run_id=machine.run_id,
        protocol_version=PROTOCOL_VERSION,
        phase=machine.phase.value,
        epoch=machine.epoch,
        round=state.position.round if state else 0,
        elapsed_s=machine.elapsed_s(now),
        dimension=machine.layout.dimension if machine.layout else 0,
        config=config_to_pb(machine.config),
        refused=machine.refused if refusals is None else refusals.by_kind(),
        stop_reason=machine.stop_reason or "",
        first_round=first_round,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        digest=state.digest if state else 0,
        departed=sum(machine.members.departure_counts.values()),
        coordinates=machine.round.plan.count if machine.round else 0,
        heartbeat_s=machine.limits.heartbeat_s,
        workers_wanted=machine.limits.workers,
    )
    everybody = [*machine.members.workers(), *(o for o in machine.members.by_peer.values() if o.observer)]
    for i, m in enumerate(everybody):
        reply.members.add(
            name=m.name,
            slot=m.slot,
            state=m.state.value,
            heard_ago_s=now - m.heard_s,
            merged_round=m.merged_round,
            contributed=m.contributed,
            missed=m.missed,
            deadline_s=m.deadline_s(machine.limits),
            local_steps=m.local_steps,
            overlap_steps=m.overlap_steps,
            report=report_to_pb(m.report),
            observer=m.observer,
            cycle_s=m.cycle_s,
            exchange=(exchange_of(m.slot, machine.round) if i < MOST_LOOKED_AT else Exchange.NONE).value,
            joined_ago_s=now - m.joined_s,
            stream=m.peer,
        )
    for r in refusals.entries() if refusals is not None else ():
        reply.refusals.add(
            address=r.address, name=r.name, kind=r.kind, count=r.count, detail=r.detail, ago_s=now - r.at_s
        )
    for d in machine.members.departures:
        reply.departures.add(name=d.name, slot=d.slot, reason=d.reason.value, detail=d.detail, ago_s=now - d.at_s)
    return reply
