"""One server machine and hand-made peers: every message and every moment is the test's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from loscar_core import effects as fx
from loscar_core.config import PROTOCOL_VERSION, RunConfig, ServerLimits
from loscar_core.errors import LoscarError
from loscar_core.layout import Layout, Segment
from loscar_core.messages import (
    Contribution,
    Hello,
    Purpose,
    Ready,
    SendState,
    ServerMessage,
    VectorChunk,
    WorkerMessage,
)
from loscar_core.replica import checksum_of
from loscar_core.selection import SelectionKind
from loscar_core.server_machine import ServerMachine
from loscar_core.server_members import Member
from loscar_core.state import Position
from loscar_core.values import ValueType, encode

RUN = b"r" * 16
M = TypeVar("M")


def incarnation(text: str) -> bytes:
    return text.encode()[:16].ljust(16, b".")


def layout(dimension: int = 8, statistics: int = 0, name: str = "w") -> Layout:
    return Layout(
        (Segment(name, (dimension,), "float32"),),
        (Segment("mean", (statistics,), "float32"),) if statistics else (),
    )


class Desk:
    """A server whose clock and peers are in the test's hands.

    Args:
        config, limits: changes to a run of dense float32 rounds without an end and to a patient server.
    """

    def __init__(
        self,
        *,
        dimension: int = 8,
        statistics: int = 0,
        config: dict[str, Any] | None = None,
        limits: dict[str, Any] | None = None,
    ) -> None:
        given: dict[str, Any] = {"selection": SelectionKind.ALL, "density": 1.0} | (config or {})
        patience: dict[str, Any] = {"lease_s": 1e6, "recover_after_s": 60.0, "start_grace_s": 5.0} | (limits or {})
        self.now = 0.0
        self.machine = ServerMachine(RunConfig(**given), ServerLimits(**patience), RUN, self.now)
        self.layout = layout(dimension, statistics)
        self.vector = np.arange(dimension, dtype=np.float32)
        self.statistics = np.zeros(statistics, np.float32)
        self.sent: dict[int, list[ServerMessage]] = {}
        self.closed: dict[int, fx.Close] = {}
        self.log: list[fx.ServerEffect] = []

    # --- events ---------------------------------------------------------------------------------------------

    def _carry(self, effects: list[fx.ServerEffect]) -> list[fx.ServerEffect]:
        for effect in effects:
            match effect:
                case fx.Send(peers, message):
                    for peer in peers:
                        if peer not in self.closed:
                            self.sent.setdefault(peer, []).append(message)
                case fx.Close():
                    self.closed.setdefault(effect.peer, effect)
                case _:
                    self.log.append(effect)
        return effects

    def send(self, peer: int, message: WorkerMessage) -> list[fx.ServerEffect]:
        return self._carry(self.machine.received(peer, message, self.now))

    def drop(self, peer: int) -> None:
        self._carry(self.machine.disconnected(peer, self.now))

    def drained(self, peer: int) -> None:
        self._carry(self.machine.drained(peer, self.now))

    def tick(self, now: float | None = None) -> None:
        self.now = self.now if now is None else now
        self._carry(self.machine.tick(self.now))

    def stop(self, why: str = "enough") -> None:
        self._carry(self.machine.request_stop(why, self.now))

    # --- peers ----------------------------------------------------------------------------------------------

    def hello(self, peer: int, name: str | None = None, **changes: Any) -> list[fx.ServerEffect]:
        name = f"w{peer}" if name is None else name
        told = Hello(
            PROTOCOL_VERSION,
            b"",
            name,
            incarnation(name),
            None,
            False,
            self.layout,
            checksum_of(self.vector, self.statistics),
        )
        return self.send(peer, replace(told, **changes))

    def give_model(self, peer: int) -> None:
        values = np.concatenate([self.vector, self.statistics])
        self.send(peer, VectorChunk(Purpose.INITIAL_MODEL, 0, values.size, values.tobytes()))

    def ready(self, *peers: int) -> None:
        state = self.machine.replica
        assert state is not None
        for peer in peers:
            self.send(peer, Ready(state.position))

    def start(self, *peers: int, **changes: Any) -> Desk:
        """All of them join at once, the first gives the model, and round 1 opens."""
        for peer in peers:
            self.hello(peer, **changes)
        self.tick(self.now + self.machine.limits.start_grace_s)
        donor = next(p for p in peers if self.last(p, SendState) is not None)
        self.give_model(donor)
        self.ready(*peers)
        self.tick(self.now + self.machine.limits.start_grace_s)
        assert self.machine.phase == "running", self.machine.phase
        return self

    def contribution(self, value: float = 1.0, *, part: int = 0, **changes: Any) -> Contribution:
        """One whole part of the open round, all of it the same value."""
        current = self.machine.round
        assert current is not None
        which = current.parts[part]
        kind = ValueType.FLOAT32 if which.statistics else current.plan.value_type
        payload = encode(np.full(which.size, value, np.float32), kind)
        message = Contribution(self.machine.epoch, current.plan.round, part, 0, payload, current.checksum)
        return replace(message, **changes)

    def contribute(self, peer: int, value: float = 1.0) -> None:
        current = self.machine.round
        assert current is not None
        for message in [self.contribution(value, part=p.index) for p in current.parts]:
            self.send(peer, message)

    # --- what came of it ------------------------------------------------------------------------------------

    def got(self, peer: int, kind: type[M]) -> list[M]:
        return [m for m in self.sent.get(peer, []) if isinstance(m, kind)]

    def last(self, peer: int, kind: type[M]) -> M | None:
        found = self.got(peer, kind)
        return found[-1] if found else None

    def error(self, peer: int) -> LoscarError | None:
        return self.closed[peer].error if peer in self.closed else None

    def member(self, peer: int) -> Member:
        return self.machine.members.by_peer[peer]

    @property
    def round(self) -> int:
        """The last committed one."""
        assert self.machine.replica is not None
        return self.machine.replica.position.round

    @property
    def position(self) -> Position:
        assert self.machine.replica is not None
        return self.machine.replica.position

    def logged(self, kind: type[M]) -> list[M]:
        return [e for e in self.log if isinstance(e, kind)]
