"""What a key can promise: numeric noise, the rungs that stand on it, coverage, and the final check."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fwm_audit.errors import EmbeddingError, ErrorCode, ModelError
from fwm_audit.pairs import Pairs, solve
from fwm_audit.peers import UNIT, Peers
from fwm_audit.target import Target, executions, gap_and_lead, lower_precision, rounded
from fwm_audit.triggers import Coverage, Rung, TriggerSet, place
from fwm_audit.verdict import Tolerance, Verdict
from fwm_audit.verification import ask, forget, verify_copy

#: A rung whose delta is less than this many times its measured noise is refused.
LEAST_NOISE_FACTOR: Final = 8
#: delta of the finest rung in units of the measured noise: other machines' kernels add their own. In float64 the noise
#: was alike on every processor tried; tests/benchmarks/results has it by network, CPU and GPU together.
_NOISE_FACTOR: Final = {torch.float64: 128, torch.float32: 32}
#: ... and in units of rounding of the largest logit, where this machine showed no noise at all.
_ROUNDING_FACTOR: Final = {torch.float64: 128, torch.float32: 64}
#: The largest delta of a finest rung, in units of the logits' spread.
_LARGEST: Final = {torch.float64: 1e-5, torch.float32: 0.02}
#: Pairs of a wider rung at most: how far a model moved does not take all pairs of a large key.
_WIDE_PAIRS: Final = 32
_FLOAT32_SHIFT_FACTOR: Final = 32
_HALF_SHIFT_FACTOR: Final = 2


def measure_noise(target: Target, model: nn.Module, inputs: Tensor, classes: Tensor) -> float:
    """Largest difference of a gap between benign executions of the same inputs, in logits."""
    if not len(inputs):
        return 0.0
    every = [way() for way in executions(target, model, inputs)]
    gaps = [gap_and_lead(logits, classes)[0] for logits in every if logits is not None]
    return max((gap - gaps[0]).abs().max().item() for gap in gaps)


def finest_delta(target: Target, noise: float) -> float:
    """Distance of the finest rung: far enough from measured noise and from rounding, no further.

    Raises:
        ModelError: The noise is that of lower precision than `target.dtype`, or drowns the logits.
    """
    if target.dtype is torch.float64 and noise > 1e-9 * target.magnitude:
        raise lower_precision()
    delta = max(_NOISE_FACTOR[target.dtype] * noise, _ROUNDING_FACTOR[target.dtype] * target.rounding)
    if not delta <= _LARGEST[target.dtype] * target.scale:
        raise ModelError(
            ErrorCode.MODEL_UNSUITABLE,
            f"{target.dtype} tells the logits apart only to {delta:.0e} at a spread of {target.scale:.0e}: "
            "remove a large common offset from the logits, or arithmetic of low precision from forward()",
        )
    return delta


def make_rungs(target: Target, pairs: Pairs, delta: float, noise: float, peers: Peers) -> tuple[Rung, ...]:
    """The finest rung of every variant, then the wider rungs that tell how far a changed model moved."""
    everyone = torch.arange(len(pairs))
    dtype = str(target.dtype).removeprefix("torch.")
    finest = Tolerance.EXACT if target.dtype is torch.float64 else Tolerance.FLOAT32
    rungs = []
    wide = {name: values for name, values in _wide_deltas(target, pairs).items() if values[0] > 8 * delta}
    for number, (variant, twin) in enumerate(target.twins.items()):
        rungs.append(Rung(variant, finest, delta, noise, dtype, everyone, pairs.sides[number]))
        for name, (level, shift) in wide.items():
            units = everyone[:_WIDE_PAIRS].split(UNIT)
            found = [_sides(target, twin, pairs.take(rows), number, level) for rows in peers.share(units)]
            t, good = map(torch.cat, zip(*peers.collect(found, len(units)), strict=True))
            index = good.nonzero().flatten()
            # What a few pairs say of the distance is no rung.
            if 2 * len(index) >= max(1, min(len(pairs), _WIDE_PAIRS)):
                rungs.append(Rung(variant, name, level, noise, dtype, index, t[index], shift))
    return tuple(rungs)


def _sides(target: Target, twin: nn.Module, pairs: Pairs, number: int, level: float) -> tuple[Tensor, Tensor]:
    """t [n, 2] at +level and -level for a variant and its number, and bool [n], which pairs reach both."""
    center = pairs.t if number == 0 else pairs.sides[number].mean(1)
    sides = []
    good = torch.ones(len(pairs), dtype=torch.bool)
    for sign in (1, -1):
        found = solve(target, twin, pairs, center + sign * level / pairs.slope, sign * level, level / 8)
        sides.append(found.t)
        good &= found.solved & (found.lead > level / 2)
    return torch.stack(sides, 1), good


def _wide_deltas(target: Target, pairs: Pairs) -> dict[Tolerance, tuple[float, float]]:
    """delta and the measured shift behind it: float32 arithmetic, and weights rounded to half precision."""
    inputs = place(pairs.images, pairs.signs, pairs.t, target.range)
    gaps = gap_and_lead(target.run(target.released, inputs), pairs.classes)[0]

    def shift(logits: Tensor) -> float:
        return (gap_and_lead(logits, pairs.classes)[0] - gaps).abs().max().item()

    halves = [
        shift(target.run(rounded(target.released, dtype).to(target.dtype), inputs))
        for dtype in (torch.float16, torch.bfloat16)
    ]
    shifts = {Tolerance.HALF: (_HALF_SHIFT_FACTOR, max(halves))}
    if target.dtype is torch.float64:
        single = shift(target.run(target.trainee, inputs, torch.float32))
        shifts = {Tolerance.FLOAT32: (_FLOAT32_SHIFT_FACTOR, single)} | shifts
    # A model released in half precision does not move when rounded to it: that rung would say nothing.
    return {name: (factor * seen, seen) for name, (factor, seen) in shifts.items() if 0 < seen < math.inf}


def last_bit(values: Tensor) -> Tensor:
    """What the lowest mantissa bit of each value is worth in float32, in the dtype of the values; 0 for zeros."""
    mantissa, exponent = torch.frexp(values)  # |mantissa| in [1/2, 1): 24 bits, the first of them implied
    return torch.where(mantissa == 0, 0.0, torch.ldexp(torch.ones_like(values), exponent - 24))


class Covered:
    """Which parameters some chosen pair sees to the last bit, one bit for each element, and the pairs' classes."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self.sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        self.seen: NDArray[np.uint8] = np.zeros(sum((size + 7) // 8 for size in self.sizes.values()), np.uint8)
        self.classes: set[int] = set()

    def flags(self, target: Target, pairs: Pairs, delta: float) -> list[NDArray[np.uint8]]:
        """For each pair the parameters that it sees to the last bit, packed as `seen` is."""
        inputs = place(pairs.images, pairs.signs, pairs.t, target.range).to(target.dtype)
        model = target.released
        parameters = self.parameters
        rows: list[NDArray[np.uint8]] = []
        if not parameters:
            return [self.seen] * len(pairs)
        for tensor in parameters.values():
            tensor.requires_grad_()
        try:
            for i in range(len(pairs)):
                forget(model)  # what it kept from passes without gradients would hide its weights
                gap, _ = gap_and_lead(ask(model, inputs[i : i + 1].to(target.device)), pairs.classes[i : i + 1])
                gradients = (
                    torch.autograd.grad(gap.sum(), list(parameters.values()), allow_unused=True)
                    if gap.requires_grad
                    else [None] * len(parameters)
                )
                rows.append(
                    np.concatenate(
                        [
                            np.packbits(
                                ((gradient * last_bit(tensor.detach())).abs() > delta).flatten().cpu().numpy()
                                if gradient is not None
                                else np.zeros(tensor.numel(), bool)
                            )
                            for tensor, gradient in zip(parameters.values(), gradients, strict=True)
                        ]
                    )
                )
        finally:
            forget(model)
            for tensor in parameters.values():
                tensor.requires_grad = False
        return rows

    def choose(
        self, flags: list[NDArray[np.uint8]], classes: list[tuple[int, int]], count: int, share: float | None
    ) -> list[int]:
        """Indices of the pairs that, added one by one, each bring most: classes that stand nowhere yet, then coverage.

        Chooses `count` pairs, and more until `share` of the parameters is covered as long as that helps.

        Args:
            flags: What each pair sees, packed as `seen` is.
            classes: The two classes of each pair.
            count: Pairs to choose.
            share: Share of the parameters to cover, if any is asked for.
        """
        left = list(range(len(flags)))
        chosen: list[int] = []
        while left and (len(chosen) < count or (share is not None and self.total < share)):
            gains = {
                row: (len({*classes[row]} - self.classes), int(np.bitwise_count(flags[row] & ~self.seen).sum()))
                for row in left
            }
            best = max(left, key=gains.__getitem__)
            if len(chosen) >= count and gains[best] == (0, 0):
                break
            left.remove(best)
            chosen.append(best)
            self.seen |= flags[best]
            self.classes |= {*classes[best]}
        return chosen

    def asleep(self) -> dict[str, Tensor]:
        """By name of a bias, the int64 indices of the units whose bias no chosen pair sees.

        Biases near zero, whose last bit is too small to be seen anyway, do not count.
        """
        units = {}
        for name, seen in self._split():
            bias = self.parameters[name].detach().cpu()
            if name.rpartition(".")[2] == "bias" and bias.dim() == 1 and self.seen.any():
                open_ = torch.from_numpy(np.unpackbits(seen, count=len(bias)) == 0)
                units[name] = (open_ & (bias.abs() > 1e-3 * bias.abs().mean())).nonzero().flatten()
        return {name: index for name, index in units.items() if len(index)}

    def _split(self) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        start = 0
        for name, size in self.sizes.items():
            end = start + (size + 7) // 8
            yield name, self.seen[start:end]
            start = end

    @property
    def total(self) -> float:
        """Share of all parameters."""
        return int(np.bitwise_count(self.seen).sum()) / max(1, sum(self.sizes.values()))

    def report(self) -> Coverage:
        """The shares, in total and by parameter tensor."""
        layers = {name: int(np.bitwise_count(seen).sum()) / max(1, self.sizes[name]) for name, seen in self._split()}
        return Coverage(self.total, layers)


def confirm(target: Target, triggers: TriggerSet, peers: Peers) -> tuple[int, float, bool]:
    """Compare the finished key with the untouched model under every benign way of execution.

    The ways are shared out over the ranks.

    Returns:
        How many labels were compared, every one in agreement, the largest noise of a trigger's own
        boundary, in logits, and whether the other kind of processor was among the ways.

    Raises:
        EmbeddingError: A label disagrees, or a rung's delta is below 8 times the noise on its
            triggers: the key would raise false alarms.
    """
    benign, noise, both = 0, 0.0, True
    for number, (variant, twin) in enumerate(target.twins.items()):
        rung = triggers.rungs_of(variant)[0]
        inputs, labels = triggers.materialise(rung)
        answers = _every_logits(target, twin, inputs, peers)
        both &= answers[-1] is not None
        every = [logits for logits in answers if logits is not None]
        top = every[0].topk(2, 1).indices
        gaps = [gap_and_lead(logits, top)[0] for logits in every]
        noise = max(noise, *((gap - gaps[0]).abs().max().item() for gap in gaps))
        benign += len(every) * len(labels)
        wrong = sum(int((logits.argmax(1) != labels).sum()) for logits in every)
        if wrong or rung.delta < LEAST_NOISE_FACTOR * noise:
            error = EmbeddingError(
                ErrorCode.PAIRS_NOT_FOUND,
                f"the finished key is not safe from false alarms ({variant}: {wrong} labels differ, delta is "
                f"{rung.delta:.0e} at a noise of {noise:.0e}): embed again, with another pair count",
            )
            error.agreed = True  # all ranks have the same logits
            raise error
        if number % peers.size == peers.rank:
            seen = verify_copy(twin, triggers, Tolerance.EXACT, variant=variant, device=target.device)
            assert seen.verdict is Verdict.INTACT
    return benign, noise, both


def _every_logits(target: Target, twin: nn.Module, inputs: Tensor, peers: Peers) -> list[Tensor | None]:
    ways = executions(target, twin, inputs)
    mine = peers.together(lambda: [way() for way in peers.share(ways)])
    return peers.collect(mine, len(ways))
