"""hf_config.py: what config.json and params.json say, how it is extended, and what is written."""

import json
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
import transformers

import hf_config
from hf_config import OUR_KEY, extend, format_config, parse_config, parse_params
from model import LLaMAConfig
from weights import Stored

# ---- the config.json of published models ---------------------------------------------------------

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA1_7B = LLAMA2_7B | {
    "max_position_embeddings": 2048,
    "max_sequence_length": 2048,
    "rms_norm_eps": 1e-6,
}
LINEAR_4 = {"type": "linear", "factor": 4.0}
LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31_8B_SHAPE = LLAMA2_7B | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA31_8B = LLAMA31_8B_SHAPE | {"rope_scaling": LLAMA31_ROPE, "rope_theta": 500000.0}
LLAMA31_8B_BY_TRANSFORMERS_5 = LLAMA31_8B_SHAPE | {
    "rope_parameters": LLAMA31_ROPE | {"rope_theta": 500000.0}
}
SMOLLM2_135M = LLAMA2_7B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "torch_dtype": "bfloat16",
}


def without(raw: dict, *keys: str) -> dict:
    """A config.json without some of its keys."""
    return {key: value for key, value in raw.items() if key not in keys}


def llama2(rope_type: str, factor: float, window: int = 4096, **keys: object) -> dict:
    """The config.json of a Llama 2 with rope_scaling. keys: more keys of config.json."""
    scaling = {"type": rope_type, "factor": factor}
    return LLAMA2_7B | {"rope_scaling": scaling, "max_position_embeddings": window} | keys


def llama2_yarn(factor: float, window: int, **rope_keys: object) -> dict:
    """The config.json of a Llama 2 with YaRN. rope_keys: more keys of rope_scaling."""
    raw = llama2("yarn", factor, window)
    raw["rope_scaling"] |= rope_keys
    return raw


# name: config.json, (original window, extended window, method, factor), whether it is a guess
CONFIGS = {
    "LLaMA 7B": (LLAMA1_7B, (2048, 2048, "none", 1), False),
    "Llama 2 7B": (LLAMA2_7B, (4096, 4096, "none", 1), False),
    "SmolLM2 135M": (SMOLLM2_135M, (8192, 8192, "none", 1), False),
    "Vicuna v1.5 16k": (
        llama2("linear", 4.0, max_sequence_length=16384),
        (4096, 16384, "linear", 4),
        False,
    ),
    "LongChat v1.5 32k": (
        llama2("linear", 8.0, max_sequence_length=32768),
        (4096, 32768, "linear", 8),
        False,
    ),
    "LLaMA-2-7B-32K": (llama2("linear", 8.0, 32768), (4096, 32768, "linear", 8), True),
    "Chinese-Alpaca-2 16k": (llama2("linear", 4.0, 16384), (4096, 16384, "linear", 4), True),
    "LLongMA-2 8k": (llama2("linear", 2.0, 8192), (4096, 8192, "linear", 2), True),
    "LongLoRA 32k": (llama2("linear", 8.0), (4096, 32768, "linear", 8), True),
    "NeMo's export, Llama 2 to 16k": (
        llama2("linear", 4.0, 16384, seq_length=16384),
        (4096, 16384, "linear", 4),
        True,
    ),
    "the extended window in both keys": (
        llama2("linear", 4.0, 16384, max_sequence_length=16384),
        (4096, 16384, "linear", 4),
        True,
    ),
    "LLaMA 1, linear switched on": (
        LLAMA1_7B | {"rope_scaling": LINEAR_4},
        (2048, 8192, "linear", 4),
        True,
    ),
    "LLaMA 1 extended to 8k, max_sequence_length left as it was": (
        LLAMA1_7B | {"rope_scaling": LINEAR_4, "max_position_embeddings": 8192},
        (2048, 8192, "linear", 4),
        True,
    ),
    "LLaMA 1 without max_position_embeddings": (
        without(LLAMA1_7B, "max_position_embeddings"),
        (2048, 2048, "none", 1),
        False,
    ),
    "Code Llama, linear switched on": (
        llama2("linear", 2.0, 16384, rope_theta=1000000),
        (16384, 32768, "linear", 2),
        True,
    ),
    "LLaMA-Factory's yarn": (
        llama2_yarn(4.0, 16384.0, original_max_position_embeddings=4096),
        (4096, 16384, "yarn", 4),
        False,
    ),
    "LLaMA-Factory's linear": (
        llama2("linear", 4.0, 16384.0),
        (4096, 16384, "linear", 4),
        True,
    ),
    "the original window beside rope_scaling": (
        llama2("yarn", 4.0, 16384, original_max_position_embeddings=4096),
        (4096, 16384, "yarn", 4),
        False,
    ),
    "Yarn-Llama-2 64k": (
        llama2_yarn(16.0, 65536, original_max_position_embeddings=4096, finetuned=True),
        (4096, 65536, "yarn", 16),
        False,
    ),
    "yarn switched on by hand, the window left as it was": (
        llama2_yarn(4.0, 4096, original_max_position_embeddings=4096),
        (4096, 16384, "yarn", 4),
        False,
    ),
    "yarn without the original window": (
        llama2_yarn(4.0, 4096),
        (4096, 16384, "yarn", 4),
        True,
    ),
    "dynamic": (llama2("dynamic", 2.0), (4096, 8192, "dynamic", 2), False),
    "Llama 3.1 8B": (LLAMA31_8B, (8192, 131072, "llama3", 8), False),
    "Llama 3.1 8B by transformers 5": (
        LLAMA31_8B_BY_TRANSFORMERS_5,
        (8192, 131072, "llama3", 8),
        False,
    ),
}


def without_our_key(raw: dict) -> dict:
    return without(raw, OUR_KEY)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_read(name):
    raw, expected, is_guess = CONFIGS[name]
    config, note = parse_config(raw)
    assert (config.original_window, config.block_size, config.rope, config.scale) == expected
    rope = raw.get("rope_parameters") or raw
    assert config.rope_theta == rope.get("rope_theta", 10000)
    assert bool(note) == is_guess
    assert "\n" not in note
    if is_guess:
        assert "--original_window" in note
        assert str(expected[0]) in note


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_needs_no_guess(name):
    """Without our own key, linear alone has to be guessed, and is guessed right."""
    config, _ = parse_config(CONFIGS[name][0])
    written = format_config(config)
    assert parse_config(written) == (config, "")
    found, note = parse_config(without_our_key(written))
    assert found == config
    assert bool(note) == (config.rope == "linear")
    # SGLang multiplies this key by the factor
    assert "max_sequence_length" not in written


def test_what_earlier_versions_wrote_is_read():
    """They wrote the extended window into max_sequence_length, too."""
    written = format_config(LINEAR) | {"max_sequence_length": LINEAR.block_size}
    assert parse_config(written) == (LINEAR, "")
    assert parse_config(without_our_key(written)) == (LINEAR, "")


@pytest.mark.parametrize("original", [2048, 4096, 8192])
def test_original_window_settles_what_is_a_guess(original):
    config, note = parse_config(llama2("linear", 2.0, 8192), original_window=original)
    assert (config.original_window, config.block_size, note) == (original, 2 * original, "")


def test_original_window_tells_of_direct_fine_tuning():
    raw = LLAMA2_7B | {"max_position_embeddings": 32768}
    config, note = parse_config(raw, original_window=4096)
    assert (config.rope, config.scale, config.original_window, note) == ("none", 8, 4096, "")


def test_original_window_may_be_above_the_configs():
    """Llama 2 was first published with a window of 2048."""
    raw = LLAMA2_7B | {"max_position_embeddings": 2048}
    config, note = parse_config(raw, original_window=4096)
    assert (config.original_window, config.block_size, config.scale, note) == (4096, 4096, 1, "")
    raw["rope_scaling"] = LINEAR_4
    config, note = parse_config(raw, original_window=4096)
    assert (config.original_window, config.block_size, note) == (4096, 16384, "")


@pytest.mark.parametrize("factor, window", [(3.0, 10000), (2.0, 4096)])
def test_a_guess_says_what_to_type(factor, window):
    """LLaMA-Factory rounded the factor up, and kept the length that was asked for."""
    _, note = parse_config(llama2("linear", factor, window))
    assert "--original_window with the base model's (LLaMA 1: 2048, Llama 2: 4096" in note


# ---- keys that contradict each other -------------------------------------------------------------

BY_TRANSFORMERS_5 = LLAMA2_7B | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def test_rope_scaling_counts_and_not_rope_parameters():
    for scaling in (LINEAR_4, LINEAR_4 | {"rope_theta": 20000.0}):
        raw = BY_TRANSFORMERS_5 | {"rope_scaling": scaling}
        config, note = parse_config(raw)
        assert (config.rope, config.scale) == ("linear", 4)
        assert config.rope_theta == scaling.get("rope_theta", 10000.0)
        assert "rope_scaling counts" in note


def test_a_theta_is_not_lost():
    raw = LLAMA31_8B_BY_TRANSFORMERS_5 | {"rope_scaling": LINEAR_4}
    with pytest.raises(ValueError) as caught:
        parse_config(raw)
    assert 'write "rope_theta": 500000.0 into rope_scaling' in str(caught.value)
    raw["rope_scaling"] = LINEAR_4 | {"rope_theta": 500000.0}
    assert parse_config(raw)[0].rope_theta == 500000.0


@pytest.mark.parametrize("rope_type", [{}, {"rope_type": "default"}])
def test_left_over_keys_without_a_method_are_named(rope_type):
    left_over = {"factor": 8.0, "low_freq_factor": 1.0}
    raw = LLAMA2_7B | {"rope_scaling": rope_type | left_over}
    config, note = parse_config(raw)
    assert (config.rope, config.scale) == ("none", 1)
    assert "factor, low_freq_factor" in note
    # In a config.json of ours as well
    written = format_config(config) | {"rope_scaling": rope_type | left_over}
    assert parse_config(written) == (config, note)


def test_the_angles_may_depend_on_a_guess():
    assert hf_config.original_window_is_guessed(llama2_yarn(4.0, 4096))
    assert not hf_config.original_window_is_guessed(LLAMA31_8B)
    # The angles of linear depend on the factor alone
    assert not hf_config.original_window_is_guessed(llama2("linear", 8.0))


# ---- our own key ---------------------------------------------------------------------------------

BASE = LLaMAConfig(block_size=64)
# Fine-tuned directly on a longer window, positions left alone
FINE_TUNED = LLaMAConfig(block_size=256, original_window=64, scale=4.0)
LINEAR = replace(FINE_TUNED, rope="linear")
NTK = replace(FINE_TUNED, rope="ntk")
DYNAMIC = replace(FINE_TUNED, rope="dynamic")
YARN = replace(FINE_TUNED, rope="yarn", rope_extra={"beta_fast": 16.0, "attention_factor": 1.5})
LLAMA31 = replace(
    FINE_TUNED, rope="llama3", block_size=1024, scale=8.0, rope_extra={"low_freq_factor": 2.0}
)


@pytest.mark.parametrize("config", [BASE, FINE_TUNED, LINEAR, NTK, DYNAMIC, YARN])
def test_every_extension_is_written_and_read(config):
    assert parse_config(json.loads(json.dumps(format_config(config)))) == (config, "")


def test_ntk_is_written_as_a_larger_theta():
    raw = format_config(NTK)
    assert raw["rope_scaling"] is None
    assert raw["rope_theta"] == pytest.approx(10000 * 4 ** (32 / 30))  # b' = b s^(D/(D-2))
    config, _ = parse_config(without_our_key(raw))
    torch.testing.assert_close(config.rope_frequencies()[0], NTK.rope_frequencies()[0])


@pytest.mark.parametrize(
    "change",
    [
        {"method": "llama3"},
        {"scale": 8.0},
        {"window": 512},
        {"original_window": 128},
        {"original_theta": 20000.0},
        {"scale": None},
        {"scale": "x"},
        {"method": "magic"},
        {"method": ["linear"]},
        {"window": float("inf")},
    ],
)
@pytest.mark.parametrize("config", [LINEAR, YARN])
def test_the_keys_of_other_tools_are_believed(config, change):
    """A hand edited our own key, or the others: what every other tool reads is what counts."""
    raw = format_config(config)
    raw[OUR_KEY] |= change
    expected, _ = parse_config(without_our_key(raw))
    found, note = parse_config(raw)
    assert found == expected
    assert OUR_KEY in note
    assert "contradicts" in note
    assert "\n" not in note


@pytest.mark.parametrize("value", [None, {}, [], "linear"])
def test_a_value_of_our_key_that_is_none_is_ignored(value):
    found, note = parse_config(format_config(LINEAR) | {OUR_KEY: value})
    assert found == LINEAR
    assert "contradicts" in note


def test_a_tool_that_drops_the_scale_is_believed():
    found, note = parse_config(format_config(LINEAR) | {"rope_scaling": None})
    assert (found.rope, found.scale, found.block_size) == ("none", 1, 64)
    assert "contradicts" in note
    assert "rope 'none'" in note


def test_a_recorded_original_window_is_not_overruled():
    raw = format_config(LINEAR)
    assert parse_config(raw, original_window=64) == (LINEAR, "")
    with pytest.raises(ValueError, match="--original_window 32 contradicts .* records 64"):
        parse_config(raw, original_window=32)


# ---- a config.json that is wrong -----------------------------------------------------------------

YARN_KEYS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "change, word",
    [
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
        ({"eos_token_id": [2, "</s>"]}, "eos_token_id"),
        ({"quantization_config": {"quant_method": "gptq"}}, "remove that key"),
        ({"quantization": {"bits": 4}}, "quantized"),
        ({"max_position_embeddings": 4096.5}, "max_position_embeddings"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        (
            {
                "max_position_embeddings": None,
                "max_sequence_length": 4096,
                "rope_scaling": {"type": "dynamic", "factor": 2.0},
            },
            "max_position_embeddings",
        ),
        (
            {"rope_scaling": YARN_KEYS, "original_max_position_embeddings": 32},
            "original_max_position_embeddings is 32 by itself and 64",
        ),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear"}, "factor": 4.0}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "scale"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta"),
        ({"rope_parameters": YARN_KEYS | {"truncate": False}}, "truncate"),
        (
            {"rope_parameters": YARN_KEYS | {"original_max_position_embeddings": "64"}},
            "original_max_position_embeddings",
        ),
    ],
)
def test_a_wrong_config_is_refused(change, word):
    with pytest.raises(ValueError) as caught:
        parse_config(LLAMA2_7B | change)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- --scale and --rope with what a checkpoint is already ----------------------------------------


@pytest.mark.parametrize(
    "config, scale, rope, expected",
    [
        (BASE, None, None, ("none", 1, 64)),
        (BASE, 8, None, ("linear", 8, 512)),
        (BASE, 8, "linear", ("linear", 8, 512)),
        (BASE, 1.5, None, ("linear", 1.5, 96)),
        (BASE, 8, "none", ("none", 8, 512)),
        (BASE, 8, "ntk", ("ntk", 8, 512)),
        (BASE, 8, "dynamic", ("dynamic", 8, 512)),
        (BASE, 8, "yarn", ("yarn", 8, 512)),
        (BASE, 8, "llama3", ("llama3", 8, 512)),
        (BASE, None, "none", ("none", 1, 64)),
        (BASE, None, "yarn", ("yarn", 1, 64)),
        (FINE_TUNED, None, None, ("none", 4, 256)),
        (FINE_TUNED, 8, None, ("none", 8, 512)),
        (LINEAR, None, None, ("linear", 4, 256)),
        (LINEAR, 4, None, ("linear", 4, 256)),
        (LINEAR, 8, None, ("linear", 8, 512)),  # and not 32
        (LINEAR, 8, "linear", ("linear", 8, 512)),
        (LINEAR, None, "linear", ("linear", 4, 256)),
        (NTK, None, None, ("ntk", 4, 256)),
        (NTK, 8, None, ("ntk", 8, 512)),
        (DYNAMIC, None, None, ("dynamic", 4, 256)),
        (DYNAMIC, 8, None, ("dynamic", 8, 512)),
        (YARN, None, None, ("yarn", 4, 256)),
        (YARN, 8, None, ("yarn", 8, 512)),
        (LLAMA31, None, None, ("llama3", 8, 1024)),  # its window is not 64 times 8
        (LLAMA31, 8, None, ("llama3", 8, 1024)),
        (LLAMA31, 16, None, ("llama3", 16, 1024)),
    ],
)
def test_extend(config, scale, rope, expected):
    longer = extend(config, scale, rope)
    assert (longer.rope, longer.scale, longer.block_size) == expected
    assert longer.original_window == 64
    assert longer.rope_theta == config.rope_theta


@pytest.mark.parametrize(
    "config, scale, rope",
    [
        (FINE_TUNED, 8, "linear"),
        (FINE_TUNED, 2, None),
        (LINEAR, 2, None),
        (LINEAR, None, "none"),
        (LINEAR, 8, "none"),
        (LINEAR, 8, "ntk"),
        (LINEAR, 8, "dynamic"),
        (LINEAR, 8, "yarn"),
        (LINEAR, 8, "llama3"),
        (NTK, 8, "linear"),
        (DYNAMIC, 8, "linear"),
        (YARN, 8, "linear"),
        (LLAMA31, 32, "linear"),
    ],
)
def test_another_method_and_a_smaller_scale_need_insistence(config, scale, rope):
    with pytest.raises(ValueError, match="--original_window"):
        extend(config, scale, rope)
    changed = extend(config, scale, rope, insist=True)
    assert changed.rope == (rope or config.rope)
    assert changed.scale == (scale or config.scale)
    assert changed.block_size == round(64 * changed.scale)


def test_a_ramp_is_kept_but_not_the_factor_of_another_scale():
    assert extend(YARN).rope_extra == YARN.rope_extra
    assert extend(YARN, 8).rope_extra == {"beta_fast": 16.0}
    assert extend(LLAMA31, 16).rope_extra == LLAMA31.rope_extra
    assert extend(YARN, 8, "llama3", insist=True).rope_extra == {}


@pytest.mark.parametrize(
    "scale, rope, word",
    [
        (0, None, "scale"),
        (-1, "none", "scale"),
        (float("nan"), "none", "scale"),
        (float("inf"), None, "scale"),
        (0.5, "linear", "scale"),
        (2, "magic", "magic"),
    ],
)
def test_an_extension_that_can_not_be_is_refused(scale, rope, word):
    with pytest.raises(ValueError, match=word):
        extend(BASE, scale, rope)


# ---- params.json ---------------------------------------------------------------------------------

SEVEN_B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5}
EIGHT_B = SEVEN_B | {
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
    "rope_theta": 500000.0,
}
ONE_B = EIGHT_B | {
    "dim": 2048,
    "n_layers": 16,
    "multiple_of": 256,
    "ffn_dim_multiplier": 1.5,
    "use_scaled_rope": True,
}
SIXTY_FIVE_B = SEVEN_B | {"dim": 8192, "n_heads": 64, "n_layers": 80}
SEVENTY_B = SIXTY_FIVE_B | {"multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_kv_heads": 8}
CODE_LLAMA_7B = SEVEN_B | {"ffn_dim_multiplier": 1.0, "rope_theta": 1000000}

# name: params.json, (method, scale, original window, window, width of the MLP, theta)
PARAMS = {
    "LLaMA 7B": (SEVEN_B | {"norm_eps": 1e-6}, ("none", 1, 2048, 2048, 11008, 1e4)),
    "LLaMA 65B": (SIXTY_FIVE_B, ("none", 1, 2048, 2048, 22016, 1e4)),
    "Llama 2 7B": (SEVEN_B | {"vocab_size": -1}, ("none", 1, 4096, 4096, 11008, 1e4)),
    "Llama 2 70B": (SEVENTY_B, ("none", 1, 4096, 4096, 28672, 1e4)),
    "Code Llama 7B": (CODE_LLAMA_7B, ("none", 1, 16384, 16384, 11008, 1e6)),
    "Llama 3 8B": (EIGHT_B, ("none", 1, 8192, 8192, 14336, 5e5)),
    "Llama 3.1 8B": (
        EIGHT_B | {"use_scaled_rope": True},
        ("llama3", 8, 8192, 131072, 14336, 5e5),
    ),
    "Llama 3.2 1B": (ONE_B, ("llama3", 32, 8192, 131072, 8192, 5e5)),
}


@pytest.fixture
def meta_folder(tmp_path, monkeypatch):
    """meta_folder(params) writes a params.json whose tensors have shapes but no files."""

    def write(params: dict):
        vocab_size = 128256 if params.get("vocab_size", -1) > 0 else 32000
        matrix = Stored((vocab_size, params["dim"]), None)
        tensors = {"embed_tokens.weight": matrix, "lm_head.weight": matrix}
        monkeypatch.setattr(hf_config, "stored_tensors", lambda folder: tensors)
        monkeypatch.setattr(hf_config, "has_own_head", lambda tensors: True)
        (tmp_path / "params.json").write_text(json.dumps(params))
        return tmp_path

    return write


@pytest.mark.parametrize("name", PARAMS)
def test_published_params_are_read(meta_folder, name):
    params, expected = PARAMS[name]
    folder = meta_folder(params)
    config, note = parse_params(folder)
    fields = attrgetter(
        "rope", "scale", "original_window", "block_size", "intermediate_size", "rope_theta"
    )
    assert fields(config) == expected
    special = (config.vocab_size, config.bos_id, config.eos_id)
    assert special in [(32000, 1, 2), (128256, 128000, 128001)]
    assert "--original_window" in note
    assert str(config.original_window) in note
    assert "\n" not in note
    # The flag settles what was assumed
    assert parse_params(folder, config.original_window) == (config, "")
    assert parse_params(folder, 1024)[0].original_window == 1024


@pytest.mark.parametrize("name", ["Llama 3.1 8B", "Llama 3.2 1B"])
def test_angles_of_scaled_rope_are_those_of_transformers(meta_folder, name):
    params, _ = PARAMS[name]
    config, _ = parse_params(meta_folder(params))
    hf = transformers.LlamaConfig(
        hidden_size=params["dim"],
        num_attention_heads=params["n_heads"],
        max_position_embeddings=131072,
        rope_parameters=LLAMA31_ROPE | {"factor": config.scale, "rope_theta": 500000.0},
    )
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf).inv_freq
    torch.testing.assert_close(config.rope_frequencies()[0], expected, rtol=1e-5, atol=0)
