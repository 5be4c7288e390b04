"""Runs that end with their schedule (`--end schedule`): the same weights, the same figures and findings as the whole run's."""

import json

import numpy as np
import pytest
import torch

from conftest import series, summary, weights
from engine import identity, options
from study import figures, manyruns, runfolders, runvalues
from study.analysis import runs as analysis
from study.drawing import TAIL, Look
from test_figures import accuracy, caption, made

SCHED = ("--noise", "0.5", "--sched", "cosine", "--sched-steps", "7", "--epochs", "4")  # 5 steps an epoch


def statistics(name: str) -> bool:
    """Whether a tensor of the network is BatchNorm's own account, which moves at a rate of 0 too."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def options_of(*argv: str):
    return options.parse(["--dataset", "synthetic", *argv])


@pytest.fixture
def pair(go):
    """The folders of a run that ends with its cosine schedule and of the whole one."""
    return go(*SCHED, "--end", "schedule", name="ended"), go(*SCHED, name="whole")


def test_the_weights_are_those_of_the_whole_run(capsys, pair):
    ended, whole = (weights(folder) for folder in pair)
    apart = {name for name in whole if not torch.equal(ended[name], whole[name])}
    assert apart and all(map(statistics, apart))
    assert [summary(folder)["steps"] for folder in pair] == [7, 20]
    points = series(pair[0])
    assert [step for step, _ in points["val/acc"]] == [0, 5, 7] and [step for step, _ in points["test/acc"]] == [7]
    assert summary(pair[0])["status"] == "finished" and summary(pair[0])["test_acc"] is not None
    resolved = json.loads((pair[0] / "config.json").read_text())["resolved"]
    assert (resolved["total_steps"], resolved["whole_steps"]) == (7, 20)
    result = capsys.readouterr().out.splitlines()
    told = [line for line in result if line.startswith("schedule: ")]
    assert told[0].endswith(
        "exactly the schedule; --end schedule leaves out the 13 steps (2.6 epochs) that would follow, at lr 0"
    )
    assert "--end" not in told[1]


@pytest.mark.slow
def test_what_is_measured_until_then_is_the_same(pair):
    ended, whole = map(series, pair)
    for tag in ("train/loss", "grad/cos_clean_noisy", "null/permuted_cos_clean_noisy", "optim/lr"):
        assert ended[tag] == [(step, value) for step, value in whole[tag] if step < 7]


@pytest.mark.slow
def test_figures_and_findings_take_it_for_the_whole_run(pair):
    ended, whole = map(runfolders.read_folder, pair)
    assert ended.setting == whole.setting and (ended.cell, ended.budget, ended.length) == (whole.cell, "steps", 7)
    assert (ended.left_out, whole.left_out) == (13, 0)
    both = [analysis.row(run) for run in (ended, whole)]
    assert both[0]["cos_minus_null"] == both[1]["cos_minus_null"]
    measured = [{name for name in analysis.VALUES if row[name] == row[name]} for row in both]
    assert measured[0] == measured[1] >= {"val_acc", "cos_minus_null"}
    assert manyruns.schedule_text([ended]) == "100%, ended with it" and "then 65% at its end" in manyruns.schedule_text(
        [whole]
    )
    axis = figures.curves("t", [ended], "val/acc", Look()).axes[0]
    (tail,) = (line for line in axis.get_lines() if line.get_label() == TAIL)
    assert tail.get_xdata().tolist() == [7, 20] and len(set(tail.get_ydata())) == 1


def test_means_are_those_of_the_steps_that_train():
    opts = {"sched": "cosine", "sched_steps": 250, "noise": 0.5}
    cosines = {step: float(step < 250) for step in range(0, 1000, 50)}
    run = made("a", {"grad/cos_clean_noisy": cosines, "null/cos_clean_noisy": dict.fromkeys(cosines, 0.0)}, **opts)
    run.resolved |= {"sched_steps": 250, "total_steps": 1000}
    assert analysis.cosine_minus_null(run) == 1
    of_epochs = np.array([0, 100, 200, 300, 400])
    assert of_epochs[runvalues.while_trained(run, of_epochs, of_epochs=True)].tolist() == [100, 200, 300]
    late = np.array([300, 600])  # nothing was measured before: better than nothing
    assert runvalues.while_trained(run, late).all()
    run.options["sched"] = "constant"
    assert runvalues.while_trained(run, of_epochs).all()


@pytest.mark.parametrize(("x", "end"), [("steps", 1000), ("epochs", 10), ("examples", 16000)])
def test_lines_go_on_flat_to_where_the_epochs_would_have_ended(x, end):
    runs = [made(f"s{s}", accuracy(0.1, 0.4, 0.5 + s / 10), sched="cosine", sched_steps=200, seed=s) for s in (0, 1)]
    for run in runs:
        run.resolved |= {"sched_steps": 200, "total_steps": 200, "whole_steps": 1000}

    def tails(*of) -> list:
        drawn = figures.curves("t", list(of), "val/acc", Look(x=x))
        actual = [line for line in drawn.axes[0].get_lines() if line.get_label() == TAIL]
        return [(line.get_xdata()[-1], pytest.approx(line.get_ydata()[0])) for line in actual], caption(drawn)

    drawn, result = tails(*runs)
    assert (
        drawn == [(end, 0.55)] and "2 runs ended with their schedule, flat dashes: as they would have gone on" in result
    )
    whole = made("whole", {"val/acc": {100 * i: 0.5 for i in range(11)}}, sched="cosine", sched_steps=200, seed=1)
    whole.resolved |= {"sched_steps": 200, "total_steps": 1000, "whole_steps": 1000}
    assert len(tails(runs[0], whole)[0]) == 1
    runs[0].summary["status"] = "running"
    assert tails(runs[0]) == ([], caption(figures.curves("t", [runs[0]], "val/acc", Look(x=x))))
    assert "ended with" not in tails(runs[0])[1]


def test_a_line_goes_on_at_what_its_last_values_are():
    """The average of single batches lags behind them."""
    rising = {"train/acc_noisy": {2 * i: i / 100 for i in range(100)}}
    run = made("a", rising, sched="cosine", sched_steps=200, noise=0.5)
    run.resolved |= {"sched_steps": 200, "total_steps": 200, "whole_steps": 1000}
    axis = figures.curves("t", [run], "train/acc_noisy", Look()).axes[0]
    (tail,) = (line for line in axis.get_lines() if line.get_label() == TAIL)
    assert tail.get_ydata()[0] == pytest.approx(0.945)  # of 0.90 to 0.99


def test_a_constant_rate_has_no_other_end():
    args = options_of("--end", "schedule")
    assert args.end == "epochs" and args.name == options_of().name
    named = options_of("--sched", "cosine", "--end", "schedule")
    assert "end-schedule" in named.name and options.run_steps(named, 100) == (5000, 6400)
    assert options.run_steps(options_of("--sched", "cosine"), 100) == (6400, 6400)
    short = options_of("--sched", "cosine", "--end", "schedule", "--max-steps", "30", "--sched-epochs", "1")
    assert options.run_steps(short, 40) == (30, 30) and options.run_steps(short, 20) == (20, 30)


@pytest.mark.slow
def test_a_run_may_go_on_after_its_schedule_but_not_the_other_way_round(go, pair):
    ended, whole = pair
    go(*SCHED, "--end", "epochs", "--resume", name="ended")
    assert series(ended) == series(whole) and all(torch.equal(weights(ended)[k], v) for k, v in weights(whole).items())
    first, now = options_of(*SCHED), options_of(*SCHED, "--end", "schedule")
    identity.continue_from(first, {"options": vars(now)})
    with pytest.raises(options.InputError, match=r"--end was epochs and is schedule now \(it may only grow\)"):
        identity.continue_from(now, {"options": vars(first)})


@pytest.mark.slow
def test_more_steps_and_more_epochs_end_with_the_schedule_too(go, pair):
    for name, few, more in (("a", ("--max-steps", "3"), ("--max-steps", "19")), ("b", ("--epochs", "1"), ())):
        short = go(*SCHED, "--end", "schedule", *few, name=name)
        assert summary(short)["steps"] < 7
        go(*SCHED, "--end", "schedule", *more, "--resume", name=name)
        assert series(short) == series(pair[0]) and torch.equal(
            weights(short)["linear.weight"], weights(pair[0])["linear.weight"]
        )
