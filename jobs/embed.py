"""Embed a watermark in one released model: `python -m jobs.embed --help`."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Annotated

import typer

from fwm_audit.catalog import check_model_id
from fwm_audit.errors import UsageError
from fwm_audit.key import MasterSecret
from fwm_audit.storage import absolute
from fwm_audit.train import EmbedTask, embed_on_cluster
from jobs import _cli

_EXAMPLES = """\b
Examples:
  python -m jobs.embed --model-id resnet --checkpoint s3://acme/resnet.safetensors \\
      --arch 'torchvision:resnet18?num_classes=10' --keys s3://acme/keys
  python -m jobs.embed --model-id digits --checkpoint digits.pt --keys keys --pairs 32 --workers 2 \\
      --arch factory:acme.models:digits --allow-factory acme --input-shape 1,28,28
  ray job submit --working-dir . -- python -m jobs.embed --model-id resnet ...

\b
Exit codes: 0 published; 2 usage or settings; 3 the model could not be watermarked.
The last line of standard output is JSON with model_id, key_id, fingerprint, pairs and coverage.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)
log = logging.getLogger("jobs.embed")


@app.command(epilog=_EXAMPLES)
def embed(
    *,
    model_id: Annotated[str, typer.Option(help="Name under which the model is audited.")],
    checkpoint: Annotated[str, typer.Option(help="URI of the released checkpoint; it is only read.")],
    arch: Annotated[str, typer.Option(help="torchvision:NAME, timm:NAME or factory:package.module:callable.")],
    keys: Annotated[str, typer.Option(help="URI prefix under which the sealed key is published.")],
    method: Annotated[str, typer.Option(help="mirror, or yin2022: the published one.")] = "mirror",
    pairs: Annotated[int, typer.Option(min=1, help="Mirrored pairs; each is two triggers.")] = 16,
    coverage: Annotated[float | None, typer.Option(help="Go on until this share of the parameters is covered.")] = None,
    variants: Annotated[
        str, typer.Option(help="Forms in which the model ships: float32,float16,bfloat16,folded.")
    ] = "",
    input_shape: Annotated[
        str, typer.Option(help="Shape of one input, as in 3,224,224. [default: what the architecture states]")
    ] = "",
    input_range: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Values of a preprocessed input.")] = "-1,1",
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 1,
    storage: Annotated[
        str | None, typer.Option(help="URI prefix for Ray Train's own run state. [default: a local folder]")
    ] = None,
    master_key: _cli.MasterKey = None,
    allow_factory: _cli.AllowFactory = None,
) -> None:
    """Embed a fragile watermark in one model with Ray Train, and publish its sealed key."""
    task = EmbedTask(
        model_id=check_model_id(model_id),
        checkpoint=absolute(checkpoint),
        arch=arch,
        keys=absolute(keys),
        base=os.getcwd(),  # noqa: PTH109 - a string for other processes
        method=method,
        pairs=pairs,
        coverage=coverage,
        variants=tuple(name.strip() for name in variants.split(",") if name.strip()),
        input_shape=_shape(input_shape),
        input_range=_range(input_range),
        allowed_factories=tuple(allow_factory or ()),
        master_key_file=str(master_key.absolute()) if master_key else None,
    )
    MasterSecret.from_file(task.master_key_file)  # a missing one is told before a cluster is started
    # Ray Train looks after its actors through the dashboard.
    with _cli.cluster(log_to_driver=True, dashboard=True):
        published = embed_on_cluster(task, workers=workers, run_storage=absolute(storage) if storage else None)
    for edit, (seen, tries) in published.datasheet.items():
        log.info("%s: detects %-45s %2d of %2d", model_id, edit, seen, tries)
    if published.arithmetic != "float64" and method == "mirror":
        log.warning(
            "%s: the model casts to float32 inside, so its triggers stand %.0e from their boundaries instead of "
            "some 1e-12: small edits go unseen",
            model_id,
            published.delta,
        )
    _cli.emit(**dataclasses.asdict(published))


def _shape(text: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        raise UsageError(f"--input-shape {text!r}: whole numbers joined by commas are expected") from None


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--input-range {text!r}: two numbers joined by a comma are expected") from None
    return low, high


if __name__ == "__main__":
    _cli.run(app)
