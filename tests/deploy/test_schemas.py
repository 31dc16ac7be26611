"""metrics.jsonl and summary.json against their schemas, by runs of several kinds; and the page that describes them."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from processes import Processes, descendants, wait_until

from loscar_deploy.cli import main
from loscar_deploy.strict_json import dumps

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parents[1] / "support"
PAGE = ROOT / "docs" / "run-folder.md"
TINY = ["--task", "tiny_task:Tiny", "--workers", "2", "--step-time", "2ms", "--seed", "4"]
REAL = {
    # The second heartbeat, 4 s after joining, is the first that tells how long one takes.
    "overlapped": ["--link", "rtt=4ms", "--sync-interval", "20ms", "--duration", "5s"],
    "dppf": ["--link", "none", "--method", "dppf", "--local-steps", "4", "--rounds", "20"],
    "mixvr": ["--link", "none", "--method", "mixvr", "--rounds", "20"],
}
BLOCKING = ["--link", "none", "--overlap-steps", "0", "--local-steps", "4", "--density", "0.5", "--duration", "10m"]
SIMULATED = {
    "churn": ["--churn", "0.5", "--churn-every", "1s", "--away", "1s", "--evaluate-every", "5", "--duration", "5s"],
    "simulated dppf": ["--method", "dppf", "--local-steps", "4", "--rounds", "20", "--target-loss", "2.0"],
}


def schema_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((files("loscar_deploy") / "schemas" / f"{name}.schema.json").read_text("utf-8"))
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    """Each is JSON as everybody's parser takes it."""

    def none(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=none) for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Ran:
    """What a run has written."""

    kind: str
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Ran]]:
    """A real run and simulated ones; those of `more_runs` take longer."""
    folder = tmp_path_factory.mktemp("schemas")
    processes = Processes(folder / "logs")
    threads = torch.get_num_threads()
    found = []
    try:
        found.append(_real(processes, "overlapped", folder / "overlapped"))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(SUPPORT)
            for kind, flags in SIMULATED.items():
                assert main(["simulate", *TINY, *flags, "--json", "--out", str(folder / kind)]) == 0
                found.append(_read(kind, folder / kind))
        yield found
    finally:
        torch.set_num_threads(threads)
        processes.kill_all()


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Ran]]:
    """Other methods, and a blocking run in which a worker is killed: the last."""
    folder = tmp_path_factory.mktemp("more")
    processes = Processes(folder / "logs")
    try:
        found = [_real(processes, kind, folder / kind) for kind in ("dppf", "mixvr")]
        found.append(_killed(processes, folder / "killed"))
        yield found
    finally:
        processes.kill_all()


def _real(processes: Processes, kind: str, out: Path) -> Ran:
    process = processes.loscar("run", *TINY, *REAL[kind], "--out", str(out), cwd=SUPPORT)
    assert process.wait(150) == 0, process.err
    return _read(kind, out)


def _killed(processes: Processes, out: Path) -> Ran:
    process = processes.loscar("run", *TINY, *BLOCKING, "--out", str(out), cwd=SUPPORT)

    def reported() -> bool:
        metrics = out / "metrics.jsonl"
        told = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        return bool(told) and all(w["loss"] is not None for w in json.loads(told[-1])["workers"] or [{"loss": None}])

    wait_until(reported, "both workers have told their loss")
    [victim] = [p for p in descendants(process.pid) if "w1" in p.cmdline()]
    victim.kill()

    def noticed() -> bool:
        last = json.loads((out / "metrics.jsonl").read_text().split("\n")[-2])
        return bool(last["departures"]) and len(last["workers"]) == 1

    wait_until(noticed, "the departure is in the record")
    process.signal(signal.SIGINT)
    assert process.wait(150) == 0, process.err
    return _read("killed", out)


def _read(kind: str, out: Path) -> Ran:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return Ran(kind, lines(out / "metrics.jsonl"), summary)


def complaints(run: Ran) -> list[str]:
    """What the schemas have against a run's files."""
    metrics, summary = (Draft202012Validator(schema_of(name)) for name in ("metrics", "summary"))
    errors = [e for line in run.metrics for e in metrics.iter_errors(line)]
    return [e.message for e in [*errors, *summary.iter_errors(run.summary)]]


@pytest.mark.timeout(240)
def test_every_line_is_valid(runs: list[Ran]) -> None:
    for run in runs:
        assert len(run.metrics) >= 2, run.kind
        assert complaints(run) == [], run.kind
    churn = runs[1]
    assert churn.summary["deaths"] > 0
    assert any(line["departures"] for line in churn.metrics)


@pytest.mark.long
@pytest.mark.timeout(240)
def test_so_is_every_line_of_other_methods_and_of_a_run_with_a_death(more_runs: list[Ran]) -> None:
    for run in more_runs:
        assert len(run.metrics) >= 2, run.kind
        assert complaints(run) == [], run.kind
    dppf, mixvr, killed = more_runs
    assert dppf.summary["valley_width"] > 0
    assert mixvr.summary["merge"] is None
    assert killed.metrics[-1]["departures"] == {"stream-closed": 1, "finished": 1}
    assert killed.summary["overlap_steps"] == 0
    assert killed.summary["step_seconds_median"][1] is None


def _properties(schema: dict[str, Any]) -> set[str]:
    """The fields that a schema describes, at any depth."""
    found: set[str] = set()
    for name, value in schema.get("properties", {}).items():
        found |= {name} | _properties(value)
    return found | (_properties(schema["items"]) if isinstance(schema.get("items"), dict) else set())


def _present(value: Any) -> set[str]:
    """The fields that have a value other than null, at any depth."""
    if isinstance(value, list):
        return set().union(*map(_present, value))
    if isinstance(value, dict):
        return {k for k, v in value.items() if v is not None} | set().union(*map(_present, value.values()))
    return set()


@pytest.mark.parametrize("name", ["metrics", "summary"])
def test_every_field_occurs(runs: list[Ran], name: str) -> None:
    present: set[str] = set()
    for run in runs:
        present |= _present(getattr(run, name))
    assert _properties(schema_of(name)) - present == set()


def test_figures_that_grow_do(runs: list[Ran]) -> None:
    for run in runs:
        for before, after in zip(run.metrics, run.metrics[1:], strict=False):
            for field in ("elapsed_s", "round", "bytes_in", "bytes_out"):
                assert after[field] >= before[field], (run.kind, field)


@pytest.mark.parametrize("name", ["metrics", "summary"])
def test_schemas_are_schemas_and_describe_every_field(name: str) -> None:
    schema = schema_of(name)
    Draft202012Validator.check_schema(schema)

    def look(part: dict[str, Any], where: str) -> None:
        assert part.get("description"), where
        if "properties" in part:
            assert part["additionalProperties"] is False, where
            for field, value in part["properties"].items():
                look(value, f"{where}.{field}")
                if field.endswith("_s") or field in ("wall_seconds", "virtual_seconds"):
                    assert re.search(r"[Ss]econds|[Rr]un time", value["description"]), field
        if "properties" in part.get("items", {}):
            look(part["items"], f"{where}[]")

    look(schema, name)


def test_what_is_not_in_a_schema_is_refused(runs: list[Ran]) -> None:
    line = runs[0].metrics[-1]
    schema = Draft202012Validator(schema_of("metrics"))
    for wrong in ({**line, "extra": 1}, {**line, "round": "7"}, {k: v for k, v in line.items() if k != "epoch"}):
        with pytest.raises(ValidationError):
            schema.validate(wrong)
    summary = {**runs[0].summary, "virtual_seconds": 1.0}
    assert not Draft202012Validator(schema_of("summary")).is_valid(summary), "of a real run and of a simulation"


def _documented(heading: str) -> set[str]:
    """The names in the first column of a section's table."""
    text = PAGE.read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| ([^|]*) \|", section, re.MULTILINE)
    return {name.removeprefix("· ") for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("name", ["metrics", "summary"])
def test_the_page_names_exactly_the_fields_of_the_schema(name: str) -> None:
    schema = schema_of(name)
    fields = set(schema["properties"])
    if name == "metrics":
        fields |= set(schema["properties"]["workers"]["items"]["properties"])
    assert _documented("metrics.jsonl" if name == "metrics" else "summary.json") == fields


def test_the_page_s_example_checks_a_file(runs: list[Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in runs[0].metrics))
    exec(compile(example, str(PAGE), "exec"), {})
    Path("metrics.jsonl").write_text('{"round": 1}\n')
    with pytest.raises(ValidationError):
        exec(compile(example, str(PAGE), "exec"), {})


def test_numbers_that_json_does_not_have_are_null() -> None:
    value = {"a": float("nan"), "b": [float("inf"), 1.5], "c": ({"d": -float("inf")}, 2)}
    assert json.loads(dumps(value)) == {"a": None, "b": [None, 1.5], "c": [{"d": None}, 2]}
