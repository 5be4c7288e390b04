"""Several processes are the same run: equal to rounding, exact gradients, every launcher, 16-bit scaling."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import gradsplit
import measure
import train
from conftest import (
    ROOT,
    SIXTEEN,
    TINY,
    fabric_run,
    free_port,
    need_devices,
    series,
    slow,
    summary,
    until,
    weights,
    without,
)
from data import InputError
from engine import hardware, launchers, options
from test_metrics import job_for, warm

# Training amplifies the last bit, by how much depends on the trajectory: seed 2's is a calm one.
GN = [*TINY, "--norm", "gn", "--precision", "64-true", "--noise", "0.1", "--lr", "0.1", "--measure-every", "3"]
GN += ["--seed", "2"]
STEPS = "20"  # one epoch at B = 8, five at B = 53


@pytest.fixture(scope="module")
def alone(zygote, tmp_path_factory) -> dict[str, Path]:
    """Runs of one process, by batch size."""
    runs = tmp_path_factory.mktemp("alone")
    for bs in ("8", "53"):
        argv = [*GN, "--bs", bs, "--epochs", "13", "--max-steps", STEPS, "--runs", str(runs), "--name", bs]
        assert zygote.run(argv) == [0]
    return {bs: runs / bs for bs in ("8", "53")}


@pytest.mark.parametrize(
    ("bs", "ranks"),
    slow(("8", 2), ("8", 4), ("53", 4)),  # two processes at B = 53: the next test, over more steps
)
def test_more_processes_change_only_rounding(zygote, alone, tmp_path, bs, ranks):
    """160 examples: at B = 53 the last batch is a single example, so that all ranks but one are empty-handed; at B = 8
    and 10 % noise most ranks have no noisy example in most batches."""
    argv = [*GN, "--bs", bs, "--epochs", "13", "--max-steps", STEPS, "--runs", str(tmp_path), "--name", "r"]
    assert zygote.run(argv, ranks=ranks) == [0] * ranks, zygote.output()
    assert_equal_to_rounding(alone[bs], tmp_path / "r")


@pytest.mark.slow
def test_processes_are_still_the_same_run_after_50_steps(zygote, tmp_path):
    argv = [*GN, "--bs", "53", "--epochs", "13", "--max-steps", "50", "--runs", str(tmp_path)]
    for ranks in (1, 2):
        assert zygote.run([*argv, "--name", str(ranks)], ranks=ranks) == [0] * ranks, zygote.output()
    assert_equal_to_rounding(tmp_path / "1", tmp_path / "2")


def assert_equal_to_rounding(one: Path, several: Path) -> None:
    """That runs of one and of several processes have the same series, weights and accuracies."""
    want, got = series(one), series(several)
    assert want.keys() == got.keys() and "grad/cos_clean_noisy" in want
    for tag, points in want.items():
        assert [step for step, _ in got[tag]] == [step for step, _ in points], tag
        # Event files hold float32, so the last bit may differ; the weights below are compared to 1e-8.
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in points], rel=2e-7, abs=1e-8), tag
    a, b = weights(one), weights(several)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-8)
    assert summary(several)["test_acc"] == summary(one)["test_acc"]
    assert summary(several)["val_acc"] == summary(one)["val_acc"]


COMPILED = """
import torch
from engine import fast
import train
fast.has_compiler = lambda: True
fast.compiled = lambda module: torch.compile(module, dynamic=False, backend="aot_eager")  # all but generating C++
assert train.main({argv!r}) == 0
"""


@pytest.mark.slow
def test_compiled_processes_are_the_same_run(zygote, alone, tmp_path):
    """Compiled plain steps through DDP; the single example of the last batch takes the eager network on one rank."""
    argv = [
        *GN,
        "--bs",
        "53",
        "--epochs",
        "13",
        "--max-steps",
        STEPS,
        "--compile",
        "--runs",
        str(tmp_path),
        "--name",
        "r",
    ]
    assert zygote.run(code=COMPILED.format(argv=argv), ranks=2) == [0, 0], zygote.output()
    a, b = weights(alone["53"]), weights(tmp_path / "r")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-8)
    outcome = summary(tmp_path / "r")["fast_gradient"]
    assert outcome["error"] < outcome["bound"]


ONE_WEIGHT = """
from types import SimpleNamespace
import torch
import train
from measure import MeasuringContext, MeasuringState
from gradsplit import Forward
import gradsplit
from engine import hardware
import measure
import metrics
from data import Batch, shard
args = train.options.parse(["--dataset", "synthetic", "--precision", "64-true", "--accelerator", "cpu", "--threads", "1"])
torch.set_default_dtype(torch.float64)
fabric, _ = hardware.make_fabric(args)
assert fabric.world_size == 2

class OneWeight(torch.nn.Module):  # logits (w x, 0)
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x):
        return torch.stack([self.w * x, 0 * x], 1)

# At w = 0 both classes have probability 1/2: the loss of (x, label) has the derivative -x/2 for label 0, +x/2 for 1.
x = torch.tensor([1.0, 2.0, 4.0, 8.0])
true = torch.tensor([0, 0, 0, 1])
y = torch.tensor([0, 1, 0, 1])  # only the second is noisy, and it is rank 0's: rank 1 has none
a, b = shard(4, rank, 2)
batch = Batch(x[a:b], y[a:b], true[a:b], (y != true)[a:b], 4, 1, a, y, y != true, torch.arange(a, b))
module = OneWeight()
model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.5))
context = MeasuringContext(
    module, fabric.device, train=None, transition=None, options=None, autocast=fabric.autocast,
    sum_over_ranks=lambda t: hardware.sum_over_ranks(fabric, t), loss_scale=lambda: 1.0, learning_rate=lambda: 0.5,
    state=MeasuringState(), total_steps=1, steps_per_epoch=1, rank=rank, world_size=2,
)
job = SimpleNamespace(args=args, fabric=fabric, context=context, model=model, parameters=context.parameters)
rows = gradsplit.split_rows(job.context, batch, Forward(job.context, batch.x, batch.size))
clean, noisy = (row[0].item() for row in rows)
assert clean == (-1 / 2 - 4 / 2 + 8 / 2) / 4, clean
assert noisy == (2 / 2) / 4, noisy
calls, pull_backs = [], gradsplit.pull_backs
def counted(*args):
    calls.append(len(args[3]))
    return pull_backs(*args)
gradsplit.pull_backs = counted
apart = gradsplit.split_rows(job.context, batch, Forward(job.context, batch.x, batch.size, [~batch.noisy, batch.noisy]))
assert [row[0].item() for row in apart] == [clean, noisy]
assert calls == [1, 1], calls  # on rank 1 as well, which has nothing noisy: SyncBatchNorm would wait for it
train.plain_gradient(job, batch)
assert module.w.grad.item() == clean + noisy, module.w.grad  # DDP's mean over ranks is made the global mean
got = gradsplit.split_values(rows, None, batch, 1.0)
assert abs(got["grad/norm_clean"].item() - 1.5 / 3) < 1e-15  # g_C: the mean over the three of C
assert got["grad/norm_noisy"].item() == 1
assert got["grad/cos_clean_noisy"].item() == 1 and got["grad/clean_fraction"] == 0.75
"""


def test_one_weight_under_two_processes(zygote):
    assert zygote.run(code=ONE_WEIGHT, ranks=2) == [0, 0], zygote.output(0) + zygote.output(1)


@pytest.mark.slow
def test_first_step_in_float32(zygote, tmp_path):
    """Rounding alone grows 1e5-fold within 50 steps at lr 0.1, so float32 is compared at the first step only."""
    argv = [*TINY, "--norm", "gn", "--noise", "0.5", "--max-steps", "1", "--runs", str(tmp_path)]
    assert zygote.run([*argv, "--name", "a"]) == [0]
    assert zygote.run([*argv, "--name", "b"], ranks=2) == [0, 0]
    a, b = series(tmp_path / "a"), series(tmp_path / "b")
    for tag in a:
        if not tag.startswith("val/acc") and not tag.startswith("test/"):
            assert b[tag][0][1] == pytest.approx(a[tag][0][1], rel=1e-5, abs=1e-5), tag


@pytest.mark.slow
def test_batchnorm_on_cpu_processes_warns_and_averages(zygote, tmp_path):
    """torch has no SyncBatchNorm there: each rank normalises its own share, and the saved statistics are the mean."""
    argv = [*TINY, "--precision", "64-true", "--max-steps", "1", "--runs", str(tmp_path)]
    assert zygote.run([*argv, "--name", "a"]) == [0]
    assert zygote.run([*argv, "--name", "b"], ranks=2) == [0, 0]
    assert "SyncBatchNorm" in zygote.output(0) and "SyncBatchNorm" not in zygote.output(1)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    # The first layer's mean over two equal shares is the mean over the batch; its variance is not, and later layers
    # see other inputs.
    torch.testing.assert_close(a["bn1.running_mean"], b["bn1.running_mean"], rtol=0, atol=1e-12)
    assert not torch.allclose(a["bn1.running_var"], b["bn1.running_var"], rtol=0, atol=1e-12)


def test_launchers_get_the_options_of_the_tests():
    given = ["--accelerator", "cpu", "--bs", "8", "--threads", "1", "--accelerator", "cuda"]
    assert without(given, "--accelerator", "--threads") == ["--bs", "8"]
    command = fabric_run("--devices=2", program=Path("/nowhere/fabric"))  # it came with pytorch-lightning
    assert command[1:3] == ["-m", "lightning_fabric.cli"] and command[-2:] == ["--devices=2", "train.py"]


def launch(command: list[str], tmp_path: Path, **more) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **more)


@pytest.mark.slow
def test_all_launchers_start_the_same_run(tmp_path):
    """`python --devices 2`, `fabric run` and `torchrun`, in a SLURM job: the same bits, threads shared out, one folder each."""
    torchrun = sys.executable, "-m", "torch.distributed.run"  # what the script of that name starts
    need_devices(2)
    argv = [*TINY, "--norm", "gn", "--noise", "0.5", "--max-steps", "6", "--runs", str(tmp_path)]
    argv = without(argv, "--threads")
    plain = without(argv, "--accelerator", "--precision")
    commands = {
        "python": [sys.executable, "train.py", *argv, "--devices", "2"],
        "fabric": [
            *fabric_run("--devices=2", "--precision=32-true"),
            *plain,
        ],
        "torchrun": [*torchrun, "--nproc_per_node", "2", "--master_port", free_port(), "train.py", *argv],
    }
    for name, command in commands.items():
        result = launch([*command, "--name", name], tmp_path, env=os.environ | BATCH | {"LOCAL_RANK": "0"})
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("label noise uniform") == 1  # rank 0 alone speaks
    first = tmp_path / "python"
    for name in commands:
        assert series(tmp_path / name) == series(first)
        assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / name).values(), weights(first).values()))
        config = (tmp_path / name / "config.json").read_text()
        assert f'"threads": {max(1, hardware.cores() // 2)}' in config and '"world_size": 2' in config


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path):
    need_devices(2)
    argv = [*TINY, "--noise", "2", "--runs", str(tmp_path / "runs")]
    result = launch([*fabric_run("--devices=2"), *without(argv, "--accelerator")], tmp_path)
    assert result.returncode == 1 and not (tmp_path / "runs").exists()  # the launcher's status
    assert result.stderr.count("train.py: error: --noise: '2' is not a number from 0 to 1") == 1


# ---------------------------------------------------------------------------------------------------------- launchers

BATCH = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "script.sh", "SLURM_NTASKS": "2", "SLURM_NODELIST": "n1"}
BATCH |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
STEP = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[05-06]",
    "SLURM_STEP_ID": "1",
}


@pytest.fixture
def alone_in(monkeypatch):
    """alone_in(variables): an environment of these and of no other launcher's; what is set in it is undone."""

    def enter(variables: dict[str, str]) -> None:
        for name in (*launchers.PLACE, *launchers.MEETING, launchers.TORCHRUN, "GROUP_RANK", "LT_CLI_USED"):
            monkeypatch.setenv(name, "")  # to be restored even where it was absent
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return enter


@pytest.mark.parametrize(
    ("left", "word"),
    [
        ({}, ""),
        (BATCH, ""),  # sbatch --ntasks=2
        (BATCH | {"SLURM_NTASKS_PER_NODE": "2"}, ""),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, ""),  # srun as a way to start four runs
        ({"LOCAL_RANK": "0", "MASTER_ADDR": "far.away", "MASTER_PORT": "1", "NODE_RANK": "2"}, ""),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 in"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LT_CLI_USED": "1"}, "RANK=1, WORLD_SIZE=2 in"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMI_SIZE": "2"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_NAME": "t", "SLURM_JOB_NAME": "bash"}, ""),
    ],
)
def test_what_others_left_in_the_environment_is_of_no_process_of_this_run(alone_in, go, capsys, left, word):
    alone_in(left)
    assert launchers.rank_zero()
    assert summary(go("--max-steps", "1", "--measure", "off", "--synthetic-train", "20", "--bs", "16"))["steps"] == 1
    error = capsys.readouterr().err
    assert error.count("in the environment: of another program, and left aside") == bool(word) and word in error
    assert not {*launchers.PLACE, *launchers.MEETING} & {*os.environ}


def test_a_lone_process_under_slurm_starts_its_own_ranks(alone_in):
    """`--devices 2` in a job of one task: Fabric would take the two to be there and go on with one."""
    alone_in(BATCH | {"SLURM_NTASKS": "1"})
    args = options.parse(["--dataset", "synthetic", "--accelerator", "cpu", "--devices", "2"])
    launchers.settle(args.devices, args.num_nodes)
    assert hardware.resolve(args) == 2 and args.strategy == "ddp" and launchers.started() is None
    environment = hardware.cluster()[0]
    assert not environment.creates_processes_externally and environment.main_address == "127.0.0.1"


def test_tasks_of_srun_are_joined_where_that_is_asked_for(alone_in, monkeypatch):
    alone_in(BATCH | STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"})
    for wrong in ((4, 1), (2, 1), (1, 2)):
        with pytest.raises(InputError, match="srun has started 4 tasks on 2 nodes .SLURM_STEP_NUM_TASKS=4."):
            launchers.settle(*wrong)
    launchers.settle(2, 2)
    assert launchers.started() == (2, 2) and not launchers.rank_zero()
    assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR")} == {
        "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", "MASTER_ADDR": "n05",
    }  # fmt: skip
    assert int(os.environ["MASTER_PORT"]) == 15000 + (471100 + 1) % 10000


@pytest.mark.parametrize("option", [["--devices", "2"], ["--num-nodes", "3"]])
def test_a_launcher_with_another_count_is_not_overheard(alone_in, option):
    alone_in({launchers.TORCHRUN: "t", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    args = options.parse(["--dataset", "synthetic", "--accelerator", "cpu", *option])
    with pytest.raises(InputError, match=f"{' '.join(option)}: the launcher has started 1 process"):
        hardware.resolve(args)


def test_machines_started_by_hand_know_of_each_other(alone_in):
    alone_in({"MASTER_ADDR": "n1"})
    with pytest.raises(InputError, match="--num-nodes 2: NODE_RANK, MASTER_PORT must be in the environment"):
        launchers.settle(1, 2)


def test_waiting_for_others_is_said(monkeypatch, capsys):
    said = threading.Event()
    monkeypatch.setattr(launchers, "print", lambda *a, **k: (print(*a, **k), said.set()), raising=False)
    monkeypatch.setattr(launchers, "PATIENCE", 0.01)
    with launchers.say_if_waiting(2):
        assert said.wait(30)
    assert "waiting for the other of 2 processes" in capsys.readouterr().err


AS_SRUN = """
import os, train
of_torchrun = [os.environ.pop(name) for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
os.environ |= {given!r} | {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}}
os._exit(train.main({argv!r}))
"""


def test_two_tasks_of_srun_are_one_run(zygote, alone, tmp_path):
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    argv = [*GN, "--bs", "8", "--epochs", "13", "--max-steps", "3", "--devices", "2"]
    argv += ["--runs", str(tmp_path), "--name", "r"]
    assert zygote.run(code=AS_SRUN.format(given=BATCH | step, argv=argv), ranks=2) == [0, 0], zygote.output()
    want, got = series(alone["8"])["train/loss"][0], series(tmp_path / "r")["train/loss"][0]
    assert got == pytest.approx(want, rel=2e-7)
    assert json.loads((tmp_path / "r" / "config.json").read_text())["resolved"]["world_size"] == 2


LATE = """
from torch import nn

class Late(nn.Module):
    def __init__(self, C, K):
        super().__init__()
        self.pool, self.inner, self.out, self.calls = nn.AdaptiveAvgPool2d(2), nn.Linear(4 * C, 4 * C), nn.Linear(4 * C, K), 0

    def forward(self, x):
        x, self.calls = self.pool(x).flatten(1), self.calls + self.training
        return self.out(x + self.inner(x) if self.calls < 7 and x.mean() < 1 or x.mean() < 0 else x)
"""


def test_blocks_skipped_by_what_is_seen_or_from_a_step_on_make_no_process_wait(zygote, tmp_path):
    """No trial at the start can know: then each process goes by its own part of the batch."""
    (tmp_path / "nets.py").write_text(LATE)
    argv = [
        *without(TINY, "--width"),
        "--model",
        f"{tmp_path / 'nets.py'}:Late",
        "--runs",
        str(tmp_path),
        "--noise",
        "0.5",
    ]
    argv += ["--measure", "off", "--precision", "64-true"]
    assert zygote.run([*argv, "--name", "r"], ranks=2) == [0, 0], zygote.output()
    assert summary(tmp_path / "r")["steps"] == 10 and "Warning" not in zygote.output()


def test_a_run_moves_to_two_processes_and_back(zygote, alone, tmp_path):
    argv = [*GN, "--bs", "8", "--epochs", "13", "--runs", str(tmp_path), "--name", "r"]
    assert zygote.run([*argv, "--max-steps", "7"]) == [0]
    assert zygote.run([*argv, "--max-steps", "14", "--resume"], ranks=2) == [0, 0], zygote.output()
    assert zygote.run([*argv, "--max-steps", STEPS, "--resume"]) == [0]
    a, b = weights(alone["8"]), weights(tmp_path / "r")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-8)
    want, got = series(alone["8"]), series(tmp_path / "r")
    assert {tag: [s for s, _ in points] for tag, points in got.items()} == {
        tag: [s for s, _ in points] for tag, points in want.items()
    }


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(zygote, tmp_path):
    argv = [*GN, "--epochs", "400", "--checkpoint-minutes", "0", "--runs", str(tmp_path), "--name", "r"]
    pids = zygote.start(argv, ranks=2)
    until((tmp_path / "r" / "last.ckpt").exists)
    os.kill(pids[1], signal.SIGTERM)
    assert zygote.wait() == [3, 3], zygote.output()
    outcome = summary(tmp_path / "r")
    assert outcome["status"] == "stopped"
    assert torch.load(tmp_path / "r" / "last.ckpt", weights_only=True)["step"] == outcome["steps"]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(zygote, tmp_path):
    argv = [*GN, "--epochs", "400", "--checkpoint-minutes", "0", "--runs", str(tmp_path), "--name", "r"]
    pids = zygote.start(argv, ranks=2)
    until((tmp_path / "r" / "last.ckpt").exists)
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    statuses = zygote.wait()
    assert statuses[0] == 1 and statuses[1] == -signal.SIGKILL
    assert time.monotonic() - began < 300  # torch's own limit is half an hour
    outcome = zygote.output()
    assert outcome.count("train.py: error: another process of the run has ended (") == 1 and "Traceback" not in outcome
    assert summary(tmp_path / "r")["status"] == "failed"
    assert torch.load(tmp_path / "r" / "last.ckpt", weights_only=True)["step"] > 0


def test_a_fault_on_rank_zero_ends_all_ranks_together(zygote, tmp_path):
    code = "import os, train\nfrom engine import record\ndef refuse(*_): raise OSError(28, os.strerror(28))\nrecord.os.fsync = refuse\n"
    code += f"os._exit(train.main({[*GN, '--runs', str(tmp_path), '--name', 'r']!r}))"
    assert zygote.run(code=code, ranks=2) == [1, 1]
    assert "No space left on device" in zygote.output(0) and "Traceback" not in zygote.output(0) + zygote.output(1)


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("mode", slow("train", "eval", "separate"))
def test_sixteen_bit_gradients_are_scaled_and_measured_unscaled(mode):
    """16-mixed through Fabric's plugin on the CPU: `.grad` carries the scale, the measurements do not."""
    job, full = job_for("--precision", "16-mixed", "--measure-bn", mode), job_for("--measure-bn", mode)
    batch = job.train.batch(job.train.epoch(0, 0), 0, 32)
    scale = float(job.context.loss_scale())
    assert scale == 65536
    rows, rows_full = (
        gradsplit.split_rows(j.context, batch, measure.make_forward(j.context, batch)) for j in (job, full)
    )
    scaled, plain = (torch.cat([t.flatten() for t in gradsplit.add_rows(r)]) for r in (rows, rows_full))
    assert (
        float((scaled / scale - plain).norm() / plain.norm()) < 0.2
    )  # float16's rounding; a lost scale gives 1 or 65535
    got, want = train.train_step(job, batch, 0, True), train.train_step(full, batch, 0, True)
    for tag, value in want.items():
        assert float(got[tag]) == pytest.approx(float(value), rel=0.1, abs=0.05), tag
    after = [torch.cat([p.detach().flatten() for p in j.parameters]) for j in (job, full)]
    assert float((after[0] - after[1]).norm() / after[1].norm()) < 2e-2  # and the optimizer divided by it once


@pytest.mark.slow
def test_sixteen_bit_overflow_skips_the_update_and_halves_the_scale():
    job = job_for("--precision", "16-mixed")
    batch = warm(job)
    before = copy.deepcopy(job.module.state_dict())
    huge = batch._replace(x=batch.x * 1e3)
    job.context.loss_scale()
    job.scaler._scale.fill_(2.0**40)
    train.train_step(job, huge, 3, measured=True)
    assert float(job.context.loss_scale()) == 2.0**39
    assert all(torch.equal(before[name], p) for name, p in job.module.named_parameters())


def test_sixteen_bit_resumes_with_its_scale(go):
    own = (*SIXTEEN, "--precision", "16-mixed", "--noise", "0.5")
    a = go(*own, "--max-steps", "4")
    go(*own, "--max-steps", "2", name="b")
    b = go(*own, "--max-steps", "4", "--resume", name="b")
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))
    assert "scaler" in torch.load(b / "last.ckpt", weights_only=True)


def test_wrapper_and_bare_module_agree():
    """Plain steps go through Fabric's wrapper, measurements through the bare module: the same logits, bit for bit."""
    for precision in ("32-true", "bf16-mixed", "16-mixed", "64-true"):
        job = job_for("--precision", precision)
        x = job.train.batch(job.train.epoch(0, 0), 0, 32).x
        job.module.eval()
        assert torch.equal(job.context.logits(x), job.model(x))
        assert job.context.logits(x).dtype == torch.get_default_dtype()
        assert isinstance(job.module, nn.Module)


@pytest.mark.parametrize("choice", ["on", "off"])
def test_deterministic_kernels_are_a_choice(go, choice):
    """It says how a GPU computes, not what: the run keeps its name, and may be resumed with the other choice."""
    folder = go("--deterministic", choice, "--max-steps", "1")
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (choice == "on", choice == "off")
    assert json.loads((folder / "config.json").read_text())["segments"][0]["deterministic"] == choice
    go("--max-steps", "2", "--resume")
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    named = options.parse(["--dataset", "synthetic", "--deterministic", choice]).name
    assert named == options.parse(["--dataset", "synthetic"]).name
