"""A session's dealings with one of the servers beyond the first, when a model is spread over several.

Every shard has its stream, its rounds and its pace. Shard 0 says which slot a worker has and when the run ends; the
further ones go on without it for as long as it is away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace

from loscar_core.config import RunConfig
from loscar_core.errors import ConfigError
from loscar_core.merge import RejoinKind
from loscar_core.messages import Reason, WorkerReport
from loscar_core.worker_effects import RunEnded
from loscar_core.worker_engine import WorkerEngine
from loscar_worker.background import Background
from loscar_worker.boundary import Pace, TrainingHalf
from loscar_worker.connection import Connection, ConnectionOptions
from loscar_worker.model_range import ModelRange
from loscar_worker.round_record import RoundRecord

OWN = frozenset(("seed", "shard", "rounds", "duration_s", "max_steps", "evaluate_every"))
"""What shards need not have in common: their selections differ, and shard 0 ends and evaluates the run."""


class FurtherShard(TrainingHalf):
    """The training half of one shard beyond the first.

    Args:
        first: shard 0's, which keeps the worker's figures.
        part: the shard's coordinates.
        engine: its half of the protocol.
        options: its addresses.
        pace: overrides of the server's.
        changed: what guards the mailboxes of all shards.
    """

    def __init__(
        self,
        first: TrainingHalf,
        part: ModelRange,
        engine: WorkerEngine,
        options: ConnectionOptions,
        pace: Pace,
        changed: threading.Condition,
        *,
        clock: Callable[[], float],
        on_round: Callable[[RoundRecord], None] | None,
        rejoin: RejoinKind,
    ) -> None:
        self._first = first
        background = Background(engine, part, options, self.report, changed)
        super().__init__(part, background, pace, clock=clock, on_round=on_round, rejoin=rejoin)
        self._end_of_run: RunEnded | None = None

    @property
    def background(self) -> Background:
        return self._background

    @property
    def connection(self) -> Connection:
        return self._background.connection

    def start(self) -> None:
        """Connect, as the worker that shard 0 has welcomed."""
        welcome = self._first.engine.welcome
        assert welcome is not None
        self.engine.run_id, self.engine.slot = welcome.run_id, welcome.slot
        self._background.start()

    def begin(self) -> None:
        """Raises ConfigError when this shard's server was started with other settings than the first one's."""
        ours, theirs = self._first.engine.config, self.engine.config
        assert ours is not None
        assert theirs is not None
        for field in fields(RunConfig):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name not in OWN and one != other:
                name = field.name.removesuffix("_s").replace("_", " ")
                raise ConfigError(
                    f"the servers of shards {ours.shard} and {theirs.shard} were not started alike: "
                    f"{name} is {one} and {other}"
                )
        super().begin()

    def report(self) -> WorkerReport:
        first = self._first
        return replace(super().report(), loss=first.loss, idle_s=first.idle_s)

    def progress_of(self, round_: int) -> float:
        return self._first.progress_of(self._first.engine.anchor.position.round)

    def stop(self, why: str) -> None:
        """Ask the server to end the run."""
        self._background.stop_run(why)

    def _end(self, ended: RunEnded) -> None:
        self._end_of_run = ended
        super()._end(ended)

    def settle(self) -> None:
        """The run is over, and so is training: what was trained here after this shard's end gives way to the
        consensus, when the run ends with it."""
        if self._end_of_run is not None and self._end_of_run.vector is not None:
            self._view.load_vector(self._end_of_run.vector)

    def close(self, reason: Reason, detail: str) -> None:
        self._background.close(reason, detail)
