"""Parameters on several devices: one storage for each, and the same coordinates, averages and model as on one.

torch's build for CPUs has no second device that holds values. What stands in for one here is the CPU under its other
name, cpu:0, which is another key: several storages of one dtype, with what lies between them. On real devices the same
tests run where there are some.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from processes import Processes
from torch import Tensor, nn
from torch.nn import functional

import loscar_worker as loscar
from loscar_core.selection import SelectionKind, select
from loscar_worker.model import ModelView

pytestmark = pytest.mark.timeout(150)

GPUS = torch.cuda.device_count()
CUDA = pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device beside the CPU")
TWO_CUDA = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")

DIMENSION = 8 * 12 + (8 * 16 + 16) + (16 * 8 + 8) + (8 * 12 + 12)


class Elsewhere(nn.Parameter):
    """On a device of another name. Everything else is the CPU's."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu:0")


class Spread(nn.Module):
    """Layers on two devices in turn; activations are moved between them."""

    def __init__(self, first: str, second: str, narrow: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tokens = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8, dtype=narrow), nn.Linear(8, 12)])
        self.tokens.to(first)
        for layer, device in zip(self.layers, (second, first, second), strict=True):
            layer.to("cpu" if device == "cpu:0" else device)
            if device == "cpu:0":
                for name, parameter in list(layer.named_parameters()):
                    setattr(layer, name, Elsewhere(parameter.detach()))

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.tokens(tokens.to(self.tokens.weight.device))
        for layer in self.layers:
            found = torch.tanh(layer(found.to(layer.weight.device, layer.weight.dtype)))
        return found.float()


def plain(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().to("cpu", torch.float32).reshape(-1) for p in model.parameters()]).numpy()


DEVICES = [
    ("cpu", "cpu:0"),
    pytest.param("cpu", "cuda:0", marks=CUDA),
    pytest.param("cuda:0", "cpu", marks=CUDA),
    pytest.param("cuda:0", "cuda:1", marks=TWO_CUDA),
]
rng = np.random.default_rng(0)
SELECTIONS: dict[str, np.ndarray | range | None] = {
    "all": None,
    "range": range(90, 110),  # from the first device's into the second's
    "some": np.sort(rng.choice(DIMENSION, DIMENSION // 3, replace=False)),
    "runs": select(SelectionKind.BLOCK, 1, 1, DIMENSION, DIMENSION // 2),
    "of one device": np.arange(100, 120),
    "one": np.array([DIMENSION - 1]),
}


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "second"), DEVICES)
@pytest.mark.parametrize("kind", SELECTIONS)
def test_every_coordinate_is_reached_where_it_is(kind: str, first: str, second: str, narrow: torch.dtype) -> None:
    model, whole = Spread(first, second, narrow), Spread("cpu", "cpu", narrow)
    view, other = ModelView(model), ModelView(whole)
    kinds = {(torch.device(first), torch.float32), (torch.device(second), torch.float32), (torch.device(first), narrow)}
    assert len(view.storages) == len(kinds)
    assert len(other.storages) == len({torch.float32, narrow})
    assert [(s.name, s.shape) for s in view.layout.parameters] == [(s.name, s.shape) for s in other.layout.parameters]
    assert np.array_equal(plain(model), plain(whole))

    indices = SELECTIONS[kind]
    at = np.arange(DIMENSION) if indices is None else np.array(indices)
    values = np.random.default_rng(1).normal(size=at.size).astype(np.float32)
    found = []
    for reader, module in ((view, model), (other, whole)):
        before = plain(module)
        selected = reader.select(indices)
        copied = reader.gather(selected)
        pieces = reader.prepare(selected, values)
        for piece, (number, _, _) in zip(pieces, selected.pieces, strict=True):
            assert piece.device.type == reader.storages[number].device.type
        reader.change(selected, lambda live, i, here, pieces=pieces: live * 0.5 + pieces[i][here])
        found.append(plain(module))
        assert np.array_equal(copied.values(), before[at]), "what was copied out has changed with the model"
        untouched = np.setdiff1d(np.arange(DIMENSION), at)
        assert np.array_equal(found[-1][untouched], before[untouched])
        assert np.array_equal(reader.vector(), found[-1])
    assert np.array_equal(*found)
    assert not np.array_equal(found[0][at], plain(Spread("cpu", "cpu", narrow))[at])
    view.load_vector(np.arange(DIMENSION, dtype=np.float32))
    assert np.array_equal(plain(model)[: 8 * 12 + 8 * 16 + 16], np.arange(8 * 12 + 8 * 16 + 16, dtype=np.float32)), (
        "the storages are the parameters' own memory"
    )


def train(address: str, model: nn.Module, slot: int) -> tuple[dict[str, int], np.ndarray]:
    """A loop of one's own, until the run is over."""
    generator = torch.Generator().manual_seed(slot)
    with loscar.join(address, model, name=f"w{slot}", slot=slot, connect_timeout_s=20.0) as session:
        while not session.finished:
            tokens = torch.randint(0, 12, (8,), generator=generator)
            scores = model(tokens)
            functional.cross_entropy(scores, ((tokens + 1) % 12).to(scores.device)).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
            session.step()
    return session.contributions, plain(model)


@pytest.mark.parametrize("options", [["--density", "0.2"], ["--method", "dppf", "--density", "1"]], ids=" ".join)
@pytest.mark.parametrize(("first", "second"), DEVICES)
def test_a_run_with_one_whose_model_is_in_one_place(
    first: str, second: str, options: list[str], processes: Processes
) -> None:
    """Both take part in every round, and end in one model."""
    pace = ["--local-steps", "2", "--overlap-steps", "1", "--rounds", "12"]
    server = processes.server("--workers", "2", *pace, *options)

    made = [Spread(first, second), Spread("cpu", "cpu")]
    before = plain(made[0])
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(train, server.address, model, slot) for slot, model in enumerate(made)]
        ended = [worker.result() for worker in running]
    assert [c["included"] for c, _ in ended] == [13, 13]
    assert np.array_equal(ended[0][1], ended[1][1])
    assert np.isfinite(ended[0][1]).all()
    assert np.mean(ended[0][1] != before) > 0.9
