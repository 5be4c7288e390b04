"""The findings' part of a report: what follows from these runs for each claim, and by which rules.

A finding whose statistic these runs do not give, because something it needs was not measured or has not run, has a line in a
folded table and nothing else.
"""

import math

from study import findings, runvalues
from study.page import Page
from study.settings import Setting

NAMED = 3  # missing runs named in a finding's own line; the rest is folded

Judged = list[tuple[str, findings.Result]]  # (setting, result)


def interval_text(i: findings.Interval | None) -> str:
    """Mean, interval and number of seeds."""
    if i is None:
        return "no runs"
    bounds = f" [{i.low:+.4f}, {i.high:+.4f}]" if math.isfinite(i.low) else ""
    return f"{i.mean:+.4f}{bounds}, n = {i.n}"


def judge(settings: list[Setting], margins: dict[str, float], tuned: bool) -> Judged:
    """(setting, result) of every finding: in each setting whose runs give its statistic, or else in the largest one."""
    judged = []
    for finding in findings.FINDINGS:
        by_ratio = finding.id.startswith("4")
        if tuned and by_ratio:
            continue  # tuned cells have no learning rate of their own
        by_setting = []
        for s in settings:
            runs = s.all_runs if tuned else s.ratio_runs if by_ratio else s.runs
            rows = [runvalues.finding_row(r) for r in runs]
            result = findings.evaluate_finding(finding, findings.tuned(rows) if tuned else rows, margins)
            by_setting.append((s.label, result))
        judged += [pair for pair in by_setting if has_statistic(pair[1])] or by_setting[:1]
    return judged


def has_statistic(result: findings.Result) -> bool:
    """Whether the finding's statistic can be computed from the runs, under any budget."""
    return any(result.intervals.values())


def write_findings(page: Page, judged: Judged) -> None:
    """Verdicts with their intervals; what is missing and what cannot be judged is folded."""
    judged_here = [(setting, r) for setting, r in judged if has_statistic(r)]
    if judged_here:
        header = ["finding", "setting", "verdict", *findings.BUDGETS.values(), "margin"]
        rows = []
        for setting, r in judged_here:
            intervals = [interval_text(r.intervals[b]) for b in findings.BUDGETS]
            title = f"{r.finding.id}. {r.finding.title}"
            rows.append([title, setting, f"**{r.verdict}**", *intervals, f"{r.margin:g}"])
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
    """A verdict in words: the claim, its statistic, the rule that decided, what is missing."""
    f = r.finding
    text = f"**{f.id}** ({setting}). Claim: {f.claim}. Statistic: {f.statistic}; "
    text += f"claimed {'above' if f.direction > 0 else 'below'} 0. "
    text += f"Verdict: **{r.verdict}**, for: {findings.RULES[r.verdict]}."
    if f.null and r.aa:
        text += f" A/A runs: {interval_text(r.aa)}."
    if r.missing:
        rest = len(r.missing) - NAMED
        text += " Missing: " + "; ".join(r.missing[:NAMED]) + (f"; and {rest} more, below" if rest > 0 else "") + "."
    if r.verdict == "not resolved" and r.needed:
        text += f" About {r.needed} seeds would resolve it, if effect and spread stay as they are."
    return text


def write_rules(page: Page, margins: dict[str, float]) -> None:
    """How a verdict is reached."""
    page.text(
        "The unit is the seed: a statistic is computed from each seed's runs alone (same noise, split and initialization), averaged over "
        "the cells that the claim speaks of, and only then tested; intervals are Student t, 95 %. Runs without a schedule count under "
        f"every budget. Margins: {margins['acc']:g} in accuracy (and per doubling of B), {margins['cos']:g} in a cosine or ratio, "
        f"{margins['log2b']:g} doublings of B. The first rule that applies decides:"
    )
    page.table(["verdict", "rule"], [[k, v] for k, v in findings.RULES.items()])
