"""Show what audits found, for people and for other tools, or prove that nothing of it was changed since.

`python -m jobs.report --help` has examples; README, "From a tampered row to the decision", is the tutorial.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fwm_audit import exports, ledger, storage
from fwm_audit.errors import UsageError
from fwm_audit.history import read
from fwm_audit.key import MasterSecret
from fwm_audit.records import printable
from fwm_audit.report import Report, Selection, State
from jobs import _cli

_EXAMPLES = """\b
Examples:
  python -m jobs.report --audits s3://acme/audits
  python -m jobs.report --audits s3://acme/audits --html report.html --keys s3://acme/keys
  python -m jobs.report --audits s3://acme/audits --explain vision/resnet --keys s3://acme/keys
  python -m jobs.report --audits s3://acme/audits --format sarif --fail-on tampered,error,not_checked > fwm.sarif
  python -m jobs.report --audits s3://acme/audits --model 'vision/*' --since 2026-11-01 --verdict tampered
  python -m jobs.report --audits s3://acme/audits --attestations s3://acme/attestations
  python -m jobs.report --audits s3://acme/audits --verify --public-key 9f1c... --head 51d0...

\b
With the master secret or --public-key, only records that the ledger vouches for count, and every output names what
does not; without, every output says that nothing was verified. The public key is that of `python -m jobs.keys
public-key`; who verifies needs no master secret. The head is what the last audit printed as `ledger`: with it, the
removal of the newest runs is noticed, too.
Exit codes: 0 done; 1 something is not as it was written, or --fail-on tampered met one; 2 usage or settings; 3 the
store cannot be read, or --fail-on met another verdict.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)
log = logging.getLogger("jobs.report")
#: Rows of the terminal's table that are there to show what is fine.
_ROOM = 40
_COLOURS = {State.TAMPERED: "bold red", State.ERROR: "yellow", State.NOT_CHECKED: "magenta", State.INTACT: "green"}


class Format(StrEnum):
    """What goes to standard output."""

    TABLE = "table"
    JSON = "json"
    SARIF = "sarif"


@app.command(epilog=_EXAMPLES)
def report(
    *,
    audits: Annotated[str, typer.Option(help="The audits' --out: URI prefix that holds runs/, audits/ and ledger/.")],
    format_: Annotated[Format, typer.Option("--format", help="What goes to standard output.")] = Format.TABLE,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write one self-contained page, too.")] = None,
    attestations: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Write a SLSA verification summary of each model, too (in-toto, DSSE)."),
    ] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Everything that is known of one model, and what to do next.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only models like 'vision/*'; repeatable.")
    ] = None,
    key: Annotated[list[str] | None, typer.Option(metavar="KEY_ID", help="Only these keys; repeatable.")] = None,
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Only runs from this day on, UTC.")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The fleet as it stood after this day, UTC.")
    ] = None,
    verdict: Annotated[
        str | None,
        typer.Option(metavar="VERDICTS", help="List only these: tampered,error,not_checked,intact. [default: all]"),
    ] = None,
    fail_on: Annotated[
        str | None, typer.Option(metavar="VERDICTS", help="Exit with 1 or 3 if a checkpoint has one of these.")
    ] = None,
    verify_: Annotated[bool, typer.Option("--verify", help="Hold every run, part and row against the ledger.")] = False,
    public_key: Annotated[
        list[str] | None,
        typer.Option(metavar="HEX", help="Trusted signer; repeatable. [default: that of the master secret]"),
    ] = None,
    head: Annotated[str | None, typer.Option(metavar="SHA256", help="An entry that the ledger has to hold.")] = None,
    keys: Annotated[
        str | None,
        typer.Option(
            help="The sealed keys: coverage and datasheets (with the master secret); was each committed to before the "
            "runs that used it?"
        ),
    ] = None,
    master_key: _cli.MasterKey = None,
) -> None:
    """Show the fleet: which checkpoints are tampered, which could not be checked, and since when."""
    public_key = [_cli.hexadecimal("--public-key", value) for value in public_key or ()]
    head = _cli.hexadecimal("--head", head) if head is not None else None
    if verify_:
        _verify(audits, public_key, head, keys, master_key)
        return
    shown, failing = _states("--verdict", verdict), _states("--fail-on", fail_on)
    if State.INTACT in failing:
        raise UsageError("--fail-on intact: name what is wrong, such as tampered,error,not_checked")
    master = _cli.master_secret(master_key)
    trusted = public_key or ([master.public_key] if master else None)
    if trusted is None and (head is not None or attestations is not None):
        option = "--head" if head is not None else "--attestations"
        raise UsageError(f"{option} needs verified records: give --public-key or the master secret")
    if attestations is not None and (key or since or until):
        raise UsageError("--attestations speaks of whole models, as they stand now: leave --key, --since, --until away")
    known = read(audits, trusted, head=head, keys=keys if trusted else None)
    days = [day.date() if day else None for day in (since, until)]
    made = Report(known, Selection(models=tuple(model or ()), keys=tuple(key or ()), since=days[0], until=days[1]))
    if not made.one("fleet")["checkpoints"] and (words := made.selection.words()):
        raise UsageError(f"no record is of {printable(words)}: check the filters")
    if keys is not None and master is not None:
        made.read_sheets(keys, master)
    for warning in made.warnings():
        log.warning("%s", printable(warning))
    _write(made, audits, html, attestations, master)
    if explain is not None:
        _explain(made, explain, format_)
    else:
        _show(made, shown, format_)
    _exit(made, failing)


def _states(option: str, text: str | None) -> list[State]:
    try:
        return [State(name.strip().replace("-", "_")) for name in text.split(",")] if text is not None else []
    except ValueError:
        raise UsageError(f"{option} {text!a}: name some of {', '.join(State)}, with commas between them") from None


def _exit(made: Report, failing: Sequence[State]) -> None:
    fleet = made.one("fleet")
    met = {state for state in failing if fleet[state]}
    if State.NOT_CHECKED in failing and (made.history.unfinished or made.last_complete is None or made.age is not None):
        met.add(State.NOT_CHECKED)  # rows of a catalog that have no record yet, or nights without a run
    if made.history.findings or State.TAMPERED in met:
        raise typer.Exit(_cli.EXIT_TAMPERED)
    if met:
        raise typer.Exit(_cli.EXIT_INCOMPLETE)


def _verify(audits: str, public_key: list[str], head: str | None, keys: str | None, master_key: Path | None) -> None:
    """Prove that no part, row or run was changed, removed or re-ordered, or say which."""
    trusted = public_key or [MasterSecret.from_file(master_key).public_key]
    seen = ledger.verify(audits, trusted, head=head, keys=keys)
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


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # as in _cli.emit


def _write(made: Report, audits: str, html: str | None, attestations: str | None, master: MasterSecret | None) -> None:
    if html is not None:
        from fwm_audit.page import render  # noqa: PLC0415 - the charts' library takes a while to import

        storage.replace(storage.absolute(html), render(made).encode())
        log.info("wrote %s", printable(html))
    if attestations is None:
        return
    written = 0
    for model_id, statement in exports.summaries(made, storage.absolute(audits)).items():
        name = exports.attestation_name(model_id, signed=master is not None)
        path = storage.join(storage.absolute(attestations), name)
        if statement is None:
            log.warning("no attestation of %s: none of its files could ever be read", printable(model_id))
            continue
        payload = exports.to_json(statement).encode()
        if master is not None:
            payload = master.envelope(exports.PAYLOAD_TYPE, payload)
        storage.replace(path, payload)
        written += 1
    signed = "signed" if master is not None else "not signed, as there is no master secret here"
    log.info("wrote %d attestations to %s, %s", written, printable(attestations), signed)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=False)


def _line(*parts: tuple[str, object]) -> Text:
    """One line of (style, text) without anything that a terminal would obey."""
    return Text.assemble(*((printable(text), style) for style, text in parts))


def _when(time: datetime | None) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M}" if time else ""


def _show(made: Report, verdicts: Sequence[State], format_: Format) -> None:
    if format_ is Format.JSON:
        _print(exports.to_json(exports.document(made, verdicts)))
    elif format_ is Format.SARIF:
        _print(exports.to_json(exports.sarif(made, verdicts)))
    else:
        _table(made, verdicts)
        history = made.history
        _cli.emit(verified=history.verified, findings=len(history.findings), **made.one("fleet"))


def _table(made: Report, verdicts: Sequence[State]) -> None:
    console = _console()
    rows = made.states(verdicts)
    if not verdicts:
        wrong = [row for row in rows if row["state"] != State.INTACT]
        rows = wrong + rows[len(wrong) :][: max(0, _ROOM - len(wrong))]
    since = {
        (row["model_id"], row["uri"]): row["first_tampered_at"]
        for row in made.rows("FROM incidents WHERE restored_run IS NULL")
    }
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("verdict", "model", "checkpoint", "labels", "moved", "same bytes", "looked at", "tampered since"):
        table.add_column(name, overflow="fold")
    for row in rows:
        state = State(row["state"])
        words = f"error: {row['error_code']}" if state is State.ERROR else state.words
        table.add_row(
            _line((_COLOURS[state], words)),
            _line(("", row["model_id"])),
            _line(("", row["uri"])),
            f"{row['matches']}/{row['triggers']}" if row["triggers"] else "",
            _line(("", row["displacement"] if row["triggers"] else "")),
            {True: "yes", False: "no", None: ""}[row["digest_matches"]],
            _when(row["audited_at"]),
            _when(since.get((row["model_id"], row["uri"]))) if state is State.TAMPERED else "",
        )
    console.print(table)
    fleet, last = made.one("fleet"), made.last_complete
    if not verdicts and (left := fleet["checkpoints"] - len(rows)):
        console.print(f"and {left} intact ones")
    console.print()
    counts = [
        (
            _COLOURS[state] if fleet[state] else "dim",
            f"{fleet[state]} {state.words}{'' if state is State.INTACT else ', '}",
        )
        for state in State
    ]
    console.print(_line(("", f"{fleet['checkpoints']} checkpoints of {fleet['models']} models: "), *counts))
    if last is not None:
        console.print(_line(("", f"last complete run: {last['run_id']}, {_when(last['started_at'])} UTC")))
    if not made.history.verified:
        console.print(_line(("bold yellow", "NOT VERIFIED: no public key or master secret was given")))
    elif findings := made.history.findings:
        console.print(_line(("bold red", f"NOT AS WRITTEN: see --verify ({len(findings)} findings)")))
    else:
        console.print(_line(("", "every record is signed and vouched for")))


def _explain(made: Report, model_id: str, format_: Format) -> None:
    known = made.explain(model_id)
    if not known:
        near = made.rows("SELECT model_id FROM models ORDER BY jaccard(model_id, ?) DESC, model_id LIMIT 3", model_id)
        names = ", ".join(printable(row["model_id"]) for row in near)
        raise UsageError(f"no record is of the model {printable(model_id)!r}; there are, among others: {names}")
    if format_ is Format.SARIF:
        raise UsageError("--explain is for people, or for programs with --format json")
    if format_ is Format.JSON:
        sheets = [dataclasses.asdict(sheet) for sheet in made.sheets or () if sheet.model_id == model_id]
        _print(exports.to_json(known | {"verified": made.history.verified, "sheets": sheets}))
        return
    console = _console()

    def say(name: str, value: object, style: str = "") -> None:
        console.print(_line(("dim", f"  {name:<18}"), (style, value)), soft_wrap=True)

    def head(text: str) -> None:
        console.print()
        console.print(_line(("bold", text)), soft_wrap=True)

    state = State(known["state"])
    console.print(_line(("bold", f"{model_id}: "), (_COLOURS[state], state.words)))
    for row in known["checkpoints"]:
        head(row["uri"])
        _explain_checkpoint(say, row)
    for incident in known["incidents"]:
        head(f"incident of {incident['uri']}")
        _explain_incident(say, incident)
    for row in known["keys"]:
        head(f"key {row['key_id']}")
        _explain_key(say, made, row)
    cost = known["cost"]
    head("cost")
    say("so far", f"{cost['audits']} audits, {cost['worker_seconds']:.1f} s of a worker, {cost['bytes_read']:,} bytes")
    if not made.history.verified:
        console.print()
        console.print(_line(("bold yellow", "NOT VERIFIED: no public key or master secret was given")))
    _cli.emit(
        model_id=model_id,
        state=state.value,
        checkpoints=len(known["checkpoints"]),
        verified=made.history.verified,
    )


def _explain_checkpoint(say: Callable[..., None], row: dict[str, Any]) -> None:
    state = State(row["state"])
    say("verdict", state.words, _COLOURS[state])
    if row["error_code"]:
        say("why", f"{row['error_code']}: {row['error_message']}")
    if row["triggers"]:
        say("labels", f"{row['matches']} of {row['triggers']} are right")
        say("moved", row["moved"])
        say(
            "checked as",
            f"{row['variant']} ({row['container']}, tensors {row['dtype']}, labels in {row['arithmetic']})",
        )
    same = {True: "the released ones", False: "other than the released ones", None: "not compared"}
    say("bytes", same[row["digest_matches"]])
    say("digest before", row["digest_released"] or "not known here: give --keys and the master secret")
    say("digest now", row["sha256"] or "not read")
    say("looked at", f"{_when(row['audited_at'])} UTC by {row['worker']} on {row['device']}, run {row['run_id']}")
    for look in row["history"][-8:]:
        what = look["error_code"] or (f"moved {look['displacement']}" if look["state"] == State.TAMPERED else "")
        carried = " (carried forward)" if look["carried_from"] else ""
        say(
            _when(look["run_started_at"]),
            f"{State(look['state']).words} {what} {(look['sha256'] or '')[:12]}{carried}".replace("  ", " "),
            _COLOURS[State(look["state"])],
        )
    say("next", row["next"], "bold")


def _explain_incident(say: Callable[..., None], incident: dict[str, Any]) -> None:
    say("first tampered", f"{_when(incident['first_tampered_at'])} in run {incident['first_run']}")
    if incident["last_intact_at"]:
        hours = incident["hours_to_detect"]
        say("last intact", f"{_when(incident['last_intact_at'])}: noticed after {hours:.1f} hours at most")
    else:
        say("last intact", "never: it was tampered at its first look")
    restored = incident["restored_at"]
    say("over", f"since {_when(restored)} (run {incident['restored_run']})" if restored else "no")


def _explain_key(say: Callable[..., None], made: Report, row: dict[str, Any]) -> None:
    say("method", f"{row['method']}, labels in {row['arithmetic'] or 'float64'}")
    sheet = made.sheet(row["model_id"], row["key_id"])
    if sheet is None:
        say("datasheet", "not read: give --keys and the master secret")
        return
    if sheet.problem:
        say("problem", sheet.problem, "bold yellow")
    if sheet.coverage is not None:
        say("covers", f"{sheet.coverage:.1%} of the parameters, {sheet.pairs} pairs, delta {sheet.delta:.2g} logits")
        say("variants", ", ".join(sheet.variants))
        say("made", sheet.created_at)
    for edit, (seen, tries) in sheet.datasheet.items():
        say("would notice", f"{seen} of {tries}: {edit}")


if __name__ == "__main__":
    _cli.run(app)
