"""A worker's state in a file: the session's half of the run, the optimizer and the position in the data."""

from __future__ import annotations

import json
import logging
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from loscar_core.errors import ConfigError
from loscar_core.state import INCARNATION_BYTES
from loscar_core.worker_state import resumed_as
from loscar_worker.session import Session
from loscar_worker.tasks.partition import Batches

log = logging.getLogger("loscar.worker")


class StateSaver:
    """Writes a worker's state now and then, whole or not at all."""

    def __init__(
        self,
        path: Path | None,
        every_s: float,
        session: Session,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
    ) -> None:
        self._path = path
        self._every_s = every_s
        self._session = session
        self._optimizer = optimizer
        self._batches = batches
        self._saved_at = time.monotonic()

    def save_if_due(self) -> None:
        if self._path is not None and time.monotonic() - self._saved_at >= self._every_s:
            self.save()

    def save(self) -> None:
        """Save now; between two steps only."""
        if self._path is None:
            return
        state = {
            "session": self._session.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "batches": self._batches.state_dict(),
        }
        try:
            write_state(self._path, state)
        except OSError as error:
            log.error("--state %s cannot be written: %s; what was saved before is untouched", self._path, error)
        self._saved_at = time.monotonic()


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a worker's state; whole or not at all. Raises OSError."""
    part = path.with_suffix(path.suffix + ".part")
    with part.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own writer does not raise OSError
            raise OSError(str(error)) from None
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def note_resumption(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Write down who resumes from a state, before that is done; see `loscar_core.worker_state.resumed_as`. Raises
    OSError."""
    incarnation, session = os.urandom(INCARNATION_BYTES), saved["session"]

    def noted_in(half: dict[str, Any]) -> dict[str, Any]:
        return {**half, "worker": json.dumps(resumed_as(json.loads(half["worker"]), incarnation))}

    noted = {**saved, "session": {**noted_in(session), "further": [noted_in(h) for h in session.get("further", ())]}}
    write_state(path, noted)
    return noted


def load_state(path: Path | None) -> dict[str, Any] | None:
    """Raises ConfigError for a file that is no worker's state."""
    if path is None or not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as file:  # torch itself does not look at the checksums that it writes
            state: object = None if file.testzip() else torch.load(path, weights_only=True)
    except OSError as error:
        raise ConfigError(f"--state {path} cannot be read: {error.strerror or error}") from None
    except Exception:  # torch raises whatever comes, index errors too, for a file that is not one of its own
        state = None
    if isinstance(state, dict) and {"session", "optimizer", "batches"} <= state.keys():
        return state
    raise ConfigError(f"--state {path} is no worker's state, or damaged: without it, a new worker joins")
