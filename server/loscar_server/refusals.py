"""Who was refused, for what and how often: a bounded table, whoever knocks."""

from __future__ import annotations

from dataclasses import dataclass

from loscar_core.errors import LoscarError

MAX_ENTRIES = 256
MAX_NAME = 200
MAX_DETAIL = 300


@dataclass(slots=True)
class Refusal:
    """One peer's refusals of one kind.

    Attributes:
        address: the host it called from; empty in the sum over those that are not listed any more.
        name: the worker's name, as far as it told one.
        kind: the error's class.
        count: how often.
        detail: the last reason.
        at_s: when that was, on the server clock.
    """

    address: str
    name: str
    kind: str
    count: int = 0
    detail: str = ""
    at_s: float = 0.0


class Refusals:
    """Refusals by address, name and kind.

    Names and addresses are the callers' choice, so only the latest `MAX_ENTRIES` are listed; what has to make room
    is added up by kind, and the totals stay right.
    """

    def __init__(self) -> None:
        self._listed: dict[tuple[str, str, str], Refusal] = {}  # the longest ago first
        self._others: dict[str, Refusal] = {}

    def note(self, address: str, name: str, error: LoscarError, now: float) -> bool:
        """Count a refusal; returns whether it is the first of its kind that is listed for this peer."""
        key = address, _line(name, MAX_NAME), type(error).__name__
        entry = self._listed.pop(key, None)
        first = entry is None
        if entry is None:
            entry = Refusal(*key)
        self._listed[key] = entry
        self._add(entry, 1, _line(str(error), MAX_DETAIL), now)
        if len(self._listed) > MAX_ENTRIES:
            oldest = self._listed.pop(next(iter(self._listed)))
            others = self._others.setdefault(oldest.kind, Refusal("", "", oldest.kind))
            self._add(others, oldest.count, oldest.detail, oldest.at_s)
        return first

    def entries(self) -> list[Refusal]:
        """The latest first, then the sums over the others."""
        return [*reversed(self._listed.values()), *self._others.values()]

    def by_kind(self) -> dict[str, int]:
        """How often each kind of error was a refusal's reason."""
        totals: dict[str, int] = {}
        for entry in self.entries():
            totals[entry.kind] = totals.get(entry.kind, 0) + entry.count
        return totals

    @staticmethod
    def _add(entry: Refusal, count: int, detail: str, at_s: float) -> None:
        entry.count += count
        entry.detail = detail
        entry.at_s = at_s


def _line(text: str, limit: int) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:limit])
