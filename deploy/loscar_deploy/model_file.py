"""The saved model: a safetensors file with the trained tensors under their module names.

Only what is trained and averaged is in it (parameters and statistics, float32); everything else of a module comes
from building it again, so a file fits any module with the same names and shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from loscar_core.errors import ConfigError, DataMissingError
from loscar_core.layout import VECTOR_PREFIX, Segment, offsets
from loscar_core.replica import Floats
from loscar_deploy.client import FetchedModel

if TYPE_CHECKING:
    from torch import nn


def save_model(path: Path, model: FetchedModel, run_id: str) -> None:
    """Write the model; whole or not at all."""
    tensors: dict[str, Floats] = {}
    for segments, values in (
        (model.layout.parameters, model.vector),
        (model.layout.statistics, model.statistics),
    ):
        tensors.update(_tensors(segments, values))
    metadata = {
        "format": "loscar",
        "run": run_id,
        "epoch": str(model.position.epoch),
        "round": str(model.position.round),
    }
    part = path.with_suffix(".part")
    try:
        part.write_bytes(save(tensors, metadata))  # not by save_file, whose errors are no OSErrors
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)  # half a file would only keep the disk full
        raise


def _tensors(segments: tuple[Segment, ...], values: Floats) -> dict[str, Floats]:
    starts = offsets(segments)
    return {
        s.name: np.ascontiguousarray(values[start : start + s.size]).reshape(s.shape)
        for s, start in zip(segments, starts, strict=False)
        if not s.name.startswith(VECTOR_PREFIX)
    }


def load_model(path: Path, module: nn.Module) -> None:
    """Load a saved model into a module.

    Raises:
        DataMissingError: there is no such file.
        ConfigError: it is not a saved model, or not of this module; names the first tensor that does not fit.
    """
    import torch

    if not path.is_file():
        raise DataMissingError(f"there is no model at {path}")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} is not a saved model: {error}") from None
    state = module.state_dict()
    for name, values in tensors.items():
        if name not in state:
            raise ConfigError(f"{path} holds {name}, which this task's model has not")
        if tuple(state[name].shape) != values.shape:
            raise ConfigError(f"{path} holds {name} as {values.shape}, this task's model as {tuple(state[name].shape)}")
    missing = [n for n, p in module.named_parameters() if p.requires_grad and n not in tensors]
    if missing:
        raise ConfigError(f"{path} lacks {missing[0]}, which this task's model trains")
    module.load_state_dict({n: torch.from_numpy(v) for n, v in tensors.items()}, strict=False)
