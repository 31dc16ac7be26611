"""`loscar compare`: overlapped, overwriting and blocking runs side by side, over densities and links.

Every repetition has a seed of its own, which all variants share, and runs all of them one after the other before the
next repetition begins: what this machine does meanwhile spreads over the variants, and ratios come from pairs.
"""

from __future__ import annotations

import csv
import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from loscar_core.errors import ConfigError, InterruptedRunError, LoscarError, NonFiniteError
from loscar_deploy.run_data import RunData, load_run

VARIANTS = ("overlapped", "overwrite", "blocking")
DIVERGED = "the training diverged"
TARGET_REACHED = "the target loss is reached"


@dataclass(frozen=True, slots=True)
class Case:
    """One run to do.

    Attributes:
        variant: one of VARIANTS.
        density, link: as texts, as they were given.
        seed: the repetition's.
        name: of its folder.
        args: the options of `loscar run` or `loscar simulate`.
    """

    variant: str
    density: str
    link: str
    seed: int
    name: str
    args: Namespace


@dataclass(frozen=True, slots=True)
class Row:
    """One run's outcome; a line of compare.csv.

    Attributes:
        variant, density, link, seed: the case.
        seconds_to_target, steps_to_target, bytes_to_target: run time, steps (mean over workers) and payload (all
            workers, both ways) at the first evaluation at or below the target; None when it was not reached.
        seconds: run time at the end.
        rounds: rounds committed.
        steps: mean over workers.
        loss, accuracy: at the end, on the test data; None when the training diverged.
        bytes_up, bytes_down: payload of all workers.
        idle_max, idle_mean: share of a worker's run in which its training thread waited for the service.
        lost: workers that did not see the end.
        stopped: why the run ended.
        folder: the run folder.
    """

    variant: str
    density: str
    link: str
    seed: int
    seconds_to_target: float | None
    steps_to_target: float | None
    bytes_to_target: int | None
    seconds: float
    rounds: int | None
    steps: float
    loss: float | None
    accuracy: float | None
    bytes_up: int
    bytes_down: int
    idle_max: float | None
    idle_mean: float | None
    lost: int
    stopped: str
    folder: str


@dataclass(frozen=True, slots=True)
class Spread:
    """Several repetitions of one figure.

    Attributes:
        mean, deviation, least, most: over the values that are there; deviation is the sample's, 0 of one value.
        values: by repetition, None where there is none.
    """

    mean: float | None
    deviation: float | None
    least: float | None
    most: float | None
    values: list[float | None]


def spread(values: Sequence[float | None]) -> Spread:
    known = [v for v in values if v is not None]
    if not known:
        return Spread(None, None, None, None, list(values))
    return Spread(fmean(known), stdev(known) if len(known) > 1 else 0.0, min(known), max(known), list(values))


def cases_of(
    common: Namespace,
    densities: Sequence[str],
    links: Sequence[str],
    variants: Sequence[str],
    seeds: Sequence[int],
    blocking_steps: int,
    out: Path,
) -> list[Case]:
    """All runs, in the order in which they are done: repetition by repetition, the variants in turn.

    Args:
        common: the options that all runs share.
        blocking_steps: N of the blocking runs, whose Q is 0.
        out: the comparison's folder.
    """
    cases = []
    for repetition, seed in enumerate(seeds):
        turn = repetition % len(variants)
        for place, link in enumerate(links, start=1):
            for density in densities:
                for variant in (*variants[turn:], *variants[:turn]):
                    own: dict[str, Any] = {"density": density, "link": link, "seed": str(seed)}
                    own["merge"] = "overwrite" if variant == "overwrite" else "delay-corrected"
                    if variant == "blocking":
                        own |= {"local_steps": str(blocking_steps), "overlap_steps": "0"}
                    name = f"link{place}-density{density}-seed{seed}-{variant}"
                    own["out"] = out / "runs" / name
                    cases.append(Case(variant, density, link, seed, name, Namespace(**{**vars(common), **own})))
    return cases


def run_all(
    cases: Sequence[Case], execute: Callable[[Case], dict[str, Any]], target_loss: float | None
) -> Iterator[Row]:
    """Do the runs one after the other; each yields its row. A run whose training diverges is an outcome like others.

    Args:
        execute: does one; returns its summary.

    Raises:
        InterruptedRunError: a run was ended by a signal.
        LoscarError: a run could not be done, saying which.
    """
    for case in cases:
        try:
            stopped = execute(case)["stopped"]
        except NonFiniteError:
            stopped = DIVERGED
        except InterruptedRunError:
            raise
        except LoscarError as error:
            raise type(error)(f"{case.name}: {error}") from None
        if stopped == "interrupted":
            raise InterruptedRunError(f"interrupted in {case.name}; the runs before it are complete")
        yield row_of(case, load_run(case.args.out, case.variant), target_loss, stopped)


def row_of(case: Case, run: RunData, target_loss: float | None, stopped: str) -> Row:
    """What a finished run's folder says."""
    summary = run.summary or {}
    workers = run.workers()
    idle = [w.idle_fraction for w in workers if w.idle_fraction is not None]
    reached = None if target_loss is None else run.reached(target_loss)
    loss, accuracy = summary.get("loss"), summary.get("accuracy")
    if summary.get("final") == "none" and run.evaluations:
        # Then the consensus lacks what was not sent: the average of the live models is the model.
        loss, accuracy = run.evaluations[-1]["loss"], run.evaluations[-1]["accuracy"]
    if loss is not None and not math.isfinite(loss):
        loss = accuracy = None
        stopped = DIVERGED
    return Row(
        case.variant,
        case.density,
        case.link,
        case.seed,
        None if reached is None else float(reached["elapsed_s"]),
        None if reached is None else fmean(reached["steps"]),
        None if reached is None else run.payload_at(reached["round"]),
        run.seconds,
        summary.get("rounds"),
        fmean(w.steps for w in workers) if workers else 0.0,
        loss,
        accuracy,
        sum(w.bytes_up for w in workers),
        sum(w.bytes_down for w in workers),
        max(idle, default=None),
        fmean(idle) if idle else None,
        0 if stopped == DIVERGED else sum(not w.finished for w in workers),
        stopped,
        str(run.path),
    )


def ratios(rows: Sequence[Row], base: Sequence[Row], figure: str) -> Spread:
    """The same figure over another variant's, seed by seed; None where one of them has none."""
    others = {row.seed: getattr(row, figure) for row in base}
    values: list[float | None] = []
    for row in rows:
        mine, other = getattr(row, figure), others.get(row.seed)
        values.append(mine / other if mine is not None and other else None)
    return spread(values)


def results_of(rows: Sequence[Row], target_loss: float | None) -> list[dict[str, Any]]:
    """One entry for each link, density and variant, in the order of the rows: every figure with its spread.

    `time_ratio` is the time to the target over the blocking runs', `loss_ratio` the final loss over the overlapped
    runs', both from pairs with the same seed. Without a target the figures to it are null.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: VARIANTS.index(row.variant)):
        groups.setdefault((row.link, row.density, row.variant), []).append(row)
    settings = list(dict.fromkeys((row.link, row.density) for row in rows))
    found = []
    for link, density in settings:
        for variant in VARIANTS:
            own = sorted(groups.get((link, density, variant), []), key=lambda row: row.seed)
            if not own:
                continue
            entry: dict[str, Any] = {"link": link, "density": density, "variant": variant, "runs": len(own)}
            entry["reached"] = None if target_loss is None else sum(r.seconds_to_target is not None for r in own)
            entry["diverged"] = sum(r.stopped == DIVERGED for r in own)
            entry["workers_lost"] = sum(r.lost for r in own)
            for figure in ("seconds_to_target", "steps_to_target", "bytes_to_target"):
                entry[figure] = None if target_loss is None else asdict(spread([getattr(r, figure) for r in own]))
            for figure in ("seconds", "steps", "loss", "accuracy", "bytes_up", "bytes_down", "idle_max", "idle_mean"):
                entry[figure] = asdict(spread([getattr(r, figure) for r in own]))
            entry["bytes"] = asdict(spread([r.bytes_up + r.bytes_down for r in own]))
            blocking = groups.get((link, density, "blocking"), [])
            overlapped = groups.get((link, density, "overlapped"), [])
            timed = target_loss is not None and bool(blocking)
            entry["time_ratio"] = asdict(ratios(own, blocking, "seconds_to_target")) if timed else None
            entry["loss_ratio"] = asdict(ratios(own, overlapped, "loss")) if overlapped else None
            found.append(entry)
    return found


def new_folder(path: Path) -> None:
    """Make the comparison's folder.

    Raises:
        ConfigError: it holds a comparison or a run already, or cannot be written.
    """
    for held, what in (("runs", "a comparison"), ("compare.json", "a comparison"), ("config.toml", "a run")):
        if (path / held).exists():
            raise ConfigError(f"--out {path} holds {what} already: give another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "runs").mkdir()
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror or error}") from None


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a run; what there is not is empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows(["" if v is None else v for v in asdict(row).values()] for row in rows)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
