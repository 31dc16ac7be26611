"""Where the tasks' data files lie, what is said when they do not, and the progress bar shared by slow
readers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from loscar_core.errors import ConfigError, DataMissingError

DATA_DIR_VARIABLE = "LOSCAR_DATA_DIR"
DEFAULT_DATA_DIR = Path(".data")


def resolve_data_dir(data_dir: Path | str | None) -> Path:
    """The folder that holds all data sets: the argument, else $LOSCAR_DATA_DIR, else ./.data; absolute."""
    if data_dir is None:
        data_dir = os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR
    return Path(data_dir).expanduser().absolute()


def missing(task: str, path: Path, what: str, source: str) -> DataMissingError:
    """The error for a file that is not there: says which file to put where, and where it comes from.

    task: the task's name; path: the absolute path looked at; what: what the file is; source: a URL.
    """
    return DataMissingError(f"task {task}: {path} is missing; put {what} there (from {source})")


def require_file(task: str, path: Path, what: str, source: str) -> Path:
    """`path` if it is a file. Raises DataMissingError with what to put there otherwise."""
    if not path.is_file():
        raise missing(task, path, what, source)
    return path


def corrupt(path: Path, reason: str) -> ConfigError:
    """The error for a file that is there but is not what it should be."""
    return ConfigError(f"{path}: {reason}; remove it and fetch it again, for example with --download")


def read_bytes(path: Path) -> bytes:
    """The whole file. Raises ConfigError with the system's reason where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def progress(description: str, total: int | None, *, is_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on the error stream, shown only on a terminal and gone when done.

    total: number of steps or bytes, None where unknown. Yields a function to call with the steps just done.
    """
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    columns += [DownloadColumn(), TransferSpeedColumn()] if is_bytes else [MofNCompleteColumn()]
    columns.append(TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        handle = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(handle, steps)
