"""Objects in a store: read, listed, written once, and checkpoints fetched for loading.

Every URI is an fsspec URI: a local path, `file://`, `s3://`, `memory://` and whatever else fsspec
knows. The S3 endpoint and the credentials come from the standard AWS variables. Two promises hold
everything above together:

- `create` lets exactly one of many writers win, whatever they race on or lose on the way.
- `fetch` gives the bytes of one version of one object, or an error: an object that is replaced
  while it is read must never look like a tampered model.

There is one layer of retries, this one: s3fs's and botocore's own are switched off, because they
multiply with it and hide whether a request may have been served although its answer was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, Self

import botocore.exceptions
import fsspec
import fsspec.asyn
import s3fs
import s3fs.core
import stamina

from fwm_audit.errors import ErrorCode, FwmError, StorageError

_MIB: Final = 1 << 20
_RANGE_BYTES: Final = 16 * _MIB
_STREAMS: Final = 16
_PIECE_BYTES: Final = _MIB
#: An unreachable store is given up after about 5 s, one that accepts and stalls after 3 minutes.
_PATIENCE: Final[dict[str, Any]] = {"attempts": 5, "timeout": 180.0, "wait_initial": 0.2, "wait_jitter": 0.5}
_S3_OPTIONS: Final[dict[str, Any]] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": _STREAMS,  # botocore's default of 10 would queue the rest
        "retries": {"total_max_attempts": 1},
    },
}
#: Names of unfinished local writes, where the file system knows no unnamed files.
_UNFINISHED: Final = ".fwm-unfinished-"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object; `size` in bytes, `etag` as the store gives it, without quotes."""

    uri: str
    size: int
    etag: str | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """One version of one object as a local file: a context manager that lets go of it at its end.

    `path` leads to an open file, not to a name, so nothing can be put in its place; it is valid
    in this process and inside the context only. Memory mapped from it stays valid afterwards.
    `sha256` is the digest of exactly the bytes behind `path`.
    """

    path: str
    size: int
    sha256: str
    etag: str | None
    _file: BinaryIO = field(repr=False)
    _local: tuple[str, tuple[int, int]] | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file.

        Raises:
            StorageError: A local file was written to in the meantime. It replaces whatever error
                the half-written file caused.
        """
        with self._file:
            if self._local is not None and _state(self._file) != self._local[1]:
                raise _changed(self._local[0])


class _ShortReadError(Exception):
    """A range came back with fewer or more bytes than asked for."""


def absolute(uri: str, base: str | None = None) -> str:
    """`uri` itself, or a relative local path made absolute.

    Args:
        uri: Any URI; one with a scheme is returned as it is.
        base: Local folder that relative paths count from; None takes the working directory.
    """
    return uri if "://" in uri else os.path.abspath(os.path.join(base or "", uri))


def join(uri: str, *names: str) -> str:
    """The URI of an object below `uri`."""
    return "/".join([uri.rstrip("/"), *(name.strip("/") for name in names)])


def exists(uri: str) -> bool:
    """Whether an object of this name exists; folders are no objects.

    Raises:
        StorageError: The store cannot be asked.
    """
    with _explained(uri):
        try:
            if (path := _local_path(uri)) is not None:
                return stat.S_ISREG(os.stat(path).st_mode)
            fs, path = _remote(uri)
            if isinstance(fs, s3fs.S3FileSystem):
                _head(fs, path)
                return True
            return bool(_retry(fs.info, path)["type"] == "file")
        except (FileNotFoundError, NotADirectoryError):
            return False


def listing(uri: str) -> list[ObjectInfo]:
    """Every object below a prefix (taken as a folder), at any depth, sorted by URI.

    Links to local folders are not followed.

    Raises:
        StorageError: There is nothing of this name, or the store cannot be asked.
    """
    with _explained(uri):
        if (root := _local_path(uri)) is not None:
            found = list(_local_files(root))
        else:
            fs, root = _remote(uri)
            root = root.rstrip("/")
            # `find` does not know empty folders, which only `ls` tells from missing ones.
            entries = _retry(fs.find, root, detail=True) or _retry(fs.ls, root, detail=True) and {}
            found = [
                (name[len(root) + 1 :], int(entry["size"]), entry.get("ETag"))
                for name, entry in entries.items()
                if entry["type"] == "file" and not name.endswith("/")
            ]
    objects = [ObjectInfo(join(uri, name), size, etag and etag.strip('"')) for name, size, etag in found]
    return sorted(objects, key=lambda entry: entry.uri)


def read(uri: str) -> bytes:
    """The bytes of an object that fits into memory.

    Raises:
        StorageError: It does not exist, changed while it was read, or cannot be read.
    """
    with fetch(uri) as fetched, open(fetched.path, "rb") as file:
        return file.read()


def create(uri: str, data: bytes) -> bool:
    """Write an object whole or not at all, unless one of this name exists.

    Returns:
        True if this call wrote it, False if the name was taken. After a lost answer, an object
        with these very bytes counts as written by this call.

    Raises:
        StorageError: It cannot be written.
    """
    with _explained(uri):
        if (path := _local_path(uri)) is not None:
            return _create_local(path, data)
        fs, path = _remote(uri)
        for attempt in stamina.retry_context(_is_transient, **_PATIENCE):
            with attempt:
                try:
                    if isinstance(fs, s3fs.S3FileSystem):
                        # One PUT (5 GB at most): some servers ignore the condition on multipart uploads.
                        fs.call_s3("put_object", **_target(fs, path), Body=data, IfNoneMatch="*")
                    else:
                        fs.pipe_file(path, data, mode="create")
                except OSError as error:
                    if not isinstance(error, FileExistsError) and _status(error) != 412:
                        raise
                    return attempt.num > 1 and read(uri) == data
                return True
    raise AssertionError("a retry context returns or raises")


def replace(uri: str, data: bytes) -> None:
    """Write an object whole or not at all, in the place of any that was there.

    Raises:
        StorageError: It cannot be written.
    """
    with _explained(uri):
        if (path := _local_path(uri)) is None:
            fs, path = _remote(uri)
            _retry(fs.pipe_file, path, data)
            return
        folder, name = os.path.split(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, _UNFINISHED + secrets.token_hex(8))
        try:
            _write(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), data)
            os.replace(temporary, os.path.join(folder, name))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        _sync_folder(folder)


def fetch(uri: str, *, base: str | None = None) -> Fetched:
    """One version of an object, readable under a local path and hashed.

    A local file is not copied. Anything else is read into a memory-backed file, which takes its
    size in memory and little more.

    Args:
        uri: The object.
        base: Local folder that relative paths count from; None takes the working directory.

    Raises:
        StorageError: It does not exist, changed while it was read, or cannot be read.
    """
    uri = absolute(uri, base)
    with _explained(uri):
        if (path := _local_path(uri)) is not None:
            return _fetch_local(uri, path)
        fs, path = _remote(uri)
        # Closed by Fetched, or here if anything goes wrong on the way.
        with contextlib.ExitStack() as on_error:
            spool = on_error.enter_context(_spool())
            if isinstance(fs, s3fs.S3FileSystem):
                head = _head(fs, path)
                size, etag = int(head["ContentLength"]), str(head["ETag"])
                sha256 = fsspec.asyn.sync(fs.loop, _download, fs, uri, path, size, etag, spool.fileno())
            else:
                size, etag = int(_retry(fs.info, path)["size"]), None
                sha256 = _copy(fs, uri, path, spool)
            on_error.pop_all()
        return Fetched(_descriptor_path(spool), size, sha256, etag and etag.strip('"'), spool)


# Local files


def _local_path(uri: str) -> str | None:
    if uri.startswith("file://"):
        return uri.removeprefix("file://")
    return None if "://" in uri else uri


def _descriptor_path(file: BinaryIO) -> str:
    return f"/proc/self/fd/{file.fileno()}"


def _state(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _fetch_local(uri: str, path: str) -> Fetched:
    # Without O_NONBLOCK, opening a named pipe would wait for its writer for ever.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
    with contextlib.ExitStack() as on_error:
        on_error.enter_context(file)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise StorageError(ErrorCode.STORAGE, f"{uri} is a folder or a device, not a file: name one checkpoint")
        before = _state(file)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if _state(file) != before:
            raise _changed(uri)
        on_error.pop_all()
    return Fetched(_descriptor_path(file), before[0], sha256, None, file, (uri, before))


def _local_files(root: str) -> Iterator[tuple[str, int, None]]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out what it may not see, and nobody would audit it

    for folder, _, names in os.walk(root, onerror=fail):
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(_UNFINISHED) and os.path.isfile(path):
                yield os.path.relpath(path, root), os.path.getsize(path), None


def _create_local(path: str, data: bytes) -> bool:
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary: str | None = None
    try:
        try:
            # A file without a name: no reader of the folder can see it before it is complete.
            descriptor = os.open(folder, os.O_WRONLY | os.O_TMPFILE, 0o666)
            source = f"/proc/self/fd/{descriptor}"
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
                raise
            source = temporary = os.path.join(folder, _UNFINISHED + secrets.token_hex(8))
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                # With a folder's descriptor, link() becomes linkat(), which follows /proc's link to the file.
                os.link(source, name, dst_dir_fd=parent)
                os.fsync(parent)
            finally:
                os.close(parent)
    except FileExistsError:
        return False
    finally:
        if temporary is not None:
            os.unlink(temporary)
    return True
