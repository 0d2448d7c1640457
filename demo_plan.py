"""What demo.py does where its flags are not given, and what it takes, said before it starts.

Rows of training text are short: Position Interpolation needs no long ones. A tiny model shows much
in minutes, so it is extended far and measured often. A larger one is measured seldom, so that the
demo ends within hours on a CPU.
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
import cost
import eval_ppl
import plan
import train_flags
from model import LLaMAConfig
from recipe import TINY_PARAMS, batch_parts
from train_flags import SHIPPED_BASE
from trainset import Part

# ---- the defaults --------------------------------------------------------------------------------


class Defaults(NamedTuple):
    """Flags of demo.py, by their names, where the model and the device decide."""

    scale: float
    row_tokens: int | None  # at most the original window; None: as many as that
    steps: list[int]
    distances: int
    tries: int
    documents: int


TINY = Defaults(4.0, None, [25, 50, 100, 200], distances=16, tries=10, documents=16)
LARGER_ON_CPU = Defaults(2.0, 1024, [10, 20, 40], distances=4, tries=1, documents=1)
LARGER_ON_GPU = Defaults(2.0, 2048, [50, 100, 200], distances=8, tries=5, documents=8)


def by_size(name: str) -> str:
    """What --help says of a default."""
    tiny = in_words(getattr(TINY, name))
    on_cpu = in_words(getattr(LARGER_ON_CPU, name))
    on_gpu = in_words(getattr(LARGER_ON_GPU, name))
    size = f"above {TINY_PARAMS / 1e6:g} M parameters"
    return f"default: {tiny}; {size} {on_cpu} on a CPU, {on_gpu} on a GPU"


def in_words(value: float | list[int] | None) -> str:
    """A default as --help has it."""
    if value is None:
        return "the original window"
    if isinstance(value, list):
        return ",".join(str(number) for number in value)
    return f"{value:g}"


def settle(args: argparse.Namespace, config: LLaMAConfig, device: torch.device) -> None:
    """Give the flags that are missing their values, and add what has no flag.

    config: the base's.  Added are the stride of perplexity, warmup_iters (None: as train.py has
    it), the processes that train, and whether they skip positions.
    """
    window = config.original_window
    tiny = config.n_params <= TINY_PARAMS
    defaults = TINY
    if not tiny:
        defaults = LARGER_ON_CPU if device.type == "cpu" else LARGER_ON_GPU
    defaults = defaults._replace(row_tokens=min(defaults.row_tokens or window, window))
    for name, value in defaults._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    if tiny:
        args.stride = min(256, window // 2)
        args.warmup_iters = None
        args.processes = tiny_processes(device)
        # Every position of the fine-tune is one that the base knows. This shows most plainly what
        # PI needs to be taught, and what direct fine-tuning needs.
        args.skip = False
    else:
        # A short stride would read a long document dozens of times
        args.stride = window // 2
        # The paper's 20 steps would be half of so short a run
        args.warmup_iters = min(20, args.steps[-1] // 8)
        # Each process would hold the whole model
        args.processes = 1
        # Positions skip, so that short rows show both methods all distances of the extended window
        args.skip = True


def tiny_processes(device: torch.device) -> int:
    """How many processes train a tiny model: on a CPU with several cores two or four.

    They share each batch. For so small a model two processes are faster than two threads of one.
    """
    cores = os.cpu_count() or 1
    if device.type != "cpu" or cores < 2:
        return 1
    if cores < 4:
        return 2
    return 4


def threads_of_process(processes: int) -> int:
    """The threads of each process that trains on a CPU."""
    return max(1, (os.cpu_count() or 1) // processes)


# ---- the runs of train.py ------------------------------------------------------------------------

METHODS = {"PI": "linear", "direct": "none", "NTK": "ntk", "YaRN": "yarn"}  # name: its --rope


def methods(args: argparse.Namespace) -> dict[str, str]:
    """The methods to fine-tune by, and the --rope of each."""
    chosen = dict(METHODS)
    if not args.all:
        del chosen["NTK"], chosen["YaRN"]
    return chosen


def base_folder(args: argparse.Namespace, seed: int) -> Path:
    """The base: a tiny model that is pre-trained here, or a checkpoint."""
    if args.scratch:
        return Path(args.out) / f"seed-{seed}" / "base"
    return Path(args.init or SHIPPED_BASE)


def training_flags(args: argparse.Namespace, seed: int) -> list[str]:
    """The flags of each run of train.py."""
    flags = ["--seed", str(seed), "--device", args.device]
    if args.data:
        flags += ["--data"] + args.data
    return flags


def pretraining_flags(args: argparse.Namespace, seed: int) -> list[str]:
    """The flags of the run of train.py that makes the base."""
    flags = training_flags(args, seed) + ["--init", "scratch"]
    if args.base_steps:
        flags += ["--max_iters", str(args.base_steps)]
    return flags


def fine_tuning_flags(args: argparse.Namespace, seed: int, rope: str) -> list[str]:
    """The flags of a run of train.py that extends the base."""
    flags = training_flags(args, seed)
    flags += ["--init", str(base_folder(args, seed)), "--scale", f"{args.scale:g}"]
    flags += ["--max_iters", str(args.steps[-1])]
    flags += ["--save_at", ",".join(str(steps) for steps in args.steps)]
    flags += ["--row_tokens", str(args.row_tokens)]
    if not args.skip:
        flags.append("--no_skip")
    if args.warmup_iters is not None:
        flags += ["--warmup_iters", str(args.warmup_iters)]
    return flags + ["--rope", rope]


def base_config(args: argparse.Namespace) -> LLaMAConfig:
    """The config of the base."""
    if args.scratch:
        return LLaMAConfig.preset("tiny")
    return checkpoint.read_config(args.init or SHIPPED_BASE)


# ---- the plan ------------------------------------------------------------------------------------


class Training(NamedTuple):
    """A run of train.py: all its flags with their values, the config of its model, the machine."""

    args: argparse.Namespace
    config: LLaMAConfig
    machine: plan.Machine

    @property
    def flops(self) -> float:
        parts = batch_parts(self.args, self.config)
        return self.args.max_iters * cost.step_flops(self.config, parts)

    @property
    def steps(self) -> str:
        """The steps and their rows, in words."""
        rows = [rows_in_words(part) for part in batch_parts(self.args, self.config)]
        return f"{self.args.max_iters:,} steps of {' and '.join(rows)}"


def rows_in_words(part: Part) -> str:
    """The rows of one part of a batch."""
    text = f"{part.rows} x {part.length:,} tokens"
    if part.reach > part.length:
        text += f" (positions skip through {part.reach:,})"
    return text


def planned_training(
    flags: list[str], config: LLaMAConfig, processes: int, device: torch.device, dtype: torch.dtype
) -> Training:
    """What train.py makes of its flags. Raises ValueError, as it does, for what can't be run.

    config: of the model that is trained.
    """
    args = train_flags.parse("", flags)
    machine = plan.machine_here(device, dtype)
    machine = machine._replace(free=machine.free / processes)
    train_flags.settle_flags(args, config, processes, machine)
    return Training(args, config, machine)


def evaluation_flops(args: argparse.Namespace, config: LLaMAConfig) -> float:
    """FLOPs of demo.evaluate for one checkpoint, if there are as many documents as --documents.

    config: of the extended model.
    """
    long = config.block_size
    tokens = max(args.max_tokens, long - 1)  # of each document
    flops = 0.0
    for window in eval_ppl.doublings(config):
        spans = eval_ppl.sliding_spans(0, tokens, window, args.stride, has_bos=True)
        read = args.documents * sum(span.end - span.start for span in spans)
        flops += read * cost.flops_per_token(config, window, training=False)
    # The extended window is also read by position, and once for each passkey
    windows = args.documents * (tokens // (long - 1)) + args.distances * args.tries
    return flops + windows * long * cost.flops_per_token(config, long, training=False)


def plan_text(
    args: argparse.Namespace, fine_tune: Training, pretraining: Training | None,
    device: torch.device
) -> str:
    """What will be done, and how long the arithmetic of it takes.

    fine_tune: that of PI; the others take as much.  pretraining: with --scratch, else None.
    """
    config = fine_tune.config
    lines = [
        f"plan: {config.n_params / 1e6:,.1f} M parameters, window {config.original_window:,} -> "
        f"{config.block_size:,}, on {device}"
    ]
    if len(args.seeds) > 1:
        lines[0] += f"; for each of {len(args.seeds)} seeds:"

    # The stages and their FLOPs. The base is measured twice, and each fine-tune at each look.
    flops = 0.0
    if pretraining is not None:
        flops += pretraining.flops
        lines.append(f"  the base: {pretraining.steps}, {pretraining.flops:.1e} FLOPs")
    names = methods(args)
    tuning = len(names) * fine_tune.flops
    lines.append(f"  {' and '.join(names)}, each {fine_tune.steps}, {tuning:.1e} FLOPs together")
    evaluations = 2 + len(names) * len(args.steps)
    reading = evaluations * evaluation_flops(args, config)
    lines.append(
        f"  {evaluations} evaluations (--documents {args.documents} --distances {args.distances} "
        f"--tries {args.tries}), {reading:.1e} FLOPs together"
    )
    flops += tuning + reading
    if args.processes == 1:
        lines.append("  " + plan.memory_line(fine_tune.args, config, fine_tune.machine))

    # The time by the speed of a block. On a CPU one row is enough to measure it.
    rows = fine_tune.args.micro_batch_size
    if device.type == "cpu":
        rows = 1
    # Where several processes train, each has a part of the cores. Their speeds add up.
    threads = torch.get_num_threads()
    if args.processes > 1:
        torch.set_num_threads(threads_of_process(args.processes))
    rate = args.processes * cost.measured_flops(
        config, rows, fine_tune.args.row_tokens, fine_tune.args.checkpoint_activations, device,
        fine_tune.machine.dtype
    )
    torch.set_num_threads(threads)
    time = plan.time_at(len(args.seeds) * flops, rate)
    lines.append(f"  {time}; stages that are kept take none")
    return "\n".join(lines)
