"""Lets the tests of the core share their helpers, whatever the import mode."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loscar_core import plan as plan_module
from loscar_core import server_catchup, server_round, server_state, worker_catchup, worker_holdings

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of many parts, parts of several messages, catch-ups of many slices, and soon of the whole vector."""
    monkeypatch.setattr(plan_module, "PART_POSITIONS", 3)
    monkeypatch.setattr(plan_module, "EXPLICIT_SPAN", 9)
    monkeypatch.setattr(plan_module, "CHUNK_ALIGNMENT", 2)
    monkeypatch.setattr(plan_module, "MAX_PARTIAL_CATCH_UP", 10)
    monkeypatch.setattr(worker_holdings, "MESSAGE_BYTES", 1)
    monkeypatch.setattr(server_round, "ANSWER_BYTES", 8)
    monkeypatch.setattr(server_state, "ANSWER_BYTES", 8)
    monkeypatch.setattr(server_catchup, "STREAM_VALUES", 7)
    monkeypatch.setattr(worker_catchup, "STREAM_VALUES", 7)
