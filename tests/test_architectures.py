"""A catalog names architectures; it does not run code, fetch weights or open files."""

from __future__ import annotations

import sys
import zipfile

import pytest
import torch

from fwm_audit import architectures
from fwm_audit.architectures import build, factory_package, input_shape
from fwm_audit.errors import ArchitectureError, ErrorCode


@pytest.mark.parametrize(
    ("spec", "shape", "classes"),
    [
        ("torchvision:squeezenet1_1?num_classes=7", (3, 224, 224), 7),
        ("timm:resnet10t?num_classes=4&in_chans=1", (1, 176, 176), 4),
        ("timm:levit_128s?img_size=64&num_classes=5", (3, 64, 64), 5),
        ("factory:jobs.digits:resnet20?classes=3&width=4", (1, 28, 28), 3),
    ],
)
def test_built(spec, shape, classes):
    model = build(spec, ["jobs"])
    assert not model.training
    assert input_shape(spec, model) == shape
    with torch.no_grad():
        assert model(torch.zeros(1, *shape)).shape == (1, classes)


def test_an_input_shape_that_nobody_states_is_none():
    spec = "factory:torch.nn:Linear?in_features=3&out_features=2"
    assert input_shape(spec, build(spec, ["torch"])) is None


@pytest.mark.parametrize(
    "spec",
    [
        *("", "resnet18", "keras:resnet", "timm:", "timm:no_such_model", "torchvision:no_such_model"),
        *("torchvision:resnet18?nonsense=1", "torchvision:resnet18?num_classes", "factory:jobs.digits"),
        *("factory:jobs.digits:no_such", "factory:jobs.digits:digits", "timm:hf-hub:a/b", "timm:../../x"),
        "torchvision:resnet18?num_classes=-3",
    ],
)
def test_unknown(spec):
    with pytest.raises(ArchitectureError) as caught:
        build(spec, ["jobs"])
    assert caught.value.code is ErrorCode.ARCH_UNKNOWN


@pytest.mark.parametrize(
    "spec",
    [
        *("factory:os:system?command=id", "factory:jobsx.digits:resnet20", "factory:subprocess:run?args=id"),
        *(
            "timm:resnet18?pretrained=True",
            "timm:resnet18?checkpoint_path=/etc/passwd",
            "torchvision:resnet18?weights=x",
        ),
        *(
            "factory:jobs.digits:INPUT_SHAPE",
            "factory:jobs.digits:Tensor",
            "factory:jobs.quickstart:load_file?filename=x",
        ),
        *("timm:resnet18?pretrained_cfg=x", "torchvision:fcn_resnet50?weights_backbone=DEFAULT"),
    ],
)
def test_not_allowed(spec):
    with pytest.raises(ArchitectureError) as caught:
        build(spec, ["jobs"])
    assert caught.value.code is ErrorCode.ARCH_NOT_ALLOWED


def test_the_code_behind_a_factory_has_a_digest(tmp_path, monkeypatch):
    """Of all files of its package, but what Python caches; without running any. None where it may be elsewhere, too."""

    def code_sha256(package):
        architectures.code_sha256.cache_clear()
        return architectures.code_sha256(package)

    monkeypatch.syspath_prepend(str(tmp_path))
    assert factory_package("factory:acme_nets.small.deep:net?width=4") == "acme_nets"
    assert factory_package("factory:acme_single:net") == "acme_single"
    assert factory_package("timm:resnet18") is None
    assert code_sha256("acme_nets") is None
    (tmp_path / "acme_nets/small").mkdir(parents=True)
    layers = tmp_path / "acme_nets/small/layers.py"
    layers.write_text("raise SystemExit")
    (tmp_path / "acme_single.py").write_text("x = 1")
    seen = [code_sha256("acme_nets"), code_sha256("acme_single")]
    layers.write_text("raise SystemExit(1)")
    (tmp_path / "acme_nets/fast.abi3.so").write_bytes(b"\x7fELF")
    seen.append(code_sha256("acme_nets"))
    (tmp_path / "acme_nets/fast.abi3.so").write_bytes(b"\x7fELF2")
    seen.append(code_sha256("acme_nets"))
    (tmp_path / "acme_nets/__init__.py").write_text("")
    seen.append(code_sha256("acme_nets"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "acme_nets/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "acme_nets")
    (tmp_path / "elsewhere/shared.py").write_text("")
    seen.append(code_sha256("acme_nets"))
    (tmp_path / "elsewhere/shared.py").write_text("x = 2")
    seen.append(code_sha256("acme_nets"))
    (tmp_path / "acme_nets/compiled.pyc").write_bytes(b"")
    seen.append(code_sha256("acme_nets"))
    (tmp_path / "acme_nets/widths.yaml").write_text("__path__")  # which means nothing there
    seen.append(code_sha256("acme_nets"))
    (tmp_path / "acme_nets/__pycache__").mkdir()
    (tmp_path / "acme_nets/__pycache__/layers.cpython-311.pyc").write_bytes(b"")
    assert code_sha256("acme_nets") == seen[-1]
    assert None not in seen
    assert len(set(seen)) == len(seen)
    assert code_sha256("sys") is None  # has no file
    (tmp_path / "acme_nets/__init__.py").write_text("__path__ = __import__('pkgutil').extend_path(__path__, __name__)")
    assert code_sha256("acme_nets") is None
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("acme_zipped/nets.py", "")
    monkeypatch.syspath_prepend(str(tmp_path / "zipped.zip"))
    assert code_sha256("acme_zipped") is None
    assert not {"acme_nets", "acme_single"} & sys.modules.keys()
    architectures.code_sha256.cache_clear()
