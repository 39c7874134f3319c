"""The paper's method, the baseline of every comparison: 100 triggers drawn by a trained generator.

Yin, Yin, Zhang, "Neural network fragile watermarking with no model performance degradation", ICIP 2022
(arXiv 2208.07585), with the settings of the authors' code. Noise and initial weights come from the
secret key here, and the labels that end the training are those of the triggers that are returned.

The triggers are NOT at a boundary: the loss settles at the distance that `margin` gives. They are not
clamped to the input range either, as the paper's generator ends without an activation.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fwm_audit.errors import EmbeddingError, ErrorCode, UsageError
from fwm_audit.generator import normal
from fwm_audit.key import SecretKey
from fwm_audit.target import Target
from fwm_audit.task import Progress, Report
from fwm_audit.verification import ask

COUNT: Final = 100
NOISE_SIZE: Final = 512
CHANNELS: Final = 512
WEIGHT: Final = 150.0
_START: Final = 4  # pixels of the first feature map
_WIDE_SIDE: Final = 32  # pixels up to which the feature maps keep all channels


class Generator(nn.Module):
    """Progressive-GAN generator from noise [N, 512] to inputs [N, *input_shape] of any magnitude.

    Karras et al., ICLR 2018 (arXiv 1710.10196), grown to its last stage and without blending, as in
    facebookresearch/pytorch_GAN_zoo, which the authors used. Each stage doubles the side from 4 pixels
    until the input's is reached, 32 for the paper's data sets; what is beyond the input is cut off.
    Initial weights are N(0, 1), biases zero.
    """

    def __init__(self, input_shape: tuple[int, ...], key: SecretKey, channels: int = CHANNELS) -> None:
        super().__init__()
        _, self.height, self.width = input_shape

        def equalised(*shape: int) -> _Equalised:
            # Numbered in the order of the layers; every secret weight has a purpose of its own.
            return _Equalised(normal(key, f"yin2022/weight/{len(layers)}", shape))

        layers: list[nn.Module] = [_PixelNorm()]
        layers += [equalised(channels * _START**2, NOISE_SIZE), nn.LeakyReLU(0.2)]
        layers += [nn.Unflatten(1, (channels, _START, _START)), _PixelNorm()]
        layers += [equalised(channels, channels, 3, 3), nn.LeakyReLU(0.2), _PixelNorm()]
        side, wide = _START, channels
        while side < max(self.height, self.width):
            side *= 2
            narrow = channels * _WIDE_SIDE // max(side, _WIDE_SIDE)
            layers += [_Doubled(equalised(narrow, wide, 3, 3)), nn.LeakyReLU(0.2), _PixelNorm()]
            layers += [equalised(narrow, narrow, 3, 3), nn.LeakyReLU(0.2), _PixelNorm()]
            wide = narrow
        layers += [equalised(input_shape[0], wide, 1, 1)]
        self.body = nn.Sequential(*layers)

    def forward(self, noise: Tensor) -> Tensor:
        """Inputs [N, *input_shape] for noise [N, NOISE_SIZE]."""
        drawn: Tensor = self.body(noise)
        return drawn[:, :, : self.height, : self.width]


class _Equalised(nn.Module):
    """A linear layer [out, in] or a convolution [out, in, k, k] whose output is scaled by sqrt(2 / fan-in).

    He's constant at run time instead of in the initial weights: Adam then moves every layer at one
    relative speed. It scales the bias too, as in pytorch_GAN_zoo.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)))
        self.scale = math.sqrt(2 / weight[0].numel())

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * self.scale, self.bias * self.scale
        if weight.dim() == 2:
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, padding="same")


class _Doubled(nn.Module):
    """A 3 x 3 convolution of the map at twice its size, every pixel repeated, in 4 ninths of the operations.

    Of three rows of the large map two are the same row of the small one: an even row sees the one before
    through w0 and its own through w1 + w2, an odd row its own through w0 + w1 and the next through w2.
    """

    def __init__(self, inner: _Equalised) -> None:
        super().__init__()
        self.inner = inner
        rows = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [odd, small row, large row]
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.inner.weight * self.inner.scale, self.inner.bias * self.inner.scale
        _, _, height, width = x.shape
        # One kernel [in, 2, 2] for each output channel o and each place p, q among the four pixels made of one.
        kernels = torch.einsum("oiyx,pay,qbx->opqiab", weight, self.rows, self.rows).flatten(0, 2)
        bias = bias.repeat_interleave(4)
        sums = functional.conv2d(x, kernels, bias, padding=1).unflatten(1, (-1, 2, 2))
        places = [[sums[:, :, p, q, p : p + height, q : q + width] for q in (0, 1)] for p in (0, 1)]
        return torch.stack([torch.stack(line, -1).flatten(-2) for line in places], 3).flatten(2, 3)


class _PixelNorm(nn.Module):
    """Divides every pixel's feature vector by its root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Scalar CE(f, key) + 150 Var(softmax f) for logits [B, K], labels int64 [B]; unbiased, over all B x K values."""
    return functional.cross_entropy(logits, labels) + WEIGHT * logits.softmax(1).var()


def margin(num_classes: int, weight: float = WEIGHT) -> float:
    """Where the loss settles: the label's logit over the others, all alike; +inf from K = 2 w on, where it never does.

    With p on the label, the rest even, population variance: L(p) = -ln p + w (p - 1/K)^2 / (K - 1), so
    L'(p) = 0 at p (p - 1/K) = (K - 1) / (2 w), and the margin is ln(p (K - 1) / (1 - p)). A real model's
    other logits are not alike, and the runner-up stays nearer: 0.75 to 0.82 where this says 0.99 (measured).
    """
    if num_classes >= 2 * weight:
        return math.inf
    half = 0.5 / num_classes
    p = half + math.sqrt(half**2 + (num_classes - 1) / (2 * weight))
    return math.log(p * (num_classes - 1) / (1 - p))


def make(
    target: Target, key: SecretKey, report: Report, *, stop_early: bool = True, steps: int = 300
) -> tuple[Tensor, Tensor]:
    """The triggers, float32 [100, *shape] on the CPU, and their labels 0..K-1 repeated, int64 [100].

    A step costs 5e12 floating-point operations at 32 x 32 pixels: this is work for a GPU. The same key
    repeats the triggers bit for bit on the same processor with the same number of threads only:
    hundreds of float32 steps amplify any other rounding to another set (measured: 1 thread against 2).

    Args:
        target: The target classifier.
        key: Fixes the noise and the generator's initial weights.
        report: Called with the loss before each step and after the last one.
        stop_early: End as soon as every label equals the key, as the authors do; the margins are then
            smaller than where the loss settles.
        steps: Adam steps at most.

    Raises:
        UsageError: The inputs are not images.
        EmbeddingError: Some triggers lack their label after the last step, or the training diverged.
    """
    if len(target.shape) != 3:
        raise UsageError(
            f"method yin2022 draws images [channels, height, width] and the inputs are {list(target.shape)}: "
            "use method mirror"
        )
    net = Generator(target.shape, key).to(target.device)
    noise = normal(key, "yin2022/noise", (COUNT, NOISE_SIZE)).to(target.device)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, betas=(0.5, 0.999))
    return train(target, net, optimizer, noise, report, stop_early=stop_early, steps=steps)


def train(
    target: Target,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    noise: Tensor,
    report: Report,
    *,
    stop_early: bool,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """As `make`, with this generator and this noise [B, NOISE_SIZE]: inputs [B, *shape] and labels [B] on the CPU."""
    labels = torch.arange(len(noise), device=target.device) % target.num_classes
    whole = len(noise) <= _chunk(target.shape)
    for step in range(steps + 1):
        with torch.set_grad_enabled(whole):
            inputs, logits = _forward(target, net, noise)
        if not whole:
            logits.requires_grad_()
        value = loss(logits, labels)
        if not math.isfinite(value.item()):
            raise EmbeddingError(
                ErrorCode.PAIRS_NOT_FOUND, f"the generator's training diverged at step {step}: use method mirror"
            )
        report(Progress("yin2022", step, steps, value.item()))
        last = step == steps
        if last or (stop_early and torch.equal(logits.argmax(1), labels)):
            # As an audit will read them: float32 on a GPU may round a small margin to the other side.
            reached = int((target.run(target.released, inputs).argmax(1) == labels.cpu()).sum())
            if reached == len(noise):
                return inputs, labels.cpu()
            if last:
                break
        optimizer.zero_grad()
        if whole:
            value.backward()
        else:
            _backward(target, net, noise, torch.autograd.grad(value, logits)[0])
        optimizer.step()
    raise EmbeddingError(
        ErrorCode.PAIRS_NOT_FOUND,
        f"{reached} of {len(noise)} triggers have their label after {steps} steps: the paper's generator does not "
        "reach them on this model; use method mirror",
    )


def _forward(target: Target, net: nn.Module, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [B, *shape] on the CPU, without a graph, and logits [B, K] on the target's device."""
    inputs, logits = [], []
    for part in noise.split(_chunk(target.shape)):
        drawn = net(part)
        inputs.append(drawn.detach().cpu())
        logits.append(ask(target.trainee, drawn))
    return torch.cat(inputs), torch.cat(logits)


def _backward(target: Target, net: nn.Module, noise: Tensor, slope: Tensor) -> None:
    """Adds d loss / d weights to the generator's gradients, given slope = d loss / d logits [B, K].

    The variance couples all triggers, so the loss is no sum over chunks of them; its gradient is, once
    the logits of all triggers are known.
    """
    chunk = _chunk(target.shape)
    for part, part_slope in zip(noise.split(chunk), slope.split(chunk), strict=True):
        ask(target.trainee, net(part)).backward(part_slope)


def _chunk(shape: tuple[int, ...]) -> int:
    """Triggers for one pass: activations grow with the side, as channels halve from 32 pixels on where it doubles."""
    return max(1, 1600 // max(shape[1:]))
