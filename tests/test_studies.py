"""The published studies: the tables of docs/studies/NAME.md are what the report makes of docs/studies/NAME.npz."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import report
from benchmarks import compare
from conftest import ROOT, SHARED
from study import gallery

STUDIES = sorted((ROOT / "docs/studies").glob("*.npz"))
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?")
MARK = "<!-- from the report: "


def tables(page: str) -> list[tuple[str, list[str]]]:
    """[(section of the report, rows)] of a study's marked tables."""
    found = []
    for part in page.split(MARK)[1:]:
        section, _, text = part.partition(" -->\n")
        lines = text.split("\n\n")[0].splitlines()
        found.append((section, lines[2:]))
    return found


def numbers(row: str) -> list[tuple[float, int]]:
    """(value, decimals) of the numbers of a row."""
    return [(float(text), len(text.partition(".")[2])) for text in NUMBER.findall(row)]


def comes_from(row: str, theirs: str) -> bool:
    """Whether the numbers of a row are, rounded and in this order, among those of a row of the report."""
    rest = iter(numbers(theirs))
    return all(
        any(abs(value - whole) <= 0.5 * 10**-places + 0.51 * 10**-exact for whole, exact in rest)
        for value, places in numbers(row)
    )


def words(row: str) -> set[str]:
    """The names in a row that are the report's own: verdicts and rules."""
    rules = "not resolved|supported|negligible|reversed|depends on the budget|last epoch|Label Wave"
    return set(re.findall(f"{rules}|noisy validation accuracy|gradient disparity|susceptibility", row))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_a_study_is_what_its_file_says(path: Path, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(gallery, "save_styled", lambda make, *_, **__: drawn.append(make))
    page = path.with_suffix(".md").read_text()
    argv = [str(path), "--out", str(tmp_path / "made"), "--x", "epochs"]
    if "--reference" in page:
        curves = SHARED / "report" / "curves.csv"
        if not curves.is_file():
            pytest.skip("no ../shared/report beside the repository: the report's own curves are not here")
        argv += ["--reference", str(curves)]
    assert report.main(argv) == 0 and drawn
    made = (tmp_path / "made" / "report.md").read_text()
    assert tables(page)
    for section, rows in tables(page):
        theirs = made[made.index(f"\n## {section}\n") :].split("\n## ")[1].splitlines()
        theirs = [line for line in theirs if line.startswith("|")]
        for row in rows:
            fit = [line for line in theirs if comes_from(row, line) and words(row) <= words(line)]
            assert fit, f"{section}: {row}"
    assert f"docs/studies/{path.name}" in page  # the command that makes them


Table = list[tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]]  # (options, steps and values of each series)


def read_file(name: str) -> Table:
    """The runs of docs/studies/NAME.npz, without the reader of the report."""
    z = dict(np.load(ROOT / f"docs/studies/{name}.npz"))
    runs = []
    for run in json.loads(z["runs"].tobytes())["runs"]:
        steps = {tag: z[f"steps_{grid}"].cumsum() for tag, grid, _, _ in run["series"]}
        values = {tag: z["values"][first : first + n].astype(float) for tag, _, first, n in run["series"]}
        runs.append((run["options"], steps, values))
    return runs


def ends(name: str, tag: str, **options) -> dict[tuple, float]:
    """{(seed, noise, B, rate, sched_steps or None): last value of a series} of a study's file, read with numpy alone."""
    found = {}
    for o, _, values in read_file(name):
        if tag in values and o["fake_mask"] is None and all(o[name] == value for name, value in options.items()):
            steps = o["sched_steps"] if o["sched_epochs"] is None else None
            found[o["seed"], o["noise"], o["bs"], o["lr"], steps] = float(values[tag][-1])
    return found


def in_words(of_seeds: Sequence[float], places: int = 3) -> str:
    """Mean and 95 % t interval as the pages write them."""
    mean, half = np.mean(of_seeds), stats.t.ppf(0.975, len(of_seeds) - 1) * stats.sem(of_seeds)
    return f"{mean:+.{places}f} ({mean - half:+.{places}f}, {mean + half:+.{places}f})"


def test_numbers_of_the_full_study_without_the_reports_code():
    """Findings 2, 3 and 5: slopes on log2 B, and what the largest batch costs under noise."""
    page = (ROOT / "docs/studies/full.md").read_text()
    sizes, seeds = [16, 32, 64, 128, 256, 512], range(3)
    memorized, accuracy = ends("full", "probe/memorized_excess"), ends("full", "val/acc")
    curve = lambda of, seed, noise, some: np.array([of[seed, noise, B, 0.1, 5000] for B in some])  # noqa: E731
    excess = {n: [np.polyfit(range(5), curve(memorized, s, n, sizes[1:]), 1)[0] for s in seeds] for n in (0.2, 0.5)}
    lost = lambda seed, noise: curve(accuracy, seed, 0, sizes) - curve(accuracy, seed, noise, sizes)  # noqa: E731
    slope = {n: [np.polyfit(range(6), lost(s, n), 1)[0] for s in seeds] for n in (0.2, 0.5)}
    for of in (excess, slope):
        texts = [in_words(values) for values in (np.mean([*of.values()], 0), of[0.2], of[0.5])]
        assert f"| {' | '.join(texts)} |" in page
    means = {n: np.mean([curve(accuracy, s, n, sizes) for s in seeds], 0) for n in (0, 0.2, 0.5)}
    assert means[0].argmax() == 5 and means[0.2].argmax() == means[0.5].argmax() == 3
    costs = [means[n][3] - means[n][5] for n in (0.2, 0.5)]
    row = re.search(r"\| 3 too large.*", page)[0].split("|")[2:5]
    assert [float(text.split()[0]) for text in row] == [round(v, 3) for v in (np.mean(costs), *costs)]


def test_numbers_of_the_answer_without_the_reports_code():
    """README's rows 2 and 4 at equal lr/B, from the medium study's 4,500 images; docs/studies.md has the same rows."""
    rows = [row for row in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| \dc? ", row)]
    assert len(rows) == 6 and set(rows) <= set((ROOT / "docs/studies.md").read_text().splitlines())
    rates = {16: 0.025, 32: 0.05, 64: 0.1, 128: 0.2, 256: 0.4}
    memorized = ends("medium", "probe/memorized_excess", subset=4500, sched="onecycle")
    accuracy = ends("medium", "val/acc", subset=4500, sched="onecycle")
    for steps in (192, None):

        def value(of, seed, noise, B):
            return of[seed, noise, B, rates[B], steps]

        def slope(seed, noise):
            sizes = [B for B in rates if (seed, noise, B, rates[B], steps) in memorized]
            return np.polyfit(np.log2(sizes), [value(memorized, seed, noise, B) for B in sizes], 1)[0]

        def gap(seed, noise):
            return value(accuracy, seed, noise, 16) - value(accuracy, seed, noise, 256)

        levels = (0.2, 0.5)
        assert in_words([np.mean([slope(s, n) for n in levels]) for s in range(5)]) in rows[2]
        assert in_words([np.mean([gap(s, n) - gap(s, 0) for n in levels]) for s in range(5)]) in rows[4]


def test_every_study_has_its_file_and_its_line():
    pages = {p.stem for p in (ROOT / "docs/studies").glob("*.md")}
    assert pages == {p.stem for p in STUDIES}
    index = (ROOT / "docs/studies.md").read_text()
    assert all(f"studies/{name}.md" in index and f"studies/{name}.npz" in index for name in pages)
    assert sum(p.stat().st_size for p in STUDIES) < 40 * 2**20


def test_lines_of_runs_side_by_side_are_means_over_seeds(tmp_path, monkeypatch, capsys):
    """Of the runs that the options choose; human.md has the same numbers from the report."""
    monkeypatch.chdir(ROOT)
    runs = compare.chosen("docs/studies/human.npz noise_type=human")
    assert len(runs) == 5 and {run.options["noise_type"] for run in runs} == {"human"}
    steps, mean, deviation = compare.line(runs, "val/acc")
    assert steps[-1] == 400 and (round(mean[-1], 3), round(deviation[-1], 3)) == (0.306, 0.015)
    assert compare.line(runs, "no/such") is None
    for words in ("a=docs/studies/human.npz noise_type=none", "a=docs/studies/human.npz nonsense", "a=absent.npz", "a"):
        assert compare.main(str(tmp_path / "x.png"), [words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    ratio = compare.line(runs[:1], "grad/norm_ratio")
    noisy, clean = (runs[0].series[f"grad/norm_{part}"] for part in ("noisy", "clean"))
    assert ratio[1].tolist() == pytest.approx((noisy[1] / clean[1]).tolist()) and not ratio[2].any()


@pytest.mark.parametrize("change", ["| 64 | 0.66", "0.02 | 0.72"])
def test_another_number_is_noticed(change):
    theirs = "| onecycle, 20 epochs | 0.5 | 64 | 0.1 | 3 | 0.6634 ± 0.0220 | 0.7197 ± 0.0126 | 0.3950 ± 0.0087 |"
    row = "| 64 | 0.66 ± 0.02 | 0.72 ± 0.01 | 0.40 ± 0.01 |"
    assert comes_from(row, theirs)
    assert not comes_from(row.replace(change, change[:-1] + "8"), theirs)


def by_seed(runs: Table, tag: str, *by: str, **chosen) -> dict[tuple, np.ndarray]:
    """{values of the options `by`: the series' last value by seed}, of runs with the `chosen` options."""
    found: dict[tuple, dict[int, float]] = {}
    for options, _, values in runs:
        if tag in values and all(options[k] == v for k, v in chosen.items()):
            cell = found.setdefault(tuple(options[k] for k in by), {})
            assert options["seed"] not in cell
            cell[options["seed"]] = values[tag][-1]
    return {cell: np.array([seeds[s] for s in sorted(seeds)]) for cell, seeds in found.items()}


def per_doubling(cells: dict[tuple, np.ndarray]) -> np.ndarray:
    """Least-squares slopes on log2 B by seed, of {(B, ...): values by seed}."""
    return np.polyfit(np.log2([cell[0] for cell in cells]), np.stack(list(cells.values())), 1)[0]


def text_of(name: str) -> str:
    """A page with its lines joined."""
    return " ".join((ROOT / f"docs/studies/{name}.md").read_text().split())


ONE_RATE = {"lr": 0.1, "sched": "onecycle", "fake_mask": None}


def test_numbers_of_the_medium_study():
    runs, page = read_file("medium"), text_of("medium")
    runs = [run for run in runs if run[0]["epochs"] == 16]  # without the pilot
    for chosen, cells in (({"sched_steps": 192}, "192 steps"), ({"sched_epochs": 16}, "16 epochs")):
        levels = [by_seed(runs, "probe/memorized_excess", "bs", noise=n, **chosen, **ONE_RATE) for n in (0.2, 0.5)]
        assert in_words(np.mean([per_doubling(level) for level in levels], 0)) in page
        for noise, level in zip((0.2, 0.5), levels):
            row = " | ".join(f"{level[B,].mean():.3f}" for B in (16, 32, 64, 128, 256))
            assert f"| {cells} | 0.1 | {noise} | {row} |" in page
        gap = {}
        for noise in (0.0, 0.2, 0.5):
            at = by_seed(runs, "val/acc", "bs", "lr", noise=noise, sched="onecycle", fake_mask=None, **chosen)
            gap[noise] = at[16, 0.025] - at[256, 0.4]
        assert in_words((gap[0.2] + gap[0.5]) / 2 - gap[0.0]) in page
    drift: dict[tuple, dict[int, list]] = {}
    for options, steps, values in runs:
        if options["sched_epochs"] == 16 and options["lr"] == 0.1 and options["noise"] and not options["fake_mask"]:
            at = steps["grad/difference"] < -(-3000 // options["bs"]) * 16
            x, y = steps["grad/difference"][at], values["grad/difference"][at] / options["bs"]
            cell = drift.setdefault(options["noise"], {}).setdefault((options["bs"],), [0.0] * 5)
            cell[options["seed"]] = ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0])
    for cells in drift.values():
        assert in_words(per_doubling({c: np.array(cells[c]) for c in sorted(cells)}), 4) in page
    means = [np.mean([drift[n][B,] for n in drift]) for B in (16, 32, 64, 128, 256)]
    assert "({})".format(", ".join(f"{m:.3f}" for m in means)) in page


def test_numbers_of_the_human_study():
    runs, page = read_file("human"), text_of("human")
    human, matched, uniform = (
        by_seed(runs, "test/acc", noise_type=kind)[()] for kind in ("human", "matched", "uniform")
    )
    assert in_words(matched - uniform - (human - uniform) / 2) in page
    assert in_words(human - uniform) in page and in_words(matched - uniform) in page
    plain = [in_words(d).replace("+", "") for d in (human - uniform, matched - uniform, human - matched)]
    assert all(text in page for text in plain)


def test_numbers_of_the_detection_study():
    page = text_of("detection")
    for options, _, values in read_file("detection"):
        row = {tag: f"{values[f'detect/{tag}'][-1]:.3f}" for tag in ("aum", "loss", "forgetting")}
        assert f"| {row['aum']} | {row['loss']} | {row['forgetting']} |" in page
        kind = {"human": "human, worst (0.402)", "uniform": "uniform (0.447)"}[options["noise_type"]]
        lost = values["val/acc"].max() - values["val/acc"][-1]
        assert f"| {kind} | last epoch | 12 | {lost:.3f} |" in page


def test_numbers_of_the_quick_study():
    runs, page = read_file("quick"), text_of("quick")
    for chosen in ({"sched_steps": 80}, {"sched_epochs": 20}):
        memorized = by_seed(runs, "probe/memorized_excess", "bs", noise=0.5, fake_mask=None, **chosen)
        clean, noisy = (by_seed(runs, "val/acc", "bs", noise=n, fake_mask=None, **chosen) for n in (0.0, 0.5))
        assert in_words(per_doubling(memorized)) in page
        assert in_words(per_doubling({cell: clean[cell] - noisy[cell] for cell in clean})) in page
        assert ", ".join(f"{memorized[B,].mean():.3f}" for B in (16, 64, 256)) in page


def test_numbers_of_the_tuned_study():
    runs, page = read_file("tuned"), text_of("tuned")
    for chosen in ({"sched_steps": 40}, {"sched_epochs": 10}):
        memorized = by_seed(runs, "probe/memorized_excess", "bs", noise=0.4, **chosen)
        clean, noisy = (by_seed(runs, "val/acc", "bs", noise=n, **chosen) for n in (0.0, 0.4))
        assert in_words(per_doubling(memorized)) in page
        assert in_words(per_doubling({cell: clean[cell] - noisy[cell] for cell in clean})) in page


def test_numbers_of_the_losses_study():
    runs, page = read_file("losses"), text_of("losses")
    test, memorized = (by_seed(runs, tag, "loss") for tag in ("test/acc", "probe/memorized"))
    assert in_words(test["sce:0.1,1",] - test["ce",]) in page
    for loss in ("mae", "gce:0.7", "sce:0.1,1", "forward"):
        assert in_words(memorized[loss,] - memorized["ce",]) in page
