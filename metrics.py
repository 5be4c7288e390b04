"""What is measured, as pure functions of tensors: cotangents at the logits, their gradients, and arithmetic on those.

Every gradient is the same forward pulled back along another cotangent; every norm and cosine comes from the Gram
matrix of such gradients. Letters: B examples of the global batch, K classes, P parameters, V gradients ("rows");
C and N the clean and the noisy examples, f = |C| / B.
"""

import torch
from torch import Tensor

CHUNK = 1 << 22  # parameters taken to float64 at a time: bounds the Gram matrix's memory to V x 32 MiB


def cotangent(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """d/dlogits of sum_i weights_i * cross-entropy_i: U (B, K) with U_i = w_i (softmax(z_i) - onehot(label_i)).

    `logits` (B, K) float, `labels` (B,) int64, `weights` (B,) float of the logits' dtype. Detached.
    """
    U = logits.detach().softmax(1)
    U.scatter_add_(1, labels[:, None], torch.full_like(U[:, :1], -1.0))
    return U.mul_(weights[:, None])


def pull_back(logits: Tensor, parameters: list[Tensor], cotangents: list[Tensor]) -> list[list[Tensor]]:
    """Gradients U^T dz/dtheta, one row (a list of P-shaped tensors, as `parameters`) for each cotangent (B, K).

    One vector-Jacobian product each (2F); the graph of `logits` is freed with the last. A parameter that the logits
    do not depend on gets zeros.
    """
    last = len(cotangents) - 1
    return [
        list(
            torch.autograd.grad(
                logits, parameters, U, retain_graph=v < last, allow_unused=True, materialize_grads=True
            )
        )
        for v, U in enumerate(cotangents)
    ]


def gram(rows: list[list[Tensor]]) -> Tensor:
    """Inner products (V, V) float64 of V gradients, each a list of tensors. Summed in float64, CHUNK by CHUNK."""
    G = rows[0][0].new_zeros(len(rows), len(rows), dtype=torch.float64)
    for same in zip(*rows, strict=True):  # one parameter's part of every row
        flat = [part.reshape(-1) for part in same]
        for a in range(0, flat[0].numel(), CHUNK):
            M = torch.stack([part[a : a + CHUNK] for part in flat]).double()  # (V, <= CHUNK)
            G += M @ M.T
    return G


def add_rows(rows: list[list[Tensor]]) -> list[Tensor]:
    """The sum of the gradients, as a list of tensors: clean + noisy is the training gradient."""
    total = rows[0]
    for row in rows[1:]:
        total = torch._foreach_add(total, row)
    return list(total)


def cosine(G: Tensor, i: int, j: int) -> Tensor:
    """cos of rows i and j from their Gram matrix; NaN where a row is zero."""
    return G[i, j] / (G[i, i].sqrt() * G[j, j].sqrt())


def set_means(G: Tensor, f: float) -> Tensor:
    """Gram matrix (3, 3) of (g_C, g_N, g), g_C and g_N the mean gradients over C and N.

    `G` is that of ((1/B) sum over C, (1/B) sum over N), (2, 2), and then g is their sum (measurements.md, section 1:
    g = f g_C + (1 - f) g_N); or it is (3, 3) with another g as the third row, taken as it is.
    """
    A = torch.tensor([[1 / f, 0, 0], [0, 1 / (1 - f), 0], [0, 0, 1]], dtype=G.dtype, device=G.device)
    if len(G) == 2:
        A = A[:, :2].clone()
        A[2] = 1
    return A @ G @ A.T


def split_measures(G: Tensor) -> dict[str, Tensor]:
    """`grad/*` of the split from the Gram matrix (3, 3) of (g_C, g_N, g), both C and N not empty.

    `grad/cos_clean_all` = cos(g_C, g) is the report's (section 4.2, figures 7-9 and 16).
    """
    return {
        "grad/cos_clean_all": cosine(G, 0, 2),
        "grad/cos_clean_noisy": cosine(G, 0, 1),
        "grad/norm_clean": G[0, 0].sqrt(),
        "grad/norm_noisy": G[1, 1].sqrt(),
        "grad/norm_all": G[2, 2].sqrt(),
    }


def one_sided_measures(square: Tensor, n_noisy: int) -> dict[str, Tensor]:
    """`grad/norm_*` of a batch all clean or all noisy, from |g|^2. Cosines are undefined there and left out."""
    norm = square.sqrt()
    return {"grad/norm_noisy" if n_noisy else "grad/norm_clean": norm, "grad/norm_all": norm}


def batch_counts(logits: Tensor, labels: Tensor, true: Tensor) -> Tensor:
    """(3,) float64 sums over a batch: cross-entropy against `labels`, correct, correct among the noisy.

    Sums, so that ranks can add them before `batch_measures` divides. `logits` (b, K), `labels`, `true` (b,) int64.
    """
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    hit = logits.argmax(1) == labels
    return torch.stack([loss.double(), hit.sum().double(), (hit & (labels != true)).sum().double()])


def batch_measures(counts: Tensor, B: int, n_noisy: int) -> dict[str, Tensor]:
    """`train/*` from summed `batch_counts` (3,): mean loss and accuracies. An empty set's accuracy is left out.

    `train/acc_noisy` is the share of the noisy examples predicted as the label they carry (the report, 4.3).
    """
    loss, hit, hit_noisy = counts
    values = {"train/loss": loss / B, "train/acc": hit / B}
    if n_noisy < B:
        values["train/acc_clean"] = (hit - hit_noisy) / (B - n_noisy)
    if n_noisy > 0:
        values["train/acc_noisy"] = hit_noisy / n_noisy
    return values


def temperature(lr: float, B: int, momentum: float) -> float:
    """lr / (B (1 - momentum)), the noise scale of SGD (Jastrzebski et al. 2018; Smith & Le 2018)."""
    return lr / (B * (1 - momentum))
