"""Whether other programs hold the cores that a run's threads wait for: at the start by the load average, later by the
speed of the steps. One line a process at most, and nothing waits for the device.

Threads of one operation wait for each other, spinning: where one of them has no core, all do. On two cores that others
used as well two threads made 9 images/s where one made 128.
"""

import math
import os
import time

from engine import hardware

WINDOW = 2.0  # seconds of steps that make one rate
SLOW = 0.5  # of the first rate: two windows in a row below this are worth a line
SPARE = 0.5  # of a core: less than that is no other program


def crowded(threads: int) -> str | None:
    """A warning if `threads` (of all the run's processes here) and what runs already are more than the machine's cores.

    None where that cannot be told: no load average on this system, or a process that may use only some of the cores.
    """
    cores = hardware.cores()
    if threads < 2 or not hasattr(os, "getloadavg") or cores != os.cpu_count():
        return None
    load = os.getloadavg()[0]
    if load <= cores - threads + SPARE:
        return None
    load = min(load, *(running() for _ in range(3)))  # an average still holds what has ended a minute ago
    if load <= cores - threads + SPARE:
        return None
    fewer = max(1, int(cores - load))
    return (
        f"warning: other programs use {load:.1f} of the {cores} cores (load average) and this run {threads} threads, which "
        f"then wait for each other: --threads {fewer} may be several times faster"
    )


def running() -> float:
    """Threads of other programs that run or could run at this moment, where the system tells (Linux); else infinity."""
    time.sleep(0.01)
    try:
        with open("/proc/loadavg") as f:
            return int(f.read().split()[3].split("/")[0]) - 1.0  # this one runs, too
    except (OSError, ValueError, IndexError):
        return math.inf


class Pace:
    """Compares the rate of the latest steps with that of the first ones."""

    def __init__(self, threads: int, watch: bool) -> None:
        """`threads` of this process; without `watch` (on a GPU, say), or with one thread, it never says anything."""
        self.threads, self.watch = threads, watch and threads > 1
        self.first: float | None = None  # images/s
        self.slow = 0  # windows in a row
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self.began, self.spent, self.images = time.perf_counter(), 0.0, 0

    def pause(self) -> None:
        """Other work than steps comes now, until `go_on`."""
        self.spent += time.perf_counter() - self.began

    def go_on(self) -> None:
        self.began = time.perf_counter()

    def step(self, images: int) -> None:
        """Count a step's images."""
        self.images += images

    def check(self) -> str | None:
        """To be called where the device has just been waited for: a warning, once, if the steps have become slow."""
        spent = self.spent + time.perf_counter() - self.began
        if not self.watch or spent < WINDOW or not self.images:
            return None
        rate = self.images / spent
        self.restart()
        self.first = self.first or rate
        self.slow = self.slow + 1 if rate < SLOW * self.first else 0
        if self.slow < 2:
            return None
        self.watch = False
        return (
            f"warning: the last steps ran at {rate:.0f} images/s, the first ones at {self.first:.0f}: if other programs use the "
            f"cores, threads wait for each other; stop the run and --resume it with fewer than --threads {self.threads}"
        )
