"""`loscar simulate`: the folder that it writes, workers with their own batch sizes and devices, newcomers."""

from __future__ import annotations

import json
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from loscar_core.errors import ConfigError
from loscar_deploy.cli import main
from loscar_deploy.link_spec import parse_links
from loscar_deploy.simulate import SimulationPlan
from loscar_worker.tasks import load_task

TINY = ["simulate", "--task", "tiny_task:Tiny", "--workers", "2"]


@pytest.fixture(autouse=True, scope="module")
def _threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def simulated(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """The summary of a short simulation."""
    assert main([*TINY, "--rounds", "8", "--json", *flags]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    return summary


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_folder_is_that_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    summary = simulated(capsys, "--out", str(out), "--evaluate-every", "4", "--slowdown", "1,2", "--duration", "20s")
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    expected = {"config.toml", "metrics.jsonl", "evaluations.jsonl", "model.safetensors", "summary.json"}
    assert names == expected | {f"workers/w{i}{suffix}" for i in (0, 1) for suffix in (".json", ".rounds.jsonl")}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert tomllib.loads((out / "config.toml").read_text())["slowdown"] == "1,2"
    evaluations = lines(out / "evaluations.jsonl")
    assert [e["round"] for e in evaluations] == [4, 8]
    assert [e["loss"] for e in evaluations] == [e["loss"] for e in summary["evaluations"]]
    metrics = lines(out / "metrics.jsonl")
    assert metrics[-1]["round"] == summary["rounds"] + 1
    assert metrics[-1]["elapsed_s"] == pytest.approx(summary["virtual_seconds"], abs=1e-3)
    assert len(metrics) >= int(summary["virtual_seconds"])
    for i in (0, 1):
        rounds = lines(out / "workers" / f"w{i}.rounds.jsonl")
        assert [r["round"] for r in rounds] == list(range(1, 10))
        figures = json.loads((out / "workers" / f"w{i}.json").read_text())
        assert (rounds[-1]["bytes_up"], rounds[-1]["steps"]) == (figures["bytes_up"], figures["steps"])
        assert figures["contributions"]["included"] == sum(r["included"] for r in rounds)
        for r in rounds:
            assert r["snapshot_s"] <= r["answered_s"] <= r["merged_s"]
    assert main(["evaluate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {key: summary[key] for key in ("loss", "accuracy")}
    assert main([*TINY, "--out", str(out)]) == 3
    assert "holds a run already" in capsys.readouterr().err


def test_what_is_written_down_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--link", "rtt=80ms,jitter=20ms,rate=1mbit", "--sync-interval", "60ms"]
    assert simulated(capsys, *flags) == simulated(capsys, *flags, "--out", str(tmp_path / "out"))


def test_waits_are_those_that_were_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    summary = simulated(capsys, "--out", str(out), "--local-steps", "5", "--overlap-steps", "0", "--slowdown", "1,3")
    for i in (0, 1):
        rounds = lines(out / "workers" / f"w{i}.rounds.jsonl")
        waits = [(r["kind"], a, b) for r in rounds for a, b in r["waits"]]
        idle = sum(b - a for kind, a, b in waits if kind != "final")
        assert idle == pytest.approx(sum(r["waited_s"] for r in rounds))
        # The worker's own run time: it merges the final round a moment after the server has ended the run.
        assert idle == pytest.approx(summary["idle_fraction"][i] * rounds[-1]["merged_s"])
        assert rounds[-1]["merged_s"] == pytest.approx(summary["virtual_seconds"], abs=0.01)
        assert idle > 0.1
        assert any(kind == "final" for kind, _, _ in waits)
        for (_, _, end), (_, start, _) in pairwise(waits):
            assert end <= start


def test_every_worker_has_its_own_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["--local-steps", "3", "--overlap-steps", "1"]
    eight = simulated(capsys, *fixed, "--batch-size", "8")
    assert simulated(capsys, *fixed) == eight, "8 is the task's own"
    assert simulated(capsys, *fixed, "--batch-size", "8,8") == eight
    other = simulated(capsys, *fixed, "--batch-size", "8,4")
    assert other["loss"] != eight["loss"]
    assert other["loss"] != simulated(capsys, *fixed, "--batch-size", "4")["loss"]


def test_every_worker_has_its_own_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulated(capsys, "--device", "cpu,cpu") == simulated(capsys)
    assert main([*TINY, "--rounds", "1", "--device", "cpu,nowhere"]) == 3
    assert "--device nowhere: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "simulate"])
@pytest.mark.parametrize("option", ["--device", "--batch-size", "--slowdown"])
def test_too_few_values_for_the_workers(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--workers", "3", option, "1,1"]) == 3
    said = capsys.readouterr().err
    assert f"loscar: {option} '1,1' has 2 values for 3 workers: give one, or one for each\n" in said


@pytest.mark.parametrize(("size", "what"), [("8,x", "'x' is not a whole number"), ("8,0", "'0' is below 1")])
def test_wrong_batch_sizes(size: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "simulate"):
        assert main([command, "--workers", "2", "--batch-size", size]) == 3
        assert f"loscar: --batch-size {what}\n" in capsys.readouterr().err


def test_a_plan_is_for_all_its_workers() -> None:
    from loscar_core.config import RunConfig

    task, links = load_task("tiny_task:Tiny"), parse_links("none", 2)
    for wrong in ({"batch_sizes": (8,)}, {"devices": ("cpu",) * 3}):
        with pytest.raises(ConfigError, match="2 workers"):
            SimulationPlan(task, RunConfig(rounds=1), 2, links, (0.1, 0.1), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_newcomer_contributes_to_the_round_that_it_finds_open(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """At a low density it is sent a live worker's progress, with a round open already. Whoever then forgot that round
    would hold it up until its deadline, which for a newcomer is the two minutes of `--round-cap`."""
    flags = ["--workers", "8", "--seed", str(seed), "--churn", "0.1", "--churn-every", "1s", "--away", "700ms"]
    summary = simulated(capsys, *flags, "--rounds", "25", "--slowdown", "2")
    assert summary["deaths"] > 2
    assert summary["virtual_seconds"] < 20


def test_who_is_dead_at_the_end_did_not_see_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--workers", "6", "--churn", "0.3", "--churn-every", "500ms", "--away", "10m", "--duration", "4s"]
    summary = simulated(capsys, *flags, "--rounds", "1000", "--out", str(out))
    figures = [json.loads((out / "workers" / f"w{i}.json").read_text()) for i in range(6)]
    dead = [f for f in figures if not f["finished"]]
    assert len(dead) == summary["deaths"]
    assert 0 < len(dead) < 6
    for f in figures:
        assert f["run_seconds"] == pytest.approx(summary["virtual_seconds"], abs=0.5) or not f["finished"]
    assert 0 < min(f["run_seconds"] for f in dead) < summary["virtual_seconds"] - 1
