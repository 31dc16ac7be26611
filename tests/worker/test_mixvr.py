"""Local MixVR: its budget, its weights, and workers that come late."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from loscar_core.config import RunConfig
from loscar_core.errors import ConfigError
from loscar_core.methods import parse_method, settle
from loscar_core.methods.mixvr import MixVr, MixVrSchedule
from loscar_core.plan import RoundKind, is_dependent, plan_round
from loscar_core.selection import SelectionKind
from loscar_core.state import Position
from loscar_core.worker_cycle import Action, Cycle, Situation
from loscar_core.worker_effects import Update
from loscar_core.worker_engine import WorkerEngine
from loscar_deploy.cli import main
from loscar_deploy.link_spec import LinkSpec
from loscar_deploy.simulate import Simulation
from loscar_deploy.simulation import SimulationPlan
from loscar_worker.boundary import Pace
from loscar_worker.mixvr import MixVrOptimizer
from loscar_worker.model import ModelView
from loscar_worker.simulated import SimulatedBackground, SimulatedSession
from loscar_worker.tasks import load_task


@pytest.mark.parametrize(
    ("budget", "share", "local", "averaging"), [(16, 0.1, 14, 2), (10, 0.1, 9, 1), (2, 0.5, 1, 1), (100, 0.29, 71, 29)]
)
def test_the_budget_is_split(budget: int, share: float, local: int, averaging: int) -> None:
    method = MixVr(budget, share)
    assert (method.local_steps, method.averaging_batches) == (local, averaging)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mixvr:budget=4,share=0.9", "leave 0 local steps and 4 minibatches"),
        ("mixvr:budget=1", "leave 0 local steps and 1 minibatches"),
        ("mixvr:share=0", "outside \\(0, 1\\)"),
        ("mixvr:share=1", "outside \\(0, 1\\)"),
        ("mixvr:gamma=0", "gamma=0 is outside"),
        ("mixvr:beta=2", "beta=2 is outside"),
        ("mixvr:budget=many", "not a number"),
        ("mixvr:budget=" + "9" * 400, "is not in 1"),
        ("mixvr:budget=-3", "is not in 1"),
    ],
)
def test_bad_options_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_method(text)


def run_config(text: str, **values: object) -> RunConfig:
    method = parse_method(text)
    return RunConfig(**settle(method, values | {"method": method.text()}, ()))


def test_its_local_steps_are_the_budget_s() -> None:
    config = run_config("mixvr:budget=8,share=0.25")
    assert (config.local_steps, config.overlap_steps, config.dependent) == (6, 0, 3)
    with pytest.raises(ConfigError, match="--local-steps 5 is not mixvr, which has 6"):
        settle(parse_method("mixvr:budget=8,share=0.25"), {"local_steps": 5}, ["local_steps"])


def test_rounds_come_in_pairs() -> None:
    config = run_config("mixvr", rounds=10)
    first, second = (plan_round(config, 30, r, stopping=False) for r in (5, 6))
    assert (first.selection, second.selection) == (SelectionKind.HEAD, SelectionKind.TAIL)
    assert first.indices(0, 30).tolist() == list(range(20))
    assert second.indices(0, 30).tolist() == list(range(20, 30))
    assert [is_dependent(config, r) for r in (1, 2, 3, 4)] == [False, True, False, True]
    assert not is_dependent(RunConfig(), 2)
    assert plan_round(config, 30, 11, stopping=False).kind is RoundKind.FINAL
    with pytest.raises(ConfigError, match="3 vectors of 2 values"):
        config.count(2)


def test_weights() -> None:
    theory = MixVr()
    assert theory.weights(1) == (1.0, 2 / 3, 1.0)
    assert theory.weights(8) == (8.0, 0.2, 0.125)
    assert MixVr(schedule=MixVrSchedule.FIXED, gamma=0.9, beta=0.2).weights(8) == (1.0, 0.9, 0.2)


def test_alone_and_without_noise_it_finds_the_minimum() -> None:
    """The theory's schedule on a quadratic, with η = 1/(8 L T)."""
    scales = torch.tensor([1.0, 0.5, 0.1])
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)

    def loss() -> torch.Tensor:
        return 0.5 * (scales * model.weight[0] ** 2).sum()

    steps = 400
    optimizer = MixVrOptimizer(model, lr=1 / (8 * steps), method=MixVr(), minibatch=lambda: loss)
    optimizer.vectors["d"].copy_(scales)  # the gradient at the start
    losses = [float(optimizer.step(loss)) for _ in range(steps)]
    assert optimizer.t == steps + 1
    assert losses[-1] < 0.02 * losses[0]
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


def test_a_synchronisation_that_came_to_nothing_is_a_step() -> None:
    """The worker was too late for the round: it moves once, and the estimator stays that of a step."""
    model = nn.Linear(4, 1, bias=False)
    made = partial(
        MixVrOptimizer,
        lr=0.1,
        method=MixVr(schedule=MixVrSchedule.FIXED, gamma=0.8, beta=0.3),
        minibatch=lambda: lambda: model.weight.sum(),
    )

    def loss() -> torch.Tensor:
        return (model.weight**3).sum()

    found = []
    start = model.weight.detach().clone()
    for rejected in (False, True):
        with torch.no_grad():
            model.weight.copy_(start)
        optimizer = made(model)
        optimizer.vectors["d"].fill_(1.0)
        optimizer._begun = True
        if rejected:
            optimizer.before_snapshot(False)
            optimizer.before_snapshot(False)
        optimizer.take_step(loss)
        optimizer.take_step(loss)
        found.append((optimizer.t, model.weight.detach().clone(), optimizer.vectors["d"].clone()))
    (t, x, d), (t_again, x_again, d_again) = found
    assert t == t_again == 3
    torch.testing.assert_close(x, x_again)
    torch.testing.assert_close(d, d_again)


def half_at(round: int, text: str = "mixvr") -> Any:
    """What an optimizer sees of a session that begins."""
    anchor = SimpleNamespace(position=Position(1, round))
    return SimpleNamespace(engine=SimpleNamespace(config=run_config(text), anchor=anchor))


def optimizer_of(model: nn.Module, loss: Any) -> MixVrOptimizer:
    return MixVrOptimizer(model, lr=0.1, method=MixVr(), minibatch=lambda: loss)


def test_the_run_s_options_count() -> None:
    model = nn.Linear(2, 1)
    optimizer = optimizer_of(model, lambda: model.weight.sum())
    optimizer.begin(half_at(0, "mixvr:budget=4,share=0.5,schedule=fixed"))
    assert optimizer._method == parse_method("mixvr:budget=4,share=0.5,schedule=fixed")
    with pytest.raises(ConfigError, match="not mixvr but dppf"):
        optimizer.begin(half_at(0, "dppf"))


@pytest.mark.parametrize(("round_", "pairs"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (40, 19)])
def test_a_newcomer_is_as_old_as_the_others(round_: int, pairs: int) -> None:
    """After the first pair, which has no steps, each pair has ⌊(1 − α)K⌋ of them and the synchronisation's."""
    model = nn.Linear(2, 1)
    optimizer = optimizer_of(model, lambda: model.weight.sum())
    optimizer.begin(half_at(round_, "mixvr:budget=8,share=0.25"))
    assert optimizer.t == 1 + pairs * 7


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_model_that_was_replaced_has_a_fresh_estimator(in_flight: bool) -> None:
    """Without noise the estimator is the gradient, wherever the model was put and whatever was under way."""
    model = nn.Linear(3, 1, bias=False)

    def loss() -> torch.Tensor:
        return 0.5 * (model.weight**2).sum()

    optimizer = optimizer_of(model, loss)
    optimizer.begin(half_at(6, "mixvr:schedule=fixed"))
    optimizer.vectors["d"].copy_(model.weight.detach()[0])
    optimizer.take_step(loss)
    if in_flight:
        optimizer.before_snapshot(False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -1.0, 0.5]]))
        optimizer.vectors["d"].fill_(77.0)
    optimizer.replaced()
    for _ in range(3):
        optimizer.take_step(loss)
        torch.testing.assert_close(optimizer.vectors["d"], model.weight.detach()[0])
    optimizer.replaced()
    optimizer.before_snapshot(True)
    torch.testing.assert_close(optimizer.vectors["d"], model.weight.detach()[0])


def test_a_state_from_the_middle_of_a_synchronisation_knows_it() -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = optimizer_of(model, lambda: (model.weight**2).sum())
    optimizer.begin(half_at(6))
    optimizer.before_snapshot(False)
    again = optimizer_of(model, lambda: (model.weight**2).sum())
    again.load_state_dict(optimizer.state_dict())
    again._refresh()
    torch.testing.assert_close(again.vectors["d"], 2 * model.weight.detach()[0])


def test_parameters_that_are_not_float32_are_refused() -> None:
    model = nn.Linear(2, 1).to(torch.bfloat16)
    with pytest.raises(ConfigError, match="float32"):
        optimizer_of(model, lambda: model.weight.sum())


def test_between_the_two_rounds_of_a_pair_nothing_is_trained() -> None:
    """Also while the second one has not been announced again after a break."""
    cycle = Cycle(14, 1.0, 0, 0.0)
    assert cycle.next(Situation(at_once=True), 0.0) is Action.WAIT
    assert cycle.next(Situation(plan_round=4, at_once=True), 0.0) is Action.SNAPSHOT
    assert cycle.next(Situation(plan_round=4), 0.0) is Action.TRAIN


def test_a_norm_bound_and_a_comparison_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server", "--method", "mixvr", "--norm-bound", "10"]) == 3
    assert "--norm-bound" in capsys.readouterr().err
    assert main(["compare", "--method", "dppf", "--simulate", "--rounds", "2"]) == 3
    assert "LOSCAR-SGD's merges" in capsys.readouterr().err


# --- methods whose workers have a place of their own --------------------------------------------------------


@pytest.mark.parametrize("text", ["dppf", "blend", "overlap-local-sgd"])
def test_only_a_newcomer_s_gift_moves_who_stays(text: str) -> None:
    """Not what is given back of an epoch that was given up: such a worker was never moved by it."""
    model = nn.Linear(3, 1, bias=False)
    view = ModelView(model)
    engine = WorkerEngine("w", b"w" * 16, view.layout, view.vector(), view.statistics())
    background = SimulatedBackground(engine, view, lambda _: None)
    half = SimulatedSession(view, background, Pace(), clock=lambda: 0.0)
    half._method = parse_method(text)
    before, anchor, gift = view.vector(), np.zeros(3, np.float32), np.ones(3, np.float32)
    for update in (
        Update(0, None, anchor, anchor, -gift, None, None, None),
        Update(0, np.array([0, 2]), anchor[:2], anchor[:2], gift[:2], None, None, None),
        Update(0, None, anchor, gift, None, None, None, None),
    ):
        background.mailbox.updates.append(background._prepare(update))
        half._merge(background.mailbox.updates[0])
        np.testing.assert_array_equal(view.vector(), before)
    background.mailbox.updates.append(
        background._prepare(Update(0, None, anchor, gift, None, None, None, None, progress=True))
    )
    half._merge(background.mailbox.updates[0])
    np.testing.assert_allclose(view.vector(), before + 1, rtol=1e-6)


def test_its_state_survives() -> None:
    model = nn.Linear(3, 1)
    made = partial(MixVrOptimizer, lr=0.1, method=MixVr(), minibatch=lambda: lambda: model.weight.sum())
    optimizer = made(model)
    for _ in range(3):
        optimizer.take_step(lambda: (model.weight**2).sum())
    again = made(model)
    again.load_state_dict(optimizer.state_dict())
    assert again.t == optimizer.t == 4
    assert again.state_dict() == optimizer.state_dict()


def test_workers_that_die_and_come_back_take_the_averages_over() -> None:
    """The newcomers' estimators belong to the model that they were given: the run learns as it does in peace."""
    task = load_task("digits", batch_size=16)
    config = run_config("mixvr:budget=8,schedule=fixed", rounds=60, evaluate_every=20, seed=3)
    found = []
    for churn in (0.0, 0.34):
        plan = SimulationPlan(
            task, config, 3, (LinkSpec(),) * 3, (0.01,) * 3, churn=churn, churn_every_s=0.4, away_s=0.1
        )
        result = Simulation(plan).run()
        counts = result.contributions
        assert counts["sent"] == counts["included"] + counts["returned"] + counts["outstanding"]
        found.append((result.deaths, result.evaluations[-1].loss))
    (no_deaths, in_peace), (deaths, disturbed) = found
    assert no_deaths == 0
    assert deaths >= 3
    assert disturbed < 1.5 * in_peace
