"""The report's sections on runs that differ in nothing but their loss, or but the kind of their label noise: side by side, with
what it does to the gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from losses import LOSSES
from noises import NOISES
from series import MEMORIZED, NORM_CLEAN, NORM_NOISY, TEST_ACC, VAL_ACC
from study.analysis import rules
from study.markup import literal
from study.page import Page
from study.runfolders import Run
from study.runvalues import last_value, null_tag, while_trained
from study.settings import Setting, group_by
from study.stopping import CELL_HEADER, cell_text, mean_text

PAIR = "cos_clean_noisy"
HALVES = ("first half", "second half")
FINAL = {MEMORIZED: "memorized", VAL_ACC: VAL_ACC, TEST_ACC: TEST_ACC}


def by_halves(run: Run, a: str, b: str, how) -> list[float | None]:
    """Means of how(a, b) over the first and the second half of the steps that both series have, `while_trained`."""
    (sa, va), (sb, vb) = (run.series.get(tag, (np.zeros(0, np.int64), np.zeros(0))) for tag in (a, b))
    steps, ia, ib = np.intersect1d(sa, sb, return_indices=True)
    kept = while_trained(run, steps)
    halves = np.array_split(how(va[ia[kept]], vb[ib[kept]]), 2)
    return [float(half.mean()) if len(half) else None for half in halves]


def gradient_values(run: Run) -> list[float | None]:
    """In each half of the run: mean cosine of the clean and the noisy gradient, that of its null at the same steps, and the
    geometric mean of |g_N| / |g_C|."""
    raw, null = f"grad/{PAIR}", null_tag(run, PAIR)
    cosines = zip(by_halves(run, raw, null, lambda a, _: a), by_halves(run, raw, null, lambda _, b: b), strict=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [
            None if mean is None else float(np.exp(mean))
            for mean in by_halves(run, NORM_NOISY, NORM_CLEAN, lambda a, b: np.log(a / b))
        ]
    return [value for (cosine, beside), ratio in zip(cosines, ratios, strict=True) for value in (cosine, beside, ratio)]


def noise_kind(run: Run) -> str:
    """The kind of a run's label noise, with the labels of its file where they have a name."""
    return " ".join(str(run.options[name]) for name in ("noise_type", "noise_labels") if run.options.get(name))


@dataclass(frozen=True)
class Comparison:
    """Runs side by side that differ in these `options` alone.

    `label` says what a run has of them; `base` is the label that the others are compared with; `known`: what labels begin with,
    in order; `of_noise`: whether the options are the noise's, so that runs are compared at one realised share of wrong labels,
    whatever its nominal one.
    """

    heading: str
    column: str
    options: tuple[str, ...]
    label: Callable[[Run], str]
    base: str
    known: tuple[str, ...]
    of_noise: bool = False

    def place(self, run: Run) -> tuple:
        """What two runs must have in common to be compared, apart from the setting and the seed."""
        return run.budget, run.cell._replace(noise=0.0) if self.of_noise else run.cell, run.options["wd"]

    def order(self, run: Run) -> tuple:
        """Runs of a cell after one another, in the order of the known labels."""
        name = self.label(run)
        first = name.partition(":")[0].partition(" ")[0]
        return (
            *self.place(run),
            self.known.index(first) if first in self.known else len(self.known),
            name,
            run.cell.noise,
        )

    def setting(self, run: Run) -> tuple:
        """A run's setting but for the options."""
        return tuple((name, value) for name, value in run.setting if name not in self.options)


COMPARISONS = (
    Comparison("Losses", "loss", ("loss",), lambda run: str(run.options["loss"]), "ce", tuple(LOSSES)),
    Comparison(
        "Kinds of label noise",
        "kind of noise",
        ("noise_type", "noise_file", "noise_labels", "noise_matrix"),
        noise_kind,
        "uniform",
        tuple(NOISES),
        of_noise=True,
    ),
)
SAME_SHARE = 0.02  # realised shares of wrong labels that differ by no more are one


def realised(run: Run) -> float:
    """The share of wrong labels among the training examples."""
    share = last_value(run, "noise/realised")
    return run.cell.noise if share is None else share


def side_rows(comparison: Comparison, runs: list[Run]) -> list[list[str]]:
    """A row for each cell and label: means and deviations over the runs."""
    rows = []
    key = lambda r: (comparison.place(r), comparison.label(r), r.cell.noise)  # noqa: E731
    for same in group_by(sorted(runs, key=comparison.order), key).values():
        columns = zip(*(gradient_values(r) + [last_value(r, tag) for tag in FINAL] for r in same), strict=True)
        known = [[v for v in column if v is not None and np.isfinite(v)] for column in columns]
        shown = [mean_text(values, 3) if values else "" for values in known]
        share = [mean_text([realised(r) for r in same], 3)] * comparison.of_noise
        rows.append([literal(comparison.label(same[0])), *cell_text(same[0]), *share, str(len(same)), *shown])
    return rows


def compared_values(run: Run) -> dict[str, float]:
    """What is compared seed by seed: cosine minus null and the ratio's logarithm in each half of the run, and the end."""
    values = gradient_values(run)
    compared = {}
    for i, half in enumerate(HALVES):
        cosine, null, ratio = values[3 * i : 3 * i + 3]
        if cosine is not None and null is not None:
            compared[f"cosine minus null, {half}"] = cosine - null
        if ratio:
            compared[f"norm, noisy / clean, {half}"] = float(np.log(ratio))
    compared |= {name: value for tag, name in FINAL.items() if (value := last_value(run, tag)) is not None}
    return compared


def partner(run: Run, base: list[Run]) -> Run | None:
    """Of the runs `base`, the one of the same seed whose share of wrong labels is the same, the nearest of several."""
    apart = {abs(realised(other) - realised(run)): other for other in base if other.seed == run.seed}
    return apart[min(apart)] if apart and min(apart) <= SAME_SHARE else None


def compared_rows(comparison: Comparison, runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): every label against the base of the same cell and seed, where three seeds or more have both.

    Differences with their 95 % interval; of the norms' ratio, a factor.
    """
    columns = [f"{name}, {half}" for half in HALVES for name in ("cosine minus null", "norm, noisy / clean")]
    columns += FINAL.values()
    rows = []
    for same in group_by(sorted(runs, key=comparison.order), comparison.place).values():
        of_label = group_by(same, lambda r: (comparison.label(r), r.cell.noise))
        base = [r for r in same if comparison.label(r) == comparison.base]
        for (label, _), others in of_label.items():
            if label == comparison.base:
                continue
            pairs = [(compared_values(r), compared_values(other)) for r in others if (other := partner(r, base))]
            shown = [
                compared_text(name, [a[name] - b[name] for a, b in pairs if name in a and name in b])
                for name in columns
            ]
            if any(shown):
                rows.append([literal(label), *cell_text(others[0]), str(len(pairs)), *shown])
    return columns, rows


def compared_text(name: str, differences: list[float]) -> str:
    """Mean difference and its interval; of logarithms of a ratio, the factor."""
    if len(differences) < rules.LEAST_SEEDS or not np.isfinite(differences).all():
        return ""
    mean = float(np.mean(differences))
    low, high = (float(x[0]) for x in rules.moments(np.array(differences)[:, None]).limits(len(differences)))
    if name.startswith("norm"):
        return f"{np.exp(mean):.2f} times [{np.exp(low):.2f}, {np.exp(high):.2f}]"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def write_side_by_side(page: Page, settings: list[Setting]) -> None:
    """A section for each of `COMPARISONS` with settings that differ in its options alone; nothing where there are none."""
    for comparison in COMPARISONS:
        write_sides(page, comparison, settings)


def write_sides(page: Page, comparison: Comparison, settings: list[Setting]) -> None:
    """One comparison's section: a table of cells for each group of settings, and the differences from its base."""
    apart = group_by([s for s in settings if s.ratio_runs], lambda s: comparison.setting(s.ratio_runs[0]))
    tables = []
    for alike in apart.values():
        runs = [r for s in alike for r in s.ratio_runs if r.finished and not r.fake]
        runs = [r for r in runs if r.cell.noise > 0] if comparison.of_noise else runs
        if len({comparison.label(r) for r in runs}) > 1:
            label = min((s.label for s in alike), key=len)  # the base's, where it is among them
            tables.append((label, side_rows(comparison, runs), *compared_rows(comparison, runs)))
    if not tables:
        return
    page.heading(2, comparison.heading)
    names = [f"{name}, {half}" for half in HALVES for name in ("cos(clean, noisy)", "its null", "norm, noisy / clean")]
    for label, rows, columns, compared in tables:
        page.text(literal(label))
        share = ["noise (realised)"] * comparison.of_noise
        page.table([comparison.column, *CELL_HEADER, *share, "runs", *names, *FINAL.values()], rows)
        if compared:
            page.text(
                f"Against `{comparison.base}`, seed by seed, with the 95 % interval (t) of each difference alone:"
            )
            page.table([comparison.column, *CELL_HEADER, "seeds", *columns], compared)
    page.text(
        "Gradients are those of the loss that trains. Cosine and null: means over the first and the second half of the measured steps "
        "that have both; the null is that of random masks, where a run has them. Ratio of the norms: geometric mean; of random masks it "
        "lies between 1 and the root of |C| / |N|, for the mean of fewer examples is the longer. What turns the noisy gradients "
        f"towards the clean ones brings the cosine closer to its null than `{comparison.base}` does; what only makes them shorter "
        "lowers the ratio and leaves the cosine where it was. Memorized and accuracies: at the end. ± one standard deviation over runs."
        + f" Compared at realised shares of wrong labels that differ by at most {SAME_SHARE}."
        * comparison.of_noise
    )
