"""Data from wherever it comes: a named set, downloaded and checked where it has files, an own `.npz` or a folder of images.

Whatever cannot be used is an `InputError` that names the option and the file. Shapes as in `datasets`.
"""

import hashlib
import os
import socket
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import filelock
import numpy as np
import torch
from torch import Tensor

from data import InputError, Source, drawn, one_line, pixel_statistics
from datasets import DATASETS, SIDES, Files, Shape
from engine import folders, interrupts, noisefile

DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def load(args) -> Source:
    """The set `args.dataset` names: one of `DATASETS`, an `.npz` path or a folder of images. Raises `InputError`."""
    if args.dataset in DATASETS:
        entry = DATASETS[args.dataset]
        if entry.files:
            fetch(entry.files, args.data_dir)
        return entry.load(args)
    if os.path.isdir(args.dataset):
        return load_folder(args.dataset, args.image_size, args.subset, args.split_seed)
    return load_npz(args.dataset)


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


def download(make, data_dir: Path, folder: str) -> None:
    """Have torchvision download a set with `make(root)`, in one process at a time; it appears under `data_dir` whole or not at all.

    torchvision itself would wait without end, and leave half a set and the archive behind.
    """
    existed, target, before = os.path.exists(data_dir), data_dir / folder, socket.getdefaulttimeout()
    lock = filelock.FileLock(data_dir / ".download.lock", thread_local=False)  # a signal's thread tidies up, too

    def tidy() -> None:
        with suppress(OSError):  # it may be a marker, which goes by itself
            if lock.is_locked:
                os.unlink(lock.lock_file)
        lock.release()
        with suppress(OSError):  # not there, or not empty
            if not existed:
                data_dir.rmdir()

    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with interrupts.undo_if_interrupted(tidy):
            data_dir.mkdir(parents=True, exist_ok=True)
            with suppress(OSError, NotImplementedError):  # not to be had: two downloads are a waste, not a mistake
                lock.acquire()
            data_dir.mkdir(exist_ok=True)  # another may have failed, and removed it
            temporary = tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-")
            with interrupts.undo_if_interrupted(temporary.cleanup), temporary as tmp:
                if not target.is_dir():  # another process was first
                    make(tmp)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if not target.is_dir():
                        (Path(tmp) / folder).rename(target)
    except Exception as e:  # torchvision lets URLError, RuntimeError, timeouts and others through
        raise InputError(
            f"--data-dir {data_dir}: no {folder} there and it cannot be downloaded ({one_line(e)}); "
            f"give the folder that holds {folder}"
        ) from e
    finally:
        socket.setdefaulttimeout(before)
        tidy()


def fetch(files: Files, data_dir: str) -> None:
    """Have the checked files of a set lie under `data_dir`; of several processes one downloads them."""
    folder = Path(data_dir) / files.folder
    if not os.path.isdir(folder):
        download(files.download, Path(data_dir), files.folder)
    check_files(folder, files.md5)


# ------------------------------------------------------------------------------------------------------------ own files


IMAGES = "x_train", "x_test", "x_val"  # arrays of an own `.npz`
LABELS = {"y_train": "x_train", "y_test": "x_test", "y_val": "x_val", "y_train_noisy": "x_train"}  # of which images
NEEDED = "x_train", "y_train", "x_test", "y_test"
RENUMBER = (
    "to renumber: classes, y_train = np.unique(y_train, return_inverse=True); y_test = np.searchsorted(classes, y_test)"
)


def load_npz(path: str) -> Source:
    """An own set in the `.npz` layout of docs/data.md. Raises `InputError` for whatever does not fit it."""
    where = f"--dataset {path}"
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = {k: z[k] for k in (*IMAGES, *LABELS) if k in z.files}
            sums = [f"{k} {z.zip.getinfo(f'{k}.npy').CRC}" for k in arrays]
            others = [k for k in z.files if k not in arrays]
    except Exception as e:  # zipfile, zlib, numpy and the file system each raise their own
        raise InputError(f"{where}: not a readable .npz file ({noisefile.reason(e)})")
    needed = NEEDED + ("x_val", "y_val") * bool({"x_val", "y_val"} & arrays.keys())
    missing = [k for k in needed if k not in arrays]
    if missing:
        raise InputError(f"{where}: lacks the array {', '.join(missing)}")
    images = {k: image_array(arrays[k], k, where) for k in IMAGES if k in arrays}
    for name, a in images.items():
        if a.shape[1:] != images["x_train"].shape[1:]:
            shapes = f"{arrays['x_train'].shape[1:]}, {name} of {arrays[name].shape[1:]}"
            raise InputError(f"{where}: x_train has images of shape {shapes}")
    labels = {k: noisefile.labels(arrays[k], k, where, len(images[of])) for k, of in LABELS.items() if k in arrays}
    K = int(labels["y_train"].max()) + 1
    if K < 2:
        raise InputError(f"{where}: y_train holds one class only")
    for name, a in labels.items():
        if int(a.max()) >= K:
            raise InputError(f"{where}: {name} holds class {int(a.max())}, y_train only 0..{K - 1}")
    notes = absent_classes(labels["y_train"], K, f"{where}: y_train", RENUMBER)
    if "x_val" in images:
        notes.append(f"{where}: x_val holds {len(images['x_val'])} images: the validation set; --val-frac is unused")
    if others:
        notes.append(f"{where}: not read: {one_line(', '.join(others))}")
    return Source(
        images["x_train"],
        labels["y_train"],
        labels.get("y_train_noisy"),
        images["x_test"],
        labels["y_test"],
        tuple(str(k) for k in range(K)),
        *pixel_statistics(images["x_train"]),
        x_val=images.get("x_val"),
        y_val=labels.get("y_val"),
        digest=hashlib.sha256("\n".join(sums).encode()).hexdigest(),
        notes=tuple(notes),
    )


def image_array(a: np.ndarray, name: str, where: str) -> Tensor:
    """Images of an `.npz` as (N, H, W, C) uint8. Raises `InputError`."""
    if a.dtype != np.uint8 or a.ndim not in (3, 4) or len(a) == 0:
        raise InputError(f"{where}: {name} is {a.dtype} of shape {a.shape}, not uint8 (N, H, W) or (N, H, W, C)")
    least, most = SIDES
    if not (least <= min(a.shape[1:3]) and max(a.shape[1:3]) <= most) or a.shape[3:] not in ((), (1,), (3,)):
        raise InputError(
            f"{where}: {name} has shape {a.shape}, not images of {least} to {most} pixels a side, grey or colour"
        )
    return torch.from_numpy(a if a.ndim == 4 else a[..., None])


def absent_classes(y: Tensor, K: int, where: str, remedy: str) -> list[str]:
    """A line on those of `K` classes that no label of `y` (N,) is of, with the remedy; [] if there are none."""
    absent = (torch.bincount(y, minlength=K) == 0).nonzero().flatten().tolist()
    if not absent:
        return []
    which = f"class{'es' * (len(absent) > 1)} {', '.join(map(str, absent[:5]))}{', ...' * (len(absent) > 5)}"
    return [f"warning: {where} has no example of {which} of 0..{K - 1}, which noise may draw; {remedy}"]


def load_folder(path: str, size: int | str, subset: int | None = None, split_seed: int = 0) -> Source:
    """An own set in a folder, `folders.scan`, of which the validation and test images and `subset` of the training images, or all,
    are decoded. Statistics are those of the training images that are. Raises `InputError` naming the first file that does not fit.
    """
    folder, where = folders.scan(path), f"--dataset {path}"
    stored = drawn(len(folder.train.names), split_seed, subset)
    parts = [folder.train, folder.test] + [folder.validation] * bool(folder.validation)
    names = [[part.folder + "/" + name for name in part.names] for part in parts]
    names[0] = [names[0][i] for i in stored.tolist()]
    x, digest = folders.decode(sum(names, []), height_and_width(size), where)
    x_train, x_test, *x_val = x.split([len(some) for some in names])
    y_train, y_test, *y_val = (torch.tensor(part.labels) for part in parts)
    return Source(
        x_train,
        y_train,
        folders.given_labels(path, folder),
        x_test,
        y_test,
        folder.classes,
        *pixel_statistics(x_train),
        x_val=x_val[0] if x_val else None,
        y_val=y_val[0] if y_val else None,
        stored=stored if subset else None,
        names=tuple(folder.train.names),
        digest=digest,
        notes=folder.notes,
    )


def height_and_width(image_size: int | str) -> tuple[int, int]:
    """`--image-size` in pixels."""
    sides = [int(side) for side in str(image_size).split("x")]
    return sides[0], sides[-1]


def own_shape(path: str, image_size: int | str | None, subset: int | None = None) -> Shape | None:
    """The sizes of what is read of an own set, from the headers of its `.npz` or by counting the files of its folder, before any
    pixel is read; None where that fails, which reading it will explain."""
    try:
        if os.path.isdir(path):
            folder = folders.scan(path)
            n, n_test = len(folder.train.names), len(folder.test.names)
            n_val = len(folder.validation.names) if folder.validation else 0
            H, W = height_and_width(image_size or 32)
            return Shape(min(n, subset or n), n_test, H, W, 3, len(folder.classes), n_val)
        with zipfile.ZipFile(path) as z, np.load(path, allow_pickle=False) as arrays:
            n, H, W, *C = header(z, "x_train")
            n_test, n_val = (header(z, name)[0] if name in arrays.files else 0 for name in ("x_test", "x_val"))
            return Shape(n, n_test, H, W, *(C or [1]), int(arrays["y_train"].max()) + 1, n_val)
    except Exception:
        return None


def header(z: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """The shape of an array in an `.npz`, without reading it."""
    with z.open(f"{name}.npy") as f:
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(f)[0]
