"""Protection against contributions that would spoil the sum: a norm bound, and robust means.

All of them are lossy by definition: a refused contribution stays with its worker, and what a median or a trimmed
mean leaves out is in nobody's consensus although its worker has subtracted it. They are off unless asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from loscar_core.errors import ConfigError, MalformedError

Floats = NDArray[np.float32]

NORM_SAMPLES = 256
NORM_SAMPLES_NEEDED = 8


class Aggregate(StrEnum):
    """How a part's contributions become one."""

    MEAN = "mean"
    MEDIAN = "median"
    TRIMMED = "trimmed"


def parse_aggregate(text: str) -> tuple[Aggregate, float]:
    """`mean`, `median` or `trimmed:F`, where the share F of the lowest and of the highest values is left out.

    Raises:
        ConfigError: something else, or F outside (0, 0.5).
    """
    name, separator, share = text.partition(":")
    try:
        kind = Aggregate(name)
        trim = float(share) if separator else 0.1
    except ValueError:
        raise ConfigError(f"aggregate {text!r} is not mean, median or trimmed:F") from None
    if (separator and kind is not Aggregate.TRIMMED) or not 0 < trim < 0.5:
        raise ConfigError(f"aggregate {text!r}: only trimmed takes a share, between 0 and 0.5")
    return kind, trim


def combine(kind: Aggregate, trim: float, contributions: Sequence[Floats]) -> Floats:
    """The coordinate-wise median or trimmed mean of some contributions, each of the same size; float32.

    Absent members have no vote, other than in the plain mean, where they count as zero. A trimmed mean leaves out
    ⌊n · trim⌋ values at each end: none while n < 1/trim.
    """
    stacked = np.stack(contributions)
    if kind is Aggregate.MEDIAN:
        median: Floats = np.median(stacked, axis=0).astype(np.float32)
        return median
    cut = int(len(contributions) * trim + 1e-9)  # 100 · 0.29 is 29, which floating point falls short of
    stacked.sort(axis=0)
    kept = stacked[cut : len(contributions) - cut]
    mean: Floats = kept.mean(axis=0, dtype=np.float32)
    return mean


class NormBound:
    """Refuses contributions whose root mean square is far beyond what has been usual.

    Args:
        factor: how many times the median of the last contributions is too much.
    """

    def __init__(self, factor: float) -> None:
        if not factor > 1:
            raise ConfigError(f"norm bound {factor:g}: it is a multiple of the usual size, above 1")
        self.factor = factor
        self._recent: deque[float] = deque(maxlen=NORM_SAMPLES)

    def check(self, values: Floats) -> None:
        """Note a contribution's size.

        Raises:
            MalformedError: it is beyond the bound; it is not noted.
        """
        # In float64: squares of large and of tiny float32 values are none themselves.
        size = float(np.sqrt(np.square(values, dtype=np.float64).mean()))
        if len(self._recent) >= NORM_SAMPLES_NEEDED:
            usual = float(np.median(self._recent))
            # A run that stands still has contributions of size 0: then nothing can be said of the others.
            if usual > 0 and not size <= self.factor * usual:
                raise MalformedError(
                    f"a contribution {size / usual:.3g} times as large as usual: beyond the norm bound"
                )
        self._recent.append(size)
