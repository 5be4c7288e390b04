"""The jobs of a sweep as RUNS remembers them: written down when a sweep starts, read by `--status` and by later sweeps."""

import functools
import hashlib
import json
import re
import shlex
import sys
import time
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data import InputError
from engine import jsonfiles, options, roles
from engine.identity import compared
from study.exports import read_export
from study.grids import Job
from study.outputs import whole_file
from study.processes import LOGS, make_folder, options_of, run_state
from study.runfolders import is_run

JOBS_FORMAT = "label-noise sweep 1"


@dataclass
class Sweep:
    """A sweep that was started in some folder of runs."""

    command: str  # as it was typed
    started: str  # local time, 2026-01-31 12:00:00
    jobs: list[Job]


def write_jobs(runs: Path, jobs: list[Job], argv: list[str]) -> None:
    """Write a sweep's jobs to RUNS/.sweep/jobs-HASH.json, one file for each set of jobs.

    Raises `InputError` if RUNS cannot be written, `CannotWrite` if the file cannot.
    """
    make_folder(runs)
    listed = [{"name": job.name, "argv": job.argv, "options": vars(job.args)} for job in jobs]
    which = hashlib.sha256(json.dumps(sorted(job.name for job in jobs)).encode()).hexdigest()[:12]
    about = {
        "format": JOBS_FORMAT,
        "command": shlex.join(["sweep.py", *argv]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with whole_file(runs / LOGS / f"jobs-{which}.json", "--runs") as path:
        path.write_text(json.dumps(about | {"jobs": listed}, indent=1) + "\n")


def read_jobs(runs: Path) -> list[Sweep]:
    """Every sweep written down in RUNS, the oldest first. One that cannot be read is left out with a warning."""
    sweeps = []
    for path in sorted(
        (runs / LOGS).glob("jobs-*.json"), key=lambda path: path.lstat().st_mtime_ns
    ):  # two may start in one second
        try:
            content = jsonfiles.read_json(path) or {}
            if content.get("format") != JOBS_FORMAT:
                raise ValueError
            jobs = [checked(**entry) for entry in content["jobs"]]
            sweeps.append(Sweep(str(content["command"]), str(content["started"]), jobs))
        except (InputError, ValueError, KeyError, TypeError):
            print(f"warning: {path}: not a list of a sweep's jobs, left out", file=sys.stderr)
    return sorted(sweeps, key=lambda sweep: sweep.started)


def checked(name: str, argv: list[str], options: dict) -> Job:
    """A job from its entry in a file. Raises `ValueError` or `TypeError`."""
    known = defaults()
    kinds = {key: (type(v), int) if isinstance(v, float) else type(v) for key, v in known.items() if v is not None}
    same = all(isinstance(options.get(key, known[key]), kind) for key, kind in kinds.items())
    if (
        not same
        or not re.fullmatch(r"[^/\\\0]+", name)
        or name in (".", "..")
        or not all(isinstance(w, str) for w in argv)
    ):
        raise ValueError
    return Job(argv, Namespace(**known | options | {"name": name}))


@functools.cache
def defaults() -> dict:
    return vars(options.parser().parse_args([]))


def identity_of(given: dict) -> str:
    """What tells a run from others: every option that decides what it computes, files included."""
    given = defaults() | given
    files = {key: given.get(key) for key in roles.having(roles.FILE)}
    return json.dumps(compared(given) | files, sort_keys=True, default=str)


def sought(given: dict) -> str:
    """`identity_of` without the precision: a run's folder has what the hardware made of `auto`."""
    return identity_of(given | {"precision": None})


def done_in_files(paths: list[str]) -> dict[str, list[dict]]:
    """{name: options} of the finished runs in files of results. Raises `InputError`."""
    done: dict[str, list[dict]] = {}
    for run in (run for path in paths for run in read_export(Path(path)) if run.finished):
        # the level of noise that comes from a file is no option
        given = run.options | ({"noise": None} if run.options.get("noise_file") else {})
        done.setdefault(run.name, []).append(given)
    return done


def any_done(jobs: list[Job], done: dict[str, list[dict]]) -> bool:
    """Whether any job's run is in such files."""
    there = {sought(given) for listed in done.values() for given in listed}
    return any(sought(vars(job.args)) in there for job in jobs)


def names_there(sweeps: list[Sweep], runs: Path, done: dict[str, list[dict]]) -> dict[str, list[str]]:
    """{what is `sought`: the names of such runs}, of earlier sweeps, of files of results, and of the folders in RUNS."""
    known = [(job.name, vars(job.args)) for sweep in sweeps for job in sweep.jobs]
    known += [(name, given) for name, listed in done.items() for given in listed]
    for folder in sorted(filter(is_run, runs.iterdir())) if runs.is_dir() else ():
        with suppress(InputError):  # one with a wrong field
            if given := options_of(folder):  # not of a damaged file
                known.append((folder.name, given))
    names: dict[str, list[str]] = {}
    for name, given in known:
        names.setdefault(sought(given), []).append(name)
    return names


def find_earlier(jobs: list[Job], sweeps: list[Sweep], runs: Path, done: dict[str, list[dict]]) -> None:
    """Give each job the name under which its run is there already, if it is not there under its own, or its long name where
    its own is that of another run.

    `sweeps`: earlier ones in RUNS; `done`: see `processes.run_state`.
    """
    there = names_there(sweeps, runs, done)
    taken = {job.name: sought(vars(job.args)) for sweep in sweeps for job in sweep.jobs}
    for job in jobs:
        own, which = job.name, sought(vars(job.args))
        states = {}
        for name in dict.fromkeys([own, *there.get(which, []), options.run_name(job.args)]):
            job.args.name = name
            states[name] = run_state(runs, job, done)[0]
        found = [name for name, state in states.items() if state not in ("waiting", "other")]
        free = states[own] != "other" and taken.get(own, which) == which
        best = own if free else job.long_name or own
        job.args.name = next((name for name in found if states[name] == "finished"), (found or [best])[0])
