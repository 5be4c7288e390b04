"""Label noise: which training examples are re-labelled, and the ledger that says so.

A generator of noise is one function (true labels (n,) int64, K, rate, generator) -> labels (n,) int64, entered in
`NOISES`. "Noisy" always means label != true label: a re-drawn label that came out as the true one is clean.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import InputError, Source, generator


def uniform(true: Tensor, K: int, rate: float, g: torch.Generator) -> Tensor:
    """Exactly round(rate n) of the `n` examples get a label drawn uniformly from all K classes, their own included.

    The report's noise (section 3), so a share of about rate (K - 1) / K ends up wrong.
    `true` (n,) int64 -> (n,) int64.
    """
    selected = torch.randperm(len(true), generator=g)[: round(rate * len(true))]
    labels = true.clone()
    labels[selected] = torch.randint(K, selected.shape, generator=g)
    return labels


NOISES = {"uniform": uniform}


def apply(kind: str, true: Tensor, K: int, rate: float, seed: int) -> Tensor:
    """Labels (n,) to train on: noise `kind` at the nominal `rate`, from the noise seed's own stream."""
    return NOISES[kind](true, K, rate, generator(seed, "noise"))


def relabel(args, source: Source, index: Tensor) -> tuple[Tensor, dict]:
    """Labels (n,) for the training split `index` (n,) of `source`, as the options say, and their ledger.

    Labels that came with the set are taken as they are. Raises `InputError` where options and set do not go together.
    """
    true = source.y_train[index]
    if source.given is not None:
        if args.noise is not None:
            raise InputError(f"--noise {args.noise}: {args.dataset} brings its own noisy labels (y_train_noisy)")
        labels = source.given[index]
        return labels, ledger("given", (labels != true).double().mean().item(), None, index, true, labels)
    rate = args.noise or 0.0
    labels = apply(args.noise_type, true, len(source.classes), rate, args.noise_seed)
    return labels, ledger(args.noise_type, rate, args.noise_seed, index, true, labels)


def fake_mask(n: int, share: float, g: torch.Generator) -> Tensor:
    """A mask (n,) bool of exactly round(share n) examples: "noisy" ones whose labels are true, for an A/A run."""
    return torch.zeros(n, dtype=torch.bool).scatter(0, torch.randperm(n, generator=g)[: round(share * n)], True)


def archive(index: Tensor, true: Tensor, label: Tensor) -> bytes:
    """The bytes of `noise.npz`: `index` (n,) into the data set's training set, `true` and `label` (n,), all int64.

    The same labels give the same bytes, so their SHA-256 identifies the noise.
    """
    buffer = io.BytesIO()
    np.savez(buffer, index=index.numpy(), true=true.numpy(), label=label.numpy())
    return buffer.getvalue()


def sha256(*columns: Tensor) -> str:
    """SHA-256 of int64 columns, little-endian, one after another: of the labels whatever file they are in."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column.numpy(), dtype="<i8").tobytes())
    return digest.hexdigest()


def ledger(kind: str, rate: float, seed: int | None, index: Tensor, true: Tensor, label: Tensor) -> dict:
    """What was done to the labels, as plain values: type, nominal and realised rate, counts, seed and hashes."""
    changed = int((true != label).sum())
    return {
        "type": kind,
        "nominal": rate,
        "realised": changed / len(true),
        "examples": len(true),
        "changed": changed,
        "seed": seed,
        "labels_sha256": sha256(index, true, label),
        "noise_npz_sha256": hashlib.sha256(archive(index, true, label)).hexdigest(),
    }


def save(path: Path, index: Tensor, true: Tensor, label: Tensor) -> None:
    """Write `archive` to `path`."""
    Path(path).write_bytes(archive(index, true, label))
