"""`loscar report`: the page, its tables and pictures, and folders that are incomplete, odd or no run folders."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from loscar_deploy import plots, report, timeline
from loscar_deploy.cli import main
from loscar_deploy.run_data import load_run, load_runs
from loscar_deploy.table import size

SIMULATE = ["simulate", "--task", "tiny_task:Tiny", "--json"]
PICTURES = {"timeline", "loss-seconds", "loss-steps", "loss-bytes", "staleness", "traffic"}
NAME = '<script>alert("1")&amp;$x^'


@pytest.fixture(autouse=True, scope="module")
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def simulate(folder: Path, *flags: str) -> Path:
    with redirect_stdout(io.StringIO()):
        assert main([*SIMULATE, *flags, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of unequal workers over a slow link: one blocks, the other has a name that is no harmless one."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--workers", "2", "--slowdown", "1,2", "--link", "rtt=200ms,rate=1mbit", "--evaluate-every", "3"]
    simulate(folder / NAME, *common, "--rounds", "9", "--target-loss", "0.05")
    simulate(folder / "blocking", *common, "--rounds", "6", "--local-steps", "10", "--overlap-steps", "0")
    return folder


@dataclass(frozen=True)
class Reported:
    """A report of both runs: its folder, and what `--json` printed."""

    folder: Path
    told: dict[str, Any]

    @property
    def page(self) -> Page:
        return Page(self.folder / "report.html")


@pytest.fixture(scope="module")
def reported(runs: Path) -> Reported:
    out = runs / "reported"
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["report", str(runs / NAME), str(runs / "blocking"), "--out", str(out), "--json"]) == 0
    return Reported(out, json.loads(printed.getvalue()))


class Page(HTMLParser):
    """What a browser would find on the page.

    Attributes:
        tables: rows of cells, as text.
        images: their PNGs.
        tags: every kind of element.
        references: whatever an attribute refers to, the pictures' data apart.
        text: all of it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.images: list[bytes] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.text = ""
        self._in_cell = False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True
        for name, value in attrs:
            if name == "src" and value is not None and value.startswith("data:image/png;base64,"):
                self.images.append(base64.b64decode(value.partition(",")[2]))
            elif name in ("src", "href", "srcset", "data", "action", "background", "style") or name.startswith("on"):
                self.references.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> dict[str, dict[str, str]]:
        """The first table with such a first heading, by row and heading."""
        return self.tables_of(first)[0]

    def tables_of(self, first: str) -> list[dict[str, dict[str, str]]]:
        found = [t for t in self.tables if t[0][0].strip() == first]
        stripped = [[[cell.strip() for cell in row] for row in table] for table in found]
        return [{row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]} for table in stripped]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def copy_of(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(reported: Reported) -> None:
    out, page = reported.folder, reported.page
    assert {p.name for p in out.iterdir()} == {"report.html", *(f"{name}.png" for name in PICTURES)}
    assert page.references == []
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert "url(" not in page.text
    assert "@import" not in page.text
    assert sorted(page.images) == sorted(p.read_bytes() for p in out.glob("*.png"))
    for image in page.images:
        assert image.startswith(b"\x89PNG")
    text = (out / "report.html").read_text()
    assert "http:" not in text
    assert "https:" not in text


def test_names_are_text_and_nothing_else(runs: Path, tmp_path: Path) -> None:
    copy_of(runs / NAME, tmp_path / NAME)
    rounds = tmp_path / NAME / "workers" / "w1.rounds.jsonl"
    rounds.rename(rounds.with_name("<img src=x>.rounds.jsonl"))
    assert main(["report", str(tmp_path / NAME), "--out", str(tmp_path / "out")]) == 0
    page = Page(tmp_path / "out" / "report.html")
    assert "script" not in page.tags
    assert page.references == []
    assert f"Report of the run {NAME}" in page.text
    assert NAME in page.table("run")
    assert "<img src=x>" in page.table("worker")


def test_the_workers_figures_are_those_of_the_folder(runs: Path, reported: Reported) -> None:
    shown = reported.page.tables_of("worker")
    assert len(shown) == 2
    for run, rows in zip((runs / NAME, runs / "blocking"), shown, strict=True):
        assert list(rows) == ["w0", "w1"]
        last = {w["name"]: w for w in lines(run / "metrics.jsonl")[-1]["workers"]}
        for name, cells in rows.items():
            result = json.loads((run / "workers" / f"{name}.json").read_text())
            rounds = [r for r in lines(run / "workers" / f"{name}.rounds.jsonl") if r["kind"] != "final"]
            stale = [r["overlap_steps"] for r in rounds]
            assert cells["steps"] == str(result["steps"])
            assert cells["rounds"] == str(len(rounds))
            assert cells["steps per round"] == f"{median(r['local_steps'] + r['overlap_steps'] for r in rounds):g}"
            assert cells["N"] == f"{median(r['local_steps'] for r in rounds):g}"
            assert (cells["staleness Q"], cells["largest Q"]) == (f"{median(stale):g}", str(max(stale)))
            assert cells["idle"] == f"{result['idle_fraction']:.1%}"
            assert cells["missed"] == str(last[name]["missed"])
            assert (cells["up"], cells["down"]) == (size(result["bytes_up"]), size(result["bytes_down"]))
            assert cells["end"] == "saw the end"
    overlapped, blocking = shown
    assert blocking["w0"]["staleness Q"] == "0"
    assert blocking["w0"]["idle"] != "0.0%"
    assert overlapped["w0"]["idle"] == "0.0%"
    assert float(overlapped["w0"]["staleness Q"]) > float(overlapped["w1"]["staleness Q"]) > 0


def test_results_and_options(runs: Path, reported: Reported) -> None:
    out, told, page = reported.folder, reported.told, reported.page
    assert told["page"] == str(out / "report.html")
    assert {Path(p).stem for p in told["figures"]} == PICTURES
    for run in told["runs"]:
        summary = json.loads((runs / run["label"] / "summary.json").read_text())
        cells = page.table("run")[run["label"]]
        assert run["path"] == str(runs / run["label"])
        assert run["simulated"] is True
        for key in ("loss", "accuracy"):
            assert run[key] == summary[key]
            assert cells["test loss" if key == "loss" else key] == f"{summary[key]:.4f}"
        assert run["rounds"] == summary["rounds"]
        assert run["seconds"] == summary["virtual_seconds"]
        assert cells["rounds"] == str(summary["rounds"])
        assert cells["run time"] == f"{summary['virtual_seconds']:.1f} s (virtual)"
        assert cells["up"] == size(sum(summary["bytes_up"]))
        assert cells["end"] == summary["stopped"]
    assert page.table("run")[NAME]["to the target"] == "0.05 not reached"
    assert page.table("run")["blocking"]["to the target"] == "–"
    assert [run["seconds_to_target"] for run in told["runs"]] == [None, None]
    options = page.table("")
    assert options["--overlap-steps"] == {"": "--overlap-steps", NAME: "auto", "blocking": "0"}
    text = (out / "report.html").read_text()
    assert "<b>--overlap-steps</b>" in text
    assert "<b>--workers</b>" not in text


def test_where_the_page_goes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself into the run's folder, of several here; what an earlier report left there is replaced."""
    run = copy_of(runs / "blocking", tmp_path / "run")
    (run / "report").mkdir()
    (run / "report" / "report.html").write_text("old")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"the report is {run / 'report' / 'report.html'}\n"
    assert "Report of the run run" in Page(run / "report" / "report.html").text
    monkeypatch.chdir(tmp_path)
    assert main(["report", "run", str(runs / "blocking")]) == 0
    assert list(Page(tmp_path / "report" / "report.html").table("run")) == ["run", "blocking"]


def test_a_run_that_was_interrupted(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of(runs / NAME, tmp_path / "run")
    for path in (run / "summary.json", run / "model.safetensors", run / "workers" / "w1.json"):
        path.unlink()
    rounds = run / "workers" / "w1.rounds.jsonl"
    kept = rounds.read_text().splitlines(keepends=True)[:4]
    rounds.write_text("".join(kept) + '{"round": 5, "ki')
    assert main(["report", str(run), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert told["stopped"] is told["loss"] is told["rounds"] is None
    assert told["seconds"] == lines(run / "workers" / "w0.rounds.jsonl")[-1]["merged_s"]
    page = Page(run / "report" / "report.html")
    cells = page.table("run")["run"]
    assert (cells["end"], cells["test loss"], cells["rounds"]) == ("did not end in order", "–", "–")
    first, second = page.table("worker").values()
    assert (first["end"], second["end"]) == ("saw the end", "did not see the end")
    assert second["rounds"] == "4"
    assert second["up"] == size(json.loads(kept[-1])["bytes_up"])


# --- refusals -----------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """(exit code, what was said); no traceback, and nothing on standard output."""
    status = main(["report", *(str(word) for word in words)])
    out, err = capsys.readouterr()
    assert out == ""
    first, hint, *rest = err.splitlines()
    assert hint.startswith("  ")
    assert rest == []
    return status, first


def test_no_run_folder(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "nowhere", tmp_path, runs / "blocking" / "summary.json"):
        said = f"loscar: {path} is no run folder: it has no config.toml"
        assert refused(capsys, path, "--out", tmp_path / "out") == (9, said)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    said = f"loscar: {tmp_path} holds several runs: give some of {tmp_path / 'runs'}, one by one"
    assert refused(capsys, tmp_path) == (9, said)


def test_the_same_run_twice(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "blocking"
    assert refused(capsys, run, run) == (3, "loscar: a run folder is given twice")


def test_an_out_that_cannot_be_written(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    status, said = refused(capsys, runs / "blocking", "--out", tmp_path / "file" / "out")
    assert (status, said) == (3, f"loscar: --out {tmp_path / 'file' / 'out'} cannot be written: Not a directory")
    status, said = refused(capsys, runs / "blocking", "--out", tmp_path / "file")
    assert (status, said) == (3, f"loscar: --out {tmp_path / 'file'} cannot be written: File exists")


def test_a_run_that_had_not_begun(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(runs / "blocking" / "config.toml", tmp_path)
    said = f"loscar: {tmp_path} holds no rounds and no losses yet: there is nothing to draw"
    assert refused(capsys, tmp_path) == (3, said)
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.toml", "task = ", "Invalid value"),
        ("config.toml", "target_loss = 'low'", "target_loss 'low' is not a number"),
        ("summary.json", "[]", "it is no JSON object"),
        ("summary.json", "{", "it is no JSON object"),
        ("metrics.jsonl", "{}\n", "line 1 has no elapsed_s"),
        ("evaluations.jsonl", "no JSON\n", "line 1 is no JSON object"),
        ("workers/w0.rounds.jsonl", '{"round": 1}\n', "line 1 has no answered_s"),
        ("workers/w0.json", "\udcff", "it is no JSON object"),
    ],
)
def test_files_that_are_damaged(
    name: str, content: str, said: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(runs / "blocking", tmp_path / "run")
    (run / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    status, first = refused(capsys, run)
    assert status == 3
    assert first.startswith(f"loscar: {run / name} cannot be read: ")
    assert said in first


def test_without_the_drawing_library(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    status, said = refused(capsys, runs / "blocking")
    assert (status, said) == (3, "loscar: this command needs matplotlib: pip install 'loscar[plots]'")


# --- what is drawn ------------------------------------------------------------------------------------------


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_labels(runs: Path, tmp_path: Path) -> None:
    """Axes have units, and every run is in the legend, whatever it is called."""
    loaded = load_runs([runs / NAME, copy_of(runs / "blocking", tmp_path / "_hidden")])
    drawn = report.draw(loaded)
    assert drawn.keys() == PICTURES
    labels = {name: [axes.get_xlabel() for axes in figure.axes][-1] for name, figure in drawn.items()}
    assert labels["timeline"] == labels["loss-seconds"] == labels["staleness"] == "virtual run time / s"
    assert labels["traffic"] == "virtual run time / s"
    assert labels["loss-steps"] == "optimizer steps (mean over workers)"
    assert labels["loss-bytes"] == "payload of all workers, up and down / kB"
    assert drawn["traffic"].axes[0].get_ylabel() == "payload of all workers,\nup and down / kB"
    assert [axes.get_title(loc="left") for axes in drawn["staleness"].axes] == [NAME, "_hidden"]
    assert legend(drawn["loss-seconds"]) == [NAME, " _hidden", "target 0.05"]
    assert legend(drawn["traffic"]) == [NAME, " _hidden"]
    assert drawn["loss-seconds"].axes[0].get_ylabel() == "test loss of the live models' average"
    assert {"computing", "waiting for the service", "merge"} <= set(legend(drawn["timeline"]))


def test_a_legend_is_as_wide_as_the_page(runs: Path, tmp_path: Path) -> None:
    names = [f"link1-density0.05-seed{seed}-overlapped" for seed in range(3)] + ["x" * 150]
    loaded = load_runs([copy_of(runs / "blocking", tmp_path / name) for name in names])
    figure = plots.loss_figure(loaded, "seconds")
    assert figure is not None
    plots.save(figure, tmp_path / "loss.png")
    box = figure.legends[0].get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert legend(figure)[:3] == names[:3]


def test_a_legend_names_what_only_a_later_panel_shows() -> None:
    figure = plots.new_figure(3.0)
    first, second = figure.subplots(1, 2)
    first.plot([0, 1], label="everywhere")
    second.plot([0, 1], label="everywhere")
    second.plot([0, 1], label="only here")
    plots.legend_above(figure)
    assert legend(figure) == ["everywhere", "only here"]


def test_long_titles_are_wrapped() -> None:
    title = "density 0.05, link rtt=600ms,jitter=20ms,rate=1mbit;wan;4g;satellite"
    assert plots.wrapped(title, 3.0).split("\n") == [
        "density 0.05, link rtt=600ms,jitter=20ms,",
        "rate=1mbit;wan;4g;satellite",
    ]
    assert plots.wrapped(title, 7.0) == title
    assert plots.wrapped("x" * 100, 3.0).split("\n") == ["x" * 44, "x" * 44, "x" * 12]


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    twins = [copy_of(runs / "blocking", tmp_path / above / "run") for above in ("a", "b")]
    assert [run.label for run in load_runs(twins)] == ["a/run", "b/run"]


def test_a_course_has_no_holes(runs: Path) -> None:
    """Computing, waiting and the final round follow each other from 0 to the last merge, and never overlap."""
    for name in ("blocking", NAME):
        run = load_run(runs / name)
        for worker, figures in zip(run.rounds, run.workers(), strict=True):
            course = timeline.course_of(run.rounds[worker])
            spans = sorted(course.computing + course.waiting + course.ending)
            assert spans[0][0] == 0
            assert spans[-1][1] == course.merges[-1]
            for (_, end), (start, _) in pairwise(spans):
                assert start == pytest.approx(end)
            idle = sum(end - start for start, end in course.waiting)
            assert figures.idle_fraction == pytest.approx(idle / course.merges[-1])
            assert bool(course.waiting) == (name == "blocking")
            assert len(course.ending) == 1


def test_workers_that_died_and_came_back(tmp_path: Path) -> None:
    """They count from 0 again; what they had done and sent before is not forgotten, nor drawn as work meanwhile."""
    flags = ["--workers", "8", "--churn", "0.1", "--churn-every", "1s", "--away", "700ms", "--rounds", "20"]
    folder = simulate(tmp_path / "run", *flags)
    run = load_run(folder)
    again = 0
    for worker, figures in zip(run.rounds, run.workers(), strict=True):
        raw = lines(folder / "workers" / f"{worker}.rounds.jsonl")
        ends = [r for r, later in zip(raw, [*raw[1:], None], strict=True) if not later or later["steps"] < r["steps"]]
        again += len(ends) - 1
        assert figures.steps == sum(r["steps"] for r in ends)
        assert figures.bytes_up == sum(r["bytes_up"] for r in ends)
        assert figures.bytes_down == sum(r["bytes_down"] for r in ends)
        course = timeline.course_of(run.rounds[worker])
        for death in ends[:-1]:
            assert not any(start < death["merged_s"] + 0.3 < end for start, end in course.computing)
    assert again > 0
    _, sent = timeline._payload(run)
    assert sent == sorted(sent)
    assert sent[-1] == run.payload_at(21) == sum(w.bytes_up + w.bytes_down for w in run.workers())
