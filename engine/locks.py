"""The lock of a run's folder: held by the process that writes the run, and by no dead one.

`flock` itself rather than the `filelock` package, for three reasons. A look at a lock must not take it, not even for a
moment, for a run that starts just then would be refused: this needs a shared lock, and those of `filelock` by `flock` are
exclusive. Where the file system has no `flock`, `filelock` falls back to a marker file, which outlives a killed process.
And the file is opened by `files.open_regular`, which follows no link and waits for no pipe that a folder from elsewhere
may hold under that name.
"""

from pathlib import Path
from typing import BinaryIO

from engine import files

try:
    import fcntl
except ImportError:  # no such locks on this system: that a run creates its folder is the only guard
    fcntl = None

NAME = ".lock"  # of the lock in a run's folder


def lock(path: Path) -> BinaryIO:
    """Create the file `path` if it is absent and lock it until the returned file is closed or this process ends.

    Raises `BlockingIOError` if another living process holds the lock, any other `OSError` if it cannot be opened.
    """
    file = files.open_regular(path, "ab")
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            file.close()
            raise
    return file


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock on `path`; false where there is no such file or it cannot be told."""
    if not fcntl:
        return False
    try:
        with files.open_regular(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: several may look at a time
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
