"""Local MixVR's optimizer: double momentum with two gradients on the same samples; see `loscar_core.methods.mixvr`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loscar_core.errors import ConfigError
from loscar_core.methods import parse_method
from loscar_core.methods.mixvr import MixVr
from loscar_worker.boundary import TrainingHalf

Loss = Callable[[], Tensor]
"""The loss of some samples at the model as it is now: calling it twice must be about the same samples."""


class MixVrOptimizer(torch.optim.Optimizer):
    """Any model, any loss. The query point x is the model's trainable parameters.

    For one's own loop:

        method = parse_method("mixvr:budget=16,share=0.1")
        optimizer = MixVrOptimizer(model, lr=0.05, method=method, minibatch=lambda: loss_of(next(batches)))
        with loscar.join(server, model, vectors=optimizer.vectors, companion=optimizer) as session:
            while not session.finished:
                optimizer.take_step(loss_of(next(batches)))
                session.step()

    Args:
        model: its trainable parameters, float32.
        lr: η.
        method: the run's.
        minibatch: makes the loss of fresh samples: ⌈αK⌉ of them are drawn for each synchronisation.

    Raises:
        ConfigError: parameters that are not float32, or not on one device.

    Attributes:
        vectors: w and d, to be averaged along with the model; d_model float32 each, in the parameters' order.
        t: the next step's number, from 1.
    """

    def __init__(self, model: nn.Module, *, lr: float, method: MixVr, minibatch: Callable[[], Loss]) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if {(p.dtype, p.device) for p in self._parameters} != {(torch.float32, self._parameters[0].device)}:
            raise ConfigError("method mixvr: the model's parameters have to be float32, on one device")
        super().__init__(self._parameters, {"lr": lr})
        self._method = method
        self._minibatch = minibatch
        start = torch.cat([p.detach().reshape(-1).float() for p in self._parameters])
        self.vectors = {"w": start.clone(), "d": torch.zeros_like(start)}
        self.t = 1
        self._begun = False
        self._stale = False  # d belongs to another place than x
        self._before: list[Tensor] | None = None  # where d belongs to, while a synchronisation has moved x already
        self._half: TrainingHalf | None = None

    # --- training -------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """`take_step` by another name: the closure is the loss of this step's samples, without its `backward`."""
        if closure is None:
            raise TypeError("MixVR computes two gradients on the same samples: step(closure) needs the closure")
        return self.take_step(closure)

    def take_step(self, loss: Loss) -> Tensor:
        """One local step; returns the loss at the point before it, detached."""
        self._refresh()
        if self._before is None:
            value, old = self._gradients(loss)
            beta = self._move()
        else:
            # A synchronisation had begun, and its round was over before this worker was in it: its move is this step's.
            before, self._before = self._before, None
            here = [x.detach().clone() for x in self._parameters]
            self._place(before)
            value, old = self._gradients(loss)
            self._place(here)
            beta = self._method.weights(self.t)[2]
        _, new = self._gradients(loss)
        self._estimate(new, old, beta)
        return value

    def _move(self) -> float:
        """w ← w − η t d, x ← γ w + (1 − γ) x, t ← t + 1; returns β of the new t."""
        factor, gamma, _ = self._method.weights(self.t)
        w, d = self.vectors["w"], self.vectors["d"]
        with torch.no_grad():
            w.sub_(d, alpha=self.param_groups[0]["lr"] * factor)
            for x, part in zip(self._parameters, self._pieces(w), strict=True):
                x.lerp_(part, gamma)
        self.t += 1
        return self._method.weights(self.t)[2]

    def _estimate(self, new: list[Tensor], old: list[Tensor], beta: float) -> None:
        """d ← new + (1 − β)(d − old)"""
        with torch.no_grad():
            for d, a, b in zip(self._pieces(self.vectors["d"]), new, old, strict=True):
                d.sub_(b).mul_(1.0 - beta).add_(a)

    def _gradients(self, loss: Loss) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            value = loss()
            found = torch.autograd.grad(value, self._parameters, allow_unused=True)
        pairs = zip(found, self._parameters, strict=True)
        return value.detach(), [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def _pieces(self, vector: Tensor) -> Iterator[Tensor]:
        start = 0
        for p in self._parameters:
            yield vector[start : start + p.numel()].view(p.shape)
            start += p.numel()

    # --- around averages ------------------------------------------------------------------------------------

    def begin(self, half: TrainingHalf) -> None:
        """The run's options count, whatever this worker was started with. A newcomer takes the estimator over with the
        model, and the time from the rounds that it has missed.

        Raises:
            ConfigError: the run's method is another one.
        """
        self._half = half
        config = half.engine.config
        method = parse_method(config.method) if config is not None else None
        if not isinstance(method, MixVr):
            raise ConfigError(f"the run's method is not mixvr but {method.name if method is not None else 'unknown'}")
        self._method = method
        round = half.engine.anchor.position.round
        if round > 0 and not self._begun:
            # In the middle of a pair the consensus has a new x, and the estimator of the old one.
            self._begun, self._stale = True, round % 2 == 1
        self._catch_up_in_time()
        if round == 0:
            with torch.no_grad():
                for x, part in zip(self._parameters, self._pieces(self.vectors["w"]), strict=True):
                    part.copy_(x)

    def _catch_up_in_time(self) -> None:
        """Of the pairs, the first one has no steps."""
        assert self._half is not None
        pairs = max(0, (self._half.engine.anchor.position.round - 1) // 2)
        self.t = max(self.t, 1 + pairs * (self._method.local_steps + 1))

    def replaced(self) -> None:
        self._before = None
        self._begun = self._stale = True
        self._catch_up_in_time()

    def _refresh(self) -> None:
        """An estimator for a place that was jumped to: the gradient there."""
        if self._stale:
            self._stale = False
            here = self._mean_gradients([self._minibatch() for _ in range(self._method.averaging_batches)])
            self._estimate(here, here, 1.0)

    def before_snapshot(self, dependent: bool) -> None:
        if dependent:
            self._refresh()
        elif self._before is None:  # else it is asked for the second time: the first one came too late
            self._remember()

    def before_merge(self, dependent: bool) -> None:
        if not dependent and self._before is None:
            self._remember()  # the average is there before this worker has got to it

    def _remember(self) -> None:
        """What the estimator belongs to, and then the move that every synchronisation begins with."""
        self._refresh()
        self._before = [x.detach().clone() for x in self._parameters]
        if self._begun:
            self._move()

    def after_merge(self, dependent: bool) -> None:
        if dependent:
            self._begun, self._stale = True, False
            return
        before, self._before = self._before, None
        assert before is not None
        batches = [self._minibatch() for _ in range(self._method.averaging_batches)]
        here = self._mean_gradients(batches)
        if not self._begun:
            # There is no estimator yet: the gradient itself is.
            self._begun = True
            self._estimate(here, here, 1.0)
            return
        average = [x.detach().clone() for x in self._parameters]
        self._place(before)
        there = self._mean_gradients(batches)
        self._place(average)
        self._estimate(here, there, self._method.weights(self.t)[2])

    def _place(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for x, value in zip(self._parameters, values, strict=True):
                x.copy_(value)

    def _mean_gradients(self, batches: list[Loss]) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in self._parameters]
        for loss in batches:
            _, found = self._gradients(loss)
            for t, g in zip(total, found, strict=True):
                t.add_(g, alpha=1.0 / len(batches))
        return total

    # --- saving ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """With t; w and d are in the session's state, with the model."""
        stale = self._stale or self._before is not None
        return {**super().state_dict(), "t": self.t, "begun": self._begun, "stale": stale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.t, self._begun, self._stale = state.pop("t"), state.pop("begun"), state.pop("stale")
        self._before = None
        super().load_state_dict(state)
