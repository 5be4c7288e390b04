"""The report's noise: exact count, law, determinism; and the file that repeats it."""

import io

import numpy as np
import torch

import noise


def labels(n: int = 50_000, K: int = 10) -> torch.Tensor:
    return torch.arange(n) % K


def test_uniform_selects_exactly_and_draws_from_all_classes():
    true = labels()
    got = noise.apply("uniform", true, 10, 0.5, seed=0)
    # Every tenth selected example keeps its label, so the changed ones are binomial(25000, 0.9): 22500 +- 47.
    changed = got != true
    assert abs(int(changed.sum()) - 22_500) < 5 * 47.4
    count = torch.bincount(got[changed] * 10 + true[changed], minlength=100).view(10, 10).double()
    assert count.diag().sum() == 0
    off = count[~torch.eye(10, dtype=torch.bool)]
    chi_squared = float(((off - 250) ** 2 / 250).sum())  # 89 degrees of freedom: 89 +- 13
    assert chi_squared < 89 + 5 * 13.3


def test_uniform_count_is_exact():
    """With K far larger than n no drawn label is the true one, so all that were selected show."""
    true = torch.zeros(1001, dtype=torch.int64)
    for rate, want in ((0, 0), (0.2, 200), (0.5, 500), (0.333, 333), (1, 1001)):
        g = torch.Generator().manual_seed(1)
        got = noise.uniform(true, 2**60, rate, g)
        assert int((got != true).sum()) == want


def test_noise_depends_on_its_seed_alone():
    true = labels(1000)
    first = noise.apply("uniform", true, 10, 0.2, seed=0)
    torch.manual_seed(123)
    assert torch.equal(first, noise.apply("uniform", true, 10, 0.2, seed=0))
    assert not torch.equal(first, noise.apply("uniform", true, 10, 0.2, seed=1))
    assert torch.equal(true, labels(1000))


def test_archive_repeats_the_noise_and_its_hash():
    true, index = labels(100), torch.arange(100) + 7
    given = noise.apply("uniform", true, 10, 0.3, seed=0)
    blob = noise.archive(index, true, given)
    assert blob == noise.archive(index, true, given)
    with np.load(io.BytesIO(blob), allow_pickle=False) as z:
        assert [z[k].tolist() for k in ("index", "true", "label")] == [t.tolist() for t in (index, true, given)]
    ledger = noise.ledger("uniform", 0.3, 0, index, true, given)
    assert ledger["changed"] == int((given != true).sum()) and ledger["realised"] == ledger["changed"] / 100
    assert noise.ledger("uniform", 0.3, 0, index, true, true)["labels_sha256"] != ledger["labels_sha256"]
