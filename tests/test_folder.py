"""A run's folder may come from a stranger: nothing in it leads outside or makes a run wait. Damaged is not unreadable."""

import os
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conftest import TINY, same_weights, series
from engine import files, noisefile, record
from study import exports, processes

SMALL = [*TINY, "--width", "1", "--measure", "off"]
ENTRIES = (*record.RUN_FILES, "events", "profile")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A run of 7 steps of 10, the smallest network: last.ckpt at step 7, previous.ckpt at step 5."""
    runs = tmp_path_factory.mktemp("small")
    assert (
        train.main([*SMALL, "--max-steps", "7", "--checkpoint-minutes", "0", "--runs", str(runs), "--name", "small"])
        == 0
    )
    return runs / "small"


@pytest.fixture
def copied(small, tmp_path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "runs" / "r"))


def resume(folder: Path) -> int:
    return train.main([*SMALL, "--max-steps", "8", "--resume", "--runs", str(folder.parent), "--name", folder.name])


def entry(folder: Path, name: str) -> Path:
    return min(folder.glob("events*")) if name == "events" else folder / name


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
@pytest.mark.parametrize("name", ENTRIES)
def test_links_and_pipes_are_refused(copied, tmp_path, capsys, name, kind):
    path, outside = entry(copied, name), tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_bytes(b"theirs")
    before = outside.read_bytes()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    entries = sorted(os.listdir(copied))
    capsys.readouterr()
    assert resume(copied) == 2  # and a pipe is not waited for
    err = capsys.readouterr().err
    problem = "a symbolic link" if "link" in kind else "not a folder" if name == "profile" else "not a regular file"
    assert err.count("\n") == 1 and f"{path} is {problem}" in err
    assert outside.read_bytes() == before and not (tmp_path / "nowhere").exists()
    assert sorted(os.listdir(copied)) == entries


def test_prepared_temporaries_are_not_followed_and_leftovers_go(copied, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"theirs")
    names = ["config.json.tmp", "summary.json.tmp", "last.ckpt.tmp", f".noise-{os.getpid()}.tmp"]
    for name in [*names, ".config.json-0123456789abcdef.tmp"]:
        (copied / name).symlink_to(outside)
    (copied / ".last.ckpt-00112233445566ff.tmp").write_bytes(b"of a killed process")
    (copied / "notes.tmp").write_text("the user's own")
    assert resume(copied) == 0
    assert outside.read_bytes() == b"theirs"
    assert [p.name for p in copied.glob("*.tmp")] == ["notes.tmp"]


def test_the_folder_itself_may_be_a_link(copied, tmp_path):
    (tmp_path / "runs" / "linked").symlink_to(copied)
    assert resume(tmp_path / "runs" / "linked") == 0
    assert record.load_state(copied / "last.ckpt")["step"] == 8


def test_hard_links_of_event_files_keep_what_is_cut(copied, small, tmp_path):
    """A copy made of hard links is not shortened with the run."""
    events = entry(copied, "events")
    with open(events, "ab") as f:
        f.write(b"after the checkpoint")
    os.link(events, tmp_path / "backup")
    before = (tmp_path / "backup").read_bytes()
    assert resume(copied) == 0
    assert (tmp_path / "backup").read_bytes() == before and events.stat().st_size < len(before)
    assert series(copied)["val/acc"][:2] == series(small)["val/acc"][:2]


def test_a_temporary_file_is_new_or_is_not_written(tmp_path, monkeypatch):
    outside, path = tmp_path / "outside", tmp_path / "f"
    outside.write_bytes(b"theirs")
    path.write_bytes(b"old")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)  # as if the name had been guessed
    (tmp_path / f".f-{'0' * 16}.tmp").symlink_to(outside)
    with pytest.raises(FileExistsError):
        files.write_temporary(path, lambda f: f.write(b"new"))
    assert outside.read_bytes() == b"theirs" and path.read_bytes() == b"old"


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    files.replace(tmp_path / "replaced", b"")
    noisefile.save(tmp_path / "noise.npz", *(torch.zeros(3, dtype=torch.int64) for _ in "123"))
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["noise.npz", "plain", "replaced"]


def test_exports_and_noise_files_go_through_no_prepared_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"theirs")
    for name in ("e.npz.tmp", f".noise-{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(outside)
    exports.export_runs([], tmp_path / "e.npz")
    noisefile.save(tmp_path / "noise.npz", *(torch.zeros(3, dtype=torch.int64) for _ in "123"))
    assert outside.read_bytes() == b"theirs"
    with np.load(tmp_path / "e.npz") as z:
        assert "runs" in z.files


def test_a_pipe_in_place_of_the_lock_does_not_hang_a_sweep(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    answer = []
    thread = threading.Thread(target=lambda: answer.append(processes.is_held(tmp_path)), daemon=True)
    thread.start()
    thread.join(20)
    assert answer == [False]


# ------------------------------------------------------------------------------------------------- damaged checkpoints


def assert_damaged(path: Path, lengths) -> int:
    """Cut to each of `lengths`, longest first, the checkpoint is damaged, never unreadable; returns how many."""
    count = 0
    for count, length in enumerate(sorted(lengths, reverse=True), 1):
        os.truncate(path, length)
        with pytest.raises(ValueError):
            record.load_state(path)
    return count


def test_a_checkpoint_of_many_lengths_is_damaged(copied):
    size = (copied / "last.ckpt").stat().st_size
    lengths = {0, 1, 2, 3, 4, *range(0, size, max(1, size // 300)), *range(max(0, size - 200), size)}
    assert assert_damaged(copied / "last.ckpt", lengths) > 400


@pytest.mark.slow
def test_a_checkpoint_of_every_length_is_damaged(copied):
    size = (copied / "last.ckpt").stat().st_size
    assert assert_damaged(copied / "last.ckpt", range(size)) == size


def refused_length(path: Path) -> int:
    """A length at which torch, reading the file itself, raises what looks like a disk that cannot be read."""
    whole = path.read_bytes()
    for length in range(len(whole) // 2, len(whole)):
        path.write_bytes(whole[:length])
        try:
            torch.load(path, weights_only=True)
        except OSError:
            return length
        except Exception:
            continue
    pytest.skip("this torch raises OSError at no length")


def test_a_length_at_which_torch_raises_oserror_falls_back(copied, small, capsys):
    refused_length(copied / "last.ckpt")
    assert resume(copied) == 0
    assert "last.ckpt is damaged" in capsys.readouterr().err
    assert train.main([*SMALL, "--max-steps", "8", "--runs", str(copied.parent), "--name", "whole"]) == 0
    assert same_weights(copied, copied.parent / "whole")


def test_a_file_that_asks_for_more_memory_than_it_has_bytes_is_damaged(copied, monkeypatch):
    def fail(asked: int):
        text = f"[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate {asked} bytes."
        monkeypatch.setattr(record.torch, "load", lambda *_, **__: (_ for _ in ()).throw(RuntimeError(text)))

    fail(10**15)
    with pytest.raises(ValueError):
        record.load_state(copied / "last.ckpt")
    fail(1000)
    with pytest.raises(MemoryError):
        record.load_state(copied / "last.ckpt")
