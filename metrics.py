"""What is measured, as pure functions of tensors: all that the meter (gradsplit.py) does not need.

Letters: B examples of the global batch, K classes, P parameters, V gradients ("rows"); C and N the clean and the noisy
examples, f = |C| / B.
"""

import math

import torch
from torch import Tensor


def batch_counts(logits: Tensor, labels: Tensor, noisy: Tensor, loss: Tensor | None = None) -> Tensor:
    """(3,) float64 sums over a batch: the loss, correct, correct among the noisy.

    Sums, so that ranks can add them before `batch_measures` divides. `logits` (b, K), `labels` (b,) int64, `noisy`
    (b,) bool, `loss` 0-d, by default the cross-entropy against `labels`.
    """
    if loss is None:
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    hit = logits.argmax(1) == labels
    return torch.stack([loss.double(), hit.sum().double(), (hit & noisy).sum().double()])


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


# ------------------------------------------------------------------------------------------- estimates from disjoint parts


MOMENTS = ("cc", "nn", "cn", "ca", "aa", "var_c", "var_n", "var_a", "sq_a")  # one full measurement's, in the window
LEAST_MEASUREMENTS = 3  # in a window, for an estimate
RATIOS = {  # tag: numerator, and the two whose product's root is the denominator
    "corrected/cos_clean_noisy": ("cn", "cc", "nn"),
    "corrected/cos_clean_all": ("ca", "cc", "aa"),
    "noise_scale/clean": ("var_c", "cc", "cc"),
    "noise_scale/noisy": ("var_n", "nn", "nn"),
    "noise_scale/all": ("var_a", "sq_a", "sq_a"),
}


def corrected(window: list[list[float]]) -> tuple[dict[str, float], int]:
    """Noise-corrected cosines and noise scales from a window of `MOMENTS`, each with the ends of its 95 % interval as
    TAG_low and TAG_high; and how many are not resolved.

    Numerators and denominators are summed over the window's measurements and divided last (Spearman's correction for
    attenuation). `cc`, `nn`, `aa` are unbiased |G_C|^2, |G_N|^2, |G|^2, `cn` and `ca` the inner products of disjoint
    or corrected parts, `var_*` variance traces, `sq_a` the unbiased |G|^2 of the whole batch from its own chunks.

    An estimate is resolved if each squared norm in its denominator is positive beyond its noise: at least three
    measurements, and a mean of more than two standard errors. What is not resolved is left out: it is not 0, and a
    quotient by a number that might be 0 is no estimate. Intervals are `jackknife`'s, a noise scale's on the scale of its
    logarithm; that a denominator is resolved keeps it positive with any one measurement left out.
    """
    rows = torch.tensor([row for row in window if all(map(math.isfinite, row))], dtype=torch.float64)
    n, missing, values = len(rows), 0, dict[str, float]()
    if n < LEAST_MEASUREMENTS:
        return {}, len(RATIOS)
    mean, error = rows.mean(0), rows.std(0) / math.sqrt(n)
    sure = ((mean > 2 * error) & (mean > 0)).tolist()
    means = torch.cat([mean[None], (n * mean - rows) / (n - 1)])  # (1 + n, moments): of all, and with each one left out
    for tag, names in RATIOS.items():
        top, left, right = (MOMENTS.index(name) for name in names)
        if not (sure[left] and sure[right]):
            missing += 1
            continue
        quotients = means[:, top] / (means[:, left] * means[:, right]).sqrt()
        values[tag] = float(quotients[0])
        low, high = jackknife(quotients) if tag.startswith("corrected/") else jackknife(quotients.log()).exp()
        values |= {f"{tag}_low": float(low), f"{tag}_high": float(high)}
    return values, missing


def jackknife(estimates: Tensor) -> Tensor:
    """(2,) ends of the 95 % interval of an estimate, from (1 + n,): of n measurements, and n times with another one left out.

    The estimate plus and minus Student's quantile of n - 1 degrees of freedom times the jackknife's standard error
    (Tukey 1958; Efron & Tibshirani 1993, chapter 11).
    """
    from scipy.special import stdtrit  # a third of a second, which few runs need

    n = len(estimates) - 1
    half = float(stdtrit(n - 1, 0.975)) * (n - 1) ** 0.5 * estimates[1:].std(correction=0)
    return torch.stack([estimates[0] - half, estimates[0] + half])


def effective_dimension(rows_gram: Tensor) -> Tensor:
    """ED = (tr S)^2 / tr(S^2), 0-d, of the covariance S of rows, from the Gram matrix (m, m) of m of them: in how many
    directions they scatter evenly, also where these are many more than m.

    tr S and tr(S^2) without bias, from pairs, triples and quadruples of different rows (Chen, Zhang & Zhong 2010, JASA 105;
    Chun et al. 2026, arXiv 2509.26560). NaN, not resolved, if the second is not positive or m < 4. Never clamped.
    """
    m = len(rows_gram)
    if m < 4:
        return rows_gram.new_tensor(math.nan)
    off = rows_gram - rows_gram.diagonal().diag()
    s2, total = off.square().sum(), off.sum()
    s3 = off.sum(1).square().sum() - s2  # over i, j, k all different: O_ij O_jk
    s4 = total**2 - 2 * s2 - 4 * s3  # over i, j, k, l all different: O_ij O_kl
    pairs = m * (m - 1)
    T1 = rows_gram.trace() / m - total / pairs
    T2 = s2 / pairs - 2 * s3 / (pairs * (m - 2)) + s4 / (pairs * (m - 2) * (m - 3))
    return torch.where(T2 > 0, T1**2 / T2, torch.full_like(T2, math.nan))


def participation(rows_gram: Tensor) -> Tensor:
    """PR = (tr M)^2 / tr(M^2) of the centred Gram matrix M (m, m) of m rows, at most m - 1.

    It mixes how many directions the rows scatter in with how much their norms vary, and is secondary to
    `effective_dimension`.
    """
    m = len(rows_gram)
    centre = torch.eye(m, dtype=rows_gram.dtype, device=rows_gram.device) - 1 / m
    M = centre @ rows_gram @ centre
    return M.trace() ** 2 / (M * M).sum()


def isotropic_participation(m: int, P: int) -> float:
    """The participation ratio to expect of m isotropic Gaussian rows in P dimensions, about m - 1.

    M has the spectrum of a Wishart matrix of m - 1 rows: (E tr M)^2 / E tr M^2 = (m - 1) P / (P + m).
    """
    return (m - 1) * P / (P + m)


def auc(positive: Tensor, negative: Tensor) -> float:
    """Share of (positive, negative) pairs in which the positive scores higher, ties half: the area under the ROC curve.

    Mann & Whitney's U from ranks; 1-d tensors. NaN if either is empty.
    """
    n, m = len(positive), len(negative)
    if not n or not m:
        return math.nan
    scores, place = torch.cat([positive, negative]).double().sort()
    _, group, size = scores.unique_consecutive(return_inverse=True, return_counts=True)
    last = size.cumsum(0).double()
    rank = (last - (size.double() - 1) / 2)[group]  # ties share their mean rank, counted from 1
    return float((rank[place < n].sum() - n * (n + 1) / 2) / (n * m))


# ------------------------------------------------------------------------------------------------------- single examples


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the largest other one, (n,); its mean over epochs is the area under the margin.

    `logits` (n, K), `labels` (n,) int64. Source: Pleiss et al. 2020 (2001.10528), equations 1 and 2.
    """
    own = logits.gather(1, labels[:, None])
    return (own - logits.scatter(1, labels[:, None], -math.inf).amax(1, keepdim=True)).squeeze(1)


DENSE = 1000  # classes up to which counts of pairs of classes are a plain matrix


def confusion(true: Tensor, predicted: Tensor, K: int) -> Tensor:
    """Counts (K, K) float64 of (true, predicted) class, a sparse tensor beyond DENSE classes; `true`, `predicted` (n,) int64 on
    the CPU."""
    if K <= DENSE:
        return torch.bincount(true * K + predicted, minlength=K * K).view(K, K).double()
    pairs, counts = (true * K + predicted).unique(return_counts=True)
    at = torch.stack([pairs // K, pairs % K])
    return torch.sparse_coo_tensor(at, counts.double(), (K, K), check_invariants=True, is_coalesced=True)


def memorized_excess(predicted: Tensor, true: Tensor, given: Tensor, counts: Tensor) -> float:
    """Share of examples predicted as their wrong label, minus what that share is for images never trained on: the mean of
    P(predicted = y_i | true = y*_i) by `counts` (K, K) of (true, predicted) class on held-out images.

    0 in expectation for a network that treats both alike, if the noise depends on the class alone. `predicted`, `true`,
    `given` (n,) int64 of the wrongly labelled examples. Those whose true class has no held-out image are left out of both
    terms; NaN if none is left. After Feldman & Zhang 2020 (2008.03703) and Lesci et al. 2024 (2406.04327): in the training
    set minus out of it.
    """
    law = counts.index_select(0, true).to_dense()  # (n, K)
    size = law.sum(1)
    kept = size > 0
    chance = law[kept].gather(1, given[kept, None]).squeeze(1) / size[kept]
    return float(((predicted == given)[kept].double() - chance).mean())


def rescaled_weights(losses: Tensor) -> Tensor:
    """d/dl_i of mean(l) / std(l), (n,): how a batch's loss, rescaled by its own deviation, weighs its examples' gradients.

    `losses` (n,), n > 1. Source: Forouzesh & Thiran 2021 (2107.06665), rescaled as in their code, which differentiates the
    deviation too.
    """
    n, mean, std = len(losses), losses.mean(), losses.std()
    return 1 / (n * std) - mean * (losses - mean) / ((n - 1) * std**3)


def mean_distance(G: Tensor) -> Tensor:
    """Mean |x_i - x_j| over the pairs of V > 1 vectors, 0-d, from their Gram matrix (V, V)."""
    squares = G.diagonal()[:, None] + G.diagonal() - 2 * G
    i, j = torch.triu_indices(len(G), len(G), 1)
    return squares[i, j].clamp_min(0).sqrt().mean()


# ------------------------------------------------------------------------------------------------------------- curvature


def edge_of_stability(lr: float, momentum: float) -> float:
    """2 (1 + momentum) / lr: the sharpness above which gradient descent with heavy-ball momentum diverges on a quadratic
    (Cohen et al. 2021, arXiv 2103.00065, appendix B). NaN at a rate of 0."""
    return 2 * (1 + momentum) / lr if lr > 0 else math.nan


def lanczos(product, start: Tensor, tolerance: float, limit: int) -> tuple[float, float, int]:
    """(eigenvalue, residual |Hv - lambda v| / |lambda|, products): the largest eigenvalue of a symmetric operator.

    `product` maps a vector (P,) to H v (P,). Lanczos's recurrence (Golub & Van Loan, chapter 10) holds three vectors
    and finds the algebraically largest eigenvalue where a more negative one exists, as it does early in training:
    there power iteration converges to that one, and on a shifted operator hardly at all. Stops when the residual is
    below `tolerance`, when the space is exhausted, or after `limit` products.
    """
    v, before, beta = start / start.norm(), torch.zeros_like(start), 0.0
    diagonal: list[float] = []
    off: list[float] = []
    for done in range(1, limit + 1):
        w = product(v) - beta * before
        alpha = float(v @ w)  # here the host waits for the device
        w = w - alpha * v
        beta = float(w.norm())
        diagonal.append(alpha)
        T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off:
            side = torch.tensor(off, dtype=torch.float64)
            T = T + torch.diag(side, 1) + torch.diag(side, -1)
        values, vectors = torch.linalg.eigh(T)
        top = float(values[-1])
        residual = beta * abs(float(vectors[-1, -1])) / max(abs(top), 1e-30)
        if residual < tolerance or beta < 1e-12 * max(map(abs, values.tolist())):
            break
        before, v = v, w / beta
        off.append(beta)
    return top, residual, done


def hutchinson(product, probes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(trace, its standard error, asymmetry) of H from v^T H v of random +-1 vectors (Hutchinson 1990; Yao et al. 2020).

    The asymmetry estimates |H - H^T| / |H| (Frobenius norms), from u^T H v - v^T H u of successive vectors: 0 but for rounding
    where `product` is a true second derivative.
    """
    samples, gaps, squares, before = [], [], [], None
    for v in probes:
        Hv = product(v)
        samples.append(v @ Hv)
        squares.append(Hv @ Hv)
        if before:
            u, Hu = before
            gaps.append(u @ Hv - v @ Hu)
        before = v, Hv
    found = torch.stack(samples).double()
    asymmetry = (torch.stack(gaps).double().square().mean() / torch.stack(squares).double().mean()).sqrt()
    return found.mean(), found.std() / math.sqrt(len(probes)), asymmetry
