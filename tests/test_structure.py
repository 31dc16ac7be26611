"""The house: who may import whom, what lies where, generated code, and a light command line."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loscar_core.errors import LoscarError, all_errors

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "loscar_core": ROOT / "loscar_core",
    "loscar_wire": ROOT / "proto" / "loscar_wire",
    "loscar_server": ROOT / "server" / "loscar_server",
    "loscar_worker": ROOT / "worker" / "loscar_worker",
    "loscar_deploy": ROOT / "deploy" / "loscar_deploy",
}
OURS = set(PACKAGES)
GRPC = {"grpc", "grpc_health", "grpc_reflection", "google"}
TORCH = {"torch", "torchvision", "sklearn"}
# What a package may import of ours, and of others' (None: anything but what is in FORBIDDEN).
MAY: dict[str, tuple[set[str], set[str] | None]] = {
    "loscar_core": ({"loscar_core"}, {"numpy", "isal"}),  # isal only where it is installed
    "loscar_wire": ({"loscar_core", "loscar_wire"}, GRPC),
    "loscar_server": ({"loscar_core", "loscar_wire", "loscar_server"}, None),
    "loscar_worker": ({"loscar_core", "loscar_wire", "loscar_worker"}, None),
    "loscar_deploy": (OURS, None),
}
FORBIDDEN = {
    # Parts of the standard library: the core has no threads, no loop and no clock.
    "loscar_core": {"asyncio", "threading", "concurrent", "multiprocessing", "time", "datetime", "socket", "selectors"},
    "loscar_server": TORCH,
}


def modules(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level names that a module imports anywhere, also within functions and for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or "_generated" in path.parts, f"{path}: a relative import"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_who_imports_whom(package: str) -> None:
    assert modules(package)
    ours, others = MAY[package]
    for path in modules(package):
        names = imported(path)
        where = str(path.relative_to(ROOT))
        assert not (names & OURS) - ours, where
        foreign = names - OURS - set(sys.stdlib_module_names)
        assert others is None or not foreign - others, where
        assert not names & FORBIDDEN.get(package, set()), where


def test_no_module_is_imported_by_a_string_in_the_core() -> None:
    for path in modules("loscar_core"):
        assert not re.search(r"__import__|import_module", path.read_text(encoding="utf-8")), path


def test_the_layout() -> None:
    folders = ["proto", "server", "worker", "loscar_core", "deploy", "tests", "docs"]
    files = "pyproject.toml README.md Makefile .ci/run LICENSE CHANGELOG.md constraints.txt"
    for name in [*folders, "proto/loscar/v1/parameter_server.proto", *files.split()]:
        assert (ROOT / name).exists(), name
    for package, folder in PACKAGES.items():
        assert (folder / "__init__.py").is_file(), package
        assert (folder / "py.typed").is_file(), package
        assert Path(importlib.import_module(package).__file__ or "").parent == folder


def test_the_stubs_are_what_the_proto_file_says(tmp_path: Path) -> None:
    python = ROOT / ".venv-proto" / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-proto: `make test` and `make proto` make it")
    subprocess.run([python, ROOT / "proto" / "generate.py", tmp_path], check=True, timeout=60)
    committed = PACKAGES["loscar_wire"] / "_generated"
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {p.name for p in committed.iterdir() if p.is_file()}
    for name in names:
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes(), f"{name}: run `make proto`"


# --- what a process loads -----------------------------------------------------------------------------------

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in BLOCKED:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Block())
"""


def python(code: str, blocked: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    """Run code in a fresh interpreter in which some packages cannot be imported; returns what it printed."""
    program = BLOCKED.replace("BLOCKED", repr(set(blocked))) + code
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_loads_nothing_heavy() -> None:
    code = """
import json, sys
sys.argv[0] = "loscar"
from loscar_deploy.cli import main
try:
    main(["--help"])
except SystemExit as done:
    print(json.dumps([done.code, sorted({m.partition(".")[0] for m in sys.modules})]))
"""
    text = python(code)
    status, loaded = json.loads(text.splitlines()[-1])
    assert status == 0
    assert not set(loaded) & {*GRPC, *TORCH, "numpy", "safetensors", "uvloop", "asyncio", "rich"}
    for cls in all_errors():
        assert cls.exit_code == LoscarError.exit_code or f"  {cls.exit_code:<4} " in text, cls.__name__
    for command in ["run", "server", "worker", "status", "evaluate", "link"]:
        assert f"\n    {command} " in text


def test_exit_codes_tell_errors_apart() -> None:
    """Where two errors share a code, one is a kind of the other."""
    codes: dict[int, type[LoscarError]] = {}
    for cls in all_errors():
        parent = codes.setdefault(cls.exit_code, cls)
        assert issubclass(cls, parent), cls.__name__
        assert cls.exit_code not in (0, 2), cls.__name__
        assert cls.summary
        assert cls.hint
        assert "\n" not in cls.hint


def test_documented_exit_codes_are_the_real_ones() -> None:
    page = ROOT / "docs" / "cli.md"
    rows = dict(re.findall(r"^\| (\d+) \| ([^|]+?) \|", page.read_text(encoding="utf-8"), re.MULTILINE))
    for cls in all_errors():
        assert str(cls.exit_code) in rows, cls.__name__
    assert set(rows) == {"0", "2", "141", *(str(cls.exit_code) for cls in all_errors())}


def test_the_core_works_without_torch_and_grpc() -> None:
    names = [
        ".".join(["loscar_core", *p.relative_to(PACKAGES["loscar_core"]).with_suffix("").parts])
        for p in modules("loscar_core")
        if p.stem != "__init__"
    ]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
from loscar_core.selection import SelectionKind, select
assert select(SelectionKind.SWEEP, 0, 1, 100, 10).size == 10
assert "asyncio" not in sys.modules
"""
    python(code, {*GRPC, *TORCH, "uvloop", "rich", "safetensors"})


def test_the_server_runs_without_torch() -> None:
    code = """
import asyncio
from loscar_deploy.cli import build_parser
from loscar_server.app import ServerOptions, ServerProcess
build_parser().parse_args(["server"])
async def go():
    process = ServerProcess(ServerOptions(listen="127.0.0.1:0"))
    print(await process.start())
    await process.close()
asyncio.run(go())
"""
    assert python(code, TORCH).startswith("127.0.0.1:")


@pytest.mark.parametrize("command", ["worker", "run", "evaluate"])
def test_commands_that_need_torch_say_so_without_it(command: str) -> None:
    arguments = [command, "nowhere"] if command == "evaluate" else [command]
    code = f"""
import sys
sys.modules["torch"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find(name, package)
from loscar_deploy.cli import main
sys.stderr = sys.stdout
print("status", main({arguments!r}))
"""
    text = python(code)
    assert "status 3" in text
    assert "loscar[worker]" in text
