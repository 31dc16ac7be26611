"""The engine and the images of the container tests, which run only when they are asked for: `make compose-test`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stack import Engine, NoEngine, Stack

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """They take minutes and need an engine: not as a part of the whole suite."""
    asked = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    return None if any(path.is_relative_to(HERE) for path in asked) else True


@pytest.fixture(scope="session")
def engine() -> Engine:
    """An engine with both images; without one the tests are skipped."""
    try:
        found = Engine.find()
    except NoEngine as missing:
        pytest.skip(str(missing))
    found.build()
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
