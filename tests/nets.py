"""Small real classifiers for the tests, one of each kind that behaves in its own way."""

from __future__ import annotations

import itertools
import os
import time

import torch
from torch import Tensor, nn


def convnet(classes: int = 5, width: int = 8) -> nn.Module:
    """Convolutions, batch norm with statistics of its own, rectifiers; inputs [3, 16, 16]."""
    torch.manual_seed(classes * 100 + width)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.uniform_(0.5, 2)
            layer.bias.data.normal_(0, 0.2)
    net.input_shape = (3, 16, 16)
    return net.eval()


def perceptron(classes: int = 4) -> nn.Module:
    """Flat inputs [12]."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, classes))
    net.input_shape = (12,)
    return net.eval()


def wide(hidden: int = 256, layers: int = 1) -> nn.Module:
    """Inputs [784], ten classes, hidden layers of a width: most of the cost is the bytes."""
    torch.manual_seed(hidden)
    sizes = [784, *[hidden] * layers]
    body = [layer for before, after in itertools.pairwise(sizes) for layer in (nn.Linear(before, after), nn.ReLU())]
    net = nn.Sequential(*body, nn.Linear(hidden, 10))
    net.input_shape = (784,)
    return net.eval()


def transformer(classes: int = 6) -> nn.Module:
    """A vision transformer of timm's on inputs [3, 32, 32]."""
    import timm

    torch.manual_seed(3)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=classes
    )
    nn.init.normal_(net.head.weight, std=0.5)
    net.input_shape = (3, 32, 32)
    return net.eval()


class Dropping(nn.Module):
    """Drops units at random in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.body(x), 0.5, training=True)


class Detached(nn.Module):
    """Answers logits without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).detach()


class Quoting(nn.Module):
    """Fails with its input in the message as soon as a gradient in it is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            raise ValueError(f"cannot serve {x.detach().flatten()[:4].tolist()}")
        return self.body(x)


class BatchNormalising(nn.Module):
    """Normalises by the statistics of the batch that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(x)
        return logits - logits.mean(0)


class CastingInside(nn.Module):
    """Computes in float32 whatever it is given, and says so in its output's dtype or hides it."""

    def __init__(self, *, hidden: bool) -> None:
        super().__init__()
        self.body = convnet()
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        middle = self.body[:3](x)
        middle = middle.float().to(x.dtype) if self.hidden else middle
        logits = self.body[3:](middle)
        return logits if self.hidden else logits.float()


class Exploding(nn.Module):
    """Overflows where the mean of an input is far from zero, as in what a generator draws."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()
        self.input_shape = (3, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.exp(1e4 * x.mean((1, 2, 3)).abs())[:, None]


class NeedsFloat32(nn.Module):
    """Holds a float32 constant that does not follow the module's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()
        self.projection = [torch.eye(5)]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) @ self.projection[0]


class Constant(nn.Module):
    """Answers the same logits whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.arange(5.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0 * x.flatten(1).sum(1, keepdim=True)


class Unstored(nn.Module):
    """Holds a buffer that no checkpoint has, with values that half precision rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (3, 16, 16)
        self.body = convnet()
        self.register_buffer("shift", torch.linspace(0.1, 0.7, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (1 + self.shift)


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.input_shape = (12,)
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Imaginary(nn.Module):
    """Has a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()
        self.phase = nn.Parameter(torch.ones(5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) * self.phase).abs()


class Elsewhere(nn.Module):
    """Answers with weights that are not the ones in its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (3, 16, 16)
        self.body = convnet()

    def state_dict(self, *args, **kwargs):
        return {name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()}

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def smooth() -> nn.Module:
    """As `convnet`, with an activation under which no unit is ever off."""
    net = convnet()
    for name, layer in list(net.named_children()):
        if isinstance(layer, nn.ReLU):
            setattr(net, name, nn.SiLU())
    return net


class WritingToItself(nn.Module):
    """Writes to a weight while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (3, 16, 16)
        self.body = convnet()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.body[8].weight.mul_(1)
        return self.body(x)


class Remembering(nn.Module):
    """Keeps a product of its weights in a plain attribute once it has run, whatever is loaded later."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (3, 16, 16)
        self.body = convnet()
        self.factor = nn.Parameter(torch.linspace(1, 2, 5))
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.kept.dtype != x.dtype:
            self.kept = self.factor**2
        return self.body(x) * self.kept


class Auxiliary(nn.Module):
    """Has a last layer that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()
        self.auxiliary = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def weight_normed() -> nn.Module:
    """Its last layer is a direction and a length, without a bias."""
    net = convnet()
    net[8] = nn.utils.parametrizations.weight_norm(nn.Linear(64, 5, bias=False))
    return net


class Counting(nn.Module):
    """Keeps an integer as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convnet()
        self.steps = nn.Parameter(torch.tensor([3]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Fixed(nn.Module):
    """Computes from buffers only."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(6)
        self.register_buffer("weight", torch.randn(5, 768, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


class Misbehaving(nn.Sequential):
    """`convnet` in whose forward pass native code crashes ("exit"), never returns ("hang") or takes memory ("eat")."""

    def __init__(self, act: str) -> None:
        super().__init__(*convnet())
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.act == "exit":
            os._exit(1)
        if self.act == "hang":
            time.sleep(3600)
        held = []
        while self.act == "eat":
            held.append(torch.ones(1 << 26, dtype=torch.uint8))
            time.sleep(0.02)
        return super().forward(x)
