"""Runs in groups that may be compared with one another: one setting each, all that is not an axis of the grid."""

from collections import Counter
from dataclasses import dataclass, field

from engine import options
from optim import OPTIMIZERS
from study.runfolders import Run


@dataclass
class Setting:
    """Runs that may be compared with one another. `runs`: at one learning rate, weight decay and schedule length for
    each budget; `ratio_runs`: at every learning rate, for findings about lr/B; `all_runs`: with every rate and decay;
    `notes` say what `runs` leave out. `ratio`: whether cells of equal lr/B are there (figures 13 and 14); `scaled`: the runs
    at one lr/B, where that makes several batch sizes at rates of their own."""

    label: str
    runs: list[Run]
    ratio_runs: list[Run]
    all_runs: list[Run]
    notes: list[str]
    ratio: bool
    scaled: list[Run] = field(default_factory=list)

    @property
    def of_sgd(self) -> bool:
        """Whether SGD's noise scale is that of its optimizer."""
        return all(OPTIMIZERS[r.options.get("optimizer", "sgd")].sgd for r in self.all_runs)


def group_settings(runs: list[Run]) -> list[Setting]:
    """Group runs by everything but their axes, largest group first."""
    plain = vars(options.parser().parse_args([]))
    made = []
    for key, members in sorted(group_by(runs, lambda r: r.setting).items(), key=lambda item: -len(item[1])):
        named, notes, every = dict(key), [], []
        parts = [named.get("dataset", "?"), named.get("model", "?"), f"{named.get('epochs', '?')} epochs"]
        rest = [
            (k.replace("_", "-"), v)
            for k, v in key
            if k not in ("dataset", "model", "epochs") and v != str(plain.get(k))
        ]
        parts += [k if v == "True" else f"{k} {v}" for k, v in rest]
        for group in group_by(members, lambda r: r.budget).values():  # a length is in its budget's own unit
            every += most_common(group, lambda r: r.length, "schedule length", notes)
        every = once_each(every, notes)
        kept = most_common(every, lambda r: r.options["wd"], "weight decay", notes)
        pairs = group_by(kept, lambda r: (r.cell.sched, r.cell.noise, f"{r.cell.lr / r.cell.B:.6g}"))
        ratio = any(len({r.cell.B for r in group}) > 1 for group in pairs.values())
        one_rate = most_common(kept, lambda r: r.cell.lr, "learning rate", notes)
        made.append(Setting(", ".join(parts), one_rate, kept, every, notes, ratio, at_one_ratio(kept)))
    return made


def at_one_ratio(runs: list[Run]) -> list[Run]:
    """The runs at the lr/B that has most batch sizes, and of several most runs; none if that is one batch size.

    A ratio is told from another by six digits: rates are written in decimals.
    """
    ratios = group_by(runs, lambda r: f"{r.cell.lr / r.cell.B:.6g}")
    chosen = max(ratios.values(), key=lambda group: (len({r.cell.B for r in group}), len(group)), default=[])
    return chosen if len({r.cell.B for r in chosen}) > 1 else []


def group_by(runs: list[Run], key) -> dict:
    """{key(run): runs}, in order of first use."""
    groups: dict = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def most_common(runs: list[Run], of, what: str, notes: list[str]) -> list[Run]:
    """The runs with the most frequent value of `of` (the larger of two); a note says what was left out."""
    counts = Counter(of(r) for r in runs)
    if len(counts) < 2:
        return runs
    chosen = max(counts, key=lambda v: (counts[v], v))
    rest = ", ".join(f"{v:g} ({n} runs)" for v, n in sorted(counts.items()) if v != chosen)
    notes.append(f"compared at {what} {chosen:g}; apart from that there are {rest}")
    return [r for r in runs if of(r) == chosen]


def once_each(runs: list[Run], notes: list[str]) -> list[Run]:
    """One run for each cell, seed, budget, weight decay and share of a fake mask; of several, which differ in precision or
    in what they measured, the finished one with most series. A note says how many were left out."""
    same = group_by(runs, lambda r: (r.cell, r.seed, r.budget, r.options["wd"], r.fake))
    chosen = [max(group, key=lambda r: (r.finished, len(r.series))) for group in same.values()]
    if len(chosen) < len(runs):
        kinds = sorted({str(r.options.get("precision")) for group in same.values() if len(group) > 1 for r in group})
        notes.append(
            f"{len(runs) - len(chosen)} runs repeat the cell and seed of another ({', '.join(kinds)}); of each the one that "
            "measured most counts"
        )
    return chosen
