"""What a task is: a model, an optimizer, a loss, a training set and a test set, all in one object.

A worker needs nothing else to train, and an evaluator nothing else to judge the result. The built-in tasks
are subclasses of `Task`; a user's own task is one more (see docs/tasks.md).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from loscar_core.errors import ConfigError

Batch = tuple[Tensor, Tensor]
"""Inputs and targets; both have the batch as their first dimension."""

Transform = Callable[[Tensor, "torch.Generator | None"], Tensor]
"""Turns stored inputs of one batch into what the model takes; random ones draw from the generator."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good a model is on the test data.

    loss: mean of the task's criterion over all targets, without penalties such as ℓ2; may be NaN or infinite.
    accuracy: share of correctly predicted targets, 0 to 1.
    """

    loss: float
    accuracy: float


class ArrayDataset:
    """Samples held in memory, taken by many indices at once.

    inputs: tensor (n, ...) in any compact dtype (images stay uint8); targets: tensor (n,) or (n, ...).
    transform: applied by `take` to the gathered inputs only, so that the stored ones stay compact.
    random: whether `take` draws from its generator; a caller need not seed one otherwise.

    Raises ValueError when the two lengths differ or there is no sample.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, transform: Transform | None = None, *, random: bool = False
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
        if len(inputs) == 0:
            raise ValueError("a data set needs at least one sample")
        self.inputs = inputs
        self.targets = targets
        self.transform = transform
        self.random = random

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        """One sample without the batch dimension. Raises IndexError outside 0..n-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        inputs, targets = self.take(torch.tensor([index]))
        return inputs[0], targets[0]

    def take(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Gather the samples at `indices` (int64, shape (b,)) as tensors of leading size b, on the CPU.

        `generator` feeds random augmentation; None uses torch's global one.
        """
        inputs = self.inputs.index_select(0, indices)
        if self.transform is not None:
            inputs = self.transform(inputs, generator)
        return inputs, self.targets.index_select(0, indices)

    def chunks(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time; the last chunk may be smaller."""
        for start in range(0, len(self), size):
            yield self.take(torch.arange(start, min(start + size, len(self))))


class Task(ABC):
    """Base of all tasks. A subclass gives `build_model` and calls `__init__` with its data.

    name: how logs and summaries call it. train, test: `ArrayDataset`s. batch_size: samples per step, at least
    1. lr: the optimizer's learning rate, positive and finite; both raise ConfigError otherwise.

    Class attributes that a subclass may set: `momentum` and `weight_decay` of the default SGD optimizer, and
    `evaluation_chunk`, the number of samples that `evaluate` passes through the model at once.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    evaluation_chunk: int = 1000

    def __init__(self, name: str, train: ArrayDataset, test: ArrayDataset, *, batch_size: int, lr: float) -> None:
        self.name = name
        self.train = train
        self.test = test
        self.batch_size = batch_size
        self.lr = lr
        self.configure(batch_size=batch_size, lr=lr)

    def configure(self, *, batch_size: int | None = None, lr: float | None = None) -> None:
        """Override hyper-parameters; None keeps the task's own. Raises ConfigError on values out of range."""
        if batch_size is not None:
            if batch_size < 1:
                raise ConfigError(f"task {self.name}: the batch size is {batch_size}, it must be at least 1")
            self.batch_size = batch_size
        if lr is not None:
            if not (math.isfinite(lr) and lr > 0):
                raise ConfigError(f"task {self.name}: the learning rate is {lr}, it must be positive and finite")
            self.lr = lr

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A freshly initialised model on the CPU that draws only from torch's global CPU generator.

        Call `make_model` instead, which seeds that generator.
        """

    def make_model(self, seed: int) -> nn.Module:
        """The model, in training mode, whose initial values are a function of `seed` (0 to 2^64 - 1) alone.

        torch's global generator is left as it was. Not safe while another thread draws from that generator.
        """
        state = torch.get_rng_state()
        try:
            # The generator's own method: torch.manual_seed would also reseed the accelerators.
            torch.default_generator.manual_seed(seed)
            with torch.device("cpu"):
                return self.build_model()
        finally:
            torch.set_rng_state(state)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD over the trainable parameters with the task's `lr`, `momentum` and `weight_decay`."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def hyper_parameters(self) -> dict[str, str | int | float]:
        """What the run folder records; overridden where the optimizer is."""
        return {
            "optimizer": "SGD",
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "batch_size": self.batch_size,
        }

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar mean loss. Default: cross entropy of logits (..., classes) against int64 targets (...)."""
        if outputs.ndim > 2:
            outputs, targets = outputs.flatten(0, -2), targets.flatten()
        return functional.cross_entropy(outputs, targets)

    def predictions(self, outputs: Tensor) -> Tensor:
        """What `evaluate` compares with the targets, of their shape. Default: the largest logit's index."""
        return outputs.argmax(dim=-1)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A differentiable scalar added to the training loss, or None (the default)."""
        return None

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The differentiable scalar to minimise: criterion plus penalty, on the model's device."""
        inputs, targets = _to_device_of(model, batch)
        value = self.criterion(model(inputs), targets)
        penalty = self.penalty(model)
        return value if penalty is None else value + penalty

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Evaluation:
        """Loss and accuracy over the whole test set, on the model's device, in evaluation mode.

        Every module's own training flag is restored afterwards, also when the model raises.
        """
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        total_loss, correct, count = 0.0, 0, 0
        try:
            for batch in self.test.chunks(self.evaluation_chunk):
                inputs, targets = _to_device_of(model, batch)
                outputs = model(inputs)
                total_loss += float(self.criterion(outputs, targets)) * targets.numel()
                correct += int((self.predictions(outputs) == targets).sum())
                count += targets.numel()
        finally:
            # One by one: model.train() would also switch on a layer that the user had frozen in eval mode.
            for module, mode in modes:
                module.training = mode
        return Evaluation(total_loss / count, correct / count)

    def labels(self) -> NDArray[np.generic]:
        """One label per training sample, shape (len(train),), by which `partition` makes unequal shares.

        Default: the targets where they are one per sample, else all zero (a task may know better).
        """
        targets = self.train.targets
        if targets.ndim == 1:
            found: NDArray[np.generic] = targets.numpy()
            return found
        return np.zeros(len(self.train), np.int64)


def _to_device_of(model: nn.Module, batch: Batch) -> Batch:
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type == "cpu":
        return batch
    return batch[0].to(parameter.device), batch[1].to(parameter.device)


def parameter_count(model: nn.Module) -> int:
    """Number of trainable coordinates of `model`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
