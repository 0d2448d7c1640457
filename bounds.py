"""The theory in NumPy: the attention score over distance, and what bounds it.

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
     uses c^x <= 1 + x ln c, but c^x is convex. With constant="paper" we take the printed constant,
     with "exact" the sum itself. We call that the corrected bound: it is valid, but 1% above what
     any h reaches (d = 128). With "sharp" we take the largest deviation that some h reaches.
  2. B(s) >= d holds at the 4096 distances that the paper plots (c = 10000, d = 128), but not up to
     32768, the longest window of the paper.
  3. Eq. (8), 2 max|h| B(s), is never below the trivial bound, (d/2) max|h|. The reason: A_k and
     A_{k-1} differ by a number of absolute value 1, so 1 <= |A_k| + |A_{k-1}|. The sum of this
     over k = 1 ... d/2 gives d/2 <= 2 B(s).

Beside the bounds stands S(s) = sum_j cos(s theta_j), the mean score of a token for one like it
(`similarity`). Men et al. 2024 (arXiv 2405.14591) argue that retrieval at distance s needs
S(s) >= 0.

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
    "tiny": {"head_dim": 64, "theta": 2000.0, "window": 256},
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
    h_max sum_j (1 - cos(theta_j (s2 - s1)/2)), the sharp bound. For s2 = s1 + 1 this is at most
    2.2% below the corrected bound (d >= 8), and above the bound with the paper's constant (checked
    for d up to 1000).
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
    constant: one of three.
        "paper"  d / (4 ln c) for sum_j theta_j^2, as in eq. (5) and (7). NOT a bound: it is too
                 small (see adversarial_h).
        "exact"  sum_j theta_j^2 itself: the corrected bound. It is valid, but no h reaches it.
        "sharp"  the largest deviation of any h with |h_j| <= h_max: the smallest valid bound.

    The proof of the first two: |a(s) - a_lin(s)| <= (s - s1)(s2 - s)/2 * max|a''| by Taylor's
    theorem, and |a''| <= max|h| sum_j theta_j^2. In the middle between two whole distances, the
    paper's constant gives d max|h| / (32 ln c), eq. (7). For the third see `sharp_deviation`.
    """
    if constant not in ("exact", "paper", "sharp"):
        raise ValueError(f'constant must be "exact", "paper" or "sharp", got {constant!r}')
    h_max = check_h_max(h_max)
    s = check_distances(s)
    s1 = check_distances(s1)
    s2 = check_distances(s2)
    if not ((s1 <= s) & (s <= s2)).all():
        raise ValueError("s must lie between s1 and s2: the theorem is about interpolation")
    if constant == "sharp":
        return h_max * sharp_deviation(s - s1, s2 - s, head_dim, theta)
    curvature = sum_theta_squared(head_dim, theta)
    if constant == "paper":
        curvature = head_dim / (4 * math.log(theta))
    return h_max * (s - s1) * (s2 - s) / 2 * curvature


def sharp_deviation(
    before: np.ndarray, after: np.ndarray, head_dim: int, theta: float
) -> np.ndarray:
    """The largest |a(s) - a_lin(s)| of all h with |h_j| <= 1.

    before, after: s - s1 and s2 - s, which broadcast; not negative. The result has their shape.

    The deviation is Re sum_j h_j w_j with w_j = e^{i s theta_j} - (1 - l) e^{i s1 theta_j}
    - l e^{i s2 theta_j} and l = (s - s1)/(s2 - s1). It is at most sum_j |w_j|, and the h with
    h_j = conj(w_j) / |w_j| reaches that. |w_j| does not change if all three distances are moved, so
    we take s = 0.
    """
    before, after = np.broadcast_arrays(before, after)
    span = before + after
    # Where s1 = s2 there is nothing to interpolate: l is 0 there, and so is w_j
    share = np.divide(before, span, out=np.zeros(span.shape), where=span > 0)  # l
    total = np.zeros(span.shape)
    for freq in frequencies(head_dim, theta):
        chord = (1 - share) * np.exp(-1j * before * freq) + share * np.exp(1j * after * freq)
        total += np.abs(1 - chord)
    return total[()]


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


# ---- similar tokens: S(s) ------------------------------------------------------------------------


def similarity(s, head_dim: int, theta: float) -> np.ndarray:
    """S(s) = sum_j cos(s theta_j): how much more a token scores for one like it than for another.

    s: distances of any shape; the result has the same shape.

    For a query with independent components of variance 1, a key like it (the query plus noise of
    mean 0) scores 2 S(s) at distance s in the mean, an independent key 0. Where S(s) < 0, the query
    scores an unlike token higher. Source: Men et al. 2024 (arXiv 2405.14591), who call it B.
    """
    frequencies(head_dim, theta)  # only to check the arguments
    return attention_score(np.ones(head_dim // 2), s, head_dim, theta)


def first_negative(head_dim: int, theta: float, last: int) -> int | None:
    """The first whole distance up to `last` with S(s) < 0, or None."""
    below = similarity(np.arange(last + 1), head_dim, theta) < 0
    if not below.any():
        return None
    return int(below.argmax())


def first_zero(head_dim: int, theta: float, last: int) -> float | None:
    """The first distance s up to `last` with S(s) = 0, not only of whole ones; or None.

    A dip between two whole distances is overlooked if it is less than about 0.0001 deep (d = 128).
    """
    values = similarity(np.arange(last + 1), head_dim, theta)

    # Between two whole distances S lies within `margin` of its chord (theorem 2.1 with h_j = 1).
    # So S can reach 0 only where one of the two values is at most `margin`.
    margin = interpolation_bound(1.0, 0.5, 0, 1, head_dim, theta, "sharp")
    near = np.minimum(values[:-1], values[1:]) <= margin
    for start in np.flatnonzero(near):
        # Look for the change of sign in steps of 1/64, then halve the step until it is found
        s = start + np.arange(65) / 64
        below = similarity(s, head_dim, theta) <= 0
        if below.any():
            end = int(below.argmax())
            return bisect_similarity(s[end - 1], s[end], head_dim, theta)
    return None


def bisect_similarity(low: float, high: float, head_dim: int, theta: float) -> float:
    """The zero of S between low, where S > 0, and high, where S <= 0."""
    for _ in range(40):
        middle = (low + high) / 2
        if similarity(middle, head_dim, theta) > 0:
            low = middle
        else:
            high = middle
    return float(high)


def negative_shares(head_dim: int, theta: float, window: int, scale: float) -> dict[str, float]:
    """The shares of the distances window ... scale * window - 1 at which S is negative.

    Under "none" that is S(s), the positions left alone; under "linear" it is S(s / scale), Position
    Interpolation. Both are 0 if there is no such distance.
    """
    s = np.arange(window, round(scale * window))
    if not s.size:
        return {"none": 0.0, "linear": 0.0}
    alone = similarity(s, head_dim, theta) < 0
    interpolated = similarity(s / scale, head_dim, theta) < 0
    return {"none": float(alone.mean()), "linear": float(interpolated.mean())}


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
    """Bounds on the deviation from the chord between two whole distances, by constant.

    For max|h| = 1 and the middle, where all of them are largest: eq. (7) and its two corrections.
    """
    deviation = {}
    for constant in ("paper", "exact", "sharp"):
        bound = interpolation_bound(1.0, 0.5, 0, 1, head_dim, theta, constant)
        deviation[constant] = float(bound)
    return deviation


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
    return {
        "range": [0, len(b) - 1],
        "min_B_over_d": least / head_dim,
        "argmin": int(b.argmin()),
        "first_below_d": first_below,
        "share_below_d": float(below.mean()),
        # The least of eq. (8) over eq. (7), and the trivial bound over eq. (7)
        "ratio": {name: 2 * least / value for name, value in deviation.items()},
        "trivial_ratio": {name: trivial / value for name, value in deviation.items()},
        "min_extrapolation_over_trivial": 2 * least / trivial,
    }


def table(ranges: list[dict]) -> str:
    """The summaries as text: a column for each range of distances, then the paper's claims."""
    columns = [
        [
            "least B(s)/d", "  at s =", "first s with B(s) < d", "share of s with B(s) < d",
            "least (8) / (7), paper's constant", "least (8) / (7), corrected",
            "trivial / (7), paper's constant", "trivial / (7), corrected",
            "trivial / (7), sharp: both attained", "least (8) / trivial"
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
                f"{summary['trivial_ratio']['sharp']:.1f}x",
                f"{summary['min_extrapolation_over_trivial']:.2f}x"
            ]
        )
    header.append("the paper")
    no_claim = "not considered"
    columns.append(
        ["at least 1", "", "none", "0%", "at least 600x", "", no_claim, "", "", no_claim]
    )
    return text_table(header, list(zip(*columns)))


def similarity_report(head_dim: int, theta: float, window: int, last: int) -> dict:
    """Where S(s) first reaches 0 and is first negative up to `last`, ready for JSON.

    first_zero_over_window is in windows; all three are None where S stays above 0.
    """
    zero = first_zero(head_dim, theta, last)
    over_window = None
    if zero is not None:
        over_window = zero / window
    negative = first_negative(head_dim, theta, last)
    return {
        "range": [0, last],
        "first_zero": zero,
        "first_zero_over_window": over_window,
        "first_negative": negative,
    }


def similarity_table(reports: dict[str, dict]) -> str:
    """The reports of similarity_report as text. reports: by name."""
    rows = []
    for name, report in reports.items():
        if report["first_zero"] is None:
            rows.append([name, f"none up to {report['range'][1]}", "", ""])
            continue
        rows.append(
            [
                name, f"{report['first_zero']:.2f}", f"{report['first_zero_over_window']:.2f} L",
                str(report["first_negative"]).lower()
            ]
        )
    return text_table(["RoPE of", "S(s) = 0 at", "", "first whole s with S(s) < 0"], rows)


def print_report(report: dict) -> None:
    """Print the tables, and the figures that are not in them."""
    print(
        f"RoPE head_dim {report['head_dim']}, theta {report['theta']:g}; "
        f"window {report['window']} x scale {report['scale']:g}\n"
    )
    print(table(report["ranges"]))
    print(
        "\n(8): |a(s)| <= 2 max|h| B(s).  trivial: |a(s)| <= (d/2) max|h|.  "
        "The paper has d 128, c 10000."
    )
    deviation = report["grid_deviation"]
    print(
        "(7), deviation from the chord in the middle of two whole distances, in max|h|: "
        f"paper {deviation['paper']:.5f}, corrected {deviation['exact']:.5f}, "
        f"sharp {deviation['sharp']:.5f}, which some h attains."
    )

    print(
        "\nS(s) = sum_j cos(s theta_j), the mean score of a token for one like it. "
        "Men et al. 2024 argue that retrieval needs S(s) >= 0.\n"
    )
    print(similarity_table(report["similarity"]))
    shares = report["negative_share"]
    print(
        f"\nBeyond the window L, S is negative at {shares['none']:.1%} of the distances left "
        f"alone, at {shares['linear']:.1%} under PI."
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = {"head_dim": args.head_dim, "theta": args.theta, "window": args.window}

    # Compute both bounds, and compare them on each range of distances
    last_distances = sorted({*PAPER_RANGES, round(args.scale * args.window)})
    b = B(np.arange(last_distances[-1] + 1), args.head_dim, args.theta)
    deviation = grid_deviation(args.head_dim, args.theta)
    ranges = [summarize(args.head_dim, b[: last + 1], deviation) for last in last_distances]

    # Where S(s) turns negative, here and for each preset
    similar = {"these settings": similarity_report(**settings, last=last_distances[-1])}
    for name, preset in PRESETS.items():
        similar[name] = similarity_report(**preset, last=PAPER_RANGES[-1])

    # Report: tables, JSON, a picture
    report = {
        **settings,
        "scale": args.scale,
        "sum_theta_squared": sum_theta_squared(args.head_dim, args.theta),
        "grid_deviation": deviation,
        "ranges": ranges,
        "similarity": similar,
        "negative_share": negative_shares(**settings, scale=args.scale),
        "paper": {"head_dim": 128, "theta": 10000.0, "min_B_over_d": 1.0, "ratio": 2 * 294.73},
    }
    print_report(report)
    if args.json is not None:
        write_json(args.json, report)
    if args.plot is not None:
        figure, axes = new_figure(panels=2, width=6)
        draw_bounds(axes, report, b)
        save_figure(figure, args.plot)


if __name__ == "__main__":
    run(main)
