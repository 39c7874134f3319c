"""float64 as it should be: what PyTorch computes less exactly, or far slower, than the processor can.

A mode for the float64 passes of embeddings and audits. It replaces single functions by others that compute
the same in another order, which is what the distance of the triggers from their boundaries allows for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

#: Channels from which on the inner loop of a depthwise convolution is long enough to vectorise.
_CHANNELS: Final = 16


def float64_mode(batch: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The mode for a pass over this batch; it does nothing for other dtypes, nor on a CPU where gradients are taken."""
    if batch.dtype is not torch.float64 or (torch.is_grad_enabled() and not batch.is_cuda):
        return contextlib.nullcontext()
    return _Replaced(_EXACT if batch.is_cuda else _FAST)


class _Replaced(TorchFunctionMode):
    """Calls other functions in the place of some of PyTorch's."""

    def __init__(self, replacements: dict[Any, Callable[..., Tensor]]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        called: Callable[..., Any] = self._replacements.get(func, func)
        return called(*args, **kwargs or {})


def _hardswish(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002 - torch's signature
    return _into(input, input * (input + 3).clamp(0, 6) / 6, inplace=inplace)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002 - torch's signature
    return _into(input, (input + 3).clamp(0, 6) / 6, inplace=inplace)


def _into(given: Tensor, answer: Tensor, *, inplace: bool) -> Tensor:
    # A gradient needs what was given; no model reads that again where it asked for gradients and lost it.
    return given.copy_(answer) if inplace and not answer.requires_grad else answer


def _conv2d(
    input: Tensor,  # noqa: A002 - torch's signature
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """As `torch.conv2d`; a depthwise one as a sum over the taps, with channels last.

    PyTorch has no kernel for depthwise convolutions in float64 on CPUs and multiplies matrices of one
    row, one for each channel. It is most of the time that a MobileNet or an EfficientNet takes.
    """
    channels = input.shape[1] if input.dim() == 4 else 0
    if groups != channels or weight.shape[0] != channels or channels < _CHANNELS or isinstance(padding, str):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    (down, right), (above, left), (rows, columns) = map(_pair, (stride, padding, dilation))
    grid = functional.pad(input.permute(0, 2, 3, 1), (0, 0, left, left, above, above)).contiguous()
    taps = weight[:, 0].permute(1, 2, 0).contiguous()
    height = (grid.shape[1] - rows * (taps.shape[0] - 1) - 1) // down + 1
    width = (grid.shape[2] - columns * (taps.shape[1] - 1) - 1) // right + 1
    start = grid.new_zeros(()) if bias is None else bias
    answer = start.expand(len(grid), height, width, channels).clone()
    for i in range(taps.shape[0]):
        for j in range(taps.shape[1]):
            y, x = i * rows, j * columns
            part = grid[:, y : y + (height - 1) * down + 1 : down, x : x + (width - 1) * right + 1 : right]
            answer.addcmul_(part, taps[i, j])
    return answer.permute(0, 3, 1, 2)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(value, int):
        return value, value
    return tuple(value) if len(value) == 2 else (value[0], value[0])


#: On CUDA two kernels multiply by 1/6 rounded to float32: in MobileNetV3 that moves logits by 1e-6, a thousand
#: times as far as a flipped bit (torch 2.11).
_EXACT: Final[dict[Any, Callable[..., Tensor]]] = {
    functional.hardswish: _hardswish,
    functional.hardsigmoid: _hardsigmoid,
}
_FAST: Final[dict[Any, Callable[..., Tensor]]] = {torch.conv2d: _conv2d}
