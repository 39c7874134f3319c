"""What is replaced in float64 passes computes the same, and nothing else is replaced."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fwm_audit import SecretKey, arithmetic, embed, verification
from fwm_audit.arithmetic import float64_mode
from fwm_audit.verdict import RungCount
from fwm_audit.verification import ask, float64_copy, verify_copy
from tests import nets

small = st.integers(1, 3)
POINTWISE = {
    "channels": 8, "kernel": (1, 1), "stride": 1, "padding": 0, "dilation": 1, "depthwise": False, "bias": True,
    "channels_last": True, "seed": 0,
}  # fmt: skip


@given(
    channels=st.sampled_from([1, 8, 16, 24]),
    kernel=st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    stride=st.one_of(small, st.tuples(small, small)),
    padding=st.one_of(st.just(0), st.integers(0, 3), st.tuples(st.integers(0, 3), st.integers(0, 3)), st.just("valid")),
    dilation=st.one_of(small, st.tuples(small, small)),
    depthwise=st.booleans(),
    bias=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 100),
)
@example(**POINTWISE)
@example(**POINTWISE | {"bias": False})
@example(**POINTWISE | {"stride": 2})
@example(**POINTWISE | {"padding": 1})
def test_a_convolution_is_torchs(channels, kernel, stride, padding, dilation, depthwise, bias, channels_last, seed):
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, channels, 14, 15, generator=draws, dtype=torch.float64)
    if channels_last:
        inputs = inputs.to(memory_format=torch.channels_last)
    groups, answers = (channels, channels) if depthwise else (1, 9)
    weight = torch.randn(answers, channels // groups, *kernel, generator=draws, dtype=torch.float64)
    offset = torch.randn(answers, generator=draws, dtype=torch.float64) if bias else None
    how = (stride, padding, dilation, groups)
    expected = torch.conv2d(inputs, weight, offset, *how)
    with torch.no_grad(), float64_mode(inputs):
        seen = torch.conv2d(inputs, weight, offset, *how)
        named = functional.conv2d(
            inputs, weight, bias=offset, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
    assert seen.shape == expected.shape
    assert (seen - expected).abs().max() < 1e-13 * (1 + expected.abs().max())
    assert torch.equal(seen, named)


@pytest.mark.parametrize("size", [(5, 6), (1, 6), (5, 1), (1, 1)])
def test_a_part_of_a_batch_is_read_where_it_lies(size):
    layer = nn.Conv2d(16, 16, 3, padding=1, groups=16).double()
    inputs = torch.randn(3, 16, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = layer(inputs)
        for part, answer in zip(inputs.split(1), expected.split(1), strict=True):
            with float64_mode(part):
                assert (layer(part) - answer).abs().max() < 1e-14


@pytest.fixture
def replaced(monkeypatch):
    """Shapes of the inputs of depthwise convolutions that our own computed."""
    shapes = []

    def spy(*args, **kwargs):
        shapes.append(tuple(args[0].shape))
        return arithmetic._conv2d(*args, **kwargs)

    monkeypatch.setitem(arithmetic._FAST, torch.conv2d, spy)
    return shapes


class Folding(nn.Module):
    """Takes the output of a depthwise convolution for a contiguous one, and writes to its input before that."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)

    def forward(self, x):
        return self.depthwise(x.mul_(2)).view(len(x), -1)


def test_a_model_that_insists_on_a_layout_answers_as_ever(replaced):
    torch.manual_seed(0)
    model = Folding().double()
    inputs = torch.randn(3, 16, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = model(inputs.clone())
        assert torch.equal(ask(model, inputs.clone()), expected)
    assert replaced == [(3, 16, 8, 8)]


def test_other_dtypes_and_gradients_are_torchs_own(replaced):
    layer = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Flatten())
    inputs = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert torch.equal(ask(layer, inputs), layer(inputs))
    layer.double()
    assert torch.equal(ask(layer, inputs.double()), layer(inputs.double()))
    assert replaced == []


@pytest.mark.parametrize("name", ["hardswish", "hardsigmoid"])
def test_the_exact_activations_are_those_of_the_cpu(name, monkeypatch):
    """They are for CUDA, where PyTorch rounds a constant; here its own are exact and can be compared with."""
    monkeypatch.setattr(arithmetic, "_FAST", arithmetic._EXACT)
    function = getattr(functional, name)
    inputs = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    expected = function(inputs)
    with torch.no_grad(), float64_mode(inputs):
        assert (function(inputs) - expected).abs().max() < 1e-15
        written = inputs.clone()
        assert function(written, inplace=True) is written
        assert (function(input=inputs) - written).abs().max() == 0


def test_on_a_processor_that_a_key_was_not_tried_on_the_cpu_has_the_last_word(monkeypatch):
    """A GPU whose kernels compute less than float64 is stood in for; on a real one, tests/test_gpu.py does the same."""
    model = nets.convnet()
    key = embed(model, secret=SecretKey(bytes(32)), model_id="m", input_shape=model.input_shape, pairs=4, device="cpu")
    count = verification._count

    def counted(model, triggers, rung, device):
        return RungCount(rung.triggers, (0,)) if device.type == "cuda" else count(model, triggers, rung, device)

    monkeypatch.setattr(verification, "_count", counted)

    def seen(model, measured):
        known = dataclasses.replace(key, environment=key.environment | {"measured": measured})
        twin = float64_copy(model, torch.device("cpu"))
        return verify_copy(twin, known, "exact", variant="float32", device=torch.device("cuda"))

    untried = seen(model, "cpu")
    assert (untried.verdict, untried.device, untried.forward_passes) == ("intact", "cpu", 16)
    assert (seen(model, "cpu cuda").verdict, seen(model, "cpu cuda").device) == ("tampered", "cuda")
    with torch.no_grad():
        model[8].bias[0] += 1e-6
    assert (seen(model, "cpu").verdict, seen(model, "cpu").device) == ("tampered", "cpu")
