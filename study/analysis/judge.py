"""From the table of runs to verdicts: which cells a claim is about, which seeds have them all, and what the rules read from them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

import schedules
from study.analysis import rules
from study.analysis.hypotheses import MARGINS, Hypothesis
from study.analysis.rules import LEAST_SEEDS, OPEN, READINGS
from study.analysis.runs import CELL, VALUES, lr_batch_ratio
from study.analysis.statistics import Line
from study.runfolders import SEEDS, Cell

BUDGETS = {
    "steps": "the report's steps",
    "epochs": "matched epochs",
    "examples": "matched examples",
    "any": "constant rate",
}
RULED = ("steps", "epochs")  # what verdicts ask for; examples are shown
CEILING = 0.95  # share memorized beyond which an effect could hardly show
SHARED = {"seed": "one initialization", "noise_seed": "one draw of the noise", "split_seed": "one split"}

Lines = dict[str, list[tuple]]  # {its name: its cells with noise, by batch size}


@dataclass
class Reading:
    """What is read from a statistic: a code of rules.py, its mean and bounds over `n` complete seeds.

    `levels`: the same of each line alone; `incomplete`: what the other seeds lack; `notes`: cells left out, at chance, at a ceiling;
    `needed`: how many seeds would settle an open one, as means and deviations are.
    """

    code: int
    n: int
    mean: float
    low: float
    high: float
    levels: dict[str, "Reading"] = field(default_factory=dict)
    incomplete: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    needed: int | None = None

    @property
    def word(self) -> str:
        return list(READINGS)[self.code]


@dataclass
class Result:
    """A claim's verdict. `readings`: by budget; `rate`: the learning rate of the comparison in words; `shared`: what all seeds have in
    common, for which alone the verdict holds; `missing`: why a budget has no reading; `notes`: what else to know."""

    hypothesis: Hypothesis
    margin: float
    verdict: str = "not resolved"
    readings: dict[str, Reading] = field(default_factory=dict)
    rate: str = ""
    shared: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------ cells


def has_schedule(sched: str) -> bool:
    """Whether the learning rate moves, so that the schedule has a length."""
    return bool(schedules.entry(sched).moves)


def one_momentum(frame: pd.DataFrame) -> bool:
    """Whether every schedule has one momentum, so that lr / (B (1 - m)) is equal where lr / B is."""
    varied = frame[frame["sched"] != "onecycle"]
    return bool((varied.groupby("sched")["momentum"].nunique() <= 1).all())


def rate_words(frame: pd.DataFrame) -> str:
    """The learning rate at which batch sizes are compared: one, one lr/B, or tuned (a rate of 0); nothing otherwise."""
    rates, ratios = set(frame["lr"]), {f"{r:.6g}" for r in frame["lr"] / frame["B"]}
    if len(rates) == 1:
        return "at each cell's tuned rate" if rates == {0.0} else f"at lr {rates.pop():g}"
    return f"at lr/B {float(ratios.pop()):.3g}" if len(ratios) == 1 else ""


def cell_words(cell: tuple) -> str:
    """A cell in words."""
    sched, noise, B, lr, _ = cell
    return f"{sched}, noise {noise:g}, B {B}, {f'lr {lr:g}' if lr else 'its tuned rate'}"


def clean(cell: tuple) -> tuple:
    """The same cell without noise."""
    sched, _, *rest = cell
    return (sched, 0.0, *rest)


def units(frame: pd.DataFrame) -> list[pd.Series]:
    """What counts as one independent seed, {row: its name}, in every way that the grid allows.

    Seeds that vary together are one seed each. Where a grid crosses them (three seeds with three noise seeds each), runs that
    share one are not independent: they are pooled over one of the varied seeds at a time, and a reading has to hold in each way.
    """
    varied = [name for name in SEEDS if frame[name].nunique() > 1]
    together = frame[list(SEEDS)].drop_duplicates()
    if all(frame[name].nunique() == len(together) for name in varied):
        return [frame[(varied or SEEDS)[0]]]
    return [frame[name] for name in varied]


def lines_of(h: Hypothesis, cells: Iterable[tuple]) -> Lines:
    """The lines that cells make: with a cell without noise beside each where the claim needs it, and with two sizes or more where
    it compares sizes; of equal lr/B, the smallest and the largest."""
    cells = set(cells)
    groups: dict[tuple, list[tuple]] = {}
    for cell in sorted(c for c in cells if c[1] > 0 and (not h.clean or clean(c) in cells)):
        sched, noise, *_, momentum = cell
        ratio = f"{lr_batch_ratio(Cell(*cell), h.pairs == 'momentum ratio'):.6g}" if h.pairs else ""
        groups.setdefault((sched, noise, ratio, None if h.pairs == "momentum ratio" else momentum), []).append(cell)
    alike = Counter(key[:2] for key in groups)
    lines = {}
    for (sched, noise, ratio, momentum), line in groups.items():
        more = f", {f'ratio {ratio}' if ratio else f'momentum {momentum:g}'}" * (alike[sched, noise] > 1)
        line = sorted(line, key=lambda c: c[2])
        line = [line[0], line[-1]] if h.pairs else line
        if len({c[2] for c in line}) == len(line) and (len(line) > 1 or not (h.sized or h.pairs)):
            lines[f"{sched}, noise {noise:g}{more}"] = line
    return lines


# --------------------------------------------------------------------------------------------------------- readings


def read_lines(h: Hypothesis, cells: dict[tuple, np.ndarray], lines: Lines, margin: float, tests: int) -> Reading:
    """The reading of `cells` {cell: its values (n,), a complete seed each}."""
    side = lambda line: np.stack([cells[c] for c in line], -1)  # noqa: E731
    made = [
        Line(np.log2([c[2] for c in line]), side(line), side(map(clean, line)) if h.clean else None)
        for line in lines.values()
    ]
    e = h.estimate(made)
    s, n = rules.summary(e._replace(tests=e.tests * tests), h.direction), len(e.value)
    low, high = sorted(h.direction * float(bound) for bound in rules.bounds(s, n))
    reading = Reading(int(rules.read(s, n, margin, h.negligible)), n, float(e.value.mean()), low, high)
    if reading.code == OPEN:
        reading.needed = rules.seeds_needed(s, n, margin, h.negligible)
    return reading


def read_budget(h: Hypothesis, frame: pd.DataFrame, unit: pd.Series, margin: float, tests: int) -> Reading | str:
    """The reading of the rows of one budget; in words, why there is none.

    A cell that fewer than half of the seeds have is left out by name. Of the rest, the seeds that have all are judged.
    """
    groups = frame.assign(unit=unit).groupby(["unit", *CELL])
    runs = groups.size().groupby(level="unit").transform("max")  # a unit of crossed seeds is the mean of several runs
    table = groups[h.needs].mean().where(groups[h.needs].count() == runs).unstack(CELL)
    cells = dict(zip(table.columns, table.to_numpy().T))
    lost = [cell for cell, values in cells.items() if 2 * np.isfinite(values).sum() < len(values)]
    lines = lines_of(h, cells.keys() - set(lost))
    if not lines:
        return why_no_line(h, frame)
    used = {c for line in lines.values() for c in line}
    used |= {clean(c) for c in used} if h.clean else set()
    known = np.isfinite([cells[c] for c in sorted(used)])  # cells by seeds
    complete = known.all(0)
    status = groups["status"].first().to_dict()
    incomplete = []
    for seed, has in zip(table.index[~complete], known.T[~complete]):
        lacks = (c for c, there in zip(sorted(used), has) if not there)
        words = [f"{cell_words(c)} ({status.get((seed, *c), 'no run')})" for c in lacks]
        incomplete.append(f"seed {seed} lacks {', '.join(words)}")
    if not complete.any():
        return f"no seed has all of its runs: {'; '.join(incomplete)}"
    cells = {cell: values[complete] for cell, values in cells.items()}
    reading = read_lines(h, cells, lines, margin, tests)
    if len(lines) > 1:
        reading.levels = {name: read_lines(h, cells, {name: line}, margin, tests) for name, line in lines.items()}
    reading.incomplete = incomplete
    if lost:
        words = "; ".join(map(cell_words, lost))
        reading.notes.append(f"left out, for fewer than half of the seeds have it: {words}")
    reading.notes += conditions(h, frame[[cell in used for cell in frame[CELL].itertuples(index=False, name=None)]])
    return reading


def conditions(h: Hypothesis, frame: pd.DataFrame) -> list[str]:
    """What makes a reading conditional: runs that have never learned, and cells at their ceiling."""
    found = {"never learned (at chance at the end)": frame["at_chance"]}
    if h.needs == "memorized_excess":
        found[f"memorized over {CEILING}"] = frame["memorized"] > CEILING
    notes = []
    for what, holds in found.items():
        counts = Counter(cell_words(c) for c in frame.loc[holds, CELL].itertuples(index=False, name=None))
        listed = "; ".join(f"{cell}: {k} run{'s' * (k > 1)}" for cell, k in counts.items())
        notes += [f"{what}: {listed}"] * bool(listed)
    return notes


def why_no_line(h: Hypothesis, frame: pd.DataFrame) -> str:
    """Why a budget's runs have no line that a claim could be judged by."""
    done = frame[frame["status"] == "finished"]
    if done.empty:
        return "no finished run"
    if done.loc[done["noise"] > 0, h.needs].isna().all():
        return f"no run with noise has {VALUES[h.needs].series}"
    sizes = {"": "two batch sizes, each at one rate", "ratio": "batch sizes of equal lr/B"}
    return f"needs {sizes.get(h.pairs, 'batch sizes of equal lr/(B(1-m))')}{', with noise and without' * h.clean}"


def judge(h: Hypothesis, frame: pd.DataFrame, margins: dict[str, float] = MARGINS, rates: int = 1) -> Result:
    """The verdict on a claim from the table of runs of one setting, at one learning rate, one lr/B, or tuned rates.

    `rates`: from how many the other seeds have chosen the rate of a cell, by which the error rate is divided. Where the grid
    crosses seeds the reading of a budget is one that holds in every way of pooling them, with the widest interval.
    """
    result = Result(h, margins[h.margin])
    about = frame[(frame["fake"] == 0) & (frame["sched"].map(has_schedule) == h.scheduled)]
    about = about if h.clean else about[about["noise"] > 0]
    if about.empty:
        result.missing.append("no run that the claim speaks of")
        return result
    result.rate = rate_words(about) if h.sized else ""
    varied = about[list(SEEDS)].nunique()
    result.shared = [SHARED[name] for name in SEEDS if varied[name] == 1 < varied.max()]
    for budget in BUDGETS:
        under = about[about["budget"] == budget]
        if under.empty:
            result.missing += [f"{BUDGETS[budget]}: no run"] * (h.scheduled and budget in RULED)
            continue
        ways = [read_budget(h, under, unit[under.index], result.margin, rates) for unit in units(about)]
        if reasons := [way for way in ways if isinstance(way, str)]:
            result.missing.append(f"{BUDGETS[budget]}: {reasons[0]}")
            continue
        widest = max(ways, key=lambda r: r.high - r.low)
        if len(ways) > 1:
            each = ", ".join(f"{r.word} of {r.n}" for r in ways)
            widest.notes.append(f"the grid crosses seeds; pooled over one after the other: {each}")
            widest.code = widest.code if len({r.code for r in ways}) == 1 and widest.n >= LEAST_SEEDS else OPEN
        result.readings[budget] = widest
    codes = [result.readings[b].code for b in (RULED if h.scheduled else ["any"]) if b in result.readings]
    if len(codes) == 1 + h.scheduled:
        result.verdict = rules.verdict(codes)
    return result
