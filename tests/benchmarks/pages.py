"""How long a report of many records takes, and how long its page takes in a browser.

Two fleets with as many records: all of them checkpoints of one run, which is the most that the page's table can
hold, and a hundredth of them audited in a hundred nights. Records are signed and stored in parts of 64, as the driver
does.
"""

from __future__ import annotations

import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from fwm_audit import storage
from fwm_audit.history import read
from fwm_audit.page import render
from fwm_audit.report import Report
from tests.browser import browser, opened
from tests.histories import MASTER, many, night

_EXAMPLES = """\b
Examples:
  python -m tests.benchmarks.pages
  python -m tests.benchmarks.pages --rows 10 --rows 100000
  python -m tests.benchmarks.pages --rows 100000 --keep /tmp/pages
"""
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=_EXAMPLES)
def pages(
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Records; repeatable. [default: 10, 100000]")] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder for the pages and what they were made of.")] = None,
) -> None:
    """Print seconds and megabytes for fleets of several sizes and shapes."""
    typer.echo(
        "| records | nights | read and verified, s | page written, all in all, s | page, MB | table, s | charts, s | "
        "search, s | sort, s |"
    )
    typer.echo("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, browser() as started:
        folder = keep or Path(name)
        for size in rows or [10, 100_000]:
            for nights in dict.fromkeys([1, min(100, size)]):
                seen = measured(started, folder / f"{size}-{nights}", size, nights)
                times = "".join(f" {value:.2f} |" for value in seen.values())
                typer.echo(f"| {size:,} | {nights} |{times}")


def measured(started: Any, folder: Path, records: int, nights: int) -> dict[str, float]:
    """Seconds and megabytes of one report, in a browser that is started; `records` in all, over so many nights."""
    out = str(folder / "out")
    if not folder.exists():
        for number in range(nights):
            # Another seed each night: what is tampered changes, the checkpoints do not.
            looks = list(many(records // nights, fleet=0, seed=number))
            night(out, f"night-{number:03}", datetime.now(UTC) - timedelta(days=nights - 1 - number, hours=1), looks)
    began = time.perf_counter()
    report = Report(read(out, [MASTER.public_key]))
    read_s = time.perf_counter() - began
    page = render(report)
    storage.replace(str(folder / "report.html"), page.encode())
    seen = {"read_s": read_s, "page_s": time.perf_counter() - began, "mb": len(page) / 1e6}
    return seen | in_browser(opened(started, folder / "report.html", []))


def in_browser(tab: Any) -> dict[str, float]:
    """Seconds until the table and the charts are there, and of a search and a sort until they are drawn."""
    marks = tab.evaluate("({ ...document.documentElement.dataset })")

    def until_drawn(action: str) -> float:
        return tab.evaluate(
            f"""new Promise((done) => {{ const began = performance.now(); {action};
            requestAnimationFrame(() => setTimeout(() => done((performance.now() - began) / 1000))); }})"""
        )

    search = until_drawn(
        "const box = document.getElementById('search'); box.value = 'team-7 corrupt'; "
        "box.dispatchEvent(new Event('input'))"
    )
    sort = until_drawn("document.querySelector('th[data-sort=ms] button').click()")
    return {
        "table_s": int(marks["ready"]) / 1000,
        "charts_s": int(marks["charted"]) / 1000,
        "search_s": search,
        "sort_s": sort,
    }


if __name__ == "__main__":
    app()
