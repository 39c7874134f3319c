"""Fixtures that several files share: a real S3 server, and a prefix of its own for each test."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import HealthCheck, settings

from tests import seaweed

# How long an example takes is the machine's matter: run.sh lets others go first. Half of the usual examples, as there
# are many properties, which are run often.
settings.register_profile("suite", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """URL of a SeaweedFS server; the AWS variables lead to it from here to the end of the session."""
    with pytest.MonkeyPatch.context() as patch, seaweed.serve(tmp_path_factory.mktemp("s3")) as endpoint:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in seaweed.environment(endpoint).items():
            patch.setenv(name, value)
        yield endpoint


@pytest.fixture
def s3(s3_server):
    """URI of a prefix that no other test uses."""
    return f"s3://{seaweed.BUCKET}/{uuid.uuid4()}"
