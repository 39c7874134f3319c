"""Many models to watermark: one outcome each, whatever dies; what is there already is left alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError
from ray.train import ControllerError
from ray.util.placement_group import placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fwm_audit import releases, storage, train
from fwm_audit.catalog import read_catalog
from fwm_audit.commitment import committed_at
from fwm_audit.errors import FwmError, UsageError
from fwm_audit.key import MasterSecret, fingerprint, read_header
from fwm_audit.task import EmbedTask
from fwm_audit.triggers import TriggerSet
from tests.company import CONVNET as ARCH
from tests.company import Company

# --------------------------------------------------------------------------------------- room in a cluster


def nodes(*resources):
    return [{"Alive": True, "Resources": {"CPU": cpu, "GPU": gpu}} for cpu, gpu in resources]


@pytest.mark.parametrize(
    ("cluster", "workers", "models", "parallel", "expected"),
    [
        (nodes((2, 0)), None, 1, None, (1, 2, False)),
        (nodes((2, 0)), None, 12, None, (2, 1, False)),
        (nodes((2, 0)), 2, 12, None, (1, 2, False)),
        (nodes((2, 0)), 1, 1, None, (1, 1, False)),
        (nodes((16, 0)), None, 3, None, (3, 5, False)),
        (nodes((16, 0)), None, 3, 1, (1, 6, False)),  # more would find no work
        (nodes((16, 0)), 2, 3, None, (3, 2, False)),
        (nodes((2, 0), (2, 0), (2, 0)), 2, 1, None, (1, 2, False)),
        (nodes((8, 4), (8, 4)), 2, 100, None, (4, 2, True)),
        (nodes((8, 4), (8, 4)), None, 3, None, (3, 2, True)),
        (nodes((1, 4)), 2, 1, None, None),  # GPUs without CPUs for them
        (nodes((8, 1)), None, 1, None, (1, 1, True)),
        (nodes((8, 1)), 2, 1, None, (1, 2, False)),  # fewer GPUs than workers: none uses one
        (nodes((1, 0), (0.5, 0)), 2, 1, None, None),
        (nodes((0.5, 0)), None, 1, None, None),
    ],
)
def test_the_room_of_a_cluster_is_shared_out_within_its_nodes(
    monkeypatch, cluster, workers, models, parallel, expected
):
    monkeypatch.setattr(ray, "nodes", lambda: cluster)
    if expected is None:
        with pytest.raises(UsageError, match="--wait"):
            releases.find_room(workers, models, parallel)
        return
    assert releases.find_room(workers, models, parallel) == releases.Room(*expected)


# ------------------------------------------------------------------------------------------ a real cluster


@pytest.fixture(scope="module")
def cluster():
    """Three nodes with one CPU each; the head takes no work."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def company(tmp_path, cluster):
    return Company(tmp_path, cluster)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_every_model_has_its_outcome_and_a_repetition_changes_nothing(company):
    good, blocked = company.release(["team/a", "blocked"])
    cut = company.folder / "cut.safetensors"
    cut.write_bytes(Path(good["uri"]).read_bytes()[:-50])
    rows = [
        good,
        blocked,
        {"model_id": "cut", "uri": str(cut), "arch": ARCH},
        {"model_id": "gone", "uri": str(company.folder / "gone.pt"), "arch": ARCH},
        {"model_id": "misfit", "uri": blocked["uri"], "arch": ARCH},
        {"model_id": "../up", "uri": good["uri"], "arch": ARCH},
        {**good, "model_id": "other-file", "sha256": "0" * 64},
        {**good},
    ]
    (company.folder / "keys").mkdir()
    (company.folder / "keys" / "blocked").write_text("a file where a folder should be")
    code, closing, said = company.embed(rows)
    assert code == 3, said
    # Ray's controllers show tracebacks of their own where the machine is slow.
    assert not [line for line in said.splitlines() if "Traceback" in line and "(TrainController" not in line]
    assert {name: closing[name] for name in ("models", "published", "skipped", "failed")} == {
        "models": 8, "published": 1, "skipped": 0, "failed": 7,
    }  # fmt: skip
    reasons = {failure["model_id"]: failure["error_code"] for failure in closing["failures"]}
    assert reasons == {
        "cut": "checkpoint_corrupt",
        "gone": "object_missing",
        "misfit": "checkpoint_does_not_fit_arch",
        "../up": "catalog_row_invalid",
        "other-file": "checkpoint_not_the_one_listed",
        "team/a": "catalog_row_duplicate",
        "blocked": "storage_failed",
    }
    assert company.verifies(good)
    listed = read_catalog((company.folder / "catalog.csv").read_bytes(), "catalog.csv")
    assert {(entry.model_id, entry.key_id) for entry in listed} == set(closing["keys"].items())
    assert all(entry.sha256 and not entry.problem for entry in listed)

    before = {path: path.read_bytes() for path in company.folder.rglob("*") if path.suffix in {".fwmkey", ".csv"}}
    code, closing, said = company.embed([good])
    assert (code, closing["skipped"], closing["published"]) == (0, 1, 0), said
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_killed_worker_is_replaced_and_a_killed_driver_leaves_a_run_to_go_on_with(company, cluster):
    (row,) = company.release(["model"])
    many = ("--pairs", "40", "--workers", "2")
    driver = company.start([row], *many)
    try:
        company.wait_for_state("model")
    finally:
        driver.kill()
        driver.wait()
    assert not (company.folder / "keys").exists()
    company.keep_runs("runs when the driver was killed")
    before = company.train_workers()  # of the dead driver, about to go
    driver = company.start([row], *many)
    killed = False
    while not killed and driver.poll() is None:
        for pid in company.train_workers() - before:
            time.sleep(1.0)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed = True
                break
        time.sleep(0.1)
    said, _ = driver.communicate(timeout=500)
    assert driver.returncode == 0, said
    assert killed
    assert "model: going on from the state of an interrupted run" in said
    assert company.verifies(row)
    assert company.opened("model").pairs == 40
    assert not any(path.is_file() for path in (company.folder / "runs").rglob("fwm-embed-*/**/*"))
    assert company.leaks(["model"]) == []
    # That it finds what is there: an image in a log, the secret in a name.
    triggers = company.opened("model")
    log = company.session / "logs" / "planted"
    log.write_bytes(b"image " + triggers.images[0].numpy().tobytes())
    ray.init(cluster.address, log_to_driver=False)
    try:
        text = (company.folder / "master.key").read_text().strip()
        named = ray.remote(num_cpus=0)(releases.Board).options(name=text).remote()
        ray.get(named.latest.remote())
        found = company.leaks(["model"])
    finally:
        ray.shutdown()
    assert f"image 0 of model in {log}" in found
    assert "master secret, hex in list_actors" in found


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_what_a_group_finds_ends_it_at_once(company):
    (row,) = company.release(["exploding"], "factory:tests.nets:Exploding")
    code, closing, said = company.embed([row], "--workers", "2")
    assert code == 3, said
    (failure,) = closing["failures"]
    assert failure["error_code"] == "pairs_not_found"
    assert "diverged" in failure["error_message"]
    assert said.count("Started training worker group") == 1


@pytest.mark.ray
def test_a_cluster_without_room_is_waited_for(cluster):
    ray.init(cluster.address, log_to_driver=False)
    try:
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(releases.find_room, 4, 1, None, 120)
            time.sleep(3)
            assert not asked.done()
            node = cluster.add_node(num_cpus=1)
            assert asked.result() == releases.Room(1, 4, gpu=False)
    finally:
        ray.shutdown()
    cluster.remove_node(node)


class Trainer:
    """Ray Train's trainer, whose runs end as told."""

    def __init__(self, *ends):
        self.ends = list(ends)

    def fit(self):
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


@pytest.mark.ray
def test_what_a_group_of_dead_workers_held_is_free_again_and_nothing_else(cluster):
    """Ray Train forgets it where the start of the group failed; another model's next attempt needs the room."""

    @ray.remote(num_cpus=1)
    class Worker:
        def pid(self):
            return os.getpid()

    def group():
        made = placement_group([{"CPU": 1}])
        assert made.wait(60)
        return made

    def worker(made):
        living = Worker.options(scheduling_strategy=PlacementGroupSchedulingStrategy(made)).remote()
        return living, ray.get(living.pid.remote())

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        left, used, fresh = group(), group(), group()
        (dead, pid), (living, _) = worker(left), worker(used)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ActorDiedError):
            ray.get(dead.pid.remote())
        train._free_groups_of_the_dead()
        states = [placement_group_table(made)["state"] for made in (left, used, fresh)]
        assert states == ["REMOVED", "CREATED", "CREATED"]
        assert ray.get(living.pid.remote())
    finally:
        ray.shutdown()


def test_a_worker_that_dies_while_its_group_starts_costs_an_attempt_and_no_more():
    died = ControllerError(ActorDiedError())
    assert train._fit(Trainer(died, died, "result"), "m") == "result"
    endless = Trainer(*[died] * 20)
    with pytest.raises(ControllerError) as caught:
        train._fit(endless, "m")
    assert len(endless.ends) == 20 - 1 - train._RESTARTS
    failed = releases._failed(EmbedTask(model_id="m", checkpoint="c", arch=ARCH, keys="k", base="/"), caught.value)
    assert failed.code == "worker_died"
    with pytest.raises(ControllerError):
        train._fit(Trainer(ControllerError(ValueError("a bug")), "result"), "m")


# ------------------------------------------------------------------------------------------- keys in use


def test_a_further_generation_has_another_key_and_the_first_keeps_its_name():
    task = EmbedTask(model_id="m", checkpoint="c", arch=ARCH, keys="k", base="/")
    assert "generation" not in task.settings()  # as before there were generations
    second = dataclasses.replace(task, generation=2)
    master = MasterSecret.generate()
    assert task.secret(master, "00").key_id != second.secret(master, "00").key_id


def job(*arguments):
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False, timeout=120)
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None, done.stderr


def test_a_retired_key_is_listed_no_more(tmp_path):
    keys, models = tmp_path / "keys", tmp_path / "models"
    golden = (Path(__file__).parent / "golden" / "key-format-2.fwmkey").read_bytes()
    old, new = "0" * 16, "1" * 16
    for key_id in (old, new):
        storage.create(f"{keys}/team/m/{key_id}.fwmkey", golden)
    storage.create(f"{models}/team/m/copy.pt", b"weights")
    command = ("jobs.catalog", "--models", str(models), "--keys", str(keys), "--out", str(tmp_path / "c.jsonl"))

    def listed():
        assert job(*command)[0] == 0
        return [entry.key_id for entry in read_catalog((tmp_path / "c.jsonl").read_bytes(), "c.jsonl")]

    assert listed() == [old, new]
    retire = ("jobs.keys", "retire", "--keys", str(keys), "--model-id", "team/m", "--key-id")
    code, closing, said = job(*retire, old, "--reason", "rotated")
    assert (code, closing["before"]) == (0, False), said
    assert job(*retire, old)[1]["before"] is True
    assert listed() == [new]
    code, closing, said = job("jobs.keys", "list", "--keys", str(keys))
    assert [(key["key_id"], key["state"]) for key in closing["keys"]] == [(old, "retired"), (new, "in use")], said
    assert job(*retire, new)[0] == 0
    assert listed() == [""]
    code, _, said = job(*retire, "2" * 16)
    assert code == 2
    assert "jobs.keys list" in said


def test_several_nodes_need_a_common_storage(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: nodes((2, 0), (2, 0)))
    monkeypatch.setattr(releases, "_look_up", lambda _: iter([(0, "0" * 16)]))
    task = EmbedTask(model_id="m", checkpoint="c", arch=ARCH, keys="k", base="/")
    with pytest.raises(UsageError, match="--storage"):
        next(releases.watermark([task], workers=1))


@pytest.mark.timeout(300)
def test_keys_are_sealed_anew_under_another_master_secret(tmp_path):
    """Each opens under the new secret alone, a repetition does nothing, and the new one commits to them."""
    golden = (Path(__file__).parent / "golden" / "key-format-2.fwmkey").read_bytes()
    old, new, keys = tmp_path / "old.key", tmp_path / "new.key", tmp_path / "keys"
    old.write_text(bytes(range(32, 64)).hex())
    fresh = MasterSecret.generate_file(new)
    name = "golden/" + read_header(golden).values["key_id"]
    storage.create(f"{keys}/{name}.fwmkey", golden)
    reseal = ("jobs.keys", "reseal", "--keys", str(keys), "--old-master-key", str(old), "--master-key", str(new))
    code, closing, said = job(*reseal)
    assert (code, closing["resealed"], closing["before"]) == (0, 1, 0), said
    sealed = storage.read(f"{keys}/{name}.fwmkey")
    before, after = TriggerSet.unseal(golden, MasterSecret.from_file(old)), TriggerSet.unseal(sealed, fresh)
    assert torch.equal(after.images, before.images)
    assert (after.key_id, after.created_at, after.coverage) == (before.key_id, before.created_at, before.coverage)
    with pytest.raises(FwmError, match="another master secret"):
        TriggerSet.unseal(sealed, MasterSecret.from_file(old))
    model_id, _, key_id = name.partition("/")
    committed_at(str(keys), model_id, key_id, fingerprint(sealed), [fresh.public_key])
    code, closing, said = job(*reseal)
    assert (code, closing["resealed"], closing["before"]) == (0, 0, 1), said
    assert storage.read(f"{keys}/{name}.fwmkey") == sealed
    assert job("jobs.keys", "public-key", "--master-key", str(new))[1] == {"public_key": fresh.public_key}
