"""Embed watermarks in released models: `python -m jobs.embed --help`."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from rich.table import Table

from fwm_audit import storage
from fwm_audit.catalog import CatalogEntry, add_entries, check_model_id, read_catalog
from fwm_audit.errors import ErrorCode, FwmError, UsageError
from fwm_audit.key import MasterSecret
from fwm_audit.metrics import count_embedded
from fwm_audit.releases import Failed, check_run_storage, watermark
from fwm_audit.task import Embedded, EmbedTask, Progress
from fwm_audit.webhook import read_url
from jobs import _cli

_LOG_EVERY_S = 15.0
_EXAMPLES = """\b
Examples:
  python -m jobs.embed --model-id resnet --checkpoint s3://acme/resnet.safetensors \\
      --arch 'torchvision:resnet18?num_classes=10' --keys s3://acme/keys
  python -m jobs.embed --model-id digits --checkpoint digits.pt --keys keys --pairs 32 --workers 2 \\
      --arch factory:acme.models:digits --allow-factory acme --input-shape 1,28,28
  python -m jobs.embed --models s3://acme/releases.csv --keys s3://acme/keys --storage s3://acme/train \\
      --catalog s3://acme/catalog.parquet
  ray job submit --working-dir . -- python -m jobs.embed --models s3://acme/releases.csv ...

\b
The list of models is Parquet, CSV or JSON Lines with model_id, uri, arch and, where known, sha256. A model
that carries a key of the same settings is left alone, and one that fails stops no other. With --storage in
an object store, the same command goes on where an interrupted one stood, even on other machines.

\b
Exit codes: 0 every model carries its key; 2 usage or settings; 3 some model could not be watermarked.
The last line of standard output is JSON: model_id, key_id, fingerprint, pairs and coverage of one model, or
the counts and failures of many.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)
log = logging.getLogger("jobs.embed")


@app.command(epilog=_EXAMPLES)
def embed(
    *,
    keys: Annotated[str, typer.Option(help="URI prefix under which sealed keys are published.")],
    model_id: Annotated[str, typer.Option(help="Name under which the model is audited.")] = "",
    checkpoint: Annotated[str, typer.Option(help="URI of the released checkpoint; it is only read.")] = "",
    arch: Annotated[str, typer.Option(help="torchvision:NAME, timm:NAME or factory:package.module:callable.")] = "",
    models: Annotated[str, typer.Option(metavar="CATALOG", help="List of models, in place of these three.")] = "",
    catalog: Annotated[str, typer.Option(help="Catalog to which each watermarked checkpoint is added.")] = "",
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
    generation: Annotated[int, typer.Option(min=1, help="2 or more makes a further key beside the earlier ones.")] = 1,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Models at a time. [default: as many as the cluster has room for]")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ray Train workers of each model; any number makes the same key. [default: what fits, 6 at most]",
        ),
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a cluster that is too small.")] = 0.0,
    storage_: Annotated[
        str,
        typer.Option("--storage", help="URI prefix for the sealed state of unfinished runs. [default: a local folder]"),
    ] = "",
    webhook: _cli.Webhook = None,
    allow_local: _cli.AllowLocal = False,
    master_key: _cli.MasterKey = None,
    allow_factory: _cli.AllowFactory = None,
) -> None:
    """Embed fragile watermarks in released models with Ray Train, and publish their sealed keys."""
    entries = _entries(models, model_id, checkpoint, arch, allow_local=allow_local)
    shared = EmbedTask(
        model_id="",
        checkpoint="",
        arch="",
        keys=storage.absolute(keys),
        base=os.getcwd(),  # noqa: PTH109 - a string for other processes
        method=method,
        pairs=pairs,
        coverage=coverage,
        variants=tuple(name.strip() for name in variants.split(",") if name.strip()),
        input_shape=_shape(input_shape),
        input_range=_range(input_range),
        generation=generation,
        allowed_factories=tuple(allow_factory or ()),
        master_key_file=str(master_key.absolute()) if master_key else None,
    )
    # What is missing is told before a cluster is started.
    hook = read_url(webhook) if webhook else None
    MasterSecret.from_file(shared.master_key_file)
    run_storage = storage.absolute(storage_) if storage_ else None
    if run_storage is not None:
        check_run_storage(run_storage)
    good = {(entry.model_id, entry.uri): entry for entry in entries if entry.problem is None}
    outcomes: list[Embedded | Failed] = [
        Failed(entry.model_id, entry.problem.code, entry.problem.message) for entry in entries if entry.problem
    ]
    tasks = [
        dataclasses.replace(shared, model_id=entry.model_id, checkpoint=entry.uri, arch=entry.arch, sha256=entry.sha256)
        for entry in good.values()
    ]
    # Ray Train looks after its actors through the dashboard.
    with _cli.cluster(log_to_driver=True, dashboard=True):
        for task, outcome in watermark(
            tasks,
            workers=workers,
            parallel=parallel,
            run_storage=run_storage,
            patience_s=wait,
            watch=_Watch(),
        ):
            outcomes.append(outcome)
            _count(outcome)
            _tell(outcome, method)
            if catalog and isinstance(outcome, Embedded):
                _add(storage.absolute(catalog), good[task.model_id, task.checkpoint], outcome)
    _close(outcomes, hook, many=bool(models))


def _entries(models: str, model_id: str, checkpoint: str, arch: str, *, allow_local: bool) -> Sequence[CatalogEntry]:
    """The models to watermark, with absolute URIs: those of the list, or the one of the command line."""
    one = (model_id, checkpoint, arch)
    if models and any(one):
        raise UsageError("give either --models or --model-id, --checkpoint and --arch")
    if models:
        uri = storage.absolute(models)
        try:
            listed = read_catalog(storage.read(uri), uri, keyed=False, allow_local=allow_local)
        except FwmError as error:
            raise UsageError(error.message) from None
        return [dataclasses.replace(entry, uri=storage.absolute(entry.uri)) for entry in listed]
    if not all(one):
        raise UsageError("give --model-id, --checkpoint and --arch, or a list of models with --models")
    return [CatalogEntry(0, check_model_id(model_id), storage.absolute(checkpoint), arch, "")]


def _count(outcome: Embedded | Failed) -> None:
    if isinstance(outcome, Failed):
        count_embedded("failed", outcome.code)
    else:
        count_embedded("skipped" if outcome.before else "published")


def _tell(outcome: Embedded | Failed, method: str) -> None:
    about = {"model_id": outcome.model_id}
    if isinstance(outcome, Failed):
        about |= {"error_code": outcome.code}
        log.error("%s: failed (%s): %s", outcome.model_id, outcome.code, outcome.message, extra=about)
        return
    said = "carries this key already" if outcome.before else "published"
    text = f"{said}, key {outcome.key_id}, coverage {outcome.coverage:.4f}"
    log.info("%s: %s", outcome.model_id, text, extra=about)
    if outcome.arithmetic != "float64" and method == "mirror":
        log.warning(
            "%s: the model casts to float32 inside, so its triggers stand %.0e from their boundaries instead of "
            "some 1e-12: small edits go unseen",
            outcome.model_id,
            outcome.delta,
            extra=about,
        )


def _add(catalog: str, entry: CatalogEntry, published: Embedded) -> None:
    """Add the watermarked checkpoint to the catalog that audits read."""
    row = dataclasses.replace(entry, key_id=published.key_id, sha256=published.checkpoint_sha256)
    storage.update(catalog, lambda data: add_entries(data, catalog, [row]))


def _close(outcomes: Sequence[Embedded | Failed], hook: str | None, *, many: bool) -> None:
    """The summary, the closing line and the exit code."""
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    published = [outcome for outcome in outcomes if isinstance(outcome, Embedded)]
    if not many:
        if failed and failed[0].code is ErrorCode.SETTINGS:
            raise UsageError(failed[0].message)
        if failed:
            raise FwmError(failed[0].code, failed[0].message)
        (only,) = published
        for edit, (seen, tries) in only.datasheet.items():
            log.info("%s: detects %-45s %2d of %2d", only.model_id, edit, seen, tries)
        _cli.emit(hook, **dataclasses.asdict(only))
        return
    _cli.CONSOLE.print(_summary(outcomes))
    _cli.emit(
        hook,
        models=len(outcomes),
        published=sum(not outcome.before for outcome in published),
        skipped=sum(outcome.before for outcome in published),
        failed=len(failed),
        failures=[{"model_id": f.model_id, "error_code": f.code, "error_message": f.message} for f in failed],
        keys={outcome.model_id: outcome.key_id for outcome in published},
    )
    if failed:
        raise typer.Exit(_cli.EXIT_INCOMPLETE)


def _summary(outcomes: Sequence[Embedded | Failed]) -> Table:
    table = Table("model", "key", "", "pairs", "coverage", "margin", "noise", "datasheet")
    for outcome in sorted(outcomes, key=lambda outcome: outcome.model_id):
        if isinstance(outcome, Failed):
            table.add_row(outcome.model_id, "", f"failed: {outcome.code}")
            continue
        seen, tries = (sum(column) for column in zip((0, 0), *outcome.datasheet.values(), strict=True))
        table.add_row(
            outcome.model_id,
            outcome.key_id,
            "was there" if outcome.before else "published",
            str(outcome.pairs),
            f"{outcome.coverage:.2%}",
            f"{outcome.delta:.1e}",
            f"{outcome.noise:.1e}",
            f"{seen} of {tries} edits",
        )
    return table


class _Watch:
    """A line for each model in work, now and then."""

    def __init__(self) -> None:
        self.said = time.monotonic()

    def __call__(self, latest: Mapping[str, Progress]) -> None:
        if time.monotonic() - self.said < _LOG_EVERY_S:
            return
        self.said = time.monotonic()
        for model_id, progress in latest.items():
            loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
            log.info("%s: %s %d/%d%s", model_id, progress.stage, progress.done, progress.total, loss)


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
