"""Published methods that are near LOSCAR-SGD, as baselines: each a few lines on the same parts.

They are what their papers do with an average, on this project's rounds, links and recovery; outer optimizers, gradient
compression and whatever else those papers have beside it are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from loscar_core.errors import ConfigError
from loscar_core.merge import MergeKind
from loscar_core.methods.base import Arrival, Merged, Method, V, having, merged_by
from loscar_core.selection import SelectionKind


@dataclass(frozen=True)
class LocalSgd(Method):
    """Everybody stops, all coordinates are averaged, everybody goes on from the average."""

    name = "local-sgd"
    summary = "blocking Local SGD: all coordinates are averaged while everybody waits"
    source = "Local SGD, arXiv 1805.09767"
    fixed = having(overlap_steps=0)
    defaults = having(density=1.0)

    def merge(self, arrival: Arrival[V]) -> Merged[V]:
        # Nothing is in flight: the corrected merge is x_A, plus what quantisation has left out.
        return merged_by(MergeKind.DELAY_CORRECTED, arrival)


@dataclass(frozen=True)
class Cocod(Method):
    """All coordinates, sent at the start of each period and corrected for the steps of that period."""

    name = "cocod"
    summary = "CoCoD-SGD: dense averages, sent right after each merge, with the steps in flight kept"
    source = "CoCoD-SGD, arXiv 1906.12043"
    fixed = having(local_steps=0, selection=SelectionKind.ALL)
    defaults = having(density=1.0)

    def merge(self, arrival: Arrival[V]) -> Merged[V]:
        return merged_by(MergeKind.DELAY_CORRECTED, arrival)


def _towards(arrival: Arrival[V], pull: float) -> Merged[V]:
    """x ← (1 − pull) x + pull a_new; who is not in the average is pulled as well."""
    return Merged([z * (1.0 - pull) + b * pull for z, b in zip(arrival.live, arrival.new_anchor, strict=True)])


@dataclass(frozen=True)
class OverlapLocalSgd(Method):
    """Workers are pulled back to an anchor that is one period old.

    Attributes:
        alpha: the pull, in (0, 1].

    Raises:
        ConfigError: a pull outside of that.
    """

    name = "overlap-local-sgd"
    summary = "Overlap-Local-SGD: pulled back to the average of one period ago"
    source = "Overlap-Local-SGD, arXiv 2002.09539, without the anchor's momentum"
    fixed = having(local_steps=0, selection=SelectionKind.ALL)
    defaults = having(density=1.0)
    stays = True

    alpha: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"method overlap-local-sgd: alpha={self.alpha:g} is outside (0, 1]")

    def merge(self, arrival: Arrival[V]) -> Merged[V]:
        return _towards(arrival, self.alpha)


@dataclass(frozen=True)
class Blend(Method):
    """A fragment's late average is blended with the live values.

    Attributes:
        keep: the share of the live values, in [0, 1); 0 overwrites them.

    Raises:
        ConfigError: a share outside of that.
    """

    name = "blend"
    summary = "as Streaming DiLoCo merges: a late average of a fragment is blended with the live values"
    source = "Streaming DiLoCo, arXiv 2501.18512, without its outer optimizer"
    stays = True

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.keep < 1:
            raise ConfigError(f"method blend: keep={self.keep:g} is outside [0, 1): nothing would ever be averaged")

    def merge(self, arrival: Arrival[V]) -> Merged[V]:
        return _towards(arrival, 1.0 - self.keep)


@dataclass(frozen=True)
class Sparta(Method):
    """A few coordinates after every step, overwritten with their average."""

    name = "sparta"
    summary = "as SPARTA: after every step a few random coordinates are overwritten with their average"
    source = "SPARTA, EXO Labs 2025"
    fixed = having(local_steps=1)
    defaults = having(density=0.005, selection=SelectionKind.RANDOM, overlap_steps=0)
    in_common = "overwrites the same coordinates in all workers"

    def merge(self, arrival: Arrival[V]) -> Merged[V]:
        return merged_by(MergeKind.OVERWRITE, arrival)
