"""What a worker remembers of a round that it merged: a line of its rounds log."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One merged round as its worker lived it; times in seconds of run time.

    Attributes:
        round: its number.
        kind: what it was for.
        steps: optimizer steps taken when it was merged, from the start.
        local_steps: steps from the previous merge to the snapshot (0 when there was none).
        overlap_steps: steps from the snapshot to the merge.
        snapshot_s: when the snapshot was taken, None without one.
        answered_s: when the answer was there, ready to be merged.
        merged_s: when the merge was done.
        merge_s: how long the merge took of the training thread.
        waited_s: how long the training thread waited for the service in this round, the final one apart.
        waits: (from, to) of each of these waits, those of the final round too.
        included: the contribution is in the average.
        bytes_up, bytes_down: payload so far.
        distance: to the average just after the merge, for methods that hold one (`dppf`); else None.
        shard: which of the servers' rounds it was.
    """

    round: int
    kind: str
    steps: int
    local_steps: int
    overlap_steps: int
    snapshot_s: float | None
    answered_s: float
    merged_s: float
    merge_s: float
    waited_s: float
    waits: tuple[tuple[float, float], ...]
    included: bool
    bytes_up: int
    bytes_down: int
    distance: float | None = None
    shard: int = 0
