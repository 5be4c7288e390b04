"""Event files as TensorBoard reads them, written in the calling thread and under names that sort in the order of writing.

tensorboard's own `EventFileWriter` writes in a thread of its own: it may tell of a full disk only after a flush has returned,
and what is logged until then waits for ever for a thread that has ended. Its names sort as text by second, machine and process:
TensorBoard's Python reader, which follows the last file by name alone, never shows one that sorts before it.
"""

import io
import os
import re
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter


def new_name(earlier: Iterable[str]) -> str:
    """Name of an event file that sorts behind the `earlier` ones, whatever this machine's clock says."""
    stamps = [int(match[1]) for name in earlier if (match := re.match(r"events\.out\.tfevents\.(\d{10})\.", name))]
    stamp = max([int(time.time()), *(s + 1 for s in stamps)])
    return f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.{len(stamps)}"


class EventFile:
    """A new event file: what torch's `FileWriter` uses of tensorboard's `EventFileWriter`. Raises `OSError` as files do."""

    def __init__(self, path: Path) -> None:
        self.folder = str(path.parent)
        self.file = open(path, "xb")  # noqa: SIM115 # closed by `close`
        self.records = RecordWriter(self.file)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def add_event(self, event: Event) -> None:
        self.records.write(event.SerializeToString())

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def get_logdir(self) -> str:
        return self.folder


class Writer(SummaryWriter):
    """torch's `SummaryWriter` on one `EventFile`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(str(path.parent))

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            self.file_writer = FileWriter.__new__(FileWriter)
            self.file_writer.event_writer = EventFile(self.path)
        return self.file_writer

    def flush(self) -> None:
        self.file_writer.flush()

    def close(self) -> None:
        """Also where the file system refuses the rest, which is raised then."""
        self.file_writer.close()


def content(summaries: list) -> bytes:
    """An event file of these summaries."""
    buffer = io.BytesIO()
    for event in (Event(file_version="brain.Event:2"), *(Event(summary=summary) for summary in summaries)):
        event.wall_time = time.time()
        RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
