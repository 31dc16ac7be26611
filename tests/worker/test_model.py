"""A module as one vector, against plain torch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from loscar_core.errors import ConfigError, ModelChangedError
from loscar_core.selection import SelectionKind, select
from loscar_worker import model
from loscar_worker.model import ModelView


class Mixed(nn.Module):
    """Two dtypes in turn, a scalar, a frozen parameter, a tied one, statistics, and a parameter out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.narrow = nn.Linear(4, 5, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.norm = nn.BatchNorm1d(5)
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.first.weight
        self.empty = nn.Parameter(torch.empty(0))
        self.register_buffer("counter", torch.zeros(3))


def plain_vector(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().reshape(-1) for p in module.parameters() if p.requires_grad])


@pytest.fixture
def module() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


def test_the_layout_is_what_torch_names(module: Mixed) -> None:
    view = ModelView(module)
    named = [(n, tuple(p.shape)) for n, p in module.named_parameters() if p.requires_grad]
    assert [(s.name, s.shape) for s in view.layout.parameters] == named
    assert "frozen" not in dict(named)
    assert "tied.weight" not in dict(named)
    assert [s.dtype for s in view.layout.parameters if s.name.startswith("narrow")] == ["bfloat16", "bfloat16"]
    assert [s.name for s in view.layout.statistics] == ["norm.running_mean", "norm.running_var"]
    assert view.layout.dimension == plain_vector(module).numel()
    assert len(view.storages) == 2


def test_taking_a_module_over_changes_no_value(module: Mixed) -> None:
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    view = ModelView(module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert module.tied.weight is module.first.weight
    # The optimizer that was made before still moves what the view reads.
    module.scale.grad = torch.tensor(1.0)
    optimizer.step()
    assert np.array_equal(view.vector(), plain_vector(module).numpy())
    assert module.scale.item() == 1.5


@pytest.mark.parametrize("count", [1, 5, 30, None])
def test_gather_and_scatter(module: Mixed, count: int | None) -> None:
    view = ModelView(module)
    dimension = view.layout.dimension
    rng = np.random.default_rng(1)
    indices = None if count is None else np.sort(rng.choice(dimension, count, replace=False)).astype(np.int64)
    selected = view.select(indices)
    where = slice(None) if indices is None else torch.from_numpy(indices)
    expected = plain_vector(module)
    assert np.array_equal(view.gather(selected).values(), expected[where].numpy())

    values = rng.normal(size=dimension if count is None else count).astype(np.float32)
    view.write(selected, view.prepare(selected, values))
    expected[where] = torch.from_numpy(values)
    # Rounded once, on store.
    starts = np.cumsum([0, *(s.size for s in view.layout.parameters)])
    for segment, start in zip(view.layout.parameters, starts, strict=False):
        if segment.dtype == "bfloat16":
            part = slice(start, start + segment.size)
            expected[part] = expected[part].bfloat16().float()
    assert torch.equal(plain_vector(module), expected)
    assert np.array_equal(view.vector(), expected.numpy())
    pieces = view.read(selected)
    assert sum(p.numel() for p in pieces) == values.size
    assert all(p.dtype is torch.float32 for p in pieces)


def test_one_storage_is_the_module_s_memory() -> None:
    module = nn.Linear(4, 2)
    view = ModelView(module)
    with torch.no_grad():
        module.weight[1, 3] = 7.0
    assert view.vector()[7] == 7.0
    view.load_vector(np.arange(10, dtype=np.float32))
    assert module.bias.tolist() == [8.0, 9.0]
    copy_of = view.gather(view.select(None)).values()
    view.load_vector(np.zeros(10, np.float32))
    assert copy_of[9] == 9.0, "a snapshot is a copy"


def test_statistics(module: Mixed) -> None:
    view = ModelView(module, ["counter"])
    names = [s.name for s in view.layout.statistics]
    assert names == ["counter", "norm.running_mean", "norm.running_var"]
    view.load_statistics(np.arange(13, dtype=np.float32))
    assert module.get_buffer("counter").tolist() == [0, 1, 2]
    assert module.norm.running_var is not None
    assert module.norm.running_var.tolist() == [8, 9, 10, 11, 12]
    # Some modules assign their buffers anew instead of writing into them.
    module.counter = torch.tensor([5.0, 5.0, 5.0])
    assert view.statistics()[:3].tolist() == [5, 5, 5]
    view.load_statistics(np.zeros(13, np.float32))
    assert module.get_buffer("counter").tolist() == [0, 0, 0]


def test_a_model_without_statistics() -> None:
    view = ModelView(nn.Linear(2, 2))
    assert view.statistics().size == 0
    view.load_statistics(np.empty(0, np.float32))


def test_the_checksum_covers_what_never_travels(module: Mixed) -> None:
    def checksum(change: str = "") -> int:
        other = copy.deepcopy(module)
        with torch.no_grad():
            for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
                if name == change:
                    tensor += 1
        return ModelView(other).layout.frozen_checksum

    for same in ("first.weight", "narrow.bias", "norm.running_mean", "norm.num_batches_tracked"):
        assert checksum(same) == checksum()
    for other in ("frozen", "counter"):
        assert checksum(other) != checksum()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.narrow.float(),
        lambda m: m.first.half(),
        lambda m: m.double(),
        lambda m: setattr(m.scale, "data", torch.tensor(1.0)),
    ],
)
def test_a_model_that_left_is_noticed(module: Mixed, change: object) -> None:
    assert callable(change)
    view = ModelView(module)
    module.to("cpu")
    view.check_unchanged()
    change(module)
    with pytest.raises(ModelChangedError, match="was moved or cast after joining"):
        view.gather(view.select(np.array([0])))
    with pytest.raises(ModelChangedError):
        view.read(view.select(np.array([0])))


def test_models_that_cannot_be_averaged() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        ModelView(frozen)
    with pytest.raises(ConfigError, match="complex64"):
        ModelView(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match="no buffer 'nothing'"):
        ModelView(nn.Linear(2, 2), ["nothing"])
    counted = nn.BatchNorm1d(2)
    with pytest.raises(ConfigError, match="num_batches_tracked has dtype"):
        ModelView(counted, ["num_batches_tracked"])


# --- in passes, rows and ranges: the same values as one by one ----------------------------------------------


def selections(dimension: int) -> list[tuple[str, np.ndarray | range | None]]:
    rng = np.random.default_rng(0)
    some = np.sort(rng.choice(dimension, dimension // 3, replace=False))
    runs = [select(SelectionKind.BLOCK, 1, r, dimension, dimension // 4) for r in range(1, 30)]
    last = next(r for r in runs if r[-1] == dimension - 1)  # with the model's last, short run
    inner = next(r for r in runs if r[-1] != dimension - 1)
    torn = np.delete(inner, 70)
    shifted = inner + 1
    return [
        ("all", None),
        ("range", range(5, dimension - 3)),
        ("some", some),
        ("runs", inner),
        ("short run", last),
        ("torn run", torn),
        ("shifted runs", shifted),
        ("one", np.array([dimension - 1])),
    ]


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("kind", [name for name, _ in selections(1000)])
def test_every_way_to_reach_coordinates_reaches_the_same(
    dtypes: tuple[torch.dtype, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "PASS", 2 * model.RUN)
    torch.manual_seed(0)
    module = nn.Module()
    share = 1000 // len(dtypes)
    for i, dtype in enumerate(dtypes):
        module.register_parameter(f"w{i}", nn.Parameter(torch.randn(share, dtype=dtype)))
    view = ModelView(module)
    indices = dict(selections(1000))[kind]
    at = np.arange(1000) if indices is None else np.array(indices)
    plain = plain_vector(module).numpy()
    selected = view.select(indices)
    if len(dtypes) == 1 and kind in ("runs", "short run"):
        assert isinstance(selected.pieces[0][1], model.Runs), "it is not copied by rows"
    else:
        assert not any(isinstance(where, model.Runs) for _, where, _ in selected.pieces)
    assert selected.size == at.size
    assert np.array_equal(view.gather(selected).values(), plain[at])
    copied = view.gather(selected)
    values = np.random.default_rng(1).normal(size=at.size).astype(np.float32)
    pieces = view.prepare(selected, values)
    parts: list[int] = []

    def added(live: Tensor, piece: int, here: slice) -> Tensor:
        parts.append(live.numel())
        return live + pieces[piece][here]

    view.change(selected, added)
    expected = plain.copy()
    for start, dtype in zip(range(0, 1000, share), dtypes, strict=True):
        own = (at >= start) & (at < start + share)
        new = torch.from_numpy(plain[at[own]] + values[own]).to(dtype).float()
        expected[at[own]] = new.numpy()
    assert np.array_equal(view.vector(), expected)
    assert sum(parts) == at.size
    assert max(parts) <= model.PASS
    assert np.array_equal(copied.values(), plain[at]), "what was copied out has changed with the model"
    view.write(selected, view.prepare(selected, plain[at]))
    assert np.array_equal(view.vector(), plain)


def test_ranges_of_several_storages_are_ranges_of_each_and_remembered(module: Mixed) -> None:
    """A round that may choose anything opens on all of the model: that must cost no pass over it each time."""
    view = ModelView(module)
    size = view.layout.dimension
    whole = plain_vector(module).numpy()
    for start in range(0, size, 3):
        for stop in range(start + 1, size + 1, 5):
            selected = view.select(range(start, stop))
            assert all(isinstance(where, slice) for _, where, _ in selected.pieces)
            assert view.gather(selected).values().tolist() == whole[start:stop].tolist()
            by_index = view.select(np.arange(start, stop))
            assert view.gather(by_index).values().tolist() == whole[start:stop].tolist()
    assert view.select(None) is view.select(range(size))
    changed = np.arange(size, dtype=np.float32)
    view.load_vector(changed)
    assert view.vector().tolist() == changed.tolist()
    assert len(view._ranges) <= model.MOST_RANGES
