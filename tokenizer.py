"""Tokenizers, behind one small interface: tokenizer.json, LLaMA's and Llama 3's tokenizer.model, or one trained here.

Each form is read by the library that owns it (tokenizers, sentencepiece, tiktoken). Skip this file on a first
reading: data.py, which comes next, needs of it no more than

    tokenizer = load_tokenizer("out/base")
    ids = tokenizer.encode("The pass key is")
    tokenizer.save("out/linear-8")
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint import replacing


@dataclass(eq=False, repr=False)
class Tokenizer:
    """What every tokenizer here can do, whichever library does it.

    encode gives no BOS and no EOS, and text that looks like a special token ("<s>") is text, since prompts and
    corpora are nothing else. decode leaves special tokens out. bos_id and eos_id are None where there is none.
    """

    encode: Callable[[str], list[int]]
    encode_batch: Callable[[list[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    files: dict[str, bytes]  # what `save` writes, by name; the first one defines the tokenizer

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """What stands before and after a document: [BOS] and [EOS], or [] where there is none."""
        return [] if self.bos_id is None else [self.bos_id], [] if self.eos_id is None else [self.eos_id]

    @property
    def fingerprint(self) -> str:
        """A hash that changes with the tokens that any text could get."""
        content = next(iter(self.files.values()))
        return hashlib.sha256(content + f"{self.bos_id} {self.eos_id}".encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into folder, which then opens here and in transformers."""
        for name, content in self.files.items():
            with replacing(Path(folder) / name) as temporary:
                temporary.write_bytes(content)


_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
               "tokenizer.model", "chat_template.jinja")  # fmt: skip


def load_tokenizer(folder: str | Path, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer:
    """The tokenizer in a checkpoint's folder: tokenizer.json, else tokenizer.model in either of Meta's formats.

    bos_id, eos_id: the checkpoint's own, which win; None asks the tokenizer's files.
    Raises ValueError where there is no tokenizer, or none that can be read.
    """
    folder = Path(folder)
    main = next((name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()), None)
    if main is None:
        raise ValueError(f"{folder} holds no tokenizer: put its tokenizer.json or tokenizer.model there")
    files = {name: (folder / name).read_bytes() for name in (main, *_COMPANIONS) if (folder / name).is_file()}
    read = _from_json if main == "tokenizer.json" else _from_sentencepiece
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", files[main]):
        read = _from_ranks
    try:
        if not files[main]:
            raise ValueError("it is empty")
        tokenizer = read(files, bos_id, eos_id)
    except Exception as error:  # each library has errors of its own, and one raises plain Exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder / main} can't be read as a tokenizer: {reason}") from None
    for name, i in (("BOS", tokenizer.bos_id), ("EOS", tokenizer.eos_id)):
        if i is not None and not 0 <= i < tokenizer.vocab_size:
            raise ValueError(f"{folder / main} has {tokenizer.vocab_size} tokens, {name} is {i}: it is another model's")
    return tokenizer


def _special(files: dict[str, bytes], kind: str, id_of: Callable[[str], int | None]) -> int | None:
    """The id of the "bos" or "eos" token that the files name; they may not, so the usual names follow."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = json.loads(files.get(name, b"{}")).get(f"{kind}_token")
        if token is not None:
            return id_of(token["content"] if isinstance(token, dict) else token)
    usual = {"bos": ("<s>", "<|begin_of_text|>"), "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>")}[kind]
    return next((i for i in map(id_of, usual) if i is not None), None)


def _with_config(files: dict[str, bytes], kind: str, bos: str | None, eos: str | None) -> dict[str, bytes]:
    """The files, with the tokenizer_config.json that transformers wants beside them."""
    config = {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos, "clean_up_tokenization_spaces": False}
    return files | {"tokenizer_config.json": files.get("tokenizer_config.json", json.dumps(config, indent=2).encode())}


def _from_json(files: dict[str, bytes], bos_id: int | None, eos_id: int | None) -> Tokenizer:
    """tokenizer.json, through the tokenizers library."""
    import tokenizers

    tok = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    tok.encode_special_tokens = True  # or "<s>" within a text would become BOS
    tok.no_truncation(), tok.no_padding()  # a file may ask for them; here a text is taken whole
    bos_id = _special(files, "bos", tok.token_to_id) if bos_id is None else bos_id
    eos_id = _special(files, "eos", tok.token_to_id) if eos_id is None else eos_id
    names = (None if i is None else tok.id_to_token(i) for i in (bos_id, eos_id))
    return Tokenizer(
        encode=lambda text: tok.encode(text, add_special_tokens=False).ids,
        encode_batch=lambda texts: [e.ids for e in tok.encode_batch_fast(texts, add_special_tokens=False)],
        decode=lambda ids: tok.decode(list(map(int, ids))),
        vocab_size=max(tok.get_vocab().values()) + 1,  # the ids may have holes
        bos_id=bos_id, eos_id=eos_id, files=_with_config(files, "PreTrainedTokenizerFast", *names),
    )  # fmt: skip


def _from_sentencepiece(files: dict[str, bytes], bos_id: int | None, eos_id: int | None) -> Tokenizer:
    """tokenizer.model of LLaMA 1 and 2, through the sentencepiece library."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    added = json.loads(files.get("added_tokens.json", b"{}")).values()  # never in a text, but a model may give them
    size, own = sp.vocab_size(), [i if i >= 0 else None for i in (sp.bos_id(), sp.eos_id())]
    names = (None if i is None else sp.id_to_piece(i) for i in own)
    return Tokenizer(
        encode=sp.encode,
        encode_batch=sp.encode,
        decode=lambda ids: sp.decode([int(i) for i in ids if i < size]),
        vocab_size=max(size, *(i + 1 for i in added), 0),
        bos_id=own[0] if bos_id is None else bos_id,
        eos_id=own[1] if eos_id is None else eos_id,
        files=_with_config(files, "LlamaTokenizer", *names),
    )


# Llama 3: how a text is split before its bytes are merged, and the special tokens, whose ids follow the ranks
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)),
                   "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
                   *(f"<|reserved_special_token_{i}|>" for i in range(5, 251))]  # fmt: skip


def _from_ranks(files: dict[str, bytes], bos_id: int | None, eos_id: int | None) -> Tokenizer:
    """tokenizer.model of Llama 3: a line for each token, its bytes in base64 and its rank; through tiktoken."""
    import tiktoken

    lines = (line.split() for line in files["tokenizer.model"].splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    base = len(ranks)  # 128,000
    if sorted(ranks.values()) != list(range(base)):
        raise ValueError(f"its {base} ranks are not 0 to {base - 1}")
    special = {token: base + i for i, token in enumerate(_LLAMA3_SPECIAL)}
    tok = tiktoken.Encoding("llama3", pat_str=_LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(
        encode=tok.encode_ordinary,
        encode_batch=tok.encode_ordinary_batch,
        decode=lambda ids: tok.decode([int(i) for i in ids if i < base]),
        vocab_size=base + len(special),
        bos_id=base if bos_id is None else bos_id,
        eos_id=base + 1 if eos_id is None else eos_id,
        files=_with_config(files, "PreTrainedTokenizerFast", *_LLAMA3_SPECIAL[:2]),
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
    """A byte-level BPE of vocab_size tokens, `<s>` (BOS) and `</s>` (EOS) among them; the same for the same texts.

    Every digit is a token of its own, as in LLaMA: a passkey is then five tokens, whatever its digits are.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"vocab_size must be at least {len(alphabet) + 2} (all bytes, BOS and EOS), got {vocab_size}")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False,
    ))  # fmt: skip
    return _from_json({"tokenizer.json": tok.to_str(pretty=True).encode()}, None, None)
