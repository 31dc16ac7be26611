"""Which worker's anchor a server that lost its state takes over.

The rule: once a majority of the last round's members has said hello (or after a wait), adopt the furthest anchor,
but none that is more than one round beyond what a majority vouches for, and none whose digest chain does not pass
through the majority's. So neither a liar with a far position nor a lone worker cut off at a standby moves the run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from loscar_core.messages import Hello
from loscar_core.state import Position


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's word about its anchor."""

    peer: int
    position: Position
    digest: int
    members: int
    chain: tuple[tuple[Position, int], ...]

    @classmethod
    def of(cls, peer: int, hello: Hello) -> Claim:
        chain = {e.position: e.digest for e in hello.recent}
        chain[hello.position] = hello.digest
        return cls(peer, hello.position, hello.digest, hello.members, tuple(sorted(chain.items())))

    def vouches_for(self, position: Position, digest: int) -> bool:
        """This worker holds the round, with the same consensus."""
        return (position, digest) in self.chain


@dataclass(frozen=True, slots=True)
class Choice:
    """Whose anchor to ask for, and why."""

    peer: int
    position: Position
    vouchers: int
    by_majority: bool


def choose(claims: list[Claim], *, waited: bool) -> Choice | None:
    """Pick the anchor to adopt.

    Args:
        claims: one per worker that holds a position.
        waited: `--recover-after` has passed, so fewer than a majority may decide.

    Returns:
        None while it is too early to decide.
    """
    if not claims:
        return None
    # Who was in the last round is what the furthest plausible claims say; a single claim cannot inflate it.
    members = Counter(c.members for c in claims).most_common(1)[0][0]
    needed = members // 2 + 1
    if len(claims) < needed and not waited:
        return None
    threshold = min(needed, len(claims) // 2 + 1) if waited else needed
    # The furthest point that enough workers hold with the same digest.
    points = Counter(point for c in claims for point in set(c.chain))
    vouched = [(point, n) for point, n in points.items() if n >= threshold]
    if not vouched:
        if not waited:
            return None
        vouched = [(point, n) for point, n in points.items() if n == max(points.values())]
    (position, digest), vouchers = max(vouched, key=lambda item: item[0][0])
    acceptable = [c for c in claims if c.vouches_for(position, digest) and c.position.round <= position.round + 1]
    best = max(acceptable, key=lambda c: (c.position, -c.peer), default=None)
    if best is None:
        return None
    return Choice(best.peer, best.position, vouchers, vouchers >= needed)
