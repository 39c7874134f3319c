"""The policies in cluster/s3, on a server that enforces them: each lets its job do what it has to, and nothing else."""

from __future__ import annotations

import contextlib

import boto3
import botocore.exceptions
import pytest

from tests import seaweed

pytestmark = pytest.mark.s3
BUCKET = seaweed.BUCKET
#: What each policy allows, of every object and request below; everything else has to be refused.
OBJECTS = {
    "catalog.parquet": {"worker": "", "audit": "get", "embed": "get put", "report": ""},
    "releases.csv": {"worker": "", "audit": "", "embed": "get", "report": ""},
    "release/conv.safetensors": {"worker": "", "audit": "", "embed": "get", "report": ""},
    "models/conv/eu.safetensors": {"worker": "get", "audit": "", "embed": "", "report": ""},
    "keys/conv/k.fwmkey": {"worker": "get", "audit": "get", "embed": "get put", "report": ""},
    "keys/conv/k.f.commitment.json": {"worker": "get", "audit": "get", "embed": "get put", "report": "get"},
    "train/run/state.sealed": {"worker": "", "audit": "", "embed": "get put delete", "report": ""},
    "audits/runs/r/run.json": {"worker": "", "audit": "get put", "embed": "", "report": "get"},
    "audits/audits/run_date=2026-01-01/r-000000.parquet": {
        "worker": "",
        "audit": "get put",
        "embed": "",
        "report": "get",
    },
    "elsewhere": {"worker": "", "audit": "", "embed": "", "report": ""},
}


def client(server, user):
    return boto3.client(
        "s3",
        endpoint_url=server,
        region_name="us-east-1",
        aws_access_key_id=f"{user}key",
        aws_secret_access_key=f"{user}secret",
    )


def allowed(request, **arguments):
    with contextlib.suppress(botocore.exceptions.ClientError):
        request(Bucket=BUCKET, **arguments)
        return True
    return False


@pytest.mark.parametrize("user", sorted(seaweed.POLICIES))
def test_a_policy_allows_what_its_job_needs_and_nothing_else(s3_server, user):
    owner, mine = client(s3_server, "test"), client(s3_server, user)
    seen = {}
    for name in OBJECTS:
        key = f"acme/{name}"
        owner.put_object(Bucket=BUCKET, Key=key, Body=b"as released")
        could = {
            "get": allowed(mine.get_object, Key=key) and allowed(mine.head_object, Key=key),
            "put": allowed(mine.put_object, Key=key, Body=b"changed"),
            "delete": allowed(mine.delete_object, Key=key),
        }
        seen[name] = " ".join(action for action, done in could.items() if done)
        began = allowed(mine.create_multipart_upload, Key=key)  # large objects are written in parts
        assert began is could["put"], name
        if not could["put"] and not could["delete"]:
            assert owner.get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"as released"
    assert seen == {name: rights[user] for name, rights in OBJECTS.items()}
    assert allowed(mine.list_objects_v2, Prefix="acme/")  # else a store answers 403 for what is missing
    with pytest.raises(botocore.exceptions.ClientError) as missing:
        mine.get_object(Bucket=BUCKET, Key="acme/keys/gone.commitment.json" if user != "audit" else "acme/audits/gone")
    assert missing.value.response["ResponseMetadata"]["HTTPStatusCode"] == 404
    for request, arguments in (
        (mine.put_bucket_policy, {"Policy": seaweed.POLICIES[user]}),
        (mine.delete_bucket_policy, {}),
        (mine.put_bucket_versioning, {"VersioningConfiguration": {"Status": "Suspended"}}),
    ):
        assert not allowed(request, **arguments), request
