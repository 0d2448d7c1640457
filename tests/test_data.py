"""data.py against the libraries that own the tokenizer formats, and against what its docstrings promise."""

import base64
import errno
import functools
import hashlib
import io
import json
import re
import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import tokenizer
from data import Mix, load_corpus, load_tokenizer, passkey_prompt, read_documents, sample_batch, train_tokenizer

TEXTS = [
    "The quick brown fox, 12345 of them.\n\n\tIndented  twice  and it's DONE...\n",
    "Naïve café: 日本語, Ελληνικά, 🙂👩‍👩‍👧 and 00417.",
    '<s>not BOS</s> <|begin_of_text|><|end_of_text|> <unk> <pad> [INST] <|eot_id|> <extra> "',
    " leading and trailing spaces   ",
    "\n\n\n",
    "x" * 300 + " 9" * 50,
    data.passkey_text("00417", 3, 7),
]


FORMS = ["bpe", "sentencepiece", "tiktoken", "llama_json"]


def english(n: int = 400, seed: int = 0) -> str:
    """Something like prose, for small tokenizers and corpora."""
    words = (data.passkey_text("90210", 5, 5) + " It was the best of times, it was the worst of times;").split()
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


# ---------------------------------------------------------------- tokenizers


def test_byte_level_bpe_equals_the_library(bpe, tok):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    for text in TEXTS:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert 0 not in ids and 1 not in ids  # "<s>" and "</s>" within a text are text
        if "<s>" not in text:
            assert ids == theirs.encode(text).ids
    assert tok.encode_batch(TEXTS) == [tok.encode(text) for text in TEXTS]
    assert (tok.vocab_size, tok.bos_id, tok.eos_id) == (500, 0, 1)
    assert len(tok.encode("00417")) == 5
    assert len({tok.encode(str(digit))[0] for digit in range(10)}) == 10


def test_sentencepiece_equals_the_library(sentencepiece_folder, tokenizers_by_form):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    ours = tokenizers_by_form["sentencepiece"]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text) and ours.decode(ids) == text
        assert not {0, 1, 2} & set(ids)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (420, 1, 2)
    assert len(ours.encode("00417")) == 6  # the space in front, and five digits


def test_tiktoken_ranks_equal_the_library(tiktoken_folder, tokenizers_by_form, monkeypatch):
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would cache by file name
    ranks = load_tiktoken_bpe(str(tiktoken_folder / "tokenizer.model"))
    pattern = (  # as Meta publishes it
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    theirs = tiktoken.Encoding("theirs", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ours = tokenizers_by_form["tiktoken"]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text) and ours.decode(ids) == text
        assert max(ids) < len(ranks)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (len(ranks) + 256, len(ranks), len(ranks) + 1)
    assert ours.decode([ours.bos_id, *ours.encode("a"), ours.eos_id]) == "a"
    assert len(ours.encode("00417")) == 3  # digits by three: "004" is a rank, "17" is none


def test_llama3_special_tokens_have_metas_order():
    assert len(tokenizer._LLAMA3_SPECIAL) == len(set(tokenizer._LLAMA3_SPECIAL)) == 256
    at = tokenizer._LLAMA3_SPECIAL.index  # ids that Llama 3's model card and config.json give
    assert [at(f"<|{name}|>") + 128000 for name in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id",
            "eot_id", "reserved_special_token_250")] == [128000, 128001, 128006, 128007, 128009, 128255]  # fmt: skip


def test_llama_json_equals_the_library_with_special_tokens_as_text(llama_json_folder, tokenizers_by_form):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(llama_json_folder / "tokenizer.json"))
    ours = tokenizers_by_form["llama_json"]
    assert theirs.encode("<s> a <extra>").ids.count(1) == 2  # the trap: BOS put in front, and BOS within
    special = {theirs.token_to_id(token) for token in ("<s>", "</s>", "<extra>")}
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert not special & set(ids)
        if not any(token in text for token in ("<s>", "</s>", "<extra>", "<unk>")):
            assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert (ours.bos_id, ours.eos_id) == (1, 2)


def test_bos_and_eos_of_the_checkpoint_win(bpe):
    assert (load_tokenizer(bpe, bos_id=7, eos_id=9).bos_id, load_tokenizer(bpe, 7, 9).eos_id) == (7, 9)
    assert load_tokenizer(bpe, bos_id=7).fingerprint != load_tokenizer(bpe).fingerprint
    with pytest.raises(ValueError, match="500 tokens, EOS is 500"):
        load_tokenizer(bpe, eos_id=500)


@pytest.mark.parametrize("form", FORMS)
def test_saved_tokenizers_open_here_and_in_transformers(form, tokenizers_by_form, tmp_path, monkeypatch):
    ours = tokenizers_by_form[form]
    ours.save(tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    assert again.fingerprint == ours.fingerprint and again.files == ours.files
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert not list(tmp_path.rglob("*.tmp"))

    transformers = pytest.importorskip("transformers")
    if form in ("sentencepiece", "tiktoken"):
        pytest.importorskip("google.protobuf")  # transformers converts these through it
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in TEXTS:
        # transformers makes special tokens of "<s>", and its LlamaTokenizer loses one of the spaces in front
        if "<s>" not in text and not (form == "sentencepiece" and text[0] == " "):
            assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)


def test_companions_travel_verbatim(sentencepiece_folder, tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    (source / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (source / name).write_text('{ "odd":   "spacing"}')
    (source / "added_tokens.json").write_text('{"<|im_end|>": 421}')
    (source / "model.safetensors").write_text("not mine")
    tokenizer = load_tokenizer(source, eos_id=421)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (422, 421)
    assert tokenizer.decode([*tokenizer.encode("a 7"), 421]) == "a 7"
    tokenizer.save(target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {
        p.name: p.read_bytes() for p in source.iterdir() if p.name != "model.safetensors"
    }


def test_training_a_tokenizer_is_deterministic():
    program = "import data,sys; t=data.train_tokenizer(sys.stdin.read().split('|'), 300); print(t.fingerprint)"
    command = [sys.executable, "-c", program]
    other = subprocess.run(command, input=english(2000), capture_output=True, text=True, check=True).stdout
    here = train_tokenizer(english(2000).split("|"), 300)
    assert other.strip() == here.fingerprint and here.vocab_size == 300
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        train_tokenizer(["a"], 100)


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", b""), ("tokenizer.json", b"{}"), ("tokenizer.json", b"\xff\xfe"), ("tokenizer.json", b"[1, 2"),
    ("tokenizer.model", b""), ("tokenizer.model", b"\n\x10garbage"), ("tokenizer.model", b"QQ== 0\nQg== x\n"),
    ("tokenizer.model", b"QQ== 0\nQg== 5\n"), ("tokenizer.model", b"QQ== 0\nQ 1\n"), ("tokenizer.model", "truncated"),
])  # fmt: skip
def test_broken_tokenizers_are_one_line(name, content, tmp_path, sentencepiece_folder):
    if content == "truncated":
        content = (sentencepiece_folder / name).read_bytes()[:1500]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} can't be read as a tokenizer: .") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer: put its tokenizer.json"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- documents


def test_default_corpus_is_the_standard_library_with_a_fixed_split():
    split = {name: dict(read_documents(None, name)) for name in ("train", "val", "all")}
    assert split["train"].keys() | split["val"].keys() == split["all"].keys()
    assert not split["train"].keys() & split["val"].keys()
    assert 0.05 < len(split["val"]) / len(split["all"]) < 0.2
    assert {"argparse.py", "json/decoder.py", "random.py"} <= split["all"].keys()
    assert not [n for n in split["all"] if re.search(r"(^|/)(tests?|site-packages|idlelib|encodings)/", n)]
    assert all(len(text) > 1000 for text in split["all"].values())
    # by the name alone: these hold on every machine and Python version
    assert "argparse.py" in split["train"] and "enum.py" in split["val"]
    assert {n for n in split["all"] if data_hash(n) % 10 == 0} == split["val"].keys()


def data_hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)


def test_files_folders_and_their_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/z.txt", "b/a.md", "c.py", "a.txt", "ignored.bin", ".git/x.py"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "b" / "__init__.py").write_text("\n")  # nothing in it: left out
    assert list(read_documents([tmp_path])) == [(n, f"text of {n}") for n in ("a.txt", "c.py", "b/a.md", "b/z.txt")]
    assert list(read_documents([tmp_path / "c.py", tmp_path / "b"])) == [
        ("c.py", "text of c.py"), ("a.md", "text of b/a.md"), ("z.txt", "text of b/z.txt")]  # fmt: skip


def test_jsonl_and_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {i} é\nline" for i in range(600)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": t}) for t in texts) + "\n\n")
    parquet.write_table(pyarrow.table({"n": range(600), "text": texts}), tmp_path / "a.parquet", row_group_size=100)
    for name in ("a.jsonl", "a.parquet"):
        documents = list(read_documents([tmp_path / name]))
        assert documents == [(f"{name}:{i + 1}", t) for i, t in enumerate(texts)]
        train, val = (list(read_documents([tmp_path / name], split)) for split in ("train", "val"))
        assert sorted(train + val) == sorted(documents) and 30 < len(val) < 90


@pytest.mark.parametrize("n", [2, 3, 4, 30])
def test_both_sides_have_documents(n, tmp_path):
    for salt in range(12):  # among them sets that fall on one side whole
        file = tmp_path / f"{salt}.jsonl"
        file.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(n)))
        train, val = (list(read_documents([file], split)) for split in ("train", "val"))
        assert train and val and sorted(train + val) == sorted(read_documents([file]))


def test_documents_that_all_fall_on_the_validation_side(tmp_path):
    names = [n for n in (f"{i}.txt" for i in range(200)) if data_hash(n) % 10 == 0][:3]
    for name in names:
        (tmp_path / name).write_text(name)
    assert [n for n, _ in read_documents([tmp_path], "train")] == sorted(names)[:1]
    assert [n for n, _ in read_documents([tmp_path], "val")] == sorted(names)[1:]


def test_one_document_is_cut(tmp_path):
    text = english(1000)
    (tmp_path / "a.txt").write_text(text)
    (_, train), (_, val), (_, whole) = (next(read_documents([tmp_path], split)) for split in ("train", "val", "all"))
    assert train + val == whole == text
    assert len(train) == len(text) * 9 // 10


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8 text \(byte 0\): convert"),
    ("a.txt", b" \n ", "no text found"),
    ("a.doc", b"text", r"a\.doc is none of \.txt"),
    ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a\.jsonl, row 2: its field `text` is not text"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, row 1: its field `text` is not text"),
    ("a.jsonl", b'{"txt": "x"}\n', r'a\.jsonl, line 1: expected a JSON object with a field "text"'),
    ("a.jsonl", b'{"text": "x"}\n{"text": "y\n', r"a\.jsonl, line 2: expected"),
    ("a.jsonl", b"\xff\n", r"a\.jsonl, line 1: expected"),
    ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: expected"),
    ("a.jsonl", b"\n", "no text found"),
    ("a.parquet", b"PAR1 not really", r"a\.parquet can't be read: "),
    ("a.parquet", b"", r"a\.parquet can't be read: "),
])  # fmt: skip
def test_bad_documents_are_one_line(name, content, message, tmp_path, tok):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus([tmp_path / name], tok, "all", tmp_path / "cache")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_missing_and_empty_places(tmp_path, tok):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(read_documents([tmp_path / "nowhere"]))
    with pytest.raises(FileNotFoundError, match="nowhere.parquet"):
        list(read_documents([tmp_path / "nowhere.parquet"]))
    with pytest.raises(ValueError, match="no text found"):
        list(read_documents([tmp_path]))
    with pytest.raises(ValueError, match="split must be"):
        list(read_documents([tmp_path], "test"))


def test_parquet_without_a_text_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet can't be read: it has no column `text`, but content"):
        list(read_documents([tmp_path]))
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: its field `text` is not text"):
        list(read_documents([tmp_path]))


# ---------------------------------------------------------------- the corpus on disk


@pytest.fixture
def novels(tmp_path):
    folder = tmp_path / "novels"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(english(200 + 40 * i, seed=i))
    return folder


@pytest.mark.parametrize("form", ["bpe", "sentencepiece", "tiktoken"])
def test_documents_are_joined_with_bos_and_eos(form, tokenizers_by_form, novels, tmp_path):
    tokenizer = tokenizers_by_form[form]
    texts = [text for _, text in read_documents([novels])]
    corpus = load_corpus([novels], tokenizer, "all", tmp_path / "cache")
    want = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert corpus.tokens.tolist() == sum(want, [])
    assert corpus.tokens.dtype == np.uint16 and corpus.starts.dtype == np.int64
    assert corpus.starts.tolist() == [0, *np.cumsum([len(ids) for ids in want])]
    assert [ids.tolist() for ids in corpus.documents()] == [ids[1:-1] for ids in want]
    assert len(corpus) == len(corpus.tokens) and str(novels) in corpus.name


def test_a_tokenizer_without_bos_and_a_large_vocabulary(tok, novels, tmp_path):
    plain = replace(tok, bos_id=None, eos_id=None, vocab_size=65536)
    corpus = load_corpus([novels], plain, "val", tmp_path / "cache")
    texts = [text for _, text in read_documents([novels], "val")]
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens.tolist() == sum((plain.encode(text) for text in texts), [])
    assert [ids.tolist() for ids in corpus.documents()] == [plain.encode(text) for text in texts]
    prompt = passkey_prompt(plain, 300, 150, "00417")
    assert prompt.ids == plain.encode(plain.decode(prompt.ids)) and plain.decode(prompt.ids).startswith(data.TASK)


def test_the_cache_is_reused_and_never_stale(tok, bpe, novels, tmp_path, monkeypatch, capsys):
    cache, calls = tmp_path / "cache", []
    count = data._tokenize
    monkeypatch.setattr(data, "_tokenize", lambda *args: (calls.append(args[0]), count(*args)))

    def load(tokenizer=tok, split="train"):
        return load_corpus([novels], tokenizer, split, cache)

    first = load()
    assert "tokenizing" in capsys.readouterr().err
    assert load().tokens.tolist() == first.tokens.tolist() and len(calls) == 1
    load(split="val")
    assert len(calls) == 2
    load(load_tokenizer(bpe, bos_id=5))  # another tokenizer
    load(train_tokenizer([english()], 300))
    assert len(calls) == 4

    name = next(name for name, _ in read_documents([novels], "train"))
    text = (novels / name).read_text()
    (novels / name).write_text(text.replace("the", "teh", 1))  # as long as before
    changed = load()
    assert len(calls) == 5 and changed.tokens.tolist() != first.tokens.tolist()
    (novels / name).write_text(text)
    assert load().tokens.tolist() == first.tokens.tolist() and len(calls) == 5
    assert len(set(calls)) == 5 == len(list(cache.iterdir()))


@pytest.mark.parametrize("keep", [0, 10, 24, 1001, -1])
def test_a_truncated_cache_is_rebuilt(keep, tok, novels, tmp_path):
    whole = load_corpus([novels], tok, "all", tmp_path / "cache").tokens.tolist()
    file = next((tmp_path / "cache").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    assert load_corpus([novels], tok, "all", tmp_path / "cache").tokens.tolist() == whole
    assert file.read_bytes() == content
    file.write_bytes(b"\0" * len(content))  # as long, but not ours
    assert load_corpus([novels], tok, "all", tmp_path / "cache").tokens.tolist() == whole


def test_no_space_and_no_place_to_write(tok, novels, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        load_corpus([novels], tok, "all", tmp_path / "file" / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"\.tokens") as error:
            load_corpus([novels], tok, "all", tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert not list((tmp_path / "cache").iterdir())


# ---------------------------------------------------------------- the passkey text

PAPER = """There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. \
I will quiz you about the important information there.
The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass is green.
The pass key is 00417. Remember it. 00417 is the pass key.
The grass is green. The sky is blue.
What is the pass key? The pass key is"""


def test_the_prompt_is_the_papers_word_for_word():
    assert data.passkey_text("00417", 6, 2) == PAPER
    assert data.passkey_text("00417", 0, 0).count("\n") == 2  # no empty lines
    keys = [data.random_key(np.random.default_rng(seed)) for seed in range(300)]
    assert all(re.fullmatch("[0-9]{5}", key) for key in keys) and any(key[0] == "0" for key in keys)
    assert len(set(keys)) > 290


def count_from(tokenizer, ids: list[int], line: str) -> int:
    """Tokens from the line's first to the end: the fewest whose text holds the line."""
    return next(n for n in range(len(line) // 4, len(ids) + 1) if line in tokenizer.decode(ids[-n:]))


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_the_nearest_that_whole_sentences_allow(form, tokenizers_by_form):
    tokenizer, key = tokenizers_by_form[form], "00417"
    line = data.KEY.format(key=key)

    @functools.cache
    def measure(before: int, after: int) -> tuple[int, int]:  # length and k, by brute force
        ids = tokenizer.encode(data.passkey_text(key, before, after))
        return 1 + len(ids), count_from(tokenizer, ids, line)

    shortest, least = measure(0, 0)
    for length in (shortest - 1, shortest, shortest + 9, 256, 400):
        fitting, n = [], 0
        while measure(0, n)[0] <= length:
            fitting.append(measure(0, n)[1])
            n += 1
        for k in [*range(32, length + 1, 64), least - 1, least, length]:
            prompt = passkey_prompt(tokenizer, length, k, key)
            if length < shortest or k < least:
                assert prompt is None
                continue
            text = tokenizer.decode(prompt.ids[1:])
            filler = text.removeprefix(data.TASK).removesuffix(data.QUESTION)
            before, after = (part.count(".") for part in filler.split(line))
            assert text == data.passkey_text(key, before, after)  # word for word, in whole sentences
            assert prompt.ids == [tokenizer.bos_id, *tokenizer.encode(text)]
            assert (prompt.length, prompt.k) == measure(before, after) and prompt.length <= length
            assert abs(prompt.k - k) == min(abs(possible - k) for possible in fitting)
            assert measure(before + 1, after)[0] > length


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [2048, 8000])
def test_long_prompts(form, length, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]
    sentence = max(len(tokenizer.encode(sentence)) for sentence in data.SENTENCES)
    for i in (1, 2, 7, 16, 31):
        prompt = passkey_prompt(tokenizer, length, length * i // 32, "00417")
        assert length - sentence <= prompt.length <= length
        text = tokenizer.decode(prompt.ids)
        n = [part.count(".") - extra for part, extra in zip(text.split(data.KEY.format(key="00417")), (3, 0))]
        assert text.endswith(data.passkey_text("00417", *n)) and prompt.ids[1:] == tokenizer.encode(text)
        assert abs(prompt.k - length * i // 32) <= sentence / 2 + 1
        tail = tokenizer.decode(prompt.ids[-prompt.k :])
        assert tail.startswith("The pass key is 00417. Remember it.") or tail.startswith(" The pass")
        assert not tokenizer.decode(prompt.ids[-prompt.k + 1 :]).startswith("The")


def test_prompts_that_do_not_fit_and_bad_keys(tok):
    assert passkey_prompt(tok, 40, 40, "00417") is None
    assert passkey_prompt(tok, 512, 10, "00417") is None
    early = passkey_prompt(tok, 512, 512, "00417")
    assert tok.decode(early.ids[1:]).split("\n")[1].startswith(("The pass key", "The grass is green.\n"))
    for key in ("417", "004170", "abcde", "٠٠٤١٧"):
        with pytest.raises(ValueError, match="key must be five digits"):
            passkey_prompt(tok, 512, 256, key)


# ---------------------------------------------------------------- training sequences


@pytest.fixture(scope="session")
def corpus(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(english(8000, seed=3))
    return load_corpus([folder], tok, "all", folder / "cache")


ALL = Mix(passkey=0.4, repeat=0.3)


def test_batches_are_a_pure_function_of_seed_step_and_index(corpus, tok):
    def draw(step, indices, seed=1):
        return sample_batch(corpus, tok, 160, step, indices, seed=seed, mix=ALL)

    ids, targets = draw(5, range(16))
    assert ids.shape == targets.shape == (16, 160) and ids.dtype == targets.dtype == torch.int64
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    for ranks in (2, 4):  # each rank's slice
        parts = [draw(5, range(r * 16 // ranks, (r + 1) * 16 // ranks)) for r in range(ranks)]
        assert torch.equal(torch.cat([part[0] for part in parts]), ids)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)
    draw(9, range(7))
    order = [11, 3, 0, 15]
    assert torch.equal(draw(5, order)[0], ids[order])
    for other in (draw(6, range(16))[0], draw(5, range(16), seed=2)[0], draw(5, range(16, 32))[0]):
        assert not (other == ids).all(1).any()
    assert int(ids.max()) < tok.vocab_size and int(ids.min()) >= 0


def kind_of(tok, row) -> str:
    """What a row of corpus, keys or repeats is, from its tokens."""
    text = tok.decode(row.tolist())
    if "The pass key is " in text and "\nThe pass" in text or text.startswith("The pass key is"):
        return "prompt" if data.TASK in text else "dense"
    grams = [tuple(row[i : i + 4].tolist()) for i in range(len(row) - 3)]
    return "repeat" if len(set(grams)) < 0.75 * len(grams) else "text"


def test_shares_of_the_mix(corpus, tok, tmp_path):
    (tmp_path / "b.txt").write_text("".join(map(chr, np.random.default_rng(0).integers(97, 123, 40000))))
    letters = load_corpus([tmp_path / "b.txt"], tok, "all", tmp_path)  # a text without repeats
    ids, _ = sample_batch(letters, tok, 200, 0, range(600), seed=0, mix=Mix(0.4, 0.3, dense=0.25))
    kinds = [kind_of(tok, row) for row in ids]
    share = {kind: kinds.count(kind) / 600 for kind in ("dense", "prompt", "repeat", "text")}
    # half of the prompts fill a row alone, 70% of those without the header that tells a prompt from dense keys here
    for kind, want in {"dense": 0.1 + 0.105, "prompt": 0.3 - 0.105, "repeat": 0.3, "text": 0.3}.items():
        assert abs(share[kind] - want) < 0.06, share
    ids, _ = sample_batch(letters, tok, 200, 0, range(50), seed=0)  # the default: text, as in the paper
    stream = letters.tokens.tobytes()
    assert all(row.numpy().astype(letters.tokens.dtype).tobytes() in stream for row in ids)


@pytest.mark.parametrize("form", FORMS)
def test_training_prompts_have_the_tokens_of_real_prompts(form, tokenizers_by_form):
    """A model trained on another tokenization of the same words would fail the evaluation."""
    tokenizer = tokenizers_by_form[form]
    for i, (before, after) in enumerate([(0, 0), (1, 0), (0, 1), (5, 5), (7, 13), (40, 3)]):
        key = f"{i * 9973:05d}"
        want = tokenizer.encode(data.passkey_text(key, before, after) + f" {key}")
        filler = data._filler_line(tokenizer, before), data._filler_line(tokenizer, after)
        got = data._answered_prompt(tokenizer, key, *filler).tolist()
        assert got == [tokenizer.bos_id, *want, tokenizer.eos_id]
        prompt = tokenizer.encode(data.passkey_text(key, before, after))
        assert want[: len(prompt)] == prompt  # the answer's tokens are its own


def test_whole_prompts_end_with_the_right_answer_and_stay_within_the_window(corpus, tok):
    ids, targets = sample_batch(corpus, tok, 256, 0, range(100), seed=0, mix=Mix(passkey=1, dense=0))
    lengths = []
    for row in torch.cat([ids, targets[:, -1:]], 1).tolist():
        starts = [i for i in range(len(row)) if row[i] == tok.bos_id]
        for start in starts:
            text = tok.decode(row[start : row.index(tok.eos_id, start) + 1]) if tok.eos_id in row[start:] else ""
            if not text.startswith(data.TASK):
                continue  # the text after the prompts may hold the BOS of a document
            lengths.append(row.index(tok.eos_id, start) + 1 - start)
            key = re.search(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.\n", text)[1]
            assert text.endswith(f"\nWhat is the pass key? The pass key is {key}")
    assert len(lengths) >= 80 and max(lengths) <= 257 and max(lengths) > 230 and min(lengths) < 160


def test_keys_lie_anywhere_in_the_window(corpus, tok):
    ids, targets = sample_batch(corpus, tok, 256, 0, range(400), seed=0, mix=Mix(passkey=1, dense=0))
    back = []
    for row in torch.cat([ids, targets[:, -1:]], 1).tolist():
        text = tok.decode(row)
        if not text.startswith(data.TASK) and (found := re.search(r"\nWhat is the pass key\? The pass key is (\d{5})$", text)):
            key_line = text.index(f"The pass key is {found[1]}. Remember it. {found[1]} is the pass key.\n")
            back.append(len(tok.encode(text[key_line:])))
    assert len(back) > 50 and max(back) > 240 and min(back) < 60  # the header would leave room for far less
    quarters = np.histogram(back, bins=4, range=(40, 257))[0] / len(back)
    assert quarters.min() > 0.1


@pytest.mark.parametrize("length", [64, 128, 256])
def test_a_prompt_alone_has_one_key_and_its_answer(corpus, tok, length):
    ids, targets = sample_batch(corpus, tok, length, 0, range(50), seed=0, mix=Mix(passkey=1, dense=0, alone=1))
    for row in torch.cat([ids, targets[:, -1:]], 1).tolist():
        text = tok.decode(row)
        assert text.count("Remember it.") == 1
        key = re.search(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.\n", text)[1]
        assert f"What is the pass key? The pass key is {key}" in text


def test_dense_keys_are_asked_for(corpus, tok):
    ids, _ = sample_batch(corpus, tok, 400, 0, range(20), seed=0, mix=Mix(passkey=1, dense=1))
    asked = 0
    for row in ids:
        text = tok.decode(row.tolist())
        found = re.findall(
            r"The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\.\n(?:(?!\. Remember).)*?"
            r"(?:What is the pass key\? The pass key is (\d{5})\n|(?=The pass key is \d{5}\. R))", text, re.S,
        )  # fmt: skip
        assert all(a == b and c in ("", a) for a, b, c in found)
        asked += sum(bool(c) for *_, c in found)
    assert asked > 60


def test_impossible_mixes():
    for shares in ({"passkey": 0.8, "repeat": 0.3}, {"repeat": -0.1}, {"dense": 1.5}):
        with pytest.raises(ValueError, match="shares of the mix must be 0 to 1"):
            Mix(**shares)


def test_a_window_too_short_for_a_prompt_gets_dense_keys(corpus, tok):
    ids, _ = sample_batch(corpus, tok, 40, 0, range(20), seed=0, mix=Mix(passkey=1, dense=0))
    assert all("The pass key is" in tok.decode(row.tolist()) for row in ids)


def test_a_corpus_shorter_than_one_window(corpus, tok):
    n = len(corpus)
    with pytest.raises(ValueError, match=rf"corpus.*: its {n} tokens don't fill one window of {n} \+ 1: give more"):
        sample_batch(corpus, tok, len(corpus), 0, [0], seed=0)
    ids, targets = sample_batch(corpus, tok, len(corpus) - 1, 0, [0], seed=0)
    assert ids[0].tolist() == corpus.tokens[:-1].tolist() and targets[0].tolist() == corpus.tokens[1:].tolist()
