"""A run's folder: event files, config.json, noise.npz, summary.json, checkpoints, and the lock that guards them.

Values reach `Record.log` as tensors on the device and stay there until `flush` brings them over in one copy.
"""

import errno
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from data import InputError, one_line, printable
from engine import files, jsonfiles, locks, memory, noisefile, schema, tensorboard_views
from engine.files import write_temporary
from engine.schema import EVENTS
from engine.tensorboard_views import encodable
from series import ACC_NOISY, TRAIN_LOSS, VAL_LOSS

CHECKPOINTS = ("last.ckpt", "previous.ckpt")  # in the order in which they are tried
HPARAMS = (
    "events.out.tfevents.0000000000.hparams"  # the event file of TensorBoard's hparams table, read before all others
)
# beside the event files
RUN_FILES = (locks.NAME, "config.json", "summary.json", "noise.npz", "examples.npz", *CHECKPOINTS, "failed.ckpt")
LOSSES = (TRAIN_LOSS, VAL_LOSS)  # these must be finite; other values may be undefined and are then left out


class NotFinite(RuntimeError):
    """A loss is not finite: the run has failed."""


def write_json(path: Path, content: dict) -> None:
    """Replace `path` in one move, so that no reader sees half a file."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    os.replace(write_temporary(path, lambda f: f.write(text.encode())), path)


def versions() -> dict:
    """Versions of what the bits depend on, and the commit of this code if it is a git checkout."""
    import lightning_fabric
    import torchvision

    try:
        ask = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass, which a checkpoint must not hold
        "torchvision": str(torchvision.__version__),
        "lightning_fabric": lightning_fabric.__version__,
        "cuda": torch.version.cuda,
        "git_commit": commit,
    }


def config_if_readable(folder: Path) -> dict | None:
    """A run's config.json, None if it is lost. Raises `InputError` where it has a wrong field."""
    try:
        return schema.read_config(folder / "config.json", resume=True)
    except jsonfiles.Unreadable:
        return None


def status_if_readable(folder: Path) -> str | None:
    """The status in a run's summary.json, None if it is lost. Raises `InputError` where it has a wrong field."""
    try:
        return (schema.read_summary(folder / "summary.json") or {}).get("status")
    except jsonfiles.Unreadable:
        return None


def first_config(folder: Path) -> dict | None:
    """What a run was started with: its config.json or, where that was lost, what its checkpoint holds of it.

    Raises `InputError` where config.json has a wrong field."""
    config = config_if_readable(folder)
    for name in CHECKPOINTS if config is None else ():
        try:
            return load_state(folder / name)["config"]
        except Exception:  # `claim` will say what is wrong with it
            continue
    return config


def check_folder(folder: Path) -> None:
    """Raise `InputError` if a file of a run's folder is a link or no regular file: a folder that comes from elsewhere
    must not lead to a file outside it, nor to a pipe that never answers. `folder` itself may be a link."""
    for path in (*(folder / name for name in RUN_FILES), *folder.glob(EVENTS), folder / "profile"):
        problem = files.why_not_regular(path, folder=path.name == "profile")
        if problem:
            raise InputError(f"--name {folder.name}: {path} is {problem}; a run's folder holds its own files")


def load_plain(path: Path) -> object:
    """What `torch.save` wrote, on the CPU, as plain data only; not checked further.

    It is read whole before it is parsed, which tells a file that cannot be read now (`OSError`, or `MemoryError` for
    want of memory) from a damaged one, which can make torch raise nearly anything: here always `ValueError`.
    """
    with files.open_regular(path) as f:
        content = f.read()
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as e:
        requested = memory.requested_bytes(e)
        if requested is not None and requested <= len(content):  # a damaged file may ask for any amount
            raise MemoryError("not enough memory") from e
        raise ValueError(one_line(e)) from e


def load_state(path: Path) -> dict:
    """A checkpoint that a run goes on from. Raises as `load_plain`, and `InputError` if it is whole and has a wrong field."""
    return schema.check_state(load_plain(path), path)


def write_state(path: Path, state: dict) -> Path:
    """What `torch.save` makes of `state`, written as `write_temporary` does. Raises `OSError`, which says how much room a
    checkpoint takes where there is none: torch alone tells of no reason."""
    refused = []

    def write(f) -> None:
        def keep(data) -> int:
            try:
                return f.write(data)
            except OSError as e:
                refused.append(e)
                raise

        torch.save(state, SimpleNamespace(write=keep, flush=f.flush))

    try:
        return write_temporary(path, write)
    except (OSError, RuntimeError) as e:
        reason = refused[0] if refused else e
        if getattr(reason, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise reason from None
        free = f", {memory.format_bytes(files.free_bytes(path.parent))} are free" * (reason.errno == errno.ENOSPC)
        raise OSError(
            reason.errno, f"{reason.strerror}; it needs {memory.format_bytes(size_of(state))}{free}"
        ) from None


def size_of(state: object) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size_of, parts))


class Record:
    """The run's folder, locked while this process lives. On processes other than rank 0 (`active` false) nothing is
    written, but `flush` still looks at the values, so that all ranks notice a failure at the same step.

    What the file system refuses on rank 0 is kept in `fault`, for all ranks to stop at together.
    """

    def __init__(self, folder: Path, active: bool, began: float | None = None) -> None:
        """Touches nothing yet: `claim` does. `began` is the process's start by `time.perf_counter`."""
        self.folder, self.active = Path(folder), active
        self.began = time.perf_counter() if began is None else began
        self.saved = time.monotonic()  # when the last checkpoint was written
        self.pending: list[tuple[int, dict]] = []  # (step, {tag: 0-d tensor or float}), not yet written
        self.latest: dict[str, float] = {}  # last defined value of each tag
        self.recent_noisy: list[float] = []  # last ten of ACC_NOISY
        self.config: dict = {}
        self.fault: str | None = None
        self.last_is_good = True  # last.ckpt, if there is one, is worth keeping as previous.ckpt
        self.writer = self.lock_file = None

    def claim(self, resume: bool, check: Callable[[dict, Path], None] = lambda *_: None) -> str | None:
        """Create the folder, or with `resume` take the one that is there, and lock it. On rank 0 alone.

        Returns the name of the checkpoint to go on from, None for a start at step 0; `check` is that of `choose`. Raises
        `InputError` if the folder is there without `resume`, is in use by another process, or cannot be created, and as `choose` does.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=resume)
            check_folder(self.folder)
            self.lock()
        except FileExistsError:
            raise InputError(
                f"--name {self.folder.name}: {self.folder} exists already; --resume goes on, another --name starts anew"
            ) from None
        except OSError as e:
            raise InputError(f"--runs {self.folder.parent}: {self.folder} cannot be written ({one_line(e)})") from e
        return self.choose(check) if resume else None

    def choose(self, check: Callable[[dict, Path], None]) -> str | None:
        """The checkpoint to go on from: the newest that is whole and right and whose events are all there. None if there
        is none, or all are damaged.

        `check(state, path)` raises `InputError` unless a checkpoint's content is of this run. Raises `InputError` where
        one cannot be read just now and, if no other can go on, where one has a wrong field or has lost events: starting
        anew would delete what is there.
        """
        wrong, lost = None, None
        for name in CHECKPOINTS:
            path = self.folder / name
            try:
                here, state = self.event_sizes(), load_state(path)
                check(state, path)
            except FileNotFoundError:
                continue
            except InputError as e:
                wrong = lost = f"{e}" if str(path) in str(e) else f"{path}: {e}"
            except (OSError, MemoryError) as e:
                raise InputError(f"--resume: {path} cannot be read ({one_line(e)}); nothing was changed") from e
            except Exception as e:  # a damaged file can make torch raise nearly anything
                wrong = f"{path} is damaged ({one_line(e)})"
            else:
                short = [file for file, size in state["events"].items() if here.get(file, 0) < size]
                if not short:
                    self.last_is_good = name == "last.ckpt"
                    return name
                wrong = lost = f"{self.folder / short[0]} has lost events that {name} goes on from"
            if name == "last.ckpt":
                self.say(f"{wrong}; trying the one before")
        if lost:
            raise InputError(f"--resume: {lost}, and no older checkpoint can go on; nothing was changed")
        self.say(f"no {'readable ' if wrong else ''}checkpoint in {self.folder}: starting at step 0")
        return None

    def say(self, text: str) -> None:
        """A line for the user, on standard error, which progress bars and warnings use too."""
        if self.active:
            print(f"train.py: {printable(text)}", file=sys.stderr, flush=True)

    def lock(self) -> None:
        """Hold a file lock for as long as this process lives. Raises `InputError` if another process holds it."""
        try:
            self.lock_file = locks.lock(self.folder / locks.NAME)
        except BlockingIOError:
            raise InputError(f"--name {self.folder.name}: another process is writing {self.folder}") from None

    def open_events(self, sizes: dict[str, int]) -> None:
        """Cut the event files to `sizes` bytes, as they were at a checkpoint, remove newer ones, list the run in TensorBoard's
        hparams table with the options of `config`, and open a new one.

        So each step is in them once, for readers of the raw files too, whenever the run was killed. The table's row has a
        file of its own: a resumed run, whose options may have grown, writes it again.
        """
        if not self.active:
            return
        from engine import eventfile

        def open_them() -> None:
            files.remove_leftovers(self.folder)
            for path in self.folder.glob(EVENTS):
                if path.name in sizes:
                    files.truncate(path, sizes[path.name])
                else:
                    path.unlink()
            files.replace(self.folder / HPARAMS, eventfile.content(tensorboard_views.hparams_start(self.config)))
            self.writer = eventfile.Writer(self.folder / eventfile.new_name(sizes))

        self.guard("the event file", open_them)

    def event_sizes(self) -> dict[str, int]:
        """Bytes of every event file that holds series."""
        return {path.name: path.stat().st_size for path in self.folder.glob(EVENTS) if path.name != HPARAMS}

    def sync_events(self) -> dict[str, int]:
        """Bytes of every event file once all that was logged is on the disk."""
        if self.writer:
            self.writer.flush()
        for path in self.folder.glob(EVENTS):
            with files.open_regular(path, "r+b") as f:
                os.fsync(f.fileno())
        return self.event_sizes()

    def configure(self, config: dict) -> None:
        """Write config.json; checkpoints hold the same."""
        self.config = config
        if self.active:
            self.guard("config.json", write_json, self.folder / "config.json", config)

    def start(
        self, ledger: dict, index: Tensor, true: Tensor, label: Tensor, images: Tensor, classes: tuple, plan: dict
    ) -> None:
        """Write what is known before the first step: noise.npz, charts, configuration and ledger as text, pictures.

        `index`, `true`, `label` (n,) are those of the training split, `images` (m, H, W, C) uint8 its first; `plan`: `will_log`'s.
        """
        if not self.active:
            return
        self.guard("noise.npz", noisefile.save, self.folder / "noise.npz", index, true, label, ledger["dynamic"])
        given = self.config["options"]
        noisy = bool(ledger["changed"] or ledger["dynamic"] or given["fake_mask"])
        self.write("add_custom_scalars", tensorboard_views.chart_layout(given, noisy, plan))
        self.write("add_text", "config", encodable(as_table(self.config["options"] | self.config["resolved"])))
        table = as_table({k: v for k, v in ledger.items() if k != "matrix"})
        matrix = noisefile.describe_labels(ledger, classes)
        self.write("add_text", "noise", encodable(f"{table}\n\n```\n{matrix}\n```"))
        if ledger["matrix"]:
            self.write("add_image", "noise/matrix", tensorboard_views.matrix_picture(ledger["matrix"], classes))
        self.write("add_image", "data/labels", tensorboard_views.label_picture(images, true, label, classes))
        self.write("flush")

    def log(self, step: int, values: dict) -> None:
        """Keep 0-d tensors or floats for `step`; nothing waits for the device."""
        self.pending.append((step, values))

    def flush(self) -> None:
        """Write what was logged; here the host waits for the device, once.

        Raises `NotFinite` at the first loss that is not finite, with nothing written from that step on. Other values
        that are not finite are undefined (a zero gradient has no cosine) and left out.
        """
        pending, self.pending = self.pending, []
        tensors = [v for _, values in pending for v in values.values() if isinstance(v, Tensor)]
        numbers = iter(torch.cat([t.double().reshape(-1) for t in tensors]).tolist() if tensors else ())
        for step, values in pending:
            plain, histograms = {}, {}
            for tag, v in values.items():
                if isinstance(v, Tensor) and v.dim():
                    histograms[tag] = np.array([next(numbers) for _ in range(v.numel())])
                else:
                    plain[tag] = next(numbers) if isinstance(v, Tensor) else float(v)
            for tag in LOSSES:
                if not math.isfinite(plain.get(tag, 0.0)):
                    raise NotFinite(f"{tag} is {plain[tag]} at step {step}")
            for tag, value in plain.items():
                if not math.isfinite(value):
                    continue
                self.latest[tag] = value
                if tag == ACC_NOISY:
                    self.recent_noisy = [*self.recent_noisy[-9:], value]
                self.write("add_scalar", tag, value, step)
            for tag, several in histograms.items():
                if np.isfinite(several).all():
                    self.write("add_histogram", tag, several, step)
        self.write("flush")

    def write(self, method: str, *arguments) -> None:
        """Call a method of the event file's writer on rank 0; a refusal of the file system is noted."""
        if self.writer:
            self.guard("the event file", getattr(self.writer, method), *arguments)

    def guard(self, what: str, act, *arguments) -> None:
        """Call `act`; where the file system refuses, note the fault instead of leaving the other ranks behind."""
        try:
            return act(*arguments)
        except (OSError, RuntimeError) as e:
            self.fault = self.fault or f"{what} in {self.folder} cannot be written ({one_line(e)})"

    def summary(self, **content) -> None:
        """Write summary.json."""
        if self.active:
            write_json(self.folder / "summary.json", content)

    def checkpoint(self, state: dict, name: str = "last.ckpt") -> None:
        """Save `state`, whole or not at all, and with it where the event files end; the last.ckpt before it is kept
        as previous.ckpt. A refusal of the file system is noted in `fault` and leaves both as they were.

        After a fault there is no new last.ckpt: what it would go on from lacks what was refused.
        """
        if not self.active:
            return
        sizes = self.guard("the event file", self.sync_events)
        if self.fault and name == "last.ckpt":
            return
        own = {"latest": self.latest, "recent_noisy": self.recent_noisy, "events": sizes}
        self.guard(name, self.save, state | own, name)

    def save(self, state: dict, name: str) -> None:
        path = self.folder / name
        temporary = write_state(path, state)
        if name == "last.ckpt":
            if self.last_is_good and path.exists():
                os.replace(path, self.folder / "previous.ckpt")
            self.last_is_good = True
        os.replace(temporary, path)

    def restore(self, state: dict) -> None:
        """Take over what `checkpoint` added of the record's own."""
        self.latest, self.recent_noisy = state["latest"], state["recent_noisy"]

    def session_ended(self, status: str) -> None:
        """Give the run its status in the hparams table: `finished` or `failed`."""
        if self.writer:
            self.guard("the event file", self.writer.file_writer.add_summary, tensorboard_views.hparams_end(status))
            self.write("flush")

    def close_events(self) -> None:
        """Close the event file: nothing is logged any more."""
        self.write("close")
        self.writer = None

    def close(self) -> None:
        """Close what is open and let go of the lock."""
        self.close_events()
        if self.lock_file:
            self.lock_file.close()


def as_table(rows: dict) -> str:
    """A Markdown table of names and values."""
    return "\n".join(["| name | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
