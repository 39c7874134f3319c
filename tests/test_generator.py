"""Everything about the generator is fixed by the key, and by nothing else."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fwm_audit.generator import NOISE_SIZE, Generator, class_pairs, noise, normal
from fwm_audit.key import SecretKey

KEY = SecretKey(bytes(32))


@given(st.integers(2, 40), st.binary(min_size=32, max_size=32))
def test_pairs_come_in_rings_of_all_classes(classes, secret):
    """K / 2 pairs involve every class; K pairs put every class on both sides of one boundary each."""
    ring = list(itertools.islice(class_pairs(SecretKey(secret), classes), classes))
    assert all(a != b for a, b in ring)
    assert Counter(a for a, _ in ring) == Counter(b for _, b in ring) == Counter(range(classes))
    assert {c for pair in ring[: (classes + 1) // 2] for c in pair} == set(range(classes))


def test_pairs_differ_by_key_and_go_on():
    def first(key):
        return list(itertools.islice(class_pairs(key, 10), 30))

    assert first(KEY) == first(KEY) != first(SecretKey(bytes([1] * 32)))
    assert first(KEY)[:10] != first(KEY)[10:20]


def test_normal_values_are_normal_and_keyed():
    values = normal(KEY, "test", (200_001,)).double()
    assert abs(values.mean().item()) < 0.01
    assert abs(values.std().item() - 1) < 0.01
    assert abs((values**4).mean().item() - 3) < 0.1  # the fourth moment tells a normal from a uniform
    assert torch.isfinite(values).all()
    assert torch.equal(normal(KEY, "a", (3, 5)), normal(KEY, "a", (3, 5)))
    assert not torch.equal(normal(KEY, "a", (3, 5)), normal(KEY, "b", (3, 5)))
    assert torch.equal(noise(KEY, [4, 2])[1], normal(KEY, "noise/2", (NOISE_SIZE,)))


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 28, 28), (3, 17, 30), (2, 5, 5), (12,), (7, 9)])
def test_inputs_have_the_shape_and_range(shape):
    inputs = Generator(shape, (0.0, 255.0), KEY)(noise(KEY, [0, 1]))
    assert inputs.shape == (2, *shape)
    assert 0 <= inputs.min() < inputs.max() <= 255
    assert not torch.equal(inputs[0], inputs[1])


def test_the_generator_neither_uses_nor_moves_the_global_random_state():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = Generator((1, 28, 28), (-1.0, 1.0), KEY).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    other = Generator((1, 28, 28), (-1.0, 1.0), KEY).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
