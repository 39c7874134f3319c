"""Complete runs as they are stored: read back, and many small parts -> one file for each day, beside them.

A run writes a part for every 64 models, which queries over a year feel. What is compacted are copies of the
parts of complete runs, compared with their manifests on the way; the parts stay, as the evidence that they are.

    <out>/compacted/run_date=YYYY-MM-DD/audits.parquet       create-only
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime

import pyarrow as pa

from fwm_audit import storage
from fwm_audit.errors import UsageError
from fwm_audit.key import signed_values
from fwm_audit.records import MANIFEST, PART_NAME, Run, from_parquet, run_path, table_to_parquet


@dataclass(frozen=True, slots=True)
class Day:
    """What became of one day: the rows and parts of the file written, none where it was there before.

    `incomplete` is a run that was not finished, on whose account there is no file.
    """

    day: date
    rows: int = 0
    parts: int = 0
    incomplete: str | None = None


def compact(out: str, until: date | None = None, public_keys: Collection[str] | None = None) -> Iterator[Day]:
    """Write the file of each day that has none yet, the oldest first.

    Args:
        out: URI prefix that holds runs/ and audits/.
        until: The last day; None is yesterday. Today's runs are still to come.
        public_keys: As for `read_run`.

    Raises:
        StorageError: The store cannot be read or written.
        UsageError: A part is not what its run's manifest says, or the last day is not over.
    """
    today = datetime.now(UTC).date()
    out = storage.absolute(out)
    if until is not None and until >= today:
        raise UsageError(f"{until} is not over: runs may still be added to it")
    runs: dict[date, set[str]] = {}
    for item in storage.listing(storage.join(out, "audits")):
        if (name := PART_NAME.fullmatch(item.uri.removeprefix(out.rstrip("/") + "/"))) is not None:
            runs.setdefault(date.fromisoformat(name["day"]), set()).add(name["run_id"])
    # One without a part yet, too: what it is still to write belongs to the day on which it began.
    known = {item.uri for item in storage.listing(storage.join(out, "runs"))}
    for uri in known:
        if uri.endswith("/run.json") and uri.removesuffix("run.json") + "manifest.json" not in known:
            with contextlib.suppress(UsageError):  # another release's, which this one cannot resume
                run = Run.from_json(storage.read(uri))
                runs.setdefault(run.started_at.astimezone(UTC).date(), set()).add(run.run_id)
    for day in sorted(runs):
        if day < today and (until is None or day <= until):
            yield _compact_day(out, day, sorted(runs[day]), public_keys)


def _compact_day(out: str, day: date, runs: list[str], public_keys: Collection[str] | None) -> Day:
    uri = storage.join(out, "compacted", f"run_date={day}", "audits.parquet")
    if storage.exists(uri):
        return Day(day)
    for run_id in runs:
        if not storage.exists(storage.join(out, run_path(run_id, "manifest.json"))):
            return Day(day, incomplete=run_id)
    tables = [table for run_id in runs for table in read_run(out, run_id, public_keys)]
    table = pa.concat_tables(tables, promote_options="default")
    storage.create(uri, table_to_parquet(table))
    return Day(day, table.num_rows, len(tables))


def read_run(
    out: str, run_id: str, public_keys: Collection[str] | None = None, described: Run | None = None
) -> list[pa.Table]:
    """The tables of a complete run's parts, every one of them as its manifest says.

    Args:
        out: URI prefix that holds runs/ and audits/.
        run_id: The run.
        public_keys: Who may have signed the manifest; None takes it as it is.
        described: What its run.json was when the caller read it; None takes what it is.

    Raises:
        StorageError: The manifest or a part cannot be read.
        UsageError: The manifest is not signed, or is another run's, or a part is not what it says.
    """
    data = storage.read(storage.join(out, run_path(run_id, "manifest.json")))
    try:
        manifest = signed_values(data, MANIFEST, public_keys) if public_keys is not None else json.loads(data)
        description = storage.read(storage.join(out, run_path(run_id, "run.json")))
        if (manifest["run_id"], manifest["run_sha256"]) != (run_id, hashlib.sha256(description).hexdigest()):
            raise ValueError("is another run's")
        if described is not None and Run.from_json(description) != described:
            raise ValueError("is of another run.json than a moment ago")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the manifest of run {run_id} {error}: find out who wrote it (python -m jobs.report --verify)"
        ) from None

    def checked(file: dict[str, str]) -> pa.Table:
        data = storage.read(storage.join(out, file["path"]))
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise UsageError(f"{file['path']} is not what run {run_id} wrote: find out who changed it")
        return from_parquet(data)

    with ThreadPoolExecutor(storage.IO_THREADS) as pool:
        return list(pool.map(checked, manifest["files"]))
