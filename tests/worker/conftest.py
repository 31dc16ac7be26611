"""Data for the tests of the worker: the real sets where they are at hand, tiny ones in the same formats."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
# A file of each set, whose presence says that the set is there.
MARKS = {
    "a9a": "a9a.t",
    "mnist": "mnist/t10k-labels-idx1-ubyte",
    "cifar10": "cifar-10-batches-bin/test_batch.bin",
    "tiny_imagenet": "tiny-imagenet-200/val/val_annotations.txt",
    "tinyshakespeare": "tinyshakespeare/input.txt",
}


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a set's name in `MARKS` to a data folder that holds it; skips where there is none."""
    own = os.environ.get("LOSCAR_DATA_DIR")
    folder = Path(own) if own else tmp_path_factory.mktemp("data")

    def find(name: str) -> Path:
        mark = folder / MARKS[name]
        if own and not mark.exists() and not mark.with_name(mark.name + ".gz").exists():
            pytest.skip(f"LOSCAR_DATA_DIR={own} holds no {name}")
        if not own and not mark.exists():
            if not (SHARED / "unpack.py").is_file():
                pytest.skip(f"no real data: {SHARED} is not there and LOSCAR_DATA_DIR is not set")
            command = [sys.executable, str(SHARED / "unpack.py"), str(folder), name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=100)
        return folder

    return find


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """A data folder with a few made-up samples of every set, in the official formats."""
    from PIL import Image

    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    write(folder / "a9a", b"-1 3:1 11:1 \n+1 1:1 123:0.5 \n-1 \n+1 2:1 7:1 \n")
    write(folder / "a9a.t", b"+1 1:1 122:1 \n-1 5:1 \n")
    for split, count in (("train", 6), ("t10k", 4)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count)
        write(folder / f"mnist/{split}-images-idx3-ubyte.gz", gzip.compress(idx_bytes(images)))
        write(folder / f"mnist/{split}-labels-idx1-ubyte", idx_bytes(labels))
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        records = rng.integers(0, 256, (5, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(5)
        write(folder / f"cifar-10-batches-bin/{name}.bin", records.tobytes())
    root = folder / "tiny-imagenet-200"
    write(root / "wnids.txt", b"n02\nn01\n")
    for wnid in ("n01", "n02", "n03"):
        for i in range(2):
            path = write(root / f"train/{wnid}/images/{wnid}_{i}.JPEG", b"")
            Image.new("RGB", (64, 64), (200 if wnid == "n01" else 20, 100 * i, 0)).save(path, "JPEG")
    for i in range(2):
        path = write(root / f"val/images/val_{i}.JPEG", b"")
        Image.new("L", (64, 64), 100 * i).save(path, "JPEG")
    write(root / "val/val_annotations.txt", b"val_0.JPEG\tn01\t0\t0\t63\t63\nval_1.JPEG\tn02\t0\t0\t63\t63\n")
    text = "".join(rng.choice(list("abc \né"), 3000))
    write(folder / "tinyshakespeare/input.txt", text.encode())
    return folder
