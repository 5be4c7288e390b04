"""Each type of noise: exact count, support, law, determinism; the ledger; and labels that change with the epoch."""

import inspect
import io

import numpy as np
import pytest
import torch

import data
import datasets
import noises
from engine import noisefile

N, K = 20_000, 10
FLIPS = torch.tensor([1, 2, 3, 3, 5, 4, 6, 8, 7, 0])  # chains, swaps and classes that stay
MATRIX = torch.eye(10, dtype=torch.float64) * 0.4 + torch.eye(10, dtype=torch.float64).roll(3, 1) * 0.5
MATRIX[:, 0] += 0.1


def labels(n: int = N) -> torch.Tensor:
    return torch.arange(n) % K


def images(n: int = N, size: int = 6) -> torch.Tensor:
    return torch.randint(256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


MORE = {"asymmetric": {"flips": FLIPS}, "matrix": {"matrix": MATRIX}, "instance": {"images": images()}}


def draw(kind: str, rate: float, seed: int, n: int = N) -> torch.Tensor:
    more = {k: v[:n] if k == "images" else v for k, v in MORE.get(kind, {}).items()}
    return noises.apply(kind, labels(n), K, rate, seed, **more)


def law(kind: str) -> torch.Tensor:
    """(K, K): the distribution of a selected example's label; instance noise has none that holds for all images."""
    eye = torch.eye(K, dtype=torch.float64)
    return {
        "uniform": torch.full((K, K), 0.1, dtype=torch.float64),
        "symmetric": (1 - eye) / 9,
        "pair": eye.roll(1, 1),
        "asymmetric": eye[FLIPS],
        "matrix": MATRIX,
    }[kind]


DRAWN = [kind for kind, entry in noises.NOISES.items() if entry.draw and not entry.from_file]
LAWS = [kind for kind in DRAWN if kind != "instance"]


@pytest.mark.parametrize("kind", LAWS)
def test_support_and_law_over_many_draws(kind):
    """Where the law is 0 nothing falls, and the counts of 20 draws are as it says (chi-squared, 5 deviations)."""
    true, rate, draws = labels(2000), 0.4, 20
    T = (1 - rate) * torch.eye(K, dtype=torch.float64) + rate * law(kind)
    count = sum(noisefile.transitions(true, draw(kind, rate, s, 2000), K) for s in range(draws))
    assert bool((count[T == 0] == 0).all())
    expected = T * 200 * draws
    random = (T > 0) & (T < 1)  # a class that stays has nothing to vary
    chi_squared = float(((count - expected) ** 2 / expected)[random].sum())
    freedom = int((random.sum(1) - 1).clamp_min(0).sum())  # the number selected is fixed: a little below that
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5
    assert chi_squared > 0.1 * freedom


@pytest.mark.parametrize("kind", ["symmetric", "pair", "instance"])
def test_the_share_is_exact_where_every_selected_label_changes(kind):
    for rate in (0.0, 0.05, 0.2, 0.333, 0.5, 0.9):
        assert int((draw(kind, rate, 3, 2001) != labels(2001)).sum()) == round(rate * 2001)


def test_labels_by_counts_are_those_of_their_matrix():
    """To the last one, without the matrix; a class that the counts lack keeps its labels."""
    of, g = labels(3000) % 7, torch.Generator().manual_seed(1)
    given = torch.where(of == 3, 3, torch.randint(K, (3000,), generator=g))
    counts = noisefile.transitions(of, given, K).double()
    counts[7:] = torch.eye(K, dtype=torch.float64)[7:]
    want = noises.by_matrix(labels(), K, 1.0, data.generator(4, "t"), counts)
    got = noises.by_counts(labels(), of, given, K, data.generator(4, "t"))
    assert torch.equal(got, want) and bool((got == labels())[(labels() >= 7) | (labels() == 3)].all())


def test_asymmetric_changes_exactly_the_selected_of_the_mapped_classes():
    selected = noises.select(N, 0.4, data.generator(7, "noise"))
    want = labels()
    want[selected] = FLIPS[labels()[selected]]
    assert len(selected) == 8000 and torch.equal(draw("asymmetric", 0.4, 7), want)
    # At rate 1 every cat is a dog and every dog a cat: nobody came back by a second flip.
    everything = draw("asymmetric", 1.0, 0)
    assert torch.equal(everything, FLIPS[labels()])


def test_matrix_at_rate_one_is_the_matrix():
    n = 1_000_000
    got = noises.apply("matrix", labels(n), K, 1.0, 0, matrix=MATRIX)
    realised = noisefile.shares(noisefile.transitions(labels(n), got, K))
    assert float((realised - MATRIX).abs().max()) < 5 * (0.25 / (n / K)) ** 0.5
    assert torch.equal(noises.by_matrix(labels(), K, 1.0, data.generator(0, "x"), torch.eye(K).double()), labels())


@pytest.mark.parametrize("kind", DRAWN)
def test_noise_depends_on_its_seed_alone(kind):
    first = draw(kind, 0.3, 0, 2000)
    torch.manual_seed(123)
    assert torch.equal(first, draw(kind, 0.3, 0, 2000))
    assert first.dtype == torch.int64 and 0 <= int(first.min()) <= int(first.max()) < K
    # Another seed picks other examples: as many in common as chance has it (2000 examples, share s each: s^2).
    a, b = first != labels(2000), draw(kind, 0.3, 1, 2000) != labels(2000)
    share = float(a.double().mean() * b.double().mean())
    assert abs(float((a & b).double().mean()) - share) < 5 * (share * (1 - share) / 2000) ** 0.5


def test_uniform_is_what_it_always_was():
    """Its bits are part of every published run: which examples, and which labels, seed 0 gives."""
    got = noises.apply("uniform", labels(1000), 10, 0.2, seed=0)
    g = data.generator(0, "noise")
    selected = torch.randperm(1000, generator=g)[:200]
    want = labels(1000)
    want[selected] = torch.randint(10, (200,), generator=g)
    assert torch.equal(got, want)
    assert noisefile.sha256(got)[:16] == "ff498afc9dcccb5b"


def test_uniform_count_is_exact():
    """With K far larger than n no drawn label is the true one, so all that were selected show."""
    true = torch.zeros(1001, dtype=torch.int64)
    for rate, want in ((0, 0), (0.2, 200), (0.5, 500), (0.333, 333), (1, 1001)):
        g = torch.Generator().manual_seed(1)
        got = noises.uniform(true, 2**60, rate, g)
        assert int((got != true).sum()) == want


# ------------------------------------------------------------------------------------------------------------ instance


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.2, 0.5, 0.95])
def test_flip_rates_are_a_truncated_normal_of_exact_mean(rate):
    q = noises.flip_rates(N, rate, data.generator(0, "x"))
    assert float(q.sum()) == pytest.approx(round(rate * N), abs=1e-6) and 0 <= float(q.min()) <= float(q.max()) <= 1
    if 0.3 < rate < 0.7:  # hardly truncated: the deviation is the paper's
        assert float(q.std()) == pytest.approx(0.1, rel=0.02)
        assert float(((q - rate).abs() < 0.1).double().mean()) == pytest.approx(0.6827, abs=0.02)


def test_drawing_exactly_keeps_each_probability():
    q = torch.tensor([0.9, 0.5, 0.3, 0.2, 0.1, 0.0, 1.0], dtype=torch.float64)
    count, g = torch.zeros(7), data.generator(0, "x")
    for _ in range(4000):
        chosen = noises.draw_exactly(q, g)
        assert len(chosen) == len(chosen.unique()) == 3
        count[chosen] += 1
    assert float((count / 4000 - q).abs().max()) < 5 * (0.25 / 4000) ** 0.5
    assert count[5] == 0 and count[6] == 4000
    # Neighbours are no likelier to go together, or apart, than others: 4 of 10 hold a given pair with 4/10 * 3/9.
    pair = sum(
        int({0, 1} <= set(noises.draw_exactly(torch.full((10,), 0.4).double(), g).tolist())) for _ in range(4000)
    )
    assert abs(pair / 4000 - 4 / 10 * 3 / 9) < 5 * (0.13 * 0.87 / 4000) ** 0.5


def test_instance_noise_depends_on_the_image():
    """Equal images of a class get equal labels far more often than unequal ones; other images, other labels."""
    x, true = images(4000), torch.zeros(4000, dtype=torch.int64)
    x[2000:] = x[:2000]
    got = noises.instance(true, K, 0.9, data.generator(0, "x"), x)
    a, b = got[:2000], got[2000:]
    both = (a > 0) & (b > 0)
    same = float((a == b)[both].double().mean())
    other = float((a == b.roll(1))[both & (b.roll(1) > 0)].double().mean())
    # 108 standard normal values: the scores' deviation is about 10, so the softmax nearly always takes the largest.
    assert same > 0.8 and other < 0.25
    shuffled = noises.instance(true, K, 0.9, data.generator(0, "x"), x.flip(0))
    assert float((shuffled == got)[(got > 0) & (shuffled > 0)].double().mean()) < 0.25


def test_instance_noise_is_never_the_true_class_and_depends_on_it():
    x = images(1000)
    of = [noises.instance(torch.full((1000,), k), K, 0.9, data.generator(0, "x"), x) for k in range(2)]
    assert all(int((got == k).sum()) == 100 for k, got in enumerate(of))
    both = (of[0] > 1) & (of[1] > 1)  # the same images under the projection of another class
    assert float((of[0] == of[1])[both].double().mean()) < 0.3


def test_instance_noise_is_the_same_in_blocks_and_threads(monkeypatch):
    whole = draw("instance", 0.5, 0, 3000)
    monkeypatch.setattr(noises, "BLOCK", 17)
    torch.set_num_threads(1)
    assert torch.equal(whole, draw("instance", 0.5, 0, 3000))


# --------------------------------------------------------------------------------------------------- matched, dynamic


def test_matched_has_the_matrix_and_not_the_structure():
    true = labels()
    given = draw("instance", 0.4, 0)
    got = noises.matched(true, given, K, data.generator(0, "noise"))
    assert torch.equal(noisefile.transitions(true, got, K), noisefile.transitions(true, given, K))
    # Within each class the labels are shuffled: the noisy sets overlap as chance has it, 0.4^2.
    both = float(((got != true) & (given != true)).double().mean())
    assert abs(both - 0.16) < 5 * (0.16 * 0.84 / N) ** 0.5
    assert not torch.equal(got, noises.matched(true, given, K, data.generator(1, "noise")))


def test_dynamic_is_uniform_noise_drawn_anew():
    true = labels(2000)
    epochs = [noises.dynamic(true, K, 0.4, 0, e) for e in range(20)]
    assert torch.equal(epochs[3], noises.dynamic(true, K, 0.4, 0, 3))
    assert not torch.equal(epochs[3], noises.dynamic(true, K, 0.4, 1, 3))
    changed = torch.stack([e != true for e in epochs]).double()
    assert abs(float(changed.mean()) - 0.36) < 0.01
    overlap = float((changed[1:] * changed[:-1]).mean())
    assert abs(overlap - 0.36**2) < 5 * (0.13 * 0.87 / 38_000) ** 0.5
    count = sum(noisefile.transitions(true, e, K) for e in epochs).double()
    off = count[~torch.eye(K, dtype=torch.bool)]
    assert float(((off - 160) ** 2 / 160).sum()) < 90 + 5 * 180**0.5


def test_batches_of_dynamic_labels_are_slices_of_the_epoch_on_any_number_of_ranks():
    n, B, true = 103, 25, labels(103)
    x = torch.zeros(n, 32, 32, 1, dtype=torch.uint8)
    train = data.TrainSet(
        x, true, true, (0,), (1,), "cpu", True, by_epoch=lambda epoch: noises.dynamic(true, K, 0.5, 9, epoch)
    )
    seen = []
    for epoch in (0, 1):
        plan = train.epoch(0, epoch)
        assert int(plan.noisy.sum()) > 30
        fresh = noises.dynamic(true, K, 0.5, 9, epoch)[plan.index]
        for i in range(5):
            whole = train.batch(plan, i, B)
            assert torch.equal(whole.y, fresh[i * B : (i + 1) * B])
            assert whole.n_noisy == int((whole.y != whole.true).sum())
            for ranks in (2, 3):
                parts = [train.batch(plan, i, B, rank, ranks) for rank in range(ranks)]
                assert torch.equal(torch.cat([p.y for p in parts]), whole.y)
                assert {p.n_noisy for p in parts} == {whole.n_noisy}
        labels_now = torch.empty(n, dtype=torch.int64)
        labels_now[plan.index] = plan.labels
        seen.append(labels_now)
    assert not torch.equal(*seen)


# ------------------------------------------------------------------------------------------------------- maps, ledger


def test_the_maps_are_the_usual_ones():
    def named(classes, flips):
        return {classes[k]: classes[j] for k, j in enumerate(flips.tolist()) if k != j}

    cifar = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert data.flip_map(cifar, datasets.CIFAR10_FLIPS).tolist() == [0, 1, 0, 5, 7, 3, 6, 7, 8, 1]
    assert named(cifar, data.flip_map(cifar, datasets.CIFAR10_FLIPS)) == datasets.CIFAR10_FLIPS
    fashion = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    assert data.flip_map(fashion, datasets.FMNIST_FLIPS).tolist() == [0, 1, 6, 4, 3, 5, 6, 5, 8, 7]


def test_every_type_has_a_function_that_says_its_source():
    """And that takes what its entry says it needs, by these names."""
    for kind, entry in noises.NOISES.items():
        function = entry.draw or entry.by_epoch
        if function is None:
            assert entry.from_file, kind
            continue
        assert "(n,)" in inspect.getdoc(function), kind
        arguments = set(list(inspect.signature(function).parameters)[4:])
        assert arguments == (entry.needs - {"file"} if entry.draw else {"epoch"}), kind


def test_archive_repeats_the_noise_and_its_hash():
    true, index = labels(100), torch.arange(100) + 7
    given = noises.apply("uniform", true, 10, 0.3, seed=0)
    blob = noisefile.archive(index, true, given)
    assert blob == noisefile.archive(index, true, given)
    with np.load(io.BytesIO(blob), allow_pickle=False) as z:
        assert [z[k].tolist() for k in ("index", "true", "label")] == [t.tolist() for t in (index, true, given)]
    ledger = noisefile.ledger("uniform", 0.3, 0, index, true, given)
    assert ledger["changed"] == int((given != true).sum()) and ledger["realised"] == ledger["changed"] / 100
    assert noisefile.ledger("uniform", 0.3, 0, index, true, true)["labels_sha256"] != ledger["labels_sha256"]


def test_ledger_counts_by_class():
    true, label = torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([0, 1, 2, 0, 2, 0])
    ledger = noisefile.ledger("file", 0.5, None, torch.arange(6), true, label, K=4)
    assert ledger["per_class"] == [0.5, None, 0.5, None]
    assert ledger["matrix"] == [[0.5, 0.25, 0.25, 0], [0, 0, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 0]]
    result = noisefile.describe_labels(ledger, ("a", "b", "c", "d"))
    assert "realised 0.5000 (3 of 6 labels changed), no seed" in result.splitlines()[0]
    assert result.splitlines()[3].split() == ["a", "50.0", "50.0", "25.0", "25.0", "."]
    assert result.splitlines()[4].split() == ["b", "-", ".", ".", ".", "."]
