"""Fixtures that several files share: a real S3 server, and a prefix of its own for each test."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import boto3
import botocore.config
import pytest

BUCKET = "fwm"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """URL of a SeaweedFS server; the AWS variables lead to it from here to the end of the session."""
    folder = tmp_path_factory.mktemp("s3")
    master, volume, filer, s3 = _free_ports(4)
    identities = [
        {"name": name, "credentials": [{"accessKey": f"{name}key", "secretKey": f"{name}secret"}], "actions": actions}
        for name, actions in {
            "test": ["Admin", "Read", "Write", "List", "Tagging"],
            "reader": ["Read", "List"],
        }.items()
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    command = [
        Path(sysconfig.get_path("scripts")) / "weed",
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={master}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        f"-volume.port={volume}",
        "-volume.max=2000",  # each bucket takes several; a small limit fails the third bucket
        "-volume.preStopSeconds=0",
        f"-filer.port={filer}",
        "-s3",
        f"-s3.port={s3}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}",
    ]
    endpoint = f"http://127.0.0.1:{s3}"
    log = folder / "weed.log"
    with log.open("wb") as output, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "testkey")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")  # boto3 reads this one
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(server, endpoint, log)
            yield endpoint
        finally:
            server.kill()  # a polite end takes 15 s, and nothing here is to be kept
            server.wait()


@pytest.fixture
def s3(s3_server):
    """URI of a prefix that no other test uses."""
    return f"s3://{BUCKET}/{uuid.uuid4()}"


def _wait(server, endpoint, log, seconds=60.0):
    client = boto3.client(
        "s3",
        config=botocore.config.Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}),
    )
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{endpoint}/healthz", timeout=1).close()
            # Healthy comes before writable: the first volumes are still to grow.
            if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
        except (OSError, client.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                pytest.fail(f"the S3 server did not start: {error}\n{tail}", pytrace=False)
            time.sleep(0.2)
        else:
            return


def _free_ports(count):
    """Ports below the ephemeral range, each with its gRPC neighbour at + 10000."""
    found = []
    for port in random.sample(range(11_000, 22_000), 1_000):
        try:
            for candidate in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")
