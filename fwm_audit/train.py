"""Embedding as a Ray Train run: one model's generator trained data-parallel, its key published once.

Every worker loads the checkpoint and the master secret itself: Ray sees references only. What a run
keeps in its storage, to go on after a fault, is sealed like a key. `releases` starts these runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import fsspec
import pyarrow.fs
import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_actors, list_placement_groups
from ray.util.state.exception import RayStateApiException

from fwm_audit import logs, storage
from fwm_audit.architectures import input_shape
from fwm_audit.checkpoint import fit, open_checkpoint
from fwm_audit.commitment import commit
from fwm_audit.confinement import confine
from fwm_audit.embedding import embed
from fwm_audit.errors import (
    CheckpointError,
    EmbeddingError,
    ErrorCode,
    FwmError,
    KeyFileError,
    StorageError,
    UsageError,
)
from fwm_audit.key import MasterSecret, key_name, read_header
from fwm_audit.peers import Peers
from fwm_audit.task import Embedded, EmbedTask, Progress
from fwm_audit.triggers import TriggerSet
from fwm_audit.verdict import Verdict
from fwm_audit.verification import verify_copy
from fwm_audit.weights import load, skeleton

log = logging.getLogger(__name__)

_REPORT_EVERY_S: Final = 1.0
_FAILED: Final = "failed"
#: Times that a run starts its workers again after one of them, or its node, died.
_RESTARTS: Final = 5
_STATE: Final = "search.sealed"


def embed_model(task: EmbedTask) -> Embedded:
    """Watermark one model and publish its sealed key; on every rank of the group, if there is one.

    The key is verified against a second, fresh load of the checkpoint before it is published, and
    published create-only: a repetition of the same task finds the key of the first one and keeps it.

    Raises:
        FwmError: The checkpoint, the architecture or the model cannot be served.
        UsageError: Settings make no sense, or the master secret cannot be read here.
    """
    # Nodes differ in what they can read: where one cannot, the others must not wait for it.
    peers = Peers.current()
    master, (model, dtype, digest) = peers.together(lambda: (MasterSecret.from_file(task.master_key_file), _load(task)))
    shape = task.input_shape or input_shape(task.arch, model)
    if shape is None:
        raise UsageError(f"{task.arch} does not state the shape of its input: pass --input-shape, as in 1,28,28")
    secret = task.secret(master, digest)
    device = ray.train.torch.get_device() if ray.is_initialized() and torch.cuda.is_available() else torch.device("cpu")
    triggers = embed(
        model,
        secret=secret,
        model_id=task.model_id,
        input_shape=shape,
        pairs=task.pairs,
        coverage=task.coverage,
        method=task.method,
        variants=task.variants,
        input_range=task.input_range,
        device=device,
        arch=task.arch,
        checkpoint_sha256=digest,
        released=dtype,
        progress=_Reporter(task),
        keeper=_Kept(master, task.model_id, secret.key_id) if torch.distributed.is_initialized() else None,
    )

    def publish() -> Embedded | None:
        return _publish(task, triggers, master, device, dtype) if _rank() == 0 else None

    (published, *_) = peers.gather(peers.together(publish))
    assert isinstance(published, Embedded)
    return published


def _publish(task: EmbedTask, triggers: TriggerSet, master: MasterSecret, device: torch.device, dtype: str) -> Embedded:
    """What is under the key's name afterwards: this key once it verified its own checkpoint, or an earlier one."""
    sealed = triggers.seal(master)
    fresh, _, digest = _load(task)
    if digest != triggers.checkpoint_sha256:
        raise KeyFileError(ErrorCode.OBJECT_CHANGED, f"{task.checkpoint} was replaced during embedding: start again")
    reopened = TriggerSet.unseal(sealed, master)
    seen = verify_copy(fresh.to(device), reopened, "exact", variant=reopened.variant_for(dtype), device=device)
    if seen.verdict is not Verdict.INTACT:
        raise EmbeddingError(ErrorCode.PAIRS_NOT_FOUND, "the sealed key does not verify its own checkpoint")
    uri = storage.join(task.keys, key_name(task.model_id, triggers.key_id))
    if not (fresh_key := storage.create(uri, sealed)):
        log.info("%s: key %s was published before and is kept", task.model_id, triggers.key_id)
        sealed = storage.read(uri)
        triggers = TriggerSet.unseal(sealed, master)
    commit(task.keys, task.model_id, triggers.key_id, sealed, master)
    return Embedded.of(triggers, sealed, before=not fresh_key)


def train_model(task: EmbedTask, key_id: str, *, workers: int, gpu: bool, run_storage: str | None = None) -> Embedded:
    """`embed_model` as a Ray Train run, which survives the death of workers and nodes.

    The same task with the same storage goes on where an interrupted run of it stood.

    Args:
        task: The model.
        key_id: Of the key that it makes, see `look_up`.
        workers: Ray Train workers, of one CPU each.
        gpu: Whether each gets a GPU.
        run_storage: URI under which the run keeps its sealed state; None is a local folder that goes with the run.

    Raises:
        FwmError: As `embed_model`, from whichever worker failed first.
        UsageError: As `embed_model`.
    """
    # Ray's 60 s to start the workers are not enough where torch is read from a cold or a shared disk, and it
    # would start all over again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    with tempfile.TemporaryDirectory(prefix="fwm-embed-") as local:
        path, filesystem = _run_storage(run_storage, local)
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config=dataclasses.asdict(task),
            # Flags of coverage and gathered pairs travel between CPUs, gradients between GPUs.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpu,
                resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpu else {}),
            ),
            run_config=RunConfig(
                name=_run_name(task, key_id),
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=_RESTARTS),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )
        try:
            result = _fit(trainer, task.model_id)
        except Exception as error:  # noqa: BLE001 - raised again, as the worker's own finding if it is one
            raise _cause(error) from None
    metrics = result.metrics or {}
    if _FAILED in metrics:
        code, message = metrics[_FAILED]
        raise FwmError(ErrorCode(code), message) if code else UsageError(message)
    if run_storage is not None:
        _forget(storage.join(run_storage, _run_name(task, key_id)))
    return Embedded(**{field.name: metrics[field.name] for field in dataclasses.fields(Embedded)})


def _fit(trainer: TorchTrainer, model_id: str) -> ray.train.Result:
    """The result of a run, begun again under its name where Ray Train's controller gave up.

    Ray Train 2.60 counts the death of a worker among its retries, but for one between the start of
    its group and that of its loop: that ends the controller.
    """
    for _ in range(_RESTARTS):
        try:
            return trainer.fit()
        except ControllerError as error:
            if not isinstance(error.controller_failure, RayActorError):
                raise
        log.warning("%s: a worker died while its group was started; the run goes on", model_id)
        if ray.is_initialized():
            _free_groups_of_the_dead()
    return trainer.fit()


def _free_groups_of_the_dead(patience_s: float = 10.0) -> None:
    """Remove this job's placement groups in which workers lived and none does.

    Ray Train 2.60 forgets the group of workers whose start failed. Its CPUs would stay taken until the
    job ends, and where they are the last ones the next attempt waits for them.
    """
    job = ray.get_runtime_context().get_job_id()
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            groups = list_placement_groups(filters=[("creator_job_id", "=", job)], limit=10_000)
            held = {group.placement_group_id for group in groups if group.state != "REMOVED"}
            actors = list_actors(filters=[("job_id", "=", job)], detail=True, limit=10_000)
        except RayStateApiException as error:
            log.warning("cannot list placement groups: %s", error)
            return
        dead = {actor.placement_group_id for actor in actors} - {
            actor.placement_group_id for actor in actors if actor.state != "DEAD"
        }
        if left := held & dead:
            for group in left:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
            return
        time.sleep(1.0)  # those of the group that still live end with the controller


def _train_loop(config: dict[str, Any]) -> None:
    confine(None)  # no core file with triggers in it
    task = EmbedTask(**config)
    logs.configure("%(message)s")
    logs.bind(model_id=task.model_id)
    board: Any = ray.get_actor(task.board) if task.board is not None else None
    metrics: dict[str, Any] | None = ray.get(board.finding.remote(task.model_id)) if board is not None else None
    if metrics is None:
        try:
            metrics = dataclasses.asdict(embed_model(task))
        except (FwmError, UsageError) as error:
            metrics = _failure(error)
            if ray.train.get_context().get_world_size() > 1 and not error.agreed:
                if board is not None:  # the next attempt ends with this before it computes anything
                    ray.get(board.found.remote(task.model_id, metrics))
                raise  # the other ranks may wait for this one: only the end of the group frees them
    # Ray Train keeps the metrics of a report only together with a checkpoint: this one holds them again.
    _report(metrics, "embedded.json", json.dumps(metrics).encode())


def _failure(error: FwmError | UsageError) -> dict[str, Any]:
    """As a result, and not as an exception, which Ray Train would take for a fault and print as tracebacks."""
    return {_FAILED: [error.code.value if isinstance(error, FwmError) else "", str(error)]}


def _report(metrics: dict[str, Any], name: str, data: bytes) -> None:
    """Store a file in the place of the run's former one; every rank has to call."""
    with tempfile.TemporaryDirectory() as folder:
        if _rank() == 0:
            (Path(folder) / name).write_bytes(data)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if _rank() == 0 else None)


class _Kept:
    """The state of the search in the run's storage, sealed, as it tells triggers and labels."""

    def __init__(self, master: MasterSecret, model_id: str, key_id: str) -> None:
        self.master, self.header = master, {"model_id": model_id, "key_id": key_id, "state": 1}

    def load(self) -> bytes | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            path = Path(folder) / _STATE
            if not path.exists():
                return None
            try:
                sealed = path.read_bytes()
                state = self.master.open(sealed)
            except KeyFileError as error:
                log.warning("the state of an interrupted run cannot be used, starting anew: %s", error.message)
                return None
        found = read_header(sealed).values
        # Of this model, this file and these settings: all of them shape the key's id.
        if {name: found.get(name) for name in self.header} != self.header:
            return None
        if _rank() == 0:
            log.warning("%s: going on from the state of an interrupted run", self.header["model_id"])
        return state

    def save(self, state: bytes) -> None:
        _report({"state": len(state)}, _STATE, self.master.seal(state, self.header) if _rank() == 0 else b"")


def _load(task: EmbedTask) -> tuple[torch.nn.Module, str, str]:
    """The released model exactly as an audit loads it, its file's dtype and SHA-256."""
    model = skeleton(task.arch, task.allowed_factories)
    with storage.fetch(task.checkpoint, base=task.base) as fetched:
        checkpoint = open_checkpoint(fetched.path)
        if task.sha256 not in {None, fetched.sha256}:
            raise CheckpointError(
                ErrorCode.CHECKPOINT_OTHER,
                f"{task.checkpoint} is not the file that the list of models names: its SHA-256 differs",
            )
        return load(model, fit(checkpoint, model.state_dict())), checkpoint.dtype, fetched.sha256


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _run_name(task: EmbedTask, key_id: str) -> str:
    """Ray Train resumes a run of the same name silently: the name says all that makes runs the same."""
    settings = hashlib.sha256(json.dumps([task.model_id, task.checkpoint, task.settings()]).encode()).hexdigest()[:16]
    return f"fwm-embed-{re.sub(r'[^A-Za-z0-9]+', '-', task.model_id)[:60]}-{key_id}-{settings}"


def _run_storage(uri: str | None, local: str) -> tuple[str, pyarrow.fs.FileSystem | None]:
    if uri is None:
        return local, None
    filesystem, path = fsspec.url_to_fs(uri)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))


def _forget(uri: str) -> None:
    """Delete what a finished run kept: its key is published, and nothing goes on from there."""
    try:
        storage.remove(uri)
    except StorageError as error:  # litter at worst
        log.warning("what a finished run kept could not be removed: %s", error.message)


def _cause(error: BaseException) -> BaseException:
    """The worker's own finding inside what Ray wraps around it."""
    failures = getattr(error, "worker_failures", None)
    inner = [*failures.values()] if isinstance(failures, dict) else []
    for candidate in [*inner, getattr(error, "cause", None), error.__cause__]:
        if isinstance(candidate, FwmError | UsageError):
            return candidate
        if isinstance(candidate, BaseException):
            found = _cause(candidate)
            if isinstance(found, FwmError | UsageError):
                return found
    return error


class _Reporter:
    """Tells the board of rank 0's progress, once a second at most and at the end of each stage."""

    def __init__(self, task: EmbedTask) -> None:
        self.model_id = task.model_id
        self.board = ray.get_actor(task.board) if task.board is not None and _rank() == 0 else None
        self.told = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self.board is not None and (progress.done == progress.total or now - self.told > _REPORT_EVERY_S):
            self.told = now
            self.board.tell.remote(self.model_id, progress)
