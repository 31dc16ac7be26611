"""Local MixVR: what it asks of a run, and its synchronisation's merge (arXiv 2606.01128).

Double momentum in every worker, a budget that is split between local steps and a minibatch at the synchronisation, and
averaged estimators. The parts and the schedules are the paper's; how they fit together is reconstructed:

    state: weights w, query point x (the model), estimator d, step t = 1; at the start w = x, d = averaged gradient
    local step, sample z:  w ← w − η t d;  x' = γ w + (1 − γ) x;  t ← t + 1;
                           d ← ∇f(x'; z) + (1 − β)(d − ∇f(x; z));  x ← x'
    synchronisation:       w, x' and t as above; w and x' are averaged (2d values);
                           d ← ∇f(x̄; B) + (1 − β)(d − ∇f(x; B)) on an own minibatch B; d is averaged (d values)

The second average depends on the first: rounds come in pairs. Nothing overlaps: the estimator d belongs to the point x
that it was computed at, and a delayed x̄ with the steps in flight added would be another point than the one whose
gradient is in d.

`loscar_worker.mixvr` has the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from loscar_core.errors import ConfigError
from loscar_core.methods.base import Arrival, Merged, Method, V, having
from loscar_core.selection import SelectionKind

LARGEST_BUDGET = 10**9


class MixVrSchedule(StrEnum):
    """How γ, β and the step depend on t."""

    THEORY = "theory"
    """β = 1/t, γ = 2/(t + 2), step η t."""
    FIXED = "fixed"
    """As in the paper's experiments: constant β and γ, step η."""


@dataclass(frozen=True)
class MixVr(Method):
    """Local MixVR.

    Attributes:
        budget: K, minibatches of a worker in one round, those of the synchronisation included.
        share: α, the share of them that is kept for the synchronisation: ⌈αK⌉, and ⌊(1 − α)K⌋ local steps.
        schedule: of γ, β and the step.
        gamma, beta: γ (the weight of w in the next query point) and β, with `schedule=fixed`.

    Raises:
        ConfigError: no local step or no minibatch for the synchronisation is left, or a weight outside (0, 1].
    """

    name = "mixvr"
    summary = "Local MixVR: double momentum, with a minibatch and a second, dependent average at each synchronisation"
    source = "Local MixVR, arXiv 2606.01128; how its parts fit together is reconstructed"
    fixed = having(overlap_steps=0, density=1.0, selection=SelectionKind.ALL, dependent=3)
    follows = True
    vectors = ("w", "d")

    budget: int = 16
    share: float = 0.1
    schedule: MixVrSchedule = MixVrSchedule.THEORY
    gamma: float = 0.95
    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"method mixvr: share={self.share:g} is outside (0, 1)")
        if not 0 < self.budget <= LARGEST_BUDGET:
            raise ConfigError(f"method mixvr: a budget of {self.budget!s:.20} is not in 1..{LARGEST_BUDGET:g}")
        if self.local_steps < 1:
            raise ConfigError(
                f"method mixvr: budget={self.budget} and share={self.share:g} leave {self.local_steps} local steps and "
                f"{self.averaging_batches} minibatches for the synchronisation: both need at least 1"
            )
        for name, value in (("gamma", self.gamma), ("beta", self.beta)):
            if not 0 < value <= 1:
                raise ConfigError(f"method mixvr: {name}={value:g} is outside (0, 1]")

    @property
    def averaging_batches(self) -> int:
        """⌈αK⌉"""
        return math.ceil(self.share * self.budget - 1e-9)

    @property
    def local_steps(self) -> int:
        """⌊(1 − α)K⌋"""
        return self.budget - self.averaging_batches

    def weights(self, t: int) -> tuple[float, float, float]:
        """(step's factor, γ, β) of step t ≥ 1; η is the optimizer's. β is 1 at t = 1: there is no estimator yet."""
        if self.schedule is MixVrSchedule.THEORY:
            return float(t), 2.0 / (t + 2), 1.0 / t
        return 1.0, self.gamma, self.beta

    def demands(self) -> Mapping[str, Any]:
        return {**self.fixed, "local_steps": self.local_steps}

    def merge(self, arrival: Arrival[V]) -> Merged[V]:
        """The averages as they are, also for a worker that is not in them."""
        return Merged(list(arrival.new_anchor))
