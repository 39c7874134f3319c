"""Every way an audit or an embedding can fail, each with a code that stays the same for ever.

A `FwmError` is one finding about one subject: its `code` goes into the audit record, its message
is for a person and says what to do. Messages never carry key material, triggers or their labels.
`UsageError` is different in kind: the *run* was asked for wrongly (exit code 2, no record).
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """Stable identifiers, written to `error_code`; values are never renamed or reused."""

    # catalog
    CATALOG_ROW = "catalog_row_invalid"
    CATALOG_DUPLICATE = "catalog_row_duplicate"
    URI_NOT_ALLOWED = "uri_not_allowed"
    # architecture
    ARCH_UNKNOWN = "arch_unknown"
    ARCH_NOT_ALLOWED = "arch_not_allowed"
    # object storage
    OBJECT_MISSING = "object_missing"
    OBJECT_CHANGED = "object_changed_while_read"
    STORAGE = "storage_failed"
    # checkpoint
    CONTAINER_UNKNOWN = "container_unknown"
    CHECKPOINT_CORRUPT = "checkpoint_corrupt"
    CHECKPOINT_UNSAFE = "checkpoint_unsafe"
    CHECKPOINT_MISMATCH = "checkpoint_does_not_fit_arch"
    CHECKPOINT_OTHER = "checkpoint_not_the_one_listed"
    NON_FINITE = "non_finite"
    # key
    KEY_MISSING = "key_missing"
    KEY_UNREADABLE = "key_unreadable"
    KEY_OTHER_MODEL = "key_for_another_model"
    KEY_CHANGED = "key_changed_during_run"
    KEY_RETIRED = "key_retired"
    RUNG_MISSING = "rung_not_in_key"
    # target classifier
    MODEL_UNSUITABLE = "model_unsuitable"
    SETTINGS = "settings_unsuitable"
    MODEL_STOCHASTIC = "model_not_deterministic"
    NO_FLOAT64 = "model_not_float64"
    PAIRS_NOT_FOUND = "pairs_not_found"
    COVERAGE_NOT_REACHED = "coverage_not_reached"
    # worker
    TIMEOUT = "timeout"
    WORKER_DIED = "worker_died"
    OUT_OF_MEMORY = "out_of_memory"
    INTERNAL = "internal"


class UsageError(Exception):
    """The run was asked for wrongly: nothing was audited, exit code 2."""

    agreed = False


class FwmError(Exception):
    """One subject could not be served; `code` is stable, the message says what to do.

    Args:
        code: Stable identifier of the finding.
        message: One or two sentences for a person, free of secrets.

    Attributes:
        agreed: Whether all ranks of a group that embeds have raised it, so that none waits for another.
    """

    agreed = False

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[FwmError], tuple[ErrorCode, str]]:
        # Crosses process boundaries (Ray), where the default would replay one argument only.
        return type(self), (self.code, self.message)


class CatalogError(FwmError):
    """A catalog row cannot be used."""


class ArchitectureError(FwmError):
    """An architecture is unknown, or names code that the operator did not allow."""


class StorageError(FwmError):
    """An object could not be listed, read or written."""


class CheckpointError(FwmError):
    """A checkpoint is not one, is damaged, is unsafe to open, or does not fit its architecture."""


class KeyFileError(FwmError):
    """A sealed key is missing, cannot be opened with this master secret, or is for another model."""


class ModelError(FwmError):
    """A model cannot carry or answer triggers: stochastic, not float64, not finite, K < 2."""


class EmbeddingError(FwmError):
    """The embedding did not reach what was asked of it."""
