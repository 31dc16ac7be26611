"""The networks of the built-in tasks.

All initial values come from torch's global CPU generator, in a fixed order, so a seed decides them.
No two modules share a parameter: the synchronised coordinates are one run of distinct tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Fully connected layers with ReLU between them: (b, sizes[0]) float32 -> (b, sizes[-1])."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def small_cnn(classes: int) -> nn.Sequential:
    """Two convolutions and one linear layer for 28 x 28 grey images: (b, 1, 28, 28) -> (b, classes).

    28,938 parameters with 10 classes.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, classes),
    )


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class _Subsample(nn.Module):
    """The shortcut without parameters: every stride-th pixel, new channels filled with zeros."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation beside a shortcut: (b, inputs, h, w) ->
    (b, outputs, h / stride, w / stride).

    project: where shapes differ, a learned 1 x 1 convolution; else subsampling, which has no parameters.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, project: bool) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, 1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module
        if stride == 1 and inputs == outputs:
            self.shortcut = nn.Identity()
        elif project:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        else:
            self.shortcut = _Subsample(stride, outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for small colour images: (b, 3, h, w) float32 -> (b, classes).

    widths: channels per stage; blocks: blocks per stage; every stage but the first halves the resolution.
    stem_stride: stride of the first convolution (2 brings 64 x 64 images down to the cost of 32 x 32 ones).
    """

    def __init__(
        self, classes: int, widths: Sequence[int], blocks: int, *, project: bool, stem_stride: int = 1
    ) -> None:
        super().__init__()
        self.stem = _conv3x3(3, widths[0], stem_stride)
        self.norm = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(channels, width, stride, project=project))
                channels = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = self.stages(x)
        return cast(Tensor, self.head(x.mean(dim=(2, 3))))


def resnet20(classes: int) -> ResNet:
    """ResNet-20 for 32 x 32 images: 269,722 parameters with 10 classes."""
    return ResNet(classes, (16, 32, 64), 3, project=False)


def resnet18(classes: int, *, stem_stride: int = 1) -> ResNet:
    """ResNet-18 with a 3 x 3 stem and no pooling after it: 11,173,962 parameters with 10 classes."""
    return ResNet(classes, (64, 128, 256, 512), 2, project=True, stem_stride=stem_stride)


class _Attention(nn.Module):
    """Causal self-attention: (b, t, width) -> (b, t, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        return cast(Tensor, self.out(y.transpose(1, 2).reshape(batch, time, width)))


class _GptBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return cast(Tensor, x + self.feed_forward(self.norm2(x)))


class Gpt(nn.Module):
    """A small decoder-only transformer: int64 tokens (b, t), t <= context -> logits (b, t, vocabulary).

    No dropout: its draws would differ between workers and add nothing on a text this small in few steps.
    Raises ValueError when t exceeds `context`.
    """

    def __init__(self, vocabulary: int, *, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_GptBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                # The two layers that write into the residual stream are scaled down with its depth.
                into_stream = name.endswith(("attention.out", "feed_forward.2"))
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if into_stream else 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(f"{time} tokens exceed the context of {self.context}")
        positions = torch.arange(time, device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        return cast(Tensor, self.head(self.norm(self.blocks(x))))
