"""The generator of trigger inputs, and everything about it that the secret key fixes.

Class pairs, noise and initial weights are functions of the secret key alone, expanded from full
256-bit subkeys (a seeded PRNG would cut the secret to its seed's 32 or 64 bits).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from fwm_audit.key import SecretKey

NOISE_SIZE: Final = 64
_START: Final = 7  # pixels of the first feature map; 7 doubles to 28 and to 224 without cropping


class Generator(nn.Module):
    """Upsampling convolutions from noise [N, 64] to inputs [N, *input_shape] within `input_range`.

    Inputs that are not images (rank other than 3) get a two-layer perceptron instead.
    """

    def __init__(self, input_shape: tuple[int, ...], input_range: tuple[float, float], key: SecretKey) -> None:
        super().__init__()
        self.input_shape = input_shape
        low, high = input_range
        self.center, self.radius = (low + high) / 2, (high - low) / 2
        # The layers' own random values are overwritten below; the fork leaves the caller's RNG alone.
        with torch.random.fork_rng(devices=[]):
            self.body = _image_layers(input_shape) if len(input_shape) == 3 else _flat_layers(input_shape)
        for name, parameter in self.body.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                draw = normal(key, f"generator/{name}", tuple(parameter.shape))
                parameter.data.copy_(draw * math.sqrt(2 / fan_in))
            elif name.endswith("bias"):
                parameter.data.zero_()

    def forward(self, noise: Tensor) -> Tensor:
        """Inputs [N, *input_shape] for noise [N, NOISE_SIZE]."""
        drawn = self.body(noise)
        if len(self.input_shape) == 3:
            drawn = drawn[:, :, : self.input_shape[1], : self.input_shape[2]]
        return self.center + self.radius * torch.tanh(drawn.reshape(-1, *self.input_shape))


def _image_layers(shape: tuple[int, ...]) -> nn.Sequential:
    channels, height, width = shape
    doublings = max(0, math.ceil(math.log2(max(height, width) / _START)))
    wide = 64
    layers: list[nn.Module] = [
        nn.Linear(NOISE_SIZE, wide * _START**2),
        nn.Unflatten(1, (wide, _START, _START)),
    ]
    for stage in range(doublings):
        # Most of the cost sits in the last, largest maps: they get few channels.
        narrow = max(8, 64 >> max(0, stage - 1))
        layers += [
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(wide, narrow, 3, padding=1),
            nn.GroupNorm(4, narrow),
            nn.LeakyReLU(0.2),
        ]
        wide = narrow
    return nn.Sequential(*layers, nn.Conv2d(wide, channels, 3, padding=1))


def _flat_layers(shape: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(NOISE_SIZE, 256), nn.LeakyReLU(0.2), nn.Linear(256, math.prod(shape)))


def normal(key: SecretKey, purpose: str, shape: tuple[int, ...]) -> Tensor:
    """float32 [*shape] of standard normal values for one purpose (Box-Muller over the key's stream)."""
    count = math.prod(shape)
    half = (count + 1) // 2
    words = np.frombuffer(key.stream(purpose, 16 * half), dtype="<u8") >> 11
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * math.pi * uniform[half:]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def noise(key: SecretKey, numbers: list[int]) -> Tensor:
    """float32 [len(numbers), NOISE_SIZE], the fixed noise of the pairs with these numbers."""
    return torch.stack([normal(key, f"noise/{number}", (NOISE_SIZE,)) for number in numbers])


def class_pairs(key: SecretKey, num_classes: int) -> Iterator[tuple[int, int]]:
    """Class pairs (a, b), a != b, without end: keyed rings of all classes, every second edge first.

    Ring r is a keyed permutation p of the K classes with the edges (p[i], p[i + 1]), closed. The even
    edges come first, so K / 2 pairs, that is K triggers, involve every class, and K pairs put every
    class on both sides of a boundary.
    """
    for ring in itertools.count():
        stream = key.stream(f"ring/{ring}", 16 * num_classes)
        order = sorted(range(num_classes), key=lambda i: stream[16 * i : 16 * i + 16])
        for start in (0, 1):
            for i in range(start, num_classes, 2):
                yield order[i], order[(i + 1) % num_classes]
