"""Secrets stay secret, sealed keys open for their master secret only, and derivation never changes."""

from __future__ import annotations

import json
import pickle
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwm_audit.errors import ErrorCode, KeyFileError, UsageError
from fwm_audit.key import MasterSecret, SecretKey, fingerprint, read_header, signed_values

GOLDEN = Path(__file__).parent / "golden"
MASTER = MasterSecret(bytes(range(32)))
HEADER = {"format": 1, "model_id": "m", "key_id": "0" * 16}
SEALED = MASTER.seal(b"trigger set", HEADER)


@given(st.binary(max_size=2000))
def test_what_is_sealed_is_opened(plaintext):
    sealed = MASTER.seal(plaintext, HEADER)
    assert MASTER.open(sealed) == plaintext
    assert HEADER.items() <= read_header(sealed).values.items()


def test_sealing_twice_shares_nothing():
    assert fingerprint(MASTER.seal(b"x", HEADER)) != fingerprint(MASTER.seal(b"x", HEADER))


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position, change):
    damaged = bytearray(SEALED)
    damaged[position] ^= change
    with pytest.raises(KeyFileError) as caught:
        MASTER.open(bytes(damaged))
    assert caught.value.code is ErrorCode.KEY_UNREADABLE


@given(st.integers(0, len(SEALED) - 1))
def test_any_truncation_is_noticed(length):
    with pytest.raises(KeyFileError):
        MASTER.open(SEALED[:length])


def test_another_master_secret_is_told_from_damage():
    with pytest.raises(KeyFileError, match="another master secret"):
        MasterSecret.generate().open(SEALED)


@pytest.mark.parametrize("secret", [MASTER, SecretKey(bytes(range(32)))])
def test_a_secret_shows_itself_nowhere(secret):
    shown = f"{secret!r} {secret} {secret!s}"
    assert bytes(range(32)).hex()[:8] not in shown
    assert "\\x01" not in shown
    with pytest.raises(TypeError, match="not to be serialised"):
        pickle.dumps(secret)


def test_master_secret_files(tmp_path, monkeypatch):
    made = MasterSecret.generate_file(tmp_path / "made.key")
    assert stat.S_IMODE((tmp_path / "made.key").stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="exists"):
        MasterSecret.generate_file(tmp_path / "made.key")
    monkeypatch.setenv("FWM_MASTER_KEY_FILE", str(tmp_path / "made.key"))
    assert MasterSecret.from_file() == made
    (tmp_path / "raw").write_bytes(bytes(range(32)))
    assert MasterSecret.from_file(tmp_path / "raw") == MASTER
    (tmp_path / "hex").write_text("  " + bytes(range(32)).hex() + "\n")
    assert MasterSecret.from_file(tmp_path / "hex") == MASTER


@pytest.mark.parametrize("content", [b"", b"topsecret", b"zz" * 32, b"ab" * 31, bytes(33)])
def test_a_bad_master_secret_file_is_refused_without_quoting_it(tmp_path, content):
    path = tmp_path / "bad.key"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        MasterSecret.from_file(path)
    assert "openssl rand" in str(caught.value)
    assert not content or content.decode("latin1") not in str(caught.value)


def test_no_master_secret_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("FWM_MASTER_KEY_FILE", raising=False)
    with pytest.raises(UsageError, match="FWM_MASTER_KEY_FILE"):
        MasterSecret.from_file()
    with pytest.raises(UsageError, match="No such file"):
        MasterSecret.from_file(tmp_path / "missing")


def test_a_command_in_the_place_of_a_file(tmp_path, monkeypatch):
    """No shell runs it; a file that is named wins; what it prints is quoted nowhere."""
    monkeypatch.delenv("FWM_MASTER_KEY_FILE", raising=False)
    (tmp_path / "hex").write_text(bytes(range(32)).hex() + "\n")
    monkeypatch.setenv("FWM_MASTER_KEY_COMMAND", f"cat '{tmp_path / 'hex'}'")
    assert MasterSecret.from_file() == MASTER
    other = MasterSecret.generate_file(tmp_path / "other.key")
    assert MasterSecret.from_file(tmp_path / "other.key") == other
    monkeypatch.setenv("FWM_MASTER_KEY_FILE", str(tmp_path / "other.key"))
    assert MasterSecret.from_file() == other
    monkeypatch.delenv("FWM_MASTER_KEY_FILE")
    for command, says in (
        ("false", "exit code 1"),
        ("no-such-command-anywhere", "FileNotFoundError"),
        ("echo topsecret", "neither 64 hex digits"),
        (f"echo $(cat {tmp_path / 'hex'})", "neither 64 hex digits"),
        ("'", "ValueError"),
    ):
        monkeypatch.setenv("FWM_MASTER_KEY_COMMAND", command)
        with pytest.raises(UsageError, match=says) as caught:
            MasterSecret.from_file()
        assert "topsecret" not in str(caught.value)
        assert bytes(range(32)).hex() not in str(caught.value)
    monkeypatch.setattr("fwm_audit.key._COMMAND_S", 0.2)
    monkeypatch.setenv("FWM_MASTER_KEY_COMMAND", "sleep 5")
    with pytest.raises(UsageError, match="TimeoutExpired"):
        MasterSecret.from_file()


def test_a_command_that_fails_now_and_then_is_asked_again(tmp_path, monkeypatch):
    """As a key management service does, when all workers of a fleet ask it in one second."""
    monkeypatch.delenv("FWM_MASTER_KEY_FILE", raising=False)
    script = tmp_path / "ask"
    script.write_text(f"cd {tmp_path}; for n in once twice; do mkdir $n 2>/dev/null && exit 1; done; echo {'00' * 32}")
    monkeypatch.setenv("FWM_MASTER_KEY_COMMAND", f"sh {script}")
    assert MasterSecret.from_file() == MasterSecret(bytes(32))
    assert (tmp_path / "twice").exists()


def test_derivation_gives_the_committed_vectors():
    """Keys of released models must stay derivable and openable by every later version."""
    vectors = json.loads((GOLDEN / "derivation.json").read_text())
    master = MasterSecret(bytes.fromhex(vectors["master"]))
    key = master.secret_key("model", "ab" * 32, "settings")
    assert master.master_id == vectors["master_id"]
    assert key.key_id == vectors["key_id"]
    assert key.stream("noise/0", 48).hex() == vectors["stream"]
    assert master.open(bytes.fromhex(vectors["sealed"])) == b"plaintext"
    assert master.public_key == vectors["public_key"]
    assert master.sign("x", {"b": [1, None], "a": "x"}).decode() == vectors["signed"]
    assert signed_values(vectors["signed"].encode(), "x", [vectors["public_key"]]) == {"b": [1, None], "a": "x"}


@pytest.mark.parametrize("other", [("n", "ab" * 32, "s"), ("m", "cd" * 32, "s"), ("m", "ab" * 32, "t")])
def test_each_part_of_the_context_changes_the_key(other):
    assert MASTER.secret_key("m", "ab" * 32, "s") == MASTER.secret_key("m", "ab" * 32, "s")
    assert MASTER.secret_key("m", "ab" * 32, "s") != MASTER.secret_key(*other)
