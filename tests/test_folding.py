"""Batch norms merged into convolutions: found by watching a pass, shipped by anyone's tool, checked exactly."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse

from fwm_audit import SecretKey, embed, verify
from fwm_audit.errors import UsageError
from fwm_audit.folding import find_folds, fold, without_norms
from fwm_audit.verification import float64_copy
from tests import nets

SECRET = SecretKey(bytes(range(32)))
CPU = torch.device("cpu")


def watch(model, shape):
    return find_folds(model, lambda: model(torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))))


def unsettle(model):
    """Batch-norm statistics of their own: those of a fresh module hardly do anything."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


class Shortcut(nn.Module):
    """The convolution's output goes to its batch norm and past it."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.body = nets.convnet()
        self.norm = nn.BatchNorm2d(16)
        self.norm.running_mean.fill_(0.5)

    def forward(self, x):
        y = self.body[3](self.body[:3](x))
        return self.body[6:](y + self.norm(y))


class Twice(nn.Module):
    """One convolution and one batch norm, each run twice."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.body = nets.convnet()
        self.again = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        y = self.body[:6](x)
        for _ in range(2):
            y = self.norm(self.again(y))
        return self.body[6:](y)


@pytest.mark.parametrize(
    ("make", "shape", "norms"),
    [
        (nets.convnet, (3, 16, 16), 2),
        (lambda: torchvision.models.resnet18(num_classes=5), (3, 64, 64), 20),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), (3, 64, 64), 34),
        # Its batch norms carry the activation behind them.
        (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5), (3, 64, 64), 49),
        (nets.transformer, (3, 32, 32), 0),
        (Twice, (3, 16, 16), 2),
    ],
)
def test_every_norm_behind_a_convolution_is_found_and_the_function_stays(make, shape, norms):
    torch.manual_seed(0)
    model = unsettle(make())
    folds = watch(model, shape)
    assert len(folds) == norms
    merged = fold(copy.deepcopy(model).double(), folds)
    inputs = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = copy.deepcopy(model).double()(inputs)
        assert (merged(inputs) - before).abs().max() <= 1e-9 * before.abs().max()
    left = {name for name, _ in merged.state_dict().items()}
    assert not left & {f"{norm}.running_mean" for _, norm in folds}
    assert {f"{convolution}.bias" for convolution, _ in folds} <= left
    empty = without_norms(copy.deepcopy(model), folds)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in merged.state_dict().items()}


class Dense(nn.Module):
    """A convolution, an unmerged batch norm with a name that ends alike, and a linear layer, each before its own."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.fc, self.fc_bn = nn.Linear(96, 12, bias=False), nn.BatchNorm1d(12)
        self.out_bn, self.head = nn.BatchNorm1d(12), nn.Linear(12, 5)
        nn.init.normal_(self.head.weight)

    def forward(self, x):
        y = nn.functional.adaptive_avg_pool2d(torch.relu(self.bn(self.conv(x))), 4).flatten(1)
        return self.head(self.out_bn(torch.relu(self.fc_bn(self.fc(y)))))


class InPlace(Dense):
    """The first convolution's output is rectified in place before its batch norm sees it."""

    def forward(self, x):
        y = nn.functional.adaptive_avg_pool2d(self.bn(torch.relu_(self.conv(x))), 4).flatten(1)
        return self.head(self.out_bn(torch.relu(self.fc_bn(self.fc(y)))))


def test_a_linear_layer_folds_too_and_names_that_end_alike_do_not_mislead():
    model = unsettle(Dense())
    for norm in (model.fc_bn, model.out_bn):
        norm.running_var.uniform_(0.5, 2)
    assert watch(model, (3, 16, 16)) == (("conv", "bn"), ("fc", "fc_bn"))
    triggers = embed(model, secret=SECRET, model_id="m", input_shape=(3, 16, 16), pairs=4, variants=["folded"])
    seen = verify(fuse(copy.deepcopy(model)), triggers)
    assert (seen.verdict, seen.variant) == ("intact", "folded")
    partly = dataclasses.replace(triggers, folds=(("conv", "bn"),))
    assert verify(fold(copy.deepcopy(model), partly.folds), partly).variant == "folded"
    assert verify(model, triggers).variant == "float32"


def test_a_layer_whose_output_changed_in_place_is_left_alone():
    model = unsettle(InPlace())
    assert watch(model, (3, 16, 16)) == (("fc", "fc_bn"),)
    embed(model, secret=SECRET, model_id="m", input_shape=(3, 16, 16), pairs=2, variants=["folded"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_release_in_half_precision_folds_in_it_and_keeps_buffers_that_no_file_holds(dtype):
    model = nets.Unstored().eval()
    released = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    model.load_state_dict(released)
    name = str(dtype).removeprefix("torch.")
    triggers = embed(
        model, secret=SECRET, model_id="m", input_shape=(3, 16, 16), pairs=4, variants=["folded"], released=name
    )
    # As a deployment folds the file, and an audit loads what it saved.
    merged = fold(nets.Unstored().eval().to(dtype), ())
    merged.load_state_dict(released)
    state = fold(merged, triggers.folds).state_dict()
    loaded = without_norms(copy.deepcopy(model), triggers.folds)
    loaded.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()})
    seen = verify(loaded, triggers)
    assert (seen.verdict, seen.variant) == ("intact", "folded")


@pytest.fixture(scope="module")
def shipped():
    """A model, its key, and the model as torch.fx folds it, which knows nothing of this package."""
    model = nets.convnet()
    triggers = embed(
        model, secret=SECRET, model_id="m", input_shape=(3, 16, 16), pairs=6, variants=["folded", "bfloat16"]
    )
    return model, triggers, fuse(copy.deepcopy(model))


def test_what_another_tool_folded_is_intact_and_exactly_checked(shipped):
    model, triggers, merged = shipped
    seen = verify(merged, triggers)
    assert (seen.verdict, seen.variant, seen.displacement) == ("intact", "folded", "none")
    for same in (model, nn.DataParallel(model)):
        assert (verify(same, triggers).verdict, verify(same, triggers).variant) == ("intact", "float32")
    assert verify(nn.DataParallel(merged), triggers).variant == "folded"
    edited = copy.deepcopy(merged)
    weight = dict(edited.named_parameters())["3.weight"].data.view(-1)
    weight[3] = torch.nextafter(weight[3], weight.new_tensor(9.0))
    assert verify(edited, triggers).verdict == "tampered"


def test_an_undeclared_fold_is_tampering(shipped):
    model, _, merged = shipped
    triggers = embed(model, secret=SECRET, model_id="m", input_shape=(3, 16, 16), pairs=4)
    seen = verify(merged, triggers)
    assert (seen.verdict, seen.variant) == ("tampered", "float32")


def test_the_key_is_the_one_without_the_variant(shipped):
    model, triggers, _ = shipped
    assert {rung.variant for rung in triggers.rungs} == {"float32", "folded", "bfloat16"}
    assert triggers.folds == (("0", "1"), ("3", "4"))
    inputs, labels = triggers.materialise(triggers.rungs_of("folded")[0])
    assert torch.equal(float64_copy(fold(copy.deepcopy(model), triggers.folds), CPU)(inputs).argmax(1), labels)


@pytest.mark.parametrize("make", [nets.perceptron, nets.transformer, Shortcut])
def test_nothing_to_fold_and_no_true_fold_are_refused(make):
    model = make().eval()
    with pytest.raises(UsageError, match="folded"):
        embed(model, secret=SECRET, model_id="m", input_shape=model.input_shape, pairs=2, variants=["folded"])
