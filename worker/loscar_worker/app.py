"""The worker process: load a task, join, train until the run is over, write down what happened."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors.numpy import save

from loscar_core.errors import ConfigError, InterruptedRunError, ServerLostError, SystemRefusedError
from loscar_core.layout import VECTOR_PREFIX
from loscar_core.methods import parse_method
from loscar_core.replica import Floats
from loscar_worker.boundary import TrainingHalf
from loscar_worker.evaluation import EvaluationWriter, LiveVector
from loscar_worker.joining import join
from loscar_worker.round_record import RoundRecord
from loscar_worker.session import Session
from loscar_worker.state_file import StateSaver, load_state, note_resumption
from loscar_worker.tasks import Task, load_task
from loscar_worker.tasks.partition import Batches, partition
from loscar_worker.trainer import Trainer

if TYPE_CHECKING:
    from loscar_worker.metrics import WorkerMetrics

log = logging.getLogger("loscar.worker")

DURATIONS_KEPT = 8192


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """One worker process.

    Attributes:
        servers: "HOST:PORT[,HOST:PORT]", with ";" between those of several shards.
        task: name or package.module:factory.
        data_dir: where its data are, or None for the default.
        name, slot, token, run_id: see `loscar_worker.join`.
        local_steps, sync_interval_s, overlap_steps: overrides of the server's pace.
        workers: N, for partitions; None samples the whole training set.
        partition: which part of the training set slot i of N takes.
        seed: of the model and the data order.
        slowdown: how many times slower than it is this machine pretends to be.
        step_time_s: a floor under a step's time, slept; times `slowdown`.
        batch_size, lr: overrides of the task's.
        device: "auto", "cpu", "cuda", "cuda:1", …
        threads: torch's compute threads, or None for torch's choice.
        result: JSON file for the figures at the end.
        rounds_log: JSON-lines file for every merged round.
        save_model: safetensors file for the model as this worker leaves with it.
        save_last: the same for its own model, as it went into the final round.
        evaluation: file for the live vector in evaluation rounds, see `loscar_worker.evaluation`.
        state: file that this worker's whole state (session, optimizer, data position) is saved to, and resumed
            from when it is there.
        state_every_s: how often; a signal to leave saves it once more.
        parting_s: for how long at most a worker that leaves goes on contributing what it has; see `Session.part`.
        method: the run's; only what it averages beside the model matters here, the options are the server's.
        rejoin: what becomes of own progress after a long absence, see `loscar_worker.join`.
    """

    servers: str
    task: str = "digits"
    data_dir: Path | None = None
    name: str | None = None
    slot: int | None = None
    token: str | None = None
    run_id: bytes = b""
    local_steps: int | str | None = None
    sync_interval_s: float | None = None
    overlap_steps: int | str | None = None
    workers: int | None = None
    partition: str = "iid"
    seed: int = 0
    slowdown: float = 1.0
    step_time_s: float = 0.0
    batch_size: int | None = None
    lr: float | None = None
    device: str = "auto"
    threads: int | None = None
    connect_timeout_s: float = 60.0
    server_timeout_s: float = 600.0
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    result: Path | None = None
    rounds_log: Path | None = None
    save_model: Path | None = None
    save_last: Path | None = None
    evaluation: Path | None = None
    state: Path | None = None
    state_every_s: float = 60.0
    parting_s: float = 0.0
    method: str = "loscar"
    rejoin: str = "project"


def choose_device(text: str) -> torch.device:
    """Raises ConfigError for a device that is not here."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()  # there, and its values can be read
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {text}: {str(error).splitlines()[0]:.200}") from None
    return device


class Stopper:
    """First SIGINT or SIGTERM: leave after the current step, or before the first one at once. Second: end at once."""

    def __init__(self) -> None:
        self.asked = False
        self._session: Session | None = None
        self._joining = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def join(self, join: Callable[[], Session]) -> Session:
        """Call `join`, unless or until asked to stop.

        Raises:
            InterruptedRunError: asked before the run had started.
        """
        if not self.asked:
            self._joining = True
            try:
                self._session = join()
            except KeyboardInterrupt:
                pass
            finally:
                self._joining = False
        if self._session is None:
            raise InterruptedRunError("interrupted before the run started")
        return self._session

    def _on_signal(self, number: int, _: object) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        when = "" if self._session is None else " after this step"
        os.write(2, _log_line(f"leaving{when}; once more to stop at once"))
        if self._session is not None:
            self._session.interrupt()
        elif self._joining:
            raise KeyboardInterrupt


def _log_line(text: str) -> bytes:
    """A line as the log would write it, for a signal handler: the log itself may be in the middle of one."""
    handlers = logging.getLogger().handlers
    record = log.makeRecord(log.name, logging.INFO, __file__, 0, text, (), None)
    return f"{handlers[0].format(record) if handlers else text}\n".encode(errors="replace")


class StepTimer:
    """Makes steps as slow as asked and remembers how long they took.

    Args:
        floor_s: shortest time of a step, slowdown included.
        slowdown: with no floor, how many times a step's own time is taken.
        note: called with every step's seconds, or None.
    """

    def __init__(self, floor_s: float, slowdown: float, note: Callable[[float], None] | None = None) -> None:
        self._floor_s = floor_s * slowdown
        self._slowdown = slowdown
        self._note = note
        self.durations_s: deque[float] = deque(maxlen=DURATIONS_KEPT)

    def finish(self, started: float) -> None:
        """Sleep what is missing of the step that began at `started` (perf_counter)."""
        took = time.perf_counter() - started
        wanted = max(self._floor_s, took * self._slowdown if self._floor_s == 0 else 0.0)
        if wanted > took:
            time.sleep(wanted - took)
        took = time.perf_counter() - started
        self.durations_s.append(took)
        if self._note is not None:
            self._note(took)

    @property
    def median_s(self) -> float:
        return statistics.median(self.durations_s) if self.durations_s else 0.0


def run_worker(
    options: WorkerOptions,
    metrics: WorkerMetrics | None = None,
    on_join: Callable[[Session], None] | None = None,
) -> int:
    """Train until the run is over or a signal asks to leave; returns the exit status.

    Args:
        options: see `WorkerOptions`.
        metrics: told what happens, and whose figures to show.
        on_join: called once the run has been joined.

    Raises:
        LoscarError: see `loscar_worker.join` and `Session.step`.
    """
    if not options.slowdown >= 1:
        raise ConfigError(f"slowdown {options.slowdown:g} is not at least 1: a machine can only be made slower")
    _check_outputs(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    stopper = Stopper()
    stopper.install()
    task = load_task(options.task, options.data_dir, batch_size=options.batch_size, lr=options.lr)
    # Whether its slot's part exists, before it takes a place in the run.
    partition(task.labels(), options.partition, options.workers, options.slot or 0, options.seed)
    device = choose_device(options.device)
    model = task.make_model(options.seed).to(device)
    saved = load_state(options.state)
    trainer = Trainer(task, model, parse_method(options.method), lambda half: _batches(options, task, half, saved))
    optimizer = trainer.optimizer
    timer = StepTimer(options.step_time_s, options.slowdown, None if metrics is None else metrics.stepped)
    rounds = open(options.rounds_log, "w", encoding="utf-8") if options.rounds_log else None  # noqa: SIM115
    try:
        if saved is not None and options.state is not None:
            _load_optimizer(options, optimizer, saved)
            try:
                saved = note_resumption(options.state, saved)
            except (LookupError, TypeError, ValueError):
                raise ConfigError(f"--state {options.state} is no worker's state") from None
        session = stopper.join(lambda: _join(options, model, trainer, rounds, saved, metrics))
        with session:
            if metrics is not None:
                metrics.joined(session)
            session.keep_last = options.save_last is not None
            if on_join is not None:
                on_join(session)
            if saved is not None:
                log.info("%s goes on from %s after %d steps", session.name, options.state, session.steps)
            log.info("%s joined run %s at slot %d", session.name, session.run_id, session.slot)
            saver = StateSaver(options.state, options.state_every_s, session, optimizer, trainer.batches)
            if saved is not None and not session.finished:
                # Before anything is contributed: what has been resumed from must not be resumed from twice.
                saver.save()
            _train(session, model, trainer, timer, stopper, saver)
            if not session.finished:
                saver.save()
                if options.parting_s > 0:
                    if not session.part(options.parting_s):
                        log.info("left after %g s with progress that has not gone out", options.parting_s)
                    saver.save()
        for option, path, values in (
            ("--save-model", options.save_model, session.live_values),
            ("--save-last", options.save_last, session.last_values),
        ):
            if path is not None:
                with _naming(option, path):
                    save_values(path, session, values())
        if options.result is not None:
            with _naming("--result", options.result):
                write_json(options.result, figures(session, timer))
    finally:
        if rounds is not None:
            with _naming("--rounds-log", options.rounds_log):
                rounds.close()
    return 0


@contextlib.contextmanager
def _naming(option: str, path: Path | None) -> Iterator[None]:
    """A failed write says of itself which file it was: the system does not. Raises SystemRefusedError."""
    try:
        yield
    except OSError as error:
        raise SystemRefusedError(f"{option} {path} cannot be written: {error.strerror or error}") from None


def _check_outputs(options: WorkerOptions) -> None:
    """Raises ConfigError for files that could not be written at the end of the training."""
    for option, path in (
        ("--result", options.result),
        ("--rounds-log", options.rounds_log),
        ("--save-model", options.save_model),
        ("--save-last", options.save_last),
        ("--state", options.state),
        ("--evaluation", options.evaluation),
    ):
        if path is None:
            continue
        if path.is_dir():
            raise ConfigError(f"{option} {path} is a folder: give a file in it")
        if not path.parent.is_dir():
            raise ConfigError(f"{option} {path} cannot be written: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise ConfigError(f"{option} {path} cannot be written: the folder is read-only for this user")


def _load_optimizer(options: WorkerOptions, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Raises ConfigError for the state of another kind of optimizer."""
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"--state {options.state} does not fit --task {options.task}: {error}") from None


def _join(
    options: WorkerOptions,
    model: torch.nn.Module,
    trainer: Trainer,
    rounds: IO[str] | None,
    saved: dict[str, Any] | None,
    metrics: WorkerMetrics | None,
) -> Session:
    on_round: Callable[[RoundRecord], None] | None = None if metrics is None else metrics.merged
    if rounds is not None:
        file = rounds

        def write_round(record: RoundRecord) -> None:
            with _naming("--rounds-log", options.rounds_log):
                file.write(json.dumps(asdict(record)) + "\n")
            if metrics is not None:
                metrics.merged(record)

        on_round = write_round
    on_evaluation: Callable[[TrainingHalf, int], None] | None = None
    if options.evaluation is not None:
        path = options.evaluation
        writer: EvaluationWriter | None = None

        def write_vector(session: TrainingHalf, round_: int) -> None:
            nonlocal writer
            values = session.live_values()
            writer = writer or EvaluationWriter(path, values.size)
            writer.write(LiveVector(round_, session.run_s, session.steps, values))

        on_evaluation = write_vector
    session = join(
        options.servers,
        model,
        token=options.token,
        name=options.name,
        slot=options.slot,
        run_id=options.run_id,
        local_steps=options.local_steps,
        sync_interval_s=options.sync_interval_s,
        overlap_steps=options.overlap_steps,
        tls_ca=options.tls_ca,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
        connect_timeout_s=options.connect_timeout_s,
        server_timeout_s=options.server_timeout_s,
        on_round=on_round,
        on_evaluation=on_evaluation,
        rejoin=options.rejoin,
        state=None if saved is None else saved["session"],
        vectors=trainer.vectors,
        companion=trainer,
    )
    return session


def _batches(options: WorkerOptions, task: Task, half: TrainingHalf, saved: dict[str, Any] | None) -> Batches:
    slot = half.engine.slot
    indices = partition(task.labels(), options.partition, options.workers, slot, options.seed)
    # Who joins a running run must not repeat the order of whoever had the slot before.
    incarnation = 0 if half.joined_at_start else int.from_bytes(half.engine.incarnation[:4], "little")
    kept = None if saved is None else saved["batches"]
    if kept is not None and kept["slot"] != slot:
        log.warning("slot %d is another worker's by now: the data of slot %d from their start", kept["slot"], slot)
        kept = None
    if kept is not None:
        incarnation = kept["incarnation"]
    batches = Batches(task.train, indices, task.batch_size, seed=options.seed, slot=slot, incarnation=incarnation)
    if kept is not None:
        batches.load_state_dict(kept)
    return batches


def _train(
    session: Session,
    model: torch.nn.Module,
    trainer: Trainer,
    timer: StepTimer,
    stopper: Stopper,
    saver: StateSaver,
) -> None:
    model.train()
    while not session.finished and not stopper.asked:
        started = time.perf_counter()
        loss = trainer.step()
        timer.finish(started)
        try:
            session.step(loss=loss)
        except ServerLostError:
            saver.save()  # the run may be there again when this worker is started again
            raise
        saver.save_if_due()


def figures(session: Session, timer: StepTimer) -> dict[str, Any]:
    """What a worker reports at its end."""
    return {
        "name": session.name,
        "slot": session.slot,
        "finished": session.finished,
        "steps": session.steps,
        "run_seconds": session.run_s,
        "idle_seconds": session.idle_s,
        "idle_fraction": session.idle_fraction,
        "service_seconds": session.service_s,
        "step_seconds_median": timer.median_s,
        "bytes_up": session.bytes_up,
        "bytes_down": session.bytes_down,
        "contributions": session.contributions,
        "reconnects": session.reconnects,
    }


def save_values(path: Path, session: Session, values: Floats) -> None:
    """Write parameters and statistics under their module names, float32; whole or not at all."""
    tensors, start = {}, 0
    for segment in (*session.layout.parameters, *session.layout.statistics):
        if segment.name.startswith(VECTOR_PREFIX):
            continue
        tensors[segment.name] = values[start : start + segment.size].reshape(segment.shape)
        start += segment.size
    part = path.with_suffix(path.suffix + ".part")
    # Not save_file, whose errors are no OSErrors.
    part.write_bytes(save(tensors, {"format": "loscar", "run": session.run_id, "worker": session.name}))
    part.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
