"""The statistics against published and library values and against loops, the rules one by one, and both on planted sweeps."""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from benchmarks import planted
from study.analysis import judge as judging
from study.analysis import rules, runs, statistics
from study.analysis.hypotheses import BY_ID, HYPOTHESES, MARGINS
from study.analysis.judge import judge
from study.analysis.rules import NEGLIGIBLE, OPEN, OPPOSITE, TURNS, YES
from study.analysis.statistics import Line
from study.runfolders import Cell, Run
from test_figures import PLAIN

X = np.arange(4.0, 10.0)


# ----------------------------------------------------------------------------------------------------------- limits


def test_limits_are_those_of_published_and_library_tables():
    for (p, df), value in {(0.975, 2): 4.303, (0.975, 4): 2.776, (0.975, 9): 2.262, (0.95, 5): 2.015}.items():
        assert rules.t_quantile(p, df) == pytest.approx(value, abs=6e-4)
    values = np.random.default_rng(0).normal(size=(5, 2))
    m = rules.moments(values)
    for k in (0, 1):
        want = scipy_stats.ttest_1samp(values[:, k], 0).confidence_interval(0.95)
        assert [side[k] for side in m.limits(5)] == pytest.approx(list(want))
    want = scipy_stats.ttest_1samp(values[:, 0], 0).confidence_interval(1 - 0.05 / 3)
    assert m.limits(5, 3)[0][0] == pytest.approx(want.low)
    assert np.isinf(m.limits(2)).all()  # two seeds say nothing


def estimate(low: float, high: float, n: int = 5, levels=(), stretches=()) -> statistics.Estimate:
    """An estimate whose interval is [low, high] over `n` seeds; parts as (low, high), too."""
    z = np.random.default_rng(1).normal(size=n)
    z = (z - z.mean()) / z.std(ddof=1)
    column = lambda a, b, t: (a + b) / 2 + z * (b - a) / 2 * math.sqrt(n) / t  # noqa: E731
    t = rules.t_quantile(0.975, n - 1)
    parts = [np.stack([column(*p, t) for p in side], -1) if side else np.zeros((n, 0)) for side in (levels, stretches)]
    value = column(low, high, t)
    return statistics.Estimate(value, value[:, None], value[:, None], *parts)


def reading(*args, n: int = 5, direction: int = 1, negligible: bool = True, **parts) -> int:
    return int(rules.read(rules.summary(estimate(*args, n=n, **parts), direction), n, 0.01, negligible))


def test_the_readings_of_one_budget():
    for (low, high), want in {
        (0.011, 0.05): YES, (0.009, 0.05): OPEN, (0.001, 0.05): OPEN,  # beyond 0 is not beyond the margin
        (-0.009, 0.009): NEGLIGIBLE, (0.001, 0.009): NEGLIGIBLE, (-0.011, 0.005): OPEN,
        (-0.05, -0.011): OPPOSITE, (-0.05, 0.05): OPEN,
    }.items():  # fmt: skip
        assert reading(low, high) == want, (low, high)
        mirrored = {YES: OPPOSITE, OPPOSITE: YES}.get(want, want)
        assert reading(low, high, direction=-1) == mirrored
    assert reading(-0.009, 0.009, negligible=False) == OPEN
    few = estimate(0.02, 0.03, 3)
    assert rules.read(rules.summary(few), 2, 0.01) == OPEN  # as two seeds


def test_parts_that_may_speak_against_it_leave_a_reading_open():
    for side in ("levels", "stretches"):
        assert reading(0.02, 0.04, **{side: [(-0.009, 0.001)]}) == YES
        assert reading(0.02, 0.04, **{side: [(-0.011, 0.001)]}) == OPEN
        assert reading(-0.04, -0.02, **{side: [(-0.001, 0.011)]}) == OPEN
        assert reading(-0.005, 0.005, **{side: [(-0.009, 0.009), (-0.001, 0.011)]}) == OPEN
    assert reading(0.02, 0.04, stretches=[(-0.2, -0.1)]) == TURNS
    assert reading(-0.04, 0.04, stretches=[(-0.2, -0.1), (0.1, 0.2)]) == TURNS
    assert reading(-0.04, 0.04, stretches=[(-0.2, -0.011), (0.011, 0.2)]) == OPEN  # not after the correction for two
    assert reading(0.02, 0.04, levels=[(-0.2, -0.1)]) == OPEN  # levels that disagree are no turn


def test_the_verdicts():
    for a, b in itertools.product(range(5), repeat=2):
        words = {rules.verdict([a, b]), rules.verdict([b, a])}
        assert len(words) == 1 and words <= set(rules.VERDICTS)
        if {a, b} & {OPEN, TURNS}:
            assert words == {"not resolved"}
        elif a != b:
            assert words == {"depends on the budget"}
    assert [rules.verdict([c, c]) for c in rules.DEFINITE] == ["supported", "negligible", "reversed"]
    assert [rules.verdict([c]) for c in rules.DEFINITE] == ["supported", "negligible", "reversed"]  # one budget


def test_seeds_needed_are_the_first_that_settle_it():
    s = rules.summary(estimate(0.005, 0.045))
    n = rules.seeds_needed(s, 5, 0.01)
    assert rules.read(s, n, 0.01) == YES and rules.read(s, n - 1, 0.01) == OPEN and n > 5
    assert rules.seeds_needed(rules.summary(estimate(0.0, 0.02)), 5, 0.01) is None  # at the margin
    assert rules.seeds_needed(rules.summary(estimate(-0.012, 0.012)), 5, 0.01) > 5


# ------------------------------------------------------------------------------------------------------- statistics


def test_slopes_agree_with_numpy():
    rng = np.random.default_rng(0)
    a, b, without = rng.random((3, 4, 6))
    fit = lambda y: np.polyfit(X, y.T, 1)[0]  # noqa: E731
    assert statistics.slope([Line(X, a), Line(X, b)]).value == pytest.approx((fit(a) + fit(b)) / 2)
    assert statistics.lost_slope([Line(X, a, without)]).value == pytest.approx(fit(without - a))
    e = statistics.slope([Line(X, a), Line(X[2:], b[:, 2:])])  # of lines with other sizes: stretches of what both have
    assert e.value == pytest.approx((fit(a) + np.polyfit(X[2:], b[:, 2:].T, 1)[0]) / 2)
    mean = (a + b)[:, 2:] / 2
    want = [(mean[:, j] - mean[:, i]) / 3 for i in range(4) for j in range(i + 1, 4)]  # three doublings in all
    assert e.stretches == pytest.approx(np.stack(want, -1)) and e.levels.sum(-1) == pytest.approx(e.value)
    drift = statistics.relative_slope([Line(X, a + 5)])
    others = [np.delete(a + 5, s, 0).mean() for s in range(4)]
    assert drift.value == pytest.approx(fit(a) / others)


def test_the_gap_at_equal_ratio_is_that_which_noise_adds():
    noisy, clean = np.array([[0.8, 0.6]] * 3), np.array([[0.9, 0.85]] * 3)
    assert statistics.ratio_gap([Line(np.array([6.0, 7.0]), noisy, clean)]).value == pytest.approx([0.15] * 3)


def test_the_cost_of_the_largest_batch_by_loops():
    rng = np.random.default_rng(2)
    noisy, clean = rng.random((2, 4, 5))
    e = statistics.cost_of_largest([Line(X[:5], noisy, clean)])
    for s in range(4):
        best = {id(y): np.delete(y, s, 0).mean(0).argmax() for y in (noisy, clean)}
        cost = {k: y[s, best[k]] - y[s, -1] for k, y in ((id(noisy), noisy), (id(clean), clean))}
        assert e.value[s] == pytest.approx(cost[id(noisy)] - cost[id(clean)])
        assert e.below[s] == pytest.approx([cost[id(noisy)] - (clean[s, b] - clean[s, -1]) for b in range(5)])
        assert e.above[s] == pytest.approx([noisy[s, b] - noisy[s, -1] - cost[id(clean)] for b in range(5)])
    two = statistics.cost_of_largest([Line(X[:5], noisy, clean), Line(X[:5], clean, noisy)])
    assert two.value == pytest.approx([0] * 4) and two.below.shape[-1] == 25 and two.tests == 2


def test_the_moving_best_size_by_loops():
    rng = np.random.default_rng(3)
    noisy, clean = rng.random((2, 4, 5))
    actual = statistics.leads(Line(X[:5], noisy, clean))
    for s in range(4):
        c_rest, n_rest = (np.delete(y, s, 0).mean(0) for y in (clean, noisy))
        gaps = {c: min(max(c_rest[c:]) - max(c_rest[:c]), max(n_rest[:c]) - max(n_rest[c:])) for c in range(1, 5)}
        c = max(gaps, key=gaps.get)
        large, small = c + c_rest[c:].argmax(), n_rest[:c].argmax()
        want = [clean[s, large] - clean[s, b] if b < c else noisy[s, small] - noisy[s, b] for b in range(5)]
        assert actual[s] == pytest.approx(want)
    shift = np.full((3, 5), 0.5) + 0.1 * np.eye(5)[3], np.full((3, 5), 0.5) + 0.1 * np.eye(5)[1]
    moved, back = (statistics.best_moves([Line(X[:5], b, a)]) for a, b in (shift, shift[::-1]))
    assert moved.below.min() == pytest.approx(0.1) and back.above.max() == pytest.approx(-0.1)


# --------------------------------------------------------------------------------------------------- planted sweeps


@pytest.mark.parametrize("id", planted.WORLDS)
def test_verdicts_on_planted_sweeps(id):
    """At most one in twenty is wrong, and an effect of three margins is found; `benchmarks/planted.py` has all worlds."""
    h, rng = BY_ID[id], np.random.default_rng(0)
    curves = planted.curves_of(h, planted.WORLDS[id][planted.first_world(id)])
    r = planted.rates(h, list(curves.values()), 5, 0.01, "normal", 400, rng)
    assert r.wrong() <= 0.05
    found = planted.rates(h, [curves[3.0]], 5, 0.003, "normal", 400, rng)
    assert found.true == [YES] and found.right[0] >= 0.95


@pytest.mark.parametrize(("id", "world"), [("2", "V"), ("5", "V-shaped cost"), ("2", "levels disagree")])
def test_a_turn_and_levels_that_disagree_are_no_slope(id, world):
    """By the slope alone each of these would be negligible in nearly every sweep."""
    h, rng = BY_ID[id], np.random.default_rng(0)
    curves = planted.curves_of(h, planted.WORLDS[id][world])
    assert planted.rates(h, [curves[0.0]], 10, 0.003, "normal", 200, rng).definite[0] <= 0.02
    slope_alone = dataclasses.replace(h, estimate=lambda lines: statistics.of_lines(h.estimate(lines).value[..., None]))
    assert planted.rates(slope_alone, [curves[0.0]], 10, 0.003, "normal", 200, rng).definite[0] >= 0.9


def test_a_best_size_that_chance_chooses_is_no_cost():
    """Sizes that are alike but for the largest, which costs 0.9 margins: taken at the best of the other seeds alone, yes is said too often."""
    h, rng = BY_ID["3"], np.random.default_rng(0)
    curves = planted.curves_of(h, planted.ACCURACY["plateau, falls at its end"])[0.9]

    def alone(lines: list[Line]) -> statistics.Estimate:
        e = statistics.cost_of_largest(lines)
        return e._replace(below=e.value[..., None], above=e.value[..., None], tests=1)

    wrong = [
        (planted.readings(rule, curves, 10, 0.03, "normal", 2000, rng) == YES).mean()
        for rule in (h, dataclasses.replace(h, estimate=alone))
    ]
    assert wrong[0] <= 0.01 and wrong[1] >= 0.04


# -------------------------------------------------------------------------------------------------- from the table


def sweep(
    effect: float = 3.0, id: str = "5", seeds: int = 5, sd: float = 0.002, seed: int = 0, **curves
) -> pd.DataFrame:
    """The table of runs of a planted sweep with the same effect under both budgets."""
    h = BY_ID[id]
    of = planted.curves_of(h, planted.WORLDS[id][planted.first_world(id)])
    both = {"steps": of[curves.get("steps", effect)], "epochs": of[curves.get("epochs", effect)]}
    return planted.frame(both, h.needs, seeds, sd, 0.0, np.random.default_rng(seed))


def at(frame: pd.DataFrame, **where) -> pd.Series:
    return np.logical_and.reduce([frame[k] == v for k, v in where.items()])


def test_every_verdict_from_a_table():
    five = BY_ID["5"]
    assert judge(five, sweep(3.0)).verdict == "supported"
    assert judge(five, sweep(-3.0)).verdict == "reversed"
    assert judge(five, sweep(0.0)).verdict == "negligible"
    result = judge(five, sweep(steps=3.0, epochs=0.0))
    assert result.verdict == "depends on the budget" and result.rate == "at lr 0.1" and not result.missing
    assert (result.readings["steps"].word, result.readings["epochs"].word) == ("yes", "negligible")
    steps = result.readings["steps"]
    assert steps.low < steps.mean < steps.high < 0 and steps.n == 5  # accuracy lost: claimed below 0
    assert set(steps.levels) == {"onecycle, noise 0.2", "onecycle, noise 0.5"}
    assert np.mean([level.mean for level in steps.levels.values()]) == pytest.approx(steps.mean)
    only = judge(five, sweep()[lambda f: f["budget"] == "steps"])
    assert only.verdict == "not resolved" and only.missing == ["matched epochs: no run"]
    assert only.readings["steps"].word == "yes"
    two = judge(five, sweep(seeds=2))
    assert two.verdict == "not resolved" and two.readings["steps"].n == 2


def test_complete_seeds_are_judged_and_the_others_named():
    frame = sweep()
    gone = at(frame, seed=3, B=64, noise=0.5, budget="steps")
    frame.loc[gone, ["val_acc", "status"]] = (np.nan, "failed")
    result = judge(BY_ID["5"], frame)
    assert result.verdict == "supported" and (result.readings["steps"].n, result.readings["epochs"].n) == (4, 5)
    assert result.readings["steps"].incomplete == ["seed 3 lacks onecycle, noise 0.5, B 64, lr 0.1 (failed)"]
    without = judge(BY_ID["5"], frame[~gone])
    assert without.readings["steps"].incomplete == ["seed 3 lacks onecycle, noise 0.5, B 64, lr 0.1 (no run)"]
    assert without.readings["steps"].mean == result.readings["steps"].mean


def test_a_cell_that_most_seeds_lack_is_left_out_by_name():
    """The probe does not fit into runs at B = 16: the finding is about the other sizes."""
    frame = sweep(id="2")
    frame.loc[at(frame, B=16, noise=0.5), "memorized_excess"] = np.nan
    reading = judge(BY_ID["2"], frame).readings["steps"]
    assert reading.n == 5 and "left out" in reading.notes[0] and "noise 0.5, B 16" in reading.notes[0]
    frame["memorized_excess"] = np.nan
    assert judge(BY_ID["2"], frame).missing[0] == "the report's steps: no run with noise has probe/memorized_excess"
    only_noisy = sweep()[lambda f: f["noise"] > 0]
    assert "needs two batch sizes, each at one rate, with noise and without" in judge(BY_ID["5"], only_noisy).missing[0]


def test_runs_at_chance_and_at_the_ceiling_are_said():
    frame = sweep()
    frame.loc[at(frame, B=16, noise=0.5), "at_chance"] = True
    notes = judge(BY_ID["5"], frame).readings["steps"].notes
    assert notes == ["never learned (at chance at the end): onecycle, noise 0.5, B 16, lr 0.1: 5 runs"]
    frame = sweep(id="2")
    frame.loc[at(frame, B=512, seed=1), "memorized"] = 0.97
    assert (
        "memorized over 0.95: onecycle, noise 0.2, B 512, lr 0.1: 1 run; "
        in judge(BY_ID["2"], frame).readings["steps"].notes[0]
    )


def test_what_all_seeds_share_is_said():
    frame = sweep()
    assert judge(BY_ID["5"], frame).shared == []
    result = judge(BY_ID["5"], frame.assign(split_seed=0, noise_seed=0))
    assert result.verdict == "supported" and result.shared == ["one draw of the noise", "one split"]
    alone = frame[frame["seed"] == 0]
    assert judge(BY_ID["5"], alone).shared == []  # a single seed shares nothing


def test_crossed_seeds_are_pooled_and_have_to_agree():
    """Nine runs of three seeds and three noise seeds are three units, by either."""
    parts = [sweep(seeds=3, seed=k).assign(noise_seed=k, split_seed=0) for k in range(3)]
    frame = pd.concat(parts, ignore_index=True)
    result = judge(BY_ID["5"], frame)
    assert result.verdict == "supported" and result.readings["steps"].n == 3 and result.shared == ["one split"]
    assert result.readings["steps"].notes == [
        "the grid crosses seeds; pooled over one after the other: yes of 3, yes of 3"
    ]
    odd = frame["val_acc"] + 0.2 * ((frame["noise_seed"] == 1) & (frame["B"] == 512) & (frame["noise"] > 0))
    result = judge(BY_ID["5"], frame.assign(val_acc=odd))  # one draw of the noise says something else
    assert result.verdict == "not resolved" and "yes of 3" in result.readings["steps"].notes[0]
    missing = frame[~at(frame, seed=1, noise_seed=1, B=64, budget="steps")]
    assert any("seed 1 lacks" in line for line in judge(BY_ID["5"], missing).readings["steps"].incomplete)


def ratio_runs(gap: float, momenta=(0.9,)) -> pd.DataFrame:
    """Pairs of equal lr/B, the smaller ahead by `gap` with noise alone; a third size between them that does not count."""
    rng, rows = np.random.default_rng(0), []
    cells = itertools.product(
        ("constant", "onecycle"),
        ("steps", "epochs"),
        momenta,
        range(5),
        (0.0, 0.5),
        ((32, 0.025), (64, 0.05), (128, 0.1), (64, 0.1)),
    )
    for sched, budget, momentum, seed, noise, (B, lr) in cells:
        acc = (
            0.8
            + 0.05 * (B == 128)
            + gap * (B == 32 and noise > 0)
            + 0.001 * rng.standard_normal()
            - 0.3 * (lr == 0.1 and B == 64)
        )
        row = {
            "sched": sched,
            "noise": noise,
            "B": B,
            "lr": lr,
            "momentum": momentum,
            "fake": 0.0,
            "val_acc": acc,
            "status": "finished",
        }
        row |= {"seed": seed, "noise_seed": seed, "split_seed": seed, "at_chance": False, "memorized": np.nan}
        rows.append(row | {"budget": "any" if sched == "constant" else budget})
    frame = pd.DataFrame(rows)
    return frame[
        (frame["budget"] != "any") | ~frame.duplicated(["sched", "noise", "B", "lr", "momentum", "seed", "budget"])
    ]


def test_equal_ratio_with_and_without_a_schedule():
    for gap, want in ((0.05, "supported"), (-0.05, "reversed"), (0.0, "negligible")):
        for id in ("4", "4c"):
            result = judge(BY_ID[id], ratio_runs(gap))
            assert result.verdict == want, (id, gap)
            assert all(r.mean == pytest.approx(gap, abs=2e-3) for r in result.readings.values())
    assert set(judge(BY_ID["4c"], ratio_runs(0.05)).readings) == {"any"}
    assert judging.one_momentum(ratio_runs(0.0))
    two = ratio_runs(0.0, (0.9, 0.8))
    assert not judging.one_momentum(two) and judging.one_momentum(two[two["sched"] == "onecycle"])  # it has its own
    rows = ((64, 0.1, 0.9), (128, 0.4, 0.8), (256, 0.4, 0.9))
    cells = [("cosine", noise, *row) for noise in (0.0, 0.5) for row in rows]
    assert [[c[2] for c in line] for line in judging.lines_of(BY_ID["4m"], cells).values()] == [[64, 256]]
    apart = [c for c in cells if c[2] < 256]
    assert [[c[2] for c in line] for line in judging.lines_of(BY_ID["4m"], apart).values()] == [[64, 128]]
    assert not judging.lines_of(BY_ID["4"], apart)
    assert [[c[2] for c in line] for line in judging.lines_of(BY_ID["4"], cells).values()] == [[64, 256]]
    assert runs.lr_batch_ratio(Cell("constant", 0.5, 100, 0.1, 0.9), True) == pytest.approx(0.01)
    assert runs.lr_batch_ratio(Cell("onecycle", 0.5, 100, 0.15, 0.9), True) == pytest.approx(0.01)  # 0.85 at its top


def test_no_claim_is_judged_by_another_claims_runs():
    frame = sweep()
    for h in HYPOTHESES:
        result = judge(h, frame)
        if not h.scheduled:
            assert result.verdict == "not resolved" and result.missing == ["no run that the claim speaks of"]
        elif h.pairs:
            assert "needs batch sizes of equal" in result.missing[0]
        else:
            assert result.readings if h.needs == "val_acc" else "no run with noise has" in result.missing[0]
    assert not judge(BY_ID["5"], frame.assign(fake=0.5)).readings


# ------------------------------------------------------------------------------------------------- the table itself


def made(name: str, series: dict[str, tuple], resolved: dict | None = None, status: str = "finished", **opts) -> Run:
    known = {
        "sched_steps": 100,
        "total_steps": 100,
        "steps_per_epoch": 50,
        "val_examples": 1000,
        "classes": list("abcdefghij"),
    }
    as_arrays = {tag: (np.array(steps), np.array(values, float)) for tag, (steps, values) in series.items()}
    return Run(
        name,
        PLAIN | {"sched": "onecycle", "noise": 0.5} | opts,
        known | (resolved or {}),
        {"status": status},
        as_arrays,
        "here",
    )


def test_the_mean_over_a_schedule_does_not_depend_on_how_often_it_is_measured():
    of = lambda steps: made("a", {"grad/difference": (steps, [64 * (1 + s / 100) for s in steps])}, bs=64)  # noqa: E731
    dense, uneven = of(range(0, 100, 2)), of([0, 1, 2, 3, 4, 50, 98])
    assert runs.difference_per_B(dense) == pytest.approx(1.49) == runs.difference_per_B(uneven)  # of 1 + share, to 0.98
    assert runs.difference_per_B(of([40])) == pytest.approx(1.4)
    assert runs.difference_per_B(made("a", {})) is None
    after = made(
        "a", {"grad/difference": ([0, 50, 99, 150], [64, 64, 64, 6400])}, bs=64
    )  # weights stand still after 100
    assert runs.difference_per_B(after) == pytest.approx(1.0)


def test_dimension_is_beside_that_of_clean_sampling_noise():
    noisy = {"isotropy/dimension": ([0, 50, 100], [9.0, 8.0, 2.0])}
    assert runs.table([made("a", noisy)])["log_dimension_ratio"].isna().all()
    both = noisy | {"isotropy/clean_dimension": ([0, 50, 100], [1.0, 4.0, 4.0])}
    assert runs.table([made("a", both)])["log_dimension_ratio"].item() == pytest.approx(0.0)  # log 2 and log 1/2


def test_at_chance_is_what_guessing_gives():
    for n, correct in ((1000, 100), (1000, 128), (1000, 130), (600, 60), (600, 79), (10000, 1000), (10000, 1095)):
        run = made("a", {"val/acc": ([100], [correct / n])}, {"val_examples": n})
        p = scipy_stats.binomtest(correct, n, 0.1, alternative="greater").pvalue
        assert runs.at_chance(run) == (p > 0.001), (n, correct)
    assert not runs.at_chance(made("a", {"val/acc": ([100], [0.1])}, status="failed"))
    assert not runs.at_chance(made("a", {"val/acc": ([100], [0.1])}, {"classes": None}))


def test_the_same_computation_counts_once():
    acc = {"val/acc": ([50, 100], [0.3, 0.4])}
    two = [
        made("steps", acc, sched_steps=100),
        made("epochs", acc, sched_epochs=2),
        made("other", acc, sched_epochs=2, seed=1),
    ]
    table = runs.table([*two, made("longer", acc, {"sched_steps": 200}), made("noisier", acc, noise=0.2)])
    assert table["copies"].tolist() == ["", "steps", "", "", ""]
    assert table["budget"].tolist()[:2] == ["steps", "epochs"]  # and stand for both budgets


def test_an_unfinished_run_has_no_values():
    table = runs.table([made("a", {"val/acc": ([50], [0.3])}, status="failed")])
    assert table["val_acc"].isna().all() and table["status"].item() == "failed"


def test_the_best_rate_is_that_of_the_other_seeds():
    """Seed 0's own best is 0.1, by luck, and must not be chosen by itself."""
    acc = {(0, 0.1): 0.95, (1, 0.1): 0.5, (2, 0.1): 0.5, (0, 0.2): 0.7, (1, 0.2): 0.7, (2, 0.2): 0.7}
    table = runs.table([made(f"{s}-{lr}", {"val/acc": ([100], [v])}, seed=s, lr=lr) for (s, lr), v in acc.items()])
    chosen = runs.tuned(table)
    assert dict(zip(chosen["seed"], chosen["name"])) == {0: "0-0.2", 1: "1-0.1", 2: "2-0.1"}  # 0.725 against 0.7
    assert set(chosen["lr"]) == {0.0} and judging.rate_words(chosen) == "at each cell's tuned rate"
    assert runs.tuned(table[table["seed"] == 0]).empty
    failed = runs.table([made("f", {}, status="failed", bs=32, noise=0.2)])
    assert (
        runs.tuned(pd.concat([table, failed]))["name"].tolist()[-1] == "f"
    )  # a cell without any finished run is missed


def test_every_claim_is_written_down():
    text = (planted.Path(planted.__file__).parents[1] / "docs/findings.md").read_text()
    assert len(BY_ID) == len(HYPOTHESES) and {h.margin for h in HYPOTHESES} == set(MARGINS)
    assert all(h.needs in runs.VALUES and h.direction in (1, -1) for h in HYPOTHESES)
    for name in (*rules.VERDICTS, *rules.READINGS):
        assert f"*{name}*" in text or f"| {name} |" in text, name
    for h in HYPOTHESES:
        assert f"| {h.id} " in text, h.id
