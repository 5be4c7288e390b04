"""Runs that differ in nothing but the kind of their label noise, side by side. (Losses: test_losses.py.)"""

import numpy as np
import pytest

from benchmarks import compare
from study import sidebyside
from study.exports import export_runs
from study.page import Page
from study.runfolders import Run
from study.settings import group_settings
from test_figures import PLAIN

OF_NOISE = next(c for c in sidebyside.COMPARISONS if c.of_noise)
HUMAN = {"noise_type": "human", "noise_file": "a.pt", "noise_labels": "worse_label"}


def made(seed: int, noise: float, share: float, memorized: float, **more) -> Run:
    tags = {"noise/realised": share, "probe/memorized": memorized}
    series = {tag: (np.array([0]), np.array([v])) for tag, v in tags.items()}
    opts = PLAIN | {"seed": seed, "noise_seed": seed, "noise": noise, "bs": 64} | more
    return Run(f"r{seed}", opts, {"steps_per_epoch": 100}, {"status": "finished"}, series, "here")


def runs() -> list[Run]:
    """Human labels memorize 0.1, 0.2, 0.3 more than uniform noise of the same realised share."""
    human = [made(s, 0.402, 0.395 + 0.005 * s, 0.3 + 0.1 * s, **HUMAN) for s in (1, 2, 3)]
    return human + [made(s, rate, 0.9 * rate, 0.3, noise_type="uniform") for s in (1, 2, 3) for rate in (0.2, 0.4468)]


def test_kinds_are_compared_at_one_realised_share():
    columns, (row,) = sidebyside.compared_rows(OF_NOISE, runs())
    of = dict(zip(columns, row[-len(columns) :], strict=True))
    assert row[0] == "human worse_label" and row[5] == "3"
    # 0.1, 0.2 and 0.3: 0.1 is their deviation, 4.303 the quantile of t with two degrees of freedom
    assert of["memorized"] == "+0.200 [-0.048, +0.448]"
    far = [r for r in runs() if r.options["noise_type"] == "human" or r.cell.noise == 0.2]
    assert sidebyside.compared_rows(OF_NOISE, far)[1] == []


def test_every_kind_and_level_has_its_row(tmp_path):
    rows = sidebyside.side_rows(OF_NOISE, runs())
    assert [(row[0].split()[0], row[2], row[5]) for row in rows] == [
        ("uniform", "0.2", "0.180 ± 0.000"),
        ("uniform", "0.447", "0.402 ± 0.000"),
        ("human", "0.402", "0.405 ± 0.005"),
    ]
    page = Page(tmp_path, "png")
    sidebyside.write_side_by_side(page, group_settings(runs()))
    page.write("t")
    text = (tmp_path / "report.md").read_text()
    header = next(line for line in text.splitlines() if line.startswith("| kind of noise"))
    columns = [name.strip() for name in header.strip("|").split("|")]
    assert columns[:6] == ["kind of noise", "schedule", "noise (nominal)", "B", "lr", "noise (realised)"]
    assert len(set(columns)) == len(columns)
    assert "## Kinds of label noise" in text and "## Losses" not in text and "+0.200 [-0.048, +0.448]" in text


def test_a_line_is_drawn_at_the_steps_that_both_norms_have(tmp_path, capsys):
    """A batch without a noisy example has one norm and not the other: 50 and 51 values, in another run 50 and 50."""
    rng = np.random.default_rng(0)
    clean, noisy = rng.uniform(1, 2, (2, 51)), rng.uniform(1, 2, (2, 51))
    runs = []
    for i, lacking in enumerate(([7], [7, 9])):
        run, kept = made(i, 0.4, 0.4, 0.3), np.delete(np.arange(51), lacking[:1])
        run.series["grad/norm_noisy"] = (kept, noisy[i][kept])
        kept = np.arange(51) if i == 0 else np.delete(np.arange(51), lacking[1:])
        run.series["grad/norm_clean"] = (kept, clean[i][kept])
        runs.append(run)
    steps, mean, deviation = compare.line(runs, "grad/norm_ratio")
    both = np.delete(np.arange(51), [7, 9])
    assert steps.tolist() == both.tolist()
    ratios = (noisy / clean)[:, both]
    assert mean == pytest.approx(ratios.mean(0)) and deviation == pytest.approx(np.abs(ratios[0] - ratios[1]) / 2**0.5)
    export_runs(runs, tmp_path / "a.npz")
    assert compare.main(str(tmp_path / "out.svg"), [f"x={tmp_path / 'a.npz'}"]) == 0
    assert "x: 2 runs; not drawn, for not all of them have it: val/acc, probe/recovered," in capsys.readouterr().out
    for out, times, status in (("out.what", 1, 2), ("out.svg", 2, 2), ("no/where.svg", 1, 1)):
        assert compare.main(str(tmp_path / out), [f"x={tmp_path / 'a.npz'}"] * times) == status
        assert capsys.readouterr().err.count("\n") == 1
    for run in runs:
        run.series = {"train/loss": (np.array([0]), np.array([1.0]))}
    export_runs(runs, tmp_path / "a.npz")
    assert compare.main(str(tmp_path / "out.svg"), [f"x={tmp_path / 'a.npz'}"]) == 2
    assert "none of the series" in capsys.readouterr().err


@pytest.mark.parametrize("of", [HUMAN, {"noise_type": "uniform"}])
def test_one_kind_is_no_comparison(tmp_path, of):
    page = Page(tmp_path, "png")
    alike = [made(s, 0.4, 0.4, 0.3, **of) for s in (1, 2, 3)]
    sidebyside.write_side_by_side(page, group_settings([*alike, made(1, 0.0, 0.0, 0.0, noise_type="pair")]))
    page.write("t")
    assert "Kinds of label noise" not in (tmp_path / "report.md").read_text()
