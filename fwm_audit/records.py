"""Audit records: one row for each catalog entry, with an explicit Arrow schema, and a run's own files.

The schema is a contract with every query anybody saved: columns are only ever added, with a new
`SCHEMA_VERSION`, and only of types that DuckDB, pandas, Spark and Athena all read. Labels of
triggers are never among them.

    <out>/runs/<run_id>/run.json                                    written first
    <out>/audits/run_date=YYYY-MM-DD/<run_id>-<shard>.parquet       once each, never rewritten
    <out>/runs/<run_id>/manifest.json                               written last: its existence means complete

`compaction` makes larger files of them, beside them; `ledger` chains the manifests.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet

from fwm_audit import __version__
from fwm_audit.catalog import CatalogEntry
from fwm_audit.errors import FwmError, UsageError
from fwm_audit.key import signed_values
from fwm_audit.verdict import Displacement, Tolerance, Verdict

SCHEMA_VERSION: Final = 1
#: What a run's files are signed as, and where a part has its signature.
RUN, PART, MANIFEST = "run", "part", "manifest"
_SIGNATURE: Final = b"fwm_audit.signature"
#: Kind and values to the signed file: `MasterSecret.sign`, wherever that secret is.
Sign = Callable[[str, Mapping[str, Any]], bytes]
_TIME = pa.timestamp("us", tz="UTC")
SCHEMA: Final = pa.schema(
    [
        pa.field("schema_version", pa.int32(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("run_started_at", _TIME, nullable=False),
        pa.field("audited_at", _TIME, nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("container", pa.string()),
        pa.field("arch", pa.string(), nullable=False),
        pa.field("key_id", pa.string(), nullable=False),
        pa.field("key_fingerprint", pa.string()),
        pa.field("method", pa.string()),
        pa.field("variant", pa.string()),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("displacement", pa.string(), nullable=False),
        pa.field("triggers", pa.int32()),
        pa.field("matches", pa.int32()),
        pa.field("match_rate", pa.float64()),
        pa.field("p_value", pa.float64()),
        pa.field("mismatched", pa.list_(pa.int32())),
        pa.field("digest_matches", pa.bool_()),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("fetch_ms", pa.float64()),
        pa.field("load_ms", pa.float64()),
        pa.field("verify_ms", pa.float64()),
        pa.field("device", pa.string()),
        pa.field("dtype", pa.string()),
        pa.field("worker", pa.string()),
        pa.field("versions", pa.string()),
        pa.field("arithmetic", pa.string()),
        pa.field("carried_from", pa.string()),
    ]
)
_MESSAGE_LENGTH: Final = 500
#: Name of a part, as `Run.part` makes it: its day and its run.
PART_NAME: Final = re.compile(r"audits/run_date=(?P<day>\d{4}-\d\d-\d\d)/(?P<run_id>.+)-\d{6,}\.parquet")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """What one audit saw of one catalog entry; the fields are the columns of `SCHEMA`.

    `digest_matches` compares the file with the released one: a model that computes the same
    function from other bytes is `intact` with `digest_matches` false. None means not compared.
    `dtype` is that of the checkpoint, `arithmetic` that in which its labels were taken: `float32` stands
    for a coarser check, see `embedding.embed`. `carried_from` is the run that audited the model, at
    `audited_at`, where this one found the same version of the object; None is this one.
    """

    run_id: str
    run_started_at: datetime
    audited_at: datetime
    shard: int
    attempt: int
    model_id: str
    uri: str
    arch: str
    key_id: str
    verdict: Verdict
    displacement: Displacement
    etag: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    container: str | None = None
    key_fingerprint: str | None = None
    method: str | None = None
    variant: str | None = None
    triggers: int | None = None
    matches: int | None = None
    match_rate: float | None = None
    p_value: float | None = None
    mismatched: list[int] | None = None
    digest_matches: bool | None = None
    error_code: str | None = None
    error_message: str | None = None
    fetch_ms: float | None = None
    load_ms: float | None = None
    verify_ms: float | None = None
    device: str | None = None
    dtype: str | None = None
    worker: str | None = None
    versions: str | None = None
    arithmetic: str | None = None
    carried_from: str | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Refuse records that contradict themselves: an audit that saw nothing is never `intact`."""
        if (self.verdict is Verdict.ERROR) != (self.error_code is not None):
            raise ValueError("a record has an error_code exactly when its verdict is 'error'")
        if self.verdict is not Verdict.ERROR and not self.triggers:
            raise ValueError("a verdict needs triggers")
        if self.carried_from is not None and (self.verdict is not Verdict.INTACT or not self.etag):
            raise ValueError("only an intact record of a known version of an object is carried forward")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """What every audit of a run shares; plain data and references, no secret.

    Attributes:
        keys: URI under which the sealed keys lie.
        base: Folder against which relative local URIs are resolved.
        key_fingerprints: SHA-256 of each sealed key ("model_id/key_id") as the run first saw it.
        allowed_factories: Packages from which architectures may be built.
        device: `cpu`, `cuda` or `auto`.
        master_key_file: Path of the master secret on the worker; None takes FWM_MASTER_KEY_FILE.
        timeout_s: Seconds of one audit.
        memory_bytes: What a worker may hold beyond what it holds at its start, and the largest object that it
            fetches; None is no limit.
    """

    run_id: str
    run_started_at: datetime
    keys: str
    base: str
    key_fingerprints: Mapping[str, str | None]
    tolerance: Tolerance = Tolerance.EXACT
    allowed_factories: tuple[str, ...] = ()
    device: str = "auto"
    master_key_file: str | None = None
    timeout_s: float = 600.0
    memory_bytes: int | None = None


def make_record(
    settings: AuditSettings, entry: CatalogEntry, *, shard: int, attempt: int, worker: str, **facts: Any
) -> AuditRecord:
    """The record of an entry audited just now; `facts` are the columns that the audit saw."""
    return AuditRecord(
        run_id=settings.run_id,
        run_started_at=settings.run_started_at,
        audited_at=datetime.now(UTC),
        shard=shard,
        attempt=attempt,
        model_id=entry.model_id,
        uri=entry.uri,
        arch=entry.arch,
        key_id=entry.key_id,
        worker=worker,
        **{"versions": versions()} | facts,
    )


def error_record(
    settings: AuditSettings,
    entry: CatalogEntry,
    error: FwmError,
    *,
    shard: int,
    attempt: int,
    worker: str = "",
    **facts: Any,
) -> AuditRecord:
    """The record of an entry that could not be judged; `facts` are further columns already known."""
    facts |= {
        "verdict": Verdict.ERROR,
        "displacement": Displacement.UNKNOWN,
        "error_code": error.code.value,
        "error_message": printable(error.message)[:_MESSAGE_LENGTH],
    }
    return make_record(settings, entry, shard=shard, attempt=attempt, worker=worker, **facts)


@functools.cache
def versions() -> str:
    """JSON of the versions that decide what a model computes."""
    # From metadata: the driver has these installed, not loaded.
    others = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm")}
    return json.dumps({"fwm-audit": __version__} | others)


def printable(text: object) -> str:
    """One line without control characters: names and messages are whatever somebody called a file, or put into it."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def to_parquet(records: Sequence[AuditRecord], name: str = "", run_sha256: str = "", sign: Sign | None = None) -> bytes:
    """One Parquet file (zstd) with `SCHEMA`, rows in the given order.

    Args:
        records: Its rows.
        name: Of the part that it is.
        run_sha256: Of its run's run.json.
        sign: Signs these and the rows; the signature is in the file's metadata. None leaves it unsigned.
    """
    rows = [{name: getattr(record, name) for name in SCHEMA.names} for record in records]
    table = pa.Table.from_pylist(rows, SCHEMA)
    if sign is not None:
        signature = sign(PART, {"name": name, "run_sha256": run_sha256, "rows_sha256": _rows_sha256(table)})
        table = table.replace_schema_metadata({_SIGNATURE: signature})
    return table_to_parquet(table)


def signed_part(data: bytes, name: str, run_sha256: str, public_keys: Collection[str]) -> pa.Table:
    """The table in a part that one of these signers wrote under this name for this run.

    Raises:
        ValueError: It is none, or was changed; the text says which.
    """
    try:
        table = from_parquet(data)
    except (pa.ArrowException, OSError):
        raise ValueError("is no Parquet file") from None
    seen = signed_values((table.schema.metadata or {}).get(_SIGNATURE, b""), PART, public_keys)
    if seen != {"name": name, "run_sha256": run_sha256, "rows_sha256": _rows_sha256(table)}:
        raise ValueError("does not hold the rows that were signed")
    return table


def _rows_sha256(table: pa.Table) -> str:
    # By values, which every version of Arrow reads alike from what any of them wrote.
    return hashlib.sha256(json.dumps(table.to_pylist(), sort_keys=True, default=str).encode()).hexdigest()


def table_to_parquet(table: pa.Table) -> bytes:
    """One Parquet file (zstd) of a table of records."""
    sink = io.BytesIO()
    pa.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def carried(
    settings: AuditSettings, entry: CatalogEntry, before: AuditRecord, *, shard: int, attempt: int, worker: str
) -> AuditRecord:
    """An earlier run's intact record of an object that has not changed since, as a record of this run."""
    return dataclasses.replace(
        before,
        run_id=settings.run_id,
        run_started_at=settings.run_started_at,
        shard=shard,
        attempt=attempt,
        uri=entry.uri,
        worker=worker,
        carried_from=before.carried_from or before.run_id,
        schema_version=SCHEMA_VERSION,
    )


def record_of(row: Mapping[str, Any]) -> AuditRecord:
    """The record that a row of a part describes.

    Raises:
        ValueError: It is none.
    """
    values: dict[str, Any] = {name: row.get(name) for name in SCHEMA.names}
    values |= {"verdict": Verdict(row["verdict"]), "displacement": Displacement(row["displacement"])}
    return AuditRecord(**values)


def from_parquet(data: bytes) -> pa.Table:
    """The table in one part; columns that a newer release added are kept as they are."""
    return pa.parquet.read_table(pa.BufferReader(data))


def check_run_id(run_id: str) -> str:
    """`run_id` itself if it can stand in object names.

    Raises:
        UsageError: It cannot.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise UsageError(f"--run-id {run_id!r}: letters, digits and . _ - only, 128 characters at most")
    return run_id


@dataclass(frozen=True, slots=True)
class Run:
    """What defines a run. Stored as run.json before the first audit; a resume must agree with it."""

    run_id: str
    started_at: datetime
    settings: Mapping[str, Any]
    catalog_sha256: str
    rows: int
    shard_size: int
    key_fingerprints: Mapping[str, str | None]
    code_version: str

    @property
    def shards(self) -> int:
        """Number of Parquet parts that make the run complete."""
        return -(-self.rows // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """Positions, in the order of work, of the entries of one part."""
        return range(shard * self.shard_size, min(self.rows, (shard + 1) * self.shard_size))

    def part(self, shard: int) -> str:
        """Name of one part, relative to the output: a function of run and shard alone."""
        return f"audits/run_date={self.started_at:%Y-%m-%d}/{self.run_id}-{shard:06d}.parquet"

    def values(self) -> dict[str, Any]:
        """The content of run.json, to be signed."""
        return dataclasses.asdict(self) | {"started_at": self.started_at.isoformat()}

    @classmethod
    def from_json(cls, data: bytes) -> Run:
        """The run that a run.json describes, whoever signed it.

        Raises:
            UsageError: It is not a run.json of this release.
        """
        try:
            values = json.loads(data)
            names = {field.name for field in dataclasses.fields(cls)}
            run = cls(
                **{name: values[name] for name in names} | {"started_at": datetime.fromisoformat(values["started_at"])}
            )
            typed = all(isinstance(value, str | None) for value in run.key_fingerprints.values())
            sound = run.started_at.tzinfo is not None and isinstance(run.settings, dict) and run.shard_size > 0
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = typed = False
        if not (sound and typed):
            raise UsageError("run.json is damaged or from another release: start a new run with a new --run-id")
        return run

    def differences(self, other: Run) -> list[str]:
        """Names of what differs between two descriptions of one run, start time apart.

        A key that one of them could not read is no difference: its rows are errors until a new run.
        """
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        for name in self.key_fingerprints.keys() & other.key_fingerprints.keys():
            if None in (self.key_fingerprints[name], other.key_fingerprints[name]):
                mine["key_fingerprints"][name] = theirs["key_fingerprints"][name] = None
        names = [name for name in mine if name not in {"started_at", "settings"} and mine[name] != theirs[name]]
        settings = self.settings.keys() | other.settings.keys()
        return names + sorted(
            f"--{name.replace('_', '-')}" for name in settings if self.settings.get(name) != other.settings.get(name)
        )


def run_path(run_id: str, name: str) -> str:
    """Path of a run's own file, relative to the output."""
    return f"runs/{run_id}/{name}"


def manifest(run: Run, description: bytes, parts: Mapping[str, bytes]) -> dict[str, Any]:
    """The content of manifest.json, to be signed: every part with its rows and SHA-256, and the counts of the run.

    Args:
        run: The run.
        description: Its run.json, as stored.
        parts: By name, as stored.

    Raises:
        RuntimeError: The parts do not hold exactly one record for each catalog row.
    """
    files = []
    verdicts: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    carried_rows = 0
    for name, data in parts.items():
        table = from_parquet(data)
        files.append({"path": name, "rows": table.num_rows, "sha256": hashlib.sha256(data).hexdigest()})
        verdicts.update(table["verdict"].to_pylist())
        errors.update(code for code in table["error_code"].to_pylist() if code)
        carried_rows += table.num_rows - table["carried_from"].null_count
    if (rows := sum(file["rows"] for file in files)) != run.rows or len(files) != run.shards:
        raise RuntimeError(f"run {run.run_id}: {rows} records in {len(files)} parts for {run.rows} catalog rows")
    return {
        "run_id": run.run_id,
        "run_sha256": hashlib.sha256(description).hexdigest(),
        "rows": run.rows,
        "files": files,
        "verdicts": counts(verdicts),
        "errors": dict(sorted(errors.items())),
        "carried": carried_rows,
    }


def counts(verdicts: Iterable[str] | Mapping[str, int]) -> dict[str, int]:
    """Records by verdict, every verdict named even at zero."""
    counter = Counter(verdicts)
    return {verdict.value: counter[verdict.value] for verdict in Verdict}
