"""The simulation is the real thing: the same bits as processes over gRPC, and the same bits twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from loscar_core.config import FinalRound, RunConfig
from loscar_core.errors import ConfigError
from loscar_core.merge import MergeKind
from loscar_core.selection import SelectionKind
from loscar_core.values import ValueType
from loscar_deploy.link_spec import parse_links
from loscar_deploy.simulate import Simulation, SimulationPlan, SimulationResult, summary_of
from loscar_worker.tasks import load_task


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _plan(workers: int = 3, link: str = "none", **changes: object) -> SimulationPlan:
    settings: dict[str, object] = {"rounds": 6, "density": 0.1, "local_steps": 3, "overlap_steps": 2}
    config = RunConfig(**{**settings, **changes})  # type: ignore[arg-type]
    links = parse_links(link, workers)
    return SimulationPlan(load_task("digits"), config, workers, links, tuple([0.01] * (workers - 1) + [0.02]))


def _consensus(result: SimulationResult) -> bytes:
    assert result.consensus is not None
    return result.consensus.tobytes()


@pytest.mark.parametrize(
    ("dtype", "selection"),
    [
        (ValueType.FLOAT32, SelectionKind.SWEEP),
        (ValueType.BFLOAT16, SelectionKind.SWEEP),
        (ValueType.INT8, SelectionKind.TOPK),
    ],
)
def test_the_same_bits_as_real_processes(tmp_path: Path, dtype: ValueType, selection: SelectionKind) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "loscar_deploy", "run", "--out", str(out), "--json", "--workers", "3"]
    command += ["--rounds", "6", "--density", "0.1", "--local-steps", "3", "--overlap-steps", "2", "--link", "none"]
    command += ["--selection", selection.value]
    command += ["--wire-dtype", dtype.value, "--step-time", "5ms", "--slowdown", "1,1,2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    plan = _plan(link="rtt=80ms,jitter=10ms,rate=5mbit", value_type=dtype, selection=selection)
    result = Simulation(plan).run()
    saved = load_file(out / "model.safetensors")
    names = [n for n, p in load_task("digits").make_model(0).named_parameters() if p.requires_grad]
    real = np.concatenate([saved[n].ravel() for n in names])
    assert _consensus(result) == real.tobytes()
    assert json.loads(done.stdout)["contributions"] == result.contributions


def test_the_same_bits_twice_and_others_with_another_seed() -> None:
    plan = {"link": "rtt=100ms,jitter=30ms,rate=2mbit", "overlap_steps": None, "local_steps": None}
    first = Simulation(_plan(sync_interval_s=0.2, **plan)).run()
    second = Simulation(_plan(sync_interval_s=0.2, **plan)).run()
    other = Simulation(_plan(sync_interval_s=0.2, seed=1, **plan)).run()
    assert _consensus(first) == _consensus(second)
    assert first.steps == second.steps
    assert first.virtual_seconds == second.virtual_seconds
    assert _consensus(first) != _consensus(other)


def test_time_is_that_of_the_links_and_steps() -> None:
    blocking = Simulation(_plan(link="rtt=200ms", overlap_steps=0, final_round=FinalRound.NONE)).run()
    # Six rounds of three steps of the slowest worker and one round trip each.
    assert blocking.virtual_seconds == pytest.approx(6 * (3 * 0.02 + 0.2), rel=0.01)
    # The fast ones wait for the slow one and for the link; the slow one for the link only.
    assert blocking.idle_fraction[2] == pytest.approx(0.2 / 0.26, abs=0.03)
    assert blocking.idle_fraction[0] > blocking.idle_fraction[2]
    overlapped = Simulation(_plan(link="rtt=200ms", overlap_steps=None, final_round=FinalRound.NONE)).run()
    assert max(overlapped.idle_fraction) == 0


def test_evaluations_are_of_the_average_and_a_target_ends_the_run() -> None:
    plan = _plan(rounds=400, evaluate_every=2, local_steps=8, overlap_steps=None)
    result = Simulation(SimulationPlan(**{**_fields(plan), "target_loss": 1.0})).run()
    assert result.seconds_to_target is not None
    assert result.rounds < 400
    losses = [e.loss for e in result.evaluations]
    assert losses[-1] <= 1.0 < losses[0]
    summary = summary_of(plan, result)
    assert summary["accuracy"] > 0.5
    assert summary["evaluations"][-1]["time"] <= summary["virtual_seconds"]


@pytest.mark.parametrize("selection", [SelectionKind.SWEEP, SelectionKind.TOPK])
def test_workers_die_and_come_back(selection: SelectionKind) -> None:
    pace = {"rounds": 40, "local_steps": 8, "overlap_steps": None}
    plan = SimulationPlan(
        **{
            **_fields(_plan(workers=6, link="rtt=50ms", selection=selection, **pace)),
            "churn": 0.3,
            "churn_every_s": 1.0,
            "away_s": 0.5,
        }
    )
    result = Simulation(plan).run()
    assert result.deaths > 3
    assert result.rounds == 41
    assert summary_of(plan, result)["accuracy"] > 0.9


def test_both_merges_and_every_selection_run() -> None:
    for selection in (SelectionKind.RANDOM, SelectionKind.BLOCK, SelectionKind.ALL, SelectionKind.TOPK):
        assert Simulation(_plan(selection=selection, merge=MergeKind.OVERWRITE)).run().rounds == 7


def test_bad_plans() -> None:
    plan = _plan()
    for bad in ({"churn": 1.5}, {"step_s": (0.0, 1.0, 1.0)}, {"links": parse_links("none", 2)}):
        with pytest.raises(ConfigError):
            SimulationPlan(**{**_fields(plan), **bad})
    with pytest.raises(ConfigError, match="did not end"):
        Simulation(SimulationPlan(**{**_fields(_plan(rounds=1000)), "max_virtual_s": 1.0})).run()


def _fields(plan: SimulationPlan) -> dict[str, object]:
    return {name: getattr(plan, name) for name in SimulationPlan.__dataclass_fields__}
