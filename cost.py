"""What a run costs, before it starts: FLOPs, memory per device, time. `train.py --plan` prints it.

    python train.py --plan --preset llama-7b --scale 16 --world_size 8 --device_memory 80

Read model.py first: the activations counted here are those that its forward pass leaves for the backward pass, in
its order. train.py's MFU (model FLOPs utilization) and bench.py's come from here too.
"""

import os
import re

import torch

from model import LLaMAConfig

# dense bf16 FLOP/s of a device, from the vendors' data sheets, by a part of its name; the first that fits counts
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "H800": 989e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A6000": 155e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
LOGITS = {"cpu": 2**24, "cuda": 2**27}  # at a time in the loss: model.py's chunk


def flops_per_token(config: LLaMAConfig, length: int, training: bool = True) -> float:
    """FLOPs that the model needs for a token of a sequence of so many tokens, forward, or forward and backward.

    A matrix of n weights takes 2 n FLOPs a token forward; the embedding is a look-up and takes none. Attention takes
    2 D for a query's product with a key and 2 D for what it takes of the value, for each head; the causal half alone
    counts: (length + 1) / 2 keys on average. The backward pass takes twice the forward one. What is computed again
    (--checkpoint_activations) does not count: MFU is about the model's FLOPs, not the hardware's.
    """
    head = config.vocab_size * config.n_embd
    norms = config.n_embd * (2 * config.n_layer + 1)
    matrices = config.n_params - head * (1 if config.tie_embeddings else 2) - norms + head
    attention = config.n_layer * config.n_head * 4 * config.head_dim * (length + 1) / 2
    return (2 * matrices + attention) * (3 if training else 1)


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 FLOP/s of a GPU by its data sheet; None for what is not in PEAK_FLOPS, CPUs among it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def device_memory(device: torch.device) -> float:
    """Bytes of memory that a device has; the CPU's is what the machine has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory(
    config: LLaMAConfig, tokens: int, *, processes: int = 1, dist: str = "ddp", dtype: torch.dtype = torch.float32,
    checkpoint_activations: str = "none", device_type: str = "cpu", micro_batches: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Bytes on each device in a training step of AdamW: {"weights", "optimizer", "gradients", "activations", "loss",
    "peak"}.

    tokens: of one micro batch.  micro_batches: of a step, on one process.
    dist: "fsdp" shares weights, gradients and moments out among the processes; then all
    is computed in dtype. With "ddp" weights are float32, and autocast makes a copy of each matrix in dtype.
    The peak is not the sum: gradients come as activations go. CUDA's context and the allocator's gaps (1 to 2 GB)
    are not in it.
    """
    b, C, P = dtype.itemsize, config.n_embd, config.n_params
    shards = processes if dist == "fsdp" else 1
    residual = b if dist == "fsdp" else 4  # autocast leaves the residual stream in float32
    heads = config.n_head * config.head_dim
    queries_keys_values = b * (heads + 2 * config.n_kv_head * config.head_dim)
    attention = b * heads + 4 * config.n_head  # its output, and the log-sum-exp of each query
    norms = 2 * C * (2 * residual + b)  # input, normed input before its weight, and what the matrices read
    block = norms + queries_keys_values + attention + 4 * b * config.intermediate_size
    kept = {"none": block, "full": residual * C, "selective": residual * C + attention}[checkpoint_activations]
    head, per_block = config.vocab_size * C, (P - config.vocab_size * C) / config.n_layer

    weights = 4 * P / shards
    if dist == "fsdp":  # two blocks gathered, one for now and one for next; embedding and head stay
        weights += b * (2 * per_block + (1 if config.tie_embeddings else 2) * head)
    elif b < 4:
        weights += b * P
    gradients = 4 * P / shards
    if dist == "fsdp":  # of a block, before it is summed over the processes in float32
        gradients += (b + 4) * per_block
    activations = tokens * config.n_layer * kept
    again = tokens * block if checkpoint_activations != "none" else 0  # one block, computed again
    logits = min(tokens * config.vocab_size, LOGITS.get(device_type, 2**24)) * (4 if b == 4 else 4 + 2 * b)
    loss = logits + head * (4 if b == 4 else 4 + b) + tokens * C * b  # and the gradients of the two that meet
    # at the loss all activations are there and no gradient but the head's; at the end it is the other way round. From
    # the second micro batch on, and in DDP's buckets, all gradients are there all the time
    held = gradients if micro_batches > 1 or dist == "ddp" and processes > 1 else 0
    most = max(activations + loss + held, activations + again + 4 * head + held, gradients + again)
    peak = 8 * P / shards + weights + most
    return {"weights": weights, "optimizer": 8 * P / shards, "gradients": gradients,
            "activations": activations + again, "loss": loss, "peak": peak}  # fmt: skip


def size(number: float) -> str:
    """Bytes as people say them."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def verdict(peak: float, there: float) -> str:
    if peak > there:
        return "does not fit: a smaller --micro_batch_size, --checkpoint_activations, --dist fsdp or more devices help"
    return "fits" if peak < 0.9 * there else "may not fit: the allocator needs room too"
