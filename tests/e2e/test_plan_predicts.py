"""What `loscar plan` says of a run, and what the run then is: real processes over emulated links.

Rounds are long beside what a busy machine adds to them. The arithmetic is tested without a clock in
tests/deploy/test_plan.py.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from processes import Processes

from loscar_worker.tasks import load_task

WORKERS, ROUNDS = 2, 6
SETTING = ["--task", "digits", "--workers", str(WORKERS), "--step-time", "40ms", "--link", "rtt=200ms,rate=100kbit"]
SETTING += ["--density", "0.5", "--wire-dtype", "bfloat16"]

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]


@pytest.mark.parametrize(
    ("decided", "waits"),
    [
        ("--local-steps 10 --overlap-steps 0", (0.71, 0.71)),
        ("", (0.0, 0.0)),
        ("--local-steps 10 --overlap-steps 10", (0.42, 0.42)),
        ("--local-steps 20 --overlap-steps 0 --slowdown 1,2", (0.69, 0.38)),
    ],
    ids=["blocking", "overlapped", "fixed overlap", "unequal"],
)
def test_a_run_is_as_planned(decided: str, waits: tuple[float, float], processes: Processes, tmp_path: Path) -> None:
    """Idle share and bytes within a tenth of what the plan says."""
    size = sum(p.numel() for p in load_task("digits").make_model(0).parameters())
    planning = processes.loscar("plan", "--params", str(size), *SETTING, *decided.split(), "--json")
    assert planning.wait(60) == 0, planning.err
    plan = json.loads(planning.out)
    assert plan["hidden"] == (max(waits) == 0)
    assert plan["idle_fraction"] == pytest.approx(waits, abs=0.01)

    words = shlex.split(plan["commands"]["try"])
    assert words[0] == "loscar"
    out = tmp_path / "out"
    run = processes.loscar(*words[1:], "--rounds", str(ROUNDS), "--final-round", "none", "--json", "--out", str(out))
    assert run.wait(120) == 0, run.err
    summary = json.loads((out / "summary.json").read_text())

    assert summary["rounds"] == ROUNDS
    for measured, expected in zip(summary["idle_fraction"], plan["idle_fraction"], strict=True):
        assert measured == pytest.approx(expected, rel=0.1, abs=0.01)
    for worker in range(WORKERS):
        lines = (out / "workers" / f"w{worker}.rounds.jsonl").read_text().splitlines()
        merges = [json.loads(line) for line in lines]
        # From a merge to another one, so that joining and leaving do not count; a contribution that is under way at
        # both ends counts once.
        first, last = merges[0], merges[-1]
        days = (last["merged_s"] - first["merged_s"]) / 86_400
        for way in ("up", "down"):
            assert summary[f"bytes_{way}"][worker] == ROUNDS * plan["round_payload_bytes"]
            assert _sent(last, first, way) / days == pytest.approx(plan["worker_payload_bytes_per_day"], rel=0.1)
            wire = summary[f"bytes_wire_{way}"][worker] - _model(plan, worker, way)
            framing = plan[f"round_wire_bytes_{way}"] - plan["round_payload_bytes"]
            assert 0 < framing < 0.1 * plan["round_payload_bytes"]
            assert wire == pytest.approx(ROUNDS * plan[f"round_wire_bytes_{way}"], rel=0.1)


def _sent(last: dict[str, Any], first: dict[str, Any], way: str) -> int:
    return int(last[f"bytes_{way}"] - first[f"bytes_{way}"])


def _model(plan: dict[str, Any], worker: int, way: str) -> int:
    """The first worker hands over the initial model; the other one has made the same from the seed."""
    return int(plan["start_bytes"]) if (worker, way) == (0, "up") else 0
