"""The schedules against torch's own, at every step."""

import pytest
import torch

from conftest import series
from engine import course, options
from schedules import SCHEDULES, Course, entry, schedule


def torchs(make, steps: int) -> list[tuple[float, float]]:
    """(lr, momentum) that torch's scheduler has in force at each of `steps` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    seen = []
    for step in range(steps):
        if step:
            optimizer.step()
            scheduler.step()
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["momentum"]))
    return seen


@pytest.mark.parametrize("T", [5000, 7, 2])
def test_cosine_is_torchs_to_the_end_and_then_holds(T):
    want = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=T), T + 1)
    got = [schedule("cosine", step, T, 0.1, 0.9) for step in range(T + 1)]
    assert [lr for lr, _ in got] == pytest.approx([lr for lr, _ in want], rel=1e-9, abs=1e-12)
    assert {m for _, m in got} == {0.9}
    assert got[0][0] == 0.1 and got[T][0] == pytest.approx(0, abs=1e-17)
    assert schedule("cosine", 10 * T, T, 0.1, 0.9) == got[T]


@pytest.mark.parametrize("T", [5000, 11, 4])
def test_onecycle_is_torchs_to_the_end_and_then_holds(T):
    want = torchs(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=T), T)
    got = [schedule("onecycle", step, T, 0.1, 0.9) for step in range(T)]
    for (lr, m), (lr_t, m_t) in zip(got, want, strict=True):
        assert lr == pytest.approx(lr_t, rel=1e-9, abs=1e-12) and m == pytest.approx(m_t, rel=1e-12)
    assert got[T - 1] == pytest.approx((4e-7, 0.95)) and got[0] == pytest.approx((0.004, 0.95))
    assert schedule("onecycle", T, T, 0.1, 0.9) == schedule("onecycle", 99 * T, T, 0.1, 0.9) == got[T - 1]


@pytest.mark.parametrize("T", [1, 2, 3])
def test_onecycle_of_few_steps_is_defined(T):
    assert schedule("onecycle", T - 1, T, 0.1, 0.9) == pytest.approx((4e-7, 0.95))


LR = torch.optim.lr_scheduler
# The same steps, as torch's own schedulers have them.
TORCHS = {
    "constant": lambda o, T: LR.ConstantLR(o, factor=1),
    "cosine": lambda o, T: LR.CosineAnnealingLR(o, T_max=T),
    "onecycle": lambda o, T: LR.OneCycleLR(o, max_lr=0.1, total_steps=T + 1),
    "linear": lambda o, T: LR.LinearLR(o, start_factor=1, end_factor=0, total_iters=T),
    "step": lambda o, T: LR.MultiStepLR(o, [round(0.5 * T), round(0.75 * T)], gamma=0.1),
    "cyclic": lambda o, T: LR.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=T / 8, cycle_momentum=False),
}


@pytest.mark.parametrize("T", [5000, 1001, 8])
@pytest.mark.parametrize("name", ["linear", "step", "cyclic"])
def test_each_is_torchs_to_the_end_and_then_holds(name, T):
    want = torchs(lambda o: TORCHS[name](o, T), T + 1)
    got = [schedule(name, step, T, 0.1, 0.9) for step in range(T + 1)]
    assert [lr for lr, _ in got] == pytest.approx([lr for lr, _ in want], rel=0, abs=1e-12)
    assert {m for _, m in got} == {0.9}
    end = {"linear": 0, "step": 0.001, "cyclic": 0.01}[name]
    assert got[T][0] == pytest.approx(end, abs=1e-15)
    assert {schedule(name, step, T, 0.1, 0.9) for step in (T, T + 1, 10 * T)} == {got[T]}


def test_options_of_step_and_cyclic_against_torch():
    want = torchs(lambda o: LR.MultiStepLR(o, [30, 41, 90], gamma=0.5), 101)
    given = {"milestones": (0.3, 0.41, 0.9), "factor": 0.5}
    assert [Course("step", 100, 0.1, 0.9, given=given).at(s)[0] for s in range(101)] == pytest.approx(
        [lr for lr, _ in want]
    )
    want = torchs(lambda o: LR.CyclicLR(o, 0.025, 0.1, step_size_up=50 / 3, cycle_momentum=False), 100)
    given = {"cycles": 3, "factor": 0.25}
    assert [Course("cyclic", 100, 0.1, 0.9, given=given).at(s)[0] for s in range(100)] == pytest.approx(
        [lr for lr, _ in want]
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_and_delay_are_torchs_schedulers_one_after_another(name):
    """5,000 steps: 300 of LinearLR up to the schedule's first value, 700 of ConstantLR, then the schedule."""
    W, D, T = 300, 700, 4000
    first, momentum = schedule(name, 0, T + (name == "onecycle"), 0.1, 0.9)

    def chained(o):  # made one after another, for each sets the optimizer's rate as it begins
        o.param_groups[0]["lr"] = first
        return LR.SequentialLR(
            o, [LR.LinearLR(o, 1 / (W + 1), total_iters=W), LR.ConstantLR(o, factor=1)], milestones=[W]
        )

    want = [lr for lr, _ in torchs(chained, W + D)] + [lr for lr, _ in torchs(lambda o: TORCHS[name](o, T), T)]
    run = Course(name, T + (name == "onecycle"), 0.1, 0.9, warmup=W, delay=D)
    got = [run.at(step) for step in range(5000)]
    assert [lr for lr, _ in got] == pytest.approx(want, rel=0, abs=1e-12)
    assert {m for _, m in got[: W + D]} == {momentum}
    assert len({run.at(step) for step in (run.length, 2 * run.length)}) == 1


def course_of(*argv: str) -> Course:
    return course.course(options.parse(["--dataset", "synthetic", "--bs", "100", *argv]), steps_per_epoch=80)


def test_lengths_of_warm_up_and_delay_in_their_units():
    linear = "--sched", "linear"
    assert course_of(*linear) == Course("linear", 5000, 0.1, 0.9)
    run = course_of(*linear, "--sched-epochs", "3", "--sched-delay", "2", "--warmup-steps", "5")
    assert (run.warmup, run.delay, run.sched_steps, run.length) == (5, 160, 240, 405)
    run = course_of(*linear, "--sched-examples", "1001", "--sched-delay", "201", "--warmup-epochs", "2")
    assert (run.warmup, run.delay, run.sched_steps) == (160, 3, 11)
    assert course_of("--sched", "cosine", "--sched-delay", "7").delay == 7
    assert course_of("--sched", "step", "--sched-milestones", "0.2,0.80").given == {
        "milestones": (0.2, 0.8),
        "factor": 0.1,
    }
    args = options.parse(
        "--dataset synthetic --bs 100 --sched-epochs 3 --sched cosine --sched-delay 2 --warmup-steps 5".split()
    )
    assert options.sched_steps(args, 80) == 405


@pytest.mark.parametrize(
    ("given", "result"),
    [
        ("--sched triangle", "--sched: invalid choice: 'triangle'"),
        ("--sched step --sched-milestones 0.75,0.5", "'0.75,0.5' is not ascending shares between 0 and 1"),
        ("--sched step --sched-milestones 0.5,0.5", "is not ascending shares"),
        ("--sched step --sched-milestones 0.5,1", "is not ascending shares"),
        ("--sched step --sched-milestones 1_0e-2", "is not ascending shares"),
        ("--sched step --sched-milestones nan", "is not ascending shares"),
        ("--sched step --sched-factor 0", "'0' is not a number above 0 and below 1"),
        ("--sched cosine --sched-milestones 0.5", "--sched-milestones 0.5: only for --sched step, not cosine"),
        ("--sched linear --sched-factor 0.5", "--sched-factor 0.5: only for --sched step and cyclic, not linear"),
        ("--sched step --sched-cycles 2", "--sched-cycles 2: only for --sched cyclic, not step"),
        ("--sched cyclic --sched-steps 5", "--sched-cycles 4: the schedule of 5 steps has less than two for each"),
        ("--sched-delay 5", "--sched-delay 5: --sched constant has nothing to put off"),
        ("--sched cosine --sched-delay 0", "'0' is not a whole number from 1"),
        ("--warmup-steps 5 --warmup-epochs 1", "--warmup-steps and --warmup-epochs: give the warm-up's length once"),
    ],
)
def test_refused(go, capsys, given, result):
    go(*given.split(), status=2)
    error = capsys.readouterr().err
    assert result in error and error.count("\n") == 1


def test_a_run_follows_its_course_and_says_so(go, capsys):
    """Of 10 steps 2 of warm-up, 1 of delay, and a step schedule of one epoch; resumed in its middle."""
    given = (
        "--sched step --sched-epochs 1 --sched-delay 1 --warmup-steps 2 --width 4 --measure-every 1 --lr 0.03".split()
    )
    go(*given, "--max-steps", "8")
    assert "schedule: step over 12 steps (2.4 epochs) with 2 of warm-up and 5 of delay first" in capsys.readouterr().out
    rates = series(go(*given, "--max-steps", "10", "--resume"))["optim/lr"]
    want = [0.01, 0.02, *[0.03] * 7, 0.003]  # round(0.5 * 5) = 2 steps into the schedule the first milestone
    assert rates == [(step, pytest.approx(lr)) for step, lr in enumerate(want)]
    go(*given, "--max-steps", "10", "--resume", "--sched-factor", "0.2", status=2)
    assert "--sched-factor was 0.1 and is 0.2 now" in capsys.readouterr().err


def test_names_tell_courses_apart():
    name = lambda *argv: options.parse(["--dataset", "synthetic", *argv]).name  # noqa: E731
    assert name("--sched", "step", "--sched-milestones", "0.3,0.6").endswith("_sched-step_sched-milestones-0.3-0.6")
    assert name("--sched", "linear", "--sched-delay", "9", "--warmup-epochs", "2").endswith(
        "_sched-delay9_warmup-epochs2"
    )


def test_constant():
    assert {schedule("constant", step, 5000, 0.1, 0.9) for step in (0, 1, 4999, 10**6)} == {(0.1, 0.9)}


def test_length_in_each_unit():
    def length(*argv):
        return options.sched_steps(options.parse(["--dataset", "synthetic", "--bs", "100", *argv]), steps_per_epoch=80)

    assert length() == 5000
    assert length("--sched-steps", "70") == 70
    assert length("--sched-epochs", "3") == 240
    assert length("--sched-examples", "201") == 3


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_entries_say_what_moves(name):
    """`moves` is what plots, memory and the optimizer go by."""
    values = [schedule(name, step, 100, 0.1, 0.9) for step in range(120)]
    changed = {
        what for what, column in zip(("lr", "momentum"), zip(*values, strict=True), strict=True) if len(set(column)) > 1
    }
    assert changed == set(SCHEDULES[name].moves)


def test_an_unknown_schedule_of_another_versions_runs_still_has_a_name_and_a_style():
    assert entry("warm").label == "warm" and entry("warm").marker
