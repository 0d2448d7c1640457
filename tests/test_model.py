"""model.py: transformers' logits, one truth with and without a KV cache, a loss in chunks that equals a loss in one."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from model import PRESETS, KVCache, LLaMA, LLaMAConfig, sample, shares_key_heads
from rope import interleaved_to_half, rope_frequencies
from small_models import METHODS, SHAPES, WINDOW, Recorder, make, make_config, random_ids, randomize

def transformers_and_ours(**changes):
    """A random LlamaForCausalLM made from a LlamaConfig of its own, and ours with its weights."""
    config = make_config(**changes)
    method, scale, theta = config.rope, config.scale, config.rope_theta
    parameters = {"rope_type": method, "rope_theta": theta, "factor": scale}
    if method == "none":
        parameters = {"rope_type": "default", "rope_theta": theta}
    elif method == "ntk":
        parameters = {"rope_type": "default", "rope_theta": theta * scale ** (config.head_dim / (config.head_dim - 2))}
    elif method in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = WINDOW
        if method == "llama3":
            parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=WINDOW if method in ("none", "linear", "dynamic") else int(WINDOW * scale),
        rope_parameters=parameters, attn_implementation="eager", bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    randomize(theirs)
    ours = LLaMA(config).eval()
    ours.load_state_dict({name.removeprefix("model."): weight for name, weight in theirs.state_dict().items()})
    return theirs, ours


# Beside transformers


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape):
    theirs, ours = transformers_and_ours(**SHAPES[shape])
    ids = random_ids(2, WINDOW)
    expected, logits = theirs(ids).logits, ours(ids)
    assert logits.shape == (2, WINDOW, 97) and 0.5 < expected.std() < 3  # else 1e-4 would mean little
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    for layer in ours.layers:  # Meta's row order read as if it were ours: what a missing permutation does
        for proj, heads in ((layer.self_attn.q_proj, 4), (layer.self_attn.k_proj, ours.config.n_kv_head)):
            proj.weight.copy_(interleaved_to_half(proj.weight, heads))
    assert (ours(ids) - expected).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("shape", ["mha", "gqa"])
@pytest.mark.parametrize("method", METHODS)
def test_logits_equal_transformers_beyond_the_original_window(method, shape):
    theirs, ours = transformers_and_ours(**METHODS[method], **SHAPES[shape])
    ids = random_ids(2, 100)  # new transformers modules each time: their "dynamic" remembers earlier lengths
    expected, logits = theirs(ids).logits, ours(ids)
    assert 0.5 < expected.std() < 3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    if method != "none":  # a scale that is lost, or another one, shows
        for wrong in (dict(rope="none", scale=1.0), dict(scale=3.5)):
            vars(ours.config).update(wrong)
            assert (ours(ids) - expected).abs().max() > 0.02
            vars(ours.config).update(METHODS[method])


@pytest.mark.parametrize("method", ["none", "linear", "ntk", "yarn"])
def test_greedy_generation_equals_transformers(method):
    theirs, ours = transformers_and_ours(**METHODS[method], n_kv_head=2)
    ids = random_ids(3, 20)
    expected = theirs.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids, 40), expected)


# Given positions

SKIPPED = torch.tensor([[0, 1, 2, 3, 40, 41, 42, 43, 44, 45], [0, 1, 2, 3, 4, 5, 6, 7, 95, 96]])


@torch.no_grad()
@pytest.mark.parametrize("shape", ["mha", "gqa"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "dynamic"])
def test_logits_at_given_positions_equal_transformers(method, shape):
    theirs, ours = transformers_and_ours(**METHODS[method], **SHAPES[shape])
    ids = random_ids(*SKIPPED.shape)
    # Without a mask of ones, transformers takes a gap for the beginning of another sequence
    ones = torch.ones_like(ids)
    expected = theirs(ids, position_ids=SKIPPED, attention_mask=ones).logits
    logits = ours(ids, positions=SKIPPED)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert (logits[:, 8:] - ours(ids)[:, 8:]).abs().max() > 0.02
    plain = torch.arange(10).expand(2, 10)
    assert torch.equal(ours(ids, positions=plain), ours(ids))


@torch.no_grad()
@pytest.mark.parametrize("shape", ["mha", "gqa"])
def test_logits_at_given_positions_equal_a_full_pass_with_the_rest_masked(monkeypatch, shape):
    model = make(**METHODS["linear"], **SHAPES[shape])
    full = random_ids(2, 97)
    ids = full.gather(1, SKIPPED)
    logits = model(ids, positions=SKIPPED)

    kept = torch.zeros(2, 97, dtype=torch.bool).scatter(1, SKIPPED, True)

    def masked(q, k, v, **options):
        """Attention by its definition, to earlier tokens that are in the row."""
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
        visible = torch.ones(97, 97, dtype=torch.bool).tril() & kept[:, None, None, :]
        return scores.masked_fill(~visible, -1e9).softmax(-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    rows = torch.arange(2)[:, None]
    torch.testing.assert_close(logits, model(full)[rows, SKIPPED], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["full", "selective", "compiled"])
def test_gradients_at_given_positions_however_blocks_are_run(mode):
    model, ids = make(**METHODS["yarn"]), random_ids(*SKIPPED.shape)
    gradients = []
    for changed in (False, True):
        if changed and mode == "compiled":
            for block in model.layers:
                block.compile(backend="eager")
        elif changed:
            model.checkpoint_activations = mode
        model.zero_grad()
        model(ids, ids, positions=SKIPPED).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    torch._dynamo.reset()


# GQA where no fast kernel lets heads share keys


@pytest.mark.parametrize("device, dtype, major, masked, shared", [
    ("cpu", torch.float32, 0, False, True), ("cuda", torch.float32, 9, False, False),
    ("cuda", torch.bfloat16, 8, False, True), ("cuda", torch.bfloat16, 9, True, False),
    ("cuda", torch.float16, 7, False, False), ("cuda", torch.float16, 9, False, True),
])  # fmt: skip
def test_key_heads_are_repeated_where_flash_attention_can_not_run(monkeypatch, device, dtype, major, masked, shared):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    q = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert shares_key_heads(q, object() if masked else None) == shared


@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa"])
def test_repeated_key_heads_change_nothing(monkeypatch, shape):
    ids, given, results = random_ids(2, 24), [], []
    real = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        given.append((k.size(1), options["enable_gqa"]))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for shared in (True, False):
        monkeypatch.setattr("model.shares_key_heads", lambda q, mask: shared)
        model = make(**SHAPES[shape])
        model(ids, ids).backward()
        cache = KVCache(model.config, 2, 24, ids.device, torch.float32)
        pieces = [model(piece, cache=cache).detach() for piece in ids.split([10, 13, 1], dim=1)]
        results.append([*pieces, *(p.grad for p in model.parameters())])
        heads = 4 if shape == "mha" or not shared else model.config.n_kv_head
        assert set(given) == {(heads, heads < 4)}
        given.clear()
    for shared, repeated in zip(*results):
        torch.testing.assert_close(repeated, shared, rtol=1e-4, atol=1e-5)


# The KV cache

PIECES = [
    [60] + [1] * 12,  # prefill, then decode
    [1] * 72,  # decode from nothing
    [7, 30, 2, 33],  # prefill by pieces: 1 < T < S
    [40, 1, 1, 17, 1, 12],  # and both
]


@torch.no_grad()
@pytest.mark.parametrize("method", ["none", "linear", "dynamic", "yarn"])
@pytest.mark.parametrize("shape", ["mha", "gqa"])
@pytest.mark.parametrize("pieces", PIECES, ids=["decode", "single", "chunked", "mixed"])
def test_the_cache_gives_the_logits_of_a_full_forward(pieces, shape, method):
    model = make(**SHAPES[shape], **METHODS[method])
    ids = random_ids(3, sum(pieces))
    full = model(ids)
    cache = KVCache(model.config, 3, sum(pieces), ids.device, torch.float32)
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert cache.length == 72
    torch.testing.assert_close(logits, full, rtol=0, atol=1e-4)  # float32 sums in another order, by three layers
    assert torch.equal(logits.argmax(-1), full.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_no_token_sees_a_later_one(n_kv_head):
    model, ids = make(n_kv_head=n_kv_head), random_ids(2, 24)
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 97
    cached = [KVCache(model.config, 2, 24, ids.device, torch.float32) for _ in range(2)]
    runs = [(model(ids), model(changed))]
    runs.append([
        torch.cat([model(piece, cache=cache) for piece in x.split([10, 14], dim=1)], dim=1)
        for x, cache in zip((ids, changed), cached)
    ])  # fmt: skip
    for before, after in runs:
        assert torch.equal(before[:, :15], after[:, :15])
        assert (before[:, 15:] - after[:, 15:]).abs().amax((0, 2)).min() > 1e-3  # and each from there on sees it


@torch.no_grad()
def test_dynamic_fixes_its_length_for_a_call():
    """With a cache, by the length that the cache was made for: keys that are already turned stay comparable."""
    model, ids = make(**METHODS["dynamic"]), random_ids(1, 64)
    long = KVCache(model.config, 1, 128, ids.device, torch.float32)
    first = model(ids, cache=long)
    assert (first - model(ids)).abs().max() > 0.01  # by 128, not by 64
    frequencies = model.config.rope_frequencies(128)[0]
    model.config.rope_frequencies = lambda length, device: (frequencies, 1.0)
    torch.testing.assert_close(first, model(ids), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["mha", "gqa"])
@pytest.mark.parametrize("pieces", PIECES, ids=["decode", "single", "chunked", "mixed"])
def test_the_logits_of_the_next_token_are_the_last_of_all(pieces, shape):
    model = make(**SHAPES[shape], **METHODS["linear"])
    ids = random_ids(3, sum(pieces))
    caches = [KVCache(model.config, 3, len(ids[0]), ids.device, torch.float32) for _ in range(2)]
    for piece in ids.split(pieces, dim=1):
        logits = model.next_token_logits(piece, caches[0])
        all_logits = model(piece, cache=caches[1])
        assert logits.shape == (3, 97)
        torch.testing.assert_close(logits, all_logits[:, -1], rtol=0, atol=2e-5)  # attention sums in another order
    assert torch.equal(caches[0].k, caches[1].k) and torch.equal(caches[0].v, caches[1].v)
    assert caches[0].length == caches[1].length == len(ids[0])


def test_a_full_cache_says_so():
    model, ids = make(), random_ids(1, 10)
    cache = KVCache(model.config, 1, 12, ids.device, torch.float32)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="cache holds 12 tokens, 20"):
        model(ids, cache=cache)


# generate and sample


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_for_decoding_changes_strides_and_nothing_else(shape):
    model, usual, ids = make(**SHAPES[shape]), make(**SHAPES[shape]), random_ids(2, 20)
    assert model.lay_out_for_decoding() is model and model.lay_out_for_decoding() is model  # twice does no harm
    for (name, weight), (other, expected) in zip(model.named_parameters(), usual.named_parameters()):
        assert name == other and torch.equal(weight, expected)
        by_columns = weight.dim() == 2 and not name.startswith("embed_tokens")
        assert weight.stride() == (expected.T.contiguous().T.stride() if by_columns else expected.stride())
    assert (model.lm_head.weight is model.embed_tokens.weight) == (shape == "tied")
    torch.testing.assert_close(model(ids), usual(ids), rtol=0, atol=1e-5)
    assert torch.equal(model.generate(ids, 20), usual.generate(ids, 20))


@pytest.mark.parametrize("method", ["none", "linear"])
def test_generate_equals_greedy_without_a_cache(method):
    model, ids = make(n_kv_head=2, **METHODS[method]), random_ids(3, 20)
    expected = ids
    for _ in range(40):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, 40), expected)


def test_generate_with_dynamic_uses_prompt_plus_new_tokens():
    model, ids = make(**METHODS["dynamic"]), random_ids(2, 50)
    out = model.generate(ids, 30)
    # position by position, a full forward padded to the whole length (causal: what follows changes nothing)
    for end in range(50, 80):
        padded = F.pad(out[:, :end], (0, 80 - end))
        assert torch.equal(model(padded)[:, end - 1].argmax(-1), out[:, end])


def test_eos_ends_a_sequence_and_the_others_go_on():
    model, ids = make(), random_ids(4, 12)
    free = model.generate(ids, 30)[:, 12:]
    eos = free[1, 4].item()
    ends = [row.index(eos) if eos in row else None for row in free.tolist()]
    assert ends[1] is not None and ends[1] <= 4 and None in ends  # one ends early, another never does
    out = model.generate(ids, 30, eos_id=eos)[:, 12:]
    assert out.shape == free.shape
    for row, free_row, end in zip(out, free, ends):
        kept = 30 if end is None else end + 1  # the EOS itself included
        assert torch.equal(row[:kept], free_row[:kept]) and (row[kept:] == eos).all()


def test_any_of_several_eos_tokens_ends_a_sequence():
    model, ids = make(), random_ids(2, 12)
    free = model.generate(ids, 30)[:, 12:]
    stops = tuple(row[5].item() for row in free)
    assert stops[0] not in free[1] and stops[1] not in free[0]  # each row ends by its own
    ends = [row.tolist().index(stop) for row, stop in zip(free, stops)]
    out = model.generate(ids, 30, eos_id=stops)[:, 12:]
    assert out.size(1) == max(ends) + 1
    for row, free_row, end in zip(out, free, ends):
        assert torch.equal(row[: end + 1], free_row[: end + 1]) and (row[end + 1 :] == stops[0]).all()


def test_generation_stops_when_every_sequence_has_met_eos():
    model = make()
    ids = random_ids(1, 12).expand(3, -1)
    free = model.generate(ids, 30)[0, 12:].tolist()
    eos = free[6]
    out = model.generate(ids, 30, eos_id=eos)
    assert out.shape == (3, 12 + free.index(eos) + 1)
    assert torch.equal(model.generate(ids, 0), ids)


def test_sampling_is_reproducible_and_a_tiny_top_p_is_greedy():
    model, ids = make(), random_ids(3, 12)

    def draw(seed, **options):
        return model.generate(ids, 25, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(5, temperature=1.0, top_p=0.9), draw(5, temperature=1.0, top_p=0.9))
    assert not torch.equal(draw(5, temperature=1.0, top_p=0.9), draw(6, temperature=1.0, top_p=0.9))
    greedy = model.generate(ids, 25)
    assert torch.equal(draw(5, temperature=1.0, top_p=1e-6), greedy)
    assert torch.equal(draw(5, temperature=1e-4), greedy)


PROBS = torch.tensor([0.05, 0.5, 0.15, 0.3])  # by size: tokens 1, 3, 2, 0


@pytest.mark.parametrize("top_p, kept", [(1.0, [0, 1, 2, 3]), (0.94, [1, 2, 3]), (0.81, [1, 2, 3]), (0.79, [1, 3]),
                                         (0.51, [1, 3]), (0.49, [1]), (0.0, [1])])  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sample_draws_from_the_truncated_distribution(top_p, kept, temperature):
    n = 20000
    expected = PROBS ** (1 / temperature)
    expected /= expected.sum()
    if temperature != 1:  # the set is cut after the temperature: by the definition, in plain Python
        kept, mass = [], 0.0
        for token in (1, 3, 2, 0):
            if not kept or mass < top_p:
                kept.append(token)
            mass += expected[token].item()
    expected = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(expected.tolist())])
    expected /= expected.sum()
    logits = (PROBS.log() + 3).expand(n, 4)  # a constant changes nothing
    tokens = sample(logits, temperature, top_p, torch.Generator().manual_seed(0))
    assert tokens.shape == (n,) and set(tokens.tolist()) == set(kept)
    # 5 standard deviations of a frequency over 20,000 draws: at most 0.018
    assert (tokens.bincount(minlength=4) / n - expected).abs().max() < 5 * math.sqrt(0.25 / n)


def test_rounding_does_not_change_what_is_drawn():
    """Two tokens as likely as each other but for rounding, as another batch size makes it."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    rounded = logits.clone()
    rounded[:, 50:] += 1e-5  # of each equal pair the second token becomes the likelier one
    for top_p in (1.0, 0.9):
        draws = []
        for row in (logits, rounded):
            generator = torch.Generator().manual_seed(2)
            draws.append([sample(row, 1.0, top_p, generator).item() for _ in range(100)])
        assert draws[0] == draws[1]


def test_sample_greedy_and_row_by_row():
    assert sample(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), 0, 1.0).tolist() == [1, 0]
    rows = torch.full((2, 50), -1e4)
    rows[0, 7], rows[1, 31] = 0, 0  # each row has its own likely token
    assert sample(rows, 1.0, 0.9, torch.Generator().manual_seed(0)).tolist() == [7, 31]


# Activation checkpointing


def train_step(model, ids):
    """Loss, gradients, bytes held between forward and backward, and how often attention was computed."""
    model.zero_grad()
    with Recorder() as recorder:
        loss = model(ids, ids)
        held = recorder.bytes_held()
        loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()], held, recorder.attentions()


@pytest.mark.parametrize("shape", ["mha", "gqa"])
def test_activation_checkpointing_changes_memory_and_nothing_else(shape):
    model, ids = make(**SHAPES[shape]), random_ids(2, 64)
    runs = {}
    for kind in ("none", "full", "selective"):
        model.checkpoint_activations = kind
        runs[kind] = train_step(model, ids)
    for kind in ("full", "selective"):
        assert torch.equal(runs[kind][0], runs["none"][0])
        assert all(map(torch.equal, runs[kind][1], runs["none"][1]))  # bit for bit: the same operators, in order
    held = {kind: run[2] for kind, run in runs.items()}
    assert held["full"] < held["selective"] < held["none"]
    assert held["full"] < held["none"] / 3
    attentions = {kind: run[3] for kind, run in runs.items()}
    assert attentions == {"none": 3, "full": 6, "selective": 3}  # of 3 layers: "full" makes each again


# Initial weights, presets, config


def test_blocks_start_as_the_identity():
    torch.manual_seed(0)
    for tied in (False, True):
        model, ids = LLaMA(make_config(tie_embeddings=tied)), random_ids(2, 16)
        assert torch.equal(model.hidden(ids), model.norm(model.embed_tokens(ids)))
        # so an untied head, at zero, guesses uniformly, and a tied one nearly so
        assert model(ids, ids.roll(-1, 1)).item() == pytest.approx(math.log(97), abs=0.3 if tied else 1e-5)
        model(ids, ids.roll(-1, 1)).backward()
        moving = [name for name, p in model.named_parameters() if p.grad.abs().max() > 0]
        assert "lm_head.weight" in moving or tied and "layers.0.mlp.down_proj.weight" in moving  # it can leave zero


def test_initial_weights_come_from_torchs_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in LLaMA(make_config()).parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


PUBLISHED = {  # parameters, in billions: the papers' of LLaMA, Llama 2 and 3, and the model cards of SmolLM2 and TinyLlama
    "llama-7b": 6.74, "llama-13b": 13.0, "llama-33b": 32.5, "llama-65b": 65.2, "llama2-7b": 6.74, "llama2-13b": 13.0,
    "llama2-70b": 69.0, "llama3-8b": 8.03, "llama3-70b": 70.6, "smollm2-135m": 0.1345,
    "tinyllama-1.1b": 1.10,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_published_size(name):
    config = LLaMAConfig.preset(name)
    with torch.device("meta"):
        model = LLaMA(config)
    assert config.n_params == sum(p.numel() for p in model.parameters())
    if name in PUBLISHED:
        assert config.n_params == pytest.approx(1e9 * PUBLISHED[name], rel=0.005)  # they give three digits
    assert config.head_dim * config.n_head == config.n_embd and config.original_window == config.block_size


def test_every_published_preset_is_there_and_can_be_changed():
    assert set(PUBLISHED) == set(PRESETS) - {"tiny"}
    config = LLaMAConfig.preset("llama-7b", rope="linear", scale=16, block_size=32768)
    assert (config.scale, config.block_size, config.original_window) == (16, 32768, 2048)
    assert LLaMAConfig.preset("llama-7b").scale == 1  # the preset itself is untouched
    config = LLaMAConfig.preset("tiny", n_head=8)
    assert (config.n_kv_head, config.head_dim) == (8, 16)  # what is derived follows


BAD = [
    *((dict([(name, 0)]), name) for name in ("vocab_size", "n_layer", "n_embd", "intermediate_size", "block_size")),
    (dict(n_head=0), "n_head"),
    (dict(n_head=-4), "n_head"),
    (dict(n_kv_head=-1), "n_kv_head"),
    (dict(n_kv_head=3), "n_kv_head 3"),  # does not divide 4 heads
    (dict(n_kv_head=8), "n_kv_head 8"),
    (dict(n_embd=66), "n_embd 66.*head_dim"),
    (dict(head_dim=15), "head_dim.*15"),
    (dict(head_dim=-2), "head_dim"),
    (dict(n_embd=60), "head_dim.*15"),  # 4 heads of 15: odd
    (dict(rope="alibi"), "alibi"),
    (dict(rope="linear", scale=0.5), "scale"),
    (dict(scale=math.nan), "scale"),
    (dict(rope_theta=0.0), "rope_theta"),
    (dict(original_window=-1), "original_window"),
    (dict(norm_eps=0.0), "norm_eps"),
    (dict(norm_eps=math.nan), "norm_eps"),
    (dict(rope="yarn", rope_extra=dict(beta_fast=-1.0)), "beta_fast"),
]


@pytest.mark.parametrize("changes, named", BAD)
def test_bad_config_values_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        make_config(**changes)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="llama-8b.*llama-7b"):
        LLaMAConfig.preset("llama-8b")


# Angles


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_angles_of_a_bfloat16_model_are_float32s(dtype, method):
    """What attention is given for the 32,768th token of a cache, beside float64."""
    last = 32767
    config = make_config(n_layer=1, n_head=1, n_embd=64, block_size=2048, **METHODS[method])
    model = randomize(LLaMA(config)).to(dtype)
    cache = KVCache(config, 1, last + 1, torch.device("cpu"), dtype)
    cache.k.zero_(), cache.v.zero_()
    cache.length = last
    seen = []
    model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: seen.extend(args[1:3]))
    model(torch.tensor([[5]]), cache=cache)
    cos, sin = seen
    inv_freq, factor = config.rope_frequencies(last + 1)  # right to 1e-6: tests/test_rope.py
    angle = last * inv_freq.double()
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 32)
    # float32 products below 32,768 are off by up to 2^-10
    torch.testing.assert_close(cos[0].double() / factor, angle.cos(), rtol=0, atol=1e-3)
    torch.testing.assert_close(sin[0].double() / factor, angle.sin(), rtol=0, atol=1e-3)
    rounded = last * inv_freq.to(torch.bfloat16).double()
    assert (rounded.cos() - angle.cos()).abs().max() > 0.1  # as a buffer gone through `.to(bfloat16)` would be


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_built_without_memory_has_the_right_angles(tied, method):
    usual = make(tie_embeddings=tied, **METHODS[method])
    with torch.device("meta"):
        built = LLaMA(make_config(tie_embeddings=tied, **METHODS[method]))
    assert all(p.is_meta for p in built.parameters())
    built.to_empty(device="cpu")
    built.load_state_dict(usual.state_dict())
    ids = random_ids(2, 100)
    assert torch.equal(built(ids), usual(ids))
    assert not list(built.buffers()) and not [name for name in built.state_dict() if "rope" in name or "freq" in name]


def test_frequencies_are_computed_once_and_a_changed_config_is_seen():
    rope_frequencies.cache_clear()
    model, ids = make(**METHODS["linear"]), random_ids(1, 40)
    first = model.generate(ids, 3)  # under inference_mode: what is kept must serve training too
    made = rope_frequencies.cache_info().misses
    model.checkpoint_activations = "full"
    model(ids, ids).backward()
    assert torch.equal(model.generate(ids, 3), first) and rope_frequencies.cache_info().misses == made
    scaled = model(ids)
    model.config.scale = 2.0
    assert (model(ids) - scaled).abs().max() > 0.02


def test_compiled_blocks_of_several_lengths_have_no_graph_break():
    """is_causal must be a plain bool: scaled_dot_product_attention takes no symbolic one."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = make(n_layer=1)
    for block in model.layers:
        block.compile(backend="eager")
    for length in (16, 24, 40):
        ids = random_ids(2, length)
        model(ids, ids).backward()
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] <= 2  # one for the first length, one for all others
    torch._dynamo.reset()
