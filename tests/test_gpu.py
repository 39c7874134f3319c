"""The same on a GPU: keys made there hold on the CPU and the other way round, in every command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from datetime import UTC, datetime

import pyarrow.dataset
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from fwm_audit import SecretKey, arithmetic, embed, verify
from fwm_audit.architectures import build
from fwm_audit.catalog import CatalogEntry, write_catalog
from fwm_audit.check import Auditor
from fwm_audit.key import MasterSecret
from fwm_audit.records import AuditSettings
from fwm_audit.task import EmbedTask
from fwm_audit.train import embed_model
from fwm_audit.verification import float64_copy, run
from tests import nets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ARCH = "factory:tests.nets:convnet"


def embedded(model, **settings):
    settings = {"secret": SecretKey(bytes(range(32))), "model_id": "m", "input_shape": model.input_shape} | settings
    return embed(model, **settings)


@pytest.mark.parametrize("name", ["convnet", "perceptron", "transformer"])
@pytest.mark.parametrize(("made", "checked"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_a_key_holds_on_the_other_processor_and_sees_one_bit_there(name, made, checked):
    model = getattr(nets, name)()
    key = embedded(model, pairs=6, device=made, variants=["float16"])
    assert key.environment["device"].startswith(made)
    assert key.measured == ("cpu", "cuda")
    seen = verify(model, key, device=checked)
    assert (seen.verdict, seen.displacement, seen.dtype) == ("intact", "none", "float64")
    assert verify(getattr(nets, name)().half(), key, device=checked).variant == "float16"
    assert verify(getattr(nets, name)().half(), key, device=checked).verdict == "intact"
    last = [parameter for parameter in model.parameters() if parameter.dim() == 2][-1]
    with torch.no_grad():
        last.view(-1).view(torch.int32)[0] ^= 1 << 12
    assert verify(model, key, device=checked).verdict == "tampered"


class Resized(nn.Module):
    def forward(self, x):
        return functional.interpolate(x, size=(9, 9), mode="bilinear", antialias=True)


class Attends(nn.Module):
    def forward(self, x):
        tokens = x.flatten(2)
        return functional.scaled_dot_product_attention(tokens, tokens, tokens)


LAYERS = {
    **{name: getattr(nn, name)() for name in (
        "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish", "PReLU",
        "ReLU6", "SELU", "SiLU", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink",
    )},
    "GELU tanh": nn.GELU("tanh"),
    "Hardswish in place": nn.Hardswish(inplace=True),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(3),
    "AvgPool2d": nn.AvgPool2d(3, 2, padding=1),
    "BatchNorm2d": nn.BatchNorm2d(8),
    "Conv2d": nn.Conv2d(8, 8, 3, padding=1),
    "Conv2d, depthwise": nn.Conv2d(8, 8, 5, padding=2, groups=8),
    "Conv2d, dilated": nn.Conv2d(8, 8, 3, dilation=2),
    "ConvTranspose2d": nn.ConvTranspose2d(8, 8, 3, 2),
    "GroupNorm": nn.GroupNorm(2, 8),
    "InstanceNorm2d": nn.InstanceNorm2d(8),
    "LPPool2d": nn.LPPool2d(2, 3),
    "LayerNorm": nn.LayerNorm(16),
    "Linear": nn.Linear(16, 5),
    "LocalResponseNorm": nn.LocalResponseNorm(3),
    "RMSNorm": nn.RMSNorm(16),
    "Softmax": nn.Softmax(1),
    "Upsample, bicubic": nn.Upsample(scale_factor=1.7, mode="bicubic"),
    "Upsample, bilinear": nn.Upsample(scale_factor=1.7, mode="bilinear"),
    "Upsample, antialias": Resized(),
    "MultiheadAttention": Attends(),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_in_float64_what_the_cpu_does(name):
    torch.manual_seed(0)
    layer = float64_copy(LAYERS[name], torch.device("cpu"))
    inputs = torch.randn(4, 8, 16, 16, dtype=torch.float64)
    here = run(nn.Sequential(layer, nn.Flatten()), inputs.clone(), torch.device("cpu"))
    there = run(nn.Sequential(layer, nn.Flatten()).cuda(), inputs.clone(), torch.device("cuda"))
    assert (here - there).abs().max() < 1e-14 * here.abs().max()


def test_where_the_gpu_computes_less_than_a_key_was_tried_on_the_cpu_decides(monkeypatch):
    """As for a kernel that is not known to round: a key from a machine without a GPU, audited on one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5)).eval()
    model.input_shape = (3, 16, 16)
    key = embedded(model, pairs=6, device="cpu")
    monkeypatch.setattr(arithmetic, "_EXACT", {})
    tried = verify(model, key, device="cuda")
    assert (tried.verdict, tried.device) == ("tampered", "cuda")
    key = dataclasses.replace(key, environment=key.environment | {"measured": "cpu"})
    untried = verify(model, key, device="cuda")
    assert (untried.verdict, untried.device) == ("intact", "cpu")
    with torch.no_grad():
        model[3].bias[0] += 1e-6
    assert verify(model, key, device="cuda").verdict == "tampered"


def test_a_key_made_twice_on_the_gpu_is_the_same_key():
    one, two = (embedded(nets.convnet(), pairs=4, device="cuda") for _ in range(2))
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.classes, two.classes)


def test_the_float32_rung_is_float32_there_and_not_tf32():
    """cuDNN's TF32 would move logits by a thousandth, the `float32` rung stands nearer."""
    model = nets.convnet(width=32)
    key = embedded(model, pairs=6, device="cuda")
    rung = next(rung for rung in key.rungs if rung.name == "float32")
    inputs, labels = key.materialise(rung)
    logits = run(model.cuda(), inputs.float(), torch.device("cuda"))
    assert torch.equal(logits.argmax(1), labels)
    exact = run(model.double(), inputs, torch.device("cuda"))
    assert (logits.double() - exact).abs().max() < 1e-5 * exact.abs().max()


def test_the_papers_method_runs_there():
    key = embedded(nets.convnet(), method="yin2022", device="cuda")
    assert verify(nets.convnet(), key, "half", device="cuda").verdict == "intact"


@pytest.fixture
def world(tmp_path):
    MasterSecret.generate_file(tmp_path / "master.key")
    state = build(ARCH, ["tests"]).state_dict()
    save_file(state, tmp_path / "released.safetensors")
    save_file(state | {"8.bias": state["8.bias"] + 1e-7 * torch.arange(1.0, 6.0)}, tmp_path / "edited.safetensors")
    return tmp_path


def settings(folder):
    return AuditSettings(
        run_id="r",
        run_started_at=datetime.now(UTC),
        keys=str(folder / "keys"),
        base=str(folder),
        key_fingerprints={},
        allowed_factories=("tests",),
        device="cuda",
        master_key_file=str(folder / "master.key"),
    )


def test_one_model_that_does_not_fit_is_an_error_of_its_own(world):
    published = embed_model(
        EmbedTask(
            model_id="conv", checkpoint="released.safetensors", arch=ARCH, keys=str(world / "keys"), base=str(world),
            pairs=4, allowed_factories=("tests",), master_key_file=str(world / "master.key"),
        )
    )  # fmt: skip
    auditor = Auditor(settings(world), "w")
    entry = CatalogEntry(0, "conv", "released.safetensors", ARCH, published.key_id)
    assert auditor.audit(entry, shard=0, attempt=1).verdict == "intact"
    arch = "factory:tests.nets:wide?hidden=4000"  # 25 MB in float64
    save_file(build(arch, ["tests"]).state_dict(), world / "large.safetensors")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    try:
        large = dataclasses.replace(entry, uri="large.safetensors", arch=arch)
        record = auditor.audit(large, shard=0, attempt=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (record.verdict, record.error_code) == ("error", "out_of_memory")
    record = auditor.audit(entry, shard=0, attempt=1)
    assert (record.verdict, record.device, record.arithmetic) == ("intact", "cuda", "float64")


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_commands_embed_and_audit_on_the_gpu(world):
    environment = os.environ | {"FWM_MASTER_KEY_FILE": str(world / "master.key")}

    def job(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment, check=False
        )
        lines = done.stdout.strip().splitlines()
        return done.returncode, json.loads(lines[-1]) if lines else None, done.stdout + done.stderr

    code, published, said = job(
        *("jobs.embed", "--model-id", "conv", "--checkpoint", str(world / "released.safetensors"), "--arch", ARCH),
        *("--keys", str(world / "keys"), "--pairs", "4", "--allow-factory", "tests"),
    )
    assert code == 0, said
    names = ["released", "edited"] * 4
    rows = [
        CatalogEntry(row, "conv", str(world / f"{name}.safetensors"), ARCH, published["key_id"])
        for row, name in enumerate(names[:2])
    ]
    for row, name in list(enumerate(names))[2:]:
        copy = world / f"{name}{row}.safetensors"
        copy.write_bytes((world / f"{name}.safetensors").read_bytes())
        rows.append(CatalogEntry(row, "conv", str(copy), ARCH, published["key_id"]))
    (world / "catalog.parquet").write_bytes(write_catalog(rows, "catalog.parquet"))
    code, summary, said = job(
        *("jobs.audit", "--catalog", str(world / "catalog.parquet"), "--keys", str(world / "keys")),
        *("--out", str(world / "out"), "--gpus-per-actor", "0.25", "--allow-factory", "tests"),
    )
    assert (code, summary["intact"], summary["tampered"], summary["error"]) == (1, 4, 4, 0), said
    table = pyarrow.dataset.dataset(world / "out" / "audits", format="parquet").to_table(columns=["device"])
    assert table["device"].to_pylist() == ["cuda"] * 8
