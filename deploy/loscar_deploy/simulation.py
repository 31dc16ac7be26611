"""What a simulation is given and what it finds: plan, result, and the summary in the shape of a real run's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loscar_core.config import RunConfig, ServerLimits
from loscar_core.errors import ConfigError
from loscar_core.layout import Layout
from loscar_core.replica import Floats
from loscar_core.state import Position
from loscar_deploy.link_spec import LinkSpec
from loscar_deploy.run_folder import method_options, settings_of, valley_width
from loscar_worker.model import ModelView
from loscar_worker.tasks import Task


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
        batch_sizes: each worker's; None takes the task's.
        devices: where each worker's model lives; None is the CPU for all.
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
    batch_sizes: tuple[int, ...] | None = None
    devices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.links) != self.workers or len(self.step_s) != self.workers:
            raise ConfigError(f"links and step times for {self.workers} workers are needed")
        if any(given is not None and len(given) != self.workers for given in (self.batch_sizes, self.devices)):
            raise ConfigError(f"batch sizes and devices for {self.workers} workers are needed, or none")
        if min(self.step_s) <= 0:
            raise ConfigError("a simulated step takes time: give --step-time")
        if not 0 <= self.churn <= 1:
            raise ConfigError(f"churn {self.churn:g} is outside [0, 1]")
        if self.churn_every_s <= 0:
            raise ConfigError("churn every 0 s would never let the time pass")


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
    """What a simulation found.

    Attributes:
        steps, idle_fraction, bytes_up, bytes_down, wire_up, wire_down: of each worker, in the order of slots.
        finished, run_seconds: whether each saw the end, and its run time then, or when it died.
        vectors: the workers' models at the end, d float32 each and their statistics.
        ledgers: their contributions by outcome; `contributions` are the sums.
        distances: (round, distance to the average) of merges by methods that hold one.
    """

    virtual_seconds: float = 0.0
    rounds: int = 0
    evaluations: list[SimulatedEvaluation] = field(default_factory=list)
    seconds_to_target: float | None = None
    steps: list[int] = field(default_factory=list)
    idle_fraction: list[float] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    run_seconds: list[float] = field(default_factory=list)
    bytes_up: list[int] = field(default_factory=list)
    bytes_down: list[int] = field(default_factory=list)
    wire_up: list[int] = field(default_factory=list)
    wire_down: list[int] = field(default_factory=list)
    contributions: dict[str, int] = field(default_factory=dict)
    ledgers: list[dict[str, int]] = field(default_factory=list)
    deaths: int = 0
    vectors: list[Floats] = field(default_factory=list)
    consensus: Floats | None = None
    statistics: Floats | None = None
    layout: Layout | None = None
    position: Position = Position()
    stopped: str = ""
    distances: list[tuple[int, float]] = field(default_factory=list)


def summary_of(plan: SimulationPlan, result: SimulationResult) -> dict[str, Any]:
    """The run's summary in the shape of a real run's, with `virtual_seconds` and the evaluations."""
    config, task = plan.config, plan.task
    loss: float | None = None
    accuracy: float | None = None
    if result.consensus is not None and result.statistics is not None:
        model = task.make_model(config.seed)
        view = ModelView(model)
        view.load_vector(result.consensus[: view.layout.dimension])
        view.load_statistics(result.statistics)
        found = task.evaluate(model)
        loss, accuracy = found.loss, found.accuracy
    return {
        "task": task.name,
        **settings_of(config, plan.workers),
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
        "method_options": method_options(config),
        **valley_width(result.distances),
    }
