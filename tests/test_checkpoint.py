"""checkpoint.py: what transformers writes is read, what is written opens there, and bad input is one line."""

import json
import pickle
import resource
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (
    OUR_KEY, Parser, add_model_flags, extend, hf_config, load, load_from_flags, parse_config, read_config, save,
)  # fmt: skip
from model import LLaMA, LLaMAConfig

WINDOW = 64  # the original one; the tests read up to 200 tokens
SMALL = dict(vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=WINDOW, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)  # fmt: skip
SHAPES = {
    "mha": dict(num_key_value_heads=4),
    "gqa": dict(num_key_value_heads=2),
    "tied": dict(num_key_value_heads=1, tie_word_embeddings=True, head_dim=32),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": WINDOW,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
ROPES = {
    "none": (None, {}),
    "linear": ({"rope_type": "linear", "factor": 4.0}, {}),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, {}),
    "yarn": (YARN, dict(max_position_embeddings=4 * WINDOW)),
    "yarn tuned": (YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
                   dict(max_position_embeddings=4 * WINDOW)),
    "llama3": (LLAMA3, dict(max_position_embeddings=4 * WINDOW)),
}  # fmt: skip
IDS = torch.randint(3, 97, (2, 200), generator=torch.Generator().manual_seed(1))


def theirs(folder: Path, rope: str = "none", shape: str = "gqa", theta: float = 10000.0, **save_options):
    """A random LLaMA that transformers wrote into folder, its weights large enough for logits of order 1."""
    scaling, more = ROPES[rope]
    parameters = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
    config = transformers.LlamaConfig(**SMALL | SHAPES[shape] | more, rope_parameters=parameters)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.2) + (1.0 if p.dim() == 1 else 0.0))
    model.save_pretrained(folder, **save_options)
    return model


def opened_there(folder: Path):
    """transformers' model in a folder, in float32; its rope state is fresh."""
    model, info = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def assert_same(ours: LLaMA, folder: Path, ids: torch.Tensor = IDS) -> None:
    mine, other = ours(ids), opened_there(folder)(ids).logits
    assert other.std() > 0.3
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def raises(path: str | Path, *words: str, **options) -> str:
    """load refuses with one line that has these words."""
    with pytest.raises(ValueError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def edit_config(folder: Path, drop: tuple[str, ...] = (), **changes) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in drop}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs(tmp_path / "theirs")
    return tmp_path / "theirs"


# ---- theirs in, ours out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rope", ROPES)
def test_logits_equal_transformers_and_back(tmp_path: Path, shape: str, rope: str) -> None:
    theirs(tmp_path / "a", rope, shape)
    model = load(tmp_path / "a")
    assert model.config.rope == rope.split()[0] and model.config.original_window == WINDOW
    assert model.config.block_size == (WINDOW if rope == "none" else 4 * WINDOW)
    assert_same(model, tmp_path / "a")
    save(model, tmp_path / "b")
    assert_same(model, tmp_path / "b")
    assert load(tmp_path / "b").config == model.config
    # without the key of our own, what others read says the same (but for the window of a plain LLaMA)
    edit_config(tmp_path / "b", drop=(OUR_KEY,))
    assert read_config(tmp_path / "b") == model.config


def test_positions_past_the_window_tell_the_scale_apart(tmp_path: Path) -> None:
    """The tolerance above would not let a lost factor pass."""
    theirs(tmp_path, "linear")
    wrong = load(tmp_path)
    wrong.config.scale = 1.0
    with torch.no_grad():
        assert (wrong(IDS) - load(tmp_path)(IDS)).abs().max() > 0.1


@pytest.mark.parametrize("rope", ["linear", "ntk", "dynamic", "yarn", "llama3", "none"])
def test_an_extension_opens_in_transformers_with_its_scale(tmp_path: Path, rope: str) -> None:
    theirs(tmp_path / "a", theta=5000.0)
    model = load(tmp_path / "a", scale=4, rope=rope)
    save(model, tmp_path / "b")
    assert_same(model, tmp_path / "b")
    again = load(tmp_path / "b")
    assert replace(again.config, rope_extra={}) == replace(model.config, rope_extra={})  # llama3's defaults are spelled out
    assert again.config.rope_frequencies(200)[0].tolist() == model.config.rope_frequencies(200)[0].tolist()
    assert again.config.block_size == 4 * WINDOW
    assert again.config.rope_theta == 5000.0  # ntk too: the changed theta is in rope_theta, the original in our key
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    assert raw["max_position_embeddings"] == (WINDOW if rope in ("linear", "dynamic") else 4 * WINDOW)
    if rope not in ("none", "ntk"):
        assert {"rope_type": rope, "type": rope, "factor": 4.0}.items() <= raw["rope_scaling"].items()
    if rope == "ntk":  # b' = b s^(D/(D-2))
        assert raw["rope_theta"] == pytest.approx(5000 * 4 ** (16 / 14))


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin"])
def test_other_forms_are_read(tmp_path: Path, form: str) -> None:
    model = theirs(tmp_path, "linear", max_shard_size="60KB" if form == "sharded" else "5GB")
    if form == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    else:
        state, files = model.state_dict(), ["pytorch_model.bin"]
        if form == "sharded bin":
            files = [f"pytorch_model-{i}-of-2.bin" for i in (1, 2)]
            weight_map = {name: files[i % 2] for i, name in enumerate(state)}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for i, file in enumerate(files):
            torch.save({n: t for j, (n, t) in enumerate(state.items()) if j % len(files) == i}, tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    loaded = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS), model(IDS).logits, rtol=0, atol=1e-4)
    save(loaded, tmp_path)  # over what it was read from, which is still mapped
    assert_same(loaded, tmp_path)
    assert {path.name for path in tmp_path.glob("*model*")} == {"model.safetensors"}


def test_shards_out_and_stale_ones_gone(tmp_path: Path) -> None:
    theirs(tmp_path / "a", shape="tied")
    model = load(tmp_path / "a")
    for limit, few in ((60e3, 4), (90e3, 2), (5e9, 1), (90e3, 2)):  # more, fewer, one, and several again
        save(model, tmp_path / "b", max_shard_size=limit)
        files = list((tmp_path / "b").glob("*.safetensors"))
        assert len(files) >= few and (few > 1 or len(files) == 1)
        assert (tmp_path / "b" / checkpoint.INDEX).exists() == (few > 1)
        assert all(sum(t.nbytes for t in load_file(f).values()) <= limit for f in files)
        assert_same(load(tmp_path / "b"), tmp_path / "b")


def test_dtypes(tmp_path: Path) -> None:
    theirs(tmp_path / "a")
    model = load(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load(tmp_path / "b")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert_same(load(tmp_path / "b", dtype=torch.float32), tmp_path / "b")
    save(load(tmp_path / "a"), tmp_path / "c", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load(tmp_path / "c").parameters()))


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    theirs(tmp_path / "a", shape="tied")
    model = load(tmp_path / "a", dtype=torch.bfloat16)
    assert model.lm_head.weight is model.embed_tokens.weight
    save(model, tmp_path / "b")
    assert "lm_head.weight" not in load_file(tmp_path / "b" / "model.safetensors")


def test_what_real_folders_carry_beside_the_weights(tmp_path: Path) -> None:
    theirs(tmp_path, shape="tied")
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    state["rope.freqs"] = torch.ones(16)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path)
    load(tmp_path)


# ---- what a config.json says ---------------------------------------------------------------------------------

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA1_7B = LLAMA2_7B | {"max_position_embeddings": 2048, "max_sequence_length": 2048, "rms_norm_eps": 1e-6}
LLAMA31_8B = LLAMA2_7B | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_key_value_heads": 8,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "vocab_size": 128256,
}  # fmt: skip


def linear(factor: float) -> dict:
    return {"rope_scaling": {"factor": factor, "type": "linear"}}


# name: (config.json, (original window, extended window, method, factor), whether something had to be assumed)
SHAPES_IN_THE_WILD = {
    "LLaMA 7B": (LLAMA1_7B, (2048, 2048, "none", 1), False),
    "Llama 2 7B": (LLAMA2_7B, (4096, 4096, "none", 1), False),
    "SmolLM2 135M": (
        LLAMA2_7B | {
            "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30,
            "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True, "vocab_size": 49152,
            "rope_interleaved": False, "rope_theta": 100000, "torch_dtype": "bfloat16",
        },
        (8192, 8192, "none", 1), False,
    ),
    "Vicuna v1.5 16k": (
        LLAMA2_7B | linear(4.0) | {"max_position_embeddings": 4096, "max_sequence_length": 16384},
        (4096, 16384, "linear", 4), False,
    ),
    "LongChat v1.5 32k": (
        LLAMA2_7B | linear(8.0) | {"max_position_embeddings": 4096, "max_sequence_length": 32768},
        (4096, 32768, "linear", 8), False,
    ),
    "LLaMA-2-7B-32K": (
        LLAMA2_7B | linear(8.0) | {"max_position_embeddings": 32768}, (4096, 32768, "linear", 8), True,
    ),
    "Chinese-Alpaca-2 16k": (
        LLAMA2_7B | linear(4.0) | {"max_position_embeddings": 16384}, (4096, 16384, "linear", 4), True,
    ),
    "LLongMA-2 8k": (LLAMA2_7B | linear(2.0) | {"max_position_embeddings": 8192}, (4096, 8192, "linear", 2), True),
    "LongLoRA 32k": (LLAMA2_7B | linear(8.0), (4096, 32768, "linear", 8), True),
    "NeMo-style, Llama 2 to 16k": (
        LLAMA2_7B | linear(4.0) | {"max_position_embeddings": 16384, "seq_length": 16384}, (4096, 16384, "linear", 4), True,
    ),
    "both windows said, the extended one first": (
        LLAMA2_7B | linear(4.0) | {"max_position_embeddings": 16384, "max_sequence_length": 16384},
        (4096, 16384, "linear", 4), False,
    ),
    "Yarn-Llama-2 64k": (
        LLAMA2_7B | {
            "max_position_embeddings": 65536, "rope_theta": 10000.0,
            "rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True},
        },
        (4096, 65536, "yarn", 16), False,
    ),
    "yarn switched on by hand, the window left as it was": (
        LLAMA2_7B | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 4096, "type": "yarn"}},
        (4096, 16384, "yarn", 4), False,
    ),
    "yarn without the original window": (
        LLAMA2_7B | {"rope_scaling": {"factor": 4.0, "type": "yarn"}}, (4096, 16384, "yarn", 4), True,
    ),
    "dynamic": (LLAMA2_7B | {"rope_scaling": {"factor": 2.0, "type": "dynamic"}}, (4096, 8192, "dynamic", 2), True),
    "Llama 3.1 8B": (LLAMA31_8B, (8192, 131072, "llama3", 8), False),
    "transformers 5": (
        {key: value for key, value in LLAMA31_8B.items() if key not in ("rope_scaling", "rope_theta")}
        | {"rope_parameters": LLAMA31_8B["rope_scaling"] | {"rope_theta": 500000.0}},
        (8192, 131072, "llama3", 8), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES_IN_THE_WILD)
def test_config_shapes_in_the_wild(name: str) -> None:
    raw, want, assumed = SHAPES_IN_THE_WILD[name]
    config, note = parse_config(raw)
    assert (config.original_window, config.block_size, config.rope, config.scale) == want
    assert bool(note) == assumed and "\n" not in note
    if assumed:
        assert "--original_window" in note and str(want[0]) in note
    # what we write says the same, without anything to assume, with or without our own key
    wrote = hf_config(config)
    assert parse_config(wrote) == (config, "")
    assert parse_config({key: value for key, value in wrote.items() if key != OUR_KEY}) == (config, "")
    assert config.rope_theta == (raw.get("rope_parameters") or raw).get("rope_theta", 10000)


def test_original_window_settles_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw = LLAMA2_7B | linear(2.0) | {"max_position_embeddings": 8192}
    for original in (2048, 4096, 8192):
        config, note = parse_config(raw, original_window=original)
        assert (config.original_window, config.block_size, note) == (original, 2 * original, "")
    config, note = parse_config(LLAMA2_7B | {"max_position_embeddings": 32768}, original_window=4096)
    assert (config.rope, config.scale, config.original_window, note) == ("none", 8, 4096, "")  # direct fine-tuning
    for bad in (0, -1, 65536):
        with pytest.raises(ValueError, match="original_window"):
            parse_config(LLAMA2_7B, original_window=bad)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    read_config(tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error and "extended" in error
    read_config(tmp_path, original_window=4096)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", [
    {"method": "yarn"}, {"scale": 8.0}, {"window": 512}, {"original_window": 128}, {"original_theta": 20000.0},
    {"scale": None}, {"method": "magic"}, {"scale": "x"},
])  # fmt: skip
def test_our_key_must_agree_with_the_others(tmp_path: Path, change: dict) -> None:
    theirs(tmp_path / "a")
    save(load(tmp_path / "a", scale=4), tmp_path / "b")
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    edit_config(tmp_path / "b", **{OUR_KEY: raw[OUR_KEY] | change})
    raises(tmp_path / "b")
    edit_config(tmp_path / "b", **{OUR_KEY: raw[OUR_KEY]}, rope_scaling=None)  # as a tool that drops the scale leaves it
    raises(tmp_path / "b", "contradicts itself", OUR_KEY)


def test_a_recorded_original_window_is_not_overruled(tmp_path: Path) -> None:
    theirs(tmp_path / "a")
    save(load(tmp_path / "a", scale=4), tmp_path / "b")
    assert read_config(tmp_path / "b", original_window=WINDOW).scale == 4
    raises(tmp_path / "b", "--original_window 32", "records 64", original_window=32)


# ---- every combination of --scale and --rope with what a checkpoint is already -----------------------------------

BASE = LLaMAConfig(block_size=64)
FINE_TUNED = LLaMAConfig(block_size=256, original_window=64, scale=4.0)  # directly: longer, positions left alone
LINEAR = LLaMAConfig(block_size=256, original_window=64, scale=4.0, rope="linear")
NTK = LLaMAConfig(block_size=256, original_window=64, scale=4.0, rope="ntk")
DYNAMIC = LLaMAConfig(block_size=256, original_window=64, scale=4.0, rope="dynamic")
YARN_4 = LLaMAConfig(block_size=256, original_window=64, scale=4.0, rope="yarn",
                     rope_extra={"beta_fast": 16.0, "attention_factor": 1.5})  # fmt: skip
LLAMA31 = LLaMAConfig(block_size=1024, original_window=64, scale=8.0, rope="llama3", rope_extra={"low_freq_factor": 2.0})
REFUSED = "refused"


@pytest.mark.parametrize("config, scale, rope, want", [
    # checkpoint, --scale, --rope: (method, scale, window), or refused unless --original_window is given too
    (BASE, None, None, ("none", 1, 64)),
    (BASE, 8, None, ("linear", 8, 512)),
    (BASE, 8, "linear", ("linear", 8, 512)),
    (BASE, 1.5, None, ("linear", 1.5, 96)),
    *((BASE, 8, rope, (rope, 8, 512)) for rope in ("none", "ntk", "dynamic", "yarn", "llama3")),
    (BASE, None, "none", ("none", 1, 64)),
    (BASE, None, "yarn", ("yarn", 1, 64)),
    (FINE_TUNED, None, None, ("none", 4, 256)),
    (FINE_TUNED, 8, None, ("none", 8, 512)),
    (FINE_TUNED, 8, "linear", REFUSED),
    (FINE_TUNED, 2, None, REFUSED),
    (LINEAR, None, None, ("linear", 4, 256)),
    (LINEAR, 4, None, ("linear", 4, 256)),
    (LINEAR, 8, None, ("linear", 8, 512)),  # not 32
    (LINEAR, 8, "linear", ("linear", 8, 512)),
    (LINEAR, None, "linear", ("linear", 4, 256)),
    (LINEAR, 2, None, REFUSED),
    (LINEAR, None, "none", REFUSED),
    *((LINEAR, 8, rope, REFUSED) for rope in ("none", "ntk", "dynamic", "yarn", "llama3")),
    (NTK, None, None, ("ntk", 4, 256)),
    (NTK, 8, None, ("ntk", 8, 512)),
    (NTK, 8, "linear", REFUSED),
    (DYNAMIC, None, None, ("dynamic", 4, 256)),
    (DYNAMIC, 8, None, ("dynamic", 8, 512)),
    (DYNAMIC, 8, "linear", REFUSED),
    (YARN_4, None, None, ("yarn", 4, 256)),
    (YARN_4, 8, None, ("yarn", 8, 512)),
    (YARN_4, 8, "linear", REFUSED),
    (LLAMA31, None, None, ("llama3", 8, 1024)),  # as it comes: a window that is no product
    (LLAMA31, 8, None, ("llama3", 8, 1024)),
    (LLAMA31, 16, None, ("llama3", 16, 1024)),
    (LLAMA31, 32, "linear", REFUSED),
])  # fmt: skip
def test_extend(config: LLaMAConfig, scale: float | None, rope: str | None, want: tuple | str) -> None:
    if want == REFUSED:
        with pytest.raises(ValueError, match="--original_window"):
            extend(config, scale, rope)
        new = extend(config, scale, rope, insist=True)
        assert new.rope == (rope or config.rope) and new.scale == (scale or config.scale)
        assert new.block_size == round(64 * new.scale)
    else:
        new = extend(config, scale, rope)
        assert (new.rope, new.scale, new.block_size) == want
    assert new.original_window == 64 and new.rope_theta == config.rope_theta


def test_extend_keeps_a_ramp_but_not_a_factor_of_another_scale() -> None:
    assert extend(YARN_4).rope_extra == YARN_4.rope_extra
    assert extend(YARN_4, 8).rope_extra == {"beta_fast": 16.0}
    assert extend(LLAMA31, 16).rope_extra == LLAMA31.rope_extra
    assert extend(YARN_4, 8, "llama3", insist=True).rope_extra == {}


@pytest.mark.parametrize("scale, rope, word", [
    (0, None, "scale"), (-1, "none", "scale"), (float("nan"), "none", "scale"), (float("inf"), None, "scale"),
    (0.5, "linear", "scale"), (2, "magic", "magic"),
])  # fmt: skip
def test_extend_refuses_what_can_not_be(folder: Path, scale: float, rope: str | None, word: str) -> None:
    raises(folder, word, scale=scale, rope=rope)


def test_an_assumed_original_window_is_not_built_upon(tmp_path: Path) -> None:
    theirs(tmp_path, "dynamic")
    assert load(tmp_path).config.scale == 4
    raises(tmp_path, "--original_window", scale=8)
    assert load(tmp_path, scale=8, original_window=WINDOW).config.block_size == 8 * WINDOW


# ---- bad input: one line that names the file or the argument ---------------------------------------------------


@pytest.mark.parametrize("change, word", [
    ({"model_type": "mistral"}, "mistral"),
    ({"num_attention_heads": 7}, "n_head 7"),
    ({"num_key_value_heads": 3}, "n_kv_head 3"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"num_hidden_layers": 0}, "n_layer"),
    ({"max_position_embeddings": -5}, "block_size"),
    ({"head_dim": 15}, "head_dim"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantiz"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "scale"),
    ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta"),
    ({"rope_parameters": YARN | {"truncate": False}}, "truncate"),
    ({"rope_parameters": YARN | {"original_max_position_embeddings": "64"}}, "original_max_position_embeddings"),
    ({"vocab_size": 98}, "embed_tokens.weight"),
    ({"intermediate_size": 113}, "mlp"),
    ({"num_hidden_layers": 3}, "layers.2"),
    ({"num_hidden_layers": 1}, "layers.1"),
])  # fmt: skip
def test_a_config_that_is_wrong(folder: Path, change: dict, word: str) -> None:
    edit_config(folder, **change)
    raises(folder, word)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model_type": "llama"', "\x00\x01"])
def test_a_config_that_is_no_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    raises(folder, "config.json")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    raises(tmp_path, str(tmp_path), "config.json")
    raises(tmp_path / "nowhere", str(tmp_path / "nowhere"))
    theirs(tmp_path / "a")
    raises(tmp_path / "a" / "config.json", "config.json")
    (tmp_path / "a" / "model.safetensors").unlink()
    raises(tmp_path / "a", "model.safetensors")


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_a_truncated_file(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    raises(folder, "model.safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    theirs(tmp_path, max_shard_size="60KB")
    return tmp_path


def test_shards(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    contents = [path.read_bytes() for path in shards]
    index = json.loads((sharded / checkpoint.INDEX).read_text())

    shards[0].unlink()
    raises(sharded, shards[0].name, "missing")
    shards[0].write_bytes(contents[0][:-1])
    raises(sharded, shards[0].name)
    shards[0].write_bytes(contents[1])  # swapped
    shards[1].write_bytes(contents[0])
    raises(sharded, shards[0].name, "lacks the tensor")
    shards[0].write_bytes(contents[0])
    shards[1].write_bytes(contents[1])
    load(sharded)

    def write(weight_map: object) -> None:
        (sharded / checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    name = "model.layers.0.mlp.up_proj.weight"
    mislabelled = next(path.name for path in shards if path.name != index["weight_map"][name])
    write(index["weight_map"] | {name: mislabelled})
    raises(sharded, mislabelled, name)
    write({key: file for key, file in index["weight_map"].items() if key != name})
    raises(sharded, "mlp.up_proj.weight is missing")
    for wrong in (None, [], {name: 3}):
        write(wrong)
        raises(sharded, checkpoint.INDEX, "weight_map")
    (sharded / checkpoint.INDEX).write_text("[")
    raises(sharded, checkpoint.INDEX)


@pytest.mark.parametrize("where", ["../outside.safetensors", "/{}/outside.safetensors", "a/../../outside.safetensors", "..", "."])
def test_an_index_does_not_leave_its_folder(tmp_path: Path, where: str) -> None:
    theirs(tmp_path / "in", max_shard_size="60KB")
    path = tmp_path / "in" / checkpoint.INDEX
    index = json.loads(path.read_text())
    first = index["weight_map"]["lm_head.weight"]
    shutil.copy(tmp_path / "in" / first, tmp_path / "outside.safetensors")
    where = where.format(str(tmp_path).strip("/"))
    index["weight_map"] = {k: where if f == first else f for k, f in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    raises(tmp_path / "in", "outside its folder", where)


def test_tensors_that_do_not_fit(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({key: t for key, t in state.items() if key != name}, path)
    raises(folder, "k_proj.weight is missing")
    save_file(state | {name: state[name][:-1].contiguous()}, path)
    raises(folder, "k_proj.weight has shape (31, 64)", "(32, 64)")
    save_file(state | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}, path)
    raises(folder, "q_proj.bias")
    save_file({key: t for key, t in state.items() if key != "lm_head.weight"}, path)
    raises(folder, "lm_head.weight is missing")
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.int32):
        save_file(state | {name: state[name].to(dtype)}, path)
        raises(folder, "k_proj.weight is torch.", "floating point")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_not_run(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(state | {"model.bomb": Bomb(tmp_path / "ran")}, path)
    raises(folder, "pytorch_model.bin")
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    raises(folder, "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], path)
    raises(folder, "dictionary of tensors")
    torch.save(state | {"model.step": 3}, path)
    raises(folder, "dictionary of tensors")
    torch.save(state, path)
    whole = path.read_bytes()
    load(folder)
    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        raises(folder, "pytorch_model.bin")


# ---- disks that don't take it ----------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int):
    """Within, no file can grow beyond size bytes, as on a full disk (the tests may run as root, whom no mode bits stop)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 70_000])  # not even config.json; the first shards, but not the largest
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, limit: int) -> None:
    theirs(tmp_path / "a")
    model = load(tmp_path / "a")
    save(model, tmp_path / "b", max_shard_size=90e3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert max(map(len, before.values())) > 70_000
    with torch.no_grad():
        for p in model.parameters():
            p.neg_()
    for place in ("b", "new"):
        with pytest.raises(OSError) as caught, largest_file(limit):
            save(model, tmp_path / place, max_shard_size=90e3)
        assert str(tmp_path / place) in str(caught.value) and "arge" in str(caught.value), caught.value
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    assert not list((tmp_path / "new").iterdir())


def test_a_path_under_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        save(load(folder), tmp_path / "file" / "out")
    with pytest.raises(OSError, match="file"):
        checkpoint.write_json(tmp_path / "file" / "a.json", {})
    assert (tmp_path / "file").read_text() == "x"


def test_write_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    checkpoint.write_json(tmp_path / "new" / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(tmp_path / "new" / "a.json", {"x": object()})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 1}


# ---- command lines -----------------------------------------------------------------------------------------------


def script() -> None:
    parser = Parser("Says hello.\n\nAt length.")
    add_model_flags(parser, init="out/base")
    model = load_from_flags(parser.parse_args())
    print(model.config.rope, model.config.scale, next(model.parameters()).dtype, model.training)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """command(main, *arguments) -> (exit code, standard output, standard error), as in a process of its own."""

    def call(main, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            checkpoint.run(main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, error = result
    assert (code, out) == (2, "") and error.count("\n") == 1 and error.startswith("script.py: error: "), result
    for word in words:
        assert word in error, error


def test_flags(folder: Path, command) -> None:
    good = command(script, "--init", folder, "--scale", 4, "--rope", "yarn", "--dtype", "bfloat16", "--device", "cpu")
    assert good[:2] == (0, "yarn 4.0 torch.bfloat16 False\n"), good
    code, out, _ = command(script, "--help")
    assert code == 0 and "out/base" in out and "At length" not in out
    for bad, *words in (
        (["--init", folder, "--scale", "two"], "--scale", "two"),
        (["--scal", "2"], "--scal"),
        (["--nonsense"], "--nonsense"),
        (["--init", folder, "--rope", "magic"], "magic"),
        (["--init", folder, "--scale", "0.5"], "scale"),
        (["--init", folder, "--device", "cuda:7"], "--device cuda:7"),
        (["--init", folder, "--device", "toaster"], "--device toaster"),
        (["--init", folder, "--dtype", "int3"], "--dtype"),
        (["--init", folder / "nowhere"], "nowhere"),
    ):
        assert_one_line(command(script, *bad), *words)


def test_what_run_catches(command) -> None:
    def fail(error: Exception):
        def main() -> None:
            raise error

        return main

    assert_one_line(command(fail(FileNotFoundError(2, "No such file", "x/y"))), "x/y: No such file")
    assert_one_line(command(fail(OSError("several\nlines"))), "several lines")
    assert command(fail(KeyboardInterrupt()))[0] == 130
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        command(fail(ZeroDivisionError()))
