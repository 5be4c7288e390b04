"""Losses of single examples: one function each, entered in `LOSSES`.

A loss is one function (logits (B, K), labels (B,) int64) -> (B,), each example's own, in the logits' float32 or float64, with
a further argument for each of the numbers that its entry takes and, last, the transition matrix where it needs one. A run's
loss is the mean over the batch, and everything that is measured of gradients is measured of it.

Letters: p = softmax(logits), y the label trained on, e_y its unit vector, T (K, K) the matrix: T[k, y] is the probability
that an example of the true class k has the label y.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- the losses, (B,) each


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y."""
    return F.cross_entropy(logits, labels, reduction="none")


def smooth(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """Cross-entropy against (1 - `share`) e_y + `share` / K (label smoothing: Szegedy et al. 2016, 1512.00567, section 7)."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=share)


def mae(logits: Tensor, labels: Tensor) -> Tensor:
    """|e_y - p|_1 = 2 (1 - p_y), the mean absolute error (Ghosh, Kumar & Sastry 2017, 1712.09482)."""
    return -2 * torch.expm1(log_of_label(logits, labels))


def gce(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """(1 - p_y^q) / q, the generalized cross-entropy (Zhang & Sabuncu 2018, 1805.07836): the cross-entropy as q -> 0, half of
    `mae` at q = 1."""
    return -torch.expm1(q * log_of_label(logits, labels)) / q


LOG_OF_0 = -4.0  # A of the symmetric cross-entropy, which stands for log 0


def sce(logits: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha CE + beta RCE, the symmetric cross-entropy (Wang et al. 2019, 1908.06112).

    RCE = -sum_k p_k log(e_y)_k with A = -4 for log 0, which is 4 (1 - p_y).
    """
    log_p = log_of_label(logits, labels)
    return LOG_OF_0 * beta * torch.expm1(log_p) - alpha * log_p


def forward(logits: Tensor, labels: Tensor, matrix: Tensor) -> Tensor:
    """-log (T^T p)_y, the forward correction: p is of the true class (Patrini et al. 2017, 1609.03683, theorem 2).

    A label that the matrix gives to no class says nothing: its loss is log K, whatever p is.
    """
    return -torch.logsumexp(log_joint(logits, labels, matrix), 1)


def log_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y, (B,)."""
    return logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)


def log_joint(logits: Tensor, labels: Tensor, matrix: Tensor) -> Tensor:
    """log (T[k, y] p_k), (B, K); with 1 / K for T[k, y] where no class has the label y."""
    given = matrix.to(logits.dtype).T[labels]
    given = torch.where(given.sum(1, keepdim=True) > 0, given, 1 / logits.shape[1])
    return given.log() + logits.log_softmax(1)


# ------------------------------------------------------------------------------- their gradients at the logits, (B, K) each


def weighted(logits: Tensor, labels: Tensor, weights: Tensor | float) -> Tensor:
    """`weights` (B, 1) times the cross-entropy's gradient p - e_y; what depends on p_y alone has a gradient of this form."""
    return plus_at_label(logits.softmax(1), labels, -1.0) * weights


def plus_at_label(U: Tensor, labels: Tensor, x: float) -> Tensor:
    """U (B, K) with x added to each row's entry of its label; nothing waits for a GPU."""
    return U.scatter_add(1, labels[:, None], torch.full_like(U[:, :1], x))


def of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """p_y, (B, 1)."""
    return logits.softmax(1).gather(1, labels[:, None])


def smooth_gradient(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """p - (1 - share) e_y - share / K."""
    return plus_at_label(logits.softmax(1), labels, share - 1) - share / logits.shape[1]


def mae_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """2 p_y (p - e_y)."""
    return weighted(logits, labels, 2 * of_label(logits, labels))


def gce_gradient(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """p_y^q (p - e_y)."""
    return weighted(logits, labels, of_label(logits, labels) ** q)


def sce_gradient(logits: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """(alpha + 4 beta p_y) (p - e_y)."""
    return weighted(logits, labels, alpha - LOG_OF_0 * beta * of_label(logits, labels))


def forward_gradient(logits: Tensor, labels: Tensor, matrix: Tensor) -> Tensor:
    """p minus the posterior of the true class given the label, T[k, y] p_k / (T^T p)_y."""
    return logits.softmax(1) - log_joint(logits, labels, matrix).softmax(1)


# ---------------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Value:
    """A number that a loss takes: its name, its default, and what it may be, in words and as a test."""

    name: str
    default: float
    what: str
    holds: Callable[[float], bool]


@dataclass(frozen=True)
class Loss:
    """A loss and what others need of it.

    `each`: (logits (B, K), labels (B,), ...) -> (B,). `about`: what the option's help says. `gradient`: of the same arguments
    its derivative (B, K) at the logits, in closed form; without one it is differentiated there. `values`: the numbers of
    `--loss NAME:VALUE,VALUE`. `matrix`: whether it takes the transition matrix (K, K), the run's own or that of
    `--loss NAME:FILE`; such a loss takes no numbers.
    """

    each: Callable[..., Tensor]
    about: str
    gradient: Callable[..., Tensor] | None = None
    values: tuple[Value, ...] = ()
    matrix: bool = False


NOT_NEGATIVE = "a number from 0", lambda x: x >= 0
LOSSES = {  # a new loss is one function, entered here
    "ce": Loss(cross_entropy, "cross-entropy", lambda logits, labels: weighted(logits, labels, 1.0)),
    "smooth": Loss(
        smooth,
        "label smoothing",
        smooth_gradient,
        (Value("share", 0.1, "a number from 0 to below 1", lambda x: 0 <= x < 1),),
    ),
    "mae": Loss(mae, "mean absolute error", mae_gradient),
    "gce": Loss(
        gce,
        "generalized cross-entropy",
        gce_gradient,
        (Value("q", 0.7, "a number above 0, at most 1", lambda x: 0 < x <= 1),),
    ),
    "sce": Loss(
        sce,
        "symmetric cross-entropy",
        sce_gradient,
        (Value("alpha", 0.1, *NOT_NEGATIVE), Value("beta", 1.0, *NOT_NEGATIVE)),
    ),
    "forward": Loss(
        forward, "forward correction by the run's own transition matrix or FILE's", forward_gradient, matrix=True
    ),
}


def spelled(name: str) -> str:
    """How the loss `name` is given: `gce:q`."""
    entry = LOSSES[name]
    values = ",".join(value.name for value in entry.values) or "FILE" * entry.matrix
    return f"{name}:{values}" if values else name


@dataclass(frozen=True, eq=False)
class ExampleLoss:
    """A loss with its numbers and its matrix: (logits (B, K), labels (B,) int64) -> (B,), in float32 or the logits' float64."""

    entry: Loss
    given: tuple[float, ...] = ()
    matrix: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.entry.each(*self.arguments(logits, labels))

    @property
    def gradient(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """(logits, labels) -> derivative (B, K) at the logits; None where the entry has none."""
        closed_form = self.entry.gradient
        if closed_form is None:
            return None
        return lambda logits, labels: closed_form(*self.arguments(logits, labels))

    def arguments(self, logits: Tensor, labels: Tensor) -> tuple:
        """What the entry's functions are called with."""
        full = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return (full, labels, *self.given, *([] if self.matrix is None else [self.matrix]))


def build_loss(text: str, matrix: Tensor | None = None) -> ExampleLoss | None:
    """The loss of a checked `--loss`, with the `matrix` (K, K) if it takes one; None for the cross-entropy, which the training
    step and the measurements have themselves."""
    name, _, given = text.partition(":")
    entry = LOSSES[name]
    if entry.each is cross_entropy:
        return None
    return ExampleLoss(entry, tuple(map(float, given.split(","))) if entry.values else (), matrix)
