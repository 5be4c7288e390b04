"""Reading runs back from paths of any kind: folders of runs, exported files, the report's own curves."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from data import InputError, one_line
from study.exports import read_export
from study.reference import read_curves
from study.runfolders import Run, is_run, read_folder
from study.searches import FOLDER as SEARCHES

NAMED = 5  # folders or runs that a remark names


def load_runs(
    paths: list[str], progress: bool = True, left_out: list[str] | None = None, remarks: list[str] | None = None
) -> list[Run]:
    """Every run in `paths`: folders of runs, single runs' folders, exported files (.npz), report curves (.csv).

    Of copies of a run (`Run.identity`) the one further on counts, a folder before a file. Raises `InputError` for a path
    that is none of these. A run that cannot be read is added to `left_out`, as "NAME: reason"; without it, it raises too.
    What else a reader should know is added to `remarks`: copies, and runs that lie deeper than is read.
    """
    return list(iter_runs(paths, progress, left_out, remarks))


def iter_runs(
    paths: list[str], progress: bool = True, left_out: list[str] | None = None, remarks: list[str] | None = None
) -> Iterator[Run]:
    """The runs of `load_runs`, one at a time: the series of a folder are read when it is that run's turn.

    Folders that hold more than the memory does can be gone through like this. Raises as `load_runs` does.
    """
    runs: list[Run] = []
    folders: dict[Path, Path] = {}
    remarks = [] if remarks is None else remarks
    for path in {Path(path).absolute(): Path(path) for path in paths}.values():
        if path.suffix == ".npz" and path.is_file():
            runs += read_export(path, left_out)
        elif path.suffix == ".csv" and path.is_file():
            runs += read_curves(path)
        elif path.is_dir():
            folders |= {folder.resolve(): folder for folder in ([path] if is_run(path) else folders_in(path, remarks))}
        else:
            raise InputError(f"{path}: neither a folder of runs nor an exported .npz nor a .csv of curves")
    candidates: list[tuple[Run, Path | None]] = [(run, None) for run in runs]
    for folder in folders.values():
        candidates += ((run, folder) for run in readable(folder, False, left_out))
    best: dict[tuple, tuple[Run, Path | None]] = {}
    copied = []
    for run, folder in candidates:
        rival = best.get(run.identity)
        copied += [] if rival is None else [f"{run.name} of {rival[0].source} and {run.source}"]
        if rival is None or how_far(run) >= how_far(rival[0]):
            best[run.identity] = (run, folder)
    if copied:
        remarks.append(f"copies of a run, of which the one furthest on counts: {listed(copied)}")
    for run, folder in tqdm(best.values(), unit="run", desc="reading", disable=not progress or len(folders) < 4):
        yield from readable(folder, True, left_out) if folder else [run]


def readable(folder: Path, with_series: bool, left_out: list[str] | None) -> list[Run]:
    """The run of a folder, or none and a line in `left_out`."""
    try:
        return [read_folder(folder, with_series)]
    except InputError as e:
        if left_out is None:
            raise
        left_out.append(f"{folder.name}: {e}")
        return []


def folders_in(path: Path, remarks: list[str]) -> list[Path]:
    """The runs' folders in a folder of runs; a remark says what else lies there. Raises `InputError` where there is none."""
    try:
        inside = sorted(path.iterdir())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({one_line(e)})") from e
    found = [folder for folder in inside if is_run(folder)]
    others = [p for p in inside if p.is_dir() and p not in found and not p.name.startswith(".") and p.name != SEARCHES]
    deeper = Counter(
        config.parents[1] for depth in ("*", "*/*") for p in others for config in p.glob(f"{depth}/config.json")
    )
    where = listed([f"{folder} ({n})" for folder, n in sorted(deeper.items())])
    if not found and not (path / SEARCHES).is_dir():  # a tuned sweep's runs come after its searches
        more = f"; there are runs in {where}" if deeper else ""
        raise InputError(f"{path}: no run in it (a run's folder holds a config.json){more}")
    if deeper:
        remarks.append(f"{path}: the runs in it are read ({len(found)}), and not those that lie deeper: {where}")
    bare = [p.name for p in others if any(p.glob("events.out.tfevents.*"))]
    if bare:
        remarks.append(f"{path}: event files without a config.json are not read: {listed(bare)}")
    return found


def listed(names: list[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def how_far(run: Run) -> tuple[bool, int]:
    """How far a run has come, to be compared."""
    return run.finished, run.summary.get("steps") or 0
