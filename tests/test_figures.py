"""What figures put into one line, one bar, one colour and one caption, and which runs they lay beside the report's."""

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

import report
from conftest import SHARED
from engine import options
from study import drawing, figures, manyruns, onerun
from study.drawing import Look
from study.exports import export_runs
from study.page import Page
from study.reference import read_curves
from study.runfolders import Run
from study.settings import group_settings

PLAIN = vars(options.parser().parse_args([])) | {"model": "resnet18", "noise": 0.0, "precision": "bf16-mixed"}


def made(name: str, series: dict[str, dict[int, float]], **opts) -> Run:
    """A finished run with the given options and series {tag: {step: value}}."""
    arrays = {tag: (np.array(list(s)), np.array(list(s.values()), float)) for tag, s in series.items()}
    resolved = {"steps_per_epoch": 100, "train_examples": 1600}
    return Run(name, PLAIN | opts, resolved, {"status": "finished"}, arrays, "here")


def accuracy(*values: float) -> dict:
    return {"val/acc": {100 * i: v for i, v in enumerate(values)}}


def lines(axis) -> list[tuple[list, list]]:
    """(x, y) of every strong line; those of legends hold no points."""
    strong = [line for line in axis.get_lines() if line.get_linewidth() > 1.5 and len(line.get_xdata())]
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in strong]


def caption(figure) -> str:
    return " ".join(figure._supxlabel.get_text().split())


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# -------------------------------------------------------------------------------------------- beside the report's own

CELL = {"sched": "onecycle", "bs": 16, "noise": 0.5}
REPORT = made("report", accuracy(0.1, 0.4) | {"grad/cos_clean_all": {0: 0.8, 50: 0.6}}, **CELL)
OTHER = {
    **{"width": 16, "noise_type": "symmetric", "no_augment": True, "subset": 500, "max_steps": 100, "wd": 1e-2},
    **{"val_frac": 0.1, "norm": "gn", "epochs": 80, "sched_steps": 2500, "momentum": 0.5, "fake_mask": 0.2},
}


@pytest.mark.parametrize("name", OTHER)
def test_a_run_of_another_setting_is_not_the_reports(name):
    assert figures.comparable(made("same", {}, **CELL), REPORT)
    assert not figures.comparable(made("other", {}, **CELL | {name: OTHER[name]}), REPORT)


def test_hardware_and_measurement_do_not_make_another_run():
    opts = {"precision": "32-true", "devices": 4, "compile": "on", "threads": 2, "sync_bn": "off"}
    opts |= {"measure_bn": "eval", "measure": "full", "chunks": 2, "seed": 3, "runs": "elsewhere"}
    assert figures.comparable(made("same", {}, **CELL | opts), REPORT)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_cosines_of_another_batchnorm_mode_are_labelled(mode):
    cosines = {"grad/cos_clean_all": {0: 0.7, 50: 0.5}}
    run = made("a", accuracy(0.1, 0.4) | cosines, **CELL, measure_bn=mode)
    look = Look(reference=[REPORT])
    figure = figures.curves("t", [run], "grad/cos_clean_all", look)
    assert ("ours in train mode" in caption(figure)) == (mode == "train")
    assert legend(figure)[-1] == ("the report\n(eval mode)" if mode == "train" else "the report")
    figure = figures.curves("t", [run], "val/acc", look)
    assert "dashed: the report's own curve" in caption(figure) and "mode" not in caption(figure)
    assert "dashed" not in caption(figures.curves("t", [run], "val/acc", Look()))


@pytest.mark.parametrize("points", [5, 25])
def test_the_reports_curve_is_smoothed_as_ours_is(points):
    """Ours ends with its schedule after `points` values, theirs goes on at the last one: up to there the lines are one."""
    values = [0.1 + 0.8 * i / points for i in range(points)]
    run, report = (made(name, accuracy(*values, *more), **CELL) for name, more in (("a", []), ("r", [0.5] * 40)))
    drawn = figures.curves("t", [run], "val/acc", Look(reference=[report])).axes[0].get_lines()
    ours, theirs = (next(line for line in drawn if line.get_linewidth() == width).get_ydata() for width in (1.7, 1.2))
    assert theirs[:points].tolist() == ours.tolist()
    assert (ours.tolist() == values) == (points == 5)


def table(tmp_path, runs: list[Run]) -> list[list[str]]:
    """The rows of the table beside the report, without header."""
    page = Page(tmp_path)
    manyruns.write_comparison(page, runs, [REPORT])
    rows = [line.strip("| ").split(" | ") for line in "\n".join(page.markdown).splitlines() if line.startswith("|")]
    return rows[2:]


def test_the_table_is_by_setting_and_counts_seeds(tmp_path):
    other = made("other", accuracy(0.1, 0.9), **CELL, width=16)
    runs = [made(f"{s}{p}", accuracy(0.1, v), **CELL, seed=s, precision=p, measure_every=e) for s, p, e, v in (
        (0, "32-true", 50, 0.3), (0, "bf16-mixed", 10, 0.4), (1, "bf16-mixed", 50, 0.45))]  # fmt: skip
    full = made("chunks", accuracy(0.1, 0.5) | {"grad/cos_clean_all": {0: 0.5}}, **CELL, chunks=2, measure_bn="eval")
    train = made("train", {"grad/cos_clean_all": {0: 0.9}}, **CELL)
    rows = table(tmp_path, [other, *runs, full, train])
    assert [(r[0], r[1], r[7], r[9], r[10]) for r in rows] == [
        # seed 0's two runs are one value, 0.35; 0.35 and 0.45: mean 0.4, the report's own
        ("validation accuracy", "measure-bn train", "0.4000 (n = 2)", "+0.0000", "+0.0"),
        ("cosine of clean and all (the report's: eval)", "measure-bn train", "0.9000 (n = 1)", "+0.3000", "one seed"),
        ("validation accuracy", "chunks 2, measure-bn eval", "0.5000 (n = 1)", "+0.1000", "one seed"),
        ("cosine of clean and all", "chunks 2, measure-bn eval", "0.5000 (n = 1)", "-0.1000", "one seed"),
    ]
    assert table(tmp_path, [other]) == []


# -------------------------------------------------------------------------------------------------- lines over time


def test_a_line_begins_where_every_seed_has_a_value():
    tag = "corrected/cos_clean_noisy"
    late = made("late", {tag: {1000: 0.9, 2000: 0.9}}, noise=0.5)
    early = made("early", {tag: {0: -0.3, 1000: -0.3, 2000: -0.3}}, noise=0.5, seed=1)
    figure = figures.curves("t", [late, early], tag, Look())
    assert lines(figure.axes[0]) == [([1000, 2000], pytest.approx([0.3, 0.3]))]
    never = made("never", {tag: {0: 0.1, 500: 0.1}}, noise=0.5, seed=2)  # has ended before the other begins
    figure = figures.curves("t", [late, never], tag, Look())
    assert lines(figure.axes[0]) == [([1000, 2000], [0.9, 0.9]), ([0, 500], [0.1, 0.1])]
    assert not figure.axes[0].collections and "bands" not in caption(figure)


def corrected(values: dict[int, tuple[float, float, float]], skip_low: int | None = None, **opts) -> Run:
    """A run with corrected cosines {step: (value, low, high)}; of one step the lower end is missing."""
    tag = "corrected/cos_clean_noisy"
    ends = {f"{tag}{end}": {s: v[i] for s, v in values.items()} for i, end in enumerate(("", "_low", "_high"))}
    ends[f"{tag}_low"].pop(skip_low, None)
    raw = {s: 0.1 for s in values}
    return made("c", ends | {"grad/cos_clean_noisy": raw, "null/cos_clean_noisy": raw}, noise=0.5, **opts)


def whiskers(axis) -> list[list[list[float]]]:
    """[[x, low], [x, high]] of each whisker."""
    return [path.vertices.tolist() for c in axis.collections if isinstance(c, LineCollection) for path in c.get_paths()]


def test_corrected_estimates_are_drawn_with_their_intervals():
    tag = "corrected/cos_clean_noisy"
    runs = [corrected({100: (0.5, 0.2, 0.8), 200: (0.6, 0.5, 0.7)}, skip_low=100)]
    figure = figures.curves("t", runs, tag, Look())
    assert whiskers(figure.axes[0]) == [[[200, 0.5], [200, 0.7]]]
    assert drawing.INTERVALS in caption(figure) and "bands" not in caption(figure)
    figure = figures.curves("t", [*runs, corrected({100: (0.1, 0.0, 0.2), 200: (0.2, 0.1, 0.3)}, seed=1)], tag, Look())
    assert len(whiskers(figure.axes[0])) == 3 and "bands: one standard deviation over seeds" in caption(figure)
    without = made("old", {tag: {100: 0.5, 200: 0.6}}, noise=0.5)  # as earlier versions have it
    figure = figures.curves("t", [without], tag, Look())
    assert not whiskers(figure.axes[0]) and drawing.INTERVALS not in caption(figure)
    assert drawing.INTERVALS in caption(onerun.run_figure(runs[0], Look()))


def test_against_batch_size_the_interval_is_that_of_the_mean():
    both = {100: (0.5, 0.2, 0.8), 200: (0.7, 0.3, 1.1)}  # half widths 0.3 and 0.4: 0.5 / 2 for their mean, 0.6
    figure = figures.nulls("t", [corrected(both)], "cos_clean_noisy")
    assert [[128, pytest.approx(0.35)], [128, pytest.approx(0.85)]] in whiskers(figure.axes[0])
    assert drawing.INTERVALS in caption(figure)
    figure = figures.nulls("t", [corrected(both), corrected(both, seed=1)], "cos_clean_noisy")
    half = 0.25 / 2**0.5
    assert [[128, pytest.approx(0.6 - half)], [128, pytest.approx(0.6 + half)]] in whiskers(figure.axes[0])


@pytest.mark.parametrize("look", [Look(), Look(bands="window")])
def test_bands_and_what_the_caption_says_of_them(look):
    probe = lambda s: {f"probe/{k}": {0: 0.1, 100: 0.2 + 0.1 * s} for k in ("memorized", "recovered", "other")}  # noqa: E731
    runs = [
        made(f"{s}", probe(s) | accuracy(*[0.1 + 0.2 * s] * 12, *[0.5 + 0.2 * s] * 12), noise=0.2, seed=s)
        for s in range(3)
    ]
    figure = figures.probes("t", runs, look)  # not smoothed: there is no window
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert sorted(set(band[band[:, 0] == 100][:, 1])) == pytest.approx([0.2, 0.4])
    assert "bands: one standard deviation over seeds" in caption(figure)
    figure = figures.curves("t", runs, "val/acc", look)
    half = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    if look.bands == "window":
        assert "bands: standard deviation within" in caption(figure) and half.max() < 0.85
    else:
        assert "bands: one standard deviation over seeds" in caption(figure) and half.max() > 0.88
    lone = [r for r in runs if r.seed == "0/0/0"]
    assert "bands" not in caption(figures.probes("t", lone, look))


def test_an_a_a_run_meets_its_null_on_its_own_page():
    """Raw cosines are logged far more often than nulls, and both fall as the run goes on."""
    cosine = lambda s: 0.2 + 0.6 * np.exp(-s / 4000)  # noqa: E731
    often, rarely = ({s: cosine(s) for s in range(0, 20000, every)} for every in (50, 1000))
    run = made("aa", {"grad/cos_clean_noisy": often, "null/cos_clean_noisy": rarely})
    drawn = [line for line in onerun.run_figure(run, Look()).axes[0].get_lines() if len(line.get_xdata())]
    raw, null = ((line.get_xdata().tolist(), line.get_ydata().tolist()) for line in drawn)
    assert raw == null and null[0] == list(rarely) and null[1] == list(rarely.values())
    assert [line.get_linestyle() for line in drawn] == ["-", "--"]
    alone = made("split", {"grad/cos_clean_noisy": often})  # no null to meet: smoothed as before
    ((x, y),) = lines(onerun.run_figure(alone, Look()).axes[0])
    assert len(x) == 400 and y[200] > cosine(x[200]) + 0.005
    both = made("masks", {"grad/cos_clean_noisy": often, "null/permuted_cos_clean_noisy": often})
    figure = onerun.run_figure(both, Look())  # at the same, many steps: both smoothed, and alike
    raw, null = (line.get_ydata().tolist() for line in figure.axes[0].get_lines() if line.get_zorder() == 3)
    assert raw == null == y and "its null (random masks)" in [t.get_text() for t in figure.axes[0].legend_.get_texts()]


# ------------------------------------------------------------------------------------------------ what is told apart


def test_two_momenta_are_two_lines():
    runs = [made(f"{m}", accuracy(0.1, v), bs=64, noise=0.2, momentum=m) for m, v in ((0.5, 0.3), (0.9, 0.7))]
    figure = figures.curves("t", runs, "val/acc", Look())
    assert [y[0] for _, y in lines(figure.axes[0])] == [0.1, 0.1] and not figure.axes[0].collections
    assert legend(figure) == ["64, m 0.5", "64, m 0.9"]
    assert len({to_hex(handle.get_color()) for handle in figure.legends[0].legend_handles}) == 2
    (line,) = figures.curves("t", runs[1:], "val/acc", Look()).legends[0].get_texts()
    assert line.get_text() == "64"


def test_two_momenta_are_two_curves_of_best_sizes():
    tops = {0.5: 6, 0.9: 8}
    runs = [
        made(f"{m}-{B}-{noise}", accuracy(0.1, 0.8 - 0.01 * (x - tops[m]) ** 2), bs=B, noise=noise, momentum=m)
        for m in tops
        for B, x in ((16, 4), (64, 6), (256, 8))
        for noise in (0.0, 0.5)
    ]
    drawn = {
        b.get_label(): b.lines[0].get_ydata().tolist() for b in figures.best_batch_sizes("t", runs).axes[0].containers
    }
    assert {label.split(", ")[-1]: y for label, y in drawn.items()} == {
        "m 0.5": pytest.approx([6, 6]),
        "m 0.9": pytest.approx([8, 8]),
    }


def test_every_share_of_a_fake_mask_has_its_own_column():
    same = lambda v: {"grad/cos_clean_noisy": {0: v}, "null/cos_clean_noisy": {0: v}}  # noqa: E731
    runs = [made(f"n{B}", same(0.1), sched="onecycle", noise=0.5, bs=B) for B in (16, 64)]
    runs += [made(f"aa{f}", same(v), sched="onecycle", fake_mask=f, bs=64) for f, v in ((0.2, 0.1), (0.5, 0.5))]
    runs += [made("ep", same(0.7), sched="onecycle", fake_mask=0.5, bs=64, sched_epochs=9)]
    figure = figures.nulls("t", runs, "cos_clean_noisy")
    drawn = {axis.get_title(): axis.containers[0].lines[0].get_ydata().tolist() for axis in figure.axes}
    assert drawn == {
        "50% label noise": [0.1, 0.1],
        "A/A: clean labels, fake mask 20%\nschedule in steps": [0.1],
        "A/A: clean labels, fake mask 50%\nschedule in epochs": [0.7],
        "A/A: clean labels, fake mask 50%\nschedule in steps": [0.5],
    }
    (titles,) = [[a.get_title() for a in figures.nulls("t", runs[:3], "cos_clean_noisy").axes]]
    assert titles == ["50% label noise", "A/A: clean labels, fake mask 20%"]


def test_budgets_look_different_against_the_ratio():
    lengths = {"steps": {}, "epochs": {"sched_epochs": 64}, "examples": {"sched_examples": 640000}}
    runs = [made(b, accuracy(0.1, 0.5), sched="onecycle", bs=64, noise=0.2, **o) for b, o in lengths.items()]
    figure = figures.by_ratio("t", runs)
    assert len({line.get_fillstyle() for line in figure.axes[0].get_lines()}) == 3
    assert legend(figure)[-3:] == [f"schedule in {b}" for b in lengths]
    assert not any("schedule in" in text for text in legend(figures.by_ratio("t", runs[:1])))
    assert [axis.get_xlabel() for axis in figure.axes] == ["lr / B", "lr / (B (1 - m))"]
    assert [axis.get_xlabel() for axis in figures.by_ratio("t", runs, of_sgd=False).axes] == ["lr / B"]


def test_no_two_batch_sizes_and_rates_share_a_colour():
    sizes, rates = (16, 32, 64, 128, 256, 512, 1024), (0.05, 0.1, 0.2)
    runs = [made(f"{B}-{lr}", accuracy(0.1, 0.5), bs=B, lr=lr) for B in sizes for lr in rates]
    figure = figures.curves("t", runs, "val/acc", Look(), by_lr=True)
    colours = {handle.get_label(): handle.get_color() for handle in figure.legends[0].legend_handles}
    assert len(colours) == len({to_hex(c) for c in colours.values()}) == len(sizes) * len(rates)
    brightness = [sum(colours[f"B/lr = {64 / lr:.0f}\n(B 64, lr {lr:g})"]) for lr in rates]
    assert brightness == sorted(brightness, reverse=True)  # dark for the larger rate, as the report has it
    assert colours["B/lr = 640\n(B 64, lr 0.1)"] == pytest.approx(figures.colour(64))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1  # the legend fits


def test_which_grids_are_the_reports_ratio_pairs():
    grid = lambda sizes, rates: [made(f"{B}-{lr}", {}, bs=B, lr=lr) for B in sizes for lr in rates]  # noqa: E731
    assert figures.ratio_pairs(grid((64, 128), (0.05, 0.1)))
    assert not figures.ratio_pairs(grid((64, 256), (0.05, 0.1)))
    assert not figures.ratio_pairs(grid((16, 64, 128), (0.05, 0.1)))
    assert not figures.ratio_pairs(grid((64, 128), (0.1,)))
    assert group_settings(grid((16, 64, 128), (0.05, 0.1)))[0].ratio  # equal lr/B somewhere is not enough for figure 13


# -------------------------------------------------------------------------------------- what short and long runs look like


def test_a_series_of_one_point_is_seen():
    tags = ("val/acc", "grad/cos_clean_noisy", "probe/memorized", "optim/lr", "train/loss")
    run = made("one", {tag: {0: 0.3} for tag in tags}, noise=0.5)
    for axis in onerun.run_figure(run, Look()).axes:
        (line,) = [x for x in axis.get_lines() if len(x.get_xdata()) and x.get_linewidth() > 1.5]
        assert line.get_marker() not in ("", "None", None) and line.get_markevery() == [0], axis.get_title()
    assert onerun.run_figure(made("none", {}), Look()) is None
    figure = figures.probes("t", [made("a", {"probe/memorized": {0: 0.1}}, noise=0.5)], Look())
    assert [[t.get_text() for t in axis.texts] for axis in figure.axes] == [
        [],
        ["no probe/recovered"],
        ["no probe/other"],
    ]


def test_averages_are_for_series_of_some_points():
    for n, averaged in ((19, False), (20, True)):
        values = [0.0] * (n - 1) + [1.0]
        figure = figures.curves("t", [made("a", accuracy(*values))], "val/acc", Look())
        ((_, y),) = lines(figure.axes[0])
        assert y[-1] == pytest.approx(1 / (2 - 2.0 ** (1 - n)) if averaged else 1)  # weights 1, 1/2, 1/4, ...
        assert ("exponential average" in caption(figure)) == averaged


def test_bands_of_shares_stay_between_0_and_1():
    runs = [made(f"{v}", accuracy(v, 1 - v), seed=i) for i, v in enumerate((0.0, 0.0, 0.9))]
    figure = figures.curves("t", runs, "val/acc", Look())
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == 0 and band.max() == 1


@pytest.mark.parametrize("argv, scale, x", [
    ("", "symlog", "steps"), ("--x steps", "linear", "steps"), ("--x log-epochs", "symlog", "epochs"), ("--x epochs", "linear", "epochs"),
    ("--x steps --log-x", "symlog", "steps")])  # fmt: skip
def test_no_batch_size_is_a_sliver(argv, scale, x):
    """16 and 1024 at one number of epochs: lines whose lengths are 64 apart; step 0 is kept on a logarithmic axis."""
    look = report.look_of(report.parser().parse_args(["runs", *argv.split()]), [])
    runs = [
        made(f"{B}", {"val/acc": {s: 0.1 + s / 1e5 for s in (0, 10240 // B, 20480 // B)}}, bs=B) for B in (16, 1024)
    ]
    axis = figures.curves("t", runs, "val/acc", look).axes[0]
    assert (axis.get_xscale(), look.x) == (scale, x) and all(0 in line[0] for line in lines(axis))
    if scale == "symlog":
        assert axis.get_xlim()[0] == 0 and axis.get_xticks()[0] == 0
    near = [made(f"{B}", accuracy(0.1, 0.2, 0.3), bs=B) for B in (16, 32)]
    if not argv:
        assert figures.curves("t", near, "val/acc", look).axes[0].get_xscale() == "linear"


def test_what_a_grid_lacks_is_named_below_its_figure():
    runs = [made(f"{B}-{n}", accuracy(0.1, 0.2), bs=B, noise=n) for B, n in ((16, 0.0), (64, 0.0), (16, 0.5))]
    runs.append(made("64-0.5", {}, bs=64, noise=0.5))
    text = caption(figures.curves("t", runs, "val/acc", Look()))
    assert "not drawn at 50% label noise: batch 64 (no val/acc)" in text
    assert "batch 64 (no run)" in caption(figures.curves("t", runs[:3], "val/acc", Look()))
    assert "not drawn" not in caption(figures.curves("t", runs[:2], "val/acc", Look()))


def test_the_reports_missing_curve_is_named():
    path = SHARED / "report" / "curves.csv"
    if not path.is_file():
        pytest.skip("no ../shared/report/curves.csv beside the repository")
    theirs = read_curves(path)
    why = "(the report's curve is its figure 13's run of 80 epochs)"
    runs = [r for r in theirs if r.options["epochs"] == 64]
    figure = figures.curves("t", runs, "val/acc", Look())
    assert (
        f"not drawn at 0% label noise: batch 128 {why}" in caption(figure) and figure.axes[0].get_xscale() == "symlog"
    )
    ours = [made(f"{B}", accuracy(0.1, 0.4), sched="onecycle", bs=B) for B in (64, 128)]
    text = caption(figures.curves("t", ours, "val/acc", Look(reference=theirs)))
    assert f"no dashed curve at 0% label noise for batch 128 {why}" in text


def test_a_figure_has_our_style_whatever_the_users_is(tmp_path):
    """A dark matplotlibrc, text set by TeX, a locale's decimal comma, a notebook's back end: the same bytes as without."""
    from matplotlib import rc_context, rcParams

    run = made("a", {"val/acc": {0: 0.5, 100: 0.625}})
    own = {"text.usetex": True, "axes.facecolor": "black", "figure.facecolor": "black", "savefig.facecolor": "black"}
    own |= {"text.color": "white", "lines.linewidth": 9, "font.family": "monospace", "axes.formatter.use_locale": True}
    own |= {"savefig.bbox": "tight", "path.effects": [], "svg.fonttype": "path", "savefig.transparent": True}
    files = []
    for settings in ({}, own):
        with rc_context(settings):
            rcParams["backend"] = "module://a_notebook_of.somebody" if settings else rcParams["backend"]
            before = dict(rcParams)
            assert drawing.save_styled(onerun.run_figure, run, Look(), stem=tmp_path / "f", formats=drawing.FORMATS)
            assert dict(rcParams) == before
        files.append({name: (tmp_path / f"f.{name}").read_bytes() for name in drawing.FORMATS})
    assert files[0] == files[1]


def lightness(color) -> float:
    """CIE L* of an sRGB colour, 0 to 100."""
    linear = np.where((c := np.array(color)) <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    Y = linear @ [0.2126, 0.7152, 0.0722]
    return float(116 * np.cbrt(Y) - 16) if Y > (6 / 29) ** 3 else float(Y * (29 / 3) ** 3)


def test_batch_sizes_are_told_apart_without_colour():
    sizes = (16, 32, 64, 128, 256, 512, 1024)
    steps = np.diff([lightness(drawing.colour(B)) for B in sizes])
    assert steps.min() > 8 and lightness(drawing.colour(1024)) < 82  # in order, and seen on white
    assert len({drawing.marker_of(B) for B in sizes}) == len(sizes)
    figure = figures.curves("t", [made(f"{B}", accuracy(0.1, 0.5), bs=B) for B in sizes], "val/acc", Look())
    assert [h.get_marker() for h in figure.legends[0].legend_handles] == [drawing.marker_of(B) for B in sizes]


def test_titles_are_not_broken_inside_an_option():
    options_ = ("no-augment", "subset 2000", "val-frac 0.5", "width 8", "measure-bn eval", "noise-type symmetric")
    title = f"Figure 4: validation accuracy, one-cycle (cifar10, resnet18, 20 epochs, {', '.join(options_)})"
    for width in range(24, 110):
        broken = drawing.wrapped(title, width).splitlines()
        assert " ".join(broken) == title and max(map(len, broken)) <= width
        assert all(any(o in part for part in broken) for o in options_), width


@pytest.mark.parametrize(
    "argv", ["--format jpg", "--format png,", "--x days", "--csv runs.txt", "--csv nowhere/a.csv", "--csv ."]
)
def test_a_wrong_option_is_one_line(argv, tmp_path, capsys):
    export_runs([made("a", accuracy(0.1))], tmp_path / "a.npz")
    try:
        status = report.main([str(tmp_path / "a.npz"), "--out", str(tmp_path / "out"), *argv.split()])
    except SystemExit as e:
        status = e.code
    err = capsys.readouterr().err
    assert status == 2 and argv.split()[0] in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
