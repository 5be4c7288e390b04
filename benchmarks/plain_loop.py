"""What a user would pick instead: a plain training loop in the public style, to compare with.

Float32, NCHW, a `DataLoader` with workers over PIL images, torchvision's transforms, `.item()` in every step. The same
model and images as train.py's. Prints one line of JSON.

    python benchmarks/plain_loop.py --width 16 --bs 128 --steps 60
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import transforms  # noqa: E402

import models  # noqa: E402
from data import InputError, synchronize  # noqa: E402
from engine import cmdline, options, sources  # noqa: E402
from engine.hardware import peak_memory_mb  # noqa: E402

WARMUP = 10  # steps not timed


class Pictures(Dataset):
    """(image, label), the image as a PIL picture through `transform`, as torchvision's CIFAR10 hands them out."""

    def __init__(self, images, labels, transform) -> None:
        self.images, self.labels, self.transform = images.numpy(), labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def loader(source, B: int, workers: int, pin: bool) -> DataLoader:
    """Shuffled batches with the usual augmentation."""
    augment = [transforms.RandomCrop(source.x_train.shape[1], padding=4), transforms.RandomHorizontalFlip()]
    normal = [transforms.ToTensor(), transforms.Normalize(source.mean, source.std)]
    labels = source.y_train if source.stored is None else source.y_train[source.stored]
    pictures = Pictures(source.x_train, labels, transforms.Compose([*augment, *normal]))
    return DataLoader(pictures, B, shuffle=True, num_workers=workers, pin_memory=pin, drop_last=True)


def main() -> None:
    own = argparse.ArgumentParser(allow_abbrev=False)
    own.add_argument("--steps", type=cmdline.count, default=60)
    own.add_argument("--workers", type=int, default=2)
    own.add_argument("--autocast", action="store_true", help="bf16, to compare memory in the same precision")
    mine, rest = own.parse_known_args()
    args = options.parse(["--dataset", "synthetic", *rest])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = sources.load(args)
    net = models.build_model(args.model, source.x_train.shape[-1], len(source.classes), args.width, args.norm, 0).to(
        device
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.wd)
    batches = loader(source, args.bs, mine.workers, device.type == "cuda")
    step, seen, loss_sum, correct = 0, 0, 0.0, 0
    warmup, began, images = min(WARMUP, mine.steps // 2), time.perf_counter(), 0
    clock = began
    net.train()
    while step < mine.steps:
        for inputs, targets in batches:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=mine.autocast):
                outputs = net(inputs)
                loss = criterion(outputs, targets)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            seen += len(targets)
            correct += (outputs.argmax(1) == targets).sum().item()
            step, images = step + 1, images + len(targets)
            if step == warmup:
                synchronize(device)
                clock, images = time.perf_counter(), 0
            if step == mine.steps:
                break
    synchronize(device)
    ended = time.perf_counter()
    result = {"images_per_second": images / (ended - clock), "seconds": ended - began}
    print(
        json.dumps(result | {"peak_memory_mb": peak_memory_mb(device), "loss": loss_sum / step, "acc": correct / seen})
    )


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        cmdline.complain(e, "plain_loop.py")
        sys.exit(2)
