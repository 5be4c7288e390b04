#!/usr/bin/env python3
"""How often the verdicts are wrong, on planted sweeps whose truth is known.

    python benchmarks/planted.py                  # the tables of docs/findings.md, a quarter of an hour on one core
    python benchmarks/planted.py --finding 3 --world plateau --sweeps 500

A world gives curves over six batch sizes, two noise levels and two budgets, from an amplitude that is set so that a finding's
statistic is 0, 0.9, 1.1 or 3 margins, as claimed or the other way. What is true is what the rules read from the curves without any scatter. A verdict
is wrong where it is definite and one of its two readings is not the true one.
"""

import argparse
import concurrent.futures
import functools
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from scipy.optimize import brentq  # noqa: E402
from tqdm import tqdm  # noqa: E402

from study.analysis import rules  # noqa: E402
from study.analysis.hypotheses import BY_ID, MARGINS, Hypothesis  # noqa: E402
from study.analysis.judge import judge  # noqa: E402
from study.analysis.runs import VALUES  # noqa: E402
from study.analysis.statistics import Line  # noqa: E402

X = np.arange(4.0, 10.0)  # log2 of 16 to 512
AWAY = X - X.mean()
LAST = (X == X[-1]).astype(float)
LEVELS = (0.5, 1.5)  # what the two noise levels have of an effect
EFFECTS = (-3.0, -1.1, -0.9, 0.0, 0.9, 1.1, 3.0)  # in margins
SEEDS = (3, 5, 10)
DEVIATIONS = (0.003, 0.01, 0.03)  # of one run, in accuracy; of other values as many margins
PLATEAU = np.array([0.80, 0.85, 0.88, 0.88, 0.88, 0.88])
FULL = np.array([[0.695, 0.814, 0.879, 0.915, 0.929, 0.934],  # the full study's means at 0, 20 and 50 % noise
                 [0.606, 0.740, 0.839, 0.886, 0.876, 0.813],
                 [0.406, 0.576, 0.716, 0.815, 0.809, 0.580]])  # fmt: skip


def parabola(top: float, steep: float = 1.0) -> np.ndarray:
    """Accuracy with its best at log2 B = `top`, falling `steep` times as fast above it."""
    return 0.9 - 0.02 * (X - top) ** 2 * np.where(X > top, steep, 1.0)


class Curves(NamedTuple):
    """What every run would give without scatter: `clean` (K,), and `noisy` (2, K), a row for each noise level."""

    clean: np.ndarray
    noisy: np.ndarray


def lowered(clean: np.ndarray, shape: np.ndarray, amplitude: float, cost: np.ndarray | float = 0.1) -> Curves:
    """Noise costs `cost` at every size and an amplitude of `shape` beside."""
    return Curves(clean, np.stack([clean - cost - level * amplitude * shape for level in LEVELS]))


def levels(of: Callable[[float], np.ndarray], clean: np.ndarray, amplitude: float) -> Curves:
    return Curves(clean, np.stack([of(level * amplitude) - 0.1 for level in LEVELS]))


V = 0.03 * np.abs(AWAY)
ACCURACY: dict[str, Callable[[float], Curves]] = {  # worlds of findings 3, 3x, 5
    "parabola, tilted": lambda a: lowered(parabola(7), AWAY, a),
    "plateau, falls at its end": lambda a: lowered(PLATEAU, LAST, a),
    "rises, falls at its end with noise": lambda a: Curves(parabola(12), np.stack([0.6 - level * a * LAST for level in LEVELS])),
    "falls at its end without noise": lambda a: Curves(0.8 + a * LAST, np.stack([parabola(12)] * 2)),
    "right flank steeper with noise": lambda a: levels(lambda s: parabola(7, 1 + s), parabola(7), a),
    "optimum grows, flank steeper": lambda a: levels(lambda s: parabola(6.5, 1 + s), parabola(5.5), a),
    "optimum moves": lambda a: levels(lambda s: parabola(7 - s), parabola(7), a),
    "flat": lambda a: lowered(np.full(6, 0.8), LAST, a),
    "the full study": lambda a: Curves(FULL[0], FULL[0] - a * (FULL[0] - FULL[1:])),
    "V-shaped cost": lambda a: lowered(parabola(7), AWAY, a, 0.1 + V),
    "small sizes at chance with noise": lambda a: Curves(PLATEAU, np.where(X < 6, 0.1, PLATEAU - 0.2 - a * AWAY)[None].repeat(2, 0)),
    "one size alone": lambda a: lowered(parabola(7), (X == 6).astype(float), a),
}  # fmt: skip
MEMORIZED: dict[str, Callable[[float], Curves]] = {  # of finding 2: what is memorized beyond chance
    "line": lambda a: lowered(X * 0, -AWAY, a, -0.4),
    "one step": lambda a: lowered(X * 0, -np.sign(AWAY), a, -0.4),
    "last size alone": lambda a: lowered(X * 0, -LAST, a, 0.0),
    "V": lambda a: lowered(X * 0, -AWAY, a, -0.2 - V),
    "levels disagree": lambda a: Curves(X * 0, np.stack([0.4 + (a + 0.04) * AWAY, 0.4 + (a - 0.04) * AWAY])),
}
DRIFT: dict[str, Callable[[float], Curves]] = {  # of finding 1c
    "line": lambda a: Curves(X * 0, np.stack([1 + a * AWAY] * 2)),
    "last size alone": lambda a: Curves(X * 0, np.stack([1 + a * LAST] * 2)),
}
FLAT: dict[str, Callable[[float], Curves]] = {"any": lambda a: Curves(X * 0, np.outer(LEVELS, X * 0 + a))}
PAIRS: dict[str, Callable[[float], Curves]] = {"any": lambda a: lowered(0.8 + 0.0 * LAST, LAST, a)}
WORLDS = {"1b": FLAT, "1c": DRIFT, "2": MEMORIZED, "3": ACCURACY, "3x": ACCURACY, "4": PAIRS, "5": ACCURACY}


def lines(curves: Curves, clean: np.ndarray | float = 0.0, noisy: np.ndarray | float = 0.0) -> list[Line]:
    """The curves with the scatter of runs, (..., n, K) and (..., 2, n, K)."""
    shape = np.zeros((1, 1))
    noisy = np.broadcast_to(noisy, (2, 1, 1)) if np.isscalar(noisy) else noisy
    return [Line(X, shape + curves.noisy[k] + noisy[..., k, :, :], shape + curves.clean + clean) for k in (0, 1)]


def truth(h: Hypothesis, curves: Curves, split: np.ndarray | float = 0.0) -> tuple[float, np.ndarray]:
    """The statistic in the claimed direction and the reading, without scatter; `split`: what all seeds share, (..., 1, K)."""
    same = np.zeros((3, 1))  # three seeds that agree
    noisy = np.zeros((2, 3, 1)) if np.isscalar(split) else np.stack([split + same] * 2, -3)
    e = h.estimate(lines(curves, split + same, noisy))
    read = rules.read(rules.summary(e, h.direction), 3, MARGINS[h.margin], h.negligible)
    below = rules.bounds(rules.summary(e, h.direction), 3)[0]
    return float(np.ravel(below)[0]), read


@functools.cache
def curves_of(h: Hypothesis, world: Callable[[float], Curves]) -> dict[float, Curves]:
    """{effect in margins: the world's curves, at the amplitude that gives it}; those of amplitude 1 as NaN, where it gives none."""
    statistic = lambda a: truth(h, world(a))[0] / MARGINS[h.margin]  # noqa: E731
    tried = np.linspace(-4, 4, 161)
    values = np.array([statistic(a) for a in tried])
    found = {}
    for effect in EFFECTS:
        exact = tried[np.isclose(values, effect, atol=1e-9)]
        turns = np.flatnonzero((values[1:] > effect) != (values[:-1] > effect))
        if len(exact):
            found[effect] = world(exact[0])
        elif len(turns):
            k = turns[np.abs(tried[turns]).argmin()]
            found[effect] = world(brentq(lambda a: statistic(a) - effect, tried[k], tried[k + 1], xtol=1e-12))  # noqa: B023
    return found or {math.nan: world(1.0)}


# --------------------------------------------------------------------------------------------------------- scatter


RATES = 3
TUNED = "rates chosen on the other seeds"


def tuned(sd: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Of `RATES` equal learning rates in each cell the one that does best on the other seeds."""
    z = sd * rng.standard_normal((*shape, RATES))  # (..., n, K, rates)
    others = z.sum(-3, keepdims=True) - z
    return np.take_along_axis(z, others.argmax(-1)[..., None], -1)[..., 0]


def rarely_at_chance(sd: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """One run in ten ends half an accuracy lower; what is true is the mean over runs."""
    return sd * rng.standard_normal(shape) - 0.5 * ((rng.random(shape) < 0.1) - 0.1)


SCATTER: dict[str, Callable] = {  # (deviation, shape, rng) -> (..., n, K)
    "normal": lambda sd, shape, rng: sd * rng.standard_normal(shape),
    "of its own in each cell (log-normal)": lambda sd, shape, rng: (
        sd * np.exp(0.7 * rng.standard_normal((*shape[:-2], 1, shape[-1]))) * rng.standard_normal(shape)),
    "heavy tails (t with 3 degrees of freedom)": lambda sd, shape, rng: sd * rng.standard_t(3, shape) / math.sqrt(3),
    "skewed (log-normal)": lambda sd, shape, rng: sd * (math.exp(0.5) - np.exp(rng.standard_normal(shape))) / 2.16,
    TUNED: tuned,
    "one run in ten at chance": rarely_at_chance,
}  # fmt: skip


def readings(h: Hypothesis, curves: Curves, n: int, sd: float, scatter: str, sweeps: int, rng) -> np.ndarray:
    """The readings of planted sweeps, (sweeps,) codes."""
    sd = sd * MARGINS[h.margin] / MARGINS["acc"]
    draw = lambda *lead: SCATTER[scatter](sd, (sweeps, *lead, n, len(X)), rng)  # noqa: E731
    e = h.estimate(lines(curves, draw(), draw(2)))
    e = e._replace(tests=e.tests * RATES) if scatter == TUNED else e
    return rules.read(rules.summary(e, h.direction), n, MARGINS[h.margin], h.negligible)


class Rates(NamedTuple):
    """Of a world's readings, for each effect: the share that is definite, the share that is right, and what is right."""

    definite: np.ndarray
    right: np.ndarray
    true: np.ndarray

    def wrong(self) -> float:
        """The largest share of verdicts that are definite and wrong, over all pairs of effects under the two budgets, whose sweeps are
        independent of each other."""
        return float((np.outer(self.definite, self.definite) - np.outer(self.right, self.right)).max())


def rates(h: Hypothesis, curves: list[Curves], n: int, sd: float, scatter: str, sweeps: int, rng) -> Rates:
    definite, right, true = [], [], []
    for c in curves:
        is_true = int(truth(h, c)[1])
        read = readings(h, c, n, sd, scatter, sweeps, rng)
        definite.append(np.isin(read, rules.DEFINITE).mean())
        right.append((read == is_true).mean() if is_true in rules.DEFINITE else 0.0)
        true.append(is_true)
    return Rates(np.array(definite), np.array(right), np.array(true))


def percent(p: float, sweeps: int) -> str:
    """A share with its Monte Carlo standard error."""
    return f"{100 * p:.1f} ± {100 * math.sqrt(max(p * (1 - p), 1 / sweeps) / sweeps):.1f}"


# ---------------------------------------------------------------------------------------------------------- tables


def world_row(id: str, name: str, sweeps: int) -> list[str]:
    """The largest share of wrong verdicts in a world, over seeds, deviations and effects under the two budgets."""
    h, rng = BY_ID[id], np.random.default_rng([list(WORLDS).index(id), list(WORLDS[id]).index(name)])
    curves = curves_of(h, WORLDS[id][name])
    shares = {
        f"{n} seeds, {sd:g}": rates(h, list(curves.values()), n, sd, "normal", sweeps, rng).wrong()
        for n, sd in itertools.product(SEEDS, DEVIATIONS)
    }
    worst = max(shares, key=shares.get)
    effects = ", ".join(f"{e:g}" for e in curves).replace("nan", "one of its own")
    return [id, name, effects, percent(shares[worst], sweeps), worst if shares[worst] else ""]


def scatter_row(kind: str, id: str, sweeps: int) -> list[str]:
    """The same for a kind of scatter, a deviation of 0.01, and all worlds of a finding."""
    h, rng = BY_ID[id], np.random.default_rng([list(WORLDS).index(id), list(SCATTER).index(kind), 1])
    curves = {name: list(curves_of(h, world).values()) for name, world in WORLDS[id].items()}
    shares = {
        f"{name}, {n} seeds": rates(h, of, n, 0.01, kind, sweeps, rng).wrong()
        for (name, of), n in itertools.product(curves.items(), SEEDS)
    }
    worst = max(shares, key=shares.get)
    return [kind, id, percent(shares[worst], sweeps), worst]


def first_world(id: str) -> str:
    """The world that power is shown in."""
    return {"3": "plateau, falls at its end", "3x": "optimum moves"}.get(id, next(iter(WORLDS[id])))


def power_row(id: str, effect: float, sweeps: int) -> list[str]:
    """How often a budget is read right, for each number of seeds and deviation."""
    h, rng = BY_ID[id], np.random.default_rng([list(WORLDS).index(id), 2])
    curves = curves_of(h, WORLDS[id][first_world(id)])[effect]
    right = lambda n, sd: rates(h, [curves], n, sd, "normal", sweeps, rng).right[0]  # noqa: E731
    cells = [", ".join(f"{right(n, sd):.2f}" for sd in DEVIATIONS) for n in SEEDS]
    return [id, f"{effect:g} margins" if effect else "nothing", *cells]


def report_row(steps: float, epochs: float, sweeps: int) -> list[str]:
    """Of reports with every finding, five seeds and a deviation of 0.01, the share with any wrong verdict."""
    none_wrong = 1.0
    for id in WORLDS:
        h, rng = BY_ID[id], np.random.default_rng([list(WORLDS).index(id), 4])
        of = curves_of(h, WORLDS[id][first_world(id)])
        r = rates(h, [of[steps], of[epochs]], 5, 0.01, "normal", sweeps, rng)
        none_wrong *= 1 - (r.definite.prod() - r.right.prod())
    return [f"{steps:g}", f"{epochs:g}", percent(1 - none_wrong, sweeps)]


def split_row(id: str, sweeps: int) -> list[str]:
    """One split for all of ten seeds: how often a reading is wrong about other splits, and about this one."""
    h, rng = BY_ID[id], np.random.default_rng([list(WORLDS).index(id), 3])
    unit = MARGINS[h.margin] / MARGINS["acc"]
    draw = lambda sd, *shape: sd * unit * rng.standard_normal((sweeps, *shape, len(X)))  # noqa: E731
    read = lambda e, n: rules.read(rules.summary(e, h.direction), n, MARGINS[h.margin], h.negligible)  # noqa: E731
    shares = []
    for c in curves_of(h, WORLDS[id][first_world(id)]).values():
        clean, noisy, same = draw(0.02, 1), draw(0.02, 2, 1), np.zeros((3, 1))
        found = read(h.estimate(lines(c, clean + draw(0.005, 10), noisy + draw(0.005, 2, 10))), 10)
        of_split = read(h.estimate(lines(c, clean + same, noisy + same)), 3)
        definite = np.isin(found, rules.DEFINITE)
        shares.append([(definite & (found != true)).mean() for true in (truth(h, c)[1], of_split)])
    return [id, *(percent(share, sweeps) for share in np.max(shares, 0))]


def frame(curves: dict[str, Curves], column: str, seeds: int, sd: float, missing: float, rng) -> pd.DataFrame:
    """The table of runs of one sweep, as `study.analysis.runs.table` makes it; a share of the runs has failed."""
    rows = []
    for (budget, c), seed in itertools.product(curves.items(), range(seeds)):
        for noise, curve in zip((0.0, 0.2, 0.5), (c.clean, *c.noisy)):
            for x, value in zip(X, curve + sd * rng.standard_normal(len(X))):
                failed = rng.random() < missing
                row = {"sched": "onecycle", "noise": noise, "B": round(2**x), "lr": 0.1, "momentum": 0.9, "fake": 0.0}
                row |= {
                    "budget": budget,
                    "seed": seed,
                    "noise_seed": seed,
                    "split_seed": seed,
                    "memorized": 0.5,
                    "at_chance": False,
                }
                rows.append(row | {"status": "failed" if failed else "finished", column: math.nan if failed else value})
    made = pd.DataFrame(rows)
    return made.reindex(columns=[*made, *(name for name in VALUES if name not in made)])


def missing_row(id: str, sweeps: int) -> list[str]:
    """Ten seeds of which one run in fifty is missing, judged from the table of runs: wrong and definite verdicts, complete seeds."""
    h, rng = BY_ID[id], np.random.default_rng([list(WORLDS).index(id), 5])
    of = curves_of(h, WORLDS[id][first_world(id)])
    wrong, definite, complete = 0.0, [], []
    for steps, epochs in ((0.0, 0.0), (3.0, 3.0), (0.9, 3.0), (3.0, 0.0)):
        true = rules.verdict([int(truth(h, of[e])[1]) for e in (steps, epochs)])
        both = {"steps": of[steps], "epochs": of[epochs]}
        results = [judge(h, frame(both, h.needs, 10, 0.005, 0.02, rng)) for _ in range(sweeps)]
        verdicts = np.array([r.verdict for r in results])
        wrong = max(wrong, ((verdicts != true) & (verdicts != "not resolved")).mean())
        definite.append((verdicts == true).mean() if true != "not resolved" else np.nan)
        complete += [reading.n for r in results for reading in r.readings.values()]
    return [id, percent(wrong, sweeps), f"{np.nanmean(definite):.2f}", f"{np.mean(complete):.1f}"]


class Table(NamedTuple):
    """A table of the simulation: a row for each of `spots`, made by `row(*spot, sweeps)`."""

    title: str
    header: list[str]
    row: Callable
    spots: list[tuple]
    sweeps: float = 1.0  # times those asked for


def tables(ids: list[str], world: str) -> list[Table]:
    spots = [(id, name) for id in ids for name in WORLDS[id] if world in name]
    listed = [Table("Worlds", ["finding", "world", "effects, margins", "wrong verdicts, %", "at"], world_row, spots)]
    if world:
        return listed
    kinds = [(kind, id) for kind in list(SCATTER)[1:] for id in ids if kind != TUNED or id in ("2", "3", "3x", "5")]
    effects = [(id, e) for id in ids for e in ((3.0, 0.0) if BY_ID[id].negligible else (3.0,))]
    pairs = [(0.0, 0.0), (3.0, 0.0), (0.9, 0.9), (0.9, 3.0), (3.0, 3.0)]
    return [
        *listed,
        Table("Scatter", ["scatter", "finding", "wrong verdicts, %", "at"], scatter_row, kinds),
        Table("Power", ["finding", "true", *(f"{n} seeds" for n in SEEDS)], power_row, effects),
        Table("Whole reports", ["steps", "epochs", "any wrong verdict, %"], report_row, pairs),
        Table("One split for all seeds", ["finding", "wrong of other splits, %", "wrong of this one, %"], split_row, [(id,) for id in ids]),
        Table("Missing runs", ["finding", "wrong verdicts, %", "right verdicts", "complete seeds"], missing_row,
              [(id,) for id in ids if id in ("2", "3", "5")], 0.1),
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Error rates of the verdicts on planted sweeps.", allow_abbrev=False)
    p.add_argument("--sweeps", type=int, default=2000, metavar="N", help="planted sweeps of each kind (2000)")
    p.add_argument("--finding", action="append", choices=list(WORLDS), help="only this finding (may be repeated)")
    p.add_argument("--world", default="", metavar="TEXT", help="only worlds whose name has this in it")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")
    return p


def main() -> None:
    args = parser().parse_args()
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        asked = [
            (t, [pool.submit(t.row, *spot, max(round(args.sweeps * t.sweeps), 1)) for spot in t.spots])
            for t in tables(args.finding or list(WORLDS), args.world)
        ]
        with tqdm(total=sum(len(rows) for _, rows in asked), unit="row") as bar:
            for t, rows in asked:
                tqdm.write(f"\n{t.title}\n\n| {' | '.join(t.header)} |\n" + "|---" * len(t.header) + "|")
                for row in rows:
                    tqdm.write(f"| {' | '.join(row.result())} |")
                    bar.update()


if __name__ == "__main__":
    main()
