"""Make one Parquet file of each day's many: `python -m jobs.compact --help`."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Annotated

import typer

from fwm_audit.compaction import compact
from jobs import _cli

_EXAMPLES = """\b
Examples:
  python -m jobs.compact --out s3://acme/audits
  python -m jobs.compact --out audits --until 2026-03-31

\b
OUT/compacted/run_date=DAY/audits.parquet holds the rows of all runs that began on that day. The parts stay where they
are: query either OUT/audits or OUT/compacted.
Exit codes: 0 every day has its file; 2 usage or settings; 3 some day has an incomplete run.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)
log = logging.getLogger("jobs.compact")


@app.command(epilog=_EXAMPLES)
def command(
    *,
    out: Annotated[str, typer.Option(help="URI prefix that holds runs/ and audits/.")],
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The last day. [default: yesterday]")
    ] = None,
    public_key: Annotated[
        list[str] | None,
        typer.Option(metavar="HEX", help="Trusted signer of runs; repeatable. [default: that of the master secret]"),
    ] = None,
    master_key: _cli.MasterKey = None,
) -> None:
    """Make one Parquet file of each day's parts, beside them; days that have theirs are left alone."""
    rows = parts = days = there = incomplete = 0
    trusted = [_cli.hexadecimal("--public-key", value) for value in public_key or ()] or None
    if trusted is None and (master := _cli.master_secret(master_key)) is not None:
        trusted = [master.public_key]
    if trusted is None:
        log.warning("no master secret and no --public-key: who signed the runs is not checked")
    for day in compact(out, until.replace(tzinfo=UTC).date() if until else None, trusted):
        if day.incomplete is not None:
            incomplete += 1
            log.warning("%s: left alone, as run %s is incomplete: resume it", day.day, day.incomplete)
        elif day.parts:
            days, rows, parts = days + 1, rows + day.rows, parts + day.parts
            log.info("%s: %d rows of %d parts", day.day, day.rows, day.parts)
        else:
            there += 1
    _cli.emit(days=days, rows=rows, parts=parts, there=there, incomplete=incomplete)
    if incomplete:
        raise typer.Exit(_cli.EXIT_INCOMPLETE)


if __name__ == "__main__":
    _cli.run(app)
