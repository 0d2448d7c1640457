"""data.py against the libraries that own the tokenizer formats, and against what its docstrings promise."""

import errno
import hashlib
import json
import re
import resource
import sys
from dataclasses import replace
from pathlib import Path

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


# ---------------------------------------------------------------- reports


def test_reports_from_jsonl_and_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    reports = [(f"document {i} é\nline", f" summary {i}") for i in range(300)]
    lines = [json.dumps({"summary": s, "id": 1, "document": d}) for d, s in reports]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    documents, summaries = zip(*reports)
    parquet.write_table(pyarrow.table({"abstract": summaries, "n": range(300), "article": documents}),
                        tmp_path / "b.parquet", row_group_size=100)  # fmt: skip
    assert data.read_reports([tmp_path / "a.jsonl"]) == reports
    assert data.read_reports([tmp_path / "b.parquet"], "article", "abstract") == reports
    (tmp_path / "b.parquet").rename(tmp_path / "b.txt")  # a folder is searched for tables alone
    assert data.read_reports([tmp_path, str(tmp_path / "a.jsonl")]) == reports * 2


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "x", r"a\.txt is none of \.jsonl, \.parquet"),
    ("a.jsonl", '{"document": "x"}', r'line 1: expected a JSON object with a field "document" and a field "summary"'),
    ("a.jsonl", '{"document": "x", "summary": null}', r"a\.jsonl, row 1: its field `summary` is not text"),
    ("a.jsonl", '{"document": "x", "summary": " "}', r"a\.jsonl, row 1: its field `summary` is empty"),
    ("a.jsonl", "\n", r"a\.jsonl: no reports found"),
])  # fmt: skip
def test_bad_reports_are_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        data.read_reports([tmp_path / name])
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_parquet_without_the_library_and_without_a_field(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"document": ["a"], "text": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet can't be read: it has no column `summary`, but document, text"):
        data.read_reports([tmp_path / "a.parquet"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r'a\.parquet needs the library pyarrow: pip install -e "\.\[parquet\]"'):
        list(read_documents([tmp_path / "a.parquet"]))


# ---------------------------------------------------------------- the hub


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A folder as a clone of a hub data set, which the library opens in the same way; the cache is in tmp_path."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "books").mkdir(parents=True)
    for split, n in (("train", 40), ("test", 7)):
        rows = [{"text": f"{split} {i} é", "title": f"title {i}", "year": i} for i in range(n)]
        (tmp_path / "owner" / "books" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return "hf:owner/books"


def test_a_split_of_a_hub_data_set(dataset, tok):
    assert list(read_documents([dataset])) == [(f"owner/books:{i + 1}", f"train {i} é") for i in range(40)]
    assert [text for _, text in read_documents([f"{dataset},split=test"])] == [f"test {i} é" for i in range(7)]
    assert [text for _, text in read_documents([f"{dataset},take=3,split=test,field=title"])] == [
        "title 0", "title 1", "title 2"]  # fmt: skip
    assert data.read_reports([f"{dataset},take=2"], "text", "title") == [("train 0 é", "title 0"),
                                                                        ("train 1 é", "title 1")]  # fmt: skip
    # with other paths, split as they are, tokenized as they are
    train, val = (list(read_documents([dataset, "owner/books/test.jsonl"], split)) for split in ("train", "val"))
    assert len(train) + len(val) == 47 and len(train) > len(val) > 0
    corpus = load_corpus([f"{dataset},split=test"], tok)
    assert [tok.decode(ids) for ids in corpus.documents()] == [f"test {i} é" for i in range(7)]


def test_the_hub_is_read_once_and_no_further_than_asked(dataset, monkeypatch):
    import datasets

    read, load = [], datasets.load_dataset

    def counted(*args, **options):
        assert options["streaming"]
        rows = load(*args, **options)
        return rows.map(lambda row: read.append(row["text"]) or row)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    first = list(read_documents([f"{dataset},take=5"], "train"))
    assert first and len(read) == 5
    assert list(read_documents([f"{dataset},take=5"], "train")) == first and len(read) == 5
    list(read_documents([f"{dataset},take=6"]))
    assert len(read) == 11

    def breaks(*args, **options):
        yield {"text": "one row"}
        raise ConnectionError("gone\naway")

    monkeypatch.setattr(datasets, "load_dataset", breaks)
    cached = set(Path("out/cache").iterdir())
    with pytest.raises(ValueError, match="hf:owner/books,split=test can't be read: gone$"):
        list(read_documents([f"{dataset},split=test"]))
    assert set(Path("out/cache").iterdir()) == cached  # no half of a data set
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(list(read_documents([f"{dataset},split=test"]))) == 7


@pytest.mark.parametrize("more, message", [
    (",split=dev", "can't be read: .*dev"),
    (",config=x", "can't be read: .*x"),
    (",field=body", "can't be read: row 1 has no field `body`, but text, title, year"),
    (",field=year", "row 1: its field `text` is not text"),
    (",take=0", "N at least 1"),
    (",take=many", "N at least 1"),
    (",split", r"a hub data set is hf:owner/name\[,config=...\]"),
    (",limit=3", "`limit` is unknown, a hub data set is"),
    ("@main", "can't be read: "),
])  # fmt: skip
def test_bad_hub_data_sets_are_one_line(more, message, dataset, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message) as error:
        list(read_documents([dataset + more]))
    assert "\n" not in str(error.value) and str(error.value).startswith(dataset + more)


def test_hub_fields_of_reports_and_scripts(dataset, monkeypatch):
    import datasets

    with pytest.raises(ValueError, match="field= is for text alone"):
        data.read_reports([f"{dataset},field=title"], "text", "title")
    with pytest.raises(ValueError, match="row 1 has no field `document`"):
        data.read_reports([dataset])

    def script(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found books.py")

    monkeypatch.setattr(datasets, "load_dataset", script)
    with pytest.raises(ValueError, match="books.py: try revision=refs/convert/parquet"):
        list(read_documents([dataset]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'hf:owner/books needs the library datasets: pip install -e "\.\[hub\]"'):
        list(read_documents([dataset]))


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
