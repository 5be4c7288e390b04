"""The verdict rules: what follows from the intervals of a statistic under two budgets."""

from dataclasses import dataclass

from study.stats import LEAST_SEEDS, Interval, p_inside, p_zero

LEVEL = 0.05

RULES = {  # docs/findings.md
    "supported": "the report's step budget and matched epochs both claim it",
    "confounded": "the step budget claims it, matched epochs refute it, and the two differ, seed by seed",
    "masked by the budget": "the step budget refutes it, matched epochs claim it, and the two differ, seed by seed",
    "not supported": "both budgets refute it",
    "not resolved": "anything else, fewer than three seeds, or runs missing",
}


@dataclass(frozen=True)
class Evidence:
    """A statistic under one budget: its 95 % interval (None: no runs) and what may be read from it.

    `at_least`, `at_most`: the true value may be larger, smaller than what is estimated. `rising`, `falling`: a part of the
    statistic lies above, below 0, beyond the margin and with a correction for the number of parts.
    """

    interval: Interval | None
    at_least: bool = False
    at_most: bool = False
    rising: bool = False
    falling: bool = False

    @property
    def judged(self) -> Interval | None:
        """The interval where it is one of at least three seeds."""
        return self.interval if self.interval is not None and self.interval.n >= LEAST_SEEDS else None

    def inside(self, margin: float) -> bool:
        """Whether the interval lies inside the margin."""
        return self.judged is not None and -margin < self.interval.low and self.interval.high < margin

    def signs(self, margin: float) -> set[int]:
        """{+1} or {-1} where the interval excludes 0, is not inside the margin, and no bound or part speaks against it."""
        i = self.judged
        if i is None or self.inside(margin):
            return set()
        if i.low > 0 and not (self.at_most or self.falling):
            return {+1}
        return {-1} if i.high < 0 and not (self.at_least or self.rising) else set()

    def claims(self, direction: int, margin: float) -> bool:
        """Whether the interval excludes 0 in the claimed direction (0: in either) and does not lie inside the margin."""
        signs = self.signs(margin)
        return bool(signs) if direction == 0 else direction in signs

    def refutes(self, direction: int, margin: float) -> bool:
        """Whether the interval lies inside the margin, or on the other side of 0."""
        if self.judged is None or (self.rising and direction >= 0) or (self.falling and direction <= 0):
            return False
        if self.inside(margin):
            return not (self.at_least or self.at_most)
        return direction != 0 and -direction in self.signs(margin)

    def p_claim(self) -> float:
        """p of a mean of 0."""
        return p_zero(self.interval)

    def p_refute(self, margin: float) -> float:
        """p of a mean beyond the margin, or of 0 where the interval does not lie inside it."""
        return p_inside(self.interval, margin) if self.inside(margin) else p_zero(self.interval)


def verdict(
    steps: Evidence, epochs: Evidence, difference: Interval | None, direction: int, margin: float
) -> tuple[str, float | None]:
    """One of `RULES`, and its p value: the largest of the tests that it rests on; None for *not resolved*.

    `difference`: the interval of steps minus epochs, seed by seed. `direction`: +1, -1, or 0 for a claim of either sign.
    """
    apart = difference is not None and difference.n >= LEAST_SEEDS and (difference.low > 0 or difference.high < 0)
    claimed = [budget.claims(direction, margin) for budget in (steps, epochs)]
    refuted = [budget.refutes(direction, margin) for budget in (steps, epochs)]
    if all(claimed):
        return "supported", max(steps.p_claim(), epochs.p_claim())
    if all(refuted):
        return "not supported", max(steps.p_refute(margin), epochs.p_refute(margin))
    if claimed[0] and refuted[1] and apart:
        return "confounded", max(steps.p_claim(), epochs.p_refute(margin), p_zero(difference))
    if refuted[0] and claimed[1] and apart:
        return "masked by the budget", max(steps.p_refute(margin), epochs.p_claim(), p_zero(difference))
    return "not resolved", None


def verdict_of_one_budget(evidence: Evidence, direction: int, margin: float) -> tuple[str, float | None]:
    """*Supported*, *not supported* or *not resolved* where runs have no schedule and so only one budget, and the p value."""
    if evidence.claims(direction, margin):
        return "supported", evidence.p_claim()
    return (
        ("not supported", evidence.p_refute(margin)) if evidence.refutes(direction, margin) else ("not resolved", None)
    )
