"""A real S3 server, SeaweedFS, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import botocore.config

BUCKET = "fwm"
_IDENTITIES = {"test": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}
#: Users who may do what the policy of their name says, with `acme/` in the bucket in place of the bucket `acme`.
POLICIES = {file.stem: file.read_text() for file in (Path(__file__).parents[1] / "cluster" / "s3").glob("*.json")}


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """URL of a server with a bucket, its data in `folder`; it takes the keys of the users `test` and `reader`."""
    master, volume, filer, s3 = _free_ports(4)
    rights = {name: {"actions": actions} for name, actions in _IDENTITIES.items()}
    rights |= {name: {"actions": [], "policyNames": [name]} for name in POLICIES}
    identities = [
        {"name": name, "credentials": [{"accessKey": f"{name}key", "secretKey": f"{name}secret"}], **right}
        for name, right in rights.items()
    ]
    policies = [
        {"name": name, "content": text.replace(":::acme/", f":::{BUCKET}/acme/").replace(':::acme"', f':::{BUCKET}"')}
        for name, text in POLICIES.items()
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities, "policies": policies}))
    (folder / "data").mkdir(exist_ok=True)
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
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(server, endpoint, log)
            yield endpoint
        finally:
            server.kill()  # a polite end takes 15 s, and nothing here is to be kept
            server.wait()


def environment(endpoint: str) -> dict[str, str]:
    """The AWS variables that lead to a server, as its user `test`."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",  # boto3 reads this one
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _wait(server, endpoint, log, seconds=60.0):
    settings = environment(endpoint)
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=settings["AWS_REGION"],
        aws_access_key_id=settings["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
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
                raise RuntimeError(f"the S3 server did not start: {error}\n{tail}") from error
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
