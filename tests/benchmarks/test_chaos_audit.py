"""A seeded slice of the chaos of audits; the command runs a thousand."""

from __future__ import annotations

import pytest

from tests.benchmarks.chaos_audit import battlefield

#: All workers killed and a busy store; a driver killed, a store that cuts answers off, and a model that crashes.
SEEDS = (18, 24)


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_whatever_is_killed_every_row_has_the_record_that_it_deserves(tmp_path):
    with battlefield(tmp_path / "field") as field:
        for seed in SEEDS:
            told = field.audit(seed)
            assert told.wrong == []
