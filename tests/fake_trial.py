"""Stands in for train.py in tests of tuned sweeps: folder, lock, events, signals and exit statuses, no training.

After epoch e of --epochs `val/acc` is e / epochs of 1 - 0.2 log10(lr / best)^2, with the best rate in proportion to --bs and
0.01 at 16, plus a thousandth that depends on the seed. Rates above 5 diverge. An epoch takes a twentieth of a second; where there
is a FAKE_HOLD in the environment, the first one waits for a signal, or until there is a file of that name.
"""

import argparse
import fcntl
import json
import math
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import google_crc32c

p = argparse.ArgumentParser(allow_abbrev=False)
for option in ("runs", "name", "lr", "bs", "epochs", "seed", "measure"):
    p.add_argument(f"--{option}")
p.add_argument("--resume", action="store_true")
args, _ = p.parse_known_args()
lr, bs, epochs = float(args.lr), int(args.bs), int(args.epochs)
folder = Path(args.runs, args.name)
if folder.exists() and not args.resume:
    sys.exit(2)
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder / ".lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
state = folder / "state"
first = int(state.read_text()) if state.exists() else 0
with open(folder.parent / "history.txt", "a") as f:
    f.write(f"{args.name} {first} {lr:g} {args.measure}\n")


def save(status: str, epoch: int, reason: str | None = None) -> None:
    (folder / "tmp").write_text(json.dumps({"status": status, "reason": reason, "steps": epoch, "val_acc": 0.5}))
    os.replace(folder / "tmp", folder / "summary.json")


if not state.exists():
    (folder / "config.json").write_text(json.dumps({"options": {"bs": bs, "lr": lr}}))


def masked_crc(data: bytes) -> bytes:
    """CRC32C as a TFRecord holds it, see study/events.py."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(step: int, tag: bytes, value: float) -> bytes:
    """A TensorBoard event with one scalar, by hand: importing TensorBoard would take most of this program's time."""
    point = b"\x0a" + bytes([len(tag)]) + tag + b"\x15" + struct.pack("<f", value)  # Summary.Value: tag, simple_value
    summary = b"\x0a" + bytes([len(point)]) + point
    data = b"\x10" + bytes([step]) + b"\x2a" + bytes([len(summary)]) + summary  # Event: step, summary
    length = struct.pack("<Q", len(data))
    return length + masked_crc(length) + data + masked_crc(data)


hold = os.environ.get("FAKE_HOLD")
final = 1 - 0.2 * math.log10(lr / (0.01 * bs / 16)) ** 2 + 1e-3 * random.Random(args.seed).random()
with open(folder / f"events.out.tfevents.{first}", "wb") as out:
    for epoch in range(first, epochs + 1):
        if epoch > first or epoch == 0:  # 0 is the untrained network's
            out.write(record(10 * epoch, b"val/acc", 0.1 if epoch == 0 else final * epoch / epochs))
            out.flush()
            state.write_text(str(epoch))
        if lr > 5:
            save("failed", epoch, "train/loss is nan at step 3")
            sys.exit(1)
        if stopped and epoch < epochs:
            save("stopped", epoch, "SIGTERM")
            sys.exit(3)
        save("running", epoch)
        while hold and epoch == first and not stopped and not os.path.exists(hold):
            time.sleep(0.01)
        time.sleep(0.05 if epoch < epochs else 0)
save("finished", epochs)
