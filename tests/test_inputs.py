"""Bad input: one clear line that names the option or file, exit status 2, no traceback, nothing left behind."""

import gc
import json
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import datasets
import measure
import metrics
import train
from conftest import ROOT, TINY, series
from data import InputError
from engine import cmdline, machine, memory, options, sources
from study import grids

LONG = "x" * 300  # a file system refuses such a name, as it refuses what lies in a forbidden folder


def refuse(capsys, runs: Path, argv: list[str], *says: str) -> None:
    """The command ends with status 2 and one line that holds all of `says`; no run's folder appears."""
    before = sorted(runs.rglob("*")) if runs.exists() else None
    assert train.main([*argv, "--runs", str(runs)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("train.py: error: "), err
    for text in says:
        assert text in err
    assert "allow_pickle" not in err  # what numpy advises
    assert (sorted(runs.rglob("*")) if runs.exists() else None) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--noise 1.5", ("--noise", "1.5", "0 to 1")),
        ("--noise -0.1", ("--noise",)),
        ("--noise nan", ("--noise", "nan")),
        ("--noise much", ("--noise", "much")),
        ("--bs 0", ("--bs", "from 1")),
        ("--bs 1e3", ("--bs", "whole number")),
        ("--bs 1_000", ("--bs", "'1_000'", "whole number")),
        ("--lr 1_0.0", ("--lr", "'1_0.0'", "positive")),
        ("--epochs \u0663", ("--epochs", "whole number")),
        ("--lr \uff11", ("--lr", "positive")),
        ("--lr 1e999", ("--lr", "positive")),
        ("--dataset=--", ("--dataset: '--' is not a value",)),
        ("--name=--", ("--name: '--' is not a value",)),
        ("--compile=--", ("--compile: '--' is not a value",)),
        ("--bs=--", ("--bs: '--' is not a value",)),
        ("--bs 161", ("--bs 161", "160")),
        ("--lr 0", ("--lr", "positive")),
        ("--lr inf", ("--lr",)),
        ("--momentum 1", ("--momentum",)),
        ("--threads 2147483648", ("--threads", "1 to 1024")),
        ("--width 1000000", ("--width", "1 to 1024")),
        ("--permutations 1001", ("--permutations", "0 to 1000")),
        (f"--dataset {LONG}", ("--dataset", "neither")),
        (f"--dataset {LONG}.npz", ("--dataset", "no such file")),
        (f"--dataset cifar10 --data-dir {LONG}", ("--data-dir", "File name too long")),
        (f"--noise-type file --noise-file {LONG}", ("--noise-file", "no such file")),
        (f"--noise-type matrix --noise-matrix {LONG}", ("--noise-matrix", "no such file")),
        ("--name a\udcff", ("--name", "UTF-8")),
        ("--wd -1", ("--wd",)),
        ("--epochs 0", ("--epochs",)),
        ("--max-steps -3", ("--max-steps",)),
        ("--measure-every 0", ("--measure-every",)),
        ("--sched warm", ("--sched", "onecycle")),
        ("--sched-steps 10 --sched-epochs 2", ("--sched-steps", "--sched-epochs", "once")),
        ("--model resnet50", ("--model", "resnet18")),
        ("--dataset mnist", ("--dataset", "mnist", "cifar10")),
        ("--dataset nowhere.npz", ("--dataset nowhere.npz", "no such file")),
        ("--model vgg16 --width 32", ("--width", "vgg16")),
        ("--model vgg16-linear --norm gn", ("--norm", "vgg16-linear")),
        ("--norm gn --width 12", ("--width 12", "8")),
        ("--val-frac 0", ("--val-frac", "0 validation")),
        ("--subset 5000", ("--subset 5000", "200")),
        ("--noise-seed -1", ("--noise-seed",)),
        ("--fake-mask 0.5 --noise 0.2", ("--fake-mask 0.5", "clean")),
        ("--measure-budget -1", ("--measure-budget",)),
        ("--null-every 0", ("--null-every", "from 1")),
        ("--measure full --null-every 3", ("--null-every 3", "--measure split")),
        ("--chunks 1", ("--chunks",)),
        ("--precision fp8", ("--precision fp8", "bf16-mixed")),
        ("--accelerator tpu", ("--accelerator tpu", "cpu")),
        ("--accelerator=", ("--accelerator", "cpu")),
        ("--precision=", ("--precision", "32-true")),
        ("--devices none", ("--devices",)),
        ("--strategy fsdp", ("--strategy fsdp", "ddp")),
        ("--nois 0.5", ("--nois",)),
        ("--name ../up", ("--name",)),
        (f"--name {'x' * 256}", ("--name", "255 bytes")),
        ("--sched-steps 10 --sched-epochs 2 --norm gn --width 12", ("--sched-steps", "--width 12")),
    ],
)
def test_bad_options(argv, says, capsys, tmp_path):
    refuse(capsys, tmp_path / "runs", [*TINY, *argv.split()], *says)


@pytest.mark.parametrize("value", [" 32", "32 ", "\t32", "3 2"])
@pytest.mark.parametrize("option", ["--bs", "--lr", "--devices"])
def test_numbers_without_spaces(option, value, capsys, tmp_path):
    refuse(capsys, tmp_path / "runs", [*TINY, f"{option}={value}"], option)


def test_numbers_of_a_grid_are_checked_alike():
    for grid in ("bs=1_000", "lr=\u0661", "noise=0.5 bs=\uff13\uff12"):
        with pytest.raises(InputError, match="--grid: --(bs|lr)"):
            grids.expand([grid], [], "--grid")


HUGE = 5000


@pytest.mark.parametrize(
    ("option", "letter"),
    [
        *(
            ("--bs", "x"),
            ("--bs", "x "),
            ("--lr", "9"),
            ("--dataset", "x "),
            ("--dataset", "\\"),
            ("--model", "\u00fc"),
        ),
        *(
            ("--model", "\\"),
            ("--name", "x "),
            ("--precision", "x"),
            ("--runs", "x "),
            ("--noise-labels", "x "),
            ("--no", "x"),
        ),
    ],
)
def test_messages_quote_200_characters_at_most(option, letter, capsys, tmp_path):
    value = (letter * HUGE)[:HUGE]
    runs = str(tmp_path / "runs") if option != "--runs" else value
    assert train.main([*TINY, "--runs", runs, f"{option}={value}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and 50 < len(err) < 900
    assert max(len(run) for run in err.split("...")) < 700 and "..." in err


def test_short_words_are_quoted_whole():
    path = "/a folder/" + "y" * 180
    assert cmdline.shortened(f"--dataset {path}: missing", [path]) == f"--dataset {path}: missing"
    long = "z" * 201
    assert len(cmdline.shortened(long)) == cmdline.QUOTED


@pytest.mark.parametrize(
    "what, line",
    [
        (
            ValueError("not\0a\x1b[31m\u202emagic\ud800 \udcff\u2066\x85"),
            r"not\x00a\x1b[31m\u202emagic\ud800 \xff\u2066",
        ),
        (RuntimeError("\n first\tline \nC++ frames"), "first line"),
        (FileNotFoundError(2, "No such file", "/secret"), "No such file"),
        (OSError("a pipe"), "a pipe"),
        (KeyError(), "KeyError"),
        (b"\x89PNG\r\n\xff", r"\x89PNG \xff"),
        ("two\nlines\u2028three", r"two lines\u2028three"),
        ("\0" * 2163, r"\x00" * 25 + "..." + "0" + r"\x00" * 24),
        ("Zürich 数 \u200d", "Zürich 数 \u200d"),
    ],
)
def test_whatever_is_quoted_becomes_one_printable_line(what, line):
    assert cmdline.one_line(what) == line and len(line) <= cmdline.QUOTED


def test_an_error_message_leaves_a_terminal_as_it_is(capsys):
    cmdline.complain("--name a\0\x1b]0;x\x07\u202e:\nno")
    assert capsys.readouterr().err == "train.py: error: --name a\\x00\\x1b]0;x\\x07\\u202e: no\n"


def test_options_at_their_bounds():
    args = options.parse("--momentum 0.99995 --threads 1024 --width 1024".split())
    assert (args.momentum, args.threads, args.width) == (0.99995, 1024, 1024)


def test_a_home_directory_in_any_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = "--data-dir=~/d --runs=~/r --noise-type=file --noise-file=~/n.npz".split()
    args = options.parse(given)
    assert (args.data_dir, args.runs, args.noise_file) == ("/home/me/d", "/home/me/r", "/home/me/n.npz")
    args = options.parser().parse_args(["--dataset=~/own.npz", "--noise-matrix=~/T.csv"])
    assert (args.dataset, args.noise_matrix) == ("/home/me/own.npz", "/home/me/T.csv")


def test_every_option_says_what_it_is_and_its_default():
    parser = options.parser()
    for action in parser._actions:
        if action.dest != "help":
            shown = parser._get_formatter()._expand_help(action)
            assert "default: " in shown and not shown.startswith("(default"), action.dest
            assert action.default in (None, False) or f"default: {action.default})" in shown, shown


def test_a_gpu_that_is_not_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    refuse(capsys, tmp_path / "runs", [*TINY, "--accelerator", "gpu"], "--accelerator gpu", "no CUDA GPU")


def test_an_existing_run_is_not_touched(go, capsys, tmp_path):
    folder = go("--noise", "0.5")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    capsys.readouterr()
    refuse(capsys, tmp_path / "runs", [*TINY, "--name", "r"], "--name r", "exists already")
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_runs_that_cannot_be_a_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    refuse(capsys, tmp_path / "file", TINY, "--runs", "not a folder")
    refuse(capsys, tmp_path / "file" / "below", TINY, "--runs", "cannot be written")
    assert train.main([*TINY, "--runs", str(tmp_path / LONG)]) == 2
    assert "more than 255 bytes" in capsys.readouterr().err
    refuse(capsys, tmp_path, [*TINY, "--name", LONG], "more than 255 bytes")
    refuse(capsys, tmp_path, [*TINY, "--name", "file", "--resume"], "--name file", "is a file")


@pytest.mark.slow
def test_as_a_process_too(tmp_path):
    result = subprocess.run(
        [sys.executable, "train.py", "--noise", "2", "--runs", str(tmp_path / "runs")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2 and not (tmp_path / "runs").exists()
    assert result.stderr == "train.py: error: --noise: '2' is not a number from 0 to 1\n"


# --------------------------------------------------------------------------------------------------------- data files


@pytest.mark.parametrize(
    ("dataset", "folder"), [("cifar10", datasets.CIFAR10_FOLDER), ("fmnist", datasets.FMNIST_FOLDER)]
)
def test_no_data_and_no_network(dataset, folder, capsys, tmp_path, monkeypatch):
    def unplugged(*_, **__):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr("urllib.request.urlopen", unplugged)
    argv = ["--dataset", dataset, "--data-dir", str(tmp_path / "data")]
    refuse(capsys, tmp_path / "runs", argv, "--data-dir", folder, "cannot be downloaded")
    assert list(tmp_path.iterdir()) == []  # no half-made data folder either


def test_one_of_several_processes_downloads(tmp_path):
    asked, answer = [], threading.Event()

    def make(root):
        asked.append(root)
        assert answer.wait(20)
        (Path(root) / "set" / "raw").mkdir(parents=True)

    files = datasets.Files("set/raw", {}, make)
    several = [threading.Thread(target=sources.fetch, args=(files, str(tmp_path / "d"))) for _ in "123"]
    for one in several:
        one.start()
    several[0].join(0.3)  # long enough for all to have asked
    answer.set()
    for one in several:
        one.join()
    assert len(asked) == 1 and [p.name for p in (tmp_path / "d").iterdir()] == ["set"]  # the lock is gone too


def test_a_lock_that_cannot_be_had_is_done_without(tmp_path):
    (tmp_path / ".download.lock").mkdir()  # a file of another user says no to everybody but root
    sources.fetch(datasets.Files("set", {}, lambda root: (Path(root) / "set").mkdir()), str(tmp_path))
    assert (tmp_path / "set").is_dir()


@pytest.mark.parametrize(
    ("dataset", "folder", "table"),
    [
        ("cifar10", datasets.CIFAR10_FOLDER, datasets.CIFAR10_MD5),
        ("fmnist", datasets.FMNIST_FOLDER, datasets.FMNIST_MD5),
    ],
)
def test_a_missing_and_a_damaged_file_are_named(dataset, folder, table, capsys, tmp_path, real_data):
    place = tmp_path / "data" / folder
    place.mkdir(parents=True)
    for name in table:
        (place / name).symlink_to((real_data / folder / name).resolve())
    argv = ["--dataset", dataset, "--data-dir", str(tmp_path / "data")]
    victim = list(table)[-2]  # neither the first nor the last
    (place / victim).unlink()
    refuse(capsys, tmp_path / "runs", argv, victim, "missing")
    shutil.copyfile(real_data / folder / victim, place / victim)
    with open(place / victim, "r+b") as f:
        f.seek(5000)
        byte = f.read(1)[0]
        f.seek(5000)
        f.write(bytes([byte ^ 1]))
    refuse(capsys, tmp_path / "runs", argv, victim, "damaged")
    assert sorted(p.name for p in place.iterdir()) == sorted(table)  # nothing downloaded over it


def good() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (100, 28, 28), dtype=np.uint8), np.arange(100) % 4
    return {"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_test": None}, ("x_test",)),
        ({"x_train": np.zeros((100, 28, 28), np.float32)}, ("x_train", "float32", "uint8")),
        ({"x_train": np.zeros((100, 28, 225), np.uint8)}, ("x_train", "28 to 224 pixels a side")),
        ({"x_train": np.zeros((100, 28, 28, 2), np.uint8)}, ("x_train", "colour")),
        ({"x_train": np.zeros((100, 32, 32), np.uint8)}, ("x_train", "x_test")),
        ({"y_train": np.zeros(99, int)}, ("y_train", "(100,)")),
        ({"y_train": np.zeros(100)}, ("y_train", "integer")),
        ({"y_train": np.zeros(100, int)}, ("y_train", "one class")),
        ({"y_test": np.full(20, 4)}, ("y_test", "class 4")),
        ({"y_train": np.arange(100) - 1}, ("y_train", "-1")),
        ({"y_train_noisy": np.zeros(5, int)}, ("y_train_noisy", "(100,)")),
        ({"y_train": np.array([{}] * 100, dtype=object)}, ("not a readable .npz", "Python objects")),
        ({"y_train": np.zeros((100, 4), int)}, ("y_train", "(100, 4)", "integer (100,)")),
    ],
)
def test_misshapen_npz(change, says, capsys, tmp_path):
    arrays = {k: v for k, v in (good() | change).items() if v is not None}
    np.savez(tmp_path / "own.npz", **arrays)
    argv = ["--dataset", str(tmp_path / "own.npz"), "--bs", "8"]
    refuse(capsys, tmp_path / "runs", argv, "own.npz", *says)


def test_labels_as_keras_has_them_and_a_validation_set(go, tmp_path, capsys):
    arrays = {k: v[:, None] if k[0] == "y" else v for k, v in good().items()}
    x_val, y_val = arrays["x_train"][::-1][:30], arrays["y_train"][::-1][:30]
    np.savez(tmp_path / "own.npz", **arrays, x_val=x_val, y_val=y_val, weights=np.zeros(3))
    source = sources.load_npz(str(tmp_path / "own.npz"))
    assert source.y_train.tolist() == good()["y_train"].tolist() and source.y_test.shape == (20,)
    folder = go("--dataset", str(tmp_path / "own.npz"), "--bs", "16", "--max-steps", "1")
    err = capsys.readouterr().err
    assert "x_val holds 30 images: the validation set" in err and "not read: weights" in err
    resolved = json.loads((folder / "config.json").read_text())["resolved"]
    assert (resolved["train_examples"], resolved["val_examples"]) == (100, 30)
    x, _, y = source.validation(torch.arange(0))
    assert y.tolist() == y_val[:, 0].tolist() and torch.equal(x[..., 0], torch.from_numpy(x_val.copy()))
    np.savez(tmp_path / "own.npz", **arrays, x_val=x_val)
    refuse(capsys, tmp_path / "runs", ["--dataset", str(tmp_path / "own.npz")], "lacks the array y_val")


@pytest.mark.parametrize(
    ("move", "says"),
    [
        (lambda y: y + 1, "no example of class 0 of 0..4"),
        (lambda y: np.where(y == 2, 7, y), "no example of classes 2, 4, 5, 6 of 0..7"),
    ],
)
def test_classes_without_images_are_named(move, says, tmp_path, go, capsys):
    arrays = {k: move(v) if k[0] == "y" else v for k, v in good().items()}
    np.savez(tmp_path / "own.npz", **arrays)
    go("--dataset", str(tmp_path / "own.npz"), "--bs", "16", "--max-steps", "1")
    err = capsys.readouterr().err
    assert says in err and "np.unique(y_train, return_inverse=True)" in err
    classes, y_train = np.unique(arrays["y_train"], return_inverse=True)  # as the message says
    np.savez(
        tmp_path / "own.npz", **arrays | {"y_train": y_train, "y_test": np.searchsorted(classes, arrays["y_test"])}
    )
    assert sources.load_npz(str(tmp_path / "own.npz")).notes == ()


def test_replaced_images_of_an_npz_are_noticed(go, tmp_path, capsys):
    np.savez(tmp_path / "own.npz", **good())
    own = ["--dataset", str(tmp_path / "own.npz"), "--bs", "16"]
    go(*own, "--max-steps", "1")
    np.savez_compressed(tmp_path / "own.npz", **good())  # another file, the same arrays
    go(*own, "--max-steps", "2", "--resume")
    capsys.readouterr()
    np.savez(tmp_path / "own.npz", **good() | {"x_test": good()["x_test"][::-1]})
    argv = [*TINY, *own, "--max-steps", "3", "--resume", "--name", "r"]
    refuse(capsys, tmp_path / "runs", argv, "--resume", "images are not those")


def test_damaged_npz(capsys, tmp_path):
    path = tmp_path / "own.npz"
    np.savez_compressed(path, **good())
    whole = path.read_bytes()
    for broken in (b"", b"no zip at all", whole[: len(whole) // 2], whole[:400] + bytes(400) + whole[800:]):
        path.write_bytes(broken)
        refuse(capsys, tmp_path / "runs", ["--dataset", str(path), "--bs", "8"], "own.npz", "not a readable")


def test_own_npz_runs_and_its_noise_is_taken(go, tmp_path, capsys):
    arrays = good()
    arrays["y_train_noisy"] = np.where(np.arange(100) % 5 == 0, (arrays["y_train"] + 1) % 4, arrays["y_train"])
    np.savez(tmp_path / "own.npz", **arrays)
    own = ["--dataset", str(tmp_path / "own.npz"), "--bs", "16"]
    folder = go(*own)
    with np.load(folder / "noise.npz") as z:
        assert (z["label"] == arrays["y_train_noisy"][z["index"]]).all() and (z["true"] != z["label"]).any()
    capsys.readouterr()
    refuse(capsys, tmp_path / "runs", [*TINY, *own, "--noise", "0.2"], "--noise 0.2", "y_train_noisy")


# ------------------------------------------------------------------------------------------------------------- memory

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "


@pytest.mark.parametrize(
    ("error", "bytes_asked"),
    [
        (RuntimeError(CPU + "6442450944 bytes. Error code 12 (Cannot allocate memory)"), 6 * 2**30),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has 2 GiB"), 3 * 2**29),
        (MemoryError("Unable to allocate 512. MiB for an array with shape (512, 1048576)"), 2**29),
        (MemoryError("Unable to allocate 1.50 TiB for an array with shape (3, 2) and data type uint8"), 3 * 2**39),
        (MemoryError(), 0),
        (MemoryError("std::bad_alloc"), 0),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_what_a_failed_allocation_asked_for(error, bytes_asked):
    assert memory.requested_bytes(error) == bytes_asked


def test_memory_of_the_images_is_what_a_run_holds(go, monkeypatch):
    """Against its tensors: the set as loaded, which is let go of, and as put on the device."""
    loaded, load = [], sources.load

    def keep(args):
        source = load(args)
        loaded.extend(weakref.ref(x) for x in (source.x_train, source.x_test))
        loaded.append(source.x_train.nbytes + source.x_test.nbytes)
        return source

    def count(job, *_):
        gc.collect()
        assert [ref() for ref in loaded[:2]] == [None, None]
        kept = sum(images.nbytes for images in (job.train.images, job.val[0], job.test[0]))
        assert memory.of_data(job.args) == (loaded[2], kept)
        raise MemoryError

    monkeypatch.setattr(sources, "load", keep)
    monkeypatch.setattr(train, "fit", count)
    go("--subset", "150", status=1)


@pytest.mark.parametrize("where", ["load", "prepare", "fit"])
def test_too_little_memory_is_one_line(go, monkeypatch, capsys, where):
    def fail(*_):
        raise RuntimeError(CPU + "6442450944 bytes. Error code 12 (Cannot allocate memory)")

    monkeypatch.setattr(*{"load": (sources, "load"), "prepare": (train, "prepare"), "fit": (train, "fit")}[where], fail)
    folder = go(status=1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert "not enough memory for 6.0 GiB more; a smaller --bs" in err
    if where == "fit":
        reason = json.loads((folder / "summary.json").read_text())["reason"]
        assert reason.startswith("not enough memory")
    else:
        assert not folder.exists()


def test_no_matrix_of_all_pairs_of_many_classes(go, tmp_path):
    """2,003 classes, a number whose square is no other size: nothing of the run has K x K entries."""
    K, seen = 2003, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend(t.shape for t in [out] if isinstance(t, torch.Tensor) and t.layout == torch.strided)
            return out

    x, y = np.zeros((K, 28, 28), np.uint8), np.arange(K)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    given = "--noise 0.5 --subset 60 --bs 16 --epochs 1 --measure full --measure-budget 20 --measure-every 3".split()
    with Sizes():
        folder = go("--dataset", str(tmp_path / "own.npz"), *given)
    assert series(folder).keys() >= {"fresh/cos", "val/acc_noisy", "detect/aum"}
    assert (48, K) in seen and not [shape for shape in seen if shape.numel() == K * K]


def test_sparse_counts_of_classes_give_the_same_bits(monkeypatch):
    g = torch.Generator().manual_seed(0)
    true, label, predicted = torch.randint(10, (3, 400), generator=g)
    true = true.clamp_max(8)  # one class has no example
    results = []
    for most in (1000, 5):
        monkeypatch.setattr(metrics, "DENSE", most)
        context = SimpleNamespace(transition=metrics.confusion(true, label, 10), noise_seed=0)
        assert context.transition.is_sparse == (most == 5) and len(context.transition) == 10
        batch = data.Batch(None, label[:64], true[:64], (label != true)[:64], 64, 0, 0, None, None, None)
        fresh = measure.fresh_labels(context, batch, 3)
        excess = metrics.memorized_excess(predicted, true, label, metrics.confusion(true[200:], predicted[200:], 10))
        results.append((fresh.tolist(), excess))
    assert results[0] == results[1] and (torch.tensor(results[0][0]) != label[:64]).sum() > 40


def test_what_cannot_fit_is_refused(capsys, tmp_path, monkeypatch):
    refuse(capsys, tmp_path / "runs", [*TINY, "--synthetic-train", str(2**31)], "--synthetic-train", "TiB", "may use")
    monkeypatch.setattr(machine, "memory", lambda: 2.0**19)
    words = "--synthetic-train 200", "images take", "may use 512.0 KiB"
    refuse(capsys, tmp_path / "runs", TINY, *words)


# ------------------------------------------------------------------------------------------------------- other warnings


def test_16_mixed_on_a_cpu_is_called_slow(go, capsys):
    go("--precision", "16-mixed", "--max-steps", "1", "--measure", "off")
    assert "warning: --precision 16-mixed is slow on a CPU" in capsys.readouterr().err
