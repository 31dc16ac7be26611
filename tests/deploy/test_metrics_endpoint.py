"""The port of --metrics: who can listen, what is answered, and what broken clients and collectors do to it."""

from __future__ import annotations

import http.client
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from processes import DEADLINE_S
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from scraping import scrape

from loscar_core.errors import ConfigError
from loscar_deploy import metrics_endpoint
from loscar_deploy.metrics_endpoint import MetricsEndpoint, metrics_at
from loscar_wire.transport import parse_address


class One(Collector):
    """A gauge, or an error in its place."""

    error: Exception | None = None

    def describe(self) -> Iterator[Any]:
        return iter([GaugeMetricFamily("loscar_test_seconds", "A test's.")])

    def collect(self) -> Iterator[Any]:
        if self.error is not None:
            raise self.error
        yield GaugeMetricFamily("loscar_test_seconds", "A test's.", 1.5)


@pytest.fixture
def served() -> Iterator[tuple[str, One]]:
    with metrics_at("127.0.0.1:0") as endpoint:
        assert endpoint is not None
        collector = One()
        endpoint.serve(collector)
        yield endpoint.address, collector


def get(address: str) -> tuple[int, str]:
    """Status and body."""
    connection = http.client.HTTPConnection(address, timeout=DEADLINE_S)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_without_the_option_there_is_none() -> None:
    with metrics_at(None) as endpoint:
        assert endpoint is None


def test_figures_of_the_process_and_of_the_collector(served: tuple[str, One]) -> None:
    address, _ = served
    found = scrape(address)
    assert found.value("loscar_test_seconds") == 1.5
    assert found.value("process_resident_memory_bytes") > 1e6
    assert scrape(address, openmetrics=True).value("loscar_test_seconds") == 1.5


def test_the_port_is_free_again_afterwards() -> None:
    with metrics_at("127.0.0.1:0") as endpoint:
        assert endpoint is not None
        endpoint.serve(One())
        address = endpoint.address
    with metrics_at(address) as again:  # not even served
        assert again is not None
        assert again.address == address
    with socket.create_server(parse_address(address, "test")):
        pass


def test_an_address_that_cannot_be_had_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--metrics: cannot listen on {address}: Address already in use"):
            MetricsEndpoint(address)
    with pytest.raises(ConfigError, match=r"--metrics: cannot listen on nowhere\.invalid:0: "):
        MetricsEndpoint("nowhere.invalid:0")
    for wrong in ("9500", "127.0.0.1:", "127.0.0.1:99999", "::1:9500"):
        with pytest.raises(ConfigError, match="--metrics '"):
            MetricsEndpoint(wrong)


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with metrics_at("[::1]:0") as endpoint:
        assert endpoint is not None
        endpoint.serve(One())
        assert endpoint.address.startswith("[::1]:")
        assert scrape(endpoint.address).value("loscar_test_seconds") == 1.5


def test_a_collector_that_fails_is_503_and_one_line(
    served: tuple[str, One], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    address, collector = served
    collector.error = TimeoutError("the loop is busy")
    with caplog.at_level(logging.WARNING, "loscar"):
        status, text = get(address)
    assert status == 503
    assert text == "the metrics could not be collected\n"
    assert [r.getMessage() for r in caplog.records] == [
        "the metrics could not be collected: TimeoutError('the loop is busy')"
    ]
    collector.error = None
    assert scrape(address).value("loscar_test_seconds") == 1.5
    assert "Traceback" not in capfd.readouterr().err


def test_broken_clients_do_no_harm(
    served: tuple[str, One], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _ = served
    monkeypatch.setattr(metrics_endpoint._Handler, "timeout", 0.2)
    for said in (b"\x00\xff\r\n\r\n", b"GET " + b"x" * 100_000 + b"\r\n\r\n", b"GET /metrics HTTP/1.1\r\nHost:", b""):
        with socket.create_connection(parse_address(address, "test"), timeout=DEADLINE_S) as client:
            client.sendall(said)
            while True:  # answered or not, the connection ends
                try:
                    if not client.recv(1 << 16):
                        break
                except ConnectionResetError:
                    break
    assert scrape(address).value("loscar_test_seconds") == 1.5
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("command", ["server", "worker"])
def test_a_missing_library_is_one_line_that_says_what_to_install(command: str) -> None:
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "prometheus_client":
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from loscar_deploy.cli import main
sys.exit(main(["{command}", "--metrics", "127.0.0.1:0"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    what, _ = done.stderr.splitlines()
    assert what == "loscar: --metrics needs the Prometheus client: pip install 'loscar[metrics]'"


def test_the_command_line_does_not_load_it() -> None:
    code = """
import sys
from loscar_deploy.cli import build_parser
build_parser().parse_args(["server", "--metrics", "127.0.0.1:0"])
import loscar_server.app, loscar_deploy.metrics_endpoint
assert "prometheus_client" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
