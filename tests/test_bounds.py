"""bounds.py: the bounds hold for every h that is tried, and the sharp one is attained.

The paper's constant does not hold. S(s) is a mean score, and its first zero is the first.
"""

import json
import math
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bounds
import rope

ROOT = Path(__file__).resolve().parent.parent
EPS = np.finfo(np.float64).eps

head_dims = st.integers(4, 128).map(lambda n: 2 * n)  # 8 .. 256
thetas = st.floats(math.log(1e3), math.log(1e6)).map(math.exp)
starts = st.one_of(st.integers(0, 32768).map(float), st.floats(0, 32768))
# The spacing of whole distances, and that of Position Interpolation at scales 2 to 32
spacings = st.sampled_from([1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32])
few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def slack(h_max, s, head_dim):
    """The rounding error of a(s) - a_lin(s) in float64. At s = 32768, d = 256 it is 4e-9 of 0.5.

    Each of the d/2 angles s * theta_j, and so each term, is off by some eps * s, and the sum adds
    another eps for each term. There are four such errors.
    """
    return 4 * EPS * (np.max(np.abs(s)) + head_dim) * h_max * head_dim / 2


def draw_h(data, head_dim, theta, s):
    """An h of one of several kinds, |h_j| <= 10."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n = head_dim // 2
    kind = data.draw(
        st.sampled_from(["q and k", "real", "smooth", "one pair", "worst", "nearly worst"])
    )
    if kind == "q and k":
        q, k = rng.standard_normal((2, n, 2)) @ [1, 1j]
        h = q * k.conj()
    elif kind == "real":
        h = rng.uniform(-1, 1, n) + 0j
    elif kind == "smooth":
        h = np.linspace(1, 0, n) * np.exp(1j * rng.uniform(0, 6))
    elif kind == "one pair":
        h = np.zeros(n, complex)
        h[rng.integers(n)] = np.exp(1j * rng.uniform(0, 6))
    else:
        h = bounds.adversarial_h(s, head_dim, theta)
        if kind == "nearly worst":
            h = h * np.exp(0.1j * rng.standard_normal(n))
    return h * data.draw(st.floats(0.01, 10)) / np.abs(h).max()


def chord_deviation(h, s, s1, s2, head_dim, theta):
    start, end = bounds.attention_score(h, np.array([s1, s2]), head_dim, theta)
    chord = (start * (s2 - s) + end * (s - s1)) / (s2 - s1)
    return bounds.attention_score(h, s, head_dim, theta) - chord


# ---- the bounds hold -----------------------------------------------------------------------------


@few
@given(st.data(), head_dims, thetas, starts, spacings)
def test_valid_interpolation_bounds_are_never_broken(data, head_dim, theta, s1, spacing):
    s2 = s1 + spacing
    s = np.linspace(s1, s2, 17)
    h = draw_h(data, head_dim, theta, data.draw(st.sampled_from(list(s))))
    h_max = np.abs(h).max()
    deviation = np.abs(chord_deviation(h, s, s1, s2, head_dim, theta))
    corrected = bounds.interpolation_bound(h_max, s, s1, s2, head_dim, theta)
    sharp = bounds.interpolation_bound(h_max, s, s1, s2, head_dim, theta, "sharp")
    assert (deviation <= sharp + slack(h_max, s, head_dim)).all()
    assert (sharp <= corrected * (1 + 1e-9) + 1e-12 * h_max).all()


@few
@given(st.data(), head_dims, thetas, st.floats(0, 100), st.floats(0.01, 300), st.floats(0, 1))
def test_the_sharp_bound_is_attained(data, head_dim, theta, s1, spacing, share):
    """Also on wide intervals, where a(s) turns many times between s1 and s2. No formula of ours."""
    s2 = s1 + spacing
    s = s1 + share * spacing
    angles = [theta ** (-2 * j / head_dim) for j in range(head_dim // 2)]
    h = []
    for angle in angles:
        # The term of this pair, less that of its chord, for h_j = 1. The worst h_j turns it to the
        # positive real axis.
        chord = (1 - share) * np.exp(1j * s1 * angle) + share * np.exp(1j * s2 * angle)
        term = np.exp(1j * s * angle) - chord
        h.append(np.conj(term) / max(abs(term), 1e-300))
    h = np.array(h)
    h_max = data.draw(st.floats(0.1, 10))
    assert np.abs(h).max() <= 1 + 4 * EPS
    reached = h_max * chord_deviation(h, s, s1, s2, head_dim, theta)
    sharp = bounds.interpolation_bound(h_max, s, s1, s2, head_dim, theta, constant="sharp")
    assert abs(reached - sharp) <= slack(h_max, s2, head_dim)


def test_the_sharp_bound_is_largest_in_the_middle_and_0_at_the_ends():
    """So its value there, 0.49388 at d = 128, holds at every distance between two whole ones."""
    share = np.linspace(0, 1, 401)
    for head_dim, theta in ((8, 1e4), (32, 1e3), (128, 1e4), (128, 5e5), (256, 1e6)):
        sharp = bounds.interpolation_bound(1, 7 + share, 7, 8, head_dim, theta, "sharp")
        assert sharp.argmax() == 200
        assert sharp[[0, -1]].max() < 1e-12
    assert bounds.interpolation_bound(1, [3, 3.5], 3, [3, 4], 8, 1e4, "sharp")[0] == 0


@few
@given(st.data(), head_dims, thetas, starts)
def test_extrapolation_bounds_are_never_broken(data, head_dim, theta, start):
    s = start + np.arange(32)
    h = draw_h(data, head_dim, theta, data.draw(st.sampled_from(list(s))))
    h_max = np.abs(h).max()
    score = np.abs(bounds.attention_score(h, s, head_dim, theta)) - slack(h_max, s, head_dim)
    sharper = bounds.difference_bound(h, s, head_dim, theta)
    assert (score <= sharper).all()
    assert (score <= bounds.trivial_bound(h_max, head_dim)).all()
    last_form = bounds.extrapolation_bound(h_max, s, head_dim, theta)
    assert (sharper <= last_form * (1 + 8 * EPS)).all()


@few
@given(head_dims, thetas, starts)
def test_eq_8_is_never_below_the_trivial_bound(head_dim, theta, start):
    """2 B(s) >= d/2 + |A_{d/2}(s)| >= d/2, so the last form of eq. (8) adds nothing to it."""
    s = start + np.arange(32)
    assert (2 * bounds.B(s, head_dim, theta) >= head_dim / 2 * (1 - 100 * EPS)).all()


def test_the_last_difference_of_eq_8_is_needed():
    """For h_j = 1 all differences are 0 but the last, to h_{d/2} = 0: without it the bound is 0."""
    h = np.ones(64)
    assert bounds.attention_score(h, 0, 128, 1e4) == 64
    found = bounds.difference_bound(h, [0, 7], 128, 1e4)
    np.testing.assert_allclose(found, bounds.B([0, 7], 128, 1e4))


def test_the_sharper_form_beats_the_trivial_bound_for_smooth_h():
    h = np.linspace(1, 1 / 64, 64)  # every difference is 1/64
    assert bounds.difference_bound(h, 4000, 128, 1e4) < np.abs(h).sum() / 4


# ---- the paper's constant does not ---------------------------------------------------------------


@pytest.mark.parametrize("theta", [1e3, 1e4, 5e5, 1e6])
def test_the_counterexample(theta):
    """Above the paper's bound, and at most 2.2% below the corrected one, at every even head_dim."""
    s1 = 1000.0
    for head_dim in range(8, 257, 2):
        h = bounds.adversarial_h(s1 + 0.5, head_dim, theta, h_max=3.0)
        np.testing.assert_allclose(np.abs(h), 3.0)
        deviation = chord_deviation(h, s1 + 0.5, s1, s1 + 1, head_dim, theta)
        by_formula = 3 * (1 - np.cos(bounds.frequencies(head_dim, theta) / 2)).sum()
        np.testing.assert_allclose(deviation, by_formula, rtol=1e-9)
        args = (3.0, s1 + 0.5, s1, s1 + 1, head_dim, theta)
        paper = bounds.interpolation_bound(*args, constant="paper")
        exact = bounds.interpolation_bound(*args, constant="exact")
        assert paper < deviation < exact, head_dim
        assert deviation >= (1 - 0.022) * exact, head_dim
        sharp = bounds.interpolation_bound(*args, constant="sharp")
        np.testing.assert_allclose(sharp, deviation, rtol=1e-9)


@few
@given(st.integers(0, 2**32 - 1), head_dims, thetas)
def test_no_h_lies_further_from_the_chord_than_the_worst(seed, head_dim, theta):
    rng = np.random.default_rng(seed)
    h = np.exp(1j * rng.uniform(0, 7, (50, head_dim // 2)))
    worst = bounds.adversarial_h(7.5, head_dim, theta)
    largest = chord_deviation(worst, 7.5, 7, 8, head_dim, theta)
    score = bounds.attention_score(h, np.array([7, 7.5, 8]), head_dim, theta)  # (50, 3)
    deviation = np.abs(score[:, 1] - (score[:, 0] + score[:, 2]) / 2)
    assert (deviation <= largest + slack(1, 8, head_dim)).all()


@pytest.mark.parametrize(
    "head_dim, deviation, paper, exact",
    [
        (128, 0.49388, 0.43429, 0.49979),
        (64, 0.28183, 0.21715, 0.28561),
        (32, 0.17994, 0.10857, 0.18281),
    ],
)
def test_figures_of_theorem_2_1(head_dim, deviation, paper, exact):
    h = bounds.adversarial_h(0.5, head_dim, 1e4)
    found = chord_deviation(h, 0.5, 0, 1, head_dim, 1e4)
    assert found == pytest.approx(deviation, abs=5e-6)
    by_paper = bounds.interpolation_bound(1, 0.5, 0, 1, head_dim, 1e4, "paper")
    assert by_paper == pytest.approx(paper, abs=5e-6)
    by_sum = bounds.interpolation_bound(1, 0.5, 0, 1, head_dim, 1e4, constant="exact")
    assert by_sum == pytest.approx(exact, abs=5e-6)
    if head_dim == 128:
        assert by_paper == pytest.approx(128 / 294.73, rel=1e-4)


@few
@given(head_dims, thetas)
def test_closed_form_of_the_sum(head_dim, theta):
    direct = math.fsum(bounds.frequencies(head_dim, theta) ** 2)
    assert bounds.sum_theta_squared(head_dim, theta) == pytest.approx(direct, rel=1e-13)
    assert direct > head_dim / (4 * math.log(theta))  # the paper's constant


@pytest.mark.parametrize("theta, quotient", [(1e4, 129.6), (5e5, 174.4)], ids=["llama", "llama3"])
def test_quotient_of_two_attained_suprema(theta, quotient):
    """|a(s)| <= d/2 and the sharp bound are both reached: their quotient needs no other bound."""
    deviation = bounds.grid_deviation(128, theta)
    aligned = bounds.adversarial_h(5000.5, 128, theta)
    largest = bounds.attention_score(aligned, 5000.5, 128, theta)
    reached = chord_deviation(aligned, 5000.5, 5000, 5001, 128, theta)
    assert largest / reached == pytest.approx(quotient, abs=0.05)
    assert 64 / deviation["sharp"] == pytest.approx(quotient, abs=0.05)


# ---- S(s) ----------------------------------------------------------------------------------------


def test_similarity_is_the_mean_score_of_like_tokens():
    """Men et al. 2024, theorem 1: over random queries q and keys q + noise the mean is 2 S(s)."""
    rng = np.random.default_rng(0)
    n = 20000
    q, noise, other = rng.standard_normal((3, n, 16, 2)) @ [1, 1j]  # (n, d/2) each
    s = np.array([0, 1, 5, 100, 700])
    expected = 2 * bounds.similarity(s, 32, 1e4)
    # The mean of n scores is off by some sqrt(d / n) standard deviations of one component
    tolerance = 5 * np.sqrt(4 * 32 / n)
    like = bounds.attention_score(q * (q + noise).conj(), s, 32, 1e4).mean(axis=0)
    unlike = bounds.attention_score(q * other.conj(), s, 32, 1e4).mean(axis=0)
    np.testing.assert_allclose(like, expected, atol=tolerance)
    np.testing.assert_allclose(unlike, 0, atol=tolerance)


@pytest.mark.parametrize(
    "head_dim, theta, zero, negative",
    [
        (128, 1e4, 1706.06, 1707),  # LLaMA: 0.83 of its window
        (128, 5e5, 18437.78, 18438),  # Llama 3
        (64, 1e5, 3615.70, 3616),
        (32, 1e4, 473.37, 474),
        (2, 1e4, math.pi / 2, 2),  # one pair: S(s) = cos(s)
        # S dips below 0 between two whole distances first, and is negative at a whole one later
        (18, 300, 28.741, 52),
        (28, 3e3, 160.334, 260),
    ],
)
def test_first_zero_of_similarity(head_dim, theta, zero, negative):
    last = 20000
    found = bounds.first_zero(head_dim, theta, last)
    assert found == pytest.approx(zero, abs=5e-3)
    assert abs(bounds.similarity(found, head_dim, theta)) < 1e-6
    # No earlier zero: S is positive at every 1/50 of a token before
    before = np.arange(0, found - 0.02, 0.02)
    angles = [theta ** (-2 * j / head_dim) for j in range(head_dim // 2)]
    assert sum(np.cos(before * angle) for angle in angles).min() > 0
    assert bounds.first_negative(head_dim, theta, last) == negative
    assert bounds.first_zero(head_dim, theta, int(zero)) is None
    assert bounds.first_negative(head_dim, theta, negative - 1) is None
    assert bounds.first_negative(head_dim, theta, negative) == negative


def test_share_of_negative_similarity():
    """LLaMA at 8,192 positions: 40% of the distances beyond 2,048 left alone, 1% under PI."""
    shares = bounds.negative_shares(128, 1e4, 2048, 4)
    assert shares == pytest.approx({"none": 0.4007, "linear": 0.0098}, abs=5e-5)
    assert bounds.negative_shares(128, 1e4, 2048, 1) == {"none": 0.0, "linear": 0.0}


# ---- a(s) and B(s) by other ways -----------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16).map(lambda n: 2 * n), thetas, starts)
def test_B_is_the_double_sum(head_dim, theta, s):
    total = 0.0
    for k in range(1, head_dim // 2 + 1):
        A_k = sum(np.exp(1j * s * theta ** (-2 * j / head_dim)) for j in range(k))
        total += abs(A_k)
    assert bounds.B(s, head_dim, theta) == pytest.approx(total, rel=1e-9)


def test_chunks_change_nothing(monkeypatch):
    s = np.arange(1000).reshape(10, 100) * 1.5
    h = np.random.default_rng(0).standard_normal((3, 16)) + 0j
    b = bounds.B(s, 32, 1e4)
    a = bounds.attention_score(h, s, 32, 1e4)
    assert b.shape == (10, 100)
    assert a.shape == (3, 10, 100)
    monkeypatch.setattr(bounds, "CHUNK", 7 * 16)
    np.testing.assert_allclose(bounds.B(s, 32, 1e4), b, rtol=1e-14)
    np.testing.assert_allclose(bounds.attention_score(h, s, 32, 1e4), a, rtol=1e-13, atol=1e-13)


def test_one_distance_gives_a_number():
    assert bounds.attention_score(np.ones(16), 1.0, 32, 1e4).shape == ()
    assert bounds.B(1.0, 32, 1e4).shape == ()


def test_B_is_fast_and_small():
    """0 .. 131072 at d = 128 takes seconds, and some 10 MB beside the input."""
    tracemalloc.start()
    start = time.perf_counter()
    b = bounds.B(np.arange(131073), 128, 1e4)
    seconds = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 20
    assert peak < 30 * 2**20
    assert b.shape == (131073,)
    assert b[0] == 64 * 65 / 2  # at s = 0, |A_k| = k


@pytest.mark.parametrize("head_dim, theta", [(8, 1e3), (64, 1e5), (128, 1e4), (256, 1e6)])
def test_attention_score_is_the_dot_product_after_rope(head_dim, theta):
    torch.manual_seed(0)
    inv_freq, factor = rope.rope_frequencies(head_dim, theta, "none")
    freqs = bounds.frequencies(head_dim, theta)
    np.testing.assert_allclose(inv_freq.numpy(), freqs, rtol=1e-7)
    q, k = torch.randn(2, head_dim, dtype=torch.float64)
    m = torch.tensor([0, 1, 5, 100, 2047, 7])
    n = torch.tensor([0, 0, 7, 3, 0, 2047])

    def turn(x, positions):  # (T, d)
        cos, sin = rope.rope_cos_sin(positions, inv_freq, factor)
        return rope.apply_rope(x.expand(len(positions), -1), cos, sin)

    def as_complex(x):  # (d/2,), in the half-split layout
        real, imaginary = x.numpy().reshape(2, -1)
        return real + 1j * imaginary

    dots = (turn(q, m) * turn(k, n)).sum(-1).numpy()
    h = as_complex(q) * as_complex(k).conj()
    score = bounds.attention_score(h, (m - n).numpy(), head_dim, theta)
    # rope computes in float32: theta_j, angle, cos and sin are rounded, for the query and the key
    error = np.multiply.outer((m + n).numpy(), freqs) * 2**-23 + 2**-21
    assert (np.abs(dots - score) <= error @ np.abs(h)).all()
    wrong_sign = bounds.attention_score(h, (n - m).numpy(), head_dim, theta)
    assert np.abs(dots - wrong_sign).max() > 0.1


# ---- the figures beside the paper's claims -------------------------------------------------------


@pytest.mark.parametrize(
    "theta, last, least, argmin, first, share, ratios",
    [
        # The paper: at least 1, at least 600
        (1e4, 4096, 1.1159, 3643, None, 0.0, (658, 572)),
        (1e4, 32768, 0.6292, 22297, 4861, 0.0271, (371, 322)),
        (1e4, 131072, 0.5897, 70508, 4861, 0.0253, (348, 302)),
        # Llama 3
        (5e5, 4096, 2.4842, 4018, None, 0.0, (2086, 1711)),
        (5e5, 32768, 1.3083, 31218, None, 0.0, (1099, 901)),
        (5e5, 131072, 0.8498, 122422, 81232, 0.0012, (714, 585)),
    ],
)
def test_what_is_left_of_the_claims(theta, last, least, argmin, first, share, ratios):
    b = bounds.B(np.arange(last + 1), 128, theta)
    found = bounds.summarize(128, b, bounds.grid_deviation(128, theta))
    assert found["range"] == [0, last]
    assert found["min_B_over_d"] == pytest.approx(least, abs=5e-5)
    assert found["argmin"] == argmin
    assert found["first_below_d"] == first
    assert found["share_below_d"] == pytest.approx(share, abs=5e-5)
    assert (round(found["ratio"]["paper"]), round(found["ratio"]["exact"])) == ratios
    assert found["min_extrapolation_over_trivial"] >= 1
    if theta == 1e4:
        trivial = found["trivial_ratio"]
        assert (round(trivial["paper"]), round(trivial["exact"])) == (147, 128)
        assert trivial["sharp"] == pytest.approx(129.6, abs=0.05)


# ---- errors and the script -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bounds.frequencies(7, 1e4), "head_dim"),
        (lambda: bounds.B(1, 8, 1.0), "theta"),
        (lambda: bounds.B([1, math.nan], 8, 1e4), "finite"),
        (lambda: bounds.attention_score(np.ones(3), 1, 8, 1e4), "head_dim / 2 = 4"),
        (lambda: bounds.interpolation_bound(1, 2, 0, 1, 8, 1e4), "between s1 and s2"),
        (lambda: bounds.interpolation_bound(1, 0.5, 0, 1, 8, 1e4, "tight"), "constant"),
        (lambda: bounds.extrapolation_bound(-1, 0, 8, 1e4), "h_max"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_script_prints_draws_and_writes(tmp_path):
    line = [sys.executable, ROOT / "bounds.py", "--head_dim", "128", "--theta", "10000"]
    line += ["--scale", "16", "--plot", "b.png", "--json", "b.json"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    figures = ("1.1159", "3643", "0.6292", "22297", "4861", "2.71%", "658x", "371x")
    figures += ("147x", "128x", "129.6x", "600x", "0.49388", "0.83 L", "1707", "60.2%", "0.8%")
    for figure in figures:
        assert figure in done.stdout
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "b.json").read_text())
    assert (report["head_dim"], report["theta"], report["scale"]) == (128, 10000, 16)
    near, far = report["ranges"]
    assert (near["range"], far["range"]) == ([0, 4096], [0, 32768])
    assert near["first_below_d"] is None
    assert far["argmin"] == 22297
    deviation = report["grid_deviation"]
    assert deviation["paper"] < deviation["sharp"] < deviation["exact"]
    similar = report["similarity"]
    assert similar["these settings"] == similar["llama"]
    assert similar["llama"]["first_negative"] == 1707
    assert similar["llama3"]["first_zero_over_window"] == pytest.approx(2.2507, abs=5e-5)
    assert report["negative_share"]["linear"] == pytest.approx(0.0081, abs=5e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.png"]


def test_script_presets_give_way_to_flags(tmp_path, command):
    path = tmp_path / "b.json"
    flags = ("--preset", "tiny", "--theta", "5000", "--scale", "256")
    ended = command(bounds.main, *flags, "--json", path)
    assert "head_dim 64, theta 5000; window 256 x scale 256" in ended.out
    assert "0 .. 65536" in ended.out
    assert json.loads(path.read_text())["window"] == 256


def test_help_lists_presets_and_defaults(command):
    text = " ".join(command(bounds.main, "--help").out.split())
    assert "llama (head_dim 128, theta 10000, window 2048)" in text
    assert "llama3 (" in text and "smollm2 (" in text and "tiny (" in text
    assert "default: 16" in text


@pytest.mark.parametrize(
    "args, message",
    [
        (["--head_dim", "7"], "head_dim must be even"),
        (["--head_dim", "0"], "--head_dim"),
        (["--theta", "one"], "--theta"),
        (["--theta", "1"], "theta must be a finite number above 1"),
        (["--window", "0"], "--window"),
        (["--window", "9" * 400], "--window"),
        (["--scale", "0.5"], "--scale"),
        (["--scale", "nan"], "--scale"),
        (["--scale", "1e9"], "--scale"),
        (["--preset", "gpt2"], "--preset"),
        (["--plot", "file/b.png"], "--plot"),
        (["--plot", "b.jpeg2"], ".png"),
        (["--json", "."], "--json"),
        (["--no_such_flag"], "--no_such_flag"),
    ],
)
def test_bad_input_is_refused_before_the_work(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    if "--json" not in args:
        args = args + ["--json", "b.json"]
    monkeypatch.setattr(sys, "argv", ["bounds.py", *args])
    with pytest.raises(SystemExit) as stopped:
        bounds.run(bounds.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.startswith("bounds.py: error: ") and err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_script_names_a_file_that_cannot_be_written(tmp_path):
    """A full disk, for which a limit on the size of files stands: one line, and no half a file."""
    code = (
        "import resource, signal, sys\n"
        "import bounds\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"sys.argv = ['bounds.py', '--json', {str(tmp_path / 'b.json')!r}]\n"
        "bounds.run(bounds.main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("bounds.py: error: ") and done.stderr.count("\n") == 1
    assert "b.json" in done.stderr
    assert not list(tmp_path.iterdir())
