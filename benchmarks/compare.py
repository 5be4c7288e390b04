"""A few full runs side by side: six panels and a table.

python benchmarks/compare.py docs/noise.png human=runs/human matched=runs/matched uniform=runs/uniform
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from study import runfolders, runvalues  # noqa: E402

PANELS = [  # title, tag, its null or None
    ("validation accuracy", "val/acc", None),
    ("noisy training examples predicted as their wrong label", "probe/memorized", None),
    ("noisy training examples predicted as their true label", "probe/recovered", None),
    ("cos(clean, noisy); dashed: its null", "grad/cos_clean_noisy", "null/cos_clean_noisy"),
    ("cos(clean, all); dashed: its null", "grad/cos_clean_all", "null/cos_clean_all"),
    ("noise-corrected cos(clean, noisy), where resolved", "corrected/cos_clean_noisy", None),
]


def main(out: str, named: list[str]) -> None:
    runs = {name: runfolders.read_folder(Path(folder)) for name, _, folder in (word.partition("=") for word in named)}
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axis, (title, tag, null) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for i, (name, run) in enumerate(runs.items()):
            for which, style in ((tag, "-"), (null, "--")):
                if which in run.series:
                    steps, values = run.series[which]
                    axis.plot(steps, values, style, color=f"C{i}", label=name if style == "-" else None, marker=".")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer steps")
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(out, dpi=110)

    def mean(run, tag: str, at: str | None = None) -> str:
        if tag not in run.series:
            return "-"
        steps, values = run.series[tag]
        chosen = values if at is None or at not in run.series else values[np.isin(steps, run.series[at][0])]
        return f"{chosen.mean():.3f}"

    tags = ("val/acc", "probe/memorized", "probe/recovered", "probe/clean_acc", "probe/auc")
    cosines = ("cos_clean_noisy", "cos_clean_all")
    print(
        "| run | realised | " + " | ".join(tags) + " | " + " | ".join(f"{c}, its null, random masks" for c in cosines),
        end=" |",
    )
    print(" fresh/index | isotropy (isotropic) |\n" + "|---" * (len(tags) + 6) + "|")
    for name, run in runs.items():
        cells = [
            f"{runvalues.last_value(run, 'noise/realised'):.4f}",
            *(f"{runvalues.last_value(run, tag):.3f}" for tag in tags),
        ]
        for c in cosines:
            null = f"null/{c}"
            cells.append(", ".join((mean(run, f"grad/{c}", null), mean(run, null), mean(run, f"null/permuted_{c}"))))
        cells += [
            mean(run, "fresh/index"),
            f"{mean(run, 'isotropy/participation')} ({mean(run, 'isotropy/isotropic')})",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("Cosines, index and participation: means over the run's full measurements; the others: at the end.")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
