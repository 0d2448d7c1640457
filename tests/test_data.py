"""documents.py: documents and their split, reports, the hub; data.py: the corpus on disk."""

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

import checkpoint
import data
import train
from conftest import english
from data import load_corpus, read_documents, read_reports
from model import LLaMA, LLaMAConfig
from tokenizer import Tokenizer, train_tokenizer

# ---- documents -----------------------------------------------------------------------------------


def is_hashed_to_validation(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 10 == 0


def train_and_val(paths) -> tuple[list, list]:
    return list(read_documents(paths, "train")), list(read_documents(paths, "val"))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))


def test_default_corpus_is_the_standard_library_with_a_fixed_split():
    train = dict(read_documents(None, "train"))
    val = dict(read_documents(None, "val"))
    whole = dict(read_documents(None, "all"))
    assert train | val == whole
    assert not train.keys() & val.keys()
    assert 0.05 < len(val) / len(whole) < 0.2
    assert {"argparse.py", "json/decoder.py", "random.py"} <= whole.keys()
    left_out = r"(^|/)(tests?|site-packages|idlelib|encodings)/"
    assert not [name for name in whole if re.search(left_out, name)]
    assert all(len(text) > 1000 for text in whole.values())

    # The name alone decides, so these hold on every machine and for every version of Python
    assert "argparse.py" in train
    assert "enum.py" in val
    assert {name for name in whole if is_hashed_to_validation(name)} == val.keys()


def test_files_folders_and_their_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/z.txt", "b/a.md", "c.py", "a.txt", "ignored.bin", ".git/x.py"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "b" / "__init__.py").write_text("\n")  # blank, so it is no document
    assert list(read_documents([tmp_path])) == [
        ("a.txt", "text of a.txt"),
        ("c.py", "text of c.py"),
        ("b/a.md", "text of b/a.md"),
        ("b/z.txt", "text of b/z.txt"),
    ]
    assert list(read_documents([tmp_path / "c.py", tmp_path / "b"])) == [
        ("c.py", "text of c.py"),
        ("a.md", "text of b/a.md"),
        ("z.txt", "text of b/z.txt"),
    ]


def test_jsonl_and_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {i} é\nline" for i in range(600)]
    lines = [json.dumps({"id": 1, "text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    table = pyarrow.table({"n": range(600), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    for name in ("a.jsonl", "a.parquet"):
        documents = list(read_documents([tmp_path / name]))
        assert documents == [(f"{name}:{i}", text) for i, text in enumerate(texts, 1)]
        train, val = train_and_val([tmp_path / name])
        assert sorted(train + val) == sorted(documents)
        assert [name for name, _ in val] == [
            name for name, _ in documents if is_hashed_to_validation(name)
        ]
        assert 30 < len(val) < 90


@pytest.mark.parametrize("n", [2, 3, 4, 30])
def test_both_sides_have_documents(n, tmp_path):
    for attempt in range(12):  # some of the twelve fall on one side whole
        file = tmp_path / f"{attempt}.jsonl"
        write_jsonl(file, [{"text": f"document {i}"} for i in range(n)])
        train, val = train_and_val([file])
        assert train and val
        assert sorted(train + val) == sorted(read_documents([file]))


def write_documents_on_one_side(folder: Path, validation: bool) -> list[str]:
    """Write three documents which the hash puts on the same side; return their sorted names."""
    names = [f"{i}.txt" for i in range(200)]
    names = [name for name in names if is_hashed_to_validation(name) == validation][:3]
    for name in names:
        (folder / name).write_text(name)
    return sorted(names)


def test_documents_that_all_fall_on_the_validation_side(tmp_path):
    names = write_documents_on_one_side(tmp_path, validation=True)
    train, val = train_and_val([tmp_path])
    assert [name for name, _ in train] == names[:1]
    assert [name for name, _ in val] == names[1:]


def test_documents_that_all_fall_on_the_training_side(tmp_path):
    names = write_documents_on_one_side(tmp_path, validation=False)
    train, val = train_and_val([tmp_path])
    assert [name for name, _ in train] == names[:-1]
    assert [name for name, _ in val] == names[-1:]


def test_a_single_document_is_cut(tmp_path):
    text = english(1000)
    (tmp_path / "a.txt").write_text(text)
    train, val = train_and_val([tmp_path])
    cut = len(text) * 9 // 10
    assert train == [("a.txt", text[:cut])]
    assert val == [("a.txt", text[cut:])]
    assert list(read_documents([tmp_path])) == [("a.txt", text)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8 text \(byte 0\): convert"),
        ("a.txt", b" \n ", "no text found"),
        ("a.doc", b"text", r"a\.doc is none of \.txt"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a\.jsonl, row 2: its field `text` is not"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, row 1: its field `text` is not text"),
        ("a.jsonl", b'\n{"txt": ""}\n', r"a\.jsonl, row 2 has no field `text` \(its fields: txt\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y\n', r"a\.jsonl, line 2: expected a JSON object"),
        ("a.jsonl", b"\xff\n", r"a\.jsonl, line 1: expected a JSON object"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: expected a JSON object"),
        ("a.jsonl", b"\n", "no text found"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet can't be read: "),
        ("a.parquet", b"", r"a\.parquet can't be read: "),
    ],
)
def test_bad_documents_are_one_line(name, content, message, tmp_path, tok):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus([tmp_path / name], tok, "all", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_missing_and_empty_places(tmp_path):
    for name in ("nowhere", "nowhere.jsonl", "nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match=name):
            list(read_documents([tmp_path / name]))
    for split in ("train", "val", "all"):
        with pytest.raises(ValueError, match="no text found"):
            list(read_documents([tmp_path], split))
    with pytest.raises(ValueError, match="split must be"):
        list(read_documents([tmp_path], "test"))


def test_parquet_without_a_text_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"content": ["a"]}), file)
    message = r"a\.parquet can't be read: it has no field `text` \(its fields: content\)"
    with pytest.raises(ValueError, match=message):
        list(read_documents([tmp_path]))
    parquet.write_table(pyarrow.table({"text": ["a", None]}), file)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: its field `text` is not text"):
        list(read_documents([tmp_path]))


# ---- reports -------------------------------------------------------------------------------------


def test_reports_from_jsonl_and_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    documents = [f"document {i} é\nline" for i in range(300)]
    summaries = [f" summary {i}" for i in range(300)]
    reports = list(zip(documents, summaries))
    rows = [{"summary": summary, "id": 1, "document": document} for document, summary in reports]
    write_jsonl(tmp_path / "a.jsonl", rows)
    table = pyarrow.table({"abstract": summaries, "n": range(300), "article": documents})
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=100)

    assert read_reports([tmp_path / "b.parquet"], "article", "abstract") == reports
    (tmp_path / "b.parquet").rename(tmp_path / "b.txt")  # in a folder, text files are passed over
    assert read_reports([tmp_path, str(tmp_path / "a.jsonl")]) == reports * 2


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "x", r"a\.txt is none of \.jsonl, \.parquet"),
        ("a.jsonl", '{"document": "x"}', r"a\.jsonl, row 1 has no field `summary`"),
        ("a.jsonl", '{"document": "x", "summary": null}', "row 1: its field `summary` is not text"),
        ("a.jsonl", '{"document": "x", "summary": " "}', "row 1: its field `summary` is empty"),
        ("a.jsonl", "\n", r"a\.jsonl: no reports found"),
    ],
)
def test_bad_reports_are_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_reports([tmp_path / name])
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_parquet_without_the_library_and_without_a_field(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"document": ["a"], "text": ["b"]}), file)
    message = r"a\.parquet can't be read: it has no field `summary` \(its fields: document, text\)"
    with pytest.raises(ValueError, match=message):
        read_reports([file])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = r'a\.parquet needs the library pyarrow: pip install -e "\.\[parquet\]"'
    with pytest.raises(ValueError, match=message):
        list(read_documents([file]))


# ---- data sets of the hub ------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A local folder like a clone of a data set, which `datasets` opens as it opens the hub's."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "books"
    folder.mkdir(parents=True)
    for split, n in (("train", 40), ("test", 7)):
        rows = [{"text": f"{split} {i} é", "title": f"title {i}", "year": i} for i in range(n)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return "hf:owner/books"


def texts_of(path: str) -> list[str]:
    return [text for _, text in read_documents([path])]


def test_a_split_of_a_hub_data_set(dataset, tok):
    names = [f"owner/books:{i}" for i in range(1, 41)]
    train_texts = [f"train {i} é" for i in range(40)]
    test_texts = [f"test {i} é" for i in range(7)]
    assert list(read_documents([dataset])) == list(zip(names, train_texts))
    assert texts_of(f"{dataset},split=test") == test_texts
    titles = texts_of(f"{dataset},take=3,split=test,field=title")
    assert titles == ["title 0", "title 1", "title 2"]
    reports = read_reports([f"{dataset},take=2"], "text", "title")
    assert reports == [("train 0 é", "title 0"), ("train 1 é", "title 1")]

    # Beside other paths, a data set is split and tokenized as they are
    train, val = train_and_val([dataset, "owner/books/test.jsonl"])
    assert len(train) + len(val) == 47
    assert len(train) > len(val) > 0
    corpus = load_corpus([f"{dataset},split=test"], tok)
    assert [tok.decode(ids) for ids in corpus.documents()] == test_texts


def test_the_hub_is_read_once_and_no_further_than_asked(dataset, monkeypatch):
    import datasets

    load = datasets.load_dataset
    read = []  # the texts of all rows that were read from the hub

    def note(row):
        read.append(row["text"])
        return row

    def load_and_note(*args, **options):
        assert options["streaming"]
        return load(*args, **options).map(note)

    monkeypatch.setattr(datasets, "load_dataset", load_and_note)
    first = list(read_documents([f"{dataset},take=5"], "train"))
    assert first
    assert len(read) == 5
    assert list(read_documents([f"{dataset},take=5"], "train")) == first
    assert len(read) == 5
    list(read_documents([f"{dataset},take=6"]))
    assert len(read) == 11


def test_a_broken_connection_leaves_no_half_of_a_data_set(dataset, monkeypatch):
    import datasets

    def break_after_one_row(*args, **options):
        yield {"text": "one row"}
        raise ConnectionError("gone\naway")

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", break_after_one_row)
        with pytest.raises(ValueError, match="hf:owner/books,split=test can't be read: gone$"):
            texts_of(f"{dataset},split=test")
    assert not list(Path("out/cache").iterdir())
    assert len(texts_of(f"{dataset},split=test")) == 7


@pytest.mark.parametrize(
    "options, message",
    [
        (",split=dev", "can't be read: .*dev"),
        (",config=x", "can't be read: .*x"),
        (
            ",field=body",
            r"can't be read: row 1 has no field `body` \(its fields: text, title, year\)",
        ),
        (",field=year", "can't be read: row 1: its field `year` is not text"),
        (",take=0", "N at least 1"),
        (",take=many", "N at least 1"),
        (",split", r"a hub data set is hf:owner/name\[,config=...\]"),
        (",limit=3", "`limit` is unknown, a hub data set is"),
        ("@main", "can't be read: "),
    ],
)
def test_bad_hub_data_sets_are_one_line(options, message, dataset, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message) as error:
        texts_of(dataset + options)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(dataset + options)


def test_fields_of_reports_on_the_hub(dataset):
    with pytest.raises(ValueError, match="field= is for text alone"):
        read_reports([f"{dataset},field=title"], "text", "title")
    with pytest.raises(ValueError, match="row 1 has no field `document`"):
        read_reports([dataset])


def test_data_sets_that_are_scripts_and_a_missing_library(dataset, monkeypatch):
    import datasets

    def refuse(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found books.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="books.py: try revision=refs/convert/parquet"):
        texts_of(dataset)
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r'hf:owner/books needs the library datasets: pip install -e "\.\[hub\]"'
    with pytest.raises(ValueError, match=message):
        texts_of(dataset)


# ---- the corpus on disk --------------------------------------------------------------------------


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
    corpus = load_corpus([novels], tokenizer, "all", tmp_path / "cache")
    documents = [tokenizer.encode(text) for _, text in read_documents([novels])]
    tokens = []
    starts = [0]
    for ids in documents:
        tokens += [tokenizer.bos_id, *ids, tokenizer.eos_id]
        starts.append(len(tokens))
    assert corpus.tokens.tolist() == tokens
    assert corpus.starts.tolist() == starts
    assert corpus.tokens.dtype == np.uint16
    assert corpus.starts.dtype == np.int64
    assert [ids.tolist() for ids in corpus.documents()] == documents
    assert len(corpus) == len(tokens)
    assert str(novels) in corpus.name


def test_a_tokenizer_without_bos_and_a_large_vocabulary(tok, novels, tmp_path):
    plain = replace(tok, bos_id=None, eos_id=None, vocab_size=65536)
    assert plain.bos_ids == plain.eos_ids == []
    corpus = load_corpus([novels], plain, "val", tmp_path / "cache")
    documents = [plain.encode(text) for _, text in read_documents([novels], "val")]
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens.tolist() == sum(documents, [])
    assert [ids.tolist() for ids in corpus.documents()] == documents


def test_the_cache_is_reused_and_never_stale(tok, bpe, novels, tmp_path, capsys):
    cache = tmp_path / "cache"
    tokenized = []  # the texts of each call, in turn

    def load(tokenizer, split="train"):
        """The tokens of the corpus, and whether the texts were tokenized for it."""

        def encode_batch(texts):
            tokenized.extend(texts)
            return tokenizer.encode_batch(texts)

        tokenized.clear()
        watched = replace(tokenizer, encode_batch=encode_batch)
        corpus = load_corpus([novels], watched, split, cache)
        return corpus.tokens.tolist(), len(tokenized) > 0

    first, was_tokenized = load(tok)
    assert was_tokenized
    assert "tokenizing" in capsys.readouterr().err
    assert load(tok) == (first, False)

    # Another split and other tokenizers
    assert load(tok, split="val")[1]
    assert load(replace(tok, bos_id=5))[1]
    assert load(train_tokenizer([english()], 300))[1]

    # A changed text, as long as before
    name = next(name for name, _ in read_documents([novels], "train"))
    text = (novels / name).read_text()
    (novels / name).write_text(text.replace("the", "teh", 1))
    changed, was_tokenized = load(tok)
    assert was_tokenized
    assert changed != first
    (novels / name).write_text(text)
    assert load(tok) == (first, False)
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("size", [0, 10, 24, 1001, -1])
def test_a_truncated_cache_is_rebuilt(size, tok, novels, tmp_path):
    whole = load_corpus([novels], tok, "all", tmp_path / "cache").tokens.tolist()
    file = next((tmp_path / "cache").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:size])
    assert load_corpus([novels], tok, "all", tmp_path / "cache").tokens.tolist() == whole
    assert file.read_bytes() == content
    file.write_bytes(b"\0" * len(content))  # as long, but not a cache file
    assert load_corpus([novels], tok, "all", tmp_path / "cache").tokens.tolist() == whole


def stop_at_shard(tokenizer: Tokenizer, number: int) -> Tokenizer:
    """A tokenizer with which the shard of this number, counted from 0, is interrupted."""
    calls = []

    def encode_batch(texts):
        if len(calls) == number:
            raise KeyboardInterrupt
        calls.append(texts)
        return tokenizer.encode_batch(texts)

    return replace(tokenizer, encode_batch=encode_batch)


def test_an_interrupted_run_keeps_its_shards(tok, novels, tmp_path, monkeypatch):
    """The next one tokenizes the rest alone, and the file is that of a single shard."""
    cache = tmp_path / "cache"
    load_corpus([novels], tok, "all", tmp_path / "whole")
    monkeypatch.setattr(data, "SHARD_CHARACTERS", 3000)
    with pytest.raises(KeyboardInterrupt):
        load_corpus([novels], stop_at_shard(tok, 4), "all", cache)
    shards = sorted(cache.iterdir())
    assert len(shards) == 4

    # One of the four is damaged, and is made again
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1])
    with pytest.raises(KeyboardInterrupt):
        load_corpus([novels], stop_at_shard(tok, 1), "all", cache)
    assert len(list(cache.iterdir())) == 4
    texts = []
    seen = replace(tok, encode_batch=lambda batch: texts.extend(batch) or tok.encode_batch(batch))
    corpus = load_corpus([novels], seen, "all", cache)
    assert 0 < len(texts) < len(corpus.documents()) - 4

    file = next((tmp_path / "whole").iterdir())
    assert [path.name for path in cache.iterdir()] == [file.name]
    assert (cache / file.name).read_bytes() == file.read_bytes()


def test_two_processes_may_prepare_the_same_corpus(tok, novels, tmp_path, monkeypatch):
    """One of them finishes, and removes the shards, while the other one is at its third."""
    cache = tmp_path / "cache"
    whole = load_corpus([novels], tok, "all", tmp_path / "whole").tokens.tolist()
    monkeypatch.setattr(data, "SHARD_CHARACTERS", 3000)
    left = []  # the number of files, once the fast process is done

    def encode_batch(texts):
        if len(list(cache.glob("*"))) == 2 and not left:
            load_corpus([novels], tok, "all", cache)
            left.append(len(list(cache.iterdir())))
        return tok.encode_batch(texts)

    slow = replace(tok, encode_batch=encode_batch)
    assert load_corpus([novels], slow, "all", cache).tokens.tolist() == whole
    assert left == [1]
    assert len(list(cache.iterdir())) == 1


def test_prepare_leaves_nothing_to_tokenize(tok, novels, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = LLaMAConfig.preset("tiny", vocab_size=tok.vocab_size)
    checkpoint.save(LLaMA(config), "model", tok)
    flags = ["--init", "model", "--data", str(novels), "--device", "cpu", "--max_iters", "1"]
    train.main([*flags, "--prepare"])
    assert "without --prepare" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["cache"]
    monkeypatch.setattr(data, "_tokenize", None)
    train.main([*flags, "--out", "run"])
    assert Path("run/model.safetensors").is_file()


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
