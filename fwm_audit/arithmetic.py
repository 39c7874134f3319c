"""float64 as it should be: what PyTorch computes less exactly, or far slower, than the processor can.

A mode for the float64 passes of embeddings and audits. It replaces single functions by others that compute
the same in another order, which is what the distance of the triggers from their boundaries allows for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

#: Channels from which on the inner loop of a depthwise convolution is long enough to vectorise.
_CHANNELS: Final = 16
#: Of malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
#: The first that this C library takes: mallopt(3) allows 32 MiB at most, glibc 2.36 takes more.
_BLOCK_BYTES: Final = (64 << 20, 32 << 20)
#: What the activations of one pass take, and more.
_KEPT_BYTES: Final = 256 << 20


def float64_mode(batch: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The mode for a pass over this batch; it does nothing for other dtypes, nor on a CPU where gradients are taken."""
    if batch.dtype is not torch.float64 or (torch.is_grad_enabled() and not batch.is_cuda):
        return contextlib.nullcontext()
    return _Replaced(_EXACT if batch.is_cuda else _FAST)


def keep_freed_memory() -> None:
    """Let this process use memory again that it freed, instead of giving it back and faulting its pages in anew.

    glibc returns large blocks at once, and each pass allocates its activations afresh: on EfficientNet-Lite0
    that makes 7,000 page faults for each image. Blocks above 64 MiB, which weights are, are still returned, and
    of what smaller ones leave free all but 256 MiB.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries do as they do
        any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in _BLOCK_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


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
    """As `torch.conv2d`; a depthwise one with channels last, and pointwise ones on what that leaves behind.

    PyTorch has no kernel for depthwise convolutions in float64 on CPUs and multiplies matrices of one
    row, one for each channel. It is most of the time that a MobileNet or an EfficientNet takes.
    """
    channels = input.shape[1] if input.dim() == 4 else 0
    if channels and not isinstance(padding, str):
        strides, paddings, dilations = map(_two, (stride, padding, dilation))
        if groups == channels == weight.shape[0] and channels >= _CHANNELS:
            return _depthwise(input, weight, bias, strides, paddings, dilations)
        pointwise = weight.shape[2:] == (1, 1) and strides == (1, 1) and paddings == (0, 0) and groups == 1
        if pointwise and input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous():
            return functional.linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _depthwise(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: tuple[int, ...],
    paddings: tuple[int, ...],
    dilations: tuple[int, ...],
) -> Tensor:
    """A sum over the taps, each over the part of the answer where it meets the image."""
    grid = images.permute(0, 2, 3, 1).contiguous()
    count, *sizes, channels = grid.shape
    kernel = weight.shape[2:]
    rows, columns = map(_met, sizes, kernel, strides, paddings, dilations)
    answer = grid.new_empty(count, rows.out, columns.out, channels)
    if bias is None:
        answer.zero_()
    else:
        answer.copy_(bias)
    # Views by one call each: a slice for each axis takes as long as what is computed with it.
    image, row, pixel, _ = grid.stride()
    steps, places = (image, row * strides[0], pixel * strides[1], 1), answer.stride()
    taps = iter(weight[:, 0].permute(1, 2, 0).contiguous().flatten(0, 1))
    for (to_row, from_row, height), (to_column, from_column, width) in itertools.product(rows.taps, columns.taps):
        tap, shape = next(taps), (count, height, width, channels)
        if height and width:
            place = to_row * places[1] + to_column * places[2]
            start = grid.storage_offset() + from_row * row + from_column * pixel
            answer.as_strided(shape, places, place).addcmul_(grid.as_strided(shape, steps, start), tap)
    return answer.permute(0, 3, 1, 2)


class _Met(NamedTuple):
    """Along one axis: positions of the answer; of each tap, the first one that it adds to, where it reads, how many."""

    out: int
    taps: tuple[tuple[int, int, int], ...]


@functools.lru_cache
def _met(size: int, kernel: int, step: int, pad: int, gap: int) -> _Met:
    out = (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
    taps = []
    for offset in (tap * gap - pad for tap in range(kernel)):
        first = max(0, -(offset // step))
        last = max(first, min(out, (size - 1 - offset) // step + 1))
        taps.append((first, first * step + offset, last - first))
    return _Met(out, tuple(taps))


def _two(value: int | tuple[int, ...]) -> tuple[int, ...]:
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
