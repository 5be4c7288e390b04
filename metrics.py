"""What is measured, as pure functions of tensors: cotangents at the logits, their gradients, and arithmetic on those.

Every gradient is the same forward pulled back along another cotangent; every norm and cosine comes from the Gram
matrix of such gradients. Letters: B examples of the global batch, K classes, P parameters, V gradients ("rows");
C and N the clean and the noisy examples, f = |C| / B.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Parameters taken to float64 at a time: on a GPU few large pieces (V x 32 MiB), on a CPU pieces that stay in its cache.
CHUNK, CPU_CHUNK = 1 << 22, 1 << 16
SLICE = 1 << 12  # of a large piece, by which a GPU shares it out among its processors


def cotangent(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """d/dlogits of sum_i weights_i * cross-entropy_i: U (B, K) with U_i = w_i (softmax(z_i) - onehot(label_i)).

    `logits` (B, K) float, `labels` (B,) int64, `weights` (B,) float of the logits' dtype. Detached.
    """
    U = logits.detach().softmax(1)
    U.scatter_add_(1, labels[:, None], torch.full_like(U[:, :1], -1.0))
    return U.mul_(weights[:, None])


def label_cotangent(logits: Tensor, given: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    """d/dlogits of sum_i weights_i * (cross-entropy_i against `given` - against `true`), the label-noise part of the loss:
    U (B, K) with U_i = w_i (onehot(true_i) - onehot(given_i)), exactly 0 for a clean example.

    `logits` (B, K) give shape, dtype and device alone; `given`, `true` (B,) int64, `weights` (B,) float. Detached.
    """
    U = torch.zeros_like(logits)
    one = torch.ones_like(U[:, :1])
    return U.scatter_add_(1, true[:, None], one).scatter_add_(1, given[:, None], -one).mul_(weights[:, None])


def pull_backs(
    outputs: list[Tensor], entries: list[Tensor], parameters: list[Tensor], cotangents: list[Tensor], free: bool = False
) -> list[list[Tensor]]:
    """The gradient U^T dz/dtheta for each cotangent U (B, K): rows, lists of tensors shaped as `parameters` (2F each).

    The forward may be cut into parts that follow each other: `outputs` are what each puts out, the logits z (B, K) last,
    and `entries` what the second and later ones began with, leaves of the same values as the outputs before them.
    With `free` the graphs go with it, those of a later part before an earlier one needs room for its own gradients, so
    that memory peaks close to where one backward does; whole pull-backs in turn would hold all that the forward saved
    until the last of them. The arithmetic is the same, to the bit. A parameter that z does not depend on gets zeros.
    """
    rows: list[list] = [[None] * len(parameters) for _ in cotangents]
    above = list(cotangents)  # of each row, the gradient of what the part at hand puts out
    for k in reversed(range(len(outputs))):
        wanted = [*parameters, *entries[k - 1 : k]] if k else parameters
        for r, row in enumerate(rows):
            keep = not free or r < len(rows) - 1
            gradients = torch.autograd.grad(outputs[k], wanted, above[r], retain_graph=keep, allow_unused=True)
            above[r] = gradients[-1]
            for i, part in enumerate(gradients[: len(parameters)]):
                if part is not None:
                    row[i] = part if row[i] is None else row[i] + part
    return [[torch.zeros_like(p) if g is None else g for g, p in zip(row, parameters, strict=True)] for row in rows]


def gram(rows: list[list[Tensor]]) -> Tensor:
    """Inner products (V, V) float64 of V gradients, each a list of tensors. Summed in float64, bucket by bucket."""
    on_cpu = rows[0][0].device.type == "cpu"
    G = rows[0][0].new_zeros(len(rows), len(rows), dtype=torch.float64)
    for bucket in buckets(rows, CPU_CHUNK if on_cpu else CHUNK):
        M = torch.cat([piece for pieces in bucket for piece in pieces]).view(len(rows), -1).double()  # (V, <= chunk)
        G += M @ M.T if on_cpu else sliced_products(M)
    return G


def buckets(rows: list[list[Tensor]], size: int) -> Iterator[list[list[Tensor]]]:
    """V gradients cut alike into buckets of `size` entries each (the last holds fewer): of every gradient the 1-d pieces that
    follow each other there, however many tensors they are of. One bucket takes a handful of launches, as one tensor would.
    """
    bucket, room = [[] for _ in rows], size
    for same in zip(*rows, strict=True):  # one parameter's part of every row
        if all(part.is_contiguous(memory_format=torch.channels_last) for part in same if part.dim() == 4):
            same = [part.permute(0, 2, 3, 1) if part.dim() == 4 else part for part in same]  # as they lie in memory
        flat = [part.reshape(-1) for part in same]
        while flat[0].numel():
            for pieces, part in zip(bucket, flat, strict=True):
                pieces.append(part[:room])
            flat = [part[room:] for part in flat]
            room -= bucket[0][-1].numel()
            if not room:
                yield bucket
                bucket, room = [[] for _ in rows], size
    if bucket[0]:
        yield bucket


def sliced_products(M: Tensor) -> Tensor:
    """M M^T (V, V) of a few long rows M (V, L) as one small product for each SLICE, added up; one product of all would keep
    a single processor of a GPU busy along the whole length."""
    parts = F.pad(M, (0, -M.shape[1] % SLICE)).view(len(M), -1, SLICE).transpose(0, 1)
    return torch.bmm(parts, parts.mT).sum(0)


def add_rows(rows: list[list[Tensor]]) -> list[Tensor]:
    """The sum of the gradients, as a list of tensors: clean + noisy is the training gradient."""
    total = rows[0]
    for row in rows[1:]:
        total = torch._foreach_add(total, row)
    return list(total)


def gram_cosine(G: Tensor, i: int, j: int) -> Tensor:
    """cos of rows i and j from their Gram matrix; NaN where a row is zero."""
    return G[i, j] / (G[i, i].sqrt() * G[j, j].sqrt())


def cosine_of_products(xy: float, xx: float, yy: float) -> float:
    """Cosine of x and y from their inner products; NaN where it is undefined."""
    return xy / math.sqrt(xx * yy) if xx * yy > 0 else math.nan


def norm_ratio(xx: float, yy: float) -> float:
    """|x| / |y| from squares; NaN where it is undefined."""
    return math.sqrt(xx / yy) if yy > 0 and xx >= 0 else math.nan


def set_means(G: Tensor, f: float) -> Tensor:
    """Gram matrix (3, 3) of (g_C, g_N, g), g_C and g_N the mean gradients over C and N.

    `G` is that of ((1/B) sum over C, (1/B) sum over N), (2, 2), and then g is their sum (docs/measurements.md:
    g = f g_C + (1 - f) g_N); or it is (3, 3) with another g as the third row, taken as it is.
    """
    A = G.new_zeros(3, len(G))  # filled where it lies: a copy from the host would wait for a GPU
    A[0, 0], A[1, 1] = 1 / f, 1 / (1 - f)
    A[2, 2 if len(G) == 3 else slice(2)] = 1
    return A @ G @ A.T


def split_measures(G: Tensor) -> dict[str, Tensor]:
    """`grad/*` of the split from the Gram matrix (3, 3) of (g_C, g_N, g), both C and N not empty.

    `grad/cos_clean_all` = cos(g_C, g) is the report's (section 4.2, figures 7-9 and 16).
    """
    return {
        "grad/cos_clean_all": gram_cosine(G, 0, 2),
        "grad/cos_clean_noisy": gram_cosine(G, 0, 1),
        "grad/norm_clean": G[0, 0].sqrt(),
        "grad/norm_noisy": G[1, 1].sqrt(),
        "grad/norm_all": G[2, 2].sqrt(),
    }


def permuted_measures(G: Tensor) -> dict[str, Tensor]:
    """`null/permuted_*` of R random masks, 0-d, from the Gram matrix (2 + R, 2 + R) of the rows of C, of N (g is their sum)
    and of the R sets that stand in for C: mean and, of two or more, standard deviation of both cosines. Nothing is read."""
    s = G[2:]  # (R, 2 + R); the stand-in's complement is g - s
    gg, sg, ss = G[:2, :2].sum(), s[:, :2].sum(1), G.diagonal()[2:]
    sq, qq = sg - ss, gg - 2 * sg + ss
    values = {}
    for name, cosines in (("all", sg / (ss * gg).sqrt()), ("noisy", sq / (ss * qq).sqrt())):
        values[f"null/permuted_cos_clean_{name}"] = cosines.mean()
        if len(cosines) > 1:
            values[f"null/permuted_cos_clean_{name}_std"] = cosines.std()
    return values


def one_sided_measures(square: Tensor, n_noisy: int) -> dict[str, Tensor]:
    """`grad/norm_*` of a batch all clean or all noisy, from |g|^2. Cosines are undefined there and left out."""
    norm = square.sqrt()
    return {"grad/norm_noisy" if n_noisy else "grad/norm_clean": norm, "grad/norm_all": norm}


def batch_counts(logits: Tensor, labels: Tensor, noisy: Tensor) -> Tensor:
    """(3,) float64 sums over a batch: cross-entropy against `labels`, correct, correct among the noisy.

    Sums, so that ranks can add them before `batch_measures` divides. `logits` (b, K), `labels` (b,) int64, `noisy`
    (b,) bool.
    """
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


def chunk_moments(squares: Tensor, sizes: list[int], square_of_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased (|G|^2, s^2) of a set from k disjoint parts: squared true gradient, trace of the per-example variance.

    `squares` (k,) are |S_i|^2 of the parts' gradient *sums*, `sizes` their examples n_i, `square_of_sum` is
    |sum_i S_i|^2. From E<S_i, S_j> = n_i n_j |G|^2 and E|S_i|^2 = n_i^2 |G|^2 + n_i s^2 (McCandlish et al. 2018,
    appendix A, for parts of unequal size). For the finite batch that the parts were cut from at random, s^2 is also
    unbiased for its within-batch variance. NaN with fewer than two parts that hold anything. Never clamped.
    """
    n, q = sum(sizes), sum(size * size for size in sizes)
    if n * n == q:
        return squares.new_tensor(math.nan), squares.new_tensor(math.nan)
    G2 = (square_of_sum - squares.sum()) / (n * n - q)
    return G2, (squares.sum() - G2 * q) / n


def null_cosines(g2: float, s2: float, f: float, B: int) -> dict[str, float]:
    """Expected cosines of a random subset of size f B of the batch: with g, and with its complement.

    `g2` = |g|^2 of the batch's gradient, `s2` the trace of the within-batch variance. A random S has
    E|g_S|^2 = |g|^2 + s^2 (1 - f) / (f B), E<g_S, g> = |g|^2 and E<g_S, g_rest> = |g|^2 - s^2 / B (sampling without
    replacement; docs/measurements.md). The second is not 0. NaN where a root is of something not positive.
    """
    inside, outside = g2 + s2 * (1 - f) / (f * B), g2 + s2 * f / ((1 - f) * B)
    return {
        "null/cos_clean_all": math.sqrt(g2 / inside) if inside > 0 else math.nan,
        "null/cos_clean_noisy": (g2 - s2 / B) / math.sqrt(inside * outside) if inside > 0 and outside > 0 else math.nan,
    }


def difference_measures(cc: float, nn: float, cn: float, variance: float, B: int) -> dict[str, float]:
    """`grad/difference*`: whether the mean gradients of C and N differ beyond what a random mask gives, without a root.

    `cc`, `nn` are unbiased |G_C|^2 and |G_N|^2, `cn` is <G_C, G_N>, all from pairs of examples in different parts of the
    batch; `variance` is the trace of the within-batch variance. tr Sigma / B, the squared length that sampling adds to a
    batch's mean gradient, is the unit of both:

        grad/difference      = (|G_C|^2 + |G_N|^2 - 2 <G_C, G_N>) B / tr Sigma      estimates |G_C - G_N|^2
        grad/difference_norm = (|G_C|^2 - |G_N|^2) B / tr Sigma                     which of the two is the longer

    A U-statistic (Hoeffding 1948). For a random mask both are 0 in expectation, exactly with parts of equal size: the mean
    over masks of either kind of pair is the same, and the variance does not depend on the mask. Of parallel gradients
    |difference_norm| >= difference; where difference is the larger, the directions differ. NaN where the variance is not
    positive. Never clamped.
    """
    unit = B / variance if variance > 0 else math.nan
    return {"grad/difference": (cc + nn - 2 * cn) * unit, "grad/difference_norm": (cc - nn) * unit}


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
    n = len(estimates) - 1
    half = student_quantile(n - 1) * (n - 1) ** 0.5 * estimates[1:].std(correction=0)
    return torch.stack([estimates[0] - half, estimates[0] + half])


def student_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t (Abramowitz & Stegun 1964, 26.7.5): within 1 % at 2 degrees of freedom, 0.1 % from 4."""
    z = 1.959963984540054
    terms = (  # coefficients of z, z^3, ..., and what they are divided by; a power of the degrees each
        ((1, 1), 4),
        ((3, 16, 5), 96),
        ((-15, 17, 19, 3), 384),
        ((-945, -1920, 1482, 776, 79), 92160),
    )
    series = (sum(c * z ** (2 * i + 1) for i, c in enumerate(cs)) / by / degrees**k for k, (cs, by) in enumerate(terms, 1))
    return z + sum(series)


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


def confusion(true: Tensor, predicted: Tensor, K: int) -> Tensor:
    """Counts (K, K) float64 of (true, predicted) class; `true`, `predicted` (n,) int64 on the CPU."""
    return torch.bincount(true * K + predicted, minlength=K * K).view(K, K).double()


def memorized_excess(predicted: Tensor, true: Tensor, given: Tensor, counts: Tensor) -> float:
    """Share of examples predicted as their wrong label, minus what that share is for images never trained on: the mean of
    P(predicted = y_i | true = y*_i) by `counts` (K, K) of (true, predicted) class on held-out images.

    0 in expectation for a network that treats both alike, if the noise depends on the class alone. `predicted`, `true`,
    `given` (n,) int64 of the wrongly labelled examples. Those whose true class has no held-out image are left out of both
    terms; NaN if none is left. After Feldman & Zhang 2020 (2008.03703) and Lesci et al. 2024 (2406.04327): in the training
    set minus out of it.
    """
    size = counts.sum(1)
    kept = size[true] > 0
    chance = counts[true[kept], given[kept]] / size[true[kept]]
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


def hutchinson(product, probes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(trace, its standard error) from v^T H v of random +-1 vectors (Hutchinson 1990; Yao et al. 2020)."""
    samples = torch.stack([v @ product(v) for v in probes]).double()
    return samples.mean(), samples.std() / math.sqrt(len(probes))
