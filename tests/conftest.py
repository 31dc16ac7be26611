"""What all tests share: `tests/support` on the path, and processes that no test can leave behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))

from processes import Processes

# What commands say on a pipe is read by these tests, and by people when one of them fails.
os.environ["LOSCAR_LOG_FORMAT"] = "text"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts processes; whatever of them is alive at the test's end is killed, children included."""
    started = Processes(tmp_path / "logs")
    try:
        yield started
    finally:
        started.kill_all()
