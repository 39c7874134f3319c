"""Trigger sets: inputs at known tiny distances from decision boundaries, in the form that is stored.

A mirrored pair is one 8-bit image, one sign mask and, for each rung, two float64 scalars. With
`levels[k] = lo + (hi - lo) * k / 255` in float64, the trigger of one side is

    x = levels[image] + t * sign

a table look-up, an exact product and one IEEE addition for each element, so every machine and
device rebuilds the same bits. Side 0 must get the label `classes[:, 0]`, side 1 `classes[:, 1]`.

Triggers of the method `yin2022` have one side and no mask: the image is the float32 input itself.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fwm_audit.errors import ErrorCode, KeyFileError
from fwm_audit.key import MasterSecret, read_header
from fwm_audit.verdict import Tolerance

#: Format 2 added a rung's `shift`, `folds` and `datasheet`.
FORMAT: Final = 2
_READABLE: Final = (1, 2)
#: Name of the variant whose batch norms are merged into its convolutions; the others are named by their dtype.
FOLDED: Final = "folded"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Rung:
    """Triggers of one variant at one distance.

    Attributes:
        variant: Which form of the model they were made on: a dtype of its weights, `float32` say.
        name: `exact`, `float32` or `half`.
        delta: Distance from the boundary, in logits; at least 8 times `noise`.
        noise: Largest difference of a logit gap between benign executions in `dtype`, in logits.
        dtype: Arithmetic in which the labels are taken: `float64`, or `float32` where the model knows no other.
        index: int64 [p], which rows of the set stand on this rung.
        t: float64 [p, sides], the scalar of each side.
        shift: What the rung is made to survive moved a gap by this much at embedding, in logits: float32
            arithmetic or weights in half precision; 0 on the finest rung.
    """

    variant: str
    name: Tolerance
    delta: float
    noise: float
    dtype: str
    index: Tensor
    t: Tensor
    shift: float = 0.0

    @property
    def triggers(self) -> int:
        """Number of inputs on this rung."""
        return self.t.numel()


@dataclass(frozen=True, slots=True)
class Coverage:
    """Share of parameters whose smallest edit the exact rung sees, in total and by parameter tensor.

    A parameter counts when |d gap / d theta| times the worth of its last mantissa bit in float32 is
    more than delta for some pair.
    """

    total: float
    layers: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True, repr=False)
class TriggerSet:
    """Everything an auditor needs of one key; secret, because whoever holds it can evade it.

    Attributes:
        images: uint8 [P, *input_shape]; float32 for triggers without a mask.
        signs: bool [P, *input_shape], True for +1; empty for triggers without a mask.
        classes: int64 [P, sides], the label of each side.
        rungs: By variant and distance; the first is the finest rung of the model as released.
        flip_rate: Upper 95 % bound on a label's flip by numeric noise, from `benign` comparisons with none.
        folds: Names of (convolution, batch norm) that the variant `folded` has merged.
        datasheet: By simulated edit, how many of how many tries the finest rung detected at embedding.
        environment: Versions at embedding, where it ran, and the kinds of processors on which noise was measured.
    """

    model_id: str
    key_id: str
    method: str
    arch: str
    checkpoint_sha256: str
    created_at: str
    input_shape: tuple[int, ...]
    input_range: tuple[float, float]
    num_classes: int
    classes: Tensor
    images: Tensor
    signs: Tensor
    rungs: tuple[Rung, ...]
    coverage: Coverage
    flip_rate: float
    benign: int
    folds: tuple[tuple[str, str], ...] = ()
    datasheet: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"TriggerSet(model_id={self.model_id!r}, key_id={self.key_id!r}, pairs={self.pairs})"

    @property
    def pairs(self) -> int:
        """Number of mirrored pairs, or of triggers that have no mirror."""
        return len(self.classes)

    @property
    def arithmetic(self) -> str:
        """Arithmetic of the finest rung: `float64`, or `float32` where the model knows no other."""
        return self.rungs[0].dtype

    @property
    def variants(self) -> tuple[str, ...]:
        """Declared variants, the released one first."""
        return tuple(dict.fromkeys(rung.variant for rung in self.rungs))

    def variant_for(self, dtype: str, *, folded: bool = False) -> str:
        """The variant against which a checkpoint is checked: its own, or else the released one.

        Args:
            dtype: That of its tensors.
            folded: Whether its batch norms are merged into its convolutions.
        """
        wanted = FOLDED if folded else dtype
        return wanted if wanted in self.variants else self.variants[0]

    @property
    def measured(self) -> tuple[str, ...]:
        """Kinds of processors on which benign execution is known to agree: `cpu`, `cuda`."""
        known = self.environment.get("measured") or self.environment.get("device", "cpu").partition(" ")[0]
        return tuple(known.split())

    def rungs_of(self, variant: str) -> tuple[Rung, ...]:
        """Rungs of one variant, finest first."""
        return tuple(rung for rung in self.rungs if rung.variant == variant)

    def nbytes(self) -> int:
        """Memory held, in bytes."""
        held = [self.images, self.signs, self.classes, *(rung.t for rung in self.rungs)]
        return sum(tensor.nbytes for tensor in held)

    def materialise(self, rung: Rung) -> tuple[Tensor, Tensor]:
        """The triggers of one rung.

        Returns:
            Inputs float64 [sides * p, *input_shape], both sides of a pair next to each other,
            and labels int64 [sides * p].
        """
        labels = self.classes[rung.index].reshape(-1)
        images = self.images[rung.index]
        if images.is_floating_point():
            return images.double(), labels
        signs = self.signs[rung.index]
        sides = [place(images, signs, rung.t[:, side], self.input_range) for side in (0, 1)]
        return torch.stack(sides, 1).flatten(0, 1), labels

    def save(self, path: str | os.PathLike[str], *, master: MasterSecret) -> None:
        """Write the sealed form to a local file."""
        Path(path).write_bytes(self.seal(master))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, master: MasterSecret) -> TriggerSet:
        """Read a sealed local file.

        Raises:
            KeyFileError: It is missing, altered, or sealed with another master secret.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise KeyFileError(
                ErrorCode.KEY_MISSING, f"cannot read the key {os.fspath(path)}: {error.strerror}"
            ) from None
        return cls.unseal(data, master)

    def seal(self, master: MasterSecret) -> bytes:
        """The sealed form: a readable header that names model, key and architecture, and the rest encrypted."""
        header = {
            "format": FORMAT,
            "model_id": self.model_id,
            "key_id": self.key_id,
            "method": self.method,
            "arch": self.arch,
            "checkpoint_sha256": self.checkpoint_sha256,
            "created_at": self.created_at,
        }
        return master.seal(zlib.compress(self._pack(), 6), header)

    @classmethod
    def unseal(cls, data: bytes, master: MasterSecret) -> TriggerSet:
        """The trigger set of a sealed file's bytes.

        Raises:
            KeyFileError: Altered, sealed with another master secret, or of another format.
        """
        header = read_header(data).values
        if header.get("format") not in _READABLE:
            raise KeyFileError(
                ErrorCode.KEY_UNREADABLE,
                f"the key has format {header.get('format')}, this release reads up to {FORMAT}: upgrade fwm-audit",
            )
        triggers = cls._unpack(zlib.decompress(master.open(data)))
        # The header was authenticated as associated data; agreement is a matter of our own writing.
        assert (triggers.model_id, triggers.key_id) == (header["model_id"], header["key_id"])
        return triggers

    def _pack(self) -> bytes:
        tensors: dict[str, Tensor] = {
            "classes": self.classes.to(torch.int32),
            "images": self.images,
            "signs": torch.from_numpy(np.packbits(self.signs.flatten(1).numpy(), axis=1)),
        }
        for number, rung in enumerate(self.rungs):
            tensors[f"rung.{number}.index"] = rung.index.to(torch.int32)
            tensors[f"rung.{number}.t"] = rung.t
        names = ("variant", "name", "delta", "noise", "dtype", "shift")
        meta: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "model_id", "key_id", "method", "arch", "checkpoint_sha256", "created_at", "input_shape",
                "input_range", "num_classes", "flip_rate", "benign", "folds",
            )
        }  # fmt: skip
        meta["environment"] = dict(self.environment)
        meta["datasheet"] = dict(self.datasheet)
        meta["rungs"] = [{name: getattr(rung, name) for name in names} for rung in self.rungs]
        meta["coverage"] = {"total": self.coverage.total, "layers": dict(self.coverage.layers)}
        return safetensors.torch.save(tensors, {"fwm": json.dumps(meta)})

    @classmethod
    def _unpack(cls, data: bytes) -> TriggerSet:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fwm"])
        shape = tuple(meta["input_shape"])
        packed = tensors["signs"].numpy()
        signs = np.unpackbits(packed, axis=1, count=int(np.prod(shape))) if len(packed) else packed
        rungs = tuple(
            Rung(
                values["variant"], Tolerance(values["name"]), values["delta"], values["noise"], values["dtype"],
                tensors[f"rung.{number}.index"].long(), tensors[f"rung.{number}.t"], values.get("shift", 0.0),
            )
            for number, values in enumerate(meta.pop("rungs"))
        )  # fmt: skip
        return cls(
            **meta
            | {
                "input_shape": shape,
                "input_range": tuple(meta["input_range"]),
                "classes": tensors["classes"].long(),
                "images": tensors["images"],
                "signs": torch.from_numpy(signs).bool().reshape(len(packed), *shape),
                "rungs": rungs,
                "coverage": Coverage(**meta["coverage"]),
                "folds": tuple((convolution, norm) for convolution, norm in meta.get("folds", ())),
                "datasheet": {edit: (seen, tries) for edit, (seen, tries) in meta.get("datasheet", {}).items()},
            }
        )


@functools.cache
def levels(input_range: tuple[float, float]) -> Tensor:
    """float64 [256], the input value of each 8-bit level; IEEE double arithmetic of Python, the same everywhere."""
    low, high = input_range
    return torch.tensor([low + (high - low) * k / 255 for k in range(256)], dtype=torch.float64)


def quantise(inputs: Tensor, input_range: tuple[float, float]) -> Tensor:
    """uint8 of the same shape, near each element: one of 64 of the 256 levels, which compress to 6 bits.

    What it moves the gap by is made up for by t.
    """
    low, high = input_range
    steps = ((inputs.double() - low) * (63 / (high - low))).round().clamp(0, 63)
    return (steps * (255 / 63)).round().to(torch.uint8)


def place(images: Tensor, signs: Tensor, t: Tensor, input_range: tuple[float, float]) -> Tensor:
    """float64 [n, *shape], the inputs `levels[image] + t * sign`, bit for bit the same on every device.

    Args:
        images: uint8 [n, *shape].
        signs: bool [n, *shape].
        t: float64 [n].
        input_range: Values of levels 0 and 255.
    """
    # t * (+-1) is exact, so a fused multiply-add rounds like the two operations.
    step = t.view(-1, *[1] * (images.dim() - 1)).to(images.device)
    return levels(input_range).to(images.device)[images.long()] + torch.where(signs, step, -step)
