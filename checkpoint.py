"""Weights on disk: Hugging Face LLaMA folders in and out, with the scale intact.

Read rope.py and model.py first. The one format that this repo writes is the Hugging Face folder (config.json,
model.safetensors, tokenizer files), because everything opens it: transformers, vLLM, llama.cpp's converter,
lm-eval. The scale lives in config.json, in the keys that those read, so that it can't be lost.

    model = load("out/base")                    # as it is
    model = load("out/base", scale=8)           # its window extended by Position Interpolation, no fine-tuning
    save(model, "out/pi-8", tokenizer)

In order: what a config.json says (`parse_config`), what we write (`hf_config`), what --scale and --rope make of
a checkpoint (`extend`), tensors in (`load`), tensors out (`save`), and what all command lines here share.
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
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import LLaMA, LLaMAConfig

OUR_KEY = "position_interpolation"  # in config.json, ignored by others: method, scale, original window and theta
INDEX = "model.safetensors.index.json"
EXTRAS = {"yarn": ("beta_fast", "beta_slow", "attention_factor"), "llama3": ("low_freq_factor", "high_freq_factor")}

# ---- config.json in ------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """A JSON object from a file. ValueError naming the file if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): is the file truncated?") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def parse_config(raw: dict, original_window: int | None = None) -> tuple[LLaMAConfig, str]:
    """What a Hugging Face config.json says, and a note on what had to be assumed ("" where nothing was).

    max_position_embeddings M means different things beside `linear` and `dynamic`: the original window in Vicuna
    and LongChat (engines multiply it by the factor), the extended one in LLaMA-2-7B-32K and NeMo's exports. In
    order of trust: original_window; our own key; original_max_position_embeddings; max_sequence_length; else M is
    the original, unless no LLaMA was pre-trained at such a window without a method of its own: more than 8,192, or
    more than 4,096 with the theta of Llama 1 and 2. For yarn and llama3 without the original, M is it, as in
    transformers. ValueError for what is not a LLaMA or contradicts itself.
    """
    if (family := raw.get("model_type", "llama")) != "llama":
        raise ValueError(f"config.json: model_type is {family!r}, only 'llama' is known here")
    for key, want in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("partial_rotary_factor", 1.0)):
        if (raw.get(key) or want) != want:
            raise ValueError(f"config.json: {key} is {raw[key]!r}, a LLaMA has {want!r}")
    if raw.get("quantization_config"):
        raise ValueError("config.json: quantization_config: quantized weights are not read here, take the checkpoint as it was before")
    ours = dict(
        vocab_size="vocab_size", n_layer="num_hidden_layers", n_head="num_attention_heads", n_embd="hidden_size",
        intermediate_size="intermediate_size", block_size="max_position_embeddings",
    )  # fmt: skip
    optional = ("num_key_value_heads", "head_dim", "bos_token_id", "max_sequence_length", "original_max_position_embeddings")
    for key in (*ours.values(), *optional):
        if type(raw.get(key)) is not int and not (key in optional and raw.get(key) is None):
            raise ValueError(f"config.json: {key} should be a whole number, found {raw.get(key)!r}")
    # older configs say rope_theta and rope_scaling, newer ones rope_parameters for both
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"config.json: {key} should be a JSON object or null, found {raw[key]!r}")
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    method = rope.get("rope_type", rope.get("type", "default"))
    method = "none" if method == "default" else method
    if method not in ("none", "linear", "dynamic", "yarn", "llama3"):
        raise ValueError(f"config.json: rope_type {method!r} is unknown here: none, linear, dynamic, yarn or llama3")
    known = {"rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "finetuned"}
    if unknown := set(rope) - known - set(EXTRAS.get(method, ())):
        raise ValueError(f"config.json: rope_scaling has keys that {method!r} doesn't know: {', '.join(sorted(unknown))}")
    scale = rope.get("factor", None if method != "none" else 1.0)
    numbers = {"factor": scale, "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
               "rms_norm_eps": raw.get("rms_norm_eps", 1e-6)}  # fmt: skip
    for key, value in (numbers | {key: rope[key] for key in EXTRAS.get(method, ()) if rope.get(key) is not None}).items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"config.json: {key} should be a finite number, found {value!r}")
    eos = raw.get("eos_token_id")
    if not all(type(i) is int for i in (eos if isinstance(eos, list) else [eos]) if i is not None):
        raise ValueError(f"config.json: eos_token_id should be a token id or a list of them, found {eos!r}")
    config = LLaMAConfig(
        **{name: raw[key] for name, key in ours.items()},
        n_kv_head=raw.get("num_key_value_heads") or 0,
        head_dim=raw.get("head_dim") or 0,
        norm_eps=numbers["rms_norm_eps"],
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope_theta=float(numbers["rope_theta"]),
        bos_id=raw.get("bos_token_id"),
        eos_id=tuple(eos) if isinstance(eos, list) else eos,
        rope_extra={key: rope[key] for key in EXTRAS.get(method, ()) if rope.get(key) is not None},
    )
    if original_window is not None and original_window < 1:
        raise ValueError(f"--original_window must be a positive number of tokens, got {original_window}")
    inside = rope.get("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    if inside is not None and (type(inside) is not int or inside < 1):
        raise ValueError(f"config.json: original_max_position_embeddings should be a positive whole number, found {inside!r}")
    longest, window = raw.get("max_sequence_length"), config.block_size
    if OUR_KEY in raw:
        return _recorded(config, raw[OUR_KEY], (method, float(scale), window, longest), original_window), ""
    note = ""
    if method == "none":  # a window that was extended by direct fine-tuning looks like any other: only the flag can tell
        original = original_window or window
        if original > window:
            raise ValueError(f"--original_window {original} is above the checkpoint's window {window}: leave the flag out")
        scale = window / original
    elif method in ("linear", "dynamic"):
        original = original_window or inside
        if original is None:
            original = window
            trained = 4096 if config.rope_theta == 10000.0 else 8192
            if longest == window and scale > 1 or longest is None and window > trained:
                original = round(window / scale)
            if longest not in (window, round(window * scale)):
                note = (
                    f"max_position_embeddings {window} beside rope {method!r} with factor {scale:g} is taken for the "
                    f"{'original' if original == window else 'extended'} window: original {original}, extended "
                    f"{round(original * scale)}; --original_window N settles it"
                )
        window = round(original * scale)
    else:
        original = original_window or inside
        if original is None:
            original = window
            note = (
                f"rope {method!r} without original_max_position_embeddings: max_position_embeddings {window} is taken for the "
                "original window, as transformers does; --original_window N settles it"
            )
        window = window if window > original else round(original * scale)
    return replace(config, rope=method, scale=float(scale), original_window=original, block_size=window), note


def _recorded(config: LLaMAConfig, own: dict, found: tuple, asked: int | None) -> LLaMAConfig:
    """The config by our own key, which must agree with the keys that others read; found: what they say."""
    try:
        ours = replace(
            config, rope=own["method"], scale=float(own["scale"]), original_window=int(own["original_window"]),
            rope_theta=float(own["original_theta"]), block_size=int(own["window"]),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json: {OUR_KEY} is incomplete ({error!r}): remove it to read the other keys alone") from None
    mine = hf_config(ours)
    scaling = mine["rope_scaling"] or {"rope_type": "none", "factor": 1.0}
    wrote = (scaling["rope_type"], scaling["factor"], mine["max_position_embeddings"], mine.get("max_sequence_length"))
    if found != wrote or abs(mine["rope_theta"] / config.rope_theta - 1) > 1e-6:
        raise ValueError(
            f"config.json contradicts itself: by {OUR_KEY} (rope type, factor, max_position_embeddings, max_sequence_length, "
            f"rope_theta) are {(*wrote, mine['rope_theta'])}, found {(*found, config.rope_theta)}: remove what is wrong"
        )
    if asked not in (None, ours.original_window):
        raise ValueError(
            f"--original_window {asked} contradicts the checkpoint, which records {ours.original_window}: leave the flag out"
        )
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
        rope_scaling |= {"original_max_position_embeddings": config.original_window} | config.rope_extra
    if method == "llama3":
        rope_scaling |= {"original_max_position_embeddings": config.original_window}
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


def extend(config: LLaMAConfig, scale: float | None = None, rope: str | None = None, insist: bool = False) -> LLaMAConfig:
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
    is_now = f"the checkpoint is already extended by rope {config.rope!r} at scale {config.scale:g} (original window "
    is_now += f"{config.original_window})"
    if extended and not insist:
        if rope != config.rope:
            raise ValueError(f"--rope {rope}: {is_now}: leave --rope out, or give it together with --original_window")
        if scale < config.scale:
            raise ValueError(f"--scale {scale:g}: {is_now}: scales count from there; give a larger one, or --rope and --original_window")
    if rope == config.rope and scale == config.scale:
        return config  # as it is: a window that is no product of the two (Llama 3.1's) stays
    # what a method was tuned with holds for another scale too, but for a factor on cos and sin, which follows from the scale
    extra = config.rope_extra if rope == config.rope else {}
    config = replace(config, rope_extra={key: value for key, value in extra.items() if key != "attention_factor"})
    new = replace(config, rope=rope, scale=float(scale))  # checks both before the window is computed from them
    return replace(new, block_size=max(1, round(config.original_window * scale)))


# ---- tensors in ------------------------------------------------------------------------------------------------

# a tensor that is there: its shape, and a function that reads it
Stored = tuple[tuple[int, ...], Callable[[], Tensor]]


def _index(folder: Path, name: str) -> dict[str, Path]:
    """tensor name -> file, from `name`.index.json. A file name that would leave the folder is refused."""
    path = folder / name
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path} has no weight_map of tensor names to file names")
    for file in set(weight_map.values()):
        if Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{path} points outside its folder: {file!r}")
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing: {name} lists it, download it again")
    return {tensor: folder / file for tensor, file in weight_map.items()}


def _open_safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = safe_open(path, framework="pt")
        return {key: (tuple(file.get_slice(key).get_shape()), lambda key=key: file.get_tensor(key)) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again") from None


def _open_pickle(path: Path) -> dict[str, Stored]:
    """A .bin or .pth of tensors, memory-mapped; a pickle that would run code is refused by weights_only."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can end in any of them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a whole file of tensors alone, which is all that is opened here ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} holds something else than a dictionary of tensors")
    return {key: (tuple(tensor.shape), lambda tensor=tensor: tensor) for key, tensor in tensors.items()}


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder by our names (its own without the leading "model."); nothing is read yet."""
    for open_file, single in ((_open_safetensors, "model.safetensors"), (_open_pickle, "pytorch_model.bin")):
        index = f"{single}.index.json"
        if (folder / single).is_file():
            found = open_file(folder / single)
        elif (folder / index).is_file():
            files = _index(folder, index)
            shards = {path: open_file(path) for path in sorted(set(files.values()))}
            for name, path in files.items():
                if name not in shards[path]:
                    raise ValueError(f"{path} lacks the tensor {name} that {index} promises: download it again")
            found = {name: shards[path][name] for name, path in files.items()}
        else:
            continue
        return {name.removeprefix("model."): stored for name, stored in found.items()}
    raise ValueError(f"{folder} has a config.json but no model.safetensors or pytorch_model.bin (or their .index.json)")


def _check(config: LLaMAConfig, expected: dict[str, tuple[int, ...]], found: dict[str, Stored], folder: Path) -> None:
    """Names and shapes as the config says, before anything is read."""

    def harmless(name: str) -> bool:  # what real folders carry beside the weights
        return name.endswith("rotary_emb.inv_freq") or name == "rope.freqs" or name == "lm_head.weight" and config.tie_embeddings

    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{folder}: the tensor {name} is missing: config.json and weights don't belong together")
        if found[name][0] != shape:
            raise ValueError(f"{folder}: the tensor {name} has shape {found[name][0]}, config.json says {shape}")
    if extra := [name for name in found if name not in expected and not harmless(name)]:
        raise ValueError(f"{folder}: the tensor {extra[0]} is not one of this LLaMA's ({len(extra)} such): config.json doesn't fit")


def read_config(
    path: str | Path, original_window: int | None = None, *, scale: float | None = None, rope: str | None = None
) -> LLaMAConfig:
    """The config of a checkpoint, extended as `extend` says; what had to be assumed goes to standard error."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {what}: --init takes a Hugging Face LLaMA folder (config.json, model.safetensors)")
    config, note = parse_config(read_json(folder / "config.json"), original_window)
    if note:
        print(f"{folder}: {note}", file=sys.stderr)
    extended = extend(config, scale, rope, insist=rope is not None and original_window is not None)
    if note and extended != config and config.rope not in ("none", "linear"):
        raise ValueError(f"{folder}: to extend it, its original window must be known: give --original_window ({note})")
    return extended


def load(
    path: str | Path,
    *,
    scale: float | None = None,
    rope: str | None = None,
    original_window: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LLaMA:
    """The model in a folder, in dtype (None: as stored), one tensor in memory at a time beside it.

    scale and rope extend it as `extend` says. ValueError, with one line, for whatever is wrong with the folder.
    """
    folder = Path(path)
    config = read_config(folder, original_window, scale=scale, rope=rope)
    found = stored_tensors(folder)
    with torch.device("meta"):  # shapes alone: no memory, no time spent on random weights
        model = LLaMA(config)
    # a tied head is the embedding under a second name: named_parameters has it once
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    _check(config, expected, found, folder)
    for name in expected:
        owner, leaf = name.rsplit(".", 1)
        try:
            tensor = found[name][1]()
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder}: the tensor {name} can't be read ({error}): download its file again") from None
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(f"{folder}: the tensor {name} is {tensor.dtype}: only weights in floating point are read here")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device, dtype or tensor.dtype)))
    if config.tie_embeddings:
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


def save(model: LLaMA, path: str | Path, tokenizer=None, *, dtype: torch.dtype | None = None, max_shard_size: float = 5e9) -> None:
    """Write model (and tokenizer, anything with .save(folder)) as a Hugging Face folder.

    dtype: None keeps each tensor's. max_shard_size: bytes a file; a larger model is sharded with an index.
    The folder changes only once all of it is on disk. OSError if the disk doesn't take it.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name if name.startswith("lm_head") else f"model.{name}": p.detach() for name, p in model.named_parameters()}
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
        for file, names in zip(files, shards):
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


class Parser(argparse.ArgumentParser):
    """argparse, with defaults in --help, and bad input as one line and exit code 2."""

    def __init__(self, doc: str) -> None:
        super().__init__(
            description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> None:
        sys.exit(_fail(message))


def add_model_flags(parser: argparse.ArgumentParser, init: str | None = None) -> None:
    """--init, --scale, --rope, --original_window, --device, --dtype, --seed."""
    add = parser.add_argument
    add("--init", default=init, help="the checkpoint: a Hugging Face LLaMA folder")
    add("--scale", type=float, help="the window over the original one, L'/L; None: as the checkpoint is")
    add("--rope", help="what positions do: none, linear (Position Interpolation), ntk, dynamic, yarn, llama3; "
        "None: as the checkpoint is, or linear where --scale extends it")  # fmt: skip
    add("--original_window", type=int, help="the window of pre-training, where the checkpoint doesn't tell")
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
        return device, torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return device, getattr(torch, args.dtype)


def load_from_flags(args: argparse.Namespace) -> LLaMA:
    """The model that the flags of `add_model_flags` ask for, ready to evaluate."""
    device, dtype = device_and_dtype(args)
    flags = dict(scale=args.scale, rope=args.rope, original_window=args.original_window)
    return load(args.init, **flags, device=device, dtype=dtype).eval()


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
