"""What a server has of a worker's contribution to the open round, for those who watch."""

from __future__ import annotations

from enum import StrEnum

from loscar_core.server_round import ServerRound

MOST_PARTS = 64
"""Of a round, looked at for each worker."""


class Exchange(StrEnum):
    """What is here of a contribution."""

    NONE = "none"
    """No round is open, or this one does not count the worker."""
    AWAITED = "awaited"
    """Nothing yet."""
    ARRIVING = "arriving"
    """Some parts, not all."""
    WHOLE = "whole"
    """All of it: the round waits for others."""


def exchange_of(slot: int, open_round: ServerRound | None) -> Exchange:
    """What is here from a slot's worker."""
    if open_round is None or slot not in open_round.slots:
        return Exchange.NONE
    here = [open_round.has(slot, part) for part in range(min(MOST_PARTS, len(open_round.parts)))]
    if all(here):
        return Exchange.WHOLE
    return Exchange.ARRIVING if any(here) else Exchange.AWAITED
