"""The configuration of a run: what every member must agree on, and the pace that it is offered.

`RunConfig` belongs to the state: the server announces it in its welcome, workers keep it and hand it back to a
server that lost its memory. `ServerLimits` is the server's own affair and never travels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from loscar_core import PROTOCOL_VERSION as PROTOCOL_VERSION
from loscar_core.errors import ConfigError
from loscar_core.layout import Shard
from loscar_core.merge import MergeKind
from loscar_core.robust import Aggregate, NormBound
from loscar_core.selection import SelectionKind, count_for
from loscar_core.values import ValueType

MAX_SEED = (1 << 63) - 1
LONGEST_METHOD = 500
MOST_VECTORS = 64


class FinalRound(StrEnum):
    """What ends a run: one dense float32 round that brings every worker's last progress in, or nothing."""

    DENSE = "dense"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What all members of a run share.

    Attributes:
        seed: seeds the selections (and, in the built-in tasks, the model and the data order).
        density: fraction of the coordinates that a round carries, in (0, 1].
        coordinates: an exact number of coordinates in place of `density`, or None.
        selection: how a round's coordinates are chosen.
        value_type: what a value is on the wire.
        merge: what a worker does with the delayed average, when its method leaves it open.
        method: the training method and its options, as `loscar_core.methods.parse_method` reads them; nothing but
            workers needs to understand it.
        dependent: n ≥ 2 for rounds in pairs, 0 for none. The first of a pair averages all but the last 1/n of the
            coordinates, the second the last 1/n: what workers have computed from the first one's answer.
        shard: which of the servers that share a model this one is; each has a range of its coordinates.
        local_steps: N, steps from a merge to the next snapshot; None paces by `sync_interval_s` instead.
        sync_interval_s: seconds from a merge to the next snapshot, when `local_steps` is None.
        overlap_steps: Q, steps from the snapshot to the merge; 0 blocks; None merges when the answer is there.
        rounds: rounds before the run ends, or None.
        duration_s: seconds of run time before it ends, or None.
        max_steps: the run ends when one worker has taken this many steps, or None.
        final_round: what ends it.
        evaluate_every: every how many rounds the workers expose their vectors for evaluation; 0 for never.
    """

    seed: int = 0
    density: float = 0.05
    coordinates: int | None = None
    selection: SelectionKind = SelectionKind.SWEEP
    value_type: ValueType = ValueType.FLOAT32
    merge: MergeKind = MergeKind.DELAY_CORRECTED
    local_steps: int | None = None
    sync_interval_s: float = 0.25
    overlap_steps: int | None = None
    rounds: int | None = None
    duration_s: float | None = None
    max_steps: int | None = None
    final_round: FinalRound = FinalRound.DENSE
    evaluate_every: int = 0
    method: str = "loscar"
    dependent: int = 0
    shard: Shard = Shard()

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed {self.seed} is outside 0..2^63-1")
        count_for(self.density, 1)  # refuses a density outside (0, 1]
        if self.coordinates is not None and self.coordinates < 1:
            raise ConfigError(f"coordinates {self.coordinates}: at least 1 is needed")
        if self.selection in (SelectionKind.HEAD, SelectionKind.TAIL):
            raise ConfigError(
                f"selection {self.selection.value} is not available on this server: use sweep, random, block, topk or "
                "all"
            )
        if self.dependent != 0 and not 2 <= self.dependent <= MOST_VECTORS:
            raise ConfigError(f"dependent {self.dependent} is neither 0 nor in 2..{MOST_VECTORS}")
        if self.dependent and self.selection is SelectionKind.TOPK:
            name = self.method.partition(":")[0]
            raise ConfigError(f"method {name} averages in pairs of rounds, each with a part of its own: not with topk")
        if self.dependent and self.shard.count > 1:
            name = self.method.partition(":")[0]
            raise ConfigError(f"method {name} averages in pairs of rounds, which takes one server: leave --shard out")
        if self.shard.index and (self.rounds, self.duration_s, self.max_steps) != (None, None, None):
            raise ConfigError("only shard 0 says when a run ends: give rounds, duration and max steps to that one")
        if self.local_steps is not None and self.local_steps < 0:
            raise ConfigError(f"local steps {self.local_steps} is negative")
        if self.overlap_steps is not None and self.overlap_steps < 0:
            raise ConfigError(f"overlap steps {self.overlap_steps} is negative")
        if self.local_steps == 0 and self.overlap_steps == 0:
            raise ConfigError("local steps 0 with overlap steps 0 would average without ever training")
        if not (math.isfinite(self.sync_interval_s) and self.sync_interval_s > 0):
            raise ConfigError(f"sync interval {self.sync_interval_s} s is not a positive time")
        for name, value in (("rounds", self.rounds), ("max steps", self.max_steps)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: at least 1 is needed")
        if self.duration_s is not None and not (math.isfinite(self.duration_s) and self.duration_s > 0):
            raise ConfigError(f"duration {self.duration_s} s is not a positive time")
        if len(self.method) > LONGEST_METHOD:
            raise ConfigError(f"a method of {len(self.method)} characters: {LONGEST_METHOD} at most")
        if self.evaluate_every < 0:
            raise ConfigError(f"evaluate every {self.evaluate_every} rounds is negative")

    def count(self, dimension: int) -> int:
        """K, the number of coordinates that a round carries of `dimension`; of a pair the larger one.

        Raises:
            ConfigError: when `coordinates` asks for more than the model has.
        """
        if self.dependent:
            if dimension < self.dependent:
                raise ConfigError(f"rounds in pairs over {self.dependent} vectors of {dimension} values in all")
            return dimension - dimension // self.dependent
        if self.coordinates is None:
            return count_for(self.density, dimension)
        if self.coordinates > dimension:
            raise ConfigError(f"{self.coordinates} coordinates a round: the model has only {dimension}")
        return self.coordinates


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """How patient and how generous one server is.

    Attributes:
        workers: members that round 1 waits for; None opens it `start_grace_s` after the last join.
        start_grace_s: see `workers`.
        lease_s: silence after which a member is gone.
        heartbeat_s: how often members are asked to say something.
        round_cap_s: longest time that one member can hold up a round, whatever its history says.
        deadline_cycles: a member's deadline in units of its own median cycle.
        slot_reserve_s: how long a slot stays reserved for the name that had it.
        recover_after_s: how long a server without state waits for a majority before it takes the furthest anchor.
        max_members: members at a time, observers included.
        max_dimension: largest model that is accepted, in coordinates.
        aggregate, trim: how contributions become one, see `loscar_core.robust`.
        norm_bound: contributions this many times larger than usual are refused, or None.
        clone_below: newcomers get a live worker's unsent progress when rounds carry less than this share.
        max_backlog_rounds: unsent rounds after which a member is caught up by value instead.
        consolidation_share: share of the values sent that dense rounds may be, which make of the consensus a model
            worth saving: at a low density it lags behind the workers. 0 for none.
    """

    workers: int | None = None
    start_grace_s: float = 5.0
    lease_s: float = 15.0
    heartbeat_s: float = 2.0
    round_cap_s: float = 120.0
    deadline_cycles: float = 4.0
    slot_reserve_s: float = 600.0
    recover_after_s: float = 60.0
    max_members: int = 4096
    max_dimension: int = 1 << 36
    aggregate: Aggregate = Aggregate.MEAN
    trim: float = 0.1
    norm_bound: float | None = None
    clone_below: float = 0.5
    max_backlog_rounds: int = 8
    consolidation_share: float = 0.0

    def __post_init__(self) -> None:
        if self.workers is not None and not 1 <= self.workers <= self.max_members:
            raise ConfigError(f"workers {self.workers} is outside 1..{self.max_members}")
        for name in ("lease_s", "heartbeat_s", "round_cap_s", "deadline_cycles"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} {getattr(self, name)} is not positive")
        if not 0 <= self.consolidation_share < 1:
            raise ConfigError(f"consolidation_share {self.consolidation_share} is outside 0..1")
        if self.norm_bound is not None:
            NormBound(self.norm_bound)
        for name in ("start_grace_s", "slot_reserve_s", "recover_after_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} {getattr(self, name)} is negative")
        if self.heartbeat_s * 2 > self.lease_s:
            raise ConfigError(f"a lease of {self.lease_s} s needs heartbeats at least every {self.lease_s / 2} s")


def require_fit(config: RunConfig, limits: ServerLimits) -> None:
    """Raises ConfigError for a run that a server with these limits cannot hold."""
    if config.selection is SelectionKind.TOPK and limits.aggregate is not Aggregate.MEAN:
        raise ConfigError(
            f"aggregate {limits.aggregate} with selection topk: workers that select for themselves have no coordinates "
            "in common to take it over; use the mean, or another selection"
        )
