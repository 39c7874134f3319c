"""Jobs submitted to a real cluster: three nodes of their own processes, token authentication, a real S3 server.

All of it is what `bash cluster/local.sh` does; the tests look at what it left, and then disturb it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.s3]
ROOT = Path(__file__).parents[1]


class Local:
    """What `cluster/local.sh up` started, and the environment that leads to it."""

    def __init__(self, folder):
        self.folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | {"FWM_LOCAL": str(folder), "PATH": path}

    def script(self, step, seconds):
        return self.run("bash", "cluster/local.sh", step, seconds=seconds)

    def enter(self):
        """Read the variables that the script wrote for its user."""
        told = self.run("bash", "-c", f"set -a; . {self.folder}/env; env -0", seconds=10)
        self.environment |= dict(line.partition("=")[::2] for line in told.stdout.split("\0") if line)

    def run(self, *command, seconds=60, **environment):
        return subprocess.run(
            command,
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )

    def python(self, script):
        """What a script prints, as whoever owns the store."""
        done = self.run(sys.executable, "-c", script)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def parts_of(self, run):
        """How many parts of a run are stored."""
        names = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        endpoint, region, key, secret = (self.environment[name] for name in names)
        client = boto3.client(
            "s3", endpoint_url=endpoint, region_name=region, aws_access_key_id=key, aws_secret_access_key=secret
        )
        listed = client.list_objects_v2(Bucket="acme", Prefix="audits/audits/").get("Contents", [])
        return sum(f"{run}-" in item["Key"] for item in listed)

    def series(self):
        """Our metrics, as Prometheus reads them: (name, labels) -> value."""
        with urllib.request.urlopen(self.environment["FWM_METRICS"], timeout=10) as answer:
            text = answer.read().decode()
        return text, {
            (name, tuple(sorted(re.findall(r'(\w+)="([^"]*)"', labels)))): float(value)
            for name, labels, value in re.findall(r"^ray_(fwm_\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE)
        }


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    local = Local(tmp_path_factory.mktemp("local"))
    up = local.script("up", 100)
    try:
        assert up.returncode == 0, up.stderr
        local.enter()
        yield local
    finally:
        local.script("down", 60)


@pytest.fixture(scope="module")
def nights(local):
    """The embedding and two nights that the script shows, as it says them."""
    told = local.script("demo", 240)
    assert told.returncode == 0, told.stdout[-8000:] + told.stderr[-4000:]
    return told


def objects(text):
    """The JSON lines, each once: Ray says the last lines of a failed job again."""
    return [json.loads(line) for line in dict.fromkeys(text.splitlines()) if line.startswith("{")]


def closing(text):
    return [line for line in objects(text) if "time" not in line]


@pytest.mark.timeout(400)
def test_two_nights(local, nights):
    """Embedding and audits by submitted jobs; the second night carries forward, finds the change, and fails."""
    embedded, listed, first, second = closing(nights.stdout)
    assert (embedded["published"], embedded["failed"], listed["rows"]) == (1, 0, 3)
    counted = ("complete", "intact", "tampered", "error", "carried")
    assert [first[name] for name in counted] == [True, 3, 0, 0, 0]
    assert [second[name] for name in counted] == [True, 2, 1, 0, 2]
    status = local.run("ray", "job", "status", "nightly-2-1")
    assert "failed" in (status.stdout + status.stderr).lower()
    status = local.run("ray", "job", "status", "nightly-1-1")
    assert "succeeded" in (status.stdout + status.stderr).lower()


def test_log_lines_are_json_with_run_and_model(nights):
    lines = [line for line in objects(nights.stdout) if "time" in line]
    (found,) = [line for line in lines if line.get("verdict") == "tampered"]
    assert (found["run_id"], found["model_id"], found["level"]) == ("nightly-2", "conv", "WARNING")
    assert found["uri"] == "s3://acme/models/conv/us.safetensors"
    assert any(line.get("model_id") == "conv" and "published" in line["message"] for line in lines)


def test_metrics_of_the_real_endpoint(local, nights):
    text, series = local.series()
    total = {}
    for (name, pairs), value in series.items():
        labels = dict(pairs)
        key = (name, *(labels[key] for key in ("verdict", "outcome", "error_code", "stage") if key in labels))
        total[key] = total.get(key, 0) + value
        # Every label is Ray's own or one of few values: nothing names a model, a place or a run.
        ours = {key for key in labels if not key.startswith("otel_")} - {
            *("Component", "NodeAddress", "SessionName", "Version", "WorkerId")
        }
        assert ours <= {"verdict", "error_code", "stage", "outcome", "state"}
    assert total["fwm_audit_models_total", "intact", ""] == 3 + 2
    assert total["fwm_audit_models_total", "tampered", ""] == 1
    assert total["fwm_audit_carried_total",] == 2
    assert total["fwm_audit_runs_total", "complete"] == 2
    assert total["fwm_embed_models_total", "published", ""] == 1
    size = int(local.python("from fwm_audit import storage; print(storage.listing('s3://acme/models/conv')[0].size)"))
    assert total["fwm_audit_bytes_total",] == 4 * size  # three on the first night, one on the second
    assert all(total["fwm_audit_stage_seconds_total", stage] > 0 for stage in ("fetch", "load", "verify"))
    assert "s3://" not in text
    assert "conv" not in re.sub(r'otel_scope_\w+="[^"]*"', "", "".join(re.findall("^ray_fwm.*$", text, re.MULTILINE)))


def test_nothing_without_the_token(local):
    for token in ("", "0" * 64):
        request = urllib.request.Request(f"{local.environment['RAY_ADDRESS']}/api/jobs/")
        request.add_header("Authorization", f"Bearer {token}")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code in {401, 403}
        refused.value.close()


def test_one_job_of_an_id(local, nights):
    done = local.run("ray", "job", "submit", "--submission-id", "nightly-1-1", "--", "true")
    assert done.returncode != 0
    assert "already exists" in done.stdout + done.stderr
    # The schedule called once more: it says again what the night said.
    again = local.run("bash", "cluster/nightly.sh", FWM_NIGHT="2", FWM_OPTIONS="--nosuchoption")
    assert again.returncode == 1
    assert closing(again.stdout)[-1]["tampered"] == 1


def test_a_job_server_that_is_away_is_neither_intact_nor_tampered(local, tmp_path):
    (tmp_path / "token").write_text("0" * 64)
    for change in ({"RAY_ADDRESS": "http://127.0.0.1:1"}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}):
        done = local.run("bash", "cluster/nightly.sh", FWM_NIGHT="9", FWM_PATIENCE="1", **change)
        assert (done.returncode, closing(done.stdout)) == (3, [])
        assert "does not answer" in done.stderr


def test_a_night_that_was_asked_for_wrongly_is_asked_for_again(local, nights):
    wrong = local.run("bash", "cluster/nightly.sh", FWM_NIGHT="8", FWM_OPTIONS="--nosuchoption")
    assert wrong.returncode == 2
    right = local.run("bash", "cluster/nightly.sh", FWM_NIGHT="8", FWM_OPTIONS="--dry-run")
    assert right.returncode == 0, right.stderr
    assert "nightly-8-2" in right.stdout
    assert closing(right.stdout)[-1]["dry_run"] is True


def test_it_is_not_started_twice(local):
    again = local.script("up", 20)
    assert (again.returncode, "it is up already" in again.stderr) == (2, True)


#: 600 checkpoints of the model, and their catalog where the cluster may read it.
FLEET = """
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from fwm_audit import storage
from fwm_audit.catalog import read_catalog, write_catalog
entry = read_catalog(storage.read("s3://acme/catalog.parquet"), "catalog.parquet")[0]
data = storage.read(entry.uri)
many = [
    dataclasses.replace(entry, row=row, uri=f"s3://acme/models/conv/many/{row:03}.safetensors", etag=None)
    for row in range(600)
]
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda entry: storage.replace(entry.uri, data), many))
storage.replace("s3://acme/audits/many.parquet", write_catalog(many, "many.parquet"))
"""


@pytest.mark.timeout(200)
def test_a_job_that_is_stopped_is_gone_on_with(local, nights):
    """The schedule's script submits the run again, and what was stored is not audited twice."""
    local.python(FLEET)
    environment = local.environment | {
        "FWM_NIGHT": "3",
        "FWM_OPTIONS": "--actors 2 --allow-factory tests",
        "FWM_CATALOG": "s3://acme/audits/many.parquet",
    }
    night = subprocess.Popen(
        ["bash", "cluster/nightly.sh"],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while (stored := local.parts_of("nightly-3")) == 0:
            assert night.poll() is None, night.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        stopped = local.run("ray", "job", "stop", "nightly-3-1")
        assert stopped.returncode == 0, stopped.stderr
        said = night.communicate(timeout=100)[0]
    finally:
        night.kill()
    assert night.returncode == 0, said
    assert stored < 10
    last = closing(said)[-1]
    assert (last["run_id"], last["complete"], last["intact"]) == ("nightly-3", True, 600)
    assert "nightly-3-2" in said
    missing = re.search(r"run nightly-3: (\d+) of 10 shards to audit.*\n(?:.*\n)*?.*run nightly-3: (\d+) of 10", said)
    assert int(missing[1]) == 10 > int(missing[2])
