"""Reading runs back: from their folders, from exported files, and from the report's own curves.

Only what docs/running.md promises is read: event files, config.json, summary.json. A run that is still being written
reads as far as it has come.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

import jsonfiles
import options
import schedules
import schema
from data import InputError
from events import scalars
from findings import Cell, Row
from outputs import whole_file

Series = tuple[np.ndarray, np.ndarray]  # steps int64, values float64, in order of step
# What one run is not told apart by from another of the same setting: the cell, the seed, and where and how it ran.
AXES = ("noise", "bs", "lr", "momentum", "wd", "sched", "sched_steps", "sched_epochs", "sched_examples", "fake_mask")
SEEDS = ("seed", "noise_seed", "split_seed")
NOT_SETTING = {
    *AXES,
    *SEEDS,
    *options.PLACE,
    "measure",
    "measure_every",
    "measure_budget",
    "permutations",
    "null_every",
    "precision",
    "resume",
    "compile",
}
FORMAT = "label-noise runs 1"
EXACT = ("val/", "test/", "probe/", "noise/")  # means over whole sets, few points: exported with every bit
KEPT_BITS = 12  # of float32's 23-bit mantissa, for values of single batches: 1.2e-4 relative


@dataclass
class Run:
    """A run as it can be read: options and summary as in its folder, `series` {tag: (steps, values)}."""

    name: str
    options: dict
    resolved: dict
    summary: dict
    series: dict[str, Series]
    source: str
    versions: dict = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.summary.get("status") == "finished"

    @property
    def steps_per_epoch(self) -> int | None:
        return self.resolved.get("steps_per_epoch")

    @property
    def cell(self) -> Cell:
        o = self.options
        return Cell(o["sched"], float(o.get("noise") or 0), int(o["bs"]), float(o["lr"]), float(o["momentum"]))

    @property
    def seed(self) -> str:
        return "/".join(str(self.options.get(name, 0)) for name in SEEDS)

    @property
    def fake(self) -> float:
        """The share of an A/A run's fake noisy mask, 0 for any other run."""
        return float(self.options.get("fake_mask") or 0)

    @property
    def budget(self) -> str:
        """In what the schedule's length is given: steps, epochs, examples; `any` where there is no schedule."""
        if self.options["sched"] == "constant":
            return "any"
        return next((unit for unit in ("epochs", "examples") if self.options.get(f"sched_{unit}")), "steps")

    @property
    def length(self) -> int:
        """The schedule's length in the unit of `budget`; 0 without one."""
        return 0 if self.budget == "any" else self.options.get(f"sched_{self.budget}") or 5000

    @property
    def setting(self) -> tuple:
        """Everything that must be equal for two runs to be compared, as sorted (option, value) pairs."""
        return tuple(sorted((k, str(v)) for k, v in self.options.items() if k not in NOT_SETTING and v is not None))


# ---------------------------------------------------------------------------------------------------- run folders


def read_events(folder: Path) -> dict[str, Series]:
    """Every series of a run's folder. Of two values at one step the later one counts; none that is not finite."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for tag, step, value in scalars(path):
            if math.isfinite(value):
                found.setdefault(tag, {})[step] = value
    return {tag: as_series(points) for tag, points in sorted(found.items())}


def as_series(points: dict[int, float]) -> Series:
    steps = np.array(sorted(points), dtype=np.int64)
    return steps, np.array([points[s] for s in steps.tolist()], dtype=np.float64)


def read_folder(folder: Path, with_series: bool = True) -> Run:
    """A run from its folder, or all but its series, which take nearly all of the time and memory.

    Raises `InputError` where config.json or summary.json is damaged or has a wrong field.
    """
    config, summary = schema.read_config(folder / "config.json"), schema.read_summary(folder / "summary.json") or {}
    if config is None:
        raise InputError(f"{folder}: no config.json in it")
    opts = vars(options.parser().parse_args([])) | config["options"]
    opts["model"] = opts["model"] or "resnet18"
    opts["noise"] = config.get("noise", {}).get("nominal", opts["noise"])  # a file's noise has no --noise
    return Run(
        folder.name,
        opts,
        config.get("resolved", {}),
        summary,
        read_events(folder) if with_series else {},
        str(folder),
        config.get("versions", {}),
    )


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def load(paths: list[str], progress: bool = True, left_out: list[str] | None = None) -> list[Run]:
    """Every run found in `paths`: folders of runs, single runs' folders, exported files (.npz), report curves (.csv).

    Of two runs with the same name and options the one further on counts, a folder before a file. Raises `InputError` for a path
    that is none of these. A run that cannot be read is added to `left_out`, as "NAME: reason"; without it, it raises too.
    """
    return list(each(paths, progress, left_out))


def each(paths: list[str], progress: bool = True, left_out: list[str] | None = None) -> Iterator[Run]:
    """The runs of `load`, one at a time: the series of a folder are read when it is that run's turn.

    Folders that hold more than the memory does can be gone through like this. Raises as `load` does.
    """
    runs: list[Run] = []
    folders: list[Path] = []
    for path in map(Path, paths):
        if path.suffix == ".npz" and path.is_file():
            runs += read_export(path, left_out)
        elif path.suffix == ".csv" and path.is_file():
            runs += read_curves(path)
        elif path.is_dir():
            inside = [path] if is_run(path) else sorted(p for p in path.iterdir() if is_run(p))
            if not inside:
                raise InputError(f"{path}: no run in it (a run's folder holds a config.json)")
            folders += inside
        else:
            raise InputError(f"{path}: neither a folder of runs nor an exported .npz nor a .csv of curves")
    found: list[tuple[Run, Path | None]] = [(run, None) for run in runs]
    for folder in folders:
        try:
            found.append((read_folder(folder, with_series=False), folder))
        except InputError as e:
            if left_out is None:
                raise
            left_out.append(f"{folder.name}: {e}")
    best: dict[tuple, tuple[Run, Path | None]] = {}
    for run, folder in found:
        what = (run.name, run.setting, run.cell, run.seed, run.budget, run.length, run.fake)
        have = best.get(what)
        if have is None or how_far(run) >= how_far(have[0]):
            best[what] = (run, folder)
    for run, folder in tqdm(best.values(), unit="run", desc="reading", disable=not progress or len(folders) < 4):
        yield read_folder(folder) if folder else run


def how_far(run: Run) -> tuple[bool, int]:
    """How far a run has come, to be compared."""
    return run.finished, run.summary.get("steps") or 0


# --------------------------------------------------------------------------------------------------- exported files


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 values with `KEPT_BITS` bits of mantissa, rounded to nearest: what is left compresses to half the size."""
    bits = values.astype("<f4").view("<u4")
    drop = 23 - KEPT_BITS
    return ((bits + np.uint32(1 << (drop - 1))) & ~np.uint32((1 << drop) - 1)).view("<f4")


def export(runs: list[Run], path: Path) -> None:
    """Write the series of many runs into one compressed .npz without pickles, whole or not at all. Raises `CannotWrite`.

    `runs`: a JSON text as bytes, [{name, options, resolved, summary, versions, series: [[tag, grid, first, n], ...]}];
    `values`: all values, float32; `steps_G`: the steps of grid G, as differences, int32. Series logged at the same
    steps share a grid. Values of single batches keep `KEPT_BITS` bits of mantissa, those over whole sets all.
    """
    grids: dict[bytes, int] = {}
    arrays, values, listed, first = {}, [], [], 0
    for run in runs:
        series = []
        for tag, (steps, found) in run.series.items():
            apart = np.diff(steps, prepend=0).astype("<i4")
            grid = grids.setdefault(apart.tobytes(), len(grids))
            arrays[f"steps_{grid}"] = apart
            values.append(found.astype("<f4") if tag.startswith(EXACT) else rounded(found))
            series.append([tag, grid, first, len(found)])
            first += len(found)
        about = {k: getattr(run, k) for k in ("name", "options", "resolved", "summary", "versions")}
        listed.append(about | {"series": series})
    text = json.dumps({"format": FORMAT, "runs": listed}).encode()
    arrays |= {
        "runs": np.frombuffer(text, np.uint8),
        "values": np.concatenate(values) if values else np.zeros(0, "<f4"),
    }
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
            listed = jsonfiles.parse(z["runs"].tobytes(), path)
            values = z["values"].astype(np.float64)
            grids = {k: schema.check_steps(k, z[k], path) for k in z.files if k.startswith("steps_")}
        if listed.get("format") != FORMAT or not isinstance(listed.get("runs"), list) or values.ndim != 1:
            raise ValueError(f"format {jsonfiles.shown(listed.get('format'))}, not '{FORMAT}'")
    except InputError:
        raise
    except Exception as e:  # a damaged file can make numpy and zipfile raise nearly anything
        raise InputError(
            f"{path}: not a file of exported runs ({str(e).splitlines()[0] if str(e) else type(e).__name__})"
        ) from e
    runs = []
    for about in listed["runs"]:
        try:
            schema.check_exported(about, grids, len(values), path)
        except InputError as e:
            if left_out is None:
                raise
            name = about.get("name") if isinstance(about, dict) else None
            left_out.append(f"{name if isinstance(name, str) else 'a run without a name'}: {e}")
            continue
        series = {tag: finite(grids[f"steps_{g}"], values[a : a + n]) for tag, g, a, n in about["series"]}
        # also the options that are newer than the file
        opts = vars(options.parser().parse_args([])) | about["options"]
        fields = {k: about[k] for k in ("name", "resolved", "summary", "versions")}
        runs.append(Run(**fields, options=opts, series=series, source=str(path)))
    return runs


def finite(steps: np.ndarray, values: np.ndarray) -> Series:
    """A series without its points that are not finite."""
    kept = np.isfinite(values)
    return steps[kept], values[kept]


# ----------------------------------------------------------------------------------------------- the report's curves

METRICS = {"val_accuracy": "val/acc", "grad_cosine": "grad/cos_clean_all", "noisy_train_accuracy": "train/acc_noisy"}
RATIO_EPOCHS, RATIO_STEPS = 80, 25_000  # figures 13 and 14


def read_curves(path: Path) -> list[Run]:
    """The report's curves as runs: one for each (figure 13 or not, scheduler, noise, batch size, lr), without figure 4's
    batch 128 at no noise, which is figure 13's run of 80 epochs.

    Steps and values are kept as they stand in the file (validation accuracy one step earlier than ours); an empty
    value is a batch without a noisy example. Raises `InputError` where the file is something else.
    """
    points: dict[tuple, dict[str, list[tuple[int, float]]]] = {}
    about: dict[tuple, dict] = {}
    try:
        with open(path, newline="") as f:
            for row in csv.DictReader(f):
                ratio = row["figure"] == "13"
                key = (ratio, row["scheduler"], row["noise"], row["batch_size"], row["lr"])
                about[key] = row
                series = points.setdefault(key, {}).setdefault(METRICS[row["metric"]], [])
                if row["value"] != "":
                    series.append((int(row["step"]), float(row["value"])))
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as e:
        raise InputError(f"{path}: not a table of the report's curves ({type(e).__name__}: {str(e)[:80]})") from e
    if not points:
        raise InputError(f"{path}: not a table of the report's curves (it is empty)")
    runs, left_out = [], {}  # {schedule: {"noise, batch size": why}} of curves that are not among their neighbours
    for key, series in points.items():
        ratio, sched, noise, B, lr = key
        spe = math.ceil(40_000 / int(B))
        if not ratio and max(s for s, _ in series.get("val/acc", [(0, 0.0)])) > 64 * spe:
            # figure 4's batch 128 without noise is a run of figure 13, and is drawn there
            why = f"the report's curve is its figure 13's run of {RATIO_EPOCHS} epochs"
            left_out.setdefault(sched, {})[f"{float(noise):g}, {B}"] = why
            continue
        name = f"report{'-ratio' if ratio else ''}_sched-{sched}_noise{noise}_bs{B}_lr{lr}"
        opts = vars(options.parser().parse_args([])) | {
            **{k: about[key][k] for k in ("dataset", "model")},
            **{"noise": float(noise), "bs": int(B), "lr": float(lr), "sched": sched},
            **{"epochs": RATIO_EPOCHS if ratio else 64, "sched_steps": RATIO_STEPS if ratio else 5000},
            "measure_bn": "eval",
        }
        found = {}
        for tag, pairs in series.items():
            steps, values = zip(*pairs, strict=True)
            found[tag] = (np.array(steps, np.int64), np.array(values))
        summary = {"status": "finished", "steps": max(int(s[-1]) for s, _ in found.values())}
        resolved = {"steps_per_epoch": spe, "train_examples": 40_000}
        runs.append(Run(name, opts, resolved, summary, found, str(path)))
    for run in runs:
        if run.options["epochs"] != RATIO_EPOCHS and run.cell.sched in left_out:
            run.resolved["left_out"] = left_out[run.cell.sched]
    return runs


# ----------------------------------------------------------------------------------------- one row per finished run


def schedule_seen(run: Run) -> tuple[float, float] | None:
    """(fraction of the schedule that the run sees, share of the run that stands at the schedule's last value); None for a
    constant rate, or where it is not known."""
    seen = run.resolved.get("schedule")
    if seen is None and {"sched_steps", "total_steps", "steps_per_epoch"} <= run.resolved.keys():  # a run of an older version
        lengths = (run.resolved[name] for name in ("sched_steps", "total_steps", "steps_per_epoch"))
        seen = schedules.span(run.options["sched"], *lengths)
    return (seen["fraction_seen"], seen["share_at_end"]) if seen and {"fraction_seen", "share_at_end"} <= seen.keys() else None


def last(run: Run, tag: str) -> float | None:
    return float(run.series[tag][1][-1]) if tag in run.series and len(run.series[tag][1]) else None


def together(run: Run, a: str, b: str, how, start: int = 0) -> float | None:
    """Mean over the run of how(a, b) at the steps, from `start` on, that both series have."""
    if a not in run.series or b not in run.series:
        return None
    (sa, va), (sb, vb) = run.series[a], run.series[b]
    steps, ia, ib = np.intersect1d(sa, sb, return_indices=True)
    ia, ib = ia[steps >= start], ib[steps >= start]
    return float(np.mean(how(va[ia], vb[ib]))) if len(ia) else None


def null_of(run: Run, pair: str) -> str:
    """The series that a raw cosine, `cos_clean_noisy` or `cos_clean_all`, is to be set beside: that of random masks, which
    are exchangeable with the real one where there is no effect; without it the closed form, a ratio of means."""
    masks = f"null/permuted_{pair}"
    return masks if masks in run.series else f"null/{pair}"


def values_of(run: Run) -> dict[str, float]:
    """What the findings need of a run, without what it lacks."""
    corrected = run.series.get("corrected/cos_clean_noisy")
    found = {
        "val_acc": last(run, "val/acc"),
        "test_acc": last(run, "test/acc"),
        "memorized": last(run, "probe/memorized"),
        "cos_minus_null": together(run, "grad/cos_clean_noisy", null_of(run, "cos_clean_noisy"), np.subtract),
        "corrected_minus_1": float(corrected[1].mean()) - 1 if corrected is not None and len(corrected[1]) else None,
        # A small budget leaves one measurement, before training: nothing that batches or schedules could have changed.
        "participation_minus_1": together(
            run, "isotropy/participation", "isotropy/isotropic", lambda a, b: a / b - 1, start=1
        ),
    }
    return {k: v for k, v in found.items() if v is not None}


def row_of(run: Run) -> Row:
    """The row of a run for findings.py."""
    values = values_of(run) if run.finished else {}
    return Row(run.cell, run.seed, run.budget, values, run.name, run.fake, float(run.options["wd"]), run.finished)


@dataclass
class Setting:
    """Runs that may be compared with one another. `runs`: at one learning rate, weight decay and schedule length for
    each budget; `ratio_runs`: at every learning rate, for findings about lr/B; `all_runs`: with every rate and decay;
    `notes` say what `runs` leave out. `ratio`: whether cells of equal lr/B are there (figures 13 and 14)."""

    label: str
    runs: list[Run]
    ratio_runs: list[Run]
    all_runs: list[Run]
    notes: list[str]
    ratio: bool


def settings(runs: list[Run]) -> list[Setting]:
    """Group runs by everything but their axes, largest group first."""
    plain = vars(options.parser().parse_args([]))
    made = []
    for key, members in sorted(by(runs, lambda r: r.setting).items(), key=lambda item: -len(item[1])):
        named, notes, every = dict(key), [], []
        parts = [named.get("dataset", "?"), named.get("model", "?"), f"{named.get('epochs', '?')} epochs"]
        rest = [
            (k.replace("_", "-"), v)
            for k, v in key
            if k not in ("dataset", "model", "epochs") and v != str(plain.get(k))
        ]
        parts += [k if v == "True" else f"{k} {v}" for k, v in rest]
        for group in by(members, lambda r: r.budget).values():  # a length is in its budget's own unit
            every += most_common(group, lambda r: r.length, "schedule length", notes)
        every = once_each(every, notes)
        kept = most_common(every, lambda r: r.options["wd"], "weight decay", notes)
        pairs = by(kept, lambda r: (r.cell.sched, r.cell.noise, f"{r.cell.lr / r.cell.B:.6g}"))
        ratio = any(len({r.cell.B for r in group}) > 1 for group in pairs.values())
        one_rate = most_common(kept, lambda r: r.cell.lr, "learning rate", notes)
        made.append(Setting(", ".join(parts), one_rate, kept, every, notes, ratio))
    return made


def by(runs: list[Run], key) -> dict:
    groups: dict = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def most_common(runs: list[Run], of, what: str, notes: list[str]) -> list[Run]:
    """The runs with the most frequent value of `of` (the larger of two); a note says what was left out."""
    counts = Counter(of(r) for r in runs)
    if len(counts) < 2:
        return runs
    chosen = max(counts, key=lambda v: (counts[v], v))
    rest = ", ".join(f"{v:g} ({n} runs)" for v, n in sorted(counts.items()) if v != chosen)
    notes.append(f"compared at {what} {chosen:g}; apart from that there are {rest}")
    return [r for r in runs if of(r) == chosen]


def once_each(runs: list[Run], notes: list[str]) -> list[Run]:
    """One run for each cell, seed, budget, weight decay and share of a fake mask; of several, which differ in precision or
    in what they measured, the finished one with most series. A note says how many were left out."""
    same = by(runs, lambda r: (r.cell, r.seed, r.budget, r.options["wd"], r.fake))
    chosen = [max(group, key=lambda r: (r.finished, len(r.series))) for group in same.values()]
    if len(chosen) < len(runs):
        kinds = sorted({str(r.options.get("precision")) for group in same.values() if len(group) > 1 for r in group})
        notes.append(
            f"{len(runs) - len(chosen)} runs repeat the cell and seed of another ({', '.join(kinds)}); of each the one that "
            "measured most counts"
        )
    return chosen
