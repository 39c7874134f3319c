"""The processes that share one embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import torch
import torch.distributed
from torch import Tensor

from fwm_audit.errors import FwmError, UsageError

T = TypeVar("T")

#: Pairs in a unit of work, which one rank does at a time: bounds memory, and is the same for any number of ranks.
UNIT: Final = 4


class Keeper(Protocol):
    """Keeps the state of an unfinished embedding where the next attempt at it looks; called on every rank.

    The state is secret: whoever reads it knows triggers and their labels.
    """

    def load(self) -> bytes | None:
        """The latest state that an earlier attempt at this embedding kept, if any."""

    def save(self, state: bytes) -> None:
        """Keep a state in the place of earlier ones."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks that share one embedding: this process alone, or a torch.distributed group.

    Work is dealt in units that are the same for any number of ranks, so that results are too.
    """

    rank: int
    size: int

    @classmethod
    def current(cls) -> Peers:
        """The group that this process belongs to."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls(0, 1)

    def together(self, make: Callable[[], T]) -> T:
        """What `make` returns here; if it fails on any rank, all of them raise that finding."""
        if self.size == 1:
            return make()
        made: list[T] = []
        finding: FwmError | UsageError | None = None
        try:
            made.append(make())
        except (FwmError, UsageError) as error:
            finding = error
        for found in self.gather(finding):
            if found is not None:
                found.agreed = True
                raise found
        return made[0]

    def share(self, units: Sequence[T]) -> Sequence[T]:
        """Those units of work that this rank does."""
        return units[self.rank :: self.size]

    def collect(self, mine: Sequence[T], count: int) -> list[T]:
        """The results of all `count` units, in their order, given those of this rank's share; on every rank."""
        parts = self.gather(list(mine))
        return [parts[unit % self.size][unit // self.size] for unit in range(count)]

    def total(self, mine: Sequence[Tensor], count: int, like: Tensor) -> Tensor:
        """The sum over all `count` units of a tensor [*], given those of this rank's share; as and where `like` is.

        Added one by one in the order of the units: floating-point sums depend on it, and this one must
        not depend on the number of ranks.
        """
        total = torch.zeros_like(like)
        if self.size == 1:
            for value in mine:
                total += value
            return total
        slots = -(-count // self.size)
        padded = torch.zeros(slots, *like.shape, dtype=like.dtype)
        for slot, value in enumerate(mine):
            padded[slot] = value
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(everyone, padded)
        for unit in range(count):
            total += everyone[unit % self.size][unit // self.size].to(like.device)
        return total

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's value, on every rank, in rank order."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(everyone, mine)
        return everyone
