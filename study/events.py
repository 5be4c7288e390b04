"""TensorBoard event files: their scalars, with every record's checksums verified.

A file is a sequence of records, each of length (8 bytes, little-endian), masked CRC32C of the length (4), data (an `Event`
protobuf), masked CRC32C of the data (4): TensorFlow's TFRecord format. tensorboard's own CRC32C is a Python loop over
bytes, which takes longer than all other reading.
"""

import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import google_crc32c
from tqdm import tqdm

from data import one_line, printable

HEADER, FOOTER = 12, 4  # bytes of a record before and after its data


class Damaged(ValueError):
    """A record that cannot be read; the message says why, `at` is the byte in the file at which it begins."""

    def __init__(self, why: str, at: int) -> None:
        super().__init__(why)
        self.at = at


def masked_crc(data: bytes) -> int:
    """The CRC32C of `data` as a TFRecord holds it: rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(blob: bytes) -> Iterator[tuple[int, bytes]]:
    """(byte at which it begins, data) of each intact record in the content of a file.

    Raises `Damaged` at the first damaged record; nothing after it is read, for its length cannot be trusted. A last record
    that is not complete is no damage: the file may still be written, or its writer was killed.
    """
    at = 0
    while at + HEADER <= len(blob):
        size, checksum = struct.unpack_from("<QI", blob, at)
        if masked_crc(blob[at : at + 8]) != checksum:
            raise Damaged("checksum of its length", at)
        end = at + HEADER + size
        if end + FOOTER > len(blob):
            return
        data = blob[at + HEADER : end]
        if masked_crc(data) != struct.unpack_from("<I", blob, end)[0]:
            raise Damaged("checksum of its data", at)
        yield at, data
        at = end + FOOTER


def scalar_value(tensor) -> float:
    """The one number that a `TensorProto` holds. Raises `ValueError` for anything else."""
    from tensorboard.compat.proto import types_pb2
    from tensorboard.util import tensor_util

    if tensor.dtype not in (
        types_pb2.DT_FLOAT,
        types_pb2.DT_DOUBLE,
        types_pb2.DT_HALF,
        types_pb2.DT_INT32,
        types_pb2.DT_INT64,
    ):
        raise ValueError("a scalar that is not a number")
    if any(dim.size != 1 for dim in tensor.tensor_shape.dim):  # before it is made: a shape may promise terabytes
        raise ValueError("a scalar of more or less than one value")
    try:
        return float(tensor_util.make_ndarray(tensor).item())
    except (ValueError, TypeError) as e:
        raise ValueError("a scalar that cannot be decoded") from e


def values(blob: bytes) -> Iterable[tuple[str, int, float]]:
    """(tag, step, value) of every scalar in the content of an event file. Raises `Damaged` at the first damaged record."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    for at, data in records(blob):
        try:
            event = Event.FromString(data)
            points = []
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    points.append((value.tag, event.step, value.simple_value))
                elif value.metadata.plugin_data.plugin_name == "scalars" and value.HasField("tensor"):
                    points.append((value.tag, event.step, scalar_value(value.tensor)))
            if any(not tag or step < 0 for tag, step, _ in points):
                raise ValueError("a scalar without a name, or at a step below 0")
        except DecodeError:
            raise Damaged("it is no TensorBoard event", at) from None
        except ValueError as e:  # also text that is not UTF-8, in protobuf's Python implementation
            raise Damaged("a tag that is no text" if isinstance(e, UnicodeError) else one_line(e), at) from None
        yield from points


def scalars(path: Path) -> Iterable[tuple[str, int, float]]:
    """(tag, step, value) of every scalar in one event file, until its end, or its first incomplete or damaged record.

    A damaged record gives one warning on standard error, with the file and the byte; an incomplete last one gives none.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            raise OSError(None, "not a regular file")
        blob = path.read_bytes()
    except OSError as e:
        warn(path, f"cannot be read ({one_line(e)})")
        return
    try:
        yield from values(blob)
    except Damaged as e:
        warn(path, f"the record at byte {e.at} of {len(blob)} is damaged ({e}); only what stands before it is read")


def warn(path: Path, what: str) -> None:
    tqdm.write(printable(f"warning: {path}: {what}"), file=sys.stderr)
