"""`loscar run --on`: a run on a real Ray cluster of several nodes, all of them on this machine.

The cluster is a process of its own (`ray_nodes`), and so is the driver: nothing of Ray is loaded here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import Process, Processes, alive, descendants, wait_until

from loscar_core.errors import ConfigError, UnknownTaskError
from loscar_deploy.cli import build_parser, main
from loscar_deploy.ray_options import HEAD, RayPlan, Resources, parse_resources, ray_plan
from loscar_wire.transport import parse_address

SUPPORT = Path(__file__).resolve().parent.parent / "support"
SECRET = "a-token-that-is-found-nowhere"
PATIENCE_S = 200.0
"""For what takes seconds when the machine does nothing else: starting nodes, noticing that one is gone."""

on_cluster = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'loscar[ray]'"),
]


# --- options ------------------------------------------------------------------------------------------------


def plan(*flags: str) -> tuple[Namespace, RayPlan | None]:
    args = build_parser().parse_args(["run", *flags])
    return args, ray_plan(args)


def test_each_worker_has_its_resources() -> None:
    args, found = plan("--on", "auto", "--workers", "3", "--worker-resources", "gpus=0.5;cpus=2,fast=1;cpus=0")
    assert found is not None
    assert found.workers == (Resources(1, 0.5), Resources(2, 0, (("fast", 1.0),)), Resources(0))
    assert found.workers[1].for_ray() == {"num_cpus": 2.0, "num_gpus": 0.0, "resources": {"fast": 1.0}}
    assert [str(r) for r in found.workers] == ["cpus=1, gpus=0.5", "cpus=2, fast=1", "nothing"]
    assert found.server == Resources(0, 0, ((HEAD, 0.001),))
    assert (found.restarts, found.placement_s) == (3, 60)
    # Real machines: no emulated links, pauses or slowness, and a GPU where one was asked for.
    assert (args.link, args.step_time, args.slowdown, args.device) == ("none", "0s", "1", "auto,cpu,cpu")
    args, found = plan("--on", "auto", "--step-time", "5ms", "--slowdown", "1,2,1,1", "--device", "cuda")
    assert (args.step_time, args.slowdown, args.device) == ("5ms", "1,2,1,1", "cuda")
    assert found is not None
    assert found.workers == (Resources(),) * 4
    assert plan() == (build_parser().parse_args(["run"]), None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("cpus", "expected NAME=AMOUNT"),
        ("cpus=1,", "expected NAME=AMOUNT"),
        ("=1", "expected NAME=AMOUNT"),
        ("num_cpus=1", "write cpus and gpus"),
        ("GPU=1", "write cpus and gpus"),
        ("fast=1,fast=2", "is there twice"),
        ("cpus=many", "is not a number"),
        ("cpus=-1", "whole numbers"),
        ("cpus=1.5", "whole numbers"),
        ("cpus=0.00001", "whole numbers"),
        ("cpus=inf", "is not a finite number"),
    ],
)
def test_wrong_resources_are_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_resources("--worker-resources", text)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--restarts", "1"], "it needs --on"),
        (["--worker-resources", "cpus=1"], "it needs --on"),
        (["--on", ""], "--on is empty"),
        (["--on", "auto", "--link", "wan"], "have links of their own"),
        (["--on", "auto", "--target-loss", "0.1"], "files of its own machine"),
        (["--on", "auto", "--evaluate-every", "5"], "files of its own machine"),
        (["--on", "auto", "--dashboard", "127.0.0.1:0"], "LOSCAR_TOKEN"),
        (["--on", "auto", "--worker-resources", "cpus=1;cpus=2"], "2 lists for 4 workers"),
        (["--on", "auto", "--working-dir", "/nowhere"], "is no folder"),
        (["--on", "auto", "--placement-timeout", "0s"], "above 0"),
    ],
)
def test_what_has_no_meaning_there_is_refused(
    flags: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOSCAR_TOKEN", raising=False)
    assert main(["run", *flags]) == 3
    assert why in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loscar_deploy.ray_cluster.find_spec", lambda name: None)
    assert main(["run", "--on", "auto"]) == 3
    assert "pip install 'loscar[ray]'" in capsys.readouterr().err


# --- a cluster ----------------------------------------------------------------------------------------------


class Cluster:
    """Nodes on this machine; the first is the head."""

    def __init__(self, folder: Path, nodes: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.environment = {"RAY_TMPDIR": str(folder), "TMPDIR": str(folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        self._killed = 0
        self._out = folder / "out"
        with self._out.open("wb") as out, (folder / "err").open("wb") as err:
            self.popen = subprocess.Popen(
                [sys.executable, str(SUPPORT / "ray_nodes.py"), str(folder), json.dumps(nodes)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env=dict(os.environ, **self.environment),
                start_new_session=True,
            )
        told = json.loads(self._line(0))
        self.address, self.client, self.raylets = told["cluster"], told["client"], told["raylets"]

    def _line(self, number: int) -> str:
        def found() -> str | None:
            lines = self._out.read_text().splitlines(keepends=True)
            if len(lines) > number and lines[number].endswith("\n"):
                return lines[number]
            assert self.popen.poll() is None, (self.folder / "err").read_text()
            return None

        line: str = wait_until(found, "the cluster answers", PATIENCE_S)
        return line

    def kill_node(self, number: int) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{number}\n".encode())
        self.popen.stdin.flush()
        self._killed += 1
        assert json.loads(self._line(self._killed)) == {"killed": number}

    def parts(self) -> dict[str, psutil.Process]:
        """The processes of runs, by name."""
        found = {}
        for process in descendants(self.popen.pid):
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if "loscar_deploy.ray_child" in words:
                found[words[words.index("--name") + 1] if "--name" in words else "server"] = process
        return found

    def node_of(self, process: psutil.Process) -> int:
        return next(self.raylets.index(p.pid) for p in process.parents() if p.pid in self.raylets)

    def nothing_left(self) -> None:
        """No process of any run, no actor, no file."""
        wait_until(lambda: not self.parts(), "no process of the run is left", PATIENCE_S)
        assert not list(self.folder.glob("loscar-*"))

    def close(self) -> None:
        everything = descendants(self.popen.pid)
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        try:
            self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        for process in everything:
            if alive(process):
                process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="lr-", dir="/tmp"))  # paths of Unix sockets have little room
    started: Cluster | None = None
    try:
        started = Cluster(
            folder,
            [{"num_cpus": 1}, *({"num_cpus": 2, "resources": {"fast": 2}} for _ in range(3))],
        )
        yield started
    finally:
        if started is not None:
            started.close()
        shutil.rmtree(folder, ignore_errors=True)


class Driver:
    """`loscar run --on`."""

    def __init__(self, processes: Processes, cluster: Cluster, out: Path, *flags: str, at: str, **more: str) -> None:
        flags = ("--on", at, "--sync-interval", "50ms", "--out", str(out), *flags)
        self.out = out
        self.process: Process = processes.loscar("run", *flags, cwd=SUPPORT, **cluster.environment, **more)

    def says(self, text: str) -> None:
        self.process.says(text, PATIENCE_S)

    def ends(self) -> int:
        return self.process.wait(PATIENCE_S)

    @property
    def text(self) -> str:
        return self.process.out + self.process.err

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return found

    def steps_of(self, name: str) -> list[int]:
        """In each line of metrics.jsonl that has the worker as an active one."""
        path = self.out / "metrics.jsonl"
        lines = [json.loads(x) for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]
        return [w["steps"] for line in lines for w in line["workers"] if w["name"] == name and w["state"] == "active"]

    def metrics(self) -> int:
        path = self.out / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0


class TestOnACluster:
    pytestmark = on_cluster

    def test_a_run_on_unequal_nodes(self, processes: Processes, cluster: Cluster, tmp_path: Path) -> None:
        """The digits, one worker for each kind of node; everything in the run folder, and the token nowhere."""
        out = tmp_path / "out"
        flags = ["--workers", "2", "--worker-resources", "cpus=1,fast=1;cpus=2,fast=2", "--duration", "10s"]
        flags += ["--dashboard", "127.0.0.1:0"]
        driver = Driver(processes, cluster, out, *flags, at=cluster.address, LOSCAR_TOKEN=SECRET)
        parts = wait_until(lambda: len(found := cluster.parts()) == 3 and found, "all are there", PATIENCE_S)
        assert cluster.node_of(parts["server"]) == 0, "the head's"
        assert len({0, cluster.node_of(parts["w0"]), cluster.node_of(parts["w1"])}) == 3
        assert parts["w1"].cmdline()[parts["w1"].cmdline().index("--threads") + 1] == "2"
        everybody = [process for process in psutil.process_iter() if alive(process)]
        assert not [p for p in everybody if SECRET in " ".join(cmdline_of(p))]
        assert driver.ends() == 0, driver.text
        summary = driver.summary
        assert "dashboard at http://127.0.0.1:" in driver.text
        assert summary["accuracy"] > 0.9
        assert summary["bytes_wire_up"] is None
        assert len(summary["steps"]) == 2
        assert all(steps > 0 for steps in summary["steps"])
        names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
        expected = {"config.toml", "metrics.jsonl", "model.safetensors", "summary.json"}
        expected |= {f"logs/{name}.log" for name in ("server", "w0", "w1")}
        expected |= {f"workers/w{i}{suffix}" for i in (0, 1) for suffix in (".json", ".rounds.jsonl")}
        assert names == expected
        for name in ("server", "w0", "w1"):
            lines = [json.loads(line) for line in (out / "logs" / f"{name}.log").read_text().splitlines()]
            assert lines
            assert {line["worker"] for line in lines} == {None if name == "server" else name}
            assert len({line["run_id"] for line in lines}) == 1
        rounds = [json.loads(x)["round"] for x in (out / "workers" / "w0.rounds.jsonl").read_text().splitlines()]
        assert rounds == list(range(1, summary["rounds"] + 2))
        cluster.nothing_left()
        session = cluster.folder / "ray"
        for path in [p for p in [*session.rglob("*"), *out.rglob("*")] if p.is_file()]:
            assert SECRET.encode() not in path.read_bytes(), path

    def test_ones_own_task_through_ray_client(self, processes: Processes, cluster: Cluster, tmp_path: Path) -> None:
        """From outside the cluster: the code goes there, the models come back."""
        flags = ["--workers", "2", "--task", "tiny_task:Tiny", "--working-dir", str(SUPPORT), "--rounds", "20"]
        flags += ["--step-time", "2ms", "--keep-models", "--json"]
        driver = Driver(processes, cluster, tmp_path / "out", *flags, at=cluster.client)
        assert driver.ends() == 0, driver.text
        assert json.loads(driver.process.out) == driver.summary
        assert driver.summary["rounds"] == 20
        assert {p.name for p in (tmp_path / "out" / "workers").glob("*.safetensors")} == {
            "w0.safetensors",
            "w1.safetensors",
        }
        assert "Traceback" not in driver.text
        cluster.nothing_left()

    def test_resources_that_no_node_has(self, processes: Processes, cluster: Cluster, tmp_path: Path) -> None:
        flags = ["--workers", "2", "--worker-resources", "cpus=1;cpus=1,huge=2", "--placement-timeout", "5s"]
        driver = Driver(processes, cluster, tmp_path / "out", *flags, at=cluster.address)
        assert driver.ends() == 3, driver.text
        assert "--worker-resources: no node had room for w1 (cpus=1, huge=2) within 5 s" in driver.text
        assert "127.0.0.1 has cpus=2, fast=2; " in driver.text
        cluster.nothing_left()

    def test_no_cluster_there(self, processes: Processes, cluster: Cluster, tmp_path: Path) -> None:
        server = processes.server()  # speaks gRPC, and is no Ray
        head, client = cluster.address, cluster.client.removeprefix("ray://")
        for scheme, at, why in (
            ("", "127.0.0.1:1", "nothing answers at 127.0.0.1:1: Connection refused"),
            ("ray://", "127.0.0.1:1", "nothing answers at 127.0.0.1:1: Connection refused"),
            ("", server.address, f"what answers at {server.address} is no Ray cluster"),
            ("ray://", server.address, f"what answers at {server.address} is no Ray cluster"),
            ("", client, f"what answers at {client} is no Ray cluster"),  # each of them has its own port
            ("ray://", head, f"what answers at {head} is no Ray cluster"),
        ):
            driver = Driver(processes, cluster, tmp_path / "out", at=scheme + at)
            assert driver.ends() == 4, driver.text
            assert f"loscar: --on {scheme}{at}: {why}\n" in driver.text
            assert "Warning" not in driver.text
        driver = Driver(processes, cluster, tmp_path / "out", at="nonsense")
        assert driver.ends() == 3, driver.text
        assert not (tmp_path / "out").exists()
        assert server.popen.poll() is None

    def test_a_wrong_task_fails_before_anything_starts(
        self, processes: Processes, cluster: Cluster, tmp_path: Path
    ) -> None:
        """In the folder that is to go to the nodes, which is not the one that the command is started in."""
        code = tmp_path / "code"
        code.mkdir()
        (code / "tiny_task.py").write_text("raise RuntimeError('not that one')\n", encoding="utf-8")
        out = tmp_path / "out"
        for task, why in (
            ("tiny_task:Tiny", "task tiny_task:Tiny cannot be imported: RuntimeError: not that one"),
            ("steady_task:Nothing", "task steady_task:Nothing cannot be imported"),
            ("nowhere:Task", "task nowhere:Task cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ):
            driver = Driver(processes, cluster, out, "--task", task, "--working-dir", str(code), at=cluster.address)
            assert driver.ends() == UnknownTaskError.exit_code, driver.text
            assert why in driver.text
            assert "placed" not in driver.text
        assert not out.exists()

    @pytest.mark.parametrize("through", ["address", "client"])
    def test_a_killed_command_leaves_no_process(
        self, processes: Processes, cluster: Cluster, tmp_path: Path, through: str
    ) -> None:
        flags = ["--workers", "2", "--duration", "10m", "--step-time", "2ms"]
        driver = Driver(processes, cluster, tmp_path / "out", *flags, at=getattr(cluster, through))
        wait_until(driver.metrics, "it runs", PATIENCE_S)
        parts = cluster.parts()
        assert len(parts) == 3
        driver.process.signal(signal.SIGKILL)
        driver.ends()
        wait_until(lambda: not any(alive(p) for p in parts.values()), "they end with the command", PATIENCE_S)
        for left in cluster.folder.glob("loscar-*"):  # actors that were killed for good could not clear up
            shutil.rmtree(left)
        cluster.nothing_left()

    def test_ctrl_c_drains_and_leaves_nothing(self, processes: Processes, cluster: Cluster, tmp_path: Path) -> None:
        flags = ["--workers", "2", "--duration", "10m", "--step-time", "2ms"]
        driver = Driver(processes, cluster, tmp_path / "out", *flags, at="auto")
        wait_until(driver.metrics, "it runs", PATIENCE_S)
        parts = cluster.parts()
        driver.process.signal(signal.SIGINT)
        assert driver.ends() == 0, driver.text
        assert "ending the run after this round; once more to stop at once" in driver.text
        assert driver.summary["stopped"] == "interrupted"
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert len(parts) == 3
        assert not any(alive(process) for process in parts.values())
        cluster.nothing_left()

    def test_a_second_signal_forces(self, processes: Processes, cluster: Cluster, tmp_path: Path) -> None:
        flags = ["--workers", "2", "--duration", "10m", "--step-time", "2ms"]
        driver = Driver(processes, cluster, tmp_path / "out", *flags, at=cluster.address)
        wait_until(driver.metrics, "it runs", PATIENCE_S)
        parts = cluster.parts()
        for process in parts.values():
            process.suspend()  # nobody ends in order
        driver.process.signal(signal.SIGINT)
        driver.says("once more to stop at once")
        driver.process.signal(signal.SIGINT)
        assert driver.ends() == 130, driver.text
        assert not (tmp_path / "out" / "summary.json").exists()
        assert not any(alive(process) for process in parts.values())
        cluster.nothing_left()

    def test_lost_processes_come_back_as_often_as_allowed(
        self, processes: Processes, cluster: Cluster, tmp_path: Path
    ) -> None:
        """A worker and the server are killed; then the worker's actor too, and the run goes on without the worker."""
        flags = ["--workers", "2", "--duration", "10m", "--step-time", "2ms", "--restarts", "1"]
        driver = Driver(processes, cluster, tmp_path / "out", *flags, at=cluster.address)
        wait_until(driver.metrics, "it runs", PATIENCE_S)
        cluster.parts()["w1"].kill()
        driver.says("w1 ended with -9")
        driver.says("w1 is started again on 127.0.0.1")
        assert "is not started again" not in driver.text
        cluster.parts()["server"].kill()
        driver.says("server is started again on 127.0.0.1")
        before = driver.metrics()
        wait_until(lambda: driver.metrics() > before + 3, "the run goes on", PATIENCE_S)
        w1 = wait_until(lambda: cluster.parts().get("w1"), "w1 is there", PATIENCE_S)
        w1.parent().kill()  # the actor: its process must not outlive it
        wait_until(lambda: not alive(w1), "the process ends with its actor", PATIENCE_S)
        driver.says("w1 is not started again: Ray has done so 1 times, as --restarts allows")
        driver.says("w1 was ended by signal 9")
        before = driver.metrics()
        wait_until(lambda: driver.metrics() > before + 3, "the run goes on", PATIENCE_S)
        driver.process.signal(signal.SIGINT)
        assert driver.ends() == 0, driver.text
        assert driver.summary["epoch"] == 2
        assert driver.summary["accuracy"] > 0.8
        for left in cluster.folder.glob("loscar-*-w1"):  # an actor that was killed for good could not clear up
            shutil.rmtree(left)
        cluster.nothing_left()

    def test_a_server_that_comes_back_at_another_address(
        self, processes: Processes, cluster: Cluster, tmp_path: Path
    ) -> None:
        """Its port is taken when it comes back: the workers are told, and go on from the state they left with."""
        flags = ["--workers", "2", "--duration", "10m", "--step-time", "2ms", "--local-steps", "20"]
        driver = Driver(processes, cluster, tmp_path / "out", *flags, at=cluster.address)
        wait_until(driver.metrics, "it runs", PATIENCE_S)
        parts = cluster.parts()
        address = server_of(parts["w0"])
        parts["server"].kill()
        with socket.socket() as taker:
            taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            wait_until(lambda: taken(taker, address), "the port is free", PATIENCE_S)
            driver.says("now: starting the workers again")

        def moved() -> bool:
            found = cluster.parts()
            return all(name in found and server_of(found[name]) not in ("", address) for name in ("w0", "w1"))

        wait_until(moved, "the workers look for it at its new address", PATIENCE_S)
        before = driver.metrics()
        wait_until(lambda: driver.metrics() > before + 3, "the run goes on", PATIENCE_S)
        driver.process.signal(signal.SIGINT)
        assert driver.ends() == 0, driver.text
        for name in ("w0", "w1"):
            assert f"{name} goes on from " in (tmp_path / "out" / "logs" / f"{name}.log").read_text()
        assert driver.summary["epoch"] == 2
        cluster.nothing_left()

    def test_the_servers_node_is_lost(self, processes: Processes, cluster: Cluster, tmp_path: Path) -> None:
        """From here on nodes stay lost."""
        flags = ["--workers", "2", "--server-resources", "cpus=0,fast=1", "--duration", "10m", "--step-time", "2ms"]
        driver = Driver(processes, cluster, tmp_path / "out", *flags, at=cluster.address)
        wait_until(driver.metrics, "it runs", PATIENCE_S)
        server = cluster.parts()["server"]
        node = cluster.node_of(server)
        assert node != 0
        cluster.kill_node(node)
        wait_until(lambda: not alive(server), "it went with its node", PATIENCE_S)
        driver.says("server is lost (")
        driver.says("server is started again on 127.0.0.1")
        before = driver.metrics()
        wait_until(lambda: driver.metrics() > before + 3, "the run goes on", PATIENCE_S)
        driver.process.signal(signal.SIGINT)
        assert driver.ends() == 0, driver.text
        assert driver.summary["epoch"] >= 2

    def test_a_workers_node_is_lost(self, processes: Processes, cluster: Cluster, tmp_path: Path) -> None:
        """Its worker comes back on another one, under its name."""
        flags = ["--workers", "2", "--worker-resources", "fast=1", "--duration", "10m", "--step-time", "2ms", "--json"]
        driver = Driver(processes, cluster, tmp_path / "out", *flags, at=cluster.address)
        wait_until(lambda: driver.metrics() and driver.steps_of("w1"), "it runs", PATIENCE_S)
        parts = cluster.parts()
        node = cluster.node_of(parts["w1"])
        lost = {name: process for name, process in parts.items() if cluster.node_of(process) == node}
        assert "server" not in lost
        cluster.kill_node(node)
        wait_until(lambda: not any(alive(p) for p in lost.values()), "its processes went with it", PATIENCE_S)
        driver.says("w1 is lost (")
        driver.says("w1 is started again on 127.0.0.1")
        before = len(driver.steps_of("w1"))
        wait_until(lambda: len(driver.steps_of("w1")) > before + 2, "w1 takes part again", PATIENCE_S)
        again = cluster.parts()["w1"]
        assert cluster.node_of(again) != node
        driver.process.signal(signal.SIGINT)
        assert driver.ends() == 0, driver.text
        assert driver.summary["accuracy"] > 0.9
        assert json.loads(driver.process.out) == driver.summary, "and nothing of Ray's own"
        assert "Traceback" not in driver.text
        assert "aylet" not in driver.text

    def test_the_head_node_is_lost(self, processes: Processes, cluster: Cluster, tmp_path: Path) -> None:
        """Last of all: with it the cluster, the command and every process of the run end."""
        flags = ["--workers", "2", "--worker-resources", "fast=1", "--duration", "10m", "--step-time", "2ms"]
        driver = Driver(processes, cluster, tmp_path / "out", *flags, at=cluster.address)
        wait_until(driver.metrics, "it runs", PATIENCE_S)
        parts = cluster.parts()
        cluster.kill_node(0)
        assert driver.ends() != 0, driver.text
        assert "Failed to connect to GCS" in driver.text
        wait_until(lambda: not any(alive(p) for p in parts.values()), "they end with the cluster", PATIENCE_S)


def taken(taker: socket.socket, address: str) -> bool:
    """Whether this socket has the port now."""
    host, port = parse_address(address, "the server")
    try:
        taker.bind((host, port))
    except OSError:
        return False
    taker.listen()
    return True


def server_of(worker: psutil.Process) -> str:
    """Where a worker looks for its server; nothing when it has ended."""
    words = cmdline_of(worker)
    return words[words.index("--server") + 1] if words else ""


def cmdline_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
