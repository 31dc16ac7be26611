"""`--writer`: what TensorBoard's own reader and a Weights & Biases file say of a real run is what the run wrote."""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from processes import Processes

from loscar_deploy.cli import main
from loscar_deploy.writers import Writers, scalars_of

SUPPORT = Path(__file__).parents[1] / "support"
TINY = ["--task", "tiny_task:Tiny", "--step-time", "2ms"]
OFFLINE = {"WANDB_MODE": "offline", "WANDB_API_KEY": "", "WANDB_PROJECT": "", "WANDB_NAME": "", "WANDB_DIR": ""}
BOTH = ["--writer", "tensorboard", "--writer", "wandb"]


@dataclass(frozen=True)
class Point:
    """A scalar that somebody has read back."""

    round: int
    value: float


def tensorboard_of(folder: Path) -> tuple[dict[str, list[Point]], str]:
    """The scalars by name, and the text of the settings, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    scalars = {tag: [Point(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    [settings] = found.Tensors("settings")
    return scalars, settings.tensor_proto.string_val[0].decode()


def wandb_of(folder: Path) -> tuple[dict[str, list[Point]], dict[str, Any]]:
    """The scalars by name, and the settings, of the one offline run in a folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = (folder / "wandb").glob("offline-run-*/*.wandb")
    scalars: dict[str, list[Point]] = {}
    settings: dict[str, Any] = {}
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
        items = record.history.item
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
        for name, value in row.items():
            if name != "round" and not name.startswith("_"):
                scalars.setdefault(name, []).append(Point(row["round"], value))
    return scalars, settings


def _records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format: blocks of 32 KiB, records in pieces of (checksum, length, kind)."""
    assert data.startswith(b":W&B")
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # in one piece, or the last one
            yield whole
            whole = b""


def expected(out: Path) -> dict[str, list[Point]]:
    """What a run folder says, by the names of the writers."""
    found: dict[str, list[Point]] = {}

    def add(name: str, round_: int, value: float | None) -> None:
        if value is not None:
            found.setdefault(name, []).append(Point(round_, value))

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for worker in line["workers"]:
            for figure in ("steps", "loss", "missed", "bytes_up", "round_trip_s"):
                add(f"{figure}/{worker['name']}", line["round"], worker[figure])
        add("run/bytes_in", line["round"], line["bytes_in"])
    for line in map(json.loads, (out / "evaluations.jsonl").read_text().splitlines()):
        add("evaluation/loss", line["round"], line["loss"])
    summary = json.loads((out / "summary.json").read_text())
    add("result/accuracy", lines[-1]["round"], summary["accuracy"])
    return found


def same(read: list[Point], written: list[Point]) -> bool:
    """TensorBoard keeps float32."""
    return len(read) == len(written) and all(
        r.round == w.round and math.isclose(r.value, w.value, rel_tol=1e-6) for r, w in zip(read, written, strict=True)
    )


@pytest.mark.timeout(240)
def test_both_have_the_figures_of_a_local_run(processes: Processes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--workers", "2", "--link", "none", "--sync-interval", "20ms", "--duration", "3s", "--json"]
    flags += ["--evaluate-every", "20", "--out", str(out), *BOTH]
    run = processes.loscar("run", *TINY, *flags, cwd=SUPPORT, **OFFLINE)
    assert run.wait(150) == 0, run.err
    assert "the run goes on without it" not in run.err
    assert json.loads(run.out) == json.loads((out / "summary.json").read_text()), "wandb keeps off standard output"
    written = expected(out)
    assert {"loss/w0", "loss/w1", "evaluation/loss", "result/accuracy"} <= set(written)
    scalars, text = tensorboard_of(out / "tensorboard")
    assert "| sync_interval | 20ms |" in text
    logged, settings = wandb_of(out)
    assert settings["sync_interval"] == "20ms"
    for name, points in written.items():
        assert same(scalars[name], points), name
        assert same(logged[name], points), name
    assert {"run/loss", "run/workers", "idle_share/w0", "overlap_steps/w1"} <= set(scalars)
    assert set(scalars) == set(logged)


def test_a_run_of_several_machines_is_written_by_whoever_watches_it(processes: Processes, tmp_path: Path) -> None:
    server = processes.server("--workers", "2", "--local-steps", "5", "--duration", "3s", "--linger", "5m")
    workers = [
        processes.loscar("worker", *TINY, "--server", server.address, "--name", f"w{i}", cwd=SUPPORT) for i in (0, 1)
    ]
    flags = ["--server", server.address, "--watch", "--writer", "tensorboard", "--out", str(tmp_path / "out")]
    watcher = processes.loscar("status", *flags)
    assert watcher.wait() == 0, watcher.err
    assert [worker.wait() for worker in workers] == [0, 0]
    scalars, text = tensorboard_of(tmp_path / "out" / "tensorboard")
    assert "| local_steps | 5 |" in text
    rounds = [point.round for point in scalars["run/elapsed_s"]]
    assert rounds == sorted(rounds)
    assert rounds[-1] > 1
    assert all(0 < point.value < 10 for point in scalars["loss/w0"] + scalars["loss/w1"])


def test_weights_and_biases_without_a_login_is_named_before_the_run(processes: Processes, tmp_path: Path) -> None:
    online = {**OFFLINE, "WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    flags = ["--workers", "1", "--out", str(tmp_path / "out"), "--writer", "wandb"]
    run = processes.loscar("run", *TINY, *flags, cwd=SUPPORT, **online)
    assert run.wait() == 3, run.err
    last = run.err.strip().splitlines()[-2]
    assert last.startswith("loscar: --writer wandb cannot begin: ")
    assert "login" in last
    assert "Traceback" not in run.err
    assert not (tmp_path / "out" / "logs" / "server.log").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = metadata.distribution

    def distribution(wanted: str) -> metadata.Distribution:
        if wanted == name:
            raise metadata.PackageNotFoundError(wanted)
        return found(wanted)

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # what an earlier run may have left here is no package
    for command in (["run", "--task", "digits"], ["status", "--watch"]):
        assert main([*command, "--writer", name]) == 3
        assert f"pip install 'loscar[{name}]'" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name], "nothing was begun"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["status", "--writer", "wandb"], "need --watch"),
        (["status", "--watch", "--out", "x"], "--out is for the files of --writer"),
        (["status", "--watch", "--writer", "wandb", "--writer", "wandb"], "--writer wandb is given twice"),
    ],
)
def test_options_that_do_not_go_together(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 3
    assert said in capsys.readouterr().err


class Noting:
    """Keeps what it is told; `broken`: raises instead."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.told: list[tuple[str, Any]] = []

    def _note(self, what: str, value: Any) -> None:
        self.told.append((what, value))
        if self.broken:
            raise OSError(28, "No space left\n on device")

    def settings(self, values: Mapping[str, Any]) -> None:
        self._note("settings", values)

    def scalars(self, values: Mapping[str, float], round_: int) -> None:
        self._note("scalars", (values, round_))

    def close(self) -> None:
        self._note("close", None)


def test_one_that_fails_is_left_out_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = Noting(), Noting(broken=True)
    writers = Writers({"bad": bad, "good": good})
    with caplog.at_level(logging.WARNING, "loscar"):
        writers.evaluation({"round": 3, "loss": None, "accuracy": 0.5})
        writers.result({"loss": 1.0, "accuracy": 0.5})
        writers.close()
    assert [r.getMessage() for r in caplog.records] == [
        "--writer bad: [Errno 28] No space left on device; the run goes on without it"
    ]
    assert len(bad.told) == 1
    assert good.told[0] == ("scalars", ({"evaluation/accuracy": 0.5}, 3))
    assert [what for what, _ in good.told] == ["scalars", "scalars", "close"]


def test_scalars_of_a_line() -> None:
    worker = dict.fromkeys(("steps", "missed", "merged_round", "local_steps", "overlap_steps", "bytes_up"), 2)
    worker |= {"name": "a/b", "bytes_down": 3, "idle_s": 1.0, "run_s": 4.0, "loss": 0.5, "round_trip_s": None}
    line = {"elapsed_s": 1.5, "epoch": 1, "round": 9, "bytes_in": 10, "bytes_out": 20}
    line |= {"workers": [worker, {**worker, "name": "new", "loss": None, "run_s": 0.0}], "departures": {"left": 2}}
    found = scalars_of(line)
    assert (found["run/loss"], found["run/workers"], found["departures/left"]) == (0.5, 2, 2)
    assert (found["idle_share/a/b"], found["idle_share/new"], found["loss/new"]) == (0.25, None, None)
