"""config.json and params.json to LLaMAConfig and back, and what --scale and --rope make of it.

All that is known about the windows of a checkpoint is in this file: what Hugging Face's config.json
and Meta's params.json say, what has to be guessed, and how an extended window is written down.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from model import LLaMAConfig
from rope import ntk_theta
from weights import has_own_head, read_params, stored_tensors

# Our own key in config.json, which other tools ignore. It holds what they have no key for: the
# method "ntk", the window and scale of direct fine-tuning, and both windows whatever the method.
OUR_KEY = "position_interpolation"

# Fields of LLaMAConfig, and their keys in config.json, which must all be there
SHAPE = {
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "intermediate_size": "intermediate_size",
    "block_size": "max_position_embeddings",
}

# The keys of a rope method that rope_frequencies takes as they are
EXTRAS = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}

ORIGINAL = "original_max_position_embeddings"

# Window of pre-training by rope_theta, the largest of all LLaMAs with that theta. Any other theta
# counts as Llama 3's.
PRETRAINED_WINDOWS = {10000.0: 4096, 500000.0: 8192, 1000000.0: 16384}

# What a message says of --original_window where the checkpoint can't tell
BASE_WINDOWS = "the base model's (LLaMA 1: 2048, Llama 2: 4096, Llama 3: 8192, Code Llama: 16384)"

# Keys that may stand beside any rope method. The first models with YaRN have "finetuned".
ROPE_KEYS = {"rope_type", "type", "factor", "rope_theta", ORIGINAL, "finetuned"}

# Values that every LLaMA has. Another one means another architecture.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}

# The numbers of config.json by type. Where a float is expected, a whole number is right, too.
NUMBERS = {
    "vocab_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "hidden_size": int,
    "head_dim": int,
    "intermediate_size": int,
    "max_position_embeddings": int,
    "max_sequence_length": int,
    ORIGINAL: int,
    "bos_token_id": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "factor": float,
    "beta_fast": float,
    "beta_slow": float,
    "attention_factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
}


class PositionKeys(NamedTuple):
    """What config.json says of positions, by the keys that other tools read as well."""

    method: str  # a method of rope.METHODS
    factor: float  # 1.0 for the method "none"
    theta: float
    max_position_embeddings: int
    max_sequence_length: int | None
    original: int | None  # original_max_position_embeddings
    extra: dict[str, float]  # the method's EXTRAS
    note: str  # which keys are not used, "" if all are


# ---- config.json to LLaMAConfig ------------------------------------------------------------------


def parse_config(raw: dict, original_window: int | None = None) -> tuple[LLaMAConfig, str]:
    """The LLaMAConfig of a config.json, and a note on what was assumed ("" if nothing was).

    raw: the content of config.json.
    original_window: the window of pre-training, from --original_window; None: find it in raw.

    The original window is taken from the first of these that is there: original_window; our own
    key; original_max_position_embeddings; max_position_embeddings, from which it has to be guessed
    for linear. If our own key contradicts the keys that other tools read, those are believed.
    Raises ValueError for what is not a LLaMA, or holds a value of a wrong type.
    """
    _check_architecture(raw)
    raw = _complete(raw)
    keys = _read_position_keys(raw)
    shape = _read_shape(raw)

    # In a config.json that we wrote, our own key says it all
    notes = []
    if keys.note:
        notes.append(keys.note)
    if OUR_KEY in raw:
        recorded = _read_our_key(raw[OUR_KEY], shape, keys)
        if recorded is not None:
            if original_window not in (None, recorded.original_window):
                raise ValueError(
                    f"--original_window {original_window} contradicts the checkpoint, "
                    f"which records {recorded.original_window}"
                )
            return recorded, keys.note
        notes.append(
            f"{OUR_KEY} in config.json contradicts the keys that other tools read; they are "
            f"believed: rope {keys.method!r}, factor {keys.factor:g}, rope_theta {keys.theta:g}, "
            f"max_position_embeddings {keys.max_position_embeddings}"
        )

    # In any other, the windows follow from the keys that other tools read
    original = original_window
    if original is None:
        original, guess = _find_original_window(keys)
        if guess:
            notes.append(guess)
    window = _extended_window(keys, original)
    scale = keys.factor
    if keys.method == "none":
        # Direct fine-tuning on a longer window leaves no trace in the keys of other tools, so that
        # the original window is shorter only if --original_window says so. It may be longer, too:
        # Llama 2 was first published with a window of 2048 in its config.json.
        window = max(window, original)
        scale = window / original
    config = replace(
        shape, rope=keys.method, rope_theta=keys.theta, rope_extra=keys.extra, scale=scale,
        original_window=original, block_size=window
    )
    return config, "; ".join(notes)


def original_window_is_guessed(raw: dict) -> bool:
    """Whether a config.json does not name the original window, although the angles depend on it."""
    keys = _read_position_keys(_complete(raw))
    return keys.method in ("yarn", "llama3") and keys.original is None


def _check_architecture(raw: dict) -> None:
    """Raise ValueError if a config.json is not that of a LLaMA with plain weights."""
    family = raw.get("model_type", "llama")
    if family != "llama":
        raise ValueError(f"config.json: model_type is {family!r}, only 'llama' is known here")
    for key in ("quantization_config", "quantization"):  # the second one is MLX's
        if raw.get(key):
            raise ValueError(
                f"config.json: {key}: quantized weights are not read here; if the weights have "
                "16 bits or more, remove that key"
            )
    for key, value in FIXED.items():
        if raw.get(key) not in (None, value):
            raise ValueError(f"config.json: {key} is {raw[key]!r}, a LLaMA has {value!r}")


def _complete(raw: dict) -> dict:
    """The content of config.json with its numbers checked, and with max_position_embeddings."""
    # The first LLaMA 1 in this form has max_sequence_length alone. With a rope method that would
    # not do, because transformers takes 2048 for what is missing, and some angles depend on it.
    extended = raw.get("rope_scaling") or raw.get("rope_parameters")
    if raw.get("max_position_embeddings") is None and not extended:
        raw = raw | {"max_position_embeddings": raw.get("max_sequence_length")}
    return _checked_numbers(raw, required=SHAPE.values())


def _checked_numbers(values: dict, required: Collection[str]) -> dict:
    """The values, with 16384.0 as 16384 where a whole number is due.

    Raises ValueError if a number has the wrong type by NUMBERS, or is required and missing.
    """
    checked = dict(values)
    for key, kind in NUMBERS.items():
        value = values.get(key)
        if value is None and key not in required:
            continue
        if kind is int and type(value) is float and value.is_integer():
            value = int(value)
        # type() and not isinstance, because True is an int for Python
        if kind is int and type(value) is not int:
            raise ValueError(f"config.json: {key} should be a whole number, found {value!r}")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"config.json: {key} should be a finite number, found {value!r}")
        checked[key] = value
    return checked


def _read_rope(raw: dict) -> tuple[dict, str]:
    """The keys about RoPE in one dictionary, wherever they stand, and a note on those left out.

    Older configs have rope_theta and rope_scaling, newer ones have rope_parameters for both. Where
    both are there, rope_scaling counts and rope_parameters does not, as in transformers.
    """
    scaling = _read_group(raw, "rope_scaling")
    parameters = _read_group(raw, "rope_parameters")
    rope = scaling or parameters
    note = ""
    if scaling and parameters:
        note = "config.json has rope_scaling and rope_parameters: rope_scaling counts"

    # Each of these keys may also stand by itself
    if "rope_theta" not in rope and raw.get("rope_theta") is not None:
        rope["rope_theta"] = raw["rope_theta"]
    original = raw.get(ORIGINAL)
    if original is not None and rope.setdefault(ORIGINAL, original) != original:
        raise ValueError(
            f"config.json: {ORIGINAL} is {original} by itself and {rope[ORIGINAL]} among the keys "
            "of rope: remove the wrong one"
        )

    # transformers takes 10000 here, which is wrong for a model with another theta
    theta = parameters.get("rope_theta", 10000.0)
    if "rope_theta" not in rope and theta != 10000.0:
        raise ValueError(
            f"config.json: rope_parameters has rope_theta {theta}, but rope_scaling, which "
            f'counts, has none: write "rope_theta": {theta} into rope_scaling'
        )
    return rope, note


def _read_group(raw: dict, name: str) -> dict:
    """The keys of rope_scaling or rope_parameters that have a value; {} without such a group."""
    group = raw.get(name) or {}
    if not isinstance(group, dict):
        raise ValueError(f"config.json: {name} should be a JSON object or null, found {group!r}")
    return {key: value for key, value in group.items() if value is not None}


def _rope_method(rope: dict) -> str:
    """The rope method by the keys about RoPE."""
    method = rope.get("rope_type", rope.get("type", "default"))
    if method == "default":
        return "none"
    if method not in ("none", "linear", "dynamic", "yarn", "llama3"):
        raise ValueError(
            f"config.json: rope_type {method!r} is unknown here: "
            "none, linear, dynamic, yarn or llama3"
        )
    return method


def _read_position_keys(raw: dict) -> PositionKeys:
    """The keys about positions, their types checked."""
    rope, note = _read_rope(raw)
    method = _rope_method(rope)
    extra_keys = EXTRAS.get(method, ())
    if method == "none":
        # The keys of another method may be left over; transformers does not read them either
        unused = sorted(set(rope) - {"rope_type", "type", "rope_theta", ORIGINAL})
        for key in unused:
            del rope[key]
        if unused:
            note = (
                f"config.json: {', '.join(unused)} beside no rope_type, or rope_type 'default', "
                'means nothing: for Position Interpolation write "rope_type": "linear"'
            )
    unknown = set(rope) - ROPE_KEYS - set(extra_keys)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"config.json: rope type {method!r} has keys unknown here: {names}")

    factor = 1.0
    if method == "none":
        rope = _checked_numbers(rope, required=[])
    else:
        rope = _checked_numbers(rope, required=["factor"])
        factor = float(rope["factor"])
    return PositionKeys(
        method=method, factor=factor, theta=float(rope.get("rope_theta", 10000.0)),
        max_position_embeddings=raw["max_position_embeddings"],
        max_sequence_length=raw.get("max_sequence_length"), original=rope.get(ORIGINAL),
        extra={key: rope[key] for key in extra_keys if key in rope}, note=note
    )


def _read_shape(raw: dict) -> LLaMAConfig:
    """The shape of the model and its end tokens. Nothing is said of positions yet."""
    return LLaMAConfig(
        **{field: raw[key] for field, key in SHAPE.items()},
        n_kv_head=raw.get("num_key_value_heads") or 0, head_dim=raw.get("head_dim") or 0,
        norm_eps=raw.get("rms_norm_eps") or 1e-6,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)), bos_id=raw.get("bos_token_id"),
        eos_id=_read_eos(raw)
    )


def _read_eos(raw: dict) -> int | tuple[int, ...] | None:
    """The id or ids of the tokens at which a text ends, or None."""
    eos = raw.get("eos_token_id")
    if eos is None or type(eos) is int:
        return eos
    if isinstance(eos, list) and all(type(token) is int for token in eos):
        return tuple(eos)
    raise ValueError(
        f"config.json: eos_token_id should be a token id or a list of them, found {eos!r}"
    )


def _read_our_key(own: object, shape: LLaMAConfig, keys: PositionKeys) -> LLaMAConfig | None:
    """The config by our own key. None if it contradicts the keys that other tools read.

    own: the value of our key.  shape: the shape of the model.  keys: what other tools read.
    """
    try:
        recorded = replace(
            shape, rope=own["method"], rope_extra=keys.extra, scale=float(own["scale"]),
            original_window=int(own["original_window"]), rope_theta=float(own["original_theta"]),
            block_size=int(own["window"])
        )
        written = _read_position_keys(format_config(recorded))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None  # somebody edited it by hand: a value is missing, or can't be

    # The keys that we would write for this config must be those that are there, and the windows
    # must follow from them. A tool that rewrites config.json may round rope_theta, or add an
    # original window where none is needed.
    agrees = (
        written.method == keys.method
        and written.factor == keys.factor
        and written.max_position_embeddings == keys.max_position_embeddings
        and recorded.block_size == _extended_window(keys, recorded.original_window)
        and written.original in (None, keys.original)
        and math.isclose(written.theta, keys.theta, rel_tol=1e-6)
    )
    if agrees:
        return recorded
    return None


# ---- the two windows -----------------------------------------------------------------------------


def _find_original_window(keys: PositionKeys) -> tuple[int, str]:
    """The window of pre-training, and a note if it is a guess ("" if it is not)."""
    window = keys.max_position_embeddings
    if keys.method in ("none", "dynamic"):
        return window, ""  # beside dynamic, transformers takes it for the original window
    if keys.original is not None:
        return keys.original, ""
    if keys.method == "linear":
        return _find_original_window_of_linear(keys)
    return window, (
        f"rope {keys.method!r} without {ORIGINAL}: max_position_embeddings {window} is taken for "
        "the original window, as transformers does; if it is not, give --original_window with "
        f"{BASE_WINDOWS}"
    )


def _find_original_window_of_linear(keys: PositionKeys) -> tuple[int, str]:
    """The window of pre-training of a checkpoint with rope "linear", and a note if it is a guess.

    max_position_embeddings is the original window in Vicuna and LongChat, because engines multiply
    it by the factor. In LLaMA-2-7B-32K and in NeMo's exports it is the extended window.
    """
    window = keys.max_position_embeddings
    if keys.max_sequence_length == round(window * keys.factor):
        return window, ""

    # Any other max_sequence_length may be left over from the original model. A window longer than
    # those of pre-training must be the extended one.
    original = window
    kind = "original"
    if window > PRETRAINED_WINDOWS.get(keys.theta, 8192):
        original = round(window / keys.factor)
        kind = "extended"
    return original, (
        f"max_position_embeddings {window} beside rope 'linear' with factor {keys.factor:g} is "
        f"taken for the {kind} window: original {original}, extended "
        f"{round(original * keys.factor)}; if it is not, give --original_window with {BASE_WINDOWS}"
    )


def _extended_window(keys: PositionKeys, original: int) -> int:
    """The window in force. original: the window of pre-training."""
    window = keys.max_position_embeddings
    if keys.method == "none":
        return window
    # yarn and llama3 name the extended window, which need not be the product (Llama 3.1's is 16
    # times the original one at factor 8), unless the method was switched on by hand.
    if keys.method in ("yarn", "llama3") and window > original:
        return window
    return round(original * keys.factor)


def extend(
    config: LLaMAConfig, scale: float | None = None, rope: str | None = None, insist: bool = False
) -> LLaMAConfig:
    """The config with its window at scale times the original one.

    scale: counted from the window of pre-training, so that scale 8 asked of a checkpoint with
        linear 4 gives linear 8 and not linear 32; None: as the checkpoint is.
    rope: the method; None: the checkpoint's, or linear if it has none yet.
    insist: allow what is refused otherwise (on the command line: --rope with --original_window).

    A checkpoint that is extended already keeps its method and does not shrink: another method or a
    smaller scale raises ValueError, unless `insist` is true.
    """
    if scale is None and rope is None:
        return config
    extended = config.rope != "none" or config.block_size != config.original_window
    if rope is None:
        rope = config.rope if extended else "linear"
    if scale is None:
        scale = config.scale
    # No window is extended so far: the user has given the new window itself
    if scale >= config.original_window:
        raise ValueError(
            f"--scale {scale:g} is the ratio of two windows: to extend one of "
            f"{config.original_window:,} tokens to {scale:,.0f}, give --scale "
            f"{scale / config.original_window:g}"
        )

    if extended and not insist and (rope != config.rope or scale < config.scale):
        flag = f"--scale {scale:g}"
        if rope != config.rope:
            flag = f"--rope {rope}"
        raise ValueError(
            f"{flag}: the checkpoint is already extended by rope {config.rope!r} at scale "
            f"{config.scale:g} of its original window {config.original_window}: leave it out, "
            "give a larger scale of that method, or insist with --rope and --original_window "
            "together"
        )
    if rope == config.rope and scale == config.scale:
        return config  # its window need not be the product of the two (Llama 3.1's is not)

    # The ramp of a method does not depend on the scale, so it stays. The attention factor does, so
    # it is dropped and computed again.
    extra = {}
    if rope == config.rope:
        extra = dict(config.rope_extra)
    extra.pop("attention_factor", None)
    # replace() checks rope and scale, so that the window is computed from values that are right
    longer = replace(config, rope=rope, scale=float(scale), rope_extra=extra)
    return replace(longer, block_size=max(1, round(config.original_window * scale)))


# ---- LLaMAConfig to config.json ------------------------------------------------------------------


def format_config(config: LLaMAConfig, dtype: torch.dtype = torch.float32) -> dict:
    """The content of config.json for a model: the keys that other tools read, and our own key.

    max_position_embeddings is the original window for linear and dynamic, because engines multiply
    it by the factor. For the other methods it is the extended window.
    """
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "max_position_embeddings": config.block_size,
    }
    if isinstance(config.eos_id, tuple):
        raw["eos_token_id"] = list(config.eos_id)
    if config.rope in ("linear", "dynamic"):
        raw["max_position_embeddings"] = config.original_window

    # Other tools have no name for ntk, but it is the same as a larger theta
    raw["rope_theta"] = config.rope_theta
    if config.rope == "ntk":
        raw["rope_theta"] = ntk_theta(config.head_dim, config.rope_theta, config.scale)
    raw["rope_scaling"] = _format_rope_scaling(config)
    raw[OUR_KEY] = {
        "method": config.rope,
        "scale": config.scale,
        "window": config.block_size,
        "original_window": config.original_window,
        "original_theta": config.rope_theta,
    }
    return raw


def _format_rope_scaling(config: LLaMAConfig) -> dict | None:
    """The value of rope_scaling, with its type under two names, because some tools know only one.

    transformers reads "rope_type" from 4.43 on, and mistral.rs reads nothing else. Versions 4.31 to
    4.42 read "type", and for linear and dynamic they refuse any key beside "type" and "factor".
    """
    if config.rope in ("none", "ntk"):
        return None
    scaling = {"rope_type": config.rope, "type": config.rope, "factor": config.scale}
    if config.rope in ("yarn", "llama3"):
        scaling[ORIGINAL] = config.original_window
    if config.rope == "llama3":  # other tools have no defaults for its ramp
        scaling["low_freq_factor"] = 1.0
        scaling["high_freq_factor"] = 4.0
    return scaling | config.rope_extra


# ---- params.json to LLaMAConfig ------------------------------------------------------------------


def parse_params(folder: Path, original_window: int | None = None) -> tuple[LLaMAConfig, str]:
    """The LLaMAConfig of a Meta folder, and a note on what was assumed ("" if nothing was).

    params.json holds neither a window nor token ids. They follow from what Meta has published.
    original_window: the window of pre-training, from --original_window; None: guess it.
    """
    params = read_params(folder)
    tensors = stored_tensors(folder)
    if "embed_tokens.weight" not in tensors:
        raise ValueError(
            f"{folder}: the tensor tok_embeddings.weight is missing: download it again"
        )

    # Llama 1 and 2 say -1, but the embedding has a row for each token
    vocab_size = params.get("vocab_size", -1)
    if vocab_size < 0:
        vocab_size = tensors["embed_tokens.weight"].shape[0]
    bos_id = 128000 if vocab_size > 128001 else 1  # Llama 3's, or Llama 1's and 2's

    theta = params.get("rope_theta") or 10000.0
    norm_eps = params.get("norm_eps") or 1e-5
    family, pretrained = _meta_family(params, theta, norm_eps)
    original = original_window or pretrained
    note = (
        f"params.json holds no window: {family}'s {pretrained} is taken for the original, "
        "--original_window N settles it"
    )

    config = LLaMAConfig(
        vocab_size=vocab_size, n_layer=params["n_layers"], n_head=params["n_heads"],
        n_kv_head=params.get("n_kv_heads") or 0, n_embd=params["dim"],
        intermediate_size=_meta_intermediate_size(params), norm_eps=norm_eps,
        rope_theta=float(theta), tie_embeddings=not has_own_head(tensors), block_size=original,
        bos_id=bos_id, eos_id=bos_id + 1
    )
    if params.get("use_scaled_rope"):
        config = _with_scaled_rope(config, params.get("rope_scaling_factor"))
        note += (
            f"; its use_scaled_rope for llama3 with factor {config.scale:g} to {config.block_size}"
        )
    if original_window is not None:
        note = ""
    return config, note


def _with_scaled_rope(config: LLaMAConfig, factor: float | None) -> LLaMAConfig:
    """A config of Llama 3, extended as Llama 3.1 and 3.2 are: to 16 times its window."""
    if factor is None:
        factor = 8.0 if config.n_embd >= 4096 else 32.0  # 3.2 is smaller than 3.1
    return replace(
        config, rope="llama3", scale=float(factor),
        rope_extra={"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        block_size=16 * config.original_window
    )


def _meta_family(params: dict, theta: float, norm_eps: float) -> tuple[str, int]:
    """The family that a params.json belongs to, and its window of pre-training."""
    if theta == 500000:
        return "Llama 3", 8192
    if theta > 10000:
        return "Code Llama", 16384
    # The largest LLaMA 1 has the epsilon and the width of Llama 2's largest, but no n_kv_heads
    largest = params["dim"] == 8192 and not params.get("n_kv_heads")
    if norm_eps == 1e-6 or largest:
        return "LLaMA 1", 2048
    return "Llama 2", 4096


def _meta_intermediate_size(params: dict) -> int:
    """The width of the MLP, which params.json gives by the rule of Meta's code.

    Two thirds of 4 dim, because SwiGLU has three matrices in place of two; times
    ffn_dim_multiplier; rounded up to a multiple of multiple_of.
    """
    width = int(8 * params["dim"] / 3)
    width = int((params.get("ffn_dim_multiplier") or 1.0) * width)
    multiple = params.get("multiple_of") or 256
    return math.ceil(width / multiple) * multiple
