"""Tasks for the widths that DPPF holds: a network whose learning rate decays, and a quadratic valley."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from loscar_worker.tasks import load_task
from loscar_worker.tasks.base import ArrayDataset, Batch, Evaluation, Task

DECAY_STEPS = int(os.environ.get("VALLEY_DECAY_STEPS", "0"))
CURVATURE = float(os.environ.get("VALLEY_CURVATURE", "1"))


class Decaying(torch.optim.SGD):
    """SGD whose learning rate falls linearly to 0 within DECAY_STEPS steps, where that is not 0."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self._lr, self._steps = lr, 0

    def step(self, closure: Any = None) -> Any:
        if DECAY_STEPS:
            self.param_groups[0]["lr"] = self._lr * max(0.0, 1.0 - self._steps / DECAY_STEPS)
        self._steps += 1
        return super().step(closure)


def digits() -> Task:
    """The digits, with that optimizer."""
    task = load_task("digits")
    task.make_optimizer = lambda model: Decaying(model.parameters(), task.lr)  # type: ignore[method-assign]
    return task


class Place(nn.Module):
    """A point; its value at a sample s is h/2 ‖x‖² + s·x."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(dimension))

    def forward(self, samples: Tensor) -> Tensor:
        return 0.5 * CURVATURE * self.x.square().sum() + samples @ self.x


class Quadratic(Task):
    """A valley of one curvature, with a little noise: without any the workers would have no direction to part in."""

    dimension = 200

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        samples = 1e-3 * torch.randn(512, self.dimension, generator=generator)
        data = ArrayDataset(samples, torch.zeros(512))
        super().__init__("quadratic", data, data, batch_size=8, lr=0.05)

    def build_model(self) -> nn.Module:
        return Place(self.dimension)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Evaluation:
        return Evaluation(float(model(self.test.inputs).mean()), 0.0)
