"""Checkpoints on disk: read from wherever they come, and written as Hugging Face folders.

    python checkpoint.py SRC                  # what SRC is: window, method, scale, parameters, ...
    python checkpoint.py SRC DST --scale 8    # SRC extended by Position Interpolation, untrained

The scale of a checkpoint is written into its config.json, where other tools find it as well.
"""

import argparse
import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr
from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from cli import (
    CHECKPOINT_FORMS, Parser, add_extension_flags, can_be_written, extension, json_text, read_json,
    replacing, run
)
from hf_config import (
    OUR_KEY, extend, format_config, original_window_is_guessed, parse_config, parse_params
)
from model import PRESETS, LLaMA, LLaMAConfig
from tokenizer import COMPANION_FILES, TOKENIZER_FILES, Tokenizer, has_tokenizer
from tokenizer import load_tokenizer as read_tokenizer
from weights import Stored, checkpoints_in, has_own_head, is_meta, resolve, stored_tensors

INDEX = "model.safetensors.index.json"

# The note on a folder whose config.json and weights disagree
OWN_HEAD = (
    "lm_head.weight differs from embed_tokens.weight, so both are kept as transformers 5 does, "
    "although config.json says tie_word_embeddings"
)

# ---- reading -------------------------------------------------------------------------------------


def read_config(
    path: str | Path, original_window: int | None = None, *, scale: float | None = None,
    rope: str | None = None
) -> LLaMAConfig:
    """The config of a checkpoint, extended as hf_config.extend says.

    path: as in `load`.
    original_window: the window of pre-training, if the checkpoint does not tell.
    scale, rope: how to extend it; None: not at all.
    Prints what had to be assumed, in one line on standard error. Whether the head is tied to the
    embedding is read from the weights, where they contradict the config.
    """
    if original_window is not None and original_window < 1:
        raise ValueError(
            f"--original_window must be a positive number of tokens, got {original_window}"
        )
    folder = resolve(path)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json): merge it into its model first, with "
            "merge_and_unload() of peft, and remove its files"
        )
    guessed = False
    if is_meta(folder):
        config, note = parse_params(folder, original_window)
    elif (folder / "config.json").is_file():
        raw = read_json(folder / "config.json") | _generation_end(folder)
        config, note = parse_config(raw, original_window)
        guessed = original_window is None and original_window_is_guessed(raw)
    else:
        message = f"{folder} is no checkpoint: it has no config.json (Hugging Face's) or "
        message += "params.json (Meta's)"
        below = checkpoints_in(folder, levels=2)
        if below:
            message += f"; in it: {', '.join(map(str, below[:3]))}"
        elif (folder / "trainer").is_dir():
            message += "; a run that was stopped: python train.py --resume --out " + str(folder)
        raise ValueError(message)
    if config.tie_embeddings and _has_own_head(folder, _last_change(folder)):
        config = replace(config, tie_embeddings=False)
        notes = [note] if note else []
        note = "; ".join(notes + [OWN_HEAD])
    if note:
        print(f"{path}: {note}", file=sys.stderr)

    insist = rope is not None and original_window is not None
    extended = extend(config, scale, rope, insist)
    # As it is, a checkpoint is read as transformers reads it. A longer one would make the guess
    # part of its angles.
    if guessed and extended != config:
        raise ValueError(
            f"{path}: to extend it, its original window must be known: "
            f"give --original_window ({note})"
        )
    return extended


@cache  # because it reads two large matrices, and a script reads a config several times
def _has_own_head(folder: Path, last_change: int) -> bool:
    """weights.has_own_head for a folder. last_change: a folder that changes is read anew."""
    return has_own_head(stored_tensors(folder))


def _last_change(folder: Path) -> int:
    """When the files of a folder last changed, in nanoseconds."""
    return max(path.lstat().st_mtime_ns for path in folder.iterdir())


def _generation_end(folder: Path) -> dict:
    """The eos_token_id of generation_config.json, which counts before that of config.json.

    Llama 3 Instruct has its list there alone. Empty if there is none.
    """
    path = folder / "generation_config.json"
    eos = None
    if path.is_file():
        eos = read_json(path).get("eos_token_id")
    if eos is None:
        return {}
    return {"eos_token_id": eos}


def load_tokenizer(path: str | Path, config: LLaMAConfig) -> Tokenizer:
    """The tokenizer in a checkpoint's folder.

    If its files and the config name another BOS or EOS, the tokenizer's counts, and a line on
    standard error says so; another one says that it has tokens which the model doesn't know.
    Raises ValueError if there is none, or if the model doesn't know a token that is needed.
    """
    folder = resolve(path)
    tokenizer = read_tokenizer(_tokenizer_folder(folder), config.bos_id, config.first_eos_id)
    for name, ours, theirs in (
        ("BOS", tokenizer.bos_ids, id_list(config.bos_id)),
        ("EOS", tokenizer.eos_ids, id_list(config.eos_id)),
    ):
        if ours and theirs and ours[0] not in theirs:
            print(
                f"{path}: {name} is token {ours[0]} by the tokenizer, {theirs[0]} by the config: "
                "the tokenizer's is taken", file=sys.stderr
            )

    # A token for padding is often added to the tokenizer alone
    if tokenizer.vocab_size > config.vocab_size:
        beyond = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        largest = max([tokenizer.text_vocab_size - 1, *tokenizer.bos_ids, *tokenizer.eos_ids])
        if largest >= config.vocab_size:
            raise ValueError(f"{path}: {beyond}, and token {largest} is needed")
        print(f"{path}: {beyond}: the rest is left out, no text has it", file=sys.stderr)
        tokenizer = replace(tokenizer, vocab_size=config.vocab_size)
    return tokenizer


def id_list(ids: int | tuple[int, ...] | None) -> list[int]:
    """One token id, several or none, as a list."""
    if ids is None:
        return []
    if isinstance(ids, tuple):
        return list(ids)
    return [ids]


def end_ids(config: LLaMAConfig, tokenizer: Tokenizer) -> int | tuple[int, ...] | None:
    """The token, or the tokens, at which a generated text ends; None if there is none.

    These are the end tokens of the config and of the tokenizer. A config that says that a text
    ends at what is BOS by the tokenizer is wrong, as that of LLaMA 1's first folders.
    """
    ids = id_list(config.eos_id)
    if tokenizer.bos_id in ids and tokenizer.bos_id != tokenizer.eos_id:
        ids.remove(tokenizer.bos_id)
    for token_id in (*tokenizer.eos_ids, *tokenizer.stop_ids):
        if token_id not in ids:
            ids.append(token_id)
    if len(ids) > 1:
        return tuple(ids)
    return next(iter(ids), None)


def _tokenizer_folder(folder: Path) -> Path:
    """The folder that holds the tokenizer of a checkpoint, if it has one."""
    if is_meta(folder) and not has_tokenizer(folder):
        return folder.parent  # LLaMA 1 came as tokenizer.model, 7B/, 13B/, ...
    return folder


def load(
    path: str | Path, *, scale: float | None = None, rope: str | None = None,
    original_window: int | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None
) -> LLaMA:
    """The model of a checkpoint, read with one tensor in memory at a time beside it.

    path: a Hugging Face folder, a hub id owner/name[@revision], or a folder as Meta publishes it.
    scale, rope: how to extend it, see hf_config.extend.
    original_window: the window of pre-training, if the checkpoint does not tell.
    dtype: of the weights; None: as stored.
    Raises ValueError for whatever is wrong with the checkpoint.
    """
    model, tensors = _open(path, scale=scale, rope=rope, original_window=original_window)
    for name, tensor in _read(path, tensors):
        module, attribute = name.rsplit(".", 1)
        parameter = nn.Parameter(tensor.to(device, dtype or tensor.dtype))
        setattr(model.get_submodule(module), attribute, parameter)
    if model.config.tie_embeddings:
        # The loop has replaced the embedding alone: tie the head to it again
        model.lm_head.weight = model.embed_tokens.weight
    return model


def stored_weights(path: str | Path, **flags) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each weight of a checkpoint's model, one at a time, in the stored dtype.

    A tensor that is mapped from its file takes memory only for the part that is used.
    flags: scale, rope and original_window, as in `load`. Raises ValueError as `load` does.
    """
    _, tensors = _open(path, **flags)
    return _read(path, tensors)


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of a checkpoint's weights: that of the last norm, which every LLaMA has."""
    return stored_tensors(resolve(path))["norm.weight"].read().dtype


def _open(path: str | Path, **flags) -> tuple[LLaMA, dict[str, Stored]]:
    """The model without its weights, and the tensors that are its weights, not read yet."""
    config = read_config(path, **flags)
    found = stored_tensors(resolve(path))
    # On the meta device parameters have shapes but no memory, and no random weights are drawn
    with torch.device("meta"):
        model = LLaMA(config)
    if config.tie_embeddings and "embed_tokens.weight" not in found and "lm_head.weight" in found:
        # Of the two names of tied weights some tools keep the head's
        found["embed_tokens.weight"] = found["lm_head.weight"]
    # named_parameters has a tied head only once, as the embedding
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    _compare_tensors(path, shapes, found)
    return model, {name: found[name] for name in shapes}


def _compare_tensors(
    path: str | Path, shapes: dict[str, tuple[int, ...]], found: dict[str, Stored]
) -> None:
    """Raise ValueError if the tensors of a folder are not those of the model.

    shapes: the model's, by name.  found: what is in the folder.
    """
    for name in found:
        if name.endswith(".qweight"):
            raise ValueError(
                f"{path}: the tensor {name} is quantized, by GPTQ or AWQ: quantized weights are "
                "not read here"
            )
    for name, shape in shapes.items():
        if name not in found:
            reason = "its config and its weights don't belong together"
            for other in found:
                if other.endswith(f".{name}"):
                    reason = f"there is {other}, with a prefix that is unknown here"
            raise ValueError(f"{path}: the tensor {name} is missing: {reason}")
        if found[name].shape != shape:
            raise ValueError(
                f"{path}: the tensor {name} has shape {found[name].shape}, the config says {shape}"
            )
    unknown = [name for name in found if name not in shapes and not _is_redundant(name)]
    if unknown:
        raise ValueError(
            f"{path}: the tensor {unknown[0]} ({len(unknown)} such) "
            "has no place in the LLaMA of its config"
        )


def _is_redundant(name: str) -> bool:
    """Whether a tensor may be there that is no parameter: RoPE's angles, or a tied head's copy."""
    return name.endswith("rotary_emb.inv_freq") or name in ("rope.freqs", "lm_head.weight")


def _read(path: str | Path, tensors: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each of `tensors`, which is emptied on the way to free what was read."""
    n_weights = sum(math.prod(stored.shape) for stored in tensors.values())
    names = tqdm(
        list(tensors), f"reading {path}", unit="tensor", leave=False, disable=n_weights < 10**9
    )
    for name in names:
        try:
            tensor = tensors.pop(name).read()
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{path}: the tensor {name} can't be read ({error}): download its file again"
            ) from None
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(
                f"{path}: the tensor {name} is {tensor.dtype}, no floating point of at least "
                "16 bits: quantized weights are not read here"
            )
        yield name, tensor


# ---- writing -------------------------------------------------------------------------------------


def save(
    model: LLaMA, path: str | Path, tokenizer: Tokenizer | None = None, *,
    dtype: torch.dtype | None = None, max_shard_size: float | str = "5GB",
    gather: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Write a model, and its tokenizer, as a Hugging Face folder.

    dtype: of the weights; None: as in the model.
    max_shard_size: of each weight file, in bytes or as "5GB"; a larger model gets several files
        and an index. Beside the model, one file's weights are in memory at a time.
    gather: makes a weight whole that is shared out among processes. It is called once for each
        weight, in the order of `saving_order`.
    The folder changes only once all of it is on disk. Raises OSError if the disk is full.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = _weights_to_save(model)
    plan = _plan_files(weights, dtype, max_shard_size)
    files = plan.filename_to_tensors  # file name -> names of its tensors

    model_config = model.config
    if tokenizer is not None:
        model_config = _with_special_ids(model_config, tokenizer)
        tokenizer = tokenizer.for_model(
            model_config.block_size, model_config.bos_id, model_config.eos_id
        )
    config = format_config(model_config, dtype or next(iter(weights.values())).dtype)
    texts = {"config.json": json_text(config)}
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        texts[INDEX] = json_text(index)

    # Write every file under its temporary name before the first takes its own. A full disk then
    # leaves the folder as it was, and never with a mixture of old and new files.
    with ExitStack() as stack:
        progress = tqdm(files, f"writing {folder}", unit="file", disable=not plan.is_sharded)
        for file in progress:
            temporary = stack.enter_context(replacing(folder / file))
            copies = {}
            for name in files[file]:
                copies[name] = _on_cpu(weights[name], dtype, gather)
            _write_weights(copies, temporary)
        for file, text in texts.items():
            temporary = stack.enter_context(replacing(folder / file))
            temporary.write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)

    kept = {*files, *texts}
    if tokenizer is not None:
        kept.update(tokenizer.files)
    _remove_old_files(folder, kept, with_tokenizer=tokenizer is not None)


def saving_order(
    model: LLaMA, dtype: torch.dtype | None = None, max_shard_size: float | str = "5GB"
) -> list[Tensor]:
    """The weights in the order in which `save` with the same arguments writes them."""
    weights = _weights_to_save(model)
    plan = _plan_files(weights, dtype, max_shard_size)
    ordered = []
    for names in plan.filename_to_tensors.values():
        ordered += [weights[name] for name in names]
    return ordered


def _weights_to_save(model: LLaMA) -> dict[str, Tensor]:
    """The weights of a model by their names in a Hugging Face folder."""
    weights = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("lm_head"):
            name = f"model.{name}"
        weights[name] = parameter.detach()
    return weights


def _plan_files(
    weights: dict[str, Tensor], dtype: torch.dtype | None, max_shard_size: float | str
) -> StateDictSplit:
    """Which weight goes into which file."""
    # This takes only shapes and dtypes, so that tensors on the meta device, which have no memory,
    # can stand for the weights
    planned = {}
    for name, weight in weights.items():
        planned[name] = torch.empty(weight.shape, dtype=dtype or weight.dtype, device="meta")
    return split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)


def _on_cpu(
    weight: Tensor, dtype: torch.dtype | None, gather: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """A weight as it is written: whole, on the CPU, in a dtype (None: its own)."""
    if gather is not None:
        weight = gather(weight)
    return weight.to("cpu", dtype).contiguous()


def _remove_old_files(folder: Path, kept: set[str], with_tokenizer: bool) -> None:
    """Remove weights, and with a tokenizer files about tokens, that an earlier save left.

    They would be read in place of the new files, or beside them.
    """
    patterns = ("model*.safetensors*", "pytorch_model*.bin*")
    if with_tokenizer:
        patterns += TOKENIZER_FILES + COMPANION_FILES
    for pattern in patterns:
        for old in folder.glob(pattern):
            if old.name not in kept:
                old.unlink()


def _with_special_ids(config: LLaMAConfig, tokenizer: Tokenizer) -> LLaMAConfig:
    """A config that names BOS and the end tokens as they are with this tokenizer."""
    config = replace(config, eos_id=end_ids(config, tokenizer))
    if tokenizer.bos_id is not None:
        config = replace(config, bos_id=tokenizer.bos_id)
    return config


def _write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write tensors, which lie on the CPU, as a .safetensors file."""
    try:
        save_file(weights, path, {"format": "pt"})
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(str(error)) from None


# ---- the command ---------------------------------------------------------------------------------


def describe(
    path: str | Path, config: LLaMAConfig, tokenizer: Tokenizer | None, dtype: torch.dtype
) -> str:
    """What a checkpoint is, one line for each fact."""
    form = "Hugging Face"
    if is_meta(resolve(path)):
        form = "Meta"
    tokens = "none"
    if tokenizer is not None:
        tokens = f"{next(iter(tokenizer.files))}, {tokenizer.vocab_size:,} tokens"
    facts = {
        "checkpoint": f"{path} ({form} folder)",
        "family": _family(config),
        "parameters": f"{config.n_params:,}",
        "layers": config.n_layer,
        "heads": f"{config.n_head} of {config.head_dim}, {config.n_kv_head} for keys and values",
        "window": config.block_size,
        "original window": config.original_window,
        "method": config.rope,
        "factor": f"{config.scale:g}",
        "rope_theta": f"{config.rope_theta:g}",
        "tokenizer": tokens,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return "\n".join(f"{name:17}{fact}" for name, fact in facts.items())


def _family(config: LLaMAConfig) -> str:
    """The first preset that has the shape and the original window of a config, or "LLaMA"."""
    shape = attrgetter(
        "n_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size", "vocab_size",
        "original_window"
    )
    for name in PRESETS:
        if shape(LLaMAConfig.preset(name)) == shape(config):
            return name
    return "LLaMA"


def shard_size(text: str) -> str:
    """An argparse type: a size such as 5GB or 200MB."""
    size = re.fullmatch(r"(\d+|\d*\.\d+) ?[KMGT]B", text, re.IGNORECASE)
    if size is None or float(size[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size: give one such as 5GB or 200MB")
    return text


def check_destination(dst: str, folder: Path) -> None:
    """Raise ValueError if DST can't be written, or holds what a copy must not replace.

    folder: that of SRC. What this command wrote earlier is replaced.
    """
    path = Path(dst)
    if path.resolve() == folder.resolve():
        raise ValueError(f"{dst} is the checkpoint itself: write to another folder")
    if path.is_file():
        raise ValueError(f"{dst} is a file: give a folder to write to")
    if not can_be_written(path / "config.json"):
        raise ValueError(f"{dst} can't be written: give another folder")
    if not path.is_dir() or not any(path.iterdir()):
        return
    content = "files that are no checkpoint"
    if (path / "log.jsonl").exists() or (path / "trainer").exists():
        content = "a run of train.py"
    elif (path / "config.json").is_file():
        if OUR_KEY in read_json(path / "config.json"):
            return
        content = "a checkpoint that was not written here"
    elif is_meta(path):
        content = "a checkpoint of Meta's"
    raise ValueError(f"{dst} holds {content}: give a new folder, or remove it first")


def advice(src: str, dst: str, config: LLaMAConfig, stored: LLaMAConfig) -> str:
    """What a model that was extended but not trained is good for, in one line; "" if it wasn't.

    config: that of DST.  stored: that of SRC.
    """
    if config == stored or config.rope not in ("linear", "none"):
        return ""
    state = "interpolated"
    if config.rope == "none":
        state = "extrapolated"
    return (
        f"{dst}: {state} but not fine-tuned, it reads far worse than it could: fine-tune it "
        f"(python train.py --init {src} --scale {config.scale:g} --rope {config.rope}), or to use "
        "it as it is, take --rope yarn or ntk"
    )


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("src", help=CHECKPOINT_FORMS)
    add("dst", nargs="?", help="the Hugging Face folder to write; default: only say what SRC is")
    add_extension_flags(parser)
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="of DST; auto: as stored")
    add("--max_shard_size", type=shard_size, default="5GB", help="of each file of DST")
    args = parser.parse_args()
    folder = resolve(args.src)
    if args.dst:
        check_destination(args.dst, folder)

    dtype = None
    if args.dtype != "auto":
        dtype = getattr(torch, args.dtype)

    # Read everything before the first file is written, so that bad input leaves nothing behind.
    # Only a copy needs all weights; to describe a checkpoint, one small tensor is enough.
    flags = extension(args)
    if args.dst:
        model = load(args.src, **flags)
    else:
        model, _ = _open(args.src, **flags)

    tokenizer = None
    if has_tokenizer(_tokenizer_folder(folder)):
        tokenizer = load_tokenizer(args.src, model.config)

    if args.dst:
        save(model, args.dst, tokenizer, dtype=dtype, max_shard_size=args.max_shard_size)
        with redirect_stderr(io.StringIO()):  # what had to be assumed is said already
            stored = read_config(args.src, args.original_window)
        note = advice(args.src, args.dst, model.config, stored)
        if note:
            print(note, file=sys.stderr)
    print(describe(args.dst or args.src, model.config, tokenizer, dtype or stored_dtype(args.src)))


if __name__ == "__main__":
    run(main)
