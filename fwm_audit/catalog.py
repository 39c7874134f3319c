"""The catalog: which checkpoints exist, what architecture each has, which key audits it.

Parquet, CSV or JSON Lines with the columns `model_id, uri, arch, key_id` and, where known,
`sha256, size_bytes, etag`; further columns are ignored. A catalog is data: a bad row becomes an
entry that carries its problem, so that rows in = records out. Only a catalog that cannot be read
at all, or has no rows, is a `UsageError`.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fwm_audit.errors import CatalogError, ErrorCode, UsageError

REQUIRED: Final = ("model_id", "uri", "arch", "key_id")
_RELEASED: Final = ("model_id", "uri", "arch")
_IDENTITY: Final = ("model_id", "uri", "key_id")
SCHEMA: Final = pa.schema(
    [(name, pa.string()) for name in REQUIRED]
    + [("sha256", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())]
)
#: Names become paths in object storage: no empty, dotted or hidden parts, nothing to escape with.
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*(/[A-Za-z0-9][A-Za-z0-9._=+-]*)*")
_KEY_ID = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_NAME = 512
_MAX_URI = 4096
#: Schemes of fsspec whose hosts are not for the URI to choose.
STORES: Final = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"})


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One row: a checkpoint and the key that audits it.

    `row` counts from 0 in the catalog's order. `problem` says why the row cannot be audited.
    """

    row: int
    model_id: str
    uri: str
    arch: str
    key_id: str
    sha256: str | None = None
    size_bytes: int | None = None
    etag: str | None = None
    problem: CatalogError | None = None


def check_model_id(model_id: str) -> str:
    """`model_id` itself if it can name a folder in object storage.

    Raises:
        CatalogError: It cannot.
    """
    if len(model_id) > _MAX_NAME or not _MODEL_ID.fullmatch(model_id):
        raise CatalogError(
            ErrorCode.CATALOG_ROW,
            f"model_id {model_id[:80]!r} is not usable: letters, digits and . _ = + - in parts that start with a "
            f"letter or digit, joined by /, {_MAX_NAME} characters at most",
        )
    return model_id


def check_uri(uri: str, *, local: bool) -> str:
    """`uri` itself if a catalog may name it: an object in a store or, where that is allowed, a local file.

    Whoever writes a catalog must not make workers ask hosts of his choice (a cloud's metadata service among
    them), open what lies on their disks, or chain fsspec's file systems.

    Raises:
        CatalogError: It is something else.
    """
    scheme, colon, rest = uri.partition("://")
    # Control characters and those that change the direction of text have no business in a terminal or a report.
    unseen = any(unicodedata.category(character) in {"Cc", "Cf", "Cs"} for character in uri)
    if not uri or len(uri) > _MAX_URI or unseen or (colon and not rest):
        raise CatalogError(
            ErrorCode.CATALOG_ROW, f"the row has no uri, or one of other than 1 to {_MAX_URI} visible characters"
        )
    # Before an @ stand credentials, or behind it the account of another company.
    foreign = colon and (scheme not in {*STORES, "file"} or "@" in rest.partition("/")[0])
    if "::" in uri or foreign:
        raise CatalogError(
            ErrorCode.URI_NOT_ALLOWED,
            f"{uri[:120]!a} is in no object store: {', '.join(sorted(STORES))} are read, chained URIs are not",
        )
    if not local and (not colon or scheme == "file"):
        raise CatalogError(
            ErrorCode.URI_NOT_ALLOWED,
            f"{uri[:120]!a} is a local file, named by a catalog that is not: pass --allow-local if workers may open it",
        )
    return uri


def is_local(uri: str) -> bool:
    """Whether a URI names a local file."""
    return "://" not in uri or uri.startswith("file://")


def read_catalog(data: bytes, name: str, *, keyed: bool = True, allow_local: bool = False) -> tuple[CatalogEntry, ...]:
    """The entries of a catalog file, in its order.

    Args:
        data: The file's bytes.
        name: Its URI; the ending tells the format. A local catalog may name local files.
        allow_local: Whether any other may, too.
        keyed: Whether each row has to name a key; in a list of models to watermark, `key_id` is ignored.

    Raises:
        UsageError: Unknown ending, unreadable, a required column is missing, or no rows.
    """
    rows = _rows(data, name, REQUIRED if keyed else _RELEASED)
    if not rows:
        raise UsageError(f"the catalog {name} has no rows: list checkpoints first, with python -m jobs.catalog")
    seen: dict[tuple[str, str, str], int] = {}
    if not keyed:
        rows = [{**row, "key_id": None} for row in rows]
    local = allow_local or is_local(name)
    return tuple(_entry(number, row, seen, keyed=keyed, local=local) for number, row in enumerate(rows))


def add_entries(data: bytes | None, name: str, entries: Iterable[CatalogEntry]) -> bytes:
    """A catalog file's bytes with these entries at its end, less those that it has.

    Columns and rows that are there stay as they are, further columns of the new rows are empty.

    Args:
        data: The file's bytes so far, None if there is no such file.
        name: Its name; the ending tells the format.
        entries: What to add; an entry is known by model_id, uri and key_id.

    Raises:
        UsageError: As `read_catalog`.
    """
    if data is None or not data.strip():
        return write_catalog(entries, name)
    rows = _rows(data, name, REQUIRED)
    there = {tuple(str(row.get(column) or "") for column in _IDENTITY) for row in rows}
    fresh = [entry for entry in entries if (entry.model_id, entry.uri, entry.key_id) not in there]
    if not fresh:
        return data
    added = write_catalog(fresh, name)
    match _ending(name):
        case "parquet":
            tables = [pa.parquet.read_table(pa.BufferReader(part)) for part in (data, added)]
            sink = io.BytesIO()
            pa.parquet.write_table(pa.concat_tables(tables, promote_options="permissive"), sink)
            return sink.getvalue()
        case "csv":
            # As text throughout, so that what other columns hold is not read as numbers and written otherwise.
            header = pa.csv.read_csv(pa.BufferReader(data)).column_names
            text = pa.csv.ConvertOptions(column_types=dict.fromkeys([*header, *SCHEMA.names], pa.string()))
            tables = [pa.csv.read_csv(pa.BufferReader(part), convert_options=text) for part in (data, added)]
            sink = io.BytesIO()
            pa.csv.write_csv(pa.concat_tables(tables, promote_options="default"), sink)
            return sink.getvalue()
        case _:
            return data.rstrip() + b"\n" + added


def write_catalog(entries: Iterable[CatalogEntry], name: str) -> bytes:
    """A catalog file's bytes in the format that the ending of `name` tells.

    Raises:
        UsageError: Unknown ending.
    """
    table = pa.Table.from_pylist(
        [{column: getattr(entry, column) for column in SCHEMA.names} for entry in entries], SCHEMA
    )
    sink = io.BytesIO()
    match _ending(name):
        case "parquet":
            pa.parquet.write_table(table, sink)
        case "csv":
            pa.csv.write_csv(table, sink)
        case _:
            sink.writelines(json.dumps(row).encode() + b"\n" for row in table.to_pylist())
    return sink.getvalue()


def _ending(name: str) -> str:
    ending = name.rsplit(".", 1)[-1].lower()
    if ending not in {"parquet", "csv", "jsonl", "json", "ndjson"}:
        raise UsageError(f"{name}: a catalog ends in .parquet, .csv or .jsonl")
    return ending


def _rows(data: bytes, name: str, required: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    ending = _ending(name)
    try:
        match ending:
            case "parquet":
                table = pa.parquet.read_table(pa.BufferReader(data))
            case "csv":
                text = dict.fromkeys(SCHEMA.names, pa.string())
                options = pa.csv.ConvertOptions(column_types=text, strings_can_be_null=True, null_values=[""])
                table = pa.csv.read_csv(pa.BufferReader(data), convert_options=options) if data.strip() else None
            case _:
                return _json_rows(data, name, required)
    except pa.ArrowException as error:
        raise UsageError(f"cannot read the catalog {name}: {error}") from None
    if table is None:
        return []
    if missing := [column for column in required if column not in table.column_names]:
        raise UsageError(f"the catalog {name} lacks the columns {', '.join(missing)}")
    rows: Sequence[Mapping[str, Any]] = table.select(
        [column for column in SCHEMA.names if column in table.column_names]
    ).to_pylist()
    return rows


def _json_rows(data: bytes, name: str, required: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    try:
        lines = data.decode().split("\n")  # splitlines() also splits at U+2028, which JSON strings may hold
    except UnicodeDecodeError:
        raise UsageError(f"the catalog {name} is not UTF-8 text") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UsageError(f"the catalog {name}, line {number}: not a JSON object; one object a line is expected")
        rows.append(row)
    if rows and (missing := [column for column in required if all(column not in row for row in rows)]):
        raise UsageError(f"the catalog {name} lacks the columns {', '.join(missing)}")
    return rows


def _entry(
    number: int, row: Mapping[str, Any], seen: dict[tuple[str, str, str], int], *, keyed: bool, local: bool
) -> CatalogEntry:
    # Lone surrogates, which JSON can spell, fit into no UTF-8 record: they are replaced here.
    given = {column: "" if row.get(column) is None else str(row[column]) for column in REQUIRED}
    text = {column: value.encode(errors="replace").decode() for column, value in given.items()}
    sha256 = str(row["sha256"]).lower() if row.get("sha256") else None
    etag = str(row["etag"]).encode(errors="replace").decode() if row.get("etag") else None
    size: int | None = None
    problem: CatalogError | None = None
    try:
        if text != given:
            raise CatalogError(ErrorCode.CATALOG_ROW, "the row holds characters that are not Unicode text")
        check_model_id(text["model_id"])
        check_uri(text["uri"], local=local)
        if keyed and not text["key_id"]:
            raise CatalogError(
                ErrorCode.KEY_MISSING,
                "no key audits this checkpoint: embed a watermark in the model (python -m jobs.embed), "
                "then list the checkpoints again",
            )
        if keyed and not _KEY_ID.fullmatch(text["key_id"]):
            raise CatalogError(ErrorCode.CATALOG_ROW, "key_id is not 16 hex digits")
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise CatalogError(ErrorCode.CATALOG_ROW, "sha256 is not 64 hex digits")
        if row.get("size_bytes") not in (None, ""):
            try:
                size = int(row["size_bytes"])
            except (TypeError, ValueError, OverflowError):
                raise CatalogError(ErrorCode.CATALOG_ROW, "size_bytes is not a whole number") from None
        identity = (text["model_id"], text["uri"], text["key_id"])
        if identity in seen:
            raise CatalogError(
                ErrorCode.CATALOG_DUPLICATE,
                f"the row repeats row {seen[identity]} (same model_id, uri and key_id); that row was audited",
            )
        seen[identity] = number
    except CatalogError as error:
        problem = error
    return CatalogEntry(number, **text, sha256=sha256, size_bytes=size, etag=etag, problem=problem)
