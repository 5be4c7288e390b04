"""What a process may use of its machine, and how its threads wait. Needs no torch: the latter is set before torch is loaded."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

SPINS = 10_000  # of 300,000


def wait_briefly() -> None:
    """Have OpenMP threads that wait for each other go to sleep soon; to be called before torch is loaded.

    Threads that spin take the cores from those they wait for, wherever other programs use them, too. libgomp reads the
    variable when it is loaded; what the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use: those it is bound to, or its control group's CPU quota, rounded up, if that is less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min([bound, *quotas(root)]))


def memory(root: Path = Path("/")) -> float:
    """Bytes of memory that this process may use: the machine's, or its control group's if that is less."""
    limits = [math.inf]
    with suppress(OSError, ValueError, AttributeError):
        limits.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    for group in groups("memory", root):
        limits += numbers(group / "memory.max") + numbers(group / "memory.limit_in_bytes")
    return min(limits)


def quotas(root: Path) -> Iterator[float]:
    """CPU cores' worth of time that each of the process's control groups allows."""
    for group in groups("cpu", root):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            values = [n for name in names for n in numbers(group / name)]
            if len(values) == 2:
                yield values[0] / values[1]


def groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control group that this process is in and of those around it, in cgroup v2 and v1.

    In a container the group's path may be that outside, of which only the top, the container's own group, is there.
    """
    lines = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for mount in (controllers, controller) if controllers else ("", "unified"):
            for group in (inner, *inner.parents):
                yield root / "sys/fs/cgroup" / mount / group


def numbers(path: Path) -> list[float]:
    """The numbers in a file of a control group, "max" and -1 as infinity; none where it cannot be read."""
    try:
        return [math.inf if word in ("max", "-1") else float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
