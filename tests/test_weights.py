"""Weights are held once, in the dtype of their file where they are many, and compute what float64 ones do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fwm_audit import weights
from fwm_audit.architectures import build
from fwm_audit.errors import CheckpointError, ModelError
from fwm_audit.verification import ask
from fwm_audit.weights import Widened, held_bytes, load, loaded_bytes, skeleton, twin


class Recurrent(nn.Module):
    """Keeps its weights in a list, too."""

    input_shape = (7, 12)

    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(12, 20, batch_first=True)
        self.head = nn.Bilinear(20, 20, 5)

    def forward(self, x):
        last = self.body(x)[0][:, -1]
        return self.head(last, last)


class Curious(nn.Module):
    """Looks at its weight in every way before it uses it."""

    input_shape = (12,)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 12, generator=torch.Generator().manual_seed(0)))
        self.table = nn.Embedding(4, 6)

    def forward(self, x):
        assert self.weight.dtype == next(self.parameters()).dtype == torch.float64
        assert (len(self.weight), self.weight.numel(), tuple(self.weight.shape)) == (6, 72, (6, 12))
        assert self.weight.is_floating_point()
        assert torch.is_floating_point(self.weight)
        assert self.weight.dim() == 2
        x = x.to(self.weight.dtype)
        scaled = x @ self.weight.T * (1 / self.weight.norm())
        index = torch.arange(len(x)) % 4
        return torch.einsum("nk,kd->nk", scaled, self.weight.data) + self.table(index) + self.weight[:, 0]


def _networks():
    torch.manual_seed(1)
    yield "convnet", build("factory:tests.nets:convnet", ["tests"]), (3, 16, 16)
    yield "transformer", build("factory:tests.nets:transformer", ["tests"]), (3, 32, 32)
    yield (
        "torch transformer",
        nn.Sequential(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(84, 5)),
        (7, 12),
    )
    yield "depthwise", build("torchvision:mobilenet_v3_small?num_classes=10"), (3, 32, 32)
    yield "tied", build("factory:tests.nets:Tied", ["tests"]), (12,)
    yield "recurrent", Recurrent(), Recurrent.input_shape
    yield "curious", Curious(), Curious.input_shape


NETWORKS = {name: (model.eval(), shape) for name, model, shape in _networks()}


def _loaded(model, monkeypatch, dtype, *, as_stored):
    monkeypatch.setattr(weights, "build", lambda *_: copy.deepcopy(model))
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    return load(twin(skeleton("any", [])), state, as_stored=as_stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_as_stored_compute_what_float64_ones_do(name, dtype, monkeypatch):
    model, shape = NETWORKS[name]
    monkeypatch.setattr(weights, "_PIECE", 50)  # linear layers in several pieces
    expected = _loaded(model, monkeypatch, dtype, as_stored=False)
    stored = _loaded(model, monkeypatch, dtype, as_stored=True)
    assert isinstance(stored, Widened)
    assert {t.dtype for t in stored.model.parameters() if t.dim() > 1} == {dtype}
    inputs = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        seen, wanted = ask(stored, inputs), ask(expected, inputs)
    assert seen.dtype == torch.float64
    assert (seen - wanted).abs().max() < 1e-12 * wanted.abs().max()
    assert stored.to(torch.float64) is stored
    with torch.no_grad():
        assert torch.equal(ask(stored.to(torch.float64).whole(), inputs), wanted)


class Narrow(nn.Module):
    """Computes in float32 somewhere, after all."""

    def __init__(self, how):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.how = how

    def forward(self, x):
        return self.how(x @ self.weight, self.weight)


@pytest.mark.parametrize(
    "how",
    [
        lambda x, w: x.float().double() + w,
        lambda x, w: torch.empty(4, 4).copy_(x) + w,
        lambda x, w: x + w.add_(1),
        lambda x, w: functional.relu_(w) + x,
    ],
)
def test_what_leaves_float64_or_writes_to_weights_is_refused(how, monkeypatch):
    stored = _loaded(Narrow(how), monkeypatch, torch.float32, as_stored=True)
    with pytest.raises(TypeError), torch.no_grad():
        stored(torch.ones(4, 4, dtype=torch.float64))
    with torch.no_grad():
        assert stored.whole()(torch.ones(4, 4, dtype=torch.float64)).shape == (4, 4)


def test_weights_are_the_modules_own(monkeypatch):
    """Also where the file stores them in float64: what a module writes to them is not written to another's."""
    monkeypatch.setattr(weights, "build", lambda *_: nn.Linear(3, 2))
    tensors = {"weight": torch.ones(2, 3, dtype=torch.float64), "bias": torch.ones(2)}
    held = load(skeleton("any", []), tensors).state_dict()
    for tensor in tensors.values():
        tensor.zero_()
    assert all(tensor.all() for tensor in held.values())


def test_a_skeleton_takes_no_memory_and_its_twins_share_none(monkeypatch):
    model, _ = NETWORKS["torch transformer"]
    monkeypatch.setattr(weights, "build", lambda *_: copy.deepcopy(model))
    empty = skeleton("any", [])
    assert loaded_bytes(empty) == 2 * sum(tensor.nbytes for tensor in model.state_dict().values())
    assert held_bytes(empty) == held_bytes(twin(empty)) < 200
    state = model.state_dict()
    one, other = load(twin(empty), state), load(twin(empty), {name: tensor + 1 for name, tensor in state.items()})
    assert held_bytes(one) == loaded_bytes(one) == loaded_bytes(empty)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, state[name].double())
        assert torch.equal(other.state_dict()[name], (state[name] + 1).double())
        assert tensor.data_ptr() != state[name].data_ptr()
    assert held_bytes(empty) < 200


@pytest.mark.parametrize("as_stored", [False, True])
def test_weights_that_are_one_must_be_one_in_the_file(monkeypatch, as_stored):
    layers = [nn.Linear(5, 5, bias=False) for _ in range(3)]
    for layer in layers:
        layer.weight = layers[0].weight
    model = nn.Sequential(*layers)
    monkeypatch.setattr(weights, "build", lambda *_: copy.deepcopy(model))
    same = torch.ones(5, 5)
    load(twin(skeleton("any", [])), dict.fromkeys(("0.weight", "1.weight", "2.weight"), same), as_stored=as_stored)
    for name in ("0.weight", "1.weight", "2.weight"):
        state = dict.fromkeys(("0.weight", "1.weight", "2.weight"), same) | {name: same + 1}
        with pytest.raises(CheckpointError, match="tied"):
            load(twin(skeleton("any", [])), state, as_stored=as_stored)


class Aliasing(nn.Module):
    """Answers with a tensor that is its weight's memory under another name, in no state dict."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.register_buffer("table", self.body.weight.data, persistent=False)

    def forward(self, x):
        return x @ self.table


def test_weights_that_stand_under_another_name_outside_the_checkpoint_are_refused(monkeypatch):
    monkeypatch.setattr(weights, "build", lambda *_: Aliasing())
    with pytest.raises(ModelError, match="shares its memory"):
        skeleton("any", [])


def test_a_difference_is_found_in_whichever_part(monkeypatch):
    monkeypatch.setattr(weights, "_PIECE", 2)
    given = torch.arange(7.0)
    for at in range(7):
        other = given.double()
        assert weights._equal(other, given)
        other[at] += 1
        assert not weights._equal(other, given)
    assert not weights._equal(given[:6], given)
