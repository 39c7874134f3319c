"""Verification: run the triggers, take arg max, compare with the key. Labels only.

The exact rung is run in float64, where benign execution (batch size, threads, memory layout,
another kernel) moves a logit by some 1e-14 and a trigger stands 1e-12 or more from its boundary.
Wider rungs are run only when the finest one breaks, to say how far the model has moved. A model that
casts to float32 inside has a float32 rung as its finest, and is run in float32.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fwm_audit.arithmetic import float64_mode
from fwm_audit.errors import ErrorCode, ModelError
from fwm_audit.triggers import Rung, TriggerSet
from fwm_audit.verdict import (
    RUNGS,
    Displacement,
    RungCount,
    Tolerance,
    Verdict,
    binomial_p_value,
    decide,
    displacement_of,
)

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Verification:
    """What one verification saw; counts are those of the finest rung of the variant.

    Attributes:
        mismatched: Indices of the triggers whose label differs; never the labels.
        p_value: P(at least this many mismatches by numeric noise alone), see `verdict.binomial_p_value`.
        forward_passes: Inputs sent through the model.
        dtype: Arithmetic of the finest rung.
        device: Kind of the processor whose labels decided.
    """

    verdict: Verdict
    displacement: Displacement
    matches: int
    total: int
    mismatched: tuple[int, ...]
    p_value: float
    variant: str
    forward_passes: int
    dtype: str
    device: str


def verify(
    model: nn.Module,
    triggers: TriggerSet,
    tolerance: str | Tolerance = Tolerance.EXACT,
    *,
    device: str | torch.device | None = None,
) -> Verification:
    """Compare a model's labels on the triggers with the key.

    The model is neither changed nor moved: a copy is taken in eval mode and in float64. The variant
    is the one declared for the dtype of the model's parameters, or for batch norms merged into
    convolutions where the model lacks them, else the released one. A module that
    keeps values derived from its weights in attributes of its own, and has run before, answers with
    those: verify such a model as it was loaded.

    Args:
        model: From float inputs [N, *input_shape] to logits [N, K].
        triggers: The opened key.
        tolerance: `exact`, `float32` or `half`: how far the model may have moved and count as intact.
        device: Where to run; None is where the model's parameters are.

    Raises:
        ModelError: It cannot run in float64, answers another number of classes or NaN, or the key
            lacks the rung of `tolerance`.
    """
    where = torch.device(device) if device is not None else device_of(model)
    variant = triggers.variant_for(dtype_of(model), folded=_is_folded(set(model.state_dict()), triggers.folds))
    return verify_copy(float64_copy(model, where), triggers, tolerance, variant=variant, device=where)


def _is_folded(names: set[str], folds: Sequence[tuple[str, str]]) -> bool:
    """Whether these names of a state dict have the folded layers without the batch norms behind them."""
    if not folds:
        return False
    first = f"{folds[0][0]}.weight"
    # Wrappers such as data-parallel ones put a prefix of theirs before all names.
    prefixes = (name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}"))
    for prefix in sorted(prefixes, key=len):
        if all(f"{prefix}{layer}.weight" in names for layer, _ in folds):
            return not any(f"{prefix}{norm}.running_mean" in names for _, norm in folds)
    return False


def verify_copy(
    model: nn.Module,
    triggers: TriggerSet,
    tolerance: str | Tolerance,
    *,
    variant: str,
    device: torch.device,
) -> Verification:
    """As `verify`, for a float64 copy in eval mode that the caller made and placed on `device`.

    Where a label differs on a kind of processor that the key was never tried on, the CPU has the last
    word: a kernel may compute in less than float64 there, and that is no finding about the model.
    """
    tolerance = Tolerance(tolerance)
    rungs = {rung.name: rung for rung in triggers.rungs_of(variant)}
    finest = next(rungs[name] for name in RUNGS if name in rungs)
    counts = {finest.name: _count(model, triggers, finest, device)}
    passes = 0
    if not counts[finest.name].holds and device.type not in (*triggers.measured, "cpu"):
        passes, device = counts[finest.name].total, torch.device("cpu")
        counts = {finest.name: _count(model.to(device), triggers, finest, device)}
    if not counts[finest.name].holds:
        for name in RUNGS:
            if name in rungs and name not in counts:
                counts[name] = _count(model, triggers, rungs[name], device)
                if counts[name].holds:
                    break
    seen = counts[finest.name]
    return Verification(
        verdict=decide(counts, tolerance),
        displacement=displacement_of(counts),
        matches=seen.total - len(seen.mismatched),
        total=seen.total,
        mismatched=seen.mismatched,
        p_value=binomial_p_value(seen.total, len(seen.mismatched), triggers.flip_rate),
        variant=variant,
        forward_passes=passes + sum(count.total for count in counts.values()),
        dtype=finest.dtype,
        device=device.type,
    )


def _count(model: nn.Module, triggers: TriggerSet, rung: Rung, device: torch.device) -> RungCount:
    dtype: torch.dtype = getattr(torch, rung.dtype)
    inputs, labels = _materialised(triggers, rung)
    # All rungs of a key share their arithmetic, so the copy changes its dtype once at most.
    logits = run(model.to(dtype), inputs.to(dtype), device)
    if logits.shape[1] != triggers.num_classes:
        raise ModelError(
            ErrorCode.MODEL_UNSUITABLE,
            f"the model answers {logits.shape[1]} classes, the key was made for {triggers.num_classes}",
        )
    if not torch.isfinite(logits).all():
        raise ModelError(
            ErrorCode.NON_FINITE,
            "the model answers NaN or infinite logits: its weights are damaged or overflow",
        )
    # Among equal logits the smallest index wins on every device; that is part of the contract.
    wrong = torch.nonzero(logits.argmax(1) != labels).flatten()
    return RungCount(len(labels), tuple(wrong.tolist()))


@functools.lru_cache(maxsize=1)
def _materialised(triggers: TriggerSet, rung: Rung) -> tuple[Tensor, Tensor]:
    """As `TriggerSet.materialise`; the last ones are kept, as a worker meets a key again and again."""
    return triggers.materialise(rung)


def breaks(model: nn.Module, triggers: TriggerSet, rung: Rung, device: torch.device) -> bool:
    """Whether any label of one rung differs, or logits are not finite; stops at the first that does.

    For simulations of many edits: it answers what `verify_copy` would find, and counts nothing.
    """
    dtype: torch.dtype = getattr(torch, rung.dtype)
    inputs, labels = triggers.materialise(rung)
    start, size = 0, 2
    while start < len(labels):
        logits = run(model.to(dtype), inputs[start : start + size].to(dtype), device)
        if not torch.isfinite(logits).all() or (logits.argmax(1) != labels[start : start + size]).any():
            return True
        start, size = start + size, 2 * size
    return False


def run(
    model: nn.Module,
    inputs: Tensor,
    device: torch.device,
    *,
    batch: int | None = None,
    replaced: bool = True,
    quote: bool = False,
) -> Tensor:
    """Logits [N, K] on the CPU, in batches that keep memory bounded and large models fed.

    Args:
        model: From [N, *input_shape] to [N, K].
        inputs: [N, *input_shape].
        device: Where the model is.
        batch: Inputs of one pass; None is what suits the processor.
        replaced: Whether `arithmetic` may take the place of PyTorch's kernels.
        quote: Whether the model's own error may be quoted; it could quote the inputs, so not for triggers.

    Raises:
        ModelError: The model does not run on these inputs, or answers something else than [N, K].
    """
    outputs = []
    for part in inputs.split(batch or batch_size(inputs[0], device)):
        if device.type == "cuda":
            part = part.pin_memory().to(device, non_blocking=True)  # noqa: PLW2901 - the same inputs, elsewhere
        with torch.no_grad(), _plain_float32(part):
            outputs.append(ask(model, part, replaced=replaced, quote=quote))
    return torch.cat(outputs).cpu()


def ask(model: nn.Module, batch: Tensor, *, replaced: bool = True, quote: bool = False) -> Tensor:
    """Logits [N, K] of one pass, with a graph where gradients are wanted.

    Args:
        model: From [N, *input_shape] to [N, K].
        batch: [N, *input_shape], where the model is.
        replaced: As for `run`.
        quote: As for `run`.

    Raises:
        ModelError: As `run`, or a gradient in the inputs is wanted and there is none.
    """
    try:
        answer = _pass(model, batch) if replaced else model(batch)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - the model is anybody's code
        if "DefaultCPUAllocator" in str(error):  # torch's name for a failed malloc, in a bare RuntimeError
            raise MemoryError from None
        reason = f"{type(error).__name__}: {str(error)[:200]}" if quote else type(error).__name__
        raise ModelError(
            ErrorCode.MODEL_UNSUITABLE,
            f"the model fails on inputs of shape {tuple(batch.shape)} in {batch.dtype} ({reason})",
        ) from None
    if not isinstance(answer, Tensor) or answer.dim() != 2 or len(answer) != len(batch):
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ModelError(
            ErrorCode.MODEL_UNSUITABLE, f"the model answers {shape} for a batch of {len(batch)}, not [N, K] logits"
        )
    if torch.is_grad_enabled() and batch.requires_grad and not answer.requires_grad:
        raise ModelError(
            ErrorCode.MODEL_UNSUITABLE,
            "the model's logits have no gradient in its inputs: remove .detach(), torch.no_grad() and rounding "
            "from forward()",
        )
    return answer


def _pass(model: nn.Module, batch: Tensor) -> Any:
    if batch.is_cuda or torch.is_grad_enabled():  # with a graph, the batch itself
        with float64_mode(batch):
            return model(batch)
    try:
        # A copy, as a model that writes to its input may fail after that.
        with float64_mode(batch):
            return model(batch.clone())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return model(batch.clone())  # it may insist on another memory layout than that of our convolutions


@contextlib.contextmanager
def _plain_float32(batch: Tensor) -> Iterator[None]:
    """float32 on CUDA means float32: cuDNN's default for convolutions keeps 10 bits of mantissa (TF32)."""
    if not (batch.is_cuda and batch.dtype is torch.float32):
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def batch_size(example: Tensor, device: torch.device) -> int:
    """Inputs of one pass, 1 to 256: 32 MiB in float64 on a GPU, 3 on a CPU so that activations stay in its cache."""
    elements = 1 << 22 if device.type == "cuda" else 3 << 17
    return max(1, min(256, elements // max(1, example.numel())))


def float64_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy in float64 and eval mode on `device`; the model itself stays as it is.

    Raises:
        ModelError: The model cannot be copied.
    """
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(ErrorCode.MODEL_UNSUITABLE, f"the model cannot be copied: {str(error)[:200]}") from None
    return as_float64(twin, device)


def as_float64(model: nn.Module, device: torch.device) -> nn.Module:
    """The module itself in float64 on `device`, frozen, in eval mode, without values cached by earlier passes.

    Raises:
        ModelError: It holds complex numbers, whose imaginary parts float64 would drop unseen.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_complex():
            raise ModelError(ErrorCode.MODEL_UNSUITABLE, f"{name} is complex: complex models are not served")
    return forget(model.to(device=device, dtype=torch.float64)).requires_grad_(requires_grad=False)


def forget(model: nn.Module) -> nn.Module:
    """The module in eval mode, without what it derived from its weights in earlier passes.

    Several of timm's models keep attention biases between passes in eval mode and drop them when
    training begins: without this, one model's weights would answer for the next one's.
    """
    return model.train().eval()


def dtype_of(model: nn.Module) -> str:
    """The dtype that all floating parameters share, or `mixed`; it names the variant."""
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()} & set(_FLOATS)
    return dtypes.pop() if len(dtypes) == 1 else "mixed"


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
