"""checkpoint.py: transformers' models are read, ours open there, and bad input is one line."""

import json
import os
import re
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
from checkpoint import INDEX, load, load_tokenizer, read_config, save, stored_weights
from checkpoints import (
    IDS,
    ROPES,
    SHAPES,
    WINDOW,
    YARN,
    assert_load_refuses,
    assert_same_logits,
    edit_json,
    open_in_transformers,
    run_python,
    write_hugging_face,
    write_hugging_face_for_meta,
    write_meta,
)
from conftest import assert_refused, random_model
from hf_config import OUR_KEY, extend
from model import LLaMAConfig
from tokenizer import train_tokenizer


@pytest.fixture
def folder(tmp_path) -> Path:
    write_hugging_face(tmp_path / "model")
    return tmp_path / "model"


# ---- theirs in, ours out -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rope", ROPES)
def test_logits_equal_transformers_and_back(tmp_path, shape, rope):
    write_hugging_face(tmp_path / "a", rope, shape)
    model = load(tmp_path / "a")
    assert model.config.rope == rope.split()[0]
    assert model.config.original_window == WINDOW
    assert model.config.block_size == (WINDOW if rope == "none" else 4 * WINDOW)
    assert_same_logits(model, tmp_path / "a")
    save(model, tmp_path / "b")
    assert_same_logits(model, tmp_path / "b")
    assert load(tmp_path / "b").config == model.config
    # A tool that does not know our own key reads the same
    edit_json(tmp_path / "b" / "config.json", drop=(OUR_KEY,))
    assert read_config(tmp_path / "b") == model.config


def test_a_lost_factor_would_be_seen(tmp_path):
    """The tolerance of the test above is small enough."""
    write_hugging_face(tmp_path, "linear")
    right = load(tmp_path)
    wrong = load(tmp_path)
    wrong.config.scale = 1.0
    with torch.no_grad():
        assert (wrong(IDS) - right(IDS)).abs().max() > 0.1


@pytest.mark.parametrize("rope", ["linear", "ntk", "dynamic", "yarn", "llama3", "none"])
def test_an_extension_opens_in_transformers_with_its_scale(tmp_path, rope):
    write_hugging_face(tmp_path / "a", theta=5000.0)
    model = load(tmp_path / "a", scale=4, rope=rope)
    save(model, tmp_path / "b")
    assert_same_logits(model, tmp_path / "b")

    # llama3's ramp is spelled out in the file, so that rope_extra may differ, but not the angles
    again = load(tmp_path / "b")
    assert replace(again.config, rope_extra={}) == replace(model.config, rope_extra={})
    angles, _ = model.config.rope_frequencies(200)
    assert again.config.rope_frequencies(200)[0].tolist() == angles.tolist()
    assert again.config.block_size == 4 * WINDOW
    # For ntk, too, whose changed theta stands in rope_theta
    assert again.config.rope_theta == 5000.0

    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    engines_multiply = rope in ("linear", "dynamic")
    assert raw["max_position_embeddings"] == (WINDOW if engines_multiply else 4 * WINDOW)
    if rope not in ("none", "ntk"):
        scaling = raw["rope_scaling"]
        assert (scaling["rope_type"], scaling["type"], scaling["factor"]) == (rope, rope, 4.0)


def test_a_meta_folder_is_extended_like_any_other(tmp_path):
    model = write_hugging_face_for_meta(tmp_path / "hf", "Llama 2")
    write_meta(tmp_path / "meta", model, 2, "Llama 2")
    model = load(tmp_path / "meta", scale=4, original_window=WINDOW)
    config = model.config
    assert (config.rope, config.original_window, config.block_size) == (
        "linear",
        WINDOW,
        4 * WINDOW,
    )
    save(model, tmp_path / "out")
    assert_same_logits(model, tmp_path / "out", IDS % 96)
    assert load(tmp_path / "out").config == config


@pytest.mark.parametrize("size, n_files", [(60e3, 4), ("90KB", 2), (5e9, 1)])
def test_shards(tmp_path, size, n_files):
    write_hugging_face(tmp_path / "a", shape="tied")
    model = load(tmp_path / "a")
    save(model, tmp_path / "b", max_shard_size=size)
    files = list((tmp_path / "b").glob("*.safetensors"))
    assert len(files) >= n_files
    assert (len(files) == 1) == (n_files == 1)
    assert (tmp_path / "b" / INDEX).exists() == (n_files > 1)
    for file in files:
        stored = sum(tensor.nbytes for tensor in load_file(file).values())
        assert n_files == 1 or stored <= 90e3
    assert_same_logits(load(tmp_path / "b"), tmp_path / "b")


def test_shards_are_planned_in_the_dtype_that_is_written(tmp_path):
    write_hugging_face(tmp_path / "a")
    model = load(tmp_path / "a")
    save(model, tmp_path / "float32", max_shard_size="100KB")
    save(model, tmp_path / "bfloat16", max_shard_size="50KB", dtype=torch.bfloat16)
    files = []
    for name in ("float32", "bfloat16"):
        index = json.loads((tmp_path / name / INDEX).read_text())
        files.append(index["weight_map"])
    assert files[0] == files[1]


def test_stale_weights_are_removed(tmp_path):
    write_hugging_face(tmp_path / "a")
    model = load(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pytorch_model.bin").write_text("x")
    (tmp_path / "b" / "notes.txt").write_text("x")
    for size in (60e3, 90e3, 5e9, 90e3):  # several files, fewer, one, and several again
        save(model, tmp_path / "b", max_shard_size=size)
        found = {path.name for path in (tmp_path / "b").iterdir()}
        expected = {"config.json", "notes.txt"}
        if size == 5e9:
            expected.add("model.safetensors")
        else:
            index = json.loads((tmp_path / "b" / INDEX).read_text())
            expected |= {INDEX} | set(index["weight_map"].values())
        assert found == expected
        assert_same_logits(load(tmp_path / "b"), tmp_path / "b")


def test_dtypes(tmp_path):
    write_hugging_face(tmp_path / "a")
    model = load(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same_parameters(load(tmp_path / "b"), model)
    assert_same_logits(load(tmp_path / "b", dtype=torch.float32), tmp_path / "b")
    save(load(tmp_path / "a"), tmp_path / "c", dtype=torch.bfloat16)
    assert_same_parameters(load(tmp_path / "c"), model)


def assert_same_parameters(first, second) -> None:
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(with_tokenizer, tmp_path, umask, mode):
    model = load(with_tokenizer)
    tokenizer = load_tokenizer(with_tokenizer, model.config)
    before = os.umask(umask)
    try:
        save(model, tmp_path / "out", tokenizer, max_shard_size="60KB")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == mode, path


def test_max_length_follows_the_window(source, tmp_path):
    """In generation_config.json it limits a prompt and its continuation together."""
    edit_json(source / "generation_config.json", max_length=WINDOW)
    model = load(source, scale=4)
    save(model, tmp_path / "out", load_tokenizer(source, model.config))
    theirs = open_in_transformers(tmp_path / "out")
    assert theirs.generation_config.max_length == 4 * WINDOW
    # transformers generates beyond the old window
    with torch.no_grad():
        ids = theirs.generate(IDS[:1, : WINDOW + 10], eos_token_id=None, do_sample=False)
    assert ids.shape == (1, 4 * WINDOW)


def test_stored_weights_are_the_models(tmp_path):
    write_hugging_face(tmp_path, shape="tied")
    model = load(tmp_path)
    found = dict(stored_weights(tmp_path, scale=2))
    expected = dict(model.named_parameters())
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])
    # What is wrong is said at once, not when the first tensor is asked for
    with pytest.raises(ValueError, match="scale"):
        stored_weights(tmp_path, scale=0.5)


def test_a_tied_head_stays_tied(tmp_path):
    write_hugging_face(tmp_path / "a", shape="tied")
    model = load(tmp_path / "a", dtype=torch.bfloat16)
    assert model.lm_head.weight is model.embed_tokens.weight
    save(model, tmp_path / "b")
    assert "lm_head.weight" not in load_file(tmp_path / "b" / "model.safetensors")


def test_what_real_folders_carry_beside_the_weights(tmp_path):
    write_hugging_face(tmp_path, shape="tied")
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    state["rope.freqs"] = torch.ones(16)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path)
    load(tmp_path)


# ---- folders whose files disagree ----------------------------------------------------------------


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace the head or the embedding in model.safetensors; None removes it."""
    state = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        name = {"head": "lm_head.weight", "embedding": "model.embed_tokens.weight"}[key]
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def tied(tmp_path) -> Path:
    write_hugging_face(tmp_path / "tied", shape="tied")
    return tmp_path / "tied"


def embedding_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


@pytest.mark.parametrize("own_dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_its_own_beside_tied_embeddings(tied, tmp_path, own_dtype, capsys):
    """A merge or a fine-tune left tie_word_embeddings in config.json."""
    head = embedding_of(tied) + 0.1 * torch.randn(
        97, 64, generator=torch.Generator().manual_seed(2)
    )
    change_tensors(tied, head=head.to(own_dtype))
    capsys.readouterr()
    model = load(tied, dtype=torch.float32)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "lm_head.weight" in error
    assert "embed_tokens.weight" in error
    assert "tie_word_embeddings" in error
    assert_same_logits(model, tied)

    # The export holds both, and all that reads weights one by one finds both
    save(model, tmp_path / "out")
    assert_same_logits(model, tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" in dict(stored_weights(tied))
    assert not read_config(tied).tie_embeddings


def test_a_tied_head_that_is_stored_twice(tied, capsys):
    change_tensors(tied, head=embedding_of(tied).clone())
    capsys.readouterr()
    model = load(tied)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert capsys.readouterr().err == ""
    assert_same_logits(model, tied)


def test_a_tied_embedding_that_is_stored_as_the_head(tied, tmp_path):
    change_tensors(tied, head=embedding_of(tied), embedding=None)
    model = load(tied)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert_same_logits(model, tied)
    save(model, tmp_path / "out")
    assert_same_logits(model, tmp_path / "out")


def test_a_head_of_another_shape_beside_tied_embeddings(tied):
    change_tensors(tied, head=torch.zeros(98, 64))
    assert_load_refuses(tied, "lm_head.weight has shape (98, 64)")


OLD_STYLE = {"rope_theta": 10000.0, "rope_scaling": None}
# name: changes to a config.json of transformers 5, what is removed from it, words of the note
DISAGREEING = {
    "rope_scaling added to rope_parameters": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        (),
        ["rope_scaling counts"],
    ),
    "yarn added": ({"rope_scaling": YARN}, (), ["rope_scaling counts"]),
    "another theta added": (
        {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        (),
        ["rope_scaling counts"],
    ),
    "a factor without a type": (
        OLD_STYLE | {"rope_scaling": {"factor": 4.0}},
        ("rope_parameters",),
        ["factor"],
    ),
    "the default type with llama3's keys": (
        OLD_STYLE | {"rope_scaling": ROPES["llama3"][0] | {"rope_type": "default"}},
        ("rope_parameters",),
        ["high_freq_factor"],
    ),
    "the original window beside rope_scaling": (
        OLD_STYLE
        | {
            "rope_scaling": {"type": "yarn", "factor": 4.0},
            "original_max_position_embeddings": WINDOW // 2,
        },
        ("rope_parameters",),
        [],
    ),
    "max_sequence_length alone": (
        OLD_STYLE | {"max_sequence_length": WINDOW},
        ("rope_parameters", "max_position_embeddings"),
        [],
    ),
    "LLaMA 1 with linear switched on": (
        OLD_STYLE
        | {"max_sequence_length": WINDOW, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ("rope_parameters",),
        ["original 64, extended 256"],
    ),
}


@pytest.mark.parametrize("name", DISAGREEING)
def test_a_config_is_read_as_transformers_reads_it(folder, name, capsys):
    changes, drop, words = DISAGREEING[name]
    edit_json(folder / "config.json", drop=drop, **changes)
    capsys.readouterr()
    model = load(folder)
    error = capsys.readouterr().err
    assert error.count("\n") == bool(words)
    for word in words:
        assert word in error
    assert_same_logits(model, folder)


def test_original_window_above_the_configs(folder, tmp_path, capsys):
    """As for Llama 2, which was first published with half of its window in config.json."""
    capsys.readouterr()
    model = load(folder, original_window=2 * WINDOW)
    assert (model.config.original_window, model.config.block_size) == (2 * WINDOW, 2 * WINDOW)
    assert capsys.readouterr().err == ""
    assert_same_logits(model, folder)
    save(load(folder, original_window=2 * WINDOW, scale=4), tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert (config.original_window, config.block_size) == (2 * WINDOW, 8 * WINDOW)


# ---- what is assumed -----------------------------------------------------------------------------


def test_what_is_assumed_is_one_line_on_standard_error(tmp_path, capsys):
    write_hugging_face(tmp_path, "linear")
    capsys.readouterr()  # the progress bar of transformers
    config = read_config(tmp_path)
    error = capsys.readouterr().err
    assert error.startswith(f"{tmp_path}: ")
    assert error.count("\n") == 1
    assert "taken for the original window" in error
    assert read_config(tmp_path, original_window=WINDOW) == config
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bad", [0, -1])
def test_an_original_window_that_is_none(folder, bad):
    with pytest.raises(ValueError, match="original_window must be a positive number"):
        read_config(folder, original_window=bad)


def test_a_guessed_original_window_is_not_built_upon(tmp_path):
    write_hugging_face(tmp_path, "yarn")
    rope = YARN | {"rope_theta": 10000.0}
    del rope["original_max_position_embeddings"]
    edit_json(tmp_path / "config.json", rope_parameters=rope, max_position_embeddings=WINDOW)
    model = load(tmp_path)
    config = model.config
    assert (config.scale, config.block_size, config.original_window) == (4, 4 * WINDOW, WINDOW)
    # As it is, it is what transformers makes of it
    assert_same_logits(model, tmp_path)
    assert_load_refuses(tmp_path, "--original_window", scale=8)
    assert load(tmp_path, scale=8, original_window=WINDOW).config.block_size == 8 * WINDOW


def test_a_config_edited_by_hand_is_read_as_transformers_reads_it(folder, tmp_path, capsys):
    for rope in ("linear", "yarn"):
        save(load(folder, scale=4, rope=rope), tmp_path / rope)
        raw = json.loads((tmp_path / rope / "config.json").read_text())
        edit_json(
            tmp_path / rope / "config.json", rope_scaling=raw["rope_scaling"] | {"factor": 2.0}
        )
        capsys.readouterr()
        model = load(tmp_path / rope)
        error = capsys.readouterr().err
        assert model.config.scale == 2
        assert_same_logits(model, tmp_path / rope)
        assert error.count("\n") == 1
        assert "contradicts" in error
    # The original window of yarn is named, so that it can be extended all the same
    assert load(tmp_path / "yarn", scale=8).config.block_size == 8 * WINDOW


# ---- bad input: one line that names the file or the argument -------------------------------------


def test_not_a_checkpoint(tmp_path):
    assert_load_refuses(tmp_path, str(tmp_path), "config.json")
    assert_load_refuses(tmp_path / "nowhere", str(tmp_path / "nowhere"))
    write_hugging_face(tmp_path / "a")
    assert_load_refuses(tmp_path / "a" / "config.json", "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model_type": "llama"', "\x00\x01"])
def test_a_config_that_is_no_json(folder, text):
    (folder / "config.json").write_text(text)
    assert_load_refuses(folder, "config.json")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"vocab_size": 98}, "embed_tokens.weight"),
        ({"intermediate_size": 113}, "mlp"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"num_hidden_layers": 1}, "layers.1"),
    ],
)
def test_a_config_of_another_model(folder, change, word):
    edit_json(folder / "config.json", **change)
    assert_load_refuses(folder, word)


def test_tensors_that_do_not_fit(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({key: tensor for key, tensor in state.items() if key != name}, path)
    assert_load_refuses(folder, "k_proj.weight is missing")
    save_file(state | {name: state[name][:-1].contiguous()}, path)
    assert_load_refuses(folder, "k_proj.weight has shape (31, 64)", "(32, 64)")
    save_file(state | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}, path)
    assert_load_refuses(folder, "q_proj.bias")
    save_file({key: tensor for key, tensor in state.items() if key != "lm_head.weight"}, path)
    assert_load_refuses(folder, "lm_head.weight is missing")


@pytest.mark.parametrize("files", [["config.json", "model.safetensors"], []])
def test_an_adapter(folder, files):
    (folder / "adapter_config.json").write_text("{}")
    for path in folder.glob("*"):
        if path.name not in ["adapter_config.json", *files]:
            path.unlink()
    assert_load_refuses(folder, "adapter_config.json", "merge it into its model")


def test_old_gptq(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    packed = {}
    for name, tensor in state.items():
        packed[name.replace("proj.weight", "proj.qweight")] = tensor
    save_file(packed, path)
    assert_load_refuses(folder, "qweight is quantized")


def test_names_with_an_unknown_prefix(folder):
    path = folder / "model.safetensors"
    state = {f"language_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(state, path)
    assert_load_refuses(
        folder, "embed_tokens.weight is missing", "language_model.model.embed_tokens.weight"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_quantized_tensors(folder, dtype):
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file(state | {name: state[name].to(dtype)}, path)
    assert_load_refuses(folder, "k_proj.weight is torch.", "no floating point")


# ---- disks that are full -------------------------------------------------------------------------


@contextmanager
def largest_file(size: int):
    """Within, no file can grow beyond size bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Not even config.json fits; the first shard fits, but not the largest. capsys: no output to files.
@pytest.mark.parametrize("limit", [100, 80_000])
@pytest.mark.parametrize("place", ["old", "new"])
def test_a_full_disk_leaves_what_was_there(tmp_path, limit, place, capsys):
    write_hugging_face(tmp_path / "a")
    model = load(tmp_path / "a")
    save(model, tmp_path / "old", max_shard_size=90e3)
    (tmp_path / "new").mkdir()
    before = contents(tmp_path / place)
    shards = sorted((tmp_path / "old").glob("*.safetensors"))
    sizes = [path.stat().st_size for path in shards]
    assert sizes[0] < 80_000 < max(sizes)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    with pytest.raises(OSError) as caught, largest_file(limit):
        save(model, tmp_path / place, max_shard_size=90e3)
    assert str(tmp_path / place) in str(caught.value)
    assert "File too large" in str(caught.value)
    assert contents(tmp_path / place) == before


def test_a_path_under_a_file(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        save(load(folder), tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "x"


# ---- memory --------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import json, sys, threading, time, torch
from checkpoint import load

def status(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

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
sum(float(p.sum()) for p in model.parameters())  # touches every page
time.sleep(0.05)
found = {key: peak[key] - before[key] for key in peak}
found["model"] = sum(p.nbytes for p in model.parameters())
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(tmp_path, capsys):
    """Loading takes the model's memory, and pages of mapped files, which the system can drop."""
    size = {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 2752,
        "vocab_size": 96,
        "num_hidden_layers": 8,
    }
    model = write_hugging_face(tmp_path / "float32", size=size).bfloat16()
    model.save_pretrained(tmp_path / "bfloat16")
    write_meta(tmp_path / "meta", model, 2, "Llama 2")
    largest = max(p.numel() for p in model.parameters())
    for name, dtype in (
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("bfloat16", "bfloat16"),
        ("meta", "bfloat16"),
    ):
        found = json.loads(run_python("-c", MEMORY_SCRIPT, tmp_path / name, dtype).stdout)
        files = sum(file.stat().st_size for file in (tmp_path / name).iterdir())
        with capsys.disabled():
            print(f"\n{name} as {dtype}: files {files / 1e6:.0f} MB, in MB:", end=" ")
            print({key: round(value / 1e6) for key, value in found.items()})
        room = 8 * largest + 96e6  # a tensor or two, and torch itself
        assert found["RssAnon"] < found["model"] + room
        assert found["VmRSS"] < found["model"] + files + room


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def with_tokenizer(tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer, with all the files that transformers would write."""
    folder = tmp_path_factory.mktemp("with_tokenizer")
    size = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": None}
    write_hugging_face(folder, size=size)
    texts = ["def f(x): return x + 1\n" * 50, "naïve café 🎉\n" * 20]
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    edit_json(folder / "config.json", **ids)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    return folder


def facts(out: str) -> dict[str, str]:
    """The lines of `describe` by name."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())


def test_describe(with_tokenizer, command):
    ended = command(checkpoint.main, with_tokenizer)
    assert (ended.code, ended.error) == (0, "")
    model = load(with_tokenizer)
    n_params = sum(p.numel() for p in model.parameters())
    n_tokens = load_tokenizer(with_tokenizer, model.config).vocab_size
    assert facts(ended.out) == {
        "checkpoint": f"{with_tokenizer} (Hugging Face folder)",
        "family": "LLaMA",
        "parameters": f"{n_params:,}",
        "layers": "2",
        "heads": "4 of 16, 2 for keys and values",
        "window": "64",
        "original window": "64",
        "method": "none",
        "factor": "1",
        "rope_theta": "10000",
        "tokenizer": f"tokenizer.json, {n_tokens} tokens",
        "dtype": "float32",
    }


def test_describe_an_extension(with_tokenizer, command):
    found = facts(command(checkpoint.main, with_tokenizer, "--scale", 8, "--rope", "yarn").out)
    assert (found["window"], found["original window"]) == ("512", "64")
    assert (found["method"], found["factor"]) == ("yarn", "8")


def test_describe_a_meta_folder(tmp_path, command):
    model = write_hugging_face_for_meta(tmp_path / "hf", "Llama 2")
    write_meta(tmp_path / "meta", model, 2, "Llama 2")
    ended = command(checkpoint.main, tmp_path / "meta")
    assert ended.code == 0
    assert ended.error.count("\n") == 1
    assert "Meta folder" in ended.out
    assert facts(ended.out)["tokenizer"] == "none"


@pytest.mark.parametrize("name", ["llama-7b", "llama2-7b", "llama3-8b"])
def test_families_are_known_by_their_shape(name):
    config = LLaMAConfig.preset(name)
    found = facts(checkpoint.describe(".", config, None, torch.bfloat16))
    assert (found["family"], found["dtype"]) == (name, "bfloat16")


def test_convert(with_tokenizer, tmp_path, command):
    out = tmp_path / "out"
    flags = ("--scale", 4, "--dtype", "bfloat16", "--max_shard_size", "60KB")
    ended = command(checkpoint.main, with_tokenizer, out, *flags)
    assert ended.code == 0, ended.error
    found = facts(ended.out)
    assert found["checkpoint"].startswith(str(out))
    assert (found["dtype"], found["method"], found["window"]) == ("bfloat16", "linear", "256")
    assert len(list(out.glob("*.safetensors"))) > 2
    assert_same_logits(load(out, dtype=torch.float32), out, IDS)

    # The tokenizer comes along
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        assert (out / name).read_bytes() == (with_tokenizer / name).read_bytes(), name
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ours = load_tokenizer(out, read_config(out))
    assert theirs.encode("def café", add_special_tokens=False) == ours.encode("def café")

    # What was converted can be extended further, counted from the original window
    flags = ("--scale", 8, "--dtype", "float16")
    assert command(checkpoint.main, out, tmp_path / "longer", *flags).code == 0
    config = read_config(tmp_path / "longer")
    assert (config.scale, config.block_size, config.original_window) == (8, 512, 64)
    tensors = load_file(tmp_path / "longer" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_convert_a_meta_folder_with_its_tokenizer_one_folder_up(tmp_path, command):
    """As LLaMA 1 came: tokenizer.model, 7B/, 13B/, ..."""
    model = write_hugging_face_for_meta(tmp_path / "hf", "Llama 2", vocab_size=300)
    write_meta(tmp_path / "7B", model, 2, "Llama 2")
    tokenizer = train_tokenizer(["def f(x): return x + 1\n" * 50], 290)
    tokenizer.save(tmp_path)
    ended = command(checkpoint.main, tmp_path / "7B", tmp_path / "out", "--original_window", 64)
    assert ended.code == 0, ended.error
    assert_same_logits(load(tmp_path / "7B", original_window=64), tmp_path / "out", IDS)
    assert read_config(tmp_path / "out").original_window == 64
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.fixture
def source(with_tokenizer, tmp_path) -> Path:
    shutil.copytree(with_tokenizer, tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--scale", "0.5"], "scale"),
        (["--rope", "magic"], "magic"),
        (["--dtype", "int8"], "--dtype"),
        (["--max_shard_size", "big"], "--max_shard_size: big is not a size"),
        (["--max_shard_size", "0GB"], "--max_shard_size: 0GB is not a size"),
        (["--max_shard_size", "-5GB"], "--max_shard_size"),
        (["--max_shard_size", "5"], "--max_shard_size: 5 is not a size"),
    ],
)
def test_wrong_flags_write_nothing(source, tmp_path, command, flags, words):
    before = contents(source)
    assert_refused(
        command(checkpoint.main, source, tmp_path / "out", *flags), "checkpoint.py", words
    )
    assert contents(source) == before
    assert not (tmp_path / "out").exists()


def test_wrong_paths_write_nothing(source, tmp_path, command):
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").write_text("x")
    for arguments, words in (
        ([source, source], "checkpoint itself"),
        ([source, tmp_path / "link"], "checkpoint itself"),
        ([tmp_path / "none", tmp_path / "out"], "none"),
        ([source, tmp_path / "file"], "file"),
        ([source, tmp_path / "file" / "out"], "file"),
        ([], "src"),
    ):
        assert_refused(command(checkpoint.main, *arguments), "checkpoint.py", words)
    assert contents(source) == before
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "file").read_text() == "x"


def test_a_damaged_source_writes_nothing(source, tmp_path, command):
    larger = train_tokenizer([Path(checkpoint.__file__).read_text()], 310)
    whole = (source / "model.safetensors").read_bytes()
    for name, content, words in (
        ("tokenizer.json", larger.files["tokenizer.json"], "tokenizer has 310 tokens"),
        ("tokenizer.json", b"{", "tokenizer.json"),
        ("model.safetensors", whole[:-9], "model.safetensors"),
    ):
        right = (source / name).read_bytes()
        (source / name).write_bytes(content)
        ended = command(checkpoint.main, source, tmp_path / "out")
        assert_refused(ended, "checkpoint.py", words)
        assert not (tmp_path / "out").exists()
        (source / name).write_bytes(right)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("notes.txt", "x", "holds files that are no checkpoint"),
        ("log.jsonl", "", "holds a run of train.py"),
        ("config.json", '{"model_type": "llama"}', "holds a checkpoint that was not written here"),
        ("params.json", "{}", "holds a checkpoint of Meta's"),
    ],
)
def test_a_copy_replaces_nothing_but_an_earlier_copy(name, content, message, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        checkpoint.check_destination(str(tmp_path / "dst"), tmp_path / "src")
    expected = f"{tmp_path}/dst {message}: give a new folder, or remove it first"
    assert str(caught.value) == expected


def test_a_copy_needs_a_folder_that_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for dst, message in (("file", "is a file"), ("file/dst", "can't be written")):
        with pytest.raises(ValueError, match=message):
            checkpoint.check_destination(str(tmp_path / dst), tmp_path / "src")
    (tmp_path / "earlier").mkdir()
    ours = {checkpoint.OUR_KEY: {}}
    (tmp_path / "earlier/config.json").write_text(json.dumps(ours))
    for dst in ("earlier", "new/dst"):
        checkpoint.check_destination(str(tmp_path / dst), tmp_path / "src")


def test_only_what_the_command_extended_is_called_untuned():
    base = LLaMAConfig(block_size=64, original_window=64)
    pi = extend(base, 2)
    assert checkpoint.advice("base", "dst", base, base) == ""
    assert checkpoint.advice("pi", "dst", pi, pi) == ""
    assert checkpoint.advice("base", "dst", extend(base, 2, "yarn"), base) == ""
    advice = checkpoint.advice("base", "dst", pi, base)
    assert advice.startswith("dst: interpolated but not fine-tuned")
    assert "python train.py --init base --scale 2 --rope linear" in advice
    assert "extrapolated" in checkpoint.advice("base", "dst", extend(base, 2, "none"), base)


def test_two_stored_matrices_are_compared_once_and_again_after_a_change(tmp_path, monkeypatch):
    calls = []

    def compare(tensors: dict) -> bool:
        calls.append(1)
        return False

    model = random_model(vocab_size=300, tie_embeddings=True)
    checkpoint.save(model, tmp_path)
    monkeypatch.setattr(checkpoint, "has_own_head", compare)
    for _ in range(3):
        checkpoint.read_config(tmp_path)
    assert len(calls) == 1
    checkpoint.save(model, tmp_path)
    checkpoint.read_config(tmp_path)
    assert len(calls) == 2
