"""Compaction: the rows of a day's complete runs, all of them and no others, in one file beside the parts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import duckdb
import pytest

from fwm_audit import storage
from fwm_audit.compaction import Day, compact
from fwm_audit.errors import UsageError
from fwm_audit.key import MasterSecret
from fwm_audit.records import from_parquet, manifest, run_path, table_to_parquet, to_parquet
from tests.test_records import record
from tests.test_records import run as make_run

MASTER = MasterSecret(bytes(range(32)))
OTHER = MasterSecret(bytes(32))
DAY = datetime(2026, 3, 1, 12, tzinfo=UTC)


def add(out, run_id, started, *, rows=5, complete=True, by=MASTER):
    """A finished run as the driver stores it, 2 rows in a part."""
    run = make_run(run_id=run_id, started_at=started, rows=rows)
    parts = {}
    for shard in range(run.shards):
        records = [
            record(run_id=run_id, run_started_at=started, shard=shard, uri=f"s3://b/{row}")
            for row in run.rows_of(shard)
        ]
        parts[run.part(shard)] = to_parquet(records)
        storage.create(f"{out}/{run.part(shard)}", parts[run.part(shard)])
    if complete:
        described = by.sign("run", run.values())
        storage.create(f"{out}/{run_path(run_id, 'run.json')}", described)
        signed = by.sign("manifest", manifest(run, described, parts))
        storage.create(f"{out}/{run_path(run_id, 'manifest.json')}", signed)
    return run


def day_file(out, day="2026-03-01"):
    return f"{out}/compacted/run_date={day}/audits.parquet"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def out(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


def test_a_day_is_the_rows_of_its_runs_in_their_order(out):
    add(out, "a-1", DAY)
    add(out, "b", DAY + timedelta(hours=6), rows=3)
    add(out, "c", DAY + timedelta(days=1), rows=1)
    before = {item.uri: storage.read(item.uri) for item in storage.listing(out)}
    assert list(compact(out)) == [Day(DAY.date(), 8, 5), Day(DAY.date() + timedelta(days=1), 1, 1)]
    table = from_parquet(storage.read(day_file(out)))
    seen = [(row["run_id"], row["uri"]) for row in table.to_pylist()]
    assert seen == [("a-1", f"s3://b/{n}") for n in range(5)] + [("b", f"s3://b/{n}") for n in range(3)]
    # The parts are untouched, and a repetition writes nothing.
    assert {uri: storage.read(uri) for uri in before} == before
    compacted = storage.read(day_file(out))
    assert list(compact(out)) == [Day(DAY.date()), Day(DAY.date() + timedelta(days=1))]
    assert storage.read(day_file(out)) == compacted


def test_a_day_with_an_incomplete_run_is_left_alone(tmp_path):
    add(tmp_path, "done", DAY)
    add(tmp_path, "cut", DAY, complete=False)
    assert list(compact(str(tmp_path))) == [Day(DAY.date(), incomplete="cut")]
    assert not storage.exists(day_file(tmp_path))


@pytest.mark.parametrize("others", [0, 1])
def test_a_day_with_a_run_that_has_no_part_yet_is_left_alone(out, others):
    """What it writes after midnight would never get into a file that is there."""
    for number in range(others):
        add(out, f"done-{number}", DAY)
    add(out, "next", DAY + timedelta(days=1), rows=1)
    late = make_run(run_id="late", started_at=DAY + timedelta(hours=11, minutes=59), rows=5)
    storage.create(f"{out}/{run_path('late', 'run.json')}", MASTER.sign("run", late.values()))
    assert list(compact(out)) == [
        Day(DAY.date(), incomplete="late"),
        Day(DAY.date() + timedelta(days=1), 1, 1),
    ]
    assert not storage.exists(day_file(out))


def test_a_run_of_another_release_that_was_never_finished_stops_no_day(tmp_path):
    add(tmp_path, "done", DAY)
    storage.create(f"{tmp_path}/{run_path('old', 'run.json')}", b'{"run_id": "old"}')
    assert list(compact(str(tmp_path))) == [Day(DAY.date(), 5, 3)]


def test_a_part_that_was_changed_is_told(tmp_path):
    run = add(tmp_path, "a", DAY)
    part = f"{tmp_path}/{run.part(1)}"
    rows = from_parquet(storage.read(part)).to_pylist()
    storage.replace(part, to_parquet([record(uri=row["uri"], matches=1) for row in rows]))
    with pytest.raises(UsageError, match=r"000001\.parquet is not what run a wrote"):
        list(compact(str(tmp_path)))
    assert not storage.exists(day_file(tmp_path))


def test_a_run_that_another_secret_signed_is_told(tmp_path):
    add(tmp_path, "a", DAY)
    assert [day.rows for day in compact(str(tmp_path), None, [MASTER.public_key])] == [5]
    add(tmp_path, "b", DAY + timedelta(days=1))
    with pytest.raises(UsageError, match="not trusted"):
        list(compact(str(tmp_path), None, [OTHER.public_key]))


def test_after_a_rotation_of_the_master_secret_runs_of_either_count(tmp_path):
    add(tmp_path, "a", DAY)
    add(tmp_path, "b", DAY, rows=1, by=OTHER)
    keys = [MASTER.public_key, OTHER.public_key]
    for key in keys:
        with pytest.raises(UsageError, match="not trusted"):
            list(compact(str(tmp_path), None, [key]))
    command = [sys.executable, "-m", "jobs.compact", "--out", str(tmp_path)]
    for key in keys:
        command += ["--public-key", key.upper()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)["rows"]) == (0, 6), done.stderr


def test_today_is_not_over(tmp_path):
    add(tmp_path, "a", datetime.now(UTC))
    assert list(compact(str(tmp_path))) == []
    with pytest.raises(UsageError, match="not over"):
        list(compact(str(tmp_path), datetime.now(UTC).date()))


def test_days_until_a_date(tmp_path):
    for days in range(3):
        add(tmp_path, f"r{days}", DAY + timedelta(days=days), rows=1)
    assert [day.day for day in compact(str(tmp_path), DAY.date() + timedelta(days=1))] == [
        DAY.date(),
        DAY.date() + timedelta(days=1),
    ]


def test_parts_of_an_older_schema_get_its_columns(tmp_path):
    """Columns are only ever added: a file of two releases has them all."""
    run = add(tmp_path, "new", DAY, rows=1)
    table = from_parquet(storage.read(f"{tmp_path}/{run.part(0)}")).drop_columns(["carried_from"])
    old = dataclasses.replace(run, run_id="old")
    parts = {old.part(0): table_to_parquet(table)}
    storage.create(f"{tmp_path}/{old.part(0)}", parts[old.part(0)])
    described = MASTER.sign("run", old.values())
    storage.create(f"{tmp_path}/{run_path('old', 'run.json')}", described)
    digest = manifest(old, described, {run.part(0): storage.read(f"{tmp_path}/{run.part(0)}")})
    digest["files"] = [{"path": old.part(0), "rows": 1, "sha256": hashlib.sha256(parts[old.part(0)]).hexdigest()}]
    storage.create(f"{tmp_path}/{run_path('old', 'manifest.json')}", json.dumps(digest).encode())
    assert list(compact(str(tmp_path))) == [Day(DAY.date(), 2, 2)]
    assert "carried_from" in from_parquet(storage.read(day_file(tmp_path))).column_names


def test_the_command_and_what_duckdb_reads(tmp_path):
    add(tmp_path, "a", DAY)
    add(tmp_path, "cut", DAY + timedelta(days=1), complete=False)
    command = [sys.executable, "-m", "jobs.compact", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    closing = json.loads(done.stdout.splitlines()[-1])
    assert closing == {"days": 1, "rows": 5, "parts": 3, "there": 0, "incomplete": 1}
    assert "run cut is incomplete" in done.stderr
    query = f"SELECT count(*) FROM read_parquet('{tmp_path}/compacted/**/*.parquet', hive_partitioning = true)"
    with duckdb.connect() as connection:
        assert connection.execute(f"{query} WHERE run_date = DATE '2026-03-01'").fetchone() == (5,)
