"""Edited and foreign files: each is refused with its name and field, or read; none ends in a traceback."""

import copy
import json
import random
import shutil
import struct
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import report
import train
from conftest import TINY
from data import InputError
from engine import fitting, identity, jsonfiles, options, record, schema, sources
from study import exports, gallery, onerun, processes, runfolders

# 48 training examples, 3 steps an epoch
ARGV = [*TINY, *"--synthetic-train 60 --synthetic-test 20 --width 4 --bs 16 --noise 0.4 --max-steps 4".split()]
ARGV += ["--compile=off", "--graph=off"]
JUNK = (None, True, -1, 7, 3.5, float("nan"), 1e308, 10**30, "", "x", "../x", "a\0b", [], [1], {}, {"a": 1}, "x" * 5000)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run that stopped after its first epoch: previous.ckpt at step 3, last.ckpt at step 4."""
    runs = tmp_path_factory.mktemp("runs")
    assert train.main([*ARGV, "--checkpoint-minutes", "0", "--runs", str(runs), "--name", "r"]) == 0
    return runs / "r"


@pytest.fixture(scope="module")
def job(made):
    """What a checkpoint is compared with, built as a run builds it."""
    from engine.hardware import make_fabric
    from engine.job import prepare

    args = options.parse([*ARGV, "--runs", str(made.parent), "--name", "r"])
    source = sources.load(args)
    indices = data.split(len(source.x_train), args.val_frac, args.split_seed, None)
    fabric, scaler = make_fabric(args)
    return prepare(args, source, indices, source.y_train[indices[0]], fabric, scaler)


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs" / "r"))


def places(content: object, at: tuple = ()):
    """The way to every field of nested containers."""
    if isinstance(content, (dict, list)):
        for key in list(content) if isinstance(content, dict) else range(min(len(content), 3)):
            yield (*at, key)
            yield from places(content[key], (*at, key))


def mutated(content: dict, chance: random.Random) -> dict:
    """A deep copy with one field deleted, renamed or replaced by something else."""
    content = copy.deepcopy(content)
    *way, key = chance.choice(list(places(content)))
    parent = content
    for step in way:
        parent = parent[step]
    how = chance.random()
    if isinstance(parent[key], torch.Tensor):
        t = parent[key]
        changed = (t.double() if t.dtype != torch.float64 else t.int(), t.new_zeros(3, 5, 7), t * float("nan"))
        parent[key] = chance.choice([*changed, torch.zeros(1).expand(10**11), *JUNK])
    elif how < 0.2:
        del parent[key]
    elif how < 0.3 and isinstance(parent, dict):
        parent[chance.choice(["../x", "y", 5])] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(chance.choice(JUNK))
    return content


def outcome(act, *arguments) -> str:
    """The message of the `InputError`, one printable line, or "" if there is none; any other exception is the test's failure."""
    try:
        act(*arguments)
    except InputError as e:
        assert str(e) == data.printable(e) and len(str(e)) < 700
        return str(e)
    return ""


def test_untouched_files_pass_and_are_not_changed(made, job):
    config = json.loads((made / "config.json").read_text())
    assert schema.read_config(made / "config.json", resume=True) == config
    assert schema.read_summary(made / "summary.json")["status"] == "finished"
    raw = torch.load(made / "last.ckpt", weights_only=True)
    state = record.load_state(made / "last.ckpt")
    assert state.keys() == raw.keys() and state["config"] == config
    fitting.check_fits(state, job, "c")
    window = [[1.5] * 9, [float("nan")] * 9]  # measurements may be undefined
    assert schema.check_state(raw | {"window": window}, "c")["window"] == window


@pytest.mark.parametrize("what", ["config", "summary", "checkpoint"])
def test_mutations_are_refused_or_read(made, job, what):
    """What passes the check can be used: as options of a resumed run, as the state of the job."""
    chance, refused = random.Random(12), 0
    if what == "checkpoint":
        content = torch.load(made / "last.ckpt", weights_only=True)
        content["model"] = dict(content["model"])
    else:
        content = json.loads((made / f"{what}.json").read_text())
    for _ in range(60 if what == "checkpoint" else 300):
        if what == "checkpoint":  # one of its parts at a time, else nearly all would be of the optimizer's
            part = chance.choice([key for key in content if key != "plan"])
            changed = {k: v for k, v in content.items() if k != part} | mutated({part: content[part]}, chance)
        else:
            changed = mutated(content, chance)

        def use() -> None:
            if what == "checkpoint":
                fitting.check_fits(schema.check_state(changed, "f"), job, "f")
                job.optimizer.load_state_dict(changed["optimizer"])
                job.module.load_state_dict(changed["model"])
            elif what == "config":
                config = schema.check_config(changed, "f", resume=True)
                identity.differences(config["options"], vars(job.args))
                json.dumps(config, allow_nan=False)
            else:
                schema.check_fields(changed, schema.SUMMARY_FIELDS, "f")

        message = outcome(use)
        refused += bool(message)
        assert not message or message.startswith("f: ") or " was " in message
    assert refused > 20


OPTION_CASES = {
    "bs": ([], 0, 2.5, "16", None, True, 2**31 + 1),
    "lr": (None, "0.1", 0, -1.0, [0.1], False),
    "momentum": (1, 1.5, "x"),
    "sched": ("triangle", None, 1),
    "no_augment": (None, 0, "false"),
    "dataset": (None, 1, ["cifar10"], "a\0b"),
    "seed": (-1, 2**63, 0.5),
    "noise": (1.5, "0.5", [0.5]),
    "precision": ("8-true", 32),
    "devices": ("two", 0, [0, 1]),
    "threads": (0, 2000, "1"),
}
RIGHT = {
    "bs": 2**31,
    "noise": None,
    "subset": None,
    "devices": "0,1",
    "num_nodes": "1",
    "lr": 1,
    "new_option": [1, "x"],
}


@pytest.mark.parametrize("name", OPTION_CASES)
def test_a_wrong_option_is_named(name):
    for value in OPTION_CASES[name]:
        message = outcome(schema.check_options, {name: value}, "config.json")
        assert message.startswith(f"config.json: options.{name} is ") and ", not " in message


def test_all_that_the_parser_makes_is_right():
    given = "--noise 0.5 --sched cosine --sched-epochs 3 --lr 1e-5 --wd 0 --compile --devices auto --stratify"
    for argv in ([], given.split(), ["--model", "vgg16-linear", "--precision", "16-mixed", "--dataset", "~/a.npz"]):
        schema.check_options(vars(options.parser().parse_args(argv)), "f")
    schema.check_options(RIGHT, "f")
    schema.check_options({}, "f")  # of a version that had none of today's


TEXTS = {  # bytes: what is said, and whether it is damage rather than a wrong field
    b"": ("not JSON", True),
    b"{": ("not JSON", True),
    b"[1]": ("not a JSON object", True),
    b"\xff\xfe{}": ("not JSON", True),
    b'\xef\xbb\xbf{"a": 1}': ("not JSON", True),
    b'{"a": ' + b"1" * 5000 + b"}": ("not JSON", True),
    b'{"a": NaN}': ("a is nan, not a finite number", False),
    b'{"b": {"a": [1e999]}}': ("b.a.0 is inf, not a finite number", False),
    b'{"a": 1, "a": 2}': ("'a' is there twice", False),
    b'{"a": 100000000000000000000}': ("64 bits", False),
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000: ("nests deeper", False),
    b'{"a":' * 40 + b"1" + b"}" * 40: ("nests deeper", False),
}


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_one_policy_for_json(tmp_path, number):
    text, (result, damaged) = list(TEXTS.items())[number]
    path = tmp_path / "f.json"
    path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        schema.read_json(path)
    assert result in str(caught.value) and str(path) in str(caught.value)
    assert isinstance(caught.value, schema.Unreadable) == damaged


def test_no_file_a_pipe_and_a_huge_one(tmp_path, monkeypatch):
    import os

    assert schema.read_json(tmp_path / "none") is None
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in outcome(schema.read_json, tmp_path / "pipe")
    (tmp_path / "f").write_text('{"a": 1}')
    monkeypatch.setattr(jsonfiles, "LARGEST_FILE", 7)
    assert "larger than" in outcome(schema.read_json, tmp_path / "f")


# ------------------------------------------------------------------------------------------- through the programs


def resumed(folder: Path, capsys, status: int, *more: str) -> str:
    """What a resume says; where it is refused, in one line and with nothing changed."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    capsys.readouterr()
    assert train.main([*ARGV, *more, "--runs", str(folder.parent), "--name", folder.name, "--resume"]) == status
    err = capsys.readouterr().err
    if status == 2:
        assert sum("error: " in line for line in err.splitlines()) == 1
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    return err


def edit(path: Path, change) -> None:
    """Rewrite a JSON file or a checkpoint after `change(content)`."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)


CONFIG_EDITS = {
    "options is a list": lambda c: c.update(options=[]),
    "options.bs is a list": lambda c: c["options"].update(bs=[]),
    "options.lr is null": lambda c: c["options"].update(lr=None),
    "options.wd is inf": lambda c: c["options"].update(wd=float("inf")),
    "options.precision is 8": lambda c: c["options"].update(precision=8),
    "noise.labels_sha256 is missing": lambda c: c["noise"].pop("labels_sha256"),
    "segments.0 is 1": lambda c: c["segments"].insert(0, 1),
}


@pytest.mark.parametrize("result", CONFIG_EDITS)
def test_resume_names_the_field_of_config_json(copied, capsys, result):
    edit(copied / "config.json", CONFIG_EDITS[result])
    assert f"{copied / 'config.json'}: {result}" in resumed(copied, capsys, 2)


STATE_EDITS = {
    "step is -1": lambda s: s.update(step=-1),
    "step is 5, not within the run's 4 steps": lambda s: s.update(step=5),
    "best_val_acc is missing": lambda s: s.pop("best_val_acc"),
    "events is an object, not an object of event files": lambda s: s["events"].update({"../events.out.tfevents.1": 0}),
    "latest.val/acc is 'x'": lambda s: s["latest"].update({"val/acc": "x"}),
    "window.0 is a list, not a list of 9 numbers": lambda s: s["window"].insert(0, [0.0] * 8),
    "model.conv1.weight has values that are not finite": lambda s: s["model"]["conv1.weight"].fill_(float("nan")),
    "model.linear.bias is a tensor (3,) of float32, not a tensor (10,) of float32": lambda s: s["model"].update(
        {"linear.bias": torch.zeros(3)}
    ),
    "optimizer: param_groups.0.weight_decay is 0.25": lambda s: s["optimizer"]["param_groups"][0].update(
        weight_decay=0.25
    ),
    "optimizer: state.0.momentum_buffer is a tensor": lambda s: s["optimizer"]["state"][0].update(
        momentum_buffer=torch.zeros(2)
    ),
}


@pytest.mark.parametrize("result", STATE_EDITS)
def test_a_wrong_field_of_a_checkpoint_is_named(made, job, result):
    state = torch.load(made / "last.ckpt", weights_only=True)
    STATE_EDITS[result](state)
    message = outcome(lambda: fitting.check_fits(schema.check_state(state, "last.ckpt"), job, "last.ckpt"))
    assert message.startswith(f"last.ckpt: {result}")


def test_resume_with_wrong_checkpoints(copied, capsys):
    """One is made good by the other; two are refused, and so is another program's file, however well-formed."""
    for name in ("previous.ckpt", "last.ckpt"):
        edit(copied / name, lambda s: s["optimizer"].pop("state"))
    assert f"{copied / 'previous.ckpt'}: optimizer: state is missing" in resumed(copied, capsys, 2)
    for name in ("previous.ckpt", "last.ckpt"):
        torch.save({"state_dict": {}}, copied / name)
    assert "last.ckpt: step is missing" in resumed(copied, capsys, 2)


def test_a_wrong_last_checkpoint_falls_back(copied, capsys):
    edit(copied / "last.ckpt", lambda s: s.update(not_resolved=-1))
    err = resumed(copied, capsys, 0)
    assert "not_resolved is -1, not a whole number from 0; trying the one before" in err
    assert record.load_state(copied / "last.ckpt")["step"] == 4


def test_scaler_state(made, job, monkeypatch):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    monkeypatch.setattr(job, "scaler", scaler)
    state = record.load_state(made / "last.ckpt")
    assert outcome(fitting.check_fits, state, job, "f") == "f: scaler is missing"
    for key, value in (("scale", 0.0), ("growth_interval", "x"), ("backoff_factor", float("nan"))):
        bad = state | {"scaler": scaler.state_dict() | {key: value}}
        assert outcome(fitting.check_fits, bad, job, "f").startswith(f"f: scaler.{key} is ")
    fitting.check_fits(state | {"scaler": scaler.state_dict()}, job, "f")


def test_a_report_leaves_out_what_it_cannot_read(copied, capsys, monkeypatch, tmp_path):
    for module in (gallery, onerun):  # drawing takes long, and is not in question
        monkeypatch.setattr(module, "save_styled", lambda *_, **__: False)
    shutil.copytree(copied, copied.parent / "good")
    edit(copied / "config.json", lambda c: c["options"].update(bs=[]))
    argv = [str(copied.parent), "--out", str(tmp_path / "out"), "--export", str(tmp_path / "x.npz")]
    assert report.main(argv) == 0
    line = f"left out r: {copied / 'config.json'}: options.bs is a list"
    assert capsys.readouterr().err.count(line) == 1
    result = (tmp_path / "out" / "report.md").read_text()
    assert "1 runs, 1 finished" in result and "options.bs is a list" in result
    edit(copied.parent / "good" / "summary.json", lambda c: c.update(status=[]))
    assert report.main([*argv[:2], str(tmp_path / "none")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no run can be read" in err and "(and 1 more)" in err
    assert not (tmp_path / "none").exists()


def test_a_sweep_says_what_is_wrong_with_a_folder(copied):
    job = SimpleNamespace(name="r", args=options.parse(ARGV))
    assert processes.run_state(copied.parent, job, {})[0] == "finished"
    edit(copied / "summary.json", lambda c: c.update(steps="many"))
    status, reason = processes.run_state(copied.parent, job, {})
    assert status == "failed" and "steps is 'many'" in reason
    edit(copied / "config.json", lambda c: c["options"].update(threads=[]))
    status, reason = processes.run_state(copied.parent, job, {})
    assert status == "failed" and "options.threads is a list" in reason
    assert processes.run_state(copied.parent, job, {"r": [vars(job.args)]})[0] == "finished"
    assert processes.threads_of(copied) is None


# -------------------------------------------------------------------------------------------------- exported files


@pytest.fixture
def exported(tmp_path) -> Path:
    """Two runs that say nothing of the machine, or of how long anything took: the file has the same bytes everywhere."""
    steps = np.arange(0, 40, 2)
    series = {tag: (steps, np.sin(steps / 5 + i)) for i, tag in enumerate(("train/loss", "grad/cos_clean_noisy"))}
    series["val/acc"] = np.array([0, 20, 40]), np.array([0.1, 0.4, 0.5])
    of_run = (
        vars(options.parse(ARGV)),
        {"steps_per_epoch": 20, "classes": ["a", "b"]},
        {"status": "finished", "steps": 40},
    )
    exports.export_runs(
        [runfolders.Run(name, *of_run, series, "", {"torch": "2"}) for name in "rs"], tmp_path / "x.npz"
    )
    return tmp_path / "x.npz"


def test_the_same_runs_are_exported_as_the_same_bytes(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(4e9))
    exports.export_runs(exports.read_export(exported), tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == exported.read_bytes()


def rewrite(path: Path, change) -> None:
    """Rewrite an exported file after `change(runs, arrays)`."""
    with np.load(path) as z:
        arrays = {k: z[k] for k in z.files}
    listed = json.loads(arrays["runs"].tobytes())
    change(listed["runs"], arrays)
    arrays["runs"] = np.frombuffer(json.dumps(listed).encode(), np.uint8)
    np.savez_compressed(path, **arrays)


EXPORT_EDITS = {
    "reaches beyond": lambda runs, _: runs[0]["series"][0].__setitem__(2, 10**6),
    "a grid, an offset": lambda runs, _: runs[0]["series"][0].__setitem__(1, 99),
    "not a list of [tag": lambda runs, _: runs[0]["series"].append(["x"]),
    "name is '../x'": lambda runs, _: runs[0].update(name="../x"),
    "options.lr is null": lambda runs, _: runs[0]["options"].update(lr=None),
    "resolved.steps_per_epoch is 0": lambda runs, _: runs[0]["resolved"].update(steps_per_epoch=0),
}


@pytest.mark.parametrize("result", EXPORT_EDITS)
def test_one_run_of_an_exported_file_is_left_out(exported, result):
    rewrite(exported, EXPORT_EDITS[result])
    assert result in outcome(exports.read_export, exported)
    left_out: list[str] = []
    assert [run.name for run in exports.read_export(exported, left_out)] == ["s"]
    assert len(left_out) == 1 and result in left_out[0]


@pytest.mark.parametrize("steps", [[0, 0], [-1, 2], [[0, 1]], ["a"], [0.5]])
def test_an_exported_file_with_junk_for_steps_is_refused(exported, steps):
    rewrite(exported, lambda _, arrays: arrays.update(steps_0=np.array(steps)))
    assert str(exported) in outcome(exports.read_export, exported)


def test_values_that_are_not_finite_are_left_out(exported):
    rewrite(exported, lambda _, arrays: arrays["values"].__setitem__(slice(0, 1), np.nan))
    runs = exports.read_export(exported)
    assert all(np.isfinite(v).all() for run in runs for _, v in run.series.values())
    assert sum(len(v) for _, v in runs[0].series.values()) == sum(len(v) for _, v in runs[1].series.values()) - 1


def test_damaged_bytes_of_an_exported_file(exported):
    content, chance = exported.read_bytes(), random.Random(3)
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        exported.write_bytes(damaged[: chance.randrange(len(damaged))] if chance.random() < 0.3 else damaged)
        message = outcome(exports.read_export, exported)
        assert not message or str(exported) in message


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("values.npy", npy(repr({"k" * 5000: 1}))),
        ("values.npy", npy("{'descr': '<f4\x1b[31m\x85', 'fortran_order': False, 'shape': (1,)}")),
        ("values.npy", npy("{'descr': '<f4\0', 'shape'")),
        (
            "steps_\x1b[31m\u202e" + "9" * 3000 + ".npy",
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 0)}"),
        ),
    ],
)
def test_what_an_exported_file_makes_a_message_say_is_short_and_printable(exported, name, content):
    with zipfile.ZipFile(exported) as z:
        members = {member: z.read(member) for member in z.namelist()} | {name: content}
    with zipfile.ZipFile(exported, "w") as z:
        for member, blob in members.items():
            z.writestr(member, blob)
    assert str(exported) in outcome(exports.read_export, exported)
