"""`mnist`: a two-layer convolutional network on the MNIST digits, read from the official idx files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loscar_worker.tasks.base import ArrayDataset, Task
from loscar_worker.tasks.files import corrupt, missing, read_bytes, resolve_data_dir
from loscar_worker.tasks.images import ImageTransform
from loscar_worker.tasks.models import small_cnn

SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CLASSES = 10


class Mnist(Task):
    """Two convolutions and a linear layer on 28 x 28 images; inputs float32 (1, 28, 28), targets int64.

    Reads `mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte`, plain or with `.gz`, from the data folder.
    Raises DataMissingError for a missing file and ConfigError for a malformed one.
    """

    momentum = 0.9

    def __init__(self, data_dir: Path | None = None, *, batch_size: int | None = None, lr: float | None = None) -> None:
        folder = resolve_data_dir(data_dir) / "mnist"
        transform = ImageTransform((0.1307,), (0.3081,))
        sets = []
        for split in ("train", "t10k"):
            images, labels = _load_split(folder, split)
            sets.append(ArrayDataset(torch.from_numpy(images[:, None]), torch.from_numpy(labels), transform))
        super().__init__("mnist", sets[0], sets[1], batch_size=32, lr=0.02)
        self.configure(batch_size=batch_size, lr=lr)

    def build_model(self) -> nn.Module:
        return small_cnn(CLASSES)


def _load_split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images_path, labels_path = (_find(folder, f"{split}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28):
        raise corrupt(images_path, f"its images are {images.shape[1]} x {images.shape[2]}, not 28 x 28")
    if len(images) != len(labels):
        raise corrupt(labels_path, f"it has {len(labels)} labels for {len(images)} images")
    if labels.max() >= CLASSES:
        raise corrupt(labels_path, f"it holds the label {labels.max()}, above {CLASSES - 1}")
    return images, labels.astype(np.int64)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise missing("mnist", folder / name, f"MNIST's file {name} (or {name}.gz)", f"{SOURCE}{name}.gz")


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes with `dimensions` dimensions, decompressing it where it ends in .gz.

    Returns a writable uint8 array of the shape that the header gives.
    Raises ConfigError on a wrong magic number, a wrong size, an empty array or broken compression.
    """
    data = read_bytes(path)
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise corrupt(path, f"it is not valid gzip ({error})") from error
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise corrupt(path, f"it has {len(data)} bytes, fewer than an idx header")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", data[:header])
    expected = 0x0800 | dimensions
    if magic != expected:
        raise corrupt(path, f"its magic number is {magic}, not {expected}")
    size = math.prod(shape)
    if len(data) != header + size or size == 0:
        raise corrupt(path, f"its header promises {size} bytes of data, it has {len(data) - header}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()
