"""`loscar compare`: what it prints, writes and draws, with a virtual clock and once with real processes."""

from __future__ import annotations

import csv
import io
import json
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from processes import Processes

from loscar_core.errors import ConfigError, InterruptedRunError, NonFiniteError
from loscar_deploy import compare as c
from loscar_deploy.cli import main

SUPPORT = Path(__file__).parents[1] / "support"
SLOW = "rtt=300ms,rate=100kbit"
TINY = ["compare", "--simulate", "--task", "tiny_task:Tiny", "--workers", "2", "--slowdown", "1,2"]
SETTING = [*TINY, "--duration", "3s", "--local-steps", "10", "--target-loss", "0.5"]
NUMBERS = {"seconds_to_target", "steps_to_target", "bytes_to_target", "seconds", "rounds", "steps", "loss", "accuracy"}
NUMBERS |= {"bytes_up", "bytes_down", "idle_max", "idle_mean", "lost", "seed"}
PICTURES = {"loss-seconds.png", "loss-steps.png", "loss-bytes.png", "final-loss.png"}


@pytest.fixture(autouse=True, scope="module")
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Compared:
    """A comparison that is done: its folder, and what was printed."""

    folder: Path
    printed: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """compare.csv, with numbers for numbers and None for what is empty."""
        with (self.folder / "compare.csv").open(encoding="utf-8", newline="") as file:
            return [
                {k: (None if v == "" else float(v)) if k in NUMBERS else v for k, v in row.items()}
                for row in csv.DictReader(file)
            ]

    @property
    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "compare.json").read_text())
        return found

    def of(self, density: str, variant: str) -> list[dict[str, Any]]:
        return [r for r in self.rows if (r["density"], r["variant"]) == (density, variant)]


def run(folder: Path, *flags: str) -> Compared:
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([*SETTING, *flags, "--out", str(folder)]) == 0
    return Compared(folder, printed.getvalue())


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Two densities over a slow link, two repetitions."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return run(folder, "--repeat", "2", "--densities", "0.25, 1", "--links", SLOW)


def tables(printed: str) -> dict[str, dict[str, dict[str, str]]]:
    """Title → variant → heading → cell."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    headings: list[str] = []
    for line in printed.splitlines():
        if line.startswith("density "):
            title = line.strip()
            found[title] = {}
        elif line.startswith("┃"):
            headings = [cell.strip() for cell in line.strip("┃").split("┃")]
        elif line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            found[title][cells[0]] = dict(zip(headings[1:], cells[1:], strict=True))
    return found


# --- results ------------------------------------------------------------------------------------------------


def test_the_table_is_made_of_the_lines_of_the_csv(compared: Compared) -> None:
    shown = tables(compared.printed)
    assert list(shown) == [f"density {d} · link {SLOW} · 2 × each" for d in ("0.25", "1")]

    def cell(values: list[float | None], unit: float, digits: int, missing: str) -> str:
        if None in values:
            assert set(values) == {None}
            return missing
        mean, deviation = fmean(values) / unit, stdev(values) / unit  # type: ignore[type-var]
        return f"{mean:.{digits}f} ± {deviation:.{digits}f}"

    for title, rows in shown.items():
        density = title.split()[1]
        assert list(rows) == ["overlapped", "overwrite", "blocking"]
        for variant, cells in rows.items():
            own = compared.of(density, variant)
            assert [r["seed"] for r in sorted(own, key=lambda r: r["seed"])] == [0, 1]
            unit = next(u for u in cells if u.startswith("traffic"))
            assert unit == "traffic / kB"
            assert cells["s to 0.5"] == cell([r["seconds_to_target"] for r in own], 1, 2, "not reached")
            assert cells["steps to it"] == cell([r["steps_to_target"] for r in own], 1, 0, "not reached")
            assert cells["final loss"] == cell([r["loss"] for r in own], 1, 4, "")
            assert cells["accuracy / %"] == cell([r["accuracy"] for r in own], 0.01, 2, "")
            assert cells[unit] == cell([r["bytes_up"] + r["bytes_down"] for r in own], 1e3, 1, "")
            assert cells["idle ≤ / %"] == cell([r["idle_max"] for r in own], 0.01, 1, "")


def test_what_is_not_reached_says_so_everywhere(compared: Compared) -> None:
    for density, variant in (("1", "overwrite"), ("1", "blocking"), ("0.25", "blocking")):
        for row in compared.of(density, variant):
            assert row["seconds_to_target"] is row["steps_to_target"] is row["bytes_to_target"] is None
            assert row["stopped"] == "the duration is over"
        entry = next(e for e in compared.told["results"] if (e["density"], e["variant"]) == (density, variant))
        assert (entry["reached"], entry["runs"]) == (0, 2)
        assert entry["seconds_to_target"] == {
            **dict.fromkeys(("mean", "deviation", "least", "most")),
            "values": [None, None],
        }
        assert entry["time_ratio"]["values"] == [None, None]
        cells = tables(compared.printed)[f"density {density} · link {SLOW} · 2 × each"][variant]
        assert cells["s to 0.5"] == cells["steps to it"] == "not reached"
        assert re.search(rf"{variant} +density {density}  .*: target not reached, loss 0\.\d+ ", compared.printed)
    for row in compared.of("1", "overlapped"):
        assert 0 < row["seconds_to_target"] <= row["seconds"]
        assert f"target at {row['seconds_to_target']:.2f} s, loss {row['loss']:.4f} after" in compared.printed


def test_json_and_csv_hold_the_same_runs(compared: Compared) -> None:
    told = compared.told
    assert [r["variant"] for r in told["runs"][:6]] == ["overlapped", "overwrite", "blocking"] * 2
    assert [r["variant"] for r in told["runs"][6:]] == ["overwrite", "blocking", "overlapped"] * 2, "in turn"
    assert [{k: v for k, v in r.items() if k in NUMBERS} for r in told["runs"]] == [
        {k: v for k, v in r.items() if k in NUMBERS} for r in compared.rows
    ]
    assert [(r["link"], r["folder"], r["stopped"]) for r in told["runs"]] == [
        (r["link"], r["folder"], r["stopped"]) for r in compared.rows
    ]
    assert told["settings"] == {
        "task": "tiny_task:Tiny",
        "simulated": True,
        "target_loss": 0.5,
        "past_target": False,
        "blocking_steps": 10,
        "out": str(compared.folder),
    }


def test_the_rows_are_those_of_the_run_folders(compared: Compared) -> None:
    for row in compared.rows:
        folder = Path(row["folder"])
        assert folder.parent == compared.folder / "runs"
        summary = json.loads((folder / "summary.json").read_text())
        assert row["seconds_to_target"] == summary["seconds_to_target"]
        assert (row["loss"], row["accuracy"]) == (summary["loss"], summary["accuracy"])
        assert row["seconds"] == summary["virtual_seconds"]
        assert row["bytes_up"] == sum(summary["bytes_up"])
        assert row["idle_max"] == max(summary["idle_fraction"])
        assert (summary["seed"], str(summary["density"])) == (row["seed"], str(float(row["density"])))
        assert summary["merge"] == ("overwrite" if row["variant"] == "overwrite" else "delay-corrected")
        if row["variant"] == "blocking":
            assert (summary["overlap_steps"], summary["local_steps"]) == (0, 10)
            assert row["idle_max"] > 0.5
        else:
            assert summary["overlap_steps"] == "auto"
            assert row["idle_max"] == 0
        if row["seconds_to_target"] is not None:
            evaluations = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
            first = next(e for e in evaluations if e["loss"] <= 0.5)
            assert row["steps_to_target"] == fmean(first["steps"])
            texts = [p.read_text().splitlines() for p in folder.glob("workers/*.rounds.jsonl")]
            sent = [json.loads(line) for lines in texts for line in lines]
            at = [r["bytes_up"] + r["bytes_down"] for r in sent if r["round"] == first["round"]]
            assert row["bytes_to_target"] == sum(at)


def test_the_same_seed_gives_the_same_figures(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In another order, beside other runs, told as JSON."""
    flags = ["--repeat", "1", "--seed", "1", "--links", f"none|{SLOW}", "--densities", "1"]
    assert main([*SETTING, *flags, "--variants", "blocking,overlapped", "--json", "--out", str(tmp_path / "o")]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert "4/4" in err
    assert told == json.loads((tmp_path / "o" / "compare.json").read_text())
    again = {r["variant"]: r for r in told["runs"] if r["link"] == SLOW}
    assert again.keys() == {"blocking", "overlapped"}
    for variant, row in again.items():
        before = next(r for r in compared.told["runs"] if (r["variant"], r["density"], r["seed"]) == (variant, "1", 1))
        assert {**row, "folder": ""} == {**before, "folder": ""}
    drawn = {p.name for p in (tmp_path / "o").glob("*.png")}
    assert drawn == PICTURES | {"time-to-target.png", "timeline-link1.png", "timeline-link2.png"}


def test_pictures_of_a_comparison(compared: Compared) -> None:
    drawn = {p.name: p.read_bytes() for p in compared.folder.glob("*.png")}
    assert drawn.keys() == PICTURES | {"time-to-target.png", "timeline.png"}
    for content in drawn.values():
        assert content.startswith(b"\x89PNG")


def test_past_the_target(compared: Compared, tmp_path: Path) -> None:
    flags = ["--densities", "1", "--repeat", "1", "--links", SLOW, "--variants", "overlapped"]
    beyond = run(tmp_path / "out", "--past-target", *flags)
    (row,) = beyond.rows
    assert row["stopped"] == "the duration is over"
    assert row["seconds_to_target"] < row["seconds"] - 1
    with_end = next(r for r in compared.of("1", "overlapped") if r["seed"] == 0)
    assert row["seconds_to_target"] == with_end["seconds_to_target"]
    assert with_end["stopped"] == c.TARGET_REACHED
    assert tables(beyond.printed)[f"density 1 · link {SLOW} · 1 × each"]["overlapped"]["× blocking"] == "–"


def test_without_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--rounds", "3", "--repeat", "1", "--out", str(tmp_path / "out")]) == 0
    (rows,) = tables(capsys.readouterr().out).values()
    losses = {r["variant"]: r["loss"] for r in Compared(tmp_path / "out", "").rows}
    for variant, cells in rows.items():
        assert "× blocking" not in cells
        assert cells["× overlapped"] == f"{losses[variant] / losses['overlapped']:.2f}"
    assert not (tmp_path / "out" / "time-to-target.png").exists()


def test_a_training_that_diverges_is_an_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "tiny_task:Diverging", "--rounds", "3", "--repeat", "1", "--variants", "overlapped"]
    assert main([*TINY, *flags, "--out", str(tmp_path / "out")]) == 0
    (rows,) = tables(capsys.readouterr().out).values()
    assert rows["overlapped"]["final loss"] == rows["overlapped"]["accuracy / %"] == "diverged"
    (row,) = Compared(tmp_path / "out", "").rows
    assert (row["loss"], row["stopped"]) == (None, c.DIVERGED)


def test_real_processes(tmp_path: Path, processes: Processes) -> None:
    flags = ["--task", "tiny_task:Tiny", "--workers", "2", "--rounds", "5", "--repeat", "1", "--links", "none"]
    flags += ["--variants", "blocking", "--local-steps", "5", "--target-loss", "1e-9", "--slowdown", "1,3"]
    process = processes.loscar("compare", *flags, "--out", str(tmp_path / "out"), PYTHONPATH=str(SUPPORT))
    assert process.wait() == 0, process.err
    done = Compared(tmp_path / "out", process.out)
    (row,) = done.rows
    assert (row["variant"], row["rounds"], row["seconds_to_target"], row["lost"]) == ("blocking", 5, None, 0)
    assert row["seconds"] > 0
    assert row["idle_max"] > 0.1
    (rows,) = tables(process.out).values()
    assert rows["blocking"]["final loss"] == f"{row['loss']:.4f}"
    assert rows["blocking"]["s to 1e-09"] == "not reached"
    assert done.told["settings"]["simulated"] is False
    assert (tmp_path / "out" / "timeline.png").exists()


# --- ends that nobody wants ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--variants", "overlapped,fast"], "--variants 'fast' is not one of overlapped, overwrite, blocking"),
        (["--variants", ""], "--variants '' has an empty item"),
        (["--densities", ""], "--densities '' has an empty item"),
        (["--densities", "0.1,"], "--densities '0.1,' has an empty item"),
        (["--densities", "0.1,2"], "--density 2 is outside (0, 1]"),
        (["--densities", "1,1"], "--densities '1,1' has 1 twice"),
        (["--links", "none|"], "--links 'none|' has an empty item"),
        (["--links", "none|rtt=fast"], "'fast'"),
        (["--repeat", "0"], "--repeat '0' is below 1"),
        (["--target-loss", "low"], "--target-loss 'low' is not a number"),
        (["--past-target"], "--past-target says nothing without --target-loss"),
        (["--overlap-steps", "0"], "--overlap-steps 0 would block"),
        (["--local-steps", "0"], "--local-steps 0 says nothing about the blocking runs"),
        (["--step-time", "0s"], "--blocking-steps is needed"),
        (["--slowdown", "1,2,3"], "--slowdown '1,2,3' has 3 values for 2 workers"),
    ],
)
def test_wrong_options(flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--rounds", "1", *flags, "--out", str(tmp_path / "out")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    first, hint, *rest = err.splitlines()
    assert first.startswith("loscar: ")
    assert said in first
    assert hint.startswith("  correct the option")
    assert rest == []
    assert not (tmp_path / "out").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("held", "what"), [("compare.json", "comparison"), ("runs", "comparison"), ("config.toml", "run")]
)
def test_a_folder_that_is_taken(held: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / held).mkdir()
    assert main([*TINY, "--rounds", "1", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err.splitlines()[0] == (
        f"loscar: --out {tmp_path} holds a {what} already: give another folder"
    )
    assert [p.name for p in tmp_path.iterdir()] == [held]


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main([*TINY, "--rounds", "1", "--out", str(tmp_path / "file" / "out")]) == 3
    first, _ = capsys.readouterr().err.splitlines()
    assert first == f"loscar: --out {tmp_path / 'file' / 'out'} cannot be written: Not a directory"


def test_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs that were done before are kept."""
    from loscar_deploy import simulate

    whole, done = simulate.execute, []

    def execute(plan: Any, args: Namespace) -> dict[str, Any]:
        if done:
            raise KeyboardInterrupt
        done.append(plan)
        return whole(plan, args)

    monkeypatch.setattr(simulate, "execute", execute)
    assert main([*TINY, "--rounds", "2", "--repeat", "1", "--out", str(tmp_path / "out")]) == 130
    assert [r["variant"] for r in Compared(tmp_path / "out", "").rows] == ["overlapped"]
    assert "Traceback" not in capsys.readouterr().err


def a_case(folder: Path) -> c.Case:
    return c.Case("overlapped", "1", "none", 0, "link1-density1-seed0-overlapped", Namespace(out=folder))


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    def failing(case: c.Case) -> dict[str, Any]:
        raise ConfigError("something is wrong")

    with pytest.raises(ConfigError, match=r"^link1-density1-seed0-overlapped: something is wrong$"):
        list(c.run_all([a_case(tmp_path)], failing, None))


def test_a_run_that_a_signal_ended_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError, match="interrupted in link1-density1-seed0-overlapped"):
        list(c.run_all([a_case(tmp_path)], lambda case: {"stopped": "interrupted"}, None))


def test_a_diverging_run_may_leave_only_its_options(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")

    def diverging(case: c.Case) -> dict[str, Any]:
        raise NonFiniteError("w0 holds NaN")

    (row,) = c.run_all([a_case(tmp_path)], diverging, 0.1)
    assert (row.loss, row.seconds_to_target, row.stopped, row.lost) == (None, None, c.DIVERGED, 0)


# --- the parts ----------------------------------------------------------------------------------------------


def test_every_variant_comes_first_in_turn() -> None:
    cases = c.cases_of(Namespace(task="t"), ["0.1", "1"], ["none", SLOW], c.VARIANTS, range(4, 7), 7, Path("o"))
    assert len(cases) == len({case.name for case in cases}) == 2 * 2 * 3 * 3
    assert [case.seed for case in cases] == [4] * 12 + [5] * 12 + [6] * 12
    assert [case.variant for case in cases[::12]] == ["overlapped", "overwrite", "blocking"]
    for case in cases:
        assert case.args.out == Path("o/runs") / case.name
        assert (case.args.density, case.args.link, case.args.seed) == (case.density, case.link, str(case.seed))
        blocks = getattr(case.args, "overlap_steps", None) == "0" and case.args.local_steps == "7"
        assert blocks == (case.variant == "blocking")


def row(variant: str, seed: int, seconds: float | None, loss: float | None) -> c.Row:
    return c.Row(
        *(variant, "1", "none", seed, seconds, seconds, None, 9.0, 3, 30.0, loss, loss),
        *(100, 200, 0.5, 0.25, 0, c.DIVERGED if loss is None else "", "folder"),
    )


def test_ratios_come_from_pairs() -> None:
    rows = [row("blocking", 0, 10.0, 0.2), row("blocking", 1, None, 0.4), row("blocking", 2, 30.0, 0.8)]
    rows += [row("overlapped", 2, 3.0, 0.4), row("overlapped", 0, 5.0, 0.1), row("overlapped", 1, 2.0, None)]
    overlapped, blocking = c.results_of(rows, 0.5)
    assert (overlapped["variant"], blocking["variant"]) == ("overlapped", "blocking")
    assert overlapped["time_ratio"]["values"] == [0.5, None, 0.1]
    assert overlapped["time_ratio"]["mean"] == pytest.approx(0.3)
    assert blocking["loss_ratio"]["values"] == [2.0, None, 2.0]
    assert (overlapped["reached"], blocking["reached"]) == (3, 2)
    assert (overlapped["diverged"], blocking["diverged"]) == (1, 0)
    assert overlapped["bytes"] == {"mean": 300.0, "deviation": 0.0, "least": 300, "most": 300, "values": [300] * 3}
    without = c.results_of(rows, None)[0]
    assert without["reached"] is without["seconds_to_target"] is without["time_ratio"] is None


def test_a_cell_says_how_many_are_missing() -> None:
    from rich.console import Console

    from loscar_deploy.compare_table import print_tables

    stream = io.StringIO()
    rows = [row("overlapped", 0, 1.0, 0.25), row("overlapped", 1, None, 0.75), row("overlapped", 2, 3.0, None)]
    rows.append(row("blocking", 0, 4.0, 0.5))
    print_tables(Console(file=stream, width=120), c.results_of(rows, 0.5), 0.5)
    first, second, third = ([cell.strip() for cell in line.split("│")] for line in stream.getvalue().splitlines()[4:7])
    assert first[1:6] == ["overlapped", "2.00 ± 1.41", "2 ± 1", "0.25", "0.5000 ± 0.3536"]
    assert second[1:6] == ["", "not reached", "not reached", "none", "diverged"]
    assert third[1:6] == ["", "in 1 of 3", "in 1 of 3", "in 2 of 3", "in 1 of 3"]


@pytest.mark.parametrize("figure", ["loss", "seconds_to_target"])
def test_a_picture_says_how_many_are_missing(figure: str) -> None:
    from loscar_deploy.compare_plots import figure_by_density

    rows = [row("overlapped", 0, 1.0, 0.25), row("overlapped", 1, None, None), row("blocking", 0, 2.0, 0.5)]
    drawn = figure_by_density([(r, None) for r in rows], c.results_of(rows, 0.5), figure, "label / s")  # type: ignore[misc]
    assert drawn is not None
    (axes,) = drawn.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["1 of 2", "diverged" if figure == "loss" else "not\nreached"]
    assert axes.get_ylabel() == "label / s"
    assert [t.get_text() for t in drawn.legends[0].get_texts()] == ["overlapped", "blocking", "mean"]


def test_no_picture_of_what_no_run_has() -> None:
    from loscar_deploy.compare_plots import figure_by_density

    rows = [row("overlapped", 0, None, None)]
    assert figure_by_density([(r, None) for r in rows], c.results_of(rows, 0.5), "loss", "loss") is None  # type: ignore[misc]
