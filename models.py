"""Networks: the report's, ResNet-18 (its figures 1 and 2) and VGG-16 with BatchNorm (appendix A), a small ViT, any of
torchvision's classifiers, and a function of one's own.

Shapes: B images of C channels and H x W pixels, K classes.
"""

import random
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

import gradsplit
from data import InputError, one_line
from engine import ownfiles

GROUP = 8  # channels of a GroupNorm group


def norm_layer(norm: str):
    """channels -> module: BatchNorm for "bn", GroupNorm in groups of 8 channels for "gn"."""
    return nn.BatchNorm2d if norm == "bn" else lambda channels: nn.GroupNorm(channels // GROUP, channels)


class StridedPointwiseConv(nn.Conv2d):
    """A 1x1 convolution of stride s: a convolution of stride 1 on every s-th pixel, the same function and parameters.

    (B, C_in, H, W) -> (B, C_out, ceil(H/s), ceil(W/s)). Not left to torch's own stride, because oneDNN's weight gradient of
    a strided 1x1 convolution in channels_last with fewer input channels than a vector register holds (16 with AVX-512, 8
    with AVX2) writes past its workspace: memory is corrupted, or the gradient is wrong (oneDNN issue 6035).
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__(c_in, c_out, 1, bias=False)
        self.pixel_stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.pixel_stride, :: self.pixel_stride])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, section 4.2): (B, C_in, H, W) -> (B, C_out, H/s, W/s)."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = norm(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(StridedPointwiseConv(c_in, c_out, stride), norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem and no pooling before the stages; layer names as in common CIFAR ResNets.

    (B, C, H, W) -> logits (B, K). Stages of width, 2, 4 and 8 times `width` channels; 64 is the published one, with
    11,173,962 parameters for C = 3, K = 10.
    """

    def __init__(self, C: int, K: int, width: int = 64, norm: str = "bn") -> None:
        super().__init__()
        make = norm_layer(norm)
        self.conv1 = nn.Conv2d(C, width, 3, 1, 1, bias=False)
        self.bn1 = make(width)
        self.layer1 = self._stage(width, width, 1, make)
        self.layer2 = self._stage(width, 2 * width, 2, make)
        self.layer3 = self._stage(2 * width, 4 * width, 2, make)
        self.layer4 = self._stage(4 * width, 8 * width, 2, make)
        self.linear = nn.Linear(8 * width, K)
        self.cuts = [self.layer1, self.layer2, self.layer3]

    @staticmethod
    def _stage(c_in: int, c_out: int, stride: int, make) -> nn.Sequential:
        return nn.Sequential(BasicBlock(c_in, c_out, stride, make), BasicBlock(c_out, c_out, 1, make))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))  # 4x4 global average at 32x32


def vgg16(C: int, K: int, linear: bool = False) -> nn.Module:
    """torchvision's VGG-16 with BatchNorm (Simonyan & Zisserman 2015), for `C` channels and `K` classes.

    (B, C, H, W) -> logits (B, K), H, W of at least 32. 134,308,810 parameters for C = 1, K = 10; with `linear` the
    head is one linear layer on the 512 averaged features (14,722,890 parameters at C = 1, and no dropout).
    """
    from torchvision.models.vgg import VGG, cfgs, make_layers

    features = make_layers(cfgs["D"], batch_norm=True)
    features[0] = nn.Conv2d(C, 64, 3, padding=1)
    if linear:
        head = [("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("classifier", nn.Linear(512, K))]
        model = nn.Sequential(OrderedDict([("features", features), *head]))
    else:
        model = VGG(features, num_classes=K, init_weights=False)
    for m in model.modules():  # torchvision's initialization, for the new layers as well
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
            nn.init.zeros_(m.bias)
    model.cuts = [m for m in features if isinstance(m, nn.MaxPool2d)]
    return model


class Attention(nn.Module):
    """Self-attention with several heads (Vaswani et al. 2017, section 3.2): (B, T, D) -> (B, T, D).

    Written out and not left to a fused kernel, of which there is no second derivative.
    """

    def __init__(self, D: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )  # each (B, heads, T, D / heads)
        weights = (q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(B, T, D))


class EncoderBlock(nn.Module):
    """Attention and a hidden layer of 4 D units, each behind a LayerNorm and beside a shortcut: (B, T, D) -> (B, T, D)."""

    def __init__(self, D: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(D, eps=1e-6), Attention(D, heads)
        self.norm2, self.hidden = (
            nn.LayerNorm(D, eps=1e-6),
            nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.hidden(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) of the size S of Touvron et al. 2021: 12 blocks of 384 units, 6 heads.

    (B, C, H, W) -> logits (B, K), H and W being those of `size`, multiples of `patch`. No BatchNorm and no dropout;
    21,342,346 parameters for C = 3, K = 10, 32x32 pixels and patches of 4.
    """

    def __init__(self, C: int, K: int, size: tuple[int, int], patch: int = 4, D: int = 384, depth: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(C, D, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, D))
        self.position = nn.Parameter(torch.empty(1, 1 + (size[0] // patch) * (size[1] // patch), D))
        self.blocks = nn.Sequential(*(EncoderBlock(D, heads=6) for _ in range(depth)))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.linear = nn.Linear(D, K)
        self.cuts = list(self.blocks[2:-1:3])
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.linear(self.norm(self.blocks(x))[:, 0])


def torchvision_model(name: str, C: int, K: int, size: tuple[int, int]) -> nn.Module:
    """torchvision's classifier `name`, its weights drawn, for `C` channels and `K` classes: (B, C, H, W) -> logits (B, K).

    Its layers are as published; where C is not 3 the first convolution has the first C channels of its drawn weights. Those
    that are made for one size of image are made for `size`. Auxiliary classifiers are left out. Raises `InputError` where it
    takes no images of this size.
    """
    from torchvision.models import get_model

    where = f"--model {TORCHVISION}{name}"
    given: dict = (
        {"image_size": size[0]} if name.startswith("vit_") else {"input_size": size} if name == "maxvit_t" else {}
    )
    if name in ("googlenet", "inception_v3"):
        given = {"aux_logits": False, "init_weights": True}
    with as_input_error(f"{where}: torchvision, for images of {size[0]} x {size[1]} pixels,"):
        model = get_model(name, weights=None, num_classes=K, **given)
    if C != 3:
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        first.weight = nn.Parameter(first.weight.detach()[:, torch.arange(C) % 3].clone())
        first.in_channels = C
    if not next(model.parameters()).is_meta:
        try_out(model.to(memory_format=torch.channels_last), C, K, size, where)
    return model


def own_model(name: str, C: int, K: int, size: tuple[int, int]) -> nn.Module:
    """What the function of `name`, FILE.py:FUNCTION, makes of (C, K), tried on two images. Raises `InputError`.

    The file may import others of its folder. The trial leaves buffers as they were.
    """
    path, _, function = name.rpartition(":")
    where = f"--model {name}"
    with as_input_error(f"{where}: the file"):
        file = ownfiles.load(path)
    make = getattr(file, function, None)
    if not callable(make):
        raise InputError(f"{where}: the file has no function {function}")
    with as_input_error(f"{where}: {function}({C}, {K})"):
        model = make(C, K)
    if not isinstance(model, nn.Module):
        raise InputError(f"{where}: {function}({C}, {K}) returned a {type(model).__name__}, not a torch.nn.Module")
    with as_input_error(f"{where}: on the CPU the module"):  # one with lazy parameters has no shape yet
        model = model.cpu().train().to(memory_format=torch.channels_last)
    try_out(model, C, K, size, where)
    return model


def try_out(model: nn.Module, C: int, K: int, size: tuple[int, int], where: str) -> None:
    """Raise `InputError` unless `model` gives logits (2, K) of two images, with a gradient for all that is to be trained."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    images = torch.zeros(2, C, *size).to(memory_format=torch.channels_last)
    what = f"2 images of {C} x {size[0]} x {size[1]}"
    with as_input_error(f"{where}: of {what} the module"), noticed_draws(model) as model.that_draw:
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.shape != (2, K):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(f"{where}: of {what} the module makes {got}, not logits (2, {K})")
    with as_input_error(f"{where}: the module's gradient"):
        idle = idle_parameters(model, logits)
    if idle and not model.that_draw:  # else it may be used another time
        raise InputError(f"{where}: the logits do not depend on the parameter {idle[0]}; give it requires_grad=False")
    for name, b in model.named_buffers():
        if name in before:
            b.copy_(before[name])


def idle_parameters(model: nn.Module, logits: Tensor) -> list[str]:
    """Names of the parameters to be trained on which `logits` do not depend."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(logits.sum(), list(trained.values()), allow_unused=True)
    return [name for name, g in zip(trained, gradients, strict=True) if g is None]


@contextmanager
def noticed_draws(model: nn.Module):
    """Within the block, the modules of `model` in whose own code, not that of their children, random numbers are drawn."""
    found: list[nn.Module] = []
    running, handles, last = [model], [], generator_states()

    def look(change: Callable[[], object]) -> None:
        nonlocal last
        before, last = last, generator_states()
        if last != before and running[-1] not in found:
            found.append(running[-1])
        change()

    for m in model.modules():
        handles.append(m.register_forward_pre_hook(lambda m, args: look(lambda: running.append(m))))
        handles.append(m.register_forward_hook(lambda *_: look(running.pop)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def generator_states() -> tuple:
    """Of the global generators of torch (on the CPU), Python and numpy."""
    of_numpy = np.random.get_state(legacy=False)["state"]
    return bytes(torch.get_rng_state().numpy()), random.getstate(), of_numpy["pos"], bytes(of_numpy["key"])


def try_to_measure(model: nn.Module, C: int, size: tuple[int, int], where: str) -> None:
    """Raise `InputError` unless the gradient of `model` can be had for parts of a batch, as measuring takes it."""
    context = gradsplit.Context(model, torch.device("cpu"), nullcontext, lambda t: t, lambda: 1.0)
    with without_a_trace(model), as_input_error(f"{where}: measuring (--measure off does not)"):
        images = torch.zeros(2, C, *size).to(memory_format=torch.channels_last)
        gradsplit.Forward(context, images, 2).row(torch.zeros(2, dtype=torch.int64), torch.ones(2))


def try_one(model: nn.Module, C: int, size: tuple[int, int], where: str) -> None:
    """Raise `InputError` unless `model` can be trained on a batch of one image: BatchNorm cannot where that is one pixel to it."""
    with without_a_trace(model), torch.no_grad(), as_input_error(f"{where}: on a batch of one image the module"):
        model(torch.zeros(1, C, *size))


@contextmanager
def without_a_trace(model: nn.Module):
    """For trials of a new network, which is in float32: in global generators and buffers all is as before."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), gradsplit.batchnorm_mode(model, "train"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


class as_input_error:
    """Turn whatever another's code raises within the block into an `InputError` of one line."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, e, trace) -> None:
        if isinstance(e, (Exception, SystemExit)) and not isinstance(e, InputError):
            raise InputError(f"{self.what} raised {type(e).__name__}: {one_line(e)}") from e


@dataclass(frozen=True)
class Model:
    """A network and what others need of it.

    `make`: (C, K, width, norm) -> module. Its `cuts`, if it has any, are submodules through whose output everything passes
    that later ones take from earlier ones: there a measured step cuts its graph, to free memory earlier. `adjustable`:
    whether it has a width and a choice of norm; `least_side`: pixels a side that it needs; `multiple`: of how many pixels
    each side is one; `sized`: whether `make` is given the images' `size` (H, W), too.
    """

    make: Callable[..., nn.Module]
    adjustable: bool = False
    least_side: int = 1
    multiple: int = 1
    sized: bool = False


MODELS = {  # a new model is one function, entered here
    "resnet18": Model(ResNet18, adjustable=True),
    "vgg16": Model(lambda C, K, width, norm: vgg16(C, K), least_side=32),
    "vgg16-linear": Model(lambda C, K, width, norm: vgg16(C, K, linear=True), least_side=32),
    "vit-small": Model(lambda C, K, width, norm, size: ViT(C, K, size), multiple=4, sized=True),
}
TORCHVISION = "torchvision:"  # before the name of one of its classifiers


def is_own(name: str) -> bool:
    """Whether this is FILE.py:FUNCTION."""
    return name not in MODELS and name.rpartition(":")[0].endswith(".py")


def entry(name: str) -> Model:
    """The model `name`: of `MODELS`, torchvision:NAME, or FILE.py:FUNCTION."""
    if name in MODELS:
        return MODELS[name]
    make = own_model if is_own(name) else torchvision_model
    return Model(lambda C, K, width, norm, size: make(name.removeprefix(TORCHVISION), C, K, size), sized=True)


def build_model(
    name: str, C: int, K: int, width: int, norm: str, seed: int, size: tuple[int, int] = (32, 32)
) -> nn.Module:
    """Model `name` for images of `size` (H, W), on the CPU in float32, its weights drawn from the 32-bit `seed` and nothing else.

    The global CPU generator, which torch's layers draw from, is left as it was. Raises `InputError` for a function of
    one's own that does not make a network.
    """
    before, model = torch.get_default_dtype(), entry(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)  # in float64 other numbers would be drawn: another network
        try:
            return model.make(C, K, width, norm, **({"size": size} if model.sized else {}))
        finally:
            torch.set_default_dtype(before)


COUNTER = "num_batches_tracked"


def counts_in_vain(module: nn.Module) -> bool:
    """Whether this is a BatchNorm of fixed momentum, which has no use for a count of its batches and can go without."""
    fixed = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None
    return fixed and not isinstance(module, nn.SyncBatchNorm)  # that one insists


def stop_counting(model: nn.Module) -> None:
    """Take its BatchNorms' counters of batches out of `model`: on a GPU each is one launch more a step. What it loads may have
    them."""
    for module in filter(counts_in_vain, model.modules()):
        module.num_batches_tracked = None
        module.register_load_state_dict_pre_hook(lambda _, state, prefix, *__: state.pop(prefix + COUNTER, None))


def counted_state(model: nn.Module, steps: int) -> dict[str, Tensor]:
    """`model.state_dict()` with the counters that `stop_counting` took out, as they would stand after `steps` training
    steps: the file of a network has torch's usual names."""
    state, modules = {}, dict(model.named_modules())
    for name, value in model.state_dict().items():
        state[name] = value
        owner, _, last = name.rpartition(".")
        module = modules.get(owner)
        if module is None or last != "running_var":
            continue
        if counts_in_vain(module) and module.num_batches_tracked is None:
            state[f"{owner}.{COUNTER}"] = torch.tensor(steps)
    return state


def drawing_modules(model: nn.Module) -> list[nn.Module]:
    """Those in whose own code a training forward draws random numbers: as `try_out` has seen, else torch's kinds of dropout."""
    tried = getattr(model, "that_draw", None)
    return tried if tried is not None else [m for m in model.modules() if isinstance(m, _DropoutNd) and m.p > 0]


def has_dropout(model: nn.Module) -> bool:
    """Whether a training forward draws random numbers."""
    return bool(drawing_modules(model))
