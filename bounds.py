"""The theory in NumPy: the attention score as a function of distance, and the two bounds the paper sets on it.

Reading order: attention_score (eq. 3), interpolation_bound (Theorem 2.1, set right), B and extrapolation_bound
(eq. 8), trivial_bound, adversarial_h. notebooks/attention_bounds.ipynb tells the whole story. Run as a script,
it draws the bounds and prints what is left of "at least 600 times":

    python bounds.py                                                # LLaMA, as in the paper: a table
    python bounds.py --preset llama3 --scale 4 --plot bounds.png    # theta 500000; draws both bounds too
    python bounds.py --head_dim 128 --theta 10000 --scale 16 --plot bounds.png --json bounds.json

The paper's argument. With h_j = q_j * conj(k_j), q and k read as d/2 complex numbers, the score of a query and a
key at distance s is a(s) = Re sum_j h_j e^{i s theta_j} (eq. 3). Between two distances that were trained, a(s)
stays near the chord through them (eq. 5); beyond the window nothing better is known than eq. (8).

Three things differ from the paper, each tested in tests/test_bounds.py:
  1. Theorem 2.1's constant d / (4 ln c) is too small for what it bounds, sum_j theta_j^2: its proof uses
     c^x <= 1 + x ln c, and c^x is convex. `constant="exact"` takes the sum itself, "paper" the printed constant.
  2. B(s) >= d holds on the 4096 distances that the paper plots (c = 10000, d = 128), not on the 32768 it extends to.
  3. 2 max|h| B(s) is never below the trivial bound, sum_j |h_j| <= (d/2) max|h|. Neighbouring A_k differ by an arrow
     of length 1, so 1 <= |A_k| + |A_{k-1}|; summed over k = 1 ... d/2 this says d/2 <= 2 B(s).

Everything is float64; distances are in tokens and may be fractional; bounds are in the unit of h (no 1/sqrt(d)).
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np

PRESETS = {  # RoPE as the models were pre-trained with it
    "llama": {"head_dim": 128, "theta": 10000.0, "window": 2048},  # LLaMA 1, the paper's (LLaMA 2: window 4096)
    "llama3": {"head_dim": 128, "theta": 500000.0, "window": 8192},
    "smollm2": {"head_dim": 64, "theta": 100000.0, "window": 8192},
    "tiny": {"head_dim": 32, "theta": 10000.0, "window": 256},
}
PAPER_RANGES = (4096, 32768)  # where figure 5 ends, and the longest window that the paper extends to
CHUNK = 2**17  # complex numbers in flight in attention_score and B: 2 MB an array


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta_j = theta^(-2j/d), j < d/2 (eq. 1), float64 radians per position. ValueError if d or theta is off."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    if not math.isfinite(theta) or theta <= 1:
        raise ValueError(f"theta must be a finite number above 1, got {theta}")
    return float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)


def sum_theta_squared(head_dim: int, theta: float) -> float:
    """sum_j theta_j^2 in closed form: a geometric series, (1 - c^-2) / (1 - c^(-4/d)).

    As 1 / (1 - e^-x) = 1/x + 1/2 + x/12 - ..., x = 4 ln c / d, it exceeds the paper's d / (4 ln c) by about 1/2.
    """
    frequencies(head_dim, theta)  # for its checks
    log_c = math.log(theta)
    return math.expm1(-2 * log_c) / math.expm1(-4 * log_c / head_dim)


def _distances(s) -> np.ndarray:
    s = np.asarray(s, dtype=np.float64)
    if not np.isfinite(s).all():
        raise ValueError("s must hold finite distances, in tokens")
    return s


def _check_h_max(h_max) -> np.ndarray:
    h_max = np.asarray(h_max, dtype=np.float64)
    if not (np.isfinite(h_max) & (h_max >= 0)).all():
        raise ValueError(f"h_max must be finite and not negative, it is max|h_j|; got {h_max}")
    return h_max


def _check_h(h, head_dim: int) -> np.ndarray:
    h = np.asarray(h, dtype=np.complex128)
    if h.ndim == 0 or h.shape[-1] != head_dim // 2:
        raise ValueError(f"h must have head_dim / 2 = {head_dim // 2} complex numbers in its last axis, got {h.shape}")
    return h


def attention_score(h, s, head_dim: int, theta: float) -> np.ndarray:
    """a(s) = Re sum_j h_j e^{i s theta_j}, eq. (3), at s = m - n (query at m, key at n), without 1/sqrt(d).

    h: complex (..., d/2), h_j = q_j * conj(k_j).  s: distances, any shape.  Returns float64 h.shape[:-1] + s.shape.
    """
    freqs, s = frequencies(head_dim, theta), _distances(s)
    h, flat = _check_h(h, head_dim), s.reshape(-1)
    out = np.empty((*h.shape[:-1], flat.size))
    step = max(1, CHUNK // len(freqs))
    for i in range(0, flat.size, step):
        out[..., i : i + step] = (h @ np.exp(1j * np.outer(freqs, flat[i : i + step]))).real
    return out.reshape(h.shape[:-1] + s.shape)[()]


def interpolation_bound(h_max, s, s1, s2, head_dim: int, theta: float, constant: str = "exact") -> np.ndarray:
    """Theorem 2.1: how far a(s) can be from the chord between a(s1) and a(s2), for s1 <= s <= s2 (arrays broadcast).

    Taylor: |a(s) - a_lin(s)| <= (s - s1)(s2 - s)/2 * max|a''|, and |a''| <= max|h| sum_j theta_j^2.
    constant: "exact" takes that sum; "paper" takes d / (4 ln c) in its place, as eq. (5) and (7) print it. The
    latter is smaller and NOT a bound (see adversarial_h). On the unit grid, s in the middle, it is
    d max|h| / (32 ln c), eq. (7).
    """
    if constant not in ("exact", "paper"):
        raise ValueError(f'constant must be "exact" or "paper", got {constant!r}')
    curvature = sum_theta_squared(head_dim, theta)
    if constant == "paper":
        curvature = head_dim / (4 * math.log(theta))
    s, s1, s2, h_max = _distances(s), _distances(s1), _distances(s2), _check_h_max(h_max)
    if not ((s1 <= s) & (s <= s2)).all():
        raise ValueError("s must lie between s1 and s2: the theorem interpolates")
    return h_max * (s - s1) * (s2 - s) / 2 * curvature


def B(s, head_dim: int, theta: float) -> np.ndarray:
    """B(s) = sum_{k=1}^{d/2} |A_k(s)|, A_k(s) = sum_{j<k} e^{i s theta_j}, of eq. (8). s: any shape; same shape out.

    A_k are the running sums of the arrows. In chunks: memory is that of s and the result plus some 10 MB.
    """
    freqs, s = frequencies(head_dim, theta), _distances(s)
    flat = s.reshape(-1)
    out = np.empty(flat.size)
    step = max(1, CHUNK // len(freqs))
    for i in range(0, flat.size, step):
        arrows = np.exp(1j * np.outer(flat[i : i + step], freqs))  # (distances, d/2)
        out[i : i + step] = np.abs(np.cumsum(arrows, axis=1, out=arrows)).sum(axis=1)
    return out.reshape(s.shape)[()]


def extrapolation_bound(h_max, s, head_dim: int, theta: float) -> np.ndarray:
    """|a(s)| <= 2 max|h| B(s), the last form of eq. (8): what the paper compares with eq. (7)."""
    return 2 * _check_h_max(h_max) * B(s, head_dim, theta)


def difference_bound(h, s, head_dim: int, theta: float) -> np.ndarray:
    """|a(s)| <= max_j |h_j - h_{j+1}| B(s), the sharper form of eq. (8); shapes as in attention_score.

    It is summation by parts, sum_j h_j e^{i s theta_j} = sum_k A_k (h_{k-1} - h_k), which needs h_{d/2} = 0: the
    last difference is |h_{d/2-1}| itself. It beats the trivial bound only where h changes slowly from pair to pair.
    """
    h, b = _check_h(h, head_dim), B(s, head_dim, theta)
    last = np.zeros((*h.shape[:-1], 1))  # h_{d/2} = 0
    return np.multiply.outer(np.abs(np.diff(h, axis=-1, append=last)).max(axis=-1), b)


def trivial_bound(h_max, head_dim: int) -> np.ndarray:
    """|a(s)| <= sum_j |h_j| <= (d/2) max|h|: arrows cannot add up to more than their lengths. Some h attains it."""
    return _check_h_max(h_max) * head_dim / 2


def adversarial_h(s, head_dim: int, theta: float, h_max: float = 1.0) -> np.ndarray:
    """The worst h with |h_j| <= h_max: h_j = h_max e^{-i s theta_j}. s (...) -> complex (..., d/2).

    At distance s all its arrows line up, so that a(s) is the trivial bound itself. With s in the middle of
    [s1, s2] no h lies further from the chord: its deviation there is h_max sum_j (1 - cos(theta_j (s2 - s1)/2)),
    on the unit grid within 2.2% of the exact bound (d >= 8), and above the paper's (d up to 1000 at least).
    """
    return _check_h_max(h_max) * np.exp(-1j * np.multiply.outer(_distances(s), frequencies(head_dim, theta)))


# --------------------------------------------------------------------------- the script


def summarize(head_dim: int, b: np.ndarray, deviation: dict) -> dict:
    """What B on 0 .. len(b) - 1 says of the claims B(s) >= d and "(8) is 600 times (7)", ready for JSON."""
    below, trivial, least = b < head_dim, float(trivial_bound(1.0, head_dim)), float(b.min())
    return {
        "range": [0, len(b) - 1],
        "min_B_over_d": least / head_dim,
        "argmin": int(b.argmin()),
        "first_below_d": int(below.argmax()) if below.any() else None,
        "share_below_d": float(below.mean()),
        "ratio": {c: 2 * least / deviation[c] for c in ("paper", "exact")},  # the least of (8) over (7)
        "trivial_ratio": {c: trivial / deviation[c] for c in ("paper", "exact")},
        "min_extrapolation_over_trivial": 2 * least / trivial,
    }


def table(report: dict) -> str:
    """The report as text: a column per range, the paper's claim last."""
    ranges, dev = report["ranges"], report["grid_deviation"]
    rows = [["distances s", *(f"0 .. {r['range'][1]}" for r in ranges), "the paper"]]
    for name, value, claim in (
        ("least B(s)/d", lambda r: f"{r['min_B_over_d']:.4f}", "at least 1"),
        ("  at s =", lambda r: str(r["argmin"]), ""),
        ("first s with B(s) < d", lambda r: str(r["first_below_d"]).lower(), "none"),
        ("share of s with B(s) < d", lambda r: f"{r['share_below_d']:.2%}", "0%"),
        ("least (8) / (7), paper's constant", lambda r: f"{r['ratio']['paper']:.0f}x", "at least 600x"),
        ("least (8) / (7), exact constant", lambda r: f"{r['ratio']['exact']:.0f}x", ""),
        ("trivial / (7), paper's constant", lambda r: f"{r['trivial_ratio']['paper']:.0f}x", "not considered"),
        ("trivial / (7), exact constant", lambda r: f"{r['trivial_ratio']['exact']:.0f}x", ""),
        ("least (8) / trivial", lambda r: f"{r['min_extrapolation_over_trivial']:.2f}x", "not considered"),
    ):
        rows.append([name, *(value(r) for r in ranges), claim])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]).rstrip() for r in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines) + (
        "\n\n(8): |a(s)| <= 2 max|h| B(s).  trivial: |a(s)| <= (d/2) max|h|.  The paper has d 128, c 10000."
        f"\n(7), deviation from the chord on the unit grid, in max|h|: paper {dev['paper']:.5f}, exact "
        f"{dev['exact']:.5f}, attained by the worst h {dev['attained']:.5f}."
    )


def figure(report: dict, b: np.ndarray):
    """Left: both bounds over distance, in max|h|. Right: B(s)/d, the paper's figure 5, as far as asked."""
    import matplotlib
    from matplotlib.figure import Figure  # draws without a display

    matplotlib.rcParams["agg.path.chunksize"] = 10000  # long ranges are long lines
    d, window, dev = report["head_dim"], report["window"], report["grid_deviation"]
    fig, s = Figure(figsize=(12, 4.5), layout="constrained"), np.arange(len(b))
    left, right = fig.subplots(1, 2)
    left.semilogy(s, 2 * b, lw=0.5, label="extrapolation, eq. (8): 2B(s)")
    left.axhline(d / 2, color="C2", label="trivial: d/2")
    left.axhline(dev["exact"], color="C3", label=f"interpolation, exact: {dev['exact']:.3f}")
    left.axhline(dev["paper"], color="C1", ls="--", label=f"interpolation, the paper's (7): {dev['paper']:.3f}")
    left.set(xlabel="distance s (tokens)", ylabel="bound, in units of max|h|", title="Both bounds over distance")
    right.plot(s, b / d, lw=0.5, label="B(s)/d")
    right.axhline(1, color="C3", ls="--", label="the paper's claim: never below 1")
    right.axhline(0.25, color="C2", label="the trivial bound: 1/4, never undercut")
    right.set(xlabel="distance s (tokens)", ylabel="B(s)/d", ylim=(0, 4), title="The paper's figure 5, further out")
    for axis, place in ((left, (1, 0.36)), (right, (1, 0.87))):
        axis.axvspan(0, window, color="0.85", zorder=0, label=f"trained window: {window}")
        axis.legend(fontsize=8, loc="center right", bbox_to_anchor=place, framealpha=1)
    fig.suptitle(f"RoPE with head_dim {d}, theta {report['theta']:g}")
    return fig


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, no usage block
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def number(kind, least, what: str):
    """An argparse type: a finite int or float of at least `least`; `what` says in words what to give."""

    def parse(text: str):
        try:
            value = kind(text)
            if not least <= value <= 1e300:  # nan fails too
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"give {what}, not {text[:40]!r}") from None
        return value

    return parse


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(
        prog="bounds.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draw and check the two bounds of the Position Interpolation paper (eq. 5 to 8).",
        epilog="presets:\n"
        + "\n".join(f"  {k:8} {', '.join(f'{n} {x:g}' for n, x in v.items())}" for k, v in PRESETS.items()),
    )
    above_1 = math.nextafter(1, 2)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="llama", help="RoPE settings, listed below (default: %(default)s)")
    add("--head_dim", type=number(int, 2, "an even whole number of at least 2"), help="d (default: the preset's, 128)")
    add("--theta", type=number(float, above_1, "a number above 1"), help="base c (default: the preset's, 10000)")
    add("--window", type=number(int, 1, "a whole number of tokens of at least 1"),
        help="trained window L in tokens (default: the preset's, 2048)")  # fmt: skip
    add("--scale", type=number(float, 1, "a number of at least 1"), default=16.0,
        help="L'/L: distances are looked at up to scale x window (default: %(default)g)")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help="draw both bounds to a .png, .svg or .pdf (default: no plot)")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON (default: no file)")
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.head_dim % 2:
        parser.error(f"argument --head_dim: give an even whole number, not {args.head_dim}")
    if args.head_dim * max(args.scale * args.window, *PAPER_RANGES) > 2**29:
        parser.error("argument --scale: scale x window x head_dim is beyond 2^29, lower --scale or --window")
    for name, path in (("--plot", args.plot), ("--json", args.json)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"argument {name}: give a file in a folder that exists, not {str(path)!r}")
    if args.plot is not None:
        if args.plot.suffix not in (".png", ".svg", ".pdf"):
            parser.error(f"argument --plot: give a name that ends in .png, .svg or .pdf, not {str(args.plot)!r}")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("argument --plot: needs matplotlib, install it with: pip install matplotlib")
    args.parser = parser
    return args


def write(args: argparse.Namespace, name: str, path: Path, save) -> None:
    """save(temporary path), then rename: a file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        args.parser.error(f"argument {name}: cannot write {str(path)!r}: {e.strerror}; give another file")


def main(argv=None) -> None:
    args = parse_args(argv)
    d, theta = args.head_dim, args.theta
    ends = sorted({*PAPER_RANGES, round(args.scale * args.window)})
    b = B(np.arange(ends[-1] + 1), d, theta)
    deviation = {c: float(interpolation_bound(1.0, 0.5, 0, 1, d, theta, c)) for c in ("paper", "exact")}  # eq. (7)
    worst = attention_score(adversarial_h(0.5, d, theta), np.array([0, 0.5, 1]), d, theta)
    deviation["attained"] = float(worst[1] - (worst[0] + worst[2]) / 2)
    report = {name: getattr(args, name) for name in ("head_dim", "theta", "window", "scale")} | {
        "sum_theta_squared": sum_theta_squared(d, theta),
        "grid_deviation": deviation,
        "ranges": [summarize(d, b[: end + 1], deviation) for end in ends],
        "paper": {"head_dim": 128, "theta": 10000.0, "min_B_over_d": 1.0, "ratio": 2 * 294.73},
    }
    print(f"RoPE head_dim {d}, theta {theta:g}; window {args.window} x scale {args.scale:g}\n\n{table(report)}")
    if args.json is not None:
        write(args, "--json", args.json, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    if args.plot is not None:
        fig = figure(report, b)
        write(args, "--plot", args.plot, lambda path: fig.savefig(path, dpi=130, format=args.plot.suffix[1:]))


if __name__ == "__main__":
    main()
