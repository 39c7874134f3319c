"""Embedding: from a model and a secret key to a trigger set, the model untouched.

The work of one call is divided over the ranks of the torch.distributed process group, if there is
one: the generator is trained data-parallel over the pairs, the rest is sharded by pair, in units that
any number of ranks computes alike. The method descends from Yin et al., ICIP 2022 (arXiv 2208.07585),
whose triggers stand at a margin that its loss sets; these stand at a distance that numeric noise sets.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fwm_audit import generator as gen
from fwm_audit import yin2022
from fwm_audit.calibration import Covered, confirm, finest_delta, make_rungs, measure_noise
from fwm_audit.datasheet import simulate
from fwm_audit.errors import EmbeddingError, ErrorCode, ModelError, UsageError
from fwm_audit.key import SecretKey
from fwm_audit.pairs import Pairs, centre, place_exact, refine, train
from fwm_audit.peers import UNIT, Keeper, Peers
from fwm_audit.target import Target
from fwm_audit.task import MOST_WORKERS, Progress, Report
from fwm_audit.triggers import FOLDED, Coverage, Rung, TriggerSet, place
from fwm_audit.verdict import Tolerance, upper_rate
from fwm_audit.verification import device_of, dtype_of
from fwm_audit.waking import Waking, features

#: Candidates that are made before the next ones are chosen, for a key of few pairs and of many: as many units
#: as ranks have work.
BLOCKS: Final = (MOST_WORKERS * UNIT, 96)
#: Pairs made for each one that is kept: those that cover most of the parameters are.
_CANDIDATES: Final = 1.5
#: ... but no more than these beyond the pairs asked for: many pairs leave little to choose.
_SPARE: Final = 24
#: Steps of the generator for the first block of pairs, for one after a fruitful block, and after a poor one.
_STEPS: Final = (10, 4, 30)
#: Blocks that try to wake a unit before it counts as dead.
_WAKINGS: Final = 4
MAX_PAIRS: Final = 4096
METHODS: Final = ("mirror", "yin2022")
VARIANTS: Final = ("float32", "float16", "bfloat16", FOLDED)


def embed(
    model: nn.Module,
    *,
    secret: SecretKey,
    model_id: str,
    input_shape: Sequence[int],
    pairs: int = 16,
    coverage: float | None = None,
    method: str = "mirror",
    variants: Sequence[str] = (),
    input_range: tuple[float, float] = (-1.0, 1.0),
    device: str | torch.device | None = None,
    arch: str = "",
    checkpoint_sha256: str = "",
    released: str | None = None,
    progress: Report | None = None,
    keeper: Keeper | None = None,
) -> TriggerSet:
    """A trigger set that reveals any edit of the model's function; the model is only read.

    A model that casts to float32 inside gets a float32 rung as its finest, whose delta is 32 times the
    noise of float32; `TriggerSet.arithmetic` says so.

    Args:
        model: Deterministic classifier from float inputs [N, *input_shape] to logits [N, K].
        secret: Fixes class pairs, noise and the generator; the same secret makes the same triggers on the same
            kind of machine.
        model_id: Name under which the model is audited.
        input_shape: Shape of one input.
        pairs: Mirrored pairs to make; each is two triggers. Half as many again (24 at most) are tried, and
            those kept that cover most parameters. `yin2022` has 100 triggers whatever this says.
        coverage: Go on beyond `pairs` until this share of the parameters is covered.
        method: `mirror`, or `yin2022`, the published method, for comparison.
        variants: Further forms in which the model is shipped: `float16`, `bfloat16`, `folded` (batch norms
            merged into the layers before them). Each gets its own exact triggers, and a checkpoint of that form
            is checked against them.
        input_range: Smallest and largest value of a preprocessed input.
        device: Where to compute; None is where the model's parameters are.
        arch: Name from which auditors rebuild the architecture, see `architectures`.
        checkpoint_sha256: Digest of the released file.
        released: Dtype of the released file, which names its variant; None is that of the parameters.
        progress: Called at every step.
        keeper: Keeps what was found after each block of pairs, and lets another attempt go on from there.

    Raises:
        UsageError: The settings make no sense.
        ModelError: The model is stochastic, answers NaN, has K < 2.
        EmbeddingError: Too few pairs were found, or the coverage was not reached.
    """
    shape = tuple(int(size) for size in input_shape)
    _check_settings(method, pairs, coverage, variants, input_range, shape)
    report = progress or (lambda _: None)
    where = torch.device(device) if device is not None else device_of(model)
    span = (float(input_range[0]), float(input_range[1]))
    named: dict[str, Any] = {
        "model_id": model_id,
        "key_id": secret.key_id,
        "method": method,
        "arch": arch,
        "checkpoint_sha256": checkpoint_sha256,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": _environment(where),
    }

    peers = Peers.current()

    def attempt(dtype: torch.dtype) -> TriggerSet:
        report(Progress("probe", 0, 1))
        target = peers.together(
            lambda: Target.of(model, shape, span, variants, where, released or dtype_of(model), dtype)
        )
        if method == "yin2022":
            triggers = _published(target, secret, named, report)
        else:
            triggers = _mirror(target, secret, pairs, coverage, named, peers, report, keeper)
        report(Progress("confirm", 0, 1))
        benign, noise, both = confirm(target, triggers, peers)
        rungs = tuple(replace(rung, noise=max(rung.noise, noise)) for rung in triggers.rungs)
        environment = {**triggers.environment, "measured": "cpu cuda" if both else where.type}
        triggers = replace(triggers, rungs=rungs, benign=benign, flip_rate=upper_rate(benign), environment=environment)
        return replace(triggers, datasheet=simulate(target, triggers, secret, report))

    with _repeatable(where):
        if method == "yin2022":
            return attempt(torch.float32)
        try:
            return attempt(torch.float64)
        except ModelError as error:
            if error.code is not ErrorCode.NO_FLOAT64:
                raise
            return attempt(torch.float32)


@contextlib.contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """CUDA kernels that give the same bits each time, for all operations that have such ones."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of no effect where cuBLAS is in use already
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _mirror(
    target: Target,
    secret: SecretKey,
    pairs: int,
    coverage: float | None,
    named: dict[str, Any],
    peers: Peers,
    report: Report,
    keeper: Keeper | None,
) -> TriggerSet:
    """The mirrored pairs of `method.mirror`, not yet confirmed."""
    search = _Search(target, secret, pairs, peers, report)
    if keeper is not None and (state := keeper.load()) is not None:
        search.restore(state)
    try:
        made, delta, noise, covered = _make_pairs(search, pairs, coverage, report, keeper)
    except EmbeddingError as error:
        error.agreed = True  # it follows from what all ranks know
        raise
    report(Progress("rungs", 0, 1))
    return TriggerSet(
        **named,
        input_shape=target.shape,
        input_range=target.range,
        num_classes=target.num_classes,
        classes=made.classes,
        images=made.images,
        signs=made.signs,
        rungs=make_rungs(target, made, delta, noise, peers),
        coverage=covered.report(),
        flip_rate=1.0,
        benign=0,
        folds=target.folds,
    )


def _published(target: Target, secret: SecretKey, named: dict[str, Any], report: Report) -> TriggerSet:
    """The triggers of Yin et al., not yet confirmed: 100 inputs at the margin where their training stopped.

    Their rung is called `half`, as such a key tells no finer displacement; its delta is the smallest
    margin, which their stop rule leaves to chance. No parameter is covered to its last bit.
    """
    if Peers.current().size > 1:
        raise UsageError("method yin2022 trains one generator on all its triggers: use one worker")
    inputs, labels = yin2022.make(target, secret, report)
    top = target.run(target.released, inputs).topk(2, 1).values
    delta = (top[:, 0] - top[:, 1]).min().item()
    if delta < 64 * target.rounding:
        raise EmbeddingError(
            ErrorCode.PAIRS_NOT_FOUND,
            f"a trigger of the paper's stands {delta:.0e} from its boundary, where float32 noise flips it: "
            "use another secret, or method mirror",
        )
    rung = Rung(
        variant=next(iter(target.twins)),
        name=Tolerance.HALF,
        delta=delta,
        noise=0.0,
        dtype="float32",
        index=torch.arange(len(labels)),
        t=torch.zeros(len(labels), 1, dtype=torch.float64),
    )
    return TriggerSet(
        **named,
        input_shape=target.shape,
        input_range=target.range,
        num_classes=target.num_classes,
        classes=labels[:, None],
        images=inputs,
        signs=torch.zeros(0, *target.shape, dtype=torch.bool),
        rungs=(rung,),
        coverage=Coverage(0.0, dict.fromkeys((name for name, _ in target.released.named_parameters()), 0.0)),
        flip_rate=1.0,
        benign=0,
    )


def _check_settings(
    method: str,
    pairs: int,
    coverage: float | None,
    variants: Sequence[str],
    input_range: tuple[float, float],
    shape: tuple[int, ...],
) -> None:
    if method not in METHODS:
        raise UsageError(f"method {method!r} is not known: use {' or '.join(METHODS)}")
    if method == "yin2022" and (variants or coverage is not None):
        raise UsageError("method yin2022 has neither variants nor a coverage: use mirror")
    if not 1 <= pairs <= MAX_PAIRS:
        raise UsageError(f"pairs is {pairs}: use 1 to {MAX_PAIRS}")
    if coverage is not None and not 0 < coverage <= 1:
        raise UsageError(f"coverage is {coverage}: it is a share, above 0 and at most 1")
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise UsageError(f"variant {unknown[0]!r} is not known: declare any of {', '.join(VARIANTS)}")
    if not input_range[0] < input_range[1] or not all(map(math.isfinite, input_range)):
        raise UsageError(f"input range {input_range} is empty or not finite")
    if not shape or min(shape) < 1:
        raise UsageError(f"input shape {shape} has no elements")


def _make_pairs(
    search: _Search, goal: int, wanted_coverage: float | None, report: Report, keeper: Keeper | None
) -> tuple[Pairs, float, float, Covered]:
    """Pairs on the finest rung of every variant, with its delta and noise, and what they cover."""
    covered = search.covered
    fruitless = stale = 0
    while (found := search.found) < goal or covered.total < (wanted_coverage or 0.0):
        if fruitless == 4 and found < goal:
            raise EmbeddingError(
                ErrorCode.PAIRS_NOT_FOUND,
                f"{found} of {goal} pairs found: the model cannot be steered to its class boundaries from inputs "
                f"in {search.target.range}; check input_range, or ask for fewer pairs",
            )
        if found >= max(goal, MAX_PAIRS) or stale == 4:
            raise EmbeddingError(
                ErrorCode.COVERAGE_NOT_REACHED,
                f"{found} pairs cover {covered.total:.4f} of the parameters, {wanted_coverage} was asked: "
                "ask for less; weights that no input reaches (dead units) cannot be covered",
            )
        before = covered.total
        chosen = search.extend(max(0, goal - found), wanted_coverage)
        stale = stale + 1 if found >= goal and covered.total < before + 1e-4 else 0
        fruitless = 0 if chosen else fruitless + 1
        report(Progress("pairs", search.found, goal))
        if keeper is not None:
            keeper.save(search.state())
    if covered.sizes and covered.total == 0 and search.target.dtype is torch.float64:
        raise EmbeddingError(
            ErrorCode.COVERAGE_NOT_REACHED,
            "the pairs see no parameter to its last bit: the model's weights have no influence on its labels",
        )
    return Pairs.join(search.kept), search.delta, search.noise, covered


_COUNTERS: Final = ("noise", "delta", "blocks", "steps", "taken")


class _Search:
    """The search for pairs, block after block of candidates; the same on every rank but for who makes which."""

    def __init__(
        self,
        target: Target,
        secret: SecretKey,
        goal: int,
        peers: Peers,
        report: Report,
    ) -> None:
        self.target, self.secret, self.peers, self.report = target, secret, peers, report
        self.net = gen.Generator(target.shape, target.range, secret).to(target.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 2e-3, betas=(0.5, 0.999))
        self.stream: Iterator[tuple[int, tuple[int, int]]] = enumerate(gen.class_pairs(secret, target.num_classes))
        self.taken = 0  # of the stream
        self.covered = Covered(target.released)
        self.kept: list[Pairs] = []
        self.noise = self.delta = 0.0
        self.blocks = 0
        self.steps = _STEPS[0]
        self.block = BLOCKS[goal > 2 * BLOCKS[1]]
        #: Candidates for each pair that is kept.
        self.candidates = min(_CANDIDATES, 1 + _SPARE / goal)
        #: By name of a bias, int64: blocks that tried to wake each unit.
        self.pulls: dict[str, Tensor] = {}
        #: Where each class will stand at one or two boundaries, no other pair makes up for a feature that sleeps.
        self.features = ""
        if target.num_classes / 2 <= goal <= target.num_classes:
            self.features = features(target.trainee, target.plain(torch.float32).to(target.device))
        #: Pairs by number that were made and not chosen.
        self.left_out: dict[int, tuple[int, int]] = {}

    @property
    def found(self) -> int:
        """Pairs kept so far."""
        return sum(map(len, self.kept))

    def extend(self, missing: int, wanted_coverage: float | None) -> int:
        """Make a block of candidates and keep the best of them; returns how many."""
        block = self._next_block(missing)
        pairs, flags = self._candidates(block)
        numbers = pairs.number.tolist()
        edges = [block[number] for number in numbers]
        share = math.ceil(len(pairs) / self.candidates)
        rows = self.covered.choose(flags, edges, min(missing, share), wanted_coverage)
        self.left_out |= {number: block[number] for row, number in enumerate(numbers) if row not in rows}
        self.kept.append(pairs.take(torch.tensor(sorted(rows), dtype=torch.int64)))
        self.steps = _STEPS[1] if 2 * len(pairs) >= len(block) else _STEPS[2]
        return len(rows)

    def _asleep(self) -> dict[str, Tensor]:
        """Units to wake by the next block: those that sleep, less those that resisted long enough."""
        found = {}
        for name, units in self.covered.asleep().items():
            pulls = self.pulls.setdefault(name, torch.zeros(self.covered.sizes[name], dtype=torch.int64))
            found[name] = units[pulls[units] < _WAKINGS]
            pulls[found[name]] += 1
        return {name: units for name, units in found.items() if len(units)}

    def _next_block(self, missing: int) -> dict[int, tuple[int, int]]:
        """Class pairs to try next, by number."""
        # A few at least, so that one hard pair is not tried alone again and again.
        size = max(4, math.ceil(self.candidates * missing)) if missing else self.block
        # The first blocks are small: what they cover tells the later ones where to look.
        size = min(size, self.block, 8 * (self.blocks + 1))
        self.blocks += 1
        # K / 2 pairs are to involve every class: no edge of a ring that could be made is given up for coverage.
        again = [number for number, edge in self.left_out.items() if not self.covered.classes >= {*edge}][:size]
        block = {number: self.left_out.pop(number) for number in again}
        self.taken += size - len(block)
        return block | dict(itertools.islice(self.stream, size - len(block)))

    def state(self) -> bytes:
        """All that the search knows, for `restore`; the same on every rank."""
        buffer = io.BytesIO()
        torch.save(
            {
                "dtype": str(self.target.dtype),
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "kept": [{field.name: getattr(part, field.name) for field in fields(part)} for part in self.kept],
                "seen": torch.from_numpy(self.covered.seen),
                "classes": sorted(self.covered.classes),
                "left_out": self.left_out,
                "pulls": self.pulls,
                **{name: getattr(self, name) for name in _COUNTERS},
            },
            buffer,
        )
        return buffer.getvalue()

    def restore(self, state: bytes) -> None:
        """Go on where the search that made this state stood, if it used the same arithmetic."""
        held = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
        if held["dtype"] != str(self.target.dtype):
            return  # of the attempt in float64, which the model turned out not to know
        self.net.load_state_dict(held["net"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.kept = [Pairs(**part) for part in held["kept"]]
        self.covered.seen = held["seen"].numpy()
        self.covered.classes = set(held["classes"])
        self.left_out, self.pulls = held["left_out"], held["pulls"]
        for name in _COUNTERS:
            setattr(self, name, held[name])
        self.stream = itertools.islice(self.stream, self.taken, None)

    def _calibrate(self, made: Sequence[Pairs], units: int) -> None:
        """Measure noise at the centres of this rank's units of pairs, of so many in all, and set delta by it."""
        target = self.target
        mine = []
        for pairs in made:
            points = place(pairs.images, pairs.signs, pairs.t, target.range)
            mine.append((len(pairs), measure_noise(target, target.released, points, pairs.classes)))
        measured = self.peers.collect(mine, units)
        if any(count for count, _ in measured):
            self.noise = max(noise for _, noise in measured)
            self.delta = finest_delta(target, self.noise)

    def _candidates(self, block: dict[int, tuple[int, int]]) -> tuple[Pairs, list[NDArray[np.uint8]]]:
        """Those pairs of the block that can be made, from all ranks, and the parameters that each sees."""
        target, peers = self.target, self.peers
        numbers = torch.tensor(list(block))
        classes = torch.tensor(list(block.values()))
        draws = gen.noise(self.secret, list(block)).to(target.device)
        units = torch.arange(len(block)).split(UNIT)
        inputs = train(
            target, self.net, self.optimizer, draws.split(UNIT), classes.split(UNIT), peers, self.report, self.steps
        )
        made = []
        with Waking(target.trainee, self._asleep(), len(block), target.num_classes, self.features) as waking:
            for rows, drawn in zip(peers.share(units), inputs, strict=True):
                refined = refine(target, drawn, classes[rows], waking, rows, self.report)
                made.append(centre(target, refined, numbers[rows], classes[rows]))
        if not self.delta:
            self._calibrate(made, len(units))
        made = [place_exact(target, pairs, self.delta) for pairs in made]
        parts = peers.collect([(pairs, self.covered.flags(target, pairs, self.delta)) for pairs in made], len(units))
        flags = {
            number: seen for pairs, rows in parts for number, seen in zip(pairs.number.tolist(), rows, strict=True)
        }
        # Joined pairs stand in the order of their numbers.
        return Pairs.join([part for part, _ in parts]), [flags[number] for number in sorted(flags)]


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} {name}",
    }
