"""`charlm`: a small GPT that predicts the next character of one text file, by default tiny Shakespeare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loscar_core.errors import ConfigError
from loscar_worker.tasks.base import ArrayDataset, Batch, Task
from loscar_worker.tasks.files import corrupt, read_bytes, require_file, resolve_data_dir
from loscar_worker.tasks.models import Gpt

SOURCE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CONTEXT = 128
TRAIN_SHARE = 0.9
_SECTIONS = 10


class WindowDataset(ArrayDataset):
    """Consecutive windows of a text: sample i starts at character i * context.

    codes: int64 tensor (characters,), at least context + 1 of them. Inputs are int64 (context,), targets the
    same shifted by one. jitter: `take` moves every start by a random 0..context-1 characters, so that
    training sees all alignments while each window still comes once an epoch. Raises ValueError where the text
    is too short.
    """

    def __init__(self, codes: Tensor, context: int, *, jitter: bool) -> None:
        if len(codes) < context + 1:
            raise ValueError(f"{len(codes)} characters make no window of {context}")
        super().__init__(codes[:-1].unfold(0, context, context), codes[1:].unfold(0, context, context), random=jitter)
        self._codes = codes
        self._jitter = context if jitter else 0
        self._span = torch.arange(context + 1)

    def take(self, indices: Tensor, generator: torch.Generator | None = None) -> Batch:
        context = len(self._span) - 1
        starts = indices * context
        if self._jitter:
            starts = starts + torch.randint(0, self._jitter, starts.shape, generator=generator)
            starts = starts.clamp_(max=len(self._codes) - context - 1)
        windows = self._codes[starts[:, None] + self._span]
        return windows[:, :-1], windows[:, 1:]


class CharLm(Task):
    """GPT with 4 layers, 4 heads, width 128 and a context of 128 characters, 0.83 M parameters.

    Reads the UTF-8 text `tinyshakespeare/input.txt` from the data folder; its first 90 % are for training.
    The vocabulary is the text's own set of characters in order, so all workers of a run need the same file.
    Accuracy is that of the next character. AdamW on a constant learning rate.

    Raises DataMissingError where the file is missing, ConfigError where it is not UTF-8 or too short.
    """

    weight_decay = 0.1
    evaluation_chunk = 64

    def __init__(self, data_dir: Path | None = None, *, batch_size: int | None = None, lr: float | None = None) -> None:
        path = require_file(
            "charlm", resolve_data_dir(data_dir) / "tinyshakespeare" / "input.txt", "a UTF-8 text", SOURCE
        )
        try:
            text = read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise corrupt(path, f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
        characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        vocabulary, codes = np.unique(characters, return_inverse=True)
        split = int(len(codes) * TRAIN_SHARE)
        if min(split, len(codes) - split) < CONTEXT + 1:
            raise corrupt(path, f"its {len(codes)} characters are too few for windows of {CONTEXT}")
        self.vocabulary = "".join(map(chr, vocabulary.tolist()))
        tokens = torch.from_numpy(codes.astype(np.int64))
        super().__init__(
            "charlm",
            WindowDataset(tokens[:split], CONTEXT, jitter=True),
            WindowDataset(tokens[split:], CONTEXT, jitter=False),
            batch_size=16,
            lr=1e-3,
        )
        self.configure(batch_size=batch_size, lr=lr)

    def build_model(self) -> nn.Module:
        return Gpt(len(self.vocabulary), context=CONTEXT, width=128, layers=4, heads=4)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW; the decay acts on matrices only, not on biases and normalisation gains."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.99))

    def hyper_parameters(self) -> dict[str, str | int | float]:
        return {
            "optimizer": "AdamW",
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "batch_size": self.batch_size,
            "context": CONTEXT,
        }

    def labels(self) -> NDArray[np.generic]:
        """The tenth of the training text that a window lies in, 0 to 9: other plays, other speakers."""
        return np.arange(len(self.train), dtype=np.int64) * _SECTIONS // len(self.train)

    @torch.no_grad()
    def generate(self, model: nn.Module, prompt: str, n: int, *, temperature: float = 0.8, seed: int = 0) -> str:
        """Continue `prompt` (at least one character) by `n` sampled characters; returns only those.

        temperature: above 0; lower is more conservative. seed: of the sampling, which is repeatable.
        Raises ConfigError for an empty prompt, characters that the vocabulary lacks, n < 0 or temperature <=
        0.
        """
        unknown = sorted(set(prompt) - set(self.vocabulary))
        if not prompt or unknown:
            reason = f"characters that are not in the text: {unknown}" if unknown else "no character"
            raise ConfigError(f"the prompt holds {reason}")
        if n < 0 or not temperature > 0:
            raise ConfigError(f"cannot generate {n} characters at temperature {temperature}")
        generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        tokens = [self.vocabulary.index(character) for character in prompt]
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            for _ in range(n):
                window = torch.tensor([tokens[-CONTEXT:]], device=device)
                logits = model(window)[0, -1].float().cpu() / temperature
                tokens.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
        finally:
            for module, mode in modes:
                module.training = mode
        return "".join(self.vocabulary[token] for token in tokens[len(prompt) :])
