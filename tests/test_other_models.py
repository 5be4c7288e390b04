"""A small ViT, torchvision's classifiers by name, and networks from a file of one's own."""

import json
import random
import textwrap
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

import epochwise
import models
from conftest import TINY, same_weights, series, summary, weights
from engine import machine, memory, options, sources
from test_metrics import job_for

SHORT = "--width 64 --bs 16 --max-steps 3 --epochs 1 --measure-every 1 --noise 0.4 --synthetic-train 60 --synthetic-test 8 --lr 0.01".split()


def count(name: str, C: int, K: int, size: tuple[int, int]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in models.build_model(name, C, K, 64, "bn", 0, size).parameters())


# ------------------------------------------------------------------------------------------------------------------ ViT


def test_vit_has_the_published_size():
    """Touvron et al. 2021's DeiT-S, patches of 16 at 224 pixels: 22.05 M. For small images patches of 4."""
    with torch.device("meta"):
        assert sum(p.numel() for p in models.ViT(3, 1000, (224, 224), patch=16).parameters()) == 22_050_664
    assert count("vit-small", 3, 10, (32, 32)) == 21_342_346
    assert count("vit-small", 1, 10, (32, 32)) == 21_342_346 - 2 * 16 * 384
    assert count("vit-small", 3, 10, (28, 48)) == 21_342_346 + (7 * 12 - 64) * 384
    assert not list(models.build_model("vit-small", 3, 10, 64, "bn", 0).buffers())


def test_attention_is_torchs():
    """The same weights in `nn.MultiheadAttention` give the same values and the same gradient."""
    torch.manual_seed(0)
    mine, theirs = models.Attention(24, 3).double(), torch.nn.MultiheadAttention(24, 3, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": mine.qkv.weight.detach(),
            "in_proj_bias": mine.qkv.bias.detach(),
            "out_proj.weight": mine.out.weight.detach(),
            "out_proj.bias": mine.out.bias.detach(),
        }
    )
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    got, want = mine(x), theirs(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    g = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (got, want)), rtol=1e-12, atol=1e-12)


def test_the_blocks_are_torchs_encoder_layers():
    torch.manual_seed(0)
    mine = models.EncoderBlock(24, 3).double()
    theirs = torch.nn.TransformerEncoderLayer(
        24, 3, 96, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out."}
    names |= {"linear1.": "hidden.0.", "linear2.": "hidden.2.", "norm1.": "norm1.", "norm2.": "norm2."}
    own = mine.state_dict()
    theirs.load_state_dict({t + part: own[m + part] for t, m in names.items() for part in ("weight", "bias")})
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_vit_trains_with_every_measure(go, monkeypatch):
    """Curvature needs a second derivative of attention. Three blocks and few examples, so that it takes no time."""
    for constant, small in (("CURVATURE_EXAMPLES", 4), ("CURVATURE_PRODUCTS", 2), ("TRACE_PROBES", 2)):
        monkeypatch.setattr(epochwise, constant, small)
    monkeypatch.setitem(
        models.MODELS,
        "vit-small",
        models.Model(lambda C, K, width, norm, size: models.ViT(C, K, size, D=24, depth=3), multiple=4, sized=True),
    )
    given = "--model vit-small --measure full --measure-budget 1e6 --max-steps 1 --chunks 2 --permutations 1".split()
    folder = go(*SHORT, *given)
    assert summary(folder)["status"] == "finished"
    assert set(summary(folder)["measure_seconds"]) >= {"probe", "curvature"}


# ---------------------------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize(
    ("name", "published"),
    [  # of torchvision's documentation: 1000 classes, 3 x 224 x 224 pixels
        ("resnet34", 21_797_672),
        ("vit_b_16", 86_567_656),
        ("efficientnet_b0", 5_288_548),
        ("mobilenet_v3_small", 2_542_856),
        ("vgg11", 132_863_336),
        ("convnext_tiny", 28_589_128),
        ("swin_t", 28_288_354),
    ],
)
def test_torchvisions_have_the_published_sizes(name, published):
    assert count(f"torchvision:{name}", 3, 1000, (224, 224)) == published


def test_one_channel_takes_the_first_of_three():
    one, three = (models.build_model("torchvision:resnet18", C, 10, 64, "bn", 3) for C in (1, 3))
    assert torch.equal(one.conv1.weight, three.conv1.weight[:, :1]) and one.conv1.in_channels == 1
    assert torch.equal(one.fc.weight, three.fc.weight)
    assert not one.bn1.running_mean.any() and one.bn1.num_batches_tracked == 0  # the trial has left no trace
    assert not models.has_dropout(one)


def test_random_depth_counts_as_dropout():
    """Without a layer of class Dropout that is on: found by trying."""
    assert models.has_dropout(models.build_model("torchvision:swin_t", 3, 10, 64, "bn", 0))


def test_torchvision_trains_and_resumes(go):
    given = "--model torchvision:mobilenet_v3_small".split()  # 1x1 pixels behind its stem, and dropout
    whole = go(*SHORT, *given, "--max-steps", "2", name="whole")
    for steps in ("1", "2"):
        cut = go(*SHORT, *given, "--max-steps", steps, *["--resume"] * (steps == "2"), name="cut")
    assert same_weights(whole, cut) and summary(whole)["test_acc"] is not None
    assert options.parse(given).name == "model-torchvision-mobilenet_v3_small"


# ------------------------------------------------------------------------------------------------------------ one's own


OWN = """
    import random
    import torch
    import torchvision
    from torch import nn
    from neighbour_of_mine import HIDDEN

    def small(C, K):
        return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * C, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, K))

    class Attends(nn.Module):
        def __init__(self, C, K):
            super().__init__()
            self.pool, self.attention, self.out = nn.AdaptiveAvgPool2d(2), nn.MultiheadAttention(4 * C, C), nn.Linear(4 * C, K)
        def forward(self, x):
            x = self.pool(x).flatten(1)[:, None]
            return self.out(self.attention(x, x, x, need_weights=False)[0][:, 0])

    def attentive(C, K):
        return Attends(C, K)

    def dropping(C, K):
        return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * C, K), nn.Dropout1d(0.5))

    def lazy(C, K):
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(K))

    def frozen(C, K):
        net = small(C, K)
        net[2].requires_grad_(False)
        return net

    def normed(C, K):
        return nn.Sequential(nn.Conv2d(C, 4, 3, stride=32, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, K))

    def fails(C, K):
        raise KeyError("no idea")

    def leaves(C, K):
        raise SystemExit(5)

    def no_module(C, K):
        return torch.zeros(C, K)

    def one_class(C, K):
        return small(C, 1)

    def two_outputs(C, K):
        class Two(nn.Sequential):
            def forward(self, x):
                return super().forward(x), x
        return Two(*small(C, K))

    def viewing(C, K):
        class View(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(C, 4, 3)
            def forward(self, x):
                return self.conv(x).view(len(x), -1)
        return View()

    class Skips(nn.Module):
        def __init__(self, C, K):
            super().__init__()
            self.pool, self.stem, self.out = nn.AdaptiveAvgPool2d(4), nn.Linear(16 * C, 8), nn.Linear(8, K)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        def forward(self, x):
            x = self.stem(self.pool(x).flatten(1))
            for i, block in enumerate(self.blocks):
                if not self.training or (random.random() if i else float(torch.rand(()))) < 0.3:
                    x = x + torch.tanh(block(x))
            return self.out(x)

    def skipping(C, K):
        return Skips(C, K)

    class Deformed(nn.Module):
        def __init__(self, C, K):
            super().__init__()
            self.offset, self.out = nn.Conv2d(C, 18, 3, stride=8, padding=1), nn.Linear(4, K)
            self.weight = nn.Parameter(torch.randn(4, C, 3, 3))
        def forward(self, x):
            h = torchvision.ops.deform_conv2d(x, self.offset(x), self.weight, stride=8, padding=1)
            return self.out(h.relu().mean((2, 3)))

    def deformed(C, K):
        return Deformed(C, K)

    def hooked(C, K):
        net = small(C, K)
        net[2].register_full_backward_pre_hook(lambda *_: None)
        return net

    def idle(C, K):
        net = small(C, K)
        net.spare = nn.Linear(2, 2)
        net.forward = lambda x: nn.Sequential(*list(net)[:-1])(x)
        return net

    number = 5
"""


@pytest.fixture
def own(tmp_path):
    """A file of networks, outside of the repository, with a neighbour that it imports."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "neighbour_of_mine.py").write_text("HIDDEN = 8\n")
    (folder / "my nets.py").write_text(textwrap.dedent(OWN))
    return folder / "my nets.py"


def test_an_own_function_trains_resumes_and_is_named(go, own, monkeypatch):
    monkeypatch.chdir(own.parent)
    given = [*SHORT, "--model", "my nets.py:small"]
    whole = go(*given, name="whole")
    opts = json.loads((whole / "config.json").read_text())["options"]
    assert opts["model"] == f"{own}:small"
    assert json.loads((whole / "config.json").read_text())["resolved"]["parameters"] == 48 * 8 + 8 + 8 * 10 + 10
    go(*given, "--max-steps", "1", name="cut")
    monkeypatch.chdir("/")
    given = [*SHORT, "--model", f"{own}:small"]
    assert same_weights(whole, go(*given, "--resume", name="cut"))
    name = options.parse(given).name
    assert f"model-my-nets-small-{options.path_hash(str(own))}" in name
    go(*SHORT, "--model", f"{own}:dropping", "--resume", name="cut", status=2)


def test_all_measures_of_an_own_function(go, own, monkeypatch):
    """With torch's attention, whose fused form has no second derivative."""
    monkeypatch.setattr(epochwise, "CURVATURE_EXAMPLES", 8)
    folder = go(
        *SHORT,
        "--model",
        f"{own}:attentive",
        *"--measure full --measure-budget 1e6 --chunks 2 --measure-bn separate".split(),
    )
    assert summary(folder)["status"] == "finished" and "curvature" in summary(folder)["measure_seconds"]


def test_a_measure_that_a_network_does_not_have_is_left_out(go, own, capsys):
    """torchvision's deformable convolution has no second derivative: said once, and the run goes on, and goes on again."""
    given = [
        *SHORT,
        "--model",
        f"{own}:deformed",
        *"--measure full --measure-budget 1e6 --chunks 2 --permutations 1".split(),
    ]
    folder = go(*given, "--max-steps", "1")
    said = capsys.readouterr().err
    assert said.count("warning: curvature is left out: double backwards on deform_conv2d not supported") == 1
    assert summary(go(*given, "--resume"))["steps"] == 3
    found = series(folder)
    assert "isotropy/participation" in found and "probe/susceptibility" in found
    assert not any(tag.startswith("curvature/") for tag in found)


@pytest.mark.parametrize("function", ["dropping", "frozen"])
def test_what_torch_allows(go, own, function):
    model = models.build_model(f"{own}:{function}", 3, 10, 64, "bn", 1)
    again = models.build_model(f"{own}:{function}", 3, 10, 64, "bn", 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert models.has_dropout(model) == (function == "dropping")
    whole = go(*SHORT, "--model", f"{own}:{function}", name="whole")
    go(*SHORT, "--model", f"{own}:{function}", "--max-steps", "1", name="cut")
    assert same_weights(whole, go(*SHORT, "--model", f"{own}:{function}", "--resume", name="cut"))


def test_a_network_that_skips_blocks_trains_alike_whatever_is_measured(go, own):
    """By numbers that torch and Python draw. Weight decay and momentum leave a block alone in steps that skip it."""
    given = [
        *SHORT,
        "--model",
        f"{own}:skipping",
        "--precision",
        "64-true",
        "--wd",
        "0.1",
        "--max-steps",
        "6",
        "--epochs",
        "2",
    ]
    off, split = (weights(go(*given, "--measure", mode, name=mode)) for mode in ("off", "split"))
    for name in off:
        torch.testing.assert_close(off[name], split[name], rtol=1e-10, atol=1e-12)


def test_a_network_that_skips_blocks_resumes(go, own):
    """Also where its optimizer has no state yet for a block that each step so far has skipped."""
    given = [*SHORT, "--model", f"{own}:skipping", "--optimizer", "adam", "--measure", "split"]
    cut = go(*given, "--max-steps", "1", name="cut")
    state = torch.load(cut / "last.ckpt", weights_only=True)
    assert len(state["optimizer"]["state"]) < len(state["optimizer"]["param_groups"][0]["params"])
    assert same_weights(go(*given, name="whole"), go(*given, "--resume", name="cut"))


def test_processes_that_skip_different_blocks_are_one_run(zygote, own, tmp_path):
    given = [
        *TINY,
        *SHORT,
        "--model",
        f"{own}:skipping",
        "--precision",
        "64-true",
        "--wd",
        "0.1",
        "--runs",
        str(tmp_path),
    ]
    found = []
    for mode in ("off", "split"):
        assert zygote.run([*given, "--measure", mode, "--name", mode], ranks=2) == [0, 0], zygote.output()
        found.append(weights(tmp_path / mode))
    for name in found[0]:
        torch.testing.assert_close(*(f[name] for f in found), rtol=1e-10, atol=1e-12)


class Draws(nn.Module):
    """A layer and BatchNorm, and code of its own that draws."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.draw, self.norm = draw, nn.BatchNorm1d(4)

    def forward(self, x):
        return self.draw(self.norm(x), self.training)


DRAWS = {
    "dropout": lambda: nn.Dropout(0.5),
    "dropout1d": lambda: nn.Dropout1d(0.5),
    "alpha": lambda: nn.AlphaDropout(0.5),
    "feature-alpha": lambda: nn.FeatureAlphaDropout(0.5),
    "rrelu": lambda: nn.RReLU(),
    "depth": lambda: StochasticDepth(0.5, "row"),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5),
    "function": lambda: Draws(lambda x, training: nn.functional.dropout(x, 0.5, training)),
    "python": lambda: Draws(lambda x, training: x * random.random() if training else x),
    "numpy": lambda: Draws(lambda x, training: x * float(np.random.rand()) if training else x),
    "none": lambda: nn.BatchNorm1d(4),
}


@pytest.mark.parametrize("name", DRAWS)
def test_measures_after_an_epoch_draw_nothing(name):
    """Whatever draws in training is as in evaluation, and BatchNorm beside it as in training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), DRAWS[name](), nn.Linear(4, 10))
    models.try_out(net, 3, 10, (2, 2), "--model x")
    assert models.has_dropout(net) == (name != "none")
    job = job_for()
    job.context.module = net
    x, seen = torch.randn(8, 3, 2, 2), []
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.register_forward_hook(lambda m, args, out: seen.append(m.training))
    modes = [m.training for m in net.modules()]
    with epochwise.undisturbed(job.context):
        assert torch.equal(net(x), net(x)) and all(seen)
    assert modes == [m.training for m in net.modules()]


@pytest.mark.parametrize(
    ("given", "result"),
    [
        (
            "resnet99",
            "'resnet99' is not one of resnet18, vgg16, vgg16-linear, vit-small, torchvision:NAME or FILE.py:FUNCTION",
        ),
        ("torchvision:resnet99", "torchvision:resnet99: not one of torchvision's classifiers, like resnet34"),
        ("torchvision:fcn_resnet50", "not one of torchvision's classifiers"),
        ("torchvision:inception_v3", "the module raised RuntimeError: Calculated padded input size"),
        ("torchvision:maxvit_t", "torchvision, for images of 32 x 32 pixels, raised ValueError: Input size (8, 8)"),
        ("OWN:small --width 8", "--width 8: only resnet18 has a width"),
        ("OWN:small --norm gn", "--norm gn: only resnet18 has it"),
        ("vit-small --norm gn", "--norm gn: only resnet18 has it, not vit-small"),
        ("nowhere.py:small", "there is no file"),
        ("OWN:nothing", "the file has no function nothing"),
        ("OWN:number", "the file has no function number"),
        ("OWN:fails", "fails(3, 10) raised KeyError: 'no idea'"),
        ("OWN:leaves", "leaves(3, 10) raised SystemExit: 5"),
        ("OWN:no_module", "no_module(3, 10) returned a Tensor, not a torch.nn.Module"),
        ("OWN:one_class", "of 2 images of 3 x 32 x 32 the module makes (2, 1), not logits (2, 10)"),
        ("OWN:two_outputs", "the module makes a tuple, not logits (2, 10)"),
        ("OWN:viewing", "the module raised RuntimeError: view size is not compatible"),
        ("OWN:lazy", "on the CPU the module raised ValueError: Attempted to use an uninitialized parameter"),
        ("OWN:hooked", "measuring (--measure off does not) raised ValueError: the module 2 has a backward hook"),
        ("OWN:normed --bs 47", "on a batch of one image the module raised ValueError: Expected more than 1 value"),
        ("OWN:normed --measure-bn separate", "on a batch of one image the module raised ValueError"),
        ("BROKEN:net", "the file raised SyntaxError"),
    ],
)
def test_refused(go, own, capsys, given, result):
    """One line that names the option, status 2, before there is a folder."""
    (own.parent / "broken.py").write_text("def net(C, K:\n")
    name, *rest = given.replace("BROKEN", str(own.parent / "broken.py")).replace("OWN", str(own)).split(" --")
    go(*SHORT, "--model", name, *(word for option in rest for word in f"--{option}".split()), status=2)
    error = capsys.readouterr().err
    assert result in error and error.count("\n") == 1 and error.startswith("train.py: error: --")


def test_idle_parameters_are_named(own):
    with pytest.raises(models.InputError, match="not logits|do not depend on the parameter"):
        models.build_model(f"{own}:idle", 3, 10, 64, "bn", 0)


# ----------------------------------------------------------------------------------------------------------- own images


@pytest.fixture
def rectangles(tmp_path):
    """60 and 8 grey images of 28 x 44 pixels at random."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (68, 28, 44), dtype=np.uint8), np.arange(68) % 3
    np.savez_compressed(tmp_path / "own.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    return tmp_path / "own.npz"


@pytest.mark.parametrize(
    "model", ["resnet18 --width 4", "vit-small --width 64", "torchvision:squeezenet1_1 --width 64"]
)
def test_rectangular_images_train(go, rectangles, monkeypatch, capsys, model):
    monkeypatch.setattr(models.ViT.__init__, "__defaults__", (4, 24, 2))
    folder = go("--dataset", str(rectangles), "--model", *model.split(), *"--bs 16 --max-steps 2 --lr 0.01".split())
    assert summary(folder)["status"] == "finished"
    size = (60 - 12) * 2 * 36 * 52 + (12 + 8) * 28 * 44
    assert f"memory: {memory.format_bytes(size)} for the images; network" in capsys.readouterr().out


def test_sides_that_a_model_cannot_take(go, tmp_path, rectangles, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (68, 30, 44), dtype=np.uint8), np.arange(68) % 3
    np.savez(tmp_path / "odd.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    for data, model, result in (
        (tmp_path / "odd.npz", "vit-small", "needs images whose sides are multiples of 4, not 30 x 44"),
        (tmp_path / "odd.npz", "vgg16-linear", "needs images of at least 32 pixels, not 30"),
        (rectangles, "torchvision:vit_b_32", "raised"),
    ):
        go("--dataset", str(data), "--model", model, "--bs", "16", "--width", "64", status=2)
        error = capsys.readouterr().err
        assert result in error and error.count("\n") == 1


def test_what_does_not_fit_is_refused_from_the_headers(go, tmp_path, monkeypatch, capsys):
    """Before a pixel is read: this file has none."""
    path = tmp_path / "huge.npz"
    with zipfile.ZipFile(path, "w") as z:
        for name, shape in (("x_train", (10**6, 224, 160, 3)), ("x_test", (1000, 224, 160, 3))):
            with z.open(f"{name}.npy", "w") as f:
                np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with z.open("y_train.npy", "w") as f:
            np.lib.format.write_array(f, np.arange(7))
    assert sources.own_shape(str(path), None) == (10**6, 1000, 224, 160, 3, 7, 0)
    monkeypatch.setattr(machine, "memory", lambda: 2.0**36)
    go("--dataset", str(path), "--no-augment", "--accelerator", "cpu", status=2)
    error = capsys.readouterr().err
    n = 800_000 + 10**6 + 200_000 + 2000  # on the device, as loaded, held out, and the test set twice
    needed = f"the images take {memory.format_bytes(n * 224 * 160 * 3)} of memory"
    assert f"--dataset {path}: {needed}" in error and "may use 64.0 GiB" in error and error.count("\n") == 1
