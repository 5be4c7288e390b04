"""Published parameter counts, layer names, and that the seed alone decides the weights."""

import pytest
import torch
import torchvision

import models


def count(name: str, C: int, width: int = 64, norm: str = "bn") -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in models.MODELS[name](C, 10, width, norm).parameters())


def test_parameter_counts():
    assert count("resnet18", 3) == 11_173_962
    assert count("resnet18", 3, norm="gn") == 11_173_962
    assert count("vgg16", 1) == 134_308_810
    features = 134_308_810 - sum(a * b + b for a, b in ((25_088, 4096), (4096, 4096), (4096, 10)))
    assert count("vgg16-linear", 1) == features + 512 * 10 + 10


def test_resnet_has_the_tensors_and_names_of_common_cifar_resnets():
    names = list(models.build("resnet18", 3, 10, 16, "bn", 0).state_dict())
    for name in ("conv1.weight", "bn1.running_var", "layer2.0.shortcut.0.weight", "layer4.1.bn2.bias", "linear.bias"):
        assert name in names
    assert sum(1 for _ in models.ResNet18(3, 10, 16).parameters()) == 62


def test_vgg_is_torchvisions_but_for_the_stem():
    theirs = torchvision.models.vgg16_bn(num_classes=10, init_weights=False).state_dict()
    with torch.device("meta"):
        mine = models.vgg16(1, 10).state_dict()
    assert {k: v.shape for k, v in mine.items() if k != "features.0.weight"} == {
        k: v.shape for k, v in theirs.items() if k != "features.0.weight"
    }


@pytest.mark.parametrize("name", ["resnet18", "vgg16-linear"])
def test_weights_come_from_the_seed_alone(name):
    torch.manual_seed(5)
    first = models.build(name, 1, 10, 8, "bn", 1)
    after = torch.rand(1)
    torch.manual_seed(6)
    second, third = (models.build(name, 1, 10, 8, "bn", seed) for seed in (1, 2))
    torch.manual_seed(5)
    assert torch.rand(1) == after  # the global generator was left alone
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(next(first.parameters()), next(third.parameters()))


@pytest.mark.parametrize("name", ["resnet18", "vgg16-linear"])
def test_double_precision_starts_from_the_same_weights(name):
    want = models.build(name, 1, 10, 8, "bn", 1)
    torch.set_default_dtype(torch.float64)
    try:
        got = models.build(name, 1, 10, 8, "bn", 1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters()))


def test_groupnorm_has_groups_of_eight_and_no_statistics():
    model = models.build("resnet18", 3, 10, 16, "gn", 0)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 20 and all(m.num_channels // m.num_groups == 8 for m in norms)
    assert not list(model.buffers())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
