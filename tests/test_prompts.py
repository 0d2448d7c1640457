"""prompts.py: the paper's passkey prompt and the report prompt, in each form of tokenizer."""

import functools
import re

import numpy as np
import pytest

import prompts
from conftest import FORMS, TEXTS, english
from prompts import passkey_prompt, report_prompt

# ---- passkeys ------------------------------------------------------------------------------------

PAPER = """There is an important info hidden inside a lot of irrelevant text. Find it and memorize \
them. I will quiz you about the important information there.
The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. \
The grass is green.
The pass key is 00417. Remember it. 00417 is the pass key.
The grass is green. The sky is blue.
What is the pass key? The pass key is"""

KEY = "00417"

KEY_LINE = prompts.KEY.format(key=KEY)


def test_the_prompt_is_the_papers_word_for_word():
    assert prompts.passkey_text(KEY, 6, 2) == PAPER
    assert prompts.passkey_text(KEY, 0, 0).count("\n") == 2  # no empty lines


def test_random_keys():
    keys = [prompts.random_key(np.random.default_rng(seed)) for seed in range(300)]
    assert all(re.fullmatch("[0-9]{5}", key) for key in keys)
    assert any(key[0] == "0" for key in keys)
    assert len(set(keys)) > 290


def sentences_of_filler(text: str) -> tuple[int, int]:
    """The sentences of filler before and after the key line in the text of a prompt."""
    text = text.removeprefix(prompts.TASK).removesuffix(prompts.QUESTION)
    before, after = text.split(KEY_LINE)
    return before.count("."), after.count(".")


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_the_nearest_that_whole_sentences_allow(form, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]

    @functools.cache
    def measure(before: int, after: int) -> tuple[int, int]:
        """The length and k of a prompt, by brute force."""
        ids = tokenizer.encode(prompts.passkey_text(KEY, before, after))
        k = len(KEY_LINE) // 4
        while KEY_LINE not in tokenizer.decode(ids[-k:]):
            k += 1
        return 1 + len(ids), k

    shortest, least = measure(0, 0)
    for length in (shortest - 1, shortest, shortest + 9, 256, 400):
        # the distances that are possible at this length
        possible = []
        n = 0
        while measure(0, n)[0] <= length:
            possible.append(measure(0, n)[1])
            n += 1

        for k in [*range(32, length + 1, 64), least - 1, least, length]:
            prompt = passkey_prompt(tokenizer, length, k, KEY)
            if length < shortest or k < least:
                assert prompt is None
                continue
            # word for word, in whole sentences
            text = tokenizer.decode(prompt.ids[1:])
            before, after = sentences_of_filler(text)
            assert text == prompts.passkey_text(KEY, before, after)
            assert prompt.ids == [tokenizer.bos_id, *tokenizer.encode(text)]
            # as long as possible, and k as near as possible
            assert (prompt.length, prompt.k) == measure(before, after)
            assert prompt.length <= length < measure(before + 1, after)[0]
            assert abs(prompt.k - k) == min(abs(other - k) for other in possible)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [2048, 8000])
def test_long_prompts(form, length, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]
    sentence = max(len(tokenizer.encode(sentence)) for sentence in prompts.SENTENCES)
    for i in (1, 2, 7, 16, 31):
        k = length * i // 32
        prompt = passkey_prompt(tokenizer, length, k, KEY)
        assert length - sentence <= prompt.length <= length
        assert abs(prompt.k - k) <= sentence / 2 + 1
        text = tokenizer.decode(prompt.ids[1:])
        assert text == prompts.passkey_text(KEY, *sentences_of_filler(text))
        assert prompt.ids[1:] == tokenizer.encode(text)

        # the last k tokens begin with the key line, and one token less does not
        tail = tokenizer.decode(prompt.ids[-prompt.k :])
        assert tail.strip().startswith(KEY_LINE)
        shorter_tail = tokenizer.decode(prompt.ids[-prompt.k + 1 :])
        assert not shorter_tail.startswith("The")


def test_prompts_that_do_not_fit(tok):
    assert passkey_prompt(tok, 40, 40, KEY) is None
    assert passkey_prompt(tok, 512, 10, KEY) is None


def test_the_largest_distance_puts_the_key_behind_the_task_line(tok):
    prompt = passkey_prompt(tok, 512, 512, KEY)
    line = tok.decode(prompt.ids[1:]).split("\n")[1]
    assert line == KEY_LINE or line == "The grass is green."


@pytest.mark.parametrize("key", ["417", "004170", "abcde", "٠٠٤١٧"])
def test_bad_keys(tok, key):
    with pytest.raises(ValueError, match="key must be five digits"):
        passkey_prompt(tok, 512, 256, key)


# ---- tokens of a text inside another -------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_lines_tokens_are_those_that_it_has_in_a_text(form, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]
    ids = tokenizer.encode("Here we go.\n")
    for line in ("The sky is blue.", KEY_LINE):
        ids += prompts.encode_line(tokenizer, line).tolist()
    ids += prompts.encode_line(tokenizer, prompts.QUESTION, end="").tolist()
    text = f"Here we go.\nThe sky is blue.\n{KEY_LINE}\n{prompts.QUESTION}"
    assert ids == tokenizer.encode(text)


# ---- reports to summarize ------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_report_prompt(form, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]
    for document in [english(50), *TEXTS]:
        ids = report_prompt(tokenizer, document)
        assert ids[0] == tokenizer.bos_id
        text = prompts.REPORT_PROMPT.format(document=document.strip())
        assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize("form", FORMS)
def test_documents_are_cut_from_their_end(form, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]
    document = english(100)
    whole = report_prompt(tokenizer, document)
    frame = report_prompt(tokenizer, document, max_input=0)
    head, tail = prompts.REPORT_PROMPT.split("{document}")
    assert tokenizer.decode(frame[1:]) == head + tail
    assert len(frame) == prompts.report_frame_tokens(tokenizer)

    n_head = 1 + len(tokenizer.encode(head))
    n_tail = len(frame) - n_head
    document_ids = whole[n_head : len(whole) - n_tail]
    assert tokenizer.decode(document_ids).strip() == document
    for n in (1, 40, len(document_ids), len(document_ids) + 1):
        cut = report_prompt(tokenizer, document, max_input=n)
        assert cut == frame[:n_head] + document_ids[:n] + frame[n_head:]
