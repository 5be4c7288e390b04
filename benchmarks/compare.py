"""Runs with full measurements side by side, one line for each kind: six panels.

    python benchmarks/compare.py noise.png human=runs/human matched=runs/matched uniform=runs/uniform
    python benchmarks/compare.py noise.png "human=all.npz noise_type=human" "uniform=all.npz noise_type=uniform"

Each argument names a line, and after `=` a run's folder, a folder of runs or an exported file, with the options (as config.json
has them) that its runs have. Of several runs the mean is drawn, with a band of one standard deviation.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["MPLBACKEND"] = "agg"  # in place of a notebook's, which this Python may not have: matplotlib would not load

import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from data import InputError, printable  # noqa: E402
from engine import cmdline  # noqa: E402
from series import COS_CLEAN_ALL, COS_CLEAN_NOISY, MEMORIZED, RECOVERED, SERIES, VAL_ACC  # noqa: E402
from study import results, runfolders  # noqa: E402
from study.drawing import FORMATS, save_styled  # noqa: E402
from study.outputs import CannotWrite, whole_file  # noqa: E402

PANELS = [  # title, tag, its null or None
    (SERIES[VAL_ACC].label, VAL_ACC, None),
    ("noisy training examples predicted as their wrong label", MEMORIZED, None),
    ("noisy training examples predicted as their true label", RECOVERED, None),
    ("cos(clean, noisy); dashed: its null", COS_CLEAN_NOISY, "null/cos_clean_noisy"),
    ("cos(clean, all); dashed: its null", COS_CLEAN_ALL, "null/cos_clean_all"),
    ("ratio of the norms, noisy / clean", "grad/norm_ratio", None),
]


def chosen(words: str) -> list[runfolders.Run]:
    """The runs of `PATH OPTION=VALUE ...`. Raises `InputError` where there are none."""
    path, *options = words.split() or [""]
    wanted = [option.partition("=")[::2] for option in options]
    remarks: list[str] = []
    runs = results.load_runs([path], progress=False, remarks=remarks)
    for line in remarks:
        print(f"compare.py: warning: {printable(line)}", file=sys.stderr)
    found = [run for run in runs if all(str(run.options.get(k)) == v for k, v in wanted)]
    if not found:
        raise InputError(f"'{words}': no such run; an argument is NAME=PATH or 'NAME=PATH OPTION=VALUE ...'")
    return found


def values_of(run: runfolders.Run, tag: str) -> runfolders.Series | None:
    """A series of a run; `grad/norm_ratio` at the steps that have both norms: a batch without a noisy example has one."""
    if tag != "grad/norm_ratio":
        return run.series.get(tag)
    (a, noisy), (b, clean) = (run.series.get(f"grad/norm_{part}", ((), ())) for part in ("noisy", "clean"))
    steps, i, j = np.intersect1d(a, b, return_indices=True)
    return (steps, noisy[i] / clean[j]) if len(steps) else None


def line(runs: list[runfolders.Run], tag: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(steps, mean, standard deviation) at the steps that all runs have; None where there is none."""
    series = [values_of(run, tag) for run in runs]
    if not all(series):
        return None
    steps = np.array(sorted(set.intersection(*(set(steps.tolist()) for steps, _ in series))), np.int64)
    if not len(steps):
        return None
    rows = np.array([values[np.isin(at, steps)] for at, values in series])
    return steps, rows.mean(0), rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(len(steps))


def main(out: str, named: list[str]) -> int:
    """Draw, or say what is wrong in one line; returns the exit status."""
    try:
        draw(Path(out), named)
    except (InputError, CannotWrite) as e:
        cmdline.complain(e, "compare.py")
        return 1 if isinstance(e, CannotWrite) else 2
    return 0


def draw(out: Path, named: list[str]) -> None:
    """Write the figure and say of each line what it is the mean of. Raises `InputError` and `CannotWrite`."""
    if out.suffix[1:] not in FORMATS:
        raise InputError(f"{out}: the name must end in .{', .'.join(FORMATS)}")
    kinds: dict[str, list[runfolders.Run]] = {}
    for name, _, words in (word.partition("=") for word in named):
        if name in kinds:
            raise InputError(f"'{name}': there twice; each line has a name of its own")
        kinds[name] = chosen(words)
    absent = {name: [tag for _, tag, _ in PANELS if not line(runs, tag)] for name, runs in kinds.items()}
    if all(len(tags) == len(PANELS) for tags in absent.values()):
        raise InputError("these runs have none of the series that are drawn")
    with whole_file(out, "OUT") as path:
        save_styled(figure_of, kinds, stem=path.with_suffix(""), formats=[out.suffix[1:]])
    for name, runs in kinds.items():
        lacking = f"; not drawn, for not all of them have it: {', '.join(absent[name])}" if absent[name] else ""
        print(f"{name}: {len(runs)} runs{lacking}")


def figure_of(kinds: dict[str, list[runfolders.Run]]) -> Figure:
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
        axis.set_title(title)
        axis.set_xlabel("optimizer steps")
    marks = {label: mark for axis in figure.axes for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.axes[0].legend(list(marks.values()), list(marks))
    return figure


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: compare.py OUT.png NAME=RUNS ...")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
