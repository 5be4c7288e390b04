"""Files of labels (noise.npz as runs write it, CIFAR-10N's .pt, transition matrices), and what labels are: the ledger.

Whatever is wrong with a file is an `InputError` of one line that names the option and the file. Nothing here
unpickles anything but plain integer arrays.

Shapes: n examples that a file knows, K classes.
"""

import hashlib
import io
import json
import os
import re
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import InputError, one_line
from engine import files

CLEAN = "clean_label"  # CIFAR-10N's and CIFAR-100N's name for the true labels


class LabelFile(NamedTuple):
    """`index` (n,) int64 into a training set, no two alike, or None for its whole and in order; `true`, None where the file does
    not know, and `label` (n,) int64; `dynamic` is (rate, seed) where the labels are but the first epoch's of a noise that is
    drawn anew."""

    index: Tensor | None
    true: Tensor | None
    label: Tensor
    dynamic: tuple[float, int] | None = None

    @property
    def known(self) -> Tensor:
        """`index`, or all positions."""
        return torch.arange(len(self.label)) if self.index is None else self.index


def archive(index: Tensor, true: Tensor, label: Tensor, dynamic: tuple[float, int] | None = None) -> bytes:
    """The bytes of `noise.npz`: `index` (n,) into the data set's training set, `true` and `label` (n,), all int64.

    `dynamic` (rate, seed) adds the float64 and int64 scalars `dynamic_rate` and `dynamic_seed`, without which the
    labels of one epoch would not repeat the others. The same labels give the same bytes, so their SHA-256 identifies
    the noise.
    """
    arrays = {"index": index.numpy(), "true": true.numpy(), "label": label.numpy()}
    if dynamic is not None:
        arrays |= {"dynamic_rate": np.float64(dynamic[0]), "dynamic_seed": np.int64(dynamic[1])}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def save(path: Path, index: Tensor, true: Tensor, label: Tensor, dynamic: tuple[float, int] | None = None) -> None:
    """Write `archive` to `path`, whole or not at all."""
    files.replace(Path(path), archive(index, true, label, dynamic))


def sha256(*columns: Tensor) -> str:
    """SHA-256 of int64 columns, little-endian, one after another: of the labels whatever file they are in."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column.numpy(), dtype="<i8").tobytes())
    return digest.hexdigest()


def reason(e: Exception) -> str:
    """Of an exception in one line, without numpy's advice to unpickle."""
    pickled = isinstance(e, ValueError) and "pickle" in str(e)
    return "it is no plain array: damaged, or Python objects" if pickled else one_line(e)


# ------------------------------------------------------------------------------------------------------------- reading


def read(path: str, name: str | None = None, option: str = "--noise-file") -> LabelFile:
    """Labels from columns (`read_columns`), of which `label` is needed, or those called `name` in a `.pt` of CIFAR-10N's.

    `option` is what an `InputError` is to be laid at. Raised for a file that is not there, cannot be read, lacks an
    array, wants more than integer arrays to be made, or whose arrays are not labels.
    """
    if not os.path.isfile(path):
        raise InputError(f"{option} {path}: there is no such file")
    if path.endswith(".pt"):
        return read_pt(path, name, option)
    if name is not None:
        raise InputError(f"--noise-labels {name}: {path} holds one set of labels only, not several as CIFAR-10N's .pt")
    source = f"{option} {path}"
    return as_labels(read_columns(path, source), source)


COLUMNS = "index", "true", "label"
DYNAMIC = "dynamic_rate", "dynamic_seed"  # as `archive` writes them
KINDS = ".npz", ".npy", ".json", ".csv"


def read_columns(path: str, source: str) -> dict[str, object]:
    """Arrays of a file of labels by name: an `.npz`, a `.json` of an object of lists or a `.csv` with a header may have all
    of `COLUMNS`; a `.npy`, a list in a `.json` and a single column are `label`. Not checked further; nothing is unpickled.
    """
    kind = os.path.splitext(path)[1].lower()
    try:
        with open(path, "rb") as f, warnings.catch_warnings(action="ignore"):  # an empty file: its shape says so
            if kind == ".csv":
                arrays = read_csv(f)
            else:
                arrays = json.load(f) if kind == ".json" else np.load(f, allow_pickle=False)
            if isinstance(arrays, (list, np.ndarray)):
                return {"label": arrays}
            return {k: arrays[k] for k in (*COLUMNS, *DYNAMIC) if k in arrays}
    except Exception as e:  # zipfile, zlib, numpy, json and the file system each raise their own
        what = kind if kind in KINDS else f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise InputError(f"{source}: not a readable {what} of labels ({reason(e)})") from e


def read_csv(file: BinaryIO) -> dict[str, np.ndarray]:
    """Columns of whole numbers: those of `COLUMNS` that the first line names, or a single one."""
    lines = io.TextIOWrapper(file, encoding="utf-8-sig")  # Excel puts a mark before it
    head = [name.strip().strip('"').lower() for name in lines.readline().split(",")]
    named = not all(re.fullmatch(r"[+-]?\d*", name) for name in head)
    names = [name for name in head if name in COLUMNS] if len(head) > 1 else ["label"]
    if not names:
        raise ValueError("its first line names none of the columns index, true and label")
    lines.seek(0)
    how = {"delimiter": ",", "ndmin": 2, "comments": None, "skiprows": int(named)}
    table = np.loadtxt(lines, np.int64, usecols=[head.index(n) for n in names] if len(head) > 1 else None, **how)
    return dict(zip(names, table.T))


def labels(a: object, name: str, source: str, N: int | None = None, classes: bool = True) -> Tensor:
    """An array (n,) or, as Keras has them, (n, 1), of `N` entries, as int64 labels (n,), or as positions without `classes`. Else
    `InputError`."""
    try:
        a = a.numpy() if isinstance(a, Tensor) else np.asarray(a)
    except Exception as e:  # ragged lists, tensors of a kind that numpy lacks: each raises its own
        raise InputError(f"{source}: {name} is not an array of integers ({reason(e)})") from e
    a = a[:, 0] if a.ndim == 2 and a.shape[1] == 1 else a
    if a.dtype.kind not in "iu" or a.ndim != 1 or len(a) == 0 or len(a) != (N or len(a)):
        raise InputError(f"{source}: {name} is {a.dtype} of shape {a.shape}, not integer ({N or 'n'},)")
    if int(a.min()) < 0 or int(a.max()) > (9999 if classes else 2**31):
        what = "class numbers from 0" if classes else "positions from 0"
        raise InputError(f"{source}: {name} holds {a.min()}..{a.max()}, not {what}")
    return torch.from_numpy(a.astype(np.int64))


def as_labels(arrays: dict[str, object], source: str) -> LabelFile:
    """The checked content of `read_columns`."""
    if "label" not in arrays:
        raise InputError(f"{source}: lacks the array label; beside it there may be index and true")
    label = labels(arrays["label"], "label", source)
    true = labels(arrays["true"], "true", source, len(label)) if "true" in arrays else None
    index = labels(arrays["index"], "index", source, len(label), False) if "index" in arrays else None
    if index is not None and len(index.unique()) < len(index):
        raise InputError(f"{source}: index names an example twice")
    dynamic = None
    if DYNAMIC[0] in arrays:
        rate, seed = (arrays.get(k) for k in DYNAMIC)
        plain = all(isinstance(a, np.ndarray) and a.size == 1 for a in (rate, seed))
        plain = plain and rate.dtype.kind in "fiu" and seed.dtype.kind in "iu"
        if not plain or not 0 <= rate.item() <= 1 or not 0 <= seed.item() < 2**63:
            raise InputError(f"{source}: dynamic_rate and dynamic_seed are not a share and a seed")
        dynamic = float(rate.item()), seed.item()
    return LabelFile(index, true, label, dynamic)


def read_pt(path: str, name: str | None, option: str) -> LabelFile:
    """`read` for `.pt`: the labels called `name` of a dictionary that also holds the true ones (`clean_label`)."""
    source, arrays = f"{option} {path}", load_pt(path, option)
    names = [k for k in arrays if k != CLEAN]
    if name not in names:
        given = f"has no labels '{name}'" if name else "holds several sets of labels"
        how = "--noise-labels must be" if option == "--noise-file" else f"give {path}:LABELS, LABELS being"
        raise InputError(f"{source}: {given}; {how} one of {one_line(', '.join(names))}")
    true = labels(arrays[CLEAN], CLEAN, source)
    return LabelFile(None, true, labels(arrays[name], name, source, len(true)))


def load_pt(path: str, option: str = "--noise-file") -> dict[str, object]:
    """The dictionary of arrays in a `.pt` of CIFAR-10N's layout: `clean_label` and label sets by name.

    Without those called coarse: CIFAR-100N's superclasses, which are no labels of these classes. torch's restricted
    unpickler makes integer numpy arrays and nothing else: a file that names any other function is refused before that
    function is called. Raises `InputError`.
    """
    make = np.empty(0).__reduce__()[0]  # numpy's own array maker, which moved between numpy 1 and 2
    allowed = [(make, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    allowed += [np.ndarray, np.dtype, *{type(np.dtype(t)) for t in ("i1", "i2", "i4", "i8", "u1", "u2", "u4")}]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
            arrays = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise InputError(f"{option} {path}: cannot be read ({one_line(e)})") from e
    except Exception as e:  # a file can be broken in any way
        wants = re.search(r"GLOBAL (\S+)", str(e))
        what = (
            f"it wants {one_line(wants[1].rstrip('.,'))} to be called"
            if wants
            else "it is damaged, or holds other than arrays"
        )
        raise InputError(f"{option} {path}: refused, {what}; a .pt may hold integer arrays only") from e
    if not isinstance(arrays, dict) or CLEAN not in arrays or not all(isinstance(k, str) for k in arrays):
        raise InputError(f"{option} {path}: not a dictionary of label arrays with '{CLEAN}', as CIFAR-10N's")
    arrays = {k: v for k, v in arrays.items() if "coarse" not in k}
    if len(arrays) < 2:
        raise InputError(f"{option} {path}: holds no labels to train on, '{CLEAN}' only")
    return arrays


def read_true(path: str) -> Tensor:
    """True labels (N,) int64 of a whole training set: a `.npy`, a list in a `.json`, one column. Raises `InputError`."""
    source = f"--true {path}"
    if not os.path.isfile(path):
        raise InputError(f"{source}: there is no such file")
    arrays = read_columns(path, source)
    if arrays.keys() != {"label"}:
        raise InputError(f"{source}: holds no plain list of labels, (N,) in a .npy, .json or .csv")
    y = labels(arrays["label"], "the array", source)
    if int(y.max()) == 0:
        raise InputError(f"{source}: holds one class only")
    return y


def read_matrix(path: str, K: int, source: str) -> Tensor:
    """A transition matrix (K, K) float64 from `.npy` or `.csv`: row k is the law of class k's label.

    Rows must be probabilities that sum to 1 within 1e-4 (decimals in a text file); they are then scaled to do so
    exactly. Raises `InputError`, which begins with `source`, the option and its value.
    """
    if not os.path.isfile(path):
        raise InputError(f"{source}: there is no such file")
    try:
        if path.endswith(".npy"):
            T = np.load(path, allow_pickle=False)
        else:
            with warnings.catch_warnings(action="ignore"):  # an empty file: its shape says so below
                T = np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig")  # Excel puts a mark before it
        T = np.asarray(T)
    except Exception as e:
        raise InputError(f"{source}: not a readable .npy or .csv of numbers ({reason(e)})") from e
    if T.dtype.kind not in "fiu":  # a complex one would lose its imaginary part
        raise InputError(f"{source}: is of {T.dtype}, not of real numbers")
    T = torch.from_numpy(T.astype(np.float64))
    if T.shape != (K, K):
        raise InputError(f"{source}: is of shape {tuple(T.shape)}, the data set has {K} classes: ({K}, {K})")
    if not bool(T.isfinite().all()) or bool((T < 0).any()):
        raise InputError(f"{source}: holds entries that are negative or not finite, not probabilities")
    off = (T.sum(1) - 1).abs()
    if float(off.max()) > 1e-4:
        k = int(off.argmax())
        raise InputError(f"{source}: row {k} sums to {float(T[k].sum()):.6g}, not to 1")
    return T / T.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------- the ledger


LARGEST = 200  # classes up to which a matrix is kept: it stands in config.json and in every checkpoint


def transitions(true: Tensor, label: Tensor, K: int) -> Tensor:
    """Counts (K, K) int64: row true class, column label."""
    return torch.bincount(true * K + label, minlength=K * K).view(K, K)


def shares(counts: Tensor) -> Tensor:
    """Rows of `transitions` (K, K) as shares of the true class, float64; a class without an example has zeros."""
    return counts / counts.sum(1, keepdim=True).clamp_min(1).double()


def ledger(
    kind: str,
    rate: float,
    seed: int | None,
    index: Tensor,
    true: Tensor,
    label: Tensor,
    K: int | None = None,
    dynamic: bool = False,
) -> dict:
    """What was done to the labels, as plain values: type, nominal and realised rate, counts, seed and hashes.

    `per_class` has K realised rates and `matrix` the realised transition matrix, K rows of K shares by true class; a
    class without an example has rate None and a row of zeros. Beyond 200 classes there is no matrix (None). `rate` is
    nominal, for a file its own share of wrong labels. With `dynamic` all of it describes epoch 0 and `dynamic` is
    (rate, seed), else None.
    """
    K = K or int(torch.cat([true, label]).max()) + 1
    changed = int((true != label).sum())
    of_class, wrong = (torch.bincount(t, minlength=K) for t in (true, true[true != label]))
    rates = (wrong / of_class.double()).tolist()
    again = (rate, seed) if dynamic else None
    return {
        "type": kind,
        "nominal": rate,
        "realised": changed / len(true),
        "examples": len(true),
        "changed": changed,
        "seed": seed,
        "labels_sha256": sha256(index, true, label),
        "noise_npz_sha256": hashlib.sha256(archive(index, true, label, again)).hexdigest(),
        "dynamic": list(again) if again else None,
        "per_class": [r if size else None for r, size in zip(rates, of_class.tolist())],
        "matrix": shares(transitions(true, label, K)).tolist() if K <= LARGEST else None,
    }


SHOWN = 20  # classes up to which a matrix is printed


def describe_labels(ledger: dict, classes: tuple[str, ...]) -> str:
    """The ledger as lines for a screen; the matrix in per cent, rows the true classes, for up to 20 of them."""
    lines = [
        f"label noise {ledger['type']}: nominal {ledger['nominal']:.4f}, realised {ledger['realised']:.4f} "
        f"({ledger['changed']} of {ledger['examples']} labels changed), "
        f"{'no seed' if ledger['seed'] is None else 'seed ' + str(ledger['seed'])}, "
        f"labels sha256 {ledger['labels_sha256'][:16]}"
    ]
    if ledger["dynamic"]:
        lines[0] += "; drawn anew each epoch, these are epoch 0's"
    rates = [r for r in ledger["per_class"] if r is not None]
    if not ledger["changed"]:  # the matrix says nothing then
        return lines[0]
    if len(classes) > SHOWN:
        return f"{lines[0]}\nper class: {min(rates):.4f} to {max(rates):.4f}, median {float(np.median(rates)):.4f}"
    names = list(map(one_line, classes))
    width = max(map(len, names))
    lines.append(f"{'per cent':<{width}}  changed  given label")
    lines.append(f"{'':<{width + 9}}  " + "".join(f"{k:>6}" for k in range(len(classes))))
    for name, rate, row in zip(names, ledger["per_class"], ledger["matrix"]):
        cells = "".join(f"{100 * p:6.1f}" if p else "     ." for p in row)
        lines.append(f"{name:<{width}}  {'-' if rate is None else f'{100 * rate:.1f}':>7}  {cells}")
    return "\n".join(lines)
