"""Weights on disk: LLaMA from wherever it comes, out as a Hugging Face folder, with the scale intact.

    python checkpoint.py SRC                    # what is it? window, method, scale, parameters, ...
    python checkpoint.py SRC DST --scale 8      # extend it by Position Interpolation, without any training

Read rope.py, model.py and sources.py first. The one format that this repo writes is the Hugging Face folder
(config.json, model.safetensors, tokenizer files), because everything opens it: transformers, vLLM, llama.cpp's
converter, lm-eval. The scale lives in config.json, in the keys that those read, so that it can't be lost.

    model = load("out/base")                    # as it is
    model = load("out/base", scale=8)           # its window extended by Position Interpolation, no fine-tuning
    save(model, "out/pi-8", tokenizer)

In order of the file: what a config.json says (`parse_config`), what we write (`hf_config`), what --scale and --rope
make of a checkpoint (`extend`), tensors in (`load`), tensors out (`save`), what all command lines here share, and
this file's own.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from model import PRESETS, LLaMA, LLaMAConfig
from sources import Stored, is_meta, meta_config, read_json, resolve, stored_tensors

OUR_KEY = "position_interpolation"  # in config.json, ignored by others: method, scale, original window and theta
FORMS = "a Hugging Face LLaMA folder, a hub id owner/name[@revision], or a folder as Meta publishes it"
INDEX = "model.safetensors.index.json"
EXTRAS = {"yarn": ("beta_fast", "beta_slow", "attention_factor"), "llama3": ("low_freq_factor", "high_freq_factor")}

# ---- config.json in ------------------------------------------------------------------------------------------

# our names for what every config.json has
SHAPE = dict(
    vocab_size="vocab_size", n_layer="num_hidden_layers", n_head="num_attention_heads", n_embd="hidden_size",
    intermediate_size="intermediate_size", block_size="max_position_embeddings",
)  # fmt: skip
ORIGINAL = "original_max_position_embeddings"
KNOWN = {"rope_type", "type", "factor", "rope_theta", ORIGINAL, "finetuned"}


def _rope_keys(raw: dict) -> tuple[str, dict]:
    """The method of a config.json and the keys that go with it, every value that matters checked by type."""
    if (family := raw.get("model_type", "llama")) != "llama":
        raise ValueError(f"config.json: model_type is {family!r}, only 'llama' is known here")
    if raw.get("quantization_config"):
        raise ValueError("config.json: quantization_config: quantized weights are not read here")
    has = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
    for key, value in has.items():
        if (raw.get(key) or value) != value:
            raise ValueError(f"config.json: {key} is {raw[key]!r}, a LLaMA has {value!r}")
    # older configs say rope_theta and rope_scaling, newer ones rope_parameters for both
    rope = {key: raw.get(key) for key in ("rope_theta", ORIGINAL)}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"config.json: {key} should be a JSON object or null, found {raw[key]!r}")
        rope |= raw.get(key) or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    method = rope.get("rope_type", rope.get("type", "default"))
    method = "none" if method == "default" else method
    if method not in ("none", "linear", "dynamic", "yarn", "llama3"):
        raise ValueError(f"config.json: rope_type {method!r} is unknown here: none, linear, dynamic, yarn or llama3")
    extras = EXTRAS.get(method, ())
    if unknown := set(rope) - KNOWN - set(extras):
        raise ValueError(f"config.json: rope type {method!r} has keys unknown here: {', '.join(sorted(unknown))}")

    needed = {*SHAPE.values()} | (set() if method == "none" else {"factor"})
    whole = {*SHAPE.values(), "num_key_value_heads", "head_dim", "bos_token_id", "max_sequence_length", ORIGINAL}
    for key in sorted(needed | whole | {"rms_norm_eps", "rope_theta", "factor", *extras}):
        value, kinds, kind = rope.get(key, raw.get(key)), (int, float), "finite"
        if key in whole:
            kinds, kind = (int,), "whole"
        if (value is not None or key in needed) and (type(value) not in kinds or not math.isfinite(value)):
            raise ValueError(f"config.json: {key} should be a {kind} number, found {value!r}")
    return method, rope


def parse_config(raw: dict, original_window: int | None = None) -> tuple[LLaMAConfig, str]:
    """What a Hugging Face config.json says, and a note on what had to be assumed ("" where nothing was).

    max_position_embeddings M means different things beside `linear`: the original window in Vicuna and LongChat
    (engines multiply it by the factor), the extended one in LLaMA-2-7B-32K and NeMo's exports. In order of trust:
    original_window; our own key; original_max_position_embeddings; max_sequence_length; else M is the original,
    unless no LLaMA was pre-trained at such a window without a method of its own: more than 8,192, or more than 4,096
    with the theta of Llama 1 and 2. Where the angles depend on it, M means what transformers takes it for: beside
    dynamic the original window, and beside yarn and llama3 too where they don't name it. ValueError for what is not
    a LLaMA or contradicts itself.
    """
    method, rope = _rope_keys(raw)
    eos, scale = raw.get("eos_token_id"), float(rope.get("factor", 1.0))
    if not all(type(i) is int for i in (eos if isinstance(eos, list) else [eos]) if i is not None):
        raise ValueError(f"config.json: eos_token_id should be a token id or a list of them, found {eos!r}")
    config = LLaMAConfig(
        **{name: raw[key] for name, key in SHAPE.items()},
        n_kv_head=raw.get("num_key_value_heads") or 0,
        head_dim=raw.get("head_dim") or 0,
        norm_eps=raw.get("rms_norm_eps") or 1e-6,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        bos_id=raw.get("bos_token_id"),
        eos_id=tuple(eos) if isinstance(eos, list) else eos,
        rope_extra={key: rope[key] for key in EXTRAS.get(method, ()) if key in rope},
    )
    window, longest = config.block_size, raw.get("max_sequence_length")
    if OUR_KEY in raw:
        found = (method, scale if method != "none" else 1.0, window, longest)
        return _recorded(config, raw[OUR_KEY], found, original_window), ""
    original, note = original_window or rope.get(ORIGINAL), ""
    if method == "none":  # direct fine-tuning on a longer window leaves no trace: only the flag can tell
        original = original_window or window
        if original > window:
            raise ValueError(f"--original_window {original} is above the checkpoint's window {window}: leave it out")
        scale = window / original
    elif method == "dynamic":
        original = original_window or window
        window = round(original * scale)
    elif method == "linear":
        if original is None:
            trained = 4096 if config.rope_theta == 10000.0 else 8192
            extended = longest == window and scale > 1 or longest is None and window > trained
            original = round(window / scale) if extended else window
            if longest not in (window, round(window * scale)):
                note = (
                    f"max_position_embeddings {window} beside rope {method!r} with factor {scale:g} is taken for the "
                    f"{'extended' if extended else 'original'} window: original {original}, extended "
                    f"{round(original * scale)}; --original_window N settles it"
                )
        window = round(original * scale)
    else:
        if original is None:
            original = window
            note = (
                f"rope {method!r} without original_max_position_embeddings: max_position_embeddings {window} is taken "
                "for the original window, as transformers does; --original_window N settles it"
            )
        window = window if window > original else round(original * scale)
    return replace(config, rope=method, scale=scale, original_window=original, block_size=window), note


def _recorded(config: LLaMAConfig, own: dict, found: tuple, asked: int | None) -> LLaMAConfig:
    """The config by our own key, which must agree with the keys that others read; found: what they say."""
    try:
        ours = replace(
            config, rope=own["method"], scale=float(own["scale"]), original_window=int(own["original_window"]),
            rope_theta=float(own["original_theta"]), block_size=int(own["window"]),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json: {OUR_KEY} is incomplete ({error!r}): the other keys do without it") from None
    mine = hf_config(ours)
    scaling = mine["rope_scaling"] or {"rope_type": "none", "factor": 1.0}
    wrote = (scaling["rope_type"], scaling["factor"], mine["max_position_embeddings"], mine.get("max_sequence_length"))
    if found != wrote or abs(mine["rope_theta"] / config.rope_theta - 1) > 1e-6:
        raise ValueError(
            f"config.json contradicts itself: by {OUR_KEY} (rope type, factor, max_position_embeddings, "
            f"max_sequence_length, rope_theta) are {(*wrote, mine['rope_theta'])}, but "
            f"{(*found, config.rope_theta)} is there: remove what is wrong"
        )
    if asked not in (None, ours.original_window):
        raise ValueError(f"--original_window {asked} contradicts the checkpoint, which records {ours.original_window}")
    return ours


# ---- config.json out -----------------------------------------------------------------------------------------


def hf_config(config: LLaMAConfig, dtype: torch.dtype = torch.float32) -> dict:
    """The config.json of a model: the keys that every version of every tool reads, and one of our own.

    max_position_embeddings stays the original window for linear and dynamic, whose readers multiply it by the
    factor; for the others it is the extended one. ntk has no name there: what changes is rope_theta.
    """
    theta, method, multiplied = config.rope_theta, config.rope, config.rope in ("linear", "dynamic")
    if method == "ntk":
        theta *= config.scale ** (config.head_dim / (config.head_dim - 2) if config.head_dim > 2 else 1)
    rope_scaling = None
    if method not in ("none", "ntk"):
        rope_scaling = {"rope_type": method, "type": method, "factor": config.scale}
    if method == "yarn":
        rope_scaling |= {ORIGINAL: config.original_window} | config.rope_extra
    if method == "llama3":
        rope_scaling |= {ORIGINAL: config.original_window}
        rope_scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | config.rope_extra
    eos = config.eos_id
    return {
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
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "max_position_embeddings": config.original_window if multiplied else config.block_size,
        **({"max_sequence_length": config.block_size} if multiplied else {}),
        "rope_theta": theta,
        "rope_scaling": rope_scaling,
        OUR_KEY: {
            "method": method,
            "scale": config.scale,
            "window": config.block_size,
            "original_window": config.original_window,
            "original_theta": config.rope_theta,
        },
    }


# ---- --scale and --rope ----------------------------------------------------------------------------------------


def extend(
    config: LLaMAConfig, scale: float | None = None, rope: str | None = None, insist: bool = False
) -> LLaMAConfig:
    """The config with its window at scale x the original one, by method `rope` (linear unless it has one already).

    Scales are counted from the window of pre-training, so linear 8 asked of a linear 4 gives linear 8, not 32.
    A checkpoint that already has a method keeps it, and does not shrink: another method or a smaller scale raises
    ValueError unless `insist` (on the command line: --rope together with --original_window).
    """
    if scale is None and rope is None:
        return config
    extended = config.rope != "none" or config.block_size != config.original_window
    rope = rope or (config.rope if extended else "linear")
    scale = config.scale if scale is None else scale
    if extended and not insist and (rope != config.rope or scale < config.scale):
        asked = f"--rope {rope}" if rope != config.rope else f"--scale {scale:g}"
        raise ValueError(
            f"{asked}: the checkpoint is already extended by rope {config.rope!r} at scale {config.scale:g} of its "
            f"original window {config.original_window}: leave it out, give a larger scale of that method, or insist "
            "with --rope and --original_window together"
        )
    if rope == config.rope and scale == config.scale:
        return config  # as it is: a window that is no product of the two (Llama 3.1's) stays
    # a method's ramp holds for another scale too; a factor on cos and sin was that of its scale
    extra = config.rope_extra if rope == config.rope else {}
    config = replace(config, rope_extra={key: value for key, value in extra.items() if key != "attention_factor"})
    new = replace(config, rope=rope, scale=float(scale))  # checks both before the window is computed from them
    return replace(new, block_size=max(1, round(config.original_window * scale)))


# ---- tensors in ------------------------------------------------------------------------------------------------


def _check(path: str | Path, expected: dict[str, tuple[int, ...]], found: dict[str, Stored]) -> None:
    """Names and shapes as the config says, before anything is read."""

    def harmless(name: str) -> bool:  # what real folders carry beside the weights, among it a tied head
        return name.endswith("rotary_emb.inv_freq") or name in ("rope.freqs", "lm_head.weight")

    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{path}: the tensor {name} is missing: its config and its weights don't belong together")
        if found[name][0] != shape:
            raise ValueError(f"{path}: the tensor {name} has shape {found[name][0]}, the config says {shape}")
    if extra := [name for name in found if name not in expected and not harmless(name)]:
        raise ValueError(f"{path}: the tensor {extra[0]} ({len(extra)} such) has no place in the LLaMA of its config")


def read_config(
    path: str | Path, original_window: int | None = None, *, scale: float | None = None, rope: str | None = None
) -> LLaMAConfig:
    """The config of a checkpoint, extended as `extend` says; what had to be assumed goes to standard error.

    path: whatever `load` takes.
    """
    if original_window is not None and original_window < 1:
        raise ValueError(f"--original_window must be a positive number of tokens, got {original_window}")
    folder = resolve(path)
    if is_meta(folder):
        config, note = meta_config(folder, original_window)
    elif (folder / "config.json").is_file():
        config, note = parse_config(read_json(folder / "config.json"), original_window)
    else:
        raise ValueError(f"{folder} is no checkpoint: it has no config.json (Hugging Face's) or params.json (Meta's)")
    if note:
        print(f"{path}: {note}", file=sys.stderr)
    extended = extend(config, scale, rope, insist=rope is not None and original_window is not None)
    if note and extended != config and config.rope in ("yarn", "llama3") and not is_meta(folder):
        raise ValueError(f"{path}: to extend it, its original window must be known: give --original_window ({note})")
    return extended


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer(path: str | Path, config: LLaMAConfig):
    """The tokenizer in a checkpoint's folder (tokenizer.Tokenizer), with the checkpoint's BOS and EOS.
    ValueError if there is none, or if it knows more tokens than the model."""
    import tokenizer as tokenizers  # here: tokenizer.py is read after this file, and builds on it

    folder = resolve(path)
    if is_meta(folder) and not _has_tokenizer(folder):
        folder = folder.parent  # LLaMA 1 came as tokenizer.model, 7B/, 13B/, ...
    tokenizer = tokenizers.load_tokenizer(folder, config.bos_id, config.first_eos_id)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    return tokenizer


def _open(path: str | Path, **flags) -> tuple[LLaMA, dict[str, Stored]]:
    """The model without its weights, on the meta device, and the tensors that fit it, not read yet."""
    config = read_config(path, **flags)
    found = stored_tensors(resolve(path))
    with torch.device("meta"):  # shapes alone: no memory, no time spent on random weights
        model = LLaMA(config)
    # a tied head is the embedding under a second name: named_parameters has it once
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    _check(path, expected, found)
    return model, {name: found[name] for name in expected}


def _read(path: str | Path, found: dict[str, Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each of found, one at a time; a tensor mapped from its file costs what is read of it."""
    small = sum(math.prod(shape) for shape, _ in found.values()) < 10**9
    for name in tqdm(list(found), f"reading {path}", unit="tensor", leave=False, disable=small):
        try:
            tensor = found.pop(name)[1]()
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path}: the tensor {name} can't be read ({error}): download its file again") from None
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(f"{path}: the tensor {name} is {tensor.dtype}, no floating point of at least 16 bits")
        yield name, tensor


def stored_weights(path: str | Path, **flags) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, as stored, of each weight of the model at path; a part of a tensor that is not looked at is
    not read from the disk. flags: scale, rope and original_window, as `load` takes them. ValueError as there."""
    return _read(path, _open(path, **flags)[1])


def load(
    path: str | Path,
    *,
    scale: float | None = None,
    rope: str | None = None,
    original_window: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LLaMA:
    """The model at path, in dtype (None: as stored), one tensor in memory at a time beside it.

    path: a Hugging Face folder, a hub id owner/name[@revision], or a folder as Meta publishes it.
    scale and rope extend it as `extend` says. ValueError, with one line, for whatever is wrong with it.
    """
    model, found = _open(path, scale=scale, rope=rope, original_window=original_window)
    for name, tensor in _read(path, found):
        owner, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device, dtype or tensor.dtype)))
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


# ---- tensors out -----------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place if the block succeeds and is removed if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # a full disk doesn't say where it is full
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def dump_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """value as an indented JSON file, whole or not at all."""
    with replacing(path) as temporary:
        dump_json(temporary, value)


def save(
    model: LLaMA, path: str | Path, tokenizer=None, *, dtype: torch.dtype | None = None, max_shard_size: float = 5e9
) -> None:
    """Write model (and tokenizer, anything with .save(folder)) as a Hugging Face folder.

    dtype: None keeps each tensor's. max_shard_size: bytes a file; a larger model is sharded with an index.
    The folder changes only once all of it is on disk. OSError if the disk doesn't take it.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n if n.startswith("lm_head") else f"model.{n}": p.detach() for n, p in model.named_parameters()}
    shards, sizes = [[]], [0.0]
    for name, weight in weights.items():
        size = weight.numel() * (dtype or weight.dtype).itemsize
        if shards[-1] and sizes[-1] + size > max_shard_size:
            shards.append([])
            sizes.append(0.0)
        shards[-1].append(name)
        sizes[-1] += size
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    stored = dtype or next(iter(weights.values())).dtype
    # every file is written under its temporary name before the first takes its own: a full disk leaves what was there,
    # and never a mixture of old and new shards
    with ExitStack() as stack:
        for file, names in tqdm(list(zip(files, shards)), f"writing {folder}", unit="file", disable=len(files) == 1):
            temporary = stack.enter_context(replacing(folder / file))
            try:
                save_file({n: weights[n].to("cpu", dtype).contiguous() for n in names}, temporary, {"format": "pt"})
            except SafetensorError as error:
                raise OSError(None, str(error), str(folder / file)) from None
        if len(shards) > 1:
            weight_map = {name: file for file, names in zip(files, shards) for name in names}
            index = {"metadata": {"total_size": int(sum(sizes))}, "weight_map": weight_map}
            dump_json(stack.enter_context(replacing(folder / INDEX)), index)
        dump_json(stack.enter_context(replacing(folder / "config.json")), hf_config(model.config, stored))
        if tokenizer is not None:
            tokenizer.save(folder)
    # weights that an earlier save left in another number of files would be read in place of these
    keep = {*files, INDEX if len(shards) > 1 else ""}
    for stale in (*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*")):
        if stale.name not in keep:
            stale.unlink()


# ---- what the command lines share --------------------------------------------------------------------------------


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in --help, but for those that are None: what these stand for is said in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with defaults in --help, and bad input as one line and exit code 2."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc.split("\n\n")[0], formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> None:
        sys.exit(_fail(message))


def add_extension_flags(parser: argparse.ArgumentParser) -> None:
    """--scale, --rope, --original_window."""
    add = parser.add_argument
    add("--scale", type=float, help="the window over the original one, L'/L; default: as the checkpoint is")
    add("--rope", help="what positions do: none, linear (Position Interpolation), ntk, dynamic, yarn, llama3; "
        "default: as the checkpoint is, or linear where --scale extends it")  # fmt: skip
    add("--original_window", type=int, help="the window of pre-training, where the checkpoint doesn't tell")


def extension(args: argparse.Namespace) -> dict:
    """What the flags of `add_extension_flags` say, as `read_config`, `load` and `stored_weights` take it."""
    return dict(scale=args.scale, rope=args.rope, original_window=args.original_window)


def add_model_flags(parser: argparse.ArgumentParser, init: str | None = None) -> None:
    """--init, --scale, --rope, --original_window, --device, --dtype, --seed."""
    add = parser.add_argument
    add("--init", default=init, help=f"the checkpoint: {FORMS}")
    add_extension_flags(parser)
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: a GPU where there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 where the GPU has it")
    add("--seed", type=int, default=0, help="of everything random")


def device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype mean on this machine."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} can't be used here: {str(error).splitlines()[0]}") from None
    if args.dtype == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return device, torch.bfloat16 if has_it else torch.float32
    return device, getattr(torch, args.dtype)


def load_from_flags(args: argparse.Namespace) -> LLaMA:
    """The model that the flags of `add_model_flags` ask for, ready to evaluate."""
    device, dtype = device_and_dtype(args)
    return load(args.init, **extension(args), device=device, dtype=dtype).eval()


def _fail(message: object) -> int:
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def run(main: Callable[[], None]) -> None:
    """Run a script's main. What the user can mend (ValueError, OSError) becomes one line and exit code 2."""
    try:
        main()
    except OSError as error:
        sys.exit(_fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error))
    except ValueError as error:
        sys.exit(_fail(error))
    except KeyboardInterrupt:
        sys.exit(130)


# ---- python checkpoint.py SRC [DST] ------------------------------------------------------------------------------


def describe(path: str | Path, config: LLaMAConfig, tokenizer, dtype: torch.dtype) -> str:
    """What a checkpoint is, a line for each fact."""
    shape = attrgetter("n_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size", "vocab_size", "original_window")
    known = [name for name in PRESETS if shape(LLaMAConfig.preset(name)) == shape(config)]
    facts = {
        "checkpoint": f"{path} ({'Meta' if is_meta(resolve(path)) else 'Hugging Face'} folder)",
        "family": known[0] if known else "LLaMA",
        "parameters": f"{config.n_params:,}",
        "layers": config.n_layer,
        "heads": f"{config.n_head} of {config.head_dim}, {config.n_kv_head} for keys and values",
        "window": config.block_size,
        "original window": config.original_window,
        "method": config.rope,
        "factor": f"{config.scale:g}",
        "rope_theta": f"{config.rope_theta:g}",
        "tokenizer": f"{next(iter(tokenizer.files))}, {tokenizer.vocab_size:,} tokens" if tokenizer else "none",
        "dtype": str(dtype).removeprefix("torch."),
    }
    return "\n".join(f"{name:17}{fact}" for name, fact in facts.items())


def _bytes(size: str) -> float:
    """The bytes of "5GB", "200MB", "1e9"."""
    unit = next((u for u in ("KB", "MB", "GB", "TB") if size.upper().endswith(u)), "")
    try:
        number = float(size[: len(size) - len(unit)]) * 1000 ** (["", "KB", "MB", "GB", "TB"].index(unit))
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise ValueError(f"--max_shard_size {size}: give a size such as 5GB or 200MB")
    return number


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("src", help=FORMS)
    add("dst", nargs="?", help="the Hugging Face folder to write; default: only say what SRC is")
    add_extension_flags(parser)
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of DST; auto: as stored")
    add("--max_shard_size", default="5GB", help="of each file of DST")
    args = parser.parse_args()
    limit, dtype = _bytes(args.max_shard_size), None if args.dtype == "auto" else getattr(torch, args.dtype)
    folder, flags = resolve(args.src), extension(args)
    if args.dst and Path(args.dst).resolve() == folder.resolve():
        raise ValueError(f"{args.dst} is the checkpoint itself: write to another folder")
    if args.dst:
        model = load(args.src, **flags)
        stored = next(model.parameters()).dtype
    else:
        model, found = _open(args.src, **flags)
        stored = found["norm.weight"][1]().dtype
    some = _has_tokenizer(folder) or is_meta(folder) and _has_tokenizer(folder.parent)
    tokenizer = load_tokenizer(args.src, model.config) if some else None
    if args.dst:
        save(model, args.dst, tokenizer, dtype=dtype, max_shard_size=limit)
    print(describe(args.dst or args.src, model.config, tokenizer, dtype or stored))


if __name__ == "__main__":
    run(main)
