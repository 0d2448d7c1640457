"""Rotary position embedding (RoPE) with the scale knob: where Position Interpolation happens.

Read this file first; everything else in the repo carries it around. Then model.py, which uses it.

RoPE turns pair j of every query and key by the angle m * theta_j, where m is the token's position and
theta_j = theta^(-2j/d) (eq. 1; d is the head dimension). A dot product then depends on the distance of
two positions alone. Position Interpolation replaces m by m / scale, with scale = L'/L (eq. 4): a model that
was trained on L positions is shown L' of them squeezed into the range that it knows, instead of positions
that it has never seen. `--rope` chooses among PI and its rivals, all of which do the same thing here:
they change the angle per position, `inv_freq`, and nothing else (YaRN also lengthens q and k a little).

    inv_freq, attention_factor = rope_frequencies(head_dim, theta, "linear", scale=16)
    cos, sin = rope_cos_sin(torch.arange(T), inv_freq, attention_factor)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)

Two layouts. The paper's eq. (1) pairs neighbours (x0, x1), (x2, x3), ..., as Meta's weights do; Hugging
Face's pair the two halves, (x0, x_{d/2}), (x1, x_{d/2+1}), .... The dot product of q and k does not depend on
the order of their dimensions, so permuting the output rows of wq and wk alike turns the one into the
other exactly: the same rotation, seen through another numbering. This repo computes in the second.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

METHODS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3")


@lru_cache(maxsize=64)  # every forward pass asks; on a GPU each copy from the CPU would be a wait
def rope_frequencies(
    head_dim: int,
    theta: float,
    method: str = "linear",
    scale: float = 1.0,
    original_window: int = 2048,
    *,
    length: int | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """The angle per position of every pair, and the factor on cos and sin.

    head_dim: dimension d of one head, even.  theta: RoPE's base, c in the paper.
    method:  none     positions left alone
             linear   Position Interpolation: m becomes m / scale, eq. (4)
             ntk      NTK-aware: theta grows, so that the slowest pair is interpolated and the fastest kept
             dynamic  the same by the current `length`, and only beyond the original window (Hugging Face's)
             yarn     slow pairs interpolated, fast ones kept, a ramp between; cos and sin grow a little
             llama3   Llama 3.1's: as yarn, with another ramp and no factor
    scale: L'/L, at least 1.  original_window: L, in tokens (dynamic, yarn, llama3).  length: l (dynamic).
    beta_fast, beta_slow: yarn's ramp, in turns over the original window.
    attention_factor: yarn's factor on cos and sin; None: 0.1 ln(scale) + 1.
    low_freq_factor, high_freq_factor: llama3's ramp, likewise.
    Returns inv_freq (head_dim/2,) float32, in radians per position, and attention_factor. The same arguments get the
    same tensor: don't write into it.
    Raises ValueError for an unknown method or a value out of range.
    """
    if method not in METHODS:
        raise ValueError(f"rope method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"scale must be a positive finite number, got {scale}")
    if method != "none" and scale < 1:
        raise ValueError(f"scale must be at least 1 for rope {method!r} (it stretches the window), got {scale}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    if not math.isfinite(theta) or theta <= 1:
        raise ValueError(f"rope_theta must be a finite number above 1, got {theta}")
    if original_window < 1:
        raise ValueError(f"original_window must be a positive number of tokens, got {original_window}")

    # float64 for the few dozen powers, so that the float32 results are correctly rounded on every device
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")

    def frequencies(base: float) -> Tensor:
        return base ** (-pair / head_dim)  # theta_j of eq. (1)

    inv_freq, factor = frequencies(theta), 1.0
    if method == "linear":
        inv_freq = inv_freq / scale  # (m / scale) * theta_j, written as m * (theta_j / scale)
    elif method in ("ntk", "dynamic"):
        if method == "dynamic":  # Hugging Face's formula for length l > L
            ratio = max(length or 0, original_window) / original_window
            scale = scale * ratio - (scale - 1)
        # pair d/2 - 1 then turns by theta_j / scale, pair 0 as before (with d = 2 they are one pair, kept)
        exponent = head_dim / (head_dim - 2) if head_dim > 2 else 1.0
        inv_freq = frequencies(theta * scale**exponent)
    elif method == "yarn":
        if not 0 < beta_slow < beta_fast < math.inf:
            raise ValueError(f"beta_fast {beta_fast} must be above beta_slow {beta_slow}, and both positive and finite")
        if attention_factor is not None and not 0 < attention_factor < math.inf:
            raise ValueError(f"attention_factor must be a positive finite number, got {attention_factor}")

        def dim_of(turns: float) -> float:  # the (fractional) pair that makes `turns` turns within the window
            return head_dim * math.log(original_window / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dim_of(beta_fast)), 0)
        high = min(math.ceil(dim_of(beta_slow)), head_dim - 1)
        ramp = ((pair / 2 - low) / max(high - low, 1e-3)).clamp(0, 1)
        inv_freq = inv_freq * (1 - ramp) + inv_freq / scale * ramp  # ramp 0: kept (fast), 1: interpolated (slow)
        factor = 0.1 * math.log(scale) + 1.0 if attention_factor is None else attention_factor
    elif method == "llama3":
        if not 0 < low_freq_factor < high_freq_factor < math.inf:
            raise ValueError(
                f"high_freq_factor {high_freq_factor} must be above low_freq_factor {low_freq_factor}, "
                "and both positive and finite"
            )
        turns = original_window * inv_freq / (2 * math.pi)  # L / wavelength
        keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / scale
    return inv_freq.to(torch.float32).to(device), factor


def rope_cos_sin(positions: Tensor, inv_freq: Tensor, attention_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle: positions (...,), inv_freq (D/2,) -> two float32 tensors (..., D/2).

    Positions may be fractional and start anywhere (a KV cache). They and the angles stay float32 whatever the
    model's dtype: in bfloat16 the 32,768 positions of a window would collapse to about a thousand values.
    """
    # autocast would run an outer product in bfloat16; a plain multiplication it leaves alone
    angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq.to(torch.float32)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pair (x_j, x_{j + D/2}) by its angle: x (..., T, D), cos and sin (..., T, D/2) -> (..., T, D) in x's dtype.

    cos and sin may be float32 (the product is rounded once, to x's dtype) or already cast to it.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def interleaved_to_half(weight: Tensor, n_head: int) -> Tensor:
    """Meta's row order of wq or wk (pairs are neighbours) to ours: weight (n_head * D, C) or bias (n_head * D,)."""
    rows = weight.unflatten(0, (n_head, -1, 2))  # (n_head, D/2, 2, ...): row 2j + i of a head
    return rows.transpose(1, 2).flatten(0, 2)  # becomes row i * D/2 + j


def half_to_interleaved(weight: Tensor, n_head: int) -> Tensor:
    """The inverse of `interleaved_to_half`."""
    rows = weight.unflatten(0, (n_head, 2, -1))
    return rows.transpose(1, 2).flatten(0, 2)
