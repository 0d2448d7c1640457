"""The corpus of a model's training and measuring: the tokens of documents, kept on disk.

    corpus = load_corpus(["novels/"], tokenizer, "train")   # tokenized once, then kept in a file

Tokenizing runs on all cores. What is done is kept in shards, so that an interrupted run goes on
where it stopped. To have the tokens ready before the GPUs are: `python train.py --prepare ...`.
documents.py reads the documents.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import replacing
from documents import CACHE, corpus_name, read_documents
from documents import read_reports as read_reports  # callers find all that is read in this module
from tokenizer import Tokenizer

# A cache file holds a header, the tokens of all documents, and the start of each document. The
# header is three int64: this number of the format, the number of documents, the number of tokens.
FORMAT = 1
HEADER_BYTES = 3 * 8

# Characters of a shard: what is tokenized at once, and what an interrupted run loses at most. The
# tokenizers give each core whole documents, so a shard should hold many, books as well.
SHARD_CHARACTERS = 2**24


@dataclass(eq=False)
class Corpus:
    """The tokens of all documents in one sequence: BOS document EOS, BOS document EOS, ...

    Where the tokenizer has no BOS or no EOS, the documents are joined without it.
    """

    tokens: np.ndarray  # (n_tokens,), memory-mapped: uint16, or uint32 for a large vocabulary
    starts: np.ndarray  # (n_documents + 1,) int64: document i is tokens[starts[i] : starts[i + 1]]
    name: str
    has_bos: bool
    has_eos: bool

    def documents(self) -> list[np.ndarray]:
        """The tokens of each document, without BOS and EOS."""
        # Slicing a plain array is faster than slicing a memory map. Nothing is copied here.
        tokens = np.asarray(self.tokens)
        documents = []
        for start, end in pairwise(self.starts.tolist()):
            if self.has_bos:
                start += 1
            if self.has_eos:
                end -= 1
            documents.append(tokens[start:end])
        return documents

    def __len__(self) -> int:
        return len(self.tokens)


def load_corpus(
    paths: Sequence[str | Path] | None, tokenizer: Tokenizer, split: str = "all",
    cache: str | Path = CACHE
) -> Corpus:
    """The tokens of the documents of a split, for which see `read_documents`.

    They are kept in a file in the folder `cache`. The file is named after a hash of the texts and
    the tokenizer, so it is used again only for the same texts and the same tokenizer.
    """
    # Hash the texts one by one
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint}".encode())
    characters = 0
    documents = read_documents(paths, split)
    for _, text in tqdm(documents, "reading", unit=" documents", delay=5, leave=False):
        content = text.encode("utf-8")
        # The length is hashed too, because the texts "ab", "c" are not the texts "a", "bc"
        digest.update(f"{len(content)} ".encode())
        digest.update(content)
        characters += len(text)
    path = Path(cache) / f"{digest.hexdigest()[:32]}.tokens"

    # Tokenize them, unless an earlier run did
    corpus = _open_corpus(path, corpus_name(paths), tokenizer)
    if corpus is None:
        texts = (text for _, text in read_documents(paths, split))
        _tokenize(path, texts, tokenizer, characters)
        corpus = _open_corpus(path, corpus_name(paths), tokenizer)
    return corpus


def _token_type(tokenizer: Tokenizer) -> np.dtype:
    """The type that tokens are stored with."""
    if tokenizer.vocab_size < 65536:
        return np.dtype(np.uint16)
    return np.dtype(np.uint32)


def _open_corpus(path: Path, name: str, tokenizer: Tokenizer) -> Corpus | None:
    """The corpus in a cache file, or None if the file is missing or damaged."""
    if not path.is_file() or path.stat().st_size < HEADER_BYTES:
        return None

    # The header tells how long the file must be
    file_format, n_documents, n_tokens = np.fromfile(path, np.int64, 3).tolist()
    dtype = _token_type(tokenizer)
    end_of_tokens = HEADER_BYTES + n_tokens * dtype.itemsize
    end_of_file = end_of_tokens + (n_documents + 1) * 8
    if file_format != FORMAT or path.stat().st_size != end_of_file:
        return None
    return Corpus(
        tokens=np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,)),
        starts=np.fromfile(path, np.int64, n_documents + 1, offset=end_of_tokens), name=name,
        has_bos=tokenizer.bos_id is not None, has_eos=tokenizer.eos_id is not None
    )


# ---- making it -----------------------------------------------------------------------------------


def _tokenize(path: Path, texts: Iterator[str], tokenizer: Tokenizer, characters: int) -> None:
    """Tokenize texts into a cache file, by way of shards, which are cache files of some texts.

    An interrupted run leaves its shards to the next one: their names begin with the hash of all
    texts. Several processes may do this at the same time, because all of them write the same.
    characters: the length of all texts, for the progress bar.
    """
    shards = []
    lengths = []  # of the documents in each shard, in tokens
    n_documents = 0
    with tqdm(total=characters, desc="tokenizing", unit="char", unit_scale=True) as bar:
        while True:
            # A shard is named after the number of documents before it
            shard = path.with_suffix(f".{n_documents}.tokens")
            found = _open_corpus(shard, "", tokenizer)
            if found is not None:
                # It is there already: pass over its texts
                starts = found.starts
                taken = list(islice(texts, len(starts) - 1))
            else:
                taken = _texts_of_a_shard(texts)
                if not taken:
                    break
                documents = _encode(taken, tokenizer)
                starts = _starts([len(document) for document in documents])
                _write(shard, documents, starts)
            shards.append(shard)
            lengths.append(np.diff(starts))
            n_documents += len(taken)
            bar.update(sum(len(text) for text in taken))

    # Join the shards. Each is closed before the next one is opened, because a process may not have
    # thousands of files open.
    pieces = (_read_tokens(shard, tokenizer) for shard in shards)
    try:
        _write(path, pieces, _starts(np.concatenate(lengths)))
    except FileNotFoundError:
        # Another process has joined the same shards and removed them
        if not path.is_file():
            raise
    for shard in shards:
        shard.unlink(missing_ok=True)


def _texts_of_a_shard(texts: Iterator[str]) -> list[str]:
    """The next texts, as many as make a shard; none if there are no more."""
    taken = []
    characters = 0
    for text in texts:
        taken.append(text)
        characters += len(text)
        if characters >= SHARD_CHARACTERS:
            break
    return taken


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The tokens of each text, with BOS and EOS around them."""
    dtype = _token_type(tokenizer)
    bos, eos = tokenizer.around
    return [np.array(bos + ids + eos, dtype) for ids in tokenizer.encode_batch(texts)]


def _starts(lengths: Sequence[int]) -> np.ndarray:
    """Where each document begins, and where the last one ends: (n_documents + 1,) int64."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _read_tokens(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a cache file, in memory."""
    n_tokens = np.fromfile(path, np.int64, 3)[2]
    return np.fromfile(path, _token_type(tokenizer), n_tokens, offset=HEADER_BYTES)


def _write(path: Path, pieces: Iterable[np.ndarray], starts: np.ndarray) -> None:
    """Write a cache file. pieces: its tokens, one piece after another."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(np.array([FORMAT, len(starts) - 1, starts[-1]], np.int64))
        for piece in pieces:
            file.write(piece)
        file.write(starts)
