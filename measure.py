"""Measuring on a step: which forward, which rows and which random draws each measure takes. The formulas are in metrics.py.

A measure is a row, `Forward.row(labels, weights)`, and a formula on inner products of rows. A row is dropped as soon as
its products are taken, so that at most five gradients are held beside the training's own.

`--measure split` brings random masks along as its null: a raw cosine of the clean and the noisy gradient means little
without the cosine that a random split of the same batch into parts of the same sizes gives. One such mask costs one more
vector-Jacobian product (2F, F a forward of the batch; a plain step is 3F), so masks are taken on every `--null-every`-th
measured step only.

Shapes: B examples of the global batch, b of them on this process, K classes, P parameters, R masks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import data
import metrics
from context import Forward, MeasuringContext, MeasuringOptions, Row, batchnorm_mode, sum_rows
from data import Batch

# --------------------------------------------------------------------------------------------------- a measured step


def measure_batch(
    context: MeasuringContext, batch: Batch, step: int, forward: Forward, own: Row | None = None
) -> tuple[list[Row], dict]:
    """Rows and values of a measured step on `forward`: the split, its null, and the controls where they are due.

    `own` is a g that is not the sum of the rows of C and of N. The rows are those of `split_rows`; values by tag.
    """
    controls = controls_due(context, step)
    rows, values = measure_split(context, batch, step, forward, own, free=not controls)
    if controls:
        values |= control_values(context, batch, step, forward, rows, own)
    return rows, values


def measure_apart(context: MeasuringContext, batch: Batch, step: int, own: Row | None = None) -> dict:
    """Values of a measured step by a forward of its own, beside the step's: `--measure-bn` eval and separate."""
    context.seed_dropout(step)
    with batchnorm_mode(context.module, context.options.measure_bn):
        return measure_batch(context, batch, step, make_forward(context, batch), own)[1]


def make_forward(context: MeasuringContext, batch: Batch) -> Forward:
    """The forward that the measures of `--measure-bn` need: joint, or one of C and one of N."""
    separate = context.options.measure_bn == "separate" and 0 < batch.n_noisy < batch.size
    return Forward(context, batch.x, batch.size, [~batch.noisy, batch.noisy] if separate else None)


def is_due(every: int | None, at: int, last: int) -> bool:
    """Whether what is measured every `every`-th time, the last time at `last`, is due `at` this one."""
    return every is not None and every > 0 and (last - at) % every == 0


def controls_due(context: MeasuringContext, step: int) -> bool:
    """Whether this measured step brings the controls of `--measure full`."""
    every, plan = context.options.measure_every, context.state.plan
    if context.options.measure != "full":
        return False
    return is_due(plan.get("steps"), step, (plan.get("total_steps", context.total_steps) - 1) // every * every)


# --------------------------------------------------------------------------------------------------------- the split


def split_rows(
    context: MeasuringContext, batch: Batch, forward: Forward, free: bool = True, masks: Sequence[Tensor] = ()
) -> list[Row]:
    """Gradients of the loss of C and of N, each (1/B) sum over the set and the global batch, empty sets left out; after
    them those of `masks`, R more sets (b,) bool. With `free` they are the last rows of `forward`.

    All carry the loss scale, without which float16 would lose them.
    """
    sets = [s for s, size in ((~batch.noisy, batch.size - batch.n_noisy), (batch.noisy, batch.n_noisy)) if size]
    rows = forward.rows(batch.y, [*sets, *masks], free)
    if not masks:
        return sum_rows(context, rows)
    # Two collectives: the order in which one adds up the processes depends on its length, and masks leave no trace.
    return sum_rows(context, rows[: len(sets)]) + sum_rows(context, rows[len(sets) :])


def split_values(
    rows: list[Row], own: Row | None, batch: Batch, scale: Tensor | float, mask_rows: Sequence[Row] = ()
) -> dict:
    """`grad/*` from the rows of `split_rows`, and a g that is not their sum if there is one; all times `scale`. With the
    rows of random masks, and g the sum, `null/permuted_*` too."""
    f = 1 - batch.n_noisy / batch.size
    with_own = [*rows, own] if own is not None and len(rows) == 2 else rows
    G = metrics.gram([*with_own, *mask_rows]) / scale**2
    values = metrics.one_sided_measures(G[0, 0], batch.n_noisy)
    if len(rows) == 2:
        values = metrics.split_measures(metrics.set_means(G[: len(with_own), : len(with_own)], f))
    if mask_rows:
        values |= metrics.permuted_measures(G)
    return {"grad/clean_fraction": f, **values}


def measure_split(
    context: MeasuringContext, batch: Batch, step: int, forward: Forward, own: Row | None, free: bool
) -> tuple[list[Row], dict]:
    """The rows of `split_rows`, and `grad/*` with, where due, `null/permuted_*`.

    `own` is a g that is not the rows' sum, or None; `free` as in `split_rows`.
    """
    due = masks_due(context.options, step, batch)
    masks = draw_masks(context, batch, step) if due and forward.is_joint else []
    rows = split_rows(context, batch, forward, free, masks)
    rows, mask_rows = rows[: len(rows) - len(masks)], rows[len(rows) - len(masks) :]
    values = split_values(rows, own, batch, context.loss_scale(), mask_rows)
    if due and not forward.is_joint and own is not None:  # each mask takes two forwards of its own, and the host waits for the device
        values |= permuted_values(context, batch, step, forward, own)
    return rows, values


# ------------------------------------------------------------------------------------------------------ random masks


def masks_due(options: MeasuringOptions, step: int, batch: Batch) -> bool:
    """Whether this measured step of `--measure split` takes random masks. None are defined where C or N is empty."""
    if options.measure != "split" or not options.permutations or batch.n_noisy in (0, batch.size):
        return False
    return step // options.measure_every % options.null_every == 0


def draw_masks(context: MeasuringContext, batch: Batch, step: int) -> list[Tensor]:
    """R masks (b,) bool on the device, true for what stands in for the clean examples. The host does not wait.

    They come from CPU generators keyed by (seed, mask, step), the streams that `--measure full` uses too: its first
    masks of a step are these.
    """
    stratify, R = context.options.stratify, context.options.permutations
    streams = (data.generator(context.seed, f"permutation{r}", step) for r in range(R))
    stand_ins = torch.stack([~random_mask(batch, stratify, g) for g in streams])  # (R, B)
    here = stand_ins[:, batch.first : batch.first + len(batch.y)].contiguous()
    return list(data.copy_to(here, batch.y.device).unbind())


def random_mask(batch: Batch, stratify: bool, g: torch.Generator) -> Tensor:
    """A mask (B,) bool of as many examples as are noisy, drawn on the CPU; with `stratify`, as many of each given label."""
    if not stratify:
        order = torch.rand(batch.size, generator=g, dtype=torch.float64)
        return torch.zeros(batch.size, dtype=torch.bool).scatter(0, order.argsort()[: batch.n_noisy], True)
    order = torch.randperm(batch.size, generator=g)  # the mask's values change places among equal labels
    mixed, plain = order[batch.host_y[order].argsort(stable=True)], batch.host_y.argsort(stable=True)
    return torch.empty_like(batch.host_noisy).scatter(0, plain, batch.host_noisy[mixed])


def permuted_values(context: MeasuringContext, batch: Batch, step: int, forward: Forward, g: Row) -> dict:
    """`null/permuted_*`: mean and standard deviation of both cosines over R random masks of the noisy set's size."""
    options = context.options
    cosines: dict[str, list[float]] = {"null/permuted_cos_clean_all": [], "null/permuted_cos_clean_noisy": []}
    for r in range(options.permutations):
        mask = random_mask(batch, options.stratify, data.generator(context.seed, f"permutation{r}", step))
        mine = mask[batch.first : batch.first + len(batch.y)].to(batch.y.device)
        graph = forward if forward.is_joint else Forward(context, batch.x, batch.size, [~mine, mine])
        (s,) = sum_rows(context, [graph.row(batch.y, ~mine)])
        if graph is forward:  # the complement is what is left of g
            (ss, sg), (_, gg) = metrics.gram([s, g]).tolist()
            sq, qq = sg - ss, gg - 2 * sg + ss
        else:
            (q,) = sum_rows(context, [graph.row(batch.y, mine)])
            (ss, sq, sg), (_, qq, _), (_, _, gg) = metrics.gram([s, q, g]).tolist()
        cosines["null/permuted_cos_clean_all"].append(metrics.cosine_of_products(sg, ss, gg))
        cosines["null/permuted_cos_clean_noisy"].append(metrics.cosine_of_products(sq, ss, qq))
    values: dict[str, float] = {}
    for tag, values_of_masks in cosines.items():
        if values_of_masks:
            sample = torch.tensor(values_of_masks, dtype=torch.float64)
            values[tag] = float(sample.mean())
            if len(sample) > 1:
                values[f"{tag}_std"] = float(sample.std())
    return values


def split_share(options: MeasuringOptions) -> float:
    """Cost of `--measure split` with its masks as a share of the plain steps: 3F each, a product 2F; nothing is timed."""
    split = 2.0 + (options.measure_bn != "train")  # one more product, and a forward of its own in the other modes
    mask = 2.0 + (options.measure_bn == "separate")
    masks = mask * options.permutations / options.null_every if options.permutations else 0.0
    return (split + masks) / (3.0 * options.measure_every)


# ------------------------------------------------------------------------------------------- controls of `--measure full`


def control_values(
    context: MeasuringContext, batch: Batch, step: int, forward: Forward, rows: list[Row], own: Row | None
) -> dict:
    """`null/*`, `grad/difference*`, `grad/label_share`, `fresh/*`, `truth/*` of a batch with both sets, `corrected/*` and
    `noise_scale/*` at the end of a quarter of the run; waits for the device.

    `rows` are those of `split_rows` on `forward`, `own` a g that is not their sum. Nothing of this batch where a set is empty.
    """
    values: dict[str, float] = {}
    if len(rows) == 2:
        base = [*rows, metrics.add_rows(rows)]
        products = inner_products(context, *base)
        values |= chunk_values(context, batch, forward, products, own)
        with context.timed("permutations"):
            values |= permuted_values(context, batch, step, forward, own or base[2])
        if not context.fake_mask:  # under a fake mask all labels are true: there is no other label to compare with
            values |= relabelled_values(context, batch, step, forward, base, products)
    return values | quarter_values(context, step)


def inner_products(context: MeasuringContext, *rows: Row) -> list[list[float]]:
    """Inner products of rows that carry the loss scale, without it; here the host waits for the device."""
    return metrics.gram(list(rows)).div(float(context.loss_scale()) ** 2).tolist()


def summed_row(
    context: MeasuringContext, forward: Forward, labels: Tensor, weights: Tensor, true: Tensor | None = None
) -> Row:
    """`Forward.row`, summed over all processes."""
    return sum_rows(context, [forward.row(labels, weights, true=true)])[0]


def chunk_values(
    context: MeasuringContext, batch: Batch, forward: Forward, products: list[list[float]], own: Row | None
) -> dict:
    """What disjoint parts of the batch give: `null/cos_*`, `grad/difference*`, `grad/label_share`; adds to the window.

    `products` are the inner products of the rows of C, of N and of their sum, `own` a g that is not the sum.
    """
    state, B, values = context.state, batch.size, dict[str, float]()
    f = 1 - batch.n_noisy / B
    with context.timed("chunks"):
        moments, across = chunk_estimates(context, batch, forward, products)
        named = dict(zip(metrics.MOMENTS, moments, strict=True))
        g2 = inner_products(context, own)[0][0] if own is not None else products[2][2]
        values |= metrics.null_cosines(g2, named["var_a"], f, B)
        values |= metrics.difference_measures(named["cc"], named["nn"], across, named["var_a"], B)
        if all(map(math.isfinite, moments)):  # a set of one example has no variance
            state.window = [*state.window, moments][-context.options.window :]
    if not context.fake_mask and named["var_a"] > 0:
        with context.timed("label_share"):
            values["grad/label_share"] = label_variance(context, batch, forward) / named["var_a"]
    return values


def relabelled_values(
    context: MeasuringContext, batch: Batch, step: int, forward: Forward, base: list[Row], products: list[list[float]]
) -> dict:
    """`fresh/*` and `truth/*`: the same forward under other labels. `base` are the rows of C, of N and their sum, `products`
    their inner products."""
    values, f = dict[str, float](), 1 - batch.n_noisy / batch.size
    with context.timed("fresh"):
        labels = fresh_labels(context, batch, step)
        if labels is not None:
            h = summed_row(context, forward, labels, batch.noisy)
            (hh, hc), (_, cc) = inner_products(context, h, base[0])
            values["fresh/ratio"] = metrics.norm_ratio(hh, cc) * f / (1 - f)
            values["fresh/cos"] = metrics.cosine_of_products(hc, hh, cc)
            values["fresh/index"] = metrics.norm_ratio(hh, products[1][1])
            del h
    with context.timed("truth"):
        t = summed_row(context, forward, batch.true, torch.ones_like(batch.noisy))
        (tt, tg), (_, gg) = inner_products(context, t, base[2])
        values["truth/cos"] = metrics.cosine_of_products(tg, tt, gg)
        values["truth/shift"] = metrics.norm_ratio(gg - 2 * tg + tt, tt)
    return values


def batch_parts(context: MeasuringContext, batch: Batch) -> tuple[int, Tensor, Tensor]:
    """k disjoint parts of the batch, cut by position in the global batch: (k, part of each position (B,) on the host,
    that of this process's examples (b,) on the device)."""
    k = min(context.options.chunks, batch.size)
    position = torch.arange(batch.size) * k // batch.size
    return k, position, position[batch.first : batch.first + len(batch.y)].to(batch.y.device)


def chunk_estimates(
    context: MeasuringContext, batch: Batch, forward: Forward, products: list[list[float]]
) -> tuple[list[float], float]:
    """`metrics.MOMENTS` of this batch from the parts of C and of N, and <G_C, G_N> from pairs of examples in different parts
    alone; `products` are the inner products of the rows of C, of N and of their sum."""
    B, (k, position, here) = batch.size, batch_parts(context, batch)
    within = 0.0  # sum over the parts of <sum over C, sum over N>
    squares: dict[str, list[float]] = {"c": [], "n": [], "a": []}
    for part in range(k):
        pair = [summed_row(context, forward, batch.y, (here == part) & s) for s in (~batch.noisy, batch.noisy)]
        (cc, cn), (_, nn) = inner_products(context, *pair)
        within += cn
        for name, square in (("c", cc), ("n", nn), ("a", cc + 2 * cn + nn)):
            squares[name].append(square)
        del pair
    count = torch.bincount(position, minlength=k)
    noisy = torch.bincount(position[batch.host_noisy], minlength=k)
    sizes = {"c": (count - noisy).tolist(), "n": noisy.tolist(), "a": count.tolist()}
    pairs = batch.n_noisy * (B - batch.n_noisy) - int(noisy @ (count - noisy))
    sums = {"c": products[0][0], "n": products[1][1], "a": products[2][2]}
    estimate = {}
    for name in "cna":  # rows are (1/B) sums: B^2 makes them sums
        S = torch.tensor(squares[name], dtype=torch.float64) * B**2
        estimate[name] = metrics.chunk_moments(S, sizes[name], S.new_tensor(sums[name] * B**2))
    f = 1 - batch.n_noisy / B
    (cc, var_c), (nn, var_n), (sq_a, var_a) = ([float(v) for v in estimate[name]] for name in "cna")
    cn = products[0][1] / (f * (1 - f))
    ca, aa = f * cc + (1 - f) * cn, f * f * cc + 2 * f * (1 - f) * cn + (1 - f) ** 2 * nn
    across = (products[0][1] - within) * B**2 / pairs if pairs else math.nan
    return [cc, nn, cn, ca, aa, var_c, var_n, var_a, sq_a], across


def label_variance(context: MeasuringContext, batch: Batch, forward: Forward) -> float:
    """Trace of the within-batch variance of g_i(y_i) - g_i(y*_i), which is 0 for a clean example, from the batch's parts."""
    B, (k, position, here) = batch.size, batch_parts(context, batch)
    squares = torch.zeros(k, dtype=torch.float64)
    total: Row = []
    for part in position[batch.host_noisy].unique().tolist():  # the others have nothing to add
        row = summed_row(context, forward, batch.y, (here == part) & batch.noisy, batch.true)
        squares[part] = inner_products(context, row)[0][0]
        if total:
            torch._foreach_add_(total, row)
        else:
            total = [t.clone() for t in row]
        del row
    sizes = torch.bincount(position, minlength=k).tolist()
    square = squares.new_tensor(inner_products(context, total)[0][0])
    return float(metrics.chunk_moments(squares * B**2, sizes, square * B**2)[1])


# ------------------------------------------------------------------------------------------- estimates of a quarter


def ends_quarter(context: MeasuringContext, step: int) -> bool:
    """Whether the full measurement at `step` is the last in its quarter of the run, of the length planned at its first start."""
    plan = context.state.plan
    total = plan.get("total_steps", context.total_steps)
    return 4 * step // total < 4 * (step + plan["steps"]) // total


def quarter_values(context: MeasuringContext, step: int) -> dict:
    """`corrected/*` and `noise_scale/*` from the window's measurements, which it empties, at the end of a quarter; else {}.

    A quarter of fewer than three measurements is joined with the next one.
    """
    state, values = context.state, dict[str, float]()
    if not ends_quarter(context, step):
        return {}
    if len(state.window) >= metrics.LEAST_MEASUREMENTS:
        values, missing = metrics.corrected(state.window)
        state.not_resolved, state.window = state.not_resolved + missing, []
    return values | {"corrected/not_resolved": float(state.not_resolved)}


# ------------------------------------------------------------------------------------------------------ fresh labels


def fresh_labels(context: MeasuringContext, batch: Batch, step: int) -> Tensor | None:
    """Labels (b,) int64 with another wrong one for every noisy example, never trained on; None if there are but two
    classes. Drawn by the run's own law: the realised transition matrix of the true class, less its given label, or
    evenly where the law leaves nothing else (a class that is only ever mistaken for one other)."""
    K = len(context.transition)
    if K < 3:
        return None
    g = data.generator(context.noise_seed, "fresh", step)
    draws = torch.rand(batch.size, K, generator=g, dtype=torch.float64)  # of the global batch, on any rank
    draws = draws[batch.first : batch.first + len(batch.y)].to(batch.y.device)
    law = context.transition.to(batch.y.device)[batch.true]  # (b, K)
    at = torch.stack([batch.true, batch.y], 1)
    law = law.scatter(1, at, 0.0)
    evenly = torch.ones_like(law).scatter(1, at, 0.0)
    law = torch.where(law.sum(1, keepdim=True) > 0, law, evenly)
    drawn = (law.log() - (-draws.clamp_min(1e-300).log()).log()).argmax(1)  # Gumbel's trick: one draw from each row
    return torch.where(batch.noisy, drawn, batch.y)
