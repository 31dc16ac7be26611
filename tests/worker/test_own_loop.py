"""Training loops as people write them: the session changes nothing of what they compute.

A run of one worker averages that worker with itself, so its loop must end where the same loop ends without a session,
up to the rounding of the merges. Runs of two must end in one model.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Processes, Server
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import loscar_worker as loscar
from loscar_worker.session import Session

pytestmark = pytest.mark.timeout(150)

ROUNDS = 10
RUN = ["--density", "0.3", "--local-steps", "2", "--overlap-steps", "1", "--rounds", str(ROUNDS)]
STEPS = ROUNDS * 3
"""At least; how many more there are before the final round is up to the scheduling of the threads."""


class Net(nn.Module):
    """Tied embeddings, as language models have them, around two layers and a normalisation."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8, dtype=dtype)
        self.inner = nn.Linear(8, 16, dtype=dtype)
        self.norm = nn.LayerNorm(16, dtype=dtype)
        self.out = nn.Linear(16, 8, dtype=dtype)
        self.head = nn.Linear(8, 12, bias=False, dtype=dtype)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.out(torch.tanh(self.norm(self.inner(self.tokens(tokens))))))
        return logits


def batches(seed: int, size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a token and the one that comes next, without an end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, 12, (size,), generator=generator)
        yield tokens, (tokens + 1) % 12


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]).float(), batch[1])


Boundary = Callable[[Tensor], bool]
"""What a loop calls after each optimizer step, with its loss; whether it is to stop."""


# --- the loops ----------------------------------------------------------------------------------------------


def adam_with_a_scheduler(model: nn.Module, seed: int, boundary: Boundary) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for batch in batches(seed):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        if boundary(loss):
            return


def accumulation_and_clipping(model: nn.Module, seed: int, boundary: Boundary) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    for number, batch in enumerate(batches(seed, 4), 1):
        loss = loss_of(model, batch)
        (loss / 3).backward()  # type: ignore[no-untyped-call]
        if number % 3 == 0:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            assert norm > 0.05, "the clipping is meant to do something"
            optimizer.step()
            optimizer.zero_grad()
            if boundary(loss):
                return


def bfloat16_autocast(model: nn.Module, seed: int, boundary: Boundary) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for batch in batches(seed):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(batch[0]).dtype is torch.bfloat16
            loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if boundary(loss):
            return


def gradient_scaler(model: nn.Module, seed: int, boundary: Boundary) -> None:
    """Its first scale is too large for float32 with such a loss, so that some steps are skipped."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=5)
    scales = []
    for batch in batches(seed):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = 100 * loss_of(model, batch)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        if boundary(loss):
            assert scales[0] == 2.0**126, "no step was skipped"
            assert any(late > early for early, late in pairwise(scales))
            return


def frozen_but_the_last_layer(model: nn.Module, seed: int, boundary: Boundary) -> None:
    """Parameter groups, and gradients for the unfrozen ones only."""
    assert isinstance(model, Net)
    groups = [{"params": [model.out.weight], "weight_decay": 0.1}, {"params": [model.out.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for batch in batches(seed):
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if boundary(loss):
            assert model.tokens.weight.grad is None
            return


def data_loader_workers(model: nn.Module, seed: int, boundary: Boundary) -> None:
    tokens = torch.arange(24) % 12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        TensorDataset(tokens, (tokens + 1) % 12),
        batch_size=6,
        shuffle=True,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
        generator=generator,
    )
    while True:
        for batch in loader:
            loss = loss_of(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if boundary(loss):
                return


Loop = Callable[[nn.Module, int, Boundary], None]


@dataclass(frozen=True)
class Case:
    """A loop, the model it is for, and how far merging in float32 may lead away from it."""

    loop: Loop
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4

    def model(self, seed: int) -> Net:
        torch.manual_seed(seed)
        model = Net(self.dtype)
        if self.loop is frozen_but_the_last_layer:
            torch.manual_seed(7)
            model = Net(self.dtype).requires_grad_(False)
            model.out.requires_grad_(True)
        return model


CASES = {
    "adam": Case(adam_with_a_scheduler),
    "accumulation": Case(accumulation_and_clipping),
    "autocast": Case(bfloat16_autocast, tolerance=0.02),
    "scaler": Case(gradient_scaler, tolerance=0.02),
    "frozen": Case(frozen_but_the_last_layer),
    "bfloat16": Case(adam_with_a_scheduler, torch.bfloat16, 0.05),
    "loader": Case(data_loader_workers),
}


def vector(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().float().reshape(-1) for p in model.parameters()]).numpy()


def in_a_run(
    server: Server, model: nn.Module, seed: int, loop: Loop, name: str, joined: nn.Module
) -> tuple[Session, int]:
    """The loop as a worker until the run is over, and how many of its steps are in what the run ended with."""
    rounds: list[loscar.RoundRecord] = []

    def boundary(loss: Tensor) -> bool:
        session.step(loss=loss)
        return session.finished

    times = {"connect_timeout_s": 20.0, "server_timeout_s": 10.0}
    with loscar.join(server.address, joined, name=name, on_round=rounds.append, **times) as session:
        loop(model, seed, boundary)
    assert rounds[-1].kind == "final"
    return session, session.steps - rounds[-1].overlap_steps


def together(server: Server, *workers: Callable[[], tuple[Session, int]]) -> list[Session]:
    """Each in a thread of its own; when one fails the server goes, so that the others end too."""
    with ThreadPoolExecutor(len(workers)) as pool:
        running = [pool.submit(worker) for worker in workers]
        ended = wait(running, 300, FIRST_EXCEPTION).done
        try:
            for worker in ended:
                worker.result()
        finally:
            if len(ended) < len(workers):
                server.popen.kill()
    return [r.result()[0] for r in running]


def alone(model: nn.Module, seed: int, loop: Loop, steps: int) -> list[float]:
    """The loop without a session; its losses."""
    losses: list[float] = []

    def boundary(loss: Tensor) -> bool:
        losses.append(loss.item())
        return len(losses) == steps

    loop(model, seed, boundary)
    return losses


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_run_of_one_trains_as_the_loop_alone(processes: Processes, case: Case) -> None:
    expected, model = case.model(0), case.model(0)
    before = vector(model)
    server = processes.server(*RUN, "--workers", "1")
    session, steps = in_a_run(server, model, 1, case.loop, "w", model)
    assert session.steps >= STEPS
    assert session.contributions["included"] == ROUNDS + 1
    losses = alone(expected, 1, case.loop, steps)
    assert min(losses[-5:]) < losses[0], "the loop is meant to learn something"
    moved = np.linalg.norm(vector(expected) - before)
    away = np.linalg.norm(vector(model) - vector(expected))
    assert moved > 0
    assert away < case.tolerance * moved
    assert model.head.weight is model.tokens.weight


@pytest.mark.parametrize("name", ["adam", "accumulation", "scaler", "frozen", "bfloat16"])
def test_two_workers_with_such_loops_end_in_one_model(processes: Processes, name: str) -> None:
    case = CASES[name]
    server = processes.server(*RUN, "--workers", "2")
    models = [case.model(0), case.model(1)]
    before = vector(models[0])
    sessions = together(server, *(partial(in_a_run, server, m, i, case.loop, f"w{i}", m) for i, m in enumerate(models)))
    assert np.array_equal(vector(models[0]), vector(models[1]))
    assert np.isfinite(vector(models[0])).all()
    assert not np.array_equal(vector(models[0]), before)
    assert [s.contributions["included"] for s in sessions] == [ROUNDS + 1] * 2
    assert all(m.head.weight is m.tokens.weight for m in models)


# --- torch.compile ------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[nn.Module, str], Any]]:
    """`torch.compile` with a backend, in this process and with a cache of its own."""

    def compile_(model: nn.Module, backend: str) -> Any:
        if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            pytest.skip("torch.compile needs a C++ compiler, and this machine has none")
        return torch.compile(model, backend=backend)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    config = importlib.import_module("torch._inductor.config")
    torch.compiler.reset()
    with config.patch(compile_threads=1):
        yield compile_
    torch.compiler.reset()


@pytest.mark.timeout(400)  # the compiler takes its time on a loaded machine
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("backend", "joins", "traced"),
    [
        pytest.param("inductor", "the module", "before joining", marks=pytest.mark.long),
        ("aot_eager", "the module", "after joining"),
        pytest.param("aot_eager", "the compiled one", "before joining", marks=pytest.mark.long),
        pytest.param("aot_eager", "the compiled one", "after joining", marks=pytest.mark.long),
    ],
)
def test_compiled_models(
    processes: Processes, compiled: Callable[[nn.Module, str], Any], backend: str, joins: str, traced: str
) -> None:
    """Beside a worker that does not compile: both take part in one run, and end in one model."""
    case = CASES["accumulation"]
    models = [case.model(0), case.model(1)]
    fast = compiled(models[0], backend)
    if traced == "before joining":
        loss_of(fast, next(batches(0, 4))).backward()  # type: ignore[no-untyped-call]
        models[0].zero_grad()
    server = processes.server(*RUN, "--workers", "2")
    sessions = together(
        server,
        partial(in_a_run, server, fast, 0, case.loop, "compiled", models[0] if joins == "the module" else fast),
        partial(in_a_run, server, models[1], 1, case.loop, "plain", models[1]),
    )
    assert np.array_equal(vector(models[0]), vector(models[1]))
    assert [s.contributions["included"] for s in sessions] == [ROUNDS + 1] * 2
    # What was compiled computes with the averaged parameters.
    tokens, _ = next(batches(9, 4))
    assert torch.allclose(fast(tokens), models[1](tokens), atol=1e-5)
