"""The pictures that explain the method: an animation, and the numbers of the page with sliders.

    python illustrate.py

writes assets/positions.gif, which shows what Position Interpolation does to positions (the paper's
figure 1, drawn on the circles of one head), and the block "rope-numbers" in
notebooks/explorer.html. All angles come from rope.py. The page computes its frequencies itself, for
any theta and head_dim, and compares them with those in the block when it is opened.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Arc
from PIL import Image

from cli import Parser, replacing, run
from model import LLaMAConfig
from rope import rope_frequencies

ROOT = Path(__file__).resolve().parent
ANIMATION = ROOT / "assets" / "positions.gif"
PAGE = ROOT / "notebooks" / "explorer.html"

# ---- what the animation shows --------------------------------------------------------------------

WINDOW = 2048  # LLaMA's
SCALE = 2
HEAD_DIM = 128
THETA = 10000.0
PAIRS = (0, 48, 56)  # a fast pair, and two that are too slow for a full turn within the window
DOT_EVERY = 256  # a dot for so many positions; a multiple of the scale

TRAINED = "#b0b0b0"
SQUEEZED = "#0072b2"
NEW = "#d55e00"


class Row(NamedTuple):
    """One row of the picture: the method, its positions, and what is said of it.

    first, last: the positions at which the moving token starts and ends.
    """

    method: str
    first: int
    last: int
    color: str
    title: str
    note: str


ROWS = (
    Row("none", 0, WINDOW - 1, TRAINED, "Training: positions 0 to 2,047",
        "slow pairs see a part of their circle"),
    Row("none", WINDOW, SCALE * WINDOW - 1, NEW, "Beyond the window: 2,048 to 4,095",
        "angles that were never seen"),
    Row("linear", 0, SCALE * WINDOW - 1, SQUEEZED, "Position Interpolation: m becomes m / 2",
        "all 4,096 in the trained range, half a step apart"),
)


def angle(row: Row, pair: int, position: float, scale: float = SCALE) -> float:
    """The angle of a pair at a position, in radians and not reduced to one turn."""
    inv_freq, _ = rope_frequencies(HEAD_DIM, THETA, row.method, scale, WINDOW)
    return position * inv_freq[pair].item()


# ---- one frame -----------------------------------------------------------------------------------


def draw_frame(figure: Figure, positions: list[float | None], scale: float = SCALE) -> None:
    """Draw all rows, each up to its position. None leaves a row empty.

    scale: that of the last row, from 1 (positions left alone) to SCALE (all in the trained range).
    """
    figure.clear()
    grid = figure.add_gridspec(
        len(ROWS), 1 + len(PAIRS), width_ratios=[3.4] + [1] * len(PAIRS), left=0.025, right=0.99,
        top=0.89, bottom=0.06, wspace=0.08, hspace=0.32
    )
    figure.text(0.03, 0.94, "One head of LLaMA: pair j turns by position × θⱼ", fontsize=12)
    for i, (row, position) in enumerate(zip(ROWS, positions)):
        line = figure.add_subplot(grid[i, 0])
        draw_line(line, row, position, scale)
        for column, pair in enumerate(PAIRS):
            circle = figure.add_subplot(grid[i, 1 + column])
            draw_circle(circle, row, pair, position, scale)
            if i == 0:
                circle.set_title(f"pair {pair}", fontsize=12)


def draw_line(axis: Axes, row: Row, position: float | None, scale: float) -> None:
    """Draw the positions as dots on a line, with the trained range behind them in grey."""
    end = SCALE * WINDOW
    axis.axvspan(0, WINDOW, color="0.88", linewidth=0)
    axis.plot([0, end], [0, 0], color="0.4", linewidth=1)
    axis.set(xlim=(-0.03 * end, 1.03 * end), ylim=(-1, 1.9), yticks=[])
    axis.set_xticks([0, WINDOW, end], ["0", f"{WINDOW:,}", f"{end:,}"], fontsize=10)
    axis.spines[["left", "right", "top", "bottom"]].set_visible(False)
    axis.text(0, 1.25, row.title, fontsize=13, weight="bold")
    axis.text(0, 0.62, row.note, fontsize=12)
    if position is None:
        return

    # The dots that the token has passed. The second row begins beyond the window, and also shows
    # the dots of training.
    trained_dots = range(0, WINDOW, DOT_EVERY)
    dots = [m for m in range(0, end, DOT_EVERY) if row.first <= m <= position]
    factor = 1.0
    if row.method == "linear":
        factor = 1 / scale
    if row.first > 0:
        axis.plot(trained_dots, [0] * len(trained_dots), "o", color=TRAINED, markersize=7)
    marker = "o"
    if row.color == NEW:
        marker = "X"  # tells new positions apart where there is no color
    axis.plot([m * factor for m in dots], [0] * len(dots), marker, color=row.color, markersize=8)
    axis.plot([position * factor], [-0.5], "^", color="black", markersize=8, clip_on=False)


def draw_circle(
    axis: Axes, row: Row, pair: int, position: float | None, scale: float
) -> None:
    """Draw the angles of a pair: trained ones as a grey ring, the row's own in its color."""
    axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    axis.axis("off")
    draw_arc(axis, 0, 2 * math.pi, color="0.85", linewidth=1)
    trained = angle(ROWS[0], pair, WINDOW - 1)
    if row.first == 0 and row.method == "none":
        trained = angle(row, pair, position or 0)
    draw_arc(axis, 0, trained, color=TRAINED, linewidth=9)
    if position is None:
        return

    # A pair that has made a full turn has no new angles: the whole ring is trained already
    reached = angle(row, pair, position, scale)
    next_position = angle(ROWS[0], pair, WINDOW)  # the first one beyond training
    if next_position <= reached and next_position < 2 * math.pi:
        draw_arc(axis, trained, reached, color=NEW, linewidth=9, linestyle=(0, (1, 0.25)))
    if row.method == "linear":
        draw_arc(axis, 0, reached, color=SQUEEZED, linewidth=3)
    draw_arrow(axis, reached, "black", 2.2)

    # The fastest pair shows the step to the next position instead of the arc
    label = f"{math.degrees(reached):,.0f}°"
    if pair == 0:
        step = angle(row, pair, 1, scale)
        draw_arrow(axis, reached + step, "0.55", 1.6)
        label = f"step {math.degrees(step):.0f}°"
    axis.text(0, -1.62, label, ha="center", fontsize=10)


def draw_arc(axis: Axes, start: float, end: float, **look) -> None:
    """Draw an arc of the unit circle between two angles in radians; a full turn is a circle."""
    end = min(end, start + 2 * math.pi)
    arc = Arc((0, 0), 2, 2, theta1=math.degrees(start), theta2=math.degrees(end), **look)
    axis.add_patch(arc)


def draw_arrow(axis: Axes, radians: float, color: str, linewidth: float) -> None:
    tip = (0.86 * math.cos(radians), 0.86 * math.sin(radians))
    arrow = {"arrowstyle": "-|>", "color": color, "linewidth": linewidth, "shrinkA": 0}
    arrow["shrinkB"] = 0  # the tip is not moved
    axis.annotate("", xy=tip, xytext=(0, 0), arrowprops=arrow)


# ---- the animation -------------------------------------------------------------------------------


class Frame(NamedTuple):
    """What draw_frame is given, and for how long the frame is shown."""

    positions: list[float | None]
    scale: float
    milliseconds: int


def frames(steps: int = 12) -> list[Frame]:
    """The frames in order. The first and the last show the whole picture, for still viewers.

    steps: frames in which a token walks from one end of a row's positions to the other.
    """
    last = [float(row.last) for row in ROWS]
    whole = Frame(last, SCALE, 4000)
    sequence = [whole._replace(milliseconds=1500)]
    shown: list[float | None] = [None] * len(ROWS)
    for i, row in enumerate(ROWS):
        if row.method == "linear":
            # All positions stand where they were, and are then squeezed into the trained range
            shown[i] = float(row.last)
            for step in range(steps + 1):
                sequence.append(Frame(list(shown), 1 + (SCALE - 1) * step / steps, 70))
        for step in range(steps + 1):
            shown[i] = row.first + (row.last - row.first) * step / steps
            sequence.append(Frame(list(shown), SCALE, 70))
        sequence[-1] = sequence[-1]._replace(milliseconds=1200)
    sequence.append(whole)
    return sequence


def write_animation(path: Path) -> None:
    """Write the animation as a GIF that repeats forever."""
    figure = Figure(figsize=(9, 5), dpi=100)
    canvas = FigureCanvasAgg(figure)
    images = []
    sequence = frames()
    for frame in sequence:
        draw_frame(figure, frame.positions, frame.scale)
        canvas.draw()
        rgb = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        # 48 colors are enough for lines and text, and make the file a third of the size
        images.append(rgb.quantize(48, dither=Image.Dither.NONE))
    durations = [frame.milliseconds for frame in sequence]
    with replacing(path) as temporary:
        images[0].save(
            temporary, format="GIF", save_all=True, append_images=images[1:], duration=durations,
            loop=0, optimize=True
        )


# ---- the page with sliders -----------------------------------------------------------------------

PRESETS = ("llama-7b", "llama2-7b", "llama3-8b", "smollm2-135m", "tiny")
METHODS = ("none", "linear", "ntk", "yarn", "llama3")  # dynamic depends on the length of the text
BLOCK_START = '<script id="rope-numbers" type="application/json">\n'
BLOCK_END = "\n</script>"


def page_numbers() -> dict:
    """What the page reads: the heads of known models, and frequencies of rope.py to check by."""
    presets = []
    checks = []
    for name in PRESETS:
        config = LLaMAConfig.preset(name)
        head = {
            "head_dim": config.head_dim,
            "theta": config.rope_theta,
            "original_window": config.original_window,
        }
        presets.append({"name": name} | head)
        for method in METHODS:
            inv_freq, factor = rope_frequencies(
                config.head_dim, config.rope_theta, method, 4, config.original_window
            )
            settings = head | {"method": method, "scale": 4}
            # Nine digits are enough to tell any two float32 numbers apart
            values = [float(f"{value:.9g}") for value in inv_freq.tolist()]
            checks.append(settings | {"attention_factor": factor, "inv_freq": values})
    return {"presets": presets, "checks": checks}


def page_text(page: str) -> str:
    """The page with its block of numbers written anew."""
    before, start, rest = page.partition(BLOCK_START)
    if not start:
        raise ValueError("the page has no block rope-numbers: take it from the repository again")
    _, end, after = rest.partition(BLOCK_END)
    numbers = page_numbers()
    # A line for each preset and each check, so that a change can be read in a diff
    presets = ",\n".join(json.dumps(preset) for preset in numbers["presets"])
    checks = ",\n".join(json.dumps(check) for check in numbers["checks"])
    block = f'{{"presets": [\n{presets}\n],\n"checks": [\n{checks}\n]}}'
    return before + start + block + end + after


def main(argv: list[str] | None = None) -> None:
    Parser(__doc__).parse_args(argv)  # no flags but --help
    page = page_text(PAGE.read_text(encoding="utf-8"))
    with replacing(PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_animation(ANIMATION)
    for path in (ANIMATION, PAGE):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    run(main)
