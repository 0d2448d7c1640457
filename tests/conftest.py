"""What several test files share: small tokenizers, a small model, scripts run in this process."""

import base64
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import cli
import prompts
from model import LLaMA, LLaMAConfig
from tokenizer import load_tokenizer, train_tokenizer

# ---- texts ---------------------------------------------------------------------------------------

TEXTS = [
    "The quick brown fox, 12345 of them.\n\n\tIndented  twice  and it's DONE...\n",
    "Naïve café: 日本語, Ελληνικά, 🙂👩‍👩‍👧 and 00417.",
    '<s>not BOS</s> <|begin_of_text|><|end_of_text|> <unk> <pad> [INST] <|eot_id|> <extra> "',
    " leading and trailing spaces   ",
    "\n\n\n",
    "x" * 300 + " 9" * 50,
    prompts.passkey_text("00417", 3, 7),
]


def english(n: int = 400, seed: int = 0) -> str:
    """A text of n words that looks like prose, for small tokenizers and corpora."""
    text = prompts.passkey_text("90210", 5, 5)
    text += " It was the best of times, it was the worst of times;"
    words = text.split()
    rng = np.random.default_rng(seed)
    chosen = []
    for i in rng.integers(len(words), size=n):
        word = words[i]
        if i % 9 == 0:
            word += f"{rng.integers(1000)}"
        chosen.append(word)
    return " ".join(chosen)


# ---- each form of tokenizer, small ---------------------------------------------------------------

FORMS = ["bpe", "sentencepiece", "tiktoken", "llama_json"]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """The folder of a tokenizer as this repo trains it."""
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer([english(), *TEXTS], 500).save(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    """The folder of a SentencePiece model with LLaMA's options."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((english() + TEXTS[0]).splitlines()),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def tiktoken_folder(tmp_path_factory):
    """The folder of ranks as Llama 3 has them: the 256 bytes, then pieces of words."""
    pieces = {b".\n", b"12", b"00", b"004", b"123", b"1234", b"0041"}
    for word in re.findall(r" ?[A-Za-z]+|\d", english() + TEXTS[0]):
        for end in range(2, len(word) + 1):
            pieces.add(word[:end].encode())
    tokens = [bytes([i]) for i in range(256)]
    tokens += sorted(pieces, key=lambda piece: (len(piece), piece))
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)]
    folder = tmp_path_factory.mktemp("tiktoken")
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(scope="session")
def llama_json_folder(tmp_path_factory):
    """The folder of a tokenizer as LlamaTokenizerFast saves it.

    It is a metaspace BPE with byte fallback and special tokens; a post-processor puts BOS first.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # The pre-tokenizer is for the training only: no merges across words, and none of digits
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    special += [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    trained.train_from_iterator([english()], trainer)
    content = json.loads(trained.to_str())
    content["pre_tokenizer"] = None
    added = content["added_tokens"]
    content["added_tokens"] = [t for t in added if not t["content"].startswith("<0x")]

    saved = tokenizers.Tokenizer.from_str(json.dumps(content))
    saved.add_special_tokens(["<extra>"])
    saved.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    saved.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    folder = tmp_path_factory.mktemp("llama_json")
    saved.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizers_by_form(bpe, sentencepiece_folder, tiktoken_folder, llama_json_folder):
    return {
        "bpe": load_tokenizer(bpe),
        "sentencepiece": load_tokenizer(sentencepiece_folder),
        "tiktoken": load_tokenizer(tiktoken_folder),
        "llama_json": load_tokenizer(llama_json_folder),
    }


@pytest.fixture(scope="session")
def tok(tokenizers_by_form):
    return tokenizers_by_form["bpe"]


# ---- a small model -------------------------------------------------------------------------------


def random_model(**changes: object) -> LLaMA:
    """A small model whose weights are all random, because the head of a new one is zero."""
    config = {
        "vocab_size": 320,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "intermediate_size": 48,
        "block_size": 64,
    }
    torch.manual_seed(0)
    model = LLaMA(LLaMAConfig(**config | changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# ---- scripts -------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a script ended: its exit code, its standard output and its standard error."""

    code: int
    out: str
    error: str


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., Ended]:
    """command(main, *arguments) runs a script's main function as a process of its own would."""

    def call(main: Callable[[], None], *arguments: object) -> Ended:
        script = main.__module__ + ".py"
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.run(main)
        except SystemExit as stop:
            code = stop.code or 0
        return Ended(code, *capsys.readouterr())

    return call


def assert_refused(ended: Ended, script: str, words: str) -> None:
    """Bad input ends a script with exit code 2 and one line, which has these words in it."""
    assert ended.code == 2
    assert ended.out == ""
    assert ended.error.startswith(f"{script}: error: ")
    assert ended.error.count("\n") == 1
    assert words in ended.error


# ---- runs of train.py ----------------------------------------------------------------------------


def log(out: Path) -> list[dict]:
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """All runs of a test file share one folder, and so one tokenized corpus."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("runs"))
    yield
    os.chdir(before)
