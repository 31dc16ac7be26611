"""Wheel and sdist in environments without this repository; the public names and their types; the shells' completion."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from processes import DEADLINE_S

import loscar_worker
from loscar_core import PROTOCOL_VERSION
from loscar_core.errors import all_errors
from loscar_deploy.cli import build_parser, main
from loscar_deploy.completion import SHELLS

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
PACKAGES = ("loscar_core", "loscar_wire", "loscar_server", "loscar_worker", "loscar_deploy")
DATA = (
    *(f"loscar_deploy/dashboard/page.{kind}" for kind in ("html", "css", "js")),
    *(f"loscar_deploy/schemas/{name}.schema.json" for name in ("metrics", "summary")),
)
EXPORTED = {"loscar_core": {"PROTOCOL_VERSION"}, "loscar_worker": {"RoundRecord", "Session", "join"}}
SESSION = {"average", "close", "finished", "resume", "should_stop", "state_dict", "step", "stop_run"}
"""What a loop of one's own calls; there is more for the command line."""

# --- names and types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", EXPORTED)
def test_exported_names(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == EXPORTED[package]
    for name in module.__all__:
        assert hasattr(module, name), name


def test_what_the_pages_call_is_there() -> None:
    """`session.…` in the documentation, and what a loop needs."""
    said = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    named = set(re.findall(r"`session\.(\w+)", said)) - {"py"}
    assert {"step", "state_dict", "average"} <= named
    attributes = {"finished", "name", "slot", "steps"}  # of an instance
    missing = {name for name in SESSION | named if not hasattr(loscar_worker.Session, name)}
    assert missing <= attributes


def test_every_error_is_exported_where_it_is_documented() -> None:
    errors = importlib.import_module("loscar_core.errors")
    for error in all_errors():
        if error.__module__ == errors.__name__:
            assert getattr(errors, error.__name__) is error


def test_the_public_api_is_typed() -> None:
    public = {name: member for name, member in vars(loscar_worker.Session).items() if not name.startswith("_")}
    functions = [loscar_worker.join]
    functions += [m.fget if isinstance(m, property) else m for m in public.values()]
    for function in functions:
        if not inspect.isfunction(function):
            continue
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function.__qualname__
        for parameter in signature.parameters.values():
            assert parameter.name == "self" or parameter.annotation is not inspect.Parameter.empty, (
                function.__qualname__
            )


def test_versions_are_told_and_semantic(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    version = metadata.version("loscar")
    assert capsys.readouterr().out == f"loscar {version} (protocol {PROTOCOL_VERSION})\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?", version)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## (Unreleased|{re.escape(version)}\b)", changes, re.MULTILINE)


# --- completion ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bash's."""
    path = tmp_path_factory.mktemp("completion") / "loscar.bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr(sys, "stdout", file)
        with pytest.raises(SystemExit) as done:
            main(["--print-completion", "bash"])
    assert done.value.code == 0
    return path


def completed(script: Path, line: str, cwd: Path) -> set[str]:
    """What bash offers for the last word of a line."""
    words = [*shlex.split(line), *([""] if line.endswith(" ") else [])]
    ask = f"source {shlex.quote(str(script))}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
    ask += "_shtab_loscar; printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", ask], cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_commands_options_values_and_files(script: Path, tmp_path: Path) -> None:
    commands = next(a.choices for a in build_parser()._actions if a.dest == "command" or a.metavar == "COMMAND")
    assert commands is not None
    assert completed(script, "loscar ", tmp_path) >= set(commands)
    assert completed(script, "loscar st", tmp_path) == {"status"}
    assert completed(script, "loscar run --out", tmp_path) == {"--out"}
    assert completed(script, "loscar run --writer ", tmp_path) == {"tensorboard", "wandb"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.pem").touch()
    assert completed(script, "loscar run --out f", tmp_path) == {"folder"}
    assert "file.pem" in completed(script, "loscar server --tls-cert f", tmp_path)
    assert "--exit-with-parent" not in completed(script, "loscar run --e", tmp_path)


def test_every_option_of_every_command_is_completed(script: Path, tmp_path: Path) -> None:
    (commands,) = (a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert len(commands) > 10
    for name, parser in commands.items():
        shown = {o for a in parser._actions if a.help != argparse.SUPPRESS for o in a.option_strings if o[:2] == "--"}
        assert completed(script, f"loscar {name} --", tmp_path) >= shown, name


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_that_it_can_read(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", shell])
    text = capsys.readouterr().out
    for word in ("loscar", "status", "print-completion"):
        assert word in text
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n"], input=text, text=True, timeout=DEADLINE_S, check=True)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--print-completion", "cmd"])
    assert done.value.code == 2
    assert "zsh" in capsys.readouterr().err


# --- wheel and sdist ----------------------------------------------------------------------------------------


def run(*words: str | Path, cwd: Path, deadline_s: float = DEADLINE_S) -> str:
    """A command's standard output, without anything of this repository or its environment on its path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LOSCAR", "VIRTUAL_ENV"))}
    done = subprocess.run(words, cwd=cwd, env=kept, capture_output=True, text=True, timeout=deadline_s, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from what is in the sdist and nothing else."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    [sdist] = folder.glob("loscar-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [source] = (folder / "unpacked").iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    [wheel] = folder.glob("loscar-*.whl")
    return sdist, wheel


def _environment(folder: Path) -> Path:
    """A new one; returns its folder of programs."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_what_is_in_them(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert set(DATA) <= names
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == set(PACKAGES)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "proto/loscar/v1/parameter_server.proto",
    ):
        assert needed in sources, needed
    assert not any("/.venv" in name or "__pycache__" in name for name in sources)


@pytest.fixture(scope="module")
def bare(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and what it asks for itself."""
    programs = _environment(tmp_path_factory.mktemp("bare") / "venv")
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--constraint",
        ROOT / "constraints.txt",
    ]
    run(programs / "python", *install, built[1], cwd=programs, deadline_s=240)
    return programs


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_server_serves_from_the_wheel_and_what_it_depends_on(bare: Path, tmp_path: Path) -> None:
    version = metadata.version("loscar")
    assert run(bare / "loscar", "--version", cwd=tmp_path) == f"loscar {version} (protocol {PROTOCOL_VERSION})\n"
    where = run(bare / "python", "-c", "import loscar_core; print(loscar_core.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(bare.parent)
    assert "_shtab_loscar" in run(bare / "loscar", "--print-completion", "bash", cwd=tmp_path)
    findings = json.loads(run(bare / "loscar", "doctor", "--json", cwd=tmp_path))
    assert {f["check"]: f["state"] for f in findings}["torch"] == "warning", "nothing of this environment is seen there"
    command = [bare / "loscar", "server", "--listen", "127.0.0.1:0", "--dashboard", "127.0.0.1:0", "--json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            told = json.loads(server.stdout.readline())
            answer = json.loads(run(bare / "loscar", "status", "--server", told["listening"], "--json", cwd=tmp_path))
            assert answer["run_id"] == told["run_id"]
        finally:
            server.kill()


@pytest.fixture(scope="module")
def whole(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with PyTorch, which is borrowed from here: it is too large to be installed for a test."""
    folder = tmp_path_factory.mktemp("whole") / "venv"
    programs = _environment(folder)
    run(programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", built[1], cwd=programs, deadline_s=120)
    [own] = folder.glob("lib/python*/site-packages")
    # A path in a .pth file comes after the environment's own, and .pth files there are not read: not ours, above all.
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_run_from_the_wheel(whole: Path, tmp_path: Path) -> None:
    shutil.copy(SUPPORT / "tiny_task.py", tmp_path)
    flags = ["--task", "tiny_task:Tiny", "--workers", "2", "--rounds", "3", "--link", "none", "--json", "--out", "out"]
    summary = json.loads(run(whole / "python", "-m", "loscar_deploy", "run", *flags, cwd=tmp_path, deadline_s=120))
    assert summary["rounds"] == 3
    where = "import loscar_deploy, loscar_worker; print(loscar_deploy.__file__, loscar_worker.__file__)"
    for path in run(whole / "python", "-c", where, cwd=tmp_path).split():
        assert Path(path).is_relative_to(whole.parent)
    assert run(whole / "loscar", "--version", cwd=tmp_path).startswith("loscar ")
