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
from PIL import Image, ImageOps, features
from torchvision.datasets import CIFAR100

import data
import datasets
from conftest import TINY, any_name, same_weights, series
from engine import folders, options, sources
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
    assert sources.own_shape(str(photos), size)[:6] == (36, 12, *shape, 3, 3)
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
        (photos / folders.GIVEN).write_text("ant/00.bmp,bee\ncow/11.png,ant\n", encoding=encoding)
        source = sources.load_folder(str(photos), 28)
        assert (source.given != source.y_train).nonzero().squeeze(1).tolist() == [0, 35]
        assert source.given[[0, 35]].tolist() == [1, 0]
    argv = ["--dataset", str(photos), "--image-size", "28", "--bs", "8", "--measure-every", "1", "--epochs", "1"]
    folder = go(*argv)
    config = json.loads((folder / "config.json").read_text())
    assert config["noise"]["type"] == "given" and config["options"]["image_size"] == 28
    capsys.readouterr()
    refuse(capsys, tmp_path / "runs", [*argv, "--noise", "0.5"], "--noise 0.5", "own noisy labels", folders.GIVEN)
    (photos / folders.GIVEN).write_text("ant/00.bmp,wasp\n")
    refuse(capsys, tmp_path / "runs", argv, folders.GIVEN, "entry 1", "wasp")
    (photos / folders.GIVEN).write_bytes(b"\xff\xfe,\x00")
    refuse(capsys, tmp_path / "runs", argv, folders.GIVEN)


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
        ((1, 2_000_000), ("1 x 2000000 pixels", "to cover 32 x 32", "2048 megapixels", "more than 50")),
        ((100_000, 2), ("100000 x 2 pixels", "51 megapixels")),
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


# ------------------------------------------------------------------------------------ what a folder holds beside images


def spread(folder: Path) -> None:
    """Files of other endings, hidden ones, what a notebook leaves, and a folder that is no split."""
    colour = Image.new("RGB", (40, 40), (9, 8, 7))
    for name in ("a.jfif", "b.jpe", "c.gif", "d.PNG"):
        colour.save(folder / "train" / "bee" / name, format={"d.PNG": "PNG", "c.gif": "GIF"}.get(name, "JPEG"))
    for name in ("readme.txt", "e.heic", "no_ending", ".DS_Store"):
        (folder / "train" / "bee" / name).write_bytes(b"x")
    for place in ("train", "train/ant"):  # as a class, and below one
        (folder / place / ".ipynb_checkpoints").mkdir()
        colour.save(folder / place / ".ipynb_checkpoints" / "a-checkpoint.png")
    (folder / "test" / "list.csv").write_text("x")
    (folder / "extra").mkdir()


def test_what_is_left_out_of_a_folder_is_counted(photos, go, capsys):
    before = sources.load_folder(str(photos), 28)
    assert before.notes == ()
    spread(photos)
    source = sources.load_folder(str(photos), 28)
    assert source.classes == CLASSES and source.y_train.bincount().tolist() == [12, 16, 12]
    assert torch.equal(source.x_train[source.y_train != 1], before.x_train[before.y_train != 1])
    assert source.notes == (
        f"--dataset {photos}: left out, for these are no images by their names: 1 .heic, 1 .txt, 1 beside the classes in test/, "
        "3 hidden, 1 without an ending",
        f"--dataset {photos}: not read: extra/",
    )
    go("--dataset", str(photos), "--bs", "8", "--max-steps", "1")
    assert f"train.py: {source.notes[0]}\n" in capsys.readouterr().err


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read(photos):
    Image.new("RGB", (40, 40), (200, 0, 0)).save(photos / "train" / "ant" / "zz.avif", quality=100)
    source = sources.load_folder(str(photos), 28)
    assert source.notes == () and source.x_train[12, 14, 14].tolist() == pytest.approx([200, 0, 0], abs=4)


@any_name
def test_a_class_in_two_spellings_and_names_of_another_system(photos):
    """A letter with its accent may be one code point or two: macOS writes two."""
    one, two = "caf\u00e9", "cafe\u0301"
    (photos / "train" / "ant").rename(photos / "train" / two)
    (photos / "test" / "ant").rename(photos / "test" / one)
    (photos / "train" / two / "00.bmp").rename(photos / "train" / two / f"{two}.bmp")
    for entry, encoding in ((f"{one}/{one}.bmp,bee", "utf-8"), (f"cow/00.bmp,{one}", "cp1252")):
        (photos / folders.GIVEN).write_text(entry, encoding=encoding)
        source = sources.load_folder(str(photos), 28)
        assert source.classes[1] == two and source.y_test.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        changed = source.given != source.y_train
        assert int(changed.sum()) == 1 and source.given[changed].tolist() == [0 if encoding == "utf-8" else 1]
    (photos / "train" / one).mkdir()
    (photos / "train" / two / "01.png").rename(photos / "train" / one / "01.png")
    with pytest.raises(data.InputError, match="two Unicode spellings"):
        sources.load_folder(str(photos), 28)


def test_bad_entries_of_train_noisy(photos, capsys, tmp_path):
    argv = ["--dataset", str(photos), "--bs", "8"]
    (photos / folders.GIVEN).write_text("ant/00.bmp,bee\ncow/11.png,ant\nant/00.bmp,cow\n")
    refuse(capsys, tmp_path / "runs", argv, folders.GIVEN, "entry 3: 'ant/00.bmp'", "entry 1 already")
    (photos / folders.GIVEN).write_bytes(b"ant/\xe900.bmp,bee\n")
    refuse(capsys, tmp_path / "runs", argv, folders.GIVEN, "entry 1: 'ant/\u00e900.bmp,bee'", "read as Windows-1252")


# ----------------------------------------------------------------------------------------- a validation set of its own


def test_a_folder_with_a_validation_set(photos, go, capsys, tmp_path):
    (photos / "val").mkdir()
    for k, name in enumerate(CLASSES):
        (photos / "val" / name).mkdir()
        for i in range(2 + k):
            Image.new("RGB", (40, 40), (i, k, 7)).save(photos / "val" / name / f"{i}.png")
    given = ["--dataset", str(photos), "--bs", "8", "--noise", "0.5", "--max-steps", "2"]
    folder = go(*given)
    assert "val/ holds 9 images: the validation set; --val-frac is unused" in capsys.readouterr().err
    resolved = json.loads((folder / "config.json").read_text())["resolved"]
    assert (resolved["train_examples"], resolved["val_examples"], resolved["test_examples"]) == (36, 9, 12)
    assert series(folder).keys() >= {"val/acc", "val/acc_noisy"}
    with np.load(folder / "noise.npz") as z:
        assert z["index"].tolist() == [*range(36)]
    source = sources.load_folder(str(photos), 28)
    x, _, y = source.validation(torch.arange(0))
    assert y.tolist() == [0] * 2 + [1] * 3 + [2] * 4 and x[:, 0, 0, 1].tolist() == y.tolist()
    assert sources.own_shape(str(photos), 28).val == 9
    refuse(capsys, tmp_path / "runs", [*given, "--val-frac", "0.3"], "--val-frac 0.3", "validation set of its own")
    (photos / "val").rename(photos / "aside")
    refuse(capsys, tmp_path / "runs", [*TINY, *given, "--resume", "--name", "r"], "--resume", "has the data changed?")
    (photos / "aside").rename(photos / "valid")
    capsys.readouterr()
    assert go(*given, "--resume") == folder  # the same images under another name
    capsys.readouterr()
    (photos / "val").mkdir()
    refuse(capsys, tmp_path / "runs", given, "holds val/ and valid/")
    (photos / "val").rmdir()
    (photos / "valid" / "bee").rename(photos / "valid" / "wasp")
    refuse(capsys, tmp_path / "runs", given, "train/ and valid/ hold different classes (bee, wasp)")


# --------------------------------------------------------------------------------------- what is decoded, and into what


def test_images_are_turned_as_a_camera_says(photos):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(photos / "train" / "ant" / "00.bmp", format="PNG", exif=exif)
        ImageOps.exif_transpose(Image.open(photos / "train" / "ant" / "00.bmp")).save(
            photos / "train" / "ant" / "01.png"
        )
        source = sources.load_folder(str(photos), "28x48")
        assert torch.equal(source.x_train[0], source.x_train[1]), orientation
        assert torch.equal(source.x_train[0], folders.pixels_of(source_file(photos), (28, 48), "")[0])
    assert not torch.equal(source.x_train[0], plain(picture, (28, 48), photos))


def source_file(photos: Path) -> str:
    return str(photos / "train" / "ant" / "01.png")


def plain(picture: Image.Image, size: tuple[int, int], folder: Path) -> torch.Tensor:
    """The pixels of an image that is not turned."""
    picture.save(folder / "plain.png")
    return folders.pixels_of(str(folder / "plain.png"), size, "")[0]


def test_damaged_exif_data_say_nothing(tmp_path):
    picture = Image.new("RGB", (32, 32), (1, 2, 3))
    picture.save(tmp_path / "a.jpg", exif=b"Exif\0\0no tiff header")
    assert folders.pixels_of(str(tmp_path / "a.jpg"), (32, 32), "")[0].shape == (32, 32, 3)


def test_transparent_pixels_are_white(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(-1, -1, 3)
    levels = levels.repeat_interleave(2, 0).repeat_interleave(2, 1)  # (32, 32, 3): all that a channel may have

    def read(image: Image.Image, **how) -> torch.Tensor:
        image.save(tmp_path / "a.png", **how)
        return folders.pixels_of(str(tmp_path / "a.png"), (32, 32), "")[0]

    opaque = Image.fromarray(levels.numpy()).convert("RGBA")
    assert torch.equal(read(opaque), levels)  # as they are, to the bit
    opaque.putalpha(0)
    assert bool((read(opaque) == 255).all())
    opaque.putalpha(51)  # a fifth
    assert int((read(opaque).int() - (levels.double() * 0.2 + 204).round().int()).abs().max()) <= 1
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert bool((read(palette, transparency=1) == 255).all()) and bool((read(palette, transparency=0) == 9).all())


def test_a_subset_of_a_folder_is_all_that_is_decoded(photos, monkeypatch):
    whole, read = sources.load_folder(str(photos), 28), []
    original = folders.pixels_of
    monkeypatch.setattr(folders, "pixels_of", lambda path, *more: read.append(path) or original(path, *more))
    some = sources.load_folder(str(photos), 28, 10, 3)
    chosen = data.drawn(36, 3, 10)
    assert len(read) == 10 + 12 and torch.equal(some.stored, chosen) and torch.equal(some.y_train, whole.y_train)
    index = data.split(36, 0.3, 3, 10)[0]
    assert torch.equal(some.images(index), whole.x_train[index]) and len(index) == 7
    assert (some.mean, some.std) == data.pixel_statistics(whole.x_train[chosen])
    assert sources.own_shape(str(photos), 28, 10)[:2] == (10, 12)


def test_decoding_shows_a_bar_on_rank_0(photos, monkeypatch):
    bars = []

    class Bar(folders.tqdm):
        def __init__(self, **how):
            bars.append(how)
            super().__init__(**how | {"disable": True})  # nothing on the screen

        def update(self, n=1):
            bars[-1]["counted"] = bars[-1].get("counted", 0) + n

    monkeypatch.setattr(folders, "tqdm", Bar)
    monkeypatch.setattr(folders, "BLOCK", 5)
    for speaks in (True, False):
        monkeypatch.setattr(folders, "rank_zero", lambda: speaks)
        sources.load_folder(str(photos), 28)
        assert bars[-1]["total"] == bars[-1]["counted"] == 48 and bars[-1]["disable"] == (not speaks)


# ----------------------------------------------------------------------------------------------- files that have names


def test_a_replaced_image_is_noticed_when_a_run_is_resumed(photos, go, capsys, tmp_path):
    given = ["--dataset", str(photos), "--bs", "8"]
    go(*given, "--max-steps", "1")
    capsys.readouterr()
    file = photos / "test" / "bee" / "01.png"
    before = file.read_bytes()
    Image.new("RGB", (40, 50), (0, 99, 0)).save(file)
    argv = [*TINY, *given, "--max-steps", "2", "--resume", "--name", "r"]
    refuse(capsys, tmp_path / "runs", argv, "--resume", "images are not those", "has the data changed?")
    file.write_bytes(before)  # the same content at another time
    go(*given, "--max-steps", "2", "--resume")


def test_the_ranking_names_files(photos, go):
    folder = go("--dataset", str(photos), "--bs", "8", "--noise", "0.4", "--epochs", "1", "--examples")
    with np.load(folder / "examples.npz", allow_pickle=False) as z:
        names = sorted(path.relative_to(photos / "train").as_posix() for path in (photos / "train").rglob("*.*"))
        assert [names[i] for i in z["index"]] == z["name"].tolist() and len(z["name"]) == 29
