"""The callbacks under the real frameworks, each beside a worker with a plain loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import Processes, Server, status_of, wait_until
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import loscar_worker as loscar
from loscar_core.errors import ConfigError
from loscar_worker.session import Session

pytestmark = [
    pytest.mark.timeout(200),
    # The frameworks' own affairs.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
]
ACCUMULATE = 3
BATCHES = 24
"""Of one epoch, for one epoch's 8 optimizer steps."""


class Samples(Dataset[dict[str, Tensor]]):
    """Noiseless linear data by the names that the Hugging Face trainer passes on to `forward`."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": x[:2]}


class Net(nn.Module):
    """What all workers train: `forward` gives the loss too, as the Hugging Face trainer wants it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.forwards = 0
        self.fails_at: int | None = None

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.forwards += 1
        if self.forwards == self.fails_at:
            raise ArithmeticError("the batch is broken")
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out}

    def vector(self) -> np.ndarray:
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()]).numpy()


def plain_worker(server: Server, model: nn.Module, net: Net, name: str) -> Session:
    """A loop of one's own, until the run is over."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = list(DataLoader(Samples(), 4))
    with loscar.join(server.address, model, name=name, connect_timeout_s=15, server_timeout_s=5) as session:
        while not session.finished:
            net(**batches[session.steps % BATCHES])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            session.step()
    return session


@contextmanager
def beside(server: Server, model: nn.Module, net: Net) -> Iterator[None]:
    """A second worker, in a thread; when the block fails its server goes, so that it ends too."""
    with ThreadPoolExecutor(1) as pool:
        plain = pool.submit(plain_worker, server, model, net, "plain")
        try:
            yield
        except BaseException:
            server.popen.kill()
            raise
        assert plain.result(60).finished


def departures(server: Server, name: str, times: int = 1) -> list[tuple[str, str]]:
    """(reason, detail) of each time that a member left, once it has so often."""

    def found() -> list[Any]:
        return [d for d in status_of(server.address).departures if d.name == name]

    wait_until(lambda: len(found()) >= times, f"{name} has left {times} times")
    return [(d.reason, d.detail) for d in found()]


RUN = ["--density", "0.5", "--local-steps", "2"]


# --- Lightning ----------------------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Iterator[Any]:
    """What the tests need of Lightning, which must not say much."""
    module = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield module
    logger.setLevel(before)


def lightning_net(lightning: Any, seed: int = 0, manual: bool = False) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual
            self.inner = Net(seed)
            self.optimizer_steps = 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            optimizer.register_step_post_hook(self.count)
            return optimizer

        def count(self, *_: object) -> None:
            self.optimizer_steps += 1

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor | None:
            loss = self.inner(**batch)["loss"]
            if not manual:
                return loss
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return None

    return Module()


def lightning_trainer(lightning: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_epochs": -1, "enable_checkpointing": False, "accumulate_grad_batches": ACCUMULATE}
    return lightning.Trainer(
        **(settings | options),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning_trains_until_the_run_is_over(
    processes: Processes, lightning: Any, tmp_path: Path, manual: bool
) -> None:
    from loscar_worker.integrations.lightning import LoscarCallback

    server = processes.server(*RUN, "--workers", "2", "--rounds", "6")
    other = lightning_net(lightning, seed=1)
    module = lightning_net(lightning, manual=manual)
    accumulate = 1 if manual else ACCUMULATE
    callback = LoscarCallback(server.address, name="lightning")
    trainer = lightning_trainer(lightning, tmp_path, callback, accumulate_grad_batches=accumulate)
    with beside(server, other, other.inner):
        trainer.fit(module, DataLoader(Samples(), 4))
    session = callback.session
    assert session is not None
    assert session.finished
    assert session.steps == module.optimizer_steps == trainer.global_step
    assert module.inner.forwards == accumulate * session.steps
    assert session.contributions["included"] == 7
    assert np.array_equal(module.inner.vector(), other.inner.vector())
    assert departures(server, "lightning")[0][0] == "finished"


def test_lightning_reports_the_loss(processes: Processes, lightning: Any, tmp_path: Path) -> None:
    from loscar_worker.integrations.lightning import LoscarCallback

    server = processes.server(*RUN, "--workers", "1")
    module = lightning_net(lightning)
    callback = LoscarCallback(server.address, name="lightning")
    noted: list[float] = []
    seen: list[float] = []

    class Watch(lightning.Callback):  # type: ignore[name-defined, misc]
        def on_train_start(self, *_: object) -> None:
            assert callback.session is not None
            note = callback.session.note_loss
            callback.session.note_loss = lambda loss: (noted.append(float(loss)), note(loss))  # type: ignore

        def on_before_backward(self, trainer: object, module: object, loss: Tensor) -> None:
            seen.append(loss.item() * ACCUMULATE)

    lightning_trainer(lightning, tmp_path, callback, Watch(), max_steps=4).fit(module, DataLoader(Samples(), 4))
    assert noted == pytest.approx(seen[ACCUMULATE - 1 :: ACCUMULATE])
    assert len(noted) == 4
    assert departures(server, "lightning") == [("left", "")]


def test_lightning_tells_the_server_of_an_exception(processes: Processes, lightning: Any, tmp_path: Path) -> None:
    from loscar_worker.integrations.lightning import LoscarCallback

    server = processes.server(*RUN, "--workers", "1")
    module = lightning_net(lightning)
    module.inner.fails_at = 20
    saver = lightning.callbacks.ModelCheckpoint(tmp_path / "saved", filename="failed", save_on_exception=True)
    callback = LoscarCallback(server.address, name="lightning")
    trainer = lightning_trainer(lightning, tmp_path, callback, saver, enable_checkpointing=True)
    with pytest.raises(ArithmeticError):
        trainer.fit(module, DataLoader(Samples(), 4))
    assert departures(server, "lightning") == [("failed", "ArithmeticError: the batch is broken")]
    # What Lightning saves at an exception can be resumed from, too.
    module.inner.fails_at = None
    again = LoscarCallback(server.address)
    trainer = lightning_trainer(lightning, tmp_path, again, max_steps=10)
    trainer.fit(module, DataLoader(Samples(), 4), ckpt_path=tmp_path / "saved" / "failed.ckpt")
    assert again.session is not None
    assert again.session.name == "lightning"
    assert again.session.steps == 10


def test_lightning_checkpoints_bring_the_worker_back(processes: Processes, lightning: Any, tmp_path: Path) -> None:
    from loscar_worker.integrations.lightning import LoscarCallback

    server = processes.server(*RUN, "--workers", "1")
    module = lightning_net(lightning)
    saver = lightning.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, filename="fifth")
    callback = LoscarCallback(server.address, name="returning", slot=3)
    trainer = lightning_trainer(lightning, tmp_path, callback, saver, max_steps=5, enable_checkpointing=True)
    trainer.fit(module, DataLoader(Samples(), 4))
    assert callback.session is not None
    included = callback.session.contributions["included"]

    resumed = lightning_net(lightning, seed=5)
    callback = LoscarCallback(server.address)
    trainer = lightning_trainer(lightning, tmp_path, callback, max_steps=12)
    trainer.fit(resumed, DataLoader(Samples(), 4), ckpt_path=tmp_path / "saved" / "fifth.ckpt", weights_only=True)
    session = callback.session
    assert session is not None
    assert (session.name, session.slot, session.steps) == ("returning", 3, 12)
    assert session.contributions["included"] > included
    assert resumed.optimizer_steps == 7
    assert [reason for reason, _ in departures(server, "returning", 2)] == ["left", "left"]


def test_a_lightning_trainer_of_several_processes_is_refused(lightning: Any) -> None:
    from loscar_worker.integrations.lightning import LoscarCallback

    callback = LoscarCallback("127.0.0.1:1")
    with pytest.raises(ConfigError, match="one process is one worker"):
        callback.on_train_start(SimpleNamespace(world_size=2), lightning_net(lightning))  # type: ignore[arg-type]


# --- Hugging Face -------------------------------------------------------------------------------------------


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`transformers`, which must look nothing up elsewhere."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="transformers is not installed")


def huggingface_trainer(transformers: Any, folder: Path, model: nn.Module, callback: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"num_train_epochs": 100_000, "save_strategy": "no", "logging_steps": 2}
    arguments = transformers.TrainingArguments(
        **(settings | options),
        output_dir=str(folder),
        gradient_accumulation_steps=ACCUMULATE,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[callback])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def test_huggingface_trains_until_the_run_is_over(processes: Processes, huggingface: Any, tmp_path: Path) -> None:
    from loscar_worker.integrations.huggingface import LoscarCallback

    server = processes.server(*RUN, "--workers", "2", "--rounds", "6")
    model, other = Net(), Net(1)
    with beside(server, other, other), LoscarCallback(server.address, name="huggingface") as callback:
        trainer = huggingface_trainer(huggingface, tmp_path, model, callback)
        trainer.train()
    session = callback.session
    assert session is not None
    assert session.finished
    assert session.steps == trainer.state.global_step
    assert model.forwards == ACCUMULATE * session.steps
    assert session.contributions["included"] == 7
    assert np.array_equal(model.vector(), other.vector())
    noted = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    reported = session.report().loss  # the mean of those since the last heartbeat
    assert reported is not None
    assert min(noted) - 1e-6 <= reported <= max(noted) + 1e-6
    assert departures(server, "huggingface")[0][0] == "finished"


def test_huggingface_tells_the_server_of_an_exception(processes: Processes, huggingface: Any, tmp_path: Path) -> None:
    from loscar_worker.integrations.huggingface import LoscarCallback

    server = processes.server(*RUN, "--workers", "1")
    model = Net()
    model.fails_at = 20
    callback = LoscarCallback(server.address, name="inside")
    trainer = huggingface_trainer(huggingface, tmp_path, model, callback)
    with pytest.raises(ArithmeticError), callback:
        trainer.train()
    assert departures(server, "inside") == [("failed", "ArithmeticError: the batch is broken")]

    # Without the block it is left open, until the next training.
    model = Net()
    model.fails_at = 20
    callback = LoscarCallback(server.address, name="outside")
    with pytest.raises(ArithmeticError):
        huggingface_trainer(huggingface, tmp_path, model, callback).train()
    left_open = callback.session
    assert left_open is not None
    assert left_open.connected
    huggingface_trainer(huggingface, tmp_path, model, callback, max_steps=2).train()
    assert callback.session is not left_open
    assert [reason for reason, _ in departures(server, "outside", 2)] == ["left", "left"]


def test_huggingface_checkpoints_bring_the_worker_back(
    processes: Processes, huggingface: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from loscar_worker.integrations.huggingface import LoscarCallback

    def model() -> Any:
        config = huggingface.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        return huggingface.GPT2LMHeadModel(config)

    class Tokens(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 4 * BATCHES

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            tokens = (torch.arange(8) + index) % 11
            return {"input_ids": tokens, "labels": tokens}

    def trainer(callback: Any, steps: int) -> Any:
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 5}
        made = huggingface_trainer(huggingface, tmp_path, model(), callback, **options)
        made.train_dataset = Tokens()
        return made

    server = processes.server(*RUN, "--workers", "1")
    with LoscarCallback(server.address, name="returning", slot=3) as callback:
        trainer(callback, 5).train()
    assert callback.session is not None
    included = callback.session.contributions["included"]
    with LoscarCallback(server.address) as callback:
        trainer(callback, 12).train(resume_from_checkpoint=True)
    session = callback.session
    assert session is not None
    assert (session.name, session.slot, session.steps) == ("returning", 3, 12)
    assert session.contributions["included"] > included
    assert [reason for reason, _ in departures(server, "returning", 2)] == ["left", "left"]

    (tmp_path / "checkpoint-12" / "loscar.pt").unlink()
    with caplog.at_level(logging.WARNING), LoscarCallback(server.address, name="new") as callback:
        trainer(callback, 14).train(resume_from_checkpoint=True)
    assert "loscar.pt is not there: this worker joins as a new one" in caplog.text
    assert callback.session is not None
    assert callback.session.steps == 2


def test_a_huggingface_trainer_of_several_processes_is_refused(huggingface: Any) -> None:
    from loscar_worker.integrations.huggingface import LoscarCallback

    callback: Any = LoscarCallback("127.0.0.1:1")
    with pytest.raises(ConfigError, match="one process is one worker"):
        callback.on_train_begin(SimpleNamespace(world_size=2), None, None, model=Net())
