"""Waking units: inputs are pulled towards those units of the network that no chosen pair reaches yet.

The weights around a rectifier that stays at zero for every trigger cannot be seen. Where a bias has
no influence on any gap, its unit is taken to sleep, and the search for inputs is asked to raise it.
A weight of the last layer is seen by pairs of its class alone: where a class has one or two of them,
each input is asked to raise every feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from fwm_audit.verification import ask, forget

#: How far above zero a unit is raised, in standard deviations of its layer: the farther, the surer.
_MARGIN: Final = 0.25
_FEATURE_MARGIN: Final = 0.5
#: Weight of all features in the loss, in that of an input's sleeping units.
_FEATURES: Final = 4.0
#: Share of its units that an input wakes before it rests.
_ENOUGH: Final = 0.9
_ENOUGH_FEATURES: Final = 0.995


def features(model: nn.Module, inputs: Tensor) -> str:
    """Name of the bias whose units feed the last layer and can sleep; empty if there is none.

    A unit sleeps where its bias has no influence on the logits of an input.

    Args:
        model: Classifier, in eval mode.
        inputs: [N, *shape], a few.
    """
    biases = {
        name: bias
        for name, bias in model.named_parameters()
        if name.rpartition(".")[2] == "bias" and bias.dim() == 1 and bias.is_floating_point()
    }
    found = set()
    for bias in biases.values():
        bias.requires_grad_()
    try:
        for one in inputs.split(1) if biases else ():
            logits = ask(model, one)
            if not logits.requires_grad:
                continue
            # Every logit counts, each differently, so that the last layer's own biases all have a slope.
            mixed = (logits * torch.arange(1, logits.shape[1] + 1, device=logits.device)).sum()
            slopes = torch.autograd.grad(mixed, list(biases.values()), allow_unused=True)
            found |= {
                name for name, slope in zip(biases, slopes, strict=True) if slope is not None and (slope == 0).any()
            }
    finally:
        forget(model)
        for bias in biases.values():
            bias.requires_grad = False
    return next((name for name in reversed(biases) if name in found), "")


class Waking:
    """Watches the sleeping units of a network while it runs; each is one input's to wake, features are everyone's.

    Args:
        model: The network, in eval mode.
        asleep: By name of a bias, int64 indices of the units that sleep.
        count: Number of inputs over which the units are dealt out.
        num_classes: Width of the logits, which are left alone.
        features: Name of a bias all of whose units every input is to wake; empty for none.
    """

    def __init__(
        self, model: nn.Module, asleep: Mapping[str, Tensor], count: int, num_classes: int, features: str = ""
    ) -> None:
        self._classes = num_classes
        self._rows = torch.arange(count)
        self._hooks: list[RemovableHandle] = []
        #: Of each layer in the latest pass: values [n, units], and which are whose to wake, bool [count, units].
        self._dealt: list[tuple[Tensor, Tensor]] = []
        self._shared: list[tuple[Tensor, Tensor]] = []
        self.units = 0
        for name, units in asleep.items():
            owner = torch.arange(self.units, self.units + len(units)) % count
            if self._watch(model, name, units, owner == torch.arange(count)[:, None], self._dealt):
                self.units += len(units)
        if features:
            units = torch.arange(len(model.get_parameter(features)))
            self._watch(model, features, units, torch.ones(count, len(units), dtype=torch.bool), self._shared)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def watch(self, rows: Tensor) -> None:
        """The next pass is of the inputs with these numbers, int64 [n]."""
        self._rows = rows.cpu()
        self._dealt.clear()
        self._shared.clear()

    def pull(self) -> tuple[Tensor, Tensor]:
        """What the latest pass leaves to do for each of its inputs.

        Returns:
            Loss [n], the mean over an input's units of how far they are from awake, and bool [n], whether
            enough of them are awake; 0 and True for an input without units.
        """
        loss, awake = self._group(self._dealt, _MARGIN)
        shared, feature_awake = self._group(self._shared, _FEATURE_MARGIN)
        done = (awake >= _ENOUGH).to(feature_awake.device) & (feature_awake >= _ENOUGH_FEATURES)
        return loss.to(shared.device) + _FEATURES * shared, done

    def _group(self, seen: list[tuple[Tensor, Tensor]], margin: float) -> tuple[Tensor, Tensor]:
        """Mean distance from `margin` over an input's units, and the share of them that are awake, each [n]."""
        loss, awake, units = torch.zeros(3, len(self._rows))
        for values, mine in seen:
            chosen = mine[self._rows].to(values.device)
            loss = loss.to(values.device) + (functional.relu(margin - values) * chosen).sum(1)
            awake = awake.to(values.device) + ((values > 0) & chosen).sum(1)
            units = units.to(values.device) + chosen.sum(1)
        return loss / units.clamp_min(1), torch.where(units > 0, awake / units.clamp_min(1), 1.0)

    def _watch(
        self, model: nn.Module, name: str, units: Tensor, mine: Tensor, seen: list[tuple[Tensor, Tensor]]
    ) -> bool:
        """Add to `seen` what these units do in each pass; False where the layer is of no known kind."""
        module = model.get_submodule(name.rpartition(".")[0])

        def keep(output: Tensor, channel: int) -> None:
            if len(output) != len(self._rows):
                return  # windows or tokens stand where inputs do elsewhere: whose they are cannot be told
            spread = output.detach().std(correction=0).clamp_min(1e-12)
            values = output.movedim(channel, 1).index_select(1, units.to(output.device)) / spread
            seen.append((values.flatten(2).amax(2) if values.dim() > 2 else values, mine))

        def before(module: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
            # Some batch norms carry an activation: at zero behind it there is no slope to follow.
            if inputs:
                keep(
                    functional.batch_norm(
                        inputs[0], module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
                    ),
                    1,
                )

        def after(module: nn.Module, _: object, output: Tensor) -> None:
            if output.dim() != 2 or output.shape[1] != self._classes:
                keep(output, -1 if isinstance(module, nn.Linear) else 1)

        if isinstance(module, _BatchNorm):
            self._hooks.append(module.register_forward_pre_hook(before))
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            self._hooks.append(module.register_forward_hook(after))
        else:
            return False
        return True
