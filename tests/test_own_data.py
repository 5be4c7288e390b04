"""CIFAR-100 with its superclasses, and own images in a folder."""

import dataclasses
import hashlib
import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

import data
import datasets
from conftest import same_weights
from engine import options, sources
from test_inputs import refuse

# ------------------------------------------------------------------------------------------------------------ CIFAR-100


@pytest.fixture
def cifar100(tmp_path, monkeypatch) -> Path:
    """A small set in CIFAR-100's own files: class k in superclass 7 k mod 20, pixels at random."""
    folder, rng = tmp_path / "data" / datasets.CIFAR100_FOLDER, np.random.default_rng(0)
    folder.mkdir(parents=True)
    fine = [k for k in range(100) for _ in range(2)]
    content = {"fine_labels": fine, "coarse_labels": [7 * k % 20 for k in fine]}
    for name in ("train", "test"):
        content["data"] = rng.integers(0, 256, (200, 3 * 32 * 32), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class {k}" for k in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names, "coarse_label_names": ["c"] * 20}))
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in datasets.CIFAR100_MD5}
    entry = datasets.DATASETS["cifar100"]
    monkeypatch.setitem(datasets.DATASETS, "cifar100", dataclasses.replace(entry, files=entry.files._replace(md5=md5)))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]})
    return tmp_path / "data"


def test_md5_of_cifar100_are_torchvisions():
    theirs = dict(CIFAR100.train_list + CIFAR100.test_list) | {CIFAR100.meta["filename"]: CIFAR100.meta["md5"]}
    assert datasets.CIFAR100_MD5 == theirs and datasets.CIFAR100_FOLDER == CIFAR100.base_folder


def test_cifar100_flips_within_its_superclasses(cifar100):
    source = sources.load(SimpleNamespace(dataset="cifar100", data_dir=str(cifar100)))
    assert source.x_train.shape == (200, 32, 32, 3) and len(source.classes) == 100
    # Superclass 0 holds classes 0, 20, 40, 60, 80; each is taken for the next, the last for the first.
    assert [int(source.flips[k]) for k in (0, 20, 40, 60, 80)] == [20, 40, 60, 80, 0]
    assert sorted(source.flips.tolist()) == list(range(100))
    assert all(7 * k % 20 == 7 * j % 20 and k != j for k, j in enumerate(source.flips.tolist()))


def test_cifar100_runs_with_asymmetric_noise(cifar100, go, capsys):
    argv = ["--dataset", "cifar100", "--data-dir", str(cifar100), "--noise-type", "asymmetric", "--noise", "0.4"]
    folder = go(*argv, "--max-steps", "2")
    ledger = json.loads((folder / "config.json").read_text())["noise"]
    assert ledger["changed"] == 64 and len(ledger["matrix"]) == 100
    assert "per class: " in capsys.readouterr().out  # 100 x 100 would fill the screen


def test_a_damaged_cifar100_is_named(cifar100, capsys, tmp_path):
    with open(cifar100 / datasets.CIFAR100_FOLDER / "train", "r+b") as f:
        f.seek(100)
        f.write(b"\0")
    argv = ["--dataset", "cifar100", "--data-dir", str(cifar100)]
    refuse(capsys, tmp_path / "runs", argv, "train", "damaged")


# --------------------------------------------------------------------------------------------------------- image folder

DEEP = Image.fromarray(np.full((40, 40), 999, np.uint16))  # of 16 bits a pixel
CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of flat colour, 12 training and 4 test images each of 40 x 50 pixels, in several formats."""
    for part, n in (("train", 12), ("test", 4)):
        for k, name in enumerate(CLASSES):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.zeros((40, 50, 3), np.uint8)
                pixels[..., k] = 100 + i
                pixels[:, :5] = pixels[:, 45:] = 255  # the sides, which the middle does not hold
                Image.fromarray(pixels).save(folder / f"{i:02}.{'png' if i % 2 else 'bmp'}")
    return tmp_path / "photos"


def test_a_folder_is_read_in_order_resized_and_cut(photos):
    source = sources.load_folder(str(photos), 28)
    assert source.x_train.shape == (36, 28, 28, 3) and source.x_test.shape == (12, 28, 28, 3)
    assert source.classes == CLASSES and source.given is None and source.flips is None
    assert source.y_train.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    want = torch.zeros(36, 3, dtype=torch.uint8)
    for i in range(36):
        want[i, i // 12] = 100 + i % 12
    assert torch.equal(source.x_train[:, 14, 14], want)
    # 50 x 40 pixels become 35 x 28, of which columns 3.5 to 31.5 stay; the white sides end at 3.5.
    assert int(source.x_train[0, 14, 2:26].float().std(0).max()) == 0
    assert (source.mean, source.std) == data.pixel_statistics(source.x_train)


@pytest.mark.parametrize(
    ("size", "shape", "columns"),
    [
        (
            "28x48",
            (28, 48),
            (5, 43),
        ),  # 40 x 50 become 38 x 48, of which 28 rows stay, and all columns: the sides are 4.8 wide
        ("48x28", (48, 28), (1, 27)),  # 40 x 50 become 48 x 60, of which columns 16 to 44 stay
        (224, (224, 224), (10, 214)),
    ],
)
def test_a_folder_of_rectangles(photos, size, shape, columns):
    source = sources.load_folder(str(photos), size)
    assert source.x_train.shape == (36, *shape, 3)
    assert sources.own_shape(str(photos), size) == (36, 12, *shape, 3, 3)
    first, end = columns
    assert int(source.x_train[0, :, first:end].float().std((0, 1)).max()) == 0
    assert size == 224 or int(source.x_train[0, 0, 0, 1]) == (
        255 if shape[1] == 48 else 0
    )  # the white side, where it stays
    args = options.parse(["--dataset", str(photos), "--image-size", str(size)])
    assert args.image_size == size and (args.name.endswith(f"image-size-{size}") or size == 224)


def test_image_sizes_that_are_none(photos, capsys, tmp_path):
    for size in ("27", "225", "28x225", "28x", "28x28x28", "+40", "4_0"):
        refuse(
            capsys,
            tmp_path / "runs",
            ["--dataset", str(photos), f"--image-size={size}"],
            f"'{size}' is not a number of pixels",
        )


def test_a_rectangular_folder_trains_and_resumes(photos, go):
    given = ["--dataset", str(photos), *"--image-size 28x40 --bs 8 --width 4 --noise 0.3".split()]
    whole = go(*given, "--max-steps", "4", name="whole")
    go(*given, "--max-steps", "2", name="cut")
    assert same_weights(whole, go(*given, "--max-steps", "4", "--resume", name="cut"))


def test_a_grey_folder_has_one_channel(photos):
    for path in photos.rglob("*.*"):
        Image.open(path).convert("L").save(path)
    source = sources.load_folder(str(photos), 32)
    assert source.x_train.shape == (36, 32, 32, 1) and len(source.mean) == 1
    Image.new("RGB", (32, 32), (1, 2, 3)).save(photos / "test" / "ant" / "00.bmp")  # one of colour, and all have three
    assert sources.load_folder(str(photos), 32).x_train.shape == (36, 32, 32, 3)


def test_a_folder_trains_with_the_labels_it_brings(photos, go, capsys, tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):  # the second as Excel saves it
        (photos / sources.GIVEN).write_text("ant/00.bmp,bee\ncow/11.png,ant\n", encoding=encoding)
        source = sources.load_folder(str(photos), 28)
        assert (source.given != source.y_train).nonzero().squeeze(1).tolist() == [0, 35]
        assert source.given[[0, 35]].tolist() == [1, 0]
    argv = ["--dataset", str(photos), "--image-size", "28", "--bs", "8", "--measure-every", "1", "--epochs", "1"]
    folder = go(*argv)
    config = json.loads((folder / "config.json").read_text())
    assert config["noise"]["type"] == "given" and config["options"]["image_size"] == 28
    capsys.readouterr()
    refuse(capsys, tmp_path / "runs", [*argv, "--noise", "0.5"], "--noise 0.5", "own noisy labels", sources.GIVEN)
    (photos / sources.GIVEN).write_text("ant/00.bmp,wasp\n")
    refuse(capsys, tmp_path / "runs", argv, sources.GIVEN, "entry 1", "wasp")
    (photos / sources.GIVEN).write_bytes(b"\xff\xfe,\x00")
    refuse(capsys, tmp_path / "runs", argv, sources.GIVEN)


def test_classes_of_any_name(photos, go, monkeypatch):
    """A formula for matplotlib, and letters that the screen's encoding lacks."""
    for part in ("train", "test"):
        (photos / part / "ant").rename(photos / part / "$5_$")
        (photos / part / "bee").rename(photos / part / "émigré")
    screen = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(screen, encoding="ascii", write_through=True))
    go("--dataset", str(photos), "--bs", "8", "--noise", "0.5", "--epochs", "1")
    assert b"$5_$" in screen.getvalue() and b"\\xe9migr\\xe9" in screen.getvalue()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: (p / "train" / "bee" / "03.png").write_bytes(b"no image"), ("bee/03.png", "not a readable image")),
        (lambda p: (p / "train" / "bee" / "03.png").write_bytes(b""), ("bee/03.png", "not a readable image")),
        (lambda p: DEEP.save(p / "train" / "bee" / "03.png"), ("bee/03.png", "8 bits")),
        (lambda p: (p / "test").rename(p / "tset"), ("test/CLASS",)),
        (lambda p: (p / "test" / "bee").rename(p / "test" / "wasp"), ("different classes", "bee, wasp")),
        (lambda p: [f.unlink() for f in (p / "train" / "cow").iterdir()], ("train/CLASS", "cow")),
    ],
)
def test_bad_folders(spoil, says, photos, capsys, tmp_path):
    spoil(photos)
    refuse(capsys, tmp_path / "runs", ["--dataset", str(photos), "--bs", "8"], "--dataset", *says)


def header(width: int, height: int) -> bytes:
    """A PNG of that size without any pixels: what is read before decoding."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((8000, 6251), ("8000 x 6251 pixels", "more than 50 megapixels")),
        ((10_000, 10_000), ("10000 x 10000 pixels", "more than 50 megapixels")),  # Pillow warns
        ((30_000, 30_000), ("more than 50 megapixels",)),  # Pillow refuses
        ((8000, 6250), ("not a readable image",)),  # small enough to be tried
    ],
)
def test_an_image_of_too_many_pixels_is_not_decoded(size, says, photos, capsys, tmp_path):
    (photos / "train" / "bee" / "03.png").write_bytes(header(*size))
    refuse(capsys, tmp_path / "runs", ["--dataset", str(photos), "--bs", "8"], "bee/03.png", *says)


def test_an_empty_folder_and_one_class(capsys, tmp_path, photos):
    (tmp_path / "empty").mkdir()
    refuse(capsys, tmp_path / "runs", ["--dataset", str(tmp_path / "empty")], "empty", "train/CLASS")
    for part in ("train", "test"):
        for name in ("bee", "cow"):
            for f in (photos / part / name).iterdir():
                f.unlink()
            (photos / part / name).rmdir()
    refuse(capsys, tmp_path / "runs", ["--dataset", str(photos), "--bs", "8"], "one class only")
