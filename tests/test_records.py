"""Audit records and a run's files: a contract with every query that anybody saved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from fwm_audit.errors import UsageError
from fwm_audit.key import canonical
from fwm_audit.records import (
    SCHEMA,
    AuditRecord,
    Run,
    check_run_id,
    counts,
    from_parquet,
    manifest,
    run_path,
    to_parquet,
)
from fwm_audit.verdict import Displacement, Verdict

#: Version 1. Lines are added at the end, never changed: published queries name these.
GOLDEN = """
schema_version: int32 not null
run_id: string not null
run_started_at: timestamp[us, tz=UTC] not null
audited_at: timestamp[us, tz=UTC] not null
shard: int32 not null
attempt: int32 not null
model_id: string not null
uri: string not null
etag: string
size_bytes: int64
sha256: string
container: string
arch: string not null
key_id: string not null
key_fingerprint: string
method: string
variant: string
verdict: string not null
displacement: string not null
triggers: int32
matches: int32
match_rate: double
p_value: double
mismatched: list<element: int32>
digest_matches: bool
error_code: string
error_message: string
fetch_ms: double
load_ms: double
verify_ms: double
device: string
dtype: string
worker: string
versions: string
arithmetic: string
carried_from: string
"""
START = datetime(2026, 3, 1, 23, 59, 59, 123456, tzinfo=UTC)


def record(**values):
    required = {
        "run_id": "run",
        "run_started_at": START,
        "audited_at": START,
        "shard": 0,
        "attempt": 1,
        "model_id": "m",
        "uri": "s3://b/m.pt",
        "arch": "timm:any",
        "key_id": "0" * 16,
        "verdict": Verdict.INTACT,
        "displacement": Displacement.NONE,
        "triggers": 8,
    }
    return AuditRecord(**required | values)


def run(**values):
    required = {
        "run_id": "run",
        "started_at": START,
        "settings": {"tolerance": "exact", "allow_factory": ["acme"]},
        "catalog_sha256": "0" * 64,
        "rows": 5,
        "shard_size": 2,
        "key_fingerprints": {"m/1": "f" * 64, "m/2": None},
        "code_version": "0.1.0",
    }
    return Run(**required | values)


def test_the_schema_is_the_published_one():
    """Columns, order, types and what may be null."""
    stored = from_parquet(to_parquet([record()])).schema
    assert "\n".join(f"{f.name}: {f.type}{'' if f.nullable else ' not null'}" for f in stored) == GOLDEN.strip()


def test_the_columns_are_the_fields_of_a_record():
    """No value is dropped on the way, no column is left without a source."""
    assert set(SCHEMA.names) == {field.name for field in dataclasses.fields(AuditRecord)}


def test_parquet_keeps_every_value_and_the_order():
    """What is stored is what was seen."""
    full = record(
        verdict=Verdict.TAMPERED,
        displacement=Displacement.BEYOND,
        etag="e",
        size_bytes=2**40,
        sha256="0" * 64,
        container="zip",
        key_fingerprint="1" * 64,
        method="mirror",
        variant="float32",
        matches=6,
        match_rate=0.75,
        p_value=1e-12,
        mismatched=[1, 7],
        digest_matches=False,
        fetch_ms=1.5,
        load_ms=2.5,
        verify_ms=3.5,
        device="cpu",
        dtype="float64",
        worker="host:1",
        versions="{}",
    )
    records = [full, record(), record(verdict=Verdict.ERROR, error_code="timeout", error_message="late")]
    rows = from_parquet(to_parquet(records)).to_pylist()
    assert rows == [{name: getattr(item, name) for name in SCHEMA.names} for item in records]


@pytest.mark.parametrize(
    "values",
    [
        {"triggers": None},
        {"triggers": 0},
        {"verdict": Verdict.TAMPERED, "triggers": 0},
        {"verdict": Verdict.ERROR},
        {"verdict": Verdict.INTACT, "error_code": "timeout"},
        {"verdict": Verdict.TAMPERED, "etag": "e", "carried_from": "before"},
        {"verdict": Verdict.INTACT, "carried_from": "before"},
    ],
)
def test_records_that_contradict_themselves_are_refused(values):
    """An audit that saw nothing is never a verdict, an error never goes without its code."""
    with pytest.raises(ValueError, match=r"record|verdict"):
        record(**values)


def test_a_run_survives_json():
    """A resume compares with exactly what was stored."""
    assert Run.from_json(canonical(run().values())) == run()
    assert Run.from_json(canonical(run().values())).differences(run()) == []


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"{", json.dumps({"started_at": "noon"}).encode(), b"[" * 100_000])
def test_a_damaged_run_is_refused(data):
    """A run that cannot be read cannot be resumed."""
    with pytest.raises(UsageError, match=r"run\.json"):
        Run.from_json(data)


def test_differences_are_named_as_the_operator_knows_them():
    """Settings by their option; the time of the start is no difference."""
    other = run(rows=6, settings={"tolerance": "half", "allow_factory": ["acme"]}, started_at=datetime.now(UTC))
    assert run().differences(other) == ["rows", "--tolerance"]


def test_shards_cover_every_row_once():
    """The last shard may be short."""
    rows = [row for shard in range(run().shards) for row in run().rows_of(shard)]
    assert rows == list(range(5))
    assert run(rows=4).shards == 2


def test_names_depend_on_the_run_and_the_shard_alone():
    """A retry on another day writes to the day of the run's start, and so can only lose."""
    assert run().part(7) == "audits/run_date=2026-03-01/run-000007.parquet"
    assert run_path("run", "run.json") == "runs/run/run.json"


def parts(*sizes):
    return {run().part(shard): to_parquet([record()] * size) for shard, size in enumerate(sizes)}


def test_a_manifest_counts_what_is_stored():
    """Files with their rows and digests, records by verdict and by error."""
    stored = parts(2, 2) | {run().part(2): to_parquet([record(verdict=Verdict.ERROR, error_code="timeout")])}
    values = manifest(run(), b"run.json", stored)
    assert values["verdicts"] == {"intact": 4, "tampered": 0, "error": 1}
    assert values["errors"] == {"timeout": 1}
    assert [file["rows"] for file in values["files"]] == [2, 2, 1]
    assert values["run_sha256"] == hashlib.sha256(b"run.json").hexdigest()


@pytest.mark.parametrize("sizes", [(2, 2), (2, 2, 2), (2, 2, 0), (2, 2, 0, 1)])
def test_a_manifest_of_too_few_or_too_many_records_is_refused(sizes):
    """Complete means one record for each row of the catalog."""
    with pytest.raises(RuntimeError, match="for 5 catalog rows"):
        manifest(run(), b"run.json", parts(*sizes))


def test_counts_name_every_verdict():
    """A zero is said, not left to be guessed."""
    assert counts(["intact", "intact"]) == {"intact": 2, "tampered": 0, "error": 0}


@pytest.mark.parametrize("run_id", ["", ".", "-x", "a/b", "a b", "x" * 129])
def test_run_ids_that_cannot_be_object_names(run_id):
    """A run id stays within its folder."""
    with pytest.raises(UsageError):
        check_run_id(run_id)


def test_columns_of_a_newer_release_are_kept():
    """An older reader does not trip over what a newer writer added."""
    table = from_parquet(to_parquet([record()])).append_column("new", pa.array([1]))
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    assert from_parquet(sink.getvalue().to_pybytes())["new"].to_pylist() == [1]
