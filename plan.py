"""What a run of train.py takes, said before it starts: steps, tokens, FLOPs, memory.

    python train.py --plan --preset llama-7b --scale 16 --world_size 8 --device_memory 80

cost.py has the formulas; this file knows the flags.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

import checkpoint
import cost
from cli import device_and_dtype, extension, format_bytes
from hf_config import extend
from model import LLaMAConfig
from parallel import choose_dist, processes
from trainset import Part


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


def plan(args: argparse.Namespace, config: LLaMAConfig, world: int, parts: list[Part]) -> str:
    """The text of --plan. parts: what the global batch of a step is made of."""
    # the device: this machine's, or a GPU that isn't here
    device, dtype = device_and_dtype(args.device, args.dtype)
    device_type = device.type
    available = cost.device_memory(device)
    if args.device_memory:
        device_type = "cuda"
        available = args.device_memory * 1e9
        dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    engine, _ = choose_engine(args, config, world, available)
    micro_batch_size, micro_batches = micro_batches_of(args, world)
    return cost.report(
        config, steps=args.max_iters, batch_size=args.batch_size, micro_batch_size=micro_batch_size,
        row_tokens=args.row_tokens, longest_row=max(part.length for part in parts),
        micro_batches=micro_batches, flops=args.max_iters * cost.step_flops(config, parts),
        processes=world, dist=engine, dtype=dtype, device_type=device_type,
        checkpoint_activations=args.checkpoint_activations, available=available
    )


def memory_line(
    args: argparse.Namespace, config: LLaMAConfig, parts: list[Part], device: torch.device,
    dtype: torch.dtype, engine: str
) -> str:
    """What a run is about to take of this process's device."""
    available = process_memory(device)
    micro_batch_size, micro_batches = micro_batches_of(args, processes())
    longest = max(part.length for part in parts)
    needed = cost.memory(
        config, micro_batch_size * longest, processes=processes(), dist=engine, dtype=dtype,
        device_type=device.type, checkpoint_activations=args.checkpoint_activations,
        micro_batches=micro_batches
    )
    line = f"memory: about {format_bytes(needed['peak'])} of {format_bytes(available)} a process, "
    return line + cost.verdict(needed["peak"], available)


def process_memory(device: torch.device) -> float:
    """Bytes that a process may use; the processes of one machine share its CPU memory."""
    available = cost.device_memory(device)
    if device.type == "cpu":
        available /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return available


def choose_engine(
    args: argparse.Namespace, config: LLaMAConfig, world: int, available: float
) -> tuple[str, str]:
    """How processes share the model: "alone", "ddp" or "fsdp"; and why, if it was not given."""
    if world == 1:
        return "alone", ""
    if args.dist is not None:
        return args.dist, ""
    return choose_dist(config, available)


def announce(
    args: argparse.Namespace, config: LLaMAConfig, parts: list[Part], out: Path,
    device: torch.device, dtype: torch.dtype, engine: str, reason: str
) -> None:
    """Say on standard error what is about to run."""
    print(title(args, config, out, device, dtype, engine), file=sys.stderr)
    if reason:
        print(f"--dist {engine}: {reason}", file=sys.stderr)
    print(memory_line(args, config, parts, device, dtype, engine), file=sys.stderr)


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
        command = f"python train.py --resume --out {out}"
        return f"stopped at step {step}, saved; go on with: {command}"
    line = f"{out}: done, {step} steps"
    if device.type == "cuda":
        line += f", {format_bytes(torch.cuda.max_memory_allocated(device))} at most"
    if args.summary_field:
        return line + f"; next: python summarize.py --init {out}"
    return line + f"; next: python eval_ppl.py --init {out}; python passkey.py --init {out}"
