"""Secrets: the master secret, the secret key of one watermark, and the sealed file between them.

Everything secret is derived with HKDF-SHA256 under a purpose string, so that no two uses share
key material:

    master secret (32 bytes, one per company, from a file)
      +- secret key of (model, checkpoint, settings)   -> class pairs, noise, generator's initial weights
      +- sealing key of one file (salted)              -> AES-256-GCM over the trigger set
      +- signing key                                   -> Ed25519 over manifests, the ledger and commitments

A sealed key is `MAGIC | header length (u32, little-endian) | header (JSON) | nonce (12) | ciphertext`.
The header is readable without the master secret, holds nothing secret, and is bound to the
ciphertext as associated data. Sources: RFC 5869 (HKDF), NIST SP 800-38D (GCM), FIPS 202 (SHAKE), RFC 8032 (Ed25519).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import shlex
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import stamina
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fwm_audit.errors import ErrorCode, KeyFileError, UsageError

MAGIC: Final = b"FWMKEY\x00\x01"
SECRET_BYTES: Final = 32
MASTER_KEY_VARIABLE: Final = "FWM_MASTER_KEY_FILE"
MASTER_COMMAND_VARIABLE: Final = "FWM_MASTER_KEY_COMMAND"
_COMMAND_S: Final = 60.0
_DOMAIN: Final = "fwm-audit/v1/"
_NONCE_BYTES: Final = 12
_MAX_HEADER_BYTES: Final = 1 << 20


def _hkdf(secret: bytes, purpose: str, *, salt: bytes | None = None, length: int = SECRET_BYTES) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=(_DOMAIN + purpose).encode()).derive(secret)


class _Secret:
    """32 bytes that never show themselves: not in repr, not by pickling, not by accident."""

    __slots__ = ("_bytes",)

    def __init__(self, value: bytes) -> None:
        if len(value) != SECRET_BYTES:
            raise UsageError(f"a {type(self).__name__} has {SECRET_BYTES} bytes, got {len(value)}")
        self._bytes = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<{SECRET_BYTES} secret bytes>)"

    def __reduce__(self) -> Any:
        # A pickled secret would end in Ray's object store and in its spill files.
        raise TypeError(f"{type(self).__name__} is not to be serialised; pass a reference to its file")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and hmac.compare_digest(self._bytes, other._bytes)

    __hash__ = None  # type: ignore[assignment]  # a hash would be a function of the secret


class SecretKey(_Secret):
    """The secret of one watermark: class pairs, noise and the generator's seed come from it."""

    __slots__ = ()

    @classmethod
    def generate(cls) -> SecretKey:
        """A new key from the operating system's random source."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @property
    def key_id(self) -> str:
        """Public name of this key: 16 hex digits that tell nothing about the key itself."""
        return _hkdf(self._bytes, "key-id", length=8).hex()

    def stream(self, purpose: str, length: int) -> bytes:
        """`length` pseudo-random bytes for one purpose: SHAKE-256 keyed with an HKDF subkey."""
        return hashlib.shake_256(_hkdf(self._bytes, "stream/" + purpose)).digest(length)


class MasterSecret(_Secret):
    """The secret of a company: seals trigger sets and derives each watermark's secret key."""

    __slots__ = ()

    @classmethod
    def generate(cls) -> MasterSecret:
        """A new master secret from the operating system's random source."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def generate_file(cls, path: str | os.PathLike[str]) -> MasterSecret:
        """A new master secret, written as hex to a new file that only its owner can read.

        Raises:
            UsageError: The file exists: overwriting it would make every key sealed with it unreadable.
        """
        value = secrets.token_bytes(SECRET_BYTES)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise UsageError(f"{os.fspath(path)} exists and may seal keys: choose another name") from None
        with os.fdopen(descriptor, "w") as file:
            file.write(value.hex() + "\n")
        return cls(value)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str] | None = None) -> MasterSecret:
        """The secret in a file, or that a command prints: 64 hex digits (white space around them is fine) or 32 bytes.

        Args:
            path: The file; None takes the one that FWM_MASTER_KEY_FILE names, and without that variable what the
                command in FWM_MASTER_KEY_COMMAND prints (a call to a key management service; no shell runs it).

        Raises:
            UsageError: Neither is named, or there is no master secret.
        """
        name = os.fspath(path) if path is not None else os.environ.get(MASTER_KEY_VARIABLE, "")
        advice = "make one with: (umask 077; openssl rand -hex 32 > master.key)"
        if not name and (command := os.environ.get(MASTER_COMMAND_VARIABLE)):
            name, raw = f"what {MASTER_COMMAND_VARIABLE} prints", _printed(command)
        elif not name:
            raise UsageError(
                f"no master secret: set {MASTER_KEY_VARIABLE} or {MASTER_COMMAND_VARIABLE}, or pass --master-key FILE; "
                f"{advice}"
            )
        else:
            try:
                raw = Path(name).read_bytes()
            except OSError as error:
                raise UsageError(f"cannot read the master secret {name}: {error.strerror}; {advice}") from None
        if len(raw) == SECRET_BYTES:
            return cls(raw)
        try:
            return cls(bytes.fromhex(raw.decode("ascii").strip()))
        except (ValueError, UsageError):
            # The cause would quote the file's content.
            raise UsageError(f"{name} holds neither 64 hex digits nor 32 raw bytes; {advice}") from None

    @property
    def master_id(self) -> str:
        """Public name of this master secret, so that a wrong one can be told from a damaged file."""
        return _hkdf(self._bytes, "master-id", length=8).hex()

    def secret_key(self, model_id: str, checkpoint_sha256: str, settings: str) -> SecretKey:
        """The secret key for one model under one set of settings; a retry gets the same key."""
        context = json.dumps([model_id, checkpoint_sha256, settings])
        return SecretKey(_hkdf(self._bytes, "secret-key/" + context))

    @property
    def public_key(self) -> str:
        """Hex of the Ed25519 key that verifies what `sign` signed; public."""
        return self._signing_key().public_key().public_bytes_raw().hex()

    def sign(self, kind: str, values: Mapping[str, Any]) -> bytes:
        """JSON of `values` with its kind, who signed it and the signature; `signed_values` reads it."""
        return _signed(self._signing_key(), {**values, "kind": kind})

    def envelope(self, payload_type: str, payload: bytes) -> bytes:
        """A DSSE envelope (secure-systems-lab/dsse, v1) of a payload for other tools, signed with the same key.

        What is signed begins with `DSSEv1`, as no file of ours does: neither stands for the other.
        """
        name = payload_type.encode()
        signed = b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)
        signature = {"keyid": self.public_key, "sig": base64.b64encode(self._signing_key().sign(signed)).decode()}
        body = base64.b64encode(payload).decode()
        return json.dumps({"payloadType": payload_type, "payload": body, "signatures": [signature]}).encode()

    def _signing_key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(_hkdf(self._bytes, "sign"))

    def seal(self, plaintext: bytes, header: dict[str, Any]) -> bytes:
        """The sealed form of `plaintext`; `header` stays readable and is bound to it."""
        salt = secrets.token_bytes(SECRET_BYTES)
        full = header | {"cipher": "AES-256-GCM", "salt": salt.hex(), "master_id": self.master_id}
        encoded = json.dumps(full, sort_keys=True, separators=(",", ":")).encode()
        prefix = MAGIC + len(encoded).to_bytes(4, "little") + encoded
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return prefix + nonce + AESGCM(_hkdf(self._bytes, "seal", salt=salt)).encrypt(nonce, plaintext, prefix)

    def open(self, sealed: bytes) -> bytes:
        """The plaintext of a sealed file.

        Raises:
            KeyFileError: It is no sealed key, belongs to another master secret, or was altered.
        """
        header = read_header(sealed)
        if not hmac.compare_digest(str(header.values.get("master_id")), self.master_id):
            raise KeyFileError(
                ErrorCode.KEY_UNREADABLE,
                f"the sealed key was made with another master secret (its id is {header.values.get('master_id')}, "
                f"yours is {self.master_id}): check {MASTER_KEY_VARIABLE}",
            )
        prefix, body = sealed[: header.size], sealed[header.size :]
        try:
            sealing_key = _hkdf(self._bytes, "seal", salt=bytes.fromhex(header.values["salt"]))
            return AESGCM(sealing_key).decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], prefix)
        except (InvalidTag, ValueError, KeyError, TypeError):
            raise KeyFileError(
                ErrorCode.KEY_UNREADABLE, "the sealed key was altered or cut short; restore it or embed again"
            ) from None


class _CommandFailedError(UsageError):
    """The command that prints the master secret ended with an error."""


def _printed(command: str) -> bytes:
    """What a command prints; what it says on standard error goes to ours, and nothing of it into a message.

    One that fails is tried again: a service that hears of all workers of a fleet at once turns some away.
    """
    output = b""
    for attempt in stamina.retry_context(on=_CommandFailedError, attempts=3, timeout=_COMMAND_S):
        with attempt:
            try:
                done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, timeout=_COMMAND_S, check=False)  # noqa: S603 - the operator's
            except (OSError, ValueError, subprocess.TimeoutExpired) as error:
                name = type(error).__name__
                raise UsageError(f"the command in {MASTER_COMMAND_VARIABLE} cannot be run ({name})") from None
            if done.returncode:
                code = done.returncode
                raise _CommandFailedError(f"the command in {MASTER_COMMAND_VARIABLE} failed with exit code {code}")
            output = done.stdout
    return output


class SessionKey:
    """Signs in the place of a master secret that is elsewhere: by a key of its own, which that secret certifies.

    Args:
        certify: From the public key to `MasterSecret.sign("session", {"public_key": ...})`, where the secret is.

    Attributes:
        public_key: That of the master secret.
    """

    def __init__(self, certify: Callable[[str], bytes]) -> None:
        self._private = Ed25519PrivateKey.generate()
        self._certificate = json.loads(certify(self._private.public_key().public_bytes_raw().hex()))
        self.public_key: str = self._certificate["signer"]

    def sign(self, kind: str, values: Mapping[str, Any]) -> bytes:
        """As `MasterSecret.sign`."""
        return _signed(self._private, {**values, "kind": kind, "certificate": self._certificate})


def _signed(private: Ed25519PrivateKey, values: dict[str, Any]) -> bytes:
    full = values | {"signer": private.public_key().public_bytes_raw().hex()}
    return canonical(full | {"signature": private.sign(canonical(full)).hex()})


def canonical(values: Mapping[str, Any]) -> bytes:
    """The one JSON text of these values that is signed and stored."""
    return json.dumps(values, sort_keys=True, indent=2).encode() + b"\n"


def signed_values(data: bytes, kind: str, public_keys: Collection[str]) -> dict[str, Any]:
    """What was signed, without kind, signer and signature.

    Args:
        data: From `MasterSecret.sign`; any other byte is an error, white space included.
        kind: Of what it has to be; one kind of file must not stand for another.
        public_keys: Those that are trusted.

    Raises:
        ValueError: It is not signed, by none of them, or was changed; the text says which.
    """
    try:
        values = json.loads(data)
        signer, signature = values["signer"], bytes.fromhex(values["signature"])
        unsigned = {name: value for name, value in values.items() if name != "signature"}
        same = canonical(unsigned | {"signature": signature.hex()}) == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("is not a signed JSON object") from None
    if (certificate := unsigned.pop("certificate", None)) is not None:
        try:
            certified = signed_values(canonical(certificate), "session", public_keys)["public_key"]
        except (ValueError, KeyError, TypeError, RecursionError):
            certified = None
        public_keys = [certified] if isinstance(certified, str) else []
        unsigned["certificate"] = certificate
    if not isinstance(signer, str) or signer not in public_keys:
        raise ValueError(f"was signed with the key {str(signer)[:64]!a}, which is not trusted")
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer)).verify(signature, canonical(unsigned))
    except (InvalidSignature, ValueError):
        same = False
    if not same:
        raise ValueError("is not what was signed")
    if unsigned.get("kind") != kind:
        raise ValueError(f"is signed, but as a {unsigned.get('kind')}, not as a {kind}")
    return {name: value for name, value in unsigned.items() if name not in {"kind", "signer", "certificate"}}


@dataclass(frozen=True, slots=True)
class Header:
    """The readable part of a sealed key: its values, and the bytes it takes with its prefix."""

    values: dict[str, Any]
    size: int


def read_header(sealed: bytes) -> Header:
    """The header of a sealed key, readable without the master secret and so far NOT authenticated.

    Raises:
        KeyFileError: The bytes are no sealed key of a version that this release knows.
    """
    start = len(MAGIC) + 4
    length = int.from_bytes(sealed[len(MAGIC) : start], "little")
    if not sealed.startswith(MAGIC) or length > _MAX_HEADER_BYTES or len(sealed) < start + length:
        raise KeyFileError(ErrorCode.KEY_UNREADABLE, "not a sealed key of this version, or cut short")
    try:
        values = json.loads(sealed[start : start + length])
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise KeyFileError(ErrorCode.KEY_UNREADABLE, "the sealed key's header was altered")
    return Header(values, start + length)


def key_name(model_id: str, key_id: str) -> str:
    """Path of a sealed key below the keys' URI."""
    return f"{model_id}/{key_id}.fwmkey"


def retirement_name(model_id: str, key_id: str) -> str:
    """Path, below the keys' URI, of the object whose existence says that a key is retired."""
    return f"{model_id}/{key_id}.retired.json"


def fingerprint(sealed: bytes) -> str:
    """SHA-256 of a sealed key as stored: the commitment that records and runs refer to."""
    return hashlib.sha256(sealed).hexdigest()
