"""What several files of tests share: each form of tokenizer, small."""

import base64
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import sequences
from tokenizer import load_tokenizer, train_tokenizer

TEXTS = [
    "The quick brown fox, 12345 of them.\n\n\tIndented  twice  and it's DONE...\n",
    "Naïve café: 日本語, Ελληνικά, 🙂👩‍👩‍👧 and 00417.",
    '<s>not BOS</s> <|begin_of_text|><|end_of_text|> <unk> <pad> [INST] <|eot_id|> <extra> "',
    " leading and trailing spaces   ",
    "\n\n\n",
    "x" * 300 + " 9" * 50,
    sequences.passkey_text("00417", 3, 7),
]


FORMS = ["bpe", "sentencepiece", "tiktoken", "llama_json"]


def english(n: int = 400, seed: int = 0) -> str:
    """Something like prose, for small tokenizers and corpora."""
    words = (sequences.passkey_text("90210", 5, 5) + " It was the best of times, it was the worst of times;").split()
    rng = np.random.default_rng(seed)
    chosen = (words[i] + (f"{rng.integers(1000)}" if i % 9 == 0 else "") for i in rng.integers(len(words), size=n))
    return " ".join(chosen)


# Each form of tokenizer, small: a folder, and the library's own way to encode


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer([english(), *TEXTS], 500).save(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    import sentencepiece

    folder, model = tmp_path_factory.mktemp("sentencepiece"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((english() + TEXTS[0]).splitlines()), model_writer=model, vocab_size=420,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def tiktoken_folder(tmp_path_factory):
    """Ranks made from scratch: the 256 bytes, then every piece of the words, shortest first."""
    pieces = {w[:i].encode() for w in re.findall(r" ?[A-Za-z]+|\d", english() + TEXTS[0]) for i in range(2, len(w) + 1)}
    pieces |= {b".\n", b"12", b"00", b"004", b"123", b"1234", b"0041"}
    tokens = [bytes([i]) for i in range(256)] + sorted(pieces, key=lambda p: (len(p), p))
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)]
    folder = tmp_path_factory.mktemp("tiktoken")
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(scope="session")
def llama_json_folder(tmp_path_factory):
    """As LlamaTokenizerFast is saved: a metaspace BPE with byte fallback, special tokens, BOS by a post-processor."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    tok = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = pre_tokenizers.Sequence(  # for the training only: no merges across words, or of digits
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tok.train_from_iterator(
        [english()], trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    content = json.loads(tok.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    tok = tokenizers.Tokenizer.from_str(json.dumps(content))
    tok.add_special_tokens(["<extra>"])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("llama_json")
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>",
        "bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>",
    }))  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tokenizers_by_form(bpe, sentencepiece_folder, tiktoken_folder, llama_json_folder):
    return {
        "bpe": load_tokenizer(bpe), "sentencepiece": load_tokenizer(sentencepiece_folder),
        "tiktoken": load_tokenizer(tiktoken_folder), "llama_json": load_tokenizer(llama_json_folder),
    }  # fmt: skip


@pytest.fixture(scope="session")
def tok(tokenizers_by_form):
    return tokenizers_by_form["bpe"]


# Runs of train.py


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """All runs share one folder, and so one tokenized corpus."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("runs"))
    yield
    os.chdir(before)
