"""checkpoint.py and tokenizers: BOS, EOS and end tokens of folders that users have, and exports."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import checkpoint
import generate
from checkpoint import end_ids, load, load_tokenizer, read_config, save
from checkpoints import edit_json, write_hugging_face, write_hugging_face_for_meta, write_meta
from conftest import english, random_model

N_PIECES = 420  # of the small sentencepiece model


def llama2(folder: Path, source: Path, size: dict | None = None, **files: dict) -> Path:
    """A checkpoint of transformers with a sentencepiece tokenizer and JSON files beside it."""
    write_hugging_face(folder, size={"vocab_size": N_PIECES} | (size or {}))
    (folder / "generation_config.json").unlink()
    shutil.copy(source / "tokenizer.model", folder)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def json_file(path: Path) -> dict:
    return json.loads(path.read_text())


# ---- BOS, EOS and end tokens ---------------------------------------------------------------------


def test_the_tokenizer_knows_what_bos_and_eos_are(sentencepiece_folder, tmp_path, capsys, command):
    """LLaMA 1's first folders say BOS 0 and EOS 1, which are <unk> and <s>."""
    folder = llama2(
        tmp_path / "llama1",
        sentencepiece_folder,
        size={"bos_token_id": 0, "eos_token_id": 1},
        tokenizer_config={"bos_token": "", "eos_token": "", "model_max_length": 10**30},
        generation_config={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    )
    capsys.readouterr()
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        f"{folder}: BOS is token 1 by the tokenizer, 0 by the config: the tokenizer's is taken",
        f"{folder}: EOS is token 2 by the tokenizer, 1 by the config: the tokenizer's is taken",
    ]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert end_ids(config, tokenizer) == 2

    # The export has the right ids everywhere, and nothing is left to say
    out = tmp_path / "out"
    assert command(checkpoint.main, folder, out, "--scale", 4).code == 0
    for name in ("config.json", "generation_config.json"):
        saved = json_file(out / name)
        assert (saved["bos_token_id"], saved["eos_token_id"]) == (1, 2)
    capsys.readouterr()
    load_tokenizer(out, read_config(out))
    assert capsys.readouterr().err == ""


def test_generation_ends_at_the_tokens_of_generation_config(bpe, tmp_path, command):
    """As in Llama 3 Instruct, whose list of end tokens is there alone."""
    folder = tmp_path / "instruct"
    size = {"vocab_size": 500, "bos_token_id": 0, "eos_token_id": 1}
    write_hugging_face(folder, size=size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bpe / name, folder)

    prompt = ("--init", folder, "--prompt", "The", "--max_new_tokens", 20)
    model = load(folder)
    tokenizer = load_tokenizer(folder, model.config)
    ids = torch.tensor([[0, *tokenizer.encode("The")]])
    tokens = model.generate(ids, 20)[0, ids.size(1) :].tolist()
    end = tokens[4]
    assert command(generate.main, *prompt).out == tokenizer.decode(tokens) + "\n"

    edit_json(folder / "generation_config.json", eos_token_id=[1, end])
    config = read_config(folder)
    assert config.eos_id == (1, end)
    assert end_ids(config, tokenizer) == (1, end)
    stopped = tokens[: tokens.index(end) + 1]
    assert command(generate.main, *prompt).out == tokenizer.decode(stopped) + "\n"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.size(1) :]
    assert expected.tolist() == stopped

    # Both files of an export have the list
    save(load(folder), tmp_path / "out", tokenizer)
    for name in ("config.json", "generation_config.json"):
        assert json_file(tmp_path / "out" / name)["eos_token_id"] == [1, end]


@pytest.mark.parametrize(
    "in_config, bos, eos, stops, expected",
    [
        (None, 0, None, (), None),
        (None, 0, 1, (), 1),
        (1, 0, 1, (), 1),
        (5, 0, 1, (), (5, 1)),
        ((5, 1), 0, 1, (), (5, 1)),
        (1, 0, 1, (8, 9), (1, 8, 9)),
        (1, 1, 2, (), 2),  # the config ends texts at BOS
        (0, 0, 0, (), 0),  # BOS and EOS are one token
    ],
)
def test_end_ids(tok, in_config, bos, eos, stops, expected):
    config = random_model(eos_id=in_config).config
    tokenizer = replace(tok, bos_id=bos, eos_id=eos, stop_ids=stops)
    assert end_ids(config, tokenizer) == expected


# ---- tokens beyond the model's vocabulary --------------------------------------------------------


def test_tokens_that_no_text_contains_may_be_beyond_the_vocabulary(
    sentencepiece_folder, tmp_path, capsys
):
    """A pad token is often added to the tokenizer alone; transformers opens such folders."""
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    names |= {"unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True}
    folder = llama2(
        tmp_path / "model",
        sentencepiece_folder,
        tokenizer_config=names,
        added_tokens={"<pad>": N_PIECES},
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    fast = llama2(tmp_path / "json", sentencepiece_folder)
    (fast / "tokenizer.model").unlink()
    theirs.save_pretrained(fast)

    text = english(60)
    for path in (folder, fast):
        capsys.readouterr()
        tokenizer = load_tokenizer(path, read_config(path))
        assert capsys.readouterr().err == (
            f"{path}: the tokenizer has 421 tokens, the model 420: "
            "the rest is left out, no text has it\n"
        )
        assert tokenizer.vocab_size == N_PIECES
        assert tokenizer.bos_ids + tokenizer.encode(text) == theirs(text).input_ids


def test_tokens_that_are_needed_must_be_in_the_vocabulary(sentencepiece_folder, tmp_path):
    folder = llama2(
        tmp_path / "a",
        sentencepiece_folder,
        tokenizer_config={"eos_token": "<|im_end|>"},
        added_tokens={"<|im_end|>": N_PIECES},
    )
    with pytest.raises(ValueError, match="421 tokens, the model 420, and token 420 is needed"):
        load_tokenizer(folder, read_config(folder))
    folder = llama2(tmp_path / "b", sentencepiece_folder, size={"vocab_size": 400})
    with pytest.raises(ValueError, match="420 tokens, the model 400, and token 419 is needed"):
        load_tokenizer(folder, read_config(folder))


# ---- what an export holds ------------------------------------------------------------------------


def test_an_export_has_no_limit_below_its_window(sentencepiece_folder, tmp_path, command):
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    folder = llama2(
        tmp_path / "model",
        sentencepiece_folder,
        tokenizer_config=names | {"model_max_length": 64},
        generation_config={"max_length": 64, "bos_token_id": 1, "eos_token_id": 2},
    )
    out = tmp_path / "out"
    assert command(checkpoint.main, folder, out, "--scale", 4).code == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer(english(200), truncation=True, return_tensors="pt").input_ids
    assert ids.size(1) == tokenizer.model_max_length == 256
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(ids[:, :100], do_sample=False).size(1) > 100
    assert json_file(folder / "generation_config.json")["max_length"] == 64


def test_an_export_removes_the_files_of_another_tokenizer(
    bpe, sentencepiece_folder, tok, tmp_path, command
):
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    folder = llama2(tmp_path / "model", sentencepiece_folder, tokenizer_config=names)
    out = tmp_path / "out"
    save(random_model(vocab_size=500), out, tok)
    assert (out / "tokenizer.json").is_file()
    stale = ("added_tokens.json", "chat_template.jinja", "generation_config.json")
    for name in stale:
        (out / name).write_text('{"<old>": 7}')
    (out / "notes.txt").write_text("mine")

    assert command(checkpoint.main, folder, out).code == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "notes.txt",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    expected = load_tokenizer(folder, read_config(folder))
    assert load_tokenizer(out, read_config(out)).fingerprint == expected.fingerprint

    # Who saves without a tokenizer has put one there, or will
    save(random_model(), out)
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("form", ["sentencepiece", "tiktoken"])
def test_metas_folders_open_in_transformers(
    form, sentencepiece_folder, tiktoken_folder, tokenizers_by_form, tmp_path, command
):
    family, source = "Llama 2", sentencepiece_folder
    if form == "tiktoken":
        family, source = "Llama 3", tiktoken_folder
    ours = tokenizers_by_form[form]
    model = write_hugging_face_for_meta(tmp_path / "hf", family, vocab_size=ours.vocab_size)
    write_meta(tmp_path / "meta", model, 1, family)
    edit_json(tmp_path / "meta" / "params.json", vocab_size=ours.vocab_size)
    shutil.copy(source / "tokenizer.model", tmp_path / "meta")
    out = tmp_path / "out"
    ended = command(checkpoint.main, tmp_path / "meta", out, "--original_window", 64)
    assert ended.code == 0, ended.error

    # BOS comes first, and generation ends where Meta's own code ends it
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    text = english(100)
    assert theirs(text).input_ids == [ours.bos_id, *ours.encode(text)]
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.bos_token_id == theirs.bos_token_id == ours.bos_id
    if form == "tiktoken":
        ends = [theirs.convert_tokens_to_ids(name) for name in ("<|eom_id|>", "<|eot_id|>")]
        # Before these is the EOS that our reader of params.json guesses for so few tokens
        assert config.eos_token_id == [2, theirs.eos_token_id, *ends]
    else:
        assert config.eos_token_id == theirs.eos_token_id == 2

    # The export and its source are tokenized alike, and share a tokenized corpus
    again = load_tokenizer(out, read_config(out))
    assert again.fingerprint == ours.fingerprint
