"""The report's section on losses: runs that differ in nothing but `--loss` side by side, with what it does to the gradients."""

import numpy as np

from losses import LOSSES
from study.markup import literal
from study.page import Page
from study.runfolders import Run
from study.runvalues import last_value, null_tag, while_trained
from study.settings import Setting, group_by
from study.stats import LEAST_SEEDS, interval
from study.stopping import CELL_HEADER, cell_text, mean_text

PAIR = "cos_clean_noisy"
HALVES = ("first half", "second half")
FINAL = {"probe/memorized": "memorized", "val/acc": "val/acc", "test/acc": "test/acc"}


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
            for mean in by_halves(run, "grad/norm_noisy", "grad/norm_clean", lambda a, b: np.log(a / b))
        ]
    return [value for (cosine, beside), ratio in zip(cosines, ratios, strict=True) for value in (cosine, beside, ratio)]


def order(run: Run) -> tuple:
    """Runs of a cell after one another, in the order of the registry's losses."""
    name = str(run.options["loss"])
    known = list(LOSSES)
    place = known.index(name.partition(":")[0]) if name.partition(":")[0] in known else len(known)
    return run.budget, run.cell, run.options["wd"], place, name


def loss_rows(runs: list[Run]) -> list[list[str]]:
    """A row for each cell and loss: means and deviations over the runs."""
    rows = []
    cells = group_by(sorted(runs, key=order), lambda r: (r.budget, r.cell, r.options["wd"], r.options["loss"]))
    for same in cells.values():
        columns = zip(*(gradient_values(r) + [last_value(r, tag) for tag in FINAL] for r in same), strict=True)
        known = [[v for v in column if v is not None and np.isfinite(v)] for column in columns]
        shown = [mean_text(values, 3) if values else "" for values in known]
        rows.append([literal(same[0].options["loss"]), *cell_text(same[0]), str(len(same)), *shown])
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


def compared_rows(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): every loss against the cross-entropy of the same cell and seed, where three seeds or more have both.

    Differences with their 95 % interval; of the norms' ratio, a factor.
    """
    columns = [f"{name}, {half}" for half in HALVES for name in ("cosine minus null", "norm, noisy / clean")]
    columns += FINAL.values()
    rows = []
    cells = group_by(sorted(runs, key=order), lambda r: (r.budget, r.cell, r.options["wd"]))
    for same in cells.values():
        of_loss = group_by(same, lambda r: r.options["loss"])
        plain = {r.seed: compared_values(r) for r in of_loss.pop("ce", [])}
        for loss, others in of_loss.items():
            pairs = [(compared_values(r), plain[r.seed]) for r in others if r.seed in plain]
            shown = [
                compared_text(name, [a[name] - b[name] for a, b in pairs if name in a and name in b])
                for name in columns
            ]
            if any(shown):
                rows.append([literal(loss), *cell_text(others[0]), str(len(pairs)), *shown])
    return columns, rows


def compared_text(name: str, differences: list[float]) -> str:
    """Mean difference and its interval; of logarithms of a ratio, the factor."""
    if len(differences) < LEAST_SEEDS or not np.isfinite(differences).all():
        return ""
    i = interval(differences)
    if name.startswith("norm"):
        return f"{np.exp(i.mean):.2f} times [{np.exp(i.low):.2f}, {np.exp(i.high):.2f}]"
    return f"{i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}]"


def write_losses(page: Page, settings: list[Setting]) -> None:
    """A table for each group of settings that differ in their loss alone; nothing where there is one loss."""
    apart = group_by([s for s in settings if s.ratio_runs], lambda s: without_loss(s.ratio_runs[0]))
    tables = []
    for alike in apart.values():
        runs = [r for s in alike for r in s.ratio_runs if r.finished and not r.fake]
        if len({r.options["loss"] for r in runs}) > 1:
            label = min((s.label for s in alike), key=len)  # the cross-entropy's, where it is among them
            tables.append((label, loss_rows(runs), *compared_rows(runs)))
    if not tables:
        return
    page.heading(2, "Losses")
    names = [f"{name}, {half}" for half in HALVES for name in ("cos(clean, noisy)", "its null", "norm, noisy / clean")]
    for label, rows, columns, compared in tables:
        page.text(literal(label))
        page.table(["loss", *CELL_HEADER, "runs", *names, *FINAL.values()], rows)
        if compared:
            page.text("Against `ce`, seed by seed, with the 95 % interval (t) of each difference alone:")
            page.table(["loss", *CELL_HEADER, "seeds", *columns], compared)
    page.text(
        "Gradients are those of the loss that trains. Cosine and null: means over the first and the second half of the measured steps "
        "that have both; the null is that of random masks, where a run has them. Ratio of the norms: geometric mean; of random masks it "
        "lies between 1 and the root of |C| / |N|, for the mean of fewer examples is the longer. A loss that turns the noisy gradients "
        "towards the clean ones brings the cosine closer to its null than `ce` does; one that only makes them shorter lowers the ratio "
        "and leaves the cosine where it was. Memorized and accuracies: at the end. ± one standard deviation over runs."
    )


def without_loss(run: Run) -> tuple:
    """A run's setting but for its loss."""
    return tuple((name, value) for name, value in run.setting if name != "loss")
