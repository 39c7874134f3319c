"""Embedding: from a model and a secret key to mirrored boundary pairs, the model untouched.

    generator   keyed noise -> inputs whose two top classes are the keyed pair (float32, trained)
    refinement  the stragglers are moved in input space by the same loss (float32)
    centring    8-bit image + t * sign mask with gap(t) = f_a - f_b = 0 (float64, secant)
    rungs       both sides at gap = +delta and -delta, for each rung and declared variant

The work of one call is divided over the ranks of the torch.distributed process group, if there is
one: the generator is trained data-parallel over the pairs, the rest is sharded by pair.
Formulas: method notes in the README; the paper this descends from is Yin et al., ICIP 2022
(arXiv 2208.07585), whose triggers stand at a margin set by its loss, not at a boundary.
"""

from __future__ import annotations

import itertools
import logging
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import torch
import torch.distributed
from torch import Tensor, nn

from fwm_audit import generator as gen
from fwm_audit.errors import EmbeddingError, ErrorCode, ModelError, UsageError
from fwm_audit.key import SecretKey
from fwm_audit.triggers import Coverage, Rung, TriggerSet, place, quantise
from fwm_audit.verdict import Tolerance, Verdict, upper_rate
from fwm_audit.verification import device_of, dtype_of, float64_copy, run, verify_copy

log = logging.getLogger(__name__)

#: Pairs that one rank works on at a time: bounds memory, and enough to fill two to sixteen cores.
BLOCK: Final = 16
MAX_PAIRS: Final = 4096
VARIANTS: Final = ("float32", "float16", "bfloat16")
#: delta of the exact rung in units of the measured noise: other machines' kernels add their own.
EXACT_NOISE_FACTOR: Final = 1000
#: ... and in units of rounding of the largest logit, where this machine showed no noise at all.
EXACT_ULP_FACTOR: Final = 1024
FLOAT32_NOISE_FACTOR: Final = 32
HALF_SHIFT_FACTOR: Final = 2
_STEPS: Final = 30
_REFINE_STEPS: Final = 60
_SOLVE_STEPS: Final = 24
_EPS: Final = 2.0**-52


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of an embedding: its stage, how far that is, and the generator's loss where it trains."""

    stage: str
    done: int
    total: int
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class _Peers:
    """The ranks that share one embedding: this process alone, or a torch.distributed group."""

    rank: int
    size: int

    @classmethod
    def current(cls) -> _Peers:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls(0, 1)

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's value, on every rank, in rank order."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(everyone, mine)
        return everyone


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Pairs under construction, one row each; `t` is the centre, where the gap is zero."""

    number: Tensor  # int64 [n]
    classes: Tensor  # int64 [n, 2]
    images: Tensor  # uint8 [n, *shape]
    signs: Tensor  # bool [n, *shape]
    t: Tensor  # float64 [n]
    slope: Tensor  # float64 [n], d gap / d t
    sides: Tensor  # float64 [variants, n, 2], t of the exact rung

    def __len__(self) -> int:
        return len(self.number)

    def take(self, index: Tensor) -> _Pairs:
        return _Pairs(
            self.number[index], self.classes[index], self.images[index], self.signs[index],
            self.t[index], self.slope[index], self.sides[:, index],
        )  # fmt: skip

    @classmethod
    def join(cls, parts: Sequence[_Pairs]) -> _Pairs:
        """All rows, in the order of their numbers."""
        one = cls(
            *(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__[:-1]),
            torch.cat([part.sides for part in parts], 1),
        )
        return one.take(one.number.argsort())


@dataclass(frozen=True, slots=True)
class _Solution:
    t: Tensor
    lead: Tensor
    solved: Tensor  # bool


@dataclass(slots=True)
class _Target:
    """The target classifier in float64, one copy for each variant, and in float32 for training."""

    twins: dict[str, nn.Module]
    trainee: nn.Module
    shape: tuple[int, ...]
    range: tuple[float, float]
    device: torch.device
    num_classes: int = 0
    scale: float = 0.0  # spread of the logits of one input: the unit of every margin here
    magnitude: float = 0.0  # largest logit

    @property
    def released(self) -> nn.Module:
        return next(iter(self.twins.values()))

    def gap(self, model: nn.Module, pairs: _Pairs, t: Tensor) -> tuple[Tensor, Tensor]:
        inputs = place(pairs.images, pairs.signs, t, self.range)
        return gap_and_lead(run(model, inputs, self.device), pairs.classes)


def embed(
    model: nn.Module,
    *,
    secret: SecretKey,
    model_id: str,
    input_shape: Sequence[int],
    pairs: int = 16,
    coverage: float | None = None,
    method: str = "mirror",
    variants: Sequence[str] = (),
    input_range: tuple[float, float] = (-1.0, 1.0),
    device: str | torch.device | None = None,
    arch: str = "",
    checkpoint_sha256: str = "",
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TriggerSet:
    """A trigger set that reveals any edit of the model's function; the model is only read.

    Args:
        model: Deterministic classifier from float inputs [N, *input_shape] to logits [N, K].
        secret: Fixes class pairs, noise and the generator; the same secret makes the same triggers.
        model_id: Name under which the model is audited.
        input_shape: Shape of one input.
        pairs: Mirrored pairs to make; each is two triggers.
        coverage: Go on beyond `pairs` until this share of the parameters is covered.
        method: `mirror`.
        variants: Further dtypes (`float16`, `bfloat16`) in which the model is shipped; each gets its
            own exact triggers, and a checkpoint of that dtype is checked against them.
        input_range: Smallest and largest value of a preprocessed input.
        device: Where to compute; None is where the model's parameters are.
        arch: Name from which auditors rebuild the architecture, see `architectures`.
        checkpoint_sha256: Digest of the released file.
        prepare: Wraps the generator for data-parallel training (Ray Train's `prepare_model`).
        progress: Called at every step.

    Raises:
        UsageError: The settings make no sense.
        ModelError: The model is stochastic, does not run in float64, answers NaN, has K < 2.
        EmbeddingError: Too few pairs were found, or the coverage was not reached.
    """
    shape = tuple(int(size) for size in input_shape)
    _check_settings(method, pairs, coverage, variants, input_range, shape)
    report = progress or (lambda _: None)
    peers = _Peers.current()
    where = torch.device(device) if device is not None else device_of(model)
    base = dtype_of(model)
    target = _Target(_twins(model, base, variants, where), _trainee(model, where), shape, tuple(input_range), where)
    report(Progress("probe", 0, 1))
    _probe(target)
    made, delta, noise, covered = _make_pairs(target, secret, pairs, coverage, peers, prepare, report)
    report(Progress("rungs", 0, 1))
    rungs = _rungs(target, made, delta, noise, peers)
    triggers = TriggerSet(
        model_id=model_id,
        key_id=secret.key_id,
        method=method,
        arch=arch,
        checkpoint_sha256=checkpoint_sha256,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        input_shape=shape,
        input_range=target.range,
        num_classes=target.num_classes,
        classes=made.classes,
        images=made.images,
        signs=made.signs,
        rungs=rungs,
        coverage=covered.report(),
        flip_rate=1.0,
        benign=0,
        environment=_environment(where),
    )
    report(Progress("confirm", 0, 1))
    benign = _confirm(target, triggers)
    report(Progress("confirm", 1, 1))
    return replace(triggers, benign=benign, flip_rate=upper_rate(benign))


def gap_and_lead(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """gap = f_a - f_b and lead = min(f_a, f_b) - max of all others, each [N]; lead is +inf for K = 2."""
    both = logits.gather(1, classes.to(logits.device))
    others = logits.scatter(1, classes.to(logits.device), -math.inf)
    return both[:, 0] - both[:, 1], both.min(1).values - others.max(1).values


# ---------------------------------------------------------------------------------------------- target


def _check_settings(
    method: str,
    pairs: int,
    coverage: float | None,
    variants: Sequence[str],
    input_range: tuple[float, float],
    shape: tuple[int, ...],
) -> None:
    if method != "mirror":
        raise UsageError(f"method {method!r} is not known: use mirror")
    if not 1 <= pairs <= MAX_PAIRS:
        raise UsageError(f"pairs is {pairs}: use 1 to {MAX_PAIRS}")
    if coverage is not None and not 0 < coverage <= 1:
        raise UsageError(f"coverage is {coverage}: it is a share, above 0 and at most 1")
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise UsageError(f"variant {unknown[0]!r} is not known: declare any of {', '.join(VARIANTS)}")
    if not input_range[0] < input_range[1] or not all(map(math.isfinite, input_range)):
        raise UsageError(f"input range {input_range} is empty or not finite")
    if not shape or min(shape) < 1:
        raise UsageError(f"input shape {shape} has no elements")


def _twins(model: nn.Module, base: str, variants: Sequence[str], device: torch.device) -> dict[str, nn.Module]:
    """Float64 copies by variant: the weights as released, and rounded to each declared dtype."""
    released = float64_copy(model, device)
    _refuse_nan(released)
    twins = {base: released}
    for name in variants:
        if name != base:
            twins[name] = rounded(released, getattr(torch, name))
    return twins


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose floating parameters and buffers went through `dtype`, as in a cast checkpoint."""
    twin = float64_copy(model, device_of(model))
    for tensor in itertools.chain(twin.parameters(), twin.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(tensor.data.to(dtype))
    return twin


def _trainee(model: nn.Module, device: torch.device) -> nn.Module:
    """The frozen float32 copy against which the generator trains."""
    return float64_copy(model, device).float()


def _refuse_nan(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ModelError(ErrorCode.NON_FINITE, f"{name} holds NaN: release a sound checkpoint first")


def _probe(target: _Target) -> None:
    """Fill in what the model tells about itself on plain inputs; refuse a model that cannot be served."""
    low, high = target.range
    count = 4
    ramp = torch.arange(count * math.prod(target.shape), dtype=torch.float64)
    # Any fixed inputs do: the fractional parts of multiples of the golden ratio fill the range evenly.
    inputs = (low + (high - low) * (ramp * 0.6180339887498949 % 1.0)).reshape(count, *target.shape)
    try:
        first = run(target.released, inputs, target.device)
    except ModelError:
        _explain_failure(target, inputs)
        raise
    if first.shape[1] < 2:
        raise ModelError(
            ErrorCode.MODEL_UNSUITABLE,
            f"the model answers {first.shape[1]} logit(s): boundaries need at least two classes",
        )
    if not torch.isfinite(first).all():
        raise ModelError(ErrorCode.NON_FINITE, "the model answers NaN or infinite logits on plain inputs")
    magnitude = first.abs().max().item()
    second = run(target.released, inputs, target.device)
    if (first - second).abs().max().item() > 1e-9 * magnitude:
        raise ModelError(
            ErrorCode.MODEL_STOCHASTIC,
            "the model answers the same input differently each time: switch off dropout or sampling in eval mode",
        )
    alone = run(target.released, inputs[:1], target.device)
    difference = (first[:1] - alone).abs().max().item()
    if first.dtype != torch.float64 or 1e-10 * magnitude < difference < 1e-4 * magnitude:
        raise ModelError(
            ErrorCode.NO_FLOAT64,
            "the model computes in lower precision inside although its weights are float64: "
            "remove casts such as .float() or autocast from forward()",
        )
    if difference > 1e-10 * magnitude:
        raise ModelError(
            ErrorCode.MODEL_STOCHASTIC,
            "the model's answer to one input depends on the others in the batch: normalise by running statistics",
        )
    target.num_classes = first.shape[1]
    target.magnitude = magnitude
    target.scale = (first - first.mean(1, keepdim=True)).std().item()
    if target.scale == 0:
        raise ModelError(ErrorCode.MODEL_UNSUITABLE, "the model answers equal logits for all classes")


def _explain_failure(target: _Target, inputs: Tensor) -> None:
    """Raise NO_FLOAT64 where the model does run in float32."""
    try:
        run(target.trainee, inputs.float(), target.device)
    except ModelError:
        return
    raise ModelError(
        ErrorCode.NO_FLOAT64,
        "the model runs in float32 but not in float64: remove casts and float32 constants from forward()",
    )


# ----------------------------------------------------------------------------------------------- pairs


def _make_pairs(
    target: _Target,
    secret: SecretKey,
    goal: int,
    wanted_coverage: float | None,
    peers: _Peers,
    prepare: Callable[[nn.Module], nn.Module] | None,
    report: Callable[[Progress], None],
) -> tuple[_Pairs, float, float, _Covered]:
    """Pairs on the exact rung of every variant, with its delta and noise, and what they cover."""
    stream = enumerate(gen.class_pairs(secret, target.num_classes))
    net: nn.Module = gen.Generator(target.shape, target.range, secret).to(target.device)
    net = prepare(net) if prepare is not None else net
    optimizer = torch.optim.Adam(net.parameters(), 2e-3, betas=(0.5, 0.999))
    covered = _Covered(target.released)
    kept: list[_Pairs] = []
    delta = noise = 0.0
    fruitless = 0
    while (found := sum(map(len, kept))) < goal or covered.total < (wanted_coverage or 0.0):
        if fruitless == 3:
            raise EmbeddingError(
                ErrorCode.PAIRS_NOT_FOUND,
                f"{found} of {goal} pairs found: the model cannot be steered to its class boundaries from inputs "
                f"in {target.range}; check input_range, or ask for fewer pairs",
            )
        if found >= max(goal, MAX_PAIRS):
            raise EmbeddingError(
                ErrorCode.COVERAGE_NOT_REACHED,
                f"{found} pairs cover {covered.total:.4f} of the parameters, {wanted_coverage} was asked: "
                "ask for less; weights that no input reaches (dead units) cannot be covered",
            )
        missing = goal - found if found < goal else BLOCK
        block = list(itertools.islice(stream, max(peers.size, min(missing, BLOCK * peers.size))))
        numbers, classes = zip(*block[peers.rank :: peers.size], strict=True)
        wanted = torch.tensor(classes)
        draws = gen.noise(secret, list(numbers)).to(target.device)
        inputs = _train(target, net, optimizer, draws, wanted, len(block), peers, report)
        inputs = _refine(target, inputs, wanted, report)
        mine = _centre(target, inputs, torch.tensor(numbers), wanted)
        if delta == 0.0:
            noise = max(peers.gather(_measure_noise(target, mine)))
            delta = max(EXACT_NOISE_FACTOR * noise, EXACT_ULP_FACTOR * _EPS * target.magnitude)
        mine = _place_exact(target, mine, delta)
        covered.add(target, mine, delta)
        covered.merge(peers)
        joined = _Pairs.join(peers.gather(mine))
        fruitless = 0 if len(joined) else fruitless + 1
        kept.append(joined)
        report(Progress("pairs", found + len(joined), goal))
    made = _Pairs.join(kept)
    # A block may find more than was asked; without a coverage goal the first ones are kept.
    return (made if wanted_coverage else made.take(torch.arange(goal))), delta, noise, covered


def _train(
    target: _Target,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    draws: Tensor,
    classes: Tensor,
    block: int,
    peers: _Peers,
    report: Callable[[Progress], None],
) -> Tensor:
    """Inputs [n, *shape] of the generator trained on this block of keyed noise and class pairs.

    Loss: mean relu(margin - lead) + 0.1 mean gap^2 with margin 0.3, all in units of the logit scale.
    Stops early when nine in ten pairs have their two classes on top.
    """
    for step in range(_STEPS):
        gap, lead = gap_and_lead(target.trainee(net(draws)), classes)
        each = torch.relu(0.3 - lead / target.scale) + 0.1 * (gap / target.scale) ** 2
        # Gradients are averaged over ranks; the factor makes that the mean over the whole block.
        loss = each.sum() * (peers.size / block)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch declares no types here
        optimizer.step()
        seen = peers.gather((loss.item() / peers.size, int((lead > 0).sum())))
        total = sum(value for value, _ in seen)
        if not math.isfinite(total):
            raise EmbeddingError(ErrorCode.PAIRS_NOT_FOUND, "the generator's training diverged: check input_range")
        report(Progress("generator", step + 1, _STEPS, total))
        if sum(leading for _, leading in seen) >= 0.9 * block:
            break
    with torch.no_grad():
        return net(draws).detach()


def _refine(target: _Target, inputs: Tensor, classes: Tensor, report: Callable[[Progress], None]) -> Tensor:
    """The inputs after signed-gradient steps with momentum on those that miss the margin.

    On EfficientNet-Lite0 (1000 classes) 30 generator steps and this take half the time of training
    the generator alone to the same share of pairs.
    """
    low, high = target.range
    inputs = inputs.clone()
    count = len(inputs)
    step = torch.full((count,), (high - low) / 64, device=inputs.device)
    best = torch.full((count,), math.inf, device=inputs.device)
    momentum = torch.zeros_like(inputs)
    todo = torch.arange(count, device=inputs.device)
    for number in range(_REFINE_STEPS):
        batch = inputs[todo].requires_grad_(requires_grad=True)
        gap, lead = gap_and_lead(target.trainee(batch), classes[todo.cpu()])
        each = torch.relu(0.3 - lead / target.scale) + 0.5 * gap.abs() / target.scale
        (gradient,) = torch.autograd.grad(each.sum(), batch)
        with torch.no_grad():
            open_ = (lead < 0.15 * target.scale) | (gap.abs() > 0.3 * target.scale)
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


def _centre(target: _Target, inputs: Tensor, numbers: Tensor, classes: Tensor) -> _Pairs:
    """Those inputs in compact form whose gap can be brought to zero along the sign mask."""
    images = quantise(inputs, target.range)
    signs = torch.empty_like(images, dtype=torch.bool)
    slope = torch.empty(len(images), dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    flat = torch.zeros(1, *target.shape, dtype=torch.bool)
    for i, image in enumerate(images):  # one at a time: a float64 graph of a large model is large
        point = place(image[None], flat, zero, target.range).to(target.device).requires_grad_(requires_grad=True)
        gap, _ = gap_and_lead(target.released(point), classes[i : i + 1])
        (gradient,) = torch.autograd.grad(gap.sum(), point)
        signs[i] = (gradient[0] >= 0).cpu()
        slope[i] = gradient.abs().sum().item()
    sides = torch.zeros(len(target.twins), len(images), 2, dtype=torch.float64)
    start = torch.zeros(len(images), dtype=torch.float64)
    pairs = _Pairs(numbers, classes, images, signs, start, slope, sides)
    found = _solve(target, target.released, pairs, start, 0.0, 64 * _EPS * target.magnitude)
    usable = found.solved & (found.lead > 0.05 * target.scale) & (slope > 0)
    return replace(pairs, t=found.t).take(usable.nonzero().flatten())


def _solve(
    target: _Target, model: nn.Module, pairs: _Pairs, start: Tensor, level: float, tolerance: float
) -> _Solution:
    """t with |gap(t) - level| <= tolerance, by secant steps that stay in the bracket once there is one.

    Networks of rectifiers are piecewise linear along the mask, so a handful of steps suffice; what is
    not solved after `_SOLVE_STEPS` evaluations is reported so and replaced by its caller.
    """
    t = start.clone()
    best_t, best, best_lead = start.clone(), torch.full_like(start, math.inf), torch.full_like(start, -math.inf)
    below, above = torch.full_like(start, -math.inf), torch.full_like(start, math.inf)
    last_t, last = torch.full_like(start, math.nan), torch.full_like(start, math.nan)
    active = torch.arange(len(start))
    for _ in range(_SOLVE_STEPS):
        if not len(active):
            break
        here = t[active]
        gap, lead = target.gap(model, pairs.take(active), here)
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
    return _Solution(best_t, best_lead, best <= tolerance)


def _place_exact(target: _Target, pairs: _Pairs, delta: float) -> _Pairs:
    """Those pairs that stand at +delta and -delta in every variant, both labels as keyed."""
    sides = torch.empty_like(pairs.sides)
    good = torch.ones(len(pairs), dtype=torch.bool)
    for number, twin in enumerate(target.twins.values()):
        center = pairs.t
        if twin is not target.released:
            center = _solve(target, twin, pairs, pairs.t, 0.0, 64 * _EPS * target.magnitude).t
        for side, level in ((0, delta), (1, -delta)):
            found = _solve(target, twin, pairs, center + level / pairs.slope, level, delta / 4)
            sides[number, :, side] = found.t
            good &= found.solved & (found.lead > 0.01 * target.scale)
    return replace(pairs, sides=sides).take(good.nonzero().flatten())


# ----------------------------------------------------------------------------- calibration, rungs, coverage


def _executions(target: _Target, model: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Logits of the same inputs under every benign way of execution that this machine offers."""
    yield run(model, inputs, target.device)
    yield torch.cat([run(model, one, target.device) for one in inputs.split(1)])
    yield torch.cat([run(model, part, target.device) for part in inputs.split(3)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        yield run(model, inputs, target.device)
    finally:
        torch.set_num_threads(threads)
    if inputs.dim() == 4:
        yield run(model, inputs.to(memory_format=torch.channels_last), target.device)


def _measure_noise(target: _Target, pairs: _Pairs) -> float:
    """Largest difference of a gap between benign executions, in logits."""
    if not len(pairs):
        return 0.0
    inputs = place(pairs.images, pairs.signs, pairs.t, target.range)
    gaps = [gap_and_lead(logits, pairs.classes)[0] for logits in _executions(target, target.released, inputs)]
    noise = max((gap - gaps[0]).abs().max().item() for gap in gaps)
    if noise > 1e-9 * target.magnitude:
        raise ModelError(
            ErrorCode.NO_FLOAT64,
            f"benign execution moves the logits by {noise:.1e}, more than float64 does: the model computes in lower "
            "precision inside; remove casts such as .float() or autocast from forward()",
        )
    return noise


def _rungs(target: _Target, pairs: _Pairs, delta: float, noise: float, peers: _Peers) -> tuple[Rung, ...]:
    """The exact rung of every variant, then the wider rungs that tell how far a changed model moved."""
    everyone = torch.arange(len(pairs))
    rungs = []
    wide = _wide_deltas(target, pairs)
    for number, (variant, twin) in enumerate(target.twins.items()):
        rungs.append(Rung(variant, Tolerance.EXACT, delta, noise, "float64", everyone, pairs.sides[number]))
        for name, (level, measured) in wide.items():
            mine = pairs.take(everyone[peers.rank :: peers.size])
            center = mine.t if number == 0 else mine.take(torch.arange(len(mine))).sides[number].mean(1)
            sides = []
            good = torch.ones(len(mine), dtype=torch.bool)
            for sign in (1, -1):
                found = _solve(target, twin, mine, center + sign * level / mine.slope, sign * level, level / 8)
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


def _wide_deltas(target: _Target, pairs: _Pairs) -> dict[Tolerance, tuple[float, float]]:
    """delta and the measured shift behind it: float32 arithmetic, and weights rounded to half precision."""
    inputs = place(pairs.images, pairs.signs, pairs.t, target.range)
    exact = run(target.released, inputs, target.device)

    def shift(logits: Tensor) -> float:
        moved = gap_and_lead(logits.double(), pairs.classes)[0] - gap_and_lead(exact, pairs.classes)[0]
        return moved.abs().max().item()

    float32 = shift(run(target.trainee, inputs.float(), target.device))
    half = max(
        shift(run(rounded(target.released, dtype), inputs, target.device))
        for dtype in (torch.float16, torch.bfloat16)
    )
    deltas = {
        Tolerance.FLOAT32: (FLOAT32_NOISE_FACTOR * float32, float32),
        Tolerance.HALF: (HALF_SHIFT_FACTOR * half, half),
    }
    # A model released in half precision does not move when rounded to it: that rung would say nothing.
    return {name: (level, seen) for name, (level, seen) in deltas.items() if math.isfinite(level) and seen > 0}


@dataclass(slots=True)
class _Covered:
    """Which parameters some pair sees to the last bit, as one flag for each element."""

    model: nn.Module
    flags: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flags = {
            name: torch.zeros(parameter.shape, dtype=torch.bool) for name, parameter in self.model.named_parameters()
        }

    def add(self, target: _Target, pairs: _Pairs, delta: float) -> None:
        """Count what these pairs see: |d gap / d theta| * |theta| * 2^-23 > delta at the centre."""
        parameters = dict(self.model.named_parameters())
        if not parameters:
            return
        inputs = place(pairs.images, pairs.signs, pairs.t, target.range)
        for tensor in parameters.values():
            tensor.requires_grad_(requires_grad=True)
        try:
            for i in range(len(pairs)):
                gap, _ = gap_and_lead(self.model(inputs[i : i + 1].to(target.device)), pairs.classes[i : i + 1])
                gradients = torch.autograd.grad(gap.sum(), list(parameters.values()), allow_unused=True)
                for (name, tensor), gradient in zip(parameters.items(), gradients, strict=True):
                    if gradient is not None:
                        self.flags[name] |= ((gradient * tensor.detach()).abs() * 2.0**-23 > delta).cpu()
        finally:
            for tensor in parameters.values():
                tensor.requires_grad_(requires_grad=False)

    def merge(self, peers: _Peers) -> None:
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


def _confirm(target: _Target, triggers: TriggerSet) -> int:
    """Comparisons of the finished key with the untouched model, every one in agreement.

    Raises:
        EmbeddingError: One disagrees: the key would raise false alarms.
    """
    benign = 0
    for variant, twin in target.twins.items():
        rung = triggers.rungs_of(variant)[0]
        inputs, labels = triggers.materialise(rung)
        for logits in _executions(target, twin, inputs):
            benign += len(labels)
            if (logits.argmax(1) != labels).any():
                raise EmbeddingError(
                    ErrorCode.PAIRS_NOT_FOUND, f"the finished key disagrees with its own model ({variant}): embed again"
                )
        seen = verify_copy(twin, triggers, Tolerance.EXACT, variant=variant, device=target.device)
        assert seen.verdict is Verdict.INTACT
    return benign


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"torch": torch.__version__, "python": platform.python_version(), "device": f"{device.type} {name}"}
