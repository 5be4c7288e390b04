"""Reading runs back from paths of any kind: folders of runs, exported files, the report's own curves."""

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from data import InputError
from study.exports import read_export
from study.reference import read_curves
from study.runfolders import Run, is_run, read_folder
from study.searches import FOLDER as SEARCHES


def load_runs(paths: list[str], progress: bool = True, left_out: list[str] | None = None) -> list[Run]:
    """Every run in `paths`: folders of runs, single runs' folders, exported files (.npz), report curves (.csv).

    Of two runs with the same name and options the one further on counts, a folder before a file. Raises `InputError` for a path
    that is none of these. A run that cannot be read is added to `left_out`, as "NAME: reason"; without it, it raises too.
    """
    return list(iter_runs(paths, progress, left_out))


def iter_runs(paths: list[str], progress: bool = True, left_out: list[str] | None = None) -> Iterator[Run]:
    """The runs of `load_runs`, one at a time: the series of a folder are read when it is that run's turn.

    Folders that hold more than the memory does can be gone through like this. Raises as `load_runs` does.
    """
    runs: list[Run] = []
    folders: list[Path] = []
    for path in map(Path, paths):
        if path.suffix == ".npz" and path.is_file():
            runs += read_export(path, left_out)
        elif path.suffix == ".csv" and path.is_file():
            runs += read_curves(path)
        elif path.is_dir():
            inside = [path] if is_run(path) else sorted(p for p in path.iterdir() if is_run(p))
            if not inside and not (path / SEARCHES).is_dir():  # a tuned sweep's runs come after its searches
                raise InputError(f"{path}: no run in it (a run's folder holds a config.json)")
            folders += inside
        else:
            raise InputError(f"{path}: neither a folder of runs nor an exported .npz nor a .csv of curves")
    candidates: list[tuple[Run, Path | None]] = [(run, None) for run in runs]
    for folder in folders:
        try:
            candidates.append((read_folder(folder, with_series=False), folder))
        except InputError as e:
            if left_out is None:
                raise
            left_out.append(f"{folder.name}: {e}")
    best: dict[tuple, tuple[Run, Path | None]] = {}
    for run, folder in candidates:
        identity = (run.name, run.setting, run.cell, run.seed, run.budget, run.length, run.fake)
        rival = best.get(identity)
        if rival is None or how_far(run) >= how_far(rival[0]):
            best[identity] = (run, folder)
    for run, folder in tqdm(best.values(), unit="run", desc="reading", disable=not progress or len(folders) < 4):
        yield read_folder(folder) if folder else run


def how_far(run: Run) -> tuple[bool, int]:
    """How far a run has come, to be compared."""
    return run.finished, run.summary.get("steps") or 0
