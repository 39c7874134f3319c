"""What a run is to audit, and what is left of it. Reads the catalog, the sealed keys and the output; writes nothing.

    catalog           -> entries in the order of work, of which shards are slices
    sealed keys       -> fingerprints, so that no key is exchanged during the run
    run.json, parts   -> which shards are missing, if a run of this id was begun
    earlier runs      -> the one whose intact records are carried forward, if that is asked for

Nothing here knows of Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Final

from fwm_audit import __version__, storage
from fwm_audit.catalog import CatalogEntry, read_catalog
from fwm_audit.errors import ErrorCode, StorageError, UsageError
from fwm_audit.key import fingerprint, key_name
from fwm_audit.records import Run, check_run_id, run_path
from fwm_audit.verdict import Tolerance

log = logging.getLogger(__name__)

#: Keys that are hashed in a row.
_SOME: Final = 64


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


def plan_audit(job: AuditJob) -> Plan:
    """What a run would do. Reads the catalog, the sealed keys and the output; writes nothing.

    Raises:
        StorageError: The store does not answer.
        UsageError: The catalog cannot be used, or the stored run of this id has other settings.
    """
    check_run_id(job.run_id)
    catalog, keys = storage.absolute(job.catalog), storage.absolute(job.keys)
    try:
        data = storage.read(catalog)
    except StorageError as error:
        message = f"cannot read the catalog: {error.message}"
        if error.code is ErrorCode.OBJECT_MISSING:
            raise UsageError(message) from None
        raise StorageError(error.code, message) from None
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
    """The last complete run before `run` that looked at models as it does, if its audits are not too old.

    One of the same catalog, where there is one: an output may hold the runs of several. A catalog may also have another
    name every night.
    """
    assert plan.job.carry_days is not None

    def described(run_id: str) -> Run | None:
        with contextlib.suppress(UsageError):  # of another release: nothing of it is carried forward
            return _stored(plan, run_id)
        return None

    def alike(other: Run) -> bool:
        ours, theirs = ({**one.settings, "catalog": None, "max_age": None} for one in (run, other))
        return ours == theirs and other.code_version == run.code_version and other.started_at < run.started_at

    last: Run | None = None
    for days in range(math.ceil(plan.job.carry_days) + 1):
        parts = _names_in(plan.locate(f"audits/run_date={run.started_at - timedelta(days=days):%Y-%m-%d}"))
        others = map(described, {name.rpartition("-")[0] for name in parts})
        found = [other for other in others if other is not None and alike(other)]
        for other in sorted(found, key=lambda other: other.started_at, reverse=True):
            if storage.exists(plan.locate(run_path(other.run_id, "manifest.json"))):
                if other.settings.get("catalog") == run.settings["catalog"]:
                    return other
                last = last or other
    return last


def _first_the_large(entry: CatalogEntry) -> int:
    return -(entry.size_bytes or 0).bit_length()  # copies of one model, whose sizes hardly differ, stay together


def _fingerprints(entries: Iterable[CatalogEntry], keys: str) -> dict[str, str | None]:
    """SHA-256 of each sealed key that the entries name, None where there is none to read."""
    names = sorted({(entry.model_id, entry.key_id) for entry in entries if entry.problem is None})

    def hash_some(some: Sequence[tuple[str, str]]) -> list[str | None]:
        return [_fingerprint(storage.join(keys, key_name(*name))) for name in some]

    # A future for each of 100,000 keys would take more memory than the result; what has begun is waited for on Ctrl-C.
    slices = [names[start : start + _SOME] for start in range(0, len(names), _SOME)]
    with ThreadPoolExecutor(storage.IO_THREADS) as pool:
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
