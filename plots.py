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
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter

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
    axis.legend(fontsize=8)


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
    exact = report["grid_deviation"]["exact"]
    s = np.arange(len(b))

    # Extrapolation and interpolation have the colors that they have in all pictures
    thin = {"color": LOOKS["extrapolated"].color, "linewidth": 0.5}
    interpolated = LOOKS["PI"].color
    trivial = {"color": BLUE.color, "linestyle": "-."}
    left.semilogy(s, 2 * b, label="extrapolation, eq. (8): 2B(s)", **thin)
    left.axhline(d / 2, label="trivial: d/2", **trivial)
    left.axhline(exact, color=interpolated, label=f"interpolation, exact: {exact:.3f}")
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
