"""Batch norms merged into the layers before them, as deployments ship them.

A folded checkpoint has the released names without the batch norms' entries, and a bias for each
merged layer. What torch.fx's `fuse` and `torch.nn.utils.fusion` produce is of that form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

Folds = tuple[tuple[str, str], ...]


def find_folds(model: nn.Module, forward: Callable[[], object]) -> Folds:
    """Names of (layer, batch norm) where the second took the very output of a convolution or linear layer.

    Found by watching a pass, so it needs no tracer and sees what runs. Layers that run more than once
    are left alone; one whose output goes elsewhere too shows in the folded model's logits.

    Args:
        model: In eval mode.
        forward: Runs the model once, on one batch.
    """
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}  # keeps the tensor, so that its id stays its own
    runs: Counter[nn.Module] = Counter()
    taken: list[tuple[nn.Module, nn.Module]] = []

    def after_layer(module: nn.Module, _: object, output: Tensor) -> None:
        runs[module] += 1
        if isinstance(module, _ConvNd) or output.dim() == 2:
            made[id(output)] = (module, output, output._version)  # noqa: SLF001 - known by no other name

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        runs[module] += 1
        layer, output, version = made.get(id(inputs[0]) if inputs else 0, (None, None, 0))
        # An operation in place leaves the tensor's identity and raises its version.
        if layer is not None and output is not None and output._version == version:  # noqa: SLF001 - as above
            taken.append((layer, module))

    hooks = []
    for module in model.modules():
        if (isinstance(module, _ConvNd) and not module.transposed) or isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(after_layer))
        elif isinstance(module, _BatchNorm) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(before_norm))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    names = {module: name for name, module in model.named_modules()}
    once = [(layer, norm) for layer, norm in taken if runs[layer] == runs[norm] == 1]
    return tuple((names[layer], names[norm]) for layer, norm in once)


def fold(model: nn.Module, folds: Sequence[tuple[str, str]], dtype: torch.dtype | None = None) -> nn.Module:
    """The module itself with these batch norms merged, by torch's own formulas in `dtype` (None: its own).

    On the CPU, where deployments fold: a GPU may round a reciprocal root differently.
    """
    for layer, norm in _modules(model, folds):
        like = layer.weight
        values: list[Any] = [
            value.detach().to("cpu", dtype or like.dtype) if isinstance(value, Tensor) else value
            for value in (
                layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
            )
        ]  # fmt: skip
        merge = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        layer.weight, layer.bias = (
            nn.Parameter(value.detach().to(like), requires_grad=False) for value in merge(*values)
        )
    return without_norms(model, folds)


def without_norms(model: nn.Module, folds: Sequence[tuple[str, str]]) -> nn.Module:
    """The module itself in the shape of a folded one: biases, whatever their values, and no batch norms."""
    # Here, as importing it takes seconds and few models are folded.
    from timm.layers import BatchNormAct2d  # type: ignore[attr-defined]  # noqa: PLC0415 - exported without saying so

    for (_, name), (layer, norm) in zip(folds, _modules(model, folds), strict=True):
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=False)
        # timm's batch norm carries the activation behind it.
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, rest)
    return model.eval()


def _modules(model: nn.Module, folds: Sequence[tuple[str, str]]) -> Iterator[tuple[Any, Any]]:
    return ((model.get_submodule(layer), model.get_submodule(norm)) for layer, norm in folds)
