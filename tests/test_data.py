"""data.py against the libraries that own the tokenizer formats, and against what its docstrings promise."""

import errno
import hashlib
import json
import re
import resource
from dataclasses import replace

import numpy as np
import pytest

import data
import sequences
from conftest import english
from data import load_corpus, load_tokenizer, read_documents, train_tokenizer
from sequences import passkey_prompt


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
    assert prompt.ids == plain.encode(plain.decode(prompt.ids)) and plain.decode(prompt.ids).startswith(sequences.TASK)


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
