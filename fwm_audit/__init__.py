"""Fragile watermarks for neural-network checkpoints: embedded without touching the model, audited by a fleet.

The data flow, and the modules in the order in which it passes them:

    embedding    a model and a secret key -> a trigger set
        key            secrets, derivation, sealed files
        generator      keyed noise and class pairs -> inputs (trained)
        target         the classifier on copies: float64, probes, variants
        folding        batch norms merged into convolutions, as a variant
        waking         units that no pair reaches yet, and the pull towards them
        pairs          inputs -> mirrored pairs at +-delta from a boundary
        calibration    noise -> delta, rungs, coverage, the final check
        datasheet      simulated edits -> detection shares
        yin2022        the published method, for comparison
        triggers       the trigger set in memory and in its sealed form
        task           what is asked of an embedding, what it tells, what it published
        peers          the processes that share the work of one embedding
        train          all of this as a Ray Train run
        releases       many models -> as many runs, several at a time
        commitment     which key was published when, signed

    audit        a catalog of checkpoints -> one record for each row
        catalog        rows -> entries
        storage        URIs -> bytes, create-only writes, one version or an error
        architectures  names -> modules, from allowed sources only
        confinement    what the system lets a worker hold and compute
        checkpoint     an untrusted file -> tensors
        weights        an architecture and tensors -> a float64 module, nothing held twice
        arithmetic     float64 where PyTorch is less exact, or far slower, than the processor
        verification   a model and a trigger set -> counted labels
        verdict        counted labels -> intact or tampered
        check          one entry -> one record
        records        the Parquet schema and a run's files
        plan           a catalog -> what a run is to audit, and what is left of it
        fleet          a plan -> a run: shards of records, signed manifest
        dispatcher     many entries -> exactly as many records, through Ray actors
        metrics        what Prometheus sees of it
        ledger         runs in their order, signed, and verified
        compaction     many small parts -> one file for each day

    report       the records of many runs -> what people and other tools want to see
        history        stored runs -> one table, with who vouches for it
        report         views.sql over a selection of it, keys' datasheets, advice
        page           one HTML page that needs nothing else
        exports        JSON, SARIF, verification summaries

    errors       every finding, with its stable code
    logs         lines as text or JSON
    webhook      the summary of a job, sent to whoever is to know

A module imports only from its own row or one above: pure (errors, key, catalog, verdict, records, task,
confinement, logs, webhook), torch (triggers to verification, architectures, weights), io (storage, checkpoint,
compaction, ledger, commitment, plan, history, report, page, exports), check, Ray (dispatcher, fleet, metrics, releases,
train).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwm_audit.embedding import embed as embed
    from fwm_audit.key import MasterSecret as MasterSecret
    from fwm_audit.key import SecretKey as SecretKey
    from fwm_audit.triggers import TriggerSet as TriggerSet
    from fwm_audit.verification import Verification as Verification
    from fwm_audit.verification import verify as verify

__version__ = "0.2.0.dev0"
__all__ = ["MasterSecret", "SecretKey", "TriggerSet", "Verification", "embed", "verify"]

_HOMES = {
    "MasterSecret": "key",
    "SecretKey": "key",
    "TriggerSet": "triggers",
    "Verification": "verification",
    "embed": "embedding",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when asked for: the driver of an audit runs without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
