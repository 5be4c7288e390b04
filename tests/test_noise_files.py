"""Noise from files and by command: CIFAR-10N, runs repeated from noise.npz, `python noise.py`, and bad input."""

import noises
from engine.labels import relabel, relabel_held_out
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import noise
from engine import noisefile, sources
from engine import options
import datasets
from conftest import ROOT, TINY, same_weights, series, slow
from test_inputs import LONG, refuse

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a warning on standard error would be a second line

LABELS = {  # share of wrong labels, Wei et al. 2022 (2110.12088), table 1
    "aggre_label": 0.0901, "worse_label": 0.4021,
    "random_label1": 0.1723, "random_label2": 0.1812, "random_label3": 0.1764,
}  # fmt: skip


def ledger_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["noise"]


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as z:
        return dict(z)


def refused(capsys, argv: list[str], *says: str) -> None:
    """`python noise.py` ends with status 2 and one line that holds all of `says`."""
    assert noise.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("noise.py: error: "), err
    assert "allow_pickle" not in err
    for text in says:
        assert text in err


# ------------------------------------------------------------------------------------------------------------- CIFAR-10N


@pytest.fixture
def human(real_data) -> str:
    path = real_data / "cifar-10n" / "CIFAR-10_human.pt"
    if not path.is_file():
        pytest.skip("no ../shared/data/cifar-10n beside the repository: the human labels are not here")
    return str(path)


def test_rates_of_cifar10n(human):
    for name, rate in LABELS.items():
        file = noisefile.read(human, name)
        assert len(file.true) == 50_000
        assert round(float((file.label != file.true).double().mean()), 4) == rate, name


def test_human_labels_and_their_match(human, real_data):
    """The labels of CIFAR-10N stand at their own images, and `matched` has their matrix on the same split."""
    argv = ["--data-dir", str(real_data), "--noise-file", human, "--noise-labels", "worse_label"]
    args = options.parse([*argv, "--noise-type", "human"])
    source, want = sources.load(args), noisefile.read(human, "worse_label")
    index = data.split(50_000, 0.2, 0)[0]
    labels, a, by_epoch = relabel(args, source, index)
    assert torch.equal(labels, want.label[index]) and by_epoch is None
    assert (a["nominal"], a["seed"], a["examples"]) == (pytest.approx(0.40208), None, 40_000)
    shuffled, b, _ = relabel(options.parse([*argv, "--noise-type", "matched"]), source, index)
    assert b["matrix"] == a["matrix"] and b["realised"] == a["realised"] and b["seed"] == 0
    assert 0.3 < float((shuffled != labels).double().mean()) < 0.7


def test_human_labels_of_another_set(human, real_data, capsys, tmp_path):
    argv = [
        "--noise-type",
        "human",
        "--noise-file",
        human,
        "--noise-labels",
        "worse_label",
        "--data-dir",
        str(real_data),
    ]
    refuse(capsys, tmp_path / "runs", [*argv, "--dataset", "fmnist"], "CIFAR-10_human.pt", "another data set")
    refuse(capsys, tmp_path / "runs", [*argv, "--noise", "0.4"], "--noise 0.4", "rate of its file")
    argv[5] = "worst"
    refuse(capsys, tmp_path / "runs", argv, "--noise-labels", "worst", *LABELS)


# ------------------------------------------------------------------------------------------------- the same, from a file


@pytest.mark.parametrize("argv", ["--noise-type instance --noise 0.3", *slow("--noise-type dynamic --noise 0.5")])
def test_a_run_repeats_from_its_noise_npz(argv, go):
    a = go(*argv.split(), "--noise-seed", "3", name="a")
    b = go("--noise-type", "file", "--noise-file", str(a / "noise.npz"), name="b")
    assert (a / "noise.npz").read_bytes() == (b / "noise.npz").read_bytes()
    assert same_weights(a, b)
    plain = [{k: v for k, v in series(f).items() if k != "noise/nominal"} for f in (a, b)]
    assert plain[0] == plain[1]
    result = [
        {k: v for k, v in ledger_of(f).items() if k not in ("type", "nominal", "seed", "dynamic")} for f in (a, b)
    ]
    assert result[0] == result[1]


@pytest.mark.slow
def test_dynamic_noise_on_two_processes_and_resumed(zygote, go, tmp_path):
    """Labels are a function of seed and epoch: two processes and a run in two parts see what one run sees."""
    argv = ["--norm", "gn", "--precision", "64-true", "--noise-type", "dynamic", "--noise", "0.5"]
    a = go(*argv, name="a")
    assert zygote.run([*TINY, *argv, "--runs", str(tmp_path / "runs"), "--name", "b"], ranks=2) == [0, 0], (
        zygote.output()
    )
    b = tmp_path / "runs" / "b"
    want, got = series(a), series(b)
    for tag in ("grad/clean_fraction", "train/acc_noisy", "grad/cos_clean_noisy", "val/loss"):
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in want[tag]], rel=2e-7, abs=1e-8), tag
    assert len({v for _, v in want["grad/clean_fraction"]}) > 1
    go(*argv, "--max-steps", "7", name="c")
    assert same_weights(a, go(*argv, "--max-steps", "10", "--resume", name="c"))


def test_a_resumed_run_may_find_its_file_elsewhere(go, tmp_path, capsys):
    a = go("--noise-type", "pair", "--noise", "0.3", "--max-steps", "1", name="a")
    (tmp_path / "moved.npz").write_bytes((a / "noise.npz").read_bytes())
    argv = ["--noise-type", "file", "--max-steps", "2", "--name", "b", "--noise-file"]
    go(*argv, str(a / "noise.npz"), name="b")
    go(*argv, str(tmp_path / "moved.npz"), "--resume", name="b")
    capsys.readouterr()
    z = arrays(a / "noise.npz")
    noisefile.save(tmp_path / "moved.npz", *(torch.from_numpy(z[k]) for k in ("index", "true", "true")))
    argv = [*TINY, *argv, str(tmp_path / "moved.npz"), "--resume"]
    refuse(capsys, tmp_path / "runs", argv, "--resume", "labels")


def test_the_ledger_is_on_screen_in_the_config_and_in_tensorboard(go, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = go("--noise-type", "symmetric", "--noise", "0.25", "--noise-seed", "5")
    ledger, out = ledger_of(folder), capsys.readouterr().out
    assert (ledger["nominal"], ledger["realised"], ledger["changed"], ledger["seed"]) == (0.25, 0.25, 40, 5)
    assert "label noise symmetric: nominal 0.2500, realised 0.2500 (40 of 160 labels changed), seed 5" in out
    assert ledger["labels_sha256"][:16] in out and "striped ring" in out
    actual = arrays(folder / "noise.npz")
    counts = noisefile.transitions(*(torch.from_numpy(actual[k]) for k in ("true", "label")), 10).double()
    assert ledger["matrix"] == (counts / counts.sum(1, keepdim=True)).tolist()
    assert ledger["per_class"] == pytest.approx((1 - torch.tensor(ledger["matrix"]).diag()).tolist(), abs=1e-6)
    events = EventAccumulator(str(folder)).Reload()
    assert "noise/matrix" in events.Tags()["images"]
    text = events.Tensors("noise/text_summary")[0].tensor_proto.string_val[0].decode()
    assert ledger["labels_sha256"] in text and "per_class" in text and "per cent" in text


def test_unset_noise_is_none_for_a_generator(go):
    folder = go("--noise-type", "pair", "--max-steps", "1")
    assert ledger_of(folder)["nominal"] == 0 == ledger_of(folder)["changed"]


def test_a_matrix_from_csv_and_npy(tmp_path):
    T = np.full((10, 10), 0.02)
    np.fill_diagonal(T, 0.82)
    np.save(tmp_path / "T.npy", T)
    np.savetxt(tmp_path / "T.csv", T, delimiter=",", fmt="%.4f")
    (tmp_path / "excel.csv").write_text((tmp_path / "T.csv").read_text(), encoding="utf-8-sig")
    result = []
    for name in ("T.npy", "T.csv", "excel.csv"):
        args = options.parse([*TINY, "--noise-type", "matrix", "--noise-matrix", str(tmp_path / name), "--noise", "1"])
        result.append(relabel(args, sources.load(args), torch.arange(200))[1])
    assert (
        result[0] == result[1] == result[2] and abs(result[0]["changed"] - 200 * 0.18) < 5 * (200 * 0.18 * 0.82) ** 0.5
    )


def test_noise_from_a_file_for_a_set_that_brings_its_own(go, tmp_path):
    """`matched` on own data: the given labels' matrix without their structure."""
    y = np.arange(100) % 4
    noisy = np.where(np.arange(100) % 5 == 0, (y + 1) % 4, y)
    x = np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y, y_train_noisy=noisy)
    own = ["--dataset", str(tmp_path / "own.npz"), "--bs", "16", "--max-steps", "1"]
    a = go(*own, name="a")
    b = go(*own, "--noise-type", "matched", "--noise-file", str(a / "noise.npz"), name="b")
    assert ledger_of(a)["type"] == "given" and ledger_of(a)["nominal"] == pytest.approx(0.2)
    assert ledger_of(a)["matrix"] == ledger_of(b)["matrix"] and ledger_of(a)["changed"] > 0
    assert ledger_of(a)["labels_sha256"] != ledger_of(b)["labels_sha256"]


# ------------------------------------------------------------------------------------------------------ python noise.py

SYNTHETIC = ["--dataset", "synthetic", "--synthetic-train", "200", "--synthetic-test", "40"]


def test_make_writes_what_train_would(go, tmp_path, capsys):
    out = tmp_path / "pair.npz"
    assert noise.main(["make", str(out), *SYNTHETIC, "--noise-type", "pair", "--noise", "0.4"]) == 0
    assert "nominal 0.4000, realised 0.4000 (64 of 160 labels changed), seed 0" in capsys.readouterr().out
    assert (
        out.read_bytes()
        == (go("--noise-type", "pair", "--noise", "0.4", "--max-steps", "1") / "noise.npz").read_bytes()
    )
    whole = tmp_path / "whole.npz"
    assert noise.main(["make", str(whole), *SYNTHETIC, "--noise", "0.4", "--val-frac", "0"]) == 0
    assert arrays(whole)["index"].tolist() == list(range(200))
    folder = go("--noise-type", "file", "--noise-file", str(whole), "--split-seed", "7", "--max-steps", "1", name="b")
    actual, of = arrays(folder / "noise.npz"), arrays(whole)
    assert (actual["label"] == of["label"][actual["index"]]).all()  # the whole set's labels serve any split


def test_make_for_a_subset(go, tmp_path):
    """All of the examples that `--subset` draws, which serve any run on them."""
    out = tmp_path / "some.npz"
    argv = [*SYNTHETIC, "--noise", "0.4", "--val-frac", "0", "--subset", "100", "--split-seed", "3"]
    assert noise.main(["make", str(out), *argv]) == 0
    assert arrays(out)["index"].tolist() == data.drawn(200, 3, 100).tolist()
    argv = ["--noise-type", "file", "--noise-file", str(out), "--subset", "100", "--split-seed", "3"]
    actual = arrays(go(*argv, "--max-steps", "1") / "noise.npz")
    assert len(actual["index"]) == 80 and (actual["true"] != actual["label"]).any()


def test_make_leaves_nothing_where_the_disk_is_full(tmp_path, capsys, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(capsys, ["make", str(tmp_path / "a.npz"), *SYNTHETIC], "a.npz", "cannot be written (No space left")
    assert list(tmp_path.iterdir()) == []


def test_a_home_directory_and_names_too_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert noise.main(["make", "~/a.npz", *SYNTHETIC, "--noise", "0.4"]) == 0
    assert noise.main(["inspect", "~/a.npz"]) == noise.main(["compare", "~/a.npz", "~/a.npz"]) == 0
    capsys.readouterr()
    refused(capsys, ["make", f"~/{LONG}.npz", *SYNTHETIC], "cannot be written (File name too long)")
    refused(capsys, ["make", "b.npz", "--true", f"~/{LONG}.npy"], "--true", "no such file")
    refused(capsys, ["make", f"{LONG}/b.npz", *SYNTHETIC], "there is no folder")
    for name in (LONG, f"{LONG}.pt"):
        refused(capsys, ["inspect", name], "no such file")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_make_from_labels_alone(tmp_path, capsys):
    np.save(tmp_path / "y.npy", np.arange(500, dtype=np.int16) % 7)
    out = tmp_path / "out.npz"
    argv = ["make", str(out), "--true", str(tmp_path / "y.npy"), "--noise-type", "symmetric", "--noise", "0.3"]
    assert noise.main(argv) == 0
    z = arrays(out)
    assert (z["true"] == np.arange(500) % 7).all() and (z["label"] != z["true"]).sum() == 150 and z["label"].max() == 6
    capsys.readouterr()
    argv = ["make", str(tmp_path / "b.npz"), "--true", str(tmp_path / "y.npy"), "--noise", "0.3"]
    refused(capsys, [*argv, "--noise-type", "instance"], "instance", "--true")
    refused(capsys, [*argv, "--noise-type", "asymmetric"], "asymmetric", "y.npy", "no map")
    more = ["--subset", "10", "--dataset", "synthetic", "--image-size", "40", "--split-seed", "1"]
    refused(capsys, [*argv, *more], "--dataset, --image-size, --subset, --split-seed: ", "--true")
    np.save(tmp_path / "y.npy", np.zeros(5))
    refused(capsys, argv, "y.npy", "integer")


def test_true_labels_of_other_kinds(tmp_path, capsys):
    y, made = np.arange(60) % 3 + 1, []
    np.save(tmp_path / "y.npy", y[:, None])
    (tmp_path / "y.json").write_text(json.dumps(y.tolist()))
    (tmp_path / "y.csv").write_text("label\n" + "\n".join(map(str, y)))
    for kind in ("npy", "json", "csv"):
        out = tmp_path / f"{kind}.npz"
        assert noise.main(["make", str(out), "--true", str(tmp_path / f"y.{kind}"), "--noise", "0.5"]) == 0
        assert "no example of class 0 of 0..3" in capsys.readouterr().err
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]
    argv = ["make", str(tmp_path / "b.npz"), "--true"]
    np.save(tmp_path / "y.npy", np.array([{}], dtype=object))
    refused(capsys, [*argv, str(tmp_path / "y.npy")], "not a readable .npy of labels", "Python objects")
    refused(capsys, [*argv, str(tmp_path / "npy.npz")], "no plain list of labels", ".json or .csv")


def test_inspect_and_compare(tmp_path, capsys):
    true = torch.arange(1000) % 4
    a = noises.apply("symmetric", true, 4, 0.2, 0)
    b = a.clone()
    b[:100] = true[:100]
    noisefile.save(tmp_path / "a.npz", torch.arange(1000), true, a)
    noisefile.save(tmp_path / "b.npz", torch.arange(1000).flip(0)[:900], true.flip(0)[:900], b.flip(0)[:900])
    assert noise.main(["inspect", str(tmp_path / "a.npz")]) == 0
    out = capsys.readouterr().out
    assert "0.2000 (200 of 1000 labels changed)" in out and noisefile.sha256(torch.arange(1000), true, a)[:16] in out
    assert noise.main(["compare", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    result = {k.strip(): v.strip() for k, v in rows.items()}
    assert result["examples in common"] == "900 of 1000 and 900" and result["same label"].startswith("1.0000 (0.")
    noisefile.save(tmp_path / "c.npz", torch.arange(1000), (true + 1) % 4, a)
    refused(capsys, ["compare", str(tmp_path / "a.npz"), str(tmp_path / "c.npz")], "true labels differ", "1000 of 1000")


def test_many_classes_have_no_matrix(tmp_path, capsys):
    true = torch.arange(9000)
    noisefile.save(tmp_path / "a.npz", torch.arange(9000), true, true.flip(0))
    assert noise.main(["inspect", str(tmp_path / "a.npz")]) == 0
    assert noise.main(["compare", str(tmp_path / "a.npz"), str(tmp_path / "a.npz")]) == 0
    out = capsys.readouterr().out
    assert "(9000 of 9000 labels changed)" in out and "matri" not in out
    noisefile.save(tmp_path / "b.npz", torch.arange(9), true[:9], true[:9] + 9999)
    refused(capsys, ["inspect", str(tmp_path / "b.npz")], "label", "10007", "class numbers")


def test_compare_knows_what_chance_would_give(tmp_path, capsys):
    """Two independent draws agree as often as the printed expectation says, and a file with itself always."""
    true = torch.arange(20_000) % 10
    for seed in (0, 1):
        noisefile.save(
            tmp_path / f"{seed}.npz", torch.arange(20_000), true, noises.apply("uniform", true, 10, 0.5, seed)
        )
    noise.main(["compare", str(tmp_path / "0.npz"), str(tmp_path / "1.npz")])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("same label"))
    got, expected = float(line.split()[2]), float(line.split()[3].strip("("))
    assert expected == pytest.approx(0.55**2 + 9 * 0.05**2, abs=0.005)
    assert got == pytest.approx(expected, abs=5 * (0.32 * 0.68 / 20_000) ** 0.5)


def test_inspect_cifar10n(human, capsys):
    assert noise.main(["inspect", human]) == 0
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert {k: float(v) for k, v in rows.items()} == LABELS
    refused(capsys, ["compare", human, human], f"{human}:LABELS", *LABELS)
    refused(capsys, ["inspect", f"{human}:worst"], "no labels 'worst'", "worse_label")


@pytest.mark.slow
def test_the_command_as_a_process(tmp_path):
    command = [sys.executable, "noise.py"]
    argv = ["make", str(tmp_path / "a.npz"), *SYNTHETIC, "--noise", "0.5"]
    made = subprocess.run([*command, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0 and "labels changed" in made.stdout and made.stderr == ""
    again = subprocess.run([*command, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and again.stderr == f"noise.py: error: {tmp_path / 'a.npz'}: exists already\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("", ("command",)),
        ("mak x.npz", ("mak",)),
        ("make", ("OUT.npz",)),
        ("make x.pt", ("x.pt", ".npz")),
        ("make no/where.npz", ("no/where.npz", "folder")),
        ("make x.npz --dataset nowhere", ("--dataset", "nowhere")),
        ("make x.npz --noise 2", ("--noise", "'2'")),
        ("make x.npz --true nowhere.npy", ("--true nowhere.npy", "no such file")),
        ("inspect nowhere.npz", ("nowhere.npz", "no such file")),
        ("compare nowhere.npz nowhere.npz", ("nowhere.npz",)),
        ("compare one.npz", ("FILE",)),
    ],
)
def test_bad_commands(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, argv.split(), *says)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--noise-type pairs", ("--noise-type", "pairs", "asymmetric")),
        ("--noise-type human", ("--noise-type human", "--noise-file", "--noise-labels")),
        ("--noise-type file", ("--noise-type file", "--noise-file")),
        ("--noise-type matched --noise-file a.npz --noise 0.2", ("--noise 0.2", "matched")),
        ("--noise-type file --noise-file nowhere.npz", ("--noise-file nowhere.npz", "no such file")),
        ("--noise-file nowhere.npz", ("--noise-file nowhere.npz", "uniform")),
        ("--noise-labels worse_label", ("--noise-labels worse_label", "uniform")),
        ("--noise-type matrix --noise 0.5", ("--noise-type matrix", "--noise-matrix")),
        ("--noise-type matrix --noise 0.5 --noise-matrix nowhere.csv", ("nowhere.csv", "no such file")),
        ("--noise-matrix T.csv --noise 0.5", ("--noise-matrix T.csv", "uniform")),
        ("--noise-type instance --noise 1", ("--noise 1", "instance", "cannot reach")),
        ("--image-size 32", ("--image-size 32", "folder")),
        ("--image-size 20", ("--image-size", "28 to 224")),
    ],
)
def test_bad_noise_options(argv, says, capsys, tmp_path):
    refuse(capsys, tmp_path / "runs", [*TINY, *argv.split()], *says)


@pytest.mark.parametrize(
    ("T", "says"),
    [
        (np.full((10, 10), 0.11), ("row 0 sums to 1.1", "not to 1")),
        (np.eye(10)[:, :9], ("(10, 9)", "10 classes")),
        (np.eye(9), ("(9, 9)", "10 classes")),
        (np.eye(10) + np.diag([-0.5] * 10, 0)[::-1] + 0.5 * np.eye(10)[::-1] - 0.1, ("negative",)),
        (np.full((10, 10), np.nan), ("not finite",)),
        (np.array([{}], dtype=object), ("not a readable .npy",)),
        (np.eye(10) + 0.5j, ("complex128",)),
    ],
)
def test_bad_matrices(T, says, capsys, tmp_path):
    np.save(tmp_path / "T.npy", T)
    argv = [*TINY, "--noise-type", "matrix", "--noise", "0.5", "--noise-matrix", str(tmp_path / "T.npy")]
    refuse(capsys, tmp_path / "runs", argv, "T.npy", *says)


def test_a_matrix_that_is_no_table(capsys, tmp_path):
    argv = [*TINY, "--noise-type", "matrix", "--noise", "0.5", "--noise-matrix", str(tmp_path / "T.csv")]
    for text, says in (("0.5,0.5\n0.5,half\n", "not a readable"), ("0.5,0.5\n1\n", "not a readable"), ("", "shape")):
        (tmp_path / "T.csv").write_text(text)
        refuse(capsys, tmp_path / "runs", argv, "T.csv", says)


def label_files(folder: Path, y: np.ndarray, label: np.ndarray) -> list[str]:
    """The same labels of 200 examples in files of every kind."""
    np.save(folder / "a.npy", label.astype(np.uint8)[:, None])
    np.savez(folder / "b.npz", label=label)
    (folder / "c.json").write_text(json.dumps(label.tolist()))
    (folder / "d.json").write_text(json.dumps({"label": label.tolist(), "true": y.tolist(), "by": "me"}))
    (folder / "e.csv").write_text("\n".join(map(str, label)) + "\n")
    (folder / "f.csv").write_text("noisy\n" + "\n".join(map(str, label)) + "\n", encoding="utf-8-sig")
    rows = [f"{i},x.png,{k},{t}" for i, (k, t) in enumerate(zip(label, y))]
    (folder / "g.csv").write_text("\r\n".join(['"index",path,"label",true', *rows[::-1]]))  # in any order
    return sorted(p.name for p in folder.glob("?.*"))


def test_labels_of_other_kinds(tmp_path, capsys):
    _, y = datasets.synthetic(200, 0, "train")
    label = torch.where(torch.arange(200) % 3 == 0, (y + 1) % 10, y)
    ledgers = []
    names = label_files(tmp_path, y.numpy(), label.numpy())
    for name in names:
        args = options.parse([*TINY, "--noise-type", "file", "--noise-file", str(tmp_path / name)])
        source = sources.load(args)
        labels, ledger, _ = relabel(args, source, torch.arange(200))
        assert torch.equal(labels, label), name
        ledgers.append(ledger)
    assert len(names) == 7 and all(ledger == ledgers[0] for ledger in ledgers) and ledgers[0]["nominal"] == 67 / 200
    held_out = relabel_held_out(args, source, (torch.arange(150), torch.arange(150, 200)), label[:150])
    assert torch.equal(held_out, label[150:])
    refused(capsys, ["inspect", str(tmp_path / "a.npy")], "a.npy", "holds no true labels")
    assert noise.main(["compare", str(tmp_path / "d.json"), str(tmp_path / "g.csv")]) == 0
    capsys.readouterr()
    np.save(tmp_path / "a.npy", label[:199])
    argv = [*TINY, "--noise-type", "file", "--noise-file"]
    refuse(capsys, tmp_path / "runs", [*argv, str(tmp_path / "a.npy")], "199 examples", "another data set")
    refuse(capsys, tmp_path / "runs", [*argv, str(tmp_path / "a.npy"), "--noise-labels", "x"], "one set of labels only")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("n.csv", "", "not integer"),
        ("n.csv", "1,2\n3,4\n", "names none of the columns index, true and label"),
        ("n.csv", "label\ncat\n", "could not convert string 'cat'"),
        ("n.csv", "index,true\n0,1\n", "lacks the array label"),
        ("n.json", "[1, 2", "not a readable .json of labels"),
        ("n.json", "7", "not a readable .json of labels"),
        ("n.json", "[[1], [2, 3]]", "label is not an array of integers"),
        ("n.json", '{"labels": [1]}', "lacks the array label"),
        ("n.json", "[1.5]", "not integer"),
        ("n.json", '{"label": [1], "dynamic_rate": 0.5}', "not a share and a seed"),
        ("n.pkl", "x", "not a readable .npz, .npy, .json or .csv of labels (it is no plain array"),
    ],
)
def test_labels_that_are_none(name, content, says, capsys, tmp_path):
    (tmp_path / name).write_text(content)
    argv = [*TINY, "--noise-type", "file", "--noise-file", str(tmp_path / name)]
    refuse(capsys, tmp_path / "runs", argv, f"--noise-file {tmp_path / name}", says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": None}, ("lacks the array label",)),
        ({"label": np.zeros(200)}, ("label", "integer")),
        ({"label": np.zeros(7, int)}, ("true", "(200,)", "integer (7,)")),
        ({"label": np.full(200, 10)}, ("label 10", "classes 0..9")),
        ({"label": np.full(200, -1)}, ("label", "-1")),
        ({"index": np.zeros(200, int)}, ("index", "twice")),
        ({"index": np.arange(200) + 1}, ("201 examples", "another data set")),
        ({"index": np.arange(100), "true": slice(100), "label": slice(100)}, ("no label for", "--split-seed")),
        ({"true": np.zeros(200, int)}, ("true labels", "another order")),
        ({"dynamic_rate": np.float64(7), "dynamic_seed": np.int64(0)}, ("dynamic_rate",)),
        ({"dynamic_rate": np.float64(0.5)}, ("dynamic_rate",)),
        ({"dynamic_rate": np.float64(0.5), "dynamic_seed": np.inf}, ("not a share and a seed",)),
        ({"dynamic_rate": np.float64(0.5), "dynamic_seed": np.uint64(2**63)}, ("not a share and a seed",)),
        ({"dynamic_rate": np.complex128(0.5), "dynamic_seed": np.int64(0)}, ("not a share and a seed",)),
        ({"dynamic_rate": np.float64(0.5), "dynamic_seed": np.int64(0)}, ("same split",)),
        ({"true": np.array([{}] * 200, dtype=object)}, ("not a readable .npz",)),
    ],
)
def test_bad_noise_files(change, says, capsys, tmp_path):
    _, y = datasets.synthetic(200, 0, "train")
    good = {"index": np.arange(200), "true": y.numpy(), "label": y.numpy()}
    change = {k: good[k][v] if isinstance(v, slice) else v for k, v in change.items()}
    np.savez(tmp_path / "n.npz", **{k: v for k, v in (good | change).items() if v is not None})
    argv = [*TINY, "--noise-type", "file", "--noise-file", str(tmp_path / "n.npz")]
    refuse(capsys, tmp_path / "runs", argv, "--noise-file", "n.npz", *says)


def test_a_file_that_is_no_archive(capsys, tmp_path):
    for name in ("n.npz", "n.pt"):
        for blob in (b"", b"no zip at all", pickle.dumps([1, 2])):
            (tmp_path / name).write_bytes(blob)
            argv = [*TINY, "--noise-type", "file", "--noise-file", str(tmp_path / name)]
            refuse(capsys, tmp_path / "runs", argv + ["--noise-labels", "a"] * (name == "n.pt"), name)


class Bomb:
    """What a hostile pickle does: it names a function to be called on loading."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_execute_something(zipped, capsys, tmp_path):
    touched, path = tmp_path / "touched", tmp_path / "n.pt"
    bomb = {"clean_label": np.zeros(200, int), "worse_label": Bomb(touched)}
    torch.save(bomb, path, _use_new_zipfile_serialization=zipped)
    argv = [*TINY, "--noise-type", "human", "--noise-file", str(path), "--noise-labels", "worse_label"]
    refuse(capsys, tmp_path / "runs", argv, "n.pt", "refused", "to be called")
    path.write_bytes(pickle.dumps(bomb))
    refuse(capsys, tmp_path / "runs", argv, "n.pt", "refused")
    np.savez(
        tmp_path / "n.npz", index=np.arange(3), true=np.arange(3), label=np.array([Bomb(touched)] * 3, dtype=object)
    )
    argv = [*TINY, "--noise-type", "file", "--noise-file", str(tmp_path / "n.npz")]
    refuse(capsys, tmp_path / "runs", argv, "n.npz", "not a readable")
    assert not touched.exists()
    pickle.loads(pickle.dumps(bomb))  # it would have gone off
    assert touched.exists()


def test_pt_files_of_the_wrong_kind(capsys, tmp_path):
    argv = [*TINY, "--noise-type", "human", "--noise-file", str(tmp_path / "n.pt"), "--noise-labels", "worse_label"]
    y, t = np.zeros(200, int), torch.zeros(200, dtype=torch.int64)
    for content, says in (
        ([y, y], "not a dictionary"),
        ({"worse_label": y}, "clean_label"),
        ({"clean_label": y, "other": y}, "one of other"),
        ({"clean_label": y, "worse_label": y[:5]}, "integer (200,)"),
        ({"clean_label": y, "worse_label": [0] * 200, "more": {}}, "true labels"),  # a list will do as labels
        ({"clean_label": y, "worse_label": np.array([{}], dtype=object)}, "refused"),
        ({"clean_label": y, "worse_label": "words"}, "worse_label"),
        ({"clean_label": y}, "no labels to train on"),
        ({"clean_label": y, "noisy_coarse_label": y}, "no labels to train on"),
        ({"clean_label": [[1, 2], [3]], "worse_label": y}, "clean_label is not an array of integers"),
        ({"clean_label": y, "worse_label": t.bfloat16()}, "worse_label is not an array of integers"),
        ({"clean_label": y, "worse_label": t.double().requires_grad_()}, "worse_label is not an array of integers"),
        ({"clean_label": y, "worse_label": t.to_sparse()}, "worse_label is not an array of integers"),
        ({"clean_label": y, "worse_label": t.to("meta")}, "worse_label is not an array of integers"),
    ):
        torch.save(content, tmp_path / "n.pt")
        refuse(capsys, tmp_path / "runs", argv, "n.pt", says)


def test_superclasses_are_no_noise(tmp_path, capsys):
    """CIFAR-100N's file also holds coarse labels, of another set of classes."""
    y = np.arange(50)
    content = {"clean_label": y, "noisy_label": y[::-1].copy(), "noisy_coarse_label": y // 5}
    torch.save(content, tmp_path / "n.pt")
    assert noise.main(["inspect", str(tmp_path / "n.pt")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["noisy_label  1.0000"]
    refused(capsys, ["inspect", f"{tmp_path}/n.pt:noisy_coarse_label"], "no labels 'noisy_coarse_label'")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, capsys, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    torch.save({}, tmp_path / "n.pt")
    monkeypatch.setattr(torch, "load", forbidden)  # root may read everything
    refused(capsys, ["inspect", str(tmp_path / "n.pt")], "n.pt: cannot be read (Permission denied)")


def test_asymmetric_needs_a_map(capsys, tmp_path):
    x, y = np.zeros((100, 28, 28), np.uint8), np.arange(100) % 3
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    argv = ["--dataset", str(tmp_path / "own.npz"), "--bs", "16", "--noise-type", "asymmetric", "--noise", "0.3"]
    refuse(capsys, tmp_path / "runs", argv, "--noise-type asymmetric", "own.npz", "matrix")


def test_a_generator_is_refused_where_labels_are_given(capsys, tmp_path):
    x, y = np.zeros((100, 28, 28), np.uint8), np.arange(100) % 3
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y, y_train_noisy=y)
    argv = ["--dataset", str(tmp_path / "own.npz"), "--bs", "16", "--noise-type", "pair"]
    refuse(capsys, tmp_path / "runs", argv, "--noise-type pair", "y_train_noisy")


def test_run_names_tell_the_files_apart():
    def name(*argv):
        return options.parse([*argv]).name

    one, cifar = options.path_hash("runs/one/noise.npz"), options.path_hash("c/CIFAR-10_human.pt")
    assert name("--noise-type", "file", "--noise-file", "runs/one/noise.npz") == f"noise-type-file_noise-file-one-{one}"
    human = name("--noise-type", "human", "--noise-file", "c/CIFAR-10_human.pt", "--noise-labels", "worse_label")
    assert human == f"noise-type-human_noise-file-CIFAR-10_human-{cifar}_noise-labels-worse_label"
