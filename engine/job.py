"""What a run consists of: data, network and optimizer on their device, its counters, and what measuring needs of them."""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

import data
import epochwise
import metrics
import models
import optim
from data import Images, TrainSet
from engine import fast, noisefile, options
from engine.course import course
from engine.examples import Examples
from engine.hardware import sum_over_ranks
from engine.labels import ByEpoch, fake_mask, loss_matrix
from gradsplit import sync_batchnorms
from losses import ExampleLoss, build_loss
from measure import MeasuringContext, MeasuringOptions, MeasuringState
from schedules import Course


@dataclass
class JobState(MeasuringState):
    """All that training changes beside weights and optimizer: what measurements carry, and the counters."""

    step: int = 0  # updates made
    best_val_acc: float = 0.0  # of the trained network
    seconds: float = 0.0  # of earlier segments
    steps_seconds: float = 0.0  # training steps alone, after warm-up
    steps_images: int = 0  # in that time


@dataclass
class TrainingJob:
    """Everything a step needs; the counters in `state` and the weights are all that training changes."""

    args: object
    fabric: Fabric
    context: MeasuringContext  # the bare network and the training examples are in it
    model: nn.Module  # Fabric's wrapper (precision, DDP): plain steps
    optimizer: torch.optim.Optimizer
    val: tuple[Images, Tensor]
    test: tuple[Images, Tensor]
    course: Course
    whole_steps: int  # of all epochs: more than `total_steps` where the run ends with its schedule
    val_given: Tensor | None = None  # noisy labels of the validation split, on the CPU; None where there is no noise
    scaler: torch.amp.GradScaler | None = None  # of 16-mixed
    graph: fast.Graph | None = None  # --graph: the captured step
    fast_error: dict | None = None  # of --compile and --graph: how far off their gradient is, and how far it may be
    auto: bool = False  # nobody asked for --compile or --graph: a run goes on without where they cannot be had
    refused: bool = False  # and does
    best_is_saved: bool = True  # whether last.ckpt is of the same step as best.ckpt, or of a later one
    state: JobState = field(init=False)  # also the state of `context`
    examples: Examples | None = field(init=False, default=None)  # what single training examples did, where that is kept

    def __post_init__(self) -> None:
        context = self.context
        self.state = context.state
        if self.args.measure != "off" or self.args.examples:
            n, K = len(self.train), len(context.transition)
            self.examples = Examples(n, K, context.steps_per_epoch, context.device, context.sum_over_ranks)

    @property
    def module(self) -> nn.Module:
        """The bare network: measurements and evaluation."""
        return self.context.module

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.context.parameters

    @property
    def loss_matrix_sha256(self) -> str | None:
        """SHA-256 of the transition matrix of a loss that takes one."""
        matrix = getattr(self.context.loss, "matrix", None)
        return None if matrix is None else noisefile.sha256(matrix.cpu().double().view(torch.int64))

    @property
    def train(self) -> TrainSet:
        return self.context.train

    @property
    def total_steps(self) -> int:
        return self.context.total_steps

    @property
    def sched_steps(self) -> int:
        return self.course.length

    @property
    def steps_per_epoch(self) -> int:
        return self.context.steps_per_epoch


def prepare(
    args,
    source: data.Source,
    indices: tuple[Tensor, Tensor],
    labels: Tensor,
    fabric: Fabric,
    scaler=None,
    by_epoch=None,
    val_given: Tensor | None = None,
) -> TrainingJob:
    """Put data, model and optimizer on the device. `labels` (n,) and `by_epoch` are those of `labels.relabel`, `val_given`
    are the labels of `labels.relabel_held_out`."""
    (index, held), device, K = indices, fabric.device, len(source.classes)
    true, fake = source.y_train[index], args.fake_mask
    module = network(args, source, len(index), fabric.world_size)
    stats = source.mean, source.std
    mask = None if fake is None else fake_mask(len(index), fake, data.generator(args.noise_seed, "fake-mask"))
    x, at, augment = source.x_train, source.positions(index), not args.no_augment
    train = TrainSet(x, labels, true, *stats, device, augment, mask, by_epoch, at)
    sets = source.validation(held), (source.x_test, None, source.y_test)
    val, test = ((Images(x, *stats, device, index=at), y.to(device)) for x, at, y in sets)
    module = on_device(module, device, synchronize=fabric.world_size > 1 and args.sync_bn == "on")
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = optim.build_optimizer(args.optimizer, trained, args.lr, args.momentum, args.wd, args.sched)
    steps_per_epoch = math.ceil(len(train) / args.bs)
    rates = course(args, steps_per_epoch)
    total_steps, whole_steps = options.run_steps(args, steps_per_epoch)
    dropout, auto = models.has_dropout(module), "on" not in (args.compile, args.graph)
    fast.choose(args, device.type == "cuda", fabric.world_size, total_steps * args.bs)
    model, optimizer = fabric.setup(fast.compiled(module) if args.compile == "on" else module, optimizer)
    heavy_ball = optim.OPTIMIZERS[args.optimizer].heavy_ball
    context = MeasuringContext(
        module,
        device,
        train=train,
        transition=metrics.confusion(true, labels, K),
        options=MeasuringOptions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(MeasuringOptions)}),
        autocast=fabric.autocast,
        sum_over_ranks=partial(sum_over_ranks, fabric),
        loss_scale=lambda: scaler.scale(torch.ones((), device=device)) if scaler else 1.0,
        learning_rate=lambda: optimizer.param_groups[0]["lr"] if heavy_ball else math.nan,  # for the edge of stability
        state=JobState(),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        batch_size=args.bs,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        loss=training_loss(args, true, labels, K, by_epoch, device),
        seed=args.seed,
        noise_seed=args.noise_seed,
        fake_mask=fake is not None,
        has_dropout=dropout,
        momentum=lambda: optimizer.param_groups[0].get("momentum", math.nan),
        held_out=val[0],
    )
    length = epochwise.RunLength(total_steps, steps_per_epoch, args.bs, len(train), val[0].n)
    context.state.plan = epochwise.make_plan(context, length)
    return TrainingJob(
        args, fabric, context, model, optimizer, val, test, rates, whole_steps, val_given, scaler, auto=auto
    )


def training_loss(
    args, true: Tensor, labels: Tensor, K: int, by_epoch: ByEpoch | None, device: torch.device
) -> ExampleLoss | None:
    """The run's loss with its transition matrix, if it takes one, on the device; None for the cross-entropy."""
    matrix = loss_matrix(args, true, labels, K, by_epoch)
    return build_loss(args.loss, None if matrix is None else matrix.to(device, torch.get_default_dtype()))


def on_device(module: nn.Module, device: torch.device, synchronize: bool) -> nn.Module:
    """The network on its device, its BatchNorms over all processes with `synchronize`, on a GPU."""
    module = module.to(device, torch.get_default_dtype(), memory_format=torch.channels_last)
    if synchronize and device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        for m in sync_batchnorms(module):
            m.register_forward_pre_hook(empty_as_float)
    models.stop_counting(module)
    return module


def network(args, source: data.Source, n: int, world_size: int) -> nn.Module:
    """The network before its first step, on the CPU. Raises `InputError` where it cannot be trained on this set, of which `n`
    examples are trained on."""
    H, W, C = source.x_train.shape[1:]
    start = data.stream_seed(args.seed, "init")
    module = models.build_model(args.model, C, len(source.classes), args.width, args.norm, start, (H, W))
    apart = (
        args.measure != "off" and args.measure_bn == "separate"
    )  # clean and noisy examples, either of which may be one
    if args.model not in models.MODELS and (apart or world_size > 1 or n % args.bs == 1 or args.bs == 1):
        models.try_one(module, C, (H, W), f"--model {args.model}")
    if models.is_own(args.model) and args.measure != "off":
        models.try_to_measure(module, C, (H, W), f"--model {args.model}")
    return module


def empty_as_float(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Before SyncBatchNorm: a process without examples sends its statistics in its input's dtype, all others in float32."""
    return (args[0].to(module.weight.dtype),) if args[0].numel() == 0 else None
