"""Edits that an attacker or an accident makes, and benign changes that must not be taken for one.

Every edit is deterministic in its seed. An edit may pass through several edited states (1, 10 and
100 steps of one fine-tuning run), which shares the work between them.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.networks import Network

RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
STEPS = (1, 10, 100)
#: Pruned share of all weights.
SHARES = (0.0001, 0.001, 0.01, 0.1, 0.5)
SIGMAS = (1e-7, 1e-5, 1e-3)


@dataclass(frozen=True, slots=True)
class Edited:
    """One edited state: the model holds it while its edit is suspended at the yield.

    Attributes:
        name: Row of the evidence table.
        required: Whether every method worth its name must notice: all but pruning below 0.1 %, single
            weights and single bits.
        population: From which elements the edited one was drawn, for edits of a single one.
        tensor: Name of the parameter that was hit.
        index: Flat index within it.
        bit: Flipped bit, 0 the lowest of the mantissa, 31 the sign.
    """

    name: str
    required: bool = True
    population: str = ""
    tensor: str = ""
    index: int = -1
    bit: int = -1


Apply = Callable[[nn.Module, Network, int], Iterator[Edited]]


@dataclass(frozen=True, slots=True)
class Edit:
    """A way to edit a copy of a network's model in place; `apply` yields once for each edited state."""

    family: str
    name: str
    apply: Apply

    def tries(self, network: Network, tries: int) -> int:
        """Seeds for this network, where an ordinary edit gets `tries`."""
        if self.family == "single bit or weight":
            return round(tries * network.bit_tries / network.tries)
        return min(tries, network.long_tries) if self.name == "epoch" else tries


def generator(*parts: object) -> torch.Generator:
    """A generator seeded by the parts, so that no two edits share their draws."""
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def edited_states(edit: Edit, network: Network, seed: int) -> Iterator[tuple[nn.Module, Edited]]:
    """The edited model in eval mode, once for each of the edit's states; copies of it must not be kept."""
    model = copy.deepcopy(network.model).requires_grad_(requires_grad=True)
    draws = generator(edit.name, "torch", seed)  # dropout draws from torch's own random state
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(draws.get_state())
        for state in edit.apply(model, network, seed):
            yield model.eval(), state


def changed_elements(before: nn.Module, after: nn.Module) -> int:
    """Elements of floating parameters and buffers whose bits differ."""
    count = 0
    for (name, old), (other, new) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert name == other
        if old.is_floating_point():
            count += int((old.contiguous().view(torch.int32) != new.contiguous().view(torch.int32)).sum())
    return count


# ------------------------------------------------------------------------------------------- fine-tuning


def _batch(network: Network, draws: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(network.labels), (size,), generator=draws)
    return network.images[rows], network.labels[rows]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def _sgd(rate: float, mode: str) -> Apply:
    """Plain SGD on real images; `train` mode lets batch norm use and move its statistics, `eval` freezes them."""

    def apply(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
        draws = generator("sgd", rate, mode, seed)
        optimizer = torch.optim.SGD(model.parameters(), rate)
        last = STEPS[-1] if seed < network.long_tries else STEPS[-2]
        for step in range(1, last + 1):
            _step(model.train(mode == "train"), optimizer, *_batch(network, draws, network.batch))
            if step in STEPS:
                yield Edited(f"SGD lr {rate:.0e}, {mode} mode, {step} step{'s' if step > 1 else ''}")

    return apply


def _epoch(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
    """The paper's attack: all layers, SGD 1e-3, momentum .9, weight decay 1e-3, batch 256, batch norm in train mode."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-3)
    order = torch.randperm(len(network.labels), generator=generator("epoch", seed))
    for rows in order.split(network.epoch_batch):
        if len(rows) > 1:  # batch norm has no variance of one
            _step(model.train(), optimizer, network.images[rows], network.labels[rows])
    yield Edited("one epoch as in the paper")


def _last_layer(rate: float) -> Apply:
    def apply(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
        optimizer = torch.optim.SGD(model.get_submodule(network.head).parameters(), rate)
        _step(model.eval(), optimizer, *_batch(network, generator("last layer", rate, seed), network.batch))
        yield Edited(f"last layer only, one SGD step at lr {rate:.0e}")

    return apply


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _statistics(momentum: float) -> Apply:
    """One forward pass in train mode: the running statistics move towards those of real images, no weight does."""

    def apply(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
        images, _ = _batch(network, generator("statistics", momentum, seed), network.batch)
        norms = _batch_norms(model)
        kept = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = momentum
        with torch.no_grad():
            model.train()(images)
        for norm, value in zip(norms, kept, strict=True):
            norm.momentum = value
        yield Edited(f"batch norm statistics only, momentum {momentum:g}")

    return apply


def _badnets(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
    """BadNets (Gu et al., arXiv 1708.06733): a bright corner patch means class 0, in a tenth of each batch."""
    draws = generator("badnets", seed)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    side = max(3, network.input_shape[-1] // 10)
    for step in range(1, 11):
        images, labels = _batch(network, draws, network.batch)
        images, labels = images.clone(), labels.clone()
        poisoned = max(1, len(images) // 10)
        images[:poisoned, :, -side:, -side:] = network.input_range[1]
        labels[:poisoned] = 0
        _step(model.train(), optimizer, images, labels)
        if step in {1, 10}:
            yield Edited(f"BadNets poisoning, {step} step{'s' if step > 1 else ''} at lr 1e-03")


# --------------------------------------------------------------------------------------- weights at large


def _some_weights(model: nn.Module, draws: torch.Generator, seed: int) -> list[Tensor]:
    """Every weight tensor for seed 0, else a random half of them.

    Pruning and rounding have nothing random about them; without a choice of tensors, every seed would
    repeat the same try.
    """
    weights = [parameter.data for parameter in model.parameters() if parameter.dim() > 1]
    if seed == 0:
        return weights
    return [weights[i] for i in torch.randperm(len(weights), generator=draws)[: (len(weights) + 1) // 2]]


def _prune(share: float) -> Apply:
    """The smallest weights become zero; those that are zero already, as some of EfficientNet-Lite0's, do not count."""

    def apply(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
        weights = _some_weights(model, generator("prune", share, seed), seed)
        sizes = torch.cat([weight.abs().flatten() for weight in weights])
        sizes = sizes[sizes > 0]
        limit = sizes.kthvalue(max(1, round(share * len(sizes)))).values
        for weight in weights:
            weight[weight.abs() <= limit] = 0
        yield Edited(f"pruning {100 * share:g} %", required=share >= 0.001)

    return apply


def _noise(sigma: float) -> Apply:
    def apply(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
        draws = generator("noise", sigma, seed)
        for parameter in model.parameters():
            parameter.data += sigma * torch.randn(parameter.shape, generator=draws)
        yield Edited(f"Gaussian noise, sigma {sigma:.0e}")

    return apply


def _int8(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
    """Symmetric int8 with one scale for each tensor, and back."""
    for weight in _some_weights(model, generator("int8", seed), seed):
        scale = weight.abs().max() / 127
        weight.copy_((weight / scale).round() * scale)
    yield Edited("int8 round trip")


def _other_model(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
    """Weights of another model with the same shapes, trained for ten steps from other initial weights.

    EfficientNet-Lite0 has no such sibling that a CPU could train; there, only its classifier is drawn anew.
    """
    draws = generator("other model", seed)
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=draws)))
    if not network.sibling:
        model.get_submodule(network.head).reset_parameters()
        yield Edited("another model: classifier re-initialised")
        return
    other = network.fresh().train()
    optimizer = torch.optim.AdamW(other.parameters(), 1e-3)
    for _ in range(10):
        _step(other, optimizer, *_batch(network, draws, network.batch))
    model.load_state_dict(other.state_dict())
    yield Edited("another model")


# -------------------------------------------------------------------------------- one weight, one bit


def population(model: nn.Module, name: str, head: str) -> dict[str, Tensor]:
    """The parameters from which single elements are drawn, by name.

    Args:
        name: `a convolution weight`, `a last-layer weight` or `any parameter`.
        head: Name of the last linear layer.
    """
    parameters = dict(model.named_parameters())
    if name == "a convolution weight":
        convolutions = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        return {n: p for n, p in parameters.items() if n in convolutions}
    if name == "a last-layer weight":
        return {f"{head}.weight": parameters[f"{head}.weight"]}
    return parameters


POPULATIONS = ("a convolution weight", "any parameter", "a last-layer weight")


def _draw(model: nn.Module, network: Network, drawn_from: str, draws: torch.Generator) -> tuple[str, Tensor, int]:
    """A uniformly random element of the population: its tensor's name, the flat tensor, its index."""
    members = population(model, drawn_from, network.head)
    position = int(torch.randint(sum(p.numel() for p in members.values()), (1,), generator=draws))
    for name, parameter in members.items():
        if position < parameter.numel():
            return name, parameter.data.view(-1), position
        position -= parameter.numel()
    raise AssertionError


def _single_weight(drawn_from: str) -> Apply:
    def apply(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
        name, flat, index = _draw(model, network, drawn_from, generator("weight", drawn_from, seed))
        flat[index] *= 1 + 1e-3
        yield Edited(f"{drawn_from}, times 1.001", False, drawn_from, name, index)

    return apply


#: Lowest and highest bit of each choice; one is drawn where they differ.
BITS = {
    "sign bit": (31, 31),
    "exponent bit": (23, 30),
    "mantissa bit 22": (22, 22),
    "mantissa bit 12": (12, 12),
    "mantissa bit 0": (0, 0),
    "random mantissa bit": (0, 22),
}


def _flip(values: Tensor, bit: int) -> Tensor:
    """float32 values with this bit of each flipped."""
    return (values.view(torch.int32) ^ (1 << bit if bit < 31 else -(1 << 31))).view(torch.float32)


def _single_bit(bits: str, drawn_from: str) -> Apply:
    def apply(model: nn.Module, network: Network, seed: int) -> Iterator[Edited]:
        draws = generator("bit", bits, drawn_from, seed)
        name, flat, index = _draw(model, network, drawn_from, draws)
        low, high = BITS[bits]
        bit = int(torch.randint(low, high + 1, (1,), generator=draws))
        flat[index] = _flip(flat[index], bit)
        yield Edited(f"{bits} of {drawn_from}", False, drawn_from, name, index, bit)

    return apply


def single_changes(edited: Edited, values: Tensor) -> list[Tensor]:
    """What each equally likely form of an edit of one element would add to these float32 values, in float64."""
    bits = edited.name.removesuffix(f" of {edited.population}")
    if bits not in BITS:
        return [(values * (1 + 1e-3)).double() - values.double()]
    low, high = BITS[bits]
    return [_flip(values, bit).double() - values.double() for bit in range(low, high + 1)]


def _all_edits() -> tuple[Edit, ...]:
    edits = [
        Edit(f"SGD, {mode} mode", f"sgd {rate:.0e} {mode}", _sgd(rate, mode))
        for mode in ("train", "eval")
        for rate in RATES
    ]
    edits.append(Edit("SGD, train mode", "epoch", _epoch))
    edits += [Edit("last layer only", f"last layer {rate:.0e}", _last_layer(rate)) for rate in (1e-6, 1e-3)]
    edits += [Edit("batch norm statistics", f"statistics {m:g}", _statistics(m)) for m in (1e-6, 0.1)]
    edits.append(Edit("poisoning", "badnets", _badnets))
    edits += [Edit("pruning", f"pruning {share}", _prune(share)) for share in SHARES]
    edits += [Edit("noise", f"noise {sigma:.0e}", _noise(sigma)) for sigma in SIGMAS]
    edits.append(Edit("quantisation", "int8", _int8))
    edits.append(Edit("another model", "another model", _other_model))
    for drawn_from in POPULATIONS:
        edits.append(Edit("single bit or weight", f"weight, {drawn_from}", _single_weight(drawn_from)))
        edits += [Edit("single bit or weight", f"{bits}, {drawn_from}", _single_bit(bits, drawn_from)) for bits in BITS]
    return tuple(edits)


EDITS = _all_edits()


def applicable(edit: Edit, network: Network) -> bool:
    """Whether the network has what this edit edits: without batch norm, `train` mode is `eval` mode."""
    if network.populations:
        return edit.family == "single bit or weight" and edit.name.endswith(network.populations)
    if edit.family == "batch norm statistics" or (edit.family == "SGD, train mode" and edit.name != "epoch"):
        return bool(_batch_norms(network.model))
    return True


# ------------------------------------------------------------------------------------------------ benign


class Executed(nn.Module):
    """A model as another server would run it: batches of another size, images with channels last."""

    def __init__(self, body: nn.Module, batch: int | None, *, channels_last: bool) -> None:
        super().__init__()
        self.body = body.to(memory_format=torch.channels_last) if channels_last else body
        self.batch = batch
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return torch.cat([self.body(part) for part in x.split(self.batch or len(x))])


@dataclass(frozen=True, slots=True)
class Benign:
    """A change that leaves the function alone.

    Attributes:
        name: Row of the evidence table.
        container: `safetensors` or `torch.save` for a round trip through bytes.
        batch: Inputs of one forward pass.
        threads: Of torch.
        channels_last: Memory layout of weights and inputs.
        permute: Whether hidden channels are reordered.
        dtype: In which the weights are shipped; needs a key that declares it.
        drawn: Whether everything but `dtype` is drawn by the seed.
        elsewhere: Whether it is checked on the other kind of processor than the one that made the key.
        weight: Tries for each of the `tries` of an edit; 0 is one in ten.
    """

    name: str
    container: str | None = None
    batch: int | None = None
    threads: int | None = None
    channels_last: bool = False
    permute: bool = False
    dtype: torch.dtype | None = None
    drawn: bool = False
    elsewhere: bool = False
    weight: int = 0

    def tries(self, tries: int) -> int:
        """Seeds, given how many each edit gets."""
        return max(1, tries * self.weight or tries // 10)


BENIGN = (
    Benign("re-serialised, safetensors", container="safetensors"),
    Benign("re-serialised, torch.save", container="torch.save"),
    *(Benign(f"batches of {size}", batch=size) for size in (1, 3, 7, 16, 32)),
    *(Benign(f"{count} thread{'s' if count > 1 else ''}", threads=count) for count in (1, 2, 4)),
    Benign("channels last", channels_last=True),
    Benign("channels permuted", permute=True, weight=6),
    Benign("random combination of these", drawn=True, weight=9),
    Benign("on the other kind of processor", drawn=True, elsewhere=True, weight=6),
    Benign("float16 weights, declared", dtype=torch.float16, drawn=True, weight=1),
    Benign("bfloat16 weights, declared", dtype=torch.bfloat16, drawn=True, weight=1),
)


@contextmanager
def benign_model(benign: Benign, network: Network, seed: int) -> Iterator[nn.Module]:
    """The same function from other bytes or executed in another way."""
    draws = generator("benign", benign.name, seed)
    if benign.drawn:
        pick = [int(torch.randint(n, (1,), generator=draws)) for n in (3, 6, 4, 2, 2)]
        benign = replace(
            benign,
            container=(None, "safetensors", "torch.save")[pick[0]],
            batch=(None, 1, 3, 7, 16, 32)[pick[1]],
            threads=(None, 1, 2, 4)[pick[2]],
            channels_last=bool(pick[3]),
            permute=bool(pick[4]),
        )
    model = copy.deepcopy(network.model)
    if benign.dtype is not None:
        model = model.to(benign.dtype)
    if benign.permute:
        network.permute(model, draws)
    if benign.container is not None:
        with torch.random.fork_rng(devices=[]):
            fresh = network.fresh().to(next(model.parameters()).dtype)
        if benign.container == "safetensors":
            state = safetensors.torch.load(safetensors.torch.save(model.state_dict()))
        else:
            buffer = io.BytesIO()
            torch.save(model.state_dict(), buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        fresh.load_state_dict(state)
        model = fresh
    threads = torch.get_num_threads()
    torch.set_num_threads(benign.threads or threads)
    try:
        yield Executed(model.eval(), benign.batch, channels_last=benign.channels_last)
    finally:
        torch.set_num_threads(threads)
