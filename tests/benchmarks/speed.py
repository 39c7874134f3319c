"""How fast a fleet is audited: `jobs.audit` beside what else people would run, and beside what the machine allows.

A real S3 server on this machine holds three classes of checkpoints: small ones (a perceptron of 0.8 MB), medium
ones (EfficientNet-Lite0, 18 MB) and large ones (a perceptron of 500 MB). Each class, and all of them
together, is audited by `jobs.audit` and by each of `peers.py`, every one a new process; one in ten copies of
a class is edited, and who does not see exactly those is left out of the comparison. The limit is the larger of
bytes over the raw rate of GETs and forward passes over the best rate of float64 passes, both measured here,
before and after each class.

On one machine the store takes its part of the same cores, and its bytes come faster than they can be hashed: `--link`
puts a link of a limited rate between them, as a network is.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

import boto3
import pyarrow.parquet as pq
import torch
import typer
from safetensors.torch import save

from fwm_audit import MasterSecret, TriggerSet, embed
from fwm_audit.architectures import build, input_shape
from fwm_audit.arithmetic import keep_freed_memory
from fwm_audit.catalog import CatalogEntry, write_catalog
from fwm_audit.key import key_name
from fwm_audit.verification import run
from tests import seaweed
from tests.benchmarks import networks
from tests.proxy import Proxy

_EXAMPLES = """\b
Examples:
  python -m tests.benchmarks.speed --out speed-out
  python -m tests.benchmarks.speed --out speed-out --small 2000 --medium 50 --large 5
  python -m tests.benchmarks.speed --out speed-out --small 0 --medium 400 --large 0 --alone
  python -m tests.benchmarks.speed --out speed-out --small 0 --medium 0 --large 10 --alone --link 125

\b
`pip install model-signing==1.1.1 pyopenssl` adds the row of digests only. The keys are kept in FOLDER.
"""
CPU = torch.device("cpu")
PEERS = ("sequential", "ray-data", "hash")

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Class:
    """One class of checkpoints: its architecture and how many there are."""

    name: str
    arch: str
    count: int


@app.command(epilog=_EXAMPLES)
def speed(
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For keys, objects, results and the report.")],
    small: Annotated[int, typer.Option(min=0, help="Checkpoints of 0.8 MB.")] = 400,
    medium: Annotated[int, typer.Option(min=0, help="Checkpoints of 18 MB.")] = 10,
    large: Annotated[int, typer.Option(min=0, help="Checkpoints of 500 MB.")] = 2,
    pairs: Annotated[int, typer.Option(min=1, help="Mirrored pairs of each key.")] = 16,
    alone: Annotated[bool, typer.Option("--alone", help="Without the others: the share of the limit only.")] = False,
    link: Annotated[float | None, typer.Option(metavar="MB/S", min=1.0, help="All that the store can send.")] = None,
) -> None:
    """Print models/s and ratios of each class and of all together; FOLDER/speed.json has them too."""
    out.mkdir(parents=True, exist_ok=True)
    out = out.absolute()
    classes = [
        Class("small", "factory:tests.nets:wide", small),
        Class("medium", "timm:tf_efficientnet_lite0", medium),
        Class("large", "factory:tests.nets:wide?hidden=11000&layers=2", large),
    ]
    classes = [kind for kind in classes if kind.count]
    if not (out / "master.key").exists():
        MasterSecret.generate_file(out / "master.key")
    os.environ["FWM_MASTER_KEY_FILE"] = str(out / "master.key")
    rows, passes = [], {}
    (out / "s3").mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(seaweed.serve(out / "s3"))
        os.environ |= seaweed.environment(endpoint)
        for kind in classes:
            entries, passes[kind.name] = released_fleet(kind, out, pairs)
            rows.append((kind.name, entries))
        if link is not None:
            os.environ["AWS_ENDPOINT_URL"] = stack.enter_context(_Link(endpoint, link * 1e6)).endpoint
        report, limits, peers = [], [], () if alone else PEERS
        for name, entries in rows:
            # Before and after, as other tenants of a machine come and go.
            before = _limit(entries, passes[name])
            report.append(_compare(name, entries, out, peers))
            limits.append({kind: (before[kind] + s) / 2 for kind, s in _limit(entries, passes[name]).items()})
        if len(classes) > 1:
            report.append(_compare("all", [entry for _, entries in rows for entry in entries], out, peers))
            limits.append({kind: sum(limit[kind] for limit in limits) for kind in limits[0]})
        for row, limit in zip(report, limits, strict=True):
            row["limit_s"] = {kind: round(s, 1) for kind, s in limit.items()}
    (out / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
    for line in _lines(report):
        typer.echo(line)


# -------------------------------------------------------------------------------------------- the fleet


def released_fleet(kind: Class, out: Path, pairs: int) -> tuple[list[CatalogEntry], dict[str, object]]:
    """Catalog entries of uploaded copies, every tenth of them edited, and what a forward pass of one needs."""
    if kind.arch.startswith("timm:"):
        model = networks.load("efficientnet-lite0-imagenet", out).model
    else:
        model = build(kind.arch, ["tests"])
    master = MasterSecret.from_file(None)
    released = save(model.state_dict())
    digest = hashlib.sha256(released).hexdigest()
    secret = master.secret_key(kind.name, digest, str(pairs))
    path = out / "keys" / key_name(kind.name, secret.key_id)
    if not path.exists():
        typer.echo(f"making the key of {kind.name}", err=True)
        shape = input_shape(kind.arch, model)
        triggers = embed(
            model, secret=secret, model_id=kind.name, input_shape=shape, pairs=pairs, arch=kind.arch,
            checkpoint_sha256=digest,
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(triggers.seal(master))
    last = [name for name, tensor in model.state_dict().items() if tensor.dim() == 2][-1]
    edited = save({name: t + 1e-6 if name == last else t for name, t in model.state_dict().items()})
    client = boto3.client("s3")
    known = {
        item["Key"]: item["Size"]
        for page in client.get_paginator("list_objects_v2").paginate(
            Bucket=seaweed.BUCKET, Prefix=f"fleet/{kind.name}/"
        )
        for item in page.get("Contents", ())
    }
    entries = []
    for number in range(kind.count):
        name = f"fleet/{kind.name}/{number:05}.safetensors"
        uri = f"s3://{seaweed.BUCKET}/{name}"
        entry = CatalogEntry(number, kind.name, uri, kind.arch, secret.key_id, digest, len(released))
        if known.get(name) != len(released):
            client.put_object(Bucket=seaweed.BUCKET, Key=name, Body=edited if _is_edited(entry) else released)
        entries.append(entry)
    return entries, {"arch": kind.arch, "key": str(path), "weights": model.state_dict()}


def _is_edited(entry: CatalogEntry) -> bool:
    """Whether it is the tenth of ten."""
    return int(entry.uri.rpartition("/")[2].partition(".")[0]) % 10 == 9


# ------------------------------------------------------------------------------------ what the machine allows


def _limit(entries: list[CatalogEntry], passes: dict[str, object]) -> dict[str, float]:
    """Seconds that the bytes of a class take at the raw rate, and its forward passes at the best rate."""
    cores = os.cpu_count() or 1
    total = sum(entry.size_bytes or 0 for entry in entries)
    chosen = entries[: max(cores, min(len(entries), 256 * 2**20 // max(1, entries[0].size_bytes or 1)))]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(cores, mp_context=context) as pool:
        shares = [[entry.uri for entry in chosen[start::cores]] for start in range(cores)]
        list(pool.map(_download, shares))
        # Without the start of the processes: those of the second round are there.
        began = time.monotonic()
        got = sum(pool.map(_download, shares))
        rate = got / (time.monotonic() - began)
        rates = list(pool.map(_passes, [passes] * cores))
    alone = _passes(passes, threads=cores)
    best = max(sum(rates), alone)
    triggers = TriggerSet.load(passes["key"], master=MasterSecret.from_file(None))
    # Of an edited one a second rung is asked, for how far it has moved.
    needed = (len(entries) + sum(map(_is_edited, entries))) * 2 * triggers.pairs
    return {"bytes_s": total / rate, "passes_s": needed / best}


def _download(uris: list[str]) -> int:
    client = boto3.client("s3")

    def get(uri: str) -> int:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        body = client.get_object(Bucket=bucket, Key=key)["Body"]
        return sum(len(piece) for piece in body.iter_chunks(1 << 20))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return sum(pool.map(get, uris))


def _passes(what: dict[str, object], threads: int = 1) -> float:
    """Float64 forward passes in a second, by PyTorch's own kernels or ours, in the best of several batch sizes."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    model = build(what["arch"], ["tests"])
    model.load_state_dict(what["weights"])
    model = model.eval().double()
    triggers = TriggerSet.load(what["key"], master=MasterSecret.from_file(None))
    inputs, _ = triggers.materialise(triggers.rungs[0])

    def rate(size: int | None, replaced: bool, seconds: float) -> float:
        began, done = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            run(model, inputs, CPU, batch=size, replaced=replaced)
            done += len(inputs)
        return done / (time.monotonic() - began)

    ways = [(4, False), (32, False), (None, True)]
    for size, replaced in ways:
        run(model, inputs[: size or 4], CPU, batch=size, replaced=replaced)
    best = max(ways, key=lambda way: rate(*way, 1.0))
    return rate(*best, 20.0)


# ----------------------------------------------------------------------------------------- who runs beside whom


def _compare(name: str, entries: list[CatalogEntry], out: Path, peers: Sequence[str]) -> dict[str, Any]:
    entries = [
        CatalogEntry(row, e.model_id, e.uri, e.arch, e.key_id, e.sha256, e.size_bytes) for row, e in enumerate(entries)
    ]
    catalog = out / f"{name}.parquet"
    catalog.write_bytes(write_catalog(entries, catalog.name))
    tampered = sum(map(_is_edited, entries))
    expected = Counter({"intact": len(entries) - tampered, "tampered": tampered})
    results = out / f"results-{time.time_ns()}"
    results.mkdir()
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    audit = [
        *(sys.executable, "-m", "jobs.audit", "--catalog", str(catalog), "--keys", str(out / "keys")),
        *("--out", str(results / "audit"), "--allow-factory", "tests"),
    ]
    runs = {"fwm-audit": audit}
    for peer in peers:
        if peer == "hash" and importlib.util.find_spec("model_signing") is None:
            continue
        module = (sys.executable, "-m", "tests.benchmarks.peers", peer)
        runs[peer] = [*module, str(catalog), str(out / "keys"), str(results / peer)]
    memory, stages = 0, {}
    for who, command in runs.items():
        typer.echo(f"{name}: {who}", err=True)
        began = datetime.now(UTC)
        with (results / f"{who}.log").open("wb") as log, _Watch("ray::AuditWorker") as watch:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=False)
        took = (datetime.now(UTC) - began).total_seconds()
        said = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
        seen = said.get("verdicts", said)
        if {verdict: seen.get(verdict, 0) for verdict in expected} != dict(expected):
            failed[who] = f"exit code {done.returncode}, verdicts {seen}"
            continue
        seconds[who] = took
        if who == "fwm-audit":
            memory = watch.peak
            stages = stages_of(pq.read_table(results / "audit" / "audits").to_pylist(), began)
    return {
        "class": name,
        "models": len(entries),
        "bytes": sum(e.size_bytes or 0 for e in entries),
        "seconds": {who: round(took, 1) for who, took in seconds.items()},
        "failed": failed,
        "worker_peak_bytes": memory,
        "stages_s": stages,
    }


def stages_of(records: Sequence[dict[str, Any]], began: datetime) -> dict[str, float]:
    """Median seconds of each stage of an audit; seconds to its first record, and from then on for each other one."""
    times = sorted(record["audited_at"] for record in records)
    return {
        "first": (times[0] - began).total_seconds(),
        "each": (times[-1] - times[0]).total_seconds() / (len(times) - 1),
        **{
            name: statistics.median(record[f"{name}_ms"] for record in records) / 1e3
            for name in ("fetch", "load", "verify")
        },
    }


def _lines(report: list[dict[str, object]]) -> list[str]:
    lines = ["| class | models | who | s | models/s | fwm-audit is faster by | share of the limit |", "|" + "---|" * 7]
    for row in report:
        bound = max(row["limit_s"].values())
        ours = row["seconds"].get("fwm-audit")
        for who, took in row["seconds"].items():
            ratio = f"{took / ours:.2f}" if ours else ""
            rate = row["models"] / took
            lines.append(
                f"| {row['class']} | {row['models']} | {who} | {took:.0f} | {rate:.2f} | {ratio} | {bound / took:.2f} |"
            )
        lines += [
            f"| {row['class']} | {row['models']} | {who} | failed: {why} ||||" for who, why in row["failed"].items()
        ]
    peak = {row["class"]: row["worker_peak_bytes"] >> 20 for row in report}
    return [*lines, f"peak memory of a worker, MiB: {peak}"]


class _Link(Proxy):
    """Sends so many bytes in a second to all its clients together."""

    def __init__(self, upstream: str, rate: float) -> None:
        super().__init__(upstream)
        self._rate, self._free = rate, 0.0

    def fault(self, method: str, path: str) -> None:
        """None; and nothing is kept of what was asked."""

    def passing(self, count: int) -> None:
        with self.lock:
            now = time.monotonic()
            self._free = max(self._free, now) + count / self._rate
            wait = self._free - now
        time.sleep(wait)


class _Watch:
    """The largest resident memory of any process of a name, in bytes, sampled twice a second."""

    def __init__(self, name: str) -> None:
        self.name, self.peak = name.encode(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if path.read_bytes().startswith(self.name):
                        pages = int((path.parent / "statm").read_text().split()[1])
                        self.peak = max(self.peak, pages * os.sysconf("SC_PAGE_SIZE"))
                except OSError:
                    continue  # it has just ended


if __name__ == "__main__":
    app()
