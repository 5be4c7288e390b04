"""Files of a folder that may come from a stranger: written under names nobody can prepare, opened only if they are
regular files, so that no link and no named pipe leads out of the folder or makes a run wait.
"""

import math
import os
import re
import secrets
import shutil
import stat
from pathlib import Path

# What `written` leaves behind when its process is killed, and the fixed names that older versions used for the same.
TEMPORARY = re.compile(r"\..+-[0-9a-f]{16}\.tmp|(config\.json|summary\.json|\w+\.ckpt)\.tmp|\.noise-\d+\.tmp")


def write_temporary(path: Path, write) -> Path:
    """What `write(file)` writes, whole and on the disk, beside `path` and ready to take its place.

    The name cannot be foreseen and the file is created here or not at all: a link prepared under it is never followed.
    Unlike `tempfile`'s, it has the permissions of any new file. Raises `OSError`.
    """
    path = Path(path)
    short = os.fsdecode(os.fsencode(path.name)[:200])  # file systems allow 255 bytes
    temporary = path.with_name(f".{short}-{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def replace(path: Path, content: bytes) -> None:
    """Give `path` this content in one move: readers see the old file or the new one. Raises `OSError`."""
    temporary = write_temporary(path, lambda f: f.write(content))
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_regular(path: Path, mode: str = "rb"):
    """`open(path, mode)` in a binary mode, for a regular file only.

    The check is made on what was opened, without following a link and without waiting for a named pipe's other end.
    Raises `OSError`, also for links and for whatever is not a regular file.
    """
    access = os.O_RDWR if "+" in mode else os.O_RDONLY if "r" in mode else os.O_WRONLY | os.O_CREAT
    access |= os.O_APPEND if "a" in mode else 0
    safe = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
    problem = why_not_regular(path)  # for the message; what counts is what was opened
    if problem:
        raise OSError(0, problem, str(path))
    descriptor = os.open(path, access | safe, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file", str(path))
    return open(descriptor, mode)


def why_not_regular(path: Path, folder: bool = False) -> str | None:
    """Why `path` is neither absent nor a regular file (with `folder`, a folder), links not followed; None if it is."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # absent, or opening it will raise the error
        return None
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if folder:
        return None if stat.S_ISDIR(mode) else "not a folder"
    return None if stat.S_ISREG(mode) else "not a regular file"


def truncate(path: Path, size: int) -> None:
    """Keep the first `size` bytes of a regular file. Other names of it, hard links, keep the whole. Raises `OSError`."""
    with open_regular(path, "r+b") as f:
        status = os.fstat(f.fileno())
        if status.st_size == size:
            return
        if status.st_nlink == 1:
            os.ftruncate(f.fileno(), size)
            return
        content = f.read(size)
    replace(path, content)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`. Only where nobody else writes there."""
    for path in Path(folder).iterdir():
        if TEMPORARY.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> float:
    """Room on the file system of `folder`; infinite where it cannot be told."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf
