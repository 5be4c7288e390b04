"""Where the images come from: torchvision's sets, a drawn one, own files. Each is a function of the options that returns
a `data.Source` in host memory, or raises `InputError` for whatever cannot be used; `DATASETS` names them.

Shapes: N examples of the set, K classes, C channels, H x W pixels.
"""

import csv
import hashlib
import math
import os
import pickle
import socket
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import InputError, Source, flip_map, generator, pixel_statistics
from engine import interrupts

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
DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def check_files(folder: Path, md5: dict[str, str]) -> None:
    """Raise `InputError` naming the first file of `folder` that is missing, unreadable or not the published one.

    torchvision's own check reports a damaged and a missing file alike and does not look into unpacked
    Fashion-MNIST files at all.
    """
    for name, want in md5.items():
        path = folder / name
        if not os.path.isfile(path):
            raise InputError(f"--data-dir: {path} is missing; remove {folder} to have the set downloaded again")
        try:
            with open(path, "rb") as f:
                have = hashlib.file_digest(f, "md5").hexdigest()
        except OSError as e:
            raise InputError(f"--data-dir: {path} cannot be read ({e.strerror})") from e
        if have != want:
            raise InputError(f"--data-dir: {path} is damaged (md5 {have}, the published file has {want})")


@contextmanager
def alone(folder: Path):
    """Hold a lock file in `folder`, made if absent, so that of several processes one downloads.

    Goes on without where there is no such lock to be had: two downloads are a waste, not a mistake.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".download.lock"
    try:
        f = open(path, "w")
    except OSError:  # of another user
        yield
        return
    with f:
        try:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        def remove_lock() -> None:
            path.unlink(missing_ok=True)

        try:
            with interrupts.undo_if_interrupted(remove_lock):
                yield
        finally:
            remove_lock()


def download(make, data_dir: Path, folder: str) -> None:
    """Have torchvision download a set with `make(root)`; it appears under `data_dir` whole or not at all."""
    existed, target = os.path.exists(data_dir), data_dir / folder
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)

    def remove_folder() -> None:
        with suppress(OSError):  # not there, or not empty
            if not existed:
                data_dir.rmdir()

    try:
        with interrupts.undo_if_interrupted(remove_folder), alone(data_dir):
            if os.path.isdir(target):  # another process was first
                return
            data_dir.mkdir(exist_ok=True)  # another may have failed, and removed it
            temporary = tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-")
            with interrupts.undo_if_interrupted(temporary.cleanup), temporary as tmp:
                make(tmp)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not os.path.isdir(target):  # another one without the lock
                    (Path(tmp) / folder).rename(target)
    except Exception as e:  # torchvision lets URLError, RuntimeError, timeouts and others through
        reason = str(e).split("\n")[0][:120] or type(e).__name__
        raise InputError(
            f"--data-dir {data_dir}: no {folder} there and it cannot be downloaded ({reason}); "
            f"give the folder that holds {folder}"
        ) from e
    finally:
        socket.setdefaulttimeout(before)
        remove_folder()


def ready(make, data_dir: str, folder: str, md5: dict[str, str]) -> None:
    """See to it that the checked files of a torchvision set lie under `data_dir`; of several processes one downloads."""
    if not os.path.isdir(Path(data_dir) / folder):
        download(make, Path(data_dir), folder)
    check_files(Path(data_dir) / folder, md5)


def load_cifar10(args) -> Source:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images (32, 32, 3)."""
    from torchvision.datasets import CIFAR10

    def make(root):
        return CIFAR10(root, train=True, download=True)

    ready(make, args.data_dir, CIFAR10_FOLDER, CIFAR10_MD5)
    train, test = (CIFAR10(args.data_dir, train=part) for part in (True, False))
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

    def make(root):
        return CIFAR100(root, train=True, download=True)

    ready(make, args.data_dir, CIFAR100_FOLDER, CIFAR100_MD5)
    train, test = (CIFAR100(args.data_dir, train=part) for part in (True, False))
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

    def make(root):
        return FashionMNIST(root, train=True, download=True)

    def pixels(part):
        resized = TF.resize(part.data[:, None], [32, 32], TF.InterpolationMode.BILINEAR, antialias=True)
        return resized.permute(0, 2, 3, 1).contiguous()  # (N, 1, 32, 32) -> (N, 32, 32, 1)

    ready(make, args.data_dir, FMNIST_FOLDER, FMNIST_MD5)
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


def load_npz(path: str) -> Source:
    """An own set in the `.npz` layout of docs/data.md. Raises `InputError` for whatever does not fit it."""
    said = f"--dataset {path}"
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = {k: z[k] for k in ("x_train", "y_train", "x_test", "y_test", "y_train_noisy") if k in z.files}
    except Exception as e:  # zipfile, zlib, numpy and the file system each raise their own
        raise InputError(f"{said}: not a readable .npz file ({str(e).splitlines()[0] if str(e) else type(e).__name__})")
    missing = [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in arrays]
    if missing:
        raise InputError(f"{said}: lacks the array {', '.join(missing)}")
    x, x_test = arrays["x_train"], arrays["x_test"]
    for name, a in (("x_train", x), ("x_test", x_test)):
        if a.dtype != np.uint8 or a.ndim not in (3, 4) or len(a) == 0:
            raise InputError(f"{said}: {name} is {a.dtype} of shape {a.shape}, not uint8 (N, H, W) or (N, H, W, C)")
        if a.shape[1] != a.shape[2] or not 28 <= a.shape[1] <= 64 or a.shape[3:] not in ((), (1,), (3,)):
            raise InputError(
                f"{said}: {name} has shape {a.shape}, not square images of 28 to 64 pixels, grey or colour"
            )
    if x.shape[1:] != x_test.shape[1:]:
        raise InputError(f"{said}: x_train has images of shape {x.shape[1:]}, x_test of {x_test.shape[1:]}")
    labels = {}
    for name, of in (("y_train", x), ("y_test", x_test), ("y_train_noisy", x)):
        a = arrays.get(name)
        if a is None:
            continue
        if a.dtype.kind not in "iu" or a.shape != (len(of),):
            raise InputError(f"{said}: {name} is {a.dtype} of shape {a.shape}, not integer ({len(of)},)")
        if a.min() < 0 or a.max() > 9999:
            raise InputError(f"{said}: {name} holds {a.min()}..{a.max()}, not class numbers from 0")
        labels[name] = torch.from_numpy(a.astype(np.int64))
    K = int(labels["y_train"].max()) + 1
    if K < 2:
        raise InputError(f"{said}: y_train holds one class only")
    for name, a in labels.items():
        if int(a.max()) >= K:
            raise InputError(f"{said}: {name} holds class {int(a.max())}, y_train only 0..{K - 1}")
    x, x_test = (torch.from_numpy(a if a.ndim == 4 else a[..., None]) for a in (x, x_test))
    return Source(
        x,
        labels["y_train"],
        labels.get("y_train_noisy"),
        x_test,
        labels["y_test"],
        tuple(str(k) for k in range(K)),
        *pixel_statistics(x),
    )


MEGAPIXELS = 50  # of an image that is decoded: a small file may hold any number of them
GIVEN = "train_noisy.csv"  # in a folder of images: file below train/, class to train on


def load_folder(path: str, size: int) -> Source:
    """An own set in a folder: `train/CLASS/*.png` and `test/CLASS/*.png` (or jpg, ...), read as by `ImageFolder`.

    The shorter side is resized to `size` pixels (bilinear, antialias) and the middle (size, size) cut out; grey if
    every pixel of every image is, else colour. Classes are numbered in the order of their names. An optional
    `train_noisy.csv` gives files of the training set another class to train on: lines `CLASS/FILE,OTHER CLASS`.
    Raises `InputError` naming the first file that does not fit.
    """
    from PIL import Image
    from torchvision.datasets import ImageFolder

    said, parts = f"--dataset {path}", {}
    for part in ("train", "test"):
        try:
            parts[part] = ImageFolder(str(Path(path) / part))
        except OSError as e:  # no folder, no class in it, no image in a class
            why = (str(e).splitlines() or [""])[0]
            raise InputError(f"{said}: needs {part}/CLASS/*.png or the like ({why})") from e
    names = tuple(parts["train"].classes)
    if len(names) < 2:
        raise InputError(f"{said}: train/ holds one class only")
    if tuple(parts["test"].classes) != names:
        odd = sorted(set(names) ^ set(parts["test"].classes))
        raise InputError(f"{said}: train/ and test/ hold different classes ({', '.join(odd[:5])})")
    x, y = {}, {}
    for part, found in parts.items():
        # decoding does not hold the interpreter; the order stays
        with ThreadPoolExecutor() as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such an image is refused by its name
            x[part] = torch.stack(list(pool.map(lambda sample: pixels_of(sample[0], size, said), found.samples)))
        y[part] = torch.tensor(found.targets)
    if all(bool((a == a[..., :1]).all()) for a in x.values()):
        x = {part: a[..., :1].contiguous() for part, a in x.items()}
    given = given_labels(Path(path), parts["train"], said)
    return Source(x["train"], y["train"], given, x["test"], y["test"], names, *pixel_statistics(x["train"]))


def pixels_of(path: str, size: int, said: str) -> Tensor:
    """An image file as (size, size, 3) uint8. Raises `InputError`."""
    from PIL import Image
    from torchvision.transforms.v2 import functional as TF

    try:
        with Image.open(path) as image:  # reads the header alone
            if image.width * image.height > MEGAPIXELS * 10**6:
                size = f"{image.width} x {image.height} pixels"
                raise InputError(f"{said}: {path} has {size}, more than {MEGAPIXELS} megapixels")
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to 8 bits without a word
                raise InputError(f"{said}: {path} has pixels of more than 8 bits (mode {image.mode})")
            whole = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except InputError:
        raise
    except Image.DecompressionBombError as e:  # from 179 megapixels, at the header already
        raise InputError(f"{said}: {path} has more than {MEGAPIXELS} megapixels") from e
    except Exception as e:  # Pillow raises all sorts for a damaged file
        raise InputError(f"{said}: {path} is not a readable image ({type(e).__name__})") from e
    small = TF.resize(whole, [size], TF.InterpolationMode.BILINEAR, antialias=True)
    return TF.center_crop(small, [size, size]).permute(1, 2, 0).contiguous()


def given_labels(folder: Path, train, said: str) -> Tensor | None:
    """Labels (N,) with the changes that `train_noisy.csv` lists, or None without that file. Raises `InputError`."""
    if not os.path.lexists(folder / GIVEN):
        return None
    position = {Path(name).relative_to(folder / "train").as_posix(): i for i, (name, _) in enumerate(train.samples)}
    labels = list(train.targets)
    try:
        with open(folder / GIVEN, newline="", encoding="utf-8-sig") as f:  # Excel puts a mark before it
            rows = [row for row in csv.reader(f) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{said}: {GIVEN} cannot be read ({type(e).__name__})") from e
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or row[0] not in position or row[1] not in train.class_to_idx:
            raise InputError(f"{said}: {GIVEN}, entry {number}: '{','.join(row)}' is not a file of train/ and a class")
        labels[position[row[0]]] = train.class_to_idx[row[1]]
    return torch.tensor(labels)


DATASETS = {  # a new set is one entry
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "fmnist": load_fmnist,
    "synthetic": load_synthetic,
}


def load(args) -> Source:
    """The set `args.dataset` names: one of `DATASETS`, an `.npz` path or a folder of images. Raises `InputError`."""
    if args.dataset in DATASETS:
        return DATASETS[args.dataset](args)
    return load_folder(args.dataset, args.image_size) if os.path.isdir(args.dataset) else load_npz(args.dataset)
