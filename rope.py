"""Rotary position embedding (RoPE) and how to rescale it: where Position Interpolation happens.

The paper is Chen et al. 2023, "Extending Context Window of Large Language Models via Position
Interpolation" (arXiv 2306.15595). Equations and sections (§) in this repo's comments are the
paper's.

RoPE splits a query or key of d dimensions into d/2 pairs. It turns pair j, for j = 0 ... d/2 - 1,
by the angle m * theta_j, where m is the token's position and theta_j = theta^(-2j/d) (eq. 1). So
pair 0 turns fastest and the last pair slowest. (theta without an index is the base, 10,000 in
LLaMA; the paper calls it c.) The dot product of a query and a key then depends on the distance of
their positions alone.

A model that was trained on L positions, the original window, has never seen the angles beyond them.
Position Interpolation (PI) replaces m by m / scale, where scale = L'/L is the extended window over
the original one (eq. 4). The L' positions then lie between 0 and L, in the range that the model
knows, but between its whole positions: hence "interpolation". Attention scores are smooth enough
there (theorem 2.1), and a short fine-tuning does the rest.

PI's rivals change the angles in other ways, but all fit one interface. A method decides how far
each pair turns per position, `inv_freq` (Hugging Face's name, although it is a frequency). YaRN
also multiplies cos and sin by `attention_factor`. The method "none" leaves the angles alone: with
it, scale only makes the window longer.

    T = 32768  # 16 * 2048
    inv_freq, attention_factor = rope_frequencies(head_dim, theta, "linear", scale=16)
    cos, sin = rope_cos_sin(torch.arange(T), inv_freq, attention_factor)
    q = apply_rope(q, cos, sin)
    k = apply_rope(k, cos, sin)

There are two layouts of the pairs in a head. For d = 8, with the pair's number below each
dimension:

    dimension                x0 x1 x2 x3 x4 x5 x6 x7
    interleaved (Meta)        0  0  1  1  2  2  3  3      (x_2j, x_2j+1), as in eq. (1)
    half-split (this repo)    0  1  2  3  0  1  2  3      (x_j, x_j+d/2), as Hugging Face has it

Both give the same attention, because a dot product does not depend on the order of the dimensions.
To change the layout, the output rows of wq and wk are permuted, once, when weights are loaded.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

METHODS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3")


# Cached, because every forward pass asks for it, and each copy from the CPU would make a GPU wait
@lru_cache(maxsize=64)
def rope_frequencies(
    head_dim: int, theta: float, method: str = "linear", scale: float = 1.0,
    original_window: int = 2048, *, length: int | None = None, beta_fast: float = 32.0,
    beta_slow: float = 1.0, attention_factor: float | None = None, low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0, device: torch.device | str | None = None
) -> tuple[Tensor, float]:
    """Returns inv_freq, (head_dim/2,) float32 radians per position, and attention_factor.

    head_dim: dimension d of one head, even.  theta: RoPE's base.
    method:  none     positions left alone
             linear   Position Interpolation: m becomes m / scale, eq. (4)
             ntk      NTK-aware: a larger theta interpolates the slowest pair and keeps the fastest
             dynamic  ntk with a scale that grows with `length` beyond the original window
             yarn     slow pairs interpolated, fast ones kept, a ramp between; longer cos and sin
             llama3   Llama 3.1's: as yarn, with another ramp, and cos and sin as they are
    scale: L'/L, at least 1 except with "none".
    original_window: L, in tokens (dynamic, yarn, llama3).
    length: the current length in tokens (dynamic).
    beta_fast, beta_slow: yarn keeps pairs that make more than beta_fast turns within that window,
        and interpolates those that make fewer than beta_slow.
    attention_factor: yarn's factor on cos and sin; None means 0.1 ln(scale) + 1. Others ignore it.
    low_freq_factor, high_freq_factor: llama3's beta_slow and beta_fast.

    The result is cached: do not write into it.
    Raises ValueError for an unknown method or a value out of range.
    """
    check_rope(head_dim, theta, method, scale, original_window)
    inv_freq = powers(head_dim, theta)  # theta_j of eq. (1)
    factor = 1.0  # on cos and sin
    if method == "linear":
        # Position Interpolation, eq. (4): (m / scale) * theta_j = m * (theta_j / scale)
        inv_freq = inv_freq / scale
    elif method == "ntk":
        inv_freq = powers(head_dim, ntk_theta(head_dim, theta, scale))
    elif method == "dynamic":
        # Hugging Face's formula: current_scale is 1 up to the original window L, and then grows by
        # `scale` with every L tokens more. So at scale * L tokens it is larger than scale.
        ratio = max(length or 0, original_window) / original_window
        current_scale = scale * ratio - (scale - 1)
        inv_freq = powers(head_dim, ntk_theta(head_dim, theta, current_scale))
    elif method == "yarn":
        keep = yarn_ramp(head_dim, theta, original_window, beta_fast, beta_slow)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / scale
        factor = yarn_attention_factor(scale, attention_factor)
    elif method == "llama3":
        keep = llama3_ramp(inv_freq, original_window, low_freq_factor, high_freq_factor)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / scale
    return inv_freq.to(torch.float32).to(device), factor


def rope_cos_sin(
    positions: Tensor, inv_freq: Tensor, attention_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle: positions (...,), inv_freq (D/2,) -> (..., D/2) float32 each.

    Positions may be fractional and start anywhere. They and the angles stay float32 whatever the
    model's dtype, because in bfloat16 the 32,768 positions of a window would collapse to about a
    thousand values.
    """
    # A plain multiplication, because autocast would run a matrix product in bfloat16
    angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq.to(torch.float32)  # (..., D/2)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., D) with each pair (x_j, x_{j + D/2}) turned by its angle; cos, sin (..., D/2).

    cos and sin are broadcast over x: with (T, D/2) they fit x (B, H, T, D), and with (T, 1, D/2)
    they fit x (B, T, H, D). The result has x's dtype, whatever that of cos and sin.
    """
    x1, x2 = x.chunk(2, dim=-1)  # (..., D/2) each
    turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)  # (..., D)
    return turned.to(x.dtype)


# ---- the parts of the methods --------------------------------------------------------------------


def powers(head_dim: int, base: float) -> Tensor:
    """theta_j of eq. (1): base^(-2j/d) for j = 0 ... d/2 - 1, (head_dim/2,).

    float64, so that the result after rounding to float32 is the same on every device.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    return base**-exponents


def ntk_theta(head_dim: int, theta: float, scale: float) -> float:
    """The base with which the slowest pair turns by theta_j / scale, and the fastest as before."""
    # The slowest pair, j = d/2 - 1, turns by theta^(-(d-2)/d). With theta * scale^(d/(d-2)) in
    # place of theta that is divided by scale. Pair 0 turns by theta^0 = 1 whatever theta is.
    if head_dim == 2:
        return theta * scale  # the only pair is pair 0
    return theta * scale ** (head_dim / (head_dim - 2))


def yarn_ramp(
    head_dim: int, theta: float, original_window: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """How much of each pair YaRN keeps, (head_dim/2,): 1 for fast pairs, 0 for slow ones."""
    if not 0 < beta_slow < beta_fast < math.inf:
        raise ValueError(
            f"beta_fast {beta_fast} must be above beta_slow {beta_slow}, "
            "and both positive and finite"
        )

    def pair_with(turns: float) -> float:
        """The pair, as a fractional number, that makes so many turns within the original window."""
        wavelength = original_window / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(beta_fast)), 0)
    # head_dim - 1 and not head_dim/2 - 1, as in YaRN's own code, so that its models run as trained
    high = min(math.ceil(pair_with(beta_slow)), head_dim - 1)
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    interpolated = (pair - low) / max(high - low, 1e-3)  # 0 at the pair `low`, 1 at the pair `high`
    return 1 - interpolated.clamp(0, 1)


def yarn_attention_factor(scale: float, given: float | None) -> float:
    """YaRN's factor on cos and sin: scores grow by its square, so attention stays sharp."""
    if given is None:
        return 0.1 * math.log(scale) + 1.0
    if not 0 < given < math.inf:
        raise ValueError(f"attention_factor must be a positive finite number, got {given}")
    return given


def llama3_ramp(
    inv_freq: Tensor, original_window: int, low_freq_factor: float, high_freq_factor: float
) -> Tensor:
    """How much of each pair Llama 3.1 keeps, (head_dim/2,): 1 for fast pairs, 0 for slow ones.

    inv_freq: the angles without any scaling.
    """
    if not 0 < low_freq_factor < high_freq_factor < math.inf:
        raise ValueError(
            f"high_freq_factor {high_freq_factor} must be above low_freq_factor {low_freq_factor}, "
            "and both positive and finite"
        )
    turns = original_window * inv_freq / (2 * math.pi)
    return ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)


def check_rope(
    head_dim: int, theta: float, method: str, scale: float, original_window: int
) -> None:
    """Raise ValueError for an unknown method or a value out of range."""
    if method not in METHODS:
        raise ValueError(f"rope method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    # With "none", scale changes the window alone, and a shorter window is possible too
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"scale must be a positive finite number, got {scale}")
    if method != "none" and scale < 1:
        raise ValueError(
            f"scale must be at least 1 for rope {method!r} (it stretches the window), got {scale}"
        )
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    if not math.isfinite(theta) or theta <= 1:
        raise ValueError(f"rope_theta must be a finite number above 1, got {theta}")
    if original_window < 1:
        raise ValueError(
            f"original_window must be a positive number of tokens, got {original_window}"
        )


# ---- the two layouts -----------------------------------------------------------------------------


def interleaved_to_half(weight: Tensor, n_head: int) -> Tensor:
    """Rows of wq or wk from Meta's layout to ours: weight (n_head * D, C) or bias (n_head * D,)."""
    # Row 2j + i of a head (pair j, i = 0 or 1) becomes row i * D/2 + j
    rows = weight.unflatten(0, (n_head, -1, 2))  # (n_head, D/2, 2, ...)
    return rows.transpose(1, 2).flatten(0, 2)  # (n_head * D, ...)


def half_to_interleaved(weight: Tensor, n_head: int) -> Tensor:
    """The inverse of `interleaved_to_half`."""
    rows = weight.unflatten(0, (n_head, 2, -1))  # (n_head, 2, D/2, ...)
    return rows.transpose(1, 2).flatten(0, 2)
