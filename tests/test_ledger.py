"""The ledger shows every change of what finished runs wrote, and says where it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fwm_audit import ledger, storage
from fwm_audit.commitment import commit, committed_at
from fwm_audit.errors import StorageError
from fwm_audit.key import MasterSecret, canonical, fingerprint, signed_values
from fwm_audit.records import manifest, run_path, to_parquet
from tests.test_records import record
from tests.test_records import run as make_run

MASTER, OTHER = MasterSecret(bytes(range(32))), MasterSecret(bytes(32))
TRUSTED = [MASTER.public_key]
BEGIN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def add(out, run_id, *, rows=3, complete=True, master=MASTER, **changes):
    """A run as the driver stores it, two rows in a part; its place in the ledger."""
    run = make_run(run_id=run_id, started_at=BEGIN, rows=rows, **changes)
    description = master.sign("run", run.values())
    storage.create(f"{out}/{run_path(run_id, 'run.json')}", description)
    parts = {}
    for shard in range(run.shards):
        records = [record(run_id=run_id, shard=shard, uri=f"s3://b/{row}") for row in run.rows_of(shard)]
        name, digest = run.part(shard), hashlib.sha256(description).hexdigest()
        parts[name] = to_parquet(records, name, digest, master.sign)
        storage.create(f"{out}/{name}", parts[name])
    if not complete:
        return None
    signed = master.sign("manifest", manifest(run, description, parts))
    storage.create(f"{out}/{run_path(run_id, 'manifest.json')}", signed)
    return ledger.append(str(out), run_id, run.started_at, signed, master.sign, [master.public_key])


def verified(out, trusted=TRUSTED, **options):
    return ledger.verify(str(out), trusted, **options)


def found(out, **options):
    return {finding.path for finding in verified(out, **options).findings}


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def anywhere(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


def test_what_was_written_verifies(anywhere):
    heads = [add(anywhere, name) for name in ("a", "b", "c")]
    assert [head.number for head in heads] == [1, 2, 3]
    seen = verified(anywhere, head=heads[1].sha256)
    assert (seen.runs, seen.parts, seen.rows, seen.findings, seen.incomplete) == (3, 6, 9, (), ())
    assert seen.head == heads[2]


def test_an_output_without_runs_verifies(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing yet")
    assert verified(tmp_path) == ledger.Verified(0, 0, 0, None, (), ())


def test_every_byte_counts(tmp_path):
    """All bytes of the small files and 1,000 of a part: each one, changed in any way, is found in its file."""
    add(tmp_path, "a", rows=1)
    draws = random.Random(0)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 4
    for path in files:
        whole = path.read_bytes()
        name = str(path.relative_to(tmp_path))
        positions = range(len(whole)) if path.suffix == ".json" else draws.sample(range(len(whole)), 1000)
        for position in positions:
            changed = bytearray(whole)
            changed[position] ^= draws.randrange(1, 256)
            path.write_bytes(changed)
            assert found(tmp_path) >= {name}, (position, changed[position])
        path.write_bytes(whole)
    assert not found(tmp_path)


def test_every_cut_and_every_removal_is_found(tmp_path):
    for name in ("a", "b"):
        add(tmp_path, name)
    head = verified(tmp_path).head.sha256
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        whole, name = path.read_bytes(), str(path.relative_to(tmp_path))
        for left in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\n"):
            path.write_bytes(left)
            assert name in found(tmp_path, head=head), (name, len(left))
        path.unlink()
        seen = found(tmp_path, head=head)
        assert name in seen or (name == "ledger/00000002.json" and seen >= {"ledger", "runs/b/manifest.json"})
        path.write_bytes(whole)
    assert not found(tmp_path, head=head)


def test_parts_runs_and_entries_cannot_change_places(tmp_path):
    for name in ("a", "b", "c"):
        add(tmp_path, name)

    def swapped(one, other):
        first, second = (tmp_path / one), (tmp_path / other)
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        seen = found(tmp_path)
        first.write_bytes(contents[0])
        second.write_bytes(contents[1])
        return seen >= {one, other}

    day = "audits/run_date=2026-03-01"
    assert swapped(f"{day}/a-000000.parquet", f"{day}/a-000001.parquet")
    assert swapped(f"{day}/a-000000.parquet", f"{day}/b-000000.parquet")
    assert swapped("runs/a/manifest.json", "runs/b/manifest.json")
    assert swapped("runs/a/run.json", "runs/b/run.json")
    assert swapped("ledger/00000001.json", "ledger/00000002.json")
    assert swapped("ledger/00000002.json", "ledger/00000003.json")
    assert not found(tmp_path)


def test_an_entry_of_another_ledger_does_not_stand_in_this_one(tmp_path):
    """Though it is signed, and has the same number."""
    for out in ("one", "other"):
        for name in ("a", "b", "c"):
            add(tmp_path / out, f"{out}-{name}")
    entry = "ledger/00000002.json"
    (tmp_path / "one" / entry).write_bytes((tmp_path / "other" / entry).read_bytes())
    problems = {finding.path: finding.problem for finding in verified(tmp_path / "one").findings}
    assert "follows another entry" in problems[entry]
    assert "follows another entry" in problems["ledger/00000003.json"]


def test_a_run_that_is_gone_altogether_is_missed(tmp_path):
    heads = [add(tmp_path, name) for name in ("a", "b", "c")]
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def without(run, number):
        for path, data in kept.items():
            path.write_bytes(data)
        for path in kept:
            if f"/{run}/" in str(path) or f"/{run}-" in str(path) or path.name == f"{number:08d}.json":
                path.unlink()

    without("b", 2)
    assert found(tmp_path) >= {"ledger/00000002.json"}
    without("c", 3)
    assert not found(tmp_path)  # nothing here is left to say so
    assert found(tmp_path, head=heads[2].sha256) == {"ledger"}


def test_what_was_added_is_found(tmp_path):
    add(tmp_path, "a")
    day = tmp_path / "audits/run_date=2026-03-01"
    part = (day / "a-000000.parquet").read_bytes()
    for name in ("a-000009.parquet", "x-000000.parquet", "notes.txt"):
        (day / name).write_bytes(part)
    (tmp_path / "runs/a/notes.txt").write_bytes(b"")
    (tmp_path / "ledger/notes.txt").write_bytes(b"")
    storage.create(f"{tmp_path}/runs/y/manifest.json", (tmp_path / "runs/a/manifest.json").read_bytes())
    storage.create(f"{tmp_path}/compacted/run_date=2026-03-01/audits.parquet", b"of no concern")
    assert found(tmp_path) == {
        "audits/run_date=2026-03-01/a-000009.parquet",
        "audits/run_date=2026-03-01/notes.txt",
        "audits/run_date=2026-03-01/x-000000.parquet",
        "ledger/notes.txt",
        "runs/a/notes.txt",
        "runs/y/manifest.json",
    }


def test_a_run_in_work_is_no_finding_and_nothing_vouches_for_it(tmp_path):
    add(tmp_path, "a")
    add(tmp_path, "b", complete=False)
    seen = verified(tmp_path)
    assert (seen.findings, seen.incomplete, seen.runs) == ((), ("b",), 1)
    part = tmp_path / "audits/run_date=2026-03-01/b-000000.parquet"
    for other in (b"", to_parquet([record(run_id="b")]), (part.parent / "b-000001.parquet").read_bytes()):
        part.write_bytes(other)
        assert found(tmp_path) == {"audits/run_date=2026-03-01/b-000000.parquet"}
    add(tmp_path, "c", complete=False, master=OTHER)
    assert found(tmp_path) >= {"runs/c/run.json", "audits/run_date=2026-03-01/c-000000.parquet"}


def test_another_master_secret_signs_nothing_for_this_one(tmp_path):
    """After a rotation both are trusted, and the chain goes on."""
    add(tmp_path, "a")
    add(tmp_path, "b", master=OTHER)
    add(tmp_path, "c", master=OTHER)
    assert found(tmp_path) >= {"ledger/00000002.json", "ledger/00000003.json", "runs/b/manifest.json"}
    assert not verified(tmp_path, [*TRUSTED, OTHER.public_key]).findings


def test_what_else_was_signed_stands_for_no_entry_and_no_manifest(tmp_path):
    """Neither crashes the proof: each is found."""
    add(tmp_path, "a")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    others = [
        *files.values(),
        MASTER.sign("commitment", {}),
        MASTER.sign("manifest", {}),
        MASTER.sign("ledger", {}),
        b"{}",
        b"[[[[",
    ]
    for path, data in files.items():
        for other in others:
            if other != data:
                path.write_bytes(other)
                assert str(path.relative_to(tmp_path)) in found(tmp_path)
        path.write_bytes(data)


def test_a_ledger_with_foreign_entries_still_takes_new_ones(tmp_path):
    """What others put there stops no audit, and is found."""
    add(tmp_path, "a")
    foreign = (b"", b"[]", b'{"recorded_at": 7, "run_id": "b"}', OTHER.sign("ledger", {"number": 5}))
    for number, data in enumerate(foreign, 2):
        (tmp_path / f"ledger/{number:08}.json").write_bytes(data)
    (tmp_path / "ledger/00000006.json").mkdir()
    (tmp_path / "ledger/99999999.json").write_bytes(b"{}")
    assert add(tmp_path, "b").number == 7
    assert add(tmp_path, "c").number == 8
    problems = {finding.path: finding.problem for finding in verified(tmp_path).findings}
    assert problems["ledger/00000009.json"] == "is missing, and 99999989 after it"
    assert problems.keys() >= {f"ledger/{number:08}.json" for number in (2, 3, 4, 5, 6, 99999999)}
    assert not problems.keys() & {"ledger/00000007.json", "ledger/00000008.json"}
    assert not {path for path in problems if "runs/" in path}


def test_a_ledger_full_of_foreign_files_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_TRIES", 3)
    add(tmp_path, "a")
    for number in (2, 3, 4):
        (tmp_path / f"ledger/{number:08}.json").mkdir()
    with pytest.raises(StorageError, match="are taken"):
        add(tmp_path, "b")


def test_an_entry_that_nobody_signed_does_not_stand_for_a_run(tmp_path):
    """The run is entered behind it."""
    add(tmp_path, "a")
    run = make_run(run_id="b", started_at=BEGIN, rows=1)
    described = MASTER.sign("run", run.values())
    part = to_parquet([record(run_id="b")])
    data = MASTER.sign("manifest", manifest(run, described, {run.part(0): part}))
    forged = {
        "number": 2,
        "run_id": "b",
        "manifest_sha256": hashlib.sha256(data).hexdigest(),
        "recorded_at": BEGIN.isoformat(),
    }
    (tmp_path / "ledger/00000002.json").write_text(json.dumps(forged))
    assert ledger.append(str(tmp_path), "b", BEGIN, data, MASTER.sign, TRUSTED).number == 3


@pytest.mark.parametrize("size", [1 << 17, 1 << 30])
def test_what_is_larger_than_anything_written_is_not_read(tmp_path, size):
    add(tmp_path, "a")
    for name in ("ledger/00000002.json", "runs/a/run.json"):
        path = tmp_path / name
        with path.open("ab") as file:
            file.truncate(size)  # a hole takes no room
    add(tmp_path, "b")
    assert found(tmp_path) >= {"ledger/00000002.json", "runs/a/run.json"}


def test_whoever_enters_a_run_twice_or_at_once_makes_one_ledger(tmp_path):
    first = add(tmp_path, "a")
    data = (tmp_path / "runs/a/manifest.json").read_bytes()
    assert ledger.append(str(tmp_path), "a", BEGIN, data, MASTER.sign, TRUSTED) == first
    threads = [threading.Thread(target=add, args=(tmp_path, f"r{number}")) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = verified(tmp_path)
    assert (seen.runs, seen.head.number, seen.findings) == (9, 9, ())


def test_a_signed_text_is_exactly_what_was_signed():
    values = {"a": 1, "b": ["x", None], "c": {"d": 0.5}}
    data = MASTER.sign("x", values)
    assert signed_values(data, "x", TRUSTED) == values
    with pytest.raises(ValueError, match="not trusted"):
        signed_values(data, "x", [OTHER.public_key])
    with pytest.raises(ValueError, match="as a x, not as a y"):
        signed_values(data, "y", TRUSTED)
    signature = json.loads(data)["signature"]
    for changed in (
        json.dumps(json.loads(data)).encode(),  # the same values in another form
        data.replace(signature.encode(), signature.upper().encode()),
        canonical(json.loads(data) | {"a": 2}),
        canonical(json.loads(OTHER.sign("x", values)) | {"signer": MASTER.public_key}),
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
    ):
        with pytest.raises(ValueError, match=r"signed"):
            signed_values(changed, "x", TRUSTED)


def test_a_commitment_is_made_once_and_speaks_for_one_key(tmp_path):
    sealed = MASTER.seal(b"triggers", {"model_id": "m", "key_id": "0" * 16, "checkpoint_sha256": "1" * 64})
    before = datetime.now(UTC)
    commit(str(tmp_path), "m", "0" * 16, sealed, MASTER)
    at = committed_at(str(tmp_path), "m", "0" * 16, fingerprint(sealed), TRUSTED)
    assert before <= at <= datetime.now(UTC)
    commit(str(tmp_path), "m", "0" * 16, sealed, MASTER)
    assert committed_at(str(tmp_path), "m", "0" * 16, fingerprint(sealed), TRUSTED) == at
    (path,) = (tmp_path / "m").iterdir()
    with pytest.raises(ValueError, match="not trusted"):
        committed_at(str(tmp_path), "m", "0" * 16, fingerprint(sealed), [OTHER.public_key])
    for name, value in (("model_id", "n"), ("key_id", "2" * 16), ("fingerprint", "3" * 64)):
        path.write_bytes(
            MASTER.sign("commitment", {**signed_values(path.read_bytes(), "commitment", TRUSTED), name: value})
        )
        with pytest.raises(ValueError, match="another key"):
            committed_at(str(tmp_path), "m", "0" * 16, fingerprint(sealed), TRUSTED)
        path.unlink()
        commit(str(tmp_path), "m", "0" * 16, sealed, MASTER)


def test_keys_from_before_the_run_are_told_from_later_ones(tmp_path):
    keys, out = tmp_path / "keys", tmp_path / "out"
    sealed = MASTER.seal(b"triggers", {"model_id": "team/m", "key_id": "0" * 16})
    seen = {"team/m/" + "0" * 16: fingerprint(sealed), "gone/" + "1" * 16: None}
    run = {"key_fingerprints": seen}
    add(out, "a", **run)
    assert found(out, keys=str(keys)) == {"runs/a/run.json"}  # no commitment at all
    commit(str(keys), "team/m", "0" * 16, sealed, MASTER)
    (finding,) = verified(out, keys=str(keys)).findings
    assert "was committed to" in finding.problem
    (path,) = (keys / "team/m").iterdir()
    values = signed_values(path.read_bytes(), "commitment", TRUSTED)
    path.write_bytes(MASTER.sign("commitment", values | {"committed_at": (BEGIN - timedelta(days=1)).isoformat()}))
    assert not found(out, keys=str(keys))


def test_the_digest_of_the_head_is_that_of_its_file(tmp_path):
    head = add(tmp_path, "a")
    assert head.sha256 == hashlib.sha256(Path(tmp_path, "ledger/00000001.json").read_bytes()).hexdigest()
    assert dataclasses.asdict(head) == {"number": 1, "sha256": head.sha256}
