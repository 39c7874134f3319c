"""From counted labels to a verdict: tables, and exact arithmetic for the statistics."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwm_audit.errors import ModelError
from fwm_audit.verdict import (
    RUNGS,
    Displacement,
    RungCount,
    Tolerance,
    Verdict,
    binomial_p_value,
    decide,
    displacement_of,
    upper_rate,
)

EXACT, FLOAT32, HALF = RUNGS
HOLDS, FAILS, EMPTY = RungCount(8, ()), RungCount(8, (3,)), RungCount(0, ())


@pytest.mark.parametrize(
    ("counts", "displacement"),
    [
        ({EXACT: HOLDS}, Displacement.NONE),
        ({EXACT: FAILS}, Displacement.UNKNOWN),
        ({EXACT: FAILS, FLOAT32: HOLDS}, Displacement.FLOAT32),
        ({EXACT: FAILS, FLOAT32: HOLDS, HALF: HOLDS}, Displacement.FLOAT32),
        ({EXACT: FAILS, FLOAT32: FAILS, HALF: HOLDS}, Displacement.HALF),
        ({EXACT: FAILS, FLOAT32: FAILS, HALF: FAILS}, Displacement.BEYOND),
        ({EXACT: HOLDS, HALF: FAILS}, Displacement.NONE),
        ({EXACT: EMPTY}, Displacement.UNKNOWN),
        ({}, Displacement.UNKNOWN),
    ],
)
def test_displacement_is_the_finest_rung_that_holds(counts, displacement):
    """None of several is 'beyond'; one alone cannot tell."""
    assert displacement_of(counts) is displacement


@pytest.mark.parametrize(
    ("counts", "tolerance", "verdict"),
    [
        ({EXACT: HOLDS}, EXACT, Verdict.INTACT),
        ({EXACT: FAILS}, EXACT, Verdict.TAMPERED),
        ({EXACT: FAILS, FLOAT32: HOLDS}, EXACT, Verdict.TAMPERED),
        ({EXACT: FAILS, FLOAT32: HOLDS}, FLOAT32, Verdict.INTACT),
        ({EXACT: FAILS, FLOAT32: FAILS, HALF: HOLDS}, FLOAT32, Verdict.TAMPERED),
        ({EXACT: FAILS, FLOAT32: FAILS, HALF: HOLDS}, HALF, Verdict.INTACT),
        ({EXACT: HOLDS}, HALF, Verdict.INTACT),
        ({EXACT: HOLDS, HALF: FAILS}, HALF, Verdict.INTACT),
    ],
)
def test_a_verdict_allows_what_the_tolerance_names_and_no_more(counts, tolerance, verdict):
    """A finer rung that holds is enough; a coarser one never is."""
    assert decide(counts, tolerance) is verdict


@pytest.mark.parametrize(
    ("counts", "tolerance"),
    [({}, EXACT), ({EXACT: EMPTY}, EXACT), ({EXACT: FAILS}, HALF), ({EXACT: FAILS, HALF: EMPTY}, HALF)],
)
def test_without_the_rung_nobody_can_tell(counts, tolerance):
    """Neither intact nor tampered: an error with its code."""
    with pytest.raises(ModelError) as error:
        decide(counts, tolerance)
    assert error.value.code == "rung_not_in_key"


@pytest.mark.parametrize(
    ("counts", "tolerance", "verdict"),
    [
        ({FLOAT32: HOLDS}, EXACT, Verdict.INTACT),
        ({FLOAT32: FAILS, HALF: HOLDS}, EXACT, Verdict.TAMPERED),
        ({HALF: HOLDS}, EXACT, Verdict.INTACT),
        ({FLOAT32: FAILS}, EXACT, Verdict.TAMPERED),
    ],
)
def test_the_finest_rung_of_a_key_decides_what_it_cannot_tell_finer(counts, tolerance, verdict):
    """A model without float64 has no exact rung; the displacement then names the rung that holds."""
    assert decide(counts, tolerance) is verdict
    assert displacement_of(counts) is not Displacement.NONE


def test_an_exact_rung_without_triggers_is_not_replaced_by_a_wider_one():
    """What should have been checked exactly and was not is an error."""
    with pytest.raises(ModelError):
        decide({EXACT: EMPTY, FLOAT32: HOLDS}, EXACT)


@given(
    counts=st.dictionaries(
        st.sampled_from(RUNGS),
        st.builds(RungCount, st.integers(0, 4), st.lists(st.integers(0, 3), max_size=2).map(tuple)),
    ),
    tolerance=st.sampled_from(Tolerance),
)
def test_intact_always_has_a_rung_that_holds(counts, tolerance):
    """No combination of counts reaches 'intact' without evidence."""
    try:
        verdict = decide(counts, tolerance)
    except ModelError:
        return
    if verdict is Verdict.INTACT:
        assert any(count.total > 0 and not count.mismatched for count in counts.values())


@given(
    total=st.integers(1, 60),
    data=st.data(),
    rate=st.fractions(Fraction(1, 1000), Fraction(999, 1000), max_denominator=1000),
)
def test_the_binomial_tail_is_the_exact_sum(total, data, rate):
    """Log-space sums agree with fractions to the accuracy of float64."""
    mismatches = data.draw(st.integers(0, total))
    exact = sum(math.comb(total, k) * rate**k * (1 - rate) ** (total - k) for k in range(mismatches, total + 1))
    assert binomial_p_value(total, mismatches, float(rate)) == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    ("total", "mismatches", "rate", "p_value"),
    [(8, 0, 0.1, 1.0), (8, 1, 0.0, 0.0), (8, 1, 1.0, 1.0), (8, 0, 0.0, 1.0), (1, 1, 0.25, 0.25)],
)
def test_the_ends_of_the_binomial_tail(total, mismatches, rate, p_value):
    """No flips prove nothing; a flip that cannot happen by chance is certain."""
    assert binomial_p_value(total, mismatches, rate) == pytest.approx(p_value)


@pytest.mark.parametrize("benign", [1, 10, 1000, 10**6])
def test_the_upper_rate_is_the_one_that_would_have_shown(benign):
    """At the bound, no flip in all comparisons has exactly a 5 % chance."""
    assert (1.0 - upper_rate(benign)) ** benign == pytest.approx(0.05)
    assert upper_rate(0) == 1.0
