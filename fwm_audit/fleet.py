"""Audit a fleet: let Ray actors audit what a plan has left, one model at a time, and commit shard by shard.

    execute   the entries of a `Plan` are given to the `Dispatcher`, which gives one record for each
    commit    a part when its shard is complete (create-only), the signed manifest when all parts are there

What an interrupted run has stored is left as it is; the same run id goes on from there.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
import os
import socket
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from fwm_audit import ledger, logs, storage
from fwm_audit.catalog import CatalogEntry
from fwm_audit.compaction import read_run
from fwm_audit.confinement import allow_seconds, confine, share_of_memory
from fwm_audit.dispatcher import PATIENCE_S, START_S, Dispatcher, Task, nothing, reason
from fwm_audit.errors import ErrorCode, FwmError, StorageError, UsageError
from fwm_audit.key import MasterSecret, SessionKey, signed_values
from fwm_audit.metrics import AuditMeter
from fwm_audit.plan import Plan, plan_audit
from fwm_audit.records import (
    MANIFEST,
    RUN,
    AuditRecord,
    AuditSettings,
    Run,
    counts,
    error_record,
    manifest,
    record_of,
    run_path,
    signed_part,
    to_parquet,
)
from fwm_audit.verdict import Verdict

if TYPE_CHECKING:
    from fwm_audit.check import Auditor

log = logging.getLogger(__name__)

#: Who signs a run's files.
Signer = MasterSecret | SessionKey
#: Records so far, records of a complete run, records by verdict.
Progress = Callable[[int, int, Mapping[str, int]], None]


class IncompleteError(Exception):
    """The run stopped early: its finished shards are stored, and the same run id resumes it.

    Args:
        message: Why, for a person.
        verdicts: Records by verdict so far; a tampered model found early still decides the exit code.
    """

    def __init__(self, message: str, verdicts: Mapping[str, int]) -> None:
        super().__init__(message)
        self.verdicts = verdicts


@dataclass(frozen=True, slots=True)
class Summary:
    """A complete run.

    Records by verdict, error records by code, records carried forward, URI of the manifest, and the end of the
    ledger, which vouches for all runs up to this one.
    """

    run_id: str
    verdicts: Mapping[str, int]
    errors: Mapping[str, int]
    carried: int
    manifest: str
    ledger: ledger.Head


class AuditWorker:
    """The Ray actor around an `Auditor`: a process that audits one model after another."""

    def __init__(self, settings: AuditSettings) -> None:
        self._settings = settings
        self._auditor: Auditor | None = None
        self._threads = 1

    def start(self) -> None:
        """Load torch and open the master secret.

        Not in `__init__`: Ray reports an exception there as text and a dead actor, one from a method
        as itself.

        Raises:
            UsageError: This worker has no master secret.
        """
        gc.disable()  # a fifth of an import is the search for garbage among what it makes, where there is none
        # Here, because the driver imports this module too and has no use for 500 MB of torch and timm.
        import torch  # noqa: PLC0415

        from fwm_audit.arithmetic import keep_freed_memory  # noqa: PLC0415
        from fwm_audit.check import Auditor  # noqa: PLC0415

        gc.freeze()  # nor will there be
        gc.enable()
        keep_freed_memory()
        settings = self._settings
        logs.configure()
        logs.bind(run_id=settings.run_id)
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        self._threads = max(1, int(cpus))
        torch.set_num_threads(self._threads)
        limit = settings.memory_bytes or share_of_memory(cpus / _cpus_of_this_node())
        settings = replace(settings, memory_bytes=limit)  # the largest object that is fetched
        confine(limit if settings.device != "cuda" else None)  # CUDA reserves addresses by the hundred gigabytes
        self._auditor = Auditor(settings, f"{socket.gethostname()}:{os.getpid()}")

    def audit(self, entry: CatalogEntry, **how: Any) -> AuditRecord:
        """As `Auditor.audit`."""
        assert self._auditor is not None
        allow_seconds(self._settings.timeout_s, self._threads)
        return self._auditor.audit(entry, **how)

    def certify(self, public_key: str) -> bytes:
        """What lets a driver without the master secret sign, see `SessionKey`.

        Raises:
            UsageError: This worker has no master secret.
        """
        master = MasterSecret.from_file(self._settings.master_key_file)
        return master.sign("session", {"public_key": public_key, "run_id": self._settings.run_id})


def _cpus_of_this_node() -> float:
    here = ray.get_runtime_context().get_node_id()
    return next((node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["NodeID"] == here), 1.0)


def run_audit(plan: Plan, *, progress: Progress = lambda *_: None, worker: type[AuditWorker] = AuditWorker) -> Summary:
    """The counts of a complete run; what an earlier attempt of the same run stored is not audited again.

    Needs `ray.init()` to have been called.

    Args:
        plan: What to audit, from `plan_audit`.
        progress: Called after each record.
        worker: Class of the actors.

    Raises:
        UsageError: A worker lacks the master secret, or another driver began a run of this id meanwhile.
        IncompleteError: The run stopped early; the same run id resumes it.
    """
    job = plan.job
    signer = _signer(worker, _settings(plan))
    described = plan.locate(run_path(job.run_id, "run.json"))
    if not plan.resumed and not storage.create(described, signer.sign(RUN, plan.run.values())):
        plan = plan_audit(job)  # another driver began this run a moment ago: agree with it, or refuse
    description = storage.read(described)
    _signed_here(described, description, RUN, signer)
    if Run.from_json(description) != plan.run:  # it was read before its signature was known to be right
        raise UsageError(f"{described} was replaced while this audit was planned: repeat the command")
    verdicts: Counter[str] = Counter()
    meter, complete = AuditMeter(), False
    try:
        if storage.exists(plan.manifest):
            summary = _entered(plan, storage.read(plan.manifest), description, signer, verdicts)
            # Its driver was lost, perhaps, before anybody read its metrics.
            meter.add({("error", code): count for code, count in summary.errors.items()})
            meter.add({(verdict, ""): summary.verdicts[verdict] for verdict in (Verdict.INTACT, Verdict.TAMPERED)})
        else:
            parts = _Parts(plan, description, signer)
            _count_stored(plan, parts, verdicts, meter)
            if plan.missing:
                _execute(plan, _settings(plan), signer, verdicts, progress, worker, parts, meter)
            summary = _commit(plan, description, signer, verdicts)
        complete = True
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, UsageError) and not verdicts[Verdict.TAMPERED]:
            raise
        # Whatever ended the run, what it found already must reach the exit code.
        if not isinstance(error, KeyboardInterrupt | RayError | FwmError | UsageError):
            log.exception("this is a bug")
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        raise IncompleteError(
            f"run {job.run_id} is incomplete: {reason}. Finished shards are stored; "
            f"--run-id {job.run_id} with the same settings audits the rest",
            counts(verdicts),
        ) from error
    else:
        return summary
    finally:
        meter.close(complete=complete)


# ------------------------------------------------------------------------------------------- execute


def _settings(plan: Plan) -> AuditSettings:
    job, run = plan.job, plan.run
    return AuditSettings(
        run_id=run.run_id,
        run_started_at=run.started_at,
        keys=storage.absolute(job.keys),
        base=str(Path.cwd()),
        key_fingerprints=run.key_fingerprints,
        tolerance=job.tolerance,
        allowed_factories=job.allowed_factories,
        device="cuda" if job.gpus_per_actor else "cpu",
        master_key_file=job.master_key_file,
        timeout_s=job.timeout_s,
        memory_bytes=job.memory_bytes,
    )


def _count_stored(plan: Plan, parts: _Parts, verdicts: Counter[str], meter: AuditMeter) -> None:
    """Count what an earlier attempt of this run found, before anything else can go wrong.

    Raises:
        UsageError, StorageError: A part cannot be used; all others have been counted.
    """

    def read(shard: int) -> pa.Table | UsageError | StorageError:
        try:
            return parts.read(shard)
        except (UsageError, StorageError) as error:
            return error

    wrong: UsageError | StorageError | None = None
    with ThreadPoolExecutor(storage.IO_THREADS) as pool:
        for table in pool.map(read, sorted(set(range(plan.run.shards)) - set(plan.missing))):
            if isinstance(table, UsageError | StorageError):
                wrong = wrong or table
                continue
            found = Counter(zip(table["verdict"].to_pylist(), table["error_code"].to_pylist(), strict=True))
            verdicts.update(table["verdict"].to_pylist())
            meter.add({(verdict, code or ""): count for (verdict, code), count in found.items()})
    if wrong is not None:
        raise wrong


def _execute(
    plan: Plan,
    settings: AuditSettings,
    signer: Signer,
    verdicts: Counter[str],
    progress: Progress,
    worker: type[AuditWorker],
    parts: _Parts,
    meter: AuditMeter,
) -> None:
    """Audit the missing shards and write each when it is complete; `verdicts` counts the run's records."""
    job, run = plan.job, plan.run
    # In the order of shards, so that shards are complete early and few records wait in memory.
    tasks = [Task(entry, shard) for shard in plan.missing for entry in plan.entries_of(shard)]
    usable = [task for task in tasks if task.entry.problem is None]
    unusable = (
        (task, error_record(settings, task.entry, task.entry.problem, shard=task.shard, attempt=task.attempt))
        for task in tasks
        if task.entry.problem is not None
    )
    dispatcher = Dispatcher(
        _spawner(worker, settings, job.gpus_per_actor),
        settings,
        actors=job.actors or _room_for_actors(job.gpus_per_actor),
        timeout_s=job.timeout_s,
        before=_before(plan, signer.public_key),
        meter=meter,
    )
    waiting: defaultdict[int, dict[int, AuditRecord]] = defaultdict(dict)
    writes: deque[Future[bool]] = deque()
    with ThreadPoolExecutor(storage.IO_THREADS) as pool, closing(dispatcher.records(usable)) as audited:
        for task, record in itertools.chain(unusable, audited):
            _log_finding(record)
            meter.count(record)
            verdicts[record.verdict] += 1
            shard, entries = waiting[task.shard], plan.entries_of(task.shard)
            shard[task.entry.row] = record
            if len(shard) == len(entries):
                del waiting[task.shard]
                records = [shard[entry.row] for entry in entries]
                writes.append(pool.submit(parts.write, task.shard, records))
            # Storage that is slower than the audit holds the audit up, instead of filling memory.
            while writes and (writes[0].done() or len(writes) > 2 * storage.IO_THREADS):
                writes.popleft().result()
            progress(verdicts.total(), run.rows, verdicts)
        for write in writes:
            write.result()


def _before(plan: Plan, public_key: str) -> Callable[[CatalogEntry], AuditRecord | None]:
    """What may be carried forward of each entry: nothing, where the earlier run is not whole and this company's own."""
    if plan.before is None:
        return nothing
    try:
        return _Before(plan, public_key).of
    except (UsageError, StorageError) as error:
        if isinstance(error, StorageError) and error.code is not ErrorCode.OBJECT_MISSING:
            raise
        log.error("nothing is carried forward, every model is audited: %s", error)  # noqa: TRY400  # a sentence for a person
        return nothing


class _Before:
    """Intact records of an earlier run, by what they are of: candidates to be carried forward."""

    def __init__(self, plan: Plan, public_key: str) -> None:
        assert plan.before is not None
        assert plan.job.carry_days is not None
        parts = read_run(storage.absolute(plan.job.out), plan.before.run_id, [public_key], plan.before)
        oldest = datetime.now(UTC) - timedelta(days=plan.job.carry_days)
        # One table, of which rows are taken when their turn comes: 100,000 records as objects are 300 MB.
        self._table = pa.concat_tables(parts, promote_options="default")
        columns = [self._table[name].to_pylist() for name in ("verdict", "etag", "audited_at", *_SAME)]
        self._rows = {
            tuple(of): row
            for row, (verdict, etag, audited_at, *of) in enumerate(zip(*columns, strict=True))
            if verdict == Verdict.INTACT and etag and audited_at >= oldest
        }

    def of(self, entry: CatalogEntry) -> AuditRecord | None:
        """The record of an entry, if there is one that may be carried forward."""
        row = self._rows.get(_what(entry))
        return None if row is None else record_of(self._table.slice(row, 1).to_pylist()[0])


#: What an entry and its record have in common.
_SAME: Final = ("uri", "model_id", "key_id", "arch")


def _what(entry: CatalogEntry) -> tuple[str, ...]:
    return tuple(getattr(entry, name) for name in _SAME)


def _spawner(worker: type[AuditWorker], settings: AuditSettings, gpus: float) -> Callable[[], Any]:
    # max_restarts=0: a restart would repeat, unseen, what the dispatcher has to count.
    actor = ray.remote(worker).options(max_restarts=0, max_task_retries=0, num_cpus=1, num_gpus=gpus)
    shared = ray.put(settings)  # once for all actors: a large fleet has megabytes of fingerprints
    return lambda: actor.remote(shared)


def _room_for_actors(gpus: float) -> int:
    """How many actors the cluster holds at present.

    Raises:
        UsageError: GPUs are asked for, and there are none.
    """
    total = ray.cluster_resources()
    if not gpus:
        return max(1, int(total.get("CPU", 1)))
    if room := int(total.get("GPU", 0) / gpus):
        return room
    raise UsageError("the cluster has no GPU: drop --gpus-per-actor, or wait for an autoscaler with --actors N")


def _log_finding(record: AuditRecord) -> None:
    if record.verdict is Verdict.INTACT:
        return
    about = {name: getattr(record, name) for name in ("model_id", "uri", "verdict", "error_code")}
    if record.verdict is Verdict.TAMPERED:
        seen = f"{record.matches} of {record.triggers} triggers match, displacement {record.displacement}"
        log.warning("tampered: %s %s: %s", record.model_id, record.uri, seen, extra=about)
    else:
        text = f"{record.error_code}: {record.error_message}"
        log.warning("error: %s %s: %s", record.model_id, record.uri, text, extra=about)


class _Parts:
    """The parts of a run: each is signed for this run, and no other is taken for one."""

    def __init__(self, plan: Plan, description: bytes, signer: Signer) -> None:
        self._plan, self._signer = plan, signer
        self._run_sha256 = hashlib.sha256(description).hexdigest()

    def write(self, shard: int, records: Sequence[AuditRecord]) -> bool:
        """Store a part, unless there is one; which `_commit` then reads."""
        name = self._plan.run.part(shard)
        return storage.create(self._plan.locate(name), to_parquet(records, name, self._run_sha256, self._signer.sign))

    def read(self, shard: int) -> pa.Table:
        """The rows of a stored part.

        Raises:
            UsageError: No driver of this run wrote it, or one that worked in another order.
        """
        return self.checked(shard, storage.read(self._plan.locate(self._plan.run.part(shard))))

    def checked(self, shard: int, data: bytes) -> pa.Table:
        """As `read`, of a part that has been read."""
        name = self._plan.run.part(shard)
        try:
            table = signed_part(data, name, self._run_sha256, [self._signer.public_key])
        except ValueError as error:
            raise _foreign(self._plan.locate(name), error) from None
        rows = zip(*(table[name].to_pylist() for name in _SAME), strict=True)
        if list(rows) != [_what(entry) for entry in self._plan.entries_of(shard)]:
            raise UsageError(
                f"{self._plan.locate(name)} has the records of other rows of the catalog than this version would put "
                "there: resume the run with the version that began it, or start a new one with a new --run-id"
            )
        return table


def _signed_here(uri: str, data: bytes, kind: str, signer: Signer) -> dict[str, Any]:
    try:
        return signed_values(data, kind, [signer.public_key])
    except ValueError as error:
        raise _foreign(uri, error) from None


def _foreign(uri: str, error: ValueError) -> UsageError:
    return UsageError(
        f"{uri} {error}: under this master secret no audit wrote it. Find out who did, and start a new run with a new "
        "--run-id"
    )


# -------------------------------------------------------------------------------------------- commit


def _commit(plan: Plan, description: bytes, signer: Signer, verdicts: Counter[str]) -> Summary:
    """Write the manifest from the parts as stored: of two drivers, the first to write a part has it."""
    names = [plan.run.part(shard) for shard in range(plan.run.shards)]
    with ThreadPoolExecutor(storage.IO_THREADS) as pool:
        parts = dict(zip(names, pool.map(storage.read, map(plan.locate, names)), strict=True))
    signed = _Parts(plan, description, signer)
    for shard, data in enumerate(parts.values()):
        signed.checked(shard, data)
    storage.create(plan.manifest, signer.sign(MANIFEST, manifest(plan.run, description, parts)))
    return _entered(plan, storage.read(plan.manifest), description, signer, verdicts)


def _entered(plan: Plan, data: bytes, description: bytes, signer: Signer, verdicts: Counter[str]) -> Summary:
    """The summary of a run that has a manifest, once the ledger has it, too; `verdicts` become the manifest's.

    Raises:
        UsageError: No driver of this run wrote the manifest.
    """
    values = _signed_here(plan.manifest, data, MANIFEST, signer)
    if (values["run_id"], values["run_sha256"]) != (plan.run.run_id, hashlib.sha256(description).hexdigest()):
        raise _foreign(plan.manifest, ValueError("is another run's"))
    verdicts.clear()
    verdicts.update(values["verdicts"])
    out, started = storage.absolute(plan.job.out), plan.run.started_at
    head = ledger.append(out, plan.run.run_id, started, data, signer.sign, [signer.public_key])
    return Summary(
        run_id=values["run_id"],
        verdicts=values["verdicts"],
        errors=values["errors"],
        carried=values["carried"],
        manifest=plan.manifest,
        ledger=head,
    )


def _signer(worker: type[AuditWorker], settings: AuditSettings) -> Signer:
    """The master secret of this process or, where it has none, a key that a worker certifies by its own."""
    try:
        return MasterSecret.from_file(settings.master_key_file)
    except UsageError:
        log.info("this process has no master secret: a worker certifies what it signs")

    def certify(public_key: str) -> bytes:
        for attempt in (1, 2):
            actor = _spawner(worker, settings, 0.0)()
            try:
                placed = actor.__ray_ready__.remote()
                while not ray.wait([placed], timeout=PATIENCE_S)[0]:
                    log.info("no worker yet that could certify: waiting for room in the cluster")
                signed: bytes = ray.get(actor.certify.remote(public_key), timeout=START_S)
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UsageError) else error) from None
            except RayError as error:  # its node is gone, say, or hangs
                log.warning("the worker that was to certify did not (attempt %d): %s", attempt, reason(error))
            else:
                return signed
            finally:
                ray.kill(actor)
        raise FwmError(ErrorCode.WORKER_DIED, "neither of two workers certified what this driver signs")

    return SessionKey(certify)
