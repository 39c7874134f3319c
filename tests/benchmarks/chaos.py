"""Twelve models are watermarked while workers, nodes and drivers are killed, and nothing may be lost.

A cluster of three node processes embeds models of four architectures, two workers each. At random moments
a worker, a node or the driver gets SIGKILL; a killed node is replaced, a killed driver is started again
with the same command. All the while every key in sight is opened: none may be half-written. In the end each
model has to have exactly one key, its checkpoint has to verify, and no secret may stand in any log, answer
of Ray's API, state or checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from ray.cluster_utils import Cluster

from fwm_audit.errors import FwmError
from fwm_audit.triggers import TriggerSet
from tests.benchmarks import networks
from tests.company import CONVNET, Company

ARCHITECTURES = {
    "convnet": CONVNET,
    "perceptron": "factory:tests.nets:perceptron",
    "transformer": "factory:tests.nets:transformer",
    "resnet20": "factory:jobs.digits:resnet20",
}
EACH = 3
KINDS = ("worker", "node", "driver")
_EXAMPLES = """\b
Example:
  python -m tests.benchmarks.chaos --out chaos-out --pairs 16 --kills 10
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=_EXAMPLES)
def chaos(
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for models, keys, state and the report.")],
    kills: Annotated[int, typer.Option(min=1, help="How many, of the three kinds in turn.")] = 30,
    pairs: Annotated[int, typer.Option(min=4, help="Mirrored pairs of each model.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Embed twelve models under fire; exit code 1 if anything was lost."""
    out.mkdir(parents=True)
    moments = random.Random(seed)
    torch.set_num_threads(1)  # the cluster needs the others
    # With weights that nobody trained, a ResNet's classes are found with many steps only.
    trained = {"resnet20": networks.load("resnet20-digits", out).model.state_dict()}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    company = Company(out.absolute(), cluster)
    rows = [
        row
        for name, arch in ARCHITECTURES.items()
        for row in company.release([f"{name}-{number}" for number in range(EACH)], arch, trained.get(name))
    ]
    options = ("--workers", "2", "--pairs", str(pairs), "--wait", "120")
    watch = _Watch(company, [row["model_id"] for row in rows])
    done: list[str] = []
    began = time.monotonic()
    driver = _start(company, rows, options, out)
    try:
        while len(done) < kills:
            # Spread over all models but the last two, which are to be there for the last kills, and within the work on
            # one of them at random.
            _until(driver, lambda: watch.count() * kills >= len(done) * (len(rows) - 2))
            _until(driver, lambda: bool(company.train_workers()))
            time.sleep(moments.uniform(0.0, 20.0))
            if driver.poll() is not None:
                break
            kind = KINDS[len(done) % len(KINDS)]
            company.keep_runs(f"runs-{len(done)}")
            if kind == "driver":
                driver.kill()
                driver.wait()
                driver = _start(company, rows, options, out)
            elif kind == "node":
                cluster.remove_node(nodes.pop(moments.randrange(len(nodes))), allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=1))
            else:
                try:
                    os.kill(moments.choice(sorted(company.train_workers())), signal.SIGKILL)
                except (ProcessLookupError, IndexError):
                    continue  # it had just ended
            done.append(kind)
            after = time.monotonic() - began
            typer.echo(f"{after:6.0f} s  {kind} killed; {watch.count()} of {len(rows)} keys", err=True)
        code = driver.wait()
    finally:
        driver.kill()
        watch.stop()
    names = [row["model_id"] for row in rows]
    report = {
        "models": len(rows),
        "kills": {kind: done.count(kind) for kind in KINDS},
        "seconds": round(time.monotonic() - began),
        "exit_code": code,
        "keys": {name: len(company.keys(name)) for name in names},
        "verified": sum(company.verifies(row) for row in rows if len(company.keys(row["model_id"])) == 1),
        "reads": watch.reads,
        "unreadable": watch.unreadable,
        "leaks": company.leaks(names),
    }
    cluster.shutdown()
    typer.echo(json.dumps(report))
    sound = (
        code == 0
        and len(done) == kills
        and set(report["keys"].values()) == {1}
        and report["verified"] == len(rows)
        and not report["unreadable"]
        and not report["leaks"]
    )
    raise typer.Exit(0 if sound else 1)


def _start(company: Company, rows, options, out: Path) -> subprocess.Popen[bytes]:
    with (out / f"driver-{time.monotonic_ns()}.log").open("wb") as log:
        return subprocess.Popen(
            company.command(rows, *options), env=company.environment, stdout=log, stderr=subprocess.STDOUT
        )


def _until(driver: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    """Until something has happened or the driver has ended."""
    deadline = time.monotonic() + 600
    while driver.poll() is None and not happened():
        if time.monotonic() > deadline:
            raise TimeoutError("nothing more was done in ten minutes")
        time.sleep(0.2)


class _Watch:
    """Opens every key in sight, again and again, as an audit might at any moment."""

    def __init__(self, company: Company, names: list[str]) -> None:
        self.company, self.names = company, names
        self.reads = 0
        self.unreadable: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def count(self) -> int:
        return sum(len(self.company.keys(name)) for name in self.names)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        master = self.company.master
        while not self._ended.wait(0.5):
            for path in (path for name in self.names for path in self.company.keys(name)):
                self.reads += 1
                try:
                    TriggerSet.load(path, master=master)
                except FwmError as error:
                    self.unreadable.append(f"{path.name}: {error}")


if __name__ == "__main__":
    app()
