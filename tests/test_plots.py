"""plots.py: the pictures show the results they are given, with the right axes, names and marks."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

import plots
from evaluation import Curve

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def axis():
    _, axes = plots.new_figure(panels=1)
    return axes[0]


def result(init: str, original_window: int = 64, **fields) -> dict:
    """A result as the evaluations write it, with the fields that every picture needs."""
    shared = {"init": init, "method": "PI", "scale": 2, "original_window": original_window}
    return shared | fields


def lines_by_label(axis) -> dict:
    return {line.get_label(): line for line in axis.lines}


def points_of(line) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data())]


def names_in_legend(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


# ---- the look of lines ---------------------------------------------------------------------------


def test_markers_and_dashes_tell_all_lines_apart_without_color():
    looks = [plots.style(i) for i in range(len(plots.STYLES))]
    assert len({look["marker"] for look in looks}) == len(looks)
    assert len({look["linestyle"] for look in looks}) == len(looks)


def test_colors_differ_in_brightness():
    weights = (0.2126, 0.7152, 0.0722)  # of red, green and blue, as the eye has them
    brightness = [np.dot(to_rgb(look.color), weights) for look in plots.STYLES]
    steps = np.diff(sorted(brightness))
    assert steps.min() > 0.01


def test_styles_repeat_and_can_be_changed():
    assert plots.style(len(plots.STYLES) + 1) == plots.style(1)
    changed = plots.style(1, markersize=4)
    assert changed == plots.style(1) | {"markersize": 4}


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"method": "PI", "scale": 8.0}, "out/x (PI, scale 8)"),
        ({"method": "extrapolated", "scale": 2.5}, "out/x (extrapolated, scale 2.5)"),
        ({"method": "not extended", "scale": 1}, "out/x"),
        ({"label": "PI, 400 steps"}, "PI, 400 steps"),
    ],
)
def test_label_names_path_method_and_scale(fields, name):
    assert plots.label({"init": "out/x"} | fields) == name


def test_a_method_has_its_color_in_every_panel():
    methods = ["extrapolated", "PI", "direct fine-tuning", "NTK", "YaRN", "dynamic NTK", "Llama 3"]
    alone = {method: plots.method_styles([method])[0] for method in methods}
    assert len({look["color"] for look in alone.values()}) == len(methods)
    for look, method in zip(plots.method_styles(methods[::-1]), methods[::-1]):
        assert look == alone[method]


def test_lines_of_one_method_differ_in_marker_and_dashes_and_untuned_ones_are_open():
    methods = ["PI", "PI, no fine-tuning", "PI", "direct fine-tuning", "PI", "PI, no fine-tuning"]
    looks = plots.method_styles(methods)
    assert len({look["color"] for look in looks}) == 2
    assert [look.get("markerfacecolor") for look in looks] == [
        None, "white", None, None, None, "white",
    ]
    shapes = [(look["marker"], look.get("markerfacecolor")) for look in looks]
    assert len(set(shapes)) == len(looks)
    assert looks[1]["marker"] == looks[0]["marker"]


def test_lines_without_a_method_have_the_style_of_their_number():
    assert plots.method_styles(["", ""]) == [plots.style(0), plots.style(1)]


# ---- figures -------------------------------------------------------------------------------------


def test_import_needs_no_display():
    code = "import sys, plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "name, begins", [("p.png", b"\x89PNG"), ("p.SVG", b"<?xml"), ("p.pdf", b"%PDF")]
)
def test_a_figure_is_saved_as_its_suffix_says(name, begins, tmp_path):
    figure, axes = plots.new_figure(panels=3, width=2)
    assert len(axes) == 3 and figure.get_figwidth() == 6
    settings = dict(matplotlib.rcParams)
    plots.save_figure(figure, tmp_path / "folder" / name)
    assert (tmp_path / "folder" / name).read_bytes().startswith(begins)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [name]
    assert dict(matplotlib.rcParams) == settings


def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.png"
    path.write_text("old")
    figure, axes = plots.new_figure(panels=1)
    axes[0].set_title("$\\no_such_command$")
    with pytest.raises(ValueError):
        plots.save_figure(figure, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- perplexity ----------------------------------------------------------------------------------


def rows(**values) -> list[dict]:
    """Rows of a perplexity result from w64=9.0, w128=8.0."""
    return [{"window": int(name[1:]), "ppl": ppl} for name, ppl in values.items()]


def test_perplexity_has_a_line_for_each_checkpoint(axis):
    results = [result("a", windows=rows(w64=9, w128=300)), result("b", windows=rows(w64=8, w256=7))]
    plots.draw_perplexity(axis, results)
    lines = lines_by_label(axis)
    assert points_of(lines["a (PI, scale 2)"]) == [(64, 9), (128, 300)]
    assert points_of(lines["b (PI, scale 2)"]) == [(64, 8), (256, 7)]
    assert names_in_legend(axis) == [
        "a (PI, scale 2)",
        "b (PI, scale 2)",
        "original window, 64",
    ]
    assert axis.get_xscale() == "log"
    assert list(axis.get_xticks()) == [64, 128, 256]
    assert list(lines["original window, 64"].get_xdata()) == [64, 64]


def test_each_original_window_has_its_line(axis):
    results = [result(str(window), window, windows=rows(w64=9)) for window in (2048, 64, 2048)]
    plots.draw_perplexity(axis, results)
    assert names_in_legend(axis)[3:] == ["original window, 64", "original window, 2,048"]


def test_perplexities_far_apart_get_a_logarithmic_axis(axis):
    plots.draw_perplexity(axis, [result("a", windows=rows(w64=9, w128=37))])
    assert axis.get_yscale() == "log"


def test_small_differences_of_perplexity_look_small(axis):
    plots.draw_perplexity(axis, [result("a", windows=rows(w64=9.0, w128=9.01))])
    low, high = axis.get_ylim()
    assert axis.get_yscale() == "linear"
    assert low < 9.0 and high > 9.01
    assert high - low > 0.9


def test_all_perplexities_are_within_a_linear_axis(axis):
    plots.draw_perplexity(axis, [result("a", windows=rows(w64=9, w128=30))])
    low, high = axis.get_ylim()
    assert axis.get_yscale() == "linear"
    assert low < 9 and high > 30


def test_positions_are_means_over_bins(axis):
    """Losses that fall with the position: each mean is the loss of the middle, or nearly."""
    positions = np.arange(1, 2048)
    nll = list(5 - np.log2(positions) / 4)
    plots.draw_positions(axis, [result("a", positions={"nll": nll})])
    points = points_of(axis.lines[0])
    assert 10 < len(points) <= 20
    for middle, mean in points:
        assert mean == pytest.approx(5 - np.log2(middle) / 4, abs=0.01)
    ratios = [after[0] / before[0] for before, after in zip(points, points[1:])]
    assert max(ratios) < 1.5  # no gap
    assert axis.get_xscale() == "log"
    assert names_in_legend(axis) == ["a (PI, scale 2)", "original window, 64"]


def test_bins_hold_every_position_from_the_sixteenth_once():
    nll = np.random.default_rng(0).random(500)
    middles, means = plots.bin_means(nll, bins=7)
    # The ends of the bins, from their middles: middle^2 = first position * last position
    first = 16
    total = 0.0
    for middle, mean in zip(middles, means):
        last = round(middle**2 / first)
        total += mean * (last - first + 1)
        first = last + 1
    assert first == 501
    assert total == pytest.approx(nll[15:].sum())


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17])
def test_positions_of_a_tiny_window_are_drawn(axis, length):
    plots.draw_positions(axis, [result("a", positions={"nll": [3.0] * length})])
    assert {y for _, y in points_of(axis.lines[0])} == {3.0}


# ---- passkeys ------------------------------------------------------------------------------------


def passkey_points(**values) -> list[dict]:
    """Points of a passkey result from k64=1.0, k128=0.5."""
    return [{"k": int(name[1:]), "success": success} for name, success in values.items()]


def test_passkeys_have_k_max_in_the_legend_and_ringed(axis):
    points = passkey_points(k32=1.0, k64=0.6, k96=0.1)
    nothing = passkey_points(k32=0.1, k64=0.0)
    results = [result("a", points=points, k_max=64), result("b", points=nothing, k_max=0)]
    plots.draw_passkeys(axis, results, threshold=0.2)
    curve, ring, nothing_found, original, threshold = axis.lines
    assert points_of(curve) == [(32, 1.0), (64, 0.6), (96, 0.1)]
    assert points_of(ring) == [(64, 0.6)]
    assert ring.get_fillstyle() == "none"
    assert ring.get_color() == curve.get_color()
    assert points_of(nothing_found) == [(32, 0.1), (64, 0.0)]  # no ring follows it
    assert list(original.get_xdata()) == [64, 64]
    assert list(threshold.get_ydata()) == [0.2, 0.2]
    assert names_in_legend(axis) == [
        "a (PI, scale 2): k_max 64",
        "b (PI, scale 2): k_max 0",
        "original window, 64",
    ]
    assert texts(axis.get_yticklabels()) == ["0%", "20%", "40%", "60%", "80%", "100%"]


@pytest.fixture
def heat_map_result():
    runs = [
        {"length": 128, "k_max": 64, "points": passkey_points(k64=0.5, k96=0.1, k128=1.0)},
        {"length": 250, "k_max": 188, "points": passkey_points(k62=0.25, k188=0.75)},
        {"length": 1000, "k_max": 0, "points": passkey_points(k250=0.0)},
    ]
    return result("x", original_window=200, distances=4, lengths=runs)


def test_the_heat_map_shows_the_points(axis, heat_map_result):
    image = plots.draw_heat_map(axis, heat_map_result)
    grid = image.get_array()  # rows: k at 1/4, 2/4, 3/4 and 4/4 of the length
    assert grid.filled(-1).tolist() == [
        [-1, 0.25, 0],
        [0.5, -1, -1],
        [0.1, 0.75, -1],
        [1, -1, -1],
    ]
    # Keys that were found are ink: the more, the darker
    shares = np.array([0.0, 0.5, 1.0])
    light = image.to_rgba(shares)[:, :3].mean(axis=1)
    assert light[0] == 1 and np.all(np.diff(light) < -0.1)
    assert image.origin == "lower"
    assert (image.norm.vmin, image.norm.vmax) == (0, 1)
    assert texts(axis.get_xticklabels()) == ["128\n64", "250\n188", "1,000\n0"]
    assert axis.get_title() == "x (PI, scale 2)"


def test_the_heat_map_is_hatched_where_there_is_no_prompt(axis, heat_map_result):
    image = plots.draw_heat_map(axis, heat_map_result)
    assert axis.patch.get_hatch() == "///"
    colors = image.to_rgba(image.get_array())  # (4, 3, red green blue alpha)
    transparent = colors[:, :, 3] == 0
    assert transparent.tolist() == image.get_array().mask.tolist()


def test_the_heat_map_has_lines_at_k_max_and_the_original_window(axis, heat_map_result):
    plots.draw_heat_map(axis, heat_map_result)
    drawn = [line for line in axis.lines if len(line.get_xdata()) > 0]
    k_max = [points_of(line) for line in drawn if line.get_linestyle() == "-"]
    original = [points_of(line) for line in drawn if line.get_linestyle() == ":"]
    # k_max is at the upper edge of its cell, 1/8 above the middle; that of the last length is 0
    assert k_max == [
        [(-0.5, 0.625), (0.5, 0.625)],
        [(0.5, 188 / 250 + 0.125), (1.5, 188 / 250 + 0.125)],
    ]
    # The first length is below the original window
    assert original == [[(0.5, 0.8), (1.5, 0.8)], [(1.5, 0.2), (2.5, 0.2)]]
    assert names_in_legend(axis) == ["k_max", "k = original window"]


# ---- over fine-tuning steps ----------------------------------------------------------------------


def test_over_steps_a_run_has_a_color_and_a_window_a_marker(axis):
    """The points of a line are in the order of steps, and a missing one is left out."""
    curves = [
        Curve("PI", 64, {0: 9.0, 200: 7.0, 1000: 6.5}),
        Curve("PI", 128, {0: 60.0, 1000: 6.0}),
        Curve("direct", 64, {200: 8.0, 0: 9.5}),
    ]
    plots.draw_perplexity_over_steps(axis, curves)
    lines = lines_by_label(axis)
    assert {name: points_of(line) for name, line in lines.items()} == {
        "PI, 64 tokens": [(0, 9), (200, 7), (1000, 6.5)],
        "PI, 128 tokens": [(0, 60), (1000, 6)],
        "direct, 64 tokens": [(0, 9.5), (200, 8)],
    }
    assert names_in_legend(axis) == list(lines)
    short, long, direct = axis.lines
    assert short.get_color() == long.get_color() != direct.get_color()
    assert short.get_marker() == direct.get_marker() != long.get_marker()
    assert axis.get_xscale() == "linear"
    assert axis.get_yscale() == "log"
    assert axis.get_ylabel() == "perplexity"


def test_over_steps_runs_of_one_method_have_markers_of_their_own(axis):
    curves = []
    for run in ("PI", "PI for longer"):
        for window in (64, 128):
            curves.append(Curve(run, window, {0: 9.0, 200: 7.0}, "PI"))
    plots.draw_perplexity_over_steps(axis, curves)
    assert {line.get_color() for line in axis.lines} == {plots.LOOKS["PI"].color}
    assert len({line.get_marker() for line in axis.lines}) == 4


def test_over_steps_one_window_stands_at_the_axis(axis):
    methods = {"PI": "PI", "direct": "direct fine-tuning"}
    curves = [Curve(run, 2048, {0: 9.0, 200: 7.0}, methods[run]) for run in methods]
    plots.draw_perplexity_over_steps(axis, curves)
    assert axis.get_ylabel() == "perplexity at 2,048 tokens"
    assert names_in_legend(axis) == ["PI", "direct"]
    for line, method in zip(axis.lines, methods.values()):
        look = plots.LOOKS[method]
        assert (line.get_color(), line.get_marker()) == (look.color, look.marker)


def test_over_steps_far_apart_the_labels_do_not_overlap(axis):
    steps = (0, 200, 400, 600, 800, 1000, 10000)
    plots.draw_perplexity_over_steps(axis, [Curve("PI", 64, dict.fromkeys(steps, 7.0))])
    assert axis.get_xscale() == "symlog"
    assert sorted(axis.get_xticks()) == [0, 200, 600, 1000, 10000]


def test_reach_over_steps_hides_no_point(axis):
    curves = [Curve("PI", 512, {0: 0, 200: 512})]
    plots.draw_reach_over_steps(axis, curves, [result("PI", original_window=256)])
    curve, original = axis.lines
    assert points_of(curve) == [(0, 0), (200, 512)]
    assert list(original.get_ydata()) == [256, 256]
    low, high = axis.get_ylim()
    assert low < 0 and high > 512
    assert axis.get_ylabel() == "k_max at 512 tokens"
    assert names_in_legend(axis) == ["PI", "original window, 256"]


# ---- bounds and speed ----------------------------------------------------------------------------


def test_bounds_are_in_units_of_h_and_of_d():
    figure, axes = plots.new_figure(panels=2)
    b = np.array([30.0, 20.0, 4.0])
    deviation = {"paper": 0.25, "exact": 0.5, "sharp": 0.4}
    report = {"head_dim": 8, "theta": 1e4, "window": 2, "grid_deviation": deviation}
    plots.draw_bounds(axes, report, b)
    left, right = [lines_by_label(axis) for axis in axes]
    assert points_of(left["extrapolation, eq. (8): 2B(s)"]) == [(0, 60), (1, 40), (2, 8)]
    assert points_of(right["B(s)/d"]) == [(0, 3.75), (1, 2.5), (2, 0.5)]
    heights = {name: line.get_ydata()[0] for name, line in left.items()}
    assert heights["trivial, attained: d/2"] == 4
    assert heights["interpolation, attained: 0.400"] == 0.4
    assert heights["interpolation, the paper's (7): 0.250"] == 0.25
    assert axes[0].get_yscale() == "log"
    assert left["extrapolation, eq. (8): 2B(s)"].get_color() == plots.LOOKS["extrapolated"].color
    assert left["interpolation, attained: 0.400"].get_color() == plots.LOOKS["PI"].color
    for axis in axes:
        assert "trained window: 2" in names_in_legend(axis)
    assert figure.get_suptitle() == "RoPE with head_dim 8, theta 10000"


def test_speed_and_memory_have_a_line_for_each_task():
    def row(task: str, window: int, speed: float, memory: float) -> dict:
        return {"task": task, "window": window, "speed_ratio": speed, "memory_ratio": memory}

    _, axes = plots.new_figure(panels=2)
    measured = [row("train", 1024, 1.5, 0.5), row("train", 4096, 1.25, 0.75)]
    measured.append(row("decode", 1024, 2.0, 1.0))
    plots.draw_speed_ratios(axes, measured)
    speed, memory = [lines_by_label(axis) for axis in axes]
    assert points_of(speed["train"]) == [(1024, 1.5), (4096, 1.25)]
    assert points_of(speed["decode"]) == [(1024, 2)]
    assert points_of(memory["train"]) == [(1024, 0.5), (4096, 0.75)]
    assert points_of(memory["decode"]) == [(1024, 1)]
    assert [axis.get_title() for axis in axes] == [
        "Ratio of tokens per second",
        "Ratio of peak memory",
    ]
    for axis in axes:
        assert list(axis.lines[-1].get_ydata()) == [1, 1]  # the line of equal speed or memory
        assert axis.get_ylim()[0] == 0
        assert axis.get_xscale() == "log"
        assert list(axis.get_xticks()) == [1024, 4096]
        assert names_in_legend(axis) == ["train", "decode"]


# ---- the notebook of the heads -------------------------------------------------------------------


def test_blocks_of_weights_keep_thin_lines():
    weights = np.zeros((5, 1000))
    weights[3, 777] = 0.5
    picture = plots.largest_in_blocks(weights, (5, 128))
    assert picture.shape == (5, 143)  # blocks of 7
    assert picture[3, 777 // 7] == 0.5 and picture.sum() == 0.5
    assert plots.largest_in_blocks(weights[:, :100], (128, 128)).shape == (5, 100)


def test_bars_of_one_color_are_full_and_empty():
    figure, axes = plots.new_figure(panels=1)
    profiles = {"inside": np.ones(3), "beyond": np.ones(3), "PI": np.ones(3)}
    plots.draw_look_back(axes[0], profiles, ["not extended", "extrapolated", "PI"])
    colors = [to_hex(bars[0].get_facecolor()) for bars in axes[0].containers]
    assert colors == [plots.BLACK.color, "#ffffff", plots.LOOKS["PI"].color]
