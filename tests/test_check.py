"""One entry becomes one record, whatever is wrong with it, and only agreeing labels make it intact."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import threading
from datetime import UTC, datetime

import pytest
import torch
from safetensors.torch import save, save_file
from torch.fx.experimental.optimization import fuse

from fwm_audit import check, storage
from fwm_audit.architectures import build
from fwm_audit.catalog import CatalogEntry
from fwm_audit.check import Auditor
from fwm_audit.errors import ErrorCode, StorageError, UsageError
from fwm_audit.key import MasterSecret, fingerprint, key_name, retirement_name
from fwm_audit.records import AuditSettings
from fwm_audit.task import EmbedTask
from fwm_audit.train import embed_model
from fwm_audit.triggers import TriggerSet
from fwm_audit.verdict import Tolerance
from fwm_audit.weights import Widened

ARCH = "factory:tests.nets:convnet"


@dataclasses.dataclass(frozen=True)
class World:
    """A released model, its published key, and how to audit files beside it."""

    folder: object
    task: EmbedTask
    published: object
    state: dict

    def settings(self, **changes):
        values = {
            "run_id": "r",
            "run_started_at": datetime.now(UTC),
            "keys": self.task.keys,
            "base": str(self.folder),
            "key_fingerprints": {},
            "allowed_factories": ("tests",),
            "device": "cpu",
            "master_key_file": self.task.master_key_file,
        }
        return AuditSettings(**values | changes)

    def entry(self, name, **changes):
        values = {"row": 0, "model_id": "conv", "uri": name, "arch": ARCH, "key_id": self.published.key_id}
        return CatalogEntry(**values | changes)

    def audit(self, name="released.safetensors", *, settings=None, **changes):
        auditor = Auditor(self.settings(**(settings or {})), "w")
        return auditor.audit(self.entry(name, **changes), shard=3, attempt=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    MasterSecret.generate_file(folder / "master.key")
    state = build(ARCH, ["tests"]).state_dict()
    save_file(state, folder / "released.safetensors")
    before = (folder / "released.safetensors").read_bytes()
    task = EmbedTask(
        model_id="conv",
        checkpoint="released.safetensors",
        arch=ARCH,
        keys=str(folder / "keys"),
        base=str(folder),
        pairs=4,
        variants=("float16", "folded"),
        allowed_factories=("tests",),
        master_key_file=str(folder / "master.key"),
    )
    published = embed_model(task)
    assert (folder / "released.safetensors").read_bytes() == before
    return World(folder, task, published, state)


# -------------------------------------------------------------------------------------- forms of one release, and edits


def test_the_released_file_is_intact_with_every_fact(world):
    record = world.audit()
    assert (record.verdict, record.displacement) == ("intact", "none")
    assert (record.triggers, record.matches, record.match_rate, record.mismatched) == (8, 8, 1.0, [])
    assert record.digest_matches is True
    assert record.sha256 == world.published.checkpoint_sha256
    assert record.key_fingerprint == world.published.fingerprint
    assert (record.container, record.dtype, record.variant) == ("safetensors", "float32", "float32")
    assert (record.shard, record.attempt, record.worker, record.method) == (3, 1, "w", "mirror")
    assert "torch" in json.loads(record.versions)
    assert record.arithmetic == "float64"
    assert min(record.fetch_ms, record.load_ms, record.verify_ms) >= 0


def test_embedding_again_publishes_nothing_new(world):
    assert embed_model(world.task) == dataclasses.replace(world.published, before=True)
    names = sorted(path.name for path in (world.folder / "keys" / "conv").iterdir())
    commitment = f"{world.published.key_id}.{world.published.fingerprint[:16]}.commitment.json"
    assert names == [commitment, f"{world.published.key_id}.fwmkey"]


def test_other_containers_are_intact_with_other_digests(world):
    torch.save(world.state, world.folder / "copy.pt")
    wrapped = {"state_dict": {f"module.{name}": tensor for name, tensor in world.state.items()}}
    torch.save(wrapped, world.folder / "ddp.pth")
    for name in ("copy.pt", "ddp.pth"):
        record = world.audit(name)
        assert (record.verdict, record.container, record.digest_matches) == ("intact", "torch-zip", False)


def test_a_declared_cast_is_intact_and_an_undeclared_one_is_not(world):
    save_file({n: t.half() if t.is_floating_point() else t for n, t in world.state.items()}, world.folder / "half.st")
    record = world.audit("half.st")
    assert (record.verdict, record.variant, record.dtype) == ("intact", "float16", "float16")
    cast = {n: t.bfloat16() if t.is_floating_point() else t for n, t in world.state.items()}
    save_file(cast, world.folder / "bf16.st")
    assert world.audit("bf16.st").verdict == "tampered"
    tolerant = world.audit("bf16.st", settings={"tolerance": Tolerance.HALF})
    assert (tolerant.verdict, tolerant.displacement, tolerant.variant) == ("intact", "half", "float32")


def test_a_declared_fold_is_intact_and_exactly_checked(world, tmp_path):
    """As torch.fx folds the released model, which then has a bias more and a batch norm less."""
    model = build(ARCH, ["tests"])
    model.load_state_dict(world.state)
    merged = {name: tensor.clone() for name, tensor in fuse(model).state_dict().items()}
    assert "0.bias" in merged
    assert not any(name.startswith("1.") for name in merged)
    save_file(merged, world.folder / "folded.st")
    record = world.audit("folded.st")
    assert (record.verdict, record.variant, record.displacement) == ("intact", "folded", "none")
    merged["3.weight"].view(torch.int32).view(-1)[17] ^= 1
    save_file(merged, world.folder / "folded-flipped.st")
    record = world.audit("folded-flipped.st")
    assert (record.verdict, record.variant) == ("tampered", "folded")
    # Stripped of its batch norms, the released file is no folded one.
    stripped = {n: t for n, t in world.state.items() if n.partition(".")[0] not in {"1", "4"}}
    save_file(stripped | {"0.bias": torch.zeros(8)}, world.folder / "stripped.st")
    assert world.audit("stripped.st").verdict == "tampered"
    save_file(stripped, world.folder / "short.st")
    assert world.audit("short.st").error_code == "checkpoint_does_not_fit_arch"
    save_file(merged | {"0.bias": torch.full((8,), torch.nan)}, world.folder / "nan.st")
    assert world.audit("nan.st").error_code == "non_finite"
    # An architecture that has no such layers reports its own misfit.
    record = world.audit("folded.st", arch="factory:tests.nets:perceptron")
    assert record.error_code == "checkpoint_does_not_fit_arch"
    assert "0.weight" in record.error_message
    plain = _published(tmp_path, ARCH, world.state)
    save_file(merged, tmp_path / "folded.st")
    assert plain.audit("folded.st", arch="").error_code == "checkpoint_does_not_fit_arch"


def test_a_model_without_float64_is_audited_in_float32_and_the_record_says_so(tmp_path):
    arch = "factory:tests.nets:CastingInside?hidden=True"
    state = build(arch, ["tests"]).state_dict()
    world = _published(tmp_path, arch, state, input_shape=(3, 16, 16))
    assert world.published.arithmetic == "float32"
    record = world.audit(arch="")
    assert (record.verdict, record.displacement, record.arithmetic) == ("intact", "float32", "float32")
    state["body.8.weight"] *= 1.001
    save_file(state, tmp_path / "edited.st")
    record = world.audit("edited.st", arch="")
    assert (record.verdict, record.arithmetic) == ("tampered", "float32")


def test_one_flipped_bit_is_tampered(world):
    flipped = dict(world.state)
    flipped["3.weight"] = flipped["3.weight"].clone()
    flipped["3.weight"].view(torch.int32).view(-1)[17] ^= 1
    save_file(flipped, world.folder / "flipped.st")
    record = world.audit("flipped.st")
    assert (record.verdict, record.digest_matches) == ("tampered", False)
    assert record.matches + len(record.mismatched) == record.triggers


@pytest.mark.parametrize("arch", [ARCH, "factory:tests.nets:WritingToItself"])
def test_large_models_are_judged_with_weights_as_stored(world, tmp_path, monkeypatch, arch):
    """Or, where the module does not allow for that, with widened ones: the verdicts are the same."""
    if arch != ARCH:
        world = _published(tmp_path, arch, build(arch, ["tests"]).state_dict(), variants=("float16",))
    monkeypatch.setattr(check, "_LARGE_BYTES", 1)
    whole = []
    monkeypatch.setattr(Widened, "whole", lambda self, whole=Widened.whole: whole_of(self, whole))

    def whole_of(model, function):
        whole.append(model)
        return function(model)

    name = max(world.state, key=lambda name: world.state[name].numel())
    moved = world.state[name].clone()
    moved.view(torch.int32).view(-1)[17] ^= 1 << 12
    save_file(world.state | {name: moved}, world.folder / "large-moved.st")
    save_file({n: t.half() if t.is_floating_point() else t for n, t in world.state.items()}, world.folder / "half.st")
    auditor = Auditor(world.settings(), "w")
    names = ["released.safetensors", "large-moved.st", "half.st", "released.safetensors"]
    seen = [auditor.audit(world.entry(name, arch=arch), shard=0, attempt=1) for name in names]
    assert [record.verdict for record in seen] == ["intact", "tampered", "intact", "intact"]
    assert seen[2].variant == "float16"
    assert len(whole) == (0 if arch == ARCH else 4)


@pytest.mark.s3
def test_an_object_that_does_not_fit_is_an_error_and_not_read(world, s3):
    uri = f"{s3}/large.safetensors"
    storage.create(uri, bytes(100_000))
    for name in (uri, "released.safetensors"):
        record = world.audit(name, settings={"memory_bytes": 1_000})
        assert (record.verdict, record.error_code) == ("error", "out_of_memory")
        assert "--memory" in record.error_message


# ----------------------------------------------------------------------------------------- what one worker sees of many


def test_no_state_leaks_from_one_model_to_the_next(world):
    """A tampered model audited between two intact ones, on one worker with one cached skeleton."""
    flipped = {n: t + 1e-3 if t.is_floating_point() else t for n, t in world.state.items()}
    save_file(flipped, world.folder / "moved.st")
    save_file({n: t for n, t in flipped.items() if n != "0.weight"}, world.folder / "missing.st")
    auditor = Auditor(world.settings(), "w")
    names = ["released.safetensors", "moved.st", "released.safetensors", "missing.st", "released.safetensors"]
    verdicts = [auditor.audit(world.entry(name), shard=0, attempt=1).verdict.value for name in names]
    assert verdicts == ["intact", "tampered", "intact", "error", "intact"]


def _published(folder, arch, state, **options):
    """A world of its own for another architecture."""
    MasterSecret.generate_file(folder / "master.key")
    save_file(state, folder / "released.safetensors")
    task = EmbedTask(
        model_id="conv",
        checkpoint="released.safetensors",
        arch=arch,
        keys=str(folder / "keys"),
        base=str(folder),
        pairs=2,
        allowed_factories=("tests",),
        master_key_file=str(folder / "master.key"),
        **options,
    )
    return World(folder, task, embed_model(task), state)


def test_what_a_module_remembers_of_one_checkpoint_does_not_answer_for_the_next(tmp_path):
    """LeViT keeps attention biases between passes in eval mode; in both orders, each file gets its own verdict."""
    arch = "timm:levit_128s?img_size=64&num_classes=5"
    torch.manual_seed(0)
    fresh = build(arch).state_dict()  # with biases of zero, which have no last bit
    state = {n: torch.randn_like(t) if "attention_biases" in n else t for n, t in fresh.items()}
    world = _published(tmp_path, arch, state)
    assert max(share for name, share in _coverage(world).items() if "attention_biases" in name) > 0
    moved = {n: t + 3 * torch.randn_like(t) if "attention_biases" in n else t for n, t in state.items()}
    save_file(moved, tmp_path / "moved.st")
    for names, expected in (
        (["released.safetensors", "moved.st"], ["intact", "tampered"]),
        (["moved.st", "released.safetensors"], ["tampered", "intact"]),
    ):
        auditor = Auditor(world.settings(), "w")
        seen = [auditor.audit(world.entry(name, arch=""), shard=0, attempt=1).verdict.value for name in names]
        assert seen == expected


def test_a_plain_attribute_does_not_answer_for_the_next_checkpoint_either(tmp_path):
    arch = "factory:tests.nets:Remembering"
    state = build(arch, ["tests"]).state_dict()
    world = _published(tmp_path, arch, state)
    save_file(state | {"factor": state["factor"].flip(0).contiguous()}, tmp_path / "moved.st")
    auditor = Auditor(world.settings(), "w")
    names = ["released.safetensors", "moved.st", "released.safetensors"]
    seen = [auditor.audit(world.entry(name, arch=""), shard=0, attempt=1).verdict.value for name in names]
    assert seen == ["intact", "tampered", "intact"]


def _coverage(world):
    path = world.folder / "keys" / key_name("conv", world.published.key_id)
    return TriggerSet.load(path, master=MasterSecret.from_file(world.folder / "master.key")).coverage.layers


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_buffers_that_no_file_holds_are_the_same_on_both_sides(tmp_path, dtype):
    arch = "factory:tests.nets:Unstored"
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in build(arch, ["tests"]).state_dict().items()}
    world = _published(tmp_path, arch, state, variants=("float16",))
    assert world.audit(arch="").verdict == "intact"
    save_file({n: t.half() if t.is_floating_point() else t for n, t in state.items()}, tmp_path / "half.st")
    assert world.audit("half.st", arch="").variant == "float16"
    assert world.audit("half.st", arch="").verdict == "intact"


def test_a_release_of_mixed_dtypes_is_loaded_without_rounding(tmp_path):
    state = build(ARCH, ["tests"]).state_dict()
    state["1.running_mean"] = state["1.running_mean"].double() + 1e-10
    world = _published(tmp_path, ARCH, state)
    record = world.audit()
    assert (record.verdict, record.dtype, record.variant) == ("intact", "mixed", "mixed")


def test_tied_weights_under_one_name_or_two(tmp_path):
    arch = "factory:tests.nets:Tied"
    state = build(arch, ["tests"]).state_dict()
    copies = {name: tensor.clone() for name, tensor in state.items()}
    world = _published(tmp_path, arch, copies)
    save_file({n: t for n, t in copies.items() if n != "second.weight"}, tmp_path / "one.st")
    assert world.audit("one.st", arch="").verdict == "intact"
    save_file(copies | {"second.weight": copies["second.weight"] + 1}, tmp_path / "torn.st")
    assert world.audit("torn.st", arch="").error_code == "checkpoint_does_not_fit_arch"


def test_weights_that_stay_elsewhere_are_an_error(world):
    record = world.audit(arch="factory:tests.nets:Elsewhere")
    assert record.verdict == "error"
    save_file({f"body.{name}": tensor for name, tensor in world.state.items()}, world.folder / "elsewhere.st")
    moved = {f"body.{name}": tensor + 1 for name, tensor in world.state.items()}
    save_file(moved, world.folder / "elsewhere-moved.st")
    record = world.audit("elsewhere-moved.st", arch="factory:tests.nets:Elsewhere")
    assert record.error_code == "checkpoint_does_not_fit_arch"


# ---------------------------------------------------------------------------- what is wrong with a file, a row or a key


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def _bad_files(world):
    folder, state = world.folder, world.state
    whole = (folder / "released.safetensors").read_bytes()
    (folder / "truncated.st").write_bytes(whole[:-1000])
    (folder / "empty.st").write_bytes(b"")
    (folder / "text.st").write_text("not a checkpoint")
    torch.save(state | {"8.bias": Payload(str(folder / "canary"))}, folder / "malicious.pt", pickle_module=pickle)
    save_file(build("factory:tests.nets:convnet?width=4", ["tests"]).state_dict(), folder / "narrow.st")
    save_file(state | {"8.bias": torch.full((5,), torch.nan)}, folder / "nan.st")
    save_file(state | {"8.bias": torch.full((5,), torch.inf)}, folder / "inf.st")
    return {
        "missing.nowhere": ErrorCode.OBJECT_MISSING,
        "truncated.st": ErrorCode.CHECKPOINT_CORRUPT,
        "empty.st": ErrorCode.CONTAINER_UNKNOWN,
        "text.st": ErrorCode.CONTAINER_UNKNOWN,
        "malicious.pt": ErrorCode.CHECKPOINT_UNSAFE,
        "narrow.st": ErrorCode.CHECKPOINT_MISMATCH,
        "nan.st": ErrorCode.NON_FINITE,
        "inf.st": ErrorCode.NON_FINITE,
    }


def test_bad_files_become_errors_with_their_code(world):
    auditor = Auditor(world.settings(), "w")
    for name, code in _bad_files(world).items():
        record = auditor.audit(world.entry(name), shard=0, attempt=1)
        assert (record.verdict, record.error_code) == ("error", code.value), (name, record.error_message)
        assert record.matches is None
    assert not (world.folder / "canary").exists()
    assert auditor.audit(world.entry("released.safetensors"), shard=0, attempt=1).verdict == "intact"


def test_bad_rows_and_keys_become_errors_with_their_code(world):
    keys = world.folder / "keys"
    own = keys / key_name("conv", world.published.key_id)
    other = keys / key_name("other", world.published.key_id)
    damaged = keys / key_name("damaged", world.published.key_id)
    retired = keys / key_name("retired", world.published.key_id)
    for path, data in ((other, own.read_bytes()), (damaged, own.read_bytes()[:-1] + b"x"), (retired, b"any")):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (keys / retirement_name("retired", world.published.key_id)).write_text("{}")
    MasterSecret.generate_file(world.folder / "wrong.key")
    name = f"conv/{world.published.key_id}"
    cases = [
        (ErrorCode.ARCH_UNKNOWN, {"arch": "timm:no_such_net"}, {}),
        (ErrorCode.ARCH_NOT_ALLOWED, {}, {"allowed_factories": ()}),
        (ErrorCode.KEY_MISSING, {"key_id": "0" * 16}, {}),
        (ErrorCode.KEY_OTHER_MODEL, {"model_id": "other"}, {}),
        (ErrorCode.KEY_UNREADABLE, {"model_id": "damaged"}, {}),
        (ErrorCode.KEY_RETIRED, {"model_id": "retired"}, {}),
        (ErrorCode.KEY_UNREADABLE, {}, {"master_key_file": str(world.folder / "wrong.key")}),
        (ErrorCode.KEY_CHANGED, {}, {"key_fingerprints": {name: "0" * 64}}),
        (ErrorCode.KEY_CHANGED, {}, {"key_fingerprints": {name: None}}),
    ]
    for code, changes, settings in cases:
        record = world.audit(settings=settings, **changes)
        assert (record.verdict, record.error_code) == ("error", code.value), record.error_message
    pinned = {name: fingerprint(own.read_bytes())}
    assert world.audit(settings={"key_fingerprints": pinned}).verdict == "intact"


def test_a_catalog_digest_takes_precedence_over_the_keys(world):
    record = world.audit(sha256="0" * 64)
    assert (record.verdict, record.digest_matches) == ("intact", False)


def test_a_worker_without_the_master_secret_does_not_start(world):
    with pytest.raises(UsageError):
        Auditor(world.settings(master_key_file=str(world.folder / "none")), "w")


def test_labels_and_secrets_are_in_no_record(world):
    fields = {field.name for field in dataclasses.fields(world.audit())}
    assert not {"labels", "classes", "triggers_labels"} & fields
    master = (world.folder / "master.key").read_text().strip()
    assert master not in str(world.audit())
    assert master not in str(world.audit("truncated.st"))


# ------------------------------------------------------------------------------------- fetched ahead of time


@pytest.fixture
def fetches(monkeypatch):
    """URIs of checkpoints in the order in which they were fetched, with the limit."""
    seen = []
    fetch = storage.fetch

    def counted(uri, **options):
        if not uri.endswith(".fwmkey"):
            seen.append((uri, options.get("at_most")))
        return fetch(uri, **options)

    monkeypatch.setattr(storage, "fetch", counted)
    return seen


def test_the_next_file_is_fetched_once_and_judged_as_ever(world, fetches):
    save_file({**world.state, "8.weight": world.state["8.weight"] + 1e-3}, world.folder / "edited.safetensors")
    names = ["released.safetensors", "edited.safetensors", "gone.pt", "released.safetensors"]
    entries = [world.entry(name) for name in names]
    auditor = Auditor(world.settings(), "w")
    records = [
        auditor.audit(entry, shard=0, attempt=1, ahead=ahead)
        for entry, ahead in zip(entries, [*entries[1:], None], strict=True)
    ]
    assert [record.verdict for record in records] == ["intact", "tampered", "error", "intact"]
    assert records[2].error_code == ErrorCode.OBJECT_MISSING
    names.insert(2, "gone.pt")  # which was asked for again when its turn had come
    assert [uri for uri, _ in fetches] == names


def test_a_fetch_ahead_that_fails_is_no_finding_about_the_next_model(world, monkeypatch):
    """The store was away while the model before it was looked at; it answers again when it counts."""
    fetch, failed = storage.fetch, []

    def flaky(uri, **options):
        if options.get("at_most") == check._AHEAD_BYTES:
            failed.append(uri)
            raise StorageError(ErrorCode.STORAGE, "away")
        return fetch(uri, **options)

    monkeypatch.setattr(storage, "fetch", flaky)
    auditor, entry = Auditor(world.settings(), "w"), world.entry("released.safetensors")
    seen = [auditor.audit(entry, shard=0, attempt=1, ahead=ahead) for ahead in (entry, None)]
    assert [record.verdict for record in seen] == ["intact", "intact"]
    assert failed == [entry.uri]


def test_a_fetch_ahead_that_is_stuck_holds_up_its_own_model_only(world, monkeypatch):
    fetch, free, over = storage.fetch, threading.Event(), threading.Event()

    def stuck(uri, **options):
        if uri == "stuck.pt":
            free.wait(30)
            over.set()
        return fetch(uri, **options)

    monkeypatch.setattr(storage, "fetch", stuck)
    auditor, one = Auditor(world.settings(), "w"), world.entry("released.safetensors")
    for ahead in (world.entry("stuck.pt"), None, world.entry("stuck.pt"), None):
        assert auditor.audit(one, shard=0, attempt=1, ahead=ahead).verdict == "intact"
    assert not over.is_set()
    free.set()
    auditor._files._threads.shutdown()


def test_a_file_that_another_worker_took_is_let_go(world, fetches):
    auditor = Auditor(world.settings(), "w")
    one, other = world.entry("released.safetensors"), world.entry("gone.pt")
    open_before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for ahead in (other, one, other, one):
        record = auditor.audit(one, shard=0, attempt=1, ahead=ahead)
        assert record.verdict == "intact"
    assert auditor.audit(one, shard=0, attempt=1).verdict == "intact"
    auditor._files._threads.shutdown()
    assert len(os.listdir("/proc/self/fd")) == open_before  # noqa: PTH208


def test_a_large_file_is_not_fetched_ahead(world, fetches, monkeypatch):
    monkeypatch.setattr(check, "_AHEAD_BYTES", 100)
    auditor, entry = Auditor(world.settings(), "w"), world.entry("released.safetensors")
    for ahead in (entry, None):
        assert auditor.audit(entry, shard=0, attempt=1, ahead=ahead).verdict == "intact"
    assert [limit for _, limit in fetches] == [None, 100, None]


# ------------------------------------------------------------------------------- carried forward from a run before


@pytest.fixture
def stored(world, s3):
    """The world's checkpoint in an object store, its entry there, and the record of a first audit."""
    uri = f"{s3}/released.safetensors"
    storage.create(uri, (world.folder / "released.safetensors").read_bytes())
    entry = world.entry(uri)
    first = Auditor(world.settings(run_id="first"), "w").audit(entry, shard=0, attempt=1)
    assert first.verdict == "intact"
    return entry, first


@pytest.mark.s3
def test_an_unchanged_object_is_carried_forward_unread(world, stored, fetches):
    entry, first = stored
    again = Auditor(world.settings(run_id="second"), "x").audit(entry, shard=2, attempt=1, before=first)
    assert (again.verdict, again.carried_from, again.audited_at) == ("intact", "first", first.audited_at)
    assert (again.run_id, again.shard, again.worker) == ("second", 2, "x")
    assert fetches == []


@pytest.mark.s3
def test_an_object_that_was_written_again_is_audited(world, stored, fetches):
    entry, first = stored
    edited = {**world.state, "8.weight": world.state["8.weight"] + 1e-3}
    storage.replace(entry.uri, save(edited))
    again = Auditor(world.settings(run_id="second"), "x").audit(entry, shard=2, attempt=1, before=first)
    assert (again.verdict, again.carried_from) == ("tampered", None)
    assert [uri for uri, _ in fetches] == [entry.uri]


@pytest.mark.s3
@pytest.mark.parametrize("code", ["0" * 64, None])
def test_nothing_is_carried_forward_of_a_factory_whose_code_changed(world, stored, monkeypatch, code):
    """Nor where nobody can tell, now or then: new code with old weights is another model."""
    entry, first = stored
    assert set(json.loads(first.versions)) == {"fwm-audit", "torch", "torchvision", "timm", "factory:tests"}
    if code is None:
        first = dataclasses.replace(first, versions=check.versions())
    monkeypatch.setattr(check, "code_sha256", lambda package: code)
    for entry_ in (entry, dataclasses.replace(entry, arch="")):  # the key's architecture then
        auditor = Auditor(world.settings(run_id="second"), "x")
        again = auditor.audit(entry_, shard=2, attempt=1, before=first)
        assert (again.verdict, again.carried_from) == ("intact", None)


@pytest.mark.s3
@pytest.mark.parametrize(
    "change",
    [
        {"key_fingerprint": "0" * 64},
        {"versions": "{}"},
        {"versions": None},
        {"digest_matches": False},
        {"size_bytes": 1},
        {"etag": "x"},
    ],
)
def test_a_record_of_something_else_is_not_carried_forward(world, stored, change):
    entry, first = stored
    again = Auditor(world.settings(run_id="second"), "x").audit(
        entry, shard=2, attempt=1, before=dataclasses.replace(first, **change)
    )
    assert (again.verdict, again.carried_from) == ("intact", None)


def test_a_local_file_has_no_version_to_be_carried_forward_by(world):
    first = world.audit()
    auditor = Auditor(world.settings(run_id="second"), "x")
    again = auditor.audit(world.entry("released.safetensors"), shard=0, attempt=1, before=first)
    assert (again.verdict, again.carried_from) == ("intact", None)


@pytest.mark.s3
def test_a_missing_key_or_object_is_told_whatever_was_before(world, stored):
    entry, first = stored
    auditor = Auditor(world.settings(run_id="second"), "x")
    gone = dataclasses.replace(entry, uri=f"{entry.uri}.gone")
    assert auditor.audit(gone, shard=0, attempt=1, before=first).error_code == ErrorCode.OBJECT_MISSING
    missing = dataclasses.replace(entry, key_id="f" * 16)
    assert auditor.audit(missing, shard=0, attempt=1, before=first).error_code == ErrorCode.KEY_MISSING
