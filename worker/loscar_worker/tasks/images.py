"""From stored uint8 images to what a network takes: random crop and flip, then normalisation, all
vectorised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


class ImageTransform:
    """Callable that turns uint8 images (b, c, h, w) into normalised float32 ones of the same shape.

    mean, std: one value per channel, of pixels scaled to 0..1. pad: width in pixels of the black border from
    whose inside a random h x w window is cropped per image, 0 for none. flip: mirror each image with
    probability 1/2.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, pad: int = 0, flip: bool = False) -> None:
        # (x / 255 - mean) / std as one multiply and one add.
        self._scale = (1.0 / (255.0 * torch.tensor(std))).view(1, -1, 1, 1)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1)
        self._pad = pad
        self._flip = flip

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        if self._pad:
            images = random_crop(images, self._pad, generator)
        if self._flip:
            images = random_flip(images, generator)
        return images.float().mul_(self._scale).add_(self._shift)


def random_crop(images: Tensor, pad: int, generator: torch.Generator | None = None) -> Tensor:
    """Zero-pad (b, c, h, w) by `pad` on all sides and crop one uniformly placed h x w window per image."""
    height, width = images.shape[-2:]
    offsets = torch.randint(0, 2 * pad + 1, (2, len(images)), generator=generator)
    padded = functional.pad(images, (pad, pad, pad, pad))
    # A view of all (2 pad + 1)^2 windows; only the chosen ones are copied.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images)), :, offsets[0], offsets[1]]


def random_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirror each image of (b, c, h, w) left to right with probability 1/2."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(3), images)
