"""Planted sweeps: results with a known answer, and how often the verdict rules of findings.py get it right.

    python benchmarks/planted.py --sweeps 200 --seeds 3

Nothing is trained. A planted sweep holds the values that the runs of a whole grid would have left, with an effect of
known size under each budget, a random offset that all runs of a seed share (they share noise and initialization),
and independent noise in every run.
"""

import argparse
import math
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm  # noqa: E402

from study.findings import FINDINGS, MARGINS, RULES, Cell, Finding, Row, evaluate_finding  # noqa: E402

NOISE = (0.0, 0.2, 0.5)
SIZES = (16, 32, 64, 128, 256, 512)
SEED_SD, RUN_SD = 0.01, 0.01  # of the offset that a seed's runs share, and of one run, in accuracy (a share)
SCENARIOS = {  # effect under the step budget and under matched epochs, in margins, and the verdicts that are right
    "effect": (3.0, 3.0, ("supported",)),
    "none": (0.0, 0.0, ("not supported", "not resolved")),
    "opposite": (-3.0, -3.0, ("not supported",)),
    "confound (fixed steps)": (3.0, 0.0, ("confounded",)),
    "reversed by the budget": (3.0, -3.0, ("confounded",)),
}


def planted_value(finding: Finding, cell: Cell, effect: float) -> float:
    """What a run in `cell` would give if the finding's statistic were exactly `effect` (in its own units)."""
    x = math.log2(cell.B)
    if finding.id.startswith("1"):
        return effect
    if finding.id == "2":
        return 0.2 + effect * (x - 6)
    if finding.id == "3":  # a parabola whose top moves with the noise; the statistic is the move
        top = 7.0 - (effect if cell.noise == max(NOISE) else effect / 2 if cell.noise else 0.0)
        return 0.9 - 0.3 * cell.noise - 0.02 * (x - top) ** 2
    if finding.id.startswith("4"):  # the smaller batch of an equal-ratio pair is ahead by `effect`, with noise only
        return 0.9 - effect * (x - 6) * (cell.sched == "onecycle" and cell.noise > 0)
    return 0.9 - (0.2 + effect * (x - 6)) * (cell.noise > 0)


def plant(
    finding: Finding, effects: dict[str, float], seeds: int, rng: random.Random, run_sd: float = RUN_SD
) -> list[Row]:
    """Rows of one planted sweep for one finding; `effects`: {budget: size}. A/A runs are among them where needed."""
    name = finding.needs
    scale = MARGINS[finding.margin] / MARGINS["acc"] if finding.margin == "cos" else 1.0  # cosines scatter more
    rows = []
    if finding.id.startswith("4"):
        grid = [
            Cell(s, n, B, lr)
            for s in ("onecycle", "constant")
            for n in NOISE
            for B, lr in ((64, 0.05), (128, 0.1), (64, 0.1))
        ]
    else:
        grid = [Cell(s, n, B) for s in ("cosine", "onecycle", "constant") for n in NOISE for B in SIZES]
    for seed in range(seeds):
        offset = rng.gauss(0, SEED_SD if finding.contrast.__name__ != "mean_value" else 0)
        for cell in grid:
            for budget in ("any",) if cell.sched == "constant" else tuple(effects):
                effect = effects["steps" if budget == "any" else budget]
                result = planted_value(finding, cell, effect) + offset + rng.gauss(0, run_sd * scale)
                rows.append(Row(cell, str(seed), budget, {name: result}))
        if finding.null:
            rows.append(
                Row(Cell("onecycle", 0.0, 64), str(seed), "steps", {name: rng.gauss(0, run_sd * scale)}, fake=True)
            )
    return rows


def error_rates(finding: Finding, sweeps: int, seeds: int, run_sd: float = RUN_SD) -> dict[str, Counter]:
    """{scenario: how often each verdict was given} over `sweeps` planted sweeps."""
    rng = random.Random(0)
    counts = {}
    for name, (steps, epochs, _) in SCENARIOS.items():
        size = finding.direction * MARGINS[finding.margin]
        if finding.id == "5c" and steps != epochs:
            continue  # without a schedule there is only one budget, and so no such confound
        effects = {"steps": steps * size, "epochs": epochs * size}
        counts[name] = Counter(
            evaluate_finding(finding, plant(finding, effects, seeds, rng, run_sd)).verdict for _ in range(sweeps)
        )
    return counts


def error_table(rates: dict[str, dict[str, Counter]], sweeps: int, seeds: int, run_sd: float = RUN_SD) -> str:
    """Error rates {finding: {scenario: counts}} in lines: for each finding and scenario the share of each verdict and of wrong ones.

    Wrong is a definite verdict that is not the planted one; "not resolved" is a lack of runs, not an error.
    """
    lines = [f"{sweeps} planted sweeps each, {seeds} seeds, effects of 3 margins, run sd {run_sd:g}"]
    lines.append(f"{'finding':<13} {'planted':<23} " + " ".join(f"{v:>13}" for v in RULES) + f" {'wrong':>7}")
    for finding, scenarios in rates.items():
        for name, counts in scenarios.items():
            wrong = sum(n for v, n in counts.items() if v not in (*SCENARIOS[name][2], "not resolved"))
            shares = " ".join(f"{counts[v] / sweeps:>13.3f}" for v in RULES)
            lines.append(f"{finding:<13} {name:<23} {shares} {wrong / sweeps:>7.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Error rates of the verdict rules on planted sweeps.", allow_abbrev=False)
    p.add_argument("--sweeps", type=int, default=200, metavar="N", help="planted sweeps of each kind")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of each sweep")
    p.add_argument("--run-sd", type=float, default=RUN_SD, metavar="X", help="deviation of one run, as a share")
    args = p.parse_args()
    rates = {f.id: error_rates(f, args.sweeps, args.seeds, args.run_sd) for f in tqdm(FINDINGS, unit="finding")}
    print(error_table(rates, args.sweeps, args.seeds, args.run_sd))
