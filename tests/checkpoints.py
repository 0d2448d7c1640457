"""Small random checkpoints for tests, as transformers writes them and as Meta publishes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import checkpoint
from model import LLaMA

ROOT = Path(checkpoint.__file__).parent
WINDOW = 64  # the original window of every model; the tests read up to 200 tokens
IDS = torch.randint(3, 97, (2, 200), generator=torch.Generator().manual_seed(1))

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 32},
}

# rope_parameters of each method, and max_position_embeddings
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": WINDOW,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
TUNED = {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5}
ROPES = {
    "none": ({"rope_type": "default"}, WINDOW),
    "linear": ({"rope_type": "linear", "factor": 4.0}, WINDOW),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, WINDOW),
    "yarn": (YARN, 4 * WINDOW),
    "yarn tuned": (YARN | TUNED, 4 * WINDOW),
    "llama3": (LLAMA3, 4 * WINDOW),
}

# ---- Hugging Face's form -------------------------------------------------------------------------


def write_hugging_face(
    folder: Path,
    rope: str = "none",
    shape: str = "gqa",
    theta: float = 10000.0,
    size: dict | None = None,
    **save_options: object,
) -> transformers.LlamaForCausalLM:
    """A random model of transformers, after it has been saved in folder.

    Its weights are large enough for logits of order 1.  size: changes to SMALL.
    """
    rope_parameters, window = ROPES[rope]
    fields = SMALL | SHAPES[shape] | {"max_position_embeddings": window} | (size or {})
    rope_parameters = rope_parameters | {"rope_theta": theta}
    config = transformers.LlamaConfig(**fields, rope_parameters=rope_parameters)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 2:
                parameter.copy_(0.15 * noise)
            else:
                parameter.copy_(1.0 + 0.2 * noise)
    model.save_pretrained(folder, **save_options)
    return model


def open_in_transformers(folder: Path) -> transformers.LlamaForCausalLM:
    """transformers' model of a folder, in float32, with no tensor missing or left over."""
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], info
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: LLaMA, folder: Path, ids: torch.Tensor = IDS) -> None:
    """Our model computes what transformers computes with the checkpoint in folder."""
    expected = open_in_transformers(folder)(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)


# ---- Meta's form ---------------------------------------------------------------------------------

# For each family: the shape in transformers' words, and what params.json says of it. The width of
# the MLP is 170 = int(8 * 64 / 3), times ffn_dim_multiplier, rounded up to a multiple of 32.
META_FAMILIES = {
    "Llama 2": (
        {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 192},
        {"multiple_of": 32},
    ),
    "Llama 3": (
        {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 224},
        {
            "multiple_of": 32,
            "ffn_dim_multiplier": 1.3,
            "n_kv_heads": 4,
            "rope_theta": 500000.0,
            "vocab_size": 96,
        },
    ),
}


def write_hugging_face_for_meta(folder: Path, family: str, **size) -> transformers.LlamaForCausalLM:
    """A random model of transformers that `write_meta` can write as one of META_FAMILIES."""
    shape, params = META_FAMILIES[family]
    theta = params.get("rope_theta", 10000.0)
    return write_hugging_face(folder, theta=theta, size={"vocab_size": 96} | shape | size)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of wq or wk in Meta's order, written as two loops to be independent of rope.py."""
    size = len(weight) // heads
    rows = []
    for head in range(heads):
        for pair in range(size // 2):
            rows.append(head * size + pair)
            rows.append(head * size + size // 2 + pair)
    return weight[rows]


def write_meta(
    folder: Path, model: transformers.LlamaForCausalLM, n_files: int, family: str
) -> None:
    """Write a model as Meta publishes it: rows interleaved, every matrix divided over n_files."""
    config = model.config
    state = model.state_dict()
    files = [{} for _ in range(n_files)]

    def put(name: str, weight: torch.Tensor, dim: int | None) -> None:
        for i, file in enumerate(files):
            part = weight
            if dim is not None:
                part = weight.chunk(n_files, dim)[i]
            file[f"{name}.weight"] = part.clone().contiguous()

    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        q = interleaved(state[f"{layer}.self_attn.q_proj.weight"], config.num_attention_heads)
        k = interleaved(state[f"{layer}.self_attn.k_proj.weight"], config.num_key_value_heads)
        put(f"layers.{i}.attention.wq", q, 0)
        put(f"layers.{i}.attention.wk", k, 0)
        put(f"layers.{i}.attention.wv", state[f"{layer}.self_attn.v_proj.weight"], 0)
        put(f"layers.{i}.attention.wo", state[f"{layer}.self_attn.o_proj.weight"], 1)
        put(f"layers.{i}.feed_forward.w1", state[f"{layer}.mlp.gate_proj.weight"], 0)
        put(f"layers.{i}.feed_forward.w2", state[f"{layer}.mlp.down_proj.weight"], 1)
        put(f"layers.{i}.feed_forward.w3", state[f"{layer}.mlp.up_proj.weight"], 0)
        put(f"layers.{i}.attention_norm", state[f"{layer}.input_layernorm.weight"], None)
        put(f"layers.{i}.ffn_norm", state[f"{layer}.post_attention_layernorm.weight"], None)
    embedding_dim = 1 if family == "Llama 2" else 0
    put("tok_embeddings", state["model.embed_tokens.weight"], embedding_dim)
    put("norm", state["model.norm.weight"], None)
    put("output", state["lm_head.weight"], 0)

    folder.mkdir()
    for i, file in enumerate(files):
        file["rope.freqs"] = torch.ones(8)
        torch.save(file, folder / f"consolidated.{i:02d}.pth")
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(params | META_FAMILIES[family][1]))


# ---- folders that are wrong ----------------------------------------------------------------------


def edit_json(path: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
    """Change values of a JSON object in a file, and remove the keys in `drop`."""
    content = json.loads(path.read_text()) | changes
    for key in drop:
        content.pop(key, None)
    path.write_text(json.dumps(content))


def assert_load_refuses(path: str | Path, *words: str, **options: object) -> None:
    """checkpoint.load raises a ValueError of one line that has these words."""
    with pytest.raises(ValueError) as caught:
        checkpoint.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


class Bomb:
    """An object whose pickle makes a file when it is opened: code that must not run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---- processes -----------------------------------------------------------------------------------


def run_python(*command: object, **environment: str) -> subprocess.CompletedProcess:
    """Run Python with these arguments in a process of its own, from the repository's root."""
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    words = [sys.executable]
    words += [str(word) for word in command]
    return subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=300
    )
