"""What an attacker writes harms neither the worker nor a verdict, and always comes to the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.hostile import CANARY, CASES, MEMORY_BYTES, SECONDS, prepare

#: Beside what a checkpoint may take: allocations of the audit itself.
SLACK_BYTES = 64 << 20


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """By name of the case, what came of it in a confined process."""
    folder = tmp_path_factory.mktemp("hostile")
    names = prepare(folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", str(folder)],
        input="\n".join(names),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == names, done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.rglob(CANARY))
    assert (folder / "released.st").exists()
    return dict(zip(CASES, lines, strict=True))


def test_there_are_enough_of_them():
    assert len(CASES) > 200


@pytest.mark.parametrize("name", CASES)
def test_it_comes_to_what_it_is(told, name):
    seen = told[name]
    assert seen["outcome"] in CASES[name][2], seen["message"]
    assert seen["witnessed"] == []
    assert seen["seconds"] < SECONDS
    assert seen["bytes"] < MEMORY_BYTES + SLACK_BYTES
