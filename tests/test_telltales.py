"""What goes with memorization: rank correlations over the cells of a seed."""

import numpy as np
import pytest
from scipy import stats

import report
from study import telltales
from study.runfolders import Run
from test_figures import PLAIN
from test_report import plant

SIZES = (16, 32, 64, 128)


def made(B: int, seed: int, cosine: float, ratio: float, share: float, noise: float = 0.5, **more) -> Run:
    tags = {
        "grad/cos_clean_noisy": cosine,
        "null/cos_clean_noisy": 0.1,
        "grad/norm_noisy": ratio,
        "grad/norm_clean": 1.0,
    }
    tags |= {"grad/cos_clean_all": 0.5, "probe/memorized_excess": share, "probe/memorized": share}
    series = {tag: (np.array([0, 50]), np.array([v, v])) for tag, v in tags.items()}
    opts = PLAIN | {"bs": B, "seed": seed, "noise": noise} | more
    return Run(f"{B}-{seed}-{noise}", opts, {"steps_per_epoch": 100}, {"status": "finished"}, series, "here")


def test_the_order_of_the_cells_is_what_counts():
    """The cosine falls and the norm rises with what is memorized, not in proportion; at one level a seed has another order."""
    runs = [made(B, s, -(0.1**i), 2.0**i, 0.2 * i) for s in range(3) for i, B in enumerate(SIZES)]
    of = {name: telltales.correlations(runs, measure) for name, measure in telltales.MEASURES.items()}
    assert of["cos(clean, noisy) minus its null"] == pytest.approx([1.0] * 3)
    assert of["norm, noisy / clean"] == pytest.approx([1.0] * 3)
    assert of["cos(clean, all)"] == []  # all alike: no order
    other = [made(B, 0, 0.0, 2.0**-i, 0.2 * i, noise=0.2) for i, B in enumerate(SIZES)]
    assert telltales.correlations(runs + other, telltales.norm_ratio) == pytest.approx([0.0, 1.0, 1.0])


def test_levels_of_noise_are_not_mixed():
    """Within each level the ratio falls; over both it would rise."""
    runs = [
        made(B, 0, 0.0, level * 20 - i, level + 0.1 * i, noise=level)
        for level in (0.2, 0.5)
        for i, B in enumerate(SIZES)
    ]
    assert telltales.correlations(runs, telltales.norm_ratio) == pytest.approx([-1.0])
    pairs = [(telltales.norm_ratio(r), telltales.memorized(r)) for r in runs]
    assert stats.spearmanr(*zip(*pairs, strict=True)).statistic > 0


def test_too_few_cells_and_missing_values_are_left_out():
    runs = [made(B, 0, 0.0, 1.0 + i, 0.1 * i) for i, B in enumerate(SIZES)]
    assert telltales.correlations(runs[:3], telltales.norm_ratio) == []
    runs[0].series["grad/norm_clean"] = (np.array([0, 50]), np.array([0.0, 1.0]))
    assert telltales.norm_ratio(runs[0]) is None
    assert telltales.correlations(runs, telltales.norm_ratio) == []


def test_chance_gives_no_correlation():
    """Six cells in random order: the mean over 400 seeds is 0 within three standard errors, 1/sqrt(5) each."""
    rng = np.random.default_rng(0)
    rho = [
        telltales.rank_correlation(list(zip(rng.normal(size=6), rng.normal(size=6), strict=True))) for _ in range(400)
    ]
    assert abs(np.mean(rho)) < 3 / np.sqrt(5 * 400)


def test_the_section_of_a_report(tmp_path):
    common = "--dataset synthetic --synthetic-train 2000 --epochs 2 --sched onecycle --width 8 --noise 0.5"
    for s in range(3):
        for budget in ("steps", "epochs"):
            for i, B in enumerate((16, 64)):
                share = 0.1 + 0.3 * i + 0.1 * (budget == "epochs")
                series = {"probe/memorized": share, "grad/cos_clean_noisy": -share, "null/cos_clean_noisy": 0.0}
                words = f"{common} --sched-{budget} {50 if budget == 'steps' else 2} --bs {B} --seed {s} --noise-seed {s} --split-seed {s}"
                plant(tmp_path / "runs", words, {tag: [(0, v), (20, v)] for tag, v in series.items()})
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "svg"]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    section = page.split("## What goes with memorization")[1]
    assert "| cos(clean, noisy) minus its null | 3 | -1.00 [-1.00, -1.00] | -1.00 to -1.00 |" in section
    assert "| onecycle, 2 epochs | 0.5 | 64 | 0.1 | 3 | -0.500 ± 0.000 |" in section
