"""What Prometheus sees of audits and embeddings, through the endpoint that Ray has on every node.

    fwm_audit_models_total{verdict, error_code}      records of runs, those that a resumed one had, too; the code is ""
                                                     where there is none
    fwm_audit_carried_total                          those of them that were carried forward
    fwm_audit_bytes_total                            of the checkpoints that were read
    fwm_audit_stage_seconds_total{stage}             of workers: fetch, load, verify
    fwm_audit_runs_total{outcome}                    complete, incomplete
    fwm_audit_queue, fwm_audit_actors{state}         while a run is in work: not begun; starting, busy
    fwm_embed_models_total{outcome, error_code}      published, skipped, failed

Ray puts `ray_` before each name. Every label has few values, all of them from this code: a model or a URI as a label
would be a new time series each, and would tell whoever may read dashboards what there is.

Ray adds the driver's WorkerId, so that each run has series of its own: counters start from nothing with it, and keep
what they had at its end for as long as its node lives; gauges go some seconds later.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from ray.util import metrics

from fwm_audit.records import AuditRecord

#: A record costs the driver some additions; Ray, to which a call takes longer, is told now and then.
_TELL_EVERY_S: Final = 1.0
_STAGES: Final = ("fetch", "load", "verify")
log = logging.getLogger(__name__)


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """What an audit found must not depend on whether it could be counted."""
    try:
        yield
    except Exception:
        log.exception("the metrics were not told")


class AuditMeter:
    """Counts of one run as they grow; needs `ray.init()` to have been called."""

    def __init__(self) -> None:
        self._models = metrics.Counter("fwm_audit_models_total", "Records made.", ("verdict", "error_code"))
        self._carried = metrics.Counter("fwm_audit_carried_total", "Records carried forward from an earlier run.")
        self._bytes = metrics.Counter("fwm_audit_bytes_total", "Bytes of checkpoints read.")
        self._seconds = metrics.Counter("fwm_audit_stage_seconds_total", "Seconds of workers by stage.", ("stage",))
        self._runs = metrics.Counter("fwm_audit_runs_total", "Ends of audits.", ("outcome",))
        self._queue = metrics.Gauge("fwm_audit_queue", "Models that no worker has begun.")
        self._actors = metrics.Gauge("fwm_audit_actors", "Workers by state.", ("state",))
        self._records: Counter[tuple[str, str]] = Counter()
        self._stages = dict.fromkeys(_STAGES, 0.0)
        self._read = self._forward = 0
        self._told = 0.0

    def count(self, record: AuditRecord) -> None:
        """Add one record of this run."""
        self._records[record.verdict, record.error_code or ""] += 1
        if record.carried_from is not None:
            self._forward += 1
            return  # its bytes and seconds were those of another night
        self._read += record.size_bytes or 0
        self._stages["fetch"] += record.fetch_ms or 0.0
        self._stages["load"] += record.load_ms or 0.0
        self._stages["verify"] += record.verify_ms or 0.0

    def add(self, counted: Mapping[tuple[str, str], int]) -> None:
        """Add records that were made before, by their verdict and error code."""
        self._records.update(counted)

    @property
    def due(self) -> bool:
        """Whether it is time to `tell`."""
        return time.monotonic() - self._told > _TELL_EVERY_S

    def tell(self, *, queue: int, starting: int, busy: int) -> None:
        """Hand what was counted to Ray, with the state of the dispatcher."""
        self._told = time.monotonic()
        records, self._records = self._records, Counter()
        stages, self._stages = self._stages, dict.fromkeys(_STAGES, 0.0)
        (read, forward), self._read, self._forward = (self._read, self._forward), 0, 0
        with _harmless():
            self._queue.set(queue)
            self._actors.set(starting, {"state": "starting"})
            self._actors.set(busy, {"state": "busy"})
            for (verdict, code), models in records.items():
                if models:
                    self._models.inc(models, {"verdict": verdict, "error_code": code})
            if forward:
                self._carried.inc(forward)
            # What a worker says of itself could be anything.
            if read > 0:
                self._bytes.inc(read)
            for stage, milliseconds in stages.items():
                if milliseconds > 0:
                    self._seconds.inc(milliseconds / 1e3, {"stage": stage})

    def close(self, *, complete: bool) -> None:
        """Count the run itself, with whatever was not told yet."""
        self.tell(queue=0, starting=0, busy=0)
        with _harmless():
            self._runs.inc(1, {"outcome": "complete" if complete else "incomplete"})


def count_embedded(outcome: str, error_code: str = "") -> None:
    """Add one model that `jobs.embed` is done with.

    Args:
        outcome: `published`, `skipped` (it carried its key before) or `failed`.
        error_code: Why it failed.
    """
    with _harmless():
        counter = metrics.Counter("fwm_embed_models_total", "Models done with.", ("outcome", "error_code"))
        counter.inc(1, {"outcome": outcome, "error_code": error_code})
