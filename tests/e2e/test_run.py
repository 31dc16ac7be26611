"""`loscar run` on this machine: the run folder, the summary, what is printed where, and the live table."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import DEADLINE_S, Process, Processes, alive, descendants, wait_until
from safetensors import safe_open
from safetensors.numpy import load_file

import loscar_worker as loscar
from loscar_core.selection import SelectionKind, selection_size
from loscar_deploy.cli import main
from loscar_worker.tasks import load_task

SUPPORT = Path(__file__).parents[1] / "support"
SUMMARY = (
    "task method merge workers density selection overlap_steps local_steps wire_dtype seed epoch first_round rounds "
    "final steps wall_seconds loss accuracy target_loss seconds_to_target bytes_up bytes_down bytes_wire_up "
    "bytes_wire_down step_seconds_median idle_fraction contributions reconnects"
)
ADDED = ["stopped", "method_options"]
"""What the summary holds beyond the design's keys."""

pytestmark = pytest.mark.timeout(120)


@dataclass(frozen=True)
class Run:
    """A finished `loscar run --json --out`."""

    process: Process
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Batch normalisation, bfloat16 on the wire, unequal workers, over emulated links."""
    folder = tmp_path_factory.mktemp("run")
    processes = Processes(folder / "logs")
    flags = ["--task", "tiny_task:Normalised", "--workers", "2", "--rounds", "10", "--slowdown", "1,2"]
    flags += ["--link", "rtt=4ms", "--step-time", "2ms", "--sync-interval", "40ms", "--density", "0.2"]
    flags += ["--wire-dtype", "bfloat16", "--seed", "3", "--json", "--out", str(folder / "out")]
    try:
        process = processes.loscar("run", *flags, cwd=SUPPORT)
        assert process.wait() == 0, process.err
        yield Run(process, folder / "out")
    finally:
        processes.kill_all()


def test_the_run_folder_is_complete(run: Run) -> None:
    names = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()}
    expected = {"config.toml", "metrics.jsonl", "model.safetensors", "summary.json"}
    expected |= {f"logs/{name}.log" for name in ("server", "w0", "w1")}
    expected |= {f"workers/w{i}{suffix}" for i in (0, 1) for suffix in (".json", ".rounds.jsonl")}
    assert names == expected
    config = tomllib.loads((run.folder / "config.toml").read_text())
    assert config["task"] == "tiny_task:Normalised"
    assert config["density"] == "0.2"
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        assert {"elapsed_s", "epoch", "round", "workers"} <= json.loads(line).keys()
    for log in (run.folder / "logs").iterdir():
        assert "Traceback" not in log.read_text()


def test_the_summary_is_spelled_as_designed(run: Run) -> None:
    summary = run.summary
    assert list(summary) == SUMMARY.split() + ADDED
    given = {"task": "tiny_task:Normalised", "method": "loscar", "merge": "delay-corrected", "workers": 2}
    given |= {"density": 0.2, "selection": "sweep", "overlap_steps": "auto", "local_steps": "auto"}
    given |= {"wire_dtype": "bfloat16", "seed": 3, "epoch": 1, "first_round": 1, "rounds": 10, "final": "dense"}
    given |= {"target_loss": None, "seconds_to_target": None, "reconnects": 0}
    assert {key: summary[key] for key in given} == given
    for key in ("steps", "bytes_up", "bytes_down", "step_seconds_median", "idle_fraction"):
        assert len(summary[key]) == 2, key
    assert all(0.0015 < s < 0.5 for s in summary["step_seconds_median"])
    assert all(0 <= share <= 1 for share in summary["idle_fraction"])
    for way in ("up", "down"):
        for wire, payload in zip(summary[f"bytes_wire_{way}"], summary[f"bytes_{way}"], strict=True):
            assert wire > payload
    assert 0.3 < summary["wall_seconds"] < 60
    assert summary["accuracy"] > 0.5


def test_standard_output_carries_json_only(run: Run) -> None:
    assert json.loads(run.process.out) == run.summary
    assert run.process.out.count("\n") == 1


def test_progress_is_plain_lines_where_no_terminal_is(run: Run) -> None:
    assert "\x1b" not in run.process.err
    assert re.search(r"^ +\d+\.\d s  round \d+  loss ", run.process.err, re.MULTILINE)
    assert "Traceback" not in run.process.err


def test_the_ledger_sums_up(run: Run) -> None:
    total = run.summary["contributions"]
    assert total["sent"] == total["included"] + total["returned"] + total["outstanding"]
    assert list(total) == ["sent", "included", "returned", "outstanding"]
    figures = [json.loads((run.folder / "workers" / f"w{i}.json").read_text()) for i in (0, 1)]
    for key in total:
        assert total[key] == sum(f["contributions"][key] for f in figures)
    for i in (0, 1):
        assert figures[i]["steps"] == run.summary["steps"][i]
        rounds = [json.loads(x) for x in (run.folder / "workers" / f"w{i}.rounds.jsonl").read_text().splitlines()]
        assert [r["round"] for r in rounds] == list(range(1, 12))
        assert sum(r["included"] for r in rounds) == figures[i]["contributions"]["included"]


def test_payload_is_counted_to_the_byte(run: Run) -> None:
    """bfloat16 in ten rounds, float32 in the final one; statistics as float32 in each."""
    d = sum(v.size for n, v in load_file(run.folder / "model.safetensors").items() if "running" not in n)
    sparse = sum(selection_size(SelectionKind.SWEEP, 3, r, d, round(0.2 * d)) for r in range(1, 11))
    expected = [2 * sparse + 4 * d + 11 * 4 * 32] * 2
    assert run.summary["bytes_up"] == expected
    assert run.summary["bytes_down"] == expected


def test_the_saved_model_evaluates_the_same(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(SUPPORT)
    assert main(["evaluate", str(run.folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"loss": run.summary["loss"], "accuracy": run.summary["accuracy"]}
    assert np.isfinite(printed["loss"])
    file = str(run.folder / "model.safetensors")
    assert main(["evaluate", file, "--task", "tiny_task:Normalised", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert main(["evaluate", file]) == 3
    assert "--task is needed" in capsys.readouterr().err
    assert main(["evaluate", file, "--task", "tiny_task:Tiny"]) == 3
    assert "which this task's model has not" in capsys.readouterr().err
    (run.folder / "broken").mkdir()
    assert main(["evaluate", str(run.folder / "broken")]) == 9
    (run.folder / "broken" / "config.toml").write_text("task = ")
    assert main(["evaluate", str(run.folder / "broken")]) == 3
    assert main(["evaluate", str(run.folder / "nowhere.safetensors"), "--task", "tiny_task:Tiny"]) == 9


def test_statistics_are_averaged(run: Run) -> None:
    with safe_open(run.folder / "model.safetensors", "numpy") as file:
        assert file.metadata()["round"] == "11"
    tensors = load_file(run.folder / "model.safetensors")
    fresh = load_task("tiny_task:Normalised").make_model(3).state_dict()
    assert set(tensors) == {n for n in fresh if not n.endswith("num_batches_tracked")}
    variance = tensors["1.running_var"]
    assert (variance > 0).all()
    assert not np.allclose(variance, 1), "it is still what it was at the start"
    for name, values in tensors.items():
        assert np.isfinite(values).all(), name
        assert values.dtype == np.float32


def test_a_folder_that_holds_a_run_is_left_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--out", str(run.folder)]) == 3
    assert "holds a run already" in capsys.readouterr().err


def test_status_of_a_live_server(processes: Processes) -> None:
    server = processes.server("--workers", "1", "--density", "0.5", "--token", "secret", "--rounds", "5")
    task = load_task("tiny_task:Tiny")
    with loscar.join(server.address, task.make_model(0), name="me", token="secret"):
        as_json = processes.loscar("status", "--server", server.address, "--json", LOSCAR_TOKEN="secret")
        plain = processes.loscar("status", "--server", server.address, "--token", "secret")
        assert as_json.wait() == plain.wait() == 0
    status = json.loads(as_json.out)
    assert status["run_id"] == server.run_id
    assert status["phase"] == "running"
    assert status["dimension"] == 12 * 16 + 16 + 16 * 3 + 3
    assert status["config"]["density"] == 0.5
    assert status["config"]["rounds"] == 5
    assert [m["name"] for m in status["members"]] == ["me"]
    assert status["members"][0]["state"] == "active"
    assert "me" in plain.out
    assert "running" in plain.out
    without = processes.loscar("status", "--server", server.address)
    assert without.wait() == 11
    assert "wants a token" in without.err


class Terminal:
    """A process on a pseudo-terminal of its own, as its controlling one, so that Ctrl+C is a key."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environment = dict(os.environ, TERM="xterm", COLUMNS="140", LINES="40", OMP_NUM_THREADS="1")
        self.popen = subprocess.Popen(
            [sys.executable, str(SUPPORT / "on_terminal.py"), sys.executable, "-m", "loscar_deploy", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=SUPPORT,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def read_until(self, pattern: str, deadline_s: float = DEADLINE_S) -> None:
        end = time.monotonic() + deadline_s
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.text[-3000:]!r}"
            if not self._read():
                assert re.search(pattern, self.text), self.text[-3000:]

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], 0.2)
        try:
            data = os.read(self._master, 1 << 16) if ready else b"\0"
        except OSError:  # how Linux says that the other side is closed
            return False
        self.text += data.decode(errors="replace").replace("\0", "")
        return bool(data)

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def close(self) -> None:
        for child in descendants(self.popen.pid):
            child.kill()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        os.close(self._master)


def test_a_terminal_gets_a_live_table_and_ctrl_c_drains(tmp_path: Path) -> None:
    flags = ["--task", "tiny_task:Tiny", "--workers", "2", "--duration", "10m", "--link", "none", "--step-time", "2ms"]
    terminal = Terminal("run", *flags, "--sync-interval", "50ms", "--out", str(tmp_path / "out"))
    try:
        terminal.read_until(r"w1[ │┃]+active[^\n]*\n")
        # Redrawn in place: the cursor goes up again.
        terminal.read_until(r"\x1b\[\d*A")
        terminal.read_until(r"running · round [1-9]")
        assert "┏" in terminal.text
        children = descendants(terminal.popen.pid)
        terminal.press_ctrl_c()
        terminal.read_until("the run folder is ")
        assert terminal.popen.wait(DEADLINE_S) == 0
    finally:
        terminal.close()
    assert "ending the run after this round; once more to stop at once" in terminal.text
    assert "consensus test accuracy 0." in terminal.text
    assert "Traceback" not in terminal.text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["stopped"] == "interrupted"
    assert summary["final"] == "dense"
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert len(children) >= 3
    wait_until(lambda: not any(alive(c) for c in children), "no process is left behind")
