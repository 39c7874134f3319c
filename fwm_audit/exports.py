"""A report in the forms that other tools read: SARIF 2.1.0, and SLSA verification summaries as in-toto statements."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

from fwm_audit import __version__
from fwm_audit.errors import ErrorCode
from fwm_audit.records import printable
from fwm_audit.report import Report, State, advice, moved
from fwm_audit.verdict import Verdict

_SARIF_SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
#: Who says so, and by which rule; which key is in the envelope.
_VERIFIER, _POLICY_NAME = "urn:fwm-audit:report", "urn:fwm-audit:policy:intact"
#: What a statement's `PASSED` says; levels that begin with SLSA_ are SLSA's own.
_LEVEL: Final = "FWM_AUDIT_INTACT"
_POLICY: Final = (
    "every checkpoint of the model that any run listed was looked at since the last complete run began, and is intact"
)
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"


def document(report: Report, verdicts: Iterable[State] = ()) -> dict[str, Any]:
    """The whole report as plain data for JSON: times in ISO 8601."""
    views = {name: report.rows(f"FROM {name}") for name in ("runs", "models", "incidents", "changes", "keys", "cost")}
    values = {
        "made_at": report.made_at,
        "verified": report.history.verified,
        "warnings": report.warnings(),
        "selection": report.selection.words(),
        "fleet": report.one("fleet"),
        "detection": report.one("detection"),
        "checkpoints": [row | {"next": advice(row)} for row in report.states(verdicts)],
        **views,
    }
    plain: dict[str, Any] = json.loads(to_json(values))
    return plain


def to_json(values: Any) -> str:
    """JSON on one line, ASCII only, times in ISO 8601."""
    return json.dumps(values, default=lambda value: value.isoformat() if isinstance(value, datetime) else str(value))


def sarif(report: Report, verdicts: Iterable[State] = ()) -> dict[str, Any]:
    """A SARIF log: one result for each checkpoint that is not intact.

    `executionSuccessful` is false where a checkpoint could not be checked, a run is not complete or something is not
    as it was written, so that an empty list of results is not read as a clean fleet.
    """
    wanted = [state for state in list(verdicts) or State if state is not State.INTACT]
    rows = report.states(wanted) if wanted else []
    fleet = report.one("fleet")
    before = {(row["model_id"], row["uri"]): row for row in report.rows("FROM changes")}
    opened = {(row["model_id"], row["uri"]): row for row in report.rows("FROM incidents WHERE restored_run IS NULL")}
    ids = sorted({_rule_id(row) for row in rows})
    history = report.history
    sound = not history.findings and not history.unfinished and report.last_complete is not None and report.age is None
    return {
        "$schema": _SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "fwm-audit",
                        "version": __version__,
                        "rules": [_rule(rule) for rule in ids],
                    }
                },
                "invocations": [
                    {
                        "executionSuccessful": sound and not fleet["error"] and not fleet["not_checked"],
                        "endTimeUtc": _utc(report.made_at),
                        "toolExecutionNotifications": [
                            {"level": "warning", "message": {"text": printable(text)}} for text in report.warnings()
                        ],
                    }
                ],
                "columnKind": "unicodeCodePoints",
                "results": [_result(row, ids, before, opened) for row in rows],
                "properties": {"verified": history.verified, "fleet": fleet, "selection": report.selection.words()},
            }
        ],
    }


def _rule_id(row: Mapping[str, Any]) -> str:
    if row["state"] != State.ERROR:
        return str(row["state"])
    known = row["error_code"] in set(ErrorCode)
    return f"error/{row['error_code']}" if known else "error/unknown"


def _rule(rule: str) -> dict[str, Any]:
    state, _, code = rule.partition("/")
    texts = {
        State.TAMPERED: "The checkpoint computes another function than the released model.",
        State.NOT_CHECKED: "The last complete run did not look at a checkpoint that an earlier one did.",
    }
    return {
        "id": rule,
        "name": "".join(word.capitalize() for word in f"{state}_{code}".split("_")),
        "shortDescription": {"text": texts.get(State(state), f"The checkpoint could not be checked: {code}.")},
        "defaultConfiguration": {"level": "error" if state == State.TAMPERED else "warning"},
    }


def _result(
    row: Mapping[str, Any],
    rules: list[str],
    changes: Mapping[tuple[str, str], Mapping[str, Any]],
    opened: Mapping[tuple[str, str], Mapping[str, Any]],
) -> dict[str, Any]:
    subject = row["model_id"], row["uri"]
    change, incident = changes.get(subject), opened.get(subject)
    baseline = "unchanged" if change is None else "updated" if change["before"] == row["state"] else "new"
    match row["state"]:
        case State.TAMPERED:
            said = f"is tampered: {row['matches']} of {row['triggers']} labels are right; it moved {moved(row)}"
        case State.NOT_CHECKED:
            said = f"was not checked by the last complete run; before, it was {row['verdict']}"
        case _:
            said = f"could not be checked: {row['error_message']}"
    rule = _rule_id(row)
    return {
        "ruleId": rule,
        "ruleIndex": rules.index(rule),
        "level": "error" if row["state"] == State.TAMPERED else "warning",
        "message": {"text": printable(f"{row['uri']} of {row['model_id']} {said}. Next: {advice(row)}.")},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": _artifact(row["uri"])}},
                "logicalLocations": [{"name": printable(row["model_id"]), "kind": "module"}],
            }
        ],
        # The same from run to run, so that a tool knows a finding again.
        "partialFingerprints": {"checkpoint/v1": hashlib.sha256("\0".join(subject).encode()).hexdigest()[:16]},
        "baselineState": baseline,
        **({"provenance": {"firstDetectionTimeUtc": _utc(incident["first_tampered_at"])}} if incident else {}),
        "properties": {
            name: row[name]
            for name in ("uri", "run_id", "key_id", "displacement", "matches", "triggers", "sha256", "digest_matches")
        },
    }


def _artifact(uri: str) -> str:
    """A relative reference, bucket first: code scanners refuse a whole log for a scheme that is not their own."""
    parts = (quote(part) for part in uri.rpartition("://")[2].split("/") if part not in {"", ".", ".."})
    return "/".join(parts) or "unnamed"


def reference(uri: str) -> str:
    """A valid URI reference for whatever a record names: local paths become file: URIs."""
    if "://" in uri:
        scheme, _, rest = uri.partition("://")
        if scheme.isascii() and scheme[:1].isalpha() and scheme.replace("+", "").replace("-", "").isalnum():
            return f"{scheme}://{quote(rest, safe='/@:')}"
    return f"file://{quote(uri)}" if uri.startswith("/") else quote(uri)


def _utc(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def summaries(report: Report, audits: str) -> dict[str, dict[str, Any] | None]:
    """By model id, a verification summary (in-toto Statement v1) over all its checkpoints that were read.

    It is `PASSED` only if all of them are intact. Where no file can be read any more, it names the last bytes that
    could; None stands for a model of which no file ever was: no digest can be named, so nothing can be stated.

    Args:
        report: Of a history that was verified, and of all days and keys of it.
        audits: URI of the audits, as the verifier's source.

    Raises:
        ValueError: The history was not verified, or is a part.
    """
    chosen = report.selection
    if not report.history.verified or chosen.keys or chosen.since or chosen.until:
        raise ValueError("what was not verified, or is a part, is not attested")
    # What is not as it was written could concern any model.
    sound = not report.history.findings and report.last_complete is not None
    models: dict[str, list[dict[str, Any]]] = {}
    for row in report.states():
        models.setdefault(row["model_id"], []).append(row)
    made: dict[str, dict[str, Any] | None] = {}
    for model_id, rows in sorted(models.items()):
        read = [row for row in rows if row["sha256"] and row["state"] != State.NOT_CHECKED] or report.rows(
            "SELECT uri, max_by(sha256, look) AS sha256 FROM looks WHERE model_id = ? AND sha256 IS NOT NULL "
            "GROUP BY uri ORDER BY uri",
            model_id,
        )
        subjects = [{"name": row["uri"], "digest": {"sha256": row["sha256"]}} for row in read]
        passed = sound and all(row["state"] == Verdict.INTACT for row in rows)
        made[model_id] = _statement(report, audits, model_id, rows, subjects, passed=passed) if subjects else None
    return made


def _statement(
    report: Report,
    audits: str,
    model_id: str,
    rows: list[dict[str, Any]],
    subjects: list[dict[str, Any]],
    *,
    passed: bool,
) -> dict[str, Any]:
    rows = [row for row in rows if row["state"] != State.NOT_CHECKED] or rows
    looked, runs = [row["audited_at"] for row in rows], sorted({row["run_id"] for row in rows})
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subjects,
        "predicateType": "https://slsa.dev/verification_summary/v1",
        "predicate": {
            "verifier": {"id": _VERIFIER, "version": {"fwm-audit": __version__}},
            # The oldest look: later than that, nothing is known of some checkpoint.
            "timeVerified": _utc(min(looked)),
            "resourceUri": f"urn:fwm-audit:model:{quote(model_id, safe='')}",
            "policy": {
                "uri": _POLICY_NAME,
                "digest": {"sha256": hashlib.sha256(_POLICY.encode()).hexdigest()},
            },
            "inputAttestations": [
                {
                    "uri": reference(f"{audits.rstrip('/')}/runs/{run_id}/manifest.json"),
                    "digest": {"sha256": report.history.manifests[run_id]},
                }
                for run_id in runs
                if run_id in report.history.manifests
            ],
            "verificationResult": "PASSED" if passed else "FAILED",
            "verifiedLevels": [_LEVEL] if passed else ["FAILED"],
            "slsaVersion": "1.0",
        },
    }


def attestation_name(model_id: str, *, signed: bool) -> str:
    """Name of a model's statement: its id with everything quoted that a store or shell could read as more.

    One that is not signed has a name of its own, so that it takes no signed one's place.
    """
    quoted = quote(model_id, safe="")
    if not 0 < len(quoted) <= 200 or quoted.startswith("."):
        quoted = hashlib.sha256(model_id.encode()).hexdigest()
    return f"{quoted}.{'intoto' if signed else 'statement'}.json"
