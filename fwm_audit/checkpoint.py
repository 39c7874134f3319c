"""Checkpoints: from an untrusted file to tensors that fit an architecture, without copying them.

A checkpoint's container is told by its content, never by its name. Two are read: safetensors, and
the zip archives of `torch.save`, memory-mapped with `weights_only=True`. There is no fallback to a
full unpickler, whatever the file says, because unpickling runs code of the file's choice.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, BinaryIO, Final

import safetensors
import safetensors.torch
import torch

from fwm_audit.errors import CheckpointError, ErrorCode

_ZIP_MAGIC: Final = b"PK\x03\x04"
_PICKLE_MAGIC: Final = re.compile(rb"\x80[\x02-\x05]")
#: Two orders of magnitude above the tensors of the largest models, and what it takes to list so many.
_MAX_TENSORS: Final = 100_000
_MAX_LISTING_BYTES: Final = 32 << 20
#: Of a descriptor behind a member's bytes, the longest that there is.
_TRAILER_BYTES: Final = 24
_END_OF_ZIP, _END_OF_ZIP64, _ZIP64_LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_FLOATING: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WRAPPERS: Final = ("state_dict", "model")
#: DistributedDataParallel and torch.compile, in either order.
_PREFIXES: Final = ("_orig_mod.", "module.", "_orig_mod.")
_REFUSED_GLOBAL: Final = re.compile(r"GLOBAL (\S+)")
_RESAVE: Final = "save the state dict again with safetensors.torch.save_file or torch.save"


class Container(StrEnum):
    """File formats that are read."""

    SAFETENSORS = "safetensors"
    TORCH_ZIP = "torch-zip"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state dict as it stands in a file: dense CPU tensors, mapped from it and not yet read."""

    container: Container
    tensors: dict[str, torch.Tensor]

    @property
    def dtype(self) -> str:
        """`float32`, `float16`, `bfloat16` or `float64` where all floating tensors share it, else `mixed`."""
        found = {tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point()}
        return str(found.pop()).removeprefix("torch.") if len(found) == 1 else "mixed"


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint in a file.

    Args:
        path: A local file that is not written to while the tensors are in use.

    Raises:
        CheckpointError: It is no container that is read, is damaged, would run code, or holds
            something other than dense tensors.
        MemoryError: It takes more than this process may hold.
    """
    # By its descriptor, because torch.load goes by a name's ending, and so that nothing can be put
    # in the file's place between the checks and the load.
    with open(path, "rb") as file:  # noqa: PTH123  # paths are str throughout the io modules
        path = f"/proc/self/fd/{file.fileno()}"
        container = _container(file.read(9))
        loaded = _load_safetensors(path) if container is Container.SAFETENSORS else _load_torch_zip(path)
    return Checkpoint(container, _dense(_unprefixed(_unwrapped(loaded))))


def fit(checkpoint: Checkpoint, reference: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under the names and in the order of an architecture's state dict.

    BatchNorm's `num_batches_tracked` may be missing and is 0 then, as in torch; it has no effect on
    inference. Floating dtypes may differ from the reference's.

    Args:
        checkpoint: What was opened.
        reference: The architecture's state dict; tensors on the meta device will do.

    Raises:
        CheckpointError: Names, shapes or kinds of tensors differ, or a tensor holds NaN. Infinity
            is allowed, masks are made of it.
    """
    wanted = _unprefixed(reference)
    tensors = dict(checkpoint.tensors)
    for name, like in wanted.items():
        if name.rpartition(".")[2] == "num_batches_tracked" and name not in tensors:
            tensors[name] = torch.zeros(like.shape, dtype=like.dtype)
    # safetensors keeps one name of tensors that share memory; its other names stand for the same tensor.
    for name, like in wanted.items():
        twins = (other for other in wanted if other in checkpoint.tensors and _tied(like, wanted[other]))
        if name not in tensors and (twin := next(twins, None)) is not None:
            tensors[name] = checkpoint.tensors[twin]
    differing = [name for name in wanted if name in tensors and not _alike(tensors[name], wanted[name])]
    problems = {
        "missing": _few(name for name in wanted if name not in tensors),
        "unexpected": _few(name for name in tensors if name not in wanted),
        "differing": _few(differing, lambda name: f" is {_form(tensors[name])}, not {_form(wanted[name])}"),
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {names}" for kind, names in problems.items() if names)
        raise CheckpointError(
            ErrorCode.CHECKPOINT_MISMATCH,
            f"the tensors are not those of the architecture ({found}): check arch and its arguments",
        )
    for name in wanted:
        # The minimum of a tensor with a NaN is NaN; isnan() would allocate a quarter of it anew.
        if tensors[name].is_floating_point() and tensors[name].numel() and tensors[name].amin().isnan():
            raise CheckpointError(
                ErrorCode.NON_FINITE,
                f"the tensor {_shown(name)} holds NaN: the file is damaged or training diverged",
            )
    return {full: tensors[name] for full, name in zip(reference, wanted, strict=True)}


def _container(head: bytes) -> Container:
    if head.startswith(_ZIP_MAGIC):
        return Container.TORCH_ZIP
    # A length beyond the end of the file is a cut-short safetensors file: its loader says so.
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_LISTING_BYTES:
        return Container.SAFETENSORS
    if _PICKLE_MAGIC.match(head):
        raise CheckpointError(
            ErrorCode.CHECKPOINT_UNSAFE, f"a bare pickle (torch.save before 1.6) is never opened: {_RESAVE}"
        )
    what = "the file is empty" if not head else "neither a safetensors file nor a zip archive of torch.save"
    raise CheckpointError(ErrorCode.CONTAINER_UNKNOWN, f"{what}: check the URI, or {_RESAVE}")


def _load_safetensors(path: str) -> dict[str, torch.Tensor]:
    try:
        _check_header(path)
        tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    except CheckpointError:
        raise
    except Exception as error:  # the header is hostile input, and its errors come from three libraries
        _no_memory(error)
        raise _corrupt(error) from error
    return tensors


def _load_torch_zip(path: str) -> Any:
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        if refused := _REFUSED_GLOBAL.search(str(error)):
            raise CheckpointError(
                ErrorCode.CHECKPOINT_UNSAFE,
                f"loading it would call {_shown(refused[1])}, which is not a part of tensors: if you trust "
                f"where it comes from, {_RESAVE} there",
            ) from None
        raise _corrupt(error) from error
    except Exception as error:  # the pickle is hostile input: its opcodes can raise anything
        _no_memory(error)
        raise _corrupt(error) from error


def _check_header(path: str) -> None:
    """Refuse a header that names a tensor twice, of which loaders keep one or the other, or too many.

    Raises:
        CheckpointError: It does.
        ValueError: It is no JSON.
    """
    with open(path, "rb") as file:  # noqa: PTH123  # as above
        text = file.read(int.from_bytes(file.read(8), "little"))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs) or len(pairs) > _MAX_TENSORS:
            raise CheckpointError(
                ErrorCode.CHECKPOINT_UNSAFE,
                f"its header names a tensor twice, or over {_MAX_TENSORS} of them: {_RESAVE}",
            )
        return found

    json.loads(text, object_pairs_hook=unique)


def _check_archive(path: str) -> None:
    """Refuse what torch.save does not write, before torch sees it.

    What is listed here is what torch will read: there is one directory, at the end, and it is told in one way.

    Raises:
        CheckpointError: The archive is damaged, compressed, ambiguous, oversized or TorchScript.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            directory, comment = archive.start_dir, archive.comment
        names = [member.filename.partition("/")[2] for member in members]
    except Exception as error:  # zipfile lets struct.error, ValueError and more through
        _no_memory(error)
        raise _corrupt(error) from error
    if "data.pkl" not in names:
        raise CheckpointError(ErrorCode.CONTAINER_UNKNOWN, f"a zip archive, but not of torch.save: {_RESAVE}")
    if any(name == "constants.pkl" or name.startswith("code/") for name in names):
        raise CheckpointError(ErrorCode.CHECKPOINT_UNSAFE, f"a TorchScript archive holds code: {_RESAVE}")
    size = os.path.getsize(path)  # noqa: PTH202  # as above
    pickled = max(member.file_size for member, name in zip(members, names, strict=True) if name.lower() == "data.pkl")
    with open(path, "rb") as file:  # noqa: PTH123  # as above
        unusual = (
            comment
            or len(members) > _MAX_TENSORS
            or pickled > _MAX_LISTING_BYTES
            or len({member.filename.partition("/")[0] for member in members}) != 1
            or len({name.lower() for name in names}) != len(names)  # torch's reader does not tell a from A
            or not all(map(_is_plain, members))
            or sum(member.file_size for member in members) > size
            or directory != _directory(file, size)
            or (places := _places(file, members, directory)) is None
            or places != _places_for_torch(path)
        )
    if unusual:
        raise CheckpointError(
            ErrorCode.CHECKPOINT_UNSAFE,
            f"torch.save writes no compressed, repeated, overlapping or hidden members, but this does: {_RESAVE}",
        )


def _is_plain(member: zipfile.ZipInfo) -> bool:
    """A stored file, neither encrypted nor a link, whose name stays within the archive's own folder."""
    name = member.filename
    return (
        member.compress_type == zipfile.ZIP_STORED
        and member.compress_size == member.file_size
        and not member.flag_bits & 0x1
        and stat.S_IFMT(member.external_attr >> 16) in {0, stat.S_IFREG}
        and name == member.orig_filename
        and not name.endswith("/")
        and name.isprintable()
        and "\\" not in name
        and not {"", ".", ".."} & set(name.split("/"))
    )


def _directory(file: BinaryIO, size: int) -> int | None:
    """Where the directory begins, by the record at the very end of an archive; None if there is none."""
    file.seek(max(0, size - 22))
    record = file.read(22)
    if not record.startswith(_END_OF_ZIP):
        return None
    offset = int.from_bytes(record[16:20], "little")
    file.seek(max(0, size - 42))
    locator = file.read(20)
    if not locator.startswith(_ZIP64_LOCATOR):
        return None if offset == 0xFFFFFFFF else offset
    # Where there is a locator, some readers go by it, and others by what stands before it: that has to be one.
    file.seek(max(0, size - 98))
    record = file.read(56)
    if not record.startswith(_END_OF_ZIP64) or int.from_bytes(locator[8:16], "little") != size - 98:
        return None
    found = int.from_bytes(record[48:56], "little")
    return found if offset in {found, 0xFFFFFFFF} else None


def _places(file: BinaryIO, members: Sequence[zipfile.ZipInfo], directory: int) -> dict[str, tuple[int, int]] | None:
    """Where each member's bytes begin, and how many they are.

    None if one is not where the directory says, or under another name, or reaches into another, or if there is
    room between them for more than the 24 bytes that may follow a member's own.
    """
    end, places = 0, {}
    for member in sorted(members, key=lambda member: member.header_offset):
        if not 0 <= member.header_offset - end <= _TRAILER_BYTES:
            return None
        file.seek(member.header_offset)
        header = file.read(30)
        length, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        name = file.read(length)
        if not header.startswith(_ZIP_MAGIC) or header[8:10] != b"\0\0" or name != member.orig_filename.encode():
            return None
        start = member.header_offset + 30 + length + extra
        end = start + member.file_size
        places[member.filename.partition("/")[2]] = start, member.file_size
    return places if 0 <= directory - end <= _TRAILER_BYTES else None


def _places_for_torch(path: str) -> dict[str, tuple[int, int]]:
    """As `_places`, by the reader that torch.load will read with: what it sees is what is checked.

    Raises:
        CheckpointError: It cannot read the archive.
    """
    try:
        reader: Any = torch._C.PyTorchFileReader(path)  # noqa: SLF001 - there is no other way to ask it
        # PyTorch 2.11 tells no sizes: there a record has to be read.
        size = getattr(reader, "get_record_size", lambda name: len(reader.get_record(name)))
        return {name: (reader.get_record_offset(name), size(name)) for name in reader.get_all_records()}
    except Exception as error:
        _no_memory(error)
        raise _corrupt(error) from error


def _unwrapped(loaded: Any) -> Any:
    """The state dict in a file that has one, and nothing else that a server could take for it."""
    if not isinstance(loaded, dict):
        return loaded
    for key in _WRAPPERS:
        if isinstance(loaded.get(key), dict):
            for other, value in loaded.items():
                if other != key and _holds_tensors(value):
                    raise CheckpointError(
                        ErrorCode.CHECKPOINT_MISMATCH,
                        f"the file holds tensors in {_shown(other)} beside those in {key!r}, and which of them a "
                        f"server loads is not known: {_RESAVE}",
                    )
            return loaded[key]
    return loaded


def _holds_tensors(value: Any) -> bool:
    """A tensor, or a mapping that names tensors; an optimizer's state holds its tensors deeper."""
    values = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(one, torch.Tensor) for one in values)


def _dense(loaded: Any) -> dict[str, torch.Tensor]:
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(ErrorCode.CHECKPOINT_MISMATCH, f"the file holds no state dict: {_RESAVE}")
    for name, tensor in loaded.items():
        problem = None
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            problem = f"a {type(tensor).__name__}"
        elif (
            tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu"
        ):
            problem = "sparse, quantised or without data"
        elif tensor.is_floating_point() and tensor.dtype not in _FLOATING:
            problem = str(tensor.dtype)
        if problem:
            raise CheckpointError(
                ErrorCode.CHECKPOINT_MISMATCH,
                f"the entry {_shown(name)} is {problem}, not a dense tensor: {_RESAVE}",
            )
    # Parameters become the plain tensors that they wrap.
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _unprefixed(tensors: Any) -> Any:
    """The same mapping without a prefix that all its names share."""
    for prefix in _PREFIXES:
        if (
            isinstance(tensors, Mapping)
            and tensors
            and all(isinstance(name, str) and name.startswith(prefix) for name in tensors)
        ):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _tied(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numel() > 0 and one.data_ptr() == other.data_ptr() != 0 and one.shape == other.shape


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_floating_point():
        return "floating"
    return "complex" if tensor.is_complex() else "bool" if tensor.dtype is torch.bool else "integer"


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and _kind(one) == _kind(other)


def _form(tensor: torch.Tensor) -> str:
    return f"{_kind(tensor)}{list(tensor.shape)}"


def _few(names: Iterable[str], detail: Callable[[str], str] = lambda _: "") -> str:
    """The first three names, with details, and the number of the others."""
    every = list(names)
    rest = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(_shown(name) + detail(name) for name in every[:3]) + rest


def _shown(name: object) -> str:
    """A name from an untrusted file, safe for a terminal and a log."""
    return ascii(str(name)[:80])


def _no_memory(error: Exception) -> None:
    """Say so where that is the reason.

    Raises:
        MemoryError: It is.
    """
    if isinstance(error, MemoryError) or "Cannot allocate memory" in str(error):
        raise MemoryError from None


def _corrupt(error: Exception) -> CheckpointError:
    # What torch says of a refused pickle is advice to load it unsafely.
    detail = "" if isinstance(error, pickle.UnpicklingError) else f": {str(error).partition(chr(10))[0]}"
    return CheckpointError(
        ErrorCode.CHECKPOINT_CORRUPT,
        f"the file is cut short, damaged or no plain state dict ({_shown(type(error).__name__ + detail)}): "
        f"upload it again from its source, or {_RESAVE}",
    )
