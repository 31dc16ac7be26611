"""The truth about a run, kept beside the machines: what every committed state is made of.

The book is told each contribution when it is taken and each commit when it happens. It shares no arithmetic with the
machines: sums are float64, and who is in comes from the round's own list of contributors, not from the inclusion
table. From it follow the properties that everything else serves:

    a   c = the parent's c + (1/n) Σ of the included δ̂, round by round and in total
    b   x − a = the worker's own steps − its contributions that are in the state that a replicates
    c   equal states are equal bit for bit
    d   a state's round follows its parent's, and no contribution is in a state twice
    e   the ledger's counters are the numbers of contributions that are in, are not in, and are undecided
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from loscar_core.messages import Contribution
from loscar_core.plan import Part, RoundPlan
from loscar_core.replica import Replica
from loscar_core.server_machine import ServerMachine
from loscar_core.server_round import ServerRound
from loscar_core.state import Included, Lineage, Position

Doubles = NDArray[np.float64]


@dataclass(eq=False)
class Taken:
    """One contribution as its worker took it."""

    incarnation: bytes
    plan: RoundPlan
    indices: NDArray[np.int64]
    sent: NDArray[np.float32]
    statistics: NDArray[np.float32]
    parts: tuple[Part, ...]
    messages: tuple[Contribution, ...]
    dimension: int

    def dense(self, mask: int) -> Doubles:
        """δ̂ on the parts of a bitmap, in all coordinates."""
        found = np.zeros(self.dimension)
        for part in self.parts:
            if not part.statistics and mask >> part.index & 1:
                found[self.indices[part.start : part.stop]] = self.sent[part.start : part.stop]
        return found


@dataclass(eq=False)
class Node:
    """One committed state."""

    position: Position
    digest: int
    parent: Node | None
    plan: RoundPlan | None
    members: int
    included: dict[bytes, tuple[Taken, int]]
    vector: NDArray[np.float32]
    statistics: NDArray[np.float32]
    residual: NDArray[np.float32] | None
    table: dict[bytes, Included]
    lineage: Lineage
    own: dict[bytes, Doubles] = field(default_factory=dict)
    """Per incarnation: the sum of its contributions that are in."""
    count: dict[bytes, int] = field(default_factory=dict)
    """Per incarnation: how many of its contributions are in, at least in part."""

    def chain(self) -> list[Node]:
        """From the run's start to this state."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


class Book:
    """All states of a run, whichever server process closed them."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[Position, int], Node] = {}
        self.taken: dict[bytes, list[Taken]] = {}
        self.adoptions = 0
        self._held: dict[int, tuple[Replica, Node]] = {}

    def take(self, taken: Taken) -> None:
        self.taken.setdefault(taken.incarnation, []).append(taken)

    def node_of(self, state: Replica) -> Node | None:
        return self.nodes.get((state.position, state.digest))

    def hold(self, machine: ServerMachine) -> Node:
        """The state that a server holds; a new one must be a start, or one that some server had committed."""
        state = machine.replica
        assert state is not None
        held = self._held.get(id(machine))
        if held is not None and held[0] is state:
            return held[1]
        node = self.node_of(state)
        if node is None:
            assert state.position.round == 0, f"a server took over {state.position}, which nobody committed"
            node = self._note(Node(**_of(state), parent=None, plan=None, members=0, included={}, residual=None))
        else:
            self.adoptions += 1
            self.check_equal(state, node, "the state that a server took over")
        self._held[id(machine)] = (state, node)
        return node

    def _note(self, node: Node) -> Node:
        key = (node.position, node.digest)
        assert key not in self.nodes, f"{node.position} was committed twice"
        self.nodes[key] = node
        return node

    def committed(self, machine: ServerMachine, current: ServerRound, parent: Node, since: NDArray[np.float32]) -> None:
        """A server has just committed a round on top of `parent`, where its residual was `since`."""
        state, plan = machine.replica, current.plan
        assert state is not None
        included: dict[bytes, tuple[Taken, int]] = {}
        for part in current.parts:
            for slot in sorted(current.contributors(part.index)):
                incarnation = current.slots[slot]
                taken = next(t for t in reversed(self.taken[incarnation]) if t.plan == plan)
                included[incarnation] = taken, included.get(incarnation, (taken, 0))[1] | 1 << part.index
        node = Node(
            **_of(state),
            parent=parent,
            plan=plan,
            members=max(1, len(current.slots)),
            included=included,
            residual=None if machine.residual is None else machine.residual.copy(),
        )
        self._check_step(node, parent, since, current.parts)
        for each in parent.chain():
            for incarnation, (taken, mask) in included.items():
                other, before = each.included.get(incarnation, (None, 0))
                assert other is not taken or not before & mask, "a contribution is in twice"
        node.own, node.count = dict(parent.own), dict(parent.count)
        for incarnation, (taken, mask) in included.items():
            node.own[incarnation] = node.own.get(incarnation, np.zeros(taken.dimension)) + taken.dense(mask)
            node.count[incarnation] = node.count.get(incarnation, 0) + 1
        self._note(node)
        self._held[id(machine)] = (state, node)

    def _check_step(self, node: Node, parent: Node, since: NDArray[np.float32], parts: tuple[Part, ...]) -> None:
        plan = node.plan
        assert plan is not None
        assert node.position.round == parent.position.round + 1
        assert node.position.epoch >= parent.position.epoch
        expected = parent.vector.astype(np.float64)
        for taken, mask in node.included.values():
            expected += taken.dense(mask) / node.members
        if node.residual is not None:
            expected += since.astype(np.float64) - node.residual
        np.testing.assert_allclose(node.vector, expected, rtol=0, atol=2e-4, err_msg=f"c of {node.position}")
        for part in parts:
            if part.statistics:
                at = slice(part.start, part.stop)
                values = [t.statistics[at] for t, mask in node.included.values() if mask >> part.index & 1]
                mean = np.mean(values, axis=0, dtype=np.float64) if values else parent.statistics[at]
                np.testing.assert_allclose(node.statistics[at], mean, rtol=0, atol=1e-4)
        table = dict(parent.table)
        for incarnation, (_, mask) in node.included.items():
            table[incarnation] = Included(node.position.round, mask)
        assert node.table == table, f"the inclusion table of {node.position}"

    # --- checks ---------------------------------------------------------------------------------------------

    def check_equal(self, state: Replica, node: Node, whose: str) -> None:
        """(c) a replica is the state that it says it is, bit for bit."""
        assert state.vector.tobytes() == node.vector.tobytes(), f"{whose}: the vector at {state.position}"
        assert state.statistics.tobytes() == node.statistics.tobytes(), f"{whose}: the statistics at {state.position}"
        assert state.inclusion.entries() == node.table, f"{whose}: the inclusion table at {state.position}"
        assert state.lineage == node.lineage, f"{whose}: the lineage at {state.position}"

    def check_total(self, node: Node, tolerance: float = 1e-3) -> None:
        """(a) over the whole winning lineage, and (d) once more."""
        chain = node.chain()
        total = chain[0].vector.astype(np.float64)
        seen: dict[Taken, int] = {}
        for before, each in pairwise(chain):
            assert each.position.round == before.position.round + 1
            assert each.position > before.position
            for taken, mask in each.included.values():
                assert not seen.get(taken, 0) & mask
                seen[taken] = seen.get(taken, 0) | mask
                total += taken.dense(mask) / each.members
        lost = np.zeros(total.size) if node.residual is None else node.residual.astype(np.float64)
        for before, each in pairwise(chain):
            # What quantisation left with the server is lost with the server: it stays in nobody's state.
            if before.residual is not None and each.position.epoch != before.position.epoch:
                lost += before.residual
        np.testing.assert_allclose(node.vector, total - lost, rtol=0, atol=tolerance)


def _of(state: Replica) -> dict[str, object]:
    return {
        "position": state.position,
        "digest": state.digest,
        "vector": state.vector.copy(),
        "statistics": state.statistics.copy(),
        "table": state.inclusion.entries(),
        "lineage": state.lineage,
    }
