"""The optimizer steps of a built-in task, as the run's method takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from loscar_core.methods import Method
from loscar_core.methods.mixvr import MixVr
from loscar_worker.boundary import TrainingHalf
from loscar_worker.mixvr import MixVrOptimizer
from loscar_worker.tasks.base import Task
from loscar_worker.tasks.partition import Batches


class Trainer:
    """Takes a task's optimizer steps; the session's companion.

    Args:
        batches: makes the samples' order once the slot is known, at the session's begin.

    Attributes:
        optimizer: the task's own, or the method's.
        vectors: what the method averages beside the model.
        batches: where samples come from, from the session's begin on.
    """

    batches: Batches

    def __init__(
        self, task: Task, model: nn.Module, method: Method, batches: Callable[[TrainingHalf], Batches]
    ) -> None:
        self._task = task
        self._model = model
        self._make_batches = batches
        self._mixvr: MixVrOptimizer | None = None
        self.optimizer: torch.optim.Optimizer
        self.vectors: Mapping[str, Tensor] = {}
        if isinstance(method, MixVr):
            self._mixvr = MixVrOptimizer(model, lr=task.lr, method=method, minibatch=self._loss)
            self.optimizer, self.vectors = self._mixvr, self._mixvr.vectors
        else:
            self.optimizer = task.make_optimizer(model)

    def step(self) -> Tensor:
        """One step; returns its loss, which may still be on its way from a GPU."""
        if self._mixvr is not None:
            return self._mixvr.take_step(self._loss())
        loss = self._loss()()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _loss(self) -> Callable[[], Tensor]:
        """The loss of the next samples, as a function of the model."""
        return partial(self._task.loss, self._model, next(self.batches))

    # --- around averages ------------------------------------------------------------------------------------

    def begin(self, half: TrainingHalf) -> None:
        self.batches = self._make_batches(half)
        if self._mixvr is not None:
            self._mixvr.begin(half)

    def before_snapshot(self, dependent: bool) -> None:
        if self._mixvr is not None:
            self._mixvr.before_snapshot(dependent)

    def before_merge(self, dependent: bool) -> None:
        if self._mixvr is not None:
            self._mixvr.before_merge(dependent)

    def replaced(self) -> None:
        if self._mixvr is not None:
            self._mixvr.replaced()

    def after_merge(self, dependent: bool) -> None:
        if self._mixvr is not None:
            self._mixvr.after_merge(dependent)
