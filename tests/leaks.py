"""Memory and open files of long use: over the measured steps of one run, and over many runs in one process.

    python tests/leaks.py                              # 3,000 measured steps, then 30 runs, figures of both
    python tests/leaks.py --steps 500 --runs 5 --measure full

The trend is Theil and Sen's slope (median of all pairs) over the samples after the first third, when caches are full;
it is given as MB over the whole length. Linux only: it reads /proc/self. The network is a small one: a ResNet's
many layers would take most of the time, and leaks are looked for in the training around it.
"""

import argparse
import contextlib
import gc
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
from torch import nn  # noqa: E402

import train  # noqa: E402

TINY = (
    f"--dataset synthetic --synthetic-train 200 --synthetic-test 20 --model {Path(__file__).resolve()}:net --noise 0.5"
)
TINY += " --accelerator cpu --threads 1"
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096  # bytes


def net(channels: int, classes: int) -> nn.Module:
    """As many weights as a ResNet-18 of width 4 (44,000), in a tenth of its time."""
    convolution = nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(
        *convolution, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 160), nn.ReLU(), nn.Linear(160, classes)
    )


@dataclass
class Samples:
    """Resident memory in MB, and open files, at points of time that have `at` steps or runs behind them."""

    at: list[int] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def take(self, at: int) -> None:
        gc.collect()
        self.at.append(at)
        self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20)
        self.files.append(len(os.listdir("/proc/self/fd")))

    def late(self) -> slice:
        return slice(len(self.at) // 3, None)

    def trend(self) -> float:
        """MB that the slope after the first third amounts to over the whole length."""
        at, memory = (np.array(values[self.late()], dtype=float) for values in (self.at, self.memory))
        i, j = np.triu_indices(len(at), 1)
        return float(np.median((memory[j] - memory[i]) / (at[j] - at[i])) * self.at[-1])

    def more_files(self) -> int:
        """Open files at the end beyond those after the first third."""
        return max(self.files[self.late()]) - self.files[len(self.at) // 3]

    def __str__(self) -> str:
        late = self.memory[self.late()]
        return (
            f"{self.at[-1]}: memory {min(late):.0f} to {max(late):.0f} MB, trend {self.trend():+.1f} MB in all, "
            f"open files {self.files[len(self.at) // 3]} to {max(self.files)}"
        )


def over_steps(steps: int, folder: Path, measure: str = "split", every: int = 50) -> Samples:
    """One run of `steps` measured steps, sampled every `every`."""
    samples, step = Samples(), train.train_step

    def sampled(job, batch, at, measured):
        if at % every == 0:
            samples.take(at)
        return step(job, batch, at, measured)

    argv = [*TINY.split(), "--bs", "8", "--epochs", str(steps), "--max-steps", str(steps), "--measure-every", "1"]
    argv += [
        "--measure",
        measure,
        "--measure-budget",
        "1",
        "--chunks",
        "2",
        "--permutations",
        "2",
        "--runs",
        str(folder),
    ]
    train.train_step = sampled
    try:
        quietly(argv)
    finally:
        train.train_step = step
    return samples


def over_runs(runs: int, folder: Path, measure: str = "full") -> Samples:
    """`runs` short runs one after the other in this process, a sample after each."""
    samples = Samples()
    for i in range(runs):
        argv = [*TINY.split(), "--bs", "32", "--epochs", "1", "--measure-every", "1", "--measure", measure]
        quietly([*argv, "--measure-budget", "1", "--runs", str(folder), "--name", f"r{i}"])
        samples.take(i + 1)
    return samples


def quietly(argv: list[str]) -> None:
    """A run without what it prints. Raises `RuntimeError` if it does not finish."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        status = train.main(argv)
    if status:
        raise RuntimeError(f"status {status} of train.py {' '.join(argv)}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--runs", type=int, default=30)
    p.add_argument("--measure", choices=["off", "split", "full"], default="split", help="of the long run")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.steps:
            print(f"measured steps ({args.measure}), {over_steps(args.steps, Path(folder), args.measure)}", flush=True)
        if args.runs:
            print(f"runs (full), {over_runs(args.runs, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
