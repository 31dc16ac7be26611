"""How wide the valley is that a run's average lies in: Inverse Mean Valley, and a picture of the loss around it.

DPPF's paper (arXiv 2507.20424) relates the width of a minimum to how well it generalises; the measure is reconstructed.
From the average x_A of the workers' last models go along each worker's direction, (x_i − x_A)/‖x_i − x_A‖, to where the
training loss is κ times that of x_A (κ = 2; the distance is doubled until it is too far, then bisected). The mean of
these distances is the valley's width, its inverse the *sharpness*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import nn

from loscar_core.errors import ConfigError, DataMissingError
from loscar_deploy.model_file import load_model
from loscar_worker.model import ModelView
from loscar_worker.tasks.base import Task

KAPPA = 2.0
DOUBLINGS = 40
ACCURACY = 1e-3
GRID = 25
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Valley:
    """What was found.

    Attributes:
        training_loss: f(x_A).
        distances: ‖x_i − x_A‖, one for each worker.
        widths: to where the loss is κ f(x_A) in each worker's direction; None when it never is.
        mean_width: of those that are; None without any.
        sharpness: 1/mean_width.
    """

    training_loss: float
    distances: list[float]
    widths: list[float | None]
    mean_width: float | None
    sharpness: float | None


class Landscape:
    """The training loss as a function of the trained parameters.

    Args:
        task: whose training data.
        model: one of its modules; the statistics of its normalisation layers are the averaged ones.
        places: the workers' parameters, d float32 each; `average` is their mean.
    """

    def __init__(self, task: Task, model: nn.Module, places: Sequence[Vector]) -> None:
        self._task = task
        self._model = model
        self._view = ModelView(model)
        self.places = list(places)
        self.average: Vector = np.mean(np.stack(self.places, dtype=np.float64), axis=0).astype(np.float32)

    @classmethod
    def load(cls, task: Task, path: Path, workers: Sequence[Path]) -> Self:
        """Of a run.

        Args:
            task: the run's.
            path: its averaged model.
            workers: the workers' last models.

        Raises:
            DataMissingError: a model is not there.
            ConfigError: a model is not of this task.
        """
        if not workers:
            raise DataMissingError("the run folder has no workers' models: run with --keep-models")
        model = task.make_model(0)
        names = [segment.name for segment in ModelView(model).layout.parameters]
        load_model(path, model)
        places = []
        for worker in workers:
            tensors = load_file(worker)
            if any(name not in tensors for name in names):
                raise ConfigError(f"{worker} is not a model of this task")
            places.append(np.concatenate([tensors[name].reshape(-1) for name in names]).astype(np.float32))
        return cls(task, model, places)

    @torch.no_grad()
    def loss(self, place: Vector) -> float:
        """The mean training loss there, without penalties; infinite where it is not a number."""
        task, model = self._task, self._model
        self._view.load_vector(place)
        model.eval()
        total, count = 0.0, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # where samples are augmented at random: the same way at every place
            for inputs, targets in task.train.chunks(task.evaluation_chunk):
                total += float(task.criterion(model(inputs), targets)) * targets.numel()
                count += targets.numel()
        return total / count if np.isfinite(total) else float("inf")

    def valley(self, kappa: float = KAPPA) -> Valley:
        """Inverse Mean Valley; see the module."""
        bottom = self.loss(self.average)
        directions = [p - self.average for p in self.places]
        distances = [float(np.linalg.norm(d)) for d in directions]
        widths = [
            self._width(d / np.float32(r), r, kappa * bottom) if r > 0 else None
            for d, r in zip(directions, distances, strict=True)
        ]
        known = [w for w in widths if w is not None]
        mean = sum(known) / len(known) if known else None
        return Valley(bottom, distances, widths, mean, 1 / mean if mean else None)

    def _width(self, direction: Vector, start: float, level: float) -> float | None:
        """The distance along a unit direction at which the loss has risen to `level`; None when it never does."""
        near, far = 0.0, start
        for _ in range(DOUBLINGS):
            if self.loss(self.average + np.float32(far) * direction) >= level:
                break
            near, far = far, 2 * far
        else:
            return None
        while far - near > ACCURACY * far:
            middle = (near + far) / 2
            if self.loss(self.average + np.float32(middle) * direction) >= level:
                far = middle
            else:
                near = middle
        return (near + far) / 2

    def surface(self, first: int, second: int) -> Surface:
        """The loss on the plane through the average and two workers.

        Raises:
            ConfigError: there are no such two workers, or the three are on a line.
        """
        if not (0 <= first < len(self.places) and 0 <= second < len(self.places)) or first == second:
            raise ConfigError(f"--surface {first},{second}: two of the {len(self.places)} workers, counted from 0")
        to_first, to_second = (self.places[i] - self.average for i in (first, second))
        along = to_first / np.float32(max(float(np.linalg.norm(to_first)), 1e-30))
        across = to_second - np.float32(float(along @ to_second)) * along
        height = float(np.linalg.norm(across))
        if height < 1e-6 * max(float(np.linalg.norm(to_second)), 1e-30):
            raise ConfigError("the average and the two workers are on a line: there is no plane through them")
        across = across / np.float32(height)
        places = np.array([(0.0, 0.0), *((float(along @ v), float(across @ v)) for v in (to_first, to_second))])
        low, high = places.min(axis=0), places.max(axis=0)
        margin = 0.6 * float((high - low).max())
        xs, ys = (np.linspace(low[i] - margin, high[i] + margin, GRID) for i in (0, 1))
        losses = np.array(
            [[self.loss((self.average + x * along + y * across).astype(np.float32)) for x in xs] for y in ys]
        )
        return Surface(xs, ys, losses, places, (first, second))


@dataclass(frozen=True, slots=True)
class Surface:
    """The training loss on a plane; distances are those of the parameters.

    Attributes:
        xs, ys: the grid's coordinates.
        losses: (ys, xs).
        places: of the average and of the two workers, (3, 2).
        workers: their numbers.
    """

    xs: NDArray[np.float64]
    ys: NDArray[np.float64]
    losses: NDArray[np.float64]
    places: NDArray[np.float64]
    workers: tuple[int, int]


def draw(surface: Surface, path: Path) -> None:
    """Write the picture, as what the file's name ends with. Raises ConfigError without matplotlib, OSError."""
    from loscar_deploy.plots import BLACK, DPI, require_matplotlib

    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    finite = surface.losses[np.isfinite(surface.losses)]
    # Most of the plane is far up the walls: levels by rank show the valley as well.
    levels = np.unique(np.quantile(finite, np.linspace(0, 1, 13)))
    filled = axes.contourf(surface.xs, surface.ys, surface.losses, levels=levels, cmap="cividis_r")
    axes.contour(surface.xs, surface.ys, surface.losses, levels=levels, colors="white", linewidths=0.4)
    figure.colorbar(filled, ax=axes, label="training loss", format="%.3g")
    names = ("average", *(f"worker {i}" for i in surface.workers))
    for (x, y), name, marker in zip(surface.places, names, ("*", "o", "s"), strict=True):
        axes.plot(x, y, marker, color="white", markeredgecolor=BLACK, markersize=13 if marker == "*" else 9)
        axes.annotate(
            name,
            (x, y),
            textcoords="offset points",
            xytext=(9, 7),
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
    axes.set_xlabel("distance in parameters, towards the first worker")
    axes.set_ylabel("distance in parameters, across")
    axes.set_aspect("equal")
    figure.savefig(path)


def figures(valley: Valley) -> dict[str, Any]:
    """What `loscar evaluate --sharpness --json` adds."""
    return {
        "training_loss": valley.training_loss,
        "mean_valley": valley.mean_width,
        "sharpness": valley.sharpness,
        "valleys": valley.widths,
        "distances": valley.distances,
    }
