"""A run's folder: event files, config.json, noise.npz, summary.json, checkpoints, and the lock that guards them.

Values reach `Record.log` as tensors on the device and stay there until `flush` brings them over in one copy.
"""

import json
import math
import os
import platform
import subprocess
from pathlib import Path

import torch
from torch import Tensor

import noise
from data import InputError

LAYOUT = {  # TensorBoard's custom scalars: the report's figures
    "the report": {
        "validation accuracy (figures 4-6, 13-15)": ["Multiline", ["val/acc"]],
        "cosine of clean and all (figures 7-9, 16)": ["Multiline", ["grad/cos_clean_all"]],
        "training accuracy on noisy examples (figures 10-12, 17)": ["Multiline", ["train/acc_noisy"]],
        "learning rate (figure 3)": ["Multiline", ["optim/lr"]],
        "momentum (figure 3)": ["Multiline", ["optim/momentum"]],
    },
    "gradients": {
        "cosines": ["Multiline", ["grad/cos_clean_all", "grad/cos_clean_noisy"]],
        "norms": ["Multiline", ["grad/norm_clean", "grad/norm_noisy", "grad/norm_all"]],
        "accuracy, clean and noisy": ["Multiline", ["train/acc_clean", "train/acc_noisy"]],
    },
}
LOSSES = ("train/loss", "val/loss")  # these must be finite; other values may be undefined and are then left out


class NotFinite(RuntimeError):
    """A loss is not finite: the run has failed."""


def write_json(path: Path, content: dict) -> None:
    """Replace `path` in one move, so that no reader sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


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


def picture(images: Tensor, true: Tensor, given: Tensor, classes: tuple[str, ...]):
    """A matplotlib figure of up to 32 uint8 images (m, H, W, C), titled with the true label and, if changed, the given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    for i, axis in enumerate(figure.subplots(4, 8).flat):
        axis.axis("off")
        if i >= len(images):
            continue
        axis.imshow(images[i].squeeze(-1).numpy(), cmap="gray" if images.shape[-1] == 1 else None)
        t, y = int(true[i]), int(given[i])
        axis.set_title(classes[t] if t == y else f"{classes[t]}\n-> {classes[y]}", fontsize=8, color="k" if t == y else "r")
    return figure


class Record:
    """The run's folder, created and locked. On processes other than rank 0 (`active` false) nothing is written, but
    `flush` still looks at the values, so that all ranks notice a failure at the same step."""

    def __init__(self, folder: Path, active: bool) -> None:
        """Raises `InputError` if the folder exists already or cannot be written."""
        self.folder, self.active = Path(folder), active
        self.pending: list[tuple[int, dict]] = []  # (step, {tag: 0-d tensor or float}), not yet written
        self.latest: dict[str, float] = {}  # last defined value of each tag
        self.recent_noisy: list[float] = []  # last ten train/acc_noisy
        self.config: dict = {}
        if not active:
            return
        try:
            self.folder.mkdir(parents=True)
            self.lock()
        except FileExistsError:
            raise InputError(f"--name {self.folder.name}: {self.folder} exists already; give another --name") from None
        except OSError as e:
            raise InputError(f"--runs {self.folder.parent}: {self.folder} cannot be created ({e.strerror})") from e
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder))

    def lock(self) -> None:
        """Hold a file lock for as long as this process lives."""
        self.lock_file = open(self.folder / ".lock", "a")
        try:
            import fcntl

            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system: creating the folder is the only guard
            pass

    def start(self, config: dict, ledger: dict, index: Tensor, true: Tensor, label: Tensor, figure) -> None:
        """Write what is known before the first step: configuration, noise, and both as text beside a picture."""
        self.config = config
        if not self.active:
            return
        noise.save(self.folder / "noise.npz", index, true, label)
        write_json(self.folder / "config.json", config)
        self.writer.add_custom_scalars(LAYOUT)
        self.writer.add_text("config", as_table(config["options"] | config["resolved"]))
        self.writer.add_text("noise", as_table(ledger))
        self.writer.add_figure("data/labels", figure)

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
        numbers = iter(torch.stack([t.double() for t in tensors]).tolist() if tensors else ())
        for step, values in pending:
            plain = {tag: next(numbers) if isinstance(v, Tensor) else float(v) for tag, v in values.items()}
            for tag in LOSSES:
                if not math.isfinite(plain.get(tag, 0.0)):
                    raise NotFinite(f"{tag} is {plain[tag]} at step {step}")
            for tag, value in plain.items():
                if not math.isfinite(value):
                    continue
                self.latest[tag] = value
                if tag == "train/acc_noisy":
                    self.recent_noisy = [*self.recent_noisy[-9:], value]
                if self.active:
                    self.writer.add_scalar(tag, value, step)
        if self.active:
            self.writer.flush()

    def summary(self, **content) -> None:
        """Write summary.json."""
        if self.active:
            write_json(self.folder / "summary.json", content)

    def checkpoint(self, state: dict, name: str = "last.ckpt") -> None:
        """Save `state`, whole or not at all; a last.ckpt that was there becomes previous.ckpt."""
        if not self.active:
            return
        path, temporary = self.folder / name, self.folder / (name + ".tmp")
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if name == "last.ckpt" and path.exists():
            os.replace(path, self.folder / "previous.ckpt")
        os.replace(temporary, path)

    def hyperparameters(self, metrics: dict[str, float]) -> None:
        """TensorBoard's hparams table, under the tags that the series have already: no false point, no subfolder."""
        if not self.active:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in self.config["options"].items()}
        for proto in hparams(plain, metrics):
            self.writer.file_writer.add_summary(proto)

    def close(self) -> None:
        """Close the event file and let go of the lock."""
        if self.active:
            self.writer.close()
            self.lock_file.close()


def as_table(rows: dict) -> str:
    """A Markdown table of names and values."""
    return "\n".join(["| name | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
