"""The series of many runs in one compressed file: `report.py --export`, read wherever a folder of runs is read."""

import io
import json
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data import InputError, one_line
from engine import jsonfiles, options, schema
from series import SERIES
from study.outputs import whole_file
from study.runfolders import Run, Series

EXPORT_FORMAT = "label-noise runs 1"
PRIVATE = ("data_dir", "runs")  # options that say where things lay on somebody's machine, and nothing of the run
KEPT_BITS = 12  # of float32's 23-bit mantissa, for values of single batches: 1.2e-4 relative


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 values with `KEPT_BITS` bits of mantissa, rounded to nearest: what is left compresses to half the size."""
    bits = values.astype("<f4").view("<u4")
    drop = 23 - KEPT_BITS
    return ((bits + np.uint32(1 << (drop - 1))) & ~np.uint32((1 << drop) - 1)).view("<f4")


def without_folders(content: dict) -> dict:
    """The content of a search's file without the `PRIVATE` options, which its command line names as well."""
    flags = tuple("--" + name.replace("_", "-") for name in PRIVATE)
    kept: list[str] = []
    try:
        words = iter(shlex.split(str(content.get("command", ""))))
    except ValueError:  # an open quotation mark: not what a sweep writes
        words = iter(())
    for word in words:
        if word in flags:
            next(words, None)  # its value
        elif not word.startswith(tuple(f"{flag}=" for flag in flags)):
            kept.append(word)
    settings = {k: v for k, v in content["options"].items() if k not in PRIVATE}
    return content | {"command": shlex.join(kept), "options": settings}


def export_runs(runs: list[Run], path: Path, searches: Iterable[tuple[str, dict]] = ()) -> None:
    """Write the series of many runs into one compressed .npz without pickles, whole or not at all. Raises `CannotWrite`.

    `runs`: a JSON text as bytes, [{name, options, resolved, summary, versions, series: [[tag, grid, first, n], ...]}];
    `values`: all values, float32; `steps_G`: the steps of grid G, as differences, int32. Series logged at the same
    steps share a grid. Values of single batches keep `KEPT_BITS` bits of mantissa, those over whole sets all.
    The folders of data and runs are left out. `searches`: (name, content of its file) of searches by tuned sweeps; where
    there are any, the file has them as the JSON text `searches`, {"searches": [[name, content], ...]}.
    """
    grids: dict[bytes, int] = {}
    arrays, values, listed, first = {}, [], [], 0
    for run in runs:
        series = []
        for tag, (steps, of_tag) in run.series.items():
            apart = np.diff(steps, prepend=0).astype("<i4")
            grid = grids.setdefault(apart.tobytes(), len(grids))
            arrays[f"steps_{grid}"] = apart
            values.append(of_tag.astype("<f4") if SERIES[tag].exact else rounded(of_tag))
            series.append([tag, grid, first, len(of_tag)])
            first += len(of_tag)
        about = {k: getattr(run, k) for k in ("name", "resolved", "summary", "versions")}
        about["options"] = {k: v for k, v in run.options.items() if k not in PRIVATE}
        listed.append(about | {"series": series})
    text = json.dumps({"format": EXPORT_FORMAT, "runs": listed}).encode()
    arrays |= {
        "runs": np.frombuffer(text, np.uint8),
        "values": np.concatenate(values) if values else np.zeros(0, "<f4"),
    }
    if searches := [(name, without_folders(content)) for name, content in searches]:
        arrays["searches"] = np.frombuffer(json.dumps({"searches": searches}).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with whole_file(path, "--export") as temporary:
        temporary.write_bytes(buffer.getvalue())


def read_export(path: Path, left_out: list[str] | None = None) -> list[Run]:
    """The runs of an exported file, without points that are not finite. Raises `InputError` where it is not one.

    A run with a wrong field is added to `left_out`, as "NAME: reason"; without it, it raises too.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path}: not a regular file")
    try:
        with np.load(path, allow_pickle=False) as z:
            listed = jsonfiles.parse_json(z["runs"].tobytes(), path)
            values = z["values"].astype(np.float64)
            grids = {k: schema.check_steps(k, z[k], path) for k in z.files if k.startswith("steps_")}
        if listed.get("format") != EXPORT_FORMAT or not isinstance(listed.get("runs"), list) or values.ndim != 1:
            raise ValueError(f"format {jsonfiles.describe_value(listed.get('format'))}, not '{EXPORT_FORMAT}'")
    except InputError:
        raise
    except Exception as e:  # a damaged file can make numpy and zipfile raise nearly anything
        raise InputError(f"{path}: not a file of exported runs ({one_line(e)})") from e
    runs = []
    for about in listed["runs"]:
        try:
            schema.check_exported(about, grids, len(values), path)
        except InputError as e:
            if left_out is None:
                raise
            name = about.get("name") if isinstance(about, dict) else None
            left_out.append(f"{one_line(name) if isinstance(name, str) else 'a run without a name'}: {e}")
            continue
        series = {tag: finite(grids[f"steps_{g}"], values[a : a + n]) for tag, g, a, n in about["series"]}
        # also the options that are newer than the file
        opts = vars(options.parser().parse_args([])) | about["options"]
        fields = {k: about[k] for k in ("name", "resolved", "summary", "versions")}
        runs.append(Run(**fields, options=opts, series=series, source=str(path)))
    return runs


def read_exported_searches(path: Path) -> list[tuple[str, dict]]:
    """(name, content) of the searches in an exported file that `read_export` has read. Raises `InputError` where they are damaged."""
    try:
        with np.load(path, allow_pickle=False) as z:
            listed = jsonfiles.parse_json(z["searches"].tobytes(), path)["searches"] if "searches" in z.files else []
        if not all(isinstance(name, str) and isinstance(content, dict) for name, content in listed):
            raise ValueError("a search without a name")
        return [(name, content) for name, content in listed]
    except InputError:
        raise
    except Exception as e:  # as above
        raise InputError(f"{path}: its searches cannot be read ({one_line(e)})") from e


def finite(steps: np.ndarray, values: np.ndarray) -> Series:
    """A series without its points that are not finite."""
    kept = np.isfinite(values)
    return steps[kept], values[kept]
