"""Text becomes tokens: documents from files, and the corpus on disk. sequences.py makes batches of it.

This file knows nothing of the model. Read it from top to bottom:

    tokenizer = load_tokenizer("out/base")                  # tokenizer.py's
    corpus = load_corpus(["novels/"], tokenizer, "train")   # tokenized once, then a memory-mapped file
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoint import replacing
from tokenizer import Tokenizer, load_tokenizer, train_tokenizer  # noqa: F401 (who imports data has them too)

# ---------------------------------------------------------------- documents

_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
_NOT_STDLIB = {"test", "tests", "idle_test", "idlelib", "encodings", "site-packages", "dist-packages"}


def read_documents(paths: Sequence[str | Path] | None, split: str = "all") -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document of a split: "train", "val" (about 10%) or "all".

    paths: files (.txt, .md, .py: one document each; .jsonl, .parquet: one a row, its field `text`) or folders of
    them; None: the sources of Python's standard library, which everybody has. The split depends on the documents'
    names alone, relative to the paths. Where that leaves one side empty, the last document is validation, or the
    first is training; where there is one document only, its last 10% is validation.
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
    for given in map(Path, paths):
        for path in _files(given, _SUFFIXES, set()) if given.is_dir() else [given]:
            name = path.relative_to(given if given.is_dir() else given.parent).as_posix()
            for row, text in _rows(path):
                try:
                    text.encode("utf-8")
                except (AttributeError, UnicodeEncodeError):  # not a string, or half of a surrogate pair in it
                    raise ValueError(f"{path}, row {row}: its field `text` is not text") from None
                if text.strip():
                    yield name if row is None else f"{name}:{row}", text


def _files(root: Path, suffixes: tuple[str, ...], left_out: set[str]) -> Iterator[Path]:
    """The files below a folder, sorted; hidden folders (.git, .venv) and those in left_out are passed over."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in left_out and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(suffixes))


def _rows(path: Path) -> Iterator[tuple[int | None, str]]:
    """(row, text) of every document in a file; row is None where the file is the document."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
            if "text" not in file.schema_arrow.names:
                raise ValueError(f"it has no column `text`, but {', '.join(file.schema_arrow.names)}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield (row := row + 1), text
        except FileNotFoundError:
            raise
        except (ValueError, OSError) as error:  # pyarrow's have many lines, and no file name
            raise ValueError(f"{path} can't be read: {str(error).splitlines()[0]}") from None
    elif path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for row, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield row, json.loads(line)["text"]
                    except (ValueError, TypeError, KeyError):  # not JSON or not UTF-8; no object; no such field
                        raise ValueError(f'{path}, line {row}: expected a JSON object with a field "text"') from None
    elif path.suffix in _SUFFIXES or not path.exists():
        try:
            yield None, path.read_text(encoding="utf-8")  # a missing file raises here, with its name
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out") from None
    else:
        raise ValueError(f"{path} is none of {', '.join(_SUFFIXES)}: rename or convert it")


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
    paths: Sequence[str | Path] | None, tokenizer: Tokenizer, split: str = "all", cache: str | Path = "out/cache"
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
