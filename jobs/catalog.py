"""List the checkpoints under a prefix as a catalog: `python -m jobs.catalog --help`."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Annotated

import typer

from fwm_audit import storage
from fwm_audit.catalog import CatalogEntry, write_catalog
from fwm_audit.errors import ErrorCode, KeyFileError, StorageError, UsageError
from fwm_audit.key import key_name, read_header, retirement_name
from jobs import _cli

SUFFIXES = frozenset({".safetensors", ".pt", ".pth", ".bin", ".ckpt"})
_KEY_SUFFIX = ".fwmkey"
_EXAMPLES = """\b
Examples:
  python -m jobs.catalog --models s3://acme/models --keys s3://acme/keys --out s3://acme/models.parquet
  python -m jobs.catalog --models models --keys keys --out models.csv

\b
A checkpoint belongs to the model whose id its path begins with: MODEL_ID/epoch-3.pt, or MODEL_ID.pt.
The last line of standard output is JSON with the counts.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)
log = logging.getLogger("jobs.catalog")


@app.command(epilog=_EXAMPLES)
def catalog(
    models: Annotated[str, typer.Option(help="URI prefix of the checkpoints.")],
    keys: Annotated[str, typer.Option(help="URI prefix of the sealed keys.")],
    out: Annotated[str, typer.Option(help="Catalog to write: .parquet, .csv or .jsonl.")],
) -> None:
    """List the checkpoints under a prefix, each with the keys of its model, as a catalog."""
    entries = list_checkpoints(storage.absolute(models), storage.absolute(keys))
    without_key = [entry.uri for entry in entries if not entry.key_id]
    if without_key:
        log.warning(
            "%d checkpoints without a key, listed all the same (their audit is an error): %s%s",
            len(without_key),
            ", ".join(without_key[:3]),
            ", ..." if len(without_key) > 3 else "",
        )
    uri = storage.absolute(out)
    storage.replace(uri, write_catalog(entries, uri))
    _cli.emit(
        rows=len(entries),
        models=len({entry.model_id for entry in entries}),
        without_key=len(without_key),
        out=uri,
    )


def list_checkpoints(models: str, keys: str) -> list[CatalogEntry]:
    """One entry for each checkpoint and key of its model; a checkpoint without a key gets one, too.

    Args:
        models: Absolute URI prefix of the checkpoints.
        keys: Absolute URI prefix of the sealed keys.

    Raises:
        UsageError: There are no checkpoints.
    """
    found = [item for item in _listing(models) if PurePosixPath(item.uri).suffix.lower() in SUFFIXES]
    if not found:
        raise UsageError(f"no checkpoints ({', '.join(sorted(SUFFIXES))}) under {models}")
    key_ids = _key_ids(keys)
    model_ids = [_model_id(_relative(item.uri, models), key_ids) for item in found]
    arches = _arches(keys, {model: key_ids.get(model, []) for model in model_ids})
    rows = (
        (item, model_id, key_id)
        for item, model_id in zip(found, model_ids, strict=True)
        for key_id in key_ids.get(model_id) or [""]
    )
    return [
        CatalogEntry(
            row=row,
            model_id=model_id,
            uri=item.uri,
            arch=arches.get((model_id, key_id), ""),
            key_id=key_id,
            size_bytes=item.size,
            etag=item.etag,
        )
        for row, (item, model_id, key_id) in enumerate(rows)
    ]


def _listing(uri: str) -> list[storage.ObjectInfo]:
    try:
        return storage.listing(uri)
    except StorageError as error:
        if error.code is ErrorCode.OBJECT_MISSING:
            return []
        raise


def _relative(uri: str, prefix: str) -> PurePosixPath:
    return PurePosixPath(uri.removeprefix(prefix.rstrip("/") + "/"))


def _key_ids(keys: str) -> dict[str, list[str]]:
    """Ids of the keys of each model, less the retired ones."""
    paths = [_relative(item.uri, keys) for item in _listing(keys)]
    retired = {str(path) for path in paths if path.name.endswith(".retired.json")}
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        if path.suffix == _KEY_SUFFIX:
            known = found[str(path.parent)]  # a model all of whose keys are retired stays known
            if retirement_name(str(path.parent), path.stem) not in retired:
                known.append(path.stem)
    return dict(found)


def _model_id(path: PurePosixPath, known: Mapping[str, object]) -> str:
    """The known model with the longest id that the path begins with, else a guess from its folder."""
    candidates = [str(path.with_suffix("")), *(str(folder) for folder in path.parents if folder.name)]
    guess = candidates[min(1, len(candidates) - 1)]
    return next((candidate for candidate in candidates if candidate in known), guess)


def _arches(keys: str, key_ids: Mapping[str, list[str]]) -> dict[tuple[str, str], str]:
    """The architecture that the header of each sealed key names, "" where it cannot be read."""
    names = [(model_id, key_id) for model_id, ids in key_ids.items() for key_id in ids]
    with ThreadPoolExecutor(storage.IO_THREADS) as pool:
        return dict(
            zip(
                names,
                pool.map(lambda name: _arch(storage.join(keys, key_name(*name))), names),
                strict=True,
            )
        )


def _arch(uri: str) -> str:
    try:
        return str(read_header(storage.read(uri)).values["arch"])
    except (KeyFileError, KeyError):
        log.warning("%s is no readable sealed key: the audit of its model will be an error", uri)
        return ""


if __name__ == "__main__":
    _cli.run(app)
