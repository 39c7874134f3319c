"""Embedding: from a model and a secret key to a trigger set, the model untouched.

The work of one call is divided over the ranks of the torch.distributed process group, if there is
one: the generator is trained data-parallel over the pairs, the rest is sharded by pair. The method
descends from Yin et al., ICIP 2022 (arXiv 2208.07585), whose triggers stand at a margin that its
loss sets; these stand at a distance that numeric noise sets.
"""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import torch
from torch import nn

from fwm_audit import generator as gen
from fwm_audit.calibration import Covered, confirm, exact_delta, make_rungs, measure_noise
from fwm_audit.errors import EmbeddingError, ErrorCode, UsageError
from fwm_audit.key import SecretKey
from fwm_audit.pairs import Pairs, centre, place_exact, refine, train
from fwm_audit.peers import Peers, Progress, Report
from fwm_audit.target import Target
from fwm_audit.triggers import TriggerSet
from fwm_audit.verdict import upper_rate
from fwm_audit.verification import device_of, dtype_of

#: Pairs that one rank works on at a time: bounds memory, and enough to fill two to sixteen cores.
BLOCK: Final = 16
MAX_PAIRS: Final = 4096
VARIANTS: Final = ("float32", "float16", "bfloat16")


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
    released: str | None = None,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    progress: Report | None = None,
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
        released: Dtype of the released file, which names its variant; None is that of the parameters.
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
    peers = Peers.current()
    where = torch.device(device) if device is not None else device_of(model)
    report(Progress("probe", 0, 1))
    target = Target.of(
        model, shape, (float(input_range[0]), float(input_range[1])), variants, where, released or dtype_of(model)
    )
    made, delta, noise, covered = _make_pairs(target, secret, pairs, coverage, peers, prepare, report)
    report(Progress("rungs", 0, 1))
    rungs = make_rungs(target, made, delta, noise, peers)
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
    benign = confirm(target, triggers)
    report(Progress("confirm", 1, 1))
    return replace(triggers, benign=benign, flip_rate=upper_rate(benign))


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


def _make_pairs(
    target: Target,
    secret: SecretKey,
    goal: int,
    wanted_coverage: float | None,
    peers: Peers,
    prepare: Callable[[nn.Module], nn.Module] | None,
    report: Report,
) -> tuple[Pairs, float, float, Covered]:
    """Pairs on the exact rung of every variant, with its delta and noise, and what they cover."""
    stream = enumerate(gen.class_pairs(secret, target.num_classes))
    net: nn.Module = gen.Generator(target.shape, target.range, secret).to(target.device)
    net = prepare(net) if prepare is not None else net
    optimizer = torch.optim.Adam(net.parameters(), 2e-3, betas=(0.5, 0.999))
    covered = Covered(target.released)
    kept: list[Pairs] = []
    noise: float | None = None
    delta = 0.0
    fruitless = stale = 0
    while (found := sum(map(len, kept))) < goal or covered.total < (wanted_coverage or 0.0):
        if fruitless == 4:
            raise EmbeddingError(
                ErrorCode.PAIRS_NOT_FOUND,
                f"{found} of {goal} pairs found: the model cannot be steered to its class boundaries from inputs "
                f"in {target.range}; check input_range, or ask for fewer pairs",
            )
        if found >= max(goal, MAX_PAIRS) or stale == 4:
            raise EmbeddingError(
                ErrorCode.COVERAGE_NOT_REACHED,
                f"{found} pairs cover {covered.total:.4f} of the parameters, {wanted_coverage} was asked: "
                "ask for less; weights that no input reaches (dead units) cannot be covered",
            )
        missing = goal - found if found < goal else BLOCK
        # A few at least, so that one hard pair is not tried alone again and again.
        block = list(itertools.islice(stream, max(peers.size, min(max(missing, 4), BLOCK * peers.size))))
        numbers, classes = zip(*block[peers.rank :: peers.size], strict=True)
        wanted = torch.tensor(classes)
        draws = gen.noise(secret, list(numbers)).to(target.device)
        inputs = train(target, net, optimizer, draws, wanted, len(block), peers, report)
        inputs = refine(target, inputs, wanted, report)
        mine = centre(target, inputs, torch.tensor(numbers), wanted)
        if noise is None:
            measured = [seen for seen in peers.gather(measure_noise(target, mine)) if seen is not None]
            if not measured:
                fruitless += 1
                continue
            noise = max(measured)
            delta = exact_delta(target, noise)
        joined = Pairs.join(peers.gather(place_exact(target, mine, delta)))
        if wanted_coverage is None:  # a block may bring more than were missing
            joined = joined.take(torch.arange(min(missing, len(joined))))
        before = covered.total
        covered.add(target, joined.take(torch.arange(peers.rank, len(joined), peers.size)), delta)
        covered.merge(peers)
        stale = stale + 1 if found >= goal and covered.total < before + 1e-4 else 0
        fruitless = 0 if len(joined) else fruitless + 1
        kept.append(joined)
        report(Progress("pairs", found + len(joined), goal))
    assert noise is not None
    if covered.flags and covered.total == 0:
        raise EmbeddingError(
            ErrorCode.COVERAGE_NOT_REACHED,
            "the pairs see no parameter to its last bit: the model's weights have no influence on its labels",
        )
    return Pairs.join(kept), delta, noise, covered


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} {name}",
    }
