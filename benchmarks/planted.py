"""Planted sweeps: results with a known answer, and how often the verdict rules get it right.

    python benchmarks/planted.py --sweeps 200 --seeds 3
    python benchmarks/planted.py --sweeps 200 --seeds 6 --preset quick --slope-sd 0.08

Nothing is trained. A planted sweep holds the values that the runs of a preset's own grid would have left: an effect of known
size under each budget, an offset that all runs of a seed share (they share noise and initialization), slopes that differ from
seed to seed and budget to budget, independent noise in every run, and, where asked, a ceiling that larger batches reach.
"""

import argparse
import functools
import math
import random
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm  # noqa: E402

from study import grids  # noqa: E402
from study.findings import FINDINGS, MARGINS, RULED, Finding, Result, evaluate_finding  # noqa: E402
from study.rules import LEVEL, RULES  # noqa: E402
from study.runfolders import Cell  # noqa: E402
from study.stats import holm  # noqa: E402
from study.units import RunRow  # noqa: E402

SIGNS = (-1, 0, 1)
TOP = 7.0  # log2 of the best batch size without noise
CHANCE = 0.05  # share of wrong labels predicted without any memorization
POSITIVE = ("supported", "confounded", "masked by the budget")


@dataclass(frozen=True)
class World:
    """What planted studies are like. `run_sd`, `seed_sd`: of one run, and of the offset that a seed's runs share, in accuracy (a
    share); cosines, differences and dimensions scatter by as many margins. `slope_sd`: between seeds, of the share memorized
    per doubling of B; of accuracies a tenth of it. `curvature`: of accuracy on log2 B, per doubling squared. `ceiling`: the
    largest share that is memorized; `level`: the share memorized at the middle of the sizes, above chance."""

    run_sd: float = 0.01
    seed_sd: float = 0.01
    slope_sd: float = 0.0
    curvature: float = 0.02
    level: float = 0.4
    ceiling: float = 0.98


class Spot(NamedTuple):
    """A place in a preset's grid."""

    cell: Cell
    budget: str
    fake: float


@functools.cache
def grid(preset: str) -> tuple[Spot, ...]:
    """Every cell and budget of a preset but for `examples`, by train.py's own parser."""
    parts = grids.PRESETS[preset]
    spots = {}
    for part in (p for p in parts if p != "examples"):
        texts = [g.format(sizes=grids.REPORT_SIZES) for g in parts[part]]
        for job in grids.expand(texts, [], preset, ["0"]):
            a = job.args
            budget = "any" if a.sched == "constant" else "epochs" if a.sched_epochs else "steps"
            cell = Cell(a.sched, a.noise or 0.0, a.bs, a.lr, a.momentum)
            spots[Spot(cell, budget, a.fake_mask or 0.0), part == "ratio"] = None
    return tuple(Spot(*s) if not ratio else Spot(s.cell, f"ratio {s.budget}", s.fake) for s, ratio in spots)


@functools.cache
def spots_of(finding: Finding, preset: str) -> tuple[Spot, ...]:
    """The places that a finding is about, with those that its statistic or its corners need beside them."""
    whole = [
        Spot(s.cell, s.budget.removeprefix("ratio "), s.fake)
        for s in grid(preset)
        if s.budget.startswith("ratio") == bool(finding.corners)
    ]
    if not finding.corners:  # at one rate, the grid's usual one, as in a report
        usual = statistics.mode(s.cell.lr for s in whole)
        whole = [s for s in whole if s.cell.lr == usual]
    return tuple(s for s in whole if (finding.null if s.fake else finding.covers(s.cell) or bool(finding.corners)))


def planted_values(
    finding: Finding, spot: Spot, effect: float, slope: float, middle: float, world: World, noise: float
) -> dict[str, float]:
    """What a run would give if the finding's statistic were exactly `effect`, but for `slope` and `noise` (in its own units)."""
    cell, x = spot.cell, math.log2(spot.cell.B)
    if finding.id.startswith("1"):
        return {finding.needs[0]: effect * (not spot.fake) + noise * MARGINS[finding.margin] / MARGINS["acc"]}
    away = x - middle
    if finding.id == "2":
        memorized = min(max(CHANCE + world.level + (effect + slope) * away + noise, 0.0), world.ceiling)
        return {"memorized": memorized, "memorized_excess": memorized - CHANCE}
    if finding.id == "3":  # a parabola whose top moves with the noise; the statistic is the move
        top = TOP - effect * min(cell.noise / 0.5, 1.0)
        return {"val_acc": 0.9 - 0.3 * cell.noise - world.curvature * (x - top) ** 2 + slope / 10 * away + noise}
    if finding.corners:  # the smaller batch of an equal-ratio pair is ahead by `effect`, with noise and a schedule only
        return {"val_acc": 0.9 - effect * (x - 6) * (cell.sched != "constant" and cell.noise > 0) + noise}
    lost = (0.2 + effect * away) * (cell.noise > 0)
    return {"val_acc": 0.9 - world.curvature * (x - TOP) ** 2 - lost + slope / 10 * away + noise}


def plant(
    finding: Finding,
    effects: dict[str, float],
    seeds: int,
    rng: random.Random,
    world: World = World(),
    preset: str = "budget",
) -> list[RunRow]:  # noqa: B008
    """Rows of one planted sweep for one finding; `effects`: {budget: size}. A/A runs are among them where needed."""
    spots = [s for s in spots_of(finding, preset) if s.budget in (*effects, "any")]
    middle = statistics.fmean(math.log2(B) for B in {s.cell.B for s in spots}) if spots else 0.0
    rows = []
    for seed in map(str, range(seeds)):
        offset = rng.gauss(0, world.seed_sd) if not finding.id.startswith("1") else 0.0
        slopes: dict[tuple, float] = {}
        for spot in spots:
            which = (spot.budget, spot.cell.noise)
            slope = slopes.setdefault(which, rng.gauss(0, world.slope_sd)) if world.slope_sd else 0.0
            effect = effects["steps" if spot.budget == "any" else spot.budget]
            values = planted_values(finding, spot, effect, slope, middle, world, offset + rng.gauss(0, world.run_sd))
            rows.append(RunRow(spot.cell, seed, spot.budget, values, fake=spot.fake))
    return rows


def right_verdicts(finding: Finding, steps: float, epochs: float) -> tuple[str, ...]:
    """The verdicts that are right where the statistic is so many margins in the claimed direction, one of -3, 0, 3 and so on;
    *not resolved* is a lack of runs and never an error."""
    says = ["claim" if e >= 1 or (finding.direction == 0 and e <= -1) else "refute" for e in (steps, epochs)]
    names = {
        ("claim", "claim"): "supported",
        ("refute", "refute"): "not supported",
        ("claim", "refute"): "confounded",
        ("refute", "claim"): "masked by the budget",
    }
    right = names[says[0], says[0] if finding.id == "5c" else says[1]]
    return (right,) if right in finding.gives else ("not resolved",)


def judge_planted(
    finding: Finding,
    steps: float,
    epochs: float,
    sweeps: int,
    seeds: int,
    world: World = World(),
    preset: str = "budget",  # noqa: B008
) -> list[Result]:
    """The results of planted sweeps with effects of so many margins in the claimed direction under either budget."""
    rng = random.Random(f"{finding.id} {steps} {epochs}")
    size = (finding.direction or 1) * MARGINS[finding.margin]
    effects = {"steps": steps * size, "epochs": epochs * size}
    return [evaluate_finding(finding, plant(finding, effects, seeds, rng, world, preset)) for _ in range(sweeps)]


def covered(result: Result, steps: float, epochs: float) -> list[bool]:
    """Whether the interval under each budget has the planted value; not those of a bound."""
    size = (result.finding.direction or 1) * result.margin
    if any("the shift is" in note for note in result.notes):
        return []
    planted = zip((steps, epochs), (result.intervals[b] for b in RULED), strict=True)
    return [i.low <= effect * size <= i.high for effect, i in planted if i is not None and math.isfinite(i.low)]


class Rates(NamedTuple):
    """Of one finding: {(steps, epochs) in margins: its results}."""

    finding: Finding
    results: dict[tuple[float, float], list[Result]]

    def share(self, test) -> float:
        """Of the scenarios for which test((steps, epochs)) holds, the mean share of right verdicts; NaN without one."""
        shares = []
        for at, results in self.results.items():
            right = right_verdicts(self.finding, *at)
            if test(right[0]):
                shares.append(sum(r.verdict in right for r in results) / len(results))
        return statistics.fmean(shares) if shares else math.nan

    def wrong(self) -> tuple[float, tuple[float, float]]:
        """The largest share of definite verdicts that are not the planted one, and where."""
        shares = {}
        for at, results in self.results.items():
            allowed = (*right_verdicts(self.finding, *at), "not resolved")
            shares[at] = sum(r.verdict not in allowed for r in results) / len(results)
        worst = max(shares, key=shares.get)
        return shares[worst], worst

    def coverage(self) -> float:
        """Share of intervals that have the planted value."""
        every = [hit for at, results in self.results.items() for r in results for hit in covered(r, *at)]
        return statistics.fmean(every) if every else math.nan


def every_rate(finding: Finding, sweeps: int, seeds: int, effect: float, world: World, preset: str) -> Rates:
    """Every combination of signs under the two budgets; one budget where the claim is about runs without a schedule."""
    pairs = [(a, a) for a in SIGNS] if finding.id == "5c" else [(a, b) for a in SIGNS for b in SIGNS]
    return Rates(
        finding,
        {
            (a * effect, b * effect): judge_planted(finding, a * effect, b * effect, sweeps, seeds, world, preset)
            for a, b in pairs
        },
    )


def family(rates: list[Rates], at: tuple[float, float], verdicts: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Of planted reports, whose i-th has each finding's i-th sweep: how many findings have one of `verdicts` in each report, by
    themselves and after Holm's correction over the report."""
    alone, after = [], []
    for report in zip(*(r.results[at] for r in rates if at in r.results), strict=True):
        adjusted = holm([1.0 if r.p is None else r.p for r in report])
        alone.append(sum(r.verdict in verdicts for r in report))
        after.append(sum(r.verdict in verdicts and p <= LEVEL for r, p in zip(report, adjusted, strict=True)))
    return alone, after


def summary_table(rates: list[Rates], effect: float) -> str:
    """A line for each finding: power by the verdict that is right, the largest share of wrong verdicts, coverage; then what holds
    of all findings of a report at once."""
    names = {"supported": "S", "confounded": "C", "masked by the budget": "M", "not supported": "NS"}
    lines = [
        "| finding | "
        + " | ".join(f"{n} right" for n in names.values())
        + " | wrong, at most (steps, epochs) | coverage |"
    ]
    lines.append("|" + "---|" * (len(names) + 3))
    for r in rates:
        shares = (r.share(lambda right, name=name: right == name) for name in names)
        cells = [f"{s:.2f}" if math.isfinite(s) else "" for s in shares]
        wrong, at = r.wrong()
        cells.append(f"{wrong:.3f}" + (f" ({at[0]:+g}, {at[1]:+g})" if wrong else ""))
        lines.append(f"| {r.finding.id} | " + " | ".join([*cells, f"{r.coverage():.3f}"]) + " |")
    lines.append("")
    for title, at, verdicts in (
        ("no effect: reports with any of S, C, M", (0.0, 0.0), POSITIVE),
        ("effects under the step budget alone: reports with any S", (effect, 0.0), ("supported",)),
        ("effects under matched epochs alone: reports with any S", (0.0, effect), ("supported",)),
    ):
        alone, after = (statistics.fmean(n > 0 for n in counts) for counts in family(rates, at, verdicts))
        lines.append(f"{title}: {alone:.3f}, after Holm {after:.3f}")
    alone, after = (statistics.fmean(counts) for counts in family(rates, (effect, effect), ("supported",)))
    lines.append(f"effects everywhere: {alone:.2f} of {len(rates)} findings supported, after Holm {after:.2f}")
    return "\n".join(lines)


def verdict_table(rates: list[Rates]) -> str:
    """A line for each finding and combination of effects: the share of every verdict."""
    lines = ["| finding | steps, epochs | " + " | ".join(RULES) + " |", "|" + "---|" * (len(RULES) + 2)]
    for r in rates:
        for at, results in r.results.items():
            counts = Counter(x.verdict for x in results)
            lines.append(
                f"| {r.finding.id} | {at[0]:+g}, {at[1]:+g} | "
                + " | ".join(f"{counts[v] / len(results):.3f}" for v in RULES)
                + " |"
            )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Error rates of the verdict rules on planted sweeps.", allow_abbrev=False)
    p.add_argument("--sweeps", type=int, default=200, metavar="N", help="planted sweeps of each kind")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of each sweep")
    p.add_argument("--preset", choices=["budget", "medium", "quick"], default="budget", help="whose grid")
    p.add_argument(
        "--effect",
        type=float,
        default=3.0,
        metavar="X",
        help="size of effects, in margins; every sign and none under each budget",
    )
    for name, what in (
        ("run_sd", "deviation of one run, as a share"),
        (
            "slope_sd",
            "deviation between seeds of the share memorized per doubling; of accuracies a tenth (the quick study: 0.08)",
        ),
        ("curvature", "of accuracy on log2 B"),
        ("level", "share memorized at the middle size, above chance"),
    ):
        p.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=getattr(World(), name), metavar="X", help=what
        )
    ids = [f.id for f in FINDINGS]
    p.add_argument("--finding", action="append", choices=ids, help="only this finding (may be repeated)")
    p.add_argument("--all", action="store_true", help="the share of every verdict in every combination of signs, too")
    return p


def main() -> None:
    args = parser().parse_args()
    world = World(run_sd=args.run_sd, slope_sd=args.slope_sd, curvature=args.curvature, level=args.level)
    wanted = [f for f in FINDINGS if f.id in (args.finding or (f.id,))]
    chosen = [f for f in wanted if any(f.covers(s.cell) for s in spots_of(f, args.preset) if not s.fake)]
    rates = [
        every_rate(f, args.sweeps, args.seeds, args.effect, world, args.preset) for f in tqdm(chosen, unit="finding")
    ]
    print(
        f"{args.sweeps} sweeps of the grid of --preset {args.preset}, {args.seeds} seeds, effects of {args.effect:g} margins, {world}\n"
    )
    print(summary_table(rates, args.effect))
    if args.all:
        print("\n" + verdict_table(rates))


if __name__ == "__main__":
    main()
