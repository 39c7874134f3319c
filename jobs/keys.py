"""List the sealed keys of a store, retire one, seal all anew: `python -m jobs.keys --help`."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer
from rich.table import Table

from fwm_audit import storage
from fwm_audit.catalog import check_model_id
from fwm_audit.commitment import commit
from fwm_audit.errors import FwmError, UsageError
from fwm_audit.key import MasterSecret, fingerprint, key_name, read_header, retirement_name
from jobs import _cli

_EXAMPLES = """\b
Examples:
  python -m jobs.keys list --keys s3://acme/keys
  python -m jobs.keys retire --keys s3://acme/keys --model-id vision/resnet --key-id 0123456789abcdef \\
      --reason 'rotated in November'
  python -m jobs.keys reseal --keys s3://acme/keys --old-master-key old.key --master-key new.key
  python -m jobs.keys public-key

\b
To rotate a key: embed a second one (python -m jobs.embed ... --generation 2), list the checkpoints again
(python -m jobs.catalog), and retire the first once audits with the second one are as expected.
To rotate the master secret: reseal while no run is in work, then give workers the new one. Signatures by the former one
stay valid: keep its public key.
The last line of standard output is JSON.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None, epilog=_EXAMPLES, no_args_is_help=True)
log = logging.getLogger("jobs.keys")
Keys = Annotated[str, typer.Option(help="URI prefix of the sealed keys.")]


@app.callback()
def _keys() -> None:
    """Sealed keys: list them, retire one, seal them anew; the public half of what signs audits."""


@app.command("list")
def list_keys(*, keys: Keys) -> None:
    """List every sealed key with its model, date, architecture and whether it is retired."""
    prefix = storage.absolute(keys)
    names = {item.uri.removeprefix(prefix.rstrip("/") + "/") for item in storage.listing(prefix)}
    table = Table("model", "key", "made", "method", "arch", "fingerprint", "state")
    rows = []
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix != ".fwmkey":
            continue
        retired = retirement_name(str(path.parent), path.stem) in names
        state = "retired" if retired else "in use"
        header, digest = {}, ""
        try:
            sealed = storage.read(storage.join(prefix, name))
            header, digest = read_header(sealed).values, fingerprint(sealed)
        except FwmError as error:
            state = f"unreadable: {error.message}"
        made, method, arch = (str(header.get(field, "")) for field in ("created_at", "method", "arch"))
        rows.append({"model_id": str(path.parent), "key_id": path.stem, "created_at": made, "state": state})
        table.add_row(str(path.parent), path.stem, made, method, arch, digest[:16], state)
    _cli.CONSOLE.print(table)
    _cli.emit(keys=rows)


@app.command()
def retire(
    *,
    keys: Keys,
    model_id: Annotated[str, typer.Option(help="The key's model.")],
    key_id: Annotated[str, typer.Option(help="16 hex digits.")],
    reason: Annotated[str, typer.Option(help="Kept with the key.")] = "",
) -> None:
    """Retire a key: catalogs no longer list it, and audits refuse it. The key itself stays, and so do old records."""
    prefix = storage.absolute(keys)
    name = key_name(check_model_id(model_id), key_id)
    if not storage.exists(storage.join(prefix, name)):
        raise UsageError(f"there is no key {name} under {prefix}: python -m jobs.keys list shows those that are")
    said = {"retired_at": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason}
    uri = storage.join(prefix, retirement_name(model_id, key_id))
    fresh = storage.create(uri, json.dumps(said).encode())
    if not fresh:
        log.info("%s was retired before", name)
    _cli.emit(model_id=model_id, key_id=key_id, retired=True, before=not fresh)


@app.command("public-key")
def public_key(*, master_key: _cli.MasterKey = None) -> None:
    """Print the public key that verifies manifests, ledgers and commitments signed under the master secret."""
    _cli.emit(public_key=MasterSecret.from_file(master_key).public_key)


@app.command()
def reseal(
    *,
    keys: Keys,
    old_master_key: Annotated[Path, typer.Option(help="File with the master secret that sealed the keys.")],
    master_key: _cli.MasterKey = None,
) -> None:
    """Seal every key under a new master secret, in place; what is sealed under it already is left alone.

    A run that is in work meanwhile reports `key_changed_during_run` for the rows of keys that it had seen before.
    """
    from fwm_audit.triggers import TriggerSet  # noqa: PLC0415 - torch takes seconds to import

    old, new = MasterSecret.from_file(old_master_key), MasterSecret.from_file(master_key)
    prefix = storage.absolute(keys)
    done = before = 0
    for item in storage.listing(prefix):
        if not item.uri.endswith(".fwmkey"):
            continue
        sealed = storage.read(item.uri)
        header = read_header(sealed).values
        if header.get("master_id") == new.master_id:
            before += 1
            continue
        fresh = TriggerSet.unseal(sealed, old).seal(new)
        path = PurePosixPath(item.uri.removeprefix(prefix.rstrip("/") + "/"))
        commit(prefix, str(path.parent), path.stem, fresh, new)  # first: what is replaced is not looked at again
        storage.replace(item.uri, fresh)
        done += 1
        log.info("%s", path)
    _cli.emit(resealed=done, before=before, public_key=new.public_key)


if __name__ == "__main__":
    _cli.run(app)
