"""Random schedules in which servers die; and that the test notices when a rule is switched off."""

from __future__ import annotations

import pytest
from chaos import Chaos
from rules import RULES

from loscar_core.errors import LoscarError
from loscar_core.selection import SelectionKind

DEATHS = {
    "kills": Chaos(cut=0.004, kill=0.0012, kills=6),
    "kills and crashes": Chaos(cut=0.003, kill=0.001, crash=0.001, kills=4),
    "stale servers": Chaos(cut=0.004, kill=0.0012, kills=6, zombies=True),
    "standby": Chaos(cut=0.003, kill=0.001, kills=4, standby=True),
    "stale servers and a standby": Chaos(cut=0.003, kill=0.001, kills=4, standby=True, zombies=True),
    "replays": Chaos(cut=0.004, kill=0.001, replays=0.01),
    "clock jumps": Chaos(cut=0.002, kill=0.0005, jumps=0.001, deadlines=True),
    "deadlines and kills": Chaos(cut=0.003, kill=0.001, deadlines=True, slow=True, backlog=2),
    "dense rounds": Chaos(cut=0.004, kill=0.001, crash=0.001, limits={"consolidation_share": 0.3}),
    "stops": Chaos(cut=0.003, kill=0.001, stops=True),
    "topk": Chaos(cut=0.003, kill=0.001, crash=0.001, zombies=True, replays=0.01, selections=(SelectionKind.TOPK,)),
}
SEEDS = 16
MOST_SEEDS = 60
"""A rule that is switched off is noticed within so many schedules; the rarest take some 40."""


@pytest.mark.parametrize("name", DEATHS)
def test_everything_adds_up_when_servers_die(name: str) -> None:
    for seed in range(SEEDS):
        DEATHS[name].run(seed)


def violates(chaos: Chaos, seed: int) -> bool:
    try:
        chaos.run(seed)
    except (AssertionError, LoscarError):
        return True
    return False


@pytest.mark.parametrize("rule", RULES)
def test_without_the_rule_a_schedule_goes_wrong(rule: str) -> None:
    """And with it, the same schedule does not."""
    with pytest.MonkeyPatch.context() as patch:
        chaos = RULES[rule](patch)
        found = next((seed for seed in range(MOST_SEEDS) if violates(chaos, seed)), None)
    assert found is not None, f"{MOST_SEEDS} schedules went well without {rule}"
    chaos.run(found)
