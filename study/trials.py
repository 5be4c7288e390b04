"""The trials of one cell's search: an Optuna study in a journal that several sweeps may write, on one machine or many.

Parameters are drawn by TPE (Bergstra et al. 2011), from a generator that is seeded for each trial by the study's name and
the trial's number, so that an interruption changes nothing. Hyperband (Li et al. 2018; asynchronous, Li et al. 2020) ends
trials early. Optuna is optional: requirements-tune.txt.
"""

import hashlib
import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock
from tqdm import tqdm

from data import InputError, one_line, printable
from engine import files, locks
from study.processes import make_folder
from study.spaces import Dimension

RUNGS = (
    9  # the first time at which Hyperband may end a trial is after a ninth of its evaluations: three brackets at most
)
STARTUP = 3  # trials of a bracket that are drawn at random before TPE has something to learn from
JOURNAL, GUARD = "journal.log", ".journal.lock"
OPERATION = b'{"op_code"'  # how a line of the journal begins; within one the quotation marks would be escaped


def load_optuna():
    """The module. Raises `InputError` where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise InputError("--tune: Optuna is not installed; pip install -r requirements-tune.txt") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def mend(path: Path) -> None:
    """Take away what a full disk or a loss of power has left of a line, the last one or with the next one behind it, and say so.

    Optuna writes on behind it, and then reads nothing that follows. For whoever holds the lock under which lines are added.
    """
    before = path.read_bytes() if path.exists() else b""
    *lines, last = before.split(b"\n")
    with suppress(ValueError):
        if last.startswith(OPERATION) and json.loads(last):  # only its end is missing
            lines, last = [*lines, last], b""
    content = b"".join(line[max(line.rfind(OPERATION), 0) :] + b"\n" for line in lines)
    if not OPERATION.startswith(last.strip(b"\0")[: len(OPERATION)]):  # another program's file
        content += last
    if content != before:
        files.replace(path, content)
        tqdm.write(f"warning: {printable(path)}: a line was cut off; the whole ones are kept", file=sys.stderr)


class Journal:
    """The file of a search's trials, and the lock under which sweeps take trials and end them.

    The lock is the kernel's, so that a killed sweep leaves none behind.
    """

    def __init__(self, folder: Path, create: bool) -> None:
        """`create`: whether folder and file are made where there are none. Raises `InputError` for a file that is no journal, and
        where none can be written."""
        self.optuna, self.folder = load_optuna(), folder
        self.storage = None
        path = folder / JOURNAL
        if create:
            make_folder(folder)
        elif not path.exists():
            return
        backend = self.optuna.storages.journal
        self.guard = FileLock(folder / GUARD)
        try:
            lock = FileLock(folder / f"{GUARD}.append")
            if create:
                with lock:
                    mend(path)
            file = backend.JournalFileBackend(str(path), lock_obj=lock)
            self.storage = self.optuna.storages.JournalStorage(file)
        except OSError as e:
            raise InputError(f"--tune: {path}: cannot be read or written ({one_line(e)})") from e
        except Exception as e:  # a damaged file can make Optuna raise nearly anything
            raise InputError(f"--tune: {path}: not a journal of Optuna ({one_line(e)})") from e

    def names(self) -> list[str]:
        """The cells whose trials it holds."""
        return [] if self.storage is None else self.optuna.study.get_all_study_names(self.storage)


class CellStudy:
    """The trials of one cell. Every trial that is running is held by a lock of the sweep that runs it."""

    def __init__(self, journal: Journal, name: str, space: list[Dimension], direction: str, evaluations: int) -> None:
        """`evaluations`: those of a trial's run, of which each is reported."""
        self.journal, self.name, self.space = journal, name, space
        self.evaluations = evaluations
        self.states = journal.optuna.trial.TrialState
        self.held: dict[int, BinaryIO] = {}
        pruner = journal.optuna.pruners.HyperbandPruner(
            min_resource=max(1, evaluations // RUNGS), max_resource=max(1, evaluations)
        )
        if name in journal.names():  # making it again would write a line, which looking at a search must not
            self.study = journal.optuna.load_study(storage=journal.storage, study_name=name, pruner=pruner)
        else:
            self.study = journal.optuna.create_study(
                storage=journal.storage, study_name=name, direction=direction, pruner=pruner, load_if_exists=True
            )
        # Optuna makes the brackets when a trial is first judged; sampling within them has to know them before
        pruner.prune(self.study, journal.optuna.trial.create_trial(value=0.0))

    def trials(self) -> list:
        """Every trial, as Optuna has it, by number."""
        return self.study.get_trials(deepcopy=False)

    def is_complete(self, most: int) -> bool:
        """Whether `most` trials have ended and none is running."""
        trials = self.trials()
        return len(trials) >= most and all(t.state.is_finished() for t in trials)

    def lock_path(self, number: int) -> Path:
        return self.journal.folder / f".{self.name}_trial{number}.lock"

    def hold(self, number: int) -> bool:
        """Take a trial, unless a living sweep has it."""
        with suppress(BlockingIOError):
            self.held[number] = locks.lock(self.lock_path(number))
            return True
        return False

    def release(self, number: int) -> None:
        """Let go of a trial, which another sweep may then take unless it has ended."""
        self.held.pop(number).close()

    def set_sampler(self, number: int) -> None:
        """What draws the parameters of the trial `number`."""
        seed = int.from_bytes(hashlib.sha256(f"{self.name} {number}".encode()).digest()[:4], "big")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.journal.optuna.exceptions.ExperimentalWarning)
            self.study.sampler = self.journal.optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=True
            )

    def claim(self, most: int):
        """(trial, {option: value}) of a trial to run: one whose sweep is gone, or a new one if there are fewer than `most`.

        None where there is nothing to do. No trial is given to two sweeps.
        """
        with self.journal.guard:
            trials = self.trials()
            for t in trials:
                if not t.state.is_finished() and t.number not in self.held and self.hold(t.number):
                    self.set_sampler(t.number)  # it may have been killed before its parameters were written
                    trial = self.journal.optuna.trial.Trial(self.study, t._trial_id)
                    return trial, self.draw(trial)
            if len(trials) >= most or not self.hold(len(trials)):
                return None
            self.set_sampler(len(trials))
            trial = self.study.ask()
            return trial, self.draw(trial)

    def draw(self, trial) -> dict[str, str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.journal.optuna.exceptions.ExperimentalWarning)
            return {d.option: d.suggest(trial) for d in self.space}

    def report(self, trial, values: list[float]) -> bool:
        """Tell the evaluations so far of a trial, the first after one epoch; returns whether it is to end.

        Never at the last one, which would save nothing.
        """
        reported = self.trials()[trial.number].intermediate_values
        for epoch, value in enumerate(values, 1):
            if epoch in reported:
                continue
            trial.report(value, epoch)
            if epoch < self.evaluations and trial.should_prune():
                trial.set_user_attr("pruned", epoch)  # before its run is stopped: it is not to go on after a kill
                return True
        return False

    def end(self, trial, value: float | None = None, **attributes) -> None:
        """End a trial with its `value`, or as pruned without one."""
        for name, attribute in attributes.items():
            trial.set_user_attr(name, attribute)
        state = self.states.PRUNED if value is None else self.states.COMPLETE
        self.study.tell(trial.number, value, state=state)
        self.lock_path(trial.number).unlink(missing_ok=True)
        self.release(trial.number)

    def best(self):
        """The best of the trials that were not ended early, the earliest of equals; None if there is none."""
        complete = [t for t in self.trials() if t.state == self.states.COMPLETE]
        sign = 1 if self.study.direction.name == "MAXIMIZE" else -1
        return max(complete, key=lambda t: (sign * t.value, -t.number), default=None)

    def values(self, t) -> dict[str, str]:
        """{option: value} of a trial, as train.py was given it."""
        return {d.option: d.spelled(t.params[d.option]) for d in self.space if d.option in t.params}

    def listed(self) -> list[dict]:
        """Every trial as plain values, for the search's file."""
        rows = []
        for t in self.trials():
            state = "diverged" if "diverged" in t.user_attrs else t.state.name.lower()
            steps = t.intermediate_values
            value = t.value if t.value is not None else steps[max(steps)] if steps else None
            row = {"number": t.number, "state": state, "values": self.values(t), "value": value}
            rows.append(row | {"evaluations": max(steps, default=0)})
        return rows
