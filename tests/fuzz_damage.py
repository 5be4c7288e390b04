"""Run folders and exports, edited at random: resuming, reporting and listing them may refuse, and no more than that.

Beside the folder stands another one whose files links may point to; it must stay as it was.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import fuzz_resume

GRID = "bs=33,40 measure=split,full"  # the base runs, named as a sweep names them
COMMON = (
    "--dataset synthetic --synthetic-train 200 --synthetic-test 9 --width 4 --noise 0.5 --epochs 2 --accelerator cpu"
)
COMMON += " --threads 1 --precision 32-true --measure-every 2 --measure-budget 1 --chunks 2 --permutations 2"
LOCK = threading.Lock()

# ------------------------------------------------------------------------------------------------------------- edits


def flip(path: Path, rng: random.Random, outside: Path) -> None:
    """Some bytes of a file become others."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 50])):
        if content:
            content[rng.randrange(len(content))] ^= rng.randint(1, 255)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random, outside: Path) -> None:
    """A file ends early, or is empty."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1) if rng.random() < 0.8 else 0])


def extend(path: Path, rng: random.Random, outside: Path) -> None:
    """A file goes on with junk, or with itself."""
    content = path.read_bytes()
    path.write_bytes(content + (content if rng.random() < 0.3 else rng.randbytes(rng.randint(1, 200))))


def junk(path: Path, rng: random.Random, outside: Path) -> None:
    path.write_bytes(
        rng.choice([b"\0" * 1000, rng.randbytes(500), b"[]", b"null", b"{}", b"\xff\xfe{\0", b"[" * 100_000])
    )


def remove(path: Path, rng: random.Random, outside: Path) -> None:
    path.unlink()


def link(path: Path, rng: random.Random, outside: Path) -> None:
    """A link in place of a file: to a file outside, to nothing, to itself, to a device."""
    path.unlink()
    targets = [outside / "precious", outside / "copy", outside / "absent", path, Path("/dev/null"), Path("/dev/full")]
    path.symlink_to(rng.choice(targets))


def other_kind(path: Path, rng: random.Random, outside: Path) -> None:
    """A pipe or a folder in place of a file."""
    path.unlink()
    os.mkfifo(path) if rng.random() < 0.6 else path.mkdir()


def foreign(path: Path, rng: random.Random, outside: Path) -> None:
    """The same file of another run."""
    path.write_bytes((outside / "other" / path.name).read_bytes() if (outside / "other" / path.name).is_file() else b"")


def value(rng: random.Random) -> object:
    """A value that a file may hold in place of the right one."""
    deep: list = []
    for _ in range(300):
        deep = [deep]
    odd = ["", "x", "\n| a | b |\n<script>", "../../x", "y" * 10_000, "\ud800"]
    return rng.choice(
        [None, True, -1, 0, 10**400, 1e308, float("nan"), float("inf"), 2**63, [], {}, deep, {"a": 1}, *odd]
    )


def change(content: object, rng: random.Random, make: Callable[[random.Random], object]) -> object:
    """`content` with one entry, somewhere in it, gone, renamed or become something else."""
    if not isinstance(content, (dict, list)) or not content or rng.random() < 0.05:
        return make(rng)
    if isinstance(content, list):
        at = rng.randrange(len(content))
        content[at] = change(content[at], rng, make)
        return content
    key = rng.choice(list(content))
    act = rng.random()
    if act < 0.15:
        del content[key]
    elif act < 0.25:
        content[rng.choice(["x", "", key.upper() if isinstance(key, str) else "y"])] = content.pop(key)
    elif act < 0.5 and not isinstance(content[key], (dict, list)) or act < 0.4:
        content[key] = make(rng)
    else:
        content[key] = change(content[key], rng, make)
    return content


def in_json(path: Path, rng: random.Random, outside: Path) -> None:
    """Values of other types and ranges in config.json or summary.json."""
    content = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 2, 5])):
        content = change(content, rng, value)
    text = json.dumps(content)
    if rng.random() < 0.05:
        text = text.replace("{", '{"deep": ' + "[" * 100_000 + "]" * 100_000 + ", ", 1)
    path.write_text(text)


def tensor(rng: random.Random) -> object:
    """A value that a checkpoint may hold in place of the right one."""
    made = [torch.zeros(3), torch.full((8,), torch.nan), torch.zeros(0), torch.ones(4, 4, dtype=torch.int64)]
    made += [torch.zeros((), dtype=torch.complex64), torch.zeros(2, 2).to_sparse()]
    return rng.choice(made) if rng.random() < 0.4 else value(rng)


def in_checkpoint(path: Path, rng: random.Random, outside: Path) -> None:
    """Values of other types and shapes in a checkpoint."""
    content = torch.load(path, weights_only=True)
    for _ in range(rng.choice([1, 1, 3])):
        content = change(content, rng, tensor)
    torch.save(content, path)


def in_export(path: Path, rng: random.Random, outside: Path) -> None:
    """Values of other types in an exported file's list of runs, or in its arrays."""
    with np.load(path) as z:
        arrays = {k: z[k] for k in z.files}
    if rng.random() < 0.7:
        listed = json.loads(arrays["runs"].tobytes())
        for _ in range(rng.choice([1, 1, 3])):
            listed = change(listed, rng, value)
        arrays["runs"] = np.frombuffer(json.dumps(listed).encode(), np.uint8)
    else:
        name = rng.choice(list(arrays))
        made = [np.zeros(0), np.zeros((2, 2)), arrays[name][: len(arrays[name]) // 2], np.array("x"), -arrays[name]]
        arrays[name] = rng.choice([*made, arrays[name].astype(complex)])
    np.savez(path, **arrays)


def prepare_temporary(path: Path, rng: random.Random, outside: Path) -> None:
    """A link under a name that a file in the making could have."""
    name = rng.choice(["config.json", "summary.json", "last.ckpt", "previous.ckpt", "noise.npz"])
    temporary = path.with_name(rng.choice([f"{name}.tmp", f".{name}.tmp", f"{name}~"]))
    if not os.path.lexists(temporary):
        temporary.symlink_to(outside / "precious")


def add_events(path: Path, rng: random.Random, outside: Path) -> None:
    """One more event file: junk, a copy, a link."""
    new = path.with_name(f"events.out.tfevents.{rng.choice(['0', '99', '9999999999.x.1.0'])}")
    if os.path.lexists(new):
        return
    source = next(iter(sorted(path.parent.glob("events.out.tfevents.*"))), None)
    how = rng.random()
    if how < 0.4 and source and source.is_file():
        shutil.copy(source, new)
        flip(new, rng, outside)
    elif how < 0.7:
        new.write_bytes(rng.randbytes(300))
    else:
        new.symlink_to(outside / "copy")


EDITS = {"flip": flip, "cut": cut, "extend": extend, "junk": junk, "remove": remove, "link": link, "kind": other_kind}
EDITS |= {"foreign": foreign, "temporary": prepare_temporary, "events": add_events}


def edit(folder: Path, rng: random.Random, outside: Path) -> str:
    """Edit one file of a run's folder; returns what was done."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink())
    if not files:
        return "nothing left"
    path = rng.choice(files)
    inside = {".json": in_json, ".ckpt": in_checkpoint}.get(path.suffix)
    name = "inside" if inside and rng.random() < 0.6 else rng.choice(list(EDITS))
    try:
        (inside if name == "inside" else EDITS[name])(path, rng, outside)
    except Exception as e:  # it was damaged already
        return f"{name} {path.name}: not possible ({type(e).__name__})"
    return f"{name} {path.name}"


# ------------------------------------------------------------------------------------------------------------- the case


def fingerprint(folder: Path) -> str:
    """Names and content of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(os.fsencode(path.relative_to(folder)) + b"\0")
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def base_runs(world) -> tuple[Path, list[list[str]]]:
    """Four runs as a sweep makes them, one of them stopped within an epoch, an export of them; and their options."""
    from study import grids

    jobs = grids.expand([GRID], COMMON.split(), "--grid")
    runs = world.shared / "base" / "runs"
    with LOCK:
        if not runs.exists():
            for i, job in enumerate(jobs):
                argv = [*job.argv, "--runs", str(runs)]
                at = fuzz_resume.signal_after(150_000, int(signal.SIGTERM), world.shared / "calls") if i == 0 else ""
                result = world.children.call("train", argv, world.shared, timeout=300, before=at)
                if result.status not in (0, 3):
                    raise RuntimeError(f"a base run failed: {result.err[0][-500:]}")
            export = ["base/runs", "--export", "base/all.npz"]
            result = world.children.call("report", export, world.shared)
            if result.status:
                raise RuntimeError(f"the export of the base runs failed: {result.err[0][-500:]}")
    return runs, [job.argv for job in jobs]


def case(world, rng: random.Random, cwd: Path) -> tuple[str, list[str]]:
    """Edit runs or an export, then resume, report and list: no traceback, no crash, nothing outside touched."""
    runs, options = base_runs(world)
    shutil.copytree(runs.parent, cwd / "place")
    outside = cwd / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious\n")
    folders = sorted(p for p in (cwd / "place" / "runs").iterdir() if p.is_dir())
    at = rng.randrange(len(folders))
    folder, argv = folders[at], next(o for o in options if folder_of(o) == folders[at].name)
    shutil.copytree(folders[at - 1], outside / "other")
    shutil.copy(next(folder.glob("events.out.tfevents.*")), outside / "copy")
    program = rng.choices(["resume", "report", "status", "export", "done"], [5, 3, 1, 2, 1])[0]
    if program in ("export", "done"):
        path = cwd / "place" / "all.npz"
        name = rng.choice(["inside", "flip", "cut", "extend", "junk", "kind"])
        (in_export if name == "inside" else EDITS[name])(path, rng, outside)
        done = [f"{name} of the export"]
    else:
        done = [edit(folder, rng, outside) for _ in range(rng.choice([1, 1, 2, 4]))]
    before, others = fingerprint(outside), {p.name: fingerprint(p) for p in folders if p != folder}
    sweep = ["--grid", GRID, "--runs", "place/runs", *COMMON.split()]
    drawn = ["--out", "report", "--format", rng.choice(["png", "svg"]), *["--csv", "out.csv"] * (rng.random() < 0.3)]
    name, words = {
        "resume": ("train", [*argv, "--runs", "place/runs", "--resume", *["--epochs", "3"] * (rng.random() < 0.3)]),
        "report": ("report", ["place/runs", *drawn, *["--export", "out.npz"] * (rng.random() < 0.5)]),
        "status": ("sweep", [*sweep, rng.choice(["--status", "--dry-run", "--print-commands"])]),
        "export": ("report", ["place/all.npz", *drawn]),
        "done": ("sweep", [*sweep, "--status", "--done", "place/all.npz"]),
    }[program]
    result = world.children.call(name, words, cwd, timeout=90)
    allowed = {0, 1, 2} if program == "resume" else {0, 1, 2} if program in ("report", "export") else {0, 2}
    problems = result.problems(allowed)
    if not problems and result.status == 2 and len(result.errors) != 1 and program != "resume":
        problems.append(f"{len(result.errors)} lines on standard error with status 2")
    if fingerprint(outside) != before:
        problems.append("a file outside was touched")
    if program != "resume" or {p.name: fingerprint(p) for p in folders if p != folder} != others:
        now = {p.name: fingerprint(p) for p in folders if p != folder}
        problems += ["another run was touched"] * (now != others)
    asked = ("place", "outside", "report", "out.npz", "out.csv", "out-runs.csv")
    made = sorted(p.name for p in cwd.iterdir() if p.name not in asked)
    problems += [f"made {made}"] * bool(made)
    return program, [f"{p}: {result.shell} (after {'; '.join(done)})" for p in problems]


def folder_of(argv: list[str]) -> str:
    from engine import options

    return options.parse(argv).name
