"""Estimators of the full measurements on planted data, against sums written out, and over many drawn batches."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import gradsplit
import measure
import metrics
from conftest import series
from test_measure import full_job


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------- effective dimension


@pytest.mark.parametrize("m", [4, 5, 7])
def test_effective_dimension_is_the_sum_over_different_rows(m):
    """tr S from pairs, tr(S^2) from pairs, triples and quadruples, each index different, written out as loops."""
    rows = torch.randn(m, 9, generator=torch.Generator().manual_seed(m), dtype=torch.float64) + 0.3
    G = rows @ rows.T
    mean = lambda terms: sum(terms := list(terms)) / len(terms)  # noqa: E731
    T1 = mean(float(G[i, i]) for i in range(m)) - mean(float(G[i, j]) for i, j in itertools.permutations(range(m), 2))
    T2 = (
        mean(float(G[i, j]) ** 2 for i, j in itertools.permutations(range(m), 2))
        - 2 * mean(float(G[i, j] * G[j, k]) for i, j, k in itertools.permutations(range(m), 3))
        + mean(float(G[i, j] * G[k, n]) for i, j, k, n in itertools.permutations(range(m), 4))
    )
    found = float(metrics.effective_dimension(G))
    assert found == pytest.approx(T1**2 / T2, rel=1e-9) if T2 > 0 else math.isnan(found)
    assert float(metrics.effective_dimension((rows + 5) @ (rows + 5).T)) == pytest.approx(
        T1**2 / T2, rel=1e-6
    )  # a mean is no spread


def test_effective_dimension_is_not_resolved_where_its_denominator_is_not_positive():
    G = torch.ones(5, 5, dtype=torch.float64) + 4 * torch.eye(5, dtype=torch.float64)  # orthogonal about their mean
    assert math.isnan(float(metrics.effective_dimension(G)))
    assert math.isnan(float(metrics.effective_dimension(torch.eye(3, dtype=torch.float64))))


@pytest.mark.parametrize(
    ("dimension", "low", "high", "draws"), [(1_000, 700, 1_400, 30), (100_000, 70_000, 140_000, 6)]
)
def test_effective_dimension_of_planted_rows(dimension, low, high, draws):
    """16 isotropic rows whose norms vary by 10 %: the participation ratio sees the norms, the dimension the directions."""
    gen = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        rows = torch.randn(16, dimension, generator=gen) * (1 + 0.1 * torch.randn(16, 1, generator=gen))
        found.append(float(metrics.effective_dimension(gradsplit.gram([[row] for row in rows]))))
    assert low < min(found) and max(found) < high, found
    assert sum(found) / len(found) == pytest.approx(dimension, rel=0.1)


def test_participation_mixes_directions_with_the_spread_of_norms():
    """What docs/measurements.md says of it: about 488 directions by 10 % of spread alone, at m = 16."""
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 16, 20_000, generator=gen) * (1 + 0.1 * torch.randn(20, 16, 1, generator=gen))
    PR = sum(float(metrics.participation(gradsplit.gram([[row] for row in some]))) for some in rows) / len(rows)
    assert 16 * PR / (15 - PR) == pytest.approx(488, rel=0.25)  # PR = 15 R / (R + 16) of R even directions


# ------------------------------------------------------------------------------------- difference of the mean gradients


def chunk_sums(mean: torch.Tensor, sizes: torch.Tensor, runs: int, gen: torch.Generator) -> torch.Tensor:
    """Sums (runs, k, d) of `sizes` (k,) planted gradients each: normal about `mean` (d,), variance 1 a direction."""
    return sizes[:, None] * mean + sizes[:, None].sqrt() * torch.randn(
        runs, len(sizes), len(mean), generator=gen, dtype=mean.dtype
    )


def set_moments(S: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`gradsplit.chunk_moments` for sums (..., k, d) of parts of `sizes` (..., k): (...) both."""
    n, q = sizes.sum(-1), sizes.square().sum(-1)
    each, whole = S.square().sum((-1, -2)), S.sum(-2).square().sum(-1)
    G2 = (whole - each) / (n * n - q)
    return G2, (each - G2 * q) / n


def moments_of(
    C: torch.Tensor, N: torch.Tensor, nc: torch.Tensor, nn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`metrics.MOMENTS` (runs, 9) and <G_C, G_N> across parts (runs,) of sums (runs, k, d) over C and over N in each part."""
    (cc, vc), (gg, vn), (sq, va) = set_moments(C, nc), set_moments(N, nn), set_moments(C + N, nc + nn)
    f, pairs = nc.sum(-1) / (nc + nn).sum(-1), nc.sum(-1) * nn.sum(-1)
    product = (C.sum(-2) * N.sum(-2)).sum(-1)
    cn, across = product / pairs, (product - (C * N).sum((-1, -2))) / (pairs - (nc * nn).sum(-1))
    ca, aa = f * cc + (1 - f) * cn, f * f * cc + 2 * f * (1 - f) * cn + (1 - f) ** 2 * gg
    return torch.stack([cc, gg, cn, ca, aa, vc, vn, va, sq], -1), across


def planted(c: torch.Tensor, n: torch.Tensor, clean: list[int], noisy: list[int], runs: int, gen) -> tuple:
    """`moments_of` batches whose parts hold `clean` and `noisy` gradients about c and about n, both (d,)."""
    nc, nn = (torch.tensor(v, dtype=torch.float64) for v in (clean, noisy))
    return moments_of(chunk_sums(c, nc, runs, gen), chunk_sums(n, nn, runs, gen), nc, nn)


def difference(moments: torch.Tensor, across: torch.Tensor, B: int) -> torch.Tensor:
    """`gradsplit.difference_measures` (runs, 2)."""
    cc, nn, variance = (moments[:, metrics.MOMENTS.index(name)].tolist() for name in ("cc", "nn", "var_a"))
    each = (gradsplit.difference_measures(*m, B) for m in zip(cc, nn, across.tolist(), variance, strict=True))
    return torch.tensor([list(v.values()) for v in each], dtype=torch.float64)


def test_the_moments_drawn_here_are_those_of_metrics():
    gen = torch.Generator().manual_seed(0)
    S, n = (
        torch.randn(4, 6, generator=gen, dtype=torch.float64),
        torch.tensor([3.0, 1.0, 2.0, 5.0], dtype=torch.float64),
    )
    want = gradsplit.chunk_moments(S.square().sum(1), [3, 1, 2, 5], S.sum(0).square().sum())
    torch.testing.assert_close(torch.stack(set_moments(S, n)), torch.stack(want))


def pair_of_means(cosine: float, norms: tuple[float, float], d: int) -> tuple[torch.Tensor, torch.Tensor]:
    c, n = torch.zeros(2, d, dtype=torch.float64)
    c[0], n[0], n[1] = norms[0], norms[1] * cosine, norms[1] * math.sqrt(1 - cosine**2)
    return c, n


@pytest.mark.parametrize(
    ("cosine", "norms"),
    [(1.0, (0.0, 0.0)), (1.0, (2.0, 2.0)), (1.0, (2.0, 1.0)), (-0.4, (1.0, 1.0)), (0.4, (1.0, 2.0))],
)
def test_difference_is_that_of_the_planted_means(cosine, norms):
    """Unequal sets in parts of unequal size: no bias of the numerators, whatever the means are; 0 where they are alike."""
    gen, d, B = torch.Generator().manual_seed(1), 60, 64
    c, n = pair_of_means(cosine, norms, d)
    moments, across = planted(c, n, [10, 13, 11, 14], [6, 3, 5, 2], 4000, gen)
    found, variance = difference(moments, across, B), moments[:, metrics.MOMENTS.index("var_a")]
    true = torch.stack([(c - n).square().sum(), c.square().sum() - n.square().sum()])
    numerators = found * variance[:, None] / B
    error = numerators.std(0) / math.sqrt(len(found))
    assert ((numerators.mean(0) - true).abs() < 4 * error).all(), (numerators.mean(0), true, error)
    want, error = true * B / variance.mean(), found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - want).abs() < 4 * error + 0.05 * want.abs()).all(), (found.mean(0), want, error)
    if (
        min(norms) > 0 and norms[0] != norms[1] or cosine < 1
    ):  # the larger of the two says whether the directions differ
        assert (float(found.mean(0)[0]) > abs(float(found.mean(0)[1]))) == (cosine < min(norms) / max(norms))


def test_difference_of_random_masks_over_one_batch_is_0():
    """Few examples of an odd distribution, far from normal: over masks and orders of the very same ones the mean is 0."""
    gen, B, n, runs = torch.Generator().manual_seed(2), 24, 8, 20_000
    g = (
        torch.randn(B, 5, generator=gen, dtype=torch.float64).exp()
        * torch.linspace(0.1, 3, B, dtype=torch.float64)[:, None]
    )
    order, mask = (torch.rand(runs, B, generator=gen).argsort(1) for _ in range(2))
    noisy = (mask < n).view(runs, 4, 6)
    x, w = g[order].view(runs, 4, 6, 5), noisy[..., None].double()
    nn = noisy.sum(2).double()
    moments, across = moments_of((x * (1 - w)).sum(2), (x * w).sum(2), 6 - nn, nn)
    found = difference(moments, across, B)
    found = found[found.isfinite().all(1)]  # not where all noisy ones are in one part
    z = found.mean(0) / (found.std(0) / math.sqrt(len(found)))
    assert len(found) > 0.98 * runs and (z.abs() < 4).all() and (found.std(0) > 0.1).all(), (
        z,
        found.mean(0),
        found.std(0),
    )


@pytest.mark.slow
def test_difference_of_a_fake_mask_on_real_training_is_0(go):
    """The A/A run: labels are true and the mask is drawn, so the mean over the run is 0 within its standard error."""
    argv = "--fake-mask 0.4 --synthetic-train 500 --epochs 3 --permutations 0 --measure-every 1 --measure full --measure-budget 30"
    found = series(go(*argv.split()))
    for tag in ("grad/difference", "grad/difference_norm"):
        values = torch.tensor([v for _, v in found[tag]], dtype=torch.float64)
        assert len(values) >= 35
        assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(len(values)), tag
    assert "grad/label_share" not in found and "isotropy/dimension" not in found


def test_difference_decides_where_the_corrected_cosine_cannot():
    """Drawn runs of 20 measurements at a noise scale of 8 B: cosine -0.4 against gradients that are alike. Intervals of the
    mean over the run exclude 0 in most of the first and in few of the second; few corrected cosines are resolved."""
    gen, d, B, runs = torch.Generator().manual_seed(3), 250, 128, 400
    shares = {}
    for cosine in (-0.4, 1.0):
        c, n = pair_of_means(cosine, (math.sqrt(d / (8 * B)),) * 2, d)
        moments, across = planted(c, n, [16] * 4, [16] * 4, 20 * runs, gen)
        D = difference(moments, across, B)[:, 0].view(runs, 20)
        t = D.mean(1) / (D.std(1) / math.sqrt(20))
        shares[cosine] = float((t > stats.t.ppf(0.975, 19)).double().mean())
    windows = [metrics.corrected(moments[i : i + 5].tolist())[0] for i in range(0, 1000, 5)]
    resolved = sum("corrected/cos_clean_noisy" in values for values in windows) / len(windows)
    assert shares[-0.4] > 0.85 and shares[1.0] < 0.06 and resolved < 0.3, (shares, resolved)


# --------------------------------------------------------------------------------------------------- corrected estimates


@pytest.mark.parametrize("n", [3, 4, 9])
def test_jackknife_of_a_mean_is_its_t_interval(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    without = (x.sum() - x) / (n - 1)
    want = stats.t.interval(0.95, n - 1, float(x.mean()), float(x.std()) / math.sqrt(n))
    assert metrics.jackknife(torch.cat([x.mean()[None], without])).tolist() == pytest.approx(want, rel=1e-10)


def test_jackknife_leaves_out_each_measurement_once():
    gen = torch.Generator().manual_seed(4)
    c, n = pair_of_means(0.6, (1.5, 1.0), 50)
    window = planted(c, n, [10] * 4, [10] * 4, 6, gen)[0].tolist()
    found, _ = metrics.corrected(window)
    for tag, transform in (("corrected/cos_clean_noisy", lambda v: v), ("noise_scale/noisy", math.log)):
        without = torch.tensor(
            [transform(metrics.corrected(window[:i] + window[i + 1 :])[0][tag]) for i in range(6)], dtype=torch.float64
        )
        half = stats.t.ppf(0.975, 5) * math.sqrt(5 / 6 * float((without - without.mean()).square().sum()))
        ends = [transform(found[tag]) - half, transform(found[tag]) + half]
        assert [transform(found[f"{tag}_{end}"]) for end in ("low", "high")] == pytest.approx(ends, rel=1e-9), tag


def test_the_interval_of_a_corrected_cosine_covers_the_planted_one():
    gen = torch.Generator().manual_seed(5)
    cosine, runs, n = 0.3, 300, 5
    c, v = pair_of_means(cosine, (1.5, 1.5), 100)
    rows = planted(c, v, [16] * 4, [16] * 4, runs * n, gen)[0].tolist()
    found = [metrics.corrected(rows[i : i + n])[0] for i in range(0, runs * n, n)]
    for tag, want in (("corrected/cos_clean_noisy", cosine), ("noise_scale/clean", 100 / 1.5**2)):
        inside = [v[f"{tag}_low"] <= want <= v[f"{tag}_high"] for v in found if tag in v]
        assert len(inside) > 0.95 * runs and 0.88 < sum(inside) / len(inside) < 0.99, (tag, sum(inside), len(inside))


def test_each_quarter_has_its_own_estimate():
    """The window holds a quarter's measurements alone, and one of fewer than three is joined with the next."""
    job = full_job()
    gen = torch.Generator().manual_seed(6)
    c, n = pair_of_means(0.6, (1.5, 1.5), 50)
    moments = planted(c, n, [10] * 4, [10] * 4, 48, gen)[0].tolist()
    for total, every, ends in ((48, 1, [11, 23, 35, 47]), (48, 6, [18, 42]), (40, 2, [8, 18, 28, 38])):
        job.state.plan, job.state.window = {"steps": every, "total_steps": total}, []
        logged, since = {}, []
        for step in range(0, total, every):
            since.append(moments[step])
            job.state.window.append(moments[step])
            values = measure.quarter_values(job.context, step)
            if "corrected/cos_clean_noisy" in values:
                logged[step] = values["corrected/cos_clean_noisy"]
                want, _ = metrics.corrected(since)
                assert logged[step] == want["corrected/cos_clean_noisy"] and job.state.window == []
                since = []
        assert list(logged) == ends, (every, logged)


# ------------------------------------------------------------------------------------------------- label-noise cotangent


def test_label_cotangent_is_the_gradient_of_the_difference_of_losses():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    given, true, w = (
        torch.tensor([0, 3, 1, 1, 2]),
        torch.tensor([0, 2, 1, 3, 0]),
        torch.tensor([1, 0.5, 2, 3, 0]).double(),
    )
    loss = F.cross_entropy(logits, given, reduction="none") - F.cross_entropy(logits, true, reduction="none")
    (want,) = torch.autograd.grad((w * loss).sum(), logits)
    found = gradsplit.label_cotangent(logits, given, true, w)
    torch.testing.assert_close(found, want)
    assert not found[given == true].any() and not found.requires_grad
