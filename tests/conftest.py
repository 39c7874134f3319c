"""Fixtures that several files share: a real S3 server, and a prefix of its own for each test."""

from __future__ import annotations

import os
import uuid

import pytest

from tests import seaweed

if "PYTEST_XDIST_WORKER" in os.environ:
    # One of several processes: threads that wait for each other on cores that others use take many times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """In several processes (`-n 2`): one of them has all clusters, from the beginning, and a file stays together."""
    clusters = {item.path for item in items if item.get_closest_marker("ray")}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.path in clusters else item.path.name))
    items.sort(key=lambda item: item.path not in clusters)


def pytest_runtest_setup(item):
    # Ray's workers are nice to others (15): what computes beside them has to be nicer, or their deadlines pass.
    if "PYTEST_XDIST_WORKER" in os.environ and item.get_closest_marker("xdist_group").args != ("ray",):
        os.setpriority(os.PRIO_PROCESS, 0, 19)


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
