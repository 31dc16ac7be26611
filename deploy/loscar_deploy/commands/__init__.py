"""The commands of `loscar`, by group: what each declares on the command line, and what it does.

Each module has a `declare(command)` that the parser calls. Commands import what they need when they run, so that
`loscar --help` answers at once and needs no torch.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from loscar_core.errors import ConfigError
from loscar_deploy.strict_json import dumps

Handler = Callable[[Namespace], int]
"""Does a command's work; returns its exit code."""

Declare = Callable[[str, Handler, str], ArgumentParser]
"""Adds a command by its name, handler and one line of help; returns the parser for its options."""


def print_json(value: Any) -> None:
    print(dumps(value), flush=True)


def quiet_grpc() -> None:
    """For clients, before grpc is imported: its own log only repeats what their errors say, for every attempt."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def require_torch() -> None:
    """Raises ConfigError saying what to install."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ConfigError("this command needs PyTorch: pip install 'loscar[worker]'")


def download(args: Namespace) -> None:
    """Fetch the task's data where they are missing."""
    from loscar_worker.tasks.download import download_task

    download_task(args.task, args.data_dir)
