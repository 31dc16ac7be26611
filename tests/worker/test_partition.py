from __future__ import annotations

import json
import timeit
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loscar_core.errors import ConfigError
from loscar_worker.tasks import ArrayDataset
from loscar_worker.tasks.images import ImageTransform
from loscar_worker.tasks.partition import Batches, partition

SPECS = st.one_of(
    st.sampled_from(["iid", "by-label", "dirichlet:0.1", "dirichlet:1e-300", "dirichlet:1e300"]),
    st.floats(1e-3, 1e3).map(lambda alpha: f"dirichlet:{alpha!r}"),
)
LABELS = st.lists(st.integers(-3, 6), min_size=1, max_size=80).map(np.array)


@given(labels=LABELS, spec=SPECS, workers=st.integers(1, 12), seed=st.integers(0, 2**70))
@settings(max_examples=200, deadline=None)
def test_shares_are_disjoint_not_empty_and_cover_the_set(
    labels: NDArray[np.int64], spec: str, workers: int, seed: int
) -> None:
    workers = min(workers, len(labels))
    shares = [partition(labels, spec, workers, slot, seed) for slot in range(workers)]
    assert all(share.dtype == np.int64 and len(share) > 0 for share in shares)
    assert all(bool((np.diff(share) > 0).all()) for share in shares)
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(labels)))
    if not spec.startswith("dirichlet"):
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    if spec == "by-label":
        for before, after in pairwise(shares):
            assert labels[before].max() <= labels[after].min()


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.5"])
def test_the_seed_decides(spec: str) -> None:
    labels = np.arange(1000) % 10
    first, again, other = (partition(labels, spec, 4, 2, seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_smaller_alpha_is_more_unequal() -> None:
    labels = np.arange(5000) % 10

    def mean_largest_class(spec: str) -> float:
        shares = [partition(labels, spec, 5, slot, 0) for slot in range(5)]
        return float(np.mean([np.bincount(labels[share]).max() / len(share) for share in shares]))

    skews = [mean_largest_class(f"dirichlet:{alpha}") for alpha in (0.05, 0.5, 1000.0)]
    assert skews[0] > skews[1] > skews[2]
    assert skews[0] > 0.35
    assert skews[2] < 0.15
    assert mean_largest_class("iid") < 0.15
    assert mean_largest_class("by-label") == 0.5


def test_extreme_alphas_reach_their_limits() -> None:
    labels = np.zeros(100, np.int64)
    tiny = sorted(len(partition(labels, "dirichlet:1e-300", 4, slot, 1)) for slot in range(4))
    assert tiny == [1, 1, 1, 97]
    assert [len(partition(labels, "dirichlet:1e308", 4, slot, 1)) for slot in range(4)] == [25] * 4


def test_without_workers_everybody_has_everything() -> None:
    labels = np.array([1.0, 0.0, 1.0], np.float32)
    for spec in ("iid", "by-label", "dirichlet:1"):
        assert partition(labels, spec, None, 17, 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("spec", "workers", "slot", "seed", "reason"),
    [
        ("", 2, 0, 0, "none of iid, by-label"),
        ("IID", 2, 0, 0, "'IID'"),
        ("dirichlet", 2, 0, 0, "dirichlet:ALPHA"),
        ("dirichlet:", 2, 0, 0, "dirichlet:ALPHA"),
        ("dirichlet:x", 2, 0, 0, "dirichlet:ALPHA"),
        ("dirichlet:0", 2, 0, 0, "> 0"),
        ("dirichlet:-1", 2, 0, 0, "> 0"),
        ("dirichlet:nan", 2, 0, 0, "finite"),
        ("dirichlet:inf", None, 0, 0, "finite"),
        ("iid:3", 2, 0, 0, "'iid:3'"),
        ("iid", 2, 2, 0, "no slot 2 of 2 workers"),
        ("iid", 2, -1, 0, "no slot -1"),
        ("iid", None, -1, 0, "no slot -1"),
        ("iid", 0, 0, 0, "at least 1"),
        ("iid", 2, 0, -1, "seed is -1"),
        ("iid", 11, 0, 0, "10 samples cannot be shared by 11 workers"),
    ],
)
def test_bad_arguments(spec: str, workers: int | None, slot: int, seed: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        partition(np.zeros(10, np.int64), spec, workers, slot, seed)


def numbers(n: int) -> ArrayDataset:
    """Samples that are their own index."""
    return ArrayDataset(torch.arange(n), torch.arange(n))


@given(
    share=st.sets(st.integers(0, 59), min_size=1, max_size=60),
    size=st.integers(1, 70),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=100, deadline=None)
def test_every_sample_once_an_epoch(share: set[int], size: int, drop_last: bool, seed: int) -> None:
    batches = Batches(numbers(60), np.array(sorted(share)), size, seed=seed, drop_last=drop_last)
    for epoch in range(3):
        drawn = [next(batches)[0] for _ in range(batches.batches_per_epoch)]
        assert batches.epoch == epoch
        seen = torch.cat(drawn).tolist()
        assert len(set(seen)) == len(seen)
        assert all(len(batch) == min(size, len(share)) for batch in drawn[:-1])
        if drop_last and len(share) >= size:
            assert all(len(batch) == size for batch in drawn)
            assert len(share) - len(seen) < size
            assert set(seen) <= share
        else:
            assert set(seen) == share


@given(steps=st.integers(0, 40), size=st.integers(1, 12), drop_last=st.booleans())
@settings(max_examples=60, deadline=None)
def test_resuming_is_exact(steps: int, size: int, drop_last: bool) -> None:
    def make() -> Batches:
        return Batches(numbers(50), np.arange(3, 40), size, seed=5, slot=1, incarnation=2, drop_last=drop_last)

    batches, resumed = make(), make()
    for _ in range(steps):
        next(batches)
    resumed.load_state_dict(json.loads(json.dumps(batches.state_dict())))
    assert resumed.epoch == batches.epoch
    for _ in range(12):
        assert torch.equal(next(batches)[0], next(resumed)[0])
    assert resumed.state_dict() == batches.state_dict()


def test_augmentation_is_reproducible_and_resumed() -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    transform = ImageTransform((0.5,) * 3, (0.2,) * 3, pad=2, flip=True)
    data = ArrayDataset(images, torch.arange(20), transform, random=True)
    first, again = (Batches(data, np.arange(20), 6, seed=1) for _ in range(2))
    before = torch.get_rng_state()
    drawn = [next(first) for _ in range(8)]
    torch.manual_seed(99)
    for inputs, targets in drawn[:5]:
        other = next(again)
        assert torch.equal(inputs, other[0])
        assert torch.equal(targets, other[1])
    resumed = Batches(data, np.arange(20), 6, seed=1)
    resumed.load_state_dict(again.state_dict())
    for inputs, _ in drawn[5:]:
        assert torch.equal(inputs, next(resumed)[0])
    torch.set_rng_state(before)
    # One sample in two epochs is cropped and mirrored differently.
    versions = {inputs[targets == 7].numpy().tobytes() for inputs, targets in drawn[:8] if 7 in targets}
    assert len(versions) == 2


def test_seed_slot_and_incarnation_each_matter() -> None:
    def order(seed: int, slot: int, incarnation: int) -> list[int]:
        batches = Batches(numbers(40), np.arange(40), 40, seed=seed, slot=slot, incarnation=incarnation)
        found: list[int] = next(batches)[0].tolist()
        return found

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
    assert len({tuple(order(*key)) for key in keys}) == len(keys)
    assert order(1, 1, 0) == order(1, 1, 0)
    batches = Batches(numbers(40), np.arange(40), 40, seed=0)
    assert next(batches)[0].tolist() != next(batches)[0].tolist()
    assert iter(batches) is batches


def test_states_of_others_are_refused() -> None:
    def make(**changed: int) -> Batches:
        return Batches(numbers(20), np.arange(changed.pop("n", 20)), 4, **{"seed": 0, **changed})

    state = make().state_dict()
    for other, key in ((make(seed=1), "seed"), (make(slot=1), "slot"), (make(incarnation=1), "incarnation")):
        with pytest.raises(ConfigError, match=key):
            other.load_state_dict(state)
    with pytest.raises(ConfigError, match="samples 20, this is samples 10"):
        make(n=10).load_state_dict(state)
    for broken in ({"position": 21}, {"position": -1}, {"epoch": -1}):
        with pytest.raises(ConfigError, match="not a position"):
            make().load_state_dict({**state, **broken})
    with pytest.raises(ConfigError, match="lacks 'epoch'"):
        make().load_state_dict({key: value for key, value in state.items() if key != "epoch"})


@pytest.mark.parametrize(
    ("indices", "size", "seed", "reason"),
    [
        ([], 1, 0, "without samples"),
        ([0, 5], 1, 0, r"0\.\.4"),
        ([-1], 1, 0, r"0\.\.4"),
        ([0], 0, 0, "batch size is 0"),
        ([0], 1, -1, "seed -1"),
    ],
)
def test_bad_batches(indices: list[int], size: int, seed: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Batches(numbers(5), np.array(indices, np.int64), size, seed=seed)


def test_a_batch_is_cheap_beside_a_small_step() -> None:
    data = ArrayDataset(torch.zeros(1500, 64), torch.zeros(1500, dtype=torch.int64))
    batches = Batches(data, np.arange(1500), 16, seed=0)
    # Best of several: the machine may be busy. Some 7 us when it is not, against 100 us and more for a step.
    assert min(timeit.repeat(lambda: next(batches), number=300, repeat=10)) / 300 < 60e-6
