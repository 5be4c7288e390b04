"""Label noise: one function for each type, entered in `NOISES`.

A generator of noise is one function (true labels (n,) int64, K, rate, generator) -> labels (n,) int64, with a further
argument for each thing that its entry says it needs (`images`, `flips`, `matrix`). "Noisy" always means label != true
label: a re-drawn label that came out as the true one is clean. `rate` is always the nominal share: exactly
round(rate n) examples are selected, and the law of the type is applied to those.

Shapes: n examples of the training split, K classes, D values of an image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import data
from data import generator


def select(n: int, rate: float, g: torch.Generator) -> Tensor:
    """Exactly round(rate n) of `n` positions, (m,) int64, each set of that size being equally likely."""
    return torch.randperm(n, generator=g)[: round(rate * n)]


def uniform(true: Tensor, K: int, rate: float, g: torch.Generator) -> Tensor:
    """Exactly round(rate n) of the `n` examples get a label drawn uniformly from all K classes, their own included.

    The report's noise (section 3), so a share of about rate (K - 1) / K ends up wrong.
    `true` (n,) int64 -> (n,) int64.
    """
    selected = select(len(true), rate, g)
    labels = true.clone()
    labels[selected] = torch.randint(K, selected.shape, generator=g)
    return labels


def symmetric(true: Tensor, K: int, rate: float, g: torch.Generator) -> Tensor:
    """Exactly round(rate n) examples get a label drawn uniformly from the K - 1 wrong classes.

    `true` (n,) int64 -> (n,) int64. Source: Patrini et al. 2017 (1609.03683), section 5.
    """
    selected = select(len(true), rate, g)
    labels = true.clone()
    labels[selected] = (true[selected] + torch.randint(1, K, selected.shape, generator=g)) % K
    return labels


def pair(true: Tensor, K: int, rate: float, g: torch.Generator) -> Tensor:
    """Exactly round(rate n) examples of class k get k + 1, the last class 0.

    `true` (n,) int64 -> (n,) int64. Source: pair flipping of Han et al. 2018 (1804.06872), section 4.
    """
    return asymmetric(true, K, rate, g, (torch.arange(K) + 1) % K)


def asymmetric(true: Tensor, K: int, rate: float, g: torch.Generator, flips: Tensor) -> Tensor:
    """Exactly round(rate n) examples get the class that theirs is taken for, `flips` (K,) int64.

    One look-up at the true label, so that no example flips twice where the map runs on (cat -> dog -> cat). A class
    that maps to itself keeps its labels, so the share of wrong labels is the rate times the share of the other
    classes. `true` (n,) int64 -> (n,) int64. Source: Patrini et al. 2017 (1609.03683), section 5.
    """
    selected = select(len(true), rate, g)
    labels = true.clone()
    labels[selected] = flips[true[selected]]
    return labels


def by_matrix(true: Tensor, K: int, rate: float, g: torch.Generator, matrix: Tensor) -> Tensor:
    """Exactly round(rate n) examples get a label drawn from their class's row of `matrix` (K, K) float64.

    At rate 1 the labels follow the matrix itself, at another rate (1 - rate) I + rate `matrix`. A class of
    probability 0 is never drawn. `true` (n,) int64 -> (n,) int64.
    """
    return by_rows(true, rate, g, lambda k: (torch.arange(K), matrix[k]))


def by_counts(true: Tensor, of: Tensor, given: Tensor, K: int, g: torch.Generator) -> Tensor:
    """Labels (n,) int64 drawn by the transition matrix that the labels `given` (m,) of examples of the classes `of` (m,) realise.

    What `by_matrix` draws from their counts, without a K x K matrix. A class that `of` lacks keeps its labels.
    `true` (n,) int64 -> (n,) int64.
    """
    of, order = of.sort()
    rows = given[order].split(torch.bincount(of, minlength=K).tolist())

    def row(k: int) -> tuple[Tensor, Tensor]:
        classes, counts = rows[k].unique(return_counts=True)
        return (classes, counts.double()) if len(classes) else (torch.tensor([k]), torch.ones(1, dtype=torch.float64))

    return by_rows(true, 1.0, g, row)


def by_rows(true: Tensor, rate: float, g: torch.Generator, row: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
    """`by_matrix` with class k's row as `row(k)`: classes (r,), sorted, and their weights (r,) float64."""
    selected = select(len(true), rate, g)
    of, labels = true[selected], true.clone()
    u = torch.rand(len(of), generator=g, dtype=torch.float64)
    for k in of.unique().tolist():
        mine, (classes, weights) = of == k, row(k)
        upto = weights.cumsum(0)
        upto = upto / upto[-1]  # exactly 1 at the end, so that u < 1 finds a class
        labels[selected[mine]] = classes[torch.searchsorted(upto, u[mine], right=True)]
    return labels


SPREAD = 0.1  # standard deviation of the instance noise's flip rates, as in the paper
BLOCK = 1000  # images projected at a time, fewer if they are larger than 32 x 32 in colour


def flip_rates(n: int, rate: float, g: torch.Generator) -> Tensor:
    """Flip probabilities (n,) float64: normal around `rate` with deviation 0.1, truncated to 0..1, sum round(rate n).

    Truncation pulls the mean of such rates away from `rate` (to 0.2055 for 0.2, to 0.10 for 0.05); they are scaled
    towards 0, or their complements towards 0, to make it exact.
    """
    low, high = (torch.special.ndtr(torch.tensor((edge - rate) / SPREAD, dtype=torch.float64)) for edge in (0, 1))
    u = torch.rand(n, generator=g, dtype=torch.float64)
    q = (rate + SPREAD * torch.special.ndtri(low + u * (high - low))).clamp(0, 1)
    want, have = round(rate * n), float(q.sum())
    return q * (want / have) if want <= have else 1 - (1 - q) * ((n - want) / (n - have))


def draw_exactly(q: Tensor, g: torch.Generator) -> Tensor:
    """Sum q positions (m,) of `q` (n,), position i among them with probability q_i: exactly as many every time.

    Systematic sampling (Madow 1949) in random order; the sum must be whole.
    """
    order = torch.randperm(len(q), generator=g)
    upto = q[order].cumsum(0)
    upto[-1] = round(float(upto[-1]))
    steps = (upto + torch.rand((), generator=g, dtype=torch.float64)).floor()
    return order[steps.diff(prepend=steps.new_zeros(1)) > 0]


def instance(true: Tensor, K: int, rate: float, g: torch.Generator, images: Tensor) -> Tensor:
    """Exactly round(rate n) examples get a wrong label that depends on what is in the image.

    Each example has a flip probability of its own (`flip_rates`). The label comes from softmax(x W[k]) without the
    true class k, x (D,) the flattened image with mean and deviation of these n images taken out, not of the whole set
    (so another split changes labels), W[k] (D, K) standard normal: similar images of a class get similar labels.
    `images` (n, H, W, C) uint8, `true` (n,) int64 -> (n,) int64. Holds BLOCK images and one class's W at a time, in
    float64 for the same labels under any number of threads.
    Source: the part-dependent noise of Xia et al. 2020 (2006.07836), algorithm 2, in the form common since (whole
    image as one part).
    """
    n, labels = len(true), true.clone()
    if rate == 0:
        return labels
    selected = draw_exactly(flip_rates(n, rate, g), g).sort().values
    u = torch.rand(n, 1, generator=g, dtype=torch.float64)
    mean, std = (torch.tensor(s, dtype=torch.float64) * 255 for s in data.pixel_statistics(images))
    block = min(BLOCK, max(1, BLOCK * 32 * 32 * 3 // images[0].numel()))
    for k in range(K):
        W = torch.randn(images[0].numel(), K, generator=g, dtype=torch.float64)
        for some in selected[true[selected] == k].split(block):
            x = ((images[some].double() - mean) / std).flatten(1)  # (m, D)
            score = x @ W  # (m, K)
            score[:, k] = -torch.inf
            upto = score.softmax(1).cumsum(1)
            labels[some] = (upto / upto[:, -1:] <= u[some]).sum(1)
    return labels


def dynamic(true: Tensor, K: int, rate: float, seed: int, epoch: int) -> Tensor:
    """Labels (n,) of one epoch of noise that is never the same twice: `uniform`, drawn anew for every epoch.

    An epoch visits each example once, so every batch sees a fresh draw, as in label-noise SGD (Damian et al. 2021,
    2106.06530). A function of the seed and the epoch: batches on any number of devices are slices of it.
    """
    return uniform(true, K, rate, generator(seed, "dynamic", epoch))


def uniform_matrix(K: int, rate: float) -> Tensor:
    """The transition matrix (K, K) float64 that `uniform` has in expectation: (1 - rate) I + rate / K."""
    return (1 - rate) * torch.eye(K, dtype=torch.float64) + rate / K


def matched(true: Tensor, label: Tensor, K: int, g: torch.Generator) -> Tensor:
    """The given labels (n,), shuffled among the examples of each true class.

    The same transition matrix to the last example, and nothing else of what `label` knew of the images.
    `true`, `label` (n,) int64 -> (n,) int64.
    """
    labels = label.clone()
    for k in range(K):
        mine = (true == k).nonzero().squeeze(1)
        labels[mine] = label[mine[torch.randperm(len(mine), generator=g)]]
    return labels


@dataclass(frozen=True)
class Noise:
    """A type of noise and what it needs.

    `draw`: the generator; for a type that needs a "file", (true, label, K, generator) -> labels made of the file's, or None
    where they are taken as they are. `needs`: further arguments of the generator ("flips": the data set's map of classes
    taken for one another, "images", "matrix": the option's), or "file" and "label set" for the options that name them.
    `by_epoch`: (true, K, rate, seed, epoch) -> labels, in place of `draw` for labels that are drawn anew each epoch; a
    noise.npz stores rate and seed of `dynamic` alone. `expected`: (K, rate) -> the transition matrix (K, K) that these have
    in expectation, for losses that need one. `reaches_one`: whether the rate may be 1.
    """

    draw: Callable[..., Tensor] | None
    needs: frozenset[str] = frozenset()
    by_epoch: Callable[..., Tensor] | None = None
    expected: Callable[[int, float], Tensor] | None = None
    reaches_one: bool = True

    @property
    def from_file(self) -> bool:
        """Whether labels and rate are those of --noise-file."""
        return "file" in self.needs


NOISES = {  # a new noise is one function, entered here
    "uniform": Noise(uniform),
    "symmetric": Noise(symmetric),
    "pair": Noise(pair),
    "asymmetric": Noise(asymmetric, frozenset({"flips"})),
    "matrix": Noise(by_matrix, frozenset({"matrix"})),
    "instance": Noise(instance, frozenset({"images"}), reaches_one=False),
    "dynamic": Noise(None, by_epoch=dynamic, expected=uniform_matrix),
    "human": Noise(None, frozenset({"file", "label set"})),
    "file": Noise(None, frozenset({"file"})),
    "matched": Noise(matched, frozenset({"file"})),
}


def apply(kind: str, true: Tensor, K: int, rate: float, seed: int, **more: Tensor) -> Tensor:
    """Labels (n,) to train on: noise `kind` at the nominal `rate`, from the noise seed's own stream."""
    draw = NOISES[kind].draw
    assert draw is not None, f"{kind} takes its labels from a file"
    return draw(true, K, rate, generator(seed, "noise"), **more)
