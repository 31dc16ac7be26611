"""Random schedules of the two state machines, far more of them than the test suite runs: does everything add up?

Each schedule drives a server and some workers through lost, late and repeated messages, broken streams, crashes,
servers that die, stale servers and clock jumps, as its kind says; a book that has seen everything checks the invariants
after every event (see `tests/core/audit.py`). Beside it, each of the protocol's rules is switched off in turn: how many
schedules go by until that is noticed. Target: no violation with all rules, and one without each of them.

    make schedules                      100 schedules of each kind, some minutes
    make schedules ARGS="--seeds 1000"
"""

from __future__ import annotations

import sys
import time

import _bench
import pytest
from chaos import Chaos
from rules import RULES
from test_recovery import DEATHS, MOST_SEEDS
from test_schedules import SCHEDULES

from loscar_core.errors import LoscarError

FIRST_SEED = 10_000
"""Not those of the suite."""

HEADINGS = ("schedules with", "run", "violations", "rounds committed")


def run(name: str, chaos: Chaos, seeds: range) -> tuple[list[str], list[str]]:
    """A row, and what went wrong."""
    failures, rounds = [], 0
    for seed in seeds:
        try:
            state = chaos.run(seed).machine.replica
            assert state is not None
            rounds += state.position.round
        except (AssertionError, LoscarError) as error:
            failures.append(f"{name}, seed {seed}: {type(error).__name__}: {error!s:.100}")
    return [name, str(len(seeds)), str(len(failures)), str(rounds)], failures


def noticed(rule: str) -> int | None:
    """How many schedules it takes to notice that a rule is off."""
    with pytest.MonkeyPatch.context() as patch:
        chaos = RULES[rule](patch)
        for number in range(MOST_SEEDS):
            try:
                chaos.run(number)
            except (AssertionError, LoscarError):
                return number + 1
    return None


def main() -> int:
    parser = _bench.parser(__doc__)
    parser.add_argument("--seeds", metavar="N", type=int, default=100, help="schedules of each kind (default 100)")
    arguments = parser.parse_args()
    rows, failures, started = [], [], time.monotonic()
    for name, chaos in (SCHEDULES | DEATHS).items():
        row, found = run(name, chaos, range(FIRST_SEED, FIRST_SEED + arguments.seeds))
        rows.append(row)
        failures += found
        print(*row, *found, sep="  ", file=sys.stderr, flush=True)
    without = {rule: noticed(rule) for rule in RULES}
    for rule, count in without.items():
        rows.append([f"without the rule {rule}", str(count or MOST_SEEDS), "0" if count is None else "1", ""])
    result = {
        "seconds": round(time.monotonic() - started, 1),
        "failures": failures,
        "noticed_after": without,
        "met": not failures and None not in without.values(),
        "table": {"headings": HEADINGS, "rows": rows},
    }
    return _bench.finish("schedules", arguments, result, _bench.table(HEADINGS, rows))


if __name__ == "__main__":
    sys.exit(main())
