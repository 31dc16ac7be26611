"""Checkpoints: the run's state in one file, whole or not at all.

A checkpoint is a safetensors file (parameters, statistics, residual) whose metadata hold the rest of the state and
a CRC of every array. It is written beside its final name, synced to disk and renamed, so that a crash leaves the
previous ones untouched; a torn or corrupted file is noticed when it is read, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from loscar_core.errors import ConfigError, LoscarError
from loscar_core.replica import Floats
from loscar_core.saved_state import SavedState, restore

log = logging.getLogger("loscar.server")

_NAME = re.compile(r"state-(\d{6})-(\d{12})\.safetensors")


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: made when missing.
        keep: how many of the newest are kept.

    Raises:
        ConfigError: the folder cannot be written, or another server uses it.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ConfigError(f"keep {keep} checkpoints: at least 1 is needed")
        self.folder = folder
        self.keep = keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"checkpoints in {folder}: {error.strerror or error}") from None
        self._take_lock()
        for part in folder.glob("state-*.part"):  # of a process that was killed while it wrote
            with contextlib.suppress(OSError):
                part.unlink()

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this platform: two servers on one folder are the user's to avoid
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(f"checkpoints in {self.folder}: another server uses this folder") from None

    def close(self) -> None:
        """Let another server have the folder."""
        os.close(self._lock)

    def write(self, state: SavedState) -> Path:
        """Write one checkpoint and drop the older ones beyond `keep`. Blocks on the disk: not for the event loop.

        Raises:
            OSError: the disk is full or gone; the previous checkpoints are untouched.
        """
        replica = state.replica
        arrays = {"vector": replica.vector, "statistics": replica.statistics}
        if state.residual is not None:
            arrays["residual"] = state.residual
        text = json.dumps(state.metadata())
        checksums = {name: _crc(values) for name, values in arrays.items()}
        metadata = {"loscar": text, "crc": json.dumps({**checksums, "metadata": zlib.crc32(text.encode())})}
        # Positions grow with (epoch of the writer, round), so names sort by age.
        path = self.folder / f"state-{state.epoch:06d}-{replica.position.round:012d}.safetensors"
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                file.write(save(arrays, metadata))
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()  # half a file would only keep the disk full
            raise
        self._sync_folder()
        for old in [p for p in self.paths() if p.name < path.name][self.keep - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def _sync_folder(self) -> None:
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def paths(self) -> list[Path]:
        """Whole checkpoints by name, newest first."""
        return sorted((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)

    def newest(self) -> SavedState | None:
        """The newest checkpoint that is intact; damaged ones are said and passed over.

        Its epoch is raised to that of the newest file: whoever goes on from here must not take the number of a
        process whose checkpoint cannot be read.
        """
        paths = self.paths()
        for path in paths:
            try:
                saved = read(path)
            except (LoscarError, OSError) as error:
                log.warning("checkpoint %s is damaged (%s): trying the one before it", path, error)
                continue
            return replace(saved, epoch=max(saved.epoch, _epoch_of(paths[0])))
        return None


def _epoch_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def read(path: Path) -> SavedState:
    """Read and verify one checkpoint.

    Raises:
        ConfigError: it is torn or corrupted.
        MalformedError: it is whole but makes no sense.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            texts = file.metadata() or {}
            checksums = json.loads(texts["crc"])
            metadata = json.loads(texts["loscar"])
            # Copied, since what the library hands out need not be writable.
            arrays: dict[str, Floats] = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
    except KeyError as error:
        raise ConfigError(f"not one of ours: it has no {error}") from None
    except (SafetensorError, ValueError) as error:
        raise ConfigError(f"not a whole checkpoint: {error}") from None
    if checksums != {"metadata": zlib.crc32(texts["loscar"].encode()), **{n: _crc(v) for n, v in arrays.items()}}:
        raise ConfigError("its checksums are wrong")
    if not {"vector", "statistics"} <= arrays.keys():
        raise ConfigError("an array is missing")
    return restore(metadata, arrays["vector"], arrays["statistics"], arrays.get("residual"))


def _crc(values: Floats) -> int:
    return zlib.crc32(np.ascontiguousarray(values).tobytes() if values.size else b"")
