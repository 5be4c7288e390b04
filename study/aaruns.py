"""A/A runs (`--fake-mask`): what a finding's value is where a random half of clean labels is only called noisy."""

import statistics
from collections import defaultdict

from study.contrasts import has_schedule
from study.stats import LEAST_SEEDS
from study.units import RunRow


def aa_rows(rows: list[RunRow], name: str) -> list[RunRow]:
    """The A/A runs with a schedule that have the value."""
    return [r for r in rows if r.fake and name in r.values and has_schedule(r.cell)]


def sizes_with_aa(rows: list[RunRow], name: str) -> set[int]:
    """The batch sizes of which enough seeds have A/A runs with the value."""
    seeds: dict[int, set[str]] = defaultdict(set)
    for row in aa_rows(rows, name):
        seeds[row.cell.B].add(row.seed)
    return {B for B, of in seeds.items() if len(of) >= LEAST_SEEDS}


def aa_means(rows: list[RunRow], name: str, sizes: set[int], budget: str) -> dict[str, float]:
    """{seed: mean over `sizes` of its A/A runs' values} of the seeds that have them at all of these sizes.

    Those of this budget where enough seeds have them, else of any.
    """

    def complete(fakes: list[RunRow]) -> dict[str, float]:
        by_seed: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in fakes:
            by_seed[row.seed][row.cell.B].append(row.values[name])
        full = {seed: of for seed, of in by_seed.items() if sizes <= of.keys()}
        return {seed: statistics.fmean(statistics.fmean(of[B]) for B in sizes) for seed, of in full.items()}

    fakes = aa_rows(rows, name)
    own = complete([r for r in fakes if r.budget in (budget, "any")])
    return own if len(own) >= LEAST_SEEDS else complete(fakes)
