"""The report's networks for 32x32 images: ResNet-18 (its figures 1 and 2) and VGG-16 with BatchNorm (appendix A)."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Model:
    """A network and what others need of it.

    `make`: (C, K, width, norm) -> module. Its `cuts`, if it has any, are submodules through whose output everything passes
    that later ones take from earlier ones: there a measured step cuts its graph, to free memory earlier. `adjustable`:
    whether it has a width and a choice of norm; `least_side`: pixels a side that it needs.
    """

    make: Callable[[int, int, int, str], nn.Module]
    adjustable: bool = False
    least_side: int = 1


MODELS = {  # a new model is one function, entered here
    "resnet18": Model(ResNet18, adjustable=True),
    "vgg16": Model(lambda C, K, width, norm: vgg16(C, K), least_side=32),
    "vgg16-linear": Model(lambda C, K, width, norm: vgg16(C, K, linear=True), least_side=32),
}


def build(name: str, C: int, K: int, width: int, norm: str, seed: int) -> nn.Module:
    """Model `name` on the CPU in float32, its weights drawn from the 32-bit `seed` and nothing else.

    The global CPU generator, which torch's layers draw from, is left as it was.
    """
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)  # in float64 other numbers would be drawn: another network
        try:
            return MODELS[name].make(C, K, width, norm)
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
        if last == "running_var" and modules[owner].num_batches_tracked is None:
            state[f"{owner}.{COUNTER}"] = torch.tensor(steps)
    return state


def has_dropout(model: nn.Module) -> bool:
    """Whether a training forward draws random numbers."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
