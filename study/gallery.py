"""Which figures a report on many runs holds, and in what order: numbered as in the report, then the controls and summaries.

A figure that cannot be drawn is named, with the reason, in a folded list.
"""

from collections.abc import Callable

from schedules import entry
from series import ACC_NOISY, CORRECTED_COS, COS_CLEAN_ALL, SERIES, VAL_ACC
from study import figures
from study.drawing import Look, save_styled
from study.page import Page
from study.settings import Setting

FIRST_FIGURES = {VAL_ACC: (4, 15), COS_CLEAN_ALL: (7, 16), ACC_NOISY: (10, 17)}  # on CIFAR-10, on Fashion-MNIST
BUDGET_WORDS = {
    "any": "",
    "steps": "",
    "epochs": ", schedule matched in epochs",
    "examples": ", schedule matched in examples",
}


class Gallery:
    """Draws figures onto a page, in `formats`, and remembers those that could not be drawn."""

    def __init__(self, page: Page, look: Look, formats: tuple[str, ...], suffix: str = "") -> None:
        self.page, self.look, self.formats, self.suffix = page, look, formats, suffix
        self.absent: list[str] = []
        self.used: dict[str, int] = {}

    def add(self, stem: str, title: str, reason: str, make: Callable, *args, **kwargs) -> None:
        """One figure, `make(title, ...)`, saved as STEM; where it comes to nothing, title and `reason` are kept instead."""
        stem += self.suffix
        if save_styled(make, title, *args, stem=self.page.out / stem, formats=self.formats, **kwargs):
            self.page.figure(stem, title)
        elif reason:
            self.absent.append(f"{title}: {reason}")

    def unique(self, stem: str) -> str:
        """`stem`, numbered from its second use on."""
        self.used[stem] = self.used.get(stem, 0) + 1
        return stem + (f"-{self.used[stem]}" if self.used[stem] > 1 else "")

    def report_figures(self, s: Setting) -> None:
        """The report's three series over time, for each schedule and budget of a setting."""
        fmnist = any(r.options["dataset"] == "fmnist" for r in s.runs)
        of_report = not fmnist or all(
            r.options["model"].startswith("vgg") for r in s.runs
        )  # its Fashion-MNIST is VGG's
        for tag, (first, first_fmnist) in FIRST_FIGURES.items():
            label = SERIES[tag].label
            for sched in figures.scheds_of(s.ratio_runs):
                i = figures.REPORT_SCHEDS.index(sched) if sched in figures.REPORT_SCHEDS else None  # others: no number
                for budget, words in BUDGET_WORDS.items():
                    runs = [r for r in s.ratio_runs if (r.cell.sched, r.budget) == (sched, budget)]
                    one_rate = [r for r in s.runs if (r.cell.sched, r.budget) == (sched, budget)]
                    if not runs:
                        continue
                    number = first_fmnist if fmnist and i == 0 else None if fmnist or i is None else first + i
                    number = number if of_report else None
                    pairs = figures.ratio_pairs(runs)  # figures 13 and 14; any other grid of rates has no number
                    wanted = [(None if pairs else number, tag.replace("/", "-"), one_rate, False)]
                    if s.ratio and tag == VAL_ACC:
                        by_rate = ({0: 13, 2: 14}.get(i) if pairs else None, "val-acc-by-rate", runs, True)
                        wanted = [by_rate] if pairs else [*wanted, by_rate]
                    for number, stem, chosen, by_lr in wanted:
                        stem = f"figure-{number:02d}" if number else f"{stem}-{sched}"
                        stem = self.unique(stem + (f"-{budget}" if budget in ("epochs", "examples") else ""))
                        title = f"Figure {number}: " if number else ""
                        title += f"{label}, {entry(sched).label}{words}{', by rate' * by_lr} ({s.label})"
                        args = (chosen, tag, self.look)
                        self.add(stem, title, f"no run has {tag}", figures.curves, *args, by_lr=by_lr)

    def controls(self, s: Setting, number: str) -> None:
        """Cosines beside their nulls, corrected cosines and probes, for each schedule and budget of a setting."""
        for sched in sorted({r.cell.sched for r in s.runs}):
            for budget, words in BUDGET_WORDS.items():
                runs = [
                    r
                    for r in s.runs
                    if (r.cell.sched, r.budget) == (sched, budget) or (r.fake and r.cell.sched == sched)
                ]
                own = [r for r in runs if r.budget == budget]
                if not any(not r.fake for r in own):
                    continue
                where = f"{entry(sched).label}{words} ({s.label})"
                end = f"{sched}-{budget}{number}"
                for pair, name in (("cos_clean_all", "clean and all"), ("cos_clean_noisy", "clean and noisy")):
                    title = f"Cosine of {name} beside its null, {where}"
                    reason = f"no run with noise has null/{pair} or corrected/{pair}"
                    self.add(f"null-{pair}-{end}", title, reason, figures.nulls, runs, pair)
                title, tag = f"Corrected cosine of clean and noisy, {where}", CORRECTED_COS
                args = (own, tag, self.look)
                self.add(f"corrected-{end}", title, f"no run with noise has {tag}", figures.curves, *args)
                title = f"Noisy training examples: memorized, recovered, other; {where}"
                self.add(
                    f"probes-{end}", title, "no run with noise has probe/memorized", figures.probes, own, self.look
                )

    def summaries(self, s: Setting, number: str) -> None:
        """Final accuracies against lr/B, and the best batch size against noise."""
        title = f"Accuracy by lr/B{' and by lr/(B(1-m))' * s.of_sgd} ({s.label})"
        self.add(f"ratio{number}", title, "no finished run", figures.by_ratio, s.ratio_runs, s.of_sgd)
        title = f"Best batch size against noise ({s.label})"
        reason = "needs finished runs of three batch sizes"
        self.add(f"best-batch{number}", title, reason, figures.best_batch_sizes, s.runs)


def add_figures(page: Page, settings: list[Setting], look: Look, formats: tuple[str, ...], suffix: str = "") -> None:
    """Every figure that the runs have series for; those that cannot be drawn are named."""
    gallery = Gallery(page, look, formats, suffix)
    if not suffix:
        runs = [r for s in settings for r in s.runs]
        gallery.add("figure-03", "Figure 3: schedules", "", lambda _, runs: figures.schedule_curves(runs), runs)
    for i, s in enumerate(settings):
        number = f"-{i + 1}" if i else ""
        gallery.report_figures(s)
        gallery.controls(s, number)
        gallery.summaries(s, number)
    if gallery.absent:
        with page.folded(f"{len(gallery.absent)} figure{'s' * (len(gallery.absent) > 1)} not drawn"):
            page.bullets(gallery.absent)
