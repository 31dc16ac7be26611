"""Logs of servers and workers: JSON lines with run and worker, text on a terminal, and nothing that is neither."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from processes import DEADLINE_S, Process, Processes, status_of, wait_until

from loscar_core.errors import ConfigError, ConnectError

SUPPORT = Path(__file__).parents[1] / "support"
FIELDS = {"time", "level", "logger", "message", "role", "run_id", "worker"}
NOWHERE = ["--server", "127.0.0.1:1", "--task", "tiny_task:Tiny", "--connect-timeout", "300ms", "--name", "alone"]

pytestmark = pytest.mark.timeout(120)


def lines(process: Process) -> list[dict[str, Any]]:
    """Everything that it said to standard error; all of it has to be JSON."""
    found = [json.loads(line) for line in process.err.splitlines()]
    for line in found:
        assert line.keys() >= FIELDS, line
        assert datetime.fromisoformat(line["time"]).tzinfo == UTC
    return found


def read(terminal: int) -> str:
    """What is there to be read; nothing once the other side is closed, which Linux calls an error."""
    try:
        return os.read(terminal, 1 << 16).decode()
    except OSError:
        return ""


def test_every_line_of_a_run_names_run_and_worker(processes: Processes) -> None:
    server = processes.server("--workers", "1", "--run-id", "logged", "--log-format", "json", "--log-level", "debug")
    flags = ["--server", server.address, "--task", "tiny_task:Tiny", "--name", "w0", "--step-time", "2ms"]
    worker = processes.loscar("worker", *flags, "--log-format", "json", cwd=SUPPORT)
    worker.says("joined run")
    wait_until(lambda: status_of(server.address).round >= 2, "rounds are committed")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    own = lines(worker)
    assert {line["worker"] for line in own} == {"w0"}
    assert {line["role"] for line in own} == {"worker"}
    said = [line["message"] for line in own]
    assert f"w0 joined run {server.run_id} at slot 0" in said
    assert "leaving after this step; once more to stop at once" in said, "written by the signal's handler"
    joined = said.index(f"w0 joined run {server.run_id} at slot 0")
    assert {line["run_id"] for line in own[joined:]} == {server.run_id}
    served = lines(server)
    assert {line["role"] for line in served} == {"server"}
    assert {line["worker"] for line in served} == {None}
    assert {line["run_id"] for line in served} == {server.run_id}
    assert "w0 joined at slot 0" in [line["message"] for line in served]
    assert {"debug", "info"} <= {line["level"] for line in served}


def test_the_last_line_is_the_error(processes: Processes) -> None:
    run_id = "ab" * 16
    worker = processes.loscar("worker", *NOWHERE, "--run-id", run_id, "--log-format", "json", cwd=SUPPORT)
    assert worker.wait() == ConnectError.exit_code
    last = lines(worker)[-1]
    assert last["level"] == "error"
    assert last["message"].startswith("no server at 127.0.0.1:1 within 0.3 s: ")
    assert (last["hint"], last["exit_code"]) == (ConnectError.hint, ConnectError.exit_code)
    assert (last["worker"], last["run_id"]) == ("alone", run_id)
    wrong = processes.loscar("server", "--density", "0", "--log-format", "json")
    assert wrong.wait() == 3
    [only] = lines(wrong)
    assert only["message"].startswith("--density 0 is outside")
    assert only["role"] == "server"


def test_automatic_is_text_on_a_terminal_and_json_elsewhere(processes: Processes) -> None:
    elsewhere = processes.loscar("worker", *NOWHERE, "--log-format", "auto", cwd=SUPPORT)
    master, slave = pty.openpty()
    try:
        on_terminal = subprocess.Popen(
            [sys.executable, "-m", "loscar_deploy", "worker", *NOWHERE, "--log-format", "auto"],
            cwd=SUPPORT,
            stdin=subprocess.DEVNULL,
            stderr=slave,
        )
        os.close(slave)
        try:
            assert on_terminal.wait(DEADLINE_S) == ConnectError.exit_code
        finally:
            on_terminal.kill()
            on_terminal.wait()
        text = "".join(iter(lambda: read(master), ""))
    finally:
        os.close(master)
    assert "\nloscar: no server at 127.0.0.1:1 within 0.3 s: " in text.replace("\r", "")
    assert "{" not in text
    assert elsewhere.wait() == ConnectError.exit_code
    assert [line["level"] for line in lines(elsewhere)] == ["warning", "error"]


def test_without_an_option_it_is_text_on_a_terminal_and_json_lines_otherwise(processes: Processes) -> None:
    piped = processes.loscar("worker", *NOWHERE, cwd=SUPPORT, LOSCAR_LOG_FORMAT="")
    assert piped.wait() == ConnectError.exit_code
    assert json.loads(piped.err.splitlines()[-1])["exit_code"] == ConnectError.exit_code
    wrong = processes.loscar("worker", *NOWHERE, cwd=SUPPORT, LOSCAR_LOG_FORMAT="yaml")
    assert wrong.wait() == ConfigError.exit_code
    assert "LOSCAR_LOG_FORMAT=yaml" in wrong.err


def test_text(processes: Processes) -> None:
    worker = processes.loscar("worker", *NOWHERE, cwd=SUPPORT, LOSCAR_LOG_FORMAT="text")
    assert worker.wait() == ConnectError.exit_code
    first, what, to_do = worker.err.splitlines()
    assert " no server at 127.0.0.1:1 yet (" in first
    assert what.startswith("loscar: no server at ")
    assert to_do == f"  {ConnectError.hint}"


def test_warnings_and_uncaught_exceptions_are_lines_too(processes: Processes) -> None:
    script = """
import logging, threading, warnings
from loscar_deploy import logs
logs.configure("info", "json")
logs.know(role="test")
warnings.warn("watch\\nout")
def fail():
    raise ValueError("in a thread")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("loscar").exception("caught \\ud800 %d", 1)
raise RuntimeError("first line\\nsecond line")
"""
    process = processes.python("-c", script)
    assert process.wait() == 1
    warned, thread, caught, uncaught = lines(process)
    assert warned["level"] == "warning"
    assert "UserWarning: watch\nout" in warned["message"]
    assert (thread["level"], thread["message"]) == ("critical", "ValueError('in a thread')")
    assert thread["exception"].startswith("Traceback")
    assert caught["message"] == "caught \ud800 1"
    assert caught["exception"].endswith("ZeroDivisionError: division by zero")
    assert uncaught["level"] == "critical"
    assert uncaught["exception"].endswith("RuntimeError: first line\nsecond line")
