"""The report's section on detection: how well what training shows of each example tells wrong labels from right ones."""

from study.markup import literal
from study.page import Page
from study.runvalues import last_value
from study.settings import Setting, group_by
from study.stopping import CELL_HEADER, cell_text, mean_text

DETECTORS = {
    "detect/aum": "area under the margin",
    "detect/loss": "mean loss",
    "detect/forgetting": "forgetting",
    "probe/auc": "loss at the end (probe)",
}


def write_detection(page: Page, settings: list[Setting]) -> None:
    """AUC of the detectors side by side in every cell; nothing where no run has their series."""
    tables = []
    for setting in settings:
        runs = [
            r
            for r in setting.ratio_runs
            if r.finished and any(tag in r.series for tag in DETECTORS if tag != "probe/auc")
        ]
        rows = []
        for same in group_by(
            sorted(runs, key=lambda r: (r.budget, r.fake, r.cell)), lambda r: (r.budget, r.fake, r.cell)
        ).values():
            known = [[v for r in same if (v := last_value(r, tag)) is not None] for tag in DETECTORS]
            rows.append(
                [*cell_text(same[0]), str(len(same)), *(mean_text(values) if values else "" for values in known)]
            )
        if rows:
            tables.append((setting.label, rows))
    if not tables:
        return
    page.heading(2, "Detection")
    for label, rows in tables:
        page.text(literal(label))
        page.table([*CELL_HEADER, "runs", *DETECTORS.values()], rows)
    page.text(
        "AUC at the end of training: the share of pairs of a wrongly and a rightly labelled training example that a score puts in this "
        "order; 0.5 is chance. The first three are accumulated over all epochs from the forwards of training, for every example; the "
        "last is that of the final network on the probe's. ± one standard deviation over runs."
    )
