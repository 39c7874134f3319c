"""From an architecture and a checkpoint's tensors to a float64 module that holds them, and nothing twice.

    skeleton    the architecture without memory for its weights; built once, twinned for each checkpoint
    load        tensors become the weights of a twin, each converted for itself
    Widened     a large model keeps its weights as the file stores them, and widens them while they are used

float64 holds every value of the narrower floats, so widening early or late makes the same numbers.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fwm_audit.architectures import build
from fwm_audit.errors import CheckpointError, ErrorCode, ModelError
from fwm_audit.verification import as_float64

#: Elements that are compared or widened at a time.
_PIECE: Final = 1 << 19
_DTYPE: Final = Tensor.dtype.__get__  # type: ignore[attr-defined]  # a property of a class written in C
#: Properties of a tensor that give its values, and methods that give none of them.
_VIEWS: Final = frozenset({"T", "mT", "H", "mH", "data", "real", "imag", "grad"})
_FACTS: Final = frozenset(
    {
        "__len__", "dim", "get_device", "is_complex", "is_contiguous", "is_floating_point", "ndimension", "nelement",
        "numel", "size", "stride",
    }
)  # fmt: skip


def skeleton(arch: str, allowed_factories: Sequence[str]) -> nn.Module:
    """The architecture in float64, frozen and in eval mode, as embedding and audit both use it.

    What a checkpoint will bring takes no memory until `load`. Everything else is built on the CPU in the
    library's own dtype, so that buffers which no checkpoint holds get the same values on both sides.

    Raises:
        ArchitectureError: As `architectures.build`.
        ModelError: It holds complex numbers, or weights under several tensors.
    """
    model = build(arch, allowed_factories)
    brought = Counter(tensor.data_ptr() for tensor in model.state_dict().values())
    held = Counter(tensor.data_ptr() for tensor in _tensors(model) if tensor.numel())
    if any(pointer in brought and count > brought[pointer] for pointer, count in held.items()):
        raise ModelError(
            ErrorCode.MODEL_UNSUITABLE,
            f"{arch[:120]!a} holds a tensor that shares its memory with a weight and is in no checkpoint: compute it "
            "in forward() instead",
        )
    for tensor in _tensors(model):
        if tensor.data_ptr() in brought and tensor.numel() > 1:
            dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
            tensor.data = torch.zeros((), dtype=dtype).expand(tensor.shape)
    return as_float64(model, torch.device("cpu"))


def twin(model: nn.Module) -> nn.Module:
    """A copy of a skeleton, as free of weights as that."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        if _is_empty(tensor):  # deepcopy would give it memory
            view = tensor.detach()
            memo[id(tensor)] = nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view
    return copy.deepcopy(model, memo)


def loaded_bytes(model: nn.Module) -> int:
    """Bytes of the module's tensors in their present dtype, once they are loaded."""
    return sum(tensor.nbytes for tensor in _tensors(model))


def held_bytes(model: nn.Module) -> int:
    """Bytes of memory behind the module's tensors now."""
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(model))


def load(
    model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device | None = None, *, as_stored: bool = False
) -> nn.Module:
    """The module itself on `device`, with these tensors for its weights; makes sure that it holds them.

    Args:
        model: From `skeleton` or `twin`.
        tensors: By the names of its state dict, fitted to it.
        device: None is the CPU.
        as_stored: Return a `Widened` one, for which the tensors have to stay as they are.

    Raises:
        CheckpointError: It holds something else afterwards: parameters that are one in the architecture
            differ in the checkpoint, or the module keeps its weights elsewhere than in its state dict.
    """
    device = device or torch.device("cpu")
    owners = {tensor.data_ptr(): tensor for tensor in _tensors(model)}  # each of them is filled once
    stored: list[Tensor] = []
    placed: dict[str, int] = {}
    for name, held in model.state_dict().items():
        owner, given = owners.pop(held.data_ptr(), None), tensors[name]
        if owner is None or owner.shape != given.shape:
            continue  # what it holds is compared below
        if as_stored and given.is_floating_point() and given.dim() > 1 and given.dtype is not torch.float64:
            owner.data = given
            stored.append(owner)
        else:
            on_cpu = device.type == "cpu"  # to a GPU, values travel as narrow as they are
            owner.data = given.to(device, owner.dtype if on_cpu else None, copy=True).to(owner.dtype)
        placed[name] = owner.data_ptr()
    for name, held in model.state_dict().items():
        exact = held.is_floating_point() or held.dtype is tensors[name].dtype
        if not (exact and placed.get(name) == held.data_ptr()) and not _equal(held, tensors[name]):
            raise CheckpointError(
                ErrorCode.CHECKPOINT_MISMATCH,
                f"{name[:80]!a} does not keep its tensor: it is tied to one that differs in the checkpoint, "
                "or the architecture stores its weights elsewhere",
            )
    return Widened(model, stored) if stored else model.to(device)


class Widened(nn.Module):
    """A model on the CPU that computes what its float64 form would, without having one.

    Its large weights stay in the dtype and in the memory in which they were given, and look like float64
    to every function of PyTorch that takes them: values are widened for the time of one call.

    Args:
        model: In float64 but for `stored`.
        stored: Parameters and buffers of it.
    """

    def __init__(self, model: nn.Module, stored: Sequence[Tensor]) -> None:
        super().__init__()
        self.model = model
        self._stored = {id(tensor): tensor for tensor in stored}

    def forward(self, batch: Tensor) -> Any:
        """As the model.

        Raises:
            TypeError: The model narrows float64 to something else, or writes to its weights.
        """
        with _Widening(self._stored.keys()):
            return self.model(batch)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.to`: this module itself in float64 on the CPU, elsewhere the model with its weights widened."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # noqa: SLF001  # as nn.Module.to does
        if dtype in {None, torch.float64} and (device is None or device.type == "cpu"):
            return self
        return self.whole().to(*args, **kwargs)

    def whole(self) -> nn.Module:
        """The model with all its weights in float64, for good."""
        for tensor in self._stored.values():
            tensor.data = tensor.data.double()
        return self.model


class _Widening(TorchFunctionMode):
    def __init__(self, stored: Any) -> None:
        super().__init__()
        self._stored = stored

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if not any(id(value) in self._stored for value in _flat((args, kwargs))):
            return _not_narrowed(func(*args, **kwargs), (args, kwargs))
        name = getattr(func, "__name__", "")
        if func == _DTYPE:
            return torch.float64
        if name in _FACTS or (name == "__get__" and func.__self__.__name__ not in _VIEWS):  # type: ignore[attr-defined]
            return func(*args, **kwargs)
        if name == "__set__" or (name.endswith("_") and not name.endswith("__")):
            raise TypeError("a weight is written to")
        if func is functional.linear and not kwargs and args[1].dim() == 2:
            return self._linear(*args)
        return _not_narrowed(func(*self._widened(args), **self._widened(kwargs)), (args, kwargs))

    def _linear(self, batch: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Piece by piece: the last layers of some networks are most of their bytes."""
        batch, bias = self._widened((batch, bias))
        rows = max(1, _PIECE // weight.shape[1])
        # One place for all pieces: glibc before 2.38 does not use aligned memory again for as much as it was.
        place = torch.empty(min(rows, len(weight)), weight.shape[1], dtype=torch.float64)
        parts = [functional.linear(batch, place[: len(piece)].copy_(piece)) for piece in weight.split(rows)]
        answer = torch.cat(parts, dim=-1)
        return answer if bias is None else answer + bias

    def _widened(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if id(value) in self._stored else value
        if isinstance(value, dict):
            return {key: self._widened(one) for key, one in value.items()}
        return type(value)(map(self._widened, value)) if type(value) in {list, tuple} else value


def _not_narrowed(answer: Any, given: Any) -> Any:
    """The answer; a model that leaves float64 may go by the dtype of its weights, which is not what it seems.

    Raises:
        TypeError: It is in a narrower dtype than what it was made of.
    """
    narrow = isinstance(answer, Tensor) and answer.is_floating_point() and answer.dtype is not torch.float64
    if narrow and any(isinstance(value, Tensor) and value.dtype is torch.float64 for value in _flat(given)):
        raise TypeError(f"float64 becomes {answer.dtype}")
    return answer


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _flat(one)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _tensors(model: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, each once."""
    return [*model.parameters(), *model.buffers()]


def _is_empty(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and not any(tensor.stride())


def _equal(held: Tensor, given: Tensor) -> bool:
    """Whether a tensor holds these values; without a second copy of a large one in its dtype."""
    if held.shape != given.shape:
        return False
    parts = zip(held.reshape(-1).split(_PIECE), given.reshape(-1).split(_PIECE), strict=True)
    return all(torch.equal(ours, theirs.to(ours)) for ours, theirs in parts)
