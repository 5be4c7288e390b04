"""Stands in for train.py in tests of the sweep: the same options, folder, lock, signals and exit statuses, no training.

A run takes --epochs steps of a tenth of a second; where there is a FAKE_HOLD in the environment, it waits after the first of them
for a signal, or until there is a file of that name. `--noise 0.9` fails in the run, `--lr 9` before it has a folder,
`--wd 9` dies in the middle. `--wd 8` does not listen to signals and has a second process, which holds the lock too.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def note(what: str) -> None:
    with open(Path(args.runs, "history.txt"), "a") as f:
        f.write(
            f"{what} {args.name} {int(args.resume)} {args.threads} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.getcwd()}\n"
        )


def save(status: str, step: int, reason: str | None = None) -> None:
    (folder / "tmp").write_text(json.dumps({"status": status, "reason": reason, "steps": step, "val_acc": 0.5}))
    os.replace(folder / "tmp", folder / "summary.json")


if __name__ == "__main__":  # a server of forked runs imports this
    p = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("runs", "name", "threads", "noise", "lr", "wd", "epochs", "bs"):
        p.add_argument(f"--{option}")
    p.add_argument("--resume", action="store_true")
    args, _ = p.parse_known_args()
    folder = Path(args.runs, args.name)
    if args.lr == "9":
        sys.exit("train.py: error: --lr 9: too large for a test")
    if folder.exists() and not args.resume:
        print("exists already", file=sys.stderr)
        sys.exit(2)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    state = folder / "state"
    known = {"bs": int(args.bs or 128), "threads": int(args.threads or 1), "epochs": int(args.epochs or 64)}
    known |= {name: float(vars(args)[name]) for name in ("noise", "lr", "wd") if vars(args)[name]}
    if not state.exists():
        (folder / "config.json").write_text(json.dumps({"options": known}))
    step = int(state.read_text()) if state.exists() else 0
    (folder / "pid").write_text(str(os.getpid()))
    note("start")
    save("running", step)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    if args.noise == "0.9":
        save("failed", step, "train/loss is nan at step 3")
        sys.exit(1)
    if args.wd == "8":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(
            ["sleep", "60"], pass_fds=[lock.fileno()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    if args.wd == "9":
        print("step 1 is done", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    hold = os.environ.get("FAKE_HOLD")
    while step < int(args.epochs or 3):
        time.sleep(0.1)
        while hold and step == 1 and not stopped and not os.path.exists(hold):
            time.sleep(0.01)
        step += 1
        state.write_text(str(step))
        with open(folder / "steps.txt", "a") as f:
            f.write(f"{step}\n")
        if stopped:
            save("stopped", step, "SIGTERM")
            note("stop")
            sys.exit(3)
    save("finished", step)
    note("end")
