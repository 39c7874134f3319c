"""Batch norms merged into the convolutions before them, as deployments ship them.

A folded checkpoint has the released names without the batch norms' entries, and a bias for each
merged convolution. What torch.fx's `fuse` and `torch.nn.utils.fusion` produce is of that form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from timm.layers import BatchNormAct2d  # type: ignore[attr-defined]  # exported without saying so
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

Folds = tuple[tuple[str, str], ...]


def find_folds(model: nn.Module, forward: Callable[[], object]) -> Folds:
    """Names of (convolution, batch norm) where the second took the very output of the first.

    Found by watching a pass, so it needs no tracer and sees what runs. Layers that run more than once
    are left alone; a convolution whose output goes elsewhere too shows in the folded model's logits.

    Args:
        model: In eval mode.
        forward: Runs the model once, on one batch.
    """
    made: dict[int, tuple[nn.Module, object]] = {}  # keeps the tensor, so that its id stays its own
    runs: Counter[nn.Module] = Counter()
    taken: list[tuple[nn.Module, nn.Module]] = []

    def after_convolution(module: nn.Module, _: object, output: object) -> None:
        runs[module] += 1
        made[id(output)] = (module, output)

    def before_norm(module: nn.Module, inputs: tuple[object, ...]) -> None:
        runs[module] += 1
        if inputs and id(inputs[0]) in made:
            taken.append((made[id(inputs[0])][0], module))

    hooks = []
    for module in model.modules():
        if isinstance(module, _ConvNd) and not module.transposed:
            hooks.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, _BatchNorm) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(before_norm))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    names = {module: name for name, module in model.named_modules()}
    once = [(convolution, norm) for convolution, norm in taken if runs[convolution] == runs[norm] == 1]
    return tuple((names[convolution], names[norm]) for convolution, norm in once)


def fold(model: nn.Module, folds: Sequence[tuple[str, str]]) -> nn.Module:
    """The module itself with these batch norms merged, by `fuse_conv_bn_weights` in its own dtype."""
    for convolution, norm in _modules(model, folds):
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias,
            norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
        )  # fmt: skip
        convolution.weight, convolution.bias = weight, bias
    return without_norms(model, folds)


def without_norms(model: nn.Module, folds: Sequence[tuple[str, str]]) -> nn.Module:
    """The module itself in the shape of a folded one: biases, whatever their values, and no batch norms."""
    for (_, name), (convolution, norm) in zip(folds, _modules(model, folds), strict=True):
        if convolution.bias is None:
            convolution.bias = nn.Parameter(convolution.weight.new_zeros(convolution.out_channels), requires_grad=False)
        # timm's batch norm carries the activation behind it.
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, rest)
    return model.eval()


def _modules(model: nn.Module, folds: Sequence[tuple[str, str]]) -> Iterator[tuple[Any, Any]]:
    return ((model.get_submodule(convolution), model.get_submodule(norm)) for convolution, norm in folds)
