"""The paper's method with a keyed seed: its generator, its loss and where that settles, its stop rule."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from fwm_audit import yin2022
from fwm_audit.errors import EmbeddingError, ErrorCode, UsageError
from fwm_audit.generator import normal
from fwm_audit.key import SecretKey
from fwm_audit.target import Target
from fwm_audit.yin2022 import NOISE_SIZE, Generator, loss, make, margin, train
from tests import nets

KEY = SecretKey(bytes(range(32)))
OTHER = SecretKey(bytes(32))


def silent(progress):
    pass


def target_of(shape, *, model=None):
    if model is None:
        model = nets.convnet(classes=10)
        model[-1].weight.data *= 10  # an untrained last layer is too flat: no class gets the p of the closed form
    return Target.of(model, shape, (-1.0, 1.0), (), device=torch.device("cpu"), released="float32", dtype=torch.float64)


def noise(count):
    return normal(KEY, "test/noise", (count, NOISE_SIZE))


def narrow(target, *, triggers=100, stop_early=True, steps=1000, report=silent):
    """Training of a generator of 16 channels, at ten times the rate: a narrow network learns more slowly."""
    net = Generator(target.shape, KEY, channels=16)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.999))
    made = train(target, net, optimizer, noise(triggers), report, stop_early=stop_early, steps=steps)
    return net, *made


def gaps(target, inputs, labels):
    """The label's logit over that of the runner-up, and over all others alike at the same probability, each [N]."""
    logits = target.released(inputs.double())
    others = logits.scatter(1, labels[:, None], -math.inf)
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - others.max(1).values, own - (others.logsumexp(1) - math.log(logits.shape[1] - 1))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small layers gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    """A real classifier of 10 classes on the smallest inputs, where the generator needs no upsampling."""
    return target_of((3, 4, 4))


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1)])
def test_doubling_is_the_convolution_of_the_map_with_every_pixel_repeated(size):
    draws = torch.Generator().manual_seed(0)
    layer = yin2022._Equalised(torch.randn(6, 5, 3, 3, generator=draws, dtype=torch.float64))
    layer.bias.data = torch.randn(6, generator=draws, dtype=torch.float64)
    x = torch.randn(2, 5, *size, generator=draws, dtype=torch.float64)
    torch.testing.assert_close(
        yin2022._Doubled(layer).double()(x), layer(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    )


# ---------------------------------------------------------------------------------- where the loss settles


@pytest.mark.parametrize(("classes", "expected"), [(10, "0.99"), (100, "4.9"), (200, "6.8"), (1000, "inf")])
def test_the_margin_has_the_published_values(classes, expected):
    assert f"{margin(classes):.{len(expected.partition('.')[2])}f}" == expected


def test_the_margin_grows_with_the_classes_and_is_infinite_from_twice_the_weight_on():
    margins = [margin(classes) for classes in range(2, 301)]
    assert margins == sorted(margins)
    assert math.isfinite(margins[-2])
    assert math.isinf(margins[-1])
    assert margin(10, weight=15) > margin(10)


@pytest.mark.parametrize("classes", [2, 10, 20])
def test_free_logits_settle_at_the_margin(classes):
    """The closed form is of the population variance; the loss takes the unbiased one, as if 150 were more by 1 / BK."""
    size = 100 * classes
    labels = torch.arange(100) % classes
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(100, classes, dtype=torch.float64, generator=random).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(logits, labels)
        value.backward()
        return value

    optimizer.step(closure)
    found = logits.detach()
    each = found.gather(1, labels[:, None]) - found
    each = each[each != 0]  # [100 * (K - 1)], over every other class
    assert len(each) == 100 * (classes - 1)
    assert each.min().item() == pytest.approx(margin(classes, 150 * size / (size - 1)), abs=1e-5)
    assert each.max().item() == pytest.approx(margin(classes, 150 * size / (size - 1)), abs=1e-5)
    assert each.median().item() == pytest.approx(margin(classes), rel=0.01)


def test_a_trained_generator_settles_at_the_margin(tiny):
    """The label's probability gets there; the runner-up stays closer, as real logits of others are not alike."""
    _, inputs, labels = narrow(tiny, stop_early=False, steps=800)
    runner_up, alike = gaps(tiny, inputs, labels)
    assert alike.median().item() == pytest.approx(margin(10), rel=0.05)
    assert 0 < runner_up.min() < runner_up.median() < margin(10)


# ------------------------------------------------------------------------------------------ the stop rule


def test_training_ends_when_every_label_equals_the_key(tiny):
    seen = []
    net, inputs, labels = narrow(tiny, report=seen.append)
    assert inputs.shape == (100, 3, 4, 4)
    assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == list(range(10)) * 10
    assert torch.equal(tiny.released(inputs.double()).argmax(1), labels)
    assert [progress.done for progress in seen] == list(range(len(seen)))
    assert {(progress.stage, progress.total) for progress in seen} == {("yin2022", 1000)}
    assert len(seen) < 1000
    assert seen[-1].loss < seen[0].loss
    # The inputs are those of the generator as it is now, not as it was before its last step.
    assert torch.equal(net(noise(100)), inputs)


def test_not_a_step_is_made_beyond_that_one_unless_asked(tiny):
    seen = []
    narrow(tiny, triggers=3, report=seen.append)
    needed = seen[-1].done
    with pytest.raises(EmbeddingError):
        narrow(tiny, triggers=3, steps=needed - 1)
    narrow(tiny, triggers=3, stop_early=False, steps=needed + 9, report=seen.append)
    assert [progress.done for progress in seen[needed + 1 :]] == list(range(needed + 10))


def test_unreached_labels_are_an_error_that_counts_them(tiny):
    with pytest.raises(EmbeddingError, match=r"^\d+ of 100 triggers .* after 1 steps.*use method mirror") as caught:
        narrow(tiny, steps=1)
    assert caught.value.code is ErrorCode.PAIRS_NOT_FOUND


def test_labels_count_as_an_audit_reads_them(tiny):
    """The float32 copy that trains the generator may round a trigger to the other side of a boundary."""

    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(10, dtype=x.dtype)[-1].expand(len(x), 10)

    narrow(tiny, triggers=3, steps=100)
    with pytest.raises(EmbeddingError, match="0 of 3 triggers"):
        narrow(dataclasses.replace(tiny, twins={"float32": Last()}), triggers=3, steps=100)


def test_a_loss_of_nan_is_an_error(tiny):
    class Diverging(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10] * math.nan

    with pytest.raises(EmbeddingError, match="diverged at step 0"):
        narrow(dataclasses.replace(tiny, trainee=Diverging()))


# ------------------------------------------------------------------------------------------ batch in parts


def test_training_in_parts_is_that_of_the_whole_batch():
    shape = (3, 24, 20)
    target = target_of(shape)
    target = dataclasses.replace(target, trainee=target.released)  # float64 leaves only real differences
    assert 100 % yin2022._chunk(shape) > 0  # several parts, the last one smaller
    draws, labels = noise(100).double(), torch.arange(100) % 10
    first, plain, net = (Generator(shape, KEY, channels=8).double() for _ in range(3))
    optimizer = torch.optim.SGD(plain.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss(target.trainee(plain(draws)), labels).backward()
        optimizer.step()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with pytest.raises(EmbeddingError, match="after 2 steps"):
        train(target, net, optimizer, draws, silent, stop_early=True, steps=2)
    for start, expected, found in zip(first.parameters(), plain.parameters(), net.parameters(), strict=True):
        moved = (expected - start).abs().max()
        assert moved > 0
        assert (found - expected).abs().max() <= 1e-9 * moved


# -------------------------------------------------------------------------------------------- the generator


def test_the_generator_is_that_of_a_progressive_gan():
    """All channels to 32 pixels, then half as many at each doubling; values ~ N(0, 1) and zero biases."""
    net = Generator((3, 224, 224), KEY, channels=64)
    weights = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    widths = [(64, 64), (64, 64), (64, 64), (64, 32), (32, 16), (16, 8)]
    stages = [shape for wide, narrow in widths for shape in [(narrow, wide, 3, 3), (narrow, narrow, 3, 3)]]
    shapes = [(64 * 4 * 4, 512), (64, 64, 3, 3), *stages, (3, 8, 1, 1)]
    assert [tuple(weight.shape) for weight in weights] == shapes
    values = torch.cat([weight.flatten() for weight in weights])
    assert (values.mean().item(), values.std().item()) == pytest.approx((0, 1), abs=0.01)
    assert all((parameter == 0).all() for parameter in net.parameters() if parameter.dim() == 1)


def test_the_generator_computes_what_that_of_a_progressive_gan_does():
    """Written out as pytorch_GAN_zoo describes it: He's constant on each output, bias included."""
    net = Generator((3, 16, 16), KEY, channels=8).double()
    for parameter in net.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    weights, biases = list(net.parameters())[::2], list(net.parameters())[1::2]

    def normalised(x):
        return x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()

    def activated(x):
        return torch.where(x > 0, x, 0.2 * x)

    def layer(x):
        weight, bias = weights.pop(0), biases.pop(0)
        he = math.sqrt(2 / (weight.numel() / len(weight)))
        if weight.dim() == 2:
            return he * (x @ weight.T + bias)
        return he * nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    draws = noise(5).double()
    x = normalised(activated(layer(normalised(draws))).view(5, 8, 4, 4))
    x = normalised(activated(layer(x)))
    for _ in range(2):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = normalised(activated(layer(x)))
        x = normalised(activated(layer(x)))
    x = layer(x)
    assert weights == []
    assert torch.allclose(net(draws), x, rtol=1e-9)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 40), (1, 3, 4)])
def test_inputs_have_the_shape(shape):
    inputs = Generator(shape, KEY, channels=8)(noise(2))
    assert inputs.shape == (2, *shape)
    assert not torch.equal(inputs[0], inputs[1])


def test_layers_are_scaled_at_run_time():
    """Features of mean square 1 through weights ~ N(0, 1) and sqrt(2 / fan-in): values of mean square 2, unclamped."""
    inputs = Generator((256, 8, 8), KEY, channels=32)(noise(8))
    assert inputs.square().mean().item() == pytest.approx(2, rel=0.1)
    assert inputs.abs().max() > 3


def test_only_the_direction_of_the_noise_counts():
    net = Generator((3, 8, 8), KEY, channels=8)
    assert torch.allclose(net(noise(4)), net(5 * noise(4)), atol=1e-4)


# -------------------------------------------------------------------------------------------- from the secret


def test_the_settings_are_those_of_the_paper(tiny, monkeypatch):
    seen = {}

    def record(target, net, optimizer, noise, report, *, stop_early, steps):
        seen.update(net=net, adam=optimizer, noise=noise, stop_early=stop_early, steps=steps)
        return torch.empty(0), torch.empty(0)

    monkeypatch.setattr(yin2022, "train", record)
    make(tiny, KEY, silent)
    assert isinstance(seen["adam"], torch.optim.Adam)
    assert (seen["adam"].defaults["lr"], seen["adam"].defaults["betas"]) == (1e-4, (0.5, 0.999))
    assert seen["adam"].defaults["weight_decay"] == 0
    assert len(seen["adam"].param_groups[0]["params"]) == len(list(seen["net"].parameters()))
    assert next(seen["net"].parameters()).shape == (512 * 4 * 4, 512)
    assert seen["noise"].shape == (100, 512)
    assert (seen["noise"].mean().item(), seen["noise"].std().item()) == pytest.approx((0, 1), abs=0.01)
    assert (seen["stop_early"], seen["steps"]) == (True, 300)


def test_the_secret_makes_the_triggers_whatever_the_random_state(tiny, monkeypatch):
    """With the paper's 512 channels and rate, on 2 triggers instead of 100."""
    monkeypatch.setattr(yin2022, "COUNT", 2)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    inputs, labels = make(tiny, KEY, silent)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert inputs.shape == (2, 3, 4, 4)
    assert not inputs.requires_grad
    assert torch.equal(tiny.released(inputs.double()).argmax(1), labels)
    torch.manual_seed(2)
    again, _ = make(tiny, KEY, silent)
    assert torch.equal(again, inputs)
    other, same = make(tiny, OTHER, silent)
    assert not torch.equal(other, inputs)
    assert torch.equal(same, labels)


def test_noise_and_every_weight_come_from_the_secret():
    one, other = (Generator((3, 8, 8), key, channels=8).body for key in (KEY, OTHER))
    drawn = [parameter.flatten()[:24] for parameter in one.parameters() if parameter.dim() > 1]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)  # no two layers alike
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)) == name.endswith("bias")


def test_inputs_that_are_not_images_are_refused():
    model = nets.perceptron()
    with pytest.raises(UsageError, match=r"\[12\]: use method mirror"):
        make(target_of(model.input_shape, model=model), KEY, silent)
