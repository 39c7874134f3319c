"""What a history means: the views of views.sql over a selection of it, key by key what its datasheet says, and advice.

Nothing is computed here that the views do not say, so that whoever asks them by hand sees the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from importlib import resources
from typing import Any, Final

import duckdb
import pyarrow as pa

from fwm_audit import storage
from fwm_audit.catalog import check_model_id
from fwm_audit.errors import ErrorCode, FwmError
from fwm_audit.history import History
from fwm_audit.key import MasterSecret, fingerprint, key_name
from fwm_audit.records import SCHEMA
from fwm_audit.verdict import Displacement

#: A complete run of longer ago says little about today.
STALE: Final = timedelta(hours=48)


# Days are made from the epoch, as the plain cast would take the time zone of the machine, and DuckDB's own time zones
# are an extension that it downloads.
_RECORDS: Final = """
CREATE TABLE records AS SELECT * EXCLUDE (day)
FROM (SELECT *, make_timestamp(epoch_us(run_started_at))::DATE AS day FROM stored)
WHERE ($since::DATE IS NULL OR day >= $since) AND ($until::DATE IS NULL OR day <= $until)
  AND ($keys::VARCHAR[] IS NULL OR list_contains($keys, key_id))
  AND ($models::VARCHAR[] IS NULL OR len(list_filter($models, lambda pattern: model_id GLOB pattern)) > 0)
"""
_RUN_FILES: Final = """
CREATE TABLE run_files AS SELECT * EXCLUDE (day)
FROM (SELECT *, make_timestamp(epoch_us(started_at::TIMESTAMPTZ))::DATE AS day FROM stored_run_files)
WHERE ($since::DATE IS NULL OR day >= $since) AND ($until::DATE IS NULL OR day <= $until)
"""


class State(StrEnum):
    """How a checkpoint stands now, the worst first: a verdict, or the last complete run did not list it.

    A tampered one stays tampered while nobody looks.
    """

    TAMPERED = "tampered"
    ERROR = "error"
    NOT_CHECKED = "not_checked"
    INTACT = "intact"

    @property
    def words(self) -> str:
        """For a person."""
        return {"error": "could not be checked", "not_checked": "not checked"}.get(self.value, self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which records count; nothing given is all of them.

    Attributes:
        models: Patterns of model ids, `*` and `?` as in a shell.
        keys: Ids of keys.
        since: First day of runs, UTC.
        until: Last day of runs, UTC: with it, a report shows the fleet as it stood then.
    """

    models: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    since: date | None = None
    until: date | None = None

    def words(self) -> str:
        """What is selected, for a person; empty if everything is."""
        parts = [
            f"{name} {', '.join(map(str, values))}"
            for name, values in (("models", self.models), ("keys", self.keys))
            if values
        ]
        parts += [f"{name} {day}" for name, day in (("since", self.since), ("until", self.until)) if day]
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """What a sealed key says of itself, without what would help to evade it (triggers, labels, which layers).

    Attributes:
        problem: Why there is nothing else, if so.
        coverage: Share of parameters whose last mantissa bit it sees.
        datasheet: By simulated edit, how many of how many tries it detected.
        delta: Logits between the triggers and their boundary.
    """

    model_id: str
    key_id: str
    problem: str | None = None
    fingerprint: str | None = None
    created_at: str | None = None
    pairs: int | None = None
    coverage: float | None = None
    delta: float | None = None
    variants: tuple[str, ...] = ()
    checkpoint_sha256: str | None = None
    datasheet: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Report:
    """A selection of a history, to be asked in SQL.

    Attributes:
        history: All of it.
        selection: What of it counts.
        made_at: Now.
        sheets: Of the keys in use; None where nobody gave the keys and the master secret.
    """

    def __init__(self, history: History, selection: Selection | None = None) -> None:
        self.history = history
        self.selection = selection or Selection()
        self.made_at = datetime.now(UTC)
        self.sheets: list[Sheet] | None = None
        self._database = duckdb.connect()
        self._database.register("stored", history.records)
        self._database.register("stored_run_files", history.run_files)
        days = {"since": self.selection.since, "until": self.selection.until}
        names = {"models": list(self.selection.models) or None, "keys": list(self.selection.keys) or None}
        self._database.execute(_RECORDS, days | names)
        self._database.execute(_RUN_FILES, days)
        self._database.execute((resources.files("fwm_audit") / "views.sql").read_text())

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """The answer to a query over the views, row by row."""
        answer: list[dict[str, Any]] = self._ask(query, values).to_pylist()
        return answer

    def columns(self, query: str, *values: Any) -> dict[str, list[Any]]:
        """The answer to a query over the views, column by column."""
        answer: dict[str, list[Any]] = self._ask(query, values).to_pydict()
        return answer

    def _ask(self, query: str, values: Sequence[Any]) -> pa.Table:
        answer = self._database.sql(query, params=list(values)).to_arrow_table()
        # DuckDB gives times in the zone of the machine.
        zoned = [
            field.with_type(pa.timestamp("us", tz="UTC")) if pa.types.is_timestamp(field.type) else field
            for field in answer.schema
        ]
        return answer.cast(pa.schema(zoned))

    def one(self, view: str) -> dict[str, Any]:
        """The one row of a view."""
        (row,) = self.rows(f"FROM {view}")
        return row

    @property
    def last_complete(self) -> dict[str, Any] | None:
        """The newest run of the selection that has a manifest."""
        return next(iter(self.rows("FROM runs WHERE complete ORDER BY number DESC LIMIT 1")), None)

    @property
    def age(self) -> timedelta | None:
        """How long ago the last complete run began, if that is too long; the past that `until` asks for is no age."""
        last = self.last_complete
        age = self.made_at - last["started_at"] if last is not None and self.selection.until is None else None
        return age if age is not None and age > STALE else None

    def states(self, verdicts: Iterable[State] = ()) -> list[dict[str, Any]]:
        """Every checkpoint as it stands now, the worst first; of some states only, if any are named."""
        return self.rows(
            "FROM checkpoints WHERE state IN (SELECT unnest(?::VARCHAR[])) "
            "ORDER BY list_position(['tampered', 'error', 'not_checked', 'intact'], state), model_id, uri",
            [state.value for state in list(verdicts) or State],
        )

    def warnings(self) -> list[str]:
        """What has to be known before any number is believed; the text may hold names that others chose."""
        said = []
        if not self.history.verified:
            said.append(
                "Nothing here was verified: no public key or master secret was given, so these records are whatever "
                "lies in the store, and whoever can write there can have made them."
            )
        if findings := self.history.findings:
            said.append(
                f"{findings[0].path} {findings[0].problem}"
                + (f", and {len(findings) - 1} more findings like it" if len(findings) > 1 else "")
                + ": not everything is as it was written, and what nobody vouches for is left out of this report. "
                "See python -m jobs.report --verify"
            )
        said += [
            f"Run {run.run_id} is not complete: {run.stored} of {run.rows} catalog rows have a record. "
            "The same --run-id resumes it."
            for run in self.history.unfinished
        ]
        if problems := [sheet for sheet in self.sheets or () if sheet.problem]:
            said.append(
                f"The key {problems[0].key_id} of {problems[0].model_id}: {problems[0].problem}"
                + (f"; {len(problems) - 1} more keys have a problem" if len(problems) > 1 else "")
            )
        last = self.last_complete
        if last is None:
            said.append("No complete run is among these: what is not listed may never have been looked at.")
        elif self.age is not None:
            said.append(
                f"The last complete run, {last['run_id']}, began {self.age.days} days ago: this is how things stood "
                "then."
            )
        return said

    def read_sheets(self, keys: str, master: MasterSecret) -> None:
        """Open the sealed keys that checkpoints stand on now."""
        with ThreadPoolExecutor(storage.IO_THREADS) as pool:
            rows = self.rows("FROM keys ORDER BY model_id, key_id")
            self.sheets = list(pool.map(lambda row: _sheet(keys, row, master), rows))

    def sheet(self, model_id: str, key_id: str) -> Sheet | None:
        """What a key says of itself, if that was read."""
        names = (model_id, key_id)
        return next((sheet for sheet in self.sheets or () if (sheet.model_id, sheet.key_id) == names), None)

    def explain(self, model_id: str) -> dict[str, Any]:
        """Everything that is known of one model, plain data; empty if it was never seen."""
        about = self.rows("FROM models WHERE model_id = ?", model_id)
        if not about:
            return {}
        checkpoints = self.rows(
            "FROM checkpoints WHERE model_id = ? "
            "ORDER BY list_position(['tampered', 'error', 'not_checked', 'intact'], state), uri",
            model_id,
        )
        history: dict[str, list[dict[str, Any]]] = {}
        for look in self.rows("FROM looks WHERE model_id = ? ORDER BY uri, look", model_id):
            history.setdefault(look["uri"], []).append(look)
        return {
            **about[0],
            "checkpoints": [
                {
                    **{name: row[name] for name in ("state", *SCHEMA.names)},
                    "moved": moved(row),
                    "next": advice(row),
                    "digest_released": self._released(row, history[row["uri"]]),
                    "history": [{name: look[name] for name in _LOOK} for look in history[row["uri"]]],
                }
                for row in checkpoints
            ],
            "incidents": self.rows("FROM incidents WHERE model_id = ? ORDER BY first_tampered_at, uri", model_id),
            "keys": self.rows("FROM keys WHERE model_id = ? ORDER BY key_id", model_id),
            "cost": self.rows("FROM cost WHERE model_id = ?", model_id)[0],
        }

    def _released(self, row: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str | None:
        """SHA-256 of the released file: as the key says, or as a look found it that was the same."""
        sheet = self.sheet(row["model_id"], row["key_id"])
        if sheet is not None and sheet.checkpoint_sha256:
            return sheet.checkpoint_sha256
        same = (look["sha256"] for look in history if look["digest_matches"] and look["key_id"] == row["key_id"])
        return next(same, None)


_LOOK: Final = (
    *("number", "run_id", "run_started_at", "audited_at", "state", "displacement", "matches", "triggers", "variant"),
    *("container", "dtype", "sha256", "etag", "size_bytes", "digest_matches", "key_id", "error_code", "carried_from"),
)


def _sheet(keys: str, row: Mapping[str, Any], master: MasterSecret) -> Sheet:
    from fwm_audit.triggers import TriggerSet  # noqa: PLC0415 - torch takes seconds to import

    model_id, key_id = row["model_id"], row["key_id"]
    if not re.fullmatch(r"[0-9a-f]{16}", key_id):
        return Sheet(model_id=model_id, key_id=key_id, problem="no key has such an id")
    try:
        check_model_id(model_id)  # it becomes part of a path
        sealed = storage.read(storage.join(keys, key_name(model_id, key_id)))
        triggers = TriggerSet.unseal(sealed, master)
    except FwmError as error:
        return Sheet(model_id=model_id, key_id=key_id, problem=error.message)
    if fingerprint(sealed) != row["key_fingerprint"]:
        problem = "the sealed key is not the one that the last audit used: it was sealed anew, or replaced"
    elif (triggers.model_id, triggers.key_id) != (model_id, key_id):
        problem = f"the sealed key is for {triggers.model_id}/{triggers.key_id}"
    else:
        problem = None
    return Sheet(
        model_id=model_id,
        key_id=key_id,
        problem=problem,
        fingerprint=fingerprint(sealed),
        created_at=triggers.created_at,
        pairs=triggers.pairs,
        coverage=triggers.coverage.total,
        delta=triggers.rungs[0].delta,
        variants=triggers.variants,
        checkpoint_sha256=triggers.checkpoint_sha256,
        datasheet=dict(triggers.datasheet),
    )


_MOVED: Final = {
    Displacement.NONE: "not at all: every label of the exact rung is right",
    Displacement.FLOAT32: "by no more than float32 arithmetic does: the exact rung broke, the float32 rung holds",
    Displacement.HALF: "by no more than weights in half precision do: the exact and float32 rungs broke, half holds",
    Displacement.BEYOND: "further than half precision explains: every rung broke",
    Displacement.UNKNOWN: "unknown: the key has one rung for this variant, and it broke",
}


def moved(row: Mapping[str, Any]) -> str:
    """How far a checkpoint has moved, and which rung broke."""
    if row["verdict"] not in {"intact", "tampered"}:
        return "unknown: no label was taken"
    return _MOVED.get(row["displacement"], "unknown")


_ADVICE: Final = {
    ErrorCode.CATALOG_ROW: "correct the row in the catalog",
    ErrorCode.CATALOG_DUPLICATE: "remove the repeated row from the catalog; its other row was audited",
    ErrorCode.URI_NOT_ALLOWED: "find out who put this URI into the catalog; if it is yours, see --allow-local",
    ErrorCode.ARCH_UNKNOWN: "correct `arch` in the catalog",
    ErrorCode.ARCH_NOT_ALLOWED: "find out who put this architecture into the catalog; if it is yours, --allow-factory",
    ErrorCode.OBJECT_MISSING: "find out who removed the object, and restore the release or list the checkpoints again",
    ErrorCode.OBJECT_CHANGED: "somebody wrote to it during the audit: audit it again now",
    ErrorCode.STORAGE: "look at the store and its permissions, then audit again",
    ErrorCode.CONTAINER_UNKNOWN: "find out who wrote a file of another kind there; restore the release",
    ErrorCode.CHECKPOINT_CORRUPT: "the file cannot be loaded: restore the release, and find out who cut or wrote it",
    ErrorCode.CHECKPOINT_UNSAFE: "treat it as an attack: load it nowhere, keep it as evidence, find out who wrote it, "
    "restore the release",
    ErrorCode.CHECKPOINT_MISMATCH: "another architecture lies there: find out who wrote it, and restore the release",
    ErrorCode.CHECKPOINT_OTHER: "the catalog states another digest: find out which of the two is right",
    ErrorCode.NON_FINITE: "its weights hold NaN or infinity: restore the release",
    ErrorCode.KEY_MISSING: "embed a watermark in this model (python -m jobs.embed), or correct its key in the catalog",
    ErrorCode.KEY_UNREADABLE: "restore the sealed key, or give the audit the master secret that sealed it",
    ErrorCode.KEY_OTHER_MODEL: "find out who moved the sealed key; restore it, or correct the catalog",
    ErrorCode.KEY_CHANGED: "find out who replaced the sealed key during the run; audit again",
    ErrorCode.KEY_RETIRED: "list the checkpoints again (python -m jobs.catalog): the model's newer key takes its place",
    ErrorCode.RUNG_MISSING: "audit with another --tolerance, or embed again",
    ErrorCode.TIMEOUT: "raise --timeout; if it still hangs, treat the file as hostile",
    ErrorCode.WORKER_DIED: "audit it alone with more memory; if it still kills its worker, treat the file as hostile",
    ErrorCode.OUT_OF_MEMORY: "raise --memory; if the release needs much less, treat the file as hostile",
}


def advice(row: Mapping[str, Any]) -> str:
    """What to do next about a checkpoint: a sentence, free of what others chose."""
    restore = (
        "take it out of service, keep the file, find out who wrote it (the store's access log), restore the release"
    )
    match row["state"]:
        case State.INTACT if row["digest_matches"] is False:
            said = "nothing, if it was saved anew on purpose: it computes the same from other bytes"
        case State.INTACT:
            said = "nothing"
        case State.NOT_CHECKED:
            said = (
                "if it was withdrawn, nothing; otherwise find out why the last complete run did not list it "
                "(python -m jobs.catalog)"
            )
        case State.TAMPERED if row["digest_matches"]:
            said = (
                "the released bytes compute something else on that worker: compare its hardware, its torch and timm "
                "versions and the architecture's code before you suspect the file"
            )
        case State.TAMPERED if row["displacement"] == Displacement.FLOAT32:
            said = (
                f"if somebody re-computed it in float32 on purpose, audit with --tolerance float32; otherwise {restore}"
            )
        case State.TAMPERED if row["displacement"] == Displacement.HALF:
            said = (
                "a small edit: one step of training, a flipped bit, or a conversion that nobody declared. If it is "
                f"a form of the release, embed with --variants; otherwise {restore}"
            )
        case State.TAMPERED:
            said = restore
        case _:
            said = _ADVICE.get(row["error_code"], "read the worker's log, and audit it again")
    return said
