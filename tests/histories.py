"""Runs as the driver stores them, signed with real keys, without auditing anything: for what reads records."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from fwm_audit import ledger, storage
from fwm_audit.key import MasterSecret
from fwm_audit.records import AuditRecord, Run, manifest, run_path, to_parquet
from fwm_audit.verdict import Displacement, Verdict

MASTER = MasterSecret(bytes(range(32)))
BEGIN = datetime(2026, 11, 1, 2, 0, tzinfo=UTC)


def digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def look(model_id: str, uri: str, what: str = "intact", **facts: Any) -> dict[str, Any]:
    """Columns of one record: `what` is intact, a displacement of a tampered one, or an error code."""
    released = digest(model_id)
    values: dict[str, Any] = {
        "model_id": model_id,
        "uri": uri,
        "arch": "timm:resnet18",
        "key_id": digest("key", model_id)[:16],
        "key_fingerprint": digest("fingerprint", model_id),
        "method": "mirror",
        "attempt": 1,
        "worker": "node-1:4711",
        "versions": '{"fwm-audit": "0.2"}',
        "etag": digest(uri, what)[:32],
        "size_bytes": 46_827_520,
        "sha256": released,
        "container": "safetensors",
        "dtype": "float32",
        "variant": "float32",
        "arithmetic": "float64",
        "device": "cpu",
        "digest_matches": True,
        "triggers": 32,
        "matches": 32,
        "match_rate": 1.0,
        "p_value": 1.0,
        "mismatched": [],
        "fetch_ms": 120.5,
        "load_ms": 14.25,
        "verify_ms": 310.0,
        "verdict": Verdict.INTACT,
        "displacement": Displacement.NONE,
    }
    if what in {"float32", "half", "beyond"}:
        values |= {
            "verdict": Verdict.TAMPERED,
            "displacement": Displacement(what),
            "matches": 16,
            "match_rate": 0.5,
            "p_value": 1e-9,
            "mismatched": list(range(0, 32, 2)),
            "sha256": digest(uri, what),
            "digest_matches": False,
        }
    elif what == "other bytes":
        values |= {"sha256": digest(uri, what), "digest_matches": False}
    elif what != "intact":
        unread = dict.fromkeys(
            ("sha256", "container", "dtype", "variant", "arithmetic", "triggers", "matches", "match_rate", "p_value"),
        )
        values |= unread | {
            "mismatched": None,
            "digest_matches": None,
            "load_ms": None,
            "verify_ms": None,
            "verdict": Verdict.ERROR,
            "displacement": Displacement.UNKNOWN,
            "error_code": what,
            "error_message": f"it is {what}",
        }
    return values | facts


def night(
    out: str,
    run_id: str,
    started_at: datetime,
    looks: Sequence[dict[str, Any]],
    *,
    rows: int | None = None,
    master: MasterSecret = MASTER,
    shard_size: int = 64,
) -> Run:
    """One run, as `jobs.audit` leaves it; it is not complete if its catalog has more `rows` than there are looks."""
    run = Run(run_id, started_at, {"tolerance": "exact"}, digest(run_id), rows or len(looks), shard_size, {}, "0.2")
    description = master.sign("run", run.values())
    storage.create(f"{out}/{run_path(run_id, 'run.json')}", description)
    parts = {}
    for shard in range(-(-len(looks) // shard_size)):
        records = [
            AuditRecord(
                **{
                    "run_id": run_id,
                    "run_started_at": started_at,
                    "audited_at": started_at + timedelta(seconds=shard),
                    "shard": shard,
                }
                | values
            )
            for values in looks[shard * shard_size : (shard + 1) * shard_size]
        ]
        name = run.part(shard)
        parts[name] = to_parquet(records, name, hashlib.sha256(description).hexdigest(), master.sign)
        storage.create(f"{out}/{name}", parts[name])
    if rows is None or rows == len(looks):
        signed = master.sign("manifest", manifest(run, description, parts))
        storage.create(f"{out}/{run_path(run_id, 'manifest.json')}", signed)
        ledger.append(out, run_id, started_at, signed, master.sign, [master.public_key])
    return run


HOSTILE = "evil/</script><img src=x onerror=alert(1)>\x1b[31m\u202e&{{7*7}}"


def story(out: str, *, begin: datetime = BEGIN) -> list[Run]:
    """Five nights of a small company, with one of each that a report has to tell apart.

    Night 1: all intact. 2: vision/a moves, speech/b is unreadable. 3: vision/a is worse, one copy of text/c is saved
    anew, vision/gone is no longer listed. 4: vision/a is restored and text/c/2 swapped. 5: not complete: two of seven
    looks, one of them a new tampering.
    """
    copies = [f"s3://acme/fleet/text/c/{number}.safetensors" for number in (1, 2)]
    a, b, gone, evil = (f"s3://acme/fleet/{name}.pt" for name in ("vision/a", "speech/b", "vision/gone", HOSTILE))

    def looks(*, a_is: str = "intact", b_is: str = "intact", first: str = "intact", second: str = "intact", **_: Any):
        return [
            look("vision/a", a, a_is),
            look("speech/b", b, b_is, verify_ms=None if b_is != "intact" else 2810.5),
            look("text/c", copies[0], first),
            look("text/c", copies[1], second),
            look(HOSTILE, evil, "checkpoint_unsafe", error_message=f"no: {HOSTILE}"),
        ]

    nights = [
        [*looks(), look("vision/gone", gone)],
        [*looks(a_is="half", b_is="checkpoint_corrupt"), look("vision/gone", gone)],
        looks(a_is="beyond", b_is="checkpoint_corrupt", first="other bytes"),
        [*looks(b_is="timeout", first="other bytes", second="float32"), look("vision/new", "s3://acme/fleet/new.pt")],
    ]
    runs = [
        night(out, f"night-{number}", begin + timedelta(days=number - 1), rows, shard_size=4)
        for number, rows in enumerate(nights, 1)
    ]
    late = [look("vision/a", a), look("vision/new", "s3://acme/fleet/new.pt", "beyond")]
    return [*runs, night(out, "night-5", begin + timedelta(days=4), late, rows=7, shard_size=4)]


def many(rows: int, *, fleet: int = 0, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Looks at a large fleet, each of another checkpoint: one in a hundred tampered, one in fifty an error.

    `fleet` draws the checkpoints, `seed` what is found.
    """
    draws = random.Random(seed)
    for row in range(rows):
        model_id = f"{('vision', 'speech', 'text')[row % 3]}/team-{row % 97}/model-{row // 8}"
        chance = draws.random()
        if chance < 0.01:
            what = draws.choice(("float32", "half", "beyond"))
        elif chance < 0.03:
            what = draws.choice(("checkpoint_corrupt", "object_missing", "timeout"))
        else:
            what = "intact"
        yield look(
            model_id,
            f"s3://acme-models-{row % 5}/fleet/{model_id}/{digest(fleet, row)[:12]}/checkpoint.safetensors",
            what,
            fetch_ms=draws.uniform(20, 400),
            verify_ms=draws.uniform(100, 3000) if what not in {"checkpoint_corrupt", "object_missing"} else None,
        )
