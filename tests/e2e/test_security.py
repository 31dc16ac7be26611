"""Tokens, TLS and mutual TLS between real processes: who is let in, who is told what, and coming back under TLS."""

from __future__ import annotations

import asyncio
import datetime
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from processes import DEADLINE_S, Processes, Server, wait_until

import loscar_worker as loscar
from loscar_core.errors import AuthenticationError, ConfigError, ConnectError, LoscarError
from loscar_deploy import certs
from loscar_deploy.certs import make_certificates
from loscar_deploy.cli import main
from loscar_deploy.client import Client
from loscar_server.app import ServerOptions, ServerProcess
from loscar_wire import transport
from loscar_wire._generated import parameter_server_pb2 as pb
from loscar_wire.transport import SERVICE, ClientSecurity, ServerSecurity
from loscar_worker.session import Session

HOST = "localhost,127.0.0.1"
FLAGS = ["--workers", "1", "--density", "1", "--local-steps", "1", "--lease", "10m"]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of one authority: good ones, expired ones, one for another host; and those of another authority."""
    folder = tmp_path_factory.mktemp("pki")
    make_certificates(folder / "good", HOST.split(","), ["w"])
    make_certificates(folder / "stranger", HOST.split(","), ["w"])
    for name in ("expired", "elsewhere"):
        (folder / name).mkdir()
        for file in ("ca.pem", "ca-key.pem"):
            shutil.copy(folder / "good" / file, folder / name / file)
    make_certificates(folder / "elsewhere", ["example.org", "10.1.2.3"], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "BACKDATED", datetime.timedelta(days=9))
        make_certificates(folder / "expired", HOST.split(","), ["w"], days=-1)
    return folder


def as_server(folder: Path) -> list[str]:
    return ["--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server-key.pem")]


def as_worker(folder: Path) -> dict[str, Path]:
    return {"tls_cert": folder / "w.pem", "tls_key": folder / "w-key.pem"}


def ask(address: str, security: ClientSecurity) -> Any:
    """What `loscar status` and `loscar doctor` do."""

    async def call() -> Any:
        client = Client(address, security)
        try:
            return await client.status()
        finally:
            await client.close()

    return asyncio.run(call())


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Member:
    """A worker in this process that takes a step when it is told to."""

    def __init__(self, address: str, **options: Any) -> None:
        self.model = torch.nn.Linear(3, 2)
        self.session: Session = loscar.join(address, self.model, name="w", **options)

    def train_until(self, condition: Callable[[], Any], what: str) -> None:
        def once() -> Any:
            with torch.no_grad():
                for p in self.model.parameters():
                    p += 0.01
            self.session.step()
            time.sleep(0.002)
            return condition()

        wait_until(once, what)

    @property
    def round(self) -> int:
        return self.session.engine.anchor.position.round


# --- tokens -------------------------------------------------------------------------------------------------


METHODS = sorted(m.name for m in pb.DESCRIPTOR.services_by_name["ParameterServer"].methods)


def status_code(channel: grpc.Channel, method: str, metadata: list[tuple[str, str]]) -> grpc.StatusCode:
    """How a call with an empty request ends. For Train that is no hello, for Stop a request for the run's end."""
    try:
        if method == "Train":
            list(channel.stream_stream(f"/{SERVICE}/Train")(iter([b""]), timeout=DEADLINE_S, metadata=metadata))
        elif method == "FetchModel":
            list(channel.unary_stream(f"/{SERVICE}/FetchModel")(b"", timeout=DEADLINE_S, metadata=metadata))
        else:
            channel.unary_unary(f"/{SERVICE}/{method}")(b"", timeout=DEADLINE_S, metadata=metadata)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def test_every_call_wants_the_token(processes: Processes) -> None:
    server = processes.server(*FLAGS, "--token", "the right one")
    wrong = [
        [],
        [("authorization", "Bearer the wrong one")],
        [("authorization", "the right one")],
        [("authorization", "Bearer the right one ")],
        [("authorization", "Bearer the right on")],
        [("authorization", "Bearer ")],
        [("x-authorization", "Bearer the right one")],
    ]
    right = [("authorization", "Bearer the right one")]
    with grpc.insecure_channel(server.address) as channel:
        for method in METHODS:
            for metadata in wrong:
                assert status_code(channel, method, metadata) is grpc.StatusCode.UNAUTHENTICATED, (method, metadata)
        assert server.popen.poll() is None, "the stop did not count"
        for method in METHODS:
            assert status_code(channel, method, right) is not grpc.StatusCode.UNAUTHENTICATED, method
    assert "Stop" in METHODS
    server.says("ending the run")
    assert ask(server.address, ClientSecurity("the right one")).refused["AuthenticationError"] == 7 * len(METHODS)


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(transport.hmac, "compare_digest", compare)
    transport.check_token([("authorization", "Bearer x")], "x")
    with pytest.raises(AuthenticationError):
        transport.check_token([("authorization", "Bearer y")], "x")
    assert compared == [(b"Bearer x", b"Bearer x"), (b"Bearer y", b"Bearer x")]


def test_a_token_can_stay_out_of_lists_and_logs(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given by the environment or a file, it is in nobody's command line, and never in a log or an answer."""
    secret = "0123456789-very-secret"
    file = tmp_path / "token"
    file.write_text(secret + "\n")
    server = processes.server(*FLAGS, "--token-file", str(file), "--log-level", "debug")
    status = processes.loscar("status", "--server", server.address, "--json", LOSCAR_TOKEN=secret)
    assert secret not in " ".join(psutil.Process(server.pid).cmdline())
    stranger = processes.loscar("status", "--server", server.address, "--token", "wrong")
    member = Member(server.address, token=secret)
    member.train_until(lambda: member.round > 2, "it trains")
    member.session.close()
    assert status.wait() == 0, status.err
    assert stranger.wait() == 11
    for process in (server, status, stranger):
        assert secret not in process.out + process.err
    assert "loscar: wrong token" in stranger.err

    def refused(*flags: str) -> str:
        assert main(["status", "--server", server.address, *flags]) == 3
        return capsys.readouterr().err

    assert "--token and --token-file: give one of them" in refused("--token", "x", "--token-file", str(file))
    assert "--token-file nowhere: No such file" in refused("--token-file", "nowhere")
    assert "the token is empty" in refused("--token", "")
    file.write_text("\n")
    assert "the token is empty" in refused("--token-file", str(file))
    file.write_bytes(b"\xff\xfe")
    assert "not text" in refused("--token-file", str(file))


# --- TLS ----------------------------------------------------------------------------------------------------


def test_who_does_not_fit_is_told_why_in_one_line(processes: Processes, pki: Path) -> None:
    """Certificates that are expired, of another host or of another authority, and TLS on one side only."""
    kinds = ("good", "expired", "elsewhere")
    servers = {kind: processes.server(*FLAGS, *as_server(pki / kind), wait=False) for kind in kinds}
    servers["mutual"] = processes.server(
        *FLAGS, *as_server(pki / "good"), "--tls-client-ca", str(pki / "good" / "ca.pem"), wait=False
    )
    servers["plain"] = processes.server(*FLAGS, wait=False)
    for server in servers.values():
        server.wait_listening()
    ca, other = pki / "good" / "ca.pem", pki / "stranger" / "ca.pem"

    def pair(kind: str, name: str = "w") -> dict[str, Path]:
        return {"certificate": pki / kind / f"{name}.pem", "key": pki / kind / f"{name}-key.pem"}

    for kind, security in (
        ("good", ClientSecurity(ca=ca)),
        ("good", ClientSecurity(ca=ca, **pair("good"))),
        ("mutual", ClientSecurity(ca=ca, **pair("good"))),
        ("plain", ClientSecurity()),
    ):
        assert ask(servers[kind].address, security).phase == "waiting"
    hung_up = "hangs up like this"
    cases: list[tuple[str, ClientSecurity, type[LoscarError], str]] = [
        ("good", ClientSecurity(ca=other), AuthenticationError, "is not one that --tls-ca vouches for"),
        ("expired", ClientSecurity(ca=ca), AuthenticationError, "or its authority's, has expired"),
        ("elsewhere", ClientSecurity(ca=ca), AuthenticationError, "is for another name or address"),
        ("plain", ClientSecurity(ca=ca), AuthenticationError, "the server does not speak TLS"),
        ("good", ClientSecurity(), ConnectError, hung_up),
        ("mutual", ClientSecurity(ca=ca), ConnectError, hung_up),
        ("mutual", ClientSecurity(ca=ca, **pair("stranger")), ConnectError, hung_up),
        ("mutual", ClientSecurity(ca=ca, **pair("expired")), ConnectError, hung_up),
        ("mutual", ClientSecurity(ca=ca, **pair("good", "server")), ConnectError, hung_up),
        ("mutual", ClientSecurity(), ConnectError, hung_up),
    ]
    for kind, security, error, said in cases:
        with pytest.raises(error, match=re.escape(said)) as found:
            ask(servers[kind].address, security)
        assert "\n" not in str(found.value)
        assert len(str(found.value)) < 300
    for server in servers.values():
        assert server.popen.poll() is None
        assert "Traceback" not in server.err


def test_a_worker_with_a_bad_certificate_ends_at_once(processes: Processes, pki: Path) -> None:
    """And one whose server hangs up keeps trying as long as it may."""
    server = processes.server(*FLAGS, *as_server(pki / "expired"))
    with pytest.raises(AuthenticationError, match="expired"):
        loscar.join(server.address, torch.nn.Linear(3, 2), tls_ca=pki / "good" / "ca.pem", connect_timeout_s=600)
    with pytest.raises(ConnectError, match=r"no server at .* within 1 s: .* hangs up like this"):
        loscar.join(server.address, torch.nn.Linear(3, 2), connect_timeout_s=1)


def test_coming_back_under_mutual_tls(processes: Processes, pki: Path) -> None:
    """The server is killed twice. Restarted with another token it gets nobody back, and nobody gives up either."""
    listen = free_address()
    tls = [*as_server(pki / "good"), "--tls-client-ca", str(pki / "good" / "ca.pem"), "--run-id", "mine"]

    def start(token: str) -> Server:
        return processes.server(*FLAGS, *tls, "--token", token, listen=listen)

    server = start("secret")
    ca = pki / "good" / "ca.pem"
    member = Member(listen, token="secret", tls_ca=ca, **as_worker(pki / "good"))
    member.train_until(lambda: member.round >= 3, "rounds")
    server.signal(signal.SIGKILL)
    server.wait()
    held = member.round

    impostor = start("another")
    member.train_until(lambda: "wrong token" in impostor.err, "it has tried")
    member.train_until(lambda: True, "it trains on")
    assert member.round == held
    impostor.signal(signal.SIGKILL)
    impostor.wait()

    again = start("secret")
    member.train_until(lambda: member.round >= held + 3, "rounds go on")
    assert member.session.reconnects == 1
    assert f"adopting 1:{held}" in again.err
    assert ask(listen, ClientSecurity("secret", ca, *as_worker(pki / "good").values())).epoch == 2
    assert member.session.contributions["returned"] == 0
    member.session.close()


def test_a_worker_outlasts_a_server_that_was_restarted_as_another_run(
    processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody forgot --run-id: the workers hold the run's state, so they must not end because of that."""
    listen = free_address()
    server = processes.server(*FLAGS, "--run-id", "mine", listen=listen)
    caplog.set_level("INFO", "loscar.worker")
    member = Member(listen)
    member.train_until(lambda: member.round >= 2, "rounds")
    server.signal(signal.SIGKILL)
    server.wait()
    held = member.round
    mistake = processes.server(*FLAGS, listen=listen)
    member.train_until(lambda: "this server holds run" in caplog.text, "it is told so")
    mistake.signal(signal.SIGKILL)
    mistake.wait()
    processes.server(*FLAGS, "--run-id", "mine", listen=listen)
    member.train_until(lambda: member.round >= held + 2, "rounds go on")
    member.session.close()


# --- exposure -----------------------------------------------------------------------------------------------


def test_an_address_for_others_wants_tls_and_a_token(
    pki: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused without, warned about with --insecure, silent with both."""
    monkeypatch.setattr(transport, "is_loopback", lambda _: False)  # no test listens where others could come in

    def start(**security: Any) -> None:
        async def briefly() -> None:
            process = ServerProcess(ServerOptions(listen="127.0.0.1:0", security=ServerSecurity(**security)))
            try:
                await process.start()
            finally:
                await process.close()

        asyncio.run(briefly())

    pair = {"certificate": pki / "good" / "server.pem", "key": pki / "good" / "server-key.pem"}
    for security, missing in (
        ({}, "--tls-cert and --tls-key and --token"),
        ({"token": "t"}, "--tls-cert and --tls-key"),
        (pair, "--token"),
    ):
        with pytest.raises(ConfigError, match=f"can be reached from outside: give {missing}, or --insecure if"):
            start(**security)
        assert not caplog.records
        start(**security, insecure=True)
        assert f"127.0.0.1 is served without {missing}: whoever can reach it can join" in caplog.text
        caplog.clear()
    start(token="t", **pair)
    assert not caplog.records
