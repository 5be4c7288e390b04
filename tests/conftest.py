"""Shared by the tests: tiny runs in this process, their series, and the real data where it lies beside the repository."""

import json
import locale
import multiprocessing.forkserver
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"

import train  # noqa: E402
from engine import hardware  # noqa: E402
from study import forkserver  # noqa: E402

TINY = (
    "--dataset synthetic --synthetic-train 200 --synthetic-test 40 --width 8 --bs 32 --epochs 2 --measure-every 2 "
    "--precision 32-true --accelerator cpu --threads 1"
).split()  # 160 training examples, 5 steps an epoch
# For runs in 16 bits, which CPUs without AMX emulate at a second a step: 32 training examples, 4 steps an epoch.
SIXTEEN = "--synthetic-train 40 --synthetic-test 8 --width 4 --bs 8".split()


def slow(*values) -> list:
    """Values of a parameter whose tests are left out but for `-m slow`."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


any_name = pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="file names are not in UTF-8 here")

# Workers share the cores out: threads of one that wait for each other, spinning, would keep the others from theirs.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    torch.set_num_threads(max(1, hardware.cores() // WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # of the processes that tests start
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # nor do those spin that are told to have more


def pytest_addoption(parser) -> None:
    text = "options added to every tiny run, in one word: --with=--compile, '--with=--accelerator cuda --graph'"
    parser.addoption("--with", default="", help=text)
    text = "run the files, and the tests of each, in the order that this seed draws: no test may rely on another"
    parser.addoption("--order", type=int, metavar="SEED", help=text)


# What a launcher or a cluster has left in the environment: every run here would be one of several processes.
LAUNCHERS = tuple("SLURM_ LT_ OMPI_ PMI_ TORCHELASTIC_ GROUP_ LOCAL_ MASTER_ NODE_RANK RANK WORLD_".split())


def pytest_configure(config) -> None:
    TINY.extend(config.getoption("--with").split())
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    with suppress(locale.Error):  # what the tests read and write is UTF-8, whatever the user's language
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def pytest_collection_modifyitems(config, items) -> None:
    if config.getoption("--order") is not None:
        rng, of_file = random.Random(config.getoption("--order")), {}
        items.sort(key=lambda item: (of_file.setdefault(item.path, rng.random()), rng.random()))


@pytest.fixture(autouse=True)
def no_test_before():
    """Each test draws the same random numbers, whatever ran before it, and what a run sets for its process, threads, default
    dtype and environment, is put back."""
    threads, dtype, environment = torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ)
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture
def bare_server(monkeypatch):
    """Forked runs are those of a stand-in for train.py: their server, which ends with the test, imports nothing."""
    stop = multiprocessing.forkserver._forkserver._stop
    stop()
    monkeypatch.setattr(forkserver, "PRELOAD", ())
    yield
    stop()


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

    points: dict[str, list[tuple[int, float]]] = {}
    numbers = lambda path: [int(part) if part.isdigit() else part for part in path.name.split(".")]  # noqa: E731 # 9 before 10
    for path in sorted(folder.glob("events.out.tfevents.*"), key=numbers):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = tensor_util.make_ndarray(value.tensor).item()
                    points.setdefault(value.tag, []).append((event.step, number))
    return points


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.ckpt", weights_only=True)["model"]


def same_weights(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait for something that is to come; how soon is no matter, other programs may have the cores."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def without(argv: list[str], *names: str) -> list[str]:
    """`argv` without these options and the value after each, wherever and however often they stand."""
    return [w for before, w in zip(["", *argv], argv) if w not in names and before not in names]


def accelerator() -> str:
    """Where tiny runs happen: of several `--accelerator`, as `--with` adds one, the last counts."""
    return [value for name, value in zip(TINY, TINY[1:]) if name == "--accelerator"][-1]


def need_devices(count: int) -> None:
    """Skip the test where tiny runs happen on GPUs and there are fewer than `count`."""
    if accelerator() != "cpu" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


def fabric_run(*options: str, program: Path = Path(sys.executable).parent / "fabric") -> list[str]:
    """The command `fabric run` with a free port, the tiny runs' accelerator and these options, before the script's own.

    Where lightning_fabric came with pytorch-lightning there is no `fabric` script; its module is the same command.
    """
    pytest.importorskip("click", reason="`fabric run` needs click")
    command = [str(program), "run"] if program.exists() else [sys.executable, "-m", "lightning_fabric.cli"]
    return [*command, f"--accelerator={accelerator()}", f"--main-port={free_port()}", *options, "train.py"]


ZYGOTE = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch, train  # the slow part, once; no tensor is touched here, so a fork finds no threads
import torch.distributed.nn
import matplotlib.backends.backend_agg, matplotlib.figure
from torch.utils.tensorboard import SummaryWriter
for line in sys.stdin:
    ask, pids = json.loads(line), []
    for rank, environment in enumerate(ask["environments"]):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                sys.stdin.close()
                os.dup2(os.open(ask["log"] + f".{{rank}}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
                os.dup2(1, 2)
                os.environ.update(environment)
                status = train.main(ask["argv"]) if "argv" in ask else exec(ask["code"], {{"rank": rank}}) or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


WAITING = """
import os, sys, time, train
step = train.train_step
def waiting(job, batch, number, *rest, **named):
    if number == {at}:
        open({there!r}, "w").close()
        while os.path.exists({there!r}):
            time.sleep(0.005)
    return step(job, batch, number, *rest, **named)
train.train_step = waiting
status = train.main({argv!r})
sys.stdout.flush()
os._exit(status)
"""


class Zygote:
    """Starts runs as processes of their own, by forking one that has imported torch: a start costs no import."""

    def __init__(self, log: Path) -> None:
        self.log, self.pids = log, []
        code = ZYGOTE.format(root=str(ROOT))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, argv: list[str] | None = None, code: str | None = None, ranks: int = 1) -> list[int]:
        """Start `train.main(argv)` or `code` on `ranks` processes, set up as torchrun does; returns their pids."""
        need_devices(ranks)
        if self.pids:  # of a test that failed before their end
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait()
        environments = [{}]
        if ranks > 1:
            shared = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free_port(),
                "TORCHELASTIC_RUN_ID": "t",
                "GROUP_RANK": "0",
            }
            shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            environments = [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
        ask = {"environments": environments, "log": str(self.log)} | ({"argv": argv} if argv else {"code": code})
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        self.pids = json.loads(self.process.stdout.readline())
        return self.pids

    def wait(self) -> list[int]:
        """Exit statuses of the processes of the last `start`, negative for a signal."""
        self.pids = []
        return json.loads(self.process.stdout.readline())

    def run_and(self, act: Callable[[int], None], argv: list[str], at: int) -> int:
        """The exit status of a run to which `act(pid)` is done while it waits before its step `at`."""
        there = Path(f"{self.log}.there")
        (pid,) = self.start(code=WAITING.format(argv=argv, at=at, there=str(there)))
        until(there.exists)
        act(pid)
        there.unlink()
        return self.wait()[0]

    def run(self, *args, **kwargs) -> list[int]:
        self.start(*args, **kwargs)
        return self.wait()

    def output(self, rank: int = 0) -> str:
        """What a process of the last start printed, both streams."""
        return Path(f"{self.log}.{rank}").read_text()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    zygote = Zygote(tmp_path_factory.mktemp("zygote") / "log")
    yield zygote
    zygote.process.stdin.close()
    zygote.process.wait(timeout=30)
