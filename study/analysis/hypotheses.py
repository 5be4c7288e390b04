"""The report's claims, and what each is judged by."""

from dataclasses import dataclass

from study.analysis import statistics
from study.analysis.statistics import Statistic

MARGINS = {  # smallest effects of interest
    "acc": 0.01,  # accuracy as a share; of slopes per doubling of the batch size
    "drift": 0.1,  # share of the mean per doubling: a factor of 1.5 from B = 16 to 256
    "dimension": 0.7,  # natural logarithm: a factor of 2
}
UNITS = {"acc": "accuracy", "drift": "share of the mean", "dimension": "log of a ratio"}


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A claim and how it is tested.

    `needs`: the column of the table of runs that `estimate` takes; `direction`: the sign that is claimed; `margin`: a key of
    `MARGINS`; `unit`: of the statistic; `scheduled`: whether it is about runs with a schedule or about those at a constant rate;
    `clean`: whether runs without noise are needed beside those with; `pairs`: that sizes are compared at equal lr/B ("ratio") or
    lr/(B(1-m)) ("momentum ratio"); `sized`: at one learning rate for all, or as the grid gives it; `negligible`: whether an effect can be
    found to be negligible.
    """

    id: str
    title: str
    claim: str
    statistic: str
    needs: str
    estimate: Statistic
    direction: int
    margin: str
    unit: str
    scheduled: bool = True
    clean: bool = False
    pairs: str = ""
    sized: bool = True
    negligible: bool = True


PER_DOUBLING = "accuracy per doubling of B"
HYPOTHESES = (
    Hypothesis("1b", "Label noise is less isotropic", "label noise induces non-isotropic noise in gradients (section 1)",
               "log of the effective dimension of label noise over that of clean sampling noise at the same weights, mean over the run",
               "log_dimension_ratio", statistics.mean_of_cells, -1, "dimension", "log of a ratio", sized=False),
    Hypothesis("1c", "The drift grows with the batch", "noisy examples turn the gradient away the more the larger the batch (section 4.2)",
               "slope on log2 B of grad/difference / B, mean over the schedule, as a share of its mean",
               "difference_per_B", statistics.relative_slope, +1, "drift", "share of the mean per doubling of B"),
    Hypothesis("2", "Larger batches memorize more", "training with a larger batch size increases overfitting (section 1)",
               "slope on log2 B of probe/memorized_excess at the end",
               "memorized_excess", statistics.slope, +1, "acc", "share memorized per doubling of B"),
    Hypothesis("3", "Too large a batch costs more under noise", "with noise, batches beyond some size generalize worse (sections 1 and 5)",
               "accuracy of the best size minus that of the largest, with noise minus without",
               "val_acc", statistics.cost_of_largest, +1, "acc", "accuracy", clean=True),
    Hypothesis("3x", "The best batch size is smaller under noise", "the optimal batch size can reduce with more label noise (section 1)",
               "lead of a larger size without noise, or of a smaller one with it, whichever is less",
               "val_acc", statistics.best_moves, +1, "acc", "accuracy", clean=True, negligible=False),
    Hypothesis("4", "At equal lr/B small batches do better under noise", "with noise and a schedule lr/B does not predict generalization (sections 1 and 4.4)",
               "accuracy of the smallest minus that of the largest batch of equal lr/B, with noise minus without",
               "val_acc", statistics.ratio_gap, +1, "acc", "accuracy", clean=True, pairs="ratio", sized=False),
    Hypothesis("4m", "At equal lr/(B(1-m)) small batches do better under noise", "with noise and a schedule the ratio with momentum does not predict generalization",
               "as 4, at equal lr/(B(1-m))",
               "val_acc", statistics.ratio_gap, +1, "acc", "accuracy", clean=True, pairs="momentum ratio", sized=False),
    Hypothesis("4c", "At equal lr/B small batches do better, constant rate", "with noise lr/B does not predict generalization (the report finds that it does, 4.4)",
               "as 4", "val_acc", statistics.ratio_gap, +1, "acc", "accuracy", scheduled=False, clean=True, pairs="ratio", sized=False),
    Hypothesis("5", "Larger batches mitigate noise", "with larger batches noise costs less accuracy (Rolnick et al. 2018; the report finds otherwise, 4.1)",
               "slope on log2 B of the accuracy lost to noise", "val_acc", statistics.lost_slope, -1, "acc", PER_DOUBLING, clean=True),
    Hypothesis("5c", "Larger batches mitigate noise, constant rate", "with larger batches noise costs less accuracy (Rolnick et al. 2018; the report agrees, 4.1)",
               "as 5", "val_acc", statistics.lost_slope, -1, "acc", PER_DOUBLING, scheduled=False, clean=True),
)  # fmt: skip
BY_ID = {h.id: h for h in HYPOTHESES}
