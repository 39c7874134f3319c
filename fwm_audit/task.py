"""What is asked of an embedding, what it tells on the way, and what it published: plain data for every process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fwm_audit.key import MasterSecret, SecretKey, fingerprint

if TYPE_CHECKING:
    from fwm_audit.triggers import TriggerSet

#: Ranks that find work in a block of pairs of a usual key.
MOST_WORKERS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedTask:
    """One model to watermark: references and settings, no secret.

    Attributes:
        checkpoint: URI of the released checkpoint; only read.
        keys: URI under which the sealed key is published.
        input_shape: Shape of one input; None takes what the architecture states.
        base: Folder against which relative local URIs are resolved.
        generation: 1, or more for a further key of the same model beside the first.
        sha256: Digest that the checkpoint has to have, if that is known.
        master_key_file: Path of the master secret on the workers; None takes FWM_MASTER_KEY_FILE.
        board: Name of the Ray actor that is told of progress, if any.
    """

    model_id: str
    checkpoint: str
    arch: str
    keys: str
    base: str
    method: str = "mirror"
    pairs: int = 16
    coverage: float | None = None
    variants: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    input_range: tuple[float, float] = (-1.0, 1.0)
    generation: int = 1
    sha256: str | None = None
    allowed_factories: tuple[str, ...] = ()
    master_key_file: str | None = None
    board: str | None = None

    def settings(self) -> str:
        """JSON of what shapes the triggers, apart from model and secret."""
        names = ["arch", "method", "pairs", "coverage", "variants", "input_shape", "input_range"]
        if self.generation > 1:  # keys of the first generation keep their names
            names.append("generation")
        return json.dumps({name: getattr(self, name) for name in names}, sort_keys=True)

    def secret(self, master: MasterSecret, digest: str) -> SecretKey:
        """The secret key of this model under these settings."""
        return master.secret_key(self.model_id, digest, self.settings())


@dataclass(frozen=True, slots=True)
class Embedded:
    """What was published: no secret in it.

    Attributes:
        arithmetic: `float64`, or `float32` where the model casts to that inside and is checked more coarsely.
        datasheet: By simulated edit, [detected, tried].
        before: Whether an earlier embedding published it.
    """

    model_id: str
    key_id: str
    fingerprint: str
    pairs: int
    coverage: float
    delta: float
    noise: float
    checkpoint_sha256: str
    key_bytes: int
    arithmetic: str
    datasheet: dict[str, list[int]]
    before: bool = False

    @classmethod
    def of(cls, triggers: TriggerSet, sealed: bytes, *, before: bool) -> Embedded:
        """The public facts of a sealed key."""
        exact = triggers.rungs[0]
        return cls(
            model_id=triggers.model_id,
            key_id=triggers.key_id,
            fingerprint=fingerprint(sealed),
            pairs=triggers.pairs,
            coverage=triggers.coverage.total,
            delta=exact.delta,
            noise=exact.noise,
            checkpoint_sha256=triggers.checkpoint_sha256,
            key_bytes=len(sealed),
            arithmetic=triggers.arithmetic,
            datasheet={edit: [seen, tries] for edit, (seen, tries) in triggers.datasheet.items()},
            before=before,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of an embedding: its stage, how far that is, and the generator's loss where it trains."""

    stage: str
    done: int
    total: int
    loss: float | None = None


Report = Callable[[Progress], None]
