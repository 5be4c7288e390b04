"""Stopping signals, the excess of memorization, and the detectors of wrong labels: against brute force and planted truth."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import epochwise
import metrics
import noises
import report
import train
from conftest import TINY, same_weights, series, slow
from engine import noisefile, options, sources
from engine.examples import Examples
from engine.labels import relabel, relabel_held_out
from study import stopping as race
from test_metrics import job_for, warm
from test_report import plant

EXACT = ("--precision", "64-true", "--norm", "gn", "--measure", "full")


@pytest.fixture(autouse=True)
def few_examples(monkeypatch):
    monkeypatch.setattr(epochwise, "SUSCEPTIBILITY_EXAMPLES", 12)
    monkeypatch.setattr(epochwise, "DISPARITY_EXAMPLES", 6)


# ------------------------------------------------------------------------------------------- excess of memorization


def excess_of(law: torch.Tensor, memorized: float, n: int = 60_000, K: int = 5) -> tuple[float, float]:
    """(excess, chance) of planted predictions: the given label with probability `memorized`, else by a law of the true class
    alone, the same on held-out examples. `law` (K, K): P(given | true)."""
    g = torch.Generator().manual_seed(1)
    predicts = torch.rand(K, K, generator=g, dtype=torch.float64) ** 3
    draw = lambda table, true: torch.multinomial(table[true], 1, generator=g).squeeze(1)  # noqa: E731
    true, held = torch.randint(K, (n,), generator=g), torch.randint(K, (n,), generator=g)
    given, predicted = draw(law, true), draw(predicts, true)
    predicted = torch.where(torch.rand(n, generator=g) < memorized, given, predicted)
    wrong = given != true
    counts = metrics.confusion(held, draw(predicts, held), K)
    chance = (predicts / predicts.sum(1, keepdim=True))[true[wrong], given[wrong]].mean()
    return metrics.memorized_excess(predicted[wrong], true[wrong], given[wrong], counts), float(chance)


@pytest.mark.parametrize("kind", ["uniform", "pair", "lopsided"])
def test_the_excess_of_memorization_is_0_at_chance_under_every_law_of_the_class(kind):
    K, eye = 5, torch.eye(5, dtype=torch.float64)
    lopsided = torch.rand(K, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 4
    law = {"uniform": eye + 0.3, "pair": eye + eye.roll(1, 1), "lopsided": lopsided}[kind]
    at_chance, chance = excess_of(law, 0.0)
    assert (
        chance > 0.05 and abs(at_chance) < 0.01
    )  # four standard errors or more: 0.5 / sqrt(20,000 wrong ones) = 0.0035
    assert excess_of(law, 0.4)[0] == pytest.approx(0.4 * (1 - chance), abs=0.012)


def test_the_excess_leaves_out_classes_without_a_held_out_example():
    counts = torch.tensor([[3.0, 1, 0], [0, 0, 0], [0, 2, 2]], dtype=torch.float64)
    predicted, true, given = torch.tensor([[1, 0, 1, 0], [0, 1, 2, 2], [1, 0, 1, 1]])
    # of true class 0: hit, chance 1/4; of class 1: left out; of class 2: one hit, chance 1/2 each
    assert metrics.memorized_excess(predicted, true, given, counts) == pytest.approx(
        (1 + 1 + 0) / 3 - (0.25 + 0.5 + 0.5) / 3
    )
    assert math.isnan(metrics.memorized_excess(predicted[1:2], true[1:2], given[1:2], counts))


@pytest.mark.slow
def test_a_run_logs_the_excess_beside_the_share_memorized():
    job = job_for("--precision", "64-true", "--epochs", "1")
    noisy, _ = epochwise.probe_indices(job.context)
    assert "probe/memorized_excess" not in epochwise.probe(job.context)  # nothing is known of held-out images yet
    actual = train.evaluate(job, *job.val)
    job.context.confusion = metrics.confusion(job.val[1], actual.predicted, 10)
    values = epochwise.probe(job.context)
    job.module.eval()
    true, y = job.train.true[noisy], job.train.labels[noisy]
    hit = (job.module(job.train.images.plain(noisy)).argmax(1) == y).double()
    held = job.module(job.val[0].plain(torch.arange(job.val[0].n))).argmax(1)
    assert torch.equal(actual.predicted, held)
    known = [i for i in range(len(noisy)) if (job.val[1] == true[i]).any()]
    chance = [float((held[job.val[1] == true[i]] == y[i]).double().mean()) for i in known]
    assert values["probe/memorized_excess"] == pytest.approx(
        float(hit[known].mean()) - sum(chance) / len(chance), abs=1e-12
    )


# ----------------------------------------------------------------------------------------------------------- signals


def test_weights_of_rescaled_losses_are_the_derivative():
    losses = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (want,) = torch.autograd.grad((losses / losses.std()).mean(), losses)
    torch.testing.assert_close(metrics.rescaled_weights(losses.detach()), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["train", *slow("eval")])
def test_signals_by_plain_steps_of_a_copy(mode):
    job = job_for(*EXACT, "--norm", "bn", "--measure-bn", mode)
    warm(job)
    before = copy.deepcopy(job.module.state_dict())
    chance, gradients = torch.get_rng_state(), [p.grad for p in job.parameters]
    got = epochwise.signals(job.context)
    assert all(torch.equal(job.module.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), chance) and all(p.grad is g for p, g in zip(job.parameters, gradients))
    assert got == epochwise.signals(job.context)  # the same examples every time

    net = copy.deepcopy(job.module).train(mode == "train")
    optimizer = torch.optim.SGD(net.parameters(), lr=job.optimizer.param_groups[0]["lr"])
    g = data.generator(0, "susceptibility")
    x = job.val[0].plain(torch.randperm(job.val[0].n, generator=g)[:12])
    y = torch.randint(10, (12,), generator=g).to(job.fabric.device)
    first = F.cross_entropy(net(x), y)
    first.backward()
    first = first.detach()
    optimizer.step()
    assert got["probe/susceptibility"] == pytest.approx(float(first - F.cross_entropy(net(x), y).detach()), rel=1e-9)
    assert got["probe/susceptibility"] > 0

    order, rows = torch.randperm(len(job.train), generator=data.generator(0, "disparity")), []
    for i in range(5):
        net, part = copy.deepcopy(job.module).train(mode == "train"), order[6 * i : 6 * i + 6]
        labels = job.train.labels[part].to(job.fabric.device)
        losses = F.cross_entropy(net(job.train.images.plain(part)), labels, reduction="none")
        (losses / losses.std()).mean().backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    apart = [float((rows[i] - rows[j]).norm()) for i in range(5) for j in range(i)]
    assert got["probe/disparity"] == pytest.approx(sum(apart) / 10, rel=1e-9)


# ----------------------------------------------------------------------------------------- noisy validation labels


def held_out(*argv: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(true, noisy) labels of the validation split of a run on 4,000 drawn images, and the training split's index."""
    args = options.parse([*"--dataset synthetic --synthetic-train 4000 --synthetic-test 10".split(), *argv])
    source = sources.load(args)
    indices = data.split(4000, args.val_frac, args.split_seed)
    given, *_ = relabel(args, source, indices[0])
    return source.y_train[indices[1]], relabel_held_out(args, source, indices, given), indices[0]


@pytest.mark.slow
def test_validation_labels_follow_the_law_of_the_noise(tmp_path):
    true, given, _ = held_out("--noise", "0.5", "--noise-type", "symmetric")
    assert int((given != true).sum()) == pytest.approx(400, abs=57)  # half of 800, four standard deviations
    assert torch.equal(given, held_out("--noise", "0.5", "--noise-type", "symmetric")[1])
    assert not torch.equal(given, held_out("--noise", "0.5", "--noise-type", "symmetric", "--noise-seed", "1")[1])
    true, given, _ = held_out("--noise", "0.4", "--noise-type", "pair")
    assert set(((given - true) % 10).tolist()) == {0, 1}
    true, given, _ = held_out("--noise", "0.5", "--noise-type", "dynamic")
    assert int((given != true).sum()) == pytest.approx(360, abs=57)  # uniform over all classes: 45 %
    assert held_out()[1] is None and held_out("--noise", "0.5", "--noise-type", "uniform")[1] is not None


@pytest.mark.slow
def test_validation_labels_of_a_file_are_its_own_or_drawn_by_its_matrix(tmp_path):
    everything, g = torch.arange(4000), torch.Generator().manual_seed(0)
    y = sources.load(options.parse("--dataset synthetic --synthetic-train 4000 --synthetic-test 10".split())).y_train
    noisy = noises.pair(y, 10, 0.4, g)
    noisefile.save(tmp_path / "all.npz", everything, y, noisy)
    own = ("--noise-type", "file", "--noise-file", str(tmp_path / "all.npz"))
    true, given, index = held_out(*own)
    rest = torch.ones(4000, dtype=torch.bool).scatter(0, index, False)
    assert torch.equal(given, noisy[rest]) and torch.equal(true, y[rest])
    noisefile.save(tmp_path / "train.npz", index, y[index], noisy[index])
    true, given, _ = held_out("--noise-type", "file", "--noise-file", str(tmp_path / "train.npz"))
    assert set(((given - true) % 10).tolist()) == {0, 1}
    assert float((given != true).double().mean()) == pytest.approx(0.4, abs=0.07)  # four standard errors of 800 draws
    true, given, _ = held_out("--noise", "0.4", "--noise-type", "instance")
    assert float((given != true).double().mean()) == pytest.approx(0.4, abs=0.07)


# ----------------------------------------------------------------------------------------------------------- detectors


def by_definition(logits: torch.Tensor, y: torch.Tensor) -> tuple[list, list, list]:
    """AUM, forgetting events (None: never learned) and mean loss of `logits` (epochs, n, K), written out example by example."""
    aum, forgetting, loss = [], [], []
    for i, label in enumerate(y.tolist()):
        margin, events, before, learned, total = 0.0, 0, False, False, 0.0
        for z in logits[:, i].tolist():
            margin += z[label] - max(v for k, v in enumerate(z) if k != label)
            total += math.log(sum(map(math.exp, z))) - z[label]
            right = z.index(max(z)) == label
            events, learned, before = events + (before and not right), learned or right, right
        aum.append(margin / len(logits))
        loss.append(total / len(logits))
        forgetting.append(events if learned else None)
    return aum, forgetting, loss


@pytest.mark.parametrize("ranks", [1, 2])
def test_detectors_are_what_their_definitions_say(ranks):
    g, (n, K, epochs, B) = torch.Generator().manual_seed(0), (23, 4, 6, 5)
    logits = 2 * torch.randn(epochs, n, K, generator=g, dtype=torch.float64)
    y, noisy = torch.randint(K, (n,), generator=g), torch.rand(n, generator=g) < 0.4
    torch.set_default_dtype(torch.float64)
    summed: list[torch.Tensor] = []  # what all processes get
    make = lambda: Examples(n, K, math.ceil(n / B), torch.device("cpu"), lambda _: summed[-1])  # noqa: E731
    tables, changes = [make() for _ in range(ranks)], []
    for epoch in range(epochs):
        order = torch.randperm(n, generator=g)
        for start in range(0, n, B):
            some = order[start : start + B]
            for rank, table in enumerate(tables):
                a, b = data.shard(len(some), rank, ranks)
                table.add(batch_of(some[a:b]), logits[epoch, some[a:b]])
        summed.append(torch.stack([t.logits for t in tables]).sum(0))
        values = [t.end_epoch(y, noisy) for t in tables][-1]
        changes.append(values.get("train/prediction_changes"))
    aum, forgetting, loss = by_definition(logits, y)
    assert None in forgetting
    for t in tables:
        score = t.scores()
        torch.testing.assert_close(-score["aum"], torch.tensor(aum), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(score["loss"], torch.tensor(loss), rtol=1e-12, atol=1e-12)
        assert score["forgetting"].tolist() == [epochs + 1 if f is None else f for f in forgetting]
    ordered = [
        (a > b) + (a == b) / 2 for i, a in enumerate(loss) for j, b in enumerate(loss) if noisy[i] and not noisy[j]
    ]
    assert values["detect/loss"] == pytest.approx(sum(ordered) / len(ordered))
    taken = logits.argmax(2)
    assert changes == [None, *(float((a != b).double().mean()) for a, b in zip(taken, taken[1:]))]


def batch_of(index: torch.Tensor) -> data.Batch:
    return data.Batch(*[None] * 9, index)


def columns(folder) -> dict[str, np.ndarray]:
    with np.load(folder / "examples.npz", allow_pickle=False) as z:
        return dict(z)


@pytest.mark.slow
def test_examples_are_ranked_and_leave_no_trace(go):
    """With `--measure off` and the option or without, weights and series are the same; the file repeats `detect/*`."""
    argv = "--noise 0.5 --epochs 3 --measure off".split()
    off, on, split = go(*argv, name="off"), go(*argv, "--examples", name="on"), go(*argv[:-2], name="split")
    assert same_weights(off, on)
    plain, ranked = series(off), series(on)
    assert {tag: ranked[tag] for tag in plain} == plain
    added = {"train/prediction_changes", "detect/aum", "detect/forgetting", "detect/loss"}
    assert ranked.keys() - plain.keys() == added and added <= series(split).keys()
    assert [s for s, _ in ranked["detect/aum"]] == [5, 10, 15] and [
        s for s, _ in ranked["train/prediction_changes"]
    ] == [10, 15]
    assert not (off / "examples.npz").exists() and not (split / "examples.npz").exists()
    actual = columns(on)
    assert (np.diff(actual["aum"]) >= 0).all() and sorted(actual["index"]) == sorted(np.load(on / "noise.npz")["index"])
    wrong = torch.tensor(actual["label"] != actual["true"])
    for name, sign in (("aum", -1), ("loss", 1)):
        score = sign * torch.tensor(actual[name])
        assert metrics.auc(score[wrong], score[~wrong]) == pytest.approx(ranked[f"detect/{name}"][-1][1], abs=1e-6), (
            name
        )
    true = dict(zip(np.load(on / "noise.npz")["index"], np.load(on / "noise.npz")["label"], strict=True))
    assert all(true[i] == label for i, label in zip(actual["index"], actual["label"], strict=True))


@pytest.mark.slow
def test_interrupted_within_an_epoch_the_accumulators_go_on(go, tmp_path):
    argv = "--noise 0.5 --epochs 3 --examples".split()
    whole = go(*argv, name="whole")
    cut = go(*argv, "--max-steps", "7", name="cut")
    assert torch.load(cut / "last.ckpt", weights_only=True)["examples"]["logits"].any()
    argv = [*TINY, *argv, "--runs", str(cut.parent), "--name", "cut", "--resume", "--max-steps", "15"]
    assert train.main(argv) == 0
    a, b = series(whole), series(cut)
    for tag in ("detect/aum", "detect/forgetting", "detect/loss", "train/prediction_changes"):
        assert a[tag] == b[tag], tag
    assert (whole / "examples.npz").read_bytes() == (cut / "examples.npz").read_bytes()


@pytest.mark.slow
def test_a_checkpoint_without_accumulators_is_gone_on_from(go, capsys):
    """One of an earlier version: they begin with the first epoch that is followed from its start."""
    argv = "--noise 0.5 --epochs 4 --examples".split()
    cut = go(*argv, "--max-steps", "7", name="cut")
    path = cut / "last.ckpt"
    state = torch.load(path, weights_only=True)
    kept = state.pop("examples")
    torch.save(state, path)
    again = [*TINY, *argv, "--runs", str(cut.parent), "--name", "cut", "--resume"]
    assert train.main([*again, "--max-steps", "9"]) == 0  # still within the epoch that it lacks the start of
    assert "examples.npz is not written: no epoch was followed" in capsys.readouterr().err
    assert train.main(again) == 0
    assert [s for s, _ in series(cut)["detect/aum"]] == [5, 15, 20]
    for wrong in ({"epochs": -1}, {"margin": kept["margin"][:3]}, {"logits": None}, {"steps": 5}):
        state["examples"] = kept | wrong
        torch.save(state, path)
        torch.save(state, cut / "previous.ckpt")
        capsys.readouterr()
        assert train.main(again) == 2
        result = capsys.readouterr().err
        assert f"examples.{next(iter(wrong))}" in result and "Traceback" not in result


@pytest.mark.slow
def test_two_processes_accumulate_what_one_does(zygote, tmp_path):
    argv = [
        *TINY,
        *"--norm gn --precision 64-true --noise 0.5 --bs 31 --lr 0.5 --measure-budget 10 --examples --runs".split(),
        str(tmp_path),
    ]
    assert zygote.run([*argv, "--name", "one"]) == [0], zygote.output()
    assert zygote.run([*argv, "--name", "two"], ranks=2) == [0, 0], zygote.output()
    one, two = columns(tmp_path / "one"), columns(tmp_path / "two")
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-9, atol=1e-9, err_msg=name)
    a, b = series(tmp_path / "one"), series(tmp_path / "two")
    for tag in ("train/prediction_changes", "detect/aum", "val/acc_noisy", "probe/memorized_excess"):
        assert [s for s, _ in b[tag]] == [s for s, _ in a[tag]], tag
        assert [v for _, v in b[tag]] == pytest.approx([v for _, v in a[tag]], abs=1e-9), tag
    assert any(v for _, v in a["train/prediction_changes"])


def test_labels_drawn_anew_each_epoch_are_not_ranked(go, capsys):
    go("--noise", "0.5", "--noise-type", "dynamic", "--examples", status=2)
    assert "--examples" in capsys.readouterr().err
    actual = series(go("--noise", "0.5", "--noise-type", "dynamic", name="d"))
    assert "detect/aum" not in actual and "train/prediction_changes" in actual and "val/acc_noisy" in actual


# -------------------------------------------------------------------------------------------------------------- report


def test_rules_choose_the_best_value_before_patience_runs_out():
    values = np.array([5.0, 3, 4, 2, 2.5, 2.5, 1])
    assert [race.chosen(values, p) for p in (1, 2, 3, 9)] == [1, 3, 6, 6]
    assert race.chosen(np.array([1.0]), 1) == 0
    np.testing.assert_allclose(race.averaged(values, 3), [5, 4, 4, 3, 8.5 / 3, 7 / 3, 2])
    np.testing.assert_allclose(race.averaged(values, 0), np.cumsum(values) / np.arange(1, 8))
    np.testing.assert_allclose(race.averaged(values, 1), values)


def test_the_report_races_the_signals_and_compares_detectors(tmp_path):
    """Planted: accuracy is best at epoch 4, where Label Wave's average turns; noisy accuracy peaks at epoch 5."""
    acc = [0.1, 0.3, 0.4, 0.5, 0.6, 0.58, 0.5, 0.45]
    per_epoch = math.ceil(1600 / 128)
    at = lambda values, first: [((first + i) * per_epoch, v) for i, v in enumerate(values)]  # noqa: E731
    for seed in range(2):
        actual = {"val/acc": at(acc, 0), "val/acc_noisy": at([0.1, 0.2, 0.3, 0.3, 0.35, 0.4, 0.3, 0.2], 0)}
        actual["train/prediction_changes"] = at([0.9, 0.6, 0.3, 0.7, 0.8, 0.9], 2)  # averages .9 .75 .6 .53 .6 .8
        actual |= {"detect/aum": at([0.6, 0.8 + 0.1 * seed], 1), "detect/loss": at([0.7], 1), "probe/auc": at([0.5], 1)}
        plant(tmp_path / "runs", f"--noise 0.5 --epochs 7 --seed {seed} --name s{seed}", actual)
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "png"]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[5:-1]] for line in page.splitlines() if "constant | 0.5" in line]
    rules = {row[0]: row[1:] for row in rows if row[0].startswith(("best", "last", "Label", "noisy"))}
    assert rules["best epoch by clean labels"][1:] == ["4.0 ± 0.0", "0.6000 ± 0.0000", "0.0000 ± 0.0000"]
    assert rules["noisy validation accuracy"][1:] == ["5.0 ± 0.0", "0.5800 ± 0.0000", "0.0200 ± 0.0000"]
    assert rules["Label Wave"][1] == "5.0 ± 0.0" and rules["last epoch"][3] == "0.1500 ± 0.0000"
    assert "Some of these cells have no series of: gradient disparity, susceptibility" in page
    assert ["2", "0.8500 ± 0.0707", "0.7000 ± 0.0000", "", "0.5000 ± 0.0000"] in rows
    assert report.main([str(tmp_path / "runs" / "s0"), "--out", str(tmp_path / "one"), "--format", "png"]) == 0
    assert "Label Wave" in (tmp_path / "one" / "report.md").read_text()


def test_runs_without_signals_have_no_such_sections(tmp_path):
    plant(tmp_path / "runs", "--noise 0.5 --epochs 2 --name a", {"val/acc": [(0, 0.1), (13, 0.5)]})
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "png"]) == 0
    assert not {"## Stopping", "## Detection"} & set((tmp_path / "out" / "report.md").read_text().splitlines())
