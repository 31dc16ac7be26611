"""The valley around an average: its width where it is known, and the command on a real run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from loscar_core.errors import ConfigError, DataMissingError
from loscar_deploy.cli import main
from loscar_deploy.valley import Landscape, draw
from loscar_worker.tasks.base import ArrayDataset, Task


class Bowl(Task):
    """f(x) = 1 + Σ h x²: the loss doubles at distance 1/√h along an axis."""

    curvatures = torch.tensor([1.0, 4.0, 0.0])

    def __init__(self) -> None:
        data = ArrayDataset(torch.zeros(10, 1), torch.zeros(10, dtype=torch.int64))
        super().__init__("bowl", data, data, batch_size=1, lr=0.1)

    def build_model(self) -> nn.Module:
        class Point(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.x = nn.Parameter(torch.zeros(3))

            def forward(self, inputs: Tensor) -> Tensor:
                return (1 + (Bowl.curvatures * self.x**2).sum()).expand(len(inputs))

        return Point()

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()


def landscape(folder: Path, *places: tuple[float, float, float]) -> Landscape:
    models = []
    for i, place in enumerate(places):
        models.append(folder / f"w{i}.safetensors")
        save_file({"x": np.array(place, np.float32)}, models[-1])
    save_file({"x": np.mean(places, axis=0).astype(np.float32)}, folder / "model.safetensors")
    return Landscape.load(Bowl(), folder / "model.safetensors", models)


@pytest.mark.parametrize("distance", [0.01, 0.7, 30.0])
def test_the_width_is_where_the_loss_has_doubled(tmp_path: Path, distance: float) -> None:
    """However far the workers are themselves."""
    found = landscape(tmp_path, (distance, 0, 0), (-distance, 0, 0), (0, distance, 0), (0, -distance, 0)).valley()
    assert found.training_loss == pytest.approx(1.0)
    assert found.distances == pytest.approx([distance] * 4)
    assert found.widths == pytest.approx([1.0, 1.0, 0.5, 0.5], rel=2e-3)
    assert found.mean_width == pytest.approx(0.75, rel=2e-3)
    assert found.sharpness == pytest.approx(1 / 0.75, rel=2e-3)


def test_directions_without_a_wall_and_workers_at_the_average_have_no_width(tmp_path: Path) -> None:
    found = landscape(tmp_path, (0, 0, 1), (0, 0, -1), (0, 0, 0)).valley()
    assert found.widths == [None, None, None]
    assert found.mean_width is None
    assert found.sharpness is None


def test_the_plane_goes_through_the_three(tmp_path: Path) -> None:
    ground = landscape(tmp_path, (1, 0, 0), (0, 1, 0), (-1, -1, 0))
    surface = ground.surface(0, 1)
    for (x, y), place in zip(surface.places, (ground.average, *ground.places[:2]), strict=True):
        assert np.hypot(x, y) == pytest.approx(float(np.linalg.norm(place - ground.average)))
    # The grid's values are those of the bowl: here the two axes are its own.
    expected = 1 + surface.xs[None, :] ** 2 + 4 * surface.ys[:, None] ** 2
    np.testing.assert_allclose(surface.losses, expected, rtol=1e-4)
    draw(surface, tmp_path / "surface.png")
    assert (tmp_path / "surface.png").read_bytes().startswith(b"\x89PNG")


def test_what_spans_no_plane_is_refused(tmp_path: Path) -> None:
    ground = landscape(tmp_path, (1, 0, 0), (-1, 0, 0))
    with pytest.raises(ConfigError, match="on a line"):
        ground.surface(0, 1)
    for pair in ((0, 0), (0, 2), (-1, 0)):
        with pytest.raises(ConfigError, match="two of the 2 workers"):
            ground.surface(*pair)
    with pytest.raises(DataMissingError, match="--keep-models"):
        Landscape.load(Bowl(), tmp_path / "model.safetensors", [])
    save_file({"y": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="not a model of this task"):
        Landscape.load(Bowl(), tmp_path / "model.safetensors", [tmp_path / "other.safetensors"])


def test_a_run_that_keeps_its_models_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes; the kept models are those before the final round, at the distance that DPPF holds."""
    out = tmp_path / "run"
    flags = ["--method", "dppf:alpha=0.5,lambda=1", "--rounds", "12", "--local-steps", "2", "--workers", "2"]
    flags += ["--slowdown", "1", "--step-time", "0s", "--link", "none", "--keep-models", "--out", str(out)]
    flags += ["--overlap-steps", "0"]  # or a slow machine's workers would take more steps apart from each other
    assert main(["run", *flags, "--json", "--log-level", "warning"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["valley_width"] == pytest.approx(2.0, rel=0.2)
    assert main(["evaluate", str(out), "--sharpness", "--surface", str(tmp_path / "s.svg"), "--json"]) == 3
    assert "on a line" in capsys.readouterr().err  # two workers and their average are
    assert main(["evaluate", str(out), "--sharpness", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == summary["accuracy"]
    assert found["distances"] == pytest.approx([summary["valley_width"]] * 2, rel=0.3)
    assert found["mean_valley"] > 0
    assert found["sharpness"] == pytest.approx(1 / found["mean_valley"])
    assert main(["evaluate", str(out), "--sharpness"]) == 0
    assert "mean valley" in capsys.readouterr().out
    assert main(["evaluate", str(out / "model.safetensors"), "--task", "digits", "--sharpness"]) == 3
    assert "need a run folder" in capsys.readouterr().err
