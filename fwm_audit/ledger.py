"""The ledger of an output: which runs there were, in which order, signed so that no change goes unseen.

    OUT/runs/RUN_ID/manifest.json    signed: SHA-256 of run.json and of every part
    OUT/ledger/00000042.json         signed, create-only: SHA-256 of one run's manifest and of the entry before

Signatures are Ed25519 under a key that is derived from the master secret; who verifies needs the public
half alone. Every entry vouches for all before it. What nothing here can show is that the latest entries are
gone altogether: keep the head that each audit prints, and `verify` holds the ledger against it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from fwm_audit import storage
from fwm_audit.commitment import committed_at
from fwm_audit.errors import ErrorCode, FwmError, StorageError, UsageError
from fwm_audit.key import signed_values
from fwm_audit.records import MANIFEST, Run, from_parquet, run_path

_THREADS: Final = 16
_ENTRY: Final = re.compile(r"ledger/(\d{8})\.json")
_PART: Final = re.compile(r"audits/run_date=\d{4}-\d\d-\d\d/(.+)-\d{6}\.parquet")
_RUN: Final = re.compile(r"runs/([^/]+)/(?:run|manifest)\.json")

Sign = Callable[[str, Mapping[str, Any]], bytes]
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
class Verified:
    """What was verified, and everything that is wrong; `incomplete` are runs without a manifest."""

    runs: int
    parts: int
    rows: int
    head: Head | None
    findings: tuple[Finding, ...]
    incomplete: tuple[str, ...]


def append(out: str, run_id: str, started_at: datetime, manifest: bytes, sign: Sign) -> Head:
    """Enter a complete run at the end of the ledger, unless it stands there.

    Args:
        out: The output.
        run_id: The run.
        started_at: When it began; entries from before that are not looked at.
        manifest: Its manifest, as stored.
        sign: Values to a signed file.

    Raises:
        StorageError: The store cannot be read or written.
    """
    digest = hashlib.sha256(manifest).hexdigest()
    while True:
        numbers = sorted(_numbers(out))
        last = None
        for number in reversed(numbers):
            data = storage.read(_uri(out, number))
            head = Head(number, hashlib.sha256(data).hexdigest())
            last = last or head
            entry = _unverified(data)
            if (entry.get("run_id"), entry.get("manifest_sha256")) == (run_id, digest):
                return head
            if _time(entry) < started_at:
                break
        number = last.number + 1 if last else 1
        data = sign(
            _LEDGER,
            {
                "number": number,
                "run_id": run_id,
                "manifest_sha256": digest,
                "previous_sha256": last.sha256 if last else None,
                "recorded_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            },
        )
        if storage.create(_uri(out, number), data):
            return Head(number, hashlib.sha256(data).hexdigest())


def verify(out: str, public_keys: Collection[str], *, head: str | None = None, keys: str | None = None) -> Verified:
    """Hold everything that finished runs wrote against the ledger.

    Args:
        out: The output.
        public_keys: Trusted signers, `MasterSecret.public_key` of the present master secret and of earlier ones.
        head: SHA-256 of an entry that has to be there, as an audit printed it.
        keys: Where the sealed keys lie: whether each was committed to before the runs that used it.

    Raises:
        StorageError: The store cannot be listed.
    """
    prefix = storage.absolute(out).rstrip("/") + "/"
    names = {item.uri.removeprefix(prefix) for item in storage.listing(prefix.rstrip("/"))}
    book = _Book(prefix, public_keys)
    entries = book.entries(names)
    if head is not None and head not in {entry.sha256 for entry in entries}:
        book.found(
            "ledger", f"no entry has the SHA-256 {head}: entries are missing from its end, or all were rewritten"
        )
    manifests: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        manifests[entry.run_id].add(entry.manifest_sha256)
    with ThreadPoolExecutor(_THREADS) as pool:
        seen = list(pool.map(lambda run: book.run(run, manifests[run], pool_names=names), sorted(manifests)))
    if keys is not None:
        book.commitments(storage.absolute(keys), sorted(manifests))
    known = {path for paths, _ in seen for path in paths}
    begun = {match[1] for name in names if (match := _RUN.fullmatch(name))}
    finished = {run for run in begun if run_path(run, "manifest.json") in names}
    for name in sorted(names - known):
        book.unknown(name, manifests.keys(), begun - finished)
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

    def __init__(self, prefix: str, public_keys: Collection[str]) -> None:
        self.prefix, self.public_keys = prefix, public_keys
        self.findings: list[Finding] = []

    def found(self, path: str, problem: str) -> None:
        self.findings.append(Finding(path, problem))

    def entries(self, names: Collection[str]) -> list[_Entry]:
        """Those that are signed, in their order; whatever breaks it is found."""
        numbers = {int(match[1]) for name in names if (match := _ENTRY.fullmatch(name))}
        entries: list[_Entry] = []
        before: str | None = None
        for last, number in itertools.pairwise([0, *sorted(numbers)]):
            path = f"ledger/{number:08d}.json"
            if number > last + 1:
                others = f", and {number - last - 2} after it" if number > last + 2 else ""
                self.found(f"ledger/{last + 1:08d}.json", f"is missing{others}")
                before = None
            data = self.read(path, names)
            values = self.signed(path, _LEDGER, data)
            if data is None or values is None:
                before = None if data is None else hashlib.sha256(data).hexdigest()
                continue
            previous = values.get("previous_sha256")
            # Where the entry before is missing or changed, that has been found already.
            follows = previous == before if before is not None else number > 1 or previous is None
            if values.get("number") != number:
                self.found(path, f"is entry {values.get('number')}: entries were re-ordered")
            elif not follows:
                self.found(path, "follows another entry than the one before it: one of the two was replaced")
            before = hashlib.sha256(data).hexdigest()
            entries.append(_Entry(number, before, str(values.get("run_id")), str(values.get("manifest_sha256"))))
        return entries

    def run(self, run_id: str, digests: set[str], *, pool_names: Collection[str]) -> tuple[set[str], int]:
        """Paths that belong to a run, present or not, and the rows of its parts."""
        manifest, description = run_path(run_id, "manifest.json"), run_path(run_id, "run.json")
        paths = {manifest, description}
        data = self.read(manifest, pool_names)
        if data is None:
            return paths, 0
        if digests != {hashlib.sha256(data).hexdigest()}:
            self.found(manifest, "is not the manifest that the ledger has entered")
        values = self.signed(manifest, MANIFEST, data)
        if values is None:
            return paths, 0
        rows = 0
        try:
            files = [(description, values["run_sha256"]), *((file["path"], file["sha256"]) for file in values["files"])]
        except (KeyError, TypeError):
            self.found(manifest, "is signed, but describes no run")
            return paths, 0
        for path, digest in files:
            paths.add(path)
            content = self.read(path, pool_names)
            if content is None:
                continue
            if hashlib.sha256(content).hexdigest() != digest:
                self.found(path, f"was changed after run {run_id} wrote it")
            elif path != description:
                rows += from_parquet(content).num_rows
        return paths, rows

    def commitments(self, keys: str, runs: Iterable[str]) -> None:
        """Every key that a run saw has a commitment from before the run."""
        used: dict[tuple[str, str], tuple[datetime, str]] = {}
        for run_id in runs:
            path = run_path(run_id, "run.json")
            try:
                run = Run.from_json(storage.read(self.prefix + path))
            except (FwmError, UsageError):
                continue  # found already
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
        run = _RUN.fullmatch(name) or _PART.fullmatch(name)
        if folder == "ledger" and not _ENTRY.fullmatch(name):
            self.found(name, "is no entry of the ledger")
        elif folder == "runs" and run is not None and run[1] not in entered and run[1] not in incomplete:
            if name.endswith("manifest.json"):
                self.found(name, f"run {run[1]} is in no entry of the ledger: repeat its audit with the same --run-id")
        elif folder == "runs" and run is None:
            self.found(name, "is a file that no run writes")
        elif folder == "audits" and (run is None or run[1] not in incomplete):
            self.found(name, "is in no manifest: it was added, or its run was removed")

    def read(self, path: str, names: Collection[str]) -> bytes | None:
        if path not in names:
            self.found(path, "is missing")
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


def _unverified(data: bytes) -> dict[str, Any]:
    """An entry's values, for those who only want to know what stands there; none if it is no entry at all."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _time(entry: Mapping[str, Any]) -> datetime:
    """When an entry says that it was made; now, if it does not."""
    now = datetime.now(UTC)
    try:
        said = datetime.fromisoformat(entry["recorded_at"])
    except (KeyError, TypeError, ValueError):
        return now
    return said if said.tzinfo is not None else now


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
