"""A few of the cases of fuzz.py, and no growth of memory or open files in long use.

FUZZ_SEED chooses others; it is printed with every failure.
"""

import os
import random
import subprocess
import sys

import pytest

import fuzz
import fuzz_inputs
import fuzz_options
import leaks
from conftest import ROOT
from engine import hardware
from fuzz_children import Children

SEED = int(os.environ.get("FUZZ_SEED", "0"))
SHARE = {"commands": 20, "invalid": 40, "folders": 15, "grids": 10, "resume": 3}  # of 400, 400, 300, 100 and 100


def test_every_option_has_a_generator():
    fuzz_options.check_complete()


def test_an_option_without_a_generator_is_named(monkeypatch):
    monkeypatch.delitem(fuzz_options.GENERATORS, "momentum")
    with pytest.raises(SystemExit, match="no generator for --momentum"):
        fuzz_options.check_complete()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    children = Children(folder)
    (folder / "shared").mkdir()
    yield fuzz.World(children, fuzz_inputs.make_inputs(folder / "inputs"), folder / "shared")
    children.close()


@pytest.mark.slow
@pytest.mark.parametrize("part", fuzz.PARTS)
def test_a_share(world, tmp_path, part):
    assert fuzz.run_part(world, part, list(range(SHARE[part])), SEED, min(hardware.cores(), 2), tmp_path) == []


@pytest.mark.slow
def test_crashes_and_endless_waits_are_one_failure_each(world, tmp_path):
    """The fuzzer sees what it is there to see."""
    argv = ["--dataset", "synthetic", "--synthetic-train", "50", "--width", "4", "--bs", "8", "--epochs", "1"]
    argv += ["--accelerator", "cpu", "--threads", "1", "--name"]
    crash = world.children.call(
        "train", [*argv, "a"], tmp_path, before="import os, train; train.run = lambda *a: os.abort()"
    )
    assert "status -6" in crash.problems({0})[0]
    hang = "import time, train; train.run = lambda *a: time.sleep(600)"
    late = world.children.call("train", [*argv, "b"], tmp_path, before=hang, timeout=3)
    assert "not over in time" in late.problems({0})[0]
    fault = "import train; train.run = lambda *a: 1 / 0"
    assert "a traceback" in world.children.call("train", [*argv, "c"], tmp_path, before=fault).problems({1})[0]
    assert world.children.call("train", [*argv, "d"], tmp_path).problems({0}) == []


@pytest.mark.slow
def test_a_case_is_a_function_of_its_seed(world):
    lines = [fuzz_options.valid(random.Random("7/commands/3"), world.inputs).argv() for _ in range(2)]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")
@pytest.mark.parametrize("what", ["steps", "runs"])
def test_memory_and_open_files_stay_flat(tmp_path, what):
    """At most 15 MB of trend over 1,500 measured steps and 30 over 20 runs, and no open file more."""
    call, bound = {"steps": ("over_steps(1500", 15), "runs": ("over_runs(20", 30)}[what]
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
import leaks, pathlib
s = leaks.{call}, pathlib.Path({str(tmp_path)!r}))
print(s)
assert s.trend() < {bound}, s
assert s.more_files() <= 0, s
"""  # in a process of its own: what other tests hold would hide a trend
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    print(done.stdout)


def test_a_leak_is_seen():
    """A steady growth of 20 kB a step shows in the trend, whatever noise lies over it."""
    rng, samples = random.Random(0), leaks.Samples()
    for at in range(0, 3000, 50):
        samples.at.append(at)
        samples.memory.append(800 + 0.02 * at + rng.uniform(-10, 10))
        samples.files.append(20 + at // 1000)
    assert 40 < samples.trend() < 80
    assert samples.more_files() > 0
