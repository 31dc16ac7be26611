"""A run's state as it is saved and restored: everything that a new server process needs to go on.

The state is (run, epoch, round, lineage of epochs, consensus, inclusion table), its configuration and the server's
own quantisation residual. Metadata travel as JSON-ready values, arrays apart; files are the server's affair.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loscar_core.config import FinalRound, RunConfig
from loscar_core.errors import MalformedError
from loscar_core.layout import Layout, Segment, parse_shard
from loscar_core.merge import MergeKind
from loscar_core.plan import HistoryEntry, RoundKind, RoundPlan
from loscar_core.replica import Floats, Replica
from loscar_core.selection import SelectionKind
from loscar_core.state import Included, InclusionTable, Lineage, Position
from loscar_core.values import ValueType

FORMAT = 1
HISTORY_SAVED = 64


@dataclass(frozen=True, slots=True)
class SavedState:
    """One state of one run.

    Attributes:
        run_id: 16 bytes.
        epoch: of the process that saved it.
        config: the run's.
        layout: the model's.
        replica: consensus, position, digest, lineage, inclusion, history; arrays are not shared with a live state.
        residual: the server's quantisation residual, d float32, or None with float32 answers.
        elapsed_s: run time so far.
    """

    run_id: bytes
    epoch: int
    config: RunConfig
    layout: Layout
    replica: Replica
    residual: Floats | None
    elapsed_s: float

    def metadata(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON-ready values."""
        state = self.replica
        config = asdict(self.config)
        for name in ("selection", "value_type", "merge", "final_round"):
            config[name] = getattr(self.config, name).value
        config["shard"] = str(self.config.shard)
        return {
            "format": FORMAT,
            "run_id": self.run_id.hex(),
            "epoch": self.epoch,
            "config": config,
            "layout": {
                "parameters": [[s.name, list(s.shape), s.dtype] for s in self.layout.parameters],
                "statistics": [[s.name, list(s.shape), s.dtype] for s in self.layout.statistics],
                "frozen_checksum": self.layout.frozen_checksum,
            },
            "position": [state.position.epoch, state.position.round],
            "digest": state.digest,
            "lineage": [list(span) for span in state.lineage.spans],
            "inclusion": {i.hex(): [e.round, format(e.parts, "x")] for i, e in state.inclusion.entries().items()},
            "history": [_entry(e) for e in state.history.last(HISTORY_SAVED)],
            "members": state.members,
            "elapsed_s": self.elapsed_s,
        }


def _entry(entry: HistoryEntry) -> list[Any]:
    p = entry.plan
    return [
        entry.position.epoch,
        entry.position.round,
        int(p.kind),
        p.selection.value,
        p.count,
        p.value_type.value,
        entry.digest,
    ]


def restore(metadata: dict[str, Any], vector: Floats, statistics: Floats, residual: Floats | None) -> SavedState:
    """The state that `SavedState.metadata` and the arrays describe; the arrays are kept, not copied.

    Raises:
        MalformedError: the metadata do not fit together or with the arrays.
    """
    try:
        if metadata["format"] != FORMAT:
            raise MalformedError(f"a saved state of format {metadata['format']}; this version reads {FORMAT}")
        config = dict(metadata["config"])
        for name, kind in (
            ("selection", SelectionKind),
            ("value_type", ValueType),
            ("merge", MergeKind),
            ("final_round", FinalRound),
        ):
            config[name] = kind(config[name])
        config["shard"] = parse_shard(config.get("shard", "0/1"))
        layout = Layout(
            tuple(Segment(n, tuple(s), t) for n, s, t in metadata["layout"]["parameters"]),
            tuple(Segment(n, tuple(s), t) for n, s, t in metadata["layout"]["statistics"]),
            metadata["layout"]["frozen_checksum"],
        )
        table = {bytes.fromhex(i): Included(r, int(parts, 16)) for i, (r, parts) in metadata["inclusion"].items()}
        replica = Replica(
            vector,
            statistics,
            Position(*metadata["position"]),
            metadata["digest"],
            Lineage(tuple((e, r) for e, r in metadata["lineage"])),
            InclusionTable(table),
            members=metadata["members"],
        )
        for epoch, round_, kind, selection, count, value_type, digest in metadata["history"]:
            plan = RoundPlan(round_, RoundKind(kind), SelectionKind(selection), count, ValueType(value_type))
            replica.history.append(HistoryEntry(Position(epoch, round_), plan, digest))
        if vector.size != layout.dimension or statistics.size != layout.statistics_size:
            raise MalformedError(f"a saved state of {vector.size} values for a model of {layout.dimension}")
        if residual is not None and residual.size != vector.size:
            raise MalformedError(f"a residual of {residual.size} values for a model of {vector.size}")
        return SavedState(
            bytes.fromhex(metadata["run_id"]),
            metadata["epoch"],
            RunConfig(**config),
            layout,
            replica,
            residual,
            metadata["elapsed_s"],
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise MalformedError(f"a saved state that does not make sense: {error!r}") from None
