"""A company that releases models on a real cluster: its files, its `jobs.embed`, and a search for leaks."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ray.cluster_utils import Cluster
from ray.util import state as ray_state
from safetensors.torch import load_file, save_file
from torch import Tensor

from fwm_audit.architectures import build
from fwm_audit.key import MAGIC, MasterSecret
from fwm_audit.triggers import TriggerSet
from fwm_audit.verdict import Verdict
from fwm_audit.verification import verify

CONVNET = "factory:tests.nets:convnet?classes=5"


class Company:
    """A folder with models to release, their keys, catalog, master secret and run storage."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.address = folder, cluster.address
        #: Folder of the Ray session, with its logs.
        self.session = Path(cluster.head_node.get_session_dir_path())
        MasterSecret.generate_file(folder / "master.key")

    def release(
        self, names: Sequence[str], arch: str = CONVNET, weights: Mapping[str, Tensor] | None = None
    ) -> list[dict[str, str]]:
        """One checkpoint for each name, each of another width if `arch` says nothing else, or all near `weights`."""
        rows = []
        for number, name in enumerate(names):
            spec = f"{arch}&width={8 + number}" if arch == CONVNET else arch
            path = self.folder / f"{name.replace('/', '-')}.safetensors"
            state = weights or build(spec, ["tests", "jobs"]).state_dict()
            if number:  # the factories' weights come from one seed
                state = {key: value * (1 + number / 64) if value.dim() > 1 else value for key, value in state.items()}
            save_file(state, path)
            rows.append({"model_id": name, "uri": str(path), "arch": spec})
        return rows

    def command(self, rows: Sequence[dict[str, str]], *options: str) -> list[str]:
        """`jobs.embed` for these rows, 4 pairs each if the options say nothing else."""
        (self.folder / "models.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [
            *(sys.executable, "-m", "jobs.embed", "--models", str(self.folder / "models.jsonl")),
            *("--allow-factory", "tests", "--allow-factory", "jobs"),
            *("--keys", str(self.folder / "keys"), "--catalog", str(self.folder / "catalog.csv")),
            *("--storage", str(self.folder / "runs"), "--master-key", str(self.folder / "master.key")),
            *("--pairs", "4", *options),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver."""
        return os.environ | {"RAY_ADDRESS": self.address}

    def start(self, rows: Sequence[dict[str, str]], *options: str) -> subprocess.Popen[str]:
        """`jobs.embed` in the background, all that it says in one pipe."""
        return subprocess.Popen(
            self.command(rows, *options),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def embed(self, rows: Sequence[dict[str, str]], *options: str):
        """Exit code, closing line, and all that was said."""
        done = subprocess.run(
            self.command(rows, *options), env=self.environment, capture_output=True, text=True, check=False, timeout=500
        )
        lines = done.stdout.strip().splitlines()
        closing = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
        return done.returncode, closing, done.stdout + done.stderr

    @property
    def master(self) -> MasterSecret:
        """The company's secret."""
        return MasterSecret.from_file(self.folder / "master.key")

    def keys(self, name: str) -> list[Path]:
        """Sealed keys of a model."""
        return sorted((self.folder / "keys" / name).glob("*.fwmkey"))

    def opened(self, name: str) -> TriggerSet:
        """The one key of a model."""
        (path,) = self.keys(name)
        return TriggerSet.load(path, master=self.master)

    def verifies(self, row: dict[str, str]) -> bool:
        """Whether the released checkpoint is intact by its one key."""
        model = build(row["arch"], ["tests", "jobs"])
        model.load_state_dict(load_file(row["uri"]))
        return verify(model.eval(), self.opened(row["model_id"])).verdict is Verdict.INTACT

    def wait_for_state(self, name: str, seconds: float = 200) -> None:
        """Until a run of this model has kept its first state."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # Ray Train goes on from what its own snapshot names, which it writes after the state.
            states = list((self.folder / "runs").glob(f"fwm-embed-{name}-*/*/search.sealed"))
            snapshots = list((self.folder / "runs").glob(f"fwm-embed-{name}-*/checkpoint_manager_snapshot.json"))
            if states and snapshots and "checkpoint_" in snapshots[0].read_text():
                assert states[0].read_bytes().startswith(MAGIC)
                return
            time.sleep(0.1)
        raise TimeoutError("no state was kept")

    def keep_runs(self, name: str) -> None:
        """Copy what the run storage holds now, for `leaks`: it is emptied later, and may change meanwhile."""
        for path in (self.folder / "runs").rglob("*"):
            copied = self.folder / name / path.relative_to(self.folder / "runs")
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    content = path.read_bytes()
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    copied.write_bytes(content)

    def train_workers(self) -> set[int]:
        """Process ids of Ray Train's workers on this machine."""
        raylets = _processes("-f", f"raylet/raylet .*{self.session.name}")
        return _processes("-f", "-P", ",".join(map(str, raylets)), "ray::.*TrainWorker") if raylets else set()

    def leaks(self, names: Sequence[str]) -> list[str]:
        """Where the master secret, or triggers and labels of these models, stand in plain form.

        Searched are all files of the run storage, keys, catalog and Ray's session folder with its logs, and
        what Ray's API tells of tasks, actors, jobs and workers.
        """
        marks = dict(_marks_of_secret((self.folder / "master.key").read_text().strip()))
        for name in names:
            marks |= dict(_marks(self.opened(name), name))
        found, read = [], 0
        for where, content in [*_files(self.folder, self.session), *_answers(self.address)]:
            if where == str(self.folder / "master.key"):
                continue
            read += 1
            found += [f"{mark} in {where}" for mark, plain in marks.items() if plain in content]
        assert read > 20, "nothing was searched"
        return found


def _processes(*pattern: str) -> set[int]:
    found = subprocess.run(["pgrep", *pattern], capture_output=True, text=True, check=False)
    return {int(pid) for pid in found.stdout.split()}


def _marks_of_secret(text: str) -> Iterator[tuple[str, bytes]]:
    raw = bytes.fromhex(text)
    yield "master secret, hex", text.encode()
    yield "master secret, raw", raw
    yield "master secret, base64", base64.b64encode(raw).rstrip(b"=")
    yield "master secret, as Python shows bytes", repr(raw)[2:-1].encode()


def _marks(triggers: TriggerSet, name: str) -> Iterator[tuple[str, bytes]]:
    labels = triggers.classes.flatten().tolist()
    for between in (", ", ",", " "):
        yield f"labels of {name}, joined by {between!r}", between.join(map(str, labels)).encode()
    yield f"labels of {name}, raw", triggers.classes.numpy().tobytes()
    for number, image in enumerate(triggers.images):
        yield f"image {number} of {name}", image.numpy().tobytes()[:64]
        yield f"image {number} of {name}, as text", ", ".join(map(str, image.flatten()[:12].tolist())).encode()
    for t in triggers.rungs[0].t.flatten():
        yield f"t of {name}", t.numpy().tobytes()
        yield f"t of {name}, as text", repr(t.item()).encode()


def _files(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()


def _answers(address: str) -> Iterator[tuple[str, bytes]]:
    for ask in (ray_state.list_tasks, ray_state.list_actors, ray_state.list_jobs, ray_state.list_workers):
        answer = ask(address=address, detail=True, limit=10_000, raise_on_missing_output=False)
        yield ask.__name__, repr(answer).encode()
