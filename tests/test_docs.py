"""The documentation against the code: generated pages, links, commands, figures and the complete example."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pages import FENCE, PAGES, ROOT, fences, shown_commands

from loscar_core.errors import ConfigError
from loscar_deploy import options
from loscar_deploy.cli import build_parser
from loscar_deploy.link_spec import parse_links


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- generated text -----------------------------------------------------------------------------------------


def test_the_command_line_page_is_up_to_date() -> None:
    module = load(ROOT / "docs" / "generate_cli.py")
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == module.page(), "run python docs/generate_cli.py"


def test_the_figures_are_those_of_the_results() -> None:
    module = load(ROOT / "benchmarks" / "figures.py")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == module.updated(text), "run python benchmarks/figures.py"
    for page in (module.REPRODUCTION, module.RELIABILITY, module.LOADTEST, module.PERFORMANCE):
        text = page.read_text(encoding="utf-8")
        assert text == module.with_tables(text), f"{page.name}: run python benchmarks/figures.py"


def test_the_readme_shows_the_loop_of_the_docstring() -> None:
    source = (ROOT / "worker" / "loscar_worker" / "__init__.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring is not None
    loop = docstring[docstring.index("import loscar_worker") :].strip()
    blocks = [body.strip() for language, body in fences(ROOT / "README.md") if language == "python"]
    assert loop in blocks


def test_the_figures_that_are_quoted_are_those_of_the_measurements() -> None:
    measured = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    quoted = re.findall(r"\b0\.\d{3,4}\b", (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8"))
    assert len(quoted) > 10
    for figure in set(quoted) - {"0.001", "0.025"}:  # densities
        assert figure in measured, f"docs/choosing.md says {figure}, docs/reproduction.md does not"


def test_the_readme_lists_every_command() -> None:
    module = load(ROOT / "docs" / "generate_cli.py")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `loscar (\w+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(name for name, _, _ in module.commands(build_parser()))


# --- links --------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        kept = [c for c in plain if c in " -_" or unicodedata.category(c)[0] in "LN"]
        slug = "".join(kept).replace(" ", "-")
        number = 1
        unique = slug
        while unique in found:
            unique, number = f"{slug}-{number}", number + 1
        found.add(unique)
    return found


def links(page: Path) -> list[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]*`(?!\])", "", text)
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_links_are_found() -> None:
    assert sum(len(links(page)) for page in PAGES) > 20


# --- commands -----------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command that a page shows, without what is set for it and what it is piped into."""
    for line in shown_commands(page):
        words = shlex.split(line)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        yield words[: words.index("|")] if "|" in words else words


def parse(words: list[str]) -> None:
    """Parse a `loscar` command with the real parser, and its values as the command itself would."""
    try:
        args = build_parser().parse_args(words)
    except SystemExit as status:
        if status.code:
            pytest.fail(f"loscar {shlex.join(words)} cannot be parsed")
        return
    try:
        if words[0] in ("run", "server"):
            options.run_config(args)
            options.server_limits(args, None)
        if words[0] == "run":
            parse_links(args.link, options.whole("--workers", args.workers, 1))
    except ConfigError as error:
        pytest.fail(f"loscar {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_accepted(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands(page):
        if not words:  # only sets something
            continue
        program, *rest = words
        if Path(program).name == "loscar":
            parse(rest)
        elif program == "make":
            assert rest[0] in targets, f"make {rest[0]}: no such target"
            for more in rest[1:]:
                assert more.startswith("ARGS=")
                if rest[0] == "run":
                    parse(["run", *shlex.split(more.removeprefix("ARGS="))])
        elif Path(program).name == "python":
            assert rest[0].startswith("-") or (ROOT / rest[0]).is_file() or rest[0] == "train.py", rest[0]


def test_commands_are_found() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 15


# --- the complete example -----------------------------------------------------------------------------------


def test_the_example_of_ones_own_loop_runs(tmp_path: Path) -> None:
    """The first Python block of docs/own-model.md, as a script, by two processes against a real server."""
    example = next(body for language, body in fences(ROOT / "docs" / "own-model.md") if language == "python")
    script = tmp_path / "train.py"
    script.write_text(example, encoding="utf-8")
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "loscar_deploy", "server", "--listen", "127.0.0.1:0", "--json"]
    command += ["--workers", "2", "--rounds", "5", "--local-steps", "5", "--linger", "0s"]
    processes: list[subprocess.Popen[str]] = []

    def start(arguments: list[str]) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                arguments,
                text=True,
                env=environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if processes else subprocess.DEVNULL,
            )
        )
        return processes[-1]

    try:
        server = start(command)
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["listening"]
        workers = [start([sys.executable, str(script), address]) for _ in range(2)]
        for worker in workers:
            output, _ = worker.communicate(timeout=90)
            assert worker.returncode == 0, output
            assert "the run is over" in output
        server.communicate(timeout=30)
        assert server.returncode == 0
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
