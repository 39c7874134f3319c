"""One Ray Train worker against several: the time that `jobs.embed` takes, as a ratio, and whether the keys are alike.

EfficientNet-Lite0 with its ImageNet weights is watermarked once with each number of workers, of one CPU
each, in one cluster on this machine.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import ray
import torch
import typer
from safetensors.torch import save_file

from fwm_audit.key import MasterSecret
from fwm_audit.triggers import TriggerSet
from tests.benchmarks import networks

_EXAMPLES = """\b
Example:
  python -m tests.benchmarks.workers --out workers-out --pairs 16
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=_EXAMPLES)
def workers(
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for the model and its keys.")],
    pairs: Annotated[int, typer.Option(min=1, help="Mirrored pairs.")] = 8,
    count: Annotated[int, typer.Option(min=2, help="Workers of the second embedding.")] = 2,
) -> None:
    """Print seconds, their ratio, and whether both keys hold the same triggers; exit code 1 if not."""
    out.mkdir(parents=True)
    network = networks.load("efficientnet-lite0-imagenet", out)
    save_file(network.model.state_dict(), out / "model.safetensors")
    master = MasterSecret.generate_file(out / "master.key")
    ray.init("local", num_cpus=count, include_dashboard=True, log_to_driver=False, logging_level=logging.WARNING)
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    seconds, made = {}, []
    for number in (1, count):
        began = time.monotonic()
        subprocess.run(
            [
                *(sys.executable, "-m", "jobs.embed", "--model-id", "model", "--arch", network.arch),
                *("--checkpoint", str(out / "model.safetensors"), "--keys", str(out / f"keys-{number}")),
                *("--master-key", str(out / "master.key"), "--pairs", str(pairs), "--workers", str(number)),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        seconds[number] = time.monotonic() - began
        (key,) = (out / f"keys-{number}").rglob("*.fwmkey")
        made.append(TriggerSet.load(key, master=master))
    one, several = made
    same = all(torch.equal(getattr(one, name), getattr(several, name)) for name in ("classes", "images", "signs"))
    apart = max((a.t - b.t).abs().max().item() for a, b in zip(one.rungs, several.rungs, strict=True)) if same else None
    report = {
        "pairs": pairs,
        "seconds": {number: round(taken) for number, taken in seconds.items()},
        "ratio": round(seconds[count] / seconds[1], 2),
        "same_images_and_labels": same,
        "largest_difference_of_t": apart,
    }
    typer.echo(json.dumps(report))
    raise typer.Exit(0 if same else 1)


if __name__ == "__main__":
    app()
