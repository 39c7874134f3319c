"""From counted labels to a verdict. Pure arithmetic; nothing here has seen a model.

A *rung* is a set of triggers at one distance from the decision boundaries. The exact rung sits as
close as numeric noise allows; wider rungs tell how far a changed model has moved. The verdict is
computed from what was seen and is never lowered from an optimistic start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from fwm_audit.errors import ErrorCode, ModelError


class Verdict(StrEnum):
    """What an audit says of one checkpoint."""

    INTACT = "intact"
    TAMPERED = "tampered"
    ERROR = "error"


class Tolerance(StrEnum):
    """How far a model may have moved and still count as intact; also the names of the rungs."""

    EXACT = "exact"
    FLOAT32 = "float32"
    HALF = "half"


class Displacement(StrEnum):
    """How far a model has moved: the finest rung that still holds names it."""

    NONE = "none"
    FLOAT32 = "float32"
    HALF = "half"
    BEYOND = "beyond"
    UNKNOWN = "unknown"


#: Finest first; a rung that holds implies nothing about the finer ones.
RUNGS: tuple[Tolerance, ...] = (Tolerance.EXACT, Tolerance.FLOAT32, Tolerance.HALF)
_DISPLACEMENT = {
    Tolerance.EXACT: Displacement.NONE,
    Tolerance.FLOAT32: Displacement.FLOAT32,
    Tolerance.HALF: Displacement.HALF,
}


@dataclass(frozen=True, slots=True)
class RungCount:
    """Labels compared on one rung: `total` triggers, indices of those whose label differs."""

    total: int
    mismatched: tuple[int, ...]

    @property
    def holds(self) -> bool:
        """Every label agrees; a rung without triggers proves nothing and does not hold."""
        return self.total > 0 and not self.mismatched


def displacement_of(counts: Mapping[Tolerance, RungCount]) -> Displacement:
    """The finest rung of `counts` that holds, `beyond` when none does, `unknown` when only one was run."""
    for rung in RUNGS:
        if rung in counts and counts[rung].holds:
            return _DISPLACEMENT[rung]
    return Displacement.BEYOND if len(counts) > 1 else Displacement.UNKNOWN


def decide(counts: Mapping[Tolerance, RungCount], tolerance: Tolerance) -> Verdict:
    """`intact` if the rung of `tolerance` or a finer one holds, else `tampered`.

    A key whose finest rung is wider than `tolerance` (its model has no finer arithmetic) is decided
    by that rung; the displacement then says how little that proves.

    Raises:
        ModelError: Nothing was counted, or no finer rung holds and the key lacks the rung that
            `tolerance` names: then nobody can tell.
    """
    present = [rung for rung in RUNGS if rung in counts]
    limit = max([tolerance, *present[:1]], key=RUNGS.index)
    if any(counts[rung].holds for rung in present if RUNGS.index(rung) <= RUNGS.index(limit)):
        return Verdict.INTACT
    if limit not in counts or counts[limit].total == 0:
        raise ModelError(
            ErrorCode.RUNG_MISSING,
            f"the key has no '{tolerance}' rung for this variant: audit with another --tolerance, or embed again",
        )
    return Verdict.TAMPERED


def binomial_p_value(total: int, mismatches: int, flip_rate: float) -> float:
    """P(at least `mismatches` of `total` labels flip by numeric noise), each at `flip_rate`.

    The upper tail of the binomial distribution, summed exactly in log space. Triggers of one run
    are correlated, so this is a guide, not a false-alarm rate: that comes from counting benign runs.
    """
    if mismatches <= 0:
        return 1.0
    if flip_rate <= 0.0:
        return 0.0
    if flip_rate >= 1.0:
        return 1.0
    log_p, log_q = math.log(flip_rate), math.log1p(-flip_rate)
    log_n = math.lgamma(total + 1)
    tail = (
        math.exp(log_n - math.lgamma(k + 1) - math.lgamma(total - k + 1) + k * log_p + (total - k) * log_q)
        for k in range(mismatches, total + 1)
    )
    return min(1.0, math.fsum(tail))


def upper_rate(benign: int, confidence: float = 0.95) -> float:
    """Largest flip rate still compatible with 0 flips in `benign` comparisons (exact Clopper-Pearson)."""
    return 1.0 if benign <= 0 else 1.0 - (1.0 - confidence) ** (1.0 / benign)
