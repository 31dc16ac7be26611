"""Calls below the client library: streams whose every byte is the test's own, and a worker that is driven by hand."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from processes import DEADLINE_S

from loscar_core.layout import Layout, Segment
from loscar_core.messages import Answer, Commit, Heartbeat, Leave, Reason, ServerMessage, WorkerMessage
from loscar_core.worker_effects import Emit, ProgressWanted, RoundOpen, Update, WorkerEffect
from loscar_core.worker_engine import WorkerEngine
from loscar_wire.mapping import decode_server_messages, encode_worker_message
from loscar_wire.transport import TRAIN

NO_STATISTICS = np.empty(0, np.float32)


def layout_of(dimension: int) -> Layout:
    return Layout((Segment("w", (dimension,), "float32"),))


def engine_of(name: str, dimension: int, incarnation: bytes | None = None) -> WorkerEngine:
    """A worker's half of the protocol whose model is all zeros."""
    told = name.encode()[:16].ljust(16, b".") if incarnation is None else incarnation
    return WorkerEngine(name, told, layout_of(dimension), np.zeros(dimension, np.float32), NO_STATISTICS)


@dataclass(frozen=True)
class Outcome:
    """What a round did: Δ̂, n, and for each part the bitmap of slots in its sum."""

    change: np.ndarray
    members: int
    included: list[bytes]


class RawStream:
    """A Train stream of bytes, closed at the end of its `with`.

    Args:
        channel: to the server.
        metadata: with a token, say.
        deadline_s: the longest that it may take from beginning to end.
    """

    def __init__(
        self, channel: grpc.Channel, metadata: Sequence[tuple[str, str]] = (), deadline_s: float = DEADLINE_S
    ) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        requests = iter(self._requests.get, None)
        self.call = channel.stream_stream(TRAIN)(requests, timeout=deadline_s, metadata=metadata)
        self.together: list[int] = []
        """How many messages came at a time."""
        self._waiting: deque[ServerMessage] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.half_close()
        self.call.cancel()

    def send(self, message: WorkerMessage | bytes) -> None:
        self._requests.put(message if isinstance(message, bytes) else encode_worker_message(message))

    def half_close(self) -> None:
        """Nothing more will be sent."""
        self._requests.put(None)

    def read(self) -> ServerMessage:
        """The next message; those that ride along come one after the other."""
        if not self._waiting:
            self._waiting.extend(decode_server_messages(next(self.call)))
            self.together.append(len(self._waiting))
        return self._waiting.popleft()

    def status(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ends, whatever is received before."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError:
            pass
        return self.call.code(), self.call.details()


class HandWorker:
    """An honest worker in the test's hands: it does nothing but what it is told to, one thing after the other.

    Args:
        stream: to the server.
        engine: its half of the protocol.
        capabilities: what it says it can do.
    """

    def __init__(self, stream: RawStream, engine: WorkerEngine, capabilities: Sequence[str] = ()) -> None:
        self.stream = stream
        self.engine = engine
        self.opened: RoundOpen | None = None
        self.received: list[ServerMessage] = []
        stream.send(replace(engine.hello(), capabilities=tuple(capabilities)))

    def pump(self) -> list[WorkerEffect]:
        """Take one message in and answer it; returns what else it asks for."""
        message = self.stream.read()
        self.received.append(message)
        effects = self.engine.received(message)
        for effect in effects:
            match effect:
                case Emit(reply):
                    self.stream.send(reply)
                case ProgressWanted():
                    for more in self.engine.progress(self.engine.anchor.vector):
                        assert isinstance(more, Emit)
                        self.stream.send(more.message)
                case RoundOpen():
                    self.opened = effect
                case _:
                    pass
        return effects

    def wait_open(self) -> RoundOpen:
        """Until a round is open that nothing was contributed to."""
        while self.opened is None or self.opened.contributed:
            self.pump()
        return self.opened

    def contribute(self, value: float) -> Any:
        """δ = `value` on all of the open round's coordinates; returns its plan."""
        opened = self.wait_open()
        self.opened = None
        plan, size = opened.plan, opened.indices.size
        values = self.engine.anchor.gather(plan, opened.indices, 0, size) + np.float32(value)
        for effect in self.engine.snapshot(plan.round, values, NO_STATISTICS, 1, 0, opened.opening) or []:
            assert isinstance(effect, Emit)
            self.stream.send(effect.message)
        return plan

    def round(self, value: float) -> Outcome:
        """Contribute, and wait for the commit."""
        plan = self.contribute(value)
        self.received.clear()
        while True:
            for effect in self.pump():
                if isinstance(effect, Update) and effect.round == plan.round:
                    [commit] = [m for m in self.received if isinstance(m, Commit)]
                    included = [m.included for m in self.received if isinstance(m, Answer) and m.offset == 0]
                    return Outcome(effect.new_anchor - effect.anchor, commit.members, included)

    def keep_alive(self) -> None:
        """Send heartbeats until the stream is closed, whatever else is done meanwhile."""

        def beat() -> None:
            while self.stream.call.is_active():
                self.stream.send(Heartbeat(time.monotonic_ns(), 0))
                time.sleep(0.2)

        threading.Thread(target=beat, daemon=True).start()

    def leave(self) -> None:
        self.stream.send(Leave(Reason.LEFT))
        self.stream.half_close()
