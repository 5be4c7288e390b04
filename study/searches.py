"""The searches of tuned sweeps, read back for reports: what was tried, what was chosen, and which runs are at it.

A search's file (`tuning.Search.write`) lies in RUNS/tuning/SEARCH/CELL.json and names its judged runs in RUNS. An exported
file holds the searches of what it was made from.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from data import InputError
from engine import jsonfiles, options
from study.exports import read_exported_searches
from study.runfolders import Cell, Run, is_run

FORMAT = "label-noise search 1"
FOLDER = "tuning"  # in RUNS
STATES = ("complete", "pruned", "diverged", "running")


@dataclass(frozen=True)
class Tried:
    """One trial. `value`: of the metric, the last one; None where there is none. `evaluations`: after how many epochs."""

    number: int
    state: str
    values: dict[str, str]
    value: float | None
    evaluations: int


@dataclass
class CellSearch:
    """The search of one cell. `runs`: the folder or exported file of its runs; `best`: the values chosen so far; `judged`:
    {run in `runs`: its values}, also earlier choices; `content`: of its file, for an export."""

    name: str
    runs: Path
    cell: Run  # a run of the cell, without a name, series and results: its options alone count
    space: dict[str, str]
    metric: str
    direction: str
    seeds: list[str]
    most: int
    complete: bool
    trials: list[Tried]
    best: Tried | None
    judged: dict[str, dict[str, str]]
    content: dict = field(repr=False)

    @property
    def key(self) -> tuple:
        """What cells are compared within: one space, one metric, the same tuning seeds."""
        return (*sorted(self.space.items()), self.metric, *self.seeds)

    @property
    def words(self) -> str:
        return " and ".join(self.space) + " tuned"

    def count(self, state: str) -> int:
        return sum(t.state == state for t in self.trials)

    def neutral(self, run: Run) -> Run:
        """A run without a trace of what was tuned, so that cells can be compared: a rate of 0, of everything else the default."""
        plain = vars(options.parser().parse_args([])) | {"lr": 0.0}
        keys = (name.replace("-", "_") for name in self.space)
        return replace(run, options=run.options | {key: plain[key] for key in keys})

    def ends(self) -> list[str]:
        """The tuned options whose best value is within a twentieth of its range from an end: a better one may lie beyond."""
        near = []
        for name, spec in self.space.items():
            kind, *ends = spec.split(":")
            if self.best is None or kind not in ("log", "lin") or len(ends) != 2:
                continue
            scale: Callable[[float], float] = math.log if kind == "log" else float
            low, high, at = (scale(float(x)) for x in (*ends, self.best.values[name]))
            share = (at - low) / (high - low)
            if not 0.05 <= share <= 0.95:
                near.append(f"{name} {'lower' if share < 0.5 else 'upper'}")
        return near


@dataclass
class Searches:
    """All searches beside some runs, and the runs by what they are: `fixed` belong to no search; `tuned` are at the values that
    their cell's search chose, each with its search; `earlier` at values that it chose before it had more trials, or in a search
    that a newer one of the same cell has replaced."""

    cells: list[CellSearch] = field(default_factory=list)
    fixed: list[Run] = field(default_factory=list)
    tuned: list[tuple[Run, CellSearch]] = field(default_factory=list)
    earlier: list[Run] = field(default_factory=list)


def checked(content: dict, name: str, runs: Path) -> CellSearch:
    """A search from the content of its file. Raises `ValueError`, `KeyError` or `TypeError` where that is not one."""
    if content.get("format") != FORMAT:
        raise ValueError
    plain = vars(options.parser().parse_args([]))
    given = plain | {k: v for k, v in content["options"].items() if k in plain}
    cell = Run(
        "", given | {"model": given["model"] or "resnet18", "noise": given["noise"] or 0.0}, {}, {}, {}, str(runs)
    )
    Cell(*cell.cell)  # every field of it can be computed
    space = {str(k): str(v) for k, v in content["space"].items()}

    def values_of(entry: dict) -> dict[str, str]:
        if set(entry) != set(space) or not all(isinstance(v, str) for v in entry.values()):
            raise ValueError
        return entry

    trials = []
    for t in content["trials"]:
        if t["state"] == "running" or set(t["values"]) != set(space):
            continue
        value = None if t["value"] is None else float(t["value"])
        trials.append(Tried(int(t["number"]), str(t["state"]), values_of(t["values"]), value, int(t["evaluations"])))
    chosen = content["best"] and int(content["best"]["number"])
    best = next(t for t in trials if t.number == chosen and t.value is not None) if content["best"] else None
    judged = {str(name): values_of(values) for name, values in content["judged"].items()}
    about = (
        str(content["metric"]),
        str(content["direction"]),
        [str(s) for s in content["seeds"]],
        int(content["most"]),
    )
    state = (bool(content["complete"]), trials, best, judged)
    return CellSearch(name, runs, cell, space, *about, *state, content)


def read_searches(paths: list[str], left_out: list[str]) -> list[CellSearch]:
    """The searches of every exported file and folder of runs of `paths`, the oldest of each first.

    One that cannot be read is added to `left_out`, as "NAME: reason".
    """
    searches: list[CellSearch] = []

    def add(name: str, runs: Path, where: Path, content: Callable[[], dict]) -> None:
        try:
            searches.append(checked(content(), name, runs))
        except InputError as e:
            left_out.append(f"{where.name}: {e}")
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration, OverflowError):
            left_out.append(f"{where.name}: {where}: not the file of a search")

    for path in dict.fromkeys(Path(p) for p in paths if Path(p).suffix == ".npz" and Path(p).is_file()):
        for name, content in read_exported_searches(path):
            add(name, path, path / name, lambda content=content: content)
    folders = dict.fromkeys(Path(p) for p in paths if Path(p).is_dir() and not is_run(Path(p)))
    files = [file for folder in folders for file in folder.glob(f"{FOLDER}/*/*.json")]
    for file in sorted(files, key=lambda file: (file.lstat().st_mtime_ns, file)):
        add(file.stem, file.parents[2], file, lambda file=file: jsonfiles.read_json(file) or {})
    return searches


def identity(search: CellSearch) -> tuple:
    """The cell that is searched."""
    run = search.neutral(search.cell)
    return run.setting, run.cell, run.budget, run.length, run.fake, run.options["wd"], search.runs


def sort_runs(runs: list[Run], cells: list[CellSearch]) -> Searches:
    """`runs` by what they are to the searches `cells`, the oldest first."""
    newest = {identity(search): search for search in cells if search.best is not None and search.judged}
    searched = Searches(cells)
    owners = {(str(s.runs), name): s for s in cells for name in s.judged}
    for run in runs:
        places = (run.source, str(Path(run.source).parent))  # of an exported run its file, of another its folder
        search = next((owners[place, run.name] for place in places if (place, run.name) in owners), None)
        if search is None:
            searched.fixed.append(run)
        elif newest.get(identity(search)) is search and search.judged[run.name] == search.best.values:
            searched.tuned.append((run, search))
        else:
            searched.earlier.append(run)
    return searched
