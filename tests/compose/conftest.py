"""The engine and the images of the container tests, which run only when they are asked for: `make compose-test`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine import Engine, NoEngine, sweep
from stack import Stack

HERE = Path(__file__).parent
LIMIT = "LOSCAR_TEST_MINUTES"
"""No test is begun when all before have taken longer."""
DEFAULT_MINUTES = "10"
STARTED = [time.monotonic()]
"""When the engine and the images were there, which does not count."""
FIRST = ("test_stack", "test_swarm", "test_three_machines")
"""What is to be tried before the time is over."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """They take minutes and need an engine: not as a part of the whole suite."""
    asked = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    return None if any(path.is_relative_to(HERE) for path in asked) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.is_relative_to(HERE) or item.path.stem not in FIRST)


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = float(os.environ.get(LIMIT) or DEFAULT_MINUTES)
    if item.path.is_relative_to(HERE) and time.monotonic() > STARTED[0] + 60 * minutes:
        pytest.skip(f"on this machine those before have taken more than {minutes:g} minutes, see {LIMIT}")


@pytest.fixture(scope="session")
def engine() -> Engine:
    """An engine with both images; without one the tests are skipped."""
    try:
        found = Engine.find()
        sweep()
        found.build()
        STARTED[0] = time.monotonic()
    except NoEngine as missing:
        pytest.skip(str(missing))
    return found


@pytest.fixture(scope="module")
def stacks(engine: Engine) -> Iterator[Callable[..., Stack]]:
    """Makes stacks; they are taken away at the module's end, whatever happened."""
    made: list[Stack] = []

    def make(*overlays: str, **settings: str) -> Stack:
        made.append(Stack(engine, overlays, settings))
        return made[-1]

    try:
        yield make
    finally:
        for stack in reversed(made):
            stack.close()
