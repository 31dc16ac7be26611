"""`cifar10` (ResNet-20) and `cifar10-resnet18`: CIFAR-10 from its binary version."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loscar_worker.tasks.base import ArrayDataset, Task
from loscar_worker.tasks.files import corrupt, missing, read_bytes, resolve_data_dir
from loscar_worker.tasks.images import ImageTransform
from loscar_worker.tasks.models import resnet18, resnet20

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"
CLASSES = 10
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
_IMAGE_BYTES = 3 * 32 * 32
_TRAIN_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)]

_logger = logging.getLogger(__name__)


class Cifar10(Task):
    """A residual network with batch normalisation on 32 x 32 images; inputs float32 (3, 32, 32), targets
    int64.

    Reads `cifar-10-batches-bin/data_batch_{1..5}.bin` and `test_batch.bin` from the data folder; works with
    the training files that are there, at least one, and logs a warning where some are not. Training images
    are cropped at random out of a 4-pixel border and mirrored.

    network: "resnet20" (0.27 M parameters, the task `cifar10`) or "resnet18" (11 M, `cifar10-resnet18`).
    Raises DataMissingError for missing files and ConfigError for a malformed one.
    """

    momentum = 0.9
    weight_decay = 5e-4
    evaluation_chunk = 500

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        batch_size: int | None = None,
        lr: float | None = None,
        network: Literal["resnet20", "resnet18"] = "resnet20",
    ) -> None:
        folder = resolve_data_dir(data_dir) / FOLDER
        name = "cifar10" if network == "resnet20" else "cifar10-resnet18"
        self.network = network
        train_paths = [folder / file for file in _TRAIN_FILES if (folder / file).is_file()]
        test_path = folder / "test_batch.bin"
        what = f"the files of CIFAR-10's binary version (data_batch_1.bin to data_batch_5.bin, {test_path.name})"
        if not train_paths or not test_path.is_file():
            raise missing(name, test_path if train_paths else folder / _TRAIN_FILES[0], what, SOURCE)
        if len(train_paths) < len(_TRAIN_FILES):
            _logger.warning("%s: %d of %d training files in %s", name, len(train_paths), len(_TRAIN_FILES), folder)
        train = [read_binary(path) for path in train_paths]
        images = torch.from_numpy(np.concatenate([pixels for pixels, _ in train]))
        labels = torch.from_numpy(np.concatenate([classes for _, classes in train]))
        test_images, test_labels = (torch.from_numpy(array) for array in read_binary(test_path))
        super().__init__(
            name,
            ArrayDataset(images, labels, ImageTransform(MEAN, STD, pad=4, flip=True), random=True),
            ArrayDataset(test_images, test_labels, ImageTransform(MEAN, STD)),
            batch_size=64,
            lr=0.05,
        )
        self.configure(batch_size=batch_size, lr=lr)

    def build_model(self) -> nn.Module:
        return resnet20(CLASSES) if self.network == "resnet20" else resnet18(CLASSES)


def cifar10_resnet18(
    data_dir: Path | None = None, *, batch_size: int | None = None, lr: float | None = None
) -> Cifar10:
    """The task `cifar10-resnet18`; arguments and errors are those of `Cifar10`."""
    return Cifar10(data_dir, batch_size=batch_size, lr=lr, network="resnet18")


def read_binary(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one file of the binary version: records of a label byte and 3072 pixel bytes (red, green, blue
    planes).

    Returns uint8 images (n, 3, 32, 32) and int64 labels (n,).
    Raises ConfigError when the size is not a positive multiple of 3073 or a label exceeds 9.
    """
    data = read_bytes(path)
    record = 1 + _IMAGE_BYTES
    if not data or len(data) % record:
        raise corrupt(path, f"its size of {len(data)} bytes is not a positive multiple of {record}")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= CLASSES:
        bad = int(np.argmax(labels >= CLASSES))
        raise corrupt(path, f"record {bad} has the label {labels[bad]}, above {CLASSES - 1}")
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), labels
