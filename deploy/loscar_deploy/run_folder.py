"""The run folder: config.toml, metrics.jsonl, model.safetensors, summary.json, and each process's log."""

from __future__ import annotations

import contextlib
import json
import time
import tomllib
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from loscar_core.config import RunConfig
from loscar_core.errors import ConfigError, SystemRefusedError
from loscar_core.methods import parse_method
from loscar_deploy.run_data import json_lines
from loscar_deploy.strict_json import dumps
from loscar_wire._generated import parameter_server_pb2 as pb

RUNS = Path("runs")
NOT_SAVED = ("handler", "exit_with_parent", "log_level", "json")


class RunFolder:
    """One run's folder.

    Args:
        path: where; None makes a new one under ./runs, named by the time.

    Raises:
        ConfigError: the folder holds a run already, or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        try:
            self.path = path if path is not None else _fresh()
            self.path.mkdir(parents=True, exist_ok=True)
            if self.summary.exists() or self.config.exists():
                raise ConfigError(f"--out {self.path} holds a run already: give another folder")
            (self.path / "logs").mkdir(exist_ok=True)
            (self.path / "workers").mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {path or RUNS} cannot be written: {error.strerror or error}") from None

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    def worker_slots(self, name: str) -> Path:
        return self.path / "workers" / f"{name}.slots"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def worker_result(self, name: str) -> Path:
        return self.path / "workers" / f"{name}.json"

    def worker_model(self, name: str) -> Path:
        return self.path / "workers" / f"{name}.safetensors"

    def worker_rounds(self, name: str) -> Path:
        return self.path / "workers" / f"{name}.rounds.jsonl"

    def write_options(self, args: Namespace) -> None:
        """Options as they were given or defaulted; those that are not set are left out (TOML has no null)."""
        known = {k: v for k, v in vars(args).items() if v is not None and k not in NOT_SAVED}
        texts = {k: str(v) if isinstance(v, Path) else v for k, v in known.items()}
        with _naming(self.config):
            self.config.write_text(tomli_w.dumps(texts), encoding="utf-8")

    def options(self) -> dict[str, Any]:
        """What `write_options` has written."""
        return tomllib.loads(self.config.read_text(encoding="utf-8"))

    def read_evaluations(self) -> list[dict[str, Any]]:
        """What the evaluator has found so far; a line that is being written is left for later."""
        try:
            lines = self.evaluations.read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def append_evaluation(self, line: dict[str, Any]) -> None:
        with _naming(self.evaluations), self.evaluations.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        with _naming(self.summary):
            self.summary.write_text(dumps(summary, indent=2) + "\n", encoding="utf-8")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One line of what `metrics_of` gives."""
        with _naming(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(dumps(record) + "\n")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A failed write says of itself which file it was: the system does not. Raises SystemRefusedError."""
    try:
        yield
    except OSError as error:
        raise SystemRefusedError(f"{path} cannot be written: {error.strerror or error}") from None


def metrics_of(reply: pb.StatusReply) -> dict[str, Any]:
    """A line of metrics.jsonl for a server status: what each worker had done by then.

    Its fields are described by schemas/metrics.schema.json.
    """
    return {
        "elapsed_s": round(reply.elapsed_s, 3),
        "epoch": reply.epoch,
        "round": reply.round,
        "bytes_in": reply.bytes_in,
        "bytes_out": reply.bytes_out,
        "workers": [
            {
                "name": m.name,
                "slot": m.slot,
                "state": m.state,
                "steps": m.report.steps,
                "loss": m.report.loss if m.report.HasField("loss") else None,
                "idle_s": round(m.report.idle_s, 4),
                "run_s": round(m.report.run_s, 4),
                "merged_round": m.merged_round,
                "missed": m.missed,
                "local_steps": m.local_steps,
                "overlap_steps": m.overlap_steps,
                "bytes_up": m.report.bytes_up,
                "bytes_down": m.report.bytes_down,
                "round_trip_s": round(m.report.round_trip_s, 6) if m.report.HasField("round_trip_s") else None,
            }
            for m in reply.members
            if not m.observer
        ],
        "departures": dict(Counter(d.reason for d in reply.departures)),
    }


def distances_of(rounds: Iterable[Path]) -> list[tuple[int, float]]:
    """(round, distance) of all merges in workers' round logs; files that are not there have none."""
    records = (record for path in rounds for record in json_lines(path, {"round"}))
    return [(r["round"], r["distance"]) for r in records if r.get("distance") is not None]


def settings_of(config: RunConfig, workers: int) -> dict[str, Any]:
    """What a summary says of a run's settings."""
    method = parse_method(config.method)
    return {
        "method": method.name,
        "merge": config.merge.value if method.uses_merge else None,
        "workers": workers,
        "density": config.density,
        "selection": config.selection.value,
        "overlap_steps": config.overlap_steps if config.overlap_steps is not None else "auto",
        "local_steps": config.local_steps if config.local_steps is not None else "auto",
        "wire_dtype": config.value_type.value,
        "seed": config.seed,
    }


def valley_width(distances: Sequence[tuple[int, float]]) -> dict[str, float]:
    """The summary's entry of a method that holds workers at a distance: the mean distance to the average just after the
    merge, over all workers and the last fifth of the rounds.

    Args:
        distances: (round, distance) of all merges that had one; without any the entry is left out.
    """
    last = max((round_ for round_, _ in distances), default=0)
    late = [distance for round_, distance in distances if round_ > 0.8 * last]
    return {"valley_width": sum(late) / len(late)} if late else {}


def method_options(config: RunConfig) -> dict[str, Any]:
    """The method's options and their values, those that were left out too."""
    return {k: getattr(v, "value", v) for k, v in parse_method(config.method).settings().items()}


def _fresh() -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        path = RUNS / f"{stamp}{suffix}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)  # at once: another run may begin in the same second
            return path
    raise ConfigError(f"there are a hundred runs of {stamp} under {RUNS} already")
