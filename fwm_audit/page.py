"""A report as one page that needs nothing else: no network, no server, charts and records inside.

Records and the charts' library are compressed in the page, and the page's policy (CSP) lets no other script run than
the two whose digests it names. Everything that others chose (ids, URIs, messages) is data there, never markup.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Final

import jinja2
import plotly.offline
from markupsafe import Markup

from fwm_audit import __version__
from fwm_audit.records import printable
from fwm_audit.report import Report, State, advice, moved

#: Rows of a list that stands in the page itself; the table of all checkpoints has every one of them.
_ROOM: Final = 25
_SLOWEST, _KEYS, _CHARTED_KEYS = 15, 500, 25


def render(report: Report) -> str:
    """The page: HTML of a few megabytes at most, whatever is in it."""
    fleet, runs = report.one("fleet"), report.rows("FROM runs ORDER BY number")
    lists = {
        "tampered": report.rows(
            "SELECT now.*, first_run, first_tampered_at, last_intact_at, hours_to_detect FROM checkpoints AS now "
            "LEFT JOIN incidents ON incidents.model_id = now.model_id AND incidents.uri = now.uri "
            "AND restored_run IS NULL WHERE state = 'tampered' "
            "ORDER BY first_tampered_at DESC, now.model_id, now.uri LIMIT ?",
            _ROOM,
        ),
        "failing": report.rows("FROM failing ORDER BY looks DESC, model_id, uri LIMIT ?", _ROOM),
        "unlisted": report.rows(
            "FROM checkpoints WHERE state = 'not_checked' ORDER BY audited_at DESC, model_id, uri LIMIT ?", _ROOM
        ),
        "changes": report.rows(
            "FROM changes ORDER BY list_position(['tampered', 'error', 'not_checked', 'intact'], now), model_id, uri "
            "LIMIT ?",
            _ROOM,
        ),
        "slowest": report.rows("FROM slowest LIMIT ?", _SLOWEST),
        "cost": report.rows("FROM cost ORDER BY worker_seconds DESC, model_id LIMIT ?", _SLOWEST),
    }
    keys = report.rows("FROM keys ORDER BY model_id, key_id")
    problems = {(sheet.model_id, sheet.key_id) for sheet in report.sheets or () if sheet.problem}
    lists["keys"] = sorted(keys, key=lambda row: (row["model_id"], row["key_id"]) not in problems)[:_KEYS]
    sheets = sorted(report.sheets or (), key=lambda sheet: (sheet.coverage is not None, sheet.coverage, sheet.model_id))
    data = {
        "checkpoints": _checkpoints(report),
        "runs": [
            {name: run[name] for name in ("run_id", "complete", "intact", "tampered", "error")}
            | {"label": f"{run['started_at']:%d %b %Y %H:%M}"}
            for run in runs
        ],
        "slowest": [
            {name: row[name] or 0 for name in ("fetch_ms", "load_ms", "verify_ms")} | {"label": printable(row["uri"])}
            for row in lists["slowest"]
        ],
        "keys": [
            {"label": printable(sheet.model_id), "coverage": sheet.coverage}
            for sheet in sheets
            if sheet.coverage is not None
        ][:_CHARTED_KEYS],
    }
    folder = resources.files("fwm_audit")
    script = (folder / "page.js").read_text()
    charts, charts_digest = _library()
    policy = (
        f"default-src 'none'; script-src {_digest(script)} {charts_digest}; "
        # The charts' library styles its elements itself.
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"when": _when, "number": _number, "moved": moved, "advice": advice, "count": _count}
    return environment.from_string((folder / "page.html").read_text()).render(
        report=report,
        version=__version__,
        fleet=fleet,
        states=list(State),
        runs=runs,
        last=report.last_complete,
        warnings=report.warnings(),
        headline=_headline(report, fleet),
        detection=report.one("detection"),
        changed=report.rows("SELECT count(*) AS changes FROM changes")[0]["changes"],
        failing=report.rows("SELECT count(*) AS failing FROM failing")[0]["failing"],
        audits=report.rows("SELECT sum(audits)::BIGINT AS audits, sum(worker_seconds) AS worker_seconds, "
                           "sum(bytes_read)::BIGINT AS bytes_read FROM cost")[0],
        sheets={(sheet.model_id, sheet.key_id): sheet for sheet in sheets},
        edits=list(dict.fromkeys(edit for sheet in sheets for edit in sheet.datasheet)),
        lists=lists,
        keys=len(keys),
        newest=next(iter(report.rows("FROM newest")), None),
        policy=policy,
        style=Markup((folder / "page.css").read_text()),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own file
        data=_packed(json.dumps(data, separators=(",", ":")).encode()),
        charts=charts,
    )  # fmt: skip


def _headline(report: Report, fleet: dict[str, Any]) -> tuple[State, str]:
    """The worst that is known, in words."""
    if fleet["tampered"]:
        return State.TAMPERED, f"{_count(fleet['tampered'], 'checkpoint')} tampered"
    if fleet["error"]:
        return State.ERROR, f"{_count(fleet['error'], 'checkpoint')} could not be checked"
    if fleet["not_checked"] or report.history.unfinished or report.history.findings or report.last_complete is None:
        return State.NOT_CHECKED, "Not everything was checked"
    if report.age is not None:
        return State.NOT_CHECKED, f"Nothing was checked for {_count(report.age.days, 'day')}"
    if not report.history.verified:
        return State.NOT_CHECKED, "No tampering recorded, and no record verified"
    return State.INTACT, f"{_count(fleet['checkpoints'], 'checkpoint')} intact"


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _checkpoints(report: Report) -> dict[str, Any]:
    """Columns of the table; text as numbers of a sorted list, so that the browser sorts numbers only."""
    rows = report.columns(
        "SELECT list_position(['tampered', 'error', 'not_checked', 'intact'], state) - 1 AS state, model_id, uri, "
        "CASE state WHEN 'tampered' THEN 'moved: ' || displacement WHEN 'error' THEN coalesce(error_code, 'error') "
        "WHEN 'not_checked' THEN 'was ' || verdict ELSE CASE WHEN NOT digest_matches THEN 'other bytes' ELSE '' END "
        "END AS finding, matches, triggers, epoch(audited_at)::BIGINT AS looked, "
        "round(coalesce(fetch_ms, 0) + coalesce(load_ms, 0) + coalesce(verify_ms, 0), 1) AS ms "
        "FROM checkpoints ORDER BY state, model_id, uri"
    )
    return {name: values if name in _NUMBERS else _coded(values) for name, values in rows.items()}


_NUMBERS: Final = frozenset({"state", "matches", "triggers", "looked", "ms"})


def _coded(values: Sequence[str]) -> dict[str, list[Any]]:
    words = sorted(set(values))
    place = {word: number for number, word in enumerate(words)}
    return {"words": [printable(word) for word in words], "codes": [place[value] for value in values]}


@functools.cache
def _library() -> tuple[str, str]:
    """The charts' library as it stands in the page, and its digest as the policy names it."""
    script = plotly.offline.get_plotlyjs()
    return _packed(script.encode()), _digest(script)


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _finalize(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _when(time: datetime | None) -> Markup:
    """A time that machines read, too."""
    if time is None:
        return Markup("")
    time = time.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(time.isoformat(), f"{time:%d %b %Y %H:%M}")


def _number(value: float | None, form: str = ",", unit: str = "") -> Markup:
    """A number as people read it, with all its digits for machines."""
    if value is None:
        return Markup('<span class="none">none</span>')
    return Markup('<data value="{}">{}</data>{}').format(repr(value), format(value, form), unit)
