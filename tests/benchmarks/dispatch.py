"""What the driver of an audit costs by itself: fleets of many rows whose models take no time.

Each fleet is audited by a process of its own, through a local Ray with one worker for each CPU, real parts and a
real manifest: rows/s from the first record to the last, seconds before that, and the driver's largest memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import ray
import typer

from fwm_audit import MasterSecret, fleet
from fwm_audit.catalog import CatalogEntry, write_catalog
from fwm_audit.fleet import AuditWorker
from fwm_audit.plan import AuditJob, plan_audit
from fwm_audit.records import AuditRecord, make_record
from fwm_audit.verdict import Displacement, Verdict

_EXAMPLES = """\b
Examples:
  python -m tests.benchmarks.dispatch
  python -m tests.benchmarks.dispatch --rows 1000 --rows 10000
"""
SIZES = (100, 1_000, 10_000, 100_000)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Idle(AuditWorker):
    """Finds every model intact, at once."""

    def start(self) -> None:
        """Nothing to load."""

    def audit(self, entry: CatalogEntry, *, shard: int, attempt: int, **_: object) -> AuditRecord:
        """A record without an audit."""
        facts = {"verdict": Verdict.INTACT, "displacement": Displacement.NONE, "triggers": 32, "matches": 32}
        return make_record(self._settings, entry, shard=shard, attempt=attempt, worker="idle", **facts)


@app.command(epilog=_EXAMPLES)
def dispatch(
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows of a fleet; repeatable. [default: 100 to 100000]")
    ] = None,
    *,
    one: Annotated[bool, typer.Option("--one", hidden=True)] = False,
) -> None:
    """Print rows/s and the driver's memory for fleets of several sizes."""
    if one:
        assert rows is not None
        typer.echo(json.dumps(_measure(rows[0])))
        return
    typer.echo("| rows | s before the first record | rows/s from then on | driver, MiB |\n|---|---|---|---|")
    for size in rows or SIZES:
        seen = measured(size)
        typer.echo(f"| {size} | {seen['first_s']:.1f} | {seen['rate']:.0f} | {seen['mib']} |")


def measured(rows: int) -> dict[str, float]:
    """Of a fleet of so many rows: seconds before the first record, records/s from then on, MiB of the driver."""
    command = [sys.executable, "-m", "tests.benchmarks.dispatch", "--one", "--rows", str(rows)]
    seen: dict[str, float] = json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1]
    )
    return seen


def _measure(rows: int) -> dict[str, float]:
    began = time.monotonic()
    times: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = (
            CatalogEntry(row, f"model-{row}", f"/models/{row:06}.safetensors", "timm:any", f"{row:016x}")
            for row in range(rows)
        )
        (folder / "catalog.parquet").write_bytes(write_catalog(entries, "catalog.parquet"))
        (folder / "keys").mkdir()
        MasterSecret.generate_file(folder / "master.key")
        ray.init("local", include_dashboard=False, log_to_driver=False)
        job = AuditJob(
            catalog=str(folder / "catalog.parquet"),
            keys=str(folder / "keys"),
            out=str(folder / "out"),
            run_id="run",
            master_key_file=str(folder / "master.key"),
        )
        summary = fleet.run_audit(plan_audit(job), progress=lambda *_: times.append(time.monotonic()), worker=Idle)
        ray.shutdown()
    assert summary.verdicts == {**summary.verdicts, Verdict.INTACT: rows}
    # Not ru_maxrss, which begins with what the parent held at the fork.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    mib = int(peak.split()[1]) >> 10
    return {"first_s": times[0] - began, "rate": (rows - 1) / (times[-1] - times[0]), "mib": mib}


if __name__ == "__main__":
    app()
