"""One input of the fuzzers: a whole conversation with a server, and what must hold whatever was said.

An input says which server, then frames of messages, broken connections, time that passes and outboxes that run
empty. Allowed is a LoscarError, which the machine itself turns into a refusal; anything else is a crash. Every answer
must be encodable, and the clock must go on ticking whatever was received.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator

from loscar_core import effects as fx
from loscar_core.config import FinalRound, RunConfig, ServerLimits
from loscar_core.errors import LoscarError
from loscar_core.layout import Layout, Segment
from loscar_core.robust import Aggregate
from loscar_core.selection import SelectionKind
from loscar_core.server_machine import ServerMachine
from loscar_core.values import ValueType
from loscar_wire.mapping import decode_worker_message, encode_server_message

RUN = b"r" * 16
PEERS = 4
MOST_FRAMES = 200
MESSAGE, GONE, TICK, DRAINED, STOP = range(5)

PLAIN = Layout((Segment("w", (6, 5), "float32"), Segment("b", (6,), "float32")))
NORMALISED = Layout(PLAIN.parameters, (Segment("running_mean", (4,), "float32"),))

LIMITS = ServerLimits(workers=2, lease_s=20.0, heartbeat_s=2.0, start_grace_s=0.5, recover_after_s=5.0, round_cap_s=5.0)
SERVERS: tuple[tuple[Layout, RunConfig, ServerLimits], ...] = (
    (PLAIN, RunConfig(density=0.25, local_steps=1), LIMITS),
    (
        NORMALISED,
        RunConfig(density=0.5, local_steps=1, value_type=ValueType.INT8, rounds=4, final_round=FinalRound.NONE),
        ServerLimits(start_grace_s=0.5, recover_after_s=5.0, norm_bound=3.0),
    ),
    (
        PLAIN,
        RunConfig(coordinates=9, local_steps=1, selection=SelectionKind.RANDOM, value_type=ValueType.BFLOAT16),
        ServerLimits(start_grace_s=0.5, aggregate=Aggregate.MEDIAN, max_members=3),
    ),
    (
        NORMALISED,
        RunConfig(density=1.0, local_steps=1, selection=SelectionKind.ALL, value_type=ValueType.FLOAT16, rounds=3),
        LIMITS,
    ),
)


class Target:
    """A server machine behind its wire format; everything that it wants to send is encoded."""

    def __init__(self, which: int) -> None:
        self.layout, config, limits = SERVERS[which % len(SERVERS)]
        self.now = 0.0
        self.machine = ServerMachine(config, limits, RUN, self.now)
        self.closed: set[int] = set()
        self.sent: dict[int, deque[bytes]] = {peer: deque(maxlen=64) for peer in range(PEERS)}

    def message(self, peer: int, data: bytes) -> None:
        if peer in self.closed:
            return
        try:
            message = decode_worker_message(data)
        except LoscarError as error:
            self.carry_out(self.machine.refuse(peer, error, self.now))
            return
        self.carry_out(self.machine.received(peer, message, self.now))

    def gone(self, peer: int) -> None:
        """The stream breaks; the next message under this number is of a new one."""
        self.closed.discard(peer)
        self.sent[peer].clear()
        self.carry_out(self.machine.disconnected(peer, self.now))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.machine.tick(self.now))
        self.machine.next_wakeup()

    def drained(self, peer: int) -> None:
        self.carry_out(self.machine.drained(peer, self.now))

    def stop(self) -> None:
        self.carry_out(self.machine.request_stop("fuzzing", self.now))

    def carry_out(self, effects: list[fx.ServerEffect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(peers, message):
                    payload = encode_server_message(message)
                    for peer in peers:
                        self.sent[peer].append(payload)
                case fx.Close(peer, _, _):
                    self.closed.add(peer)
                case _:
                    pass

    def finish(self) -> None:
        """Whatever it was told, it must still work."""
        self.tick(1.0)
        self.tick(1000.0)
        self.machine.saved_state(self.now)
        self.carry_out(self.machine.shut_down(self.now))


def frames(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(operation, argument, payload) of each frame; the last may be short."""
    at = 1
    for _ in range(MOST_FRAMES):
        if at >= len(data):
            return
        operation, argument = data[at] % 5, data[at] // 5
        at += 1
        payload = b""
        if operation == MESSAGE:
            (size,) = struct.unpack("<H", data[at : at + 2].ljust(2, b"\0"))
            at += 2
            payload = data[at : at + size]
            at += size
        yield operation, argument, payload


def drive(data: bytes) -> Target:
    """Run one input."""
    target = Target(data[0] if data else 0)
    for operation, argument, payload in frames(data):
        if operation == MESSAGE:
            target.message(argument % PEERS, payload)
        elif operation == GONE:
            target.gone(argument % PEERS)
        elif operation == TICK:
            target.tick(argument * 0.25)
        elif operation == DRAINED:
            target.drained(argument % PEERS)
        else:
            target.stop()
    target.finish()
    return target
