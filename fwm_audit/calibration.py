"""What a key can promise: numeric noise, the rungs that stand on it, coverage, and the final check."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import torch
import torch.distributed
from torch import Tensor, nn

from fwm_audit.errors import EmbeddingError, ErrorCode, ModelError
from fwm_audit.pairs import Pairs, solve
from fwm_audit.peers import Peers
from fwm_audit.target import EPS, Target, executions, gap_and_lead, lower_precision, rounded
from fwm_audit.triggers import Coverage, Rung, TriggerSet, place
from fwm_audit.verdict import Tolerance, Verdict
from fwm_audit.verification import forget, run, verify_copy

#: delta of the exact rung in units of the measured noise: other machines' kernels add their own.
EXACT_NOISE_FACTOR: Final = 1000
#: ... and in units of rounding of the largest logit, where this machine showed no noise at all.
EXACT_ULP_FACTOR: Final = 1024
FLOAT32_NOISE_FACTOR: Final = 32
HALF_SHIFT_FACTOR: Final = 2


def measure_noise(target: Target, pairs: Pairs) -> float | None:
    """Largest difference of a gap between benign executions, in logits; None without pairs to measure it on."""
    if not len(pairs):
        return None
    inputs = place(pairs.images, pairs.signs, pairs.t, target.range)
    gaps = [gap_and_lead(logits, pairs.classes)[0] for logits in executions(target, target.released, inputs)]
    noise = max((gap - gaps[0]).abs().max().item() for gap in gaps)
    if noise > 1e-9 * target.magnitude:
        raise lower_precision()
    return noise


def exact_delta(target: Target, noise: float) -> float:
    """Distance of the exact rung: far enough from measured noise and from rounding, no further."""
    delta = max(EXACT_NOISE_FACTOR * noise, EXACT_ULP_FACTOR * EPS * target.magnitude)
    if delta > 1e-5 * target.scale:
        raise ModelError(
            ErrorCode.MODEL_UNSUITABLE,
            f"float64 tells the logits apart only to {delta:.0e} at a spread of {target.scale:.0e}: "
            "remove a large common offset from the logits",
        )
    return delta


def make_rungs(target: Target, pairs: Pairs, delta: float, noise: float, peers: Peers) -> tuple[Rung, ...]:
    """The exact rung of every variant, then the wider rungs that tell how far a changed model moved."""
    everyone = torch.arange(len(pairs))
    rungs = []
    wide = {name: values for name, values in _wide_deltas(target, pairs).items() if values[0] > 8 * delta}
    for number, (variant, twin) in enumerate(target.twins.items()):
        rungs.append(Rung(variant, Tolerance.EXACT, delta, noise, "float64", everyone, pairs.sides[number]))
        for name, (level, measured) in wide.items():
            mine = pairs.take(everyone[peers.rank :: peers.size])
            center = mine.t if number == 0 else mine.take(torch.arange(len(mine))).sides[number].mean(1)
            sides = []
            good = torch.ones(len(mine), dtype=torch.bool)
            for sign in (1, -1):
                found = solve(target, twin, mine, center + sign * level / mine.slope, sign * level, level / 8)
                sides.append(found.t)
                good &= found.solved & (found.lead > level / 2)
            rows = everyone[peers.rank :: peers.size][good]
            parts = peers.gather((rows, torch.stack(sides, 1)[good]))
            index = torch.cat([part[0] for part in parts])
            if len(index):
                order = index.argsort()
                t = torch.cat([part[1] for part in parts])[order]
                rungs.append(Rung(variant, name, level, measured, "float64", index[order], t))
    return tuple(rungs)


def _wide_deltas(target: Target, pairs: Pairs) -> dict[Tolerance, tuple[float, float]]:
    """delta and the measured shift behind it: float32 arithmetic, and weights rounded to half precision."""
    inputs = place(pairs.images, pairs.signs, pairs.t, target.range)
    exact = run(target.released, inputs, target.device)

    def shift(logits: Tensor) -> float:
        moved = gap_and_lead(logits.double(), pairs.classes)[0] - gap_and_lead(exact, pairs.classes)[0]
        return moved.abs().max().item()

    float32 = shift(run(target.trainee, inputs.float(), target.device))
    half = max(
        shift(run(rounded(target.released, dtype), inputs, target.device)) for dtype in (torch.float16, torch.bfloat16)
    )
    deltas = {
        Tolerance.FLOAT32: (FLOAT32_NOISE_FACTOR * float32, float32),
        Tolerance.HALF: (HALF_SHIFT_FACTOR * half, half),
    }
    # A model released in half precision does not move when rounded to it: that rung would say nothing.
    return {name: (level, seen) for name, (level, seen) in deltas.items() if math.isfinite(level) and seen > 0}


@dataclass(slots=True)
class Covered:
    """Which parameters some pair sees to the last bit, as one flag for each element."""

    model: nn.Module
    flags: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flags = {
            name: torch.zeros(parameter.shape, dtype=torch.bool) for name, parameter in self.model.named_parameters()
        }

    def add(self, target: Target, pairs: Pairs, delta: float) -> None:
        """Count what these pairs see: |d gap / d theta| * |theta| * 2^-23 > delta at the centre."""
        parameters = dict(self.model.named_parameters())
        if not parameters:
            return
        inputs = place(pairs.images, pairs.signs, pairs.t, target.range)
        for tensor in parameters.values():
            tensor.requires_grad_()
        try:
            for i in range(len(pairs)):
                forget(self.model)  # what it kept from passes without gradients would hide its weights
                gap, _ = gap_and_lead(self.model(inputs[i : i + 1].to(target.device)), pairs.classes[i : i + 1])
                gradients = torch.autograd.grad(gap.sum(), list(parameters.values()), allow_unused=True)
                for (name, tensor), gradient in zip(parameters.items(), gradients, strict=True):
                    if gradient is not None:
                        self.flags[name] |= ((gradient * tensor.detach()).abs() * 2.0**-23 > delta).cpu()
        finally:
            forget(self.model)
            for tensor in parameters.values():
                tensor.requires_grad = False

    def merge(self, peers: Peers) -> None:
        """Join with what the other ranks' pairs see."""
        if peers.size > 1:
            for name, flag in self.flags.items():
                both = flag.to(torch.uint8)
                torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
                self.flags[name] = both.bool()

    @property
    def total(self) -> float:
        """Share of all parameters."""
        count = sum(flag.numel() for flag in self.flags.values())
        return sum(int(flag.sum()) for flag in self.flags.values()) / count if count else 0.0

    def report(self) -> Coverage:
        """The shares, in total and by parameter tensor."""
        return Coverage(self.total, {name: flag.double().mean().item() for name, flag in self.flags.items()})


def confirm(target: Target, triggers: TriggerSet) -> int:
    """Comparisons of the finished key with the untouched model, every one in agreement.

    Raises:
        EmbeddingError: One disagrees: the key would raise false alarms.
    """
    benign = 0
    for variant, twin in target.twins.items():
        rung = triggers.rungs_of(variant)[0]
        inputs, labels = triggers.materialise(rung)
        for logits in executions(target, twin, inputs):
            benign += len(labels)
            if (logits.argmax(1) != labels).any():
                raise EmbeddingError(
                    ErrorCode.PAIRS_NOT_FOUND,
                    f"the finished key disagrees with its own model ({variant}): embed again",
                )
        seen = verify_copy(twin, triggers, Tolerance.EXACT, variant=variant, device=target.device)
        assert seen.verdict is Verdict.INTACT
    return benign
