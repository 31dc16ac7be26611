"""The table of refusals: right for the few that matter, bounded for the many that do not."""

from __future__ import annotations

import tracemalloc

from loscar_core.errors import MalformedError, RefusedError, WrongModelError
from loscar_server.refusals import MAX_DETAIL, MAX_ENTRIES, MAX_NAME, Refusals


def test_refusals_are_counted_by_peer_and_kind() -> None:
    table = Refusals()
    assert table.note("10.0.0.1", "w0", MalformedError("one"), 1.0)
    assert not table.note("10.0.0.1", "w0", MalformedError("two"), 2.0)
    assert table.note("10.0.0.1", "w0", WrongModelError("three"), 3.0)
    assert table.note("10.0.0.2", "w0", MalformedError("four"), 4.0)
    assert table.note("10.0.0.1", "w1", MalformedError("five"), 5.0)
    assert not table.note("10.0.0.1", "w0", MalformedError("six"), 6.0)
    found = [(r.address, r.name, r.kind, r.count, r.detail, r.at_s) for r in table.entries()]
    assert found == [
        ("10.0.0.1", "w0", "MalformedError", 3, "six", 6.0),
        ("10.0.0.1", "w1", "MalformedError", 1, "five", 5.0),
        ("10.0.0.2", "w0", "MalformedError", 1, "four", 4.0),
        ("10.0.0.1", "w0", "WrongModelError", 1, "three", 3.0),
    ]
    assert table.by_kind() == {"MalformedError": 5, "WrongModelError": 1}


def test_a_flood_from_changing_names_and_addresses_does_not_make_it_grow() -> None:
    table = Refusals()

    def flood(start: int) -> None:
        for i in range(start, start + 5000):
            error = (MalformedError, RefusedError)[i % 2]
            table.note(f"10.0.{i >> 8}.{i & 255}", f"{i}" * 1000, error("x" * 10_000), float(i))

    flood(0)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    flood(5000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 2 * MAX_ENTRIES * (MAX_NAME + MAX_DETAIL + 400)
    assert len(table.entries()) == MAX_ENTRIES + 2
    assert table.by_kind() == {"MalformedError": 5000, "RefusedError": 5000}
    latest, *_, others, _ = table.entries()
    assert latest.name.startswith("99999999")
    assert (others.address, others.name) == ("", "")


def test_what_is_shown_cannot_move_a_terminal_s_cursor() -> None:
    table = Refusals()
    table.note("10.0.0.1", "w\x1b[2J", MalformedError("a\nb\x07"), 0.0)
    [entry] = table.entries()
    assert (entry.name, entry.detail) == ("w?[2J", "a?b?")
