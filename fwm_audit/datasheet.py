"""The datasheet of a key: simulated edits of the model, and how many of them the finest rung detects.

Edits are made on a copy, in the dtype of the released file (float32 if that is mixed), with randomness
from the secret key. Only edits that change a stored value are counted as tries.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fwm_audit import generator as gen
from fwm_audit.key import SecretKey
from fwm_audit.peers import Peers
from fwm_audit.target import Target
from fwm_audit.task import Progress, Report
from fwm_audit.triggers import TriggerSet
from fwm_audit.verification import ask, breaks, forget

#: Tries for each edit of one value; an edit of many is tried once.
_TRIES: Final = 8
#: Bits of sign, exponent and mantissa, and the integer of the same width.
_LAYOUT: Final = {
    torch.float16: (1, 5, 10, torch.int16),
    torch.bfloat16: (1, 8, 7, torch.int16),
    torch.float32: (1, 8, 23, torch.int32),
    torch.float64: (1, 11, 52, torch.int64),
}

#: Edits the copy in place, with this source of randomness.
Edit = Callable[["_Copy", torch.Generator], None]


class _Copy:
    """The released model as a simulation edits it: every change is rounded to the released dtype, then undone."""

    def __init__(self, target: Target, variant: str, secret: SecretKey) -> None:
        self.target = target
        self.model = target.released
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.is_floating_point()}
        dtype = getattr(torch, variant, None)
        self.dtype: torch.dtype = dtype if dtype in _LAYOUT else torch.float32
        low, high = target.range
        draw = gen.normal(secret, "datasheet/inputs", (8, *target.shape))
        self.inputs = (low + (high - low) * torch.sigmoid(draw)).to(target.device, target.dtype)
        self.labels = torch.arange(8, device=target.device) % target.num_classes

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Store a value as the released file would hold it."""
        tensor.copy_(value.to(self.dtype))

    def pick(self, random: torch.Generator) -> Tensor:
        """One value of all parameters, drawn uniformly, as a view []."""
        number = int(torch.randint(sum(p.numel() for p in self.parameters.values()), (1,), generator=random))
        for tensor in self.parameters.values():
            if number < tensor.numel():
                return tensor[tuple(int(i) for i in np.unravel_index(number, tensor.shape))]
            number -= tensor.numel()
        raise AssertionError

    def descend(self, prefix: str, rate: float) -> bool:
        """One step of gradient descent on cross-entropy of random inputs, batch norm in eval mode.

        Args:
            prefix: Of the names of the parameters that move.
            rate: Learning rate.

        Returns:
            Whether any of them has a gradient.
        """
        chosen = [tensor for name, tensor in self.parameters.items() if name.startswith(prefix)]
        if not chosen:
            return False
        for tensor in chosen:
            tensor.requires_grad_()
        with torch.enable_grad():
            loss = functional.cross_entropy(ask(self.model, self.inputs), self.labels)
            used = loss.requires_grad
            gradients = torch.autograd.grad(loss, chosen, allow_unused=True) if used else [None] * len(chosen)
        for tensor, gradient in zip(chosen, gradients, strict=True):
            tensor.requires_grad = False
            if gradient is not None:
                self.put(tensor, tensor - rate * gradient)
        return any(gradient is not None for gradient in gradients)


def simulate(target: Target, triggers: TriggerSet, secret: SecretKey, report: Report) -> dict[str, tuple[int, int]]:
    """By name of the edit: how many tries the finest rung of the released variant detected, and of how many.

    The tries are shared out over the ranks; every rank gets the whole sheet.
    """
    peers = Peers.current()
    rung = triggers.rungs[0]
    copy = _Copy(target, rung.variant, secret)
    seed = int.from_bytes(secret.stream("datasheet", 7), "little")
    plan = [(name, number) for name, (tries, _) in _EDITS.items() for number in range(tries)]
    now = dict(itertools.chain(copy.model.named_parameters(), copy.model.named_buffers()))
    state = {name: tensor.detach().clone() for name, tensor in now.items()}
    mine = []
    with torch.no_grad():
        for position in range(peers.rank, len(plan) if copy.parameters else 0, peers.size):
            name, _ = plan[position]
            _EDITS[name][1](copy, torch.Generator().manual_seed(seed + position))
            changed = [key for key, tensor in now.items() if not torch.equal(tensor, state[key])]
            if changed:
                forget(copy.model)
                mine.append((name, breaks(copy.model, triggers, rung, target.device)))
                for key in changed:
                    now[key].copy_(state[key])
            report(Progress("datasheet", position + 1, len(plan)))
    forget(copy.model)
    seen = list(itertools.chain(*peers.gather(mine)))
    return {
        edit: (sum(found for name, found in seen if name == edit), tries)
        for edit in _EDITS
        if (tries := sum(name == edit for name, _ in seen))
    }


def _sgd(rate: float) -> Edit:
    def edit(copy: _Copy, _: torch.Generator) -> None:
        copy.descend("", rate)

    return edit


def _last_layer(copy: _Copy, _: torch.Generator) -> None:
    layers = [name for name, module in copy.model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for name in reversed(layers):  # the last ones may be heads for training only
        if copy.descend(f"{name}." if name else "", 1e-6):
            return


def _statistics(copy: _Copy, _: torch.Generator) -> None:
    for module in copy.model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            copy.put(module.running_mean, module.running_mean + 1e-6 * module.running_var.sqrt())


def _prune(copy: _Copy, _: torch.Generator) -> None:
    weights = [tensor for tensor in copy.parameters.values() if tensor.dim() > 1]
    if not weights:
        return
    sizes = torch.cat([tensor.flatten().abs() for tensor in weights])
    sizes = sizes[sizes > 0]  # what is pruned already is no edit
    limit = sizes.kthvalue(max(1, len(sizes) // 1000)).values if len(sizes) else 0
    for tensor in weights:
        tensor[tensor.abs() <= limit] = 0


def _noise(copy: _Copy, random: torch.Generator) -> None:
    for tensor in copy.parameters.values():
        noise = torch.randn(tensor.shape, generator=random, dtype=torch.float64).to(tensor)
        copy.put(tensor, tensor + 1e-7 * noise)


def _scale(copy: _Copy, random: torch.Generator) -> None:
    value = copy.pick(random)
    copy.put(value, value * 1.001)


def _flip(part: int) -> Edit:
    """Flip one bit of one value: of its sign (0), exponent (1) or mantissa (2), drawn uniformly."""

    def edit(copy: _Copy, random: torch.Generator) -> None:
        *widths, integer = _LAYOUT[copy.dtype]
        bit = sum(widths[part + 1 :]) + int(torch.randint(widths[part], (1,), generator=random))
        value = copy.pick(random)
        # Shifted as a Python integer would overflow at the sign bit: the shift happens in the tensor's width.
        mask = torch.ones((), dtype=integer, device=value.device) << bit
        copy.put(value, (value.to(copy.dtype).view(integer) ^ mask).view(copy.dtype))

    return edit


_EDITS: Final[dict[str, tuple[int, Edit]]] = {
    "SGD step, lr 1e-6": (1, _sgd(1e-6)),
    "SGD step, lr 1e-3": (1, _sgd(1e-3)),
    "last layer, SGD step, lr 1e-6": (1, _last_layer),
    "batch norm statistics, 1e-6 of their spread": (1, _statistics),
    "pruning 0.1 %": (1, _prune),
    "noise, sigma 1e-7": (1, _noise),
    "one weight, 0.1 %": (_TRIES, _scale),
    "one bit, sign": (_TRIES, _flip(0)),
    "one bit, exponent": (_TRIES, _flip(1)),
    "one bit, mantissa": (_TRIES, _flip(2)),
}
