"""What else people would run over a fleet, for `speed.py`: the same checks, without this project's driver.

    sequential   the script that an engineer writes first: one model after the other, torch's own threads
    ray-data     the canonical pipeline: `map_batches` over the rows, one stateful worker per CPU
    hash         bytes only: every object downloaded, its digest taken by the OpenSSF's model-signing

The first two use this project's keys and float64 arithmetic and give the same verdicts. Run as
`python -m tests.benchmarks.peers NAME CATALOG KEYS OUT`, with the master secret in FWM_MASTER_KEY_FILE.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


class Checker:
    """Architectures and keys are kept, models are fetched whole and loaded by `load_state_dict`."""

    def __init__(self, keys: str) -> None:
        from fwm_audit import MasterSecret

        self.keys, self.master = keys, MasterSecret.from_file(None)
        self.models: dict[str, object] = {}
        self.triggers: dict[str, object] = {}

    def __call__(self, row: dict[str, str]) -> dict[str, object]:
        import torch
        from safetensors.torch import load

        from fwm_audit import TriggerSet
        from fwm_audit.architectures import build

        model = self.models.get(row["arch"])
        if model is None:
            model = self.models[row["arch"]] = build(row["arch"], ["tests"]).eval().double()
        triggers = self.triggers.get(row["key_id"])
        if triggers is None:
            uri = f"{self.keys}/{row['model_id']}/{row['key_id']}.fwmkey"
            with fsspec.open(uri) as file:
                opened = TriggerSet.unseal(file.read(), self.master)
            triggers = self.triggers[row["key_id"]] = opened.materialise(opened.rungs[0])
        with fsspec.open(row["uri"]) as file:
            data = file.read()
        model.load_state_dict(load(data))
        inputs, labels = triggers
        with torch.inference_mode():
            seen = torch.cat([model(part).argmax(1) for part in inputs.split(8)])
        matches = int((seen == labels).sum())
        return {**row, "matches": matches, "verdict": "intact" if matches == len(labels) else "tampered"}


def sequential(rows: list[dict[str, str]], keys: str, out: Path) -> Counter[str]:
    """In one process."""
    check = Checker(keys)
    records = [check(row) for row in rows]
    pq.write_table(pa.Table.from_pylist(records), out / "sequential.parquet")
    return Counter(record["verdict"] for record in records)


class Batches:
    """The stateful class of a Ray Data pipeline."""

    def __init__(self, keys: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.check = Checker(keys)

    def __call__(self, batch: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame([self.check(row) for row in batch.to_dict("records")])


def ray_data(rows: list[dict[str, str]], keys: str, out: Path) -> Counter[str]:
    """With Ray Data's defaults but for the batches, which are as small as models are large."""
    import ray

    ray.init("local", log_to_driver=False, include_dashboard=False)
    cpus = int(ray.cluster_resources()["CPU"])
    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = max(2 * cpus, min(len(rows), 200))
    data = ray.data.from_pandas(pd.DataFrame(rows)).repartition(blocks).materialize()
    checked = data.map_batches(
        Batches, fn_constructor_args=(keys,), batch_format="pandas", batch_size=4, concurrency=cpus, num_cpus=0.9
    )
    # With a whole CPU for each worker, nothing would be left for the tasks that write, and all would wait.
    checked.write_parquet(str(out / "ray-data"), ray_remote_args={"num_cpus": 0.1})
    verdicts = pq.read_table(out / "ray-data", columns=["verdict"])["verdict"].to_pylist()
    ray.shutdown()
    return Counter(verdicts)


def hash_only(rows: list[dict[str, str]], keys: str, out: Path) -> Counter[str]:
    """model-signing hashes files on disk: each is fetched there, hashed, and its digest compared."""
    from model_signing import hashing

    config = hashing.Config()
    counted: Counter[str] = Counter()
    for row in rows:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            path = Path(folder) / "model.safetensors"
            with fsspec.open(row["uri"]) as source:
                path.write_bytes(source.read())
            (described,) = config.hash(Path(folder)).resource_descriptors()
            same = described.digest.digest_hex == row["sha256"]
        counted["intact" if same else "tampered"] += 1
    return counted


PEERS = {"sequential": sequential, "ray-data": ray_data, "hash": hash_only}


def main() -> None:
    """Print the seconds from here on, and the verdicts, as JSON."""
    name, catalog, keys, out = sys.argv[1:]
    began = time.monotonic()
    with fsspec.open(catalog) as file:
        rows = pq.read_table(io.BytesIO(file.read())).to_pylist()
    rows = [{key: value for key, value in row.items() if isinstance(value, str)} for row in rows]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = PEERS[name](rows, keys, folder)
    print(json.dumps({"seconds": time.monotonic() - began, "verdicts": dict(verdicts)}))


if __name__ == "__main__":
    main()
