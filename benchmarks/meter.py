"""What `gradsplit.Meter.step` costs in plain steps, beside three plain passes, and how much memory it takes beside a plain step.

    python benchmarks/meter.py                       # ResNet-18 (width 16, B = 128) and a transformer without BatchNorm
    python benchmarks/meter.py --bs 32 --pairs 5     # smaller

Kinds of steps are timed in turn, so that their ratios survive a busy machine; memory is the highest resident size of a
process of its own (on Linux; on a GPU the allocator's own peak), less what it holds before its steps.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import models  # noqa: E402
from data import synchronize  # noqa: E402
from gradsplit import Meter  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Transformer(nn.Module):
    """Logits (B, 10) of tokens (B, T): two layers, without BatchNorm and dropout."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens)).mean(1))


def make(name: str, B: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """(network, x, y, noisy)"""
    torch.manual_seed(0)
    y, noisy = torch.arange(B) % 10, torch.arange(B) % 2 == 0
    if name == "resnet18":
        net, x = (
            models.build_model("resnet18", 3, 10, 16, "bn", 0).to(memory_format=torch.channels_last),
            torch.randn(B, 3, 32, 32),
        )
        x = x.to(memory_format=torch.channels_last)
    else:
        net, x = Transformer(), torch.randint(1000, (B, 32))
    return net.to(DEVICE), x.to(DEVICE), y.to(DEVICE), noisy


def plain(net: nn.Module, x: Tensor, y: Tensor, noisy: Tensor) -> None:
    F.cross_entropy(net(x), y).backward()


def three_passes(net: nn.Module, x: Tensor, y: Tensor, noisy: Tensor) -> None:
    """A forward and a backward each for C, for N and for the step, and both cosines."""
    rows = []
    for keep in (~noisy, noisy):
        where = keep.nonzero().squeeze(1).to(y.device)
        gradient = torch.autograd.grad(F.cross_entropy(net(x)[where], y[where]), list(net.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in gradient]))
    plain(net, x, y, noisy)
    rows.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))
    F.cosine_similarity(rows[0], rows[1], dim=0), F.cosine_similarity(rows[0], rows[2], dim=0)


KINDS = {
    "plain": plain,
    "three passes": three_passes,
    "meter, no mask": lambda net, *batch: Meter(net, masks=0).step(*batch),
    "meter, 1 mask": lambda net, *batch: Meter(net, masks=1).step(*batch),
    "meter, 4 masks": lambda net, *batch: Meter(net, masks=4).step(*batch),
}


def once(kind: str, made: tuple) -> float:
    """Seconds of one step, gradients dropped before it."""
    for p in made[0].parameters():
        p.grad = None
    synchronize(DEVICE)
    began = time.perf_counter()
    KINDS[kind](*made)
    synchronize(DEVICE)
    return time.perf_counter() - began


def times(name: str, B: int, pairs: int) -> dict[str, list[float]]:
    """Seconds of each kind, timed in turn `pairs` times after one that does not count."""
    made, seconds = make(name, B), {kind: [] for kind in KINDS}
    for i in range(pairs + 1):
        for kind, taken in seconds.items():
            took = once(kind, made)
            if i:
                taken.append(took)
    return seconds


def resident(name: str) -> float:
    """MiB of this process by Linux: VmRSS now, VmHWM at the most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**10


def peak(kind: str, name: str, B: int) -> float:
    """MiB that three steps of `kind` take at the most, beyond the network and its batch."""
    made = make(name, B)
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated() / 2**20
    else:  # imports peak above what is left of them
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    for _ in range(3):
        once(kind, made)
    return (torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else resident("VmHWM")) - before


def peak_elsewhere(kind: str, name: str, B: int) -> float:
    command = [sys.executable, __file__, "--memory", kind, "--network", name, "--bs", str(B)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--bs", type=int, default=128)
    p.add_argument("--pairs", type=int, default=15, help="times that each kind of step is timed")
    p.add_argument("--network", choices=["resnet18", "transformer"])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--memory", help="print the peak of this kind of step, in MiB, and nothing else")
    return p


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(peak(args.memory, args.network, args.bs))
        return
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {DEVICE}, {args.threads} threads, B = {args.bs}"
    )
    for name in [args.network] if args.network else ["resnet18", "transformer"]:
        seconds = times(name, args.bs, args.pairs)
        base = peak_elsewhere("plain", name, args.bs)
        print(f"{name}: a plain step {1000 * statistics.median(seconds['plain']):.1f} ms, {base:.0f} MiB")
        for kind, taken in seconds.items():
            ratios = [a / b for a, b in zip(taken, seconds["plain"], strict=True)]
            low, high = min(ratios), max(ratios)
            memory = peak_elsewhere(kind, name, args.bs) / base
            print(f"  {kind}: {statistics.median(ratios):.2f} plain steps ({low:.2f}-{high:.2f}), memory {memory:.2f}")


if __name__ == "__main__":
    main()
