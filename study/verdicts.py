"""The findings' part of a report: what follows from these runs for each claim, and by which rules.

A claim that these runs do not judge, because something it needs was not measured or has not run, has a line in a folded
table and nothing else.
"""

import math

import pandas as pd

from study.analysis import rules, runs
from study.analysis.hypotheses import HYPOTHESES, MARGINS, UNITS
from study.analysis.judge import BUDGETS, RULED, Reading, Result, has_schedule, judge, one_momentum
from study.markup import literal
from study.page import Page
from study.settings import Setting

ONE_MOMENTUM = "4m is this finding, too: with one momentum lr/(B(1-m)) is equal where lr/B is"
NAMED = 3  # missing runs named in a finding's own line; the rest is folded

Judged = list[tuple[str, Result]]  # (setting, result)


def judge_settings(settings: list[Setting], margins: dict[str, float] = MARGINS, rates: str = "fixed") -> Judged:
    """(setting, result) of every claim: in each setting whose runs give its statistic, or else in the largest one.

    `rates`: batch sizes are compared at one learning rate ("fixed"), at one lr/B ("scaled"), each cell at its best rate and
    weight decay of the other seeds ("tuned"), or at what a search has chosen ("searched"); in the last three only the claims that compare
    batch sizes. Those about lr/B are judged once, with the first; the one about lr/(B(1-m)) where SGD's momentum is an axis, for
    with one momentum it is that about lr/B.
    """
    tables = {id(s): table_of(s, rates) for s in settings}
    at_all_rates = {id(s): runs.table(s.ratio_runs) for s in settings} if rates == "fixed" else {}
    judged = []
    for h in HYPOTHESES:
        if rates != "fixed" and not h.sized:
            continue
        by_setting = []
        for s in settings:
            table, tried = (at_all_rates[id(s)], 1) if h.pairs else tables[id(s)]
            same = h.pairs and s.of_sgd and one_momentum(table[table["sched"].map(has_schedule) == h.scheduled])
            if h.pairs == "momentum ratio" and (same or not s.of_sgd):
                continue
            result = judge(h, table, margins, tried)
            result.notes += [ONE_MOMENTUM] * bool(same and h.scheduled)
            by_setting.append((s.label, result))
        judged += [pair for pair in by_setting if pair[1].readings] or by_setting[:1]
    return judged


def table_of(s: Setting, rates: str) -> tuple[pd.DataFrame, int]:
    """The runs that compare batch sizes, and of how many rates the other seeds have chosen one."""
    if rates != "tuned":
        return runs.table(s.scaled if rates == "scaled" else s.runs), 1
    table = runs.table(s.all_runs)
    return runs.tuned(table), runs.rates_tried(table)


# ------------------------------------------------------------------------------------------------------------ words


def reading_text(r: Reading) -> str:
    """A reading with the statistic's mean, bounds and number of seeds."""
    bounds = f" [{r.low:+.4f}, {r.high:+.4f}]" if math.isfinite(r.low + r.high) else ""
    return f"{r.word}: {r.mean:+.4f}{bounds}, n = {r.n}"


def titled(r: Result) -> str:
    """A claim's title with the learning rate of its comparison."""
    return r.hypothesis.title + (f", {r.rate}" if r.rate else "")


def verdict_words(r: Result) -> str:
    """The verdict, labelled where there is one budget."""
    return f"**{r.verdict}**" + " (one budget)" * (not r.hypothesis.scheduled)


def what_would_resolve(r: Result) -> list[str]:
    """What a claim that is not resolved lacks."""
    words = list(r.missing)
    for budget in RULED if r.hypothesis.scheduled else ("any",):
        reading = r.readings.get(budget)
        if reading is None or reading.code in rules.DEFINITE:
            continue
        if reading.n < rules.LEAST_SEEDS:
            needs = f"three complete seeds, there {'is' if reading.n == 1 else 'are'} {reading.n}"
        elif reading.code == rules.TURNS:
            needs = "nothing: it goes up and down with the batch size, and no slope sums that up"
        elif reading.needed:
            needs = f"about {reading.needed} seeds, if effect and spread stay as they are"
        else:
            needs = "more than seeds: it lies at the margin, or noise levels or sizes speak against one another"
        words.append(f"{BUDGETS[budget]}: {needs}")
    return words


def explanation(r: Result) -> str:
    """A verdict in words: the claim, its statistic, what each budget says, what is missing and what it holds for."""
    h = r.hypothesis
    text = f"Claim{f', {r.rate}' if r.rate else ''}: {h.claim}. Statistic, in {h.unit}: {h.statistic}; "
    text += f"claimed {'above' if h.direction > 0 else 'below'} 0{', never negligible' * (not h.negligible)}. "
    words = " and ".join(
        f"{reading.word} under {BUDGETS[budget]}" for budget, reading in r.readings.items() if budget != "examples"
    )
    text += f"Verdict: {verdict_words(r)}, for it is {words}."
    if r.shared:
        text += f" **It holds for {' and '.join(r.shared)}, which all seeds share; another may say something else.**"
    if r.verdict == "not resolved":
        text += f" What would resolve it: {'; '.join(what_would_resolve(r))}."
    for budget, reading in r.readings.items():
        notes = reading.notes + reading.incomplete[:NAMED]
        notes += [f"and {len(reading.incomplete) - NAMED} more, below"] * (len(reading.incomplete) > NAMED)
        text += f" {BUDGETS[budget][0].upper()}{BUDGETS[budget][1:]}: {'; '.join(notes)}." if notes else ""
    return text + (f" Note: {'; '.join(r.notes)}." if r.notes else "")


# ------------------------------------------------------------------------------------------------------------- page


def write_findings(page: Page, judged: Judged) -> None:
    """Verdicts with the readings of each budget and noise level; what is missing and what cannot be judged is folded."""
    here = [(setting, r) for setting, r in judged if r.readings]
    several = len({setting for setting, _ in judged}) > 1
    named = lambda setting, *cells: [cells[0], *[literal(setting)] * several, *cells[1:]]  # noqa: E731
    header = ["finding", *["setting"] * several]
    if here:
        shown = [b for b in BUDGETS if b in RULED or any(b in r.readings for _, r in here)]
        rows, levels = [], []
        for setting, r in here:
            title = f"{r.hypothesis.id}. {titled(r)}"
            cells = [reading_text(r.readings[b]) if b in r.readings else "" for b in shown]
            margin = f"{r.margin:g} {r.hypothesis.unit}"
            rows.append(named(setting, title, verdict_words(r), *cells, margin, " and ".join(r.shared)))
            parts = {b: r.readings[b].levels if b in r.readings else {} for b in shown}
            for level in dict.fromkeys(level for of in parts.values() for level in of):
                cells = [reading_text(of[level]) if level in of else "" for of in parts.values()]
                levels.append(named(setting, title, level, *cells))
        page.table([*header, "verdict", *(BUDGETS[b] for b in shown), "margin", "holds for"], rows)
        if levels:
            page.text("Each noise level for itself:")
            page.table([*header, "level", *(BUDGETS[b] for b in shown)], levels)
        page.bullets(
            [f"**{r.hypothesis.id}**{f' ({literal(setting)})' * several}. {explanation(r)}" for setting, r in here]
        )
    lists = [
        named(setting, r.hypothesis.id, BUDGETS[budget], "; ".join(reading.incomplete))
        for setting, r in here
        for budget, reading in r.readings.items()
        if len(reading.incomplete) > NAMED
    ]
    if lists:
        with page.folded("Seeds that are not complete"):
            page.table([*header, "budget", "missing"], lists)
    rest = [(setting, r) for setting, r in judged if not r.readings]
    if rest:
        ids = ", ".join(dict.fromkeys(r.hypothesis.id for _, r in rest))
        with page.folded(f"{len(rest)} finding{'s' * (len(rest) > 1)} these runs cannot judge: {ids}"):
            title = lambda h: f"{h.id}. {h.title}"  # noqa: E731
            page.table(
                [*header, "missing"], [named(setting, title(r.hypothesis), "; ".join(r.missing)) for setting, r in rest]
            )


def write_drift(page: Page, settings: list[Setting]) -> None:
    """How far the mean gradients of clean and noisy examples are apart in every cell, A/A runs beside; shown, not judged."""
    rows = []
    for s in settings:
        table = runs.table(s.ratio_runs).dropna(subset="difference_per_B")
        table = table[(table["noise"] > 0) | (table["fake"] > 0)]
        for (budget, fake, sched, noise, B, lr, _), same in table.groupby(["budget", "fake", *runs.CELL]):
            moments, n = rules.moments(same[["difference_per_B"]].to_numpy()), len(same)
            low, high = (float(limit[0]) for limit in moments.limits(n))
            bounds = f" [{low:+.4f}, {high:+.4f}]" if math.isfinite(low) else ""
            cells = [f"{sched}, {BUDGETS[budget]}", f"A/A {fake:g}" if fake else f"{noise:g}", str(B), f"{lr:g}"]
            rows.append([literal(s.label), *cells, f"{moments.mean[0]:+.4f}{bounds}, n = {n}"])
    if rows:
        with page.folded("1. Noisy gradients drift (described, not judged): grad/difference / B"):
            page.table(["setting", "schedule", "noise", "B", "lr", "mean over the schedule"], rows)
            page.text(
                f"The {runs.VALUES['difference_per_B'].label}. Unlike a cosine it does not depend on the batch size. In A/A runs a random half "
                "of clean labels is only called noisy: there it is 0 but for chance."
            )


def write_rules(page: Page, margins: dict[str, float]) -> None:
    """How a verdict is reached."""
    listed = ", ".join(f"{margins[name]:g} ({unit})" for name, unit in UNITS.items())
    page.text(
        "The unit is the seed: a statistic is computed from each seed's runs alone (same noise, split and initialization) and averaged over noise levels and "
        f"schedules. [l, u] are its 95 % bounds (Student's t over the complete seeds), in the claimed direction; the margin m, {listed}, is the smallest effect of interest."
    )
    page.table(["reading of a budget", "rule"], [list(pair) for pair in rules.READINGS.items()])
    page.table(["verdict", "readings"], [list(pair) for pair in rules.VERDICTS.items()])
    page.text(
        "A stretch speaks against a reading where it may go the other way by m times the doublings of the whole range; a noise level, where it may by m times "
        "their number. Where the best batch size is chosen on the other seeds, bounds are at 97.5 %. On planted sweeps at most one verdict in twenty is wrong (docs/findings.md)."
    )
