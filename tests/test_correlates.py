"""What goes with memorization: rank correlations over the cells of a seed, within one budget."""

import numpy as np
import pytest
from scipy import stats

import report
from study import correlates
from study.analysis import runs
from study.runfolders import Run
from test_figures import PLAIN
from test_report import plant

SIZES = (16, 32, 64, 128, 256)


def made(B: int, seed: int, cosine: float, share: float, noise: float = 0.5, **more) -> Run:
    tags = {"grad/cos_clean_noisy": cosine, "null/cos_clean_noisy": 0.1, "grad/cos_clean_all": 0.5}
    tags |= {"probe/memorized_excess": share, "probe/memorized": share, "val/acc": 0.5}
    series = {tag: (np.array([0, 50]), np.array([v, v])) for tag, v in tags.items()}
    opts = PLAIN | {"sched": "onecycle", "bs": B, "seed": seed, "noise_seed": seed, "noise": noise} | more
    return Run(f"{B}-{seed}-{noise}", opts, {"steps_per_epoch": 100}, {"status": "finished"}, series, "here")


def rows(made_runs: list[Run]) -> dict[tuple[str, str], str]:
    """{(budget, measure): correlation} of the section's table."""
    table = runs.table(made_runs).assign(memorized=lambda f: f["memorized_excess"])
    return {(budget, name): text for budget, name, text, *_ in correlates.correlation_rows(table)}


def test_ranks_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(4, size=(2, 50, 7))  # with ties
    want = [stats.spearmanr(x, y).statistic for x, y in zip(a, b)]
    assert correlates.rank_correlation(a, b) == pytest.approx(want, nan_ok=True)


def test_budgets_are_not_mixed():
    """Under one budget the cosine falls with what is memorized, under the other it rises; of all cells together it would not tell."""
    both = [
        made(B, s, sign * 0.1 * i, 0.2 * i, **{f"sched_{budget}": 9})
        for budget, sign in (("steps", -1), ("epochs", 1))
        for s in range(3)
        for i, B in enumerate(SIZES)
    ]
    found = rows(both)
    name = "cos(clean, noisy) minus its null"
    assert found == {
        ("the report's steps", name): "-1.00 [-1.00, -1.00]",
        ("matched epochs", name): "+1.00 [+1.00, +1.00]",
    }


def test_levels_of_noise_are_not_mixed():
    """Within each level the cosine falls; over both it would rise."""
    two = [
        made(B, s, level * 20 - 0.1 * i, level + 0.02 * i, noise=level)
        for level in (0.2, 0.5)
        for s in range(3)
        for i, B in enumerate(SIZES)
    ]
    assert list(rows(two).values()) == ["-1.00 [-1.00, -1.00]"]


def test_no_interval_no_correlation():
    line = lambda sizes, seeds: [made(B, s, 0.1 * i, 0.1 * i) for s in range(seeds) for i, B in enumerate(sizes)]  # noqa: E731
    assert rows(line(SIZES, 3)) and not rows(line(SIZES[:4], 3)) and not rows(line(SIZES, 2))
    assert not rows([made(B, s, 0.1, 0.1 * i) for s in range(3) for i, B in enumerate(SIZES)])  # all alike: no order
    lacking = line(SIZES, 4)[1:]  # seed 0 has no run at B = 16 and is left out
    assert len(correlates.matrices(runs.table(lacking), "cos_minus_null")[0][0]) == 3


def test_the_interval_covers_what_other_cells_and_seeds_would_give():
    """Seven cells and five seeds, drawn anew each time: 95 % intervals over seeds alone would miss nearly always."""
    rng = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        a = rng.normal(size=7)
        b = 0.7 * a + 0.7 * rng.normal(size=7)
        return a + 0.2 * rng.normal(size=(5, 7)), b + 0.2 * rng.normal(size=(5, 7))

    true = np.mean([correlates.rank_correlation(*draw()).mean() for _ in range(2000)])
    found = [correlates.correlation([draw()], rng) for _ in range(60)]
    assert np.mean([low <= true <= high for _, low, high in found]) >= 0.9


def test_the_section_of_a_report(tmp_path):
    common = "--dataset synthetic --synthetic-train 2000 --epochs 2 --sched onecycle --width 8 --noise 0.5"
    for s in range(3):
        for budget in ("steps", "epochs"):
            for i, B in enumerate((16, 32, 64, 128, 256)):
                share = 0.1 + 0.1 * i + 0.1 * (budget == "epochs")
                series = {"probe/memorized": share, "grad/cos_clean_noisy": -share, "null/cos_clean_noisy": 0.0}
                words = f"{common} --sched-{budget} {50 if budget == 'steps' else 2} --bs {B} --seed {s} --noise-seed {s} --split-seed {s}"
                plant(tmp_path / "runs", words, {tag: [(0, v), (20, v)] for tag, v in series.items()})
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "svg"]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    section = page.split("## What goes with memorization")[1]
    assert "| matched epochs | cos(clean, noisy) minus its null | -1.00 [-1.00, -1.00] | 3 | 5 |" in section
    assert "| onecycle, 2 epochs | 0.5 | 64 | 0.1 | 3 | -0.400 ± 0.000 |" in section
