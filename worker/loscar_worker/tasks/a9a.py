"""`a9a`: logistic regression on LIBSVM's a9a (UCI Adult), a convex problem with a known optimum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from loscar_worker.tasks.base import ArrayDataset, Task
from loscar_worker.tasks.files import corrupt, read_bytes, require_file, resolve_data_dir

FEATURES = 123
SOURCE = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"


class A9a(Task):
    """Logistic regression, 123 weights and a bias, on 32,561 training and 16,281 test rows.

    Reads `a9a` and `a9a.t` from the data folder; inputs float32 (123,), targets float32 0 or 1. The training
    loss carries the penalty l2 / 2 * |weights|^2 (not the bias), the evaluation does not. Raises
    DataMissingError for a missing file and ConfigError for a malformed one.
    """

    l2: float = 1e-4
    evaluation_chunk = 20_000

    def __init__(self, data_dir: Path | None = None, *, batch_size: int | None = None, lr: float | None = None) -> None:
        folder = resolve_data_dir(data_dir)
        sets = []
        for name in ("a9a", "a9a.t"):
            path = require_file("a9a", folder / name, f"LIBSVM's file {name!r}", SOURCE + name)
            rows, labels = read_libsvm(path, FEATURES)
            sets.append(ArrayDataset(torch.from_numpy(rows), torch.from_numpy((labels > 0).astype(np.float32))))
        super().__init__("a9a", sets[0], sets[1], batch_size=32, lr=0.1)
        self.configure(batch_size=batch_size, lr=lr)

    def build_model(self) -> nn.Module:
        return nn.Linear(FEATURES, 1)

    def hyper_parameters(self) -> dict[str, str | int | float]:
        return {**super().hyper_parameters(), "l2": self.l2}

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs.squeeze(-1), targets)

    def predictions(self, outputs: Tensor) -> Tensor:
        return (outputs.squeeze(-1) > 0).float()

    def penalty(self, model: nn.Module) -> Tensor:
        weight = cast(Tensor, model.weight).flatten()
        return 0.5 * self.l2 * torch.dot(weight, weight)


def read_libsvm(path: Path, features: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read binary-labelled LIBSVM text, `LABEL INDEX:VALUE ...` per line with ascending indices from 1.

    features: the number of columns; a file's largest index may be smaller (that of a9a.t is 122).
    Returns dense float32 rows (n, features) and float32 labels (n,) of -1 or +1. Empty lines are skipped.
    Raises ConfigError with the line's number on anything else, and when there is no row.
    """
    lines = [(number, line) for number, line in enumerate(read_bytes(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise corrupt(path, "it holds no row")
    rows = np.zeros((len(lines), features), np.float32)
    labels = np.empty(len(lines), np.float32)
    for row, (number, line) in enumerate(lines):
        label, *pairs = line.split()
        if label not in (b"-1", b"+1", b"1"):
            raise corrupt(path, f"line {number}: the label {_show(label)} is neither -1 nor +1")
        labels[row] = float(label)
        last = 0
        for pair in pairs:
            index_text, _, value_text = pair.partition(b":")
            try:
                index, value = int(index_text), float(value_text)
            except ValueError:
                raise corrupt(path, f"line {number}: {_show(pair)} is not INDEX:VALUE") from None
            if not last < index <= features:
                raise corrupt(path, f"line {number}: index {index} is not in {last + 1}..{features}")
            if not math.isfinite(value):
                raise corrupt(path, f"line {number}: the value in {_show(pair)} is not finite")
            rows[row, index - 1] = value
            last = index
    return rows, labels


def _show(text: bytes) -> str:
    """A short printable form of bytes that may be anything."""
    return repr(text[:40].decode("ascii", "backslashreplace"))
