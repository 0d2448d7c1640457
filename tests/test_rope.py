"""rope.py: the properties of RoPE, float64 beside every float32 angle, transformers beside every method."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rope import METHODS, apply_rope, half_to_interleaved, interleaved_to_half, rope_cos_sin, rope_frequencies

SCALES = {"none": 1.0, "linear": 16.0, "ntk": 16.0, "dynamic": 4.0, "yarn": 16.0, "llama3": 8.0}
FAR = 32767  # the last position of the paper's longest window
HALF_ULP = 2.0**-24  # float32 rounds to this, relatively


def exact_inv_freq(method, head_dim, theta, scale, window, length=None, fast=32.0, slow=1.0, low=1.0, high=4.0):
    """Every method's inv_freq as plain Python float64, pair by pair, from the papers' formulas."""

    def pair_of(turns):  # YaRN's dim(n): the pair that makes n turns within the window
        return head_dim * math.log(window / (2 * math.pi * turns)) / (2 * math.log(theta))

    if method == "dynamic":
        stretch = scale * max(length, window) / window - (scale - 1)
    elif method == "ntk":
        stretch = scale
    if method in ("ntk", "dynamic"):
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    out = []
    for j in range(head_dim // 2):
        kept = math.exp(-2 * j / head_dim * math.log(theta))
        wavelength = 2 * math.pi / kept
        if method == "linear":
            weight = 1.0  # of kept / scale against kept
        elif method == "yarn":
            first, last = math.floor(pair_of(fast)), math.ceil(pair_of(slow))
            first, last = max(first, 0), min(last, head_dim - 1)
            weight = min(max((j - first) / (last - first), 0.0), 1.0)
        elif method == "llama3":
            if wavelength < window / high:
                weight = 0.0
            elif wavelength > window / low:
                weight = 1.0
            else:
                weight = 1 - (window / wavelength - low) / (high - low)
        else:
            weight = 0.0
        out.append((1 - weight) * kept + weight * kept / scale)
    return torch.tensor(out, dtype=torch.float64)


def reference(method, head_dim, theta, scale, window, length=None, **extra):
    """inv_freq, attention_factor, cos and sin at FAR of a fresh transformers module made from a LlamaConfig alone."""
    parameters = {"rope_type": method, "rope_theta": theta, "factor": scale, **extra}
    if method == "none":
        parameters = {"rope_type": "default", "rope_theta": theta}
    elif method == "ntk":  # transformers has no name for it; it is a larger theta
        parameters = {"rope_type": "default", "rope_theta": theta * scale ** (head_dim / (head_dim - 2))}
    elif method in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = window
    stays = method in ("linear", "dynamic")  # max_position_embeddings is the original window there
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=parameters,
        max_position_embeddings=window if stays else int(window * scale),
    )  # fmt: skip
    module = LlamaRotaryEmbedding(config)
    positions = torch.arange(length or FAR + 1)[None]
    cos, sin = module(torch.zeros(1), positions)
    if method in ROPE_INIT_FUNCTIONS:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[method](config, torch.device("cpu"), seq_len=positions.size(1))
        assert torch.allclose(inv_freq, module.inv_freq, rtol=1e-5), "transformers disagrees with itself"
    return module.inv_freq, module.attention_scaling, cos[0, -1, : head_dim // 2], sin[0, -1, : head_dim // 2]


@pytest.fixture(autouse=True)
def computed_anew():
    rope_frequencies.cache_clear()  # no test is handed what another one computed


@pytest.fixture
def bfloat16_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


# What RoPE is


@pytest.mark.parametrize("method", METHODS)
def test_scores_depend_on_the_distance_alone(method):
    torch.manual_seed(0)
    inv_freq, factor = rope_frequencies(64, 10000.0, method, SCALES[method], 2048, length=8192)
    q, k = torch.randn(2, 50, 64, dtype=torch.float64)  # 50 pairs of q and k
    start = torch.randint(17, 500, (50,))

    def scores(distance, shift, dtype):
        at_q, at_k = start + shift + distance, start + shift
        if dtype == torch.float32:
            (cos_q, sin_q), (cos_k, sin_k) = (rope_cos_sin(at, inv_freq, factor) for at in (at_q, at_k))
        else:
            angle_q, angle_k = (at.double()[:, None] * inv_freq.double() for at in (at_q, at_k))
            cos_q, sin_q, cos_k, sin_k = angle_q.cos(), angle_q.sin(), angle_k.cos(), angle_k.sin()
        return (apply_rope(q.to(dtype), cos_q, sin_q) * apply_rope(k.to(dtype), cos_k, sin_k)).sum(-1)

    norms = (q.norm(dim=-1) * k.norm(dim=-1)).max() * factor**2
    # each of the 4 angles of two scores is at most 1000 radians, rounded once
    for dtype, eps in ((torch.float32, HALF_ULP), (torch.float64, 2.0**-53)):
        tolerance = norms * 4 * 1000 * eps
        for distance in (0, 1, 93, -17):
            first = scores(distance, 0, dtype)
            for shift in (1, 64, 400):
                assert (scores(distance, shift, dtype) - first).abs().max() < tolerance
            assert (scores(distance + 1, 0, dtype) - first).abs().max() > 10 * tolerance  # but on the distance it does
    if factor == 1:
        assert torch.allclose(scores(0, 5, torch.float64), (q * k).sum(-1))  # no distance, no rotation


@pytest.mark.parametrize("scale", [2, 8, 16, 3, 1.7, 31.4])
@pytest.mark.parametrize("step", [1, 0.125])
def test_linear_at_scale_times_m_is_none_at_m(scale, step):
    m = torch.arange(0, 2048 * step, step)  # integers, and fractions
    plain = rope_cos_sin(m, *rope_frequencies(64, 10000.0, "none"))
    scaled = rope_cos_sin(scale * m, *rope_frequencies(64, 10000.0, "linear", scale))
    if math.log2(scale).is_integer():
        assert all(map(torch.equal, plain, scaled))  # a power of two rounds nothing
    else:  # scale * m, inv_freq / scale, inv_freq and both products are each rounded
        for a, b in zip(plain, scaled):
            assert (a - b).abs().max() < 5 * HALF_ULP * m[-1] + 2 * HALF_ULP


def test_linear_at_an_integer_lies_between_the_known_positions():
    """The paper's Figure 1: position 5 at scale 2 is position 2.5."""
    inv_freq, _ = rope_frequencies(64, 10000.0, "linear", 2)
    cos, _ = rope_cos_sin(torch.tensor([5]), inv_freq)
    plain, _ = rope_frequencies(64, 10000.0, "none")
    assert torch.equal(cos, rope_cos_sin(torch.tensor([2.5]), plain)[0])
    assert torch.equal(inv_freq, plain / 2)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
def test_scale_one_changes_nothing(method):
    length = 2048 if method == "dynamic" else 9999  # beyond the window "dynamic" acts at scale 1 too: it goes by length
    inv_freq, factor = rope_frequencies(64, 10000.0, method, 1, 2048, length=length)
    assert torch.equal(inv_freq, rope_frequencies(64, 10000.0, "none")[0]) and factor == 1


# Precision: float32 angles, whatever the model's dtype


@pytest.mark.parametrize("head_dim, theta", [(128, 10000.0), (64, 500000.0), (8, 10000.0)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["float32", "bfloat16 default", "autocast"])
def test_angles_at_the_last_position_are_float32s(method, head_dim, theta, how, request):
    if how == "bfloat16 default":
        request.getfixturevalue("bfloat16_default")
    scale = SCALES[method]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        inv_freq, factor = rope_frequencies(head_dim, theta, method, scale, 2048, length=FAR + 1)
        cos, sin = rope_cos_sin(torch.arange(FAR + 1), inv_freq, factor)
    exact = exact_inv_freq(method, head_dim, theta, scale, 2048, FAR + 1)
    assert inv_freq.dtype == cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (FAR + 1, head_dim // 2)
    torch.testing.assert_close(inv_freq.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close((inv_freq * FAR).double(), exact * FAR, rtol=1e-6, atol=0)
    # an angle below 2^15 and an inv_freq below 1, half an ulp of each: 2^-10 + 2^15 * 2^-25 = 0.00195
    for ours, right in ((cos[FAR], (exact * FAR).cos()), (sin[FAR], (exact * FAR).sin())):
        torch.testing.assert_close(ours.double() / factor, right, rtol=0, atol=2e-3)


def test_bfloat16_angles_would_fail_those_tolerances():
    exact = exact_inv_freq("none", 128, 10000.0, 1, 2048)
    positions = torch.arange(FAR + 1).to(torch.bfloat16)
    assert positions.unique().numel() == 1153  # of 32,768: neighbours fall together
    angles = positions[FAR] * exact.to(torch.bfloat16)
    relative = (angles.double() / (exact * FAR) - 1).abs()
    assert relative.max() > 1e-3  # the test above asks for 1e-6
    assert (angles.double().cos() - (exact * FAR).cos()).abs().max() > 0.5  # and for 2e-3
    # rounding inv_freq alone, with float32 positions, is as bad: what `.to(bfloat16)` does to a buffer
    angles = FAR * exact.to(torch.bfloat16).double()
    assert (angles.cos() - (exact * FAR).cos()).abs().max() > 0.5
    cos, _ = rope_cos_sin(torch.arange(FAR + 1), rope_frequencies(128, 10000.0, "none")[0])
    assert cos[:, 0].unique().numel() > 30000  # ours stay apart


def test_positions_may_have_any_shape_and_start():
    inv_freq, _ = rope_frequencies(64, 10000.0, "none")
    cos, sin = rope_cos_sin(torch.arange(5000), inv_freq)
    later = rope_cos_sin(torch.arange(4000, 4010).view(2, 5), inv_freq)
    assert torch.equal(later[0], cos[4000:4010].view(2, 5, 32)) and torch.equal(later[1], sin[4000:4010].view(2, 5, 32))


@pytest.mark.parametrize("method", METHODS)
def test_frequencies_do_not_depend_on_the_default_device(method):
    usual, _ = rope_frequencies(64, 10000.0, method, SCALES[method], 2048, length=4096)
    with torch.device("meta"):  # as when a large model is first built without memory
        inside, _ = rope_frequencies(64, 10000.0, method, SCALES[method], 2048, length=4096, device="cpu")
    assert torch.equal(usual, inside)


# transformers beside every method: its own numbers from its own config

CASES = [
    ("none", 128, 10000.0, 1.0, 2048, {}),
    ("none", 64, 500000.0, 1.0, 8192, {}),
    ("linear", 128, 10000.0, 16.0, 2048, {}),
    ("linear", 64, 100000.0, 2.5, 8192, {}),
    ("linear", 8, 10000.0, 4.0, 32, {}),
    ("ntk", 128, 10000.0, 16.0, 2048, {}),
    ("ntk", 64, 500000.0, 2.5, 8192, {}),
    ("ntk", 8, 10000.0, 4.0, 32, {}),
    ("yarn", 128, 10000.0, 16.0, 2048, {}),
    ("yarn", 64, 500000.0, 4.0, 8192, {}),
    ("yarn", 32, 10000.0, 2.5, 256, {}),
    ("yarn", 8, 10000.0, 4.0, 32, {}),
    ("yarn", 128, 10000.0, 8.0, 4096, {"beta_fast": 20.0, "beta_slow": 2.5}),
    ("yarn", 128, 10000.0, 8.0, 4096, {"attention_factor": 1.0}),
    ("yarn", 64, 10000.0, 32.0, 2048, {"beta_fast": 64.0, "beta_slow": 0.5, "attention_factor": 1.5}),
    ("llama3", 128, 500000.0, 8.0, 8192, {"low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ("llama3", 64, 500000.0, 32.0, 8192, {"low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ("llama3", 64, 10000.0, 4.0, 256, {"low_freq_factor": 2.0, "high_freq_factor": 3.0}),
    ("llama3", 8, 10000.0, 4.0, 32, {"low_freq_factor": 0.5, "high_freq_factor": 16.0}),
]


@pytest.mark.parametrize("method, head_dim, theta, scale, window, extra", CASES)
def test_every_method_equals_transformers(method, head_dim, theta, scale, window, extra):
    inv_freq, factor = rope_frequencies(head_dim, theta, method, scale, window, **extra)
    cos, sin = rope_cos_sin(torch.tensor(FAR), inv_freq, factor)
    expected, expected_factor, expected_cos, expected_sin = reference(method, head_dim, theta, scale, window, **extra)
    torch.testing.assert_close(inv_freq, expected, rtol=2e-6, atol=0)  # theirs are float32 powers, off by some 1e-6
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    atol = 2e-6 * FAR * factor  # the same 2e-6, as radians
    torch.testing.assert_close(cos, expected_cos, rtol=0, atol=atol)
    torch.testing.assert_close(sin, expected_sin, rtol=0, atol=atol)
    if method != "none":  # with the scale left out none of that would hold
        ignored = rope_frequencies(head_dim, theta, "none")[0]
        assert (ignored / expected - 1).abs().max() > 0.5


@pytest.mark.parametrize("head_dim, theta, scale, window", [(128, 1e4, 4, 2048), (64, 5e5, 2.5, 512), (8, 1e4, 8, 32)])
@pytest.mark.parametrize("windows", [0.25, 1, 1.5, 2, 4, 7.3])  # the length, in original windows
def test_dynamic_equals_a_fresh_transformers_module_at_each_length(head_dim, theta, scale, window, windows):
    length = int(window * windows)
    inv_freq, factor = rope_frequencies(head_dim, theta, "dynamic", scale, window, length=length)
    expected, expected_factor, _, _ = reference("dynamic", head_dim, theta, scale, window, length=length)
    # their theta is a float32 power here, off by a few 1e-7, and goes into another one
    torch.testing.assert_close(inv_freq, expected, rtol=5e-6, atol=0)
    assert factor == expected_factor == 1
    plain = rope_frequencies(head_dim, theta, "none")[0]
    assert torch.equal(inv_freq, plain) == (length <= window)  # and beyond the window alone does it act


# What sets the methods apart


@pytest.mark.parametrize("head_dim, theta, scale", [(128, 10000.0, 16), (64, 500000.0, 3), (8, 10000.0, 2)])
def test_ntk_keeps_the_first_pair_and_divides_the_last_by_the_scale(head_dim, theta, scale):
    ntk, _ = rope_frequencies(head_dim, theta, "ntk", scale)
    plain, _ = rope_frequencies(head_dim, theta, "none")
    assert ntk[0] == plain[0] == 1
    assert ntk[-1].item() == pytest.approx(plain[-1].item() / scale, rel=2 * HALF_ULP)  # both are rounded
    assert (ntk / plain).diff().max() < 0  # the slower the pair, the more it is interpolated


@pytest.mark.parametrize("method, fast, slow", [("yarn", 32, 1), ("llama3", 4, 1)])
@pytest.mark.parametrize("head_dim, theta, scale, window", [(128, 10000.0, 16, 2048), (64, 500000.0, 8, 8192)])
def test_yarn_and_llama3_keep_fast_pairs_and_interpolate_slow_ones(method, fast, slow, head_dim, theta, scale, window):
    """The direction of the ramp: inverted, it would do the reverse, and every shape and range would still be right."""
    inv_freq, _ = rope_frequencies(head_dim, theta, method, scale, window)
    plain, _ = rope_frequencies(head_dim, theta, "none")
    turns = plain * window / (2 * math.pi)  # over the original window
    ratio = inv_freq / plain
    assert torch.equal(inv_freq[turns > fast], plain[turns > fast]) and (turns > fast).any()
    torch.testing.assert_close(ratio[turns < slow], torch.full_like(ratio[turns < slow], 1 / scale), rtol=1e-6, atol=0)
    between = ratio[(turns < 0.9 * fast) & (turns > 1.1 * slow)]
    assert len(between) >= 2 and (between < 1).all() and (between > 1 / scale).all()
    assert ratio.diff().max() < 1e-6  # never up again


def test_yarn_lengthens_q_and_k_and_the_others_do_not():
    for method in METHODS:
        _, factor = rope_frequencies(64, 10000.0, method, SCALES[method], 2048)
        assert factor == (0.1 * math.log(16) + 1 if method == "yarn" else 1)
    inv_freq, factor = rope_frequencies(64, 10000.0, "yarn", 16)
    cos, sin = rope_cos_sin(torch.arange(100), inv_freq, factor)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, factor**2), rtol=1e-6, atol=0)


# The two layouts


def test_the_permutations_undo_each_other():
    weight = torch.arange(3 * 8 * 5.0).view(24, 5)  # 3 heads of 8
    assert torch.equal(half_to_interleaved(interleaved_to_half(weight, 3), 3), weight)
    assert torch.equal(interleaved_to_half(half_to_interleaved(weight, 3), 3), weight)
    rows = interleaved_to_half(torch.arange(16), 2)  # a bias; each head: the even ones, then the odd ones
    assert rows.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(interleaved_to_half(weight[:, 0], 3), interleaved_to_half(weight, 3)[:, 0])


def test_metas_complex_rotation_gives_the_same_scores_after_permuting():
    torch.manual_seed(0)
    T, C, n_head, D = 12, 20, 3, 16
    x = torch.randn(T, C, dtype=torch.float64)
    wq, wk = torch.randn(2, n_head * D, C, dtype=torch.float64)
    inv_freq, _ = rope_frequencies(D, 10000.0, "linear", 2)
    angles = torch.arange(T).double()[:, None] * inv_freq.double()

    def meta(w):  # eq. (1): neighbours are one complex number, turned by multiplying
        pairs = torch.view_as_complex((x @ w.T).view(T, n_head, D // 2, 2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(-2).transpose(0, 1)  # (H, T, D)

    def ours(w):
        return apply_rope((x @ w.T).view(T, n_head, D).transpose(0, 1), angles.cos(), angles.sin())

    def scores(rotate, *weights):
        q, k = map(rotate, weights)
        return q @ k.mT

    right = scores(meta, wq, wk)
    permuted = scores(ours, interleaved_to_half(wq, n_head), interleaved_to_half(wk, n_head))
    torch.testing.assert_close(permuted, right, rtol=1e-12, atol=1e-12)  # float64 sums of 16 terms of order 100
    assert (scores(ours, wq, wk) - right).abs().max() > 1  # unpermuted: wrong, though not at distance 0
    neighbours = meta(wq).unflatten(-1, (D // 2, 2))  # and the turned q are each other's permutation
    torch.testing.assert_close(ours(interleaved_to_half(wq, n_head)), neighbours.mT.flatten(-2), rtol=1e-12, atol=1e-12)


# apply_rope


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_apply_rope_keeps_the_dtype_and_rounds_once(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 16).to(dtype)
    cos, sin = rope_cos_sin(torch.arange(10), rope_frequencies(16, 10000.0, "none")[0])
    y = apply_rope(x, cos, sin)
    assert y.dtype == dtype and y.shape == x.shape
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(y, apply_rope(x.float(), cos, sin).to(dtype))
    assert apply_rope(x, cos.to(dtype), sin.to(dtype)).dtype == dtype  # cast beforehand: allowed


def test_gradients_through_apply_rope():
    torch.manual_seed(0)
    angles = torch.rand(5, 4, dtype=torch.float64) * 6
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(apply_rope, (x, cos, sin))
    upstream = torch.randn_like(x)
    apply_rope(x, cos, sin).backward(upstream)
    torch.testing.assert_close(x.grad, apply_rope(upstream, cos, -sin))  # a rotation's transpose turns back


# Bad values

BAD = [
    (dict(method="rotary"), "rotary.*linear"),  # says what it got and what there is
    (dict(method="linear", scale=0), "scale"),
    (dict(method="none", scale=0), "scale"),
    (dict(method="linear", scale=-2), "scale"),
    (dict(method="linear", scale=math.nan), "scale"),
    (dict(method="none", scale=math.nan), "scale"),
    (dict(method="linear", scale=math.inf), "scale"),
    *((dict(method=method, scale=0.5), "scale.*0.5") for method in METHODS if method != "none"),
    (dict(head_dim=7), "head_dim.*7"),
    (dict(head_dim=0), "head_dim"),
    (dict(head_dim=-4), "head_dim"),
    (dict(theta=0.0), "theta"),
    (dict(theta=1.0), "theta"),
    (dict(theta=-10000.0), "theta"),
    (dict(theta=math.nan), "theta"),
    (dict(theta=math.inf), "theta"),
    (dict(original_window=0), "original_window"),
    (dict(method="yarn", scale=2, beta_fast=0.0), "beta_fast"),
    (dict(method="yarn", scale=2, beta_slow=-1.0), "beta_slow"),
    (dict(method="yarn", scale=2, beta_fast=1.0, beta_slow=32.0), "beta_fast.*beta_slow"),
    (dict(method="yarn", scale=2, attention_factor=0.0), "attention_factor"),
    (dict(method="yarn", scale=2, attention_factor=math.nan), "attention_factor"),
    (dict(method="llama3", scale=2, low_freq_factor=4.0, high_freq_factor=4.0), "high_freq_factor.*low_freq_factor"),
    (dict(method="llama3", scale=2, high_freq_factor=math.nan), "high_freq_factor"),
]


@pytest.mark.parametrize("values, named", BAD)
def test_bad_values_are_named(values, named):
    with pytest.raises(ValueError, match=named):
        rope_frequencies(**dict(head_dim=64, theta=10000.0) | values)


def test_a_scale_below_one_is_fine_where_it_is_ignored():
    assert torch.equal(rope_frequencies(64, 1e4, "none", 0.5)[0], rope_frequencies(64, 1e4, "none")[0])
