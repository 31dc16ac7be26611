"""A callback for the Hugging Face `Trainer`: `train()` as one worker of a run. Needs `loscar[huggingface]`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from loscar_core.errors import ConfigError
from loscar_worker.joining import join
from loscar_worker.session import Session
from loscar_worker.state_file import write_state

log = logging.getLogger("loscar.worker")

STATE_FILE = "loscar.pt"
"""This worker's half of the run, in each checkpoint folder."""


class LoscarCallback(TrainerCallback):
    """Joins a run when training begins, and stops the trainer when the run is over.

    Use it as a context manager around `train()`: the trainer tells its callbacks of no exception, and leaving the
    block by one closes the session and tells the server why. Without the block, a session that an exception left
    open is closed by the next `train()` or at the end of the process.

    The trainer's checkpoints get a file `loscar.pt`, so that `train(resume_from_checkpoint=True)` comes back as the
    worker that saved it.

    Args:
        servers: as for `join`.
        options: the further arguments of `join`. A `state` there counts for the first `train()`, before a file.

    Attributes:
        session: the session of the newest `train()`; None before the first.

    Raises:
        ConfigError: by `train()`, when the trainer has several processes: each process is a worker of its own.
        LoscarError: by `train()`, as `join` and `Session.step`.
        OSError: by `train()`, when `loscar.pt` cannot be written.
    """

    def __init__(self, servers: str | Sequence[str], **options: Any) -> None:
        self.session: Session | None = None
        self._servers = servers
        self._state: Mapping[str, Any] | None = options.pop("state", None)
        self._options = options

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.session is not None:
            self.session.__exit__(kind, error, at)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            raise ConfigError(f"a trainer of {args.world_size} processes cannot join: one process is one worker")
        if self.session is not None:
            self.session.close()
        saved, self._state = self._state, None
        file = _checkpoint(args, state) / STATE_FILE
        if saved is None and state.global_step and file.exists():
            saved = torch.load(file, weights_only=True)
        elif saved is None and state.global_step:
            log.warning("%s is not there: this worker joins as a new one", file)
        model: nn.Module = kwargs["model"]
        self.session = join(self._servers, model, state=saved, **self._options)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.session is not None
        self.session.step()
        if self.session.finished:
            control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs.get("logs", {}).get("loss")
        if loss is not None and self.session is not None:
            self.session.note_loss(float(loss))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.session is not None and not self.session.finished:
            write_state(_checkpoint(args, state) / STATE_FILE, self.session.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session is not None:
            self.session.close()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that the trainer saves to, or has resumed from, at this step."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


__all__ = ["LoscarCallback"]
