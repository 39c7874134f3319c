"""Commitments: a signed statement beside each sealed key, of which key was published, for what, and when.

    KEYS/MODEL_ID/KEY_ID.FINGERPRINT.commitment.json      the first 16 digits of the fingerprint

With it, whoever holds the public key of the master secret sees that a run's keys were there before the
run, and that nobody made a key afterwards for what the audit was to find.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from fwm_audit import storage
from fwm_audit.key import fingerprint, read_header, signed_values

if TYPE_CHECKING:
    from collections.abc import Collection

    from fwm_audit.key import MasterSecret

_KIND: Final = "commitment"


def commit(keys: str, model_id: str, key_id: str, sealed: bytes, master: MasterSecret) -> None:
    """State, once, that this key is published.

    Raises:
        StorageError: It cannot be written.
    """
    digest = fingerprint(sealed)
    values = {
        "model_id": model_id,
        "key_id": key_id,
        "fingerprint": digest,
        "checkpoint_sha256": read_header(sealed).values.get("checkpoint_sha256"),
        "committed_at": datetime.now(UTC).isoformat(timespec="microseconds"),
    }
    storage.create(_uri(keys, model_id, key_id, digest), master.sign(_KIND, values))


def committed_at(keys: str, model_id: str, key_id: str, key_fingerprint: str, public_keys: Collection[str]) -> datetime:
    """When a key was committed to.

    Raises:
        StorageError: There is no commitment to it.
        ValueError: The commitment is not signed by any of `public_keys`, or is to something else.
    """
    values = signed_values(storage.read(_uri(keys, model_id, key_id, key_fingerprint)), _KIND, public_keys)
    if [values.get(name) for name in ("model_id", "key_id", "fingerprint")] != [model_id, key_id, key_fingerprint]:
        raise ValueError("is a commitment to another key")
    return datetime.fromisoformat(str(values.get("committed_at")))


def _uri(keys: str, model_id: str, key_id: str, key_fingerprint: str) -> str:
    return storage.join(keys, model_id, f"{key_id}.{key_fingerprint[:16]}.commitment.json")
