"""Splits, streams, crops and flips, the drawn set, and the published constants of the real ones."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

import data
import datasets
from data import TrainSet
from engine import options, sources


def coordinates(n: int) -> torch.Tensor:
    """n equal images (n, 32, 32, 3) whose pixel at (y, x) is (y + 1, x + 1, 255): zero is padding alone."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    return torch.stack([y + 1, x + 1, torch.full_like(x, 255)], -1).to(torch.uint8).expand(n, 32, 32, 3)


def draw_of(images: torch.Tensor) -> torch.Tensor:
    """(dy, dx, flip) (n, 3) read off crops (n, 3, 32, 32) of `coordinates`, from pixels that are never padding."""
    row, col, left = images[:, 0, 16, 16].int(), images[:, 1, 16, 16].int(), images[:, 1, 16, 15].int()
    flip = (left > col).int()
    dx = torch.where(flip == 1, col - 1 - 15, col - 1 - 16) + 4
    return torch.stack([row - 1 - 16 + 4, dx, flip], 1).long()


def ours(n: int, epoch: int = 0) -> torch.Tensor:
    """Crops (n, 3, 32, 32) uint8 of one epoch, in its order."""
    train = TrainSet(coordinates(n), torch.zeros(n).long(), torch.zeros(n).long(), (0,) * 3, (1,) * 3, "cpu", True)
    return train.images.cut(train.epoch(0, epoch).starts)


def chi_squared(draws: torch.Tensor) -> float:
    """Against uniform over the 9 x 9 x 2 cells: 161 degrees of freedom, so 161 +- 18."""
    cell = (draws[:, 0] * 9 + draws[:, 1]) * 2 + draws[:, 2]
    count = torch.bincount(cell, minlength=162).double()
    assert len(count) == 162
    expected = len(draws) / 162
    return float(((count - expected) ** 2 / expected).sum())


@pytest.mark.slow
def test_crop_and_flip_have_torchvisions_distribution():
    n = 20_000
    theirs = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    image = coordinates(1)[0].permute(2, 0, 1).contiguous()
    torch.manual_seed(0)
    reference = torch.stack([theirs(image) for _ in range(n)])
    crops = ours(n)
    drawn = draw_of(crops)
    # Both are uniform over offsets and flips (5 standard deviations of chi-squared above its mean) ...
    assert chi_squared(draw_of(reference)) < 161 + 5 * 18
    assert 161 - 5 * 18 < chi_squared(drawn) < 161 + 5 * 18
    # ... and the same draw gives the same picture, black padding included.
    by_draw = {tuple(d): crop for d, crop in zip(draw_of(reference).tolist(), reference)}
    assert len(by_draw) == 162
    assert all(torch.equal(crop, by_draw[tuple(d)]) for d, crop in zip(drawn.tolist(), crops))


def test_crops_and_flips_of_rectangles_are_cut_by_hand():
    x = torch.randint(1, 256, (12, 30, 44, 3), dtype=torch.uint8)
    train = TrainSet(x, torch.zeros(12).long(), torch.zeros(12).long(), (0,) * 3, (1,) * 3, "cpu", True)
    index = torch.arange(12).repeat_interleave(4)
    g = torch.Generator().manual_seed(0)
    (dy, dx), flip = torch.randint(9, (2, 48), generator=g), torch.arange(48) % 2
    got = train.images.cut(train.images.starts(index, dy, dx, flip))
    padded = F.pad(x, (0, 0, 4, 4, 4, 4))
    for i in range(48):
        want = padded[index[i], dy[i] : dy[i] + 30, dx[i] : dx[i] + 44]
        assert torch.equal(got[i].permute(1, 2, 0), want.flip(1) if flip[i] else want)


def test_augmentation_is_per_example_and_changes_with_the_epoch():
    first, second = draw_of(ours(1000, 0)), draw_of(ours(1000, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, draw_of(ours(1000, 0)))
    lag = (first[1:] == first[:-1]).all(1).double().mean()  # neighbours agree in 1 of 162 cases
    assert lag < 0.03


@pytest.mark.parametrize(("pad", "mirror"), [(4, True), (0, True), (4, False), (0, False)])
def test_the_padded_and_mirrored_copy(pad, mirror, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 7 * 30 * 28)
    x = torch.randint(1, 256, (3, 20, 30, 28), dtype=torch.uint8).permute(1, 2, 3, 0)  # not contiguous, as an own .npz
    for index in (None, torch.arange(1, 20, 2)):
        padded = F.pad(x if index is None else x[index], (0, 0, pad, pad, pad, pad))
        want = torch.cat([padded, padded.flip(2)]) if mirror else padded
        got = data.Images(x, (0,) * 3, (1,) * 3, "cpu", pad, mirror, index).rows
        assert torch.equal(torch.empty(0, dtype=torch.uint8).set_(got.untyped_storage()), want.flatten())


def test_the_set_is_in_memory_once_while_it_is_padded():
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                sizes[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
            return out

    x, sizes = torch.ones(5 * data.BLOCK // (28 * 28), 28, 28, 1, dtype=torch.uint8), {}
    with Sizes():
        data.Images(x, (0,), (1,), "cpu", 4, True)
    *others, largest = sorted(sizes.values())
    assert largest == 2 * len(x) * 36 * 36 and max(others) <= data.BLOCK  # nothing else beyond a block


def test_crop_is_channels_last_and_normalised():
    x = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8)
    train = TrainSet(x, torch.arange(6), torch.arange(6), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "cpu", augment=False)
    plan = train.epoch(3, 0)
    batch = train.batch(plan, 0, 6)
    assert batch.x.is_contiguous(memory_format=torch.channels_last)
    want = v2.Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))(x[plan.index].permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(batch.x, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(train.images.plain(plan.index), batch.x)
    assert torch.equal(batch.y, plan.index)


def test_batches_cover_the_epoch_and_keep_the_short_one():
    n, B = 103, 25
    labels, true = torch.arange(n), torch.arange(n).clone()
    true[::3] = -1  # noisy
    train = TrainSet(coordinates(n), labels, true, (0,) * 3, (1,) * 3, "cpu", True)
    plan = train.epoch(0, 5)
    batches = [train.batch(plan, i, B) for i in range(5)]
    assert [b.size for b in batches] == [25, 25, 25, 25, 3]
    assert torch.equal(torch.cat([b.y for b in batches]).sort().values, torch.arange(n))
    assert [b.n_noisy for b in batches] == [int((b.y != b.true).sum()) for b in batches]
    for world_size in (2, 4):  # each batch's shares put together are the batch, pixels included
        for i, whole in enumerate(batches):
            parts = [train.batch(plan, i, B, rank, world_size) for rank in range(world_size)]
            assert torch.equal(torch.cat([p.x for p in parts]), whole.x)
            assert torch.equal(torch.cat([p.y for p in parts]), whole.y)
            assert {(p.size, p.n_noisy) for p in parts} == {(whole.size, whole.n_noisy)}


def test_streams_are_apart():
    names = ["noise", "split", "subset", "order", "augment"]
    first = {name: torch.rand(4, generator=data.generator(0, name)).tolist() for name in names}
    assert len({tuple(v) for v in first.values()}) == len(names)
    assert torch.rand(4, generator=data.generator(0, "order")).tolist() == first["order"]
    assert torch.rand(4, generator=data.generator(0, "order", 1)).tolist() != first["order"]
    assert torch.rand(4, generator=data.generator(1, "order")).tolist() != first["order"]


def test_split_is_a_partition():
    index, held = data.split(1000, 0.2, seed=0)
    assert len(held) == 200
    assert torch.equal(torch.cat([index, held]).sort().values, torch.arange(1000))
    assert not torch.equal(held, data.split(1000, 0.2, seed=1)[1])
    index, held = data.split(1000, 0.25, seed=0, subset=100)
    assert (len(index), len(held), len(torch.cat([index, held]).unique())) == (75, 25, 100)
    assert torch.equal(torch.cat([index, held]).sort().values, data.drawn(1000, 0, 100))


def test_synthetic_is_the_same_every_time_and_balanced():
    x, y = datasets.synthetic(500, 0, "train")
    again, _ = datasets.synthetic(500, 0, "train")
    assert torch.equal(x, again) and x.shape == (500, 32, 32, 3) and x.dtype == torch.uint8
    assert torch.bincount(y).tolist() == [50] * 10
    other, _ = datasets.synthetic(500, 0, "test")
    assert not torch.equal(x, other)
    # No trivial cue: the classes' mean colours lie within the spread of a single image's.
    means = x.double().mean((1, 2))
    of_class = torch.stack([means[y == k].mean(0) for k in range(10)])
    assert of_class.std(0).max() < 0.5 * means.std(0).min()


def test_pixel_statistics_are_exact():
    x = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8)
    mean, std = data.pixel_statistics(x)
    pixels = (x.double() / 255).reshape(-1, 3)
    assert mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-12)
    assert std == pytest.approx(pixels.std(0, correction=0).tolist(), abs=1e-12)


def test_real_cifar10(real_data):
    source = sources.load(SimpleNamespace(dataset="cifar10", data_dir=str(real_data)))
    assert source.x_train.shape == (50_000, 32, 32, 3) and source.x_test.shape == (10_000, 32, 32, 3)
    assert torch.bincount(source.y_train).tolist() == [5000] * 10
    mean, std = data.pixel_statistics(source.x_train)
    assert source.mean == pytest.approx(mean, abs=1e-4) and source.std == pytest.approx(std, abs=1e-4)


def test_real_fashion_mnist(real_data):
    source = sources.load(SimpleNamespace(dataset="fmnist", data_dir=str(real_data)))
    assert source.x_train.shape == (60_000, 32, 32, 1) and source.x_test.shape == (10_000, 32, 32, 1)
    assert torch.bincount(source.y_train).tolist() == [6000] * 10
    raw = (real_data / "FashionMNIST/raw/train-images-idx3-ubyte").read_bytes()[16:]
    mean, std = data.pixel_statistics(torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 28, 28, 1))
    assert source.mean == pytest.approx(mean, abs=1e-4) and source.std == pytest.approx(std, abs=1e-4)


def test_a_stream_seed_is_what_it_says():
    want = int.from_bytes(hashlib.sha256(b"7/order/3").digest()[:4], "little")
    assert data.stream_seed(7, "order", 3) == want


def test_torchvision_does_not_check_again_what_has_been_checked(real_data, monkeypatch):
    """Its own sums of all six batches, once for each of the two parts; the list of names, a few bytes, it sums up all the same."""
    import torchvision

    original, summed = torchvision.datasets.cifar.check_integrity, []
    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda path, md5: (summed.append(path), original(path, md5))[1]
    )
    args = options.parse(["--data-dir", str(real_data)])
    assert len(sources.load(args).y_test) == 10_000
    assert {path.rpartition("/")[2] for path in summed} == {"batches.meta"}
