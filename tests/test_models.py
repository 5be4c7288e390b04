"""Published parameter counts, layer names, and that the seed alone decides the weights."""

import importlib
import os
import sys
import textwrap

import pytest
import torch
import torchvision

import models
from conftest import ROOT, slow


def count(name: str, C: int, width: int = 64, norm: str = "bn") -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in models.MODELS[name].make(C, 10, width, norm).parameters())


def test_parameter_counts():
    assert count("resnet18", 3) == 11_173_962
    assert count("resnet18", 3, norm="gn") == 11_173_962
    assert count("vgg16", 1) == 134_308_810
    features = 134_308_810 - sum(a * b + b for a, b in ((25_088, 4096), (4096, 4096), (4096, 10)))
    assert count("vgg16-linear", 1) == features + 512 * 10 + 10


def test_resnet_has_the_tensors_and_names_of_common_cifar_resnets():
    names = list(models.build_model("resnet18", 3, 10, 16, "bn", 0).state_dict())
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
    first = models.build_model(name, 1, 10, 8, "bn", 1)
    after = torch.rand(1)
    torch.manual_seed(6)
    second, third = (models.build_model(name, 1, 10, 8, "bn", seed) for seed in (1, 2))
    torch.manual_seed(5)
    assert torch.rand(1) == after  # the global generator was left alone
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(next(first.parameters()), next(third.parameters()))


@pytest.mark.parametrize("name", ["resnet18", "vgg16-linear"])
def test_double_precision_starts_from_the_same_weights(name):
    want = models.build_model(name, 1, 10, 8, "bn", 1)
    torch.set_default_dtype(torch.float64)
    try:
        got = models.build_model(name, 1, 10, 8, "bn", 1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters()))


def test_groupnorm_has_groups_of_eight_and_no_statistics():
    model = models.build_model("resnet18", 3, 10, 16, "gn", 0)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 20 and all(m.num_channels // m.num_groups == 8 for m in norms)
    assert not list(model.buffers())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


MINE = {
    "nets.py": """
        import models.blocks, data
        from engine.parts import K_FROM_A_FOLDER
        from helper import late
        from losses import cross_entropy  # ours: there is no other
        from metrics import confusion  # ours: beside the file lie no modules of that name

        class Net(models.blocks.nn.Module):
            def __init__(self, C, K):
                super().__init__()
                self.block = models.make(C, K + K_FROM_A_FOLDER)

            def forward(self, x):
                from measure import scale
                return self.block(x) * scale * late() * data.one()
        """,
    "models/__init__.py": "from models.blocks import Linear\nfrom .blocks import nn\ndef make(C, K):\n    return nn.Sequential(nn.Flatten(), Linear(C, K))",
    "models/blocks.py": "import noise\nfrom torch import nn\ndef Linear(C, K):\n    return nn.Linear(1024 * C, K, bias=noise.BIAS)",
    "noise.py": "BIAS = False",
    "measure.py": "scale = 2.0",
    "data.py": "def one():\n    import engine.parts as parts\n    return parts.K_FROM_A_FOLDER + 1",
    "helper.py": "def late():\n    from models import blocks\n    import noise as n\n    return 1.0 + n.BIAS",
    "engine/parts.py": "K_FROM_A_FOLDER = 0",
    "metrics/notes.txt": "accuracy",
}


def test_a_file_of_ones_own_imports_what_lies_beside_it_and_the_rest_ours(tmp_path):
    """Whatever it is called, on top and within functions, of its neighbours too; ours are still ours, and a fork knows both."""
    before = {name: sys.modules[name] for name in ("models", "data", "losses", "measure", "metrics", "engine")}
    for name, text in MINE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    for _ in range(2):
        net = models.build_model(f"{tmp_path / 'nets.py'}:Net", 3, 10, 64, "bn", 0)
        assert [p.shape for p in net.parameters()] == [(10, 3072)]
        x = torch.ones(1, 3, 32, 32)
        torch.testing.assert_close(net(x), 2 * net.block(x))
    pid = os.fork()
    if pid == 0:
        theirs = type(net).forward.__globals__
        os._exit(0 if (theirs["late"](), theirs["data"].one()) == (1.0, 1) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert {name: sys.modules[name] for name in before} == before
    again = {name: importlib.import_module(name) for name in before}
    assert (
        again == before
        and not hasattr(models, "make")
        and importlib.import_module("noise").__file__.startswith(str(ROOT))
    )


GRADIENTS = """
import torch, models
torch.set_num_threads({threads})
g = torch.Generator().manual_seed(0)
for width in (4, 8, 12):
    mine = models.StridedPointwiseConv(width, 2 * width, 2)
    theirs = torch.nn.Conv2d(width, 2 * width, 1, 2, bias=False).double()
    theirs.load_state_dict(mine.state_dict())
    mine = mine.to(memory_format=torch.channels_last)
    for B in (*range(1, 34), 65, 127):
        x = torch.randn(B, width, 32, 32, generator=g)
        upper = torch.randn(B, 2 * width, 16, 16, generator=g)
        ours = x.clone(memory_format=torch.channels_last).requires_grad_()
        plain = x.double().requires_grad_()
        out, want = mine(ours), theirs(plain)
        got = [out, *torch.autograd.grad(out, [mine.weight, ours], upper.contiguous(memory_format=torch.channels_last))]
        exact = [want, *torch.autograd.grad(want, [theirs.weight, plain], upper.double())]
        for a, b in zip(got, exact, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm(), (width, B)
    net = models.build_model("resnet18", 3, 10, width, "bn", 0).to(memory_format=torch.channels_last)
    for B in (2, 3, 31):  # the whole network, through every other convolution it has
        x = torch.randn(B, 3, 32, 32, generator=g)
        labels = torch.randint(10, (B,), generator=g)
        other = models.build_model("resnet18", 3, 10, width, "bn", 0).double()
        grads = []
        for model, images in ((net, x.contiguous(memory_format=torch.channels_last)), (other, x.double())):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            grads.append(torch.cat([t.double().reshape(-1) for t in torch.autograd.grad(loss, list(model.parameters()))]))
        assert (grads[0] - grads[1]).norm() <= 0.02 * grads[1].norm(), (width, B)  # a ReLU may turn in float32
"""


@pytest.mark.parametrize("threads", slow(1, 2, 4))
def test_narrow_networks_have_right_gradients_and_leave_memory_alone(zygote, threads):
    """In a process of its own: native code that writes where it must not ends the process, and not the tests."""
    assert zygote.run(code=GRADIENTS.format(threads=threads)) == [0], zygote.output()
