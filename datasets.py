"""The named data sets: torchvision's and a drawn one. Each is a function of the options that returns a `data.Source` in
host memory, and one entry of `DATASETS` with what others need of it. Own files are read by `engine.sources`, which also
downloads and checks what an entry asks for before its function is called.

Shapes: N examples of the set, K classes, C channels, H x W pixels.
"""

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data import Source, flip_map, generator, pixel_statistics

CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
CIFAR10_FLIPS = {  # Patrini et al. 2017 (1609.03683), section 5
    "truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat",
}  # fmt: skip
CIFAR100_FOLDER = "cifar-100-python"
CIFAR100_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
FMNIST_FOLDER = "FashionMNIST/raw"
FMNIST_MD5 = {  # of the unpacked files; torchvision knows only those of the archives
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
FMNIST_FLIPS = {  # Zhang & Sabuncu 2018 (1805.07836), section 4
    "Ankle boot": "Sneaker", "Sneaker": "Sandal", "Pullover": "Shirt", "Coat": "Dress", "Dress": "Coat",
}  # fmt: skip


def load_cifar10(args) -> Source:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images (32, 32, 3)."""
    from torchvision.datasets import CIFAR10

    train, test = (checked_before(CIFAR10)(args.data_dir, train=part) for part in (True, False))
    return Source(
        torch.from_numpy(train.data),
        torch.tensor(train.targets),
        None,
        torch.from_numpy(test.data),
        torch.tensor(test.targets),
        tuple(train.classes),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),  # of all pixels; the widespread 0.2023, 0.1994, 0.2010 is a mistake
        flip_map(tuple(train.classes), CIFAR10_FLIPS),
    )


def load_cifar100(args) -> Source:
    """CIFAR-100 (Krizhevsky 2009): 50,000 and 10,000 images (32, 32, 3) of 100 classes in 20 superclasses.

    A class is taken for the next of its superclass, the fifth for the first (Patrini et al. 2017, section 5). Which
    class is in which superclass is read from the set's own coarse labels.
    """
    from torchvision.datasets import CIFAR100

    train, test = (checked_before(CIFAR100)(args.data_dir, train=part) for part in (True, False))
    with open(Path(args.data_dir) / CIFAR100_FOLDER / "train", "rb") as f:
        coarse = torch.tensor(pickle.load(f, encoding="latin1")["coarse_labels"])  # the published bytes, just checked
    x, y = torch.from_numpy(train.data), torch.tensor(train.targets)
    flips = torch.arange(len(train.classes))
    for superclass in coarse.unique():
        members = y[coarse == superclass].unique()  # sorted
        flips[members] = members.roll(-1)
    return Source(
        x,
        y,
        None,
        torch.from_numpy(test.data),
        torch.tensor(test.targets),
        tuple(train.classes),
        *pixel_statistics(x),
        flips,
    )


def load_fmnist(args) -> Source:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 images, resized from 28x28 to (32, 32, 1)."""
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms.v2 import functional as TF

    def pixels(part):
        resized = TF.resize(part.data[:, None], [32, 32], TF.InterpolationMode.BILINEAR, antialias=True)
        return resized.permute(0, 2, 3, 1).contiguous()  # (N, 1, 32, 32) -> (N, 32, 32, 1)

    train, test = (FashionMNIST(args.data_dir, train=part) for part in (True, False))
    names = tuple(train.classes)
    return Source(
        pixels(train),
        train.targets,
        None,
        pixels(test),
        test.targets,
        names,
        (0.2860,),
        (0.3530,),
        flip_map(names, FMNIST_FLIPS),
    )


SHAPES = ("disc", "square", "triangle", "cross", "ring")
FILLS = ("plain", "striped")


def synthetic(n: int, seed: int, stream: str) -> tuple[Tensor, Tensor]:
    """`n` drawn images (n, 32, 32, 3) uint8 and labels (n,) int64 of ten classes, in equal shares.

    A class is one of five shapes with a plain or a striped fill: label = shape + 5 * striped. Position, size, angle,
    both colours, stripes and background are random; the background is itself plain or striped, holds three small
    discs as clutter, and pixel noise lies over all. So neither colour nor overall texture tells the class.
    The same seed and stream give the same images (up to a unit of rounding between CPU types).
    """
    g = generator(seed, f"synthetic-{stream}")

    def uniform(*shape, low=0.0, high=1.0):
        return torch.rand(*shape, generator=g, dtype=torch.float32) * (high - low) + low

    labels = torch.arange(n)[torch.randperm(n, generator=g)] % 10
    shape, striped = labels % 5, labels // 5
    grid = torch.arange(32, dtype=torch.float32) - 15.5
    y0, x0 = grid[:, None], grid[None, :]

    def stripes(strength):  # (m, 32, 32), one pattern of random angle, period and phase an image
        m = len(strength)
        angle, phase = uniform(2, m, 1, 1, high=2 * math.pi)
        wave = 2 * math.pi / uniform(m, 1, 1, low=3.0, high=5.0)
        along = torch.cos(angle) * x0 + torch.sin(angle) * y0
        return strength[:, None, None] * torch.sign(torch.sin(wave * along + phase))

    out = torch.empty(n, 32, 32, 3, dtype=torch.uint8)
    for a in range(0, n, 2000):  # in blocks, to bound the memory
        k, fill = shape[a : a + 2000], striped[a : a + 2000].float()
        m = len(k)
        cx, cy = uniform(2, m, 1, 1, low=-4.0, high=4.0)
        size = uniform(m, 1, 1, low=8.0, high=12.0)
        angle = uniform(m, 1, 1, high=2 * math.pi)
        dx, dy = x0 - cx, y0 - cy
        u = (torch.cos(angle) * dx + torch.sin(angle) * dy) / size
        v = (torch.cos(angle) * dy - torch.sin(angle) * dx) / size
        r, au, av = (u * u + v * v).sqrt(), u.abs(), v.abs()
        inside = torch.stack(  # (5, m, 32, 32): negative within the shape
            [
                r - 0.9,
                torch.maximum(au, av) - 0.8,
                torch.maximum(v - 0.5, au * 0.866 - v * 0.5 - 0.5),
                torch.minimum(torch.maximum(au - 0.3, av - 1.0), torch.maximum(au - 1.0, av - 0.3)),
                (r - 0.75).abs() - 0.22,
            ]
        )[k, torch.arange(m)]
        cover = torch.sigmoid(-inside * size * 3)[..., None]  # soft edge, about a pixel wide
        back, front = uniform(m, 1, 1, 3, low=0.1, high=0.9), uniform(m, 1, 1, 3)
        front = back + torch.where(front < 0.5, -0.3 - 0.6 * front, 0.6 * front)  # 0.3 to 0.6 apart
        ground = back + stripes((uniform(m) < 0.5).float() * 0.08)[..., None]
        for _ in range(3):
            px, py = uniform(2, m, 1, 1, low=-15.0, high=15.0)
            near = ((x0 - px) ** 2 + (y0 - py) ** 2).sqrt() - uniform(m, 1, 1, low=1.0, high=3.0)
            spot = torch.sigmoid(-near * 3)[..., None]
            ground = ground * (1 - spot) + uniform(m, 1, 1, 3) * spot
        image = ground * (1 - cover) + (front + stripes(fill * 0.25)[..., None]) * cover
        image = image + 0.04 * torch.randn(m, 32, 32, 3, generator=g, dtype=torch.float32)
        out[a : a + 2000] = image.clamp(0, 1).mul(255).round().to(torch.uint8)
    return out, labels


def load_synthetic(args) -> Source:
    """The drawn set (`synthetic`), `--synthetic-train` and `--synthetic-test` images; always from seed 0.

    A plain shape and the same shape striped are taken for each other.
    """
    x, y = synthetic(args.synthetic_train, 0, "train")
    x_test, y_test = synthetic(args.synthetic_test, 0, "test")
    names = tuple(f"{fill} {shape}" for fill in FILLS for shape in SHAPES)
    return Source(x, y, None, x_test, y_test, names, *pixel_statistics(x), torch.arange(10).roll(5))


SIDES = 28, 224  # pixels that a side of own images may have


class Shape(NamedTuple):
    """Sizes of a set that are known before it is loaded, for estimates of memory and time."""

    train: int  # images
    test: int
    height: int  # pixels
    width: int
    channels: int
    classes: int
    val: int = 0  # images of a validation set of its own


class Files(NamedTuple):
    """Files that must lie below --data-dir: their folder, their MD5 sums, and `download(root)`, which fetches the folder."""

    folder: str
    md5: dict[str, str]
    download: Callable[[str], object]


@dataclass(frozen=True)
class DataSet:
    """A data set and what others need of it. `load`: options -> `Source`, whose `flips` say which classes are taken for
    one another; `model`: the default one; `shape`: options -> sizes, where they are known; `files`: what to download."""

    load: Callable[[object], Source]
    model: str = "resnet18"
    shape: Callable[[Any], Shape] | None = None
    files: Files | None = None


def checked_before(kind: type) -> type:
    """torchvision's class of a set, but without its own sums of all files, twice over: `Files` has them checked already."""
    return type(kind.__name__, (kind,), {"_check_integrity": lambda self: True})


def torchvision_download(name: str) -> Callable[[str], object]:
    """root -> the set that torchvision calls `name`, downloaded to there."""

    def download(root: str) -> object:
        import torchvision.datasets

        return getattr(torchvision.datasets, name)(root, train=True, download=True)

    return download


DATASETS = {  # a new set is one function, entered here
    "cifar10": DataSet(
        load_cifar10,
        shape=lambda args: Shape(50_000, 10_000, 32, 32, 3, 10),
        files=Files(CIFAR10_FOLDER, CIFAR10_MD5, torchvision_download("CIFAR10")),
    ),
    "cifar100": DataSet(
        load_cifar100,
        shape=lambda args: Shape(50_000, 10_000, 32, 32, 3, 100),
        files=Files(CIFAR100_FOLDER, CIFAR100_MD5, torchvision_download("CIFAR100")),
    ),
    "fmnist": DataSet(
        load_fmnist,
        "vgg16",
        lambda args: Shape(60_000, 10_000, 32, 32, 1, 10),
        Files(FMNIST_FOLDER, FMNIST_MD5, torchvision_download("FashionMNIST")),
    ),
    "synthetic": DataSet(
        load_synthetic, shape=lambda args: Shape(args.synthetic_train, args.synthetic_test, 32, 32, 3, 10)
    ),
}


def default_model(dataset: str) -> str:
    """The model of a run on `dataset` that names none; that of own files is ResNet-18."""
    return DATASETS[dataset].model if dataset in DATASETS else DataSet.model


def known_shape(args) -> Shape | None:
    """The sizes of the set that the options ask for, or None where they are not known before it is loaded."""
    entry = DATASETS.get(args.dataset)
    return entry.shape(args) if entry and entry.shape else None
