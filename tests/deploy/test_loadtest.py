"""`loscar loadtest` against real servers: what it measures, and what it refuses."""

from __future__ import annotations

import json
import signal
from typing import Any

import numpy as np
import pytest
from processes import Process, Processes, status_of, wait_until

from loscar_core.errors import ConfigError
from loscar_core.replica import checksum_of
from loscar_deploy.cli import build_parser
from loscar_deploy.loadtest import LoadPlan, LoadTest, ZeroReplica, check_near

pytestmark = pytest.mark.timeout(120)

SMALL = ["--workers", "4", "--params", "20000", "--density", "0.05"]


def loadtest(processes: Processes, *flags: str) -> Process:
    return processes.loscar("loadtest", *SMALL, "--json", *flags)


def result_of(process: Process) -> dict[str, Any]:
    assert process.wait() == 0, process.err
    found: dict[str, Any] = json.loads(process.out)
    return found


def test_every_round_of_every_worker_is_measured(processes: Processes) -> None:
    found = result_of(loadtest(processes, "--rounds", "40"))
    assert (found["workers"], found["coordinates"], found["rounds"]) == (4, 1000, 40)
    # Nobody is missing in any round: a worker may be one ahead or behind where the measurement begins and ends.
    assert abs(found["contributions"] - 4 * 40) <= 2 * 4
    assert 0 < found["round_ms"]["p50"] <= found["round_ms"]["p95"] <= found["round_ms"]["p99"]
    assert found["model_bytes"] == 80_000
    assert found["server_peak_bytes"] > found["model_bytes"]
    assert found["server_cpu_ms_per_contribution"] > 0
    assert found["echo_ms"]["p50"] > 0


def test_a_link_lies_between_each_worker_and_the_server(processes: Processes) -> None:
    found = result_of(loadtest(processes, "--rounds", "5", "--link", "rtt=120ms", "--no-reference"))
    assert found["round_ms"]["p50"] >= 120
    assert found["echo_ms"] is None


def test_psutil_is_needed_only_where_a_process_is_measured(processes: Processes) -> None:
    """An installation for workers, as in the image, has none."""
    without = (
        "import sys; sys.modules['psutil'] = None; from loscar_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = processes.python("-c", without, "loadtest", *SMALL)
    assert done.wait() == 3
    assert "needs the psutil package" in done.err
    server = processes.server("--workers", "4", "--density", "0.05")
    flags = ["--server", server.address, "--rounds", "5", "--no-reference", "--json"]
    found = result_of(processes.python("-c", without, "loadtest", *SMALL, *flags))
    assert found["rounds"] == 5


def test_a_server_that_is_there_can_be_measured(processes: Processes) -> None:
    server = processes.server("--workers", "4", "--density", "0.05", "--token", "secret")
    found = result_of(
        loadtest(processes, "--server", server.address, "--token", "secret", "--rounds", "10", "--no-reference")
    )
    assert found["rounds"] == 10
    assert found["server_cpu_ms_per_contribution"] is None
    wait_until(lambda: "load-" in server.err and "left: finished" in server.err, "the workers leave in order")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_lines_for_people(processes: Processes) -> None:
    process = processes.loscar("loadtest", *SMALL, "--rounds", "10")
    assert process.wait() == 0, process.err
    lines = process.out.splitlines()
    assert lines[0] == "4 workers, 1,000 of 20,000 coordinates a round, link none"
    assert lines[1].startswith("10 rounds in ")
    assert len(lines) == 5


def test_a_run_that_ends_too_soon_is_an_error(processes: Processes) -> None:
    server = processes.server("--workers", "4", "--density", "0.05", "--rounds", "5", "--final-round", "none")
    process = loadtest(processes, "--server", server.address, "--rounds", "50", "--no-reference")
    assert process.wait() == 20
    assert "the run was over after 5 rounds, before enough were measured" in process.err
    assert status_of(server.address).phase == "finished"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--workers", "0"], "--workers"),
        (["--workers", "5000"], "a load test has 1 to 1024 in its one process"),
        (["--server", "8.8.8.8:50051"], "8.8.8.8, a public address: load tests stay in one's own network"),
        (["--server", "nowhere"], "expected HOST:PORT"),
        (["--selection", "best"], "--selection 'best' is not one of"),
        (["--selection", "topk"], "--selection topk: synthetic workers have no changes"),
        (["--density", "x"], "--density"),
        (["--link", "rtt=fast"], "rtt: 'fast' is not a number"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: list[str], reason: str) -> None:
    arguments = build_parser().parse_args(["loadtest", *flags])
    with pytest.raises(ConfigError) as refused:
        arguments.handler(arguments)
    assert reason in str(refused.value)


def test_addresses_that_are_near() -> None:
    for address in ("127.0.0.1:1", "[::1]:1", "10.1.2.3:1", "192.168.0.1:1"):
        check_near(address)
    for address in ("1.1.1.1:1", "[2606:4700::1111]:1"):
        with pytest.raises(ConfigError, match="a public address"):
            check_near(address)


def test_a_synthetic_anchor_is_a_model_of_zeros() -> None:
    zeros = np.zeros(5_000_000, np.float32)
    digest = LoadTest(LoadPlan(dimension=zeros.size)).digest
    assert digest == checksum_of(zeros, zeros[:0])
    replica = ZeroReplica.of(zeros.size, digest)
    assert replica.vector.size == zeros.size
    assert not replica.slice_by_value(None, 3, 9).any()
