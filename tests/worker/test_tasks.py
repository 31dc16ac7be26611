from __future__ import annotations

import gzip
import inspect
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from loscar_core.errors import ConfigError, DataMissingError, UnknownTaskError
from loscar_worker.tasks import (
    ArrayDataset,
    Task,
    load_task,
    parameter_count,
    resolve_data_dir,
    task_names,
)
from loscar_worker.tasks import tiny_imagenet as tiny_imagenet_module
from loscar_worker.tasks.a9a import read_libsvm
from loscar_worker.tasks.charlm import CharLm, WindowDataset
from loscar_worker.tasks.cifar10 import read_binary
from loscar_worker.tasks.images import ImageTransform, random_crop, random_flip
from loscar_worker.tasks.mnist import read_idx
from loscar_worker.tasks.models import Gpt, resnet18, resnet20
from loscar_worker.tasks.partition import Batches, partition

DOCS = Path(__file__).resolve().parents[2] / "docs" / "tasks.md"
RealData = Callable[[str], Path]


def train(task: Task, steps: int, seed: int = 0) -> nn.Module:
    """Plain centralised training on the whole training set."""
    model = task.make_model(seed)
    optimizer = task.make_optimizer(model)
    batches = Batches(task.train, partition(task.labels(), "iid", None, 0, seed), task.batch_size, seed=seed)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()
        optimizer.step()
    return model


# What the tasks reach


def test_digits_learns() -> None:
    task = load_task("digits")
    assert (len(task.train), len(task.test), task.batch_size, task.lr) == (1500, 297, 16, 0.1)
    assert 0 <= float(task.train.inputs.min()) < float(task.train.inputs.max()) == 1
    result = task.evaluate(train(task, 400))
    assert result.accuracy > 0.9
    assert result.loss < 0.5


def test_a9a_reaches_the_known_accuracy(real_data: RealData) -> None:
    task = load_task("a9a", real_data("a9a"))
    assert (len(task.train), len(task.test), task.train.inputs.shape[1]) == (32561, 16281, 123)
    assert int(task.train.targets.sum()) == 7841
    # The test part never uses feature 123, and has to have its column all the same.
    assert not task.test.inputs[:, 122].any()
    assert task.evaluate(train(task, 2036)).accuracy >= 0.845


def test_mnist_learns(real_data: RealData) -> None:
    task = load_task("mnist", real_data("mnist"))
    assert (len(task.train), len(task.test)) == (60000, 10000)
    inputs, _ = task.train.take(torch.arange(2000))
    assert abs(float(inputs.mean())) < 0.05
    assert abs(float(inputs.std()) - 1) < 0.05
    task.test = ArrayDataset(task.test.inputs[:2000], task.test.targets[:2000], task.test.transform)
    assert task.evaluate(train(task, 150)).accuracy > 0.9


def test_cifar10_trains_on_part_of_the_files(real_data: RealData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        task = load_task("cifar10", real_data("cifar10"), batch_size=16)
    assert len(task.train) in (20000, 50000)
    assert ("of 5 training files" in caplog.text) == (len(task.train) < 50000)
    inputs, _ = task.test.take(torch.arange(500))
    assert inputs.mean(dim=(0, 2, 3)).abs().max() < 0.15
    assert (inputs.std(dim=(0, 2, 3)) - 1).abs().max() < 0.15
    model = train(task, 2)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_tiny_imagenet_reads_the_official_layout(real_data: RealData, tmp_path: Path) -> None:
    source = real_data("tiny_imagenet") / "tiny-imagenet-200"
    root = tmp_path / "tiny-imagenet-200"
    wnids = (source / "wnids.txt").read_text().split()[:2]
    (root / "train").mkdir(parents=True)
    (root / "val").mkdir()
    (root / "wnids.txt").write_text("\n".join(wnids))
    for wnid in wnids:
        (root / "train" / wnid).symlink_to(source / "train" / wnid)
    (root / "val" / "images").symlink_to(source / "val" / "images")
    lines = (source / "val" / "val_annotations.txt").read_text().splitlines()
    (root / "val" / "val_annotations.txt").write_text("\n".join(x for x in lines if x.split("\t")[1] in wnids))
    task = load_task("tiny-imagenet", tmp_path)
    assert (len(task.train), len(task.test)) == (1000, 100)
    assert task.train.targets.bincount().tolist() == [500, 500]
    inputs, _ = task.train.take(torch.arange(200))
    assert inputs.shape == (200, 3, 64, 64)
    assert inputs.std() > 0.5


def test_charlm_learns(real_data: RealData) -> None:
    task = load_task("charlm", real_data("tinyshakespeare"), batch_size=4)
    assert isinstance(task, CharLm)
    assert len(task.vocabulary) == 65
    assert parameter_count(task.make_model(0)) == 826_368
    batch = task.train.take(torch.arange(4), torch.Generator().manual_seed(0))
    untrained = task.loss(task.make_model(0), batch).item()
    model = train(task, 15)
    assert untrained == pytest.approx(np.log(65), abs=0.2)
    assert task.loss(model, batch).item() < untrained - 0.6
    written = task.generate(model, "ROMEO:", 5)
    assert len(written) == 5
    assert written == task.generate(model, "ROMEO:", 5)
    assert model.training


# Models


@pytest.mark.parametrize(
    ("model", "count", "shape"),
    [
        (lambda: resnet20(10), 269_722, (2, 3, 32, 32)),
        (lambda: resnet18(10), 11_173_962, (2, 3, 32, 32)),
        (lambda: resnet18(200, stem_stride=2), 11_271_432, (2, 3, 64, 64)),
    ],
)
def test_residual_networks(model: Callable[[], nn.Module], count: int, shape: tuple[int, ...]) -> None:
    network = model()
    assert parameter_count(network) == count
    out = network(torch.zeros(shape))
    assert out.shape[0] == 2
    assert bool(torch.isfinite(out).all())


def test_gpt_sees_only_the_past() -> None:
    model = Gpt(11, context=8, width=16, layers=2, heads=2).eval()
    tokens = torch.randint(0, 11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
    with pytest.raises(ValueError, match="context of 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("name", task_names())
def test_every_task_trains_and_is_initialised_by_its_seed(name: str, tiny_data: Path) -> None:
    task = load_task(name, tiny_data, batch_size=2)
    assert task.name == name
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = task.make_model(7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = task.make_model(7).state_dict(), task.make_model(8).state_dict()
    assert list(first) == list(again)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    model = train(task, 1)
    assert any(not torch.equal(first[key], value) for key, value in model.state_dict().items())
    assert len(task.labels()) == len(task.train)
    result = task.evaluate(model)
    assert 0 <= result.accuracy <= 1
    inputs, _ = task.train[0]
    assert inputs.shape == task.train.take(torch.tensor([0]))[0].shape[1:]


@pytest.mark.parametrize("name", task_names())
def test_documented_hyper_parameters(name: str, tiny_data: Path) -> None:
    row = re.search(rf"^\| `{name}` \|(.*e?.*\| (?:SGD|AdamW) \|.*)\|$", DOCS.read_text(), re.MULTILINE)
    assert row is not None
    batch, lr, optimizer, momentum, decay, *_ = (cell.strip() for cell in row[1].split("|"))
    task = load_task(name, tiny_data)
    found = task.hyper_parameters()
    assert (int(batch), float(lr), optimizer) == (found["batch_size"], found["lr"], found["optimizer"])
    assert float(decay) == found["weight_decay"]
    assert float(momentum or 0) == found.get("momentum", 0)
    made = task.make_optimizer(task.make_model(0))
    assert type(made).__name__ == optimizer
    assert made.param_groups[0]["lr"] == found["lr"]
    assert made.param_groups[0]["weight_decay"] == found["weight_decay"]


# The base class


class Bare(Task):
    """Linear regression to a class on random data, with what a test wants to look at."""

    evaluation_chunk = 7

    def __init__(self, data_dir: Path | None = None) -> None:
        rng = torch.Generator().manual_seed(0)
        data = ArrayDataset(torch.randn(20, 3, generator=rng), torch.arange(20) % 4)
        super().__init__("bare", data, data, batch_size=4, lr=0.1)
        self.data_dir = data_dir

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_evaluate_is_exact_and_restores_the_modes() -> None:
    task = Bare()
    model = task.make_model(0)
    model[1].eval()  # type: ignore[index]
    result = task.evaluate(model)
    assert [module.training for module in model] == [True, False, True]  # type: ignore[attr-defined]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    outputs = model(task.test.inputs)
    # The chunk of 7 does not divide 20: the mean over chunks must be weighted.
    assert result.loss == pytest.approx(nn.functional.cross_entropy(outputs, task.test.targets).item())
    assert result.accuracy == int((outputs.argmax(1) == task.test.targets).sum()) / 20


def test_evaluate_restores_the_modes_after_an_error() -> None:
    task = Bare()
    model = nn.Sequential(nn.Linear(99, 4))
    with pytest.raises(RuntimeError):
        task.evaluate(model)
    assert model.training
    assert model[0].training


def test_evaluate_passes_non_finite_losses_on() -> None:
    task = Bare()
    model = task.make_model(0)
    nn.init.constant_(model[0].weight, float("nan"))  # type: ignore[index]
    assert np.isnan(task.evaluate(model).loss)


def test_batches_follow_the_model_to_its_device() -> None:
    task = Bare()
    batch = task.train.take(torch.arange(4))
    assert task.loss(task.make_model(0).to("meta"), batch).device.type == "meta"


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    task = Bare()
    model = task.make_model(0)
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    held = sum(p.numel() for group in task.make_optimizer(model).param_groups for p in group["params"])
    assert held == parameter_count(model) == 4 + 8


def test_the_penalty_is_trained_on_and_not_evaluated(tiny_data: Path) -> None:
    task = load_task("a9a", tiny_data)
    model = task.make_model(0)
    assert isinstance(model, nn.Linear)
    batch = task.train.take(torch.arange(4))
    plain = task.criterion(model(batch[0]), batch[1]).item()
    expected = plain + 0.5e-4 * model.weight.square().sum().item()
    assert task.loss(model, batch).item() == pytest.approx(expected)
    task.test = task.train
    assert task.evaluate(model).loss == pytest.approx(plain)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"lr": 0.0}, {"lr": -1.0}, {"lr": float("nan")}])
def test_hyper_parameters_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="it must be"):
        load_task("digits", **bad)  # type: ignore[arg-type]


def test_array_dataset() -> None:
    data = ArrayDataset(torch.arange(6).view(3, 2), torch.tensor([5, 6, 7]))
    inputs, targets = data.take(torch.tensor([2, 0]))
    assert inputs.tolist() == [[4, 5], [0, 1]]
    assert targets.tolist() == [7, 5]
    assert data[1][0].tolist() == [2, 3]
    assert [len(x) for x, _ in data.chunks(2)] == [2, 1]
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(ValueError, match="2 inputs but 3"):
        ArrayDataset(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="at least one"):
        ArrayDataset(torch.zeros(0), torch.zeros(0))


# Augmentation


def test_random_crop_is_a_window_of_the_padded_image() -> None:
    images = torch.arange(1, 1 + 50 * 3 * 5 * 6, dtype=torch.int32).view(50, 3, 5, 6)
    cropped = random_crop(images, 2, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for before, after in zip(padded, cropped, strict=True):
        places = [(y, x) for y in range(5) for x in range(5) if torch.equal(before[:, y : y + 5, x : x + 6], after)]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 15


def test_random_flip_mirrors_half_of_the_images() -> None:
    images = torch.arange(400 * 6).view(400, 1, 2, 3)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 150 < int(mirrored.sum()) < 250


def test_image_transform_is_normalised_and_repeatable() -> None:
    images = torch.randint(0, 256, (4, 2, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.2]), torch.tensor([0.3, 0.1])
    plain = ImageTransform((0.5, 0.2), (0.3, 0.1))(images, None)
    expected = (images.float() / 255 - mean.view(1, 2, 1, 1)) / std.view(1, 2, 1, 1)
    torch.testing.assert_close(plain, expected)
    random = ImageTransform((0.5, 0.2), (0.3, 0.1), pad=2, flip=True)
    first, again, other = (random(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_windows_shift_by_one_and_jitter_within_the_text() -> None:
    codes = torch.arange(35)
    fixed, moving = (WindowDataset(codes, 8, jitter=jitter) for jitter in (False, True))
    assert len(fixed) == len(moving) == 4
    inputs, targets = fixed.take(torch.arange(4))
    assert inputs.tolist() == fixed.inputs.tolist()
    assert torch.equal(targets, inputs + 1)
    starts = set()
    for seed in range(30):
        inputs, targets = moving.take(torch.arange(4), torch.Generator().manual_seed(seed))
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))
        starts.update((inputs[:, 0] - 8 * torch.arange(4)).tolist())
    assert min(starts) >= 0
    assert max(starts) <= 7
    assert len(starts) > 4
    with pytest.raises(ValueError, match="no window"):
        WindowDataset(torch.arange(8), 8, jitter=False)


def test_generate_refuses_what_it_cannot_continue(tiny_data: Path) -> None:
    task = load_task("charlm", tiny_data)
    assert isinstance(task, CharLm)
    assert task.vocabulary == "\n abcé"
    model = task.make_model(0)
    assert task.generate(model, "a", 0) == ""
    assert set(task.generate(model, "aé" * 100, 3)) <= set(task.vocabulary)
    for prompt, n, temperature in (("", 1, 1.0), ("axb", 1, 1.0), ("a", -1, 1.0), ("a", 1, 0.0)):
        with pytest.raises(ConfigError):
            task.generate(model, prompt, n, temperature=temperature)


# Readers


def test_missing_files_say_what_to_put_where(tmp_path: Path) -> None:
    first = {
        "a9a": "a9a",
        "mnist": "mnist/train-images-idx3-ubyte",
        "cifar10": "cifar-10-batches-bin/data_batch_1.bin",
        "cifar10-resnet18": "cifar-10-batches-bin/data_batch_1.bin",
        "tiny-imagenet": "tiny-imagenet-200/wnids.txt",
        "charlm": "tinyshakespeare/input.txt",
    }
    for name, path in first.items():
        with pytest.raises(DataMissingError) as caught:
            load_task(name, tmp_path)
        message = str(caught.value)
        assert message.startswith(f"task {name}: {tmp_path / path} is missing; put ")
        assert "http" in message
        assert "\n" not in message


def test_the_second_missing_file_is_named(tiny_data: Path) -> None:
    for name, path in (
        ("a9a", "a9a.t"),
        ("mnist", "mnist/t10k-labels-idx1-ubyte"),
        ("cifar10", "cifar-10-batches-bin/test_batch.bin"),
        ("tiny-imagenet", "tiny-imagenet-200/val/images/val_1.JPEG"),
    ):
        (tiny_data / path).unlink()
        with pytest.raises(DataMissingError, match=re.escape(str(tiny_data / path))):
            load_task(name, tiny_data)


def test_data_dir_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOSCAR_DATA_DIR", raising=False)
    assert resolve_data_dir(None) == tmp_path / ".data"
    monkeypatch.setenv("LOSCAR_DATA_DIR", "from-env")
    assert resolve_data_dir(None) == tmp_path / "from-env"
    assert resolve_data_dir("/elsewhere") == Path("/elsewhere")


def test_libsvm_values(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"-1 1:0.5 4:-2e1 \r\n\n+1\n1 2:1\n")
    rows, labels = read_libsvm(path, 5)
    assert rows.dtype == np.float32
    assert rows.tolist() == [[0.5, 0, 0, -20, 0], [0] * 5, [0, 1, 0, 0, 0]]
    assert labels.tolist() == [-1, 1, 1]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no row"),
        (b"+1 1:1\n0 1:1\n", "line 2: the label '0'"),
        (b"+1 1\n", "line 1: '1' is not INDEX:VALUE"),
        (b"+1 1:x\n", "is not INDEX:VALUE"),
        (b"+1 124:1\n", r"index 124 is not in 1\.\.123"),
        (b"+1 0:1\n", "index 0"),
        (b"+1 3:1 3:1\n", r"index 3 is not in 4\.\.123"),
        (b"+1 3:nan\n", "not finite"),
        (b"\x89PNG\xff\n", "label"),
    ],
)
def test_libsvm_errors(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "a9a"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_libsvm(path, 123)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x", b"\0\0\x08", "3 bytes, fewer than an idx header"),
        ("x", b"\0\0\x08\x03" + bytes(12), "magic number is 2051, not 2049"),
        ("x", b"\0\0\x08\x01\0\0\0\x05abcd", "promises 5 bytes of data, it has 4"),
        ("x", b"\0\0\x08\x01\0\0\0\x03abcd", "promises 3 bytes of data, it has 4"),
        ("x", b"\0\0\x08\x01\0\0\0\0", "promises 0 bytes"),
        ("x.gz", b"plainly not", "not valid gzip"),
        ("x.gz", gzip.compress(bytes(range(200)))[:-30], "not valid gzip"),
    ],
)
def test_idx_errors(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=reason):
        read_idx(path, 1)


def test_mnist_files_must_fit_together(tiny_data: Path) -> None:
    labels = tiny_data / "mnist/train-labels-idx1-ubyte"
    labels.write_bytes(b"\0\0\x08\x01\0\0\0\x02\x01\x02")
    with pytest.raises(ConfigError, match="2 labels for 6 images"):
        load_task("mnist", tiny_data)
    labels.write_bytes(b"\0\0\x08\x01\0\0\0\x06\x01\x02\x0a\x01\x01\x01")
    with pytest.raises(ConfigError, match="label 10"):
        load_task("mnist", tiny_data)
    images = tiny_data / "mnist/train-images-idx3-ubyte"
    images.write_bytes(b"\0\0\x08\x03\0\0\0\x01\0\0\0\x02\0\0\0\x02abcd")
    with pytest.raises(ConfigError, match="2 x 2, not 28 x 28"):
        load_task("mnist", tiny_data)


def test_cifar_records(tmp_path: Path) -> None:
    path = tmp_path / "batch.bin"
    pixels = np.arange(3072, dtype=np.int64).astype(np.uint8)
    path.write_bytes(b"\x07" + pixels.tobytes())
    images, labels = read_binary(path)
    assert labels.tolist() == [7]
    assert images.shape == (1, 3, 32, 32)
    assert images[0, 1, 2, 3] == pixels[1024 + 2 * 32 + 3]
    for data, reason in (
        (b"", "0 bytes"),
        (bytes(3072), "multiple of 3073"),
        (b"\x0a" + bytes(3072), "label 10"),
    ):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=reason):
            read_binary(path)


def test_charlm_errors(tiny_data: Path) -> None:
    path = tiny_data / "tinyshakespeare/input.txt"
    path.write_bytes(b"abc\xff" * 1000)
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_task("charlm", tiny_data)
    path.write_text("too short")
    with pytest.raises(ConfigError, match="too few"):
        load_task("charlm", tiny_data)


def test_tiny_imagenet_pixels_are_kept(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tiny_data / "tiny-imagenet-200"
    task = load_task("tiny-imagenet", tiny_data)
    # A class's number is its line in wnids.txt; n03 is not listed there and not read.
    assert task.train.targets.tolist() == [0, 0, 1, 1]
    assert task.test.targets.tolist() == [1, 0]
    assert int(task.train.inputs[0, 0].float().mean()) in range(10, 30)
    assert int(task.train.inputs[2, 0].float().mean()) in range(190, 210)
    assert len(list(root.glob("loscar-*.npy"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tiny_imagenet_module, "decode", lambda *_: pytest.fail("decoded again"))
        again = load_task("tiny-imagenet", tiny_data)
    assert torch.equal(again.train.inputs, task.train.inputs)
    assert torch.equal(again.test.inputs, task.test.inputs)
    for cache in root.glob("loscar-*.npy"):
        cache.write_bytes(b"broken")
    assert torch.equal(load_task("tiny-imagenet", tiny_data).train.inputs, task.train.inputs)
    (root / "train/n01/images/n01_1.JPEG").unlink()
    assert len(load_task("tiny-imagenet", tiny_data).train) == 3


def test_tiny_imagenet_without_a_writable_folder(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tiny_imagenet_module.np, "save", refuse)
    assert len(load_task("tiny-imagenet", tiny_data).train) == 4
    assert not list((tiny_data / "tiny-imagenet-200").glob("loscar-*"))


def test_tiny_imagenet_errors(tiny_data: Path) -> None:
    from PIL import Image

    root = tiny_data / "tiny-imagenet-200"
    image = root / "train/n01/images/n01_0.JPEG"
    good = image.read_bytes()
    for data in (b"", b"no image", good[: len(good) // 2]):
        image.write_bytes(data)
        with pytest.raises(ConfigError, match=r"n01_0\.JPEG: it does not decode"):
            load_task("tiny-imagenet", tiny_data)
    Image.new("RGB", (32, 64)).save(image, "JPEG")
    with pytest.raises(ConfigError, match="32 x 64 pixels"):
        load_task("tiny-imagenet", tiny_data)
    image.write_bytes(good)
    annotations = root / "val/val_annotations.txt"
    for line, reason in (("val_0.JPEG\tn09\t0", "class 'n09'"), ("../x.JPEG\tn01\t0", "not a file name")):
        annotations.write_text(line)
        with pytest.raises(ConfigError, match=reason):
            load_task("tiny-imagenet", tiny_data)
    (root / "wnids.txt").write_text("n01\nn01\n")
    with pytest.raises(ConfigError, match="twice"):
        load_task("tiny-imagenet", tiny_data)
    (root / "wnids.txt").write_text("n77\n")
    with pytest.raises(DataMissingError, match="n77"):
        load_task("tiny-imagenet", tiny_data)


# Finding a task


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownTaskError) as caught:
        load_task("digit")
    message = str(caught.value)
    assert all(name in message for name in task_names())
    assert "did you mean digits?" in message


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("spirals", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_the_documented_example_works(here: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (here / "spirals.py").write_text(blocks[0])
    task = load_task("spirals:Spirals", lr=0.04)
    assert (task.name, task.batch_size, task.lr) == ("spirals", 32, 0.04)
    assert task.evaluate(train(task, 1000)).accuracy > 0.9


def test_factories_get_the_keywords_that_they_accept(here: Path) -> None:
    (here / "mine.py").write_text(
        inspect.getsource(Bare).join(
            [
                "from pathlib import Path\nimport torch\nfrom torch import nn\n"
                "from loscar_worker.tasks import ArrayDataset, Task\n",
                "def plain():\n    return Bare()\n"
                "def everything(**given):\n    task = Bare(); task.given = given; return task\n"
                "def some(data_dir, lr=1.0):\n    task = Bare(data_dir); task.given = lr; return task\n"
                "class Nested:\n    make = staticmethod(plain)\n",
            ]
        )
    )
    assert load_task("mine:plain", batch_size=9).batch_size == 9
    assert load_task("mine:Nested.make").batch_size == 4
    given = load_task("mine:everything", "/d", True, 3, 0.5).given  # type: ignore[attr-defined]
    assert given == {"data_dir": Path("/d"), "download": True, "batch_size": 3, "lr": 0.5}
    task = load_task("mine:some", here, lr=0.25)
    assert (task.data_dir, task.given, task.lr) == (here, 0.25, 0.25)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("mine:", "package.module:factory"),
        (":x", "package.module:factory"),
        ("no_such_module_here:x", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("mine:absent", "AttributeError"),
        ("mine:number", "number is not callable"),
        ("mine:wrong", "returned list, not a"),
        ("mine:fails", "factory failed: ValueError: two lines"),
    ],
)
def test_bad_specs(here: Path, spec: str, reason: str) -> None:
    (here / "mine.py").write_text("number = 3\nwrong = list\ndef fails():\n    raise ValueError('two\\n   lines')\n")
    with pytest.raises(UnknownTaskError) as caught:
        load_task(spec)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_with_a_syntax_error(here: Path) -> None:
    (here / "mine.py").write_text("def broken(:\n")
    with pytest.raises(UnknownTaskError, match="cannot be imported: SyntaxError"):
        load_task("mine:broken")


def test_importing_the_package_starts_nothing() -> None:
    code = (
        "import sys, threading, loscar_worker.tasks;"
        "assert threading.active_count() == 1;"
        "assert not {'sklearn', 'PIL'} & set(sys.modules), 'needless imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={"PYTHONPATH": ":".join(sys.path)})
