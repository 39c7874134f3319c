"""The evidence tables: methods x edits, methods x benign changes, for every network.

Every finished try is appended to FOLDER/NETWORK/results.jsonl, so an interrupted run loses one try at
most and the same command goes on where it stopped. Tries come in rounds over all edits and benign
changes: after the first round every row of the tables has its first try.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from torch import Tensor, nn

from fwm_audit import TriggerSet, __version__
from tests.benchmarks import baselines, networks
from tests.benchmarks.baselines import CPU, Methods
from tests.benchmarks.edits import (
    BENIGN,
    EDITS,
    POPULATIONS,
    Benign,
    Edit,
    applicable,
    benign_model,
    changed_elements,
    edited_states,
)
from tests.benchmarks.networks import METHODS, NETWORKS, Network

_EXAMPLES = """\b
Examples:
  python -m tests.benchmarks.evidence --out evidence --slice
  python -m tests.benchmarks.evidence --out evidence --network resnet20-digits --tries 2
  python -m tests.benchmarks.evidence --out evidence --minutes 120

\b
The same command again resumes. Runs of different networks may share the folder at the same time.
FOLDER/evidence.md has the tables, FOLDER/evidence.parquet one row for each network, method, edit and seed. A copy of
tests/benchmarks/results is such a FOLDER: other methods and networks may be added to it.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)
log = logging.getLogger("evidence")

#: Images on which an edit that nobody noticed is compared.
_PLAIN = 32

SCHEMA = pa.schema(
    [
        ("network", pa.string()),
        ("kind", pa.string()),  # edit or benign
        ("family", pa.string()),
        ("task", pa.string()),
        ("edit", pa.string()),
        ("seed", pa.int32()),
        ("required", pa.bool_()),
        ("method", pa.string()),
        ("detected", pa.bool_()),
        ("error", pa.string()),
        ("triggers", pa.int32()),
        ("changed", pa.int32()),
        ("changed_share", pa.float64()),
        ("forward_passes", pa.int32()),
        ("displacement", pa.string()),
        ("elements_changed", pa.int64()),
        ("population", pa.string()),
        ("tensor", pa.string()),
        ("index", pa.int64()),
        ("bit", pa.int32()),
        ("predicted", pa.float64()),
        ("miss", pa.string()),
        ("moved", pa.float64()),
        ("plain_moved", pa.float64()),
        ("delta", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Task:
    """One try: an edit or a benign change with a seed; `position` is its round, with a fraction."""

    position: float
    kind: str
    item: Edit | Benign
    seed: int

    def methods(self, methods: set[str], network: Network) -> set[str]:
        """Those that take part in it: no baseline can declare a dtype, or knows another processor than the CPU."""
        alone = isinstance(self.item, Benign) and (self.item.dtype is not None or self.item.elsewhere)
        return methods & {"mirror"} if alone or self.seed >= network.baseline_tries else methods

    @property
    def key(self) -> tuple[str, str, int]:
        """What names the task in the results."""
        return self.kind, self.item.name, self.seed


@app.command(epilog=_EXAMPLES)
def evidence(
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results, caches and tables go.")],
    network: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"{', '.join(NETWORKS)}; repeatable. [default: all but slice]"),
    ] = None,
    tries: Annotated[
        int | None, typer.Option(min=1, help="Seeds of each edit. [default: the network's, 3 to 100]")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"{', '.join(METHODS)}; repeatable. A later run may add others. [default: all]"
        ),
    ] = None,
    slice_: Annotated[bool, typer.Option("--slice", help="The seeded slice that the test suite runs.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Stop cleanly after this time; the tables are written.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. [default: torch's choice]")] = None,
    device: Annotated[
        str, typer.Option(help="Where pairs and yin2022's triggers are made, and pairs checked: cpu or cuda.")
    ] = "cpu",
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Only the I-th of N shares of the tries, for N processes at a time.")
    ] = "1/1",
) -> None:
    """Measure what each method notices of each edit, and its false alarms."""
    names = ["slice"] if slice_ else network or [name for name in NETWORKS if name != "slice"]
    if unknown := [name for name in names if name not in NETWORKS]:
        raise typer.BadParameter(f"network {unknown[0]!r} is not known: use any of {', '.join(NETWORKS)}")
    if unknown := [name for name in method or () if name not in METHODS]:
        raise typer.BadParameter(f"method {unknown[0]!r} is not known: use any of {', '.join(METHODS)}")
    share = _share_of(part)
    if threads is not None:
        torch.set_num_threads(threads)
    deadline = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    for name in names:
        if time.monotonic() > deadline:
            break
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        loaded = networks.load(name, folder)
        wanted = tuple(m for m in loaded.methods if m in (method or METHODS))
        measure(replace(loaded, methods=wanted), folder, tries, deadline, torch.device(device), share)
        write_tables(out)
    log.info("tables: %s", out / "evidence.md")


# ---------------------------------------------------------------------------------------------- measuring


def _share_of(part: str) -> tuple[int, int]:
    number, _, of = part.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise typer.BadParameter(f"--part {part!r}: use I/N, as in 2/4")
    return int(number), int(of)


def measure(
    network: Network,
    folder: Path,
    tries: int | None,
    deadline: float,
    device: torch.device = CPU,
    share: tuple[int, int] = (1, 1),
) -> None:
    """Run what is missing of a network's tries until the deadline, in seconds of `time.monotonic`.

    Args:
        tries: Seeds of each edit; None is what the network asks for.
        device: Where pairs are made and checked.
        share: (i, n): the i-th of n shares of the tries, from 1.
    """
    log.info("%s: accuracy %.1f %% on held-out images", network.name, 100 * network.accuracy)
    check_permutation(network)
    methods = baselines.make(network, folder, device)
    plan = list(tasks(network, tries or network.tries))
    _describe(network, methods, folder, len(plan))
    number, of = share
    path = folder / ("results.jsonl" if of == 1 else f"results-{number}-of-{of}.jsonl")
    _cut_torn_line(path)
    done = defaultdict(set)
    for row in rows_of(folder.parent):
        if row["network"] == network.name:
            done[row["kind"], row["task"], row["seed"]].add(row["method"])
    had = set(network.methods) - set(methods.failed)
    mine = plan[number - 1 :: of]
    missing = [(task, lacking) for task in mine if (lacking := task.methods(had, network) - done[task.key])]
    log.info("%s: %d of %d tries to do", network.name, len(missing), len(mine))
    began = told = time.monotonic()
    with path.open("a") as file:
        for tried, (task, lacking) in enumerate(missing, 1):
            if time.monotonic() > deadline:
                log.info("%s: time is up after %d tries; the same command goes on", network.name, tried - 1)
                break
            result = {"task": task.key, "rows": list(_try(task, network, methods, lacking))}
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if time.monotonic() - told > 30 or tried == len(missing):
                told = time.monotonic()
                rate = (told - began) / tried
                left = rate * (len(missing) - tried) / 60
                log.info(
                    "%s: %d of %d tries, %.1f s each, %.0f minutes left", network.name, tried, len(missing), rate, left
                )


def tasks(network: Network, tries: int) -> Iterator[Task]:
    """Every try of a network, in the order of work."""
    plan = []
    for edit in EDITS:
        if applicable(edit, network):
            seeds = edit.tries(network, tries)
            plan += [Task(seed * min(1, tries / seeds), "edit", edit, seed) for seed in range(seeds)]
    for benign in () if network.populations else BENIGN:
        if benign.elsewhere and not torch.cuda.is_available():
            continue
        seeds = benign.tries(tries)
        plan += [Task(seed * min(1, tries / seeds), "benign", benign, seed) for seed in range(seeds)]
    return iter(sorted(plan, key=lambda task: task.position))


def _try(task: Task, network: Network, methods: Methods, wanted: set[str]) -> Iterator[dict[str, Any]]:
    """One result for each state and wanted method."""
    if isinstance(task.item, Benign):
        with benign_model(task.item, network, task.seed) as model:
            declared, elsewhere = task.item.dtype is not None, task.item.elsewhere
            for seen in methods.check(model, wanted, declared=declared, elsewhere=elsewhere):
                yield asdict(seen) | {"edit": task.item.name, "family": "benign", "required": False}
        return
    for model, edited in edited_states(task.item, network, task.seed):
        seen_by = methods.check(model, wanted)
        state = (
            asdict(edited)
            | {
                "edit": edited.name,
                "family": task.item.family,
                "elements_changed": changed_elements(network.model, model),
            }
            | ({"predicted": methods.predicted(network, edited), "delta": methods.delta} if methods.mirror else {})
        )
        del state["name"]
        for seen in seen_by:
            why = {}
            if seen.method == "mirror" and not seen.detected:
                missed = methods.explain(model)
                why = {"miss": missed.reason, "moved": missed.moved}
                if edited.required:
                    why["plain_moved"] = moved_by(network, model)
            yield asdict(seen) | state | why


def moved_by(network: Network, model: nn.Module) -> float:
    """Largest change of a float64 logit of plain images by an edit; 0 is an edit that left the function as it was."""
    inputs = network.test_images[:_PLAIN].double()
    with torch.inference_mode():
        before, after = (copy.deepcopy(each).double().eval()(inputs) for each in (network.model, model))
    return (after - before).abs().max().item()


def check_permutation(network: Network) -> None:
    """Permuted channels leave the function alone: float64 logits agree to 1e-9 on random input."""
    low, high = network.input_range
    x = torch.rand(2, *network.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = permuted_by(network.model, network.permute, low + (high - low) * x)
    assert moved < 1e-9, f"the permuted model's logits differ by {moved}"


def permuted_by(model: nn.Module, permute: Callable[[nn.Module, torch.Generator], None], inputs: Tensor) -> float:
    """Largest change of a float64 logit by a permutation of channels, in logits.

    Args:
        inputs: float64 [n, *input_shape].
    """
    twin = copy.deepcopy(model).double()
    before = [parameter.clone() for parameter in twin.parameters()]
    with torch.no_grad():
        expected = twin(inputs)
        permute(twin, torch.Generator().manual_seed(0))
        moved = (twin(inputs) - expected).abs().max().item()
    assert not all(map(torch.equal, before, twin.parameters())), "the recipe permutes nothing"
    return moved


def _describe(network: Network, methods: Methods, folder: Path, planned: int) -> None:
    """Write what the tables say about a network, and refuse results that belong to other triggers."""
    known = descriptions(folder.parent).get(network.name, {})
    of_key = _of_key(methods.mirror) if methods.mirror else {name: known.get(name) for name in _OF_KEY}
    if known and known["triggers"] != of_key["triggers"]:
        raise typer.BadParameter(f"the results in {folder} belong to other triggers: use another folder")
    # A run may add methods to those of earlier ones.
    seconds = known.get("seconds", {}) | methods.seconds
    failed = {m: why for m, why in known.get("failed", {}).items() if m not in network.methods} | methods.failed
    had = {*known.get("methods", ()), *network.methods} - failed.keys()
    described = {
        "name": network.name,
        "arch": network.arch,
        "parameters": sum(parameter.numel() for parameter in network.model.parameters()),
        "accuracy": network.accuracy,
        "methods": [method for method in METHODS if method in had],
        "failed": failed,
        "seconds": seconds,
        **of_key,
        "planned": planned,
        "machine": machine(methods.device),
        # Without the options of one run: results add up over runs.
        "command": f"python -m tests.benchmarks.evidence --out FOLDER --network {network.name}",
    }
    _replace(folder / "network.json", lambda part: part.write_text(json.dumps(described, indent=1)))


_OF_KEY = ("pairs", "delta", "noise", "coverage", "triggers")


def _of_key(key: TriggerSet) -> dict[str, Any]:
    """What the tables say of a key; by the digest of its triggers it is known again when it is made anew."""
    finest = key.rungs[0]
    digest = hashlib.sha256()
    for tensor in (key.classes, key.images, key.signs, *(rung.t for rung in key.rungs)):
        digest.update(tensor.contiguous().numpy().tobytes())
    values = (key.pairs, finest.delta, finest.noise, key.coverage.total, digest.hexdigest())
    return dict(zip(_OF_KEY, values, strict=True))


def descriptions(out: Path) -> dict[str, dict[str, Any]]:
    """What the tables say of each network, by name: of the networks measured here, else of those taken over."""
    path = out / "evidence.json"
    taken = json.loads(path.read_text()) if path.exists() else []
    here = [json.loads(path.read_text()) for path in out.glob("*/network.json")]
    return {network["name"]: network for network in [*taken, *here]}


def machine(device: torch.device) -> str:
    """Class of this machine and the versions that compute."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return (
        f"{gpu}{os.cpu_count()} cores ({cpu}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"fwm-audit {__version__}"
    )


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished tries; a last line that an interruption tore is not one of them."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last whole line, before anything is appended to it."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


# ------------------------------------------------------------------------------------------------- tables


def interval(successes: int, tries: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a binomial proportion: the shares that neither tail test refuses."""

    def tail(share: float, least: int) -> float:
        """P(X >= least), the terms in logarithms as the coefficients may overflow."""
        logs = (
            math.lgamma(tries + 1) - math.lgamma(k + 1) - math.lgamma(tries - k + 1)
            + k * math.log(share) + (tries - k) * math.log1p(-share)
            for k in range(least, tries + 1)
        )  # fmt: skip
        return math.fsum(map(math.exp, logs))

    def solve(least: int, wanted: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(middle, least) < wanted else (low, middle)
        return (low + high) / 2

    if tries == 0:
        return 0.0, 1.0
    risk = (1 - level) / 2
    low = solve(successes, risk) if successes else 0.0
    high = solve(successes + 1, 1 - risk) if successes < tries else 1.0
    return low, high


def rows_of(out: Path) -> list[dict[str, Any]]:
    """One row for each network, state or benign change, seed and method: those taken over, then those of here."""
    path = out / "evidence.parquet"
    taken = pq.read_table(path).to_pylist() if path.exists() else []
    rows = []
    for path in sorted(out.glob("*/results*.jsonl")):
        for result in read_results(path):
            kind, task, seed = result["task"]
            for row in result["rows"]:
                extra = {"network": path.parent.name, "kind": kind, "task": task, "seed": seed}
                extra["changed_share"] = row["changed"] / row["triggers"] if row["changed"] is not None else None
                rows.append({name: (row | extra).get(name) for name in SCHEMA.names})
    here = {tuple(row[name] for name in _IDENTITY) for row in rows}
    taken = [{name: row.get(name) for name in SCHEMA.names} for row in taken]
    return [row for row in taken if tuple(row[name] for name in _IDENTITY) not in here] + rows


_IDENTITY = ("network", "kind", "task", "edit", "seed", "method")


def write_tables(out: Path) -> None:
    """FOLDER/evidence.parquet and FOLDER/evidence.md, from every network's results that are there."""
    rows = rows_of(out)
    _replace(out / "evidence.parquet", lambda part: pq.write_table(pa.Table.from_pylist(rows, SCHEMA), part))
    described = sorted(descriptions(out).values(), key=lambda network: list(NETWORKS).index(network["name"]))
    _replace(out / "evidence.json", lambda part: part.write_text(json.dumps(described, indent=1) + "\n"))
    by_network = defaultdict(list)
    for row in rows:
        by_network[row["network"]].append(row)
    text = "\n".join(markdown(described, by_network))
    _replace(out / "evidence.md", lambda part: part.write_text(text + "\n"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(part)
    part.replace(path)


def markdown(described: list[dict[str, Any]], rows: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Lines of the report."""
    yield "# Evidence: what each method notices, and what it mistakes"
    yield ""
    yield "Detected: at least one label differs from the reference, or the model answers NaN or infinity. Shares are"
    yield "`share [95 % interval] (tries)`, intervals are Clopper-Pearson's. `mirror` is checked by `fwm_audit.verify`:"
    yield "float64, labels only. The baselines run in float32, as their papers do. On large networks they take part in"
    yield "fewer tries. On EfficientNet-Lite0 a check ends at the first changed label; on `-500-pairs`, where only the"
    yield "last layer is edited, its inputs are computed once in float64."
    yield "Tries whose edit changed no bit of any parameter or buffer (steps below float32's resolution) are left out,"
    yield f"and those that `mirror` missed and that moved no float64 logit of {_PLAIN} images (weights of dead units)."
    yield "In train mode a step also moves the running statistics of batch norm, by a tenth for most networks here."
    yield "Pruning and int8 take every weight tensor for seed 0 and a random half of them for the other seeds."
    yield ""
    yield from _table(
        ["network", "architecture", "parameters", "held-out accuracy", "pairs", "delta", "noise", "coverage"],
        (
            [
                network["name"], f"`{network['arch']}`", f"{network['parameters']:,}", f"{network['accuracy']:.1%}",
                str(network["pairs"]), f"{network['delta']:.1e}", f"{network['noise']:.1e}",
                f"{network['coverage']:.2%}",
            ]
            for network in described
        ),
    )  # fmt: skip
    yield from _short(described, rows)
    for network in described:
        yield from _network_section(network, rows[network["name"]])
    yield "## Not reproduced from the paper"
    yield ""
    yield "- CIFAR-10, CIFAR-100 and TinyImageNet: no package index holds their images. The networks stand in for them."
    yield "- The tables of Yin et al. (ICIP 2022) could not be read: no figure of theirs is quoted. `yin2022` is their"
    yield "  method by their published settings, with a keyed seed."
    yield "- eps and the number of steps of 2305.09684 (`ftg`) could not be read; `baselines.py` has ours. `ibsf` and"
    yield "  `sensitive samples` follow their authors' code, with fewer steps, from images nearer to a boundary."
    yield ""
    yield "## Where this was measured"
    yield ""
    for network in described:
        yield f"- {network['name']}: {network['machine']}; `{network['command']}`"


def _short(described: list[dict[str, Any]], rows: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Edits that must be noticed, in all, and single bits: the table of the README."""
    yield "## In short"
    yield ""
    yield "Share detected of the edits that must be (all but pruning below 0.1 %, single weights and bits), of how many"
    yield "tries. Bits: one flipped bit (sign, exponent, mantissa) of a uniformly random weight, detected of tried, and"
    yield "the share predicted to first order from the gradients at the triggers."
    yield ""
    methods = [method for method in METHODS if any(method in network["methods"] for network in described)]
    head = ["network", "pairs", *methods, "false alarms of mirror", *(f"bits of {name}" for name in POPULATIONS)]
    yield from _table(head, (_short_row(network, methods, rows[network["name"]]) for network in described))


def _short_row(network: dict[str, Any], methods: list[str], rows: list[dict[str, Any]]) -> list[str]:
    edits = _edits(rows)
    cells = [network["name"], str(network["pairs"])]
    for method in methods:
        mine = [row["detected"] for row in edits if row["required"] and row["method"] == method]
        cells.append(f"{sum(mine) / len(mine):.1%} ({len(mine)})" if mine else "")
    benign = [row["detected"] for row in rows if row["kind"] == "benign" and row["method"] == "mirror"]
    cells.append(f"{sum(benign)} of {len(benign)} runs" if benign else "")
    for drawn_from in POPULATIONS:
        bits = [
            row
            for row in edits
            if row["method"] == "mirror" and row["population"] == drawn_from and not row["edit"].endswith("times 1.001")
        ]
        predicted = sum(row["predicted"] for row in bits) / max(1, len(bits))
        seen = sum(row["detected"] for row in bits)
        cells.append(f"{seen} of {len(bits)} ({predicted:.1%})" if bits else "")
    return cells


def _edits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that changed something: a bit, and the function."""
    idle = {_state(row) for row in rows if row["plain_moved"] == 0}
    return [row for row in rows if row["kind"] == "edit" and row["elements_changed"] and _state(row) not in idle]


def _state(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["edit"], row["seed"]


def _network_section(network: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    methods = network["methods"]
    tried = len({(row["kind"], row["edit"], row["seed"]) for row in rows})
    edits = _edits(rows)
    nothing = Counter(
        row["edit"]
        for row in rows
        if row["kind"] == "edit" and not row["elements_changed"] and row["method"] == "mirror"
    )
    yield ""
    yield f"## {network['name']}"
    yield ""
    yield f"{tried} edited states and benign runs, from {network['planned']} planned tries."
    for method, reason in network["failed"].items():
        yield f"`{method}` is missing: {reason}."
    yield ""
    yield "### Edits detected"
    yield ""
    yield from _table(["edit", *methods], _detection_rows(edits, methods))
    if nothing:
        yield "No bit changed, left out: " + ", ".join(f"{edit} ({count})" for edit, count in nothing.items()) + "."
    same = Counter(row["edit"] for row in rows if row["plain_moved"] == 0 and row["method"] == "mirror")
    if same:
        yield f"Weights changed, but no float64 logit of {_PLAIN} images nor of any trigger, left out: " + (
            ", ".join(f"{edit} ({count})" for edit, count in same.items()) + "."
        )
    if errors := Counter((row["edit"], row["method"]) for row in edits if row["error"]):
        mirror = sum(count for (_, method), count in errors.items() if method == "mirror")
        yield f"Answers that were not finite, counted as detected: {mirror} for mirror, {sum(errors.values())} in all."
    yield ""
    yield "### False alarms"
    yield ""
    yield from _table(["benign change", *methods], _alarm_rows([r for r in rows if r["kind"] == "benign"], methods))
    yield "### Cost"
    yield ""
    usual = [row for row in rows if not row["edit"].endswith(", declared")]  # those are checked with a smaller key
    yield from _table(
        ["", *methods],
        [
            ["triggers", *(_mean(usual, m, "triggers") for m in methods)],
            ["forward passes, intact", *(_mean(usual, m, "forward_passes", detected=False) for m in methods)],
            ["forward passes, tampered", *(_mean(usual, m, "forward_passes", detected=True) for m in methods)],
            ["seconds to make", *(f"{network['seconds'].get(m, 0):.0f}" for m in methods)],
        ],
    )
    mirror = [row for row in edits if row["method"] == "mirror"]
    if any(row["displacement"] for row in mirror):  # a check that ends at the first changed label does not say
        yield "### How far `mirror` says the model has moved"
        yield ""
        yield from _table(["edit", "tries", *_MOVED], _moved_rows(mirror))
    yield "### Coverage: predicted and observed"
    yield ""
    yield "Predicted: share of the elements whose edit moves some gap by more than delta, to first order; for bit 0 it"
    yield "is the coverage in the key."
    yield ""
    yield from _table(["edit", "predicted", "observed", "within the interval"], _coverage_rows(mirror))
    yield "### What `mirror` missed, and why"
    yield ""
    if misses := _miss_rows(mirror):
        yield from _table(
            ["edit", "missed", "no logit moved", "moved less than delta", "moved more than delta"], misses
        )
    else:
        yield "Nothing."
        yield ""


_MOVED = ("none", "float32", "half", "beyond", "unknown", "error")


def _detection_rows(edits: list[dict[str, Any]], methods: list[str]) -> Iterator[list[str]]:
    for family, members in _grouped(edits, "family"):
        yield [f"**{family}**", *[""] * len(methods)]
        for edit, mine in _grouped(members, "edit"):
            yield [edit, *(_share([row for row in mine if row["method"] == method]) for method in methods)]
    required = [row for row in edits if row["required"]]
    yield ["**all of these but pruning below 0.1 %, single weights and bits**", *[""] * len(methods)]
    yield ["in all", *(_share([row for row in required if row["method"] == method]) for method in methods)]


def _alarm_rows(benign: list[dict[str, Any]], methods: list[str]) -> Iterator[list[str]]:
    for change, mine in [*_grouped(benign, "edit"), ("**in all**", benign)]:
        yield [change, *(_alarms([row for row in mine if row["method"] == method]) for method in methods)]


def _moved_rows(mirror: list[dict[str, Any]]) -> Iterator[list[str]]:
    for edit, mine in _grouped(mirror, "edit"):
        counts = Counter("error" if row["error"] else row["displacement"] for row in mine)
        yield [edit, str(len(mine)), *(str(counts[moved] or "") for moved in _MOVED)]


def _coverage_rows(mirror: list[dict[str, Any]]) -> Iterator[list[str]]:
    for edit, mine in _grouped([row for row in mirror if row["predicted"] is not None], "edit"):
        low, high = interval(sum(row["detected"] for row in mine), len(mine))
        within = "yes" if low <= mine[0]["predicted"] <= high else "no"
        yield [edit, f"{mine[0]['predicted']:.1%}", _share(mine), within]


def _miss_rows(mirror: list[dict[str, Any]]) -> list[list[str]]:
    reasons = ("no logit moved", "moved less than delta", "moved more than delta")
    found = []
    for edit, mine in _grouped(mirror, "edit"):
        counts = Counter(row["miss"] for row in mine if row["miss"])
        if counts:
            found.append([edit, f"{counts.total()} of {len(mine)}", *(str(counts[reason]) for reason in reasons)])
    return found


def _grouped(rows: list[dict[str, Any]], name: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows by a column's values, in the order of their first appearance: that of the plan's first round."""
    groups = defaultdict(list)
    for row in rows:
        groups[row[name]].append(row)
    return list(groups.items())


def _share(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    seen, tries = sum(row["detected"] for row in rows), len(rows)
    low, high = interval(seen, tries)
    return f"{seen / tries:.2f} [{low:.2f}, {high:.2f}] ({tries})"


def _alarms(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    alarms, runs = sum(row["detected"] for row in rows), len(rows)
    # The rule of three: no alarm in n runs bounds the rate by 3 / n at 95 %.
    return f"{alarms} of {runs}" + (f" (< {min(1, 3 / runs):.2g})" if not alarms else "")


def _mean(rows: list[dict[str, Any]], method: str, column: str, *, detected: bool | None = None) -> str:
    values = [
        r[column] for r in rows if r["method"] == method and detected in {None, r["detected"]} and r[column] is not None
    ]
    return f"{sum(values) / len(values):.0f}" if values else ""


def _table(head: list[str] | tuple[str, ...], body: Iterable[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in body:
        yield "| " + " | ".join(row) + " |"
    yield ""


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    app()
