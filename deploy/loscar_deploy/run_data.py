"""Reads run folders back: options, summary, evaluations, the workers' rounds, and what follows from them."""

from __future__ import annotations

import json
import math
import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from loscar_core.errors import ConfigError, DataMissingError
from loscar_deploy.options import number

NO_RUN_FOLDER = "give the folder that `loscar run` or `loscar simulate --out` has written"

TEST_LOSS = "test loss of the live models' average"
TRAINING_LOSS = "training loss (mean over workers)"

_ROUND_FIELDS = {
    *("round", "kind", "steps", "local_steps", "overlap_steps", "snapshot_s", "answered_s", "merged_s", "waits"),
    *("bytes_up", "bytes_down"),
}
_EVALUATION_FIELDS = {"round", "elapsed_s", "steps", "loss", "accuracy"}
_METRIC_FIELDS = {"elapsed_s", "round", "workers"}


@dataclass(frozen=True, slots=True)
class Curve:
    """How the loss fell; all lists have one entry per point.

    Attributes:
        what: which loss it is.
        seconds: run time.
        steps: optimizer steps, mean over the workers.
        bytes: payload of all workers in both directions so far.
        loss: finite values only.
    """

    what: str
    seconds: list[float]
    steps: list[float]
    bytes: list[float]
    loss: list[float]


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """One worker's course in figures; None where the folder does not say.

    Attributes:
        name: as in the folder.
        steps: optimizer steps; of a worker that died and came back, in all its lives, and so its bytes.
        rounds: merged rounds that it had contributed to, the final one apart.
        steps_per_round: median over them of the steps from one merge to the next, N + Q.
        local_steps, overlap_steps: medians of N and Q over them; Q is the staleness of what was merged.
        most_stale: largest Q.
        idle_fraction: share of its run time in which the training thread waited for the service.
        missed: rounds that were closed without it.
        bytes_up, bytes_down: payload.
        finished: it saw the run's end.
    """

    name: str
    steps: int
    rounds: int
    steps_per_round: float | None
    local_steps: float | None
    overlap_steps: float | None
    most_stale: int | None
    idle_fraction: float | None
    missed: int | None
    bytes_up: int
    bytes_down: int
    finished: bool


@dataclass
class RunData:
    """One run folder, read.

    Attributes:
        path: the folder.
        label: what pictures and tables call it.
        config: the options.
        target_loss: --target-loss, None without.
        summary: None for a run that did not end in order.
        evaluations: lines of evaluations.jsonl.
        metrics: lines of metrics.jsonl.
        rounds: lines of each worker's rounds, by worker, in the order of slots.
        results: what each worker that got to its end wrote down.
    """

    path: Path
    label: str
    config: dict[str, Any]
    summary: dict[str, Any] | None
    evaluations: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    rounds: dict[str, list[dict[str, Any]]]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    target_loss: float | None = None

    @property
    def simulated(self) -> bool:
        """Its times are virtual."""
        return "churn" in self.config or (self.summary is not None and "virtual_seconds" in self.summary)

    @property
    def seconds(self) -> float:
        """Run time at its end, or as far as it is known."""
        if self.summary is not None:
            return float(self.summary.get("wall_seconds", self.summary.get("virtual_seconds", 0.0)))
        last = [lines[-1]["merged_s"] for lines in self.rounds.values() if lines]
        return float(max([*last, *(line["elapsed_s"] for line in self.metrics[-1:])], default=0.0))

    def payload_at(self, round_: int) -> int:
        """Bytes of all workers in both directions when they had merged a round."""
        total = 0
        for lines in self.rounds.values():
            place = bisect_right(lines, round_, key=lambda line: line["round"])
            if place:
                total += lines[place - 1]["bytes_up"] + lines[place - 1]["bytes_down"]
        return total

    def curve(self) -> Curve | None:
        """The loss on the test data where the run was evaluated along the way, else the training loss."""
        if self.evaluations:
            points = [
                (e["elapsed_s"], _mean(e["steps"]), float(self.payload_at(e["round"])), e["loss"])
                for e in self.evaluations
            ]
            return _curve(TEST_LOSS, points)
        points = []
        for line in self.metrics:
            workers = [w for w in line["workers"] if w["loss"] is not None]
            if workers:
                sent = float(sum(w["bytes_up"] + w["bytes_down"] for w in line["workers"]))
                steps = _mean([w["steps"] for w in line["workers"]])
                points.append((line["elapsed_s"], steps, sent, _mean([w["loss"] for w in workers])))
        return _curve(TRAINING_LOSS, points)

    def reached(self, target_loss: float) -> dict[str, Any] | None:
        """The first evaluation at or below a target."""
        return next((e for e in self.evaluations if e["loss"] <= target_loss), None)

    def own_rounds(self, worker: str) -> list[dict[str, Any]]:
        """A worker's rounds that it had taken a snapshot for, the final one apart."""
        return [r for r in self.rounds[worker] if r["snapshot_s"] is not None and r["kind"] != "final"]

    def workers(self) -> list[WorkerFigures]:
        """Each worker's figures, by slot."""
        told = {w["name"]: w for line in self.metrics for w in line["workers"]}
        return [self._figures(name, told.get(name, {})) for name in self.rounds]

    def _figures(self, name: str, told: dict[str, Any]) -> WorkerFigures:
        own = self.own_rounds(name)
        result = self.results.get(name, {})
        last = self.rounds[name][-1] if self.rounds[name] else {}
        idle = result.get("idle_fraction")
        if idle is None and told.get("idle_s") is not None and self.seconds > 0:
            idle = told["idle_s"] / self.seconds
        return WorkerFigures(
            name,
            max(source.get("steps", 0) for source in (result, last, told)),
            len(own),
            median(r["local_steps"] + r["overlap_steps"] for r in own) if own else None,
            median(r["local_steps"] for r in own) if own else None,
            median(r["overlap_steps"] for r in own) if own else None,
            max((r["overlap_steps"] for r in own), default=None),
            idle,
            told.get("missed"),
            max(source.get("bytes_up", 0) for source in (result, last)),
            max(source.get("bytes_down", 0) for source in (result, last)),
            bool(result.get("finished", False)),
        )


def load_run(path: Path, label: str | None = None) -> RunData:
    """Read a run folder; files that a run which ended early did not write may be missing.

    Raises:
        DataMissingError: it is no run folder.
        ConfigError: a file in it cannot be read.
    """
    config = path / "config.toml"
    if not config.is_file() and (path / "runs").is_dir():
        raise DataMissingError(f"{path} holds several runs: give some of {path / 'runs'}, one by one")
    if not config.is_file():
        raise DataMissingError(f"{path} is no run folder: it has no config.toml").with_hint(NO_RUN_FOLDER)
    try:
        options = tomllib.loads(config.read_text(encoding="utf-8"))
        target_loss = number("target_loss", str(options["target_loss"])) if "target_loss" in options else None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{config} cannot be read: {error}") from None
    summary = path / "summary.json"
    metrics = json_lines(path / "metrics.jsonl", _METRIC_FIELDS)
    names = {p.name.removesuffix(".rounds.jsonl") for p in (path / "workers").glob("*.rounds.jsonl")}
    names |= {w["name"] for line in metrics for w in line["workers"]}
    ordered = sorted(names, key=_natural)
    return RunData(
        path,
        label or path.resolve().name,
        options,
        _object(summary) if summary.is_file() else None,
        json_lines(path / "evaluations.jsonl", _EVALUATION_FIELDS),
        metrics,
        {name: _all_lives(json_lines(path / "workers" / f"{name}.rounds.jsonl", _ROUND_FIELDS)) for name in ordered},
        {n: _object(file) for n in ordered if (file := path / "workers" / f"{n}.json").is_file()},
        target_loss,
    )


def load_runs(paths: Sequence[Path]) -> list[RunData]:
    """Several run folders, each with a label of its own: the name, and what is above it where names are equal."""
    labels = [p.resolve().name for p in paths]
    for depth in range(2, 5):
        if len(set(labels)) == len(labels):
            break
        labels = ["/".join(p.resolve().parts[-depth:]) for p in paths]
    if len(set(labels)) < len(labels):
        raise ConfigError("a run folder is given twice")
    return [load_run(path, label) for path, label in zip(paths, labels, strict=True)]


def _all_lives(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A worker that dies and comes back counts from 0 again: add what it had before, so that the counts only grow.

    The first round of a new life says so with `reborn`.
    """
    before = dict.fromkeys(("steps", "bytes_up", "bytes_down"), 0)
    last = dict(before)
    found = []
    for line in rounds:
        reborn = any(line[key] < last[key] for key in last)
        if reborn:
            # Steps go on where the worker has kept its state; bytes are its process's.
            new = [key for key in last if key != "steps" or line[key] < last[key]]
            before |= {key: before[key] + last[key] for key in new}
        last = {key: line[key] for key in last}
        found.append({**line, **{key: before[key] + line[key] for key in last}, "reborn": reborn})
    return found


def json_lines(path: Path, fields: set[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line without its end is one that was being written."""
    if not path.is_file():
        return []
    found = []
    for place, text in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict):
            raise ConfigError(f"{path} cannot be read: line {place} is no JSON object")
        missing = sorted(fields - line.keys())
        if missing:
            raise ConfigError(f"{path} cannot be read: line {place} has no {missing[0]}")
        found.append(line)
    return found


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} cannot be read: it is no JSON object")
    return value


def _curve(what: str, points: Iterable[tuple[float, float, float, float]]) -> Curve | None:
    finite = [p for p in points if p[3] is not None and math.isfinite(p[3])]
    if not finite:
        return None
    seconds, steps, sent, loss = (list(column) for column in zip(*finite, strict=True))
    return Curve(what, seconds, steps, sent, loss)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _natural(name: str) -> list[tuple[int, int | str]]:
    """w2 before w10."""
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in re.split(r"(\d+)", name) if piece]
