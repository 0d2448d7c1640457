"""bounds.py: the bounds hold for every h that is tried, the paper's constant does not, and the figures are right."""

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
spacings = st.sampled_from([1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32])  # the grid's, and PI's for each scale
few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def slack(h_max, s, head_dim):
    """What float64 may add: each of the d/2 angles s * theta_j is off by some eps * s, and so is its arrow; the sum
    of terms adds another eps a term. 4 such errors enter a(s) - a_lin(s). At s = 32768, d = 256: 4e-9 of 0.5."""
    return 4 * EPS * (np.max(np.abs(s)) + head_dim) * h_max * head_dim / 2


def draw_h(data, head_dim, theta, s):
    """h of one of several kinds, |h_j| <= 10: what attention makes, smooth in j, one pair alone, the worst cases."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n = head_dim // 2
    kind = data.draw(st.sampled_from(["q and k", "real", "smooth", "one pair", "worst", "nearly worst"]))
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
    at = bounds.attention_score(h, np.array([s1, s2]), head_dim, theta)
    return bounds.attention_score(h, s, head_dim, theta) - (at[0] * (s2 - s) + at[1] * (s - s1)) / (s2 - s1)


# --------------------------------------------------------------------------- the bounds hold


@few
@given(st.data(), head_dims, thetas, starts, spacings)
def test_exact_interpolation_bound_is_never_broken(data, head_dim, theta, s1, spacing):
    s2 = s1 + spacing
    s = np.linspace(s1, s2, 17)
    h = draw_h(data, head_dim, theta, data.draw(st.sampled_from(list(s))))
    h_max = np.abs(h).max()
    deviation = np.abs(chord_deviation(h, s, s1, s2, head_dim, theta))
    bound = bounds.interpolation_bound(h_max, s, s1, s2, head_dim, theta)
    assert (deviation <= bound + slack(h_max, s, head_dim)).all()


@few
@given(st.data(), head_dims, thetas, starts)
def test_extrapolation_bounds_are_never_broken(data, head_dim, theta, start):
    s = start + np.arange(32)
    h = draw_h(data, head_dim, theta, data.draw(st.sampled_from(list(s))))
    h_max = np.abs(h).max()
    score = np.abs(bounds.attention_score(h, s, head_dim, theta)) - slack(h_max, s, head_dim)
    sharper = bounds.difference_bound(h, s, head_dim, theta)  # takes h_{d/2} = 0
    assert (score <= sharper).all()
    assert (score <= bounds.trivial_bound(h_max, head_dim)).all()
    assert (sharper <= bounds.extrapolation_bound(h_max, s, head_dim, theta) * (1 + 8 * EPS)).all()


@few
@given(head_dims, thetas, starts)
def test_eq_8_is_never_below_the_trivial_bound(head_dim, theta, start):
    """2 B(s) >= d/2 + |A_{d/2}(s)| >= d/2: the paper's last form of eq. (8) never says more than |a| <= sum |h_j|."""
    s = start + np.arange(32)
    assert (2 * bounds.B(s, head_dim, theta) >= head_dim / 2 * (1 - 100 * EPS)).all()


def test_the_last_difference_of_eq_8_is_needed():
    """For h_j = 1 all differences but the last, to h_{d/2} = 0, vanish: without that term the bound would be 0."""
    h = np.ones(64)
    assert bounds.attention_score(h, 0, 128, 1e4) == 64
    np.testing.assert_allclose(bounds.difference_bound(h, [0, 7], 128, 1e4), bounds.B([0, 7], 128, 1e4))


def test_the_sharper_form_beats_the_trivial_bound_for_smooth_h():
    h = np.linspace(1, 1 / 64, 64)  # every difference is 1/64
    assert bounds.difference_bound(h, 4000, 128, 1e4) < np.abs(h).sum() / 4


# --------------------------------------------------------------------------- the paper's constant does not


@pytest.mark.parametrize("theta", [1e3, 1e4, 5e5, 1e6])
def test_the_counterexample(theta):
    """At every even head_dim: above the paper's bound, below the exact one and within 2.2% of it."""
    s1 = 1000.0
    for head_dim in range(8, 257, 2):
        h = bounds.adversarial_h(s1 + 0.5, head_dim, theta, h_max=3.0)
        np.testing.assert_allclose(np.abs(h), 3.0)
        deviation = chord_deviation(h, s1 + 0.5, s1, s1 + 1, head_dim, theta)
        told = 3 * (1 - np.cos(bounds.frequencies(head_dim, theta) / 2)).sum()
        np.testing.assert_allclose(deviation, told, rtol=1e-9)
        args = (3.0, s1 + 0.5, s1, s1 + 1, head_dim, theta)
        paper, exact = (bounds.interpolation_bound(*args, constant=c) for c in ("paper", "exact"))
        assert paper < deviation < exact, head_dim
        assert deviation >= (1 - 0.022) * exact, head_dim


@few
@given(st.integers(0, 2**32 - 1), head_dims, thetas)
def test_no_h_lies_further_from_the_chord_than_the_worst(seed, head_dim, theta):
    rng = np.random.default_rng(seed)
    h = np.exp(1j * rng.uniform(0, 7, (50, head_dim // 2)))
    worst = chord_deviation(bounds.adversarial_h(7.5, head_dim, theta), 7.5, 7, 8, head_dim, theta)
    at = bounds.attention_score(h, np.array([7, 7.5, 8]), head_dim, theta)
    assert (np.abs(at[:, 1] - (at[:, 0] + at[:, 2]) / 2) <= worst + slack(1, 8, head_dim)).all()


@pytest.mark.parametrize(
    "head_dim, deviation, paper, exact",
    [(128, 0.49388, 0.43429, 0.49979), (64, 0.28183, 0.21715, 0.28561), (32, 0.17994, 0.10857, 0.18281)],
)
def test_figures_of_theorem_2_1(head_dim, deviation, paper, exact):
    h = bounds.adversarial_h(0.5, head_dim, 1e4)
    assert chord_deviation(h, 0.5, 0, 1, head_dim, 1e4) == pytest.approx(deviation, abs=5e-6)
    assert bounds.interpolation_bound(1, 0.5, 0, 1, head_dim, 1e4, "paper") == pytest.approx(paper, abs=5e-6)
    assert bounds.interpolation_bound(1, 0.5, 0, 1, head_dim, 1e4, constant="exact") == pytest.approx(exact, abs=5e-6)
    if head_dim == 128:
        assert bounds.interpolation_bound(1, 0.5, 0, 1, 128, 1e4, "paper") == pytest.approx(128 / 294.73, rel=1e-4)


@few
@given(head_dims, thetas)
def test_closed_form_of_the_sum(head_dim, theta):
    direct = math.fsum(bounds.frequencies(head_dim, theta) ** 2)
    assert bounds.sum_theta_squared(head_dim, theta) == pytest.approx(direct, rel=1e-13)
    assert direct > head_dim / (4 * math.log(theta))  # what the paper takes for it


# --------------------------------------------------------------------------- a(s) and B(s) are what they say


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16).map(lambda n: 2 * n), thetas, starts)
def test_B_is_the_double_sum(head_dim, theta, s):
    total = 0.0
    for k in range(1, head_dim // 2 + 1):
        total += abs(sum(np.exp(1j * s * theta ** (-2 * j / head_dim)) for j in range(k)))
    assert bounds.B(s, head_dim, theta) == pytest.approx(total, rel=1e-9)


def test_chunks_do_not_show(monkeypatch):
    s = np.arange(1000).reshape(10, 100) * 1.5
    h = np.random.default_rng(0).standard_normal((3, 16)) + 0j
    b, a = bounds.B(s, 32, 1e4), bounds.attention_score(h, s, 32, 1e4)
    assert b.shape == (10, 100) and a.shape == (3, 10, 100)
    assert bounds.attention_score(h[0], 1.0, 32, 1e4).shape == () == bounds.B(1.0, 32, 1e4).shape
    monkeypatch.setattr(bounds, "CHUNK", 7 * 16)
    np.testing.assert_allclose(bounds.B(s, 32, 1e4), b, rtol=1e-14)
    np.testing.assert_allclose(bounds.attention_score(h, s, 32, 1e4), a, rtol=1e-13, atol=1e-13)


def test_B_is_fast_and_small():
    """0 .. 131072 at d = 128 takes seconds and some 10 MB beside its input (NumPy tells tracemalloc of its arrays)."""
    tracemalloc.start()
    start = time.perf_counter()
    b = bounds.B(np.arange(131073), 128, 1e4)
    seconds, megabytes = time.perf_counter() - start, tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert seconds < 20 and megabytes < 30, f"{seconds:.1f} s, {megabytes:.0f} MB"
    assert b.shape == (131073,) and b[0] == 64 * 65 / 2  # at s = 0, |A_k| = k


@pytest.mark.parametrize("head_dim, theta", [(8, 1e3), (64, 1e5), (128, 1e4), (256, 1e6)])
def test_attention_score_is_the_dot_product_of_turned_q_and_k(head_dim, theta):
    torch.manual_seed(0)
    inv_freq, factor = rope.rope_frequencies(head_dim, theta, "none")
    np.testing.assert_allclose(inv_freq.numpy(), bounds.frequencies(head_dim, theta), rtol=1e-7)
    q, k = torch.randn(2, head_dim, dtype=torch.float64)
    m, n = torch.tensor([0, 1, 5, 100, 2047, 7]), torch.tensor([0, 0, 7, 3, 0, 2047])

    def turn(x, positions):  # (T, d)
        return rope.apply_rope(x.expand(len(positions), -1), *rope.rope_cos_sin(positions, inv_freq, factor))

    dots = (turn(q, m) * turn(k, n)).sum(-1).numpy()
    q, k = (x[: head_dim // 2].numpy() + 1j * x[head_dim // 2 :].numpy() for x in (q, k))  # half-split pairs
    score = bounds.attention_score(q * k.conj(), (m - n).numpy(), head_dim, theta)
    # rope's angles are float32, rounded twice (theta_j, then the product), and so are the cos and sin of either side
    off = np.multiply.outer((m + n).numpy(), bounds.frequencies(head_dim, theta)) * 2**-23 + 2**-21
    assert (np.abs(dots - score) <= off @ np.abs(q * k.conj())).all()
    wrong_sign = bounds.attention_score(q * k.conj(), (n - m).numpy(), head_dim, theta)
    assert np.abs(dots - wrong_sign).max() > 0.1


# --------------------------------------------------------------------------- the figures, next to the paper's claims


@pytest.mark.parametrize(
    "head_dim, theta, last, least, where, first, share, by_paper, by_exact",
    [
        (128, 1e4, 4096, 1.1159, 3643, None, 0.0, 658, 572),  # the paper: at least 1, at least 600
        (128, 1e4, 32768, 0.6292, 22297, 4861, 0.0271, 371, 322),
        (128, 1e4, 131072, 0.5897, 70508, 4861, 0.0253, 348, 302),
        (128, 5e5, 4096, 2.4842, 4018, None, 0.0, 2086, 1711),  # Llama 3
        (128, 5e5, 32768, 1.3083, 31218, None, 0.0, 1099, 901),
        (128, 5e5, 131072, 0.8498, 122422, 81232, 0.0012, 714, 585),
    ],
)
def test_what_is_left_of_the_claims(head_dim, theta, last, least, where, first, share, by_paper, by_exact):
    grid = {c: float(bounds.interpolation_bound(1, 0.5, 0, 1, head_dim, theta, c)) for c in ("paper", "exact")}
    found = bounds.summarize(head_dim, bounds.B(np.arange(last + 1), head_dim, theta), grid)
    assert found["min_B_over_d"] == pytest.approx(least, abs=5e-5) and found["argmin"] == where
    assert found["first_below_d"] == first and found["share_below_d"] == pytest.approx(share, abs=5e-5)
    assert round(found["ratio"]["paper"]) == by_paper and round(found["ratio"]["exact"]) == by_exact
    if theta == 1e4:
        assert round(found["trivial_ratio"]["paper"]) == 147 and round(found["trivial_ratio"]["exact"]) == 128
    assert found["min_extrapolation_over_trivial"] >= 1


# --------------------------------------------------------------------------- errors and the script


@pytest.mark.parametrize(
    "call, says",
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
def test_errors_are_one_line(call, says):
    with pytest.raises(ValueError, match=says) as e:
        call()
    assert "\n" not in str(e.value)


def script(*args, cwd=ROOT):
    return subprocess.run([sys.executable, ROOT / "bounds.py", *args], cwd=cwd, capture_output=True, text=True)


def test_script_prints_draws_and_writes(tmp_path):
    done = script("--head_dim", "128", "--theta", "10000", "--scale", "16", "--plot", "b.png", "--json", "b.json",
                  cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    for figure in ("1.1159", "3643", "0.6292", "22297", "4861", "2.71%", "658x", "371x", "147x", "128x", "600x"):
        assert figure in done.stdout
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "b.json").read_text())
    assert (report["head_dim"], report["theta"], report["scale"]) == (128, 10000, 16)
    assert [r["range"] for r in report["ranges"]] == [[0, 4096], [0, 32768]]
    assert report["ranges"][1]["argmin"] == 22297 and report["ranges"][0]["first_below_d"] is None
    assert report["grid_deviation"]["paper"] < report["grid_deviation"]["attained"] < report["grid_deviation"]["exact"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json", "b.png"]  # no temporary file left


def test_script_presets_give_way_to_flags(tmp_path):
    done = script("--preset", "tiny", "--theta", "5000", "--scale", "256", "--json", str(tmp_path / "b.json"))
    assert "head_dim 32, theta 5000; window 256 x scale 256" in done.stdout and "0 .. 65536" in done.stdout
    assert json.loads((tmp_path / "b.json").read_text())["window"] == 256
    help_text = script("--help").stdout
    assert all(word in help_text for word in ("128", "10000", "2048", "llama3", "smollm2", "tiny", "default: 16"))


@pytest.mark.parametrize(
    "args, says",
    [
        (["--head_dim", "7"], "--head_dim"),
        (["--theta", "one"], "--theta"),
        (["--window", "0"], "--window"),
        (["--scale", "0.5"], "--scale"),
        (["--scale", "nan"], "--scale"),
        (["--scale", "1e9"], "--scale"),
        (["--preset", "gpt2"], "--preset"),
        (["--plot", "no/such/folder/b.png"], "--plot"),
        (["--plot", "b.jpeg2"], ".png"),
        (["--json", "."], "--json"),
        (["--no_such_flag"], "--no_such_flag"),
    ],
)
def test_script_refuses_bad_input_in_one_line(args, says, tmp_path):
    if "--json" not in args:
        args = args + ["--json", "b.json"]
    done = script(*args, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("bounds.py: error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_script_names_a_file_that_cannot_be_written(tmp_path):
    """A disk that fills up (a limit on the size of files stands in for it): one line, and nothing half-written."""
    limited = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "sys.argv = ['bounds.py', '--json', 'b.json']\n"
        f"runpy.run_path({str(ROOT / 'bounds.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", limited], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bounds.py: error: argument --json: cannot write")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
