"""The theory in NumPy: the attention score over distance, and the two bounds that the paper gives.

    python bounds.py                                               # LLaMA as in the paper: a table
    python bounds.py --preset llama3 --scale 4 --plot bounds.png   # and a picture of both bounds
    python bounds.py --head_dim 128 --theta 10000 --scale 16 --plot bounds.png --json bounds.json

In the paper's letters, d is head_dim, c is theta, q and k are a query and a key read as d/2 complex
numbers, and h_j = q_j * conj(k_j). The score of query and key at distance s is
a(s) = Re sum_j h_j e^{i s theta_j} (eq. 3).

The paper's argument: between two distances that were trained, a(s) is close to the chord, the
straight line through both points (eq. 5, and eq. 7 for whole distances). Beyond the window, all
that is known is eq. (8). It has the factor B(s), a sum of absolute values of partial sums A_k. The
paper finds (8) at least 600 times as large as (7). notebooks/attention_bounds.ipynb explains it.

We differ from the paper in three points, each tested in tests/test_bounds.py:
  1. Theorem 2.1 takes sum_j theta_j^2 to be at most d / (4 ln c), which is too small. Its proof
     uses c^x <= 1 + x ln c, but c^x is convex. With constant="exact" we take the sum itself, with
     "paper" the printed constant.
  2. B(s) >= d holds at the 4096 distances that the paper plots (c = 10000, d = 128), but not up to
     32768, the longest window of the paper.
  3. Eq. (8), 2 max|h| B(s), is never below the trivial bound, (d/2) max|h|. The reason: A_k and
     A_{k-1} differ by a number of absolute value 1, so 1 <= |A_k| + |A_{k-1}|. The sum of this
     over k = 1 ... d/2 gives d/2 <= 2 B(s).

All numbers are float64. Distances are in tokens and may be fractions. Bounds are in the unit of h,
without the factor 1/sqrt(d) of attention.
"""

import argparse
import math

import numpy as np

from cli import PICTURES, Parser, at_least, file_name, run, text_table, write_json
from plots import draw_bounds, new_figure, save_figure

PRESETS = {  # RoPE as the models were pre-trained with it
    "llama": {"head_dim": 128, "theta": 10000.0, "window": 2048},  # LLaMA 1, the paper's model
    "llama3": {"head_dim": 128, "theta": 500000.0, "window": 8192},
    "smollm2": {"head_dim": 64, "theta": 100000.0, "window": 8192},
    "tiny": {"head_dim": 32, "theta": 10000.0, "window": 256},
}
# The last distance of the paper's figure 5, and the longest window that the paper extends to
PAPER_RANGES = (4096, 32768)
CHUNK = 2**17  # complex numbers computed at a time in attention_score and B: 2 MB an array
LARGEST_SIZE = 2**29  # head_dim times the last distance, at most; more would take minutes

# ---- the score -----------------------------------------------------------------------------------


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta_j = theta^(-2j/d) for j < d/2 (eq. 1), (d/2,) float64, in radians per position.

    Raises ValueError for an odd head_dim or a theta that is not above 1.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    if not math.isfinite(theta) or theta <= 1:
        raise ValueError(f"theta must be a finite number above 1, got {theta}")
    return float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)


def attention_score(h, s, head_dim: int, theta: float) -> np.ndarray:
    """a(s) = Re sum_j h_j e^{i s theta_j}, eq. (3), without the factor 1/sqrt(d).

    h: complex (..., d/2), h_j = q_j * conj(k_j).
    s: distances of any shape, m - n for a query at m and a key at n.
    Returns float64 of shape h.shape[:-1] + s.shape.
    """
    freqs = frequencies(head_dim, theta)
    s = check_distances(s)
    h = check_h(h, head_dim)
    flat = s.reshape(-1)
    score = np.empty((*h.shape[:-1], flat.size))

    # Some distances at a time, so that the arrays stay small
    step = max(1, CHUNK // len(freqs))
    for i in range(0, flat.size, step):
        turns = np.exp(1j * np.outer(freqs, flat[i : i + step]))  # (d/2, distances)
        score[..., i : i + step] = (h @ turns).real

    # [()] turns an array without dimensions into a number
    return score.reshape(h.shape[:-1] + s.shape)[()]


def adversarial_h(s, head_dim: int, theta: float, h_max: float = 1.0) -> np.ndarray:
    """The worst h with |h_j| <= h_max: h_j = h_max e^{-i s theta_j}.

    s: distances of any shape (...). Returns complex numbers (..., d/2).

    At distance s all terms of a(s) are h_max, so that a(s) is the trivial bound itself. If s is the
    middle of [s1, s2], no other h is further from the chord: the distance is
    h_max sum_j (1 - cos(theta_j (s2 - s1)/2)). For s2 = s1 + 1 this is at most 2.2% below the exact
    bound (d >= 8), and above the bound with the paper's constant (checked for d up to 1000).
    """
    angles = np.multiply.outer(check_distances(s), frequencies(head_dim, theta))
    return check_h_max(h_max) * np.exp(-1j * angles)


def check_distances(s) -> np.ndarray:
    """s as float64. Raises ValueError if a distance is infinite or not a number."""
    s = np.asarray(s, dtype=np.float64)
    if not np.isfinite(s).all():
        raise ValueError("s must hold finite distances, in tokens")
    return s


def check_h(h, head_dim: int) -> np.ndarray:
    """h as complex numbers (..., d/2). Raises ValueError for another shape."""
    h = np.asarray(h, dtype=np.complex128)
    n = head_dim // 2
    if h.ndim == 0 or h.shape[-1] != n:
        raise ValueError(
            f"h must have head_dim / 2 = {n} complex numbers in its last axis, got shape {h.shape}"
        )
    return h


def check_h_max(h_max) -> np.ndarray:
    """h_max as float64. Raises ValueError if it is negative or not finite."""
    h_max = np.asarray(h_max, dtype=np.float64)
    if not (np.isfinite(h_max) & (h_max >= 0)).all():
        raise ValueError(f"h_max is max|h_j|, it must be finite and not negative, got {h_max}")
    return h_max


# ---- interpolation: eq. (5) and (7) --------------------------------------------------------------


def interpolation_bound(
    h_max, s, s1, s2, head_dim: int, theta: float, constant: str = "exact"
) -> np.ndarray:
    """Theorem 2.1: a bound on |a(s) - a_lin(s)|, where a_lin is the chord from a(s1) to a(s2).

    h_max, s, s1, s2: numbers or arrays, which broadcast; s1 <= s <= s2.
    constant: "exact" takes sum_j theta_j^2 itself. "paper" takes d / (4 ln c) in its place, as
    eq. (5) and (7) do; that is smaller and NOT a bound (see adversarial_h).

    The proof: |a(s) - a_lin(s)| <= (s - s1)(s2 - s)/2 * max|a''| by Taylor's theorem, and
    |a''| <= max|h| sum_j theta_j^2. In the middle between two whole distances, the paper's constant
    gives d max|h| / (32 ln c), eq. (7).
    """
    if constant not in ("exact", "paper"):
        raise ValueError(f'constant must be "exact" or "paper", got {constant!r}')
    curvature = sum_theta_squared(head_dim, theta)
    if constant == "paper":
        curvature = head_dim / (4 * math.log(theta))
    s = check_distances(s)
    s1 = check_distances(s1)
    s2 = check_distances(s2)
    if not ((s1 <= s) & (s <= s2)).all():
        raise ValueError("s must lie between s1 and s2: the theorem is about interpolation")
    return check_h_max(h_max) * (s - s1) * (s2 - s) / 2 * curvature


def sum_theta_squared(head_dim: int, theta: float) -> float:
    """sum_j theta_j^2 as the closed form of a geometric series, (1 - c^-2) / (1 - c^(-4/d)).

    It exceeds the paper's d / (4 ln c) by about 1/2, because 1 / (1 - e^-x) is
    1/x + 1/2 + x/12 - ..., here with x = 4 ln c / d.
    """
    frequencies(head_dim, theta)  # only to check the arguments
    log_c = math.log(theta)
    # expm1(x) is e^x - 1 without the rounding error near 0
    return math.expm1(-2 * log_c) / math.expm1(-4 * log_c / head_dim)


# ---- extrapolation: eq. (8) ----------------------------------------------------------------------


def B(s, head_dim: int, theta: float) -> np.ndarray:
    """B(s) = sum_{k=1}^{d/2} |A_k(s)| with A_k(s) = sum_{j<k} e^{i s theta_j}, eq. (8).

    s: distances of any shape; the result has the same shape. Computed in chunks, so that it takes
    some 10 MB of memory beside s and the result.
    """
    freqs = frequencies(head_dim, theta)
    s = check_distances(s)
    flat = s.reshape(-1)
    sums = np.empty(flat.size)

    # Some distances at a time, so that the arrays stay small
    step = max(1, CHUNK // len(freqs))
    for i in range(0, flat.size, step):
        terms = np.exp(1j * np.outer(flat[i : i + step], freqs))  # (distances, d/2)
        partial_sums = np.cumsum(terms, axis=1, out=terms)  # column k - 1 is A_k
        sums[i : i + step] = np.abs(partial_sums).sum(axis=1)

    return sums.reshape(s.shape)[()]


def extrapolation_bound(h_max, s, head_dim: int, theta: float) -> np.ndarray:
    """|a(s)| <= 2 max|h| B(s), the last form of eq. (8), which the paper compares with eq. (7)."""
    return 2 * check_h_max(h_max) * B(s, head_dim, theta)


def difference_bound(h, s, head_dim: int, theta: float) -> np.ndarray:
    """|a(s)| <= max_j |h_j - h_{j+1}| B(s), the sharper form of eq. (8).

    h: complex (..., d/2).
    s: distances of any shape.
    Returns float64 of shape h.shape[:-1] + s.shape.

    It comes from summation by parts, sum_j h_j e^{i s theta_j} = sum_k A_k (h_{k-1} - h_k), where
    h_{d/2} = 0: the last difference is |h_{d/2-1}| itself. It is below the trivial bound only if h
    changes slowly from pair to pair.
    """
    h = check_h(h, head_dim)
    zero = np.zeros((*h.shape[:-1], 1))  # h_{d/2}
    differences = np.abs(np.diff(h, axis=-1, append=zero))  # (..., d/2)
    return np.multiply.outer(differences.max(axis=-1), B(s, head_dim, theta))


def trivial_bound(h_max, head_dim: int) -> np.ndarray:
    """|a(s)| <= sum_j |h_j| <= (d/2) max|h|: the triangle inequality. adversarial_h attains it."""
    return check_h_max(h_max) * head_dim / 2


# ---- the command line ----------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    presets = []
    for name, preset in PRESETS.items():
        values = ", ".join(f"{key} {value:g}" for key, value in preset.items())
        presets.append(f"{name} ({values})")
    parser.epilog = "presets: " + ", ".join(presets)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="llama", help="the RoPE of a model, listed below")
    add("--head_dim", type=at_least(2), help="d, even; default: the preset's, 128 for llama")
    add("--theta", type=at_least(1.0), help="the base c; default: the preset's, 10000 for llama")
    add("--window", type=at_least(1),
        help="the original window L in tokens; default: the preset's, 2048 for llama")
    add("--scale", type=at_least(1.0), default=16.0,
        help="L'/L: the last distance is scale times window")
    add("--plot", type=file_name(*PICTURES), help="the picture, .png, .svg or .pdf; default: none")
    add("--json", type=file_name(".json"), help="the figures; default: none")
    args = parser.parse_args(argv)

    # What is not given comes from the preset
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    frequencies(args.head_dim, args.theta)  # only to check the arguments

    # Refuse what would take minutes. `size` is of whole numbers alone, which can't overflow.
    size = args.head_dim * max(args.window, *PAPER_RANGES)
    if size > LARGEST_SIZE or args.head_dim * args.window * args.scale > LARGEST_SIZE:
        raise ValueError(
            "--scale times --window times --head_dim is above 2^29: lower one of the three"
        )
    return args


def grid_deviation(head_dim: int, theta: float) -> dict[str, float]:
    """Deviations of a(s) from the chord in the middle of two whole distances, for max|h| = 1.

    "paper" and "exact" are eq. (7) with either constant, "attained" is that of the worst h.
    """
    paper = interpolation_bound(1.0, 0.5, 0, 1, head_dim, theta, "paper")
    exact = interpolation_bound(1.0, 0.5, 0, 1, head_dim, theta, "exact")
    worst = adversarial_h(0.5, head_dim, theta)
    start, middle, end = attention_score(worst, np.array([0, 0.5, 1]), head_dim, theta)
    attained = middle - (start + end) / 2
    return {"paper": float(paper), "exact": float(exact), "attained": float(attained)}


def summarize(head_dim: int, b: np.ndarray, deviation: dict[str, float]) -> dict:
    """The least B(s) on s = 0 ... len(b) - 1, beside the paper's claims, ready for JSON.

    b: B(s) at these s. deviation: that of grid_deviation.
    The claims: B(s) >= d, and eq. (8) is at least 600 times eq. (7).
    """
    least = float(b.min())
    trivial = float(trivial_bound(1.0, head_dim))
    below = b < head_dim
    first_below = None
    if below.any():
        first_below = int(below.argmax())
    constants = ("paper", "exact")
    return {
        "range": [0, len(b) - 1],
        "min_B_over_d": least / head_dim,
        "argmin": int(b.argmin()),
        "first_below_d": first_below,
        "share_below_d": float(below.mean()),
        # The least of eq. (8) over eq. (7), and the trivial bound over eq. (7)
        "ratio": {name: 2 * least / deviation[name] for name in constants},
        "trivial_ratio": {name: trivial / deviation[name] for name in constants},
        "min_extrapolation_over_trivial": 2 * least / trivial,
    }


def table(ranges: list[dict]) -> str:
    """The summaries as text: a column for each range of distances, then the paper's claims."""
    columns = [
        [
            "least B(s)/d", "  at s =", "first s with B(s) < d", "share of s with B(s) < d",
            "least (8) / (7), paper's constant", "least (8) / (7), exact constant",
            "trivial / (7), paper's constant", "trivial / (7), exact constant",
            "least (8) / trivial"
        ]
    ]
    header = ["distances s"]
    for summary in ranges:
        header.append(f"0 .. {summary['range'][1]}")
        columns.append(
            [
                f"{summary['min_B_over_d']:.4f}", summary["argmin"],
                str(summary["first_below_d"]).lower(), f"{summary['share_below_d']:.2%}",
                f"{summary['ratio']['paper']:.0f}x", f"{summary['ratio']['exact']:.0f}x",
                f"{summary['trivial_ratio']['paper']:.0f}x",
                f"{summary['trivial_ratio']['exact']:.0f}x",
                f"{summary['min_extrapolation_over_trivial']:.2f}x"
            ]
        )
    header.append("the paper")
    no_claim = "not considered"
    columns.append(["at least 1", "", "none", "0%", "at least 600x", "", no_claim, "", no_claim])
    return text_table(header, list(zip(*columns)))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)

    # Compute both bounds, and compare them on each range of distances
    last_distances = sorted({*PAPER_RANGES, round(args.scale * args.window)})
    b = B(np.arange(last_distances[-1] + 1), args.head_dim, args.theta)
    deviation = grid_deviation(args.head_dim, args.theta)
    ranges = [summarize(args.head_dim, b[: last + 1], deviation) for last in last_distances]
    report = {
        "head_dim": args.head_dim,
        "theta": args.theta,
        "window": args.window,
        "scale": args.scale,
        "sum_theta_squared": sum_theta_squared(args.head_dim, args.theta),
        "grid_deviation": deviation,
        "ranges": ranges,
        "paper": {"head_dim": 128, "theta": 10000.0, "min_B_over_d": 1.0, "ratio": 2 * 294.73},
    }

    # Report: a table, JSON, a picture
    print(
        f"RoPE head_dim {args.head_dim}, theta {args.theta:g}; "
        f"window {args.window} x scale {args.scale:g}\n"
    )
    print(table(ranges))
    print(
        "\n(8): |a(s)| <= 2 max|h| B(s).  trivial: |a(s)| <= (d/2) max|h|.  "
        "The paper has d 128, c 10000."
    )
    print(
        "(7), deviation from the chord in the middle of two whole distances, in max|h|: "
        f"paper {deviation['paper']:.5f}, exact {deviation['exact']:.5f}, "
        f"attained by the worst h {deviation['attained']:.5f}."
    )
    if args.json is not None:
        write_json(args.json, report)
    if args.plot is not None:
        figure, axes = new_figure(panels=2, width=6)
        draw_bounds(axes, report, b)
        save_figure(figure, args.plot)


if __name__ == "__main__":
    run(main)
