"""From an architecture's name in the catalog to an `nn.Module` with no weights of its own worth keeping.

    torchvision:resnet18?num_classes=10
    timm:vit_tiny_patch16_224?num_classes=100
    factory:package.module:callable?width=16        only from packages that the operator allows

A catalog is data and must not name code to run or files to open: factories need permission, and
arguments that make a library download weights or unpickle a file are refused.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl

from torch import nn

from fwm_audit.errors import ArchitectureError, ErrorCode

#: Arguments through which timm and torchvision fetch or unpickle weights, or run a file.
_REFUSED: Final = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "file",
        "model_name",
        "name",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "progress",
        "scriptable",
        "weights",
        "weights_backbone",
    }
)
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
_FACTORY = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<callable>[A-Za-z_]\w*)")
Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Architecture:
    """A parsed architecture: `source` is torchvision, timm or factory."""

    source: str
    name: str
    arguments: dict[str, Any]


def parse(spec: str) -> Architecture:
    """The parts of an architecture's name.

    Raises:
        ArchitectureError: It has not the form `source:name?argument=value&...`.
    """
    source, colon, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    pattern = {"torchvision": _NAME, "timm": _NAME, "factory": _FACTORY}.get(source)
    if not colon or pattern is None or not pattern.fullmatch(name):
        raise ArchitectureError(
            ErrorCode.ARCH_UNKNOWN,
            f"arch {spec[:120]!r} is not torchvision:NAME, timm:NAME or factory:package.module:callable, "
            "each with ?argument=value where wanted",
        )
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=32)
    except ValueError:
        raise ArchitectureError(ErrorCode.ARCH_UNKNOWN, f"arch {spec[:120]!r}: arguments are a=1&b=2") from None
    arguments = {key: _scalar(value) for key, value in pairs}
    if refused := sorted(_REFUSED & arguments.keys()):
        raise ArchitectureError(
            ErrorCode.ARCH_NOT_ALLOWED,
            f"arch argument {refused[0]!r} could load code or weights and is refused",
        )
    return Architecture(source, name, arguments)


def build(spec: str, allowed_factories: Sequence[str] = ()) -> nn.Module:
    """The module that `spec` names, on the CPU, in eval mode, with arbitrary weights.

    Args:
        spec: See the module's docstring.
        allowed_factories: Packages (`company.models` allows all below it) that factories may come from.

    Raises:
        ArchitectureError: Unknown name, not allowed, or the library does not take the arguments.
    """
    arch = parse(spec)
    if arch.source == "factory":
        module = arch.name.partition(":")[0]
        if not _within(module, allowed_factories):
            raise ArchitectureError(
                ErrorCode.ARCH_NOT_ALLOWED,
                f"factory {arch.name!r} is in no allowed package: pass --allow-factory {module.partition('.')[0]} "
                "if you trust that code",
            )
    try:
        model = _construct(arch, allowed_factories)
    except ArchitectureError:
        raise
    except Exception as error:  # noqa: BLE001 - a library's constructor may raise anything at all
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ArchitectureError(ErrorCode.ARCH_UNKNOWN, f"cannot build {spec[:120]!r}: {reason}") from None
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            ErrorCode.ARCH_UNKNOWN, f"{spec[:120]!r} made a {type(model).__name__}, not a torch.nn.Module"
        )
    return model.eval()


def factory_package(spec: str) -> str | None:
    """The top-level package from which an architecture comes, None for those of timm and torchvision.

    Raises:
        ArchitectureError: As `parse`.
    """
    arch = parse(spec)
    return re.split("[.:]", arch.name)[0] if arch.source == "factory" else None


@functools.cache
def code_sha256(package: str) -> str | None:
    """SHA-256 of all files of a package when this process first looked; None where that does not tell what it is.

    As where it is in an archive, or looks for modules in folders that it adds to its `__path__`.
    """
    lines = []
    try:
        if (found := importlib.util.find_spec(package)) is None:  # of a top-level name, this imports nothing
            return None
        for place in map(Path, found.submodule_search_locations or [found.origin or package]):
            for path in [place] if place.is_file() else _files(place):
                if path.name == "__init__.py" and b"__path__" in path.read_bytes():
                    return None
                with path.open("rb") as file:
                    lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {path.relative_to(place)}")
    except (ImportError, OSError, ValueError):
        return None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _files(root: Path) -> Iterator[Path]:
    """All files of a folder in a fixed order, in linked folders too, without what Python caches.

    Raises:
        OSError: It is no folder.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    seen = set()
    for folder, names, files in os.walk(root, onerror=fail, followlinks=True):
        real = Path(folder).resolve()
        names[:] = sorted(name for name in names if name != "__pycache__") if real not in seen else []
        seen.add(real)  # links may lead in circles
        yield from (Path(folder, name) for name in sorted(files))


def input_shape(spec: str, model: nn.Module) -> tuple[int, ...] | None:
    """Shape of one input where the library states it: timm's configuration, torchvision's 3 x 224 x 224.

    A factory's module may state it as an attribute `input_shape`. None: the user has to say.
    """
    stated = getattr(model, "input_shape", None)
    if stated is None and isinstance(config := getattr(model, "pretrained_cfg", None), dict):
        stated = config.get("input_size")
        if stated is not None and isinstance(channels := parse(spec).arguments.get("in_chans"), int):
            stated = (channels, *stated[1:])
        if stated is not None and isinstance(size := parse(spec).arguments.get("img_size"), int):
            stated = (stated[0], size, size)
    if stated is None and parse(spec).source == "torchvision":
        stated = (3, 224, 224)
    return None if stated is None else tuple(int(size) for size in stated)


def _construct(arch: Architecture, allowed_factories: Sequence[str]) -> Any:
    # Each library takes seconds to import, in every worker process: only those that build something with it do.
    if arch.source == "torchvision":
        import torchvision  # noqa: PLC0415

        builder = torchvision.models.get_model_builder(arch.name)
        # Some fetch the weights of their backbone unless told not to.
        more = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
        return builder(weights=None, **more, **arch.arguments)
    if arch.source == "timm":
        import timm  # noqa: PLC0415

        if not timm.is_model(arch.name):
            raise ArchitectureError(ErrorCode.ARCH_UNKNOWN, f"timm has no model {arch.name!r}")
        return timm.create_model(arch.name, pretrained=False, **arch.arguments)
    module, _, name = arch.name.partition(":")
    factory = getattr(importlib.import_module(module), name)
    # What an allowed module has imported from elsewhere is reachable through it, and is not its own.
    if not _within(str(getattr(factory, "__module__", "")), allowed_factories):
        raise ArchitectureError(
            ErrorCode.ARCH_NOT_ALLOWED,
            f"factory {arch.name!r} is not defined in an allowed package, only imported there",
        )
    return factory(**arch.arguments)


def _within(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _scalar(text: str) -> Scalar:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, int | float | bool | str) else text
