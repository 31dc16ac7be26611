"""`tiny-imagenet`: ResNet-18 on Tiny ImageNet, decoded once from its JPEG files."""

from __future__ import annotations

import logging
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loscar_core.errors import ConfigError
from loscar_worker.tasks.base import ArrayDataset, Task
from loscar_worker.tasks.files import corrupt, progress, read_bytes, require_file, resolve_data_dir
from loscar_worker.tasks.images import ImageTransform
from loscar_worker.tasks.models import resnet18

SOURCE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
FOLDER = "tiny-imagenet-200"
MEAN = (0.4802, 0.4481, 0.3975)
STD = (0.2770, 0.2691, 0.2821)
SIZE = 64

_logger = logging.getLogger(__name__)


class TinyImageNet(Task):
    """ResNet-18 on 64 x 64 images of the classes listed in wnids.txt; inputs float32 (3, 64, 64), targets
    int64.

    Reads `tiny-imagenet-200/` from the data folder in its official layout: `wnids.txt`,
    `train/WNID/images/*.JPEG`, `val/images/*.JPEG`, `val/val_annotations.txt`. A class's number is its line
    in wnids.txt. The decoded pixels are kept beside them as `loscar-*.npy` where the folder is writable, and
    mapped from there, so several workers on a machine share one copy. Training images are cropped at random
    out of an 8-pixel border and mirrored.

    Raises DataMissingError for missing files, ConfigError for malformed ones or where Pillow is not
    installed.
    """

    momentum = 0.9
    weight_decay = 5e-4
    evaluation_chunk = 250

    def __init__(self, data_dir: Path | None = None, *, batch_size: int | None = None, lr: float | None = None) -> None:
        root = resolve_data_dir(data_dir) / FOLDER
        wnids = _read_lines(root / "wnids.txt")
        number = {wnid: i for i, wnid in enumerate(wnids)}
        if len(number) != len(wnids):
            raise corrupt(root / "wnids.txt", "it lists a class twice")
        self.classes = len(wnids)
        train_files, train_labels = _list_train(root, number)
        test_files, test_labels = _list_validation(root, number)
        train_images = _pixels(root, "train", train_files)
        test_images = _pixels(root, "val", test_files)
        super().__init__(
            "tiny-imagenet",
            ArrayDataset(
                torch.from_numpy(train_images),
                torch.tensor(train_labels),
                ImageTransform(MEAN, STD, pad=8, flip=True),
                random=True,
            ),
            ArrayDataset(torch.from_numpy(test_images), torch.tensor(test_labels), ImageTransform(MEAN, STD)),
            batch_size=64,
            lr=0.05,
        )
        self.configure(batch_size=batch_size, lr=lr)

    def build_model(self) -> nn.Module:
        return resnet18(self.classes, stem_stride=2)


def _read_lines(path: Path) -> list[str]:
    require_file("tiny-imagenet", path, "the unpacked Tiny ImageNet", SOURCE)
    lines = read_bytes(path).decode("utf-8", "replace").split("\n")
    found = [line.rstrip("\r") for line in lines if line.strip()]
    if not found:
        raise corrupt(path, "it is empty")
    return found


def _list_train(root: Path, number: dict[str, int]) -> tuple[list[Path], list[int]]:
    files: list[Path] = []
    labels: list[int] = []
    for wnid, label in number.items():
        folder = root / "train" / wnid / "images"
        # Sorted: the order of a folder differs between machines, and the partitions go by position.
        here = sorted(folder.glob("*.JPEG"))
        if not here:
            require_file("tiny-imagenet", folder / f"{wnid}_0.JPEG", "the unpacked Tiny ImageNet", SOURCE)
        files += here
        labels += [label] * len(here)
    return files, labels


def _list_validation(root: Path, number: dict[str, int]) -> tuple[list[Path], list[int]]:
    annotations = root / "val" / "val_annotations.txt"
    files: list[Path] = []
    labels: list[int] = []
    for line_number, line in enumerate(_read_lines(annotations), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in number:
            raise corrupt(annotations, f"line {line_number}: the class {wnid[:40]!r} is not in wnids.txt")
        if "/" in name or "\\" in name:
            raise corrupt(annotations, f"line {line_number}: {name[:40]!r} is not a file name")
        files.append(root / "val" / "images" / name)
        labels.append(number[wnid])
    return files, labels


def _pixels(root: Path, split: str, files: list[Path]) -> NDArray[np.uint8]:
    """uint8 (n, 3, 64, 64) of `files`, from the cache file of exactly these files or decoded now."""
    # The name carries names and sizes of the sources, so a changed folder never meets an old cache.
    mark = 0
    for path in files:
        try:
            size = path.stat().st_size
        except OSError:
            require_file("tiny-imagenet", path, "the unpacked Tiny ImageNet", SOURCE)
            raise
        mark = zlib.crc32(f"{path.relative_to(root)}:{size}\n".encode(), mark)
    cache = root / f"loscar-{split}-{mark:08x}.npy"
    shape = (len(files), 3, SIZE, SIZE)
    if cache.is_file():
        try:
            # Copy on write: torch asks for a writable array, the file stays as it is.
            pixels: NDArray[np.uint8] = np.load(cache, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            _logger.warning("%s is broken and is made again", cache)
        else:
            if pixels.dtype == np.uint8 and pixels.shape == shape:
                return np.asarray(pixels)
    pixels = decode(files, f"decoding Tiny ImageNet ({split})")
    _store(cache, pixels)
    return pixels


def _store(cache: Path, pixels: NDArray[np.uint8]) -> None:
    part = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            np.save(stream, pixels, allow_pickle=False)
        # Several workers may do the same at once; each writes its own file and the last rename wins.
        part.replace(cache)
    except OSError as error:
        _logger.info("the decoded images are not kept: %s", error)
        part.unlink(missing_ok=True)


def decode(files: list[Path], description: str) -> NDArray[np.uint8]:
    """Decode JPEG files of 64 x 64 pixels, grey ones too, into uint8 (n, 3, 64, 64); shows a bar on a
    terminal.

    Raises ConfigError for a file that does not decode or has another size, or where Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(f"task tiny-imagenet needs Pillow: pip install pillow ({error})") from error
    pixels = np.empty((len(files), 3, SIZE, SIZE), np.uint8)
    with progress(description, len(files)) as advance:
        for i, path in enumerate(files):
            try:
                with Image.open(path) as image:
                    array = np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError) as error:
                raise corrupt(path, f"it does not decode ({error})") from error
            if array.shape != (SIZE, SIZE, 3):
                raise corrupt(path, f"it is {array.shape[1]} x {array.shape[0]} pixels, not {SIZE} x {SIZE}")
            pixels[i] = array.transpose(2, 0, 1)
            advance(1)
    return pixels
