"""Runs forked from a process that has imported train.py, multiprocessing's fork server: a start costs no import.

A forked run is what `python SCRIPT ...` would be: `__main__`, with its own session, output, exit status and signals, and it
lives on if the sweep is killed. The server imports this module last, so that what stands at its top is known of what the
server has in memory: where files have changed since, or a thread of the server would be missing in a fork, the run starts
anew, under the same process id. The server has no tensors, for which a fork would not be safe, and does not look at a GPU,
which its runs could not use then.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
# What the server imports: train.py, and what it imports only where that is needed, and every run of a sweep needs.
PRELOAD = (
    "torchvision",
    "torch.utils.tensorboard",
    "tensorboard.plugins.hparams.metadata",
    "tensorboard.plugins.hparams.plugin_data_pb2",
    "train",
)
LOST = "the process that had started it was lost, and its exit status with it"
UNKNOWN = 255  # multiprocessing's exit code of a process whose server is lost


def possible() -> bool:
    """Whether runs may be forked here: on Linux. Frameworks of macOS do not survive it, Windows has none."""
    return sys.platform == "linux"


def stamp(path: str) -> tuple[int, int]:
    """Size and time of change of a file."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


# Of every file in the tool's folder that was imported, libraries left out.
STAMPS = {
    path: stamp(path)
    for path in {str(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    if path.startswith(f"{FOLDER}{os.sep}") and not path.startswith(sys.prefix + os.sep)
}
THREADS = threading.active_count()


def become(argv: list[str], log: str, environment: Mapping[str, str]) -> None:
    """In a forked process: run the script argv[0], its standard output and error appended to the file `log`."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if THREADS > 1 or any(stamp(path) != before for path, before in STAMPS.items()):
        os.execve(sys.executable, [sys.executable, *argv], environment)
    for name in of_server():
        os.environ.pop(name, None)
    os.environ.update(environment)
    gc.freeze()  # the collections of this process leave what was imported alone, and its memory shared
    sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing's processes leave out


def of_server() -> dict[str, str]:
    """Variables with which the server finds this tool's modules, and none of the same names in the working folder."""
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def start_server() -> None:
    """Have the server run, which imports while this process goes on. One is enough for any number of sweeps."""
    forkserver.set_forkserver_preload([*PRELOAD, __name__])
    given, handler = dict(os.environ), signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the sweep alone
    os.environ.update(of_server())
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)
        for name in of_server():
            os.environ.pop(name)
        os.environ.update(given)


@contextlib.contextmanager
def no_main() -> Iterator[None]:
    """Keep multiprocessing from running the main script of this process, a sweep, in the run as well."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class ForkedRun:
    """A run that the server forks: what the scheduler needs of a `subprocess.Popen`."""

    def __init__(self, argv: list[str], log: Path, environment: Mapping[str, str]) -> None:
        """Waits for a server that still imports. Raises `EOFError` or `OSError` where there is none."""
        start_server()
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=become, args=(argv, str(log), dict(environment)))
        with no_main():
            self.process.start()
        self.pid, self.lost = self.process.pid, ""

    def poll(self) -> int | None:
        """Its exit status, that of a signal negative, or None while it lives. 1 and a text in `lost` if that is not known."""
        code = self.process.exitcode
        if code != UNKNOWN:
            return code
        if lives(self.pid):
            return None
        self.lost = LOST
        return 1

    def terminate(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


def lives(pid: int) -> bool:
    """Whether there is such a process, which need not be a child of this one, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
