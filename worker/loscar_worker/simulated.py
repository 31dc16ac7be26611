"""A session without threads, sockets or a clock of its own: the training half under a virtual clock.

The engine, the mailbox and everything that happens at a step boundary are those of a real session; only the
connection is replaced by a function that carries a message, and waiting by an answer that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loscar_core.merge import RejoinKind
from loscar_core.messages import ServerMessage, StopRun, WorkerMessage, WorkerReport
from loscar_core.worker_cycle import Action
from loscar_core.worker_effects import Emit, WorkerEffect
from loscar_core.worker_engine import WorkerEngine
from loscar_worker.background import Background, Mailbox
from loscar_worker.boundary import Pace, TrainingHalf
from loscar_worker.model import ModelView
from loscar_worker.round_record import RoundRecord


class _Wire:
    """What a background needs of a connection."""

    def __init__(self, send: Callable[[WorkerMessage], None], on_effect: Callable[[WorkerEffect], None]) -> None:
        self._send = send
        self._on_effect = on_effect

    def carry_out(self, effects: Sequence[WorkerEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Emit):
                self._send(effect.message)
            else:
                self._on_effect(effect)

    def stop_run(self, why: str) -> None:
        self._send(StopRun(why))


class _Soon:
    """An event loop's `call_soon`, done when the message at hand is dealt with."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def call_soon(self, what: Callable[[], None]) -> None:
        self._waiting.append(what)

    def run(self) -> None:
        waiting, self._waiting = self._waiting, []
        for what in waiting:
            what()


class SimulatedBackground(Background):
    """A background whose messages go where the simulation wants them.

    Args:
        engine: the worker's half of the protocol.
        view: the model.
        send: takes a message to the server.
    """

    def __init__(self, engine: WorkerEngine, view: ModelView, send: Callable[[WorkerMessage], None]) -> None:
        # Not the base's: it would start a connection and a thread.
        self.mailbox = Mailbox()
        self.engine = engine
        self._view = view
        self._soon = _Soon()
        self._loop: Any = self._soon
        self.connection: Any = _Wire(send, self._on_effect)
        self._running = None
        self._prepared = None
        self._updates = []
        self._changes = {}
        self._delivering = False
        self.report: Callable[[], WorkerReport] = WorkerReport

    def _post(self, what: Callable[..., None], *args: object) -> None:
        what(*args)

    def receive(self, message: ServerMessage) -> None:
        """A message has arrived from the server."""
        self.connection.carry_out(self.engine.received(message))
        self._soon.run()

    def heartbeat(self, stamp_ns: int) -> WorkerMessage:
        return self.engine.heartbeat(stamp_ns, self.report())


class SimulatedSession(TrainingHalf):
    """A training half that never waits: it says that it would.

    Attributes:
        started: t = 0 has come for this worker.
    """

    def __init__(
        self,
        view: ModelView,
        background: SimulatedBackground,
        pace: Pace,
        *,
        clock: Callable[[], float],
        on_round: Callable[[RoundRecord], None] | None = None,
        on_evaluation: Callable[[TrainingHalf, int], None] | None = None,
        rejoin: RejoinKind = RejoinKind.PROJECT,
    ) -> None:
        super().__init__(
            view, background, pace, clock=clock, on_round=on_round, on_evaluation=on_evaluation, rejoin=rejoin
        )
        background.report = self.report
        self.started = False
        self._taken_over = False
        self._asked_to_stop = False

    def try_join(self) -> bool:
        """Go on with joining as far as what has arrived allows; True once training may begin."""
        box = self._background.mailbox
        if box.initial is not None and not self._taken_over:
            self._taken_over = True
            self.take_over()
        if self._taken_over and (box.open is not None or box.ended is not None):
            self.begin()
            self.started = True
        return self.started

    def note_step(self) -> None:
        super().note_step()
        if self._max_steps is not None and self.steps >= self._max_steps and not self._asked_to_stop:
            self._asked_to_stop = True
            self._background.stop_run(f"a worker has taken {self.steps} steps")

    def may_train(self) -> bool:
        """Merge and snapshot what is due; False when the pace says to wait, or the run is over."""
        action, _ = self.advance()
        return action is Action.TRAIN and not self.finished
