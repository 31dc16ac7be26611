"""A server and two workers that are scraped over HTTP: the figures are those of status, events and results."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from processes import DEADLINE_S, Process, Processes, Server, status_of, wait_until
from raw import RawStream, engine_of
from scraping import Scrape, check_conventions, scrape

from loscar_core.messages import Leave, Reason, Welcome
from loscar_server.events import read_events
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import STOP

SUPPORT = Path(__file__).parents[1] / "support"
METRICS = ["--metrics", "127.0.0.1:0"]
RUN = ["--workers", "2", "--local-steps", "3", "--density", "0.1", "--seed", "5", "--linger", "5m"]
STEP_FLOOR_S = 0.005

pytestmark = pytest.mark.timeout(180)


def metrics_of_server(server: Server) -> str:
    told: str = json.loads(server.out)["metrics"]
    return told


def metrics_of_worker(worker: Process) -> str:
    worker.says("metrics at http://")
    found = re.search(r"metrics at http://(\S+)/metrics", worker.err)
    assert found is not None
    return found[1]


@dataclass(frozen=True)
class Watched:
    """A run that was scraped while it was on, and after its end.

    Attributes:
        during: the workers' figures, with the results that they ended with.
        at_work: the server's while the run was on.
        after: the server's when the workers had gone.
        status: what `loscar status --json` said then.
    """

    server: Server
    during: list[tuple[Scrape, dict[str, Any]]]
    at_work: Scrape
    after: Scrape
    status: dict[str, Any]
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    processes = Processes(folder / "logs")
    try:
        server = processes.server(*RUN, *METRICS, "--events", str(folder / "events.jsonl"))
        address = metrics_of_server(server)
        results = [folder / f"{i}.json" for i in (0, 1)]
        flags = ["--task", "digits", "--server", server.address, "--step-time", f"{STEP_FLOOR_S * 1000:g}ms"]
        workers = [
            processes.loscar("worker", *flags, "--name", f"w{i}", "--result", str(results[i]), *METRICS) for i in (0, 1)
        ]
        theirs = [metrics_of_worker(worker) for worker in workers]
        for worker in theirs:  # they can be scraped while they still wait
            check_conventions(scrape(worker))

        def merged() -> list[Scrape] | None:
            found = [scrape(worker) for worker in theirs]
            return found if all(s.value("loscar_worker_merge_seconds_count") >= 8 for s in found) else None

        during = wait_until(merged, "both workers have merged rounds")
        reported = "loscar_server_reported_steps"
        at_work = wait_until(lambda: s if (s := scrape(address)).value(reported) > 0 else None, "heartbeats")
        with grpc.insecure_channel(server.address) as channel:
            stop = channel.unary_unary(STOP, pb.StopRequest.SerializeToString, pb.StopReply.FromString)
            stop(pb.StopRequest(why="enough"), timeout=DEADLINE_S)
        assert [worker.wait() for worker in workers] == [0, 0]
        wait_until(lambda: len(status_of(server.address).departures) == 2, "both have left")
        asked = processes.loscar("status", "--json", "--server", server.address)
        assert asked.wait() == 0
        ended = [json.loads(path.read_text()) for path in results]
        after = scrape(address)
        events = read_events(folder / "events.jsonl")
        pairs = list(zip(during, ended, strict=True))
        yield Watched(server, pairs, at_work, after, json.loads(asked.out), events)
    finally:
        processes.kill_all()


def test_names_follow_the_conventions(watched: Watched) -> None:
    scrapes = [watched.at_work, watched.after, *(found for found, _ in watched.during)]
    for found in scrapes:
        assert len(found.families) > 20
        check_conventions(found)
    openmetrics = scrape(metrics_of_server(watched.server), openmetrics=True)
    check_conventions(openmetrics)
    assert openmetrics.total("loscar_server_rounds_total") == watched.after.total("loscar_server_rounds_total")


def test_the_server_s_figures_are_those_of_status(watched: Watched) -> None:
    found, status = watched.after, watched.status
    assert found.value("loscar_server_round") == status["round"] > 8
    assert found.total("loscar_server_rounds_total") == status["round"]
    assert found.value("loscar_server_rounds_total", kind="final") == 1
    assert found.value("loscar_server_epoch") == status["epoch"]
    assert found.value("loscar_server_model_coordinates") == status["dimension"]
    assert found.value("loscar_server_received_bytes_total") == status["bytes_in"]
    assert found.value("loscar_server_sent_bytes_total") == status["bytes_out"]
    assert found.value("loscar_server_run_seconds") == pytest.approx(status["elapsed_s"])
    assert found.value("loscar_server_phase", phase="finished") == 1
    assert found.labels("loscar_server_info")["run_id"] == status["run_id"] == watched.server.run_id
    assert found.total("loscar_server_members") == len(status["members"]) == 0
    departures = {dict(k)["reason"]: v for k, v in found.nonzero("loscar_server_departures_total").items()}
    assert departures == {"finished": 2}
    assert found.nonzero("loscar_server_refusals_total") == {}
    assert found.value("process_resident_memory_bytes") > 1e7


def test_the_server_s_rounds_are_those_of_its_events(watched: Watched) -> None:
    rounds = [e for e in watched.events if e["event"] == "round"]
    found = watched.after
    assert found.value("loscar_server_round_seconds_count") == len(rounds)
    seconds = sum(e["seconds"] for e in rounds)
    assert found.value("loscar_server_round_seconds_sum") == pytest.approx(seconds, abs=1e-4)
    assert found.total("loscar_server_contributions_total") == sum(e["n"] for e in rounds)
    whole = sum(len(set.intersection(*map(set, e["parts"]))) for e in rounds)
    assert found.total("loscar_server_contributions_total", outcome="included") == whole
    assert found.value("loscar_server_overlap_steps_count") == whole


def test_a_run_at_work(watched: Watched) -> None:
    found = watched.at_work
    assert found.value("loscar_server_phase", phase="running") == 1
    assert found.value("loscar_server_members", state="active") == 2
    assert found.value("loscar_server_density_ratio") == pytest.approx(0.1, rel=0.02)
    assert found.value("loscar_server_deadline_seconds") > 0
    assert 0 < found.value("loscar_server_reported_loss") < 10
    assert 0 <= found.value("loscar_server_reported_idle_ratio") <= 1
    assert found.series == watched.after.series


def test_a_worker_s_figures_lead_to_its_result(watched: Watched) -> None:
    """Scraped on the way, so none is beyond what the worker reported at its end; and what belongs together agrees."""
    for found, result in watched.during:
        info = found.labels("loscar_worker_info")
        assert (info["worker"], info["run_id"]) == (result["name"], watched.server.run_id)
        steps = found.value("loscar_worker_steps_total")
        assert 0 < steps <= result["steps"]
        assert abs(found.value("loscar_worker_step_seconds_count") - steps) <= 1
        assert found.value("loscar_worker_step_seconds_bucket", le="0.002") == 0, "the floor under a step's time"
        assert found.value("loscar_worker_step_seconds_sum") >= STEP_FLOOR_S * (steps - 1)
        assert 0 <= found.value("loscar_worker_idle_seconds_total") <= result["idle_seconds"]
        assert 0 <= found.value("loscar_worker_idle_ratio") <= 1
        assert 0 < found.value("loscar_worker_service_seconds_total") <= result["service_seconds"]
        assert 0 < found.value("loscar_worker_run_seconds") <= result["run_seconds"]
        merged = found.value("loscar_worker_merge_seconds_count")
        assert 8 <= merged <= found.value("loscar_worker_round") + 1
        assert found.value("loscar_worker_round") <= watched.status["round"]
        assert found.value("loscar_worker_epoch") == 1
        assert found.value("loscar_worker_local_steps_bucket", le="2.0") == 0, "--local-steps 3"
        assert found.value("loscar_worker_local_steps_bucket", le="5.0") > 0
        assert found.value("loscar_worker_overlap_steps_count") <= merged
        sent = found.value("loscar_worker_contributions_sent_total")
        assert merged <= sent + 1
        assert 0 < sent <= result["contributions"]["sent"]
        assert abs(found.total("loscar_worker_contributions") - sent) <= 1
        assert 0 < found.value("loscar_worker_sent_payload_bytes_total") <= result["bytes_up"]
        assert 0 < found.value("loscar_worker_received_payload_bytes_total") <= result["bytes_down"]
        assert found.value("loscar_worker_connected") == 1
        assert found.value("loscar_worker_reconnects_total") == result["reconnects"] == 0


def test_many_members_add_no_series(processes: Processes) -> None:
    """Forty names that come and go, and ten that are refused."""
    server = processes.server("--workers", "99", *METRICS)
    address = metrics_of_server(server)
    before = scrape(address)
    with grpc.insecure_channel(server.address) as channel:
        for i in range(40):
            with RawStream(channel) as stream:
                stream.send(engine_of(f"passer-by-{i}", 8).hello())
                assert isinstance(stream.read(), Welcome)
                stream.send(Leave(Reason.LEFT))
                stream.status()
        for i in range(10):
            with RawStream(channel) as stream:
                stream.send(bytes([i]) * 9)
                stream.status()
    wait_until(lambda: sum(status_of(server.address).refused.values()) == 10, "all are refused")
    after = scrape(address)
    assert after.series == before.series
    assert after.value("loscar_server_departures_total", reason="left") == 40
    assert after.value("loscar_server_refusals_total", kind="MalformedError") == 10


def test_a_port_that_is_taken_ends_the_command(processes: Processes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        commands = [["server", "--listen", "127.0.0.1:0"], ["worker", "--task", "tiny_task:Tiny"]]
        started = [processes.loscar(*command, "--metrics", address, cwd=SUPPORT) for command in commands]
        for process in started:
            assert process.wait() == 10
            assert process.out == ""
            assert process.err.splitlines()[0] == (
                f"loscar: --metrics: cannot listen on {address}: Address already in use"
            )


def test_a_worker_tells_that_its_server_is_away(processes: Processes) -> None:
    flags = ["--workers", "1", "--run-id", "away", "--local-steps", "2"]
    server = processes.server(*flags)
    options = ["--task", "tiny_task:Tiny", "--server", server.address, "--step-time", "2ms", "--log-format", "json"]
    worker = processes.loscar("worker", *options, *METRICS, cwd=SUPPORT)
    address = metrics_of_worker(worker)

    def told(name: str) -> float:
        return scrape(address).value(f"loscar_worker_{name}")

    wait_until(lambda: told("round") >= 2, "rounds are merged")
    assert (told("connected"), told("reconnects_total"), told("epoch")) == (1, 0, 1)
    server.signal(signal.SIGKILL)
    server.wait()
    wait_until(lambda: told("connected") == 0, "the connection is lost")
    steps, round_ = told("steps_total"), told("round")
    wait_until(lambda: told("steps_total") > steps, "it trains on")
    processes.server(*flags, listen=server.address)
    wait_until(lambda: told("round") > round_, "rounds go on")
    assert (told("connected"), told("reconnects_total")) == (1, 1)
    assert told("epoch") > 1
