"""What a chaos run does to its processes and links, and when: a schedule that follows from a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LEASE_S = 5.0
"""The run's lease; a few faults last longer than that."""

KILLABLE = 0.5
"""Share of the workers that may be killed; the others' ledgers are balanced from their first step on."""

KINDS = {
    "worker killed": 4.0,
    "worker stopped": 4.0,
    "link cut": 4.0,
    "link reset": 4.0,
    "server killed": 1.0,
    "server stopped": 0.7,
    "server cut off": 0.5,
    "server's links reset": 0.7,
    "server and worker killed": 0.5,
    "server killed, one worker ahead": 0.5,
}
"""Kinds of faults and their weights. In the last one a commit reaches one worker and is lost on the way to the others,
so that the round is abandoned, and that worker has to take it back when it returns. Rounds stand still for seconds when
the server is hit, so most faults are for workers and links: what is hit should be at work."""

WORKER_DIES = {"worker killed", "server and worker killed"}


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """One chaos run.

    Attributes:
        seconds: how long faults are injected.
        workers: how many.
        seed: of the schedule, the run and the models.
        faults_per_s: mean rate.
        step_time_s: floor under a step's time.
        calm_rounds: that everybody closes in peace at the end; some ten exchange every coordinate once.
        undisturbed: compare with a run of equal duration in peace.
        out: keep the logs and books here; None uses a folder that is removed.
    """

    seconds: float = 60.0
    workers: int = 8
    seed: int = 0
    faults_per_s: float = 0.8
    step_time_s: float = 0.02
    calm_rounds: int = 40
    undisturbed: bool = True
    out: Path | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault.

    Attributes:
        at_s: when, from the run's start.
        kind: see `KINDS`.
        worker: whom it hits, where it hits one.
        duration_s: how long a pause or cut lasts, or a dead process stays dead.
        phase: None to strike at once, whatever goes on; else this share of a usual round after the next commit.
        up, down: directions of a cut.
    """

    at_s: float
    kind: str
    worker: int
    duration_s: float
    phase: float | None
    up: bool = True
    down: bool = True


def plan_faults(options: ChaosOptions) -> list[Fault]:
    """The schedule: every kind at least once, if there is time for all of them."""
    rng = random.Random(f"chaos/{options.seed}")
    phases = _phases(rng)
    faults: list[Fault] = []
    times = _times(rng, options)
    for at_s, kind in zip(times, _kinds(rng, len(times)), strict=True):
        victims = killable_workers(options) if kind in WORKER_DIES else range(options.workers)
        phase = next(phases) if rng.random() < 0.7 else None
        if "ahead" in kind:
            phase = 0.0
        up, down = rng.choice(((True, True), (True, True), (True, False), (False, True)))
        faults.append(Fault(at_s, kind, rng.choice(victims), _duration(rng, kind), phase, up, down))
    return faults


def _times(rng: random.Random, options: ChaosOptions) -> list[float]:
    times = itertools.accumulate(iter(lambda: rng.expovariate(options.faults_per_s), None))
    return list(itertools.takewhile(lambda at_s: at_s < options.seconds, times))


def _kinds(rng: random.Random, count: int) -> list[str]:
    kinds = rng.sample(list(KINDS), len(KINDS))[:count]
    kinds += rng.choices(list(KINDS), list(KINDS.values()), k=count - len(kinds))
    rng.shuffle(kinds)
    return kinds


def _phases(rng: random.Random) -> Iterator[float]:
    """Shares of a round, each quarter in turn."""
    for quarter in itertools.cycle((0, 2, 1, 3)):
        yield (quarter + rng.random()) / 4


def _duration(rng: random.Random, kind: str) -> float:
    """Mostly short; some long enough to be suspended, a few longer than a lease."""
    if "ahead" in kind:
        return rng.uniform(1.0, 3.0)
    if "killed" in kind:
        return rng.choice((0.0, rng.uniform(0.0, 1.0), rng.uniform(1.0, 3.0)))
    draw = rng.random()
    if draw < 0.5:
        return rng.uniform(0.02, 0.6)
    return rng.uniform(0.6, 3.0) if draw < 0.85 else LEASE_S * rng.uniform(1.1, 1.5)


def killable_workers(options: ChaosOptions) -> range:
    """Workers that may be killed; every other one of them comes back as itself, the others start afresh."""
    return range(max(1, round(options.workers * KILLABLE)))
