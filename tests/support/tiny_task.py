"""Tasks that start fast: made-up data, and an optimizer that does not import torch's compiler."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loscar_worker.tasks.base import ArrayDataset, Evaluation, Task


class PlainSgd:
    """p ← p − lr · gradient, and nothing else."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        self._parameters = parameters
        self._lr = lr

    @torch.no_grad()
    def step(self) -> None:
        for p in self._parameters:
            if p.grad is not None:
                p -= self._lr * p.grad

    def zero_grad(self) -> None:
        for p in self._parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


class Tiny(Task):
    """Three classes in twelve dimensions."""

    hidden = 16
    normalised = False

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(400, 12, generator=generator)
        targets = inputs[:, :3].argmax(1)
        train = ArrayDataset(inputs[:300], targets[:300])
        super().__init__("tiny", train, ArrayDataset(inputs[300:], targets[300:]), batch_size=8, lr=0.1)

    def build_model(self) -> nn.Module:
        norm = [nn.BatchNorm1d(self.hidden)] if self.normalised else []
        return nn.Sequential(nn.Linear(12, self.hidden), *norm, nn.ReLU(), nn.Linear(self.hidden, 3))

    def make_optimizer(self, model: nn.Module) -> Any:
        return PlainSgd([p for p in model.parameters() if p.requires_grad], self.lr)


class Other(Tiny):
    """The same data, another model."""

    hidden = 17


class Normalised(Tiny):
    """With running statistics."""

    normalised = True


class Diverging(Tiny):
    """NaN with the first step: nothing large and finite reaches the others before."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(model, batch) * float("nan")


def broken() -> Tiny:
    raise OSError("the factory's own trouble")


class Gated(Tiny):
    """Its evaluation makes the file $GATE.reached, and goes on when there is $GATE.open."""

    def evaluate(self, model: nn.Module) -> Evaluation:
        gate = os.environ["GATE"]
        Path(gate + ".reached").touch()
        while not Path(gate + ".open").exists():
            time.sleep(0.01)
        return super().evaluate(model)
