"""`loscar simulate`: the protocol under a virtual clock, in one process.

The same server machine, worker engines, paces, sessions and link models as in a real run, with real gradients; only
sockets, threads and the wall clock are replaced by a queue of events. Deterministic by seed, whatever this machine
does meanwhile, and in deterministic mode (fixed local and overlap steps) bit-equal to real processes.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loscar_core import effects as fx
from loscar_core.config import RunConfig, ServerLimits
from loscar_core.errors import ConfigError
from loscar_core.messages import HeartbeatReply, ServerMessage, WorkerMessage
from loscar_core.replica import Floats
from loscar_core.server_machine import ServerMachine
from loscar_core.server_state import Phase
from loscar_core.worker_engine import WorkerEngine
from loscar_deploy.link import DirectionModel
from loscar_deploy.link_spec import LinkSpec
from loscar_wire.mapping import encode_server_message, encode_worker_message
from loscar_worker.boundary import Pace, TrainingHalf
from loscar_worker.model import ModelView
from loscar_worker.simulated import SimulatedBackground, SimulatedSession
from loscar_worker.tasks import Task
from loscar_worker.tasks.partition import Batches, partition

FRAME_BYTES = 14
"""HTTP/2 and gRPC framing of one message, as a real stream adds it."""

RUN_ID = b"simulated run..."
IDLE_EVENTS = 1_000_000
RECONNECT_S = 0.25


@dataclass(frozen=True, slots=True)
class SimulationPlan:
    """What to simulate.

    Attributes:
        task: model, data and loss.
        config: the run's; it must end by rounds, duration, steps or target.
        workers: how many.
        links: one for each.
        step_s: seconds of one local step of each worker, slowdown included; above 0.
        partition: as `loscar worker --partition`.
        target_loss: test loss of the average that ends the run, or None.
        churn: share of the workers that die (and come back as new ones) at any moment of `churn_every_s`.
        churn_every_s: see `churn`.
        away_s: how long a dead one stays away.
        limits: the server's patience.
        max_virtual_s: give up after so much virtual time.
    """

    task: Task
    config: RunConfig
    workers: int
    links: tuple[LinkSpec, ...]
    step_s: tuple[float, ...]
    partition: str = "iid"
    target_loss: float | None = None
    churn: float = 0.0
    churn_every_s: float = 10.0
    away_s: float = 5.0
    limits: ServerLimits | None = None
    max_virtual_s: float = 1e6

    def __post_init__(self) -> None:
        if len(self.links) != self.workers or len(self.step_s) != self.workers:
            raise ConfigError(f"links and step times for {self.workers} workers are needed")
        if min(self.step_s) <= 0:
            raise ConfigError("a simulated step takes time: give --step-time")
        if not 0 <= self.churn <= 1:
            raise ConfigError(f"churn {self.churn:g} is outside [0, 1]")


@dataclass(eq=False)
class _Worker:
    """One simulated worker and its link."""

    index: int
    step_s: float
    up: DirectionModel
    down: DirectionModel
    session: SimulatedSession
    background: SimulatedBackground
    train: Callable[[], None]
    peer: int | None = None
    up_order_s: float = 0.0
    down_order_s: float = 0.0
    down_pending: int = 0
    waiting_since_s: float | None = None
    waiting_final: bool = False
    incarnation: int = 0
    wire_up: int = 0
    wire_down: int = 0
    alive: bool = True


@dataclass(frozen=True, slots=True)
class SimulatedEvaluation:
    """The average of the live models at one round boundary, tested."""

    round: int
    time: float
    steps: list[int]
    loss: float
    accuracy: float


@dataclass
class SimulationResult:
    """What a simulation found; `vectors` are the workers' parameters at the end, d float32 each."""

    virtual_seconds: float = 0.0
    rounds: int = 0
    evaluations: list[SimulatedEvaluation] = field(default_factory=list)
    seconds_to_target: float | None = None
    steps: list[int] = field(default_factory=list)
    idle_fraction: list[float] = field(default_factory=list)
    bytes_up: list[int] = field(default_factory=list)
    bytes_down: list[int] = field(default_factory=list)
    wire_up: list[int] = field(default_factory=list)
    wire_down: list[int] = field(default_factory=list)
    contributions: dict[str, int] = field(default_factory=dict)
    deaths: int = 0
    vectors: list[Floats] = field(default_factory=list)
    consensus: Floats | None = None
    statistics: Floats | None = None
    stopped: str = ""


class Simulation:
    """Runs a plan."""

    def __init__(self, plan: SimulationPlan) -> None:
        self._plan = plan
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        limits = plan.limits or ServerLimits(workers=plan.workers, lease_s=60.0, heartbeat_s=5.0)
        self._server = ServerMachine(plan.config, limits, RUN_ID, 0.0)
        self._limits = limits
        self._rng = random.Random(plan.config.seed)
        self._peers = 0
        self._streams: dict[int, _Worker] = {}
        self._result = SimulationResult()
        self._collected: dict[int, dict[int, Floats]] = {}
        self._evaluation_model = plan.task.make_model(plan.config.seed)
        self._evaluation_view = ModelView(self._evaluation_model)
        self._tick_at: float | None = None
        self._workers: list[_Worker] = []
        for i in range(plan.workers):
            self._workers.append(self._make_worker(i, 0))

    # --- building -------------------------------------------------------------------------------------------

    def _make_worker(self, index: int, incarnation: int, old: _Worker | None = None) -> _Worker:
        plan = self._plan
        task, seed = plan.task, plan.config.seed
        model = task.make_model(seed)
        optimizer = task.make_optimizer(model)
        view = ModelView(model)
        identity = f"{index}-{incarnation}".encode().ljust(16, b".")
        engine = WorkerEngine(
            f"w{index}", identity, view.layout, view.vector(), view.statistics(), run_id=RUN_ID, slot=index
        )
        background = SimulatedBackground(engine, view, lambda message: self._send_up(self._workers[index], message))
        session = SimulatedSession(
            view,
            background,
            Pace(),
            clock=lambda: self._now,
            on_evaluation=lambda half, round_: self._collect(index, half, round_),
        )
        share = partition(task.labels(), plan.partition, plan.workers, index, seed)
        batches = Batches(task.train, share, task.batch_size, seed=seed, slot=index, incarnation=incarnation)
        model.train()

        def train() -> None:
            loss = task.loss(model, next(batches))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        link, rng = plan.links[index], random.Random(f"{seed} {index}")
        outages = [(start, start + length) for start, length in link.outages]
        return _Worker(
            index,
            plan.step_s[index],
            old.up if old else DirectionModel(link.up, outages, rng),
            old.down if old else DirectionModel(link.down, outages, rng),
            session,
            background,
            train,
            incarnation=incarnation,
            wire_up=old.wire_up if old else 0,
            wire_down=old.wire_down if old else 0,
        )

    # --- time -----------------------------------------------------------------------------------------------

    def _at(self, when_s: float, what: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (max(when_s, self._now), self._order, what))

    def run(self) -> SimulationResult:
        """Until every worker has finished.

        Raises:
            ConfigError: the virtual time ran out, or nothing can happen any more.
        """
        for worker in self._workers:
            self._connect(worker)
            self._at(self._limits.heartbeat_s, lambda w=worker: self._beat(w))  # type: ignore[misc]
        if self._plan.churn:
            self._at(self._plan.churn_every_s, self._churn)
        self._schedule_tick()
        while any(w.alive and not w.session.finished for w in self._workers):
            if not self._events:
                raise ConfigError("the simulation stands still: nobody is left who could do anything")
            self._now, _, what = heapq.heappop(self._events)
            if self._now > self._plan.max_virtual_s:
                raise ConfigError(f"the run did not end within {self._plan.max_virtual_s:g} virtual seconds")
            what()
        return self._finish()

    def _schedule_tick(self) -> None:
        due = self._server.next_wakeup()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            self._at(due, self._tick)

    def _tick(self) -> None:
        self._tick_at = None
        self._carry_out(self._server.tick(self._now))

    # --- the network ----------------------------------------------------------------------------------------

    def _connect(self, worker: _Worker) -> None:
        self._peers += 1
        worker.peer = self._peers
        worker.down_pending = 0
        self._streams[self._peers] = worker
        self._send_up(worker, worker.background.engine.hello())

    def _send_up(self, worker: _Worker, message: WorkerMessage) -> None:
        peer = worker.peer
        if peer is None:
            return
        size = len(encode_worker_message(message)) + FRAME_BYTES
        worker.wire_up += size
        worker.up_order_s = max(worker.up_order_s, worker.up.transit(self._now, size))
        self._at(worker.up_order_s, lambda: self._deliver_up(peer, message))

    def _deliver_up(self, peer: int, message: WorkerMessage) -> None:
        if peer in self._streams:
            self._carry_out(self._server.received(peer, message, self._now))

    def _carry_out(self, effects: Sequence[fx.ServerEffect]) -> None:
        for effect in effects:
            match effect:
                case fx.Send(peers, message):
                    size = len(encode_server_message(message)) + FRAME_BYTES
                    for peer in peers:
                        if peer in self._streams:
                            self._send_down(self._streams[peer], peer, message, size)
                case fx.Close(peer, _, _):
                    worker = self._streams.pop(peer, None)
                    if worker is not None and worker.peer == peer:
                        self._at(max(worker.down_order_s, self._now), lambda w=worker, p=peer: self._closed(w, p))  # type: ignore[misc]
                case fx.RunFinished(why):
                    self._result.stopped = why
                case _:
                    pass
        self._schedule_tick()

    def _send_down(self, worker: _Worker, peer: int, message: ServerMessage, size: int) -> None:
        worker.wire_down += size
        worker.down_order_s = max(worker.down_order_s, worker.down.transit(self._now, size))
        worker.down_pending += 1
        self._at(worker.down_order_s, lambda: self._deliver_down(worker, peer, message))

    def _deliver_down(self, worker: _Worker, peer: int, message: ServerMessage) -> None:
        if worker.peer != peer:
            return
        worker.down_pending -= 1
        worker.background.receive(message)
        if worker.down_pending == 0 and peer in self._streams and not isinstance(message, HeartbeatReply):
            self._carry_out(self._server.drained(peer, self._now))
        self._wake(worker)

    def _closed(self, worker: _Worker, peer: int) -> None:
        if worker.peer == peer and worker.alive and not worker.session.finished:
            worker.peer = None
            worker.background.engine.disconnected()
            self._at(self._now + RECONNECT_S, lambda: self._connect(worker))

    def _beat(self, worker: _Worker) -> None:
        if not worker.alive or worker.session.finished:
            return
        self._send_up(worker, worker.background.heartbeat(int(self._now * 1e9)))
        self._at(self._now + self._limits.heartbeat_s, lambda: self._beat(worker))

    # --- training -------------------------------------------------------------------------------------------

    def _wake(self, worker: _Worker) -> None:
        """Something has arrived: a worker that waits may go on."""
        session = worker.session
        if not session.started:
            if session.try_join():
                worker.waiting_since_s = None
                self._boundary(worker)
            return
        if worker.waiting_since_s is not None:
            self._boundary(worker)

    def _step(self, worker: _Worker) -> None:
        if worker.alive and not worker.session.finished:
            worker.train()
            worker.session.note_step()
            self._boundary(worker)

    def _boundary(self, worker: _Worker) -> None:
        """Between two steps: merge and snapshot what is due; then train on, or wait."""
        session = worker.session
        if worker.waiting_since_s is not None and not worker.waiting_final:
            session.idle_s += self._now - worker.waiting_since_s
        worker.waiting_since_s = None
        if session.finished:
            return
        if session.may_train():
            self._at(self._now + worker.step_s, lambda: self._step(worker))
        elif not session.finished:
            worker.waiting_since_s = self._now
            worker.waiting_final = session.in_final_round

    # --- evaluation -----------------------------------------------------------------------------------------

    def _collect(self, index: int, half: TrainingHalf, round_: int) -> None:
        vectors = self._collected.setdefault(round_, {})
        vectors[index] = half.live_values()
        if len(vectors) < sum(w.alive and w.session.started for w in self._workers):
            return
        for stale in [r for r in self._collected if r < round_]:
            del self._collected[stale]
        del self._collected[round_]
        mean = np.mean([v.astype(np.float64) for v in vectors.values()], axis=0).astype(np.float32)
        dimension = self._evaluation_view.layout.dimension
        self._evaluation_view.load_vector(mean[:dimension])
        self._evaluation_view.load_statistics(mean[dimension:])
        found = self._plan.task.evaluate(self._evaluation_model)
        elapsed = self._server.elapsed_s(self._now)
        steps = [w.session.steps for w in self._workers]
        self._result.evaluations.append(SimulatedEvaluation(round_, elapsed, steps, found.loss, found.accuracy))
        target = self._plan.target_loss
        if target is not None and found.loss <= target and self._result.seconds_to_target is None:
            self._result.seconds_to_target = elapsed
            self._carry_out(self._server.request_stop("the target loss is reached", self._now))

    # --- failures -------------------------------------------------------------------------------------------

    def _churn(self) -> None:
        """Some workers die without a word, and come back as new ones after a while."""
        if self._server.phase is Phase.FINISHED:
            return
        for worker in self._workers:
            if worker.alive and worker.session.started and self._rng.random() < self._plan.churn:
                worker.alive = False
                self._result.deaths += 1
                peer, worker.peer = worker.peer, None
                if peer is not None and self._streams.pop(peer, None) is not None:
                    self._carry_out(self._server.disconnected(peer, self._now))
                self._at(self._now + self._plan.away_s, lambda w=worker: self._reborn(w))  # type: ignore[misc]
        self._at(self._now + self._plan.churn_every_s, self._churn)

    def _reborn(self, dead: _Worker) -> None:
        if self._server.phase is Phase.FINISHED:
            return
        worker = self._make_worker(dead.index, dead.incarnation + 1, dead)
        self._workers[dead.index] = worker
        self._connect(worker)
        self._at(self._now + self._limits.heartbeat_s, lambda: self._beat(worker))

    # --- the end --------------------------------------------------------------------------------------------

    def _finish(self) -> SimulationResult:
        result, state = self._result, self._server.replica
        result.virtual_seconds = self._server.elapsed_s(self._now)
        result.rounds = state.position.round if state else 0
        for w in self._workers:
            result.steps.append(w.session.steps)
            result.idle_fraction.append(w.session.idle_fraction)
            result.bytes_up.append(w.session.engine.bytes_up)
            result.bytes_down.append(w.session.engine.bytes_down)
            result.wire_up.append(w.wire_up)
            result.wire_down.append(w.wire_down)
            result.vectors.append(w.session.live_values())
            for key, count in w.session.contributions.items():
                result.contributions[key] = result.contributions.get(key, 0) + count
        if state is not None:
            result.consensus, result.statistics = state.vector, state.statistics
        return result


def summary_of(plan: SimulationPlan, result: SimulationResult) -> dict[str, Any]:
    """The run's summary in the shape of a real run's, with `virtual_seconds` and the evaluations."""
    config, task = plan.config, plan.task
    loss: float | None = None
    accuracy: float | None = None
    if result.consensus is not None and result.statistics is not None:
        model = task.make_model(config.seed)
        view = ModelView(model)
        view.load_vector(result.consensus)
        view.load_statistics(result.statistics)
        found = task.evaluate(model)
        loss, accuracy = found.loss, found.accuracy
    return {
        "task": task.name,
        "method": "loscar",
        "merge": config.merge.value,
        "workers": plan.workers,
        "density": config.density,
        "selection": config.selection.value,
        "overlap_steps": config.overlap_steps if config.overlap_steps is not None else "auto",
        "local_steps": config.local_steps if config.local_steps is not None else "auto",
        "wire_dtype": config.value_type.value,
        "seed": config.seed,
        "epoch": 1,
        "first_round": 1,
        "rounds": result.rounds - (1 if config.final_round.value == "dense" and result.rounds else 0),
        "final": config.final_round.value,
        "steps": result.steps,
        "virtual_seconds": result.virtual_seconds,
        "loss": loss,
        "accuracy": accuracy,
        "target_loss": plan.target_loss,
        "seconds_to_target": result.seconds_to_target,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "bytes_wire_up": result.wire_up,
        "bytes_wire_down": result.wire_down,
        "step_seconds_median": list(plan.step_s),
        "idle_fraction": result.idle_fraction,
        "contributions": result.contributions,
        "deaths": result.deaths,
        "evaluations": [
            {"time": e.time, "round": e.round, "steps": e.steps, "loss": e.loss, "accuracy": e.accuracy}
            for e in result.evaluations
        ],
        "stopped": result.stopped,
    }
