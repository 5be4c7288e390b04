"""Data from wherever it comes: a named set, downloaded and checked where it has files, an own `.npz` or a folder of images.

Whatever cannot be used is an `InputError` that names the option and the file. Shapes as in `datasets`.
"""

import csv
import hashlib
import os
import socket
import tempfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import numpy as np
import torch
from torch import Tensor

from data import InputError, Source, one_line, pixel_statistics
from datasets import DATASETS, SIDES, Files, Shape
from engine import interrupts

DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def load(args) -> Source:
    """The set `args.dataset` names: one of `DATASETS`, an `.npz` path or a folder of images. Raises `InputError`."""
    if args.dataset in DATASETS:
        entry = DATASETS[args.dataset]
        if entry.files:
            fetch(entry.files, args.data_dir)
        return entry.load(args)
    return load_folder(args.dataset, args.image_size) if os.path.isdir(args.dataset) else load_npz(args.dataset)


# --------------------------------------------------------------------------------------------------- files of named sets


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
            raise InputError(f"--data-dir: {path} cannot be read ({one_line(e)})") from e
        if have != want:
            raise InputError(f"--data-dir: {path} is damaged (md5 {have}, the published file has {want})")


@contextmanager
def one_at_a_time(folder: Path):
    """Hold a lock file in `folder`, made if absent, so that of several processes one downloads.

    Goes on without where there is no such lock to be had: two downloads are a waste, not a mistake.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".download.lock"
    lock = filelock.FileLock(path)

    def remove_lock() -> None:
        path.unlink(missing_ok=True)

    try:
        lock.acquire()
    except (OSError, NotImplementedError):  # of another user, or on a file system without locks
        yield
        return
    try:
        with interrupts.undo_if_interrupted(remove_lock):
            yield
    finally:
        remove_lock()
        lock.release()


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
        with interrupts.undo_if_interrupted(remove_folder), one_at_a_time(data_dir):
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
        raise InputError(
            f"--data-dir {data_dir}: no {folder} there and it cannot be downloaded ({one_line(e)}); "
            f"give the folder that holds {folder}"
        ) from e
    finally:
        socket.setdefaulttimeout(before)
        remove_folder()


def fetch(files: Files, data_dir: str) -> None:
    """Have the checked files of a set lie under `data_dir`; of several processes one downloads them."""
    folder = Path(data_dir) / files.folder
    if not os.path.isdir(folder):
        download(files.download, Path(data_dir), files.folder)
    check_files(folder, files.md5)


# ------------------------------------------------------------------------------------------------------------ own files


def load_npz(path: str) -> Source:
    """An own set in the `.npz` layout of docs/data.md. Raises `InputError` for whatever does not fit it."""
    where = f"--dataset {path}"
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = {k: z[k] for k in ("x_train", "y_train", "x_test", "y_test", "y_train_noisy") if k in z.files}
    except Exception as e:  # zipfile, zlib, numpy and the file system each raise their own
        raise InputError(f"{where}: not a readable .npz file ({one_line(e)})")
    missing = [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in arrays]
    if missing:
        raise InputError(f"{where}: lacks the array {', '.join(missing)}")
    x, x_test = arrays["x_train"], arrays["x_test"]
    for name, a in (("x_train", x), ("x_test", x_test)):
        if a.dtype != np.uint8 or a.ndim not in (3, 4) or len(a) == 0:
            raise InputError(f"{where}: {name} is {a.dtype} of shape {a.shape}, not uint8 (N, H, W) or (N, H, W, C)")
        least, most = SIDES
        if not (least <= min(a.shape[1:3]) and max(a.shape[1:3]) <= most) or a.shape[3:] not in ((), (1,), (3,)):
            raise InputError(
                f"{where}: {name} has shape {a.shape}, not images of {least} to {most} pixels a side, grey or colour"
            )
    if x.shape[1:] != x_test.shape[1:]:
        raise InputError(f"{where}: x_train has images of shape {x.shape[1:]}, x_test of {x_test.shape[1:]}")
    labels = {}
    for name, of in (("y_train", x), ("y_test", x_test), ("y_train_noisy", x)):
        a = arrays.get(name)
        if a is None:
            continue
        if a.dtype.kind not in "iu" or a.shape != (len(of),):
            raise InputError(f"{where}: {name} is {a.dtype} of shape {a.shape}, not integer ({len(of)},)")
        if a.min() < 0 or a.max() > 9999:
            raise InputError(f"{where}: {name} holds {a.min()}..{a.max()}, not class numbers from 0")
        labels[name] = torch.from_numpy(a.astype(np.int64))
    K = int(labels["y_train"].max()) + 1
    if K < 2:
        raise InputError(f"{where}: y_train holds one class only")
    for name, a in labels.items():
        if int(a.max()) >= K:
            raise InputError(f"{where}: {name} holds class {int(a.max())}, y_train only 0..{K - 1}")
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


def height_and_width(image_size: int | str) -> tuple[int, int]:
    """`--image-size` in pixels."""
    sides = [int(side) for side in str(image_size).split("x")]
    return sides[0], sides[-1]


def own_shape(path: str, image_size: int | str | None) -> Shape | None:
    """The sizes of an own set, from the headers of its `.npz` or by counting the files of its folder, before any pixel is
    read; None where that fails, which reading it will explain."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        if os.path.isdir(path):
            part = {
                name: sum(f.suffix.lower() in IMG_EXTENSIONS for f in Path(path, name).glob("*/**/*"))
                for name in ("train", "test")
            }
            K = sum(entry.is_dir() for entry in os.scandir(Path(path, "train")))
            return Shape(part["train"], part["test"], *height_and_width(image_size or 32), 3, K)
        with zipfile.ZipFile(path) as z, np.load(path, allow_pickle=False) as arrays:
            shapes = [header(z, name) for name in ("x_train", "x_test")]
            n, H, W, *C = shapes[0]
            return Shape(n, shapes[1][0], H, W, *(C or [1]), int(arrays["y_train"].max()) + 1)
    except Exception:
        return None


def header(z: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """The shape of an array in an `.npz`, without reading it."""
    with z.open(f"{name}.npy") as f:
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(f)[0]


def load_folder(path: str, size: int | str) -> Source:
    """An own set in a folder: `train/CLASS/*.png` and `test/CLASS/*.png` (or jpg, ...), read as by `ImageFolder`.

    An image is resized to the smallest that covers `size`, pixels a side or HEIGHTxWIDTH (bilinear, antialias), and the middle
    cut out; grey if every pixel of every image is, else colour. Classes are numbered in the order of their names. An optional
    `train_noisy.csv` gives files of the training set another class to train on: lines `CLASS/FILE,OTHER CLASS`.
    Raises `InputError` naming the first file that does not fit.
    """
    from PIL import Image
    from torchvision.datasets import ImageFolder

    where, parts = f"--dataset {path}", {}
    for part in ("train", "test"):
        try:
            parts[part] = ImageFolder(str(Path(path) / part))
        except OSError as e:  # no folder, no class in it, no image in a class
            raise InputError(f"{where}: needs {part}/CLASS/*.png or the like ({one_line(e)})") from e
    names = tuple(parts["train"].classes)
    if len(names) < 2:
        raise InputError(f"{where}: train/ holds one class only")
    if tuple(parts["test"].classes) != names:
        odd = sorted(set(names) ^ set(parts["test"].classes))
        raise InputError(f"{where}: train/ and test/ hold different classes ({', '.join(odd[:5])})")
    x, y = {}, {}
    for part, images in parts.items():
        pixels = x[part] = torch.empty(len(images), *height_and_width(size), 3, dtype=torch.uint8)

        def read(i: int, images=images, pixels=pixels) -> None:
            pixels[i] = pixels_of(images.samples[i][0], height_and_width(size), where)

        # decoding does not hold the interpreter; the order stays
        with ThreadPoolExecutor() as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such an image is refused by its name
            for _ in pool.map(read, range(len(images))):
                pass
        y[part] = torch.tensor(images.targets)
    if all(bool((a == a[..., :1]).all()) for a in x.values()):
        x = {part: a[..., :1].contiguous() for part, a in x.items()}
    given = given_labels(Path(path), parts["train"], where)
    return Source(x["train"], y["train"], given, x["test"], y["test"], names, *pixel_statistics(x["train"]))


def pixels_of(path: str, size: tuple[int, int], where: str) -> Tensor:
    """An image file as (H, W, 3) uint8, `size` being (H, W). Raises `InputError`."""
    from PIL import Image
    from torchvision.transforms.v2 import functional as TF

    try:
        with Image.open(path) as image:  # reads the header alone
            if image.width * image.height > MEGAPIXELS * 10**6:
                pixels = f"{image.width} x {image.height} pixels"
                raise InputError(f"{where}: {path} has {pixels}, more than {MEGAPIXELS} megapixels")
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to 8 bits without a word
                raise InputError(f"{where}: {path} has pixels of more than 8 bits (mode {image.mode})")
            whole = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except InputError:
        raise
    except Image.DecompressionBombError as e:  # from 179 megapixels, at the header already
        raise InputError(f"{where}: {path} has more than {MEGAPIXELS} megapixels") from e
    except Exception as e:  # Pillow raises all sorts for a damaged file
        raise InputError(f"{where}: {path} is not a readable image ({type(e).__name__})") from e
    covering = [size[0]]  # torchvision's: the shorter side
    if size[0] != size[1]:
        h, w = whole.shape[1:]
        scale = max(size[0] / h, size[1] / w)
        covering = [max(size[0], round(h * scale)), max(size[1], round(w * scale))]
    small = TF.resize(whole, covering, TF.InterpolationMode.BILINEAR, antialias=True)
    return TF.center_crop(small, list(size)).permute(1, 2, 0).contiguous()


def given_labels(folder: Path, train, where: str) -> Tensor | None:
    """Labels (N,) with the changes that `train_noisy.csv` lists, or None without that file. Raises `InputError`."""
    if not os.path.lexists(folder / GIVEN):
        return None
    position = {Path(name).relative_to(folder / "train").as_posix(): i for i, (name, _) in enumerate(train.samples)}
    labels = list(train.targets)
    try:
        with open(folder / GIVEN, newline="", encoding="utf-8-sig") as f:  # Excel puts a mark before it
            rows = [row for row in csv.reader(f) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{where}: {GIVEN} cannot be read ({type(e).__name__})") from e
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or row[0] not in position or row[1] not in train.class_to_idx:
            raise InputError(
                f"{where}: {GIVEN}, entry {number}: '{one_line(','.join(row))}' is not a file of train/ and a class"
            )
        labels[position[row[0]]] = train.class_to_idx[row[1]]
    return torch.tensor(labels)
