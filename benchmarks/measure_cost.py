"""What each family of measurements costs, in plain steps, side by side in one process.

    python benchmarks/measure_cost.py [--width 16 --bs 128 ... any option of train.py] [--repeats 20]

Times every family between plain steps of the same batch, synchronised at both ends, after a warm-up; prints a Markdown
table with medians and spread (first to ninth decile of the ratio), the counted cost beside it, and the hardware.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import data  # noqa: E402
import measure  # noqa: E402
import metrics  # noqa: E402
import noise  # noqa: E402
import options  # noqa: E402
import train  # noqa: E402
from hardware import synchronize  # noqa: E402


def main() -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--repeats", type=int, default=20)
    mine, rest = own.parse_known_args()
    args = options.parse(["--dataset", "synthetic", "--noise", "0.5", "--width", "16", "--measure", "full", *rest])
    source = data.load(args)
    indices = data.split(len(source.x_train), args.val_frac, args.split_seed)
    labels, *_ = noise.relabel(args, source, indices[0])
    job = train.prepare(args, source, indices, labels, *train.make_fabric(args))
    batch = job.train.batch(job.train.epoch(0, 0), 0, args.bs)
    job.state["plan"] = {}

    def plain():
        train.train_step(job, batch, 1, measured=False)

    def split():
        train.train_step(job, batch, 1, measured=True)

    def full():
        job.state["plan"] = {"steps": 1}
        train.train_step(job, batch, 1, measured=True)
        job.state["plan"] = {}

    costs = measure.counted_costs(args, sum(p.numel() for p in job.parameters), 4000)
    F3 = 3 * args.bs  # a plain step, in forwards of one example
    families = {  # name: (what is timed, counted cost in plain steps, repeats)
        "measured step, split": (split, 5 / 3, mine.repeats),
        "measured step, all controls": (full, 5 / 3 + costs["steps"] / F3, mine.repeats),
        "probe (4,000 examples)": (lambda: measure.probe(job), 4000 / F3, 5),
        "isotropy": (lambda: measure.isotropy(job), costs["isotropy"] / F3, 5),
        "curvature": (lambda: measure.curvature(job), costs["curvature"] / F3, 3),
    }

    def seconds(act) -> float:
        synchronize(job.fabric.device)
        began = time.perf_counter()
        act()
        synchronize(job.fabric.device)
        return time.perf_counter() - began

    for act in (plain, split, full):
        act(), act()
    n_probe = sum(map(len, measure.probe_indices(job)))
    where = (
        torch.cuda.get_device_name() if job.fabric.device.type == "cuda" else platform.processor() or platform.machine()
    )
    base = [seconds(plain) for _ in range(mine.repeats)]
    print(
        f"{args.model} width {args.width}, B = {args.bs}, {args.precision}, {where}, {args.threads} threads, torch {torch.__version__}"
    )
    print(f"plain step: {1e3 * statistics.median(base):.1f} ms (median of {mine.repeats}); probe set of {n_probe}")
    print("\n| family | plain steps, measured (spread) | counted | after every 50 steps |\n|---|---|---|---|")
    for name, (act, counted, repeats) in families.items():
        ratios = sorted(seconds(act) / seconds(plain) for _ in range(repeats))
        spread = f"{ratios[len(ratios) // 10]:.2f}-{ratios[-1 - len(ratios) // 10]:.2f}"
        median = statistics.median(ratios)
        every = f"{(median - 1) / 50:.1%}" if name.startswith("measured") else ""
        print(f"| {name} | {median:.2f} ({spread}) | {counted:.2f} | {every} |")
    account = job.state["measure_seconds"]
    whole = sum(account[k] for k in ("chunks", "permutations", "fresh", "truth"))
    print(
        "\nof all controls: "
        + ", ".join(f"{k} {account[k] / whole:.0%}" for k in ("chunks", "permutations", "fresh", "truth"))
    )
    rows = [[p.detach().clone() for p in job.parameters] for _ in range(2)]
    print(
        f"Gram matrix of the split: {statistics.median(seconds(lambda: metrics.gram(rows)) for _ in range(5)) * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
