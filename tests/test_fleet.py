"""The fleet driver on real Ray: every row gets one record, whatever happens to workers and drivers."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet
import pytest
import ray
from ray.exceptions import OutOfMemoryError

from fwm_audit import dispatcher, fleet, ledger, storage
from fwm_audit.catalog import CatalogEntry, write_catalog
from fwm_audit.dispatcher import Dispatcher, Task
from fwm_audit.errors import CheckpointError, ErrorCode, FwmError, StorageError, UsageError
from fwm_audit.fleet import AuditWorker, IncompleteError
from fwm_audit.key import MasterSecret, signed_values
from fwm_audit.metrics import AuditMeter
from fwm_audit.plan import AuditJob, plan_audit
from fwm_audit.records import (
    AuditRecord,
    AuditSettings,
    carried,
    error_record,
    from_parquet,
    make_record,
    record_of,
    to_parquet,
)
from fwm_audit.verdict import Displacement, Tolerance, Verdict
from jobs.audit import exit_code


def run_audit(job, **options):
    return fleet.run_audit(plan_audit(job), **options)


pytestmark = pytest.mark.ray
KEY_ID = "0123456789abcdef"


@pytest.fixture(scope="module", autouse=True)
def _ray(tmp_path_factory):
    # Workers cannot import test modules: the classes here travel as code.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    secret = tmp_path_factory.mktemp("secret") / "master.key"
    MasterSecret.generate_file(secret)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FWM_MASTER_KEY_FILE", str(secret))
        ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


class Worker(AuditWorker):
    """The actor with models that do to it what the first part of their uri says.

    Every audit leaves a line in the folder that the job's `keys` names, so that tests can count them.
    """

    def start(self):
        pass

    def audit(self, entry, *, shard, attempt, ahead=None, before=None):
        act = urlsplit(entry.uri).netloc
        with (Path(self._settings.keys) / "calls").open("a") as calls:
            calls.write(f"{act} {entry.row} {os.getpid()}\n")
        match act:
            case "die":
                os._exit(1)
            case "die-once" if attempt == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(600)
            case "slow":
                time.sleep(0.2)
            case "raise":
                raise ZeroDivisionError
            case "attack":
                error = CheckpointError(ErrorCode.CHECKPOINT_UNSAFE, "a payload")
                return error_record(self._settings, entry, error, shard=shard, attempt=attempt)
            case "refuse":
                raise CheckpointError(ErrorCode.CHECKPOINT_CORRUPT, "cut short")
        return record(self._settings, entry, shard, attempt=attempt, worker=str(os.getpid()))


class SlowStart(Worker):
    def start(self):
        time.sleep(2)


class NoSecret(Worker):
    def start(self):
        raise UsageError("no master secret")


class NeverStarts(Worker):
    def start(self):
        os._exit(1)


class Troubled(Worker):
    """Does at its n-th start, or when it is asked to certify, what the n-th line of a file says, and then as ever.

    An audit of a slow model takes until no line is left.
    """

    def start(self):
        self.suffer()

    def certify(self, public_key):
        self.suffer()
        return super().certify(public_key)

    def suffer(self):
        folder = Path(self._settings.keys)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = (folder / "troubles").read_text().splitlines()
            (folder / "troubles").write_text("\n".join(lines[1:]))
        match lines[:1]:
            case ["no secret"]:
                raise UsageError("no master secret")
            case ["dies"]:
                os._exit(1)
            case ["hangs"]:
                time.sleep(600)

    def audit(self, entry, **how):
        if "slow" in entry.uri:
            until = time.monotonic() + 100
            while (Path(self._settings.keys) / "troubles").read_text() and time.monotonic() < until:
                time.sleep(0.1)
        return super().audit(entry, **how)


def record(settings, entry, shard, *, attempt=1, worker=""):
    facts = {"verdict": Verdict.INTACT, "displacement": Displacement.NONE, "triggers": 8, "matches": 8}
    return make_record(settings, entry, shard=shard, attempt=attempt, worker=worker, **facts)


class Fleet:
    """A catalog of models that behave as told, and an output next to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "keys").mkdir()

    def job(self, acts, *, sizes=(), **options):
        entries = [
            CatalogEntry(
                row,
                f"model-{row}",
                f"s3://{act}/{row}",
                "timm:any",
                "" if act == "no-key" else KEY_ID,
                size_bytes=sizes[row] if sizes else None,
            )
            for row, act in enumerate(acts)
        ]
        (self.folder / "catalog.parquet").write_bytes(write_catalog(entries, "catalog.parquet"))
        values = {"run_id": "run", "actors": 2, "timeout_s": 30.0, "shard_size": 4} | options
        return AuditJob(
            catalog=str(self.folder / "catalog.parquet"),
            keys=str(self.folder / "keys"),
            out=str(self.folder / "out"),
            **values,
        )

    def troubles(self, *lines):
        """What becomes of the first workers of the class `Troubled`."""
        (self.folder / "keys" / "troubles").write_text("\n".join(lines))

    @property
    def calls(self):
        path = self.folder / "keys" / "calls"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def parts(self):
        return sorted((self.folder / "out" / "audits").rglob("*.parquet"))

    def rows(self):
        return [row for part in self.parts for row in pyarrow.parquet.ParquetFile(part).read().to_pylist()]

    def files(self):
        """Every stored file with what must not change about it."""
        found = (path for path in (self.folder / "out").rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def _interruptible():
    """A shell starts background jobs, a suite among them, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def models(tmp_path):
    return Fleet(tmp_path)


# ----------------------------------------------------------------------------------------------- dispatch and workers


def test_every_row_has_one_record_whatever_its_model_does(models):
    """Workers that die, hang or raise cost nobody but their own model a record, and no model its record."""
    acts = ["ok", "die", "ok", "no-key", "die-once", "hang", "raise", "refuse"] + ["ok"] * 9 + ["die", "no-key"]
    seen = []
    summary = run_audit(models.job(acts, timeout_s=2.0), progress=lambda *now: seen.append(now[:2]), worker=Worker)
    rows = models.rows()
    assert [row["uri"] for row in rows] == [f"s3://{act}/{number}" for number, act in enumerate(acts)]
    assert [row["shard"] for row in rows] == [number // 4 for number in range(len(acts))]
    codes = {
        "die": "worker_died",
        "hang": "timeout",
        "raise": "internal",
        "refuse": "checkpoint_corrupt",
        "no-key": "key_missing",
    }
    assert [row["error_code"] for row in rows] == [codes.get(act) for act in acts]
    assert [row["attempt"] for row in rows] == [2 if act in {"die", "die-once"} else 1 for act in acts]
    assert summary.verdicts == {"intact": 12, "tampered": 0, "error": 7}
    assert summary.errors == {
        "checkpoint_corrupt": 1,
        "internal": 1,
        "key_missing": 2,
        "timeout": 1,
        "worker_died": 2,
    }
    assert seen == [(done, len(acts)) for done in range(1, len(acts) + 1)]
    # A second try is for dead workers only; a model without a key needs no worker.
    tries = Counter(act for act, *_ in models.calls)
    assert tries == {"ok": 11, "die": 4, "die-once": 2, "hang": 1, "raise": 1, "refuse": 1}


def test_the_deadline_counts_from_the_start_of_the_model(models):
    """A worker that needs longer than the deadline to get ready costs no model its audit."""
    assert run_audit(models.job(["ok"], timeout_s=1.0), worker=SlowStart).verdicts["intact"] == 1


def test_more_workers_than_fit_are_no_error(models):
    """On a cluster with no room yet, work goes to whoever is ready."""
    assert run_audit(models.job(["slow"] * 12, actors=6), worker=Worker).verdicts["intact"] == 12


def test_what_is_meant_for_a_busy_worker_is_taken_by_an_idle_one(models):
    """A model that hangs keeps nobody waiting but itself."""
    began = time.monotonic()
    took = []
    job = models.job(["hang"] + ["ok"] * 5, timeout_s=10.0)
    run_audit(job, progress=lambda *_: took.append(time.monotonic() - began), worker=Worker)
    assert [row["error_code"] for row in models.rows()] == ["timeout"] + [None] * 5
    assert took[4] < took[5] - 3  # the five others were done long before


def test_large_checkpoints_are_audited_first_and_every_row_once(models):
    """The order of work is that of the parts; it does not change who is audited."""
    sizes = [1, 5, None, 7, 3, 9, 2]
    job = models.job(["ok"] * len(sizes), actors=1, sizes=sizes)
    assert run_audit(job, worker=Worker).verdicts["intact"] == len(sizes)
    expected = ["5", "1", "3", "4", "6", "0", "2"]  # by powers of two
    assert [row for _, row, _ in models.calls] == expected
    assert [row["uri"].rpartition("/")[2] for row in models.rows()] == expected


def test_a_worker_gets_models_of_the_key_that_it_holds(models):
    """Opening a key costs more than a small audit: neighbours with the same key stay together."""
    plan = plan_audit(models.job(["ok"] * 6))
    keys = ["a", "b", "a", "b", "a", "c"]
    tasks = [
        Task(dataclasses.replace(e, model_id="m", key_id=key), 0) for e, key in zip(plan.entries, keys, strict=True)
    ]
    one = Dispatcher(None, settings_of(plan), actors=1, timeout_s=1)
    one._todo.extend(tasks[1:])
    picked = [task := one._pick(tasks[0])]
    while task := one._pick(task):
        picked.append(task)
    assert [task.entry.key_id for task in picked] == ["a", "a", "b", "b", "c"]


def test_a_common_key_leaves_no_shard_behind(models):
    """The first shard in work is completed before those after the next one are begun."""
    plan = plan_audit(models.job(["ok"] * 60))
    keys = ["rare" if row == 1 else "common" for row in range(60)]
    tasks = [
        Task(dataclasses.replace(e, model_id="m", key_id=key), e.row // 4)
        for e, key in zip(plan.entries, keys, strict=True)
    ]
    one = Dispatcher(None, settings_of(plan), actors=1, timeout_s=1)
    one._todo.extend(tasks[1:])
    picked = [tasks[0]]
    while task := one._pick(picked[-1]):
        picked.append(task)
    assert len(picked) == 60
    assert [task.entry.key_id for task in picked].index("rare") == 7
    for number, task in enumerate(picked):
        assert task.shard <= min(left.shard for left in picked[number:]) + 1


def test_workers_are_replaced_after_so_many_models(models, monkeypatch):
    """Whatever a process leaks is bounded by the models it serves."""
    monkeypatch.setattr(dispatcher, "MODELS_PER_ACTOR", 3)
    run_audit(models.job(["ok"] * 10), worker=Worker)
    served = Counter(pid for _, _, pid in models.calls)
    assert max(served.values()) <= 3
    assert served.total() == 10


class Limited(AuditWorker):
    """Tells to what the system holds it once it has audited something."""

    def limits(self, entry):
        self.start()
        record = self.audit(entry, shard=0, attempt=1)
        kinds = (resource.RLIMIT_DATA, resource.RLIMIT_CPU, resource.RLIMIT_CORE)
        return record.error_code, [resource.getrlimit(kind)[0] for kind in kinds]


def test_a_worker_is_held_to_its_limits(models):
    settings = dataclasses.replace(settings_of(plan_audit(models.job(["ok"]))), device="cpu", timeout_s=100.0)
    entry = CatalogEntry(0, "m", "/nowhere", "timm:any", KEY_ID)
    for given, least in ((1 << 30, 1 << 30), (None, 1 << 30)):
        actor = fleet._spawner(Limited, dataclasses.replace(settings, memory_bytes=given), 0.0)()
        code, (data, seconds, core) = ray.get(actor.limits.remote(entry))
        ray.kill(actor)
        assert code == ErrorCode.KEY_MISSING
        assert least < data < 64 << 30  # beside what it held at its start
        assert 100 < seconds < 300
        assert core == 0


def test_a_worker_that_met_an_attack_is_replaced(models):
    """The model after it is in other hands; after a merely damaged file it is in the same."""
    run_audit(models.job(["ok", "refuse", "ok", "attack", "ok"], actors=1), worker=Worker)
    processes = {int(row): process for _, row, process in models.calls}
    assert processes[0] == processes[1] == processes[2] == processes[3] != processes[4]


# -------------------------------------------------------------------------------------- stored runs: resumed, refused


@pytest.fixture
def metered(monkeypatch):
    """What each run has told of records and of its end; that Ray's metrics fail changes nothing else."""
    told = []

    class Meter(AuditMeter):
        def __init__(self):
            super().__init__()
            self.seen = Counter()
            self._queue.set = self._runs.inc = None

        def tell(self, **state):
            self.seen.update(self._records)
            super().tell(**state)

        def close(self, *, complete):
            super().close(complete=complete)
            told.append((dict(+self.seen), complete))

    monkeypatch.setattr(fleet, "AuditMeter", Meter)
    return told


def test_a_missing_part_is_audited_again_and_nothing_else(models, metered):
    """A resume fills the gap: the other parts keep their bytes and times, and count among what the run found."""
    job = models.job(["ok"] * 10)
    first = run_audit(job, worker=Worker)
    gone = models.parts[1]
    gone.unlink()
    Path(first.manifest).unlink()
    before = models.files()
    assert run_audit(job, worker=Worker).verdicts == first.verdicts
    after = models.files()
    assert {path: after[path] for path in before} == before
    entered = Path(first.manifest).parents[2] / "ledger/00000002.json"  # this manifest is another one
    assert after.keys() - before.keys() == {gone, Path(first.manifest), entered}
    assert sorted(row for _, row, _ in models.calls[10:]) == ["4", "5", "6", "7"]
    run_audit(job, worker=NeverStarts)  # complete by now
    assert metered == [({("intact", ""): 10}, True)] * 3


def test_where_the_driver_has_no_master_secret_a_worker_signs(models, monkeypatch):
    public = MasterSecret.from_file().public_key
    job = models.job(["ok"] * 3)
    monkeypatch.delenv("FWM_MASTER_KEY_FILE")
    summary = run_audit(job, worker=Worker)
    assert signed_values(Path(summary.manifest).read_bytes(), "manifest", [public])["rows"] == 3
    assert ledger.verify(job.out, [public], head=summary.ledger.sha256).findings == ()


def test_a_complete_run_that_the_ledger_missed_is_entered_when_it_is_repeated(models):
    """As after a driver that died between its manifest and its entry."""
    job = models.job(["ok"] * 3)
    first = run_audit(job, worker=Worker)
    (Path(job.out) / "ledger/00000001.json").unlink()
    (finding,) = ledger.verify(job.out, [MasterSecret.from_file().public_key]).findings[:1]
    assert "in no manifest" in finding.problem
    again = run_audit(job, worker=NeverStarts)
    assert (again.verdicts, again.ledger.number) == (first.verdicts, 1)
    assert not ledger.verify(job.out, [MasterSecret.from_file().public_key]).findings


def forged(plan, shard):
    """A part as somebody without the master secret writes it."""
    return to_parquet([record(settings_of(plan), entry, shard) for entry in plan.entries_of(shard)])


def test_a_part_that_no_driver_of_the_run_wrote_is_not_taken_for_one(models):
    """Neither where it is there before the audit, nor where it stands in the place of one that is resumed."""
    job = models.job(["ok", "raise"])
    plan = plan_audit(job)
    storage.create(plan.locate(plan.run.part(0)), forged(plan, 0))
    with pytest.raises(UsageError, match="no audit wrote it"):
        run_audit(job, worker=Worker)
    with pytest.raises(UsageError, match="no audit wrote it"):
        run_audit(job, worker=Worker)
    assert not Path(plan.manifest).exists()


def test_a_part_of_another_run_stands_for_none_of_this_one(models):
    """Though it is signed: not even under the same run id, after the first run was taken away."""
    run_audit(models.job(["ok"] * 4), worker=Worker)
    (old,) = models.parts
    kept = old.read_bytes()
    for path in sorted((models.folder / "out").rglob("*")):
        if path.is_file():
            path.unlink()
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_bytes(kept)
    with pytest.raises(UsageError, match="no audit wrote it"):
        run_audit(models.job(["ok"] * 4), worker=Worker)


def test_a_run_that_was_begun_in_another_order_is_not_gone_on_with(models, monkeypatch):
    """As many records as rows are not enough: each row has to have its own."""
    job = models.job(["ok"] * 6)
    sizes = [1, 2, 4, 8, 16, 32]
    # One file, of which six models are said to have it.
    entries = [
        CatalogEntry(row, f"model-{row}", "s3://ok/0", "timm:any", KEY_ID, size_bytes=sizes[row]) for row in range(6)
    ]
    Path(job.catalog).write_bytes(write_catalog(entries, job.catalog))
    Path(run_audit(job, worker=Worker).manifest).unlink()
    models.parts[-1].unlink()
    monkeypatch.setattr("fwm_audit.plan._first_the_large", lambda entry: entry.row)
    with pytest.raises(UsageError, match="records of other rows of the catalog"):
        run_audit(job, worker=Worker)


def test_a_run_that_changed_between_two_looks_at_it_is_refused(models):
    """Settings are taken from the first look, the signature from the second."""
    job = models.job(["ok"] * 3)
    Path(run_audit(job, worker=Worker).manifest).unlink()
    plan = plan_audit(job)
    for change in ({"started_at": plan.run.started_at - timedelta(days=1)}, {"key_fingerprints": {}}):
        with pytest.raises(UsageError, match=r"run\.json was replaced"):
            fleet.run_audit(dataclasses.replace(plan, run=dataclasses.replace(plan.run, **change)), worker=Worker)
    assert fleet.run_audit(plan, worker=Worker).verdicts["intact"] == 3


def no_answer(*_, **__):
    raise StorageError(ErrorCode.STORAGE, "away")


def test_what_an_earlier_attempt_found_is_told_whatever_stops_this_one(models, monkeypatch):
    """Tampered models above all; and where all is stored, nothing else is asked for."""
    job = models.job(["ok"] * 8, actors=None, gpus_per_actor=1.0)
    plan = plan_audit(job)
    storage.create(plan.locate("runs/run/run.json"), MasterSecret.from_file().sign("run", plan.run.values()))
    digest = hashlib.sha256(storage.read(plan.locate("runs/run/run.json"))).hexdigest()
    for shard in (1, 0):
        seen = [
            dataclasses.replace(record(settings_of(plan), entry, shard), verdict=Verdict.TAMPERED)
            for entry in plan.entries_of(shard)
        ]
        name = plan.run.part(shard)
        storage.create(plan.locate(name), to_parquet(seen, name, digest, MasterSecret.from_file().sign))
        if shard == 1:
            with pytest.raises(IncompleteError, match="no GPU") as stopped:
                run_audit(job, worker=Worker)
            assert stopped.value.verdicts["tampered"] == 4
    first = storage.read(plan.locate(plan.run.part(0)))
    storage.replace(plan.locate(plan.run.part(0)), b"junk")
    with pytest.raises(IncompleteError, match="is no Parquet file") as stopped:
        run_audit(job, worker=Worker)
    assert stopped.value.verdicts["tampered"] == 4
    storage.replace(plan.locate(plan.run.part(0)), first)
    ledger_as_it_is = ledger.append
    monkeypatch.setattr(ledger, "append", no_answer)
    for _ in ("writes the manifest", "finds it"):
        with pytest.raises(IncompleteError, match="away") as stopped:
            run_audit(job, worker=Worker)
        assert stopped.value.verdicts["tampered"] == 8
    monkeypatch.setattr(ledger, "append", ledger_as_it_is)
    assert run_audit(job, worker=Worker).verdicts["tampered"] == 8


@pytest.mark.parametrize("kind", ["run.json", "manifest.json"])
def test_a_run_or_manifest_that_no_driver_signed_is_refused(models, kind):
    job = models.job(["ok"] * 3)
    first = run_audit(job, worker=Worker)
    path = Path(first.manifest).parent / kind
    text = path.read_text()
    path.write_text(text.replace('"kind"', '"kind" '))
    with pytest.raises(UsageError, match="no audit wrote it"):
        run_audit(job, worker=NeverStarts)
    path.write_text(text)
    assert run_audit(job, worker=NeverStarts) == first


def test_a_complete_run_is_left_alone(models):
    """The same run id again audits nothing, changes no file and says the same."""
    job = models.job(["ok"] * 6)
    first, before = run_audit(job, worker=Worker), models.files()
    assert run_audit(job, worker=NeverStarts) == first
    assert models.files() == before
    assert len(models.calls) == 6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tolerance": Tolerance.HALF}, "--tolerance"),
        ({"allowed_factories": ("acme",)}, "--allow-factory"),
        ({"shard_size": 3}, "shard_size"),
    ],
)
def test_other_settings_are_refused(models, options, named):
    """A run keeps the settings that it was started with."""
    run_audit(models.job(["no-key"]), worker=Worker)
    before = models.files()
    with pytest.raises(UsageError, match=named):
        run_audit(models.job(["no-key"], **options), worker=Worker)
    assert models.files() == before


def test_another_catalog_or_key_is_refused(models):
    """Rows and keys of a run are those it was started with, to the last bit."""
    run_audit(models.job(["ok"]), worker=Worker)
    with pytest.raises(UsageError, match="catalog_sha256"):
        plan_audit(models.job(["ok", "ok"]))
    key = models.folder / "keys" / "model-0" / f"{KEY_ID}.fwmkey"
    key.parent.mkdir()
    key.write_bytes(b"old")
    run_audit(models.job(["ok"], run_id="other"), worker=Worker)
    key.write_bytes(b"new")
    with pytest.raises(UsageError, match="key_fingerprints"):
        plan_audit(models.job(["ok"], run_id="other"))


@pytest.mark.parametrize("seen_first", [False, True])
def test_a_key_that_could_not_be_read_for_a_moment_stops_no_resume(models, seen_first):
    """At the start or at the resume; what each worker reads is compared with what the run saw first, if it saw any."""
    key = models.folder / "keys" / "model-0" / f"{KEY_ID}.fwmkey"
    key.parent.mkdir()
    if seen_first:
        key.write_bytes(b"key")
    job = models.job(["ok", "ok"])
    Path(run_audit(job, worker=Worker).manifest).unlink()
    if seen_first:
        key.unlink()
    else:
        key.write_bytes(b"key")
    plan = plan_audit(job)
    assert plan.resumed
    assert bool(plan.run.key_fingerprints[f"model-0/{KEY_ID}"]) is seen_first


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_ends_the_reading_of_keys(models, monkeypatch):
    """Of 100,000 keys, those that are in work are waited for."""
    job = models.job(["ok"] * 10_000)
    read, keys = storage.read, []

    def slow(uri):
        if uri.endswith(".fwmkey"):
            keys.append(uri)
            if len(keys) == 100:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.001)
        return read(uri)

    monkeypatch.setattr(storage, "read", slow)
    with pytest.raises(KeyboardInterrupt):
        plan_audit(job)
    assert len(keys) < 5_000


def test_the_first_writer_of_a_part_has_it(models):
    """Of two drivers of one run, records and counts are those of whoever stored the part first."""
    job = models.job(["ok"] * 4)
    plan = plan_audit(job)

    def other_driver(done, *_):
        if done == 1:
            described = (models.folder / "out/runs/run/run.json").read_bytes()
            start = datetime.fromisoformat(json.loads(described)["started_at"])
            seen = [
                AuditRecord(
                    **{name: getattr(mine, name) for name in AuditRecord.__slots__}
                    | {"run_started_at": start, "verdict": Verdict.TAMPERED}
                )
                for mine in (record(settings_of(plan), entry, 0) for entry in plan.entries)
            ]
            name, digest = plan.run.part(0), hashlib.sha256(described).hexdigest()
            part = to_parquet(seen, name, digest, MasterSecret.from_file().sign)
            assert storage.create(plan.locate(name), part)

    assert run_audit(job, progress=other_driver, worker=Worker).verdicts["tampered"] == 4


def settings_of(plan):
    return AuditSettings(
        run_id=plan.run.run_id,
        run_started_at=plan.run.started_at,
        keys=plan.job.keys,
        base="/",
        key_fingerprints={},
        tolerance=plan.job.tolerance,
        allowed_factories=(),
    )


# ---------------------------------------------------------------------------------------------- what ends a run early


def test_a_worker_without_master_secret_stops_the_run(models):
    """What is wrong for every model is the operator's to mend: no records, no second try."""
    with pytest.raises(UsageError, match="no master secret"):
        run_audit(models.job(["ok"] * 4), worker=NoSecret)
    assert models.parts == []


@pytest.mark.parametrize("trouble", ["no secret", "dies", "hangs"])
def test_a_worker_that_cannot_be_replaced_at_once_ends_no_run(models, trouble, monkeypatch):
    """One that was ready has shown that the settings are right."""
    monkeypatch.setattr(dispatcher, "START_S", 3.0)
    models.troubles("fine", trouble)
    summary = run_audit(models.job(["ok", "die-once", "ok"], actors=1), worker=Troubled)
    assert summary.verdicts["intact"] == 3
    assert (models.folder / "keys" / "troubles").read_text() == ""


def test_a_worker_that_worked_is_replaced_whatever_failed_elsewhere(models, monkeypatch):
    """A node on which nothing starts ends no run that another completes, not even when a worker there has to go."""
    monkeypatch.setattr(dispatcher, "PATIENCE_S", 600.0)
    models.troubles("fine", *["dies"] * 5)
    job = models.job(["slow", "attack", "ok", "ok", "ok"], actors=2, timeout_s=120.0)
    assert run_audit(job, worker=Troubled).verdicts == {"intact": 4, "tampered": 0, "error": 1}


def test_failures_to_start_are_counted_until_those_that_are_starting_have_come_to_an_end(models, monkeypatch):
    """The good node is slower than the one on which nothing starts."""
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    plan = plan_audit(models.job(["ok"] * 9))
    spawned = []
    two = Dispatcher(lambda: spawned.append(1) or 1 / 0, settings_of(plan), actors=2, timeout_s=1)
    two._todo.extend(Task(entry, 0) for entry in plan.entries)
    two._calls = {"starting": dispatcher._Call(None, deadline=1e9)}
    for _ in range(9):
        two._start_failed(dispatcher._Call(None), "it died")
    two._staff()
    assert spawned == []  # for now
    monkeypatch.setattr(dispatcher, "PATIENCE_S", 0.0)
    two._start_failed(dispatcher._Call(None), "it died")
    with pytest.raises(ZeroDivisionError):
        two._staff()
    assert spawned == [1]
    two._calls = {"waiting": dispatcher._Call(None)}
    with pytest.raises(FwmError, match="11 workers in a row did not start: it died"):
        two._start_failed(dispatcher._Call(None), "it died")


def test_a_worker_that_hangs_at_its_start_is_given_up(models, monkeypatch):
    monkeypatch.setattr(dispatcher, "START_S", 1.0)
    models.troubles(*["hangs"] * 9)
    with pytest.raises(IncompleteError, match="not ready within 1 s"):
        run_audit(models.job(["ok"], actors=1), worker=Troubled)


def test_a_worker_that_does_not_certify_is_replaced(models, monkeypatch):
    monkeypatch.delenv("FWM_MASTER_KEY_FILE")
    models.troubles("dies")
    assert run_audit(models.job(["ok"]), worker=Troubled).verdicts["intact"] == 1
    monkeypatch.setattr(fleet, "START_S", 1.0)
    models.troubles("dies", "hangs")
    with pytest.raises(FwmError, match="neither of two workers certified"):
        run_audit(models.job(["ok"], run_id="other"), worker=Troubled)


def test_workers_that_never_start_end_the_run(models):
    """A fleet that cannot start is given up, and can be resumed."""
    with pytest.raises(IncompleteError, match=r"did not start.*--run-id run"):
        run_audit(models.job(["ok"] * 4), worker=NeverStarts)
    assert run_audit(models.job(["ok"] * 4), worker=Worker).verdicts["intact"] == 4


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_keeps_finished_shards_and_stops_the_workers(models):
    """Ctrl-C is heard although a model hangs; the same run id then audits the rest only."""
    acts = ["ok"] * 4 + ["hang"]

    def interrupt():
        while not models.parts or not any(act == "hang" for act, *_ in models.calls):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(IncompleteError, match=r"interrupted.*--run-id run") as stopped:
        run_audit(models.job(acts), worker=Worker)
    assert stopped.value.verdicts == {"intact": 4, "tampered": 0, "error": 0}
    assert len(models.parts) == 1
    hanging = int(models.calls[-1][2])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{hanging}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{hanging}").exists()
    summary = run_audit(models.job(acts, timeout_s=1.0), worker=Worker)
    assert summary.verdicts == {"intact": 4, "tampered": 0, "error": 1}


def test_storage_that_fails_leaves_a_run_to_resume(models, monkeypatch):
    """Audited and not stored is not audited."""
    create = storage.create

    def full(uri, data):
        if uri.endswith("-000001.parquet"):
            raise StorageError(ErrorCode.STORAGE, "no space left")
        return create(uri, data)

    monkeypatch.setattr(storage, "create", full)
    with pytest.raises(IncompleteError, match="no space left"):
        run_audit(models.job(["ok"] * 8), worker=Worker)
    monkeypatch.undo()
    assert run_audit(models.job(["ok"] * 8), worker=Worker).verdicts["intact"] == 8
    assert len(models.calls) == 12


def test_a_model_that_finished_while_the_driver_was_busy_is_no_timeout(models):
    """Slow storage or a slow terminal holds up the driver beyond the limit, never a verdict."""
    job = models.job(["ok"] * 5, timeout_s=1.0, actors=2)
    assert run_audit(job, progress=lambda *_: time.sleep(1.5), worker=Worker).verdicts["intact"] == 5


def test_a_dry_run_writes_nothing(models):
    """The plan says what is left and leaves no trace."""
    plan = plan_audit(models.job(["ok", "no-key"] * 5))
    assert (plan.run.rows, plan.missing, plan.resumed) == (10, (0, 1, 2), False)
    assert plan.run.key_fingerprints == {f"model-{row}/{KEY_ID}": None for row in range(0, 10, 2)}
    assert not (models.folder / "out").exists()


def test_an_unreadable_catalog_is_a_usage_error(models):
    """A run without rows never started."""
    with pytest.raises(UsageError, match="cannot read the catalog"):
        run_audit(AuditJob(catalog="/no/such.csv", keys="/no", out=str(models.folder / "out"), run_id="r"))


def test_memory_is_blamed_by_name(models):
    """A model whose worker Ray stopped for memory twice is reported as out of memory, not as a crash."""
    plan = plan_audit(models.job(["ok"]))
    one = Dispatcher(None, settings_of(plan), actors=1, timeout_s=1)
    task = Task(plan.entries[0], 0)
    assert one._died(task, OutOfMemoryError("killed")) is None
    (again,) = one._todo
    assert again.attempt == 2
    assert one._died(again, OutOfMemoryError("killed")).error_code == "out_of_memory"


# ---------------------------------------------------------------------------------- carried forward from a run before


def night(models, run_id, acts=("ok",) * 5, **options):
    """An audit of its own run; the worker says which records it was offered."""
    options = {"carry_days": 7.0} | options
    return run_audit(models.job(acts, run_id=run_id, **options), worker=Carrying)


class Carrying(Worker):
    """Takes over each record that it is offered."""

    def audit(self, entry, *, shard, attempt, ahead=None, before=None):
        if before is not None:
            return carried(self._settings, entry, before, shard=shard, attempt=attempt, worker="w")
        seen = super().audit(entry, shard=shard, attempt=attempt)
        return dataclasses.replace(seen, etag="e") if seen.verdict is Verdict.INTACT else seen


def test_intact_records_of_the_last_complete_run_are_offered_to_the_next(models):
    first = night(models, "one", carry_days=None)
    assert (first.carried, json.loads(Path(first.manifest).read_bytes())["carried"]) == (0, 0)
    second = night(models, "two")
    assert (second.carried, second.verdicts["intact"]) == (5, 5)
    third = night(models, "three", [*["ok"] * 4, "refuse", "ok"])  # an error and a new row
    assert (third.carried, third.verdicts["intact"], third.verdicts["error"]) == (4, 5, 1)
    fourth = night(models, "four", [*["ok"] * 4, "refuse", "ok"])
    assert (fourth.carried, fourth.errors) == (5, {"checkpoint_corrupt": 1})
    rows = [row for row in models.rows() if row["run_id"] == "four"]
    # They name the run that looked at the model, and its time, whoever carried them since.
    assert [row["carried_from"] for row in rows] == ["one"] * 4 + [None, "three"]
    audited = {row["uri"]: row["audited_at"] for row in models.rows() if row["run_id"] == "one"}
    assert all(row["audited_at"] == audited[row["uri"]] for row in rows[:4])
    assert all(row["run_started_at"] == rows[0]["run_started_at"] for row in rows)


@pytest.mark.parametrize(
    "options", [{"carry_days": None}, {"carry_days": 0.0}, {"tolerance": Tolerance.HALF}, {"allowed_factories": ("x",)}]
)
def test_nothing_is_carried_forward_from_another_kind_of_run_or_from_too_old_a_one(models, options):
    night(models, "one")
    assert night(models, "two", **options).carried == 0


def test_the_age_of_a_record_counts_from_now(models, monkeypatch):
    """Not from the start of a run that is resumed weeks later."""
    night(models, "one")
    plan = plan_audit(models.job(["ok"], run_id="two", carry_days=7.0))

    def offered(days):
        class Later(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) + timedelta(days=days)

        monkeypatch.setattr(fleet, "datetime", Later)
        return fleet._Before(plan, MasterSecret.from_file().public_key).of(plan.entries[0])

    assert offered(0).run_id == offered(6.9).run_id == "one"
    assert offered(7.1) is None


def test_a_run_that_changed_since_it_was_planned_with_gives_no_records(models):
    """Its settings were compared when it was read first; what is verified then has to be the same."""
    night(models, "one")
    plan = plan_audit(models.job(["ok"], run_id="two", carry_days=7.0))
    other = dataclasses.replace(plan.before, settings=plan.before.settings | {"tolerance": "half"})
    with pytest.raises(UsageError, match=r"another run\.json"):
        fleet._Before(dataclasses.replace(plan, before=other), MasterSecret.from_file().public_key)


def test_catalogs_that_share_an_output_carry_forward_each_from_its_own_runs(models):
    """Whichever ran last; a catalog that has another name every night takes the last one of all."""
    first = models.job(["ok"] * 3, run_id="a-1", carry_days=7.0)
    other = Path(first.catalog).with_name("other.parquet")
    shutil.copy(first.catalog, other)
    for run_id, catalog, seen in (
        ("a-1", first.catalog, None),
        ("b-1", str(other), "a-1"),
        ("a-2", first.catalog, "a-1"),
        ("b-2", str(other), "b-1"),
    ):
        plan = plan_audit(dataclasses.replace(first, run_id=run_id, catalog=catalog))
        assert (plan.before and plan.before.run_id) == seen
        fleet.run_audit(plan, worker=Carrying)


def test_nothing_is_carried_forward_from_an_incomplete_run(models):
    first = night(models, "one")
    Path(first.manifest).unlink()
    assert night(models, "two").carried == 0


def test_a_run_of_another_release_does_not_stop_the_night(models):
    night(models, "one")
    (models.folder / "out/runs/one/run.json").write_text("{}")
    assert night(models, "two").carried == 0


@pytest.mark.parametrize("change", ["changed", "gone", "signed by others"])
def test_records_that_were_changed_are_not_carried_forward(models, tmp_path, monkeypatch, caplog, change):
    """Who can write to the output makes no tampered model intact for a week, and keeps no night from its end."""
    night(models, "one")
    part = models.parts[0]
    if change == "changed":
        rows = from_parquet(part.read_bytes()).to_pylist()
        part.write_bytes(to_parquet([dataclasses.replace(record_of(row), matches=7) for row in rows]))
    elif change == "gone":
        part.unlink()
    else:
        MasterSecret.generate_file(tmp_path / "other.key")
        monkeypatch.setenv("FWM_MASTER_KEY_FILE", str(tmp_path / "other.key"))
    second = night(models, "two")
    assert (second.carried, second.verdicts["intact"]) == (0, 5)
    (said,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "every model is audited" in said.getMessage()
    assert night(models, "three").carried == 5


def test_storage_that_does_not_answer_is_no_reason_to_audit_every_model(models, monkeypatch):
    """The same run id goes on when it answers again."""
    night(models, "one")
    read = storage.read

    def away(uri):
        if "/audits/" in uri:
            raise StorageError(ErrorCode.STORAGE, "away")
        return read(uri)

    monkeypatch.setattr(storage, "read", away)
    with pytest.raises(IncompleteError, match="away"):
        night(models, "two")
    monkeypatch.undo()
    assert night(models, "two").carried == 5


# ------------------------------------------------------------------------------------ records, exit codes, the driver


def test_error_records_survive_parquet(models):
    """The driver's own records have every column that the schema demands."""
    plan = plan_audit(models.job(["ok"]))
    error = FwmError(ErrorCode.TIMEOUT, "late")
    data = to_parquet([error_record(settings_of(plan), plan.entries[0], error, shard=0, attempt=1)])
    assert from_parquet(data).to_pylist()[0]["error_message"] == "late"


@pytest.mark.parametrize(
    ("intact", "tampered", "error", "code"), [(2, 0, 0, 0), (2, 1, 0, 1), (2, 1, 1, 1), (2, 0, 1, 3)]
)
def test_exit_codes(intact, tampered, error, code):
    """Tampered always wins; an error is never a success."""
    verdicts = {"intact": intact, "tampered": tampered, "error": error}
    assert exit_code(verdicts, complete=True) == code
    assert exit_code(verdicts, complete=False) == (code or 3)


def test_the_driver_stays_small():
    """Drivers load neither torch (400 MB) nor the parts of Ray that need pandas, one that embeds only if it has to."""
    heavy = {"torch", "pandas", "ray.train", "ray.data"}
    jobs = "jobs.audit, jobs.catalog, jobs.embed, jobs.keys"
    code = f"import sys; import {jobs}; print(sorted({heavy!r} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "[]"
