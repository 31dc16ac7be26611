"""`--writer`: hands a run's figures to TensorBoard or Weights & Biases while it goes on.

Both get the same scalars, made from the lines of metrics.jsonl, with the round as their step. A writer that fails, for
a full disk say, is left out from there on with a warning: figures are no reason to end a run.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from loscar_core.errors import ConfigError

log = logging.getLogger("loscar")

OPTION = "--writer"
NAMES = ("tensorboard", "wandb")
"""Also the packages that they need, and the extras that install them."""

_WORKER_FIGURES = (
    *("steps", "loss", "missed", "merged_round", "local_steps", "overlap_steps"),
    *("bytes_up", "bytes_down", "round_trip_s"),
)


class Writer(Protocol):
    """Where figures go."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """What the run is; once, before anything else."""

    def scalars(self, values: Mapping[str, float], round_: int) -> None:
        """Figures by name, at a round."""

    def close(self) -> None:
        """Hand over what is still here; the run is over."""


def check(names: Sequence[str]) -> None:
    """Before anything is begun. Raises ConfigError for a name that is given twice, or a package that is not there."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{OPTION} {name} is given twice")
        try:
            metadata.distribution(name)  # a folder called wandb could be imported too
        except metadata.PackageNotFoundError:
            raise ConfigError(f"{OPTION} {name} needs the {name} package: pip install 'loscar[{name}]'") from None


def open_writers(names: Sequence[str], folder: Path, run: str) -> Writers:
    """Those that were asked for, checked already.

    Args:
        folder: where their files go; made when it is not there.
        run: what they call the run.

    Raises:
        ConfigError: the folder cannot be written, or Weights & Biases cannot begin (no login, say).
    """
    opened: dict[str, Writer] = {}
    try:
        for name in names:
            folder.mkdir(parents=True, exist_ok=True)
            opened[name] = TensorBoard(folder) if name == "tensorboard" else WeightsAndBiases(folder, run)
    except OSError as error:
        raise ConfigError(f"{OPTION}: {folder} cannot be written: {error.strerror or error}") from None
    return Writers(opened)


class Writers:
    """Several of them as one, and what they are told.

    Args:
        writers: by name; may be none.
    """

    def __init__(self, writers: Mapping[str, Writer]) -> None:
        self._writers = dict(writers)
        self._round = 0

    def settings(self, values: Mapping[str, Any]) -> None:
        """The run's options."""
        self._each(lambda writer: writer.settings(values))

    def record(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._round = record["round"]
        self._write(scalars_of(record), self._round)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """A line of evaluations.jsonl."""
        self._write({f"evaluation/{name}": line[name] for name in ("loss", "accuracy")}, line["round"])

    def result(self, summary: Mapping[str, Any]) -> None:
        """The summary: the saved model's loss and accuracy."""
        self._write({f"result/{name}": summary[name] for name in ("loss", "accuracy")}, self._round)

    def close(self) -> None:
        self._each(lambda writer: writer.close())
        self._writers.clear()

    def __bool__(self) -> bool:
        return bool(self._writers)

    def _write(self, values: Mapping[str, float | None], round_: int) -> None:
        known = {name: float(value) for name, value in values.items() if value is not None}
        self._each(lambda writer: writer.scalars(known, round_))

    def _each(self, tell: Callable[[Writer], None]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                tell(writer)
            except Exception as error:  # theirs may raise anything
                del self._writers[name]
                log.warning("%s %s: %s; the run goes on without it", OPTION, name, _line(error))


def scalars_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """A line of metrics.jsonl as scalars: `run/…` of the run, and FIGURE/NAME of each worker."""
    found: dict[str, float | None] = {
        f"run/{name}": record[name] for name in ("elapsed_s", "epoch", "bytes_in", "bytes_out")
    }
    workers = record["workers"]
    losses = [w["loss"] for w in workers if w["loss"] is not None]
    found["run/workers"] = len(workers)
    found["run/loss"] = sum(losses) / len(losses) if losses else None
    for worker in workers:
        name = worker["name"]
        found |= {f"{figure}/{name}": worker[figure] for figure in _WORKER_FIGURES}
        found[f"idle_share/{name}"] = worker["idle_s"] / worker["run_s"] if worker["run_s"] else None
    return found | {f"departures/{reason}": count for reason, count in record["departures"].items()}


# --- the two ------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in FOLDER/tensorboard, for `tensorboard --logdir FOLDER`; nothing leaves this machine."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._file = EventFileWriter(str(folder / "tensorboard"))

    def settings(self, values: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.plugins.text.metadata import create_summary_metadata

        table = ["| option | value |", "|---|---|", *(f"| {name} | {values[name]} |" for name in values)]
        value = self._summary.Value(
            tag="settings",
            metadata=create_summary_metadata("settings", "The options of the run."),
            tensor=TensorProto(dtype="DT_STRING", string_val=["\n".join(table).encode()]),
        )
        self._add([value], 0)

    def scalars(self, values: Mapping[str, float], round_: int) -> None:
        self._add([self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()], round_)

    def close(self) -> None:
        self._file.close()

    def _add(self, values: list[Any], round_: int) -> None:
        self._file.add_event(self._event(wall_time=time.time(), step=round_, summary=self._summary(value=values)))


class WeightsAndBiases:
    """A run of Weights & Biases.

    Its own WANDB_… variables say where to; WANDB_MODE=offline keeps it on this machine.
    """

    def __init__(self, folder: Path, run: str) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "loscar",
                name=os.environ.get("WANDB_NAME") or run,
                dir=str(folder),
                # It would capture the table of the run, and send the command line, which may hold a token.
                settings=wandb.Settings(console="off", x_disable_meta=True),
            )
        except wandb.Error as error:
            raise ConfigError(f"{OPTION} wandb cannot begin: {_line(error)}") from None
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def settings(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values))

    def scalars(self, values: Mapping[str, float], round_: int) -> None:
        self._run.log({"round": round_, **values})

    def close(self) -> None:
        self._run.finish()


def _line(error: Exception) -> str:
    """What an exception says, in one line."""
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
