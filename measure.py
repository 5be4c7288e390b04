"""Measuring a run: which forwards, cotangents and random draws each measurement takes. The formulas are in metrics.py.

A measurement on a step is a row, `Forward.row(labels, weights)`, and a formula on inner products of rows. A row is
dropped as soon as its products are taken, so that at most five gradients are held beside the training's own.

Shapes: B examples of the global batch, b of them on this process, K classes, P parameters.
"""

import math
import time
from collections.abc import Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import metrics
from data import Batch
from engine.hardware import average_buffers, sum_over_ranks, synchronize

PROBE = 2000  # noisy and as many clean training examples
CURVATURE_EXAMPLES = 128
CURVATURE_PRODUCTS = 16  # at most, for the eigenvalue
PRODUCT_COST = 30.0  # F: 5 by arithmetic, but in full precision and through BatchNorm's second derivative (see docs/measurements.md)
CURVATURE_TOLERANCE = 1e-2  # relative residual of the eigenpair at which to stop
CURVATURE_RESOLVED = 0.3  # at which the eigenvalue, whose own error is far smaller, is still logged
TRACE_PROBES = 8
ISOTROPY_PARTS = 16  # fewer where the network is so large that they would take more than ISOTROPY_BYTES
ISOTROPY_EXAMPLES = 64  # of a part
ISOTROPY_BYTES = 2 << 30
EVAL_BATCH = 1000  # examples of a forward without gradients


# ------------------------------------------------------------------------------------------------------------ forwards


def forward(job, x: Tensor) -> Tensor:
    """Logits (b, K) of the bare module under the run's precision, in the default dtype."""
    with job.fabric.autocast():
        logits = job.module(x)
    return logits.to(torch.get_default_dtype())


def loss_scale(job) -> Tensor | float:
    """The factor that 16-mixed puts on every gradient, a tensor on the device; 1 in other precisions."""
    return job.scaler.scale(torch.ones((), device=job.fabric.device)) if job.scaler else 1.0


def seed_dropout(job, step: int) -> None:
    """Give dropout, which draws from the device's global generator, a mask that depends on seed, step and rank."""
    if job.dropout:
        torch.manual_seed(data.stream_seed(job.args.seed, f"dropout{job.fabric.global_rank}", step))


def synchronised(module: nn.Module) -> list[nn.SyncBatchNorm]:
    """Its BatchNorms that take their statistics over all processes."""
    return [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]


@contextmanager
def untouched(module: nn.Module):
    """Give running statistics back the values they had, in place: a captured graph knows them by their address."""
    before = [b.clone() for b in module.buffers()]
    try:
        yield
    finally:
        for b, old in zip(module.buffers(), before, strict=True):
            b.copy_(old)


@contextmanager
def batchnorm_mode(module: nn.Module, mode: str, alike: bool = False):
    """For a measurement's forward: `eval` mode, or training mode with running statistics left as they are.

    `alike`: all processes forward the same examples, so BatchNorm has nothing to synchronise; where it did, a second
    derivative could not be had. Gradients are to be taken within the context.
    """
    alone = synchronised(module) if alike else []
    module.train(mode != "eval")
    for m in alone:
        m.__class__ = nn.BatchNorm2d
    try:
        with untouched(module):
            yield
    finally:
        for m in alone:
            m.__class__ = nn.SyncBatchNorm
        module.train()


@contextmanager
def cut(modules):
    """Within the block, end the graph behind each of `modules` and begin another: (outputs, entries) of
    `metrics.pull_backs`, but for the logits. What needs no gradient is not cut."""
    outputs: list[Tensor] = []
    entries: list[Tensor] = []

    def begin(module, args, out: Tensor) -> Tensor:
        if not out.requires_grad:
            return out
        outputs.append(out)
        entries.append(out.detach().requires_grad_())
        return entries[-1]

    handles = [m.register_forward_hook(begin) for m in modules]
    try:
        yield outputs, entries
    finally:
        for handle in handles:
            handle.remove()


class Forward:
    """One forward of a batch, to be pulled back along any cotangent; of several parts, one forward of each.

    `parts` are masks (b,) bool that together cover the batch (`--measure-bn separate`); `exact`: without autocast.
    """

    def __init__(self, job, batch: Batch, parts: list[Tensor] | None = None, exact: bool = False) -> None:
        self.job, self.unit = job, loss_scale(job) / batch.size
        # Of each part its examples and its logits, detached; and (outputs, entries) of `metrics.pull_backs`.
        self.pieces, self.graphs = [], []
        indices = [None]
        if parts is not None:  # here the host waits for the device
            indices = [part.nonzero().squeeze(1) for part in parts]
        for index in indices:
            x = batch.x if index is None else batch.x[index]
            with cut(getattr(job.module, "cuts", ())) as (outputs, entries):
                logits = job.module(x) if exact else forward(job, x)
            self.pieces.append((index, logits.detach()))
            self.graphs.append(([*outputs, logits], entries))

    def rows(self, labels: Tensor, weights: list[Tensor], free: bool = False) -> list[list[Tensor]]:
        """For each w of `weights` (b,): (1/B) sum_i w_i dL_i/dtheta against `labels` (b,) over this process's examples,
        times `loss_scale`. With `free` they are the last ones of this forward, and take less memory."""
        found: list[list] = [[] for _ in weights]
        for (index, logits), graph in zip(self.pieces, self.graphs, strict=True):
            y, own = (labels, weights) if index is None else (labels[index], [w[index] for w in weights])
            some = range(len(own))
            if index is not None:  # alike on all processes, whose SyncBatchNorm meets in every pull-back
                used = sum_over_ranks(self.job.fabric, torch.stack([w.any() for w in own]).float()).tolist()
                some = [i for i in some if used[i]]
            U = [metrics.cotangent(logits, y, own[i].to(logits.dtype) * self.unit) for i in some]
            for i, row in zip(some, metrics.pull_backs(*graph, self.job.parameters, U, free), strict=True):
                found[i].append(row)
        return [metrics.add_rows(r) if r else [torch.zeros_like(p) for p in self.job.parameters] for r in found]

    def row(self, labels: Tensor, weights: Tensor, free: bool = False) -> list[Tensor]:
        """The row of one w (b,), as in `rows`."""
        return self.rows(labels, [weights], free)[0]

    def direct(self, U: Tensor) -> list[Tensor]:
        """The row of a cotangent U (b, K) given as it is (one forward only), times `loss_scale`; the last of it."""
        ((_, logits),), (graph,) = self.pieces, self.graphs
        return metrics.pull_backs(*graph, self.job.parameters, [U.to(logits.dtype) * self.unit], free=True)[0]


def over_ranks(job, rows: list[list[Tensor]]) -> list[list[Tensor]]:
    """Rows summed over all processes in one collective, whatever each held of the batch."""
    if job.fabric.world_size == 1:
        return rows
    flat = sum_over_ranks(job.fabric, torch.cat([part.reshape(-1) for row in rows for part in row]))
    parts = iter(flat.split([p.numel() for p in job.parameters] * len(rows)))
    return [[next(parts).view_as(p) for p in job.parameters] for _ in rows]


def whole_row(job, batch: Batch, exact: bool = False) -> tuple[list[Tensor], Tensor]:
    """The batch's mean loss gradient times `loss_scale`, and its logits (b, K) detached, by the bare network; with
    `exact` in full precision whatever the run's."""
    ahead = Forward(job, batch, exact=exact)
    row = over_ranks(job, [ahead.row(batch.y, torch.ones_like(batch.noisy), free=True)])[0]
    return row, ahead.pieces[0][1]


# --------------------------------------------------------------------------------------------------- the split, per step


def make_forward(job, batch: Batch) -> Forward:
    """The forward that the measurements of `--measure-bn` need: joint, or one of C and one of N."""
    separate = job.args.measure_bn == "separate" and 0 < batch.n_noisy < batch.size
    return Forward(job, batch, [~batch.noisy, batch.noisy] if separate else None)


def split_rows(
    job, batch: Batch, ahead: Forward, free: bool = True, masks: Sequence[Tensor] = ()
) -> list[list[Tensor]]:
    """Gradients of the loss of C and of N, each (1/B) sum over the set and the global batch, empty sets left out; after
    them those of `masks`, R more sets (b,) bool. With `free` they are the last rows of `ahead`.

    All carry the `loss_scale`, without which float16 would lose them.
    """
    sets = [s for s, size in ((~batch.noisy, batch.size - batch.n_noisy), (batch.noisy, batch.n_noisy)) if size]
    rows = ahead.rows(batch.y, [*sets, *masks], free)
    if not masks:
        return over_ranks(job, rows)
    # Two collectives: the order in which one adds up the processes depends on its length, and masks leave no trace.
    return over_ranks(job, rows[: len(sets)]) + over_ranks(job, rows[len(sets) :])


def split_values(
    rows: list[list[Tensor]],
    own: list[Tensor] | None,
    batch: Batch,
    scale: Tensor | float,
    of_masks: Sequence[list[Tensor]] = (),
) -> dict:
    """`grad/*` from the rows of `split_rows`, and a g that is not their sum if there is one; all times `scale`. With the
    rows of random masks, and g the sum, `null/permuted_*` too."""
    f = 1 - batch.n_noisy / batch.size
    known = [*rows, own] if own is not None and len(rows) == 2 else rows
    G = metrics.gram([*known, *of_masks]) / scale**2
    measured = metrics.one_sided_measures(G[0, 0], batch.n_noisy)
    if len(rows) == 2:
        measured = metrics.split_measures(metrics.set_means(G[: len(known), : len(known)], f))
    if of_masks:
        measured |= metrics.permuted_measures(G)
    return {"grad/clean_fraction": f, **measured}


# -------------------------------------------------------------------------------------------- nulls and controls, per step


def full_values(
    job, batch: Batch, step: int, ahead: Forward, rows: list[list[Tensor]], own: list[Tensor] | None
) -> dict:
    """`null/*`, `corrected/*`, `noise_scale/*`, `fresh/*`, `truth/*` of a batch with both sets; waits for the device.

    `rows` are those of `split_rows` on `ahead`, `own` a g that is not their sum. Empty where a set is.
    """
    if len(rows) < 2:
        return {}
    args, B = job.args, batch.size
    f = 1 - batch.n_noisy / B
    scale2 = float(loss_scale(job)) ** 2
    together = metrics.add_rows(rows)
    values, products = {}, lambda *wanted: metrics.gram(list(wanted)).div(scale2).tolist()

    def row(labels: Tensor, weights: Tensor, graph: Forward = ahead) -> list[Tensor]:
        return over_ranks(job, [graph.row(labels, weights)])[0]

    with timed(job, "chunks"):
        base = products(*rows, together)
        moments = chunk_estimates(job, batch, row, base, products)
        named = dict(zip(metrics.MOMENTS, moments, strict=True))
        g2 = products(own)[0][0] if own is not None else base[2][2]
        values |= metrics.null_cosines(g2, named["var_a"], f, B)
        window = job.state["window"] = [*job.state["window"], moments][-args.window :]
        found, missing = metrics.corrected(window)
        job.state["not_resolved"] += missing
        values |= found | {"corrected/not_resolved": float(job.state["not_resolved"])}

    with timed(job, "permutations"):
        values |= permuted(job, batch, step, ahead, own or together)

    if args.fake_mask is None:  # under a fake mask all labels are true: there is no other label to compare with
        with timed(job, "fresh"):
            labels = fresh_labels(job, batch, step)
            if labels is not None:
                h = row(labels, batch.noisy)
                (hh, hc), (_, cc) = products(h, rows[0])
                values["fresh/ratio"] = ratio(hh, cc) * f / (1 - f)
                values["fresh/cos"] = cosine(hc, hh, cc)
                values["fresh/index"] = ratio(hh, base[1][1])
        with timed(job, "truth"):
            t = row(batch.true, torch.ones_like(batch.noisy))
            (tt, tg), (_, gg) = products(t, together)
            values["truth/cos"] = cosine(tg, tt, gg)
            values["truth/shift"] = ratio(gg - 2 * tg + tt, tt)
    return values


def cosine(xy: float, xx: float, yy: float) -> float:
    """Cosine from inner products; NaN where it is undefined."""
    return xy / math.sqrt(xx * yy) if xx * yy > 0 else math.nan


def ratio(xx: float, yy: float) -> float:
    """|x| / |y| from squares; NaN where it is undefined."""
    return math.sqrt(xx / yy) if yy > 0 and xx >= 0 else math.nan


def chunk_estimates(job, batch: Batch, row, base: list[list[float]], products) -> list[float]:
    """`metrics.MOMENTS` of this batch from k disjoint parts of C and of N, cut by position in the global batch."""
    B, k = batch.size, min(job.args.chunks, batch.size)
    position = torch.arange(B) * k // B  # (B,) part of each position, on the host
    here = position[batch.first : batch.first + len(batch.y)].to(batch.y.device)
    squares = {"c": [], "n": [], "a": []}
    for part in range(k):
        pair = [row(batch.y, (here == part) & s) for s in (~batch.noisy, batch.noisy)]
        (cc, cn), (_, nn) = products(*pair)
        for name, square in (("c", cc), ("n", nn), ("a", cc + 2 * cn + nn)):
            squares[name].append(square)
        del pair
    count = torch.bincount(position, minlength=k)
    noisy = torch.bincount(position[batch.host_noisy], minlength=k)
    sizes = {"c": (count - noisy).tolist(), "n": noisy.tolist(), "a": count.tolist()}
    sums = {"c": base[0][0], "n": base[1][1], "a": base[2][2]}
    estimate = {}
    for name in "cna":  # rows are (1/B) sums: B^2 makes them sums
        S = torch.tensor(squares[name], dtype=torch.float64) * B**2
        estimate[name] = metrics.chunk_moments(S, sizes[name], S.new_tensor(sums[name] * B**2))
    f = 1 - batch.n_noisy / B
    (cc, var_c), (nn, var_n), (sq_a, var_a) = ([float(v) for v in estimate[name]] for name in "cna")
    cn = base[0][1] / (f * (1 - f))
    ca, aa = f * cc + (1 - f) * cn, f * f * cc + 2 * f * (1 - f) * cn + (1 - f) ** 2 * nn
    return [cc, nn, cn, ca, aa, var_c, var_n, var_a, sq_a]


def permuted(job, batch: Batch, step: int, ahead: Forward, g: list[Tensor]) -> dict:
    """`null/permuted_*`: mean and standard deviation of both cosines over R random masks of the noisy set's size."""
    args = job.args
    found = {"null/permuted_cos_clean_all": [], "null/permuted_cos_clean_noisy": []}
    for r in range(args.permutations):
        mask = random_mask(batch, args.stratify, data.generator(args.seed, f"permutation{r}", step))
        mine = mask[batch.first : batch.first + len(batch.y)].to(batch.y.device)
        graph = Forward(job, batch, [~mine, mine]) if len(ahead.pieces) > 1 else ahead
        (s,) = over_ranks(job, [graph.row(batch.y, ~mine)])
        if graph is ahead:  # the complement is what is left of g
            (ss, sg), (_, gg) = metrics.gram([s, g]).tolist()
            sq, qq = sg - ss, gg - 2 * sg + ss
        else:
            (q,) = over_ranks(job, [graph.row(batch.y, mine)])
            (ss, sq, sg), (_, qq, _), (_, _, gg) = metrics.gram([s, q, g]).tolist()
        found["null/permuted_cos_clean_all"].append(cosine(sg, ss, gg))
        found["null/permuted_cos_clean_noisy"].append(cosine(sq, ss, qq))
    values = {}
    for tag, cosines in found.items():
        if cosines:
            sample = torch.tensor(cosines, dtype=torch.float64)
            values |= {tag: float(sample.mean()), f"{tag}_std": float(sample.std()) if len(cosines) > 1 else math.nan}
    return values


def random_mask(batch: Batch, stratify: bool, g: torch.Generator) -> Tensor:
    """A mask (B,) bool of as many examples as are noisy, drawn on the CPU; with `stratify`, as many of each given label."""
    if not stratify:
        order = torch.rand(batch.size, generator=g, dtype=torch.float64)
        return torch.zeros(batch.size, dtype=torch.bool).scatter(0, order.argsort()[: batch.n_noisy], True)
    order = torch.randperm(batch.size, generator=g)  # the mask's values change places among equal labels
    mixed, plain = order[batch.host_y[order].argsort(stable=True)], batch.host_y.argsort(stable=True)
    return torch.empty_like(batch.host_noisy).scatter(0, plain, batch.host_noisy[mixed])


def fresh_labels(job, batch: Batch, step: int) -> Tensor | None:
    """Labels (b,) int64 with another wrong one for every noisy example, never trained on; None if there are but two
    classes. Drawn by the run's own law: the realised transition matrix of the true class, less its given label, or
    evenly where the law leaves nothing else (a class that is only ever mistaken for one other)."""
    K = len(job.transition)
    if K < 3:
        return None
    g = data.generator(job.args.noise_seed, "fresh", step)
    draws = torch.rand(batch.size, K, generator=g, dtype=torch.float64)  # of the global batch, on any rank
    draws = draws[batch.first : batch.first + len(batch.y)].to(batch.y.device)
    law = job.transition.to(batch.y.device)[batch.true]  # (b, K)
    at = torch.stack([batch.true, batch.y], 1)
    law = law.scatter(1, at, 0.0)
    evenly = torch.ones_like(law).scatter(1, at, 0.0)
    law = torch.where(law.sum(1, keepdim=True) > 0, law, evenly)
    drawn = (law.log() - (-draws.clamp_min(1e-300).log()).log()).argmax(1)  # Gumbel's trick: one draw from each row
    return torch.where(batch.noisy, drawn, batch.y)


# --------------------------------------------------------------------------------------------------------- after an epoch


def eval_batches(job, index: Tensor):
    """(logits (m, K), positions (m,)) over this process's share of training examples `index`, eval mode, not augmented."""
    a, b = data.shard(len(index), job.fabric.global_rank, job.fabric.world_size)
    for i in range(a, b, EVAL_BATCH):
        at = torch.arange(i, min(i + EVAL_BATCH, b))
        yield forward(job, job.train.images.plain(index[at])), at


def probe_indices(job) -> tuple[Tensor, Tensor]:
    """Fixed training examples, noisy (n1,) and clean (n2,), PROBE of each or fewer where there are fewer."""
    found = []
    for name, mask in (("noisy", job.train.noisy), ("clean", ~job.train.noisy)):
        where = mask.nonzero().squeeze(1)
        order = torch.randperm(len(where), generator=data.generator(job.args.noise_seed, f"probe-{name}"))
        found.append(where[order[:PROBE]].sort().values)
    return found[0], found[1]


@torch.no_grad()
def probe(job) -> dict:
    """`probe/*`: what the network says of the probe set (eval mode, no augmentation); waits for the device.

    Of the noisy examples: shares predicted as their given label (memorized), their true one (recovered), another; of
    the clean ones: accuracy; AUC with which the loss against the given label tells noisy from clean (Arazo et al. 2019
    separate them by it).
    """
    average_buffers(job.fabric, job.module)
    noisy, clean = probe_indices(job)
    index = torch.cat([noisy, clean])
    y, true, device = job.train.labels[index], job.train.true[index], job.fabric.device
    sheet = torch.zeros(2, len(index), dtype=torch.float64, device=device)  # predicted class, loss
    job.module.eval()
    for logits, at in eval_batches(job, index):
        sheet[0, at] = logits.argmax(1).double()
        sheet[1, at] = F.cross_entropy(logits, y[at].to(device), reduction="none").double()
    job.module.train()
    said, loss = sum_over_ranks(job.fabric, sheet).cpu()
    n, values = len(noisy), {}
    if n:
        memorized, recovered = said[:n] == y[:n], said[:n] == true[:n]
        values["probe/memorized"] = float(memorized.double().mean())
        values["probe/recovered"] = float(recovered.double().mean())
        values["probe/other"] = float((~memorized & ~recovered).double().mean())
        values["probe/auc"] = metrics.auc(loss[:n], loss[n:])
    if len(clean):
        values["probe/clean_acc"] = float((said[n:] == y[n:]).double().mean())
    return values


def isotropy(job) -> dict:
    """`isotropy/*`: participation ratio of m label-noise gradients, each of as many noisy training examples.

    Part k's gradient is pulled back from U_i = (onehot(y*_i) - onehot(y_i)) / |part|, directly the part's g - g(y*).
    Empty with too few noisy examples. Every process computes the same.
    """
    noisy, _ = probe_indices(job)
    P = sum(p.numel() for p in job.parameters)
    m = min(isotropy_parts(P), len(noisy) // 4)
    if m < 3 or job.args.fake_mask is not None:
        return {}
    size, rows, K = min(ISOTROPY_EXAMPLES, len(noisy) // m), [], len(job.transition)
    mixed = noisy[torch.randperm(len(noisy), generator=data.generator(job.args.noise_seed, "isotropy"))]
    dropout = [d for d in job.module.modules() if isinstance(d, nn.Dropout)]
    with batchnorm_mode(job.module, job.args.measure_bn, alike=True):
        for d in dropout:
            d.eval()
        for part in mixed[: m * size].view(m, size):
            x = job.train.images.plain(part)
            onehot = [F.one_hot(t[part].to(x.device), K) for t in (job.train.true, job.train.labels)]
            none = part.new_zeros(0)
            batch = Batch(x, none, none, none, size, size, 0, none, none)
            rows.append(Forward(job, batch).direct(onehot[0] - onehot[1]))
    G = metrics.gram(rows)
    return {
        "isotropy/participation": float(metrics.participation(G)),
        "isotropy/isotropic": metrics.isotropic_participation(m, P),
    }


def isotropy_parts(P: int) -> int:
    """Parts m whose rows of `P` float32 parameters fit ISOTROPY_BYTES together; at least 3, for anything to compare."""
    return max(3, min(ISOTROPY_PARTS, ISOTROPY_BYTES // (4 * P)))


def curvature(job) -> dict:
    """`curvature/*` of the loss (without weight decay) on a fixed batch of unaugmented training examples.

    Always in full precision: autocast would leave little of a second derivative. Every process computes the same.
    """
    g = data.generator(job.args.seed, "curvature")
    index = torch.randperm(len(job.train), generator=g)[:CURVATURE_EXAMPLES]
    sizes = [p.numel() for p in job.parameters]
    dropout = [d for d in job.module.modules() if isinstance(d, nn.Dropout)]

    def vectors(sign: bool) -> Tensor:
        v = torch.randn(sum(sizes), generator=g, dtype=torch.float32).to(job.fabric.device, torch.get_default_dtype())
        return v.sign() if sign else v

    with (
        batchnorm_mode(job.module, job.args.measure_bn, alike=True),
        torch.autocast(job.fabric.device.type, enabled=False),
    ):
        for d in dropout:
            d.eval()
        logits = job.module(job.train.images.plain(index))
        loss = F.cross_entropy(logits, job.train.labels[index].to(logits.device))
        gradient = torch.autograd.grad(loss, job.parameters, create_graph=True)

        def product(v: Tensor) -> Tensor:  # H v, both (P,)
            parts = [part.view_as(p) for part, p in zip(v.split(sizes), job.parameters, strict=True)]
            Hv = torch.autograd.grad(gradient, job.parameters, parts, retain_graph=True, materialize_grads=True)
            return torch.cat([part.reshape(-1) for part in Hv])

        top, residual, _ = metrics.lanczos(product, vectors(False), CURVATURE_TOLERANCE, CURVATURE_PRODUCTS)
        trace, error = metrics.hutchinson(product, [vectors(True) for _ in range(TRACE_PROBES)])
    lr = job.optimizer.param_groups[0]["lr"]
    return {
        "curvature/top": top if residual < CURVATURE_RESOLVED else math.nan,  # not resolved: left out
        "curvature/top_residual": residual,
        "curvature/trace": float(trace),
        "curvature/trace_error": float(error),
        "curvature/two_over_lr": 2 / lr if lr > 0 else math.nan,
    }


# ------------------------------------------------------------------------------------------------------------ what it costs


@contextmanager
def timed(job, family: str):
    """Add the seconds that the block takes, on the device too, to the family's account."""
    synchronize(job.fabric.device)
    began = time.perf_counter()
    yield
    synchronize(job.fabric.device)
    account = job.state["measure_seconds"]
    account[family] = account.get(family, 0.0) + time.perf_counter() - began


def counted_costs(args, P: int, n_probe: int) -> dict[str, float]:
    """Cost of one measurement of each family beyond the split, in forwards of one example (F = 1, a product 2F)."""
    rows = 2 * args.chunks + args.permutations + 2
    separate = (
        2 * args.permutations if args.measure_bn == "separate" else 0
    )  # two forwards of half a batch, one more row
    own_forward = 0 if args.measure_bn == "train" else 1
    products = CURVATURE_PRODUCTS + TRACE_PROBES
    return {
        "steps": args.bs * (2.0 * rows + separate * 1.5 + own_forward),
        "probe": float(n_probe),
        "isotropy": 3.0 * isotropy_parts(P) * ISOTROPY_EXAMPLES,
        "curvature": CURVATURE_EXAMPLES * (3.0 + PRODUCT_COST * products),
    }


def schedule_full(
    args, P: int, n_probe: int, total_steps: int, steps_per_epoch: int, n_train: int, n_eval: int
) -> dict:
    """How far apart the full measurements stand so that they cost at most `--measure-budget` of the run.

    Everything is counted, nothing timed, so it is the same in every run: 3F an example trained on, F an example
    evaluated. The probe comes first, after every epoch unless that took over 65 % of the budget; of what is left 60 %
    goes to measured steps, 15 % to isotropy, 25 % to curvature. Returns {family: spacing} in steps for "steps", in
    epochs for the others; 0 where not even one measurement fits. "share" is the counted share of the run's cost.
    Measurements are counted back from the end of the run (`due`): the one that fits is not of the untrained network.
    "total_steps" is that end, from which a run that has grown since goes on counting (`kept_plan`).
    """
    epochs = total_steps / steps_per_epoch
    run = 3.0 * epochs * n_train + (math.ceil(epochs) + 1) * n_eval
    costs, left = counted_costs(args, P, n_probe), args.measure_budget * run
    spacing, spent = {}, 0.0

    def place(family: str, money: float, slots: float, unit: int = 1) -> float:
        affordable = math.floor(money / costs[family]) if costs[family] else slots
        every = unit * max(1, math.ceil(slots / unit / affordable)) if affordable else 0
        spacing[family] = every
        return math.ceil(slots / every) * costs[family] if every else 0.0

    spent += place("probe", 0.65 * left, math.ceil(epochs) + 1)
    left -= spent
    spent += place("steps", 0.60 * left, total_steps, args.measure_every)
    spent += place("isotropy", 0.15 * left, math.ceil(epochs) + 1)
    spent += place("curvature", 0.25 * left, math.ceil(epochs) + 1)
    return spacing | {"share": spent / run, "total_steps": total_steps}


def kept_plan(first: dict, now: dict) -> dict:
    """The plan of a resumed run: that of its first start, whose series so go on as they began when the run grows.

    `now` is the plan for the length it has now, and gives the spacing of what did not fit into the first one at all.
    """
    return {key: first.get(key) or value for key, value in now.items()}


def schedule_probe(args, n_probe: int, total_steps: int, steps_per_epoch: int, n_train: int, n_eval: int) -> dict:
    """How many epochs apart the probe of `--measure split` is made so that it costs at most `--measure-budget` of the run:
    {"probe": epochs, "share": counted share}, as of `schedule_full`; {} where not even one fits."""
    epochs = total_steps / steps_per_epoch
    slots = math.ceil(epochs) + 1
    run = 3.0 * epochs * n_train + slots * n_eval
    affordable = math.floor(args.measure_budget * run / n_probe) if n_probe else 0
    if not affordable:
        return {}
    every = math.ceil(slots / affordable)
    return {"probe": every, "share": math.ceil(slots / every) * n_probe / run}


def due(every: int | None, at: int, last: int) -> bool:
    """Whether a measurement made every `every`-th time, the last time at `last`, is due `at` this one."""
    return bool(every) and (last - at) % every == 0


def controls_due(job, step: int) -> bool:
    """Whether this measured step is to bring the controls of `--measure full`."""
    every = job.args.measure_every
    plan = job.state["plan"]
    return due(plan.get("steps"), step, (plan.get("total_steps", job.total_steps) - 1) // every * every)


def after_epoch(job, epoch: int) -> dict:
    """The epoch-wise families that are due when `epoch` epochs are done (0: before training)."""
    values, plan = {}, job.state["plan"]
    last = math.ceil(plan.get("total_steps", job.total_steps) / job.steps_per_epoch)
    for family, act in (("probe", probe), ("isotropy", isotropy), ("curvature", curvature)):
        if due(plan.get(family), epoch, last):
            with timed(job, family):
                values |= act(job)
    if values.get("probe/memorized", 0) >= 0.5 and job.state["half_memorized_step"] is None:
        job.state["half_memorized_step"] = job.state["step"]
        values["probe/half_memorized_step"] = float(job.state["step"])
    return values
