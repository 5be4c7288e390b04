"""What is known of each series that a run logs, by its tag. A new one is an entry here, its formula, and a row in the table of
docs/measurements.md.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

TRAIN_LOSS, ACC_CLEAN, ACC_NOISY = "train/loss", "train/acc_clean", "train/acc_noisy"
VAL_LOSS, VAL_ACC, TEST_ACC = "val/loss", "val/acc", "test/acc"
LR, MOMENTUM = "optim/lr", "optim/momentum"
COS_CLEAN_ALL, COS_CLEAN_NOISY = "grad/cos_clean_all", "grad/cos_clean_noisy"
CORRECTED_COS = "corrected/cos_clean_noisy"
NORM_CLEAN, NORM_NOISY, NORM_ALL = "grad/norm_clean", "grad/norm_noisy", "grad/norm_all"
MEMORIZED, RECOVERED, OTHER = "probe/memorized", "probe/recovered", "probe/other"

# When a series is logged, in the words of docs/measurements.md, which explains them.
STEPS = "every `--measure-every` steps, also with `--measure off`"
SPLIT, MASKS, CONTROLS, QUARTERS = "split", "split (masks), full", "full, steps", "full, end of a quarter"
VALIDATION, EXAMPLES = "step 0, each epoch", "each epoch, with split, full or `--examples`"
PROBE, EPOCHS = "split and full, epochs", "full, epochs"
START, ONCE, END = "step 0", "once", "once, at the end"

NOISY, WRONG = "noisy examples", "wrong labels"  # what a run needs; the noisy examples of a fake mask have right labels
SHARE, COSINE = (0.0, 1.0), (-1.0, 1.0)  # limits
BATCH = 0.05  # the report's smoothing of values of single batches


@dataclass(frozen=True)
class Series:
    """A series, or all of a family.

    `label`: its name alone; `legend`: beside others in a panel; `limits`: the values that it can take; `smoothing`: how much
    the newest value counts in its exponential average, 1 for none; `needs`: what a run has to have; `exact`: a mean over a
    whole set, at few points: exported with every bit, and its last value stands for the end of a run; `search`: whether a
    search of good options can `maximize` or `minimize` it: after every epoch, and not of the test set.
    """

    when: str
    label: str = ""
    legend: str = ""
    limits: tuple[float, float] = (-math.inf, math.inf)
    smoothing: float = 1.0
    needs: str = ""
    exact: bool = False
    search: str = ""


class ByTag(dict[str, Series]):
    """A tag without an entry has that of its family, the first key with a * that it matches."""

    def __missing__(self, tag: str) -> Series:
        return next(series for family, series in self.items() if fnmatchcase(tag, family))


SERIES = ByTag({
    TRAIN_LOSS: Series(STEPS, legend="training", smoothing=BATCH),
    ACC_CLEAN: Series(STEPS, legend="training, clean examples", limits=SHARE, smoothing=BATCH),
    ACC_NOISY: Series(STEPS, "training accuracy on noisy examples", "training, noisy examples", SHARE, BATCH, NOISY),
    "train/acc": Series(STEPS, limits=SHARE, smoothing=BATCH),
    "train/prediction_changes": Series(EXAMPLES, limits=SHARE),
    LR: Series(STEPS, "learning rate", "learning rate"),
    MOMENTUM: Series(STEPS, "momentum"),
    "optim/temperature": Series(STEPS),
    "optim/update_norm": Series(CONTROLS),
    VAL_ACC: Series(VALIDATION, "validation accuracy", "validation", SHARE, 0.5, exact=True, search="maximize"),
    VAL_LOSS: Series(VALIDATION, legend="validation", smoothing=0.5, exact=True, search="minimize"),
    "val/acc_noisy": Series(VALIDATION, limits=SHARE, needs=WRONG, exact=True),
    TEST_ACC: Series(END, limits=SHARE, exact=True),
    "noise/*": Series(START, limits=SHARE, exact=True),
    COS_CLEAN_ALL: Series(SPLIT, "cosine of clean and all", "clean and all", COSINE, BATCH, NOISY),
    COS_CLEAN_NOISY: Series(SPLIT, legend="clean and noisy", limits=COSINE, smoothing=BATCH, needs=NOISY),
    NORM_CLEAN: Series(SPLIT, legend="clean", smoothing=BATCH),
    NORM_NOISY: Series(SPLIT, legend="noisy", smoothing=BATCH, needs=NOISY),
    NORM_ALL: Series(SPLIT, legend="all", smoothing=BATCH),
    "grad/clean_fraction": Series(SPLIT, limits=SHARE, smoothing=BATCH),
    "grad/difference*": Series(CONTROLS, smoothing=BATCH, needs=NOISY),
    "grad/label_share": Series(CONTROLS, smoothing=BATCH, needs=WRONG),
    "grad/norm_per_layer": Series(CONTROLS),  # a histogram
    "null/permuted_*": Series(MASKS, legend="its null (random masks)", needs=NOISY),
    "null/*": Series(CONTROLS, legend="its null (closed form)", needs=NOISY),
    CORRECTED_COS: Series(QUARTERS, "corrected cosine", "clean and noisy, corrected", needs=NOISY),
    "corrected/cos_*": Series(QUARTERS, needs=NOISY),
    "corrected/not_resolved": Series(QUARTERS),
    "noise_scale/*": Series(QUARTERS),
    "fresh/*": Series(CONTROLS, smoothing=BATCH, needs=WRONG),
    "truth/*": Series(CONTROLS, smoothing=BATCH, needs=WRONG),
    MEMORIZED: Series(PROBE, legend="memorized", limits=SHARE, needs=NOISY, exact=True),
    RECOVERED: Series(PROBE, legend="recovered", limits=SHARE, needs=NOISY, exact=True),
    OTHER: Series(PROBE, legend="other", limits=SHARE, needs=NOISY, exact=True),
    "probe/memorized_excess": Series(PROBE, needs=NOISY, exact=True),
    "probe/half_memorized_step": Series(ONCE, needs=NOISY, exact=True),
    "probe/auc": Series(PROBE, limits=SHARE, needs=NOISY, exact=True),
    "probe/clean_acc": Series(PROBE, limits=SHARE, exact=True),
    "probe/*": Series(EPOCHS, exact=True),  # the stopping signals
    "detect/*": Series(EXAMPLES, limits=SHARE, needs=NOISY, exact=True),
    "isotropy/*": Series(EPOCHS, needs=WRONG),
    "curvature/*": Series(EPOCHS),
    "*": Series(""),  # of an extension or an earlier version
})  # fmt: skip
