"""Waking units: inputs are pulled towards those units of the network that no chosen pair reaches yet.

The weights around a rectifier that stays at zero for every trigger cannot be seen. Where a bias has
no influence on any gap, its unit is taken to sleep, and the search for inputs is asked to raise it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

#: How far above zero a unit is raised, in standard deviations of its layer.
_MARGIN: Final = 0.25


class Waking:
    """Watches the sleeping units of a network while it runs; each is one input's to wake.

    Args:
        model: The network, in eval mode.
        asleep: By name of a bias, int64 indices of the units that sleep.
        count: Number of inputs over which the units are dealt out.
        num_classes: Width of the logits, which are left alone.
    """

    def __init__(self, model: nn.Module, asleep: Mapping[str, Tensor], count: int, num_classes: int) -> None:
        self._seen: list[tuple[Tensor, Tensor]] = []  # per layer: values [n, units], mine [count, units]
        self._rows = torch.arange(count)
        self._hooks = []
        self.units = 0
        for name, units in asleep.items():
            module = model.get_submodule(name.rpartition(".")[0])
            mine = (torch.arange(self.units, self.units + len(units)) % count)[None] == torch.arange(count)[:, None]
            if isinstance(module, _BatchNorm):
                hook = module.register_forward_pre_hook(self._normalised(units, mine))
            elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                hook = module.register_forward_hook(self._output(units, mine, num_classes))
            else:
                continue
            self._hooks.append(hook)
            self.units += len(units)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def watch(self, rows: Tensor) -> None:
        """The next pass is of the inputs with these numbers, int64 [n]."""
        self._rows = rows.cpu()
        self._seen.clear()

    def pull(self) -> tuple[Tensor, Tensor]:
        """What the latest pass leaves to do for each of its inputs.

        Returns:
            Loss [n], the mean over an input's units of how far they are from awake, and the share [n]
            of its units that are awake; 0 and 1 for an input without units.
        """
        rows = self._rows
        loss = torch.zeros(len(rows))
        awake, units = torch.zeros(len(rows)), torch.zeros(len(rows))
        for values, mine in self._seen:
            chosen = mine[rows].to(values.device)
            loss = loss.to(values.device) + (functional.relu(_MARGIN - values) * chosen).sum(1)
            awake = awake.to(values.device) + ((values > 0) & chosen).sum(1)
            units = units.to(values.device) + chosen.sum(1)
        return loss / units.clamp_min(1), torch.where(units > 0, awake / units.clamp_min(1), 1.0)

    def _keep(self, output: Tensor, channel: int, units: Tensor, mine: Tensor) -> None:
        if len(output) != len(self._rows):
            return  # windows or tokens stand where inputs do elsewhere: whose they are cannot be told
        spread = output.detach().std(correction=0).clamp_min(1e-12)
        values = output.movedim(channel, 1).index_select(1, units.to(output.device)) / spread
        self._seen.append((values.flatten(2).amax(2) if values.dim() > 2 else values, mine))

    def _normalised(self, units: Tensor, mine: Tensor):  # type: ignore[no-untyped-def]  # noqa: ANN202
        """Before the activation that some batch norms carry: at zero behind it there is no slope to follow."""

        def hook(module: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
            if not inputs:
                return
            normalised = functional.batch_norm(
                inputs[0], module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
            )
            self._keep(normalised, 1, units, mine)

        return hook

    def _output(self, units: Tensor, mine: Tensor, num_classes: int):  # type: ignore[no-untyped-def]  # noqa: ANN202
        def hook(module: nn.Module, _: object, output: Tensor) -> None:
            if output.dim() == 2 and output.shape[1] == num_classes:
                return
            self._keep(output, -1 if isinstance(module, nn.Linear) else 1, units, mine)

        return hook
