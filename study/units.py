"""What one run gives to the findings, and which runs are one independent unit: seeds, pooled where grids cross them.

A run's seed is written SEED/NOISE-SEED/SPLIT-SEED. Two runs that share one of these are not independent where it varies: a
grid that crosses three seeds with three noise seeds has three units, not nine.
"""

import statistics
from collections import defaultdict
from dataclasses import dataclass, replace

from study.runfolders import SEEDS, Cell


@dataclass(frozen=True)
class Row:
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


def chosen_unit(seeds: set[tuple[str, ...]]) -> dict[tuple[str, ...], str] | None:
    """{seed: its unit}, or None where all seeds are independent of one another as they are.

    The unit is that one of the varied seeds, of those with most values, over which each of the others is either crossed (its
    values are the same in every unit) or nested (no value in two units). If there is none, what hangs together is one unit.
    """
    varied = [k for k in range(max(map(len, seeds))) if len({s[k] for s in seeds}) > 1]
    if all(len({s[k] for s in seeds}) == len(seeds) for k in varied):
        return None
    for k in sorted(varied, key=lambda k: -len({s[k] for s in seeds})):
        groups = defaultdict(list)
        for s in seeds:
            groups[s[k]].append(s)
        sets = ([{s[j] for s in group} for group in groups.values()] for j in varied if j != k)
        if all(all(a == of[0] for a in of) or sum(map(len, of)) == len(set().union(*of)) for of in sets):
            return {s: s[k] for s in seeds}
    units = {s: {s} for s in seeds}
    for a in seeds:
        for b in seeds:
            if units[a] is not units[b] and any(a[k] == b[k] for k in varied):
                units[a] |= units[b]
                units |= dict.fromkeys(units[b], units[a])
    return {s: "/".join(min(units[s])) for s in seeds}


def independent(rows: list[Row]) -> tuple[list[Row], str]:
    """Rows of independent units: those of one unit are averaged, cell by cell, and stand under the unit's name. Also says what
    was pooled; nothing where seeds are independent as they are.

    A cell that lacks a finished run of one of the unit's seeds counts as not finished.
    """
    seeds = {tuple(r.seed.split("/")) for r in rows}
    if not seeds or len(set(map(len, seeds))) > 1:
        return rows, ""
    units = chosen_unit(seeds)
    if units is None:
        return rows, ""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for r in rows:
        groups[units[tuple(r.seed.split("/"))], r.cell, r.budget, r.fake, r.wd].append(r)
    size: dict[tuple, int] = {}
    for (unit, *_, fake, _), group in groups.items():
        size[unit, bool(fake)] = max(size.get((unit, bool(fake)), 0), len(group))
    pooled = []
    for (unit, *_), group in groups.items():
        whole = len(group) == size[unit, bool(group[0].fake)] and all(r.finished for r in group)
        names = set.intersection(*(set(r.values) for r in group)) if whole else ()
        values = {name: statistics.fmean(r.values[name] for r in group) for name in sorted(names)}
        pooled.append(replace(group[0], seed=unit, values=values, finished=whole))
    names = ", ".join(f"--{name.replace('_', '-')}" for name in SEEDS)
    return pooled, f"the grid crosses {names}: {len(seeds)} seeds are pooled into {len(set(units.values()))} independent units"


def tuned(rows: list[Row]) -> list[Row]:
    """One row for each cell, budget and seed: the learning rate and weight decay that did best on the *other* seeds.

    Best by mean validation accuracy. The cell keeps no trace of what was chosen, so that cells can be compared; seeds
    without any other seed to choose on are left out. Where no run of a cell finished, one that did not stands for it.
    """
    candidates: dict[tuple, dict[tuple, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
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
                chosen.append(Row(cell, seed, row.budget, row.values, row.name, row.fake))
    return chosen
