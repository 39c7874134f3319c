"""The target classifier as an embedding sees it: copies in float64, what it tells about itself, its boundaries.

The model itself is never run in another mode, moved or written to: everything happens on copies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from fwm_audit.errors import ErrorCode, ModelError
from fwm_audit.verification import device_of, float64_copy, run

#: Spacing of float64 at 1, the unit of rounding of a logit near 1.
EPS: Final = 2.0**-52


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """The target classifier in float64, one copy for each variant, and in float32 for training.

    Attributes:
        twins: By variant, the released one first: float64 copies of the weights as they would load.
        trainee: Frozen float32 copy through which the generator's gradients flow.
        scale: Spread of the logits of one plain input, the unit of every margin of the embedding.
        magnitude: Largest logit of plain inputs, the unit of rounding.
    """

    twins: dict[str, nn.Module]
    trainee: nn.Module
    shape: tuple[int, ...]
    range: tuple[float, float]
    device: torch.device
    num_classes: int
    scale: float
    magnitude: float

    @classmethod
    def of(
        cls,
        model: nn.Module,
        shape: tuple[int, ...],
        input_range: tuple[float, float],
        variants: Sequence[str],
        device: torch.device,
        released: str,
    ) -> Target:
        """Copies of the model, after it has shown that it can carry a watermark.

        Raises:
            ModelError: It holds NaN, is stochastic, does not run in float64, or has fewer than two classes.
        """
        twins = _twins(model, released, variants, device)
        trainee = float64_copy(model, device).float()
        logits = _probe(next(iter(twins.values())), trainee, shape, input_range, device)
        scale = (logits - logits.mean(1, keepdim=True)).std().item()
        if scale == 0:
            raise ModelError(ErrorCode.MODEL_UNSUITABLE, "the model answers equal logits for all classes")
        if scale < 1e-6 * logits.abs().max().item():
            raise ModelError(
                ErrorCode.MODEL_UNSUITABLE,
                "the logits differ by less than float32 resolves: remove a large common offset from them",
            )
        return cls(twins, trainee, shape, input_range, device, logits.shape[1], scale, logits.abs().max().item())

    @property
    def released(self) -> nn.Module:
        """The model as released, in float64."""
        return next(iter(self.twins.values()))


def gap_and_lead(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """gap = f_a - f_b and lead = min(f_a, f_b) - max of all others, each [N]; lead is +inf for K = 2."""
    both = logits.gather(1, classes.to(logits.device))
    others = logits.scatter(1, classes.to(logits.device), -math.inf)
    return both[:, 0] - both[:, 1], both.min(1).values - others.max(1).values


def executions(target: Target, model: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Logits of the same inputs under every benign way of execution that this machine offers."""
    yield run(model, inputs, target.device)
    yield torch.cat([run(model, one, target.device) for one in inputs.split(1)])
    yield torch.cat([run(model, part, target.device) for part in inputs.split(3)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        yield run(model, inputs, target.device)
    finally:
        torch.set_num_threads(threads)
    if inputs.dim() == 4:
        yield run(model, inputs.to(memory_format=torch.channels_last), target.device)


def _twins(model: nn.Module, base: str, variants: Sequence[str], device: torch.device) -> dict[str, nn.Module]:
    """Float64 copies by variant: the weights as released, and rounded to each declared dtype."""
    released = float64_copy(model, device)
    for name, tensor in itertools.chain(released.named_parameters(), released.named_buffers()):
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ModelError(ErrorCode.NON_FINITE, f"{name} holds NaN: release a sound checkpoint first")
    return {base: released} | {name: rounded(released, getattr(torch, name)) for name in variants if name != base}


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose state dict went through `dtype`, as in a cast checkpoint; buffers that no file holds stay."""
    twin = float64_copy(model, device_of(model))
    for tensor in twin.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return twin


def _probe(
    model: nn.Module,
    trainee: nn.Module,
    shape: tuple[int, ...],
    input_range: tuple[float, float],
    device: torch.device,
) -> Tensor:
    """Logits [4, K] of plain inputs; refuses a model that cannot be served, with the reason."""
    low, high = input_range
    ramp = torch.arange(4 * math.prod(shape), dtype=torch.float64)
    # Any fixed inputs do: the fractional parts of multiples of the golden ratio fill the range evenly.
    inputs = (low + (high - low) * (ramp * 0.6180339887498949 % 1.0)).reshape(4, *shape)
    try:
        first = run(model, inputs, device, quote=True)
    except ModelError:
        _explain_failure(trainee, inputs, device)
        raise
    if first.shape[1] < 2:
        raise ModelError(
            ErrorCode.MODEL_UNSUITABLE,
            f"the model answers {first.shape[1]} logit(s): boundaries need at least two classes",
        )
    if not torch.isfinite(first).all():
        raise ModelError(ErrorCode.NON_FINITE, "the model answers NaN or infinite logits on plain inputs")
    magnitude = first.abs().max().item()
    if (first - run(model, inputs, device)).abs().max().item() > 1e-9 * magnitude:
        raise ModelError(
            ErrorCode.MODEL_STOCHASTIC,
            "the model answers the same input differently each time: switch off dropout or sampling in eval mode",
        )
    difference = (first[:1] - run(model, inputs[:1], device)).abs().max().item()
    if difference > 1e-4 * magnitude:
        raise ModelError(
            ErrorCode.MODEL_STOCHASTIC,
            "the model's answer to one input depends on the others in the batch: normalise by running statistics",
        )
    # A relative step of 1e-8 forth and back moves float64 logits by opposite amounts; float32 anywhere inside
    # rounds the step away or turns it into jumps.
    forth, back = (run(model, inputs + step, device) - first for step in (1e-8 * (high - low), 1e-8 * (low - high)))
    moved, uneven = forth.abs().max().item(), (forth + back).abs().max().item()
    varies = (first - first[:1]).abs().max().item() > 1e-9 * magnitude
    if first.dtype != torch.float64 or difference > 1e-10 * magnitude or uneven > 0.1 * moved or (varies and not moved):
        raise lower_precision()
    return first


def _explain_failure(trainee: nn.Module, inputs: Tensor, device: torch.device) -> None:
    """Raise NO_FLOAT64 where the model does run in float32; return where it does not run at all."""
    try:
        run(trainee, inputs.float(), device)
    except ModelError:
        return
    raise lower_precision()


def lower_precision() -> ModelError:
    """The error for a model that computes in less than float64 although its weights are float64."""
    return ModelError(
        ErrorCode.NO_FLOAT64,
        "the model does not compute in float64 although its weights are: remove casts such as .float(), "
        "autocast and float32 constants from forward()",
    )
