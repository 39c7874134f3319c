"""Embedding as a Ray Train job: one model's generator trained data-parallel, its key published once.

Every worker loads the checkpoint and the master secret itself: Ray sees references only. The
function that trains knows nothing of Ray but `prepare_model`; see `embedding.embed`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import fsspec
import pyarrow.fs
import ray
import ray.train
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model

from fwm_audit import storage
from fwm_audit.architectures import input_shape
from fwm_audit.check import load, skeleton
from fwm_audit.checkpoint import fit, open_checkpoint
from fwm_audit.embedding import embed
from fwm_audit.errors import EmbeddingError, ErrorCode, FwmError, KeyFileError, UsageError
from fwm_audit.key import MasterSecret, fingerprint, key_name
from fwm_audit.peers import Progress
from fwm_audit.triggers import TriggerSet
from fwm_audit.verdict import Verdict
from fwm_audit.verification import verify_copy

log = logging.getLogger(__name__)

_REPORT_EVERY: Final = 10
_FAILED: Final = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedTask:
    """One model to watermark: references and settings, no secret.

    Attributes:
        checkpoint: URI of the released checkpoint; only read.
        keys: URI under which the sealed key is published.
        input_shape: Shape of one input; None takes what the architecture states.
        base: Folder against which relative local URIs are resolved.
        master_key_file: Path of the master secret on the workers; None takes FWM_MASTER_KEY_FILE.
    """

    model_id: str
    checkpoint: str
    arch: str
    keys: str
    base: str
    method: str = "mirror"
    pairs: int = 16
    coverage: float | None = None
    variants: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    input_range: tuple[float, float] = (-1.0, 1.0)
    allowed_factories: tuple[str, ...] = ()
    master_key_file: str | None = None

    def settings(self) -> str:
        """JSON of what shapes the triggers, apart from model and secret."""
        names = ("arch", "method", "pairs", "coverage", "variants", "input_shape", "input_range")
        return json.dumps({name: getattr(self, name) for name in names}, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Embedded:
    """What was published: no secret in it.

    Attributes:
        arithmetic: `float64`, or `float32` where the model casts to that inside and is checked more coarsely.
        datasheet: By simulated edit, [detected, tried].
    """

    model_id: str
    key_id: str
    fingerprint: str
    pairs: int
    coverage: float
    delta: float
    noise: float
    checkpoint_sha256: str
    key_bytes: int
    arithmetic: str
    datasheet: dict[str, list[int]]


def embed_model(task: EmbedTask) -> Embedded:
    """Watermark one model and publish its sealed key; on every rank of the group, if there is one.

    The key is verified against a second, fresh load of the checkpoint before it is published, and
    published create-only: a repetition of the same task finds the key of the first one and keeps it.

    Raises:
        FwmError: The checkpoint, the architecture or the model cannot be served.
        UsageError: Settings make no sense, or the master secret cannot be read here.
    """
    master = MasterSecret.from_file(task.master_key_file)
    model, dtype, digest = _load(task)
    shape = task.input_shape or input_shape(task.arch, model)
    if shape is None:
        raise UsageError(f"{task.arch} does not state the shape of its input: pass --input-shape, as in 1,28,28")
    device = ray.train.torch.get_device() if ray.is_initialized() and torch.cuda.is_available() else torch.device("cpu")
    triggers = embed(
        model,
        secret=master.secret_key(task.model_id, digest, task.settings()),
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
        prepare=prepare_model if torch.distributed.is_initialized() else None,
        progress=_Reporter(task.model_id),
    )
    uri = storage.join(task.keys, key_name(task.model_id, triggers.key_id))
    sealed = triggers.seal(master)
    if _rank() == 0:
        fresh, _, fresh_digest = _load(task)
        if fresh_digest != digest:
            raise KeyFileError(
                ErrorCode.OBJECT_CHANGED, f"{task.checkpoint} was replaced during embedding: start again"
            )
        reopened = TriggerSet.unseal(sealed, master)
        seen = verify_copy(fresh.to(device), reopened, "exact", variant=reopened.variant_for(dtype), device=device)
        if seen.verdict is not Verdict.INTACT:
            raise EmbeddingError(ErrorCode.PAIRS_NOT_FOUND, "the sealed key does not verify its own checkpoint")
        if not storage.create(uri, sealed):
            log.info("%s: key %s was published before and is kept", task.model_id, triggers.key_id)
            sealed = storage.read(uri)
            triggers = TriggerSet.unseal(sealed, master)
    exact = triggers.rungs[0]
    return Embedded(
        model_id=task.model_id,
        key_id=triggers.key_id,
        fingerprint=fingerprint(sealed),
        pairs=triggers.pairs,
        coverage=triggers.coverage.total,
        delta=exact.delta,
        noise=exact.noise,
        checkpoint_sha256=digest,
        key_bytes=len(sealed),
        arithmetic=triggers.arithmetic,
        datasheet={edit: [seen, tries] for edit, (seen, tries) in triggers.datasheet.items()},
    )


def embed_on_cluster(task: EmbedTask, *, workers: int, run_storage: str | None = None) -> Embedded:
    """`embed_model` as a Ray Train run with `workers` workers, on GPUs where the cluster has that many.

    Raises:
        FwmError: As `embed_model`, from whichever worker failed first.
        UsageError: As `embed_model`.
    """
    # Ray's 60 s to start the workers are not enough where torch is read from a cold or a shared disk, and it
    # would start all over again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0) >= workers
    cpus = max(1, math.floor(resources.get("CPU", 1) / workers))
    path, filesystem = _run_storage(run_storage)
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config=dataclasses.asdict(task),
        # Flags of coverage and gathered pairs travel between CPUs, gradients between GPUs.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpus else {}),
        ),
        run_config=RunConfig(
            name=_run_name(task),
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:  # noqa: BLE001 - raised again, as the worker's own finding if it is one
        raise _cause(error) from None
    metrics = result.metrics or {}
    if _FAILED in metrics:
        code, message = metrics[_FAILED]
        raise FwmError(ErrorCode(code), message) if code else UsageError(message)
    return Embedded(**{field.name: metrics[field.name] for field in dataclasses.fields(Embedded)})


def _train_loop(config: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        metrics = dataclasses.asdict(embed_model(EmbedTask(**config)))
    except (FwmError, UsageError) as error:
        if ray.train.get_context().get_world_size() > 1:
            raise  # the other ranks may wait for this one: only the end of the group frees them
        # As a result, and not as an exception, which Ray Train would print as three tracebacks.
        metrics = {_FAILED: [error.code.value if isinstance(error, FwmError) else "", str(error)]}
    # Ray Train keeps the metrics of a report only together with a checkpoint: this one holds them again.
    with tempfile.TemporaryDirectory() as folder:
        if _rank() == 0:
            (Path(folder) / "embedded.json").write_text(json.dumps(metrics))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if _rank() == 0 else None)


def _load(task: EmbedTask) -> tuple[torch.nn.Module, str, str]:
    """The released model exactly as an audit loads it, its file's dtype and SHA-256."""
    model = skeleton(task.arch, task.allowed_factories)
    with storage.fetch(task.checkpoint, base=task.base) as fetched:
        checkpoint = open_checkpoint(fetched.path)
        load(model, fit(checkpoint, model.state_dict()))
        return model, checkpoint.dtype, fetched.sha256


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _run_name(task: EmbedTask) -> str:
    """Ray Train resumes a run of the same name silently: the name says all that makes runs the same."""
    settings = hashlib.sha256(json.dumps([task.checkpoint, task.settings()]).encode()).hexdigest()[:16]
    return f"fwm-embed-{re.sub(r'[^A-Za-z0-9]+', '-', task.model_id)[:60]}-{settings}"


def _run_storage(uri: str | None) -> tuple[str, pyarrow.fs.FileSystem | None]:
    if uri is None:
        return tempfile.mkdtemp(prefix="fwm-embed-"), None
    filesystem, path = fsspec.url_to_fs(uri)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))


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
    """Progress as log lines of rank 0: each stage once, and every tenth step of the long ones."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id

    def __call__(self, progress: Progress) -> None:
        if _rank() == 0 and (progress.done in {0, 1, progress.total} or progress.done % _REPORT_EVERY == 0):
            loss = "" if progress.loss is None else f", loss {progress.loss:.3f}"
            log.info("%s: %s %d/%d%s", self.model_id, progress.stage, progress.done, progress.total, loss)
