"""What the clean and the noisy part of a batch do to the gradient, in any training loop: `Meter`, and the formulas under it.

    from gradsplit import Meter
    meter = Meter(model)
    values = meter.step(x, y, noisy)      # instead of loss.backward(); {"grad/cos_clean_noisy": ..., "null/...": ...}

This one file needs torch and the standard library alone: install it or copy it. What it measures and how to read it is in
docs/meter.md and docs/measurements.md of its repository.

Every gradient is the same forward pulled back along another cotangent at the network's output; every norm and cosine comes
from the Gram matrix of such gradients. Letters: B examples of the global batch, b of them on this process, K classes,
P parameters, V gradients ("rows"), R random masks; C and N the clean and the noisy examples, f = |C| / B.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row = list[Tensor]  # one gradient, shaped as the parameters
Loss = Callable[[Tensor, Tensor], Tensor]  # (output (b, ...), labels (b, ...)) -> (b,), each example's own

# Parameters taken to float64 at a time: on a GPU few large pieces (V x 32 MiB), on a CPU pieces that stay in its cache.
CHUNK, CPU_CHUNK = 1 << 22, 1 << 16
SLICE = 1 << 12  # of a large piece, by which a GPU shares it out among its processors
IGNORED = -100  # a label that is left out: the default of torch's cross-entropy


# ---------------------------------------------------------------------------------------------------- random streams


def stream_seed(seed: int, stream: str, index: int = 0) -> int:
    """A 32-bit seed for (seed, stream, index). 32 bits because torch's CPU generator uses no more of a seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()[:4], "little")


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """A CPU generator of its own for one purpose.

    `stream` names the purpose ("noise", "split", "subset", "init", "order", "augment", ...), `index` is the epoch or
    step it is for. Keyed this way no draw shifts another, none depends on the device or on the number of processes,
    and a resumed run needs no generator state.
    """
    return torch.Generator().manual_seed(stream_seed(seed, stream, index))


def copy_to(t: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, copied from pinned memory, so that the host does not wait for a GPU."""
    return (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------- cotangents


def cotangent(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """d/dlogits of sum_i weights_i * cross-entropy_i: U (B, K) with U_i = w_i (softmax(z_i) - onehot(label_i)).

    `logits` (B, K) float, `labels` (B,) int64, `weights` (B,) float of the logits' dtype. Detached.
    """
    U = logits.detach().softmax(1)
    U.scatter_add_(1, labels[:, None], torch.full_like(U[:, :1], -1.0))
    return U.mul_(weights[:, None])


def label_cotangent(logits: Tensor, given: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    """d/dlogits of sum_i weights_i * (cross-entropy_i against `given` - against `true`), the label-noise part of the loss:
    U (B, K) with U_i = w_i (onehot(true_i) - onehot(given_i)), exactly 0 for a clean example.

    `logits` (B, K) give shape, dtype and device alone; `given`, `true` (B,) int64, `weights` (B,) float. Detached.
    """
    U = torch.zeros_like(logits)
    one = torch.ones_like(U[:, :1])
    return U.scatter_add_(1, true[:, None], one).scatter_add_(1, given[:, None], -one).mul_(weights[:, None])


def example_losses(loss: Loss | None, output: Tensor, labels: Tensor) -> Tensor:
    """Each example's loss (b,). Without `loss`: cross-entropy of `output` (b, K) against `labels` (b,) int64, and of (b, T, K)
    against (b, T) the mean over those of the T positions whose label is not `IGNORED`.

    Raises ValueError where that fits neither, where classes may stand in either dimension of the output, or where `loss`
    returns anything but one value for each example.
    """
    if loss is None:
        if labels.dtype != torch.int64 or labels.dim() < 1 or output.shape[:-1] != labels.shape:
            raise ValueError(
                f"no loss is known for an output of shape {tuple(output.shape)} and labels of shape {tuple(labels.shape)} and "
                f"{labels.dtype}: give loss=, a function (output, labels) -> one value for each example, (B,)"
            )
        if labels.dim() > 1 and output.shape[:1] + output.shape[2:] == labels.shape:
            raise ValueError(
                f"an output of shape {tuple(output.shape)} may have its classes in the second or in the last dimension: give "
                "loss=, a function (output, labels) -> one value for each example, (B,)"
            )
        each = F.cross_entropy(output.reshape(-1, output.shape[-1]), labels.reshape(-1), reduction="none")
        if labels.dim() == 1:
            return each
        counted = (labels != IGNORED).flatten(1).sum(1).clamp_min(1)
        return each.view(len(labels), -1).sum(1) / counted
    each = loss(output, labels)
    if not isinstance(each, Tensor) or each.shape != labels.shape[:1]:
        kind = f"shape {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
        raise ValueError(
            f"loss= returned {kind}; it must return one value for each example, ({len(labels)},): "
            'reduction="none", and a sum or mean over the other dimensions'
        )
    return each


def loss_cotangents(loss: Loss | None, output: Tensor, labels: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """d/doutput of sum_i w_i loss_i for each w (b,) of `weights`, shaped as `output` (b, ...), of any `loss` of
    `example_losses`: by its own `gradient` (output, labels) -> (b, ...) if it has one, else by differentiating it at the
    output alone. Raises ValueError as that does."""
    closed_form = getattr(loss, "gradient", None)
    if closed_form is not None:
        U = closed_form(output.detach(), labels)
        return [U * w.to(U.dtype).view(-1, *[1] * (U.dim() - 1)) for w in weights]
    z = output.detach().requires_grad_()
    with torch.enable_grad():
        each = example_losses(loss, z, labels)
    if not each.requires_grad:
        raise ValueError(
            "loss= returned values that do not depend on the network's output: was the output detached in it?"
        )
    return [torch.autograd.grad(each, z, w.to(each.dtype), retain_graph=True)[0] for w in weights]


def output_cotangents(
    loss: Loss | None, output: Tensor, labels: Tensor, weights: list[Tensor], true: Tensor | None = None
) -> list[Tensor]:
    """Cotangents at the output of the weighted losses against `labels`, with `true` less those against these; in closed form
    for the cross-entropy of logits (b, K). Arguments as of `loss_cotangents`."""
    if loss is None and output.dim() == 2 and labels.dim() == 1 and labels.dtype == torch.int64:
        if true is None:
            return [cotangent(output, labels, w) for w in weights]
        return [label_cotangent(output, labels, true, w) for w in weights]
    given = loss_cotangents(loss, output, labels, weights)
    if true is None:
        return given
    return [a - b for a, b in zip(given, loss_cotangents(loss, output, true, weights), strict=True)]


# -------------------------------------------------------------------------------------------------------------- rows


def pull_backs(
    outputs: list[Tensor],
    entries: list[Tensor],
    parameters: list[Tensor],
    cotangents: list[Tensor],
    free: bool = False,
    around: Callable[[int], AbstractContextManager] = lambda part: nullcontext(),
) -> list[list[Tensor | None]]:
    """The gradient U^T dz/dtheta for each cotangent U (B, K): rows, lists of tensors shaped as `parameters` (2F each).

    The forward may be cut into parts that follow each other: `outputs` are what each puts out, the logits z (B, K) last,
    and `entries` what the second and later ones began with, leaves of the same values as the outputs before them.
    With `free` the graphs go with it, those of a later part before an earlier one needs room for its own gradients, so
    that memory peaks close to where one backward does; whole pull-backs in turn would hold all that the forward saved
    until the last of them. The arithmetic is the same, to the bit. A parameter that z does not depend on gets None.
    `around` gives the context of each product through a part.
    """
    rows: list[list[Tensor | None]] = [[None] * len(parameters) for _ in cotangents]
    above = list(cotangents)  # of each row, the gradient of what the part at hand puts out
    for k in reversed(range(len(outputs))):
        wanted = [*parameters, *entries[k - 1 : k]] if k else parameters
        for r, row in enumerate(rows):
            keep = not free or r < len(rows) - 1
            with around(k):
                gradients = torch.autograd.grad(outputs[k], wanted, above[r], retain_graph=keep, allow_unused=True)
            above[r] = gradients[-1]
            for i, part in enumerate(gradients[: len(parameters)]):
                if part is not None:
                    before = row[i]
                    row[i] = part if before is None else before + part
    return rows


def gram(rows: list[list[Tensor]]) -> Tensor:
    """Inner products (V, V) float64 of V gradients, each a list of tensors. Summed in float64, bucket by bucket."""
    on_cpu = rows[0][0].device.type == "cpu"
    G = rows[0][0].new_zeros(len(rows), len(rows), dtype=torch.float64)
    for bucket in buckets(rows, CPU_CHUNK if on_cpu else CHUNK):
        M = torch.cat([piece for pieces in bucket for piece in pieces]).view(len(rows), -1).double()  # (V, <= chunk)
        G += M @ M.T if on_cpu else sliced_products(M)
    return G


def buckets(rows: list[list[Tensor]], size: int) -> Iterator[list[list[Tensor]]]:
    """V gradients cut alike into buckets of `size` entries each (the last holds fewer): of every gradient the 1-d pieces that
    follow each other there, however many tensors they are of. One bucket takes a handful of launches, as one tensor would.
    """
    bucket: list[list[Tensor]] = [[] for _ in rows]
    room = size
    for parts in zip(*rows, strict=True):  # one parameter's part of every row
        same = list(parts)
        if all(part.is_contiguous(memory_format=torch.channels_last) for part in same if part.dim() == 4):
            same = [part.permute(0, 2, 3, 1) if part.dim() == 4 else part for part in same]  # as they lie in memory
        flat = [as_real(part).reshape(-1) for part in same]
        while flat[0].numel():
            for pieces, part in zip(bucket, flat, strict=True):
                pieces.append(part[:room])
            flat = [part[room:] for part in flat]
            room -= bucket[0][-1].numel()
            if not room:
                yield bucket
                bucket, room = [[] for _ in rows], size
    if bucket[0]:
        yield bucket


def sliced_products(M: Tensor) -> Tensor:
    """M M^T (V, V) of a few long rows M (V, L) as one small product for each SLICE, added up; one product of all would keep
    a single processor of a GPU busy along the whole length."""
    parts = F.pad(M, (0, -M.shape[1] % SLICE)).view(len(M), -1, SLICE).transpose(0, 1)
    return torch.bmm(parts, parts.mT).sum(0)


def as_real(t: Tensor) -> Tensor:
    """A complex tensor (...) as its real and imaginary parts (..., 2), whose inner products are those of its gradients."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def add_rows(rows: list[list[Tensor]]) -> list[Tensor]:
    """The sum of the gradients, as a list of tensors: clean + noisy is the training gradient."""
    total = rows[0]
    for row in rows[1:]:
        total = torch._foreach_add(total, row)
    return list(total)


def set_grads(parameters: list[nn.Parameter], row: Sequence[Tensor | None], add: bool = False) -> None:
    """Put a gradient into `.grad`, laid out like its weight (fused SGD walks both in memory order); with `add`, onto what is
    there. As by a backward, nothing happens where it is None, and hooks on a parameter's gradient are called."""
    for p, g in zip(parameters, row, strict=True):
        if g is None:
            continue
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            torch.autograd.backward(p, g)
        elif add and p.grad is not None:
            p.grad += g
        else:
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)


def get_grads(parameters: list[nn.Parameter]) -> Row:
    """What lies in `.grad`, zeros where that is nothing."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


@contextmanager
def without_hooks(parameters: list[nn.Parameter]):
    """Within the block no hook on a parameter's gradient is called: it would be, for each part of the gradient."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for own, _ in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, kept in hooks:
            own.update(kept)


# ---------------------------------------------------------------------------------------------------------- formulas


def gram_cosine(G: Tensor, i: int, j: int) -> Tensor:
    """cos of rows i and j from their Gram matrix; NaN where a row is zero."""
    return G[i, j] / (G[i, i].sqrt() * G[j, j].sqrt())


def cosine_of_products(xy: float, xx: float, yy: float) -> float:
    """Cosine of x and y from their inner products; NaN where it is undefined."""
    return xy / math.sqrt(xx * yy) if xx * yy > 0 else math.nan


def norm_ratio(xx: float, yy: float) -> float:
    """|x| / |y| from squares; NaN where it is undefined."""
    return math.sqrt(xx / yy) if yy > 0 and xx >= 0 else math.nan


def set_means(G: Tensor, f: float) -> Tensor:
    """Gram matrix (3, 3) of (g_C, g_N, g), g_C and g_N the mean gradients over C and N.

    `G` is that of ((1/B) sum over C, (1/B) sum over N), (2, 2), and then g is their sum (docs/measurements.md:
    g = f g_C + (1 - f) g_N); or it is (3, 3) with another g as the third row, taken as it is.
    """
    A = G.new_zeros(3, len(G))  # filled where it lies: a copy from the host would wait for a GPU
    A[0, 0], A[1, 1] = 1 / f, 1 / (1 - f)
    A[2, 2 if len(G) == 3 else slice(2)] = 1
    return A @ G @ A.T


def split_measures(G: Tensor) -> dict[str, Tensor]:
    """`grad/*` of the split from the Gram matrix (3, 3) of (g_C, g_N, g), both C and N not empty.

    `grad/cos_clean_all` = cos(g_C, g) is the report's (section 4.2, figures 7-9 and 16).
    """
    return {
        "grad/cos_clean_all": gram_cosine(G, 0, 2),
        "grad/cos_clean_noisy": gram_cosine(G, 0, 1),
        "grad/norm_clean": G[0, 0].sqrt(),
        "grad/norm_noisy": G[1, 1].sqrt(),
        "grad/norm_all": G[2, 2].sqrt(),
    }


def permuted_measures(G: Tensor) -> dict[str, Tensor]:
    """`null/permuted_*` of R random masks, 0-d, from the Gram matrix (2 + R, 2 + R) of the rows of C, of N (g is their sum)
    and of the R sets that stand in for C: mean and, of two or more, standard deviation of both cosines. Nothing is read."""
    s = G[2:]  # (R, 2 + R); the stand-in's complement is g - s
    gg, sg, ss = G[:2, :2].sum(), s[:, :2].sum(1), G.diagonal()[2:]
    sq, qq = sg - ss, gg - 2 * sg + ss
    values = {}
    for name, cosines in (("all", sg / (ss * gg).sqrt()), ("noisy", sq / (ss * qq).sqrt())):
        values[f"null/permuted_cos_clean_{name}"] = cosines.mean()
        if len(cosines) > 1:
            values[f"null/permuted_cos_clean_{name}_std"] = cosines.std()
    return values


def one_sided_measures(square: Tensor, n_noisy: int) -> dict[str, Tensor]:
    """`grad/norm_*` of a batch all clean or all noisy, from |g|^2. Cosines are undefined there and left out."""
    norm = square.sqrt()
    return {"grad/norm_noisy" if n_noisy else "grad/norm_clean": norm, "grad/norm_all": norm}


# ------------------------------------------------------------------------------------------- estimates from disjoint parts


def chunk_moments(squares: Tensor, sizes: list[int], square_of_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased (|G|^2, s^2) of a set from k disjoint parts: squared true gradient, trace of the per-example variance.

    `squares` (k,) are |S_i|^2 of the parts' gradient *sums*, `sizes` their examples n_i, `square_of_sum` is
    |sum_i S_i|^2. From E<S_i, S_j> = n_i n_j |G|^2 and E|S_i|^2 = n_i^2 |G|^2 + n_i s^2 (McCandlish et al. 2018,
    appendix A, for parts of unequal size). For the finite batch that the parts were cut from at random, s^2 is also
    unbiased for its within-batch variance. NaN with fewer than two parts that hold anything. Never clamped.
    """
    n, q = sum(sizes), sum(size * size for size in sizes)
    if n * n == q:
        return squares.new_tensor(math.nan), squares.new_tensor(math.nan)
    G2 = (square_of_sum - squares.sum()) / (n * n - q)
    return G2, (squares.sum() - G2 * q) / n


def null_cosines(g2: float, s2: float, f: float, B: int) -> dict[str, float]:
    """Expected cosines of a random subset of size f B of the batch: with g, and with its complement.

    `g2` = |g|^2 of the batch's gradient, `s2` the trace of the within-batch variance. A random S has
    E|g_S|^2 = |g|^2 + s^2 (1 - f) / (f B), E<g_S, g> = |g|^2 and E<g_S, g_rest> = |g|^2 - s^2 / B (sampling without
    replacement; docs/measurements.md). The second is not 0. NaN where a root is of something not positive.
    """
    inside, outside = g2 + s2 * (1 - f) / (f * B), g2 + s2 * f / ((1 - f) * B)
    return {
        "null/cos_clean_all": math.sqrt(g2 / inside) if inside > 0 else math.nan,
        "null/cos_clean_noisy": (g2 - s2 / B) / math.sqrt(inside * outside) if inside > 0 and outside > 0 else math.nan,
    }


def difference_measures(cc: float, nn: float, cn: float, variance: float, B: int) -> dict[str, float]:
    """`grad/difference*`: whether the mean gradients of C and N differ beyond what a random mask gives, without a root.

    `cc`, `nn` are unbiased |G_C|^2 and |G_N|^2, `cn` is <G_C, G_N>, all from pairs of examples in different parts of the
    batch; `variance` is the trace of the within-batch variance. tr Sigma / B, the squared length that sampling adds to a
    batch's mean gradient, is the unit of both:

        grad/difference      = (|G_C|^2 + |G_N|^2 - 2 <G_C, G_N>) B / tr Sigma      estimates |G_C - G_N|^2
        grad/difference_norm = (|G_C|^2 - |G_N|^2) B / tr Sigma                     which of the two is the longer

    A U-statistic (Hoeffding 1948). For a random mask both are 0 in expectation, exactly with parts of equal size: the mean
    over masks of either kind of pair is the same, and the variance does not depend on the mask. Of parallel gradients
    |difference_norm| >= difference; where difference is the larger, the directions differ. NaN where the variance is not
    positive. Never clamped.
    """
    unit = B / variance if variance > 0 else math.nan
    return {"grad/difference": (cc + nn - 2 * cn) * unit, "grad/difference_norm": (cc - nn) * unit}


# --------------------------------------------------------------------------------------------- a batch and its network


class Batch(NamedTuple):
    """A global batch's share on this process, positions `first`.. of it: inputs `x` of b examples, their labels `y` and,
    where they are known, true ones `true` (b, ...), `noisy` (b,) bool, `index` (b,) int64 into the training split. Of the
    *global* batch: `size` = B, `n_noisy` = |N|, and `host_y` (B,) int64 and `host_noisy` (B,) bool on the CPU."""

    x: Any
    y: Tensor
    true: Tensor
    noisy: Tensor
    size: int
    n_noisy: int
    first: int
    host_y: Tensor
    host_noisy: Tensor
    index: Tensor
    counted: Tensor | None = None  # (b',) bool: which of the inputs these b examples are; None: all


@dataclass
class Context:
    """What a measured forward takes from whoever trains. Callables are asked anew each time, for what they return may change."""

    module: nn.Module  # the bare network
    device: torch.device
    autocast: Callable[[], AbstractContextManager]  # the precision that the network is trained in
    sum_over_ranks: Callable[[Tensor], Tensor]  # over all processes, which must all call it
    loss_scale: Callable[[], Tensor | float]  # the factor on every gradient (a tensor on the device), else 1
    world_size: int = 1
    seed: int = 0  # of masks
    loss: Loss | None = None  # as in `example_losses`

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]

    def run(self, x: Any) -> Tensor:
        """The network's output (b, ...) of inputs: a tensor, or a tuple or dict of them as its arguments.

        Raises TypeError where that is no tensor."""
        if isinstance(x, dict):
            output = self.module(**x)
        else:
            output = self.module(*x) if isinstance(x, (tuple, list)) else self.module(x)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the network returned {type(output).__name__}: wrap it in a module that returns one tensor"
            )
        return output

    def logits(self, x: Any) -> Tensor:
        """Output (b, ...) in the precision of training, returned in float32 where that has 16 bits."""
        with self.autocast():
            output = self.run(x)
        return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def select(x: Any, index: Tensor) -> Any:
    """The examples `index` (m,) int64 of inputs as `Context.run` takes them."""
    if isinstance(x, dict):
        return {name: part[index] for name, part in x.items()}
    return tuple(part[index] for part in x) if isinstance(x, (tuple, list)) else x[index]


# ------------------------------------------------------------------------------------------------------------ BatchNorm


def sync_batchnorms(module: nn.Module) -> list[nn.SyncBatchNorm]:
    """Its BatchNorms that take their statistics over all processes."""
    return [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]


class LocalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What a SyncBatchNorm, which may have been of any kind, is in one process."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@contextmanager
def keep_buffers(module: nn.Module):
    """Give buffers back, with the values they had: in place, for a captured graph knows them by their address, and without a
    trace in their versions, by which a backward that is still to come knows what it has saved."""
    owners = [(m._buffers, m._buffers.copy()) for m in module.modules()]
    before = [(b, b.clone()) for b in module.buffers()]
    versions = torch.autograd._unsafe_preserve_version_counter(tuple(b for b, _ in before))
    try:
        yield
    finally:
        for own, kept in owners:
            own.clear()
            own.update(kept)
        with torch.no_grad(), versions:
            for b, old in before:
                if b.shape == old.shape:
                    b.copy_(old)
                else:  # resized in place
                    b.set_(old)


@contextmanager
def keep_attributes(module: nn.Module):
    """Give the modules' own attributes (counters, flags, tensors kept for the next call) back, but not what changes within them."""
    before = [(m.__dict__, m.__dict__.copy()) for m in module.modules()]
    try:
        yield
    finally:
        for own, kept in before:
            for name in own.keys() - kept.keys():
                del own[name]
            own.update(kept)


@contextmanager
def batchnorm_mode(module: nn.Module, mode: str, same_on_all_ranks: bool = False):
    """For a measurement's forward: with "eval" in eval mode, else as the network is set; running statistics, what else the
    forward changes in the modules, and modes are given back.

    `same_on_all_ranks`: all processes forward the same examples, so BatchNorm has nothing to synchronise; where it did, a
    second derivative could not be had. Gradients are to be taken within the context.
    """
    local = [m for m in sync_batchnorms(module) if type(m) is nn.SyncBatchNorm] if same_on_all_ranks else []
    with keep_attributes(module), keep_buffers(module):
        if mode == "eval":
            module.eval()
        for m in local:
            m.__class__ = LocalBatchNorm
        try:
            yield
        finally:
            for m in local:
                m.__class__ = nn.SyncBatchNorm


# ------------------------------------------------------------------------------------------------------------ forwards


@contextmanager
def cut_graph(modules):
    """Within the block, end the graph behind each of `modules` and begin another: (outputs, entries) of
    `pull_backs`, but for the logits. What needs no gradient is not cut."""
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


@contextmanager
def tensors_with_hooks():
    """Within the block, a list of the shapes of the tensors inside a network on whose gradient a hook is put."""
    register, found = Tensor.register_hook, []

    def noted(tensor: Tensor, hook):
        if tensor.grad_fn is not None:
            found.append(tuple(tensor.shape))
        return register(tensor, hook)

    Tensor.register_hook = noted
    try:
        yield found
    finally:
        Tensor.register_hook = register


def refuse_hooks(module: nn.Module) -> None:
    """Raise ValueError for hooks of modules on a backward, which would be called for parts of the gradient."""
    of_all = nn.modules.module._global_backward_hooks or nn.modules.module._global_backward_pre_hooks
    for name, m in module.named_modules():
        if of_all or m._backward_hooks or m._backward_pre_hooks:
            raise ValueError(
                f"the module {name or type(m).__name__} has a backward hook, which would be called for each part of the "
                "gradient: remove it where gradients are measured"
            )


def graph_nodes(outputs: list[Tensor]) -> set:
    """The nodes of the graph behind `outputs`."""
    seen: set = set()
    ahead = [output.grad_fn for output in outputs]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
    return seen


def refuse_reentrant(outputs: list[Tensor]) -> None:
    """Raise ValueError where the graph behind `outputs` has an activation checkpoint of the reentrant kind: what is below one
    gets its gradient from a backward alone."""
    if any("CheckpointFunction" in node.name() for node in graph_nodes(outputs)):
        raise ValueError(
            "the network has an activation checkpoint of the reentrant kind, which has no part of a gradient: use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


class Forward:
    """One forward of examples, to be pulled back along any cotangent; of several parts, one forward of each.

    A network with an attribute `cuts` (submodules through whose output everything passes) takes less memory.
    """

    def __init__(
        self,
        context: Context,
        x: Any,
        size: int,
        parts: list[Tensor] | None = None,
        full_precision: bool = False,
        counted: Tensor | None = None,
    ) -> None:
        """`x` are the inputs (b, ...) of this process's share of `size` = B examples. `parts` are masks (b,) bool that together
        cover it; `full_precision`: without autocast; `counted` (b',) bool: which b of the inputs (b', ...) are the examples.
        Raises ValueError for an output that no parameter changes, and for hooks on gradients within the network."""
        self.context, self.unit = context, context.loss_scale() / size
        # Of each part its examples and its logits, detached; and (outputs, entries) of `pull_backs`.
        self.pieces: list[tuple[Tensor | None, Tensor]] = []
        self.graphs: list[tuple[list[Tensor], list[Tensor]]] = []
        self.used = [False] * len(context.parameters)  # by the rows that have been pulled back
        self.runs_again: dict[tuple[int, int], bool] = {}  # of each part of a graph that has been pulled back
        indices: list[Tensor | None] = [None]
        if parts is not None:  # here the host waits for the device
            indices = [part.nonzero().squeeze(1) for part in parts]
        refuse_hooks(context.module)
        for index in indices:
            at = index if counted is None or index is None else counted.nonzero().squeeze(1)[index]
            some = x if at is None else select(x, at)
            with cut_graph(getattr(context.module, "cuts", ())) as (outputs, entries), tensors_with_hooks() as hooked:
                logits = context.run(some) if full_precision else context.logits(some)
            if hooked:
                raise ValueError(
                    f"the network puts a hook on the gradient of a tensor of shape {hooked[0]} in its forward, which would be "
                    "called for each part of the gradient: leave it out where gradients are measured"
                )
            if not logits.requires_grad:
                raise ValueError(
                    "the network's output depends on no parameter that requires a gradient: all are frozen, the output is "
                    "detached, or this ran under torch.no_grad()"
                )
            self.output = logits.detach()
            if counted is not None and at is None:
                if len(logits) != len(counted):
                    raise ValueError(self._other_length(logits, len(counted)))
                logits = logits[counted]
            self.pieces.append((index, logits.detach()))
            self.graphs.append(([*outputs, logits], entries))

    @staticmethod
    def _other_length(logits: Tensor, number: int) -> str:
        return f"the network's output of shape {tuple(logits.shape)} is not of {number} examples, as the labels are"

    @property
    def is_joint(self) -> bool:
        """Whether this was one forward of all examples."""
        return len(self.pieces) == 1

    @property
    def logits(self) -> Tensor:
        """Output (b, ...) of a joint forward, detached."""
        ((_, logits),) = self.pieces
        return logits

    def rows(self, labels: Tensor, weights: list[Tensor], free: bool = False, true: Tensor | None = None) -> list[Row]:
        """For each w of `weights` (b,): (1/B) sum_i w_i dL_i/dtheta against `labels` (b,) over this process's examples,
        times the loss scale; with `true` (b,) less the same against these, the label-noise part. With `free` they are the
        last ones of this forward, and take less memory. Raises ValueError for labels, a loss or a network that do not fit."""
        context = self.context
        of_pieces: list[list[Row]] = [[] for _ in weights]
        for piece, ((index, logits), graph) in enumerate(zip(self.pieces, self.graphs, strict=True)):
            dtype = logits.dtype.to_real()
            own = [(w if index is None else w[index]).to(dtype) * self.unit for w in weights]
            y = labels if index is None else labels[index]
            t = true if index is None or true is None else true[index]
            wanted = list(range(len(own)))
            if index is not None:  # the same on all processes, whose SyncBatchNorm meets in every pull-back
                some = context.sum_over_ranks(torch.stack([w.any() for w in own]).float()).tolist()
                wanted = [i for i in wanted if some[i]]
            if len(logits) != len(y):
                raise ValueError(self._other_length(logits, len(y)))
            U = output_cotangents(context.loss, logits, y, [own[i] for i in wanted], t)
            around = partial(self._one_product, piece)
            try:
                with without_hooks(context.parameters):
                    pulled = pull_backs(*graph, context.parameters, U, free, around)
            except RuntimeError:
                refuse_reentrant(graph[0])
                raise
            for i, row in zip(wanted, pulled, strict=True):
                of_pieces[i].append(self._filled(row))
            if not all(self.used):
                refuse_reentrant(graph[0])
        return [add_rows(r) if r else [torch.zeros_like(p) for p in context.parameters] for r in of_pieces]

    def _filled(self, row: list[Tensor | None]) -> Row:
        """`row` with zeros where a parameter is not used, which is noted."""
        filled = []
        for i, (g, p) in enumerate(zip(row, self.context.parameters, strict=True)):
            self.used[i] |= g is not None
            if g is not None and g.layout != torch.strided:
                name = next(name for name, q in self.context.module.named_parameters() if q is p)
                raise ValueError(f"the gradient of the parameter {name} is sparse: build its layer with sparse=False")
            filled.append(torch.zeros_like(p) if g is None else g)
        return filled

    @contextmanager
    def _one_product(self, piece: int, part: int):
        """Around a product through a part of a piece's graph. What an activation checkpoint runs again in there (BatchNorm's
        statistics, observers, counters) is run again by the first product, as by one backward, and by the others without a trace.
        """
        module, key = self.context.module, (piece, part)
        if self.runs_again.get(key):
            with keep_attributes(module), keep_buffers(module):
                yield
        elif key in self.runs_again:
            yield
        else:
            ran: list[nn.Module] = []
            handle = nn.modules.module.register_module_forward_pre_hook(lambda m, args: ran.append(m))
            try:
                yield
            finally:
                handle.remove()
            self.runs_again[key] = bool(ran)

    def row(self, labels: Tensor, weights: Tensor, free: bool = False, true: Tensor | None = None) -> Row:
        """The row of one w (b,), as in `rows`."""
        return self.rows(labels, [weights], free, true)[0]

    def for_grads(self, row: Row) -> list[Tensor | None]:
        """A summed `row` as a backward leaves it in `.grad`: None for a parameter that no process's output depends on, of which
        rows have been pulled back. All processes call it; one that has left out a parameter itself waits for its device."""
        used, context = self.used, self.context
        if context.world_size > 1:
            users = context.sum_over_ranks(copy_to(torch.tensor(used, dtype=torch.float32), context.device))
            used = used if all(used) else users.bool().tolist()
        return [g if is_used else None for g, is_used in zip(row, used, strict=True)]


def make_forward(context: Context, batch: Batch, batchnorm: str) -> Forward:
    """The forward that the measures of a BatchNorm mode need: joint, or with "separate" one of C and one of N."""
    separate = batchnorm == "separate" and 0 < batch.n_noisy < batch.size
    parts = [~batch.noisy, batch.noisy] if separate else None
    return Forward(context, batch.x, batch.size, parts, counted=batch.counted)


def sum_rows(context: Context, rows: list[Row]) -> list[Row]:
    """Rows summed over all processes in one collective, whatever each held of the batch."""
    if context.world_size == 1:
        return rows
    flat = context.sum_over_ranks(torch.cat([as_real(part).reshape(-1) for row in rows for part in row]))
    parts = iter(flat.split([as_real(p).numel() for p in context.parameters] * len(rows)))
    return [[like(next(parts), p) for p in context.parameters] for _ in rows]


def like(flat: Tensor, p: Tensor) -> Tensor:
    """The entries of `as_real` of a tensor of the shape and dtype of `p`, as that tensor."""
    part = flat.view_as(as_real(p)).to(p.dtype.to_real())
    return torch.view_as_complex(part) if p.is_complex() else part


def inner_products(context: Context, *rows: Row) -> list[list[float]]:
    """Inner products of rows that carry the loss scale, without it; here the host waits for the device."""
    return gram(list(rows)).div(float(context.loss_scale()) ** 2).tolist()


def summed_row(context: Context, forward: Forward, labels: Tensor, weights: Tensor, true: Tensor | None = None) -> Row:
    """`Forward.row`, summed over all processes."""
    return sum_rows(context, [forward.row(labels, weights, true=true)])[0]


# --------------------------------------------------------------------------------------------------------- the split


def split_rows(
    context: Context, batch: Batch, forward: Forward, free: bool = True, masks: Sequence[Tensor] = ()
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
    G = gram([*with_own, *mask_rows]) / scale**2
    values = one_sided_measures(G[0, 0], batch.n_noisy)
    if len(rows) == 2:
        values = split_measures(set_means(G[: len(with_own), : len(with_own)], f))
    if mask_rows:
        values |= permuted_measures(G)
    return {"grad/clean_fraction": f, **values}


def measure_split(
    context: Context,
    batch: Batch,
    forward: Forward,
    own: Row | None = None,
    masks: Sequence[Tensor] = (),
    free: bool = True,
) -> tuple[list[Row], dict]:
    """The rows of `split_rows` for C and N, and `grad/*` with, of `masks` as of `draw_masks`, `null/permuted_*`.

    `own` is a g that is not the rows' sum, or None; `free` as in `split_rows`. The host waits for no device, but for masks on
    a separate forward, which takes two forwards of its own for each of them.
    """
    joint = list(masks) if forward.is_joint else []
    rows = split_rows(context, batch, forward, free, joint)
    rows, mask_rows = rows[: len(rows) - len(joint)], rows[len(rows) - len(joint) :]
    values = split_values(rows, own, batch, context.loss_scale(), mask_rows)
    if masks and not forward.is_joint and own is not None:
        values |= permuted_values(context, batch, forward, own, masks)
    return rows, values


# ------------------------------------------------------------------------------------------------------ random masks


def draw_masks(batch: Batch, number: int, seed: int, step: int, stratify: bool = False) -> list[Tensor]:
    """R = `number` masks (b,) bool on the device, true for what stands in for the clean examples. The host does not wait.

    They come from CPU generators keyed by (seed, mask, step): the first masks are the same however many there are.
    """
    if not number:
        return []
    streams = (generator(seed, f"permutation{r}", step) for r in range(number))
    stand_ins = torch.stack([~random_mask(batch, stratify, g) for g in streams])  # (R, B)
    here = stand_ins[:, batch.first : batch.first + len(batch.y)].contiguous()
    return list(copy_to(here, batch.y.device).unbind())


def random_mask(batch: Batch, stratify: bool, g: torch.Generator) -> Tensor:
    """A mask (B,) bool of as many examples as are noisy, drawn on the CPU; with `stratify`, as many of each given label."""
    if not stratify:
        order = torch.rand(batch.size, generator=g, dtype=torch.float64)
        return torch.zeros(batch.size, dtype=torch.bool).scatter(0, order.argsort()[: batch.n_noisy], True)
    order = torch.randperm(batch.size, generator=g)  # the mask's values change places among equal labels
    mixed, plain = order[batch.host_y[order].argsort(stable=True)], batch.host_y.argsort(stable=True)
    return torch.empty_like(batch.host_noisy).scatter(0, plain, batch.host_noisy[mixed])


def permuted_values(
    context: Context, batch: Batch, forward: Forward, g: Row, masks: Sequence[Tensor]
) -> dict[str, float]:
    """`null/permuted_*`: mean and standard deviation of both cosines over R `masks` as of `draw_masks`, one at a time; `g` is
    the batch's gradient. The host waits for the device. On a separate `forward` each takes two forwards of its own."""
    cosines: dict[str, list[float]] = {"null/permuted_cos_clean_all": [], "null/permuted_cos_clean_noisy": []}
    for stand_in in masks:
        if forward.is_joint:
            graph = forward
        else:
            graph = Forward(context, batch.x, batch.size, [stand_in, ~stand_in], counted=batch.counted)
        (s,) = sum_rows(context, [graph.row(batch.y, stand_in)])
        if graph is forward:  # the complement is what is left of g
            (ss, sg), (_, gg) = gram([s, g]).tolist()
            sq, qq = sg - ss, gg - 2 * sg + ss
        else:
            (q,) = sum_rows(context, [graph.row(batch.y, ~stand_in)])
            (ss, sq, sg), (_, qq, _), (_, _, gg) = gram([s, q, g]).tolist()
        cosines["null/permuted_cos_clean_all"].append(cosine_of_products(sg, ss, gg))
        cosines["null/permuted_cos_clean_noisy"].append(cosine_of_products(sq, ss, qq))
    values: dict[str, float] = {}
    for tag, values_of_masks in cosines.items():
        if values_of_masks:
            sample = torch.tensor(values_of_masks, dtype=torch.float64)
            values[tag] = float(sample.mean())
            if len(sample) > 1:
                values[f"{tag}_std"] = float(sample.std())
    return values


# ---------------------------------------------------------------------------------------------- parts of a batch, and truth


def batch_parts(batch: Batch, chunks: int) -> tuple[int, Tensor, Tensor]:
    """k = `chunks` disjoint parts of the batch, fewer where it is smaller, cut by position in the global batch: (k, part of each position (B,) on the host,
    that of this process's examples (b,) on the device)."""
    k = min(chunks, batch.size)
    position = torch.arange(batch.size) * k // batch.size
    return k, position, position[batch.first : batch.first + len(batch.y)].to(batch.y.device)


def chunk_estimates(
    context: Context, batch: Batch, forward: Forward, products: list[list[float]], chunks: int
) -> tuple[dict[str, float], float]:
    """Moments of this batch from the parts of C and of N, and <G_C, G_N> from pairs of examples in different parts alone.

    `products` are the inner products of the rows of C, of N and of their sum. `cc`, `nn` and `aa` are |G_C|^2, |G_N|^2 and
    |G|^2, `cn` and `ca` <G_C, G_N> and <G_C, G>, all without bias; `var_*` traces of the variance in C, in N and in the batch;
    `sq_a` |G|^2 of the batch from its own parts. NaN where a set has no two parts.
    """
    B, (k, position, here) = batch.size, batch_parts(batch, chunks)
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
        estimate[name] = chunk_moments(S, sizes[name], S.new_tensor(sums[name] * B**2))
    f = 1 - batch.n_noisy / B
    (cc, var_c), (nn, var_n), (sq_a, var_a) = ([float(v) for v in estimate[name]] for name in "cna")
    cn = products[0][1] / (f * (1 - f))
    ca, aa = f * cc + (1 - f) * cn, f * f * cc + 2 * f * (1 - f) * cn + (1 - f) ** 2 * nn
    across = (products[0][1] - within) * B**2 / pairs if pairs else math.nan
    moments = {
        "cc": cc,
        "nn": nn,
        "cn": cn,
        "ca": ca,
        "aa": aa,
        "var_c": var_c,
        "var_n": var_n,
        "var_a": var_a,
        "sq_a": sq_a,
    }
    return moments, across


def label_variance(context: Context, batch: Batch, forward: Forward, chunks: int) -> float:
    """Trace of the within-batch variance of g_i(y_i) - g_i(y*_i), which is 0 for a clean example, from k = `chunks` parts of the batch."""
    B, (k, position, here) = batch.size, batch_parts(batch, chunks)
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
    return float(chunk_moments(squares * B**2, sizes, square * B**2)[1])


def truth_values(context: Context, batch: Batch, forward: Forward, g: Row) -> dict[str, float]:
    """`truth/*`: the batch's gradient `g` against that of the same forward under the true labels."""
    t = summed_row(context, forward, batch.true, torch.ones_like(batch.noisy))
    (tt, tg), (_, gg) = inner_products(context, t, g)
    return {"truth/cos": cosine_of_products(tg, tt, gg), "truth/shift": norm_ratio(gg - 2 * tg + tt, tt)}


def part_values(
    context: Context,
    batch: Batch,
    products: list[list[float]],
    own: Row | None,
    moments: dict[str, float],
    across: float,
) -> dict[str, float]:
    """`null/cos_*` and `grad/difference*` from `chunk_estimates` and the `products` it took; `own` is a g that is not the
    sum of the rows of C and of N, or None."""
    g2 = inner_products(context, own)[0][0] if own is not None else products[2][2]
    values = null_cosines(g2, moments["var_a"], 1 - batch.n_noisy / batch.size, batch.size)
    return values | difference_measures(moments["cc"], moments["nn"], across, moments["var_a"], batch.size)


# --------------------------------------------------------------------------------------------------------------- meter


def all_reduce(t: Tensor) -> Tensor:
    """`t` summed over the processes of torch.distributed, in place; as it is where there is but one."""
    if process()[1] > 1:
        torch.distributed.all_reduce(t)
    return t


def process() -> tuple[int, int]:
    """(rank, number of processes) of torch.distributed, (0, 1) without it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def bare(model: nn.Module) -> tuple[nn.Module, Callable[[], AbstractContextManager] | None]:
    """The network within the wrappers of torch.compile, DistributedDataParallel and Lightning Fabric, whose backward may be
    called only once, or waits for one of their own; and the autocast that Fabric's runs it under."""
    autocast = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "_FabricModule":
            autocast, model = model._strategy.precision.forward_context, model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model, autocast


class Meter:
    """Cosines and norms of the gradients of two sets of examples in a batch, beside what a random split of it gives.

    Of `noisy` (B,) bool the examples that are True are N, the others C: wrong and right labels, a minority and the rest, old
    and new data. Tags are those of docs/measurements.md: `grad/*`, `null/permuted_*` (random masks) and, with `chunks`,
    `null/cos_*` and `grad/difference*`. Where N or C is empty the norms alone are defined, what is not is left out.

    Inputs x are a tensor, or a tuple or dict of tensors that are the network's arguments. Under several processes of
    torch.distributed each gives its own share of the batch, and all get the values of the whole. What goes wrong is raised
    as ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss | None = None,
        masks: int = 1,
        chunks: int = 0,
        batchnorm: str = "train",
        autocast: Callable[[], AbstractContextManager] | torch.dtype | None = None,
        reduce: Callable[[Tensor], Tensor] = all_reduce,
        seed: int = 0,
    ) -> None:
        """`model` may be wrapped by DistributedDataParallel, torch.compile or Lightning Fabric: its own network is measured.

        `loss` (output, y) -> (B,), each example's own, is averaged over the batch; None: cross-entropy of logits (B, K) and y
        (B,) int64, or the mean over positions of (B, T, K) and (B, T), both without labels of -100. `masks` random masks of as many examples as are noisy
        cost a vector-Jacobian product each, two thirds of a plain step. `chunks`: disjoint parts of the batch, 3 products each
        part or fewer; 0: none. `batchnorm`: "train" (one forward of all, as the network is set), "eval", or "separate" (one
        forward of C and one of N; the last two cost forwards of their own). `autocast`: a dtype, or a function that returns a
        context manager; None: as around the call. `reduce`: sum of a tensor over all processes. `seed`: of the masks.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}, not a torch.nn.Module")
        if batchnorm not in ("train", "eval", "separate"):
            raise ValueError(f'batchnorm={batchnorm!r}: "train", "eval" or "separate"')
        for name, number in (("masks", masks), ("chunks", chunks)):
            if not isinstance(number, int) or number < 0:
                raise ValueError(f"{name}={number!r} is not a number from 0")
        if chunks == 1:
            raise ValueError("chunks=1: estimates take at least 2 parts; 0 for none")
        if not (autocast is None or isinstance(autocast, torch.dtype) or callable(autocast)):
            raise TypeError(
                f"autocast is {type(autocast).__name__}, neither a dtype nor a function that returns a context manager"
            )
        self.model, of_wrapper = bare(model)
        self.loss, self.masks, self.chunks, self.batchnorm = loss, masks, chunks, batchnorm
        self.autocast, self.reduce, self.seed = autocast or of_wrapper, reduce, seed
        self.steps = 0  # calls of `step`, which key the masks
        self.logits: Tensor | None = None  # output of the last `step`, (b, ...), detached

    def step(
        self, x: Any, y: Tensor, noisy: Tensor, true: Tensor | None = None, *, scale: Any = 1.0, step: int | None = None
    ) -> dict:
        """Instead of forward and backward: adds the gradient of the batch's mean loss to `.grad`; returns values by tag.

        Arguments as of `measure`. Also `train/loss`, the batch's mean loss; the output stands in `meter.logits`. A GPU is
        waited for once, for what lies on it of `noisy` and, without `loss`, of `y`; more with `chunks`, `true`,
        batchnorm="separate" and several processes.
        """
        if not torch.is_grad_enabled():
            raise ValueError("meter.step ran under torch.no_grad(), where nothing has a gradient: call it outside")
        context, batch = self._context(y, scale), self._batch(x, y, noisy, true)
        at = self.steps if step is None else step
        values = {}
        if self.batchnorm == "separate":
            self._try_single_examples(context, batch)
        if self.batchnorm == "eval":  # before the forward moves the running statistics
            with self._no_trace(context):
                values = self._values(context, batch, at)[1]
        forward = Forward(context, x, batch.size, counted=batch.counted)
        if self.batchnorm == "train":
            rows, values = self._values(context, batch, at, forward)
            row = add_rows(rows)
        else:
            (row,) = sum_rows(context, [forward.row(batch.y, torch.ones_like(batch.noisy), free=True)])
        if self.batchnorm == "separate":
            with self._no_trace(context):
                values = self._values(context, batch, at, own=row)[1]
        self.logits = forward.output
        set_grads(context.parameters, forward.for_grads(row), add=True)
        total = example_losses(self.loss, forward.logits, batch.y).sum()
        values["train/loss"] = (total if context.world_size == 1 else self.reduce(total)) / batch.size
        self.steps += step is None
        return values

    def measure(
        self, x: Any, y: Tensor, noisy: Tensor, true: Tensor | None = None, *, scale: Any = 1.0, step: int | None = None
    ) -> dict:
        """Values by tag, floats or 0-d tensors on the device; leaves no trace in `.grad`, running statistics, modes and random
        state.

        `x` inputs of B examples, `y` (B, ...) labels or targets, `noisy` (B,) bool on any device, `true` (B, ...) labels to compare with: `truth/*`, and with `chunks` `grad/label_share`. `scale` is the
        factor on the loss in float16: a number, a 0-d tensor, or a GradScaler's `scaler.scale`; values are without it, and
        not finite where it overflows. Masks are keyed by `seed` and `step`, by default the number of calls of `step` so far.
        """
        with torch.enable_grad():
            context, batch = self._context(y, scale), self._batch(x, y, noisy, true)
            with self._no_trace(context):
                own = None
                if self.batchnorm == "separate":
                    self._try_single_examples(context, batch)
                    forward = Forward(context, x, batch.size, counted=batch.counted)
                    (own,) = sum_rows(context, [forward.row(batch.y, torch.ones_like(batch.noisy), free=True)])
                return self._values(context, batch, self.steps if step is None else step, own=own)[1]

    def _values(
        self, context: Context, batch: Batch, step: int, forward: Forward | None = None, own: Row | None = None
    ) -> tuple[list[Row], dict]:
        """Rows of C and of N, and all values, on `forward` or on one of its own; `own` is a g that is not the rows' sum."""
        forward = forward or make_forward(context, batch, self.batchnorm)
        both = 0 < batch.n_noisy < batch.size
        more = both and (self.chunks > 0 or batch.true is not None)
        masks = draw_masks(batch, self.masks, self.seed, step) if both else []
        rows, values = measure_split(context, batch, forward, own, masks, free=not more)
        if not more:
            return rows, values
        base = [*rows, add_rows(rows)]
        if self.chunks:
            products = inner_products(context, *base)
            moments, across = chunk_estimates(context, batch, forward, products, self.chunks)
            values |= part_values(context, batch, products, own, moments, across)
            if batch.true is not None and moments["var_a"] > 0:
                values["grad/label_share"] = label_variance(context, batch, forward, self.chunks) / moments["var_a"]
        if batch.true is not None:
            values |= truth_values(context, batch, forward, base[2])
        undefined = [tag for tag, value in values.items() if isinstance(value, float) and math.isnan(value)]
        for tag in undefined:
            del values[tag]
        return rows, values

    def _context(self, y: Tensor, scale: Any) -> Context:
        """Of one call, for what may train and its scale change."""
        if not isinstance(y, Tensor):
            raise TypeError(f"y is {type(y).__name__}, not a tensor of labels (B, ...)")
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "the meter ran under torch.inference_mode(), where nothing has a gradient: call it outside, or under "
                "torch.no_grad() (Lightning: Trainer(inference_mode=False))"
            )
        device, autocast = y.device, self.autocast
        if callable(scale):
            scale = scale(torch.ones((), device=device))
        if isinstance(scale, Tensor):  # else a float32 factor would be rounded into float64 gradients
            scale = scale.double()
        if isinstance(autocast, torch.dtype):
            enter = lambda: torch.autocast(device.type, autocast)  # noqa: E731
        else:
            enter = autocast or nullcontext
        return Context(self.model, device, enter, self.reduce, lambda: scale, process()[1], self.seed, self.loss)

    def _batch(self, x: Any, y: Tensor, noisy: Tensor, true: Tensor | None) -> Batch:
        """The global batch, of which these are this process's share; here the host waits for a `noisy` on a GPU."""
        if not isinstance(noisy, Tensor) or noisy.dtype != torch.bool:
            kind = str(noisy.dtype) if isinstance(noisy, Tensor) else type(noisy).__name__
            raise TypeError(f"noisy is {kind}; it must be a tensor of torch.bool with one entry for each example, (B,)")
        if noisy.dim() != 1 or y.dim() < 1 or len(noisy) != len(y):
            raise ValueError(
                f"noisy of shape {tuple(noisy.shape)} for y of shape {tuple(y.shape)}: it must have one entry for each example, (B,)"
            )
        if true is not None and true.shape != y.shape:
            raise ValueError(f"true of shape {tuple(true.shape)} for y of shape {tuple(y.shape)}: both must be alike")
        if true is not None and self.loss is None and bool(((true == IGNORED) != (y == IGNORED)).any()):
            raise ValueError("true is -100 elsewhere than y: a label that is left out must be so in both")
        first, (rank, world_size), counted = 0, process(), None
        if self.loss is None and y.dtype == torch.int64:
            counted = y != IGNORED if y.dim() == 1 else (y != IGNORED).flatten(1).any(1)
        if counted is None:
            here = noisy.cpu()
        elif noisy.device == y.device:
            here, count = torch.stack([noisy, counted]).cpu()
        else:
            here, count = noisy.cpu(), counted.cpu()
        if counted is not None and bool(count.all()):
            counted = None
        if counted is not None:  # the others take part in the forward alone
            at = copy_to(count.nonzero().squeeze(1), y.device)
            y, here, true = y[at], here[count], None if true is None else true[at]
        there = copy_to(here, y.device) if counted is not None or noisy.device != y.device else noisy
        host = here
        if world_size > 1:
            sizes = torch.zeros(world_size, device=y.device)
            sizes[rank] = len(here)
            each = [int(size) for size in self.reduce(sizes).tolist()]
            first, whole = sum(each[:rank]), torch.zeros(sum(each), device=y.device)
            whole[first : first + len(here)] = here.to(y.device, whole.dtype)
            host = self.reduce(whole).bool().cpu()
        if not len(host):
            raise ValueError("y and noisy hold no example" + " whose label is not -100" * (counted is not None))
        return Batch(x, y, true, there, len(host), int(host.sum()), first, y, host, y, counted)

    def _try_single_examples(self, context: Context, batch: Batch) -> None:
        """Raise ValueError, on all processes, where a set of one example on one of them cannot be normalised by itself."""
        failed = None
        if not sync_batchnorms(self.model):  # those that synchronise meet in every forward
            for part in (~batch.noisy, batch.noisy):
                single = int(part.sum()) == 1 and 0 < batch.n_noisy < batch.size
                if single:
                    at = part.nonzero()[0] if batch.counted is None else batch.counted.nonzero()[part.nonzero()[0, 0]]
                    try:
                        with self._no_trace(context), torch.no_grad():
                            context.logits(select(batch.x, at))
                    except ValueError as e:  # BatchNorm's
                        failed = e
        some = failed is not None
        if context.world_size > 1:
            some = bool(self.reduce(torch.tensor(float(some), device=context.device)) > 0)
        if some:
            raise ValueError(
                'batchnorm="separate": one of the sets has a single example, which BatchNorm cannot normalise by itself: use '
                'batchnorm="train", or other batches'
            ) from failed

    @contextmanager
    def _no_trace(self, context: Context):
        """Give running statistics, modes and the random state of dropout back."""
        devices = [context.device] if context.device.type == "cuda" else []
        with torch.random.fork_rng(devices), batchnorm_mode(self.model, self.batchnorm):
            yield
