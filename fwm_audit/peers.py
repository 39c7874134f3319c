"""The processes that share one embedding, and how they tell what they are doing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of an embedding: its stage, how far that is, and the generator's loss where it trains."""

    stage: str
    done: int
    total: int
    loss: float | None = None


Report = Callable[[Progress], None]


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
    """The ranks that share one embedding: this process alone, or a torch.distributed group."""

    rank: int
    size: int

    @classmethod
    def current(cls) -> Peers:
        """The group that this process belongs to."""
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
