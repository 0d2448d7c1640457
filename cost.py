"""What a run costs, before it starts: FLOPs, memory per device, time.

    python train.py --plan --preset llama-7b --scale 16 --world_size 8 --device_memory 80

`train.py --plan` prints `report`. train.py and bench.py also take the figures from here that make
MFU (model FLOPs utilization): the FLOP/s of the model's arithmetic over those of the device.
"""

import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cli import autocast, format_bytes
from loss import CHUNK_LOGITS
from model import LLaMA, LLaMAConfig

# Dense bf16 FLOP/s of a device, from the vendors' data sheets, by a part of its name. The first
# part that is found in the name counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


MEASURED_SECONDS = 0.5  # how long measured_flops measures, at least one step

# What --checkpoint_activations may be, the fastest first
ACTIVATIONS = ("none", "selective", "full")


class MFU(NamedTuple):
    """The MFU to plan with, and the range of what others have reached."""

    low: float
    expected: float
    high: float


# The MFU of training in bf16, by the window: published tokens per second times `flops_per_token`,
# over the data sheet's FLOP/s. For 7B on H100s, llm-foundry's tables (its file
# scripts/train/benchmarking/README.md) give 45%, 33% and 22%. For 8B on H100s, compiled, torchtitan
# gives 35% at 8,192.  low: the least in those tables for 7B to 70B on H100s.  high: 7B on A100s.
PUBLISHED_MFU = {
    2048: MFU(0.35, 0.40, 0.60),
    8192: MFU(0.28, 0.33, 0.48),
    32768: MFU(0.22, 0.25, 0.35),
}

# ---- arithmetic ----------------------------------------------------------------------------------


def block_params(config: LLaMAConfig) -> int:
    """The number of parameters of one block."""
    embedding = config.vocab_size * config.n_embd
    head = 0 if config.tie_embeddings else embedding
    last_norm = config.n_embd
    return (config.n_params - embedding - head - last_norm) // config.n_layer


def flops_per_token(config: LLaMAConfig, length: int, training: bool = True) -> float:
    """FLOPs that the model needs per token of a sequence of `length` tokens.

    training: of the forward and the backward pass; else of the forward pass alone.

    What --checkpoint_activations computes a second time does not count, because MFU is about the
    arithmetic of the model and not about that of the hardware.
    """
    # A matrix takes a multiplication and an addition for each weight. The embedding is a look-up
    # and takes none, and a block's two norms take next to nothing.
    block_matrices = block_params(config) - 2 * config.n_embd
    head = config.vocab_size * config.n_embd
    matrices = 2 * (config.n_layer * block_matrices + head)

    # In each head, the product of a query with a key takes 2 D, and so does adding up the key's
    # value. Only the causal half counts: a token attends to (length + 1) / 2 keys on average.
    keys = (length + 1) / 2
    attention = config.n_layer * config.n_head * 4 * config.head_dim * keys

    forward = matrices + attention
    if not training:
        return forward
    # The backward pass takes twice as much: the gradients of the inputs and those of the weights
    return 3 * forward


def step_flops(config: LLaMAConfig, parts: list) -> float:
    """FLOPs of a training step over all processes.

    parts: those of the global batch, each with its `rows` and the `length` of a row.
    """
    flops = 0.0
    for part in parts:
        flops += part.rows * part.length * flops_per_token(config, part.length)
    return flops


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 FLOP/s of a GPU by its data sheet; None for others and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{part}\b", name):
            return flops
    return None


def expected_mfu(length: int) -> MFU:
    """The MFU to expect in training at a window, with the range that is published.

    PUBLISHED_MFU, interpolated over the logarithm of the window; beyond its ends, that of the end.
    """
    log_windows = np.log2(list(PUBLISHED_MFU))
    columns = zip(*PUBLISHED_MFU.values())  # all low ones, all expected ones, all high ones
    values = [np.interp(np.log2(length), log_windows, column) for column in columns]
    return MFU(*map(float, values))


def measured_flops(
    config: LLaMAConfig, rows: int, length: int, checkpoint_activations: str, device: torch.device,
    dtype: torch.dtype
) -> float:
    """FLOP/s that a device reaches now, in the fastest of a few training steps of one block.

    rows, length: of a micro batch.  dtype: what autocast computes in.
    """
    # The head is left small, because one block beside the whole head would not be typical
    small = replace(config, n_layer=1, vocab_size=min(config.vocab_size, 1024))
    model = LLaMA(small).to(device)
    model.checkpoint_activations = checkpoint_activations
    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)

    def step() -> None:
        with autocast(device, dtype):
            loss = model(ids, ids)
        loss.backward()
        loss.item()  # waits for the device

    step()  # the first one is slower: memory is allocated, and kernels are loaded
    seconds = []
    while sum(seconds) < MEASURED_SECONDS:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    # Other work on the machine may hold up any step, so the fastest one counts
    return rows * length * flops_per_token(small, length) / min(seconds)


# ---- memory --------------------------------------------------------------------------------------


def memory(
    config: LLaMAConfig, tokens: int, *, processes: int = 1, dist: str = "ddp",
    dtype: torch.dtype = torch.float32, checkpoint_activations: str = "none",
    device_type: str = "cpu", micro_batches: int = 1
) -> dict[str, float]:
    """Bytes on each device in a training step with AdamW. With Muon it takes less.

    tokens: of one micro batch.  micro_batches: in a step, on one process.
    dist: "fsdp" divides weights, gradients and moments among the processes and computes everything
    in dtype. With "ddp" weights are float32, and autocast computes in dtype.

    Returns {"weights", "optimizer", "gradients", "activations", "loss", "peak"}. The peak is less
    than the sum, because the gradients come as the activations go. CUDA's context and the
    allocator's gaps (1 to 2 GB) are not in it.
    """
    b = dtype.itemsize
    fsdp = dist == "fsdp"
    ddp = not fsdp and processes > 1
    shards = processes if fsdp else 1
    head = config.vocab_size * config.n_embd  # parameters of the head; the embedding has as many

    weights = weight_memory(config, b, fsdp, shards)
    moments = 2 * 4 * config.n_params / shards  # AdamW's two, in float32

    gradients = 4 * config.n_params / shards  # float32; with DDP they are views of its buckets
    # FSDP also has one block's whole gradient, in dtype and in float32 for the sum over processes
    block_gradient = (b + 4) * block_params(config) if fsdp else 0

    kept, recomputed = activation_memory(config, tokens, b, fsdp, checkpoint_activations)
    # The backward pass of an MLP has the gradients of silu(gate) and of up beside all that was kept
    mlp_gradients = 2 * b * tokens * config.intermediate_size
    loss = loss_memory(config, tokens, b, device_type)

    # An earlier micro batch leaves all gradients, and DDP's buckets are there all the time
    held = gradients if micro_batches > 1 or ddp else 0
    # The peak is at one of three moments: at the loss; when the backward pass begins with the last
    # block, the head's gradient being there; or when it ends with the first block
    at_loss = held + kept + loss
    at_last_block = held + 4 * head + block_gradient + kept + recomputed + mlp_gradients
    at_first_block = gradients + block_gradient + recomputed + mlp_gradients
    return {
        "weights": weights,
        "optimizer": moments,
        "gradients": gradients + block_gradient,
        "activations": kept + recomputed,
        "loss": loss,
        "peak": weights + moments + max(at_loss, at_last_block, at_first_block),
    }


def weight_memory(config: LLaMAConfig, b: int, fsdp: bool, shards: int) -> float:
    """Bytes of the weights, of which one process holds 1 / shards.

    b: bytes of a number in dtype.
    """
    weights = 4 * config.n_params / shards  # in float32
    if fsdp:
        # Gathered in dtype: the block at work and the next one; embedding and head all the time
        head = config.vocab_size * config.n_embd
        embedding_and_head = head if config.tie_embeddings else 2 * head
        weights += b * (2 * block_params(config) + embedding_and_head)
    elif b < 4:
        # Autocast makes a copy of each matrix in dtype, and the backward pass reads it again
        weights += b * config.n_params
    return weights


def activation_memory(
    config: LLaMAConfig, tokens: int, b: int, fsdp: bool, checkpoint_activations: str
) -> tuple[int, int]:
    """Bytes that all blocks keep for the backward pass, and bytes that it recomputes at a time.

    b: bytes of a number in dtype.
    """
    residual = b if fsdp else 4  # of a number in the residual stream: autocast leaves it in float32
    block_input = residual * config.n_embd
    queries = config.n_head * config.head_dim
    keys_and_values = 2 * config.n_kv_head * config.head_dim

    # What one block keeps of each token: queries and keys after RoPE, and values. A norm keeps its
    # input, the normed input before the norm's weight, and its result, which the matrices read
    norm = (residual + residual + b) * config.n_embd
    # Attention's output, and a float32 log-sum-exp for each head
    attention = b * queries + 4 * config.n_head
    # In the MLP: gate, silu(gate), up, and their product
    mlp = b * 4 * config.intermediate_size
    everything = 2 * norm + b * (queries + keys_and_values) + attention + mlp

    if checkpoint_activations == "none":
        return tokens * config.n_layer * everything, 0
    # Only a block's input is kept, or that and attention's output. The backward pass recomputes the
    # rest, one block at a time.
    kept = block_input
    if checkpoint_activations == "selective":
        kept += attention
    return tokens * config.n_layer * kept, tokens * everything


def loss_memory(config: LLaMAConfig, tokens: int, b: int, device_type: str) -> int:
    """Bytes that loss.ChunkedCrossEntropy works with. b: bytes of a number in dtype."""
    head = config.vocab_size * config.n_embd
    chunk = CHUNK_LOGITS.get(device_type, CHUNK_LOGITS["cpu"])
    logits = min(tokens * config.vocab_size, chunk)
    hidden_gradient = b * tokens * config.n_embd
    # In float32: a chunk's logits, in whose place their gradient comes, and the head's gradient
    if b == 4:
        return 4 * logits + 4 * head + hidden_gradient
    # In a lower precision: a chunk's logits in dtype and in float32, and their gradient in dtype;
    # the head's gradient in float32, and a chunk's part of it in dtype
    return (b + 4 + b) * logits + (4 + b) * head + hidden_gradient


def verdict(peak: float, available: float) -> str:
    """Whether `peak` bytes fit into the available ones, and what helps if not."""
    if peak > available:
        return (
            "does not fit: a smaller --micro_batch_size, --checkpoint_activations, --dist fsdp "
            "or more devices help"
        )
    if peak >= 0.9 * available:
        return "may not fit: the allocator needs room too"
    return "fits"


# ---- the memory that is free ---------------------------------------------------------------------


def free_memory(device: torch.device) -> float:
    """Bytes of memory that are free: of a GPU, or of the machine for a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what this process has freed is free
        return torch.cuda.mem_get_info(device)[0]
    return free_cpu_memory()


def free_cpu_memory(root: Path = Path("/")) -> float:
    """Bytes that programs may still take; all that the machine has, where it isn't Linux.

    root: the folder that has Linux's folders proc and sys.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if available:
            free = 1024 * int(available[1])
    return min(free, container_memory(root))


class GroupFiles(NamedTuple):
    """Where Linux has the memory of control groups: a folder, and two files in that of a group."""

    mount: str
    limit: str
    used: str


# By the controllers in a line of /proc/self/cgroup: none in version 2 of control groups, and
# "memory" in version 1
GROUP_FILES = {
    "": GroupFiles("sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": GroupFiles(
        "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
    ),
}


def container_memory(root: Path) -> float:
    """Bytes that a container's limits leave to this process; infinite where there are none.

    The limits are those of the process's control group and of all groups above it.
    """
    least = math.inf
    own_groups = root / "proc/self/cgroup"
    if not own_groups.exists():
        return least
    for line in own_groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in GROUP_FILES:
            continue
        files = GROUP_FILES[controllers]
        group = root / files.mount / path.strip("/")
        for folder in (group, *group.parents):
            least = min(least, left_in_group(folder, files))
    return least


def left_in_group(folder: Path, files: GroupFiles) -> float:
    """Bytes that one control group leaves; infinite where it has no limit."""
    if not (folder / files.limit).exists():
        return math.inf
    limit = (folder / files.limit).read_text().strip()
    if limit == "max":
        return math.inf
    used = int((folder / files.used).read_text())
    # Files that were read count as used, but the system drops them when memory is short
    statistics = (folder / "memory.stat").read_text()
    cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", statistics, re.MULTILINE)
    return int(limit) - used + max(map(int, cached), default=0)


# ---- the plan ------------------------------------------------------------------------------------


def report(
    config: LLaMAConfig, *, steps: int, batch_size: int, micro_batch_size: int, micro_batches: int,
    flops: float, processes: int, dist: str, dtype: torch.dtype, device_type: str,
    checkpoint_activations: str, available: float, row_tokens: int | None = None,
    longest_row: int | None = None
) -> str:
    """The text of `train.py --plan`: tokens, FLOPs, hours and each device's memory.

    batch_size: rows in a step, of row_tokens each (None: of the window).  micro_batch_size: rows of
    longest_row tokens (None: of row_tokens) at a time on one process.
    micro_batches: in a step, on one process.  flops: of all steps together.
    available: bytes of memory of each device.
    """
    window = config.block_size
    row_tokens = row_tokens or window
    longest_row = longest_row or row_tokens
    tokens = steps * batch_size * row_tokens
    model = f"{config.n_params / 1e6:,.1f} M parameters"
    model += f", window {config.original_window:,} -> {window:,}"
    if config.rope != "none":
        model += f", by rope {config.rope!r} at scale {config.scale:g}"

    engine = dist if processes > 1 else "alone"
    dtype_name = str(dtype).removeprefix("torch.")
    lines = [
        model, f"{steps:,} steps of {batch_size} x {row_tokens:,}: {tokens:,} tokens",
        f"{flops:.2e} FLOPs: {time_by_device(flops, row_tokens)}",
        f"each of {processes} devices: {engine}, {dtype_name}, "
        f"{micro_batch_size} x {longest_row:,} tokens at a time, "
        f"activations recomputed: {checkpoint_activations}"
    ]
    needs = memory(
        config, micro_batch_size * longest_row, processes=processes, dist=dist, dtype=dtype,
        checkpoint_activations=checkpoint_activations, device_type=device_type,
        micro_batches=micro_batches
    )
    for name, number in needs.items():
        lines.append(f"  {name:12}{format_bytes(number):>12}")
    lines.append(f"  {'of':12}{format_bytes(available):>12}  {verdict(needs['peak'], available)}")
    return "\n".join(lines)


def time_by_device(flops: float, window: int) -> str:
    """The time that A100s and H100s take for training of so many FLOPs, and the MFU assumed."""
    mfu = expected_mfu(window)

    # In hours, or for a small run in minutes or seconds, so that the fastest has at least 1
    unit = "hours"
    seconds_in_unit = 3600
    for shorter in ("minutes", "seconds"):
        if flops / PEAK_FLOPS["H100"] / mfu.expected < seconds_in_unit:
            unit = shorter
            seconds_in_unit /= 60

    parts = []
    for name in ("A100", "H100"):
        time = flops / PEAK_FLOPS[name] / seconds_in_unit  # if all of its FLOP/s were reached
        spread = f"{time / mfu.high:,.1f} to {time / mfu.low:,.1f}"
        parts.append(f"{time / mfu.expected:,.1f} {name} {unit} ({spread})")
    reached = f"{mfu.expected:.0%} ({mfu.high:.0%} to {mfu.low:.0%})"
    return f"{', '.join(parts)}, if {reached} of the data sheet's FLOP/s are reached"
