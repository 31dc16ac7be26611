"""When bytes leave one direction of an emulated link."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from loscar_deploy.link_spec import DirectionSpec

Window = tuple[float, float]


class DirectionModel:
    """When bytes leave one direction of a link. Pure: the time is an argument, so virtual clocks work too.

    `outages` are (start, end) in seconds on the clock of `transit`.
    """

    def __init__(self, spec: DirectionSpec, outages: Sequence[Window], rng: random.Random) -> None:
        self.spec = spec
        self._rng = rng
        self._outages = _merged(outages)
        self._free_at_s = -math.inf

    def set_outages(self, outages: Sequence[Window]) -> None:
        """Replaces the outages; what is already under way keeps its time."""
        self._outages = _merged(outages)

    def transit(self, now_s: float, n_bytes: int) -> float:
        """When the last of `n_bytes` handed over at `now_s` arrives at the other end, in seconds.

        Calls with bytes are in the order of sending. 0 bytes stand for a packet without payload: it waits
        its turn and meets outages, but takes no capacity. Jitter may make a later call arrive earlier: who
        needs order takes the maximum.
        """
        start_s = max(now_s, self._free_at_s)
        rate = self.spec.rate_bytes_per_s
        sent_s = self._transmitted(start_s, n_bytes / rate if rate is not None else 0.0)
        if n_bytes and rate is not None:
            self._free_at_s = sent_s
        arrival_s = sent_s + self.spec.sample_delay_s(self._rng)
        for begin_s, end_s in self._outages:
            if begin_s <= arrival_s < end_s:
                return end_s
        return arrival_s

    def _transmitted(self, start_s: float, duration_s: float) -> float:
        """The end of a transmission that begins at `start_s` and pauses during outages."""
        end_s = start_s + duration_s
        for outage_begin_s, outage_end_s in self._outages:
            if outage_begin_s > end_s:
                break
            if outage_end_s > start_s:
                end_s += outage_end_s - max(outage_begin_s, start_s)
        return end_s


def _merged(outages: Sequence[Window]) -> list[Window]:
    merged: list[Window] = []
    for begin_s, end_s in sorted(outages):
        if merged and begin_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end_s, merged[-1][1]))
        else:
            merged.append((begin_s, end_s))
    return merged
