"""Audit after audit of one fleet while workers, nodes, drivers, the object store and models misbehave.

A cluster of three node processes audits checkpoints from a real S3 server behind a proxy. Each audit is one
`jobs.audit` with faults drawn from a seed: SIGKILL of a worker, of all workers, of a node or of the driver
(which is started again with the same run id); answers of the store that fail, break off, stall, or an object
that is replaced between two ranges; a model that kills its worker, hangs, or takes all memory, or an object for
which there is no room (checkpoints are read into memory: there is no folder that could be full). In the end every
row of the catalog has to have exactly one record with the verdict that its bytes deserve, and no audit may
outlast its limit.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import boto3
import pyarrow.parquet as pq
import torch
import typer
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster
from safetensors.torch import save

from fwm_audit import MasterSecret, embed
from fwm_audit.architectures import build
from fwm_audit.catalog import CatalogEntry, write_catalog
from fwm_audit.errors import ErrorCode
from fwm_audit.key import key_name
from tests import seaweed
from tests.proxy import Proxy

_EXAMPLES = """\b
Examples:
  python -m tests.benchmarks.chaos_audit --out chaos-out
  python -m tests.benchmarks.chaos_audit --out chaos-out --audits 20 --seed 7
  python -m tests.benchmarks.chaos_audit --out chaos-out --fields 8          # two cores each
"""

PROCESSES = ("worker", "all workers", "node", "driver")
STORE = ("broken", "busy", "cut", "lost", "reset", "stall", "replaced")
MODELS = ("exit", "hang", "eat", "full")
CONVNET = "factory:tests.nets:convnet"
#: More than one range of 16 MiB.
LARGE = "factory:tests.nets:wide?hidden=6000"
#: Seconds for a model, and for an audit with everything that happens to it.
TIMEOUT_S, LIMIT_S = 15, 240
#: For a worker, where an object is to be too large, and the bytes of that.
ROOM_GIB, TOO_LARGE = 0.25, 300_000_000
#: And for one that takes all memory, beside other fields: what Ray's own monitor goes by is all that is held.
EATEN_GIB = 1.0
#: One audit of so many has a file with a payload.
UNSAFE_IN = 4
#: Intact and tampered copies of the small model.
COPIES = 24
#: Faults of the store on one object: a retry has to get through in the end.
MOST = 2

app = typer.Typer(add_completion=False, rich_markup_mode=None)
#: Verdict and, where it is `error`, its code.
Outcome = tuple[str, str | None]


@app.command(epilog=_EXAMPLES)
def chaos_audit(
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for keys, objects and logs.")],
    audits: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the first audit; the next one has the next seed.")] = 0,
    fields: Annotated[int, typer.Option(min=1, help="Stores and clusters beside each other.")] = 1,
    crowded: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Audit under fire; exit code 1 if a record was lost, doubled or wrong, or an audit outlasted its limit."""
    began = time.monotonic()
    if fields > 1:
        reports = _beside_each_other(out, audits, seed, min(fields, audits))
        faults = sum((Counter(report["faults"]) for report in reports), Counter[str]())
        wrong = [text for report in reports for text in report["wrong"]]
        records = sum(report["records"] for report in reports)
        _tell(audits, records, faults, began, wrong)
    seen, wrong = Counter[str](), []
    with battlefield(out, crowded=crowded) as field:
        for number in range(seed, seed + audits):
            told = field.audit(number)
            seen.update(told.faults)
            wrong += [f"audit {number}: {text}" for text in told.wrong]
            after = time.monotonic() - began
            line = f"{after:6.0f} s  audit {number}: {', '.join(told.faults)}: {told.seconds:.0f} s"
            typer.echo("; ".join([line, *told.wrong]), err=True)
    _tell(audits, audits * field.rows, seen, began, wrong)


def _tell(audits: int, records: int, faults: Counter[str], began: float, wrong: list[str]) -> NoReturn:
    took = round(time.monotonic() - began)
    report = {"audits": audits, "records": records, "faults": dict(faults), "seconds": took, "wrong": wrong}
    typer.echo(json.dumps(report))
    raise typer.Exit(1 if wrong else 0)


def _beside_each_other(out: Path, audits: int, seed: int, fields: int) -> list[dict]:
    """The reports of so many processes, each with a share of the audits."""
    out.mkdir(parents=True, exist_ok=True)
    processes = []
    for number in range(fields):
        first, last = (audits * each // fields for each in (number, number + 1))
        command = [
            *(sys.executable, "-m", "tests.benchmarks.chaos_audit", "--out", str(out / f"field-{number}")),
            *("--seed", str(seed + first), "--audits", str(last - first), "--crowded"),
        ]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        time.sleep(2)  # ports that are free now are taken when the next one looks
    said = [process.communicate()[0].splitlines() for process in processes]
    return [
        json.loads(lines[-1]) if lines else {"faults": {}, "records": 0, "wrong": ["a field fell"]} for lines in said
    ]


@dataclass(frozen=True)
class Told:
    """What was done to one audit, what it took, and what was wrong with its outcome."""

    faults: list[str]
    seconds: float
    wrong: list[str]


@contextlib.contextmanager
def battlefield(out: Path, *, crowded: bool = False) -> Iterator[Field]:
    """A store, a proxy, keys, checkpoints and a cluster that sees the store through the proxy only.

    Beside others (`crowded`), a worker is held to its own memory, not to what the machine has left.
    """
    out = out.absolute()
    (out / "s3").mkdir(parents=True)
    before = dict(os.environ)
    try:
        with seaweed.serve(out / "s3") as endpoint, FaultyStore(endpoint) as store:
            os.environ.update(seaweed.environment(endpoint))
            os.environ["AWS_ENDPOINT_URL"] = store.endpoint
            os.environ["FWM_MASTER_KEY_FILE"] = str(out / "master.key")
            if not crowded:
                # A model that takes all memory is to be stopped long before the machine is in need.
                total, available = (_meminfo(name) for name in ("MemTotal", "MemAvailable"))
                share = (total - available + (6 << 30)) / total
                os.environ["RAY_memory_usage_threshold"] = f"{min(0.95, share):.2f}"  # noqa: SIM112 - Ray's spelling
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
            try:
                yield Field(out, store, endpoint, cluster, crowded=crowded)
            finally:
                cluster.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


class FaultyStore(Proxy):
    """Fails some of the requests that it sees, at most `MOST` times for one object and method."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.begin(random.Random(0), None)

    def begin(self, draws: random.Random, kind: str | None) -> None:
        """From now on the faults are of this kind."""
        self.draws, self.kind, self.failed = draws, kind, Counter[tuple[str, str]]()
        self.on_second_range = lambda: None

    def fault(self, method: str, path: str) -> str | None:
        with self.lock:
            self.failed[method, path] += 0
            if self.kind == "replaced":
                if method == "GET" and path.endswith("large.safetensors"):
                    self.failed[method, path] += 1
                    if self.failed[method, path] == 2:
                        self.on_second_range()
                return None
            if self.kind is None or self.failed[method, path] >= MOST or self.draws.random() > 0.2:
                return None
            self.failed[method, path] += 1
            return self.kind


class Field:
    """The fleet, and how to audit it under fire."""

    def __init__(self, out: Path, store: FaultyStore, endpoint: str, cluster: Cluster, *, crowded: bool) -> None:
        self.out, self.store, self.cluster, self.crowded = out, store, cluster, crowded
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        self.direct = boto3.client("s3", endpoint_url=endpoint)
        master = MasterSecret.generate_file(out / "master.key")
        self.entries: list[CatalogEntry] = []
        self.expected: dict[str, set[Outcome]] = {}
        small, large = build(CONVNET, ["tests"]).state_dict(), build(LARGE, ["tests"]).state_dict()
        released, edited = save(small), save(small | {"8.bias": small["8.bias"] + 1e-7 * torch.arange(1.0, 6.0)})
        for number in range(COPIES):
            tampered = number % 3 == 2
            self._add("conv", f"copy-{number}.safetensors", edited if tampered else released, tampered=tampered)
        for name, data, code in (
            ("cut.safetensors", released[:-100], ErrorCode.CHECKPOINT_CORRUPT.value),
            ("unsafe.pt", _pickled(small | {"8.bias": _Payload(out / "canary")}), ErrorCode.CHECKPOINT_UNSAFE.value),
            ("gone.safetensors", None, ErrorCode.OBJECT_MISSING.value),
        ):
            self._add("conv", name, data, error=code)
        order = torch.randperm(len(large["0.bias"]), generator=torch.Generator().manual_seed(0))
        # The same function from other bytes: intact as a whole, and tampered where parts of both are mixed.
        permuted = {"0.weight": large["0.weight"][order], "0.bias": large["0.bias"][order]}
        self.large = save(large)
        self.other = save(large | permuted | {"2.weight": large["2.weight"][:, order].contiguous()})
        self._add("large", "large.safetensors", self.large, arch=LARGE)
        self._put("fleet/full.safetensors", released + bytes(TOO_LARGE))
        self._put("fleet/safe.pt", _pickled(small))
        self._keys(master)
        self.rows = len(self.entries) + 1  # and a model that misbehaves, or one that does not

    def _add(self, model: str, name: str, data: bytes | None, *, arch=CONVNET, tampered=False, error=None) -> None:
        uri = f"s3://{seaweed.BUCKET}/fleet/{name}"
        if data is not None:
            self._put(f"fleet/{name}", data)
        self.entries.append(CatalogEntry(len(self.entries), model, uri, arch, ""))
        self.expected[uri] = {("error", error) if error else ("tampered" if tampered else "intact", None)}

    def _put(self, key: str, data: bytes) -> None:
        self.direct.put_object(Bucket=seaweed.BUCKET, Key=key, Body=data)

    def _keys(self, master: MasterSecret) -> None:
        for model, arch in (("conv", CONVNET), ("large", LARGE)):
            released = build(arch, ["tests"])
            secret = master.secret_key(model, "", "")
            key = embed(released, secret=secret, model_id=model, input_shape=released.input_shape, pairs=4, arch=arch)
            self._put(f"keys/{key_name(model, secret.key_id)}", key.seal(master))
            self.entries = [
                CatalogEntry(entry.row, model, entry.uri, arch, secret.key_id) if entry.model_id == model else entry
                for entry in self.entries
            ]

    def audit(self, seed: int) -> Told:
        """One audit with the faults of this seed."""
        draws = random.Random(seed)
        process, store, model = draws.choice([*PROCESSES, None]), draws.choice([*STORE, None]), None
        if draws.random() < 0.3:  # each takes its time
            model = draws.choice(MODELS)
        self._put("fleet/large.safetensors", self.large)
        self.store.begin(random.Random(seed), store)
        self.store.on_second_range = lambda: self._put("fleet/large.safetensors", self.other)
        catalog, expected = self._catalog(seed, store, model)
        began, wrong, struck = time.monotonic(), [], process
        try:
            room = {"full": ROOM_GIB, "eat": EATEN_GIB if self.crowded else None}.get(model or "")
            code, struck = self._run(seed, catalog, process, draws, room)
        except subprocess.TimeoutExpired:
            wrong.append(f"not finished after {LIMIT_S} s")
        else:
            self.store.begin(draws, None)
            wrong += self._differences(seed, expected)
            if code != 1:
                wrong.append(f"exit code {code}, and some models are tampered")
        if (self.out / "canary").exists():
            wrong.append("a payload ran")
        faults = [name for name in (struck, store, model) if name] or ["none"]
        return Told(faults, time.monotonic() - began, wrong)

    def _catalog(self, seed: int, store: str | None, model: str | None) -> tuple[str, dict[str, set[Outcome]]]:
        """A catalog in an order of its own, and what its rows are to come to."""
        row, expected = self.entries[0], dict(self.expected)
        own = CatalogEntry(0, row.model_id, f"s3://{seaweed.BUCKET}/fleet/own.safetensors", CONVNET, row.key_id)
        expected[own.uri] = {("intact", None)}
        self._put("fleet/own.safetensors", save(build(CONVNET, ["tests"]).state_dict()))
        if model == "full":
            own = CatalogEntry(0, own.model_id, f"s3://{seaweed.BUCKET}/fleet/full.safetensors", CONVNET, own.key_id)
            expected[own.uri] = {("error", ErrorCode.OUT_OF_MEMORY.value)}
            del expected[f"s3://{seaweed.BUCKET}/fleet/own.safetensors"]
        elif model is not None:
            own = CatalogEntry(0, own.model_id, own.uri, f"factory:tests.nets:Misbehaving?act={model}", own.key_id)
            codes = {"exit": [ErrorCode.WORKER_DIED], "hang": [ErrorCode.TIMEOUT]}
            either = [ErrorCode.OUT_OF_MEMORY, ErrorCode.WORKER_DIED]
            expected[own.uri] = {("error", code.value) for code in codes.get(model, either)}
        if store == "replaced":
            # Who begins to read after the replacement, as another worker let go of it, reads another intact file.
            uri = f"s3://{seaweed.BUCKET}/fleet/large.safetensors"
            expected[uri] = {("error", ErrorCode.OBJECT_CHANGED.value), ("intact", None)}
        entries = [*self.entries, own]
        if seed % UNSAFE_IN:  # each ends a worker, which would be most of what an audit takes
            unsafe, safe = (f"s3://{seaweed.BUCKET}/fleet/{name}.pt" for name in ("unsafe", "safe"))
            entries = [replace(entry, uri=safe) if entry.uri == unsafe else entry for entry in entries]
            expected[safe] = {("intact", None)}
            del expected[unsafe]
        random.Random(seed).shuffle(entries)
        catalog = self.out / f"catalog-{seed}.parquet"
        catalog.write_bytes(write_catalog(entries, catalog.name))
        return str(catalog), expected

    def _run(
        self, seed: int, catalog: str, process: str | None, draws: random.Random, room: float | None
    ) -> tuple[int, str | None]:
        """Exit code of the driver, the last one where it was killed, and what was killed before the end."""
        command = [
            *(sys.executable, "-m", "jobs.audit", "--catalog", catalog, "--keys", f"s3://{seaweed.BUCKET}/keys"),
            *("--out", f"s3://{seaweed.BUCKET}/out", "--run-id", f"audit-{seed}", "--actors", "2"),
            *("--timeout", str(TIMEOUT_S), "--allow-factory", "tests"),
            *(("--memory", str(room)) if room else ()),
        ]
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address}
        deadline = time.monotonic() + LIMIT_S
        with (self.out / f"driver-{seed}.log").open("ab") as log:
            driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                if process is not None:
                    _until(lambda: bool(self._workers()) or driver.poll() is not None, deadline)
                    time.sleep(draws.uniform(0, 4))
                    if driver.poll() is not None:
                        process = None
                    elif process == "driver":
                        driver.kill()
                        driver.wait()
                        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                    else:
                        process = self._kill(process, draws)
                return driver.wait(max(0.0, deadline - time.monotonic())), process
            finally:
                driver.kill()
                driver.wait()

    def _kill(self, process: str, draws: random.Random) -> str | None:
        if process == "node":
            node = self.nodes.pop(draws.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(num_cpus=1))
            return process
        workers = self._workers()[: None if process == "all workers" else 1]
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return process if workers else None

    def _workers(self) -> list[int]:
        """Processes that audit in this cluster; another one may run beside it."""
        raylets = {node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid for node in self.nodes}
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in raylets and path.read_bytes().startswith(b"ray::AuditWorker"):
                    found.append(int(path.parent.name))
        return sorted(found)

    def _differences(self, seed: int, expected: dict[str, set[Outcome]]) -> list[str]:
        """What the stored records say otherwise than expected."""
        pages = self.direct.get_paginator("list_objects_v2").paginate(Bucket=seaweed.BUCKET, Prefix="out/audits/")
        names = [item["Key"] for page in pages for item in page.get("Contents", ())]
        records = []
        for name in names:
            if name.rpartition("/")[2].startswith(f"audit-{seed}-"):
                data = self.direct.get_object(Bucket=seaweed.BUCKET, Key=name)["Body"].read()
                records += pq.read_table(io.BytesIO(data)).to_pylist()
        count = Counter(record["uri"] for record in records)
        wrong = [f"{uri} has {count[uri]} records" for uri in expected if count[uri] != 1]
        wrong += [f"{uri} is of no row" for uri in count.keys() - expected.keys()]
        for record in records:
            outcome = record["verdict"], record["error_code"]
            if outcome not in expected.get(record["uri"], {outcome}):
                wrong.append(f"{record['uri']} came to {outcome}: {record['error_message']}")
        return wrong


class _Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def _pickled(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, pickle_module=pickle)
    return buffer.getvalue()


def _meminfo(name: str) -> int:
    """A value of /proc/meminfo in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _until(happened, deadline: float) -> None:
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.2)


if __name__ == "__main__":
    app()
