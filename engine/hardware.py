"""Devices, precision, threads and processes of a run, through Lightning Fabric."""

import ctypes
import inspect
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning_fabric.plugins.precision import MixedPrecision
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn

import models
from data import InputError, one_line
from engine import interrupts, launchers, options
from engine.cmdline import counted
from engine.machine import cores

TIMEOUT = timedelta(minutes=10)  # a collective that waits longer means that a process is lost

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc


CPU_FEATURES = {  # name: the check in torch.cpu; each processor that has one has those below it, too
    "AMX": "_is_amx_tile_supported",
    "AVX512-BF16": "_is_avx512_bf16_supported",
    "AVX-512": "_is_avx512_supported",
    "AVX2": "_is_avx2_supported",
}


def cpu_features() -> list[str]:
    """Which of `CPU_FEATURES` this processor has, the most capable first."""
    return [name for name, check in CPU_FEATURES.items() if getattr(torch.cpu, check, lambda: False)()]


def cpu_prefers_bf16() -> bool:
    """Whether bf16-mixed is faster than 32-true on this CPU: with AMX only. Where bf16 products come from AVX512-BF16,
    conversions cost more than the products save (ResNet-18 at width 64: 50.5 images/s against 60.7)."""
    return "AMX" in cpu_features()


def resolve(args) -> int:
    """Replace every "auto" and None among the hardware options; returns the processes on this machine.

    Raises `InputError` for hardware that is not there.
    """
    gpus = torch.cuda.device_count()
    if args.accelerator == "auto":
        args.accelerator = "cuda" if gpus else "cpu"
    elif args.accelerator != "cpu" and not gpus:
        raise InputError(f"--accelerator {args.accelerator}: there is no CUDA GPU here; use cpu or auto")
    on_gpu = args.accelerator != "cpu"
    args.num_nodes = int(args.num_nodes)
    started = launchers.started()
    if args.devices == "auto" and not started:
        args.devices = gpus if on_gpu else 1
    if started:  # theirs is the count
        for option, count in zip(("devices", "num_nodes"), started, strict=True):
            given = getattr(args, option)
            if not options.under_fabric_run() and given not in (1, count, "auto"):
                raise InputError(
                    f"--{option.replace('_', '-')} {given}: the launcher has started {counted(started[0], 'process')} on each of "
                    f"{counted(started[1], 'machine')}; leave it out, or give the launcher that number"
                )
            setattr(args, option, count)
    try:  # Fabric also takes lists of GPUs, "0,2"
        here = int(args.devices) if "," not in str(args.devices) else len(str(args.devices).strip(",").split(","))
    except ValueError:
        here = 0
    if here < 1:
        raise InputError(f"--devices {args.devices}: not a number of devices from 1")
    if on_gpu and here > gpus:
        raise InputError(f"--devices {args.devices}: this machine has {counted(gpus, 'GPU')}")
    if args.strategy == "auto" and here * args.num_nodes > 1:
        args.strategy = "ddp"
    if args.precision == "auto":
        bf16 = torch.cuda.get_device_capability()[0] >= 8 if on_gpu else cpu_prefers_bf16()
        args.precision = "bf16-mixed" if bf16 else "32-true"
    args.threads = args.threads or max(1, cores() // here)
    return here


def make_fabric(args) -> tuple[Fabric, torch.amp.GradScaler | None]:
    """Fabric, its processes started, on the hardware that `args` asks for; and the loss scaler of 16-mixed.

    `args` then holds what was resolved. The options of `fabric run` are passed in LT_* variables, which `options.parse` has
    read: they are removed, so that all is passed here in one way and `fabric run train.py` is the run that `python
    train.py` is. Raises `InputError`.
    """
    here = resolve(args)
    for name in options.FABRIC:
        os.environ.pop(f"LT_{name.upper()}", None)
    # On GPUs too float32 means float32, and the same command the same bits as far as their other kernels go.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    repeat = args.deterministic == "on"
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not repeat, repeat
    kind = "cpu" if args.accelerator == "cpu" else "cuda"
    if kind == "cpu":
        keep_freed_memory()
    scaler = torch.amp.GradScaler(kind) if args.precision == "16-mixed" else None
    # As a plugin, because Fabric would quietly turn 16-mixed into bf16-mixed on a CPU.
    how = {"plugins": cluster()} | ({} if scaler else {"precision": args.precision})
    if scaler:
        how["plugins"].append(MixedPrecision("16-mixed", kind, scaler))
    # Without SyncBatchNorm each process keeps its own running statistics until they are averaged (`average_buffers` of
    # a measuring context).
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    unsynced = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # renamed in torch 2.15
    # Fabric builds DDP in a stream of its own, of which torch then warns on every process.
    warn_of_streams = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn_of_streams:
        warn_of_streams(False)
    unused = {
        "find_unused_parameters": models.is_own(args.model)
    }  # for what is compiled: `plain_gradient` does without DDP
    strategy = DDPStrategy(timeout=TIMEOUT, **{unsynced: False}, **unused) if args.strategy == "ddp" else "auto"
    processes = here * args.num_nodes
    if processes > 1 and not launchers.started():
        os.environ[launchers.OWN] = str(processes)
    try:
        place = {"accelerator": args.accelerator, "devices": args.devices, "num_nodes": args.num_nodes}
        with launchers.say_if_waiting(processes):
            fabric = Fabric(strategy=strategy, **place, **how)
            interrupts.undo_at_end(lambda: end_processes(fabric))
            stop_with_parent()
            if not options.under_fabric_run():
                fabric.launch()
    except ValueError as e:
        raise InputError(f"--devices {args.devices}, --strategy {args.strategy}: {one_line(e)}") from e
    torch.set_num_threads(args.threads)  # last: launchers give each process all cores, or one
    return fabric, scaler


def cluster() -> list[ClusterEnvironment]:
    """Fabric's cluster where no launcher has started the processes: left to itself it takes a SLURM job or an mpirun for one."""
    return [] if launchers.started() else [LightningEnvironment()]


def keep_freed_memory() -> None:
    """Have glibc keep what tensors give back for the next ones. By default it returns the top of its heap to the system, and
    each activation of an evaluation is then fetched again page by page: a quarter of that evaluation's time."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            for parameter, size in ((M_TRIM_THRESHOLD, 1 << 30), (M_MMAP_THRESHOLD, 32 << 20), (M_TOP_PAD, 64 << 20)):
                mallopt(parameter, size)


def end_processes(fabric: Fabric) -> None:
    """End the processes that `fabric` has started here for its other ranks."""
    processes = getattr(getattr(fabric.strategy, "launcher", None), "procs", [])
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()


def stop_with_parent() -> None:
    """In a process that Fabric has started for a rank: have it receive SIGTERM when its parent has ended."""
    own = launchers.OWN in os.environ and launchers.TORCHRUN not in os.environ
    if own and os.environ.get("LOCAL_RANK", "0") != "0" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# Messages of torch.distributed, in a plain RuntimeError, when another process has ended.
LOST = re.compile(r"gloo|connection (was )?(closed|reset|refused)|broken pipe|nccl|process group|socket", re.IGNORECASE)


def lost_process(e: BaseException) -> str | None:
    """One line for an exception that means that another process of the run has ended; None for any other."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or not isinstance(e, RuntimeError):
        return None
    if not isinstance(e, torch.distributed.DistError) and not LOST.search(str(e)):
        return None
    return f"another process of the run has ended ({one_line(e)})"


def sum_over_ranks(fabric: Fabric, t: Tensor) -> Tensor:
    """Sum of `t` over all processes; all of them must call it."""
    return t if fabric.world_size == 1 else fabric.all_reduce(t, reduce_op="sum")


def on_rank_zero(fabric: Fabric, act):
    """Have rank 0 call `act()`; every process gets its result, or raises the `InputError` that it raised."""
    result, error = None, None
    if fabric.is_global_zero:
        try:
            result = act()
        except InputError as e:
            error = str(e)
    if fabric.world_size > 1:
        result, error = fabric.broadcast((result, error))
    if error is not None:
        raise InputError(error)
    return result


def reset_peak_memory(device: torch.device) -> None:
    """On a GPU: give back what is cached, and count `peak_memory_mb` from now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: by torch on the GPU (its cache and captured graphs with it), or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB here
