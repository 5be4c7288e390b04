"""Results on the disk, whole or not at all: written beside their place under a new name, then renamed."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data import one_line


class CannotWrite(Exception):
    """Results could not be written: one line that names the option and the path."""


@contextmanager
def whole_folder(out: Path, option: str = "--out") -> Iterator[Path]:
    """A temporary folder within `out`, whose files move into `out` when all of them are written.

    `out` is created if it is absent; other files in it are left alone. If anything cannot be written, what was there
    stays as it was and `CannotWrite` is raised.
    """
    made, stage = [], None
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=out))  # on the same file system: moving needs no space
        yield stage
        move(stage, out)
        made = []
    except OSError as e:
        raise CannotWrite(f"{option} {out}: cannot be written ({one_line(e)}); what was there is as before") from e
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def move(stage: Path, out: Path) -> None:
    """Move every file of `stage` to `out`, in order of writing: pages come after the figures that they show."""
    files = sorted(stage.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for path in files:
        if (out / path.name).is_dir():  # before the first one moves
            raise IsADirectoryError(None, f"{path.name} in it is a folder")
    for path in files:
        path.replace(out / path.name)


@contextmanager
def whole_file(path: Path, option: str) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` when it is written. Raises `CannotWrite`."""
    stage = None
    try:
        stage = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
        yield stage / path.name
        (stage / path.name).replace(path)
    except OSError as e:
        raise CannotWrite(f"{option} {path}: cannot be written ({one_line(e)}); what was there is as before") from e
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
