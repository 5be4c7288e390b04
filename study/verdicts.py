"""The findings' part of a report: what follows from these runs for each claim, and by which rules.

A finding whose statistic these runs do not give, because something it needs was not measured or has not run, has a line in a
folded table and nothing else.
"""

import math

from study import findings, runvalues
from study.contrasts import has_one_momentum
from study.page import Page
from study.rules import LEVEL, RULES
from study.settings import Setting
from study.stats import holm

ONE_MOMENTUM = "4m is this finding, too: with one momentum lr/(B(1-m)) is equal where lr/B is"
NAMED = 3  # missing runs named in a finding's own line; the rest is folded

Judged = list[tuple[str, findings.Result]]  # (setting, result)


def interval_text(i: findings.Interval | None) -> str:
    """Mean, interval and number of seeds."""
    if i is None:
        return "no runs"
    bounds = f" [{i.low:+.4f}, {i.high:+.4f}]" if math.isfinite(i.low) else ""
    return f"{i.mean:+.4f}{bounds}, n = {i.n}"


def judge(settings: list[Setting], margins: dict[str, float], rates: str = "fixed") -> Judged:
    """(setting, result) of every finding: in each setting whose runs give its statistic, or else in the largest one.

    `rates`: batch sizes are compared at one learning rate ("fixed"), at one lr/B ("scaled"), each cell at its best rate and
    weight decay of the other seeds ("tuned"), or at what a search has chosen ("searched"); at one lr/B and at what was searched only
    the findings that compare batch sizes. The findings about lr/B are judged once, with the first; the one about lr/(B(1-m))
    where SGD's momentum is an axis, for with one momentum it is that about lr/B.
    """
    judged = []
    for finding in findings.FINDINGS:
        by_ratio = bool(finding.corners)
        if (by_ratio and rates != "fixed") or (rates in ("scaled", "searched") and not finding.sized):
            continue
        by_setting = []
        for s in settings:
            if finding.of_sgd and not s.of_sgd:
                continue
            runs = {"scaled": s.scaled, "tuned": s.all_runs}.get(rates, s.ratio_runs if by_ratio else s.runs)
            rows = [runvalues.finding_row(r) for r in runs]
            cells = {row.cell for row in rows if finding.covers(row.cell)}
            same_pairs = by_ratio and s.of_sgd and has_one_momentum(cells)
            if same_pairs and finding.of_sgd:
                continue  # it would count the test of lr/B twice
            result = findings.evaluate_finding(finding, rows, margins, at_best=rates == "tuned")
            result.notes += [ONE_MOMENTUM] * same_pairs
            by_setting.append((s.label, result))
        judged += [pair for pair in by_setting if has_statistic(pair[1])] or by_setting[:1]
    return judged


def has_statistic(result: findings.Result) -> bool:
    """Whether the finding's statistic can be computed from the runs, under any budget."""
    return any(result.intervals.values())


def holm_texts(results: list[findings.Result]) -> list[str]:
    """Whether each verdict stands if all of them are to hold at once, and its adjusted p; nothing for *not resolved*."""
    adjusted = holm([1.0 if r.p is None else r.p for r in results])
    words = (f"{'stands' if p <= LEVEL else 'not resolved'}, p = {p:.2g}" for p in adjusted)
    return [text if r.p is not None else "" for r, text in zip(results, words, strict=True)]


def titled(r: findings.Result) -> str:
    """A finding's title with the learning rate of its comparison."""
    return r.finding.title + (f", {r.rate}" if r.rate else "")


def verdict_words(r: findings.Result) -> str:
    """The verdict, labelled where one interval was all there was to test."""
    return f"**{r.verdict}**" + " (one budget)" * r.one_budget


def write_findings(page: Page, judged: Judged) -> None:
    """Verdicts with their intervals; what is missing and what cannot be judged is folded."""
    judged_here = [(setting, r) for setting, r in judged if has_statistic(r)]
    if judged_here:
        shown = [b for b in findings.BUDGETS if b in findings.RULED or any(r.intervals[b] for _, r in judged_here)]
        header = [
            "finding",
            "setting",
            "verdict",
            "after Holm",
            *(findings.BUDGETS[b] for b in shown),
            "steps - epochs",
            "margin",
        ]
        rows = []
        for (setting, r), text in zip(judged_here, holm_texts([r for _, r in judged_here]), strict=True):
            intervals = [interval_text(r.intervals[b]) if b == "steps" or not r.one_budget else "" for b in shown]
            apart = interval_text(r.difference) if r.difference else ""
            rows.append(
                [f"{r.finding.id}. {titled(r)}", setting, verdict_words(r), text, *intervals, apart, f"{r.margin:g}"]
            )
        page.table(header, rows)
        page.bullets([explanation(setting, r) for setting, r in judged_here])
    lists = [
        [f"{r.finding.id} ({setting})", "; ".join(r.missing)] for setting, r in judged_here if len(r.missing) > NAMED
    ]
    if lists:
        with page.folded(f"Missing runs of {len(lists)} finding{'s' * (len(lists) > 1)}"):
            page.table(["finding", "missing"], lists)
    unjudged = [(setting, r) for setting, r in judged if not has_statistic(r)]
    if unjudged:
        ids = ", ".join(dict.fromkeys(r.finding.id for _, r in unjudged))
        with page.folded(f"{len(unjudged)} finding{'s' * (len(unjudged) > 1)} these runs cannot judge: {ids}"):
            rows = [
                [f"{r.finding.id}. {r.finding.title}", setting, f"**{r.verdict}**", "; ".join(r.missing)]
                for setting, r in unjudged
            ]
            page.table(["finding", "setting", "verdict", "missing"], rows)


def explanation(setting: str, r: findings.Result) -> str:
    """A verdict in words: the claim, its statistic, the rule that decided, what is beside it and what is missing."""
    f = r.finding
    text = f"**{f.id}** ({setting}). Claim{f', {r.rate}' if r.rate else ''}: {f.claim}. Statistic: {f.statistic}; "
    text += {1: "claimed above 0", -1: "claimed below 0", 0: "claimed to differ from 0"}[f.direction] + ". "
    rule = (
        "there is one budget, for no run has a schedule: its interval alone decides"
        if r.one_budget
        else RULES[r.verdict]
    )
    text += f"Verdict: {verdict_words(r)}, for: {rule}."
    words = [
        f"{findings.BUDGETS[b]} {reading(r.intervals[b], f.direction, r.margin)}"
        for b in findings.RULED
        if r.intervals[b]
    ]
    text += f" The interval under {'; that under '.join(words)}." if words else ""
    if len(f.gives) < len(RULES) and r.verdict == "not resolved":
        text += " This statistic can support the claim and cannot refute it."
    for budget, parts in r.parts.items():
        if parts and budget in findings.RULED:
            text += f" {size_words(findings.BUDGETS[budget], parts)}"
    for name in f.corners:
        at_corner = [(b, r.corners[b][name]) for b in findings.RULED if name in r.corners.get(b, {})]
        if len(at_corner) == 2 and at_corner[0][1] == at_corner[1][1]:
            at_corner = at_corner[:1]
        text += f" At {name}: " + ("; ".join(f"{interval_text(i)} ({b})" for b, i in at_corner) or "no such runs") + "."
    for aa in dict.fromkeys(r.aa[budget] for budget in findings.RULED if budget in r.aa):
        text += f" A/A runs: {interval_text(aa)}."
    for label, i in r.beside.items():
        text += f" Beside it, {label}: {interval_text(i)}."
    if r.notes:
        text += " Note: " + "; ".join(r.notes) + "."
    if r.missing:
        rest = len(r.missing) - NAMED
        text += " Missing: " + "; ".join(r.missing[:NAMED]) + (f"; and {rest} more, below" if rest > 0 else "") + "."
    if r.verdict == "not resolved" and r.needed:
        text += f" About {r.needed} seeds would resolve it, if effect and spread stay as they are."
    return text


def reading(i: findings.Interval, direction: int, margin: float) -> str:
    """What an interval says of a claim, in words."""
    if i.n < findings.LEAST_SEEDS:
        return "is one of too few seeds"
    if -margin < i.low and i.high < margin:
        return "lies inside the margin"
    if i.low > 0 or i.high < 0:
        return (
            "excludes 0"
            if direction == 0
            else f"excludes 0 {'as' if direction * i.mean > 0 else 'against what is'} claimed"
        )
    return "contains 0 and reaches beyond the margin"


def size_words(budget: str, parts: dict[str, findings.Interval]) -> str:
    """Which neighbouring sizes differ, by intervals that hold for all pairs at once."""
    if any(i.n < findings.LEAST_SEEDS for i in parts.values()):
        return f"Under {budget} there are too few seeds to tell sizes apart."
    words = (
        ("the larger memorizes more", lambda i: i.low > 0),
        ("the larger memorizes less", lambda i: i.high < 0),
        ("not told apart", lambda i: i.low <= 0 <= i.high),
    )
    listed = [
        f"{word} ({', '.join(names)})" for word, test in words if (names := [n for n, i in parts.items() if test(i)])
    ]
    return f"Neighbouring sizes under {budget}: {'; '.join(listed)}."


def write_rules(page: Page, margins: dict[str, float]) -> None:
    """How a verdict is reached."""
    page.text(
        "The unit is the seed: a statistic is computed from each seed's runs alone (same noise, split and initialization), averaged over "
        "the cells that the claim speaks of, and only then tested; intervals are Student t, 95 %. Where no run has a schedule there is "
        f"one budget, and its interval alone decides. Margins: {margins['acc']:g} in accuracy (and per doubling of B), {margins['cos']:g} in a cosine, "
        f"{margins['difference']:g} in grad/difference, {margins['dimension']:g} in the logarithm of a share of dimensions, "
        f"{margins['log2b']:g} doublings of B. A budget claims if its interval excludes 0 in the claimed direction and does not lie inside "
        "the margin; it refutes if the interval lies inside the margin or on the other side of 0."
    )
    page.table(["verdict", "rule"], [[k, v] for k, v in RULES.items()])
    page.text(
        "Each verdict is that of its finding alone. The column after Holm says whether it stands if all verdicts of the table are to hold at "
        "once, with 95 % confidence, and its p value adjusted for that (Holm 1979): the largest p of the tests that the verdict rests on, "
        "over as many findings as the table has."
    )
