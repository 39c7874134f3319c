"""Objects in a store: read, listed, written once, and checkpoints fetched for loading.

Every URI is an fsspec URI: a local path, `file://`, `s3://`, `memory://` and whatever else fsspec
knows. The S3 endpoint and the credentials come from the standard AWS variables. Two promises hold
everything above together:

- `create` lets exactly one of many writers win, whatever they race on or lose on the way.
- `fetch` gives the bytes of one version of one object, or an error: an object that is replaced
  while it is read must never look like a tampered model.

There is one layer of retries, this one: s3fs's and botocore's own are switched off, because they
would multiply with it.
"""

# URIs and paths are both str here, and much of this works on descriptors: no pathlib.
# ruff: noqa: PTH100, PTH103, PTH108, PTH113, PTH116, PTH118, PTH120, PTH123, PTH202

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
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
_MARK: Final = "fwm-write"
#: Small objects that are read or written at a time.
IO_THREADS: Final = 16
_FILE: Final = "file://"
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
        uri: Any URI; one of an object store is returned as it is.
        base: Local folder that relative paths count from; None takes the working directory.
    """
    if (path := _local_path(uri)) is None:
        return uri
    scheme = _FILE if uri.startswith(_FILE) else ""
    return scheme + os.path.abspath(os.path.join(base or "", path))


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
        if (path := _local_path(uri)) is not None:
            root = path.rstrip("/")
            found: list[tuple[str, int, str | None]] = list(_local_files(root))
        else:
            fs, path = _remote(uri)
            root = path.rstrip("/")
            entries = _retry(fs.find, root, detail=True)
            if not entries:
                _retry(fs.ls, root)  # tells an empty folder from a missing one, which find does not
            found = [
                (name, int(entry["size"]), _bare(entry.get("ETag")))
                for name, entry in entries.items()
                if entry["type"] == "file" and not name.endswith("/")
            ]
    prefix = uri.rstrip("/")
    objects = [ObjectInfo(prefix + name[len(root) :], size, etag) for name, size, etag in found]
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
        True if this call wrote it, False if the name was taken.

    Raises:
        StorageError: It cannot be written.
    """
    with _explained(uri):
        if (path := _local_path(uri)) is not None:
            return _create_local(path, data)
        fs, path = _remote(uri)
        if isinstance(fs, s3fs.S3FileSystem):
            return _create_s3(fs, path, data)
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True


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
        with _staged(path, data, unnamed=False) as (source, name, folder):
            os.replace(source, name, dst_dir_fd=folder)


def remove(uri: str) -> None:
    """Delete an object, or everything below a prefix.

    Raises:
        StorageError: There is nothing of this name, or it cannot be deleted.
    """
    with _explained(uri):
        fs, path = fsspec.url_to_fs(uri) if _local_path(uri) is not None else _remote(uri)
        fs.rm(path, recursive=True)


def update(uri: str, change: Callable[[bytes | None], bytes]) -> None:
    """Replace an object by what `change` makes of it; nobody else's update in between is lost.

    On S3 the write is conditional on the version that was read, locally the folder is locked. Other
    stores know no such thing: there, only one may write.

    Args:
        uri: The object.
        change: From its bytes, or None where there is none, to the new ones; may be called several times.

    Raises:
        StorageError: It cannot be read or written.
    """
    with _explained(uri):
        if (path := _local_path(uri)) is not None:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX)
                replace(uri, change(_known(uri)[0]))
            return
        fs, path = _remote(uri)
        if not isinstance(fs, s3fs.S3FileSystem):
            replace(uri, change(_known(uri)[0]))
            return
        for attempt in stamina.retry_context(on=_OvertakenError, attempts=50, timeout=180.0, wait_initial=0.05):
            with attempt:
                before, etag = _known(uri)
                condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": f'"{etag}"'}
                try:
                    _retry(fs.call_s3, "put_object", **_target(fs, path), Body=change(before), **condition)
                except OSError as error:
                    if not isinstance(error, FileExistsError) and _status(error) not in {404, 412}:
                        raise
                    raise _OvertakenError from error


class _OvertakenError(Exception):
    """Somebody else wrote between a read and the conditional write that stood on it."""


def _known(uri: str) -> tuple[bytes | None, str | None]:
    """Bytes and ETag of an object; None for what it lacks."""
    try:
        with fetch(uri) as fetched, open(fetched.path, "rb") as file:
            return file.read(), fetched.etag
    except StorageError as error:
        if error.code is ErrorCode.OBJECT_CHANGED:
            raise _OvertakenError from error
        if error.code is not ErrorCode.OBJECT_MISSING:
            raise
        return None, None


def describe(uri: str, *, base: str | None = None) -> ObjectInfo:
    """Size and ETag of an object, without reading it.

    Raises:
        StorageError: It does not exist, or the store cannot be asked.
    """
    uri = absolute(uri, base)
    with _explained(uri):
        if (path := _local_path(uri)) is not None:
            return ObjectInfo(uri, os.stat(path).st_size, None)
        fs, path = _remote(uri)
        if isinstance(fs, s3fs.S3FileSystem):
            head = _head(fs, path)
            return ObjectInfo(uri, int(head["ContentLength"]), _bare(head["ETag"]))
        return ObjectInfo(uri, int(_retry(fs.info, path)["size"]), None)


class TooLargeError(Exception):
    """An object has more bytes than asked for."""


def fetch(uri: str, *, base: str | None = None, at_most: int | None = None) -> Fetched:
    """One version of an object, readable under a local path and hashed.

    A local file is not copied. Anything else is read into a memory-backed file, which takes its
    size in memory and little more.

    Args:
        uri: The object.
        base: Local folder that relative paths count from; None takes the working directory.
        at_most: Bytes that there is room for; None is no limit.

    Raises:
        StorageError: It does not exist, changed while it was read, or cannot be read.
        TooLargeError: It has more than `at_most` bytes; nothing was read.
    """
    uri = absolute(uri, base)
    with _explained(uri):
        if (path := _local_path(uri)) is not None:
            return _fetch_local(uri, path, at_most)
        fs, path = _remote(uri)
        # Closed by Fetched, or here if anything goes wrong on the way.
        with contextlib.ExitStack() as on_error:
            spool = on_error.enter_context(_spool())
            if isinstance(fs, s3fs.S3FileSystem):
                source = _Object(uri, fs, _target(fs, path))
                size, etag, sha256 = fsspec.asyn.sync(fs.loop, _download, source, spool.fileno(), at_most)
            else:
                etag = ""
                size, sha256 = _copy(fs, uri, path, spool, at_most)
            on_error.pop_all()
        return Fetched(_descriptor_path(spool), size, sha256, _bare(etag) or None, spool)


def _check_size(size: int, at_most: int | None) -> None:
    if at_most is not None and size > at_most:
        raise TooLargeError


# Local files


def _local_path(uri: str) -> str | None:
    if uri.startswith(_FILE):
        return uri.removeprefix(_FILE)
    return None if "://" in uri else uri


def _descriptor_path(file: BinaryIO) -> str:
    return f"/proc/self/fd/{file.fileno()}"


def _state(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _fetch_local(uri: str, path: str, at_most: int | None) -> Fetched:
    # Without O_NONBLOCK, opening a named pipe would wait for its writer for ever.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)  # noqa: SIM115  # handed over
    with contextlib.ExitStack() as on_error:
        on_error.enter_context(file)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise StorageError(ErrorCode.STORAGE, f"{uri} is a folder or a device, not a file: name one checkpoint")
        before = _state(file)
        _check_size(before[0], at_most)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if _state(file) != before:
            raise _changed(uri)
        on_error.pop_all()
    return Fetched(_descriptor_path(file), before[0], sha256, None, file, (uri, before))


def _local_files(root: str) -> Iterator[tuple[str, int, None]]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out what it may not see, and nobody would audit it

    if os.path.isfile(root):
        yield root, os.path.getsize(root), None
        return
    for folder, _, names in os.walk(root or "/", onerror=fail):
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(_UNFINISHED) and os.path.isfile(path):
                yield path, os.path.getsize(path), None


def _create_local(path: str, data: bytes) -> bool:
    with _staged(path, data, unnamed=True) as (source, name, folder):
        try:
            # With a folder's descriptor, link() is linkat(), which follows /proc's link to the file.
            os.link(source, name, dst_dir_fd=folder)
        except FileExistsError:
            return False
    return True


@contextlib.contextmanager
def _staged(path: str, data: bytes, *, unnamed: bool) -> Iterator[tuple[str, str, int]]:
    """A synced file beside `path`: its source path, the final name, and the folder's descriptor."""
    parent, name = os.path.split(os.path.abspath(path))
    os.makedirs(parent, exist_ok=True)
    temporary = os.path.join(parent, _UNFINISHED + secrets.token_hex(8))
    with contextlib.ExitStack() as stack:
        descriptor = _open_unnamed(parent) if unnamed else None
        if named := descriptor is None:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(_unlink, temporary)
        file = stack.enter_context(open(descriptor, "wb"))
        file.write(data)
        file.flush()
        os.fsync(descriptor)
        folder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, folder)
        yield temporary if named else _descriptor_path(file), name, folder
        os.fsync(folder)


def _open_unnamed(folder: str) -> int | None:
    """A file without a name, so that nobody sees it before it is complete; None if unsupported."""
    try:
        return os.open(folder, os.O_WRONLY | os.O_TMPFILE, 0o666)
    except OSError as error:
        if error.errno in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:  # NFS, FUSE, old kernels
            return None
        raise


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


# Object stores


def _remote(uri: str) -> tuple[Any, str]:
    # fsspec keeps one instance for each process, so this is a look-up; never keep one across a fork.
    s3 = uri.startswith(("s3://", "s3a://"))
    fs, path = fsspec.url_to_fs(uri, **(_S3_OPTIONS if s3 else {}))
    if s3:
        fs.retries = 1
    return fs, path


def _target(fs: s3fs.S3FileSystem, path: str) -> dict[str, str]:
    bucket, key, version = fs.split_path(path)
    return {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})


def _head(fs: s3fs.S3FileSystem, path: str) -> dict[str, Any]:
    target = _target(fs, path)
    try:
        head: dict[str, Any] = _retry(fs.call_s3, "head_object", **target)
    except FileNotFoundError:
        # An answer to HEAD has no body that would tell a missing object from a missing bucket.
        try:
            _retry(fs.call_s3, "head_bucket", Bucket=target["Bucket"])
        except FileNotFoundError:
            raise _no_bucket(target["Bucket"]) from None
        except PermissionError:
            pass  # reading objects does not imply asking about buckets
        raise
    return head


def _create_s3(fs: s3fs.S3FileSystem, path: str, data: bytes) -> bool:
    # A PUT whose answer is lost is sent again, by aiohttp even without a word, and then finds the
    # name taken by itself. What tells whose object it is: a mark that no other call has.
    mark = secrets.token_hex(16)
    try:
        # One PUT (5 GB at most): some servers ignore the condition on multipart uploads.
        _retry(
            fs.call_s3,
            "put_object",
            **_target(fs, path),
            Body=data,
            Metadata={_MARK: mark},
            IfNoneMatch="*",
        )
    except OSError as error:
        # s3fs knows the refusals of AWS only; other servers' would be a bare EINVAL.
        if not isinstance(error, FileExistsError) and _status(error) != 412:
            raise
        return bool(_head(fs, path)["Metadata"].get(_MARK) == mark)
    return True


def _spool() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("fwm-checkpoint"), "w+b", buffering=0)
    # Pythons built against an old libc have no memfd_create: a file without a name on disk.
    return tempfile.TemporaryFile(buffering=0)


@dataclass(frozen=True, slots=True)
class _Object:
    """One S3 object."""

    uri: str
    fs: s3fs.S3FileSystem
    target: dict[str, str]

    async def get(self, start: int, stop: int, **condition: str) -> Any:
        """The answer to a ranged GET, its body unread."""
        # The only way to a body that is not read at once.
        return await self.fs._call_s3("get_object", **self.target, Range=f"bytes={start}-{stop - 1}", **condition)  # noqa: SLF001


async def _download(source: _Object, spool: int, at_most: int | None) -> tuple[int, str, str]:
    """Size, ETag and SHA-256 of one version of the object, which is in `spool` afterwards.

    The answer to the first GET names the version, and the others are bound to that: a small object
    takes one request. Bodies are streamed to their place and hashed from there in order, so that memory
    beyond the spool stays at a few pieces, whatever the number of ranges in flight.
    """
    # The caller may be interrupted and close its descriptor, whose number would then be reused.
    spool = os.dup(spool)
    slots = asyncio.Semaphore(_STREAMS)
    retry = stamina.AsyncRetryingCaller(**_PATIENCE).on(_is_transient)
    digest = hashlib.sha256()
    tasks: list[asyncio.Task[None]] = []
    try:
        there, size, etag = await retry(_download_first, source, spool, at_most)
        os.ftruncate(spool, size)

        async def fill(start: int, stop: int) -> None:
            async with slots:
                await retry(_download_range, source, spool, start, stop, etag)

        ranges = [(start, min(start + _RANGE_BYTES, size)) for start in range(there, size, _RANGE_BYTES)]
        tasks = [asyncio.create_task(fill(start, stop)) for start, stop in ranges]
        await asyncio.to_thread(_update, digest, spool, 0, there)
        for task, (start, stop) in zip(tasks, ranges, strict=True):
            await task
            await asyncio.to_thread(_update, digest, spool, start, stop)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        os.close(spool)
    return size, etag, digest.hexdigest()


async def _download_first(source: _Object, spool: int, at_most: int | None) -> tuple[int, int, str]:
    """How many bytes of the object are in `spool` afterwards, from its start; its size and its ETag."""
    try:
        reply = await source.get(0, _RANGE_BYTES)
    except OSError as error:
        if _status(error) != 416:
            raise
        # An empty object has no first byte to answer with.
        head = await source.fs._call_s3("head_object", **source.target)  # noqa: SLF001
        if head["ContentLength"]:
            raise _changed(source.uri) from error
        return 0, 0, str(head["ETag"])
    async with reply["Body"] as body:
        there = int(reply["ContentLength"])
        # A server that ignores Range sends everything, and no range.
        size = int(str(reply["ContentRange"]).rpartition("/")[2]) if reply.get("ContentRange") else there
        _check_size(size, at_most)
        if there not in {size, _RANGE_BYTES}:
            raise _ShortReadError
        await _pour(body, spool, 0, there)
    return there, size, str(reply["ETag"])


async def _download_range(source: _Object, spool: int, start: int, stop: int, etag: str) -> None:
    try:
        reply = await source.get(start, stop, IfMatch=etag)
    except OSError as error:
        if _status(error) in {404, 412}:
            raise _changed(source.uri) from error
        raise
    async with reply["Body"] as body:
        if reply["ETag"] != etag:  # a server that ignores If-Match
            raise _changed(source.uri)
        if reply["ContentLength"] != stop - start:  # one that ignores Range: its body would fill a neighbour's place
            raise _ShortReadError
        await _pour(body, spool, start, stop)


async def _pour(body: Any, spool: int, start: int, stop: int) -> None:
    """Write a body to its place, as long as it keeps within that."""
    at = start
    while piece := await body.read(_PIECE_BYTES):
        if at + len(piece) > stop:
            raise _ShortReadError
        at += os.pwrite(spool, piece, at)
    if at != stop:
        raise _ShortReadError


def _update(digest: Any, spool: int, start: int, stop: int) -> None:
    for at in range(start, stop, _PIECE_BYTES):
        digest.update(os.pread(spool, min(_PIECE_BYTES, stop - at), at))


def _copy(fs: Any, uri: str, path: str, spool: BinaryIO, at_most: int | None) -> tuple[int, str]:
    """Size and SHA-256 of an object in a store without If-Match: its description must not change."""
    before = _retry(fs.info, path)
    size, copied, digest = int(before["size"]), 0, hashlib.sha256()
    _check_size(size, at_most)
    for start in range(0, size, _RANGE_BYTES):
        piece = _retry(fs.cat_file, path, start=start, end=min(start + _RANGE_BYTES, size))
        copied += spool.write(piece)
        digest.update(piece)
    if _retry(fs.info, path) != before:
        raise _changed(uri)
    if copied != size:
        raise _ShortReadError
    return size, digest.hexdigest()


# Errors


def _status(error: BaseException) -> int | None:
    """HTTP status behind an error: s3fs's translation to OSError loses it, its cause does not."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, botocore.exceptions.ClientError):
            return int(candidate.response["ResponseMetadata"]["HTTPStatusCode"])
    return None


def _reason(error: BaseException) -> str:
    """Short public name of what went wrong; a server's own words may quote what it was sent."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, botocore.exceptions.ClientError):
            return str(candidate.response["Error"].get("Code"))
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def _is_transient(error: Exception) -> bool:
    status = _status(error) or 0
    # 409 is a conflict between two conditional writes; 501 stays what it is.
    return isinstance(error, _TRANSIENT) or status in {408, 409, 429} or (status >= 500 and status != 501)


_TRANSIENT: Final = (
    *s3fs.core.S3_RETRYABLE_ERRORS,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    ConnectionError,
    TimeoutError,
    _ShortReadError,
)
_retry: Final = stamina.RetryingCaller(**_PATIENCE).on(_is_transient)


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except (FwmError, TooLargeError):
        raise
    except Exception as error:
        raise _explain(uri, error) from error


def _explain(uri: str, error: Exception) -> StorageError:
    shown, reason, local = _shown(uri), _reason(error), _local_path(uri) is not None
    match error:
        case FileNotFoundError() if reason == "NoSuchBucket":
            return _no_bucket(shown.split("/")[2])
        case FileNotFoundError() | NotADirectoryError():
            return StorageError(ErrorCode.OBJECT_MISSING, f"there is no {shown}: check the URI")
        case PermissionError() if local:
            advice = "give the user that runs this access to it"
        case PermissionError():
            advice = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what the bucket allows them"
        case (
            botocore.exceptions.NoCredentialsError()
            | botocore.exceptions.PartialCredentialsError()
            | botocore.exceptions.CredentialRetrievalError()
        ):
            advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"
        case OSError() | botocore.exceptions.BotoCoreError() if isinstance(error, _TRANSIENT):
            advice = "the store cannot be reached: check AWS_ENDPOINT_URL and the network"
        case ImportError() | ValueError() if not local:
            advice = "check the URI's scheme, and that fsspec's package for it is installed"
        case _:
            advice = "try again; if it stays, look at the store"
    return StorageError(ErrorCode.STORAGE, f"{shown} failed ({reason}): {advice}")


def _changed(uri: str) -> StorageError:
    return StorageError(
        ErrorCode.OBJECT_CHANGED,
        f"{_shown(uri)} was written to while it was read: audit it again once it is at rest",
    )


def _no_bucket(name: str) -> StorageError:
    return StorageError(ErrorCode.STORAGE, f"the bucket {name} does not exist: check the URI and AWS_ENDPOINT_URL")


def _shown(uri: str) -> str:
    """The URI without user names, passwords and signed queries."""
    return re.sub(r"(?<=://)[^/@]*@|\?.*", "", uri) if "://" in uri else uri


def _bare(etag: str | None) -> str | None:
    return etag.strip('"') if etag else None
