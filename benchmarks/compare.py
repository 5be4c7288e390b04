"""Runs with full measurements side by side, one line for each kind: six panels.

    python benchmarks/compare.py noise.png human=runs/human matched=runs/matched uniform=runs/uniform
    python benchmarks/compare.py noise.png "human=all.npz noise_type=human" "uniform=all.npz noise_type=uniform"

Each argument names a line, and after `=` a run's folder, a folder of runs or an exported file, with the options (as config.json
has them) that its runs have. Of several runs the mean is drawn, with a band of one standard deviation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from data import InputError  # noqa: E402
from engine import cmdline  # noqa: E402
from study import results, runfolders  # noqa: E402

PANELS = [  # title, tag, its null or None
    ("validation accuracy", "val/acc", None),
    ("noisy training examples predicted as their wrong label", "probe/memorized", None),
    ("noisy training examples predicted as their true label", "probe/recovered", None),
    ("cos(clean, noisy); dashed: its null", "grad/cos_clean_noisy", "null/cos_clean_noisy"),
    ("cos(clean, all); dashed: its null", "grad/cos_clean_all", "null/cos_clean_all"),
    ("ratio of the norms, noisy / clean", "grad/norm_ratio", None),
]


def chosen(words: str) -> list[runfolders.Run]:
    """The runs of `PATH OPTION=VALUE ...`. Raises `InputError` where there are none."""
    path, *options = words.split() or [""]
    wanted = [option.partition("=")[::2] for option in options]
    runs = results.load_runs([path], progress=False)
    found = [run for run in runs if all(str(run.options.get(k)) == v for k, v in wanted)]
    if not found:
        raise InputError(f"'{words}': no such run; an argument is NAME=PATH or 'NAME=PATH OPTION=VALUE ...'")
    return found


def values_of(run: runfolders.Run, tag: str) -> runfolders.Series | None:
    if tag == "grad/norm_ratio":
        noisy, clean = (run.series.get(f"grad/norm_{part}") for part in ("noisy", "clean"))
        return noisy and clean and (noisy[0], noisy[1] / clean[1])
    return run.series.get(tag)


def line(runs: list[runfolders.Run], tag: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(steps, mean, standard deviation) at the steps that all runs have; None where one has none."""
    series = [values_of(run, tag) for run in runs]
    if not series or not all(series):
        return None
    steps = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in series)))
    rows = np.array([values[np.isin(at, steps)] for at, values in series])
    return np.array(steps), rows.mean(0), rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(len(steps))


def main(out: str, named: list[str]) -> int:
    """Draw, or say what is wrong in one line; returns the exit status."""
    try:
        draw(out, named)
    except InputError as e:
        cmdline.complain(e, "compare.py")
        return 2
    return 0


def draw(out: str, named: list[str]) -> None:
    kinds = {name: chosen(words) for name, _, words in (word.partition("=") for word in named)}
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axis, (title, tag, null) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for i, (name, runs) in enumerate(kinds.items()):
            for which, style in ((tag, "-"), (null, "--")):
                drawn = which and line(runs, which)
                if drawn:
                    steps, mean, deviation = drawn
                    axis.plot(steps, mean, style, color=f"C{i}", label=name if style == "-" else None, marker=".")
                    if style == "-" and len(runs) > 1:
                        axis.fill_between(steps, mean - deviation, mean + deviation, color=f"C{i}", alpha=0.15, lw=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer steps")
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(out, dpi=110)
    for name, runs in kinds.items():
        print(f"{name}: {len(runs)} runs")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: compare.py OUT.png NAME=RUNS ...")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
