"""TensorBoard event files: their scalars, with every record's checksums verified.

A file is a sequence of records, each of length (8 bytes, little-endian), masked CRC32C of the length (4), data (an `Event`
protobuf), masked CRC32C of the data (4): TensorFlow's TFRecord format. tensorboard's own CRC32C is a Python loop over
bytes, which takes longer than all other reading; here the records of a file are summed together, with NumPy.
"""

import struct
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import one_line, printable

POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected
HEADER, FOOTER = 12, 4  # bytes of a record before and after its data
BLOCK = 64  # most bytes that are summed by one row of table lookups, a power of two
ROWS = 1 << 15  # blocks at a time: 2 MiB


class Damaged(ValueError):
    """A record that cannot be read; the message says why, `at` is the byte in the file at which it begins."""

    def __init__(self, why: str, at: int) -> None:
        super().__init__(why)
        self.at = at


# ----------------------------------------------------------------------------------------------------------- CRC32C


@cache
def byte_tables() -> np.ndarray:
    """(BLOCK, 256) uint32: what byte value v contributes to the register when it is followed by i more bytes of a block."""
    tables = np.empty((BLOCK, 256), np.uint32)
    one = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        one = (one >> 1) ^ np.where(one & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    tables[0] = one
    for i in range(1, BLOCK):
        tables[i] = (tables[i - 1] >> 8) ^ one[tables[i - 1] & 255]
    return tables


def apply_linear_map(tables: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """A linear map of 32 bits, given as (4, 256) uint32 of what each byte's value contributes, on (n,) uint32."""
    out = tables[0][registers & 255]
    for i in (1, 2, 3):
        out ^= tables[i][(registers >> (8 * i)) & 255]
    return out


@cache
def zeros_tables(power: int) -> np.ndarray:
    """(4, 256) uint32: the linear map of a register that 2^power bytes of zeros are."""
    if power == 0:
        byte = np.arange(256, dtype=np.uint32)
        return np.stack([byte_tables()[0], byte, byte << 8, byte << 16])
    half = zeros_tables(power - 1)
    return np.stack([apply_linear_map(half, row) for row in half])


def add_zeros(registers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Registers (n,) uint32 after `counts` (n,) bytes of zeros each."""
    out = registers.copy()
    for power in range(int(counts.max(initial=0)).bit_length()):
        those = np.flatnonzero(counts >> power & 1)
        out[those] = apply_linear_map(zeros_tables(power), out[those])
    return out


def crc32c(blob: bytes, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """CRC32C of many parts of `blob`, blob[begins[i]:ends[i]].

    The register is linear over GF(2) in the message and in its initial value: each part is cut into blocks, each block
    summed from a register of 0, moved on by what follows it, and all of them added (xor) with the initial value, moved on.

    Args:
        begins, ends: (n,) int64, bytes.
    Returns: (n,) uint32.
    """
    lengths = ends - begins
    width = min(1 << (int(lengths.max(initial=1)) - 1).bit_length(), BLOCK)
    blocks = np.maximum(-(-lengths // width), 1)  # the first one is filled up with zeros in front, which change nothing
    part = np.repeat(np.arange(len(begins)), blocks)
    first = np.cumsum(blocks) - blocks
    behind = (blocks[part] - 1 - (np.arange(len(part)) - first[part])) * width  # bytes of the part after each block
    padded = np.frombuffer(bytes(width) + blob, np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)  # windows[i]: the bytes before byte i of `blob`
    sums, tables = np.zeros(len(part), np.uint32), byte_tables()
    for row in range(0, len(part), ROWS):
        here = slice(row, row + ROWS)
        rows = windows[ends[part[here]] - behind[here]]
        missing = np.maximum(behind[here] + width - lengths[part[here]], 0)
        rows[np.arange(width) < missing[:, None]] = 0
        columns = np.ascontiguousarray(rows.T)
        for p in range(width):
            sums[here] ^= tables[width - 1 - p][columns[p]]
    sums = add_zeros(sums, behind)
    different, which = np.unique(lengths, return_inverse=True)
    initial = add_zeros(np.full(len(different), 0xFFFFFFFF, np.uint32), different)[which]
    return ~(np.bitwise_xor.reduceat(sums, first) ^ initial) if len(first) else np.zeros(0, np.uint32)


def masked(crcs: np.ndarray) -> np.ndarray:
    """The form in which a TFRecord holds a CRC32C: rotated by 15 bits, plus a constant. (n,) uint32 to (n,) uint32."""
    return ((crcs >> np.uint32(15)) | (crcs << np.uint32(17))) + np.uint32(0xA282EAD8)


# ---------------------------------------------------------------------------------------------------------- records


def records(blob: bytes) -> tuple[np.ndarray, np.ndarray, Damaged | None]:
    """Where the data of a file's intact records begins and ends, and the first damaged record if there is one.

    Nothing after a damaged record is read, for its length cannot be trusted. A last record that is not complete is no
    damage: the file may still be written, or its writer was killed.

    Returns: begins, ends (n,) int64, bytes in `blob`; `Damaged` or None.
    """
    begins, ends, at = [], [], 0
    while at + HEADER <= len(blob):
        (size,) = struct.unpack_from("<Q", blob, at)
        begins.append(at + HEADER)
        ends.append(at + HEADER + size)
        at = ends[-1] + FOOTER
    complete = len(ends) - (at > len(blob))
    headers = np.array(begins, np.int64) - HEADER
    begins, ends = np.array(begins[:complete], np.int64), np.array(ends[:complete], np.int64)
    words = np.lib.stride_tricks.sliding_window_view(np.frombuffer(blob + bytes(4), np.uint8), 4)
    held = lambda where: words[where].view("<u4")[:, 0]  # noqa: E731
    wrong_length = masked(crc32c(blob, headers, headers + 8)) != held(headers + 8)  # also of the incomplete one
    good = int(np.argmax(wrong_length)) if wrong_length.any() else len(headers)
    good = min(good, complete)
    begins, ends = begins[:good], ends[:good]
    wrong = masked(crc32c(blob, begins, ends)) != held(ends)
    if wrong.any():
        good = int(np.argmax(wrong))
        return begins[:good], ends[:good], Damaged("checksum of its data", int(headers[good]))
    damaged = Damaged("checksum of its length", int(headers[good])) if wrong_length[good:].any() else None
    return begins, ends, damaged


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

    begins, ends, damaged = records(blob)
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        try:
            event = Event.FromString(blob[begin:end])
            points = []
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    points.append((value.tag, event.step, value.simple_value))
                elif value.metadata.plugin_data.plugin_name == "scalars" and value.HasField("tensor"):
                    points.append((value.tag, event.step, scalar_value(value.tensor)))
            if any(not tag or step < 0 for tag, step, _ in points):
                raise ValueError("a scalar without a name, or at a step below 0")
        except DecodeError:
            raise Damaged("it is no TensorBoard event", begin - HEADER) from None
        except ValueError as e:  # also text that is not UTF-8, in protobuf's Python implementation
            raise Damaged(
                "a tag that is no text" if isinstance(e, UnicodeError) else one_line(e), begin - HEADER
            ) from None
        yield from points
    if damaged:
        raise damaged


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
