"""A Lightning callback: one process's `Trainer.fit` as one worker of a run. Needs `loscar[lightning]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from loscar_core.errors import ConfigError
from loscar_worker.joining import join
from loscar_worker.session import Session


class LoscarCallback(Callback):
    """Joins a run when training starts, and stops the trainer when the run is over.

    The whole LightningModule is averaged; Lightning's checkpoints hold this worker's half of the run, so that
    `Trainer.fit(ckpt_path=…)` comes back as the worker that saved it.

    Args:
        servers: as for `join`.
        options: the further arguments of `join`. A `state` there counts for the first `fit` without a checkpoint.

    Attributes:
        session: the session of the newest `fit`; None before the first.

    Raises:
        ConfigError: by `fit`, when the trainer has several processes: each process is a worker of its own.
        LoscarError: by `fit`, as `join` and `Session.step`.
    """

    def __init__(self, servers: str | Sequence[str], **options: Any) -> None:
        self.session: Session | None = None
        self._servers = servers
        self._state: Mapping[str, Any] | None = options.pop("state", None)
        self._options = options
        self._optimizer_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ConfigError(f"a trainer of {trainer.world_size} processes cannot join: one process is one worker")
        state, self._state = self._state, None
        self.session = join(self._servers, pl_module, state=state, **self._options)
        self._optimizer_steps = trainer.global_step
        trainer.should_stop = trainer.should_stop or self.session.finished

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.session is not None
        if trainer.global_step == self._optimizer_steps:  # gradients are being accumulated
            return
        self._optimizer_steps = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        # Lightning has divided it for the accumulation.
        self.session.step(loss=loss * trainer.accumulate_grad_batches if isinstance(loss, Tensor) else None)
        if self.session.finished:
            trainer.should_stop = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.session is not None:
            self.session.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.session is not None:
            self.session.close()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint; empty when there is nothing to come back to."""
        return {} if self.session is None or self.session.finished else self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None


__all__ = ["LoscarCallback"]
