"""The distributed run is the algorithm: real processes over gRPC against the papers' equations, written down plainly.

Deterministic mode: worker i takes exactly N_i steps, sends, takes exactly Q_i more, merges; both differ between
workers. `reference` knows full vectors only: no deltas, no anchors, no rounds that arrive in parts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from processes import Processes
from safetensors.numpy import load_file
from tiny_task import Tiny
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from loscar_core.selection import SelectionKind, select
from loscar_worker.tasks import load_task
from loscar_worker.tasks.base import Task
from loscar_worker.tasks.partition import Batches, partition

ROUNDS = 20
SEED = 5
SUPPORT = Path(__file__).parents[1] / "support"
Vectors = list[NDArray[np.float64]]

pytestmark = pytest.mark.timeout(150)


@dataclass(frozen=True)
class Case:
    """One run: density p, the merge, the selection, each worker's N_i and Q_i, and the method."""

    density: float
    merge: str
    selection: str
    local: tuple[int, ...]
    overlap: tuple[int, ...]
    copy: int = 0
    method: str = "loscar"

    @property
    def rounds_with_steps(self) -> int:
        """MixVR's rounds come in pairs, of which the first only averages a gradient."""
        return ROUNDS // 2 - 1 if self.method.startswith("mixvr") else ROUNDS

    def __str__(self) -> str:
        pace = ",".join(f"{n}+{q}" for n, q in zip(self.local, self.overlap, strict=True))
        how = self.merge if self.method == "loscar" else self.method
        return f"{self.density:g} {how} {self.selection} {pace}" + " again" * self.copy


BLOCKING = ((3, 1, 2), (0, 0, 0))
OVERLAPPED = ((3, 1, 2), (1, 4, 2))
AT_ONCE = ((0, 2, 1), (3, 1, 0))
MERGES = ("delay-corrected", "overwrite")
CASES = [
    *(Case(p, m, s, *pace) for p, m, s, pace in product((1, 0.1), MERGES, ("random", "sweep"), (BLOCKING, OVERLAPPED))),
    *(Case(0.1, m, "random", *AT_ONCE) for m in MERGES),
    Case(1, "delay-corrected", "random", *AT_ONCE),
]
PERIODS = ((0, 0, 0), (3, 1, 2))
METHOD_CASES = [
    Case(1, "", "sweep", *BLOCKING, method="dppf:alpha=0.3,lambda=0.5"),
    Case(1, "", "sweep", *OVERLAPPED, method="dppf:alpha=0.3,lambda=0.5"),
    Case(0.1, "", "random", *OVERLAPPED, method="dppf:alpha=0.3,lambda=0.5"),
    Case(1, "", "sweep", *OVERLAPPED, method="dppf:alpha=0.2,lambda=0.4,schedule=increasing"),
    Case(1, "", "sweep", *BLOCKING, method="local-sgd"),
    Case(1, "", "all", *PERIODS, method="cocod"),
    Case(1, "", "all", *PERIODS, method="overlap-local-sgd:alpha=0.4"),
    Case(0.1, "", "sweep", *OVERLAPPED, method="blend:keep=0.3"),
    Case(0.1, "", "random", (1, 1, 1), (0, 0, 0), method="sparta"),
    Case(1, "", "all", (3, 3, 3), (0, 0, 0), method="mixvr:budget=5,share=0.3,schedule=fixed,gamma=0.8,beta=0.3"),
]
AGAIN = Case(0.1, "delay-corrected", "sweep", *OVERLAPPED, copy=1)
COMMAND_LINE = Case(0.1, "delay-corrected", "random", *OVERLAPPED)


@cache
def digits() -> Task:
    return load_task("digits")


def reference(case: Case, task: Task) -> Vectors:
    """Every worker's vector after the last round, by the paper's equations."""
    if case.method.startswith("mixvr"):
        return mixvr(case, task)
    n = len(case.local)
    models = [task.make_model(SEED) for _ in range(n)]
    batches = [
        Batches(task.train, partition(task.labels(), "iid", n, i, SEED), task.batch_size, seed=SEED, slot=i)
        for i in range(n)
    ]

    def train(i: int, steps: int) -> torch.Tensor:
        parameters = list(models[i].parameters())
        for _ in range(steps):
            gradients = torch.autograd.grad(task.loss(models[i], next(batches[i])), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= task.lr * gradient
        return parameters_to_vector(parameters).detach().double()

    for round_ in range(1, ROUNDS + 1):
        y = [train(i, case.local[i]) for i in range(n)]
        z = [train(i, case.overlap[i]) for i in range(n)]
        d = y[0].numel()
        k = max(1, round(case.density * d))
        s = torch.from_numpy(select(SelectionKind(case.selection), SEED, round_, d, k))
        mean = sum(y)[s] / n
        for i in range(n):
            x = z[i].clone()
            x[s] = merged(case, round_, z[i][s], y[i][s], mean, s.numel() / d)
            vector_to_parameters(x.float(), models[i].parameters())
    return [parameters_to_vector(m.parameters()).detach().double().numpy() for m in models]


def mixvr(case: Case, task: Task) -> Vectors:
    """Local MixVR with constant weights, on whole vectors."""
    n, budget, local, gamma, beta = len(case.local), 5, 3, 0.8, 0.3
    model = task.make_model(SEED)
    streams = [
        Batches(task.train, partition(task.labels(), "iid", n, i, SEED), task.batch_size, seed=SEED, slot=i)
        for i in range(n)
    ]

    def gradient(x: torch.Tensor, batch: object) -> torch.Tensor:
        vector_to_parameters(x.float(), model.parameters())
        found = torch.autograd.grad(task.loss(model, batch), list(model.parameters()))  # type: ignore[arg-type]
        return torch.cat([g.reshape(-1) for g in found]).double()

    x0 = parameters_to_vector(model.parameters()).detach().double()
    x, w = [x0.clone() for _ in range(n)], [x0.clone() for _ in range(n)]
    firsts = [[gradient(x0, next(s)) for _ in range(budget - local)] for s in streams]
    d = [sum(sum(g) / len(g) for g in firsts) / n] * n
    for _ in range(case.rounds_with_steps):
        for i in range(n):
            for _ in range(local):
                z = next(streams[i])
                w[i] = w[i] - task.lr * d[i]
                new = gamma * w[i] + (1 - gamma) * x[i]
                d[i] = gradient(new, z) + (1 - beta) * (d[i] - gradient(x[i], z))
                x[i] = new
        w = [w[i] - task.lr * d[i] for i in range(n)]
        moved = [gamma * w[i] + (1 - gamma) * x[i] for i in range(n)]
        w_mean, x_mean = sum(w) / n, sum(moved) / n
        for i in range(n):
            samples = [next(streams[i]) for _ in range(budget - local)]
            here = sum(gradient(x_mean, z) for z in samples) / len(samples)
            there = sum(gradient(x[i], z) for z in samples) / len(samples)
            d[i] = here + (1 - beta) * (d[i] - there)
        d = [sum(d) / n] * n
        x, w = [x_mean.clone() for _ in range(n)], [w_mean.clone() for _ in range(n)]
    return [v.numpy() for v in x]


def merged(case: Case, round_: int, z: torch.Tensor, y: torch.Tensor, mean: torch.Tensor, share: float) -> torch.Tensor:
    """The values of one worker after a round, on its selection."""
    name, _, options = case.method.partition(":")
    given = dict(option.split("=") for option in options.split(",") if option)
    match name:
        case "loscar":
            return mean + (z - y) if case.merge == "delay-corrected" else mean
        case "dppf":
            push = float(given["lambda"]) * (round_ / ROUNDS if given.get("schedule") == "increasing" else 1)
            r = float((y - mean).norm()) * math.sqrt(1 / share)
            return z + (mean - y) * (float(given["alpha"]) - push / r)
        case "local-sgd" | "sparta":
            return mean
        case "cocod":
            return mean + (z - y)
        case "overlap-local-sgd":
            pull = float(given["alpha"])
            return (1 - pull) * z + pull * mean
        case "blend":
            keep = float(given["keep"])
            return keep * z + (1 - keep) * mean
        case _:
            raise AssertionError(name)


def server_flags(case: Case) -> list[str]:
    flags = {
        "--density": str(case.density),
        "--method": case.method,
        "--selection": case.selection,
        "--rounds": str(ROUNDS),
        "--final-round": "none",
        "--seed": str(SEED),
        "--workers": str(len(case.local)),
    }
    if case.method == "loscar":
        flags |= {"--merge": case.merge, "--local-steps": "7", "--overlap-steps": "7"}
    return [word for pair in flags.items() for word in pair]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Case, Vectors]]:
    """All cases with one `loscar server` each; three worker processes go through them together."""
    folder = tmp_path_factory.mktemp("paper")
    processes = Processes(folder / "logs")
    cases = [*CASES, *METHOD_CASES, AGAIN]
    try:
        servers = [processes.server(*server_flags(case), wait=False) for case in cases]
        for server in servers:
            server.wait_listening()
        workers = []
        for i in range(3):
            jobs = [
                {
                    "address": server.address,
                    "name": f"w{i}",
                    "slot": i,
                    "workers": 3,
                    "local": case.local[i],
                    "overlap": case.overlap[i],
                    "seed": SEED,
                    "method": case.method,
                    "out": str(folder / f"{number}-{i}.npy"),
                }
                for number, (case, server) in enumerate(zip(cases, servers, strict=True))
            ]
            (folder / f"jobs-{i}.json").write_text(json.dumps(jobs))
            workers.append(processes.python(str(SUPPORT / "paper_worker.py"), str(folder / f"jobs-{i}.json")))
        for worker in workers:
            assert worker.wait(120) == 0, worker.err
        yield {case: [np.load(folder / f"{number}-{i}.npy") for i in range(3)] for number, case in enumerate(cases)}
    finally:
        processes.kill_all()


def assert_is_the_reference(case: Case, task: Task, vectors: Vectors) -> None:
    for i, (x, expected) in enumerate(zip(vectors, reference(case, task), strict=True)):
        distance = np.linalg.norm(x - expected) / np.linalg.norm(expected)
        assert distance <= 1e-5, f"worker {i} is off by {distance:.2e}"


@pytest.mark.parametrize("case", [*CASES, *METHOD_CASES], ids=str)
def test_processes_compute_the_paper_s_equations(runs: dict[Case, Vectors], case: Case) -> None:
    for i, x in enumerate(runs[case]):
        assert x[-1] == case.rounds_with_steps * (case.local[i] + case.overlap[i]), "steps"
    assert_is_the_reference(case, digits(), [x[:-1] for x in runs[case]])


def test_the_same_seed_gives_the_same_bits(runs: dict[Case, Vectors]) -> None:
    first = next(case for case in CASES if str(AGAIN).startswith(str(case)))
    for x, again in zip(runs[first], runs[AGAIN], strict=True):
        assert x.tobytes() == again.tobytes()


def test_the_cases_differ(runs: dict[Case, Vectors]) -> None:
    """The comparison can tell the merges, the densities and the selections apart."""
    seen: dict[bytes, list[Case]] = {}
    for case in CASES:
        seen.setdefault(runs[case][0].tobytes(), []).append(case)
    for same in seen.values():
        # Blocking, the merges are one; dense, the selections are.
        assert len({(c.density, c.local, c.overlap) for c in same}) == 1
        assert len({c.merge for c in same}) == 1 or not any(same[0].overlap)
        assert len({c.selection for c in same}) == 1 or same[0].density == 1
    assert len(seen) == 12


def test_the_command_line_s_workers_compute_them_too(processes: Processes, tmp_path: Path) -> None:
    case, task = COMMAND_LINE, Tiny()
    server = processes.server(*server_flags(case))
    workers = []
    for i in range(3):
        flags = ["--server", server.address, "--name", f"w{i}", "--slot", str(i), "--workers", "3"]
        flags += ["--local-steps", str(case.local[i]), "--overlap-steps", str(case.overlap[i]), "--seed", str(SEED)]
        flags += ["--threads", "1", "--save-model", str(tmp_path / f"{i}.safetensors")]
        workers.append(processes.loscar("worker", "--task", "tiny_task:Tiny", *flags, cwd=SUPPORT))
    for worker in workers:
        assert worker.wait() == 0, worker.err
    names = [name for name, _ in task.make_model(0).named_parameters()]
    vectors = []
    for i in range(3):
        tensors = load_file(tmp_path / f"{i}.safetensors")
        assert set(tensors) == set(names)
        vectors.append(np.concatenate([tensors[name].reshape(-1) for name in names]).astype(np.float64))
    assert_is_the_reference(case, task, vectors)
