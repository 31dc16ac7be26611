"""Every command of README and docs is tried, or says where it is tried, or why it cannot be tried here.

A scenario is a list of commands as the pages show them, run in one folder and in that order, on this machine, with
small numbers in place of large ones and free ports in place of fixed ones. A command that is in no list fails the first
test, and so does an entry that no page shows any more.
"""

from __future__ import annotations

import re
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pages import PAGES, ROOT, fences, shown_commands
from processes import Process, Processes

from loscar_deploy.cli import build_parser

FOREGROUND_S = 200.0
Changes = dict[str, str]


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        shown: as a page shows it.
        changes: pieces of it that are replaced; each must be there. `{port}`, `{standby}`, `{root}` and `{prefix}` (of
            the virtual environment) may stand in what replaces them.
        more: is appended.
        instead: run this for it.
        says: it goes on in the background once its output contains this.
        behind: it goes on in the background at once.
        stop: what ends it there; None for what ends by itself.
        status: how it ends, or may end.
    """

    shown: str
    changes: Changes = field(default_factory=dict)
    more: str = ""
    instead: str = ""
    says: str = ""
    behind: bool = False
    stop: signal.Signals | None = None
    status: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Kill:
    """`kill -9 %1`, as the shown command says: of the scenario's first command in the background."""

    shown: str = "kill -9 %1"


@dataclass(frozen=True)
class Heard:
    """Until the last command in the background that was shown like this says something."""

    shown: str
    says: str


@dataclass(frozen=True)
class Wait:
    """Until everything in the background that ends by itself has ended."""


@dataclass(frozen=True)
class Scenario:
    """Commands in one folder, in order; `files` are blocks of pages that are saved there: (page, how it begins)."""

    steps: tuple[Step | Kill | Heard | Wait, ...]
    long: bool = True
    files: dict[str, tuple[str, str]] = field(default_factory=dict)


LISTENS = "listening on"
FOREVER = signal.SIGTERM
HERE = {"127.0.0.1:50051": "127.0.0.1:{port}"}
THERE = {"127.0.0.1:50052": "127.0.0.1:{standby}"}
SHORT = "--duration 3s --workers 2"
PAGE = {"127.0.0.1:8080": "127.0.0.1:0"}
MAKE = "make --directory {root} VENV={prefix} --old-file={prefix}/worker.stamp --old-file={prefix}/dev.stamp"
REACHED = (0, 1)  # a benchmark that misses its target on a busy machine has been run all the same
EXAMPLE = {"server.example:50051": "127.0.0.1:{port}"}
SERVER = (
    "loscar server --listen 0.0.0.0:50051 --run-id first-run --workers 3 --duration 10m --linger 30m --tls-cert "
    "pki/server.pem --tls-key pki/server-key.pem --token-file token --checkpoints checkpoints --dashboard 0.0.0.0:8080"
)
SERVER_HERE = {"0.0.0.0:50051": "127.0.0.1:{port}", "0.0.0.0:8080": "127.0.0.1:0", "--duration 10m": "--rounds 4"}
WORKER = (
    "loscar worker --server server.example:50051 --tls-ca ca.pem --token-file token --name first --task digits "
    "--workers 3 --save-model model.safetensors --state first.state"
)
STATUS = "loscar status --server server.example:50051 --tls-ca ca.pem --token-file token"
ACCESS = (
    Step("loscar certs pki --hosts server.example", {"server.example": "127.0.0.1"}),
    Step("(umask 077; openssl rand -hex 32 > token)"),
    Step(
        "loscar doctor --listen 0.0.0.0:50051 --server-cert pki/server.pem --server-key pki/server-key.pem",
        {"0.0.0.0:50051": "127.0.0.1:{port}"},
    ),
    Step(SERVER, SERVER_HERE, says=LISTENS, stop=FOREVER),
    Step("scp server.example:pki/ca.pem server.example:token .", instead="cp pki/ca.pem ."),
    Step(
        "loscar doctor --server server.example:50051 --tls-ca ca.pem --token-file token --task digits",
        EXAMPLE | {" --task digits": ""},
    ),
    Step(STATUS, EXAMPLE),
    Step(f"{STATUS} --watch", EXAMPLE, says="waiting", stop=signal.SIGINT, status=(130,)),
)
SAVED = (
    "loscar server --listen 127.0.0.1:50051 --run-id mine --workers 2 --duration 10m --checkpoints checkpoints "
    "--checkpoint-every 30s --pause-on term"
)
SOON = {"--checkpoint-every 30s": "--checkpoint-every 1s"}
TRAIN = "loscar worker --server 127.0.0.1:50051 --name {} --state {}.state --state-every 30s"
FIRST = "loscar server --listen 127.0.0.1:50051 --run-id mine --workers 2 --duration 10m"
SECOND = FIRST.replace("50051", "50052")
BOTH = "loscar worker --server 127.0.0.1:50051,127.0.0.1:50052 --name {}"

SCENARIOS = {
    "server and access": Scenario(ACCESS, long=False),
    "plans": Scenario(
        (
            Step("loscar --version"),
            Step("loscar plan --params 124e6 --step-time 0.35s --link 4g --workers 8 --task my_package.tasks:gpt"),
            Step("loscar plan --params 4810 --step-time 10ms --link rtt=400ms,rate=1mbit --workers 4 --task digits"),
            Step(
                "loscar link --listen 127.0.0.1:50052 --to 127.0.0.1:50051 rtt=200ms,jitter=20ms,rate=10mbit",
                HERE | THERE,
                says=LISTENS,
                stop=FOREVER,
            ),
            Step("loscar certs pki --hosts server.example.net --workers worker"),
            Step(
                "loscar server --listen 127.0.0.1:50051 --dashboard 127.0.0.1:8080",
                HERE | PAGE,
                says="dashboard at http",
                stop=FOREVER,
            ),
            Step(
                "loscar status --server 127.0.0.1:50051 --watch",
                HERE,
                says="waiting",
                stop=signal.SIGINT,
                status=(130,),
            ),
        ),
        long=False,
    ),
    "three machines": Scenario(
        (
            *(step for step in ACCESS if "--watch" not in step.shown),
            Step(
                "loscar doctor --server server.example:50051 --tls-ca ca.pem --token-file token --task digits", EXAMPLE
            ),
            Step(WORKER, EXAMPLE, behind=True),
            Step(WORKER, EXAMPLE | {"first": "second", "model.safetensors": "second.safetensors"}, behind=True),
            Step(WORKER, EXAMPLE | {"first": "third", "model.safetensors": "third.safetensors"}, behind=True),
            Wait(),
            Step("loscar evaluate --task digits model.safetensors"),
            Step(
                "loscar fetch --server server.example:50051 --tls-ca ca.pem --token-file token "
                "--out fetched.safetensors",
                EXAMPLE,
            ),
            Step("loscar evaluate --task digits model.safetensors", {"model": "fetched"}),
        )
    ),
    "resuming": Scenario(
        (
            Step(SAVED, HERE | SOON, says=LISTENS),
            Step(TRAIN.format("first", "first"), HERE, more="--step-time 10ms", behind=True),
            Step(TRAIN.format("second", "second"), HERE, more="--step-time 10ms", says="joined run"),
            Kill(),
            Step(
                f"{SAVED} --resume",
                HERE | SOON | {"--duration 10m": "--rounds 30"},
                more="--linger 0s",
                says="run on at",
            ),
            Wait(),
        )
    ),
    "standby": Scenario(
        (
            Step(FIRST, HERE, says=LISTENS),
            Step(SECOND, THERE, says=LISTENS, stop=FOREVER),
            Step(BOTH.format("first"), HERE | THERE, more="--step-time 10ms", behind=True),
            Step(BOTH.format("second"), HERE | THERE, more="--step-time 10ms", says="joined run"),
            Kill(),
            Heard(SECOND, "run on at"),
            Step("loscar status --server 127.0.0.1:50052", THERE),
        )
    ),
    "runs": Scenario(
        (
            Step("loscar run", more=f"{SHORT} --out runs/20261121-121520"),
            Step("loscar report runs/20261121-121520"),
            Step(
                'loscar run --link "rtt=600ms,rate=1mbit" --dashboard 127.0.0.1:8080',
                PAGE,
                more=f"{SHORT} --out runs/b",
            ),
            Step("loscar run --workers 4 --dashboard 127.0.0.1:8080", PAGE, more=f"{SHORT} --out runs/c"),
            Step("loscar run --merge overwrite --link rtt=400ms", more=f"{SHORT} --out runs/d"),
            Step("loscar run --local-steps 25 --overlap-steps 0", more=f"{SHORT} --out runs/e"),
        )
    ),
    "more runs": Scenario(
        (
            Step(
                'loscar run --density 0.01 --selection random --wire-dtype bfloat16 --link "wan;4g;satellite;none"',
                more="--duration 3s --out runs/f",
            ),
            Step(
                "loscar run --workers 8 --slowdown 1,1,1,1,2,2,3,4 --partition dirichlet:0.3 --evaluate-every 10",
                {"--workers 8 --slowdown 1,1,1,1,2,2,3,4": "--workers 3 --slowdown 1,1,4"},
                more="--rounds 12 --out runs/g",
            ),
            Step('loscar run --workers 3 --link "wan;4g;satellite,rate=5mbit"', more="--duration 3s --out runs/h"),
            Step("loscar run --task spirals:Spirals", more=f"{SHORT} --out runs/i"),
        ),
        files={"spirals.py": ("tasks.md", '"""Two interleaved spirals')},
    ),
    "methods": Scenario(
        (
            Step("loscar run --method dppf:alpha=0.1,lambda=0.2 --duration 5s", more="--workers 2 --out runs/first"),
            Step("loscar simulate --method local-sgd --local-steps 8 --rounds 40"),
            # A plane takes three models.
            Step(
                "loscar run --method dppf:alpha=0.2,lambda=0.4 --keep-models --out runs/wide",
                more="--duration 3s --workers 3",
            ),
            Step("loscar evaluate runs/wide --sharpness --surface surface.png"),
        )
    ),
    "comparisons": Scenario(
        (
            Step(
                "loscar simulate --workers 4 --link rtt=400ms,rate=1mbit --density 0.05 --duration 30s",
                {"--duration 30s": "--duration 5s"},
            ),
            Step(
                "loscar compare --simulate --link rtt=400ms,rate=1mbit --densities 0.01,0.05,0.25,1 --repeat 2 "
                "--target-loss 0.2 --duration 30s --out runs/densities",
                {"--repeat 2": "--repeat 1", "0.01,0.05,0.25,1": "0.05", "--duration 30s": "--duration 3s"},
            ),
            Step(
                'loscar compare --simulate --densities 0.05,1 --links "none|rtt=200ms,rate=1mbit" --repeat 2 '
                "--target-loss 0.2 --duration 15s --out runs/comparison",
                {"--repeat 2": "--repeat 1", "--duration 15s": "--duration 3s"},
            ),
            Step("loscar report runs/comparison/runs/link2-density1-seed0-* --out comparison-report"),
        )
    ),
    "figures and logs": Scenario(
        (
            Step(
                "loscar server --listen 127.0.0.1:50051 --metrics 127.0.0.1:9500",
                HERE | {"127.0.0.1:9500": "127.0.0.1:0"},
                more="--rounds 4 --workers 2 --linger 0s",
                says=LISTENS,
            ),
            Step(
                "loscar worker --server 127.0.0.1:50051 --metrics 127.0.0.1:9501",
                HERE | {"127.0.0.1:9501": "127.0.0.1:0"},
                says="metrics",
            ),
            Step("loscar worker --server 127.0.0.1:50051 --name w0 --log-format json", HERE),
            Wait(),
        )
    ),
    "load": Scenario(
        (
            Step(
                "loscar loadtest --workers 16 --params 1e6 --density 0.01 --rounds 100",
                {"--rounds 100": "--rounds 10", "--workers 16": "--workers 4"},
            ),
            Step(
                "loscar loadtest --workers 8 --params 1e6 --density 0.01 --rounds 20 "
                "--link rtt=50ms,rate=50mbit --json",
                {"--rounds 20": "--rounds 10", "--workers 8": "--workers 4"},
            ),
        )
    ),
    "scripts": Scenario(
        (
            Step("make run", {"make": MAKE}, more=f'ARGS="{SHORT} --out $PWD/run"'),
            Step("make soak", {"make": MAKE}, more='ARGS="--rounds 300 --out $PWD/soak.json"', status=(0, 2)),
            Step(
                "make fuzz",
                {"make": f"{MAKE} --old-file={{prefix}}/fuzz.stamp"},
                more='ARGS="--blind --runs 300 --out $PWD/fuzz.json --crashes $PWD/crashes"',
            ),
            Step(
                "python benchmarks/pictures.py",
                {"benchmarks": "{root}/benchmarks"},
                more="--only selection --out pictures",
            ),
            Step(
                "python benchmarks/cli_start.py",
                {"benchmarks": "{root}/benchmarks"},
                more="--runs 3 --out cli.json",
                status=REACHED,
            ),
            Step(
                "python benchmarks/session_overhead.py",
                {"benchmarks": "{root}/benchmarks"},
                more="--steps 20 --out session.json",
                status=REACHED,
            ),
        )
    ),
    "several servers": Scenario(
        (
            Step(
                "loscar server --listen 0.0.0.0:50051 --shard 0/2 --run-id spread --workers 3 --density 0.01 "
                "--duration 1h --insecure",
                {"0.0.0.0:50051": "127.0.0.1:{port}", "--workers 3": "--workers 1", "--duration 1h": "--rounds 3"},
                says=LISTENS,
                stop=FOREVER,
            ),
            Step(
                "loscar server --listen 0.0.0.0:50051 --shard 1/2 --run-id spread --workers 3 --density 0.01 "
                "--insecure",
                {"0.0.0.0:50051": "127.0.0.1:{standby}", "--workers 3": "--workers 1"},
                says=LISTENS,
                stop=FOREVER,
            ),
            Step(
                'loscar worker --server "one.example:50051;two.example:50051" --task digits',
                {"one.example:50051": "127.0.0.1:{port}", "two.example:50051": "127.0.0.1:{standby}"},
            ),
            Step(
                'loscar fetch --server "one.example:50051;two.example:50051" --out model.safetensors',
                {"one.example:50051": "127.0.0.1:{port}", "two.example:50051": "127.0.0.1:{standby}"},
            ),
        )
    ),
    "schedules": Scenario((Step("make schedules", {"make": MAKE}, more='ARGS="--seeds 1 --out $PWD/schedules.json"'),)),
    "chaos": Scenario(
        (
            Step(
                "loscar chaos --workers 8 --seconds 60 --seed 0",
                {"--workers 8": "--workers 3", "--seconds 60": "--seconds 3"},
                more="--alone --out chaos",
            ),
        )
    ),
}

TRIED_IN = {
    "make chaos": "tests/e2e/test_chaos.py",
    "python train.py 127.0.0.1:50051": "tests/test_docs.py",
    "loscar server --listen 127.0.0.1:50051 --workers 2 --duration 20s --density 0.05": "tests/test_docs.py",
    "loscar worker --server HOST:50051 --tls-ca ca.pem --tls-cert worker.pem --tls-key worker-key.pem "
    "--token-file token": "tests/e2e/test_security.py",
    "loscar server --run-id mine --checkpoints state --resume --pause-on term": "tests/e2e/test_pause.py",
    "loscar fetch --server HOST:50051 --token-file token --out model.safetensors": "tests/deploy/test_fetch.py",
    "loscar evaluate model.safetensors --task digits": "tests/e2e/test_run.py",
    "loscar run --workers 4 --writer tensorboard --out runs/first": "tests/deploy/test_writers.py",
    "loscar status --server 127.0.0.1:50051 --watch --writer tensorboard --out runs/first": (
        "tests/deploy/test_writers.py"
    ),
    "WANDB_MODE=offline loscar run --workers 2 --duration 10s --writer wandb --out runs/offline": (
        "tests/deploy/test_writers.py"
    ),
}
"""Run there with the same options, by their own names and figures."""

NOT_HERE = {
    "make test": "it is what runs this",
    "python benchmarks/main_job.py --seeds 0,1,2,3,4": "three minutes of `loscar run` without options; make bench",
    "python benchmarks/a9a.py --data-dir DIR": "needs the data set a9a; make bench",
    "python3 -m venv .venv": "an environment of its own: what `make run` does on a fresh clone",
    ". .venv/bin/activate": "the same",
    "pip install --constraint constraints.txt '.[worker,certs]'": (
        "from a package index: tests/deploy/test_packaging.py installs what is built from here"
    ),
    "pip install 'loscar[tensorboard]'": "from a package index",
    "tensorboard --logdir runs": "another project's program",
    "wandb sync runs/offline/wandb/offline-run-*": "needs an account",
    "mkdir -p deploy/pki": "part of the way to containers with TLS: tests/compose/test_overlays.py",
    "mkdir loscar-run": "part of the way to a Slurm job: tests/deploy/test_slurm.py",
    "tail -f loscar-run/server.log": "the same",
}
"""Why not."""

ELSEWHERE = {
    r"make (up|down|loadtest)\b|docker(-compose)? |sudo |export (COMPOSE|LOSCAR)|openssl .*docker secret": (
        "needs a container engine, root or both: tests/compose, tests/deploy/test_swarm.py"
    ),
    r"tc |modprobe |ip |iptables ": "changes the machine's network, as root",
    r"systemctl |journalctl |install |python3 -m venv /opt|/opt/loscar": (
        "changes the machine, as root: tests/deploy/test_units.py runs what the units run"
    ),
    r"sbatch ": "needs Slurm: tests/deploy/test_slurm.py runs the script with a stand-in",
    r"loscar run --on ": "needs a Ray cluster: tests/e2e/test_ray.py starts one",
    r"\(umask 077; openssl rand|scp ": "on three machines: tests/compose/test_three_machines.py makes them",
    r"loscar (certs .*--workers old,home,box|server .*--run-id three|\w+ --server HOST:50051 .*--token-file token)": (
        "the same, or one like it"
    ),
    r"python3 -m venv ~/loscar-venv|~/loscar-venv/|export PATH=~/loscar-venv/": (
        "from a package index: tests/deploy/test_packaging.py installs what is built from here"
    ),
    r"kubectl ": "needs a cluster: tests/deploy/test_kubernetes.py runs what the pods run",
}
"""Of whole families of commands, by how they begin: why not, and where what matters is tried."""


def test_commands_that_are_tried_elsewhere_have_options_that_exist() -> None:
    lines = {line for page in PAGES for line in shown_commands(page) if line.startswith("loscar ")}
    lines = {line for line in lines if any(re.match(pattern, line) for pattern in ELSEWHERE)}
    assert len(lines) > 10
    for line in sorted(lines):
        command = re.split(r" (?:[&|>]|2>|#)", line)[0]
        try:
            build_parser().parse_args(shlex.split(command)[1:])
        except SystemExit:
            pytest.fail(f"not a command of this program: {line}")


def test_every_command_is_tried_or_says_why_not() -> None:
    shown = {line for page in PAGES for line in shown_commands(page)}
    assert len(shown) > 80
    run = {step.shown for s in SCENARIOS.values() for step in s.steps if isinstance(step, Step | Kill)}
    listed = [run, set(TRIED_IN), set(NOT_HERE)]
    family = {line for line in shown if any(re.match(pattern, line) for pattern in ELSEWHERE)}
    untried = sorted(shown - set().union(*listed) - family)
    assert not untried, "documented, and not tried here:\n" + "\n".join(untried)
    gone = sorted(set().union(*listed) - shown)
    assert not gone, "tried, and not documented any more:\n" + "\n".join(gone)
    assert sum(map(len, listed)) == len(set().union(*listed)), "in two lists"
    for pattern in ELSEWHERE:
        assert any(re.match(pattern, line) for line in shown), pattern
    for path in [*TRIED_IN.values(), *re.findall(r"tests/\S+\.py", str(ELSEWHERE) + str(NOT_HERE))]:
        assert (ROOT / path).is_file(), path


class Shell(Processes):
    """Starts command lines; `loscar`, `python` and `make` are those of this environment."""

    def line(self, text: str, cwd: Path) -> Process:
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        alone = re.match(r"loscar |python ", text)  # it takes the shell's place, so that signals reach it
        return self._start(Process, ["bash", "-c", f"exec {text}" if alone else text], cwd, {"PATH": path})


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    started = Shell(tmp_path / "logs")
    try:
        yield started
    finally:
        started.kill_all()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def command_of(step: Step, values: dict[str, object]) -> str:
    """What is run for a step."""
    text = step.instead or step.shown
    for old, new in step.changes.items():
        assert old in text, f"{old!r} is not in {text!r}"
        text = text.replace(old, new.format(**values))
    return f"{text} {step.more}".strip()


def finish(step: Step, process: Process) -> None:
    assert process.wait(FOREGROUND_S) in step.status, f"{process.arguments}\n{process.out}\n{process.err}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.timeout(570), *([pytest.mark.long] if scenario.long else [])])
        for name, scenario in SCENARIOS.items()
    ],
)
def test_commands_run(name: str, shell: Shell, tmp_path: Path) -> None:
    scenario, folder = SCENARIOS[name], tmp_path / "here"
    folder.mkdir()
    for file, (page, start) in scenario.files.items():
        [text] = [body for _, body in fences(ROOT / "docs" / page) if body.startswith(start)]
        (folder / file).write_text(text, encoding="utf-8")
    port, standby = free_ports(2)
    values: dict[str, object] = {"port": port, "standby": standby, "root": ROOT, "prefix": sys.prefix}
    background: list[tuple[Step, Process]] = []
    for step in scenario.steps:
        if isinstance(step, Kill):
            _, process = background.pop(0)
            process.signal(signal.SIGKILL)
            process.wait()
        elif isinstance(step, Heard):
            [*_, process] = [process for own, process in background if own.shown == step.shown]
            process.says(step.says, FOREGROUND_S)
        elif isinstance(step, Wait):
            for own, process in background:
                if own.stop is None:
                    finish(own, process)
        else:
            process = shell.line(command_of(step, values), folder)
            if step.says or step.behind:
                process.says(step.says)
                background.append((step, process))
            else:
                finish(step, process)
    for step, process in reversed(background):
        if step.stop is not None:
            process.signal(step.stop)
            finish(step, process)
