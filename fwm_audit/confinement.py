"""Limits that the operating system holds a worker to, whatever a checkpoint makes of the code that opens it.

    memory    RLIMIT_DATA: what the process may hold beyond what it holds when it is ready; an allocation
              above that fails, and the audit's record is `out_of_memory`
    time      RLIMIT_CPU: processor seconds of one audit, for native code that neither returns nor can be interrupted
    dumps     RLIMIT_CORE: a crash writes no file with keys in it

Files and the network are for the container to confine: see the README.
"""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path
from typing import Final

#: cgroup v2 and v1, in this order.
_CGROUPS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_LEAST_BYTES: Final = 1 << 30
#: Beside the deadline, before the system ends what the dispatcher should have ended.
_GRACE_S: Final = 30.0


def share_of_memory(share: float) -> int:
    """Bytes that a worker may hold at a time if this share of the machine, or of its container, is for it.

    Half of the share: a checkpoint as it was read may take as much again beside what is made of it.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in _CGROUPS:
        path = Path(name)
        if path.exists() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return max(_LEAST_BYTES, int(min(limits) * share / 2))


def confine(memory_bytes: int | None) -> None:
    """Limit this process for good, as far as it is not limited more by whoever started it.

    Args:
        memory_bytes: What it may hold beyond what it holds now; None does not limit that.
    """
    _lower(resource.RLIMIT_CORE, 0)
    if memory_bytes is not None:
        _lower(resource.RLIMIT_DATA, _held_bytes() + memory_bytes)


def allow_seconds(seconds: float, threads: int) -> None:
    """Give this process so much more time on its processors, whatever it has used so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + (seconds + _GRACE_S) * threads)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _held_bytes() -> int:
    """What RLIMIT_DATA counts: private memory that can be written to, touched or not."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")


def _lower(what: int, limit: int) -> None:
    hard = resource.getrlimit(what)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(what, (limit, limit))
