"""The statistics against published and library values, and the verdict rules on planted sweeps."""

import math
import random
import statistics

import numpy as np
import pytest

from benchmarks import planted
from study import findings, stats
from study.findings import Cell, Row, evaluate_finding, verdict
from study.stats import Interval, interval, t_cdf, t_quantile

T_TABLE = {  # Student's t, 97.5 % (two-sided 95 %), and 95 %: any printed table
    **{(0.975, 1): 12.706, (0.975, 2): 4.303, (0.975, 3): 3.182, (0.975, 4): 2.776, (0.975, 9): 2.262},
    **{(0.975, 10): 2.228, (0.975, 30): 2.042, (0.975, 120): 1.980, (0.95, 1): 6.314, (0.95, 5): 2.015},
}


def test_t_quantiles_are_the_published_ones():
    for (p, df), value in T_TABLE.items():
        assert t_quantile(p, df) == pytest.approx(value, abs=6e-4), (p, df)
        assert t_cdf(t_quantile(p, df), df) == pytest.approx(p, abs=1e-11)
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-9)
    assert t_cdf(-1.3, 4) == pytest.approx(1 - t_cdf(1.3, 4))
    for p, df in ((1.0, 3), (0.4, 3), (0.9, 0)):
        with pytest.raises(ValueError):
            t_quantile(p, df)


def test_statistics_agree_with_scipy():
    scipy = pytest.importorskip("scipy.stats")
    rng = random.Random(1)
    for df in (1, 2, 3, 7, 40, 200):
        assert t_quantile(0.975, df) == pytest.approx(scipy.t.ppf(0.975, df), rel=1e-9)
        assert t_cdf(1.7, df) == pytest.approx(scipy.t.cdf(1.7, df), rel=1e-12)
    a, b = ([rng.gauss(m, 1) for _ in range(6)] for m in (0, 0.7))
    paired = scipy.ttest_rel(a, b).confidence_interval(0.95)
    ours = interval(x - y for x, y in zip(a, b, strict=True))
    assert (ours.low, ours.high) == (pytest.approx(paired.low), pytest.approx(paired.high))
    assert stats.slope(a, b) == pytest.approx(scipy.linregress(a, b).slope)


def test_interval_by_hand():
    i = interval([1.0, 2.0, 3.0])
    assert (i.mean, i.sd, i.n) == (2.0, 1.0, 3)
    assert i.high - i.mean == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    one = interval([0.3])
    assert one.mean == 0.3 and math.isnan(one.low) and math.isnan(one.sd)
    with pytest.raises(ValueError):
        interval([])


def test_slope_and_parabola_agree_with_numpy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=9), rng.normal(size=9)
    assert stats.slope(list(x), list(y)) == pytest.approx(np.polyfit(x, y, 1)[0])
    B = [16, 32, 64, 128, 256, 512]
    for top in (5.3, 6.0, 8.2):
        acc = [0.9 - 0.01 * (math.log2(b) - top) ** 2 for b in B]
        assert stats.best_log2(B, acc) == pytest.approx(top)
    acc = [0.41, 0.57, 0.73, 0.83, 0.80, 0.58]  # the report's figure 4c
    c, b, _ = np.polyfit(np.log2(B), acc, 2)
    assert stats.best_log2(B, acc) == pytest.approx(-b / (2 * c))
    assert stats.best_log2(B, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == pytest.approx(9, abs=1e-6)  # beyond: the end
    assert stats.best_log2(B, [0.6, 0.3, 0.1, 0.1, 0.3, 0.5]) == 4.0  # opens upwards: the better end
    with pytest.raises(stats.Incomplete):
        stats.best_log2([16, 32], [0.1, 0.2])


def test_pooled_deviation_and_seeds_needed():
    a, b = [1.0, 2.0, 4.0], [5.0, 5.5]
    want = math.sqrt((2 * statistics.variance(a) + statistics.variance(b)) / 3)
    assert stats.pooled_sd([a, b, [7.0]]) == pytest.approx(want)
    assert math.isnan(stats.pooled_sd([[1.0], [2.0]]))
    n = stats.seeds_needed(0.02, 0.03, 0.01)
    assert t_quantile(0.975, n - 1) * 0.03 / math.sqrt(n) < 0.02 <= t_quantile(0.975, n - 2) * 0.03 / math.sqrt(n - 1)
    assert stats.seeds_needed(0.02, math.nan, 0.01) is None


def at(low: float, high: float, n: int = 3) -> Interval:
    return Interval((low + high) / 2, low, high, 1.0, n)


@pytest.mark.parametrize(
    ("steps", "epochs", "want"),
    [
        (at(0.02, 0.04), at(0.01, 0.03), "supported"),
        (at(0.02, 0.04), at(-0.005, 0.005), "confounded"),
        (at(0.02, 0.04), at(-0.04, -0.02), "confounded"),
        (at(0.02, 0.04), at(-0.02, 0.02), "not resolved"),
        (at(0.02, 0.04), None, "not resolved"),
        (at(-0.005, 0.005), at(0.02, 0.04), "not supported"),
        (at(-0.04, -0.02), None, "not supported"),
        (at(-0.02, 0.02), at(0.02, 0.04), "not resolved"),
        (at(0.001, 0.005), at(0.001, 0.005), "supported"),  # small, but not 0: the rule asks no more
        (at(0.001, 0.005), at(-0.02, 0.02), "not supported"),  # inside the margin
        (at(0.02, 0.04, n=2), at(0.02, 0.04, n=2), "not resolved"),
        (at(0.02, 0.04), at(0.02, 0.04, n=2), "not resolved"),
        (None, at(0.02, 0.04), "not resolved"),
    ],
)
def test_the_rules(steps, epochs, want):
    assert verdict(steps, epochs, +1, 0.01) == want
    mirrored = [i and Interval(-i.mean, -i.high, -i.low, i.sd, i.n) for i in (steps, epochs)]
    assert verdict(*mirrored, -1, 0.01) == want


def test_error_rates_on_200_planted_sweeps(capsys):
    """An effect is found, none is not claimed, fixed steps are called a confound; the rates are printed."""
    rates = {f.id: planted.error_rates(f, 200, 3) for f in findings.FINDINGS}
    with capsys.disabled():
        print("\n" + planted.error_table(rates, 200, 3))
    for finding in findings.FINDINGS:
        for name, counts in rates[finding.id].items():
            right = planted.SCENARIOS[name][2]
            wrong = sum(n for v, n in counts.items() if v not in (*right, "not resolved"))
            assert wrong / 200 <= 0.05, (finding.id, name, counts)
            if name != "none" and not finding.id.startswith("4"):  # 4 rests on four runs a seed
                assert sum(counts[v] for v in right) / 200 >= 0.85, (finding.id, name, counts)
    four = next(f for f in findings.FINDINGS if f.id == "4")
    assert planted.error_rates(four, 50, 12)["effect"]["supported"] / 50 >= 0.9


def test_false_alarms_with_large_noise():
    """Where runs scatter far beyond the margin, nothing planted is called supported or confounded in 1 of 20 at most."""
    for finding in findings.FINDINGS:
        counts = planted.error_rates(finding, 100, 3, run_sd=0.05)["none"]
        assert (counts["supported"] + counts["confounded"]) / 100 <= 0.06, (finding.id, counts)


def two() -> findings.Finding:
    return next(f for f in findings.FINDINGS if f.id == "2")


def test_missing_runs_are_named_and_nothing_is_resolved():
    rows = planted.plant(two(), {"steps": 0.03, "epochs": 0.03}, 3, random.Random(0))
    assert evaluate_finding(two(), rows).verdict == "supported"
    gone = Cell("cosine", 0.5, 64)
    left = [r for r in rows if not (r.cell == gone and r.seed == "1" and r.budget == "epochs")]
    result = evaluate_finding(two(), left)
    assert result.verdict == "not resolved"
    assert result.missing == ["matched epochs: cosine, noise 0.5, B 64, lr 0.1, seed 1: no finished run"]
    result = evaluate_finding(two(), [r for r in rows if r.budget != "epochs"])
    assert result.verdict == "not resolved" and "matched epochs" in result.missing[0]
    assert result.intervals["steps"].n == 3


def test_a_batch_size_that_failed_everywhere_is_missed():
    """The runs that diverge at every seed are no reason to judge without their cells."""
    rows = planted.plant(two(), {"steps": 0.03, "epochs": 0.03}, 3, random.Random(0))
    failed = [r if r.cell.B < 512 else Row(r.cell, r.seed, r.budget, {}, finished=False) for r in rows]
    result = evaluate_finding(two(), failed)
    assert result.verdict == "not resolved" and result.needed is None
    assert "matched epochs: cosine, noise 0.5, B 512, lr 0.1, seed 1: no finished run" in result.missing
    scored = [Row(r.cell, r.seed, r.budget, {**r.values, "val_acc": 0.5}) if r.finished else r for r in failed]
    assert evaluate_finding(two(), findings.tuned(scored)).missing


def test_a_best_batch_size_at_an_end_of_the_tested_ones_is_no_estimate():
    three = next(f for f in findings.FINDINGS if f.id == "3")
    rows = planted.plant(three, {"steps": 1.5, "epochs": 1.5}, 3, random.Random(0))  # tops at 7 and 5.5
    assert evaluate_finding(three, rows).verdict == "supported"
    result = evaluate_finding(three, [r for r in rows if r.cell.B >= 64])
    assert result.verdict == "not resolved" and result.intervals["steps"] is not None
    assert "matched epochs, seed 2: the best batch size may lie below 64" in result.missing


def test_a_missing_series_is_named():
    rows = [Row(r.cell, r.seed, r.budget, {}) for r in planted.plant(two(), {"steps": 0.03}, 3, random.Random(0))]
    result = evaluate_finding(two(), rows)
    assert result.verdict == "not resolved" and "has no probe/memorized" in result.missing[0]


def test_two_seeds_resolve_nothing_and_say_how_many_would():
    rows = planted.plant(two(), {"steps": 0.03, "epochs": 0.03}, 2, random.Random(0))
    result = evaluate_finding(two(), rows)
    assert result.verdict == "not resolved" and result.needed >= 3
    assert evaluate_finding(two(), [r for r in rows if r.seed == "0"]).needed is None  # one seed has no spread


def test_seeds_are_not_promised_where_one_budget_would_need_too_many():
    rows = planted.plant(two(), {"steps": 0.03, "epochs": 0.0}, 2, random.Random(0))
    loud = [
        Row(r.cell, r.seed, r.budget, {"memorized": r.values["memorized"] + (2 * int(r.seed) - 1) * r.cell.B / 100})
        if r.budget == "epochs" else r
        for r in rows
    ]  # fmt: skip
    assert evaluate_finding(two(), rows).needed is not None and evaluate_finding(two(), loud).needed is None


def test_seeds_needed_hold_true():
    """With the promised number of seeds most planted sweeps are resolved."""
    rng = random.Random(5)
    few = planted.plant(two(), {"steps": 0.012, "epochs": 0.012}, 2, rng, run_sd=0.08)
    needed = evaluate_finding(two(), few).needed
    assert 4 <= needed <= 60
    many = [
        evaluate_finding(two(), planted.plant(two(), {"steps": 0.012, "epochs": 0.012}, 2 * needed, rng, run_sd=0.08))
        for _ in range(20)
    ]
    assert sum(r.verdict != "not resolved" for r in many) >= 15


def test_drift_needs_aa_runs_that_give_the_null():
    drift = findings.FINDINGS[0]
    rows = planted.plant(drift, {"steps": -0.2, "epochs": -0.2}, 3, random.Random(0))
    assert evaluate_finding(drift, rows).verdict == "supported"
    result = evaluate_finding(drift, [r for r in rows if not r.fake])
    assert result.verdict == "not resolved" and "A/A" in result.missing[0]
    biased = [
        Row(r.cell, r.seed, r.budget, {k: v - 0.2 * r.fake for k, v in r.values.items()}, fake=r.fake) for r in rows
    ]
    result = evaluate_finding(drift, biased)
    assert result.verdict == "not resolved" and "do not give the null" in result.missing[0]


def test_the_ratio_study_pairs_equal_ratios():
    values = {
        Cell("onecycle", 0.5, 64, 0.05): 0.80,
        Cell("onecycle", 0.5, 128, 0.1): 0.64,
        Cell("onecycle", 0.5, 64, 0.1): 0.1,
    }
    values |= {Cell("constant", 0.0, 64, 0.05): 0.90, Cell("constant", 0.0, 128, 0.1): 0.89}
    assert findings.ratio_gap(False)(values) == pytest.approx(0.16 - 0.01)
    assert findings.ratio_gap(True)(values) == pytest.approx(0.15)
    assert findings.lr_batch_ratio(Cell("constant", 0, 100, 0.1, 0.9), True) == pytest.approx(0.01)
    assert findings.lr_batch_ratio(Cell("onecycle", 0, 100, 0.15, 0.9), True) == pytest.approx(
        0.01
    )  # momentum 0.85 at the top
    with pytest.raises(stats.Incomplete, match="lr/B"):
        findings.ratio_gap(False)({Cell("onecycle", 0.5, 64, 0.05): 0.8})


def test_tuning_chooses_on_other_seeds():
    """Rate 0.2 is best on average; seed 0's own best is 0.1, by luck, and must not be chosen by itself."""
    acc = {("0", 0.1): 0.95, ("1", 0.1): 0.5, ("2", 0.1): 0.5, ("0", 0.2): 0.7, ("1", 0.2): 0.7, ("2", 0.2): 0.7}
    rows = [
        Row(Cell("onecycle", 0.0, 64, lr), seed, "steps", {"val_acc": v}, f"{seed}-{lr}")
        for (seed, lr), v in acc.items()
    ]
    chosen = {r.seed: r.name for r in findings.tuned(rows)}
    assert chosen["0"] == "0-0.2"
    assert chosen["1"] == "1-0.1"  # the others' mean: 0.725 at 0.1, 0.7 at 0.2
    assert len({r.cell for r in findings.tuned(rows)}) == 1
    assert findings.tuned([r for r in rows if r.seed == "0"]) == []
