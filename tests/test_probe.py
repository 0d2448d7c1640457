"""probe.py: attention recomputed is the model's own, edits do what they say, and nothing else."""

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from small_models import SHAPES, make, random_ids

import bounds
import probe

WINDOW = 12  # of the edits; texts are longer
T = 40


def in_transformers(model, window=None):
    """transformers' Mistral with the model's weights: LLaMA with attention within a window."""
    config = model.config
    reference = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=config.vocab_size, hidden_size=config.n_embd,
            intermediate_size=config.intermediate_size, num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
            head_dim=config.head_dim, rms_norm_eps=config.norm_eps, max_position_embeddings=T,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            sliding_window=window, attn_implementation="eager",
        )
    )
    weights = {}
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            name = "model." + name
        weights[name] = weight
    reference.load_state_dict(weights)
    return reference.eval()


# ---- attention in plain steps --------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at_once", [2**23, 1000], ids=["all queries", "some queries at a time"])
@torch.no_grad()
def test_recomputed_attention_is_the_models_own(shape, at_once, monkeypatch):
    monkeypatch.setattr(probe, "SCORES_AT_ONCE", at_once)
    model = make(rope="yarn", scale=4.0, **SHAPES[shape])  # yarn has longer cos and sin too
    ids = random_ids(2, T)
    own = model(ids)
    with probe.hooked(model):
        torch.testing.assert_close(model(ids), own, rtol=0, atol=1e-4)
    with probe.hooked(model, edit=lambda scores: torch.zeros_like(scores.logits)):
        assert (model(ids) - own).abs().max() > 0.1  # the hooks were at work
    assert torch.equal(model(ids), own)  # and are gone


@torch.no_grad()
def test_weights_that_are_shown_are_those_of_transformers(monkeypatch):
    monkeypatch.setattr(probe, "SCORES_AT_ONCE", 1000)
    model = make(n_kv_head=2)
    ids = random_ids(1, T)
    expected = torch.cat(in_transformers(model)(ids, output_attentions=True).attentions)
    # (layers, H, T, T)
    torch.testing.assert_close(probe.weights_of_head(model, ids[0], 1, 3), expected[1, 3])
    torch.testing.assert_close(probe.weights_of_queries(model, ids[0], 30), expected[:, :, 30:])

    previous = torch.diagonal(expected, offset=-1, dim1=-2, dim2=-1).mean(dim=-1)
    found = probe.mean_weight(model, ids, lambda distance: distance == 1)
    torch.testing.assert_close(found, previous)


@torch.no_grad()
def test_queries_before_the_first_are_left_to_the_model(monkeypatch):
    monkeypatch.setattr(probe, "SCORES_AT_ONCE", 1000)
    model = make(n_kv_head=2)
    ids = random_ids(2, T)
    own = model(ids)
    with probe.hooked(model, first=30):
        torch.testing.assert_close(model(ids), own, rtol=0, atol=1e-4)
    with probe.hooked(model, edit=lambda scores: torch.zeros_like(scores.logits), first=30):
        edited = model(ids)
    torch.testing.assert_close(edited[:, :30], own[:, :30], rtol=0, atol=1e-4)
    assert ((edited - own)[:, 30:].abs().amax(dim=(0, 2)) > 0.01).all()

    shown = {}  # layer: the queries

    def see(scores, weights):
        shown.setdefault(scores.layer, []).extend(scores.distance[:, 0].tolist())

    probe.show(model, ids[:1], see, layers=[0, 2], first=30)
    assert shown == {0: list(range(30, T)), 2: list(range(30, T))}


def test_a_hooked_model_refuses_a_cache_and_hooks_go_after_an_error():
    model = make()
    own = model(random_ids(1, T))
    with pytest.raises(ValueError, match="no KV cache"), probe.hooked(model):
        model.generate(random_ids(1, T), 1)
    assert torch.equal(model(random_ids(1, T)), own)


# ---- edits ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_masking_far_keys_is_a_sliding_window():
    model = make(n_kv_head=2)
    ids = random_ids(2, T)
    with probe.hooked(model, edit=partial(probe.mask_far, window=WINDOW)):
        masked = model(ids)
    expected = in_transformers(model, window=WINDOW)(ids).logits
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-4)
    assert (masked - model(ids)).abs().max() > 0.1


EVERYTHING = torch.ones(8, dtype=torch.bool)  # the pairs of a head of 16
EDITS = {
    "mask": partial(probe.mask_far, window=WINDOW),
    "cap at head": partial(probe.cap_at_head, window=WINDOW, tops=torch.zeros(3, 4)),
    "cap at query": partial(probe.cap_at_query, window=WINDOW),
    "cap at mean": partial(probe.cap_at_mean, window=WINDOW),
    "drop": partial(probe.drop_highest, window=WINDOW),
    "keep": partial(probe.keep_highest, window=WINDOW),
    "hold": partial(probe.hold_far, window=WINDOW, at=9, pairs=EVERYTHING),
}


@pytest.mark.parametrize("name", EDITS)
@torch.no_grad()
def test_an_edit_changes_far_keys_alone(name):
    """Texts without far keys are read as they are; longer ones are not."""
    model = make()
    ids = random_ids(2, T)
    own = model(ids)
    with probe.hooked(model, edit=EDITS[name]):
        edited = model(ids)
    torch.testing.assert_close(edited[:, :WINDOW], own[:, :WINDOW], rtol=0, atol=1e-4)
    assert (edited[:, WINDOW:] - own[:, WINDOW:]).abs().max() > 0.01
    with probe.hooked(model, edit=EDITS[name], layers=[]):
        assert torch.equal(model(ids), own)


def scores_of(logits, window_of_queries=range(2, 4)):
    """Scores of one head without queries and keys, for edits that need none."""
    queries = torch.tensor(window_of_queries)
    distance = queries[:, None] - torch.arange(4)
    logits = torch.tensor(logits)[None, None].masked_fill(distance < 0, -torch.inf)
    empty = torch.zeros(0)
    return probe.Scores(0, logits, distance, empty, empty, empty, empty)


def test_each_edit_by_hand():
    """Queries at 2 and 3, a window of 2: keys 0, and 0 and 1, are far."""
    inf = float("inf")
    scores = scores_of([[5.0, 1.0, 2.0, 0.0], [1.0, 5.0, 4.0, 0.0]])
    expected = {
        probe.mask_far: [[-inf, 1, 2, -inf], [-inf, -inf, 4, 0]],
        probe.cap_at_query: [[2, 1, 2, -inf], [1, 4, 4, 0]],
        probe.cap_at_mean: [[1.5, 1, 2, -inf], [1, 2, 4, 0]],
        probe.drop_highest: [[-inf, 1, 2, -inf], [1, -inf, 4, 0]],
        probe.keep_highest: [[5, 1, 2, -inf], [-inf, 5, 4, 0]],
    }
    for edit, logits in expected.items():
        assert edit(scores, window=2)[0, 0].tolist() == logits, edit
    masked = probe.except_first(scores, partial(probe.mask_far, window=2))
    assert masked[0, 0].tolist() == [[5, 1, 2, -inf], [1, -inf, 4, 0]]
    capped = probe.cap_at_head(scores, window=2, tops=torch.tensor([[3.0]]))
    assert capped[0, 0].tolist() == [[3, 1, 2, -inf], [1, 3, 4, 0]]


@torch.no_grad()
def test_held_keys_score_as_bounds_says_at_that_distance():
    """All pairs held: a(9) of eq. (3). Some held: the others score at the true distance."""
    model = make(n_kv_head=2)
    ids = random_ids(1, T)
    q, k = probe.queries_keys(model, ids)  # the first layer's do not depend on the edit
    query = 30
    key = 4
    h = (q[0, :, 0, query] * k[0, :, 0, key].conj()).numpy()  # (H, D/2)
    slow = np.arange(8) >= 3
    theta = model.config.rope_theta
    parts = {}
    for at in (9, query - key):
        for name, chosen in (("slow", slow), ("fast", ~slow)):
            parts[name, at] = bounds.attention_score(h * chosen, at, 16, theta) / 4

    held = []

    def edit(scores, pairs, keys):
        logits = probe.hold_far(scores, WINDOW, 9, pairs, keys)
        if scores.layer == 0:
            held.append(logits[0, :, query, key].numpy())
        return logits

    # All far tokens, then the first `key` tokens, which this one is not among, and one more
    for pairs in (EVERYTHING, torch.tensor(slow)):
        for keys in (None, key, key + 1):
            with probe.hooked(model, edit=partial(edit, pairs=pairs, keys=keys)):
                model(ids)
    own = parts["slow", query - key] + parts["fast", query - key]
    all_held = parts["slow", 9] + parts["fast", 9]
    slow_held = parts["slow", 9] + parts["fast", query - key]
    expected = [all_held, own, all_held, slow_held, own, slow_held]
    np.testing.assert_allclose(held, expected, atol=1e-4)


# ---- the loss ------------------------------------------------------------------------------------


def test_losses_within_windows_read_no_further():
    """Each token's loss is that of a plain forward pass over its window."""
    model = make()
    ids = random_ids(2, 44)
    found = probe.nll_within_windows(model, ids, 16, [5])
    np.testing.assert_allclose(found[:15], probe.nll_by_position(model, ids[:, :16]), rtol=1e-5)
    assert len(found) == 43
    for position in (16, 23, 24, 43):
        # Windows begin at 8, 16, 24, ...: the last that has 8 tokens before this one
        start = position // 8 * 8 - 8
        part = ids[:, start : position + 1].clone()
        part[:, 0] = 5
        expected = model.nll(part[:, :-1], part[:, 1:])[:, -1].mean()
        assert found[position - 1] == pytest.approx(expected.item(), rel=1e-4)


def test_losses_under_an_edit():
    model = make()
    ids = random_ids(3, T)
    edit = partial(probe.mask_far, window=WINDOW)
    plain = probe.nll_by_position(model, ids)
    np.testing.assert_allclose(plain, model.nll(ids[:, :-1], ids[:, 1:]).mean(0), rtol=1e-5)
    edited = probe.nll_by_position(model, ids, edit)
    np.testing.assert_allclose(edited[:WINDOW], plain[:WINDOW], rtol=1e-4)
    assert np.abs(edited - plain).max() > 0.01
    # Queries before the window have no far keys
    faster = probe.nll_by_position(model, ids, edit, first=WINDOW)
    np.testing.assert_allclose(faster, edited, rtol=1e-4)
    late = probe.nll_by_position(model, ids, edit, first=30)
    np.testing.assert_allclose(late[:30], plain[:30], rtol=1e-4)
    assert np.abs(late - edited).max() > 0.01
    one_layer = probe.nll_by_position(model, ids, edit, layers=[2])
    assert np.abs(one_layer - edited).max() > 0.001


# ---- what the weights and scores are -------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2**23, 1000])
@torch.no_grad()
def test_drift_and_largest_logits(at_once, monkeypatch):
    """Against the whole matrices of weights and of a(s) / sqrt(D)."""
    monkeypatch.setattr(probe, "SCORES_AT_ONCE", at_once)
    model = make()
    ids = random_ids(1, T)
    weights = torch.cat(in_transformers(model)(ids, output_attentions=True).attentions)
    distance = np.arange(T)[:, None] - np.arange(T)
    q, k = probe.queries_keys(model, ids)
    h = (q[:, :, 0, :, None] * k[:, :, 0, None].conj()).numpy()  # (layers, H, T, T, D/2)
    logits = (h * np.exp(1j * distance[..., None] * bounds.frequencies(16, 1e4))).sum(-1).real / 4

    drift = probe.attention_drift(model, ids, WINDOW)
    late = slice(3 * T // 4, None)
    far = distance[late] >= WINDOW
    near = (distance[late] >= 0) & ~far
    far_weight = (weights[:, :, late] * torch.tensor(far)).sum(-1).mean((1, 2))
    np.testing.assert_allclose(drift.far_weight, far_weight, rtol=1e-4)
    entropy = torch.special.entr(weights[:, :, late]).sum(-1).mean((1, 2))
    np.testing.assert_allclose(drift.entropy, entropy, rtol=1e-4)
    highest = [np.where(part, logits[:, :, late], -np.inf).max(-1) for part in (far, near)]
    np.testing.assert_allclose(drift.far_highest, (highest[0] > highest[1]).mean((1, 2)))
    means = [np.where(part, logits[:, :, late], 0).sum(-1) / part.sum(-1) for part in (far, near)]
    np.testing.assert_allclose(
        drift.far_minus_near, (means[0] - means[1]).mean((1, 2)), rtol=1e-3, atol=1e-4
    )
    first_weight = weights[:, :, late, 0].mean((1, 2))
    np.testing.assert_allclose(drift.first_weight, first_weight, rtol=1e-4)

    largest = probe.largest_logits(model, ids, WINDOW)
    near = (distance >= 0) & (distance < WINDOW)
    late_near = near & (distance >= WINDOW // 2)
    expected = (
        np.where(near, np.abs(logits), 0).max((2, 3)),
        np.where(distance >= WINDOW, np.abs(logits), 0).max((2, 3)),
        np.where(near, logits, -np.inf).max((2, 3)),
        np.where(late_near, logits, -np.inf).max((2, 3)),
    )
    for found, values in zip(largest, expected):
        np.testing.assert_allclose(found, values, rtol=1e-3, atol=1e-4)
    late_queries = probe.largest_logits(model, ids, WINDOW, first=30)
    beyond = np.where(distance >= WINDOW, np.abs(logits), 0)[:, :, 30:].max((2, 3))
    np.testing.assert_allclose(late_queries.outside, beyond, rtol=1e-3, atol=1e-4)
