"""Show what audits found, or prove that nothing of it was changed since: `python -m jobs.report --help`."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Annotated

import typer

from fwm_audit.errors import UsageError
from fwm_audit.key import MasterSecret
from fwm_audit.ledger import verify
from jobs import _cli

_EXAMPLES = """\b
Examples:
  python -m jobs.report --audits s3://acme/audits --verify
  python -m jobs.report --audits s3://acme/audits --verify --public-key 9f1c... --head 51d0...

\b
The public key is that of `python -m jobs.keys public-key`; who verifies needs no master secret. The head is what the
last audit printed as `ledger`: with it, the removal of the newest runs is noticed, too.
Exit codes: 0 everything is as it was written; 1 something is not; 2 usage or settings; 3 the store cannot be read.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)
log = logging.getLogger("jobs.report")


@app.command(epilog=_EXAMPLES)
def report(
    *,
    audits: Annotated[str, typer.Option(help="The audits' --out: URI prefix that holds runs/, audits/ and ledger/.")],
    verify_: Annotated[bool, typer.Option("--verify", help="Hold every run, part and row against the ledger.")] = False,
    public_key: Annotated[
        list[str] | None,
        typer.Option(metavar="HEX", help="Trusted signer; repeatable. [default: that of the master secret]"),
    ] = None,
    head: Annotated[str | None, typer.Option(metavar="SHA256", help="An entry that the ledger has to hold.")] = None,
    keys: Annotated[
        str | None, typer.Option(help="The sealed keys: was each committed to before the runs that used it?")
    ] = None,
    master_key: _cli.MasterKey = None,
) -> None:
    """Prove that no part, row or run was changed, removed or re-ordered, or say which."""
    if not verify_:
        raise UsageError("say what to do: --verify")
    given = {"--public-key": public_key or [], "--head": [head] if head is not None else []}
    for option, values in given.items():
        if wrong := [value for value in values if not re.fullmatch(r"[0-9a-fA-F]{64}", value)]:
            raise UsageError(f"{option} {wrong[0][:80]!a} is not 64 hex digits")
    trusted = [key.lower() for key in public_key or ()] or [MasterSecret.from_file(master_key).public_key]
    seen = verify(audits, trusted, head=head.lower() if head else None, keys=keys)
    if not seen.runs and not seen.findings:
        raise UsageError(f"no run has finished under {audits}: name the --out of the audits")
    for finding in seen.findings:
        # Whoever can write there chooses the names.
        log.error("%s %s", ascii(finding.path)[1:-1], finding.problem)
    for run_id in seen.incomplete:
        log.warning(
            "run %s is not complete: its parts are signed, but one that is gone is not missed", ascii(run_id)[1:-1]
        )
    _cli.emit(
        verified=not seen.findings,
        runs=seen.runs,
        parts=seen.parts,
        rows=seen.rows,
        incomplete=list(seen.incomplete),
        findings=[dataclasses.asdict(finding) for finding in seen.findings],
        ledger=dataclasses.asdict(seen.head) if seen.head else None,
    )
    if seen.findings:
        raise typer.Exit(_cli.EXIT_TAMPERED)


if __name__ == "__main__":
    _cli.run(app)
