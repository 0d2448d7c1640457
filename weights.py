"""The tensors of any checkpoint, by this repo's names.

A checkpoint is a Hugging Face folder, a model on the hub, or a folder as Meta publishes it.

    folder = resolve("owner/name")              # a hub id is downloaded first
    tensors = stored_tensors(folder)            # opens the files, but reads no tensor yet
    norm = tensors["norm.weight"]
    norm.shape                                  # (4096,)
    norm.read()                                 # the tensor itself
"""

import difflib
import re
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cli import first_line, read_json
from rope import interleaved_to_half

# File patterns of each weight format, preferred format first. The last pattern tells whether the
# format is present.
WEIGHTS = (
    ["model*.safetensors*"], ["pytorch_model*.bin*"], ["params.json", "consolidated.*.pth"]
)

# The small files that are downloaded with the weights
SMALL_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
]


class Stored(NamedTuple):
    """A tensor in a file: its shape, and the function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


OUT = Path("out")  # where the scripts write to, if they are told nothing else

# ---- from --init to a folder ---------------------------------------------------------------------


def resolve(init: str | Path) -> Path:
    """The folder that --init means.

    init: a folder, which is returned as it is, or a hub id owner/name[@revision], which is
    downloaded into the cache of huggingface_hub.
    Raises ValueError for anything else and for a download that fails.
    """
    path = Path(init)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{init} is a file: give the folder that holds the checkpoint")
    # A path into a folder that is here is meant as one, and no owner on the hub. So is out/NAME,
    # because the scripts write to out.
    parent = path.parent
    if parent == OUT or (parent != Path(".") and parent.is_dir()):
        message = f"{init}: no such folder{_near(init)}"
        if path == OUT / "base":
            message += "; python train.py makes it"
        raise ValueError(message)
    hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", str(init))
    if hub_id is None:
        raise ValueError(
            f"{init} is neither a folder nor a hub id (owner/name or owner/name@revision)"
            + _near(init)
        )
    name, revision = hub_id.groups()
    return _download(str(init), name, revision)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the config of a checkpoint, Hugging Face's or Meta's."""
    return (folder / "config.json").is_file() or (folder / "params.json").is_file()


def checkpoints_in(folder: Path, levels: int = 1) -> list[Path]:
    """The checkpoints in a folder and, with more levels, in its subfolders."""
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            continue
        if is_checkpoint(path):
            found.append(path)
        elif levels > 1:
            found += checkpoints_in(path, levels - 1)
    return found


def _near(init: str | Path) -> str:
    """What a message says of the checkpoints here if one is not: those of like names first."""
    found = checkpoints_in(OUT, levels=3)  # those of demo.py are in out/demo/seed-0
    if Path(init).parent not in (OUT, Path(".")):
        found += checkpoints_in(Path(init).parent)
    names = [str(path) for path in found]
    # The last part of a path tells most: out/demo/seed-0/base is near out/base
    last = Path(init).name
    near = [name for name in names if Path(name).name == last]
    near += difflib.get_close_matches(str(init), [name for name in names if name not in near])
    if near:
        return f"; near it: {', '.join(near[:3])}"
    if names:
        return f"; checkpoints here: {', '.join(names[:3])}"
    return ""


@cache  # a script resolves --init several times, and each time must get the same snapshot
def _download(init: str, name: str, revision: str | None) -> Path:
    """The folder of a model of the hub in the local cache. Each failure becomes one line."""
    from huggingface_hub import errors

    try:
        folder = _snapshot(name, revision)
        if folder is not None:
            return folder
        reason = (
            "holds no weights that are read here: "
            "model.safetensors, pytorch_model.bin or consolidated.00.pth "
            "(an adapter must be merged into its model first)"
        )
    except errors.GatedRepoError:
        reason = (
            f"is gated: accept its license at https://huggingface.co/{name}, "
            "then log in with: hf auth login"
        )
    except errors.RepositoryNotFoundError:
        reason = (
            "is neither a folder here nor a model on the hub "
            "(if it is private, log in with: hf auth login)"
        )
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}: see https://huggingface.co/{name}/commits/main"
    except errors.HfHubHTTPError as error:
        reason = f"can't be fetched, the hub answers: {first_line(error)}"
    except Exception as error:
        # There is no connection, for which each library below has its own errors
        cause = error.__cause__ or error
        reason = (
            "is not a folder here, not whole in the hub's cache, and the hub can't be reached "
            f"({type(cause).__name__}): check the connection and that HF_HUB_OFFLINE is not set, "
            "or give a folder"
        )
    raise ValueError(f"{init} {reason}")


def _snapshot(name: str, revision: str | None) -> Path | None:
    """Download the preferred weight format of a model. None if it has no weights that we read."""
    from huggingface_hub import snapshot_download

    for patterns in WEIGHTS:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=SMALL_FILES + patterns,
            ignore_patterns=["*/*"],  # such as original/, a copy of the weights in another format
        )
        if any(Path(folder).glob(patterns[-1])):
            return Path(folder)
    return None


# ---- Hugging Face folders ------------------------------------------------------------------------

# What wrappers put into the names of the tensors that they save: DistributedDataParallel "module."
# and PEFT "base_model.model." before the whole name, torch.compile "_orig_mod." before the name of
# what it compiled
WRAPPER_PREFIXES = re.compile(r"^((module|base_model\.model|_orig_mod)\.)+|\b_orig_mod\.")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder by name. Their files are opened, but no tensor is read yet.

    Our names are those of Hugging Face without the leading "model.", and without what a wrapper
    has put before it. Raises ValueError for a file that is missing, damaged, or holds more than
    tensors, and for two tensors of one name.
    """
    if is_meta(folder):
        return _meta_tensors(folder)
    found = _open_weights(folder, "model.safetensors", _open_safetensors)
    if found is None:
        found = _open_weights(folder, "pytorch_model.bin", _open_pickle)
    if found is None:
        raise ValueError(
            f"{folder} has a config.json but no model.safetensors or pytorch_model.bin "
            "(or their .index.json)"
        )
    return _with_our_names(folder, found)


def _with_our_names(folder: Path, found: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors by our names."""
    tensors = {}
    stored_names = {}
    for name, stored in found.items():
        our_name = WRAPPER_PREFIXES.sub("", name).removeprefix("model.")
        if our_name in tensors:
            raise ValueError(
                f"{folder}: the tensors {stored_names[our_name]} and {name} are one and the same "
                "for a LLaMA: remove the wrong one"
            )
        tensors[our_name] = stored
        stored_names[our_name] = name
    return tensors


def _open_weights(folder: Path, file: str, open_file: Callable) -> dict[str, Stored] | None:
    """The tensors of a single file, or of the shards in its index. None if neither is there."""
    index = f"{file}.index.json"
    if (folder / file).is_file():
        return open_file(folder / file)
    if (folder / index).is_file():
        return _open_shards(folder, index, open_file)
    return None


def _open_shards(folder: Path, index: str, open_file: Callable) -> dict[str, Stored]:
    """The tensors that an index lists, each from the file that the index names for it."""
    weight_map = _read_weight_map(folder / index)
    shards = {}
    for file in sorted(set(weight_map.values())):
        shards[file] = open_file(folder / file)
    tensors = {}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise ValueError(
                f"{folder / file} lacks the tensor {name} that {index} promises: download it again"
            )
        tensors[name] = shards[file][name]
    return tensors


def _read_weight_map(path: Path) -> dict[str, str]:
    """The file name of each tensor, from an index. No file name may leave the index's folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{path} has no weight_map of tensor names to file names")
    for file in set(weight_map.values()):
        if Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{path} points outside its folder: {file!r}")
        if not (path.parent / file).is_file():
            raise ValueError(
                f"{path.parent / file} is missing: {path.name} lists it, download it again"
            )
    return weight_map


def _open_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors file, which is mapped into memory."""
    tensors = {}
    try:
        file = safe_open(path, framework="pt")
        for name in file.keys():
            shape = tuple(file.get_slice(name).get_shape())
            tensors[name] = Stored(shape, partial(file.get_tensor, name))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): download it again"
        ) from None
    return tensors


def _open_pickle(path: Path) -> dict[str, Stored]:
    """The tensors of a .bin or .pth file.

    It is mapped into memory, unless it has torch.save's format from before PyTorch 1.6, which is no
    zip file and can only be read as a whole. A pickle may contain code. With weights_only=True
    torch refuses it instead of running it.
    """
    mapped = zipfile.is_zipfile(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # A damaged pickle can raise any exception. The system's own errors name the file already.
        if isinstance(error, OSError) and error.filename:
            raise
        # torch begins with the advice to open the file without weights_only: give its reason alone
        cause = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        reason = (cause or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is not a whole file of nothing but tensors: download it again ({reason})"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} holds something else than a dictionary of tensors")
    return {name: Stored(tuple(t.shape), t.detach) for name, t in tensors.items()}


def has_own_head(tensors: dict[str, Stored]) -> bool:
    """Whether a model's tensors hold a head that is not a copy of the embedding.

    Tied weights may be stored once or twice. Reads both matrices where there are two.
    """
    if "lm_head.weight" not in tensors or "embed_tokens.weight" not in tensors:
        return False
    head = tensors["lm_head.weight"]
    embedding = tensors["embed_tokens.weight"]
    if head.shape != embedding.shape:
        return True
    head_values = head.read()
    embedding_values = embedding.read()
    same_dtype = head_values.dtype == embedding_values.dtype
    return not (same_dtype and torch.equal(head_values, embedding_values))


# ---- Meta's folders ------------------------------------------------------------------------------

# Meta splits a model over several files, one for each GPU of a tensor-parallel group. For each name
# of Meta: our name, and the dimension along which the files split the tensor. None means that each
# file has all of it.
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
    "tok_embeddings": ("embed_tokens", 0),  # Llama 3; for Llama 1 and 2 see _meta_tensors
    "norm": ("norm", None),
    "output": ("lm_head", 0),
}

# The values of params.json that are read
REQUIRED_PARAMS = ("dim", "n_layers", "n_heads")
WHOLE_PARAMS = REQUIRED_PARAMS + ("n_kv_heads", "multiple_of", "vocab_size")
REAL_PARAMS = ("ffn_dim_multiplier", "norm_eps", "rope_theta", "rope_scaling_factor")


def is_meta(folder: Path) -> bool:
    """Whether a folder is as Meta publishes it."""
    return (folder / "params.json").is_file() and not (folder / "config.json").is_file()


def read_params(folder: Path) -> dict:
    """The content of params.json. Raises ValueError for a value of the wrong type or below 1."""
    path = folder / "params.json"
    params = read_json(path)
    for key in REQUIRED_PARAMS:
        if params.get(key) is None:
            raise ValueError(f"{path}: {key} is missing")
    for key in WHOLE_PARAMS + REAL_PARAMS:
        value = params.get(key)
        if value is None:
            continue
        is_whole = type(value) is int  # not isinstance, because True is an int for Python
        if not is_whole and (key in WHOLE_PARAMS or type(value) is not float):
            raise ValueError(f"{path}: {key} should be a number, found {value!r}")
        # A vocab_size of -1 means that the tokenizer decides
        if key in WHOLE_PARAMS and key != "vocab_size" and value < 1:
            raise ValueError(f"{path}: {key} must be at least 1, found {value}")
    return params


def _meta_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a Meta folder by our names.

    Reading one joins its parts from all files, and brings the rows of wq and wk into our layout.
    """
    params = read_params(folder)
    files = _open_meta_files(folder)
    heads = {
        "attention.wq": params["n_heads"],
        "attention.wk": params.get("n_kv_heads") or params["n_heads"],
    }
    tensors = {}
    for name, stored in files[0].items():
        layer, meta_name = re.fullmatch(r"(layers\.\d+\.)?(.*?)(?:\.weight)?", name).groups("")
        our_name, split_dim = META_NAMES.get(meta_name, (None, None))

        # What is not in the model (rope.freqs, a bias) keeps its name
        n_dims = 1 if split_dim is None else 2
        if our_name is None or len(stored.shape) != n_dims:
            tensors[name] = stored
            continue

        # Llama 1 and 2 split the embedding by columns, so that no file has dim of them
        if meta_name == "tok_embeddings" and stored.shape[1] != params["dim"]:
            split_dim = 1
        parts = [file[name] for file in files]
        tensors[f"{layer}{our_name}.weight"] = _join(parts, split_dim, heads.get(meta_name))
    return tensors


def _open_meta_files(folder: Path) -> list[dict[str, Stored]]:
    """The tensors of each consolidated.NN.pth, all with the same names and shapes."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    for number in range(max(len(paths), 1)):
        path = folder / f"consolidated.{number:02d}.pth"
        if not path.is_file():
            raise ValueError(f"{path} is missing: download it again")
    files = [_open_pickle(path) for path in paths]

    # Files of two different models would join to a model that is wrong without an error
    first = files[0]
    for path, file in zip(paths, files):
        for name in sorted(set(first) | set(file)):
            if name not in first or name not in file or first[name].shape != file[name].shape:
                raise ValueError(
                    f"{path} doesn't go with {paths[0].name}: {name} is missing or of another shape"
                )
    return files


def _join(parts: list[Stored], split_dim: int | None, heads: int | None) -> Stored:
    """One tensor from its parts.

    split_dim: the dimension that the parts divide; None: each part is the whole tensor.
    heads: the number of heads whose rows Meta interleaves; None: there are none.
    """
    shape = list(parts[0].shape)
    if split_dim is None:
        parts = parts[:1]
    else:
        shape[split_dim] *= len(parts)

    def read() -> Tensor:
        tensors = [part.read() for part in parts]
        tensor = tensors[0]
        if len(tensors) > 1:  # a single part is not copied: it stays mapped from its file
            tensor = torch.cat(tensors, split_dim)
        if heads is not None:
            tensor = interleaved_to_half(tensor, heads)
        return tensor

    return Stored(tuple(shape), read)
