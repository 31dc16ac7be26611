"""Who trains on which samples, and in which order.

`partition` gives each worker its share of the training set, `Batches` walks through a share for ever. Both
are functions of their seeds alone, so workers agree on disjoint shares without talking, and a run can be
repeated. They draw from NumPy's `Generator`, whose streams may change between NumPy releases: with different
releases in one run, shares may overlap, which costs a little data and breaks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loscar_core.errors import ConfigError
from loscar_worker.tasks.base import ArrayDataset, Batch

# Equal proportions in effect; beyond it the sampler overflows.
_LARGEST_ALPHA = 1e12
# Keeps the streams apart that are drawn from one seed.
_STREAM_PARTITION, _STREAM_ORDER, _STREAM_AUGMENT = range(3)


def partition(labels: NDArray[np.generic], spec: str, workers: int | None, slot: int, seed: int) -> NDArray[np.int64]:
    """The samples of worker `slot` (from 0) of `workers`: ascending int64 indices, shape (share,).

    labels: shape (n,), one per sample, of any dtype with an order. workers: None gives every worker all
    samples. seed: at least 0, the same for all workers of a run. The shares of all slots are disjoint, cover
    0..n-1, and none is empty. spec is one of

    - "iid": a random share; sizes differ by at most one.
    - "dirichlet:ALPHA": each class is divided in random proportions from a symmetric Dirichlet distribution
      with the concentration ALPHA > 0; the smaller, the more unequal in classes and in sizes. A share that
      came out empty takes one sample from the then largest, so the smallest share may be a single sample.
    - "by-label": the samples sorted by label and cut into contiguous pieces; sizes differ by at most one.

    Raises ConfigError on any other spec, a slot outside 0..workers-1, fewer samples than workers, a negative
    seed.
    """
    alpha = _parse(spec)
    if workers is not None and workers < 1:
        raise ConfigError(f"partition: {workers} workers, there must be at least 1")
    if slot < 0 or (workers is not None and slot >= workers):
        of = "" if workers is None else f" of {workers} workers"
        raise ConfigError(f"partition: there is no slot {slot}{of}; slots count from 0")
    if seed < 0:
        raise ConfigError(f"partition: the seed is {seed}, it must be at least 0")
    if workers is None:
        return np.arange(len(labels), dtype=np.int64)
    if len(labels) < workers:
        raise ConfigError(f"partition: {len(labels)} samples cannot be shared by {workers} workers")
    rng = np.random.default_rng([_STREAM_PARTITION, seed])
    if alpha is not None:
        return np.sort(_dirichlet(labels, alpha, workers, rng)[slot])
    order = rng.permutation(len(labels)) if spec == "iid" else np.argsort(labels, kind="stable")
    return np.sort(np.array_split(order, workers)[slot]).astype(np.int64)


def _parse(spec: str) -> float | None:
    """ALPHA of a Dirichlet specification, None for the others."""
    if spec in ("iid", "by-label"):
        return None
    kind, _, text = spec.partition(":")
    try:
        alpha = float(text) if kind == "dirichlet" else math.nan
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"partition {spec!r} is none of iid, by-label, dirichlet:ALPHA with a finite ALPHA > 0")
    return alpha


def _dirichlet(
    labels: NDArray[np.generic], alpha: float, workers: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    pieces: list[list[NDArray[np.int64]]] = [[] for _ in range(workers)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label).astype(np.int64))
        proportions = rng.dirichlet(np.full(workers, min(alpha, _LARGEST_ALPHA)))
        if not np.isclose(proportions.sum(), 1.0):
            # A tiny alpha underflows to zeros or NaN; its limit is one worker that has the whole class.
            proportions = np.eye(workers)[rng.integers(workers)]
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for worker, piece in enumerate(np.split(members, cuts)):
            pieces[worker].append(piece)
    shares = [np.concatenate(found) for found in pieces]
    for worker in range(workers):
        if len(shares[worker]) == 0:
            largest = max(range(workers), key=lambda w: len(shares[w]))
            shares[worker], shares[largest] = shares[largest][-1:], shares[largest][:-1]
    return shares


class Batches(Iterator[Batch]):
    """An endless iterator over one worker's batches; `next(batches)` gives (inputs, targets) on the CPU.

    Each epoch visits every one of `indices` (int64, shape (share,)) exactly once in a new random order. Its
    last batch holds what is left and may be smaller; with `drop_last` it is left out instead (other samples
    each epoch), unless the share is smaller than one batch: then every batch is the whole share. Default:
    keep it.

    Order and augmentation are functions of (seed, slot, incarnation, epoch, position) and nothing else, each
    at least 0; `incarnation` counts the restarts of a worker, so that one that comes back does not repeat
    itself. Hence the position alone is the state: an iterator that was restored continues with the same
    batches.

    Raises ConfigError on an empty share, an index outside the data set, a batch size below 1, a negative
    seed.
    """

    def __init__(
        self,
        dataset: ArrayDataset,
        indices: NDArray[np.int64],
        batch_size: int,
        *,
        seed: int,
        slot: int = 0,
        incarnation: int = 0,
        drop_last: bool = False,
    ) -> None:
        if len(indices) == 0:
            raise ConfigError("a worker without samples cannot train")
        if indices.min() < 0 or indices.max() >= len(dataset):
            raise ConfigError(f"sample indices must lie in 0..{len(dataset) - 1}")
        if batch_size < 1:
            raise ConfigError(f"the batch size is {batch_size}, it must be at least 1")
        if min(seed, slot, incarnation) < 0:
            raise ConfigError(f"seed {seed}, slot {slot} and incarnation {incarnation} must be at least 0")
        self.dataset = dataset
        self.batch_size = batch_size
        self._indices = np.asarray(indices, np.int64)
        self._identity = (seed, slot, incarnation)
        size = len(indices)
        # Where an epoch ends: after all samples, or after the last whole batch.
        self._end = size - size % batch_size if drop_last and size >= batch_size else size
        self._epoch = 0
        self._position = 0
        self._generator = torch.Generator() if dataset.random else None
        self._start_epoch()

    def _start_epoch(self) -> None:
        key = [*self._identity, self._epoch]
        order = np.random.default_rng([_STREAM_ORDER, *key]).permutation(self._indices)
        # One tensor per epoch, of which each step takes a slice: a step of a small model lasts 100
        # microseconds.
        self._order: Tensor = torch.from_numpy(order)
        self._augment_seed = int(np.random.SeedSequence([_STREAM_AUGMENT, *key]).generate_state(1)[0])

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self._position >= self._end:
            self._epoch += 1
            self._position = 0
            self._start_epoch()
        start = self._position
        self._position = min(start + self.batch_size, self._end)
        if self._generator is not None:
            # The seed of torch's generator counts with 32 bits only.
            self._generator.manual_seed((self._augment_seed + start) & 0xFFFFFFFF)
        return self.dataset.take(self._order[start : self._position], self._generator)

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0, that the latest batch belonged to."""
        return self._epoch

    @property
    def batches_per_epoch(self) -> int:
        return -(-self._end // self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """Everything needed to resume, as integers: who it is for, and how far it has come."""
        seed, slot, incarnation = self._identity
        return {
            "seed": seed,
            "slot": slot,
            "incarnation": incarnation,
            "samples": len(self._indices),
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where the iterator that gave `state` was; it must have had the same share and seeds.

        Raises ConfigError when a key is missing, the state is another worker's or share's, or out of range.
        """
        for key, own in self.state_dict().items():
            if key not in state:
                raise ConfigError(f"the state of the batches lacks {key!r}")
            if key not in ("epoch", "position") and state[key] != own:
                raise ConfigError(f"the state of the batches is for {key} {state[key]}, this is {key} {own}")
        if state["epoch"] < 0 or not 0 <= state["position"] <= len(self._indices):
            raise ConfigError(f"epoch {state['epoch']}, position {state['position']} is not a position")
        self._epoch, self._position = state["epoch"], state["position"]
        self._start_epoch()
