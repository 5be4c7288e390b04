"""A run's folder: event files, config.json, noise.npz, summary.json, checkpoints, and the lock that guards them.

Values reach `Record.log` as tensors on the device and stay there until `flush` brings them over in one copy.
"""

import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import noisefile
import tensorboard_views
from data import InputError, Source
from tensorboard_views import encodable

EVENTS = "events.out.tfevents.*"
CHECKPOINTS = ("last.ckpt", "previous.ckpt")  # in the order in which they are tried
LOSSES = ("train/loss", "val/loss")  # these must be finite; other values may be undefined and are then left out


class NotFinite(RuntimeError):
    """A loss is not finite: the run has failed."""


def write_json(path: Path, content: dict) -> None:
    """Replace `path` in one move, so that no reader sees half a file."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    os.replace(written(path, lambda f: f.write(text.encode())), path)


def written(path: Path, write) -> Path:
    """What `write(file)` writes, whole and on the disk, beside `path` and ready to take its place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


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


def read_json(path: Path) -> dict | None:
    """The object in a JSON file, or None if there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_config(folder: Path) -> dict | None:
    """The content of a run's config.json, or None if it is missing or holds no options."""
    config = read_json(folder / "config.json")
    return config if config and isinstance(config.get("options"), dict) else None


def first_config(folder: Path) -> dict | None:
    """What a run was started with: its config.json or, where that was lost, what its checkpoint holds of it."""
    config = read_config(folder)
    for name in CHECKPOINTS if config is None else ():
        try:
            return load_state(folder / name)["config"]
        except Exception:  # `claim` will say what is wrong with it
            continue
    return config


def load_state(path: Path) -> dict:
    """A checkpoint, on the CPU, as plain data only. Raises `OSError` or `MemoryError` where the file cannot be read now,
    and whatever a damaged file makes torch raise."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as e:
        if "DefaultCPUAllocator" in str(e):  # so torch says it
            raise MemoryError("not enough memory") from e
        raise
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError("not a checkpoint of this tool")
    return state


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
        self.recent_noisy: list[float] = []  # last ten train/acc_noisy
        self.config: dict = {}
        self.fault: str | None = None
        self.last_is_good = True  # last.ckpt, if there is one, is worth keeping as previous.ckpt
        self.writer = self.lock_file = self.thread_hook = None

    def claim(self, resume: bool) -> str | None:
        """Create the folder, or with `resume` take the one that is there, and lock it. On rank 0 alone.

        Returns the name of the checkpoint to go on from, None for a start at step 0. Raises `InputError` if the folder
        is there without `resume`, is in use by another process, or cannot be created, and as `choose` does.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=resume)
            self.lock()
        except FileExistsError:
            raise InputError(
                f"--name {self.folder.name}: {self.folder} exists already; --resume goes on, another --name starts anew"
            ) from None
        except OSError as e:
            raise InputError(f"--runs {self.folder.parent}: {self.folder} cannot be written ({e.strerror})") from e
        return self.choose() if resume else None

    def choose(self) -> str | None:
        """The checkpoint to go on from: the newest that is whole and whose events are all there. None if there is none.

        Raises `InputError` where one cannot be read just now, or where events are lost that no checkpoint can do
        without: starting anew would delete what is there.
        """
        wrong, lost = None, None
        for name in CHECKPOINTS:
            path = self.folder / name
            try:
                here, wanted = self.event_sizes(), load_state(path)["events"]
            except FileNotFoundError:
                continue
            except (OSError, MemoryError) as e:
                raise InputError(f"--resume: {path} cannot be read ({why(e)}); nothing was changed") from e
            except Exception as e:  # a damaged file can make torch raise nearly anything
                wrong = f"{path} is damaged ({why(e)})"
            else:
                short = [file for file, size in wanted.items() if here.get(file, 0) < size]
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
            print(f"train.py: {text}", file=sys.stderr, flush=True)

    def lock(self) -> None:
        """Hold a file lock for as long as this process lives. Raises `InputError` if another process holds it."""
        self.lock_file = open(self.folder / ".lock", "a")
        try:
            import fcntl
        except ImportError:  # no such locks on this system: creating the folder is the only guard
            return
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--name {self.folder.name}: another process is writing {self.folder}") from None

    def open_events(self, sizes: dict[str, int]) -> None:
        """Cut the event files to `sizes` bytes, as they were at a checkpoint, remove newer ones, and open a new one.

        So each step stands in them once, for readers of the raw files too, whenever the run was killed.
        """
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        def open_them() -> None:
            for path in self.folder.glob(EVENTS):
                if path.name in sizes:
                    os.truncate(path, sizes[path.name])
                else:
                    path.unlink()
            self.writer = SummaryWriter(str(self.folder), filename_suffix=f".{len(sizes)}")

        self.thread_hook, threading.excepthook = threading.excepthook, self.thread_ended
        self.guard("the event file", open_them)

    def thread_ended(self, args) -> None:
        """TensorBoard's writing thread hands on what ended it at the next call: no traceback of its own."""
        if not type(args.thread).__module__.startswith("tensorboard."):
            self.thread_hook(args)

    def event_sizes(self) -> dict[str, int]:
        """Bytes of every event file that holds series."""
        files = [path for path in self.folder.glob(EVENTS) if path.suffix != tensorboard_views.HPARAMS_SUFFIX]
        return {path.name: path.stat().st_size for path in files}

    def sync_events(self) -> dict[str, int]:
        """Bytes of every event file once all that was logged is on the disk."""
        for path in self.folder.glob(EVENTS):
            with open(path, "r+b") as f:
                os.fsync(f.fileno())
        if self.writer:
            self.writer.flush()  # again: the thread that writes may tell of a refusal only after a flush has returned
        return self.event_sizes()

    def configure(self, config: dict) -> None:
        """Write config.json; checkpoints hold the same."""
        self.config = config
        if self.active:
            self.guard("config.json", write_json, self.folder / "config.json", config)

    def start(self, ledger: dict, index: Tensor, true: Tensor, label: Tensor, source: Source, plan: dict) -> None:
        """Write what is known before the first step: noise.npz, charts, configuration and ledger as text, pictures.

        `index`, `true`, `label` (n,) are those of the training split of `source`, `plan` is that of `will_log`.
        """
        if not self.active:
            return
        self.guard("noise.npz", noisefile.save, self.folder / "noise.npz", index, true, label, ledger["dynamic"])
        given = self.config["options"]
        noisy = bool(ledger["changed"] or ledger["dynamic"] or given["fake_mask"])
        self.write("add_custom_scalars", tensorboard_views.chart_layout(given, noisy, plan))
        self.write("add_text", "config", encodable(as_table(self.config["options"] | self.config["resolved"])))
        table = as_table({k: v for k, v in ledger.items() if k != "matrix"})
        matrix = noisefile.describe(ledger, source.classes)
        self.write("add_text", "noise", encodable(f"{table}\n\n```\n{matrix}\n```"))
        if ledger["matrix"]:
            matrix = tensorboard_views.matrix_picture(ledger["matrix"], source.classes)
            self.write("add_image", "noise/matrix", matrix)
        labels = tensorboard_views.label_picture(source.x_train[index[:16]], true, label, source.classes)
        self.write("add_image", "data/labels", labels)
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
                if tag == "train/acc_noisy":
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
        except (OSError, RuntimeError) as e:  # torch.save wraps a full disk in a RuntimeError
            self.fault = self.fault or f"{what} in {self.folder} cannot be written ({why(e)})"

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
        temporary = written(path, lambda f: torch.save(state, f))
        if name == "last.ckpt":
            if self.last_is_good and path.exists():
                os.replace(path, self.folder / "previous.ckpt")
            self.last_is_good = True
        os.replace(temporary, path)

    def restore(self, state: dict) -> None:
        """Take over what `checkpoint` added of the record's own."""
        self.latest, self.recent_noisy = state["latest"], state["recent_noisy"]

    def session_started(self) -> None:
        """List the run in TensorBoard's hparams table, with the options of `config`.

        They stand in an event file of their own, which checkpoints do not know: a resumed run, whose options may have
        grown, writes it again.
        """
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        def write() -> None:
            with SummaryWriter(str(self.folder), filename_suffix=tensorboard_views.HPARAMS_SUFFIX) as writer:
                for summary in tensorboard_views.hparams_start(self.config):
                    writer.file_writer.add_summary(summary)

        self.guard("the event file", write)

    def session_ended(self, status: str) -> None:
        """Give the run its status in the hparams table: `finished` or `failed`."""
        if self.writer:
            self.guard("the event file", self.writer.file_writer.add_summary, tensorboard_views.hparams_end(status))
            self.write("flush")

    def close_events(self) -> None:
        """Close the event file: nothing is logged any more."""
        self.write("close")
        self.writer = None
        if self.thread_hook:
            threading.excepthook, self.thread_hook = self.thread_hook, None

    def close(self) -> None:
        """Close what is open and let go of the lock."""
        self.close_events()
        if self.lock_file:
            self.lock_file.close()


def why(e: BaseException) -> str:
    """What an exception says, in one line."""
    return getattr(e, "strerror", None) or (str(e) or type(e).__name__).splitlines()[0]


def as_table(rows: dict) -> str:
    """A Markdown table of names and values."""
    return "\n".join(["| name | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
