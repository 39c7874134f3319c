"""A seeded slice of the chaos of audits; the command runs a thousand."""

from __future__ import annotations

import pytest

from tests.benchmarks.chaos_audit import battlefield

#: The driver is killed, the store resets connections, and a model crashes its worker.
SEED = 189


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_whatever_is_killed_every_row_has_the_record_that_it_deserves(tmp_path):
    with battlefield(tmp_path / "field") as field:
        told = field.audit(SEED)
    assert told.faults == ["driver", "reset", "exit"]
    assert told.wrong == []
