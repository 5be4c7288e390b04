"""A folder of images: which files it holds, what their labels are, and their pixels.

Whatever does not fit is an `InputError` that names the option and the file. Shapes: n files, H x W pixels.
"""

import csv
import hashlib
import io
import os
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import InputError, one_line
from engine.launchers import rank_zero

ENDINGS = tuple(".jpg .jpeg .jpe .jfif .png .bmp .ppm .pgm .pbm .pnm .tif .tiff .webp .gif .avif".split())
VALIDATION = "val", "valid", "validation"  # names that a folder's own validation set may have
GIVEN = "train_noisy.csv"  # in a folder of images: file below train/, class to train on
MEGAPIXELS = 50  # of an image that is decoded, and of what it is resized to: a small file may hold any number of them
BACKGROUND = "white"  # behind transparent pixels
BLOCK = 64  # images that a thread decodes at a time


class Part(NamedTuple):
    """One split: `names` (n,) of its files below `folder`, with /, and their `labels` (n,), positions among the classes."""

    folder: str
    names: list[str]
    labels: list[int]


class Folder(NamedTuple):
    """Splits of a folder, `validation` only where it has one of its own; `notes` are lines on what was not read."""

    classes: tuple[str, ...]
    train: Part
    test: Part
    validation: Part | None
    notes: tuple[str, ...]


def same_spelling(name: str) -> str:
    """A name in the one Unicode spelling (NFC) in which it is compared: macOS writes ü as u with two dots."""
    return unicodedata.normalize("NFC", name)


# ------------------------------------------------------------------------------------------------------------- listing


def scan(path: str) -> Folder:
    """What a folder with `train/CLASS/*.png` and `test/CLASS/*.png` holds, in the order of torchvision's `ImageFolder`.

    Raises `InputError` for a split or a class without images, and for splits of different classes.
    """
    where, left_out = f"--dataset {path}", Counter[str]()
    own = [name for name in VALIDATION if os.path.isdir(Path(path, name))]
    if len(own) > 1:
        raise InputError(f"{where}: holds {' and '.join(f'{name}/' for name in own)}, but there is one validation set")
    classes, parts = (), {}
    for split in ("train", "test", *own):
        images = list_split(Path(path, split), where, left_out)
        if not classes:
            classes = tuple(images)
            if len(classes) < 2:
                raise InputError(f"{where}: train/ holds one class only")
        number = {same_spelling(name): k for k, name in enumerate(classes)}
        here = {same_spelling(name): names for name, names in images.items()}
        if len(here) < len(images):
            raise InputError(f"{where}: {split}/ holds a class twice, in two Unicode spellings of its name")
        if here.keys() != number.keys():
            odd = sorted(number.keys() ^ here.keys())
            raise InputError(f"{where}: train/ and {split}/ hold different classes ({one_line(', '.join(odd[:5]))})")
        names = [name for k in number for name in here[k]]
        parts[split] = Part(str(Path(path, split)), names, [number[k] for k in number for _ in here[k]])
    validation = parts[own[0]] if own else None
    return Folder(classes, parts["train"], parts["test"], validation, notes_on(path, own, parts, left_out))


def list_split(folder: Path, where: str, left_out: Counter[str]) -> dict[str, list[str]]:
    """{class: its images, as names below `folder` with /}, both in order; counts in `left_out` what is no image."""

    def refuse(e: OSError) -> None:
        raise InputError(f"{where}: {e.filename} cannot be read ({one_line(e)})") from e

    needs, images = f"{where}: needs {folder.name}/CLASS/*.png or the like", {}
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as e:
        raise InputError(f"{needs} ({folder}: {one_line(e)})") from e
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir():
            left_out["hidden" if entry.name.startswith(".") else f"beside the classes in {folder.name}/"] += 1
            continue
        found = {}
        for root, below, files in os.walk(entry.path, onerror=refuse, followlinks=True):
            left_out["hidden"] += sum(name.startswith(".") for name in (*below, *files))
            below[:] = [name for name in below if not name.startswith(".")]
            shown = sorted(name for name in files if not name.startswith("."))
            others = [name for name in shown if not name.lower().endswith(ENDINGS)]
            left_out.update(os.path.splitext(name)[1].lower() or "without an ending" for name in others)
            base = Path(root).relative_to(folder).as_posix()
            found[root] = [f"{base}/{name}" for name in shown if name.lower().endswith(ENDINGS)]
        images[entry.name] = [name for root in sorted(found) for name in found[root]]
        if not images[entry.name]:
            raise InputError(f"{needs} (no image in {entry.path})")
    if not images:
        raise InputError(f"{needs} (no class in {folder})")
    return images


def notes_on(path: str, own: list[str], parts: dict[str, Part], left_out: Counter[str]) -> tuple[str, ...]:
    """Lines on what a folder holds beside what was asked for."""
    notes = (
        [f"{own[0]}/ holds {len(parts[own[0]].names)} images: the validation set; --val-frac is unused"] if own else []
    )
    if left_out.total():
        counts = ", ".join(f"{n} {what}" for what, n in sorted(left_out.items()) if n)
        notes.append(f"left out, for these are no images by their names: {one_line(counts)}")
    others = sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name not in parts and e.name[0] != ".")
    if others:
        notes.append(f"not read: {one_line(', '.join(f'{name}/' for name in others))}")
    return tuple(f"--dataset {path}: {note}" for note in notes)


def given_labels(path: str, folder: Folder) -> Tensor | None:
    """Labels (n,) of the training files with the changes that `train_noisy.csv` lists, or None without that file.

    It is UTF-8, or else Windows-1252. Raises `InputError` for an entry that is not `FILE,CLASS`, and for a second one.
    """
    file, train = Path(path, GIVEN), folder.train
    if not os.path.lexists(file):
        return None
    where, encoding = f"--dataset {path}: {GIVEN}", "UTF-8"
    try:
        content = file.read_bytes()
        try:
            text = content.decode("utf-8-sig")  # Excel puts a mark before it
        except UnicodeDecodeError:
            text, encoding = content.decode("cp1252", "replace"), "Windows-1252"
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except (OSError, csv.Error) as e:
        raise InputError(f"{where} cannot be read ({type(e).__name__})") from e
    position = {same_spelling(name): i for i, name in enumerate(train.names)} | {
        n: i for i, n in enumerate(train.names)
    }
    number = {same_spelling(name): k for k, name in enumerate(folder.classes)}
    labels, seen = list(train.labels), {}
    for entry, row in enumerate(rows, 1):
        name, label = row if len(row) == 2 else ("", "")
        at, label = position.get(name, position.get(same_spelling(name))), number.get(same_spelling(label))
        if at is None or label is None:
            raise InputError(
                f"{where}, entry {entry}: '{one_line(','.join(row))}' is not a file of train/ and a class, "
                f"CLASS/FILE,OTHER CLASS (read as {encoding})"
            )
        if at in seen:
            raise InputError(f"{where}, entry {entry}: '{one_line(row[0])}' stands in entry {seen[at]} already")
        labels[at], seen[at] = label, entry
    return torch.tensor(labels)


# ------------------------------------------------------------------------------------------------------------ decoding


def decode(paths: Sequence[str], size: tuple[int, int], where: str) -> tuple[Tensor, str]:
    """Image files as (n, H, W, C) uint8, `size` being (H, W), and a SHA-256 of what the files hold, in this order.

    An image is turned as its EXIF data say, put before white where it is transparent, resized to the smallest that covers
    `size` (bilinear, antialias), and the middle cut out. C is 1 if every pixel of every image is grey, else 3. Shows a
    progress bar where it takes long. Raises `InputError` naming the first file that does not fit.
    """
    pixels, sums = torch.empty(len(paths), *size, 3, dtype=torch.uint8), hashlib.sha256()

    def read(first: int) -> tuple[int, bool, bytes]:
        here = range(first, min(first + BLOCK, len(paths)))
        hashes = []
        for i in here:
            pixels[i], of_file = pixels_of(paths[i], size, where)
            hashes.append(of_file)
        block = pixels[here.start : here.stop]
        return len(here), bool((block == block[..., :1]).all()), b"".join(hashes)

    grey = True
    bar = tqdm(total=len(paths), desc="decoding", unit="image", leave=False, delay=2, disable=not rank_zero())
    bar.mininterval = 0.2 if sys.stderr.isatty() else 20  # seconds between lines in a log file
    # Decoding does not hold the interpreter; the order stays. Pillow warns of images that are refused by name here.
    with bar, warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        for count, is_grey, hashes in pool.map(read, range(0, len(paths), BLOCK)):
            grey &= is_grey
            sums.update(hashes)
            bar.update(count)
    return pixels[..., :1].contiguous() if grey else pixels, sums.hexdigest()


def pixels_of(path: str, size: tuple[int, int], where: str) -> tuple[Tensor, bytes]:
    """An image file as (H, W, 3) uint8, `size` being (H, W), and the SHA-256 of its bytes. Raises `InputError`."""
    from PIL import ExifTags, Image, ImageOps
    from torchvision.transforms.v2 import functional as TF

    turned = False
    try:
        with open(path, "rb") as file, Image.open(file) as image:  # reads the header alone
            check_size(image.width, image.height, size, f"{where}: {path}")
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to 8 bits without a word
                raise InputError(f"{where}: {path} has pixels of more than 8 bits (mode {image.mode})")
            image.load()  # of a PNG the EXIF data may come last
            with suppress(Exception):  # damaged EXIF data say nothing
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if turned:
                image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
            whole = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").digest()
    except InputError:
        raise
    except Image.DecompressionBombError as e:  # from 179 megapixels, at the header already
        raise InputError(f"{where}: {path} has more than {MEGAPIXELS} megapixels") from e
    except Exception as e:  # Pillow raises all sorts for a damaged file
        raise InputError(f"{where}: {path} is not a readable image ({type(e).__name__})") from e
    covering = [size[0]]  # torchvision's: the shorter side
    if size[0] != size[1]:
        covering = list(covered(whole.shape[2], whole.shape[1], size))
    small = TF.resize(whole, covering, TF.InterpolationMode.BILINEAR, antialias=True)
    return TF.center_crop(small, list(size)).permute(1, 2, 0).contiguous(), digest


def covered(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the smallest image of the same proportions that covers `size` (H, W)."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


def check_size(width: int, height: int, size: tuple[int, int], where: str) -> None:
    """Raise `InputError` for an image that has, or has when it is resized, too many pixels to be decoded."""
    if width * height > MEGAPIXELS * 10**6:
        raise InputError(f"{where} has {width} x {height} pixels, more than {MEGAPIXELS} megapixels")
    for w, h in ((width, height), (height, width)):  # it may have to be turned
        rows, columns = covered(w, h, size)
        if rows * columns > MEGAPIXELS * 10**6:
            raise InputError(
                f"{where} has {width} x {height} pixels: to cover {size[1]} x {size[0]} it would take "
                f"{rows * columns / 1e6:.0f} megapixels, more than {MEGAPIXELS}"
            )
