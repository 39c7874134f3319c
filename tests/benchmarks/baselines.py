"""The methods compared: for each, inputs and the labels that the untouched model gives them.

All baselines are checked as their papers do, in float32 by top-1 labels. Those that optimise real
images start from the test images of lowest margin: nearer to a boundary than the random ones of their
papers, so that fewer steps than published do not weaken them.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fwm_audit import MasterSecret, SecretKey, TriggerSet, embed, verify, yin2022
from fwm_audit.errors import EmbeddingError, ErrorCode, ModelError
from fwm_audit.target import Target
from fwm_audit.task import Progress
from fwm_audit.verification import breaks, float64_copy
from tests.benchmarks.edits import POPULATIONS, Edited, generator, population, single_changes
from tests.benchmarks.networks import Network

log = logging.getLogger(__name__)

#: Triggers of each baseline but `yin2022`, which has the paper's 100: as many as 16 mirrored pairs.
COUNT = 32
#: Inputs of one float32 forward pass; part of a baseline's conditions, as its labels may depend on it.
CHUNK = 32
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Seen:
    """What one method saw of one model.

    Attributes:
        detected: At least one label differs, or the model answers no finite numbers.
        changed: Triggers whose label differs; None where the check ended at the first.
        forward_passes: None where the check ended at the first changed label.
        error: Code of an error in place of labels.
    """

    method: str
    detected: bool
    triggers: int
    changed: int | None
    forward_passes: int | None
    displacement: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Missed:
    """Why the mirrored pairs did not see an edit.

    Attributes:
        reason: `no logit moved`, `moved less than delta`, or `moved more than delta`, which would be a
            fault of the method.
        moved: Largest change of the gap between the two classes of a trigger, in logits.
    """

    reason: str
    moved: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Methods:
    """Every method's triggers for one network.

    Attributes:
        mirror: Mirrored pairs of the released model; None where they are not compared.
        declaring: As `mirror`, in a key that also declares float16 and bfloat16.
        inputs: float32 [n, *input_shape] by baseline.
        labels: int64 [n] by baseline.
        logits: float64 [2p, K] of the untouched model on the mirrored pairs.
        brief: Whether a check with `mirror` ends at the first changed label.
        head: Name of the last linear layer.
        features: float64 [2p, F], inputs of the last layer, where no edit changes them.
        device: Where the mirrored pairs are checked; the baselines are on the CPU.
        slopes: float64, by parameter: largest |d gap / d element| over the pairs.
        seconds: What making the triggers took, by method.
        failed: Methods that could not be had, with the reason.
    """

    mirror: TriggerSet | None
    declaring: TriggerSet | None
    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    logits: Tensor
    seconds: dict[str, float]
    failed: dict[str, str]
    slopes: dict[str, Tensor]
    brief: bool = False
    head: str = ""
    features: Tensor | None = None
    device: torch.device = CPU
    _predicted: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def delta(self) -> float:
        """Distance of the mirrored pairs from their boundaries, in logits."""
        return self.mirror.rungs[0].delta

    def check(
        self, model: nn.Module, wanted: Collection[str], *, declared: bool = False, elsewhere: bool = False
    ) -> list[Seen]:
        """What the wanted methods say of a model; no baseline can declare a dtype or runs `elsewhere`."""
        found = [
            _labelled(m, model, self.inputs[m], self.labels[m]) for m in self.inputs if m in wanted and not declared
        ]
        if "mirror" in wanted:
            checked = self._briefly if self.brief and not declared else self._verified
            other = torch.device("cpu" if self.device.type == "cuda" else "cuda")
            where = other if elsewhere else self.device
            found.append(checked("mirror", model, self.declaring if declared else self.mirror, where))
        return found

    def _verified(self, method: str, model: nn.Module, triggers: TriggerSet, device: torch.device) -> Seen:
        try:
            seen = verify(model, triggers, device=device)
        except ModelError as error:
            if error.code is not ErrorCode.NON_FINITE:
                raise
            total = triggers.rungs[0].triggers
            return Seen(method, True, total, 0, total, "", str(error.code))
        changed = len(seen.mismatched)
        return Seen(method, seen.verdict != "intact", seen.total, changed, seen.forward_passes, str(seen.displacement))

    def _briefly(self, method: str, model: nn.Module, triggers: TriggerSet, device: torch.device) -> Seen:
        """Whether the finest rung breaks, and no more than that takes."""
        rung = triggers.rungs[0]
        if self.features is None:
            broken = breaks(float64_copy(model, device), triggers, rung, device)
            return Seen(method, broken, rung.triggers, None if broken else 0, None if broken else rung.triggers)
        logits, labels = self.exact_logits(model), triggers.classes[rung.index].reshape(-1)
        changed = int((logits.argmax(1) != labels).sum())
        finite = bool(torch.isfinite(logits).all())
        return Seen(method, changed > 0 or not finite, len(labels), changed, len(labels))

    def exact_logits(self, model: nn.Module) -> Tensor:
        """Logits float64 [2p, K] of an edited model on the mirrored pairs."""
        if self.features is None:
            return exact_logits(model, self.mirror)
        with torch.no_grad():
            return copy.deepcopy(model.get_submodule(self.head)).double()(self.features)

    def explain(self, model: nn.Module) -> Missed:
        """Why an edited model passes: what its float64 logits on the mirrored pairs did."""
        logits = self.exact_logits(model)
        classes = self.mirror.classes[self.mirror.rungs[0].index].repeat_interleave(2, 0)
        moved = (_gaps(logits, classes) - _gaps(self.logits, classes)).abs().max().item()
        if torch.equal(logits, self.logits):
            return Missed("no logit moved", moved)
        # Both sides stand within delta / 4 of delta, and a move this small may also be rounding.
        return Missed("moved less than delta" if moved <= 1.25 * self.delta else "moved more than delta", moved)

    def predicted(self, network: Network, edited: Edited) -> float | None:
        """Share of the elements from which the edited one was drawn whose edit moves some gap by more than delta.

        To first order; for bit 0 this is the coverage in the key.
        """
        if not edited.population:
            return None
        if (edited.name, edited.population) not in self._predicted:
            seen = forms = 0
            for name, parameter in population(network.model, edited.population, network.head).items():
                for change in single_changes(edited, parameter.detach()):
                    # A value that is not finite answers NaN, which is noticed.
                    moved = (self.slopes[name] * change).abs()
                    seen += int(((moved > self.delta) | ~torch.isfinite(change)).sum())
                    forms += change.numel()
            self._predicted[edited.name, edited.population] = seen / forms
        return self._predicted[edited.name, edited.population]


def _gaps(logits: Tensor, classes: Tensor) -> Tensor:
    return (logits.gather(1, classes[:, :1]) - logits.gather(1, classes[:, 1:])).squeeze(1)


def _labelled(method: str, model: nn.Module, inputs: Tensor, labels: Tensor) -> Seen:
    logits = forward(model, inputs)
    finite = bool(torch.isfinite(logits).all())
    changed = int((logits.argmax(1) != labels).sum())
    # A server that returns labels would not tell NaN from a label: this is generous to the baselines.
    error = "" if finite else str(ErrorCode.NON_FINITE)
    return Seen(method, changed > 0 or not finite, len(labels), changed, len(labels), "", error)


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits [n, K], float32."""
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(CHUNK)])


def exact_logits(model: nn.Module, triggers: TriggerSet) -> Tensor:
    """Logits [n, K] of the finest rung's triggers, in float64 and always in the same batches."""
    inputs, _ = triggers.materialise(triggers.rungs[0])
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return torch.cat([twin(part) for part in inputs.split(16)])


def _constant_features(network: Network, triggers: TriggerSet) -> Tensor | None:
    """Inputs float64 [n, F] of the last layer on the finest rung's triggers, where nothing else is edited."""
    if network.populations != ("a last-layer weight",):
        return None
    body = copy.deepcopy(network.model)
    body.set_submodule(network.head, nn.Identity())
    return exact_logits(body, triggers)


def _slopes(network: Network, triggers: TriggerSet, device: torch.device) -> dict[str, Tensor]:
    """Largest |d gap / d element| over the pairs, float64, by parameter of the populations that are edited."""
    inputs, labels = triggers.materialise(triggers.rungs[0])
    twin = copy.deepcopy(network.model).to(device).double().requires_grad_(requires_grad=False)
    names = {name for p in network.populations or POPULATIONS for name in population(twin, p, network.head)}
    members = {name: p.requires_grad_() for name, p in twin.named_parameters() if name in names}
    largest = {name: torch.zeros_like(p, requires_grad=False) for name, p in members.items()}
    for point, (a, b) in zip(inputs[::2], labels.view(-1, 2).tolist(), strict=True):
        logits = twin(point[None].to(device))[0]
        for name, slope in zip(
            largest, torch.autograd.grad(logits[a] - logits[b], list(members.values())), strict=True
        ):
            largest[name] = torch.maximum(largest[name], slope.abs())
    return {name: slope.cpu() for name, slope in largest.items()}


# ----------------------------------------------------------------------------------------------- triggers


def make(network: Network, cache: Path, device: torch.device = CPU) -> Methods:
    """Every method's triggers, from `cache` where they were made before: a resumed run needs the same ones."""
    made = _Made(network, cache, {}, device)
    failed: dict[str, str] = {}
    mirror = declaring = None
    if "mirror" in network.methods:
        mirror = declaring = made.key("mirror", pairs=network.pairs)
        if not network.populations:
            declaring = made.key("mirror with variants", pairs=network.pairs // 2, variants=["float16", "bfloat16"])
    inputs: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    for method in network.methods:
        if method in BASELINES:
            inputs[method] = made.inputs(method, BASELINES[method])
            labels[method] = forward(network.model, inputs[method]).argmax(1)
        elif method == "yin2022":
            try:
                inputs[method] = made.inputs(method, lambda network: _yin2022(network, device))
            except EmbeddingError as error:
                failed[method] = str(error)
                continue
            labels[method] = torch.arange(yin2022.COUNT) % network.classes  # the key, which the model agrees with
    if mirror is None:
        return Methods(None, None, inputs, labels, torch.empty(0), made.seconds, failed, {}, device=device)
    untouched = Methods(
        mirror, declaring, inputs, labels, torch.empty(0), made.seconds, failed, _slopes(network, mirror, device),
        brief=network.brief, head=network.head, features=_constant_features(network, mirror), device=device,
    )  # fmt: skip
    return replace(untouched, logits=untouched.exact_logits(network.model))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Made:
    """A folder of triggers, each made once; beside it stands what that took, in seconds."""

    network: Network
    cache: Path
    seconds: dict[str, float]
    device: torch.device

    def inputs(self, method: str, draw: Callable[[Network], Tensor]) -> Tensor:
        path = self._once(method, "safetensors", lambda part: _save(draw(self.network), part))
        return load_file(path)["inputs"]

    def key(self, name: str, **settings) -> TriggerSet:
        file = self.cache / "master.key"
        master = MasterSecret.from_file(file) if file.exists() else MasterSecret.generate_file(file)
        network = self.network

        def create(path: Path) -> None:
            embed(
                network.model,
                secret=SecretKey(hashlib.sha256(f"{network.name}/{name}".encode()).digest()),
                model_id=network.name,
                input_shape=network.input_shape,
                input_range=network.input_range,
                arch=network.arch,
                device=self.device,
                **settings,
            ).save(path, master=master)

        return TriggerSet.load(self._once(name, "fwmkey", create), master=master)

    def _once(self, name: str, suffix: str, create: Callable[[Path], None]) -> Path:
        path = self.cache / f"{name.replace(' ', '-')}.{suffix}"
        if not path.exists():
            log.info("%s: making the triggers of %s", self.network.name, name)
            started = time.monotonic()
            create(path.with_suffix(".part"))
            path.with_suffix(".seconds").write_text(f"{time.monotonic() - started:.1f}")
            path.with_suffix(".part").replace(path)
        self.seconds[name] = float(path.with_suffix(".seconds").read_text())
        return path


def _save(inputs: Tensor, path: Path) -> None:
    save_file({"inputs": inputs.contiguous()}, path)


def _yin2022(network: Network, device: torch.device) -> Tensor:
    """As `embed(method="yin2022")` makes them.

    Raises:
        EmbeddingError: They are not had, or not within days on this device.
    """
    if device.type == "cpu" and max(network.input_shape) > 64:
        raise EmbeddingError(
            ErrorCode.PAIRS_NOT_FOUND, "a step of its generator takes a CPU an hour: use --device cuda"
        )
    secret = SecretKey(hashlib.sha256(f"{network.name}/yin2022".encode()).digest())
    target = Target.of(network.model, network.input_shape, network.input_range, (), device, "float32", torch.float32)

    def report(progress: Progress) -> None:
        log.info("%s: yin2022, step %d, loss %.3f", network.name, progress.done, progress.loss)

    inputs, _ = yin2022.make(target, secret, report)
    return inputs


def _plain(network: Network) -> Tensor:
    order = torch.randperm(len(network.test_images), generator=generator("plain images"))
    return network.test_images[order[:COUNT]]


def _lowest_margin(network: Network) -> Tensor:
    """Those of all test images with the smallest difference between the two largest logits."""
    top = forward(network.model, network.test_images).topk(2, 1).values
    return network.test_images[(top[:, 0] - top[:, 1]).argsort()[:COUNT]]


def _random_noise(network: Network) -> Tensor:
    low, high = network.input_range
    return low + (high - low) * torch.rand(COUNT, *network.input_shape, generator=generator("random noise"))


def _ftg(network: Network) -> Tensor:
    """Descent of the variance of softmax f, x <- clamp(x - eps sign grad) (Yin et al., arXiv 2305.09684).

    The variance is that of one input's K probabilities. eps is a quarter of a grey level, a choice of
    ours; the least variance met is kept.
    """
    low, high = network.input_range
    eps = (high - low) / 255 / 4
    x = _lowest_margin(network)
    best, least = x.clone(), torch.full((COUNT,), torch.inf)
    for _ in range(network.trigger_steps):
        variance, gradient = _differentiate(network.model, x, lambda f: f.softmax(1).var(1, correction=0))
        best, least = _keep(best, least, x, variance)
        x = (x - eps * gradient.sign()).clamp(low, high)
    return best


def _ibsf(network: Network, k: int = 10) -> Tensor:
    """Ascent of the entropy of the k largest probabilities (Bai et al., ICML 2024).

    From the authors' code: SGD with learning rate 1 on pixels in [0, 1], within an L2 ball of radius 1
    round the start, the largest entropy met is kept. They take 5,000 steps and k from 2 to K; their
    sensitivity grows with k.
    """
    low, high = network.input_range
    start = (_lowest_margin(network) - low) / (high - low)
    u = start.clone()
    best, least = u.clone(), torch.full((COUNT,), torch.inf)

    def partial_entropy(logits: Tensor) -> Tensor:
        logs = logits.log_softmax(1).topk(min(k, logits.shape[1]), 1).values
        return (logs.exp() * logs).sum(1)

    for _ in range(network.trigger_steps):
        loss, gradient = _differentiate(network.model, low + (high - low) * u, partial_entropy)
        best, least = _keep(best, least, u, loss)
        away = u - (high - low) * gradient - start
        length = away.flatten(1).norm(dim=1).clamp(min=1).view(-1, *[1] * (u.dim() - 1))
        u = (start + away / length).clamp(0, 1)
    return low + (high - low) * best


def _sensitive_samples(network: Network) -> Tensor:
    """Ascent of ||d f / d W||^2 for the last layer's weights W (He et al., CVPR 2019, arXiv 1808.03277).

    The last layer is linear, f_j = W_j h + b_j, so the norm is K ||h||^2 and no second derivative is
    needed. From the authors' code: Adam at 0.1 grey levels, clamped to images.
    """
    low, high = network.input_range
    hidden: list[Tensor] = []
    head = network.model.get_submodule(network.head)
    hook = head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    try:
        x = _lowest_margin(network).clone().requires_grad_()
        optimizer = torch.optim.Adam([x], 0.1 * (high - low) / 255)
        for _ in range(network.trigger_steps):
            hidden.clear()
            network.model(x)
            (x.grad,) = torch.autograd.grad(-hidden[0].flatten(1).square().sum(), x)
            optimizer.step()
            with torch.no_grad():
                x.clamp_(low, high)
        return x.detach()
    finally:
        hook.remove()


def _differentiate(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Loss [n] of each input, and its gradient in the input."""
    x = x.detach().requires_grad_()
    values = loss(model(x))
    return values.detach(), torch.autograd.grad(values.sum(), x)[0]


def _keep(best: Tensor, least: Tensor, x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    better = values < least
    return torch.where(better.view(-1, *[1] * (x.dim() - 1)), x, best), torch.where(better, values, least)


BASELINES: dict[str, Callable[[Network], Tensor]] = {
    "plain images": _plain,
    "lowest margin": _lowest_margin,
    "random noise": _random_noise,
    "ftg": _ftg,
    "ibsf": _ibsf,
    "sensitive samples": _sensitive_samples,
}
