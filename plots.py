"""Every picture of this repo: perplexity, loss by position, passkeys, the theory's bounds, speed.

Each draw_... function draws into one panel of a figure (`axis`, Matplotlib's Axes) or two (`axes`):

    figure, axes = new_figure(panels=2)
    draw_perplexity(axes[0], results)
    draw_positions(axes[1], results)
    save_figure(figure, "out/ppl.png")

`results` are the results of eval_ppl.py and passkey.py, as these write them to JSON. `curves` are
evaluation.Curve tuples: run, window, values ({step: value}), method. A method has the same color in
every picture (LOOKS). No display is opened, because figures are made without pyplot.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from cli import replacing

# ---- the look of lines ---------------------------------------------------------------------------


class LineStyle(NamedTuple):
    """The look of a line. Marker and dashes tell lines apart where a print has no color.

    linestyle: dashes by name, or as (offset, (dash, gap, dash, gap, ...)) in widths of the line.
    """

    color: str
    marker: str
    linestyle: str | tuple


# The colors differ in brightness. They are those that Okabe and Ito chose for people who can't tell
# red from green, but the yellow is darker.
STYLES = (
    LineStyle("#000000", "o", "-"),  # black
    LineStyle("#0072b2", "s", "--"),  # blue
    LineStyle("#d55e00", "^", "-."),  # orange
    LineStyle("#009e73", "D", ":"),  # green
    LineStyle("#cc79a7", "v", (0, (6, 1.5))),  # pink
    LineStyle("#56b4e9", "P", (0, (3, 1, 1, 1, 1, 1))),  # light blue
    LineStyle("#8c6d00", "X", (0, (1, 1))),  # dark yellow
)

BLACK, BLUE, ORANGE, GREEN, PINK, LIGHT_BLUE, YELLOW = STYLES

# The look of each method in every picture, by its name (evaluation.method_name). "extrapolated" is
# the model as it was pre-trained, read beyond its window.
LOOKS = {
    "not extended": BLACK,
    "extrapolated": BLACK,
    "PI": ORANGE,
    "direct fine-tuning": GREEN,
    "NTK": PINK,
    "YaRN": LIGHT_BLUE,
    "dynamic NTK": YELLOW,
    "Llama 3": BLUE,
}
UNTUNED = ", no fine-tuning"  # stands after a method's name; such a line has open markers

# The color of a cell of the heat map by the share of keys found. Its darkest color leaves the lines
# of k_max and of the original window visible.
FOUND = LinearSegmentedColormap.from_list("found", ["#ffffff", "#5b7c99"])

# The look of lines to compare with, which lie behind the lines of the results (zorder 0)
GUIDE = {"color": "0.55", "linestyle": (0, (2, 2)), "linewidth": 1.2, "zorder": 0}


def style(i: int, **changes) -> dict:
    """The keyword arguments of axis.plot for line i. After the last style the first comes again.

    changes: keyword arguments that replace those of the style, such as markersize=4.
    """
    look = STYLES[i % len(STYLES)]._asdict()
    return look | {"markersize": 6, "linewidth": 1.6} | changes


def method_styles(methods: Sequence[str], **changes) -> list[dict]:
    """The keyword arguments of axis.plot for the lines of one panel, by the method of each line.

    The color is the method's, and so are marker and dashes unless an earlier line has them: then
    they are some that no method of the panel has. A line without a method has the style of its
    number. changes: as in `style`.
    """
    looks = []
    for i, method in enumerate(methods):
        looks.append(LOOKS.get(method.removesuffix(UNTUNED), STYLES[i % len(STYLES)]))
    spare = itertools.cycle([look for look in STYLES if look not in looks] or STYLES)

    styles = []
    seen = set()
    for method, look in zip(methods, looks):
        untuned = method.endswith(UNTUNED)
        shape = look
        if (look, untuned) in seen:
            shape = next(spare)
        seen.add((look, untuned))
        keywords = style(STYLES.index(shape), **changes) | {"color": look.color}
        if untuned:
            keywords["markerfacecolor"] = "white"
            keywords["linewidth"] = 1.0
        styles.append(keywords)
    return styles


def methods_of(results: Sequence[dict]) -> list[str]:
    """The method of each result; "" where it names none."""
    return [result.get("method", "") for result in results]


def label(result: dict) -> str:
    """The name of a checkpoint in a legend: its "label", or its path with method and scale."""
    if "label" in result:
        return result["label"]
    if result["scale"] == 1:
        return result["init"]
    return f"{result['init']} ({result['method']}, scale {result['scale']:g})"


# ---- figures -------------------------------------------------------------------------------------


def new_figure(panels: int, width: float = 6.4) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, side by side. width: inches of a panel."""
    figure = Figure(figsize=(width * panels, 4.6), layout="constrained")
    grid = figure.subplots(1, panels, squeeze=False)  # an array of one row
    return figure, list(grid[0])


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as .png, .svg or .pdf. The file is there whole or not at all."""
    file_format = Path(path).suffix.removeprefix(".").lower()
    # Draw a line of very many points in parts (bounds.py has 100,000 and more), because Matplotlib
    # may refuse to draw it at once
    with replacing(path) as temporary, matplotlib.rc_context({"agg.path.chunksize": 10000}):
        figure.savefig(temporary, dpi=140, format=file_format)


def mark_original(axis: Axes, results: Sequence[dict], upright: bool = True) -> None:
    """Draw a line at the original window of the results, or one at each if they differ."""
    draw_line = axis.axvline if upright else axis.axhline
    windows = {result["original_window"] for result in results}
    for window in sorted(windows):
        draw_line(window, label=f"original window, {window:,}", **GUIDE)


def set_window_axis(axis: Axes, windows: Iterable[int]) -> None:
    """Make the horizontal axis one of windows: logarithmic, with a tick at each of them."""
    ticks = sorted(set(windows))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{window:,}" for window in ticks])
    axis.minorticks_off()


def set_perplexity_axis(axis: Axes, values: Sequence[float]) -> None:
    """Make the vertical axis one of perplexities: logarithmic if they are far apart."""
    lowest = min(values)
    highest = max(values)
    if highest > 4 * lowest:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        return
    # The axis spans at least a tenth of the values, so that small differences look small
    middle = (lowest + highest) / 2
    half = max(0.55 * (highest - lowest), 0.05 * highest)
    axis.set_ylim(middle - half, middle + half)


def set_step_axis(axis: Axes, steps: Sequence[int]) -> None:
    """Make the horizontal axis one of fine-tuning steps. steps: sorted."""
    last = steps[-1]
    first = min((step for step in steps if step > 0), default=last)
    if last > 20 * first:
        # Steps like 200, 400, ... 1,000, 10,000 (the paper's table 4) need a logarithmic axis, on
        # which the first ones have room. Below `first` it is linear, so that it begins at step 0.
        axis.set_xscale("symlog", linthresh=first)
        ticks = [last]
        for step in reversed(steps):
            # The labels of closer ticks would overlap
            if step * 1.6 <= ticks[-1]:
                ticks.append(step)
        axis.set_xticks(ticks)
        axis.minorticks_off()
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.set_xlabel("fine-tuning steps")


def put_legend_below(axis: Axes) -> None:
    """Put the legend under the panel, because the lines leave no room for it inside."""
    _, names = axis.get_legend_handles_labels()
    columns = 2
    if max(len(name) for name in names) >= 40:
        columns = 1
    axis.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, frameon=False
    )


# ---- perplexity (eval_ppl.py) --------------------------------------------------------------------


def draw_perplexity(axis: Axes, results: Sequence[dict]) -> None:
    """Draw perplexity over the window, a line for each checkpoint."""
    all_windows = []
    all_values = []
    for result, look in zip(results, method_styles(methods_of(results))):
        windows = [row["window"] for row in result["windows"]]
        values = [row["ppl"] for row in result["windows"]]
        axis.plot(windows, values, label=label(result), **look)
        all_windows += windows
        all_values += values
    mark_original(axis, results)

    set_window_axis(axis, all_windows)
    set_perplexity_axis(axis, all_values)
    axis.grid(color="0.9")
    axis.set(xlabel="evaluation window (tokens)", ylabel="perplexity")
    axis.set_title("Sliding-window perplexity")
    axis.legend(fontsize=8)


def draw_positions(axis: Axes, results: Sequence[dict], bins: int = 20) -> None:
    """Draw the loss by position, as means over `bins` bins that grow with the position."""
    looks = method_styles(methods_of(results), markevery=4, markersize=5, linewidth=1.3)
    for result, look in zip(results, looks):
        middles, means = bin_means(np.array(result["positions"]["nll"]), bins)
        axis.plot(middles, means, label=label(result), **look)
    mark_original(axis, results)

    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(color="0.9")
    axis.set(xlabel="position in the window (tokens before)", ylabel="loss (nats per token)")
    axis.set_title("Loss by position")
    put_legend_below(axis)


def bin_means(nll: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle position and the mean loss of each bin. Entry i of nll is of position i + 1.

    The bins are equally wide on a logarithmic axis. A short nll has fewer of them.
    """
    # The first positions are left out: their loss is far higher, and the window has no part in it
    first = min(16, len(nll))
    edges = np.unique(np.geomspace(first, len(nll) + 1, bins + 1).round().astype(int)) - 1
    starts = edges[:-1]
    ends = edges[1:]
    means = np.array([nll[start:end].mean() for start, end in zip(starts, ends)])
    # A bin holds positions start + 1 ... end; its middle on a logarithmic axis is a geometric mean
    middles = np.sqrt((starts + 1.0) * ends)
    return middles, means


# ---- passkeys (passkey.py) -----------------------------------------------------------------------


def draw_passkeys(axis: Axes, results: Sequence[dict], threshold: float) -> None:
    """Draw the share of keys found over the distance k, a line for each checkpoint.

    k_max stands in the legend and has a ring. There is a horizontal line at the threshold, the
    success rate from which a key counts as seen.
    """
    for result, look in zip(results, method_styles(methods_of(results), markersize=4.5)):
        k_max = result["k_max"]
        distances = [point["k"] for point in result["points"]]
        found = [point["success"] for point in result["points"]]
        name = f"{label(result)}: k_max {k_max:,}"
        axis.plot(distances, found, label=name, **look)
        if k_max in distances:
            height = found[distances.index(k_max)]
            ring = {"markersize": 12, "fillstyle": "none", "clip_on": False}
            axis.plot([k_max], [height], "o", color=look["color"], **ring)
    mark_original(axis, results)
    axis.axhline(threshold, color="0.55", linewidth=1, zorder=0)

    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0%", "20%", "40%", "60%", "80%", "100%"])
    axis.set(xlim=(0, None), ylim=(-0.04, 1.5))  # the legend has room above the lines
    axis.set(xlabel="k: tokens from the key to the prompt's end", ylabel="keys found")
    axis.set_title("Passkey retrieval (ring: k_max)")
    axis.grid(color="0.92")
    axis.legend(fontsize=8, loc="upper right")


def draw_heat_map(axis: Axes, result: dict) -> AxesImage:
    """Draw the keys that one checkpoint found, dark where all were: length across, distance up.

    Lines across a column show k_max (solid) and the original window (dotted). Distances without a
    prompt are hatched. Returns the image, for a color bar.
    """
    runs = result["lengths"]
    n = result["distances"]
    half = 0.5 / n  # half the height of a cell; its middle is at i/n of the length
    image = axis.imshow(
        success_grid(runs, n), cmap=FOUND, vmin=0, vmax=1, aspect="auto",
        interpolation="nearest", origin="lower", extent=(-0.5, len(runs) - 0.5, half, 1 + half)
    )
    # The image is transparent where the grid has no value, so that the hatched background is seen
    axis.patch.set(facecolor="white", hatch="///", edgecolor="0.6")

    # The line of k_max is at the upper edge of its cell
    k_max_line = {"color": ORANGE.color, "linewidth": 3, "solid_capstyle": "butt", "clip_on": False}
    original_line = {"color": BLACK.color, "linewidth": 2, "linestyle": ":"}
    for column, run in enumerate(runs):
        sides = [column - 0.5, column + 0.5]
        reach = run["k_max"] / run["length"] + half
        original = result["original_window"] / run["length"]
        if run["k_max"] > 0:
            axis.plot(sides, [reach, reach], **k_max_line)
        if original <= 1:
            axis.plot(sides, [original, original], **original_line)

    # The legend's entries come from lines without points, because a column may lack either line
    axis.plot([], [], label="k_max", **k_max_line)
    axis.plot([], [], label="k = original window", **original_line)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
    axis.set_xticks(range(len(runs)), [f"{run['length']:,}\n{run['k_max']:,}" for run in runs])
    axis.set_yticks([0.25, 0.5, 0.75, 1], ["25%", "50%", "75%", "100%"])
    axis.set_xlabel("length (prompt and answer, in tokens), and k_max")
    axis.set_ylabel("k, in % of the length")
    axis.set_title(label(result), fontsize=10)
    return image


def success_grid(runs: Sequence[dict], n: int) -> np.ndarray:
    """The success rates as (n, lengths), smallest distance first; NaN where there was no prompt."""
    grid = np.full((n, len(runs)), np.nan)
    for column, run in enumerate(runs):
        for point in run["points"]:
            i = round(point["k"] * n / run["length"])  # k is i/n of the length, i = 1 ... n
            grid[i - 1, column] = point["success"]
    return grid


# ---- over fine-tuning steps (both) ---------------------------------------------------------------


def draw_perplexity_over_steps(axis: Axes, curves: Sequence) -> None:
    """Draw perplexity over fine-tuning steps."""
    draw_curves(axis, curves, "perplexity")
    set_perplexity_axis(axis, [value for curve in curves for value in curve.values.values()])
    axis.set_title("Perplexity over steps (paper: table 3)")
    put_legend_below(axis)


def draw_found_over_steps(axis: Axes, curves: Sequence, original_window: int) -> None:
    """Draw the share of keys found beyond the original window over fine-tuning steps."""
    draw_curves(axis, curves, "keys found")
    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axis.set_title(f"Keys beyond the original window, {original_window:,}")
    put_legend_below(axis)


def draw_reach_over_steps(axis: Axes, curves: Sequence, results: Sequence[dict] = ()) -> None:
    """Draw k_max over fine-tuning steps, and a line at the original window of the results."""
    draw_curves(axis, curves, "k_max")
    mark_original(axis, results, upright=False)
    longest = max(curve.window for curve in curves)
    axis.set_ylim(-0.02 * longest, 1.05 * longest)
    axis.set_title("Passkey reach over steps (paper: table 4)")
    put_legend_below(axis)


def draw_curves(axis: Axes, curves: Sequence, measure: str) -> None:
    """Draw a line for each curve. measure: the name of the vertical axis."""
    # The runs with their methods, and the windows, each once, in the order of the curves
    methods = {curve.run: curve.method for curve in curves}
    runs = list(methods)
    windows = list(dict.fromkeys(curve.window for curve in curves))
    run_styles = method_styles(list(methods.values()))
    colors = [run_style["color"] for run_style in run_styles]

    for curve in curves:
        run = runs.index(curve.run)
        name = curve.run
        look = run_styles[run]
        if len(windows) > 1:
            # A run has its color and a window its marker and dashes. Runs of one color have other
            # markers for the same windows.
            name += f", {curve.window:,} tokens"
            earlier = colors[:run].count(colors[run])
            shape = windows.index(curve.window) + earlier * len(windows)
            look = style(shape) | {"color": colors[run]}
        steps = sorted(curve.values)
        axis.plot(steps, [curve.values[step] for step in steps], label=name, **look)

    set_step_axis(axis, sorted({step for curve in curves for step in curve.values}))
    axis.yaxis.set_major_formatter("{x:,g}")
    if len(windows) == 1:
        measure += f" at {windows[0]:,} tokens"
    axis.set_ylabel(measure)
    axis.grid(color="0.92")


# ---- the bounds of the theory (bounds.py) --------------------------------------------------------


def draw_bounds(axes: Sequence[Axes], report: dict, b: np.ndarray) -> None:
    """Draw both bounds over the distance (left), and B(s)/d, the paper's figure 5 (right).

    report: what bounds.py writes to JSON. b: B(s) at s = 0, 1, 2, ...
    """
    left, right = axes
    d = report["head_dim"]
    window = report["window"]
    paper = report["grid_deviation"]["paper"]
    sharp = report["grid_deviation"]["sharp"]
    s = np.arange(len(b))

    # Extrapolation and interpolation have the colors that they have in all pictures
    thin = {"color": LOOKS["extrapolated"].color, "linewidth": 0.5}
    interpolated = LOOKS["PI"].color
    trivial = {"color": BLUE.color, "linestyle": "-."}
    left.semilogy(s, 2 * b, label="extrapolation, eq. (8): 2B(s)", **thin)
    left.axhline(d / 2, label="trivial, attained: d/2", **trivial)
    left.axhline(sharp, color=interpolated, label=f"interpolation, attained: {sharp:.3f}")
    name = f"interpolation, the paper's (7): {paper:.3f}"
    left.axhline(paper, color=interpolated, linestyle="--", label=name)
    left.set(xlabel="distance s (tokens)", ylabel="bound, in units of max|h|")
    left.set_title("Both bounds over distance")

    claim = {"color": PINK.color, "linestyle": "--"}
    right.plot(s, b / d, label="B(s)/d", **thin)
    right.axhline(1, label="the paper's claim: never below 1", **claim)
    right.axhline(0.25, label="the trivial bound: 1/4, never undercut", **trivial)
    right.set(xlabel="distance s (tokens)", ylabel="B(s)/d", ylim=(0, 4))
    right.set_title("The paper's figure 5, further out")

    # The legends stand where the lines leave room: at these heights of the panels
    for axis, height in ((left, 0.36), (right, 0.87)):
        axis.axvspan(0, window, color="0.85", zorder=0, label=f"trained window: {window}")
        axis.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, height), framealpha=1)
    left.figure.suptitle(f"RoPE with head_dim {d}, theta {report['theta']:g}")


# ---- speed beside transformers (bench.py) --------------------------------------------------------


def draw_speed_ratios(axes: Sequence[Axes], rows: Sequence[dict]) -> None:
    """Draw the ratios of speed (left) and of memory (right) over the window, a line for each task.

    rows: {"task", "window", "speed_ratio", "memory_ratio"}; a ratio is ours over transformers'.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))  # each once, in the order of the rows
    panels = (("speed_ratio", "tokens per second"), ("memory_ratio", "peak memory"))
    for axis, (ratio, measure) in zip(axes, panels):
        for i, task in enumerate(tasks):
            task_rows = [row for row in rows if row["task"] == task]
            windows = [row["window"] for row in task_rows]
            axis.plot(windows, [row[ratio] for row in task_rows], label=task, **style(i))
        axis.axhline(1, **GUIDE)

        set_window_axis(axis, [row["window"] for row in rows])
        axis.set_ylim(bottom=0)
        axis.grid(color="0.9")
        axis.set(xlabel="window (tokens)", ylabel="ours / transformers")
        axis.set_title(f"Ratio of {measure}")
        axis.legend(fontsize=8)


# ---- the notebook of the theory (attention_bounds.ipynb) -----------------------------------------

COLORS = [look.color for look in STYLES]


def new_grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure and its panels, (rows, columns). width, height: inches of a panel."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=90)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_pair(axis: Axes, query: complex, key: complex) -> None:
    """Draw one pair of a query and of a key as arrows, and the angle from the key to the query."""
    for tip, name, color in ((query, "query", COLORS[1]), (key, "key", COLORS[2])):
        axis.annotate("", (tip.real, tip.imag), (0, 0), arrowprops={"color": color, "width": 2})
        axis.text(1.15 * tip.real, 1.15 * tip.imag, name, color=color, ha="center", va="center")
    start = np.angle(key)
    between = np.angle(query / key)
    arc = 0.4 * np.exp(1j * np.linspace(start, start + between, 50))
    axis.plot(arc.real, arc.imag, color="0.3", linewidth=3)
    draw_circle(axis, 1.0)
    axis.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xticks=[], yticks=[])


def draw_circle(axis: Axes, radius: float) -> None:
    turn = radius * np.exp(2j * np.pi * np.linspace(0, 1, 200))
    axis.plot(turn.real, turn.imag, color="0.85", linewidth=1, zorder=0)


def draw_hands(axes: Sequence[Axes], freqs: np.ndarray, rings: dict[str, np.ndarray]) -> None:
    """Draw where each pair points, a panel for each pair and a ring for each set of positions.

    freqs: radians per position, one for each panel. rings: positions by name, the inner ring first.
    """
    for j, (axis, freq) in enumerate(zip(axes, freqs)):
        for i, (name, positions) in enumerate(rings.items()):
            radius = 1 + 0.22 * i
            draw_circle(axis, radius)
            tips = radius * np.exp(1j * freq * np.asarray(positions))
            look = style(i, linestyle="none", markersize=3.5)
            axis.plot(tips.real, tips.imag, label=name, **look)
        axis.set(aspect="equal", xticks=[], yticks=[])
        axis.set_title(f"pair {j}: {np.degrees(freq):.3g}° a token", fontsize=9)
        axis.set_frame_on(False)
    handles = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(*handles, loc="outside lower center", ncols=len(rings), fontsize=8)


def draw_arrows(axis: Axes, arrows: np.ndarray) -> None:
    """Draw complex numbers as arrows, head to tail, and the real part of their sum as a bar."""
    tips = np.concatenate([[0], np.cumsum(arrows)])
    for j, arrow in enumerate(arrows):
        axis.quiver(
            tips[j].real, tips[j].imag, arrow.real, arrow.imag, angles="xy", scale_units="xy",
            scale=1, color=COLORS[1 + j % (len(COLORS) - 1)], width=0.02, label=f"pair {j}"
        )
    end = tips[-1]
    axis.plot([end.real, end.real], [0, end.imag], color="0.4", linestyle=":", linewidth=1)
    axis.plot([0, end.real], [0, 0], color="0.2", linewidth=4, alpha=0.6, label="score a(s)")
    axis.axhline(0, color="0.9", zorder=0)
    axis.axvline(0, color="0.9", zorder=0)
    reach = 0.7 * np.abs(arrows).sum()
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])


def draw_over_distance(
    axis: Axes, s: np.ndarray, curves: dict[str, np.ndarray], levels: dict[str, float] = {},
    window: int | None = None
) -> None:
    """Draw curves over the distance, with named horizontal lines and the trained window in gray.

    curves: values at the distances s, by name. levels: heights of the horizontal lines, by name.
    """
    for i, (name, values) in enumerate(curves.items()):
        axis.plot(s, values, label=name, color=COLORS[i % len(COLORS)], linewidth=1)
    for i, (name, height) in enumerate(levels.items()):
        look = style(len(curves) + i, marker="", linewidth=1.4)
        axis.axhline(height, label=name, **look)
    if window is not None:
        axis.axvspan(0, window, color="0.9", zorder=0, label=f"trained window, {window:,}")
    axis.set_xlabel("distance s (tokens)")
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.grid(color="0.92")
    axis.legend(fontsize=8)


def draw_fit(axes: Sequence[Axes], fit: dict, name: str, window: int) -> None:
    """Draw a row of the paper's figure 2: a fit inside the window, beyond it, and between tokens.

    fit: pairs (distances, values) for "targets", "inside", "outside" and "between".
    """
    inside, outside, between = axes
    inside.plot(*fit["targets"], ".", color="0.8", markersize=1.5, label="targets")
    inside.plot(*fit["inside"], color=COLORS[1], linewidth=0.6, label="fit")
    inside.set(ylabel=f"{name}\nscore a(s)", ylim=(-4, 4))

    # Large values need a logarithmic axis, which is linear between -1 and 1
    s, values = fit["outside"]
    outside.plot(s, values, color=COLORS[1], linewidth=0.6)
    outside.axvspan(0, window, color="0.9", zorder=0, label="window")
    outside.set_ylim(-4, 4)
    top = 3 * np.abs(values).max()
    if top > 100:
        ticks = 10.0 ** np.arange(0, np.log10(top), 3)[1:]
        outside.set(yscale="symlog", ylim=(-top, top))
        outside.set_yticks(np.concatenate([-ticks[::-1], [0], ticks]))
        outside.minorticks_off()

    s, values = fit["between"]
    whole = s % 1 == 0
    between.plot(s, values, color=COLORS[1], linewidth=1, label="fit, steps of 1/8")
    between.plot(s[whole], values[whole], ".", color=COLORS[0], markersize=3, label="whole")
    between.set_ylim(-1.2, 1.2)


def draw_singular_values(axis: Axes, singular: np.ndarray, noise: float) -> None:
    """Draw singular values over the largest one, and the level of rounding noise."""
    axis.semilogy(singular / singular[0], ".-", color=COLORS[1])
    axis.axhline(noise, color=COLORS[2], linestyle="--", label="float64 rounding noise")
    axis.set(xlabel="index i", ylabel="singular value i / the largest")
    axis.grid(color="0.92")
    axis.legend(fontsize=8)


def draw_tangent(axis: Axes, theta: float, head_dims: Sequence[int]) -> None:
    """Draw c^x and its tangent at 0, with a mark at x = -4/d for each d."""
    x = np.linspace(-0.3, 0.1, 200)
    axis.plot(x, theta**x, color=COLORS[1], label=r"$c^x$")
    axis.plot(x, 1 + x * np.log(theta), "--", color=COLORS[2], label=r"the tangent $1 + x\,\ln c$")
    for i, head_dim in enumerate(head_dims):
        at = -4 / head_dim
        foot = 1 + at * np.log(theta)
        axis.plot([at, at], [foot, theta**at], color="0.4", linewidth=1.5)
        look = style(i, color="0.2", linestyle="none", markersize=5)
        axis.plot(at, theta**at, label=f"x = -4/d, d = {head_dim}", **look)
    axis.set(xlabel="x", title=f"A tangent lies below its curve, c = {theta:g}")
    axis.legend(fontsize=8)


def draw_sum_and_integral(axis: Axes, squares: np.ndarray, theta: float) -> None:
    """Draw theta_j^2 as bars, and the area that the paper takes for their sum."""
    n = len(squares)
    fine = np.linspace(0, n, 300)
    area = n / (2 * np.log(theta))
    axis.bar(
        np.arange(n), squares, width=1, align="edge", color=COLORS[1], alpha=0.35,
        edgecolor=COLORS[1], label=f"the sum (all bars): {squares.sum():.4f}"
    )
    name = f"d / (4 ln c) (under the curve): {area:.4f}"
    axis.fill_between(fine, theta ** (-2 * fine / n), color=COLORS[2], alpha=0.6, label=name)
    axis.set(xlabel="pair j", ylabel=r"$\theta_j^2$", xlim=(0, 8))
    axis.set_title(f"What the paper takes for the sum, d = {2 * n}")
    axis.legend(fontsize=8)


def draw_chords(
    axes: Sequence[Axes], s: np.ndarray, score: np.ndarray, chord: np.ndarray,
    limits: dict[str, np.ndarray]
) -> None:
    """Draw a score with its chords (left), and its deviation from them with its limits (right)."""
    left, right = axes
    whole = s % 1 == 0
    left.plot(s, score, color=COLORS[1], label="a(s)")
    left.plot(s, chord, "--", color="0.4", label="chords between whole distances")
    left.plot(s[whole], score[whole], ".", color=COLORS[0], markersize=8)
    left.set(xlabel="distance s (tokens)", ylabel="score, in units of max|h|")
    right.plot(s, np.abs(score - chord), color=COLORS[1], label="|a(s) - chord|", linewidth=2.5)
    for i, (name, limit) in enumerate(limits.items()):
        right.plot(s, limit, label=name, **style(2 + i, marker="", linewidth=1.3))
    right.set(xlabel="distance s (tokens)", ylabel="deviation, in units of max|h|", ylim=(0, 0.8))
    for axis in axes:
        axis.ticklabel_format(useOffset=False)
        axis.grid(color="0.92")
    left.legend(fontsize=8, loc="lower center")
    right.legend(fontsize=8, loc="upper right")


def draw_by_pair(axis: Axes, curves: dict[str, np.ndarray]) -> None:
    """Draw a value for each pair on a logarithmic axis, a line for each name."""
    for i, (name, values) in enumerate(curves.items()):
        look = style(i, markersize=4.5, markevery=4)
        axis.semilogy(np.arange(len(values)), values, label=name, **look)
    axis.set_xlabel("pair j")
    axis.grid(color="0.92")
    axis.legend(fontsize=8)


# ---- the notebook of the heads (position_interpolation.ipynb) ------------------------------------

# Small weights of attention stay visible: its colors go by the weight to this power
WEIGHT_COLORS = {"cmap": "magma", "norm": PowerNorm(0.4, 0, 1), "interpolation": "nearest"}


def largest_in_blocks(weights: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Each number is the largest of a block, so that thin lines are not lost.

    shape: the numbers to aim at; there are fewer than twice as many in each direction.
    """
    rows = max(1, weights.shape[0] // shape[0])
    columns = max(1, weights.shape[1] // shape[1])
    below = np.arange(0, weights.shape[0], rows)
    along = np.arange(0, weights.shape[1], columns)
    return np.maximum.reduceat(np.maximum.reduceat(weights, below, axis=0), along, axis=1)


def draw_attention_map(axis: Axes, weights: np.ndarray, window: int) -> AxesImage:
    """Draw a head's weights (T, T), a row for each query. Far keys lie below a dashed line."""
    n = len(weights)
    picture = largest_in_blocks(weights, (128, 128))
    image = axis.imshow(picture, extent=(0, n, n, 0), **WEIGHT_COLORS)
    ticks = [0, n]
    if n > window:
        ticks = [0, window, n]
        axis.plot([0, n - window], [window, n], color="white", linestyle="--", linewidth=0.8)
    axis.set(xticks=ticks, yticks=ticks, xlabel="key position")
    return image


def draw_answer(
    axis: Axes, weights: np.ndarray, line: slice, answer: Sequence[str], window: int
) -> AxesImage:
    """Draw a head's weights for the tokens of an answer, (tokens, T), a row for each.

    line: the tokens of the prompt that hold the key, which get a frame.
    """
    tokens, length = weights.shape
    picture = largest_in_blocks(weights, (tokens, 256))
    image = axis.imshow(picture, aspect="auto", extent=(0, length, tokens, 0), **WEIGHT_COLORS)
    axis.axvspan(line.start, line.stop, fill=False, edgecolor=LIGHT_BLUE.color, linewidth=1.4)
    if length > window:
        axis.axvline(length - tokens - window, color="white", linestyle="--", linewidth=0.8)
    axis.set_yticks(np.arange(tokens) + 0.5, answer, fontsize=7)
    return image


def draw_look_back(axis: Axes, profiles: dict[str, np.ndarray], methods: Sequence[str]) -> None:
    """Draw the mean weight on the keys at distances 0, 1, 2, ..., bars for each name."""
    width = 0.8 / len(profiles)
    looks = method_styles(methods)
    for i, (name, profile) in enumerate(profiles.items()):
        middles = np.arange(len(profile)) + (i - (len(profiles) - 1) / 2) * width
        bar = {"color": looks[i]["color"], "edgecolor": looks[i]["color"], "label": name}
        if looks[i]["color"] in [look["color"] for look in looks[:i]]:
            bar["color"] = "white"  # bars of one color are full and empty
        axis.bar(middles, profile, 0.85 * width, **bar)
    axis.set(xlabel="distance to the key (tokens)", ylabel="mean attention weight")
    axis.set_xticks(range(len(profile)))
    axis.set_axisbelow(True)
    axis.grid(color="0.92", axis="y")
    axis.legend(fontsize=8)


def draw_moved_apart(axes: Sequence[Axes], s: np.ndarray, logits: np.ndarray, window: int) -> None:
    """Draw the mean logit (above) and the largest |logit| (below) of each head over the distance.

    logits: (heads, pairs of tokens, distances).
    """
    above, below = axes
    for head, values in enumerate(logits):
        largest = np.abs(values).max(axis=0)
        above.plot(s, values.mean(axis=0), label=f"head {head}", color=COLORS[1 + head % 6])
        below.plot(s, largest, color=COLORS[1 + head % 6], linewidth=0.8)
    below.set(xlabel="distance s (tokens)", ylim=(0, None))
    for axis in axes:
        axis.axvspan(0, window, color="0.9", zorder=0)
        axis.grid(color="0.92")


def draw_damage(
    axis: Axes, curves: dict[str, np.ndarray], methods: Sequence[str], window: int
) -> None:
    """Draw losses above those of a yardstick over the position, as means over 64 positions."""
    for (name, values), look in zip(curves.items(), method_styles(methods, markersize=4)):
        whole = len(values) // 64 * 64
        means = values[:whole].reshape(-1, 64).mean(axis=1)
        axis.plot(32 + 64 * np.arange(len(means)), means, label=name, **look)
    axis.axvspan(0, window, color="0.9", zorder=0, label=f"trained window, {window:,}")
    axis.set(xlabel="position (tokens before)", ylabel="loss above the yardstick's (nats)")
    axis.grid(color="0.92")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def draw_by_layer(axis: Axes, curves: dict[str, np.ndarray], methods: Sequence[str]) -> None:
    """Draw a value for each layer, a line for each name."""
    for (name, values), look in zip(curves.items(), method_styles(methods, markersize=5)):
        axis.plot(np.arange(len(values)), values, label=name, **look)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("layer")
    axis.grid(color="0.92")
