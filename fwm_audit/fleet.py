"""Audit a fleet: plan what is left, let Ray actors audit one model at a time, commit shard by shard.

    plan      catalog -> entries, sealed keys -> fingerprints, stored run.json and parts -> what is missing
    execute   what is missing is given to the `Dispatcher`, which gives one record for each entry
    commit    a part when its shard is complete (create-only), the signed manifest when all parts are there

What an interrupted run has stored is left as it is; the same run id goes on from there.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import logging
import math
import os
import socket
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from fwm_audit import __version__, ledger, logs, storage
from fwm_audit.catalog import CatalogEntry, read_catalog
from fwm_audit.compaction import read_run
from fwm_audit.confinement import allow_seconds, confine, share_of_memory
from fwm_audit.dispatcher import Dispatcher, Task, nothing
from fwm_audit.errors import ErrorCode, FwmError, StorageError, UsageError
from fwm_audit.key import MasterSecret, SessionKey, fingerprint, key_name, signed_values
from fwm_audit.metrics import AuditMeter
from fwm_audit.records import (
    MANIFEST,
    RUN,
    AuditRecord,
    AuditSettings,
    Run,
    check_run_id,
    counts,
    error_record,
    manifest,
    record_of,
    run_path,
    signed_part,
    to_parquet,
)
from fwm_audit.verdict import Tolerance, Verdict

if TYPE_CHECKING:
    from fwm_audit.check import Auditor

log = logging.getLogger(__name__)

_IO_THREADS: Final = 16

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditJob:
    """What the operator asked for.

    Attributes:
        actors: Worker processes; None takes one for each CPU (or share of a GPU) of the cluster.
        gpus_per_actor: Share of a GPU for each; 0 audits on the CPU.
        timeout_s: Seconds for one model, from the moment a ready worker begins.
        master_key_file: A path as the workers see it; None lets their FWM_MASTER_KEY_FILE tell.
        memory_bytes: What a worker on a CPU may hold beyond what it holds at its start; None is half of its share
            of the node.
        allow_local: Whether a catalog that is no local file may name local files.
        carry_days: Carry intact records forward from the last complete run where the object has not changed
            since, up to this many days after its audit; None audits every model.
    """

    catalog: str
    keys: str
    out: str
    run_id: str
    tolerance: Tolerance = Tolerance.EXACT
    allowed_factories: tuple[str, ...] = ()
    actors: int | None = None
    gpus_per_actor: float = 0.0
    timeout_s: float = 600.0
    master_key_file: str | None = None
    memory_bytes: int | None = None
    allow_local: bool = False
    carry_days: float | None = None
    shard_size: int = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """A run and what is left of it.

    `entries` are in the order of work, of which shards are slices. `resumed`: its run.json is stored.
    `missing`: shards without a part. `before`: the run whose intact records are carried forward, if any.
    """

    job: AuditJob
    run: Run
    entries: tuple[CatalogEntry, ...]
    resumed: bool
    missing: tuple[int, ...]
    before: Run | None = None

    def entries_of(self, shard: int) -> tuple[CatalogEntry, ...]:
        """The entries whose records are in one part, in its order."""
        rows = self.run.rows_of(shard)
        return self.entries[rows.start : rows.stop]

    @property
    def manifest(self) -> str:
        """Where the manifest is, once the run is complete."""
        return self.locate(run_path(self.run.run_id, "manifest.json"))

    def locate(self, name: str) -> str:
        """URI of a name relative to the output."""
        return storage.join(storage.absolute(self.job.out), name)


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
    settings = _settings(plan)
    try:
        summary = _entered(plan, storage.read(plan.manifest), description, signer)
        meter = AuditMeter()  # of a driver that was lost, perhaps, before anybody read its metrics
        meter.add({("error", code): count for code, count in summary.errors.items()})
        meter.add({(verdict, ""): summary.verdicts[verdict] for verdict in (Verdict.INTACT, Verdict.TAMPERED)})
        meter.close(complete=True)
        return summary  # noqa: TRY300 - the path to the end is the one below
    except StorageError as error:
        if error.code is not ErrorCode.OBJECT_MISSING:
            raise
    verdicts: Counter[str] = Counter()
    meter, complete = AuditMeter(), False
    try:
        before = _Before(plan, signer.public_key).of if plan.before is not None else nothing
        _execute(plan, settings, before, verdicts, progress, worker, _Parts(plan, description, signer), meter)
        summary = _commit(plan, description, signer)
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


# ---------------------------------------------------------------------------------------------- plan


def plan_audit(job: AuditJob) -> Plan:
    """What a run would do. Reads the catalog, the sealed keys and the output; writes nothing.

    Raises:
        UsageError: The catalog cannot be used, or the stored run of this id has other settings.
    """
    check_run_id(job.run_id)
    catalog, keys = storage.absolute(job.catalog), storage.absolute(job.keys)
    try:
        data = storage.read(catalog)
    except StorageError as error:
        raise UsageError(f"cannot read the catalog: {error.message}") from None
    # What takes long is begun first, so that no worker is alone with it in the end; else in the catalog's order.
    entries = tuple(sorted(read_catalog(data, catalog, allow_local=job.allow_local), key=_first_the_large))
    base = str(Path.cwd())
    settings = {
        "catalog": catalog,
        "keys": keys,
        "tolerance": job.tolerance.value,
        "allow_factory": sorted(job.allowed_factories),
        # The rest of a run must not read other files because it was resumed from another folder.
        "relative_to": base if any(storage.absolute(entry.uri, base) != entry.uri for entry in entries) else None,
        "max_age": job.carry_days,
        "allow_local": job.allow_local,
    }
    run = Run(
        run_id=job.run_id,
        started_at=datetime.now(UTC),
        settings=settings,
        catalog_sha256=hashlib.sha256(data).hexdigest(),
        rows=len(entries),
        shard_size=job.shard_size,
        key_fingerprints=_fingerprints(entries, keys),
        code_version=__version__,
    )
    plan = Plan(job, run, entries, resumed=False, missing=tuple(range(run.shards)))
    stored = _stored(plan, job.run_id)
    if job.carry_days is not None:
        plan = replace(plan, before=_last_run(plan, stored or run))
    if stored is None:
        return plan
    if differences := stored.differences(run):
        raise UsageError(
            f"run {job.run_id} was started with other values of {', '.join(differences)}: "
            "repeat them to resume it, or start a new run with a new --run-id"
        )
    plan = replace(plan, run=stored, resumed=True)
    parts = [PurePosixPath(stored.part(shard)) for shard in plan.missing]
    there = _names_in(plan.locate(str(parts[0].parent)))
    missing = tuple(shard for shard, part in zip(plan.missing, parts, strict=True) if part.name not in there)
    return replace(plan, missing=missing)


def _stored(plan: Plan, run_id: str) -> Run | None:
    try:
        return Run.from_json(storage.read(plan.locate(run_path(run_id, "run.json"))))
    except StorageError as error:
        if error.code is not ErrorCode.OBJECT_MISSING:
            raise
        return None


def _last_run(plan: Plan, run: Run) -> Run | None:
    """The last complete run before `run` that looked at models as it does, if its audits are not too old."""
    assert plan.job.carry_days is not None

    def described(run_id: str) -> Run | None:
        with contextlib.suppress(UsageError):  # of another release: nothing of it is carried forward
            return _stored(plan, run_id)
        return None

    def alike(other: Run) -> bool:
        ours, theirs = ({**one.settings, "catalog": None, "max_age": None} for one in (run, other))
        return ours == theirs and other.code_version == run.code_version and other.started_at < run.started_at

    for days in range(math.ceil(plan.job.carry_days) + 1):
        parts = _names_in(plan.locate(f"audits/run_date={run.started_at - timedelta(days=days):%Y-%m-%d}"))
        others = map(described, {name.rpartition("-")[0] for name in parts})
        found = [other for other in others if other is not None and alike(other)]
        for other in sorted(found, key=lambda other: other.started_at, reverse=True):
            if storage.exists(plan.locate(run_path(other.run_id, "manifest.json"))):
                return other
    return None


def _first_the_large(entry: CatalogEntry) -> int:
    return -(entry.size_bytes or 0).bit_length()  # copies of one model, whose sizes hardly differ, stay together


def _fingerprints(entries: Iterable[CatalogEntry], keys: str) -> dict[str, str | None]:
    """SHA-256 of each sealed key that the entries name, None where there is none to read."""
    names = sorted({(entry.model_id, entry.key_id) for entry in entries if entry.problem is None})

    def hash_some(some: Sequence[tuple[str, str]]) -> list[str | None]:
        return [_fingerprint(storage.join(keys, key_name(*name))) for name in some]

    # One slice for each thread: a future for each of 100,000 keys would take more memory than the result.
    slices = [names[start::_IO_THREADS] for start in range(_IO_THREADS)]
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        hashed = zip(itertools.chain(*slices), itertools.chain(*pool.map(hash_some, slices)), strict=True)
        return {f"{model_id}/{key_id}": value for (model_id, key_id), value in sorted(hashed)}


def _fingerprint(uri: str) -> str | None:
    try:
        return fingerprint(storage.read(uri))
    except StorageError as error:
        # A finding about the rows of this key, which their workers will make again; not about the run.
        if error.code is not ErrorCode.OBJECT_MISSING:
            log.warning("cannot read the key %s: %s", uri, error.message)
        return None


def _names_in(folder: str) -> set[str]:
    try:
        return {PurePosixPath(item.uri).name for item in storage.listing(folder)}
    except StorageError as error:
        if error.code is ErrorCode.OBJECT_MISSING:
            return set()
        raise


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


def _execute(
    plan: Plan,
    settings: AuditSettings,
    before: Callable[[CatalogEntry], AuditRecord | None],
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
        before=before,
        meter=meter,
    )
    waiting: defaultdict[int, dict[int, AuditRecord]] = defaultdict(dict)
    writes: deque[Future[bool]] = deque()
    with ThreadPoolExecutor(_IO_THREADS) as pool, closing(dispatcher.records(usable)) as audited:
        for table in pool.map(parts.read, sorted(set(range(run.shards)) - set(plan.missing))):
            found = Counter(zip(table["verdict"].to_pylist(), table["error_code"].to_pylist(), strict=True))
            verdicts.update(table["verdict"].to_pylist())
            meter.add({(verdict, code or ""): count for (verdict, code), count in found.items()})
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
            while writes and (writes[0].done() or len(writes) > 2 * _IO_THREADS):
                writes.popleft().result()
            progress(verdicts.total(), run.rows, verdicts)
        for write in writes:
            write.result()


class _Before:
    """Intact records of an earlier run, by what they are of: candidates to be carried forward."""

    def __init__(self, plan: Plan, public_key: str) -> None:
        assert plan.before is not None
        assert plan.job.carry_days is not None
        parts = read_run(storage.absolute(plan.job.out), plan.before.run_id, public_key)
        oldest = plan.run.started_at - timedelta(days=plan.job.carry_days)
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
        row = self._rows.get(tuple(getattr(entry, name) for name in _SAME))
        return None if row is None else record_of(self._table.slice(row, 1).to_pylist()[0])


_SAME: Final = ("uri", "model_id", "key_id", "arch")


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
        if table["uri"].to_pylist() != [entry.uri for entry in self._plan.entries_of(shard)]:
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


def _commit(plan: Plan, description: bytes, signer: Signer) -> Summary:
    """Write the manifest from the parts as stored: of two drivers, the first to write a part has it."""
    names = [plan.run.part(shard) for shard in range(plan.run.shards)]
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        parts = dict(zip(names, pool.map(storage.read, map(plan.locate, names)), strict=True))
    signed = _Parts(plan, description, signer)
    for shard, data in enumerate(parts.values()):
        signed.checked(shard, data)
    storage.create(plan.manifest, signer.sign(MANIFEST, manifest(plan.run, description, parts)))
    return _entered(plan, storage.read(plan.manifest), description, signer)


def _entered(plan: Plan, data: bytes, description: bytes, signer: Signer) -> Summary:
    """The summary of a run that has a manifest, once the ledger has it, too.

    Raises:
        UsageError: No driver of this run wrote the manifest.
    """
    values = _signed_here(plan.manifest, data, MANIFEST, signer)
    if (values["run_id"], values["run_sha256"]) != (plan.run.run_id, hashlib.sha256(description).hexdigest()):
        raise _foreign(plan.manifest, ValueError("is another run's"))
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
        actor = _spawner(worker, settings, 0.0)()
        try:
            signed: bytes = ray.get(actor.certify.remote(public_key))
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UsageError) else error) from None
        finally:
            ray.kill(actor)
        return signed

    return SessionKey(certify)
