"""sequences.py: the paper's prompt, the training mix, reports, batches as a function of their numbers."""

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import sequences
from conftest import FORMS, TEXTS, english
from data import load_corpus
from model import ChunkedCrossEntropy, LLaMA, LLaMAConfig
from sequences import Mix, passkey_prompt, report_prompt, sample_batch, sample_reports


# ---------------------------------------------------------------- the passkey text

PAPER = """There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. \
I will quiz you about the important information there.
The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass is green.
The pass key is 00417. Remember it. 00417 is the pass key.
The grass is green. The sky is blue.
What is the pass key? The pass key is"""


def test_the_prompt_is_the_papers_word_for_word():
    assert sequences.passkey_text("00417", 6, 2) == PAPER
    assert sequences.passkey_text("00417", 0, 0).count("\n") == 2  # no empty lines
    keys = [sequences.random_key(np.random.default_rng(seed)) for seed in range(300)]
    assert all(re.fullmatch("[0-9]{5}", key) for key in keys) and any(key[0] == "0" for key in keys)
    assert len(set(keys)) > 290


def count_from(tokenizer, ids: list[int], line: str) -> int:
    """Tokens from the line's first to the end: the fewest whose text holds the line."""
    return next(n for n in range(len(line) // 4, len(ids) + 1) if line in tokenizer.decode(ids[-n:]))


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_the_nearest_that_whole_sentences_allow(form, tokenizers_by_form):
    tokenizer, key = tokenizers_by_form[form], "00417"
    line = sequences.KEY.format(key=key)

    @functools.cache
    def measure(before: int, after: int) -> tuple[int, int]:  # length and k, by brute force
        ids = tokenizer.encode(sequences.passkey_text(key, before, after))
        return 1 + len(ids), count_from(tokenizer, ids, line)

    shortest, least = measure(0, 0)
    for length in (shortest - 1, shortest, shortest + 9, 256, 400):
        fitting, n = [], 0
        while measure(0, n)[0] <= length:
            fitting.append(measure(0, n)[1])
            n += 1
        for k in [*range(32, length + 1, 64), least - 1, least, length]:
            prompt = passkey_prompt(tokenizer, length, k, key)
            if length < shortest or k < least:
                assert prompt is None
                continue
            text = tokenizer.decode(prompt.ids[1:])
            filler = text.removeprefix(sequences.TASK).removesuffix(sequences.QUESTION)
            before, after = (part.count(".") for part in filler.split(line))
            assert text == sequences.passkey_text(key, before, after)  # word for word, in whole sentences
            assert prompt.ids == [tokenizer.bos_id, *tokenizer.encode(text)]
            assert (prompt.length, prompt.k) == measure(before, after) and prompt.length <= length
            assert abs(prompt.k - k) == min(abs(possible - k) for possible in fitting)
            assert measure(before + 1, after)[0] > length


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [2048, 8000])
def test_long_prompts(form, length, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]
    sentence = max(len(tokenizer.encode(sentence)) for sentence in sequences.SENTENCES)
    for i in (1, 2, 7, 16, 31):
        prompt = passkey_prompt(tokenizer, length, length * i // 32, "00417")
        assert length - sentence <= prompt.length <= length
        text = tokenizer.decode(prompt.ids)
        n = [part.count(".") - extra for part, extra in zip(text.split(sequences.KEY.format(key="00417")), (3, 0))]
        assert text.endswith(sequences.passkey_text("00417", *n)) and prompt.ids[1:] == tokenizer.encode(text)
        assert abs(prompt.k - length * i // 32) <= sentence / 2 + 1
        tail = tokenizer.decode(prompt.ids[-prompt.k :])
        assert tail.startswith("The pass key is 00417. Remember it.") or tail.startswith(" The pass")
        assert not tokenizer.decode(prompt.ids[-prompt.k + 1 :]).startswith("The")


def test_prompts_that_do_not_fit_and_bad_keys(tok):
    assert passkey_prompt(tok, 40, 40, "00417") is None
    assert passkey_prompt(tok, 512, 10, "00417") is None
    early = passkey_prompt(tok, 512, 512, "00417")
    assert tok.decode(early.ids[1:]).split("\n")[1].startswith(("The pass key", "The grass is green.\n"))
    for key in ("417", "004170", "abcde", "٠٠٤١٧"):
        with pytest.raises(ValueError, match="key must be five digits"):
            passkey_prompt(tok, 512, 256, key)


# ---------------------------------------------------------------- training sequences


@pytest.fixture(scope="session")
def corpus(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(english(8000, seed=3))
    return load_corpus([folder], tok, "all", folder / "cache")


ALL = Mix(passkey=0.4, repeat=0.3)


def test_batches_are_a_pure_function_of_seed_step_and_index(corpus, tok):
    def draw(step, indices, seed=1):
        return sample_batch(corpus, tok, 160, step, indices, seed=seed, mix=ALL)

    ids, targets = draw(5, range(16))
    assert ids.shape == targets.shape == (16, 160) and ids.dtype == targets.dtype == torch.int64
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    for ranks in (2, 4):  # each rank's slice
        parts = [draw(5, range(r * 16 // ranks, (r + 1) * 16 // ranks)) for r in range(ranks)]
        assert torch.equal(torch.cat([part[0] for part in parts]), ids)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)
    draw(9, range(7))
    order = [11, 3, 0, 15]
    assert torch.equal(draw(5, order)[0], ids[order])
    for other in (draw(6, range(16))[0], draw(5, range(16), seed=2)[0], draw(5, range(16, 32))[0]):
        assert not (other == ids).all(1).any()
    assert int(ids.max()) < tok.vocab_size and int(ids.min()) >= 0


def kind_of(tok, row) -> str:
    """What a row of corpus, keys or repeats is, from its tokens."""
    text = tok.decode(row.tolist())
    if "The pass key is " in text and "\nThe pass" in text or text.startswith("The pass key is"):
        return "prompt" if sequences.TASK in text else "dense"
    grams = [tuple(row[i : i + 4].tolist()) for i in range(len(row) - 3)]
    return "repeat" if len(set(grams)) < 0.75 * len(grams) else "text"


def test_shares_of_the_mix(corpus, tok, tmp_path):
    (tmp_path / "b.txt").write_text("".join(map(chr, np.random.default_rng(0).integers(97, 123, 40000))))
    letters = load_corpus([tmp_path / "b.txt"], tok, "all", tmp_path)  # a text without repeats
    ids, _ = sample_batch(letters, tok, 200, 0, range(600), seed=0, mix=Mix(0.4, 0.3, dense=0.25))
    kinds = [kind_of(tok, row) for row in ids]
    share = {kind: kinds.count(kind) / 600 for kind in ("dense", "prompt", "repeat", "text")}
    # half of the prompts fill a row alone, 70% of those without the header that tells a prompt from dense keys here
    for kind, want in {"dense": 0.1 + 0.105, "prompt": 0.3 - 0.105, "repeat": 0.3, "text": 0.3}.items():
        assert abs(share[kind] - want) < 0.06, share
    ids, _ = sample_batch(letters, tok, 200, 0, range(50), seed=0)  # the default: text, as in the paper
    stream = letters.tokens.tobytes()
    assert all(row.numpy().astype(letters.tokens.dtype).tobytes() in stream for row in ids)


@pytest.mark.parametrize("form", FORMS)
def test_training_prompts_have_the_tokens_of_real_prompts(form, tokenizers_by_form):
    """A model trained on another tokenization of the same words would fail the evaluation."""
    tokenizer = tokenizers_by_form[form]
    for i, (before, after) in enumerate([(0, 0), (1, 0), (0, 1), (5, 5), (7, 13), (40, 3)]):
        key = f"{i * 9973:05d}"
        want = tokenizer.encode(sequences.passkey_text(key, before, after) + f" {key}")
        filler = sequences._filler_line(tokenizer, before), sequences._filler_line(tokenizer, after)
        got = sequences._answered_prompt(tokenizer, key, *filler).tolist()
        assert got == [tokenizer.bos_id, *want, tokenizer.eos_id]
        prompt = tokenizer.encode(sequences.passkey_text(key, before, after))
        assert want[: len(prompt)] == prompt  # the answer's tokens are its own


def test_whole_prompts_end_with_the_right_answer_and_stay_within_the_window(corpus, tok):
    ids, targets = sample_batch(corpus, tok, 256, 0, range(100), seed=0, mix=Mix(passkey=1, dense=0))
    lengths = []
    for row in torch.cat([ids, targets[:, -1:]], 1).tolist():
        starts = [i for i in range(len(row)) if row[i] == tok.bos_id]
        for start in starts:
            text = tok.decode(row[start : row.index(tok.eos_id, start) + 1]) if tok.eos_id in row[start:] else ""
            if not text.startswith(sequences.TASK):
                continue  # the text after the prompts may hold the BOS of a document
            lengths.append(row.index(tok.eos_id, start) + 1 - start)
            key = re.search(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.\n", text)[1]
            assert text.endswith(f"\nWhat is the pass key? The pass key is {key}")
    assert len(lengths) >= 80 and max(lengths) <= 257 and max(lengths) > 230 and min(lengths) < 160


def test_keys_lie_anywhere_in_the_window(corpus, tok):
    ids, targets = sample_batch(corpus, tok, 256, 0, range(400), seed=0, mix=Mix(passkey=1, dense=0))
    back = []
    for row in torch.cat([ids, targets[:, -1:]], 1).tolist():
        text = tok.decode(row)
        found = re.search(r"\nWhat is the pass key\? The pass key is (\d{5})$", text)
        if found and not text.startswith(sequences.TASK):
            key_line = text.index(f"The pass key is {found[1]}. Remember it. {found[1]} is the pass key.\n")
            back.append(len(tok.encode(text[key_line:])))
    assert len(back) > 50 and max(back) > 240 and min(back) < 60  # the header would leave room for far less
    quarters = np.histogram(back, bins=4, range=(40, 257))[0] / len(back)
    assert quarters.min() > 0.1


@pytest.mark.parametrize("length", [64, 128, 256])
def test_a_prompt_alone_has_one_key_and_its_answer(corpus, tok, length):
    ids, targets = sample_batch(corpus, tok, length, 0, range(50), seed=0, mix=Mix(passkey=1, dense=0, alone=1))
    for row in torch.cat([ids, targets[:, -1:]], 1).tolist():
        text = tok.decode(row)
        assert text.count("Remember it.") == 1
        key = re.search(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.\n", text)[1]
        assert f"What is the pass key? The pass key is {key}" in text


def test_dense_keys_are_asked_for(corpus, tok):
    ids, _ = sample_batch(corpus, tok, 400, 0, range(20), seed=0, mix=Mix(passkey=1, dense=1))
    asked = 0
    for row in ids:
        text = tok.decode(row.tolist())
        found = re.findall(
            r"The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\.\n(?:(?!\. Remember).)*?"
            r"(?:What is the pass key\? The pass key is (\d{5})\n|(?=The pass key is \d{5}\. R))", text, re.S,
        )  # fmt: skip
        assert all(a == b and c in ("", a) for a, b, c in found)
        asked += sum(bool(c) for *_, c in found)
    assert asked > 60


def test_impossible_mixes():
    for shares in ({"passkey": 0.8, "repeat": 0.3}, {"repeat": -0.1}, {"dense": 1.5}):
        with pytest.raises(ValueError, match="shares of the mix must be 0 to 1"):
            Mix(**shares)


def test_a_window_too_short_for_a_prompt_gets_dense_keys(corpus, tok):
    ids, _ = sample_batch(corpus, tok, 40, 0, range(20), seed=0, mix=Mix(passkey=1, dense=0))
    assert all("The pass key is" in tok.decode(row.tolist()) for row in ids)


def test_a_corpus_shorter_than_one_window(corpus, tok):
    n = len(corpus)
    with pytest.raises(ValueError, match=rf"corpus.*: its {n} tokens don't fill one window of {n} \+ 1: give more"):
        sample_batch(corpus, tok, len(corpus), 0, [0], seed=0)
    ids, targets = sample_batch(corpus, tok, len(corpus) - 1, 0, [0], seed=0)
    assert ids[0].tolist() == corpus.tokens[:-1].tolist() and targets[0].tolist() == corpus.tokens[1:].tolist()


# ---------------------------------------------------------------- reports and their summaries

REPORTS = [(f"{i} " + english(10 + 30 * i, seed=i), f"Summary of {i}: {english(5 + i, seed=i + 50)}") for i in range(7)]


def parts(tokenizer, ids, targets):
    """Prompt, answer and padding of a row of sample_reports, as text and as tokens; the mask must be one run."""
    asked = (targets != -100).nonzero().flatten().tolist()
    start, end = asked[0], asked[-1] + 1
    assert asked == list(range(start, end))
    answer = targets[start:end].tolist()
    # the answer is what follows in the row, and its last token, EOS, is a target only
    assert ids[start + 1 : end].tolist() == answer[:-1] and answer[-1] == tokenizer.eos_id
    return ids[: start + 1].tolist(), answer[:-1], ids[end:].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_reports_have_the_prompt_of_generation_and_learn_the_summary_alone(form, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]
    reports = REPORTS + [(text, text[::-1] if text.strip() else "line\n\nline") for text in TEXTS if text.strip()]
    ids, targets = sample_reports(reports, tokenizer, 1500, 0, range(len(reports)), batch_size=len(reports), seed=3)
    assert ids.shape == targets.shape == (len(reports), 1500) and ids.dtype == targets.dtype == torch.int64
    order = np.random.default_rng([3, 0]).permutation(len(reports))
    for row, number in enumerate(order):
        document, summary = reports[number]
        prompt, answer, padding = parts(tokenizer, ids[row], targets[row])
        assert prompt == report_prompt(tokenizer, document) and prompt[0] == tokenizer.bos_id
        wanted = sequences.REPORT_PROMPT.format(document=document.strip())
        assert tokenizer.decode(prompt[1:]) == wanted
        assert tokenizer.decode(prompt[1:] + answer) == wanted + summary.strip()
        assert tokenizer.decode(answer).strip() == summary.strip() and not any(padding)


@pytest.mark.parametrize("form", FORMS)
def test_long_documents_are_cut_from_their_end(form, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]
    document, summary = english(600, seed=1), "It was the worst."
    whole = report_prompt(tokenizer, document)
    head, tail = sequences._report_frame(tokenizer)
    assert len(head) + len(tail) == sequences.report_frame_tokens(tokenizer)
    inside = whole[len(head) : len(whole) - len(tail)]
    assert report_prompt(tokenizer, document, 40) == head + inside[:40] + tail
    (ids,), (targets,) = sample_reports([(document, summary)], tokenizer, 200, 0, [0], batch_size=1, seed=0)
    prompt, answer, padding = parts(tokenizer, ids, targets)
    room = 200 - len(answer) - len(head) - len(tail)  # all that the window leaves
    assert prompt == head + inside[:room] + tail and padding == [] and len(prompt) + len(answer) == 200
    cut = dict(batch_size=1, seed=0, max_input=30)
    (ids,), (targets,) = sample_reports([(document, summary)], tokenizer, 200, 0, [0], **cut)
    assert parts(tokenizer, ids, targets)[:2] == (head + inside[:30] + tail, answer)


def test_batches_of_reports_are_a_pure_function_and_each_epoch_has_all(tok):
    def draw(step, indices, batch_size=4, seed=1):
        return sample_reports(REPORTS, tok, 400, step, indices, batch_size=batch_size, seed=seed)

    rows = [str(torch.cat(draw(step, [i])).tolist()) for step in range(7) for i in range(4)]
    epochs = [rows[i : i + 7] for i in range(0, 28, 7)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert set(epochs[0]) == set(epochs[1]) and len(set(map(tuple, epochs))) > 1  # each in its own order
    ids, targets = draw(5, range(4))
    order = [3, 0, 2]
    assert torch.equal(draw(5, order)[0], ids[order]) and torch.equal(draw(5, order)[1], targets[order])
    assert torch.equal(draw(1, range(2), batch_size=10)[0], draw(5, range(2), batch_size=2)[0])
    assert not torch.equal(draw(5, range(4), seed=2)[0], ids)


def test_a_report_without_room_is_named(tok):
    answer = len(sequences._answer(tok, REPORTS[6][1]))
    least = sequences.report_frame_tokens(tok) + answer  # EOS is a target only, so this leaves one token
    reports = [*REPORTS[:2], (REPORTS[0][0], REPORTS[6][1])]
    sequences.check_reports(reports, tok, least)
    _, targets = sample_reports(reports, tok, least, 0, range(3), batch_size=3, seed=0)
    assert (targets != -100).sum(1).max() == answer
    for refuse in (lambda: sequences.check_reports(reports, tok, least - 1),
                   lambda: sample_reports(reports, tok, least - 1, 0, range(3), batch_size=3, seed=0)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"report 3: {answer} tokens of summary.* window of {least - 1}: give"):
            refuse()


def test_a_tokenizer_without_bos_and_eos(tok):
    plain = replace(tok, bos_id=None, eos_id=None)
    (ids,), (targets,) = sample_reports(REPORTS[:1], plain, 300, 0, [0], batch_size=1, seed=0)
    asked = targets[targets != -100].tolist()
    assert plain.decode(asked) == REPORTS[0][1] and ids[: len(report_prompt(plain, REPORTS[0][0]))].tolist() == (
        report_prompt(tok, REPORTS[0][0])[1:])  # fmt: skip


def test_no_gradient_comes_from_the_documents_tokens(tok):
    """The loss's gradient is that of the summary's tokens alone, scored by hand from each row without its padding."""
    torch.manual_seed(0)
    model = LLaMA(LLaMAConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=32, intermediate_size=48))
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    ids, targets = sample_reports(REPORTS[:3], tok, 250, 0, range(3), batch_size=3, seed=0)
    model(ids, targets).backward()
    grads = [weight.grad.clone() for weight in model.parameters()]

    model.zero_grad()
    losses = []
    for number in np.random.default_rng([0, 0]).permutation(3):
        document, summary = REPORTS[number]
        prompt = report_prompt(tok, document)
        answer = [*tok.encode("\n" + summary)[len(tok.encode("\n")) :], tok.eos_id]
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    torch.cat(losses).mean().backward()
    for weight, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(weight.grad, grad, rtol=1e-4, atol=1e-6)

    # and the logits of all other positions get none
    hidden = model.hidden(ids).detach().requires_grad_()
    total = ChunkedCrossEntropy.apply(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())
    total.backward()
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, targets != -100)
