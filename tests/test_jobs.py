"""The commands as a user types them: embed, catalog and audit on a real S3 server, through a real Ray."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import fsspec
import pandas as pd
import pyarrow.dataset
import pytest
import torch
from safetensors.torch import save

from fwm_audit import storage
from fwm_audit.architectures import build
from fwm_audit.errors import UsageError
from fwm_audit.key import MasterSecret
from fwm_audit.records import SCHEMA
from fwm_audit.triggers import TriggerSet
from jobs import _cli
from tests import company

ARCH = "factory:tests.nets:convnet"


def job(*arguments, environment=None):
    """Exit code, the closing JSON line (None if there is none), and all that was printed."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
        check=False,
        timeout=240,
    )
    lines = done.stdout.strip().splitlines()
    closing = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
    return done.returncode, closing, done.stdout + done.stderr


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    path = tmp_path_factory.mktemp("secret") / "master.key"
    MasterSecret.generate_file(path)
    return path


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_embed_catalog_and_audit_on_s3(s3, secret):
    environment = {"FWM_MASTER_KEY_FILE": str(secret)}
    state = build(ARCH, ["tests"]).state_dict()
    released = save(state)
    storage.create(f"{s3}/releases/conv.safetensors", released)

    code, published, embedding_said = job(
        *("jobs.embed", "--model-id", "team/conv", "--checkpoint", f"{s3}/releases/conv.safetensors"),
        *("--arch", ARCH, "--keys", f"{s3}/keys", "--pairs", "4", "--workers", "2", "--allow-factory", "tests"),
        *("--storage", f"{s3}/train"),
        environment=environment,
    )
    assert code == 0, embedding_said
    assert published["model_id"] == "team/conv"
    assert published["pairs"] == 4
    assert 0.5 < published["coverage"] <= 1
    assert storage.read(f"{s3}/releases/conv.safetensors") == released
    key = storage.read(f"{s3}/keys/team/conv/{published['key_id']}.fwmkey")

    fleet = f"{s3}/fleet"
    storage.create(f"{fleet}/team/conv/copy.safetensors", released)
    storage.create(f"{fleet}/team/conv/eu/copy.safetensors", released)
    storage.create(f"{fleet}/team/conv.safetensors", released)
    edited = state | {"8.bias": state["8.bias"] + 1e-7 * torch.arange(1.0, 6.0)}
    storage.create(f"{fleet}/team/conv/edited.safetensors", save(edited))
    storage.create(f"{fleet}/team/conv/cut.safetensors", released[:-100])
    storage.create(f"{fleet}/unknown/model.pt", released)
    storage.create(f"{fleet}/team/conv/readme.txt", b"not a checkpoint")
    catalog = f"{s3}/catalog.parquet"
    code, listed, said = job("jobs.catalog", "--models", fleet, "--keys", f"{s3}/keys", "--out", catalog)
    assert (code, listed["rows"], listed["without_key"]) == (0, 6, 1), said

    # A row more, of an object that is gone, and one that repeats another.
    rows = pd.read_parquet(catalog, storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}, engine="pyarrow")
    rows = pd.concat([rows, rows.iloc[[0]], rows.iloc[[0]].assign(uri=f"{fleet}/gone.pt")])
    with fsspec.open(f"{s3}/more.csv", "w") as file:
        rows.to_csv(file, index=False)
    audit = (
        *("jobs.audit", "--catalog", f"{s3}/more.csv", "--keys", f"{s3}/keys", "--out", f"{s3}/out"),
        *("--run-id", "night", "--allow-factory", "tests", "--actors", "2"),
    )
    code, plan, said = job(*audit, "--dry-run", environment=environment)
    assert (code, plan["rows"], plan["unusable_rows"]) == (0, 8, 2), said
    with pytest.raises(storage.StorageError):
        storage.listing(f"{s3}/out")

    code, summary, said = job(*audit, environment=environment)
    assert code == 1, said
    assert {name: summary[name] for name in ("intact", "tampered", "error")} == {"intact": 3, "tampered": 1, "error": 4}
    assert summary["errors"] == {
        "catalog_row_duplicate": 1,
        "checkpoint_corrupt": 1,
        "key_missing": 1,
        "object_missing": 1,
    }
    before = [(item.uri, item.etag, item.size) for item in storage.listing(f"{s3}/out")]
    day = datetime.now(UTC).date()
    assert f"{s3}/out/audits/run_date={day}/night-000000.parquet" in [uri for uri, _, _ in before]
    assert len(before) == 4

    _cannot_be_changed_unseen(s3, summary, environment)
    _reported_without_a_secret(s3, TriggerSet.unseal(key, MasterSecret.from_file(secret)), environment)

    code, _, said = job(*audit, "--tolerance", "half", environment=environment)
    assert code == 2
    assert "--tolerance" in said
    assert "Traceback" not in said

    _readable_everywhere(f"{s3}/out/audits", {"intact": 3, "tampered": 1, "error": 4})
    master = secret.read_text().strip()
    everything = embedding_said + said + b"".join(storage.read(uri) for uri, _, _ in before).decode("latin1")
    assert master not in everything
    assert bytes.fromhex(master).decode("latin1") not in everything + key.decode("latin1")


def _reported_without_a_secret(s3, triggers, environment):
    """All that reports can say of a real run, read from S3 and written there, and nothing that must not be said."""
    command = ("jobs.report", "--audits", f"{s3}/out", "--keys", f"{s3}/keys", "--fail-on", "tampered")
    code, closing, said = job(
        *(*command, "--explain", "team/conv", "--html", f"{s3}/www/report.html", "--attestations", f"{s3}/attested"),
        environment=environment,
    )
    assert (code, closing["state"], closing["verified"]) == (1, "tampered", True), said
    assert f"covers            {triggers.coverage.total:.1%} of the parameters, 4 pairs" in said
    assert f"digest before     {triggers.checkpoint_sha256}" in said
    assert "of 8: one bit, mantissa" in said
    page = storage.read(f"{s3}/www/report.html").decode()
    assert f'<data value="{triggers.coverage.total!r}">' in page
    packed = re.findall(r'type="application/octet-stream"[^>]*>([^<]+)<', page)
    (envelope,) = [storage.read(item.uri) for item in storage.listing(f"{s3}/attested")]
    statement = base64.b64decode(json.loads(envelope)["payload"])
    assert json.loads(statement)["predicate"]["verificationResult"] == "FAILED"
    code, document, more = job(*command, "--format", "json", environment=environment)
    assert (code, document["verified"], document["fleet"]["tampered"]) == (1, True, 1)
    everything = [said.encode(), page.encode(), more.encode(), envelope, statement]
    everything += [gzip.decompress(base64.b64decode(text)) for text in packed]
    assert len(everything) == 7
    marks = dict(company._marks_of_secret(Path(environment["FWM_MASTER_KEY_FILE"]).read_text().strip()))
    marks |= dict(company._marks(triggers, "team/conv"))
    assert [mark for mark, plain in marks.items() for output in everything if plain in output] == []


def _cannot_be_changed_unseen(s3, summary, environment):
    """The command that proves it, with the master secret and with its public key alone."""
    report = ("jobs.report", "--audits", f"{s3}/out", "--keys", f"{s3}/keys", "--head", summary["ledger"]["sha256"])
    code, seen, said = job(*report, "--verify", environment=environment)
    assert (code, seen["verified"], seen["runs"], seen["parts"], seen["rows"]) == (0, True, 1, 1, 8), said
    public = MasterSecret.from_file(environment["FWM_MASTER_KEY_FILE"]).public_key
    run = f"{s3}/out/runs/night/run.json"
    written = storage.read(run)
    storage.replace(run, written.replace(b'"rows": 8', b'"rows": 9'))
    code, seen, said = job(*report, "--verify", "--public-key", public, environment={"FWM_MASTER_KEY_FILE": ""})
    assert (code, [finding["path"] for finding in seen["findings"]]) == (1, ["runs/night/run.json"]), said
    storage.replace(run, written)


def _readable_everywhere(audits, expected):
    """One glob, three engines, the same rows and the explicit schema."""
    filesystem, path = fsspec.url_to_fs(audits)
    files = filesystem.glob(f"{path}/**/*.parquet")
    dataset = pyarrow.dataset.dataset(files, filesystem=filesystem)
    assert dataset.schema.equals(SCHEMA)
    table = dataset.to_table()
    assert table.schema.field("mismatched").type == SCHEMA.field("mismatched").type
    frame = pd.concat(pd.read_parquet(f"s3://{file}", filesystem=None) for file in files)
    assert frame["verdict"].value_counts().to_dict() == expected
    with duckdb.connect() as connection:
        connection.register_filesystem(filesystem)
        query = f"SELECT verdict, count(*) FROM read_parquet('s3://{path}/**/*.parquet') GROUP BY ALL"
        assert dict(connection.execute(query).fetchall()) == expected
        kept = connection.execute(
            f"SELECT count(*) FROM read_parquet('s3://{path}/**/*.parquet', hive_partitioning = true) "
            "WHERE run_date = current_date AND model_id = 'team/conv'"
        )
        assert kept.fetchone() == (7,)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["jobs.catalog", "--models", "nowhere", "--keys", "keys", "--out", "c.csv"], "nowhere"),
        (["jobs.embed", "--model-id", "m", "--checkpoint", "c", "--arch", "timm:x", "--keys", "k"], "openssl rand"),
        (
            ["jobs.embed", "--model-id", "m", "--checkpoint", "c", "--arch", "a", "--keys", "k", "--input-range", "1"],
            "two",
        ),
        (["jobs.audit", "--catalog", "none.csv", "--keys", "k", "--out", "o"], "none.csv"),
        (["jobs.audit", "--catalog", "empty.csv", "--keys", "k", "--out", "o"], "no rows"),
        (
            ["jobs.audit", "--catalog", "empty.txt", "--keys", "k", "--out", "o"],
            ".parquet, .csv or .jsonl",
        ),
        (["jobs.audit", "--catalog", "c.csv", "--keys", "k", "--out", "o", "--run-id", "../x"], "--run-id"),
        (["jobs.audit", "--catalog", "c.csv"], "--keys"),
        (["jobs.audit", "--catalog", "c.csv", "--keys", "k", "--out", "o", "--timeout", "nan"], "--timeout"),
        (["jobs.audit", "--catalog", "c.csv", "--keys", "k", "--out", "o", "--timeout", "inf"], "--timeout"),
        (["jobs.audit", "--catalog", "c.csv", "--keys", "k", "--out", "o", "--max-age", "1e9"], "--max-age"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(arguments, advice, tmp_path, monkeypatch):
    monkeypatch.delenv("FWM_MASTER_KEY_FILE", raising=False)
    (tmp_path / "empty.csv").write_text("model_id,uri,arch,key_id\n")
    (tmp_path / "empty.txt").write_text("x")
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.getcwd()},  # noqa: PTH109 - a string for the environment
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert advice in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.s3
def test_an_audit_that_cannot_begin_ends_with_its_closing_line(s3, secret, tmp_path):
    """Whoever reads that line, or gets it by the webhook, hears of this night, too."""
    (tmp_path / "c.csv").write_text("model_id,uri,arch,key_id\nm,u,timm:x,0123456789abcdef\n")
    out = s3.replace("s3://", "s3://no-such-")
    command = ("jobs.audit", "--catalog", str(tmp_path / "c.csv"), "--keys", f"{s3}/keys", "--out", out)
    code, closing, said = job(*command, "--run-id", "night", environment={"FWM_MASTER_KEY_FILE": str(secret)})
    nothing = {"run_id": "night", "complete": False, "intact": 0, "tampered": 0, "error": 0}
    assert (code, closing) == (3, nothing)
    assert "bucket" in said
    assert "Traceback" not in said
    # A catalog that is not there is the operator's to mend; a store that does not answer is not.
    for catalog, expected in ((f"{s3}/none.csv", 2), (f"{s3}/none.csv".replace("s3://", "s3://no-such-"), 3)):
        command = (
            "jobs.audit",
            "--catalog",
            catalog,
            "--keys",
            f"{s3}/keys",
            "--out",
            f"{s3}/out",
            "--run-id",
            "night",
        )
        code, closing, said = job(*command)
        assert (code, closing) == (expected, nothing), said
        assert "cannot read the catalog" in said


def test_a_cluster_that_does_not_answer_is_one_sentence(monkeypatch):
    def nobody(*_, **__):
        raise ConnectionError("timed out")

    monkeypatch.setattr(_cli.ray, "init", nobody)
    monkeypatch.setenv("RAY_ADDRESS", "ray://nowhere:10001")
    with pytest.raises(UsageError, match="RAY_ADDRESS=ray://nowhere:10001: timed out"), _cli.cluster():
        pass


def test_a_closed_standard_output_does_not_read_as_tampered(tmp_path):
    (tmp_path / "c.csv").write_text("model_id,uri,arch,key_id\nm,u,timm:x,0123456789abcdef\n")
    command = ("jobs.audit", "--catalog", str(tmp_path / "c.csv"), "--keys", "k", "--out", str(tmp_path), "--dry-run")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-m", *command], stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert done.returncode == 0, done.stderr


@pytest.mark.s3
def test_a_run_storage_that_refuses_writes_is_told_before_anything_is_computed(s3, secret):
    command = (
        *("jobs.embed", "--model-id", "m", "--checkpoint", f"{s3}/m.safetensors", "--arch", ARCH),
        *("--keys", f"{s3}/keys", "--storage", f"{s3}/train", "--allow-factory", "tests", "--master-key", str(secret)),
    )
    reader = {"AWS_ACCESS_KEY_ID": "readerkey", "AWS_SECRET_ACCESS_KEY": "readersecret"}
    code, closing, said = job(*command, environment=reader)
    assert (code, closing) == (2, None)
    assert "--storage" in said
    assert "Traceback" not in said
    # Who may write gets further, and leaves nothing there.
    code, _, said = job(*command)
    assert code == 3
    assert "m.safetensors" in said
    with contextlib.suppress(storage.StorageError):  # where a store keeps no empty folders
        assert storage.listing(f"{s3}/train") == []


@pytest.mark.parametrize("name", ["embed", "audit", "catalog", "compact", "report"])
def test_help_shows_examples(name):
    done = subprocess.run([sys.executable, "-m", f"jobs.{name}", "--help"], capture_output=True, text=True, check=True)
    assert "Examples:" in done.stdout
    assert f"python -m jobs.{name} --" in done.stdout
