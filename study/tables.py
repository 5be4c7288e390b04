"""Runs as tables for a spreadsheet or pandas: every value in one .csv, and one row for each run in another.

Two files, `FILE.csv` and `FILE-runs.csv`, joined by their column `run`. Runs are written one at a time, so that only the small
rows of the second file stay in memory. Numbers are written with every digit: reading them gives the same float64.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data import InputError
from study.analysis import runs as analysis
from study.outputs import whole_folder
from study.runfolders import Run

HEADER = ("run", "tag", "step", "value")


def runs_path(path: Path) -> Path:
    """Where the table of runs goes that belongs to `path`: FILE-runs.csv."""
    return path.with_name(f"{path.stem}-runs.csv")


def check_targets(path: Path, inputs: list[Path]) -> None:
    """Raises `InputError` where the two tables cannot go to `path`, or would overwrite one of `inputs`."""
    if path.suffix != ".csv":
        raise InputError(f"--csv {path}: the name must end in .csv")
    if not path.resolve().parent.is_dir():
        raise InputError(f"--csv {path}: there is no folder {path.parent}")
    for target in (path, runs_path(path)):
        if target.is_dir():
            raise InputError(f"--csv {path}: {target} is a folder")
        if target.resolve() in {p.resolve() for p in inputs}:
            raise InputError(f"--csv {path}: would overwrite {target}, which is read")


def table_row(run: Run, name: str) -> dict[str, str]:
    """A run's row: its name, state, options, last values by tag, then `analysis.*` (the columns of the table of runs that are no
    options), `summary.*`, `resolved.*` and `versions.*`."""
    row = {"run": name, "status": run.summary.get("status"), "source": run.source} | run.options
    row |= {tag: float(values[-1]) for tag, (_, values) in run.series.items() if len(values)}
    judged = analysis.row(run)
    row |= {
        f"analysis.{k}": judged[k]
        for k in ("budget", "length", "at_chance", *analysis.VALUES)
        if judged[k] == judged[k]
    }
    for group in ("summary", "resolved", "versions"):
        row |= {f"{group}.{k}": v for k, v in getattr(run, group).items()}
    return {k: cell_text(v) for k, v in row.items()}


def cell_text(value) -> str:
    """A value as a cell; None is an empty one, a list or an object is JSON."""
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else str(value)


def columns(rows: list[dict[str, str]]) -> list[str]:
    """Every column that a row has: options first, then tags, then the rest, each in the order of its first use."""
    every = dict.fromkeys(k for row in rows for k in row)
    kind = lambda k: 2 if k.split(".")[0] in ("analysis", "summary", "resolved", "versions") else int("/" in k)  # noqa: E731
    return sorted(every, key=kind)


def write_tables(runs: Iterable[Run], path: Path) -> str:
    """Both tables, whole or not at all; returns a line that says what was written.

    A name that several runs have, from different folders, is numbered from the second on: `NAME (2)`; bytes of a name that
    are no UTF-8 are spelled out. Raises `CannotWrite`.
    """
    names: Counter[str] = Counter()
    rows, points = [], 0
    how = {"mode": "w", "newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with whole_folder(path.parent, "--csv") as folder:
        with open(folder / path.name, **how) as f:
            out = csv.writer(f)
            out.writerow(HEADER)
            for run in runs:
                names[run.name] += 1
                name = run.name + (f" ({names[run.name]})" if names[run.name] > 1 else "")
                for tag, (steps, values) in run.series.items():
                    out.writerows((name, tag, s, v) for s, v in zip(steps.tolist(), values.tolist(), strict=True))
                    points += len(steps)
                rows.append(table_row(run, name))
        with open(folder / runs_path(path).name, **how) as f:
            table = csv.DictWriter(f, columns(rows), restval="")
            table.writeheader()
            table.writerows(rows)
    return f"{len(rows)} runs -> {path} ({points} values), {runs_path(path)}"
