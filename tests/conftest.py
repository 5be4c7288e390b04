"""Shared by the tests: tiny runs in this process, their series, and the real data where it lies beside the repository."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"

import train  # noqa: E402

TINY = (
    "--dataset synthetic --synthetic-train 200 --synthetic-test 40 --width 8 --bs 32 --epochs 2 --measure-every 2 "
    "--precision 32-true --accelerator cpu --threads 1"
).split()  # 160 training examples, 5 steps an epoch


@pytest.fixture(autouse=True)
def same_threads():
    """A run sets the number of threads for its process; here the process goes on to the next test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside the repository: the real CIFAR-10 and Fashion-MNIST are not here")
    return SHARED / "data"


@pytest.fixture
def go(tmp_path):
    """go(*options, name=..., status=0) -> folder of a finished tiny run made in this process."""

    def run(*options: str, name: str = "r", status: int = 0) -> Path:
        argv = [*TINY, *options, "--runs", str(tmp_path / "runs"), "--name", name]
        assert train.main(argv) == status
        return tmp_path / "runs" / name

    return run


def series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a run as it stands in the raw event files: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = tensor_util.make_ndarray(value.tensor).item()
                    found.setdefault(value.tag, []).append((event.step, number))
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.ckpt", weights_only=True)["model"]


def same_weights(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())
