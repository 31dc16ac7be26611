"""DPPF: workers are pulled to their average and pushed away from it (arXiv 2507.20424).

The paper gives the forces; their form here, acting every round on all coordinates at once, is reconstructed:

    x ← x + (x_A − x)(α − λ / max(r, ε)),   r = ‖x − x_A‖                                        (blocking)

Without gradients r ← (1 − α) r + λ, which contracts to the width λ/α for 0 < α ≤ 1 whatever the learning rate does.

Overlapped. Let y be where the worker was at the snapshot, m̄ the average of all y, and z = y + p where it is now, after
the steps p in flight. The forces belong to the places that were averaged: they are what the blocking form would have
done at the snapshot, and the steps taken since are kept, as in LOSCAR-SGD's delay correction:

    z ← (y + g (m̄ − y)) + (z − y) = z + g (m̄ − y),   g = α − λ / max(r, ε),   r = ‖y − m̄‖

One round is in flight at a time, so with p = 0 the next snapshot finds y' − m̄ = (1 − g)(y − m̄): the same recursion
of r, and the same fixed point λ/α, for any delay.

Sparse (ours): the forces act on the round's selection S, and r is estimated from it, r ≈ ‖(y − m̄)_S‖ √(d/K).

A worker whose contribution is not, or not wholly, in the average stays where it is. Statistics are averaged, never
pushed. What the run exports is the average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from loscar_core.errors import ConfigError
from loscar_core.methods.base import Arrival, Merged, Method, V, having

EPSILON = 1e-12
"""Below this distance there is no direction to push in."""
WIDEST = 1e6


class Schedule(StrEnum):
    """How λ goes over the run, from 0 to its value or back; s is the share of the run that is over."""

    CONSTANT = "constant"
    INCREASING = "increasing"
    """λ s"""
    DECREASING = "decreasing"
    """λ (1 − s)"""


@dataclass(frozen=True)
class Dppf(Method):
    """Pull and push.

    Attributes:
        alpha: α, the pull, in (0, 1].
        push: λ ≥ 0, the push, in units of the parameters' distance; λ/α is the width that the workers hold.
        schedule: of λ; all but `constant` need a run whose end is known.

    Raises:
        ConfigError: a pull or a push under which the workers would not keep together.
    """

    name = "dppf"
    summary = "pulls workers to their average and pushes them away from it, which holds them in a wide valley"
    source = "DPPF, arXiv 2507.20424; the form of the update is reconstructed"
    defaults = having(density=1.0)
    stays = True
    in_common = "takes the distance from the average from a round's coordinates: they must not be the largest ones"
    spelling = having(**{"lambda": "push"})

    alpha: float = 0.1
    push: float = 0.1
    schedule: Schedule = Schedule.CONSTANT

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(
                f"method dppf: alpha={self.alpha:g} is outside (0, 1]: the workers would not keep together"
            )
        if not (math.isfinite(self.push) and self.push >= 0):
            raise ConfigError(f"method dppf: lambda={self.push:g} is not a number of at least 0")
        if self.push / self.alpha > WIDEST:
            raise ConfigError(
                f"method dppf: lambda/alpha = {self.push / self.alpha:g}, the distance at which the workers are held, "
                f"diverges: use at most {WIDEST:g}"
            )

    @property
    def needs_length(self) -> bool:
        return self.schedule is not Schedule.CONSTANT

    def push_at(self, progress: float) -> float:
        """λ when that share of the run is over."""
        match self.schedule:
            case Schedule.CONSTANT:
                return self.push
            case Schedule.INCREASING:
                return self.push * progress
            case Schedule.DECREASING:
                return self.push * (1.0 - progress)

    def merge(self, arrival: Arrival[V]) -> Merged[V]:
        if arrival.sent is None or not arrival.whole:
            return Merged(list(arrival.live))
        pieces = zip(arrival.anchor, arrival.sent, arrival.new_anchor, strict=True)
        back = [average - (anchor + sent) for anchor, sent, average in pieces]  # m̄ − y
        r = math.sqrt(sum(float((b * b).sum()) for b in back) / arrival.fraction)
        force = self.alpha - self.push_at(arrival.progress) / max(r, EPSILON)
        values = [live + b * force for live, b in zip(arrival.live, back, strict=True)]
        return Merged(values, abs(1.0 - force) * r)
