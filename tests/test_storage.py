"""Storage: one winner among many writers, one version among many reads, against a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import pickle
import random
import socket
import stat
import threading
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import fsspec.asyn
import pytest
import s3fs
import stamina

from fwm_audit import storage
from fwm_audit.errors import ErrorCode, StorageError
from tests.proxy import Proxy

# listdir names what is there, nothing more is asked.
# ruff: noqa: PTH208

MIB = 1 << 20
#: Three ranges, the last one short.
BIG = random.Random(7).randbytes(2 * storage._RANGE_BYTES + MIB + 12_345)


@pytest.fixture(params=["local", "file", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def place(request, tmp_path):
    """A prefix in each kind of store."""
    return {
        "local": lambda: str(tmp_path),
        "file": lambda: f"file://{tmp_path}",
        "memory": lambda: f"memory://{uuid.uuid4()}",
        "s3": lambda: request.getfixturevalue("s3"),
    }[request.param]()


@pytest.fixture
def proxy(s3_server, monkeypatch):
    """A proxy in front of the S3 server which does what its `script` says of each request."""
    with Proxy(s3_server) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    # A client keeps the endpoint that it was made with.
    s3fs.S3FileSystem.clear_instance_cache()


def fetched(uri):
    with storage.fetch(uri) as file:
        data = Path(file.path).read_bytes()
    assert file.size == len(data)
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    return data


def code(action, *args):
    with pytest.raises(StorageError) as caught:
        action(*args)
    return caught.value.code


def test_absolute_is_for_relative_local_paths_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/../b.pt") == str(tmp_path / "b.pt")
    assert storage.absolute("b.pt", "/base") == "/base/b.pt"
    assert storage.absolute("file://a/b.pt", "/base") == "file:///base/a/b.pt"
    for uri in ("/x/y", "s3://bucket/x", "file:///x", "memory://x"):
        assert storage.absolute(uri, "/base") == uri


def test_join_makes_one_slash():
    assert storage.join("s3://bucket/a/", "/b", "c/d") == "s3://bucket/a/b/c/d"
    assert storage.join("/", "a") == "/a"


class TestEveryStore:
    """One behaviour, whatever the store."""

    def test_created_object_reads_back(self, place):
        uri = storage.join(place, "a/b/c.bin")
        assert not storage.exists(uri)
        assert storage.create(uri, b"first")
        assert storage.exists(uri)
        assert storage.read(uri) == b"first"

    def test_create_never_overwrites(self, place):
        uri = storage.join(place, "c.bin")
        assert storage.create(uri, b"first")
        assert not storage.create(uri, b"second")
        assert not storage.create(uri, b"first")
        assert storage.read(uri) == b"first"

    def test_replace_overwrites(self, place):
        uri = storage.join(place, "deep/c.bin")
        storage.replace(uri, b"first")
        storage.replace(uri, b"second, longer")
        assert storage.read(uri) == b"second, longer"

    def test_listing_is_recursive_sorted_and_never_stale(self, place):
        names = ["b", "a/2", "a/1", "a.b", "a/deep/er/3"]
        for number, name in enumerate(names):
            assert storage.create(storage.join(place, "top", name), b"x" * number)
            found = storage.listing(storage.join(place, "top"))
            assert [entry.uri for entry in found] == sorted(
                storage.join(place, "top", other) for other in names[: number + 1]
            )
        assert {entry.uri.rpartition("top/")[2]: entry.size for entry in found} == {
            name: number for number, name in enumerate(names)
        }
        assert storage.listing(storage.join(place, "top") + "/") == found

    def test_listing_knows_the_folder_from_its_namesakes(self, place):
        assert storage.create(storage.join(place, "models/a"), b"")
        assert storage.create(storage.join(place, "models-old/a"), b"")
        assert [entry.uri for entry in storage.listing(storage.join(place, "models"))] == [
            storage.join(place, "models/a")
        ]

    def test_listing_of_one_object_is_that_object(self, place):
        uri = storage.join(place, "models/a")
        assert storage.create(uri, b"123")
        assert [(entry.uri, entry.size) for entry in storage.listing(uri)] == [(uri, 3)]

    def test_missing_is_missing(self, place):
        uri = storage.join(place, "none")
        assert not storage.exists(uri)
        assert {code(action, uri) for action in (storage.read, storage.fetch, storage.listing)} == {
            ErrorCode.OBJECT_MISSING
        }

    @pytest.mark.parametrize("size", [0, 1, storage._RANGE_BYTES, len(BIG)])
    def test_fetched_bytes_are_the_stored_bytes(self, place, size):
        uri = storage.join(place, "model.pt")
        storage.replace(uri, BIG[:size])
        assert fetched(uri) == BIG[:size]

    def test_path_outlives_the_name_but_not_the_context(self, place):
        uri = storage.join(place, "model.pt")
        storage.replace(uri, b"one")
        with storage.fetch(uri) as file:
            storage.replace(uri, b"other")
            assert Path(file.path).read_bytes() == b"one"
        with pytest.raises(OSError, match=file.path):
            os.open(file.path, os.O_RDONLY)

    def test_one_of_many_creators_wins(self, place):
        if place.startswith("memory://"):
            pytest.skip("checks, then writes; one process has it to itself")
        uri = storage.join(place, "part.parquet")
        start = threading.Barrier(16)

        def writer(number):
            start.wait()
            return storage.create(uri, b"%d" % number)

        with ThreadPoolExecutor(16) as pool:
            wins = list(pool.map(writer, range(16)))
        assert wins.count(True) == 1
        assert storage.read(uri) == b"%d" % wins.index(True)

    def test_no_descriptor_is_left_behind(self, place):
        storage.replace(storage.join(place, "a"), b"x")
        fetched(storage.join(place, "a"))  # the client's own connections are open from here on
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            fetched(storage.join(place, "a"))
            code(storage.fetch, storage.join(place, "none"))
            storage.create(storage.join(place, "a"), b"y")
        assert len(os.listdir("/proc/self/fd")) == before


class TestLocal:
    @pytest.mark.parametrize("unnamed", [True, False])
    def test_unfinished_writes_are_invisible(self, tmp_path, monkeypatch, unnamed):
        """Neither a reader of the folder nor a listing sees anything before the last byte is synced."""
        if not unnamed:
            monkeypatch.setattr(storage, "_open_unnamed", lambda folder: None)
        during = []
        link = os.link

        def spy(*args, **kwargs):
            during.append((os.listdir(tmp_path), storage.listing(str(tmp_path))))
            return link(*args, **kwargs)

        monkeypatch.setattr(os, "link", spy)
        assert storage.create(str(tmp_path / "a.parquet"), b"data")
        [(names, listed)] = during
        assert listed == []
        assert [name for name in names if not name.startswith(".")] == []
        assert bool(names) != unnamed
        assert not storage.create(str(tmp_path / "a.parquet"), b"other")
        assert os.listdir(tmp_path) == ["a.parquet"]
        assert (tmp_path / "a.parquet").read_bytes() == b"data"

    def test_failed_replace_leaves_the_old_object_alone(self, tmp_path, monkeypatch):
        storage.replace(str(tmp_path / "a"), b"old")

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            storage.replace(str(tmp_path / "a"), b"new")
        assert os.listdir(tmp_path) == ["a"]
        assert (tmp_path / "a").read_bytes() == b"old"

    def test_permissions_follow_the_umask(self, tmp_path):
        mask = os.umask(0o027)
        try:
            storage.create(str(tmp_path / "created"), b"")
            storage.replace(str(tmp_path / "replaced"), b"")
        finally:
            os.umask(mask)
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}

    def test_a_file_written_to_while_in_use_is_changed_not_tampered(self, tmp_path):
        path = tmp_path / "model.pt"
        path.write_bytes(b"abc")

        def use():
            with storage.fetch(str(path)):
                path.write_bytes(b"abd!")
                raise ValueError("the damage that the half-written file did")

        assert code(use) is ErrorCode.OBJECT_CHANGED

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
    def test_what_is_no_file_is_refused_at_once(self, tmp_path, make):
        make(tmp_path / "thing")
        assert code(storage.fetch, str(tmp_path / "thing")) is ErrorCode.STORAGE
        assert not storage.exists(str(tmp_path / "thing"))

    def test_relative_paths_count_from_base(self, tmp_path):
        (tmp_path / "m.pt").write_bytes(b"m")
        with storage.fetch("m.pt", base=str(tmp_path)) as file:
            assert Path(file.path).read_bytes() == b"m"

    def test_an_empty_folder_is_not_missing(self, tmp_path):
        assert storage.listing(str(tmp_path)) == []


@pytest.mark.s3
class TestFaults:
    """A fault on the way costs time or the audit, never the truth."""

    @pytest.mark.parametrize("fault", ["reset", "cut", "lost", "busy", "broken", "stall"])
    def test_ranges_survive(self, s3, proxy, fault):
        uri = storage.join(s3, "model.pt")
        storage.replace(uri, BIG)
        proxy.script = lambda method, number: fault if method == "GET" and number in {0, 1, 3} else None
        assert fetched(uri) == BIG
        # An answer that comes late is waited for, and nothing is asked again.
        assert proxy.seen.count("GET") == (3 if fault == "stall" else 6)

    def test_a_short_write_to_the_spool_leaves_no_hole(self, s3, monkeypatch):
        uri = storage.join(s3, "model.pt")
        storage.replace(uri, BIG)
        write, short = os.pwrite, []

        def pwrite(descriptor, piece, at):
            if not short:
                short.append(at)
                return write(descriptor, piece[:1], at)
            return write(descriptor, piece, at)

        monkeypatch.setattr(os, "pwrite", pwrite)
        assert fetched(uri) == BIG
        assert short

    def test_a_store_that_always_fails_is_given_up(self, s3, proxy):
        uri = storage.join(s3, "model.pt")
        storage.replace(uri, BIG)
        proxy.script = lambda method, number: "cut" if method == "GET" else None
        with stamina.set_testing(True, attempts=2):
            assert code(storage.fetch, uri) is ErrorCode.STORAGE
        assert proxy.seen.count("GET") <= 6

    def test_an_object_replaced_between_ranges_is_changed(self, s3, proxy, s3_server):
        uri = storage.join(s3, "model.pt")
        storage.replace(uri, BIG)
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        direct = boto3.client("s3", endpoint_url=s3_server)

        def script(method, number):
            if method == "GET" and number == 2:
                direct.put_object(Bucket=bucket, Key=key, Body=BIG[::-1])

        proxy.script = script
        assert code(storage.fetch, uri) is ErrorCode.OBJECT_CHANGED
        proxy.script = lambda method, number: None
        assert fetched(uri) == BIG[::-1]

    def test_a_small_object_takes_one_request(self, s3, proxy):
        uri = storage.join(s3, "small.pt")
        storage.replace(uri, b"weights")
        del proxy.seen[:]
        assert fetched(uri) == b"weights"
        assert proxy.seen == ["GET"]

    def test_too_large_an_object_is_not_read(self, s3, tmp_path):
        for uri in (storage.join(s3, "model.pt"), str(tmp_path / "model.pt"), f"memory://{uuid.uuid4()}/model.pt"):
            storage.replace(uri, b"weights")
            with pytest.raises(storage.TooLargeError):
                storage.fetch(uri, at_most=6)
            with storage.fetch(uri, at_most=7) as file:
                assert file.size == 7
            assert storage.describe(uri).size == 7

    def test_an_object_deleted_between_ranges_is_changed(self, s3, proxy, s3_server):
        uri = storage.join(s3, "model.pt")
        storage.replace(uri, BIG)
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        direct = boto3.client("s3", endpoint_url=s3_server)
        proxy.script = lambda method, number: (
            direct.delete_object(Bucket=bucket, Key=key) and None if (method, number) == ("GET", 1) else None
        )
        assert code(storage.fetch, uri) is ErrorCode.OBJECT_CHANGED

    def test_create_whose_answer_was_lost_is_ours(self, s3, proxy):
        proxy.script = lambda method, number: "lost" if (method, number) == ("PUT", 0) else None
        assert storage.create(storage.join(s3, "part"), b"mine")
        assert proxy.seen.count("PUT") == 2
        assert storage.read(storage.join(s3, "part")) == b"mine"

    def test_create_that_lost_the_race_after_a_lost_answer_is_not_ours(self, s3, proxy, s3_server):
        """Equal bytes prove nothing: two writers of one lock file write the same."""
        uri = storage.join(s3, "part")
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        direct = boto3.client("s3", endpoint_url=s3_server)

        def script(method, number):
            if (method, number) == ("PUT", 0):
                direct.put_object(Bucket=bucket, Key=key, Body=b"equal")
                return "lost"
            return None

        proxy.script = script
        assert not storage.create(uri, b"equal")


class TestMemory:
    def test_an_object_replaced_between_ranges_is_changed(self, monkeypatch):
        uri = f"memory://{uuid.uuid4()}/model.pt"
        storage.replace(uri, BIG)
        fs = fsspec.filesystem("memory")
        cat = fs.cat_file

        def replacing(path, **kwargs):
            data = cat(path, **kwargs)
            fs.pipe_file(path, BIG[::-1])
            return data

        monkeypatch.setattr(fs, "cat_file", replacing)
        assert code(storage.fetch, uri) is ErrorCode.OBJECT_CHANGED


class TestAdvice:
    """Errors say what to do, and nothing that is secret."""

    @pytest.fixture
    def client_settings(self, s3, monkeypatch):
        def settings(**variables):
            for name, value in variables.items():
                monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            return s3

        yield settings
        monkeypatch.undo()
        s3fs.S3FileSystem.clear_instance_cache()

    @pytest.mark.s3
    @pytest.mark.parametrize(
        "action", [storage.read, storage.listing, storage.exists, lambda uri: storage.create(uri, b"")]
    )
    def test_wrong_credentials(self, client_settings, action):
        uri = client_settings(AWS_SECRET_ACCESS_KEY="not-the-secret")
        with pytest.raises(StorageError, match="check AWS_ACCESS_KEY_ID") as caught:
            action(f"{uri}/x")
        assert caught.value.code is ErrorCode.STORAGE
        assert "not-the-secret" not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.s3
    def test_no_credentials(self, client_settings, tmp_path):
        uri = client_settings(
            AWS_ACCESS_KEY_ID=None,
            AWS_SECRET_ACCESS_KEY=None,
            AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "none"),
            AWS_CONFIG_FILE=str(tmp_path / "none"),
        )
        with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID"):
            storage.read(f"{uri}/x")

    @pytest.mark.s3
    @pytest.mark.parametrize("action", [storage.read, storage.listing])
    def test_no_bucket(self, s3, action):
        with pytest.raises(StorageError, match="bucket no-such-bucket does not exist") as caught:
            action("s3://no-such-bucket/x")
        assert caught.value.code is ErrorCode.STORAGE

    @pytest.mark.s3
    def test_no_endpoint(self, client_settings):
        with socket.socket() as unused:  # bound and not listening: nobody else can answer there
            unused.bind(("127.0.0.1", 0))
            uri = client_settings(AWS_ENDPOINT_URL=f"http://127.0.0.1:{unused.getsockname()[1]}")
            with (
                stamina.set_testing(True),
                pytest.raises(StorageError, match="cannot be reached: check AWS_ENDPOINT_URL"),
            ):
                storage.create(f"{uri}/x", b"")

    def test_unknown_scheme(self):
        with pytest.raises(StorageError, match="check the URI's scheme"):
            storage.read("gopher://x/y")

    def test_secrets_in_a_uri_stay_out_of_the_message(self):
        with pytest.raises(StorageError) as caught:
            storage.read("gopher://user:hunter2@host/x?signature=abcdef")
        assert "gopher://host/x" in caught.value.message
        assert not {word for word in ("hunter2", "abcdef") if word in caught.value.message}

    def test_errors_cross_processes(self):
        with pytest.raises(StorageError) as caught:
            storage.read("/no/such/file")
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (copy.code, str(copy)) == (ErrorCode.OBJECT_MISSING, str(caught.value))


@pytest.mark.s3
def test_an_interrupted_fetch_writes_to_nobody_elses_file(s3, monkeypatch):
    """The download goes on after its caller is gone, and must not touch a reused descriptor."""
    uri = storage.join(s3, "model.pt")
    storage.replace(uri, BIG)
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    download = storage._download

    async def slow(source, spool, at_most):
        async def held(*args):
            begun.set()
            await asyncio.to_thread(go_on.wait)
            return await original(*args)

        monkeypatch.setattr(storage, "_download_first", held)
        try:
            return await download(source, spool, at_most)
        finally:
            ended.set()

    original, sync = storage._download_first, fsspec.asyn.sync
    monkeypatch.setattr(storage, "_download", slow)

    def interrupted(loop, function, *args, **kwargs):
        if function is not slow:
            return sync(loop, function, *args, **kwargs)
        asyncio.run_coroutine_threadsafe(function(*args), loop)
        assert begun.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(fsspec.asyn, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.fetch(uri)
    # Every descriptor that was freed is somebody else's now.
    with contextlib.ExitStack() as stack:
        others = [os.memfd_create("other") for _ in range(64)]
        for other in others:
            stack.callback(os.close, other)
        go_on.set()
        assert ended.wait(30)
        assert {os.fstat(other).st_size for other in others} == {0}


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_no_update_among_many_is_lost(kind, tmp_path, request):
    """Six writers at the same time, each adding to what it read: everything is there, once."""
    prefix = str(tmp_path) if kind == "local" else request.getfixturevalue("s3")
    uri = f"{prefix}/folder/list.txt"

    def add(writer):
        for number in range(4):
            line = f"{writer}/{number}\n".encode()
            storage.update(uri, lambda data, line=line: data if data and line in data else (data or b"") + line)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(6)))
    lines = storage.read(uri).decode().splitlines()
    assert sorted(lines) == sorted(f"{writer}/{number}" for writer in range(6) for number in range(4))
