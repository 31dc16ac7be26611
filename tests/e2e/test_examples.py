"""The examples, in their short form, by the commands of their page: a real server and two worker processes each."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from torch import Tensor

from loscar_deploy.cli import build_parser

pytestmark = pytest.mark.timeout(240)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ADDRESS = "127.0.0.1:50051"
WORKER_S = 100.0
TEXT = "the quick brown fox jumps over the lazy dog\n" * 40


@dataclass(frozen=True)
class Commands:
    """What the page shows for one example, as words: what comes first, the server, the workers."""

    first: list[list[str]]
    server: list[str]
    workers: list[list[str]]


def commands() -> dict[str, Commands]:
    """The console blocks of the page, by the example's name."""
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    found: dict[str, Commands] = {}
    for block in re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        lines = [shlex.split(line.removeprefix("$ ").removesuffix(" &")) for line in block.splitlines()]
        at = next(i for i, words in enumerate(lines) if words[:2] == ["loscar", "server"])
        assert all(words[0] == "python" for words in [*lines[:at], *lines[at + 1 :]])
        name = Path(lines[-1][1]).stem
        found[name] = Commands([words[1:] for words in lines[:at]], lines[at][1:], [w[1:] for w in lines[at + 1 :]])
    return found


COMMANDS = commands()


def test_every_example_is_on_the_page() -> None:
    assert set(COMMANDS) == {path.stem for path in EXAMPLES.glob("*.py")}
    for shown in COMMANDS.values():
        build_parser().parse_args(shown.server)
        assert len(shown.workers) == 2
    for link in re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")):
        assert (EXAMPLES / link).exists(), link


@pytest.fixture
def example(processes: Processes, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[list[str], list[Any]]:
    """What the two workers of an example said, and the models that they saved."""
    shown = COMMANDS[request.param]
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")

    def script(words: list[str], *more: str) -> list[str]:
        return [str(EXAMPLES.parent / words[0]), *words[1:], "--short", *more]

    for words in shown.first:
        process = processes.python(*script(words), cwd=tmp_path)
        assert process.wait(WORKER_S) == 0, process.err
    flags = shown.server[1:]
    assert flags[:2] == ["--listen", ADDRESS]
    duration = flags.index("--duration")
    flags[duration : duration + 2] = ["--rounds", "6", "--linger", "0s"]
    server = processes.server(*flags[2:])
    workers = []
    for i, words in enumerate(shown.workers):
        here = [server.address if word == ADDRESS else word for word in words]
        assert server.address in here
        workers.append(processes.python(*script(here, "--save", f"{i}.pt"), cwd=tmp_path))
    for worker in workers:
        assert worker.wait(WORKER_S) == 0, worker.err
        assert re.search(r"the run is over after [1-9]\d* steps", worker.out)
    assert server.wait() == 0
    models = [torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2)]
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
    if shown.first:
        models.append(torch.load(tmp_path / "base.pt", weights_only=True))
    return [worker.out for worker in workers], models


@pytest.mark.parametrize("example", ["from_scratch"], indirect=True)
def test_from_scratch(example: tuple[list[str], list[dict[str, Tensor]]]) -> None:
    said, _ = example
    found = [re.search(r"test accuracy (\d\.\d+)$", text.strip()) for text in said]
    assert found[0] is not None
    assert found[1] is not None
    assert float(found[0][1]) == float(found[1][1])


@pytest.mark.parametrize("example", ["gpt"], indirect=True)
def test_gpt(example: tuple[list[str], list[dict[str, Tensor]]]) -> None:
    said, models = example
    texts = [text.split(" steps\n", 1)[1] for text in said]
    assert texts[0] == texts[1], "equal models and an equal seed draw the same text"
    assert len(texts[0]) == 1 + 500 + 1
    assert set(texts[0]) <= set(TEXT)
    assert len(set(texts[0])) > 5
    assert all(value.dtype is torch.float32 for value in models[0].values())


@pytest.mark.parametrize("example", ["finetune_frozen"], indirect=True)
def test_finetune_frozen(example: tuple[list[str], list[dict[str, Tensor]]]) -> None:
    said, (model, _, base) = example
    assert "1.3% of the parameters were trained" in said[0]
    assert model.keys() == base.keys()
    for name, value in model.items():
        assert torch.equal(value, base[name]) == name.startswith("0."), name
