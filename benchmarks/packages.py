"""What the commands need of other packages, looked for before any of it is imported, and wheels from a folder where pip can
reach nothing. Imports the standard library alone."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ESSENTIAL = ("torch", "torchvision", "lightning_fabric", "numpy", "filelock", "PIL", "tqdm", "tensorboard")
USEFUL = {  # what is left out where it is missing
    "pytest": "no tests can be run",
    "scipy": "no reports here, and their tests fail",
    "matplotlib": "no figures here, and their tests fail",
    "click": "`fabric run` cannot start here, and its tests are skipped",
}


def missing(names) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def install(wheels: str, target: Path) -> str | None:
    """Put the wheels of a folder into `target`, once, and first on the path of this process and of those that it starts.

    Returns what is wrong, in a line, or None.
    """
    files = sorted(Path(wheels).glob("*.whl"))
    if not files:
        return f"--wheels {wheels}: no wheel in it"
    done = target / ".installed"
    names = "\n".join(path.name for path in files)
    if not done.is_file() or done.read_text() != names:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        ended = subprocess.run([*command, "--target", str(target), *map(str, files)], capture_output=True, text=True)
        if ended.returncode:
            return f"--wheels {wheels}: pip failed ({(ended.stderr.strip().splitlines() or ['no reason given'])[-1]})"
        done.write_text(names)
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
    return None


def prepare(argv: list[str]) -> str | None:
    """Install the wheels of `--wheels`; prints what else is missing. Returns what makes going on useless, in a line, or None."""
    given = dict(zip(argv, argv[1:], strict=False)) | dict(w.split("=", 1) for w in argv if "=" in w)
    if "--wheels" in given and "--work" in given:
        problem = install(given["--wheels"], Path(given["--work"]).absolute() / "site")
        if problem:
            return problem
    needed = missing(ESSENTIAL)
    if needed:
        return f"not installed here: {', '.join(needed)}; give a folder of wheels with --wheels"
    for name in missing(USEFUL):
        print(f"{name} is not installed here: {USEFUL[name]}", flush=True)
    return None
