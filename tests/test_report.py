"""Reading runs back, the report's smoothing, figures and tables from planted event files, and the export."""

import csv
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

import report
from conftest import SHARED, series
from engine import options
from study import drawing, exports, figures, manyruns, results, runfolders, settings
from study.analysis import runs as analysis
from study.analysis.rules import VERDICTS
from study.page import Page

EVERY = ("steps", "epochs")


def plant(
    folder: Path, argv: str, actual: dict, status: str = "finished", reason: str | None = None, fake: float = 0
) -> Path:
    """A run's folder with the given series {tag: [(step, value)]}, as train.py would have left it."""
    args = options.parse(argv.split())
    path = folder / (args.name + (f"_fake{fake:g}" if fake else ""))
    path.mkdir(parents=True)
    writer = SummaryWriter(str(path))
    for tag, points in actual.items():
        for step, value in points:
            writer.add_scalar(tag, value, step)
    writer.close()
    opts = vars(args) | {"noise": args.noise or 0.0} | ({"fake_mask": fake} if fake else {})
    n = math.ceil(1600 / args.bs)
    resolved = {
        "steps_per_epoch": n,
        "train_examples": 1600,
        "sched_steps": options.sched_steps(args, n),
        "device": "test",
    }
    (path / "config.json").write_text(json.dumps({"options": opts, "resolved": resolved, "versions": {"torch": "0"}}))
    (path / "summary.json").write_text(
        json.dumps({"status": status, "reason": reason, "steps": n * args.epochs, "val_acc": 0.5})
    )
    return path


def sweep_of(
    folder: Path, seeds: int, sizes=(16, 64, 256), scheds=("onecycle",), budgets=EVERY, noises=(0.0, 0.5), effect=0.05
) -> None:
    """A planted sweep: larger batches memorize more by `effect` a doubling, under the step budget only."""
    rng = np.random.default_rng(0)
    for seed in range(seeds):
        for sched in scheds:
            for budget in budgets if sched != "constant" else ("steps",):
                for noise in noises:
                    for B in sizes:
                        length = {"steps": "", "epochs": "--sched-epochs 4", "examples": "--sched-examples 6400"}[
                            budget
                        ]
                        argv = f"--dataset synthetic --noise {noise} --bs {B} --sched {sched} {length} --epochs 4 --seed {seed} --noise-seed {seed}"
                        n = math.ceil(1600 / B)
                        steps = range(0, 4 * n, max(n // 20, 1))
                        scatter = lambda k=0.004: float(rng.normal(0, k))  # noqa: E731
                        x = math.log2(B) - 6
                        actual = {
                            "val/acc": [
                                (e * n, 0.1 + 0.2 * e - 0.3 * noise - 0.01 * (x - 1 + 2 * noise) ** 2 + scatter())
                                for e in range(5)
                            ]
                        }
                        actual["test/acc"] = [(4 * n, 0.6)]
                        actual["optim/lr"] = [(s, 0.1 * math.sin(math.pi * s / 4 / n)) for s in steps]
                        actual["optim/momentum"] = [(s, 0.9) for s in steps]
                        if noise:
                            grow = effect * (budget == "steps")
                            actual["grad/cos_clean_all"] = [(s, 0.8 + scatter(0.05)) for s in steps]
                            actual["grad/cos_clean_noisy"] = [(s, 0.2 + scatter(0.05)) for s in steps]
                            actual["null/cos_clean_all"] = [(s, 0.9 + 0.01 * x) for s in steps]
                            actual["null/cos_clean_noisy"] = [(s, 0.6 + 0.05 * x) for s in steps]
                            actual["corrected/cos_clean_noisy"] = [(s, 0.3) for s in steps][3::4]
                            actual["grad/difference"] = [(s, B * (0.02 + scatter(4e-4))) for s in steps][::4]
                            actual["grad/difference_norm"] = [(s, -0.1 + scatter(0.02)) for s in steps][::4]
                            actual["isotropy/dimension"] = [(s, 50 + scatter(2)) for s in steps][::4]
                            actual["isotropy/clean_dimension"] = [(s, 500 + scatter(20)) for s in steps][::4]
                            actual["isotropy/participation"] = [(s, 3.0 + scatter()) for s in steps][::4]
                            actual["isotropy/isotropic"] = [(s, 7.0) for s in steps][::4]
                            actual["train/acc_noisy"] = [(s, 0.1 + scatter(0.05)) for s in steps]
                            memorized = 0.2 + grow * x + scatter()
                            actual["probe/memorized"] = [(e * n, memorized * e / 4) for e in range(5)]
                            actual["probe/memorized_excess"] = [(e * n, memorized * e / 4 - 0.05) for e in range(5)]
                            actual["probe/recovered"] = [(e * n, 0.1 + 0.1 * e) for e in range(5)]
                            actual["probe/other"] = [(e * n, 1 - memorized * e / 4 - 0.1 - 0.1 * e) for e in range(5)]
                        plant(folder, argv, actual)
                        if budget == "steps" and not noise and sched == "onecycle":
                            pair = {
                                "grad/cos_clean_noisy": [(s, 0.6 + scatter()) for s in steps],
                                "null/cos_clean_noisy": [(s, 0.6) for s in steps],
                            }
                            pair["grad/difference"] = [(s, scatter(0.02)) for s in steps][::4]
                            pair["corrected/cos_clean_noisy"] = [(s, 1.0 + scatter(0.02)) for s in steps]
                            plant(folder, argv, pair, fake=0.5)


# ---------------------------------------------------------------------------------------------------------- reading


def test_events_are_read_as_tensorboard_reads_them(go):
    folder = go("--noise", "0.5")
    ours = runfolders.read_events(folder)
    theirs = series(folder)
    assert ours.keys() == theirs.keys()
    for tag, points in theirs.items():
        assert list(zip(ours[tag][0].tolist(), ours[tag][1].tolist(), strict=True)) == points, tag
    run = runfolders.read_folder(folder)
    assert (
        run.finished and run.cell.noise == 0.5 and run.cell.B == 32 and run.budget == "any" and run.steps_per_epoch == 5
    )


def test_a_run_that_is_being_written_reads_as_far_as_it_goes(tmp_path):
    path = plant(tmp_path, "--bs 16", {"val/acc": [(s, s / 10) for s in range(10)]}, status="running")
    (events,) = path.glob("events*")
    whole = events.read_bytes()
    for cut in (len(whole) - 5, len(whole) - 40, 10):
        events.write_bytes(whole[:cut])
        steps = runfolders.read_events(path).get("val/acc", ((), ()))[0]
        assert list(steps) == list(range(len(steps))) and len(steps) < 10


def test_new_style_scalars_and_doubled_steps(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("a", 1.0, 3, new_style=True)
    writer.add_scalar("a", 2.0, 5)
    writer.add_scalar("a", 3.0, 5)
    writer.add_scalar("b", math.nan, 5)
    writer.close()
    actual = runfolders.read_events(tmp_path)
    assert {k: [v.tolist() for v in s] for k, s in actual.items()} == {"a": [[3, 5], [1.0, 3.0]]}


@pytest.mark.parametrize("what", ["absent", "empty folder", "text", "wrong npz", "broken config"])
def test_bad_input_is_one_line_and_status_2(what, tmp_path, capsys):
    path = tmp_path / "in"
    if what == "empty folder":
        path.mkdir()
    elif what == "text":
        path = tmp_path / "in.csv"
        path.write_text("a,b\n1,2\n")
    elif what == "wrong npz":
        path = tmp_path / "in.npz"
        np.savez(path, x=np.zeros(3))
    elif what == "broken config":
        plant(path, "--bs 16", {"val/acc": [(0, 0.1)]})
        next(path.glob("*/config.json")).write_text("{")
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("report.py: error: ") and err.count("\n") == 1 and "in" in err
    assert not (tmp_path / "out").exists()


def test_it_says_where_the_report_goes(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- smoothing


def test_smoothing_by_hand():
    mean, spread = drawing.smooth(np.array([1.0, 2.0, 4.0]), 0.5)
    assert mean == pytest.approx([1.0, (2 + 0.5) / 1.5, (4 + 1 + 0.25) / 1.75])
    assert spread[0] == 0 and spread[1] == pytest.approx(math.sqrt((4 + 0.5) / 1.5 - (2.5 / 1.5) ** 2))
    assert drawing.alpha_of("val/acc") == 0.5 and drawing.alpha_of("grad/cos_clean_all") == 0.05
    assert drawing.smooth(np.arange(4.0), 1.0)[0].tolist() == [0, 1, 2, 3]


def test_smoothing_is_that_of_pandas():
    pandas = pytest.importorskip("pandas")
    values = np.random.default_rng(0).normal(size=300)
    for alpha in (0.5, 0.05):
        mean, spread = drawing.smooth(values, alpha)
        assert mean == pytest.approx(pandas.Series(values).ewm(alpha=alpha).mean().to_numpy())
        assert spread == pytest.approx(pandas.Series(values).ewm(alpha=alpha).std(bias=True).to_numpy(), abs=1e-7)


@pytest.fixture(scope="module")
def curves() -> Path:
    path = SHARED / "report" / "curves.csv"
    if not path.is_file():
        pytest.skip("no ../shared/report/curves.csv beside the repository")
    return path


def test_the_reports_curves_are_drawn_as_the_report_draws_them(curves, tmp_path):
    """Every drawn line is the exponential average of the file's values at the file's steps."""
    runs = results.load_runs([str(curves)])
    assert len(runs) == 17 + 12  # one of figure 4's is a run of figure 13
    with open(curves, newline="") as f:
        table = list(csv.DictReader(f))
    where = {
        "4": ("val/acc", 64, 0.5),
        "7": ("grad/cos_clean_all", 64, 0.05),
        "10": ("train/acc_noisy", 64, 0.05),
        "13": ("val/acc", 80, 0.5),
    }
    for number, (tag, epochs, alpha) in where.items():
        chosen = [r for r in runs if r.options["epochs"] == epochs]
        figure = figures.curves("t", chosen, tag, figures.Look(), by_lr=number == "13")
        drawn = [line for axis in figure.axes for line in axis.get_lines() if line.get_linewidth() > 1.5]
        lines: dict = {}
        for row in table:
            if row["figure"] == number and row["value"]:
                key = (float(row["noise"]), int(row["batch_size"]), float(row["lr"]))
                if number == "4" and key == (0, 128, 0.1):
                    continue
                lines.setdefault(key, []).append((int(row["step"]), float(row["value"])))
        assert len(drawn) == len(lines) == {"4": 17, "7": 12, "10": 12, "13": 12}[number]
        for line, (_, points) in zip(drawn, sorted(lines.items()), strict=True):
            x, y = zip(*points, strict=True)
            want, total = [], 0.0
            for i, value in enumerate(y):  # written out once more: the normalised weights (1 - alpha)^i
                total = total * (1 - alpha) + value
                want.append(total * alpha / (1 - (1 - alpha) ** (i + 1)))
            assert line.get_xdata().tolist() == list(x)
            assert line.get_ydata() == pytest.approx(want)


def finished(name: str = "", series: dict | None = None, status: str = "finished", **options_) -> runfolders.Run:
    """A run of the drawn set under `options_`, with one final accuracy."""
    opts = vars(options.parser().parse_args([])) | {"dataset": "synthetic", "model": "resnet18", "noise": 0.0}
    opts |= {"sched": "onecycle", "sched_steps": 100} | options_
    points = {"val/acc": 0.5} | (series or {})
    actual = {tag: (np.array([1]), np.array([value])) for tag, value in points.items()}
    return runfolders.Run(name or str(sorted(options_.items())), opts, {}, {"status": status}, actual, "")


def test_one_weight_decay_is_chosen_for_all_budgets():
    runs = [finished(wd=5e-4, bs=B) for B in (16, 64)]
    runs += [finished(wd=5e-3, bs=B, sched_steps=None, sched_epochs=3) for B in (16, 64, 256)]
    (setting,) = settings.group_settings(runs)
    assert {r.options["wd"] for r in setting.runs} == {5e-3} and len(setting.all_runs) == 5
    assert setting.notes == ["compared at weight decay 0.005; apart from that there are 0.0005 (2 runs)"]


def test_no_seed_counts_twice_and_tuning_keeps_to_one_length():
    runs = [finished(bs=16, precision=p, seed=0) for p in ("32-true", "bf16-mixed")]
    runs += [finished(bs=16, seed=1), finished(bs=64, seed=0, lr=0.2, sched_steps=200)]
    runs.append(finished("full", {"probe/memorized": 0.1}, bs=16, precision="32-true", seed=1))
    (setting,) = settings.group_settings(runs)
    assert sorted(r.seed for r in setting.runs) == ["0/0/0", "1/0/0"] and "full" in {r.name for r in setting.runs}
    assert {r.length for r in setting.all_runs} == {100}
    assert any("2 runs repeat the cell and seed of another" in note for note in setting.notes)


def test_the_drift_is_taken_from_random_masks():
    raw, closed, masks = "grad/cos_clean_noisy", "null/cos_clean_noisy", "null/permuted_cos_clean_noisy"
    assert analysis.cosine_minus_null(finished("a", {raw: 0.5, closed: 0.4})) == pytest.approx(0.1)
    both = finished("b", {raw: 0.5, closed: 0.4, masks: 0.45})
    assert analysis.cosine_minus_null(both) == pytest.approx(0.05)


def test_runs_of_one_name_and_other_options_are_both_read(tmp_path):
    a, b = finished("x", bs=16), finished("x", bs=64)
    for path, run in ((tmp_path / "a.npz", a), (tmp_path / "b.npz", b)):
        exports.export_runs([run], path)
    paths = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    assert sorted(r.cell.B for r in results.load_runs([*paths, paths[0]])) == [16, 64]


OTHERS = {
    "wd": (5e-4, 5e-3),
    "precision": ("32-true", "bf16-mixed"),
    "measure": ("split", "full"),
    "noise_seed": (0, 1),
}
OTHERS |= {"permutations": (1, 2), "end": ("epochs", "schedule"), "sched_steps": (100, 200), "loss": ("ce", "mae")}


@pytest.mark.parametrize("option", OTHERS)
def test_no_run_is_dropped_for_another_of_its_name(option, tmp_path):
    """Two runs of one name that differ in an option which decides the result."""
    for place, value in zip("ab", OTHERS[option], strict=True):
        exports.export_runs([finished("x", bs=16, **{option: value})], tmp_path / f"{place}.npz")
    remarks: list[str] = []
    runs = results.load_runs([str(tmp_path / f"{place}.npz") for place in "ab"], remarks=remarks)
    assert tuple(r.options[option] for r in runs) == OTHERS[option] and remarks == []


def test_copies_of_a_run_are_one_and_said_to_be(tmp_path, capsys):
    folder = plant(tmp_path / "a", "--bs 16 --wd 0.01", {"val/acc": [(0, 0.1)]}, status="stopped")
    (tmp_path / "b").mkdir()
    shutil.copytree(folder, tmp_path / "b" / folder.name)
    (tmp_path / "b" / folder.name / "summary.json").write_text('{"status": "finished", "steps": 9}')
    target = tmp_path / "all.csv"
    assert report.main([str(tmp_path / "b"), str(tmp_path / "a"), "--csv", str(target)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("1 runs ->") and len(err.splitlines()) == 1
    assert f"counts: {folder.name} of {tmp_path / 'b' / folder.name} and {folder}\n" in err
    (row,) = csv.DictReader(open(tmp_path / "all-runs.csv", newline=""))
    assert row["status"] == "finished"
    assert report.main([str(tmp_path / "a"), str(folder), "--csv", str(target)]) == 0 and not capsys.readouterr().err


def test_at_best_chooses_runs_and_not_names():
    """Two folders with runs of the same names: seed 0 and 1 are better at a rate of 0.2, of which the names say nothing."""
    runs = [
        finished("same", {"val/acc": acc}, bs=B, lr=lr, seed=seed)
        for B in (16, 64)
        for lr, acc in ((0.1, 0.5), (0.2, 0.7))
        for seed in (0, 1)
    ]
    (setting,), notes = manyruns.at_best(settings.group_settings(runs))
    assert notes == []
    assert [(r.cell.B, r.cell.lr) for r in setting.runs] == [(16, 0.2), (16, 0.2), (64, 0.2), (64, 0.2)]


def test_seeds_without_another_to_choose_on_are_counted():
    runs = [
        finished(bs=B, lr=lr, seed=s) for B in (16, 64) for lr in (0.1, 0.2) for s in (0, 1, 2) if B == 16 or s == 0
    ]
    (setting,), (note,) = manyruns.at_best(settings.group_settings(runs))
    assert {(r.cell.B, r.seed[0]) for r in setting.runs} == {(16, "0"), (16, "1"), (16, "2")}
    assert note.endswith("1 of 4 cells of a seed are left out, for no other seed has run there to choose by")


def test_what_else_lies_in_a_folder_is_said(tmp_path, capsys):
    runs = tmp_path / "runs"
    plant(runs, "--bs 16", {"val/acc": [(0, 0.1)]})
    for seed in range(3):
        plant(runs / "quick", f"--bs 16 --seed {seed}", {"val/acc": [(0, 0.1)]})
    plant(runs / "old" / "twice", "--bs 16", {"val/acc": [(0, 0.1)]})
    plant(runs / "tuning" / "lr-1", "--bs 16", {"val/acc": [(0, 0.1)]})  # a search's trials are no runs of the report
    (plant(runs, "--bs 32", {"val/acc": [(0, 0.1)]}) / "config.json").unlink()
    remarks: list[str] = []
    assert [r.name for r in results.load_runs([str(runs)], remarks=remarks)] == ["bs16"]
    assert remarks == [
        f"{runs}: the runs in it are read (1), and not those that lie deeper: {runs / 'old' / 'twice'} (1), {runs / 'quick'} (3)",
        f"{runs}: event files without a config.json are not read: bs32",
    ]
    assert report.main([str(runs), "--out", str(tmp_path / "out"), "--format", "png"]) == 0
    assert capsys.readouterr().err.count("report.py: warning: ") == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{runs / 'quick'} (3)" in page and "without a config.json" in page
    (runs / "bs16" / "config.json").unlink()
    shutil.rmtree(runs / "tuning")
    assert report.main([str(runs), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith(f"there are runs in {runs / 'old' / 'twice'} (1), {runs / 'quick'} (3)\n")


def test_the_reports_curves_are_drawn_where_they_are_given(tmp_path):
    """The figures that the command draws have them, and what else it was told."""
    theirs = [finished("report")]
    args = report.parser().parse_args(["x.npz", "--out", str(tmp_path), "--x", "log-epochs", "--bands", "window"])
    look = report.look_of(args, theirs)
    assert (look.x, look.log_x, look.bands, look.reference, look.tails) == ("epochs", True, "window", theirs, True)


def test_a_run_that_ended_with_its_schedule_is_compared_up_to_its_last_step():
    """The report's runs went on: the mean of their last tenth would be of other steps."""
    theirs = finished("report")
    theirs.series["grad/cos_clean_all"] = (np.arange(0, 1000, 10), np.linspace(0.0, 0.99, 100))
    assert manyruns.final_value(theirs, "grad/cos_clean_all") == pytest.approx(0.945)
    assert manyruns.final_value(theirs, "grad/cos_clean_all", until=490) == pytest.approx(0.47)  # of 0.45 to 0.49


def test_no_folder_of_anybodys_machine_is_exported(tmp_path):
    run = finished("x", bs=64)
    run.options |= {"data_dir": "/home/me/data", "runs": "/home/me/runs"}
    exports.export_runs([run], tmp_path / "a.npz")
    (read,) = results.load_runs([str(tmp_path / "a.npz")])
    assert (read.options["data_dir"], read.options["runs"]) == ("data", "runs") and read.cell == run.cell


@pytest.mark.slow
def test_the_reports_curves_beside_themselves(curves, tmp_path, capsys):
    """Read as runs and as reference at once: every difference is 0, and no verdict comes from one seed."""
    out = tmp_path / "out"
    assert report.main([str(curves), "--out", str(out), "--format", "png", "--reference", str(curves)]) == 0
    page_text = (out / "report.md").read_text()
    rows = re.findall(r"^\| (?:validation accuracy|cosine|training accuracy).*$", page_text, re.M)
    assert len(rows) == 17 + 12 + 12 + 12 and all("| +0.0000 | one seed |" in row for row in rows)
    assert {"figure-04.png", "figure-07.png", "figure-10.png", "figure-13.png"} <= {p.name for p in out.iterdir()}
    verdicts = capsys.readouterr().out
    assert "not resolved" in verdicts and not any(f"{word} " in verdicts for word in VERDICTS if word != "not resolved")
    assert "findings these runs cannot judge" in page_text and "these runs cannot judge: 1b, 1c" in verdicts
    assert "0.6958" in page_text  # figure 4, batch 16, no noise: the last value


# ------------------------------------------------------------------------------------------------ figures and verdicts


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    sweep_of(folder, 3)
    plant(
        folder,
        "--dataset synthetic --bs 128 --sched onecycle --epochs 4",
        {"val/acc": [(0, 0.1)]},
        "failed",
        "train/loss is nan at step 3",
    )
    return folder


@pytest.fixture(scope="module")
def made(planted, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert report.main([str(planted), "--out", str(out), "--x", "epochs", "--format", "png"]) == 0
    return out


def test_a_report_from_planted_runs(made):
    page_text = (made / "report.md").read_text()
    rows = dict(re.findall(r"^\| (\w+)\. [^|]*\| \*\*([a-z ]+)\*\*", page_text, re.M))
    assert rows["1b"] == "supported" and rows["1c"] == "negligible" and rows["5"] == "reversed"
    assert rows["2"] == "depends on the budget"  # planted under the step budget only
    assert (
        "Verdict: **depends on the budget**, for it is yes under the report's steps and negligible under matched epochs."
        in page_text
    )
    assert "| 2. Larger batches memorize more, at lr 0.1 | **depends on the budget** | yes: +0.05" in page_text
    assert {"3", "3x"} <= rows.keys() and not {"4", "4c", "5c"} & rows.keys()
    assert "left out, for fewer than half of the seeds have it: onecycle, noise 0, B 128, lr 0.1" in page_text
    assert "train/loss is nan at step 3" in page_text
    assert (
        page_text.count("| A/A 0.5 |") >= 3
        and "| onecycle, the report's steps | 0.5 | 16 | 0.1 | +0.0200 [+0.01" in page_text
    )


def test_a_page_begins_with_the_cells(made):
    """Cells, then figures, then findings; what no run speaks of is one line, closed until it is opened."""
    text, page = (made / "report.md").read_text(), (made / "report.html").read_text()
    places = [
        text.index(part)
        for part in ("| schedule | noise (nominal) | B |", "## Figures", "![", "## Findings", "**1b**. ")
    ]
    assert places == sorted(places) and text.index("# Label noise") == 0
    row = re.search(r"^\| onecycle, 5000 steps \| 0.5 \| 64 \| 0.1, 0.9 \| 3 \| (\S+) ± \d", text, re.M)
    assert float(row[1]) == pytest.approx(0.1 + 0.8 - 0.15, abs=0.02)  # planted: B = 64 is the best at this noise
    folds = re.findall(r"<details><summary>([^<]*)</summary>", page)
    assert folds == re.findall(r"<details><summary>([^<]*)</summary>", text) and page.count("</details>") == len(folds)
    (fold,) = [f for f in folds if "cannot judge" in f]
    assert fold == "3 findings these runs cannot judge: 4, 4c, 5c"
    inside = text[text.index(fold) :]
    assert "| 5c. " in inside[: inside.index("</details>")] and "**5c**" not in text


def test_long_lists_of_runs_are_folded():
    runs = [finished(f"r{i}", status="stopped", bs=16, seed=i) for i in range(12)]
    page = Page(Path())
    manyruns.write_unfinished(page, runs)
    assert "<summary>12 runs are not finished</summary>" in page.html[0] and page.markdown[-1] == "</details>"
    page = Page(Path())
    manyruns.write_unfinished(page, runs[:2])
    assert not any("details" in part for part in page.html) and "r1" in page.html[0]


def test_figures_are_whole_and_the_page_stands_alone(made):
    stems = {p.stem for p in made.glob("*.png")}
    assert {"figure-03", "figure-04", "figure-04-epochs", "figure-07", "figure-10", "probes-onecycle-steps"} <= stems
    assert {"null-cos_clean_all-onecycle-steps", "null-cos_clean_noisy-onecycle-epochs", "ratio", "best-batch"} <= stems
    page, text = (made / "report.html").read_text(), (made / "report.md").read_text()
    assert page.count("data:image/png;base64,") == len(stems) == len(re.findall(r"^!\[", text, re.M))
    assert not re.search(r'src="(?!data:)|href=', page)
    for stem in stems:
        assert (made / f"{stem}.png").read_bytes()[:4] == b"\x89PNG" and f"]({stem}.png)" in text


def test_what_is_not_there_is_said(tmp_path, capsys):
    """Runs with validation accuracy alone: figures of the rest are named as absent, findings as not resolved."""
    for B in (16, 64):
        plant(tmp_path / "runs", f"--noise 0.5 --bs {B} --sched cosine --epochs 2", {"val/acc": [(0, 0.1), (10, 0.4)]})
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "png"]) == 0
    page_text = (tmp_path / "out" / "report.md").read_text()
    for tag in (
        "grad/cos_clean_all",
        "train/acc_noisy",
        "null/cos_clean_all",
        "probe/memorized",
        "corrected/cos_clean_noisy",
    ):
        assert re.search(rf"^- .*no run.* has {tag}", page_text, re.M), tag
    for tag in ("probe/memorized_excess", "grad/difference", "isotropy/dimension"):
        assert f"no run with noise has {tag}" in page_text
    assert set(re.findall(r"\*\*([a-z ]+)\*\*", page_text)) & (set(VERDICTS) - {"not resolved"}) == set()


def test_a_single_run_gives_one_page(planted, tmp_path):
    folder = Path(shutil.copytree(sorted(p for p in planted.iterdir() if "noise0.5" in p.name)[0], tmp_path / "bs16"))
    assert report.main([str(folder), "--format", "svg,pdf"]) == 0  # in the run's own folder, where none is given
    page_text = (folder / "report" / "report.md").read_text()
    assert {p.name for p in (folder / "report").iterdir()} == {"report.md", "report.html", "run.svg", "run.pdf"}
    ET.parse(folder / "report" / "run.svg")
    assert "data:image/svg+xml;base64," in (folder / "report" / "report.html").read_text()
    assert [r.name for r in results.load_runs([str(tmp_path)])] == ["bs16"]  # the report is no run
    assert (
        page_text.startswith(f"# {folder.name}")
        and "| finished |" in page_text
        and page_text.index("run.svg") < page_text.index("| finished |")
    )
    number = float(re.search(r"minus its null[^|]*\| (\S+) \|", page_text)[1])
    assert "bs16" in folder.name and number == pytest.approx(0.2 - 0.5, abs=0.03)  # planted: 0.2 beside a null of 0.5


def test_lines_are_means_and_bands_deviations_over_seeds(tmp_path):
    for seed, v in enumerate((0.2, 0.4)):
        plant(tmp_path, f"--bs 16 --seed {seed}", {"val/acc": [(s, v + s / 1000) for s in (0, 100, 200)]})
    plant(tmp_path, "--bs 16 --seed 2", {"val/acc": [(0, 0.6), (100, 0.7)]}, status="running")
    figure = figures.curves("t", results.load_runs([str(tmp_path)]), "val/acc", figures.Look())
    (axis,) = figure.axes
    (line,) = [x for x in axis.get_lines() if x.get_linewidth() > 1.5]
    assert line.get_xdata().tolist() == [0, 100]  # as far as every seed has got
    assert line.get_ydata()[0] == pytest.approx(0.4)
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.4 - np.std([0.2, 0.4, 0.6], ddof=1))
    assert "3 runs, 3 seeds; 1 not finished" in figure._supxlabel.get_text()


def test_a_cosine_and_its_null_are_means_over_the_same_steps(tmp_path):
    """Full measurements are rarer than split ones, and a cosine changes as the run goes on: A/A runs must meet."""
    raw = [(s, 0.9 - 0.08 * s) for s in range(10)]
    null = [(s, v + 0.05) for s, v in raw if s < 4]
    actual = {"grad/cos_clean_noisy": raw, "null/cos_clean_noisy": null}
    for B in (16, 64):
        plant(tmp_path, f"--dataset synthetic --noise 0.5 --bs {B} --sched onecycle --epochs 4", actual)
    plant(tmp_path, "--dataset synthetic --bs 64 --sched onecycle --epochs 4", actual, fake=0.5)
    figure = figures.nulls(
        "t", [runfolders.read_folder(path) for path in sorted(tmp_path.iterdir())], "cos_clean_noisy"
    )
    assert len(figure.axes) == 2
    for axis, sizes in zip(figure.axes, ([16, 64], [64]), strict=True):
        drawn = {box.get_label(): box.lines[0].get_data() for box in axis.containers}
        for name, want in (("raw", np.mean([v for s, v in raw if s < 4])), ("null", np.mean([v for _, v in null]))):
            x, y = drawn[name]
            assert list(x) == sizes and list(y) == pytest.approx([want] * len(sizes), abs=1e-6)
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["16", "64"]


def test_x_in_steps_epochs_and_examples(tmp_path):
    plant(tmp_path, "--bs 32", {"val/acc": [(0, 0.1), (50, 0.2), (100, 0.3)]})  # 50 steps an epoch
    (run,) = results.load_runs([str(tmp_path)])
    steps = run.series["val/acc"][0]
    assert [drawing.x_values(run, steps, x).tolist() for x in figures.X_LABEL] == [
        [0, 50, 100],
        [0, 1, 2],
        [0, 1600, 3200],
    ]


def test_a_cell_with_a_single_rate_is_not_at_its_best(tmp_path):
    """Equal lr/B beside one fixed rate: the middle batch size has one rate, the others two. Constant rates have three and two."""
    tried = {
        "onecycle": {16: (0.025, 0.1), 64: (0.1,), 256: (0.1, 0.4)},
        "constant": {16: (0.1, 0.2, 0.3), 64: (0.1, 0.2)},
    }
    for sched, sizes in tried.items():
        for B, rates in sizes.items():
            for lr in rates:
                for seed in range(2):
                    argv = f"--bs {B} --lr {lr} --noise 0.5 --sched {sched} --sched-steps 10 --epochs 2 --seed {seed}"
                    plant(tmp_path, argv, {"val/acc": [(0, 0.1), (10, 0.5)]})
            plant(tmp_path, f"--bs {B} --lr 0.7 --fake-mask 0.5 --sched {sched} --sched-steps 10 --epochs 2", {})
    (setting,), notes = manyruns.at_best(settings.group_settings(results.load_runs([str(tmp_path)])))
    assert {r.cell.sched for r in setting.all_runs} == {"constant"}
    assert (
        "onecycle: not compared at each cell's best" in notes[0]
        and "1 of 3 cells have a single one (batch size 64)" in notes[0]
    )
    assert "constant: more learning rates" in notes[1] and "2 at batch size 64; 3 at batch size 16" in notes[1]


@pytest.mark.slow
def test_findings_and_figures_at_each_cells_best_rate(tmp_path):
    """Rate 0.2 is better at batch 64 and worse at 16; each cell is drawn and judged at its own best."""
    for seed in range(3):
        for B, lr, acc in ((16, 0.1, 0.6), (16, 0.2, 0.5), (64, 0.1, 0.5), (64, 0.2, 0.7)):
            for noise in (0, 0.5):
                argv = (
                    f"--bs {B} --lr {lr} --noise {noise} --sched constant --epochs 2 --seed {seed} --noise-seed {seed}"
                )
                plant(tmp_path / "runs", argv, {"val/acc": [(0, 0.1), (10, acc - noise / 5 + seed / 1000)]})
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "png"]) == 0
    page_text = (tmp_path / "out" / "report.md").read_text()
    assert (
        "## Findings at each cell's best learning rate" in page_text
        and (tmp_path / "out" / "figure-06-tuned.png").exists()
    )
    (setting,), notes = manyruns.at_best(settings.group_settings(results.load_runs([str(tmp_path / "runs")])))
    assert not notes
    assert {(r.cell.B, r.cell.lr) for r in setting.runs} == {(16, 0.1), (64, 0.2)}


def scaled_runs(folder: Path, rates: dict[int, float]) -> Path:
    """Runs at a constant rate, one rate for each batch size: the accuracy that noise costs falls by 0.03 per doubling."""
    for seed in range(3):
        for B, lr in rates.items():
            for noise in (0, 0.5):
                argv = f"--bs {B} --lr {lr} --noise {noise} --sched constant --epochs 2 --seed {seed} --noise-seed {seed} --split-seed {seed}"
                acc = 0.8 + seed / 1000 - (0.4 - 0.03 * math.log2(B) + 0.001 * (seed - 1) * (B > 16)) * (noise > 0)
                plant(folder, argv, {"val/acc": [(0, 0.1), (10, acc)]})
    return folder


def test_findings_at_equal_ratio(tmp_path):
    """A grid `bs+lr=` has one rate for each batch size: nothing to judge at a fixed rate, everything at equal lr/B."""
    folder = scaled_runs(tmp_path / "runs", {16: 0.025, 64: 0.1, 256: 0.4})
    assert report.main([str(folder), "--out", str(tmp_path / "out"), "--format", "png"]) == 0
    page_text = (tmp_path / "out" / "report.md").read_text()
    assert "Findings at each cell's best" not in page_text  # no cell has two rates to choose from
    fixed, scaled = page_text.split("## Findings at equal lr/B")
    row = re.search(r"^\| 5c\. Larger batches mitigate noise, constant rate, at lr/B 0.00156 \| .*$", scaled, re.M)[0]
    assert "**supported** (one budget)" in row and "-0.03" in row
    assert "| 5c. Larger batches mitigate noise, constant rate, at lr" not in fixed
    (setting,) = settings.group_settings(results.load_runs([str(folder)]))
    assert {r.cell.B for r in setting.scaled} == {16, 64, 256} and len(setting.scaled) == 18
    (setting,) = settings.group_settings([finished(bs=B, seed=s) for B in (16, 64) for s in (0, 1)])
    assert setting.scaled == []  # one rate: no two sizes of one ratio


@pytest.mark.slow
def test_the_verdicts_name_what_earlier_runs_lack(tmp_path, capsys):
    """Runs of before `grad/difference` and `probe/memorized_excess`: what they have is judged, the rest is named."""
    sweep_of(tmp_path / "runs", 3)
    actual = results.load_runs([str(tmp_path / "runs")])
    new = ("grad/difference", "grad/difference_norm", "isotropy/clean_dimension", "probe/memorized_excess")
    for run in actual:
        run.series = {tag: s for tag, s in run.series.items() if tag not in new}
    exports.export_runs(actual, tmp_path / "old.npz")
    assert report.main([str(tmp_path / "old.npz"), "--out", str(tmp_path / "out"), "--format", "png"]) == 0
    page_text, printed = (tmp_path / "out" / "report.md").read_text(), capsys.readouterr().out
    assert re.search(r"^5 +reversed", printed, re.M) and "cannot judge: 1b, 1c, 2, 4, 4c, 5c" in printed
    for id, tag in (("1c", "grad/difference"), ("1b", "isotropy/dimension"), ("2", "probe/memorized_excess")):
        row = re.search(rf"^\| {id}\. [^|]*\| (.*)$", page_text, re.M)
        assert f"no run with noise has {tag}" in row[1], id


# ------------------------------------------------------------------------------------------------------------ export


def test_exported_runs_read_like_runs(planted, tmp_path, capsys):
    file = tmp_path / "all.npz"
    assert report.main([str(planted), "--export", str(file)]) == 0
    a, b = ({r.name: r for r in results.load_runs([str(p)])} for p in (planted, file))
    assert a.keys() == b.keys()
    for name, run in a.items():
        other = b[name]
        assert (run.options, run.summary, run.resolved) == (other.options, other.summary, other.resolved)
        assert run.series.keys() == other.series.keys()
        for tag, (steps, values) in run.series.items():
            assert other.series[tag][0].tolist() == steps.tolist()
            if tag.startswith(("val/", "probe/")):
                assert other.series[tag][1].tolist() == values.tolist()  # event files hold float32
            assert other.series[tag][1] == pytest.approx(values, rel=2.0**-12)
    with np.load(file, allow_pickle=False) as z:
        assert all(z[k].dtype != object for k in z.files)
    points = sum(len(s) for run in a.values() for s, _ in run.series.values())
    assert file.stat().st_size < 4 * points


def test_files_merge_and_a_finished_run_wins(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    plant(one, "--bs 16", {"val/acc": [(0, 0.1)]}, status="stopped")
    plant(one, "--bs 32", {"val/acc": [(0, 0.2)]})
    plant(two, "--bs 16", {"val/acc": [(0, 0.1), (10, 0.4)]})
    exports.export_runs(results.load_runs([str(one)]), tmp_path / "one.npz")
    merged = {r.name: r for r in results.load_runs([str(two), str(tmp_path / "one.npz")])}
    assert (
        sorted(merged) == ["bs16", "bs32"] and merged["bs16"].finished and len(merged["bs16"].series["val/acc"][0]) == 2
    )


def test_rounding_keeps_what_it_says():
    values = np.array([0.1, 1 / 3, -7.7e-5, 123.4, 0.5, 0.0, 1.0])
    assert exports.rounded(values) == pytest.approx(values, rel=2.0**-13)
    assert exports.rounded(np.array([0.5, 0.0, 1.0, 0.75])).tolist() == [0.5, 0.0, 1.0, 0.75]
