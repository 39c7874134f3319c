"""What an audit costs against the rows of a fleet, the bytes of a checkpoint and the number of workers.

    rows     `dispatch.py`: models that take no time
    bytes    perceptrons of 1 MB to 2 GB in a real S3 server, one worker: seconds of each stage, as its records say
             (that of 2 GB is the one of 1 GB, stored in float64)
    workers  EfficientNet-Lite0 (18 MB) by 1, 2 and 4 workers on this machine
    requests what the store was asked for by one audit, counted by a proxy in front of it

Writes FOLDER/curves.json, which `fleets.py` takes for its model of larger fleets, and FOLDER/curves.svg.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import boto3
import matplotlib as mpl
import pyarrow.parquet as pq
import typer
from matplotlib import pyplot as plt
from ray.cluster_utils import Cluster
from safetensors.torch import save

from fwm_audit import MasterSecret
from fwm_audit.catalog import CatalogEntry, write_catalog
from tests import seaweed
from tests.benchmarks.dispatch import SIZES, measured
from tests.benchmarks.speed import Class, released_fleet, stages_of
from tests.proxy import Proxy

_EXAMPLES = """\b
Examples:
  python -m tests.benchmarks.curves --out curves-out
  python -m tests.benchmarks.curves --out curves-out --megabytes 1 --megabytes 64 --rows 100
"""
MEGABYTES = (1, 4, 16, 64, 256, 1024, 2048)
#: The largest of which a key is made, in MB.
LARGEST_RELEASED = 1024
WORKERS = (1, 2, 4)
PAIRS = 4

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=_EXAMPLES)
def curves(
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="For keys, objects, results and the plot.")],
    megabytes: Annotated[list[int] | None, typer.Option(min=1, help="Sizes; repeatable. [default: 1 to 2048]")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=2, help="Fleets; repeatable. [default: 100 to 100000]")] = None,
) -> None:
    """Measure the three curves and the requests; takes some ten minutes."""
    out.mkdir(parents=True, exist_ok=True)
    out = out.absolute()
    if not (out / "master.key").exists():
        MasterSecret.generate_file(out / "master.key")
    os.environ["FWM_MASTER_KEY_FILE"] = str(out / "master.key")
    (out / "s3").mkdir(exist_ok=True)
    with seaweed.serve(out / "s3") as endpoint:
        os.environ |= seaweed.environment(endpoint)
        report = {
            "cores": os.cpu_count(),
            "rows": [{"rows": size, **measured(size)} for size in rows or SIZES],
            "bytes": [_of_size(size, out) for size in megabytes or MEGABYTES],
            "workers": _of_workers(out),
            "requests": _requests(out, endpoint),
        }
    (out / "curves.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, out / "curves.svg")
    typer.echo(json.dumps(report))


def _of_size(megabytes: int, out: Path) -> dict[str, float]:
    """Median seconds of each stage of a checkpoint, and those of a whole audit by one worker for each of them."""
    stored = min(megabytes, LARGEST_RELEASED)
    hidden = round((397**2 + stored * 250_000) ** 0.5 - 397)  # 794 h + h^2 weights of 4 bytes
    kind = Class(f"wide-{stored}", f"factory:tests.nets:wide?hidden={hidden}&layers=2", 16 if stored < 64 else 3)
    entries, released = released_fleet(kind, out, PAIRS)
    if megabytes > stored:
        # Making a key takes twelve times the bytes of its model: the same weights in float64 are as large a file.
        data = save({name: tensor.double() for name, tensor in released["weights"].items()})
        entries = [replace(entry, uri=f"{entry.uri}.double", size_bytes=len(data), sha256=None) for entry in entries]
        for entry in entries:
            bucket, _, key = entry.uri.removeprefix("s3://").partition("/")
            boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=data)
    return {"bytes": entries[0].size_bytes, **_audit(entries, out, actors=1)}


def _of_workers(out: Path) -> list[dict[str, float]]:
    entries = released_fleet(Class("lite0", "timm:tf_efficientnet_lite0", 24), out, PAIRS)[0]
    seen = []
    for actors in WORKERS:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": max(WORKERS)})
        os.environ["RAY_ADDRESS"] = cluster.address
        try:
            measured = _audit(entries, out, actors=actors)
        finally:
            del os.environ["RAY_ADDRESS"]
            cluster.shutdown()
        seen.append({"workers": actors, **measured})
    return seen


class _Counting(Proxy):
    """Forwards everything and counts it."""

    def fault(self, method: str, path: str) -> None:
        folder, _, key = path.removeprefix("/").partition("/")[2].partition("/")
        with self.lock:  # of the bucket itself, only lists are asked for
            self.seen.append(f"{method} {folder}" if key else "LIST")


def _requests(out: Path, endpoint: str) -> dict[str, object]:
    """By method and first folder, of an audit whose output is in the store, too."""
    kind = Class("small", "factory:tests.nets:wide", 200)
    entries = released_fleet(kind, out, PAIRS)[0]
    with _Counting(endpoint) as counting:
        os.environ["AWS_ENDPOINT_URL"] = counting.endpoint
        name = f"s3://{seaweed.BUCKET}/audits-{time.time_ns()}"
        _audit(entries, out, actors=2, results=name)
        os.environ["AWS_ENDPOINT_URL"] = endpoint
    counted = Counter(line.replace(name.rpartition("/")[2], "out") for line in counting.seen)
    return {"models": len(entries), "workers": 2, "keys": 1, "counted": dict(sorted(counted.items()))}


def _audit(entries: Sequence[CatalogEntry], out: Path, *, actors: int, results: str | None = None) -> dict[str, float]:
    """Seconds of a `jobs.audit` and, where its records are local, of its stages."""
    catalog = out / "catalog.parquet"
    catalog.write_bytes(write_catalog(entries, catalog.name))
    local = out / f"results-{time.time_ns()}"
    command = [
        *(sys.executable, "-m", "jobs.audit", "--catalog", str(catalog), "--keys", str(out / "keys")),
        *("--out", results or str(local), "--allow-factory", "tests", "--actors", str(actors)),
    ]
    began = datetime.now(UTC)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    seconds = (datetime.now(UTC) - began).total_seconds()
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["complete"], said
    assert not said["error"], said
    seen = {} if results else stages_of(pq.read_table(local / "audits").to_pylist(), began)
    return {"models": len(entries), "run": seconds, **seen}


def plot(report: dict, path: Path) -> None:
    """Three panels, logarithmic where the range asks for it."""
    mpl.rcParams["svg.hashsalt"] = "curves"  # the same figure from the same numbers
    figure, (rows, sizes, workers) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rows.loglog(
        [p["rows"] for p in report["rows"]], [p["first_s"] + p["rows"] / p["rate"] for p in report["rows"]], "o-"
    )
    rows.set(xlabel="rows of the fleet", ylabel="seconds", title="models that take no time")
    for name in ("fetch", "load", "verify", "each"):
        values = [p[name] for p in report["bytes"]]
        label = "from one model to the next" if name == "each" else name
        sizes.loglog([p["bytes"] / 1e6 for p in report["bytes"]], values, "o-", label=label)
    sizes.set(xlabel="checkpoint, MB", ylabel="seconds", title="perceptrons, one worker")
    sizes.legend()
    at = [p["workers"] for p in report["workers"]]
    workers.plot(at, [1 / p["each"] for p in report["workers"]], "o-", label="from the first record on")
    workers.plot(at, [p["models"] / p["run"] for p in report["workers"]], "o-", label="with start and end")
    workers.set(
        xlabel=f"workers ({report['cores']} cores)", ylabel="models/s", title="EfficientNet-Lite0", xticks=at,
        ylim=(0, None),
    )  # fmt: skip
    workers.legend()
    for axes in (rows, sizes, workers):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    app()
