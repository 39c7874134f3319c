"""A key made for a model reveals edits of its function, ignores everything else, and leaves it alone."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import math
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fwm_audit import MasterSecret, SecretKey, TriggerSet, calibration, embed, verify, yin2022
from fwm_audit.calibration import Covered, last_bit
from fwm_audit.errors import EmbeddingError, ErrorCode, FwmError, KeyFileError, ModelError, UsageError
from fwm_audit.generator import normal
from fwm_audit.peers import Peers
from fwm_audit.target import gap_and_lead
from fwm_audit.triggers import levels, place, quantise
from fwm_audit.verdict import Tolerance
from fwm_audit.verification import float64_copy
from fwm_audit.waking import Waking, features
from tests import nets

SECRET = SecretKey(bytes(range(32)))
CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden"


def embedded(model, **settings):
    settings = {"secret": SECRET, "model_id": "m", "input_shape": model.input_shape, "pairs": 5} | settings
    return embed(model, **settings)


def digest(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    flags = [(name, p.requires_grad, p.dtype, p.data_ptr()) for name, p in model.named_parameters()]
    return hashlib.sha256(buffer.getvalue()).hexdigest(), flags, model.training


@pytest.fixture(scope="module", params=["convnet", "perceptron", "transformer"])
def watermarked(request):
    model = getattr(nets, request.param)()
    before = digest(model)
    triggers = embedded(model, variants=["float16"])
    assert digest(model) == before
    return model, triggers


@pytest.fixture(scope="module")
def conv():
    model = nets.convnet()
    return model, embedded(model, pairs=8)


# ------------------------------------------------------------------------------------------ what a key is


def test_every_trigger_stands_at_delta_with_its_keyed_label_on_top(watermarked):
    model, triggers = watermarked
    exact = triggers.rungs[0]
    inputs, labels = triggers.materialise(exact)
    gap, lead = gap_and_lead(float64_copy(model, CPU)(inputs), triggers.classes.repeat_interleave(2, 0))
    side = torch.tensor([1.0, -1.0]).repeat(triggers.pairs)
    assert exact.name is Tolerance.EXACT
    assert exact.delta >= 8 * exact.noise
    assert (gap - side * exact.delta).abs().max() <= exact.delta / 4 + exact.noise
    assert (lead > 0).all()
    assert torch.equal(labels.view(-1, 2), triggers.classes)
    assert verify(model, triggers).displacement == "none"


def test_the_model_is_left_alone_in_training_mode_too():
    model = nets.convnet().train()
    before = digest(model)
    triggers = embedded(model)
    assert digest(model) == before
    assert verify(model, triggers).verdict == "intact"
    assert digest(model) == before


def test_the_same_secret_makes_the_same_key_whatever_the_random_state(conv):
    model, triggers = conv
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = embedded(model, pairs=8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(again.images, triggers.images)
    assert torch.equal(again.rungs[0].t, triggers.rungs[0].t)
    other = embedded(model, pairs=8, secret=SecretKey(bytes(32)))
    assert other.key_id != triggers.key_id
    assert not torch.equal(other.images, triggers.images)


def test_a_sealed_key_comes_back_bit_for_bit(watermarked, tmp_path):
    model, triggers = watermarked
    master = MasterSecret.generate()
    triggers.save(tmp_path / "k.fwmkey", master=master)
    loaded = TriggerSet.load(tmp_path / "k.fwmkey", master=master)
    for mine, theirs in zip(triggers.rungs, loaded.rungs, strict=True):
        for a, b in zip(triggers.materialise(mine), loaded.materialise(theirs), strict=True):
            assert torch.equal(a, b)
    assert loaded.coverage == triggers.coverage
    assert verify(model, loaded) == verify(model, triggers)
    with pytest.raises(KeyFileError) as caught:
        TriggerSet.load(tmp_path / "missing", master=master)
    assert caught.value.code is ErrorCode.KEY_MISSING


def test_the_default_budget_costs_32_passes():
    model = nets.convnet(classes=10)
    seen = verify(model, embed(model, secret=SECRET, model_id="m", input_shape=(3, 16, 16)))
    assert (seen.verdict, seen.total, seen.forward_passes, seen.dtype) == ("intact", 32, 32, "float64")


class LabelsOnly(nn.Module):
    """Serves a model as an endpoint that returns labels."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(x.dtype)


def test_labels_are_all_that_counts(watermarked):
    model, triggers = watermarked
    edited = copy.deepcopy(model)
    _noise(edited)
    assert verify(LabelsOnly(model), triggers) == verify(model, triggers)
    assert verify(LabelsOnly(edited), triggers) == verify(edited, triggers)
    assert verify(LabelsOnly(edited), triggers).verdict == "tampered"


def test_16_pairs_of_the_least_compressible_images_take_at_most_2600_kb(conv):
    """At 3 x 224 x 224, with images and masks of pure noise."""
    _, triggers = conv
    shape = (16, 3, 224, 224)
    random = torch.Generator().manual_seed(0)
    exact = triggers.rungs[0]
    rungs = tuple(
        dataclasses.replace(exact, index=torch.arange(16), t=torch.randn(16, 2, generator=random).double())
        for _ in range(9)
    )
    large = dataclasses.replace(
        triggers,
        input_shape=shape[1:],
        classes=torch.zeros(16, 2, dtype=torch.int64),
        images=quantise(2 * torch.rand(shape, generator=random) - 1, (-1.0, 1.0)),
        signs=torch.rand(shape, generator=random) < 0.5,
        rungs=rungs,
    )
    assert len(large.seal(MasterSecret.generate())) <= 2_600_000


@pytest.mark.parametrize("number", [1, 2])
def test_keys_of_every_format_still_verify(number):
    """Sealed by the release that introduced the format, for a perceptron whose weights are sines."""
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    for position, parameter in enumerate(model.parameters()):
        steps = torch.arange(parameter.numel(), dtype=torch.float64) + 10 * position
        parameter.data = torch.sin(1.7 * steps).reshape(parameter.shape).float()
    master = MasterSecret(bytes(range(32, 64)))
    triggers = TriggerSet.load(GOLDEN / f"key-format-{number}.fwmkey", master=master)
    assert (triggers.model_id, triggers.pairs, triggers.variants) == ("golden", 4, ("float32", "float16"))
    assert verify(model, triggers).verdict == "intact"
    assert verify(copy.deepcopy(model).half(), triggers).variant == "float16"
    model[0].weight.data[1, 1] = torch.nextafter(model[0].weight.data[1, 1], torch.tensor(9.0))
    assert verify(model, triggers).verdict == "tampered"


def test_a_key_of_a_later_format_says_what_to_do(conv):
    _, triggers = conv
    master = MasterSecret.generate()
    sealed = master.seal(b"", {"format": 3, "model_id": "m", "key_id": "0" * 16})
    with pytest.raises(KeyFileError, match="upgrade"):
        TriggerSet.unseal(sealed, master)
    assert TriggerSet.unseal(triggers.seal(master), master).key_id == triggers.key_id


def test_another_process_rebuilds_the_same_bits(conv, tmp_path):
    _, triggers = conv
    master = MasterSecret.generate_file(tmp_path / "master.key")
    triggers.save(tmp_path / "k.fwmkey", master=master)
    script = (
        "import sys, hashlib, torch; torch.set_num_threads(int(sys.argv[1]))\n"
        "from fwm_audit import MasterSecret, TriggerSet\n"
        "key = TriggerSet.load(sys.argv[2], master=MasterSecret.from_file(sys.argv[3]))\n"
        "data = b''.join(key.materialise(rung)[0].numpy().tobytes() for rung in key.rungs)\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, threads, str(tmp_path / "k.fwmkey"), str(tmp_path / "master.key")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    mine = b"".join(triggers.materialise(rung)[0].numpy().tobytes() for rung in triggers.rungs)
    assert digests == {hashlib.sha256(mine).hexdigest() + "\n"}


def test_quantised_levels_are_64_and_survive_the_round_trip():
    for input_range in ((-1.0, 1.0), (0.0, 255.0), (-2.1, 2.6)):
        low, high = input_range
        every = quantise(levels(input_range), input_range)
        assert len(every.unique()) == 64
        assert torch.equal(quantise(levels(input_range)[every.long()], input_range), every)
        away = (levels(input_range)[every.long()] - levels(input_range)).abs().max()
        assert away <= (high - low) * (0.5 / 63 + 0.5 / 255)
        beyond = torch.tensor([low - 1, high + 1], dtype=torch.float64)
        assert quantise(beyond, input_range).tolist() == [0, 255]
        assert levels(input_range)[[0, 255]].tolist() == pytest.approx(input_range)
    t = torch.tensor([0.001, -0.25], dtype=torch.float64)
    signs = torch.tensor([[True, False], [False, True]])
    placed = place(torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8), signs, t, (-1.0, 1.0))
    assert placed.tolist() == [[-1 + 0.001, 1 - 0.001], [1 + 0.25, -1 - 0.25]]


# ---------------------------------------------------------------------------------------------- detected


def _sgd_step(model, lr, *, train=False):
    model.train(train)
    inputs = torch.randn(8, *model.input_shape, generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(model(inputs), torch.arange(8) % 4)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(lr * parameter.grad)
    model.eval()


def _last_layer(model):
    *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    last.weight.data *= 1 + 1e-6


def _prune(model):
    weights = torch.cat([p.data.flatten() for p in model.parameters() if p.dim() > 1])
    limit = weights.abs().kthvalue(max(1, len(weights) // 1000)).values
    for p in model.parameters():
        if p.dim() > 1:
            p.data[p.data.abs() <= limit] = 0


def _noise(model):
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 1e-7 * torch.randn(p.shape, generator=generator)


def _batch_norm_statistics(model):
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(1e-6)


def _swap(model):
    for p in model.parameters():
        p.data = p.data.flip(0)


EDITS = {
    "one SGD step at 1e-6": lambda model: _sgd_step(model, 1e-6),
    "one SGD step at 1e-6, batch norm in training mode": lambda model: _sgd_step(model, 1e-6, train=True),
    "last layer": _last_layer,
    "pruning 0.1 %": _prune,
    "noise 1e-7": _noise,
    "another model": _swap,
    "batch norm statistics": _batch_norm_statistics,
}


@pytest.mark.parametrize("edit", EDITS)
def test_detected(watermarked, edit):
    model, triggers = watermarked
    edited = copy.deepcopy(model)
    edited.input_shape = model.input_shape
    EDITS[edit](edited)
    if edit == "batch norm statistics" and not any("running" in name for name, _ in model.named_buffers()):
        assert verify(edited, triggers).verdict == "intact"  # nothing was there to edit
        return
    seen = verify(edited, triggers)
    assert seen.verdict == "tampered"
    assert seen.matches < seen.total
    assert seen.p_value < 1
    assert len(seen.mismatched) == seen.total - seen.matches


@pytest.mark.parametrize("pairs", [1, 8])
def test_one_flipped_bit_is_seen_as_often_as_the_coverage_says(pairs):
    """Flips of the last mantissa bit, the smallest edit there is, over weights drawn uniformly."""
    model = nets.convnet(classes=10)
    model[3].weight.data[:, ::2] *= 1e-6  # half a layer of weights whose last bits are too small to be seen
    triggers = embedded(model, pairs=pairs)
    generator = torch.Generator().manual_seed(5)
    parameters = list(model.parameters())
    sizes = torch.tensor([float(p.numel()) for p in parameters])
    seen = 0
    tries = 150
    for _ in range(tries):
        parameter = parameters[torch.multinomial(sizes, 1, generator=generator)].data.view(-1)
        index = torch.randint(len(parameter), (1,), generator=generator)
        kept = parameter[index].clone()
        parameter.view(torch.int32)[index] ^= 1
        seen += verify(model, triggers).verdict == "tampered"
        parameter[index] = kept
    assert verify(model, triggers).verdict == "intact"
    expected = triggers.coverage.total
    assert abs(seen / tries - expected) < 3 * math.sqrt(expected * (1 - expected) / tries)


class StoppedError(Exception):
    pass


class Kept:
    """Keeps states in memory, and interrupts the embedding after so many of them."""

    def __init__(self, blocks):
        self.states, self.blocks, self.loads = [], blocks, 0

    def load(self):
        self.loads += 1
        return self.states[-1] if self.states else None

    def save(self, state):
        self.states.append(state)
        if len(self.states) == self.blocks:
            raise StoppedError


@pytest.mark.parametrize("settings", [{"pairs": 12, "variants": ["float16"]}, {"pairs": 4, "coverage": 0.97}])
def test_an_interrupted_embedding_goes_on_to_the_same_triggers(settings):
    model = nets.convnet()
    expected = embedded(model, **settings)
    kept = Kept(blocks=1)
    while True:
        try:
            found = embedded(model, keeper=kept, **settings)
        except StoppedError:
            kept.blocks += 1
        else:
            break
    assert len(kept.states) == kept.loads - 1 > 1
    assert_same(found, expected)


def assert_same(found, expected):
    for name in ("classes", "images", "signs"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for mine, theirs in zip(found.rungs, expected.rungs, strict=True):
        assert torch.equal(mine.t, theirs.t)
        assert torch.equal(mine.index, theirs.index)
        assert (mine.delta, mine.shift) == (theirs.delta, theirs.shift)
    assert (found.coverage, found.datasheet) == (expected.coverage, expected.datasheet)


SHARED = {"pairs": 12, "variants": ["float16"]}


def group(rank, size, folder):
    """What one rank of a group leaves in its files, in a process of its own."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.save([sum_of_units(Peers.current(), count) for count in COUNTS], folder / f"{rank}.pt")
    embedded(nets.convnet(), **SHARED).save(folder / f"{rank}.fwmkey", master=MasterSecret(bytes(range(32))))
    # Gloo's threads would still run when the process ends, which it may not survive.
    torch.distributed.destroy_process_group()


def units(count):
    return torch.randn(count, 1000, generator=torch.Generator().manual_seed(count))


def sum_of_units(peers, count):
    values = list(units(count))
    return peers.total(peers.share(values), count, values[0])


COUNTS = range(1, 8)
RANKS = 3  # one of them has less to do than the others


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """The folder of a group's files."""
    folder = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(group, (RANKS, folder), nprocs=RANKS)
    return folder


@pytest.fixture
def _one_thread():
    """More of them sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_any_number_of_ranks_adds_in_the_same_order(grouped):
    for count in COUNTS:
        expected, backwards = torch.zeros(1000), torch.zeros(1000)
        for value in units(count):
            expected += value
        for value in units(count).flip(0):
            backwards += value
        assert count < 3 or not torch.equal(expected, backwards)  # the order shows
        assert torch.equal(sum_of_units(Peers(0, 1), count), expected)
        for rank in range(RANKS):
            assert torch.equal(torch.load(grouped / f"{rank}.pt")[count - 1], expected)


@pytest.mark.usefixtures("_one_thread")
def test_any_number_of_ranks_makes_the_same_key(grouped):
    alone = embedded(nets.convnet(), **SHARED)
    for rank in range(RANKS):
        assert_same(TriggerSet.load(grouped / f"{rank}.fwmkey", master=MasterSecret(bytes(range(32)))), alone)


def test_a_large_key_gives_up_dead_units_and_tells_the_distance_by_few_pairs(monkeypatch):
    model = nets.convnet()
    model[4].bias.data[0] = -100.0  # behind the second convolution: no input raises it
    asked = []

    def waking(model, asleep, *others):
        asked.append({name: units.tolist() for name, units in asleep.items()})
        return Waking(model, asleep, *others)

    monkeypatch.setattr("fwm_audit.embedding.Waking", waking)
    triggers = embedded(model, pairs=100)
    assert triggers.pairs == 100
    assert len(asked) == 6  # the first block knows of no sleepers yet, the last one has given up
    assert sum(0 in units.get("4.bias", []) for units in asked) == 4
    exact, *wide = triggers.rungs
    assert len(exact.index) == 100
    assert wide
    assert all(16 <= len(rung.index) <= 32 for rung in wide)
    assert verify(model, triggers).verdict == "intact"
    cast = copy.deepcopy(model).half()
    assert verify(cast, triggers).displacement in {"float32", "half"}


# ------------------------------------------------------------------------------------- correctly ignored


def test_ignored_reserialisation_and_threads(watermarked):
    model, triggers = watermarked
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    copied = copy.deepcopy(model)
    copied.load_state_dict(torch.load(buffer, weights_only=True))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert verify(copied, triggers).verdict == "intact"
    finally:
        torch.set_num_threads(threads)


def test_ignored_permuted_channels(conv):
    """The same function from other bytes: the first convolution's channels in another order."""
    model, triggers = conv
    permuted = copy.deepcopy(model)
    order = torch.randperm(len(permuted[0].weight), generator=torch.Generator().manual_seed(2))
    permuted[0].weight.data = permuted[0].weight.data[order]
    for tensor in (*permuted[1].parameters(), permuted[1].running_mean, permuted[1].running_var):
        tensor.data = tensor.data[order]
    permuted[3].weight.data = permuted[3].weight.data[:, order]
    assert verify(permuted, triggers).verdict == "intact"


# ------------------------------------------------------------------------------- variants and displacement


def test_a_declared_variant_is_exact_and_as_sensitive(watermarked):
    model, triggers = watermarked
    shipped = copy.deepcopy(model).half()
    seen = verify(shipped, triggers)
    assert (seen.verdict, seen.variant, seen.displacement) == ("intact", "float16", "none")
    *_, last = (layer for layer in shipped.modules() if isinstance(layer, nn.Linear))
    last.bias.data[triggers.classes[0, 0]] += 0.01
    assert verify(shipped, triggers).verdict == "tampered"


def test_displacement_names_the_finest_rung_that_holds(conv):
    model, triggers = conv
    cast = copy.deepcopy(model).bfloat16()
    seen = verify(cast, triggers)
    assert (seen.verdict, seen.variant, seen.displacement) == ("tampered", "float32", "half")
    assert verify(cast, triggers, tolerance="half").verdict == "intact"
    assert verify(cast, triggers, tolerance="float32").verdict == "tampered"
    nudged = copy.deepcopy(model)
    nudged[-1].weight.data *= 1 + 2**-20
    seen = verify(nudged, triggers)
    assert (seen.verdict, seen.displacement) == ("tampered", "float32")
    assert verify(nudged, triggers, tolerance="float32").verdict == "intact"
    swapped = copy.deepcopy(model)
    _swap(swapped)
    assert verify(swapped, triggers, tolerance="half").displacement == "beyond"


def test_a_tolerance_without_its_rung_is_an_error_not_a_verdict(conv):
    model, triggers = conv
    bare = dataclasses.replace(triggers, rungs=triggers.rungs[:1])
    assert verify(model, bare, tolerance="half").verdict == "intact"
    edited = copy.deepcopy(model)
    _noise(edited)
    assert verify(edited, bare).displacement == "unknown"
    with pytest.raises(ModelError) as caught:
        verify(edited, bare, tolerance="half")
    assert caught.value.code is ErrorCode.RUNG_MISSING


# --------------------------------------------------------------------- models without float64, the datasheet


@pytest.fixture(scope="module", params=["returns float32", "hidden float32", "float32 constant"])
def single(request):
    make = {
        "returns float32": lambda: nets.CastingInside(hidden=False),
        "hidden float32": lambda: nets.CastingInside(hidden=True),
        "float32 constant": nets.NeedsFloat32,
    }
    model = make[request.param]().eval()
    return model, embed(model, secret=SECRET, model_id="m", input_shape=(3, 16, 16), pairs=4)


def test_a_model_without_float64_is_served_and_nothing_says_exact(single):
    model, triggers = single
    assert triggers.arithmetic == "float32"
    assert Tolerance.EXACT not in {rung.name for rung in triggers.rungs}
    assert triggers.rungs[0].delta >= 8 * triggers.rungs[0].noise > 0
    seen = verify(model, triggers)
    assert (seen.verdict, seen.displacement, seen.dtype) == ("intact", "float32", "float32")
    assert {verify(model, triggers, tolerance=name).verdict for name in ("float32", "half")} == {"intact"}
    edited = copy.deepcopy(model)
    edited.body[3].weight.data *= 1.001
    seen = verify(edited, triggers)
    assert (seen.verdict, seen.dtype) == ("tampered", "float32")
    assert seen.displacement in {"half", "beyond"}
    assert triggers.datasheet["SGD step, lr 1e-3"] == (1, 1)


def test_every_rung_stands_clear_of_its_noise(watermarked):
    _, triggers = watermarked
    for rung in triggers.rungs:
        assert rung.delta >= 8 * rung.noise
        assert rung.delta >= 2 * rung.shift


def test_a_key_too_near_its_noise_is_refused(conv, monkeypatch):
    model, _ = conv
    monkeypatch.setattr("fwm_audit.calibration.LEAST_NOISE_FACTOR", 1e7)
    with pytest.raises(EmbeddingError) as caught:
        embedded(model)
    assert caught.value.code is ErrorCode.PAIRS_NOT_FOUND


def test_the_datasheet_agrees_with_what_an_audit_sees(conv):
    """Whole-model edits are all detected; of single bits about as many as the coverage promises, or more."""
    _, triggers = conv
    whole = {edit: shares for edit, shares in triggers.datasheet.items() if "one " not in edit}
    assert set(whole.values()) == {(1, 1)}
    assert len(whole) == 6
    bits = [shares for edit, shares in triggers.datasheet.items() if "one bit" in edit]
    assert all(tries > 5 for _, tries in bits)  # the sign of a zero is no try
    seen, tries = (sum(column) for column in zip(*bits, strict=True))
    expected = triggers.coverage.total
    assert seen / tries > expected - 3 * math.sqrt(expected * (1 - expected) / tries) - 0.03
    blind = nets.convnet()
    blind[3].weight.data[:, 1:] *= 1e-9
    assert embedded(blind, pairs=1).datasheet["one bit, mantissa"][0] < tries / 3


def test_the_simulation_leaves_the_model_as_it_was(conv):
    """An edit that was not undone would be seen by the ones after it, and by the next key."""
    model, triggers = conv
    again = embedded(model, pairs=8)
    assert again.datasheet == triggers.datasheet
    assert verify(model, again).verdict == "intact"


# ------------------------------------------------------------------------------------- choice and waking


EDGES = st.tuples(st.integers(0, 3), st.integers(4, 7))


@given(st.lists(st.tuples(st.binary(min_size=4, max_size=4), EDGES), min_size=1, max_size=8), st.integers(1, 8))
def test_the_choice_is_greedy(pairs, count):
    """Each pair chosen brings at least as much as any pair left would have; none is chosen twice."""
    rows, edges = zip(*pairs, strict=True)
    covered = Covered(nn.Linear(7, 4, bias=False))  # 28 weights, packed into 4 bytes
    rows = [row[:3] + bytes([row[3] & 0xF0]) for row in rows]
    flags = [np.frombuffer(row, np.uint8) for row in rows]
    chosen = covered.choose(flags, list(edges), count, None)
    assert len(chosen) == len(set(chosen)) == min(count, len(rows))
    seen, stood = 0, set()
    ints = [int.from_bytes(row) for row in rows]

    def brings(row):
        return len({*edges[row]} - stood), (ints[row] & ~seen).bit_count()

    for position, row in enumerate(chosen):
        assert brings(row) == max(brings(other) for other in set(range(len(rows))) - set(chosen[:position]))
        seen |= ints[row]
        stood |= {*edges[row]}
    assert covered.classes == stood
    assert covered.total == seen.bit_count() / 28
    assert covered.report().layers == {"weight": covered.total}


def test_a_share_that_is_asked_for_takes_more_rows_only_while_they_help():
    covered = Covered(nn.Linear(8, 1, bias=False))
    flags = [np.array([value], np.uint8) for value in (0b1111_0000, 0b0000_1000, 0b1000_0000)]
    assert covered.choose(flags, [(0, 1)] * 3, 1, 0.9) == [0, 1]
    assert covered.total == 5 / 8


def test_half_as_many_pairs_as_classes_involve_every_class():
    """No edge of the first ring is given up for the coverage of another."""
    model = nn.Linear(64, 60)
    nn.init.orthogonal_(model.weight, generator=torch.Generator().manual_seed(0))  # any two classes can lead
    model.input_shape = (64,)
    triggers = embedded(model, pairs=30)
    assert sorted(triggers.classes.flatten().tolist()) == list(range(60))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_the_last_bit_is_worth_what_flipping_it_does(values):
    weights = torch.tensor(values)
    flipped = (weights.view(torch.int32) ^ 1).view(torch.float32)
    normal = weights.abs() >= torch.finfo(torch.float32).tiny
    worth = last_bit(weights.double())
    assert torch.equal(worth[normal], (flipped.double() - weights.double()).abs()[normal])
    assert (worth[weights == 0] == 0).all()


def test_layers_whose_first_dimension_is_not_the_batch_are_left_alone():
    """As where windows or tokens come first: whose units those are cannot be told."""
    layer = nn.Linear(4, 3)
    with Waking(layer, {"bias": torch.tensor([0, 2])}, count=2, num_classes=9) as waking:
        waking.watch(torch.arange(2))
        layer(torch.zeros(6, 4))
        loss, awake = waking.pull()
    assert (loss.tolist(), awake.tolist()) == ([0, 0], [1, 1])


def test_a_rung_on_which_few_pairs_stand_is_left_out(monkeypatch):
    solve = calibration.solve

    def first_only(target, model, pairs, *arguments):
        found = solve(target, model, pairs, *arguments)
        return dataclasses.replace(found, solved=found.solved & (torch.arange(len(pairs)) == 0))

    monkeypatch.setattr(calibration, "solve", first_only)
    assert {rung.name for rung in embedded(nets.convnet()).rungs} == {Tolerance.EXACT}


UNUSUAL = {
    "channels last": lambda: nets.convnet().to(memory_format=torch.channels_last),
    "a head for training only": nets.Auxiliary,
    "weight norm without a bias": nets.weight_normed,
    "an integer parameter": nets.Counting,
    "no floating parameters": nets.Fixed,
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_parameters_are_served(kind):
    model = UNUSUAL[kind]().eval()
    triggers = embed(model, secret=SECRET, model_id="m", input_shape=(3, 16, 16), pairs=2)
    assert verify(model, triggers).verdict == "intact"
    assert ("last layer, SGD step, lr 1e-6" in triggers.datasheet) == (kind != "no floating parameters")


def test_units_that_sleep_are_woken():
    """A unit that needs an input of its own is reached by few pairs, and by none without the pull."""
    model = nets.convnet(width=16)
    model[4].bias.data[::2] -= model[4].weight.data[::2]
    covered = embedded(model, pairs=12).coverage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fwm_audit.embedding.Covered.asleep", lambda _: {})
        plain = embedded(model, pairs=12).coverage
    assert covered.total > plain.total + 0.02


def test_with_as_many_triggers_as_classes_every_row_of_the_last_layer_is_seen():
    """Each class has one pair, whose input must raise all features."""
    model = nn.Sequential(nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 12))
    for layer in (model[0], model[2]):
        nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(0))  # any two classes can lead
    model.input_shape = (128,)
    covered = embedded(model, pairs=6).coverage.layers["2.weight"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fwm_audit.embedding.features", lambda *_: "")
        plain = embedded(model, pairs=6).coverage.layers["2.weight"]
    assert covered > max(0.95, plain + 0.1)


def test_the_features_are_the_last_units_that_can_sleep():
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nets.convnet().double()
    assert features(model, x) == "4.bias"
    model[4].bias.data += 100.0
    assert features(model, x) == ""
    model[1].bias.data[0] = -100.0
    assert features(model, x) == "1.bias"
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if name.endswith("bias"))
    assert features(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).double(), x) == ""


def test_waking_watches_what_it_was_given_and_leaves_no_hook():
    model = nets.convnet().float()
    asleep = {"1.bias": torch.tensor([0, 3]), "8.bias": torch.tensor([1]), "3.bias": torch.tensor([2])}
    with Waking(model, asleep, count=2, num_classes=5) as waking:
        waking.watch(torch.arange(2))
        model(torch.zeros(2, 3, 16, 16))
        loss, awake = waking.pull()
    assert waking.units == 4
    assert loss.shape == awake.shape == (2,)
    assert ((awake >= 0) & (awake <= 1) & (loss >= 0)).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ----------------------------------------------------------------------------------- the published method


@pytest.fixture(scope="module")
def published():
    """With a generator of 16 channels at ten times the rate: the paper's 512 are work for a GPU."""
    model = nets.convnet(classes=10)
    model.input_shape = (3, 4, 4)
    model[-1].weight.data *= 10  # an untrained last layer is flat: its classes are hard to tell apart

    def narrow(target, key, report):
        net = yin2022.Generator(target.shape, key, channels=16)
        noise = normal(key, "yin2022/noise", (yin2022.COUNT, yin2022.NOISE_SIZE))
        optimizer = torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.999))
        return yin2022.train(target, net, optimizer, noise, report, stop_early=True, steps=2000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yin2022, "make", narrow)
        return model, embedded(model, method="yin2022")


def test_the_published_method_goes_through_the_same_doors(published):
    model, triggers = published
    assert (triggers.method, triggers.pairs, triggers.rungs[0].triggers) == ("yin2022", 100, 100)
    assert (triggers.arithmetic, triggers.coverage.total) == ("float32", 0.0)
    master = MasterSecret.generate()
    reopened = TriggerSet.unseal(triggers.seal(master), master)
    for mine, theirs in zip(
        triggers.materialise(triggers.rungs[0]), reopened.materialise(reopened.rungs[0]), strict=True
    ):
        assert torch.equal(mine, theirs)
    seen = verify(model, reopened)
    assert (seen.verdict, seen.displacement, seen.total, seen.forward_passes) == ("intact", "half", 100, 100)
    swapped = copy.deepcopy(model)
    _swap(swapped)
    assert verify(swapped, reopened).verdict == "tampered"


def test_the_published_method_misses_what_the_mirrored_pairs_see(published):
    model, triggers = published
    edited = copy.deepcopy(model)
    _noise(edited)
    assert verify(edited, triggers).verdict == "intact"
    assert verify(edited, embedded(model)).verdict == "tampered"


# ----------------------------------------------------------------------------------------------- refused


def _holding_nan():
    model = nets.convnet()
    model[3].weight.data[0, 0, 0, 0] = math.nan
    return model


def _overflowing():
    model = nets.convnet()
    model[-1].weight.data[:] = math.inf
    return model


def _far_off():
    model = nets.convnet()
    model[-1].bias.data += 1e9
    return model


def _far_from_its_boundary():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    model[1].weight.data = 1e-6 * torch.randn(2, 768, generator=torch.Generator().manual_seed(0))
    model[1].bias.data = torch.tensor([0.0, 1.0])
    return model


REFUSED = {
    "random": (nets.Dropping, ErrorCode.MODEL_STOCHASTIC),
    "batch-dependent": (nets.BatchNormalising, ErrorCode.MODEL_STOCHASTIC),
    "one logit": (lambda: nets.convnet(classes=1), ErrorCode.MODEL_UNSUITABLE),
    "wrong input shape": (lambda: nn.Linear(3, 4), ErrorCode.MODEL_UNSUITABLE),
    "not logits": (lambda: nets.convnet()[:6], ErrorCode.MODEL_UNSUITABLE),
    "NaN weights": (_holding_nan, ErrorCode.NON_FINITE),
    "infinite logits": (_overflowing, ErrorCode.NON_FINITE),
    "complex": (nets.Imaginary, ErrorCode.MODEL_UNSUITABLE),
    "no gradient": (nets.Detached, ErrorCode.MODEL_UNSUITABLE),
    "common offset": (_far_off, ErrorCode.MODEL_UNSUITABLE),
    "boundary beyond the input range": (_far_from_its_boundary, ErrorCode.PAIRS_NOT_FOUND),
    "constant": (nets.Constant, ErrorCode.PAIRS_NOT_FOUND),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_name(case):
    make, code = REFUSED[case]
    with pytest.raises(FwmError) as caught:
        embed(make().eval(), secret=SECRET, model_id="m", input_shape=(3, 16, 16), pairs=2)
    assert caught.value.code is code
    assert len(caught.value.message) > 20


def test_an_error_of_the_model_does_not_quote_a_generated_input():
    with pytest.raises(ModelError) as caught:
        embed(nets.Quoting().eval(), secret=SECRET, model_id="m", input_shape=(3, 16, 16), pairs=2)
    assert "ValueError" in caught.value.message
    assert "cannot serve" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "settings",
    [
        *({"pairs": 0}, {"method": "none"}, {"coverage": 2.0}, {"variants": ["int8"]}, {"input_range": (1.0, 1.0)}),
        *({"method": "yin2022", "coverage": 0.5}, {"method": "yin2022", "variants": ["float16"]}),
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(UsageError):
        embedded(nets.convnet(), **settings)


def test_coverage_as_the_budget(conv):
    model, few = conv
    wanted = min(0.999, few.coverage.total + 0.02)
    more = embedded(model, pairs=1, coverage=wanted)
    assert more.coverage.total >= wanted
    assert set(more.coverage.layers) == {name for name, _ in model.named_parameters()}


def test_coverage_that_cannot_be_reached_says_what_was(monkeypatch):
    model = nets.convnet()
    model[3].weight.data[0] = 0  # zero weights have no last bit to flip
    monkeypatch.setattr("fwm_audit.embedding.MAX_PAIRS", 24)
    with pytest.raises(EmbeddingError, match=r"cover 0\.\d+ of the parameters") as caught:
        embedded(model, coverage=1.0)
    assert caught.value.code is ErrorCode.COVERAGE_NOT_REACHED


def test_a_coverage_that_stops_growing_is_named():
    model = nets.convnet()
    model[3].weight.data[0] = 0
    with pytest.raises(EmbeddingError, match=r"cover 0\.\d+ of the parameters"):
        embedded(model, coverage=1.0)


def test_verify_refuses_another_number_of_classes_and_nan(conv):
    model, triggers = conv
    for wrong, code in ((nets.convnet(classes=6), ErrorCode.MODEL_UNSUITABLE), (_overflowing(), ErrorCode.NON_FINITE)):
        with pytest.raises(ModelError) as caught:
            verify(wrong, triggers)
        assert caught.value.code is code
    assert model is not None
