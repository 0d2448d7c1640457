"""Text becomes tokens: documents from files, and the corpus on disk. sequences.py makes batches of it.

This file knows nothing of the model. Read it from top to bottom:

    tokenizer = load_tokenizer("out/base")                  # tokenizer.py's
    corpus = load_corpus(["novels/"], tokenizer, "train")   # tokenized once, then a memory-mapped file
    reports = read_reports(["reports.jsonl"])               # documents with their summaries

Wherever --data takes files and folders it takes data sets of the Hugging Face hub too, through the `datasets`
library: `hf:owner/name`, and after it, with commas, what isn't the default:

    hf:emozilla/pg19,split=test                             # config=, split= (train), revision=, field= (text)
    hf:monology/pile-uncopyrighted,take=100000              # the first N rows: some data sets have no end

What is asked for is read from the hub once, row by row, into a .jsonl file in out/cache; delete it to read anew.
"""

import hashlib
import importlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from checkpoint import replacing
from tokenizer import Tokenizer, load_tokenizer, train_tokenizer  # noqa: F401 (who imports data has them too)

# ---------------------------------------------------------------- documents

_TABLES = (".jsonl", ".parquet")  # a document a row
_SUFFIXES = (".txt", ".md", ".py", *_TABLES)
_CACHE = "out/cache"
_NOT_STDLIB = {"test", "tests", "idle_test", "idlelib", "encodings", "site-packages", "dist-packages"}


def read_documents(paths: Sequence[str | Path] | None, split: str = "all") -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document of a split: "train", "val" (about 10%) or "all".

    paths: files (.txt, .md, .py: one document each; .jsonl, .parquet: one a row, its field `text`), folders of
    them, or hub data sets (hf:...); None: the sources of Python's standard library, which everybody has. The split
    depends on the documents' names alone, relative to the paths. Where that leaves one side empty, the last document
    is validation, or the first is training; where there is one document only, its last 10% is validation.
    Raises ValueError for what is not text, and where there is no text at all.
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f"split must be train, val or all, got {split!r}")

    def is_val(name: str) -> bool:
        return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:4], "big") % 10 == 0

    names: list[str] = []  # of the first documents, until both sides have one
    for name, _ in _documents(paths):
        names.append(name)
        if is_val(name) != is_val(names[0]):
            break
    if not names:
        raise ValueError(f"{corpus_name(paths)}: no text found, give {', '.join(_SUFFIXES)} files that are not empty")
    moved = None  # the document that changes sides, if one is empty
    if is_val(names[-1]) == is_val(names[0]):
        moved = 0 if is_val(names[0]) else len(names) - 1
    for i, (name, text) in enumerate(_documents(paths)):
        if split == "all":
            yield name, text
        elif len(names) == 1:
            cut = len(text) * 9 // 10
            yield name, text[:cut] if split == "train" else text[cut:]
        elif (is_val(name) != (i == moved)) == (split == "val"):
            yield name, text


def corpus_name(paths: Sequence[str | Path] | None) -> str:
    """What messages call the corpus of these paths."""
    return "the standard library's sources" if paths is None else ", ".join(map(str, paths))


def _documents(paths: Sequence[str | Path] | None) -> Iterator[tuple[str, str]]:
    """(name, text) of every document that isn't empty, in a fixed order."""
    if paths is None:
        root = Path(sysconfig.get_path("stdlib"))
        for path in _files(root, (".py",), _NOT_STDLIB):
            if path.stat().st_size > 2000:
                yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")
        return
    for name, _, (text,) in _records(paths, ("text",), _SUFFIXES):
        if text.strip():
            yield name, text


def read_reports(
    paths: Sequence[str | Path], document_field: str = "document", summary_field: str = "summary"
) -> list[tuple[str, str]]:
    """(document, summary) of every row of .jsonl or .parquet files, folders of them, or hub data sets (hf:...).

    Raises ValueError, naming file and row, for a field that is missing, empty or not text, and where there are no rows.
    """
    fields, reports = (document_field, summary_field), []
    for _, place, texts in _records(paths, fields, _TABLES):
        for field, text in zip(fields, texts):
            if not text.strip():
                raise ValueError(f"{place}: its field `{field}` is empty")
        reports.append(texts)
    if not reports:
        raise ValueError(f"{corpus_name(paths)}: no reports found, give {', '.join(_TABLES)} files that are not empty")
    return reports


def _records(
    paths: Sequence[str | Path], fields: tuple[str, ...], suffixes: tuple[str, ...]
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name, place, texts) of every record, in a fixed order: what it is called, where it is, and its fields."""
    for given in map(str, paths):
        root = Path(given)
        if given.startswith("hf:"):
            files = [(given.split(",")[0].removeprefix("hf:"), given, _fetched(given, fields))]
        elif root.is_dir():
            files = ((path.relative_to(root).as_posix(), path, path) for path in _files(root, suffixes, set()))
        else:
            files = [(root.name, root, root)]
        for name, source, path in files:
            for row, texts in _rows(path, fields, suffixes):
                place = f"{source}, row {row}"
                for field, text in zip(fields, texts):
                    try:
                        text.encode("utf-8")
                    except (AttributeError, UnicodeEncodeError):  # not a string, or half of a surrogate pair in it
                        raise ValueError(f"{place}: its field `{field}` is not text") from None
                yield name if row is None else f"{name}:{row}", place, texts


def _files(root: Path, suffixes: tuple[str, ...], left_out: set[str]) -> Iterator[Path]:
    """The files below a folder, sorted; hidden folders (.git, .venv) and those in left_out are passed over."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in left_out and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(suffixes))


def _rows(
    path: Path, fields: tuple[str, ...], suffixes: tuple[str, ...]
) -> Iterator[tuple[int | None, tuple[str, ...]]]:
    """(row, texts) of every document in a file, its fields in order; row is None where the file is the document."""
    if path.suffix == ".parquet":
        parquet = optional("pyarrow.parquet", "parquet", path)
        try:
            file = parquet.ParquetFile(path)
            columns = file.schema_arrow.names
            if missing := [field for field in fields if field not in columns]:
                raise ValueError(f"it has no column `{missing[0]}`, but {', '.join(columns)}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=list(fields)):
                for texts in zip(*(batch.column(field).to_pylist() for field in fields)):
                    yield (row := row + 1), texts
        except FileNotFoundError:
            raise
        except (ValueError, OSError) as error:  # pyarrow's have many lines, and no file name
            raise ValueError(f"{path} can't be read: {_first_line(error)}") from None
    elif path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for row, line in enumerate(file, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                        yield row, tuple(record[field] for field in fields)
                    except (ValueError, TypeError, KeyError):  # not JSON or not UTF-8; no object; no such field
                        wanted = " and ".join(f'a field "{field}"' for field in fields)
                        raise ValueError(f"{path}, line {row}: expected a JSON object with {wanted}") from None
    elif path.suffix in suffixes or not path.exists():
        try:
            yield None, (path.read_text(encoding="utf-8"),)  # a missing file raises here, with its name
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out") from None
    else:
        raise ValueError(f"{path} is none of {', '.join(suffixes)}: rename or convert it")


def optional(module: str, extra: str, what: object) -> ModuleType:
    """A module that comes with one of the extras of pyproject.toml. ValueError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.split(".")[0]
        raise ValueError(f'{what} needs the library {library}: pip install -e ".[{extra}]"') from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------- the hub

_HUB_FORM = "hf:owner/name[,config=...][,split=train][,take=N][,field=text][,revision=...]"


def _fetched(spec: str, fields: tuple[str, ...]) -> Path:
    """The .jsonl file that holds these fields of a hub data set: in the cache already, or read from the hub now.

    Being a file, it is hashed, split and tokenized as every other, any number of times, and a training run goes on
    where there is no hub. `field=` says what plays the part of the one field `text`.
    """
    name, *parts = spec.removeprefix("hf:").split(",")
    options = dict(part.split("=", 1) if "=" in part else (part, "") for part in parts)
    if unknown := sorted(options.keys() - {"config", "split", "take", "field", "revision"}):
        raise ValueError(f"{spec}: `{unknown[0]}` is unknown, a hub data set is {_HUB_FORM}")
    if not name or "" in options.values() or not re.fullmatch(r"0*[1-9][0-9]*", options.get("take", "1")):
        raise ValueError(f"{spec}: a hub data set is {_HUB_FORM}, N at least 1")
    if "field" in options and len(fields) > 1:
        raise ValueError(f"{spec}: field= is for text alone, the fields of reports have flags of their own")
    key = json.dumps([name, sorted(options.items()), fields])
    path = Path(_CACHE) / f"hub-{hashlib.sha256(key.encode()).hexdigest()[:32]}.jsonl"
    if not path.is_file():
        rows = _hub_rows(spec, name, options, [options.get("field", field) for field in fields])
        with (
            tqdm(desc=f"reading {spec}", unit="row") as bar,
            replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file,
        ):  # fmt: skip
            for texts in rows:
                file.write(json.dumps(dict(zip(fields, texts))) + "\n")
                bar.update()
    return path


def _hub_rows(spec: str, name: str, options: dict[str, str], fields: list[str]) -> Iterator[list]:
    """The fields of each row of a hub data set, or of a folder with the files of one, as they come."""
    datasets = optional("datasets", "hub", spec)
    take = int(options["take"]) if "take" in options else None
    try:
        rows = datasets.load_dataset(
            name, options.get("config"), split=options.get("split", "train"), revision=options.get("revision"),
            streaming=True,
        )  # fmt: skip
        for n, row in enumerate(islice(rows, take), 1):
            if missing := [field for field in fields if field not in row]:
                raise ValueError(f"row {n} has no field `{missing[0]}`, but {', '.join(row)}")
            yield [row[field] for field in fields]
    except Exception as error:  # the library has its own, and so have those beneath it, for a hub out of reach
        line = _first_line(error)
        way = ": try revision=refs/convert/parquet, the hub's own copy without one" if "scripts are no" in line else ""
        raise ValueError(f"{spec} can't be read: {line}{way}") from None


# ---------------------------------------------------------------- the corpus on disk

_FORMAT = 1  # of the cache file: header (3 int64: format, documents, tokens), tokens, starts (int64)


@dataclass(eq=False)
class Corpus:
    """Documents joined as BOS document EOS (what the tokenizer has of them), in one memory-mapped stream."""

    tokens: np.ndarray  # (n_tokens,) uint16, or uint32 for a vocabulary beyond 65,535
    starts: np.ndarray  # (n_documents + 1,) int64: document i is tokens[starts[i] : starts[i + 1]]
    name: str
    has_bos: bool
    has_eos: bool

    def documents(self) -> list[np.ndarray]:
        """The tokens of each document, without the BOS and EOS around them."""
        tokens, starts = np.asarray(self.tokens), self.starts.tolist()
        return [tokens[a + self.has_bos : b - self.has_eos] for a, b in zip(starts, starts[1:])]

    def __len__(self) -> int:
        return len(self.tokens)


def load_corpus(
    paths: Sequence[str | Path] | None, tokenizer: Tokenizer, split: str = "all", cache: str | Path = _CACHE
) -> Corpus:
    """The tokens of a split (see `read_documents`), from the cache if these very texts met this tokenizer before.

    The texts are read twice, once for the name of the cache file, which is a hash of them, and once to be
    tokenized; only a batch of them is in memory at a time.
    """
    digest, characters = hashlib.sha256(f"{_FORMAT} {tokenizer.fingerprint}".encode()), 0
    for _, text in read_documents(paths, split):
        content = text.encode("utf-8")
        digest.update(b"%d " % len(content) + content)  # the length: "ab", "c" is not "a", "bc"
        characters += len(text)
    path = Path(cache) / f"{digest.hexdigest()[:32]}.tokens"
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < 65536 else np.uint32)
    if not _complete(path, dtype):
        _tokenize(path, read_documents(paths, split), tokenizer, dtype, characters)
    _, n_documents, n_tokens = np.fromfile(path, np.int64, 3).tolist()
    return Corpus(
        tokens=np.memmap(path, dtype, mode="r", offset=24, shape=(n_tokens,)),
        starts=np.fromfile(path, np.int64, n_documents + 1, offset=24 + n_tokens * dtype.itemsize),
        name=corpus_name(paths), has_bos=tokenizer.bos_id is not None, has_eos=tokenizer.eos_id is not None,
    )  # fmt: skip


def _complete(path: Path, dtype: np.dtype) -> bool:
    """Whether a cache file is there and whole."""
    if not path.is_file() or path.stat().st_size < 24:
        return False
    version, n_documents, n_tokens = np.fromfile(path, np.int64, 3).tolist()
    return version == _FORMAT and path.stat().st_size == 24 + n_tokens * dtype.itemsize + (n_documents + 1) * 8


def _tokenize(
    path: Path, documents: Iterator[tuple[str, str]], tokenizer: Tokenizer, dtype: np.dtype, characters: int
) -> None:
    """Write the cache file; several processes may do so at once, each under its own temporary name."""
    bos, eos = tokenizer.around
    starts, batch = [0], []
    with (
        tqdm(total=characters, desc="tokenizing", unit="char", unit_scale=True) as bar,
        replacing(path) as temporary, open(temporary, "wb") as file,
    ):  # fmt: skip
        file.write(bytes(24))

        def flush() -> None:
            for ids in tokenizer.encode_batch(batch):
                file.write(np.array(bos + ids + eos, dtype).tobytes())
                starts.append(starts[-1] + len(bos + ids + eos))
            bar.update(sum(map(len, batch)))
            batch.clear()

        for _, text in documents:
            batch.append(text)
            if sum(map(len, batch)) >= 2**18 or len(batch) == 256:
                flush()
        flush()
        file.write(np.array(starts, np.int64).tobytes())
        file.seek(0)
        file.write(np.array([_FORMAT, len(starts) - 1, starts[-1]], np.int64).tobytes())
