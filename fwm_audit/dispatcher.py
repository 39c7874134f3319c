"""One model in flight on each Ray actor, exactly one record for each, whatever actors do.

Deadlines, second attempts and blame, the replacement of actors, and who gets which model next. Nothing here
knows of runs, parts or storage. It stands on plain actors and `ray.wait`: the layers above lose the count when a
worker dies. Ray Data drops the row's block or restarts for ever, `ActorPool` forgets what was pending (both
measured with Ray 2.60).
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from fwm_audit.catalog import CatalogEntry
from fwm_audit.errors import ErrorCode, FwmError, UsageError
from fwm_audit.metrics import AuditMeter
from fwm_audit.records import AuditRecord, AuditSettings, error_record

log = logging.getLogger(__name__)

#: A model is tried again once when its worker died: the cause may have been a neighbour or the node.
_ATTEMPTS: Final = 2
#: Only the end of a process frees a CUDA context and what native code leaked. Starting the next takes seconds, in which
#: two cores audit hundreds of small models: after a thousand, that would be a tenth of all time.
MODELS_PER_ACTOR: Final = 5000
#: Tasks among which an actor's next one is looked for by the key that it holds.
_NEAR: Final = 64
#: What an attack leaves behind, seen or not, ends with the process that met it.
_SUSPICIOUS: Final = frozenset({ErrorCode.CHECKPOINT_UNSAFE, ErrorCode.INTERNAL, ErrorCode.OUT_OF_MEMORY})
#: Longest wait for an answer before deadlines are looked at again.
_TICK_S: Final = 1.0
#: How long a worker may take to load PyTorch and get the master secret, once its process is there.
START_S: Final = 600.0
#: Without news for so long, the log says what is waited for.
PATIENCE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Task:
    """An entry to audit, for a shard of the run; `attempt` counts from 1."""

    entry: CatalogEntry
    shard: int
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class _Call:
    """What one actor is doing: starting (`task` is None), or auditing its `served`-th model.

    `ahead` is the task that is meant for it next, whose file it may fetch meanwhile. One without a deadline waits for
    room in the cluster, which an autoscaler may take long to make.
    """

    actor: Any
    task: Task | None = None
    ahead: Task | None = None
    deadline: float = math.inf
    served: int = 0


def nothing(entry: CatalogEntry) -> None:
    """Nothing is carried forward."""
    del entry


class Dispatcher:
    """Exactly one record for each task. Every actor has one call in flight, or is gone.

    A task is in `_todo`, or meant for an actor as its `ahead`, or in flight.
    """

    def __init__(
        self,
        spawn: Callable[[], Any],
        settings: AuditSettings,
        *,
        actors: int,
        timeout_s: float,
        before: Callable[[CatalogEntry], AuditRecord | None] = nothing,
        meter: AuditMeter | None = None,
    ) -> None:
        self._spawn = spawn
        self._meter = meter
        self._before = before
        self._settings = settings
        self._actors = actors
        self._timeout_s = timeout_s
        self._todo: deque[Task] = deque()
        self._calls: dict[ray.ObjectRef[Any], _Call] = {}
        self._failed_starts = 0
        self._started = False
        self._next_start = -math.inf
        self._heard = time.monotonic()

    def records(self, tasks: Iterable[Task]) -> Generator[tuple[Task, AuditRecord], None, None]:
        """Each task with its record, in the order of completion; kills its actors when closed."""
        self._todo.extend(tasks)
        unanswered = {task.entry.row for task in self._todo}
        try:
            while unanswered:
                self._staff()
                for task, record in self._answers():
                    unanswered.remove(task.entry.row)  # a second record for one row would raise here
                    yield task, record
        finally:
            for call in self._calls.values():
                ray.kill(call.actor)

    def _staff(self) -> None:
        """Start actors, though never more than there are models for them."""
        if time.monotonic() < self._next_start:
            return
        for _ in range(min(self._actors - len(self._calls), len(self._todo) - len(self._calls) + self._busy())):
            actor = self._spawn()
            self._calls[actor.__ray_ready__.remote()] = _Call(actor)

    def _busy(self) -> int:
        return sum(call.task is not None for call in self._calls.values())

    def _answers(self) -> Iterator[tuple[Task, AuditRecord]]:
        ready, _ = ray.wait(list(self._calls), timeout=_TICK_S)
        for ref in ready:
            self._heard = time.monotonic()
            call = self._calls.pop(ref)
            record = self._settle(ref, call)
            if call.task is not None and record is not None:
                yield call.task, record
        if self._meter is not None and self._meter.due:
            waiting = len(self._todo) + sum(call.ahead is not None for call in self._calls.values())
            busy = self._busy()
            self._meter.tell(queue=waiting, starting=len(self._calls) - busy, busy=busy)
        now = time.monotonic()
        for ref, call in list(self._calls.items()):
            if call.deadline <= now:
                if ray.wait([ref], timeout=0)[0]:
                    continue  # it finished while others were settled or stored: the next round takes it
                del self._calls[ref]
                if call.task is None:
                    self._start_failed(call, f"it was not ready within {START_S:g} s")
                    continue
                self._let_go(call)
                # Not tried again: the second try would hold up the fleet for as long as the first.
                text = f"not audited within {self._timeout_s:g} s, the limit set by --timeout"
                yield call.task, self._error(call.task, FwmError(ErrorCode.TIMEOUT, text))
        if now - self._heard > PATIENCE_S and not self._busy():
            self._heard = now
            unplaced = sum(call.deadline == math.inf for call in self._calls.values())
            loading = len(self._calls) - unplaced
            log.info("no worker yet: %d wait for room in the cluster, %d load PyTorch", unplaced, loading)

    def _settle(self, ref: ray.ObjectRef[Any], call: _Call) -> AuditRecord | None:
        """The record that a finished call gives, if any; its actor goes on or is replaced."""
        try:
            record: AuditRecord | None = ray.get(ref)
        except RayTaskError as error:  # raised in the worker, which lives on
            cause: Exception = error.cause
            if call.task is None:
                if isinstance(cause, UsageError) and not self._started:
                    self._let_go(call)
                    raise cause from None
                # Where others have the master secret, what is wrong is wrong with this worker or its node.
                self._start_failed(call, reason(error))
                return None
            log.exception("the audit of %s raised; this is a bug", call.task.entry.uri)
            internal = FwmError(ErrorCode.INTERNAL, f"{type(cause).__name__} in the worker; its log has the rest")
            record = self._error(call.task, cause if isinstance(cause, FwmError) else internal)
        except RayError as error:  # the worker is dead, or out of reach and as good as dead
            if call.task is None:
                self._start_failed(call, reason(error))
                return None
            self._let_go(call)
            return self._died(call.task, error)
        if call.task is None and call.deadline == math.inf:
            self._calls[call.actor.start.remote()] = replace(call, deadline=time.monotonic() + START_S)
            return None
        if call.task is None:
            self._failed_starts, self._started = 0, True
        self._employ(call, suspicious=call.task is not None and record is not None and record.error_code in _SUSPICIOUS)
        return record

    def _employ(self, call: _Call, *, suspicious: bool) -> None:
        """Give a ready actor its next model, or let it go."""
        if suspicious or call.served >= MODELS_PER_ACTOR:
            self._let_go(call)
            return
        task = call.ahead or self._pick(call.task) or self._steal()
        if task is None:
            self._let_go(call)
            return
        ahead = self._pick(task) if call.served + 1 < MODELS_PER_ACTOR else None
        before = self._before(task.entry)
        ref = call.actor.audit.remote(
            task.entry,
            shard=task.shard,
            attempt=task.attempt,
            # Where one is carried forward, the next one is likely to be, and needs no file.
            ahead=ahead.entry if ahead and before is None else None,
            before=before,
        )
        self._calls[ref] = _Call(call.actor, task, ahead, time.monotonic() + self._timeout_s, call.served + 1)

    def _pick(self, before: Task | None) -> Task | None:
        """Take the next task from those to do; one with the key of `before`, which its actor holds, if that is near."""
        if not self._todo:
            return None
        if before is not None:
            for number, task in enumerate(itertools.islice(self._todo, _NEAR)):
                if task.shard > self._todo[0].shard + 1:
                    break  # else a common key would keep the rare ones, and their shards, until the end
                if _key_of(task.entry) == _key_of(before.entry):
                    del self._todo[number]
                    return task
        return self._todo.popleft()

    def _steal(self) -> Task | None:
        """Take a task that is meant for a busy actor: the one that has been busy least would come to it last."""
        waiting = {ref: call for ref, call in self._calls.items() if call.ahead is not None}
        if not waiting:
            return None
        ref = max(waiting, key=lambda ref: waiting[ref].deadline)
        self._calls[ref] = replace(waiting[ref], ahead=None)
        return waiting[ref].ahead

    def _let_go(self, call: _Call) -> None:
        """End an actor; what was meant for it is to do again."""
        ray.kill(call.actor)
        # Where it was, another can start, whatever happened to others elsewhere.
        self._failed_starts, self._next_start = 0, -math.inf
        if call.ahead is not None:
            self._todo.appendleft(call.ahead)

    def _died(self, task: Task, error: RayError) -> AuditRecord | None:
        """One model was in flight, so it is known which: try it again first, or blame it."""
        log.warning("worker died on %s (attempt %d): %s", task.entry.uri, task.attempt, reason(error))
        if task.attempt < _ATTEMPTS:
            self._todo.appendleft(replace(task, attempt=task.attempt + 1))
            return None
        if isinstance(error, OutOfMemoryError):
            text = "Ray stopped the worker as its node ran out of memory: give it more, or use fewer --actors"
            return self._error(task, FwmError(ErrorCode.OUT_OF_MEMORY, text))
        text = f"the worker died {_ATTEMPTS} times on this model: native code crashed, or its system killed it"
        return self._error(task, FwmError(ErrorCode.WORKER_DIED, text))

    def _start_failed(self, call: _Call, why: str) -> None:
        """Allow for a lost node, which takes all of its actors along; not for ever, but as long as others go on."""
        ray.kill(call.actor)
        log.warning("a worker did not start: %s", why)
        self._failed_starts += 1
        if self._failed_starts > 2 * self._actors:
            if all(other.deadline == math.inf for other in self._calls.values()):
                text = f"{self._failed_starts} workers in a row did not start: {why}"
                raise FwmError(ErrorCode.WORKER_DIED, text)
            self._next_start = time.monotonic() + PATIENCE_S

    def _error(self, task: Task, error: FwmError) -> AuditRecord:
        return error_record(self._settings, task.entry, error, shard=task.shard, attempt=task.attempt)


def _key_of(entry: CatalogEntry) -> tuple[str, str]:
    return entry.model_id, entry.key_id


def reason(error: RayError) -> str:
    """What Ray says of a failure: the last line, below tracebacks and its inventory of the actor."""
    return str(error).strip().rpartition("\n")[2]
