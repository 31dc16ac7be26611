"""One input of the fuzzers: a whole conversation with a server, or of a worker, and what must hold whatever was said.

An input says which server, then frames of messages, broken connections, time that passes and outboxes that run
empty. Allowed is a LoscarError, which the machine itself turns into a refusal; anything else is a crash. Every answer
must be encodable, and the clock must go on ticking whatever was received. The same for a worker whose server says
anything: it may give up with a LoscarError, and must then be able to say hello to another one.
"""

from __future__ import annotations

import contextlib
import struct
from collections import deque
from collections.abc import Iterator

import numpy as np

from loscar_core import effects as fx
from loscar_core import worker_effects as we
from loscar_core.config import FinalRound, RunConfig, ServerLimits
from loscar_core.errors import ConfigError, LoscarError, NonFiniteError
from loscar_core.layout import Layout, Segment
from loscar_core.messages import WorkerReport
from loscar_core.robust import Aggregate
from loscar_core.selection import SelectionKind
from loscar_core.server_machine import ServerMachine
from loscar_core.values import ValueType
from loscar_core.worker_engine import WorkerEngine
from loscar_core.worker_state import export_worker
from loscar_wire.mapping import (
    decode_server_message,
    decode_worker_message,
    encode_server_message,
    encode_worker_message,
)

RUN = b"r" * 16
PEERS = 4
LISTENER = 1
"""The worker whose side of the recorded conversations is kept."""

MOST_FRAMES = 200
MESSAGE, GONE, TICK, DRAINED, STOP = range(5)

PLAIN = Layout((Segment("w", (6, 5), "float32"), Segment("b", (6,), "float32")))
NORMALISED = Layout(PLAIN.parameters, (Segment("running_mean", (4,), "float32"),))

LIMITS = ServerLimits(workers=2, lease_s=20.0, heartbeat_s=2.0, start_grace_s=0.5, recover_after_s=5.0, round_cap_s=5.0)
SERVERS: tuple[tuple[Layout, RunConfig, ServerLimits], ...] = (
    (PLAIN, RunConfig(density=0.25, local_steps=1), LIMITS),
    (
        NORMALISED,
        RunConfig(density=0.5, local_steps=1, value_type=ValueType.INT8, rounds=8, final_round=FinalRound.NONE),
        ServerLimits(start_grace_s=0.5, recover_after_s=5.0, norm_bound=3.0),
    ),
    (
        PLAIN,
        RunConfig(coordinates=9, local_steps=1, selection=SelectionKind.RANDOM, value_type=ValueType.BFLOAT16),
        ServerLimits(start_grace_s=0.5, aggregate=Aggregate.MEDIAN, max_members=3),
    ),
    (
        NORMALISED,
        RunConfig(density=1.0, local_steps=1, selection=SelectionKind.ALL, value_type=ValueType.FLOAT16, rounds=6),
        LIMITS,
    ),
    (
        NORMALISED,
        RunConfig(coordinates=7, local_steps=1, selection=SelectionKind.TOPK, value_type=ValueType.INT8),
        ServerLimits(start_grace_s=0.5, recover_after_s=5.0, norm_bound=3.0, round_cap_s=5.0),
    ),
)


def is_of_worker(data: bytes) -> bool:
    """Whether an input is what a worker hears, not what a server does."""
    return bool(data) and data[0] % (2 * len(SERVERS)) >= len(SERVERS)


class WorkerTarget:
    """A worker's engine behind its wire format; everything that it wants to send is encoded."""

    def __init__(self, which: int) -> None:
        layout = SERVERS[which % len(SERVERS)][0]
        vector, statistics = np.zeros(layout.dimension, np.float32), np.zeros(layout.statistics_size, np.float32)
        self.engine = WorkerEngine(f"w{LISTENER}", bytes([LISTENER]) * 16, layout, vector, statistics, run_id=RUN)
        self.opened: we.RoundOpen | None = None
        self.merged = 0
        self.ended = False
        self.connect()

    def connect(self) -> None:
        """Say hello to a server, which must be able to read it."""
        self.ended = False
        self.opened = None
        decode_worker_message(encode_worker_message(self.engine.hello()))

    def message(self, data: bytes) -> None:
        if self.ended:
            return
        try:
            self.carry_out(self.engine.received(decode_server_message(data)))
        except LoscarError:
            self.ended = True
            self.engine.disconnected()

    def gone(self) -> None:
        self.engine.disconnected()
        self.connect()

    def beat(self) -> None:
        encode_worker_message(self.engine.heartbeat(1, WorkerReport(steps=1)))

    def snapshot(self) -> None:
        opened, self.opened = self.opened, None
        if opened is None or opened.contributed or self.ended:
            return
        engine = self.engine
        values = engine.anchor.gather(opened.plan, opened.indices, 0, opened.indices.size) + np.float32(0.25)
        statistics = engine.anchor.statistics.copy()
        try:
            self.carry_out(engine.snapshot(opened.plan.round, values, statistics, 1, 0, opened.opening) or [])
        except NonFiniteError:
            self.ended = True

    def progress(self) -> None:
        with contextlib.suppress(NonFiniteError):
            self.carry_out(self.engine.progress(self.engine.anchor.vector + np.float32(0.5)))

    def carry_out(self, effects: list[we.WorkerEffect]) -> None:
        for effect in effects:
            match effect:
                case we.Emit(message):
                    decode_worker_message(encode_worker_message(message))
                case we.RoundOpen():
                    self.opened = effect
                case we.Update():
                    self.merged += 1
                    size = self.engine.layout.dimension if effect.indices is None else effect.indices.size
                    assert effect.anchor.size == effect.new_anchor.size == size
                    assert effect.sent is None or effect.sent.size == size
                case _:
                    pass

    def finish(self) -> None:
        self.gone()
        with contextlib.suppress(ConfigError):  # it has not joined yet
            export_worker(self.engine)


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


def drive(data: bytes) -> Target | WorkerTarget:
    """Run one input."""
    return _drive_worker(data) if is_of_worker(data) else _drive_server(data)


def _drive_worker(data: bytes) -> WorkerTarget:
    target = WorkerTarget(data[0])
    for operation, _, payload in frames(data):
        if operation == MESSAGE:
            target.message(payload)
        elif operation == GONE:
            target.gone()
        elif operation == TICK:
            target.beat()
        elif operation == DRAINED:
            target.snapshot()
        else:
            target.progress()
    target.finish()
    return target


def _drive_server(data: bytes) -> Target:
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
