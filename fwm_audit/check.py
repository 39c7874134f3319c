"""Audit one model: a catalog entry and its key become an audit record.

    entry -> sealed key (opened once, kept) -> checkpoint fetched and digested -> opened -> fitted to
    its architecture -> triggers run -> verdict

The next entry's file may be fetched while the triggers run. Nothing here knows about Ray or about
other models. Whatever goes wrong with one entry becomes that entry's `error` record; no path leads
to `intact` except labels that agree.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import torch
from torch import nn

from fwm_audit import storage
from fwm_audit.architectures import code_sha256, factory_package
from fwm_audit.catalog import CatalogEntry
from fwm_audit.checkpoint import Checkpoint, fit, open_checkpoint
from fwm_audit.errors import CheckpointError, ErrorCode, FwmError, KeyFileError, ModelError
from fwm_audit.folding import without_norms
from fwm_audit.key import MasterSecret, fingerprint, key_name, retirement_name
from fwm_audit.records import AuditRecord, AuditSettings, carried, error_record, make_record, versions
from fwm_audit.triggers import TriggerSet
from fwm_audit.verdict import Verdict
from fwm_audit.verification import Verification, verify_copy
from fwm_audit.weights import Widened, held_bytes, load, loaded_bytes, skeleton, twin

log = logging.getLogger(__name__)

_KEY_CACHE_BYTES: Final = 1 << 30
#: Architectures are kept without memory for their weights, so that this is room for very many.
_SKELETON_CACHE_BYTES: Final = 256 << 20
#: From here on, in float64, weights are not all converted at once.
_LARGE_BYTES: Final = 256 << 20
#: The largest file that is fetched ahead: it lies in memory beside the one in work.
_AHEAD_BYTES: Final = 64 << 20
T = TypeVar("T")


class Auditor:
    """Audits entries one after the other, with opened keys and built architectures kept between them.

    Args:
        settings: The run's.
        worker: Name of the process, for the records.

    Raises:
        UsageError: The master secret cannot be read here.
    """

    def __init__(self, settings: AuditSettings, worker: str) -> None:
        self.settings = settings
        self.worker = worker
        self.master = MasterSecret.from_file(settings.master_key_file)
        cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self._keys: _Cache[tuple[TriggerSet, str]] = _Cache(_KEY_CACHE_BYTES)
        self._skeletons: _Cache[nn.Module] = _Cache(_SKELETON_CACHE_BYTES)
        self._files = _Files(settings.base)

    def audit(
        self,
        entry: CatalogEntry,
        *,
        shard: int,
        attempt: int,
        ahead: CatalogEntry | None = None,
        before: AuditRecord | None = None,
    ) -> AuditRecord:
        """The record of one entry; never raises for what is wrong with that entry.

        Args:
            entry: What to audit.
            shard: For the record.
            attempt: For the record.
            ahead: The entry that is likely to be audited next: its file is fetched meanwhile, if it is small.
            before: An intact record of it from an earlier run, carried forward if the object is still the same.
        """
        facts: dict[str, Any] = {}
        try:
            if entry.problem is not None:
                raise entry.problem
            if before is not None and self._unchanged(entry, before):
                return carried(self.settings, entry, before, shard=shard, attempt=attempt, worker=self.worker)
            return self._audit(entry, shard, attempt, ahead, facts)
        except FwmError as error:
            # Not the error itself: its traceback holds this frame and, until the collector comes, the checkpoint.
            known = FwmError(error.code, error.message)
        except (MemoryError, torch.OutOfMemoryError, storage.TooLargeError):
            known = _too_large()
        except Exception as error:  # noqa: BLE001 - see below
            # A checkpoint is hostile input: whatever it breaks is a finding about it, not about the run.
            # The message stays unsaid, here and in the log: it could quote triggers.
            where = "".join(traceback.format_tb(error.__traceback__))
            about = {"model_id": entry.model_id, "uri": entry.uri}
            log.error("%s while auditing %s\n%s", type(error).__name__, entry.uri, where, extra=about)  # noqa: TRY400
            known = FwmError(ErrorCode.INTERNAL, f"{type(error).__name__} in the worker; its log says where")
        return error_record(self.settings, entry, known, shard=shard, attempt=attempt, worker=self.worker, **facts)

    def _audit(
        self, entry: CatalogEntry, shard: int, attempt: int, ahead: CatalogEntry | None, facts: dict[str, Any]
    ) -> AuditRecord:
        triggers, key_fingerprint = self._key(entry)
        arch = entry.arch or triggers.arch
        facts |= {"key_fingerprint": key_fingerprint, "method": triggers.method, "device": str(self.device)}
        # Before a factory's code is imported: if it changes in between, the record has what it was, and is not carried.
        facts |= {"versions": _software(arch) or versions()}
        fetching = self._files.take(entry.uri, self.settings.memory_bytes)
        try:
            model = self._skeleton(arch)
        except BaseException:
            fetching.add_done_callback(_let_go)
            raise
        clock = time.perf_counter
        fetched, seconds = fetching.result()
        with fetched:
            if ahead is not None:
                self._files.fetch_ahead(ahead.uri)
            expected = entry.sha256 or triggers.checkpoint_sha256
            facts |= {
                "fetch_ms": 1e3 * seconds,
                "size_bytes": fetched.size,
                "etag": fetched.etag,
                "sha256": fetched.sha256,
                "digest_matches": fetched.sha256 == expected if expected else None,
            }
            started = clock()
            checkpoint = open_checkpoint(fetched.path)
            facts |= {"container": checkpoint.container.value, "dtype": checkpoint.dtype}
            wide = triggers.arithmetic == "float64" and loaded_bytes(model) > _LARGE_BYTES
            as_stored = wide and self.device.type == "cpu"
            model, folded = _load_any(model, checkpoint, triggers, self.device, as_stored=as_stored)
            variant = triggers.variant_for(checkpoint.dtype, folded=folded)
            facts |= {"load_ms": 1e3 * (clock() - started), "variant": variant}
            started = clock()
            seen = self._verify(model, triggers, variant)
        facts |= {
            "verdict": seen.verdict,
            "displacement": seen.displacement,
            "triggers": seen.total,
            "matches": seen.matches,
            "match_rate": seen.matches / seen.total,
            "p_value": seen.p_value,
            "mismatched": list(seen.mismatched),
            "verify_ms": 1e3 * (clock() - started),
            "arithmetic": seen.dtype,
            "device": seen.device,
        }
        return make_record(self.settings, entry, shard=shard, attempt=attempt, worker=self.worker, **facts)

    def _verify(self, model: nn.Module, triggers: TriggerSet, variant: str) -> Verification:
        try:
            return verify_copy(model, triggers, self.settings.tolerance, variant=variant, device=self.device)
        except ModelError as error:
            if not isinstance(model, Widened) or error.code is not ErrorCode.MODEL_UNSUITABLE:
                raise
        # It needs weights that are in float64 themselves.
        return verify_copy(model.whole(), triggers, self.settings.tolerance, variant=variant, device=self.device)

    def _unchanged(self, entry: CatalogEntry, before: AuditRecord) -> bool:
        """Whether an earlier record says of this entry what an audit with the same software would say again."""
        triggers, key_fingerprint = self._key(entry)
        expected = entry.sha256 or triggers.checkpoint_sha256
        if (
            before.verdict is not Verdict.INTACT
            or before.key_fingerprint != key_fingerprint
            or before.digest_matches != (before.sha256 == expected if expected else None)
            or (software := _software(entry.arch or triggers.arch)) is None
            or before.versions != software
        ):
            return False
        now = storage.describe(entry.uri, base=self.settings.base)
        return now.etag is not None and (now.etag, now.size) == (before.etag, before.size_bytes)

    def _key(self, entry: CatalogEntry) -> tuple[TriggerSet, str]:
        name = key_name(entry.model_id, entry.key_id)
        return self._keys.get(name, lambda: self._open_key(entry, name), lambda key: key[0].nbytes())

    def _open_key(self, entry: CatalogEntry, name: str) -> tuple[TriggerSet, str]:
        known = f"{entry.model_id}/{entry.key_id}"
        seen_first = self.settings.key_fingerprints.get(known)
        if storage.exists(storage.join(self.settings.keys, retirement_name(entry.model_id, entry.key_id))):
            raise KeyFileError(
                ErrorCode.KEY_RETIRED,
                f"the key {name} was retired: list the checkpoints again (python -m jobs.catalog) for the model's "
                "other keys, or embed a new one",
            )
        try:
            sealed = storage.read(storage.join(self.settings.keys, name))
        except FwmError as error:
            if error.code is not ErrorCode.OBJECT_MISSING:
                raise
            raise KeyFileError(
                ErrorCode.KEY_MISSING,
                f"there is no key {name}: embed a watermark in the model, or correct the catalog's key_id",
            ) from None
        seen = fingerprint(sealed)
        if known in self.settings.key_fingerprints and seen != seen_first:
            raise KeyFileError(
                ErrorCode.KEY_CHANGED,
                f"the key {name} is not what it was when the run began (or could not be read then): start a new run",
            )
        triggers = TriggerSet.unseal(sealed, self.master)
        if (triggers.model_id, triggers.key_id) != (entry.model_id, entry.key_id):
            raise KeyFileError(
                ErrorCode.KEY_OTHER_MODEL,
                f"the file {name} holds key {triggers.key_id} of model {triggers.model_id}: restore the right file",
            )
        return triggers, seen

    def _skeleton(self, arch: str) -> nn.Module:
        """A module of its own for each audit: one that has run may have kept what its weights answered."""

        def make() -> nn.Module:
            return skeleton(arch, self.settings.allowed_factories)

        return twin(self._skeletons.get(arch, make, held_bytes))


def _software(arch: str) -> str | None:
    """JSON of `versions` and, of a factory's package, what code it is; None where nobody can tell."""
    if (package := factory_package(arch)) is None:
        return versions()
    digest = code_sha256(package)
    return None if digest is None else json.dumps(json.loads(versions()) | {f"factory:{package}": digest})


def _too_large() -> FwmError:
    return FwmError(
        ErrorCode.OUT_OF_MEMORY,
        "the checkpoint, or what is computed with it, does not fit into this worker's memory: --memory gives it more",
    )


def _load_any(
    model: nn.Module, checkpoint: Checkpoint, triggers: TriggerSet, device: torch.device, *, as_stored: bool
) -> tuple[nn.Module, bool]:
    """Load a checkpoint of the released form or, where the key declares that, with batch norms folded away.

    Returns:
        The module, and whether it was the folded form, into whose shape it was brought then.
    """
    try:
        return load(model, fit(checkpoint, model.state_dict()), device, as_stored=as_stored), False
    except CheckpointError as error:
        if not triggers.folds or error.code is not ErrorCode.CHECKPOINT_MISMATCH:
            raise
        released = error
    try:
        model = without_norms(model, triggers.folds)
        return load(model, fit(checkpoint, model.state_dict()), device, as_stored=as_stored), True
    except AttributeError:  # the catalog names another architecture than the key's
        raise released from None
    except CheckpointError as error:
        raise (released if error.code is ErrorCode.CHECKPOINT_MISMATCH else error) from None


class _Files:
    """Fetched files with the seconds that took, by threads of its own; one of them ahead of its time."""

    def __init__(self, base: str) -> None:
        self._base = base
        # Begun when needed: a fetch that is stuck, and was given up, holds up no other model's.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="fetch")
        self._ahead: tuple[str, Future[tuple[storage.Fetched, float]]] | None = None

    def take(self, uri: str, at_most: int | None) -> Future[tuple[storage.Fetched, float]]:
        """The file of this URI, when it is there; the errors of `storage.fetch` are its errors."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == uri:
            # What was too large for now, or failed in its own time, is asked for again when its time has come.
            if ahead[1].exception() is None:
                return ahead[1]
        elif ahead is not None:  # another worker has it now
            ahead[1].add_done_callback(_let_go)
        return self._threads.submit(self._fetch, uri, at_most)

    def fetch_ahead(self, uri: str) -> None:
        """Begin with the file that is likely to be taken next."""
        self._ahead = uri, self._threads.submit(self._fetch, uri, _AHEAD_BYTES)

    def _fetch(self, uri: str, at_most: int | None) -> tuple[storage.Fetched, float]:
        started = time.perf_counter()
        return storage.fetch(uri, base=self._base, at_most=at_most), time.perf_counter() - started


def _let_go(future: Future[tuple[storage.Fetched, float]]) -> None:
    with contextlib.suppress(FwmError, storage.TooLargeError), future.result()[0]:
        pass


@dataclass(slots=True)
class _Cache(Generic[T]):
    """Least recently used values whose sizes add up to a limit; the newest is always held."""

    limit: int
    held: OrderedDict[str, tuple[T, int]] = field(default_factory=OrderedDict)

    def get(self, name: str, make: Callable[[], T], size: Callable[[T], int]) -> T:
        if name not in self.held:
            value = make()
            self.held[name] = value, size(value)
        self.held.move_to_end(name)
        while len(self.held) > 1 and sum(held for _, held in self.held.values()) > self.limit:
            self.held.popitem(last=False)
        return self.held[name][0]
