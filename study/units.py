"""What one run gives to the findings, and which runs are one independent unit: seeds, pooled where grids cross them.

A run's seed is written SEED/NOISE-SEED/SPLIT-SEED. Two runs that share one of these are not independent where it varies: a
grid that crosses three seeds with three noise seeds has three units, not nine. Pooled over the noise seeds its units are the
seeds, and their spread has nothing of the noise seeds' own; so it is judged by either, and the verdict has to hold by both.
"""

import statistics
from collections import defaultdict
from dataclasses import dataclass, replace

from study.runfolders import Cell


@dataclass(frozen=True)
class RunRow:
    """One run: its cell, its seed, the budget its schedule is matched in (`any` without a schedule), and what the findings
    need of it (`values`, without those that it lacks; none of one that did not finish). `fake`: an A/A run's share."""

    cell: Cell
    seed: str
    budget: str
    values: dict[str, float]
    name: str = ""
    fake: float = 0.0
    wd: float = 5e-4
    finished: bool = True


Seed = tuple[str, ...]


def partitions(seeds: set[Seed]) -> list[dict[Seed, str]]:
    """Every way to pool seeds into units, {seed: its unit}; none where all seeds are independent of one another as they are.

    A unit may be the runs of one value of a varied seed if each of the other varied seeds is either crossed with it (its values
    are the same in every unit) or nested in it (no value in two units). If there is no such seed, what hangs together is one unit.
    """
    varied = [k for k in range(max(map(len, seeds))) if len({s[k] for s in seeds}) > 1]
    if all(len({s[k] for s in seeds}) == len(seeds) for k in varied):
        return []
    groupings: dict[frozenset, dict[Seed, str]] = {}
    for k in varied:
        groups = defaultdict(set)
        for s in seeds:
            groups[s[k]].add(s)
        sets = [[{s[j] for s in group} for group in groups.values()] for j in varied if j != k]
        if all(all(a == of[0] for a in of) or sum(map(len, of)) == len(set().union(*of)) for of in sets):
            groupings.setdefault(frozenset(map(frozenset, groups.values())), {s: s[k] for s in seeds})
    if groupings:
        return list(groupings.values())
    units = {s: {s} for s in seeds}
    for a in seeds:
        for b in seeds:
            if units[a] is not units[b] and any(a[k] == b[k] for k in varied):
                units[a] |= units[b]
                units |= dict.fromkeys(units[b], units[a])
    return [{s: "/".join(min(units[s])) for s in seeds}]


def poolings(rows: list[RunRow]) -> list[list[RunRow]]:
    """Rows of independent units, in every way of `partitions`: those of one unit are averaged, cell by cell, and stand under the
    unit's name. The rows themselves where seeds are independent as they are."""
    seeds = {tuple(r.seed.split("/")) for r in rows}
    ways = partitions(seeds) if len(set(map(len, seeds))) == 1 else []
    return [pooled(rows, units) for units in ways] or [rows]


def pooled(rows: list[RunRow], units: dict[Seed, str]) -> list[RunRow]:
    """The mean row of each unit, cell and budget. A cell without a finished run of one of the unit's seeds is not finished."""
    groups: dict[tuple, list[RunRow]] = defaultdict(list)
    for r in rows:
        groups[units[tuple(r.seed.split("/"))], bool(r.fake), r.cell, r.budget, r.fake, r.wd].append(r)
    size: dict[tuple, int] = defaultdict(int)
    for key, group in groups.items():
        size[key[:2]] = max(size[key[:2]], len(group))
    means = []
    for key, group in groups.items():
        whole = len(group) == size[key[:2]] and all(r.finished for r in group)
        names = sorted(set.intersection(*(set(r.values) for r in group))) if whole else ()
        values = {name: statistics.fmean(r.values[name] for r in group) for name in names}
        means.append(replace(group[0], seed=key[0], values=values, finished=whole))
    return means


def tuned(rows: list[RunRow]) -> list[RunRow]:
    """One row for each cell, budget and seed: the learning rate and weight decay that did best on the *other* seeds.

    Best by mean validation accuracy. The cell keeps no trace of what was chosen, so that cells can be compared; seeds
    without any other seed to choose on are left out. Where no run of a cell finished, one that did not stands for it.
    """
    candidates: dict[tuple, dict[tuple, dict[str, RunRow]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if "val_acc" in row.values:
            where = (row.cell._replace(lr=0.0), row.budget, row.fake)
            candidates[where][(row.cell.lr, row.wd)][row.seed] = row
    chosen = []
    for row in rows:
        cell = row.cell._replace(lr=0.0)
        if not row.finished and (cell, row.budget, row.fake) not in candidates:
            chosen.append(replace(row, cell=cell))
    for (cell, _, _), choices in candidates.items():
        for seed in sorted({s for by_seed in choices.values() for s in by_seed}):
            scores = {}
            for value, by_seed in choices.items():
                others = [r.values["val_acc"] for s, r in by_seed.items() if s != seed]
                if others:
                    scores[value] = statistics.fmean(others)
            best = max(scores, key=scores.get, default=None)
            if best is not None and seed in choices[best]:
                row = choices[best][seed]
                chosen.append(RunRow(cell, seed, row.budget, row.values, row.name, row.fake))
    return chosen
