"""The report's own curves, read as runs, to lie beside ours."""

import csv
import math
from pathlib import Path

import numpy as np

from data import InputError, one_line
from engine import options
from series import ACC_NOISY, COS_CLEAN_ALL, VAL_ACC
from study.runfolders import Run

METRICS = {"val_accuracy": VAL_ACC, "grad_cosine": COS_CLEAN_ALL, "noisy_train_accuracy": ACC_NOISY}
RATIO_EPOCHS, RATIO_STEPS = 80, 25_000  # figures 13 and 14


def read_curves(path: Path) -> list[Run]:
    """The report's curves as runs: one for each (figure 13 or not, scheduler, noise, batch size, lr), without figure 4's
    batch 128 at no noise, which is figure 13's run of 80 epochs.

    Steps and values are kept as they stand in the file (validation accuracy one step earlier than ours); an empty
    value is a batch without a noisy example. Raises `InputError` where the file is something else.
    """
    points: dict[tuple, dict[str, list[tuple[int, float]]]] = {}
    about: dict[tuple, dict] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            for row in csv.DictReader(f):
                ratio = row["figure"] == "13"
                key = (ratio, row["scheduler"], row["noise"], row["batch_size"], row["lr"])
                about[key] = row
                series = points.setdefault(key, {}).setdefault(METRICS[row["metric"]], [])
                if row["value"] != "":
                    series.append((int(row["step"]), float(row["value"])))
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as e:
        raise InputError(f"{path}: not a table of the report's curves ({type(e).__name__}: {one_line(e)})") from e
    if not points:
        raise InputError(f"{path}: not a table of the report's curves (it is empty)")
    runs, left_out = [], {}  # {schedule: {"noise, batch size": why}} of curves that are not among their neighbours
    for key, series in points.items():
        ratio, sched, noise, B, lr = key
        spe = math.ceil(40_000 / int(B))
        if not ratio and max(s for s, _ in series.get(VAL_ACC, [(0, 0.0)])) > 64 * spe:
            # figure 4's batch 128 without noise is a run of figure 13, and is drawn there
            why = f"the report's curve is its figure 13's run of {RATIO_EPOCHS} epochs"
            left_out.setdefault(sched, {})[f"{float(noise):g}, {B}"] = why
            continue
        name = f"report{'-ratio' if ratio else ''}_sched-{sched}_noise{noise}_bs{B}_lr{lr}"
        opts = vars(options.parser().parse_args([])) | {
            **{k: about[key][k] for k in ("dataset", "model")},
            **{"noise": float(noise), "bs": int(B), "lr": float(lr), "sched": sched},
            **{"epochs": RATIO_EPOCHS if ratio else 64, "sched_steps": RATIO_STEPS if ratio else 5000},
            "measure_bn": "eval",
        }
        of_tag = {}
        for tag, pairs in series.items():
            steps, values = zip(*pairs, strict=True)
            of_tag[tag] = (np.array(steps, np.int64), np.array(values))
        summary = {"status": "finished", "steps": max(int(s[-1]) for s, _ in of_tag.values())}
        resolved = {"steps_per_epoch": spe, "train_examples": 40_000}
        runs.append(Run(name, opts, resolved, summary, of_tag, str(path)))
    for run in runs:
        if run.options["epochs"] != RATIO_EPOCHS and run.cell.sched in left_out:
            run.resolved["left_out"] = left_out[run.cell.sched]
    return runs
