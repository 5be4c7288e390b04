"""Reading JSON that may be anything: one reader, one policy on damage, for every file of the tool."""

import json
import stat
import sys
from pathlib import Path

from torch import Tensor

from data import InputError, one_line

LARGEST_FILE = 64 * 2**20  # bytes; a config.json of 200 classes has 2 MB
DEEPEST = 32  # levels of nesting, ours have 4
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = sys.float_info.max


class Unreadable(InputError):
    """The bytes are not what the file should hold at all: cut off, overwritten, another program's, not to be read.

    A plain `InputError` is a file that is whole and has a wrong field.
    """


def describe_value(value: object) -> str:
    """A wrong value for a message: a number or a text, shortened, and only the kind of anything longer."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if value is None:
        return "null"
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        return "a number of more than 64 bits"
    if isinstance(value, (bool, int, float, str)):
        spelled = repr(value if not isinstance(value, str) else value[:80])
        return spelled if not isinstance(value, str) or len(value) <= 80 else spelled + "..."
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else "another kind of value"


def wrong_value(where: object, field: str, value: object, what: str) -> InputError:
    return InputError(f"{where}: {one_line(field)} is {describe_value(value)}, not {what}")


def check_plain(content: dict, where: object) -> None:
    """Raise `InputError` where `content` nests too deep or holds a number that is not finite or beyond 64 bits."""
    left: list[tuple[object, str, int]] = [(content, "", 0)]
    while left:
        container, field, depth = left.pop()
        if depth > DEEPEST:
            raise InputError(f"{where}: {one_line(field[:80])}... nests deeper than {DEEPEST} levels")
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, (dict, list)):
                left.append((value, f"{field}.{key}" if field else str(key), depth + 1))
            elif isinstance(value, float) and not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
                raise wrong_value(where, f"{field}.{key}" if field else str(key), value, "a finite number")
            elif isinstance(value, int) and not -LARGEST_INT <= value <= LARGEST_INT:
                raise wrong_value(where, f"{field}.{key}" if field else str(key), value, "a number of at most 64 bits")


def parse_json(data: bytes, where: object) -> dict:
    """The JSON object in some bytes. Raises `Unreadable`, and `InputError` for an object that nobody could use."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = next(k for i, (k, _) in enumerate(pairs) if any(k == other for other, _ in pairs[:i]))
            raise InputError(f"{where}: {describe_value(twice)} is there twice")
        return content

    try:
        content = json.loads(data.decode(), object_pairs_hook=unique)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{where}: nests deeper than {DEEPEST} levels") from None
    except ValueError as e:
        raise Unreadable(f"{where}: not JSON ({one_line(e)})") from e
    if not isinstance(content, dict):
        raise Unreadable(f"{where}: not a JSON object")
    check_plain(content, where)
    return content


def read_json(path: Path) -> dict | None:
    """The JSON object in a file, None where there is no file. Raises as `parse` does."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for
            raise Unreadable(f"{path}: not a regular file")
        if about.st_size > LARGEST_FILE:
            raise InputError(f"{path}: larger than {LARGEST_FILE >> 20} MB")
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise Unreadable(f"{path}: cannot be read ({one_line(e)})") from e
    return parse_json(data, path)
