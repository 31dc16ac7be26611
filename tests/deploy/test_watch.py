"""`loscar status --watch`: the figures of the dashboard's page, drawn with characters."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from on_screen import Terminal
from processes import Processes, status_of, wait_until
from raw import RawStream, engine_of
from rich.console import Console

from loscar_core.messages import Reason, Welcome, WorkerReport
from loscar_core.server_members import Departure
from loscar_deploy.client import Client
from loscar_deploy.dashboard.history import REASONS, History
from loscar_deploy.dashboard.look import DEFAULT_HEARTBEAT_S, Look, MemberLook, look_of
from loscar_deploy.watch import LEGEND, view
from loscar_server.exchange import Exchange
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import ClientSecurity

SUPPORT = Path(__file__).parents[1] / "support"
WORKER = ["worker", "--task", "tiny_task:Tiny", "--step-time", "2ms", "--parting", "0s"]
LOOK = Look(
    at_s=100.0, run_id="0123456789ab", phase="running", epoch=1, round=0, elapsed_s=0.0, stop_reason="", dimension=1000,
    coordinates=50, method="loscar", workers_wanted=2, heartbeat_s=2.0, bytes_in=0, bytes_out=0,
    counts={"active": 2}, members=(), hidden=0, departures=(), departed=0,
)  # fmt: skip
MEMBER = MemberLook(
    peer=1, name="w0", slot=0, state="active", observer=False, joined_s=100.0, heard_s=100.0, merged_round=0,
    contributed=7, missed=3, deadline_s=90.0, cycle_s=0.5, local_steps=4, overlap_steps=2, report=WorkerReport(),
    exchange=Exchange.AWAITED,
)  # fmt: skip


def drawn(history: History, width: int = 160, height: int | None = None) -> str:
    """What somebody sees."""
    console = Console(width=width, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(view(history.since(0), width, height))
    return console.export_text()


@pytest.fixture
def history() -> History:
    """Ten seconds of two workers, one of which goes."""
    kept = History(clock=lambda: 0.0)
    gone: tuple[Departure, ...] = ()
    for second in range(10):
        report = WorkerReport(
            steps=10 * second, loss=2.0 / (second + 1), idle_s=second / 4, run_s=second + 1.0, round_trip_s=0.0123
        )
        w0 = replace(MEMBER, report=report, merged_round=second, exchange=list(Exchange)[second % 4])
        w1 = replace(MEMBER, peer=2, name="[w1]", slot=1, report=replace(report, run_s=2 * second + 1.0))
        if second == 8:
            gone = (Departure("[w1]", 1, Reason.STREAM_CLOSED, "the connection broke", 107.5, bytes(16)),)
        members = tuple(replace(m, heard_s=100.0 + second) for m in ((w0, w1) if second < 8 else (w0,)))
        kept.add(
            replace(
                LOOK, at_s=100.0 + second, elapsed_s=float(second), round=second, members=members, departures=gone,
                departed=len(gone), bytes_in=2_000_000 * second, bytes_out=1_000_000 * second,
            )
        )  # fmt: skip
    return kept


def test_every_part_of_the_page_is_there(history: History) -> None:
    text = drawn(history)
    assert "run 01234567 · running · epoch 1 · round 9 (1/s) · 9.0 s · 2 active · 50 of 1,000 coordinates" in text
    assert "computing 75%, waiting 25% · 9 merged in 1 min · contribution awaited" in text
    assert LEGEND in text
    assert re.search(r"loss 2 [▁-█]{10} 0\.2", text)
    row = next(line for line in text.splitlines() if line.startswith("w0") and "active" in line)
    for cell in ("90", "0.2000", "22.5%", "0", "4+2", "12 ms", "500 ms", "90 s", "7", "3"):
        assert cell in row.split("active")[1], cell
    assert re.search(r"traffic from workers [▁-█]+ 2\.0 MB/s, 18\.0 MB in all · to workers [▁-█]+ 1\.0 MB/s", text)
    assert f"1.5 s ago: [w1] left: stream-closed, {REASONS[Reason.STREAM_CLOSED]} (the connection broke)" in text
    assert "9.0 s ago: w0 joined" in text


def test_a_lane_has_a_character_for_each_second(history: History) -> None:
    lines = drawn(history).splitlines()
    upper, lower = lines[1:3]
    assert re.match(r"w0 +▆{9} computing", upper), "three quarters of each second"
    assert ".+# .+# ." in lower, "the last nine looks, none awaited whole arriving by turns"


@pytest.mark.parametrize("workers", [1, 3, 8, 30, 40])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (160, 50)])
def test_it_fits_into_the_terminal(history: History, workers: int, width: int, height: int) -> None:
    """Departures and traffic are there, however many workers are."""
    members = tuple(
        replace(MEMBER, peer=10 + i, name=f"worker-{i}", slot=i, heard_s=110.0, report=WorkerReport(steps=i))
        for i in range(workers)
    )
    gone = Departure("[w1]", 1, Reason.STREAM_CLOSED, "the connection broke", 107.5, bytes(16))
    history.add(
        replace(
            LOOK, at_s=110.0, elapsed_s=10.0, round=10, members=members, departures=(gone,), departed=1,
            bytes_in=20_000_000, bytes_out=10_000_000,
        )
    )  # fmt: skip
    left = replace(gone, name="worker-0", at_s=111.0)
    history.add(
        replace(
            LOOK, at_s=111.0, elapsed_s=11.0, round=11, members=members[1:], departures=(gone, left), departed=2,
            bytes_in=22_000_000, bytes_out=11_000_000,
        )
    )  # fmt: skip
    lines = drawn(history, width, height).rstrip("\n").splitlines()
    assert len(lines) <= height
    assert any("traffic from workers" in line for line in lines)
    assert any("left: stream-closed" in line for line in lines)
    if workers > 1:
        assert any(line.startswith("worker-1 ") and "active" in line for line in lines)


def test_columns_that_have_no_room_are_left_out(history: History) -> None:
    narrow = drawn(history, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    heading = next(line for line in narrow.splitlines() if line.startswith("worker"))
    assert "contributed" not in heading
    for kept in ("state", "steps", "loss", "waiting", "rtt", "missed"):
        assert kept in heading
    assert "contributed" in drawn(history, 200)


def test_a_server_of_an_earlier_release_is_shown_too() -> None:
    """Without what it does not tell: the fields are newer than the protocol's version."""
    kept = History()
    reply = pb.StatusReply(phase="running", elapsed_s=3.0, round=4)
    reply.members.add(name="w0", state="active", report=pb.WorkerReport(steps=3, run_s=2.0))
    kept.add(look_of(reply, 50.0))
    kept.add(look_of(reply, 51.0))
    assert look_of(reply, 51.0).heartbeat_s == DEFAULT_HEARTBEAT_S
    text = drawn(kept)
    assert "not in the open round" in text
    assert "active" in text


def test_it_is_told_what_the_page_is_told(processes: Processes) -> None:
    server = processes.server("--workers", "3", "--linger", "5m", "--dashboard", "127.0.0.1:0")
    page = json.loads(server.out)["dashboard"].removeprefix("http://").rstrip("/")
    with grpc.insecure_channel(server.address) as channel, RawStream(channel) as stream:
        stream.send(engine_of("somebody", 8).hello())
        assert isinstance(stream.read(), Welcome)

        def shown() -> dict[str, Any] | None:
            found = _state(page)
            return found if found["workers"] else None

        theirs = wait_until(shown, "the page has seen it")
        kept = History()
        kept.add(look_of(status_of(server.address), time.monotonic()))
    ours = kept.since(0)
    changing = {"elapsed_s", "rounds_per_s", "bytes_in", "bytes_in_per_s", "bytes_out", "bytes_out_per_s"}
    assert ours.keys() == theirs.keys()
    assert {k: v for k, v in ours["run"].items() if k not in changing} == {
        k: v for k, v in theirs["run"].items() if k not in changing
    }
    [mine], [other] = ours["workers"], theirs["workers"]
    assert {**mine, "heard_ago_s": 0} == {**other, "heard_ago_s": 0}
    assert [e["kind"] for e in ours["events"]] == [e["kind"] for e in reversed(theirs["events"])] == ["joined", "phase"]


def _state(page: str) -> dict[str, Any]:
    import http.client

    connection = http.client.HTTPConnection(page, timeout=10)
    try:
        connection.request("GET", "/state.json")
        found: dict[str, Any] = json.loads(connection.getresponse().read())
        return found
    finally:
        connection.close()


async def _stop(address: str) -> None:
    client = Client(address, ClientSecurity())
    try:
        await client.stop("enough")
    finally:
        await client.close()


def test_a_server_that_goes_is_missed_by_name(processes: Processes) -> None:
    server = processes.server("--workers", "2")
    watcher = processes.loscar("status", "--server", server.address, "--watch")
    watcher.says("the run is waiting")
    server.popen.kill()
    assert watcher.wait() == 4
    said = watcher.err.strip().splitlines()
    assert said[0].startswith(
        "loscar: the server does not answer any more (the run was waiting at round 0 a moment ago): "
    )
    assert len(said) == 2


@pytest.mark.timeout(180)
def test_a_run_with_a_death_is_watched(processes: Processes, tmp_path: Path) -> None:
    server = processes.server("--workers", "2", "--local-steps", "3", "--density", "0.5", "--linger", "5m")
    names = ("w0", "w1")
    workers = [processes.loscar(*WORKER, "--server", server.address, "--name", n, cwd=SUPPORT) for n in names]
    plain = processes.loscar("status", "--server", server.address, "--watch")
    with Terminal("status", "--server", server.address, "--watch", columns=160, lines=50) as terminal:
        terminal.read_until(r"computing \d+%, waiting \d+%")
        terminal.read_until(r"rtt +cycle +deadline")
        terminal.read_until(r"w0 +active .* \d+(\.\d+)? ms ")
        workers[1].signal(signal.SIGKILL)
        terminal.read_until(r"ago: w1 left: stream-closed, the connection broke")
        plain.says("w1 left: stream-closed, the connection broke")
        asyncio.run(_stop(server.address))
        terminal.read_until(r"· finished: enough")
        assert terminal.wait() == 0
    assert plain.wait() == 0
    assert "the run is finished: enough" in plain.out
    assert "\x1b" not in plain.out
    assert "the run is running" in plain.out
    assert re.search(r"^ +\d+\.\d s  round \d+  loss ", plain.out, re.MULTILINE)
    assert workers[0].wait() == 0
