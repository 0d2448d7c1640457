"""Tokenizers behind one interface, whichever library reads the file.

    tokenizer = load_tokenizer("out/base")
    ids = tokenizer.encode("The pass key is")
    tokenizer.save("out/linear-8")

Three file formats are read: tokenizer.json, tokenizer.model of LLaMA 1 and 2 (sentencepiece), and
tokenizer.model of Llama 3 (the ranks of tiktoken). What is saved holds a tokenizer.json with the
same ids, because few other programs read Meta's files rightly. `train_tokenizer` makes a small
tokenizer from texts.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cli import first_line, replacing

if TYPE_CHECKING:  # the libraries are imported where they are used, because that takes time
    import sentencepiece
    import tokenizers

# The files that define a tokenizer. If a folder holds both, tokenizer.json is read.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

# Files beside them, which other programs read. `save` copies them too.
COMPANION_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja"
)

# ---- the interface -------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Tokenizer:
    """A tokenizer: what the rest of the repo uses of it.

    `encode` adds neither BOS nor EOS, and it reads "<s>" within a text as three characters, not as
    the special token. `decode` leaves out special tokens. bos_id and eos_id are None if the
    tokenizer has no such token.
    """

    encode: Callable[[str], list[int]]
    encode_batch: Callable[[list[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    text_vocab_size: int  # `encode` gives only ids below this; special tokens may be beyond it
    bos_id: int | None
    eos_id: int | None
    files: dict[str, bytes]  # the files that `save` writes; the first one defines the tokenizer
    stop_ids: tuple[int, ...] = ()  # tokens that end a generated text, beside EOS

    @property
    def bos_ids(self) -> list[int]:
        """The tokens to put before a document: [BOS], or [] without a BOS."""
        if self.bos_id is None:
            return []
        return [self.bos_id]

    @property
    def eos_ids(self) -> list[int]:
        """The tokens to put after a document: [EOS], or [] without an EOS."""
        if self.eos_id is None:
            return []
        return [self.eos_id]

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """What stands before and after a document in a corpus: bos_ids and eos_ids."""
        return self.bos_ids, self.eos_ids

    @property
    def fingerprint(self) -> str:
        """A hash that differs between tokenizers that could give a text different tokens."""
        content = next(iter(self.files.values()))
        ids = f"{self.bos_id} {self.eos_id}"
        return hashlib.sha256(content + ids.encode()).hexdigest()[:16]

    def for_model(
        self, window: int, bos_id: int | None, eos_id: int | tuple[int, ...] | None
    ) -> "Tokenizer":
        """The same tokenizer, with companion files that agree with a model.

        window: the model's. A lower limit in the files would cut texts, so it is raised to this.
        bos_id, eos_id: the model's. They replace those in generation_config.json.
        """
        if isinstance(eos_id, tuple):
            eos_id = list(eos_id)
        values = {"bos_token_id": bos_id, "eos_token_id": eos_id}
        files = dict(self.files)
        for name in ("tokenizer_config.json", "generation_config.json"):
            old = json.loads(files.get(name, b"{}"))
            new = dict(old)
            for limit in ("model_max_length", "max_length"):
                if old.get(limit) is not None:
                    new[limit] = max(old[limit], window)
            for key, value in values.items():
                if old.get(key) is not None:
                    new[key] = value
            # A file that needs no change keeps its bytes
            if new != old:
                files[name] = json.dumps(new, indent=2).encode()
        return replace(self, files=files)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder, which this repo and transformers can open."""
        for name, content in self.files.items():
            with replacing(Path(folder) / name) as temporary:
                temporary.write_bytes(content)


# ---- a tokenizer from a folder -------------------------------------------------------------------


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file that defines a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(
    folder: str | Path, bos_id: int | None = None, eos_id: int | None = None
) -> Tokenizer:
    """The tokenizer in a checkpoint's folder.

    bos_id, eos_id: the ids in the checkpoint's config. They count only where the tokenizer's files
    don't say which tokens are BOS and EOS, because the tokenizer gives the tokens their ids.
    Raises ValueError if the folder holds no tokenizer, or one that can't be read.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no tokenizer: put its tokenizer.json or tokenizer.model there"
        )
    files = {}
    for name in TOKENIZER_FILES + COMPANION_FILES:
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()

    # The names are in the order of TOKENIZER_FILES, so the first one found defines the tokenizer
    main = next(iter(files))
    if main == "tokenizer.json":
        read = _read_json
    elif re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", files[main]):
        read = _read_ranks
    else:
        read = _read_sentencepiece

    path = folder / main
    if not files[main]:
        raise ValueError(f"{path} can't be read as a tokenizer: it is empty")
    try:
        tokenizer = read(files, bos_id, eos_id)
    except Exception as error:
        # Each library raises errors of its own, and tokenizers raises plain Exceptions
        reason = first_line(error)
        raise ValueError(f"{path} can't be read as a tokenizer: {reason}") from None
    _check_special_id(path, "BOS", tokenizer.bos_id, tokenizer.vocab_size)
    _check_special_id(path, "EOS", tokenizer.eos_id, tokenizer.vocab_size)
    return tokenizer


def _check_special_id(path: Path, name: str, token_id: int | None, vocab_size: int) -> None:
    """Raise ValueError if the id of BOS or EOS lies outside the vocabulary."""
    if token_id is not None and not 0 <= token_id < vocab_size:
        raise ValueError(
            f"{path} has {vocab_size} tokens, {name} is {token_id}: it is another model's"
        )


def _companion(files: dict[str, bytes], name: str) -> dict:
    """The JSON object in a companion file, or an empty one if there is no such file."""
    return json.loads(files.get(name, b"{}"))


def _special_id(
    files: dict[str, bytes], role: str, token_to_id: Callable[[str], int | None],
    builtin: int | None, in_config: int | None
) -> int | None:
    """The id of the "bos" or "eos" token.

    It is the token that the companion files name, else that of the format itself (builtin), else
    that of the checkpoint's config, else one by a usual name. None if there is none of these.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _companion(files, name).get(f"{role}_token")
        if isinstance(token, dict):
            token = token["content"]
        # LLaMA 1's first folders say "" for each of them
        if token and token_to_id(token) is not None:
            return token_to_id(token)
    if builtin is not None:
        return builtin
    if in_config is not None:
        return in_config
    for token in USUAL_NAMES[role]:
        if token_to_id(token) is not None:
            return token_to_id(token)
    return None


def _wants_bos(files: dict[str, bytes]) -> bool:
    """Whether BOS belongs before a text, if tokenizer.json itself puts none there.

    tokenizer_config.json says so: in add_bos_token, else by its class. The tokenizers of LLaMA put
    BOS and those of other models, such as SmolLM2's GPT2Tokenizer, don't. Where nothing is said, a
    LLaMA's tokenizer is assumed. (transformers 4 went by these too. transformers 5 puts no BOS
    where tokenizer.json puts none, though LLaMA was trained with it.)
    """
    config = _companion(files, "tokenizer_config.json")
    name = config.get("tokenizer_class") or "LlamaTokenizer"
    flag = config.get("add_bos_token")
    if flag is None:
        return "llama" in name.lower()
    return flag is not False


def _with_config(
    files: dict[str, bytes], tokenizer_class: str, bos: str | None, eos: str | None
) -> dict[str, bytes]:
    """The files and, if it is missing, a tokenizer_config.json, which transformers needs."""
    if "tokenizer_config.json" in files:
        return files
    config = {
        "tokenizer_class": tokenizer_class,
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": bos is not None,
        "clean_up_tokenization_spaces": False,
    }
    return files | {"tokenizer_config.json": json.dumps(config, indent=2).encode()}


# ---- tokenizer.json ------------------------------------------------------------------------------

# The names that BOS and EOS usually have, for folders whose files don't name them
USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
}


def _read_json(files: dict[str, bytes], bos_id: int | None, eos_id: int | None) -> Tokenizer:
    """The tokenizer of a tokenizer.json."""
    import tokenizers

    library = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))

    # The file may ask to truncate or to pad each text, but here and in what is saved a text is
    # always taken whole
    if library.truncation or library.padding:
        library.no_truncation()
        library.no_padding()
        files = files | {"tokenizer.json": library.to_str(pretty=True).encode()}
    return _from_library(library, files, bos_id, eos_id)


def _from_library(
    library: "tokenizers.Tokenizer", files: dict[str, bytes], bos_id: int | None, eos_id: int | None
) -> Tokenizer:
    """The tokenizer of an object of the tokenizers library; files: tokenizer.json and others."""
    # Without this, "<s>" within a text would become BOS
    library.encode_special_tokens = True

    def encode(text: str) -> list[int]:
        return library.encode(text, add_special_tokens=False).ids

    def encode_batch(texts: list[str]) -> list[list[int]]:
        encodings = library.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(ids: Sequence[int]) -> str:
        return library.decode([int(i) for i in ids])

    def token(token_id: int | None) -> str | None:
        if token_id is None:
            return None
        return library.id_to_token(token_id)

    added = library.get_added_tokens_decoder()
    special = {token_id for token_id, token in added.items() if token.special}
    # The ids may have gaps, so the number of tokens is not enough
    ids = set(library.get_vocab().values())
    bos_id = _special_id(files, "bos", library.token_to_id, None, bos_id)
    eos_id = _special_id(files, "eos", library.token_to_id, None, eos_id)
    # What tokenizer.json itself puts before a text counts before any flag, as in transformers 5.
    # Only the first token is BOS, because some files put the same token behind the text, as EOS.
    if not _wants_bos(files) and library.encode("a").ids[:1] != [bos_id]:
        bos_id = None
    files = _with_config(files, "PreTrainedTokenizerFast", token(bos_id), token(eos_id))
    return Tokenizer(
        encode=encode, encode_batch=encode_batch, decode=decode, vocab_size=max(ids) + 1,
        text_vocab_size=max(ids - special) + 1, bos_id=bos_id, eos_id=eos_id, files=files
    )


def _put_bos_first(library: "tokenizers.Tokenizer", bos: str) -> None:
    """Make programs that read tokenizer.json put BOS before each text. Our `encode` does not."""
    from tokenizers import processors

    library.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, library.token_to_id(bos))]
    )


def _merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The merges of a BPE tokenizer, the first one first.

    tokens: in the order in which BPE makes them. Meta's files hold only this order: any two
    neighbors that make up a token can be merged, and the earliest such token is made first.
    tokenizer.json lists the pairs themselves.
    """
    known = set(tokens)
    merges = []
    for token in tokens:
        for cut in range(1, len(token)):
            if token[:cut] in known and token[cut:] in known:
                merges.append((token[:cut], token[cut:]))
    return merges


# ---- tokenizer.model of LLaMA 1 and 2 ------------------------------------------------------------


def _read_sentencepiece(
    files: dict[str, bytes], bos_id: int | None, eos_id: int | None
) -> Tokenizer:
    """The tokenizer of a sentencepiece model."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    n_pieces = library.vocab_size()

    # Tokens that were added later are never made from a text, but a model may generate them
    added = dict(_companion(files, "added_tokens.json"))
    decoder = _companion(files, "tokenizer_config.json").get("added_tokens_decoder", {})
    for token_id, token in decoder.items():
        added[token["content"]] = int(token_id)

    def token_to_id(token: str) -> int | None:
        if token in added:
            return added[token]
        piece_id = library.piece_to_id(token)
        # sentencepiece takes what it doesn't know for <unk>
        return piece_id if library.id_to_piece(piece_id) == token else None

    def decode(ids: Sequence[int]) -> str:
        return library.decode([int(i) for i in ids if i < n_pieces])

    # sentencepiece gives -1 for a special token that the model doesn't have
    bos = None
    if library.bos_id() >= 0:
        bos = library.id_to_piece(library.bos_id())
        bos_id = _special_id(files, "bos", token_to_id, library.bos_id(), bos_id)
    if _companion(files, "tokenizer_config.json").get("add_bos_token") is False:
        bos = None
        bos_id = None
    eos = None
    if library.eos_id() >= 0:
        eos = library.id_to_piece(library.eos_id())
        eos_id = _special_id(files, "eos", token_to_id, library.eos_id(), eos_id)

    # Without a tokenizer.json, transformers 5 gives other ids for two spaces, and no BOS
    tokenizer_class = "LlamaTokenizer"
    if not added:
        converted = _convert_sentencepiece(library, bos)
        if converted is not None:
            files = {"tokenizer.json": converted} | files
            tokenizer_class = "PreTrainedTokenizerFast"
    return Tokenizer(
        encode=library.encode, encode_batch=library.encode, decode=decode,
        vocab_size=max([n_pieces - 1, *added.values()]) + 1, text_vocab_size=n_pieces,
        bos_id=bos_id, eos_id=eos_id, files=_with_config(files, tokenizer_class, bos, eos)
    )


def _convert_sentencepiece(
    model: "sentencepiece.SentencePieceProcessor", bos: str | None
) -> bytes | None:
    """A tokenizer.json with the ids of a sentencepiece model; None if it is not of LLaMA's kind."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    # BPE makes the pieces with the highest score first. Special pieces and bytes are never merged.
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    special = []
    mergeable = []
    for i, piece in enumerate(pieces):
        if model.is_control(i) or model.is_unknown(i):
            special.append(piece)
        elif not model.is_byte(i) and not model.is_unused(i):
            mergeable.append(i)
    mergeable.sort(key=model.get_score, reverse=True)
    library = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, _merges([pieces[i] for i in mergeable]),
            unk_token=pieces[model.unk_id()], fuse_unk=True, byte_fallback=True
        )
    )

    # As sentencepiece does for LLaMA: a space before the text, and each space is written "▁"
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0)
        ]
    )
    library.add_special_tokens(special)
    if bos is not None:
        _put_bos_first(library, bos)
    content = library.to_str(pretty=True).encode()

    # A model of another kind (unigram, or one that normalizes its texts) gives other ids here
    library.encode_special_tokens = True
    probe = "  ﬁ\u00a0\t" + "".join(pieces[i] for i in mergeable).replace("▁", " ") + " \n"
    if library.encode(probe, add_special_tokens=False).ids != model.encode(probe):
        return None
    return content


# ---- tokenizer.model of Llama 3 ------------------------------------------------------------------

# Splits a text into pieces. Bytes are merged within a piece, never across two of them.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The 256 special tokens are not in the file. Their ids follow the ranks: these come first, by their
# names in Llama 3.1 to 3.3, then reserved ones. In Llama 3 some of these are reserved ones too.
LLAMA3_SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"
]
LLAMA3_SPECIAL_TOKENS += [f"<|reserved_special_token_{i}|>" for i in range(3, 248)]
LLAMA3_BOS = LLAMA3_SPECIAL_TOKENS[0]
LLAMA3_EOS = LLAMA3_SPECIAL_TOKENS[1]
LLAMA3_STOPS = ("<|eom_id|>", "<|eot_id|>")  # Meta's own code stops at these too


def _read_ranks(files: dict[str, bytes], bos_id: int | None, eos_id: int | None) -> Tokenizer:
    """The tokenizer of a list of ranks: a line per token, with its bytes in base64 and its id.

    It is converted to a tokenizer.json. The file itself is not kept, because programs that find a
    tokenizer.model beside a tokenizer.json take it for one of sentencepiece.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    ranks = {}
    for line in files["tokenizer.model"].splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    n_ranks = len(ranks)  # 128,000 in Llama 3
    if sorted(ranks.values()) != list(range(n_ranks)):
        raise ValueError(f"its {n_ranks} ranks are not 0 to {n_ranks - 1}")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("not every byte has a rank")

    # tokenizer.json writes each byte as a character: itself if it is printable, else one from 256
    # on
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    characters = {}
    following = 256
    for byte in range(256):
        if chr(byte) in alphabet:
            characters[byte] = chr(byte)
        else:
            characters[byte] = chr(following)
            following += 1
    vocab = {}
    for token in sorted(ranks, key=ranks.get):
        vocab[token.decode("latin-1").translate(characters)] = ranks[token]

    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # With ignore_merges, a piece that is a token is not merged, as in tiktoken
    library = tokenizers.Tokenizer(models.BPE(vocab, _merges(list(vocab)), ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(LLAMA3_SPECIAL_TOKENS)
    _put_bos_first(library, LLAMA3_BOS)

    companions = {name: content for name, content in files.items() if name in COMPANION_FILES}
    files = {"tokenizer.json": library.to_str().encode()} | companions
    files = _with_config(files, "PreTrainedTokenizerFast", LLAMA3_BOS, LLAMA3_EOS)
    tokenizer = _from_library(library, files, bos_id, eos_id)
    return replace(tokenizer, stop_ids=tuple(map(library.token_to_id, LLAMA3_STOPS)))


# ---- a new tokenizer -----------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
    """A byte-level BPE tokenizer trained on texts. The same texts always give the same tokenizer.

    Token 0 is BOS, `<s>`, and token 1 is EOS, `</s>`; vocab_size counts them. As in LLaMA, each
    digit is a token of its own, so a passkey of five digits is always five tokens.
    Raises ValueError if vocab_size is too small for all bytes, BOS and EOS.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + 2
    if vocab_size < least:
        raise ValueError(
            f"vocab_size must be at least {least} (all bytes, BOS and EOS), got {vocab_size}"
        )

    # A text is split at every digit, then at words; merges stay within a word
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    split_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([split_digits, split_words])
    library.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"],
        show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    _put_bos_first(library, "<s>")
    files = {"tokenizer.json": library.to_str(pretty=True).encode()}
    return _read_json(files, bos_id=None, eos_id=None)
