"""A short `loscar chaos`: real processes and links that fail, and an audit that must find nothing."""

from __future__ import annotations

import json

from processes import Processes


def test_nothing_is_lost_in_a_short_chaos(processes: Processes) -> None:
    run = processes.loscar(
        "chaos", "--workers", "4", "--seconds", "8", "--faults", "1.5", "--seed", "2", "--alone", "--json"
    )
    assert run.wait(100) == 0, run.err
    verdict = json.loads(run.out)
    assert verdict["failures"] == []
    assert verdict["passed"]
    assert verdict["faults_total"] >= 6
    assert len(verdict["faults"]) >= 3, "of several kinds"
    assert verdict["rounds"] > 40
    assert verdict["contributions_in_consensus"] > 100
    assert verdict["contributions_lost"] == verdict["contributions_doubled"] == 0
    assert max(w["error"] for w in verdict["ledger"]) < 1e-4
    assert verdict["left_behind"] == []
