"""What a run of train.py takes, said before it starts: steps, tokens, FLOPs, memory, disk.

    python train.py --plan --preset llama-7b --scale 16 --world_size 8 --device_memory 80

cost.py has the formulas; this file knows the flags.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
import cost
from cli import device_and_dtype, extension, format_bytes
from hf_config import extend
from model import LLaMAConfig
from parallel import choose_dist, least_over_processes, processes, states
from recipe import batch_parts
from trainlog import duration

MICRO_BATCH_TOKENS = 16384  # tokens at a time on one process, where memory allows
MEASURED_TOKENS = 1024  # at most so many tokens are enough to measure a CPU's speed
SLOW_STEP = 1e12  # FLOPs of a step that takes a CPU some ten seconds or more


class Machine(NamedTuple):
    """What one process has to run on."""

    device_type: str
    dtype: torch.dtype
    free: float  # bytes of memory that are free for it, and equal on all processes


def machine_here(device: torch.device, dtype: torch.dtype) -> Machine:
    """This machine; the processes on it share the memory of its CPU."""
    free = cost.free_memory(device)
    if device.type == "cpu":
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Machine(device.type, dtype, least_over_processes(free))


def planned_machine(args: argparse.Namespace) -> Machine:
    """What --plan is about: this machine, or with --device_memory a GPU that isn't here."""
    if args.device_memory is None:
        return machine_here(*device_and_dtype(args.device, args.dtype))
    dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    return Machine("cuda", dtype, args.device_memory * 1e9)


# ---- memory --------------------------------------------------------------------------------------


def micro_batches_of(args: argparse.Namespace, world: int) -> tuple[int, int]:
    """Rows of a micro batch on one process, and the number of micro batches of a step."""
    rows = args.batch_size // world
    size = min(args.micro_batch_size, rows)
    return size, -(-rows // size)


def planned_config(args: argparse.Namespace) -> LLaMAConfig:
    """The config that --plan is about; a preset stands for a checkpoint of its shape."""
    if args.init != "scratch":
        return checkpoint.read_config(args.init, **extension(args))
    return extend(LLaMAConfig.preset(args.preset), args.scale, args.rope)


def choose_engine(
    args: argparse.Namespace, config: LLaMAConfig, world: int, available: float
) -> tuple[str, str]:
    """How processes share the model: "alone", "ddp" or "fsdp"; and why, if it was not given."""
    if world == 1:
        return "alone", ""
    if args.dist is not None:
        return args.dist, ""
    return choose_dist(config, available)


def longest_row(args: argparse.Namespace, config: LLaMAConfig) -> int:
    """Tokens of the longest row of a step."""
    return max(part.length for part in batch_parts(args, config))


def choose_micro_batch(
    args: argparse.Namespace, config: LLaMAConfig, world: int, machine: Machine
) -> None:
    """Set --micro_batch_size and --checkpoint_activations where they are not given.

    Where memory is short, micro batches are made smaller first, which costs no time, and then
    activations are recomputed. Where nothing fits, what takes least is set.
    """
    sizes = [args.micro_batch_size]
    if args.micro_batch_size is None:
        sizes = halvings(max(1, MICRO_BATCH_TOKENS // longest_row(args, config)))
    modes = [args.checkpoint_activations]
    if args.checkpoint_activations is None:
        modes = cost.ACTIVATIONS
    for mode in modes:
        for size in sizes:
            args.checkpoint_activations = mode
            args.micro_batch_size = size
            needed = memory_needed(args, config, world, machine)
            if cost.verdict(needed, machine.free) == "fits":
                return


def halvings(number: int) -> list[int]:
    """The number, half of it, and so on down to 1."""
    numbers = [number]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    return numbers


def memory_needed(
    args: argparse.Namespace, config: LLaMAConfig, world: int, machine: Machine
) -> float:
    """Bytes that one process needs at the peak of a step."""
    engine, _ = choose_engine(args, config, world, machine.free)
    micro_batch_size, micro_batches = micro_batches_of(args, world)
    needed = cost.memory(
        config, micro_batch_size * longest_row(args, config), processes=world, dist=engine,
        dtype=machine.dtype, device_type=machine.device_type,
        checkpoint_activations=args.checkpoint_activations, micro_batches=micro_batches
    )
    return needed["peak"]


# ---- disk ----------------------------------------------------------------------------------------


def disk_needed(
    args: argparse.Namespace, config: LLaMAConfig, out: Path, save_dtype: torch.dtype
) -> int:
    """Bytes that the run adds to its folder."""
    # The last two states are kept while a third is written. Each has 12 bytes a parameter: the
    # weight and AdamW's two moments in float32 (Muon has one moment, so it takes less). A resumed
    # run has some of them already.
    most_states = min(3, 1 + args.max_iters // args.save_every)
    new_states = max(1, most_states - len(states(out)))
    # The weights at the end, and those of --save_at
    copies = 1
    for step in args.save_at:
        if not (out / f"step-{step}").exists():
            copies += 1
    return (12 * new_states + save_dtype.itemsize * copies) * config.n_params


def free_disk(out: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


# ---- before a run --------------------------------------------------------------------------------


def check_room(
    args: argparse.Namespace, config: LLaMAConfig, out: Path, machine: Machine,
    save_dtype: torch.dtype
) -> None:
    """Refuse a run that memory or disk can't hold. Raises ValueError naming the flags that help."""
    needed = memory_needed(args, config, processes(), machine)
    if needed > machine.free:
        raise ValueError(
            f"a step needs about {format_bytes(needed)} of memory, and {format_bytes(machine.free)}"
            f" are free: {memory_help(args, machine)}; --force tries all the same"
        )
    needed = disk_needed(args, config, out, save_dtype)
    free = free_disk(out)
    if needed > free:
        raise ValueError(
            f"the run writes about {format_bytes(needed)} to {out}, and {format_bytes(free)} are "
            "free there: give an --out on another disk, fewer steps in --save_at or --save_dtype "
            "bfloat16; --force tries all the same"
        )


def memory_help(args: argparse.Namespace, machine: Machine) -> str:
    """The flags that would lower the memory of a step."""
    ways = []
    if args.micro_batch_size > 1:
        ways.append("--micro_batch_size 1")
    if args.checkpoint_activations != "full":
        ways.append("--checkpoint_activations full")
    if machine.device_type == "cuda":
        ways.append("torchrun with --dist fsdp on more GPUs")
    if args.init == "scratch":
        ways.append("a smaller --preset")
    else:
        ways.append("a smaller --scale")
    return "give " + " or ".join(ways)


def plan(
    args: argparse.Namespace, config: LLaMAConfig, world: int, machine: Machine
) -> str:
    """The text of --plan."""
    engine, _ = choose_engine(args, config, world, machine.free)
    micro_batch_size, micro_batches = micro_batches_of(args, world)
    text = cost.report(
        config, steps=args.max_iters, batch_size=args.batch_size, micro_batch_size=micro_batch_size,
        row_tokens=args.row_tokens, longest_row=longest_row(args, config),
        micro_batches=micro_batches,
        flops=args.max_iters * cost.step_flops(config, batch_parts(args, config)),
        processes=world, dist=engine, dtype=machine.dtype, device_type=machine.device_type,
        checkpoint_activations=args.checkpoint_activations, available=machine.free
    )
    # The dtype of the kept weights may be that of --init, whose weights are not opened here
    disk = disk_needed(args, config, Path(args.out or "out"), torch.float32)
    text += f"\ndisk: at most about {format_bytes(disk)}"
    if machine.device_type == "cpu":
        text += f"\ntime: {time_on_cpu(args, config, world, machine.dtype, args.max_iters)}"
    return text


def time_on_cpu(
    args: argparse.Namespace, config: LLaMAConfig, world: int, dtype: torch.dtype, steps: int
) -> str:
    """How long so many steps take on this machine's CPU, by the speed of one of the model's blocks."""
    tokens = min(longest_row(args, config), MEASURED_TOKENS)
    rate = cost.measured_flops(
        config, 1, tokens, args.checkpoint_activations, torch.device("cpu"), dtype
    )
    # This process has measured with its own threads; the others may have as many cores each
    cores = os.cpu_count() or 1
    rate *= max(1, min(world, cores // torch.get_num_threads()))
    flops = steps * cost.step_flops(config, batch_parts(args, config))
    return time_at(flops, rate)


def time_at(flops: float, rate: float) -> str:
    """The time that so many FLOPs take at a rate that a block of the model has reached."""
    return (
        f"at least {duration(flops / rate)} at {rate / 1e9:,.0f} GFLOP/s, which a block of the "
        "model has just reached here"
    )


def announce(
    args: argparse.Namespace, config: LLaMAConfig, out: Path, device: torch.device,
    machine: Machine, save_dtype: torch.dtype, notes: list[str], step: int = 0
) -> None:
    """Say on standard error what is about to run.

    notes: what to know of its settings.  step: the steps that are done already.
    """
    engine, reason = choose_engine(args, config, processes(), machine.free)
    lines = [title(args, config, out, device, machine.dtype, engine), *notes]
    if reason:
        lines.append(f"--dist {engine}: {reason}")
    lines.append(memory_line(args, config, machine))
    disk = disk_needed(args, config, out, save_dtype)
    lines.append(f"disk: about {format_bytes(disk)} of {format_bytes(free_disk(out))} free")
    # The progress bar says how long the run takes, after a few steps. Where steps are slow, nobody
    # should have to wait for that.
    flops = cost.step_flops(config, batch_parts(args, config))
    if machine.device_type == "cpu" and flops > SLOW_STEP:
        steps = args.max_iters - step
        time = time_on_cpu(args, config, processes(), machine.dtype, steps)
        lines.append(f"time: {time}; fewer --max_iters, a smaller --batch_size take less")
    if save_dtype != torch.float32:
        name = str(save_dtype).removeprefix("torch.")
        lines.append(f"--save_dtype {args.save_dtype}: weights are written in {name}")
    print("\n".join(lines), file=sys.stderr)


def memory_line(args: argparse.Namespace, config: LLaMAConfig, machine: Machine) -> str:
    """What a step takes of the memory of this process, and how it is cut to fit."""
    needed = memory_needed(args, config, processes(), machine)
    rows, _ = micro_batches_of(args, processes())
    line = f"memory: about {format_bytes(needed)} of {format_bytes(machine.free)} free a process, "
    line += cost.verdict(needed, machine.free)
    line += f" ({rows} x {longest_row(args, config):,} tokens at a time, "
    return line + f"activations recomputed: {args.checkpoint_activations})"


def title(
    args: argparse.Namespace, config: LLaMAConfig, out: Path, device: torch.device,
    dtype: torch.dtype, engine: str
) -> str:
    """What is about to run, in one line."""
    line = f"{args.init} -> {out}: {config.n_params / 1e6:,.2f} M parameters, window "
    if args.init == "scratch":
        line += f"{config.block_size}; "
    else:
        line += f"{config.original_window} -> {config.block_size} by rope {config.rope!r}; "
    line += f"{args.max_iters} steps of {args.batch_size} x {args.row_tokens} tokens"
    if args.row_tokens < config.block_size and not args.no_skip:
        line += " with skipped positions"
    line += " on "
    line += f"{processes()} x {device}"
    if engine != "alone":
        line += f" ({engine})"
    return line + f", {str(dtype).removeprefix('torch.')}"


def closing_line(
    args: argparse.Namespace, out: Path, step: int, finished: bool, device: torch.device
) -> str:
    """What to do after the run, and on a GPU the most memory that it used."""
    if not finished:
        launch = "python"
        if "LOCAL_WORLD_SIZE" in os.environ:
            launch = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
        command = f"{launch} train.py --resume --out {out}"
        return f"stopped at step {step}, saved; go on with: {command}"
    line = f"{out}: done, {step} steps"
    if device.type == "cuda":
        line += f", {format_bytes(torch.cuda.max_memory_allocated(device))} at most"
    if args.summary_field:
        return line + f"; next: python summarize.py --init {out}"
    evaluation = f"python eval_ppl.py --init {out}"
    if args.data:
        evaluation += f" --data {' '.join(args.data)} --split val"
    return line + f"; next: {evaluation}; python passkey.py --init {out}"
