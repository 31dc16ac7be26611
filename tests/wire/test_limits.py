"""What no message may hold, however well it is formed: numbers, lengths and times beyond all reason."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from loscar_core.config import PROTOCOL_VERSION, RunConfig
from loscar_core.errors import MalformedError
from loscar_core.messages import Goodbye, Leave, StopRun
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.mapping import decode_server_message, decode_worker_message
from loscar_wire.pieces import config_to_pb

HUGE = (1 << 64) - 1


def hello() -> pb.Hello:
    layout = pb.Layout(parameters=[pb.Segment(name="w", shape=[4], dtype="float32")])
    return pb.Hello(protocol_version=PROTOCOL_VERSION, name="w0", incarnation=bytes(16), layout=layout)


def offer() -> pb.StateOffer:
    position = pb.Position(epoch=1, round=1)
    span = pb.Span(epoch=1, first_round=1)
    return pb.StateOffer(position=position, lineage=[span], members=1, config=config_to_pb(RunConfig()))


def decoded(**body: Any) -> object:
    return decode_worker_message(pb.WorkerMessage(**body).SerializeToString())


def test_the_messages_that_are_bent_here_are_good() -> None:
    decoded(hello=hello())
    decoded(state_offer=offer())


BENT: dict[str, Callable[[pb.Hello], object]] = {
    "an epoch that has no successor": lambda h: setattr(h, "epoch", HUGE),
    "a position's epoch": lambda h: setattr(h.position, "epoch", HUGE),
    "a position's round": lambda h: setattr(h.position, "round", HUGE),
    "a number of members": lambda h: setattr(h, "members", HUGE),
    "a lineage that begins before round 1": lambda h: h.lineage.add(epoch=1, first_round=0),
    "a lineage that begins before epoch 1": lambda h: h.lineage.add(epoch=0, first_round=1),
    "a lineage of more epochs than anybody has met": lambda h: h.lineage.extend(
        pb.Span(epoch=i, first_round=i) for i in range(1, 100_000)
    ),
    "more history than is asked for": lambda h: h.recent.extend(
        [pb.CommittedRound(plan=pb.Plan(selection=1, value_type=1))] * 10_000
    ),
    "a plan for more coordinates than a model has": lambda h: h.recent.add(
        plan=pb.Plan(count=HUGE, selection=1, value_type=1)
    ),
    "a capability that is a novel": lambda h: h.capabilities.append("x" * 10_000),
    "more capabilities than there are": lambda h: h.capabilities.extend(["x"] * 10_000),
    "a tensor of many dimensions": lambda h: h.layout.parameters[0].shape.extend([HUGE] * 300_000),
    "a tensor of a huge dimension": lambda h: h.layout.parameters[0].shape.append(1 << 62),
    "more tensors than a model has": lambda h: h.layout.parameters.extend([pb.Segment()] * 1_000_000),
    "a tensor whose name is a novel": lambda h: setattr(h.layout.parameters[0], "name", "x" * 100_000),
}


@pytest.mark.parametrize("what", BENT)
def test_a_hello_beyond_all_reason_is_refused_quickly(what: str) -> None:
    message = hello()
    BENT[what](message)
    data = pb.WorkerMessage(hello=message).SerializeToString()
    started = time.process_time()
    with pytest.raises(MalformedError):
        decode_worker_message(data)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("elapsed_s", [math.nan, math.inf, -math.inf, -1.0, 1e300])
def test_a_run_time_that_is_no_time_is_refused(elapsed_s: float) -> None:
    message = offer()
    message.elapsed_s = elapsed_s
    with pytest.raises(MalformedError):
        decoded(state_offer=message)


def test_a_repeated_member_of_the_inclusion_table_is_refused() -> None:
    message = offer()
    message.inclusion.MergeFrom(pb.InclusionTable(incarnations=bytes(32), rounds=[1, 2], masks=[b"\1"]))
    with pytest.raises(MalformedError):
        decoded(state_offer=message)


@pytest.mark.parametrize("field", ["idle_s", "run_s", "round_trip_s"])
def test_a_report_with_a_time_that_is_no_time_is_refused(field: str) -> None:
    with pytest.raises(MalformedError):
        decoded(heartbeat=pb.Heartbeat(report=pb.WorkerReport(**{field: math.inf})))


def welcome() -> pb.Welcome:
    return pb.Welcome(epoch=1, heartbeat_s=2.0, lease_s=15.0, config=config_to_pb(RunConfig()), elapsed_s=-1.0)


def heard(**body: Any) -> object:
    return decode_server_message(pb.ServerMessage(**body).SerializeToString())


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e300])
@pytest.mark.parametrize("field", ["heartbeat_s", "lease_s"])
def test_a_server_cannot_ask_for_heartbeats_at_no_time(field: str, seconds: float) -> None:
    """A worker would send them without a pause, or never."""
    heard(welcome=welcome())
    message = welcome()
    setattr(message, field, seconds)
    with pytest.raises(MalformedError):
        heard(welcome=message)


PLAN = pb.Plan(selection=1, value_type=1)
SAID: dict[str, dict[str, Any]] = {
    "an epoch that has no successor": {"welcome": pb.Welcome(epoch=HUGE, heartbeat_s=1.0, lease_s=2.0)},
    "an epoch before the first": {
        "welcome": pb.Welcome(heartbeat_s=1.0, lease_s=2.0, config=config_to_pb(RunConfig()))
    },
    "a slot": {"welcome": pb.Welcome(epoch=1, slot=1 << 31, heartbeat_s=1.0, lease_s=2.0)},
    "a time before the beginning": {"open_round": pb.OpenRound(plan=PLAN, elapsed_s=-2.0)},
    "a time that is none": {"open_round": pb.OpenRound(plan=PLAN, elapsed_s=math.nan)},
    "a round that has no successor": {"commit": pb.Commit(round=HUGE, plan=PLAN)},
    "a number of members": {"commit": pb.Commit(round=1, members=HUGE, plan=PLAN)},
    "a number of members as of a state": {"catch_up": pb.CatchUp(members=HUGE)},
    "the last shared round": {"catch_up": pb.CatchUp(base_round=HUGE)},
    "more missed rounds than are remembered": {"catch_up": pb.CatchUp(plans=[PLAN] * 100_000)},
}


@pytest.mark.parametrize("what", SAID)
def test_a_server_s_message_beyond_all_reason_is_malformed(what: str) -> None:
    with pytest.raises(MalformedError):
        heard(**SAID[what])


def test_a_diverged_loss_may_be_told() -> None:
    decoded(heartbeat=pb.Heartbeat(report=pb.WorkerReport(loss=math.nan)))


def test_texts_for_people_cannot_hold_control_characters() -> None:
    leave = decoded(leave=pb.Leave(reason="failed", detail="\x1b[2Jboo\n" + "x" * 1000))
    assert isinstance(leave, Leave)
    assert leave.detail.isprintable()
    assert len(leave.detail) <= 500
    goodbye = heard(goodbye=pb.Goodbye(reason="failed", detail="\x1b[2Jboo"))
    assert isinstance(goodbye, Goodbye)
    assert goodbye.detail == "?[2Jboo"
    stop = decoded(stop_run=pb.StopRun(why="a\tb"))
    assert isinstance(stop, StopRun)
    assert stop.why.isprintable()
