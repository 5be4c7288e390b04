"""The labels a run trains on: drawn by a type of `noises`, read from a file or brought by the data set, and their ledger.

Shapes: n examples of the training split, N of the whole training set, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data import InputError, Source, generator
from engine import folders, noisefile
from engine.noisefile import LabelFile, ledger
from losses import LOSSES
from noises import NOISES, Noise, apply, by_counts


@dataclass(frozen=True)
class ByEpoch:
    """Labels (n,) of an epoch, drawn anew in each: `noise.by_epoch` at its rate and seed over the `true` labels (n,) of K classes."""

    noise: Noise
    rate: float
    seed: int
    true: Tensor
    K: int

    def __call__(self, epoch: int) -> Tensor:
        return self.noise.by_epoch(self.true, self.K, self.rate, self.seed, epoch)

    @property
    def matrix(self) -> Tensor | None:
        """The transition matrix (K, K) float64 in expectation, None where it is not known."""
        return self.noise.expected(self.K, self.rate) if self.noise.expected else None


def relabel(args, source: Source, index: Tensor) -> tuple[Tensor, dict, ByEpoch | None]:
    """Labels (n,) for the training split `index` (n,) of `source`, as the options say, and their ledger.

    The third is a function epoch -> labels (n,) where they change with the epoch; the first are then epoch 0's.
    Labels that came with the set are taken as they are, unless a file is given. Raises `InputError` where options,
    files and set do not go together.
    """
    true, K, kind = source.y_train[index], len(source.classes), args.noise_type
    noise = NOISES[kind]
    if noise.from_file:
        return from_file(args, source, index)
    if source.given is not None:
        if args.noise is not None or kind != "uniform":
            option = f"--noise {args.noise}" if args.noise is not None else f"--noise-type {kind}"
            brought = folders.GIVEN if source.names else "y_train_noisy"
            raise InputError(f"{option}: {args.dataset} brings its own noisy labels ({brought})")
        labels = source.given[index]
        rate = (source.given != source.y_train).double().mean().item()
        return labels, ledger("given", rate, None, index, true, labels, K), None
    rate, seed = args.noise or 0.0, args.noise_seed
    if noise.by_epoch:
        return drawn_anew(kind, noise, rate, seed, index, true, K)
    more = class_laws(args, source)
    if "images" in noise.needs:
        more["images"] = source.images(index)
    if rate == 1 and not noise.reaches_one:
        raise InputError(f"--noise {args.noise}: {kind} noise cannot reach 1, its flip rates spread below it")
    labels = apply(kind, true, K, rate, seed, **more)
    return labels, ledger(kind, rate, seed, index, true, labels, K), None


def class_laws(args, source: Source) -> dict[str, Tensor]:
    """What the type of noise needs beside images: the map of classes or the matrix. Raises `InputError` without one."""
    needs, more = NOISES[args.noise_type].needs, {}
    if "flips" in needs:
        if source.flips is None:
            raise InputError(
                f"--noise-type {args.noise_type}: {args.dataset} has no map of classes taken for one another; "
                "use --noise-type matrix or pair"
            )
        more["flips"] = source.flips
    if "matrix" in needs:
        more["matrix"] = noisefile.read_matrix(
            args.noise_matrix, len(source.classes), f"--noise-matrix {args.noise_matrix}"
        )
    return more


def relabel_held_out(args, source: Source, indices: tuple[Tensor, Tensor], labels: Tensor) -> Tensor | None:
    """Labels (m,) of the validation images as noisy as those (n,) of the training split; None where none of these is wrong.

    For held-out training examples those that the set brings or the file holds, where it has them; else drawn by the class matrix
    that the training labels (of a first epoch) realise: the run's law but for what depends on the image. The generator is keyed by
    these labels, for a run that is repeated from its noise.npz, which need not know the noise seed. Call after `relabel`, which
    checks the options.
    """
    (index, held), noise, K = indices, NOISES[args.noise_type], len(source.classes)
    true, of = source.validation(held)[2], source.y_train[index]
    if torch.equal(of, labels):
        return None
    if len(held) and noise.from_file:
        file = noisefile.read(args.noise_file, args.noise_labels)
        at = positions(file, len(source.y_train))[held]
        if not noise.draw and bool((at >= 0).all()):
            return file.label[at]
    elif len(held) and source.given is not None:
        return source.given[held]
    return by_counts(true, of, labels, K, generator(int(noisefile.sha256(labels)[:15], 16), "noise-held-out"))


def loss_matrix(args, true: Tensor, labels: Tensor, K: int, by_epoch: ByEpoch | None = None) -> Tensor | None:
    """The transition matrix (K, K) float64 of `--loss`: its file's, or the realised one of the training split with the `true`
    labels (n,) and those trained on (n,); that in expectation where they are drawn anew each epoch. None if the loss takes none.

    A class without an example keeps its labels. Raises `InputError` where there is no such matrix, and where the file's gives
    a label that is trained on to no class.
    """
    name, _, file = args.loss.partition(":")
    if not LOSSES[name].matrix:
        return None
    if file:
        matrix = noisefile.read_matrix(file, K, f"--loss {name}:{file}")
        unknown = (matrix.sum(0) == 0) & (torch.bincount(labels, minlength=K) > 0)
        if bool(unknown.any()):
            k = int(unknown.nonzero()[0])
            raise InputError(f"--loss {args.loss}: column {k} is 0, and {int((labels == k).sum())} labels are {k}")
        return matrix
    if by_epoch is None:
        matrix = noisefile.shares(noisefile.transitions(true, labels, K))
        return torch.where(matrix.sum(1, keepdim=True) > 0, matrix, torch.eye(K).double())
    if by_epoch.matrix is None:
        raise InputError(
            f"--loss {name}: the matrix of --noise-type {args.noise_type}, drawn anew each epoch, is not known; give --loss {name}:FILE"
        )
    return by_epoch.matrix


def fake_mask(n: int, share: float, g: torch.Generator) -> Tensor:
    """A mask (n,) bool of exactly round(share n) examples: "noisy" ones whose labels are true, for an A/A run."""
    return torch.zeros(n, dtype=torch.bool).scatter(0, torch.randperm(n, generator=g)[: round(share * n)], True)


def drawn_anew(
    kind: str, noise: Noise, rate: float, seed: int, index: Tensor, true: Tensor, K: int
) -> tuple[Tensor, dict, ByEpoch]:
    """`relabel` for labels that `noise` makes anew each epoch."""
    by_epoch = ByEpoch(noise, rate, seed, true, K)
    labels = by_epoch(0)
    return labels, ledger(kind, rate, seed, index, true, labels, K, dynamic=True), by_epoch


def from_file(args, source: Source, index: Tensor) -> tuple[Tensor, dict, ByEpoch | None]:
    """`relabel` for the types that come from a file, whose true labels must be the data set's."""
    where, kind, K, true = (
        f"--noise-file {args.noise_file}",
        args.noise_type,
        len(source.classes),
        source.y_train[index],
    )
    shuffle = NOISES[kind].draw
    file = noisefile.read(args.noise_file, args.noise_labels)
    at = locate(file, source, index, args.dataset, where)
    of = source.y_train[file.known]
    if file.dynamic is not None:
        if shuffle:
            raise InputError(f"{where}: its labels are drawn anew each epoch, so there is no matrix to match")
        if file.index is None or not torch.equal(file.index, index):
            raise InputError(f"{where}: dynamic noise needs the same split (--split-seed, --val-frac, --subset)")
        return drawn_anew(kind, NOISES["dynamic"], *file.dynamic, index, true, K)
    rate = (file.label != of).double().mean().item()
    labels, seed = file.label[at], None
    if shuffle:
        seed = args.noise_seed
        labels = shuffle(true, labels, K, generator(seed, "noise"))
    return labels, ledger(kind, rate, seed, index, true, labels, K), None


def positions(file: LabelFile, N: int) -> Tensor:
    """Where in `file` each of `N` examples is, (N,) int64; -1 where it is not."""
    return torch.full((N,), -1).scatter(0, file.known, torch.arange(len(file.known)))


def locate(file: LabelFile, source: Source, index: Tensor, dataset: str, where: str) -> Tensor:
    """Positions in `file` (n,) int64 of the examples `index` (n,) of `source`; `where` is what an error names.

    Raises `InputError` unless the file's true labels, if it has any, are the set's, its labels classes of it, and none is missing.
    """
    N, K, known = len(source.y_train), len(source.classes), file.known
    size = int(known.max()) + 1
    if size > N or (file.index is None and size < N):
        raise InputError(f"{where}: is for a training set of {size} examples and {dataset} has {N}: another data set")
    different = 0 if file.true is None else int((file.true != source.y_train[known]).sum())
    if different:
        raise InputError(
            f"{where}: its true labels are not {dataset}'s for {different} of {len(known)} examples: "
            "made for another data set or in another order"
        )
    if int(file.label.max()) >= K:
        raise InputError(f"{where}: holds label {int(file.label.max())}, {dataset} has classes 0..{K - 1}")
    at = positions(file, N)
    absent = int((at[index] < 0).sum())
    if absent:
        raise InputError(
            f"{where}: has no label for {absent} of the {len(index)} training examples; "
            "use the --split-seed, --val-frac and --subset it was made with"
        )
    return at[index]
