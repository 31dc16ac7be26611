"""`loscar simulate`: the protocol under a virtual clock, in one process.

The same server machine, worker engines, paces, sessions and link models as in a real run, with real gradients; only
sockets, threads and the wall clock are replaced by a queue of events. Deterministic by seed, whatever this machine
does meanwhile, and in deterministic mode (fixed local and overlap steps) bit-equal to real processes.
"""

from __future__ import annotations

import heapq
import random
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from loscar_core import effects as fx
from loscar_core.config import ServerLimits
from loscar_core.errors import ConfigError
from loscar_core.messages import HeartbeatReply, ServerMessage, WorkerMessage
from loscar_core.methods import parse_method
from loscar_core.replica import Floats
from loscar_core.server_machine import ServerMachine
from loscar_core.server_state import Phase
from loscar_core.worker_engine import WorkerEngine
from loscar_deploy.link_model import DirectionModel
from loscar_deploy.recording import Recorder
from loscar_deploy.run_folder import RunFolder
from loscar_deploy.simulation import SimulatedEvaluation, SimulationPlan, SimulationResult, summary_of
from loscar_server.status import status_of
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.mapping import encode_server_message, encode_worker_message
from loscar_worker.app import choose_device
from loscar_worker.boundary import Pace, TrainingHalf
from loscar_worker.connection import may_retry
from loscar_worker.model import ModelView
from loscar_worker.round_record import RoundRecord
from loscar_worker.simulated import SimulatedBackground, SimulatedSession
from loscar_worker.tasks.partition import Batches, partition
from loscar_worker.trainer import Trainer

FRAME_BYTES = 14
"""HTTP/2 and gRPC framing of one message, as a real stream adds it."""

RUN_ID = b"simulated run..."
IDLE_EVENTS = 1_000_000
RECONNECT_S = 0.25

__all__ = ["Simulation", "SimulationPlan", "SimulationResult", "execute", "summary_of"]


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
    incarnation: int = 0
    wire_up: int = 0
    wire_down: int = 0
    alive: bool = True
    died_s: float = 0.0


class Simulation:
    """Runs a plan.

    Args:
        plan: what.
        recorder: writes down rounds, evaluations and the server's status as they come; None for no record.
    """

    def __init__(self, plan: SimulationPlan, recorder: Recorder | None = None) -> None:
        self._plan = plan
        self._recorder = recorder
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        limits = plan.limits or ServerLimits(workers=plan.workers, lease_s=60.0, heartbeat_s=2.0)
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
        if plan.devices is not None:
            model = model.to(choose_device(plan.devices[index]))
        trainer = Trainer(
            task, model, parse_method(plan.config.method), lambda _: self._make_batches(index, incarnation)
        )
        view = ModelView(model, vectors=trainer.vectors)
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
            on_round=partial(self._note_round, f"w{index}"),
            on_evaluation=lambda half, round_: self._collect(index, half, round_),
        )
        session.follow(trainer)
        model.train()

        def train() -> None:
            session.note_loss(trainer.step())

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

    def _make_batches(self, index: int, incarnation: int) -> Batches:
        plan = self._plan
        task, seed = plan.task, plan.config.seed
        share = partition(task.labels(), plan.partition, plan.workers, index, seed)
        batch_size = task.batch_size if plan.batch_sizes is None else plan.batch_sizes[index]
        return Batches(task.train, share, batch_size, seed=seed, slot=index, incarnation=incarnation)

    def _note_round(self, name: str, record: RoundRecord) -> None:
        if record.distance is not None:
            self._result.distances.append((record.round, record.distance))
        if self._recorder is not None:
            self._recorder.round(name, record)

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
        if self._recorder is not None:
            self._at(0.0, partial(self._record, self._recorder))
        self._schedule_tick()
        # Also while all workers are away at once: they come back.
        while self._server.phase is not Phase.FINISHED or any(
            w.alive and not w.session.finished for w in self._workers
        ):
            if not self._events:
                raise ConfigError("the simulation stands still: nobody is left who could do anything")
            self._now, _, what = heapq.heappop(self._events)
            if self._now > self._plan.max_virtual_s:
                raise ConfigError(f"the run did not end within {self._plan.max_virtual_s:g} virtual seconds")
            what()
        if self._recorder is not None:
            self._recorder.status(self._status())
        return self._finish()

    def _record(self, recorder: Recorder) -> None:
        if self._server.phase is not Phase.FINISHED:
            if self._server.elapsed_s(self._now) >= 0:
                recorder.status(self._status())
            self._at(self._now + recorder.status_every_s, partial(self._record, recorder))

    def _status(self) -> pb.StatusReply:
        up, down = (sum(counts) for counts in zip(*((w.wire_up, w.wire_down) for w in self._workers), strict=True))
        return status_of(self._server, self._now, up, down, 1)

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
                case fx.Close(peer, error, _):
                    worker = self._streams.pop(peer, None)
                    if worker is not None and worker.peer == peer:
                        if worker.alive and error is not None and not may_retry(error):
                            raise error  # a real worker would end with it
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
        if worker.waiting_since_s is not None:
            session.note_wait(self._now - worker.waiting_since_s)
        worker.waiting_since_s = None
        if session.finished:
            return
        if session.may_train():
            self._at(self._now + worker.step_s, lambda: self._step(worker))
        elif not session.finished:
            worker.waiting_since_s = self._now

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
        if self._recorder is not None:
            self._recorder.evaluation(self._result.evaluations[-1])
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
                worker.alive, worker.died_s = False, worker.session.run_s
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
            result.finished.append(w.session.finished)
            result.run_seconds.append(w.session.run_s if w.alive else w.died_s)
            result.bytes_up.append(w.session.engine.bytes_up)
            result.bytes_down.append(w.session.engine.bytes_down)
            result.wire_up.append(w.wire_up)
            result.wire_down.append(w.wire_down)
            result.vectors.append(w.session.live_values())
            result.ledgers.append(w.session.contributions)
            for key, count in result.ledgers[-1].items():
                result.contributions[key] = result.contributions.get(key, 0) + count
        if state is not None:
            result.consensus, result.statistics = state.vector, state.statistics
            result.layout, result.position = self._server.layout, state.position
        return result


def execute(plan: SimulationPlan, args: Namespace) -> dict[str, Any]:
    """Simulate; returns the summary. With `args.out` it writes a run folder there, as `loscar run` does.

    Raises:
        ConfigError: see `Simulation.run` and `RunFolder`.
    """
    if args.out is None:
        return summary_of(plan, Simulation(plan).run())
    folder = RunFolder(args.out)
    folder.write_options(args)
    recorder = Recorder(folder, plan.workers)
    try:
        result = Simulation(plan, recorder).run()
    finally:
        recorder.flush()
    summary = summary_of(plan, result)
    recorder.finish(plan, result, summary)
    return summary
