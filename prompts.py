"""The prompts of the paper's experiments: passkeys in filler (section 3.3), reports (section 3.5).

    prompt = passkey_prompt(tokenizer, length=2048, k=1024, key="00417")
    ids = report_prompt(tokenizer, document, max_input=PAPER_INPUT)

Training (batches.py) and evaluation (passkey.py, summarize.py) both take their prompts from here,
because a model has to be asked with the very tokens that it was trained on.
"""

import re
from dataclasses import dataclass

import numpy as np

from tokenizer import Tokenizer

# ---- passkeys ------------------------------------------------------------------------------------

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

KEY = "The pass key is {key}. Remember it. {key} is the pass key."

QUESTION = "What is the pass key? The pass key is"  # the answer is " " and the key

SENTENCES = re.findall(r"[^ ][^.]*\.", FILLER)


@dataclass
class PasskeyPrompt:
    """A passkey prompt as tokens; its answer is not part of it."""

    ids: list[int]  # BOS first, if the tokenizer has one
    key: str  # five digits
    k: int  # the distance: tokens from the first of the key line to the end of the prompt

    @property
    def length(self) -> int:
        return len(self.ids)


def random_key(rng: np.random.Generator) -> str:
    """Five random digits. All 100,000 keys are equally likely, those with zeros in front too."""
    return f"{rng.integers(100_000):05d}"


def filler(n: int) -> str:
    """A line of n sentences of filler."""
    return " ".join(SENTENCES[i % len(SENTENCES)] for i in range(n))


def passkey_text(key: str, before: int, after: int) -> str:
    """The paper's prompt, with `before` and `after` sentences of filler around the key line."""
    lines = [TASK, filler(before), KEY.format(key=key), filler(after), QUESTION]
    return "\n".join(line for line in lines if line)


def passkey_prompt(tokenizer: Tokenizer, length: int, k: int, key: str) -> PasskeyPrompt | None:
    """The paper's prompt of about `length` tokens with the key line about k tokens from its end.

    length: the most tokens that the prompt may have, without its answer. The prompt is the longest
        that whole sentences of filler allow.
    k: the wanted distance, in tokens from the first of the key line to the end of the prompt. The
        prompt's own k is the nearest that whole sentences allow. The task line stands before the
        key line, so k = length puts the key line right after the task line, or nearly.
    Returns None if length is less than the shortest prompt, or k less than key line and question.
    Raises ValueError if key is not five digits.
    """
    if not re.fullmatch(r"[0-9]{5}", key):
        raise ValueError(f"key must be five digits, got {key!r}")
    shortest = _encode_prompt(tokenizer, key, before=0, after=0)
    if length < shortest.length or k < shortest.k:
        return None

    # Choose the filler after the key line for the best k, then fill the room before the key line.
    room = length - shortest.length
    sizes = _filler_sizes(tokenizer, room)
    after = int(np.abs(shortest.k + sizes - k).argmin())
    before = int((sizes <= room - sizes[after]).sum()) - 1

    # For most tokenizers the sizes are exact. Where a tokenizer splits a longer text differently,
    # the prompt may be too long: then take sentences away until it fits.
    prompt = _encode_prompt(tokenizer, key, before, after)
    while prompt.length > length:
        if before > 0:
            before -= 1
        else:
            after -= 1
        prompt = _encode_prompt(tokenizer, key, before, after)
    return prompt


def _encode_prompt(tokenizer: Tokenizer, key: str, before: int, after: int) -> PasskeyPrompt:
    """The prompt with `before` and `after` sentences of filler around the key line."""
    text = passkey_text(key, before, after)
    beginning = text[: text.index(KEY.format(key=key))]
    text_ids = tokenizer.encode(text)
    beginning_ids = tokenizer.encode(beginning)

    # The key line starts at the first token that differs. That may be the line break before it,
    # because some vocabularies have one token for a line break and the word after it.
    start = 0
    while start < len(beginning_ids) and text_ids[start] == beginning_ids[start]:
        start += 1
    return PasskeyPrompt(ids=tokenizer.bos_ids + text_ids, key=key, k=len(text_ids) - start)


def _filler_sizes(tokenizer: Tokenizer, room: int) -> np.ndarray:
    """The tokens that a line of 0, 1, 2, ... sentences of filler adds to a prompt: (n,) int64.

    It ends with the most sentences that add at most `room` tokens.
    """
    sizes = []
    without_filler = _encode_prompt(tokenizer, "12345", before=0, after=0)
    for n in range(len(SENTENCES) + 2):
        prompt = _encode_prompt(tokenizer, "12345", before=0, after=n)
        sizes.append(prompt.length - without_filler.length)

    # The filler repeats after five sentences, and five more always add the same number of tokens:
    # the difference between six sentences and one. (Five and none differ by the line break too.)
    tokens_per_round = sizes[len(SENTENCES) + 1] - sizes[1]
    while sizes[-1] <= room:
        sizes.append(sizes[-len(SENTENCES)] + tokens_per_round)
    sizes = np.array(sizes)
    return sizes[sizes <= room]


# ---- tokens of a text inside another -------------------------------------------------------------


def encode_after(tokenizer: Tokenizer, beginning: str, text: str) -> list[int]:
    """The tokens of text where it follows `beginning`.

    The first word of a whole text may have other tokens: sentencepiece puts a space before it.
    """
    return tokenizer.encode(beginning + text)[len(tokenizer.encode(beginning)) :]


def encode_line(tokenizer: Tokenizer, text: str, end: str = "\n") -> np.ndarray:
    """The tokens of text and `end` where they follow a line break: (n,) int64."""
    return np.array(encode_after(tokenizer, "\n", text + end), dtype=np.int64)


# ---- reports to summarize ------------------------------------------------------------------------

PAPER_INPUT = 15_000  # tokens of a document that the paper's models read

REPORT_PROMPT = (
    "Read the following report and write a summary of it.\n\nReport:\n{document}\n\nSummary:\n"
)


def report_prompt(tokenizer: Tokenizer, document: str, max_input: int | None = None) -> list[int]:
    """The tokens of the prompt that asks for a summary of the document, BOS first.

    max_input: the document is cut to its first max_input tokens. None keeps all of it.

    The document and the text around it are tokenized one by one. Together, some tokenizers would
    join the document's last word and the line break, unless the document is cut before that word.
    """
    head, tail = _report_frame(tokenizer)
    # Without strip, a tokenizer could join white space at the document's edges to the line breaks.
    document_ids = encode_line(tokenizer, document.strip(), end="").tolist()
    return head + document_ids[:max_input] + tail


def report_frame_tokens(tokenizer: Tokenizer) -> int:
    """The number of tokens that report_prompt adds to those of the document."""
    head, tail = _report_frame(tokenizer)
    return len(head) + len(tail)


def _report_frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of the prompt before the document, BOS first, and those after the document."""
    head, tail = REPORT_PROMPT.split("{document}")
    return tokenizer.bos_ids + tokenizer.encode(head), encode_after(tokenizer, "a", tail)
