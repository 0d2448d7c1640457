"""illustrate.py and notebooks/explorer.html: what they draw and compute is what rope.py says.

The page's formulas run in a small JavaScript engine (quickjs-ng, in the test extra). The page as a
whole runs in headless Chromium or Chrome, if there is one on the PATH.
"""

import json
import math
import os
import random
import re
import shutil
import subprocess

import matplotlib
import pytest
import torch
from PIL import Image

import illustrate
from rope import rope_cos_sin, rope_frequencies

PAGE = illustrate.PAGE.read_text(encoding="utf-8")

# ---- the page's formulas -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def javascript():
    """A function that runs an expression behind the page's block `math`, and returns its value."""
    engine = pytest.importorskip("quickjs", reason="needs quickjs-ng, of the test extra")
    context = engine.Context()
    context.eval(re.search(r'<script id="math">(.*?)</script>', PAGE, re.DOTALL).group(1))

    def value_of(expression: str):
        return json.loads(context.eval(f"JSON.stringify({expression})"))

    return value_of


def settings_of_many_heads(n: int = 300) -> list[dict]:
    """Heads, methods and scales at random, with the extremes of each among them."""
    draw = random.Random(0)
    settings = []
    for i in range(n):
        settings.append({
            "headDim": draw.choice([2, 4, 8, 32, 64, 80, 96, 128, 256]),
            "theta": draw.choice([1.5, 100.0, 1e4, 1e5, 5e5, 1e6, draw.uniform(2, 1e7)]),
            "method": illustrate.METHODS[i % len(illustrate.METHODS)],
            "scale": draw.choice([1, 2, 16, 32, draw.uniform(1, 64)]),
            "originalWindow": draw.choice([2, 64, 256, 2048, 8192, 131072]),
        })
    return settings


def rope_of(settings: dict) -> tuple[torch.Tensor, float]:
    return rope_frequencies(
        settings["headDim"], settings["theta"], settings["method"], settings["scale"],
        settings["originalWindow"]
    )


def test_frequencies_are_those_of_rope(javascript):
    for settings in settings_of_many_heads():
        here = javascript(f"ropeFrequencies({json.dumps(settings)})")
        inv_freq, factor = rope_of(settings)
        assert here["invFreq"] == pytest.approx(inv_freq.tolist(), rel=1e-6, abs=0), settings
        assert here["attentionFactor"] == pytest.approx(factor, rel=1e-6), settings


def test_angles_and_their_sum_are_those_of_rope_far_out(javascript):
    for settings in settings_of_many_heads(100):
        last = round(settings["originalWindow"] * settings["scale"]) - 1
        inv_freq, _ = rope_of(settings)
        for distance in (0, 1, last // 3, last):
            call = f"ropeFrequencies({json.dumps(settings)}).invFreq"
            cosines = javascript(f"{call}.map((f) => Math.cos(angleAt({distance}, f)))")
            cos, _ = rope_cos_sin(torch.tensor(distance), inv_freq)
            assert cosines == pytest.approx(cos.tolist(), abs=1e-6), (settings, distance)
            total = javascript(f"sumOfCosines({distance}, {call})")
            assert total == pytest.approx(cos.double().sum().item(), abs=1e-6 * len(cos))


def test_a_pair_is_new_where_no_distance_of_training_turned_it_as_far(javascript):
    window = 64
    for method, scale in (("none", 4), ("linear", 4), ("ntk", 4), ("yarn", 4), ("llama3", 2.5)):
        trained, _ = rope_frequencies(16, 1e4, "none")
        inv_freq, _ = rope_frequencies(16, 1e4, method, scale, window)
        for distance in range(0, round(window * scale), 7):
            for j, frequency in enumerate(inv_freq.tolist()):
                state = javascript(f"pairState({distance}, {frequency}, {trained[j]}, {window})")
                # Below a full turn, a pair is new from the angle of the first untrained distance on
                untrained = window * trained[j].item()
                farther = distance * frequency >= untrained * (1 - 1e-7)
                assert state["isNew"] == (farther and untrained < 2 * math.pi)
                assert method != "linear" or not state["isNew"]


def test_the_numbers_in_the_page_are_those_that_the_script_writes():
    assert illustrate.page_text(PAGE) == PAGE


def test_a_page_without_the_block_is_refused_in_one_line():
    with pytest.raises(ValueError, match="no block rope-numbers"):
        illustrate.page_text("<html></html>")


def test_the_page_needs_no_network():
    assert not re.search(r"https?:|src=|<link|@import|fetch\(", PAGE)


# ---- the page in a browser -----------------------------------------------------------------------

# Runs behind the page's own scripts, moves its inputs as a reader does, and leaves in the page what
# was seen after each move
DRIVER = """
<script>
window.addEventListener("error", (event) => errors.push(event.message));
const errors = [];
const seen = [];
function look(name) {
  const drawings = ["dials", "pair-dial", "arrows", "sums", "steps"];
  seen.push({
    name: name, settings: settings(), distance: Number(element("distance").value),
    message: element("message").textContent, sum: element("arrows-text").textContent,
    drawings: drawings.map((id) => element(id).innerHTML),
    wide: document.documentElement.scrollWidth > window.innerWidth,
  });
}
function move(id, value) {
  element(id).value = value;
  element(id).dispatchEvent(new Event("input"));
  look(id);
}
look("start");
move("distance", 4000);
move("method", "linear");
move("scale", 4);
move("pair", 3);
move("preset", 2);
move("head-dim", 8);
move("theta", "0.5");
move("theta", "777");
element("dials").children[2].dispatchEvent(new Event("click", { bubbles: true }));
look("click");
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify({
  errors: errors, seen: seen, check: element("check").textContent, pair: element("pair").value
});
document.body.append(result);
</script>
"""


@pytest.fixture(scope="module", params=[1100, 360])
def session(request, tmp_path_factory):
    """What the driver saw in a window of so many pixels."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = [path for path in map(shutil.which, names) if path]
    if not found:
        pytest.skip("needs Chromium or Chrome on the PATH")
    folder = tmp_path_factory.mktemp("page")
    page = folder / "page.html"
    page.write_text(PAGE.replace("</body>", DRIVER + "</body>"), encoding="utf-8")
    command = [
        found[0], "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        f"--user-data-dir={folder}/profile", f"--window-size={request.param},900", "--dump-dom",
        page.as_uri()
    ]
    environment = os.environ | {"HOME": str(folder)}
    output = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment
    ).stdout
    found = re.search(r'<pre id="result">(.*?)</pre>', output, re.DOTALL)
    assert found, "the page did not run to its end"
    text = found.group(1)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", "\u00a0"), ("&amp;", "&")):
        text = text.replace(entity, character)
    return json.loads(text)


def test_the_page_loads_and_agrees_with_rope_in_a_browser(session):
    assert session["errors"] == []
    assert "they agree to 1e-6" in session["check"]
    assert not any(look["wide"] for look in session["seen"])  # nothing to scroll sideways
    for look in session["seen"]:
        settings = look["settings"]
        if settings["theta"] <= 1:
            continue
        inv_freq, _ = rope_of(settings)
        cos, _ = rope_cos_sin(torch.tensor(look["distance"]), inv_freq)
        shown = re.fullmatch(r"S\(([\d,]+)\) = (-?[\d.]+) of at most (\d+)\.", look["sum"])
        assert int(shown[1].replace(",", "")) == look["distance"]
        assert float(shown[2]) == pytest.approx(cos.sum().item(), abs=0.0051)
        assert int(shown[3]) == len(inv_freq)


def test_each_input_changes_the_drawing_and_the_line_of_text(session):
    looks = session["seen"]
    for before, after in zip(looks, looks[1:]):
        if after["settings"]["theta"] <= 1:
            # A value out of range is named, and the drawing stays
            assert after["message"] == "theta must be a number from 1.01 to 1e9."
            assert after["drawings"] == before["drawings"]
            continue
        assert after["drawings"] != before["drawings"], after["name"]
        assert after["message"] != before["message"], after["name"]
    assert session["pair"] == "2"  # the circle that was clicked


def test_the_line_of_text_says_what_is_new(session):
    beyond, interpolated = session["seen"][1:3]
    trained, _ = rope_frequencies(128, 1e4, "none")
    slow = (2048 * trained < 2 * math.pi).sum().item()
    reached = math.degrees(4000 * trained[48])
    assert f"trained up to 117°, reached {reached:.0f}°: new" in beyond["message"]
    assert f"{slow} of 64 pairs have turned farther than in training" in beyond["message"]
    assert f"reached {reached / 2:.0f}°: seen" in interpolated["message"]
    assert "No pair has turned farther" in interpolated["message"]
    assert "28.6° apart in pair 0, in training 57.3°" in interpolated["message"]


# ---- the animation -------------------------------------------------------------------------------


def test_the_committed_animation_is_small_and_whole_at_both_ends():
    assert illustrate.ANIMATION.stat().st_size < 1e6
    with Image.open(illustrate.ANIMATION) as image:
        assert image.n_frames > 40
        first = image.convert("RGB").tobytes()
        image.seek(image.n_frames // 2)
        middle = image.convert("RGB").tobytes()
        image.seek(image.n_frames - 1)
        assert image.convert("RGB").tobytes() == first != middle


def test_interpolated_arcs_end_where_training_ended_and_those_beyond_do_not():
    training, beyond, interpolated = illustrate.ROWS
    for pair in illustrate.PAIRS:
        theta = 10000 ** (-2 * pair / 128)
        assert illustrate.angle(training, pair, 2047) == pytest.approx(2047 * theta, rel=1e-6)
        assert illustrate.angle(beyond, pair, 4095) == pytest.approx(4095 * theta, rel=1e-6)
        assert illustrate.angle(interpolated, pair, 4095) == pytest.approx(2047.5 * theta, rel=1e-6)


def test_every_frame_shows_positions_of_its_rows():
    frames = illustrate.frames()
    assert frames[0].positions == frames[-1].positions == [2047, 4095, 4095]
    for frame in frames:
        assert 1 <= frame.scale <= illustrate.SCALE
        for row, position in zip(illustrate.ROWS, frame.positions):
            assert position is None or row.first <= position <= row.last


def test_a_frame_has_new_arcs_beyond_the_window_alone():
    figure = matplotlib.figure.Figure()
    new = matplotlib.colors.to_rgba(illustrate.NEW)
    counts = {}
    for scale in (1, illustrate.SCALE):
        illustrate.draw_frame(figure, [2047, 4095, 4095], scale)
        arcs = [patch for axis in figure.axes for patch in axis.patches]
        counts[scale] = sum(arc.get_edgecolor() == new for arc in arcs)
    # Two slow pairs in the row beyond the window; in the last row too until it is squeezed
    assert counts == {1: 4, illustrate.SCALE: 2}
