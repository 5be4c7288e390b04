"""What a first run does by itself: precision by the processor, random masks beside the split, the probe, the line on the
schedule, and what is taken from the machine."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import epochwise
import gradsplit
import measure
import schedules
import sweep
import train
from conftest import ROOT, same_weights, series, slow, summary
from engine import hardware, identity, machine, options, stepclock
from engine.cmdline import counted, every
from engine.job import JobState
from engine.summary import full_resolution
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
    assert "every 2 steps, 1 random mask every 4 steps; 50.0% of the steps, counted; probe every epoch" in result
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


# -------------------------------------------------------------------------------------------------- cores and the machine

FIRST_IMPORT_OF_TORCH = """
import os, runpy, sys

class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Stop())
runpy.run_path(sys.argv[1], run_name=sys.argv[2])
"""


@pytest.mark.parametrize("script", ["train.py", "noise.py"])
@pytest.mark.parametrize("name", ["__main__", "imported"])  # a process, and the server that forks a sweep's runs
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, str(machine.SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_that_wait_spin_briefly_unless_the_user_says_how(script, name, given, spins):
    """libgomp reads the variable when torch is loaded, so it is set at the first import of torch."""
    unset = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", FIRST_IMPORT_OF_TORCH, script, name]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=unset | given, timeout=300)
    assert ended.stdout == f"{spins}\n", ended.stderr


GROUPS = {  # what lies below the root: what a process may use, as (cores, bytes) of at most 64 and 2**50
    "v2, the limits of groups around it": (
        {
            "proc/self/cgroup": "0::/user.slice/job/step\n",
            "sys/fs/cgroup/user.slice/memory.max": f"{2**33}\n",
            "sys/fs/cgroup/user.slice/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/user.slice/job/memory.max": f"{2**32}\n",
            "sys/fs/cgroup/user.slice/job/cpu.max": "250000 100000\n",
            "sys/fs/cgroup/user.slice/job/step/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/job/step/cpu.max": "max 100000\n",
        },
        (3, 2**32),
    ),
    "v2 in a container": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{2**31}\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
        (1, 2**31),
    ),
    "v1": (
        {
            "proc/self/cgroup": "5:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/other\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2**34}\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
        (2, 2**34),
    ),
    "v1 in a container that sees its path outside": (
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**30}\n",
        },
        (64, 2**30),
    ),
    "no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, (64, 2**50)),
    "no groups": ({}, (64, 2**50)),
    "nothing that can be read": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "?"}, (64, 2**50)),
}


@pytest.mark.parametrize("case", GROUPS)
def test_limits_of_control_groups(case, tmp_path, monkeypatch):
    files, limits = GROUPS[case]
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(machine.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 2**38}.get(name, 2**12))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert (machine.cores(tmp_path), machine.memory(tmp_path)) == limits


def test_a_quota_is_shared_out_among_processes(monkeypatch):
    monkeypatch.setattr(hardware, "cores", lambda: 3)
    for devices, threads in ((1, 3), (2, 1), (4, 1)):
        args = options.parse(["--dataset", "synthetic", "--accelerator", "cpu", "--devices", str(devices)])
        hardware.resolve(args)
        assert args.threads == threads


def test_a_clock_of_steps_alone(monkeypatch):
    """Ten steps of a second each from the warm-up's end on; what is between start and stop alone counts."""
    now = [0.0]
    monkeypatch.setattr(stepclock.time, "perf_counter", lambda: now[0])
    state = JobState()
    clock = stepclock.StepClock(torch.device("cpu"), state, warmup=5)

    def steps(n: int) -> None:
        for _ in range(n):
            if state.step == 5:
                clock.start()
            now[0] += 1
            state.step += 1
            clock.count(32)

    for n in (3, 6, 6):  # with an evaluation before, a checkpoint between, and another evaluation behind
        now[0] += 100
        clock.start()
        steps(n)
        clock.stop()
        clock.stop()
    assert (state.steps_seconds, state.steps_images) == (10, 320)


@pytest.mark.parametrize(
    ("most", "bs", "size", "n"),
    [
        (125, 4, (32, 32), 125),
        (125, 512, (28, 28), 125),
        (125, 4, (64, 64), 31),
        (125, 4, (224, 224), 4),
        (125, 1, (512, 512), 1),
        (125, 64, (224, 160), 64),
        (125, 256, (224, 224), 125),
        (1000, 4, (224, 224), 20),
        (1000, 1024, (32, 32), 1000),
    ],
)
def test_large_images_are_evaluated_fewer_at_a_time(most, bs, size, n):
    assert epochwise.at_a_time(most, bs, *size) == n


def test_one_and_many_are_told_apart():
    assert [counted(n, "thread") for n in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
    assert [counted(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]
    assert [every(n, "step") for n in (1, 2)] == ["every step", "every 2 steps"]
    slots = lambda threads, size: sweep.Slots([], size, 1, threads).words(SimpleNamespace(ray=None, jobs=1))  # noqa: E731
    assert slots(1, 1) == "1 at a time, 1 thread each" and slots(3, 2) == "1 at a time, 3 threads each process"


def test_large_images_are_not_for_the_stem_of_small_ones():
    images = lambda H, W: SimpleNamespace(H=H, W=W)  # noqa: E731
    assert "49 times as long" in full_resolution("resnet18", images(224, 224))
    assert full_resolution("resnet18", images(64, 64)) is None
    assert full_resolution("torchvision:resnet18", images(224, 224)) is None
