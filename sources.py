"""Where weights come from: a Hugging Face folder, a hub id, or a folder as Meta publishes it.

Read model.py first; checkpoint.py builds on this. Whatever the form is, what comes out is the same: a folder on this
disk (`resolve`), and its tensors by this repo's names, each with its shape and a function that reads it
(`stored_tensors`), so that nothing is in memory before it is wanted, and then one tensor at a time.

    folder = resolve("huggyllama/llama-7b@main")        # fetched, or found in the hub's cache
    shape, read = stored_tensors(folder)["layers.0.self_attn.q_proj.weight"]

Files are only ever read as tensors: pickles are opened with weights_only=True, and no index leaves its folder.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import LLaMAConfig
from rope import interleaved_to_half

# a tensor that is there: its shape, and a function that reads it
Stored = tuple[tuple[int, ...], Callable[[], Tensor]]


def read_json(path: Path) -> dict:
    """A JSON object from a file. ValueError naming the file if it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): is the file truncated?") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


# ---- hub ids -------------------------------------------------------------------------------------------------

# what is fetched beside the weights: nothing that only other programs read
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]  # fmt: skip
# weights by preference; the last of each finds them
WEIGHTS = (["model*.safetensors*"], ["pytorch_model*.bin*"], ["params.json", "consolidated.*.pth"])


def resolve(init: str | Path) -> Path:
    """The folder that --init means: a folder as it is; owner/name[@revision] on the hub, fetched into its cache.

    ValueError, with one line that says what to do, for what is neither or can't be fetched.
    """
    if Path(init).is_dir():
        return Path(init)
    found = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", str(init))
    if not found or Path(init).exists():
        raise ValueError(f"{init} is neither a folder nor a hub id (owner/name or owner/name@revision)")
    return _fetch(str(init), *found.groups())


@cache  # several functions ask for the same checkpoint, and should get the same one
def _fetch(init: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        for weights in WEIGHTS:
            wanted = dict(allow_patterns=[*SMALL_FILES, *weights], ignore_patterns=["*/*"])
            folder = Path(snapshot_download(name, revision=revision, **wanted))
            if any(folder.glob(weights[-1])):
                return folder
    except errors.GatedRepoError:
        reason = f"is gated: accept its licence at https://huggingface.co/{name}, then log in with: hf auth login"
    except errors.RepositoryNotFoundError:
        reason = "is neither a folder here nor a model on the hub (if it is private, log in with: hf auth login)"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}: see https://huggingface.co/{name}/commits/main"
    except errors.HfHubHTTPError as error:
        reason = f"can't be fetched, the hub answers: {str(error).splitlines()[0]}"
    except Exception as error:  # offline; the libraries beneath have their own errors for a connection that fails
        kind = type(error.__cause__ or error).__name__
        reason = (
            f"is not a folder here, not whole in the hub's cache, and the hub can't be reached ({kind}): check the "
            "connection and that HF_HUB_OFFLINE is not set, or give a folder"
        )
    else:
        reason = "holds no weights that are read here: model.safetensors, pytorch_model.bin or consolidated.00.pth"
    raise ValueError(f"{init} {reason}")


# ---- Hugging Face folders --------------------------------------------------------------------------------------


def _index(folder: Path, name: str) -> dict[str, Path]:
    """tensor name -> file, from an index. A file name that would leave the folder is refused."""
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
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        return {key: (shape, lambda key=key: file.get_tensor(key)) for key, shape in shapes.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again") from None


def _open_pickle(path: Path) -> dict[str, Stored]:
    """A .bin or .pth of tensors, memory-mapped; a pickle that would run code is refused by weights_only."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can end in any of them
        if isinstance(error, OSError) and error.filename:  # but the system's own say which file it is about
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a whole file of nothing but tensors: download it again ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} holds something else than a dictionary of tensors")
    return {key: (tuple(tensor.shape), lambda tensor=tensor: tensor) for key, tensor in tensors.items()}


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by our names: Hugging Face's without the leading "model."; nothing is read yet."""
    if is_meta(folder):
        return _meta_tensors(folder)
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


# ---- Meta's folders: params.json and consolidated.NN.pth, a file for each of the processes that ran it ----------

# Meta's name: ours, and the dimension along which the files split it (None: each has all of it)
META_NAMES = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
    "tok_embeddings": ("embed_tokens", 0),  # Llama 3; Llama 1 and 2 by columns, which the shape tells
    "norm": ("norm", None),
    "output": ("lm_head", 0),
}


def is_meta(folder: Path) -> bool:
    return (folder / "params.json").is_file() and not (folder / "config.json").is_file()


def _params(folder: Path) -> dict:
    """params.json, its values checked."""
    path = folder / "params.json"
    params = read_json(path)
    for key, kind in (("dim", int), ("n_layers", int), ("n_heads", int), ("n_kv_heads", int), ("multiple_of", int),
                      ("vocab_size", int), ("ffn_dim_multiplier", float), ("norm_eps", float), ("rope_theta", float),
                      ("rope_scaling_factor", float)):  # fmt: skip
        value, needed = params.get(key), key in ("dim", "n_layers", "n_heads")
        if (value is None and needed) or (value is not None and type(value) not in (int, kind)):
            raise ValueError(f"{path}: {key} should be a number, found {value!r}")
        if kind is int and key != "vocab_size" and value is not None and value < 1:
            raise ValueError(f"{path}: {key} must be at least 1, found {value}")
    return params


def _meta_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a Meta folder by our names, the files' parts joined, wq and wk in our layout, when read."""
    params, paths = _params(folder), sorted(folder.glob("consolidated.*.pth"))
    dim_model, n_head = params["dim"], params["n_heads"]
    for i in range(max(len(paths), 1)):
        if not (folder / f"consolidated.{i:02d}.pth").is_file():
            raise ValueError(f"{folder / f'consolidated.{i:02d}.pth'} is missing: download it again")
    files = [_open_pickle(path) for path in paths]
    for path, file in zip(paths, files):
        other = {name for name in {*files[0], *file} if file.get(name, (0,))[0] != files[0].get(name, (0,))[0]}
        if other:
            raise ValueError(f"{path} doesn't go with {paths[0].name}: {min(other)} is missing or of another shape")

    def stored(name: str, kind: str, dim: int | None) -> Stored:
        parts, shape = [file[name] for file in files], list(files[0][name][0])
        if kind == "tok_embeddings" and shape[-1] != dim_model:
            dim = 1
        if dim is not None:
            shape[dim] *= len(files)
        heads = {"attention.wq": n_head, "attention.wk": params.get("n_kv_heads") or n_head}.get(kind)

        def read() -> Tensor:
            tensors = [read_part() for _, read_part in (parts if dim is not None else parts[:1])]
            tensor = torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]
            return interleaved_to_half(tensor, heads) if heads else tensor

        return tuple(shape), read

    tensors = {}
    for name in files[0]:
        layer, kind = re.fullmatch(r"(layers\.\d+\.)?(.*?)(?:\.weight)?", name).groups()
        ours, dim = META_NAMES.get(kind, (None, None))
        if ours and len(files[0][name][0]) == (1 if dim is None else 2):
            tensors[f"{layer or ''}{ours}.weight"] = stored(name, kind, dim)
        else:
            tensors[name] = files[0][name]  # rope.freqs, or something that the model has no place for
    return tensors


def meta_config(folder: Path, original_window: int | None = None) -> tuple[LLaMAConfig, str]:
    """What a Meta folder says, and a note on what had to be assumed: params.json holds no window and no token ids."""
    params, tensors = _params(folder), _meta_tensors(folder)
    if "embed_tokens.weight" not in tensors:
        raise ValueError(f"{folder}: the tensor tok_embeddings.weight is missing: download it again")
    vocab_size = params.get("vocab_size", -1)
    if vocab_size < 0:  # Llama 1 and 2 leave it to the tokenizer; the embedding has a row for each token
        vocab_size = tensors["embed_tokens.weight"][0][0]
    dim, multiple = params["dim"], params.get("multiple_of") or 256
    hidden = int((params.get("ffn_dim_multiplier") or 1.0) * int(8 * dim / 3))  # 2/3 of 4 dim, as SwiGLU has 3 matrices
    theta, eps, kv = params.get("rope_theta") or 10000.0, params.get("norm_eps") or 1e-5, params.get("n_kv_heads") or 0
    # the largest LLaMA 1 has the epsilon and width of Llama 2's largest, but no GQA
    if theta == 500000:
        family, window = "Llama 3", 8192
    elif theta > 10000:
        family, window = "Code Llama", 16384
    else:
        family, window = ("LLaMA 1", 2048) if eps == 1e-6 or dim == 8192 and not kv else ("Llama 2", 4096)
    note = f"params.json holds no window: {family}'s {window} is taken for the original, --original_window N settles it"
    original, bos_id = original_window or window, 128000 if vocab_size > 128001 else 1
    rope = {}
    if params.get("use_scaled_rope"):  # Llama 3.1, and 3.2 with a factor of its own; both to 131,072
        factor = params.get("rope_scaling_factor") or (8.0 if dim >= 4096 else 32.0)
        ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope = dict(rope="llama3", scale=float(factor), rope_extra=ramp)
        note += f"; its use_scaled_rope for llama3 with factor {factor:g} to {16 * original}"
    config = LLaMAConfig(
        vocab_size=vocab_size, n_layer=params["n_layers"], n_head=params["n_heads"], n_kv_head=kv, n_embd=dim,
        intermediate_size=multiple * -(-hidden // multiple), norm_eps=eps, rope_theta=float(theta),
        tie_embeddings="lm_head.weight" not in tensors, block_size=16 * original if rope else original,
        original_window=original, bos_id=bos_id, eos_id=bos_id + 1, **rope,
    )  # fmt: skip
    return config, "" if original_window else note
