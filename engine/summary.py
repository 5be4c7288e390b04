"""A run's own account: config.json, summary.json, and the lines on the screen."""

import math
import platform
import time
from pathlib import Path

import torch

import data
import epochwise
import measure
import schedules
from datasets import DATASETS
from engine import memory
from engine.cmdline import counted, every
from engine.hardware import cpu_features, peak_memory_mb
from engine.record import Record, versions
from optim import OPTIMIZERS
from series import TEST_ACC, VAL_ACC


def run_config(job, source: data.Source, ledger: dict) -> dict:
    """config.json: the options as resolved, what followed from them, the labels and the versions."""
    on_gpu = job.fabric.device.type == "cuda"
    machine = torch.cuda.get_device_name(job.fabric.device) if on_gpu else platform.processor() or platform.machine()
    resolved = {
        "device": machine,
        "cpu_features": cpu_features(),
        "world_size": job.fabric.world_size,
        "sched_steps": job.sched_steps,
        "schedule": job.course.span(job.total_steps, job.steps_per_epoch),
        "steps_per_epoch": job.steps_per_epoch,
        "total_steps": job.total_steps,
        "whole_steps": job.whole_steps,
        "parameters": sum(p.numel() for p in job.parameters),
        "classes": list(source.classes),
        "train_examples": len(job.train),
        "val_examples": job.val[0].n,
        "test_examples": job.test[0].n,
    }
    if job.loss_matrix_sha256:
        resolved["loss_matrix_sha256"] = job.loss_matrix_sha256
    if source.digest:
        resolved["data_digest"] = source.digest
    return {"options": dict(vars(job.args)), "resolved": resolved, "noise": ledger, "versions": versions()}


def summarize(job, record: Record, status: str, reason: str | None = None) -> dict:
    """Write summary.json and return its content."""
    state, noisy = job.state, record.recent_noisy
    epochs, rest = divmod(state.step, job.steps_per_epoch)
    content = {
        "status": status,
        "reason": reason,
        "val_acc": record.latest.get(VAL_ACC),
        "best_val_acc": state.best_val_acc or None,  # none before the first validation of a trained network
        "test_acc": record.latest.get(TEST_ACC),
        "train_acc_noisy": sum(noisy) / len(noisy) if noisy else None,
        "steps": state.step,
        "examples": epochs * len(job.train) + rest * job.args.bs,
        "seconds": round(state.seconds + time.perf_counter() - record.began, 2),
        "images_per_second": round(state.steps_images / state.steps_seconds, 1) if state.steps_seconds else None,
        "peak_memory_mb": round(peak_memory_mb(job.fabric.device), 1),
    }
    if job.fast_error is not None:
        content["fast_gradient"] = job.fast_error | {"used": not job.refused}
    if job.args.measure == "split" and job.state.plan:
        content["half_memorized_step"] = state.half_memorized_step
    if job.args.measure == "full":
        content["half_memorized_step"] = state.half_memorized_step
        content["not_resolved"] = state.not_resolved
        content["measure_seconds"] = {family: round(seconds, 2) for family, seconds in state.measure_seconds.items()}
        took = sum(state.measure_seconds.values())  # beside the rest of the run, as the budget is counted
        content["measure_share"] = round(took / max(content["seconds"] - took, 0.01), 4)
        content["measure_share_counted"] = round(state.plan.get("share", 0.0), 4)
    record.guard("summary.json", lambda: record.summary(**content))
    return content


def print_plan(job, record: Record, label_noise: str) -> None:
    """The lines before the progress bar: what will run, and on which labels."""
    if record.active:
        args, device = job.args, str(job.fabric.device)
        if device == "cpu":
            device += f" ({', '.join(cpu_features()[:1]) or 'no AVX2'})"
        print(
            f"{args.model} on {args.dataset}: {counted(len(job.train), 'training example')}, {counted(job.total_steps, 'step')} of {args.bs}, "
            f"{args.precision} on {device} with {counted(args.threads, 'thread')} -> {record.folder}\n{label_noise}",
            flush=True,
        )
        if args.dataset not in DATASETS:
            size = sum(images.nbytes for images in (job.train.images, job.val[0], job.test[0]))
            print(
                f"memory: {memory.format_bytes(size)} for the images; network and activations come on top", flush=True
            )
        fast = [name for name in ("compile", "graph") if getattr(args, name) == "on"]
        if fast:
            print(f"plain steps: {' and '.join(fast)}; their gradient is compared with the eager one first", flush=True)
        last_lr, _ = job.course.at(job.total_steps - 1)
        line, cut_short = schedules.describe_span(record.config["resolved"]["schedule"], args.lr, last_lr)
        line += left_out(job)
        print(line, flush=True)
        optimizer, usual = args.optimizer, OPTIMIZERS[args.optimizer].usual_lr
        large = f"warning: --lr {args.lr:g} is large for --optimizer {optimizer}, whose usual rate is about {usual:g}"
        for warning in (
            large if args.lr > 30 * usual else None,
            cut_short,
            full_resolution(args.model, job.train.images),
        ):
            if warning:
                record.say(warning)
        if args.measure == "split":
            print(split_plan(job), flush=True)
        plan = job.state.plan
        if plan and args.measure == "full":
            planned = describe_plan(plan, job.steps_per_epoch)
            more = ", more than --measure-budget, to measure each once" * (plan["share"] > args.measure_budget)
            grown = plan["total_steps"] != job.total_steps
            origin = f"step {plan['total_steps']}" if grown else "the end"
            print(
                f"full measurements, back from {origin}: {planned}; {plan['share']:.1%} of the run, counted{more}",
                flush=True,
            )


def full_resolution(model: str, images: data.Images) -> str | None:
    """A warning for images that are too large for ResNet-18 with the stem for small ones."""
    times = images.H * images.W / 32**2
    if model != "resnet18" or times <= 4:
        return None
    return (
        f"warning: --model resnet18 is made for small images and takes {times:.0f} times as long for one of {images.H} x "
        f"{images.W} pixels as for one of 32 x 32; torchvision:resnet18 is made for large ones"
    )


def describe_plan(plan: dict, steps_per_epoch: int) -> str:
    """How often `epochwise.plan_full` has each measured, in words."""
    times = dict.fromkeys(epochwise.MEASURES, math.ceil(plan["total_steps"] / steps_per_epoch) + 1)
    units = {"steps": "step"} | {name: entry.unit for name, entry in epochwise.MEASURES.items()}
    times["steps"] = plan["total_steps"]
    often = {n: "once" if plan[n] >= times[n] else every(plan[n], unit) for n, unit in units.items() if plan.get(n)}
    return ", ".join(f"{name} {how}" for name, how in often.items()) or "none"


def left_out(job) -> str:
    """The end of the line on the schedule: which steps `--end schedule` leaves out."""
    if job.args.end == "epochs":
        return ""
    steps = job.whole_steps - job.total_steps
    if not steps:
        return "; --end schedule leaves out nothing"
    epochs, args = round(steps / job.steps_per_epoch, 4), job.args
    lr, _ = schedules.schedule(args.sched, job.total_steps, job.sched_steps, args.lr, args.momentum)
    return f"; --end schedule leaves out the {steps:,} steps ({epochs:g} epochs) that would follow, at lr {lr:.3g}"


def split_plan(job) -> str:
    """The line on what `--measure split` measures when, and what that costs, counted."""
    args, probe = job.args, job.state.plan.get("probe")
    masks = "no random masks"
    if args.permutations:
        masks = f"{counted(args.permutations, 'random mask')} {every(args.measure_every * args.null_every, 'step')}"
    line = f"measured: clean and noisy gradients {every(args.measure_every, 'step')}, {masks}; {measure.split_share(args):.1%} of the steps, counted"
    if probe:
        often = every(probe, "epoch") + ", back from the end" * (probe > 1)
        return f"{line}; probe {often}, {job.state.plan['share']:.1%} of the run"
    return f"{line}; probe left out (raise --measure-budget)" if job.train.noisy.any() else line


def print_results_table(ledger: dict, summary: dict, folder: Path) -> None:
    """Print what a finished run has reached: accuracies, realised noise, time and folder."""
    best = summary["best_val_acc"] or 0.0
    shown = {
        "validation accuracy": f"{summary['val_acc']:.4f} (best {best:.4f})",
        "test accuracy": f"{summary['test_acc']:.4f}",
        "noise, nominal / realised": f"{ledger['nominal']:.4f} / {ledger['realised']:.4f}",
    }
    if summary["train_acc_noisy"] is not None:
        shown["accuracy on noisy examples"] = f"{summary['train_acc_noisy']:.4f} (last ten measured steps)"
    shown["steps / examples"] = f"{summary['steps']} / {summary['examples']}"
    speed = f", {summary['images_per_second']:.0f} images/s" if summary["images_per_second"] else ""
    shown["time"] = f"{summary['seconds']:.1f} s{speed}, peak memory {summary['peak_memory_mb']:.0f} MB"
    if "measure_seconds" in summary:
        took = ", ".join(f"{family} {seconds:.1f} s" for family, seconds in summary["measure_seconds"].items())
        shares = f"{summary['measure_share']:.1%} of the run, counted {summary['measure_share_counted']:.1%}"
        shown["full measurements"] = f"{took} ({shares})"
    shown["folder"] = str(folder)
    width = max(map(len, shown))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in shown.items()), flush=True)
