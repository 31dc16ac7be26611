"""docs/failures.md against the code: exit codes, reasons, and what it quotes from the program."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from loscar_core.errors import all_errors
from loscar_core.messages import Reason
from loscar_worker.connection import COMEBACK

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "failures.md"
PACKAGES = ("loscar_core", "proto/loscar_wire", "server/loscar_server", "worker/loscar_worker", "deploy/loscar_deploy")
WHAT_YOU_SEE = 2  # the column
CODE = re.compile(r"`([^`]+)`")


def tables(page: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(head, rows) of a page's tables, each row as its cells."""
    for block in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        head, _, *rows = [
            [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.splitlines()
        ]
        yield head, rows


def table(page: Path, first: str) -> list[list[str]]:
    """The rows of the one table whose first column is called so."""
    [rows] = [rows for head, rows in tables(page) if head[0] == first]
    return rows


def failures() -> list[list[str]]:
    return [row for head, rows in tables(PAGE) if head[0] == "what fails" for row in rows]


# --- the lists ----------------------------------------------------------------------------------------------


def test_exit_codes_are_those_of_the_code() -> None:
    listed = {int(code): (set(CODE.findall(raised)), hint) for code, _, raised, hint in table(PAGE, "code")}
    expected: dict[int, tuple[set[str], str]] = {}
    for error in all_errors():
        names, hint = expected.setdefault(error.exit_code, (set(), error.hint))
        names.add(error.__name__)
        assert hint == error.hint, error.__name__
    others = {code: entry for code, entry in listed.items() if code not in expected}
    assert set(others) == {0, 2, 141}
    assert not any(names for names, _ in others.values())
    assert {code: entry for code, entry in listed.items() if code in expected} == expected
    assert table(PAGE, "code") == table(ROOT / "docs" / "cli.md", "code"), "two pages say different things"


def test_exit_codes_in_the_text_are_in_the_table() -> None:
    codes = {int(row[0]) for row in table(PAGE, "code")}
    mentioned = {int(n) for row in failures() for n in re.findall(r"exit (\d+)", row[WHAT_YOU_SEE])}
    assert mentioned - codes == {137, 143}, "the two that the text below the table explains"
    # All that a worker or a server ends with has a row; the command line's own mistakes (2) have none.
    assert codes - mentioned == {2}


def test_reasons_are_those_of_the_code() -> None:
    rows = table(PAGE, "reason")
    assert [reason for reason, _ in rows] == [f"`{r.value}`" for r in Reason]
    assert {reason for reason, text in rows if "comes back by itself" in text} == {f"`{r.value}`" for r in COMEBACK}
    quoted = {code for row in failures() for code in CODE.findall(row[WHAT_YOU_SEE])}
    assert {r.value for r in Reason} - quoted == {"finished"}, "the end of a run is no failure"


# --- quotations ---------------------------------------------------------------------------------------------


def strings(source: str) -> Iterator[str]:
    """The texts of a module, docstrings left out, with … for every value that is put into them."""
    tree = ast.parse(source)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield re.sub(r"%[.\d]*[sdgf]", "…", node.value)


def said() -> set[str]:
    """What the program can say, and the names of the fields that it answers with."""
    sources = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if "_generated" not in p.parts]
    texts = {text for path in sources for text in strings(path.read_text(encoding="utf-8"))}
    [proto] = (ROOT / "proto").rglob("parameter_server.proto")
    return texts | set(re.findall(r"^ +[\w. ]+ (\w+) = \d+;", proto.read_text(encoding="utf-8"), re.MULTILINE))


def is_said(quotation: str, texts: set[str]) -> bool:
    """A single word is a value or a field; of a longer text every piece between two … is in some text."""
    if re.fullmatch(r"[\w-]+", quotation):
        return quotation in texts
    pieces = [piece.strip() for piece in quotation.split("…")]
    return all(any(piece in text for text in texts) for piece in pieces) and max(map(len, pieces)) > 5


def test_quotations_are_what_the_program_says() -> None:
    texts = said()
    quoted = {code for row in failures() for code in CODE.findall(row[WHAT_YOU_SEE])}
    quoted |= {code for row in failures() for cell in row for code in CODE.findall(cell) if "…" in code}
    assert len(quoted) > 80
    assert [q for q in sorted(quoted) if not is_said(q, texts)] == []


def test_what_nobody_says_is_noticed() -> None:
    texts = said()
    assert is_said("connection to … lost (…): training on, reconnecting", texts)
    for wrong in ("connection to … gone (…): training on", "suspend", "… … (…)"):
        assert not is_said(wrong, texts), wrong
