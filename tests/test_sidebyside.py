"""Runs that differ in nothing but the kind of their label noise, side by side. (Losses: test_losses.py.)"""

import numpy as np
import pytest

from study import sidebyside
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
    assert "## Kinds of label noise" in text and "## Losses" not in text and "+0.200 [-0.048, +0.448]" in text


@pytest.mark.parametrize("of", [HUMAN, {"noise_type": "uniform"}])
def test_one_kind_is_no_comparison(tmp_path, of):
    page = Page(tmp_path, "png")
    alike = [made(s, 0.4, 0.4, 0.3, **of) for s in (1, 2, 3)]
    sidebyside.write_side_by_side(page, group_settings([*alike, made(1, 0.0, 0.0, 0.0, noise_type="pair")]))
    page.write("t")
    assert "Kinds of label noise" not in (tmp_path / "report.md").read_text()
