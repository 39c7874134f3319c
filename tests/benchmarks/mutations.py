"""Valid checkpoints, changed at random in a hundred thousand ways, audited by confined processes.

A seed decides what is changed: bytes, blocks, lengths and offsets, the values of a header, the opcodes of a pickle,
the members of an archive, or two files are put together. Whatever comes of it is a verdict or an error with a code:
no code of the file's runs, nothing hangs or takes more memory than the worker may, and no file is intact that holds
other tensors than the released one.
"""

from __future__ import annotations

import json
import pickletools
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save

from fwm_audit.checkpoint import open_checkpoint
from tests.hostile import MEMORY_BYTES, SECONDS, Opener, archived, members, state, tensors_file, zipped

_EXAMPLES = """\b
Examples:
  python -m tests.benchmarks.mutations
  python -m tests.benchmarks.mutations --cases 2000 --seed 7
"""
SLACK_BYTES = 64 << 20
_OPCODES = [code.code.encode("latin1") for code in pickletools.opcodes]
_NUMBERS = (0, 1, 2, 255, 256, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, 10**9, 10**18)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=_EXAMPLES)
def mutations(
    *,
    cases: Annotated[int, typer.Option(min=1, help="How many.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Of the first; the next one has the next seed.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="That share them.")] = 2,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Print how many came to what; exit code 1 if anything happened that must not."""
    if worker:
        typer.echo(json.dumps(run(range(seed, seed + cases, processes))))
        return
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.benchmarks.mutations", "--worker", "--processes", str(processes)]
    shares = [
        subprocess.Popen([*command, "--cases", str(cases - n), "--seed", str(seed + n)], stdout=subprocess.PIPE)
        for n in range(processes)
    ]
    outcomes, wrong = Counter[str](), []
    for share in shares:
        out, _ = share.communicate()
        if share.returncode:
            wrong.append(f"a process ended with {share.returncode}")
            continue
        said = json.loads(out.splitlines()[-1])
        outcomes.update(said["outcomes"])
        wrong += said["wrong"]
    took = round(time.monotonic() - began)
    typer.echo(json.dumps({"cases": outcomes.total(), "outcomes": dict(outcomes), "seconds": took, "wrong": wrong}))
    raise typer.Exit(1 if wrong or outcomes.total() != cases else 0)


def run(seeds: range) -> dict[str, object]:
    """Outcomes of these seeds by name, and what was wrong."""
    outcomes, wrong = Counter[str](), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opener = Opener(folder)
        for seed in seeds:
            (folder / "mutated").write_bytes(mutated(seed))
            seen = opener.told("mutated")
            outcome = str(seen["outcome"])
            if outcome == "intact":
                outcome = "intact, with the released tensors"
                if not _same(folder / "mutated", opener.released):
                    wrong.append(f"seed {seed}: intact, with other tensors")
            if outcome == "internal" or seen["witnessed"] or seen["seconds"] > SECONDS:
                wrong.append(f"seed {seed}: {seen}")
            if seen["bytes"] > MEMORY_BYTES + SLACK_BYTES:
                wrong.append(f"seed {seed}: {seen['bytes']} bytes")
            outcomes[outcome] += 1
            if outcomes.total() % 1000 == 0:
                print(f"{outcomes.total()} of {len(seeds)}", file=sys.stderr, flush=True)
    return {"outcomes": outcomes, "wrong": wrong}


def _same(path: Path, released: dict[str, torch.Tensor]) -> bool:
    """The same values; not of the number of batches that a batch norm has seen, which no forward pass reads."""
    held = open_checkpoint(str(path)).tensors
    return all(
        (name in held and held[name].dtype == tensor.dtype and torch.equal(held[name], tensor))
        or name.endswith("num_batches_tracked")
        for name, tensor in released.items()
    )


# -------------------------------------------------------------------------------------------------- what is changed

_SAFETENSORS, _ARCHIVE = save(state()), zipped(state())
_MEMBERS = members(_ARCHIVE)


def mutated(seed: int) -> bytes:
    """A file that is a function of the seed."""
    draws = random.Random(seed)
    data = draws.choice((_SAFETENSORS, _ARCHIVE))
    return draws.choice(_CHANGES)(draws, data)


def _bytes(draws: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draws.choice((1, 1, 2, 8))):
        changed[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    return bytes(changed)


def _block(draws: random.Random, data: bytes) -> bytes:
    start, size = draws.randrange(len(data)), draws.choice((1, 4, 8, 64, 1000))
    block = draws.choice((bytes(size), b"\xff" * size, draws.randbytes(size), data[:size], b""))
    kept = start + draws.choice((0, len(block), size))
    return data[:start] + block + data[kept:]


def _cut(draws: random.Random, data: bytes) -> bytes:
    length = draws.randrange(len(data))
    return draws.choice((data[:length], data[length:], data + data[:length], data[:length] + data))


def _spliced(draws: random.Random, data: bytes) -> bytes:
    other = draws.choice((_SAFETENSORS, _ARCHIVE))
    return data[: draws.randrange(len(data))] + other[draws.randrange(len(other)) :]


def _numbers(draws: random.Random, data: bytes) -> bytes:
    """A length or an offset, wherever one may stand."""
    size = draws.choice((2, 4, 8))
    value = draws.choice(_NUMBERS) & ((1 << 8 * size) - 1)
    marks = [0] if data is _SAFETENSORS else [at for at in range(len(data)) if data[at : at + 2] == b"PK"]
    start = draws.choice(marks) + draws.randrange(46)
    return data[:start] + value.to_bytes(size, "little") + data[start + size :]


def _header(draws: random.Random, data: bytes) -> bytes:
    """The values of a safetensors header."""
    del data
    length = int.from_bytes(_SAFETENSORS[:8], "little")
    entries = json.loads(_SAFETENSORS[8 : 8 + length])
    for _ in range(draws.choice((1, 1, 2))):
        name = draws.choice(list(entries))
        entry = entries[name]
        match draws.randrange(6):
            case 0:
                entry["dtype"] = draws.choice(
                    ("F16", "BF16", "F64", "I32", "I64", "BOOL", "F8_E4M3", "U8", "", None, 7)
                )
            case 1:
                axis = draws.randrange(len(entry["shape"]) or 1)
                entry["shape"] = [*entry["shape"][:axis], draws.choice(_NUMBERS), *entry["shape"][axis + 1 :]]
            case 2:
                entry["shape"] = draws.sample(entry["shape"], len(entry["shape"]))
            case 3:
                entry["data_offsets"][draws.randrange(2)] = draws.choice((*_NUMBERS, draws.randrange(10_000)))
            case 4:
                other = entries[draws.choice(list(entries))]
                entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
            case _:
                entries[draws.choice((name.upper(), name + " ", "", name * 9, "__metadata__"))] = entries.pop(name)
                break
    return tensors_file(entries, _SAFETENSORS[8 + length :])


def _opcodes(draws: random.Random, data: bytes) -> bytes:
    """The opcodes of the pickle in an archive."""
    del data
    text = _MEMBERS["archive/data.pkl"]
    places = [place for _, _, place in pickletools.genops(text)]
    changed = bytearray(text)
    for _ in range(draws.choice((1, 1, 2, 4))):
        place = draws.choice(places)
        match draws.randrange(5):
            case 0:
                changed[place : place + 1] = draws.choice(_OPCODES)
            case 1:
                changed[place:place] = draws.choice(_OPCODES)
            case 2:
                del changed[place : draws.choice(places)]
            case 3:
                changed[place:place] = struct.pack(
                    "<BI", draws.choice(b"rjJX"), draws.choice((0, 1, 1 << 20, 0x7FFFFFFF))
                )
            case _:
                other = draws.choice(places)
                changed[place:place] = text[other : other + draws.randrange(1, 40)]
    return archived(_MEMBERS | {"archive/data.pkl": bytes(changed)})


def _archive(draws: random.Random, data: bytes) -> bytes:
    """The members of an archive."""
    del data
    content = dict(_MEMBERS)
    name, other = draws.sample(list(content), 2)
    match draws.randrange(5):
        case 0:
            content[name], content[other] = content[other], content[name]
        case 1:
            content[name] = _block(draws, content[name] or b"\0")
        case 2:
            content[draws.choice((name + "/x", "../" + name, name.replace("archive", "b"), "/" + name))] = content[name]
        case 3:
            del content[name]
        case _:
            content = dict(draws.sample(list(content.items()), len(content)))
    return archived(content, draws.choice((0, 0, 0, 8)))


_CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _bytes, _block, _cut, _spliced, _numbers, _header, _opcodes, _archive,
)  # fmt: skip


if __name__ == "__main__":
    app()
