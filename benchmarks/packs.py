"""CIFAR-10 and Fashion-MNIST in small packs, for machines that can download nothing: back into torchvision's layout.

A pack is a folder (`cifar-a`, `cifar-b`, `fmnist`) with a file for each of the set's. Each holds blobs: their number and
sizes as uint32, little-endian, then the blobs. A batch of CIFAR-10 comes back byte for byte: what stands before and after
its pixels, by LZMA, then the pixels as lossless WebP, each a column of images. `batches.meta` is one blob as it is, a
file of Fashion-MNIST one by LZMA. Packs may come one at a time.
"""

import hashlib
import io
import lzma
import struct
from pathlib import Path

import numpy as np

from data import InputError, one_line
from datasets import CIFAR10_FOLDER, CIFAR10_MD5, FMNIST_FOLDER, FMNIST_MD5
from engine import files

SIDE = 32  # pixels of an image of CIFAR-10
PUBLISHED = {CIFAR10_FOLDER: CIFAR10_MD5, FMNIST_FOLDER: FMNIST_MD5}


def read_blobs(path: Path) -> list[bytes]:
    """The blobs of a file. Raises `InputError` where it is cut off."""
    raw = path.read_bytes()
    try:
        (count,) = struct.unpack_from("<I", raw)
        sizes = struct.unpack_from(f"<{count}I", raw, 4)
    except struct.error:
        count, sizes = 0, (1,)
    blobs, at = [], 4 + 4 * count
    for size in sizes:
        blobs.append(raw[at : at + size])
        at += size
    if at != len(raw):
        raise InputError(f"--packs: {path} is cut off or not a pack")
    return blobs


def pixels(webp: bytes) -> bytes:
    """The pixels of a column of images (n, 3, 32, 32), planes first."""
    from PIL import Image

    column = np.asarray(Image.open(io.BytesIO(webp)).convert("RGB"))
    return column.reshape(-1, SIDE, SIDE, 3).transpose(0, 3, 1, 2).tobytes()


def content(path: Path) -> bytes:
    """The published file that lies in a pack. Raises `InputError`."""
    blobs = read_blobs(path)
    try:
        if path.name.endswith("-ubyte"):
            return lzma.decompress(blobs[0])
        if len(blobs) == 1:
            return blobs[0]
        head, tail, *strips = blobs
        return b"".join([lzma.decompress(head), *map(pixels, strips), lzma.decompress(tail)])
    except (lzma.LZMAError, OSError, ValueError, IndexError) as e:
        raise InputError(f"--packs: {path} is damaged ({one_line(e)})") from e


def missing(data_dir: Path, folder: str) -> list[str]:
    """The files of a set, such as `CIFAR10_FOLDER`, that are not there."""
    return [name for name in PUBLISHED[folder] if not (data_dir / folder / name).is_file()]


def unpack(packs: Path, data_dir: Path) -> None:
    """Write what lies in `packs` and is not in `data_dir` yet, checked by its md5. Raises `InputError` and `OSError`."""
    if not packs.is_dir():
        raise InputError(f"--packs {packs}: there is no such folder")
    for folder, names in PUBLISHED.items():
        for name in missing(data_dir, folder):
            path = next(iter(sorted(packs.glob(f"*/{name}"))), None)
            if path is None:
                continue
            raw = content(path)
            if hashlib.md5(raw).hexdigest() != names[name]:
                raise InputError(f"--packs: {path} does not hold the published {name} (its md5 differs)")
            (data_dir / folder).mkdir(parents=True, exist_ok=True)
            files.replace(data_dir / folder / name, raw)
