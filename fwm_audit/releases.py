"""Watermark many released models: as many outcomes as models, each from a Ray Train run of its own.

    look up   which models carry a key of these settings already (Ray tasks)
    train     several runs at a time, as many as the cluster has room for
    outcome   published, published before, or failed with its reason; one model's failure is its own

Runs are started from threads of the driver: a run waits for its workers, it computes nothing itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Final

import ray
import ray.autoscaler.sdk
from ray.exceptions import RayError, RayTaskError

from fwm_audit import storage
from fwm_audit.commitment import commit
from fwm_audit.errors import ErrorCode, FwmError, StorageError, UsageError
from fwm_audit.key import MasterSecret, key_name
from fwm_audit.task import MOST_WORKERS, Embedded, EmbedTask, Progress

log = logging.getLogger(__name__)

#: A task whose worker died is tried again; a model that cannot be looked up three times has failed.
_RETRIES: Final = 2
_POLL_S: Final = 2.0
_SAY_EVERY_S: Final = 30.0

#: Called with what each model in work is doing now.
Watch = Callable[[Mapping[str, Progress]], None]


@dataclass(frozen=True, slots=True)
class Failed:
    """A model that could not be watermarked, with the code and the sentence that say why."""

    model_id: str
    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class Room:
    """How the cluster is shared out: runs at a time, workers of each, and whether each of them has a GPU."""

    parallel: int
    workers: int
    gpu: bool


class Board:
    """The Ray actor to which workers tell their progress and their findings; it holds those of each model."""

    def __init__(self) -> None:
        self._latest: dict[str, Progress] = {}
        self._findings: dict[str, dict[str, Any]] = {}

    def tell(self, model_id: str, progress: Progress) -> None:
        """Note what a model is doing."""
        self._latest[model_id] = progress

    def latest(self) -> dict[str, Progress]:
        """What each model was doing when it was last heard of."""
        return self._latest

    def found(self, model_id: str, failure: dict[str, Any]) -> None:
        """Note why a model cannot be watermarked: starting its workers again would not help."""
        self._findings.setdefault(model_id, failure)

    def finding(self, model_id: str) -> dict[str, Any] | None:
        """Why a model cannot be watermarked, if some worker found that."""
        return self._findings.get(model_id)


def check_run_storage(uri: str) -> None:
    """Make sure that runs can keep their state under a URI, before anything is computed for it.

    Raises:
        UsageError: They cannot.
    """
    probe = storage.join(uri, f"fwm-embed-probe-{uuid.uuid4().hex}")
    try:
        storage.replace(probe, b"")
        storage.remove(probe)
    except StorageError as error:
        raise UsageError(f"--storage has to take what unfinished runs keep, and does not: {error.message}") from None


def look_up(task: EmbedTask) -> tuple[str, Embedded | None]:
    """Id of the key that a task makes, and what was published under that id before, if anything.

    Raises:
        FwmError: The checkpoint or a key cannot be read.
        UsageError: The master secret cannot be read here.
    """
    master = MasterSecret.from_file(task.master_key_file)
    digest = task.sha256
    if digest is None:
        with storage.fetch(task.checkpoint, base=task.base) as fetched:
            digest = fetched.sha256
    key_id = task.secret(master, digest).key_id
    uri = storage.join(task.keys, key_name(task.model_id, key_id))
    if not storage.exists(uri):
        return key_id, None
    # Here and below, as a night on which nothing is new needs no torch: it takes seconds to import.
    from fwm_audit.triggers import TriggerSet  # noqa: PLC0415

    sealed = storage.read(uri)
    commit(task.keys, task.model_id, key_id, sealed, master)  # whoever published it may have died before
    return key_id, Embedded.of(TriggerSet.unseal(sealed, master), sealed, before=True)


def watermark(
    tasks: Sequence[EmbedTask],
    *,
    workers: int | None = None,
    parallel: int | None = None,
    run_storage: str | None = None,
    patience_s: float = 0.0,
    watch: Watch = lambda _: None,
) -> Iterator[tuple[EmbedTask, Embedded | Failed]]:
    """Each task with its outcome, as they come.

    Args:
        tasks: Models; one that repeats another (same model, same file) fails as a duplicate.
        workers: Ray Train workers of each model; None is what the cluster has room for. Their number does not
            change the triggers.
        parallel: Models at a time; None is as many as there is room for.
        run_storage: As for `train_model`.
        patience_s: Seconds to wait for a cluster that is too small to grow.
        watch: Told of progress every few seconds.

    Raises:
        UsageError: The cluster has no room for one model or needs a common storage, or the master secret cannot
            be read on it.
    """
    # Looked up before there is room for a whole run: a night on which nothing is new needs no GPU.
    ids: dict[int, str] = {}
    for number, found in _look_up(tasks):
        if isinstance(found, str):
            ids[number] = found
        else:
            yield tasks[number], found
    if not ids:
        return
    from fwm_audit.train import train_model  # noqa: PLC0415

    if run_storage is None and sum(node["Alive"] for node in ray.nodes()) > 1:
        raise UsageError(
            "the cluster has several nodes: name a --storage that all of them reach, as in s3://acme/train"
        )
    if workers is None and any(task.method == "yin2022" for task in tasks):
        workers = 1  # it trains one generator on all its triggers
    room = find_room(workers, len(ids), parallel, patience_s)
    log.info(
        "%d models to watermark, %d at a time, each by %d worker(s) with a CPU%s",
        len(ids), room.parallel, room.workers, " and a GPU" if room.gpu else "",
    )  # fmt: skip
    name = f"fwm-board-{uuid.uuid4().hex}"
    board: Any = ray.remote(num_cpus=0, max_restarts=-1)(Board).options(name=name).remote()

    def run(number: int) -> tuple[EmbedTask, Embedded | Failed]:
        task = dataclasses.replace(tasks[number], board=name)
        try:
            outcome: Embedded | Failed = train_model(
                task, ids[number], workers=room.workers, gpu=room.gpu, run_storage=run_storage
            )
        except Exception as error:  # noqa: BLE001 - one model's failure, whatever it is, is no other's
            outcome = _failed(task, error)
        return tasks[number], outcome

    pool = ThreadPoolExecutor(room.parallel)
    try:
        waiting: set[Future[tuple[EmbedTask, Embedded | Failed]]] = {pool.submit(run, number) for number in ids}
        in_work = {tasks[number].model_id for number in ids}
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for future in done:
                task, outcome = future.result()
                in_work.discard(task.model_id)
                yield task, outcome
            with contextlib.suppress(RayError):
                said = ray.get(board.latest.remote(), timeout=_POLL_S)
                watch({model: progress for model, progress in said.items() if model in in_work})
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _look_up(tasks: Sequence[EmbedTask]) -> Iterator[tuple[int, str | Embedded | Failed]]:
    """For each task the id of the key to make, or its outcome where that is known already."""
    remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(look_up)
    limit = max(2, int(ray.cluster_resources().get("CPU", 1)))
    numbers = iter(range(len(tasks)))
    asked: dict[Any, int] = {}
    keys: dict[tuple[str, str], int] = {}
    while True:
        for number in numbers:
            asked[remote.remote(tasks[number])] = number
            if len(asked) >= 2 * limit:
                break
        if not asked:
            return
        (ready, *_), _ = ray.wait(list(asked))
        number = asked.pop(ready)
        task = tasks[number]
        try:
            key_id, published = ray.get(ready)
        except Exception as error:  # noqa: BLE001 - as above
            if isinstance(finding := _finding(error), UsageError):
                raise finding from None  # the master secret: no model could be watermarked
            yield number, _failed(task, error)
            continue
        if (task.model_id, key_id) in keys:
            message = "another row of the list is the same model with the same file: it is watermarked once"
            yield number, Failed(task.model_id, ErrorCode.CATALOG_DUPLICATE, message)
            continue
        keys[task.model_id, key_id] = number
        yield number, published or key_id


def find_room(workers: int | None, models: int, parallel: int | None, patience_s: float = 0.0) -> Room:
    """How many runs fit at a time, and with how many workers if that is left open.

    Each worker has one CPU: the number of threads would change the triggers, the number of workers does not.

    Raises:
        UsageError: There is no room for one run, and after `patience_s` seconds still none.
    """
    least = workers or 1
    deadline = time.monotonic() + patience_s
    said = -_SAY_EVERY_S
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpu = sum(int(node.get("GPU", 0)) for node in nodes) >= least
        fits = _places(nodes, gpu=gpu)
        if fits >= least:
            break
        if time.monotonic() > deadline:
            raise UsageError(
                f"the cluster has room for {fits} of {least} workers: ask for fewer --workers, start more nodes, "
                "or let this wait for them with --wait SECONDS"
            )
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            log.info("the cluster has room for %d of %d workers: waiting for more nodes", fits, least)
            # An autoscaler starts nodes for what is asked of it.
            ray.autoscaler.sdk.request_resources(bundles=[{"CPU": 1}] * least)
        time.sleep(_POLL_S)
    runs = min(parallel or models, models, fits // least)
    return Room(runs, workers or min(fits // runs, MOST_WORKERS), gpu)


def _places(nodes: Iterable[Mapping[str, float]], *, gpu: bool) -> int:
    """Workers of a CPU (and a GPU) that these nodes have place for."""
    return sum(int(min(node.get("CPU", 0), node.get("GPU", 0)) if gpu else node.get("CPU", 0)) for node in nodes)


def _finding(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error


def _failed(task: EmbedTask, error: BaseException) -> Failed:
    finding = _finding(error)
    if isinstance(finding, FwmError):
        return Failed(task.model_id, finding.code, finding.message)
    if isinstance(finding, UsageError):
        return Failed(task.model_id, ErrorCode.SETTINGS, str(finding))
    ends = [finding, getattr(finding, "controller_failure", None), *getattr(finding, "worker_failures", {}).values()]
    if any(isinstance(end, RayError) and not isinstance(end, RayTaskError) for end in ends):
        message = "its workers died again and again: look at their nodes' memory and at the model"
        return Failed(task.model_id, ErrorCode.WORKER_DIED, message)
    # Its message stays unsaid: it could quote triggers.
    return Failed(task.model_id, ErrorCode.INTERNAL, f"{type(finding).__name__} in a worker; its log says where")
