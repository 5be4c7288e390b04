"""What is measured after an epoch: a registry of one function and one entry each, and what fits into the budget.

Everything is counted, nothing timed, so that the same command measures the same: F is one forward of one example, a
gradient or a vector-Jacobian product 2F more, a step 3F an example.

Shapes: m examples or parts, n examples of a probe, K classes, P parameters.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import gradsplit
import metrics
import models
from gradsplit import Forward, batchnorm_mode, without_hooks
from measure import MeasuringContext, MeasuringOptions, is_due

EVAL_BATCH = 1000  # examples of a forward without gradients, of 32 x 32 pixels
CPU_BATCH = 125  # on a CPU: activations of ResNet-18 at width 64 are then of 32 MB, the most that glibc keeps
PROBE = 2000  # noisy and as many clean training examples
CURVATURE_EXAMPLES = 128
CURVATURE_PRODUCTS = 16  # at most, for the eigenvalue
PRODUCT_COST = 18.0  # F: 5 by arithmetic, but in full precision and through BatchNorm's second derivative (see docs/measurements.md)
CURVATURE_TOLERANCE = 1e-2  # relative residual of the eigenpair at which to stop
CURVATURE_RESOLVED = 0.3  # at which the eigenvalue, whose own error is far smaller, is still logged
TRACE_PROBES = 8
# A Hessian without the second derivatives of some function in the network is seen by its asymmetry, of which rounding makes up
# to 2e-5; or, where Python has defined the function, by how far a product is from the difference of gradients.
ASYMMETRY, DIFFERENCE = 1e-3, 1e-2
NO_SECOND_DERIVATIVE = "a function in the network has no second derivative of its own"
ISOTROPY_PARTS = 16  # fewer where the network is so large that they would take more than ISOTROPY_BYTES
ISOTROPY_EXAMPLES = 64  # of a part
ISOTROPY_BYTES = 2 << 30
SUSCEPTIBILITY_EXAMPLES = 64  # held-out images that are given random labels
DISPARITY_BATCHES = 5  # as in the paper
DISPARITY_EXAMPLES = 32  # of a batch
SIGNALS_COST = 4.0 * SUSCEPTIBILITY_EXAMPLES + 3.0 * DISPARITY_BATCHES * DISPARITY_EXAMPLES  # of one time, in F


class Undefined(RuntimeError):
    """A measure that this network does not have. The message is one line."""


@contextmanager
def undisturbed(context: MeasuringContext):
    """For forwards of the same examples on all processes: BatchNorm's mode as the run measures in; what draws random numbers
    as in evaluation."""
    with batchnorm_mode(context.module, context.options.measure_bn, same_on_all_ranks=True):
        for m in models.drawing_modules(context.module):
            m.training = False  # and not its children, such as BatchNorm
        yield


# ------------------------------------------------------------------------------------------------------------- probe


def at_a_time(most: int, batch_size: int, H: int, W: int) -> int:
    """Examples of a forward: `most` of 32 x 32 pixels, of larger images as many fewer, but as many as a step trains on."""
    return min(most, max(batch_size, most * 32 * 32 // (H * W)))


def eval_logits(context: MeasuringContext, images: Tensor) -> Tensor:
    """(n, K) logits of `images` (n, C, H, W), on a CPU of `CPU_BATCH` at a time: a quarter faster, and the same numbers."""
    most = CPU_BATCH if images.device.type == "cpu" else EVAL_BATCH
    parts = images.split(at_a_time(most, context.batch_size, *images.shape[2:]))
    return torch.cat([context.logits(part) for part in parts])


def eval_batches(context: MeasuringContext, images: data.Images, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits (m, K), positions (m,)) over this process's share of `images` at `index`, eval mode, not augmented."""
    share = torch.arange(*data.shard(len(index), context.rank, context.world_size))
    for at in share.split(at_a_time(EVAL_BATCH, context.batch_size, images.H, images.W)) if len(share) else ():
        yield eval_logits(context, images.plain(index[at])), at


def probe_indices(context: MeasuringContext) -> tuple[Tensor, Tensor]:
    """Fixed training examples, noisy (n1,) and clean (n2,), PROBE of each or fewer where there are fewer."""
    chosen = []
    for name, mask in (("noisy", context.train.noisy), ("clean", ~context.train.noisy)):
        where = mask.nonzero().squeeze(1)
        order = torch.randperm(len(where), generator=data.generator(context.noise_seed, f"probe-{name}"))
        chosen.append(where[order[:PROBE]].sort().values)
    return chosen[0], chosen[1]


@torch.no_grad()
def probe(context: MeasuringContext) -> dict:
    """`probe/*`: what the network predicts on the probe set (eval mode, no augmentation); waits for the device.

    Of the noisy examples: shares predicted as their given label (memorized), their true one (recovered), another; of
    the clean ones: accuracy; AUC with which the cross-entropy against the given label, whatever the loss that trains, tells
    noisy from clean (Arazo et al. 2019 separate them by it). `memorized_excess` is the share memorized beyond its chance level on held-out images.
    """
    context.average_buffers()
    noisy, clean = probe_indices(context)
    index = torch.cat([noisy, clean])
    y, true, device = context.train.labels[index], context.train.true[index], context.device
    sheet = torch.zeros(2, len(index), dtype=torch.float64, device=device)  # predicted class, loss
    context.module.eval()
    try:
        for logits, at in eval_batches(context, context.train.images, index):
            sheet[0, at] = logits.argmax(1).double()
            sheet[1, at] = F.cross_entropy(logits, y[at].to(device), reduction="none").double()
    finally:
        context.module.train()
    predicted, loss = context.sum_over_ranks(sheet).cpu()
    n, values = len(noisy), {}
    if n:
        memorized, recovered = predicted[:n] == y[:n], predicted[:n] == true[:n]
        values["probe/memorized"] = float(memorized.double().mean())
        values["probe/recovered"] = float(recovered.double().mean())
        values["probe/other"] = float((~memorized & ~recovered).double().mean())
        values["probe/auc"] = metrics.auc(loss[:n], loss[n:])
        if context.confusion is not None:
            examples = predicted[:n].long(), true[:n], y[:n]
            values["probe/memorized_excess"] = metrics.memorized_excess(*examples, context.confusion)
    if len(clean):
        values["probe/clean_acc"] = float((predicted[n:] == y[n:]).double().mean())
    return values


# ---------------------------------------------------------------------------------------------------------- isotropy


def isotropy(context: MeasuringContext) -> dict:
    """`isotropy/*`: effective dimension and participation ratio of m label-noise gradients, each the mean of as many noisy
    training examples, and as their null the effective dimension of m gradients of clean examples at the same weights.

    Part k's label-noise gradient is pulled back from the difference of the loss's cotangents under given and true labels, for
    the cross-entropy U_i = (onehot(y*_i) - onehot(y_i)) / |part|: directly the part's g - g(y*). That of a clean part is its
    loss's: over parts these scatter by the sampling of examples alone. Empty with too few noisy examples, without the null
    with too few clean ones. Every process computes the same.
    """
    noisy, clean = probe_indices(context)
    P = sum(p.numel() for p in context.parameters)
    m = min(isotropy_parts(P), len(noisy) // 4)
    if m < 3 or context.fake_mask:
        return {}
    with undisturbed(context):
        G = part_products(context, noisy, m, "isotropy", label_noise=True)
        null = part_products(context, clean, m, "isotropy-clean") if len(clean) >= m else None
    dimension = float(metrics.effective_dimension(G))  # not finite where it is not resolved: left out
    return {
        "isotropy/dimension": dimension,
        "isotropy/dimension_share": dimension / P,
        "isotropy/clean_dimension": math.nan if null is None else float(metrics.effective_dimension(null)),
        "isotropy/participation": float(metrics.participation(G)),
        "isotropy/isotropic": metrics.isotropic_participation(m, P),
    }


def part_products(context: MeasuringContext, index: Tensor, m: int, stream: str, label_noise: bool = False) -> Tensor:
    """Gram matrix (m, m) float64 of the gradients of m disjoint parts of the training examples `index`, drawn from `stream`; with
    `label_noise` of their parts g - g(y*)."""
    size, rows = min(ISOTROPY_EXAMPLES, len(index) // m), []
    mixed = index[torch.randperm(len(index), generator=data.generator(context.noise_seed, stream))]
    for part in mixed[: m * size].view(m, size):
        x = context.train.images.plain(part)
        true, given = (t[part].to(x.device) for t in (context.train.true, context.train.labels))
        forward = Forward(context, x, size)
        rows.append(forward.row(given, torch.ones_like(given), free=True, true=true if label_noise else None))
    return gradsplit.gram(rows)


def isotropy_parts(P: int) -> int:
    """Parts m whose rows of `P` float32 parameters fit ISOTROPY_BYTES together; at least 4, which the dimension takes."""
    return max(4, min(ISOTROPY_PARTS, ISOTROPY_BYTES // (4 * P)))


# --------------------------------------------------------------------------------------------------------- curvature


def curvature(context: MeasuringContext) -> dict:
    """`curvature/*` of the loss (without weight decay) on a fixed batch of unaugmented training examples.

    Always in full precision: autocast would leave little of a second derivative. Every process computes the same. Raises
    `Undefined` where a function in the network has no second derivative.
    """
    g = data.generator(context.seed, "curvature")
    index = torch.randperm(len(context.train), generator=g)[:CURVATURE_EXAMPLES]
    with (
        undisturbed(context),
        torch.autocast(context.device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),  # fused attention has no second derivative
        without_hooks(context.parameters),
    ):
        x, y = context.train.images.plain(index), context.train.labels[index].to(context.device)
        loss = context.training_loss(context.module(x), y, "mean")
        gradients = torch.autograd.grad(loss, context.parameters, create_graph=True, allow_unused=True)
        used = [part is not None for part in gradients]
        parameters = [p for p, is_used in zip(context.parameters, used, strict=True) if is_used]
        gradient = [part for part in gradients if part is not None]
        sizes = [p.numel() for p in parameters]
        if any(p.is_complex() for p in parameters):
            raise Undefined("second derivatives with respect to complex parameters are not taken")
        if not all(part.requires_grad for part in gradient):
            raise Undefined(NO_SECOND_DERIVATIVE)

        def vectors(sign: bool) -> Tensor:
            v = torch.randn(sum(sizes), generator=g, dtype=torch.float32).to(context.device, torch.get_default_dtype())
            return v.sign() if sign else v

        def product(v: Tensor) -> Tensor:  # H v, both (P,)
            parts = [part.view_as(p) for part, p in zip(v.split(sizes), parameters, strict=True)]
            Hv = torch.autograd.grad(gradient, parameters, parts, retain_graph=True, materialize_grads=True)
            return torch.cat([part.reshape(-1) for part in Hv])

        top, residual, _ = metrics.lanczos(product, vectors(False), CURVATURE_TOLERANCE, CURVATURE_PRODUCTS)
        trace, error, asymmetry = metrics.hutchinson(product, [vectors(True) for _ in range(TRACE_PROBES)])
        if float(asymmetry) > ASYMMETRY:
            raise Undefined(NO_SECOND_DERIVATIVE)
        if any(isinstance(node, BackwardCFunction) for node in gradsplit.graph_nodes([loss])):
            v = vectors(True)
            if off_by(context, x, y, used, product(v), v) > DIFFERENCE:
                raise Undefined(NO_SECOND_DERIVATIVE)
    return {
        "curvature/top": top if residual < CURVATURE_RESOLVED else math.nan,  # not resolved: left out
        "curvature/top_residual": residual,
        "curvature/trace": float(trace),
        "curvature/trace_error": float(error),
        "curvature/edge": metrics.edge_of_stability(context.learning_rate(), context.momentum()),
    }


def off_by(context: MeasuringContext, x: Tensor, y: Tensor, used: list[bool], Hv: Tensor, v: Tensor) -> float:
    """|H v - d| / |H v|, d the central difference of gradients along v (P,) of the parameters in `used`, by a copy of the
    network in float64."""
    net, dtype = copy.deepcopy(context.module).double(), torch.get_default_dtype()
    trained = [p for p in net.parameters() if p.requires_grad]
    parameters = [p for p, is_used in zip(trained, used, strict=True) if is_used]
    start = [p.detach().clone() for p in parameters]
    ahead = [part.view_as(p) for part, p in zip(v.double().split([p.numel() for p in start]), start, strict=True)]
    step = 1e-9 * float(torch.stack(torch._foreach_norm(start)).norm() / v.norm())  # hardly a ReLU meets its kink
    torch.set_default_dtype(torch.float64)
    try:
        gradients = []
        for alpha in (step, -step):
            with torch.no_grad():
                torch._foreach_copy_(parameters, torch._foreach_add(start, ahead, alpha=alpha))
            loss = context.training_loss(net(x.double()), y, "mean")
            gradients.append(torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters)]))
    finally:
        torch.set_default_dtype(dtype)
    difference = (gradients[0] - gradients[1]) / (2 * step)
    return float((Hv - difference).norm() / Hv.norm())


def curvature_cost() -> float:
    """Of one time, in F."""
    return CURVATURE_EXAMPLES * (3.0 + PRODUCT_COST * (CURVATURE_PRODUCTS + TRACE_PROBES))


# -------------------------------------------------------------------------------------------------- stopping signals


def signals(context: MeasuringContext) -> dict:
    """`probe/susceptibility` and `probe/disparity`; weights, running statistics and random streams stay as they are.

    Every process computes the same; waits for the device.
    """
    with undisturbed(context):
        return susceptibility(context) | disparity(context)


def susceptibility(context: MeasuringContext) -> dict:
    """How far one step on randomly labelled held-out images lowers their own loss: L(w) - L(w - lr dL/dw).

    The mean of these values up to an epoch is the paper's susceptibility of that epoch (Forouzesh, Sedghi & Thiran, ICLR
    2023, 2212.04461). The step is of plain SGD at the rate of the last update, without momentum or weight decay. Labels are
    uniform over the classes, drawn once. Empty without held-out images or at a learning rate of 0.
    """
    held, lr, K = context.held_out, context.learning_rate(), len(context.transition)
    if held is None or not lr > 0:
        return {}
    g = data.generator(context.seed, "susceptibility")
    index = torch.randperm(held.n, generator=g)[:SUSCEPTIBILITY_EXAMPLES]
    labels = torch.randint(K, index.shape, generator=g).to(context.device)
    x, everyone = held.plain(index), torch.ones_like(labels, dtype=torch.bool)
    forward = Forward(context, x, len(index))
    before = context.training_loss(forward.logits, labels, "mean")
    row = forward.row(labels, everyone, free=True)
    weights = [p.detach() for p in context.parameters]
    kept = [w.clone() for w in weights]
    try:
        torch._foreach_add_(weights, row, alpha=-lr / float(context.loss_scale()))
        with torch.no_grad():
            after = context.training_loss(context.logits(x), labels, "mean")
    finally:
        torch._foreach_copy_(weights, kept)
    return {"probe/susceptibility": float(before - after)}


def disparity(context: MeasuringContext) -> dict:
    """Mean distance of the gradients of five fixed batches of training examples under their given labels, each that of the
    batch's mean loss over the standard deviation of its losses (Forouzesh & Thiran 2021, 2107.06665).

    Empty with too few examples, undefined where all losses of a batch are alike.
    """
    size = min(DISPARITY_EXAMPLES, len(context.train) // DISPARITY_BATCHES)
    if size < 2:
        return {}
    index = torch.randperm(len(context.train), generator=data.generator(context.seed, "disparity"))
    rows = []
    for part in index[: DISPARITY_BATCHES * size].view(DISPARITY_BATCHES, size):
        forward, y = (
            Forward(context, context.train.images.plain(part), 1),
            context.train.labels[part].to(context.device),
        )
        losses = context.training_loss(forward.logits, y, "none")
        rows.append(forward.row(y, metrics.rescaled_weights(losses), free=True))
    distance = float(metrics.mean_distance(gradsplit.gram(rows))) / float(context.loss_scale())
    return {"probe/disparity": distance if math.isfinite(distance) else math.nan}


# ---------------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class EpochMeasure:
    """One entry: what is measured, and what the plan, the line at the start and the charts need of it."""

    measure: Callable[[MeasuringContext], dict]  # the values by tag, "NAME/..."; all processes call it
    cost: Callable[[int, int], float]  # of one time, in F, from P and the number of probed examples
    share: float  # of the budget, beside those of the others that are not `first`
    first: bool = False  # its share is the most that it takes of the whole budget, before the others
    unit: str = "epoch"  # between two times, in the singular


MEASURES = {  # name, which also begins its tags, but for the signals, which stand beside the probe's
    "probe": EpochMeasure(probe, lambda P, n_probe: float(n_probe), 0.65, first=True),
    "isotropy": EpochMeasure(isotropy, lambda P, n_probe: 6.0 * isotropy_parts(P) * ISOTROPY_EXAMPLES, 0.15),
    "curvature": EpochMeasure(curvature, lambda P, n_probe: curvature_cost(), 0.25),
    "signals": EpochMeasure(signals, lambda P, n_probe: SIGNALS_COST, 0.20),
}
STEPS_SHARE = 0.60  # beside those of `MEASURES`: measured steps with the controls


def measure_after_epoch(
    context: MeasuringContext,
    epoch: int,
    step: int,
    say: Callable[[str], None] = lambda line: None,
    ends_the_run: Callable[[Exception], object] = lambda e: False,
) -> dict:
    """Values of the measures that are due when `epoch` epochs and `step` updates are done (0: before training).

    What raises, on any process, is left out, which is said once; an exception of which `ends_the_run` holds is passed on.
    """
    values: dict[str, float] = {}
    plan, state = context.state.plan, context.state
    last = math.ceil(plan.get("total_steps", context.total_steps) / context.steps_per_epoch)
    for name, entry in MEASURES.items():
        if not is_due(plan.get(name), epoch, last):
            continue
        reason, found = None, dict[str, float]()
        try:
            with context.timed(name):
                found = entry.measure(context)
        except Exception as e:
            if ends_the_run(e):
                raise
            reason = data.one_line(e)
        if context.world_size > 1:
            failed = context.sum_over_ranks(torch.tensor(float(reason is not None), device=context.device))
            if failed > 0 and reason is None:
                reason = "it failed on another process"
        if reason is None:
            values |= found
        elif name not in context.left_out:
            context.left_out.add(name)
            say(f"warning: {name} is left out: {reason}")
    if values.get("probe/memorized", 0) >= 0.5 and state.half_memorized_step is None:
        state.half_memorized_step = step
        values["probe/half_memorized_step"] = float(step)
    return values


# ------------------------------------------------------------------------------------------------------------ budget


@dataclass(frozen=True)
class RunLength:
    """What a run trains on and evaluates, for what it costs."""

    total_steps: int
    steps_per_epoch: int
    batch_size: int
    train_examples: int
    val_examples: int

    @property
    def times(self) -> int:
        """How often an epoch-wise measure can be made: before training and after each epoch."""
        return math.ceil(self.total_steps / self.steps_per_epoch) + 1

    @property
    def cost(self) -> float:
        """Of the run without measurements: 3F an example trained on, F an example evaluated."""
        epochs = self.total_steps / self.steps_per_epoch
        return 3.0 * epochs * self.train_examples + self.times * self.val_examples


def make_plan(context: MeasuringContext, length: RunLength) -> dict:
    """The plan of `MeasuringState`: how far apart what the budget pays for stands; {} where there is nothing to plan."""
    options = context.options
    if options.measure == "off":
        return {}
    noisy, clean = probe_indices(context)
    n_probe = len(noisy) + len(clean)
    if options.measure == "full":
        P = sum(p.numel() for p in context.parameters)
        return plan_full(options, counted_costs(options, length.batch_size, P, n_probe), length)
    return plan_split(options, n_probe, length) if len(noisy) else {}


def counted_costs(options: MeasuringOptions, batch_size: int, P: int, n_probe: int) -> dict[str, float]:
    """Cost in F of one measurement: the controls of a measured step beyond the split, and each of `MEASURES`."""
    rows = 3 * options.chunks + options.permutations + 2  # chunks of C, of N, of the label-noise part
    # Two forwards of half a batch and one more row for each mask.
    separate = 2 * options.permutations if options.measure_bn == "separate" else 0
    own_forward = 0 if options.measure_bn == "train" else 1
    steps = batch_size * (2.0 * rows + separate * 1.5 + own_forward)
    return {"steps": steps} | {name: entry.cost(P, n_probe) for name, entry in MEASURES.items()}


def plan_full(options: MeasuringOptions, costs: dict[str, float], length: RunLength) -> dict:
    """How far apart the full measurements stand so that they cost about `--measure-budget` of the run.

    `costs` are those of `counted_costs`. Each is made at least once, whatever it costs, but for a budget of 0: then spacings
    are 0, and nothing is measured. What is left of the budget makes them more frequent: the probe first, up to its share of the budget; then measured steps and the other measures, at each turn the
    one that has had the least for its share. Returns {name: spacing} in steps for "steps", in epochs for the others. "share" is the counted share of the run's cost. Measurements are counted back from the end of the
    run (`is_due`), so that a single one is made there. "total_steps" is that end, from which a run that has grown since goes
    on counting (`kept_plan`).
    """
    budget = options.measure_budget * length.cost
    slots = {"steps": math.ceil(length.total_steps / options.measure_every)} | dict.fromkeys(MEASURES, length.times)
    shares = {"steps": STEPS_SHARE} | {name: entry.share for name, entry in MEASURES.items()}
    if not budget:
        return dict.fromkeys(slots, 0) | {"share": 0.0, "total_steps": length.total_steps}
    times = dict.fromkeys(slots, 1)

    def spent() -> float:
        return sum(costs[name] * n for name, n in times.items())

    def refine(names: list[str], limit: float = math.inf) -> None:
        """Make these more frequent while each costs at most `limit` and all together no more than the budget."""
        while names:
            name = min(names, key=lambda name: costs[name] * times[name] / shares[name])
            every = math.ceil(slots[name] / times[name]) - 1
            more = math.ceil(slots[name] / every) if every else 0
            extra = (more - times[name]) * costs[name]
            if not every or costs[name] * more > limit or extra and spent() + extra > budget:
                names = [other for other in names if other != name]
            else:
                times[name] = more

    for name, entry in MEASURES.items():
        if entry.first:
            refine([name], entry.share * budget)
    refine(["steps", *(name for name, entry in MEASURES.items() if not entry.first)])
    spacing = {name: math.ceil(slots[name] / n) for name, n in times.items()}
    spacing["steps"] *= options.measure_every
    return spacing | {"share": spent() / length.cost, "total_steps": length.total_steps}


def plan_split(options: MeasuringOptions, n_probe: int, length: RunLength) -> dict:
    """How many epochs apart the probe of `--measure split` is made so that it costs at most `--measure-budget` of the run:
    {"probe": epochs, "share": counted share}, as of `plan_full`; {} where not even one fits."""
    affordable = math.floor(options.measure_budget * length.cost / n_probe) if n_probe else 0
    if not affordable:
        return {}
    every = math.ceil(length.times / affordable)
    return {"probe": every, "share": math.ceil(length.times / every) * n_probe / length.cost}


def kept_plan(first: dict, now: dict) -> dict:
    """The plan of a resumed run: that of its first start, whose series so go on as they began when the run grows.

    `now` is the plan for the length it has now, and gives the spacing of what did not fit into the first one at all.
    """
    return {key: first.get(key) or value for key, value in now.items()}
