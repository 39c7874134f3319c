"""Audit every checkpoint of a catalog against its sealed key: `python -m jobs.audit --help`."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fwm_audit import logs
from fwm_audit.errors import FwmError, UsageError
from fwm_audit.fleet import IncompleteError, run_audit
from fwm_audit.plan import AuditJob, plan_audit
from fwm_audit.records import counts
from fwm_audit.verdict import Tolerance, Verdict
from fwm_audit.webhook import read_url
from jobs import _cli

_LOG_EVERY_S = 10.0
_EXAMPLES = """\b
Examples:
  python -m jobs.audit --catalog models.parquet --keys s3://acme/keys --out s3://acme/audits
  python -m jobs.audit --catalog models.csv --keys keys --out audits --run-id nightly-0412 --dry-run
  python -m jobs.audit --catalog s3://acme/models.parquet --keys s3://acme/keys --out s3://acme/audits --incremental
  ray job submit --working-dir . -- python -m jobs.audit --catalog s3://acme/models.parquet ...

\b
Exit codes: 0 all intact; 1 at least one tampered; 2 usage or settings; 3 errors or incomplete.
The last line of standard output is JSON with the run id and the counts by verdict.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)
log = logging.getLogger("jobs.audit")


@app.command(epilog=_EXAMPLES)
def audit(
    *,
    catalog: Annotated[str, typer.Option(help="Catalog: URI of a .parquet, .csv or .jsonl file.")],
    keys: Annotated[str, typer.Option(help="URI prefix of the sealed keys.")],
    out: Annotated[str, typer.Option(help="URI prefix for runs/ and audits/.")],
    run_id: Annotated[str | None, typer.Option(help="Resumes the run of this id. [default: time and random]")] = None,
    tolerance: Annotated[Tolerance, typer.Option(help="How far a model may have moved.")] = Tolerance.EXACT,
    actors: Annotated[
        int | None,
        typer.Option(min=1, help="Worker processes. [default: one per CPU, or per share of a GPU]"),
    ] = None,
    gpus_per_actor: Annotated[float, typer.Option(min=0.0, help="Share of a GPU for each; 0: CPU.")] = 0.0,
    timeout: Annotated[float, typer.Option(min=1.0, max=7 * 86400.0, help="Seconds for one model.")] = 600.0,
    incremental: Annotated[
        bool,
        typer.Option(
            "--incremental",
            help="Carry intact records of the last complete run forward where ETag and size are the same.",
        ),
    ] = False,
    max_age: Annotated[
        float,
        typer.Option(metavar="DAYS", min=0.0, max=366.0, help="With --incremental: audit again after this time."),
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB", min=0.1, max=1e6, help="Of one CPU worker, enforced. [default: half its share of the node]"
        ),
    ] = None,
    webhook: _cli.Webhook = None,
    allow_local: _cli.AllowLocal = False,
    master_key: _cli.MasterKey = None,
    allow_factory: _cli.AllowFactory = None,
) -> None:
    """Audit every checkpoint of a catalog with Ray, and store one record for each row."""
    job = AuditJob(
        catalog=catalog,
        keys=keys,
        out=out,
        run_id=run_id or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}",
        tolerance=tolerance,
        allowed_factories=tuple(allow_factory or ()),
        actors=actors,
        gpus_per_actor=gpus_per_actor,
        timeout_s=timeout,
        master_key_file=str(master_key.absolute()) if master_key else None,
        memory_bytes=int(memory * 2**30) if memory else None,
        allow_local=allow_local,
        carry_days=max_age if incremental else None,
    )
    logs.bind(run_id=job.run_id)
    if dry_run:
        _describe(job)
        return
    hook = read_url(webhook) if webhook else None
    try:
        plan = plan_audit(job)  # before a cluster is started: what is asked wrongly is told at once
        log.info("run %s: %d of %d shards to audit", job.run_id, len(plan.missing), plan.run.shards)
        with _cli.cluster(), _progress() as progress:
            summary = run_audit(plan, progress=progress)
    except (IncompleteError, FwmError, UsageError) as error:
        verdicts = error.verdicts if isinstance(error, IncompleteError) else counts(())  # the others: before any model
        log.error("%s", error)  # noqa: TRY400  # a sentence for a person; the traceback says nothing more
        _cli.emit(hook, run_id=job.run_id, complete=False, **verdicts)
        if isinstance(error, UsageError):
            raise typer.Exit(_cli.EXIT_USAGE) from None
        raise typer.Exit(exit_code(verdicts, complete=False)) from None
    _cli.emit(
        hook,
        run_id=job.run_id,
        complete=True,
        **summary.verdicts,
        errors=summary.errors,
        carried=summary.carried,
        manifest=summary.manifest,
        ledger=dataclasses.asdict(summary.ledger),
    )
    raise typer.Exit(exit_code(summary.verdicts, complete=True))


def exit_code(verdicts: Mapping[str, int], *, complete: bool) -> int:
    """What the counts of a run mean to a shell: one tampered model wins over everything else."""
    if verdicts[Verdict.TAMPERED]:
        return _cli.EXIT_TAMPERED
    return 0 if complete and not verdicts[Verdict.ERROR] else _cli.EXIT_INCOMPLETE


def _describe(job: AuditJob) -> None:
    plan = plan_audit(job)
    run = plan.run
    _cli.emit(
        run_id=run.run_id,
        dry_run=True,
        resumed=plan.resumed,
        rows=run.rows,
        unusable_rows=sum(entry.problem is not None for entry in plan.entries),
        keys=len(run.key_fingerprints),
        missing_keys=sum(value is None for value in run.key_fingerprints.values()),
        shards=run.shards,
        shards_to_audit=len(plan.missing),
        tolerance=job.tolerance,
        carries_from=plan.before.run_id if plan.before else None,
        parts=plan.locate(run.part(0).rpartition("/")[0]),
    )


@contextmanager
def _progress() -> Iterator[Callable[[int, int, Mapping[str, int]], None]]:
    """A progress bar on a terminal, elsewhere a log line now and then."""
    if not _cli.CONSOLE.is_terminal:
        said = time.monotonic()

        def say(done: int, total: int, verdicts: Mapping[str, int]) -> None:
            nonlocal said
            if done == total or time.monotonic() - said > _LOG_EVERY_S:
                said = time.monotonic()
                log.info("%d of %d: %s", done, total, _counted(verdicts))

        yield say
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=_cli.CONSOLE) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, verdicts: bar.update(
            task, completed=done, total=total, description=_counted(verdicts)
        )


def _counted(verdicts: Mapping[str, int]) -> str:
    return ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in Verdict)


if __name__ == "__main__":
    _cli.run(app)
