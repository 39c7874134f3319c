"""Larger fleets than one machine has: the dispatcher simulated model by model, on costs that were measured.

`curves.py` and `speed.py` give the costs. What is simulated: workers that start together, one driver that hands
out one model at a time and takes a while for each record, stages of a model (its file is fetched while the one
before is verified, if it is small), what each worker does once for each class (imports, a key, a skeleton), workers
replaced after so many models, a store with a limited rate. The same simulation is held against what was measured
on one machine, and the command fails where it is off by more than a quarter.

Assumptions of what was not measured are options: what a GPU is worth in cores, what a node's network and the store
give, and prices. A run is divided among several catalogs, each with a driver of its own, where one driver would
be the limit.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from fwm_audit.check import _AHEAD_BYTES
from fwm_audit.dispatcher import MODELS_PER_ACTOR
from fwm_audit.storage import _RANGE_BYTES

_EXAMPLES = """\b
Examples:
  python -m tests.benchmarks.fleets
  python -m tests.benchmarks.fleets --curves curves-out/curves.json --speed speed-out/speed.json --gpu-cores 40
"""
RESULTS = Path(__file__).parent / "results"
#: Records of one part, and how far a simulation may be off what was measured.
SHARD, OFF = 64, 0.25
#: Rows of one driver, from its memory: see the curve.
MOST_ROWS = 1_000_000

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Work:
    """Models of one class: bytes of each, seconds of its fetch on a store that is not busy, and of the rest.

    `once_s` are the seconds that a worker takes before its first model of the class.
    """

    count: int
    bytes: int
    fetch_s: float
    compute_s: float
    once_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Workers, and what they have in common.

    Attributes:
        start_s: Until the workers are ready.
        driver_s: Of the driver for one record.
        call_s: Between a worker's answer and its next model, beside that.
        worker_start_s: Of a worker that takes the place of one that has had its share of models.
        store_bytes_s: Rate at which the store gives to all workers together.
        end_s: After the last record.
    """

    workers: int
    start_s: float
    driver_s: float
    call_s: float
    worker_start_s: float
    store_bytes_s: float
    end_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Seconds of a run, and the shares of them in which the driver, the workers and the store were busy."""

    seconds: float
    driver: float
    workers: float
    store: float


def simulate(works: Sequence[Work], cluster: Cluster) -> Outcome:
    """A run over all works, the largest first, as the dispatcher does it."""
    free = [(cluster.start_s, 0, -1) for _ in range(cluster.workers)]
    driver = link = cluster.start_s
    busy = end = 0.0
    for number, work in enumerate(sorted(works, key=lambda work: -work.bytes)):
        ahead = work.bytes <= _AHEAD_BYTES
        on_link = work.bytes / cluster.store_bytes_s
        for _ in range(work.count):
            ready, served, known = free[0]
            driver = max(driver, ready) + cluster.driver_s
            link = max(link, driver) + on_link  # the store is a queue of its own
            # What is fetched ahead was asked for while the model before was in work.
            fetch = max(driver + work.fetch_s, link) - driver
            took = cluster.call_s + (max(fetch, work.compute_s) if ahead else fetch + work.compute_s)
            took += work.once_s if known != number else 0.0
            busy, end = busy + took, max(end, driver + took)
            if served + 1 == MODELS_PER_ACTOR:
                heapq.heapreplace(free, (driver + took + cluster.worker_start_s, 0, -1))
            else:
                heapq.heapreplace(free, (driver + took, served + 1, number))
    count, total = sum(work.count for work in works), sum(work.count * work.bytes for work in works)
    spent = max(end - cluster.start_s, 1e-9)
    return Outcome(
        end + cluster.end_s,
        cluster.driver_s * count / spent,
        busy / spent / cluster.workers,
        total / cluster.store_bytes_s / spent,
    )


def requests(models: int, size: int, *, workers: int, keys: int) -> dict[str, int]:
    """What the store is asked for, by the prices' classes: `get` (with HEAD) and `put` (with LIST)."""
    parts = math.ceil(models / SHARD)
    met = min(workers, max(1, models // max(1, keys))) * keys  # workers that meet a key, over all keys
    return {
        "get": models * max(1, math.ceil(size / _RANGE_BYTES)) + keys + 2 * met + parts + _GETS_OF_A_RUN,
        "put": parts + _PUTS_OF_A_RUN,
    }


#: run.json, manifest and ledger, read or found missing; and written, with the lists of parts and of the ledger.
_GETS_OF_A_RUN, _PUTS_OF_A_RUN = 5, 7


# -------------------------------------------------------------------------------------- held against measurements


def costs(curves: dict, workers: int) -> Cluster:
    """A cluster like the measured machine, its driver's cost from the fleet of 10,000 models of no work."""
    point = min(curves["rows"], key=lambda point: abs(point["rows"] - 10_000))
    without = min(curves["rows"], key=lambda point: point["rows"])
    one = min(curves["bytes"], key=lambda point: point["bytes"])
    # The file of a small model is fetched by a thread of the same process: its core does both.
    call = max(0.0, one["each"] - max(one["fetch"], one["load"] + one["verify"]) - 1 / point["rate"])
    start = one["first"] - _stages(one)
    # Idle workers import no PyTorch: the rest is Ray's.
    return Cluster(workers, start, 1 / point["rate"], call, max(0.0, start - without["first_s"]), math.inf, _end(one))


def points(curves: dict, speed: Sequence[dict]) -> list[tuple[str, float, float]]:
    """What was measured on one machine: its name, seconds measured, and seconds simulated from other runs' costs."""
    here = costs(curves, curves["cores"])
    return [*_of_rows(curves, here), *_of_sizes(curves, here), *_of_workers(curves, here), *_of_classes(speed, here)]


def _of_rows(curves: dict, here: Cluster) -> Iterator[tuple[str, float, float]]:
    by_rows = sorted(curves["rows"], key=lambda point: point["rows"])
    first = by_rows[0]
    a_row = (by_rows[-1]["first_s"] - first["first_s"]) / (by_rows[-1]["rows"] - first["rows"])
    for point in by_rows:
        start = first["first_s"] + a_row * point["rows"]
        outcome = simulate([Work(point["rows"], 0, 0.0, 0.0)], replace(here, call_s=0.0, start_s=start, end_s=0.0))
        yield (
            f"{point['rows']} rows of no work",
            point["first_s"] + (point["rows"] - 1) / point["rate"],
            outcome.seconds,
        )


def _of_sizes(curves: dict, here: Cluster) -> Iterator[tuple[str, float, float]]:
    for point in curves["bytes"]:
        work = Work(point["models"], point["bytes"], point["fetch"], point["load"] + point["verify"])
        name = f"{point['models']} of {point['bytes'] / 1e6:.0f} MB, 1 worker"
        yield name, point["run"], simulate([work], replace(here, workers=1)).seconds


def _of_workers(curves: dict, here: Cluster) -> Iterator[tuple[str, float, float]]:
    """From the costs of one worker: more of them than cores take turns, at their start, too."""
    alone = curves["workers"][0]
    for point in curves["workers"]:
        share = max(1.0, point["workers"] / curves["cores"])
        work = Work(alone["models"], 18_000_000, alone["fetch"] * share, (alone["load"] + alone["verify"]) * share)
        start = (alone["first"] - _stages(alone)) * share
        cluster = replace(here, workers=point["workers"], start_s=start, end_s=_end(alone))
        name = f"{point['models']} EfficientNet-Lite0, {point['workers']} workers"
        yield name, point["run"], simulate([work], cluster).seconds


def _of_classes(speed: Sequence[dict], here: Cluster) -> Iterator[tuple[str, float, float]]:
    for row in speed:
        works = [_work(one, here) for one in speed if row["class"] in (one["class"], "all") and one["class"] != "all"]
        name = f"{row['models']} of the class {row['class']!r}"
        yield name, row["seconds"]["fwm-audit"], simulate(works, here).seconds


def _work(row: dict, here: Cluster) -> Work:
    stages = row["stages_s"]
    once = max(0.0, stages["first"] - _stages(stages) - here.start_s)
    count = row["models"]
    return Work(count, row["bytes"] // count, stages["fetch"], stages["load"] + stages["verify"], once)


def _stages(point: dict) -> float:
    return point["fetch"] + point["load"] + point["verify"]


def _end(point: dict) -> float:
    return max(0.0, point["run"] - point["first"] - point["each"] * (point["models"] - 1))


# --------------------------------------------------------------------------------------------- and larger ones


@dataclass(frozen=True)
class Prices:
    """US dollars."""

    core_hour: float
    gpu_hour: float
    get: float
    put: float


@app.command(epilog=_EXAMPLES)
def fleets(
    *,
    curves: Annotated[Path, typer.Option(help="What curves.py wrote.")] = RESULTS / "curves.json",
    speed: Annotated[Path, typer.Option(help="What speed.py wrote.")] = RESULTS / "speed.json",
    gpu_cores: Annotated[float, typer.Option(help="Cores that verify as fast as a GPU; never measured.")] = 20.0,
    network: Annotated[float, typer.Option(help="Bytes/s that the store gives to one worker.")] = 300e6,
    store: Annotated[float, typer.Option(help="Bytes/s that the store gives to all.")] = 50e9,
    core_price: Annotated[float, typer.Option(help="Dollars for an hour of a core.")] = 0.04,
    gpu_price: Annotated[float, typer.Option(help="Dollars for an hour of a GPU.")] = 3.0,
    get_price: Annotated[float, typer.Option(help="Dollars for 1000 GET.")] = 0.0004,
    put_price: Annotated[float, typer.Option(help="Dollars for 1000 PUT.")] = 0.005,
) -> None:
    """Print how well the simulation meets what was measured, and what it says of fleets that were not."""
    measured, classes = json.loads(curves.read_text()), json.loads(speed.read_text())
    lines = ["| measured on one machine | s | simulated, s | ratio |", "|---|---|---|---|"]
    wrong = 0
    for name, took, simulated in points(measured, classes):
        wrong += abs(simulated / took - 1) > OFF
        lines.append(f"| {name} | {took:.0f} | {simulated:.0f} | {simulated / took:.2f} |")
    prices = Prices(core_price, gpu_price, get_price / 1000, put_price / 1000)
    lines += [
        "",
        "| models | of | cluster | drivers | time | driver busy | workers busy | requests | $ |",
        "|" + "---|" * 9,
    ]
    names = {"small": "0.8 MB", "medium": "EfficientNet-Lite0", "large": "500 MB"}
    here = costs(measured, 1)
    for row in classes:
        if row["class"] == "all":
            continue
        for models in (1_000, 100_000, 10_000_000):
            for workers, gpus in ((16, False), (1000, False), (8, True), (1000, True)):
                if workers > models or (models > 100_000) != (workers == 1000):
                    continue
                work = _work(row, here)
                compute = work.compute_s / gpu_cores if gpus else work.compute_s
                work = replace(work, count=models, compute_s=compute, fetch_s=work.bytes / network)
                lines.append(
                    _line(names[row["class"]], work, workers, replace(here, store_bytes_s=store), prices, gpus=gpus)
                )
    for line in lines:
        typer.echo(line)
    raise typer.Exit(1 if wrong else 0)


def _line(name: str, work: Work, workers: int, here: Cluster, prices: Prices, *, gpus: bool) -> str:
    """With as many drivers as keep each below four fifths of its time and its memory."""
    drivers = 1
    while True:
        share = replace(work, count=math.ceil(work.count / drivers))
        each = max(1, workers // drivers)
        one = replace(here, workers=each, store_bytes_s=here.store_bytes_s / drivers)
        outcome = simulate([share], one)
        if drivers == workers or (outcome.driver < 0.8 and share.count <= MOST_ROWS):
            break
        # What a driver would have to do in the time that its workers need at least.
        least = share.count * (here.call_s + max(work.compute_s, work.fetch_s, 1e-9)) / each
        needed = max(share.count * here.driver_s / least / 0.8, share.count / MOST_ROWS, 1.01)
        drivers = min(workers, math.ceil(drivers * needed))
    asked = requests(work.count, work.bytes, workers=workers, keys=max(1, work.count // 100))
    hours = outcome.seconds / 3600
    machines = workers * (prices.gpu_hour if gpus else prices.core_hour) + drivers * prices.core_hour
    dollars = hours * machines + asked["get"] * prices.get + asked["put"] * prices.put
    kind = "GPUs" if gpus else "cores"
    total = sum(asked.values())
    return (
        f"| {work.count:,} | {name} | {workers} {kind} | {drivers} | {_time(outcome.seconds)} | {outcome.driver:.0%} | "
        f"{outcome.workers:.0%} | {total:,} | {dollars:,.2f} |"
    )


def _time(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.0f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    app()
