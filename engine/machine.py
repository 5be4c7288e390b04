"""What a process may use of its machine, and how its threads wait. Needs no torch: the latter is set before torch is loaded."""

import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

SPINS = 10_000  # of 300,000
UNMAPPED = re.compile("failed to map segment|cannot allocate memory", re.IGNORECASE)  # of a shared library


def wait_briefly() -> None:
    """Have OpenMP threads that wait for each other go to sleep soon; to be called before torch is loaded.

    Threads that spin take the cores from those they wait for, wherever other programs use them, too. libgomp reads the
    variable when it is loaded; what the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def explain_loading(program: str) -> None:
    """Have `program` say in one line, with status 2, where its libraries cannot be loaded for want of memory: login nodes limit it."""

    def explain(kind, e, trace) -> None:
        if not isinstance(e, MemoryError) and not (isinstance(e, (ImportError, OSError)) and UNMAPPED.search(str(e))):
            return sys.__excepthook__(kind, e, trace)
        limit = f"; ulimit -v allows {address_space() / 2**30:.1f} GiB" * (address_space() < math.inf)
        why = " ".join(str(e).split())[:200] or kind.__name__  # numpy's has paragraphs
        line = f"{program}: error: there is too little memory here to load torch ({why}){limit}"
        print(line, file=sys.stderr, flush=True)
        os._exit(2)

    sys.excepthook = explain


def cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use: those it is bound to, or its control group's CPU quota, rounded up, if that is less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min([bound, *quotas(root)]))


def memory(root: Path = Path("/")) -> float:
    """Bytes of memory that this process may use: the machine's, or its control group's or its own limit if that is less."""
    limits = [address_space()]
    with suppress(OSError, ValueError, AttributeError):
        limits.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    for group in groups("memory", root):
        limits += numbers(group / "memory.max") + numbers(group / "memory.limit_in_bytes")
    return min(limits)


def address_space() -> float:
    """Bytes that `ulimit -v` allows this process, libraries included."""
    with suppress(ImportError):  # of another system
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        return math.inf if limit == resource.RLIM_INFINITY else float(limit)
    return math.inf


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
