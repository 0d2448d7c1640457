"""checkpoint.py: what transformers writes is read, what is written opens there, and bad input is one line."""

import hashlib
import http.server
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoint
import data
import sources
from checkpoint import (
    OUR_KEY, Parser, add_model_flags, extend, hf_config, load, load_from_flags, parse_config, read_config, save,
)  # fmt: skip
from model import LLaMA, LLaMAConfig, text_pieces
from model import main as model_main

ROOT = Path(checkpoint.__file__).parent
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


def theirs(
    folder: Path, rope: str = "none", shape: str = "gqa", theta: float = 10000.0, size: dict = {}, **save_options
):
    """A random LLaMA that transformers wrote into folder, its weights large enough for logits of order 1."""
    scaling, more = ROPES[rope]
    parameters = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
    config = transformers.LlamaConfig(**SMALL | SHAPES[shape] | more | size, rope_parameters=parameters)
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


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


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
    # rope_extra aside, where llama3's defaults are spelled out
    assert replace(again.config, rope_extra={}) == replace(model.config, rope_extra={})
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


# ---- Meta's folders --------------------------------------------------------------------------------------------

# heads, key/value heads, and what params.json says of the MLP: 170 = int(8 * 64 / 3), up to a multiple
META_SHAPES = {
    "Llama 2": (dict(num_attention_heads=4, num_key_value_heads=4, intermediate_size=192), {"multiple_of": 32}),
    "Llama 3": (
        dict(num_attention_heads=8, num_key_value_heads=4, intermediate_size=224),
        {"multiple_of": 32, "ffn_dim_multiplier": 1.3, "n_kv_heads": 4, "rope_theta": 500000.0, "vocab_size": 96},
    ),
}


def write_meta(folder: Path, model, shards: int, family: str) -> None:
    """model as Meta would publish it on so many processes: rows interleaved, matrices sliced (Megatron's way)."""
    config, more = model.config, META_SHAPES[family][1]
    state, files = model.state_dict(), [{} for _ in range(shards)]

    def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
        size = len(weight) // heads
        rows = [h * size + half * (size // 2) + j for h in range(heads) for j in range(size // 2) for half in (0, 1)]
        return weight[rows]

    def put(name: str, weight: torch.Tensor, dim: int | None) -> None:
        for i, file in enumerate(files):
            part = weight if dim is None else weight.chunk(shards, dim)[i]
            file[f"{name}.weight"] = part.clone().contiguous()

    for i in range(config.num_hidden_layers):
        ours, his = f"layers.{i}.", lambda name, i=i: state[f"model.layers.{i}.{name}.weight"]
        put(ours + "attention.wq", interleaved(his("self_attn.q_proj"), config.num_attention_heads), 0)
        put(ours + "attention.wk", interleaved(his("self_attn.k_proj"), config.num_key_value_heads), 0)
        put(ours + "attention.wv", his("self_attn.v_proj"), 0)
        put(ours + "attention.wo", his("self_attn.o_proj"), 1)
        put(ours + "feed_forward.w1", his("mlp.gate_proj"), 0)
        put(ours + "feed_forward.w2", his("mlp.down_proj"), 1)
        put(ours + "feed_forward.w3", his("mlp.up_proj"), 0)
        put(ours + "attention_norm", his("input_layernorm"), None)
        put(ours + "ffn_norm", his("post_attention_layernorm"), None)
    put("tok_embeddings", state["model.embed_tokens.weight"], 1 if family == "Llama 2" else 0)
    put("norm", state["model.norm.weight"], None)
    put("output", state["lm_head.weight"], 0)
    folder.mkdir()
    for i, file in enumerate(files):
        file["rope.freqs"] = torch.ones(8)
        torch.save(file, folder / f"consolidated.{i:02d}.pth")
    params = {"dim": 64, "n_layers": 2, "n_heads": config.num_attention_heads, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params | more))


def edit_params(folder: Path, **changes) -> None:
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps({key: value for key, value in params.items() if value is not None}))


def theirs_for_meta(folder: Path, family: str):
    size, params = META_SHAPES[family]
    return theirs(folder, theta=params.get("rope_theta", 10000.0), size=dict(vocab_size=96) | size)


@pytest.mark.parametrize("family", META_SHAPES)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_meta_round_trip(tmp_path: Path, family: str, shards: int, monkeypatch, capsys) -> None:
    model = theirs_for_meta(tmp_path / "hf", family)
    write_meta(tmp_path / "meta", model, shards, family)
    loaded = load(tmp_path / "meta")
    window = {"Llama 2": 4096, "Llama 3": 8192}[family]
    assert f"{family}'s {window}" in capsys.readouterr().err
    assert (loaded.config.block_size, loaded.config.vocab_size, loaded.config.eos_id) == (window, 96, 2)
    ids = IDS % 96
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(loaded(ids), want, rtol=0, atol=1e-4)
        # and a wrong layout would have been seen, by the later positions above all
        monkeypatch.setattr(sources, "interleaved_to_half", lambda weight, heads: weight)
        difference = (load(tmp_path / "meta")(ids) - want).abs().amax(dim=(0, 2))
        assert difference[0] < 1e-4 and difference[20:].min() > 0.1  # at position 0 nothing is turned
    save(loaded, tmp_path / "out")
    assert_same(loaded, tmp_path / "out", ids)
    assert load(tmp_path / "out").config == loaded.config


@pytest.mark.parametrize("params, want", [
    # Meta's params.json: (method, scale, original window, window, intermediate size, theta)
    ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, "vocab_size": -1},
     ("none", 1, 2048, 2048, 11008, 1e4)),  # LLaMA 7B
    ({"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1},
     ("none", 1, 2048, 2048, 22016, 1e4)),  # LLaMA 65B
    ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1},
     ("none", 1, 4096, 4096, 11008, 1e4)),  # Llama 2 7B
    ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
      "norm_eps": 1e-5, "vocab_size": -1}, ("none", 1, 4096, 4096, 28672, 1e4)),  # Llama 2 70B
    ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5,
      "rope_theta": 1000000}, ("none", 1, 16384, 16384, 11008, 1e6)),  # Code Llama 7B
    ({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
      "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0},
     ("none", 1, 8192, 8192, 14336, 5e5)),  # 3 8B
    ({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
      "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
     ("llama3", 8, 8192, 131072, 14336, 5e5)),  # 3.1 8B
    ({"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
      "ffn_dim_multiplier": 1.5, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
     ("llama3", 32, 8192, 131072, 8192, 5e5)),  # 3.2 1B
])  # fmt: skip
def test_meta_params_in_the_wild(tmp_path: Path, params: dict, want: tuple, monkeypatch, capsys) -> None:
    vocab_size = params.get("vocab_size", -1)
    vocab_size = 32000 if vocab_size < 0 else vocab_size
    tensors = dict.fromkeys(("embed_tokens.weight", "lm_head.weight"), ((vocab_size, params["dim"]), None))
    monkeypatch.setattr(sources, "_meta_tensors", lambda folder: tensors)
    (tmp_path / "params.json").write_text(json.dumps(params))
    config = read_config(tmp_path)
    fields = attrgetter("rope", "scale", "original_window", "block_size", "intermediate_size", "rope_theta")
    assert fields(config) == want and config.vocab_size == vocab_size
    assert (config.bos_id, config.eos_id) == ((1, 2) if vocab_size == 32000 else (128000, 128001))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--original_window" in error and str(want[2]) in error
    if config.rope == "llama3":
        rope = {"rope_type": "llama3", "factor": config.scale, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
        hf = transformers.LlamaConfig(
            hidden_size=params["dim"], num_attention_heads=32, max_position_embeddings=131072, rope_parameters=rope
        )
        exact = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf).inv_freq
        torch.testing.assert_close(config.rope_frequencies()[0], exact, rtol=1e-5, atol=0)
    assert read_config(tmp_path, original_window=want[2]) == config and capsys.readouterr().err == ""
    assert read_config(tmp_path, original_window=1024).original_window == 1024


def test_meta_extends_like_any_other(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", theirs_for_meta(tmp_path / "hf", "Llama 2"), 2, "Llama 2")
    model = load(tmp_path / "meta", scale=4, original_window=WINDOW)
    assert (model.config.rope, model.config.original_window, model.config.block_size) == ("linear", WINDOW, 4 * WINDOW)
    save(model, tmp_path / "out")
    assert_same(model, tmp_path / "out", IDS % 96)


def test_meta_folders_that_are_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "meta"
    write_meta(folder, theirs_for_meta(tmp_path / "hf", "Llama 3"), 2, "Llama 3")
    first, second = folder / "consolidated.00.pth", folder / "consolidated.01.pth"
    whole, params = second.read_bytes(), (folder / "params.json").read_text()
    state = torch.load(second)

    second.unlink()
    raises(folder, "has shape")  # half of every matrix
    second.write_bytes(whole[: len(whole) // 2])
    raises(folder, "consolidated.01.pth")
    second.rename(folder / "consolidated.02.pth")
    raises(folder, "consolidated.01.pth is missing")
    (folder / "consolidated.02.pth").unlink()
    torch.save({key: value for key, value in state.items() if "layers.1.attention.wv" not in key}, second)
    raises(folder, "consolidated.01.pth", "layers.1.attention.wv")
    torch.save(state | {"layers.0.attention.wv.weight": torch.zeros(3, 64)}, second)
    raises(folder, "consolidated.01.pth", "layers.0.attention.wv")
    torch.save(state | {"bomb": Bomb(tmp_path / "ran")}, second)
    raises(folder, "consolidated.01.pth")
    assert not (tmp_path / "ran").exists()
    second.write_bytes(whole)
    load(folder)
    for name in ("layers.0.attention.wq.bias", "something"):
        for path in (first, second):
            torch.save(torch.load(path) | {name: torch.zeros(32)}, path)
        raises(folder, name)
        for path in (first, second):
            torch.save({key: value for key, value in torch.load(path).items() if key != name}, path)
    for change, word in (
        ({"dim": None}, "dim"), ({"dim": "64"}, "dim"), ({"n_heads": 7}, "n_head"), ({"n_heads": 0}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_head"), ({"n_layers": 3}, "layers.2"), ({"n_layers": 1}, "layers.1"),
        ({"multiple_of": 50}, "gate_proj"), ({"ffn_dim_multiplier": "x"}, "ffn_dim_multiplier"),
        ({"vocab_size": 95}, "embed_tokens"), ({"rope_theta": 0.5}, "rope_theta"), ({"dim": 32}, "shape"),
    ):  # fmt: skip
        edit_params(folder, **change)
        raises(folder, word)
        (folder / "params.json").write_text(params)
    (folder / "params.json").write_text("{")
    raises(folder, "params.json")
    for path in (first, second):
        path.unlink()
    (folder / "params.json").write_text(params)
    raises(folder, "consolidated.00.pth is missing")


# ---- hub ids -----------------------------------------------------------------------------------------------------

SHA = "0123456789abcdef0123456789abcdef01234567"
HUB_SCRIPT = """
import json, sys
from sources import resolve
for init in sys.argv[1:]:
    try:
        print(json.dumps({"folder": str(resolve(init))}))
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: repos {name: folder}, and their one revision, main."""

    repos: dict[str, Path] = {}
    sent: list[tuple[str, str]] = []

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if "/gated" in path and "/resolve/" in path:  # anyone may see what is there, but not have it
            return self.answer(403, error="GatedRepo")
        if "/broken" in path:
            return self.answer(500)
        name = next((name for name in self.repos if f"{name}/" in f"{path}/"), None)
        if name is None:
            return self.answer(401, error="RepoNotFound")
        folder, rest = self.repos[name], path.split(name, 1)[1].strip("/")
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if rest in ("", "revision/main", f"revision/{SHA}"):
            info = {
                "id": name,
                "sha": SHA,
                "siblings": [{"rfilename": str(file.relative_to(folder))} for file in files],
            }
            return self.answer(200, json.dumps(info).encode())
        if rest.startswith(f"tree/{SHA}"):
            tree = [{"type": "file", "oid": hashlib.sha1(file.read_bytes()).hexdigest(), "size": file.stat().st_size,
                     "path": file.relative_to(folder).as_posix()} for file in files]  # fmt: skip
            return self.answer(200, json.dumps(tree).encode())
        if rest.startswith(f"resolve/{SHA}/"):
            file = rest.removeprefix(f"resolve/{SHA}/")
            self.sent.append((name, file))
            return self.answer(200, (folder / file).read_bytes())
        self.answer(404, error="RevisionNotFound")

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", error: str | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": SHA, "X-Error-Code": error,
                           "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}.items():  # fmt: skip
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def in_a_process(*command: object, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a hub on this machine: what is fetched, what is found again without it, and every way to fail."""
    source, meta = tmp_path / "source", tmp_path / "meta"
    model = theirs_for_meta(source, "Llama 2")
    write_meta(meta, model, 2, "Llama 2")
    for name in ("README.md", "tokenizer.model", "consolidated.safetensors", "pytorch_model.bin"):
        (source / name).write_text("x")
    for name in ("original/model.safetensors", "original/params.json", "model_before/model.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    shutil.copytree(source, tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    (tmp_path / "nothing").mkdir()
    Hub.repos = {"owner/model": source, "owner/bin": tmp_path / "bin", "owner/meta": meta, "owner/gated": source}
    Hub.repos["owner/nothing"] = tmp_path / "nothing"
    Hub.sent = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = dict(HF_HOME=str(tmp_path / "cache"), HF_HUB_CACHE=str(tmp_path / "cache" / "hub"), NO_PROXY="127.0.0.1")
    endpoint = f"http://127.0.0.1:{server.server_port}"
    good = ["owner/model", "owner/bin@main", "owner/meta", f"owner/model@{SHA}"]
    bad = ["owner/gated", "owner/missing", "owner/model@v2", "owner/broken", "owner/nothing"]
    result = in_a_process("-c", HUB_SCRIPT, *good, *bad, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", **home)
    server.shutdown()
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == len(good + bad), result
    folders, errors = [line["folder"] for line in lines[:4]], [line["error"] for line in lines[4:]]
    small = ["config.json", "generation_config.json", "tokenizer.model"]
    for name, files in (("owner/model", [*small, "model.safetensors"]), ("owner/bin", [*small, "pytorch_model.bin"]),
                        ("owner/meta", ["params.json", "consolidated.00.pth", "consolidated.01.pth"])):  # fmt: skip
        assert {file for repo, file in Hub.sent if repo == name} == set(files)
    assert folders[3] == folders[0]
    for folder in folders:
        with torch.no_grad():
            torch.testing.assert_close(load(folder)(IDS % 96), model(IDS % 96).logits, rtol=0, atol=1e-4)
    for init, error, words in zip(bad, errors, (
        ["gated", "licence", "hf auth login"], ["neither a folder", "private"], ["no revision 'v2'"],
        ["can't be reached (HfHubHTTPError)"], ["no weights"],
    )):  # fmt: skip
        assert error.startswith(init) and "\n" not in error, error
        for word in words:
            assert word in error, error

    # without it: what is in the cache is enough, and the rest is one line
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert [str(sources.resolve(init)) for init in good] == folders
    raises("owner/other", "owner/other", "not a folder here", "cache", "HF_HUB_OFFLINE", "or give a folder")
    raises("owner/model@v2", "owner/model@v2", "cache")

    # the whole way, as a user would: what is it?
    shown = in_a_process("checkpoint.py", "owner/meta", "--scale", 2, HF_HUB_OFFLINE="1", **home)
    assert shown.returncode == 0 and shown.stderr.count("\n") == 1, shown
    assert re.search(r"^window +8192$", shown.stdout, re.M) and re.search(r"^method +linear$", shown.stdout, re.M)


MEMORY_SCRIPT = """
import json, sys, threading, time, torch
from checkpoint import load

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

peak = {"RssAnon": 0, "VmRSS": 0}
def watch():
    while True:
        for key in peak:
            peak[key] = max(peak[key], status(key))
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
time.sleep(0.05)
before = dict(peak)
model = load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
sum(float(p.sum()) for p in model.parameters())  # every page of it
time.sleep(0.05)
print(json.dumps({"own": sum(p.nbytes for p in model.parameters()), **{key: peak[key] - before[key] for key in peak}}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Beside what it maps from the files, which the system can drop, loading holds the model and a tensor or two."""
    size = dict(hidden_size=1024, num_attention_heads=16, num_key_value_heads=16, intermediate_size=2752, vocab_size=96)
    model = theirs(tmp_path / "hf", size=size | dict(num_hidden_layers=8)).bfloat16()
    model.save_pretrained(tmp_path / "hf16")
    write_meta(tmp_path / "meta", model, 2, "Llama 2")
    edit_params(tmp_path / "meta", dim=1024, n_layers=8)
    largest = max(p.numel() for p in model.parameters())
    for name, dtype in (("hf", "float32"), ("hf16", "float32"), ("hf16", "bfloat16"), ("meta", "bfloat16")):
        result = in_a_process("-c", MEMORY_SCRIPT, tmp_path / name, dtype)
        found = json.loads(result.stdout)
        files = sum(file.stat().st_size for file in (tmp_path / name).iterdir())
        with capsys.disabled():
            print(
                f"\n{name} as {dtype}: files {files / 1e6:.0f} MB, model {found['own'] / 1e6:.0f} MB; peak "
                f"{found['RssAnon'] / 1e6:.0f} MB of its own, {found['VmRSS'] / 1e6:.0f} MB with what is mapped"
            )
        assert found["RssAnon"] < found["own"] + 8 * largest + 96e6  # the last for torch itself
        assert found["VmRSS"] < found["own"] + files + 8 * largest + 96e6


@pytest.mark.parametrize("init", ["", "a b", "a/b/c", "/nowhere/at/all", "../x", "a/b@", "@x", "owner/na me", "-x/y z"])
def test_neither_a_folder_nor_an_id(init: str) -> None:
    if init:
        raises(init, init, "neither a folder nor a hub id")
    else:
        raises("", "no checkpoint")  # the current folder


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
        LLAMA2_7B | linear(4.0) | {"max_position_embeddings": 16384, "seq_length": 16384},
        (4096, 16384, "linear", 4), True,
    ),
    "both windows said, the extended one first": (
        LLAMA2_7B | linear(4.0) | {"max_position_embeddings": 16384, "max_sequence_length": 16384},
        (4096, 16384, "linear", 4), False,
    ),
    "Yarn-Llama-2 64k": (
        LLAMA2_7B | {
            "max_position_embeddings": 65536, "rope_theta": 10000.0,
            "rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn",
                             "finetuned": True},
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
    "dynamic": (LLAMA2_7B | {"rope_scaling": {"factor": 2.0, "type": "dynamic"}}, (4096, 8192, "dynamic", 2), False),
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
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B))
    for bad in (0, -1, 65536):
        with pytest.raises(ValueError, match="original_window"):
            read_config(tmp_path, original_window=bad)
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
    # as a tool that drops the scale leaves it
    edit_config(tmp_path / "b", **{OUR_KEY: raw[OUR_KEY]}, rope_scaling=None)
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
LLAMA31 = LLaMAConfig(
    block_size=1024, original_window=64, scale=8.0, rope="llama3", rope_extra={"low_freq_factor": 2.0}
)
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
    theirs(tmp_path, "yarn")
    rope = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    edit_config(tmp_path, rope_parameters=rope | {"rope_theta": 10000.0}, max_position_embeddings=WINDOW)
    model = load(tmp_path)
    assert (model.config.scale, model.config.block_size, model.config.original_window) == (4, 4 * WINDOW, WINDOW)
    assert_same(model, tmp_path)  # as it comes, it is what transformers makes of it
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


@pytest.mark.parametrize(
    "where", ["../outside.safetensors", "/{}/outside.safetensors", "a/../../outside.safetensors", "..", "."]
)
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
        raises(folder, "k_proj.weight is torch.", "no floating point")


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
    """Within, no file can grow beyond size bytes: a full disk (read-only folders don't stop root, who may run this)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 80_000])  # not even config.json; the first shard, but not the largest
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, limit: int, capsys) -> None:  # capsys: output to no file
    theirs(tmp_path / "a")
    model = load(tmp_path / "a")
    save(model, tmp_path / "b", max_shard_size=90e3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    sizes = [len(before[name]) for name in sorted(before) if name.endswith(".safetensors")]
    assert sizes[0] < 80_000 < max(sizes)
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
    with pytest.raises(OSError, match="a.json"), largest_file(10):
        checkpoint.write_json(tmp_path / "new" / "a.json", {"x": "longer than that"})
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


# ---- python checkpoint.py and python model.py ------------------------------------------------------------------


@pytest.fixture(scope="session")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, as transformers would keep it beside generation_config.json."""
    folder = tmp_path_factory.mktemp("with_tokenizer")
    theirs(folder, size=dict(vocab_size=300, bos_token_id=None, eos_token_id=None))
    tokenizer = data.train_tokenizer(["def f(x): return x + 1\n" * 50, "naïve café 🎉\n" * 20], 300)
    tokenizer.save(folder)
    edit_config(folder, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    return folder


TRAVELS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def facts(out: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())


def test_what_is_it(with_tokenizer: Path, tmp_path: Path, command) -> None:
    code, out, error = command(checkpoint.main, with_tokenizer)
    assert (code, error) == (0, "")
    found = facts(out)
    assert found["checkpoint"].startswith(str(with_tokenizer)) and "Hugging Face" in found["checkpoint"]
    number = sum(p.numel() for p in load(with_tokenizer).parameters())
    assert found | {
        "family": "LLaMA", "parameters": f"{number:,}", "layers": "2", "heads": "4 of 16, 2 for keys and values",
        "window": "64", "original window": "64", "method": "none", "factor": "1", "rope_theta": "10000",
        "tokenizer": f"tokenizer.json, {data.load_tokenizer(with_tokenizer).vocab_size} tokens", "dtype": "float32",
    } == found  # fmt: skip
    found = facts(command(checkpoint.main, with_tokenizer, "--scale", 8, "--rope", "yarn")[1])
    assert (found["window"], found["original window"], found["method"], found["factor"]) == ("512", "64", "yarn", "8")
    write_meta(tmp_path / "meta", theirs_for_meta(tmp_path / "hf", "Llama 2"), 2, "Llama 2")
    code, out, error = command(checkpoint.main, tmp_path / "meta")
    assert code == 0 and error.count("\n") == 1 and "Meta folder" in out and facts(out)["tokenizer"] == "none"


def test_families_are_known_by_their_shape() -> None:
    for name, raw in (("llama-7b", LLAMA1_7B), ("llama2-7b", LLAMA2_7B), ("llama3-8b", LLAMA31_8B)):
        described = facts(checkpoint.describe(".", parse_config(raw)[0], None, torch.bfloat16))
        assert described["family"] == name and described["dtype"] == "bfloat16"


def test_convert(with_tokenizer: Path, tmp_path: Path, command) -> None:
    flags = ("--scale", 4, "--dtype", "bfloat16", "--max_shard_size", "60KB")
    code, out, error = command(checkpoint.main, with_tokenizer, tmp_path / "out", *flags)
    assert code == 0, error
    assert facts(out)["checkpoint"].startswith(str(tmp_path / "out"))
    assert (facts(out)["dtype"], facts(out)["method"], facts(out)["window"]) == ("bfloat16", "linear", "256")
    for name in TRAVELS:
        assert (tmp_path / "out" / name).read_bytes() == (with_tokenizer / name).read_bytes(), name
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same(load(tmp_path / "out", dtype=torch.float32), tmp_path / "out", IDS)
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = checkpoint.load_tokenizer(tmp_path / "out", read_config(tmp_path / "out"))
    assert theirs_tokenizer.encode("def café", add_special_tokens=False) == ours.encode("def café")
    # and from there on: composed from the original window, in one file, to another dtype
    assert command(checkpoint.main, tmp_path / "out", tmp_path / "more", "--scale", 8, "--dtype", "float16")[0] == 0
    config = read_config(tmp_path / "more")
    assert (config.scale, config.block_size, config.original_window) == (8, 512, 64)
    assert {t.dtype for t in load_file(tmp_path / "more" / "model.safetensors").values()} == {torch.float16}
    # a Meta folder, its tokenizer one folder up, as LLaMA 1 came
    write_meta(tmp_path / "7B", theirs_for_meta(tmp_path / "hf", "Llama 2"), 2, "Llama 2")
    assert command(checkpoint.main, tmp_path / "7B", tmp_path / "from_meta", "--original_window", 64)[0] == 0
    assert_same(load(tmp_path / "7B", original_window=64), tmp_path / "from_meta", IDS % 96)
    assert read_config(tmp_path / "from_meta").original_window == 64


def test_convert_writes_nothing_on_bad_input(with_tokenizer: Path, tmp_path: Path, command) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(with_tokenizer, source)
    before = {path: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").write_text("x")
    for arguments, *words in (
        ((source, source), "checkpoint itself"), ((source, tmp_path / "link"), "checkpoint itself"),
        ((source, out, "--scale", "0.5"), "scale"), ((source, out, "--rope", "magic"), "magic"),
        ((source, out, "--dtype", "int8"), "--dtype"), ((source, out, "--max_shard_size", "big"), "_size big"),
        ((source, out, "--max_shard_size", "0"), "--max_shard_size"), ((tmp_path / "none", out), "none"), ((), "src"),
        ((source, tmp_path / "file"), "file"), ((source, tmp_path / "file" / "out"), "file"),
    ):  # fmt: skip
        assert_one_line(command(checkpoint.main, *arguments), *words)
    tokenizer = data.train_tokenizer([Path(checkpoint.__file__).read_text()], 310)
    (source / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    assert_one_line(command(checkpoint.main, source, out), "tokenizer")  # another model's
    (source / "tokenizer.json").write_text("{")
    assert_one_line(command(checkpoint.main, source, out), "tokenizer.json")
    (source / "tokenizer.json").write_bytes(before[source / "tokenizer.json"])
    (source / "model.safetensors").write_bytes(before[source / "model.safetensors"][:-9])
    assert_one_line(command(checkpoint.main, source, out), "model.safetensors")
    (source / "model.safetensors").write_bytes(before[source / "model.safetensors"])
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert not out.exists() and (tmp_path / "file").read_text() == "x"


def test_generate(with_tokenizer: Path, tmp_path: Path, command) -> None:
    flags = ("--init", with_tokenizer, "--device", "cpu", "--max_new_tokens", 12)
    code, out, error = command(model_main, *flags, "--prompt", "def f(x): naïve")
    assert code == 0 and re.fullmatch(
        r"prefill: \d+ tokens, [\d,]+ tokens/s; decoding: \d+ tokens, [\d,.]+ tokens/s\n", error
    )
    tokenizer, model = data.load_tokenizer(with_tokenizer), load(with_tokenizer)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("def f(x): naïve")]])
    made = model.generate(ids, 12, eos_id=tokenizer.eos_id)[0, ids.size(1) :].tolist()
    assert out == tokenizer.decode(made) + "\n"
    (tmp_path / "prompt.txt").write_text("def f(x): naïve", encoding="utf-8")
    assert command(model_main, *flags, "--prompt", tmp_path / "prompt.txt")[1] == out
    sampled = [command(model_main, *flags, "--temperature", 2, "--top_p", 0.9, "--seed", seed)[1] for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    for bad, *words in (
        (["--max_new_tokens", 0], "--max_new_tokens"), (["--temperature", -1], "--temperature"),
        (["--top_p", 0], "--top_p"), (["--prompt", "x" * 200], "--prompt", "window", "--scale 4"),
        (["--temperature", "nan"], "--temperature"),
    ):  # fmt: skip
        assert_one_line(command(model_main, *flags, *bad), *words)
    assert command(model_main, *flags, "--prompt", "x" * 200, "--scale", 4)[0] == 0


def test_pieces_make_up_the_text() -> None:
    """Byte by byte, and with a decoder that drops the first space as sentencepiece does."""
    text = "naïve café 🎉🎉 end"
    pieces = list(text_pieces(iter(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace"), list(b"so ")))
    assert "".join(pieces) == text and "🎉" in pieces and not any("\ufffd" in piece for piece in pieces)
    words = ["▁one", "▁two", "three", "▁four"]
    pieces = list(text_pieces([1, 2, 3], lambda ids: "".join(words[i] for i in ids).replace("▁", " ")[1:], [0]))
    assert pieces[:3] == [" two", "three", " four"]
    cut = "🎉".encode()[:3]
    assert "".join(text_pieces(cut, lambda ids: bytes(ids).decode("utf-8", "replace"), [65])) == "\ufffd"  # never whole


def test_model_py_as_it_is_run(with_tokenizer: Path) -> None:
    shown = in_a_process("model.py", "--init", with_tokenizer, "--prompt", "def", "--max_new_tokens", 3)
    assert shown.returncode == 0 and shown.stderr.startswith("prefill: "), shown
