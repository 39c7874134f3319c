"""What the stored runs say, and who vouches for it: every part as one table, with whatever is wrong beside it.

With the public key of the master secret, only what its ledger vouches for is taken, and everything else is named.
Without one, everything is taken as it lies there, and whoever shows it has to say so.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from fwm_audit import ledger, storage
from fwm_audit.errors import FwmError, UsageError
from fwm_audit.records import SCHEMA, Run, from_parquet, run_path

_PART: Final = re.compile(r"audits/.+\.parquet")
_RUN: Final = re.compile(r"runs/([^/]+)/run\.json")
_RUN_FILES: Final = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("run_id", pa.string()),
        pa.field("rows", pa.int64()),
        pa.field("started_at", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A run without a manifest: how many of its catalog's rows it has stored."""

    run_id: str
    stored: int
    rows: int


@dataclass(frozen=True, slots=True)
class History:
    """All that runs have stored.

    Attributes:
        records: Every record, with `records.SCHEMA`.
        run_files: kind (`run` or `manifest`), run_id, rows and started_at of every run.json and manifest.json.
        verified: Whether signatures were checked, so that `records` holds what verified and nothing else.
        findings: What is not as it was written; nothing of it is among the records.
        unfinished: Runs without a manifest.
        manifests: SHA-256 of the manifest of each complete run.
    """

    records: pa.Table
    run_files: pa.Table
    verified: bool
    findings: tuple[ledger.Finding, ...]
    unfinished: tuple[Unfinished, ...]
    manifests: Mapping[str, str]


def read(out: str, public_keys: Collection[str] | None, *, head: str | None = None, keys: str | None = None) -> History:
    """All that runs have stored below an output.

    Args:
        out: The audits' `--out`.
        public_keys: Trusted signers; None takes what lies there, unverified.
        head: As for `ledger.verify`.
        keys: As for `ledger.verify`.

    Raises:
        StorageError: The store cannot be read.
        UsageError: No run was ever begun there.
    """
    kept = ledger.Kept()
    if public_keys is None:
        findings = _as_it_lies(out, kept)
    else:
        findings = ledger.verify(out, public_keys, head=head, keys=keys, kept=kept).findings
    tables = []
    for path, table in sorted(kept.tables.items()):
        try:
            tables.append(_conform(table))
        except (pa.ArrowException, ValueError):
            findings = (*findings, ledger.Finding(path, "does not hold audit records"))
    if not tables and not kept.runs and not findings:
        raise UsageError(f"no run has begun under {out}: name the --out of the audits")
    records = pa.concat_tables([SCHEMA.empty_table(), *tables]).combine_chunks()
    return History(
        records, _run_files(kept), public_keys is not None, findings, _unfinished(kept, records), kept.manifests
    )


def _as_it_lies(out: str, kept: ledger.Kept) -> tuple[ledger.Finding, ...]:
    prefix = storage.absolute(out).rstrip("/") + "/"
    names = {item.uri.removeprefix(prefix) for item in storage.listing(prefix.rstrip("/"))}
    findings: list[ledger.Finding] = []

    def look(name: str) -> None:
        try:
            if _PART.fullmatch(name):
                kept.tables[name] = from_parquet(storage.read(prefix + name))
            elif (match := _RUN.fullmatch(name)) is not None:
                kept.runs[match[1]] = Run.from_json(storage.read(prefix + name))
                if (manifest := run_path(match[1], "manifest.json")) in names:
                    kept.manifests[match[1]] = hashlib.sha256(storage.read(prefix + manifest)).hexdigest()
        except (FwmError, UsageError, pa.ArrowException, OSError) as error:
            findings.append(ledger.Finding(name, f"cannot be read ({type(error).__name__})"))

    with ThreadPoolExecutor(storage.IO_THREADS) as pool:
        list(pool.map(look, sorted(names)))
    return tuple(sorted(findings, key=lambda finding: finding.path))


def _conform(table: pa.Table) -> pa.Table:
    """The table with today's columns: an older release wrote fewer, a newer one may have written more."""
    columns: Sequence[pa.ChunkedArray | pa.Array] = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in SCHEMA
    ]
    conforming = pa.table(columns, schema=SCHEMA)
    conforming.validate(full=True)
    if any(column.null_count for column, field in zip(columns, SCHEMA, strict=True) if not field.nullable):
        raise ValueError("a required value is missing")
    return conforming


def _run_files(kept: ledger.Kept) -> pa.Table:
    rows = []
    for run_id, run in sorted(kept.runs.items()):
        row = {"run_id": run_id, "rows": run.rows, "started_at": run.started_at.isoformat()}
        rows += [row | {"kind": kind} for kind in (["run", "manifest"] if run_id in kept.manifests else ["run"])]
    return pa.Table.from_pylist(rows, _RUN_FILES)


def _unfinished(kept: ledger.Kept, records: pa.Table) -> tuple[Unfinished, ...]:
    stored = {entry["values"]: entry["counts"] for entry in records["run_id"].value_counts().to_pylist()}
    return tuple(
        Unfinished(run_id, stored.get(run_id, 0), run.rows)
        for run_id, run in sorted(kept.runs.items())
        if run_id not in kept.manifests
    )
