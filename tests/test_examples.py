"""Each example runs as it stands, from another folder and beside an installed gradsplit, and shows what it says."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT


def run(name: str, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_loop_of_ones_own(tmp_path):
    output = run("plain_loop.py", tmp_path, "cosine.png")
    last = re.findall(r"loss ([\d.]+), cos\(clean, noisy\) (\S+), of random parts (\S+)", output)[-1]
    loss, cosine, null = map(float, last)
    assert loss < 1.3 and cosine < null  # it has learned, and wrong labels pull elsewhere
    assert (tmp_path / "cosine.png").stat().st_size > 1000
    assert len((ROOT / "examples" / "plain_loop.py").read_text().splitlines()) <= 45


@pytest.mark.slow
def test_a_transformer(tmp_path):
    found = re.findall(
        r"loss ([\d.]+), cos\(majority, minority\) (\S+), of random parts (\S+)", run("text_transformer.py", tmp_path)
    )
    assert len(found) == 6 and float(found[-1][0]) < float(found[0][0])
    assert sum(float(cosine) < float(null) for _, cosine, null in found) >= 5  # the minority's rule is another one


def test_a_lightning_callback(tmp_path):
    pytest.importorskip("lightning", reason="Lightning is optional: pip install -r requirements-extra.txt")
    run("lightning_callback.py", tmp_path, str(tmp_path))
    (path,) = tmp_path.glob("**/metrics.csv")
    rows = [row for row in csv.DictReader(path.open()) if row["grad/cos_clean_noisy"]]
    assert [int(row["step"]) for row in rows] == [*range(0, 48, 4)]  # 3 epochs of 16 steps
    assert all(-1 <= float(row["null/permuted_cos_clean_noisy"]) <= 1 for row in rows)
