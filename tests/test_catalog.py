"""The catalog: what is written is read back, and a bad row stays a row."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwm_audit.catalog import CatalogEntry, add_entries, check_model_id, read_catalog, write_catalog
from fwm_audit.errors import CatalogError, UsageError
from fwm_audit.key import MasterSecret
from jobs.catalog import list_checkpoints

FORMATS = ("parquet", "csv", "jsonl")
KEY_ID = "0123456789abcdef"
GOOD = {"model_id": "team/model", "uri": "s3://b/m.pt", "arch": "timm:any", "key_id": KEY_ID}

part = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,8}", fullmatch=True)
# Control characters and lone surrogates have no place in a URI; everything else may be in one.
text = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), min_size=1, max_size=20)
entries = st.lists(
    st.builds(
        CatalogEntry,
        row=st.just(0),
        model_id=st.lists(part, min_size=1, max_size=3).map("/".join),
        uri=text.filter(lambda uri: "::" not in uri and "://" not in uri),
        arch=text,
        key_id=st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
        sha256=st.none() | st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
        size_bytes=st.none() | st.integers(0, 2**63 - 1),
        etag=st.none() | text,
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda entry: (entry.model_id, entry.uri, entry.key_id),
)


def columns(entry):
    return (entry.model_id, entry.uri, entry.arch, entry.key_id, entry.sha256, entry.size_bytes, entry.etag)


@pytest.mark.parametrize("ending", FORMATS)
@given(entries=entries)
def test_what_is_written_is_read_back(ending, entries):
    """Every format keeps every value, in order, and finds nothing wrong."""
    read = read_catalog(write_catalog(entries, f"c.{ending}"), f"c.{ending}")
    assert [columns(entry) for entry in read] == [columns(entry) for entry in entries]
    assert [entry.row for entry in read] == list(range(len(entries)))
    assert all(entry.problem is None for entry in read)


@pytest.mark.parametrize("uri", ["/etc/passwd", "relative.pt", "file:///proc/self/environ", "../up.pt"])
def test_only_a_local_catalog_names_local_files(uri):
    data = json.dumps(GOOD | {"uri": uri}).encode()
    (local,) = read_catalog(data, "/catalogs/c.jsonl")
    (remote,) = read_catalog(data, "s3://b/c.jsonl")
    (allowed,) = read_catalog(data, "s3://b/c.jsonl", allow_local=True)
    assert local.problem is None
    assert allowed.problem is None
    assert remote.problem.code == "uri_not_allowed"
    assert "--allow-local" in remote.problem.message


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"model_id": "../up"}, "catalog_row_invalid", "model_id"),
        ({"model_id": ""}, "catalog_row_invalid", "model_id"),
        ({"model_id": "a//b"}, "catalog_row_invalid", "model_id"),
        ({"model_id": "x" * 600}, "catalog_row_invalid", "model_id"),
        ({"uri": None}, "catalog_row_invalid", "no uri"),
        ({"uri": "s3://"}, "catalog_row_invalid", "no uri"),
        ({"uri": "s3://b/" + "x" * 5000}, "catalog_row_invalid", "visible"),
        ({"uri": "s3://b/a\x1b[2J"}, "catalog_row_invalid", "visible"),
        ({"uri": "s3://b/\u202etp.ledom"}, "catalog_row_invalid", "visible"),
        ({"uri": "http://169.254.169.254/latest/meta-data/"}, "uri_not_allowed", "no object store"),
        ({"uri": "https://host/m.pt"}, "uri_not_allowed", "no object store"),
        ({"uri": "ftp://host/m.pt"}, "uri_not_allowed", "no object store"),
        ({"uri": "ssh://host/m.pt"}, "uri_not_allowed", "no object store"),
        ({"uri": "data://,x"}, "uri_not_allowed", "no object store"),
        ({"uri": "S3://b/m.pt"}, "uri_not_allowed", "no object store"),
        ({"uri": "simplecache::s3://b/m.pt"}, "uri_not_allowed", "chained"),
        ({"uri": "zip://x::s3://b/m.zip"}, "uri_not_allowed", "chained"),
        ({"key_id": ""}, "key_missing", "no key"),
        ({"key_id": "../../etc"}, "catalog_row_invalid", "key_id"),
        ({"sha256": "beef"}, "catalog_row_invalid", "sha256"),
        ({"size_bytes": "many"}, "catalog_row_invalid", "size_bytes"),
    ],
)
def test_a_bad_row_becomes_a_problem(change, code, says):
    """Rows in are entries out: a row that cannot be audited says so itself."""
    lines = [json.dumps(row).encode() for row in (GOOD, GOOD | {"uri": "s3://b/2.pt"} | change)]
    good, bad = read_catalog(b"\n".join(lines), "c.jsonl")
    assert good.problem is None
    assert bad.problem.code == code
    assert says in bad.problem.message


@pytest.mark.parametrize(
    "line",
    [
        '{"model_id": "m", "uri": "a\\ud800", "arch": "x", "key_id": "0123456789abcdef"}',
        '{"model_id": "m", "uri": "a", "arch": "x", "key_id": "0123456789abcdef", "size_bytes": Infinity}',
        '{"model_id": "m", "uri": "a", "arch": "x", "key_id": "0123456789abcdef", "size_bytes": [1]}',
    ],
)
def test_what_json_can_spell_and_parquet_cannot_is_a_problem_of_its_row(line):
    (entry,) = read_catalog(line.encode(), "c.jsonl")
    assert entry.problem.code == "catalog_row_invalid"
    entry.uri.encode()


def test_json_nested_without_end_is_a_usage_error():
    with pytest.raises(UsageError, match="line 1"):
        read_catalog(b"[" * 100_000, "c.jsonl")


def test_a_repeated_row_is_a_problem_of_the_repetition():
    """The first of two equal rows is audited; another key of the same checkpoint is no repetition."""
    rows = [GOOD, GOOD, GOOD | {"key_id": "f" * 16}]
    first, second, third = read_catalog(b"\n".join(json.dumps(row).encode() for row in rows), "c.jsonl")
    assert (first.problem, third.problem) == (None, None)
    assert second.problem.code == "catalog_row_duplicate"
    assert "row 0" in second.problem.message


@pytest.mark.parametrize(
    ("data", "name", "says"),
    [
        (b"", "c.csv", "no rows"),
        (b"", "c.jsonl", "no rows"),
        (write_catalog([], "c.parquet"), "c.parquet", "no rows"),
        (b"model_id,uri,arch,key_id\n", "c.csv", "no rows"),
        (b"model_id,uri\na,b\n", "c.csv", "arch, key_id"),
        (b'{"uri": "x"}\n', "c.jsonl", "model_id"),
        (b"{}\nnonsense\n", "c.jsonl", "line 2"),
        (b"\xff\xfe", "c.jsonl", "UTF-8"),
        (b"PAR1 cut short", "c.parquet", "cannot read"),
        (b"", "c.xlsx", "ends in"),
    ],
)
def test_a_catalog_that_is_none_is_refused(data, name, says):
    """An audit of nothing must not look like a success."""
    with pytest.raises(UsageError, match=says):
        read_catalog(data, name)


def test_unescaped_line_separators_stay_inside_their_json_string():
    """Only a line feed ends a line of JSON Lines."""
    line = json.dumps(GOOD | {"uri": "s3://b/a\u2028b\x85c.pt"}, ensure_ascii=False).encode()
    (entry,) = read_catalog(line + b"\r\n", "c.jsonl")
    assert entry.uri == "s3://b/a\u2028b\x85c.pt"


def test_further_columns_are_ignored():
    """A catalog may carry what its owner needs."""
    (entry,) = read_catalog(json.dumps(GOOD | {"owner": "vision team"}).encode(), "c.jsonl")
    assert columns(entry) == ("team/model", "s3://b/m.pt", "timm:any", KEY_ID, None, None, None)


@pytest.mark.parametrize("model_id", ["a", "team/model-1", "a/b/c", "v1.2_x=3+4"])
def test_model_ids_that_can_be_folders(model_id):
    """What object storage can hold is taken as it is."""
    assert check_model_id(model_id) == model_id


@pytest.mark.parametrize("model_id", ["", "/a", "a/", "a//b", ".", "..", "a/../b", ".hidden", "a b", "a\n", "ä"])
def test_model_ids_that_cannot(model_id):
    """Nothing escapes the prefix, hides in it, or needs quoting."""
    with pytest.raises(CatalogError):
        check_model_id(model_id)


def seal(folder, model_id, key_id=KEY_ID, arch="timm:any"):
    path = folder / model_id / f"{key_id}.fwmkey"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MasterSecret(bytes(32)).seal(b"", {"arch": arch}))


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"weights")


def test_checkpoints_find_the_model_with_the_longest_name(tmp_path):
    """MODEL_ID/anything.pt and MODEL_ID.pt belong to the model; other files are no checkpoints."""
    models, keys = tmp_path / "models", tmp_path / "keys"
    put(models, "a/1.pt", "a/b/2.safetensors", "a/b/deep/3.PTH", "c.bin", "a/readme.md", "a/b.ckpt")
    for model_id in ("a", "a/b", "c"):
        seal(keys, model_id, arch=f"timm:{model_id}")
    found = list_checkpoints(str(models), str(keys))
    assert {entry.uri.removeprefix(f"{models}/"): entry.model_id for entry in found} == {
        "a/1.pt": "a",
        "a/b.ckpt": "a/b",
        "a/b/2.safetensors": "a/b",
        "a/b/deep/3.PTH": "a/b",
        "c.bin": "c",
    }
    assert all(entry.arch == f"timm:{entry.model_id}" for entry in found)
    assert all((entry.key_id, entry.size_bytes) == (KEY_ID, 7) for entry in found)
    assert [entry.uri for entry in found] == sorted(entry.uri for entry in found)


def test_each_key_of_a_model_audits_each_of_its_checkpoints(tmp_path):
    """Two keys and two checkpoints are four rows."""
    put(tmp_path / "models", "m/1.pt", "m/2.pt")
    seal(tmp_path / "keys", "m")
    seal(tmp_path / "keys", "m", "f" * 16)
    rows = list_checkpoints(str(tmp_path / "models"), str(tmp_path / "keys"))
    assert [(entry.uri[-4:], entry.key_id) for entry in rows] == [
        ("1.pt", KEY_ID),
        ("1.pt", "f" * 16),
        ("2.pt", KEY_ID),
        ("2.pt", "f" * 16),
    ]


def test_checkpoints_without_a_key_are_not_left_out(tmp_path):
    """What nobody watermarked comes out of the audit as an error, not as silence."""
    put(tmp_path / "models", "orphan/1.pt", "single.pt")
    rows = list_checkpoints(str(tmp_path / "models"), str(tmp_path / "keys"))
    assert [(entry.model_id, entry.key_id) for entry in rows] == [("orphan", ""), ("single", "")]
    read = read_catalog(write_catalog(rows, "c.csv"), "c.csv")
    assert [entry.problem.code for entry in read] == ["key_missing", "key_missing"]


def test_a_damaged_key_still_names_its_checkpoints(tmp_path):
    """The row stays, with its key, so that the audit says what is wrong with it."""
    put(tmp_path / "models", "m/1.pt")
    put(tmp_path / "keys", f"m/{KEY_ID}.fwmkey")
    (row,) = list_checkpoints(str(tmp_path / "models"), str(tmp_path / "keys"))
    assert (row.key_id, row.arch) == (KEY_ID, "")


def test_no_checkpoints_is_a_usage_error(tmp_path):
    """A wrong prefix is said at once."""
    with pytest.raises(UsageError, match="no checkpoints"):
        list_checkpoints(str(tmp_path / "nowhere"), str(tmp_path))


@pytest.mark.parametrize("ending", FORMATS)
@given(entries=entries)
def test_entries_are_added_once_and_what_is_there_stays(ending, entries):
    name = f"c.{ending}"
    grown = None
    for _ in range(2):
        for entry in entries:
            grown = add_entries(grown, name, [entry])
    assert [columns(entry) for entry in read_catalog(grown, name)] == [columns(entry) for entry in entries]


@pytest.mark.parametrize("ending", FORMATS)
def test_columns_of_ones_own_survive_an_addition(ending):
    table = pa.table({**{name: [value] for name, value in GOOD.items()}, "owner": ["007"]})
    name, sink = f"c.{ending}", io.BytesIO()
    match ending:
        case "parquet":
            pa.parquet.write_table(table, sink)
        case "csv":
            pa.csv.write_csv(table, sink)
        case _:
            sink.write(json.dumps(table.to_pylist()[0]).encode())
    more = CatalogEntry(0, "other", "s3://b/o.pt", "timm:any", KEY_ID, size_bytes=12)
    grown = add_entries(sink.getvalue(), name, [more])
    assert [entry.model_id for entry in read_catalog(grown, name)] == ["team/model", "other"]
    assert read_catalog(grown, name)[1].size_bytes == 12
    assert b"007" in (grown if ending != "parquet" else str(pa.parquet.read_table(io.BytesIO(grown))).encode())


def test_a_list_of_models_to_watermark_needs_no_keys():
    rows = [{name: value for name, value in GOOD.items() if name != "key_id"}, {"model_id": "", "uri": "u", "arch": ""}]
    data = "\n".join(map(json.dumps, rows)).encode()
    first, second = read_catalog(data, "m.jsonl", keyed=False)
    assert (first.problem, first.key_id) == (None, "")
    assert second.problem is not None
    with pytest.raises(UsageError):
        read_catalog(data, "m.jsonl")
