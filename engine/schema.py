"""What config.json, summary.json, a checkpoint and an exported run may hold: names, types, ranges, checked once, at the door.

Everything that reads a run goes through here: `--resume`, sweeps and reports. Behind it fields are used without further
checks. Unknown fields and options are let through, for a newer version may have written them. The types and ranges of
options are those of train.py's parser.

A message names the file and the field: `runs/a/config.json: options.bs is a list, not a whole number from 1 to 2^31`.
"""

import argparse
import fnmatch
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from data import InputError, one_line
from engine import cmdline, options
from engine.jsonfiles import (
    LARGEST_FLOAT,
    LARGEST_INT,
    Unreadable,
    check_plain,
    parse_json,
    read_json,
    wrong_value,
)
from metrics import MOMENTS
from series import VAL_ACC

STATUSES = ("running", "finished", "stopped", "failed")
EVENTS = "events.out.tfevents.*"


# -------------------------------------------------------------------------------------------------------------- kinds


@dataclass(frozen=True)
class Kind:
    """What a field may be. `what` completes "FIELD is VALUE, not ..."; `part` is what each part of a container may be."""

    what: str
    holds: Callable[[object], bool]
    part: "Kind | None" = None


def whole(low: int = 0, high: int = LARGEST_INT) -> Kind:
    limit = "" if high == LARGEST_INT else f" to {high}"
    return Kind(f"a whole number from {low}{limit}", lambda v: type(v) is int and low <= v <= high)


def real(low: float = -LARGEST_FLOAT, high: float = LARGEST_FLOAT, what: str = "a finite number") -> Kind:
    return Kind(what, lambda v: type(v) in (int, float) and low <= v <= high)  # false for NaN


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.what} or null", lambda v: v is None or kind.holds(v))


def list_of(kind: Kind, what: str, most: int | None = None) -> Kind:
    def holds(v: object) -> bool:
        return isinstance(v, list) and (most is None or len(v) <= most) and all(map(kind.holds, v))

    return Kind(what, holds, kind)


def mapping_of(kind: Kind, what: str, names: Callable[[str], bool] = lambda _: True) -> Kind:
    def holds(v: object) -> bool:
        return isinstance(v, dict) and all(isinstance(k, str) and names(k) and kind.holds(x) for k, x in v.items())

    return Kind(what, holds, kind)


def is_event_file(name: str) -> bool:
    """Whether this is the name of an event file within the run's folder, and no path to elsewhere."""
    return fnmatch.fnmatchcase(name, EVENTS) and not set(name) & set("/\\\0")


def is_folder_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\0")


def is_moments(row: object) -> bool:
    """Whether this is one full measurement's row of the window; its numbers may be undefined."""
    return isinstance(row, list) and len(row) == len(MOMENTS) and all(isinstance(x, float) for x in row)


TEXT = Kind("text", lambda v: isinstance(v, str) and "\0" not in v)
SHARE = real(0, 1, "a number from 0 to 1")
BELOW_ONE = real(0, math.nextafter(1, 0), "a number from 0 to below 1")
NOT_NEGATIVE = real(0, what="a number from 0")
SECONDS = Kind("a number of seconds", lambda v: type(v) in (int, float) and (v == 0 or 1e-6 <= v <= 1e12))
SECONDS_BY_NAME = mapping_of(SECONDS, "an object of numbers of seconds")
PLAIN = Kind("a number, text, true, false or null", lambda v: v is None or isinstance(v, (bool, int, float, str)))
TEXTS = list_of(TEXT, "a list of texts")
SCALARS = mapping_of(PLAIN, "an object of plain values")
PLAIN_OR_TEXTS = Kind(f"{PLAIN.what}, or a list of texts", lambda v: PLAIN.holds(v) or TEXTS.holds(v))
TENSOR = Kind("a tensor", lambda v: isinstance(v, Tensor))
MEASUREMENT = Kind(f"a list of {len(MOMENTS)} numbers", is_moments)
OBJECT = Kind("an object", lambda v: isinstance(v, dict))

RESOLVED_FIELDS = {
    "device": TEXT,
    "cpu_features": TEXTS,
    "world_size": whole(1),
    "sched_steps": whole(1),
    "steps_per_epoch": whole(1),
    **dict.fromkeys(("total_steps", "whole_steps"), whole(1)),
    "parameters": whole(1),
    "classes": list_of(TEXT, "a list of names"),
    "train_examples": whole(1),
    "val_examples": whole(),
    "test_examples": whole(),
    "loss_matrix_sha256": TEXT,
    "data_digest": TEXT,
    "schedule": {
        **dict.fromkeys(("run_steps", "sched_steps", "warmup_steps", "delay_steps"), whole(1)),
        **dict.fromkeys(("run_epochs", "sched_epochs"), NOT_NEGATIVE),
        **dict.fromkeys(("fraction_seen", "share_at_end"), SHARE),
    },
}
NOISE_FIELDS = {"type": TEXT, "nominal": SHARE, "realised": SHARE, "labels_sha256": TEXT}
VERSION_FIELDS = mapping_of(optional(TEXT), "an object of version numbers as text")
CONFIG_FIELDS = {
    "resolved": RESOLVED_FIELDS,
    "noise": NOISE_FIELDS,
    "versions": VERSION_FIELDS,
    "segments": list_of(mapping_of(PLAIN_OR_TEXTS, "an object of plain values"), "a list of objects of plain values"),
}
SUMMARY_FIELDS = {
    "status": Kind(f"one of {', '.join(STATUSES)}", lambda v: isinstance(v, str) and v in STATUSES),
    "reason": optional(TEXT),
    **dict.fromkeys(("val_acc", "best_val_acc", "test_acc", "train_acc_noisy"), optional(SHARE)),
    **dict.fromkeys(("steps", "examples", "not_resolved", "half_memorized_step"), optional(whole())),
    **dict.fromkeys(("seconds", "images_per_second", "peak_memory_mb"), optional(NOT_NEGATIVE)),
    **dict.fromkeys(("measure_share", "measure_share_counted"), optional(NOT_NEGATIVE)),
    "measure_seconds": SECONDS_BY_NAME,
    "fast_gradient": SCALARS,
}
STATE_FIELDS = {  # of a checkpoint; all are required
    "step": whole(),
    "best_val_acc": SHARE,
    "seconds": SECONDS,
    "steps_seconds": SECONDS,
    "steps_images": whole(),
    "window": list_of(MEASUREMENT, "a list of measurements"),
    "not_resolved": whole(),
    "half_memorized_step": optional(whole()),
    "measure_seconds": SECONDS_BY_NAME,
    "latest": mapping_of(real(), "an object of finite numbers"),
    "recent_noisy": list_of(SHARE, "a list of at most ten numbers from 0 to 1", 10),
    "events": mapping_of(whole(), "an object of event files' names in the folder and their sizes", is_event_file),
    "model": mapping_of(TENSOR, "an object of tensors"),
    "optimizer": OBJECT,
    "config": OBJECT,
}


# ------------------------------------------------------------------------------------------------------------- checks


def misfit(field: str, value: object, kind: Kind) -> tuple[str, object, str]:
    """(field, value, what it is not) of a value that is not of its kind; of a container, those of its first wrong part."""
    if kind.part and isinstance(value, (list, dict)):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            if not kind.part.holds(part):
                return misfit(f"{field}.{name}", part, kind.part)
    return field, value, kind.what


def check_fields(content: dict, table: dict, where: object, prefix: str = "", required=()) -> None:
    """Raise `InputError` at the first field of `content` that is not of its kind in `table` (a kind, or a table)."""
    for name in required:
        if name not in content:
            raise InputError(f"{where}: {prefix}{name} is missing")
    for name, kind in table.items():
        if name not in content:
            continue
        value = content[name]
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                raise wrong_value(where, prefix + name, value, "an object")
            check_fields(value, kind, where, f"{prefix}{name}.")
        elif not kind.holds(value):
            raise wrong_value(where, *misfit(prefix + name, value, kind))


@functools.cache
def option_actions() -> dict[str, argparse.Action]:
    """train.py's options by the name that config.json has for them."""
    return {a.dest: a for a in options.parser()._actions if a.dest != "help"}


def option_problem(action: argparse.Action, value: object) -> str | None:
    """What a value of an option should have been, None if it is right.

    Values are as resolved: None where the default is None, and Fabric's own options may have the text of a command line.
    """
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        return None if isinstance(value, bool) else "true or false"
    known = action.choices or options.KNOWN.get(action.dest)
    if known:
        return None if isinstance(value, str) and value in known else f"one of {', '.join(known)}"
    if action.dest in options.FABRIC and isinstance(value, str):  # devices, num_nodes
        return None if re.fullmatch(r"auto|[0-9]{1,4}(,[0-9]{1,4})*,?", value) else "a number or a list of devices"
    if action.type in (None, cmdline.path):
        return None if TEXT.holds(value) else "text"
    try:
        read = action.type(value if isinstance(value, str) else repr(value) if type(value) in (int, float) else "")
    except argparse.ArgumentTypeError as e:
        return str(e).rpartition(" is not ")[2]
    return None if isinstance(read, str) == isinstance(value, str) else "a number"


def check_options(given: object, where: object) -> None:
    """Raise `InputError` at the first option whose value train.py's parser could not have made."""
    if not isinstance(given, dict):
        raise wrong_value(where, "options", given, "an object")
    for name, action in option_actions().items():
        should = option_problem(action, given[name]) if name in given else None
        if should:
            raise wrong_value(where, f"options.{name}", given[name], should)


def check_config(config: dict, where: object, resume: bool = False) -> dict:
    """`config` if it is config.json's content, of which `resume` needs more. Raises `InputError`."""
    check_plain(config, where)
    if "options" not in config:
        raise Unreadable(f"{where}: options is missing")
    check_options(config["options"], where)
    check_fields(config, CONFIG_FIELDS, where, required=("noise",) if resume else ())
    if resume:
        check_fields(config["noise"], {}, where, "noise.", ("labels_sha256",))
    return config


# --------------------------------------------------------------------------------------------------------- JSON files


def read_config(path: Path, resume: bool = False) -> dict | None:
    """A config.json, checked; None where there is none. Raises `Unreadable` or `InputError`."""
    config = read_json(path)
    return None if config is None else check_config(config, path, resume)


def read_summary(path: Path) -> dict | None:
    """A summary.json, checked; None where there is none. Raises `Unreadable` or `InputError`."""
    summary = read_json(path)
    if summary is not None:
        check_fields(summary, SUMMARY_FIELDS, path)
    return summary


# -------------------------------------------------------------------------------------------------------- checkpoints


def check_state(state: object, where: object) -> dict:
    """A checkpoint's content, its `config` as plain JSON. Raises `InputError`.

    Everything but whether it is of the run that goes on (`check_fits`).
    """
    if not isinstance(state, dict):
        raise wrong_value(where, "the content", state, "a checkpoint of this tool")
    check_fields(state, STATE_FIELDS, where, required=STATE_FIELDS)
    if not SHARE.holds(state["latest"].get(VAL_ACC)):  # it is measured before the first checkpoint
        raise wrong_value(where, f"latest.{VAL_ACC}", state["latest"].get(VAL_ACC), SHARE.what)
    try:
        config = parse_json(json.dumps(state["config"]).encode(), f"{where}: config")
    except (TypeError, ValueError, RecursionError) as e:
        raise e if isinstance(e, InputError) else InputError(f"{where}: config is not plain values") from e
    check_config(config, f"{where}: config", resume=True)
    return state | {"config": config}


# ------------------------------------------------------------------------------------------------------ exported runs


def check_steps(name: str, apart: np.ndarray, where: object) -> np.ndarray:
    """A grid of an exported file as steps (n,) int64, ascending from 0, of their differences. Raises `InputError`."""
    if apart.ndim != 1 or apart.dtype.kind not in "iu" or apart.dtype.itemsize > 4:
        raise InputError(f"{where}: {one_line(name)} is no row of whole numbers of 32 bits")
    if len(apart) and (apart[0] < 0 or (len(apart) > 1 and apart[1:].min() < 1)):
        raise InputError(f"{where}: {one_line(name)}: steps do not ascend from 0")
    return np.cumsum(apart.astype(np.int64))


def check_exported(about: object, grids: dict[str, np.ndarray], n_values: int, where: object) -> dict:
    """One run of an exported file: config's and summary's fields, and series [tag, grid, first, n] within `grids` and
    the file's `n_values` values. Raises `InputError`."""
    if not isinstance(about, dict):
        raise wrong_value(where, "a run", about, "an object")
    check_fields(about, {"name": Kind("the name of a folder", is_folder_name)}, where, required=("name",))
    where = f"{where}: {one_line(about['name'])}"
    tables = {"options": OBJECT, "resolved": RESOLVED_FIELDS, "summary": SUMMARY_FIELDS, "versions": VERSION_FIELDS}
    check_plain(about, where)
    check_fields(about, tables, where, required=(*tables, "series"))
    check_options(about["options"], where)
    tags = set()
    for entry in about["series"] if isinstance(about["series"], list) else [about["series"]]:
        if not isinstance(entry, list) or len(entry) != 4 or not isinstance(entry[0], str) or entry[0] in tags:
            raise wrong_value(where, "series", entry, "a list of [tag, grid, first, n], each tag once")
        tag, grid, first, n = entry
        tags.add(tag)
        if not all(map(whole().holds, (grid, first, n))) or f"steps_{grid}" not in grids:
            raise wrong_value(where, f"series.{tag}", grid, "a grid, an offset and a length of this file")
        if n != len(grids[f"steps_{grid}"]) or first + n > n_values:
            raise InputError(f"{where}: series.{one_line(tag)} reaches beyond its steps or values")
    return about
