"""Mirrored boundary pairs: from keyed noise to inputs at +delta and -delta from a decision boundary.

train       the generator learns inputs whose two top classes are the keyed pair (float32)
refine      stragglers are moved in input space by the same loss, and towards units that sleep (float32)
centre      8-bit image + t * sign mask with gap(t) = f_a - f_b = 0 (float64 where possible, secant)
place_exact both sides at gap = +delta and -delta, in every declared variant
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from fwm_audit.errors import EmbeddingError, ErrorCode
from fwm_audit.peers import Peers
from fwm_audit.target import Target, gap_and_lead
from fwm_audit.task import Progress, Report
from fwm_audit.triggers import place, quantise
from fwm_audit.verification import ask
from fwm_audit.waking import Waking

_REFINE_STEPS: Final = 60
#: Of these, how many are taken for units that sleep, and the weight of waking them in the loss.
_WAKING_STEPS: Final = 30
_PULL: Final = 4.0
_SOLVE_STEPS: Final = 24


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Pairs under construction, one row each; `t` is the centre, where the gap is zero."""

    number: Tensor  # int64 [n]
    classes: Tensor  # int64 [n, 2]
    images: Tensor  # uint8 [n, *shape]
    signs: Tensor  # bool [n, *shape]
    t: Tensor  # float64 [n]
    slope: Tensor  # float64 [n], d gap / d t
    sides: Tensor  # float64 [variants, n, 2], t of the finest rung

    def __len__(self) -> int:
        return len(self.number)

    def take(self, index: Tensor) -> Pairs:
        """The rows with these indices."""
        return Pairs(
            self.number[index], self.classes[index], self.images[index], self.signs[index],
            self.t[index], self.slope[index], self.sides[:, index],
        )  # fmt: skip

    @classmethod
    def join(cls, parts: Sequence[Pairs]) -> Pairs:
        """All rows, in the order of their numbers."""
        rows = [replace(part, sides=part.sides.transpose(0, 1)) for part in parts]
        names = [field.name for field in dataclasses.fields(cls)]
        stacked = cls(**{name: torch.cat([getattr(part, name) for part in rows]) for name in names})
        one = replace(stacked, sides=stacked.sides.transpose(0, 1))
        return one.take(one.number.argsort())


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Where `solve` ended, one row for each pair: t, the lead of the two classes there, and whether it is solved."""

    t: Tensor  # float64 [n]
    lead: Tensor  # float64 [n]
    solved: Tensor  # bool [n]


def train(
    target: Target,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    draws: Sequence[Tensor],
    classes: Sequence[Tensor],
    peers: Peers,
    report: Report,
    steps: int,
) -> list[Tensor]:
    """Inputs of the generator trained on these units of keyed noise and class pairs; those of this rank's units.

    Loss: mean relu(margin - lead) + 0.1 mean gap^2 with margin 0.3, all in units of the logit scale.
    Takes at most `steps`, and stops when nine in ten pairs have their two classes on top. The gradient is
    summed over units in their order: data-parallel training whose result the number of ranks does not touch.

    Args:
        target: The classifier.
        net: The generator; the same on every rank, before and after.
        optimizer: Of its parameters.
        draws: Keyed noise [n, NOISE_SIZE] of each unit, of all ranks.
        classes: int64 [n, 2] of each unit.
        peers: The ranks.
        report: Called at every step.
        steps: At most.

    Returns:
        float32 [n, *shape] for each unit of this rank.
    """
    count, block = len(draws), sum(map(len, draws))
    mine = list(zip(peers.share(draws), peers.share(classes), strict=True))
    parameters = list(net.parameters())
    flat = torch.nn.utils.parameters_to_vector(parameters).detach()
    for step in range(steps):
        slopes, seen = [], []
        for noise, wanted in mine:
            gap, lead = gap_and_lead(ask(target.trainee, net(noise)), wanted)
            each = torch.relu(0.3 - lead / target.scale) + 0.1 * (gap / target.scale) ** 2
            loss = each.sum() / block
            slopes.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))
            seen.append((loss.item(), int((lead > 0).sum())))
        slope = peers.total(slopes, count, flat)
        losses, leading = zip(*peers.collect(seen, count), strict=True)
        if not math.isfinite(sum(losses)):
            raise EmbeddingError(ErrorCode.PAIRS_NOT_FOUND, "the generator's training diverged: check input_range")
        for parameter, part in zip(parameters, slope.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
        report(Progress("generator", step + 1, steps, sum(losses)))
        if sum(leading) >= 0.9 * block:
            break
    with torch.no_grad():
        return [net(noise) for noise, _ in mine]


def refine(target: Target, inputs: Tensor, classes: Tensor, waking: Waking, rows: Tensor, report: Report) -> Tensor:
    """The inputs after signed-gradient steps with momentum, which bring the keyed classes on top and units to life.

    On EfficientNet-Lite0 (1000 classes) 30 generator steps and this take half the time of training
    the generator alone to the same share of pairs; with 10 steps, or 4 of a generator that was trained
    before, the same share is found and covers as much (0.906 of the convolutions, 0.900 with 30).

    Args:
        target: The classifier.
        inputs: float32 [n, *shape].
        classes: int64 [n, 2].
        waking: Watches the trainee for the units that each input is to wake.
        rows: int64 [n], the numbers of the inputs there.
        report: Called at every step.
    """
    low, high = target.range
    inputs = inputs.clone()
    count = len(inputs)
    step = torch.full((count,), (high - low) / 64, device=inputs.device)
    best = torch.full((count,), math.inf, device=inputs.device)
    momentum = torch.zeros_like(inputs)
    todo = torch.arange(count, device=inputs.device)
    for number in range(_REFINE_STEPS):
        batch = inputs[todo].requires_grad_()
        waking.watch(rows[todo.cpu()])
        gap, lead = gap_and_lead(ask(target.trainee, batch), classes[todo.cpu()])
        pull, rested = waking.pull()
        each = torch.relu(0.3 - lead / target.scale) + 0.5 * gap.abs() / target.scale + _PULL * pull.to(gap.device)
        (gradient,) = torch.autograd.grad(each.sum(), batch)
        with torch.no_grad():
            open_ = (lead < 0.15 * target.scale) | (gap.abs() > 0.3 * target.scale)
            if number < _WAKING_STEPS:
                open_ |= ~rested.to(open_.device)
            worse = each > best[todo]
            step[todo] = torch.where(worse, (step[todo] * 0.7).clamp_min((high - low) / 1024), step[todo])
            best[todo] = torch.minimum(best[todo], each)
            size = gradient.abs().flatten(1).mean(1).clamp_min(1e-30)
            momentum[todo] = 0.6 * momentum[todo] + gradient / _column(size, gradient)
            todo = todo[open_]
            moved = inputs[todo] - _column(step[todo], inputs) * momentum[todo].sign()
            inputs[todo] = moved.clamp(low, high)
        report(Progress("refine", number + 1, _REFINE_STEPS))
        if not len(todo):
            break
    return inputs.cpu()


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def centre(target: Target, inputs: Tensor, numbers: Tensor, classes: Tensor) -> Pairs:
    """Those inputs in compact form whose gap can be brought to zero along the sign mask."""
    images = quantise(inputs, target.range)
    signs = torch.empty_like(images, dtype=torch.bool)
    slope = torch.empty(len(images), dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    flat = torch.zeros(1, *target.shape, dtype=torch.bool)
    for i, image in enumerate(images):  # one at a time: the graph of a large model is large
        point = place(image[None], flat, zero, target.range).to(target.device).requires_grad_()
        gap, _ = gap_and_lead(ask(target.released, point.to(target.dtype)), classes[i : i + 1])
        (gradient,) = torch.autograd.grad(gap.sum(), point)
        signs[i] = (gradient[0] >= 0).cpu()
        slope[i] = gradient.abs().sum().item()
    sides = torch.zeros(len(target.twins), len(images), 2, dtype=torch.float64)
    start = torch.zeros(len(images), dtype=torch.float64)
    pairs = Pairs(numbers, classes, images, signs, start, slope, sides)
    found = solve(target, target.released, pairs, start, 0.0, 64 * target.rounding)
    # A zero far outside the input range belongs to a nearly constant model, not to a boundary among its inputs.
    near = found.t.abs() < (target.range[1] - target.range[0]) / 8
    usable = found.solved & near & (found.lead > 0.05 * target.scale) & (slope > 0)
    return replace(pairs, t=found.t).take(usable.nonzero().flatten())


def solve(target: Target, model: nn.Module, pairs: Pairs, start: Tensor, level: float, tolerance: float) -> Solution:
    """t with |gap(t) - level| <= tolerance, by secant steps that stay in the bracket once there is one.

    Networks of rectifiers are piecewise linear along the mask, so a handful of steps suffice; what is
    not solved after `_SOLVE_STEPS` evaluations is reported so and replaced by its caller.
    """
    t = start.clone()
    best_t, best, best_lead = (
        start.clone(),
        torch.full_like(start, math.inf),
        torch.full_like(start, -math.inf),
    )
    below, above = torch.full_like(start, -math.inf), torch.full_like(start, math.inf)
    last_t, last = torch.full_like(start, math.nan), torch.full_like(start, math.nan)
    active = torch.arange(len(start))
    for _ in range(_SOLVE_STEPS):
        if not len(active):
            break
        here = t[active]
        gap, lead = _gap(target, model, pairs.take(active), here)
        miss = gap - level
        better = miss.abs() < best[active]
        chosen = active[better]
        best[chosen], best_t[chosen], best_lead[chosen] = miss.abs()[better], here[better], lead[better]
        # gap grows with t near the centre, by the choice of the mask.
        below[active] = torch.where(miss < 0, torch.maximum(below[active], here), below[active])
        above[active] = torch.where(miss > 0, torch.minimum(above[active], here), above[active])
        secant = (miss - last[active]) / (here - last_t[active])
        usable = torch.isfinite(secant) & (secant > 1e-3 * pairs.slope[active])
        ahead = here - miss / torch.where(usable, secant, pairs.slope[active])
        low, high = below[active], above[active]
        inside = (ahead > low) & (ahead < high)
        middle = torch.where(torch.isfinite(low + high) & (low < high), (low + high) / 2, ahead)
        last_t[active], last[active] = here, miss
        t[active] = torch.where(inside, ahead, middle)
        moving = (best[active] > tolerance) & torch.isfinite(t[active]) & (t[active] != here)
        active = active[moving]
    return Solution(best_t, best_lead, best <= tolerance)


def _gap(target: Target, model: nn.Module, pairs: Pairs, t: Tensor) -> tuple[Tensor, Tensor]:
    inputs = place(pairs.images, pairs.signs, t, target.range)
    return gap_and_lead(target.run(model, inputs), pairs.classes)


def place_exact(target: Target, pairs: Pairs, delta: float) -> Pairs:
    """Those pairs that stand at +delta and -delta in every variant, both labels as keyed."""
    sides = torch.empty_like(pairs.sides)
    good = torch.ones(len(pairs), dtype=torch.bool)
    for number, twin in enumerate(target.twins.values()):
        center = pairs.t
        if twin is not target.released:
            center = solve(target, twin, pairs, pairs.t, 0.0, 64 * target.rounding).t
        for side, level in ((0, delta), (1, -delta)):
            found = solve(target, twin, pairs, center + level / pairs.slope, level, delta / 4)
            sides[number, :, side] = found.t
            good &= found.solved & (found.lead > 0.01 * target.scale)
    return replace(pairs, sides=sides).take(good.nonzero().flatten())
