"""What a first run does by itself: precision by the processor, random masks beside the split, the probe, the line on the
schedule, and the warning where cores are taken."""

import json
from types import SimpleNamespace

import pytest
import torch

import epochwise
import gradsplit
import measure
import schedules
import train
from conftest import same_weights, series, slow, summary
from engine import hardware, identity, options, pace
from gradsplit import batchnorm_mode
from measure import batch_gradient
from study import manyruns, runfolders, runvalues
from test_metrics import default_dtype, job_for, warm  # noqa: F401

# ------------------------------------------------------------------------------------------------------------- precision

CHECKS = list(hardware.CPU_FEATURES.values())  # from AMX down


@pytest.mark.parametrize(
    ("features", "precision", "named"),
    [
        (CHECKS, "bf16-mixed", ["AMX", "AVX512-BF16", "AVX-512", "AVX2"]),
        (CHECKS[1:], "32-true", ["AVX512-BF16", "AVX-512", "AVX2"]),
        (CHECKS[3:], "32-true", ["AVX2"]),
        ([], "32-true", []),
    ],
)
def test_bf16_on_a_cpu_with_amx_alone(monkeypatch, features, precision, named):
    for check in CHECKS:
        monkeypatch.setattr(torch.cpu, check, lambda check=check: check in features)
    args = options.parse("--dataset synthetic --accelerator cpu".split())
    hardware.resolve(args)
    assert (args.precision, hardware.cpu_features()) == (precision, named)


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 5), "32-true"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")]
)
def test_bf16_on_a_gpu_from_capability_8(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    args = options.parse("--dataset synthetic".split())
    hardware.resolve(args)
    assert (args.accelerator, args.precision) == ("cuda", precision)


# ---------------------------------------------------------------------------------------------------------- random masks


def test_the_masks_cost_what_is_promised():
    cost = lambda words: measure.split_share(options.parse(words.split()))  # noqa: E731
    assert cost("") == pytest.approx(0.02)  # 2F of the split and half of 2F, of 50 steps of 3F
    assert cost("--permutations 0") == pytest.approx(2 / 150)
    assert cost("--permutations 2 --null-every 1 --measure-every 10") == pytest.approx(6 / 30)


@pytest.mark.parametrize("mode", ["train", *slow("eval", "separate")])
def test_masks_of_the_split_are_those_of_a_full_measurement(mode):
    """The split reads its nulls off one Gram matrix, on the device; `measure.permuted_values` pulls back mask after mask."""
    job = job_for("--precision", "64-true", "--permutations", "3", "--null-every", "1", "--measure-bn", mode)
    batch = warm(job)
    with batchnorm_mode(job.module, mode):
        ahead = measure.make_forward(job.context, batch)
        own = batch_gradient(job.context, batch)[0] if mode == "separate" else None
        rows = gradsplit.split_rows(job.context, batch, ahead, free=False)
        want = measure.permuted_values(job.context, batch, 6, ahead, own or gradsplit.add_rows(rows))
        _, got = measure.measure_split(job.context, batch, 6, ahead, own, free=False)
    assert len(want) == 4
    for tag, value in want.items():
        assert float(got[tag]) == pytest.approx(value, rel=1e-9), tag


def test_masks_need_both_sets_and_their_turn():
    args = options.parse("--measure-every 10 --null-every 3".split())
    batch = lambda n: SimpleNamespace(size=32, n_noisy=n)  # noqa: E731
    assert [step for step in range(0, 100, 10) if measure.masks_due(args, step, batch(5))] == [0, 30, 60, 90]
    assert not any(measure.masks_due(args, 0, batch(n)) for n in (0, 32))
    assert not measure.masks_due(options.parse("--permutations 0".split()), 0, batch(5))


def test_the_forward_is_freed_with_its_last_mask():
    job = job_for()
    batch = warm(job)
    ahead = measure.make_forward(job.context, batch)
    rows, values = measure.measure_split(job.context, batch, 0, ahead, None, free=True)
    assert len(rows) == 2 and "null/permuted_cos_clean_noisy" in values
    with pytest.raises(RuntimeError, match="second time"):
        ahead.row(batch.y, ~batch.noisy)


@pytest.mark.slow
def test_masks_and_probe_leave_no_trace(go, capsys):
    """The same bits with and without; series where they are due, and the line that says so."""
    with_masks = go("--noise", "0.5", "--measure-budget", "1", name="with")
    result = capsys.readouterr().out
    without = go("--noise", "0.5", "--permutations", "0", "--measure-budget", "0", name="without")
    assert same_weights(with_masks, without)
    actual, plain = series(with_masks), series(without)
    for name in ("all", "noisy"):
        assert [s for s, _ in actual[f"null/permuted_cos_clean_{name}"]] == [0, 4, 8]
        assert [s for s, _ in actual[f"grad/cos_clean_{name}"]] == [0, 2, 4, 6, 8]
        assert all(-1 <= v <= 1 for _, v in actual[f"null/permuted_cos_clean_{name}"])
    assert [s for s, _ in actual["probe/memorized"]] == [0, 5, 10]
    assert not any(tag.startswith(("null/", "probe/")) for tag in plain)
    assert dict(actual["grad/cos_clean_all"]) == pytest.approx(dict(plain["grad/cos_clean_all"]), abs=1e-6)
    assert "every 2 steps, 1 random mask every 4; 50.0% of the steps, counted; probe every epoch" in result
    assert "half_memorized_step" in summary(with_masks)


def test_the_probe_of_a_split_stays_within_its_budget():
    """CIFAR-10 for 64 epochs: 40,000 images trained on, 10,000 evaluated, 4,000 probed; 1 % by default."""
    args = options.parse(["--dataset", "synthetic"])
    plan = epochwise.plan_split(args, 4000, epochwise.RunLength(64 * 313, 313, 128, 40_000, 10_000))
    assert plan["probe"] == 4 and 0.005 < plan["share"] <= 0.01
    short = epochwise.RunLength(8 * 125, 125, 64, 8000, 2000)
    assert epochwise.plan_split(args, 4000, short) == {}  # not even one
    args.measure_budget = 0.3
    assert epochwise.plan_split(args, 4000, short)["probe"] == 1


# ------------------------------------------------------------------------------------------------------------- identity


def test_runs_without_masks_resume_and_compare_as_before():
    """A run started before masks came with the split has `permutations: 4` in its options, which did nothing."""
    words = ["--dataset", "synthetic", "--noise", "0.5"]
    old = vars(options.parse(words)) | {"permutations": 4, "measure_budget": 0.05, "threads": 1}
    del old["null_every"]
    assert identity.differences(old, vars(options.parse(words))) == {}
    for config in (old, vars(options.parse([*words, "--permutations", "0", "--measure-budget", "0"]))):
        args = options.parse(words)
        identity.continue_from(args, {"options": config | {"threads": 1}})
        assert (args.permutations, args.measure_budget) == (0, 0.0)
        with pytest.raises(train.InputError, match="--permutations was 0 and is 3 now"):
            identity.continue_from(options.parse([*words, "--permutations", "3"]), {"options": config | {"threads": 1}})
    full = [*words, "--measure", "full"]
    assert set(
        identity.differences(vars(options.parse(full)), vars(options.parse([*full, "--permutations", "2"])))
    ) == {"permutations"}
    spelled_out = [*words, "--permutations", "1", "--null-every", "2", "--measure-budget", "0.01"]
    assert options.parse(spelled_out).name == options.parse(words).name
    assert options.parse([*full, "--permutations", "4", "--measure-budget", "0.05"]).name == options.parse(full).name


# ------------------------------------------------------------------------------------------------------------- schedule


def test_what_a_run_sees_of_its_schedule():
    headline = schedules.span("onecycle", 5000, 2560, 40)
    assert headline == {
        **{"name": "onecycle", "run_steps": 2560, "run_epochs": 64, "sched_steps": 5000, "sched_epochs": 125},
        **{"fraction_seen": 0.512, "share_at_end": 0},
    }
    last = schedules.schedule("onecycle", 2559, 5000, 0.1, 0.9)[0]
    line, warning = schedules.describe_span(headline, 0.1, last)
    assert (
        line
        == "schedule: onecycle over 5,000 steps (125 epochs); the run makes 2,560 steps (64 epochs): 51% of the schedule"
    )
    assert "cut short" in warning and "--sched-epochs 64 fits" in warning and f"lr {last:.3g}" in warning
    held = schedules.span("cosine", 5000, 20_000, 313)
    assert (held["fraction_seen"], held["share_at_end"]) == (1, 0.75)
    line, warning = schedules.describe_span(held, 0.1, 0.0)
    assert "then 75% of the run at its last lr, 0" in line and warning is None
    assert "--sched-steps 100 fits" in schedules.describe_span(schedules.span("cosine", 400, 100, 70), 0.1, 0.08)[1]
    assert schedules.describe_span(schedules.span("cosine", 400, 400, 70), 0.1, 0.0)[0].endswith("exactly the schedule")
    line, warning = schedules.describe_span(schedules.span("constant", 5000, 100, 50), 0.1, 0.1)
    assert line == "schedule: constant, lr 0.1 for all 100 steps (2 epochs)" and warning is None


def test_shares_never_round_to_nothing_or_all():
    assert [schedules.percent(x) for x in (0, 0.002, 0.5, 0.997, 0.99999, 1)] == [
        "0%",
        "0.2%",
        "50%",
        "99.7%",
        "99.9%",
        "100%",
    ]


def test_the_schedule_is_stated_on_screen_in_config_and_report(go, capsys):
    folder = go("--noise", "0.5", "--sched", "onecycle", "--epochs", "1")
    out, err = capsys.readouterr()
    assert "schedule: onecycle over 5,000 steps (1000 epochs); the run makes 5 steps (1 epoch): 0.1% of" in out
    assert "warning: --sched onecycle is cut short" in err
    resolved = json.loads((folder / "config.json").read_text())["resolved"]
    assert resolved["schedule"] == schedules.span("onecycle", 5000, 5, 5)
    assert resolved["cpu_features"] == hardware.cpu_features()
    run = runfolders.read_folder(folder)
    assert runvalues.schedule_shares(run) == (0.001, 0.0)
    del run.resolved["schedule"]  # as a run of an earlier version
    assert runvalues.schedule_shares(run) == (0.001, 0.0)
    assert manyruns.schedule_text([run]) == "0.1%"
    run.resolved |= {"total_steps": 20_000}
    assert manyruns.schedule_text([run]) == "100%, then 75% at its end"
    run.options["sched"] = "constant"
    assert runvalues.schedule_shares(run) is None and manyruns.schedule_text([run]) == ""


# ------------------------------------------------------------------------------------------------------------ busy cores


@pytest.fixture
def cores(monkeypatch):
    """cores(n, load, running): what this machine pretends to be."""

    def pretend(n: int, load: float, running: float) -> None:
        monkeypatch.setattr(hardware, "cores", lambda: n)
        monkeypatch.setattr(pace.os, "cpu_count", lambda: n)
        monkeypatch.setattr(pace.os, "getloadavg", lambda: (load, 0, 0))
        monkeypatch.setattr(pace, "running", lambda: running)

    return pretend


def test_taken_cores_are_told_of_at_the_start(cores, monkeypatch):
    cores(2, 1.9, 2)
    assert "--threads 1 may be" in pace.crowded(2)
    assert pace.crowded(1) is None  # one thread waits for no other
    cores(2, 1.9, 0)
    assert pace.crowded(2) is None  # what made the load has ended
    cores(16, 6.0, 6)
    assert pace.crowded(8) is None and "--threads 10 may be" in pace.crowded(16)
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    assert pace.crowded(2) is None  # bound to two of sixteen cores: the load says nothing of these


def test_slow_steps_are_told_of_once(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock.now)

    def window(watcher: pace.Pace, rate: float) -> str | None:
        watcher.step(1000)
        clock.now += 500 / rate
        watcher.pause()
        clock.now += 60  # evaluation is no step
        watcher.go_on()
        clock.now += 500 / rate
        return watcher.check()

    watcher = pace.Pace(threads=2, watch=True)
    assert [window(watcher, rate) for rate in (128, 120, 40, 120, 9)] == [None] * 5  # one slow window is no trend
    result = window(watcher, 9)
    assert "9 images/s" in result and "128" in result and "--threads 2" in result
    assert window(watcher, 9) is None
    for silent in (pace.Pace(threads=1, watch=True), pace.Pace(threads=2, watch=False)):
        assert [window(silent, rate) for rate in (128, 9, 9, 9)] == [None] * 4
