"""What random command lines are given to read: own sets, folders of images, files of noise, and files that are none."""

import io
import json
import os
import random
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import datasets
import noises
from engine import folders, noisefile, options, sources

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # the real sets, where they are here


@dataclass
class Set:
    """A data set: what --dataset is given, and what generators of other options have to know of it."""

    name: str
    path: str
    size: int  # training examples
    K: int
    side: int  # pixels
    weight: float  # how often it is drawn
    given: bool = False  # brings its own noisy labels
    flips: bool = False  # has a map for asymmetric noise
    folder: bool = False
    grown: bool = False  # of full size: a subset keeps its run tiny
    data_dir: str | None = None
    files: Path | None = None  # folder of its noise files

    def file(self, name: str) -> str:
        return str(self.files / name)


@dataclass
class Inputs:
    sets: dict[str, Set] = field(default_factory=dict)
    folder: Path = Path()
    junk_files: list[str] = field(default_factory=list)
    junk_configs: list[str] = field(default_factory=list)

    def junk(self, name: str) -> str:
        return str(self.folder / "junk" / name)


def label_files(folder: Path, y: torch.Tensor, K: int) -> None:
    """Every kind of file that noise options take, for a training set of labels `y` (N,) int64 of `K` classes."""
    folder.mkdir()
    everything = torch.arange(len(y))
    noisy = noises.apply("uniform", y, K, 0.4, 1)
    noisefile.save(folder / "noise.npz", everything, y, noisy)
    index, _ = data.split(len(y), 0.2, 0)
    noisefile.save(folder / "dynamic.npz", index, y[index], noises.dynamic(y[index], K, 0.3, 5, 0), (0.3, 5))
    labels = {"clean_label": y, "worse_label": noisy, "aggre_label": noises.apply("pair", y, K, 0.1, 2)}
    torch.save({k: v.numpy() for k, v in labels.items()}, folder / "human.pt")
    T = np.full((K, K), 0.3 / K) + 0.7 * np.eye(K)
    np.save(folder / "T.npy", T)
    np.savetxt(folder / "T.csv", T / T.sum(1, keepdims=True), delimiter=",")


def own_set(path: Path, rng: np.random.Generator, shape: tuple[int, ...], K: int, n: int, given: bool) -> None:
    """An `.npz` of random images whose brightness tells a little of the class."""
    arrays = {}
    for part, m in (("train", n), ("test", 21)):
        y = np.arange(m) % K
        rng.shuffle(y)
        x = rng.integers(0, 180, (m, *shape)) + (60 * y // K).reshape(-1, *[1] * len(shape))
        arrays |= {f"x_{part}": x.astype(np.uint8), f"y_{part}": y.astype(rng.choice(["int64", "uint8", "int32"]))}
    if given:
        arrays["y_train_noisy"] = rng.permutation(arrays["y_train"])
    np.savez(path, **arrays)


def image_folder(path: Path, rng: np.random.Generator, colour: bool, listed: bool) -> None:
    """A folder of small images of three classes, 20 and 5 of each; `listed` with a train_noisy.csv."""
    for part, m in (("train", 20), ("test", 5)):
        for k, name in enumerate(("ä cat", "b", "c,d")):
            (path / part / name).mkdir(parents=True)
            for i in range(m):
                shape = (int(rng.integers(28, 50)), int(rng.integers(28, 50)), *([3] if colour else []))
                pixels = (rng.integers(0, 150, shape) + 50 * k).astype(np.uint8)
                Image.fromarray(pixels).save(path / part / name / f"{i}.{'jpg' if i % 3 == 0 else 'png'}")
    if listed:
        (path / folders.GIVEN).write_text("".join(f"b/{i}.png,ä cat\n" for i in (1, 2, 4, 5, 7)))


def make_junk(folder: Path) -> list[str]:
    """Files that no option can use, each for a reason of its own; returns their paths."""
    folder.mkdir()
    rng = random.Random(0)
    (folder / "empty-folder").mkdir()
    (folder / "text.npz").write_text("no archive\n")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "random.npz").write_bytes(rng.randbytes(3000))
    good = io.BytesIO()
    x, y = np.zeros((40, 32, 32), np.uint8), np.arange(40) % 2
    np.savez(good, x_train=x, y_train=y, x_test=x, y_test=y)
    (folder / "cut.npz").write_bytes(good.getvalue()[:20000])
    (folder / "late.npz").write_bytes(good.getvalue()[:-30])
    np.savez(folder / "float.npz", x_train=x.astype(float), y_train=y, x_test=x, y_test=y)
    np.savez(folder / "lacks.npz", x_train=x)
    np.savez(folder / "long.npz", x_train=x, y_train=np.arange(41) % 2, x_test=x, y_test=y)
    np.savez(folder / "negative.npz", x_train=x, y_train=y - 1, x_test=x, y_test=y, index=y - 1, true=y, label=y)
    np.savez(folder / "huge.npz", x_train=x, y_train=y * 2**40, x_test=x, y_test=y, index=y, true=y, label=y * 2**40)
    np.savez(folder / "objects.npz", x_train=np.array([{}], object), y_train=y, x_test=x, y_test=y)
    np.savez(folder / "none.npz", x_train=x[:0], y_train=y[:0], x_test=x, y_test=y)
    np.savez(folder / "large.npz", x_train=np.zeros((3, 65, 65), np.uint8), y_train=y[:3], x_test=x, y_test=y)
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z:  # says it is 400 GB large
        header = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (400000000, 32, 32), }"
        z.writestr("x_train.npy", header.ljust(127) + b"\n")
        for name in ("y_train", "x_test", "y_test", "index", "true", "label"):
            z.writestr(f"{name}.npy", header.ljust(127) + b"\n")
    torch.save({"clean_label": y}, folder / "one.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"clean_label": np.arange(3), "worse_label": np.zeros(3)}, folder / "float.pt")
    torch.save({"clean_label": print, "worse_label": os.system}, folder / "function.pt")
    (folder / "random.pt").write_bytes(rng.randbytes(2000))
    np.save(folder / "nan.npy", np.full((10, 10), np.nan))
    np.save(folder / "sums.npy", np.ones((10, 10)))
    (folder / "words.csv").write_text("a,b\nc,d\n")
    (folder / "ragged.csv").write_text("1,0\n1\n")
    os.mkfifo(folder / "fifo.npz")
    os.mkfifo(folder / "fifo.pt")
    (folder / "loop.npz").symlink_to("loop.npz")
    (folder / "zero.npz").symlink_to("/dev/zero")
    (folder / "folder.npz").mkdir()
    broken = folder / "broken-images"
    image_folder(broken, np.random.default_rng(0), True, False)
    (broken / "train" / "b" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    (folder / "damaged-sets" / "cifar-10-batches-py").mkdir(parents=True)
    (folder / "damaged-sets" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"x")
    (folder / "damaged-sets" / "FashionMNIST" / "raw").mkdir(parents=True)
    absent = [str(folder / "absent.npz"), str(folder / "absent"), "/dev/null", str(folder / ("x" * 300 + ".npz"))]
    return sorted(str(p) for p in folder.iterdir() if p.name != "damaged-sets") + absent


def make_junk_configs(folder: Path) -> list[str]:
    """Files that --config cannot use, each for a reason of its own; returns their paths."""
    folder.mkdir()
    options = [{"bs": value} for value in (0, -1, "x", 1.5, 10**400, [], {}, True, "3 ", "٣", "9" * 5000)]
    options += [{"nosuch": 1}, {"": 1}, {"\ud800": 1}, {"x" * 5000: 1}, {"best ": True}]
    options += [{"stratify": value} for value in ("on", 1, [])] + [
        {"sched": "triangle"},
        {"measure": ""},
        {"lr": "nan"},
    ]
    options += [{"sched_steps": 3, "sched_epochs": 3}, {"noise_type": "file", "noise": 0.5}]
    options += [{"null_every": 2, "measure": "off"}, [], "x", 3, None]
    odd = ("a\0b", "\ud800", "\udcff", "")
    options += [{key: text} for key in ("noise_type", "precision") for text in odd]
    options += [
        {"dataset": text} for text in odd if text
    ]  # an empty one does no harm where the command line has its own
    options += [{"noise_type": "file", "noise_file": text} for text in odd]
    texts = [json.dumps({"options": content}) for content in options]
    texts += ["", "{", "[]", "null", "{}", '{"options": {"lr": NaN}}', '{"options": {"lr": 1e999}}', "[" * 100_000]
    texts += ['{"options": ' * 100_000, '{"options": {"seed": ' + "9" * 100_000 + "}}", '{"options": {"bs": 1}} x']
    for i, text in enumerate(texts):
        (folder / f"{i}.json").write_text(text)
    (folder / "bytes.json").write_bytes(b"\xff\xfe{\0")
    return sorted(str(p) for p in folder.iterdir())


def make_inputs(folder: Path) -> Inputs:
    """All inputs, made in `folder`; the same every time."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    inputs = Inputs(folder=folder)
    inputs.sets["synthetic"] = Set("synthetic", "synthetic", 200, 10, 32, 4, flips=True)
    for name, shape, K, n, given in (
        ("grey", (28, 28), 3, 101, False),
        ("colour", (32, 32, 3), 10, 150, False),
        ("given", (33, 33, 1), 2, 97, True),
    ):
        path = folder / f"{name} set.npz"
        own_set(path, rng, shape, K, n, given)
        inputs.sets[name] = Set(name, str(path), n, K, shape[0], 1.5, given=given)
    for name, colour, listed in (("images", True, False), ("listed", False, True)):
        image_folder(folder / name, rng, colour, listed)
        inputs.sets[name] = Set(name, str(folder / name), 60, 3, 28, 0.7, given=listed, folder=True)
    for s in inputs.sets.values():
        drawn = ["--synthetic-train", "200", "--synthetic-test", "1"]
        source = sources.load(options.parse(["--dataset", s.path, *drawn, *["--image-size=32"] * s.folder]))
        s.files = folder / f"files of {s.name}"
        label_files(s.files, source.y_train, s.K)
    if (SHARED / datasets.CIFAR10_FOLDER).is_dir():
        inputs.sets["cifar10"] = Set("cifar10", "cifar10", 50_000, 10, 32, 0.2, flips=True, grown=True)
    if (SHARED / datasets.FMNIST_FOLDER).is_dir():
        inputs.sets["fmnist"] = Set("fmnist", "fmnist", 60_000, 10, 32, 0.1, flips=True, grown=True)
    for name in ("cifar10", "fmnist"):
        if name in inputs.sets:
            inputs.sets[name].data_dir = str(SHARED)
    inputs.junk_files = make_junk(folder / "junk")
    inputs.junk_configs = make_junk_configs(folder / "junk configs")
    return inputs
