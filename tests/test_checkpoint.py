"""Checkpoints: what opens, what is refused with which code, and that nothing else ever happens."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fwm_audit.checkpoint import Checkpoint, Container, fit, open_checkpoint
from fwm_audit.errors import CheckpointError, ErrorCode


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 5)
    )


def as_safetensors(tensors):
    return safetensors.torch.save(tensors)


def as_zip(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.fixture
def opened(tmp_path):
    def open_bytes(data, name="file.bin"):
        path = tmp_path / name
        path.write_bytes(data)
        return open_checkpoint(str(path))

    return open_bytes


def same(one, other):
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in other
    )


class Canary:
    """Unpickling makes the file that it names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rewritten(data, change, compression=zipfile.ZIP_STORED):
    """A zip archive with its members, a dict of names to bytes, changed in place by `change`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members = change(members) or members
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


# What opens

WRAPPERS = {
    "plain": lambda tensors: tensors,
    "state_dict": lambda tensors: {"epoch": 3, "state_dict": tensors, "optimizer": {"lr": 0.1}},
    "model": lambda tensors: {"model": tensors, "args": ["--fast"]},
    "parameters": lambda tensors: {
        name: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    },
}
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
OPENS = [(as_safetensors, "plain", prefix) for prefix in PREFIXES] + [
    (as_zip, wrapper, prefix) for wrapper, prefix in itertools.product(WRAPPERS, PREFIXES)
]


@pytest.mark.parametrize(("container", "wrapper", "prefix"), OPENS)
def test_opens(opened, container, wrapper, prefix):
    """Container, wrapper and prefix do not matter: the same tensors come out, ready for load_state_dict."""
    model = network()
    expected = model.state_dict()
    data = container(WRAPPERS[wrapper]({prefix + name: tensor for name, tensor in expected.items()}))
    checkpoint = opened(data, "misleading.safetensors" if container is as_zip else "misleading.pt")
    assert checkpoint.container is (Container.TORCH_ZIP if container is as_zip else Container.SAFETENSORS)
    fitted = fit(checkpoint, expected)
    assert same(fitted, expected)
    assert {type(tensor) for tensor in fitted.values()} == {torch.Tensor}
    assert not any(tensor.requires_grad for tensor in fitted.values())
    with torch.device("meta"):
        skeleton = network()
    skeleton.load_state_dict(fitted, strict=True, assign=True)
    assert same(skeleton.state_dict(), expected)


@pytest.mark.parametrize("container", [as_safetensors, as_zip])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtype_names_the_shared_one(opened, container, dtype):
    tensors = {"a": torch.ones(3, dtype=dtype), "steps": torch.ones(1, dtype=torch.int64)}
    checkpoint = opened(container(tensors))
    assert f"torch.{checkpoint.dtype}" == str(dtype)
    assert checkpoint.tensors["a"].dtype is dtype
    other = torch.float32 if dtype is not torch.float32 else torch.float16
    assert opened(container(tensors | {"b": torch.ones(3, dtype=other)})).dtype == "mixed"


def test_tied_weights_stay_tied(opened):
    weight = torch.randn(4, 4)
    tensors = opened(as_zip({"a": weight, "b": weight, "c": weight.t()})).tensors
    assert tensors["a"].data_ptr() == tensors["b"].data_ptr() == tensors["c"].data_ptr()
    assert torch.equal(tensors["c"], weight.t())


@pytest.mark.parametrize("container", [as_safetensors, as_zip])
def test_tensors_are_mapped_not_copied(opened, tmp_path, container):
    """Each tensor's memory lies in a mapping of the file, and `fit` hands on the same memory."""
    reference = {"a": torch.randn(256, 1024)}
    checkpoint = opened(container(reference), "mapped.bin")
    address = fit(checkpoint, reference)["a"].data_ptr()
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in maps if line.endswith("mapped.bin")]
    assert any(int(start, 16) <= address < int(stop, 16) for start, stop in ranges)


def test_opens_behind_a_descriptor_and_outlives_it(tmp_path):
    expected = network().state_dict()
    for data in (as_safetensors(expected), as_zip(expected)):
        descriptor = os.memfd_create("checkpoint")
        os.write(descriptor, data)
        checkpoint = open_checkpoint(f"/proc/self/fd/{descriptor}")
        os.close(descriptor)
        assert same(fit(checkpoint, expected), expected)


# What is refused


def scripted():
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), file)
    return file.getvalue()


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


WEIGHT = {"weight": torch.randn(64, 64)}
SHAPE = b"K@K@\x86"  # (64, 64) in a pickle


def patched(*pairs, end=None):
    """WEIGHT in a zip archive whose pickle was edited."""

    def change(members):
        content = members["archive/data.pkl"]
        for old, new in pairs:
            assert content.count(old) == 1
            content = content.replace(old, new)
        members["archive/data.pkl"] = content[:end]

    return rewritten(as_zip(WEIGHT), change)


REFUSED = {
    "empty": (lambda: b"", ErrorCode.CONTAINER_UNKNOWN),
    "text": (lambda: b"<?xml version='1.0'?><Error>AccessDenied</Error>", ErrorCode.CONTAINER_UNKNOWN),
    "header of 1 TB": (lambda: struct.pack("<Q", 1 << 40) + b"{}", ErrorCode.CONTAINER_UNKNOWN),
    "other zip": (
        lambda: rewritten(as_zip(WEIGHT), lambda _: {"a.txt": b"", "b.txt": b""}),
        ErrorCode.CONTAINER_UNKNOWN,
    ),
    "before torch 1.6": (lambda: as_zip(WEIGHT, _use_new_zipfile_serialization=False), ErrorCode.CHECKPOINT_UNSAFE),
    "bare pickle": (lambda: pickle.dumps({"weight": [1.0]}), ErrorCode.CHECKPOINT_UNSAFE),
    "TorchScript": (scripted, ErrorCode.CHECKPOINT_UNSAFE),
    "whole model": (lambda: as_zip(network()), ErrorCode.CHECKPOINT_UNSAFE),
    "compressed": (
        lambda: rewritten(as_zip(WEIGHT), lambda _: None, zipfile.ZIP_DEFLATED),
        ErrorCode.CHECKPOINT_UNSAFE,
    ),
    "two pickles": (
        lambda: rewritten(as_zip(WEIGHT), lambda members: members | {"other/data.pkl": b"."}),
        ErrorCode.CHECKPOINT_UNSAFE,
    ),
    "no pickle": (
        lambda: rewritten(as_zip(WEIGHT), lambda members: members.pop("archive/data.pkl") and None),
        ErrorCode.CONTAINER_UNKNOWN,
    ),
    "pickle cut short": (lambda: patched(end=12), ErrorCode.CHECKPOINT_CORRUPT),
    "storage missing": (
        lambda: rewritten(as_zip(WEIGHT), lambda members: members.pop("archive/data/0") and None),
        ErrorCode.CHECKPOINT_CORRUPT,
    ),
    "tensor larger than its storage": (lambda: patched((SHAPE, b"K\xffK@\x86")), ErrorCode.CHECKPOINT_CORRUPT),
    "storage larger than the file": (
        lambda: patched((SHAPE, b"K\xffK@\x86"), (b"M\x00\x10", b"M\xff\xff")),
        ErrorCode.CHECKPOINT_CORRUPT,
    ),
    "JSON that is no header": (lambda: header({"weight": 1}), ErrorCode.CHECKPOINT_CORRUPT),
    "offsets beyond the file": (
        lambda: header({"weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, b"1234"),
        ErrorCode.CHECKPOINT_CORRUPT,
    ),
    "overlapping offsets": (
        lambda: header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("a", "b")}, b"1234"),
        ErrorCode.CHECKPOINT_CORRUPT,
    ),
    "no tensors": (lambda: as_safetensors({}), ErrorCode.CHECKPOINT_MISMATCH),
    "a list": (lambda: as_zip([torch.ones(1)]), ErrorCode.CHECKPOINT_MISMATCH),
    "a number among them": (lambda: as_zip(WEIGHT | {"epoch": 3}), ErrorCode.CHECKPOINT_MISMATCH),
    "numbers for names": (lambda: as_zip({0: torch.ones(1)}), ErrorCode.CHECKPOINT_MISMATCH),
    "tensors beside the wrapper": (
        lambda: as_zip({"state_dict": WEIGHT, "w": torch.ones(2)}),
        ErrorCode.CHECKPOINT_MISMATCH,
    ),
    "two state dicts": (
        lambda: as_zip({"state_dict": WEIGHT, "state_dict_ema": WEIGHT}),
        ErrorCode.CHECKPOINT_MISMATCH,
    ),
    "a state dict and a model": (
        lambda: as_zip({"model": WEIGHT, "state_dict": WEIGHT}),
        ErrorCode.CHECKPOINT_MISMATCH,
    ),
    "two wrappers deep": (lambda: as_zip({"model": {"state_dict": WEIGHT}}), ErrorCode.CHECKPOINT_MISMATCH),
    "sparse": (lambda: as_zip({"a": torch.eye(3).to_sparse()}), ErrorCode.CHECKPOINT_MISMATCH),
    "quantised": (
        lambda: as_zip({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}),
        ErrorCode.CHECKPOINT_MISMATCH,
    ),
    "float8": (lambda: as_zip({"a": torch.ones(3).to(torch.float8_e4m3fn)}), ErrorCode.CHECKPOINT_MISMATCH),
    "without data": (lambda: as_zip({"a": torch.ones(3, device="meta")}), ErrorCode.CHECKPOINT_MISMATCH),
}


@pytest.mark.filterwarnings("ignore")  # of torch, that TorchScript and quantisation will go
@pytest.mark.parametrize("name", REFUSED)
def test_refused(opened, name):
    make, code = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        fit(opened(make()), WEIGHT)
    assert caught.value.code is code
    assert len(caught.value.message) < 400
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"state_dict": {"a": torch.ones(2), "b": evil}}])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("bare", [True, False])
def test_a_malicious_pickle_never_runs(opened, tmp_path, monkeypatch, wrap, protocol, bare):
    """Not even where the environment asks torch for full unpickling."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    payload = wrap(Canary(canary))
    data = pickle.dumps(payload, protocol) if bare else as_zip(payload, pickle_protocol=protocol)
    with pytest.raises(CheckpointError) as caught:
        opened(data)
    assert not canary.exists()
    # torch's unpickler stops at protocol 4's framing, before it sees the call.
    assert caught.value.code is (ErrorCode.CHECKPOINT_UNSAFE if bare or protocol == 2 else ErrorCode.CHECKPOINT_CORRUPT)
    if not bare and protocol == 2:
        assert "posix.mkdir" in caught.value.message
    # The canary is a live one.
    pickle.loads(pickle.dumps(payload, protocol))
    assert canary.exists()


def test_names_from_the_file_are_harmless_in_a_terminal(opened):
    name = "\x1b[2J\n" + "x" * 1000
    with pytest.raises(CheckpointError) as caught:
        fit(opened(as_zip({name: torch.ones(1)})), WEIGHT)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


# What fits


def checkpoint_of(tensors):
    return Checkpoint(Container.SAFETENSORS, tensors)


def test_fit_restores_the_order_of_the_architecture():
    reference = network().state_dict()
    fitted = fit(checkpoint_of(dict(reversed(reference.items()))), reference)
    assert same(fitted, reference)


def test_fit_knows_an_architecture_whose_own_names_are_prefixed(opened):
    reference = {f"module.{name}": tensor for name, tensor in network().state_dict().items()}
    assert same(fit(opened(as_safetensors(reference)), reference), reference)


def test_num_batches_tracked_may_be_missing():
    reference = network().state_dict()
    tensors = {name: tensor for name, tensor in reference.items() if not name.endswith("num_batches_tracked")}
    assert len(tensors) == len(reference) - 1
    assert same(fit(checkpoint_of(tensors), reference), reference)


def test_other_floating_dtypes_fit_unchanged():
    reference = network().state_dict()
    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in reference.items()}
    assert same(fit(checkpoint_of(tensors), reference), tensors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop("3.bias"), "missing: '3.bias'"),
        (lambda tensors: tensors.update({"head.bias": torch.ones(5)}), "unexpected: 'head.bias'"),
        (
            lambda tensors: tensors.update({"3.bias": torch.ones(6)}),
            r"differing: '3.bias' is floating\[6\], not floating\[5\]",
        ),
        (lambda tensors: tensors.update({"3.bias": torch.ones(5, dtype=torch.int8)}), r"is integer\[5\], not floating"),
        (lambda tensors: tensors.update({"1.num_batches_tracked": torch.tensor(1.0)}), "is floating.*not integer"),
        (lambda tensors: tensors.clear(), "missing: .* and 5 more"),
    ],
)
def test_other_tensors_do_not_fit(change, says):
    reference = network().state_dict()
    tensors = dict(reference)
    change(tensors)
    with pytest.raises(CheckpointError, match=says) as caught:
        fit(checkpoint_of(tensors), reference)
    assert caught.value.code is ErrorCode.CHECKPOINT_MISMATCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 64, 1001])
def test_one_nan_anywhere_is_found_and_infinities_are_fine(dtype, size):
    for fill in (0.0, float("inf"), float("-inf")):
        for position in {0, size // 2, size - 1}:
            tensor = torch.full((size,), fill, dtype=dtype)
            tensors = {"mask": tensor}
            assert fit(checkpoint_of(tensors), tensors)["mask"] is tensor
            tensor[position] = float("nan")
            with pytest.raises(CheckpointError, match="'mask' holds NaN") as caught:
                fit(checkpoint_of(tensors), tensors)
            assert caught.value.code is ErrorCode.NON_FINITE


def test_tensors_without_values_fit():
    tensors = {"none": torch.ones(0, 3)}
    assert same(fit(checkpoint_of(tensors), tensors), tensors)


# What damage does

WHOLE = {make.__name__: (make(network().state_dict()), network().state_dict()) for make in (as_safetensors, as_zip)}
DAMAGE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("container", WHOLE)
@DAMAGE
@given(fraction=st.floats(0, 1, exclude_max=True), tail=st.integers(0, 64))
def test_a_cut_file_is_never_the_whole_one(opened, container, fraction, tail):
    """Cut anywhere, the ends most often: refused with a code, or visibly other tensors."""
    data, expected = WHOLE[container]
    assert same(fit(opened(data), expected), expected)
    for length in {int(len(data) * fraction), len(data) - 1 - tail}:
        with pytest.raises(CheckpointError):
            fit(opened(data[:length]), expected)


@pytest.mark.parametrize("container", WHOLE)
@DAMAGE
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)), max_size=5))
def test_damage_raises_nothing_but_checkpoint_errors(opened, container, edits):
    data, expected = WHOLE[container]
    damaged = bytearray(data)
    for fraction, content in edits:
        start = int(len(data) * fraction)
        damaged[start : start + len(content)] = content
    with contextlib.suppress(CheckpointError):
        fitted = fit(opened(bytes(damaged)), expected)
        assert list(fitted) == list(expected)
        assert [tensor.shape for tensor in fitted.values()] == [tensor.shape for tensor in expected.values()]
