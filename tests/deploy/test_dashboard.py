"""`--dashboard` over HTTP: a real run's figures, who may read them, bad requests, its end; and that its memory ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import signal
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from processes import DEADLINE_S, Processes, Server, status_of, wait_until
from raw import RawStream, engine_of

from loscar_core.errors import ConfigError
from loscar_core.messages import Reason, Welcome, WorkerReport
from loscar_core.server_members import Departure
from loscar_deploy.certs import make_certificates
from loscar_deploy.dashboard import http as dashboard_http
from loscar_deploy.dashboard.history import LANE_LOOKS, MOST_EVENTS, MOST_POINTS, MOST_TRACES, REASONS, History
from loscar_deploy.dashboard.http import MOST_CONNECTIONS, MOST_HEAD_BYTES, HttpServer, Reply, Request
from loscar_deploy.dashboard.look import MOST_MEMBERS, Look, MemberLook
from loscar_server.exchange import Exchange
from loscar_wire.transport import ServerSecurity, parse_address

SUPPORT = Path(__file__).parents[1] / "support"
DASHBOARD = ["--dashboard", "127.0.0.1:0"]
RUN = ["--workers", "2", "--local-steps", "3", "--density", "0.5", "--seed", "5", "--linger", "5m"]
WORKER = ["worker", "--task", "tiny_task:Tiny", "--step-time", "2ms", "--parting", "0s"]
FILES = ["/", "/page.js", "/page.css"]


def dashboard_of(server: Server) -> str:
    """Its address."""
    url = urlsplit(json.loads(server.out)["dashboard"])
    assert url.path == "/"
    return url.netloc


@dataclass(frozen=True)
class Got:
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes


def get(address: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Got:
    connection = http.client.HTTPConnection(address, timeout=DEADLINE_S)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return Got(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def state_of(address: str, since: int | None = None, token: str = "") -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    got = get(address, "/state.json" if since is None else f"/state.json?since={since}", **headers)
    assert got.status == 200, got
    assert got.headers["content-type"] == "application/json"
    found: dict[str, Any] = json.loads(got.body)
    return found


def raw(address: str, said: bytes) -> bytes:
    """What is answered to these bytes until the server ends the connection."""
    with socket.create_connection(parse_address(address, "test"), timeout=DEADLINE_S) as client:
        client.sendall(said)
        answer = b""
        while True:
            try:
                more = client.recv(1 << 16)
            except ConnectionResetError:
                return answer
            if not more:
                return answer
            answer += more


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server without workers, and its page's address."""
    processes = Processes(tmp_path_factory.mktemp("idle"))
    try:
        server = processes.server(*RUN, *DASHBOARD)
        yield server, dashboard_of(server)
    finally:
        processes.kill_all()


# --- a real run ---------------------------------------------------------------------------------------------


def test_what_is_shown_of_a_run_with_a_fault(processes: Processes) -> None:
    server = processes.server(*RUN, *DASHBOARD)
    address = dashboard_of(server)
    before = state_of(address)
    assert (before["run"]["phase"], before["workers"], before["run"]["elapsed_s"]) == ("waiting", [], -1)
    assert before["run"]["workers_wanted"] == 2
    flags = ["--server", server.address]
    workers = [processes.loscar(*WORKER, *flags, "--name", f"w{i}", cwd=SUPPORT) for i in (0, 1)]

    def reported() -> dict[str, Any] | None:
        found = state_of(address)
        done = [t for t in found["traces"].values() if t["losses"] and len(t["segments"]) >= 2]
        measured = [w for w in found["workers"] if w["round_trip_s"] is not None]
        return found if len(done) == len(measured) == 2 else None

    found = wait_until(reported, "both have reported")
    status = status_of(server.address)
    run = found["run"]
    assert run["run_id"] == status.run_id.hex() == server.run_id
    assert (run["phase"], run["epoch"], run["dimension"]) == ("running", status.epoch, status.dimension)
    assert 0 < run["coordinates"] <= run["dimension"]
    assert run["members"] == {"joining": 0, "active": 2, "suspended": 0, "observer": 0}
    assert 0 < run["round"] <= status.round
    assert 0 < run["elapsed_s"] <= status.elapsed_s
    assert 0 < run["bytes_in"] <= status.bytes_in
    assert 0 < run["bytes_out"] <= status.bytes_out
    assert run["rounds_per_s"] > 0
    assert [w["slot"] for w in found["workers"]] == [0, 1]
    theirs = {m.name: m for m in status.members}
    for w in found["workers"]:
        member = theirs[w["name"]]
        assert (w["slot"], w["state"]) == (member.slot, "active")
        assert 0 < w["steps"] <= member.report.steps
        assert 0 < w["merged_round"] <= member.merged_round
        assert 0 < w["contributed"] <= member.contributed
        assert 0 <= w["idle_share"] <= 1
        assert 0 < w["loss"] < 10
        assert (
            w["round_trip_s"] == pytest.approx(member.report.round_trip_s, rel=1e-3) or w["steps"] < member.report.steps
        )
        assert w["round_trip_s"] > 0
        assert w["behind"] >= 0
        assert w["deadline_s"] > 0
        assert w["cycle_s"] > 0
        assert w["exchange"] in {e.value for e in Exchange}
        trace = found["traces"][w["name"]]
        assert trace["present"]
        for _, begin, end, waiting, steps, merged in trace["segments"]:
            assert begin < end <= found["now_s"]
            assert 0 <= waiting <= 1
            assert steps > 0
            assert merged > 0
        assert trace["losses"][-1][2] == w["loss"]
    assert [e["kind"] for e in found["events"] if "name" in e] == ["joined", "joined"]

    later = wait_until(lambda: s if (s := state_of(address, found["look"]))["look"] > found["look"] else None, "a look")
    assert later["instance"] == found["instance"]
    assert later["events"] == []
    for trace in later["traces"].values():
        points = [*trace["losses"], *trace["segments"], *trace["marks"]]
        assert all(point[0] > found["look"] for point in points)
        assert trace["marks"]
    assert len(state_of(address, 10**9)["events"]) == len(found["events"]), "a page of another process starts afresh"

    workers[1].signal(signal.SIGKILL)
    gone = wait_until(lambda: s if (s := state_of(address, later["look"]))["events"] else None, "the departure")
    (left,) = gone["events"]
    assert (left["kind"], left["name"], left["reason"]) == ("left", "w1", "stream-closed")
    assert left["text"] == REASONS[Reason.STREAM_CLOSED]
    assert not gone["traces"]["w1"]["present"]
    assert [w["name"] for w in gone["workers"]] == ["w0"]
    processes.loscar(*WORKER, *flags, "--name", "w1", cwd=SUPPORT)
    back = wait_until(lambda: s if (s := state_of(address, gone["look"]))["events"] else None, "its return")
    assert [(e["kind"], e["name"]) for e in back["events"]] == [("returned", "w1")]


def test_the_server_ends_while_pages_are_open(processes: Processes) -> None:
    """With exit code 0 and nothing on standard error, whatever its viewers hold open; the port is free afterwards."""
    server = processes.server("--workers", "1", "--rounds", "5", "--local-steps", "2", "--linger", "0s", *DASHBOARD)
    address = dashboard_of(server)
    viewer = http.client.HTTPConnection(address, timeout=DEADLINE_S)
    half = socket.create_connection(parse_address(address, "test"), timeout=DEADLINE_S)
    with half, socket.create_connection(parse_address(address, "test"), timeout=DEADLINE_S) as silent:
        half.sendall(b"GET / HTTP/1.1\r\nHost:")
        viewer.request("GET", "/state.json")
        answer = viewer.getresponse()
        answer.read()
        assert answer.status == 200
        assert answer.getheader("Connection") is None, "it stays open"
        worker = processes.loscar(*WORKER, "--server", server.address, cwd=SUPPORT)
        assert (worker.wait(), server.wait()) == (0, 0)
        for connection in (half, silent):
            assert connection.recv(1) == b""
    viewer.close()
    assert "Traceback" not in server.err
    assert "dashboard" not in server.err
    with socket.create_server(parse_address(address, "test")):
        pass


def test_a_local_run_passes_it_on(processes: Processes, tmp_path: Path) -> None:
    options = ["--task", "tiny_task:Tiny", "--workers", "1", "--link", "none", "--local-steps", "2", "--rounds", "3"]
    run = processes.loscar(
        "run", *options, *DASHBOARD, "--step-time", "1ms", "--out", str(tmp_path / "run"), cwd=SUPPORT
    )
    assert run.wait() == 0, run.err
    assert re.search(r"^dashboard at http://127\.0\.0\.1:\d+/$", run.out, re.MULTILINE)


# --- who may see it -----------------------------------------------------------------------------------------


def test_a_run_s_token_protects_its_page(processes: Processes) -> None:
    server = processes.server(*RUN, *DASHBOARD, "--token", "s3cret")
    address = dashboard_of(server)
    for path in FILES:  # they say nothing of the run
        got = get(address, path)
        assert got.status == 200
        assert server.run_id.encode() not in got.body
    for wrong in (
        "",
        "Bearer ",
        "Bearer s3cre",
        "Bearer s3cret2",
        "bearer s3cret",
        "s3cret",
        "Basic s3cret",
        "Bearer \xff",
    ):
        got = get(address, "/state.json", **({"Authorization": wrong} if wrong else {}))
        assert got.status == 401, wrong
        assert got.headers["www-authenticate"] == "Bearer"
        assert server.run_id.encode() not in got.body
        assert b"s3cret" not in got.body
    assert get(address, "/state.json?token=s3cret").status == 401, "addresses end up in logs"
    assert state_of(address, token="s3cret")["run"]["run_id"] == server.run_id


def test_a_public_address_wants_what_the_server_s_own_wants(processes: Processes) -> None:
    for given, missing in ([], "--tls-cert and --tls-key and --token"), (["--token", "t"], "--tls-cert and --tls-key"):
        server = processes.server("--dashboard", "0.0.0.0:0", *given, wait=False)
        assert server.wait() == 3
        line = f"loscar: 0.0.0.0 can be reached from outside: give {missing}, or --insecure if that is meant"
        assert server.err.splitlines()[0] == line
        assert server.out == ""


def test_a_run_with_tls_has_its_page_with_tls(processes: Processes, tmp_path: Path) -> None:
    make_certificates(tmp_path, ["127.0.0.1"], ["w"])
    flags = ["--tls-cert", str(tmp_path / "server.pem"), "--tls-key", str(tmp_path / "server-key.pem"), "--token", "t"]
    server = processes.server(*RUN, *DASHBOARD, *flags, "--tls-client-ca", str(tmp_path / "ca.pem"))
    url = urlsplit(json.loads(server.out)["dashboard"])
    assert url.scheme == "https"
    trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    for context, answered in (trusting, False), (ssl.create_default_context(cafile=str(tmp_path / "ca.pem")), True):
        if answered:
            context.load_cert_chain(tmp_path / "w.pem", tmp_path / "w-key.pem")
        connection = http.client.HTTPSConnection(url.netloc, timeout=DEADLINE_S, context=context)
        try:
            connection.request("GET", "/state.json", headers={"Authorization": "Bearer t"})
            got = json.loads(connection.getresponse().read())
            assert got["run"]["run_id"] == server.run_id
            assert answered
        except (ssl.SSLError, ConnectionError):
            assert not answered, "mutual TLS: a certificate is wanted"
        finally:
            connection.close()
    assert raw(url.netloc, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") == b"", "no page in the clear"
    server.signal(signal.SIGINT)
    assert server.wait() == 0
    assert "Traceback" not in server.err


def test_another_site_s_name_does_not_lead_to_a_page_without_token(idle: tuple[Server, str]) -> None:
    _, address = idle
    port = parse_address(address, "test")[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.1", "[2001:db8::1]:80"):
        assert get(address, "/state.json", Host=host).status == 421, host
    for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1", f"[::1]:{port}", "[::1]"):
        assert get(address, "/state.json", Host=host).status == 200, host


# --- requests -----------------------------------------------------------------------------------------------


def test_every_answer_forbids_what_the_page_does_not_need(idle: tuple[Server, str]) -> None:
    _, address = idle
    for path in (*FILES, "/state.json", "/nothing", "/state.json?since=x"):
        headers = get(address, path).headers
        policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert policy.pop("img-src") == "data:"
        assert {k: v for k, v in policy.items() if v != "'none'"} == dict.fromkeys(
            ("script-src", "style-src", "connect-src"), "'self'"
        )
        assert {"default-src", "base-uri", "form-action", "frame-ancestors"} <= policy.keys()
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


def test_the_page_is_self_contained(idle: tuple[Server, str]) -> None:
    _, address = idle
    page, script, style = (get(address, path).body.decode() for path in FILES)
    wanted = set(re.findall(r'\b(?:src|href)="([^"]*)"', page))
    assert wanted == {"page.js", "page.css", "data:,"}
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", page), "the policy would stop it"
    assert "url(" not in style
    assert "@import" not in style
    assert set(re.findall(r"https?://[^\"'` ]+", page + script + style)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", script), "names come from strangers"


@pytest.mark.parametrize(
    "path",
    [
        "/page.py", "/app.py", "/../app.py", "/..%2fapp.py", "/%2e%2e/app.py", "//etc/passwd", "/page.js/", "*",
        "/page.js/../app.py", "/./page.js", "/PAGE.JS", "/state.json/", "/page.js%00.html", "\\..\\app.py",
        "http://127.0.0.1/page.js",
    ],
)  # fmt: skip
def test_there_is_nothing_but_the_page(idle: tuple[Server, str], path: str) -> None:
    got = raw(idle[1], f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert got.startswith(b"HTTP/1.1 404 "), got
    assert got.endswith(b"\r\n\r\nNot Found\n"), got


HEAD = b" / HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * MOST_HEAD_BYTES + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * 3 * MOST_HEAD_BYTES, 431),
        (b"GET" + HEAD + b"".join(b"A%d: b\r\n" % i for i in range(200)) + b"\r\n", 431),
        (b"POST" + HEAD + b"Content-Length: 4\r\n\r\nabcd", 405),
        (b"DELETE" + HEAD + b"\r\n", 405),
        (b"GET" + HEAD + b"Content-Length: 4\r\n\r\nabcd", 413),
        (b"GET" + HEAD + b"Content-Length: -1\r\n\r\n", 413),
        (b"GET" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (b"GET" + HEAD + b"\r\nGET" + HEAD + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / SPDY/3\r\n\r\n", 400),
        (b"GET / HTTP/3.0\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 505),
        (b"\x00\xff\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    ],
)
def test_bad_requests_are_refused_and_end_the_connection(idle: tuple[Server, str], said: bytes, status: int) -> None:
    server, address = idle
    answer = raw(address, said)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"Content-Security-Policy: " in answer
    assert state_of(address)["run"]["phase"] == "waiting"
    assert server.err == ""


def test_queries_that_mean_nothing(idle: tuple[Server, str]) -> None:
    _, address = idle
    for query in (
        "since=",
        "since=-1",
        "since=1e3",
        "since=1&since=2",
        "since=" + "9" * 40,
        "sinc=1",
        "since=%31",
        "x",
    ):
        assert get(address, f"/state.json?{query}").status == 400, query
    assert get(address, "/page.js?v=1").status == 200


def test_head_has_the_headers_only(idle: tuple[Server, str]) -> None:
    _, address = idle
    got = get(address, "/page.js", "HEAD")
    assert (got.status, got.body) == (200, b"")
    assert int(got.headers["content-length"]) == len(get(address, "/page.js").body)


def test_a_port_that_is_taken_ends_the_command(processes: Processes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = processes.server("--dashboard", address, wait=False)
        assert server.wait() == 10
        line = f"loscar: --dashboard: cannot listen on {address}: Address already in use"
        assert server.err.splitlines()[0] == line


# --- the HTTP server alone ----------------------------------------------------------------------------------


@pytest.fixture
def pages() -> Iterator[HttpServer]:
    server = HttpServer("127.0.0.1:0", "--dashboard")
    try:
        server.serve(answer)
        yield server
    finally:
        server.close()


def answer(request: Request) -> Reply:
    if request.path == "/broken":
        raise ZeroDivisionError
    return Reply(b"here")


def test_slow_and_silent_connections_end(pages: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard_http, "HEAD_S", 0.3)
    monkeypatch.setattr(dashboard_http, "IDLE_S", 0.2)
    assert raw(pages.address, b"") == b""
    assert raw(pages.address, b"GET / HTTP/1.1\r\nHost:") == b""
    with socket.create_connection(parse_address(pages.address, "test"), timeout=DEADLINE_S) as client:
        client.settimeout(0.05)
        sent = 0
        for byte in b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000:  # each byte in good time, all of them never
            try:
                client.sendall(bytes([byte]))
                sent += 1
                if client.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert sent < MOST_HEAD_BYTES
    assert get(pages.address, "/").body == b"here"


def test_connections_are_counted(pages: HttpServer) -> None:
    held = []
    try:
        for _ in range(MOST_CONNECTIONS):
            client = socket.create_connection(parse_address(pages.address, "test"), timeout=DEADLINE_S)
            held.append(client)
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1 << 12).startswith(b"HTTP/1.1 200 "), "served, and kept open"
        assert raw(pages.address, b"") == b"", "one too many"
        held.pop().close()
        assert wait_until(lambda: raw(pages.address, b"GET / HTTP/1.0\r\nHost: x\r\n\r\n"), "room").endswith(b"here")
    finally:
        for client in held:
            client.close()


def test_what_cannot_be_answered_is_503(pages: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    assert get(pages.address, "/broken").status == 503
    assert [r.getMessage() for r in caplog.records] == ["the dashboard could not answer: ZeroDivisionError()"]
    assert get(pages.address, "/").status == 200


def test_addresses_that_cannot_be_had_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--dashboard: cannot listen on nowhere\.invalid:0: "):
        HttpServer("nowhere.invalid:0", "--dashboard")
    for wrong in ("8080", ":8080", "127.0.0.1:99999"):
        with pytest.raises(ConfigError, match="--dashboard '"):
            HttpServer(wrong, "--dashboard")


def test_unreadable_tls_files_are_named(tmp_path: Path) -> None:
    from loscar_deploy.dashboard.app import Dashboard

    for name in ("cert", "key"):
        (tmp_path / name).write_text("no PEM")
    security = ServerSecurity(certificate=tmp_path / "cert", key=tmp_path / "key")
    with pytest.raises(ConfigError, match="--dashboard: the TLS files cannot be used"):
        Dashboard("127.0.0.1:0", security)


# --- what is kept -------------------------------------------------------------------------------------------

LOOK = Look(
    at_s=100.0, run_id="00", phase="running", epoch=1, round=0, elapsed_s=0.0, stop_reason="", dimension=10,
    coordinates=1, method="loscar", workers_wanted=None, heartbeat_s=2.0, bytes_in=0, bytes_out=0,
    counts={}, members=(), hidden=0, departures=(), departed=0,
)  # fmt: skip
MEMBER = MemberLook(
    peer=1, name="w", slot=0, state="active", observer=False, joined_s=100.0, heard_s=100.0, merged_round=0,
    contributed=0, missed=0, deadline_s=10.0, cycle_s=0.5, local_steps=1, overlap_steps=1, report=WorkerReport(),
    exchange=Exchange.AWAITED,
)  # fmt: skip


def at(second: int, *members: MemberLook, departures: tuple[Departure, ...] = (), departed: int = 0) -> Look:
    """A look so many seconds after the first; its members have just been heard."""
    heard = tuple(replace(m, heard_s=LOOK.at_s + second) for m in members)
    return replace(
        LOOK, at_s=LOOK.at_s + second, elapsed_s=float(second), round=second, members=heard, departures=departures,
        departed=departed,
    )  # fmt: skip


def departure(name: str, reason: Reason, at_s: float) -> Departure:
    return Departure(name=name, slot=1, reason=reason, detail="", at_s=at_s, incarnation=bytes(16))


def test_shares_of_the_time_between_two_reports() -> None:
    kept = History()
    for second, run_s, idle_s, steps, merged in (
        (0, 0, 0, 0, 0),
        (1, 1, 0.5, 5, 2),
        (2, 1, 0.5, 5, 2),
        (3, 3, 1, 9, 5),
    ):
        report = WorkerReport(run_s=run_s, idle_s=idle_s, steps=steps)
        kept.add(at(second, replace(MEMBER, report=report, merged_round=merged)))
    assert kept.since(0)["traces"]["w"]["segments"] == [[4, 1.0, 3.0, 0.25, 4, 3]]
    assert kept.since(0)["workers"][0]["behind"] == 0
    assert kept.since(4)["traces"]["w"]["segments"] == []


def test_a_silent_worker_is_said_to_be_silent() -> None:
    kept = History()
    kept.add(at(0, MEMBER))
    kept.add(replace(at(7), members=(MEMBER,)))
    assert [mark[2] for mark in kept.since(0)["traces"]["w"]["marks"]] == ["awaited", "silent"]


def test_every_reason_has_words() -> None:
    assert set(REASONS) == set(Reason)


def test_memory_is_bounded_whoever_comes_and_goes() -> None:
    kept = History(clock=lambda: 0.0)
    gone: list[Departure] = []
    for second in range(3 * MOST_POINTS):
        name = f"passer-by {second}"
        report = WorkerReport(run_s=second + 1.0, idle_s=0.5, steps=second, loss=1.0)
        passer_by = replace(MEMBER, peer=second + 2, name=name, slot=1)
        departures = tuple(gone[-256:])
        kept.add(at(second, replace(MEMBER, report=report), passer_by, departures=departures, departed=len(gone)))
        gone.append(departure(name, Reason.LEFT, LOOK.at_s + second))
    found = kept.since(0)
    assert len(found["traces"]) == MOST_TRACES
    assert f"passer-by {second}" in found["traces"]
    assert len(found["events"]) == MOST_EVENTS
    assert MOST_POINTS / 2 <= len(found["traffic"]) <= MOST_POINTS
    trace = found["traces"]["w"]
    assert MOST_POINTS / 2 <= len(trace["losses"]) <= MOST_POINTS
    steps = {b[3] - a[3] for a, b in zip(trace["losses"], trace["losses"][1:], strict=False)}
    assert len(steps) == 1, "equally spaced"
    assert len(trace["segments"]) == len(trace["marks"]) == LANE_LOOKS


def test_numbers_that_are_none_are_no_numbers_in_json() -> None:
    kept = History()
    for second, value in enumerate((1.0, math.nan, math.inf)):
        report = WorkerReport(run_s=second + 1.0, idle_s=value, loss=value)
        kept.add(at(second, replace(MEMBER, report=report)))
        json.dumps(kept.since(0), allow_nan=False)
    assert [point[2] for point in kept.since(0)["traces"]["w"]["losses"]] == [1.0]


def test_many_departures_between_two_looks_are_all_told() -> None:
    kept = History()
    kept.add(at(0))
    gone = tuple(departure(f"w{i}", Reason.LEASE_EXPIRED, LOOK.at_s) for i in range(5))
    kept.add(at(1, departures=gone, departed=5))
    kept.add(at(2, departures=gone, departed=5))
    names = [e["name"] for e in kept.since(0)["events"] if e["kind"] == "left"]
    assert names == [f"w{i}" for i in range(5)]


def test_of_a_crowd_some_are_shown_and_the_others_counted(processes: Processes) -> None:
    server = processes.server("--workers", "999", *DASHBOARD)
    address = dashboard_of(server)
    with grpc.insecure_channel(server.address) as channel, contextlib.ExitStack() as streams:
        for i in range(MOST_MEMBERS + 2):
            stream = streams.enter_context(RawStream(channel))
            stream.send(engine_of(f"one-of-many-{i}", 8).hello())
            assert isinstance(stream.read(), Welcome)
        found = wait_until(lambda: s if (s := state_of(address))["hidden"] else None, "a look at all of them")
    assert found["run"]["members"]["joining"] == MOST_MEMBERS + found["hidden"]
    assert len(found["workers"]) == len(found["traces"]) == MOST_MEMBERS
