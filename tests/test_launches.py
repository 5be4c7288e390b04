"""How many operations a step takes: on a GPU each is a launch of a kernel or more, and small batches wait for those."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

import gradsplit
import models
import train
from conftest import TINY
from engine import fast, options, sources
from engine.hardware import make_fabric
from engine.job import prepare


class Count(TorchDispatchMode):
    """Counts the operations within its block that compute something: views and new memory launch nothing."""

    IDLE = (
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "_unsafe_view",
        "lift_fresh",
    )

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in self.IDLE and not name.startswith("profiler::"):
            self.by_name[name] = self.by_name.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


@pytest.fixture(scope="module")
def job():
    """ResNet-18; its width changes nothing in the counts."""
    args = options.parse([*TINY, "--noise", "0.5", "--compile=off", "--graph=off"])
    source = sources.load(args)
    index = torch.arange(len(source.x_train))
    fabric, scaler = make_fabric(args)
    labels = torch.where(index % 2 == 0, source.y_train, (source.y_train + 1) % 10)
    job = prepare(args, source, (index[:160], index[160:]), labels[:160], fabric, scaler)
    job.state.step = 1
    return job


# With room for other versions of torch: 151, 385 and 6 on a CPU with 2.14; 151 and 419 on a GPU with 2.11.
PLAIN, MEASURED, REPLAYED = 160, 430, 8


def counted_step(job, measured: bool) -> Count:
    """A step that is not the first, in which momentum is made."""
    batch = job.train.batch(job.train.epoch(0, 0), 0, job.args.bs, 0, 1)
    train.train_step(job, batch, 1, measured=False)
    with Count() as count:
        train.train_step(job, batch, 4, measured=measured)
    return count


def test_of_a_step(job):
    """Written down in docs/speed.md."""
    plain, measured = counted_step(job, False), counted_step(job, True)
    print(f"plain {plain.total}, measured {measured.total}: {plain.by_name} {measured.by_name}")
    assert plain.total <= PLAIN and measured.total <= MEASURED
    normalised = sum(n for name, n in plain.by_name.items() if name in ("native_batch_norm", "cudnn_batch_norm"))
    assert normalised == 20 and "add_" not in plain.by_name  # a counter of batches would be added to


def test_of_a_batch_and_of_what_surrounds_a_replay(job):
    """Cutting out a batch and normalising it takes five; the captured step does both itself. Of a replayed step there are left
    the two copies into the graph, the logits that are kept and the update; two more count noisy labels on the CPU."""
    plan = job.train.epoch(0, 0)
    counts = []
    for cut in (True, False):
        with Count() as count:
            job.train.batch(plan, 0, job.args.bs, cut=cut)
        counts.append({name: n for name, n in count.by_name.items() if name not in ("sum", "_local_scalar_dense")})
    print(counts)
    assert sum(counts[0].values()) == 5 and counts[1] == {}  # the sum is of labels on the CPU
    graph = fast.Graph.__new__(fast.Graph)
    batch = job.train.batch(plan, 0, job.args.bs, cut=False)
    graph.starts, graph.y = batch.x.clone(), batch.y.clone()
    graph.graph, graph.logits = (
        SimpleNamespace(replay=lambda: None),
        torch.zeros(job.args.bs, 10, device=batch.x.device),
    )
    graph.gradients = [torch.zeros_like(p) for p in job.parameters]
    job.graph = graph
    try:
        train.train_step(job, batch, 1, measured=False)
        with Count() as count:
            train.train_step(job, fast.next_batch(job, plan, 0, False), 2, measured=False)
    finally:
        job.graph = None
    print(count.total, count.by_name)
    assert count.by_name["copy_"] == 2 and count.total <= REPLAYED


@pytest.mark.parametrize("V", [2, 3])
def test_of_a_gram_matrix_on_a_gpu(V):
    """ResNet-18 of width 64: 62 tensors, 11 million entries. Tensors without values take the path of a GPU."""
    module = models.build_model("resnet18", 3, 10, 64, "bn", 0).to("meta", memory_format=torch.channels_last)
    rows = [[torch.empty_like(p) for p in module.parameters()] for _ in range(V)]
    with Count() as count:
        assert gradsplit.gram(rows).shape == (V, V)
    print(count.total, count.by_name)
    assert count.total <= 30 and count.by_name["bmm"] == 3


def test_a_network_of_torchs_names_is_saved_and_read(job):
    """With the counters of batches that training goes without."""
    usual = models.build_model("resnet18", 3, 10, 8, "bn", 0)
    saved = models.counted_state(job.module, 7)
    assert list(saved) == list(usual.state_dict()) and not any(
        name.endswith(models.COUNTER) for name in job.module.state_dict()
    )
    assert usual.load_state_dict(saved) and int(usual.bn1.num_batches_tracked) == 7
    assert job.module.load_state_dict(saved) and job.module.load_state_dict(job.module.state_dict())
    assert models.COUNTER in str(saved) and all(
        saved[name].dtype == value.dtype for name, value in usual.state_dict().items()
    )


def test_counters_stay_where_they_are_used():
    kept = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3, momentum=None), torch.nn.SyncBatchNorm(3), torch.nn.BatchNorm2d(3)
    )
    models.stop_counting(kept)
    assert [m.num_batches_tracked is None for m in kept] == [False, False, True]
    assert list(models.counted_state(kept, 2)) == list(torch.nn.Sequential(*map(type(kept[2]), (3, 3, 3))).state_dict())


def test_running_statistics_without_a_counter_are_saved_as_they_are():
    """torchvision's frozen BatchNorm has none; nor has one that keeps no statistics, and an instance norm keeps its own."""
    net = torch.nn.Sequential(
        torchvision.ops.FrozenBatchNorm2d(3),
        torch.nn.BatchNorm2d(3, track_running_stats=False),
        torch.nn.InstanceNorm2d(3, track_running_stats=True),
        torch.nn.BatchNorm2d(3),
    )
    names = set(net.state_dict())
    models.stop_counting(net)
    saved = models.counted_state(net, 2)
    assert set(saved) == names and int(saved["3.num_batches_tracked"]) == 2
    assert net.load_state_dict(saved) and not net[0].weight.requires_grad
