"""What every command line here stands on: the parser's manners, types of values, one-line errors.

Importing this starts nothing. The options of a run are in `engine.options`.
"""

import argparse
import math
import os
import re
import sys

from data import QUOTED, InputError, cut, one_line, printable  # noqa: F401 - one_line is known by this name, too
from engine import launchers


class Help(argparse.HelpFormatter):
    """Adds each option's default to its help, where the help does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if not action.option_strings or action.required or action.default is argparse.SUPPRESS or "default:" in text:
            return action.help
        default = "off" if action.default is False else "none" if action.default is None else "%(default)s"
        return f"{text} (default: {default})".lstrip()


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line and an exception: no usage text, no exit. Its help shows the defaults."""

    def __init__(self, **settings) -> None:
        super().__init__(**{"formatter_class": Help} | settings)

    def parse_known_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else list(args)
        try:
            for word in given:
                if re.fullmatch(r"--[a-z-]+=--", word):  # argparse drops the value
                    self.error(f"{word[:-3]}: '--' is not a value")
            return super().parse_known_args(given, namespace)
        except InputError as e:
            raise InputError(shortened(str(e), given)) from None

    def error(self, message: str):
        raise InputError(message.removeprefix("argument "))


def counted(n: int, noun: str) -> str:
    """`n` and `noun`, in the plural unless there is one: "1 thread", "2 processes"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('s') else 's'}"


def every(n: int, noun: str) -> str:
    """How often something is done: "every step", "every 2 steps"."""
    return f"every {noun}" if n == 1 else f"every {n} {noun}s"


def shortened(message: str, given: list[str] = ()) -> str:
    """`message` with the middle left out of each of the `given` words, and of whatever else has no space in it, that is
    longer than QUOTED characters."""
    for word in given:
        value = word.partition("=")[2] if word.startswith("--") else word
        for text in (value, repr(value)[1:-1]):  # argparse quotes by repr
            if len(text) > QUOTED:
                message = message.replace(text, cut(text))
    return re.sub(rf"\S{{{QUOTED + 1},}}", lambda m: cut(m[0]), message)


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def number(low: float, high: float, what: str, kind=float, open_low: bool = False):
    """An argparse type: a finite number of `kind` in low..high (above `low` with `open_low`), or a clear message."""

    def convert(text: str):
        try:
            # Python takes 1_000, spaces and other digits too
            value = kind(text) if NUMBER.fullmatch(text) else math.nan
        except ValueError:
            value = math.nan
        if not (low < value <= high if open_low else low <= value <= high) or math.isinf(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not {what}")
        return value

    return convert


share = number(0, 1, "a number from 0 to 1")
count = number(1, 2**31, "a whole number from 1 to 2^31", int)
few = number(1, 1024, "a whole number from 1 to 1024", int)  # more would end in an allocator's or OpenMP's error
seed = number(0, 2**63 - 1, "a whole number from 0, below 2^63", int)
positive = number(0, math.inf, "a positive number", open_low=True)
not_negative = number(0, math.inf, "a number from 0")
part = number(0, math.nextafter(1, 0), "a number above 0 and below 1", open_low=True)
below_one = number(0, math.nextafter(1, 0), "a number from 0 to below 1")
path = os.path.expanduser  # the shell leaves the ~ of --data-dir=~/data alone


def devices(text: str):
    return text if text == "auto" else count(text)


def show_anything() -> None:
    """Have standard output spell out what its encoding lacks, a class called ü or a path of odd bytes, and not raise."""
    if hasattr(sys.stdout, "reconfigure"):  # a test's stand-in may have none
        sys.stdout.reconfigure(errors="backslashreplace")


def complain(message: object, program: str = "train.py") -> None:
    """One line on standard error, of a run from rank 0."""
    if program != "train.py" or launchers.rank_zero():
        print(f"{program}: error: {printable(shortened(str(message), sys.argv[1:]))}", file=sys.stderr, flush=True)
