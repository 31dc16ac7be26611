"""The systemd units: accepted by systemd, their command lines by `loscar`, and their policies fit its exit codes."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from configparser import ConfigParser
from pathlib import Path

import pytest
from processes import Processes, wait_until

from loscar_core import errors
from loscar_core.errors import LoscarError, all_errors
from loscar_deploy import options
from loscar_deploy.certs import make_certificates
from loscar_deploy.cli import build_parser

UNITS = Path(__file__).resolve().parent.parent.parent / "deploy" / "systemd"
SUPPORT = Path(__file__).resolve().parent.parent / "support"
NAMES = ("loscar-server.service", "loscar-worker@.service")
EXAMPLES = {"loscar-server.service": "server.env.example", "loscar-worker@.service": "worker.env.example"}
PROGRAM = "/opt/loscar/bin/loscar"
USAGE = 2
pytestmark = pytest.mark.long
# The codes after which a start with the same files would end in the same way, or do harm.
IN_VAIN: dict[str, set[type[LoscarError]]] = {
    "loscar-server.service": {
        errors.ConfigError,
        errors.WrongRunError,
        errors.AuthenticationError,
        errors.ServerLostError,  # the run goes on at another server
    },
    "loscar-worker@.service": {
        errors.ConfigError,
        errors.WrongModelError,
        errors.VersionMismatchError,
        errors.WrongRunError,
        errors.UnknownTaskError,
        errors.DataMissingError,
        errors.AuthenticationError,
        errors.ProtocolError,
        errors.NonFiniteError,
        errors.SupersededError,  # two processes would take the name from each other for ever
        errors.ReplicaDivergedError,
        errors.ModelChangedError,
    },
}
# What another attempt may cure, from the saved state or a checkpoint.
CURABLE: set[type[LoscarError]] = {
    LoscarError,
    errors.ConnectError,
    errors.PortInUseError,
    errors.RefusedError,
    errors.SessionFailedError,
    errors.SystemRefusedError,
}
# A server does not meet these, and a worker not the last.
ELSEWHERE: dict[str, set[type[LoscarError]]] = {
    "loscar-server.service": IN_VAIN["loscar-worker@.service"] | {errors.WorkerFailedError, errors.NoModelError},
    "loscar-worker@.service": {errors.WorkerFailedError, errors.NoModelError},
}
ASKED_FOR = {errors.InterruptedRunError.exit_code, 128 + signal.SIGTERM}


def unit(name: str) -> ConfigParser:
    """A unit's sections; settings that may be given several times are joined by newlines."""

    class Joined(dict[str, object]):
        def __setitem__(self, key: str, value: object) -> None:
            if isinstance(value, list) and key in self:
                value = [*self[key], *value]  # type: ignore[misc]
            super().__setitem__(key, value)

    text = (UNITS / name).read_text(encoding="utf-8").replace("\\\n", " ")
    parser = ConfigParser(
        dict_type=Joined, strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#", ";")
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def settings(file: Path) -> dict[str, str]:
    """The assignments of an environment file."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def expanded(name: str, instance: str, environment: Mapping[str, str]) -> list[str]:
    """The words of ExecStart as systemd makes them: ${X} is one word, $X is split at spaces; every X must be set."""
    words: list[str] = []
    for word in shlex.split(unit(name)["Service"]["ExecStart"].replace("%i", instance)):
        if re.fullmatch(r"\$\w+", word):
            words += environment[word[1:]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda found: environment[found[1]], word))
    return words


@pytest.mark.parametrize("name", NAMES)
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze on this machine")
    # Everything but the place of the program, which need not be installed here.
    path = tmp_path / name
    path.write_text((UNITS / name).read_text(encoding="utf-8").replace(PROGRAM, sys.executable), encoding="utf-8")
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_with_the_example_settings_is_accepted(name: str) -> None:
    environment = settings(UNITS / EXAMPLES[name])
    environment |= {"STATE_DIRECTORY": "/var/lib/loscar/x", "CREDENTIALS_DIRECTORY": "/run/credentials/x"}
    program, *words = expanded(name, "w0", environment)
    assert program == PROGRAM
    args = build_parser().parse_args(words)
    assert args.token is None, "a token on a command line can be listed"
    assert args.token_file == Path("/run/credentials/x/token")
    if words[0] == "server":
        options.run_config(args)
        options.server_limits(args, None)
        options.seconds("--linger", args.linger)
        assert (args.resume, args.insecure, args.run_id, args.pause_on) == (True, False, "example", "term")
    else:
        assert (words[0], args.name, args.run_id) == ("worker", "w0", "example")
        assert args.state is not None


@pytest.mark.parametrize("name", NAMES)
def test_the_example_sets_what_the_unit_reads_and_no_secret(name: str) -> None:
    section = unit(name)["Service"]
    read = set(re.findall(r"\$\{?(\w+)", section["ExecStart"])) - {"STATE_DIRECTORY", "CREDENTIALS_DIRECTORY"}
    given = set(settings(UNITS / EXAMPLES[name]))
    assert read <= given
    assert given - read <= {"LOSCAR_DATA_DIR"}, "what the program itself reads"
    # Every credential that is read is loaded, and the other way round.
    loaded = {line.partition(":")[0] for line in section["LoadCredential"].split("\n")}
    assert loaded == set(re.findall(r"\$\{CREDENTIALS_DIRECTORY\}/([\w.-]+)", section["ExecStart"]))


@pytest.mark.parametrize("name", NAMES)
def test_restarts_fit_the_exit_codes(name: str) -> None:
    section = unit(name)["Service"]
    assert section["Restart"] == "on-failure"
    prevented = {int(code) for code in section["RestartPreventExitStatus"].split()}
    assert prevented == {USAGE, *(cls.exit_code for cls in IN_VAIN[name])}
    # A worker that lost its server has saved its state.
    curable = CURABLE | ({errors.ServerLostError} - IN_VAIN[name])
    assert not prevented & {cls.exit_code for cls in curable}
    # A code that is new has to be put into one of the tables.
    known = IN_VAIN[name] | curable | ELSEWHERE[name] | {errors.InterruptedRunError}
    assert {cls.exit_code for cls in all_errors()} == {cls.exit_code for cls in known}
    assert {int(code) for code in section["SuccessExitStatus"].split()} == ASKED_FOR
    assert section["KillSignal"] == "SIGTERM"


def test_the_limit_stops_who_fails_at_once_and_not_who_waits_for_a_server() -> None:
    worker = unit("loscar-worker@.service")
    window_s = options.seconds("StartLimitIntervalSec", worker["Unit"]["StartLimitIntervalSec"])
    pause_s = options.seconds("RestartSec", worker["Service"]["RestartSec"])
    burst = int(worker["Unit"]["StartLimitBurst"])
    connect_s = options.seconds("--connect-timeout", re.findall(r"--connect-timeout (\S+)", "\n".join(
        worker["Service"].values()))[0])  # fmt: skip
    assert burst * pause_s < window_s < burst * (pause_s + connect_s)


def test_both_commands_train_with_tls_and_a_token_and_sigterm_ends_no_run(tmp_path: Path, processes: Processes) -> None:
    """What systemd would start, with its credentials and state folders as plain ones."""
    credentials = tmp_path / "credentials"
    make_certificates(credentials, ["127.0.0.1"], ["worker"])
    (credentials / "token").write_text("a long random text\n", encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    common = {"LOSCAR_RUN_ID": "unit", "CREDENTIALS_DIRECTORY": str(credentials)}
    states = {}
    for role in ("server", "worker"):
        states[role] = tmp_path / role
        states[role].mkdir()

    def start(name: str, role: str, **environment: str) -> list[str]:
        return expanded(name, "w0", {**common, "STATE_DIRECTORY": str(states[role]), **environment})[1:]

    server = processes.loscar(
        *start("loscar-server.service", "server", LOSCAR_LISTEN=listen, LOSCAR_ARGS="--start-grace 0s --linger 0s")
    )
    worker = processes.loscar(
        *start(
            "loscar-worker@.service", "worker", LOSCAR_SERVERS=listen, LOSCAR_TASK="tiny_task:Tiny",
            LOSCAR_ARGS="--step-time 5ms --state-every 1s",
        ),
        cwd=SUPPORT,
    )  # fmt: skip
    worker.says("joined run")
    wait_until((states["worker"] / "worker.state").exists, "the worker's state")
    kill = getattr(signal, unit("loscar-worker@.service")["Service"]["KillSignal"])
    worker.signal(kill)
    assert worker.wait() == 0, worker.err
    server.says("w0 left: left")
    again = processes.loscar(*worker.arguments[3:], cwd=SUPPORT)
    again.says("goes on from")
    # `systemctl restart` of the server.
    server.signal(getattr(signal, unit("loscar-server.service")["Service"]["KillSignal"]))
    assert server.wait() in ASKED_FOR, server.err
    assert "paused run" in server.err
    server = processes.loscar(*server.arguments[3:])
    again.says("connected again")
    assert "resuming run" in server.err
    # `systemctl kill --signal=SIGINT loscar-server`
    server.signal(signal.SIGINT)
    assert again.wait() == 0, again.err
    assert server.wait() == 0, server.err
    assert (states["worker"] / "model.safetensors").is_file()
    assert list((states["server"] / "checkpoints").glob("*.safetensors"))
