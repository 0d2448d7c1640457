"""Training batches, whose rows are a pure function of (seed, step, index in the global batch).

    ids, targets = sample_batch(corpus, tokenizer, 256, step=0, indices=range(16), seed=0)
    ids, targets, positions = sample_text(corpus, 2048, 32768, step=0, indices=range(16), seed=0)
    ids, targets = sample_reports(
        reports, tokenizer, 2048, step=0, indices=range(4), batch_size=4, seed=0
    )

There is no sampler whose state could be lost. So a resumed run sees the batches that it would have
seen without the stop, and any number of processes share a batch: each asks for its own indices.

sample_batch makes rows of three kinds, in the shares that a Mix gives:

1. Text: tokens from a random place of the corpus. The paper fine-tunes on text alone.
2. Passkeys (section 3.3 of the paper): keys in filler, and questions that ask for them.
3. Repeated segments: a few short segments, again and again in random order.

The second and third kind are there for tiny models that are trained from scratch. The paper's
models have read a trillion tokens and can copy already. A tiny model is trained for minutes, and
text seldom rewards copying. In passkeys and repeated segments many tokens can be predicted only by
copying earlier ones, so that a tiny model learns to copy in time.

sample_text makes rows of text of one document each. They may be much shorter than the window, with
skipped positions that reach through it.

sample_reports makes rows for the paper's other fine-tuning (section 3.5): reports and summaries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data import Corpus
from prompts import (
    KEY, QUESTION, TASK, encode_after, encode_line, filler, random_key, report_frame_tokens,
    report_prompt
)
from tokenizer import Tokenizer

# ---- batches of text, passkeys and repeated segments ---------------------------------------------


@dataclass(frozen=True)
class Mix:
    """The shares of each kind of row, from 0 to 1. The default is text alone, as in the paper.

    A passkey row has one of three forms: many keys in a dense row, a single prompt that fills the
    row, or several prompts one after another.
    """

    passkey: float = 0.0  # of all rows: those with passkeys
    repeat: float = 0.0  # of all rows: those of repeated segments; the rest is text
    dense: float = 0.5  # of the passkey rows: the dense ones
    alone: float = 0.5  # of the other passkey rows: those with a single prompt

    def __post_init__(self) -> None:
        shares = (self.passkey, self.repeat, self.passkey + self.repeat, self.dense, self.alone)
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                "the shares of the mix must be 0 to 1, and passkey and repeat together too: "
                f"got {self}"
            )


def sample_batch(
    corpus: Corpus, tokenizer: Tokenizer, length: int, step: int, indices: Iterable[int], *,
    seed: int, mix: Mix = Mix()
) -> tuple[Tensor, Tensor]:
    """Ids (B, length) and targets (B, length) of the rows `indices` of a step, int64, on the CPU.

    indices: of the rows in the step's global batch. Row i depends on (seed, step, i) and on corpus,
        tokenizer, length and mix, but not on the other rows or on earlier calls.

    The target of each token is the token that follows it.
    Raises ValueError if the corpus is shorter than one row.
    """
    check_length(corpus, length)
    rows = []
    for index in indices:
        rng = row_generator(seed, step, index)
        rows.append(sample_row(corpus, tokenizer, length + 1, rng, mix))
    batch = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, length + 1)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def sample_positions(
    length: int, window: int, step: int, indices: Iterable[int], *, seed: int
) -> Tensor:
    """Skipped positions below `window` for the rows `indices` of a step, (B, length) int64.

    They are for rows of sample_batch, whose tokens don't depend on them.
    """
    rows = []
    for index in indices:
        # The row's tokens have the generator without the last number
        rng = np.random.default_rng([seed, step, int(index), 1])
        rows.append(skipped_positions(length, window, rng))
    return torch.from_numpy(np.stack(rows))


def row_generator(seed: int, step: int, index: int) -> np.random.Generator:
    """Where all random numbers of a row come from."""
    return np.random.default_rng([seed, step, int(index)])


def check_length(corpus: Corpus, length: int) -> None:
    """Raise ValueError if the corpus is shorter than one row of `length` tokens and a target."""
    if len(corpus) <= length:
        raise ValueError(
            f"{corpus.name}: its {len(corpus):,} tokens don't fill one row of {length:,} + 1: "
            "give more text"
        )


def sample_row(
    corpus: Corpus, tokenizer: Tokenizer, size: int, rng: np.random.Generator, mix: Mix
) -> np.ndarray:
    """One row of `size` tokens, of a random kind: (size,), any integer type."""
    # One number from 0 to 1 chooses the kind. Each kind has an interval as long as its share.
    draw = rng.random()
    if draw < mix.passkey:
        writer = passkey_writer(tokenizer, size)
        if draw < mix.passkey * mix.dense:
            return dense_passkeys(corpus, writer, size, rng)
        if rng.random() < mix.alone:
            return single_prompt(corpus, writer, size, rng)
        return several_prompts(corpus, writer, size, rng)
    if draw < mix.passkey + mix.repeat:
        return repeated_segments(corpus, tokenizer, size, rng)
    return random_text(corpus, size, rng)


def random_text(corpus: Corpus, n: int, rng: np.random.Generator) -> np.ndarray:
    """n tokens from a random place of the corpus, where one document follows another.

    So a row may begin within a document, and go on in others. The model then sees EOS and BOS
    between them (where the tokenizer has these). Nothing else keeps them apart: positions go on,
    and tokens attend to the documents before theirs.
    """
    start = int(rng.integers(len(corpus) - n + 1))
    return np.asarray(corpus.tokens[start : start + n])


# ---- text of one document, with skipped positions ------------------------------------------------


def sample_text(
    corpus: Corpus, length: int, window: int, step: int, indices: Iterable[int], *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, targets and positions of rows of text, (B, length) each, int64, on the CPU.

    window: more than length: positions are skipped, as in PoSE (Zhu et al., arXiv 2309.10400).
        A row is cut into two chunks. The first has the positions from 0 on. Those of the second are
        shifted by a random skip, so that the last one is anything from length - 1 to window - 1. So
        a model sees all distances below `window` in rows that are much shorter.
        As much as length: the positions are 0, 1, 2, ...

    A row is text of one document, if it is long enough. Otherwise it is like random_text's, which
    says what the model then sees.

    Row i depends on (seed, step, i) and on corpus, length and window alone. The target of each
    token is the token that follows it in the corpus, for the last token of the first chunk too.
    Raises ValueError if the corpus is shorter than one row.
    """
    check_length(corpus, length)
    rows = []
    for index in indices:
        rng = row_generator(seed, step, index)
        positions = skipped_positions(length, window, rng)
        places = places_in_text(corpus, positions, rng)
        rows.append(np.stack([corpus.tokens[places], corpus.tokens[places + 1], positions]))
    batch = torch.from_numpy(np.stack(rows, axis=1).astype(np.int64))  # (3, B, length)
    return batch[0], batch[1], batch[2]


def skipped_positions(length: int, window: int, rng: np.random.Generator) -> np.ndarray:
    """The positions of a row, (length,): two runs, the second shifted by a random skip.

    The cut is anywhere in the row, and the skip is anything that leaves the last position below
    `window`. length: at least 2, and at most window.
    """
    cut = int(rng.integers(1, length))  # tokens of the first chunk
    skip = int(rng.integers(window - length + 1))
    positions = np.arange(length)
    positions[cut:] += skip
    return positions


def places_in_text(
    corpus: Corpus, positions: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The places in the corpus that a row's tokens are read from, (length,).

    If the document has enough tokens, as many are skipped in the text as in the positions: the row
    is what those positions hold in a row of the whole window. If it has fewer, a random number of
    tokens is skipped. If it is shorter than the row, nothing is skipped, and the row begins
    anywhere in it and goes on in the next documents.
    """
    length = len(positions)
    size = length + 1  # with the target of the last token

    # Draw the document by its length, as the document of a random token
    token = int(rng.integers(len(corpus)))
    document = int(np.searchsorted(corpus.starts, token, side="right")) - 1
    first = int(corpus.starts[document])
    room = int(corpus.starts[document + 1]) - first - size  # tokens that the row leaves out
    if room < 0:
        return min(token, len(corpus) - size) + np.arange(length)

    # Skip within the document, and begin anywhere from where the row ends within it
    runs = positions - np.arange(length)  # 0 in the first chunk, the skip in the second
    skip = int(runs[-1])
    if skip > room:
        skip = int(rng.integers(room + 1))
    start = first + int(rng.integers(room - skip + 1))
    return start + np.arange(length) + np.minimum(runs, skip)


# ---- rows of repeated segments -------------------------------------------------------------------


def repeated_segments(
    corpus: Corpus, tokenizer: Tokenizer, size: int, rng: np.random.Generator
) -> np.ndarray:
    """2 to 8 segments of 5 to 25 tokens, repeated in random order until they fill the row.

    A segment is random tokens, random digits or text. Only the text can be predicted when it comes
    for the first time, and all can be copied from then on.
    """
    # The last token of "\n7" is that of 7. A text "7" may have a token for a space before it.
    digits = np.array([tokenizer.encode(f"\n{digit}")[-1] for digit in range(10)])

    segments = []
    for draw in rng.random(rng.integers(2, 9)):
        n = int(rng.integers(5, 26))
        if draw < 0.35:
            segment = rng.integers(tokenizer.vocab_size, size=n)
        elif draw < 0.7:
            segment = digits[rng.integers(10, size=n)]
        else:
            segment = random_text(corpus, min(n, len(corpus)), rng)
        segments.append(segment)

    # Draw enough segments to fill the row, even if the shortest one is drawn each time.
    shortest = min(len(segment) for segment in segments)
    order = rng.integers(len(segments), size=size // shortest + 1)
    return np.concatenate([segments[i] for i in order])[:size]


# ---- long documents ------------------------------------------------------------------------------


class ChosenTokens:
    """The tokens of some documents of a corpus, one after another. Nothing is copied.

    It is read like an array of tokens: by a slice, or by an array of places.
    """

    def __init__(self, corpus: Corpus, documents: np.ndarray) -> None:
        """documents: the numbers of the chosen ones, at least one."""
        sizes = np.diff(corpus.starts)[documents]
        self.tokens = corpus.tokens
        self.starts = np.concatenate([[0], np.cumsum(sizes)])  # of the chosen documents, here
        self.shifts = corpus.starts[documents] - self.starts[:-1]  # from here to the corpus

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)))
        document = np.searchsorted(self.starts, places, side="right") - 1
        return self.tokens[places + self.shifts[document]]


def long_documents(corpus: Corpus, least: int) -> Corpus:
    """The corpus of the documents that have at least so many tokens, with BOS and EOS.

    Raises ValueError if there are none.
    """
    sizes = np.diff(corpus.starts)
    chosen = np.flatnonzero(sizes >= least)
    if len(chosen) == 0:
        raise ValueError(
            f"{corpus.name}: no document has {least:,} tokens, the longest has {sizes.max():,}: "
            "give longer documents, or a smaller --min_tokens"
        )
    tokens = ChosenTokens(corpus, chosen)
    return replace(corpus, tokens=tokens, starts=tokens.starts)


# ---- the lines of passkey prompts, as tokens -----------------------------------------------------


class PasskeyWriter:
    """Writes passkey prompts as tokens, for rows of up to `size` tokens.

    The lines are tokenized one by one, because a row needs filler of an exact number of tokens.
    Joined, they have the tokens of the whole text: a model is trained on what it is asked later.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer = tokenizer
        self.task_line = np.array(tokenizer.bos_ids + tokenizer.encode(TASK + "\n"), dtype=np.int64)
        self.line_break = np.array(encode_after(tokenizer, "a", "\n"), dtype=np.int64)
        self.eos = np.array(tokenizer.eos_ids, dtype=np.int64)
        # A sentence has at least one token, so that `size` sentences are enough for any row.
        self.filler = encode_line(tokenizer, filler(size))
        # Where each digit is a token, all keys have as many tokens as 12345.
        self.shortest = len(self.prompt("12345"))

    def key_line(self, key: str) -> np.ndarray:
        return encode_line(self.tokenizer, KEY.format(key=key))

    def answered_question(self, key: str, end: str = "\n") -> np.ndarray:
        return encode_line(self.tokenizer, f"{QUESTION} {key}", end)

    def filler_line(self, n: int) -> np.ndarray:
        """n tokens: filler and a line break. No tokens if n is 0.

        The filler may end within a sentence. With whole sentences alone, keys would stand at a few
        distances only, and a small model would learn these instead of all.
        """
        words = self.filler[: max(n - len(self.line_break), 0)]
        return np.concatenate([words, self.line_break])[:n]

    def prompt(self, key: str, before: int = 0, after: int = 0) -> np.ndarray:
        """BOS, a prompt with its answer, and EOS; with `before` and `after` tokens of filler."""
        lines = [
            self.task_line, self.filler_line(before), self.key_line(key), self.filler_line(after),
            self.answered_question(key, end=""), self.eos
        ]
        return np.concatenate(lines)


@lru_cache(maxsize=8)
def passkey_writer(tokenizer: Tokenizer, size: int) -> PasskeyWriter:
    """The writer for rows of up to `size` tokens.

    It is cached, because all passkey rows need it and its filler takes milliseconds to tokenize.
    """
    return PasskeyWriter(tokenizer, size)


# ---- rows of passkeys ----------------------------------------------------------------------------


def dense_passkeys(
    corpus: Corpus, writer: PasskeyWriter, size: int, rng: np.random.Generator
) -> np.ndarray:
    """A row of many keys: key line, a little text or filler, then mostly the question; and again.

    A prompt has one answer to learn from. A dense row of 256 tokens has about four.
    """
    lines = []
    total = 0
    while total < size:
        key = random_key(rng)
        lines.append(writer.key_line(key))

        # After the key comes text (half of the time) or filler, so that the distances differ.
        if rng.random() < 0.5:
            n = int(rng.integers(min(30, size)))
            lines.append(random_text(corpus, n, rng))
            lines.append(writer.line_break)
        else:
            n = int(rng.integers(45))
            lines.append(writer.filler_line(n))

        # Seven keys of ten are asked for.
        if rng.random() < 0.7:
            lines.append(writer.answered_question(key))
        total = sum(len(line) for line in lines)
    return np.concatenate(lines)[:size]


def single_prompt(
    corpus: Corpus, writer: PasskeyWriter, size: int, rng: np.random.Generator
) -> np.ndarray:
    """A row of one prompt that fills it, with its answer. 70% of these rows have no task line.

    The task line takes the first quarter of a tiny window, so that no key can be there. But a model
    has to learn the largest distances of its original window too. Position Interpolation maps the
    distances of the extended window to these, and can't help where nothing was learned.
    A window too short for a prompt gets a dense row.
    """
    prompt = None
    if rng.random() < 0.3:
        prompt = random_prompt(writer, size, rng)
    if prompt is None:
        # Draw a prompt that is longer by its task line, and cut the task line off.
        task_size = len(writer.task_line)
        prompt = random_prompt(writer, task_size + size, rng)
        if prompt is None:
            return dense_passkeys(corpus, writer, size, rng)
        prompt = prompt[task_size:]
    return prompt


def several_prompts(
    corpus: Corpus, writer: PasskeyWriter, size: int, rng: np.random.Generator
) -> np.ndarray:
    """A row of whole prompts with their answers, then text where the next prompt doesn't fit.

    A window too short for a prompt gets a dense row.
    """
    if writer.shortest >= size:
        return dense_passkeys(corpus, writer, size, rng)
    parts = []
    room = size
    while True:
        # The power of 1.5 makes short prompts more frequent, so that a row holds several.
        prompt_size = writer.shortest + int((size - writer.shortest) * rng.random() ** 1.5)
        prompt = None
        if prompt_size <= room:
            prompt = random_prompt(writer, prompt_size, rng)

        # The next prompt doesn't fit: fill the row with text.
        if prompt is None:
            parts.append(random_text(corpus, room, rng))
            return np.concatenate(parts)
        parts.append(prompt)
        room -= prompt_size


def random_prompt(writer: PasskeyWriter, size: int, rng: np.random.Generator) -> np.ndarray | None:
    """A prompt with its answer, together `size` tokens, with a random key at a random place.

    Returns None if size is less than the shortest prompt.
    """
    room = size - writer.shortest
    if room < 0:
        return None
    after = int(rng.integers(room + 1))
    key = random_key(rng)
    prompt = writer.prompt(key, before=room - after, after=after)
    if len(prompt) != size:
        # The tokenizer joins digits, and has more or fewer tokens for this key than for 12345.
        room += size - len(prompt)
        if room < 0:
            return None
        after = min(after, room)
        prompt = writer.prompt(key, before=room - after, after=after)
    return prompt


# ---- batches of reports and their summaries ------------------------------------------------------


def sample_reports(
    reports: Sequence[tuple[str, str]], tokenizer: Tokenizer, length: int, step: int,
    indices: Iterable[int], *, batch_size: int, seed: int, max_input: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids (B, length) and targets (B, length) of the rows `indices` of a step, int64, on the CPU.

    reports: (document, summary) pairs, as data.read_reports gives them.
    indices: of the rows in the step's global batch, which has batch_size rows.
    max_input: the most tokens of a document; the rest is cut off. A document is cut further where
        the prompt and the summary need the room.

    A row is the prompt with the document, the summary, EOS, and padding. Only the summary and EOS
    are learned: all other targets are -100, which the loss leaves out.
    Each report comes once in an epoch. The order of epoch e depends on (seed, e) alone.
    Raises ValueError, naming the report (the first is 1), if there is no room for its document.
    """
    indices = list(indices)
    ids = torch.zeros(len(indices), length, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for row, index in enumerate(indices):
        # Find the report of this row. An epoch is len(reports) rows, counted through all steps.
        epoch, place = divmod(step * batch_size + int(index), len(reports))
        order = np.random.default_rng([seed, epoch]).permutation(len(reports))
        number = int(order[place])
        document, summary = reports[number]

        # Cut the document so that prompt and summary fit into the row.
        answer = _answer_tokens(tokenizer, summary)
        room = _room_for_document(tokenizer, length, number, answer)
        if max_input is not None:
            room = min(room, max_input)
        prompt = report_prompt(tokenizer, document, room)

        # Each target stands one place before its token. So EOS, the last token, is a target only.
        end = len(prompt) + len(answer) - 1
        ids[row, :end] = torch.tensor(prompt + answer[:-1])
        targets[row, len(prompt) - 1 : end] = torch.tensor(answer)
    return ids, targets


def check_reports(reports: Sequence[tuple[str, str]], tokenizer: Tokenizer, length: int) -> None:
    """Raise ValueError, naming the report, for the first that leaves no room for its document.

    Only the summaries are tokenized, so that all reports can be checked before the training.
    """
    for number, (_, summary) in enumerate(reports):
        _room_for_document(tokenizer, length, number, _answer_tokens(tokenizer, summary))


def _answer_tokens(tokenizer: Tokenizer, summary: str) -> list[int]:
    """The tokens that the model is to write after the prompt: the summary and EOS."""
    return encode_line(tokenizer, summary.strip(), end="").tolist() + tokenizer.eos_ids


def _room_for_document(tokenizer: Tokenizer, length: int, number: int, answer: list[int]) -> int:
    """The tokens, at least 1, that the prompt and the answer leave to the document of a report.

    number: the place of the report among all, counted from 0.
    """
    frame = report_frame_tokens(tokenizer)
    room = length + 1 - frame - len(answer)  # + 1 because the last token is a target only
    if room < 1:
        raise ValueError(
            f"report {number + 1}: {len(answer)} tokens of summary and {frame} of prompt leave no "
            f"room for its document in a window of {length}: give a longer window, or leave this "
            "report out"
        )
    return room
