"""Data sets that live on the device, one permutation an epoch, and the random streams everything draws from.

A set in host memory (`Source`, made by datasets.py) is split (`split`), and its images are put on the device as uint8 once
(`Images`). An epoch is planned on the CPU in one go (`TrainSet.epoch`): which example comes when, under which crop
and flip. A batch is then a gather of whole pixel rows, without a DataLoader and without a wait for the device.

Shapes: N examples of the set, n of a split, B of a batch, K classes, C channels, H x W pixels.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradsplit import Batch, copy_to, generator, stream_seed  # noqa: F401 - random streams and batches are known by this module's name, too

VAL_FRAC = 0.2  # share of the training set that is held out where --val-frac does not say
PAD = 4  # pixels of zero padding on each side, as RandomCrop(32, padding=4)
BLOCK = 1 << 20  # pixels put on the device at a time


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line that names the option or file; exit status 2."""


QUOTED = 200  # characters of another's text that a message repeats
# Control characters, ends of lines, those that turn the direction of writing, surrogates (bytes of a file name that are no UTF-8).
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff]"
)


def printable(text: object) -> str:
    """Any text in one line that every terminal and file format can hold; what has no printed form is spelled out: \\x1b, \\xff."""

    def spell(m: re.Match) -> str:
        code = ord(m[0]) - (0xDC00 if 0xDC80 <= ord(m[0]) <= 0xDCFF else 0)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return UNPRINTABLE.sub(spell, re.sub(r"[ \t\r\n]+", " ", str(text)).strip())


def cut(text: str) -> str:
    """A text of more than QUOTED characters without its middle."""
    return text if len(text) <= QUOTED else f"{text[: QUOTED // 2]}...{text[3 - QUOTED // 2 :]}"


def one_line(quoted: object) -> str:
    """What a message quotes of another's making, as one printable line of at most QUOTED characters: the reason of an exception
    (the system's, else its own first line, else its name), a file's bytes, or any text."""
    if isinstance(quoted, BaseException):
        lines = str(getattr(quoted, "strerror", None) or quoted).strip().splitlines()
        quoted = lines[0] if lines else type(quoted).__name__
    return cut(printable(quoted.decode(errors="backslashreplace") if isinstance(quoted, bytes) else quoted))


# ------------------------------------------------------------------------------------------------------ loading a set


class Source(NamedTuple):
    """A data set in host memory.

    `x_train` (N, H, W, C) uint8, `y_train` (N,) int64 true labels, `given` (N,) int64 labels that came with the set
    to be trained on, or None; `x_test`, `y_test` likewise. `mean`, `std` (C,) float per channel, of pixels in 0..1.
    `flips` (K,) int64 is the class that each class is taken for (itself if for none), or None where nobody knows.
    `x_val`, `y_val`: a validation set that the set brings, or None. `stored` (M,) int64, sorted: the examples whose images
    `x_train` (M, H, W, C) then holds, None for all. `names` (N,): the files of the training examples, where there are such.
    `digest` identifies the files' images, None for a published or drawn set. `notes`: lines to be shown at the start.
    """

    x_train: Tensor
    y_train: Tensor
    given: Tensor | None
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: Tensor | None = None
    x_val: Tensor | None = None
    y_val: Tensor | None = None
    stored: Tensor | None = None
    names: tuple[str, ...] | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()

    def positions(self, index: Tensor) -> Tensor:
        """Where in `x_train` the images of the training examples `index` (n,) are."""
        return index if self.stored is None else torch.searchsorted(self.stored, index)

    def images(self, index: Tensor) -> Tensor:
        """Those of the training examples `index` (n,), (n, H, W, C) uint8."""
        return self.x_train[self.positions(index)]

    def validation(self, held: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images (N, H, W, C) uint8, which of them (m,), None for all, and their true labels (m,) int64: the set's own or, without
        these, those of the training examples `held` (m,)."""
        if self.x_val is not None and self.y_val is not None:
            return self.x_val, None, self.y_val
        return self.x_train, self.positions(held), self.y_train[held]


def flip_map(classes: tuple[str, ...], taken_for: dict[str, str]) -> Tensor:
    """`Source.flips` (K,) from names: each class of `taken_for` becomes its value, the others themselves."""
    return torch.tensor([classes.index(taken_for.get(name, name)) for name in classes])


def pixel_statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (C,) of uint8 images (N, H, W, C), for pixels in 0..1. Exact, from counts."""
    C = x.shape[-1]
    values = torch.arange(256, dtype=torch.float64) / 255
    count = torch.stack([torch.bincount(x[..., c].reshape(-1), minlength=256) for c in range(C)]).double()
    share = count / count.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp_min(1 / 255).tolist())


def drawn(N: int, seed: int, subset: int | None = None) -> Tensor:
    """Indices of all of `N` examples, or of `subset` drawn from them; sorted. Raises `InputError` if there are too few."""
    if subset is None:
        return torch.arange(N)
    if subset > N:
        raise InputError(f"--subset {subset}: the training set has only {N} examples")
    return torch.randperm(N, generator=generator(seed, "subset"))[:subset].sort().values


def split(N: int, val_frac: float, seed: int, subset: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices (n,), (N - n,) int64 of the training and the validation split of `N` examples (or of `subset` drawn).

    round(val_frac N) examples are held out. Both lists are sorted. Raises `InputError` if either would be empty.
    """
    chosen = drawn(N, seed, subset)
    order = chosen[torch.randperm(len(chosen), generator=generator(seed, "split"))]
    held = round(val_frac * len(order))
    if held == 0 or held == len(order):
        raise InputError(f"--val-frac {val_frac}: leaves {len(order) - held} training and {held} validation examples")
    return order[held:].sort().values, order[:held].sort().values


# ------------------------------------------------------------------------------------------------------- on the device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Images:
    """uint8 images on a device, cut out of a padded copy by whole rows of pixels.

    A gather of rows through an overlapping view reads each crop's pixels in runs of W * C bytes, an order of
    magnitude cheaper on a CPU than advanced indexing pixel by pixel; a second, mirrored copy makes the flip free.
    Memory: (H + 2 pad)(W + 2 pad) C bytes an image, twice that with `mirror`.
    """

    def __init__(
        self, images: Tensor, mean, std, device, pad: int = 0, mirror: bool = False, index: Tensor | None = None
    ) -> None:
        """`images` (N, H, W, C) uint8, those at `index` (n,) or all; `mean`, `std` (C,) of pixels in 0..1."""
        index = torch.arange(len(images)) if index is None else index
        self.n, (self.H, self.W, self.C) = len(index), images.shape[1:]
        self.pad, self.width, self.height = pad, self.W + 2 * pad, self.H + 2 * pad
        copies = 2 if mirror else 1  # written in place, for the whole set is never to be there twice
        buffer = torch.zeros(copies * self.n, self.height, self.width, self.C, dtype=torch.uint8, device=device)
        inside = buffer.narrow(1, pad, self.H).narrow(2, pad, self.W)  # black around it, before normalisation
        block = max(1, BLOCK // (self.H * self.W))  # images
        for a in range(0, self.n, block):
            some = images[index[a : a + block]].to(device)
            inside[a : a + len(some)] = some
            if mirror:
                inside[self.n + a : self.n + a + len(some)] = some.flip(2)
        pixels = buffer.shape[0] * self.height * self.width
        self.rows = buffer.view(-1).as_strided((pixels - self.W + 1, self.W * self.C), (self.C, 1))
        self.row_step = torch.arange(self.H, device=device) * self.width
        scale = torch.tensor([mean, std], dtype=torch.float64)[..., None, None] * 255  # rounded once, to what x has
        self.mean, self.std = scale.to(device, torch.get_default_dtype())

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        return self.rows.untyped_storage().nbytes()

    def starts(self, index: Tensor, dy: Tensor | int, dx: Tensor | int, flip: Tensor | int = 0) -> Tensor:
        """Positions (B,) int64 of the first pixel of each crop: rows from dy, columns from dx, then mirrored.

        `dy`, `dx` in 0..2 pad count from the padded corner (`pad`, `pad` is the image itself), `flip` is 0 or 1.
        """
        left = dx + flip * (2 * self.pad - 2 * dx)  # the crop's left edge as it lies in the mirrored copy
        return ((index + flip * self.n) * self.height + dy) * self.width + left

    def cut(self, starts: Tensor) -> Tensor:
        """The crops (B, C, H, W) uint8 at `starts` (B,), channels_last in memory."""
        where = (starts[:, None] + self.row_step).view(-1)  # (B * H,)
        return self.rows.index_select(0, where).view(-1, self.H, self.W, self.C).permute(0, 3, 1, 2)

    def normalise(self, x: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> the default dtype at construction, the set's mean and deviation taken out."""
        return x.to(self.mean.dtype).sub_(self.mean).div_(self.std)

    def whole(self, index: Tensor) -> Tensor:
        """The images at `index` (B,) as they are, (B, C, H, W) uint8."""
        return self.cut(self.starts(index.to(self.rows.device), self.pad, self.pad))

    def plain(self, index: Tensor) -> Tensor:
        """The images at `index` (B,) as they are, normalised, (B, C, H, W)."""
        return self.normalise(self.whole(index))


class Epoch(NamedTuple):
    """One epoch's plan, by position in the epoch: `index` and `starts` (n,) int64, `labels`, `true` (n,) int64 and
    `noisy` (n,) bool on the device; `host_labels` and `host_noisy` are the same on the CPU, so that the host knows
    each batch's composition without asking the device."""

    index: Tensor
    starts: Tensor
    labels: Tensor
    true: Tensor
    noisy: Tensor
    host_labels: Tensor
    host_noisy: Tensor


def shard(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The positions [a, b) of `size` that belong to `rank`: disjoint, in order, all of them, possibly none."""
    return rank * size // world_size, (rank + 1) * size // world_size


class TrainSet:
    """The training split on the device. `labels` are trained on, `true` are the truth; noisy means that they differ,
    unless a mask (n,) bool says which examples are to be called noisy (an A/A run's fake one)."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        true: Tensor,
        mean,
        std,
        device,
        augment: bool,
        mask: Tensor | None = None,
        by_epoch: Callable[[int], Tensor] | None = None,
        index: Tensor | None = None,
    ) -> None:
        """`images` (N, H, W, C) uint8, those at `index` (n,) or all, their `labels` and `true` (n,) int64; all on the CPU.

        `by_epoch`, epoch -> labels (n,), takes the place of `labels` where they change with the epoch; no example is
        noisy for good then, and what looks at single examples sees the true labels.
        """
        self.by_epoch, self.mask = by_epoch, mask
        labels = labels if by_epoch is None else true
        self.pad = PAD if augment else 0
        self.images = Images(images, mean, std, device, self.pad, augment, index)
        self.labels, self.true, self.device, self.augment = labels, true, device, augment
        self.noisy = labels != true if mask is None else mask

    def __len__(self) -> int:
        return self.images.n

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """Order, crops and flips of an epoch, drawn at once on the CPU and then copied to the device.

        Crop offsets are uniform over (2 pad + 1)^2 and the flip has probability 1/2, independently for each example,
        as torchvision's RandomCrop(H, padding=4) and RandomHorizontalFlip.
        """
        n = len(self)
        index = torch.randperm(n, generator=generator(seed, "order", epoch))
        dy = dx = flip = 0
        if self.augment:
            g = generator(seed, "augment", epoch)
            dy, dx = torch.randint(2 * self.pad + 1, (2, n), generator=g)
            flip = torch.randint(2, (n,), generator=g)
        labels, true = self.labels if self.by_epoch is None else self.by_epoch(epoch), self.true[index]
        labels = labels[index]
        noisy = labels != true if self.mask is None else self.mask[index]
        starts = self.images.starts(index, dy, dx, flip)
        here = [t.to(self.device, non_blocking=True) for t in (index, starts, labels, true, noisy)]
        return Epoch(here[0], here[1], here[2], here[3], here[4], labels, noisy)

    def pixels(self, starts: Tensor) -> Tensor:
        """The crops at `starts` (b,), normalised, (b, C, H, W)."""
        return self.images.normalise(self.images.cut(starts))

    def batch(self, plan: Epoch, number: int, B: int, rank: int = 0, world_size: int = 1, cut: bool = True) -> Batch:
        """Batch `number` of the epoch: positions [number B, (number + 1) B) of the plan; the last may be smaller.

        Without `cut` its `x` is what `pixels` takes, (b,) int64, for a step that cuts its images out itself.
        """
        start, size = number * B, min(B, len(self) - number * B)
        first, end = shard(size, rank, world_size)
        here, whole = slice(start + first, start + end), slice(start, start + size)
        x = self.pixels(plan.starts[here]) if cut else plan.starts[here]
        host_noisy = plan.host_noisy[whole]
        n_noisy = int(host_noisy.sum())  # a CPU tensor: nobody waits
        labels = plan.labels[here], plan.true[here], plan.noisy[here]
        return Batch(x, *labels, size, n_noisy, first, plan.host_labels[whole], host_noisy, plan.index[here])
