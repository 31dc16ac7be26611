"""What a server tells Prometheus: outcomes of contributions, counts by fixed labels, a number of series that stays."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from desk import Desk
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry
from scraping import Scrape, check_conventions

from loscar_core import effects as fx
from loscar_core.errors import MalformedError, RefusedError
from loscar_core.messages import Heartbeat, Leave, Reason, WorkerReport
from loscar_core.plan import RoundKind
from loscar_core.selection import SelectionKind
from loscar_server.metrics import KINDS, OUTCOMES, ServerMetrics
from loscar_server.service import ParameterService

ACTIONS = [*["part"] * 6, *["all"] * 4, "come", "ready", "ready", "drop", "leave", "break", "late"]


class CountedDesk(Desk):
    """A desk whose server is counted. Rounds have two parts: values, and statistics."""

    def __init__(self, **options: object) -> None:
        super().__init__(statistics=2, **options)  # type: ignore[arg-type]
        self.metrics = ServerMetrics()
        self.service = ParameterService(self.machine, None, lambda _: None)
        self.loop = asyncio.new_event_loop()
        self.metrics.watch(self.service, self.loop)

    def _carry(self, effects: list[fx.ServerEffect]) -> list[fx.ServerEffect]:
        carried = super()._carry(effects)
        for effect in effects:
            if not isinstance(effect, (fx.Send, fx.Close)):
                self.metrics.note(effect)
        return carried

    def scrape(self) -> Scrape:
        """What an endpoint would answer, by way of the text."""
        registry = CollectorRegistry()
        running = threading.Thread(target=self.loop.run_forever)
        running.start()
        try:
            registry.register(self.metrics)
            text = generate_latest(registry).decode()
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            running.join()
        return Scrape(text_string_to_metric_families(text))

    def contributions(self) -> dict[tuple[str, str], float]:
        """(outcome, reason) -> how many, those of which there are any."""
        found = self.scrape().nonzero("loscar_server_contributions_total")
        return {(dict(labels)["outcome"], dict(labels)["reason"]): count for labels, count in found.items()}


@contextlib.contextmanager
def counted(**options: object) -> Iterator[CountedDesk]:
    desk = CountedDesk(**options)
    try:
        yield desk
    finally:
        desk.loop.close()


# --- contributions ------------------------------------------------------------------------------------------


def test_every_contribution_of_a_round_has_one_outcome() -> None:
    with counted(limits={"round_cap_s": 100.0}) as desk:
        desk.start(1, 2, 3, 4, 5, 6, 7, 8, 9)
        opened = desk.now
        for whole in (1, 2, 3, 4):
            desk.contribute(whole)
        desk.drop(4)  # all of it had come: it counts
        desk.send(5, desk.contribution(part=0))  # and no more: late
        desk.send(6, desk.contribution(part=0))
        desk.drop(6)
        desk.send(7, desk.contribution(values=np.full(8, np.nan, np.float32).tobytes()))
        desk.send(8, Leave(Reason.FAILED, "of its own"))
        assert desk.contributions() == {}, "the round is open"
        desk.tick(opened + 100)  # 9 has sent nothing
        assert desk.round == 1
        [committed] = desk.logged(fx.RoundCommitted)
        assert desk.contributions() == {
            ("included", "whole"): 4,
            ("partial", "late"): 1,
            ("partial", "stream-closed"): 1,
            ("refused", "NonFiniteError"): 1,
            ("missed", "failed"): 1,
            ("missed", "late"): 1,
        }
        assert sum(desk.contributions().values()) == committed.members == 9
        found = desk.scrape()
        assert found.value("loscar_server_round_seconds_count") == 1
        assert found.value("loscar_server_round_seconds_sum") == 100
        assert found.value("loscar_server_round_seconds_bucket", le="60.0") == 0
        assert found.value("loscar_server_round_seconds_bucket", le="120.0") == 1
        assert found.value("loscar_server_rounds_total", kind="train") == 1
        assert found.value("loscar_server_overlap_steps_count") == 3, "4 had gone by then"
        # The next round counts on three, and says nothing of the last one any more.
        for whole in (1, 2, 3):
            desk.contribute(whole)
        assert desk.round == 2
        assert desk.contributions()["included", "whole"] == 7
        assert sum(desk.contributions().values()) == 12


def test_who_is_late_twice_is_counted_twice() -> None:
    with counted(limits={"round_cap_s": 100.0}) as desk:
        desk.start(1, 2, 3)
        for misses in (1, 2):
            desk.contribute(1)
            desk.contribute(2)
            desk.tick(desk.now + 100)
            assert desk.contributions()["missed", "late"] == misses
            desk.ready(3)
            desk.contribute(1)  # a round without it, after which it counts again
            desk.contribute(2)
        assert desk.contributions() == {("missed", "late"): 2, ("included", "whole"): 8}


def test_a_round_that_is_begun_anew_counts_on_those_it_is_begun_with() -> None:
    """All have gone before anything came; of the two that come then, one goes as well."""
    with counted() as desk:
        desk.start(1, 2)
        for newcomer in (3, 4):
            desk.hello(newcomer)
            desk.drained(newcomer)
            desk.ready(newcomer)
        desk.drop(1)
        desk.drop(2)
        assert desk.machine.round is not None
        assert desk.machine.round.reopened
        assert desk.machine.round.members == 2
        desk.contribute(3)
        desk.send(4, Leave(Reason.LEFT))
        assert desk.round == 1
        assert desk.contributions() == {("included", "whole"): 1, ("missed", "left"): 1}


def test_what_was_closed_of_a_round_before_all_had_gone_is_partial() -> None:
    with counted() as desk:
        desk.start(1, 2)
        for peer in (1, 2):
            desk.send(peer, desk.contribution(part=0))
        desk.drop(1)
        desk.send(2, desk.contribution(part=1, checksum=0))
        desk.hello(3)
        desk.drained(3)
        desk.ready(3)
        assert desk.round == 1
        assert desk.contributions() == {("partial", "stream-closed"): 1, ("partial", "refused"): 1}


@pytest.mark.parametrize("seed", range(20))
def test_outcomes_add_up_whatever_happens(seed: int) -> None:
    """Members that come, contribute in pieces, break rules, go and come back in any order."""
    rng = random.Random(seed)
    with counted(limits={"round_cap_s": 50.0}) as desk:
        desk.start(1, 2, 3)
        peers, names = {1, 2, 3}, itertools.count(4)
        for _ in range(400):
            peers = {p for p in peers if p in desk.machine.members.by_peer}
            action = rng.choice(
                ["part"] * 6 + ["all"] * 4 + ["come", "ready", "ready", "drop", "leave", "break", "late"]
            )
            peer = rng.choice(sorted(peers)) if peers else 0
            current = desk.machine.round
            assert current is not None
            if action == "come" or not peers:
                peer = next(names)
                desk.hello(peer, name=f"w{rng.randrange(8)}")
                desk.drained(peer)
                desk.ready(peer)
                peers.add(peer)
            elif action == "part":
                desk.send(peer, desk.contribution(part=rng.randrange(len(current.parts))))
            elif action == "all":
                desk.contribute(peer)
            elif action == "ready":
                desk.drained(peer)
                desk.ready(peer)
            elif action == "drop":
                desk.drop(peer)
            elif action == "leave":
                desk.send(peer, Leave(rng.choice([Reason.LEFT, Reason.FAILED])))
            elif action == "break":
                desk.send(peer, desk.contribution(checksum=0))
            else:
                desk.tick(desk.now + 50)
        counts = desk.contributions()
        rounds = desk.logged(fx.RoundCommitted)
        assert len(rounds) > 10
        assert sum(counts.values()) == sum(r.members for r in rounds)
        assert counts["included", "whole"] == sum(len(r.included) for r in rounds)
        assert len(counts) > 3


def test_staleness_is_what_contributors_say() -> None:
    with counted() as desk:
        desk.start(1, 2)
        for peer, overlap in ((1, 0), (2, 7)):
            desk.send(peer, desk.contribution(part=0, overlap_steps=overlap))
            desk.send(peer, desk.contribution(part=1))
        found = desk.scrape()
        assert found.value("loscar_server_overlap_steps_count") == 2
        assert found.value("loscar_server_overlap_steps_sum") == 7
        assert found.value("loscar_server_overlap_steps_bucket", le="0.0") == 1
        assert found.value("loscar_server_overlap_steps_bucket", le="5.0") == 1
        assert found.value("loscar_server_overlap_steps_bucket", le="10.0") == 2


# --- the run and its members --------------------------------------------------------------------------------


def test_members_and_the_run_are_as_the_machine_has_them() -> None:
    with counted(
        limits={"round_cap_s": 100.0}, dimension=100, config={"density": 0.25, "selection": SelectionKind.RANDOM}
    ) as desk:
        before = desk.scrape()
        assert before.nonzero("loscar_server_phase") == {(("phase", "waiting"),): 1}
        assert before.value("loscar_server_model_coordinates") == 0
        assert before.value("loscar_server_deadline_seconds") == 0
        assert before.value("loscar_server_round_open_seconds") == 0
        desk.start(1, 2, 3)
        desk.hello(4)
        desk.hello(5, observer=True)
        reports = [WorkerReport(steps=10, loss=1.0, idle_s=1.0, run_s=4.0), WorkerReport(30, 3.0, 0.0, 4.0)]
        for peer, report in enumerate(reports, start=1):
            desk.send(peer, Heartbeat(0, 0, report))
        desk.contribute(1)
        desk.contribute(2)
        desk.tick(desk.now + 100)
        found = desk.scrape()
        assert found.nonzero("loscar_server_phase") == {(("phase", "running"),): 1}
        assert found.value("loscar_server_members", state="active") == 2
        assert found.value("loscar_server_members", state="suspended") == 1
        assert found.value("loscar_server_members", state="joining") == 1
        assert found.value("loscar_server_observers") == 1
        assert found.value("loscar_server_round") == 1
        assert found.value("loscar_server_epoch") == 1
        assert found.value("loscar_server_model_coordinates") == 100
        assert found.value("loscar_server_round_coordinates") == desk.machine.config.count(100)
        assert found.value("loscar_server_density_ratio") == desk.machine.config.count(100) / 100
        assert found.value("loscar_server_deadline_seconds") == 100
        assert found.value("loscar_server_round_open_seconds") >= 0
        assert found.value("loscar_server_reported_loss") == 2
        assert found.value("loscar_server_reported_steps") == 40
        assert found.value("loscar_server_reported_idle_ratio") == 1 / 8
        assert found.labels("loscar_server_info")["run_id"] == desk.machine.run_id.hex()


def test_rounds_are_counted_by_kind_until_the_last() -> None:
    with counted(config={"rounds": 3, "evaluate_every": 2}) as desk:
        desk.start(1)
        while desk.machine.round is not None:
            desk.contribute(1)
        found = desk.scrape()
        kinds = {dict(labels)["kind"]: n for labels, n in found.nonzero("loscar_server_rounds_total").items()}
        assert kinds == {"train": 2, "evaluation": 1, "final": 1}
        assert found.nonzero("loscar_server_phase") == {(("phase", "finished"),): 1}
        assert found.value("loscar_server_round_open_seconds") == 0
        assert RoundKind.END.name.lower() not in {
            dict(labels)["kind"] for n, labels in found.series if "kind" in dict(labels)
        }


# --- a bound on cardinality ---------------------------------------------------------------------------------


class StrangeError(Exception):
    """One that the server does not know; no LoscarError, or the tree of those would have it in all tests."""


def test_the_number_of_series_does_not_depend_on_who_comes() -> None:
    with counted() as desk:
        first = desk.scrape()
        check_conventions(first)
        desk.start(1, 2)
        desk.contribute(1)
        desk.contribute(2)
        running = desk.scrape().series
        reasons = [r for r in Reason if r is not Reason.FINISHED]
        for peer in range(10, 310):
            desk.hello(peer, name=f"worker-{peer}-{'x' * (peer % 50)}")
            desk.send(peer, Leave(reasons[peer % len(reasons)], f"detail {peer}"))
            error = (MalformedError, RefusedError, StrangeError)[peer % 3](f"reason {peer}")
            desk.service.refusals.note(f"10.0.0.{peer}", f"name {peer}", error, 0.0)
        last = desk.scrape()
        check_conventions(last)
        assert last.series == running
        named = {key for key in running if key[0] != "loscar_server_info"}
        assert {key for key in first.series if key[0] != "loscar_server_info"} == named
        assert len(last.series) < 200
        assert last.total("loscar_server_departures_total") == 300
        kinds = {dict(labels)["kind"]: n for labels, n in last.nonzero("loscar_server_refusals_total").items()}
        assert kinds == {"MalformedError": 100, "RefusedError": 100, "LoscarError": 100}
        for name, labels in last.series:
            assert "worker-" not in f"{name}{labels}"


def test_labels_come_from_fixed_lists() -> None:
    with counted() as desk:
        found = desk.scrape()
    pairs = {
        (dict(labels)["outcome"], dict(labels)["reason"])
        for name, labels in found.series
        if name == "loscar_server_contributions_total"
    }
    assert pairs == {(outcome, reason) for outcome, reasons in OUTCOMES.items() for reason in reasons}
    kinds = {dict(labels)["kind"] for name, labels in found.series if name == "loscar_server_refusals_total"}
    assert kinds == set(KINDS)
    left = {dict(labels)["reason"] for name, labels in found.series if name == "loscar_server_departures_total"}
    assert left == {reason.value for reason in Reason}


# --- whose thread it is -------------------------------------------------------------------------------------


def test_a_server_whose_loop_has_ended_cannot_be_collected() -> None:
    with counted() as desk:
        loop = desk.loop
    assert loop.is_closed()
    with pytest.raises(RuntimeError):
        list(desk.metrics.collect())
