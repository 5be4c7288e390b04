"""A process that has imported all that a script needs, and forks itself for each run of it: a start costs no import.

A forked run is what `python SCRIPT ...` would be: `__main__`, with its own session, output, exit status and signals. What
crashes in it ends it alone. A run has the code that is there at its start: the server refuses if files have changed since it
imported them. The server has neither threads nor tensors, for which a fork would not be safe, and does not look
at a GPU, which its runs could not use then. (The fork server of multiprocessing calls functions of the program that
uses it, here the sweep, which it imports again in each process.)

Run as a script with the names of the script and of modules to import, and a socket as its standard input, this file is the
server; `ForkServer` is its other end.
"""

import sys

if __name__ == "__main__":  # as for the script itself, whose modules may be called as those here are
    sys.path[0] = sys.argv[1].rpartition("/")[0] or "."

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

ANSWER = 30.0  # seconds within which a server that is ready starts a run
MESSAGE = 1 << 20  # bytes, at most
LOST = "the process that had started it was lost, and its exit status with it"


def possible() -> bool:
    """Whether runs may be forked here: on Linux. Frameworks of macOS do not survive it, Windows has none."""
    return sys.platform == "linux"


class ForkedRun:
    """A run that a server has forked: what the scheduler needs of a `subprocess.Popen`."""

    def __init__(self, server: "ForkServer", pid: int) -> None:
        self.server, self.pid, self.lost = server, pid, ""

    def poll(self) -> int | None:
        """Its exit status, that of a signal negative, or None while it lives. 1 and a text in `lost` if that is not known."""
        self.server.read()
        if self.pid not in self.server.ended and not self.server.usable and not lives(self.pid):
            self.server.ended[self.pid], self.lost = 1, LOST
        return self.server.ended.get(self.pid)

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


class ForkServer:
    """Starts a server for `script`, and runs of it through the server once it is `ready`. To be closed."""

    def __init__(self, script: Path, modules: Iterable[str] = ()) -> None:
        """`modules` are imported beside those at the top of `script`: what it imports later, in functions."""
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [sys.executable, __file__, str(script), *modules]
        with theirs:
            self.process = subprocess.Popen(
                argv, stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
        self.poll = select.poll()
        self.poll.register(self.channel, select.POLLIN)
        self.ready, self.usable = False, True
        self.answers: list[int] = []  # to a request: the process id of a run, 0 for a refusal
        self.ended: dict[int, int] = {}  # exit status by process id

    def read(self, seconds: float = 0.0) -> None:
        """Take in what the server has to say; wait for it `seconds` at the most."""
        while self.usable and self.poll.poll(1000 * seconds):
            seconds = 0.0
            try:
                message = self.channel.recv(MESSAGE)
            except OSError:
                message = b""
            if not message:  # it has ended
                self.ready = self.usable = False
                return
            what, pid, code = json.loads(message)
            if what == "ready":
                self.ready = True
            elif what == "ended":
                self.ended[pid] = code
            else:
                self.answers.append(pid)
                self.ended.pop(pid, None)  # of an earlier process with this number

    def warming(self, seconds: float = 0.0) -> bool:
        """Whether the server still imports; waits `seconds` for the end of that at the most."""
        if not self.ready:
            self.read(seconds)
        return self.usable and not self.ready

    def start(self, argv: list[str], output: int, environment: Mapping[str, str] | None = None) -> ForkedRun | None:
        """Run the script with `argv` (its own name first), standard output and error going to the file descriptor `output`,
        and with these variables beside those of the server's environment.

        None if it is not: the server has ended, is not ready, refuses, or does not answer, which ends it.
        """
        if not self.ready:
            return None
        try:
            socket.send_fds(self.channel, [json.dumps([argv, environment or {}]).encode()], [output])
        except OSError:
            return None
        self.answers.clear()
        limit = time.monotonic() + ANSWER
        while self.usable and not self.answers:
            self.read(1.0)
            if time.monotonic() > limit:
                self.close()
        pid = self.answers.pop() if self.answers else 0
        return ForkedRun(self, pid) if pid else None

    def close(self) -> None:
        """End the server. Runs that it has started go on."""
        self.ready = self.usable = False
        self.process.kill()
        self.process.wait()
        self.channel.close()


# ----------------------------------------------------------------------------------------------------------- the server


def serve(script: str, modules: list[str]) -> list[str] | None:
    """Import, then fork for each request until the other end is closed. Returns None, and in a forked process its argv."""
    channel = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    runpy.run_path(script, run_name="imported")
    for module in modules:
        importlib.import_module(module)
    if threading.active_count() > 1:
        return None
    known = own_files(script)
    gc.collect()
    gc.freeze()  # the forked processes' collections leave it alone, and its memory shared
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    channel.send(message("ready"))
    while True:
        there, _, _ = select.select([channel, woken], [], [])
        if woken in there:
            woken.recv(4096)
            for pid, code in ended_children():
                channel.send(message("ended", pid, code))
        if channel in there:
            request, files, _, _ = socket.recv_fds(channel, MESSAGE, 1)
            if not request:
                return None
            if own_files(script) != known:
                channel.send(message("refused"))
            elif os.fork() == 0:
                become_a_run(channel, files[0])
                woken.close()
                wakes.close()
                argv, environment = json.loads(request)
                os.environ.update(environment)
                return argv
            os.close(files[0])


def own_files(script: str) -> dict[str, tuple[int, int]]:
    """Size and time of change of `script` and of each file beside or below it that was imported, libraries left out."""
    folder = os.path.dirname(script)
    paths = {script} | {str(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    own = {path for path in paths if path.startswith(f"{folder}{os.sep}") and not path.startswith(sys.prefix + os.sep)}
    return {path: stamp(path) for path in own}


def stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def message(what: str, pid: int = 0, code: int = 0) -> bytes:
    return json.dumps([what, pid, code]).encode()


def ended_children() -> Iterable[tuple[int, int]]:
    """Process id and exit status of each child that has ended since."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended[0], os.waitstatus_to_exitcode(ended[1])


def become_a_run(channel: socket.socket, output: int) -> None:
    """In a forked process: a session, signals and output of its own, and then word to the other end."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    channel.send(message("started", os.getpid()))
    channel.close()


if __name__ == "__main__":
    run = serve(sys.argv[1], sys.argv[2:])
    if run is not None:
        sys.argv = run
        runpy.run_path(run[0], run_name="__main__")
