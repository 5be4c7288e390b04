"""What a run shows in TensorBoard beside its series, read as TensorBoard reads it."""

import io
import json
import math
import re
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import TINY, accelerator, series, slow, summary
from engine import eventfile, record
from engine import tensorboard_views as views
from engine.evaluation import Evaluation

FULL = ("--measure", "full", "--measure-budget", "100", "--max-steps", "3")


def accumulated(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def hparams_table(runs):
    """(columns shown first to last, {run: (status, {option: value}, {metric: (step, value)})}) by the plugin's backend."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(runs)).Reload()
    backend = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(runs))))
    about = RequestContext()
    columns = backend.experiment_from_metadata(about, "", True, backend.hparams_metadata(about, ""), [])
    request = api_pb2.ListSessionGroupsRequest(allowed_statuses=[0, 1, 2, 3], slice_size=100)
    actual = {}
    for group in list_session_groups.Handler(about, backend, "", request).run().session_groups:
        (session,) = group.sessions
        row = {key: getattr(value, value.WhichOneof("kind")) for key, value in group.hparams.items()}
        metrics = {m.name.tag: (m.training_step, m.value) for m in session.metric_values}
        actual[session.name] = api_pb2.Status.Name(session.status), row, metrics
    return columns, actual


def test_hparams_list_finished_stopped_and_failed_runs(go, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    go("--noise", "0.5", "--sched", "cosine", name="finished")
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", lambda *_: (_ for _ in ()).throw(train.Stopped("a test")))
        go("--lr", "0.05", "--no-augment", name="stopped", status=3)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *_, **__: {"train/loss": torch.tensor(math.nan)})
        go("--momentum", "0.5", name="failed", status=1)
    columns, actual = hparams_table(runs)
    names = [info.name for info in columns.hparam_infos]
    assert set(names[:5]) == set(views.FIRST_HPARAMS) and {"momentum", "sched_epochs", "max_steps"} <= set(names)
    assert not {"runs", "name", "threads", "data_dir"} & set(names) and len(set(names)) == len(names)
    assert [info.name.tag for info in columns.metric_infos] == list(views.HPARAM_METRICS)
    statuses = {name: status.removeprefix("STATUS_") for name, (status, _, _) in actual.items()}
    assert statuses == {"finished": "SUCCESS", "stopped": "UNKNOWN", "failed": "FAILURE"}
    _, row, metrics = actual["finished"]
    assert (row["noise"], row["sched"], row["bs"], row["no_augment"]) == (0.5, "cosine", 32, False)
    assert row["sched_steps"] == 5000 and "max_steps" not in row
    assert actual["stopped"][1]["noise"] == 0 and actual["stopped"][1]["no_augment"] is True
    assert set(metrics) == {"val/acc", "test/acc", "train/acc_noisy"}
    assert metrics["val/acc"] == (10, pytest.approx(summary(runs / "finished")["val_acc"]))
    # ... and neither a point nor a subfolder that is not the run's own
    assert [step for step, _ in series(runs / "finished")["val/acc"]] == [0, 5, 10]
    assert not [p for p in (runs / "finished").iterdir() if p.is_dir()]
    assert "val/acc" not in series(runs / "stopped")


def test_hparams_of_a_run_that_grew(go, tmp_path):
    folder = go("--max-steps", "1")
    assert train.main([*TINY, "--max-steps", "2", "--resume", "--runs", str(tmp_path / "runs"), "--name", "r"]) == 0
    _, actual = hparams_table(tmp_path / "runs")
    status, row, metrics = actual["r"]
    assert (status, row["max_steps"], metrics["val/acc"][0]) == ("STATUS_SUCCESS", 2, 2)
    assert [path.name for path in folder.glob("*.hparams")] == [record.HPARAMS]


def test_the_reader_that_follows_the_last_file_by_name_sees_the_whole_run(go, monkeypatch):
    """TensorBoard's Python reader: begun while the run trains, and again while a machine goes on whose clock is behind."""
    step, readers = train.train_step, []

    def watched(job, batch, number, measured):
        if number in (2, 6):
            readers.append(accumulated(runs / "r"))
        return step(job, batch, number, measured)

    runs = go("--max-steps", "1", name="warm").parent  # the folder's name
    monkeypatch.setattr(train, "train_step", watched)
    folder = go("--max-steps", "5", "--measure-every", "1")
    monkeypatch.setattr(eventfile.time, "time", lambda now=time.time: now() - 5000)
    go("--max-steps", "10", "--measure-every", "1", "--resume")
    names = sorted(path.name for path in folder.glob("events*"))
    assert names[0] == record.HPARAMS and [name.rpartition(".")[2] for name in names[1:]] == ["0", "1"]
    for reader in readers:
        assert [event.step for event in reader.Reload().Scalars("train/loss")] == list(range(10))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--noise", "0.5", "--sched", "cosine"),
        ("--noise", "0.5", "--measure", "off", "--sched", "onecycle"),
        ("--noise", "0.5", "--permutations", "0"),
        *slow([*FULL, "--noise", "0.5"], [*FULL], [*FULL, "--fake-mask", "0.5", "--permutations", "0"]),
    ],
)
def test_every_chart_of_the_layout_has_data(go, options):
    """No tag in the layout is without data in the run, and no chart of `CHARTS` whose data is all there is missing."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    folder = go("--max-steps", "3", *options)
    logged = series(folder)
    proto = accumulated(folder).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = Layout.FromString(proto)
    shown = {chart.title: list(chart.multiline.tag) for group in layout.category for chart in group.chart}
    unlogged = {tag for tags in shown.values() for tag in tags if not [t for t in logged if re.match(tag, t)]}
    unresolved = {
        tag for tag in unlogged if tag.startswith(("corrected/", "null/permuted_", "isotropy/dim"))
    }  # not in every batch
    assert unlogged == unresolved and all(group.chart for group in layout.category)
    of_schedule = {"optim/lr", "optim/momentum"}  # logged by every run, drawn where they move
    for title, tags in ((t, tags) for charts in views.CHARTS.values() for t, tags in charts.items()):
        complete = all(any(re.match(tag, t) for t in logged) for tag in tags)
        assert title in shown or not complete or set(tags) & of_schedule, title
    assert ("learning rate (figure 3)" in shown) == ("--sched" in options)
    assert ("momentum (figure 3)" in shown) == ("onecycle" in options)


def test_layout_follows_the_plan_of_full_measurements():
    given = {"measure": "full", "sched": "constant", "permutations": 4, "fake_mask": None}
    shown = views.chart_layout(given, True, {"steps": 2, "probe": None, "isotropy": 1, "curvature": None})
    assert set(shown["beside their nulls"]) == {
        "cos(clean, all) and random masks",
        "cos(clean, noisy) and random masks",
        "corrected cosine of clean and noisy, and its interval",
        "difference of the mean gradients, 0 for random masks",
        "label noise's share of the gradients' variance",
        "effective dimension, label noise and clean sampling",
        "participation ratio and isotropic",
    }
    assert "beside their nulls" not in views.chart_layout(
        given, True, dict.fromkeys(("steps", "probe", "isotropy", "curvature"))
    )


def test_split_has_no_lonely_cosine_without_random_masks():
    given = {"measure": "split", "sched": "constant", "permutations": 0, "fake_mask": None}
    assert "beside their nulls" not in views.chart_layout(given, True, {})
    with_masks = views.chart_layout(given | {"permutations": 1}, True, {})["beside their nulls"]
    _, tags = with_masks["cos(clean, noisy) and random masks"]
    assert tags == ["grad/cos_clean_noisy", "null/permuted_cos_clean_noisy$"]


def test_pictures_and_tables_of_a_run(go):
    events = accumulated(go("--noise", "0.5", "--max-steps", "1"))
    assert {"config/text_summary", "noise/text_summary"} <= set(events.Tags()["tensors"])
    assert set(events.Tags()["images"]) == {"data/labels", "noise/matrix"}
    for tag in ("data/labels", "noise/matrix"):
        image = Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string))
        assert min(image.size) > 400 and len(image.getcolors(1 << 24)) > 10


def test_matrix_picture_is_in_proportion_and_named():
    matrix = [[1.0, 0.0], [0.25, 0.75]]
    squares = torch.from_numpy(np.array(views.squares(matrix, 240)))
    inside = squares[120::240, 120::240]  # the middle of each square: rows are true classes
    assert inside[0, 0].tolist() == [8, 48, 107] and inside[0, 1].tolist() == [255, 255, 255]
    assert inside[1, 0].tolist() == [132, 152, 181]  # half way, the root of a quarter
    drawn = views.matrix_picture(matrix, ("cat", "dog"))
    assert drawn.dtype == torch.uint8 and drawn.shape[0] == 3
    assert not torch.equal(drawn, views.matrix_picture(matrix, ("cat", "cow")))  # the names are in the picture
    # values: two matrices whose squares have nearly one colour
    nearly = views.matrix_picture([[1.0, 0.0], [0.26, 0.74]], ("cat", "dog"))
    assert ((nearly.int() - drawn.int()).abs() > 60).any()
    for K in (1, 20, 40, 100):
        picture = views.matrix_picture([[1 / K] * K] * K, tuple(f"class number {i}" for i in range(K)))
        assert max(picture.shape) < 1000


def test_names_of_odd_bytes_are_drawn():
    assert views.encodable("é \udcfe") == "é \\udcfe"
    x, y = torch.zeros(2, 28, 28, 1, dtype=torch.uint8), torch.arange(2)
    for classes in (("a\udcfe", "$x_$"), ("", "\n"), ("x" * 5000, "猫")):
        assert views.label_picture(x, y, y.flip(0), classes).shape[0] == 3
        assert views.matrix_picture([[0.5, 0.5]] * 2, classes).shape[0] == 3


def test_changed_labels_are_red():
    x, y = torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1])

    def red(given):
        r, g, b = views.label_picture(x, y, given, ("cat", "dog")).int()
        return int(((r > 150) & (g < 100) & (b < 100)).sum())

    assert red(y) == 0 < red(torch.tensor([0, 0])) < red(torch.tensor([1, 0]))


# --------------------------------------------------------------------------------- the best weights, and resuming


BEST = (
    "--noise",
    "0.5",
    "--best",
    "--epochs",
    "3",
    "--max-steps",
    "12",
    "--lr",
    "0.02",
    "--measure",
    "off",
    "--checkpoint-minutes",
    "0",
)


def best(folder):
    return torch.load(folder / "best.ckpt", weights_only=True)


def test_best_weights_are_those_of_the_best_validation(whole):
    folder = whole
    points = [point for point in series(folder)["val/acc"] if point[0] > 0]
    accuracy = max(value for _, value in points)
    kept = best(folder)
    assert kept["val_acc"] == summary(folder)["best_val_acc"] == pytest.approx(accuracy)
    assert kept["step"] == next(step for step, value in points if value == pytest.approx(accuracy))
    assert kept["config"]["options"]["noise"] == 0.5 and not list(folder.glob("*.tmp"))
    assert kept["model"].keys() == torch.load(folder / "last.ckpt", weights_only=True)["model"].keys()


def test_best_does_not_count_the_untrained_network(go, monkeypatch):
    accuracies = iter([0.9, 0.3, 0.2, 0.1])  # before training, two epochs, test
    monkeypatch.setattr(train, "evaluate", lambda job, images, y: Evaluation(1.0, next(accuracies), y.cpu()))
    folder = go("--best")
    assert summary(folder)["best_val_acc"] == 0.3 and best(folder)["step"] == 5


def test_best_is_none_until_a_trained_network_is_validated(go, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *_, **__: {"train/loss": torch.tensor(math.nan)})
    assert summary(go(status=1))["best_val_acc"] is None


def same_best(a, b) -> None:
    a, b = best(a), best(b)
    assert (a["step"], a["val_acc"]) == (b["step"], b["val_acc"])
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run with --best."""
    runs = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        assert train.main([*TINY, *BEST, "--runs", str(runs), "--name", "whole"]) == 0
    return runs / "whole"


def pretend(patch, **accuracies: float) -> None:
    """Have `evaluate` return these accuracies at step5, step10, ...; by default the second epoch is the best."""
    original, accuracies = train.evaluate, accuracies or {"step5": 0.3, "step10": 0.5}
    patch.setattr(
        train,
        "evaluate",
        lambda job, *on: original(job, *on)._replace(acc=accuracies.get(f"step{job.state.step}", 0.1)),
    )


@pytest.mark.parametrize(
    ("at", "number", "done"),
    [
        ("best.ckpt", 1, False),
        ("best.ckpt", 2, True),
        pytest.param("last.ckpt", 1, False, marks=pytest.mark.slow),
        pytest.param("best.ckpt", 1, True, marks=pytest.mark.slow),
        pytest.param("last.ckpt", 2, False, marks=pytest.mark.slow),
        pytest.param("last.ckpt", 2, True, marks=pytest.mark.slow),
    ],
)
def test_best_of_a_run_killed_at_a_write(whole, tmp_path, monkeypatch, at, number, done):
    """Killed at the first or second write of a checkpoint, before it or once it is done, and resumed: the best.ckpt of
    the uninterrupted run."""
    made, original = [], record.Record.guard

    def guard(self, what, act, *rest):
        made.append(what)
        last = made.count(at) == number and what == at
        result = None if last and not done else original(self, what, act, *rest)
        if last:
            raise Killed
        return result

    argv = [*TINY, *BEST, "--runs", str(tmp_path), "--name", "cut"]
    pretend(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(record.Record, "guard", guard)
        with pytest.raises(Killed):
            train.main(argv)
    assert train.main([*argv, "--resume"]) == 0
    same_best(whole, tmp_path / "cut")


def test_best_weights_stay_when_the_run_goes_on(go, tmp_path, monkeypatch):
    """What the checkpoint knows of is kept, where no later epoch is better."""
    pretend(monkeypatch, step5=0.9, step10=0.4)
    folder = go("--best", "--epochs", "1")
    assert train.main([*TINY, "--best", "--resume", "--runs", str(tmp_path / "runs"), "--name", "r"]) == 0
    assert summary(folder)["steps"] == 10 and (best(folder)["step"], best(folder)["val_acc"]) == (5, 0.9)


@pytest.mark.slow
def test_the_best_that_the_checkpoint_knows_of_outlives_better_ones(go, tmp_path, monkeypatch):
    """Two better epochs since the last checkpoint, then a kill; where they do not come again, as on another machine, the
    best one is that of the checkpoint."""
    argv = [*TINY, "--best", "--runs", str(tmp_path / "runs"), "--name", "r", "--epochs", "4", "--resume"]
    with monkeypatch.context() as patch:
        pretend(patch, step5=0.3, step10=0.5, step15=0.7)
        folder = go("--best", "--epochs", "1")
        step = train.train_step

        def killed(job, batch, number, measured):
            if number == 16:
                raise Killed
            return step(job, batch, number, measured)

        patch.setattr(train, "train_step", killed)
        with pytest.raises(Killed):
            train.main(argv)
        assert best(folder)["step"] == 15
    pretend(monkeypatch, step10=0.2)
    assert train.main(argv) == 0
    assert (best(folder)["step"], best(folder)["val_acc"], summary(folder)["best_val_acc"]) == (5, 0.3, 0.3)


@pytest.mark.slow
def test_best_in_mid_epoch_gives_way_when_the_run_grows(go, tmp_path, monkeypatch):
    """--max-steps validates in mid-epoch where a longer run does not: what was best there is not when it goes on."""
    pretend(monkeypatch, step5=0.5, step7=0.9, step10=0.4)
    folder = go("--best", "--max-steps", "7")
    assert best(folder)["step"] == 7
    first = torch.load(folder / "best-before.ckpt", weights_only=True)
    assert train.main([*TINY, "--best", "--resume", "--runs", str(tmp_path / "runs"), "--name", "r"]) == 0
    assert (best(folder)["step"], first["step"]) == (5, 5) and not (folder / "best-before.ckpt").exists()
    assert all(torch.equal(best(folder)["model"][k], first["model"][k]) for k in first["model"])


def test_resume_says_where_it_goes_on(go, tmp_path, capsys):
    go("--max-steps", "1")
    capsys.readouterr()
    assert train.main([*TINY, "--max-steps", "2", "--resume", "--runs", str(tmp_path / "runs"), "--name", "r"]) == 0
    assert "train.py: resuming r at step 1 of 2\n" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- another run's options


def options_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["options"]


def test_config_starts_a_run_with_anothers_options(go, tmp_path):
    first = go("--noise", "0.5", "--no-augment", "--sched", "cosine", "--sched-epochs", "2", "--max-steps", "3")
    config = ["--config", str(first / "config.json"), "--runs", str(tmp_path / "runs")]
    assert train.main([*config, "--accelerator", accelerator(), "--threads", "1", "--name", "same"]) == 0
    a, b = options_of(first), options_of(tmp_path / "runs" / "same")
    differ = {k for k in a if a[k] != b[k]} - {"compile", "graph"}  # which `--with` adds to the first alone
    assert differ == {"name", "config"} and series(first) == series(tmp_path / "runs" / "same")


def test_config_is_overridden_and_makes_the_name(go, tmp_path):
    first = go("--noise", "0.5", "--sched", "cosine", "--sched-epochs", "2", "--max-steps", "1")
    config = f"--config={first / 'config.json'}"
    args = train.options.parse([config, "--sched-steps", "50", "--noise=0.2", "--seed", "3"])
    assert (args.noise, args.sched, args.sched_steps, args.sched_epochs, args.seed) == (0.2, "cosine", 50, None, 3)
    assert args.bs == 32 and args.runs == "runs" and args.accelerator == "auto"
    assert "noise0.2" in args.name and "sched-steps50" in args.name and "seed3" in args.name
    for own, theirs in ((["--dataset", "fmnist"], "vgg16"), (["--dataset", "cifar10"], "resnet18")):
        args = train.options.parse([config, *own])
        assert args.model == theirs and args.width == 64
    file = tmp_path / "labels.npz"
    args = train.options.parse([config, "--noise-type", "file", "--noise-file", str(file)])
    assert args.noise is None and args.noise_file == str(file)


DEEP = '{"options": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"options": [1]}', "not a run's config.json"),
        ("\x00\xff", "not JSON"),
        (DEEP, "nests deeper"),
        ('{"options": {"bs": []}}', "--bs: '[]' is neither a text nor a number"),
        ('{"options": {"lr": null}}', "--lr: 'None' is neither"),
        ('{"options": {"lr": NaN}}', "options.lr is nan, not a finite number"),
        ('{"options": {"bs": 1e999}}', "options.bs is inf, not a finite number"),
        ('{"options": {"bs": true}}', "--bs: 'True' is neither"),
        ('{"options": {"no_augment": "yes"}}', "--no-augment: 'yes' is not true or false"),
        ('{"options": {"sched": "triangle"}}', "--sched: invalid choice: 'triangle'"),
        ('{"options": {"noise_type": "file", "noise_file": "a\\u0000b"}}', "--noise-file: 'a\\x00b' is neither"),
        ('{"options": {"noise_type": "file", "noise_file": "\\ud800"}}', "--noise-file: '\\ud800' is neither"),
        ('{"options": {"later": 1}}', "an option 'later', which is not one of this version"),
    ],
)
def test_config_that_cannot_be_taken(tmp_path, capsys, content, says):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    assert train.main(["--config", str(file), "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: --config {file}: ") and says in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_an_overridden_option_of_a_config_is_checked_too(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text('{"options": {"bs": -1}}')
    assert train.main(["--config", str(file), "--bs", "8"]) == 2
    assert "--bs: '-1' is not a whole number" in capsys.readouterr().err
    shutil.rmtree(tmp_path)
