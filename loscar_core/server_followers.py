"""Bringing members to the state: catching up by value, and a live worker's progress for newcomers."""

from __future__ import annotations

import numpy as np

from loscar_core.effects import Notice
from loscar_core.errors import MalformedError, WrongRoundError
from loscar_core.messages import OpenRound, Purpose, SendState, VectorChunk
from loscar_core.plan import RoundPlan, end_plan
from loscar_core.server_catchup import next_slice, plan_catch_up, resume
from loscar_core.server_members import Member
from loscar_core.server_state import Phase, RunState
from loscar_core.state import Lineage, Position
from loscar_core.values import require_finite


class Followers(RunState):
    """Catch-ups and clones; see `server_catchup` for what a member lacks."""

    def _catch_up_from_hello(self, member: Member) -> None:
        hello, state = member.hello, self.replica
        assert state is not None
        if hello.position.round == 0:
            # A fresh worker that holds the initial model already lacks nothing while no round is closed.
            same = state.position.round == 0 and hello.vector_checksum == state.digest and not member.observer
            self._catch_up(member, Lineage(), 0 if same else None)
            return
        held = hello.position.round
        shared = state.lineage.last_common_round(state.position.round, hello.lineage, held)
        if held > state.position.round and not shared and not member.observer:
            # Taking it back would throw its run away for one that has hardly begun.
            raise WrongRoundError(
                f"{member.name} holds round {held} of this run, which was begun anew here and is in round "
                f"{state.position.round}: restart this server to recover the older state"
            )
        known = state.digest_at(hello.position)
        if known is not None and known != hello.digest:
            self._out.append(Notice(f"{member.name}: its replica differs at {hello.position}: sending all of it"))
            self._catch_up(member, hello.lineage, None)
        else:
            digests = {e.position: e.digest for e in hello.recent} | {hello.position: hello.digest}
            self._catch_up(member, hello.lineage, held, tuple(e.plan for e in hello.recent), digests)

    def _catch_up(
        self,
        member: Member,
        lineage: Lineage,
        round_: int | None,
        recent: tuple[RoundPlan, ...] = (),
        digests: dict[Position, int] | None = None,
    ) -> None:
        assert self.replica is not None
        announcement, stream = plan_catch_up(
            self.replica, self.config.seed, lineage, round_, recent, digests, member.slice_values
        )
        patch, partial = None, member.partial
        if announcement.full and stream is not None and partial is not None:
            announcement, stream, patch = resume(self.replica, self.config.seed, announcement, stream, partial)
        member.partial = None
        member.stream = stream
        member.following = True
        member.ready = False
        member.behind = 0
        member.sent_round = self.replica.position.round
        self._send(member, announcement)
        while patch is not None and patch.offset < patch.total:
            self._send(member, next_slice(self.replica, patch))
        if stream is not None and stream.indices is not None:
            while member.stream is not None:
                self._stream_on(member)  # a partial catch-up leaves no room for a commit in between
        if self.phase is Phase.FINISHED:
            self._send(member, OpenRound(end_plan(member.sent_round + 1), self.elapsed_s(self._now)))
        elif self.phase is Phase.RUNNING and self.round is not None:
            self._send(member, OpenRound(self.round.plan, self.elapsed_s(self._now)))
            for answer in self.round.closed_answers():
                self._send(member, answer)
        if member.stream is not None:
            self._stream_on(member)

    def _stream_on(self, member: Member) -> None:
        assert member.stream is not None
        assert self.replica is not None
        self._send(member, next_slice(self.replica, member.stream))
        if member.stream.offset == member.stream.total:
            member.stream = None

    def _clone(self, member: Member) -> None:
        """Give a newcomer a live worker's unsent progress.

        At low density the consensus is far behind the live models: a newcomer that starts from it would drag the
        average back. Without a donor it starts from the consensus all the same.
        """
        state = self.replica
        if member.cloned or state is None or self.phase is not Phase.RUNNING or self.round is None:
            return
        member.cloned = True
        sparse = self.config.count(state.vector.size) < self.limits.clone_below * state.vector.size
        if member.hello.position.round > 0 or state.position.round == 0 or not sparse:
            return
        donors = [m for m in self.members.active() if m.peer not in self._relays and m is not member]
        if donors:
            donor = max(donors, key=lambda m: (m.contributed, -m.slot))
            self._relays[donor.peer] = (member.peer, 0)
            self._out.append(Notice(f"{member.name} starts where {donor.name} is"))
            self._send(donor, SendState(Purpose.PROGRESS))

    def _relay(self, donor: Member, chunk: VectorChunk) -> None:
        if self.replica is None or donor.peer not in self._relays:
            return  # no longer wanted
        peer, relayed = self._relays[donor.peer]
        newcomer = self.members.by_peer.get(peer)
        size = self.replica.vector.size
        count = len(chunk.values) // 4
        if chunk.total != size or chunk.offset != relayed or len(chunk.values) % 4 or not 0 < count <= size - relayed:
            raise MalformedError(f"a chunk of progress at {chunk.offset} of {chunk.total}; {relayed} was next")
        require_finite(np.frombuffer(chunk.values, "<f4"), "a worker's progress")
        if newcomer is not None:  # it may have left: then the rest goes nowhere
            self._send(newcomer, chunk)
        if relayed + count == size:
            del self._relays[donor.peer]
        else:
            self._relays[donor.peer] = (peer, relayed + count)
