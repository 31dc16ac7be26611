"""Inputs for the fuzzers to begin with: recorded runs in which nobody misbehaves, so that mutations reach deep."""

from __future__ import annotations

import struct

import numpy as np
from conversation import DRAINED, GONE, LISTENER, MESSAGE, RUN, SERVERS, STOP, TICK, Target

from loscar_core import worker_effects as we
from loscar_core.messages import ServerMessage, WorkerReport
from loscar_core.worker_engine import WorkerEngine
from loscar_wire.mapping import decode_server_message
from loscar_wire.mapping import encode_worker_message as encode


def _write(data: bytearray, operation: int, argument: int, payload: bytes) -> None:
    data.append(argument * 5 + operation)
    if operation == MESSAGE:
        data += struct.pack("<H", len(payload)) + payload


class Recorder:
    """Two or three honest workers and a server, in step; writes down what the server receives."""

    def __init__(self, which: int) -> None:
        self.target = Target(which)
        self.data = bytearray([which])
        self.heard = bytearray([which + len(SERVERS)])
        self.engines: dict[int, WorkerEngine] = {}
        self.open: dict[int, we.RoundOpen] = {}
        self.rng = np.random.default_rng(which)

    def _frame(self, operation: int, argument: int, payload: bytes = b"") -> None:
        _write(self.data, operation, argument, payload)

    def _heard(self, peer: int, operation: int, payload: bytes = b"") -> None:
        if peer == LISTENER:
            _write(self.heard, operation, 0, payload)

    def up(self, peer: int, payload: bytes) -> None:
        self._frame(MESSAGE, peer, payload)
        self.target.message(peer, payload)

    def join(self, peer: int, engine: WorkerEngine | None = None) -> None:
        layout = self.target.layout
        if engine is None:
            vector = self.rng.normal(size=layout.dimension).astype(np.float32)
            statistics = np.zeros(layout.statistics_size, np.float32)
            engine = WorkerEngine(f"w{peer}", bytes([peer + 1]) * 16, layout, vector, statistics, run_id=RUN)
        self.engines[peer] = engine
        self.up(peer, encode(engine.hello()))
        self.settle()

    def tick(self, quarters: int) -> None:
        self._frame(TICK, quarters)
        self.target.tick(quarters * 0.25)
        self.settle()

    def lose(self, peer: int) -> WorkerEngine:
        self._frame(GONE, peer)
        self._heard(peer, GONE)
        self.target.gone(peer)
        engine = self.engines.pop(peer)
        engine.disconnected()
        return engine

    def settle(self) -> None:
        """Deliver until everybody is silent."""
        moved = True
        while moved:
            moved = False
            for peer, engine in list(self.engines.items()):
                box = self.target.sent[peer]
                while box:
                    moved = True
                    payload = box.popleft()
                    self._heard(peer, MESSAGE, payload)
                    self.answered(peer, engine, decode_server_message(payload))
                self._frame(DRAINED, peer)
                self.target.drained(peer)

    def answered(self, peer: int, engine: WorkerEngine, message: ServerMessage) -> None:
        for effect in engine.received(message):
            match effect:
                case we.Emit(reply):
                    self.up(peer, encode(reply))
                case we.RoundOpen():
                    self.open[peer] = effect
                case we.ProgressWanted():
                    self._heard(peer, STOP)
                    for more in engine.progress(engine.anchor.vector + np.float32(0.5)):
                        assert isinstance(more, we.Emit)
                        self.up(peer, encode(more.message))

    def train(self, peer: int) -> None:
        """One contribution to the open round, if there is one."""
        engine, opened = self.engines[peer], self.open.pop(peer, None)
        self.up(peer, encode(engine.heartbeat(1, WorkerReport(steps=1))))
        self._heard(peer, TICK)
        self._heard(peer, DRAINED)
        if opened is not None and not opened.contributed:
            values = self.rng.normal(size=opened.indices.size).astype(np.float32)
            if peer == LISTENER:  # what whoever listens will say: with a selection of its own that is in the answer
                values = engine.anchor.gather(opened.plan, opened.indices, 0, values.size) + np.float32(0.25)
            statistics = np.ones(self.target.layout.statistics_size, np.float32)
            for effect in engine.snapshot(opened.plan.round, values, statistics, 1, 0) or []:
                assert isinstance(effect, we.Emit)
                self.up(peer, encode(effect.message))
        self.settle()


def honest_runs() -> list[bytes]:
    """Inputs of runs in which nobody misbehaves: starts, rounds, absences, newcomers, recoveries, ends."""
    found = []
    for which in range(len(SERVERS)):
        r = Recorder(which)
        r.join(0)
        r.join(1)
        r.tick(4)
        r.tick(4)
        for _ in range(3):
            r.train(0)
            r.train(1)
        found.append(bytes(r.data))
        engine = r.lose(1)
        r.tick(4)
        r.train(0)
        r.join(1, engine)
        r.join(2)
        for peer in (0, 1, 2, 0, 1):
            r.train(peer)
        found.append(bytes(r.data))
        r.target.stop()
        r._frame(STOP, 0)
        r.settle()
        for peer in (0, 1, 2):
            r.train(peer)
        found += [bytes(r.data), bytes(r.heard)]
        # The same workers meet a server that has lost everything.
        again = Recorder(which)
        _write(r.heard, GONE, 0, b"")
        again.heard = r.heard
        for peer, engine in list(r.engines.items()):
            engine.disconnected()
            again.join(peer, engine)
        again.tick(24)
        again.tick(24)
        for peer in (0, 1, 2, 0, 1, 2):
            again.train(peer)
        found += [bytes(again.data), bytes(again.heard)]
    return found
