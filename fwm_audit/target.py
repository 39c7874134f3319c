"""The target classifier as an embedding sees it: copies, what it tells about itself, its boundaries.

The model itself is never run in another mode, moved or written to: everything happens on copies,
in float64, or in float32 where the model casts to that inside.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fwm_audit.errors import ErrorCode, ModelError, UsageError
from fwm_audit.folding import find_folds, fold
from fwm_audit.triggers import FOLDED
from fwm_audit.verification import device_of, float64_copy, run

#: Largest difference of plain logits between two passes, in units of the largest, that is no randomness.
_SAME: Final = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """The target classifier on copies: one for each variant, and one in float32 for training.

    Attributes:
        twins: By variant, the released one first: copies in `dtype` of the weights as they would load.
        trainee: Frozen float32 copy through which the generator's gradients flow.
        dtype: Arithmetic in which labels are taken.
        folds: Names of (convolution, batch norm) merged in the variant `folded`; empty if that is not declared.
        scale: Spread of the logits of one plain input, the unit of every margin of the embedding.
        magnitude: Largest logit of plain inputs, the unit of rounding.
    """

    twins: dict[str, nn.Module]
    trainee: nn.Module
    dtype: torch.dtype
    folds: tuple[tuple[str, str], ...]
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
        dtype: torch.dtype,
    ) -> Target:
        """Copies of the model, after it has shown that it can carry a watermark.

        Raises:
            ModelError: It holds NaN, is stochastic, does not compute in `dtype`, or has fewer than two classes.
            UsageError: The variant `folded` is declared and there is nothing to fold.
        """
        exact = float64_copy(model, device)
        for name, tensor in itertools.chain(exact.named_parameters(), exact.named_buffers()):
            if tensor.is_floating_point() and tensor.isnan().any():
                raise ModelError(ErrorCode.NON_FINITE, f"{name} holds NaN: release a sound checkpoint first")
        trainee = float64_copy(model, device).float()
        plain = _plain_inputs(shape, input_range)
        base = trainee if dtype is torch.float32 else exact
        logits = _probe(base, trainee, plain.to(dtype), device)
        folds = find_folds(base, lambda: run(base, plain[:2].to(dtype), device)) if FOLDED in variants else ()
        if FOLDED in variants and not folds:
            raise UsageError("variant 'folded' is declared, and no batch norm of the model can be merged")
        twins = {released: exact}
        for name in variants:
            if name == FOLDED:
                merged = run(fold(float64_copy(exact, device), folds).to(dtype), plain.to(dtype), device)
                if (merged - logits).abs().max() > 1e3 * _SAME[dtype] * logits.abs().max():
                    raise UsageError("variant 'folded': the model uses a layer's output beside its batch norm")
                # In the released dtype, as a deployment folds the file.
                narrow = getattr(torch, released, torch.float32)
                twins[name] = fold(float64_copy(exact, device), folds, narrow)
            elif name != released:
                twins[name] = rounded(exact, getattr(torch, name))
        twins = {name: twin.to(dtype) for name, twin in twins.items()}
        scale = (logits - logits.mean(1, keepdim=True)).std().item()
        magnitude = logits.abs().max().item()
        if scale == 0:
            raise ModelError(ErrorCode.MODEL_UNSUITABLE, "the model answers equal logits for all classes")
        if scale < 1e-6 * magnitude:
            raise ModelError(
                ErrorCode.MODEL_UNSUITABLE,
                "the logits differ by less than float32 resolves: remove a large common offset from them",
            )
        return cls(
            twins, trainee, dtype, folds, shape, input_range, device, logits.shape[1], scale, magnitude,
        )  # fmt: skip

    @property
    def released(self) -> nn.Module:
        """The model as released, in `dtype`."""
        return next(iter(self.twins.values()))

    @property
    def rounding(self) -> float:
        """Spacing of `dtype` at the largest plain logit, in logits."""
        return torch.finfo(self.dtype).eps * self.magnitude

    def plain(self, dtype: torch.dtype) -> Tensor:
        """Fixed inputs [4, *shape], within the range but of no meaning."""
        return _plain_inputs(self.shape, self.range).to(dtype)

    def run(self, model: nn.Module, inputs: Tensor, dtype: torch.dtype | None = None, **how: Any) -> Tensor:
        """Logits [N, K] of a copy in `dtype` (None: that of the labels), as float64 on the CPU; `how` is for `run`."""
        return run(model, inputs.to(dtype or self.dtype), self.device, **how).double()


def gap_and_lead(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """gap = f_a - f_b and lead = min(f_a, f_b) - max of all others, each [N]; lead is +inf for K = 2."""
    both = logits.gather(1, classes.to(logits.device))
    others = logits.scatter(1, classes.to(logits.device), -math.inf)
    return both[:, 0] - both[:, 1], both.min(1).values - others.max(1).values


def executions(target: Target, model: nn.Module, inputs: Tensor) -> list[Callable[[], Tensor | None]]:
    """The benign ways of execution: each gives logits [N, K] of the same inputs, or None where this machine cannot.

    The last one is the other kind of processor.
    """

    def pytorchs_own() -> Tensor | None:
        # On CUDA they are not exact.
        return None if target.device.type == "cuda" else target.run(model, inputs, batch=16, replaced=False)

    def other_threads() -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            return target.run(model, inputs)
        finally:
            torch.set_num_threads(threads)

    def channels_last() -> Tensor | None:
        return target.run(model, inputs.to(memory_format=torch.channels_last)) if inputs.dim() == 4 else None

    def other_processor() -> Tensor | None:
        if not torch.cuda.is_available():
            return None
        other = torch.device("cpu" if target.device.type == "cuda" else "cuda")
        # The model may know one kind of device only, and the other one may be full.
        with contextlib.suppress(ModelError, RuntimeError):
            return run(copy.deepcopy(model).to(other), inputs.to(target.dtype), other).double()
        return None

    return [
        lambda: target.run(model, inputs),
        lambda: target.run(model, inputs, batch=1),
        lambda: target.run(model, inputs, batch=16),
        pytorchs_own,
        other_threads,
        channels_last,
        other_processor,
    ]


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A float64 copy whose state dict went through `dtype`, as in a cast checkpoint; unsaved buffers stay."""
    twin = float64_copy(model, device_of(model))
    for tensor in twin.state_dict().values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return twin


def _plain_inputs(shape: tuple[int, ...], input_range: tuple[float, float]) -> Tensor:
    """float64 [4, *shape]; any fixed inputs do: multiples of the golden ratio fill the range evenly."""
    low, high = input_range
    ramp = torch.arange(4 * math.prod(shape), dtype=torch.float64)
    return (low + (high - low) * (ramp * 0.6180339887498949 % 1.0)).reshape(4, *shape)


def _probe(model: nn.Module, trainee: nn.Module, inputs: Tensor, device: torch.device) -> Tensor:
    """Logits float64 [4, K] of plain inputs; refuses a model that cannot be served, with the reason."""
    same = _SAME[inputs.dtype]
    try:
        first = run(model, inputs, device, quote=True)
    except ModelError:
        if model is not trainee:
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
    if (first - run(model, inputs, device)).abs().max().item() > same * magnitude:
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
    if inputs.dtype is not torch.float64:
        return first.double()
    # A relative step of 1e-8 forth and back moves float64 logits by opposite amounts; float32 anywhere inside
    # rounds the step away or turns it into jumps.
    step = 1e-8 * (inputs.max() - inputs.min()).item()
    forth, back = (run(model, inputs + signed, device) - first for signed in (step, -step))
    moved, uneven = forth.abs().max().item(), (forth + back).abs().max().item()
    varies = (first - first[:1]).abs().max().item() > same * magnitude
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
