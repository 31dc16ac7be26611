"""Random schedules: a run that is cut, killed and crashed at seeded moments, checked against the book all the way.

What is lost is bounded by an assumption, which the schedules keep (`Chaos.covered`): a server dies only while more than
half of the workers that know the run hold the furthest round or the one before it, and those that are further behind
are too few to be a majority of the round that they last saw. (The furthest has then forgotten nothing that could still
be taken back.) Without it a recovery may undo what nobody can give back, and says so.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from cluster import Cluster, SimWorker

from loscar_core.config import RunConfig, ServerLimits
from loscar_core.errors import LoscarError, RefusedError, SupersededError, WrongRoundError
from loscar_core.messages import WorkerReport
from loscar_core.selection import SelectionKind
from loscar_core.server_machine import ServerMachine
from loscar_core.server_state import Phase
from loscar_core.values import ValueType


@dataclass
class Chaos:
    """What may happen, and how often; probabilities are per event.

    Attributes:
        workers: how many, each with its own pace.
        rounds: of the run, before the final one.
        cut, kill, crash: how likely a stream breaks, the server dies, a worker's process dies and is replaced.
        cuts, kills, crashes: how often at most.
        zombies: a dead server may only have been cut off: it goes on with what it has received, and workers may
            come back to it by mistake.
        standby: there is a second address with a server that waits; workers try the two in turn, and do not stay
            where there is no run for long. A server that died is away for a while, so the run moves between the two.
        replays: how likely a worker sends again what it has sent before.
        jumps: how likely the clock leaps ahead, now and then beyond all leases; workers send heartbeats.
        deadlines: rounds do not wait for everybody.
        slow: some workers train or receive much more slowly than others.
        backlog: `max_backlog_rounds`.
        observers, joiners: who else takes part; joiners come while rounds go on.
        stops: the run may be told to stop early (and told again after a server's death).
        late_snapshots: values are handed over some time after they were taken.
    """

    workers: tuple[int, ...] = (2, 3, 4, 5)
    rounds: int = 12
    cut: float = 0.0
    kill: float = 0.0
    crash: float = 0.0
    cuts: int = 12
    kills: int = 4
    crashes: int = 3
    zombies: bool = False
    standby: bool = False
    replays: float = 0.0
    jumps: float = 0.0
    deadlines: bool = False
    slow: bool = False
    backlog: int = 8
    observers: int = 0
    joiners: int = 0
    stops: bool = False
    late_snapshots: bool = True
    statistics: tuple[int, ...] = (0, 3)
    dimension: int = 40
    density: tuple[float, ...] = (0.2, 0.5, 1.0)
    selections: tuple[SelectionKind, ...] = (
        SelectionKind.SWEEP,
        SelectionKind.RANDOM,
        SelectionKind.ALL,
        SelectionKind.TOPK,
    )
    value_type: ValueType = ValueType.FLOAT32
    limits: dict[str, float] = field(default_factory=dict)
    events: int = 150_000

    def run(self, seed: int, *, watchful: bool = True) -> Cluster:
        """One whole run.

        Args:
            watchful: check everything whenever it changes, and not only at the end.

        Raises:
            AssertionError: a property is violated, or the run does not end.
            LoscarError: somebody was refused who should not have been.
        """
        schedule = _Schedule(self, seed)
        schedule.cluster.watchful = watchful
        return schedule.run()


class _Schedule:
    def __init__(self, chaos: Chaos, seed: int) -> None:
        self.chaos = chaos
        self.random = random.Random(f"schedule {seed}")
        pick = self.random.choice
        n = pick(chaos.workers)
        config = RunConfig(
            seed=seed,
            rounds=chaos.rounds,
            density=pick(chaos.density),
            selection=pick(chaos.selections),
            value_type=chaos.value_type,
            local_steps=pick([0, 1, 3]),
            overlap_steps=pick([None, 1, 4]),
        )
        limits = ServerLimits(
            workers=n,
            lease_s=30.0 if chaos.jumps else 1e6,
            heartbeat_s=1.0,
            round_cap_s=2.0 if chaos.deadlines else 1e6,
            recover_after_s=100.0,
            start_grace_s=1.0,
            slot_reserve_s=20.0,
            max_backlog_rounds=chaos.backlog,
        )
        limits = replace(limits, **chaos.limits)  # type: ignore[arg-type]
        self.cluster = Cluster(
            n, config, dimension=chaos.dimension, statistics=pick(chaos.statistics), seed=seed, limits=limits
        )
        self.cluster.late_snapshots = chaos.late_snapshots
        self.cluster.retried = (WrongRoundError, RefusedError)  # who has lost its way tries again, or elsewhere
        for i in range(chaos.observers):
            self.cluster.add_worker(f"o{i}", observer=True)
        if chaos.slow:
            for worker in self.cluster.workers:
                worker.speed = pick([1.0, 1.0, 0.2, 0.05])
                worker.link = pick([1.0, 1.0, 0.3, 0.1])
        self.joiners = chaos.joiners
        self.cuts = self.kills = self.crashes = 0
        self.stopping = False
        self.away: dict[SimWorker, float] = {}
        self.addresses: list[ServerMachine | None] = [self.cluster.server]
        self.dead: ServerMachine | None = None
        self.returns = 0.0
        """When the address at which nobody answers does so again."""
        self.tried: dict[SimWorker, int] = {}
        self.patience: dict[SimWorker, float] = {}
        if chaos.standby:
            self.addresses.append(self.cluster.add_standby())

    def run(self) -> Cluster:
        cluster = self.cluster
        cluster.expected = (SupersededError,) if self.chaos.crash else ()
        for worker in cluster.workers:
            cluster.connect(worker)
        for _ in range(self.chaos.events):
            if all(w.out for w in cluster.workers if not w.observer):
                break
            self._happen()
            cluster.step()
        else:
            raise AssertionError(f"no end\n{cluster.describe()}")
        for worker in [w for w in cluster.workers if w.observer and w.stream is not None]:
            cluster.drain(worker)
            assert worker.engine.anchor.position == cluster.machine.replica.position  # type: ignore[union-attr]
        cluster.check_end()
        return cluster

    # --- what happens ---------------------------------------------------------------------------------------

    def _happen(self) -> None:
        cluster, chaos, chance = self.cluster, self.chaos, self.random.random
        if chance() < chaos.cut and self.cuts < chaos.cuts:
            worker = self.random.choice(cluster.workers)
            if not worker.out and self._may_go(worker):
                cluster.cut(worker, noticed=chance() < 0.5)
                self.cuts += 1
        for worker in cluster.workers:
            if worker.stream is None and not worker.out and chance() < 0.02 and self.away.get(worker, 0) <= cluster.now:
                self._come_back(worker)
        if self.joiners and chance() < 0.003 and self._round() > 0:
            self.joiners -= 1
            joiner = cluster.add_worker(f"j{self.joiners}", seed=self.joiners + 1)
            self._come_back(joiner)
        if chance() < chaos.crash and self.crashes < chaos.crashes and cluster.machine.phase is Phase.RUNNING:
            worker = self.random.choice(cluster.workers)
            if not worker.out and not worker.observer and self._may_go(worker, forever=True):
                self.crashes += 1
                self._come_back(cluster.crash(worker, noticed=chance() < 0.5))
        if chance() < chaos.kill and self.kills < chaos.kills and None not in self.addresses and self._covered():
            self.kills += 1
            self._choose_comebacks()
            self._kill(zombie=chaos.zombies and self._round() > 0 and chance() < 0.5)
            self.stopping = False
        if chaos.stops and not self.stopping and self._round() > chaos.rounds // 3 and chance() < 0.005:
            self.stopping = True
            cluster.carry_out(cluster.machine, cluster.machine.request_stop("enough", cluster.now))

        if chaos.standby:
            self._failover()
        self._look_elsewhere()
        if chance() < chaos.replays:
            self._replay(self.random.choice(cluster.workers))
        if chaos.jumps:
            self._beat_and_jump()

    def _kill(self, *, zombie: bool) -> None:
        cluster = self.cluster
        self._note_what_stays()
        if not self.chaos.standby:
            cluster.kill_server(zombie=zombie)
            cluster.start_server()
            return
        dead = cluster.machine
        at = self.addresses.index(dead)
        if self.addresses[1 - at].replica is not None:  # type: ignore[union-attr]
            self._replace(1 - at)
        cluster.kill_server(zombie=zombie)
        self.dead, self.addresses[at] = dead if zombie else None, None
        self.returns = cluster.now + self.random.choice([0.0, 5.0, 20.0])
        other = next(s for s in self.addresses if s is not None)
        cluster.zombies.remove(other)
        cluster.server = other

    def _replace(self, at: int) -> None:
        """A stale server does not stay for ever: a new process waits in its place."""
        stale = self.addresses[at]
        assert stale is not None
        for worker in self.cluster.workers:
            if worker.stream is not None and worker.stream.server is stale:
                self.cluster.cut(worker)
        self.cluster.zombies.remove(stale)
        self.addresses[at] = self.cluster.add_standby()

    def _restart(self) -> None:
        """Somebody answers again at the address that was silent: a new process, or the old one with all it knew."""
        cluster, silent = self.cluster, self.addresses.index(None)
        if self.dead is None:
            self.addresses[silent] = cluster.add_standby()
        else:
            self.addresses[silent] = self.dead  # it has been among the zombies all the while

    def _failover(self) -> None:
        """The server that holds the run is the one that is meant."""
        cluster = self.cluster
        # A server that was only cut off is back when the others have gone on without it.
        may_return = self.dead is None or cluster.machine.phase in (Phase.RUNNING, Phase.FINISHED)
        if None in self.addresses and cluster.now >= self.returns and may_return:
            self._restart()
        for other in [s for s in self.addresses if s is not None and s is not cluster.server]:
            ours = cluster.machine
            on, off = ((s.phase in (Phase.RUNNING, Phase.FINISHED), s.epoch) for s in (other, ours))
            if on > off and on[0]:
                cluster.zombies.remove(other)
                cluster.zombies.append(ours)
                cluster.server = other

    def _look_elsewhere(self) -> None:
        """Workers do not stay for long where there is no run, when there is another address."""
        cluster = self.cluster
        for worker in cluster.workers:
            stream = worker.stream
            if stream is None or worker.engine.plan is not None or worker.out:
                self.patience.pop(worker, None)
                continue
            if not self.chaos.standby and stream.server is cluster.server:
                continue
            first = stream.server is self.addresses[0]
            until = self.patience.setdefault(
                worker, cluster.now + self.random.uniform(0.5, 1.5) * (30 if first else 10)
            )
            if cluster.now >= until:
                cluster.cut(worker, noticed=self.random.random() < 0.5)

    def _replay(self, worker: SimWorker) -> None:
        """The worker sends something again that it has sent to this server before."""
        engine, stream = worker.engine, worker.stream
        records = [r for r in engine.ledger.all() if r.messages[0].epoch == engine.epoch]
        if stream is None or not records or worker.followed is not stream.server:
            return
        record = self.random.choice(records)
        if record.decided or (worker.open is not None and worker.open.plan == record.plan):
            stream.up.extend(record.messages)

    def _beat_and_jump(self) -> None:
        cluster = self.cluster
        worker = self.random.choice(cluster.workers)
        if worker.stream is not None and self.random.random() < 0.1:
            worker.stream.up.append(worker.engine.heartbeat(0, WorkerReport()))
        if self.random.random() < self.chaos.jumps and cluster.machine.phase is Phase.RUNNING and self._covered():
            cluster.pass_time(self.random.choice([1.0, 20.0, 100.0]))

    def _round(self) -> int:
        state = self.cluster.machine.replica
        return 0 if state is None else state.position.round

    def _choose_comebacks(self) -> None:
        """The order in which workers find a new server decides what it adopts: now and then the furthest come last,
        or those that are furthest behind come first."""
        known = [w for w in self.cluster.workers if not w.out and not w.observer]
        known.sort(key=lambda w: w.engine.anchor.position.round)
        how = self.random.random()
        now = self.cluster.now
        late = known[-1:] if how < 0.4 else known[1:] if how < 0.6 else []
        self.away = {w: now + self.random.uniform(0, 5 if self.chaos.standby else 15) for w in late}

    def _come_back(self, worker: SimWorker) -> None:
        """Connect, now and then to a server that others have left behind: it must not get a worker that has been at
        its successor."""
        cluster = self.cluster
        if self.chaos.standby:
            attempt = self.tried[worker] = self.tried.get(worker, -1) + 1
            server = self.addresses[attempt % len(self.addresses)]
            if server is not None:
                cluster.connect(worker, server)
            return
        for zombie in cluster.zombies:
            if worker.followed is cluster.machine and self.random.random() < 0.3:
                expected, cluster.expected = cluster.expected, (WrongRoundError,)
                cluster.connect(worker, zombie)
                cluster.deliver_up(worker)
                cluster.expected = expected
                if worker.stream is not None:
                    return  # it goes on there
                worker.error = None
        cluster.connect(worker)

    # --- what the schedules keep ----------------------------------------------------------------------------

    def _may_go(self, worker: SimWorker, *, forever: bool = False) -> bool:
        """A minority is away at a time, also of the last round's members; whoever dies for good is not missed by a
        recovery."""
        cluster = self.cluster
        live = [w for w in cluster.workers if not w.out and not w.observer]
        here = [w for w in cluster.active() if w in live and w is not worker]
        if worker.observer:
            return True
        if self.chaos.kill == 0:
            return not forever or len(here) > 0
        if self.chaos.standby:
            here = [w for w in here if w.stream is not None and w.stream.server is cluster.server]
            state = cluster.machine.replica
            if state is not None and len(live) - len(here) > state.members // 2:
                return False
        return 2 * len(here) > len(live)

    def _note_what_stays(self) -> None:
        """The furthest state, when a majority holds it and the others cannot be taken for one."""
        cluster = self.cluster
        known = [w for w in cluster.workers if not w.out and not w.observer and w.engine.initialised]
        if not known or cluster.book is None:
            return
        top = max((w.engine.anchor for w in known), key=lambda a: (a.position.round, a.position.epoch))
        others = [w for w in known if (w.engine.anchor.position, w.engine.anchor.digest) != (top.position, top.digest)]
        needed = min((w.engine.anchor.members // 2 + 1 for w in others), default=len(known))
        node = cluster.book.node_of(top)
        if node is not None and node.parent is not None and 2 * len(others) < len(known) and len(others) < needed:
            cluster.kept.append(node)

    def _covered(self) -> bool:
        cluster = self.cluster
        if cluster.machine.phase is Phase.FINISHED or cluster.book is None:
            return False
        known = [w for w in cluster.workers if not w.out and not w.observer and w.engine.initialised]
        rounds = [w.engine.anchor.position.round for w in known]
        if not known or max(rounds) == 0:
            return True
        furthest = max(known, key=lambda w: (w.engine.anchor.position.round, w.engine.anchor.position.epoch))
        top = cluster.book.node_of(furthest.engine.anchor)
        assert top is not None
        chain = {id(node) for node in top.chain()}
        close = []
        for w in known:
            node = cluster.book.node_of(w.engine.anchor)
            assert node is not None
            before = node.parent if id(node) not in chain else node
            if node.position.round >= top.position.round - 1 and (before is None or id(before) in chain):
                close.append(w)
        behind = [w for w in known if w not in close]
        few = all(w.engine.anchor.members // 2 + 1 > len(behind) for w in behind)
        return 2 * len(close) > len(known) and few


def first_failure(chaos: Chaos, seeds: range) -> tuple[int, str] | None:
    """The first seed whose schedule breaks something, and what."""
    for seed in seeds:
        try:
            chaos.run(seed)
        except (AssertionError, LoscarError, IndexError, KeyError, ValueError) as error:
            return seed, f"{type(error).__name__}: {error}"
    return None
