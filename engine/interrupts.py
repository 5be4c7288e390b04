"""Signals: before training a run ends at once and leaves nothing behind; from then on they are noted, to save first.

Python runs a signal's handler between two steps of its interpreter, and so not while a rendezvous, a name lookup or
another call into C waits. Until training begins, a thread is therefore woken by each signal too, and ends the process
if the handler is not run in time.
"""

import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager, suppress

from engine import launchers

PROMPT = 0.3  # seconds within which the handler is run, unless a call into C waits
TIDY = 5.0  # seconds that the interrupted run may take to clean up
STOPPED_STATUS = 3

_cleanups: list = []  # what is to be undone if the process ends before training


class Interrupted(BaseException):
    """A signal came before training began; its name is the message. Not an `Exception`, so that nothing handles it."""


@contextmanager
def undo_if_interrupted(act):
    """Have `act()` called too if a signal ends the process within the context without unwinding it."""
    _cleanups.append(act)
    try:
        yield
    finally:
        with suppress(ValueError):
            _cleanups.remove(act)


def undo_at_end(act) -> None:
    """Have `act()` called if a signal ends the process before training begins."""
    _cleanups.append(act)


def undo() -> None:
    """Call what is left to be undone, the latest first; whatever one of them raises does not stop the others."""
    while _cleanups:
        with suppress(Exception):
            _cleanups.pop()()


def print_ended(name: str) -> None:
    """Print the last line of a run that was stopped before it began to train; on one process of several."""
    if launchers.rank_zero():
        print(f"train.py: stopped by {name} before training began; nothing was written", file=sys.stderr, flush=True)


class Signals:
    """SIGTERM, SIGINT and SIGUSR1. Until `hold` the first one raises `Interrupted` in the main thread, or ends the
    process with status 3 where that does not come to it. After `hold` they are noted, for the loop to stop after its
    step; `received` is the first one's name.

    After a SIGINT a second SIGINT or SIGTERM (as which launchers pass on a second Ctrl-C) ends the process at once.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(self) -> None:
        self.received: str | None = None
        self.starting = True
        self.lock = threading.Lock()  # held while the process is ended, or training begins
        self.handled, self.ended = threading.Event(), threading.Event()
        self.pipe = self.thread = self.wakeup = None

    def __call__(self, number: int, _frame) -> None:
        first, name = self.received is None, signal.Signals(number).name
        if self.starting:
            self.received = self.received or name
            self.handled.set()
            if first:
                raise Interrupted(name)
            return  # it is cleaning up; the thread sees to it that this ends
        if self.received == "SIGINT" and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = self.received or name

    @contextmanager
    def caught(self):
        """Catch them for as long as the context lasts (in the main thread; elsewhere nothing is changed)."""
        if threading.current_thread() is not threading.main_thread():
            self.starting = False
            yield
            return
        names = [name for name in self.NAMES if hasattr(signal, name)]
        before = {name: signal.signal(getattr(signal, name), self) for name in names}
        self.listen()
        try:
            yield
        except Interrupted:
            undo()
            raise
        finally:
            self.hold()
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def listen(self) -> None:
        """Start the thread that is woken by signals while the main thread may be in C."""
        self.pipe = socket.socketpair()
        self.pipe[1].setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.pipe[1].fileno(), warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.watch, daemon=True, name="signals-before-training")
        self.thread.start()

    def watch(self) -> None:
        """End the process once a signal has come and the main thread does not take it, or does not come to an end."""
        numbers = {int(getattr(signal, name)): name for name in self.NAMES if hasattr(signal, name)}
        byte = b"\0"
        while byte and byte[0] not in numbers:
            byte = self.pipe[0].recv(1)
        if not byte or (self.handled.wait(PROMPT) and self.ended.wait(TIDY)):
            return
        with self.lock:
            if self.starting and not self.ended.is_set():
                undo()
                print_ended(numbers[byte[0]])
                sys.stdout.flush()
                os._exit(STOPPED_STATUS)

    def hold(self) -> None:
        """Training begins, or the run has ended: from now on signals are noted."""
        with self.lock:
            self.starting = False
        self.ended.set()
        if self.pipe is None:
            return
        _cleanups.clear()
        signal.set_wakeup_fd(self.wakeup)
        self.pipe[1].close()  # the thread reads the end of it
        self.thread.join()
        self.pipe[0].close()
        self.pipe = None
