"""A seeded slice of the changed checkpoints; the command takes a hundred thousand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.benchmarks.mutations import mutated

CASES = 600


@pytest.mark.timeout(300)
def test_whatever_is_changed_is_noticed_and_does_no_harm():
    command = [sys.executable, "-m", "tests.benchmarks.mutations", "--cases", str(CASES), "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["wrong"] == []
    assert (done.returncode, said["cases"]) == (0, CASES)
    # Every kind of outcome is among them: the changes reach behind the container, too.
    assert min(said["outcomes"].values()) > 5
    assert len(said["outcomes"]) == 7


def test_a_seed_always_makes_the_same_file():
    assert [mutated(seed) for seed in range(50)] == [mutated(seed) for seed in range(50)]
