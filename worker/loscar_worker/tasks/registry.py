"""From the text after `--task` to a `Task`: a built-in name, or `package.module:factory` for a user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from loscar_core.errors import LoscarError, UnknownTaskError
from loscar_worker.tasks.base import Task

# Module and factory by name, imported on use: most tasks need libraries that the others do not.
_BUILT_IN = {
    "a9a": "loscar_worker.tasks.a9a:A9a",
    "charlm": "loscar_worker.tasks.charlm:CharLm",
    "cifar10": "loscar_worker.tasks.cifar10:Cifar10",
    "cifar10-resnet18": "loscar_worker.tasks.cifar10:cifar10_resnet18",
    "digits": "loscar_worker.tasks.digits:Digits",
    "mnist": "loscar_worker.tasks.mnist:Mnist",
    "tiny-imagenet": "loscar_worker.tasks.tiny_imagenet:TinyImageNet",
}


def task_names() -> tuple[str, ...]:
    """The built-in tasks' names in alphabetical order."""
    return tuple(_BUILT_IN)


def load_task(
    spec: str,
    data_dir: Path | str | None = None,
    download: bool = False,
    batch_size: int | None = None,
    lr: float | None = None,
) -> Task:
    """Make the task that `spec` names, with its data in memory.

    spec: a built-in name, or "package.module:factory" with a callable that returns a `Task`; modules in the
    working directory are found first. A factory is called with those of the keywords data_dir (Path or None),
    download, batch_size and lr that it accepts; the last two are set on its task in any case. data_dir: the
    folder of all data sets; None means $LOSCAR_DATA_DIR, else ./.data. download: fetch the built-in task's
    missing files first. batch_size, lr: None keeps the task's own.

    Raises UnknownTaskError where the name is unknown, the import or the factory fails or returns something
    else; DataMissingError for missing files; ConfigError for malformed ones and for bad hyper-parameters.
    """
    folder = None if data_dir is None else Path(data_dir)
    if ":" in spec:
        factory = _import_factory(spec, from_working_directory=True)
    elif spec in _BUILT_IN:
        factory = _import_factory(_BUILT_IN[spec], from_working_directory=False)
        if download:
            from loscar_worker.tasks.download import download_task

            download_task(spec, folder)
    else:
        close = difflib.get_close_matches(spec, _BUILT_IN, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UnknownTaskError(
            f"there is no task {spec!r}: the built-in ones are {', '.join(_BUILT_IN)}, "
            f"your own are package.module:factory{hint}"
        )
    offered = {"data_dir": folder, "download": download, "batch_size": batch_size, "lr": lr}
    try:
        task = factory(**{key: value for key, value in offered.items() if key in _accepted(factory, offered)})
    except LoscarError:
        raise
    except Exception as error:
        if spec in _BUILT_IN:
            raise
        raise UnknownTaskError(f"task {spec}: its factory failed: {_one_line(error)}") from error
    if not isinstance(task, Task):
        raise UnknownTaskError(
            f"task {spec}: its factory returned {type(task).__name__}, not a loscar_worker.tasks.Task"
        )
    task.configure(batch_size=batch_size, lr=lr)
    return task


def _import_factory(spec: str, *, from_working_directory: bool) -> Callable[..., object]:
    module_name, _, attribute = spec.partition(":")
    if not attribute or not all(piece.isidentifier() for piece in module_name.split(".")):
        raise UnknownTaskError(f"task {spec!r} is not of the form package.module:factory")
    if from_working_directory:
        here = os.getcwd()
        # Kept for good: the module may import its neighbours later, from within a function.
        if here not in sys.path and "" not in sys.path:
            sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        found: object = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as error:
        raise UnknownTaskError(f"task {spec} cannot be imported: {_one_line(error)}") from error
    if not callable(found):
        raise UnknownTaskError(f"task {spec}: {attribute} is not callable")
    return found


def _accepted(factory: Callable[..., object], offered: Iterable[str]) -> set[str]:
    """Which of the offered keywords `factory` takes; all, where it takes any."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return set()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return set(offered)
    return {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
