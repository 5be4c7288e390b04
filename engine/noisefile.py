"""Files of labels (noise.npz as runs write it, CIFAR-10N's .pt, transition matrices), and what labels are: the ledger.

Whatever is wrong with a file is an `InputError` of one line that names the option and the file. Nothing here
unpickles anything but plain integer arrays.

Shapes: n examples that a file knows, K classes.
"""

import hashlib
import io
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import InputError, one_line
from engine import files

CLEAN = "clean_label"  # CIFAR-10N's and CIFAR-100N's name for the true labels


class LabelFile(NamedTuple):
    """`index` (n,) int64 into a training set, no two alike, or None for its whole and in order; `true`, `label` (n,)
    int64; `dynamic` is (rate, seed) where the labels are but the first epoch's of a noise that is drawn anew."""

    index: Tensor | None
    true: Tensor
    label: Tensor
    dynamic: tuple[float, int] | None = None


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


# ------------------------------------------------------------------------------------------------------------- reading


def read(path: str, name: str | None = None, option: str = "--noise-file") -> LabelFile:
    """Labels from an `.npz` of `archive`'s layout, or those called `name` in a `.pt` of CIFAR-10N's.

    `option` is what an `InputError` is to be laid at. Raised for a file that is not there, cannot be read, lacks an
    array, wants more than integer arrays to be made, or whose arrays are not labels.
    """
    if not os.path.isfile(path):
        raise InputError(f"{option} {path}: there is no such file")
    if path.endswith(".pt"):
        return read_pt(path, name, option)
    if name is not None:
        raise InputError(f"--noise-labels {name}: {path} holds one set of labels only, not several as CIFAR-10N's .pt")
    return read_npz(path, option)


def labels(a: object, name: str, source: str, like: Tensor | None = None, classes: bool = True) -> Tensor:
    """An array as int64 labels (n,), or as positions without `classes`, as long as `like`. Else `InputError`."""
    try:
        a = a.numpy() if isinstance(a, Tensor) else np.asarray(a)
    except Exception as e:  # ragged lists, tensors of a kind that numpy lacks: each raises its own
        raise InputError(f"{source}: {name} is not an array of integers ({one_line(e)})") from e
    if a.dtype.kind not in "iu" or a.ndim != 1 or len(a) == 0:
        raise InputError(f"{source}: {name} is {a.dtype} of shape {a.shape}, not integer (n,)")
    if like is not None and len(a) != len(like):
        raise InputError(f"{source}: {name} has {len(a)} entries, true has {len(like)}")
    if int(a.min()) < 0 or int(a.max()) > (9999 if classes else 2**31):
        what = "class numbers from 0" if classes else "positions from 0"
        raise InputError(f"{source}: {name} holds {a.min()}..{a.max()}, not {what}")
    return torch.from_numpy(a.astype(np.int64))


def read_npz(path: str, option: str) -> LabelFile:
    """`read` for `.npz`. Pickled arrays are refused by numpy."""
    source = f"{option} {path}"
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = {k: z[k] for k in ("index", "true", "label", "dynamic_rate", "dynamic_seed") if k in z.files}
    except Exception as e:  # zipfile, zlib, numpy and the file system each raise their own
        raise InputError(f"{source}: not a readable .npz of labels ({one_line(e)})") from e
    missing = [k for k in ("index", "true", "label") if k not in arrays]
    if missing:
        raise InputError(f"{source}: lacks the array {', '.join(missing)}; needed are index, true and label")
    true = labels(arrays["true"], "true", source)
    label, index = labels(arrays["label"], "label", source, true), labels(arrays["index"], "index", source, true, False)
    if len(index.unique()) < len(index):
        raise InputError(f"{source}: index names an example twice")
    dynamic = None
    if "dynamic_rate" in arrays:
        rate, seed = arrays["dynamic_rate"], arrays.get("dynamic_seed", np.empty(0))
        plain = rate.size == seed.size == 1 and rate.dtype.kind in "fiu" and seed.dtype.kind in "iu"
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
    return LabelFile(None, true, labels(arrays[name], name, source, true))


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
    """True labels (N,) int64 of a whole training set from a `.npy`. Raises `InputError`."""
    source = f"--true {path}"
    if not os.path.isfile(path):
        raise InputError(f"{source}: there is no such file")
    try:
        a = np.load(path, allow_pickle=False)
    except Exception as e:
        raise InputError(f"{source}: not a readable .npy ({one_line(e)})") from e
    y = labels(a, "the array", source)
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
        raise InputError(f"{source}: not a readable .npy or .csv of numbers ({one_line(e)})") from e
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
    width = max(len(c) for c in classes)
    lines.append(f"{'per cent':<{width}}  changed  given label")
    lines.append(f"{'':<{width + 9}}  " + "".join(f"{k:>6}" for k in range(len(classes))))
    for name, rate, row in zip(classes, ledger["per_class"], ledger["matrix"]):
        cells = "".join(f"{100 * p:6.1f}" if p else "     ." for p in row)
        lines.append(f"{name:<{width}}  {'-' if rate is None else f'{100 * rate:.1f}':>7}  {cells}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- inspect and compare


def named(text: str) -> tuple[str, str | None]:
    """FILE.pt:LABELS -> (FILE.pt, LABELS), anything else -> (text, None)."""
    path, colon, name = text.rpartition(":")
    return (path, name) if colon and path.endswith(".pt") else (text, None)


def show(text: str) -> str:
    """What `inspect` prints: a file's ledger, or the rate of each label set where there are several."""
    path, name = named(text)
    if path.endswith(".pt") and name is None and os.path.isfile(path):
        sets = [k for k in load_pt(path, "inspect") if k != CLEAN]
        width = max(map(len, sets), default=0)
        files = [(k, read(path, k, "inspect")) for k in sets]
        rates = "\n".join(f"{k:<{width}}  {(f.label != f.true).double().mean().item():.4f}" for k, f in files)
        return f"{path}: {len(sets)} sets of labels, share that is wrong\n{rates}"
    file = read(path, name, "inspect")
    index = torch.arange(len(file.true)) if file.index is None else file.index
    K = int(torch.cat([file.true, file.label]).max()) + 1
    rate, seed = file.dynamic or ((file.label != file.true).double().mean().item(), None)
    drawn = ledger("file", rate, seed, index, file.true, file.label, K, dynamic=file.dynamic is not None)
    return f"{text}: examples {int(index.min())}..{int(index.max())}\n" + describe_labels(
        drawn, tuple(map(str, range(K)))
    )


def compare(one: str, other: str) -> str:
    """What `compare` prints: rates and agreement of two files on the examples that both know.

    Beside the agreement stands what two independent draws with the same two matrices would have. Raises `InputError`.
    """
    files = [read(*named(text), "compare") for text in (one, other)]
    a, b = files
    ia, ib = (torch.arange(len(f.true)) if f.index is None else f.index for f in files)
    common, at_a, at_b = np.intersect1d(ia.numpy(), ib.numpy(), assume_unique=True, return_indices=True)
    if len(common) == 0:
        raise InputError(f"compare {one}, {other}: the files have no example in common")
    true, la, lb = a.true[at_a], a.label[at_a], b.label[at_b]
    different = int((true != b.true[at_b]).sum())
    if different:
        raise InputError(
            f"compare {one}, {other}: true labels differ for {different} of {len(common)} examples: "
            "made for different data sets or orders"
        )
    K = int(torch.cat([true, la, lb]).max()) + 1
    na, nb = la != true, lb != true
    both = na & nb
    rows = {
        "examples in common": f"{len(common)} of {len(a.true)} and {len(b.true)}",
        "share that is wrong": f"{na.double().mean().item():.4f} and {nb.double().mean().item():.4f}",
        "same label": f"{(la == lb).double().mean().item():.4f}",
        "wrong in both": f"{both.double().mean().item():.4f}",
        "the same there": f"{(la == lb)[both].double().mean().item():.4f}" if both.any() else "-",
    }
    if K <= LARGEST:
        Ta, Tb = (shares(transitions(true, x, K)) for x in (la, lb))
        chance = float((Ta * Tb).sum(1) @ torch.bincount(true, minlength=K).double()) / len(true)
        rows["same label"] += f" ({chance:.4f} expected of independent draws)"
        rows["matrices differ by"] = f"{float((Ta - Tb).abs().max()):.4f} at most"
    return "\n".join(f"{name:<20}  {value}" for name, value in rows.items())
