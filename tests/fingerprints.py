"""Fingerprints of what a change of structure must not change: weights, series and labels of runs, tables of a report.

    python tests/fingerprints.py record BEFORE.json            # makes about two dozen tiny runs, in two minutes
    python tests/fingerprints.py compare BEFORE.json           # makes them again and names what differs; exit status 1

Commands are run as a user runs them. The bits depend on processor, torch and threads, so a file is worth something only on
the machine that it was recorded on, and is not kept in the repository.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--dataset synthetic --synthetic-train 200 --synthetic-test 40 --width 8 --bs 32 --epochs 2 --measure-every 2 "
    "--precision 32-true --accelerator cpu --threads 1"
)
FULL = "--measure full --measure-budget 5"
# {run: options}; {files} is the folder of `make_files`. "two:" has two processes, "kill:" is killed and resumed.
RUNS = {
    "uniform-split-onecycle": "--noise 0.5 --sched onecycle --sched-steps 8",
    "symmetric-full": f"--noise-type symmetric --noise 0.4 {FULL}",
    "pair-eval-cosine": f"--noise-type pair --noise 0.3 --measure-bn eval {FULL} --sched cosine --sched-epochs 2",
    "asymmetric-separate": f"--noise-type asymmetric --noise 0.5 --measure-bn separate {FULL}",
    "matrix": "--noise-type matrix --noise 1 --noise-matrix {files}/matrix.npy",
    "instance-full": f"--noise-type instance --noise 0.4 {FULL} --stratify --chunks 3 --window 2",
    "dynamic": f"--noise-type dynamic --noise 0.4 {FULL}",
    "human": "--noise-type human --noise-file {files}/human.pt --noise-labels worse_label",
    "file": f"--noise-type file --noise-file {{files}}/noise.npz {FULL}",
    "matched": "--noise-type matched --noise-file {files}/noise.npz",
    "double": f"--noise 0.5 --precision 64-true {FULL}",
    "bfloat16": f"--noise 0.5 --precision bf16-mixed {FULL}",
    "float16": "--noise 0.5 --precision 16-mixed",
    "groupnorm": f"--noise 0.5 --norm gn {FULL} --sched-examples 300 --sched onecycle",
    "vgg-linear": "--noise 0.5 --model vgg16-linear --width 64 --synthetic-train 40 --bs 8 --epochs 1",
    "aa": f"--fake-mask 0.4 {FULL}",
    "off-plain": "--measure off --noise 0.2 --momentum 0 --wd 0 --no-augment --max-steps 7",
    "subset": "--noise 0.5 --subset 120 --val-frac 0.3 --bs 17 --seed 3 --noise-seed 4 --split-seed 5",
    "own-npz": f"--dataset {{files}}/own.npz --noise 0.3 {FULL}",
    "own-folder": "--dataset {files}/folder --image-size 28 --noise 0.3 --bs 8",
    "two:double-groupnorm": f"--noise 0.5 --precision 64-true --norm gn {FULL}",
    "kill:full": f"--noise 0.5 {FULL} --epochs 6 --checkpoint-minutes 1e-6",
}
TIMES = ("seconds", "images_per_second", "peak_memory_mb", "measure_seconds", "measure_share")


def make_files(folder: Path) -> None:
    """Labels, a matrix and own data in small sets, the same at every call."""
    from PIL import Image

    rng = np.random.default_rng(0)
    np.save(folder / "matrix.npy", 0.7 * np.eye(10) + 0.03)
    true = synthetic_labels()
    noisy = np.where(rng.random(len(true)) < 0.4, rng.integers(0, 10, len(true)), true)
    np.savez(folder / "noise.npz", index=np.arange(len(true)), true=true, label=noisy)
    torch.save({"clean_label": true, "worse_label": noisy}, folder / "human.pt")
    x, y = rng.integers(0, 256, (150, 28, 28, 3), dtype=np.uint8), np.arange(150) % 3
    np.savez(folder / "own.npz", x_train=x[:120], y_train=y[:120], x_test=x[120:], y_test=y[120:])
    for part, some in (("train", range(60)), ("test", range(60, 75))):
        for i in some:
            where = folder / "folder" / part / f"class{i % 3}"
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[i]).save(where / f"{i}.png")


def synthetic_labels() -> np.ndarray:
    """True labels (200,) of the drawn training set that `TINY` asks for, from the noise.npz that a command writes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "all.npz")
        make = "make {} --dataset synthetic --synthetic-train 200 --synthetic-test 40 --val-frac 0 --noise 0"
        subprocess.run(
            [sys.executable, "noise.py", *make.format(path).split()], cwd=ROOT, check=True, capture_output=True
        )
        return np.load(path)["true"]


def sha(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:20]


def fingerprint(folder: Path) -> dict[str, str]:
    """{what: hash} of a run's weights, optimizer, labels, summary and of each of its series."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    state = torch.load(folder / "last.ckpt", weights_only=True)
    actual = {"weights": sha(*(f"{k}{v.dtype}".encode() + v.numpy().tobytes() for k, v in state["model"].items()))}
    momentum = (v["momentum_buffer"] for v in state["optimizer"]["state"].values() if "momentum_buffer" in v)
    actual["optimizer"] = sha(*(m.numpy().tobytes() for m in momentum))
    points: dict[str, list] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name in ("scalars", "histograms"):
                    points.setdefault(value.tag, []).append(
                        (event.step, tensor_util.make_ndarray(value.tensor).tolist())
                    )
    actual |= {f"series {tag}": sha(repr(values).encode()) for tag, values in sorted(points.items())}
    with np.load(folder / "noise.npz") as z:
        actual["labels"] = sha(*(z[k].tobytes() for k in ("index", "true", "label")))
    summary = json.loads((folder / "summary.json").read_text())
    kept = {k: v for k, v in summary.items() if k not in TIMES}
    return actual | {"summary": sha(json.dumps(kept, sort_keys=True).encode())}


def make_run(name: str, given: str, files: Path, runs: Path) -> dict[str, str]:
    """Run one entry of `RUNS` and return its fingerprint."""
    kind, _, plain = name.rpartition(":")
    argv = f"{TINY} {given.format(files=files)} --runs {runs} --name {plain}".split()
    command = [sys.executable, "train.py", *argv, *(["--devices", "2"] if kind == "two" else [])]
    if kind == "kill":
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (runs / plain / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        command.append("--resume")
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if ended.returncode:
        return {"failed": ended.stderr[-500:]}
    return fingerprint(runs / plain)


def report_numbers(runs: list[Path], out: Path) -> dict[str, str]:
    """The verdicts that report.py prints on `runs`, and every row of a table of its page that holds a number."""
    command = [sys.executable, "report.py", *map(str, runs), "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if ended.returncode:
        return {"failed": ended.stderr[-500:]}
    verdicts = [line for line in ended.stdout.splitlines() if not line.startswith("->")]
    rows = [line for line in (out / "report.md").read_text().splitlines() if line.startswith("|")]
    numbers = [re.findall(r"[-+]?\d+\.\d+", row) for row in rows]
    return {"verdicts": "\n".join(verdicts), "numbers": json.dumps(sorted(n for n in numbers if n))}


def record(names: list[str], exported: list[Path]) -> dict[str, dict[str, str]]:
    """Fingerprints of the named runs, and the report on them and on each exported file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        files, runs = Path(scratch, "files"), Path(scratch, "runs")
        files.mkdir()
        make_files(files)
        actual = {}
        for name in names:
            actual[name] = make_run(name, RUNS[name], files, runs)
            print(
                f"{name}: {len(actual[name])} hashes" if "failed" not in actual[name] else f"{name}: FAILED", flush=True
            )
        actual["report"] = report_numbers([runs], Path(scratch, "report"))
        for path in exported:
            actual[f"report {path.name}"] = report_numbers([path.resolve()], Path(scratch, f"report-{path.stem}"))
    return actual


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", choices=["record", "compare"])
    p.add_argument("file", type=Path)
    p.add_argument("--only", help="a regular expression for the names of runs")
    p.add_argument(
        "--exported", type=Path, action="append", default=[], help="exported runs to make a report on as well"
    )
    args = p.parse_args()
    actual = record([name for name in RUNS if re.search(args.only or "", name)], args.exported)
    if args.what == "record":
        args.file.write_text(json.dumps(actual, indent=1) + "\n")
        return int(any("failed" in run for run in actual.values()))
    before, differ = json.loads(args.file.read_text()), 0
    for name, now in actual.items():
        then = before.get(name, {})
        for what in sorted(then.keys() | now.keys()):
            if then.get(what) != now.get(what):
                differ += 1
                print(f"{name}: {what}: {then.get(what)} was recorded, {now.get(what)} now")
    print(f"{differ} differences in {len(actual)} fingerprints")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
