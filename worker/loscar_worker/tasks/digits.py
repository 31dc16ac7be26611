"""`digits`: scikit-learn's bundled 8 x 8 handwritten digits and a small perceptron. Needs no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from loscar_core.errors import ConfigError
from loscar_worker.tasks.base import ArrayDataset, Task
from loscar_worker.tasks.models import mlp

TRAIN_SIZE = 1500


class Digits(Task):
    """64-64-10 ReLU perceptron on 1500 training and 297 test images; inputs float32 (64,) in 0..1.

    data_dir: ignored, the data come with scikit-learn. Raises ConfigError where that is not installed.
    """

    def __init__(self, data_dir: Path | None = None, *, batch_size: int | None = None, lr: float | None = None) -> None:
        train, test = _load()
        super().__init__("digits", train, test, batch_size=16, lr=0.1)
        self.configure(batch_size=batch_size, lr=lr)

    def build_model(self) -> nn.Module:
        return mlp((64, 64, 10))


def _load() -> tuple[ArrayDataset, ArrayDataset]:
    try:
        # Here and not above: the import takes a second that no other task should pay.
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(f"task digits needs scikit-learn: pip install scikit-learn ({error})") from error
    images, labels = load_digits(return_X_y=True)
    # RandomState's stream is frozen for good, so the split is the same under every NumPy.
    order = np.random.RandomState(0).permutation(len(labels))
    inputs = torch.from_numpy((images[order] / 16.0).astype(np.float32))
    targets = torch.from_numpy(labels[order].astype(np.int64))
    return (
        ArrayDataset(inputs[:TRAIN_SIZE], targets[:TRAIN_SIZE]),
        ArrayDataset(inputs[TRAIN_SIZE:], targets[TRAIN_SIZE:]),
    )
