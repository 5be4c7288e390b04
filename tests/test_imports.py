"""What only reports need is imported by the modules of `study` that make them: training and sweeps work without it."""

import subprocess
import sys

import pytest

from conftest import ROOT, TINY

REPORTS_ONLY = ("matplotlib", "scipy", "markdown", "pandas")

CODE = """
import sys
missing, argv = sys.argv[1].split(","), sys.argv[2:]
sys.modules.update(dict.fromkeys(missing))  # None: an import fails as if nothing were installed
import noise, sweep, train
sys.exit(train.main(argv))
"""


@pytest.mark.slow
def test_training_and_sweeps_need_nothing_of_what_reports_need(tmp_path):
    argv = [*TINY, "--noise", "0.5", "--max-steps", "1", "--runs", str(tmp_path), "--name", "r"]
    command = [sys.executable, "-c", CODE, ",".join(REPORTS_ONLY), *argv]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "r" / "summary.json").is_file()


def test_a_hidden_package_is_missing():
    """The other test's way of hiding a package does hide it."""
    code = "import sys; sys.modules['scipy'] = None; import study.analysis.rules"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and "ModuleNotFoundError" in ended.stderr
