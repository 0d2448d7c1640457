"""Tokens become batches: passkeys, the training mix, reports; rows that depend on nothing but their number.

Read data.py first, then this from top to bottom:

    prompt = passkey_prompt(tokenizer, length=2048, k=1024, key="00417")
    ids, targets = sample_batch(corpus, tokenizer, 256, step=0, indices=range(16), seed=0)
    ids, targets = sample_reports(reports, tokenizer, 2048, step=0, indices=range(4), batch_size=4, seed=0)

A batch is a pure function of (seed, step, index in the global batch): there is no sampler whose state could
be lost, so a resumed run sees what it would have seen, and any number of processes share a batch by slicing it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data import Corpus
from tokenizer import Tokenizer

# ---------------------------------------------------------------- the passkey text

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"  # " 12345" follows
SENTENCES = re.findall(r"[^ ][^.]*\.", FILLER)


@dataclass
class PasskeyPrompt:
    """ids: the prompt, BOS first if there is one.  key: five digits.  k: tokens from the key line's first on."""

    ids: list[int]
    key: str
    k: int

    @property
    def length(self) -> int:
        return len(self.ids)


def random_key(rng: np.random.Generator) -> str:
    """Five digits, zeros in front included: all 100,000 keys are equally likely."""
    return f"{rng.integers(100_000):05d}"


def _filler(n: int) -> str:
    """A line of n sentences of filler."""
    return " ".join(SENTENCES[i % len(SENTENCES)] for i in range(n))


def passkey_text(key: str, before: int, after: int) -> str:
    """The paper's prompt with so many sentences of filler before and after the key line."""
    return "\n".join(line for line in (TASK, _filler(before), KEY.format(key=key), _filler(after), QUESTION) if line)


def _encode_prompt(tokenizer: Tokenizer, key: str, before: int, after: int) -> tuple[list[int], int]:
    """The prompt's ids and where the key line begins in them."""
    bos, _ = tokenizer.around
    text = passkey_text(key, before, after)
    ids, head = tokenizer.encode(text), tokenizer.encode(text[: text.index(KEY.format(key=key))])
    # the first token that differs is the key line's, also in a vocabulary that joins the line break to it
    start = next((i for i, (a, b) in enumerate(zip(ids, head)) if a != b), len(head))
    return bos + ids, len(bos) + start


@lru_cache(maxsize=64)
def _filler_sizes(tokenizer: Tokenizer, room: int) -> np.ndarray:
    """Tokens that a line of 0, 1, 2, ... sentences of filler adds to a prompt, as far as they fit into room."""
    lengths = [len(_encode_prompt(tokenizer, "12345", 0, n)[0]) for n in range(len(SENTENCES) + 2)]
    sizes = [n - lengths[0] for n in lengths]
    # from the second sentence on all are within a line, and any five of them are one round of the filler
    while sizes[-1] <= room:
        sizes.append(sizes[-len(SENTENCES)] + sizes[len(SENTENCES) + 1] - sizes[1])
    return np.array(sizes)


def passkey_prompt(tokenizer: Tokenizer, length: int, k: int, key: str) -> PasskeyPrompt | None:
    """The paper's prompt, the key line k tokens from its end, its filler in whole sentences.

    length: tokens of the prompt at most, which it comes as near as whole sentences allow; the answer comes on top.
    k: tokens wanted from the key line's first token to the prompt's end; the actual k is the nearest possible,
    and what the header leaves room for (k = length puts the key right after it, or nearly).
    Returns None if k is below what key line and question take, or length below the shortest prompt.
    """
    if not re.fullmatch(r"[0-9]{5}", key):
        raise ValueError(f"key must be five digits, got {key!r}")
    ids, start = _encode_prompt(tokenizer, key, 0, 0)
    room, shortest = length - len(ids), len(ids) - start
    if room < 0 or k < shortest:
        return None
    sizes = _filler_sizes(tokenizer, room)
    fitting = sizes[sizes <= room]
    after = int(np.abs(shortest + fitting - k).argmin())
    before = int((fitting <= room - fitting[after]).sum()) - 1
    while True:
        ids, start = _encode_prompt(tokenizer, key, before, after)
        if len(ids) <= length:  # the sizes were right; a tokenizer that joins words may need another try
            return PasskeyPrompt(ids, key, len(ids) - start)
        before, after = max(before - 1, 0), after if before else after - 1


# ---------------------------------------------------------------- training sequences


@dataclass(frozen=True)
class Mix:
    """What training sequences are made of: shares of passkey text and of repeated segments, the rest plain text.

    The paper fine-tunes on text alone, and its models can copy already. A tiny base learns it in minutes only from
    text in which copying pays: passkeys, and segments that come again and again.
    dense: the share of the passkey sequences that have many keys and questions; the others are whole prompts.
    alone: the share of those where one prompt fills the row; the others have several, one after another.
    """

    passkey: float = 0.0
    repeat: float = 0.0
    dense: float = 0.5
    alone: float = 0.5

    def __post_init__(self) -> None:
        shares = (self.passkey, self.repeat, self.passkey + self.repeat, self.dense, self.alone)
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"the shares of the mix must be 0 to 1, and passkey and repeat together too: got {self}")


def sample_batch(
    corpus: Corpus, tokenizer: Tokenizer, length: int, step: int, indices: Iterable[int], *, seed: int, mix: Mix = Mix()
) -> tuple[Tensor, Tensor]:
    """Rows `indices` of the global batch of a step: ids (B, length) and targets (B, length), int64, on the CPU.

    Row i depends on (seed, step, i) and nothing else: not on the other rows, the process, or what was drawn before.
    """
    if len(corpus) <= length:
        raise ValueError(
            f"{corpus.name}: its {len(corpus)} tokens don't fill one window of {length} + 1: give more text"
        )
    rows = [_row(corpus, tokenizer, length, np.random.default_rng([seed, step, int(i)]), mix) for i in indices]
    batch = torch.from_numpy(np.stack(rows))
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def _row(corpus: Corpus, tokenizer: Tokenizer, length: int, rng: np.random.Generator, mix: Mix) -> np.ndarray:
    """One training sequence, (length + 1,) int64: its last token is a target only."""
    kind, size = rng.random(), length + 1
    if kind < mix.passkey * mix.dense:
        row = _dense_passkeys(corpus, tokenizer, size, rng)
    elif kind < mix.passkey:
        row = (_one_prompt if rng.random() < mix.alone else _several_prompts)(corpus, tokenizer, size, rng)
    elif kind < mix.passkey + mix.repeat:
        row = _repeats(corpus, tokenizer, size, rng)
    else:
        row = _text(corpus, size, rng)
    return row.astype(np.int64)


def _text(corpus: Corpus, n: int, rng: np.random.Generator) -> np.ndarray:
    """n tokens of the stream, from anywhere."""
    start = int(rng.integers(len(corpus.tokens) - n + 1))
    return np.asarray(corpus.tokens[start : start + n])


def _line(tokenizer: Tokenizer, text: str, end: str = "\n") -> np.ndarray:
    """The tokens of a line as they are after a line break (the first word of a text may have others)."""
    return np.array(tokenizer.encode("\n" + text + end)[len(tokenizer.encode("\n")) :], dtype=np.int64)


@lru_cache(maxsize=1024)
def _filler_line(tokenizer: Tokenizer, n: int) -> np.ndarray:
    return _line(tokenizer, _filler(n), end="\n" if n else "")


@lru_cache(maxsize=8)
def _task_line(tokenizer: Tokenizer) -> np.ndarray:
    return np.array(tokenizer.around[0] + tokenizer.encode(TASK + "\n"))


@lru_cache(maxsize=8)
def _digits(tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of 0 to 9."""
    return np.array([_line(tokenizer, str(digit), end="")[-1] for digit in range(10)])


@lru_cache(maxsize=64)
def _key_template(tokenizer: Tokenizer, text: str, end: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The tokens of a line with keys and where their digits are; None where digits have no tokens of their own."""
    ids, digits = _line(tokenizer, text.format(key="01234"), end), _digits(tokenizer)
    slots = np.flatnonzero(np.isin(ids, digits))
    alone = len(slots) == 5 * text.count("{key}") and (ids[slots] == np.resize(digits[:5], len(slots))).all()
    return (ids, slots) if alone else None


def _key_line(tokenizer: Tokenizer, text: str, key: str, end: str = "\n") -> np.ndarray:
    """The tokens of a line in which {key} stands for the key."""
    template = _key_template(tokenizer, text, end)
    if template is None:
        return _line(tokenizer, text.format(key=key), end)
    ids, slots = template[0].copy(), template[1]
    ids[slots] = np.resize(_digits(tokenizer)[[int(digit) for digit in key]], len(slots))
    return ids


@lru_cache(maxsize=8)
def _line_break(tokenizer: Tokenizer) -> np.ndarray:
    """The tokens that end a line."""
    return np.array(tokenizer.encode("a\n")[len(tokenizer.encode("a")) :], dtype=np.int64)


@lru_cache(maxsize=8)
def _endless_filler(tokenizer: Tokenizer) -> np.ndarray:
    return _filler_line(tokenizer, 10_000)


def _cut_filler(tokenizer: Tokenizer, n: int) -> np.ndarray:
    """A line of n tokens of filler, cut anywhere: with whole sentences alone, keys would lie at a few distances only,
    and a small model learns those instead of all."""
    line_break = _line_break(tokenizer)
    return np.concatenate([_endless_filler(tokenizer)[: max(n - len(line_break), 0)], line_break])[:n]


def _answered_prompt(
    tokenizer: Tokenizer, key: str, before: np.ndarray, after: np.ndarray, header: bool = True
) -> np.ndarray:
    """A passkey prompt with its answer as a document: the tokens of passkey_text, put together from known lines."""
    return np.concatenate([
        _task_line(tokenizer)[: None if header else 0], before, _key_line(tokenizer, KEY, key), after,
        _key_line(tokenizer, QUESTION + " {key}", key, end=""), np.array(tokenizer.around[1], dtype=np.int64),
    ])  # fmt: skip


def _prompt_of(tokenizer: Tokenizer, size: int, header: bool, rng: np.random.Generator) -> np.ndarray | None:
    """A prompt of exactly `size` tokens with its answer, the key anywhere in it; None where no prompt is so short."""
    room = size - len(_answered_prompt(tokenizer, "12345", *[_cut_filler(tokenizer, 0)] * 2, header))
    if room < 0:
        return None
    after, key = int(rng.integers(room + 1)), random_key(rng)
    room = size - len(_answered_prompt(tokenizer, key, *[_cut_filler(tokenizer, 0)] * 2, header))  # keys may differ
    if room < 0:
        return None
    after = min(after, room)
    filler = _cut_filler(tokenizer, room - after), _cut_filler(tokenizer, after)
    return _answered_prompt(tokenizer, key, *filler, header)


def _dense_passkeys(corpus: Corpus, tokenizer: Tokenizer, size: int, rng: np.random.Generator) -> np.ndarray:
    """Key lines, a little text or filler after each, then mostly the question: many answers to learn from."""
    parts, total, line_break = [], 0, _line_break(tokenizer)
    while total < size:
        key = random_key(rng)
        parts.append(_key_line(tokenizer, KEY, key))
        if rng.random() < 0.5:
            parts += [_text(corpus, int(rng.integers(min(30, size))), rng), line_break]
        else:
            parts.append(_cut_filler(tokenizer, int(rng.integers(45))))
        if rng.random() < 0.7:
            parts.append(_key_line(tokenizer, QUESTION + " {key}", key))
        total = sum(map(len, parts))
    return np.concatenate(parts)[:size]


def _several_prompts(corpus: Corpus, tokenizer: Tokenizer, size: int, rng: np.random.Generator) -> np.ndarray:
    """Whole prompts with their answers, each of fewer than `size` tokens, then text where the next doesn't fit.
    A window too short for any prompt gets dense passkeys."""
    shortest = len(_answered_prompt(tokenizer, "12345", *[_cut_filler(tokenizer, 0)] * 2))
    if shortest >= size:
        return _dense_passkeys(corpus, tokenizer, size, rng)
    parts, left = [], size
    while True:
        length = shortest + int((size - shortest) * rng.random() ** 1.5)  # short ones more often: a row holds more
        if length > left:
            return np.concatenate([*parts, _text(corpus, left, rng)])
        parts.append(_prompt_of(tokenizer, length, True, rng))
        left -= length


def _one_prompt(corpus: Corpus, tokenizer: Tokenizer, size: int, rng: np.random.Generator) -> np.ndarray:
    """One prompt that fills the row, its key anywhere; mostly without the header.

    Behind the header a key is at most three quarters of the tiny window back. What a model has not seen at the end
    of its own window, Position Interpolation can't stretch: the extended window would be of no use that far out.
    """
    prompt = _prompt_of(tokenizer, size, True, rng) if rng.random() < 0.3 else None
    if prompt is None:
        prompt = _prompt_of(tokenizer, size, False, rng)
    return _dense_passkeys(corpus, tokenizer, size, rng) if prompt is None else prompt


def _repeats(corpus: Corpus, tokenizer: Tokenizer, size: int, rng: np.random.Generator) -> np.ndarray:
    """2 to 8 segments of 5 to 25 tokens (random tokens, random digits, text), again and again in random order."""
    segments = []
    for kind in rng.random(rng.integers(2, 9)):
        n = int(rng.integers(5, 26))
        if kind < 0.35:
            segments.append(rng.integers(tokenizer.vocab_size, size=n))
        elif kind < 0.7:
            segments.append(_digits(tokenizer)[rng.integers(10, size=n)])
        else:
            segments.append(_text(corpus, min(n, len(corpus)), rng))
    order = rng.integers(len(segments), size=size // min(map(len, segments)) + 1)
    return np.concatenate([segments[i] for i in order])[:size]


# ---------------------------------------------------------------- reports and their summaries

PAPER_INPUT = 15_000  # tokens of a document that the paper's models read
REPORT_PROMPT = "Read the following report and write a summary of it.\n\nReport:\n{document}\n\nSummary:\n"


@lru_cache(maxsize=8)
def _report_frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of the prompt before the document, BOS among them, and after it."""
    head, tail = REPORT_PROMPT.split("{document}")
    return tokenizer.around[0] + tokenizer.encode(head), tokenizer.encode("a" + tail)[len(tokenizer.encode("a")) :]


def report_prompt(tokenizer: Tokenizer, document: str, max_input: int | None = None) -> list[int]:
    """The tokens that a summary follows: BOS, the prompt with the document's first max_input tokens (None: all).

    The parts are tokenized each for itself, in training as in generation: a tokenizer that would join the last word
    of a document, wherever it is cut, and the line break after it makes no difference between the two.
    """
    head, tail = _report_frame(tokenizer)
    # stripped: with white space at its edges the text's own tokens could not be told from the line break's
    return head + _line(tokenizer, document.strip(), end="").tolist()[:max_input] + tail


def report_frame_tokens(tokenizer: Tokenizer) -> int:
    """What report_prompt adds to a document's tokens."""
    return sum(map(len, _report_frame(tokenizer)))


def _room_for_document(tokenizer: Tokenizer, length: int, number: int, answer: np.ndarray) -> int:
    """Tokens that prompt and answer (the summary and EOS) leave to the document of report `number`, at least 1."""
    frame = report_frame_tokens(tokenizer)
    room = length + 1 - frame - len(answer)  # the last token is a target only
    if room < 1:
        raise ValueError(
            f"report {number + 1}: {len(answer)} tokens of summary and {frame} of prompt leave no room for its "
            f"document in a window of {length}: give a longer window, or leave this report out"
        )
    return room


def _answer(tokenizer: Tokenizer, summary: str) -> np.ndarray:
    """The tokens that are to follow the prompt."""
    return np.append(_line(tokenizer, summary.strip(), end=""), tokenizer.around[1]).astype(np.int64)


def check_reports(reports: Sequence[tuple[str, str]], tokenizer: Tokenizer, length: int) -> None:
    """ValueError, naming the first such report, if one leaves no room for its document; tokenizes summaries alone."""
    for number, (_, summary) in enumerate(reports):
        _room_for_document(tokenizer, length, number, _answer(tokenizer, summary))


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def sample_reports(
    reports: Sequence[tuple[str, str]], tokenizer: Tokenizer, length: int, step: int, indices: Iterable[int], *,
    batch_size: int, seed: int, max_input: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows `indices` of a step's global batch of batch_size: ids and targets (B, length), int64, on the CPU.

    A row is BOS, the prompt with the document, its summary, EOS, and padding up to length. Targets are -100 but for
    the summary and its EOS: nothing else is learned. The document is cut to its first max_input tokens, and further
    where prompt and summary need the room. Row i is number step * batch_size + i of an endless sequence of epochs,
    each a permutation of the reports drawn from (seed, epoch): a pure function, as sample_batch.
    ValueError, naming the report (the first is 1), if there is no room for any of its document.
    """
    indices = list(indices)
    ids, targets = torch.zeros(len(indices), length, dtype=torch.int64), torch.full((len(indices), length), -100)
    for row, i in enumerate(indices):
        epoch, place = divmod(step * batch_size + int(i), len(reports))
        number = int(_epoch(seed, epoch, len(reports))[place])
        document, summary = reports[number]
        answer = _answer(tokenizer, summary)
        room = _room_for_document(tokenizer, length, number, answer)
        prompt = report_prompt(tokenizer, document, room if max_input is None else min(room, max_input))
        end = len(prompt) + len(answer) - 1  # EOS is a target only
        ids[row, :end] = torch.tensor([*prompt, *answer[:-1]])
        targets[row, len(prompt) - 1 : end] = torch.from_numpy(answer)
    return ids, targets
