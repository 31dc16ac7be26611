"""LOSCAR-SGD itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from loscar_core.merge import MergeKind
from loscar_core.methods.base import Arrival, Merged, Method, V, merged_by


@dataclass(frozen=True)
class LoscarSgd(Method):
    """Sparse rounds whose average is merged late, with the steps taken meanwhile kept (or, to compare, overwritten)."""

    name = "loscar"
    summary = "sparse, overlapped Local SGD with the delay-corrected merge (or --merge overwrite)"
    source = "LOSCAR-SGD, arXiv 2605.20866"

    by_coordinate = True

    kind: MergeKind = field(default=MergeKind.DELAY_CORRECTED, metadata={"option": False})

    @property
    def uses_merge(self) -> bool:
        return True

    def with_merge(self, kind: MergeKind) -> LoscarSgd:
        return replace(self, kind=kind)

    def merge(self, arrival: Arrival[V]) -> Merged[V]:
        return merged_by(self.kind, arrival)
