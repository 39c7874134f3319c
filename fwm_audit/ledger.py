"""The ledger of an output: which runs there were, in which order, signed so that no change goes unseen.

    OUT/runs/RUN_ID/manifest.json    signed: SHA-256 of run.json and of every part
    OUT/ledger/00000042.json         signed, create-only: SHA-256 of one run's manifest and of the entry before

Signatures are Ed25519 under a key that is derived from the master secret; who verifies needs the public
half alone. Every entry vouches for all before it. What nothing here can show is that the latest entries are
gone altogether: keep the head that each audit prints, and `verify` holds the ledger against it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa

from fwm_audit import storage
from fwm_audit.commitment import committed_at
from fwm_audit.errors import ErrorCode, FwmError, StorageError, UsageError
from fwm_audit.key import signed_values
from fwm_audit.records import MANIFEST, PART_NAME, RUN, Run, Sign, from_parquet, run_path, signed_part

_ENTRY: Final = re.compile(r"ledger/(\d{8})\.json")
_RUN: Final = re.compile(r"runs/(?P<run_id>[^/]+)/(?:run|manifest)\.json")

#: Foreign files that are gone around at the end of a ledger, and the most bytes of an entry and of a run's own file.
_TRIES: Final = 100
_ENTRY_BYTES, _FILE_BYTES = 1 << 16, 1 << 28
_LEDGER: Final = "ledger"


@dataclass(frozen=True, slots=True)
class Head:
    """The last entry of a ledger: its number, from 1 on, and the SHA-256 of its file."""

    number: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Finding:
    """An object below the output that is not as it was written, and how."""

    path: str
    problem: str


@dataclass(frozen=True, slots=True)
class Kept:
    """What stood up to the verification: tables of parts by path, runs by id, and the SHA-256 of their manifests."""

    tables: dict[str, pa.Table] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verified:
    """What was verified, and everything that is wrong; `incomplete` are runs without a manifest."""

    runs: int
    parts: int
    rows: int
    head: Head | None
    findings: tuple[Finding, ...]
    incomplete: tuple[str, ...]


def append(
    out: str, run_id: str, started_at: datetime, manifest: bytes, sign: Sign, public_keys: Collection[str]
) -> Head:
    """Enter a complete run at the end of the ledger, unless it stands there.

    What others put into the ledger is gone around, for `verify` to find.

    Args:
        out: The output.
        run_id: The run.
        started_at: When it began; entries from before that are not looked at.
        manifest: Its manifest, as stored.
        sign: Signs the entry.
        public_keys: Whose entries count.

    Raises:
        StorageError: The store cannot be read or written, or the ledger is full of foreign files.
    """
    digest = hashlib.sha256(manifest).hexdigest()
    taken: set[int] = set()
    for _ in range(_TRIES):
        there = set(_numbers(out))
        for number in sorted(there, reverse=True):
            data = _small(_uri(out, number))
            try:
                entry = signed_values(data, _LEDGER, public_keys)
                recorded = datetime.fromisoformat(entry["recorded_at"])
            except (ValueError, KeyError, TypeError):
                continue
            if (entry["run_id"], entry["manifest_sha256"]) == (run_id, digest):
                return Head(number, hashlib.sha256(data).hexdigest())
            if recorded < started_at:
                break
        # Behind the last entry before any gap, whoever wrote it: another master secret may have been in use.
        gone_around = there | taken
        number = next(number for number in itertools.count(1) if number not in gone_around)
        before = max((other for other in there if other < number), default=None)
        previous = hashlib.sha256(_small(_uri(out, before))).hexdigest() if before is not None else None
        data = sign(
            _LEDGER,
            {
                "number": number,
                "run_id": run_id,
                "manifest_sha256": digest,
                "previous_sha256": previous,
                "recorded_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            },
        )
        if storage.create(_uri(out, number), data):
            return Head(number, hashlib.sha256(data).hexdigest())
        taken.add(number)  # by another run, which the next listing shows, or by something that it does not show
    raise StorageError(
        ErrorCode.STORAGE, f"{_TRIES} places of the ledger under {out} are taken: see jobs.report --verify"
    )


def verify(
    out: str,
    public_keys: Collection[str],
    *,
    head: str | None = None,
    keys: str | None = None,
    kept: Kept | None = None,
) -> Verified:
    """Hold everything that finished runs wrote against the ledger.

    Args:
        out: The output.
        public_keys: Trusted signers, `MasterSecret.public_key` of the present master secret and of earlier ones.
        head: SHA-256 of an entry that has to be there, as an audit printed it.
        keys: Where the sealed keys lie: whether each was committed to before the runs that used it.
        kept: Gets the tables and runs that verified, for who wants to look at them.

    Raises:
        StorageError: The store cannot be listed.
    """
    prefix = storage.absolute(out).rstrip("/") + "/"
    sizes = {item.uri.removeprefix(prefix): item.size for item in storage.listing(prefix.rstrip("/"))}
    names = sizes.keys()
    book = _Book(prefix, public_keys, sizes, kept)
    entries = book.entries()
    if head is not None and head not in {entry.sha256 for entry in entries}:
        book.found(
            "ledger", f"no entry has the SHA-256 {head}: entries are missing from its end, or all were rewritten"
        )
    manifests: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        manifests[entry.run_id].add(entry.manifest_sha256)
    # Two pools, as a run waits for its parts.
    with ThreadPoolExecutor(storage.IO_THREADS) as runs, ThreadPoolExecutor(storage.IO_THREADS) as parts:
        seen = list(runs.map(lambda run: book.run(run, manifests[run], parts), sorted(manifests)))
    if keys is not None:
        book.commitments(storage.absolute(keys))
    known = {path for paths, _ in seen for path in paths}
    begun = {match[1] for name in names if (match := _RUN.fullmatch(name))}
    finished = {run for run in begun if run_path(run, "manifest.json") in names}
    for name in sorted(names - known):
        book.unknown(name, manifests.keys(), begun - finished)
    for run_id in sorted(begun - finished - manifests.keys()):
        book.unfinished(run_id)
    last = entries[-1] if entries else None
    return Verified(
        runs=len(manifests),
        parts=sum(len(paths) for paths, _ in seen) - 2 * len(manifests),
        rows=sum(rows for _, rows in seen),
        head=Head(last.number, last.sha256) if last else None,
        findings=tuple(sorted(book.findings, key=lambda finding: finding.path)),
        incomplete=tuple(sorted(begun - finished - manifests.keys())),
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    number: int
    sha256: str
    run_id: str
    manifest_sha256: str


class _Book:
    """What is found while an output is read."""

    def __init__(
        self, prefix: str, public_keys: Collection[str], sizes: Mapping[str, int], kept: Kept | None = None
    ) -> None:
        self.prefix, self.public_keys, self.sizes, self.kept = prefix, public_keys, sizes, kept
        self.findings: list[Finding] = []
        self.runs: list[Run] = []

    def found(self, path: str, problem: str) -> None:
        self.findings.append(Finding(path, problem))

    def entries(self) -> list[_Entry]:
        """Those that are signed, in their order; whatever breaks it is found."""
        numbers = {int(match[1]) for name in self.sizes if (match := _ENTRY.fullmatch(name))}
        entries: list[_Entry] = []
        before, changed = None, False
        for last, number in itertools.pairwise([0, *sorted(numbers)]):
            path = f"ledger/{number:08d}.json"
            if number > last + 1:
                others = f", and {number - last - 2} after it" if number > last + 2 else ""
                self.found(f"ledger/{last + 1:08d}.json", f"is missing{others}")
                changed = True
            data = self.read(path, _ENTRY_BYTES)
            values = self.signed(path, _LEDGER, data)
            if data is None or values is None:
                before, changed = None if data is None else hashlib.sha256(data).hexdigest(), True
                continue
            previous = values.get("previous_sha256")
            # Where an entry before is missing, or is no entry, that has been found already.
            follows = previous == before or changed
            if values.get("number") != number:
                self.found(path, f"is entry {values.get('number')}: entries were re-ordered")
            elif not follows:
                self.found(path, "follows another entry than the one before it: one of the two was replaced")
            before, changed = hashlib.sha256(data).hexdigest(), False
            entries.append(_Entry(number, before, str(values.get("run_id")), str(values.get("manifest_sha256"))))
        return entries

    def run(self, run_id: str, digests: set[str], pool: ThreadPoolExecutor) -> tuple[set[str], int]:
        """Paths that belong to a run, present or not, and the rows of its parts."""
        manifest, description = run_path(run_id, "manifest.json"), run_path(run_id, "run.json")
        paths = {manifest, description}
        data = self.read(manifest)
        if data is None:
            return paths, 0
        digest = hashlib.sha256(data).hexdigest()
        if not (entered := digests == {digest}):
            self.found(manifest, "is not the manifest that the ledger has entered")
        values = self.signed(manifest, MANIFEST, data)
        if values is None:
            return paths, 0
        try:
            files = [(description, values["run_sha256"]), *((file["path"], file["sha256"]) for file in values["files"])]
        except (KeyError, TypeError):
            self.found(manifest, "is signed, but describes no run")
            return paths, 0
        paths |= {path for path, _ in files}
        if self.kept is not None and entered:
            self.kept.manifests[run_id] = digest
        kept = self.kept if entered else None
        return paths, sum(pool.map(lambda item: self.file(run_id, item[0], item[1], kept), files))

    def file(self, run_id: str, path: str, digest: str, kept: Kept | None) -> int:
        """Rows of a part of a run; none of its description."""
        content = self.read(path)
        if content is None:
            return 0
        if hashlib.sha256(content).hexdigest() != digest:
            self.found(path, f"was changed after run {run_id} wrote it")
            return 0
        if path == run_path(run_id, "run.json"):
            with contextlib.suppress(UsageError):
                self.runs.append(described := Run.from_json(content))
                if kept is not None:
                    kept.runs[run_id] = described
            return 0
        table = from_parquet(content)
        if kept is not None:
            kept.tables[path] = table
        return int(table.num_rows)

    def unfinished(self, run_id: str) -> None:
        """A run in work has a signed description, and what it has written so far is signed, too."""
        description = run_path(run_id, "run.json")
        described = self.read(description)
        if self.signed(description, RUN, described) is not None and self.kept is not None:
            with contextlib.suppress(UsageError):
                self.kept.runs[run_id] = Run.from_json(described or b"")
        digest = hashlib.sha256(described or b"").hexdigest()
        for path in self.sizes:
            if (part := PART_NAME.fullmatch(path)) is not None and part["run_id"] == run_id:
                data = self.read(path)
                try:
                    if data is not None:
                        table = signed_part(data, path, digest, self.public_keys)
                        if self.kept is not None:
                            self.kept.tables[path] = table
                except ValueError as error:
                    self.found(path, str(error))

    def commitments(self, keys: str) -> None:
        """Every key that a run saw has a commitment from before the run."""
        used: dict[tuple[str, str], tuple[datetime, str]] = {}
        for run in self.runs:
            path = run_path(run.run_id, "run.json")
            for name, key_fingerprint in run.key_fingerprints.items():
                if key_fingerprint is not None:  # else there was none, and its rows are errors
                    used[name, key_fingerprint] = min(
                        used.get((name, key_fingerprint), (run.started_at, path)), (run.started_at, path)
                    )
        for (name, key_fingerprint), (first, path) in sorted(used.items()):
            model_id, _, key_id = name.rpartition("/")
            try:
                at = committed_at(keys, model_id, key_id, key_fingerprint, self.public_keys)
            except (FwmError, ValueError) as error:
                self.found(
                    path, f"used the key {name} ({key_fingerprint[:16]}), whose commitment cannot be shown: {error}"
                )
            else:
                if at > first:
                    self.found(path, f"used the key {name}, which was committed to at {at.isoformat()} only")

    def unknown(self, name: str, entered: Collection[str], incomplete: Collection[str]) -> None:
        """An object of no entered run: fine in other folders, and of runs that are not finished."""
        folder = name.partition("/")[0]
        run = _RUN.fullmatch(name) or PART_NAME.fullmatch(name)
        if folder == "ledger" and not _ENTRY.fullmatch(name):
            self.found(name, "is no entry of the ledger")
        elif folder == "runs" and run is not None and run["run_id"] not in entered and run["run_id"] not in incomplete:
            if name.endswith("manifest.json"):
                self.found(
                    name, f"run {run['run_id']} is in no entry of the ledger: repeat its audit with the same --run-id"
                )
        elif folder == "runs" and run is None:
            self.found(name, "is a file that no run writes")
        elif folder == "audits" and (run is None or run["run_id"] not in incomplete):
            self.found(name, "is in no manifest: it was added, or its run was removed")

    def read(self, path: str, at_most: int = _FILE_BYTES) -> bytes | None:
        if path not in self.sizes:
            self.found(path, "is missing")
            return None
        if self.sizes[path] > at_most:
            self.found(path, f"has {self.sizes[path]} bytes, more than any that was written")
            return None
        try:
            return storage.read(self.prefix + path)
        except FwmError as error:
            self.found(path, f"cannot be read: {error.message}")
            return None

    def signed(self, path: str, kind: str, data: bytes | None) -> dict[str, Any] | None:
        if data is None:
            return None
        try:
            return signed_values(data, kind, self.public_keys)
        except ValueError as error:
            self.found(path, str(error))
            return None


def _small(uri: str) -> bytes:
    """An entry's bytes; none if it has more than an entry."""
    return storage.read(uri) if storage.describe(uri).size <= _ENTRY_BYTES else b""


def _numbers(out: str) -> Iterable[int]:
    try:
        names = [item.uri for item in storage.listing(storage.join(out, "ledger"))]
    except StorageError as error:
        if error.code is not ErrorCode.OBJECT_MISSING:
            raise
        return []
    return [int(match[1]) for name in names if (match := re.search(r"/(\d{8})\.json$", name))]


def _uri(out: str, number: int) -> str:
    return storage.join(out, "ledger", f"{number:08d}.json")
