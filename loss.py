"""The cross-entropy of a language model that never holds all the logits.

A window of 32,768 tokens has 32,768 x V logits: 4 GiB in float32 for LLaMA's vocabulary, 16 GiB for
Llama 3's, and as much again for their gradient. Here the hidden states meet the head's weight one
chunk at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the target of a token that is not scored, as everywhere in PyTorch
# Logits at a time. A GPU takes more, because with few rows it would mostly wait for the head's
# weight.
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}  # 64 MiB and 512 MiB in float32


def chunk_size(weight: Tensor) -> int:
    """Rows of logits at a time for the head's weight (V, C): fewer for a larger vocabulary."""
    logits = CHUNK_LOGITS.get(weight.device.type, CHUNK_LOGITS["cpu"])
    return max(1, logits // weight.size(0))


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats: hidden (N, C), weight (V, C), targets (N,) -> (N,) float32.

    No gradients.
    """
    losses = torch.zeros(len(targets), device=hidden.device)
    size = chunk_size(weight)
    for start in range(0, len(targets), size):
        chunk = slice(start, start + size)
        logits = hidden[chunk] @ weight.T  # (size, V)
        losses[chunk] = F.cross_entropy(logits.float(), targets[chunk], reduction="none")
    return losses


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy: hidden (N, C), head's weight (V, C), targets (N,) -> ().

    For each chunk: compute the logits, their loss and its gradients (softmax - one-hot, times the
    weight and the hidden states), then free the logits. So no logits are kept for the backward
    pass, and none are computed twice. All chunks share one buffer, and the steps between the matrix
    products work in place, because fresh memory costs more time than the arithmetic.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        head = weight.to(dtype)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        if needs_weight:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)

        total = torch.zeros((), device=hidden.device)
        size = chunk_size(weight)
        rows = min(size, len(hidden))
        buffer = torch.empty(rows, len(weight), device=hidden.device, dtype=dtype)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            inputs = hidden[chunk].to(dtype)  # (size, C)
            target = targets[chunk, None]  # (size, 1)
            scored = target != IGNORED
            target = target.clamp(min=0)

            # the loss: log(sum of exp) minus the target's logit
            logits = torch.mm(inputs, head.T, out=buffer[: len(inputs)]).float()  # (size, V)
            logits -= logits.amax(-1, keepdim=True)  # so that exp can't overflow
            target_logits = logits.gather(1, target)
            sums = logits.exp_().sum(-1, keepdim=True)
            total += ((sums.log() - target_logits) * scored).sum()
            if not needs_hidden and not needs_weight:
                continue

            # its gradient by the logits: softmax - one-hot, and zero where the token is not scored
            grad = logits.mul_(scored / sums)
            grad = grad.scatter_add_(1, target, -scored.to(grad.dtype)).to(dtype)
            if needs_hidden:
                grad_hidden[chunk] = grad @ head
            if needs_weight and dtype == torch.float32:
                grad_weight.addmm_(grad.T, inputs)
            elif needs_weight:
                grad_weight += grad.T @ inputs
        if needs_weight:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total
        if grad_weight is not None:
            grad_weight = grad_weight * grad_total
        return grad_hidden, grad_weight, None
